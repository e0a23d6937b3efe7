"""The training room: clips to shards to batches, objective, stages, engine, loop, checkpoint, tracking."""

from .data.shards import ShardDataset
from .data.verify import verify_shards

__all__ = ["ShardDataset", "verify_shards"]
