"""The command line; with `commands/` and the device's runner, the only code that prints or exits.

Nothing heavy is imported before a command needs it: `deploycc --help` and the lists never import torch.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, NoReturn

import typer

from deploycc import __version__, commands
from deploycc.commands._app import app
from deploycc.core import distributed
from deploycc.errors import DeployError

for _found in pkgutil.iter_modules(commands.__path__):  # each registers its commands on `app`
    importlib.import_module(f"{commands.__name__}.{_found.name}")


def main() -> None:
    """Entry point: errors become messages and exit statuses."""
    if not distributed.is_main():  # of several processes, one speaks
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        # torchrun ends what it started with SIGTERM when one process failed: none may wait for the others then
        with _stops_cleanly() if distributed.processes() == 1 else nullcontext():
            status = app(standalone_mode=False)  # what typer.Exit carried, or the command's own None
        sys.exit(status if isinstance(status, int) else 0)
    except DeployError as error:
        _complain(error)
        sys.exit(error.exit_status)
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


@contextmanager
def _stops_cleanly() -> Iterator[None]:
    """SIGTERM, with which batch systems, containers and `timeout` end a job, is Ctrl-C: the best so far is kept, scratch folders go."""
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _complain(error: DeployError) -> None:
    print(f"error: {error.what}", file=sys.stderr)
    for note in getattr(error, "__notes__", []):
        print(f"  {note}", file=sys.stderr)
    cause = error.__cause__
    if cause is not None and not isinstance(cause, DeployError) and str(cause) not in error.what:
        print("  cause:", *traceback.format_exception_only(cause), file=sys.stderr, end="")
    print(f"  fix: {error.fix}", file=sys.stderr)


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
