"""Fills the op's stored table for a card: times every form and launch at each shape, keeps what wins.

One kernel after the other, the others held at the best so far: the kernels of a plan run one after the other,
so their times add. Library products are left only for a plan that beats them by more than the noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..lora_moe import lora_moe_linears, table
from ..lora_moe.table import Launch, Plan
from ..lora_moe.weights import layout
from .linear import LINEARS, MODES, TEXT_TOKENS, Inputs, Mode, Problem, make_inputs
from .provenance import provenance
from .timing import Protocol, Timed, input_sets, interleaved, summary

__all__ = ["ORDER", "PROTOCOL", "TOKENS", "tune", "tune_card", "write_table"]

ORDER = "qkv,q,k,ffn.0,ffn.2,kv"
"""What a step runs most comes first: an interrupted run has tuned that."""
TOKENS = "5376,21504,32760,75600"
PROTOCOL = Protocol(warmup=5, repeats=30)
_MARGIN = 0.02
"""Share by which a plan must beat the library products."""


def tune_card(linears: Sequence[str], tokens: str, say: Callable[[str], object]) -> Path:
    """Tunes the named linears at these token counts, "5376,21504", on this machine's card.

    Returns: the table's path. Raises: ValueError without a CUDA device, for a linear that is unknown, or for
    a token count that is no positive integer.
    """
    if unknown := [name for name in linears if name not in LINEARS]:
        raise ValueError(f"linear {unknown[0]!r} is unknown; choose from {', '.join(LINEARS)}")
    for word in tokens.split(","):
        if not word.strip().isdecimal() or not int(word):
            raise ValueError(f"tokens {word!r}: expected positive integers with commas, such as {TOKENS}")
    if not torch.cuda.is_available():
        raise ValueError("tuning needs a CUDA device: the table holds what was measured on the card itself")
    device = torch.device("cuda", torch.cuda.current_device())
    arch = table.architecture(device)
    problems = [
        Problem(name, LINEARS[name], count)
        for name in linears
        for count in ((TEXT_TOKENS,) if name == "kv" else map(int, tokens.split(",")))
    ]
    path = table.user_folder() / f"{arch}.json"
    for problem in problems:
        # Written after each shape, so that an interrupted run keeps what it measured.
        write_table(tune([problem], arch=arch, device=device, say=say), path, provenance(device, sys.argv))
    return path


def tune(
    problems: Sequence[Problem],
    *,
    arch: str,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    protocol: Protocol = PROTOCOL,
    say: Callable[[str], object] = print,
) -> list[dict[str, Any]]:
    """Rows of the table for these problems, each with the milliseconds of what was compared last."""
    return [_row(problem, arch, device, dtype, protocol, say) for problem in problems]


def write_table(rows: Sequence[Mapping[str, Any]], path: Path, provenance: Mapping[str, Any]) -> None:
    """Writes a table, keeping an older one's rows for other shapes; readers see the old or the new file."""
    old = _old_rows(path)
    key = ("d_in", "d_out", "width", "tokens")
    fresh = {json.dumps([row[name] for name in key]) for row in rows}
    kept = [row for row in old if json.dumps([row[name] for name in key]) not in fresh]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.tmp")
    data = {"format": table.FORMAT, "provenance": provenance, "rows": [*kept, *rows]}
    text = json.dumps(data, indent=1)
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def _old_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table that is there and can be read; raises ValueError for one that cannot."""
    if not path.exists():
        return []
    table.read_table(path, path.stem)
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def _row(
    problem: Problem,
    arch: str,
    device: torch.device,
    dtype: torch.dtype,
    protocol: Protocol,
    say: Callable[[str], object],
) -> dict[str, Any]:
    columns = layout(
        [part.rank for part in problem.parts],
        [part.rank for part in problem.parts],
        problem.experts,
        padded=True,
    )
    first = make_inputs(problem, dtype=dtype, device=device, seed=0)
    count = input_sets(first.nbytes, device)
    sets = [first, *(make_inputs(problem, dtype=dtype, device=device, seed=s) for s in range(1, count))]

    def fastest(mode: Mode, plans: Mapping[str, Plan]) -> tuple[str, dict[str, float]]:
        times = _times(plans, [inputs.for_mode(mode) for inputs in sets], mode, device, protocol, say)
        return min(times, key=lambda name: times[name]), times

    def launches(kernel: str) -> list[Launch]:
        # Every linear of the group runs with the same launch.
        width = columns.width if kernel in ("shrink", "down_grad", "dx") else max(columns.widths)
        return table.candidates(kernel, width, arch)

    forward, forward_ms = _forward(lambda plans: fastest(MODES["fwd"], plans), launches, len(problem.parts))
    plan, backward_ms = _backward(lambda plans: fastest(MODES["bwd"], plans), launches, forward)
    say(
        f"{problem.slug}: {plan.form}, "
        f"{forward_ms[plan.form]:.3f} ms forward (library {forward_ms['library']:.3f}); "
        f"backward {backward_ms['chosen']:.3f} ms (library {backward_ms['library']:.3f})"
    )
    return {
        "d_in": problem.parts[0].d_in,
        "d_out": [part.d_out for part in problem.parts],
        "width": columns.width,
        "tokens": problem.all_tokens,
        "plan": table.to_json(plan),
        "ms": {"forward": forward_ms, "backward": backward_ms},
    }


Fastest = Callable[[Mapping[str, Plan]], tuple[str, dict[str, float]]]


def _forward(
    fastest: Fastest, launches: Callable[[str], list[Launch]], linears: int
) -> tuple[Plan, dict[str, float]]:
    """The best plan of each form, then the best of these."""
    best = {"library": Plan()}

    def search(form: str, kernels: Sequence[str]) -> None:
        if not all(launches(kernel) for kernel in kernels):
            return  # nothing of this form fits the card
        plan = table.default_plan(form)
        for kernel in kernels:
            options = {
                str(tuple(launch)): replace(plan, launches=plan.launches | {kernel: launch})
                for launch in launches(kernel)
            }
            plan = options[fastest(options)[0]]
        best[form] = plan

    search("single_pass", ("single_pass",) if linears == 1 else ("shrink", "expand"))
    search("delta_first", ("shrink", "expand"))
    search("epilogue", ("shrink", "gemm"))
    name, times = fastest(best)
    if times[name] > (1 - _MARGIN) * times["library"]:
        name = "library"
    return best[name], times


def _backward(
    fastest: Fastest, launches: Callable[[str], list[Launch]], forward: Plan
) -> tuple[Plan, dict[str, float]]:
    """Adds to a forward plan the backward kernels that beat a library product."""
    kept = {k: v for k, v in forward.launches.items() if k not in ("up_grad", "down_grad", "dx")}
    library = Plan(forward.form, kept)
    plan = library
    for kernel in ("up_grad", "down_grad", "dx"):
        options = {"library": plan} | {
            str(tuple(launch)): replace(plan, launches=plan.launches | {kernel: launch})
            for launch in launches(kernel)
        }
        name, times = fastest(options)
        if times[name] <= (1 - _MARGIN) * times["library"]:
            plan = options[name]
    _, times = fastest({"library": library, "chosen": plan})
    return plan, times


def _times(
    plans: Mapping[str, Plan],
    sets: Sequence[Inputs],
    mode: Mode,
    device: torch.device,
    protocol: Protocol,
    say: Callable[[str], object],
) -> dict[str, float]:
    """Median milliseconds of each plan that runs on this card."""

    def forward(index: int) -> tuple[Sequence[torch.Tensor], int]:
        inputs = sets[index]
        gates = inputs.base_gates, inputs.expert_gates, inputs.tokens_per_row
        return lora_moe_linears(inputs.x, inputs.linears, *gates, backend="triton"), index

    def backward(given: tuple[Sequence[torch.Tensor], int]) -> object:
        outputs, index = given
        return torch.autograd.grad(outputs, list(sets[index].leaves().values()), sets[index].dys)

    def timed(name: str, plan: Plan) -> Timed:
        def context() -> AbstractContextManager[Any]:
            return table.override(plan)

        if mode.backward:
            return Timed(name, forward, backward, context)
        return Timed(name, lambda index: index, forward, context)

    runnable = []
    for name, plan in plans.items():
        candidate = timed(name, plan)
        try:
            with candidate.context():
                candidate.run(candidate.before(0))
        except _out_of_resources() as error:
            say(f"left out {name}: {error}")
            continue
        runnable.append(candidate)
    samples = interleaved(runnable, device=device, sets=len(sets), protocol=protocol)
    return {name: summary(several)["median"] for name, several in samples.items()}


def _out_of_resources() -> type[Exception]:
    from triton.runtime.errors import OutOfResources

    found: type[Exception] = OutOfResources
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m wanmoe.kernels.bench.tune`, for a machine with little else than torch; 2 without a card."""
    parser = argparse.ArgumentParser(prog="python -m wanmoe.kernels.bench.tune", description=__doc__)
    parser.add_argument("--tokens", default=TOKENS, help="tokens per call, with commas")
    parser.add_argument("--linears", default=ORDER, help=f"of {', '.join(LINEARS)}, with commas")
    given = parser.parse_args(argv)
    try:
        path = tune_card(given.linears.split(","), given.tokens, print)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
