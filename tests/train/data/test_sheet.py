"""The contact sheet: what is drawn lies where it belongs, and what cannot be drawn is said."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.instruments import ExpertSet, known_experts
from wanmoe.moe_lora.wan.codec import HaarCodec
from wanmoe.moe_lora.wan.text import load_text_encoder
from wanmoe.train.data import sheet
from wanmoe.train.data.clip_list import clips_from_folder, read_clip_list
from wanmoe.train.data.prepare import prepare
from wanmoe.train.data.shard_writer import ShardWriter
from wanmoe.train.data.shards import Sample, ShardError
from wanmoe.train.data.sheet import show
from wanmoe.train.data.sheet_frame import draw_frame, marks
from wanmoe.train.synth import synth_clips

HAAR = {"name": "haar", "fingerprint": HaarCodec().fingerprint, "stand_in": True}
SCALE = 8  # drawn pixels to a pixel of the clip


def write(root: Path, caption: str = "a clip", codec: dict[str, Any] = HAAR, **facts: Any) -> Path:
    """Twelve samples, of which two are held out; the clips are 5 frames of 32 x 48."""
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(root, codec, HAAR, settings={"experts": ["Scissors", "Other"]}) as writer:
        for number in range(12):
            video = torch.rand(1, 3, 5, 32, 48, generator=generator) - 0.5
            meta = {
                "caption": caption,
                "instruments": [{"name": "Scissors", "weight": 0.7}, {"name": "Other", "weight": 0.3}],
                "source": f"s{number}",
                "fps": 16.0,
                **facts,
            }
            split = "train" if number < 10 else "val"
            writer.add(f"k{number:02d}", split, HaarCodec().encode(video)[0], torch.ones(1, 8), meta)
    return root


def sample(**changes: Any) -> Sample:
    """A clip of 5 frames of 32 x 48, of which nothing is known but `changes`."""
    empty: dict[str, Any] = dict.fromkeys(Sample._fields)
    empty |= {"key": "k", "instruments": (("Scissors", 1.0),), "caption": "", "meta": {}}
    return Sample(**{**empty, **changes})


def drawn(of: Sample, number: int = 4) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Frame `number` on black, as float [32 * SCALE, 48 * SCALE, 3] in 0..1."""
    figure = Figure(figsize=(48 * SCALE / 100, 32 * SCALE / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    draw_frame(
        axes, of, number, np.full((32, 48, 3), 60, np.uint8), {"Scissors": "#ff0000", "Other": "#0000ff"}
    )
    axes.set_title("", loc="left")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255.0


def place(pixels: Any, colour: tuple[float, float, float]) -> tuple[float, ...]:
    """(left, top, right, bottom), in pixels of the clip, of what is drawn in a colour."""
    rows, cols = np.nonzero(np.abs(pixels - np.array(colour)).max(-1) < 0.35)
    assert len(rows), "nothing of this colour"
    edges = (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)
    return tuple(float(edge) / SCALE - 0.5 for edge in edges)  # pixel centres are whole numbers


RED, BLUE, CYAN = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.83, 1.0)
TIP = {"frame": 4, "x": 10.0, "y": 20.0, "instrument": "Other", "track": "", "kind": "given"}
BOX = {**TIP, "width": 17.0, "height": 9.0}


@pytest.mark.parametrize("tips", [[[4, 10.0, 20.0]], [{**TIP, "instrument": ""}]])
def test_a_tip_lies_where_the_facts_say(tips: Any) -> None:
    left, top, right, bottom = place(drawn(sample(meta={"tips": tips})), RED)
    assert (left + right) / 2 == pytest.approx(10, abs=0.15)
    assert (top + bottom) / 2 == pytest.approx(20, abs=0.15)


@pytest.mark.parametrize("boxes", [[[4, 10.0, 12.0, 17.0, 9.0, "Other"]], [{**BOX, "y": 12.0}]])
def test_a_box_encloses_its_pixels_in_the_colour_of_its_instrument(boxes: Any) -> None:
    assert place(drawn(sample(meta={"boxes": boxes})), BLUE) == pytest.approx(
        (9.5, 11.5, 26.5, 20.5), abs=0.2
    )


def test_an_interpolated_box_is_dashed_and_marks_of_other_frames_are_not_drawn() -> None:
    given = drawn(sample(meta={"boxes": [BOX]}))
    dashed = drawn(sample(meta={"boxes": [{**BOX, "kind": "interpolated"}]}))
    nothing = drawn(sample())
    assert np.array_equal(drawn(sample(meta={"boxes": [BOX], "tips": [TIP]}), number=3), nothing)
    count = [(np.abs(pixels - np.array(BLUE)).max(-1) < 0.35).sum() for pixels in (given, dashed)]
    assert 0.3 < count[1] / count[0] < 0.85


def test_region_and_border_cover_their_cells() -> None:
    roi = torch.zeros(2, 4, 6)
    roi[1, 1, 2:4] = 1
    picture = torch.ones(4, 6)
    picture[:, 5] = 0
    pixels = drawn(sample(roi=roi, picture=picture))
    assert place(pixels, CYAN) == pytest.approx((15.5, 7.5, 31.5, 15.5), abs=0.2)
    plain, tinted, dimmed = (
        pixels[row * SCALE, col * SCALE] * 255 for row, col in ((28, 20), (12, 24), (12, 45))
    )
    assert plain == pytest.approx([60] * 3, abs=1) and tinted[2] > 80 and dimmed.max() < 30
    # Frame 0 is latent frame 0, frames 1 to 4 are latent frame 1.
    assert np.array_equal(drawn(sample(roi=roi[:1].repeat(2, 1, 1)), 0), drawn(sample(roi=roi), 0))
    assert place(drawn(sample(roi=roi), 1), CYAN) == pytest.approx((15.5, 7.5, 31.5, 15.5), abs=0.2)


def test_an_arrow_leads_from_where_a_point_was_to_where_it_is() -> None:
    flow, visible = torch.zeros(1, 2, 4, 6), torch.ones(1, 4, 6)
    flow[0, 0, 2, 3] = -2  # what is at cell (3, 2) was two cells to the left: it moved to the right
    pixels = drawn(sample(flow=flow, visible=visible))
    white = pixels.min(-1) > 0.8
    rows, cols = np.nonzero(white)
    assert cols.min() / SCALE - 0.5 == pytest.approx(27.5 - 16, abs=0.6)
    assert cols.max() / SCALE - 0.5 == pytest.approx(27.5, abs=0.8)
    thick = white.sum(0)  # the head is where the arrow is thickest
    assert int(thick.argmax()) / SCALE > 24 and rows.mean() / SCALE == pytest.approx(20, abs=0.5)
    nothing = drawn(sample())
    assert np.array_equal(drawn(sample(flow=flow, visible=torch.zeros(1, 4, 6))), nothing)
    assert np.array_equal(drawn(sample(flow=flow, visible=visible), 3), nothing)


def test_marks_of_another_form_are_one_line() -> None:
    with pytest.raises(ShardError, match="sample k, part json: tips are neither rows nor objects"):
        marks(sample(meta={"tips": [7]}), "tips")


def test_samples_are_evenly_spread_and_keys_are_of_any_split(tmp_path: Path, monkeypatch: Any) -> None:
    root, chosen = write(tmp_path / "s"), []
    plain = sheet._text

    def spy(axes: Any, of: Sample, *rest: Any) -> None:
        chosen.append(of.key)
        plain(axes, of, *rest)

    monkeypatch.setattr(sheet, "_text", spy)
    show(root, tmp_path / "a.png", samples=4)
    show(root, tmp_path / "b.png", split="val", samples=1)
    show(root, tmp_path / "c.png", keys=["k11"])
    assert chosen == ["k00", "k03", "k06", "k09", "k10", "k11"]
    assert (tmp_path / "b.png").read_bytes() != (tmp_path / "c.png").read_bytes()
    show(root, tmp_path / "d.png", keys=["k11"])
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "d.png").read_bytes()


class Other(HaarCodec):
    fingerprint = "f" * 64
    stand_in = False
    name = "other"


def test_the_codec_is_that_of_the_shards(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    assert show(root, tmp_path / "a.png", samples=1) == ["haar is a stand-in: pictures are blurred"]
    with pytest.raises(
        WanmoeError, match="encoded with haar .*, not other ffffffffffff; give that VAE, or --any"
    ):
        show(root, tmp_path / "b.png", Other(), samples=1)
    (note,) = show(root, tmp_path / "b.png", Other(), samples=1, any_codec=True)
    assert "decoded with another codec" in note
    real = write(tmp_path / "real", codec={**HAAR, "name": "wan2.1-vae"})
    with pytest.raises(WanmoeError, match="encoded with wan2.1-vae; name its weights by --vae"):
        show(real, tmp_path / "b.png")


def test_what_is_wrong_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    root, out = write(tmp_path / "s"), tmp_path / "sheet.png"
    for arguments, cause in (
        ({"keys": ["k1"]}, "no sample 'k1'; nearest is 'k"),
        ({"samples": 0}, "samples is 0"),
        ({"split": "test"}, "no 'test' samples; splits: train, val"),
    ):
        with pytest.raises(WanmoeError, match=cause):
            show(root, out, **arguments)
    with pytest.raises(WanmoeError, match="does not exist"):
        show(root, tmp_path / "no" / "sheet.png")
    shard = root / "train-2x4x6-000000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardError, match="sample k00, part latent.safetensors: altered"):
        show(root, out)
    assert not out.exists()


@pytest.fixture
def chinese_font(tmp_path: Path) -> Iterator[str]:
    """A font that has every character of the caption below, each as a square."""
    letters = sorted(set("剪刀在剪断组织。"))
    names = [".notdef", *(f"u{ord(letter):x}" for letter in letters)]
    pen = TTGlyphPen(None)
    for at, point in enumerate([(100, 0), (100, 800), (900, 800), (900, 0)]):
        (pen.lineTo if at else pen.moveTo)(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names[1:], strict=True)})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "SimHei", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "font.ttf")
    before = list(font_manager.fontManager.ttflist)
    font_manager.fontManager.addfont(tmp_path / "font.ttf")
    yield "SimHei"
    font_manager.fontManager.ttflist = before


def texts(root: Path, out: Path, monkeypatch: Any) -> tuple[list[str], list[str]]:
    """(notes, every text of the sheet)."""
    seen: list[str] = []
    plain = Figure.savefig

    def spy(self: Figure, *given: Any, **named: Any) -> None:
        seen.extend(text.get_text() for axes in self.axes for text in axes.texts)
        seen.extend(text.get_text() for text in self.texts)
        plain(self, *given, **named)

    monkeypatch.setattr(Figure, "savefig", spy)
    return show(root, out, samples=1), seen


def test_a_chinese_caption_is_shown_where_there_is_a_font(
    tmp_path: Path, chinese_font: str, monkeypatch: Any
) -> None:
    root = write(tmp_path / "s", "剪刀在剪断组织。")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that no font has is a warning
        notes, seen = texts(root, tmp_path / "a.png", monkeypatch)
    assert "剪刀在剪断组织。" in seen and notes == ["haar is a stand-in: pictures are blurred"]


def test_without_a_chinese_font_the_sheet_and_the_caller_are_told(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sheet, "chinese_fonts", list)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notes, seen = texts(write(tmp_path / "s", "剪刀"), tmp_path / "a.png", monkeypatch)
        assert "(a caption in Chinese, 2 characters)" in seen
        assert "no font with Chinese is installed" in notes[-1] and "; ".join(notes) in seen
        root = write(tmp_path / "both", "剪刀", caption_en="scissors $5 and $6")
        _, seen = texts(root, tmp_path / "a.png", monkeypatch)
    assert "scissors $5 and $6" in seen


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one two three", ["one two", "three"]),
        ("abcdefghijkl xy", ["abcdefgh", "ijkl xy"]),
        ("剪刀在剪断组织", ["剪刀在剪", "断组织"]),
        ("用 hook 剪断组", ["用 hook", "剪断组"]),
        ("a b c d e f g h i j k l m n o p", ["a b c d", "e f g …"]),
        ("", [""]),
    ],
)
def test_text_is_wrapped_by_its_width(text: str, lines: list[str]) -> None:
    assert sheet._wrap(text, 8, 2) == lines


def test_synthetic_scenes_and_real_clips_become_sheets(tmp_path: Path, data_dir: Path) -> None:
    common: dict[str, Any] = {
        "codec": HaarCodec(),
        "text_encoder": load_text_encoder("hash"),
        "progress": False,
    }
    listing = synth_clips(tmp_path / "clips", clips=2, val=1, height=64, width=64, frames=17)
    prepare(read_clip_list(listing), tmp_path / "s", size=(64, 64), frames=17, experts=ExpertSet(), **common)
    show(tmp_path / "s", tmp_path / "s.png")
    clips = [clip for clip in clips_from_folder(data_dir / "gestures") if clip.id in ("milk", "book")]
    experts = ExpertSet(known_experts(sorted(clip.id for clip in clips)))
    prepare(
        clips, tmp_path / "g", size=(48, 64), frames=5, fps=8, val_fraction=0.0, experts=experts, **common
    )
    show(tmp_path / "g", tmp_path / "g.png", samples=2)
    for name, rows in (("s", 2), ("g", 2)):
        picture = cv2.imread(str(tmp_path / f"{name}.png"))
        assert picture is not None and picture.shape[0] > rows * 200 and picture.shape[1] > 1500
        assert (picture[2:-2, :10] == 255).all() and (picture[2:-2, -10:] == 255).all()  # nothing runs out
