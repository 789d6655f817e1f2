"""Several devices at once: each gets to its end by itself, and what is finished is kept while others fail."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from deploycc.core.contract import Progress, silent
from deploycc.core.store import default_root
from deploycc.errors import DeployError, Interrupted
from deploycc.remote.addresses import parse
from deploycc.remote.job import Job, Machines
from deploycc.remote.state import State
from deploycc.remote.transport import Address, Link
from deploycc.remote.upload import Tell
from deploycc.remote.work import DeviceResult, Failure, Work, save_path

MOST_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Fleet:
    """How all devices came out, in the order they were named.

    Attributes:
        work: what was done.
        outcomes: one for each device.
        kept: devices whose results are of an earlier run of the same command that others failed in.
        saved: the files that were written, by device.
    """

    work: Work
    outcomes: tuple[DeviceResult | Failure, ...]
    kept: frozenset[str] = frozenset()
    saved: tuple[tuple[str, Path], ...] = ()

    @property
    def finished(self) -> tuple[DeviceResult, ...]:
        """The devices that got to the end."""
        return tuple(item for item in self.outcomes if isinstance(item, DeviceResult))

    @property
    def failures(self) -> tuple[Failure, ...]:
        """The devices that did not."""
        return tuple(item for item in self.outcomes if isinstance(item, Failure))

    @property
    def exit_status(self) -> int:
        """0 when every device got to the end, else 1."""
        return 1 if self.failures else 0


def run(
    work: Work,
    devices: Sequence[str],
    *,
    resume: bool = True,
    save: Path | None = None,
    root: Path | None = None,
    progress: Progress = silent,
) -> Fleet:
    """Do the work on every device.

    Args:
        work: what to do.
        devices: texts of `--device`.
        resume: take what an earlier run of the same command finished before others failed.
        save: where results of the bench go (`work.save_path`).
        root: of the cache.
        progress: told how far each device is.

    Raises:
        UsageError: an address that cannot be read.
        Interrupted: the user stopped it; devices were cleaned up.
        StoreError: results cannot be written.
    """
    places = parse(devices)
    state = State(root or default_root(), work.key([str(address) for _, address in places]))
    if not resume:
        state.forget()
    kept = state.read()
    cancel = threading.Event()
    machines = Machines()

    def one(link: Link, address: Address) -> DeviceResult | Failure:
        if (known := kept.get(str(address))) is not None:
            return known
        job = Job(work, link, address, machines, cancel, _teller(progress, address))
        try:
            result = job.run()
            state.put(result)
        except Interrupted:
            raise
        except DeployError as error:
            return Failure(str(address), job.step, error)
        finally:
            progress(str(address), 1, 1)
        return result

    with ThreadPoolExecutor(min(MOST_AT_ONCE, len(places))) as pool:
        running = [pool.submit(one, link, address) for link, address in places]
        try:
            outcomes = tuple(item.result() for item in running)
        except KeyboardInterrupt:
            cancel.set()
            raise Interrupted(
                "stopped by the user; the devices were cleaned up", fix="the same command goes on from the devices that are finished"
            ) from None
        except BaseException:
            cancel.set()
            raise
    found = Fleet(work, outcomes, frozenset(kept))
    if not found.failures:
        state.forget()
    return _saved(found, save) if save else found


def _saved(found: Fleet, path: Path) -> Fleet:
    several = len(found.outcomes) > 1
    written: list[tuple[str, Path]] = []
    for item in found.finished:
        if item.bench is not None:
            target = save_path(path, item.device, several=several)
            item.bench.save(target)
            written.append((item.device, target))
    return Fleet(found.work, found.outcomes, found.kept, tuple(written))


def _teller(progress: Progress, address: Address) -> Tell:
    def tell(step: str, done: int, total: int | None) -> None:
        progress(str(address), done, total, step)

    return tell
