"""LoRA mixture-of-experts on a frozen linear: `lora_moe_linear`, and `lora_moe_linear_reference` that defines
it."""

from .op import lora_moe_linear
from .reference import lora_moe_linear_reference

__all__ = ["lora_moe_linear", "lora_moe_linear_reference"]
