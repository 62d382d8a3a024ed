"""Bytes on one GPU in each stage of a training run, by part. Everything is calculated from sizes; nothing is measured.

Activations are the tensors that autograd keeps: those that the operations of diffusers' WanTransformerBlock and of
linvideo's attention save on CUDA (PyTorch 2.13's autocast lists, fused RMSNorm, a flash-attention backend, our
kernels). Scratch memory of kernels, fragmentation and the CUDA context are not counted: the plan keeps a reserve for
them.

Symbols: B samples; N tokens of one sample (on one rank under context parallelism); T text tokens; C = H D channels;
F channels inside the MLP.

An image-to-video model has its conditions as channels next to the latents and, with an image encoder, as image tokens
before those of the text. The cross-attention has separate keys and values for the image tokens, and adds the result.
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
    """The layout of a step on the GPUs. The defaults are those of `linvideo train`.

    Args:
        gpus: Number of GPUs in total.
        shard: Number of GPUs that together hold one copy of the weights (FSDP2).
        context_parallel: Number of GPUs that share the tokens of a sample. Other GPUs hold other samples.
        gradient_checkpointing: Whether the blocks' activations are recomputed in the backward.
        micro_batch: Samples per forward.
        accumulation: Forwards per optimizer step.
        autocast: Whether mixed_precision is bf16.
        lora: Rank of the adapters on a frozen student, whose feature maps and r still train in full. None trains all
            weights.
        offload_teacher: Whether the teacher's weights are in CPU memory.
        critic: Whether a fake-score network is trained next to the student, as in a distillation.
        forward_batch: Samples per forward on one GPU in each of the stages without a backward through the model, in
            the order of STAGES.
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
    """Return the bytes that one block saves for its backward.

    kind: Kind of its self-attention: "softmax", "linear", "mixed" or "window".
    weighted: Whether its feature map has weights, and so 2D features in place of D.
    """
    heads, dim = sizes.config.num_attention_heads, sizes.config.attention_head_dim
    e = BF16 if autocast else FP32  # bytes of a number in Linear and attention; norms, gates and RMSNorm are fp32
    rows, words = batch * tokens * sizes.width, batch * text * sizes.width
    row, log_sum = batch * tokens * FP32, batch * heads * tokens * FP32  # one number per row; softmax's log-sum-exp
    modulation = batch * sizes.width * FP32
    # norm1, norm3: input, output (for the scale), mean, 1/std, 1 + scale; each gate: its input, and all six gates once
    total = 2 * (2 * FP32 * rows + 2 * row + modulation) + (e + FP32) * rows + 6 * modulation
    if sizes.config.cross_attn_norm:  # affine, without a modulating scale
        total += FP32 * rows + 2 * row
    # norm_q, norm_k of self-attention and norm_q of cross-attention: input and 1/rms; norm_k of cross-attention: the
    # same for the text
    total += 3 * (FP32 * rows + row) + FP32 * words + batch * text * FP32
    # inputs of to_q/k/v (one tensor), of the cross-attention's to_q and of the MLP; in the MLP, GELU's input and output
    total += e * (3 * rows + 2 * batch * tokens * sizes.config.ffn_dim)
    # Self-attention: q, k, v and out, which is to_out's input. The branch of a mixed layer keeps rotated q and k
    # (RMSNorm under autocast returns fp32, and they are cast once for both attentions) and its own out. A linear layer
    # and a window layer keep rotated q and k, v, and out.
    attention = {"softmax": 4, "linear": 4, "mixed": 5, "window": 4}
    total += e * attention[kind] * rows + FP32 * tokens * dim  # the latter for the tables of cos and sin
    if kind != "linear":
        total += log_sum
    if kind in ("linear", "mixed"):  # S [F, D] and z [F] of each head; r and softmax_out are counted already
        total += FP32 * batch * heads * (2 if weighted else 1) * dim * (dim + 1)
    # Cross-attention: q, out (and to_out's input), and k and v of the text
    total += e * ((3 if autocast else 2) * rows + 2 * words) + log_sum
    if sizes.image_tokens:
        image = batch * sizes.image_tokens * sizes.width
        # norm_added_k, k, v and out of the image; then q, which autocast casts once more, or without autocast the sum,
        # which is to_out's input
        total += FP32 * image + batch * sizes.image_tokens * FP32 + e * (2 * image + 2 * rows) + log_sum
        # text and image are slices of one tensor, of which each of the four Linears makes a contiguous copy
        if batch > 1:
            total += e * 2 * (words + image)
    return total


def outer_activations(sizes: Sizes, batch: int, tokens: int, text: int, autocast: bool) -> int:
    """Return the bytes that everything outside the blocks saves: the input, the two Linears of the text, the head (norm
    with scale, proj_out) and the text that the blocks read; with an image also its two norms, two Linears and GELU."""
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
    """Return the bytes at the largest moment of a forward without gradient.

    This is GELU, with its input, its output and four more rows; or the rotation of k, with q and k before, q after and
    two rows of halves, which are fp32 under autocast, and three more rows. The angles come on top.
    """
    rows, inner = batch * tokens * sizes.width, batch * tokens * sizes.config.ffn_dim
    return max(e * (2 * inner + 4 * rows), (5 * FP32 + 3 * e) * rows) + _angles(sizes, tokens)


def fitting_working(sizes: Sizes, batch: int, tokens: int, e: int, windows: bool) -> int:
    """Return the same for the backward of a layer's error in the warm-up, which takes four fp32 rows in addition to q,
    k, v, both outputs and two more rows.

    With `windows`, for window layers: q and k are still in fp32, since the branch takes them before they are cast and
    rotates them itself, and the output of the layer's own forward, which is not used here, is alive, too.
    """
    rows = batch * tokens * sizes.width
    held = 6 * FP32 + 8 * e if windows else 4 * FP32 + 7 * e
    return held * rows + _angles(sizes, tokens)


def _angles(sizes: Sizes, tokens: int) -> int:
    """Return the bytes of the tables of cos and sin."""
    return 2 * FP32 * tokens * sizes.config.attention_head_dim


def backward_working(sizes: Sizes, batch: int, tokens: int, e: int) -> int:
    """Return the bytes that a block's backward needs in addition to what is saved: the gradient of the block's output,
    and either four fp32 rows or the gradient of GELU and one row."""
    rows, inner = batch * tokens * sizes.width, batch * tokens * sizes.config.ffn_dim
    return FP32 * rows + max(4 * FP32 * rows, e * inner + FP32 * rows)


def text_working(sizes: Sizes, batch: int, text: int, e: int) -> int:
    """Return the working memory of the text encoder: about three tensors of attention scores (one of them is the mask
    with the position bias), and the position bias alone."""
    return e * sizes.text_heads * text**2 * (3 * batch + 1)


def encoding_working(sizes: Sizes, video: TrajectoryConfig) -> int:
    """Return the working memory of the VAE while it encodes an image: the video, which is grey after that image, and
    about ten tensors of four frames at the VAE's first level. These are the tensors of a residual block and the last
    frames of the previous chunk, which every convolution keeps."""
    return FP32 * video.height * video.width * (3 * video.num_frames + 10 * 4 * sizes.vae_config.base_dim)


def decoding_working(sizes: Sizes, video: TrajectoryConfig) -> int:
    """Return the working memory of the VAE while it decodes: the video, and about 13 tensors of four frames at the
    VAE's last level, of the same kinds as in encoding. For the VAE of Wan 2.2 TI2V, whose pixels are patches and whose
    levels have shortcuts, they are 22."""
    vae = sizes.vae_config
    channels = (22 if vae.is_residual else 13) * 4 * (vae.decoder_base_dim or vae.base_dim)
    return FP32 * video.height * video.width * (3 * video.num_frames + channels // (vae.patch_size or 1) ** 2)


def lora_parameters(sizes: Sizes, rank: int, target_modules: list[str]) -> int:
    """Count the parameters of adapters on all Linear layers in the blocks whose names end in one of `target_modules`:
    [rank, in] and [out, rank] each."""
    targets = tuple("." + name for name in target_modules)
    widths = (sum(shape) for name, shape in sizes.block_linears.items() if f".{name}".endswith(targets))
    return sizes.config.num_layers * rank * sum(widths)


def stages(config: TrainConfig) -> list[str]:
    """Return those of STAGES that this run has."""
    steps = (1, config.warmup.max_train_steps, config.sensitivity.num_states)
    steps += (config.selection.max_train_steps * (config.selection.method == "learned"), config.max_train_steps)
    return [stage for stage, count in zip(STAGES, steps, strict=True) if count]


def layer_kinds(sizes: Sizes, config: TrainConfig, stage: str) -> dict[str, int]:
    """Return, for a stage of TRAINING, the number of layers of each kind of self-attention."""
    layers = sizes.config.num_layers
    chosen, windows = config.selection.target(layers), len(config.selection.window_layers or ())
    if stage == "fine-tuning":
        kinds = {"linear": chosen, "window": windows, "softmax": layers - chosen - windows}
    else:
        mixed = layers if config.selection.layers is None else chosen
        kinds = {"mixed": mixed, "window": windows, "softmax": layers - mixed - windows}
    return {kind: count for kind, count in kinds.items() if count}


def stage_memory(sizes: Sizes, config: TrainConfig, layout: Layout, stage: str) -> dict[str, int]:
    """Return the bytes of each part on each GPU, at the stage's largest moment."""
    parts, _ = held(sizes, config, layout, stage)
    together = (parts | moment for moment in moments(sizes, config, layout, stage))
    largest = max(together, key=lambda each: sum(each.values()))
    return {name: ceil(size) for name, size in largest.items()}


def loaded(sizes: Sizes, e: int) -> int:
    """Return the bytes of a frozen transformer. Loaded in bf16, it keeps its norms and the time embedding in fp32."""
    return e * sizes.parameters + (FP32 - e) * sizes.kept


def held(sizes: Sizes, config: TrainConfig, layout: Layout, stage: str) -> tuple[dict[str, float], float]:
    """Return, for each GPU, the bytes of each part that is in memory throughout the stage, and the number of parameters
    that AdamW updates."""
    e = BF16 if layout.autocast else FP32
    base = loaded(sizes, e)
    if stage == "trajectories":  # every GPU samples on its own
        return {"frozen teacher": base * sizes.experts}, 0
    parts, tuning = {}, stage == "fine-tuning"
    if layout.lora is not None:
        parts["frozen base, also the teacher"] = base / layout.shard
    elif not layout.offload_teacher:
        parts["frozen teacher"] = base / layout.shard
    kinds = layer_kinds(sizes, config, stage).items()
    branches = sum(count * sizes.branch(config.feature_map, kind) for kind, count in kinds)  # not sharded
    adapters = 0 if layout.lora is None else lora_parameters(sizes, layout.lora, config.lora.target_modules)
    full = sizes.whole + (sizes.parameters - sizes.whole) / layout.shard
    weights = full if layout.lora is None else adapters / layout.shard
    parts["trained weights, fp32"] = FP32 * weights
    # weight, gradient and Adam's two moments; the sensitivity pass has only the weight
    parts["feature maps and r"] = (FP32 if stage == "sensitivity" else 4 * FP32) * branches
    if stage not in TRAINING:
        return parts, branches
    parts |= {"gradients": FP32 * weights, "AdamW state": 2 * FP32 * weights}
    if tuning and config.use_ema:
        parts["EMA"] = FP32 * (weights + branches)
    if layout.critic:
        parts["critic, with its training"] = 4 * FP32 * sizes.parameters / layout.shard
    if (config.objective.name if tuning else config.selection.objective) != "mse":
        parts["rollouts"] = FP32 * layout.micro_batch * layout.accumulation * prod(sizes.latents)
    return parts, weights + branches


def moments(sizes: Sizes, config: TrainConfig, layout: Layout, stage: str) -> list[dict[str, float]]:
    """Return the bytes of each temporary part, for each moment of the stage that may be its largest."""
    e, training = BF16 if layout.autocast else FP32, stage in TRAINING
    batch = layout.micro_batch if training else layout.forward_batch[STAGES.index(stage)]
    tokens = sizes.tokens if stage == "trajectories" else ceil(sizes.tokens / layout.context_parallel)
    text = config.prompts.max_sequence_length or TEXT_TOKENS
    # FSDP2 gathers the next block of each model while one block runs, and holds a block's gradient before scattering
    # it. Without FSDP2, autocast keeps a copy of every fp32 weight that it casts; in the backward, of one block only.
    several = layout.gpus > 1 and stage != "trajectories"
    copies = block_copies = (2 * e * (2 + layout.critic) + FP32) * sizes.block if several else 0
    if not several and layout.autocast and layout.lora is None and stage != "trajectories":
        copies, block_copies = BF16 * sizes.cast, BF16 * sizes.block_cast
    forward = forward_working(sizes, batch, tokens, e)
    if stage == "warm-up":
        windows = bool(config.selection.window_layers)
        forward = max(forward, fitting_working(sizes, batch, tokens, e, windows))
    if not training:
        encoding = _encoding(sizes, config, text, e) if stage == "trajectories" else []
        return [{COPIES: copies, WORKING: forward}, *encoding]

    arguments, weighted = (batch, tokens, text, layout.autocast), config.feature_map in WEIGHTED_MAPS
    kinds = layer_kinds(sizes, config, stage)
    blocks = {kind: block_activations(sizes, kind, *arguments, weighted) for kind in kinds}
    outer, backward = outer_activations(sizes, *arguments), backward_working(sizes, batch, tokens, e)
    others = []  # the optimizer step and checkpoints add nothing: AdamW works in place, checkpoints tensor by tensor
    # a validation samples one video at a time, with the other expert in memory, unsharded, and decodes without it
    if config.validation.steps:
        idle = loaded(sizes, e) * (sizes.experts - 1)
        video = forward_working(sizes, 1, sizes.tokens if idle else tokens, e)
        others.append({"gradients": 0, "the other expert": idle, COPIES: copies, WORKING: video})
        decoding = decoding_working(sizes, config.trajectories)
        others.append({"gradients": 0, "VAE": FP32 * sizes.vae, WORKING: decoding})
    if stage == "mixed stage" and config.sensitivity.num_states:
        # the mixed model is measured in the way of the sensitivity pass
        judged = forward_working(sizes, layout.forward_batch[2], tokens, e)
        others.append({"gradients": 0, COPIES: copies, WORKING: judged})
    if not layout.gradient_checkpointing:
        kept = outer + sum(count * blocks[kind] for kind, count in kinds.items())
        return [{ACTIVATIONS: kept, COPIES: copies, WORKING: max(forward, backward)}, *others]
    # the blocks' inputs; in the backward also the activations of one block at a time
    inputs = e * batch * tokens * sizes.width * sizes.config.num_layers
    return [
        {ACTIVATIONS: inputs + outer, COPIES: copies, WORKING: forward},
        {ACTIVATIONS: inputs + max(blocks.values()), COPIES: block_copies, WORKING: backward},
        *others,
    ]


def _encoding(sizes: Sizes, config: TrainConfig, text: int, e: int) -> list[dict[str, float]]:
    """Return the moments at which prompts, and then images, are encoded, before the transformers are moved there."""
    working = text_working(sizes, config.prompts.encode_batch_size, text, e)
    found = [{"frozen teacher": 0, "encoders": e * sizes.text_encoder, WORKING: working}]
    if sizes.condition_channels:
        encoders = FP32 * (sizes.vae + sizes.image_encoder)  # fp32 in any precision
        found.append({"frozen teacher": 0, "encoders": encoders, WORKING: encoding_working(sizes, config.trajectories)})
    return found


def saved(sizes: Sizes, config: TrainConfig, layout: Layout, stage: str) -> int:
    """Return the most bytes that are saved for the backward at any moment of a stage of TRAINING."""
    return max(moment.get(ACTIVATIONS, 0) for moment in moments(sizes, config, layout, stage))


def store_bytes(config: TrainConfig, sizes: Sizes) -> int:
    """Return the bytes of the trajectories on disk.

    Each state has x and u, a timestep (4 bytes) and a condition (1 byte); each video has a prompt number (8 bytes) and
    the sample. The headers, less than a kilobyte per file, and the manifest come on top. For a pipeline with two
    experts this is an upper bound, because a store holds the steps of one expert only.
    """
    wanted = config.trajectories
    latents = prod(sizes.latents) * {"float32": FP32}.get(wanted.dtype, BF16)
    return wanted.num_trajectories * (wanted.states_per_trajectory * (2 * latents + 4 + 1) + latents + 8)


def condition_bytes(sizes: Sizes, layout: Layout) -> int:
    """Return the bytes of one prompt's image conditions, on disk and in the CPU memory of every process; 0 for a
    text-to-video model."""
    numbers = sizes.condition_channels * prod(sizes.latents[1:]) + sizes.image_tokens * (sizes.config.image_dim or 0)
    return (BF16 if layout.autocast else FP32) * numbers
