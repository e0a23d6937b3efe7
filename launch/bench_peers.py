"""Peers in the harness of `kernels.bench`: PEFT on a linear, and the adapted block beside diffusers + PEFT.

Letters: G gate rows, E experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.bench.benchmark import Options
from ..kernels.bench.linear import Inputs, Problem
from ..kernels.bench.measure import FAULTS, Subject, reason, timed_rows
from ..kernels.bench.memory import peak_bytes, poisoned
from ..kernels.bench.provenance import gpu_state, provenance
from ..kernels.bench.record import Row, Run
from ..kernels.bench.timing import CPU, QUICK, Protocol, Timed
from ..kernels.bench.truth import Verdict
from ..kernels.bench.variants import Prepared, Variant
from ..moe_lora.wan.config import WanConfig
from .bench_block import BlockTruth, block_truth, block_variants
from .bench_block import Variant as BlockVariant
from .bench_peft import LinearPeer, linear_peers, why_no_peft

__all__ = ["block_run", "peft_variants"]

_NO_ROUTER = {"router": "PEFT has no gradient to a gate"}
_FROZEN, _PEER = "wanmoe frozen", "diffusers + PEFT"
_FROZEN_AGAIN = "wanmoe frozen again"
_FAR = 0.5
"""Error beyond which a block is wrong and not only rounded; a missing adapter is 1."""
_ERRORS = (
    "the largest against our block at twice the precision: of the output over what the adapters change, of a "
    "gradient over its norm; the eager loop is that of diffusers + PEFT"
)
MODES = ("fwd", "bwd", "fwd+bwd")


def peft_variants(problem: Problem) -> list[Variant]:
    """PEFT, eager and compiled, for a problem of `kernels.bench`; q, k and v one after the other."""
    # Rows that differ, as random gates do.
    rows = torch.arange(float(problem.gate_rows))
    why_not = why_no_peft(rows, rows[:, None])
    return [
        Variant(name, _peft(name), why_not=why_not, refuses=_NO_ROUTER) for name in ("PEFT", "PEFT compiled")
    ]


def _peft(name: str) -> Callable[[Inputs], Prepared]:
    def prepare(inputs: Inputs) -> Prepared:
        peers = [
            linear_peers(linear, inputs.base_gates, inputs.expert_gates)[name] for linear in inputs.linears
        ]
        parameters = {f"{i}.{j}": p for i, peer in enumerate(peers) for j, p in enumerate(peer.leaves())}
        x = {"x": inputs.x} if inputs.x.requires_grad else {}
        return Prepared(
            lambda: [peer(inputs.x) for peer in peers],
            {**x, **parameters},
            lambda found: _under_our_names(peers, found),
        )

    return prepare


def _under_our_names(peers: Sequence[LinearPeer], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = {"x": found["x"]} if "x" in found else {}
    for i, peer in enumerate(peers):
        leaves = peer.leaves()
        for j, parameter in enumerate(leaves):
            parameter.grad = found[f"{i}.{j}"]
        out |= {f"{i}.{name}": grad for name, grad in peer.grads().items()}
        for parameter in leaves:
            parameter.grad = None
    return out


def block_run(
    options: Options,
    config: WanConfig,
    grids: Sequence[tuple[int, int, int]],
    *,
    text_len: int,
    device: torch.device,
    suite: str,
    compiled: bool,
    say: Callable[[str], object],
) -> Iterator[Run]:
    """One adapted block, ours and diffusers + PEFT, forward and backward, for each token grid F, H, W: the
    run so far, after each mode.

    compiled: also both under torch.compile, after the others. `_ERRORS` says what errors are.
    """
    protocol = QUICK if device.type == "cuda" else CPU
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    about, states = provenance(device, list(options.argv)), [gpu_state(device)]
    began = time.monotonic()
    rows: list[Row] = []
    total = len(grids) * len(MODES) * (1 + compiled)
    done = 0
    for grid in grids:
        torch.compiler.reset()
        variants = block_variants(config, grid, text_len, 1, device, dtype, 0)
        for some in _block_rows(variants, grid, config, device, protocol, compiled):
            rows += some
            done += 1
            states.append(gpu_state(device))
            seconds = time.monotonic() - began
            say(f"{done}/{total} {some[0].group} ({some[0].mode}), {seconds:.0f} s")
            configuration = {
                "protocol": asdict(protocol),
                "dtype": str(dtype).removeprefix("torch."),
                "block": asdict(config),
                "grids": [list(grid) for grid in grids],
                "text_len": text_len,
                "errors": _ERRORS,
                "complete": done == total,
                "seconds": round(seconds, 1),
            }
            yield Run(suite, about | {"gpu_states": [*states]}, configuration, None, tuple(rows))
        del variants
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _block_rows(
    variants: Mapping[str, BlockVariant],
    grid: tuple[int, int, int],
    config: WanConfig,
    device: torch.device,
    protocol: Protocol,
    compiled: bool,
) -> Iterator[list[Row]]:
    """The rows of each mode: first of the eager blocks, then, beside the frozen one, of the compiled ones."""
    tokens = math.prod(grid)
    truth = block_truth(variants["wanmoe"])
    ran = _Ran({}, {}, {}, {})
    for kind in ("", " compiled") if compiled else ("",):
        taken = {n: v for n, v in variants.items() if n == _FROZEN or n.endswith("compiled") == bool(kind)}
        _run_all(taken, device, ran)
        title = f"block{kind}: dim {config.dim}, ffn {config.ffn_dim}, {tokens} tokens"
        slug = f"block-n{tokens}{kind.replace(' ', '-')}"
        blank = Row(slug, title, "", "", "absent", linear="block", tokens=tokens, clips=1)
        for mode in MODES:
            yield _mode_rows(taken, mode, replace(blank, mode=mode), ran, truth, device, protocol)


def _mode_rows(
    taken: Mapping[str, BlockVariant],
    mode: str,
    blank: Row,
    ran: _Ran,
    truth: BlockTruth,
    device: torch.device,
    protocol: Protocol,
) -> list[Row]:
    subjects = []
    for name, variant in taken.items():
        why_not = variant.why_not or ran.failed.get(name)
        if why_not is not None:
            status = "FAILED" if name in ran.failed and why_not != "out of memory" else "absent"
            absent = replace(blank, variant=name, status=status, note=why_not)
            subjects.append(Subject(name, absent=absent))
            continue
        verdict = _verdict(name, mode, ran, truth)
        subject = Subject(name, timed=_timed(name, variant, mode), verdict=verdict)
        subjects.append(replace(subject, peak=ran.peaks.get((name, mode))))
        if name == _FROZEN:
            subjects.append(Subject(_FROZEN_AGAIN, timed=_timed(_FROZEN_AGAIN, variant, mode)))
    rows = timed_rows(
        subjects,
        lambda adapted: blank,
        device=device,
        sets=1,
        ceilings=None,
        protocol=protocol,
        frozen=_FROZEN,
    )
    return [_beside_ours(row, rows) for row in rows]


class _Ran(NamedTuple):
    """What every block gave, on memory that started as NaN."""

    outputs: dict[str, Tensor]
    gradients: dict[str, dict[str, Tensor]]
    failed: dict[str, str]
    """Why, by name."""
    peaks: dict[tuple[str, str], int | None]
    """Peak memory by name and mode."""


def _run_all(taken: Mapping[str, BlockVariant], device: torch.device, ran: _Ran) -> None:
    """Adds what these blocks give to `ran`."""
    for name, variant in taken.items():
        if variant.why_not is not None:
            continue
        try:
            for mode, run in (("fwd", variant.forward), ("fwd+bwd", variant.step)):
                run()
                ran.peaks[name, mode] = peak_bytes(run, device)
            with poisoned(device, ran.peaks[name, "fwd+bwd"] or 0):
                ran.outputs[name] = variant.forward().detach().clone()
                ran.gradients[name] = variant.grads()
        except torch.OutOfMemoryError:
            ran.failed[name] = "out of memory"
        except FAULTS as error:
            ran.failed[name] = reason(error)


def _timed(name: str, variant: BlockVariant, mode: str) -> Timed:
    def backward(out: Tensor) -> None:
        # The gradient of x is shared with the other blocks, which ran since the forward.
        variant.clear()
        variant.backward(out)

    if mode == "fwd":
        return Timed(name, lambda index: None, lambda given: variant.forward())
    if mode == "bwd":
        return Timed(name, lambda index: variant.graph(), backward)
    return Timed(name, lambda index: variant.clear(), lambda given: variant.step())


def _verdict(name: str, mode: str, ran: _Ran, truth: BlockTruth) -> Verdict | None:
    """The output or gradient that is furthest from the truth; None for a block without adapters."""
    if name == _FROZEN:
        return None
    errors = _errors(mode, ran.outputs[name], ran.gradients[name], truth)
    worst = max(errors, key=lambda key: errors[key])
    eager = None
    if _PEER in ran.outputs and name != _PEER:
        eager = _errors(mode, ran.outputs[_PEER], ran.gradients[_PEER], truth)[worst]
    return Verdict(worst, errors[worst], eager, errors[worst] <= _FAR)


def _errors(mode: str, y: Tensor, gradients: Mapping[str, Tensor], truth: BlockTruth) -> dict[str, float]:
    errors: dict[str, float] = {}
    if mode != "bwd":
        errors["y"] = _distance(y, truth.y, truth.y - truth.frozen)
    if mode != "fwd":
        for key, true in truth.gradients.items():
            errors[key] = _distance(gradients[key], true, true) if key in gradients else math.inf
    return errors


def _distance(a: Tensor, b: Tensor, scale: Tensor) -> float:
    if not bool(a.isfinite().all()):
        return math.inf
    return float((a.double() - b.double()).norm() / scale.double().norm())


def _beside_ours(row: Row, rows: Sequence[Row]) -> Row:
    """A peer's row says how much longer it takes than ours of the same kind."""
    if not row.ms or not row.variant.startswith(_PEER):
        return row
    ours = row.variant.replace(_PEER, "wanmoe")
    for other in rows:
        if (other.variant, other.mode, other.group) == (ours, row.mode, row.group) and other.ms:
            times = row.ms["median"] / other.ms["median"]
            return replace(row, note=f"takes {times:.2f} times as long as {ours}")
    return row
