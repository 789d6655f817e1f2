"""A small network and labelled points for the passes that train."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from deploycc.core import target
from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import Context, Dataset, Sample
from deploycc.core.data import Data
from deploycc.forms.module import capture_signature
from deploycc.runtime.signature import TensorSpec


class Rows:
    """Points of a plane, class by the sign of x and of y; labels may be left out."""

    def __init__(self, count=256, seed=0, *, labelled=True, label=None):
        self.x = np.random.default_rng(seed).normal(size=(count, 2)).astype(np.float32)
        self.labelled, self.fixed = labelled, label

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return Sample({"x": self.x[index]}, self.label(index), f"row {index}")

    def label(self, index):
        if not self.labelled:
            return None
        return self.fixed if self.fixed is not None else (int(self.x[index, 0] > 0) + 2 * int(self.x[index, 1] > 0),)

    def digest(self, index):
        return f"{self.x[index].tobytes().hex()}{self.label(index)}"


def net(width=16, classes=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, classes))


def artifact(module=None, source="net"):
    module = (module or net()).eval()
    return Artifact(Form.MODULE, module, capture_signature(module, (TensorSpec("x", "float32", (1, 2)),)), source, edits=())


def context(reference=None, rows=None, **fields):
    made = target.Target.model_validate(
        {"name": "t", "title": "t", "backend": "onnxruntime", "arch": "any", "pipeline": "", "quant": {"reduce_range": True}}
    )
    rows = rows or Rows()
    data = Data(Dataset("d", {"train": rows, "val": Rows(64, 1, labelled=rows.labelled)}))
    return replace(Context(made, reference or artifact(), data, 0, Path()), **fields)


def top1(made):
    rows = Rows(400, 7)
    with torch.no_grad():
        best = made.model(torch.from_numpy(rows.x)).argmax(1)
    return float(np.mean([int(best[i]) in rows.label(i) for i in range(len(rows))]))


QUICK = {"epochs": 6, "batch": 32, "lr": 0.1}
