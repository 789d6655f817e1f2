"""One model for several targets: each is compiled, judged and packed, then all that shipped is timed in one interleaved run.

What is best is the fastest artifact within every limit; among those that a user could not tell from it by the clock, the one whose
answers are nearest to the float model's.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploycc import driver
from deploycc.bench.harness import Candidate, measure
from deploycc.bench.result import BenchResult
from deploycc.core import distributed
from deploycc.core import target as targets
from deploycc.core.artifact import Form
from deploycc.core.contract import Progress, silent
from deploycc.core.registry import BACKENDS, FORMS
from deploycc.core.target import Bench, Target
from deploycc.decision import EAGER
from deploycc.errors import DeployError, Interrupted, TargetError, UsageError
from deploycc.package.bundle import Bundle, check_destination, place
from deploycc.package.race import Entry, Race
from deploycc.planning import Options, command_line
from deploycc.runtime import bundle as bundles
from deploycc.runtime.machine import cpu_flags

TIED = 0.98  # of the fastest's speed: nothing a user would notice

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Contest:
    """What came of it.

    Attributes:
        compiled: one result per target, in the order of the targets.
        refused: (target, reason) for those that could not be compiled.
        bench: every shipped artifact, and eager PyTorch where the model is a torch module, interleaved.
        best: the result that was kept.
        race: how they stood to each other; the bundle keeps it, too.
        bundle: its bundle.
        seconds: wall time.
    """

    compiled: tuple[driver.Compiled, ...]
    refused: tuple[tuple[str, str], ...]
    bench: BenchResult
    best: driver.Compiled
    race: Race
    bundle: Bundle
    seconds: float

    @property
    def exit_status(self) -> int:
        """That of the best."""
        return self.best.exit_status

    def _repr_html_(self) -> str:
        """In a notebook: that of the bundle, which tells of the race."""
        return self.bundle._repr_html_()


def obstacle(target: Target) -> str | None:
    """Why a target takes no part on this machine, or None: what must be timed must run, and be the machine's own."""
    misfit = targets.misfit(target)
    if misfit is not None:
        return misfit
    if here := [flag for flag in target.hardware.lacks if flag in cpu_flags()]:
        return f"it is for CPUs without {', '.join(here)}, which this one has"
    available = BACKENDS.get(target.backend).available()
    return None if available else f"{available.missing}: {available.install}"


def field(text: str) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]] | None:
    """(targets to compile for, (target, reason) for those left out) of "x86" or "a,b,c"; None where `text` names one target.

    Raises:
        UsageError: a target of a list cannot be timed here.
        TargetError: none of a family can.
        UnknownName: there is no such target.
    """
    names = targets.several(text)
    if names is None:
        return None
    reasons = {name: obstacle(targets.load(name)) for name in names}
    out = tuple((name, reason) for name, reason in reasons.items() if reason is not None)
    if out and "," in text:
        raise _untimed(*out[0])
    chosen = tuple(name for name in names if reasons[name] is None)
    if not chosen:
        told = f"no target of '{text}' runs on this machine: {out[0][0]}: {out[0][1]}"
        raise TargetError(told, fix="`deploycc doctor` says what is missing")
    return chosen, out


def _untimed(name: str, reason: str) -> UsageError:
    return UsageError(
        f"target '{name}' cannot be timed on this machine: {reason}", fix="leave it out; `deploycc doctor` says what is missing"
    )


def run(
    model: Any,
    options: Options,
    names: Sequence[str | Target],
    left_out: Sequence[tuple[str, str]] = (),
    race: Bench | None = None,
    progress: Progress = silent,
    say: Say = lambda line: None,
) -> Contest:
    """Compile for every target of `names` and write the best bundle to `options.output`. `race`: how the last run is measured.

    Raises:
        TargetError: none could be compiled.
        Interrupted: Ctrl-C; what was finished is raced, or, where nothing was, the best so far of the one under way is kept.
        KeyboardInterrupt: Ctrl-C before there was anything to keep, or in the race.
        UsageError: under torchrun.
    """
    started = time.monotonic()
    if distributed.processes() > 1:
        raise UsageError("several targets are compiled by one process", fix="name one target, or run it without torchrun")
    check_destination(options.output)
    compiled: list[driver.Compiled] = []
    refused, interrupted = list(left_out), None
    with tempfile.TemporaryDirectory(prefix="deploycc-") as work:
        for item in names:
            name = item if isinstance(item, str) else item.name
            say(f"compiling for {name} …")
            try:
                compiled.append(driver.compile(model, _own(options, item, Path(work) / name, time.monotonic() - started), progress))
            except Interrupted as error:
                if not compiled:
                    place(Path(work) / name, options.output, zipped=options.zip)
                    raise Interrupted(f"stopped by the user; the best so far for {name} is in {options.output}", fix=error.fix) from None
                interrupted = error
                break
            except KeyboardInterrupt:  # there is nothing of this one yet
                if not compiled:
                    raise
                interrupted = Interrupted(f"stopped by the user while it compiled for {name}", fix="run the same command again")
                break
            except DeployError as error:
                refused.append((name, error.what))
        if not compiled:
            told = "; ".join(f"{name}: {reason}" for name, reason in refused)
            raise TargetError(f"no target could be compiled: {told}", fix="name one of them to see how to mend it")
        say(f"timing {', '.join(result.plan.target.name for result in compiled)} in turns …")
        bench = _race(compiled, race or compiled[0].plan.target.bench, options.seed, progress)
        best = choose(compiled, bench)
        own = command_line(best.plan, best.shipped.artifact.source, options)
        everyone = ",".join(item if isinstance(item, str) else item.name for item in names)
        together = own.replace(f"--target {best.plan.target.name}", f"--target {everyone}", 1)
        told = Race(entries=entries(compiled, bench, best), refused=tuple(refused), bench=bench, command=together)
        bundle = place(best.bundle.folder, options.output, zipped=options.zip, race=told, command=own)
    if interrupted is not None:
        raise Interrupted(
            f"stopped by the user; the best of {len(compiled)} targets ({best.plan.target.name}) is in {bundle.folder}", fix=interrupted.fix
        )
    return Contest(tuple(compiled), tuple(refused), bench, best, told, bundle, time.monotonic() - started)


def shoot_out(
    model: Any, options: Options, text: str, race: Bench, progress: Progress = silent, say: Say = lambda line: None
) -> Contest:  # fmt: skip
    """Compile for the targets that `text` names and time them; the bundles go away with the run.

    Raises what `field` and `run` raise; UsageError for one target alone that cannot be timed here, too.
    """
    names, left_out = field(text) or ((text,), ())
    if names == (text,) and (reason := obstacle(targets.load(text))) is not None:
        raise _untimed(text, reason)
    with tempfile.TemporaryDirectory(prefix="deploycc-") as folder:
        return run(model, replace(options, output=Path(folder) / "bundle", zip=False), names, left_out, race, progress, say)


def _own(options: Options, target: str | Target, output: Path, spent: float) -> Options:
    """The options of one compile: its own folder, and what is left of the budget."""
    budget = None if options.budget_s is None else max(0.0, options.budget_s - spent)
    dump = options.dump / output.name if options.dump else None
    return replace(options, target=target, output=output, zip=False, dump=dump, budget_s=budget)


def _race(compiled: Sequence[driver.Compiled], settings: Bench, seed: int, progress: Progress) -> BenchResult:
    """Everything that shipped, and eager PyTorch, in one interleaved run on the same samples."""
    reference = compiled[0].reference
    candidates: list[Candidate] = []
    if reference.form is not Form.ONNX:
        form, feeds = FORMS.get(reference.form.value), driver.real_feeds(compiled[0].plan.data, reference, seed)
        candidates.append(Candidate(EAGER, lambda: form.open(reference, threads=settings.threads), feeds))
    for result in compiled:
        loaded = bundles.load(result.bundle.folder)
        own = driver.real_feeds(result.plan.data, result.shipped.artifact, seed)
        candidates.append(Candidate(result.plan.target.name, lambda loaded=loaded: bundles.open_session(loaded, settings.threads), own))
    return measure(candidates, settings=settings, baseline=candidates[0].name, seed=seed, progress=progress)


def entries(compiled: Sequence[driver.Compiled], bench: BenchResult, best: driver.Compiled) -> tuple[Entry, ...]:
    """Eager PyTorch, where it was timed, with the float reference's accuracy; then every target."""
    found = [_entry(result, result is best) for result in compiled]
    if bench.baseline != EAGER:
        return tuple(found)
    reference = compiled[0].outcome.parent.accuracy
    return (Entry(name=EAGER, metric=reference.reference if reference else None), *found)


def _entry(result: driver.Compiled, best: bool) -> Entry:
    attempt, accuracy = result.shipped, result.shipped.accuracy
    return Entry(
        name=result.plan.target.name,
        best=best,
        ships="int8" if attempt.artifact.quant else "float",
        bytes=attempt.bytes,
        metric_name=accuracy.metric if accuracy else None,
        metric=accuracy.candidate if accuracy else None,
        agreement=accuracy.agreement if accuracy else None,
        sqnr_db=accuracy.sqnr_db if accuracy else None,
        int8_macs=attempt.built.coverage.int8_macs,
    )


def choose(compiled: Sequence[driver.Compiled], bench: BenchResult) -> driver.Compiled:
    """The fastest within every limit; among those that are not noticeably slower than it, the one closest to the reference."""
    within = [result for result in compiled if result.exit_status == 0] or list(compiled)
    fastest = min(within, key=lambda result: bench.get(result.plan.target.name).p50_ms)
    tied = [item for item in within if item is fastest or bench.ratio(item.plan.target.name, fastest.plan.target.name).value > TIED]
    return max(tied, key=lambda item: item.shipped.accuracy.sqnr_db if item.shipped.accuracy else 0.0)
