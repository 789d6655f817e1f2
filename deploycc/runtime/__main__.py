"""The device's command: `python runner.pyz selftest | bench | predict FILE` beside a bundle's manifest.

Needs numpy and the bundle's runtime; Pillow for pictures. Standard output is the answer (`--json`: one JSON document), standard
error is everything else. Exit status 0 = good, 1 = failed, 2 = wrong usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from deploycc.errors import DeployError, UsageError
from deploycc.runtime import record
from deploycc.runtime.bundle import LoadedBundle, check_golden, load, open_session, read_golden
from deploycc.runtime.doubts import instability
from deploycc.runtime.host import check_host, peak_rss_bytes, reset_peak, rss_bytes
from deploycc.runtime.inputs import interpret, read_input
from deploycc.runtime.kernel import Watch
from deploycc.runtime.machine import available_cores, cpu_arch, cpu_model
from deploycc.runtime.measure import SESSIONS, Call, Stop, time_interleaved
from deploycc.runtime.seal import check_signature
from deploycc.runtime.sessions import find
from deploycc.runtime.signature import Outputs
from deploycc.runtime.statistics import summarize
from deploycc.runtime.unpack import opened


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    command = {"selftest": selftest, "bench": bench, "predict": predict}[options.command]
    try:
        with opened(options.bundle) as options.bundle:
            answer, text = command(options)
    except DeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(json.dumps(answer) if options.json else text)
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document")
    common.add_argument("--threads", type=_count, help="threads of the runtime (default: the target's, at most this machine's cores)")
    common.add_argument(
        "--bundle", type=Path, default=_home(), help="folder, .zip or .tar.gz of the bundle (default: where this file lies)"
    )
    common.add_argument("--key", type=Path, metavar="PUB.pem", help="refuse the bundle unless the owner of this public key signed it")
    parser = argparse.ArgumentParser(prog="runner.pyz", description="Check, measure and use the model bundle that this file lies in.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("selftest", parents=[common], help="check hashes, this machine, and the golden outputs")
    timing = commands.add_parser("bench", parents=[common], help="measure latency, cold start and memory on this machine")
    timing.add_argument("--seconds", type=float, help="least seconds of timed calls (default: what the target says)")
    timing.add_argument("--runs", type=_count, help="least number of timed calls (default: what the target says)")
    timing.add_argument("--sessions", type=_count, help="times the model is opened (default: what the target says)")
    timing.add_argument("--samples", action="store_true", help="with --json: every timed call in nanoseconds too")
    timing.add_argument("--input", type=Path, metavar="FILE", help="a picture or .npz to measure with, instead of the golden inputs")
    timing.add_argument("--save", type=Path, metavar="FILE", help="write raw samples and environment as `deploycc bench --save` does")
    using = commands.add_parser("predict", parents=[common], help="run one picture or one .npz file of arrays")
    using.add_argument("file", type=Path)
    using.add_argument("--top", type=_count, default=5, help="how many classes to show")
    using.add_argument("--save", type=Path, metavar="FILE.npz", help="write all outputs as arrays")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def _home() -> Path:
    """The folder of the archive this code runs from; outside an archive, the current folder."""
    archive = Path(__file__).parents[2]
    return archive.parent if archive.is_file() else Path()


def _open(options: argparse.Namespace) -> tuple[LoadedBundle, int]:
    """A bundle that is whole and fits this machine, and how many threads to run it with."""
    if options.key:
        check_signature(options.bundle, options.key)
    bundle = load(options.bundle)
    check_host(bundle.manifest)
    wanted = bundle.manifest["target"].get("bench", {}).get("threads", 1)
    return bundle, options.threads or min(wanted, available_cores())


def _about(bundle: LoadedBundle, threads: int) -> dict[str, Any]:
    runtime = bundle.manifest["runtime"]
    return {
        "target": bundle.manifest["target"]["name"],
        "cpu": cpu_model(),
        "arch": cpu_arch(),
        "threads": threads,
        "runtime": f"{runtime['package']} {find(runtime['session']).version()}",
        "notices": list(bundle.manifest.get("notices", [])),
    }


def selftest(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Hashes, machine, golden outputs; raises what is wrong."""
    bundle, threads = _open(options)
    golden = read_golden(bundle)
    with open_session(bundle, threads) as session:
        worst = check_golden(golden, session)
    about = _about(bundle, threads)
    lines = [f"ok: {len(golden.feeds)} golden samples on {about['runtime']}, {about['cpu']}"]
    lines += [f"    {name}: at most {value:.4g} away (allowed {golden.atol.get(name, 0.0):.4g})" for name, value in worst.items()]
    lines += [f"note: {notice}" for notice in about["notices"]]
    lines += [f"note: {name} is not part of the bundle and is not used" for name in bundle.unlisted]
    answer = {
        **about,
        "ok": True,
        "samples": len(golden.feeds),
        "max_abs": worst,
        "atol": dict(golden.atol),
        "unlisted": list(bundle.unlisted),
    }
    return answer, "\n".join(lines)


def bench(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Cold start, then steady state on real inputs."""
    bundle, threads = _open(options)
    feeds = (read_input(bundle, options.input),) if options.input else read_golden(bundle).feeds
    wanted = bundle.manifest["target"].get("bench", {})
    seconds = options.seconds or wanted.get("min_seconds", 2.0)
    runs = options.runs or wanted.get("min_runs", 30)
    sessions = options.sessions or wanted.get("sessions", SESSIONS)
    stop = Stop(seconds, runs, wanted.get("max_width"), wanted.get("max_seconds"), sessions)
    earlier = peak_rss_bytes()
    before = rss_bytes() if reset_peak() else None  # as the host's harness does, so that growth means the same
    begin = time.perf_counter_ns()
    with ExitStack() as stack:
        session = stack.enter_context(open_session(bundle, threads))
        opened = time.perf_counter_ns()
        session.run(feeds[0])
        session.synchronize()
        first = time.perf_counter_ns()
        cold_peak = peak_rss_bytes()

        def call(index: int) -> None:
            session.run(feeds[index % len(feeds)])
            session.synchronize()

        def again() -> dict[str, Call]:
            nonlocal session
            stack.close()
            session = stack.enter_context(open_session(bundle, threads))
            return {"model": call}

        watch = Watch()
        samples = time_interleaved(
            {"model": call},
            stop,
            again=again,
            progress=lambda what, done, total: watch.look(),
        )["model"]
        observed = watch.seen()
    summary = summarize(samples)
    warnings = [*observed.warnings(), *instability(samples, summary)]
    if threads > available_cores():
        warnings.append(f"{threads} threads on {available_cores()} available cores")
    peak = max(filter(None, (earlier, peak_rss_bytes())), default=None)
    about = _about(bundle, threads)
    answer: dict[str, Any] = {
        **about,
        "latency_ms": dataclasses.asdict(summary),
        "open_ms": (opened - begin) / 1e6,
        "first_ms": (first - opened) / 1e6,
        "peak_rss_mb": None if peak is None else peak / 1e6,
        "observed": dataclasses.asdict(observed),
        "warnings": warnings,
    }
    if options.save or options.samples:
        found = record.document(
            about["target"],
            samples,
            feeds[0],
            threads=threads,
            stop=stop,
            open_ms=answer["open_ms"],
            first_ms=answer["first_ms"],
            rss_growth_mb=(cold_peak - before) / 1e6 if before and cold_peak and cold_peak > before else None,
        )
        if options.save:
            record.save(options.save, found)
        if options.samples:
            extent = {"min_seconds": seconds, "min_runs": runs, "sessions": sessions, "stable": samples.stable}
            answer["measurement"] = {**found["measurements"][0], **extent}
    memory = "not known" if peak is None else f"{peak / 1e6:.0f} MB, this whole process"
    high = [f"{name} {value:.3f}" for name, value in (("p90", summary.p90), ("p99", summary.p99), ("p99.9", summary.p999)) if value]
    times = f"p50 {summary.p50:.3f} ms ({summary.low:.3f} to {summary.high:.3f}), {', '.join([*high, f'mean {summary.mean:.3f}'])}"
    lines = [
        f"{about['target']} on {about['runtime']}, {about['cpu']}, {threads} thread{'s' if threads > 1 else ''}",
        f"{times}; {summary.runs} runs",
        f"cold start {answer['open_ms']:.1f} ms to open + {answer['first_ms']:.1f} ms first answer; peak memory {memory}",
        *(f"warning: {text}" for text in warnings),
        *(f"note: {notice}" for notice in about["notices"]),
    ]
    return answer, "\n".join(lines)


def predict(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """One file through transform, model and post-processing."""
    bundle, threads = _open(options)
    feeds = read_input(bundle, options.file)
    with open_session(bundle, threads) as session:
        outputs = session.run(feeds)
    if options.save:
        _save(options.save, outputs)
    notices = list(bundle.manifest.get("notices", []))
    notes = [f"note: {notice}" for notice in notices]
    classes = interpret(bundle, outputs, options.top)
    if classes is not None:
        lines = [f"{item['score']:8.4f}  {item['index']:5d}  {item.get('name', '')}".rstrip() for item in classes]
        return {"file": str(options.file), "top": classes, "notices": notices}, "\n".join([*lines, *notes])
    shown = {name: {"dtype": str(array.dtype), "shape": list(array.shape), "values": array.tolist()} for name, array in outputs.items()}
    lines = [f"{name}: {array.dtype}{list(array.shape)}{_span(array)}" for name, array in outputs.items()]
    return {"file": str(options.file), "outputs": shown, "notices": notices}, "\n".join([*lines, *notes])


def _span(array: np.ndarray) -> str:
    return f" min {array.min():.6g} max {array.max():.6g}" if array.size else ""


def _save(path: Path, outputs: Outputs) -> None:
    try:
        with path.open("wb") as file:  # given a name, numpy would add .npz to it
            np.savez(file, **outputs)  # pyright: ignore[reportArgumentType]  (its allow_pickle is no array)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", fix="give --save a file in a writable folder") from error


if __name__ == "__main__":
    sys.exit(main())
