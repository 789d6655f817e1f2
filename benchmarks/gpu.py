"""Everything that an NVIDIA GPU does with the same networks, in one command: PyTorch, TensorRT, ONNX Runtime, and the card's own peaks.

    python benchmarks/gpu.py FOLDER [--only resnet50 vit_b_16 …] [--batches 1 32] [--minutes 20] [--out RESULTS]
                                    [--tensorrt8-python PYTHON3.10]

Prints one JSON document, and writes gpu.json, gpu.md and the raw samples of every interleaved run to `results/<GPU>/`, after each network.
Nothing is downloaded. What is missing (TensorRT, onnxruntime-gpu, a type that the card lacks) is a row that says so. FOLDER keeps the ONNX
files and engines. When --minutes are up, what is left becomes rows that say so; a step that has begun is finished first.

Without a GPU: a message, exit status 2, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import _gpu_facts
import _gpu_old_tensorrt as old
import _gpu_onnxruntime as ort_rows
import _gpu_tensorrt as engines
import _gpu_torch
from _gpu_clock import CLOCK, Gpu, first_gpu, own_stream
from _gpu_models import GIVEN, Net, prepare
from _gpu_page import markdown
from _gpu_peaks import SIZES, Peak, copy_gb_s, peaks
from _gpu_rows import OUT_OF_TIME, Clock, Setting, brief, compare, failed, peaks_json
from _quantizers_cases import Given
from _quantizers_page import plain
from _shared import RESULTS, say, slug, write

from deploycc.errors import DeployError
from deploycc.render import finite

NAME = "gpu"
SCHEMA = 1
BATCHES = (1, 32)
MINUTES = 20.0
ENERGY_SECONDS = 1.0
NO_GPU = 2


@dataclass(frozen=True, slots=True)
class Job:
    """What was asked for.

    Attributes:
        folder: for files and engines.
        out: for results.
        batches: pictures in a call.
        tensorrt8: the Python that has TensorRT 8, or None.
        capability: of the GPU.
    """

    folder: Path
    out: Path
    batches: Sequence[int]
    tensorrt8: Path | None
    capability: tuple[int, int]


def network(given: Given, job: Job, setting: Setting) -> dict[str, Any]:
    """All rows of one network; raises DeployError where it cannot be had at all."""
    folder = job.folder / given.name
    used = uses_files()
    net = prepare(given, folder, integers=used)
    say(f"{given.name}: a file for every precision" if used else f"{given.name}: nothing here runs ONNX files on the GPU")
    written = engines.files(net, folder / "files", job.capability, used=used)
    older = None if job.tensorrt8 is None else _older(given, folder)
    batches: dict[str, Any] = {}
    for batch in job.batches:
        ways = _gpu_torch.ways(net, setting.gpu, job.capability)
        ways += engines.ways(net, written, batch, folder, setting.gpu)
        ways += _of_onnxruntime(net, written, setting.gpu)
        # The power of the largest batch alone: a call of one picture leaves most of the card idle.
        shared = setting if batch == max(job.batches) else replace(setting, energy_seconds=0.0)
        rows, bench = compare(net, ways, batch, shared)
        rows += _rows_of_version_8(older, batch, folder / "tensorrt8", job, setting)
        if bench is not None:
            bench.save(job.out / f"{NAME}.{given.name}.{batch}.bench.json")
        batches[str(batch)] = {"rows": rows, "warnings": list(bench.environment.warnings()) if bench else []}
    return {"real": given.real, "macs": net.macs, "pictures": net.source, "quantized": net.problem or "yes", "batches": batches}


def uses_files() -> bool:
    """Whether TensorRT, or an ONNX Runtime for GPUs, is here: writing and answering every file on the CPU takes minutes."""
    import onnxruntime

    return engines.session.version() is not None or ort_rows.runs_here(onnxruntime)


def _of_onnxruntime(net: Net, written: Mapping[str, engines.File], gpu: Gpu) -> list[Any]:
    import onnxruntime

    paths = {name: file.built.folder / file.built.files[0] for name, file in written.items() if file.built is not None}
    wanted = {name: file.wanted for name, file in written.items() if file.built is not None}
    return ort_rows.ways(paths, net.graph.signature, wanted, gpu, onnxruntime)


def _older(given: Given, folder: Path) -> Net | str:
    """The network in TensorRT 8's dialect, or why there is none."""
    try:
        return prepare(given, folder / "tensorrt8", old.TARGET)
    except DeployError as error:
        return error.what


def _rows_of_version_8(net: Net | str | None, batch: int, folder: Path, job: Job, setting: Setting) -> list[dict[str, Any]]:
    if net is None or job.tensorrt8 is None:
        return [failed(way, way.problem) for way in old.ABSENT]
    if isinstance(net, str) or not setting.clock.left:
        return [failed(way, net if isinstance(net, str) else OUT_OF_TIME) for way in old.ABSENT]
    try:
        return old.rows(net, batch, folder, job.tensorrt8, setting.peaks, setting.clock.left)
    except Exception as error:  # noqa: BLE001  # becomes the rows' reason
        return [failed(way, brief(error)) for way in old.ABSENT]


def run(job: Job, givens: Sequence[Given], gpu: Gpu, clock: Clock, *, sizes: Sequence[int] = SIZES, energy: float = ENERGY_SECONDS) -> Any:
    """The document, written again after each network."""
    document: dict[str, Any] = {"schema": SCHEMA, "created": datetime.now(UTC).isoformat(timespec="seconds"), "clock": CLOCK}
    document["facts"] = _gpu_facts.facts()
    say("the card's peaks")
    best: list[Peak] = peaks(gpu, sizes)
    document |= {"peaks": peaks_json(best), "copy_gb_s": copy_gb_s(gpu, 1024 if gpu.device == "cuda" else 1), "models": {}}
    setting = Setting(gpu, {peak.kind: peak for peak in best}, clock, energy_seconds=energy)
    job.out.mkdir(parents=True, exist_ok=True)
    for given in givens:
        begin = time.perf_counter()
        if not clock.left:
            found: dict[str, Any] = {"skipped": OUT_OF_TIME}
        else:
            try:
                found = network(given, job, setting)
            except DeployError as error:
                found = {"skipped": plain(f"{error.what}; {error.fix}")}
            except Exception as error:  # noqa: BLE001  # one network must not cost the others
                found = {"skipped": plain(brief(error))}
        document["models"][given.name] = {**found, "seconds": time.perf_counter() - begin}
        write(job.out, NAME, document, markdown(document))
    return document


def main(arguments: Sequence[str] | None = None) -> int:
    """All that was asked for; 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where files and engines are kept")
    parser.add_argument("--only", nargs="+", choices=[given.name for given in GIVEN], help="these networks alone")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), metavar="N", help="pictures in a call")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="no step begins after them")
    parser.add_argument("--out", type=Path, metavar="RESULTS", help="instead of results/<GPU>/ beside this script")
    parser.add_argument("--tensorrt8-python", type=Path, metavar="PYTHON", help="a Python 3.10 that imports tensorrt 8")
    options = parser.parse_args(arguments)
    if min(options.batches) < 1 or options.minutes <= 0:
        parser.error("--batches and --minutes take numbers over 0")
    reason = _gpu_facts.missing()
    if reason is not None:
        print(f"Nothing was measured: {reason}", file=sys.stderr)
        return NO_GPU
    import torch

    capability: tuple[int, int] = torch.cuda.get_device_capability(0)
    out = options.out or RESULTS / slug(torch.cuda.get_device_name(0))
    job = Job(options.folder, out, options.batches, options.tensorrt8_python, capability)
    with own_stream():
        document = run(
            job, [given for given in GIVEN if not options.only or given.name in options.only], first_gpu(), Clock(options.minutes)
        )
    print(json.dumps(finite(document), ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
