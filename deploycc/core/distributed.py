"""Which of several processes of one run this is, as `torchrun` says it in the environment. One writes and speaks; all train."""

from __future__ import annotations

import os


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this one writes and speaks."""
    return rank() == 0
