"""Bytes on one GPU in each stage of a training run, by part. Everything is derived from sizes; nothing is measured.

Activations are what autograd keeps: the tensors that the operations of diffusers' WanTransformerBlock and of linvideo's
attention save on CUDA (PyTorch 2.13's autocast lists, fused RMSNorm, a flash-attention backend, our kernels). Kernels'
own scratch memory, fragmentation and the CUDA context are not in here: the plan keeps a reserve for them.

    B samples, N tokens of one (of a rank under context parallelism), T text tokens, C = H D channels, F of the MLP

Of an image-to-video model the conditions are channels beside the latents and, with an image encoder, image tokens
before the text's: the cross-attention has keys and values of their own for them and adds what comes out.
"""

from dataclasses import dataclass
from math import ceil, prod

from linvideo.ops.reference import WEIGHTED_MAPS
from linvideo.planning.sizes import TEXT_TOKENS, Sizes
from linvideo.trajectories.collect import TrajectoryConfig
from linvideo.transfer.train_config import TrainConfig

FP32, BF16 = 4, 2
TRAINING = ("mixed stage", "fine-tuning")
STAGES = ("trajectories", "warm-up", "sensitivity", *TRAINING)
ACTIVATIONS, COPIES, WORKING = "saved for the backward", "bf16 copies, gathered blocks", "working space"


@dataclass(frozen=True)
class Layout:
    """How a step is laid out on the GPUs; the defaults are what `linvideo train` does without options.

    Args:
        gpus: all of them. shard: of them, those that hold one copy of the weights between them (FSDP2).
        context_parallel: GPUs that share a sample's tokens; the others hold other samples.
        micro_batch: samples per forward. accumulation: forwards per optimizer step.
        autocast: mixed_precision bf16. lora: rank of adapters on a frozen student; feature maps and r still train in
            full. offload_teacher: to CPU memory. critic: a fake-score network for distillation, trained beside the
            student.
        forward_batch: samples per forward on a GPU in the stages without a backward through the model, in STAGES'
            order.
    """

    gpus: int = 1
    shard: int = 1
    context_parallel: int = 1
    gradient_checkpointing: bool = False
    micro_batch: int = 1
    accumulation: int = 1
    autocast: bool = False
    lora: int | None = None
    offload_teacher: bool = False
    critic: bool = False
    forward_batch: tuple[int, int, int] = (1, 1, 1)

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.gpus // self.context_parallel


def block_activations(
    sizes: Sizes, kind: str, batch: int, tokens: int, text: int, autocast: bool, weighted: bool
) -> int:
    """Bytes one block saves; kind is its self-attention, "softmax", "linear" or "mixed"; weighted: F = 2D features."""
    heads, dim = sizes.config.num_attention_heads, sizes.config.attention_head_dim
    e = BF16 if autocast else FP32  # what Linear and attention compute in; norms, gates and RMSNorm are fp32
    rows, words = batch * tokens * sizes.width, batch * text * sizes.width
    row, log_sum = batch * tokens * FP32, batch * heads * tokens * FP32  # a number a row; the log-sum-exp of softmax
    modulation = batch * sizes.width * FP32
    # norm1, norm3: input, output (for the scale), mean, 1/std, 1 + scale; each gate: its input, and once all six
    total = 2 * (2 * FP32 * rows + 2 * row + modulation) + (e + FP32) * rows + 6 * modulation
    if sizes.config.cross_attn_norm:  # affine, without a scale
        total += FP32 * rows + 2 * row
    # norm_q, norm_k of self-attention and norm_q of cross-attention: input and 1/rms; norm_k there, of the text
    total += 3 * (FP32 * rows + row) + FP32 * words + batch * text * FP32
    # inputs of to_q/k/v (one tensor), of the cross-attention's to_q, of the MLP; in the MLP, GELU's input and output
    total += e * (3 * rows + 2 * batch * tokens * sizes.config.ffn_dim)
    # Self-attention: q, k, v and out, which is to_out's input; a mixed layer's branch keeps turned q and k (autocast's
    # RMSNorm gives fp32, and they are cast once for both) and its out. linear: turned q and k, v, and out.
    attention = {"softmax": 4, "linear": 4, "mixed": 5}
    total += e * attention[kind] * rows + FP32 * tokens * dim  # the tables of cos and sin
    if kind != "linear":
        total += log_sum
    if kind != "softmax":  # S [F, D] and z [F] of each head; r and softmax_out are there already
        total += FP32 * batch * heads * (2 if weighted else 1) * dim * (dim + 1)
    # Cross-attention: q, out (and to_out's input), k and v of the text
    total += e * ((3 if autocast else 2) * rows + 2 * words) + log_sum
    if sizes.image_tokens:
        image = batch * sizes.image_tokens * sizes.width
        # the image's norm_added_k, k, v and out; and q, cast once more by autocast, or else the sum, to_out's input
        total += FP32 * image + batch * sizes.image_tokens * FP32 + e * (2 * image + 2 * rows) + log_sum
        if batch > 1:  # text and image are slices of one tensor: each of the four Linears makes its own contiguous
            total += e * 2 * (words + image)
    return total


def outer_activations(sizes: Sizes, batch: int, tokens: int, text: int, autocast: bool) -> int:
    """What the rest saves: the input, the text's two Linears, head (norm with scale, proj_out), the blocks' text; of an
    image before that two norms, two Linears and GELU."""
    e, rows = (BF16 if autocast else FP32), batch * tokens * sizes.width
    words, latents = batch * text * sizes.width, batch * prod(sizes.latents)
    head = 2 * FP32 * rows + 2 * FP32 * batch * tokens + e * rows
    inputs = latents * sizes.config.in_channels // sizes.config.out_channels
    total = head + e * (inputs + batch * text * sizes.config.text_dim + 3 * words) + FP32 * latents
    if sizes.image_tokens:
        tokens = batch * sizes.image_tokens
        embeds, image = tokens * sizes.config.image_dim, tokens * sizes.width
        total += FP32 * (embeds + image + 2 * 2 * tokens) + e * (3 * embeds + image)
    return total


def forward_working(sizes: Sizes, batch: int, tokens: int, e: int) -> int:
    """The largest moment of a forward without gradient: GELU, with its input, its output and four more rows; or k's
    rotation, with q and k before, q after and two rows of halves, which autocast has in fp32, and three more rows. The
    angles come on top."""
    rows, inner = batch * tokens * sizes.width, batch * tokens * sizes.config.ffn_dim
    return max(e * (2 * inner + 4 * rows), (5 * FP32 + 3 * e) * rows) + _angles(sizes, tokens)


def fitting_working(sizes: Sizes, batch: int, tokens: int, e: int) -> int:
    """The same of a step of the warm-up: the gradient of a layer's error takes four fp32 rows, beside q, k, v, both
    outputs and two more rows."""
    rows = batch * tokens * sizes.width
    return max(forward_working(sizes, batch, tokens, e), (4 * FP32 + 7 * e) * rows + _angles(sizes, tokens))


def _angles(sizes: Sizes, tokens: int) -> int:
    """cos and sin."""
    return 2 * FP32 * tokens * sizes.config.attention_head_dim


def backward_working(sizes: Sizes, batch: int, tokens: int, e: int) -> int:
    """Beside what is saved: the gradient of the block's output, and four fp32 rows or GELU's gradient and one."""
    rows, inner = batch * tokens * sizes.width, batch * tokens * sizes.config.ffn_dim
    return FP32 * rows + max(4 * FP32 * rows, e * inner + FP32 * rows)


def text_working(sizes: Sizes, batch: int, text: int, e: int) -> int:
    """While the text encoder works: about three tensors of attention scores, the mask with the bias of positions among
    them, and that bias alone."""
    return e * sizes.text_heads * text**2 * (3 * batch + 1)


def encoding_working(sizes: Sizes, video: TrajectoryConfig) -> int:
    """While the VAE encodes an image: the video that is grey after it, and about ten tensors of four frames at its
    first level, those of a residual block and the last frames of the chunk before, which every convolution keeps."""
    return FP32 * video.height * video.width * (3 * video.num_frames + 10 * 4 * sizes.vae_config.base_dim)


def decoding_working(sizes: Sizes, video: TrajectoryConfig) -> int:
    """While the VAE decodes: the video, and about thirteen tensors of four frames at its last level, of the same kinds;
    of Wan 2.2 TI2V's VAE, whose pixels are patches and whose levels have shortcuts, 22."""
    vae = sizes.vae_config
    channels = (22 if vae.is_residual else 13) * 4 * (vae.decoder_base_dim or vae.base_dim)
    return FP32 * video.height * video.width * (3 * video.num_frames + channels // (vae.patch_size or 1) ** 2)


def lora_parameters(sizes: Sizes, rank: int, target_modules: list[str]) -> int:
    """Adapters on the Linear layers of every block whose names end so: [rank, in] and [out, rank] each."""
    targets = tuple("." + name for name in target_modules)
    widths = (sum(shape) for name, shape in sizes.block_linears.items() if f".{name}".endswith(targets))
    return sizes.config.num_layers * rank * sum(widths)


def stages(config: TrainConfig) -> list[str]:
    """Those of STAGES that this run has."""
    steps = (1, config.warmup.max_train_steps, config.sensitivity.num_states)
    steps += (config.selection.max_train_steps * (config.selection.method == "learned"), config.max_train_steps)
    return [stage for stage, count in zip(STAGES, steps, strict=True) if count]


def layer_kinds(sizes: Sizes, config: TrainConfig, stage: str) -> dict[str, int]:
    """Kind of self-attention -> how many layers train as it, in a stage of TRAINING."""
    layers = sizes.config.num_layers
    chosen = config.selection.target(layers)
    if stage == "fine-tuning":
        kinds = {"linear": chosen, "softmax": layers - chosen}
    else:
        mixed = layers if config.selection.layers is None else chosen
        kinds = {"mixed": mixed, "softmax": layers - mixed}
    return {kind: count for kind, count in kinds.items() if count}


def stage_memory(sizes: Sizes, config: TrainConfig, layout: Layout, stage: str) -> dict[str, int]:
    """Part -> bytes on each GPU at the stage's largest moment."""
    parts, _ = held(sizes, config, layout, stage)
    together = (parts | moment for moment in moments(sizes, config, layout, stage))
    largest = max(together, key=lambda each: sum(each.values()))
    return {name: ceil(size) for name, size in largest.items()}


def loaded(sizes: Sizes, e: int) -> int:
    """A frozen transformer: loaded as bf16 it keeps its norms and the time embedding in fp32."""
    return e * sizes.parameters + (FP32 - e) * sizes.kept


def held(sizes: Sizes, config: TrainConfig, layout: Layout, stage: str) -> tuple[dict[str, float], float]:
    """(part -> bytes that are there throughout the stage, parameters that AdamW steps), on each GPU."""
    e = BF16 if layout.autocast else FP32
    base = loaded(sizes, e)
    if stage == "trajectories":  # every GPU samples on its own
        return {"frozen teacher": base * sizes.experts}, 0
    parts, tuning = {}, stage == "fine-tuning"
    if layout.lora is not None:
        parts["frozen base, also the teacher"] = base / layout.shard
    elif not layout.offload_teacher:
        parts["frozen teacher"] = base / layout.shard
    count = sum(n for kind, n in layer_kinds(sizes, config, stage).items() if kind != "softmax")
    branches = count * sizes.branch(config.feature_map, mixed=not tuning)  # whole on every GPU
    adapters = 0 if layout.lora is None else lora_parameters(sizes, layout.lora, config.lora.target_modules)
    full = sizes.whole + (sizes.parameters - sizes.whole) / layout.shard
    weights = full if layout.lora is None else adapters / layout.shard
    parts["trained weights, fp32"] = FP32 * weights
    # weight, gradient and Adam's two numbers; the sensitivity pass has the weight alone
    parts["feature maps and r"] = (FP32 if stage == "sensitivity" else 4 * FP32) * branches
    if stage not in TRAINING:
        return parts, branches
    parts |= {"gradients": FP32 * weights, "AdamW state": 2 * FP32 * weights}
    if tuning and config.use_ema:
        parts["EMA"] = FP32 * (weights + branches)
    if layout.critic:
        parts["critic, with its training"] = 4 * FP32 * sizes.parameters / layout.shard
    if (config.objective.name if tuning else config.selection.objective) != "mse":
        parts["lanes"] = FP32 * layout.micro_batch * layout.accumulation * prod(sizes.latents)
    return parts, weights + branches


def moments(sizes: Sizes, config: TrainConfig, layout: Layout, stage: str) -> list[dict[str, float]]:
    """Part -> bytes of what comes and goes, at each moment of the stage that may be its largest."""
    e, training = BF16 if layout.autocast else FP32, stage in TRAINING
    batch = layout.micro_batch if training else layout.forward_batch[STAGES.index(stage)]
    tokens = sizes.tokens if stage == "trajectories" else ceil(sizes.tokens / layout.context_parallel)
    text = config.prompts.max_sequence_length or TEXT_TOKENS
    # FSDP2 gathers each model's next block while one runs, and a block's gradient before it is scattered; without it
    # autocast keeps a copy of every fp32 weight that it casts, in the backward those of the block at hand.
    several = layout.gpus > 1 and stage != "trajectories"
    copies = block_copies = (2 * e * (2 + layout.critic) + FP32) * sizes.block if several else 0
    if not several and layout.autocast and layout.lora is None and stage != "trajectories":
        copies, block_copies = BF16 * sizes.cast, BF16 * sizes.block_cast
    forward = (fitting_working if stage == "warm-up" else forward_working)(sizes, batch, tokens, e)
    if not training:
        encoding = _encoding(sizes, config, text, e) if stage == "trajectories" else []
        return [{COPIES: copies, WORKING: forward}, *encoding]

    arguments, weighted = (batch, tokens, text, layout.autocast), config.feature_map in WEIGHTED_MAPS
    kinds = layer_kinds(sizes, config, stage)
    blocks = {kind: block_activations(sizes, kind, *arguments, weighted) for kind in kinds}
    outer, backward = outer_activations(sizes, *arguments), backward_working(sizes, batch, tokens, e)
    others = []  # AdamW steps in place, a checkpoint leaves tensor by tensor
    if config.validation.steps:  # one video at a time, sampled with the other expert, whole, and decoded without
        idle = loaded(sizes, e) * (sizes.experts - 1)
        video = forward_working(sizes, 1, sizes.tokens if idle else tokens, e)
        others.append({"gradients": 0, "the other expert": idle, COPIES: copies, WORKING: video})
        decoding = decoding_working(sizes, config.trajectories)
        others.append({"gradients": 0, "VAE": FP32 * sizes.vae, WORKING: decoding})
    if stage == "mixed stage" and config.sensitivity.num_states:
        # the mixed model is judged as the sensitivity pass judges
        judged = forward_working(sizes, layout.forward_batch[2], tokens, e)
        others.append({"gradients": 0, COPIES: copies, WORKING: judged})
    if not layout.gradient_checkpointing:
        kept = outer + sum(count * blocks[kind] for kind, count in kinds.items())
        return [{ACTIVATIONS: kept, COPIES: copies, WORKING: max(forward, backward)}, *others]
    # the blocks' inputs; in the backward one block's activations at a time beside them
    inputs = e * batch * tokens * sizes.width * sizes.config.num_layers
    return [
        {ACTIVATIONS: inputs + outer, COPIES: copies, WORKING: forward},
        {ACTIVATIONS: inputs + max(blocks.values()), COPIES: block_copies, WORKING: backward},
        *others,
    ]


def _encoding(sizes: Sizes, config: TrainConfig, text: int, e: int) -> list[dict[str, float]]:
    """While prompts, and then images, are encoded, before the transformers come."""
    working = text_working(sizes, config.prompts.encode_batch_size, text, e)
    found = [{"frozen teacher": 0, "encoders": e * sizes.text_encoder, WORKING: working}]
    if sizes.condition_channels:
        encoders = FP32 * (sizes.vae + sizes.image_encoder)  # whatever the precision
        found.append({"frozen teacher": 0, "encoders": encoders, WORKING: encoding_working(sizes, config.trajectories)})
    return found


def saved(sizes: Sizes, config: TrainConfig, layout: Layout, stage: str) -> int:
    """The most that is saved for the backward at any moment of a stage of TRAINING."""
    return max(moment.get(ACTIVATIONS, 0) for moment in moments(sizes, config, layout, stage))


def store_bytes(config: TrainConfig, sizes: Sizes) -> int:
    """Of the trajectories on disk: x and u, a timestep (4 bytes) and a condition (1) a state, a prompt (8) and the
    sample a video. Headers, under a kilobyte a file, and the manifest come on top. With two experts a store has the
    steps of one: this is the most it can be."""
    wanted = config.trajectories
    latents = prod(sizes.latents) * {"float32": FP32}.get(wanted.dtype, BF16)
    return wanted.num_trajectories * (wanted.states_per_trajectory * (2 * latents + 4 + 1) + latents + 8)


def condition_bytes(sizes: Sizes, layout: Layout) -> int:
    """Of each prompt's image conditions, on disk and in the CPU memory of every process; 0 for text-to-video models."""
    numbers = sizes.condition_channels * prod(sizes.latents[1:]) + sizes.image_tokens * (sizes.config.image_dim or 0)
    return (BF16 if layout.autocast else FP32) * numbers
