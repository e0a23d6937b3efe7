"""Writes a folder of shards: byte for byte the same for the same samples, and never half of it.

Letters: F, H, W latent frames, height, width; n tokens of the caption; D width of the text encoder.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from io import BufferedWriter
from pathlib import Path
from tarfile import BLOCKSIZE, RECORDSIZE, USTAR_FORMAT, TarInfo
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ...moe_lora.errors import WanmoeError
from ..staging import Staging
from .shards import FORMAT, LATENT, META, NULL, ROI, TEXT, ShardError, histogram, is_shard_file


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
        dtype: how floating tensors are stored; a value that it cannot hold is an error.
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
        dtype: torch.dtype = torch.float16,
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
        self.max_bytes, self.dtype = max_bytes, dtype
        self.manifest: dict[str, Any] = {}
        """What went to `manifest.json`; filled when the block ends."""
        self._staging = Staging(root, is_shard_file)
        self._open: dict[tuple[str, str], _TarFile] = {}
        self._done: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self._keys: set[str] = set()
        self._counts: dict[tuple[str, str], int] = {}

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
        roi: Tensor | None = None,
        tips: Tensor | None = None,
        image_latent: Tensor | None = None,
    ) -> None:
        """Append one sample.

        Shapes: `latent` [16, F, H, W], `context` [n, D], `roi` uint8 [F, H, W] (255 = inside), `tips` [m, 3]
        rows of (frame of the clip, x, y), `image_latent` [20, F, H, W]. `meta` needs `caption` and
        `instruments`.
        Raises `ShardError` on a key with dots or used twice, wrong shapes, values that are not finite, and a
        full disk.
        """
        bucket = "x".join(str(n) for n in latent.shape[1:])
        tar = self._tar(split, bucket)
        self._check(tar.name, key, latent, context, roi, image_latent)
        tensors = (
            {"latent": latent} if image_latent is None else {"latent": latent, "image_latent": image_latent}
        )
        parts = {
            LATENT: self._pack(tar.name, key, tensors),
            TEXT: self._pack(tar.name, key, {"context": context}),
        }
        if roi is not None:
            extra = {} if tips is None else {"tips": tips.float().contiguous()}
            parts[ROI] = save({"roi": roi.to(torch.uint8).contiguous(), **extra})
        body = {**meta, "key": key, "split": split, "bucket": bucket, **self.head}
        body.pop("format")
        parts[META] = _json(body)
        places: dict[str, dict[str, int]] = {}
        try:
            for part, data in parts.items():
                offset = tar.append(f"{key}.{part}", data)
                places[part] = {"offset": offset, "size": len(data), "crc32": zlib.crc32(data)}
        except OSError as error:
            raise ShardError(tar.name, key, None, f"cannot write to {self.root}: {error.strerror}") from error
        tar.samples += 1
        self._keys.add(key)
        row = {"key": key, "split": split, "bucket": bucket, "shard": tar.name}
        self._rows.append({**row, "instruments": list(body["instruments"]), "parts": places})
        if tar.size >= self.max_bytes:
            self._close(self._open.pop((split, bucket)))

    def _check(
        self,
        shard: str,
        key: str,
        latent: Tensor,
        context: Tensor,
        roi: Tensor | None,
        image_latent: Tensor | None,
    ) -> None:
        if not key or "." in key or "/" in key or len(key) > 70:
            raise ShardError(shard, key, None, "a key has no dot and no slash and at most 70 characters")
        if key in self._keys:
            raise ShardError(
                shard, key, None, "the key was written before; keys are unique in the whole folder"
            )
        if latent.ndim != 4 or latent.shape[0] != 16:
            raise ShardError(shard, key, LATENT, f"a latent is [16, F, H, W]; got {list(latent.shape)}")
        if context.ndim != 2 or 0 in context.shape:
            raise ShardError(shard, key, TEXT, f"a context is [n, D] with n >= 1; got {list(context.shape)}")
        if roi is not None and roi.shape != latent.shape[1:]:
            raise ShardError(
                shard, key, ROI, f"the region is {list(roi.shape)}, the latent {list(latent.shape)}"
            )
        if image_latent is not None and image_latent.shape != (20, *latent.shape[1:]):
            raise ShardError(
                shard, key, LATENT, f"an image latent is [20, F, H, W]; got {list(image_latent.shape)}"
            )

    def _pack(self, shard: str, key: str, tensors: Mapping[str, Tensor]) -> bytes:
        stored = {}
        for name, value in tensors.items():
            stored[name] = value.detach().cpu().to(self.dtype).contiguous()
            if not torch.isfinite(stored[name]).all():
                raise ShardError(shard, key, name, f"holds NaN, or values that {self.dtype} cannot hold")
        return save(stored)

    def _tar(self, split: str, bucket: str) -> "_TarFile":
        if (split, bucket) not in self._open:
            number = self._counts.get((split, bucket), 0)
            self._counts[split, bucket] = number + 1
            name = f"{split}-{bucket}-{number:06d}.tar"
            try:
                self._open[split, bucket] = _TarFile(self._staging.path / name)
            except OSError as error:
                raise ShardError(
                    name, None, None, f"cannot write to {self.root}: {error.strerror}"
                ) from error
        return self._open[split, bucket]

    def _close(self, tar: "_TarFile") -> None:
        split, bucket, _ = tar.name.rsplit("-", 2)
        digest = tar.close()
        facts = {"name": tar.name, "split": split, "bucket": bucket, "n_samples": tar.samples}
        self._done.append({**facts, "bytes": tar.size, "sha256": digest})

    def _finish(self) -> None:
        if not self._rows:
            raise WanmoeError(f"{self.root}: no sample was written")
        for place in sorted(self._open):
            self._close(self._open[place])
        self._open.clear()
        index = b"".join(_json(row) + b"\n" for row in self._rows)
        null = {}
        if self.null_context is not None:
            data = self._pack(NULL, "", {"context": self.null_context})
            (self._staging.path / NULL).write_bytes(data)
            null = {"null_context": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
        self.manifest = {
            **self.head,
            **self.settings,
            "n_samples": {
                split: sum(row["split"] == split for row in self._rows)
                for split in sorted({row["split"] for row in self._rows})
            },
            "histogram": histogram(self._rows),
            "index": {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()},
            **null,
            "shards": sorted(self._done, key=lambda shard: str(shard["name"])),
        }
        (self._staging.path / "index.jsonl").write_bytes(index)
        text = json.dumps(self.manifest, ensure_ascii=False, indent=1, sort_keys=True)
        (self._staging.path / "manifest.json").write_text(text + "\n", encoding="utf-8")


class _TarFile:
    """A USTAR file written member by member with all dates and owners zero; knows its offsets and SHA-256."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.size = 0
        self.samples = 0
        self._file: BufferedWriter = path.open("wb")
        self._sha = hashlib.sha256()

    def append(self, name: str, data: bytes) -> int:
        """Write one member; returns the offset of its data."""
        info = TarInfo(name)
        info.size, info.mode, info.mtime = len(data), 0o644, 0
        self._write(info.tobuf(USTAR_FORMAT, encoding="utf-8", errors="strict"))
        offset = self.size
        self._write(data)
        self._write(b"\0" * (-len(data) % BLOCKSIZE))
        return offset

    def close(self) -> str:
        """End the archive; returns its SHA-256."""
        self._write(b"\0" * (math.ceil((self.size + 2 * BLOCKSIZE) / RECORDSIZE) * RECORDSIZE - self.size))
        self._file.close()
        return self._sha.hexdigest()

    def abandon(self) -> None:
        """Close the file after a failure; what its buffer still holds is not wanted."""
        try:
            self._file.close()
        except OSError:
            self._file.raw.close()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha.update(data)
        self.size += len(data)


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
