from dataclasses import replace

import numpy as np
import pytest
from graphs import context, digest, graph, kinds, onnx_artifact, outputs

from deploycc.core.artifact import Artifact
from deploycc.core.compare import drift
from deploycc.errors import NothingToDo, PreconditionError
from deploycc.passes.fold_normalize import FoldNormalize
from deploycc.runtime.signature import TensorSpec
from deploycc.runtime.transform import Transform

FOLD = FoldNormalize()
IMAGENET = Transform(resize=(8, 8), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
CONV = "(float[N,3,8,8] image) => (float[N,4,H,W] y) { y = Conv<ATTRIBUTES>(image, w) }"


def conv(attributes: str, **fields) -> Artifact:
    weight = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32)
    return onnx_artifact(graph(CONV.replace("ATTRIBUTES", attributes).replace("<>", ""), w=weight), transform=IMAGENET, **fields)


def folded(artifact: Artifact) -> Artifact:
    """The pass's result, checked on a picture that goes through each one's own transform."""
    assert artifact.transform is not None
    before = digest(artifact)
    result = FOLD(artifact, context(artifact))
    assert result.transform is not None
    assert digest(artifact) == before
    name = artifact.signature.inputs[0].name
    want = outputs(artifact, {name: artifact.transform.apply(PICTURE)[None]})
    got = outputs(result, {name: result.transform.apply(PICTURE)[None]})
    assert drift([want], [got]).relative < 1e-5
    return result


def test_the_input_becomes_the_pictures_bytes():
    result = folded(conv(""))
    assert result.signature.inputs == (TensorSpec("image", "uint8", ("N", 8, 8, 3)),)
    assert result.transform == replace(IMAGENET, dtype="uint8", layout="NHWC")
    assert result.notes[0].startswith("the input 'image' is uint8")


def test_all_of_it_goes_into_a_convolution_without_padding():
    assert kinds(folded(conv("strides=[2,2]"))) == ["Transpose", "Cast", "Conv"]


@pytest.mark.parametrize("attributes", ["pads=[1,1,1,1]", 'auto_pad="SAME_UPPER"'])
def test_the_shift_stays_before_a_padded_convolution(attributes: str):
    assert kinds(folded(conv(attributes))) == ["Transpose", "Cast", "Add", "Conv"]


@pytest.mark.parametrize(
    "body",
    [
        "(float[1,3,8,8] image) => (float[1,3,8,8] y) { y = Relu(image) }",
        "(float[1,3,8,8] image) => (float[1,3,6,6] y) { y = Conv<group=3>(image, g) }",
        "(float[1,3,8,8] image) => (float[1,3,6,6] y) { a = Conv<group=3>(image, g) b = Conv<group=3>(image, g) y = Mul(a, b) }",
    ],
)
def test_without_a_first_convolution_the_arithmetic_stays(body: str):
    weight = RNG.standard_normal((3, 1, 3, 3)).astype(np.float32)
    result = folded(onnx_artifact(graph(body, g=weight), transform=IMAGENET))
    assert kinds(result)[:4] == ["Transpose", "Cast", "Mul", "Add"]


def test_a_bias_takes_the_shift():
    body = "(float[1,3,8,8] image) => (float[1,4,6,6] y) { y = Conv(image, w, b) }"
    weights = {"w": RNG.standard_normal((4, 3, 3, 3)).astype(np.float32), "b": np.full(4, 7, np.float32)}
    assert kinds(folded(onnx_artifact(graph(body, **weights), transform=IMAGENET))) == ["Transpose", "Cast", "Conv"]


def test_a_model_that_takes_nhwc_is_not_transposed():
    transform = replace(IMAGENET, layout="NHWC")
    result = folded(onnx_artifact(graph("(float[1,8,8,3] image) => (float[1,8,8,3] y) { y = Relu(image) }"), transform=transform))
    assert kinds(result) == ["Cast", "Mul", "Add", "Relu"]


def test_grey_pictures():
    transform = Transform(resize=(8, 8), color="L", mean=(0.5,), std=(0.25,))
    result = folded(onnx_artifact(graph("(float[1,1,8,8] image) => (float[1,1,8,8] y) { y = Relu(image) }"), transform=transform))
    assert result.signature.inputs[0].shape == (1, 8, 8, 1)


def test_the_result_by_hand():
    # (x/255 − 0.5)/0.25 at x = 255 is 2, at x = 0 is −2
    transform = Transform(resize=(1, 2), color="L", mean=(0.5,), std=(0.25,))
    artifact = onnx_artifact(graph("(float[1,1,1,2] image) => (float[1,1,1,2] y) { y = Identity(image) }"), transform=transform)
    result = FOLD(artifact, context(artifact))
    given = np.array([255, 0], np.uint8).reshape(1, 1, 2, 1)
    np.testing.assert_allclose(outputs(result, {"image": given})["y"].ravel(), [2.0, -2.0], rtol=1e-6)


def test_nothing_to_do_for_bytes():
    transform = replace(IMAGENET, dtype="uint8", layout="NHWC")
    body = "(uint8[1,8,8,3] image) => (float[1,8,8,3] y) { y = Cast<to=1>(image) }"
    artifact = onnx_artifact(graph(body), transform=transform)
    with pytest.raises(NothingToDo, match="takes uint8 pictures already"):
        FOLD(artifact, context(artifact))


@pytest.mark.parametrize(
    ("body", "transform", "said"),
    [
        ("(float[1,3,8,8] x) => (float[1,3,8,8] y) { y = Relu(x) }", None, "none is declared"),
        ("(float[1,3] x) => (float[1,3] y) { y = Relu(x) }", IMAGENET, "needs one float32 picture"),
        ("(double[1,3,8,8] x) => (double[1,3,8,8] y) { y = Relu(x) }", IMAGENET, "needs one float32 picture"),
        ("(float[1,3,8,8] x, float[1] z) => (float[1,3,8,8] y) { y = Add(x, z) }", IMAGENET, "needs one float32 picture"),
        ("(float[1,1,8,8] x) => (float[1,1,8,8] y) { y = Relu(x) }", IMAGENET, "makes 3 channels"),
    ],
)
def test_what_it_cannot_take(body: str, transform: Transform | None, said: str):
    artifact = onnx_artifact(graph(body), transform=transform)
    with pytest.raises(PreconditionError, match=said):
        FOLD(artifact, context(artifact))
