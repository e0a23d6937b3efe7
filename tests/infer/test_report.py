"""The report: what it says of good and of bad numbers, and that one file holds all of it."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from wanmoe.infer.charts import Curve, smooth
from wanmoe.infer.report import DemoResults, findings, write_report
from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.video import write_video

EXPERTS = ["Scissors", "Hook/Electrocautery", "吸引器"]


def _results(folder: Path | None = None) -> DemoResults:
    """Made-up numbers: everything falls, the first two experts know their clips, the third does not."""
    run = DemoResults(
        title="Report <of> a test",
        facts={"torch": "2.x", "seed": "42"},
        stand_ins=["codec haar: not a VAE"],
        curves={
            "a": Curve([1, 2, 3, 4], [1.0, 0.8, 0.7, 0.6], [0, 4], [1.0, 0.5]),
            "b": Curve([1, 2, 3], [0.5, 0.45, 0.4], [], []),
        },
        validation={"frozen base": 1.0, "A": 0.5, "B": 0.4},
        validation_by_t={"frozen base": {0.1: 1.5, 0.9: 0.5}, "A": {0.1: 1.2, 0.9: 0.55}},
        experts=EXPERTS,
        wrong_expert={EXPERTS[0]: [0.4, 0.5, 0.6], EXPERTS[1]: [0.6, 0.4, 0.5], EXPERTS[2]: [0.3, 0.9, 0.5]},
        gates={EXPERTS[0]: [0.9, 0.1, 0.0], EXPERTS[1]: [0.6, 0.4, 0.0]},
        rule_gates={EXPERTS[0]: [1.0, 0.0, 0.0], EXPERTS[2]: [0.0, 0.0, 0.0]},
        notes=["a note"],
    )
    if folder is not None:
        for label, name in zip(EXPERTS, ("scissors", "hook 1", "吸引"), strict=True):
            path = folder / "samples" / f"{name}.mp4"
            path.parent.mkdir(exist_ok=True)
            frames = torch.randint(0, 256, (5, 32, 48, 3), dtype=torch.uint8)
            write_video(path, frames)
            run.videos[label] = str(path)
            run.real_videos[label] = str(path)
    return run


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.links: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attrs:
            if name == "src":
                self.sources.append(value or "")
            if name in ("href", "xlink:href"):
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(_results(tmp_path), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "samples"]
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    assert page.tags["svg"] == 2
    assert page.tags["img"] == 2 * 3 * 3
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    assert not re.search(r"@import|url\((?!#)", text)
    outside = [link for link in page.links if not link.startswith("#")]
    assert set(outside) == {"samples/scissors.mp4", "samples/hook%201.mp4", "samples/%E5%90%B8%E5%BC%95.mp4"}
    # The shapes of one chart must not be drawn in the other.
    marks = re.findall(r'\bid="([^"]+)"', text)
    clips = [mark for mark in marks if re.match(r"[mp][0-9a-f]{8}", mark)]
    assert clips and len(set(clips)) == len(clips)
    for part in ("Report <of> a test", "codec haar: not a VAE", "a note", "吸引器", "frozen base", "0.4000"):
        assert part in page.text
    assert "−50.00 %" in page.text  # A against the frozen base


def test_sentences_come_from_the_numbers(tmp_path: Path) -> None:
    said = {finding.text: finding.verdict for finding in findings(_results())}
    assert said == {
        "Stage a: validation loss ends at 0.5000: 50.00 % lower than at its start (1.000).": "good",
        "Stage b: training loss ends at 0.4000: 20.00 % lower than at its start (0.5000).": "good",
        "Held-out loss of A (0.5000): 50.00 % lower than frozen base (1.000).": "good",
        "Held-out loss of B (0.4000): 20.00 % lower than A (0.5000).": "good",
        "The right expert has the lowest loss for 2 of 3 labels; "
        "it is lower than the mean of the wrong ones for 3 of 3.": "bad",
        "The learned router gives the largest gate to the right expert for 1 of 2 labels.": "bad",
    }


def test_bad_results_are_said_plainly(tmp_path: Path) -> None:
    run = _results()
    run.curves = {"b": Curve([1, 2], [0.4, 0.9], [0, 2], [0.4, 0.5])}
    run.validation = {"frozen base": 0.5, "A": 0.6, "B": 0.6, "C": math.nan}
    run.wrong_expert = {EXPERTS[0]: [0.5, 0.4, 0.4]}
    run.gates = {}
    said = findings(run)
    assert [finding.verdict for finding in said] == ["bad", "bad", "open", "bad", "bad"]
    assert "25.00 % higher than at its start" in said[0].text
    assert "20.00 % higher than frozen base" in said[1].text
    assert "the same as A" in said[2].text
    assert "not finite" in said[3].text
    assert "for 0 of 1 labels" in said[4].text
    path = tmp_path / "report.html"
    write_report(run, path)
    page = _Page(path.read_text(encoding="utf-8"))
    assert page.text.count("✗") == 4
    assert "The right expert is the best of its row for 0 of 1 labels." in page.text


def test_nothing_measured_is_nothing_said(tmp_path: Path) -> None:
    run = DemoResults(title="empty")
    assert findings(run) == []
    path = tmp_path / "report.html"
    write_report(run, path)
    page = _Page(path.read_text(encoding="utf-8"))
    assert "h2" not in page.tags


def test_curves_with_losses_that_are_not_finite_are_drawn(tmp_path: Path) -> None:
    run = DemoResults(
        title="t", curves={"a": Curve([1, 2, 3], [1.0, math.nan, 0.5], [0, 3], [math.inf, 0.6])}
    )
    write_report(run, tmp_path / "report.html")
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert findings(run)[0].verdict == "bad"


def test_the_page_is_the_same_each_time(tmp_path: Path) -> None:
    run = _results(tmp_path)
    write_report(run, tmp_path / "1.html")
    write_report(run, tmp_path / "2.html")
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()


def test_smoothing_is_bias_corrected_and_skips_gaps() -> None:
    assert smooth([2.0, 2.0, 2.0], 5) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([1.0, 3.0], 2) == pytest.approx([1.0, (0.5 * 1 + 3) / 1.5])
    assert smooth([1.0, math.nan, 1.0], 4) == pytest.approx([1.0, 1.0, 1.0])
    assert smooth([3.0, 1.0], 1) == [3.0, 1.0]


def test_results_go_through_json(tmp_path: Path) -> None:
    run = _results(tmp_path)
    assert DemoResults.from_json(run.to_json()) == run
    assert DemoResults.from_json('{"title": "t"}') == DemoResults(title="t")


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "{}", '{"title": "t", "curvs": {}}', '{"title": "t", "curves": {"a": {"stps": []}}}'),
        '{"title": "t", "validation_by_t": {"A": {"x": 1}}}',
    ],
)
def test_broken_json_is_an_error(text: str) -> None:
    with pytest.raises(WanmoeError, match="report results"):
        DemoResults.from_json(text)


def test_what_does_not_fit_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    for message, change in [
        ("3 experts", {"gates": {"Scissors": [1.0]}}),
        ("3 experts", {"wrong_expert": {"Scissors": [1.0] * 4}}),
        ("different lengths", {"curves": {"a": Curve([1, 2], [1.0])}}),
        (r"absent\.mp4", {"videos": {"Scissors": str(tmp_path / "absent.mp4")}}),
    ]:
        run = _results()
        for name, value in change.items():
            setattr(run, name, value)
        with pytest.raises(WanmoeError, match=message):
            write_report(run, path)
    with pytest.raises(WanmoeError, match="could not be written"):
        write_report(_results(), tmp_path / "nowhere" / "report.html")
    assert list(tmp_path.iterdir()) == []
