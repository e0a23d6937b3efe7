"""Loading a frozen base straight into the shards of ZeRO-3: each rank reads its own rows from the files.

DeepSpeed's own way reads the whole model on every rank and broadcasts each tensor from rank 0.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..moe_lora.wan.dit import WanDiT
from ..moe_lora.wan.weights import OpenDiT, check_computable


@dataclass
class Loaded:
    """What one rank read."""

    seconds: float
    bytes_read: int
    """Of this rank's rows."""
    bytes_whole: int
    """Of the model."""
    peak: int
    """Bytes of host memory that the process held at most while it read, beyond what it held before."""


class Sliced:
    """The weights of a model whose parameters stand in their places without values.

    Args:
        opened: model and files; `opened.dit` gets parameters of the right shape that hold nothing.
        dtype: that the weights are converted to; None keeps that of the files.
    """

    def __init__(self, opened: OpenDiT, dtype: torch.dtype | None) -> None:
        self.opened, self.dtype = opened, dtype
        self.names: dict[int, str] = {}
        self.loaded: Loaded | None = None
        for name in opened.dit.state_dict():
            stored = opened.named[name]
            sample = stored.part(0, 1)
            check_computable(name, sample, dtype, opened.label)
            # One element under every index: a full shape that takes no memory.
            empty = torch.zeros(1, dtype=dtype or sample.dtype).expand(stored.shape)
            parameter = nn.Parameter(empty, requires_grad=False)
            self.names[id(parameter)] = name
            owner, _, leaf = name.rpartition(".")
            setattr(opened.dit.get_submodule(owner), leaf, parameter)
        opened.dit.eval()

    @property
    def dit(self) -> WanDiT:
        """The model, to attach an adapter to; it computes only after `partition`."""
        return self.opened.dit

    def partition(self, module: nn.Module, settings: Mapping[str, Any]) -> None:
        """Makes every parameter of `module` a shard under `settings`, DeepSpeed's config: those of the base
        from the files, all others, which have values, as DeepSpeed does. A collective."""
        dtype = torch.bfloat16 if settings["bf16"]["enabled"] else torch.float32
        for parameter in module.parameters():
            if id(parameter) not in self.names:
                parameter.data = parameter.data.to(dtype)
        start, before, high = time.monotonic(), _resident(), 0
        bytes_read = bytes_whole = 0
        sliced = self

        import deepspeed
        from deepspeed.utils import groups

        class Init(deepspeed.zero.Init):
            """DeepSpeed's own partitioning, but for the parameters that are still on disk."""

            def _zero_init_param(self, param: Any) -> None:
                nonlocal bytes_read, bytes_whole, high
                name = sliced.names.get(id(param))
                if name is None:
                    super()._zero_init_param(param)
                    return
                self._convert_to_deepspeed_param(param)
                param.partition()
                # The shards within a node (hpZ) are cut from the first whole weight that is gathered; those
                # that were cut just now hold nothing.
                param.ds_secondary_tensor = None
                bytes_whole += param.ds_numel * param.element_size()
                bytes_read += sliced.fill(name, param)
                high = max(high, _resident())

        Init(
            module=module,
            config_dict_or_path=_for_init(settings),
            dtype=dtype,
            # The ranks of a node, if another model of the job has made their group; a second is refused.
            zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),
        )
        self.loaded = Loaded(time.monotonic() - start, bytes_read, bytes_whole, max(high - before, 0))

    def fill(self, name: str, parameter: Any) -> int:
        """Reads this rank's elements of a partitioned parameter into their place; returns their bytes."""
        shard: Tensor = parameter.ds_tensor
        size, rank = shard.numel(), dist.get_rank(group=parameter.ds_process_group)
        first = min(size * rank, parameter.ds_numel)
        stop = min(first + size, parameter.ds_numel)  # the last rank's shard may be padded
        if stop > first:
            part = self.opened.named[name].part(first, stop)
            shard[: stop - first].copy_(part)
        shard[stop - first :].zero_()
        return (stop - first) * shard.element_size()


def _for_init(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy: DeepSpeed writes into the config that it is given."""
    return {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}


def _resident() -> int:
    """Bytes of memory of this process beside what it shares, which mapped files are."""
    told = psutil.Process().memory_info()
    return int(told.rss) - int(getattr(told, "shared", 0))
