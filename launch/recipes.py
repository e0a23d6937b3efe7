"""The recipes that `wanmoe bench recipes` compares: what each trains, in which stages, by which keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

BASE_LINE = "base adapter, equal parameters"
"""What the others are held against."""


@dataclass(frozen=True)
class Stage:
    """One `wanmoe train` of a recipe."""

    stage: str
    share: float
    """Of the recipe's steps."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Config keys and values, as on the command line."""


@dataclass(frozen=True)
class Recipe:
    """A way to an adapter: stages in turn, each from the file of the one before."""

    name: str
    stages: tuple[Stage, ...]
    clips: str = "clips"
    """What it is trained on; measured are all on the same clips."""


_RANKS = (("q", 8), ("k", 4), ("v", 4), ("o", 4), ("ffn", 4))
# alpha / rank stays that of the others: with alpha 4 at rank 20 the wide base would learn at a fifth.
_WIDE = {f"adapter.rank_{name}": str(5 * rank) for name, rank in _RANKS} | {"adapter.alpha": "20.0"}
# The same for every row: the rate that suits the wide base (half and twice of it are rows) and all losses.
_SAME = {
    "optimizer.lr": "2e-2",
    "optimizer.schedule": '"cosine"',
    "objective.identity": "0.5",
    "objective.temporal": "0.5",
    "objective.t_range": "[0.0, 1.0]",
    "adapter.rank_dropout": "0.0",
}
_ON = {"router.time_gate": '"bands"', "router.bands": "[[0.0, 1.0]]"}
_FLOOR = _ON | {"router.floor": "0.5"}
_CONTRAST = {"router.time_gate": '"contrast"'}
_ROUTER = {"train.train_router": "true", "router.mode": '"learned"', "optimizer.router_lr": "3e-3"}
_DROPPED = {"data.caption_dropout": "0.5"}
_FROZEN = {"train.freeze_base": "true"}


def _alone(stage: str, **keys: str) -> tuple[Stage, ...]:
    return (Stage(stage, 1.0, _SAME | keys),)


def _joint(*keys: Mapping[str, str]) -> tuple[Stage, ...]:
    every = {key: value for part in (_SAME, *keys) for key, value in part.items()}
    return (Stage("b", 1.0, every),)


def _in_turn(*keys: Mapping[str, str]) -> tuple[Stage, ...]:
    every = {key: value for part in (_SAME, *keys) for key, value in part.items()}
    return (Stage("a", 0.5, _SAME), Stage("b", 0.5, every))


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("frozen base", ()),
        Recipe("base adapter", _alone("a")),
        Recipe(BASE_LINE, _alone("a", **_WIDE)),
        Recipe("base + experts (rule)", _joint(_FLOOR)),
        Recipe("base + experts + router (joint)", _joint(_FLOOR, _ROUTER)),
        Recipe(f"{BASE_LINE}, rate 1e-2", _alone("a", **_WIDE, **{"optimizer.lr": "1e-2"})),
        Recipe(f"{BASE_LINE}, rate 4e-2", _alone("a", **_WIDE, **{"optimizer.lr": "4e-2"})),
        Recipe("A, then B: base frozen, one expert a clip", _in_turn(_ON, _FROZEN)),
        Recipe(
            "A, then B, experts off at little noise (bands)",
            _in_turn(_FROZEN, {"router.time_gate": '"bands"'}),
        ),
        Recipe(
            "A, then B, experts from the base's down",
            _in_turn(_ON, _FROZEN, {"adapter.expert_init": '"base"'}),
        ),
        Recipe("A, then base and experts, contrast", _in_turn(_CONTRAST)),
        Recipe("joint, one expert a clip", _joint(_ON)),
        Recipe("joint, all experts alike (control)", _joint(_CONTRAST, {"router.contrast": "[[0.0, 0.0]]"})),
        Recipe("joint, floor 0.25", _joint(_ON, {"router.floor": "0.25"})),
        Recipe("joint, floor 0.75", _joint(_ON, {"router.floor": "0.75"})),
        Recipe("joint, contrast", _joint(_CONTRAST)),
        Recipe("joint with router, contrast", _joint(_CONTRAST, _ROUTER)),
        Recipe("joint, wide contrast", _joint(_CONTRAST, {"router.contrast": "[[0.3, 0.0], [0.9, 0.5]]"})),
        Recipe("joint, wider contrast", _joint(_CONTRAST, {"router.contrast": "[[0.3, 0.0], [0.9, 0.8]]"})),
        Recipe(
            "joint, contrast at every level",
            _joint(_CONTRAST, {"router.contrast": "[[0.0, 0.5], [1.0, 0.5]]"}),
        ),
        Recipe("joint, soft to sharp", _joint(_ON, {"objective.soft_start": "0.8"})),
        # A clip is one of four instruments: its expert sees a quarter of what the base sees.
        Recipe("joint, one expert a clip, rate by its share", _joint(_ON, {"optimizer.base_lr": "5e-3"})),
        Recipe("joint, orthogonal experts", _joint(_ON, {"objective.orthogonality": "0.1"})),
        Recipe(
            "joint, learned time gate, floor 0.5",
            _joint({"router.time_gate": '"learned"', "router.floor": "0.5"}),
        ),
        Recipe("joint, contrast, rank dropout", _joint(_CONTRAST, {"adapter.rank_dropout": "0.05"})),
        Recipe(
            "joint, floor 0.5, experts at half the rate, rank dropout",
            _joint(
                _FLOOR,
                {"optimizer.lr": "1e-2", "optimizer.base_lr": "2e-2", "adapter.rank_dropout": "0.05"},
            ),
        ),
        Recipe("joint, contrast, captions dropped by half", _joint(_CONTRAST, _DROPPED)),
        Recipe(f"{BASE_LINE}, captions dropped by half", _alone("a", **_WIDE, **_DROPPED)),
        Recipe(f"{BASE_LINE}, few clips", _alone("a", **_WIDE), "few"),
        Recipe("base + experts (rule), few clips", _joint(_FLOOR), "few"),
        Recipe("joint, contrast, few clips", _joint(_CONTRAST), "few"),
        Recipe("joint, one expert a clip, few clips", _joint(_ON), "few"),
        Recipe(f"{BASE_LINE}, few clips, captions dropped by half", _alone("a", **_WIDE, **_DROPPED), "few"),
        Recipe("base + experts (rule), few clips, captions dropped by half", _joint(_FLOOR, _DROPPED), "few"),
    )
}
MAIN = tuple(RECIPES)[:5]
