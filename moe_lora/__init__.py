"""The model room: Wan's DiT, the LoRA mixture-of-experts on it, routing, sampling, and their files."""

from typing import TYPE_CHECKING, Any

from .adapter import Adapter, AdapterConfig, attach
from .adapter_file import load_adapter, save_adapter
from .errors import WanmoeError
from .export import export_lora, export_merged, gates_of
from .instruments import CHOLEC, SURGICAL, Expert, ExpertSet
from .interop import import_adapter
from .routing import Gates, RouterConfig
from .wan.clip import load_clip
from .wan.codec import load_vae
from .wan.config import WanConfig
from .wan.dit import WanDiT
from .wan.model_folder import find_parts
from .wan.text import load_text_encoder
from .wan.weights import load_dit

if TYPE_CHECKING:
    from .wan.sampling import sample

__all__ = [
    "CHOLEC",
    "SURGICAL",
    "Adapter",
    "AdapterConfig",
    "Expert",
    "ExpertSet",
    "Gates",
    "RouterConfig",
    "WanConfig",
    "WanDiT",
    "WanmoeError",
    "attach",
    "export_lora",
    "export_merged",
    "find_parts",
    "gates_of",
    "import_adapter",
    "load_adapter",
    "load_clip",
    "load_dit",
    "load_text_encoder",
    "load_vae",
    "sample",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    """`sample` on first use: its solvers live in diffusers, which takes seconds to import."""
    if name == "sample":
        from .wan.sampling import sample

        return sample
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
