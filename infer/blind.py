"""Comparing two sets of clips by eye: a page that shows pairs without saying which is which, and the tally of
what raters answered.

The page is one file without a link to anywhere. Which clip is of which set is in a file of its own, the key:
a rater who reads the page's source does not find it. Both clips of a pair are encoded anew by the same
encoder at one size and rate, so that no trace of the file tells them apart.
"""

from __future__ import annotations

import base64
import json
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import krippendorff
import numpy as np
from jinja2 import Environment, StrictUndefined
from torch import Tensor

from ..moe_lora.errors import WanmoeError
from ..moe_lora.files import write_atomic
from ..moe_lora.video import write_video

PAGE, KEY = "wanmoe-blind/1", "wanmoe-blind-key/1"
TEMPLATE = Path(__file__).with_name("blind.html.j2")
CHOICES = ("left", "right", "same")
_DRAWS = 2000


class Pair(NamedTuple):
    """Two clips that are compared, uint8 [F, H, W, 3] of one size, one of each set."""

    id: str
    clips: tuple[Tensor, Tensor]
    fps: float


def write_page(
    path: Path, pairs: Sequence[Pair], sets: tuple[str, str], question: str, seed: int | None = None
) -> Path:
    """Writes the page of a study and beside it the key, whose path is returned.

    Args:
        sets: what the two clips of a pair are of, in their order.
        seed: of the order; by default one that nobody knows.

    Raises WanmoeError where there is no pair, or a file cannot be written.
    """
    if not pairs:
        raise WanmoeError("a blind page needs at least one pair")
    rng = np.random.default_rng(secrets.randbits(64) if seed is None else seed)
    study = _code(rng, 6)
    shown: list[dict[str, Any]] = []
    key: dict[str, Any] = {}
    films: dict[str, str] = {}
    for number in rng.permutation(len(pairs)):
        pair = pairs[number]
        codes = [_code(rng, 5), _code(rng, 5)]
        films |= {code: _film(clip, pair.fps) for code, clip in zip(codes, pair.clips, strict=True)}
        name = f"p{len(shown) + 1:03d}"
        key[name] = {"id": pair.id, "clips": dict(zip(codes, sets, strict=True))}
        shown.append({"pair": name, "clips": [codes[place] for place in rng.permutation(2)]})
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    data = {"format": PAGE, "study": study, "question": question, "pairs": shown}
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        question=question,
        data=_script(data),
        films=_script(
            {code: films[code] for code in sorted(films)}
        ),  # as they came, one set was always first
        count=len(pairs),
    )
    write_atomic(path, lambda partial: partial.write_text(page, encoding="utf-8"))
    beside = path.with_suffix(".key.json")
    text = json.dumps({"format": KEY, "study": study, "sets": list(sets), "pairs": key}, indent=1)
    write_atomic(beside, lambda partial: partial.write_text(text, encoding="utf-8"))
    return beside


def _code(rng: np.random.Generator, size: int) -> str:
    return rng.bytes(size).hex()


def _film(clip: Tensor, fps: float) -> str:
    even = clip[:, : clip.shape[1] // 2 * 2, : clip.shape[2] // 2 * 2]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, even.contiguous(), fps, crf=16)
        return base64.b64encode(path.read_bytes()).decode()


def _script(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it ends the element."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


class Tally(NamedTuple):
    """What raters said of two sets."""

    sets: tuple[str, str]
    raters: int
    pairs: int
    answers: int
    wins: tuple[int, int]
    """Answers for each set."""
    same: int
    rate: float
    """Of the first set: its wins, and half of what was called the same, over all answers."""
    low: float
    high: float
    """95 % interval over draws of pairs, with all that was said of each."""
    alpha: float | None
    """Krippendorff's alpha of the raters (nominal): 1 agreement, 0 chance. None without two raters of one
    pair, or where all said the same of all."""
    left: float
    """Share of left among the answers for a side: far from a half is a rater who does not look."""
    each: dict[str, float]
    """By rater, the rate of the first set."""
    unread: list[str]
    """Files that do not count: without an answer, or of a rater who answered again later."""


def read_key(path: Path) -> dict[str, Any]:
    """The key of a page; WanmoeError where it is none."""
    return _read(path, KEY)


def tally(answers: Sequence[Path], key: Mapping[str, Any], seed: int = 0) -> Tally:
    """Brings the answers of raters together; of a rater who answered twice the later file counts.

    Raises WanmoeError for a file that is no answer of this study, or names a pair or clip that it does not
    have.
    """
    files: dict[str, tuple[str, Path, Mapping[str, Any]]] = {}
    unread: list[str] = []
    for path in answers:
        found = _read(path, PAGE)
        if found.get("study") != key["study"]:
            raise WanmoeError(f"{path}: answers of study {found.get('study')}, the key is of {key['study']}")
        rater, ended = str(found.get("rater", "")), str(found.get("ended", ""))
        if not found.get("answers"):
            unread.append(str(path))
            continue
        if rater in files:
            unread.append(str(path if ended <= files[rater][0] else files[rater][1]))
        if rater not in files or ended > files[rater][0]:
            files[rater] = (ended, path, found)
    first, second = key["sets"]
    codes = {first: 0.0, second: 1.0}
    raters, names = sorted(files), sorted(key["pairs"])
    said = np.full((len(raters), len(names)), np.nan)
    left = sides = 0
    for row, rater in enumerate(raters):
        _, path, given_by = files[rater]
        for answer in given_by.get("answers", []):
            pair, choice = key["pairs"].get(answer.get("pair")), answer.get("choice")
            if pair is None or choice not in CHOICES:
                raise WanmoeError(f"{path}: no pair {answer.get('pair')!r} or choice {choice!r} here")
            place = names.index(answer["pair"])
            if not np.isnan(said[row, place]):
                raise WanmoeError(f"{path}: pair {answer['pair']} is answered twice")
            clips = answer.get("left"), answer.get("right")
            if set(clips) != set(pair["clips"]):
                raise WanmoeError(f"{path}: pair {answer['pair']} has no clips {clips[0]!r} and {clips[1]!r}")
            owner = None if choice == "same" else pair["clips"][answer[choice]]
            said[row, place] = 0.5 if owner is None else codes[owner]
            left, sides = left + (choice == "left"), sides + (choice != "same")
    given = ~np.isnan(said)
    if not given.any():
        raise WanmoeError("there is no answer in the files")
    low, high = _interval(said, seed)
    return Tally(
        (first, second),
        len(raters),
        int(given.any(0).sum()),
        int(given.sum()),
        (int((said == 0).sum()), int((said == 1).sum())),
        int((said == 0.5).sum()),
        float(1 - np.nanmean(said)),
        low,
        high,
        _alpha(said),
        left / sides if sides else 0.5,
        {rater: float(1 - np.nanmean(said[row])) for row, rater in enumerate(raters) if given[row].any()},
        unread,
    )


def _interval(said: np.ndarray, seed: int) -> tuple[float, float]:
    """Of the first set's rate: what raters say of one pair is not independent, so whole pairs are drawn."""
    totals, counts = np.nansum(1 - said, axis=0), (~np.isnan(said)).sum(0)
    totals, counts = totals[counts > 0], counts[counts > 0]
    drawn = np.random.default_rng(seed).integers(len(counts), size=(_DRAWS, len(counts)))
    low, high = np.quantile(totals[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)


def _alpha(said: np.ndarray) -> float | None:
    shared = said[:, (~np.isnan(said)).sum(0) > 1]
    if len(np.unique(shared[~np.isnan(shared)])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=shared, level_of_measurement="nominal"))


def _read(path: Path, kind: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WanmoeError(f"{path}: not a JSON file that can be read: {error}") from error
    if not isinstance(found, dict) or found.get("format") != kind:
        what = "the key of a blind page" if kind == KEY else "the answers of a blind page"
        raise WanmoeError(f"{path}: not {what} (format {kind})")
    return found
