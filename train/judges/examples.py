"""What a judge is trained and measured on: labelled clips, cut and turned and blurred by noise.

Letters: B clips, F, H, W latent frames, height, width, N tips of a frame, K classes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...moe_lora.errors import WanmoeError
from ...moe_lora.instruments import ExpertSet
from ...moe_lora.seeding import seeded_generator
from ...moe_lora.wan.codec import SPACE_STRIDE
from ..data.shards import ShardDataset
from .judge import class_weights
from .measures import pad_tips, true_tips
from .nets import CROP

_WHOLE_FRAMES = 2  # of clips whose instrument is somewhere unknown: they keep their height and width instead
_KEPT_BYTES = 1 << 30  # of clips kept in memory between the draws; what does not fit is read again

View = Callable[[Tensor], Tensor]
"""A latent [B, 16, F, H, W] as what a judge is given: itself, or the video that a codec makes of it."""


class Clip(NamedTuple):
    """One clip with its truth."""

    latent: Tensor
    """[16, F, H, W], as stored."""
    roi: Tensor
    """[F, H, W], all 0 where none is known."""
    tips: Tensor
    """[F, N, 2], x and y in pixels; NaN where none is marked."""


class Examples(NamedTuple):
    """Clips of one size with their truth."""

    x: Tensor
    """A latent [B, 16, F, H, W] or a video [B, 3, 4 F - 3, 8 H, 8 W], fp32."""
    roi: Tensor
    """[B, F, H, W]; all 0 where none is known."""
    tips: Tensor
    """[B, F, N, 2], in pixels of the cut; NaN where none is marked."""
    labels: Tensor
    """[B, K]"""


class Clips:
    """The clips of one split that carry the truth that a judge needs.

    Args:
        labels: weights of the classes of each sample of the dataset, [n, K]; None takes the clips with tips.
    """

    def __init__(self, dataset: ShardDataset, labels: Tensor | None) -> None:
        self.dataset = dataset
        self._kept: dict[int, Clip] = {}
        self._room = _KEPT_BYTES
        if labels is None:
            self.picks = [n for n in range(len(dataset)) if not self.read(n).tips.isnan().all()]
            self.labels = torch.ones(len(dataset), 1)
        else:
            self.picks = [n for n in range(len(dataset)) if labels[n].sum() > 0]
            self.labels = labels

    def __len__(self) -> int:
        return len(self.picks)

    def read(self, index: int) -> Clip:
        """A sample of the dataset."""
        if index in self._kept:
            return self._kept[index]
        sample = self.dataset[index]
        shape = sample.latent.shape[1:]
        roi = torch.zeros(shape) if sample.roi is None else sample.roi
        clip = Clip(sample.latent, roi, true_tips(sample.meta, shape[0]))
        size = sum(tensor.nbytes for tensor in clip)
        if size <= self._room:
            self._room -= size
            self._kept[index] = clip
        return clip

    def buckets(self) -> list[list[int]]:
        """The usable samples by latent size."""
        usable = set(self.picks)
        found = ([n for n in own if n in usable] for own in self.dataset.buckets.values())
        return [own for own in found if own]

    def batches(self, size: int) -> list[list[int]]:
        """All usable samples once, in batches of one latent size."""
        return [own[at : at + size] for own in self.buckets() for at in range(0, len(own), size)]

    def whole(self, picks: Sequence[int], view: View, t: float = 0.0) -> Examples:
        """Whole clips of one size, at noise level `t` (`linear_guess`); a clip's noise is always the same."""
        clips = [self.read(n) for n in picks]
        latent = torch.stack([clip.latent.float() for clip in clips])
        if t > 0:
            streams = (seeded_generator("judge", self.dataset.keys[n]) for n in picks)
            noise = torch.stack([torch.randn(latent.shape[1:], generator=stream) for stream in streams])
            latent = linear_guess(latent, torch.full((len(picks),), t), noise)
        roi = torch.stack([clip.roi for clip in clips])
        return Examples(view(latent), roi, pad_tips([clip.tips for clip in clips]), self.labels[list(picks)])


class Draws:
    """Random training examples; every class, of those that there are, is drawn equally often.

    Args:
        most: half of the clips get noise of a level between 0 and this.
        decoded: `view` decodes, so that a piece must begin with the clip.
    """

    def __init__(self, clips: Clips, view: View, seed: int, most: float, decoded: bool = False) -> None:
        self.clips, self.view, self.most, self.decoded = clips, view, most, decoded
        self.generator = seeded_generator("judge", seed)
        self.buckets = clips.buckets()
        labels = clips.labels[clips.picks]
        share = (clips.labels / labels.sum(0).clamp(min=1e-9)).sum(1)
        self.weights = [share[own] for own in self.buckets]
        self.totals = torch.stack([weights.sum() for weights in self.weights])

    def __call__(self, count: int) -> Examples:
        """The next `count` clips, of one latent size."""
        bucket = int(torch.multinomial(self.totals, 1, generator=self.generator))
        drawn = torch.multinomial(self.weights[bucket], count, replacement=True, generator=self.generator)
        picks = [self.buckets[bucket][n] for n in drawn.tolist()]
        parts = [self._cut(self.clips.read(n)) for n in picks]
        latent = torch.stack([part.latent.float() for part in parts])
        t = self._uniform(count) * self.most * (self._uniform(count) < 0.5)
        noise = torch.randn(latent.shape, generator=self.generator)
        found = Examples(
            self.view(linear_guess(latent, t, noise)),
            torch.stack([part.roi for part in parts]),
            pad_tips([part.tips for part in parts]),
            self.clips.labels[picks],
        )
        return self._turned(found)

    def _cut(self, clip: Clip) -> Clip:
        """A piece of at most CROP with the instrument in it, where that is known."""
        frames, height, width = clip.roi.shape
        marked = clip.tips[..., 0].isnan().logical_not().nonzero()
        inside = clip.roi.nonzero() if clip.roi.any() else None
        size = CROP
        if len(marked):
            k, n = marked[self._below(len(marked))].tolist()
            x, y = ((clip.tips[k, n] + 0.5) / SPACE_STRIDE).tolist()
            middle = [k, int(y), int(x)]
        elif inside is not None:
            middle = inside[self._below(len(inside))].tolist()
        else:
            size = (_WHOLE_FRAMES, height, width)
            middle = [self._below(frames), 0, 0]
        spans: list[slice] = []
        for at, want, have in zip(middle, size, (frames, height, width), strict=True):
            length = min(want, have)
            start = at - self._below(length)
            if self.decoded and not spans:
                start = 0
            start = min(max(start, 0), have - length)
            spans.append(slice(start, start + length))
        k, rows, cols = spans
        origin = torch.tensor([cols.start, rows.start]) * float(SPACE_STRIDE)
        return Clip(clip.latent[:, k, rows, cols], clip.roi[k, rows, cols], clip.tips[k] - origin)

    def _turned(self, found: Examples) -> Examples:
        """The batch mirrored and, where square, transposed at random.

        A codec's latent of a mirrored picture is not its latent mirrored, but near it in its lowest bands:
        with 160 clips the turns took a tip detector from 80 to 87 % of held-out tips within 8 px.
        """
        x, roi, tips, labels = found
        height, width = roi.shape[2:]
        if self._below(2):
            tips = torch.stack([width * SPACE_STRIDE - 1 - tips[..., 0], tips[..., 1]], -1)
            x, roi = x.flip(4), roi.flip(3)
        if self._below(2):
            tips = torch.stack([tips[..., 0], height * SPACE_STRIDE - 1 - tips[..., 1]], -1)
            x, roi = x.flip(3), roi.flip(2)
        if height == width and self._below(2):
            x, roi, tips = x.transpose(3, 4), roi.transpose(2, 3), tips.flip(-1)
        return Examples(x, roi, tips, labels)

    def moved(self, roi: Tensor) -> Tensor:
        """Regions [B, F, H, W], each moved by up to a cell, and half of them emptied: "no region"."""
        grown = torch.nn.functional.pad(roi, (1, 1, 1, 1))
        height, width = roi.shape[2:]
        out = []
        for clip in grown:
            y, x = self._below(3), self._below(3)
            out.append(clip[:, y : y + height, x : x + width])
        kept = (self._uniform(len(roi)) < 0.5).view(-1, 1, 1, 1)
        return torch.stack(out) * kept

    def _uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator)

    def _below(self, limit: int) -> int:
        return int(torch.randint(limit, (), generator=self.generator))


def linear_guess(latent: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """The best linear guess of x0 from x_t for values of mean 0 and variance 1, as latents about are.

    It stands for the x0-guess of a model that knows nothing else; a trained model's keeps more of the clip
    and errs in other ways. `latent`, `noise` [B, ...], `t` [B] in [0, 1]; t = 0 is the latent itself, t = 1
    is 0.
    """
    t = t.to(latent).view(-1, *(1,) * (latent.ndim - 1))
    return (1 - t) / ((1 - t) ** 2 + t**2) * ((1 - t) * latent + t * noise)


def labels_of(dataset: ShardDataset, experts: ExpertSet) -> Tensor:
    """[n, K]: the label of each sample, from the index alone; 0 where it has none.

    Raises WanmoeError for a label that is none of the experts.
    """
    rows = []
    for index, key in enumerate(dataset.keys):
        try:
            rows.append(class_weights(experts, dataset.instruments(index)))
        except WanmoeError as error:
            raise WanmoeError(
                f"{dataset.root}: sample {key}: {error}; name your labels under adapter.experts of a config "
                "and give it with --config"
            ) from error
    return torch.stack(rows)
