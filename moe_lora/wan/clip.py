"""The CLIP image encoder of Wan2.1 i2v: pictures to the tokens that the DiT attends to beside the text.

B pictures, H, W pixels, N tokens of a picture (257: a class token and 16 x 16 patches), D width (1280).
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import WanmoeError
from .codec import file_digest, load_pretrained
from .weight_files import StoredTensor, fill_module, open_weights, weight_files

# Of the pictures that CLIP was trained on (official wan/modules/clip.py).
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_HEAD_DIM = 80

# Original name -> transformers name, outside the layers and inside one.
_TOP = {
    "patch_embedding.weight": "embeddings.patch_embedding.weight",
    "pos_embedding": "embeddings.position_embedding.weight",
    "cls_embedding": "embeddings.class_embedding",
    "pre_norm.weight": "pre_layrnorm.weight",  # spelt so in transformers
    "pre_norm.bias": "pre_layrnorm.bias",
    "post_norm.weight": "post_layernorm.weight",
    "post_norm.bias": "post_layernorm.bias",
}
_LAYER = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_VISUAL = "visual."
_LAYER_NAME = re.compile(r"^transformer\.(?P<index>\d+)\.(?P<stem>.+)\.(?P<leaf>weight|bias)$")


class CLIPImageEncoder(nn.Module):
    """CLIP's vision tower (transformers' `CLIPVisionModel`), read before its last layer as Wan2.1 does."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, files: list[Path]) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self.files = files
        self.dim: int = model.config.hidden_size
        self.image_size: int = model.config.image_size
        self.tokens: int = (self.image_size // model.config.patch_size) ** 2 + 1
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), persistent=False)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the files the weights came from."""
        return file_digest(self.files)

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures `[B, 3, H, W]` in [-1, 1] -> tokens `[B, N, D]` in the dtype of the weights.

        A picture of any size is squeezed to CLIP's square, bicubic, as Wan does it. The tokens of first and
        last frame go to the model as one row: `encoder(two).flatten(0, 1)[None]`. Raises WanmoeError for
        another shape.
        """
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise WanmoeError(f"CLIP encodes pictures [B, 3, H, W], but got {list(pictures.shape)}")
        size = (self.image_size, self.image_size)
        pixels = F.interpolate(pictures.to(self.mean), size=size, mode="bicubic", align_corners=False)
        pixels = ((pixels * 0.5 + 0.5) - self.mean) / self.std
        states = self.model(
            pixel_values=pixels.to(next(self.model.parameters()).dtype), output_hidden_states=True
        ).hidden_states
        tokens: Tensor = states[-2]
        return tokens


def load_clip(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> CLIPImageEncoder:
    """CLIP image encoder from `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth` or a folder.

    A folder may be the encoder's own (transformers) or a whole diffusers model with `image_encoder/` in it.
    Sizes are read from the file; heads are 80 wide in an original one. Its text tower is not read, and its
    tensors are read one at a time, so no second copy is held. `dtype=None` keeps the stored dtype. Raises
    `WanmoeError` where the file is missing, broken, or of another kind.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "image_encoder" if (path / "image_encoder" / "config.json").is_file() else path
        model = _load_folder(path, dtype)
        files = [*weight_files(path), path / "config.json"]
    elif path.is_file():
        model, files = _load_original(path, dtype, device), [path]
    else:
        raise WanmoeError(
            f"CLIP {path}: no such file or folder; give models_clip_...pth of Wan2.1 or an image_encoder/"
        )
    return CLIPImageEncoder(model, files).to(device)


def _load_folder(folder: Path, dtype: torch.dtype | None) -> Any:
    from transformers import CLIPVisionModel

    if not (folder / "config.json").is_file():
        raise WanmoeError(f"CLIP {folder}: the folder has no config.json, so it is no CLIP image encoder")
    return load_pretrained(CLIPVisionModel, f"CLIP {folder}", folder, "CLIP", dtype=dtype or "auto")


def _load_original(path: Path, dtype: torch.dtype | None, device: str | torch.device) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    stored = _to_transformers_names(path, open_weights(path).tensors)
    patch = _shape(path, stored, "embeddings.patch_embedding.weight", 4)
    positions, width = _shape(path, stored, "embeddings.position_embedding.weight", 2)
    hidden, _ = _shape(path, stored, "encoder.layers.0.mlp.fc1.weight", 2)
    grid = round((positions - 1) ** 0.5)
    if width % _HEAD_DIM or grid**2 != positions - 1:
        raise WanmoeError(
            f"CLIP {path}: a width of {width} and {positions} positions; Wan2.1's encoder has heads of "
            f"{_HEAD_DIM} and a square of patches with a class token"
        )
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=1 + max(int(name.split(".")[2]) for name in stored if name.startswith("encoder.")),
        num_attention_heads=width // _HEAD_DIM,
        image_size=grid * patch[-1],
        patch_size=patch[-1],
        hidden_act="gelu",
    )
    with torch.device("meta"):
        model: Any = CLIPVisionModel(config)
    tower = getattr(model, "vision_model", model)  # transformers before 5.23 keep it in a module of its own
    fill_module(tower, stored, f"CLIP {path}", dtype=dtype, device=device)
    tower.embeddings.position_ids = torch.arange(positions, device=device)[None]
    return model


def _shape(path: Path, stored: dict[str, StoredTensor], name: str, ndim: int) -> tuple[int, ...]:
    shape = stored[name].shape if name in stored else ()
    if len(shape) != ndim:
        raise WanmoeError(f"CLIP {path}: not the CLIP of Wan2.1: {name} is {shape or 'missing'}")
    return shape


def _to_transformers_names(path: Path, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The vision tower of the original file under transformers' names; the text tower is left out."""
    renamed: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        name = key.removeprefix(_VISUAL)
        if name == key or name == "head":  # text tower, scale, and the projection that Wan does not use
            continue
        layer = _LAYER_NAME.match(name)
        if name in _TOP:
            renamed[_TOP[name]] = _squeezed(tensor)
        elif layer and layer["stem"] in _LAYER:
            renamed[f"encoder.layers.{layer['index']}.{_LAYER[layer['stem']]}.{layer['leaf']}"] = tensor
        elif layer and layer["stem"] == "attn.to_qkv":
            for part, letter in enumerate("qkv"):
                target = f"encoder.layers.{layer['index']}.self_attn.{letter}_proj.{layer['leaf']}"
                renamed[target] = _third(tensor, part)
        else:
            raise WanmoeError(f"CLIP {path}: unknown key {key!r}; expected the CLIP of Wan2.1")
    return renamed


def _squeezed(tensor: StoredTensor) -> StoredTensor:
    """Without leading axes of size one: class token and positions are stored for a batch of one."""
    shape = tuple(tensor.shape)
    while shape[:1] == (1,):
        shape = shape[1:]
    return StoredTensor(shape, lambda: tensor.read().reshape(shape))


def _third(tensor: StoredTensor, part: int) -> StoredTensor:
    rows = tensor.shape[0] // 3
    return StoredTensor((rows, *tensor.shape[1:]), lambda: tensor.read()[part * rows : (part + 1) * rows])
