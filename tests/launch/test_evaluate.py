"""`wanmoe evaluate` as it is typed: clips from files and from a run, errors in one line, the blind page."""

import json
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from wanmoe.infer.run_report import EvaluationPart, write_run_report
from wanmoe.launch import cli
from wanmoe.launch.evaluation import paired, read_clips, scenes, told_apart
from wanmoe.launch.evaluation_run import open_run, router_figures, run_scenes
from wanmoe.launch.report import parts_of
from wanmoe.moe_lora import (
    AdapterConfig,
    ExpertSet,
    RouterConfig,
    WanConfig,
    WanDiT,
    attach,
    load_dit,
    save_adapter,
)
from wanmoe.moe_lora.errors import WanmoeError
from wanmoe.moe_lora.instruments import SURGICAL
from wanmoe.moe_lora.routing import ema_over_frames, learned_gates, pool_text
from wanmoe.moe_lora.video import read_video, write_video
from wanmoe.moe_lora.wan.codec import load_vae
from wanmoe.moe_lora.wan.text import load_text_encoder
from wanmoe.moe_lora.wan.weights import save_dit
from wanmoe.train.data.clip_list import read_clip_list
from wanmoe.train.data.prepare import prepare
from wanmoe.train.data.shards import ShardDataset
from wanmoe.train.judges import Classifier, Detector, load_classifier, save_judge
from wanmoe.train.judges.judge import JudgeInfo
from wanmoe.train.routed import RoutedDiT
from wanmoe.train.synth import synth_clips


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes, and copies of their held-out clips that are brighter; two names in the lists."""
    root = tmp_path_factory.mktemp("evaluate")
    synth_clips(root / "scenes", clips=4, val=8, height=64, width=80, frames=9)
    (root / "made").mkdir()
    for path in sorted((root / "scenes" / "videos").glob("val-*.mp4")):
        frames = (read_video(path).int() + 20).clamp(0, 255).byte()
        write_video(root / "made" / path.name, frames, 16)
    return root


@pytest.fixture(scope="module")
def trained(work: Path) -> Path:
    """A run folder of a tiny model with an adapter that says something, its shards, and judges of random
    weights."""
    codec, experts = load_vae("haar"), ExpertSet(SURGICAL)
    prepare(
        read_clip_list(work / "scenes" / "clips.jsonl"),
        work / "shards",
        codec=codec,
        text_encoder=load_text_encoder("hash", dim=64, max_length=32),
        experts=experts,
        size=(64, 80),
        frames=9,
        seed=0,
        progress=False,
    )
    torch.manual_seed(0)
    dit = WanDiT(WanConfig.preset("tiny"))
    torch.nn.init.normal_(dit.head.head.weight, std=0.05)
    save_dit(dit, work / "base.safetensors")
    folder = work / "run"
    folder.mkdir()
    save_adapter(attach(dit, AdapterConfig(blocks=2)), folder / "adapter.safetensors", stage="b", step=1)
    (folder / "config.toml").write_text(
        '[model]\ndit = "../base.safetensors"\n[data]\nshards = "../shards"\n'
        '[train]\nstage = "b"\nrun = "."\n[adapter]\nblocks = 2\n'
    )
    info = JudgeInfo(
        experts=experts.experts,
        sizes=("3x8x10",),
        codec={"name": codec.name, "fingerprint": codec.fingerprint, "stand_in": True},
        shards_sha256="0" * 64,
        **dict.fromkeys(("clips", "steps", "batch", "seed"), 1),
        lr=1.0,
        held_out={},
        versions={},
    )
    save_judge(Classifier(info), work / "classifier.safetensors")
    save_judge(Detector(info), work / "detector.safetensors")
    return folder


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """(exit code, standard output, last line on standard error) of `wanmoe evaluate words`."""
    monkeypatch.setattr(sys, "argv", ["wanmoe", "evaluate", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    told = capsys.readouterr()
    code = stop.value.code if isinstance(stop.value.code, int) else 0
    return code, told.out, (told.err.strip().splitlines() or [""])[-1]


def test_a_folder_against_a_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], work: Path, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    out = tmp_path / "figures"
    code, text, _ = run(
        monkeypatch,
        capsys,
        *("--real", work / "scenes" / "clips.jsonl", "--generated", work / "made", "--out", out),
        *("--features", "efficientnet-lite0", "--track", uri),
    )
    assert code == 0
    found = json.loads((out / "evaluation.json").read_text())
    assert found["clips"] == {"pairs": 8, "made": 8, "real": 8}
    assert found["rows"]["fds"]["made"]["value"] == pytest.approx(20 / 127.5, abs=0.02)
    assert found["rows"]["gatc"]["made"]["value"] > 0.9, "brightness is nothing to a correlation"
    assert [row["name"] for row in found["sets"]] == [
        "KID on EfficientNet-Lite0",
        "FID on EfficientNet-Lite0",
    ]
    assert Path(found["sources"]["val-0000-scissors"]["real"]).is_file()
    assert "warped PSNR" in text and "no tip is measured" in text
    assert "# Evaluation of" in (out / "evaluation.md").read_text()
    logged = mlflow.MlflowClient(uri).search_runs(["1"])[0]
    assert logged.data.metrics["evaluate/fds"] == found["rows"]["fds"]["made"]["value"]
    assert logged.info.status == "FINISHED"


def test_marks_follow_the_size_and_rate_of_the_generated_clip(work: Path, tmp_path: Path) -> None:
    """A generated clip of half the size and rate: the real one is read so, and its tips and masks with it."""
    source = work / "scenes" / "videos" / "val-0001-hook.mp4"
    small = read_video(source, fps=8, size=(32, 40))
    write_video(tmp_path / source.name, small, 8)
    ((made, real),) = scenes(paired(read_clips(tmp_path), read_clips(work / "scenes" / "clips.jsonl")))
    assert real is not None and made.size == real.size == (32, 40) and real.fps == 8
    assert len(made.frames) == len(real.frames) == len(small)
    row = next(
        json.loads(line)
        for line in (work / "scenes" / "clips.jsonl").read_text().splitlines()
        if "val-0001-hook" in line
    )
    for place in range(len(real.frames)):
        marked = [tip for tip in row["tips"] if tip[0] == 2 * place]
        if marked:
            wanted = (np.array(marked[0][1:3]) + 0.5) / 2 - 0.5
            tip = real.tips[place]
            assert tip is not None and np.allclose(tip[0], wanted, atol=2e-3)
            mask = real.masks[place]
            assert mask is not None and mask.shape[1:] == (32, 40)
            rows, cols = mask.any(0).nonzero(as_tuple=True)
            near = torch.stack([cols, rows], 1).double() - tip[0]
            assert float(near.norm(dim=1).min()) < 2, "the tip is at the instrument"


def test_ids_tell_pairs(work: Path, tmp_path: Path) -> None:
    real = read_clips(work / "scenes" / "clips.jsonl")
    made = read_clips(work / "made")
    assert [clip.id for clip, other in paired(made, real) if other is None] == []
    assert all(clip.instruments is None for clip in made), "a file name is no label"
    alone = read_clips(work / "made" / "val-0000-scissors.mp4")
    other = read_clips(work / "scenes" / "videos" / "val-0003-other.mp4")
    assert paired(alone, other) == [(alone[0], other[0])], "one alone on each side belong together"
    with pytest.raises(WanmoeError, match=r"generated are .*, real .*; name each generated"):
        paired(made, [clip for clip in real if clip.id.startswith("train")])
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in ("a", "b"):
        (tmp_path / folder / "clip.mp4").write_bytes((work / "made" / "val-0000-scissors.mp4").read_bytes())
    with pytest.raises(WanmoeError, match="the id 'clip' is that of"):
        read_clips(tmp_path)


def test_a_run_is_evaluated_on_its_own_held_out_clips(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], work: Path, trained: Path
) -> None:
    judges = ("--classifier", work / "classifier.safetensors", "--detector", work / "detector.safetensors")
    code, text, line = run(monkeypatch, capsys, "--run", trained, "--vae", "haar", *judges, "--steps", "1")
    assert code == 0, line
    found = json.loads((trained / "evaluation" / "evaluation.json").read_text())
    assert found["clips"]["pairs"] == 8 and len(found["sources"]) == 8
    moved = (trained / "evaluation").rename(work / "moved")
    (part,) = parts_of(moved)
    assert isinstance(part, EvaluationPart)
    sources = part.values["sources"].values()
    assert all(Path(sides[side]).is_file() for sides in sources for side in ("made", "real"))
    assert {"tip_pck@5px", "identity", "flips", "warped_psnr", "fds"} <= found["rows"].keys()
    assert found["rows"]["tip_pck@5px"]["real"] is not None, "the detector's own error on real clips"
    assert found["router"]["router_agreement"]["value"] == 1, "the words of the captions name the instrument"
    for label, gates in found["routed"].items():
        assert max(gates, key=lambda name: gates[name]) == label and sum(gates.values()) == pytest.approx(1)
    assert sum(found["load"].values()) == pytest.approx(1)
    assert "a stand-in for Wan's codec" in text and "noised to t = 0.8" in text
    assert found["marks"] and all(marks["true"] for marks in found["marks"].values())
    (trained / "adapter.safetensors").rename(trained / "gone.safetensors")
    code, _, line = run(monkeypatch, capsys, "--run", trained, "--vae", "haar")
    assert code == 2 and "it has no adapter.safetensors: the run has not ended well" in line
    (trained / "gone.safetensors").rename(trained / "adapter.safetensors")


def test_a_router_that_reads_a_frame_is_shown_it(work: Path, trained: Path) -> None:
    torch.manual_seed(1)
    dit = load_dit(work / "base.safetensors")
    config = RouterConfig(mode="learned", first_frame_classes=4, top_k=2)
    adapter = attach(dit, AdapterConfig(blocks=2), config)
    assert adapter.router is not None
    torch.nn.init.normal_(adapter.router.hidden.weight, std=2.0)
    torch.nn.init.normal_(adapter.router.out.weight, std=2.0)
    folder = work / "reads"
    folder.mkdir()
    save_adapter(adapter, folder / "adapter.safetensors", stage="c", step=1)
    text = (trained / "config.toml").read_text().replace('stage = "b"', 'stage = "c"')
    text += '[objective]\nclassifier = "../classifier.safetensors"\n'
    (folder / "config.toml").write_text(text + '[router]\nmode = "learned"\nfirst_frame_classes = 4\n')
    found, cpu = open_run(folder), torch.device("cpu")
    routing = router_figures(found, cpu)
    assert routing is not None
    # The truth: the router asked about every latent frame by itself.
    judge, data = load_classifier(work / "classifier.safetensors"), ShardDataset(work / "shards", "val")
    changes, smooth = [], []
    for sample in (data[index] for index in range(len(data))):
        rows = []
        for place in range(sample.latent.shape[1]):
            seen = judge(sample.latent[None, :, place : place + 1].float())
            rows.append(
                learned_gates(adapter.router(pool_text([sample.context]), evidence=seen), config, False)
            )
        moments = torch.cat(rows).detach()
        calm = ema_over_frames(moments[None], config.ema, len(SURGICAL))[0]
        for kept, gates in ((changes, moments), (smooth, calm)):
            kept.append(float((gates.argmax(1).diff() != 0).sum()) / (9 / 16))
    assert routing.figures["router_flips"].value == pytest.approx(np.mean(changes))
    assert routing.figures["router_flips_ema"].value == pytest.approx(np.mean(smooth))
    shown: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        forward = RoutedDiT.forward

        def spied(self: RoutedDiT, *args: object, **given: torch.Tensor) -> object:
            shown.append(given["evidence"])
            return forward(self, *args, **given)

        patch.setattr(RoutedDiT, "forward", spied)
        next(run_scenes(found, "haar", 0.8, 1, work / "reads-out", cpu))
    torch.testing.assert_close(shown[0][:1], judge(data[0].latent[None, :, :1].float()))


def test_what_a_reader_must_know_of_unlike_pairs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], work: Path, tmp_path: Path
) -> None:
    """Another rate, length, shape, and marks that lie nowhere: each is a note, never silence."""
    source = next((work / "scenes" / "videos").glob("val-*.mp4"))
    frames = read_video(source)
    rows = [json.loads(line) for line in (work / "scenes" / "clips.jsonl").read_text().splitlines()]
    row = next(row for row in rows if Path(row["video_path"]).stem == source.stem)
    row |= {"video_path": str(source), "masks": None, "tips": [[900, 10, 10]], "boxes": []}
    (tmp_path / "real.jsonl").write_text(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n")
    said = []
    for changed, fps in ((frames, 30), (frames[:5], 16), (frames[:, :, 16:64], 16), (frames[:2], 16)):
        write_video(tmp_path / "made.mp4", changed.contiguous(), fps)
        (row_,) = paired(read_clips(tmp_path / "made.mp4"), read_clips(tmp_path / "real.jsonl"))
        said.append(" / ".join(told_apart([row_])))
    words = ("more frames a second", "another length", "cut in the centre", "fewer than 5 frames")
    assert all(word in one for word, one in zip(words, said, strict=True))
    assert all("real.jsonl:1 lies in its frames" in one for one in said)
    (tmp_path / "out").touch()
    code, _, line = run(
        monkeypatch,
        capsys,
        *("--real", tmp_path / "real.jsonl", "--generated", tmp_path / "made.mp4", "--out", tmp_path / "out"),
    )
    assert code == 2 and line.endswith("is a file; give a folder")


def test_judges_of_latents_need_their_own_codec(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], work: Path, trained: Path
) -> None:
    clips = ("--real", work / "scenes" / "clips.jsonl", "--generated", work / "made")
    judge = ("--classifier", work / "classifier.safetensors")
    code, _, line = run(monkeypatch, capsys, *clips, *judge)
    assert code == 2 and "it judges latents of codec haar; give that codec with --vae" in line
    info = load_classifier(work / "classifier.safetensors").info
    other = Classifier(info.model_copy(update={"codec": info.codec | {"fingerprint": "f" * 64}}))
    save_judge(other, work / "other.safetensors")
    code, _, line = run(
        monkeypatch, capsys, *clips, "--classifier", work / "other.safetensors", "--vae", "haar"
    )
    assert code == 2 and "--vae haar: " in line and "and this is another" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give --generated clips and the --real ones, or the --run"),
        (("--generated", "MADE"), "give the --real clips"),
        (("--generated", "MADE", "--generated", "MADE", "--real", "REAL"), "two sets are for --blind"),
        (("--generated", "MADE", "--run", "x"), "give --generated clips"),
        (("--run", "x"), "needs their codec: --vae"),
        (("--run", "x", "--vae", "haar"), "no run: it has no config.toml"),
        (("--generated", "nowhere", "--real", "REAL"), "nowhere"),
        (("--generated", "MADE", "--real", "REAL", "--features", "fvd"), "features are efficientnet-lite0"),
        (("--generated", "MADE", "--real", "REAL", "--classifier", "x.safetensors"), "not a readable"),
        (("--generated", "MADE", "--key", "x"), "--key is for --tally"),
        (("--tally", "MADE"), "--tally needs the --key"),
        (("--blind", "page.html", "--generated", "MADE"), "--blind compares two sets"),
        (("--blind", "page.txt", "--generated", "MADE", "--real", "REAL"), "an .html file"),
        (("--blind", "page.html", "--generated", "MADE", "--generated", "MADE"), "both are"),
    ],
)
def test_wrong_words_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    work: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"MADE": work / "made", "REAL": work / "scenes" / "clips.jsonl"}
    code, _, line = run(monkeypatch, capsys, *(places.get(word, word) for word in words))
    assert code == 2 and line.startswith("wanmoe: error: ") and said in line
    assert not list(tmp_path.glob("*.html"))


def test_a_blind_page_of_two_models_and_its_tally(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], work: Path, tmp_path: Path
) -> None:
    page = tmp_path / "study.html"
    sets = ("--generated", work / "made", "--generated", work / "scenes" / "videos")
    code, text, _ = run(monkeypatch, capsys, "--blind", page, *sets, "--pairs", "3")
    assert code == 0 and "3 pairs, made against videos" in text
    key = json.loads((tmp_path / "study.key.json").read_text())
    answers = []
    for name, pair in key["pairs"].items():
        left, right = pair["clips"]
        chosen = "left" if pair["clips"][left] == "made" else "right"
        answers.append({"pair": name, "left": left, "right": right, "choice": chosen})
    folder = tmp_path / "answers"
    folder.mkdir()
    for rater in ("a", "b"):
        told = {"format": "wanmoe-blind/1", "study": key["study"], "rater": rater, "answers": answers}
        (folder / f"{rater}.json").write_text(json.dumps(told))
    (folder / "late.json").write_text(json.dumps({**told, "rater": "late", "answers": []}))
    out = tmp_path / "tally"
    code, text, _ = run(
        monkeypatch, capsys, "--tally", folder, "--key", tmp_path / "study.key.json", "--out", out
    )
    assert "late.json has no answer" in text
    (part,) = parts_of(out)
    write_run_report(tmp_path / "raters.html", "raters", [part])
    assert "made against videos" in (tmp_path / "raters.html").read_text() and "1.000 (1.000" in text
    assert code == 0 and "6 answers by 2 raters on 3 pairs" in text
    assert "win rate of made: 1.000" in text and "raters prefer made" in text
