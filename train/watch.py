"""What a run shows of itself, and when it has seen enough: figures, alarms, the gate picture, the best step.

Letters: E experts, N held-out clips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..moe_lora import WanmoeError
from .config import TrainConfig
from .meter import collapse
from .plots import draw_gate_matrix
from .stages import TERMS, StageSpec
from .tracking import Tracker
from .validate import HeldOut

SHOWN = (*TERMS, "teacher_kl_prompts")
"""Terms of the loss, as they stand in a line of the terminal."""


class Watch:
    """The log of a run; every rank has one and decides alike, rank 0 writes.

    Args:
        labels: index of the main instrument of each held-out clip, -1 without one.
        tracker: None on other ranks than 0.
        best: what `best` of an earlier attempt said.
        side: "high/" or "low/" before every figure, where two models train.
    """

    def __init__(
        self,
        config: TrainConfig,
        spec: StageSpec,
        experts: Sequence[str],
        labels: Sequence[int],
        tracker: Tracker | None,
        say: Callable[[str], object],
        best: Mapping[str, Any] | None = None,
        side: str = "",
    ) -> None:
        self.side = side
        self.tag = f" [{side.rstrip('/')}]" if side else ""
        self.config, self.spec, self.experts, self.labels = config, spec, list(experts), list(labels)
        self.tracker, self.say = tracker, say
        self.best: dict[str, Any] = dict(best or {})
        """Value and step of the best validation by the metric of early stopping, and how many came since."""
        self._alarmed = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of one step, and a word where the experts collapse."""
        if self.tracker is not None:
            finite = {key: value for key, value in values.items() if math.isfinite(value)}
            self.tracker.log(step, {self.side + key: value for key, value in finite.items()})
        if "train/loss" in values:
            self.say(f"step {step}{self.tag}: {_train_line(values, self.experts)}")
        if self.spec.routing not in ("labels", "router") or "load/entropy" not in values:
            return
        alarm = collapse(dict(values), self.experts, self.spec.routing == "router")
        if alarm is not None and not self._alarmed:  # said once, until it has passed
            self.say(f"step {step}{self.tag}: {alarm}")
        self._alarmed = alarm is not None

    def validated(self, step: int, held_out: HeldOut, levels: Sequence[float]) -> bool:
        """Logs a validation; returns whether it is the best so far (where early stopping asks)."""
        values = self._figures(held_out, levels)
        self.log(step, values)
        self.say(f"step {step}{self.tag}: {_held_out_line(values, self.experts)}")
        if self.spec.routing in ("labels", "router"):
            self._draw(step, held_out)
        return self._is_best(step, values)

    def writes(self, step: int) -> bool:
        """Whether the result file is to be that of this step."""
        return self.config.early_stop is None or self.best.get("step") == step

    @property
    def ended(self) -> bool:
        """Whether validations have gone on without a better one for as long as the config allows."""
        return int(self.best.get("since", 0)) >= self.config.patience

    def _figures(self, held_out: HeldOut, levels: Sequence[float]) -> dict[str, float]:
        """`val/loss` and `val/roi`: of all clips, by noise level, by instrument, and by both."""
        owners = torch.tensor(self.labels)
        values: dict[str, float] = {}
        kinds = (
            ("loss", held_out.loss, held_out.read),
            ("roi", held_out.roi, held_out.read & held_out.has_region),
        )
        for name, errors, counts in kinds:
            groups = [("", counts)]
            groups += [(f"/{expert}", counts & (owners == n)) for n, expert in enumerate(self.experts)]
            for suffix, members in groups:
                if not members.any():
                    continue
                rows = errors[members]
                values[f"val/{name}{suffix}"] = float(rows.mean())
                for level, mean in zip(levels, rows.mean(0).tolist(), strict=True):
                    values[f"val/{name}_t{level:g}{suffix}"] = mean
        return values

    def _draw(self, step: int, held_out: HeldOut) -> None:
        if self.tracker is None:
            return
        owners = torch.tensor(self.labels)
        members = [held_out.read & (owners == index) for index in range(len(self.experts))]
        rows = torch.stack([held_out.gates[own].mean(0) for own in members])
        path = self.tracker.path.parent / "plots" / f"gates-{self.side.replace('/', '-')}{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        title = f"mean gates of the held-out clips, step {step}"
        draw_gate_matrix(path, rows, self.experts, self.experts, title)
        self.tracker.artifact(path, "gates")

    def _is_best(self, step: int, values: Mapping[str, float]) -> bool:
        metric = self.config.early_stop
        if metric is None:
            return False
        if metric not in values:
            known = ", ".join(sorted(key for key in values if "_t" not in key))
            raise WanmoeError(f"train.early_stop = {metric!r}: validation has no such figure; it has {known}")
        value = values[metric] if math.isfinite(values[metric]) else math.inf
        if not self.best or value < self.best["value"]:
            self.best = {"value": value, "step": step, "since": 0}
            return True
        # A validation that a resumed run repeats counts once.
        if step > self.best.get("seen", self.best["step"]):
            self.best |= {"since": self.best["since"] + 1, "seen": step}
        if self.ended:
            self.say(
                f"step {step}{self.tag}: {metric} has not fallen below {self.best['value']:.4f} of step "
                f"{self.best['step']} in {self.best['since']} validations; training ends, that step is kept"
            )
        return False


def _train_line(values: Mapping[str, float], experts: Sequence[str]) -> str:
    terms = [f"{name} {values[f'train/{name}']:.3g}" for name in SHOWN if f"train/{name}" in values]
    text = f"loss {values['train/loss']:.4g}" + (f" ({', '.join(terms)})" if terms else "")
    if "load/entropy" in values:
        shares = ", ".join(f"{name} {values[f'load/{name}']:.0%}" for name in experts)
        text += f"; load {shares}, entropy {values['load/entropy']:.2f}"
        text += f" (of a clip's gates {values['gates/entropy']:.2f})"
    return text


def _held_out_line(values: Mapping[str, float], experts: Sequence[str]) -> str:
    text = f"held-out loss {values.get('val/loss', math.nan):.4f}"
    text += f", in the region {values['val/roi']:.4f}" if "val/roi" in values else ""
    each = [f"{name} {values[f'val/loss/{name}']:.4f}" for name in experts if f"val/loss/{name}" in values]
    return text + (f" ({', '.join(each)})" if each else "")


def main_experts(weights: Sequence[Tensor]) -> list[int]:
    """Index of the largest of each clip's gates by label [E], -1 for a clip without evidence."""
    return [int(gates.argmax()) if float(gates.sum()) > 0 else -1 for gates in weights]
