"""MobileNetV2 with weights that mean something: trained on Fashion-MNIST at 64 pixels, once, in minutes on two cores.

torchvision's network with ten classes, from random weights: SGD with momentum and Nesterov, one-cycle learning rate (L. Smith, 2018),
mirrored pictures. Some of the training pictures that it has seen calibrate; test pictures judge.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from _quantizers_cases import Given
from _shared import say

from deploycc.planning import open_dataset

if TYPE_CHECKING:
    import torch

NAME = "mobilenet_v2"
DATA = "usr/share/datasets/fashion-mnist"  # of Debian's dataset-fashion-mnist
PIXELS, CLASSES = 64, 10
MEAN, STD = 0.286, 0.353
EPOCHS, BATCH, RATE, DECAY, MOMENTUM = 3, 64, 0.1, 1e-4, 0.9
TRAINED, CALIBRATED, JUDGED = 30_000, 128, 1000
SEED = 0


def mobilenet_v2() -> torch.nn.Module:
    """With new weights; the file of trained ones is given beside it."""
    import torch
    from torchvision.models import mobilenet_v2 as make

    model = make(num_classes=CLASSES)
    model.example_input = torch.zeros(1, 3, PIXELS, PIXELS)
    return model.eval()


def given(folder: Path, assets: Path) -> Given:
    """The model with its weights and arrays in `folder`, made when they are not there. Raises DataError where `assets` has no set."""
    weights, calibration, judging = (folder / name for name in ("weights.pt", "calibration.npz", "judging.npz"))
    if not all(path.is_file() for path in (weights, calibration, judging)):
        folder.mkdir(parents=True, exist_ok=True)
        splits = open_dataset(f"fashion-mnist:{assets / DATA}").splits
        train, test = (_pictures(splits[name], count) for name, count in (("train", TRAINED), ("val", JUDGED)))
        _train(*train, *test, weights)
        np.savez(calibration, x=_enlarged(train[0][-CALIBRATED:]))
        np.savez(judging, x=_enlarged(test[0]), label=test[1])
    return Given(NAME, f"{Path(__file__)}:mobilenet_v2", calibration=calibration, judging=judging, weights=weights)


def _pictures(split: object, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 pictures N×28×28, classes) of the first `count`."""
    samples = [split[index] for index in range(count)]  # pyright: ignore[reportIndexIssue]
    pictures = np.stack([np.asarray(sample.value).reshape(28, 28, -1)[:, :, 0] for sample in samples])
    return pictures, np.array([sample.label[0] for sample in samples])


def _enlarged(pictures: np.ndarray) -> np.ndarray:
    """float32 N×3×PIXELS×PIXELS, normalized."""
    import torch
    import torch.nn.functional as F

    x = (torch.from_numpy(pictures)[:, None].float() / 255 - MEAN) / STD
    return F.interpolate(x, size=(PIXELS, PIXELS), mode="bilinear").expand(-1, 3, -1, -1).contiguous().numpy()


def _train(pictures: np.ndarray, classes: np.ndarray, others: np.ndarray, answers: np.ndarray, out: Path) -> None:
    """Train, say what it reached, write the weights."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(SEED)
    model = mobilenet_v2().train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True)
    steps = EPOCHS * (len(pictures) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(pictures)).numpy()
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            x = torch.from_numpy(_enlarged(pictures[chosen]))
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x).to(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x), torch.from_numpy(classes[chosen]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if start % (50 * BATCH) == 0:
                say(f"{NAME}: epoch {epoch + 1} of {EPOCHS}, picture {start}, loss {loss.item():.3f}")
    model.eval()
    with torch.inference_mode():
        right = [model(torch.from_numpy(_enlarged(others[i : i + 100]))).argmax(1).numpy() for i in range(0, len(others), 100)]
    say(f"{NAME}: {np.mean(np.concatenate(right) == answers):.1%} of {len(others)} test pictures")
    torch.save(model.state_dict(), out)
