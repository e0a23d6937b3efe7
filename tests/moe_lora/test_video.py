"""Video files: what is written is what is read, real files decode, and broken ones are named."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.video import (
    Fit,
    VideoEndError,
    iter_windows,
    read_image,
    read_metadata,
    read_video,
    to_frames,
    to_model,
    video_info,
    write_video,
)
from wanmoe.moe_lora.wan.codec import HaarCodec

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (20, 200, 180))


def plain(frames: int = 9, height: int = 32, width: int = 48) -> Tensor:
    """Frame k is one grey of value 20 k: it tells which frame one holds."""
    return (
        (torch.arange(frames) * 20)
        .to(torch.uint8)
        .view(-1, 1, 1, 1)
        .expand(-1, height, width, 3)
        .contiguous()
    )


def numbers(video: Tensor) -> list[int]:
    return [round(float(frame.float().mean()) / 20) for frame in video]


def test_the_written_file_keeps_means_and_range(tmp_path: Path) -> None:
    ramp = torch.linspace(-1, 1, 64).expand(3, 5, 64, 64).contiguous()
    write_video(tmp_path / "ramp.mp4", to_frames(ramp))
    back = to_model(read_video(tmp_path / "ramp.mp4"))
    assert back.shape == ramp.shape
    assert abs(float(back.mean() - ramp.mean())) < 0.01
    assert float(back.min()) < -0.97 and float(back.max()) > 0.97
    assert float((back - ramp).abs().mean()) < 0.02
    half_black = float((back < -0.9).float().mean())
    assert half_black < 0.08, "a video in [-1, 1] that is written as if in [0, 1] is black by half"


def test_colours_survive_and_other_readers_agree(tmp_path: Path) -> None:
    frames = torch.tensor(COLOURS, dtype=torch.uint8).view(-1, 1, 1, 3).expand(-1, 32, 48, 3).contiguous()
    write_video(tmp_path / "c.mp4", frames, crf=8)
    ours = read_video(tmp_path / "c.mp4").float()
    assert float((ours - frames.float()).abs().max()) <= 4
    reader = cv2.VideoCapture(str(tmp_path / "c.mp4"))
    for colour in COLOURS:
        got, picture = reader.read()
        assert got and np.abs(picture[16, 24, ::-1].astype(int) - colour).max() <= 4


def test_to_frames_is_the_inverse_of_to_model() -> None:
    frames = torch.randint(0, 256, (5, 8, 10, 3), dtype=torch.uint8)
    video = to_model(frames)
    assert video.shape == (3, 5, 8, 10) and video.min() >= -1 and video.max() <= 1
    assert torch.equal(to_frames(video), frames)
    assert to_frames(torch.full((3, 1, 2, 2), 7.0)).unique().tolist() == [255]
    with pytest.raises(WanmoeError, match="NaN"):
        to_frames(torch.full((3, 1, 2, 2), float("nan")))
    with pytest.raises(WanmoeError, match="to_frames first"):
        to_model(video)


def test_metadata_and_the_same_bytes_every_time(tmp_path: Path) -> None:
    facts = {"prompt": "剪刀 cuts", "seed": "3"}
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, plain(), 16, facts)
    assert read_metadata(tmp_path / "a.mp4") == facts
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    write_video(tmp_path / "none.mp4", plain())
    assert read_metadata(tmp_path / "none.mp4") == {}


def test_time_is_resampled_by_the_nearest_frame(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    write_video(path, plain(12), 24, crf=4)
    info = video_info(path)
    assert (info.fps, info.frames, info.height, info.width) == (24, 12, 32, 48)
    assert numbers(read_video(path)) == list(range(12))
    assert numbers(read_video(path, fps=12)) == [0, 2, 4, 6, 8, 10]
    assert numbers(read_video(path, fps=16, num_frames=5)) == [0, 2, 3, 5, 6]
    assert numbers(read_video(path, fps=48, start_frame=3, num_frames=5)) == [3, 4, 4, 5, 5]
    with pytest.raises(VideoEndError, match=r"v\.mp4: the video ends after 12 frames"):
        read_video(path, start_frame=8, num_frames=5)


def test_windows_may_overlap_and_come_in_one_pass(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", plain(12), 24, crf=4)
    asked = [(0, 2, 4), (3, 4, 5), (3, 6, 11)]
    got = [tuple(numbers(window)) for window in iter_windows(tmp_path / "v.mp4", asked, None)]
    assert got == asked
    with pytest.raises(VideoEndError, match="frame 12"):
        list(iter_windows(tmp_path / "v.mp4", [(0, 1), (10, 12)], None))


def test_a_picture_covers_the_size_and_points_follow(tmp_path: Path) -> None:
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[10:14, 60:64] = 255
    fit = Fit.cover((40, 100), (80, 80))
    out = fit.picture(picture)
    assert out.shape == (80, 80, 3)
    rows, cols = np.nonzero(out[..., 0] > 128)
    x, y = fit.point(61.5, 11.5)
    assert abs(cols.mean() - x) < 0.5 and abs(rows.mean() - y) < 0.5
    cv2.imwrite(str(tmp_path / "p.png"), picture[..., ::-1])
    assert torch.equal(read_image(tmp_path / "p.png"), torch.from_numpy(picture))
    assert read_image(tmp_path / "p.png", (16, 24)).shape == (16, 24, 3)


def test_a_rotation_in_the_metadata_is_applied(tmp_path: Path) -> None:
    frames = torch.zeros(3, 32, 48, 3, dtype=torch.uint8)
    frames[:, :8] = 255  # a bright band on top
    write_video(tmp_path / "v.mp4", frames)
    data = (tmp_path / "v.mp4").read_bytes()
    one, plus, minus = (0x40000000).to_bytes(4, "big"), (1 << 16).to_bytes(4, "big"), b"\xff\xff\x00\x00"
    zero = bytes(4)
    level = plus + zero * 3 + plus + zero * 3 + one
    quarter = zero + plus + zero + minus + zero * 4 + one  # a quarter turn clockwise
    track = data.index(b"tkhd")
    place = data.index(level, track)
    (tmp_path / "turned.mp4").write_bytes(data[:place] + quarter + data[place + len(level) :])
    turned = read_video(tmp_path / "turned.mp4")
    assert turned.shape == (3, 48, 32, 3)
    assert float(turned[0, :, -8:].float().mean()) > 200 > 50 > float(turned[0, :, :8].float().mean())


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("none.mp4", None, "no such video file"),
        ("empty.mp4", b"", "empty"),
        ("text.mp4", b"these are words, not a video\n" * 20, "not a video that can be read"),
    ],
)
def test_an_unreadable_file_is_named_with_its_cause(
    tmp_path: Path, name: str, content: bytes | None, cause: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for reader in (read_video, video_info, read_metadata):
        with pytest.raises(WanmoeError, match=cause) as caught:
            reader(tmp_path / name)  # type: ignore[operator]
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_picture_is_no_video_and_words_no_picture(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"no picture")
    with pytest.raises(WanmoeError, match=r"p\.png: not a picture"):
        read_image(tmp_path / "p.png")
    with pytest.raises(WanmoeError, match=r"q\.png: no such picture"):
        read_image(tmp_path / "q.png")
    write_video(tmp_path / "v.mp4", plain())
    cut = (tmp_path / "v.mp4").read_bytes()[:-200]
    (tmp_path / "cut.mp4").write_bytes(cut)
    with pytest.raises(WanmoeError, match=r"cut\.mp4"):
        read_video(tmp_path / "cut.mp4")


def test_wrong_frames_are_refused_and_nothing_is_left_behind(tmp_path: Path) -> None:
    with pytest.raises(WanmoeError, match=r"even for yuv420p; got \[31, 48\]"):
        write_video(tmp_path / "odd.mp4", plain()[:, :31])
    with pytest.raises(WanmoeError, match="uint8"):
        write_video(tmp_path / "float.mp4", plain().float())  # the range would be lost without a word
    with pytest.raises(WanmoeError, match="does not exist"):
        write_video(tmp_path / "no" / "v.mp4", plain())
    target = tmp_path / "taken.mp4"
    target.mkdir()
    with pytest.raises(WanmoeError, match="could not be written"):
        write_video(target, plain())
    assert sorted(os.listdir(tmp_path)) == ["taken.mp4"]


def test_real_files_decode(data_dir: Path) -> None:
    sizes = {
        "surgical/endo.mp4": (25, 250, 720, 1280),
        "gestures/milk.mkv": (30, 51, 480, 640),
        "bikes.mp4": (25, 250, 272, 640),
        "nasa_13013.mp4": (25, 325, 180, 320),  # the first of its two video streams
    }
    for name, expected in sizes.items():
        info = video_info(data_dir / name)
        assert (info.fps, info.frames, info.height, info.width) == expected
        video = read_video(data_dir / name, fps=12.5, size=(48, 64), start_frame=10, num_frames=5)
        assert video.shape == (5, 48, 64, 3)
        assert float(video.float().std()) > 5


@pytest.mark.parametrize("clip", ["surgical/endo.mp4", "bikes.mp4", "wan/decoded_taew2_1.mp4"])
def test_what_a_codec_decodes_comes_back_from_the_file_within_two_levels(
    data_dir: Path, tmp_path: Path, clip: str
) -> None:
    codec = HaarCodec()
    video = to_model(read_video(data_dir / clip, num_frames=17, size=(256, 256)))
    frames = to_frames(codec.decode(codec.encode(video[None]))[0])
    write_video(tmp_path / "out.mp4", frames, 16, {"prompt": "电凝钩", "seed": "3"})
    back = read_video(tmp_path / "out.mp4")
    error = (back.float() - frames.float()).abs().mean()
    assert error < 2.0
    assert read_metadata(tmp_path / "out.mp4") == {"prompt": "电凝钩", "seed": "3"}
