"""A contact sheet: a few samples of a folder of shards, decoded, with what is known about them drawn in.

Letters: F, H, W frames, height, width of the decoded clip in pixels; f, h, w the same of the latent.
"""

import difflib
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor
from tqdm import tqdm

from ...moe_lora.errors import WanmoeError
from ...moe_lora.files import write_atomic
from ...moe_lora.fonts import chinese_fonts
from ...moe_lora.video import to_frames
from ...moe_lora.wan.codec import TIME_STRIDE, Codec, HaarCodec
from .clips import INTERPOLATED
from .shards import Sample, ShardDataset
from .sheet_frame import BORDER, FAINT, REGION, Pictures, draw_frame, marks

_FRAMES = 5
# Inches.
_FRAME, _TALLEST, _PANEL, _LEAST = 2.3, 2.1, 4.8, 1.66
_MARGIN, _GAP, _LABEL, _LEGEND, _HEAD, _FOOT = 0.15, 0.07, 0.17, 0.17, 0.52, 0.3
_LINE, _COLUMNS, _CAPTION_LINES = (
    0.155,
    66,
    4,
)  # of the text beside a sample; a Chinese character takes two columns
_NAMES = 10  # of experts in a line of the legend
_DPI = 130
_INK = "#222222"
_COLOURS = ("#ffd60a", "#7cf06c", "#ff8fe0", "#ff9f1c", "#b9a3ff", "#4cc9f0", "#f4f1bb", "#ff6b6b")


class _Look(NamedTuple):
    """What is the same for all samples of a sheet."""

    colours: Mapping[str, str]
    """By the name of an expert."""
    chinese: bool
    """Whether there is a font for it."""


def show(
    root: str | Path,
    out: str | Path,
    codec: Codec | None = None,
    *,
    split: str = "train",
    samples: int = 8,
    keys: Sequence[str] = (),
    any_codec: bool = False,
) -> list[str]:
    """Draw samples of a folder of shards to a PNG, a row each; returns what a reader of it should know.

    A row has up to five decoded frames with region, tips, boxes, border and motion drawn in, and beside them
    key, caption, instruments, size and origin. `samples` of the split are taken evenly spread, or those of
    `keys`, of whatever split. `codec` None is the stand-in where the shards were made with it. Raises
    `WanmoeError` where the codec is missing or another than that of the shards (unless `any_codec`), a key is
    unknown, a sample is damaged, or the file cannot be written.
    """
    if not Path(out).absolute().parent.is_dir():
        raise WanmoeError(f"{out}: the folder {Path(out).parent} does not exist; make it first")
    data = ShardDataset(root, split)
    notes, codec = _check_codec(data, codec, any_codec)
    chosen = _by_keys(data, keys) if keys else _spread(data, samples)
    fonts = chinese_fonts()
    experts = [str(name) for name in data.manifest.get("experts", ())]
    if len(experts) > len(_COLOURS):  # one colour for two experts is met last where only those shown have one
        shown = {name for sample in chosen for name, _ in sample.instruments}
        experts = [name for name in experts if name in shown]
    look = _Look({name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(experts)}, bool(fonts))
    if not fonts and any(_wide(_words(sample)) for sample in chosen):
        notes.append(
            "no font with Chinese is installed (Noto Sans CJK SC, WenQuanYi): captions in it are not drawn"
        )
    rows = []
    for sample in tqdm(chosen, desc="decode", unit="sample", disable=None, delay=1):
        with torch.inference_mode():
            rows.append((sample, _pick(to_frames(codec.decode(sample.latent.float()[None])[0]))))
    rc: dict[str, Any] = {"font.family": ["DejaVu Sans", *fonts], "text.parse_math": False}
    with matplotlib.rc_context(rc):
        figure = _draw(str(root), data.manifest, rows, look, notes)
        write_atomic(out, lambda partial: figure.savefig(partial, format="png", dpi=_DPI))
    return notes


def _check_codec(data: ShardDataset, codec: Codec | None, any_codec: bool) -> tuple[list[str], Codec]:
    made = data.manifest["codec"]
    if codec is None:
        if made["name"] != HaarCodec.name:
            raise WanmoeError(
                f"{data.root}: encoded with {made['name']}; name its weights by --vae to decode it"
            )
        codec = HaarCodec()
    notes = [f"{codec.name} is a stand-in: pictures are blurred"] if codec.stand_in else []
    if codec.fingerprint != made["fingerprint"]:
        other = f"{made['name']} {made['fingerprint'][:12]}, not {codec.name} {codec.fingerprint[:12]}"
        if not any_codec:
            raise WanmoeError(
                f"{data.root}: encoded with {other}; give that VAE, or --any-codec to try this one"
            )
        notes.append(f"decoded with another codec: encoded with {other}")
    return notes, codec


def _spread(data: ShardDataset, samples: int) -> list[Sample]:
    if samples < 1:
        raise WanmoeError(f"samples is {samples}; a sheet has 1 or more")
    places = np.linspace(0, len(data) - 1, min(samples, len(data)))
    return [data[round(place)] for place in places.tolist()]


def _by_keys(data: ShardDataset, keys: Sequence[str]) -> list[Sample]:
    places: dict[str, tuple[ShardDataset, int]] = {}
    for split in data.manifest["n_samples"]:
        own = data if split == data.split else ShardDataset(data.root, split)
        places |= {key: (own, number) for number, key in enumerate(own.keys)}
    for key in keys:
        if key not in places:
            near = difflib.get_close_matches(key, places, n=1, cutoff=0.0)[0]
            raise WanmoeError(f"{data.root}: no sample {key!r}; nearest is {near!r}")
    return [own[number] for own, number in (places[key] for key in keys)]


def _pick(frames: Tensor) -> dict[int, Pictures]:
    """Up to five frames of [F, H, W, 3] by number: those that latent frames stand for, where there are
    enough."""
    groups = (len(frames) - 1) // TIME_STRIDE + 1
    if groups >= _FRAMES - 1:
        places = np.linspace(0, groups - 1, min(_FRAMES, groups)).round().astype(int) * TIME_STRIDE
    else:
        places = np.linspace(0, len(frames) - 1, min(_FRAMES, len(frames))).round().astype(int)
    return {place: frames[place].numpy() for place in places.tolist()}


def _draw(
    root: str,
    manifest: Mapping[str, Any],
    rows: Sequence[tuple[Sample, dict[int, Pictures]]],
    look: _Look,
    notes: Sequence[str],
) -> Figure:
    sizes = []
    for _, pictures in rows:
        high, wide = next(iter(pictures.values())).shape[:2]
        width = min(_FRAME, _TALLEST * wide / high)
        sizes.append((width, width * high / wide))
    column = max(width for width, _ in sizes)
    count = max(len(pictures) for _, pictures in rows)
    text_at = _MARGIN + count * (column + _GAP) + _GAP
    wide = max(text_at + _PANEL, 9.0)
    heights = [max(_LEAST, height + _LABEL) + 2 * _GAP for _, height in sizes]
    names = [name for name in look.colours if any(name in dict(sample.instruments) for sample, _ in rows)]
    head = _HEAD + _LEGEND * -(-len(names) // _NAMES)
    high = head + sum(heights) + _FOOT
    figure = Figure(figsize=(wide, high), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    counts = ", ".join(f"{count} {split}" for split, count in manifest["n_samples"].items())
    title = f"{_legible(root, look)}: {len(rows)} of {counts} samples, decoded by {manifest['codec']['name']}"
    _head(figure, title, {name: look.colours[name] for name in names}, look, notes)
    top = high - head
    for (sample, pictures), (width, height), row_height in zip(rows, sizes, heights, strict=True):
        figure.add_artist(
            Line2D([_MARGIN / wide, 1 - _MARGIN / wide], [top / high] * 2, color="#dddddd", lw=0.8)
        )
        for place, (number, picture) in enumerate(pictures.items()):
            left, bottom = _MARGIN + place * (column + _GAP), top - _GAP - _LABEL - height
            axes = figure.add_axes((left / wide, bottom / high, width / wide, height / high))
            draw_frame(axes, sample, number, picture, look.colours)
        panel = figure.add_axes((text_at / wide, (top - row_height) / high, _PANEL / wide, row_height / high))
        _text(panel, sample, row_height, look)
        top -= row_height
    return figure


def _head(figure: Figure, title: str, experts: Mapping[str, str], look: _Look, notes: Sequence[str]) -> None:
    """Title and legend on top, notes at the foot; `experts` are those of the samples, with their colours."""
    wide, high = figure.get_size_inches()
    x = _MARGIN / wide
    figure.text(x, 1 - 0.09 / high, title, fontsize=10, weight="bold", color=_INK, va="top")
    marked: list[Any] = [
        Patch(facecolor=REGION + "40", edgecolor=REGION, label="region"),
        Line2D([], [], color=_INK, marker="x", ls="", mew=1.6, label="tip"),
        Line2D([], [], color=_INK, marker="+", ls="", mew=1.2, label="tip, interpolated"),
        Patch(facecolor="none", edgecolor=_INK, label="box"),
        Patch(facecolor="none", edgecolor=_INK, ls="--", label="box, interpolated"),
        Patch(facecolor="#00000090", edgecolor=BORDER, ls=":", label="border"),
        Line2D(
            [], [], color=_INK, marker=">", markevery=[1], lw=1, label="motion since the latent frame before"
        ),
    ]
    named = [Patch(facecolor=colour, label=_legible(name, look)) for name, colour in experts.items()]
    lines = [marked, *(named[at : at + _NAMES] for at in range(0, len(named), _NAMES))]
    for number, handles in enumerate(lines):
        figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(x, 1 - (0.3 + number * _LEGEND) / high),
            borderaxespad=0,
            borderpad=0,
            ncols=len(handles),
            fontsize=7.5,
            frameon=False,
            handlelength=1.4,
            columnspacing=1.3,
        )
    figure.text(x, 0.09 / high, "; ".join(notes), fontsize=7.5, color=FAINT, va="bottom")


def _text(axes: Axes, sample: Sample, height: float, look: _Look) -> None:
    """Key, instruments, caption, origin and marks of a sample, from the top of its row on."""
    axes.axis("off")
    line = _LINE / height
    y = 1 - _GAP / height
    axes.text(0, y, sample.key, fontsize=8, weight="bold", family="monospace", color=_INK, va="top")
    y -= line * 1.15
    names = [f"{_legible(name, look)} {weight:.2f}" for name, weight in sample.instruments]
    if sample.instruments:
        expert = max(sample.instruments, key=lambda one: one[1])[0]
        colour = look.colours.get(expert, "#ffffff")
        axes.plot(0.01, y - line * 0.45, "s", ms=6, color=colour, mec=_INK, mew=0.4, transform=axes.transAxes)
        named = f"{', '.join(names)}; expert {_legible(expert, look)}"
    else:
        named = "no instrument known: no expert"
    for part in _wrap(named, _COLUMNS - 4, 2):
        axes.text(0.03, y, part, fontsize=8.5, color=_INK, va="top")
        y -= line
    for part in _wrap(_caption(sample, look), _COLUMNS, _CAPTION_LINES):
        axes.text(0, y, part, fontsize=8.5, color=_INK, va="top")
        y -= line
    for part in (*_origin(sample), _counts(sample)):
        axes.text(0, y, _wrap(_legible(part, look), _COLUMNS, 1)[0], fontsize=8, color=FAINT, va="top")
        y -= line
    axes.set(xlim=(0, 1), ylim=(0, 1))


def _origin(sample: Sample) -> list[str]:
    meta = sample.meta
    place = f"{meta.get('split')} {meta.get('bucket')}"
    if "source_frames" in meta:
        first, last = meta["source_frames"]
        place += f", frames {first}-{last}"
        if meta.get("source_fps"):
            place += f", {first / meta['source_fps']:.2f}-{last / meta['source_fps']:.2f} s"
    source = f"of {meta.get('source', 'an unknown source')}"
    return [place, source + (f", phase {meta['phase']}" if meta.get("phase") else "")]


def _counts(sample: Sample) -> str:
    parts = []
    for name in ("tips", "boxes"):
        kinds = [mark.kind == INTERPOLATED for mark in marks(sample, name)]
        if kinds:
            parts.append(f"{len(kinds)} {name}" + (f" ({sum(kinds)} interpolated)" if any(kinds) else ""))
    absent = [name for name in ("roi", "flow") if getattr(sample, name) is None]
    return ", ".join([*parts, *(f"no {name}" for name in absent)])


def _words(sample: Sample) -> str:
    return "".join(chain([sample.caption], (name for name, _ in sample.instruments)))


def _caption(sample: Sample, look: _Look) -> str:
    if look.chinese or not _wide(sample.caption):
        return sample.caption or "(no caption)"
    english = sample.meta.get("caption_en")
    if isinstance(english, str) and english and not _wide(english):
        return english
    return f"(a caption in Chinese, {len(sample.caption)} characters)"


def _legible(text: str, look: _Look) -> str:
    return text if look.chinese else "".join("□" if _wide(letter) else letter for letter in text)


def _wide(text: str) -> bool:
    return any(unicodedata.east_asian_width(letter) in "WF" for letter in text)


def _wrap(text: str, columns: int, lines: int) -> list[str]:
    """`text` in lines of at most so many columns; what does not fit into the lines ends in dots."""
    words = [
        piece
        for word in text.split()
        for piece in ([*word, " "] if _wide(word) or len(word) > columns else [word + " "])
    ]
    out, used = [""], 0
    for word in words:
        size = sum(2 if _wide(letter) else 1 for letter in word.rstrip())
        if used + size > columns:
            out.append("")
            used = 0
        out[-1] += word
        used += size + len(word) - len(word.rstrip())
    if len(out) > lines:
        out = [*out[: lines - 1], out[lines - 1][: columns - 2].rstrip() + " …"]
    return [line.rstrip() for line in out]
