"""The demo at a small size: every stage under the real launcher, on drawn clips and on a folder of videos."""

import json

import pytest
import torch

from wanmoe.infer.report import DemoResults
from wanmoe.launch import demo
from wanmoe.moe_lora import WanmoeError
from wanmoe.moe_lora.video import read_video, write_video

SMALL = demo.Recipe(
    size=(32, 32),
    frames=5,
    clips=8,
    val=4,
    background_clips=8,
    batch=1,
    steps=(4, 4, 4, 4),
    sample_steps=2,
)


def test_drawn_clips_to_report(tmp_path):
    report = demo.run_demo(tmp_path / "demo", None, ranks=2, seed=0, recipe=SMALL)
    page = report.read_text()
    results = DemoResults.from_json((tmp_path / "demo" / "demo.json").read_text())
    assert list(results.validation) == ["frozen base", "stage A", "stage B", "stage C"]
    assert len(results.experts) == 4 and len(results.videos) == 4
    assert all(len(row) == 4 for row in results.wrong_expert.values()) and len(results.wrong_expert) == 4
    assert all(len(curve.train) >= 1 and len(curve.val) >= 2 for curve in results.curves.values())
    assert all(sum(gates) == pytest.approx(1, abs=1e-3) for gates in results.gates.values())
    frames = [read_video(path) for path in results.videos.values()]
    assert all(video.shape == (5, 32, 32, 3) for video in frames)
    assert "stands in" in page and "http://" not in page.replace("http://www.w3.org", "")
    # A second run in the same folder starts afresh; one in a folder of something else is refused.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    (tmp_path / "other" / "demo.json").write_text("{}")
    with pytest.raises(WanmoeError, match="not empty and not a demo's folder"):
        demo.start_afresh(tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").exists()


def test_a_folder_of_videos_makes_an_expert_per_file_name(tmp_path):
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "videos").mkdir()
    for label in ("milk", "thanks"):
        for number in range(3):
            frames = torch.randint(0, 255, (9, 48, 64, 3), dtype=torch.uint8, generator=generator)
            write_video(tmp_path / "videos" / f"{label}_{number}.mp4", frames, fps=16)
    demo.run_demo(tmp_path / "demo", tmp_path / "videos", ranks=1, seed=0, recipe=SMALL)
    results = DemoResults.from_json((tmp_path / "demo" / "demo.json").read_text())
    assert results.experts == ["milk", "thanks"] and set(results.videos) == {"milk", "thanks"}
    assert json.loads((tmp_path / "demo" / "demo.json").read_text())["facts"]["clips"].startswith(
        "your folder"
    )


def test_clips_that_nothing_is_known_of_are_left_out_before_anything_is_trained(tmp_path, capsys):
    rows = [
        {"video_path": "a.mp4", "caption": "the hook cuts"},
        {"video_path": "b.mp4", "caption": "a view of the gallbladder"},
    ]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clips = demo.clips_from_folder(tmp_path)
    kept = demo.labelled(clips, demo.experts_of(clips))
    assert [clip.caption for clip in kept] == ["the hook cuts"]
    assert "clips.jsonl:2: no instrument label" in capsys.readouterr().out
    with pytest.raises(WanmoeError, match="none of the 1 clips has an instrument label"):
        demo.labelled(clips[1:], demo.experts_of(clips))


def test_a_folder_without_videos_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(WanmoeError, match="no video"):
        demo.run_demo(tmp_path / "demo", tmp_path, ranks=1, seed=0, recipe=SMALL)
    assert not (tmp_path / "demo").exists()
