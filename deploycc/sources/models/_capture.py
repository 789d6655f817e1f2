"""A module and what it takes, as an Artifact: eval mode, finite weights, outputs found by running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from deploycc.core.artifact import Artifact, Form, TensorSpec
from deploycc.core.registry import suggest
from deploycc.errors import SourceError
from deploycc.forms.module import capture_signature
from deploycc.runtime.audio import AnyTransform, AudioTransform
from deploycc.runtime.transform import Transform
from deploycc.sources.models._checks import refuse_non_finite_state

if TYPE_CHECKING:
    import torch

Shape = tuple[int | str, ...]

DEFAULT_INPUT = "input"


def capture(
    module: torch.nn.Module,
    inputs: tuple[TensorSpec, ...],
    *,
    source: str,
    transform: AnyTransform | None = None,
    notices: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> Artifact:
    """The module as Artifact(MODULE). Raises SourceError for weights that are not finite and inputs that do not run."""
    module = module.eval()
    refuse_non_finite_state(module, source)
    _check_transform(transform, inputs, source)
    signature = capture_signature(module, inputs)
    return Artifact(Form.MODULE, module, signature, source, transform=transform, notices=notices, notes=notes, edits=())


def override_shapes(specs: Sequence[TensorSpec], asked: Mapping[str, Shape]) -> tuple[TensorSpec, ...]:
    """`specs` with the shapes given by --input. Raises SourceError for a name that is not an input."""
    names = [spec.name for spec in specs]
    for name in asked:
        if name not in names:
            raise SourceError(f"--input {name}: the model has no input '{name}'", fix=suggest(name, names, listing="the model's signature"))
    return tuple(replace(spec, shape=asked.get(spec.name, spec.shape)) for spec in specs)


def image_input(transform: Transform, size: tuple[int, int]) -> Shape:
    """The shape of a batch of one that `transform` makes at `size`."""
    return (1, transform.channels, *size) if transform.layout == "NCHW" else (1, *size, transform.channels)


def made_by(transform: AnyTransform | None) -> TensorSpec | None:
    """A batch of one that the transform makes, or None when its shape follows the picture or recording."""
    if isinstance(transform, AudioTransform):
        return TensorSpec(DEFAULT_INPUT, transform.dtype, (1, *transform.shape)) if transform.shape else None
    if transform is None or transform.size is None:
        return None
    return TensorSpec(DEFAULT_INPUT, transform.dtype, image_input(transform, transform.size))


def _check_transform(transform: AnyTransform | None, inputs: tuple[TensorSpec, ...], source: str) -> None:
    """What the declared transform makes must be what the model takes."""
    wanted = made_by(transform)
    if transform is None or wanted is None or len(inputs) != 1:
        return
    made = wanted.shape[1:]
    if inputs[0].accepts_sample(tuple(int(dim) for dim in made)) and inputs[0].dtype == transform.dtype:
        return
    raise SourceError(
        f"{source}: its transform makes {transform.dtype}{list(made)} of an image, but its input is {inputs[0]}",
        fix="make the transform's resize, crop and layout fit the input, or give the input's shape with --input NAME:SHAPE",
    )
