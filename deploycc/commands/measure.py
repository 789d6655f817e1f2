"""`bench` and `compare`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from deploycc.commands._app import DataText, Inputs, Json, RandomWeights, Seed, Weights, app, emit, progress_bar, show
from deploycc.commands._device import DevicePython, Devices, Keep, Resume, Timeout, on_devices, refuse


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(metavar="X…", help="Bundles, .onnx, .pt2 or models, measured interleaved.")],
    targets: Annotated[str | None, typer.Option(help='Compile the one model for these first: "a,b,c" or a family such as x86.')] = None,
    data: DataText = None,
    inputs: Inputs = None,
    weights: Weights = None,
    random_weights: RandomWeights = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of every session (default: 1; on a device: the target's).")] = None,
    min_seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Least timed seconds per candidate (default: 2; on a device: the target's).")
    ] = None,
    min_runs: Annotated[
        int | None, typer.Option(min=5, help="Least timed calls per candidate (default: 30; on a device: the target's).")
    ] = None,
    seed: Seed = 0,
    save: Annotated[Path | None, typer.Option(help="Write the raw samples and the environment as JSON.")] = None,
    device: Devices = None,
    keep: Keep = False,
    resume: Resume = True,
    timeout: Timeout = None,
    device_python: DevicePython = None,
    json: Json = False,
) -> None:
    """Measure latencies in one interleaved run; the first is the baseline.

    With --targets one model is compiled for each of them, and what shipped is measured, beside eager PyTorch; no bundle is kept.
    With --device one bundle is copied to each device, checked and measured there, and removed. Exit status 1: a device failed.
    """
    from deploycc import contest, render, render_contest
    from deploycc.core.target import Bench
    from deploycc.errors import UsageError
    from deploycc.planning import Options, parse_shapes
    from deploycc.tools import bench_all

    refuse(device, keep=keep, no_resume=not resume, timeout=timeout, device_python=device_python)
    if device:
        refuse(device, targets=targets, data=data, input=inputs, weights=weights, random_weights=random_weights, seed=seed)
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
        )
    settings = Bench(threads=threads or 1, min_seconds=min_seconds or 2.0, min_runs=min_runs or 30)
    if targets is not None:
        if len(models) != 1:
            raise UsageError(f"--targets takes one model, not {len(models)}", fix="bench the bundles of several models, without --targets")
        options = Options(
            data=data, inputs=parse_shapes(inputs or []), weights=weights, random_weights=random_weights, threads=threads, seed=seed
        )
        with progress_bar() as progress:
            found = contest.shoot_out(models[0], options, targets, settings, progress, lambda line: print(line, file=sys.stderr))
        if save:
            found.bench.save(save)
        if json:
            emit(render_contest.contest_json(found) | {"bundle": None})
            return
        for part in render_contest.contest(found):
            show(part)
        return
    with progress_bar() as progress:
        result = bench_all(
            models,
            data=data,
            inputs=parse_shapes(inputs or []),
            weights=weights,
            random_weights=random_weights,
            settings=settings,
            seed=seed,
            progress=progress,
        )
    if save:
        result.save(save)
    if json:
        emit(result.model_dump(mode="json"))
        return
    show(render.bench_table(result))
    for warning in result.warnings():
        show(f"note: {warning}")


@app.command()
def compare(first: Path, second: Path, json: Json = False) -> None:
    """Compare two results of `bench --save`, or say why they cannot be compared."""
    from deploycc import render
    from deploycc.bench import result

    found = result.compare(result.load(first), result.load(second))
    if json:
        emit({"ratios": {name: [ratio.value, ratio.low, ratio.high] for name, ratio in found.ratios.items()}, "notes": list(found.notes)})
        return
    show(render.comparison_table(found))
    for note in found.notes:
        show(f"note: {note}")
