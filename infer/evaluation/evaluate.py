"""All figures of generated clips against real ones, in one pass over the clips.

A figure that nothing can be said of is left out, and why is in the notes: none is made up from what is
missing.

Letters: F, H, W frames, height and width in pixels, K classes, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...moe_lora.errors import WanmoeError
from ...moe_lora.routing import RouterConfig, ema_over_frames
from .distance import UNBIASED_FROM, Distance, distance, frechet, kernel
from .estimate import Estimate, as_share, difference, estimate
from .features import Backbone, features
from .metrics import METRICS
from .scene import Scene
from .simulator import simulator_scores
from .temporal import Distance as PictureDistance
from .temporal import temporal_scores
from .tips import Share, location_scores

EMA: float = RouterConfig().ema
"""Weight of the past in the averaged judgement, as in the gates of a schedule."""
_FEWEST_FOR_SETS = 8
_FEW = 32  # clips a side below which the floor is as wide as what models differ by


@dataclass
class Judges:
    """What looks at clips; None measures without."""

    classify: Callable[[Tensor], Tensor] | None = None
    """uint8 [F, H, W, 3] -> logits [K] of the clip."""
    moments: Callable[[Tensor], Tensor] | None = None
    """The same -> logits [f, K] of each of its moments, a frame in four."""
    targets: Callable[[Sequence[tuple[str, float]]], Tensor] | None = None
    """A label -> weights [K] of the classes; all 0 where it has none of them."""
    classes: tuple[str, ...] = ()
    find_tips: Callable[[Tensor], tuple[Tensor | None, ...]] | None = None
    """uint8 [F, H, W, 3] -> the tips found in each frame, [n, 2], None for a frame that was not looked at."""
    lpips: PictureDistance | None = None
    backbone: Backbone | None = None
    device: str | torch.device = "cpu"
    """Where structure (SSIM) is compared; flow and correlations run on the CPU."""


class Row(NamedTuple):
    """One figure of the generated clips, and of the real ones by the same measurement."""

    made: Estimate
    real: Estimate | None
    """What real clips get: the ceiling of what a judge can say, or what is usual. None where it is not
    measured, or perfect by definition."""
    excess: Estimate | None
    """Generated less real, clip by clip."""


class SetRow(NamedTuple):
    """A distance between the two sets."""

    name: str
    distance: Distance
    headline: bool
    """Whether it is the one of its kind to be quoted, for this number of clips."""


@dataclass
class Evaluation:
    """What was measured."""

    clips: int
    """Pairs of a generated and a real clip."""
    made: int
    real: int
    """Clips of each set."""
    rows: dict[str, Row] = field(default_factory=dict)
    """By key of METRICS, in its order."""
    sets: list[SetRow] = field(default_factory=list)
    confusion: dict[str, list[list[float]]] = field(default_factory=dict)
    """"made" and "real": rows the label, columns what the classifier saw."""
    classes: tuple[str, ...] = ()
    router: dict[str, Estimate] = field(default_factory=dict)
    load: dict[str, float] = field(default_factory=dict)
    """Mean gate of each expert over the clips."""
    routed: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same by label: mean gate of each expert over the clips whose label is that of the key."""
    each: dict[str, dict[str, float]] = field(default_factory=dict)
    """Figures of each generated clip by id."""
    each_real: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same of the real clip that belongs to it."""
    marks: dict[str, dict[str, list[tuple[int, float, float]]]] = field(default_factory=dict)
    """Tips by clip, "found" in the generated and "true" in the real one: (frame, x, y)."""
    notes: list[str] = field(default_factory=list)


def evaluate(pairs: Iterable[tuple[Scene, Scene | None]], judges: Judges, seed: int = 0) -> Evaluation:
    """Measures generated clips, each beside the real one that it belongs to.

    Args:
        pairs: (generated, real) clips of one size and rate, real None where there is none; read one by one.

    Raises WanmoeError where there is no clip, and for a clip that a judge cannot take.
    """
    work = _Work(judges)
    for made, real in pairs:
        work.add(made, real)
    if not work.made_ids:
        raise WanmoeError("there is no generated clip to evaluate")
    return work.result(seed)


class _Work:
    """Figures of clips as they come in."""

    def __init__(self, judges: Judges) -> None:
        self.judges = judges
        self.made: dict[str, dict[str, Share]] = {}
        self.real: dict[str, dict[str, Share]] = {}
        self.made_ids: list[str] = []
        self.pairs = 0
        self.features: dict[str, dict[str, Tensor]] = {"made": {}, "real": {}}
        self.confusion: dict[str, Tensor] = {}
        self.found_tips = False
        self.marks: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
        self.unlabelled = self.unmarked = 0

    def add(self, made: Scene, real: Scene | None) -> None:
        """Measures one clip and its true one."""
        if made.id in self.made_ids:
            raise WanmoeError(
                f"{made.id}: two generated clips have this id; ids tell which real clip is theirs"
            )
        self.made_ids.append(made.id)
        if real is not None:
            self.pairs += 1
            length = min(len(made.frames), len(real.frames))
            made, real = made.cut(length), real.cut(length)
            self._place(made, real)
            self._keep("made", made.id, simulator_scores(made, real, self.judges.device))
        label = made.label or (real.label if real is not None else ())
        for side, scene in (("made", made), ("real", real)):
            if scene is not None:
                # The region of a clip that says nothing of it is that of the clip it was made after.
                shown = scene if scene.marked or real is None else replace(scene, where=real.region())
                self._keep(side, made.id, temporal_scores(shown, self.judges.lpips, self.judges.device))
                self._judge(side, made.id, scene, label)
                if self.judges.backbone is not None:
                    found = features(self.judges.backbone, scene.frames, scene.id)
                    self.features[side][made.id] = found
        if self.judges.classify is not None and not self._target(label).any():
            self.unlabelled += 1

    def _place(self, made: Scene, real: Scene) -> None:
        find = self.judges.find_tips
        if find is not None and not made.tips:
            self.found_tips = True
            made = replace(made, tips=find(made.frames))
            if real.tips:
                shares = location_scores(replace(real, tips=find(real.frames), boxes=(), masks=()), real)
                self.real.setdefault(made.id, {}).update(shares)
        self.marks[made.id] = {"found": _listed(made), "true": _listed(real)}
        shares = location_scores(made, real)
        if not shares:
            self.unmarked += 1
        self.made.setdefault(made.id, {}).update(shares)

    def _judge(self, side: str, name: str, scene: Scene, label: Sequence[tuple[str, float]]) -> None:
        judges, target = self.judges, self._target(label)
        if judges.classify is not None and target.any():
            seen = int(judges.classify(scene.frames).argmax())
            table = self.confusion.setdefault(side, torch.zeros(len(target), len(target)))
            table[:, seen] += target
            self._keep(side, name, {"identity": float(target[seen] >= target.max())})
        if judges.moments is not None and len(scene.frames) > 4:
            seen_at = judges.moments(scene.frames).softmax(1)
            plain, calm = flips(seen_at, len(scene.frames) / scene.fps)
            self._keep(side, name, {"flips": plain, "flips_ema": calm})

    def _target(self, label: Sequence[tuple[str, float]]) -> Tensor:
        return torch.zeros(1) if self.judges.targets is None else self.judges.targets(label)

    def _keep(self, side: str, name: str, values: Mapping[str, float]) -> None:
        table = self.made if side == "made" else self.real
        table.setdefault(name, {}).update({key: as_share(value) for key, value in values.items()})

    def result(self, seed: int) -> Evaluation:
        """What all clips say together."""
        out = Evaluation(self.pairs, len(self.made_ids), self.pairs, classes=self.judges.classes)
        for key in METRICS:
            own, other = (_column(table, key) for table in (self.made, self.real))
            if own:
                real = estimate(list(other.values()), seed) if other else None
                out.rows[key] = Row(estimate(list(own.values()), seed), real, difference(own, other, seed))
        out.confusion = {side: table.tolist() for side, table in self.confusion.items()}
        out.each, out.each_real = (_each(table) for table in (self.made, self.real))
        out.marks = {name: marks for name, marks in self.marks.items() if any(marks.values())}
        out.sets = self._sets(seed)
        out.notes = self._notes(out)
        return out

    def _sets(self, seed: int) -> list[SetRow]:
        backbone, kept = self.judges.backbone, self.features
        shared = [name for name in kept["made"] if name in kept["real"]]
        if backbone is None or len(shared) < _FEWEST_FOR_SETS:
            return []
        made, real = (
            np.stack([kept[side][name].double().numpy() for name in shared]) for side in ("made", "real")
        )
        many = len(shared) >= UNBIASED_FROM
        return [
            SetRow(backbone.kernel, distance(made, real, kernel, paired=True, seed=seed), not many),
            SetRow(backbone.frechet, distance(made, real, frechet, paired=True, seed=seed), many),
        ]

    def _notes(self, out: Evaluation) -> list[str]:
        notes = []
        if alone := out.made - out.clips:
            notes.append(
                f"{alone} of {out.made} generated clips have no real clip of their id: they count where "
                "none is needed"
            )
        if self.found_tips:
            notes.append(
                "tips of the generated clips were found by a detector, one a frame in four; what it finds in "
                "the real clips is in the column of real ones: no generated clip can be told to do better"
            )
        if self.judges.find_tips is None and not any(key.startswith("tip") for key in out.rows):
            notes.append("no tip is measured: give --detector, or generated clips with tips in a clips.jsonl")
        elif self.unmarked:
            notes.append(f"{self.unmarked} pairs have no tip, box or mask that both sides know")
        if self.judges.classify is None:
            notes.append("identity is not measured: give --classifier")
        elif self.unlabelled:
            notes.append(f"{self.unlabelled} clips have no label that the classifier knows")
        backbone = self.judges.backbone
        if backbone is None:
            notes.append("no distance between the sets is measured: give --features")
        elif not out.sets:
            notes.append(f"a distance between sets needs {_FEWEST_FOR_SETS} pairs; there are {out.clips}")
        else:
            notes += [_verdict(row) for row in out.sets if row.headline]
            if not backbone.sees_order:
                notes.append(f"{backbone.kernel} looks at single frames: it is blind to their order")
        return notes


def _listed(scene: Scene) -> list[tuple[int, float, float]]:
    """The tips of a scene as (frame, x, y)."""
    known = [(place, tips.tolist()) for place, tips in enumerate(scene.tips) if tips is not None]
    return [(place, round(x, 2), round(y, 2)) for place, tips in known for x, y in tips]


def _column(table: Mapping[str, Mapping[str, Share]], key: str) -> dict[str, Share]:
    """By clip in the order of ids, so that an interval does not depend on the order of files."""
    return {name: table[name][key] for name in sorted(table) if key in table[name]}


def _each(table: Mapping[str, Mapping[str, Share]]) -> dict[str, dict[str, float]]:
    return {
        name: {key: share.hits / share.of for key, share in table[name].items()} for name in sorted(table)
    }


def flips(shares: Tensor, seconds: float, ema: float = EMA) -> tuple[float, float]:
    """How often the strongest of [f, K] changes in a second: as it is, and after the moving average of a
    schedule."""
    calm = ema_over_frames(shares[None], ema, shares.shape[1])[0]
    first, second = ((rows[1:].argmax(1) != rows[:-1].argmax(1)).sum() for rows in (shares, calm))
    return float(first) / seconds, float(second) / seconds


def _verdict(row: SetRow) -> str:
    found = row.distance
    where = "inside" if found.inside_floor else "above"
    half = min(found.made, found.real) // 2
    few = "; so few clips tell gross faults alone" if half < _FEW else ""
    return (
        f"{row.name}: at {half} clips a side the sets are {found.halves:.4g} apart, real "
        f"from real {found.floor:.4g} (± {found.floor_sd:.2g}): {where} what real clips differ by{few}"
    )


def as_json(found: Evaluation) -> dict[str, Any]:
    """The evaluation as JSON values; what is not a number becomes null."""

    def plain(value: Any) -> Any:
        if hasattr(value, "_asdict"):
            return {key: plain(part) for key, part in value._asdict().items()}
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {str(key): plain(part) for key, part in value.items()}
        return [plain(part) for part in value] if isinstance(value, list | tuple) else value

    sets = [plain(row) | {"inside_floor": row.distance.inside_floor} for row in found.sets]
    return {
        "clips": {"pairs": found.clips, "made": found.made, "real": found.real},
        "rows": {key: plain(row) for key, row in found.rows.items()},
        "sets": sets,
        "classes": list(found.classes),
        "confusion": found.confusion,
        "router": {key: plain(value) for key, value in found.router.items()},
        "load": found.load,
        "routed": found.routed,
        "notes": found.notes,
        "each": plain(found.each),
        "each_real": plain(found.each_real),
        "marks": plain(found.marks),
    }
