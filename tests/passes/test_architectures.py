"""The float passes over torchvision architectures with random weights: structure and numbers, never accuracy."""

import pytest
import torch
import torchvision
from graphs import context, digest, module_artifact, outputs
from torch import nn

from deploycc.core.artifact import Artifact
from deploycc.core.compare import drift
from deploycc.core.registry import PASSES
from deploycc.errors import NothingToDo
from deploycc.runtime.signature import TensorSpec
from deploycc.runtime.transform import Transform

IMAGENET = Transform(resize=256, crop=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
# architecture → batch normalizations that cannot be folded (they stand before their convolution)
LEFT = {
    "convnext_tiny": 0,
    "densenet121": 62,
    "efficientnet_b0": 0,
    "mobilenet_v3_small": 0,
    "resnet18": 0,
    "shufflenet_v2_x0_5": 0,
    "swin_t": 0,
    "vit_b_16": 0,
}


def stirred(name: str) -> nn.Module:
    """Random weights, statistics and heads (torchvision's ViT starts with a head of zeros)."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return model


def applied(name: str, artifact: Artifact, least: Artifact) -> Artifact:
    """The pass's result, or what it was given when there is nothing to do; the numbers stay those of `least`."""
    before = digest(artifact)
    try:
        result = PASSES.get(name)(artifact, context(artifact))
    except NothingToDo:
        return artifact
    assert digest(artifact) == before
    assert drift([outputs(least)], [outputs(result)]).relative < 1e-4
    return result


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, "N"])
@pytest.mark.parametrize("name", sorted(LEFT))
def test_an_architecture(name: str, batch: int | str):
    module = module_artifact(stirred(name), TensorSpec("image", "float32", (batch, 3, 224, 224)), transform=IMAGENET)
    graph = applied("fold-constants", applied("export-onnx", applied("fold-batchnorm", module, module), module), module)
    kinds = [node.op_type for node in graph.model.graph]
    assert kinds.count("BatchNormalization") == LEFT[name]
    assert graph.signature == module.signature
    bytes_in = PASSES.get("fold-normalize")(graph, context(graph))
    assert bytes_in.signature.inputs[0].shape == (batch, 224, 224, 3)
