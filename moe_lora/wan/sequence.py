"""Sequence parallelism: the ranks of a group share a clip, each with its part of the tokens (Ulysses).

All layers work on the tokens of their rank but self-attention, which needs every token. There the ranks
exchange all heads of their own tokens for their own heads of all tokens, and change back after it. Source:
DeepSpeed-Ulysses, arXiv:2309.14509.

Gradients: the backward of each exchange is its exact transpose. So what the backward of a rank leaves in its
copy of the parameters is the gradient of the sum of the losses of its group, and the mean over all ranks,
which DeepSpeed takes, is the gradient of the mean of their losses: that of the clips where every rank of a
group has the loss of the whole clip.

Letters: B clips, L tokens of a clip, l those of this rank, P ranks of the group, N heads, K head width, C
channels.
"""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.attention import attention
from ..errors import WanmoeError

__all__ = ["SequenceParallel", "TokenSplit", "sequence_parallel"]


class SequenceParallel:
    """The group of ranks that share each clip, set as `WanDiT.sequence` on all of them.

    They must be given the same clips, noise and gates, and the same state of torch's random generator where
    the adapter has dropout.

    Raises:
        WanmoeError: the heads do not divide among the ranks.
    """

    def __init__(self, group: dist.ProcessGroup, heads: int) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if heads % self.size:
            fitting = [str(size) for size in range(1, heads + 1) if heads % size == 0]
            raise WanmoeError(
                f"the model's {heads} attention heads do not divide among {self.size} ranks that share a "
                f"clip; let {', '.join(fitting)} ranks share it"
            )

    def split(self, tokens: int) -> TokenSplit:
        """How clips of so many tokens are split; raises WanmoeError where a rank would get none."""
        return TokenSplit(self, tokens)


def sequence_parallel(
    size: int, heads: int, timeout: datetime.timedelta | None = None
) -> SequenceParallel | None:
    """Groups of `size` consecutive ranks, this rank's; None for a size of 1. Every rank must call it.

    Args:
        heads: attention heads of the model.
        timeout: of a collective in the group; default: that of the backend.

    Raises:
        WanmoeError: the ranks of the job do not divide into such groups, or the heads among a group.
    """
    world = dist.get_world_size()
    if size < 1 or world % size:
        raise WanmoeError(f"{world} ranks do not divide into groups of {size} that share a clip")
    if size == 1:
        return None
    group, _ = dist.new_subgroups(group_size=size, timeout=timeout)
    return SequenceParallel(group, heads)


class TokenSplit:
    """The tokens of clips of one length among the ranks of a group, in order; they differ by one at most.

    DeepSpeed's own exchange wants equally many, and so padding, which attention would have to be kept from.
    """

    def __init__(self, sequence: SequenceParallel, tokens: int) -> None:
        self._group, self._ranks = sequence.group, sequence.size
        if tokens < self._ranks:
            raise WanmoeError(
                f"a clip of {tokens} tokens is too short for {self._ranks} ranks to share; let fewer share it"
            )
        each, more = divmod(tokens, self._ranks)
        self._lengths = [each + (rank < more) for rank in range(self._ranks)]
        start = sum(self._lengths[: sequence.rank])
        self.own = slice(start, start + self._lengths[sequence.rank])
        """The tokens of this rank."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attention` of the tokens of this rank over those of all: q, k and v [B, l, N, K] -> alike."""
        q, k, v = self._all_tokens(q, k, v)
        return self._all_heads(attention(q, k, v))

    def _all_tokens(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """All heads of the tokens of this rank, each [B, l, N, K] -> some heads of all, [B, L, N / P, K]."""
        by_rank = [x.unflatten(2, (self._ranks, -1)).permute(2, 1, 0, 3, 4) for x in parts]
        # Tokens come before clips, [P * l, 3, B, N / P, K]: so what arrives is in their order as it is.
        rows = torch.stack(by_rank, dim=2).flatten(0, 1)
        return tuple(x.transpose(0, 1) for x in self._exchange(rows, gather=True).unbind(1))

    def _all_heads(self, x: Tensor) -> Tensor:
        """The way back: x [B, L, N / P, K] -> [B, l, N, K]."""
        rows = self._exchange(x.transpose(0, 1), gather=False)
        return rows.unflatten(0, (self._ranks, -1)).permute(2, 1, 0, 3, 4).flatten(2, 3)

    def join(self, x: Tensor) -> Tensor:
        """All tokens of the clips, on every rank: x [B, l, C] -> [B, L, C]."""
        for_each = x.transpose(0, 1).expand(self._ranks, -1, -1, -1)
        return self._exchange(for_each.flatten(0, 1), gather=True).transpose(0, 1)

    def _exchange(self, x: Tensor, gather: bool) -> Tensor:
        """[P * l, ...] -> [L, ...], what each rank has for this one; or, without gather, the way back."""
        own = [self.own.stop - self.own.start] * self._ranks
        send, receive = (own, self._lengths) if gather else (self._lengths, own)
        out: Tensor = _Exchange.apply(x, self._group, send, receive)
        return out


class _Exchange(torch.autograd.Function):
    """Sends `send[p]` rows to rank p, of one after the other, and receives `receive[p]` from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, send: list[int], receive: list[int]) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Exchange.apply(grad, ctx.group, ctx.receive, ctx.send), None, None, None
