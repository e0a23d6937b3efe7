"""The ranks of a machine hold one copy of the streamed blocks between them."""

import json

import torch

from wanmoe.moe_lora.wan.config import WanConfig
from wanmoe.moe_lora.wan.dit import WanDiT
from wanmoe.moe_lora.wan.weights import load_dit, save_dit

# What a rank maps of the blocks, in proportional sizes: a page that two share counts half in each.
SHARED = """
import os, torch.distributed as dist
from wanmoe.moe_lora.block_store import BlockStore
from wanmoe.moe_lora.wan.weights import load_dit
from wanmoe.train.node_memory import node_memory

def own():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024

before = own()
store = BlockStore(torch.device("cpu"), memory=node_memory)
dit = load_dit(%r, store=store)
store.take_over(list(dit.blocks))
total = int(store.memory.flat.long().sum())
dist.barrier()
figures = [None] * trainer.world
dist.all_gather_object(figures, [own() - before, total, store.memory.part, store.memory.parts])
dist.barrier()
if trainer.rank == 0:
    open(%r, "w").write(json.dumps({"figures": figures, "bytes": store.memory.flat.nbytes}))
"""


def test_two_ranks_share_one_copy(ranks, config, tmp_path):
    torch.manual_seed(0)
    dit = WanDiT(WanConfig(dim=384, ffn_dim=1024, num_heads=4, num_layers=16, text_dim=16, text_len=8))
    path, found = tmp_path / "large.safetensors", tmp_path / "found.json"
    save_dit(dit, path)
    ranks.run(config, 2, code=SHARED % (str(path), str(found)))
    told = json.loads(found.read_text())
    whole = sum(p.nbytes for p in load_dit(path).blocks.parameters())
    assert whole <= told["bytes"] < 1.01 * whole and whole > 100e6
    sizes, sums, parts, counts = zip(*told["figures"], strict=True)
    assert set(counts) == {2} and set(parts) == {0, 1}
    assert sums[0] == sums[1] > 0
    # Each has filled half of it and read all of it; both together hold it once.
    assert whole < sum(sizes) < 1.15 * whole
    assert max(sizes) < 0.65 * whole
