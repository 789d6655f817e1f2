"""The application that every command registers on, and what the commands share: options, progress bars, output."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from deploycc.errors import Interrupted

if TYPE_CHECKING:
    from deploycc.core.contract import Progress


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run a command. Raises Interrupted where Ctrl-C left nothing to show for it: typer by itself ends without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            fix = "run the same command again: finished passes are kept, and it goes on from them"
            raise Interrupted("stopped by the user; nothing was written", fix=fix) from None


app = typer.Typer(
    name="deploycc",
    cls=_Commands,
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


@contextmanager
def progress_bar() -> Iterator[Progress]:
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


def show(value: Any) -> None:
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


def emit(document: Any) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))
