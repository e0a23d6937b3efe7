"""Attention in plain PyTorch: the definition that every backend is compared with.

Letters: B clips, Lq query tokens, Lk key tokens, N heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_reference"]


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v per head; shapes as in `attention`.

    Computed in fp32 (fp64 for fp64 inputs), rounded once to the dtype of q. Holds [B, N, Lq, Lk] scores.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bqnk,bpnk->bnqp", q.to(wide), k.to(wide)) / q.shape[-1] ** 0.5
    return torch.einsum("bnqp,bpnk->bqnk", scores.softmax(-1), v.to(wide)).to(q.dtype)
