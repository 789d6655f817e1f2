"""`deploycc verify BUNDLE --emulate CORES`: the bundle's selftest on every core, its answers beside this machine's, and what a call costs.

The selftest decides: it is the runner's own, in the guest, with the golden outputs that the compiler saw. All else is told: how far the
answers are from this machine's, what the kernels multiply with, and instructions per call, which are no time.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from deploycc import tools
from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import Built, Coverage, Progress, silent
from deploycc.core.data import Part, batches
from deploycc.core.registry import BACKENDS
from deploycc.core.target import Target
from deploycc.emulate import compare, counts, guest, kernels, root
from deploycc.emulate.compare import Distance
from deploycc.emulate.cores import Core, parse
from deploycc.emulate.counts import Cost
from deploycc.emulate.session import SESSIONS, Programs
from deploycc.errors import DataError, DeployError, EmulationError, UnsupportedError
from deploycc.planning import open_dataset
from deploycc.runtime import bundle as bundles
from deploycc.runtime.bundle import LoadedBundle
from deploycc.runtime.unpack import opened

ARCH = "aarch64"
CALLS = 3
SAMPLES = 20
FAILED = "the selftest failed"
SIGNALS = {
    "SIGILL": "an instruction that the core does not have",
    "SIGSEGV": "memory that is not its own",
    "SIGABRT": "its own abort",
    "SIGKILL": "the system, mostly for want of memory",
}
Answers = Sequence[Mapping[str, np.ndarray]]


@dataclass(frozen=True, slots=True)
class CoreResult:
    """What came out on one core.

    Attributes:
        core: that was emulated.
        flags: its features that a runtime chooses kernels by.
        refused: why the selftest failed there, in the runner's own words; empty: it passed.
        selftest: what the runner answered, or None.
        distances: from this machine's answers, output by output.
        agreement: share of golden samples and data with the same largest class as here; None where there are no classes.
        multiplies: what the model is multiplied with there; empty: not known.
        cost: of a call; None where it was not counted.
        not_counted: why it was not.
    """

    core: Core
    flags: tuple[str, ...]
    refused: str = ""
    selftest: Mapping[str, Any] | None = None
    distances: tuple[Distance, ...] = ()
    agreement: float | None = None
    multiplies: tuple[str, ...] = ()
    cost: Cost | None = None
    not_counted: str = ""


@dataclass(frozen=True, slots=True)
class Emulated:
    """What was verified, and how.

    Attributes:
        bundle: as the user named it.
        target: the bundle's.
        checks: what holds of the bundle itself.
        runtime: what answered in the guest.
        host: what answered here, whose answers the guest's are compared with.
        emulator: "qemu 7.2.22".
        golden: golden samples.
        samples: of data besides.
        cores: one result each, in the order they were asked for.
        notes: what the user should know.
    """

    bundle: str
    target: str
    checks: tuple[str, ...]
    runtime: str
    host: str
    emulator: str
    golden: int
    samples: int
    cores: tuple[CoreResult, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the selftest passed on every core."""
        return not any(result.refused for result in self.cores)


def emulate(
    bundle: Path,
    names: str,
    *,
    data: str | None = None,
    samples: int = SAMPLES,
    calls: int = CALLS,
    key: Path | None = None,
    seconds: float = guest.SECONDS,
    progress: Progress = silent,
) -> Emulated:
    """Verify a bundle on emulated cores.

    Args:
        bundle: its folder, or a package of it.
        names: of cores, with commas between.
        data: samples that are answered here and there, besides the golden ones.
        samples: at most so many of them.
        calls: that are counted.
        key: public key whose owner must have signed it.
        seconds: after which a program in the guest is ended.
        progress: told the cores done.

    Raises:
        UnknownName, UsageError: a core that does not exist, or is named twice.
        BundleError: the bundle is damaged, or not signed by the owner of `key`.
        UnsupportedError: it is not for ARM, its runtime cannot be emulated, or this qemu does not know a core.
        MissingDependency: qemu, the guest's file system, wheels or a compiler cannot be had.
        DataError: the data do not fit the model.
        EmulationError: a program in the guest takes too long, or the probe fails after a good selftest.
        StoreError: the cache cannot be written.
    """
    chosen = parse(names)
    with opened(bundle) as folder, tempfile.TemporaryDirectory(prefix="deploycc-emulate-") as scratch:
        work = Path(scratch)
        checks, loaded = tools.sealed(folder, key)
        check_emulated(loaded)
        for core in chosen:
            root.prefix(core.name)  # what is missing is told before anything slow
        programs = SESSIONS.get(loaded.manifest["runtime"]["session"]).programs(loaded, work, trusted=key is not None)
        golden = bundles.read_golden(loaded)
        more = _feeds(loaded, data, samples) if data else []
        feeds = [*golden.feeds, *more]
        host, wanted = _answered_here(loaded, feeds, golden.outputs)
        plugin, reason = counts.plugin()
        guests = Guests(loaded, programs, work, feeds, wanted, plugin, reason, calls, seconds)
        results: list[CoreResult] = []
        for index, core in enumerate(chosen):
            progress("emulating", index, len(chosen), core.name)
            results.append(guests.on(core))
        progress("emulating", len(chosen), len(chosen))
    return Emulated(
        bundle=str(bundle),
        target=loaded.manifest["target"]["name"],
        checks=tuple(checks),
        runtime=programs.runtime,
        host=host,
        emulator=f"qemu {root.version(root.program())}",
        golden=len(golden.feeds),
        samples=len(more),
        cores=tuple(results),
        notes=(*programs.notes, *loaded.manifest.get("notices", [])),
    )


def check_emulated(bundle: LoadedBundle) -> None:
    """Raise UnsupportedError unless the bundle is for 64-bit ARM and its runtime runs in a guest."""
    target, session = bundle.manifest["target"], bundle.manifest["runtime"]["session"]
    if target["arch"] not in (ARCH, "any"):
        raise UnsupportedError(
            f"the bundle is for {target['arch']} (target '{target['name']}'), and the emulated CPUs are {ARCH}",
            fix="compile for a target of 64-bit ARM (`deploycc targets`), or verify it here without --emulate",
        )
    if session not in SESSIONS.names() or bundle.manifest["runtime"].get("provider", "cpu") != "cpu":
        raise UnsupportedError(
            f"a bundle for {bundle.manifest['runtime']['package']} (target '{target['name']}') cannot be emulated",
            fix=f"verify it on its device; emulated are {', '.join(SESSIONS.names())}, on the CPU",
        )


@dataclass(frozen=True, slots=True)
class Guests:
    """One bundle, ready to be run on any core.

    Attributes:
        bundle: that is run.
        programs: that run it.
        work: folder for files of this run.
        feeds: every sample, the golden ones first.
        wanted: this machine's answers; fewer than samples where it cannot answer.
        plugin: that counts, or None.
        not_counted: why there is none.
        calls: that are counted.
        seconds: limit of a program.
    """

    bundle: LoadedBundle
    programs: Programs
    work: Path
    feeds: Answers
    wanted: Answers
    plugin: Path | None
    not_counted: str
    calls: int
    seconds: float

    def on(self, core: Core) -> CoreResult:
        """The selftest, and where it passes the probe."""
        flags = root.flags(core.name)
        folder = str(self.bundle.folder.resolve())
        command = [*self.programs.selftest, "selftest", "--json", "--threads", "1", "--bundle", folder]
        ran = guest.run(core.name, command, work=self.work, environment=self.programs.environment, seconds=self.seconds)
        if ran.status != 0:
            return CoreResult(core, flags, refused=_refusal(ran, core), not_counted=FAILED)
        try:
            selftest = json.loads(ran.stdout)
        except ValueError:
            return CoreResult(core, flags, refused=f"the runner's answer is no JSON: {ran.stdout[:80]!r}", not_counted=FAILED)
        answers, multiplies, cost = self._probed(core, folder)
        compared = answers[: len(self.wanted)]
        return CoreResult(
            core,
            flags,
            selftest=selftest,
            distances=compare.distances(self.wanted, compared),
            agreement=compare.agreement(self.wanted, compared),
            multiplies=multiplies,
            cost=cost,
            not_counted=self.not_counted,
        )

    def _probed(self, core: Core, folder: str) -> tuple[Answers, tuple[str, ...], Cost | None]:
        feeds, out, log = (self.work / name for name in ("feeds.npz", "answers.npz", "log"))
        np.savez(feeds, **{f"{index}/{name}": array for index, row in enumerate(self.feeds) for name, array in row.items()})  # pyright: ignore[reportArgumentType]
        options = counts.options(self.plugin, log) if self.plugin else kernels.options(log)
        calls = self.calls if self.plugin else 0
        ran = guest.run(
            core.name,
            [*self.programs.probe, folder, str(feeds), str(out), str(calls)],
            work=self.work,
            environment=self.programs.environment,
            options=options,
            seconds=self.seconds,
        )
        if ran.status != 0:
            raise EmulationError(
                f"on {core.name} the selftest passes, but the probe fails: {_refusal(ran, core)}", fix="report it: a fault of deploycc"
            )
        arrays = bundles.read_arrays(out)
        names = [spec.name for spec in self.bundle.signature.outputs]
        answers = [{name: arrays[f"{index}/{name}"] for name in names} for index in range(len(self.feeds))]
        if not calls:
            return answers, kernels.seen(kernels.scan(log)), None
        cost = counts.cost(counts.read(log))
        return answers, kernels.executed(cost), cost


def _refusal(ran: guest.Ran, core: Core) -> str:
    if ran.signal is None:
        return ran.said
    what = SIGNALS.get(ran.signal, "a signal")
    return f"ended by {ran.signal} ({what}) on {core.name}: its runtime was not built for such a CPU, or has a fault there"


def _feeds(bundle: LoadedBundle, data: str, samples: int) -> list[dict[str, np.ndarray]]:
    """Samples as the bundle's own transform makes them. Raises DataError."""
    splits = open_dataset(data).splits
    split = splits.get("val") or splits.get("all") or next(iter(splits.values()), None)
    if split is None or len(split) == 0:
        raise DataError(f"{data} holds no samples", fix="give --data a folder of pictures or a .npz file with some")
    model = Artifact(Form.ONNX, None, bundle.signature, str(bundle.folder), transform=bundle.transform)
    return [batch.feeds for batch in batches(Part(split, range(len(split))).limited(samples, seed=0), model)]


def _answered_here(bundle: LoadedBundle, feeds: Answers, golden: Answers) -> tuple[str, Answers]:
    """Who answers on this machine, and the answers; the golden outputs alone where nobody can."""
    manifest = bundle.manifest
    built = Built(bundle.folder, (bundle.model.name,), manifest["runtime"], bundle.signature, Coverage(None, 0, ()))
    try:
        target = Target.model_validate({key: value for key, value in manifest["target"].items() if key != "requires"})
        with BACKENDS.get(target.backend).open(built, target, threads=1) as session:
            return f"{manifest['runtime']['package']} on this machine's CPU", [session.run(row) for row in feeds]
    except DeployError as error:
        return f"the golden outputs alone, as the compiler saw them ({error.what})", golden
    except ValidationError:  # a target with keys of another version
        return f"the golden outputs alone, as the compiler saw them (deploycc {manifest.get('deploycc')} wrote the bundle)", golden
