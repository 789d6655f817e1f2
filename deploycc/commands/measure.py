"""`bench` and `compare`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploycc.commands._app import DataText, Inputs, Json, RandomWeights, Seed, Weights, app, emit, progress_bar, show
from deploycc.commands._device import DevicePython, Devices, Keep, Resume, Timeout, on_devices, refuse
from deploycc.errors import UsageError

if TYPE_CHECKING:
    from deploycc.bench.result import BenchResult
    from deploycc.bench.scenario import Scenario
    from deploycc.benching import Request
    from deploycc.core.target import Bench

ACROSS_HELP = "Compare results of unlike machines too; what differs is printed."
COLD_STARTS = 3
MAX_SLOWDOWN = "5%"


def _schema(shown: bool) -> None:
    if shown:
        from deploycc.bench.result import schema

        emit(schema())
        raise typer.Exit


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(metavar="X…", help="Bundles, .onnx, .pt2 or models, measured interleaved.")],
    targets: Annotated[str | None, typer.Option(help='Compile the one model for these first: "a,b,c" or a family such as x86.')] = None,
    data: DataText = None,
    inputs: Inputs = None,
    weights: Weights = None,
    random_weights: RandomWeights = False,
    scenario: Annotated[str, typer.Option(help="How queries come: single-stream, multi-stream, offline or server.")] = "single-stream",
    streams: Annotated[int | None, typer.Option(min=1, help="Sessions that work at the same time (multi-stream, offline, server).")] = None,
    batch: Annotated[str | None, typer.Option(help='Samples in one call; several offline: "1,4,16".')] = None,
    qps: Annotated[float | None, typer.Option(help="Mean arrivals a second (server).")] = None,
    latency_bound: Annotated[str | None, typer.Option(help="What the percentile is held against (server): 20ms.")] = None,
    percentile: Annotated[str | None, typer.Option(help="Of the latencies (server; default 99%).")] = None,
    loadgen: Annotated[bool, typer.Option("--loadgen", help="MLPerf's LoadGen issues and times the queries (extra loadgen).")] = False,
    pictures: Annotated[Path | None, typer.Option(help="A picture or a folder: time pre-processing, inference, post-processing.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of every session (default: 1; on a device: the target's).")] = None,
    affinity: Annotated[str | None, typer.Option(help='CPUs to run on: "0" or "0,2-3".')] = None,
    allocator: Annotated[str | None, typer.Option(help="What answers malloc: system, jemalloc, tcmalloc or mimalloc.")] = None,
    min_seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Least timed seconds per candidate (default: 2; on a device: the target's).")
    ] = None,
    min_runs: Annotated[
        int | None, typer.Option(min=5, help="Least timed calls per candidate (default: 30; on a device: the target's).")
    ] = None,
    sessions: Annotated[
        int | None, typer.Option(min=1, help="Times every candidate is opened, as two sessions of one model differ (default: 5).")
    ] = None,
    max_width: Annotated[str | None, typer.Option(help="Go on until half of every 95 % interval is under this share: 1%.")] = None,
    max_seconds: Annotated[float | None, typer.Option(min=0.1, help="Stop timing after this (with --max-width: default 120).")] = None,
    cold: Annotated[int, typer.Option(min=0, help="Fresh processes per candidate, for cold starts and memory.")] = COLD_STARTS,
    roofline: Annotated[bool, typer.Option(help="Show what share of this machine's peaks each candidate reaches.")] = True,
    seed: Seed = 0,
    save: Annotated[Path | None, typer.Option(help="Write the raw samples and the environment as JSON.")] = None,
    against: Annotated[Path | None, typer.Option(help="A saved result: exit 3 where this one is slower.")] = None,
    max_slowdown: Annotated[str, typer.Option(help="How much slower may be, for sure, before that: 5%.")] = MAX_SLOWDOWN,
    across_machines: Annotated[bool, typer.Option("--across-machines", help=ACROSS_HELP)] = False,
    junit: Annotated[Path | None, typer.Option(help="Write a JUnit XML summary.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a Markdown summary.")] = None,
    schema: Annotated[bool, typer.Option("--schema", callback=_schema, is_eager=True, help="Print the JSON Schema of a result.")] = False,
    device: Devices = None,
    keep: Keep = False,
    resume: Resume = True,
    timeout: Timeout = None,
    device_python: DevicePython = None,
    json: Json = False,
) -> None:
    """Measure latencies in one interleaved run; the first is the baseline.

    With --targets one model is compiled for each of them, and what shipped is measured, beside eager PyTorch; no bundle is kept.
    With --device one bundle is copied to each device, checked and measured there, and removed. Exit status 1: a device failed; 3: slower
    than --against by more than --max-slowdown, beyond doubt.
    """
    from deploycc.bench import comparison, process, summaries
    from deploycc.bench.result import load
    from deploycc.bench.scenario import parse_share
    from deploycc.benching import Request
    from deploycc.planning import parse_shapes
    from deploycc.render_bench import gate as gate_lines

    refuse(device, keep=keep, no_resume=not resume, timeout=timeout, device_python=device_python)
    if device:
        refuse(device, targets=targets, data=data, input=inputs, weights=weights, random_weights=random_weights, seed=seed)
        refuse(device, scenario=scenario != "single-stream", streams=streams, batch=batch, qps=qps, latency_bound=latency_bound)
        refuse(device, percentile=percentile, loadgen=loadgen, pictures=pictures, affinity=affinity, allocator=allocator)
        refuse(device, max_width=max_width, max_seconds=max_seconds, cold=cold != COLD_STARTS, against=against)
        refuse(device, max_slowdown=max_slowdown != MAX_SLOWDOWN, across_machines=across_machines, junit=junit, markdown=markdown)
        refuse(device, no_roofline=not roofline)
        if len(models) != 1:
            raise UsageError(
                f"--device takes one bundle, not {len(models)}", fix="bench one after the other, and compare what --save wrote"
            )
        on_devices(
            Path(models[0]),
            device,
            bench=True,
            keep=keep,
            resume=resume,
            timeout=timeout,
            python=device_python,
            json=json,
            save=save,
            threads=threads,
            seconds=min_seconds,
            runs=min_runs,
            sessions=sessions,
        )
    if against is None and (across_machines or max_slowdown != MAX_SLOWDOWN):
        option = "--across-machines" if across_machines else "--max-slowdown"
        raise UsageError(f"{option} is about --against, and there is none", fix="add --against BASELINE.json, or leave it out")
    allowed, baseline = parse_share("--max-slowdown", max_slowdown), load(against) if against else None
    if sessions is not None and (loadgen or scenario == "server"):
        with_what = "--loadgen" if loadgen else "--scenario server"
        raise UsageError(f"--sessions does not go with {with_what}, which asks one opening of each", fix="leave one of them out")
    if allocator is not None:
        process.ensure_allocator(allocator)
    if affinity is not None:
        process.pin(affinity)
    request = Request(
        models=models,
        data=data,
        inputs=parse_shapes(inputs or []),
        weights=weights,
        random_weights=random_weights,
        settings=_settings(max_width, max_seconds, threads=threads, min_seconds=min_seconds, min_runs=min_runs, sessions=sessions),
        scenario=_scenario(scenario, streams, batch, qps, latency_bound, percentile),
        by_loadgen=loadgen,
        fresh_starts=cold,
        pictures=pictures,
        seed=seed,
    )
    result = _measured(request, roofline, json) if targets is None else _shoot_out(request, targets, roofline, json)
    if save:
        result.save(save)
    gate = comparison.slowdowns(baseline, result, allowed, across_machines=across_machines) if baseline else ()
    for line in gate_lines(gate):
        print(line, file=sys.stderr if json else sys.stdout)
    if junit:
        summaries.write(junit, summaries.junit(result, gate))
    if markdown:
        summaries.write(markdown, summaries.markdown(result, gate))
    if not all(item.passed for item in gate):
        raise typer.Exit(3)


def _settings(max_width: str | None, max_seconds: float | None, **given: Any) -> Bench:
    """When to stop; a width that may never be reached is bounded."""
    from deploycc.bench.scenario import parse_share
    from deploycc.core.target import Bench

    width = None if max_width is None else parse_share("--max-width", max_width)
    seconds = 120.0 if width is not None and max_seconds is None else max_seconds
    return Bench(max_width=width, max_seconds=seconds, **{name: value for name, value in given.items() if value is not None})


def _scenario(
    kind: str, streams: int | None, batch: str | None, qps: float | None, latency_bound: str | None, percentile: str | None
) -> Scenario:
    from deploycc.bench.scenario import parse_batches, parse_share, scenario_of
    from deploycc.planning import parse_quantity

    return scenario_of(
        kind,
        streams=streams,
        batches=None if batch is None else parse_batches(batch),
        qps=qps,
        latency_bound_ms=parse_quantity("--latency-bound", latency_bound, "ms"),
        percentile=None if percentile is None else parse_share("--percentile", percentile),
    )


def _measured(request: Request, roofline: bool, json: bool) -> BenchResult:
    """What is there, as it is."""
    from deploycc import render_bench
    from deploycc.benching import bench_all

    with progress_bar() as progress:
        result = bench_all(request, progress)
    if roofline:
        result = _with_roofs(result, request)
    if json:
        emit(result.model_dump(mode="json"))
    else:
        for part in render_bench.bench(result):
            show(part)
    return result


def _with_roofs(result: BenchResult, request: Request) -> BenchResult:
    """Shares of the peaks; where these cannot be measured, that is said, and the result stays as it is."""
    from deploycc import profiling
    from deploycc.errors import BenchError

    try:
        return profiling.with_roofs(result, inputs=request.inputs, weights=request.weights, random_weights=request.random_weights)
    except BenchError as error:
        print(f"note: {error.what}", file=sys.stderr)
        return result


def _shoot_out(request: Request, targets: str, roofline: bool, json: bool) -> BenchResult:
    """One model compiled for several targets, and what shipped."""
    from deploycc import contest, render_contest
    from deploycc.bench.scenario import Scenario
    from deploycc.planning import Options

    if len(request.models) != 1:
        raise UsageError(
            f"--targets takes one model, not {len(request.models)}", fix="bench the bundles of several models, without --targets"
        )
    further = request.scenario != Scenario() or request.by_loadgen or request.pictures or request.fresh_starts != COLD_STARTS
    if further or not roofline:
        raise UsageError(
            "--targets measures single-stream latency only", fix="compile for each target, and bench the bundles with the other options"
        )
    options = Options(
        data=request.data,
        inputs=request.inputs,
        weights=request.weights,
        random_weights=request.random_weights,
        threads=request.settings.threads,
        seed=request.seed,
    )
    with progress_bar() as progress:
        found = contest.shoot_out(
            request.models[0], options, targets, request.settings, progress, lambda line: print(line, file=sys.stderr)
        )
    if json:
        emit(render_contest.contest_json(found) | {"bundle": None})
    else:
        for part in render_contest.contest(found):
            show(part)
    return found.bench


@app.command()
def compare(
    first: Path,
    second: Path,
    across_machines: Annotated[bool, typer.Option("--across-machines", help=ACROSS_HELP)] = False,
    json: Json = False,
) -> None:
    """Compare two results of `bench --save`, or say why they cannot be compared."""
    from deploycc import render_bench
    from deploycc.bench import comparison
    from deploycc.bench.result import load

    found = comparison.compare(load(first), load(second), across_machines=across_machines)
    if json:
        ratios = {name: [ratio.value, ratio.low, ratio.high] for name, ratio in found.ratios.items()}
        verdicts = {name: ratio.verdict for name, ratio in found.ratios.items()}
        emit({"ratios": ratios, "verdicts": verdicts, "notes": list(found.notes)})
        return
    show(render_bench.comparison_table(found))
    for note in found.notes:
        show(f"note: {note}")
