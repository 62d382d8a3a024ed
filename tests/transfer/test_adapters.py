"""LoRA training: the frozen base is the teacher, and the result is an ordinary converted pipeline."""

import shutil

import pytest
import torch
from tiny import tiny_transformer
from tiny_run import PROMPTS, run, tiny_config, tiny_teacher, watched

from linvideo.models import convert, load_pipeline
from linvideo.models.branches import feature_weights, gates
from linvideo.run.adapters import AdapterConfig, FrozenBase, adapters, add_adapters
from linvideo.run.checkpoint import list_checkpoints, load_checkpoint
from linvideo.run.parallel import Ranks
from linvideo.run.sharding import gather
from linvideo.transfer import train

LORA = {"lora": {"rank": 4, "alpha": 8.0}}


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    pipeline = tiny_teacher()
    before = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    with watched() as seen:
        result = train(tiny_config(folder, **LORA), pipeline, prompts=PROMPTS)
    return folder, seen, result, before


def inputs(seed: int = 1) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, 16, 2, 4, 4, generator=generator),
        "timestep": torch.tensor([900.0, 300.0]),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=generator),
        "return_dict": False,
    }


def test_the_teacher_is_left_as_it_was(lora_run):
    _, seen, _, before = lora_run
    teacher = seen.source.transformer
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_only_adapters_and_branches_train(lora_run):
    folder, seen, _, before = lora_run
    base = {name: x for name, x in seen.student.state_dict().items() if ".lora_" not in name}
    base = {name.replace(".base_layer", ""): x for name, x in base.items() if ".linear_attn." not in name}
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.items())
    saved, _ = load_checkpoint(list_checkpoints(folder)[-1])
    assert saved and all(".lora_" in name or ".linear_attn." in name for name in saved)
    ups = [layer.lora_B["default"].weight for layer in adapters(seen.student).values()]
    assert len(ups) == 3 * 8 and all(up.abs().max() > 0 for up in ups)


def test_the_exported_model_computes_the_same_as_the_trained_one(lora_run):
    _, seen, result, before = lora_run
    exported = load_pipeline(result.pipeline_path).transformer
    assert not adapters(exported) and exported.config.attention_types.count("linear") == 2
    with torch.no_grad():
        torch.testing.assert_close(exported(**inputs())[0], seen.student(**inputs())[0], rtol=1e-5, atol=1e-5)
    assert not torch.equal(exported.blocks[0].attn1.to_q.weight, before["blocks.0.attn1.to_q.weight"])


def test_the_frozen_base_is_the_teacher_and_leaves_the_student_trainable():
    teacher = tiny_transformer()
    student = convert(teacher, r_init=0.3, copy=False)
    add_adapters(student, AdapterConfig(rank=2))
    with torch.no_grad():
        for layer in adapters(student).values():
            layer.lora_B["default"].weight.normal_()
        base = FrozenBase(student)
        changed = student(**inputs())[0]
        assert torch.equal(base(**inputs())[0], teacher(**inputs())[0])
        assert torch.equal(student(**inputs())[0], changed) and not torch.equal(changed, teacher(**inputs())[0])
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    adapted = {name for name in trained if ".lora_" in name}
    assert trained - adapted == {
        *feature_weights(student),
        *(f"blocks.{layer}.attn1.linear_attn.r" for layer in gates(student)),
    }


def test_merged_weights_keep_their_dtype():
    student = convert(tiny_transformer().to(torch.bfloat16), layers=[0], mode="linear", copy=False)
    add_adapters(student, AdapterConfig(rank=2, alpha=4.0))
    layer = adapters(student)["blocks.1.attn2.to_v"]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    whole = gather(student, Ranks.alone())
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    expected = (layer.base_layer.weight.float() + 2.0 * up @ down).to(torch.bfloat16)
    assert torch.equal(whole.blocks[1].attn2.to_v.weight, expected)
    assert whole.blocks[0].attn1.linear_attn.q_weight.dtype == torch.float32
    assert whole.state_dict().keys() == convert(tiny_transformer(), layers=[0], mode="linear").state_dict().keys()


def test_an_interrupted_run_is_continued_exactly(lora_run, tmp_path):
    folder, _, result, _ = lora_run
    again = tmp_path / "run"
    shutil.copytree(folder, again)
    middle = next(path for path in list_checkpoints(again) if load_checkpoint(path)[1]["stage"] == "finetune")
    repeated = run(again, resume_from_checkpoint=str(middle), **LORA)
    theirs = result.pipeline.transformer.state_dict()
    assert all(torch.equal(x, theirs[name]) for name, x in repeated.pipeline.transformer.state_dict().items())


@pytest.mark.parametrize(
    "lora, expected",
    [
        ({"rank": 0}, "lora.rank must be at least 1, got 0"),
        ({"rank": 2, "alpha": -1.0}, "lora.alpha must be positive"),
        ({"rank": 2, "target_modules": []}, "lora.target_modules must name at least one"),
        ({"rank": 2, "target_modules": ["to_z"]}, "to_z"),
    ],
)
def test_refused(lora, expected, tmp_path):
    with pytest.raises(ValueError, match=expected):
        run(tmp_path / "run", lora=lora)


# The other options that save memory don't change the result.


@pytest.mark.parametrize("options", [{"offload_teacher": True}, {"compile": True}])
def test_memory_and_speed_options_change_nothing(options, tmp_path, monkeypatch):
    compiled = []

    def in_eager(function, **_):  # skips inductor; checks that each block is one graph without breaks
        compiled.append(function)
        return original(function, backend="eager", fullgraph=True)

    original = torch.compile
    monkeypatch.setattr(torch, "compile", in_eager)
    adm = {"objective": {"name": "adm"}, "selection": {"max_train_steps": 2, "num_linear_layers": 2}}
    plain, other = (run(tmp_path / name, **adm, **more) for name, more in (("plain", {}), ("other", options)))
    theirs = other.pipeline.transformer.state_dict()
    assert all(torch.equal(x, theirs[name]) for name, x in plain.pipeline.transformer.state_dict().items())
    assert len(compiled) == (3 if "compile" in options else 0)


def test_attention_backend_reaches_student_and_teacher(tmp_path):
    from diffusers.models.attention_dispatch import attention_backend

    with attention_backend("native"):  # the setter also writes a process-wide default; this restores it
        config = tiny_config(tmp_path / "run", attention_backend="_native_math")
        with watched() as seen:
            train(config, tiny_teacher(), prompts=PROMPTS)
        for model in (seen.student, seen.teacher):
            assert {block.attn1.processor._attention_backend for block in model.blocks} == {"_native_math"}
        windows = {"method": "layers", "window_layers": [2]}
        config = tiny_config(tmp_path / "windows", attention_backend="_native_math", selection=windows)
        with pytest.raises(ValueError, match="with window layers must be one of native, .*, got '_native_math'"):
            train(config, tiny_teacher(), prompts=PROMPTS)
        assert not list((tmp_path / "windows").rglob("*.safetensors"))  # nothing is sampled before
    with pytest.raises(ValueError, match="must be one of the following"):
        train(tiny_config(tmp_path / "other", attention_backend="fast"), tiny_teacher(), prompts=PROMPTS)
