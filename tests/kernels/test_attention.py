"""Attention against its definition."""

import pytest
import torch

from wanmoe.kernels.attention import attention


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (45, 13), (1, 5)])
def test_equals_the_definition_and_has_its_gradients(queries, keys):
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, n, 3, 10, generator=g, dtype=torch.float64, requires_grad=True)
        for n in (queries, keys, keys)
    )
    weights = (torch.einsum("bqnk,bpnk->bnqp", q, k) / 10**0.5).softmax(-1)
    truth = torch.einsum("bnqp,bpnk->bqnk", weights, v)
    out = attention(q, k, v)
    assert out.shape == (2, queries, 3, 10)
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-12)
    seed = torch.randn(truth.shape, generator=g, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), seed), torch.autograd.grad(truth, (q, k, v), seed), strict=True
    ):
        assert theirs.norm() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_tensors_that_do_not_belong_together_are_refused():
    q, k = torch.zeros(1, 4, 2, 8), torch.zeros(1, 5, 2, 8)
    for bad in (
        (q[0], k, k),
        (q, k, k[:, :4]),
        (q, k[:, :, :1], k[:, :, :1]),
        (q.expand(2, -1, -1, -1), k, k),
    ):
        with pytest.raises(ValueError, match=r"expected q \[B, Lq, N, K\]"):
            attention(*bad)
    with pytest.raises(ValueError, match="dtypes differ"):
        attention(q.half(), k, k)
