"""The public op: checks what it is given, picks the backend by static facts, and says once why.

Letters: B clips, Lq query tokens, Lk key tokens, N heads, K head width.
"""

from __future__ import annotations

import functools
import logging
import operator

import torch
from torch import Tensor

from .backends import BACKENDS, Request

__all__ = ["attention", "request_of"]

_log = logging.getLogger(__name__)

# Best first; the last one always fits. sdpa is what PyTorch ships and tests: on a CUDA card it takes the
# best of its own flash (FlashAttention 2), cuDNN and memory-efficient kernels. flash3 goes before it where
# it runs, since it is written for Hopper alone and has a backward there. The other backends say in their
# records why they wait to be named. Both of these have a backward wherever they are chosen, so the choice is
# the same with and without gradients: a checkpointed block that is first run without a graph recomputes with
# the same one.
_PREFERENCE = ("flash3", "sdpa")


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """Softmax attention of every query over every key, scaled by 1/sqrt(K).

    Args:
        q: [B, Lq, N, K].
        k, v: [B, Lk, N, K], in the dtype and on the device of q.
        backend: "auto", or a name in `BACKENDS`: "sdpa" (PyTorch), "flash2", "flash3", "flash4" (flash-attn),
            "sage" (sageattention; quantised, inference alone). "auto" takes the best installed one that
            does not change the numbers, and logs its reasons once.

    Returns: [B, Lq, N, K] in the dtype of q.

    Raises: ValueError when shapes, dtypes or devices do not belong together, or when the named backend is
        unknown, not installed, or cannot do this on this card.
    """
    if q.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            "expected q [B, Lq, N, K], k and v [B, Lk, N, K]"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: dtypes differ: q {q.dtype}, k {k.dtype}, v {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"attention: devices differ: q {q.device}, k {k.device}, v {v.device}")
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    # index() makes the compiler specialise on a head width that it would rather keep symbolic.
    name = _resolve(backend, q.device, q.dtype, operator.index(q.shape[-1]), training)
    return BACKENDS[name].run(q, k, v)


def request_of(device: torch.device, dtype: torch.dtype, head_width: int, training: bool) -> Request:
    """The static facts of a call on this device, as `Backend.fit` takes them."""
    return Request(
        _card(device),
        str(device),
        dtype,
        head_width,
        training,
        torch.are_deterministic_algorithms_enabled(),
    )


# The compiler runs this while it traces and keeps the name: what goes in is what it guards on anyway.
@torch.compiler.assume_constant_result
def _resolve(backend: str, device: torch.device, dtype: torch.dtype, head_width: int, training: bool) -> str:
    """Name of the backend to run; raises ValueError for a named one that cannot."""
    request = request_of(device, dtype, head_width, training)
    return _choose(request) if backend == "auto" else _named(backend, request)


def _card(device: torch.device) -> tuple[int, int] | None:
    """Compute capability; None for a CPU, and for an AMD card, whose numbers mean something else."""
    if device.type != "cuda" or torch.version.hip:
        return None
    return torch.cuda.get_device_capability(device)


# Cached, so that a package that does not load is tried once and not in every call.
@functools.cache
def _choose(request: Request) -> str:
    others = {name: backend.by_name_only for name, backend in BACKENDS.items() if backend.by_name_only}
    chosen = ""
    for name in _PREFERENCE:
        reason = f"{chosen} goes before it" if chosen else BACKENDS[name].fit(request)
        if reason is None:
            chosen = name
        else:
            others[name] = reason
    _explain(chosen, request.device, "; ".join(f"{name}: {reason}" for name, reason in others.items()))
    return chosen


@functools.cache
def _explain(chosen: str, device: str, others: str) -> None:
    _log.info("attention: auto chose %s for tensors on %s; not %s", chosen, device, others)


@functools.cache
def _named(backend: str, request: Request) -> str:
    if backend not in BACKENDS:
        raise ValueError(
            f"attention: backend {backend!r} is unknown; choose from auto, {', '.join(BACKENDS)}"
        )
    reason = BACKENDS[backend].fit(request)
    if reason is not None:
        raise ValueError(
            f"attention: backend {backend!r} does not fit: {reason}. "
            "Change that, or use backend='sdpa' or 'auto'."
        )
    return backend
