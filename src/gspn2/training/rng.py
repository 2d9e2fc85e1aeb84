"""Random numbers that do not depend on history.

The order of an epoch is a function of (seed, epoch), the augmentation of an image of (seed, epoch, index),
and what a step draws (dropout, mixup) of (seed, step). Neither the number of workers nor an interruption can
change them, nor a library that draws from a global generator, were it only while it is imported. There is no
generator state to store.
"""

# ruff: noqa: NPY002 - image transforms draw from numpy's global generator
from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed out of numbers and names; different parts give unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with the host's global generators started from `seed`, and put them back afterwards.

    Image transforms draw from all three of them, and offer no generator argument.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    # torch.manual_seed would start the device generators again, too.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_everything(seed: int) -> None:
    """Start every global generator, also those of the devices."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)
