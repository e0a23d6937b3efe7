"""The blind page in a real browser, and the tally of what raters answer."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wanmoe.infer.blind import KEY, PAGE, Pair, read_key, tally, write_page
from wanmoe.moe_lora.errors import WanmoeError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def pairs(count: int) -> list[Pair]:
    """Clips of one colour: red ones are of the first set, blue ones of the second."""
    found = []
    for number in range(count):
        red, blue = (torch.zeros(5, 32, 48, 3, dtype=torch.uint8) for _ in range(2))
        red[..., 0], blue[..., 2] = 200, 200
        found.append(Pair(f"clip-{number}", (red, blue), 8.0))
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
            ],
        )
        yield opened
        opened.close()


COLOUR = """side => { const video = document.querySelector('#' + side + ' video');
  const canvas = document.createElement('canvas'); canvas.width = canvas.height = 1;
  const pen = canvas.getContext('2d'); pen.drawImage(video, 0, 0, 1, 1);
  return Array.from(pen.getImageData(0, 0, 1, 1).data); }"""
READY = "side => document.querySelector('#' + side + ' video').readyState >= 2"


def test_a_rater_at_the_page_and_the_tally_of_what_was_seen(browser: Any, tmp_path: Path) -> None:
    """The rater looks at the colours: seven times red, twice blue, once neither; two of the answers are first
    given otherwise and taken back, once after the page was loaded anew."""
    page_path = tmp_path / "study.html"
    key = read_key(write_page(page_path, pairs(10), ("red", "blue"), "Which is <warmer>?", seed=3))
    text = page_path.read_text()
    assert "clip-0" not in text and "red" not in text.split("<script")[1], "the page does not tell"
    assert "http://" not in text and "https://" not in text
    context = browser.new_context(accept_downloads=True)
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(page_path.as_uri())
    assert page.text_content("h1") == "Which is <warmer>?"

    def begin() -> None:
        page.fill("#rater", "Dr. A")
        page.press("#rater", "Enter")

    def red_side() -> str:
        for side in ("left", "right"):
            page.wait_for_function(READY, arg=side)
        left, right = (page.evaluate(COLOUR, side) for side in ("left", "right"))
        assert (left[0] > left[2]) != (right[0] > right[2]), "one of each set"
        return "Left" if left[0] > left[2] else "Right"

    begin()
    wanted = ["red"] * 7 + ["blue"] * 2 + ["same"]
    for number, want in enumerate(wanted):
        assert page.text_content("#place") == f"{number + 1} of 10"
        if number == 4:
            page.keyboard.press("ArrowDown")
            page.keyboard.press("Backspace")
        if number == 6:
            page.reload()
            begin()
            assert page.text_content("#place") == "7 of 10", "a reload loses nothing"
        red = red_side()
        side = red if want == "red" else {"Left": "Right", "Right": "Left"}[red]
        if number == 2:  # by mouse
            page.click(f"#{side.lower()}")
        else:
            page.keyboard.press("ArrowDown" if want == "same" else f"Arrow{side}")
    with page.expect_download() as download:
        page.click("#export")
    answers = tmp_path / "answers.json"
    download.value.save_as(answers)
    assert download.value.suggested_filename == f"answers-{key['study']}-Dr_A.json"
    assert json.loads(page.input_value("#text")) == json.loads(answers.read_text())
    context.close()
    assert not faults
    found = tally([answers], key)
    assert found.sets == ("red", "blue") and found.wins == (7, 2) and found.same == 1
    assert (found.raters, found.pairs, found.answers) == (1, 10, 10)
    assert found.rate == pytest.approx(0.75) and found.low < 0.75 < found.high
    assert found.alpha is None, "one rater agrees with nobody"


def test_the_source_of_the_page_does_not_tell_the_sets(tmp_path: Path) -> None:
    """Of 40 pairs, how often the clip of the first set comes first: about half of the time."""
    path = tmp_path / "study.html"
    key = read_key(write_page(path, pairs(40), ("red", "blue"), "Which?", seed=1))
    data, films = (
        json.loads(found)
        for found in re.findall(r'<script id="\w+" type="application/json">(.*?)</script>', path.read_text())
    )
    places = {code: place for place, code in enumerate(films)}
    red = {pair: {name: code for code, name in one["clips"].items()} for pair, one in key["pairs"].items()}
    stored = [places[one["red"]] < places[one["blue"]] for one in red.values()]
    listed = [red[one["pair"]]["red"] == one["clips"][0] for one in data["pairs"]]
    assert 10 <= sum(stored) <= 30 and 10 <= sum(listed) <= 30
    ids = [int(key["pairs"][one["pair"]]["id"].split("-")[1]) for one in data["pairs"]]
    assert ids != sorted(ids)


def test_sides_and_order_are_drawn_for_each_rater(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "study.html"
    write_page(path, pairs(12), ("red", "blue"), "Which?", seed=0)
    orders = []
    for rater in ("a", "b"):
        context = browser.new_context()
        page = context.new_page()
        page.goto(path.as_uri())
        page.fill("#rater", rater)
        page.press("#rater", "Enter")
        orders.append(page.evaluate("() => state.order.map((one) => one.pair + one.sides[0])"))
        context.close()
    assert sorted(one[:4] for one in orders[0]) == sorted(one[:4] for one in orders[1])
    assert orders[0] != orders[1]


def answers_of(path: Path, rater: str, said: dict[str, str], ended: str = "2026-01-01") -> Path:
    """A file of answers: by pair "a", "b" (the set) or "same"; the first set is always on the left."""
    rows = [
        {
            "pair": pair,
            "left": f"{pair}a",
            "right": f"{pair}b",
            "choice": {"a": "left", "b": "right"}.get(one, one),
        }
        for pair, one in said.items()
    ]
    path.write_text(
        json.dumps({"format": PAGE, "study": "s", "rater": rater, "ended": ended, "answers": rows})
    )
    return path


def key_of(count: int) -> dict[str, Any]:
    names = [f"p{number}" for number in range(count)]
    sets = {name: {"id": name, "clips": {f"{name}a": "A", f"{name}b": "B"}} for name in names}
    return {"format": KEY, "study": "s", "sets": ["A", "B"], "pairs": sets}


def test_rates_agreement_and_bias_of_known_answers(tmp_path: Path) -> None:
    # A table of Krippendorff's (2011, "Computing Krippendorff's alpha-reliability", nominal data, two
    # observers): alpha 0.095.
    one = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    two = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    files = [
        answers_of(tmp_path / f"{rater}.json", rater, {f"p{n}": "ab"[said] for n, said in enumerate(column)})
        for rater, column in (("one", one), ("two", two))
    ]
    found = tally(files, key_of(10))
    assert found.alpha == pytest.approx(0.095, abs=5e-4)
    assert found.wins == (14, 6) and found.rate == pytest.approx(0.7) and found.left == pytest.approx(0.7)
    assert found.each == {"one": pytest.approx(0.8), "two": pytest.approx(0.6)}
    again = answers_of(tmp_path / "later.json", "two", {f"p{n}": "b" for n in range(10)}, "2026-01-02")
    both = tally([*files, again], key_of(10))
    assert both.wins == (8, 12) and both.unread == [str(files[1])], "of a rater the later file counts"


def test_the_interval_covers_the_true_rate() -> None:
    from wanmoe.infer.blind import _interval

    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        low, high = _interval((rng.random((3, 40)) > 0.6).astype(float), 0)
        inside += low <= 0.6 <= high
    assert 0.88 <= inside / 200 <= 0.99


ANSWER = {"pair": "p0", "left": "p0a", "right": "p0b", "choice": "left"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"study": "other"}, "answers of study other"),
        ({"format": "x"}, "not the answers of a blind page"),
        ({"answers": [{"pair": "p9", "choice": "left"}]}, "no pair 'p9'"),
        ({"answers": [{"pair": "p0", "left": "zz", "choice": "left"}]}, "no clips 'zz' and"),
        (
            {"answers": [{"pair": "p0", "left": "p0a", "right": "p0a", "choice": "left"}]},
            "no clips 'p0a' and",
        ),
        (
            {"answers": [{"pair": "p0", "left": "p0a", "right": "p0b", "choice": "left"}] * 2},
            "answered twice",
        ),
        ({"answers": []}, "no answer"),
    ],
)
def test_answers_that_cannot_be_are_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = answers_of(tmp_path / "a.json", "a", {"p0": "a"})
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(WanmoeError, match=words):
        tally([path], key_of(2))
