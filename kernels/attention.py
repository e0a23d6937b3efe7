"""Full attention without a mask, over tokens-first tensors.

Letters: B clips, Lq query tokens, Lk key tokens, N heads, K head width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention"]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of every query over every key, scaled by 1/sqrt(K).

    q [B, Lq, N, K], k and v [B, Lk, N, K], one dtype and device; returns [B, Lq, N, K] in that dtype.
    Raises ValueError when the shapes or dtypes do not belong together.
    """
    if q.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            "expected q [B, Lq, N, K], k and v [B, Lk, N, K]"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: dtypes differ: q {q.dtype}, k {k.dtype}, v {v.dtype}")
    heads_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
