"""What quantization-aware training does alike for every form: the teacher, the schedule of observers, and what the receipt tells."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from deploycc.core.artifact import Artifact, Form
from deploycc.core.compare import drift
from deploycc.core.contract import Context
from deploycc.errors import PreconditionError
from deploycc.passes._training_pass import TrainingOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from deploycc.passes._fake_quant import Activation, Weights
    from deploycc.passes._feeder import Feeder

COMPARED = 64  # samples
CHECKED_ROWS = 2  # calls' worth of rows by which the way to run batches is found


@dataclass(frozen=True)
class QatOptions(TrainingOptions):
    """How rounding is trained for.

    Attributes:
        teacher: reference (the float model), none, or a model as compile takes it.
        alpha: share of the labels' loss; none = 0.3 with labels, 0 without, 1 without a teacher.
        temperature: T above.
        loss: of the labels: auto, cross-entropy, mse or bce.
        step_sizes: calibrated, observed or learned.
        observer_epochs: epochs during which observed steps follow the activations.
    """

    epochs: int = 2
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = "adam"  # without norms, weights of channels differ much in size
    lr: float = 3e-4
    weight_decay: float = 0.0
    teacher: str = "reference"
    alpha: float | None = None
    temperature: float = 4.0
    loss: str = "auto"
    step_sizes: Literal["calibrated", "observed", "learned"] = "calibrated"
    observer_epochs: int = 1

    def __post_init__(self) -> None:
        from deploycc.passes._losses import LOSSES

        super().__post_init__()
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}: it is a share, 0 to 1")
        if self.teacher == "none" and self.alpha not in (None, 1.0):
            raise ValueError(f"alpha is {self.alpha}, but without a teacher the labels are all there is: leave alpha out")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: it must be over 0")
        if self.loss not in LOSSES:
            raise ValueError(f"loss is '{self.loss}': use one of {', '.join(LOSSES)}")
        if self.observer_epochs < 1:
            raise ValueError(f"observer-epochs is {self.observer_epochs}: it must be at least 1")


def fixed_batch(artifact: Artifact) -> int | None:
    """The batch written into a graph; None: it takes any."""
    size = artifact.signature.inputs[0].shape[0]
    return size if isinstance(size, int) else None


def first_rows(artifact: Artifact, feeder: Feeder, *, teacher: bool = False) -> tuple[torch.Tensor, ...]:
    """A few training samples, to find out how batches run."""
    count = CHECKED_ROWS * (fixed_batch(artifact) or 1)
    first = next(iter(feeder.epoch(0)))
    repeated = first.teacher_inputs if teacher else first.inputs
    return tuple(value[[row % len(value) for row in range(count)]] for value in repeated)


def guide_of(teacher: Artifact, feeder: Feeder) -> nn.Module:
    """A float model, in eval mode, for any batch."""
    from deploycc.passes._distilling import module_of
    from deploycc.passes._layout import channels_last

    rows = first_rows(teacher, feeder, teacher=True)
    if teacher.form is not Form.ONNX:
        guide = copy.deepcopy(module_of(teacher)).eval()  # the reference itself keeps its order in memory
        channels_last(guide, rows)
        return guide
    from deploycc.passes._onnx_torch import Batched, OnnxModule

    guide = Batched(OnnxModule(teacher.model, batch=fixed_batch(teacher))).eval()
    guide.choose(*rows)
    return guide


def require_gradients(net: nn.Module, output: torch.Tensor, weights: Mapping[str, Weights]) -> None:
    """Raise PreconditionError when no gradient of `output` reaches any of the weights."""
    if output.requires_grad:
        output.float().square().sum().backward()
    without = [name for name, made in weights.items() if made.weight.grad is None]
    net.zero_grad(set_to_none=True)
    if len(without) == len(weights):
        raise PreconditionError(
            f"no gradient reaches the weights (the first is '{without[0] if without else ''}'): an operator after them has none",
            fix="leave quantize-qat out, or export the model without that operator (ArgMax, a cast to whole numbers)",
        )


def watch(activations: Iterable[Activation], options: QatOptions, epoch: int) -> None:
    """Let observed steps follow the batches, as long as they shall."""
    for activation in activations:
        activation.observing = options.step_sizes == "observed" and epoch < options.observer_epochs


def calls(artifact: Artifact, context: Context) -> list[dict[str, np.ndarray]]:
    """Feeds of the calibration samples on which what was trained and what ships are compared."""
    from deploycc.core.data import batches

    part = context.data.part("calibration").limited(COMPARED, seed=0)
    return [dict(batch.feeds) for batch in batches(part, artifact)]


def run_trained(net: Callable[..., Any], artifact: Artifact, feeds: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """What the trained net, in eval mode, gives for `feeds`, by the names of the artifact's outputs."""
    import torch

    from deploycc.forms.module import named_outputs

    names = [spec.name for spec in artifact.signature.inputs]
    with torch.no_grad():
        found = [named_outputs(net(*(torch.from_numpy(item[name]) for name in names))) for item in feeds]
    return [{spec.name: value.numpy() for spec, (_, value) in zip(artifact.signature.outputs, row, strict=True)} for row in found]


def facts(wanted: list[dict[str, np.ndarray]], got: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """A drift as JSON values; equal outputs are 200 dB apart."""
    found = drift(wanted, got)
    agreement = None if found.agreement is None else round(found.agreement, 6)
    return {
        "samples": found.samples,
        "agreement": agreement,
        "relative": round(found.relative, 8),
        "sqnr_db": round(min(200.0, max(-200.0, found.sqnr_db)), 2),
    }


def told(compared: Mapping[str, Any]) -> str:
    """`facts` for a note."""
    same = "" if compared["agreement"] is None else f"{compared['agreement']:.1%} equal arg-max, "
    return f"{same}max |Δ| / max |output| {compared['relative']:.2g}, {compared['sqnr_db']:.1f} dB"


def losses(curves: Sequence[Mapping[str, Any]]) -> str:
    """Of the first and the last epoch."""
    return f"loss {curves[0]['loss']:.4f} → {curves[-1]['loss']:.4f}"
