"""The state of a training: curves, the best weights so far, and what a killed run goes on from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycc.errors import TrainingError
from deploycc.passes._feeder import TrainBatch
from deploycc.passes._layout import ordered
from deploycc.passes._training_pass import TrainingOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

STATE = "epoch.pt"


@dataclass(slots=True)
class Run:
    """The state of a training."""

    accelerator: Any
    module: nn.Module
    optimizer: Any
    options: TrainingOptions
    steps: int
    masks: Mapping[str, torch.Tensor]
    channels_last: bool = False
    curves: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    notes: list[str] = field(default_factory=list[str])
    best: dict[str, Any] = field(default_factory=dict[str, Any])
    best_epoch: int = -1
    best_score: float = -math.inf
    start: float = math.nan
    loss: float = math.nan
    lr: float = 0.0

    def placed(self, batch: TrainBatch) -> TrainBatch:
        """The batch on the device, in the module's own order."""
        device, arranged = self.accelerator.device, ordered if self.channels_last else tuple
        inputs = arranged([tensor.to(device) for tensor in batch.inputs])
        same = batch.teacher_inputs is batch.inputs
        other = inputs if same else arranged([tensor.to(device) for tensor in batch.teacher_inputs])
        return TrainBatch(inputs, None if batch.labels is None else batch.labels.to(device), other)

    def set_lr(self, step: int) -> float:
        """Of this step; each group has its own factor."""
        self.lr = self.options.lr_at(step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group["scale"]
        return self.lr

    def mask(self) -> None:
        """Zeros of sparse weights stay zeros."""
        import torch

        with torch.no_grad():
            for name, mask in self.masks.items():
                self.module.get_parameter(name).mul_(mask)

    def note(self, text: str) -> None:
        """Say something in the receipt."""
        self.notes.append(text)

    def latest(self) -> str:
        """The last epoch's metric."""
        value = self.curves[-1]["metric"] if self.curves else None
        return "" if value is None else f", {self.curves[-1]['name']} {value:.4g}"

    def finish(self, epoch: int, value: float | None, metric: str, merit: float | None) -> None:
        """Keep the curves, and the weights if they are the best so far."""
        self.curves.append({"epoch": epoch + 1, "loss": self.loss, "lr": self.lr, "name": metric, "metric": value})
        if merit is None or merit > self.best_score or not self.best:  # a loss that is NaN on the held-out samples is above nothing
            self.keep(epoch, -math.inf if merit is None or math.isnan(merit) else merit)

    def keep(self, epoch: int, score: float) -> None:
        """These weights are the best so far; epoch -1 is the start."""
        self.best = {key: tensor.detach().clone() for key, tensor in self.module.state_dict().items()}
        self.best_epoch, self.best_score = epoch, score

    def broken(self, value: float, epoch: int, step: int, lr: float) -> str:
        """What to say of a loss that is no number; raises TrainingError when no epoch was finished before."""
        where = f"the loss is {value} at step {step + 1} of epoch {epoch + 1}, learning rate {lr:.3g}"
        if not self.curves:
            raise TrainingError(where, fix=f"use a smaller rate (lr={self.options.lr / 10:g}), warmup=1 or clip-norm=1; check the data")
        kept = f"epoch {self.best_epoch + 1}" if self.best_epoch >= 0 else "the start"
        return f"stopped: {where}; the weights of {kept} are kept. Use a smaller lr, warmup or clip-norm"

    def save(self, folder: Path | None, epoch: int) -> None:
        """Everything that the next epoch needs, written whole."""
        import torch

        if folder is None or not self.accelerator.is_main_process:
            return
        folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "epoch": epoch,
            "curves": self.curves,
            "notes": self.notes,
            "best_epoch": self.best_epoch,
            "best_score": self.best_score,
            "start": self.start,
        }
        state = {
            "facts": json.dumps(facts),
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
        }
        torch.save(state, folder / f".{STATE}")
        (folder / f".{STATE}").replace(folder / STATE)

    def restore(self, folder: Path | None) -> int:
        """Go on from what `save` wrote; the first epoch to run."""
        import torch

        if folder is None or not (folder / STATE).is_file():
            return 0
        state = torch.load(folder / STATE, map_location=self.accelerator.device, weights_only=True)
        facts = json.loads(state["facts"])
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.curves, self.notes = state["best"], facts["curves"], facts["notes"]
        self.best_epoch, self.best_score, self.start = facts["best_epoch"], facts["best_score"], facts["start"]
        self.accelerator.wait_for_everyone()
        return facts["epoch"] + 1
