"""The model room: Wan's DiT, the LoRA mixture-of-experts on it, routing, and their files."""

from .adapter import Adapter, AdapterConfig, attach
from .adapter_file import load_adapter, save_adapter
from .errors import WanmoeError
from .instruments import Expert, ExpertSet
from .routing import Gates, RouterConfig

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Expert",
    "ExpertSet",
    "Gates",
    "RouterConfig",
    "WanmoeError",
    "attach",
    "load_adapter",
    "save_adapter",
]
