"""What TensorRT's parser and builder make of a file, found without a GPU: TensorRT-RTX builds ahead of time for a compute capability.

Its builder's log (DETAILED) has a line for every layer, with the types of what it reads, its constants and what it gives, and the ONNX
operators that it was made of. An operator runs in integers where a convolution or product that was made of it reads int8 twice. This
proves that the file parses, is typed right and that nothing falls back to float; not what TensorRT itself fuses, and no speed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from deploycc.runtime.tensorrt_engine import Recipe

MODULE = "tensorrt_rtx"
INSTALL = "pip install 'deploycc[tensorrt-rtx]'"
CHILD = "deploycc.backends._tensorrt_child"
KNOWN = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")  # of TensorRT-RTX 1.7: not SM90
PRODUCTS = frozenset({"correlation", "gemm"})  # layers that multiply: convolutions, and products of matrices
INT8 = "Int8"
COMPILED = "a compiled kernel"
ROUNDS = "Roun"  # what the name of a compiled kernel has for each tensor that it rounds
LINE = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), (?P<rest>.*)")
DATATYPE = re.compile(r"Datatype: ([^,}\]]+)")
SOURCE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
TAIL = 400  # characters of what a crashed builder said last


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an engine.

    Attributes:
        name: the builder's own.
        kind: "correlation" (convolution), "gemm", "kgen" (a compiled kernel), …
        inputs: their types.
        constants: their types.
        gives: types of its outputs.
        sources: names of the ONNX operators that it was made of.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    gives: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def multiplies(self) -> bool:
        """Whether it is a convolution or a product of matrices."""
        return self.kind in PRODUCTS

    @property
    def operands(self) -> str:
        """Types of what is multiplied: "Int8xInt8"."""
        return "x".join((*self.inputs, *self.constants)[:2])

    @property
    def roundings(self) -> int:
        """How many tensors it rounds to integers; what only moves integers rounds nothing.

        Its outputs do not show what is rounded and read again inside it, its name may be cut short: the larger of the two counts.
        """
        given = self.gives.count(INT8) if self.multiplies or set(self.inputs) != {INT8} else 0
        return max(given, self.name.count(ROUNDS))


@dataclass(frozen=True, slots=True)
class Probe:
    """What became of one build.

    Attributes:
        capability: that it was built for, "SM89".
        version: of TensorRT-RTX; "" when it crashed before it could say so.
        error: why there is no engine; "" when there is one.
        seconds: of parsing and building.
        bytes: of the engine.
        layers: of the engine, in its order.
    """

    capability: str
    version: str
    error: str
    seconds: float
    bytes: int
    layers: tuple[Layer, ...]

    @property
    def built(self) -> bool:
        """Whether there is an engine."""
        return not self.error

    @property
    def operands(self) -> Counter[str]:
        """How many layers multiply what: {"correlation Int8xInt8": 20}."""
        return Counter(f"{layer.kind} {layer.operands}" for layer in self.layers if layer.multiplies)

    @property
    def requantized(self) -> int:
        """How often a tensor is rounded to integers."""
        return sum(layer.roundings for layer in self.layers)

    def operands_of(self, operator: str) -> str:
        """What is multiplied for an ONNX operator: "Int8xInt8"; COMPILED where it went into such a kernel, which does not say so."""
        found = [layer.operands for layer in self.layers if layer.multiplies and operator in layer.sources]
        return found[0] if found else COMPILED


def checker() -> str | None:
    """Version of the installed TensorRT-RTX, or None; imports nothing."""
    if importlib.util.find_spec(MODULE) is None:
        return None
    try:
        return version("tensorrt-rtx")
    except PackageNotFoundError:
        return "of unknown version"


def probe(model: Path, recipe: Recipe, capability: str, *, seconds: float, module: str = MODULE) -> Probe:
    """Build for one compute capability in a process of its own; a crash, or more than `seconds`, is a finding like any other.

    TensorRT-RTX takes types from the file: that of a recipe for TensorRT 8 is built as the float32 that it is written in.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked = replace(recipe, typed=True, capabilities=(capability,), hardware_compatibility="none", version_compatible=False)
        request.write_text(json.dumps({"module": module, "model": str(model), "recipe": asked.text(), "answer": str(answer)}))
        paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        command, environment = [sys.executable, "-m", CHILD, str(request)], {**os.environ, "PYTHONPATH": paths}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return Probe(capability, "", f"the builder was not finished after {seconds:g} s and was stopped", seconds, 0, ())
        if done.returncode or not answer.is_file():
            return Probe(capability, "", _crash(done.returncode, done.stderr), 0.0, 0, ())
        found = json.loads(answer.read_text(encoding="utf-8"))
    return Probe(capability, found["version"], found["error"], found["seconds"], found["bytes"], layers(found["layers"]))


def _crash(status: int, said: str) -> str:
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return f"the builder crashed ({how}): {said.strip()[-TAIL:] or 'it said nothing'}"


def layers(log: str) -> tuple[Layer, ...]:
    """Of the builder's message "Layers: …"."""
    found: list[Layer] = []
    for line in log.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        head, _, metadata = match["rest"].partition("Metadata: ")
        before, _, after = head.partition("Outputs: [")
        inputs, _, constants = before.partition("Constants: [")
        reads, holds, gives = (tuple(DATATYPE.findall(part)) for part in (inputs, constants, after))
        found.append(Layer(match["name"], match["kind"], reads, holds, gives, tuple(SOURCE.findall(metadata))))
    return tuple(found)


def refusals(probes: Sequence[Probe]) -> list[str]:
    """Why there is no engine, for each capability that has none."""
    return [f"{item.capability}: {item.error}" for item in probes if not item.built]
