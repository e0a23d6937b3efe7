from types import SimpleNamespace

import pytest
import torch

from wanmoe.moe_lora import ExpertSet, WanmoeError
from wanmoe.train import ShardDataset
from wanmoe.train.judges.examples import Clips, Draws, labels_of, linear_guess
from wanmoe.train.judges.nets import CROP

Shape = tuple[int, int, int]


class Grid:
    """One clip whose latent says where each cell was, with a tip and a region about it."""

    root = "grid"

    def __init__(self, shape: Shape, tip: tuple[int, float, float] | None, region: bool) -> None:
        at = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij"))
        roi = None
        if region and tip is not None:
            roi = torch.zeros(shape)
            roi[tip[0], int(tip[2] / 8), int(tip[1] / 8)] = 1
        tips = [] if tip is None else [{"frame": 4 * tip[0], "x": tip[1], "y": tip[2]}]
        latent = torch.cat([at, torch.zeros(13, *shape)])
        self.sample = SimpleNamespace(latent=latent, roi=roi, meta={"tips": tips})
        self.buckets, self.keys = {shape: [0]}, ["grid"]

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> SimpleNamespace:
        return self.sample


def draws(shape: Shape, tip: tuple[int, float, float] | None, region: bool) -> Draws:
    return Draws(Clips(Grid(shape, tip, region), torch.ones(1, 1)), lambda latent: latent, 3, 0.0)


@pytest.mark.parametrize("shape", [(21, 60, 104), (5, 12, 12), (1, 2, 3), (3, 40, 8)])
def test_cutting_and_turning_move_region_and_tips_with_the_latent(shape) -> None:
    tip = (shape[0] // 2, shape[2] * 8 - 5.0, 6.5)
    draw = draws(shape, tip, True)
    seen = set()
    for _ in range(12):
        found = draw(2)
        assert found.x.shape[2:] == tuple(map(min, CROP, shape)) and found.roi.shape == found.x[:, 0].shape
        for latent, roi, tips in zip(found.x, found.roi, found.tips, strict=True):
            (cell,) = roi.nonzero().tolist()
            k, row, col = cell
            assert latent[:3, k, row, col].tolist() == [tip[0], int(tip[2] / 8), int(tip[1] / 8)]
            x, y = tips[k, 0].tolist()
            assert (int(y // 8), int(x // 8)) == (row, col) and tips.isnan().sum() == tips.numel() - 2
            seen.add((x % 8, y % 8))
    assert len(seen) > 1 or shape[1] * shape[2] == 6


def test_a_clip_without_a_region_keeps_its_height_and_width() -> None:
    assert draws((21, 60, 104), None, False)(1).x.shape == (1, 16, 2, 60, 104)


def test_the_same_seed_draws_the_same(drawn) -> None:
    dataset = ShardDataset(drawn)
    clips = Clips(dataset, labels_of(dataset, ExpertSet()))
    one, two = (Draws(clips, lambda latent: latent, 5, 0.8) for _ in range(2))
    for first, second in zip((*one(3), *one(3)), (*two(3), *two(3)), strict=True):
        assert torch.equal(first.nan_to_num(), second.nan_to_num())
    other = Draws(clips, lambda latent: latent, 6, 0.8)(3)
    assert not torch.equal(other.x, Draws(clips, lambda latent: latent, 5, 0.8)(3).x)


def test_rare_classes_are_drawn_as_often(make, tmp_path, scenes) -> None:
    names = ["Scissors"] * 15 + ["Other"]
    rows = [(s, x, r, name, t) for (s, x, r, _, t), name in zip(scenes, names, strict=False)]
    dataset = ShardDataset(make(tmp_path / "s", rows))
    found = Draws(Clips(dataset, labels_of(dataset, ExpertSet())), lambda latent: latent, 0, 0.0)(400)
    assert 0.4 < found.labels[:, 3].mean() < 0.6


def test_half_of_the_regions_are_withheld_and_the_others_moved_by_a_cell(drawn) -> None:
    draw = Draws(Clips(ShardDataset(drawn), None), lambda latent: latent, 0, 0.0)
    roi = torch.zeros(400, 1, 5, 5)
    roi[:, :, 2, 2] = 1
    moved = draw.moved(roi)
    kept = moved.sum((1, 2, 3)) > 0
    assert 0.4 < kept.float().mean() < 0.6
    assert moved[kept].sum() == kept.sum() and (moved[kept].mean((0, 1))[1:4, 1:4] > 0).all()


def test_the_linear_guess_is_the_best_line(drawn) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(4, 20_000, generator=generator) for _ in range(2))
    t = torch.tensor([0.0, 0.3, 0.8, 1.0])
    guess = linear_guess(x0, t, noise)
    assert torch.equal(guess[0], x0[0]) and not guess[3].any()
    x_t = (1 - t[:, None]) * x0 + t[:, None] * noise
    line = (x_t * x0).sum(1, keepdim=True) / (x_t * x_t).sum(1, keepdim=True) * x_t
    assert torch.allclose(guess[1:3], line[1:3], atol=0.1)


def test_held_out_noise_belongs_to_the_clip(drawn) -> None:
    clips = Clips(ShardDataset(drawn, "val"), None)
    alone = clips.whole([3], lambda latent: latent, 0.4).x[0]
    assert torch.equal(alone, clips.whole([1, 3], lambda latent: latent, 0.4).x[1])


def test_an_unknown_label_names_the_sample(make, tmp_path, scenes) -> None:
    dataset = ShardDataset(make(tmp_path / "s", [(*scenes[0][:3], "Spoon", [])]))
    with pytest.raises(WanmoeError, match="sample train_000_abcdef01: unknown expert 'Spoon'.*--config"):
        labels_of(dataset, ExpertSet())
