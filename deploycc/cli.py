"""The command line; the only module (with the device's runner) that prints or exits.

Nothing heavy is imported before a command needs it: `deploycc --help` and the lists never import torch.
"""

from __future__ import annotations

import json as json_module
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploycc import __version__
from deploycc.core import distributed
from deploycc.errors import DeployError

if TYPE_CHECKING:
    from deploycc.core.contract import Progress

app = typer.Typer(
    name="deploycc",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Takes a trained model to the hardware it must run on: one command in, a small, fast, checked bundle out.",
)

MODEL_HELP = "torchvision:NAME, file.onnx, file.pt2, file.py:factory or package.module:factory"
DATA_HELP = "Data that judges the model: a folder of images, file.npz, file.py:factory, sklearn:digits."
INPUT_HELP = "NAME:SHAPE such as x:1x3x224x224; a letter makes an axis dynamic (x:Nx3x224x224). Repeatable."
TARGET_HELP = (
    "Name of a target (`deploycc targets`), a .toml file, or auto. A family (x86) or a list (a,b,c) compiles for every one that runs here, "
    "times them in turns, and keeps the fastest within the limits."
)
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
TargetName = Annotated[str, typer.Option("--target", "-t", help=TARGET_HELP)]
DataText = Annotated[str | None, typer.Option("--data", "-d", help=DATA_HELP)]
CalibrationText = Annotated[str | None, typer.Option("--calibration", help="Data for calibration only; no labels needed.")]
Passes = Annotated[str | None, typer.Option(help='A whole pipeline, or edits of the target\'s: "+fold-normalize, -fold-batchnorm".')]
Metric = Annotated[str, typer.Option(help="auto, top1, top5, f1, mse, agreement, cosine or sqnr.")]
MaxDrop = Annotated[float | None, typer.Option(help="Largest drop of the metric, 0 to 1 (default: the target's, 0.01).")]
MaxLatency = Annotated[str | None, typer.Option(help="Limit on p95: 5ms.")]
MaxSize = Annotated[str | None, typer.Option(help="Limit on the model's files: 4MB.")]
Budget = Annotated[str | None, typer.Option(help="Start no new attempt after this time: 90s, 10m, 1h.")]
Inputs = Annotated[list[str] | None, typer.Option("--input", help=INPUT_HELP)]
Weights = Annotated[Path | None, typer.Option(help="Weights to load: .safetensors, or .pt/.pth holding a state dict.")]
RandomWeights = Annotated[bool, typer.Option("--random-weights", help="Accept random weights: latency and size only, accuracy not valid.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the session and the bench (default: the target's).")]
Seed = Annotated[int, typer.Option(help="Of every random choice.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")]


def main() -> None:
    """Entry point: errors become messages and exit statuses."""
    if not distributed.is_main():  # of several processes, one speaks
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        status = app(standalone_mode=False)  # what typer.Exit carried, or the command's own None
        sys.exit(status if isinstance(status, int) else 0)
    except DeployError as error:
        _complain(error)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("\nstopped by the user; nothing was written. Finished passes are kept: the same command goes on from them.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # noqa: BLE001  (the last place where an error can be explained)
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer's own usage errors
            print(f"error: {error.format_message()}", file=sys.stderr)  # pyright: ignore[reportAttributeAccessIssue]
            print("  fix: `deploycc COMMAND --help` shows what it takes", file=sys.stderr)
            sys.exit(2)
        traceback.print_exc()
        print("\nThis is a fault in deploycc, not in your input. Please report it with the lines above.", file=sys.stderr)
        sys.exit(1)
    finally:
        if distributed.processes() > 1 and "torch" in sys.modules:
            sys.modules["torch"].distributed.destroy_process_group()


def _complain(error: DeployError) -> None:
    print(f"error: {error.what}", file=sys.stderr)
    for note in getattr(error, "__notes__", []):
        print(f"  {note}", file=sys.stderr)
    cause = error.__cause__
    if cause is not None and not isinstance(cause, DeployError) and str(cause) not in error.what:
        print("  cause:", *traceback.format_exception_only(cause), file=sys.stderr, end="")
    print(f"  fix: {error.fix}", file=sys.stderr)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on stderr for what takes long; nothing when stderr is no terminal."""
    from deploycc.core.contract import silent

    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:

        def show(what: str, done: int, total: int | None, note: str = "") -> None:
            if what not in tasks:
                for other in tasks.values():
                    bars.update(other, visible=False)
                tasks[what] = bars.add_task(what, total=total)
            described = f"{what}: {note}" if note else what
            bars.update(tasks[what], description=described, completed=done, total=total, visible=not (total is not None and done >= total))

        yield show


def _print(value: Any) -> None:
    """A table or text on stdout; never cut where stdout is no terminal."""
    from rich.console import Console

    if isinstance(value, str):
        print(value)
        return
    from rich.table import Table

    from deploycc.render import fitting

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for part in fitting(value, console) if isinstance(value, Table) else [value]:
        console.print(part)


def _emit(document: Any) -> None:
    print(json_module.dumps(document, indent=2, ensure_ascii=False))


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
        with _progress() as progress:
            found = contest.run(model, options, chosen, left_out, progress=progress, say=lambda line: print(line, file=sys.stderr))
        if json:
            _emit(render_contest.contest_json(found))
        else:
            for part in (*render_contest.contest(found), *render_contest.contest_end(found)):
                _print(part)
        raise typer.Exit(found.exit_status)
    with _progress() as progress:
        compiled = driver.compile(model, options, progress)
    if json:
        _emit(render.compiled_json(compiled))
    else:
        for part in render.compiled(compiled):
            _print(part)
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
        _emit(documents if len(documents) > 1 else documents[0])
    else:
        _print("\n\n".join(manual.plan_text(planned, model) for planned in plans))


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(metavar="X…", help="Bundles, .onnx, .pt2 or models, measured interleaved.")],
    targets: Annotated[str | None, typer.Option(help='Compile the one model for these first: "a,b,c" or a family such as x86.')] = None,
    data: DataText = None,
    inputs: Inputs = None,
    weights: Weights = None,
    random_weights: RandomWeights = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every session.")] = 1,
    min_seconds: Annotated[float, typer.Option(min=0.1, help="Least timed seconds per candidate.")] = 2.0,
    min_runs: Annotated[int, typer.Option(min=5, help="Least timed calls per candidate.")] = 30,
    seed: Seed = 0,
    save: Annotated[Path | None, typer.Option(help="Write the raw samples and the environment as JSON.")] = None,
    json: Json = False,
) -> None:
    """Measure latencies in one interleaved run; the first is the baseline.

    With --targets one model is compiled for each of them, and what shipped is measured, beside eager PyTorch; no bundle is kept.
    """
    from deploycc import contest, render, render_contest
    from deploycc.core.target import Bench
    from deploycc.errors import UsageError
    from deploycc.planning import Options, parse_shapes
    from deploycc.tools import bench_all

    settings = Bench(threads=threads, min_seconds=min_seconds, min_runs=min_runs)
    if targets is not None:
        if len(models) != 1:
            raise UsageError(f"--targets takes one model, not {len(models)}", fix="bench the bundles of several models, without --targets")
        options = Options(
            data=data, inputs=parse_shapes(inputs or []), weights=weights, random_weights=random_weights, threads=threads, seed=seed
        )
        with _progress() as progress:
            found = contest.shoot_out(models[0], options, targets, settings, progress, lambda line: print(line, file=sys.stderr))
        if save:
            found.bench.save(save)
        if json:
            _emit(render_contest.contest_json(found) | {"bundle": None})
            return
        for part in render_contest.contest(found):
            _print(part)
        return
    with _progress() as progress:
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
        _emit(result.model_dump(mode="json"))
        return
    _print(render.bench_table(result))
    for warning in result.warnings():
        _print(f"note: {warning}")


@app.command()
def compare(first: Path, second: Path, json: Json = False) -> None:
    """Compare two results of `bench --save`, or say why they cannot be compared."""
    from deploycc import render
    from deploycc.bench import result

    found = result.compare(result.load(first), result.load(second))
    if json:
        _emit({"ratios": {name: [ratio.value, ratio.low, ratio.high] for name, ratio in found.ratios.items()}, "notes": list(found.notes)})
        return
    _print(render.comparison_table(found))
    for note in found.notes:
        _print(f"note: {note}")


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
        _emit(found)
    else:
        _print(render.prediction(found))


@app.command()
def verify(bundle: Path, json: Json = False) -> None:
    """Check a bundle: hashes, this machine, golden outputs."""
    from deploycc import tools

    found = tools.verify(bundle)
    if json:
        _emit(found)
        return
    for line in found["checks"]:
        _print(f"ok  {line}")


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

    with _progress() as progress:
        found = debugging.debug(bundle, model=model, data=data, samples=samples, below=below, progress=progress)
    if json:
        _emit(render_graph.debugged_json(found))
    else:
        _print(render_graph.debugged(found, every=tensors))


@app.command()
def inspect(
    thing: Annotated[str, typer.Argument(metavar="X", help="A bundle, .onnx, .pt2 or model.")],
    inputs: Inputs = None,
    weights: Weights = None,
    random_weights: RandomWeights = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="Every kernel of the runtime's own graph, with its precision.")] = False,
    json: Json = False,
) -> None:
    """Signature, operators, the precision that the runtime computes in, MACs and bytes."""
    from deploycc import render_graph, tools
    from deploycc.planning import parse_shapes

    found = tools.inspect(thing, inputs=parse_shapes(inputs or []), weights=weights, random_weights=random_weights)
    if json:
        _emit(found)
    else:
        _print(render_graph.inspection(found, every=kernels))


Name = Annotated[str | None, typer.Argument(help="With a name: its manual.")]


def _list_or_manual(listing: str, manual: str, name: str | None) -> None:
    from deploycc import manual as texts

    _print(getattr(texts, manual)(name) if name else getattr(texts, listing)())


@app.command()
def targets(name: Name = None) -> None:
    """What can be built for; with a name, everything it says."""
    _list_or_manual("list_targets", "target_manual", name)


@app.command()
def passes(name: Name = None) -> None:
    """What a pipeline is made of; with a name, its manual."""
    _list_or_manual("list_passes", "pass_manual", name)


@app.command()
def backends(name: Name = None) -> None:
    """Runtimes; with a name, the rules a model must satisfy."""
    _list_or_manual("list_backends", "backend_manual", name)


@app.command()
def sources(name: Name = None) -> None:
    """Where models and data come from; with a name, its manual."""
    _list_or_manual("list_sources", "source_manual", name)


@app.command()
def doctor(json: Json = False) -> None:
    """What works on this machine, what does not, why, and the command that installs it."""
    from deploycc import render, tools

    found = tools.doctor()
    if json:
        _emit(found)
    else:
        _print(render.diagnosis(found))


@app.command()
def demo(
    target: Annotated[list[str] | None, typer.Option("--target", "-t", help="Only these targets. Repeatable.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the best bundle goes.")] = Path("demo-bundle"),
    fetch: Annotated[bool, typer.Option(help="Fetch Debian's tuxpaint photos (161 MB) if they are not here.")] = True,
    json: Json = False,
) -> None:
    """Compile EfficientNet-Lite0 for every target that runs here, on real photos, and show what came out."""
    from deploycc import render_contest, showcase

    with _progress() as progress:
        found = showcase.run(target, output, fetch=fetch, progress=progress, say=lambda line: print(line, file=sys.stderr))
    if json:
        _emit(render_contest.shown_json(found))
        return
    for part in render_contest.shown(found):
        _print(part)


def _version(shown: bool) -> None:
    if shown:
        print(f"deploycc {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()
