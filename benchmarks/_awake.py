"""Random weights with activations like those of a trained network: what every benchmark without real weights runs.

A fresh network normalizes by mean 0 and variance 1. Folded into a convolution that leaves no bias at all, and what runs is a network
without an operator that every trained one has: OpenVINO's int8 kernels of such a ResNet-18 take 0.9 × the time. The mean and variance
that its layers really see on photos make the biases, and keep the answers of a deep network apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _quantizers_cases import Given
from _shared import say

from deploycc.core.contract import ModelRequest
from deploycc.demo import Photos
from deploycc.planning import find_source, open_dataset

PHOTOS = 16
SEED = 0


def awake(given: Given, photos: Photos, folder: Path) -> Given:
    """The network, of photos and torchvision's, with its weights as a file in `folder`, made when it is not there."""
    import torch

    path = folder / "awake.pt"
    if not path.is_file():
        reference = find_source(given.text).load(ModelRequest(given.text, random_weights=True, seed=SEED))
        assert reference.transform is not None  # torchvision's declare one
        split = next(iter(open_dataset(str(photos.calibration)).splits.values()))
        awaken(reference.model, [np.stack([reference.transform.apply(split[index].value) for index in range(min(PHOTOS, len(split)))])])
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(reference.model.state_dict(), path)
        say(f"{given.name}: random weights, batch normalization of {PHOTOS} photos")
    return replace(given, weights=path)


def awaken(module: Any, inputs: Sequence[np.ndarray]) -> None:
    """Give a network with random weights activations like those of a trained one; in place. `inputs`: arrays of one call, batch first.

    Weights that are all zero before training (the head of torchvision's ViT) get random numbers: silence has no SQNR. BatchNorms get the
    statistics of real pictures: without, activations of MobileNetV2 fall to 1e-9, which float16 does not hold.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    norms = [item for item in module.modules() if isinstance(item, torch.nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02, generator=generator)
        if not norms:
            return
        for norm in norms:  # all else as in use: no dropout
            norm.train().reset_running_stats()
            norm.momentum = None  # the mean over all calls
        module(*(torch.from_numpy(array) for array in inputs))
        module.eval()
