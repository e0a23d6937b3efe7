"""Random streams that depend on what they are for, and on nothing that ran before."""

from __future__ import annotations

import hashlib

import torch


def seeded_generator(*parts: object) -> torch.Generator:
    """The random stream on the CPU that belongs to `parts` joined by "/", the same in every process.

    For example (seed, name of a linear): every rank draws the same initial values, whatever it drew before.
    """
    name = "/".join(str(part) for part in parts)
    digest = hashlib.blake2b(name.encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
