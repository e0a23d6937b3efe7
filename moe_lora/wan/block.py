"""One transformer block of Wan and the layers that it is made of, under the original parameter names.

Letters: B clips, L video tokens, Lc text tokens, Li image tokens, D width, N heads, K head width, P = K / 2.
"Wide" is float32, or float64 for a float64 model: the dtype of norms, modulation and residual sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.attention import attention
from ...kernels.lora_moe import LoRAMoEWeights, lora_moe_linears
from ...kernels.norms import (
    adaln,
    gated_residual,
    residual_adaln,
    residual_layer_norm,
    rms_norm_rope,
    wide,
)
from ..routing import Gates
from .config import WanConfig

__all__ = ["WanBlock", "WanLinear", "WideLinear"]

# q [B, L, N, K] of the tokens at hand, k and v alike -> [B, L, N, K].
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# Rows of a low-precision weight that are widened at once: bounds the temporary to a few hundred MB at 14B.
_WIDE_ROWS = 5120


class WanLinear(nn.Linear):
    """A linear layer called as `linear(x, gates)`, so that an adapted one can take its place."""

    def forward(self, x: Tensor, gates: Gates | None = None) -> Tensor:
        """x [..., d_in] in the dtype of the weight; gates are not used."""
        return F.linear(x, self.weight, self.bias)

    def adapted(self) -> LoRAMoEWeights | None:
        """What an adapted linear hands to the op that it shares with its neighbours; none here."""
        return None


def project(x: Tensor, linears: Sequence[WanLinear], gates: Gates | None) -> tuple[Tensor, ...]:
    """x through linears that all read it: in one op if all are adapted alike, one after the other otherwise.

    The op reads the weights of child modules, which under ZeRO-3 are there because the block is gathered as a
    whole (`set_z3_leaf_modules`).
    """
    adapted = [linear.adapted() for linear in linears] if gates is not None else []
    weights = [each for each in adapted if each is not None]
    experts = {each.expert_down.shape[0] for each in weights}
    if gates is None or len(weights) < len(linears) or len(experts) > 1:
        return tuple(linear(x, gates) for linear in linears)
    # Linears that carry the base adapter alone have no experts, and their op takes no gates for them.
    expert_gates = gates.experts[:, : experts.pop()]
    return lora_moe_linears(x, weights, gates.base, expert_gates, gates.tokens_per_row)


class WideLinear(nn.Linear):
    """A linear layer that computes in float32 (float64) whatever the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] of any dtype to [..., d_out], wide."""
        x = wide(x)
        if self.weight.dtype == x.dtype:
            return F.linear(x, self.weight, self.bias)
        rows = zip(self.weight.split(_WIDE_ROWS), self.bias.split(_WIDE_ROWS), strict=True)
        return torch.cat([F.linear(x, w.to(x.dtype), b.to(x.dtype)) for w, b in rows], dim=-1)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full width, before the heads are split, and their rotary positions."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        """x [B, L, D], cos and sin [L, P] or none -> [B, L, D] in its own dtype."""
        return rms_norm_rope(x, self.weight, cos, sin, self.num_heads, self.eps)


class _Attention(nn.Module):
    """The projections that self- and cross-attention share."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.q = WanLinear(dim, dim)
        self.k = WanLinear(dim, dim)
        self.v = WanLinear(dim, dim)
        self.o = WanLinear(dim, dim)
        self.norm_q = RMSNorm(dim, config.num_heads, config.eps)
        self.norm_k = RMSNorm(dim, config.num_heads, config.eps)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class SelfAttention(_Attention):
    """Attention of every video token over every video token, with rotary positions."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, gates: Gates | None, attend: Attend = attention
    ) -> Tensor:
        """x [B, L, D], cos and sin [L, P] -> [B, L, D]."""
        q, k, v = project(x, (self.q, self.k, self.v), gates)
        q, k = self._heads(self.norm_q(q, cos, sin)), self._heads(self.norm_k(k, cos, sin))
        out: Tensor = self.o(attend(q, k, self._heads(v)).flatten(2), gates)
        return out


class CrossAttention(_Attention):
    """Attention of every video token over every text token, padding included, as Wan was trained.

    A Wan2.1 i2v model adds to it attention over the image tokens, whose projections carry no adapter.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        if config.image_dim:
            self.k_img = nn.Linear(config.dim, config.dim)
            self.v_img = nn.Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim, config.num_heads, config.eps)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        gates: Gates | None,
        context_gates: Gates | None,
        image: Tensor | None = None,
    ) -> Tensor:
        """x [B, L, D], context [B, Lc, D], image [B, Li, D] or none -> [B, L, D].

        k and v see text tokens and take their gates.
        """
        q = self._heads(self.norm_q(self.q(x, gates)))
        k, v = project(context, (self.k, self.v), context_gates)
        k = self._heads(self.norm_k(k))
        attended = attention(q, k, self._heads(v))
        if image is not None:
            k, v = self._heads(self.norm_k_img(self.k_img(image))), self._heads(self.v_img(image))
            attended = attended + attention(q, k, v)
        out: Tensor = self.o(attended.flatten(2), gates)
        return out


class FeedForward(nn.Sequential):
    """Linear, GELU (tanh), linear; a sequence so that the names stay `ffn.0` and `ffn.2`."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(
            WanLinear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            WanLinear(config.ffn_dim, config.dim),
        )

    def forward(self, x: Tensor, gates: Gates | None = None) -> Tensor:
        """x [B, L, D] -> [B, L, D]."""
        out: Tensor = self[2](self[1](self[0](x, gates)), gates)
        return out


class WanBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, modulated by one time vector per clip.

    The block is the unit that ZeRO-3 gathers and that checkpointing recomputes: nothing inside is called from
    outside, and nothing is kept between calls. Source: Wan2.2 `wan/modules/model.py`.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = FeedForward(config)
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        e0: Tensor,
        context: Tensor,
        cos: Tensor,
        sin: Tensor,
        gates: Gates | None = None,
        context_gates: Gates | None = None,
        image: Tensor | None = None,
        attend: Attend = attention,
    ) -> Tensor:
        """x [B, L, D], e0 [B, 6, D] wide, context [B, Lc, D], cos and sin [L, P] -> x in its own dtype.

        `gates` are those of the video tokens, `context_gates` those of the text tokens. image [B, Li, D] goes
        with Wan2.1 i2v models alone. `attend` is that of self-attention: where ranks share the clips, x, cos,
        sin and gates are those of this rank's tokens, and it attends over those of all.
        """
        dtype = self.self_attn.q.weight.dtype
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            (wide(self.modulation) + e0).unsqueeze(2).unbind(dim=1)  # each [B, 1, D]
        )
        h = self.self_attn(adaln(x, scale1, shift1, self.eps, dtype), cos, sin, gates, attend)
        x, h = residual_layer_norm(x, h, gate1, self.norm3.weight, self.norm3.bias, self.eps, dtype)
        h = self.cross_attn(h, context, gates, context_gates, image)
        x, h = residual_adaln(x, h, None, scale2, shift2, self.eps, dtype)
        return gated_residual(x, self.ffn(h, gates), gate2)
