"""Random streams by name: fixed for ever, since initial values and noise come from them."""

import hashlib

import torch

from wanmoe.moe_lora.seeding import seeded_generator


def test_a_stream_is_the_hash_of_its_parts():
    name = "3/blocks.1.self_attn.q"
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
    expected = torch.rand(4, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(5)
    assert torch.equal(torch.rand(4, generator=seeded_generator(3, "blocks.1.self_attn.q")), expected)
    assert torch.equal(torch.rand(4, generator=seeded_generator("3", "blocks.1.self_attn.q")), expected)
    assert not torch.equal(torch.rand(4, generator=seeded_generator(4, "blocks.1.self_attn.q")), expected)


def test_the_values_are_those_of_every_release():
    assert seeded_generator(0, 1, "noise").initial_seed() == 29294510141127230
