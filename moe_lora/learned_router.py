"""The network that reads which experts a clip needs from its text, and from its first frame where that helps.

Letters: B clips, D text width, E experts, K classes that a classifier of the first frame tells apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LearnedRouter(nn.Module):
    """Softmax gates [B, E] from the pooled text embedding [B, D] by one hidden layer.

    The embedding is normalised first: pooled umT5 features are small and their scale says nothing about the
    tool. With `classes` the logits of a classifier of the first latent frame stand behind it.
    """

    def __init__(
        self, text_dim: int, experts: int, hidden_dim: int = 64, temperature: float = 0.7, classes: int = 0
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.classes = classes
        self.hidden = nn.Linear(text_dim + classes, hidden_dim)
        self.out = nn.Linear(hidden_dim, experts)

    def forward(self, pooled: Tensor, noise: Tensor | None = None, evidence: Tensor | None = None) -> Tensor:
        """softmax((logits + noise) / temperature), wide.

        pooled [B, D]; noise [B, E]: on the logits, drawn by the caller, so that a recompute sees the same;
        evidence [B, K]: zeros where None, which says nothing of the frame.
        """
        wide = torch.promote_types(pooled.dtype, torch.float32)
        read = F.layer_norm(pooled.to(wide), pooled.shape[-1:])
        if self.classes:
            seen = read.new_zeros(len(read), self.classes) if evidence is None else evidence.to(read)
            read = torch.cat([read, seen], dim=-1)
        logits = self.out(F.silu(self.hidden(read.to(self.hidden.weight.dtype)))).to(wide)
        if noise is not None:
            logits = logits + noise.to(logits)
        return (logits / self.temperature).softmax(-1)
