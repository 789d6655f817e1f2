"""Peak memory of calibrating EfficientNet-Lite0 on 32 and on 1,024 photos: `quantizers.py FOLDER --memory`.

Every figure is that of a process of its own, which reads a photo when it is needed: 128 photos, seen again shifted and mirrored. ONNX
Runtime's histogram calibrators keep every tensor of every photo unless they are told a stride, so a process may not grow beyond LIMIT.

    python _quantizers_memory.py job.json        one such process
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deploycc.core.contract import Context, Dataset, ModelRequest, Sample, Split
from deploycc.core.data import Data
from deploycc.core.pipeline import Pipeline
from deploycc.errors import DeployError
from deploycc.planning import find_source, open_dataset
from deploycc.runtime import host
from deploycc.runtime.transform import Transform

COUNTS = (32, 1024)
LIMIT = 8 << 30  # bytes that a process may map
MEGABYTE = 1e6
FLAT = 1.10  # of the memory with few photos: beyond it, memory grows with their number
OURS = {
    "quantize-static": "quantize-static",
    "quantize-static on output-mse": "quantize-static{calibration=output-mse}",
    "learn-rounding (rows and learning, 1 step)": "learn-rounding{steps=1}",
}
PEERS: dict[str, dict[str, Any]] = {
    "ORT u8s8 per-channel, min-max": {"per_channel": True, "activation_type": "QUInt8", "weight_type": "QInt8"},
    "ORT u8s8 per-channel, percentile": {
        "per_channel": True, "activation_type": "QUInt8", "weight_type": "QInt8", "calibrate_method": "Percentile",
    },
}  # fmt: skip


class Repeated(Split):
    """`count` samples from fewer: each turn shifts the pictures by a row and a column more, every other one mirrors them."""

    def __init__(self, split: Split, count: int) -> None:
        self.split, self.count = split, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        turn, place = divmod(index, len(self.split))
        sample = self.split[place]
        image = np.roll(np.asarray(sample.value), (turn, turn), axis=(0, 1))
        return replace(sample, value=np.ascontiguousarray(image[:, ::-1]) if turn % 2 else image, label=None, id=f"{sample.id} {turn}")

    def label(self, index: int) -> None:
        """None has one."""

    def digest(self, index: int) -> str:
        """Its number: nothing is cached by it."""
        return str(index)


def child(job: Mapping[str, Any]) -> float:
    """Peak memory of one calibration in this process, in MB."""
    from _quantizers_cases import open_target

    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    artifact = find_source(job["model"]).load(ModelRequest(job["model"]))
    artifact = replace(artifact, transform=Transform.from_json(job["transform"]))
    split = next(iter(open_dataset(job["photos"]).splits.values()))
    data = Data(Dataset("photos", {"calibration": Repeated(split, job["count"])}), calibration_samples=job["count"])
    with tempfile.TemporaryDirectory() as folder:
        if "passes" in job:
            context = Context(open_target(job["target"]), artifact, data, 0, Path(folder))
            Pipeline.parse(job["passes"], asked=True).run(artifact, context)
        else:
            _peer(Path(job["model"]), Path(folder) / "out.onnx", data, artifact, job["settings"])
    peak = host.peak_rss_bytes()
    return (peak or 0) / MEGABYTE


def _peer(model: Path, out: Path, data: Data, artifact: Any, settings: Mapping[str, Any]) -> None:
    """quantize_static as its documentation shows it: a reader that gives one photo after the other."""
    from _quantizers_peers import ort_static, reader_through

    with contextlib.redirect_stdout(io.StringIO()):
        ort_static(model, out, reader_through(data.calibration(artifact)), settings)


def peak(job: Mapping[str, Any], folder: Path) -> tuple[float | None, str]:
    """(MB, "") of a job in a process of its own, or (None, why there is none)."""
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    done = subprocess.run([sys.executable, __file__, str(path)], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return float(done.stdout.splitlines()[-1]), ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit status {done.returncode}"
    memory = any("MemoryError" in line or "bad_alloc" in line or "Unable to allocate" in line for line in lines[-30:])
    return None, f"more than {LIMIT / 2**30:.0f} GiB" if memory else last


def row(name: str, found: Mapping[int, tuple[float | None, str]]) -> dict[str, Any]:
    """One line of the page: MB by number of photos, and whether they grow."""
    values = [value for value, _ in found.values() if value is not None]
    if len(values) < len(found):
        growth = next(why for value, why in found.values() if value is None)
        flat = False
    else:
        growth = f"{values[-1] / values[0]:.2f} ×"
        flat = values[-1] <= FLAT * values[0]
    peaks = {str(count): why if value is None else f"{value:.0f}" for count, (value, why) in found.items()}
    return {"name": name, "peak_mb": peaks, "growth": growth, "flat": flat}


def measure_memory(options: argparse.Namespace) -> int:
    """Every row on every count of photos; exit status 1 if one of ours grows."""
    from _quantizers_cases import prepare
    from _quantizers_page import markdown, plain
    from _shared import real_photos, results_folder, say, write

    photos, results = real_photos(), results_folder()
    given = options.models[0]
    case = prepare(given, photos, options.folder / given.name, options.judge, options.target)
    assert case.reference.transform is not None  # models of photos declare one
    common = {"model": str(case.onnx), "transform": case.reference.transform.to_json(), "photos": str(photos.calibration),
              "target": options.target}  # fmt: skip
    jobs: Sequence[tuple[str, dict[str, Any]]] = [
        *((name, {"passes": passes}) for name, passes in OURS.items()),
        *((name, {"settings": settings}) for name, settings in PEERS.items()),
    ]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, job in jobs:
            found: dict[int, tuple[float | None, str]] = {}
            for count in COUNTS:
                say(f"{name}: {count} photos")
                value, why = peak({**common, **job, "count": count}, Path(folder))
                found[count] = value, plain(why)
            rows.append({**row(name, found), "ours": "passes" in job, "model": given.name})
            print(rows[-1], flush=True)
    path = results / f"{options.page}.json"
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"models": {}}
    document["memory"], document["target"] = rows, options.target
    write(results, options.page, document, markdown(document))
    return int(any(row["ours"] and not row["flat"] for row in rows if "no pass" not in row["growth"]))


if __name__ == "__main__":
    try:
        print(child(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    except DeployError as error:
        sys.exit(error.what)
