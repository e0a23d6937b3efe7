"""All figures in one pass: what is measured of what, what is left out, and that a real clip orders them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from wanmoe.infer.evaluation.evaluate import Evaluation, Judges, as_json, evaluate
from wanmoe.infer.evaluation.features import load_backbone
from wanmoe.infer.evaluation.metrics import METRICS, direction
from wanmoe.infer.evaluation.scene import Scene
from wanmoe.infer.evaluation.table import flat, markdown, terminal
from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.video import read_video

CLASSES = ("red", "green", "blue")


def classify(frames: Tensor) -> Tensor:
    """The colour that a clip has most of."""
    return frames.float().mean((0, 1, 2))


def moments(frames: Tensor) -> Tensor:
    return frames[::4].float().mean((1, 2))


def targets(label: Sequence[tuple[str, float]]) -> Tensor:
    weights = dict(label)
    return torch.tensor([weights.get(name, 0.0) for name in CLASSES])


JUDGES = Judges(classify, moments, targets, CLASSES)


def coloured(name: str, colour: int, label: str = "", **marks: object) -> Scene:
    frames = torch.full((9, 32, 48, 3), 40, dtype=torch.uint8)
    frames[..., colour] = 200
    return Scene(name, frames, 8.0, ((label, 1.0),) if label else (), **marks)  # type: ignore[arg-type]


def tip(x: float) -> tuple[Tensor, ...]:
    return (torch.tensor([[x, 10.0]], dtype=torch.float64),) * 9


def test_identity_confusion_and_the_ceiling() -> None:
    real = [coloured(f"c{n}", n % 3, CLASSES[n % 3]) for n in range(6)]
    made = [coloured(f"c{n}", [0, 1, 0, 0, 2, 2][n]) for n in range(6)]
    found = evaluate(zip(made, real, strict=True), JUDGES)
    row = found.rows["identity"]
    assert row.made.value == pytest.approx(4 / 6) and row.real is not None and row.real.value == 1
    assert row.excess is not None and row.excess.value == pytest.approx(-2 / 6)
    assert found.confusion["made"] == [[2, 0, 0], [0, 1, 1], [1, 0, 1]]
    assert found.confusion["real"] == [[2, 0, 0], [0, 2, 0], [0, 0, 2]]
    assert found.each["c2"]["identity"] == 0


def test_permuted_labels_give_chance() -> None:
    rng = np.random.default_rng(0)
    clips = [coloured(f"c{n}", n % 3, CLASSES[rng.integers(3)]) for n in range(300)]
    found = evaluate([(clip, None) for clip in clips], Judges(classify, None, targets, CLASSES))
    row = found.rows["identity"].made
    assert row.low < 1 / 3 < row.high and abs(row.value - 1 / 3) < 0.1


def test_flips_are_counted_by_the_second_and_an_average_has_fewer() -> None:
    frames = torch.zeros(33, 16, 16, 3, dtype=torch.uint8)
    for place in range(9):
        # One moment in three is a little more of another colour.
        frames[4 * place : 4 * place + 4, ..., 1 if place % 3 == 2 else 0] = 1 if place % 3 == 2 else 4
    scene = Scene("clip", frames, 16.0, (("red", 1.0),))
    found = evaluate([(scene, None)], JUDGES).rows
    assert found["flips"].made.value == pytest.approx(5 / (33 / 16))
    assert found["flips_ema"].made.value == 0


def test_tips_of_a_detector_and_its_own_error_beside_them() -> None:
    """The detector is 6 px off to the right, whatever it looks at."""

    def find(frames: Tensor) -> tuple[Tensor | None, ...]:
        at = float(frames[0, 0, 0, 0])
        return tuple(torch.tensor([[at + 6, 10.0]]) if n % 4 == 0 else None for n in range(len(frames)))

    def scene(name: str, x: int, marked: bool) -> Scene:
        marks = {"tips": tip(float(x))} if marked else {}
        frames = torch.full((9, 32, 48, 3), x, dtype=torch.uint8)
        return Scene(name, frames, 8.0, **marks)  # type: ignore[arg-type]

    pairs = [(scene(f"c{n}", 20 + 5 * (n % 2), False), scene(f"c{n}", 20, True)) for n in range(4)]
    found = evaluate(pairs, Judges(find_tips=find))
    assert found.rows["tip_pck@5px"].made.value == 0
    assert found.rows["tip_pck@10px"].made.value == 0.5 and found.rows["tip_pck@20px"].made.value == 1
    real = found.rows["tip_pck@10px"].real
    assert real is not None and real.value == 1
    assert any("found by a detector" in note for note in found.notes)
    given = evaluate([(scene("a", 22, True), scene("a", 20, True))], Judges(find_tips=find))
    assert given.rows["tip_pck@5px"].made.value == 1, "given tips go before the detector"
    assert given.rows["tip_pck@5px"].real is None


def test_what_cannot_be_said_is_left_out_and_why() -> None:
    found = evaluate([(coloured("a", 0, "violet"), None)], JUDGES)
    assert set(found.rows) == {"flips", "flips_ema", "warped_psnr", "warped_ssim"}
    assert found.clips == 0 and found.made == 1
    text = " ".join(found.notes)
    for words in ("no real clip", "no tip is measured", "no label that the classifier", "give --features"):
        assert words in text
    with pytest.raises(WanmoeError, match="two generated clips have this id"):
        evaluate([(coloured("a", 0), None)] * 2, JUDGES)
    with pytest.raises(WanmoeError, match="no generated clip"):
        evaluate([], JUDGES)


def test_clips_of_two_lengths_are_compared_over_the_shorter() -> None:
    long, short = coloured("a", 0, tips=tip(10)), coloured("a", 0, tips=tip(10)).cut(5)
    found = evaluate([(short, long)], Judges())
    assert found.rows["fds"].made.value == 0 and found.rows["tip_pck@5px"].made.value == 1


def as_table(found: Evaluation) -> dict[str, float]:
    return {key: row.made.value for key, row in found.rows.items()}


def recoded(frames: Tensor, path: Path) -> Tensor:
    """The frames after a compression that can be seen."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.options = {"crf": "27"}
        for picture in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return read_video(path)


def test_a_real_clip_against_itself_a_recoded_and_a_shuffled_copy(data_dir: Path, tmp_path: Path) -> None:
    """Real endoscopy in windows, with a made-up region: in every figure the copy is best and a compressed one
    is worse; shuffled frames are worse in every figure that looks at order."""
    video = read_video(data_dir / "surgical" / "endo.mp4", fps=16, size=(96, 160))
    windows = [video[13 * n : 13 * (n + 1)] for n in range(8)]
    rng = np.random.default_rng(0)
    box = torch.tensor([[50.0, 30, 60, 40]])
    mask = torch.zeros(1, 96, 160, dtype=torch.bool)
    mask[0, 30:70, 50:110] = True

    def scenes(frames: Sequence[Tensor]) -> list[Scene]:
        marks = {"boxes": (box,) * 13, "masks": (mask,) * 13}
        return [Scene(f"w{n}", one, 16.0, **marks) for n, one in enumerate(frames)]  # type: ignore[arg-type]

    # A compression of each window by itself, and an order in which no frame stays in its place.
    coded = [recoded(one, tmp_path / f"{n}.mp4") for n, one in enumerate(windows)]
    shuffled = [one[[int(k) for k in np.roll(rng.permutation(13), 1)]] for one in windows]
    judges = Judges(backbone=load_backbone("efficientnet-lite0"))
    real = scenes(windows)
    same, code, shuffle = (
        evaluate(zip(scenes(copy), real, strict=True), judges) for copy in (windows, coded, shuffled)
    )
    perfect = {"fds": 0, "fds_early": 0, "fds_mid": 0, "fds_late": 0, "tcd": 0}
    perfect |= dict.fromkeys(("frame_ssim", "gatc", "box_iou", "mask_iou"), 1)
    assert {key: as_table(same)[key] for key in perfect} == pytest.approx(perfect, abs=1e-3)
    for key in ("fds", "fds_early", "fds_mid", "fds_late", "frame_ssim", "gatc"):
        sign = 1 if direction(key) == "lower" else -1
        a, b, c = (sign * as_table(one)[key] for one in (same, code, shuffle))
        # The endoscope stands nearly still: inside the mask GATC finds a frame like it a frame away.
        assert a < c < b if key == "gatc" else a < b < c, key
    for key in ("warped_psnr", "warped_ssim"):
        excess = [one.rows[key].excess for one in (same, shuffle)]
        assert excess[0] is not None and excess[0].value == 0
        assert excess[1] is not None and excess[1].high < 0, key
    for place in (0, 1):  # kernel and Fréchet distance: single frames, so blind to the order
        a, b, c = (one.sets[place].distance.value for one in (same, code, shuffle))
        assert a < b and c < b, same.sets[place].name
    assert same.sets[1].distance.value == pytest.approx(0, abs=1e-6)
    assert any("blind to their order" in note for note in shuffle.notes)
    assert [row.headline for row in same.sets] == [True, False], "under 2048 clips the kernel distance"


def test_tables_have_every_figure_and_nothing_that_is_no_number() -> None:
    pairs = [
        (coloured(f"c{n}", n % 3, tips=tip(12)), coloured(f"c{n}", n % 3, CLASSES[n % 3], tips=tip(10)))
        for n in range(4)
    ]
    found = evaluate(pairs, JUDGES)
    values = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert values["rows"]["identity"]["made"]["value"] == 1 and values["clips"]["pairs"] == 4
    page, lines = markdown(found, "Title"), "\n".join(terminal(found))
    for key in found.rows:
        assert METRICS[key].title in page and METRICS[key].title in lines
    assert "nan" not in page and "nan" not in lines and "| red | 2 | 0 | 0 |" in page
    assert all(math.isfinite(value) for value in flat(found).values())
    assert flat(found)["evaluate/real/identity"] == 1


def test_every_figure_says_what_it_means() -> None:
    assert all(metric.title and metric.meaning and metric.group for metric in METRICS.values())
