"""What a step takes beside the weights: counted in a dry run of the model itself, on tensors without values.

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
from ..moe_lora.adapter import AdapterConfig, Part, attach
from ..moe_lora.wan.config import WanConfig
from ..moe_lora.wan.dit import WanDiT


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
    adapter: AdapterConfig,
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
        parts: of the adapter, which train; () for a forward alone.
        clips: in one forward.
        card: with the kernels of a card; else as on the CPU.
    """
    with torch.device("meta"):
        dit = WanDiT(config).to(dtype)
    made = attach(dit, adapter, device="meta")
    trained = made.train_only(parts or ("experts",))
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
        t = torch.empty(clips)
        context = torch.empty(clips, config.text_len, config.text_dim, dtype=dtype)
        experts = torch.empty(clips, len(made.experts))
        gates = made.gates(experts, t, tokens=tokens)
        live = LiveBytes()
        with live:
            state = dit.prefix(x, t, context, image, None, gates)
            prefix = live.restart()
            v = dit.tail(state, gates)
            forward = live.restart()
            if parts:
                v.square().mean().backward()
        gradients = sum(p.nbytes for p in trained.values()) if parts else 0
        return Activations(prefix, forward, max(live.peak - gradients, 0))
