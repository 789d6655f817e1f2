import numpy as np
import pytest
from graphs import graph, kinds, onnx_artifact, outputs

from deploycc.passes._linear import write_products

RNG = np.random.default_rng(0)
W = RNG.normal(size=(4, 6)).astype(np.float32)
B = RNG.normal(size=6).astype(np.float32)


def written(body, *, skip=(), **weights):
    """The model before and after."""
    before, after = (onnx_artifact(graph(body, **weights)) for _ in range(2))
    for index, node in enumerate(after.model.graph):
        node.name = f"n{index}"
    write_products(after.model.graph, skip)
    return before, after


def bias_shape(artifact):
    add = next(node for node in artifact.model.graph if node.op_type == "Add")
    return next(tuple(value.const_value.numpy().shape) for value in add.inputs if value.const_value is not None)


def same(before, after):
    assert after.signature == before.signature
    np.testing.assert_allclose(outputs(after)["y"], outputs(before)["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("add", ["Add(c, b)", "Add(b, c)"])
@pytest.mark.parametrize("shape", [(6,), (1, 6)])
def test_two_axes_become_a_gemm_under_the_products_name(add, shape):
    before, after = written(f"(float[2,4] x) => (float[2,6] y) {{ c = MatMul(x, w) y = {add} }}", w=W, b=B.reshape(shape))
    assert kinds(after) == ["Gemm"]
    node = after.model.graph[0]
    assert node.name == "n0"
    assert node.inputs[2].const_value.numpy().shape == (6,)
    same(before, after)


def test_a_gemm_in_the_middle_hands_its_result_on():
    before, after = written("(float[2,4] x) => (float[2,6] y) { c = MatMul(x, w) d = Add(c, b) y = Relu(d) }", w=W, b=B)
    assert kinds(after) == ["Gemm", "Relu"]
    same(before, after)


def test_more_axes_keep_the_product_and_give_the_bias_as_many():
    before, after = written("(float[2,3,4] x) => (float[2,3,6] y) { c = MatMul(x, w) y = Add(c, b) }", w=W, b=B)
    assert kinds(after) == ["MatMul", "Add"]
    assert bias_shape(after) == (1, 1, 6)
    same(before, after)


def test_a_shared_bias_is_reshaped_once():
    before, after = written(
        "(float[2,3,4] x) => (float[2,3,6] y) { c = MatMul(x, w) d = Add(c, b) e = MatMul(x, v) f = Add(b, e) y = Mul(d, f) }",
        w=W, v=W[::-1].copy(), b=B,
    )  # fmt: skip
    names = {value.name for node in after.model.graph if node.op_type == "Add" for value in node.inputs if value.const_value is not None}
    assert names == {"b_3_axes"}
    same(before, after)


@pytest.mark.parametrize(
    ("body", "weights", "skip"),
    [
        ("(float[2,4] x) => (float[2,6] y) { c = MatMul(x, w) y = Add(c, b) }", {}, ("n0",)),
        ("(float[2,4] x) => (float[2,6] y) { c = MatMul(x, w) y = Add(c, b) }", {}, ("n1",)),
        ("(float[2,4] x) => (float[2,6] y) { c = MatMul(x, w) y = Add(c, c) }", {}, ()),
        ("(float[2,4] x) => (float[2,6] y) { c = MatMul(x, w) d = Add(c, b) y = Mul(c, d) }", {}, ()),
        ("(float[2,4] x) => (float[2,6] y, float[2,6] c) { c = MatMul(x, w) y = Add(c, b) }", {}, ()),
        ("(float[2,4] x) => (float[2,6] y) { c = MatMul(x, w) y = Sub(c, b) }", {}, ()),
        ("(float[2,4] x) => (float[2,6] y) { c = MatMul(x, w) y = Add(c, b) }", {"b": np.ones((2, 6), np.float32)}, ()),
        ("(float[2,4] x) => (float[2,6] y) { c = MatMul(x, w) y = Add(c, b) }", {"b": np.ones(1, np.float32)}, ()),
        ("(float[2,4] x, float[4,6] v) => (float[2,6] y) { c = MatMul(x, v) y = Add(c, b) }", {}, ()),
        ("(float[1,2,4] x) => (float[1,2,6] y) { c = MatMul(x, w) y = Add(c, b) }", {"w": W[None]}, ()),
    ],
    ids=["skip-product", "skip-add", "no-bias", "read-twice", "output", "subtracted", "full-bias", "one-number", "computed-weight", "batched-weight"],
)  # fmt: skip
def test_everything_else_stays_as_it_is(body, weights, skip):
    before, after = written(body, skip=skip, **{"w": W, "b": B, **weights})
    assert kinds(after) == kinds(before)
    assert [[v.name for v in node.inputs] for node in after.model.graph] == [[v.name for v in node.inputs] for node in before.model.graph]
