"""What a look at the pictures says, on real videos: scenes, black frames and copies; and videos by name."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.video import VideoInfo, read_video, video_info, write_video
from wanmoe.train.data.footage import Footage, VideoFiles, copies, look
from wanmoe.train.data.segment import Segment

BIKES_CUTS = (30, 76, 137, 187, 242)  # told by eye: an avenue, a man, a van, a fence, a wall, a bicycle


def seen(path: Path, frames: int | None = None) -> Footage:
    info = video_info(path)
    return look(path, info, [(0, frames or info.frames)])


@pytest.fixture(scope="module")
def bikes(data_dir: Path) -> Footage:
    return seen(data_dir / "bikes.mp4")


@pytest.fixture(scope="module")
def endo(data_dir: Path) -> Footage:
    return seen(data_dir / "surgical" / "endo.mp4")


def test_every_scene_cut_is_found_and_no_motion_is_taken_for_one(bikes: Footage, endo: Footage) -> None:
    assert bikes.cuts == BIKES_CUTS  # precision and recall 1; a white van passes close by at 84 to 104
    assert endo.cuts == ()  # the camera moves all the time
    assert bikes.end == 250 and not bikes.black.any()


def test_still_cameras_have_no_scene_cuts(data_dir: Path) -> None:
    assert [seen(data_dir / "gestures" / name).cuts for name in ("book.mkv", "no.mkv")] == [(), ()]


def test_a_jump_between_two_moments_of_one_laparoscopy_is_a_scene_cut(data_dir: Path, tmp_path: Path) -> None:
    frames = read_video(data_dir / "surgical" / "endo.mp4", size=(90, 160), num_frames=200)
    write_video(tmp_path / "jump.mp4", torch.cat([frames[:41], frames[140:181]]), fps=25)
    assert seen(tmp_path / "jump.mp4").cuts == (41,)


def test_a_cut_at_the_end_of_a_span_is_found(data_dir: Path) -> None:
    path = data_dir / "bikes.mp4"
    footage = look(path, video_info(path), [(60, 77), (29, 50), (137, 140)])
    assert footage.cuts == (30, 76, 137)
    # What was looked at is the spans, three frames around them, and nothing between them.
    assert footage.numbers.tolist() == [*range(26, 53), *range(57, 80), *range(134, 143)]


def test_frames_that_follow_no_other_are_not_compared(bikes: Footage, data_dir: Path) -> None:
    path = data_dir / "bikes.mp4"
    footage = look(path, video_info(path), [(0, 20), (40, 60)])  # two scenes
    assert footage.cuts == ()
    assert np.array_equal(footage.levels, bikes.levels[footage.numbers])


def black_video(path: Path, level: int = 4, lamp: bool = False, noise: int = 3) -> Path:
    pictures = np.random.default_rng(0).integers(level - noise, level + noise + 1, (30, 48, 64, 3))
    if lamp:
        pictures[:, 20:26, 30:38] = 250
    write_video(path, torch.from_numpy(pictures.clip(0, 255).astype(np.uint8)), fps=25)
    return path


def test_black_is_dark_and_even(tmp_path: Path, endo: Footage) -> None:
    assert seen(black_video(tmp_path / "black.mp4")).black.all()
    assert not seen(black_video(tmp_path / "dim.mp4", level=24)).black.any()
    lamp = seen(black_video(tmp_path / "lamp.mp4", lamp=True))
    assert not lamp.black.any() and lamp.levels.mean() < 16
    assert not endo.black.any()  # its round border is black


def test_a_window_is_black_when_more_than_a_tenth_of_it_is() -> None:
    black = np.zeros(50, dtype=np.bool_)
    black[10:12] = True
    footage = Footage((), 50, np.arange(100, 150), black, np.zeros((50, 8, 8), np.uint8))
    assert not footage.is_black(range(100, 120))
    assert footage.is_black(range(100, 119))


# ---- copies ----


def fingerprints(path: Path, length: int = 65, frames: int | None = None) -> list[NDArray[np.uint8]]:
    footage = seen(path, frames)
    return [
        footage.fingerprint(range(first, first + length))
        for first in range(0, footage.end - length + 1, 10)
        if first + length <= footage.numbers[-1] + 1
    ]


def reencoded(path: Path, to: Path, size: tuple[int, int], crf: int, frames: int) -> Path:
    write_video(to, read_video(path, size=size, num_frames=frames), video_info(path).fps, crf=crf)
    return to


def apart(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize(
    ("name", "size", "crf"), [("surgical/endo.mp4", (240, 426), 38), ("bikes.mp4", (136, 320), 35)]
)
def test_reencoded_copies_are_told_from_other_moments(
    data_dir: Path, tmp_path: Path, name: str, size: tuple[int, int], crf: int
) -> None:
    # Whole videos: copies differ by 9 levels at most, other moments (0.4 s and more apart) by 64 at least.
    true = fingerprints(data_dir / name, frames=115)
    copy = fingerprints(reencoded(data_dir / name, tmp_path / "copy.mp4", size, crf, 115))
    assert len(true) == len(copy) == 6
    same = [apart(one, other) for one, other in zip(true, copy, strict=True)]
    others = [apart(true[i], copy[j]) for i in range(6) for j in range(6) if i != j]
    assert max(same) <= 9 and min(others) >= 28, (same, min(others))
    assert copies([*true, *copy], ["a"] * 6 + ["b"] * 6) == [None] * 6 + list(range(6))


def test_two_signs_before_one_background_are_no_copies(data_dir: Path, tmp_path: Path) -> None:
    # All twelve: a copy differs by 6 levels at most, another sign by 29 at least. Of 64-bit difference hashes
    # milk and thanks differ by 0.8 bits in the mean, fewer than copies of bikes.mp4 do (2.2).
    names = ("milk", "thanks", "bird")
    prints = []
    for name in names:
        path = data_dir / "gestures" / f"{name}.mkv"
        prints += fingerprints(path, 45, 45)
        prints += fingerprints(reencoded(path, tmp_path / f"{name}.mp4", (240, 320), 38, 45), 45)
    assert copies(prints, [str(number) for number in range(6)]) == [None, 0, None, 2, None, 4]


def test_windows_of_one_video_are_never_copies_here() -> None:
    still = np.zeros((5, 8, 8), np.uint8)
    assert copies([still, still, still], ["a", "a", "b"]) == [None, None, 0]


def test_a_copy_of_a_dropped_copy_is_one_of_the_kept() -> None:
    steps = [np.full((5, 8, 8), level, np.uint8) for level in (0, 10, 20)]
    assert copies(steps, ["a", "b", "c"]) == [None, 0, None]  # 10 went, so 20 has nothing near it


# ---- videos ----


def test_a_video_that_ends_early_is_seen_to_its_end(tmp_path: Path) -> None:
    path = black_video(tmp_path / "short.mp4")
    footage = look(path, VideoInfo(25.0, 80, 48, 64), [(5, 20), (24, 70)])
    assert footage.end == 30 and footage.numbers.tolist() == list(range(2, 30))
    assert footage.fault == "it ends there, though its header says 80 frames"


def test_a_damaged_video_is_seen_to_its_damage(data_dir: Path, tmp_path: Path) -> None:
    data = bytearray((data_dir / "bikes.mp4").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = bytes(4000)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    footage = seen(path)
    assert footage.end == len(footage.numbers) == 120 and footage.cuts == (30, 76)
    assert footage.fault.startswith("it is damaged (")
    assert read_video(path, num_frames=120, size=(32, 32)).shape[0] == 120
    # What lies before the damage is none the worse for it.
    assert look(path, video_info(path), [(0, 100)]).fault == ""


def timed_video(path: Path, pts: list[int]) -> Path:
    """A picture at each of these milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, width=64, height=48, pix_fmt="yuv420p")
        stream.codec_context.time_base = Fraction(1, 1000)
        for level, at in enumerate(pts):
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 60 + level, np.uint8), format="rgb24")
            picture.pts, picture.time_base = at, Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def test_a_video_without_a_constant_rate_is_refused_with_the_way_out(tmp_path: Path) -> None:
    # 2 s at 25 frames a second, then 2 s at 12.5.
    times = [40 * n for n in range(50)] + [2000 + 80 * n for n in range(25)]
    path = timed_video(tmp_path / "phone.mp4", times)
    with pytest.raises(WanmoeError) as caught:
        seen(path)
    said = str(caught.value)
    assert said.startswith(
        f"{path}: its frames do not come at a constant rate: frame 50 is shown at 2.00 s, 0."
    )
    assert "rewrite it: ffmpeg -i phone.mp4 -fps_mode cfr -r 19 " in said and "\n" not in said


@pytest.mark.parametrize("name", ["jitter.mp4", "jitter.mkv"])
def test_a_late_start_and_rounded_times_are_no_change_of_rate(tmp_path: Path, name: str) -> None:
    times = [500 + 40 * n + (0, 3, -3)[n % 3] for n in range(60)]
    assert seen(timed_video(tmp_path / name, times)).end == 60


def test_no_real_video_is_refused_for_its_rate(data_dir: Path) -> None:
    for path in sorted(data_dir.glob("gestures/*.mkv"))[::3]:  # times in whole milliseconds
        assert len(seen(path).numbers) == video_info(path).frames


def test_every_decoded_frame_is_told(data_dir: Path) -> None:
    told: list[int] = []
    path = data_dir / "bikes.mp4"
    look(path, video_info(path), [(40, 50)], lambda: told.append(1))
    assert len(told) == 53  # from the first, to three after the span


def segment(video: str) -> Segment:
    return Segment(video, 0.0, 1.0, "a", "labels.txt:3")


def test_a_video_is_found_by_name_then_by_another_spelling(tmp_path: Path) -> None:
    for name in ("a/video07.mp4", "b/VID08.MKV", "b/Endo.mp4", "b/notes.txt", "b/.video09.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files = VideoFiles(tmp_path)
    assert files.find(segment("video07")) == files.find(segment("cholec07")) == tmp_path / "a/video07.mp4"
    assert files.find(segment("VID08")) == files.find(segment("video08")) == tmp_path / "b/VID08.MKV"
    assert files.find(segment("endo")) == tmp_path / "b/Endo.mp4"
    with pytest.raises(WanmoeError, match=rf"^labels.txt:3: .*'video09' in {tmp_path}"):
        files.find(segment("video09"))
    with pytest.raises(WanmoeError, match=r"'video07' in the videos given \(1\)"):
        VideoFiles({"x": tmp_path / "a/video07.mp4"}).find(segment("video07"))
    (tmp_path / "b/VID07.mp4").touch()
    files = VideoFiles([tmp_path / "a", tmp_path / "b"])
    assert files.find(segment("VID07")) == tmp_path / "b/VID07.mp4"
    with pytest.raises(WanmoeError, match="may be .*video07.mp4 or .*VID07.mp4"):
        files.find(segment("cholec07"))
