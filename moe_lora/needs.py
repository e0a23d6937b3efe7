"""What a model takes where it is computed: its frozen weights as they are held, and what a step takes beside
them, counted in a dry run of the model itself on tensors without values.

Letters: F latent frames, H, W latent height and width.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..kernels.dry_run import as_on_card
from .adapter import AdapterConfig, Part, attach
from .block_store import lay_out
from .formats import PLAIN, Format
from .wan.config import WanConfig
from .wan.dit import WanDiT

__all__ = [
    "Activations",
    "Base",
    "LiveBytes",
    "activations",
    "adapter_elements",
    "base_of",
    "decoding",
    "on_card",
    "spread",
]

CONTEXT = 800_000_000
"""Bytes that CUDA itself and its libraries' work spaces take of a card."""

# Channels of Wan's decoder at full size, values of it alive at once, and frames decoded together.
_DECODER_CHANNELS, _DECODER_LIVE, _DECODER_FRAMES = 96, 6, 4


@dataclass(frozen=True)
class Base:
    """Bytes of a frozen model, as it is held."""

    rest: int
    """What is in no block."""
    block: int
    """One block, all of which are alike."""
    blocks: int
    """How many there are."""
    unpacked: int = 0
    """Of the place where the weights of one block are unpacked, if they are quantised."""

    @property
    def whole(self) -> int:
        return self.rest + self.blocks * self.block


def base_of(config: WanConfig, dtype: torch.dtype, format: Format = PLAIN) -> Base:
    """How large a model is that is computed in `dtype`, its large weights held in a format."""
    with torch.device("meta"):
        dit = WanDiT(config)
    total = sum(p.numel() for p in dit.parameters()) * dtype.itemsize
    block = sum(p.numel() for p in dit.blocks[0].parameters()) * dtype.itemsize
    rest = total - len(dit.blocks) * block
    if format is PLAIN:
        return Base(rest, block, len(dit.blocks))
    layout = lay_out(dit.blocks[0], lambda name: dtype, format)
    return Base(rest, layout.size, len(dit.blocks), layout.unpacked)


def adapter_elements(config: WanConfig, adapter: AdapterConfig, parts: Sequence[Part]) -> tuple[int, int]:
    """Elements of an adapter's parts, and of all of it, on one model; those of a router are few and left
    out."""
    with torch.device("meta"):
        dit = WanDiT(config)
    made = attach(dit, adapter, device="meta")
    trained = made.parameters(part for part in parts if part != "router")
    return sum(p.numel() for p in trained.values()), sum(p.numel() for p in made.parameters().values())


def on_card(models: Sequence[Base], stream: int, slots: int) -> int:
    """Bytes of models on a card of which so many blocks each stream through `slots` that they share."""
    stays = sum(model.rest + (model.blocks - stream) * model.block for model in models)
    passing = slots * max(model.block for model in models) if stream else 0
    return stays + passing + max(model.unpacked for model in models)


def spread(stream: int, first_adapted: int, blocks: int) -> frozenset[int]:
    """Which blocks stream: far apart, so that one has the time of several to arrive, and those of the prefix
    before those of the tail, which would come twice a step."""
    prefix = min(stream, first_adapted)
    tail = stream - prefix
    chosen = {i * first_adapted // prefix for i in range(prefix)}
    return frozenset(chosen | {first_adapted + i * (blocks - first_adapted) // tail for i in range(tail)})


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that live at once, of those that are made inside.

    A storage counts from its making to its end, whatever views there are of it. What is allocated inside one
    op and freed again is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def restart(self) -> int:
        """The peak since the last call; the next one begins at what lives now."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), made=False)
        out = func(*args, **(kwargs or {}))
        self._note(out, made=True)
        return out

    def _note(self, tree: Any, made: bool) -> None:
        for tensor in tree_leaves(tree):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            self._known.add(key)
            size = storage.nbytes() if made else 0
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Activations:
    """Bytes beside weights, gradients and optimizer at the highest point of each phase."""

    prefix: int
    """Blocks without a graph."""
    forward: int
    """The tail, with what it keeps for the backward."""
    backward: int

    @property
    def peak(self) -> int:
        return max(self.prefix, self.forward, self.backward)


def activations(
    config: WanConfig,
    adapter: AdapterConfig | None,
    parts: Sequence[Part],
    latent: tuple[int, int, int],
    *,
    clips: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = False,
    card: bool = True,
) -> Activations:
    """What one forward and backward of a clip of latent [F, H, W] takes; nothing is computed.

    Args:
        adapter: None runs the frozen model, for a forward alone.
        parts: of the adapter, which train; () for a forward alone.
        clips: in one forward.
        card: with the kernels of a card; else as on the CPU.
    """
    with torch.device("meta"):
        dit = WanDiT(config).to(dtype)
    made = None if adapter is None else attach(dit, adapter, device="meta")
    trained = {} if made is None else made.train_only(parts or ("experts",))
    dit.checkpointing = checkpointing
    tokens = 1
    for size, patch in zip(latent, config.patch_size, strict=True):
        tokens *= size // patch
    with (
        FakeTensorMode(),
        as_on_card() if card else contextlib.nullcontext(),
        torch.set_grad_enabled(bool(parts)),
    ):
        for module in dit.modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                setattr(module, leaf, nn.Parameter(fake, requires_grad=parameter.requires_grad))
        x = torch.empty(clips, config.out_dim, *latent, dtype=dtype)
        image = None
        if config.image_channels:
            image = torch.empty(clips, config.image_channels, *latent, dtype=dtype)
        pictures = None
        if config.image_dim:
            pictures = torch.empty(clips, config.image_positions or 257, config.image_dim, dtype=dtype)
        t = torch.empty(clips)
        context = torch.empty(clips, config.text_len, config.text_dim, dtype=dtype)
        gates = None
        if made is not None:
            experts = torch.empty(clips, len(made.experts), requires_grad="router" in parts)
            gates = made.gates(experts, t, tokens=tokens)
        live = LiveBytes()
        with live:
            state = dit.prefix(x, t, context, image, pictures, gates)
            prefix = live.restart()
            v = dit.tail(state, gates)
            forward = live.restart()
            if parts:
                v.square().mean().backward()
        gradients = sum(p.nbytes for p in trained.values()) if parts else 0
        return Activations(prefix, forward, max(live.peak - gradients, 0))


def decoding(frames: int, height: int, width: int) -> int:
    """Bytes that Wan's VAE takes beside its weights to decode a clip of so many frames and pixels, with the
    video itself: modelled, in fp32."""
    pixels = height * width
    live = _DECODER_CHANNELS * _DECODER_LIVE * min(frames, _DECODER_FRAMES) * pixels * 4
    return live + frames * 3 * pixels * 4
