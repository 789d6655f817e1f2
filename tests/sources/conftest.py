import pytest

from deploycc.core.artifact import Artifact
from deploycc.core.contract import ModelRequest
from deploycc.core.registry import MODELS


@pytest.fixture
def load():
    """`load("onnx", text, inputs={…})`: what the source called so captures."""

    def run(source: str, text: object, **options: object) -> Artifact:
        plugin = MODELS.get(source)
        assert plugin.matches(str(text))
        return plugin.load(ModelRequest(str(text), **options))

    return run
