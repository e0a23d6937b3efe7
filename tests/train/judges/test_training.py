import json
from html.parser import HTMLParser

import pytest
import torch

from wanmoe.moe_lora import ExpertSet, WanmoeError
from wanmoe.moe_lora.instruments import SURGICAL
from wanmoe.moe_lora.wan.codec import HaarCodec
from wanmoe.moe_lora.wan.text import load_text_encoder
from wanmoe.train import ShardDataset
from wanmoe.train.data.clip_list import read_clip_list
from wanmoe.train.data.prepare import prepare
from wanmoe.train.judges import (
    Recipe,
    accuracy,
    load_classifier,
    load_detector,
    pad_tips,
    pck,
    train_classifier,
    train_detector,
    true_tips,
)
from wanmoe.train.judges.examples import Examples
from wanmoe.train.judges.report import classifier_summary, detector_summary
from wanmoe.train.judges.training import detector_loss
from wanmoe.train.synth import synth_clips

SHORT = Recipe(steps=2, batch=2)


class Page(HTMLParser):
    """Whether tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        assert not [name for name, _ in attrs if name in ("src", "href")], "something is loaded"
        if tag not in ("meta", "circle", "line", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def held_out(drawn):
    dataset = ShardDataset(drawn, "val")
    samples = [dataset[n] for n in range(len(dataset))]
    return samples, torch.stack([s.latent for s in samples]), torch.stack([s.roi for s in samples])


def test_a_classifier_learns_to_name_instruments(classifier_file, drawn) -> None:
    judge = load_classifier(classifier_file)
    samples, latents, roi = held_out(drawn)
    labels = torch.stack([judge.targets(sample.instruments) for sample in samples])
    told, untold = accuracy(judge.predict(latents, roi), labels), accuracy(judge.predict(latents), labels)
    assert told >= 0.7 and untold >= 0.7  # chance: 0.25
    held = judge.info.held_out
    assert held["accuracy"] == pytest.approx(untold) and held["accuracy_region"] == pytest.approx(told)
    assert held["chance"] == 0.25 and held["clips"] == 24 and torch.tensor(held["confusion"]).sum() == 24
    assert [row["t"] for row in held["by_noise"]] == [0, 0.2, 0.4, 0.6, 0.8]
    assert held["looks_at_region"] > 0.5  # the region, widened by a cell, is about 0.3 of a clip
    assert judge.classes == tuple(expert.name for expert in SURGICAL) and judge.space == "latent"
    assert judge.info.codec["name"] == "haar" and judge.info.sizes == ("5x12x12",)


def test_permuted_labels_give_chance(make, scenes, tmp_path) -> None:
    names = [name for *_, name, _ in scenes]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(2)).tolist()
    rows = [(s, x, r, names[at], t) for (s, x, r, _, t), at in zip(scenes, order, strict=True)]
    shards = make(tmp_path / "s", rows)
    judge = train_classifier(
        shards, tmp_path / "c.safetensors", experts=ExpertSet(), recipe=Recipe(steps=60, batch=8)
    )
    assert judge.info.held_out["accuracy"] < 0.5


def test_a_detector_learns_to_find_tips(detector_file, drawn) -> None:
    detector = load_detector(detector_file)
    samples, latents, _ = held_out(drawn)
    truth = pad_tips([true_tips(sample.meta, 5) for sample in samples])
    tips = detector.tips(latents)
    middle = torch.tensor([48.0, 48.0, 1.0]).expand(tips.shape)
    # The middle of the picture is the best guess without looking.
    assert pck(tips, truth, 8) > pck(middle, truth, 8) + 0.25
    assert detector.info.held_out["chance"] == pytest.approx(pck(middle, truth, 8), abs=0.1)
    shuffled = truth.roll(5, 0)
    assert pck(tips, shuffled, 8) < pck(tips, truth, 8) / 2
    held = detector.info.held_out
    assert held["pck"] == pytest.approx(pck(tips, truth, 8)) and held["frames"] == 24 * 5
    assert held["by_noise"][0]["pck"] == sorted(held["by_noise"][0]["pck"])


def test_the_reports_stand_alone_and_hold_the_figures(classifier_file, detector_file) -> None:
    for path, load, summary in (
        (classifier_file, load_classifier, classifier_summary),
        (detector_file, load_detector, detector_summary),
    ):
        info = load(path).info
        page = path.with_suffix(".html").read_text(encoding="utf-8")
        assert Page(page).open == [] and "haar" in page
        for line in summary(info):
            assert line in page
        assert json.loads(path.with_suffix(".json").read_text()) == info.model_dump(mode="json")
        assert sorted(p.name for p in path.parent.iterdir()) == [
            path.with_suffix(suffix).name for suffix in (".html", ".json", ".safetensors")
        ]


def test_the_same_seed_gives_the_same_judge(drawn, tmp_path) -> None:
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        out = tmp_path / f"{number}.safetensors"
        train_detector(drawn, out, recipe=Recipe(steps=2, batch=2, seed=seed))
    one, two, three = (load_detector(tmp_path / f"{n}.safetensors").net.state_dict() for n in range(3))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], three[name]) for name in one)


def test_a_classifier_of_pixels(drawn, tmp_path) -> None:
    judge = train_classifier(
        drawn,
        tmp_path / "c.safetensors",
        experts=ExpertSet(),
        space="pixels",
        codec=HaarCodec(),
        recipe=SHORT,
    )
    assert load_classifier(tmp_path / "c.safetensors").space == judge.space == "pixels"
    with pytest.raises(
        WanmoeError, match="pixels need the codec that made the latents, haar .*none was given"
    ):
        train_classifier(drawn, tmp_path / "d.safetensors", experts=ExpertSet(), space="pixels")
    with pytest.raises(WanmoeError, match="--space 'sound' is unknown"):
        train_classifier(drawn, tmp_path / "d.safetensors", experts=ExpertSet(), space="sound")


def test_the_offsets_point_to_the_nearest_tip_and_unmarked_frames_are_left_out() -> None:
    tips = torch.full((1, 2, 2, 2), float("nan"))
    tips[0, 0] = torch.tensor([[11.5, 19.5], [43.5, 3.5]])  # cells 1, 2 and 5, 0: both in the middle

    def loss(shift: float, cell: tuple[int, int, int]) -> float:
        heat, offsets = torch.full((1, 2, 4, 6), -9.0), torch.zeros(1, 2, 2, 4, 6)
        heat[0, 0, 2, 1] = heat[0, 0, 0, 5] = 9.0
        for row, col, y, x in ((2, 1, 2, 1), (0, 5, 0, 5)):
            for r in range(max(0, row - 1), min(4, row + 2)):
                for c in range(max(0, col - 1), min(6, col + 2)):
                    offsets[0, :, 0, r, c] = torch.tensor([x - c, y - r])
        offsets[0, 0, cell[0], cell[1], cell[2]] += shift
        found = Examples(torch.zeros(1), torch.zeros(1), tips, torch.zeros(1))
        return detector_loss(lambda _: (heat, offsets), found).item()

    assert loss(0.0, (0, 0, 0)) < 1e-6
    assert loss(1.0, (0, 2, 1)) == pytest.approx(1 / 13, abs=1e-5)  # 9 cells about one tip, 4 about the other
    assert loss(1.0, (1, 2, 1)) < 1e-6 and loss(1.0, (0, 2, 4)) < 1e-6


def test_what_prepare_writes_is_understood(tmp_path) -> None:
    clips = synth_clips(tmp_path / "clips", clips=4, val=4, frames=5, height=64, width=80)
    text = load_text_encoder("hash", dim=8, max_length=8)
    shards = tmp_path / "shards"
    prepare(
        read_clip_list(clips),
        shards,
        codec=HaarCodec(),
        text_encoder=text,
        experts=ExpertSet(),
        size=(64, 80),
        frames=5,
    )
    judge = train_classifier(shards, tmp_path / "c.safetensors", experts=ExpertSet(), recipe=SHORT)
    assert judge.info.clips == 4 and judge.info.sizes == ("2x8x10",)
    assert train_detector(shards, tmp_path / "d.safetensors", recipe=SHORT).info.held_out["frames"] == 8


def test_shards_that_cannot_train_a_judge_are_told(make, scenes, tmp_path) -> None:
    few = [*scenes[:4], *scenes[-4:]]
    out = tmp_path / "o" / "c.safetensors"

    def fails(rows, message: str, detector: bool = False) -> None:
        shards = make(tmp_path / "shards", rows)
        with pytest.raises(WanmoeError, match=message) as caught:
            if detector:
                train_detector(shards, out, recipe=SHORT)
            else:
                train_classifier(shards, out, experts=ExpertSet(), recipe=SHORT)
        assert "\n" not in str(caught.value) and not list(out.parent.iterdir())

    fails(few[:4], "no 'val' samples.*--val-fraction")
    fails([(s, x, r, "", t) for s, x, r, _, t in few], "no 'train' sample has an instrument label")
    fails([(s, x, r, "Other", t) for s, x, r, _, t in few], "training clips are 'Other'; a classifier needs")
    unlabelled = [(s, x, r, "" if s == "val" else n, t) for s, x, r, n, t in few]
    fails(unlabelled, "no 'val' sample has an instrument label")
    fails([(*row[:4], []) for row in few], "no 'train' sample has a tip", detector=True)


@pytest.mark.parametrize(
    "keys", [{"steps": 0}, {"batch": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"seed": -1}]
)
def test_a_recipe_that_cannot_be(keys) -> None:
    with pytest.raises(WanmoeError, match="steps and batch are 1 or more, lr positive"):
        Recipe(**keys)


def test_a_judge_that_diverges_is_told(drawn, tmp_path) -> None:
    with pytest.raises(WanmoeError, match="the detector diverged; try --lr"):
        train_detector(drawn, tmp_path / "d.safetensors", recipe=Recipe(steps=8, batch=2, lr=1e30))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(drawn, tmp_path, monkeypatch) -> None:
    with pytest.raises(WanmoeError, match=r"a judge is written to a file named \*.safetensors"):
        train_detector(drawn, tmp_path / "detector.bin", recipe=SHORT)
    (tmp_path / "file").write_text("")
    with pytest.raises(WanmoeError, match="the folder cannot be made"):
        train_detector(drawn, tmp_path / "file" / "d.safetensors", recipe=SHORT)
    (tmp_path / "file").unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wanmoe.moe_lora.files.os.fsync", full)
    with pytest.raises(WanmoeError, match="d.safetensors: could not be written .No space left"):
        train_detector(drawn, tmp_path / "d.safetensors", recipe=SHORT)
    assert not list(tmp_path.iterdir())
