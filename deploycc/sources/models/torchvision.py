"""torchvision's classification and segmentation models, with their DEFAULT weights, the user's, or random ones.

The checkpoint is looked for in torch hub's cache, else downloaded there, and read with `weights_only=True`. The declared
transform is the one that torchvision keeps with the weights, also when the weights themselves are random.
"""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlparse

from deploycc.core.artifact import Artifact, Form, TensorSpec
from deploycc.core.contract import ModelRequest
from deploycc.core.registry import suggest
from deploycc.errors import MissingDependency, SourceError
from deploycc.runtime.transform import Transform
from deploycc.sources.models._capture import capture, image_input, override_shapes
from deploycc.sources.models._preset import from_preset
from deploycc.sources.models._weights import State, load_state, read_state, seeded

if TYPE_CHECKING:
    import torch

PREFIX = "torchvision:"
INPUT = "input"
RANDOM_NOTICE = "random weights: accuracy not valid"
DOWNLOAD_TIMEOUT_SECONDS = 10.0
# What torchvision itself sets when it builds these for their trained weights.
TRAINED_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "init_weights": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
}
# Heads that only training uses: their weights are in the checkpoint, but no answer goes through them.
TRAINING_HEADS = ("aux1", "aux2", "AuxLogits", "aux_classifier")
# The trained DenseNets are from before module names could not hold dots: "norm.1.weight" is now "norm1.weight".
DENSENET_KEY = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")


class TorchvisionModel:
    """A model of torchvision by its name."""

    name: ClassVar[str] = "torchvision"
    syntax: ClassVar[str] = "torchvision:NAME"
    gives: ClassVar = Form.MODULE

    def matches(self, text: str) -> bool:
        """`torchvision:…`."""
        return text.startswith(PREFIX)

    def load(self, request: ModelRequest) -> Artifact:
        """Build, load weights, declare the transform. Raises SourceError."""
        if request.weights and request.random_weights:
            raise SourceError("--weights and --random-weights were both given", fix="leave one of them out")
        models = _torchvision_models()
        name = request.text.removeprefix(PREFIX)
        _check_name(models, name)
        weights = models.get_model_weights(name).DEFAULT
        classes: tuple[str, ...] | None = tuple(map(str, weights.meta["categories"]))
        module = _build(models, name, weights, len(classes), request.seed)
        notes: list[str] = []
        if not request.random_weights:
            state, origin = _state(weights, request)
            heads = _foreign_head(module, state, len(classes))
            if heads is not None:
                notes.append(f"{origin} has {heads} outputs, not {len(classes)}: their names are not known")
                module, classes = _build(models, name, weights, heads, request.seed), None
            load_state(module, state, origin)
        for head in TRAINING_HEADS:
            if hasattr(module, head):
                setattr(module, head, None)
        preset = weights.transforms()
        if not hasattr(preset, "crop_size"):
            notes.append("images are resized to a square; torchvision's preset for segmentation resizes the shorter side alone")
        transform = _asked_size(from_preset(preset, classes), request, notes)
        shape = image_input(transform, transform.size) if transform.size else ()
        inputs = override_shapes([TensorSpec(INPUT, "float32", shape)], request.inputs)
        notices = (RANDOM_NOTICE,) if request.random_weights else ()
        return capture(module, inputs, source=request.text, transform=transform, notices=notices, notes=tuple(notes))


def _torchvision_models() -> Any:
    try:
        import torchvision.models
    except ImportError as error:
        raise MissingDependency(f"torchvision is not installed ({error})", fix="pip install torchvision") from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        raise SourceError(
            f"torchvision does not fit the installed PyTorch ({error})",
            fix="torchvision's wheel needs PyTorch's full build from the package registry, not a CPU-only one: "
            "pip install --force-reinstall torch torchvision, from the same index",
        ) from error
    return torchvision.models


def _check_name(models: Any, name: str) -> None:
    known = [item for item in models.list_models() if _task(models, item) in ("classification", "segmentation")]
    if name in known:
        return
    if name in models.list_models():
        raise SourceError(
            f"{PREFIX}{name} is for {_task(models, name)}; only classification and segmentation models are taken by name",
            fix="write a factory that returns it with an example input, and give it as file.py:factory",
        )
    raise SourceError(
        f"torchvision has no model '{name}'",
        fix=suggest(name.lower(), known, listing="`python -c 'import torchvision.models as m; print(m.list_models())'`"),
    )


def _task(models: Any, name: str) -> str:
    """What a model is for, by where it is defined: torchvision.models.resnet → "classification", …models.video.mvit → "video"."""
    parts = models.get_model_builder(name).__module__.split(".")
    return parts[2].replace("_", " ") if len(parts) > 3 else "classification"


def _state(weights: Any, request: ModelRequest) -> tuple[State, str]:
    """The weights to load, and what to call them in a message."""
    if request.weights:
        return _current_keys(read_state(request.weights)), str(request.weights)
    path = _checkpoint(weights, request.text)
    try:
        return _current_keys(read_state(path)), path.name
    except SourceError as error:
        raise SourceError(f"the cached checkpoint cannot be used: {error.what}", fix=f"delete {path}, or {_ways_out()}") from error


def _current_keys(state: State) -> State:
    return {DENSENET_KEY.sub(r"\1\2.", key): value for key, value in state.items()}


def _ways_out() -> str:
    return "give --weights FILE (.safetensors, .pt or .pth), or --random-weights to try size and speed alone"


def _checkpoint(weights: Any, text: str) -> Path:
    """The checkpoint in torch hub's cache; downloads it when it is not there."""
    import torch

    url = str(weights.url)
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if path.is_file():
        return path
    match = re.search(r"-([a-f0-9]{8,})\.", path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _impatient():
            torch.hub.download_url_to_file(url, str(path), match.group(1) if match else None, progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:  # no network, no such file, a full disk; or a checksum that does not fit
        raise SourceError(
            f"the weights of {text} ({path.name}) are not in {path.parent} and cannot be downloaded: {error}", fix=_ways_out()
        ) from error
    return path


@contextmanager
def _impatient() -> Iterator[None]:
    """A connection that does not answer fails soon."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _build(models: Any, name: str, weights: Any, classes: int, seed: int) -> torch.nn.Module:
    """The architecture as torchvision builds it for `weights`, with random ones."""
    arguments: dict[str, Any] = dict(TRAINED_ARGUMENTS.get(name, {}))
    if _task(models, name) == "segmentation":
        arguments.update(weights_backbone=None, **({} if name.startswith("lraspp") else {"aux_loss": True}))
    if name.startswith("vit_"):
        arguments["image_size"] = weights.meta["min_size"][0]
    with seeded(seed):
        return models.get_model(name, weights=None, num_classes=classes, **arguments)


def _foreign_head(module: torch.nn.Module, state: State, classes: int) -> int | None:
    """How many outputs `state` was trained for, when its last layers alone differ from the module's; else None."""
    sizes = {
        int(state[key].shape[0])
        for key, value in module.state_dict().items()
        if key in state and state[key].shape != value.shape and value.shape[:1] == (classes,) and state[key].shape[1:] == value.shape[1:]
    }
    return sizes.pop() if len(sizes) == 1 else None


def _asked_size(transform: Transform, request: ModelRequest, notes: list[str]) -> Transform:
    """The transform for the height and width that --input asks for; the share of the picture in the crop stays."""
    size = request.inputs.get(INPUT, ())[2:]
    if len(size) != 2 or not all(isinstance(dim, int) for dim in size) or size == transform.size:
        return transform
    height, width = int(size[0]), int(size[1])
    notes.append(f"images become {height}×{width}, as --input asks; the weights were trained for {transform.size}")
    if transform.crop is None or not isinstance(transform.resize, int):
        return replace(transform, resize=(height, width))
    return replace(transform, resize=round(transform.resize * max(height, width) / transform.crop[0]), crop=(height, width))
