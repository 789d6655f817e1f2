"""scikit-learn's pictures of digits, and a net for them that is hard to quantize."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import Sample
from deploycc.forms.module import capture_signature
from deploycc.runtime.signature import TensorSpec

TRAINED = 900  # of 1,797; the rest judges


class Digits:
    """Pictures of digits; labels may be left out."""

    def __init__(self, part, *, labelled=True):
        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))[part]
        x = (digits.images[order] / 16).astype(np.float32)[:, None]
        self.x, self.y, self.labelled = (x - 0.3) / 0.38, digits.target[order], labelled

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return Sample({"x": self.x[index]}, self.label(index), str(index))

    def label(self, index):
        return (int(self.y[index]),) if self.labelled else None

    def digest(self, index):
        return str(index)


def artifact(net):
    return Artifact(Form.MODULE, net.eval(), capture_signature(net.eval(), (TensorSpec("x", "float32", (1, 1, 8, 8)),)), "digits")


def harsh() -> Artifact:
    """A float net whose channels differ much in size, as depthwise nets' do: nothing in float, hard on one scale per tensor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip
        rows = Digits(slice(0, TRAINED))
        x, y = torch.from_numpy(rows.x), torch.from_numpy(rows.y)
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(12):
            for some in torch.randperm(TRAINED).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[some]), y[some]).backward()
                optimizer.step()
        with torch.no_grad():
            for norm, reader in ((1, 3), (4, 7)):
                factor = torch.exp(1.5 * torch.randn(net[norm].weight.shape))
                net[norm].weight.mul_(factor)
                net[norm].bias.mul_(factor)
                net[reader].weight.div_(factor[None, :, None, None])
    return artifact(net)
