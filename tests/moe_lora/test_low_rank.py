"""Sums and truncations of low-rank products, against the dense matrix."""

import pytest
import torch

from wanmoe.moe_lora import WanmoeError
from wanmoe.moe_lora.low_rank import check_finite, concatenate, relative_error, truncate


@pytest.mark.parametrize(("d_out", "d_in", "ranks"), [(7, 5, (2, 1)), (5, 9, (4, 4)), (3, 3, (2, 6))])
def test_sums_and_truncations_agree_with_the_dense_matrix(d_out, d_in, ranks):
    torch.manual_seed(0)
    parts = [(torch.randn(r, d_in).double(), torch.randn(d_out, r).double()) for r in ranks]
    dense = sum(up @ down for down, up in parts)
    down, up = concatenate(parts)
    torch.testing.assert_close(up @ down, dense)
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    for rank in range(1, 5):
        cut = truncate(down, up, rank)
        assert cut.down.shape[0] == cut.up.shape[1] <= rank
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        torch.testing.assert_close(cut.up @ cut.down, best)
        assert cut.lost == pytest.approx(values[rank:].square().sum().item(), abs=1e-9)
        assert cut.total == pytest.approx(dense.square().sum().item())
    assert truncate(down, up, 0).lost == pytest.approx(dense.square().sum().item())


def test_values_that_are_not_finite_are_refused_by_name():
    check_finite("x", torch.ones(2), torch.zeros(0, 3))
    for value in (float("nan"), float("inf")):
        with pytest.raises(WanmoeError, match="q of file: holds values that are not finite"):
            check_finite("q of file", torch.ones(2), torch.tensor([1.0, value]))
    assert relative_error(1.0, 4.0) == 0.5 and relative_error(0.0, 0.0) == 0.0
