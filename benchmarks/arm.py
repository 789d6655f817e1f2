"""The three ways to 64-bit ARM on emulated cores: selftests, answers against this machine's, and instructions per call, int8 against float.

    uv run --extra executorch python benchmarks/arm.py FOLDER [--only lite0 …] [--targets arm64-xnnpack …] [--cores …] [--float]
                                                       [--assets ASSETS]

Each network is compiled for each target with an open gate, and `deploycc verify --emulate` runs the bundle under qemu: networks of pictures
with the 20 ImageNet photos of foolbox in int8, the others with their golden samples. --float makes float bundles of the same networks for
the table's other half; they are slow under emulation (minutes per call of ResNet-18). MobileNetV2 is trained on Fashion-MNIST where there
are ASSETS; networks without real weights have random ones and the batch normalization of photos (_awake.py). MiniLM is made from ASSETS
(_quantizers_files.py says of what). Rows that are there already stay, so that the script can be run piece by piece.

The bar: every selftest passes on every core, and integer answers are those of this machine, or one step of the output's scale away. Where
the last layers are float there are no steps: then they are as near as another rounding of the float weights (every one moved to the next
number, compiled and run on this machine) times NUDGED. Exit status 1 when it is not met, 2 where nothing can be emulated. Instructions are
an estimated relative cost, of one core against itself and of one precision: they are no time, and understate what int8 gains on cores
without dot product, where float waits for memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import _quantizers_fashion
import _quantizers_files
import numpy as np
from _awake import awake
from _quantizers_cases import ARRAYS, Given, open_target, options_of
from _shared import DASH, about, real_photos, results_folder, say, table, write

from deploycc import driver
from deploycc.bench.environment import capture
from deploycc.core.pipeline import Pipeline
from deploycc.demo import Photos
from deploycc.emulate import root
from deploycc.emulate.verify import Emulated, emulate
from deploycc.errors import DeployError
from deploycc.render_emulation import difference, emulated_json
from deploycc.runtime import bundle as bundles

NAME = "arm"
CORES = ("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1")
TARGETS = ("arm64-xnnpack", "arm64-onnxruntime", "arm64-qnnpack")
MODELS = (
    Given("lite0", "deploycc.demo:efficientnet_lite0"),
    *(Given(name, f"torchvision:{name}", real=False) for name in ("resnet18", "mobilenet_v2")),
)
PASSES = {
    ("minilm", "arm64-onnxruntime"): "export-onnx, quantize-dynamic{outliers=8}",
    ("minilm", "arm64-xnnpack"): "export-program, quantize-pt2e-dynamic",
    ("minilm", "arm64-qnnpack"): "quantize-torch-dynamic",
}
FOOLBOX = "imagenet_"  # how the names of its photos begin among the demo's
PHOTOS = 20
LAST_WORDS = 300
ONE_STEP = 1.0
NUDGED = 3.0  # both are draws of the same noise, of a few hundred numbers each
JUDGED = 64  # samples of a file that judge: the gate is open
Row = dict[str, Any]


def build(given: Given, target: str, precision: str, photos: Photos, folder: Path) -> Path:
    """The bundle, compiled unless it is there."""
    out = folder / given.name / f"{target}-{precision}"
    if (out / "manifest.json").is_file():
        return out
    chosen = open_target(target)
    passes = PASSES.get((given.name, target))
    if precision == "float":
        own = Pipeline.parse(passes).lossless() if passes else None
        whole = Pipeline.parse(chosen.pipeline)
        plain = [step.body.name for step in whole.lossless().steps]
        lossy = [step.body.name for step in whole.steps if step.body.name not in plain]
        passes = str(own) if own and own.steps else ", ".join(f"-{name}" for name in lossy)
    say(f"{given.name}: compiling for {target}, {precision}")
    driver.compile(given.text, replace(options_of(given, photos, chosen, out), passes=passes, resume=True))
    return out


def row_of(given: Given, target: str, precision: str, cores: Sequence[str], photos: Photos, folder: Path) -> Row:
    """One bundle on every core; `problem` where there is none."""
    facts = {"model": given.name, "real": given.real, "vectors": given.kind == ARRAYS}
    row: Row = {**facts, "target": target, "precision": precision, "problem": "", "cores": []}
    try:
        if not given.real:
            given = awake(given, photos, folder / given.name)
        bundle = build(given, target, precision, photos, folder)
        say(f"{given.name}: {target}, {precision} on {', '.join(cores)}")
        pictures = str(photos.data) if given.judging is None and precision == "int8" else None
        found = emulate(bundle, ",".join(cores), data=pictures, samples=PHOTOS, calls=2 if precision == "int8" else 1)
    except DeployError as error:
        return row | {"problem": " ".join(error.what.split())[:LAST_WORDS]}
    document = emulated_json(found)
    size = sum(path.stat().st_size for path in bundle.iterdir() if path.name.startswith("model"))
    kept = {key: document[key] for key in ("runtime", "host", "emulator", "golden", "samples", "notes", "cores")}
    row |= kept | {"bytes": size, "differences": [_shown(found, index) for index in range(len(cores))]}
    if precision == "int8" and given.weights and any(_stepless(item["distances"]) for item in row["cores"]):
        row["nudged"] = nudged(given, target, bundle, photos, folder)
    return row


def nudged(given: Given, target: str, bundle: Path, photos: Photos, folder: Path) -> float:
    """The largest difference of an answer to the golden samples on this machine where every float weight is the next number."""
    import torch

    assert given.weights is not None  # the caller has looked
    moved = folder / "nudged" / given.name / "weights.pt"
    moved.parent.mkdir(parents=True, exist_ok=True)
    state = torch.load(given.weights, weights_only=True)
    torch.save({name: torch.nextafter(item, 2 * item) if item.is_floating_point() else item for name, item in state.items()}, moved)
    other = build(replace(given, weights=moved), target, "int8", photos, folder / "nudged")
    feeds = bundles.read_golden(bundles.load(bundle)).feeds
    answers: list[list[np.ndarray]] = []
    for path in (bundle, other):
        with bundles.open_session(bundles.load(path), 1) as session:
            answers.append([array for feed in feeds for array in session.run(feed).values()])
    return max(float(np.abs(a.astype(np.float64) - b).max()) for a, b in zip(*answers, strict=True))


def shortened(given: Given, folder: Path) -> Given:
    """The same, judged by JUDGED samples."""
    if given.judging is None:
        return given
    with np.load(given.judging) as file:
        few = {name: file[name][:JUDGED] for name in file.files}
    path = folder / given.name / f"judging-{JUDGED}.npz"
    np.savez(path, **few)  # pyright: ignore[reportArgumentType]
    return replace(given, judging=path)


def _shown(found: Emulated, index: int) -> str:
    return difference(found.cores[index].distances) if not found.cores[index].refused else DASH


def missed(rows: Sequence[Row]) -> list[str]:
    """Where the bar is not met."""
    found: list[str] = []
    for row in rows:
        where = f"{row['model']}, {row['target']}, {row['precision']}"
        if row["problem"]:
            found.append(f"{where}: {row['problem']}")
        for item in row["cores"]:
            steps = [distance["max_lsb"] for distance in item["distances"] if distance["max_lsb"] is not None]
            if not item["ok"]:
                found.append(f"{where}, {item['core']}: {item['refused'].splitlines()[0]}")
            elif max(steps, default=0.0) > ONE_STEP:
                found.append(f"{where}, {item['core']}: {max(steps):.0f} steps of the output's scale from this machine's answers")
            elif row["precision"] == "int8" and (off := _stepless(item["distances"])) > NUDGED * row.get("nudged", 0.0):
                beside = f", where another rounding of the weights moves them by {row['nudged']:.2g}" if "nudged" in row else ""
                found.append(f"{where}, {item['core']}: float outputs, {off:.2g} from this machine's{beside}")
    return found


def _stepless(distances: Sequence[Row]) -> float:
    """The largest difference of outputs that are no whole multiples of a scale."""
    return max((distance["max_abs"] for distance in distances if distance["max_lsb"] is None), default=0.0)


def markdown(document: dict[str, Any], machine: str) -> str:
    """The page."""
    rows: list[Row] = document["rows"]
    cores = [core for core in CORES if any(item["core"] == core for row in rows for item in row["cores"])]
    emulators = ", ".join(sorted({row["emulator"] for row in rows if "emulator" in row}))
    about_it = (
        f"{emulators}, user emulation. {_of_random(rows)}"
        "**Instructions are an estimated relative cost under emulation (`measured: false`): no latency was measured on any ARM device.** "
        "They understate what int8 gains on cores without dot product (Cortex-A53, A72), where float waits for memory. "
        f"Float answers of an integer bundle may differ by {NUDGED:g} × what moves them on this machine when every float weight is the "
        "next number."
    )
    lines = [f"# {(__doc__ or '').splitlines()[0]}", "", "Written by `python benchmarks/arm.py`.", "", about_it, ""]
    lines += ["## Million instructions per call: int8 / float = times fewer", "", _costs(rows, cores), ""]
    lines += ["## Selftests and answers", "", _answers(rows, cores), ""]
    verdict = document["missed"]
    lines.append("The bar is met." if not verdict else "The bar is missed:\n\n" + "\n".join(f"- {line}" for line in verdict))
    return "\n".join([*lines, "", machine])


def _of_random(rows: Sequence[Row]) -> str:
    names = dict.fromkeys(row["model"] for row in rows if not row["real"])
    return f"Random weights and the batch normalization of photos: {', '.join(names)}. " if names else ""


def _pairs(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["target"]), {})[row["precision"]] = row
    return found


def _minsn(row: Row | None, core: str) -> float | None:
    items = [item for item in (row or {"cores": []})["cores"] if item["core"] == core]
    return items[0]["cost"]["minsn"] if items else None


def _costs(rows: Sequence[Row], cores: Sequence[str]) -> str:
    lines: list[list[str]] = []
    for (model, target), both in _pairs(rows).items():
        cells: list[str] = []
        for core in cores:
            int8, plain = (_minsn(both.get(precision), core) for precision in ("int8", "float"))
            shown = f"{int8:.1f}" if int8 is not None else DASH
            shown += f" / {plain:.1f}" if plain is not None else ""
            cells.append(f"{shown} = {plain / int8:.2f}" if int8 and plain else shown)
        lines.append([model, target, *cells])
    return table(("network", "target", *cores), lines)


def _answers(rows: Sequence[Row], cores: Sequence[str]) -> str:
    header = (
        "network",
        "target",
        "precision",
        "MB",
        *(f"{core}: selftest, difference, same answers" for core in cores),
        "next weights move by",
        "multiplies with",
    )
    lines: list[list[str]] = []
    for row in rows:
        if row["problem"]:
            lines.append([row["model"], row["target"], row["precision"], DASH, *[DASH] * len(cores), DASH, row["problem"]])
            continue
        by_core = {item["core"]: (item, shown) for item, shown in zip(row["cores"], row["differences"], strict=True)}
        cells = [_answer(*by_core[core], vectors=row["vectors"]) if core in by_core else DASH for core in cores]
        moved = f"{row['nudged']:.2g}" if "nudged" in row else DASH
        kinds = dict.fromkeys(", ".join(item["multiplies"]) for item in row["cores"] if item["multiplies"])
        lines.append([row["model"], row["target"], row["precision"], f"{row['bytes'] / 1e6:.2f}", *cells, moved, "; ".join(kinds)])
    return table(header, lines)


def _answer(item: Row, shown: str, *, vectors: bool) -> str:
    """`vectors`: the largest of its numbers is no class."""
    if not item["ok"]:
        return "FAILED"
    agreement, cosine = item["agreement"], item.get("cosine")
    nearness = f", cos {cosine:.4f}" if cosine is not None else ""
    if agreement is not None and not vectors:
        nearness = f", {100 * agreement:.0f} %"
    return f"ok, {shown}{nearness}"


def foolbox(photos: Photos, folder: Path) -> Photos:
    """The demo's photos with only those of foolbox to judge."""
    chosen = folder / "foolbox"
    if not chosen.is_dir():
        chosen.mkdir(parents=True)
        for path in sorted(photos.data.rglob(f"*{FOOLBOX}*")):
            shutil.copyfile(path, chosen / path.name)
    return replace(photos, data=chosen)


def main() -> int:
    """Every row that was asked for; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where bundles are kept")
    parser.add_argument("--only", nargs="+", choices=[*(given.name for given in MODELS), "minilm"])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--cores", nargs="+", choices=CORES, default=CORES)
    parser.add_argument("--float", action="store_true", help="float bundles instead of int8")
    parser.add_argument("--assets", type=Path, metavar="ASSETS", help="what minilm is made from, and a trained mobilenet_v2")
    options = parser.parse_args()
    if reason := root.missing():
        print(reason, file=sys.stderr)
        return 2
    photos = foolbox(real_photos(), options.folder)
    models = list(MODELS)
    if options.assets:
        made = _quantizers_fashion.given(options.folder / "mobilenet_v2", options.assets)
        models = [made if given.name == made.name else given for given in MODELS]
        models.append(_quantizers_files.given("minilm", options.folder / "minilm", options.assets))
        models = [shortened(given, options.folder) for given in models]
    results, precision = results_folder(), "float" if options.float else "int8"
    path = results / f"{NAME}.json"
    earlier: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    kept = {(row["model"], row["target"], row["precision"]): row for row in earlier}
    for given in models:
        for target in options.targets if not options.only or given.name in options.only else ():
            kept[given.name, target, precision] = row_of(given, target, precision, options.cores, photos, options.folder)
            order = {name: index for index, name in enumerate((*(item.name for item in MODELS), "minilm", *TARGETS, "int8", "float"))}
            rows = [kept[key] for key in sorted(kept, key=lambda key: [order[part] for part in key])]
            document = {"rows": rows, "missed": missed(rows)}
            write(results, NAME, document, markdown(document, about(capture(1))))
    page = path.with_suffix(".md")
    print(page.read_text(encoding="utf-8") if page.is_file() else "")
    return 1 if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
