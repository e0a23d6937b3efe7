"""Clips to shards: plan, encode what is missing on every rank, then write the shards, in the plan's order.

Every piece is encoded alone and kept on disk when it is done (`spool`): neither the number of ranks nor a
kill changes a byte of the shards.
"""

import datetime
import hashlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar, cast

import av
import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ...moe_lora.errors import WanmoeError
from ...moe_lora.files import file_sha256
from ...moe_lora.instruments import ExpertSet
from ...moe_lora.video import VideoDamagedError, VideoEndError, iter_windows
from ...moe_lora.wan.codec import Codec
from ...moe_lora.wan.text import TextEncoder
from ..ranks import agree, init_distributed, together
from ..staging import Staging
from .clips import Clip
from .encode import Encoders, PieceEncoder, encode_caption, encode_router_prompts
from .plan import (
    Instruments,
    Piece,
    Plan,
    Settings,
    Size,
    Source,
    files_of,
    label,
    make_plan,
    read_source,
    recipe,
    summary,
)
from .router_prompts import RouterPrompt
from .shard_writer import ShardWriter
from .shards import FORMAT, ShardError, check_size, is_shard_file, read_manifest, read_prompts
from .spool import Spool, prompts_name, text_name
from .store import LocalStore

__all__ = ["Instruments", "Ranks", "join_ranks", "label", "prepare"]

# A rank waits for the slowest one, for hours if need be; one that dies is noticed at once, by its connection.
_PATIENCE = datetime.timedelta(days=7)
_BAR_AFTER = 2.0  # seconds
_TOGETHER = 32  # router prompts encoded at once and kept as one: the same ones whatever is missing
_COUNT_EVERY = 2.0  # seconds; a folder of 100,000 samples is listed in a tenth of one
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process among those that prepare together."""

    rank: int = 0
    count: int = 1

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The contiguous run of items that is this rank's."""
        start, stop = (len(items) * number // self.count for number in (self.rank, self.rank + 1))
        return items[start:stop]

    def together(self, action: Callable[[], Item]) -> Item:
        """Does `action` on every rank; where it raises `WanmoeError` on any, all raise."""
        return action() if self.count == 1 else together(action)

    def gather(self, items: list[Item]) -> list[Item]:
        """The items of all ranks, in the order of the ranks."""
        if self.count == 1:
            return items
        every: list[list[Item]] = [[] for _ in range(self.count)]
        dist.all_gather_object(every, items)
        return [item for own in every for item in own]


def join_ranks() -> Ranks:
    """Join the ranks that the launcher started; on a GPU machine each takes its own."""
    rank, count, _ = init_distributed("gloo", _PATIENCE)
    return Ranks(rank, count)


def prepare(
    clips: Sequence[Clip],
    out: str | Path,
    *,
    codec: Codec | Callable[[], Codec],
    text_encoder: TextEncoder | Callable[[], TextEncoder],
    experts: ExpertSet,
    size: Size | Sequence[Size],
    frames: int | Sequence[int],
    fps: float | None = None,
    window_stride: int | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    task: str = "t2v",
    router_prompts: Sequence[RouterPrompt] = (),
    progress: bool = True,
    ranks: Ranks = Ranks(),
) -> dict[str, Any]:
    """Encode clips into a folder of shards; returns its manifest, with the histogram per split and
    instrument ({} on ranks other than 0).

    A clip is cut into windows of the longest of `frames` (4 n + 1) at `fps` (None: the file's own rate), then
    of the shorter ones; a clip that is a window already stays as it is. Each is scaled to cover the `size`
    (H, W, multiples of 16) of the nearest shape and cut in the centre; tips, boxes and masks follow. `task`
    "i2v" also stores the condition on the first frame. Instruments come from the clip's labels, else a
    `[Tools in: ...]` of its caption, else the caption's keywords. Of `router_prompts`, texts without a clip
    that teach a router, the pooled embeddings are stored. Codec and text encoder may be functions that load
    them: then no card holds both.

    Finished samples are kept in `<out>.work` until the shards are written: the same call after a kill goes on
    from there. With `progress` a bar and a summary go to standard error. Raises `WanmoeError` on unreadable
    videos, unknown instruments, sizes that cannot be, where nothing is left, and where another process
    prepares the same folder; `out` then stays as it was.
    """
    settings = Settings(
        sizes=_sizes(size),
        frames=(frames,) if isinstance(frames, int) else tuple(frames),
        fps=fps,
        window_stride=window_stride,
        val_fraction=val_fraction,
        seed=seed,
        task=task,
    )
    progress = progress and not ranks.rank
    encoders = ranks.together(lambda: Encoders(codec, text_encoder))
    plan = make_plan(clips, experts, _sources(clips, ranks, progress), settings)
    wanted = recipe(plan, settings, _makers(encoders, experts))
    if ranks.count > 1:
        samples = hashlib.sha256(repr(wanted["samples"]).encode()).hexdigest()
        texts = hashlib.sha256(repr(router_prompts).encode()).hexdigest()
        parts = {part: made["fingerprint"] for part, made in encoders.made_by.items()}
        agree({"clips": samples, "router prompts": texts} | parts)
    said = {"router_prompts": [list(prompt) for prompt in router_prompts]} if router_prompts else {}
    made = hashlib.sha256(json.dumps(wanted | said, sort_keys=True).encode()).hexdigest()
    with Spool(out) as spool:
        job = _Job(plan, settings, spool, ranks, encoders, progress, router_prompts)
        ranks.together(lambda: None if ranks.rank else job.open(out, wanted))
        former, complete = ranks.gather([] if ranks.rank else [_former(out, made)])[0]
        if former is not None and complete:
            job.say(f"{out}: complete already, made of the same clips in the same way")
            return {} if ranks.rank else former
        if former is not None:
            job.say(f"{out}: shards of other clips or settings, which the new ones will replace")
        finished = job.finished()
        ranks.together(lambda: job.encode(finished))
        if ranks.rank:
            return {}
        manifest = job.write(out, experts, made)
    for line in summary(manifest, plan):
        job.say(line)
    return manifest


class _Job:
    """The encoding of one plan by one rank."""

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        spool: Spool,
        ranks: Ranks,
        encoders: Encoders,
        progress: bool,
        prompts: Sequence[RouterPrompt],
    ) -> None:
        self.plan, self.settings, self.spool, self.ranks = plan, settings, spool, ranks
        self.encoders, self.progress = encoders, progress
        self.texts = {text_name(caption): caption for caption in plan.captions()}
        self.prompts = prompts
        groups = [prompts[at : at + _TOGETHER] for at in range(0, len(prompts), _TOGETHER)]
        self.pooled = {prompts_name(group): group for group in groups}

    def say(self, line: str) -> None:
        """A line on standard error, above the bar, where progress is shown."""
        if self.progress:
            tqdm.write(line, file=sys.stderr)

    def open(self, out: str | Path, wanted: dict[str, Any]) -> None:
        """Lock the work folder, and refuse a place that could not be written to after hours."""
        Staging(out, is_shard_file).discard()
        if (why := self.spool.open(wanted)) is not None:
            self.say(f"{self.spool.folder}: starting afresh, its samples were made otherwise: {why}")

    def finished(self) -> set[str]:
        """The names of what is there and undamaged; each rank checks its share of the files."""
        names = [*self.texts, *self.pooled, *(piece.key for piece in self.plan.pieces)]
        every = self.ranks.gather([(name, self.spool.sound(name)) for name in self.ranks.share(names)])
        for name in (name for name, sound in every if sound is False):
            self.say(f"damaged, encoded again: {self.spool.path(name)}")
        return {name for name, sound in every if sound}

    def encode(self, finished: set[str]) -> None:
        """Encode this rank's share of what is missing; a rank that fails stops the others."""
        missing = [piece for piece in self.plan.pieces if piece.key not in finished]
        done = len(self.plan.pieces) - len(missing)
        if finished:
            self.say(f"{done} of {len(self.plan.pieces)} samples are encoded already")
        try:
            with torch.no_grad(), _deterministic():
                self._encode_texts([name for name in self.texts if name not in finished])
                self._encode_prompts([name for name in self.pooled if name not in finished])
                self._encode_pieces(self.ranks.share(missing), done)
        except WanmoeError:
            self.spool.stop()
            raise

    def write(self, out: str | Path, experts: ExpertSet, made: str) -> dict[str, Any]:
        """Write the shards from finished samples, in the order of the plan; returns the manifest."""
        context = lru_cache(64)(lambda caption: self.spool.get(text_name(caption))[0]["context"])
        made_by = (self.encoders.described(part) for part in ("codec", "text_encoder"))
        writer = ShardWriter(out, *made_by, null_context=context(""))
        with writer:
            if self.pooled:
                pooled = torch.cat([self.spool.get(name)[0]["pooled"] for name in self.pooled])
                writer.set_router_prompts(pooled, self.prompts)
            for piece in self._bar(self.plan.pieces, "write shards"):
                tensors, meta = self.spool.get(piece.key)
                if "dropped" in meta:
                    self.plan.drop(piece.clip.origin, meta["dropped"])
                    continue
                latent = tensors.pop("latent")
                split = piece.clip.split or "train"
                writer.add(piece.key, split, latent, context(piece.clip.caption), meta, **tensors)
            writer.settings = {
                "task": self.settings.task,
                "sizes": [list(size) for size in self.settings.sizes],
                "frames": list(self.settings.frames),
                "fps": self.settings.fps,
                "seed": self.settings.seed,
                "experts": list(experts.names),
                "dropped": dict(sorted(self.plan.dropped.items())),
                "notes": self.plan.notes,
                "recipe": made,
            }
        return writer.manifest

    def _encode_texts(self, names: Sequence[str]) -> None:
        encoder = self.encoders.text_encoder
        assert encoder is not None
        for name in self.ranks.share(names):
            if self.spool.stopping:
                return
            context = encode_caption(encoder, self.texts[name])
            self.spool.put(name, {"context": context}, {"caption": self.texts[name]})

    def _encode_prompts(self, names: Sequence[str]) -> None:
        if not names:
            return
        encoder = self.encoders.text_encoder
        assert encoder is not None
        mine = self.ranks.share(names)
        for name in tqdm(mine, "encode prompts", delay=_BAR_AFTER, disable=not self.progress):
            if self.spool.stopping:
                return
            texts = [prompt.text for prompt in self.pooled[name]]
            self.spool.put(name, {"pooled": encode_router_prompts(encoder, texts)}, {"prompts": texts})

    def _encode_pieces(self, pieces: Sequence[Piece], done: int) -> None:
        if not pieces:
            return
        encoder = PieceEncoder(self.encoders.codec(), self.settings.task)
        title = f"encode, {self.ranks.count} ranks" if self.ranks.count > 1 else "encode"
        with self._bar(None, title, total=len(self.plan.pieces), initial=done) as bar:
            counted = time.monotonic()
            for number, (piece, pictures) in enumerate(_read(pieces), start=1):
                if self.spool.stopping:
                    return
                if isinstance(pictures, str):
                    self.spool.put(piece.key, {}, {"dropped": pictures})
                else:
                    self.spool.put(piece.key, *encoder(piece, pictures))
                if self.ranks.count == 1:
                    bar.update()
                elif self.progress and (number == len(pieces) or time.monotonic() - counted > _COUNT_EVERY):
                    bar.update(self.spool.count() - bar.n)
                    counted = time.monotonic()

    def _bar(self, items: Sequence[Piece] | None, title: str, **options: int) -> Any:
        hidden = not self.progress
        return tqdm(items, desc=title, unit=" samples", bar_format=BAR, disable=hidden, **options)


def _former(out: str | Path, made: str) -> tuple[dict[str, Any] | None, bool]:
    """The manifest of the shards at `out` and whether they are those of the recipe `made`.

    None where there are none, or one is not as it was written; those of another recipe are not read for it.
    """
    store = LocalStore(Path(out))
    try:
        manifest, _ = read_manifest(store)
        for shard in manifest["shards"]:
            check_size(store, shard)
        read_prompts(store, manifest)
    except ShardError:
        return None, False
    if manifest.get("recipe") != made:
        return manifest, False
    sound = (file_sha256(Path(out) / shard["name"]) == shard["sha256"] for shard in manifest["shards"])
    return (manifest, True) if all(sound) else (None, False)


def _sizes(size: Size | Sequence[Size]) -> tuple[Size, ...]:
    """One size or several as several."""
    pairs = [size] if isinstance(size[0], int) else size
    return tuple((height, width) for height, width in cast("Sequence[Size]", pairs))


def _sources(clips: Sequence[Clip], ranks: Ranks, progress: bool) -> dict[Path, Source]:
    """Digests and heads of all files, each read by one rank; a bar where that takes more than a moment."""
    videos = {clip.video_path for clip in clips}
    mine = tqdm(
        ranks.share(files_of(clips)), "read files", unit=" files", delay=_BAR_AFTER, disable=not progress
    )
    found = ranks.together(
        lambda: [(path, read_source(path, line, is_video=path in videos)) for path, line in mine]
    )
    return dict(ranks.gather(found))


def _makers(encoders: Encoders, experts: ExpertSet) -> dict[str, Any]:
    """What turns a piece into a sample: other versions and devices give other last digits."""
    return {
        "format": FORMAT,
        "versions": {"wanmoe": importlib.metadata.version("wanmoe")}
        | {library.__name__: str(library.__version__) for library in (torch, np, cv2, av)},
        "experts": list(experts.names),
        **encoders.made_by,
    }


def _deterministic() -> Any:
    """cuDNN chooses its kernels by rule, not by timing them."""
    return torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled,
        benchmark=False,
        deterministic=True,
        allow_tf32=torch.backends.cudnn.allow_tf32,
    )


def _read(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Tensor | str]]:
    """The pictures of every piece, each video decoded once; why not, where it ends before the piece does."""
    for path, group in groupby(pieces, key=lambda piece: piece.clip.video_path):
        left = list(group)
        size = (left[0].fit.height, left[0].fit.width)
        while left:
            done = 0
            try:
                for pictures in iter_windows(path, [piece.window.indices for piece in left], size):
                    yield left[done], pictures
                    done += 1
                break
            except VideoEndError as error:  # some containers say more frames than they hold
                why = "the video ends before the window does"
                if isinstance(error, VideoDamagedError):
                    why = path.name + str(error).removeprefix(str(path))
                missed, end = left[done:], left[done].window.indices[-1]
                yield from ((piece, why) for piece in missed if piece.window.indices[-1] >= end)
                # A shorter window that starts later may end before: one more pass, for these alone.
                left = [piece for piece in missed if piece.window.indices[-1] < end]
