"""One piece of a clip to one encoded sample: its tensors as the shards hold them, and its description.

Letters: F, H, W frames, height, width in pixels; f, h, w the same of the latent.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from ...moe_lora.errors import WanmoeError
from ...moe_lora.motion import clip_flow
from ...moe_lora.routing import pool_text
from ...moe_lora.video import to_model
from ...moe_lora.wan.codec import Codec, image_condition
from ...moe_lora.wan.text import TextEncoder, encode_prompts
from .border import endoscope_border
from .clips import Box, Tip
from .flow import latent_flow
from .plan import Piece
from .region import Mask, MaskReader, latent_region, window_marks

Model = TypeVar("Model", bound=Codec | TextEncoder)


class Encoders:
    """Codec and text encoder of a job, of which a card holds one at a time.

    Each is given as it is, and then stays where it is, or as a function that loads it. The codec is loaded
    twice, first to be described, for umT5-xxl leaves little beside it.
    """

    def __init__(
        self, codec: Codec | Callable[[], Codec], text_encoder: TextEncoder | Callable[[], TextEncoder]
    ) -> None:
        self._codec = codec
        self.made_by = {"codec": _facts(_ready(codec))}
        _free_memory()
        self.text_encoder: TextEncoder | None = _ready(text_encoder)
        self.made_by["text_encoder"] = _facts(self.text_encoder)

    def codec(self) -> Codec:
        """The codec, in the place of the text encoder."""
        self.text_encoder = None
        _free_memory()
        return _ready(self._codec)

    def described(self, part: str) -> dict[str, Any]:
        """What the manifest says of "codec" or "text_encoder"."""
        return {key: self.made_by[part][key] for key in ("name", "fingerprint", "stand_in")}


def _ready(given: Model | Callable[[], Model]) -> Model:
    """The model, loaded where a function was given: a model can be called too, but says what it is."""
    return cast(Model, given) if hasattr(given, "stand_in") else given()


def _facts(model: Codec | TextEncoder) -> dict[str, Any]:
    """What decides a model's last digits: itself, and where it has tensors, their device and dtype."""
    facts = {"name": model.name, "fingerprint": model.fingerprint, "stand_in": model.stand_in}
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            device = tensor.device
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            return facts | {"device": name, "dtype": str(tensor.dtype)}
    return facts


def _free_memory() -> None:
    gc.collect()  # models have cycles of references
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class Annotations(NamedTuple):
    """What is known of a window beside its pictures; shapes as `ShardWriter.add` takes them."""

    tensors: dict[str, Tensor]
    """`picture`; `roi` where something is annotated; `flow`, `visible` where there are frames to compare."""
    tips: list[Tip]
    boxes: list[Box]
    """In frames and pixels of the window."""


class PieceEncoder:
    """Encodes pieces one by one, so that no sample depends on the ones beside it."""

    def __init__(self, codec: Codec, task: str) -> None:
        self.codec, self.task = codec, task
        self._masks = MaskReader()

    def __call__(self, piece: Piece, pictures: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and description of a sample; `pictures` uint8 [F, H, W, 3] are those of its window.

        Raises `WanmoeError` that names the clip's line where values are not finite, masks do not fit, or the
        GPU's memory is too small.
        """
        clip = piece.clip
        video = to_model(pictures)[None]
        known = annotations(piece, pictures, self._masks(clip, piece.info.height, piece.info.width))
        try:
            tensors = {"latent": self.codec.encode(video).cpu()[0]}
            if self.task == "i2v":
                tensors["image_latent"] = image_condition(self.codec, video[0, :, 0], len(pictures)).cpu()[0]
        except torch.OutOfMemoryError as error:
            frames, height, width = pictures.shape[:3]
            raise WanmoeError(
                f"{clip.origin}: the GPU's memory is too small for {frames} frames of {height} x {width}; "
                "give a smaller --size or fewer --frames"
            ) from error
        stored = {name: narrow(tensor, f"{clip.origin}: {name}") for name, tensor in tensors.items()}
        return stored | known.tensors, describe_piece(piece, known)


def annotations(piece: Piece, pictures: Tensor, masks: Mapping[int, Mask] | None) -> Annotations:
    """What the clip says of a piece, between its key frames too, and what is seen in its pictures."""
    clip, indices = piece.clip, piece.window.indices
    tensors = {"picture": endoscope_border(pictures)}
    if len(pictures) > 1:
        tensors["flow"], tensors["visible"] = latent_flow(pictures)
    marked = masks is not None or clip.tips or clip.boxes or clip.polygons
    flow = clip_flow(pictures) if marked and len(pictures) > 1 else None
    marks = window_marks(clip, indices, piece.fit, flow)
    roi = latent_region(clip, indices, piece.fit, masks, marks, flow)
    if roi is not None:
        tensors["roi"] = roi
    return Annotations(tensors, marks.tips, marks.boxes)


def describe_piece(piece: Piece, known: Annotations) -> dict[str, Any]:
    """The JSON part of a sample, less what the shard writer adds.

    With `fit` a point (x, y) of the source lies at ((x + 0.5) * cols / W - 0.5 - left, (y + 0.5) * rows / H -
    0.5 - top) of the window, `source_size` being [H, W].
    """
    clip, fit = piece.clip, piece.fit
    return {
        "caption": clip.caption,
        "caption_zh": clip.caption_zh,
        "instruments": [{"name": name, "weight": weight} for name, weight in piece.instruments],
        "fps": piece.fps,
        "n_frames": len(piece.window.indices),
        "size": [fit.height, fit.width],
        "source": clip.source,
        "source_sha256": piece.sha256,
        "source_frames": [piece.window.indices[0], piece.window.indices[-1]],
        "source_fps": piece.info.fps,
        "source_size": list(fit.source),
        "fit": {"rows": fit.rows, "cols": fit.cols, "top": fit.top, "left": fit.left},
        "phase": clip.phase,
        "triplets": list(clip.triplets),
        "licence": clip.licence,
        "tips": [tip._asdict() for tip in known.tips],
        "boxes": [box._asdict() for box in known.boxes],
    }


def encode_caption(text_encoder: TextEncoder, caption: str) -> Tensor:
    """The embedding [n, D] of one caption, encoded alone, as the shards hold it."""
    (context,) = encode_prompts(text_encoder, [caption])
    return narrow(context.cpu(), f"the embedding of {caption!r}")


def encode_router_prompts(text_encoder: TextEncoder, texts: Sequence[str]) -> Tensor:
    """The means [N, D] over the tokens of texts that are encoded together, as the shards hold them."""
    contexts = [context.cpu() for context in encode_prompts(text_encoder, texts)]
    halves = {torch.bfloat16: torch.bfloat16}.get(contexts[0].dtype, torch.float16)
    return narrow(pool_text(contexts).to(halves), "the mean over the tokens of a router prompt")


def narrow(tensor: Tensor, name: str) -> Tensor:
    """fp16 and bf16 as they are, wider floats as fp16; `WanmoeError` where a value is then not finite."""
    wide = tensor.is_floating_point() and tensor.element_size() > 2
    stored = tensor.to(torch.float16) if wide else tensor
    if not torch.isfinite(stored).all():
        raise WanmoeError(f"{name} holds NaN, or values that {stored.dtype} cannot hold")
    return stored
