"""The Wan2.2 video transformer, split into a prefix that is never trained and a tail that is.

Letters: B clips, C channels, F latent frames, H, W latent height and width, L video tokens (where ranks share
the clips, those of this rank), Lc text tokens, Li image tokens, D width, P rotated pairs per head.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...kernels.attention import attention
from ...kernels.norms import adaln, wide
from ..errors import WanmoeError
from ..ring import StreamedBlocks, Visit
from ..routing import Gates
from .block import WanBlock, WideLinear
from .config import WanConfig
from .rope import rope_tables
from .sequence import SequenceParallel, TokenSplit

__all__ = ["PrefixState", "WanDiT"]

# The model reads t in thousandths, as it was trained.
_TRAIN_TIMESTEPS = 1000


class PrefixState(NamedTuple):
    """What the tail needs of the prefix; tensors in a tuple, where DeepSpeed's hooks find them."""

    x: Tensor
    """[B, L, D], tokens in F, H, W order."""
    e: Tensor
    """[B, D] wide: embedding of t, for the head."""
    e0: Tensor
    """[B, 6, D] wide: embedding of t, for the blocks."""
    context: Tensor
    """[B, Lc, D]."""
    cos: Tensor
    """[L, P]."""
    sin: Tensor
    """[L, P]."""
    frames: int
    """Tokens of the whole clip along time, height and width."""
    height: int
    width: int
    image: Tensor | None = None
    """[B, Li, D] of a Wan2.1 i2v model."""
    gated: bool = False
    """Whether the prefix was given gates."""
    split: TokenSplit | None = None
    """How ranks share the clips, where they do."""


class PatchEmbedding(nn.Conv3d):
    """Patches to tokens. A matmul: Conv3d has no good bf16 kernel for a stride equal to the kernel."""

    def forward(self, x: Tensor, own: slice | None = None) -> Tensor:
        """x [B, C, F, H, W] of any dtype -> [B, L, D] in the dtype of the weight; of `own` tokens alone."""
        (b, c, f, h, w), (p, q, r) = x.shape, self.kernel_size
        x = x.to(self.weight.dtype).view(b, c, f // p, p, h // q, q, w // r, r)
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, -1, c * p * q * r)
        x = x if own is None else x[:, own]
        return F.linear(x, self.weight.flatten(1), self.bias)


class CastLinear(nn.Linear):
    """A linear layer whose input is brought to the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] of any dtype -> [..., d_out] in the dtype of the weight."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class WideLayerNorm(nn.LayerNorm):
    """A layer norm that computes in float32 (float64) whatever the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] of any dtype -> [..., D], wide."""
        x = wide(x)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x), self.bias.to(x), self.eps)


class ImageEmbedding(nn.Module):
    """CLIP tokens of the given frames to the width of the model, in Wan2.1 i2v models.

    Source: Wan2.1 `wan/modules/model.py`, MLPProj.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        image_dim = config.image_dim
        self.proj = nn.Sequential(
            WideLayerNorm(image_dim),
            CastLinear(image_dim, image_dim),
            nn.GELU(),
            CastLinear(image_dim, config.dim),
            WideLayerNorm(config.dim),
        )
        if config.image_positions:
            self.emb_pos = nn.Parameter(torch.zeros(1, config.image_positions, image_dim))

    def forward(self, image: Tensor) -> Tensor:
        """image [B, Li, image_dim] of any dtype -> [B, Li, D], wide."""
        if hasattr(self, "emb_pos"):
            image = wide(image) + wide(self.emb_pos)
        out: Tensor = self.proj(image)
        return out


class Head(nn.Module):
    """Modulated norm and projection from tokens to patches of v, computed wide."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.head = WideLinear(dim, config.out_dim * math.prod(config.patch_size))
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [B, L, D], e [B, D] -> [B, L, out_dim * patch volume], wide."""
        shift, scale = (wide(self.modulation) + e.unsqueeze(1)).unsqueeze(2).unbind(dim=1)
        out: Tensor = self.head(adaln(x, scale, shift, self.eps, scale.dtype))
        return out


class WanDiT(nn.Module):
    """Predicts v = noise - x0 from x_t, t and the text; parameters carry the original Wan names.

    Source: Wan2.2 `wan/modules/model.py`. Norms, modulation and residual sums are float32, RoPE and time
    angles float64, matmuls in the dtype of the parameters. A new model is initialised as the original one.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.first_adapted: int = config.num_layers
        self.prefix_frozen: bool = False
        self.prefix_adapted: bool = False
        self.checkpointing: bool = False
        self.sequence: SequenceParallel | None = None
        self.streamed: StreamedBlocks | None = None
        self.patch_embedding = PatchEmbedding(
            config.in_dim, dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.text_embedding = nn.Sequential(
            CastLinear(config.text_dim, dim), nn.GELU(approximate="tanh"), CastLinear(dim, dim)
        )
        self.time_embedding = nn.Sequential(WideLinear(config.freq_dim, dim), nn.SiLU(), WideLinear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), WideLinear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.num_layers))
        self.head = Head(config)
        if config.image_dim:
            self.img_emb = ImageEmbedding(config)
        self._init_weights()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | Sequence[Tensor],
        gates: Gates | None = None,
        image_latent: Tensor | None = None,
        image_context: Tensor | None = None,
    ) -> Tensor:
        """v [B, out_dim, F, H, W], float32, of x [B, out_dim, F, H, W] at t [B] in [0, 1].

        context is [B, Lc, text_dim] or a list of [n, text_dim]; image_latent [B, 20, F, H, W] goes with i2v
        alone, image_context [B, Li, image_dim] (CLIP tokens) with Wan2.1 i2v alone. gates=None runs the
        frozen model. Raises WanmoeError for shapes that do not fit.
        """
        return self.tail(self.prefix(x, t, context, image_latent, image_context, gates), gates)

    def prefix(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | Sequence[Tensor],
        image_latent: Tensor | None = None,
        image_context: Tensor | None = None,
        gates: Gates | None = None,
    ) -> PrefixState:
        """Embeddings and `blocks[:first_adapted]`, without a graph once the prefix is frozen.

        Arguments as in `forward`; a frozen prefix passes no gradient to them. gates act where a frozen base
        adapter sits before the first block that trains.
        """
        self._check(x, t, image_latent)
        self._check_image_context(x.shape[0], image_context)
        if gates is not None and self.prefix_frozen:
            # ZeRO-3 counts the gradients that inputs of a block will get; here they get none.
            gates = gates._replace(experts=gates.experts.detach(), base=gates.base.detach())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.prefix_frozen):
            state = self._embed(x, t, context, image_latent, image_context)
            x = self._run(range(self.first_adapted), state, gates)
            return state._replace(x=x, gated=gates is not None)

    def tail(self, state: PrefixState, gates: Gates | None = None) -> Tensor:
        """`blocks[first_adapted:]` and the head: v [B, out_dim, F, H, W].

        gates hold one row per clip or per latent frame; None runs the frozen model. Raises WanmoeError where
        the prefix carries adapters and ran without them.
        """
        if gates is not None and self.prefix_adapted and not state.gated:
            raise WanmoeError("this adapter has parts in the prefix: give prefix(...) the gates too")
        if self.prefix_frozen and torch.is_grad_enabled() and self._tail_trains(gates):
            # ZeRO-3 releases a leaf block's parameters before their gradients are taken unless one of the
            # block's positional inputs requires grad (deepspeed 0.19).
            state = state._replace(x=state.x.detach().requires_grad_(True))
        x = self._run(range(self.first_adapted, len(self.blocks)), state, gates)
        patches: Tensor = self.head(x, state.e)
        return self._unpatchify(patches if state.split is None else state.split.join(patches), state)

    def freeze_prefix(self, first: int, adapted: bool = False) -> None:
        """Splits the model before `blocks[first]` and runs what lies before it without a graph from now on.

        adapted: adapters sit before it, so that the prefix needs gates. Raises WanmoeError when `first` is no
        block or when a parameter before it requires grad.
        """
        if not 0 <= first <= len(self.blocks):
            raise WanmoeError(f"first adapted block {first} is not in 0..{len(self.blocks)}")
        trainable = [name for name, p in self._prefix_parameters(first) if p.requires_grad]
        if trainable:
            raise WanmoeError(
                f"{len(trainable)} parameters before block {first} require grad and would never train, "
                f"e.g. {trainable[0]}; freeze them, or adapt from an earlier block"
            )
        self.first_adapted = first
        self.prefix_frozen = True
        self.prefix_adapted = adapted

    def _prefix_parameters(self, first: int) -> Iterator[tuple[str, nn.Parameter]]:
        embeddings: tuple[str, ...] = (
            "patch_embedding",
            "text_embedding",
            "time_embedding",
            "time_projection",
        )
        if self.config.image_dim:
            embeddings = (*embeddings, "img_emb")
        for prefix in (*embeddings, *(f"blocks.{i}" for i in range(first))):
            yield from self.get_submodule(prefix).named_parameters(prefix=prefix)

    def _tail_trains(self, gates: Gates | None) -> bool:
        if gates is not None and (gates.experts.requires_grad or gates.base.requires_grad):
            return True
        tail = chain(self.blocks[self.first_adapted :].parameters(), self.head.parameters())
        return any(p.requires_grad for p in tail)

    def _check(self, x: Tensor, t: Tensor, image_latent: Tensor | None) -> None:
        """Shapes alone: a check of values would make the host wait for the device."""
        config = self.config
        if x.ndim != 5 or x.shape[1] != config.out_dim:
            raise WanmoeError(f"x is {tuple(x.shape)}; expected [B, {config.out_dim}, F, H, W]")
        if any(size % patch for size, patch in zip(x.shape[2:], config.patch_size, strict=True)):
            raise WanmoeError(
                f"latent size {tuple(x.shape[2:])} does not divide into patches of {config.patch_size}; "
                "use a video height and width that are multiples of 16"
            )
        if t.shape != x.shape[:1]:
            raise WanmoeError(f"t is {tuple(t.shape)}; expected one flow time per clip, [{x.shape[0]}]")
        if config.image_channels == 0:
            if image_latent is not None:
                raise WanmoeError(f"image_latent was given to a {config.task} model, which takes none")
            return
        expected = (x.shape[0], config.image_channels, *x.shape[2:])
        if image_latent is None or image_latent.shape != expected:
            found = "missing" if image_latent is None else tuple(image_latent.shape)
            raise WanmoeError(f"image_latent is {found}; this {config.task} model needs {expected}")

    def _check_image_context(self, clips: int, image_context: Tensor | None) -> None:
        config = self.config
        if config.image_dim == 0:
            if image_context is not None:
                raise WanmoeError(
                    f"image_context was given to a {config.task} model without CLIP tokens, which takes none"
                )
            return
        positions = config.image_positions
        shape = () if image_context is None else tuple(image_context.shape)
        fits = len(shape) == 3 and (shape[0], shape[2]) == (clips, config.image_dim)
        if not fits or (positions and shape[1] != positions):
            raise WanmoeError(
                f"image_context is {shape or 'missing'}; this model needs CLIP tokens "
                f"[{clips}, {positions or 'tokens'}, {config.image_dim}]"
            )

    def _embed(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | Sequence[Tensor],
        image_latent: Tensor | None,
        image_context: Tensor | None,
    ) -> PrefixState:
        frames, height, width = (
            size // patch for size, patch in zip(x.shape[2:], self.config.patch_size, strict=True)
        )
        if image_latent is not None:
            x = torch.cat((x, image_latent.to(x.dtype)), dim=1)
        split = None if self.sequence is None else self.sequence.split(frames * height * width)
        own = None if split is None else split.own
        tokens = self.patch_embedding(x, own)
        e = self.time_embedding(self._time_frequencies(t).to(wide(tokens).dtype))
        e0 = self.time_projection(e).unflatten(-1, (6, self.config.dim))
        cos, sin = rope_tables(
            (frames, height, width), self.config.head_dim, dtype=e0.dtype, device=tokens.device
        )
        if own is not None:
            cos, sin = cos[own], sin[own]
        text = self.text_embedding(self._pad_context(context, x.shape[0]))
        image = None if image_context is None else self.img_emb(image_context).to(text.dtype)
        return PrefixState(tokens, e, e0, text, cos, sin, frames, height, width, image=image, split=split)

    def _time_frequencies(self, t: Tensor) -> Tensor:
        """t [B] -> [B, freq_dim] float64, cosines first."""
        half = self.config.freq_dim // 2
        exponents = torch.arange(half, dtype=torch.float64, device=t.device) / half
        angles = torch.outer(t.to(torch.float64) * _TRAIN_TIMESTEPS, 10000.0**-exponents)
        return torch.cat((angles.cos(), angles.sin()), dim=1)

    def _pad_context(self, context: Tensor | Sequence[Tensor], clips: int) -> Tensor:
        """Zero rows up to text_len, before the text embedding: Wan attends to them without a mask."""
        rows = list(context)
        text_len, text_dim = self.config.text_len, self.config.text_dim
        for row in rows:
            if row.ndim != 2 or row.shape[1] != text_dim or row.shape[0] > text_len:
                raise WanmoeError(
                    f"context of a clip is {tuple(row.shape)}; expected at most {text_len} rows of {text_dim}"
                )
        if len(rows) != clips:
            raise WanmoeError(f"context holds {len(rows)} clips, x holds {clips}")
        return torch.stack([F.pad(row, (0, 0, 0, text_len - row.shape[0])) for row in rows])

    def _run(self, indices: range, state: PrefixState, gates: Gates | None) -> Tensor:
        x, split = state.x, state.split
        context_gates = None if gates is None else gates.per_clip(x.shape[0], state.context.shape[1])
        if gates is not None and split is not None:
            gates = gates.part(x.shape[0], split.own)
        attend = attention if split is None else split.attend
        state_args = (state.e0, state.context, state.cos, state.sin, gates, context_gates, state.image)
        for i in indices:
            x = self._run_block(i, (x, *state_args, attend))
        return x

    def _run_block(self, i: int, args: tuple[Any, ...]) -> Tensor:
        block, streamed, graph = self.blocks[i], self.streamed, torch.is_grad_enabled()
        if self.checkpointing and graph:
            if streamed is None:
                return cast("Tensor", checkpoint(block, *args, use_reentrant=False))
            both = Visit(streamed, i, turns=True), Visit(streamed, i, back=True)
            return cast("Tensor", checkpoint(block, *args, use_reentrant=False, context_fn=lambda: both))
        if streamed is None:
            return cast("Tensor", block(*args))
        streamed.visit(i, turns=graph)
        with streamed.saving(i) if graph else contextlib.nullcontext():
            return cast("Tensor", block(*args))

    def _unpatchify(self, x: Tensor, state: PrefixState) -> Tensor:
        p, q, r = self.config.patch_size
        f, h, w, c = state.frames, state.height, state.width, self.config.out_dim
        x = x.view(-1, f, h, w, p, q, r, c).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(-1, c, f * p, h * q, w * r)

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for embedding in (self.text_embedding, self.time_embedding):
            for module in embedding:
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)
