"""Runs in the guest: `probe.py RUNNER.pyz BUNDLE FEEDS.npz OUT.npz CALLS`. Standard library, numpy and what the bundle's runner holds.

Every sample of FEEDS is answered, which also warms up; then the first is answered CALLS times between two marks for the counter.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

MARK, BEGIN, END = 4242, 0, 1  # a system call that Linux does not have (emulate/native/count.c)


def main(runner: str, folder: str, feeds: str, out: str, calls: str) -> None:
    """See the module's text."""
    sys.path.insert(0, runner)
    import numpy as np

    from deploycc.runtime.bundle import load, open_session, read_arrays

    syscall = ctypes.CDLL(None).syscall
    syscall.argtypes = [ctypes.c_long, ctypes.c_long]
    bundle = load(Path(folder))
    samples: dict[int, dict[str, np.ndarray]] = {}
    for key, array in read_arrays(Path(feeds)).items():
        index, _, name = key.partition("/")
        samples.setdefault(int(index), {})[name] = array
    with open_session(bundle, 1) as session:
        found = {f"{index}/{name}": array for index, given in samples.items() for name, array in session.run(given).items()}
        np.savez(out, **found)  # pyright: ignore[reportArgumentType]  (its allow_pickle is no array)
        first = samples[min(samples)]
        session.run(first)
        gc.disable()  # of Python itself, the same in every call
        for _ in range(int(calls)):
            syscall(MARK, BEGIN)
            session.run(first)
            syscall(MARK, END)


if __name__ == "__main__":
    main(*sys.argv[1:])
