"""LoRA mixture-of-experts on a frozen linear: `lora_moe_linear`, and `lora_moe_linear_reference` that defines
it."""

from .op import lora_moe_linear, lora_moe_linears
from .reference import lora_moe_linear_reference
from .weights import LoRAMoEWeights

__all__ = ["LoRAMoEWeights", "lora_moe_linear", "lora_moe_linear_reference", "lora_moe_linears"]
