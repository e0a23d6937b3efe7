"""A frozen model that waits in host memory while the other one trains: for two models on one card."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..moe_lora.block_store import pin

# Where a tensor may begin within the memory of a model.
_ALIGN = 256


class Parked:
    """The frozen parameters of a module, kept in host memory and copied to a card while they are needed.

    What is frozen never travels back. What trains stays where the optimizer has it. The host has them in one
    piece, pinned where there is a card.
    """

    def __init__(self, module: nn.Module) -> None:
        frozen = [p for p in module.parameters() if not p.requires_grad]
        sizes = [-(-p.nbytes // _ALIGN) * _ALIGN for p in frozen]
        flat = host_memory(sum(sizes))
        self.masters: dict[nn.Parameter, Tensor] = {}
        for parameter, piece in zip(frozen, flat.split(sizes), strict=True):
            host = piece[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)
            self.masters[parameter] = host.copy_(parameter.data)
        self.here = True
        """Whether the device has it."""

    def enter(self, device: torch.device) -> None:
        """Copies it to the device, unless it is there."""
        if not self.here:
            for parameter, host in self.masters.items():
                parameter.data = host.to(device, non_blocking=True, copy=True)
        self.here = True

    def leave(self) -> None:
        """Frees what the device has of it."""
        for parameter, host in self.masters.items():
            parameter.data = host
        self.here = False


def host_memory(size: int) -> Tensor:
    """uint8 [size] of the host, pinned where there is a card."""
    flat = torch.empty(size, dtype=torch.uint8)
    pin(flat)
    return flat
