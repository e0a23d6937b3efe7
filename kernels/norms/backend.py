"""What the norms share: which implementation a call runs, checks of its tensors, and sums over tokens.

Letters: B clips, L tokens, D width.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from .. import cuda_library
from ..dry_run import is_dry, on_card

__all__ = [
    "check_clip_vector",
    "check_tokens",
    "chosen",
    "partial_sums",
    "sum_to_clips",
    "wide",
]

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "fused")
# Equal to kMaxWidth and kChunkRows of csrc/norms/norms.h.
MAX_WIDTH = 16384
CHUNK_ROWS = 64


def wide(x: Tensor) -> Tensor:
    """x in float32, or unchanged when it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.compiler.assume_constant_result
def _library_is_ready() -> bool:
    return _announce()


@lru_cache(maxsize=1)
def _announce() -> bool:
    try:
        path = cuda_library.load()
    except cuda_library.LibraryError as error:
        logger.warning("norms, residual sums and RoPE run in plain PyTorch: %s", error)
        return False
    logger.info("norms, residual sums and RoPE run in the CUDA kernels of %s", path)
    return True


def chosen(backend: str, x: Tensor) -> str:
    """What `backend` means for x [..., D]: "reference" or "fused"; "auto" is fused where the kernels can run.

    On the CPU, autograd over a few vectorised ops is faster than an op of our own. Raises ValueError for an
    unknown name, and for a fused call that the kernels cannot serve.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose from {', '.join(BACKENDS)}")
    if backend == "auto":
        fits = on_card(x) and x.dtype != torch.float64 and x.shape[-1] <= MAX_WIDTH
        return "fused" if fits and (is_dry() or _library_is_ready()) else "reference"
    if backend == "fused" and x.is_cuda and (x.dtype == torch.float64 or x.shape[-1] > MAX_WIDTH):
        raise ValueError(
            f"x is {x.dtype} with D = {x.shape[-1]}; the CUDA kernels take float32, float16 and bfloat16 "
            f"with D up to {MAX_WIDTH}: use backend='reference'"
        )
    return backend


def check_tokens(**tensors: Tensor | None) -> None:
    """ValueError unless all are floating [B, L, D] of one shape on one device."""
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    first_name, first = given[0]
    for name, tensor in given:
        if tensor.ndim != 3 or not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected floating [B, L, D]")
        if tensor.shape != first.shape or tensor.device != first.device:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} on {tensor.device}, {first_name} is {tuple(first.shape)} "
                f"on {first.device}; they must be alike"
            )


def check_clip_vector(x: Tensor, **tensors: Tensor | None) -> None:
    """ValueError unless each is [B, 1, D] or [1, 1, D] for x [B, L, D], on its device."""
    b, _, d = x.shape
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) not in ((b, 1, d), (1, 1, d)) or tensor.device != x.device:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} on {tensor.device}; expected [{b}, 1, {d}] or [1, 1, {d}] "
                f"on {x.device}"
            )


def sum_to_clips(x: Tensor, like: Tensor) -> Tensor:
    """x [B, L, D] summed over tokens to the shape of `like`, [B, 1, D] or [1, 1, D]."""
    return x.sum_to_size(like.shape)


def partial_sums(x: Tensor) -> Tensor:
    """An empty float32 [B, chunks, D] for the sums over the tokens of x [B, L, D], 64 tokens each."""
    b, tokens, d = x.shape
    return torch.empty(b, -(-tokens // CHUNK_ROWS), d, dtype=torch.float32, device=x.device)
