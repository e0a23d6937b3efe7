"""A frozen model that waits in host memory while the other one trains: for two models on one card."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Parked:
    """The frozen parameters of a module, kept in host memory and copied to a card while they are needed.

    What is frozen never travels back. What trains stays where the optimizer has it. On the host the copies
    are pinned where there is a card.
    """

    def __init__(self, module: nn.Module) -> None:
        pin = torch.cuda.is_available()
        self.masters: dict[nn.Parameter, Tensor] = {}
        for parameter in module.parameters():
            if not parameter.requires_grad:
                host = parameter.data.to("cpu")
                self.masters[parameter] = host.pin_memory() if pin else host
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
