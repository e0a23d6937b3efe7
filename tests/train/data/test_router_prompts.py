"""Prompts made from keywords: what they name, and that a router taught by them reads sentences that it never
saw, in which the two hand-written files are."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from wanmoe.moe_lora.instruments import CHOLEC, SURGICAL, Expert, ExpertSet
from wanmoe.moe_lora.routing import LearnedRouter, pool_text
from wanmoe.moe_lora.wan.text import HashTextEncoder, encode_prompts
from wanmoe.train.data.router_prompts import MOST, RouterPrompt, router_prompts
from wanmoe.train.data.stored_prompts import PromptSampler, read_prompt_list
from wanmoe.train.routing_losses import teacher_divergence
from wanmoe.train.synth_captions import captions

EXPERTS = ExpertSet(SURGICAL)
HERE = Path(__file__).parent
HELD_OUT = [HERE / f"router_prompts_{name}.jsonl" for name in ("held_out", "fresh")]
NAMES_ALONE = ExpertSet([Expert(name="again"), Expert(name="milk"), Expert(name="杯子")])


@pytest.mark.parametrize("experts", [EXPERTS, ExpertSet(CHOLEC), NAMES_ALONE])
def test_each_prompt_names_its_experts_and_no_other(experts: ExpertSet) -> None:
    prompts = router_prompts(experts)
    assert len({prompt.text for prompt in prompts}) == len(prompts) <= MOST
    load = dict.fromkeys(experts.names, 0.0)
    for text, weights in prompts:
        assert experts.find(text).keys() == weights.keys() and sum(weights.values()) == 1
        assert len(weights) == 1 or set(weights.values()) == {0.5}
        for name, weight in weights.items():
            load[name] += weight
    assert min(load.values()) > 0.6 * max(load.values())
    assert 0.3 < sum(len(prompt.weights) == 2 for prompt in prompts) / len(prompts) < 0.5


def test_every_keyword_is_used_many_times_and_in_the_sentences_of_its_language() -> None:
    texts = [prompt.text.lower() for prompt in router_prompts(EXPERTS)]
    for expert in SURGICAL:
        for keyword in expert.keywords:
            assert sum(keyword.rstrip("*") in text for text in texts) > 8, keyword
    both = [text for text in texts if not text.isascii() and any("a" <= letter <= "z" for letter in text)]
    assert not both and 0.4 < sum(text.isascii() for text in texts) / len(texts) < 0.7


def test_the_same_seed_gives_the_same_prompts() -> None:
    assert router_prompts(EXPERTS, 3) == router_prompts(EXPERTS, 3) != router_prompts(EXPERTS, 4)


def test_sets_of_which_little_can_be_said() -> None:
    (one,) = {tuple(prompt.weights) for prompt in router_prompts(ExpertSet([Expert(name="cello")]))}
    assert one == ("cello",)
    # Every sentence about the second is one about the first too.
    hidden = router_prompts(ExpertSet([Expert(name="a", keywords=("the*",)), Expert(name="then")]))
    assert all(prompt.weights.keys() <= {"a", "then"} for prompt in hidden)


def test_no_held_out_sentence_is_among_the_templates() -> None:
    """No five words of a held-out sentence, or eight Chinese characters, stand in a prompt."""
    seen: set[str] = set()
    for text, _ in router_prompts(EXPERTS):
        seen.update(runs(text))
    for path in HELD_OUT:
        for text, _ in read_prompt_list(path, EXPERTS):
            assert seen.isdisjoint(runs(text)), text


def runs(text: str) -> set[str]:
    pieces: Sequence[str] = text.lower().strip(".").split() if text.isascii() else text
    length = 5 if text.isascii() else 8
    return {" ".join(pieces[at : at + length]) for at in range(len(pieces) - length + 1)}


def test_a_router_reads_sentences_that_it_never_saw() -> None:
    """As wide as umT5, but with the stand-in, which knows which words are the same and no more: what is
    tested is that the keywords are found among words that no prompt has."""
    encoder = HashTextEncoder(dim=4096)
    learned = scene_captions(160)
    held_out = [prompt for path in HELD_OUT for prompt in read_prompt_list(path, EXPERTS)]
    alone = agreement(taught(encoder, learned, steps=100), encoder, held_out)
    right = agreement(taught(encoder, learned + router_prompts(EXPERTS), steps=300), encoder, held_out)
    kinds = {"single": 1, "pair": 2}
    for kind, count in kinds.items():
        for language, ascii_ in (("en", True), ("zh", False)):
            rows = [
                i for i, p in enumerate(held_out) if len(p.weights) == count and p.text.isascii() == ascii_
            ]
            share = float(right[rows].mean())
            print(
                f"{kind} {language}: {share:.1%} of {len(rows)}; by captions {float(alone[rows].mean()):.1%}"
            )
            assert share >= 0.9
    assert len(held_out) == 170 and right.mean() >= 0.95
    assert alone.mean() < 0.5


def scene_captions(count: int) -> list[RouterPrompt]:
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        name = EXPERTS.names[number % 4]
        text = captions(name, ("left", "right", "top", "bottom")[int(rng.integers(4))], rng)[number % 2]
        found.append(RouterPrompt(text, {name: 1.0}))
    return found


def targets(prompts: Sequence[RouterPrompt]) -> torch.Tensor:
    rows = torch.zeros(len(prompts), len(EXPERTS))
    for row, prompt in zip(rows, prompts, strict=True):
        for name, weight in prompt.weights.items():
            row[EXPERTS.index(name)] = weight
    return rows


def pooled(encoder: HashTextEncoder, prompts: Sequence[RouterPrompt]) -> torch.Tensor:
    return pool_text(encode_prompts(encoder, [prompt.text for prompt in prompts]))


def taught(encoder: HashTextEncoder, prompts: Sequence[RouterPrompt], steps: int) -> LearnedRouter:
    torch.manual_seed(0)
    router = LearnedRouter(encoder.dim, len(EXPERTS))
    draw = PromptSampler(pooled(encoder, prompts), targets(prompts))
    optimizer = torch.optim.AdamW(router.parameters(), 1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        texts, wanted = draw(64, generator)
        loss = teacher_divergence(router(texts), wanted).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return router


@torch.no_grad()
def agreement(
    router: LearnedRouter, encoder: HashTextEncoder, prompts: Sequence[RouterPrompt]
) -> torch.Tensor:
    """1 where the largest gates, as many as are named, are those of the named experts."""
    wanted = targets(prompts)
    right = []
    for gates, row in zip(router(pooled(encoder, prompts)), wanted, strict=True):
        named = set(row.nonzero().flatten().tolist())
        right.append(float(set(gates.topk(len(named)).indices.tolist()) == named))
    return torch.tensor(right)
