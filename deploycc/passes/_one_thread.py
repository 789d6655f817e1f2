"""Sums in one order: with another number of threads PyTorch's last bits differ, and what is rounded by them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def one_thread() -> Generator[None]:
    """PyTorch computes on one thread, whatever ran in this process before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
