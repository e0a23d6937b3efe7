"""From recordings and labels to batches: clips, shards, readers, checks."""
