"""Learn in your own loop which layers become linear: python examples/train_in_your_own_loop.py [output folder]"""

import sys
import tempfile

import torch

import linvideo

torch.manual_seed(0)
pipe = linvideo.load_pipeline("linvideo/demo/teacher")
teacher = pipe.transformer
# a copy whose layers compute r * softmax + (1 - r) * linear attention
student = linvideo.convert(teacher, mode="mixed")
r = [block.attn1.linear_attn.r for block in student.blocks]  # one trainable number each, 0.8 at the start
others = [parameter for name, parameter in student.named_parameters() if not name.endswith(".r")]
optimizer = torch.optim.AdamW([{"params": others, "lr": 2e-4}, {"params": r, "lr": 2e-2}], weight_decay=0.0)

captions = ["a red disc moving left", "a blue square moving up", "a green cross moving down"]
with torch.no_grad():  # the only data are samples of the teacher, in latent space
    clean = linvideo.generate_video(pipe, captions, output_type="latent", **linvideo.sampling_settings(pipe))
    text, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=16)
for step in range(20):
    t = torch.rand(len(clean), 1, 1, 1, 1)
    noisy = (1 - t) * clean + t * torch.randn_like(clean)
    inputs = {"hidden_states": noisy, "timestep": 1000 * t.flatten(), "encoder_hidden_states": text}
    with torch.no_grad():
        velocity = teacher(**inputs).sample
    error = (student(**inputs).sample - velocity).square().mean()
    (error + 0.2 * (torch.cat(r).mean() - 0.5).square()).backward()  # draws the mean of r to one half
    optimizer.step(), optimizer.zero_grad()
    for scalar in r:
        scalar.data.clamp_(0, 1)
    print(f"step {step}: velocity error {error:.5f}, r", *(f"{scalar.item():.2f}" for scalar in r))
linear = torch.cat(r).argsort()[: len(r) // 2].tolist()  # the half with the smallest r
pipe.transformer = linvideo.finalize(student, linear_layers=linear)  # drops r and the branches that aren't used
linvideo.save_pipeline(pipe, sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
