import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wanmoe.moe_lora import WanmoeError
from wanmoe.moe_lora.instruments import CHOLEC, SURGICAL
from wanmoe.train import ShardDataset
from wanmoe.train.judges import Classifier, Detector, load_classifier, load_detector, save_judge
from wanmoe.train.judges.judge import JudgeInfo, peaks
from wanmoe.train.judges.nets import ClassifierNet, patches, widened

INFO = {
    "sizes": ("5x12x12",),
    "codec": {"name": "haar", "fingerprint": "a" * 64, "stand_in": True},
    "shards_sha256": "b" * 64,
    "clips": 1,
    "steps": 1,
    "batch": 1,
    "lr": 0.1,
    "seed": 0,
    "held_out": {},
    "versions": {},
}


def fresh(kind: type, **more: object):
    torch.manual_seed(0)
    return kind(JudgeInfo(**INFO | {"experts": SURGICAL if kind is Classifier else ()} | more))


def latent(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 3), (21, 7, 9), (5, 12, 12)])
def test_any_size_goes_in(shape) -> None:
    x, roi = latent(2, 16, *shape), torch.ones(2, *shape)
    judge, detector = fresh(Classifier), fresh(Detector)
    assert judge(x).shape == judge(x, roi).shape == (2, 4) and judge.predict(x).shape == (2,)
    heat, offsets = detector(x)
    assert heat.shape == (2, *shape) and offsets.shape == (2, 2, *shape)
    assert detector.tips(x).shape == (2, shape[0], 3)


def test_they_are_small() -> None:
    assert fresh(Classifier).crop == (24, 24)
    for judge in (fresh(Classifier), fresh(Detector)):
        assert 80_000 < sum(p.numel() for p in judge.parameters()) < 120_000


def test_a_clip_is_judged_alone_and_half_precision_is_taken() -> None:
    judge, x = fresh(Classifier), latent(3, 16, 2, 4, 5)
    roi = (latent(3, 2, 4, 5) > 1).float()
    together = judge(x, roi)
    assert torch.allclose(together[1:2], judge(x[1:2], roi[1:2]), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert judge(x.bfloat16()).dtype == torch.float32
        assert torch.equal(judge(x, roi), together)


def test_the_scene_outside_of_the_region_is_not_read() -> None:
    judge, x = fresh(Classifier), latent(1, 16, 3, 9, 9)
    roi = torch.zeros(1, 3, 9, 9)
    roi[:, :, 4, 4] = 1
    other = x.clone()
    other[..., :3, :] = 5.0
    assert torch.equal(judge(x, roi), judge(other, roi))
    assert not torch.allclose(judge(x), judge(other))
    weights = judge.weigh(x, roi)[1].detach()
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    assert (weights * widened(roi)).sum() == pytest.approx(1, abs=1e-5)
    # An empty region is none.
    assert torch.allclose(judge(x, torch.zeros_like(roi)), judge(x), atol=1e-6)


@pytest.mark.parametrize("region", [False, True])
def test_gradients_reach_the_latent_and_no_weight(classifier_file, region) -> None:
    judge = load_classifier(classifier_file)
    assert not judge.training and not any(p.requires_grad for p in judge.parameters())
    judge = judge.double()
    cells = latent(1, 16, 2, 3, 4).double().requires_grad_()
    roi = torch.zeros(1, 2, 3, 4, dtype=torch.float64)
    roi[..., 1, 1] = 1

    def loss(x: torch.Tensor) -> torch.Tensor:
        return judge.net(x, roi if region else None)[0][0].softmax(0)[1]

    loss(cells).backward()
    assert cells.grad is not None and all(p.grad is None for p in judge.parameters())
    assert (cells.grad != 0).float().mean() > 0.5
    for at in ((0, 0, 0, 1, 1), (0, 7, 1, 0, 2), (0, 15, 1, 2, 1)):
        nudge = torch.zeros_like(cells)
        nudge[at] = 1e-5
        slope = (loss(cells.detach() + nudge) - loss(cells.detach() - nudge)) / 2e-5
        assert cells.grad[at].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-9)
    # The public way too, which works in fp32.
    x = cells.detach().float().requires_grad_()
    judge.float()(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_peaks_are_in_pixels_of_the_video() -> None:
    heat, offsets = torch.full((1, 2, 3, 4), -5.0), torch.zeros(1, 2, 2, 3, 4)
    heat[0, 0, 1, 2], heat[0, 1, 2, 0] = 2.0, -4.0
    offsets[0, :, 0, 1, 2] = torch.tensor([0.25, -1.0])
    x, y, sure = peaks(heat, offsets)[0, 0].tolist()
    assert (x, y) == (2.75 * 8 - 0.5, 0.5 * 8 - 0.5) and sure == pytest.approx(0.8808, abs=1e-4)
    assert peaks(heat, offsets)[0, 1].tolist() == pytest.approx([3.5, 19.5, 0.018], abs=1e-3)


def test_patches_are_the_groups_of_the_codec() -> None:
    video = torch.arange(3 * 9 * 16 * 24.0).view(1, 3, 9, 16, 24)
    cells = patches(video)
    assert cells.shape == (1, 768, 3, 2, 3)
    cell = cells[0, :, 2, 1, 2].view(3, 4, 8, 8)
    assert torch.equal(cell, video[0, :, 5:9, 8:16, 16:24])
    assert torch.equal(cells[0, :, 0, 0, 0].view(3, 4, 8, 8)[:, 3], video[0, :, 0, :8, :8])


def test_a_judge_of_pixels_takes_a_video() -> None:
    judge = fresh(Classifier, space="pixels")
    video = latent(1, 3, 5, 16, 24).requires_grad_()
    judge(video, torch.ones(1, 2, 2, 3)).sum().backward()
    assert video.grad is not None and video.grad.abs().sum() > 0
    with pytest.raises(WanmoeError, match=r"videos \[B, 3, 4 n \+ 1, H, W\].*\[1, 3, 4, 16, 24\]"):
        judge(video[:, :, :4])


def test_wrong_shapes_are_told() -> None:
    judge = fresh(Classifier)
    with pytest.raises(WanmoeError, match=r"latents \[B, 16, F, H, W\], but got \[1, 4, 2, 2, 2\]"):
        judge(latent(1, 4, 2, 2, 2))
    with pytest.raises(WanmoeError, match=r"region is \[1, 2, 2, 2\] here, but got \[1, 2, 2, 3\]"):
        judge(latent(1, 16, 2, 2, 2), torch.ones(1, 2, 2, 3))


def test_labels_become_weights_of_the_classes() -> None:
    judge = fresh(Classifier)
    assert judge.targets([("Suction", 0.5), ("bipolar", 1.5)]).tolist() == [0, 0.75, 0.25, 0]
    assert judge.targets([]).tolist() == [0, 0, 0, 0]
    tools = fresh(Classifier, experts=CHOLEC)
    assert tools.targets([("Hook/Electrocautery", 1.0)]).tolist() == [0, 0.5, 0.5, 0, 0, 0]
    with pytest.raises(WanmoeError, match="unknown expert 'Spoon'"):
        judge.targets([("Spoon", 1.0)])


@pytest.mark.parametrize("kind", ["classifier", "detector"])
def test_a_file_there_and_back(kind, classifier_file, detector_file, tmp_path) -> None:
    path, load = (
        (classifier_file, load_classifier) if kind == "classifier" else (detector_file, load_detector)
    )
    judge = load(path)
    save_judge(judge, tmp_path / "copy.safetensors")
    first, second = load_file(path), load_file(tmp_path / "copy.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == f"wanmoe-{kind}/1"
    x = latent(1, 16, 5, 12, 12)
    again = load(tmp_path / "copy.safetensors")
    first, second = (one(x) if kind == "classifier" else one.tips(x) for one in (judge, again))
    assert torch.equal(first, second) and again.info == judge.info


def test_the_codec_must_fit(classifier_file, drawn) -> None:
    judge, manifest = load_classifier(classifier_file), ShardDataset(drawn).manifest
    judge.check_fits(manifest)
    other = manifest | {"codec": {"name": "wan2.1-vae", "fingerprint": "c" * 64, "stand_in": False}}
    with pytest.raises(WanmoeError, match=r"classifier.safetensors: it judges latents of codec haar .*wan2"):
        judge.check_fits(other)
    fresh(Classifier, space="pixels").check_fits(other)


def test_wrong_files_are_told_in_one_line(classifier_file, detector_file, copy, tmp_path) -> None:
    def fails(path, message, load=load_classifier) -> None:
        with pytest.raises(WanmoeError, match=message) as caught:
            load(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    fails(tmp_path / "none.safetensors", "not a readable safetensors file")
    cut = copy(classifier_file)
    cut.write_bytes(cut.read_bytes()[:5000])
    fails(cut, "not a readable safetensors file")
    fails(
        detector_file, "format is 'wanmoe-detector/1', expected 'wanmoe-classifier/1', which `wanmoe train-c"
    )
    fails(classifier_file, "expected 'wanmoe-detector/1', which `wanmoe train-d", load_detector)
    with safe_open(classifier_file, "pt") as file:
        metadata, names = file.metadata(), list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    spoiled = tmp_path / "spoiled.safetensors"
    save_file(tensors, spoiled, metadata=metadata | {"info": "{"})
    fails(spoiled, "its description is damaged: it is not JSON")
    info = json.loads(metadata["info"])
    save_file(tensors, spoiled, metadata=metadata | {"info": json.dumps(info | {"clips": "many"})})
    fails(spoiled, "its description is damaged: clips")
    for wrong in (
        {name: tensors[name] for name in names[1:]},
        tensors | {"more": torch.ones(1)},
        tensors | {names[0]: torch.ones(1)},
    ):
        save_file(wrong, spoiled, metadata=metadata)
        fails(spoiled, re.escape("1 missing, unknown or misshapen tensors"))


def test_the_net_has_no_statistic_of_its_own() -> None:
    assert not list(ClassifierNet(4).buffers())
