"""Can the harness be believed: a model against itself, planted slowdowns, simulated machines, its own cost, and other tools beside it.

    python benchmarks/harness_trust.py [--only aa,coverage] [--again] [--quick] [--peers-python VENV/bin/python …]

Parts: aa, aa-busy, planted, coverage, overhead, memory, loadgen, peers. Each is written to results/<CPU>/harness_trust.json as it is
finished, and left out the next time unless --again. --quick takes few and short runs and writes to --work: for trying the
script, not for figures. Exit status 1 when a bar is not met.

Peers: OpenVINO's benchmark_app of this environment; Olive's latency metric and optimum-benchmark by the Pythons that have them
(--peers-python, several times). onnxruntime_perf_test is in no package of PyPI or Debian.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from _shared import about, results_folder, say, write
from _trust_page import bars, markdown
from _trust_runs import THREADS, Model, beside_loadgen, burner, comparisons, memory, overhead
from _trust_simulation import MACHINES, coverage

from deploycc.bench.environment import capture
from deploycc.bench.harness import Candidate, measure
from deploycc.core.target import Bench
from deploycc.errors import DeployError
from deploycc.runtime.sessions import Session
from deploycc.runtime.signature import FeedsCheck, Signature, TensorSpec

NAME = "harness_trust"
PARTS = ("aa", "aa-busy", "planted", "coverage", "overhead", "memory", "loadgen", "peers")
NET = "torchvision:mobilenet_v2"
TURNS = 3
WORKER = Path(__file__).parent / "_trust_peers.py"
PATIENCE_S = 400
REPORTS = {
    "ours": "p50, p90, p99, p99.9 where runs carry them; intervals; cold start; memory; what the kernel saw; raw samples",
    "olive": "avg, min, max, p50 to p99.9 of 20 runs; no interval",
    "optimum": "mean, p50, p90, p95, p99, standard deviation; memory and energy on request; raw samples",
    "benchmark_app": "first inference, median, average, min, max, throughput; percentiles on request; no interval",
}


def compiled(folder: Path) -> Model:
    """MobileNetV2 of random weights as the graph that deploycc ships in float, and a picture of noise."""
    import deploycc

    out = folder / "bundle"
    if not (out / "model.onnx").is_file():
        passes = "fold-batchnorm, export-onnx"
        deploycc.compile(NET, target="onnxruntime-portable", passes=passes, random_weights=True, output=out)
    from deploycc.runtime import bundle as bundles

    loaded = bundles.load(out)
    rng = np.random.default_rng(0)
    shapes = {spec.name: [axis if isinstance(axis, int) else 1 for axis in spec.shape] for spec in loaded.signature.inputs}
    feeds = [{name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(2)]
    return Model(loaded.model, loaded.signature, feeds)


def run_parts(document: dict[str, Any], wanted: Sequence[str], options: argparse.Namespace, work: Path, keep: Callable[[], None]) -> None:
    """Every wanted part that is not there; `keep` after each."""
    quick = options.quick
    seconds, count, planted = (0.4, 6, 4) if quick else (1.5, 40, 20)
    model: Model | None = None

    def net() -> Model:
        nonlocal model
        model = model or compiled(work)
        return model

    def busy() -> Any:
        with burner():
            return comparisons(net(), count=count, seconds=seconds, share=0.0, say=say)

    parts: dict[str, Callable[[], Any]] = {
        "aa": lambda: comparisons(net(), count=count, seconds=seconds, share=0.0, say=say),
        "aa-busy": busy,
        "planted 5 %": lambda: comparisons(net(), count=planted, seconds=seconds, share=0.05, say=say),
        "planted 2 %": lambda: comparisons(net(), count=planted, seconds=seconds, share=0.02, say=say),
        "coverage": lambda: simulated(300 if quick else 4000, 40 if quick else 300),
        "overhead": lambda: overhead(net()),
        "memory": memory,
        "loadgen": lambda: beside_loadgen(net(), 1.0 if quick else 4.0, 2 if quick else TURNS),
        "peers": lambda: peers(work, options.peers_python, 1.0 if quick else 5.0, 1 if quick else TURNS),
    }
    for name, make in parts.items():
        if name.partition(" ")[0] not in wanted or (name in document and not options.again):
            continue
        say(name)
        begin = time.monotonic()
        document[name] = make()
        document["seconds"][name] = round(time.monotonic() - begin)
        keep()


def simulated(runs: int, bootstraps: int) -> list[dict[str, Any]]:
    """Coverage on every simulated machine."""
    rows: list[dict[str, Any]] = []
    for machine in MACHINES:
        rows.append({"machine": machine, **asdict(coverage(machine, runs=runs, bootstraps=bootstraps))})
        say(f"{machine}: {rows[-1]['ratio']:.1%}")
    return rows


def peers(work: Path, pythons: Sequence[str], seconds: float, turns: int) -> list[dict[str, Any]]:
    """Our p50 and the peers', in turns, on one ResNet-18 that a peer has made; none where no peer's Python was given."""
    folder = work / "peers"
    if not pythons or not any(_worker(python, "make", folder).get("model") for python in pythons):
        say("no Python of --peers-python can make the model: optimum-onnx and transformers are needed")
        return []
    path = folder / "onnx" / "model.onnx"
    model = Model(path, *_pictures(path))
    rows: list[dict[str, Any]] = []
    for _ in range(turns):
        rows += _ours(model, seconds)
        for name, beside, words in (
            ("Olive", "ours, ONNX Runtime", ["olive"]),
            ("optimum-benchmark", "ours, ONNX Runtime", ["optimum", str(max(1, round(seconds)))]),
        ):
            tried = [_worker(python, words[0], folder, *words[1:]) for python in pythons]
            found = next((item for item in tried if "p50_ms" in item), tried[0])
            rows.append({"name": name, "ours": False, "beside": beside, "reports": REPORTS[words[0]], **found})
        rows.append(_benchmark_app(path, seconds))
        rows += _ours(model, seconds)
    return rows


def _pictures(path: Path) -> tuple[Signature, list[dict[str, np.ndarray]]]:
    """Names of a file with free axes, and what it is fed."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    inputs = TensorSpec(graph.input[0].name, "float32", ("N", 3, "H", "W"))
    outputs = TensorSpec(graph.output[0].name, "float32", ("N", 1000))
    feeds = {inputs.name: np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)}
    return Signature((inputs,), (outputs,)), [feeds]


class InOpenVino:
    """A file in OpenVINO with one thread and float32: what benchmark_app is asked for."""

    def __init__(self, path: Path, signature: Signature) -> None:
        import openvino

        core = openvino.Core()
        read = core.read_model(path)
        read.reshape({signature.inputs[0].name: [1, 3, 224, 224]})
        hints = {"INFERENCE_NUM_THREADS": THREADS, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        self.request = core.compile_model(read, "CPU", hints).create_infer_request()
        self.signature, self._check = signature, FeedsCheck(signature)

    def run(self, feeds: Any) -> dict[str, np.ndarray]:
        """One synchronous call."""
        self._check(feeds)
        self.request.infer(feeds, share_inputs=True, share_outputs=True)
        return {}

    def synchronize(self) -> None:
        """Nothing is pending."""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def _ours(model: Model, seconds: float) -> list[dict[str, Any]]:
    """Both runtimes in one interleaved run."""
    openers: dict[str, Callable[[], Session]] = {
        "ours, ONNX Runtime": model.open, "ours, OpenVINO": lambda: InOpenVino(model.path, model.signature)
    }  # fmt: skip
    candidates = [Candidate(name, opener, model.feeds) for name, opener in openers.items()]
    found = measure(candidates, settings=Bench(threads=THREADS, min_seconds=seconds, min_runs=30))
    rows = []
    for item in found.measurements:
        low, high = item.interval()
        row = {"name": item.name, "ours": True, "p50_ms": item.p50_ms, "low_ms": low, "high_ms": high, "runs": item.summary.runs}
        rows.append({**row, "reports": REPORTS["ours"]})
    return rows


def _benchmark_app(path: Path, seconds: float) -> dict[str, Any]:
    """OpenVINO's own tool, synchronous, one stream and thread."""
    row = {"name": "benchmark_app", "ours": False, "beside": "ours, OpenVINO", "reports": REPORTS["benchmark_app"]}
    tool = Path(sys.executable).parent / "benchmark_app"
    words = ["-m", path, "-d", "CPU", "-api", "sync", "-hint", "none", "-nstreams", 1, "-nthreads", THREADS, "-t", max(1, round(seconds))]
    words += ["-infer_precision", "CPU:f32", "-shape", "[1,3,224,224]"]
    done = subprocess.run([tool, *map(str, words)], capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    median, count = re.search(r"Median:\s+([\d.]+) ms", done.stdout), re.search(r"Count:\s+(\d+) iterations", done.stdout)
    if median is None:
        return {**row, "failed": (done.stderr or done.stdout).strip().splitlines()[-1][:120]}
    return {**row, "p50_ms": float(median[1]), "runs": int(count[1]) if count else None}


def _worker(python: str, command: str, folder: Path, *words: str) -> dict[str, Any]:
    """What a peer's Python printed, or why it did not."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([python, WORKER, command, folder, *words], capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"failed": (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:160]}


def main() -> int:
    """Run the parts; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to run, of {', '.join(PARTS)}")
    parser.add_argument("--again", action="store_true", help="run parts that are there already")
    parser.add_argument("--quick", action="store_true", help="few and short runs")
    parser.add_argument("--work", help="a folder for models, kept")
    parser.add_argument("--peers-python", action="append", default=[], help="Python that has Olive or optimum-benchmark")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    work = Path(options.work or tempfile.mkdtemp(prefix="deploycc-"))
    work.mkdir(parents=True, exist_ok=True)
    folder = work if options.quick else results_folder()
    path = folder / f"{NAME}.json"
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"seconds": {}}
    environment = capture(THREADS)

    def keep() -> None:
        document["environment"] = environment.model_dump(mode="json")
        command = f"python benchmarks/harness_trust.py{' --quick' if options.quick else ''}"
        text = f"`{command}`, {NET} in float, ONNX Runtime. {about(environment)}"
        write(folder, NAME, document, markdown(document, text))

    try:
        run_parts(document, wanted, options, work, keep)
    except DeployError as error:
        sys.exit(f"error: {error}")
    keep()
    for what, found, met in bars(document):
        print(f"{'ok ' if met else 'NO '} {what}: {found}")
    return 0 if all(met for _, _, met in bars(document)) else 1


if __name__ == "__main__":
    sys.exit(main())
