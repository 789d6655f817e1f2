"""Named axes: which number or name each one gets.

A model is static unless asked otherwise: a named first axis (the batch) becomes 1, and any other named axis needs --input. A name
given there (`--input x:Nx3x224x224`) keeps the axis dynamic under that name. An axis name is one size for all inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from deploycc.core.artifact import TensorSpec
from deploycc.core.contract import ModelRequest
from deploycc.core.registry import suggest
from deploycc.errors import SourceError

Binding = Mapping[str, int | str]


def bind_axes(specs: Sequence[TensorSpec], request: ModelRequest) -> tuple[dict[str, int | str], tuple[str, ...]]:
    """(axis name → what becomes of it, what the user should know).

    Raises SourceError for an --input that names no input or does not fit, and for a named axis that nothing binds.
    """
    names = [spec.name for spec in specs]
    for name in request.inputs:
        if name not in names:
            raise SourceError(f"--input {name}: {request.text} has no input '{name}'", fix=suggest(name, names, listing="the model"))
    bound: dict[str, int | str] = {}
    for spec in specs:
        if spec.name in request.inputs:
            _bind_asked(spec, request.inputs[spec.name], request.text, bound)
    notes: list[str] = []
    for spec in specs:
        first = spec.shape[0] if spec.shape else 0
        if isinstance(first, str) and first not in bound:
            bound[first] = 1
            notes.append(f"axis '{first}' of input '{spec.name}' is fixed at 1; --input {spec.name}:{as_text(spec.shape)} keeps it dynamic")
    for spec in specs:
        if free := [dim for dim in spec.shape if isinstance(dim, str) and dim not in bound]:
            listed, shape = ", ".join(free), as_text(bound_shape(spec, bound).shape)
            raise SourceError(
                f"{request.text}: input '{spec.name}' ({as_text(spec.shape)}) has no fixed size along {listed}",
                fix=f"give it: --input {spec.name}:{shape} with numbers for {listed}, or as it stands to keep them dynamic",
            )
    return bound, tuple(notes)


def bound_shape(spec: TensorSpec, bound: Binding) -> TensorSpec:
    """`spec` with its named axes replaced."""
    return replace(spec, shape=tuple(bound.get(dim, dim) if isinstance(dim, str) else dim for dim in spec.shape))


def as_text(shape: Sequence[int | str]) -> str:
    """A shape the way --input takes it."""
    return "x".join(map(str, shape))


def _bind_asked(spec: TensorSpec, asked: tuple[int | str, ...], text: str, bound: dict[str, int | str]) -> None:
    given = f"--input {spec.name}:{as_text(asked)}"
    fixed = [(have, want) for have, want in zip(spec.shape, asked, strict=False) if isinstance(have, int)]
    if len(asked) != len(spec.shape) or any(have != want for have, want in fixed):
        raise SourceError(
            f"{given} does not fit {text}, whose input is {as_text(spec.shape)}",
            fix="give its fixed sizes as they are, or export the model again at the size you want",
        )
    for have, want in zip(spec.shape, asked, strict=True):
        if isinstance(have, str) and bound.setdefault(have, want) != want:
            raise SourceError(
                f"{given}: axis '{have}' cannot be both {bound[have]} and {want}", fix="give the same size for an axis of the same name"
            )
