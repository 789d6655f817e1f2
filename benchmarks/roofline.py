"""What this machine's products and memory make, and what share of it real models reach.

    python benchmarks/roofline.py BUNDLE… [--threads 1]

Two questions. Is the int8 peak that `deploycc` measures in seconds the one that a hand-tuned matrix product reaches? It must be within 15 %
of the fastest that a longer search finds, through oneDNN (as torch calls it) and OpenVINO, over 60 shapes; what the instruction alone makes
in registers stands beside it. And what share of the peaks do the bundles reach, and where does their time go? Exit status 1 when the first
is not met.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from _roofline_tiles import instructions
from _shared import about, results_folder, say, table, write

from deploycc import profiling
from deploycc.bench import _peaks_worker as worker
from deploycc.bench.environment import capture
from deploycc.bench.roofline import Peaks, is_busy, machine_peaks

NAME = "roofline"
WITHIN = 0.15
SECONDS = 0.1
MS, KS, NS = (128, 256, 512, 1024), (256, 512, 768, 1024, 2048), (256, 512, 1024)
SHOWN = 12
RUNS = 200


def searched(threads: int) -> dict[str, dict[str, Any]]:
    """The fastest product of each library over many shapes, each for a tenth of a second."""
    import torch

    torch.set_num_threads(threads)
    makers = {"oneDNN through torch": worker.torch_int8, "OpenVINO": lambda: worker.openvino_product("qdq", "f32", threads)}
    found: dict[str, dict[str, Any]] = {}
    for name, find in makers.items():
        try:
            make = find()
            rates = {shape: math.prod(shape) / worker.fastest(warm(make, shape), SECONDS, most=10**9) for shape in shapes()}
        except Exception as error:  # noqa: BLE001  each library has its own; a missing one is told
            found[name] = {"macs": None, "why": f"{type(error).__name__}: {error}"}
            continue
        best = max(rates, key=lambda shape: rates[shape])
        found[name] = {"macs": rates[best], "shape": best}
        say(f"{name}: {rates[best] / 1e9:.0f} GMAC/s at {best}")
    return found


def warm(make: worker.Maker, shape: worker.Shape) -> worker.Call:
    """A product that was called once."""
    call = make(shape)
    call()
    return call


def shapes() -> Iterator[worker.Shape]:
    """(m, k, n)."""
    return ((m, k, n) for m in MS for k in KS for n in NS)


def models(bundles: list[str], threads: int) -> dict[str, dict[str, Any]]:
    """What `inspect --profile` finds of each."""
    found: dict[str, dict[str, Any]] = {}
    for text in bundles:
        say(f"profiling {text}")
        made = profiling.plain(profiling.profile(text, inputs={}, weights=None, random_weights=False, threads=threads, runs=RUNS))
        found[os.path.basename(text.rstrip("/"))] = {key: value for key, value in made.items() if key != "peaks"}
    return found


def markdown(document: dict[str, Any]) -> str:
    """The page."""
    peaks = Peaks.model_validate(document["peaks"])
    lines = [f"# {(__doc__ or '').splitlines()[0]}", "", "Written by `python benchmarks/roofline.py`.", "", document["about"], ""]
    if document["busy"]:
        lines += [
            "Other processes ran meanwhile. The fastest of many short calls counts, which is robust; times of whole models are not.",
            "",
        ]
    lines += [f"{'PASS' if document['met'] else 'FAIL'}: {document['text']}", ""]
    rows = [
        (
            name,
            f"{found.macs / 1e9:.0f}" if found.macs else "–",
            found.library,
            "; ".join(f"{who}: {what}" for who, what in found.others.items()),
        )
        for name, found in peaks.peaks.items()
    ]
    lines += [table(("precision", "GMAC/s", "fastest", "all"), rows), ""]
    lines += [table(("set, MB", "triad, GB/s"), [(f"{size / 1e6:.1f}", f"{rate / 1e9:.1f}") for size, rate in peaks.bandwidth]), ""]
    searches = [(name, _rate(found["macs"]), str(found.get("shape", found.get("why")))) for name, found in document["searched"].items()]
    lines += ["Longer search, int8:", "", table(("library", "GMAC/s", "shape (m, k, n)"), searches), ""]
    lines += [
        "Instructions alone, in registers, one thread:",
        "",
        table(("", "GMAC/s"), [(n, _rate(v)) for n, v in document["instructions"].items()]),
    ]
    for name, found in document["models"].items():
        lines += ["", f"## {name}", "", _whole(found), "", _operators(found)]
    return "\n".join(lines)


def _rate(value: Any) -> str:
    return f"{value / 1e9:.0f}" if isinstance(value, float) else str(value or "–")


def _whole(found: dict[str, Any]) -> str:
    whole = found["whole"]
    if whole is None:
        return f"{found['call_ms']:.3g} ms a call; its MACs are not known."
    kinds = ", ".join(f"{number / 1e9:.3g} G in {name}" for name, number in whole["macs"].items())
    rate = sum(whole["macs"].values()) / whole["milliseconds"] / 1e6
    fastest = whole["compute_share"] * found["call_ms"] / found["fastest_ms"]
    return (
        f"{found['call_ms']:.3g} ms a call: {kinds} MACs, {rate:.0f} GMAC/s, **{whole['compute_share']:.1%} of the peak** "
        f"(the fastest of {RUNS} calls: {found['fastest_ms']:.3g} ms, **{fastest:.1%}**)."
    )


def _operators(found: dict[str, Any]) -> str:
    if not found["operators"]:
        return found["measured_by"]
    total = sum(item["ms"] for item in found["operators"])
    bounds = {
        kind: sum(item["ms"] for item in found["operators"] if item["bound"] == kind) for kind in ("compute", "memory", "overhead", None)
    }
    told = ", ".join(f"{value / total:.0%} {kind or 'not known'}" for kind, value in bounds.items() if value)
    best = sorted(found["operators"], key=lambda item: -item["ms"])[:SHOWN]
    rows = [
        (
            item["operator"], item["precision"], f"{item['ms']:.3f}", f"{item['share_of_time']:.1%}",
            "–" if item["macs"] is None else f"{item['macs'] / 1e6:.0f}",
            "–" if item["gmacs_per_second"] is None else f"{item['gmacs_per_second']:.0f}",
            "–" if item["share_of_peak"] is None else f"{item['share_of_peak']:.0%}", item["bound"] or "–",
        )
        for item in best
    ]  # fmt: skip
    header = ("kernel", "precision", "ms", "of time", "M MACs", "GMAC/s", "of peak", "bound by")
    return f"{found['measured_by']}, time by what bounds it: {told}. The longest:\n\n{table(header, rows)}"


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundles", nargs="*")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    started, environment = time.monotonic(), capture(options.threads)
    peaks = machine_peaks(options.threads)
    say(f"peaks after {time.monotonic() - started:.1f} s")
    found = searched(options.threads)
    ours, theirs = peaks.macs_per_second("int8"), max((item["macs"] or 0.0 for item in found.values()), default=0.0)
    ratio = ours / theirs if ours and theirs else 0.0
    document: dict[str, Any] = {
        "about": about(environment),
        "busy": peaks.busy or is_busy(environment),
        "text": f"the int8 peak is {ratio:.2f} of the fastest product that a longer search finds (bar: at least {1 - WITHIN:.2f})",
        "met": ratio >= 1 - WITHIN,
        "peaks": peaks.model_dump(mode="json"),
        "searched": found,
        "instructions": instructions(),
        "models": models(options.bundles, options.threads),
    }
    write(results_folder(), NAME if options.threads == 1 else f"{NAME}-{options.threads}", document, markdown(document))
    print(document["text"])
    for name, item in document["models"].items():
        print(f"{name}: {_whole(item)}")
    return 0 if document["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
