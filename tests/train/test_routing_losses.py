"""The router's losses are those of the whole window of ranks and micro-batches, with its gradients (A11)."""

import math
import subprocess
import sys

import pytest
import torch

from wanmoe.train.routing_losses import (
    entropy,
    entropy_term,
    load_balance,
    routing_terms,
    teacher_divergence,
    window_of,
    window_sums,
)

E = 4
RANKS, MICROS = 2, 3
TARGET = 0.4
EXACT = {"rtol": 1e-12, "atol": 1e-12}
WEIGHTS = {"teacher_kl": 1.0, "entropy": 0.3, "balance": 0.7}


def clips(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, teacher) of rows in fp64: mixed, one-hot and, every third one, no teacher."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(rows, E, generator=generator, dtype=torch.float64)
    teacher = (torch.randn(rows, E, generator=generator, dtype=torch.float64)).softmax(-1)
    teacher[1::3] = torch.eye(E, dtype=torch.float64)[:1]
    teacher[2::3] = 0
    return logits, teacher


def joined(probs: torch.Tensor, teacher: torch.Tensor) -> dict[str, torch.Tensor]:
    """The losses of one batch, written out."""
    taught = teacher.sum(1) > 0
    kl = sum(
        t * (math.log(t) - p.log())
        for row, targets in zip(probs[taught], teacher[taught].tolist(), strict=True)
        for p, t in zip(row, targets, strict=True)
        if t
    )
    mean_entropy = -(probs * probs.log()).sum(1).mean()
    load = probs.mean(0)
    return {
        "teacher_kl": kl / taught.sum(),
        "entropy": (mean_entropy - TARGET) ** 2,
        "balance": load.var(correction=0) / load.mean() ** 2,
    }


def total(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(WEIGHTS[name] * term for name, term in terms.items())


@pytest.mark.parametrize("sizes", [(4,) * 6, (5, 1, 3, 2, 7, 4)])
@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_micro_batches_of_ranks_add_up_to_the_joined_batch(sizes, name):
    logits, teacher = clips(sum(sizes))
    alone = logits.clone().requires_grad_()
    whole = joined(alone.softmax(-1), teacher)[name]
    whole.backward()

    logits.requires_grad_()
    parts = list(zip(logits.softmax(-1).split(sizes), teacher.split(sizes), strict=True))
    sums = [window_sums(*part).detach() for part in parts]
    by_rank = [sum(sums[rank::RANKS]) for rank in range(RANKS)]
    window = window_of(sum(by_rank))
    share = 1 / (RANKS * MICROS)
    terms = [routing_terms([name], *part, window, share, TARGET)[name] for part in parts]
    (share * sum(terms)).backward()
    torch.testing.assert_close(share * sum(terms), whole, **EXACT)
    torch.testing.assert_close(logits.grad, alone.grad, **EXACT)
    assert alone.grad.abs().max() > 1e-3
    if name != "teacher_kl":
        for term in terms:  # each of them tells the whole window's value
            torch.testing.assert_close(term, whole, **EXACT)


def test_a_batch_by_itself_is_not_the_window():
    """What was wrong before: a decided router looks unbalanced on one clip, and is not over its window."""
    probs = torch.eye(E, dtype=torch.float64)
    teacher = torch.zeros(E, E)
    window = window_of(window_sums(probs, teacher))
    assert float(routing_terms(["balance"], probs[:1], teacher[:1], window, 1 / E, TARGET)["balance"]) == 0
    assert float(load_balance(probs[0])) == E - 1


def test_window_counts():
    _, teacher = clips(7)
    probs = torch.full((7, E), 1 / E)
    window = window_of(window_sums(probs, teacher) + window_sums(probs[:2], teacher[:2]))
    assert (float(window.clips), float(window.taught)) == (9, 7)
    torch.testing.assert_close(window.load, torch.full((E,), 0.25))
    assert float(window.entropy) == pytest.approx(math.log(E))


@pytest.mark.parametrize(
    ("load", "expected"),
    [([0.25] * 4, 0), ([1, 0, 0, 0], 3), ([0.5, 0.5, 0, 0], 1), ([0.4, 0.3, 0.2, 0.1], 0.2)],
)
def test_load_balance_is_the_squared_coefficient_of_variation(load, expected):
    assert float(load_balance(torch.tensor(load, dtype=torch.float64))) == pytest.approx(expected)


def test_entropy_in_nats_and_its_distance():
    probs = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4], dtype=torch.float64)
    expected = torch.tensor([0, math.log(2), math.log(4)], dtype=torch.float64)
    torch.testing.assert_close(entropy(probs), expected, **EXACT)
    assert float(entropy_term(torch.tensor(0.9), 0.5)) == pytest.approx(0.16)


def test_divergence_is_0_at_the_teacher_and_without_one():
    _, teacher = clips(3)
    probs = torch.where(teacher > 0, teacher, 0.25)
    found = teacher_divergence(probs, teacher)
    torch.testing.assert_close(found, torch.zeros(3, dtype=torch.float64), **EXACT)
    assert float(teacher_divergence(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]))) == pytest.approx(
        math.log(2)
    )


def test_a_collapsed_router_still_learns_from_its_teacher():
    """Probabilities of 1e-20 and of 0 in fp32: the first still move, none gives NaN."""
    logits = torch.tensor([[46.0, 0, 0, 0], [300.0, 0, 0, 0]], requires_grad=True)
    teacher = torch.tensor([[0, 1.0, 0, 0], [0, 1.0, 0, 0]])
    probs = logits.softmax(-1)
    window = window_of(window_sums(probs, teacher).detach())
    terms = routing_terms(WEIGHTS, probs, teacher, window, 1.0, TARGET)
    total(terms).backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 1] < -0.4


def test_a_window_without_teacher_costs_nothing():
    logits, teacher = clips(4)
    teacher[:] = 0
    logits.requires_grad_()
    probs = logits.softmax(-1)
    window = window_of(window_sums(probs, teacher).detach())
    terms = routing_terms(["teacher_kl"], probs, teacher, window, 1.0, TARGET)
    assert list(terms) == ["teacher_kl"]
    terms["teacher_kl"].backward()
    assert terms["teacher_kl"].item() == 0 and not logits.grad.any()


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_finite_differences(name):
    logits, teacher = clips(5)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        probs = logits.softmax(-1)
        # With the window's own graph its value moves too; the surrogate's gradient is the same.
        moving = window_of(window_sums(probs, teacher))
        return {
            "teacher_kl": teacher_divergence(probs, teacher).sum() / moving.taught,
            "entropy": entropy_term(moving.entropy, TARGET),
            "balance": load_balance(moving.load),
        }[name]

    logits.requires_grad_()
    assert torch.autograd.gradcheck(loss, (logits,))
    probs = logits.softmax(-1)
    window = window_of(window_sums(probs, teacher).detach())
    term = routing_terms([name], probs, teacher, window, 1.0, TARGET)[name]
    (found,) = torch.autograd.grad(term, logits)
    (expected,) = torch.autograd.grad(loss(logits), logits)
    torch.testing.assert_close(found, expected, **EXACT)


RANK = """
import sys
import torch
import torch.distributed as dist
from wanmoe.train.routing_losses import routing_terms, window_of, window_sums

rank, world, micros, target, folder = *map(int, sys.argv[1:4]), float(sys.argv[4]), sys.argv[5]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
given = torch.load(f"{folder}/clips.pt", weights_only=True)
logits, teacher = (part.chunk(world)[rank].clone() for part in (given["logits"], given["teacher"]))
router = torch.nn.Parameter(given["router"])

def batches():
    return zip(logits.chunk(micros), teacher.chunk(micros), strict=True)

with torch.no_grad():
    sums = sum(window_sums((x @ router).softmax(-1), rule) for x, rule in batches())
    dist.all_reduce(sums)
    window = window_of(sums)
loss = 0.0
for x, rule in batches():  # divided by the forwards, averaged over the ranks: what DeepSpeed does
    probs, share = (x @ router).softmax(-1), 1 / (micros * world)
    terms = routing_terms(["teacher_kl", "entropy", "balance"], probs, rule, window, share, target)
    part = (terms["teacher_kl"] + 0.3 * terms["entropy"] + 0.7 * terms["balance"]) / micros
    part.backward()
    loss += part.detach()
dist.all_reduce(router.grad)
dist.all_reduce(loss)
if rank == 0:
    torch.save({"gradient": router.grad / world, "loss": loss / world}, f"{folder}/found.pt")
dist.destroy_process_group()
"""


def test_two_gloo_processes_train_as_one(tmp_path):
    """A shared router in two processes, three forwards each, clips of very different instruments per rank."""
    features, teacher = clips(2 * RANKS * MICROS)
    features = features[features[:, 0].argsort()]  # so that the ranks' own statistics are far apart
    router = torch.randn(E, E, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.save({"logits": features, "teacher": teacher, "router": router}, tmp_path / "clips.pt")
    arguments = [str(value) for value in (RANKS, MICROS, TARGET, tmp_path)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), *arguments], stderr=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    errors = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * RANKS, errors

    router.requires_grad_()
    loss = total(joined((features @ router).softmax(-1), teacher))
    loss.backward()
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    torch.testing.assert_close(found["loss"], loss.detach(), **EXACT)
    torch.testing.assert_close(found["gradient"], router.grad, **EXACT)
