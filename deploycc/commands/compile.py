"""`compile` and `plan`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deploycc.commands._app import (
    Budget,
    CalibrationText,
    DataText,
    Inputs,
    Json,
    MaxDrop,
    MaxLatency,
    MaxSize,
    Metric,
    Model,
    Passes,
    RandomWeights,
    Seed,
    TargetName,
    Threads,
    Weights,
    app,
    emit,
    progress_bar,
    show,
)


def _options(**given: Any) -> Any:
    """`planning.Options` from what typer parsed: quantities with units, NAME:SHAPE pairs."""
    from deploycc.planning import Options, parse_quantity, parse_shapes

    return Options(
        target=given["target"],
        data=given["data"],
        calibration=given["calibration"],
        passes=given["passes"],
        metric=given["metric"],
        max_drop=given["max_drop"],
        max_latency_ms=parse_quantity("--max-latency", given["max_latency"], "ms"),
        max_size_mb=parse_quantity("--max-size", given["max_size"], "MB"),
        budget_s=parse_quantity("--budget", given["budget"], "s"),
        threads=given["threads"],
        inputs=parse_shapes(given["inputs"] or []),
        weights=given["weights"],
        random_weights=given["random_weights"],
        seed=given["seed"],
        output=given.get("output", Path("bundle")),
        zip=given.get("zipped", False),
        dump=given.get("dump"),
        resume=given.get("resume", True),
    )


@app.command("compile")
def compile_command(
    model: Model,
    target: TargetName = "auto",
    data: DataText = None,
    calibration: CalibrationText = None,
    passes: Passes = None,
    metric: Metric = "auto",
    max_drop: MaxDrop = None,
    max_latency: MaxLatency = None,
    max_size: MaxSize = None,
    budget: Budget = None,
    inputs: Inputs = None,
    weights: Weights = None,
    random_weights: RandomWeights = False,
    threads: Threads = None,
    seed: Seed = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle.")] = Path("bundle"),
    zipped: Annotated[bool, typer.Option("--zip", help="Write OUTPUT.zip too.")] = False,
    dump: Annotated[Path | None, typer.Option(help="Write the model as text after every pass into this folder.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from what an earlier run finished, down to the epoch.")] = True,
    json: Json = False,
) -> None:
    """Compile a model for a target into a checked bundle.

    Exit status 0: the bundle met every limit; 1: the run failed; 2: wrong usage; 3: a bundle was written, but a limit was not met.
    """
    options = _options(**locals())
    from deploycc import contest, driver, render, render_contest

    if (field := contest.field(target)) is not None:
        chosen, left_out = field
        with progress_bar() as progress:
            found = contest.run(model, options, chosen, left_out, progress=progress, say=lambda line: print(line, file=sys.stderr))
        if json:
            emit(render_contest.contest_json(found))
        else:
            for part in (*render_contest.contest(found), *render_contest.contest_end(found)):
                show(part)
        raise typer.Exit(found.exit_status)
    with progress_bar() as progress:
        compiled = driver.compile(model, options, progress)
    if json:
        emit(render.compiled_json(compiled))
    else:
        for part in render.compiled(compiled):
            show(part)
    raise typer.Exit(compiled.exit_status)


@app.command()
def plan(
    model: Model,
    target: TargetName = "auto",
    data: DataText = None,
    calibration: CalibrationText = None,
    passes: Passes = None,
    metric: Metric = "auto",
    max_drop: MaxDrop = None,
    max_latency: MaxLatency = None,
    max_size: MaxSize = None,
    budget: Budget = None,
    inputs: Inputs = None,
    weights: Weights = None,
    random_weights: RandomWeights = False,
    threads: Threads = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Show the resolved, typed pipeline and why; runs nothing."""
    options = _options(**locals())
    from dataclasses import replace

    from deploycc import manual, planning, render
    from deploycc.core.target import several as targets_of

    plans = [planning.plan(model, replace(options, target=name)) for name in targets_of(target) or (target,)]
    if json:
        documents = [render.plan_json(planned, model) for planned in plans]
        emit(documents if len(documents) > 1 else documents[0])
    else:
        show("\n\n".join(manual.plan_text(planned, model) for planned in plans))
