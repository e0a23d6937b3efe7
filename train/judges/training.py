"""Trains the two judges from labelled shards, in minutes on a CPU.

Letters: B clips, F, H, W latent frames, height, width, N tips of a frame, K classes.
"""

import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as fn
from torch import Tensor
from tqdm import tqdm

from ...moe_lora.errors import WanmoeError
from ...moe_lora.instruments import ExpertSet
from ...moe_lora.wan.codec import SPACE_STRIDE, Codec
from ..data.shards import ShardDataset
from .examples import Clips, Draws, Examples, View, labels_of
from .held_out import classifier_figures, detector_figures
from .judge import LATENT, PIXELS, Classifier, Detector, JudgeInfo, save_judge
from .nets import widened
from .report import write_classifier_report, write_detector_report

_SMOOTHING = 0.05  # of the labels: keeps the logits of a sure judge finite, and its gradient alive
_ATTENTION = 0.3  # weight of "without a region, look where it was"
_SPREAD = 0.8  # cells: deviation of the bell about a tip in which a high heat is punished less
_NOISE = {Classifier: 0.8, Detector: 0.6}  # highest noise level in training
_WARMUP = 0.15  # share of the steps in which the learning rate rises
_DECAY = 0.05


@dataclass(frozen=True)
class Recipe:
    """How long and how a judge is trained; `steps` batches of `batch` clips, one-cycle learning rate."""

    steps: int = 400
    batch: int = 16
    lr: float = 4e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1 or not self.lr > 0 or self.seed < 0:
            raise WanmoeError(
                f"steps and batch are 1 or more, lr positive, seed 0 or more; got steps {self.steps}, batch "
                f"{self.batch}, lr {self.lr}, seed {self.seed}"
            )


AnyJudge = TypeVar("AnyJudge", Classifier, Detector)


def train_classifier(
    shards: str | Path,
    out: str | Path,
    *,
    experts: ExpertSet,
    space: str = LATENT,
    codec: Codec | None = None,
    recipe: Recipe | None = None,
    device: str | torch.device = "cpu",
) -> Classifier:
    """Trains a classifier on the training clips that have a label, measures it on the held-out ones, and
    writes `out` with a report (.html, .json) beside it.

    Args:
        experts: the classes.
        space: "latent", or "pixels": it is then given the video that `codec` makes of the latents, which for
            a real VAE wants a GPU.

    Raises:
        WanmoeError: no labels, one class alone, no held-out clips, a codec that did not make the latents, or
            a file that cannot be written. Nothing is then left behind.
    """
    out, recipe = _usable(out), recipe or Recipe()
    train, val = ShardDataset(shards, "train"), ShardDataset(shards, "val")
    view = _view(space, codec, train, device)
    clips, held_out = Clips(train, labels_of(train, experts)), Clips(val, labels_of(val, experts))
    _check_labels(clips, held_out, experts)
    facts = _facts(train, clips, recipe) | {"space": space, "experts": experts.experts}
    began = time.monotonic()
    judge = _started(Classifier, facts, recipe.seed, device)
    draws = Draws(clips, view, recipe.seed, _NOISE[Classifier], decoded=space == PIXELS)

    def loss(found: Examples) -> Tensor:
        return classifier_loss(judge, found, draws.moved(found.roi).to(device))

    _fit(judge, draws, loss, recipe, device)
    figures = classifier_figures(judge, held_out, view, device)
    judge = _finished(judge, facts, figures, time.monotonic() - began)
    save_judge(judge, out)
    write_classifier_report(judge.info, out)
    return judge


def train_detector(
    shards: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    device: str | torch.device = "cpu",
) -> Detector:
    """Trains a tip detector on the training clips that have tips, measures it on the held-out ones, and
    writes `out` with a report (.html, .json) beside it; raises as `train_classifier` does."""
    out, recipe = _usable(out), recipe or Recipe()
    train, val = ShardDataset(shards, "train"), ShardDataset(shards, "val")
    clips, held_out = Clips(train, None), Clips(val, None)
    for split, own in (("train", clips), ("val", held_out)):
        if not own:
            raise WanmoeError(
                f"{shards}: no {split!r} sample has a tip at the moment of a latent frame (frame 4 k of its "
                "window); give `tips` in clips.jsonl and prepare again"
            )
    facts = _facts(train, clips, recipe)
    began = time.monotonic()
    judge = _started(Detector, facts, recipe.seed, device)
    draws = Draws(clips, _same, recipe.seed, _NOISE[Detector])
    _fit(judge, draws, lambda found: detector_loss(judge, found), recipe, device)
    judge = _finished(judge, facts, detector_figures(judge, held_out, device), time.monotonic() - began)
    save_judge(judge, out)
    write_detector_report(judge.info, out)
    return judge


def classifier_loss(judge: Classifier, found: Examples, roi: Tensor) -> Tensor:
    """Cross-entropy of the labels, and where a clip's region was withheld (`roi` all 0) the logarithm of the
    weight that the judge gave to where it was."""
    logits, weights = judge.weigh(found.x, roi)
    right = (1 - _SMOOTHING) * found.labels + _SMOOTHING / found.labels.shape[1]
    share = (weights * widened(found.roi)).sum((1, 2, 3))
    return fn.cross_entropy(logits, right) - _ATTENTION * torch.log(share + 1e-4).mean()


def detector_loss(judge: Detector, found: Examples) -> Tensor:
    """Focal loss of the heat (CornerNet, Law and Deng, ECCV 2018; CenterNet) and L1 of the offsets, in cells.

    Frames without a mark are left out: whether they show a tip was not said. The offsets of the eight cells
    about a tip are trained as well, so that a peak which is one cell off still points to it.
    """
    heat, offsets = judge(found.x)
    height, width = heat.shape[2:]
    places = (found.tips + 0.5) / SPACE_STRIDE  # [B, F, N, 2], in cells
    rows = torch.arange(height, device=heat.device) + 0.5
    cols = torch.arange(width, device=heat.device) + 0.5
    across = places[..., 0, None, None] - cols  # [B, F, N, 1, W]
    down = places[..., 1, None, None] - rows[:, None]  # [B, F, N, H, 1]
    far = (across**2 + down**2).nan_to_num(nan=float("inf"))  # [B, F, N, H, W]
    near = far.amin(2)
    marked = near.isfinite()
    reach = torch.maximum(across.abs(), down.abs()).nan_to_num(nan=float("inf")).amin(2)
    tip, about = reach <= 0.5, reach <= 1.5
    bell = torch.exp(-near / (2 * _SPREAD**2))
    sure = heat.sigmoid()
    hit = (1 - sure) ** 2 * fn.logsigmoid(heat)
    miss = (1 - bell) ** 4 * sure**2 * fn.logsigmoid(-heat)
    focal = -(torch.where(tip, hit, miss) * marked).sum() / tip.sum().clamp(min=1)
    nearest = far.argmin(2, keepdim=True)
    wanted = torch.stack(
        [side.expand_as(far).gather(2, nearest)[:, :, 0] for side in (across, down)], 1
    ).nan_to_num()
    shift = ((offsets - wanted).abs().sum(1) * about).sum() / about.sum().clamp(min=1)
    return focal + shift


def _fit(
    judge: Classifier | Detector,
    draws: Draws,
    loss_of: Callable[[Examples], Tensor],
    recipe: Recipe,
    device: str | torch.device,
) -> None:
    optimizer = torch.optim.AdamW(judge.net.parameters(), lr=recipe.lr, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=max(recipe.steps, 2), pct_start=_WARMUP
    )
    steps = tqdm(range(recipe.steps), desc=f"train {type(judge).__name__.lower()}", unit=" steps")
    for _ in steps:
        found = Examples(*(part.to(device) for part in draws(recipe.batch)))
        loss = loss_of(found)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(judge.net.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise WanmoeError(f"the {type(judge).__name__.lower()} diverged; try --lr {recipe.lr / 4:g}")
        optimizer.step()
        schedule.step()
        steps.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    judge.freeze()


def _started(kind: type[AnyJudge], facts: dict[str, Any], seed: int, device: str | torch.device) -> AnyJudge:
    """An untrained judge; its first weights depend on the seed alone."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        judge = kind(JudgeInfo(**facts, held_out={}))
    return judge.to(device)


def _finished(judge: AnyJudge, facts: dict[str, Any], figures: dict[str, Any], seconds: float) -> AnyJudge:
    judge.info = JudgeInfo(**facts, held_out=figures | {"seconds": round(seconds, 1)})
    return judge


def _facts(train: ShardDataset, clips: Clips, recipe: Recipe) -> dict[str, Any]:
    sizes = sorted({train.rows[n]["bucket"] for n in clips.picks})
    versions = {name: importlib.metadata.version(name) for name in ("wanmoe", "torch")}
    return {
        "sizes": sizes,
        "codec": dict(train.manifest["codec"]),
        "shards_sha256": train.fingerprint,
        "clips": len(clips),
        "steps": recipe.steps,
        "batch": recipe.batch,
        "lr": recipe.lr,
        "seed": recipe.seed,
        "versions": versions,
    }


def _view(space: str, codec: Codec | None, train: ShardDataset, device: str | torch.device) -> View:
    if space == LATENT:
        return _same
    if space != PIXELS:
        raise WanmoeError(f"--space {space!r} is unknown; known are: {LATENT}, {PIXELS}")
    made_by = train.manifest["codec"]
    if codec is None or codec.fingerprint != made_by["fingerprint"]:
        given = "none was given" if codec is None else f"{codec.name} did not ({codec.fingerprint[:12]})"
        raise WanmoeError(
            f"{train.root}: pixels need the codec that made the latents, {made_by['name']} "
            f"({made_by['fingerprint'][:12]}); {given}; give it with --vae"
        )
    made = codec

    @torch.no_grad()
    def decode(latent: Tensor) -> Tensor:
        return made.decode(latent.to(device)).float().clamp(-1, 1)

    return decode


def _same(latent: Tensor) -> Tensor:
    return latent


def _check_labels(clips: Clips, held_out: Clips, experts: ExpertSet) -> None:
    root = clips.dataset.root
    for split, own in (("train", clips), ("val", held_out)):
        if not own:
            raise WanmoeError(
                f"{root}: no {split!r} sample has an instrument label; give `instruments` in clips.jsonl and "
                "prepare again"
            )
    seen = [name for name, total in zip(experts.names, clips.labels.sum(0), strict=True) if total > 0]
    if len(seen) < 2:
        raise WanmoeError(
            f"{root}: all labels of the training clips are {seen[0]!r}; a classifier needs two "
            "instruments or more to tell apart"
        )


def _usable(out: str | Path) -> Path:
    """`out`, whose folder is made; checked before minutes of training."""
    out = Path(out)
    if out.suffix != ".safetensors" or out.is_dir():
        raise WanmoeError(f"{out}: a judge is written to a file named *.safetensors")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WanmoeError(f"{out}: the folder cannot be made ({error.strerror})") from error
    return out
