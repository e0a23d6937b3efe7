"""Clips made again: the exact velocity gives back the clip, and the same noise serves every model."""

import pytest
import torch

from wanmoe.moe_lora import ExpertSet, RouterConfig, WanmoeError
from wanmoe.train.data.batch import LabelGates
from wanmoe.train.data.shards import ShardDataset
from wanmoe.train.regenerate import START, regenerate

GATES = LabelGates(ExpertSet(), RouterConfig(), needed=True)


def test_the_exact_velocity_gives_back_the_clips(shards):
    data = ShardDataset(shards, "val")

    def towards(x, t, batch):
        # On the straight way from x0 to noise the velocity is that of the whole way.
        return (x - batch.latent.float()) / t.view(-1, 1, 1, 1, 1)

    made = list(regenerate(towards, data, GATES, batch=3, steps=5))
    assert [len(batch.keys) for batch, _ in made] == [3, 1]
    for batch, latent in made:
        torch.testing.assert_close(latent, batch.latent.float(), atol=1e-4, rtol=1e-4)


def test_it_starts_from_the_same_noise_whatever_the_batch(shards):
    data = ShardDataset(shards, "val")

    def starts(batch):
        seen = []

        def velocity(x, t, clips):
            if float(t[0]) == pytest.approx(START):
                seen.append(x.clone())
            return torch.zeros_like(x)

        list(regenerate(velocity, data, GATES, batch=batch))
        return torch.cat(seen)

    assert torch.equal(starts(4), starts(1))


def test_it_takes_at_least_one_step(shards):
    with pytest.raises(WanmoeError, match="steps is 0"):
        next(regenerate(lambda x, t, b: x, ShardDataset(shards, "val"), GATES, steps=0))
