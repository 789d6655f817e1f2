"""Which tensors of a graph share their channels' factors."""

import numpy as np
import pytest
from graphs import graph, onnx_artifact

from deploycc.forms._macs import infer_shapes
from deploycc.passes._channel_groups import Group, groups
from deploycc.passes._tidy import complete_names

RNG = np.random.default_rng(0)


def some(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


CONVS = {"w1": some(4, 3, 1, 1), "b1": some(4), "w2": some(5, 4, 1, 1)}


def found(body: str, **weights: np.ndarray) -> list[Group]:
    model = infer_shapes(onnx_artifact(graph(body, opset=20, **weights)).model)
    complete_names(model)
    return groups(model.graph)


def told(group: Group) -> tuple[set[str], list[str], list[str]]:
    writers = [part.value.name or "" for writer in group.writers for part in writer.parts]
    return set(group.tensors), writers, [reader.weight.value.name or "" for reader in group.readers]


def between(middle: str, **more: np.ndarray) -> list[Group]:
    """Groups of two convolutions with something between."""
    return found(f"(float[N,3,6,6] x) => (float[N,5,H,W] y) {{ a = Conv(x, w1, b1) {middle} y = Conv(b, w2) }}", **CONVS, **more)


@pytest.mark.parametrize(
    "middle",
    [
        "b = Relu(a)",
        "b = LeakyRelu(a)",
        "b = MaxPool<kernel_shape=[2,2]>(a)",
        "b = AveragePool<kernel_shape=[2,2]>(a)",
        "b = Identity(a)",
        "b = PRelu(a, slope)",
        "b = Pad(a, pads)",
    ],
)
def test_what_commutes_with_a_factor_joins_two_convolutions(middle):
    more = {"slope": some(4, 1, 1), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64)}
    (group,) = between(middle, **{name: value for name, value in more.items() if name in middle})
    assert told(group) == ({"a", "b"}, ["w1", "b1"], ["w2"])
    assert group.channels == 4


@pytest.mark.parametrize(
    "middle",
    [
        "b = Clip(a, low, high)",
        "b = Sigmoid(a)",
        "b = Softmax(a)",
        "b = Transpose<perm=[0,1,3,2]>(a)",
        "b = Pad(a, pads)",
        "b = Pad(a, sides, fill)",
        'b = Pad<mode="reflect">(a, sides)',
        "b = Mul(a, a)",
        "b = Add(a, row)",
        "b = Add(a, scalar)",
        "b, m = Dropout(a) c = Exp(a)",
    ],
)
def test_anything_else_pins_what_it_touches(middle):
    more = {
        "low": np.float32(0),
        "high": np.float32(6),
        "pads": np.array([0, 1, 0, 0, 0, 0, 0, 0], np.int64),
        "sides": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
        "fill": np.float32(1),
        "row": some(6),
        "scalar": some(1),
    }
    assert between(middle, **{name: value for name, value in more.items() if name in middle}) == []


def test_inputs_and_outputs_are_pinned():
    assert found("(float[N,3,6,6] x) => (float[N,4,6,6] a, float[N,5,6,6] y) { a = Conv(x, w1, b1) y = Conv(a, w2) }", **CONVS) == []
    assert found("(float[N,4,6,6] x) => (float[N,5,6,6] y) { y = Conv(x, w2) }", w2=CONVS["w2"]) == []


def test_a_residual_stream_is_one_group():
    (group,) = [
        item
        for item in found(
            "(float[N,3,6,6] x) => (float[N,2] y) { a = Conv(x, w1, b1) h = Conv(a, w2) g = Relu(h) r = Conv(g, w3) s = Add(a, r)"
            " p = GlobalAveragePool(s) f = Flatten(p) y = Gemm<transB=1>(f, w4) }",
            **CONVS,
            w3=some(4, 5, 1, 1),
            w4=some(2, 4),
        )
        if "s" in item.tensors
    ]
    assert told(group) == ({"a", "r", "s", "p", "f"}, ["w1", "b1", "w3"], ["w2", "w4"])
    assert group.readers[1].weight.axis == 1


def test_a_gate_does_not_share_the_factor():
    (group,) = found(
        "(float[N,3,6,6] x) => (float[N,5,6,6] y) { a = Conv(x, w1, b1) u = GlobalAveragePool(x) v = Conv(u, w3) g = Sigmoid(v)"
        " b = Mul(g, a) y = Conv(b, w2) }",
        **CONVS,
        w3=some(4, 3, 1, 1),
    )
    assert told(group) == ({"a", "b"}, ["w1", "b1"], ["w2"])


def test_normalization_and_products_of_a_transformer():
    body = (
        "(float[N,T,8] x) => (float[N,T,5] y) { n = LayerNormalization(x, gain, shift) q = MatMul(n, w1) c = Add(q, b1) r = Relu(c)"
        " y = MatMul(r, w2) }"
    )
    weights = {"gain": some(8), "shift": some(8), "w1": some(8, 6), "b1": some(6), "w2": some(6, 5)}
    first, second = found(body, **weights)
    assert (told(first), first.written_by("LayerNormalization")) == (({"n"}, ["gain", "shift"], ["w1"]), True)
    assert (told(second), second.written_by("LayerNormalization")) == (({"q", "c", "r"}, ["w1", "b1"], ["w2"]), False)
    assert [reader.weight.axis for reader in (*first.readers, *second.readers)] == [0, 0]
    assert not any(group.written_by("LayerNormalization") for group in found(body.replace("(x, gain", "<axis=1>(x, gain"), **weights))


@pytest.mark.parametrize("attributes", ["alpha=2.0", "transA=1"])
def test_a_product_that_is_more_than_one_is_no_reader(attributes):
    body = f"(float[4,4] x) => (float[4,2] y) {{ a = Gemm(x, w1) y = Gemm<{attributes}>(a, w2) }}"
    assert found(body, w1=some(4, 4), w2=some(4, 2)) == []
    assert len(found(body.replace(f"<{attributes}>", ""), w1=some(4, 4), w2=some(4, 2))) == 1


def test_shared_weights_are_left_alone():
    body = "(float[N,4,6,6] x) => (float[N,4,6,6] y) { a = Conv(x, w) b = Relu(a) y = Conv(b, w) }"
    assert found(body, w=some(4, 4, 1, 1)) == []


def test_what_a_branch_reads_is_pinned():
    body = (
        "(bool c, float[1,3,6,6] x) => (float[1,5,6,6] y, float[1,4,6,6] z) { a = Conv(x, w1, b1) r = Relu(a) y = Conv(r, w2)"
        " z = If(c) <then_branch = t () => (float[1,4,6,6] u) { u = Neg(r) }, else_branch = e () => (float[1,4,6,6] v) { v = Abs(r) }> }"
    )
    assert found(body, **CONVS) == []


def test_constants_are_read_as_they_are():
    assert found("(float[1,5,6,6] x) => (float[1,5,6,6] y) { a = Conv(k, w1, b1) r = Relu(k2) s = Add(a, r) t = Conv(s, w2) y = Add(x, t) }",
                 **CONVS, k=some(1, 3, 6, 6), k2=some(1, 4, 6, 6)) == []  # fmt: skip


def test_pooling_over_the_columns_of_a_product_mixes_its_channels():
    body = "(float[N,3,8] x) => (float[N,3,2] y) { a = MatMul(x, w1) p = MaxPool<kernel_shape=[2], strides=[2]>(a) y = MatMul(p, w2) }"
    assert found(body, w1=some(8, 8), w2=some(4, 2)) == []
    same = body.replace("<kernel_shape=[2], strides=[2]>", "<kernel_shape=[1]>")
    assert found(same, w1=some(8, 4), w2=some(4, 2)) == []
    assert len(found(same.replace("MaxPool<kernel_shape=[1]>", "Relu"), w1=some(8, 4), w2=some(4, 2))) == 1


def test_a_constant_operator_is_no_weight_to_change():
    body = (
        "(float[N,2] x) => (float[N,2] y) { w = Constant<value = float[2,2] {1.0, 2.0, 3.0, 4.0}>() a = MatMul(x, w) r = Relu(a)"
        " y = MatMul(r, w2) }"
    )
    assert found(body, w2=some(2, 2)) == []
