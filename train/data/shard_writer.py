"""Writes a folder of shards: byte for byte the same for the same samples, and never half of it.

Letters: F, H, W latent frames, height, width; n tokens of the caption; D width of the text encoder; N router
prompts.
"""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ...moe_lora.errors import WanmoeError
from ...moe_lora.files import write_atomic
from ..staging import Staging
from .router_prompts import RouterPrompt
from .shards import (
    FLOW,
    FORMAT,
    LATENT,
    META,
    ROI,
    TEXT,
    TEXTS,
    ShardError,
    compact_json,
    histogram,
    is_shard_file,
    manifest_bytes,
)
from .stored_prompts import ROUTER_PROMPTS, pack_prompts
from .tar_file import TarFile


class ShardWriter:
    """Writes samples to shards; the folder appears, complete, when the `with` block ends well, and not at all
    otherwise.

    The same samples in the same order give the same bytes. An existing folder of shards at `root` is
    replaced.

    Args:
        root: the folder to make.
        codec: name, fingerprint and stand_in of the codec that made the latents.
        text_encoder: the same of the text encoder.
        settings: further facts for the manifest (JSON values).
        null_context: [n, D], what the text encoder makes of no caption; training without captions needs it.
        max_bytes: a shard that reaches this size is closed and the next one begun.

    fp16 and bf16 tensors are stored as they are, wider ones as fp16, which has more digits than bf16; a value
    that it cannot hold is an error.
    """

    def __init__(
        self,
        root: str | Path,
        codec: Mapping[str, Any],
        text_encoder: Mapping[str, Any],
        *,
        settings: Mapping[str, Any] | None = None,
        null_context: Tensor | None = None,
        max_bytes: int = 512 * 2**20,
    ) -> None:
        self.root = Path(root)
        self.head = {
            "format": FORMAT,
            "codec": dict(codec),
            "text_encoder": dict(text_encoder),
            "normalised": True,
        }
        self.settings = dict(settings or {})
        self.null_context = null_context
        self.max_bytes = max_bytes
        self.manifest: dict[str, Any] = {}
        """What went to `manifest.json`; filled when the block ends."""
        self._staging = Staging(root, is_shard_file)
        self._open: dict[tuple[str, str], TarFile] = {}
        self._done: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self._keys: set[str] = set()
        self._counts: dict[tuple[str, str], int] = {}
        self._prompts: tuple[Tensor, bytes] | None = None
        self._kind: dict[str, Any] = {}
        """What all samples have in common: the width of the text, and whether they have an image latent."""

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
                self._staging.publish()
        except OSError as fault:
            raise WanmoeError(
                f"{self.root}: could not be written, nothing was kept: {fault.strerror}"
            ) from fault
        finally:
            for tar in self._open.values():
                tar.abandon()
            self._staging.discard()

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def add(
        self,
        key: str,
        split: str,
        latent: Tensor,
        context: Tensor,
        meta: Mapping[str, Any],
        *,
        image_latent: Tensor | None = None,
        roi: Tensor | None = None,
        picture: Tensor | None = None,
        flow: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> None:
        """Append one sample.

        Shapes: `latent` [16, F, H, W], `context` [n, D] (stored once for all samples that share it),
        `image_latent` [20, F, H, W]; uint8 `roi` [F, H, W] (255 = instrument) and `picture` [H, W] (0 = the
        endoscope's border); `flow` [F - 1, 2, H, W] with uint8 `visible` [F - 1, H, W]: see `Sample`. `meta`
        needs `caption` and `instruments`.
        Raises `ShardError` on a key with dots or used twice, wrong shapes, values that are not finite, and a
        full disk.
        """
        size = latent.shape[1:]
        bucket = "x".join(str(n) for n in size)
        tar = self._tar(split, bucket)
        if (flow is None) != (visible is None):
            raise ShardError(tar.name, key, FLOW, "flow and visible are given together or not at all")
        self._check_key(tar.name, key)
        steps = (size[0] - 1, *size[1:]) if len(size) == 3 else size
        for part, name, value, shape in (
            (LATENT, "latent", latent, (16, *size)),
            (LATENT, "image_latent", image_latent, (20, *size)),
            (ROI, "roi", roi, tuple(size)),
            (ROI, "picture", picture, tuple(size[1:])),
            (FLOW, "flow", flow, (steps[0], 2, *steps[1:])),
            (FLOW, "visible", visible, steps),
        ):
            if value is not None and (tuple(value.shape) != shape or len(size) != 3):
                reason = (
                    f"{name} is {list(value.shape)} beside a latent {list(latent.shape)}, not {list(shape)}"
                )
                raise ShardError(tar.name, key, part, reason)
        if context.ndim != 2 or 0 in context.shape:
            raise ShardError(
                tar.name, key, TEXT, f"a context is [n, D] with n >= 1; got {list(context.shape)}"
            )
        kind = {"text_dim": context.shape[1], "image_latents": image_latent is not None}
        self._kind = self._kind or kind
        if kind != self._kind:
            raise ShardError(tar.name, key, None, f"{kind} beside samples with {self._kind}")
        text = self._add_text(tar.name, key, context)
        body = {**meta, "key": key, "split": split, "bucket": bucket, "text": text, **self.head}
        body["region"] = roi is not None
        body.pop("format")
        parts = {LATENT: self._pack(tar.name, key, {"latent": latent, "image_latent": image_latent})}
        if roi is not None or picture is not None:
            parts[ROI] = self._pack(tar.name, key, {"roi": roi, "picture": picture})
        if flow is not None:
            parts[FLOW] = self._pack(tar.name, key, {"flow": flow, "visible": visible})
        parts[META] = compact_json(body)
        places = self._append(tar, key, parts)
        row = {"key": key, "split": split, "bucket": bucket, "shard": tar.name, "text": text}
        known = {"instruments": list(body["instruments"]), "region": body["region"]}
        self._rows.append({**row, **known, "parts": places})
        if tar.size >= self.max_bytes:
            self._close((split, bucket))

    def set_router_prompts(self, pooled: Tensor, prompts: Sequence[RouterPrompt]) -> None:
        """Text-only prompts that teach a router; `pooled` [N, D] is the mean over the tokens of each, fp16 or
        bf16.

        Raises `ShardError` on another shape or dtype and on values that are not finite.
        """
        half = pooled.dtype in (torch.float16, torch.bfloat16)
        if pooled.ndim != 2 or len(pooled) != len(prompts) or not half or not torch.isfinite(pooled).all():
            kind = f"{str(pooled.dtype).removeprefix('torch.')} {list(pooled.shape)}"
            reason = f"pooled is {kind}, expected finite float16 or bfloat16 [{len(prompts)}, D]"
            raise ShardError(ROUTER_PROMPTS, None, None, reason)
        self._prompts = (pooled, pack_prompts(pooled, prompts)) if prompts else None

    def _add_text(self, shard: str, key: str, context: Tensor) -> str:
        """The key of an encoded caption, which is written where it is new: its name is its content."""
        data = self._pack(shard, key, {"context": context}, TEXT)
        text = hashlib.sha256(data).hexdigest()[:16]
        if text not in self._keys:
            tar = self._tar(TEXTS, "")
            places = self._append(tar, text, {TEXT: data})
            self._rows.append({"key": text, "split": TEXTS, "shard": tar.name, "parts": places})
            if tar.size >= self.max_bytes:
                self._close((TEXTS, ""))
        return text

    def _append(self, tar: TarFile, key: str, parts: Mapping[str, bytes]) -> dict[str, dict[str, int]]:
        places: dict[str, dict[str, int]] = {}
        try:
            for part, data in parts.items():
                offset = tar.append(f"{key}.{part}", data)
                places[part] = {"offset": offset, "size": len(data), "crc32": zlib.crc32(data)}
        except OSError as error:
            raise ShardError(tar.name, key, None, f"cannot write to {self.root}: {error.strerror}") from error
        tar.samples += 1
        self._keys.add(key)
        return places

    def _check_key(self, shard: str, key: str) -> None:
        if not key or "." in key or "/" in key or len(key) > 70:
            raise ShardError(shard, key, None, "a key has no dot and no slash and at most 70 characters")
        if key in self._keys:
            raise ShardError(
                shard, key, None, "the key was written before; keys are unique in the whole folder"
            )

    def _pack(
        self, shard: str, key: str, tensors: Mapping[str, Tensor | None], part: str | None = None
    ) -> bytes:
        stored = {}
        for name, value in tensors.items():
            if value is None:
                continue
            wide = value.is_floating_point() and value.element_size() > 2
            stored[name] = value.detach().cpu().to(torch.float16 if wide else value.dtype).contiguous()
            if value.is_floating_point() and not torch.isfinite(stored[name]).all():
                raise ShardError(
                    shard, key, part or name, f"holds NaN, or values that {stored[name].dtype} cannot hold"
                )
        return save(stored)

    def _tar(self, split: str, bucket: str) -> TarFile:
        if (split, bucket) not in self._open:
            number = self._counts.get((split, bucket), 0)
            self._counts[split, bucket] = number + 1
            name = "-".join(filter(None, (split, bucket, f"{number:06d}"))) + ".tar"
            try:
                self._open[split, bucket] = TarFile(self._staging.path / name)
            except OSError as error:
                raise ShardError(
                    name, None, None, f"cannot write to {self.root}: {error.strerror}"
                ) from error
        return self._open[split, bucket]

    def _close(self, place: tuple[str, str]) -> None:
        tar = self._open[place]
        digest = tar.close()
        del self._open[place]
        facts = {"name": tar.name, "split": place[0], "bucket": place[1], "n_samples": tar.samples}
        self._done.append({**facts, "bytes": tar.size, "sha256": digest})

    def _finish(self) -> None:
        samples = [row for row in self._rows if row["split"] != TEXTS]
        if not samples:
            raise WanmoeError(f"{self.root}: no sample was written")
        null = {}
        if self.null_context is not None:
            null["null_text"] = self._add_text("", "", self.null_context)
        for place in sorted(self._open):
            self._close(place)
        prompts = self._write_prompts()
        index = b"".join(compact_json(row) + b"\n" for row in self._rows)
        self.manifest = {
            **self.head,
            **self.settings,
            **self._kind,
            "n_samples": {
                split: sum(row["split"] == split for row in samples)
                for split in sorted({row["split"] for row in samples})
            },
            "n_texts": len(self._rows) - len(samples),
            "histogram": histogram(samples),
            "index": {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()},
            **null,
            **prompts,
            "shards": sorted(self._done, key=lambda shard: str(shard["name"])),
        }
        manifest = manifest_bytes(self.manifest)
        write_atomic(self._staging.path / "index.jsonl", lambda path: path.write_bytes(index))
        write_atomic(self._staging.path / "manifest.json", lambda path: path.write_bytes(manifest))

    def _write_prompts(self) -> dict[str, Any]:
        """Write the router prompts; returns what the manifest says of them."""
        if self._prompts is None:
            return {}
        pooled, data = self._prompts
        if pooled.shape[1] != self._kind["text_dim"]:
            reason = f"texts are {pooled.shape[1]} wide, those of the samples {self._kind['text_dim']}"
            raise ShardError(ROUTER_PROMPTS, None, None, reason)
        write_atomic(self._staging.path / ROUTER_PROMPTS, lambda path: path.write_bytes(data))
        facts = {"n": len(pooled), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return {"router_prompts": facts}
