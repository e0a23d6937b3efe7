"""How a frozen weight lies in memory: as it is, or quantised; computed in as bf16 either way."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import WanmoeError

__all__ = ["FORMATS", "PLAIN", "Format", "format_of"]


class Format(Protocol):
    """Bytes of a weight [rows, columns] and back."""

    name: str

    def size(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Bytes that a weight takes."""

    def pack(self, weight: Tensor, flat: Tensor) -> None:
        """Writes a weight into uint8 [size]."""

    def unpack(self, flat: Tensor, out: Tensor) -> None:
        """Computes the weight [rows, columns] out of uint8 [size]."""


class Plain:
    """As it is."""

    name = "bf16"

    def size(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return shape.numel() * dtype.itemsize

    def pack(self, weight: Tensor, flat: Tensor) -> None:
        flat.view(weight.dtype).view(weight.shape).copy_(weight)

    def unpack(self, flat: Tensor, out: Tensor) -> None:
        out.copy_(flat.view(out.dtype).view(out.shape))


class _Rows:
    """Values of one byte with one scale for each row, an output channel."""

    name: str
    dtype: torch.dtype
    most: float

    def size(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return shape.numel() + shape.numel() % 2 + 2 * shape[0]

    def pack(self, weight: Tensor, flat: Tensor) -> None:
        values, scales = self._parts(flat, weight.shape)
        wide = weight.float()
        # Rounded up to what bf16 holds, so that a product is rounded once.
        scale = (wide.abs().amax(1, keepdim=True) / self.most).clamp_min(1e-30)
        scales.copy_((scale * (1 + 2**-8)).bfloat16())
        scaled = wide / scales.float()
        values.copy_(scaled if self.dtype.is_floating_point else scaled.round())

    def unpack(self, flat: Tensor, out: Tensor) -> None:
        values, scales = self._parts(flat, out.shape)
        out.copy_(values).mul_(scales)

    def _parts(self, flat: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        count = shape.numel()
        scales = flat[count + count % 2 : count + count % 2 + 2 * shape[0]].view(torch.bfloat16)
        return flat[:count].view(self.dtype).view(shape), scales[:, None]


class Float8(_Rows):
    """e4m3: 3 bits of mantissa."""

    name, dtype, most = "fp8", torch.float8_e4m3fn, 448.0


class Int8(_Rows):
    """From -127 to 127."""

    name, dtype, most = "int8", torch.int8, 127.0


class NF4:
    """4 bits of a normal distribution's quantiles, one scale for each 64 values; by bitsandbytes."""

    name = "nf4"
    block = 64

    def size(self, shape: torch.Size, dtype: torch.dtype) -> int:
        blocks = -(-shape.numel() // self.block)
        return blocks * (self.block // 2 + 4)

    def pack(self, weight: Tensor, flat: Tensor) -> None:
        from bitsandbytes.functional import quantize_nf4

        values, scales = self._parts(flat, weight.shape)
        rest = scales.numel() * self.block - weight.numel()
        packed, state = quantize_nf4(F.pad(weight.flatten(), (0, rest)), blocksize=self.block)
        values.copy_(packed.flatten())
        scales.copy_(state.absmax)

    def unpack(self, flat: Tensor, out: Tensor) -> None:
        from bitsandbytes.functional import QuantState, dequantize_nf4

        values, scales = self._parts(flat, out.shape)
        # Whole blocks: on the CPU bitsandbytes 0.50 begins a new one at each row, here and not when it packs.
        shape = torch.Size((scales.numel(), self.block))
        state = QuantState(
            absmax=scales,
            shape=shape,
            dtype=out.dtype,
            blocksize=self.block,
            quant_type="nf4",
            code=_nf4_code(out.device),
        )
        if out.is_cuda and out.numel() == shape.numel():
            dequantize_nf4(values[:, None], state, out=out.view(shape))
        else:  # it writes into a given tensor on a card alone
            out.copy_(dequantize_nf4(values[:, None], state).flatten()[: out.numel()].view_as(out))

    def _parts(self, flat: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        blocks = -(-shape.numel() // self.block)
        scales = flat[blocks * self.block // 2 : blocks * (self.block // 2 + 4)].view(torch.float32)
        return flat[: blocks * self.block // 2], scales


@lru_cache
def _nf4_code(device: torch.device) -> Tensor:
    """The quantiles, made once a device: from a list they would make the host wait for each weight."""
    from bitsandbytes.functional import get_4bit_type

    code: Tensor = get_4bit_type("nf4", device=device)
    return code


PLAIN = Plain()
FORMATS: dict[str, Format] = {one.name: one for one in (PLAIN, Float8(), Int8(), NF4())}


def format_of(name: str) -> Format:
    """The format of a name in `FORMATS`.

    Raises WanmoeError for another name, or where the package that it takes is missing.
    """
    if name not in FORMATS:
        raise WanmoeError(f"unknown format {name!r} of the base; known are {', '.join(FORMATS)}")
    if name == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise WanmoeError("the format nf4 takes bitsandbytes; run: pip install 'wanmoe[nf4]'")
    return FORMATS[name]
