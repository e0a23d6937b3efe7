"""The training room: clips to shards to batches, objective, stages, engine, loop, checkpoint, tracking."""

from .shard_check import verify_shards
from .shards import ShardDataset

__all__ = ["ShardDataset", "verify_shards"]
