"""ExecuTorch with XNNPACK: a program as one .pte file, for ARM CPUs (and x86) without PyTorch on the device.

XNNPACK is a delegate: it takes the parts of the program that it has kernels for, and ExecuTorch's own kernels, which are slow and compute
in float, run the rest. So every operator outside the delegate is named in the notes, and a target's `[limits] outside_delegate` says how
many it may be. The file does not depend on the CPU: XNNPACK chooses its kernels (dot product, i8mm, …) and packs weights on the device.

The package executorch asks for 0.7 GB of packages that building for XNNPACK does not use; `MINIMAL` is what it does use.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from deploycc.backends._distance import relative
from deploycc.backends._executorch_file import COPIES, Step, steps
from deploycc.backends._settings import float32_only, latency_only, processor_only
from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import Availability, Built, Constraint, Coverage, Session, Violation
from deploycc.core.kernels import Kernel, Shapes
from deploycc.core.target import Target
from deploycc.errors import UnsupportedError

SESSION, FILE = "executorch", "model.pte"
OLDEST = "1.5"
MINIMAL = "pip install --no-deps 'executorch>=1.5,<1.6' 'torchao>=0.18,<0.19' ruamel.yaml tabulate tqdm flatbuffers"
NEEDED = ("executorch", "torchao", "ruamel.yaml", "tabulate", "tqdm", "flatbuffers")
METHODS = frozenset({"pt2e", "pt2e-dynamic"})  # of quantization
TOLERANCES = {False: 1e-3, True: 0.1}  # of the largest output, float and int8: requantization rounds ties another way than float does


class ExecuTorch:
    """ExecuTorch, XNNPACK delegate: .pte for ARM and x86 CPUs, no PyTorch on the device."""

    name: ClassVar[str] = "executorch"
    accepts: ClassVar[frozenset[Form]] = frozenset({Form.PROGRAM})
    shows: ClassVar[str] = "XNNPACK's graphs in the .pte file, and ExecuTorch's kernels outside of them"

    def __init__(self) -> None:
        self._last: tuple[str, bytes] | None = None  # lowering takes seconds, and a model is built for its receipt and to ship

    def available(self) -> Availability:
        """Whether executorch and what it needs to build for XNNPACK are installed; imports none of it."""
        try:
            installed = version("executorch")
        except PackageNotFoundError:
            return Availability(None, "the package executorch is not installed", MINIMAL)
        if missing := [name for name in NEEDED if not _found(name)]:
            return Availability(None, f"executorch {installed} lacks {', '.join(missing)}", MINIMAL)
        return Availability(installed)

    def constraints(self) -> Sequence[Constraint]:
        """Shapes, precision, operators' types."""
        return (processor_only, float32_only, latency_only, fixed_shapes, quantized_for_xnnpack)

    def build(self, artifact: Artifact, target: Target, folder: Path) -> Built:
        """Write model.pte. Raises UnsupportedError where it cannot be lowered, or does not compute what the program does."""
        from deploycc.backends._executorch_lower import lower

        key = artifact.digest()
        if self._last is None or self._last[0] != key:
            self._last = (key, lower(artifact.model))
        content = self._last[1]
        (folder / FILE).write_bytes(content)
        found = steps(content)
        runtime = {
            "session": SESSION,
            "package": "executorch",
            "version": version("executorch"),
            "minimum": target.runtime.minimum or OLDEST,
            "delegate": "xnnpack",
            "torch": version("torch"),
        }
        built = Built(folder, (FILE,), runtime, artifact.signature, coverage(found, artifact), _notes(found))
        self._verify(built, artifact, target)
        return built

    def open(self, built: Built, target: Target, *, threads: int) -> Session:
        """ExecuTorch's Python binding on the file that the device runs."""
        module = importlib.import_module(f"deploycc.runtime.sessions.{SESSION}")
        return module.open(built.folder / built.files[0], built.signature, built.runtime, threads)

    def kernels(self, model: Path, runtime: Mapping[str, str], shapes: Shapes | None = None) -> Sequence[Kernel]:
        """Every operator of the file, in order; with MACs of the shapes that the file was made for."""
        return [step.kernel for step in steps(model.read_bytes())]

    def _verify(self, built: Built, artifact: Artifact, target: Target) -> None:
        """The file against the program. Raises UnsupportedError."""
        import torch

        from deploycc.forms.module import example_feeds, named_outputs

        feeds = example_feeds(artifact.signature, seed=1)
        with torch.inference_mode():
            result = artifact.model.module()(*(torch.from_numpy(feeds[spec.name].copy()) for spec in artifact.signature.inputs))
            wanted = [value.numpy() for _, value in named_outputs(result)]
        with self.open(built, target, threads=1) as session:
            found = list(session.run(feeds).values())
        for spec, want, got in zip(artifact.signature.outputs, wanted, found, strict=True):
            distance = relative(want, got)
            if not distance <= TOLERANCES[built.coverage.int8_operators > 0]:
                raise UnsupportedError(
                    f"output '{spec.name}' of the .pte differs from the program's by {distance:.2g} of the largest value",
                    fix="use a target of another runtime, and report the model: ExecuTorch lowers an operator wrongly",
                )


def _found(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:
        return False


def coverage(found: Sequence[Step], artifact: Artifact) -> Coverage:
    """Share of MACs in integer kernels, and what runs outside the delegate."""
    heavy = [step for step in found if step.heavy]
    integer = [step for step in heavy if step.kernel.precision == "int8"]
    counted = all(step.kernel.macs is not None for step in heavy)
    total = sum(step.kernel.macs or 0 for step in heavy)
    unquantized = "the model is not quantized" if artifact.quant is None else "no int8 pattern of XNNPACK's quantizer"
    return Coverage(
        int8_macs=sum(step.kernel.macs or 0 for step in integer) / total if total and counted else None,
        int8_operators=len(integer),
        float_operators=tuple(
            (step.kernel.name, unquantized if step.delegated else "outside the delegate") for step in heavy if step not in integer
        ),
        conversions=sum(step.kernel.precision == "conversion" for step in found),
        outside=tuple(step.kernel.operator for step in found if _outside(step)),
    )


def _outside(step: Step) -> bool:
    return not step.delegated and not step.kernel.operator.startswith(COPIES)


def _notes(found: Sequence[Step]) -> tuple[str, ...]:
    """How much the delegate takes, what it does not, and what it computes in float beside integers."""
    inside = sum(step.delegated for step in found)
    outside = [step.kernel.operator for step in found if _outside(step)]
    told = f"XNNPACK runs all {inside} operators"
    if outside:
        own = f"{len(outside)} run outside the delegate, in ExecuTorch's own kernels: {_counted(outside)}"
        told = f"XNNPACK runs {inside} operators; {own}"
    beside = [step.kernel.operator for step in found if step.delegated and not step.heavy and step.kernel.precision == "float"]
    if not beside or not any(step.kernel.precision == "int8" for step in found):
        return (told,)
    return told, f"in float beside integers: {_counted(beside)}"


def _counted(kinds: Sequence[str]) -> str:
    return ", ".join(f"{count} × {kind}" for kind, count in Counter(kinds).most_common())


def fixed_shapes(artifact: Artifact, target: Target) -> list[Violation]:
    """A .pte file plans its memory for the shapes of its capture.

    Capture the model with fixed shapes: --input NAME:SHAPE.
    """
    specs = (*artifact.signature.inputs, *artifact.signature.outputs)
    return [Violation(spec.name, str(spec)) for spec in specs if any(isinstance(dim, str) for dim in spec.shape)]


def quantized_for_xnnpack(artifact: Artifact, target: Target) -> list[Violation]:
    """XNNPACK computes in integers where Q and DQ stand as its quantizer places them.

    Put quantize-pt2e or quantize-pt2e-dynamic into this target's pipeline, and start from the float model.
    """
    if artifact.quant is None or artifact.quant.method in METHODS:
        return []
    return [Violation("the model", f"quantized by another method ({artifact.quant.method})")]
