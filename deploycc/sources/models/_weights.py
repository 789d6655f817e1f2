"""A file of weights into a module: pickle-free (.safetensors) or `torch.load(weights_only=True)`, and every key must fit."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycc.core.contract import ModelRequest
from deploycc.errors import SourceError

if TYPE_CHECKING:
    import torch

State = Mapping[str, "torch.Tensor"]

# What training scripts and Lightning wrap a state dict in.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net")
KINDS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
SHOWN = 3


def refuse_weight_options(request: ModelRequest, why: str) -> None:
    """Raise SourceError when --weights or --random-weights is given to a source that has its own weights."""
    for option, given in (("--weights", request.weights is not None), ("--random-weights", request.random_weights)):
        if given:
            raise SourceError(f"{option} cannot be used with {request.text}: {why}", fix=f"leave {option} out")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers start at `seed` inside, and go on outside as if nothing had been drawn."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def read_state(path: Path) -> State:
    """The state dict in a file, out of the usual wrappers. Raises SourceError."""
    if not path.is_file():
        raise SourceError(f"there is no weights file {path}", fix="correct the path after --weights")
    if path.suffix not in KINDS:
        raise SourceError(f"{path} is not a weights file by its name", fix=f"give a file that ends in {', '.join(KINDS)}")
    if path.stat().st_size == 0:
        raise SourceError(f"weights file {path} is empty", fix="download or save it again")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return _state_of(content, path)


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise SourceError(f"{path} is not a readable safetensors file: {error}", fix="download or save it again") from error


def _read_torch(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SourceError(
            f"{path} holds more than tensors, and loading it would run code from it: {_first_sentence(error)}",
            fix="save the weights alone: torch.save(model.state_dict(), 'weights.pt'), or as .safetensors",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise SourceError(f"{path} is damaged or not a PyTorch file: {_first_sentence(error)}", fix="download or save it again") from error


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0] if lines else type(error).__name__


def _state_of(content: Any, path: Path) -> State:
    import torch

    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise SourceError(
            f"{path} holds no state dict (name → tensor), but {_kind_of(content)}",
            fix="save the weights alone: torch.save(model.state_dict(), 'weights.pt')",
        )
    if all(str(key).startswith("module.") for key in content):  # DataParallel and DDP prefix every name
        return {str(key).removeprefix("module."): value for key, value in content.items()}
    return {str(key): value for key, value in content.items()}


def _kind_of(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a mapping with the keys {', '.join(map(str, list(content)[:SHOWN]))}" if content else "an empty mapping"
    return f"a {type(content).__name__}"


def load_state(module: torch.nn.Module, state: State, where: str) -> None:
    """Copy `state` into `module`. Raises SourceError that names the first missing, unexpected and mis-shaped keys."""
    own = {key: value for key, value in module.state_dict().items() if hasattr(value, "data_ptr")}
    present = {own[key].data_ptr() for key in state if key in own}
    missing = [key for key, value in own.items() if key not in state and not _needless(key, value, present)]
    unexpected = [key for key in state if key not in own]
    misshaped = [
        f"{key} is {list(state[key].shape)} in the file, {list(value.shape)} in the model"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = [_listed(kind, keys) for kind, keys in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped)) if keys]
    if problems:
        raise SourceError(
            f"{where} does not fit {type(module).__name__}: {'; '.join(problems)}",
            fix="give weights that were saved from this very architecture, or name the architecture they come from",
        )
    module.load_state_dict(dict(state), strict=False)


def _needless(key: str, value: torch.Tensor, present: set[int]) -> bool:
    """A counter that inference never reads, or a tensor tied to one that is there (safetensors stores those once)."""
    return key.endswith("num_batches_tracked") or (value.numel() > 0 and value.data_ptr() in present)


def _listed(kind: str, keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{kind}: {', '.join(keys[:SHOWN])}{more}"
