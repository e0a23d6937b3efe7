"""The attention backends: what each needs, what it can do, and how it is called.

Each record repeats what the sources of its package check, so that a call is refused here, in one sentence,
and not deep inside a kernel. Sources: github.com/Dao-AILab/flash-attention (`flash_attn/`, `hopper/`,
`flash_attn/cute/`) and github.com/thu-ml/SageAttention (`main`, and `sageattention-1`, which PyPI carries).

Letters: B clips, Lq query tokens, Lk key tokens, N heads, K head width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BACKENDS", "Backend", "Request"]

HALF = (torch.float16, torch.bfloat16)


class Request(NamedTuple):
    """The static facts of a call: what a backend is chosen by. No tensor, so that it can be a key."""

    card: tuple[int, int] | None
    """Compute capability of the NVIDIA card that holds the tensors; None on anything else."""
    device: str
    """Where the tensors are, in words."""
    dtype: torch.dtype
    head_width: int
    training: bool
    """Gradients are enabled and one of q, k, v requires them."""
    deterministic: bool
    """`torch.use_deterministic_algorithms` is on."""


@dataclass(frozen=True)
class Backend:
    """One way to compute attention; an empty `module` means that PyTorch brings it."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    """q [B, Lq, N, K], k and v [B, Lk, N, K] -> [B, Lq, N, K]."""
    module: str = ""
    function: str = ""
    install: str = ""
    """The exact command."""
    forward: tuple[str, ...] = ()
    """Compute capabilities, "9.0" or "8.x"."""
    backward: tuple[str, ...] = ()
    deterministic: tuple[str, ...] = ()
    """Compute capabilities on which the backward can give the same bits each time."""
    dtypes: tuple[torch.dtype, ...] = HALF
    head_widths: Sequence[int] = ()
    by_name_only: str = ""
    """Why "auto" never chooses it."""

    def fit(self, request: Request) -> str | None:
        """None, or the reason why this backend cannot serve the request. Imports its package last."""
        if not self.module:
            return None
        if request.card is None:
            return f"it needs tensors on an NVIDIA card, these are on {request.device}"
        if request.dtype not in self.dtypes:
            return f"it takes {_list(self.dtypes)}, not {request.dtype}"
        if request.head_width not in self.head_widths:
            return f"it takes head widths {_widths(self.head_widths)}, not {request.head_width}"
        if not _covers(self.forward, request.card):
            return (
                f"it runs on compute capability {_list(self.forward)}, this card is {_dotted(request.card)}"
            )
        if request.training and not self.backward:
            return "it is for inference alone and a gradient is needed"
        if request.training and not _covers(self.backward, request.card):
            return (
                f"its backward runs on compute capability {_list(self.backward)}, "
                f"this card is {_dotted(request.card)}"
            )
        if request.training and request.deterministic and not _covers(self.deterministic, request.card):
            return f"it has no deterministic backward on compute capability {_dotted(request.card)}"
        return self._missing()

    def _missing(self) -> str | None:
        """None, or why the package cannot be imported, with the command that installs it."""
        try:
            getattr(importlib.import_module(self.module), self.function)
        except (ImportError, OSError, AttributeError) as error:
            # A parent that is missing counts as well; a dependency that is missing does not.
            absent = error.name if isinstance(error, ModuleNotFoundError) else None
            if absent and f"{self.module}.".startswith(f"{absent}."):
                return f"{self.module} is not installed ({self.install})"
            # A build for another torch or CUDA fails in the dynamic linker, with lines of symbols.
            first = str(error).partition("\n")[0]
            return f"{self.module} is installed but does not load: {first} ({self.install})"
        return None


def _covers(capabilities: tuple[str, ...], card: tuple[int, int]) -> bool:
    return _dotted(card) in capabilities or f"{card[0]}.x" in capabilities


def _dotted(card: tuple[int, int]) -> str:
    return f"{card[0]}.{card[1]}"


def _list(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)


def _widths(widths: Sequence[int]) -> str:
    if isinstance(widths, range):
        step = "" if widths.step == 1 else f" in steps of {widths.step}"
        return f"{widths[0]} to {widths[-1]}{step}"
    return _list(widths)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


# The packages are imported where they are called, by a statement: the compiler can follow that, and nothing
# is loaded for a backend that is not used. The three generations of flash-attn share layout, names and scale.


def _flash2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    out: Tensor = flash_attn_func(q, k, v, deterministic=torch.are_deterministic_algorithms_enabled())
    return out


def _flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    return _output(flash_attn_func(q, k, v, deterministic=torch.are_deterministic_algorithms_enabled()))


@torch.compiler.disable(reason="flash-attn 4 compiles its own kernels at the first call of a shape")
def _flash4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute import flash_attn_func

    return _output(flash_attn_func(q, k, v, deterministic=torch.are_deterministic_algorithms_enabled()))


@torch.compiler.disable(reason="sageattention asks for the cards of the machine in each call")
def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from sageattention import sageattn

    # sageattention 1 subtracts the mean of the keys from k in place: it gets a copy, k is the caller's.
    out: Tensor = sageattn(q, k.clone(), v, tensor_layout="NHD", is_causal=False)
    return out


def _output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """flash-attn 4, and flash-attn 3 before July 2025, return (out, log-sum-exp), the others out."""
    return result[0] if isinstance(result, tuple) else result


_EVERY = ("8.x", "9.x", "10.x", "11.x", "12.x")

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("sdpa", _sdpa),
        Backend(
            "flash2",
            _flash2,
            module="flash_attn",
            function="flash_attn_func",
            install="pip install flash-attn --no-build-isolation",
            forward=_EVERY,
            backward=_EVERY,
            deterministic=_EVERY,
            head_widths=range(1, 257),
            by_name_only="PyTorch's own flash kernel is FlashAttention 2 as well",
        ),
        Backend(
            "flash3",
            _flash3,
            module="flash_attn_interface",
            function="flash_attn_func",
            install=(
                "pip install --no-build-isolation "
                "'git+https://github.com/Dao-AILab/flash-attention.git#subdirectory=hopper'"
            ),
            forward=("9.0",),
            backward=("9.0",),
            deterministic=("9.0",),
            # Wider heads round up to 256, which has no deterministic backward.
            head_widths=range(8, 193, 8),
        ),
        Backend(
            "flash4",
            _flash4,
            module="flash_attn.cute",
            function="flash_attn_func",
            install="pip install --pre flash-attn-4",
            forward=_EVERY,
            # No 8.x: its backward asserts 9.x to 12.x.
            backward=("9.x", "10.x", "11.x", "12.x"),
            deterministic=("9.x", "10.x", "11.x"),
            # The widths that all cards share; some take 192 and 256 too.
            head_widths=range(8, 129, 8),
            by_name_only="it is a beta",
        ),
        Backend(
            "sage",
            _sage,
            module="sageattention",
            function="sageattn",
            install="pip install sageattention==1.0.6, or 2.x from https://github.com/thu-ml/SageAttention",
            forward=("8.0", "8.6", "8.9", "9.0", "12.0", "12.1"),
            # The widths that versions 1 and 2 share.
            head_widths=(64, 96, 128),
            by_name_only="it quantises, which changes the numbers",
        ),
    )
}
