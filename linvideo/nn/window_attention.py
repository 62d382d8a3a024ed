"""The branch of a window layer: softmax attention to the near latent frames, linear attention to all others.

Both parts share one normaliser, so the weight between them follows the content:

    o_i = (sum_near e^{s_ij} v_j + g sum_far a_ij v_j) / (sum_near e^{s_ij} + g sum_far a_ij)

with s_ij = q_i.k_j / sqrt(D), a_ij = phi(q_i).phi(k_j), and one learned gain g = exp(log_gain) per head.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import nn

from linvideo.nn.collectives import gather_heads, gather_tokens
from linvideo.nn.linear_attention import LinearAttentionBranch
from linvideo.ops import window_attn
from linvideo.ops.reference import features, rotate
from linvideo.ops.window_attn import ANCHORS
from linvideo.ops.window_layout import Layout


@dataclass(frozen=True)
class Window:
    """The frames to which a window layer attends with softmax; see `linvideo.ops.window_attn`.

    Args:
        chunk: Number of latent frames per chunk. The queries of a chunk share one window.
        overlap: Number of latent frames before and after its chunk that a window includes.
        anchors: Frames that are in every window: "first", "last", both or none.
        causal: Whether no query sees a frame after its own chunk.

    Raises:
        ValueError: A setting is outside these ranges.
    """

    chunk: int = 3
    overlap: int = 1
    anchors: tuple[str, ...] = ()
    causal: bool = False

    def __post_init__(self):
        for name, least in (("chunk", 1), ("overlap", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"window's {name} must be an integer of at least {least}, got {value!r}")
        anchors = tuple(self.anchors) if isinstance(self.anchors, list | tuple) else None
        if anchors is None or any(name not in ANCHORS for name in anchors) or len(set(anchors)) < len(anchors):
            raise ValueError(f"window's anchors must be a list of {' and '.join(ANCHORS)}, got {self.anchors!r}")
        if not isinstance(self.causal, bool):
            raise ValueError(f"window's causal must be true or false, got {self.causal!r}")
        if self.causal and "last" in anchors:
            raise ValueError("window's anchors must not contain last in a causal window, got both")
        object.__setattr__(self, "anchors", tuple(sorted(anchors)))

    @classmethod
    def of(cls, settings: Any) -> "Window":
        """Return the window with the given settings {name: value}; those that are missing have their defaults."""
        names = tuple(cls.__dataclass_fields__)
        if not isinstance(settings, Mapping) or not set(settings) <= set(names):
            raise ValueError(f"window must be a dictionary with any of {', '.join(names)}, got {settings!r}")
        return cls(**settings)

    def layout(self, frames: int) -> Layout:
        """Return the division of a video of `frames` latent frames, with one token each."""
        anchors = "first" in self.anchors, "last" in self.anchors
        return Layout(frames, 1, self.chunk, self.overlap, 0, 0, *anchors, self.causal)

    def softmax_pairs(self, frames: int) -> float:
        """Return the share of pairs of tokens in a video of `frames` latent frames that softmax keeps."""
        return self.layout(frames).softmax_pairs

    def settings(self) -> dict[str, Any]:
        """Return all settings {name: value}, as a config stores them."""
        return {**asdict(self), "anchors": list(self.anchors)}

    def __str__(self) -> str:
        said = [f"chunks of {self.chunk} latent frame{'s'[: self.chunk != 1]}", f"overlap {self.overlap}"]
        said += [f"anchors {' and '.join(self.anchors)}"] if self.anchors else []
        return ", ".join([*said, "causal"] if self.causal else said)


class WindowAttentionBranch(LinearAttentionBranch):
    """Softmax attention inside a window of latent frames and linear attention outside, under one normaliser.

    Args:
        heads, head_dim, feature_map: Arguments of `LinearAttentionBranch`.
        window: Settings of the window.

    In addition to the feature weights, the branch owns `log_gain` [H] in fp32. Its start makes the linear part as large
    as the softmax attention that it replaces: for the hedgehog maps, where phi(q).phi(k) at the start of W is
    exp(q.k / sqrt(D)) times a constant to first order, it cancels this constant. For the maps without weights it is
    1 / E[phi(q).phi(k)] for independent standard normal q and k.

    Raises:
        ValueError: A size or the feature map is not supported.
    """

    def __init__(self, heads: int, head_dim: int, feature_map: str = "hedgehog", window: Window | None = None):
        super().__init__(heads, head_dim, feature_map=feature_map, mixed=False)
        self.window = Window() if window is None else window
        self.log_gain = nn.Parameter(torch.full((heads,), _log_gain(feature_map, head_dim), dtype=torch.float32))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        frame_tokens: int,
        rope: tuple[torch.Tensor, torch.Tensor] | None = None,
        prefix_tokens: int = 0,
        suffix_tokens: int = 0,
        key_mask: torch.Tensor | None = None,
        group: torch.distributed.ProcessGroup | None = None,
        backend: str | None = None,
        softmax: bool = False,
    ) -> torch.Tensor:
        """Return window attention over q, k, v.

        Args:
            q, k, v: Queries, keys and values [B, N, H, D].
            frame_tokens: Number of tokens per latent frame.
            rope: Rotary embedding (cos, sin), each [N, D/2]; None if q and k have been rotated already.
            prefix_tokens, suffix_tokens: Numbers of text tokens before and after those of the video.
            key_mask: Bool [B, prefix_tokens + suffix_tokens], False for text tokens to leave out as keys.
            group: Ranks that hold the other tokens of the same samples, in order (context parallelism). They exchange
                tokens for heads, so that each computes all tokens of H / ranks heads, and exchange back.
            backend: Name of the backend of the softmax part, one of `linvideo.ops.softmax_backends.BACKENDS`. None lets
                the op choose.
            softmax: Whether to compute softmax attention over all tokens instead, to compare with.

        Returns:
            [B, N, H, D] in q's dtype.

        Raises:
            ValueError: The ranks do not divide the heads, text tokens are given with `group`, or the op refuses an
                argument.
        """
        options = {"frame_tokens": frame_tokens, "backend": backend, "feature_map": self.feature_map}
        options |= {"chunk": 1 << 30} if softmax else asdict(self.window)  # a window that covers every video
        own = {"q_weight": self.q_weight, "k_weight": self.k_weight, "log_gain": self.log_gain}
        if group is None:
            options |= {"rope": rope, "key_mask": key_mask}
            return window_attn(q, k, v, prefix_tokens=prefix_tokens, suffix_tokens=suffix_tokens, **own, **options)

        ranks = group.size()
        if prefix_tokens or suffix_tokens:
            raise ValueError(
                "expected no text tokens among the video's under context parallelism, got"
                f" {prefix_tokens + suffix_tokens}"
            )
        if self.heads % ranks:
            raise ValueError(
                "expected a number of heads that the context-parallel ranks divide in a window layer, got"
                f" {self.heads} heads on {ranks} ranks"
            )
        if rope is not None:  # the tables hold the rows of this rank
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = gather_tokens(torch.stack([q.type_as(v), k.type_as(v), v]), group).unbind()
        heads = slice(group.rank() * q.shape[2], (group.rank() + 1) * q.shape[2])
        own = {name: None if weight is None else weight[heads] for name, weight in own.items()}
        return gather_heads(window_attn(q, k, v, **own, **options).unsqueeze(0), group).squeeze(0)

    @torch.no_grad()
    def measured_log_gain(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        frame_tokens: int,
        rope: tuple[torch.Tensor, torch.Tensor] | None = None,
        prefix_tokens: int = 0,
        suffix_tokens: int = 0,
        group: torch.distributed.ProcessGroup | None = None,
        queries: int = 64,
        **_: object,
    ) -> torch.Tensor:
        """Return the log_gain [H] with which the far frames get, on average, the weight that softmax gives them.

        For each head it is the mean of log sum_far exp(s_ij) - log sum_far a_ij over some queries, without those whose
        second sum is 0. If no query is left, it is the present log_gain.

        Args:
            q, k, frame_tokens, rope, prefix_tokens, suffix_tokens, group: Arguments of `forward`, whose others are
                ignored.
            queries: Number of evenly spaced queries of each sample to average over.
        """
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        heads = slice(None)
        if group is not None:
            q, k = gather_tokens(torch.stack([q.type_as(k), k]), group).unbind()
            heads = slice(group.rank() * q.shape[2], (group.rank() + 1) * q.shape[2])
        weights = [None if weight is None else weight[heads] for weight in (self.q_weight, self.k_weight)]
        video = slice(prefix_tokens, q.shape[1] - suffix_tokens)
        q, k = q[:, video], k[:, video]
        rows = torch.linspace(0, q.shape[1] - 1, min(queries, q.shape[1]), device=q.device).round().long()
        layout = self.window.layout(q.shape[1] // frame_tokens)
        far = layout.far(q.device)[rows // frame_tokens] > 0  # [queries, F]
        rows, far = rows[far.any(1)], far[far.any(1)].repeat_interleave(frame_tokens, 1)
        if not len(rows):
            return self.log_gain.clone()
        ratios, near = [], ~far
        for head in range(q.shape[2]):  # one head at a time, to hold few rows of N logits
            pair = [x[:, :, head : head + 1].float() for x in (q[:, rows], k)]
            maps = [None if weight is None else weight[head : head + 1].float() for weight in weights]
            with torch.autocast(q.device.type, enabled=False):
                phi = [features(x, w, None, self.feature_map)[:, :, 0] for x, w in zip(pair, maps, strict=True)]
                logits = pair[0][:, :, 0] @ pair[1][:, :, 0].mT / self.head_dim**0.5
                linear = (phi[0] @ phi[1].mT).masked_fill(near, 0.0).sum(-1)
            mass = logits.masked_fill(near, -torch.inf).logsumexp(-1)
            ratios.append((mass - linear.log())[linear > 0].mean())
        ratios = torch.stack(ratios)
        ratios = torch.where(ratios.isnan(), self.log_gain[heads], ratios)
        if group is None:
            return ratios
        return funcol.wait_tensor(funcol.all_gather_tensor(ratios, 0, group))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_dim={self.head_dim}, feature_map={self.feature_map}, window={self.window}"


def _log_gain(feature_map: str, head_dim: int) -> float:
    """Return the start of log_gain; see `WindowAttentionBranch`."""
    below = math.exp(0.5) * 0.5 * math.erfc(math.sqrt(0.5))  # E[exp(x); x < 0]
    above = 1 / math.sqrt(2 * math.pi)  # E[x; x > 0]
    gain = {
        "hedgehog": head_dim / 2,
        "hedgehog_joint": 2 * head_dim,
        "elu": 1 / (head_dim * (above + 0.5 + below) ** 2),
        "relu": 1 / (head_dim * above**2),
        "softmax": head_dim,  # each of the D features has the mean 1 / D
    }
    return math.log(gain[feature_map])
