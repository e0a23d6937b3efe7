"""A text encoder whose blocks stream gives the same embeddings, whatever it holds."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel

from wanmoe.moe_lora.ring import BlockRing
from wanmoe.moe_lora.streamed_module import stream_blocks


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 5, "num_heads": 4}
    return UMT5EncoderModel(UMT5Config(**sizes)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_umt5_with_streamed_blocks_is_bit_equal(encoder, dtype):
    truth, ours = copy.deepcopy(encoder).to(dtype), copy.deepcopy(encoder).to(dtype)
    ring = BlockRing(torch.device("cpu"))
    stream_blocks(list(ours.encoder.block), ours.encoder.final_layer_norm, ring)
    blocks = list(truth.encoder.block)
    largest = max(sum(-(-p.nbytes // 256) * 256 for p in block.parameters()) for block in blocks)
    assert ring.nbytes == 2 * largest
    assert not any(name.startswith("encoder.block.") for name, _ in ours.named_parameters())
    for length in (3, 1, 7):
        ids = torch.randint(1, 24, (2, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[1, length // 2 + 1 :] = 0
        with torch.no_grad():
            found = ours(input_ids=ids, attention_mask=mask).last_hidden_state
            expected = truth(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(found, expected)
    assert ring.moved > 5 * largest
    ring.close()
    assert ring.nbytes == 0


def test_a_ring_that_is_closed_is_gone_without_the_collector(encoder):
    ours = copy.deepcopy(encoder)
    gc.collect()
    gc.disable()
    try:
        ring = BlockRing(torch.device("cpu"))
        stream_blocks(list(ours.encoder.block), ours.encoder.final_layer_norm, ring)
        with torch.no_grad():
            ours(input_ids=torch.ones(1, 3, dtype=torch.int64))
        slot = weakref.ref(ring._slots[0].flat.untyped_storage())
        block = ours.encoder.block[0].layer[0].SelfAttention.q
        host = weakref.ref(block.weight.untyped_storage())
        ring.close()
        del ring
        assert slot() is None
        del ours, block
        assert host() is None
    finally:
        gc.enable()
