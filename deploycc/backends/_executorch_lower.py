"""From a program to the bytes of a .pte file: ExecuTorch's edge dialect, partitioned for XNNPACK, with memory planned ahead."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from deploycc.errors import UnsupportedError

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def lower(program: ExportedProgram) -> bytes:
    """The same bytes for the same program. Raises UnsupportedError with ExecuTorch's reason."""
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        try:
            manager: Any = to_edge_transform_and_lower(_with_axes_kept(program), partitioner=[XnnpackPartitioner()])
            return bytes(manager.to_executorch().buffer)
        except Exception as error:
            raise UnsupportedError(
                f"ExecuTorch does not lower the model: {_first_line(error)}",
                fix="use a target of another runtime, or rewrite the operator that is named",
            ) from error


def _with_axes_kept(program: ExportedProgram) -> ExportedProgram:
    """The program with means that XNNPACK has a kernel for (`_means`)."""
    import torch

    from deploycc.forms._means import drops_axes, keep_axes

    if program.example_inputs is None or not any(map(drops_axes, program.graph.nodes)):
        return program
    graph = program.module(check_guards=False)
    keep_axes(graph)
    return torch.export.export(graph, *program.example_inputs)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, prints and logs of ExecuTorch about itself."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]
