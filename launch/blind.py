"""`wanmoe evaluate --blind` and `--tally`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import typer

from ..infer.blind import Pair, read_key, tally, write_page
from ..moe_lora.errors import WanmoeError
from ..moe_lora.files import write_atomic
from .evaluation import paired, read_clips, scenes

_LARGE = 200 << 20
_AGREE = 0.2  # Krippendorff's alpha below which one rater does not stand for another
TALLY = "wanmoe-tally/1"


def make_page(
    page: Path, real: Path | None, generated: Sequence[Path], pairs: int, question: str, seed: int
) -> None:
    """Writes the page for generated clips against real ones, or for two sets of generated ones."""
    folders = [*generated, *([real] if real is not None else [])]
    if len(folders) != 2:
        raise WanmoeError("--blind compares two sets: --generated and --real, or --generated twice")
    if page.suffix != ".html":
        raise WanmoeError(f"--blind {page}: the page is an .html file")
    found = [pair for pair in paired(read_clips(folders[0]), read_clips(folders[1])) if pair[1] is not None]
    chosen = np.random.default_rng(seed).permutation(len(found))[:pairs]
    shown = []
    for one, other in scenes([found[place] for place in sorted(chosen)]):
        assert other is not None
        length = min(len(one.frames), len(other.frames))
        shown.append(Pair(one.id, (one.frames[:length], other.frames[:length]), one.fps))
    names = _names(folders)
    key = write_page(page, shown, names, question)
    size = page.stat().st_size
    typer.echo(f"wrote {page}: {len(shown)} pairs, {names[0]} against {names[1]}, {size / 1e6:.1f} MB")
    if size > _LARGE:
        typer.echo("a browser may be slow with so large a page: take fewer --pairs")
    typer.echo(f"which clip is which is in {key}: keep it from the raters, --tally needs it")


def _names(folders: Sequence[Path]) -> tuple[str, str]:
    """Two names that tell the sets apart: as much of the paths as it takes."""
    lists = [path.parent if path.name == "clips.jsonl" else path for path in folders]
    parts = [path.resolve().with_suffix("").parts for path in lists]
    for length in range(1, max(map(len, parts)) + 1):
        first, second = ("/".join(part[-length:]) for part in parts)
        if first != second:
            return first, second
    raise WanmoeError(f"--blind compares two sets, but both are {folders[0]}")


def say_tally(answers: Sequence[Path], key: Path | None, seed: int, out: Path | None = None) -> None:
    """Prints what raters answered, and writes it to `out`/tally.json."""
    if key is None:
        raise WanmoeError("--tally needs the --key that was written beside the page (<page>.key.json)")
    files: list[Path] = []
    for path in answers:
        inside = sorted(path.glob("*.json")) if path.is_dir() else [path]
        files += [file for file in inside if not file.name.endswith(".key.json")]
    if not files:
        raise WanmoeError(f"{answers[0]}: no answer files (*.json) in it")
    found = tally(files, read_key(key), seed)
    for name in found.unread:
        typer.echo(f"left out: {name} has no answer, or its rater answered again in a later file")
    first, second = found.sets
    typer.echo(f"{found.answers} answers by {found.raters} raters on {found.pairs} pairs")
    typer.echo(f"{first}: {found.wins[0]}, {second}: {found.wins[1]}, no difference: {found.same}")
    typer.echo(
        f"win rate of {first}: {found.rate:.3f} ({found.low:.3f} to {found.high:.3f}, 95 % over pairs; "
        "no difference counts half)"
    )
    for rater, rate in found.each.items():
        typer.echo(f"  {rater}: {rate:.3f}")
    agreement = "not to be had" if found.alpha is None else f"{found.alpha:.3f}"
    typer.echo(f"agreement of raters (Krippendorff's alpha; 1 all alike, 0 chance): {agreement}")
    typer.echo(f"left was chosen in {found.left:.0%} of the answers for a side")
    verdict = (
        "0.5 is inside the interval: no difference is shown"
        if found.low <= 0.5 <= found.high
        else (f"raters prefer {first if found.low > 0.5 else second}")
    )
    if found.alpha is not None and found.alpha < _AGREE:
        verdict += "; they hardly agree with one another, so that others may say something else"
    typer.echo(verdict)
    if out is not None:
        values = {"format": TALLY, **found._asdict(), "verdict": verdict}
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(values, indent=1, ensure_ascii=False)
        write_atomic(out / "tally.json", lambda partial: partial.write_text(text, encoding="utf-8"))
        typer.echo(f"wrote {out / 'tally.json'}")
