"""The planner's arithmetic, compared with counted bytes.

Counted on real CPU tensors: parameters, gradients, optimizer state, EMA, teacher, encoders and VAE, the store, and
activations in fp32. Counted on fake tensors of real sizes (shapes and autograd graphs without data): activations and
largest moments on CUDA. For these, CUDA's choices replace the CPU's: RMSNorm is fused, and fp32 under autocast; the
attention backend is flash attention; our kernels are replaced by what their operators say about shapes. The memory of a
real GPU is not checked here.
"""

import contextlib
import functools
import weakref
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline
from diffusers.training_utils import EMAModel
from packaging.version import Version
from tiny import tiny_image, tiny_image_pipeline, tiny_image_transformer, tiny_pipeline, tiny_transformer
from tiny_run import PROMPTS, tiny_config, tiny_teacher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import UMT5Config, UMT5EncoderModel

from linvideo.models import convert, finalize, load_pipeline
from linvideo.models.wan import LinVideoWanTransformer3DModel
from linvideo.planning import memory
from linvideo.planning.known import KNOWN
from linvideo.planning.memory import Layout
from linvideo.planning.sizes import UMT5_XXL, Sizes, read_sizes
from linvideo.run import run_folder
from linvideo.run.adapters import AdapterConfig, add_adapters
from linvideo.run.optimizer import StudentOptimizer
from linvideo.run.read_config import from_dict
from linvideo.run.run_config import ValidationConfig
from linvideo.run.sample import decode_latents
from linvideo.trajectories.collect import TrajectoryConfig, collect, open_store
from linvideo.trajectories.conditions import Conditions
from linvideo.trajectories.flow import predict_velocity
from linvideo.trajectories.images import encode_images
from linvideo.trajectories.prompts import encode_prompts
from linvideo.trajectories.store import StateBatch
from linvideo.transfer.selection import SelectionConfig
from linvideo.transfer.train_config import TrainConfig
from linvideo.transfer.warmup import attention_output_errors

TEXT = 512
KINDS = ("softmax", "linear", "mixed")
SMALL = TrajectoryConfig(height=64, width=96, num_frames=9)  # 3 x 4 x 6 tokens, see tiny_transformer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipeline folders by kind of model; "image" has an image encoder."""
    root = tmp_path_factory.mktemp("plan")
    for name, pipeline in (("text", tiny_pipeline()), ("image", tiny_image_pipeline())):
        pipeline.save_pretrained(root / name)
    return {name: root / name for name in ("text", "image")}


@pytest.fixture(scope="module")
def folder(folders):
    return folders["text"]


@functools.cache
def known(name: str, layers: int | None = None) -> Sizes:
    """The sizes of a known model at 480p, or of the same model with this number of layers."""
    config = KNOWN[name] if layers is None else KNOWN[name] | {"num_layers": layers}
    with mock.patch.dict(KNOWN, {name: config}):
        return read_sizes(name, TrajectoryConfig())


def nbytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def counted(call, model: torch.nn.Module, of: torch.nn.Module | None = None) -> int:
    """Count the bytes of the distinct storages that autograd saves in call(), except for weights and their autocast
    copies; if the module `of` is given, only while it runs. The tensors are kept alive, so that no storage is counted
    twice."""
    shapes = {p.shape for p in model.parameters()} | {p.mT.shape for p in model.parameters() if p.dim() == 2}
    weights, saved, inside = {p.untyped_storage()._cdata for p in model.parameters()}, {}, [of is None]

    def pack(tensor):
        key = tensor.untyped_storage()._cdata
        copy = tensor.dtype == torch.bfloat16 and tensor.shape in shapes
        if inside[0] and key not in weights and not copy:
            saved[key] = tensor
        return tensor

    hooks = []
    if of is not None:
        hooks.append(of.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True)))
        hooks.append(of.register_forward_hook(lambda *_: inside.__setitem__(0, False)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    for hook in hooks:
        hook.remove()
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


# CUDA's choices on fake CPU tensors


class FusedNorm(torch.autograd.Function):
    """RMSNorm that saves what aten._fused_rms_norm saves on CUDA: input, 1/rms, weight."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, inverse, weight)
        return x * inverse * weight

    @staticmethod
    def backward(ctx, grad):
        x, _, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), None


def rms_norm(x, _shape, weight=None, eps=None):
    return FusedNorm.apply(x.float() if torch.is_autocast_enabled("cpu") else x, weight, eps)


def attention(query, key, value, **_):
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.bfloat16() for x in (query, key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]


@contextlib.contextmanager
def like_cuda():
    with (
        FakeTensorMode(),
        mock.patch("torch.nn.functional.rms_norm", rms_norm),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", attention),
        mock.patch("linvideo.ops.linear_attn.uses_kernels", lambda _: True),
        mock.patch("linvideo.ops.inputs.uses_kernels", lambda _: True),
    ):
        yield


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that are still alive."""

    def __init__(self, known: torch.nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {x.untyped_storage()._cdata for p in known.parameters() for x in (p, p.grad) if x is not None}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key, size):
        self.seen.discard(key)
        self.now -= size


def meta_model(config: dict, types: list[str]) -> torch.nn.Module:
    with torch.device("meta"):
        return LinVideoWanTransformer3DModel(**config, attention_types=types).train()


def without_data(model: torch.nn.Module) -> torch.nn.Module:
    """Put fake weights into the meta model; call it inside like_cuda()."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype))
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


def conditions(sizes: Sizes, batch: int = 1, text: int = TEXT) -> Conditions:
    channels, image_dim = sizes.config.in_channels - sizes.config.out_channels, sizes.config.image_dim
    latents = torch.empty(batch, channels, *sizes.latents[1:]) if channels else None
    image = None if image_dim is None else torch.empty(batch, sizes.image_tokens, image_dim)
    return Conditions(torch.empty(batch, text, sizes.config.text_dim), latents, image)


def velocity(model, sizes: Sizes, batch: int = 1, text: int = TEXT):
    x, timestep = torch.empty(batch, *sizes.latents), torch.full((batch,), 500.0)
    return predict_velocity(model, x, timestep, conditions(sizes, batch, text))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "window"])
@pytest.mark.parametrize(
    "name, batch", [("wan2.1-1.3b", 1), ("wan2.1-i2v-14b", 1), ("wan2.1-i2v-14b", 2), ("wan2.2-i2v-a14b", 2)]
)
def test_activations_of_wan_on_cuda(name, batch, kind, autocast):
    """A block of a real model at 480p saves exactly the planned bytes, except for the text, which all blocks share."""
    sizes = known(name)
    arguments = (batch, sizes.tokens, TEXT, autocast)
    model = meta_model(KNOWN[name] | {"num_layers": 1}, [kind])
    with like_cuda(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model = without_data(model)
        block = counted(lambda: velocity(model, sizes, batch), model, model.blocks[0])
        whole = counted(lambda: velocity(model, sizes, batch).square().mean(), model)
    expected = memory.block_activations(sizes, kind, *arguments, weighted=True)
    shared = (2 if autocast else 4) * batch * (TEXT + sizes.image_tokens) * sizes.width
    copied = sizes.image_tokens and batch > 1  # each block copies image and text; the shared tensors only stay alive
    assert block - expected == (0 if copied else shared)
    # the planner leaves out tensors of the size of the time embedding
    whole += shared if copied else 0
    assert 0 <= whole - expected - memory.outer_activations(sizes, *arguments) < 1e-5 * whole


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, text", [("text", 7), ("image", TEXT)])
def test_activations_on_this_cpu(folders, name, text, kind, checkpointing):
    """The same formula holds on real fp32 tensors, after adding what only a CPU saves: RMSNorm in plain operations also
    keeps its quotient, and a mixed layer the output of its linear branch and 1 - r."""
    batch = 2
    sizes = read_sizes(str(folders[name]), SMALL)
    arguments = (batch, sizes.tokens, text, False)
    transformer = load_pipeline(folders[name]).transformer
    model = convert(transformer, "all", mode="mixed")
    if kind != "mixed":
        finalize(model, range(3) if kind == "linear" else [])
    model.train().requires_grad_(True)
    if checkpointing:
        model.enable_gradient_checkpointing()
    saved = counted(lambda: velocity(model, sizes, batch, text).square().mean(), model)

    rows, words = (4 * batch * tokens * sizes.width for tokens in (sizes.tokens, text + sizes.image_tokens))
    block = memory.block_activations(sizes, kind, *arguments, weighted=True)
    block += 3 * rows + words + (rows + 4 if kind == "mixed" else 0)
    blocks = rows if checkpointing else block
    expected = 3 * blocks + memory.outer_activations(sizes, *arguments)
    assert saved == pytest.approx(expected, rel=0.03)  # the time embedding is 2% of so small a model


@pytest.mark.parametrize("kinds", [["mixed"] * 3, ["linear", "linear", "softmax"], ["linear", "linear", "window"]])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["wan2.1-1.3b", "wan2.1-i2v-14b"])
def test_largest_moment_of_a_step_on_cuda(name, kinds, checkpointing, precision):
    """For forward and backward of three layers of a real model at 480p, the plan is between the counted bytes and 15%
    more."""
    sizes, model = known(name, 3), meta_model(KNOWN[name] | {"num_layers": 3}, kinds)
    stage = "mixed stage" if "mixed" in kinds else "fine-tuning"
    selection = {"num_linear_layers": 2}
    if "window" in kinds:
        selection = {"method": "layers", "layers": [0, 1], "window_layers": [2]}
    config = from_dict({"output_dir": "run", "selection": selection}, TrainConfig)
    layout = Layout(gradient_checkpointing=checkpointing, autocast=precision == "bf16")
    with like_cuda():
        model = without_data(model)
        if checkpointing:
            model.enable_gradient_checkpointing()
        for weight in model.parameters():
            weight.grad = torch.empty_like(weight)
        with Live(model) as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=layout.autocast):
                loss = velocity(model, sizes).square().mean()
            loss.backward()
    training, _ = split(memory.moments(sizes, config, layout, stage))
    assert 1 <= max(sum(moment.values()) for moment in training) / live.peak < 1.15


def split(moments: list[dict]) -> tuple[list[dict], list[dict]]:
    """The moments with activations, and the others."""
    training = [moment for moment in moments if memory.ACTIVATIONS in moment]
    return training, [moment for moment in moments if memory.ACTIVATIONS not in moment]


def moments_of(optimizer: torch.optim.Optimizer) -> list[list[torch.Tensor]]:
    return [[state["exp_avg"], state["exp_avg_sq"]] for state in optimizer.state.values()]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "stage, kind",
    [*zip(memory.STAGES[:3], ("softmax", "mixed", "linear"), strict=True), ("warm-up", "window")],
)
@pytest.mark.parametrize("name", ["wan2.1-1.3b", "wan2.1-14b", "wan2.1-i2v-14b"])
def test_largest_moment_before_training_on_cuda(name, stage, kind, autocast):
    sizes, model = known(name, 3), meta_model(KNOWN[name] | {"num_layers": 3}, [kind] * 3)
    with like_cuda():
        model = without_data(model)
        for weight in model.parameters():
            weight.grad = torch.empty_like(weight)
        x = torch.empty(1, *sizes.latents)
        batch = StateBatch(x, x, torch.full((1,), 500.0), conditions(sizes), torch.zeros(1), torch.zeros(1))
        with Live(model) as live, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if stage == "warm-up":
                attention_output_errors(model, batch, backward=True)
            else:
                with torch.no_grad():
                    velocity(model, sizes)
    selection = SelectionConfig(method="layers", window_layers=[0, 1, 2]) if kind == "window" else SelectionConfig()
    config = TrainConfig("run", selection=selection)
    largest = memory.moments(sizes, config, Layout(autocast=autocast), stage)[0]
    # a bf16 teacher needs no copies of its weights, but the fp32 model that stands for it here does
    copies = 2 * sizes.cast if autocast and stage == "trajectories" else 0
    # the plan leaves out the video's conditions
    assert 0.985 < (sum(largest.values()) + copies) / live.peak < 1.15


@pytest.mark.parametrize("height, width", [(480, 832), (720, 1280)])
def test_encoding_an_image_on_cuda(height, width):
    """The pipeline's VAE encodes the third chunk of frames, which stands for all later ones."""
    video, sizes = TrajectoryConfig(height=height, width=width, num_frames=9), known("wan2.1-i2v-14b")
    with torch.device("meta"):
        vae = AutoencoderKLWan().requires_grad_(False)
    pipeline = WanImageToVideoPipeline(**dict.fromkeys(("tokenizer", "text_encoder", "scheduler")), vae=vae)
    with like_cuda(), torch.no_grad(), Live(without_data(vae)) as live:
        settings = {"latents": torch.zeros(()), "dtype": torch.float32, "device": torch.device("cpu")}
        pipeline.prepare_latents(torch.empty(1, 3, height, width), 1, 16, height, width, 9, **settings)
    needed = memory.encoding_working(sizes, video)
    assert 1 <= needed / live.peak < 1.15
    moments = memory.moments(sizes, TrainConfig("run", trajectories=video), Layout(), "trajectories")
    assert moments[2:] == [moments[2] | {"frozen teacher": 0, memory.WORKING: needed}]
    text_to_video = memory.moments(known("wan2.1-14b"), TrainConfig("run"), Layout(), "trajectories")
    assert len(text_to_video) == 2


@pytest.mark.parametrize("batch, dtype", [(1, torch.float32), (8, torch.bfloat16)])
def test_encoding_prompts_on_cuda(batch, dtype):
    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config(**UMT5_XXL)).to(dtype).requires_grad_(False)
    with like_cuda(), torch.no_grad(), Live(without_data(encoder)) as live:
        encoder(*(torch.empty(batch, TEXT, dtype=torch.long) for _ in range(2)))  # ids and mask
    config = from_dict({"output_dir": "run", "prompts": {"encode_batch_size": batch}}, TrainConfig)
    moment = memory.moments(known("wan2.1-1.3b"), config, Layout(autocast=dtype == torch.bfloat16), "trajectories")[1]
    most = 1.15 if Version(transformers.__version__) >= Version("5.23") else 1.6  # older versions need less memory
    assert moment["frozen teacher"] == 0 and 1 <= moment[memory.WORKING] / live.peak < most


TI2V = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2}
TI2V |= {"in_channels": 12, "out_channels": 12, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}


@pytest.mark.parametrize("height, width", [(480, 832), (704, 1280)])
@pytest.mark.parametrize("settings, scale", [({}, 8), (TI2V, 16)], ids=["Wan", "TI2V"])
def test_decoding_a_video_on_cuda(height, width, settings, scale):
    """Validation's decoder decodes the third chunk of frames, which stands for all later ones."""
    video = TrajectoryConfig(height=height, width=width, num_frames=9)
    with torch.device("meta"):
        vae = AutoencoderKLWan(**settings).requires_grad_(False)
    vae.to = lambda device: vae  # fake weights cannot move
    with like_cuda(), torch.no_grad(), Live(without_data(vae)) as live:
        latents = torch.empty(1, vae.config.z_dim, 3, height // scale, width // scale)
        assert decode_latents(vae, latents).shape == (1, 3, 9, height, width)
    sizes = replace(known("wan2.1-14b"), vae_config=SimpleNamespace(**vae.config))
    assert 1 <= memory.decoding_working(sizes, video) / live.peak < 1.15


@pytest.mark.parametrize("stage", memory.TRAINING)
@pytest.mark.parametrize("name", ["wan2.1-14b", "wan2.2-a14b"])
def test_the_moments_of_a_validation(name, stage):
    """A validation adds two moments without gradients: sampling a video, with the other expert, and decoding it,
    without. At 720p, decoding is the largest moment if eight GPUs share the tokens."""
    sizes, layout = known(name), Layout(8, 8, 8, gradient_checkpointing=True, autocast=True)
    configs = [TrainConfig("run", validation=ValidationConfig(steps=steps)) for steps in (0, 1)]
    for config in configs:
        config.trajectories.height, config.trajectories.width = 720, 1280
    without, validated = (memory.moments(sizes, config, layout, stage) for config in configs)
    sampled, decoded = [moment for moment in validated if moment not in without]
    both, _ = memory.held(sizes, configs[1], layout, "trajectories")
    expert = both["frozen teacher"] / 2 if sizes.experts == 2 else 0
    assert sampled["gradients"] == 0 and sampled["the other expert"] == expert
    decoding = memory.decoding_working(sizes, configs[1].trajectories)
    assert decoded == {"gradients": 0, "VAE": 4 * 126_892_531, memory.WORKING: decoding}
    assert ("VAE" in memory.stage_memory(sizes, configs[1], layout, stage)) is (sizes.experts == 1)


def test_every_gpu_samples_trajectories_of_all_tokens():
    sizes, config = known("wan2.1-14b"), TrainConfig("run")
    alone, shared = (memory.moments(sizes, config, Layout(n, n, n), "trajectories")[0] for n in (1, 8))
    assert alone == shared and alone[memory.WORKING] == memory.forward_working(sizes, 1, sizes.tokens, 4)


@pytest.mark.parametrize("stage", memory.TRAINING)
def test_weights_gradients_and_optimizer(folder, stage):
    config = tiny_config("run", mixed_precision="bf16", use_ema=True)
    sizes = read_sizes(str(folder), SMALL)
    student = convert(tiny_transformer(), "all", mode="mixed").float().requires_grad_(True)
    if stage == "fine-tuning":
        finalize(student, [0, 2])
    optimizer = StudentOptimizer(student, config.optimizer, 10, 1e-2)
    (sum(weight.sum() for weight in student.parameters()) * 1e-3).backward()
    gradients = nbytes(weight.grad for weight in student.parameters())
    optimizer.step()
    adams = [adam for adam in (optimizer.adamw, optimizer.r_adam) if adam is not None]
    counts = [nbytes(tensors) for adam in adams for tensors in moments_of(adam)]

    accumulation = config.gradient_accumulation_steps
    layout = Layout(autocast=True, micro_batch=config.train_batch_size, accumulation=accumulation)
    parts, trained = memory.held(sizes, config, layout, stage)
    branches = parts["feature maps and r"]
    assert branches == 16 * nbytes(feature_maps_and_r(student)) / 4
    assert parts["trained weights, fp32"] + branches / 4 == nbytes(student.parameters()) == 4 * trained
    assert parts["gradients"] + branches / 4 == gradients
    assert parts["AdamW state"] + branches / 2 == sum(counts)
    assert parts["rollouts"] == 4 * 2 * accumulation * 16 * 3 * 8 * 12
    if stage == "fine-tuning":
        assert parts["EMA"] == nbytes(EMAModel(student.parameters()).shadow_params)
    else:
        assert "EMA" not in parts


def feature_maps_and_r(student: torch.nn.Module) -> list[torch.Tensor]:
    return [weight for name, weight in student.named_parameters() if ".linear_attn." in name]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["text", "image"])
def test_teacher_and_encoders_as_the_trainer_loads_them(folders, name, precision):
    folder = str(folders[name])
    config = tiny_config("run", mixed_precision=precision, pretrained_model_name_or_path=folder, device="cpu")
    pipeline = run_folder.load_teacher(config)
    arguments = (read_sizes(folder, SMALL), config, Layout(autocast=precision == "bf16"), "trajectories")
    assert memory.held(*arguments)[0] == {"frozen teacher": nbytes(pipeline.transformer.parameters())}
    encoders = [moment["encoders"] for moment in memory.moments(*arguments)[1:]]
    assert encoders[0] == nbytes(pipeline.text_encoder.parameters())
    images = [pipeline.vae, pipeline.image_encoder] if name == "image" else []
    assert encoders[1:] == ([sum(nbytes(part.parameters()) for part in images)] if images else [])


def test_the_published_models():
    """1.419 and 14.288 billion parameters; UMT5-XXL 5.681, the VAE 0.127; with image tokens 16.395, CLIP 0.631."""
    small, large, expert, image, image_expert = (known(name) for name in KNOWN)
    assert (small.parameters, large.parameters) == (1_418_996_800, 14_288_491_584)
    assert (small.experts, large.experts, expert.experts) == (1, 1, 2) and expert.parameters == large.parameters
    assert (small.text_encoder, small.vae) == (large.text_encoder, large.vae) == (5_680_910_336, 126_892_531)
    assert small.tokens == large.tokens == image.tokens == 32_760
    assert (image.parameters, image.image_encoder, image.image_tokens) == (16_394_878_784, 630_766_080, 257)
    assert image_expert.parameters == large.parameters + 20 * 4 * 5120 and image_expert.experts == 2
    assert image_expert.image_encoder == image_expert.image_tokens == 0 and image.latents == large.latents
    hub = "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"
    assert read_sizes(hub, TrajectoryConfig()) == image


def test_adapters():
    model = convert(tiny_transformer(), "all", copy=False)
    add_adapters(model, AdapterConfig(rank=4))
    with mock.patch.dict(KNOWN, {"tiny": dict(tiny_transformer().config)}):
        sizes = read_sizes("tiny", SMALL)
    adapters = [weight.numel() for name, weight in model.named_parameters() if "lora" in name]
    assert memory.lora_parameters(sizes, 4, AdapterConfig().target_modules) == sum(adapters)


@pytest.mark.parametrize("dtype, stride", [("float16", 1), ("float32", 3)])
def test_the_store(tmp_path, dtype, stride):
    config = tiny_config(tmp_path)
    config.trajectories.dtype, config.trajectories.stride = dtype, stride
    pipeline = tiny_teacher()
    pipeline.save_pretrained(tmp_path / "teacher")
    prompts = encode_prompts(pipeline, PROMPTS, config.prompts)
    store = open_store(tmp_path / "store", pipeline, prompts, config.trajectories, seed=0)
    collect(store, pipeline, prompts, progress=False)
    files = list((tmp_path / "store").glob("*.safetensors"))
    headers = [8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files]
    written = sum(file.stat().st_size for file in files) - sum(headers)
    assert written == memory.store_bytes(config, read_sizes(str(tmp_path / "teacher"), config.trajectories))
    assert len(files) == 3 and max(headers) < 1000


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_the_image_conditions(tmp_path, clip, autocast):
    pipeline = tiny_image_pipeline(tiny_image_transformer(clip=clip).to(torch.bfloat16 if autocast else torch.float32))
    pipeline.save_pretrained(tmp_path / "teacher")
    encode_images(pipeline, [tiny_image(0), tiny_image(1)], SMALL, tmp_path / "images.safetensors")
    written, header = (tmp_path / "images.safetensors").read_bytes(), 8
    header += int.from_bytes(written[:8], "little")
    sizes = read_sizes(str(tmp_path / "teacher"), SMALL)
    assert len(written) - header == 2 * memory.condition_bytes(sizes, Layout(autocast=autocast))


def test_the_mixed_model_is_measured_while_its_optimizer_lives():
    """This happens right after the mixed stage, with the batch of the sensitivity pass: AdamW's state is in memory, but
    gradients are not."""
    sizes = known("wan2.1-1.3b")
    config = from_dict({"output_dir": "run", "sensitivity": {"batch_size": 32}}, TrainConfig)
    layout = Layout(gradient_checkpointing=True, autocast=True, forward_batch=(1, 1, 32))
    parts = memory.stage_memory(sizes, config, layout, "mixed stage")
    assert parts["gradients"] == 0 and parts["AdamW state"] == 8 * sizes.parameters
    assert parts[memory.WORKING] == memory.forward_working(sizes, 32, sizes.tokens, 2)


def test_fsdp_shards_everything_except_branches_and_rollouts():
    sizes, config = known("wan2.1-1.3b"), TrainConfig("run", use_ema=True)
    alone, _ = memory.held(sizes, config, Layout(critic=True), "fine-tuning")
    shared, _ = memory.held(sizes, config, Layout(gpus=8, shard=8, critic=True), "fine-tuning")
    branches = shared.pop("feature maps and r")
    assert branches == alone.pop("feature maps and r")
    weights = sizes.whole + (sizes.parameters - sizes.whole) / 8
    assert 0 < sizes.whole < 0.01 * sizes.parameters
    assert shared.pop("EMA") == 4 * weights + branches / 4 and alone.pop("EMA") == 4 * sizes.parameters + branches / 4
    for name, size in {"trained weights, fp32": 4, "gradients": 4, "AdamW state": 8}.items():
        assert shared.pop(name) == size * weights and alone.pop(name) == size * sizes.parameters
    assert shared == pytest.approx({name: size / 8 for name, size in alone.items()})
    assert shared["critic, with its training"] == 16 * sizes.parameters / 8
