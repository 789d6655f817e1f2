"""What a model takes and gives: names, dtypes, shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from deploycc.errors import SignatureError

Feeds = Mapping[str, np.ndarray]
Outputs = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output. `shape` holds ints for fixed and names for dynamic axes; `dtype` is numpy's name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of `shape` fits (a named axis takes any size)."""
        return len(shape) == len(self.shape) and all(
            isinstance(want, str) or want == got for want, got in zip(self.shape, shape, strict=True)
        )

    def accepts_sample(self, shape: tuple[int, ...]) -> bool:
        """Whether one sample of `shape`, without the batch axis (the first one), fits."""
        return bool(self.shape) and replace(self, shape=self.shape[1:]).accepts(shape)


@dataclass(frozen=True, slots=True)
class Signature:
    """Names, dtypes and shapes of what the model takes and gives, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def check(self, feeds: Feeds) -> None:
        """Raise SignatureError, naming the input and both values, unless `feeds` fit the inputs."""
        names = [spec.name for spec in self.inputs]
        if sorted(feeds) != sorted(names):
            raise SignatureError(
                f"the model's inputs are {', '.join(names)}; got {', '.join(feeds) or 'none'}", fix=f"feed arrays named {', '.join(names)}"
            )
        for spec in self.inputs:
            array = feeds[spec.name]
            if str(array.dtype) != spec.dtype:
                raise SignatureError(
                    f"input '{spec.name}' is {spec.dtype}, but got {array.dtype}", fix=f"convert it with .astype('{spec.dtype}')"
                )
            if not spec.accepts(array.shape):
                raise SignatureError(
                    f"input '{spec.name}' has shape {list(spec.shape)}, but got {list(array.shape)}",
                    fix="resize or batch the data to that shape, or capture the model with --input "
                    f"{spec.name}:{'x'.join(map(str, array.shape))}",
                )

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists; inverse of `from_json`."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Signature:
        """Read what `to_json` wrote."""

        def specs(key: str) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(item["name"], item["dtype"], tuple(item["shape"])) for item in value[key])

        return cls(specs("inputs"), specs("outputs"))


class FeedsCheck:
    """`Signature.check`, once per kind of feeds: a full one costs 4 µs, as much as a tiny model."""

    def __init__(self, signature: Signature) -> None:
        self._signature = signature
        self._seen: list[object] = []

    def __call__(self, feeds: Feeds) -> None:
        """Raises SignatureError, also after feeds that fit."""
        seen: list[object] = [(name, array.dtype, array.shape) for name, array in feeds.items()]
        if seen != self._seen:
            self._signature.check(feeds)
            self._seen = seen
