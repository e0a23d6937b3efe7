"""Generation and the report: what one does with a trained adapter."""

from .pipeline import LoRAMoEInference

__all__ = ["LoRAMoEInference"]
