"""Stage C as it is run: the router reads prompts that it has never seen, and nothing else has moved.

The stand-in encoder is as wide as umT5; it knows which words are the same and nothing of what they mean, so
every held-out prompt has a keyword of its experts.
"""

from pathlib import Path

import pytest
import torch

from wanmoe.moe_lora import AdapterConfig, ExpertSet, attach, save_adapter
from wanmoe.moe_lora.adapter_file import read_adapter, router_of
from wanmoe.moe_lora.instruments import SURGICAL
from wanmoe.moe_lora.routing import RuleRouter, learned_gates, pool_text
from wanmoe.moe_lora.wan.codec import load_vae
from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.text import HashTextEncoder, encode_prompts
from wanmoe.moe_lora.wan.weights import save_dit
from wanmoe.train.data.clip_list import read_clip_list
from wanmoe.train.data.prepare import prepare
from wanmoe.train.data.router_prompts import router_prompts
from wanmoe.train.data.stored_prompts import read_prompt_list
from wanmoe.train.synth import synth_clips
from wanmoe.train.tracking import read_metrics

DIM = 4096
EXPERTS = ExpertSet(SURGICAL)
HELD_OUT = [Path(__file__).parent / "data" / f"router_prompts_{name}.jsonl" for name in ("held_out", "fresh")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, ranks):
    """(run folder, adapter file of stage C)."""
    root = tmp_path_factory.mktemp("router")
    clips = synth_clips(root / "clips", clips=32, val=4, height=32, width=32, frames=5)
    prepare(
        read_clip_list(clips),
        root / "shards",
        codec=load_vae("haar"),
        text_encoder=HashTextEncoder(dim=DIM),
        experts=EXPERTS,
        size=(32, 32),
        frames=5,
        router_prompts=router_prompts(EXPERTS),
    )
    torch.manual_seed(0)
    small = {"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "text_len": 32, "freq_dim": 16}
    dit = WanDiT(WanConfig(text_dim=DIM, **small))
    torch.nn.init.normal_(dit.head.head.weight, std=0.05)
    save_dit(dit, root / "model.safetensors")
    adapter = attach(dit, AdapterConfig(blocks=1, ffn_blocks=1))
    for name, parameter in adapter.parameters().items():
        if name.endswith("_up"):
            torch.nn.init.normal_(parameter, std=0.05)
    save_adapter(adapter, root / "b.safetensors", stage="b", step=1, noise_expert="both", base_sha256="")
    tree = {
        "model": {"dit": str(root / "model.safetensors"), "adapter": str(root / "b.safetensors")},
        "router": {"mode": "learned"},
        "data": {"shards": str(root / "shards"), "batch": 2, "val_batch": 4, "workers": 0},
        "train": {"stage": "c", "run": str(root / "c"), "steps": 120, "log_every": 20},
        "tracking": {"enabled": False},
        "launch": {"ranks": 1},
    }
    ranks.run(tree)
    return root / "c", root / "c" / "adapter.safetensors"


@torch.no_grad()
def test_the_router_agrees_with_the_labels_of_prompts_it_has_not_seen(trained):
    """One instrument: the largest gate is its expert's. Two: the two largest are theirs."""
    info, tensors = read_adapter(trained[1])
    router, rule = router_of(info, tensors, trained[1]), RuleRouter(EXPERTS)
    prompts = [prompt for path in HELD_OUT for prompt in read_prompt_list(path, EXPERTS)]
    pooled = pool_text(encode_prompts(HashTextEncoder(dim=DIM), [prompt.text for prompt in prompts]))
    gates = learned_gates(router(pooled), info.router, training=False)
    right: dict[str, list[bool]] = {}
    for row, prompt in zip(gates, prompts, strict=True):
        wanted = rule.route(labels=list(prompt.weights.items())) > 0
        named = set(row.topk(int(wanted.sum())).indices.tolist())
        language = "en" if prompt.text.isascii() else "zh"
        kind = f"{'one' if wanted.sum() == 1 else 'two'} {language}"
        right.setdefault(kind, []).append(named == set(wanted.nonzero()[:, 0].tolist()))
    for kind, hits in sorted(right.items()):
        print(f"{kind}: {sum(hits)} of {len(hits)}")
    every = [hit for hits in right.values() for hit in hits]
    assert len(every) == 170 and sum(every) / len(every) >= 0.95
    assert all(sum(hits) / len(hits) >= 0.9 for hits in right.values())


def test_the_gates_of_the_clips_spread_over_the_experts(trained):
    lines = [line for line in read_metrics(trained[0]) if "load/entropy" in line]
    assert (
        lines
        and lines[-1]["load/entropy"] > 1.0
        and max(lines[-1][f"load/{name}"] for name in EXPERTS.names) < 0.5
    )
