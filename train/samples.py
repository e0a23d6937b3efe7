"""Videos of held-out captions while training goes on, made by all ranks and all models together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..moe_lora.video import to_frames, write_video
from ..moe_lora.wan.sampling import Context, sample, sampling_defaults
from .config import TrainerConfig
from .data.batch import Batch, LabelGates, collate
from .data.shards import ShardDataset
from .noise import sample_generator
from .objective import Inputs, open_codec
from .side import Side
from .validate import NOISE_SEED

FPS = 16


class Samples:
    """The videos of one run: the first held-out clip of each instrument, from the same noise at each step.

    Args:
        sides: the models; a side without a partner serves all noise levels.
        enter: brings a model to the card, where models take turns.

    Raises:
        WanmoeError: the codec is not that of the shards.
    """

    def __init__(
        self,
        config: TrainerConfig,
        sides: Sequence[Side],
        held_out: ShardDataset,
        gates: LabelGates,
        device: torch.device,
        enter: Callable[[Side], None],
        beat: Callable[[], None],
    ) -> None:
        self.steps, self.sides, self.enter = config.train.sample_steps, list(sides), enter
        self.beat = beat
        self.folder, self.device = config.train.run / "samples", device
        self.codec = open_codec(str(config.objective.vae), held_out, device)
        null = held_out.null_context
        self.null_context = None if null is None else null.to(device)
        watch = sides[0].watch
        first = {owner: index for index, owner in reversed(list(enumerate(watch.labels)))}
        shown = {watch.experts[owner]: first[owner] for owner in sorted(first) if owner >= 0}
        self.clips: list[tuple[str, Batch]] = [
            (name, collate([held_out[index]], [index], gates))
            for name, index in (shown or {"clip": 0}).items()
        ]

    def make(self, step: int, write: bool) -> list[Path]:
        """Draws every clip, a collective; returns the files, which rank 0 writes (`write`)."""
        paths = []
        for name, batch in self.clips:
            latent = self._draw(batch)
            if write:
                path = self.folder / f"step_{step:06d}" / f"{file_name(name)}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                with torch.no_grad():
                    frames = to_frames(self.codec.decode(latent)[0])
                write_video(path, frames, FPS, {"step": str(step), "instrument": name, "clip": batch.keys[0]})
                paths.append(path)
        return paths

    def _draw(self, batch: Batch) -> Tensor:
        stream = sample_generator(NOISE_SEED, batch.positions[0], "sample")
        noise = torch.randn(batch.latent.shape, generator=stream).to(self.device)
        models = {side.name: self._denoiser(side, batch) for side in self.sides}
        whole = models.get("both")
        config = self.sides[0].dit.config
        defaults = sampling_defaults(config, two_models=whole is None)
        return sample(
            models.get("high", whole),
            models.get("low", whole),
            noise,
            [tokens.to(self.device) for tokens in batch.context],
            None if self.null_context is None else [self.null_context],
            steps=self.steps,
            shift=defaults.shift,
            boundary=config.boundary,
            guidance=(1.0, 1.0) if self.null_context is None else defaults.guidance,
        )

    def _denoiser(self, side: Side, batch: Batch) -> Callable[..., Tensor]:
        """The model as `sample` calls it, with the gates of the clip's labels or of its router."""
        inputs: Inputs = side.objective.as_it_is(batch, side.dtype)

        def predict(x: Tensor, t: Tensor, context: Context, *_: object) -> Tensor:
            self.beat()
            self.enter(side)
            side.engine.eval()
            text = [tokens.to(self.device, side.dtype) for tokens in context]
            return side.predict(inputs._replace(x_t=x, t=t.float(), context=text)).v

        return predict


def file_name(name: str) -> str:
    """An instrument's name as a file is called."""
    return "".join(letter if letter.isalnum() else "-" for letter in name).lower()
