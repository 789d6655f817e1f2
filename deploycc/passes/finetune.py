"""Fine-tuning: the model trains on labelled samples with an ordinary loss.

As the first pass of a pipeline it makes the float model that everything after it is compared with: the gate then judges int8 against the
fine-tuned model, not against the one that came in. After pruning it recovers what was lost (`distill` does that better).

`classes=N` gives the model a new last layer for N classes, with new weights, drawn with the run's seed; `freeze=E` trains only that layer
for the first E epochs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import Context
from deploycc.core.registry import suggest
from deploycc.errors import DataNeeded, PreconditionError
from deploycc.passes._training_pass import TrainingPass

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Finetune(TrainingPass):
    """Train the model on labelled samples.

    Attributes:
        loss: auto (cross-entropy for classes, mse for arrays), cross-entropy, mse, bce, or file.py:loss, called with (outputs, labels).
        label_smoothing: ε of the cross-entropy.
        class_weights: one factor per class, for the cross-entropy.
        classes: size of a new last layer; none = the present one stays.
        head: name of the last layer; empty = found.
        freeze: epochs in which only the last layer trains.
    """

    name: ClassVar[str] = "finetune"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.MODULE})
    prepares: ClassVar[bool] = True

    loss: str = "auto"
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    classes: int | None = None
    head: str = ""
    freeze: int = 0

    def __post_init__(self) -> None:
        from deploycc.passes._losses import LOSSES

        super().__post_init__()
        if self.loss not in LOSSES and ":" not in self.loss:
            raise ValueError(f"loss is '{self.loss}': use one of {', '.join(LOSSES)}, or file.py:function")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label-smoothing is {self.label_smoothing}: it must be at least 0 and under 1")
        if (self.class_weights or self.label_smoothing) and self.loss not in ("auto", "cross-entropy"):
            raise ValueError(f"class-weights and label-smoothing belong to the cross-entropy, but loss is {self.loss}")
        if self.classes is not None and self.classes < 2:
            raise ValueError(f"classes is {self.classes}: it must be at least 2")
        if not 0 <= self.freeze <= self.epochs:
            raise ValueError(f"freeze is {self.freeze}: it must be between 0 and epochs, {self.epochs}")

    @property
    def new_classes(self) -> int | None:
        """The classes of the new head."""
        return self.classes

    def requires(self, artifact: Artifact, context: Context) -> None:
        """As every training, and labels on every sample."""
        super().requires(artifact, context)
        if not context.data.part("training").labelled:
            raise DataNeeded("finetune needs labels, and some training samples have none", fix="label them, or use distill{alpha=0}")
        classes = self.classes or artifact.signature.outputs[0].shape[-1]
        if self.class_weights and len(self.class_weights) != classes:
            raise PreconditionError(f"{len(self.class_weights)} class-weights for {classes} classes", fix="give one for each class")

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Train a copy."""
        from deploycc.passes._distilling import first_output, scorer
        from deploycc.passes._feeder import Feeder, TrainBatch
        from deploycc.passes._losses import label_loss
        from deploycc.passes._train import fit, trainable

        before = with_head(artifact, self.classes, self.head, context.seed) if self.classes is not None else artifact
        module = trainable(before)
        feeder = Feeder(before, context, self)
        own = context.function(self.loss) if ":" in self.loss else None

        def objective(net: nn.Module, batch: TrainBatch) -> torch.Tensor:
            labels = batch.labels
            assert labels is not None
            loss = own or label_loss(self.loss, labels, smoothing=self.label_smoothing, class_weights=self.class_weights)
            return loss(first_output(net(*batch.inputs)), labels)

        score, metric = scorer(feeder, None)
        still: list[str] = []
        if self.freeze:
            kept = self.head or find_head(before.model, before.signature.outputs[0].shape[-1])
            still = [name for name, _ in module.named_parameters() if not name.startswith(f"{kept}.")]
        fitted = fit(
            module, objective, options=self, feeder=feeder, context=context, what=self.name, score=score, metric=metric,
            frozen=lambda epoch: still if epoch < self.freeze else (),
        )  # fmt: skip
        first, last = fitted.curves[0], fitted.curves[-1]
        notes = (f"{len(fitted.curves)} epochs: loss {first['loss']:.4f} → {last['loss']:.4f}", *fitted.notes)
        return before.evolve(fitted.module, edits=before.edits, sparse=before.sparse, notes=notes, details={"curves": list(fitted.curves)})


def with_head(artifact: Artifact, classes: int, name: str, seed: int) -> Artifact:
    """The artifact with a last layer for `classes` classes, its weights drawn with `seed`. Raises PreconditionError."""
    import torch

    from deploycc.forms._edits import resize_edit
    from deploycc.forms.module import capture_signature
    from deploycc.passes._train import trainable

    module = trainable(artifact)
    path = name or find_head(module, artifact.signature.outputs[0].shape[-1])
    head: Any = _layer(module, path)
    axis = "out_features" if isinstance(head, torch.nn.Linear) else "out_channels"
    setattr(head, axis, classes)
    head.weight = torch.nn.Parameter(torch.empty(classes, *head.weight.shape[1:]))
    if head.bias is not None:
        head.bias = torch.nn.Parameter(torch.empty(classes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head.reset_parameters()
    signature = capture_signature(module.eval(), artifact.signature.inputs)
    transform = artifact.transform
    if transform is not None and transform.classes is not None and len(transform.classes) != classes:
        transform = replace(transform, classes=None)
    edit = resize_edit(artifact.model, module)
    edits = None if artifact.edits is None else (*artifact.edits, edit)
    return artifact.evolve(module, signature=signature, transform=transform, edits=edits)


def find_head(module: nn.Module, outputs: Any) -> str:
    """Name of the last linear layer or convolution whose width is that of the model's output. Raises PreconditionError."""
    import torch

    found = [
        name
        for name, layer in module.named_modules()
        if (isinstance(layer, torch.nn.Linear) and layer.out_features == outputs)
        or (isinstance(layer, torch.nn.Conv2d) and layer.out_channels == outputs and layer.groups == 1)
    ]
    if not found:
        raise PreconditionError(f"no linear layer or convolution gives {outputs} outputs: the head cannot be found", fix="name it: head=…")
    return found[-1]


def _layer(module: nn.Module, path: str) -> Any:
    import torch

    names = [name for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    if path not in names:
        raise PreconditionError(f"head='{path}' is no linear layer or convolution", fix=suggest(path, names, listing="the model"))
    return module.get_submodule(path)
