"""Loading a frozen base straight into the shards of ZeRO-3: each rank reads its own rows from the files.

DeepSpeed's own way reads the whole model on every rank and broadcasts each tensor from rank 0.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..moe_lora import WanmoeError
from ..moe_lora.wan.dit import WanDiT
from ..moe_lora.wan.weights import OpenDiT, check_computable


@dataclass
class Loaded:
    """What one rank read."""

    seconds: float = 0.0
    bytes_read: int = 0
    """Of this rank's rows, as the files hold them."""
    bytes_whole: int = 0
    """Of the whole model."""
    peak: int = 0
    """Bytes of host memory that the process held at most while it read, beyond what it held before."""


class Sliced:
    """The weights of a model whose parameters stand in their places without values.

    Args:
        opened: model and files; `opened.dit` gets parameters of the right shape that hold nothing.
        dtype: that the weights are converted to; None keeps that of the files.
        device: where the shards will be.
    """

    def __init__(self, opened: OpenDiT, dtype: torch.dtype | None, device: torch.device) -> None:
        self.opened, self.device = opened, device
        self.names: dict[int, str] = {}
        self.loaded: Loaded | None = None
        for name in opened.dit.state_dict():
            stored = opened.named[name]
            sample = stored.part(0, 1)
            check_computable(name, sample, dtype, opened.label)
            # One element under every index: a full shape that takes no memory, and that DeepSpeed, which
            # brings a parameter to the device before it is cut, has no need to copy there.
            empty = torch.zeros(1, dtype=dtype or sample.dtype, device=device).expand(stored.shape)
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
        # The engine leaves a model that is partitioned already where it is.
        for buffer in module.buffers():
            buffer.data = buffer.data.to(self.device)
        start, before = time.monotonic(), _resident()
        self.loaded, self._filled = Loaded(), set[str]()
        sliced = self

        import deepspeed
        from deepspeed.utils import groups

        class Init(deepspeed.zero.Init):
            """DeepSpeed's own partitioning, but for the parameters that are still on disk."""

            def _zero_init_param(self, param: Any) -> None:
                name = sliced.names.get(id(param))
                if name is None:
                    super()._zero_init_param(param)
                    return
                self._convert_to_deepspeed_param(param)
                param.partition()
                # The shards within a node (hpZ) are cut from the first whole weight that is gathered; those
                # that were cut just now hold nothing.
                param.ds_secondary_tensor = None
                sliced._fill(name, param)

        Init(
            module=module,
            config_dict_or_path=_for_init(settings),
            dtype=dtype,
            # The ranks of a node, if another model of the job has made their group; a second is refused.
            zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),
        )
        if missed := sorted(set(self.names.values()) - self._filled):
            # `_zero_init_param` is DeepSpeed's own affair: a version without it would train on zeros.
            raise WanmoeError(
                f"deepspeed {deepspeed.__version__} partitions parameters in a way that is not known here: "
                f"{len(missed)} were not read, e.g. {missed[0]}; run: pip install 'deepspeed<0.20'"
            )
        self.loaded.seconds = time.monotonic() - start
        self.loaded.peak = max(self.loaded.peak - before, 0)

    def _fill(self, name: str, parameter: Any) -> None:
        """Reads this rank's elements of a partitioned parameter into their place."""
        shard: Tensor = parameter.ds_tensor
        if shard.dtype != parameter.dtype or shard.numel() == 0:
            raise WanmoeError(
                "the base cannot be read into quantised shards or shards on NVMe: leave "
                "zero_quantized_nontrainable_weights and offload_param to nvme out of deepspeed.config"
            )
        size, rank = shard.numel(), dist.get_rank(group=parameter.ds_process_group)
        first = min(size * rank, parameter.ds_numel)
        stop = min(first + size, parameter.ds_numel)  # the last rank's shard may be padded
        stored, loaded = self.opened.named[name], self.loaded
        assert loaded is not None
        if stop > first:
            part = stored.part(first, stop)
            shard[: stop - first].copy_(part)
            loaded.bytes_read += part.nbytes
            loaded.bytes_whole += parameter.ds_numel * part.element_size()
            loaded.peak = max(loaded.peak, _resident())
        shard[stop - first :].zero_()
        _trim_heap()
        self._filled.add(name)


def _for_init(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy: DeepSpeed writes into the config that it is given."""
    return {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}


def _trim_heap() -> None:
    """Gives back the holes that whole weights leave between the shards: twice the shards, on the CPU."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc's
        libc.malloc_trim(0)


def _resident() -> int:
    """Bytes of memory of this process beside what it shares, which mapped files are."""
    told = psutil.Process().memory_info()
    return int(told.rss) - int(getattr(told, "shared", 0))
