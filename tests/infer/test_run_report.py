"""The report of runs, evaluations and ablations: what is on the page, which needs nothing from elsewhere."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from wanmoe.infer.charts import Curve, Dot, dot_chart
from wanmoe.infer.run_report import AblationPart, EvaluationPart, RunPart, compared, gone, write_run_report
from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.video import write_video


def estimate(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "clips": 12}


def evaluation(folder: Path, clips: int = 12) -> dict[str, Any]:
    """Values as evaluation.json has them, of clips that lie in `folder`: clip n finds its tip n px off."""
    names = [f"clip-{number:02d}" for number in range(clips)]
    sources, marks = {}, {}
    for number, name in enumerate(names):
        for side in ("made", "real"):
            frames = torch.full((9, 64, 80, 3), 20 * number, dtype=torch.uint8)
            write_video(folder / f"{name}-{side}.mp4", frames, 16)
        sources[name] = {side: str(folder / f"{name}-{side}.mp4") for side in ("made", "real")}
        marks[name] = {"found": [(0, 30.0 + number, 20.0)], "true": [(0, 30.0, 20.0)]}
    row = {"made": estimate(0.5), "real": estimate(0.9), "excess": estimate(-0.4)}
    distance = dict.fromkeys(("value", "low", "high", "halves", "halves_sd", "floor", "floor_sd"), 0.25)
    return {
        "clips": {"pairs": clips, "made": clips, "real": clips},
        "rows": {"tip_pck@5px": row, "warped_psnr": {**row, "real": None, "excess": None}},
        "sets": [
            {
                "name": "KID on EfficientNet-Lite0",
                "headline": True,
                "inside_floor": True,
                "distance": distance | {"made": clips, "real": clips},
            }
        ],
        "classes": ["Scissors", "<Hook>"],
        "confusion": {"made": [[6, 0], [2, 4]]},
        "router": {"router_agreement": estimate(1.0)},
        "load": {"Scissors": 0.5, "<Hook>": 0.5},
        "routed": {"Scissors": {"Scissors": 0.9, "<Hook>": 0.1}},
        "notes": ["a note"],
        "each": {name: {"warped_psnr": float(number), "identity": 1.0} for number, name in enumerate(names)},
        "marks": marks,
        "sources": sources,
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    curve = Curve([1, 2, 3], [1.0, 0.9, 0.8], [0, 3], [1.0, 0.85])
    dots = [Dot("no floor", 0.02, 0.01, 0.03, "floor"), Dot("top-2", 0.001, math.nan, math.nan)]
    parts = [
        RunPart("runs/b", {"stage": "b"}, {"high": curve, "low": curve}),
        EvaluationPart("runs/b/evaluation", evaluation(folder)),
        AblationPart(
            "axes", "one", ["row", "held-out loss"], [["one", "0.8"]], {"held-out loss": ("lower", dots)}
        ),
    ]
    write_run_report(folder / "report.html", "A <title>", parts)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_all_parts_are_on_the_page_and_names_are_escaped(page: str) -> None:
    assert "A &lt;title&gt;" in page and "&lt;Hook&gt;" in page and "<Hook>" not in page
    for words in ("runs/b", "tip PCK@5px ↑", "0.500 (0.400 to 0.600)", "inside the floor", "a note", "axes"):
        assert words in page
    assert page.count("<svg") == 3, "two curves and one plot"
    assert "floor: no floor" in page and "lower is better" in page


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    assert not re.findall(r"(?:src|href)=\"(?!data:image/png;base64,|#)", page)


def test_the_worst_ten_by_each_figure_are_shown_and_the_best_is_not(page: str) -> None:
    worst = page.split("The worst by each figure")[1].split("Ablation:")[0]
    assert re.findall(r"<summary>(.*?)</summary>", worst) == ["warped PSNR"], "identity is perfect for all"
    shown = re.findall(r"(clip-\d\d)</figcaption>", worst)
    assert shown == [f"clip-{number:02d}" for number in range(10)]


def test_a_sheet_has_eight_clips_with_their_frames(page: str) -> None:
    sheet = page.split("<h3>Clips</h3>")[1].split("The worst by each figure")[0]
    assert sheet.count("<figure") == 8 and sheet.count("<img") == 8 * 2 * 3, "frames 0, 4 and 8 of nine"


def test_tips_are_drawn_where_they_are(tmp_path: Path) -> None:
    from wanmoe.infer.run_report import _film

    values = evaluation(tmp_path, clips=6)
    made, real = (_film(values, "clip-05", side) for side in ("made", "real"))
    assert made is not None and real is not None
    changed = (made[0].int() - made[4].int()).abs().amax(-1) > 30
    rows, cols = changed.nonzero(as_tuple=True)
    assert 24 <= int(cols.min()) < 35 < int(cols.max()) <= 42 and abs(float(rows.float().mean()) - 20) < 2
    ring = (real[0].int() - real[4].int()).abs().amax(-1) > 30
    rows, cols = ring.nonzero(as_tuple=True)
    assert abs(float(cols.float().mean()) - 30) < 1 and not ring[20, 30]
    assert torch.equal(real[4], real[8])


def test_a_dot_is_filled_where_its_interval_leaves_zero_out() -> None:
    chart = dot_chart([Dot("sure", 1.0, 0.5, 1.5), Dot("open", 0.1, -0.5, 0.7)], "loss", "lower")
    assert "sure" in chart and "open" in chart and chart.startswith("<svg")


def test_two_evaluations_are_compared_clip_by_clip(tmp_path: Path) -> None:
    one, other = evaluation(tmp_path, clips=6), evaluation(tmp_path, clips=6)
    for number, row in enumerate(other["each"].values()):
        row["warped_psnr"] += 2.0 if number % 2 else 4.0
    del other["each"]["clip-00"]
    found = {metric.title: difference for metric, difference in compared(one, other)}
    assert found["warped PSNR"].value == pytest.approx((2 + 4 + 2 + 4 + 2) / 5)
    assert found["warped PSNR"].clips == 5
    assert found["identity"].value == found["identity"].low == found["identity"].high == 0
    parts = [EvaluationPart("ours", one), EvaluationPart("theirs", other)]
    write_run_report(tmp_path / "two.html", "two", parts)
    page = (tmp_path / "two.html").read_text(encoding="utf-8")
    assert "theirs less ours" in page and "2.800 (" in page.split("theirs less ours")[1]


def test_missing_clips_and_nothing_at_all_are_named(tmp_path: Path) -> None:
    values = evaluation(tmp_path)
    (tmp_path / "clip-00-made.mp4").unlink()
    write_run_report(tmp_path / "r.html", "t", [EvaluationPart("e", values)])
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "1 files of clips that were measured are gone" in page and "clip-00-made.mp4" in page
    assert "clip-01" in page.split("<h3>Clips</h3>")[1] and gone(values) == [
        str(tmp_path / "clip-00-made.mp4")
    ]
    with pytest.raises(WanmoeError, match="there is nothing to report"):
        write_run_report(tmp_path / "none.html", "t", [])
    assert not (tmp_path / "none.html").exists()
    json.dumps(values)
