"""Gates over the time of a clip: the text of a schedule to gates per latent frame, and a picture of them.

Letters: E experts, F latent frames, N frames of the video.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..moe_lora.errors import WanmoeError
from ..moe_lora.files import write_atomic
from ..moe_lora.instruments import ExpertSet
from ..moe_lora.routing import RouterConfig, ema_over_frames
from ..moe_lora.wan.codec import TIME_STRIDE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EMA: float = RouterConfig().ema
"""How much of a latent frame's gates comes from those before it, where neither request nor adapter says it: a
change takes about three of them."""

_WAY_OUT = "write it as '0:Hook, 40:Suction' or '0:Hook, 40:Hook=0.6+Suction=0.4'"
_INK = "#333333"
_SIDES = {"high": "#dfe5ee", "low": "#f6f2e8"}


class Moment(NamedTuple):
    """From `frame` of the video on, until the next moment, these experts speak."""

    frame: int
    weights: dict[str, float]
    """By name as the user wrote it; any positive sum."""


class GateRecord(NamedTuple):
    """Gates of one denoising step, as the model saw them."""

    step: int
    """Counted from 1."""
    side: str
    """high or low."""
    t: float
    gates: Tensor
    """[F, E], or [1, E] for the whole clip; after band(t) and alpha_expert."""


def parse_schedule(text: str) -> list[Moment]:
    """Reads "0:Hook, 40:Suction" or "0:Hook, 40:Hook=0.6+Suction=0.4": frames of the video and experts.

    A name without a weight weighs 1. Raises WanmoeError, naming the text, for one that cannot be read, does
    not start at frame 0 or does not rise.
    """
    moments = [_moment(entry.strip(), text) for entry in text.split(",")]
    if moments[0].frame != 0:
        raise WanmoeError(f"schedule {text!r} starts at frame {moments[0].frame}; it must start at 0")
    for before, after in pairwise(moments):
        if after.frame <= before.frame:
            raise WanmoeError(
                f"schedule {text!r}: frame {after.frame} comes after {before.frame}; frames must rise"
            )
    return moments


def _moment(entry: str, text: str) -> Moment:
    match = re.fullmatch(r"(\d+)\s*:\s*(.+)", entry)
    if match is None:
        raise WanmoeError(f"schedule {text!r}: {entry!r} is no FRAME:EXPERT; {_WAY_OUT}")
    weights: dict[str, float] = {}
    for part in match[2].split("+"):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        try:
            weight = float(number) if equals else 1.0
        except ValueError as error:
            raise WanmoeError(f"schedule {text!r}: {number!r} is no weight; {_WAY_OUT}") from error
        if not name or name in weights:
            raise WanmoeError(f"schedule {text!r}: {entry!r} names an expert twice or not at all; {_WAY_OUT}")
        if not 0 <= weight < math.inf:
            raise WanmoeError(
                f"schedule {text!r}: weight {number} of {name!r} must be finite and not negative"
            )
        weights[name] = weight
    if not sum(weights.values()) > 0:
        raise WanmoeError(f"schedule {text!r}: the weights of {entry!r} sum to zero; give one above zero")
    return Moment(int(match[1]), weights)


def timeline(
    schedule: Sequence[Moment], experts: ExpertSet, num_frames: int, ema: float = EMA, top_k: int = 2
) -> Tensor:
    """Gates [F, E] of a schedule, each row summing to 1, before band and alpha.

    A latent frame takes the mean over the frames of the video that it holds, then a bias-corrected moving
    average runs along the latent frames. Of each, the top_k experts stay, or as many as one moment names.

    Args:
        schedule: as of `parse_schedule`.
        experts: where the names are looked up, in either taxonomy.
        num_frames: N, 4n + 1.
        ema: weight of the past, in [0, 1); 0 changes at once.

    Raises WanmoeError for a moment after the end of the clip, an unknown name or an ema out of range.
    """
    if not 0 <= ema < 1:
        raise WanmoeError(f"ema {ema} of the schedule must be at least 0 and below 1")
    last = schedule[-1].frame
    if last >= num_frames:
        raise WanmoeError(
            f"schedule: frame {last} lies after the end of the clip, whose last frame is {num_frames - 1}"
        )
    rows = torch.stack([_gates(moment, experts) for moment in schedule])
    ends = [moment.frame for moment in schedule[1:]] + [num_frames]
    lengths = [end - moment.frame for moment, end in zip(schedule, ends, strict=True)]
    frames = rows.repeat_interleave(torch.tensor(lengths), dim=0)  # [N, E]
    latent_frames = torch.cat((frames[:1], frames[1:].view(-1, TIME_STRIDE, len(experts)).mean(1)))
    most = int((rows > 0).sum(1).max())
    return ema_over_frames(latent_frames[None], ema, max(top_k, most))[0]


def _gates(moment: Moment, experts: ExpertSet) -> Tensor:
    gates = torch.zeros(len(experts))
    try:
        shares = experts.shares(moment.weights.items())
    except WanmoeError as error:
        raise WanmoeError(f"schedule, frame {moment.frame}: {error}") from error
    for member, share in shares.items():
        gates[experts.index(member)] = share
    return gates / gates.sum()


def draw_gates(
    path: Path, records: Sequence[GateRecord], experts: Sequence[str], num_frames: int, title: str = ""
) -> None:
    """Draws a PNG of a request's gates over its denoising steps and, where they are loudest, over its frames.

    Args:
        records: one per step, in order; at least one.
        experts: names in the order of the gate columns.
        num_frames: N, 4n + 1.

    Raises WanmoeError when the file cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ..moe_lora.fonts import chinese_fonts

    look: dict[str, Any] = {
        "font.family": ["DejaVu Sans", *chinese_fonts()],
        "font.size": 9.0,
        "text.parse_math": False,  # a dollar in a prompt is a dollar
    }
    palette = matplotlib.colormaps["tab10" if len(experts) <= 10 else "turbo"]
    positions = (
        range(len(experts)) if len(experts) <= 10 else torch.linspace(0.05, 0.95, len(experts)).tolist()
    )
    colours = [palette(position) for position in positions]
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(8, 6), layout="constrained")
        FigureCanvasAgg(figure)
        if title:
            figure.suptitle(title, fontsize=10, wrap=True)
        over_steps, over_frames = figure.subplots(2)
        _draw_steps(over_steps, records, colours)
        _draw_frames(
            over_frames, max(records, key=lambda r: float(r.gates.sum(1).mean())), num_frames, colours
        )
        for name, colour in zip(experts, colours, strict=True):
            over_steps.fill_between([], [], color=colour, linewidth=0, label=name)
        figure.legend(loc="outside lower center", ncols=min(4, len(experts) + 1), frameon=False)
        write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=130))


def _draw_steps(axes: Axes, records: Sequence[GateRecord], colours: Sequence[Any]) -> None:
    """Mean gates of the clip, stacked, one column per step, over the shade of the side that ran."""
    gates = torch.stack([record.gates.float().mean(0) for record in records])  # [steps, E]
    edges = [records[0].step - 0.5, *(record.step + 0.5 for record in records)]
    top = 1.12 * max(1.0, float(gates.sum(1).max()))
    for side, group in groupby(records, key=lambda record: record.side):
        run = list(group)
        start, end = run[0].step - 0.5, run[-1].step + 0.5
        axes.axvspan(start, end, color=_SIDES[side], linewidth=0, zorder=0)
        axes.text((start + end) / 2, top, f"{side} noise", ha="center", va="top", color=_INK)
        if end < edges[-1]:
            axes.axvline(end, color=_INK, linewidth=0.8)
    _stack(axes, edges, gates, colours)
    steps = [record.step for record in records]
    axes.plot(steps, [record.t for record in records], color=_INK, linewidth=1.2, linestyle="--", label="t")
    _frame(axes, edges, top, "denoising step", "gate, mean over the clip")


def _draw_frames(axes: Axes, record: GateRecord, num_frames: int, colours: Sequence[Any]) -> None:
    """Gates of one step along the video, stacked, one column per latent frame."""
    latent_frames = (num_frames - 1) // TIME_STRIDE + 1
    gates = record.gates.float().expand(latent_frames, -1)
    edges = [-0.5, *(TIME_STRIDE * frame + 0.5 for frame in range(latent_frames))]
    _stack(axes, edges, gates, colours)
    top = 1.05 * max(1.0, float(gates.sum(1).max()))
    label = f"frame of the video (a column is a latent frame), at step {record.step}, t = {record.t:.2f}"
    _frame(axes, edges, top, label, "gate")


def _stack(axes: Axes, edges: Sequence[float], gates: Tensor, colours: Sequence[Any]) -> None:
    """gates [columns, E] as stacked areas between `edges`, one more than columns."""
    heights = torch.cat((torch.zeros(len(gates), 1), gates.cpu()), dim=1).cumsum(1).T.numpy()
    for bottom, top, colour in zip(heights[:-1], heights[1:], colours, strict=True):
        axes.stairs(top, edges, baseline=bottom, fill=True, color=colour, linewidth=0)


def _frame(axes: Axes, edges: Sequence[float], top: float, xlabel: str, ylabel: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, top)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
