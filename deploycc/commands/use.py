"""What is done with a bundle or a model: `run`, `debug`, `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploycc.commands._app import MODEL_HELP, DataText, Inputs, Json, RandomWeights, Weights, app, emit, progress_bar, show


@app.command()
def run(
    bundle: Path,
    file: Annotated[Path, typer.Argument(metavar="INPUT", help="A picture, or .npz arrays by input name.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 5,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    json: Json = False,
) -> None:
    """Predict on a file the way the device would."""
    from deploycc import render, tools

    found = tools.predict(bundle, file, top=top, threads=threads)
    if json:
        emit(found)
    else:
        show(render.prediction(found))


@app.command()
def debug(
    bundle: Path,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help=f"What it was compiled from (default: as recorded). {MODEL_HELP}.")
    ] = None,
    data: DataText = None,
    samples: Annotated[int, typer.Option(min=1, help="Calls that both are run on.")] = 8,
    below: Annotated[float, typer.Option(help="SQNR in dB under which a tensor has diverged.")] = 10.0,
    tensors: Annotated[bool, typer.Option("--tensors", help="Every tensor, in the graph's order.")] = False,
    json: Json = False,
) -> None:
    """Where a bundle's answers part from the float model's, tensor by tensor in its real runtime."""
    from deploycc import debug as debugging
    from deploycc import render_graph

    with progress_bar() as progress:
        found = debugging.debug(bundle, model=model, data=data, samples=samples, below=below, progress=progress)
    if json:
        emit(render_graph.debugged_json(found))
    else:
        show(render_graph.debugged(found, every=tensors))


@app.command()
def inspect(
    thing: Annotated[str, typer.Argument(metavar="X", help="A bundle, .onnx, .pt2 or model.")],
    inputs: Inputs = None,
    weights: Weights = None,
    random_weights: RandomWeights = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="Every kernel of the runtime's own graph, with its precision.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Run it: time, MACs, bytes and share of this machine's peaks, operator by operator.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="Of the session that is profiled.")] = 1,
    json: Json = False,
) -> None:
    """Signature, operators, the precision that the runtime computes in, MACs and bytes; with --profile, where the time goes."""
    from deploycc import profiling, render_graph, render_profile, tools
    from deploycc.planning import parse_shapes

    shapes = parse_shapes(inputs or [])
    found = tools.inspect(thing, inputs=shapes, weights=weights, random_weights=random_weights)
    timed = profiling.profile(thing, inputs=shapes, weights=weights, random_weights=random_weights, threads=threads) if profile else None
    if json:
        emit(found | {"profile": None if timed is None else profiling.plain(timed)})
        return
    show(render_graph.inspection(found, every=kernels))
    if timed is not None:
        show(render_profile.profile(timed, every=kernels))
