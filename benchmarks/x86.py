"""`deploycc compile --target x86` against everything else that runs the same network on this CPU: one interleaved run for each model.

    uv run --extra openvino python benchmarks/x86.py FOLDER --peers-python PEERS/bin/python [--only lite0 resnet50 …] [--threads 1 2]

Ours is the bundle that `--target x86` keeps, its gates open, so that networks with random weights run too. Beside it: eager PyTorch,
torch.compile, torch FX int8 (onednn), ONNX Runtime in float and with its own quantizer at its best, OpenVINO in float32 and bfloat16, and
NNCF's int8 on OpenVINO, as it comes and for transformers. One run on one thread, and one on all. Every row answers the same samples;
agreement (of vectors: cosine) and SQNR are those with the float graph in ONNX Runtime. A network with random weights, which knows no up and
no left, answers four views of every photo: how often 165 agree is too much chance. Where ours is fast enough but agrees less often than the
fastest peer, it is compiled once more for the three targets that were fastest, as a user would do it: with `[limits] agreement` at that
peer's. FOLDER and the other options are those of quantizers.py, whose peers these are.

The bar: at most 1.03 × the time of the fastest peer, at an agreement not below that peer's. Exit status 1 when it is not met,
or a model was skipped.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _quantizers_cases import Case, Given, open_target, options_of, prepare
from _quantizers_made import OURS, PEER, Made, answers, judge
from _quantizers_ours import float_row
from _quantizers_peers import TorchSession, brief, run_peer
from _shared import about, real_photos, results_folder, say, slug, table, write
from quantizers import IMAGES, MODELS, NNCF, NNCF_TRANSFORMER, STATIC_PEERS, Peer, _ready

from deploycc import contest
from deploycc.bench.environment import capture
from deploycc.bench.harness import Candidate, measure
from deploycc.bench.result import BenchResult
from deploycc.core.artifact import Form
from deploycc.core.target import Bench
from deploycc.demo import Photos
from deploycc.errors import DeployError
from deploycc.runtime import bundle as bundles
from deploycc.runtime import sessions
from deploycc.runtime.machine import available_cores

NAME = "x86"
MORE_MODELS = tuple(Given(name, f"torchvision:{name}", real=False) for name in ("resnet18", "vit_b_16"))
MORE = 1.03  # times the fastest peer's time
FAMILY = "x86"
INT8_ON_OPENVINO = (
    Peer("NNCF int8 on OpenVINO", "nncf-openvino", NNCF["NNCF default"]),
    Peer("NNCF int8 for transformers on OpenVINO", "nncf-openvino", NNCF_TRANSFORMER["NNCF transformer (SmoothQuant)"]),
)
TORCH_FX = Peer("torch FX int8, onednn", "torch-fx", {"engine": "onednn"})


def ours(
    case: Case, photos: Photos, folder: Path, threads: int, *, among: Sequence[str] = (), limits: Mapping[str, float] | None = None
) -> tuple[Made, dict[str, float], list[str]]:
    """The bundle of `--target x86`, or of the targets `among` within `limits`; ms by target; and what it was chosen from, in words."""
    found = (tuple(among), ()) if among else contest.field(FAMILY)
    assert found is not None  # there is no target of that name
    names, left_out = found
    open_targets = [open_target(name) for name in names]
    chosen = [target.model_copy(update={"limits": target.limits.model_copy(update=limits or {})}) for target in open_targets]
    output = folder / f"bundle-{threads}{'-limited' if limits else ''}"
    given = _as_judged(case, folder) if limits else case.given
    options = replace(options_of(given, photos, chosen[0], output), threads=threads)
    result = contest.run(case.given.text, options, chosen, left_out, say=say)
    loaded = bundles.load(result.bundle.folder)
    times = {item.plan.target.name: result.bench.get(item.plan.target.name).p50_ms for item in result.compiled}
    told = [f"{name} {value:.2f} ms" for name, value in times.items()]
    size = sum((loaded.folder / name).stat().st_size for name in result.best.shipped.built.files)
    told += [f"{who}: {brief(why)}" for who, why in result.refused]
    name = f"--target {FAMILY} ({result.best.plan.target.name})"
    return Made(name, OURS, "", lambda: bundles.open_session(loaded, threads), size), times, told


def _as_judged(case: Case, folder: Path) -> Given:
    """The model with the samples that judge here for its gate, and what calibrates it: arrays, no longer photos."""
    paths = folder / "calibration.npz", folder / "judging.npz"
    for path, rows in zip(paths, (case.calibration, case.judging), strict=True):
        arrays: dict[str, Any] = {name: np.concatenate([feeds[name] for feeds in rows]) for name in rows[0]}
        np.savez(path, **arrays)
    return replace(case.given, calibration=paths[0], judging=paths[1])


def turned(case: Case, views: int) -> Case:
    """With the first `views` of: each photo, mirrored, upside down, both."""
    steps = [(1, 1), (1, -1), (-1, 1), (-1, -1)][:views]
    judging = [
        {name: np.ascontiguousarray(array[..., ::y, ::x]) for name, array in feeds.items()} for feeds in case.judging for y, x in steps
    ]
    return replace(case, judging=tuple(judging), labels=(None,) * len(judging))


def peers(case: Case, folder: Path, python: Path | None, threads: int) -> list[Made]:
    """Every other way, or why there is none."""
    import torch

    model, signature = case.reference.model, case.graph.signature
    openvino, made = sessions.find("openvino"), [float_row(case, threads)]
    if case.reference.form is Form.MODULE:
        torch.compiler.reset()
        compiled = torch.compile(model, options={"freezing": True, "cpp.threads": threads})
        made.append(Made("PyTorch eager", PEER, open=lambda: TorchSession(model, signature, threads)))
        made.append(Made("torch.compile, frozen", PEER, open=lambda: TorchSession(compiled, signature, threads)))
    made += [run_peer(case, peer, folder, python, threads) for peer in (TORCH_FX, STATIC_PEERS[0])]
    for precision in ("f32", "bf16"):
        opened = partial(openvino.open, case.onnx, signature, {"precision": precision}, threads)
        made.append(Made(f"OpenVINO {precision}", PEER, open=opened, runtime="OpenVINO"))
    for peer in INT8_ON_OPENVINO:
        int8 = run_peer(case, peer, folder, python)
        path = folder / f"{slug(peer.name)}.xml"
        if not int8.problem:
            int8 = Made(int8.name, PEER, open=partial(openvino.open, path, signature, {"precision": "f32"}, threads), bytes=int8.bytes)
        made.append(int8)
    return made


def compare(case: Case, rows: Sequence[Made], settings: Bench) -> tuple[list[dict[str, Any]], BenchResult]:
    """Judged one by one, then timed in turns; a row that cannot be opened here says so."""
    found: dict[str, dict[str, Any]] = {}
    want: Any = None
    for row in rows:
        facts: dict[str, Any] = {"name": row.name, "side": row.side, "problem": row.problem, "bytes": row.bytes}
        found[row.name] = facts
        if row.open is None:
            continue
        say(f"{case.given.name}: judging {row.name}")
        try:
            with row.open() as session:
                got = answers(session, case.judging)
        except Exception as error:
            if row.side == OURS:
                raise
            facts["problem"] = f"it does not run: {str(error).splitlines()[0][:120]}"
            continue
        want = got if want is None else want  # the first row is the float graph
        quality = judge(want, got, case.labels, vectors=case.given.kind != IMAGES)
        facts |= {"agreement": quality.agreement, "sqnr_db": quality.sqnr_db, "cosine": quality.cosine}
    candidates = [Candidate(row.name, row.open, case.probes) for row in rows if row.open and not found[row.name]["problem"]]
    say(f"{case.given.name}: one interleaved run over {len(candidates)} rows")
    own = next(row.name for row in rows if row.side == OURS)
    bench = measure(candidates, settings=settings, baseline=own)
    for candidate in candidates:
        ratio = bench.ratio(own, candidate.name)
        timed = bench.get(candidate.name)
        # Speed-up of ours over the row: over 1 where ours is faster.
        found[candidate.name] |= {"p50_ms": timed.p50_ms, "speedup_of_ours": [ratio.value, ratio.low, ratio.high]}
    return list(found.values()), bench


def bar(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ours against the fastest peer."""
    own = next(row for row in rows if row["side"] == OURS)
    fastest = min((row for row in rows if row["side"] != OURS and "p50_ms" in row), key=lambda row: row["p50_ms"])
    times = 1 / fastest["speedup_of_ours"][0]
    kind = "cosine" if own["agreement"] is None else "agreement"
    told = f"{times:.2f} × the time of {fastest['name']}, {kind} {own[kind]:.2%} against {fastest[kind]:.2%}"
    fast, near = times <= MORE, own[kind] >= fastest[kind]
    return {"text": told, "met": fast and near, "fast": fast, "near": near, "needs": {kind: fastest[kind]}}


def markdown(document: dict[str, Any]) -> str:
    """The page."""
    lines = [f"# {(__doc__ or '').splitlines()[0]}", "", "Written by `python benchmarks/x86.py`.", ""]
    for model, found in document["models"].items():
        lines += [f"## {model}", ""]
        if "skipped" in found:
            lines += [f"Skipped: {found['skipped']}", ""]
            continue
        note = "trained weights" if found["real"] else "random weights, batch normalization of photos: agreement means little"
        judged = f"{found['judged']} samples judge. " if "judged" in found else ""
        lines += [found["about"], "", f"{note}. {judged}Chosen from: {'; '.join(found['field'])}.", ""]
        lines += [f"{'PASS' if found['bar']['met'] else 'FAIL'}: {found['bar']['text']}", "", _table(found["rows"]), ""]
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    cells: list[list[str]] = []
    for row in sorted(rows, key=lambda row: row.get("p50_ms", float("inf"))):
        name = f"**{row['name']}**" if row["side"] == OURS else row["name"]
        if "p50_ms" not in row:
            cells.append([name, row["problem"], "–", "–", "–"])
            continue
        value, low, high = row["speedup_of_ours"]
        agreement = f"cosine {row['cosine']:.4f}" if row["agreement"] is None else f"{row['agreement']:.1%}"
        cells.append([name, f"{row['p50_ms']:.2f}", f"{value:.2f} [{low:.2f}, {high:.2f}]", agreement, _decibel(row["sqnr_db"])])
    return table(("", "p50 ms", "ours is faster by", "agreement", "SQNR dB"), cells)


def _decibel(value: float | str) -> str:
    """JSON has no infinity: what was read from a file says it in words."""
    return value if isinstance(value, str) else "exact" if math.isinf(value) else f"{value:.1f}"


def main() -> int:
    """Every model that is asked for, written when it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models alone")
    parser.add_argument("--peers-python", type=Path, metavar="PATH", help="the Python that has NNCF")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="as in quantizers.py")
    parser.add_argument("--assets", type=Path, metavar="FOLDER", help="as in quantizers.py")
    parser.add_argument("--threads", nargs="+", type=int, metavar="N", default=[1, available_cores()], help="a run for each")
    parser.add_argument("--judge", type=int, default=500, metavar="N", help="as in quantizers.py")
    parser.add_argument("--views", type=int, choices=(1, 2, 4), default=4, help="of every photo, for networks with random weights")
    options = parser.parse_args()
    if options.weights:
        sys.path.append(str(options.weights))
    photos, folder, met = real_photos(), results_folder(), True
    path = folder / f"{NAME}.json"
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"models": {}}
    for given in (*MODELS, *MORE_MODELS):
        if options.only and given.name not in options.only:
            continue
        for threads in dict.fromkeys(options.threads):
            name = given.name if threads == 1 else f"{given.name}, {threads} threads"
            try:
                case = prepare(_ready(given, options, photos), photos, options.folder / given.name, options.judge)
                if not given.real:
                    case = turned(case, options.views)
                work, settings = options.folder / given.name, Bench(threads=threads, min_seconds=2.0, min_runs=40)
                best, times, field = ours(case, photos, work, threads)
                others = peers(case, work / "peers", options.peers_python, threads)
                judged, bench = compare(case, [*others, best], settings)
                reached = bar(judged)
                if reached["fast"] and not reached["near"]:
                    say(f"{name}: {reached['text']}: again, with that as a limit")
                    best, _, more = ours(
                        case, photos, work, threads, among=sorted(times, key=lambda key: times[key])[:3], limits=reached["needs"]
                    )
                    judged, bench = compare(case, [*others, best], settings)
                    field += [f"without a limit {reached['text']}", *(f"with it {text}" for text in more)]
                    reached = bar(judged)
                bench.save(folder / f"{NAME}.{slug(name)}.bench.json")
                found = {"real": given.real, "judged": len(case.judging), "field": field, "rows": judged, "bar": reached}
                found["about"] = about(capture(threads))
                met &= found["bar"]["met"]
                print(f"{'PASS' if found['bar']['met'] else 'FAIL'}  {name}: {found['bar']['text']}")
            except DeployError as error:
                found, met = {"skipped": f"{error.what}; {error.fix}"}, False
                say(f"{name}: skipped: {error.what}")
            document["models"] = {**document["models"], name: found}
            write(folder, NAME, document, markdown(document))
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
