"""Ranks that share clips compute and train as one process does: four gloo processes, which run this file."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from wanmoe.moe_lora import AdapterConfig, Gates, WanmoeError, attach
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.sequence import sequence_parallel

WORLD = 4
SIZES = (2, 4)  # ranks that share a clip: two groups, or one
# 3 frames of 15 tokens: slices of 23 and 22, or of 12, 11, 11 and 11, with ends of frames inside.
FRAMES, HEIGHT, WIDTH = 3, 6, 10
TOKENS = FRAMES * HEIGHT * WIDTH // 4
CLIPS, E = 2, 4
SMALL = {"dim": 32, "ffn_dim": 48, "num_heads": 4, "num_layers": 3, "text_dim": 12, "freq_dim": 16}
T2V = WanConfig(text_len=8, **SMALL)
I2V = WanConfig(task="i2v", in_dim=36, image_dim=20, text_len=8, **SMALL)  # Wan2.1 i2v, with CLIP tokens
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


class Case(NamedTuple):
    trains: str
    """adapter: base and experts, after a frozen block; experts: after a frozen block that has a base;
    pretrain: every weight of a model without adapter."""
    dtype: torch.dtype
    per_frame: bool
    checkpointing: bool

    def __str__(self) -> str:
        rows = "frame" if self.per_frame else "clip"
        return f"{self.trains}-{str(self.dtype)[6:]}-{rows}" + "-checkpointing" * self.checkpointing


CASES = [
    Case("adapter", torch.float64, per_frame=False, checkpointing=False),
    Case("adapter", torch.float64, per_frame=True, checkpointing=True),
    Case("experts", torch.float64, per_frame=False, checkpointing=True),
    Case("experts", torch.float64, per_frame=True, checkpointing=False),
    Case("pretrain", torch.float64, per_frame=False, checkpointing=False),
    Case("pretrain", torch.float64, per_frame=False, checkpointing=True),
    Case("adapter", torch.float32, per_frame=False, checkpointing=False),
    Case("experts", torch.float32, per_frame=True, checkpointing=True),
    Case("pretrain", torch.float32, per_frame=False, checkpointing=True),
]


def model(case: Case) -> tuple[WanDiT, dict[str, torch.nn.Parameter]]:
    """A DiT with random weights everywhere, and what of it trains."""
    torch.manual_seed(0)
    dit = WanDiT(I2V if case.trains == "pretrain" else T2V)
    if case.trains != "pretrain":
        alone = {"blocks.0.ffn.2": 3} if case.trains == "experts" else {}
        config = AdapterConfig(blocks=2, ffn_blocks=1, base_ranks=alone, rank_dropout=0.2)
        parts = ("experts",) if case.trains == "experts" else ("base", "experts")
        attach(dit, config).train_only(parts)
        assert (dit.first_adapted, dit.prefix_adapted) == (1, case.trains == "experts")
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    dit.checkpointing = case.checkpointing
    return dit.to(case.dtype), {name: p for name, p in dit.named_parameters() if p.requires_grad}


def gates_of(pooled: torch.Tensor, router: dict[str, torch.nn.Parameter], per_frame: bool) -> Gates:
    """Rows of a router, for clips [B, D]: every clip and frame has gates of its own."""
    logits = (pooled @ router["weight"])[:, None] + router["frame"]
    rows = (logits if per_frame else logits[:, :1]).flatten(0, 1)
    return Gates(rows[:, :E].softmax(-1), rows[:, E].sigmoid(), TOKENS // FRAMES if per_frame else TOKENS)


def step(case: Case, group: int, sequence=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """v of the clips of a group, and the gradients of their loss, in which the router has its own term."""
    dit, trainable = model(case)
    dit.sequence = sequence
    made = torch.Generator().manual_seed(group)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64).to(case.dtype)

    x, target, weight = (draw(CLIPS, 16, FRAMES, HEIGHT, WIDTH) for _ in range(3))
    t, context = torch.tensor([0.9, 0.3]), [draw(5, 12), draw(3, 12)]
    image, image_context = draw(CLIPS, 20, FRAMES, HEIGHT, WIDTH), draw(CLIPS, 6, 20)
    gates = None
    if case.trains != "pretrain":
        fixed = torch.Generator().manual_seed(7)
        shapes = {"weight": (12, E + 1), "frame": (FRAMES, E + 1)}
        router = {name: torch.nn.Parameter(torch.randn(*shape, generator=fixed).to(case.dtype))
                  for name, shape in shapes.items()}  # fmt: skip
        trainable |= {f"router.{name}": parameter for name, parameter in router.items()}
        gates = gates_of(torch.stack([row.mean(0) for row in context]), router, case.per_frame)
        image = image_context = None
    torch.manual_seed(group)  # of the dropout
    v = dit(x, t.to(case.dtype), context, gates, image, image_context)
    loss = (weight.sigmoid() * F.smooth_l1_loss(v, target, reduction="none")).mean()
    if gates is not None:
        loss = loss + 0.3 * gates.experts.square().sum(1).mean()
    loss.backward()
    return v.detach(), {name: parameter.grad for name, parameter in trainable.items()}


def message(size: int, heads: int, tokens: int) -> str:
    try:
        sequence_parallel(size, heads).split(tokens)
    except WanmoeError as error:
        return str(error)
    return ""


def rank_main(rank: int, folder: Path) -> None:
    """What one rank finds: its v, and the gradients as DeepSpeed takes them, the mean over all ranks."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    found = {}
    for size in SIZES:
        sequence = sequence_parallel(size, T2V.num_heads)
        for case in CASES:
            v, gradients = step(case, rank // size, sequence)
            mean = torch.cat([gradient.flatten() for gradient in gradients.values()]) / WORLD
            dist.all_reduce(mean)
            found[f"{size} {case}"] = {"v": v, "gradients": mean}
    found["faults"] = [message(4, 6, 45), message(3, 6, 45), message(4, 4, 3)]
    found["alone"] = sequence_parallel(1, 4) is None
    torch.save(found, folder / f"found-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), folder], stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    errors = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * WORLD, errors
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(WORLD)]


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    assert truth.norm() > 1e-6, "a truth near zero would hide a zeroed value"
    return float((value - truth).norm() / truth.norm())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_that_share_clips_train_as_one_process(found, case, size):
    truths = [step(case, group) for group in range(WORLD // size)]
    for rank in range(WORLD):
        mine = found[rank][f"{size} {case}"]
        assert relative_error(mine["v"], truths[rank // size][0]) < TOLERANCE[case.dtype]
    gradients = {name: sum(of_group[name] for _, of_group in truths) / len(truths) for name in truths[0][1]}
    parts = found[0][f"{size} {case}"]["gradients"].split([truth.numel() for truth in gradients.values()])
    for (name, truth), value in zip(gradients.items(), parts, strict=True):
        assert relative_error(value.view_as(truth), truth) < TOLERANCE[case.dtype], name


def test_what_does_not_divide_is_named(found):
    heads, ranks, tokens = found[0]["faults"]
    assert heads == (
        "the model's 6 attention heads do not divide among 4 ranks that share a clip; let 1, 2, 3, 6 ranks "
        "share it"
    )
    assert ranks == "4 ranks do not divide into groups of 3 that share a clip"
    assert tokens == "a clip of 3 tokens is too short for 4 ranks to share; let fewer share it"
    assert found[0]["alone"]


@pytest.mark.parametrize("tokens_per_row", [1, 4, 6, 12])
def test_gates_of_a_part_are_those_of_its_tokens(tokens_per_row):
    rows = CLIPS * 12 // tokens_per_row
    experts = torch.randn(rows, E, dtype=torch.float64, requires_grad=True)
    base = torch.randn(rows, dtype=torch.float64, requires_grad=True)
    gates = Gates(experts, base, tokens_per_row)

    def by_token(values: torch.Tensor, each: int) -> torch.Tensor:
        return values.repeat_interleave(each, dim=0).unflatten(0, (CLIPS, -1))

    for start, stop in itertools.combinations(range(13), 2):
        part = gates.part(CLIPS, slice(start, stop))
        assert part.experts.shape[0] * part.tokens_per_row == CLIPS * (stop - start)
        for whole, own in ((experts, part.experts), (base, part.base)):
            expected = by_token(whole, tokens_per_row)[:, start:stop]
            result = by_token(own, part.tokens_per_row)
            assert torch.equal(result, expected)
            weight = torch.randn_like(expected)
            truth, gradient = (torch.autograd.grad((y * weight).sum(), whole)[0] for y in (expected, result))
            torch.testing.assert_close(gradient, truth, rtol=1e-12, atol=1e-12)


def test_gates_of_a_part_have_as_few_rows_as_can_be():
    whole = Gates(torch.rand(6, E), torch.rand(6), 1560)
    assert whole.part(2, slice(1560, 3120)).tokens_per_row == 1560
    assert whole.part(2, slice(100, 1000)).tokens_per_row == 900
    assert whole.part(2, slice(0, 2340)).tokens_per_row == 780


@pytest.mark.parametrize("tokens", [slice(0, 13), slice(5, 5), slice(-1, 3)])
def test_a_part_that_the_gates_do_not_hold_is_refused(tokens):
    gates = Gates(torch.rand(4, E), torch.rand(4), 6)
    with pytest.raises(ValueError, match="4 gate rows of 6 tokens do not hold tokens"):
        gates.part(2, tokens)


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
