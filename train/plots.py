"""Pictures of a run for the tracker: which gates the clips of each instrument get, and where t was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..moe_lora.files import write_atomic
from ..moe_lora.fonts import chinese_fonts


def draw_gate_matrix(
    path: Path, gates: Tensor, labels: Sequence[str], experts: Sequence[str], title: str
) -> None:
    """Draws a PNG of mean gates [labels, experts]: a row per instrument of the clips, a column per expert.

    A row of NaN, an instrument without a clip, stays empty. Raises WanmoeError when it cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    look = {"font.family": ["DejaVu Sans", *chinese_fonts()], "font.size": 9.0, "text.parse_math": False}
    with matplotlib.rc_context(look):
        side = 1.6 + 0.75 * len(experts)
        figure = Figure(figsize=(side + 1.2, 1.6 + 0.55 * len(labels)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        picture = axes.imshow(
            gates.numpy(), cmap="Blues", vmin=0, vmax=max(1.0, float(gates.nan_to_num().max()))
        )
        for row in range(len(labels)):
            for column in range(len(experts)):
                value = float(gates[row, column])
                if value == value:
                    ink = "white" if value > 0.6 else "black"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink)
        axes.set_xticks(range(len(experts)), experts, rotation=30, ha="right")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlabel("expert")
        axes.set_ylabel("instrument of the clip")
        axes.set_title(title, fontsize=9, wrap=True)
        figure.colorbar(picture, label="mean gate")
        write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120))
