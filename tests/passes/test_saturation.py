import math

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploycc.errors import UnsupportedError
from deploycc.forms import onnx as form
from deploycc.passes._held_pairs import held_codes, hold_pairs
from deploycc.passes._madd import convolution, excess, kernel_matrix, madd, may_saturate, product
from deploycc.passes._saturation import _run, predict, worth_it

# --- a scalar model, written from Intel's description of the instruction


def scalar_pair(a0, b0, a1=0, b1=0):
    total = int(a0) * int(b0) + int(a1) * int(b1)
    if total > 32767:
        return 32767
    return -32768 if total < -32768 else total


def scalar_dot(a, b):
    total = 0
    for k in range(0, len(a) - 1, 2):
        total += scalar_pair(a[k], b[k], a[k + 1], b[k + 1])
    return total + (scalar_pair(a[-1], b[-1]) if len(a) % 2 else 0)


def scalar_convolution(x, w, strides, pads, dilations, group, zero):
    """NCHW, tap by tap with the channels innermost; a pair may lie across two taps."""
    count, _, height, width = x.shape
    filters, each, rows, columns = w.shape
    top, left, bottom, right = pads
    out_h = (height + top + bottom - (rows - 1) * dilations[0] - 1) // strides[0] + 1
    out_w = (width + left + right - (columns - 1) * dilations[1] - 1) // strides[1] + 1
    y = np.zeros((count, filters, out_h, out_w), np.int64)
    for n, o, i, j in np.ndindex(*y.shape):
        first = o // (filters // group) * each
        a, b = [], []
        for p in range(rows):
            for q in range(columns):
                r, s = i * strides[0] + p * dilations[0] - top, j * strides[1] + q * dilations[1] - left
                for c in range(each):
                    inside = 0 <= r < height and 0 <= s < width
                    a.append(int(x[n, first + c, r, s]) if inside else zero)
                    b.append(int(w[o, c, p, q]))
        widened = each == 1 and filters == group
        dot = sum(u * v for u, v in zip(a, b, strict=True)) if widened else scalar_dot(a, b)
        y[n, o, i, j] = dot - zero * sum(b)
    return y


def codes(rng, *shape, least=0):
    return rng.integers(least, 256, shape).astype(np.uint8)


def weights(rng, *shape, most=128):
    return rng.integers(-most, min(most, 127) + 1, shape).astype(np.int8)


@pytest.mark.parametrize(
    ("a", "b", "pairs"),
    [
        ([255, 255], [127, 127], [32767]),  # 64770
        ([255, 255], [-128, -128], [-32768]),  # −65280
        ([255, 255], [64, 64], [32640]),  # just fits
        ([255, 255], [65, 64], [32767]),  # 32895
        ([255, 255], [-64, -64], [-32640]),
        ([255, 255], [127, -128], [-255]),  # opposite signs cannot
        ([255, 255, 255], [127, 127, 127], [32767, 32385]),  # the last tap alone
        ([255], [-128], [-32640]),
    ],
)
def test_madd_on_its_edges(a, b, pairs):
    found = madd(np.array(a, np.uint8), np.array(b, np.int8))
    assert found.dtype == np.int16
    assert found.tolist() == pairs


@pytest.mark.parametrize("k", [1, 2, 7, 16, 33])
def test_madd_and_product_are_the_scalar_model_bit_by_bit(k):
    rng = np.random.default_rng(k)
    a, b = codes(rng, 5, k, least=100), weights(rng, k, 6)
    pairs = madd(a[:, None, :], b.T[None])
    assert pairs.shape == (5, 6, (k + 1) // 2)
    for i, j in np.ndindex(5, 6):
        assert int(pairs[i, j].astype(np.int64).sum()) == scalar_dot(a[i], b[:, j])
        assert int(product(a, b)[i, j]) == scalar_dot(a[i], b[:, j])
    assert product(a, b).dtype == np.int32
    lost, count = excess(a, b)
    assert np.array_equal(lost, product(a, b) - a.astype(np.int64) @ b.astype(np.int64))
    exact = [[int(a[i, t]) * int(b[t, j]) + int(a[i, t + 1]) * int(b[t + 1, j]) for t in range(0, k - 1, 2)] for i, j in np.ndindex(5, 6)]
    assert count == sum(not -32768 <= pair <= 32767 for row in exact for pair in row)
    assert k < 7 or count > 0


def test_a_pair_can_saturate_only_over_128():
    b = np.array([[64, 65, -64, -65, 127, 63], [64, 64, -64, -64, -128, 63], [127, -128, 127, -128, 127, 127]], np.int8)
    assert may_saturate(b).tolist() == [[False, True, False, True, False, False], [False] * 6]
    rng = np.random.default_rng(0)
    assert not may_saturate(weights(rng, 40, 30, most=63)).any()
    safe = may_saturate(many := weights(rng, 2, 4000))
    worst = np.stack([madd(np.array([255 * (p > 0), 255 * (q > 0)], np.uint8), np.array([p, q], np.int8)) for p, q in many.T])
    assert safe[0][(worst == 32767)[:, 0]].all()


CONVOLUTIONS = [
    ((2, 3, 6, 5), (4, 3, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),  # 27 taps: odd, pairs across taps
    ((1, 4, 5, 5), (6, 4, 1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 1),
    ((1, 6, 7, 6), (4, 3, 3, 2), (2, 1), (0, 1, 2, 0), (2, 1), 2),
    ((1, 5, 6, 6), (5, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 5),  # depthwise: exact
    ((1, 2, 5, 5), (4, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2),  # two filters per channel: not
]


@pytest.mark.parametrize("zero", [0, 77])
@pytest.mark.parametrize(("x", "w", "strides", "pads", "dilations", "group"), CONVOLUTIONS)
def test_convolution_is_the_scalar_model(x, w, strides, pads, dilations, group, zero):
    rng = np.random.default_rng(3)
    x, w = codes(rng, *x, least=120), weights(rng, *w)
    found = convolution(x, w, strides=strides, pads=pads, dilations=dilations, group=group, zero_point=zero)
    assert found.dtype == np.int32
    assert np.array_equal(found, scalar_convolution(x, w, strides, pads, dilations, group, zero))
    depthwise = w.shape[1] == 1 and len(w) == group
    small = convolution(x, w // 4, strides=strides, pads=pads, dilations=dilations, group=group, zero_point=zero)
    assert depthwise or not np.array_equal(small, found // 4)  # it really saturates


def test_convolution_over_a_line():
    x, w = codes(np.random.default_rng(4), 1, 4, 9, least=120), weights(np.random.default_rng(5), 3, 4, 3)
    square = convolution(x[:, :, None], w[:, :, None], pads=(0, 1, 0, 1))
    assert np.array_equal(convolution(x, w, pads=(1, 1)), square[:, :, 0])


# --- graphs


def quantized(kind, w_float, most, *, shape, scale=1.0, zero=0, steps=None, out="y", **attributes):
    """x → Q → DQ → operator with int8 weights → y; the weights per output channel, |codes| ≤ most."""
    axis = 0 if kind == "Conv" or attributes.get("transB") else 1
    others = tuple(index for index in range(w_float.ndim) if index != axis)
    if steps is None:
        steps = np.abs(w_float).max(axis=others) / most
    steps = np.asarray(steps, np.float32)
    spread = steps.reshape([-1 if index == axis else 1 for index in range(w_float.ndim)])
    rounded = np.clip(np.rint(w_float / spread), -most, most).astype(np.int8)
    arrays = {"s": np.float32(scale), "z": np.uint8(zero), "w": rounded, "ws": steps, "wz": np.zeros(len(steps), np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], "q"),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"], "dq"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], "wdq", axis=axis),
        helper.make_node(kind, ["xd", "wd"], [out], "layer", **attributes),
    ]
    return graph(nodes, arrays, shape)


def graph(nodes, arrays, shape):
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()],
    )
    return ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10))


def emulated(model, x):
    outputs, _ = _run(model, [{"x": x}], saturate=True)
    return outputs[0]


def test_predict_by_hand():
    """One pair of 255·127·2 = 64770 that gives 32767, one that fits: −32003 of 64770 + 254."""
    w = np.array([[127.0], [127.0], [1.0], [0.0]])
    model = quantized("MatMul", w * 0.25, 127, shape=(1, 4), scale=0.5, steps=[0.25])
    x = np.array([[255, 255, 254, 0]], np.float32) * 0.5
    found = predict(model, [{"x": x}])
    assert found.layers == (("layer", 0.5),)
    assert found.sqnr_db == pytest.approx(20 * math.log10((64770 + 254) / (64770 - 32767)))
    assert emulated(model, x).tolist() == [(32767 + 254) * 0.5 * 0.25]


@pytest.mark.parametrize(
    ("kind", "w", "shape", "attributes"),
    [
        ("Conv", (6, 4, 3, 3), (2, 4, 6, 6), {"pads": [1, 0, 0, 1], "strides": [2, 1], "dilations": [1, 2]}),
        ("Conv", (6, 2, 3, 3), (1, 4, 6, 6), {"group": 2, "auto_pad": "SAME_UPPER"}),
        ("Gemm", (6, 9), (3, 9), {"transB": 1, "alpha": 0.5}),
        ("Gemm", (9, 6), (9, 3), {"transA": 1}),
        ("MatMul", (9, 6), (2, 3, 9), {}),
    ],
)
def test_predicted_outputs_are_those_of_the_integer_kernels(kind, w, shape, attributes):
    rng = np.random.default_rng(6)
    model = quantized(kind, rng.normal(size=w), 127, shape=shape, scale=0.02, zero=9, **attributes)
    x = rng.uniform(1.0, 5.0, shape).astype(np.float32)
    q = (np.clip(np.rint(x / np.float32(0.02)) + 9, 0, 255)).astype(np.uint8)
    b, steps = (model.graph.initializers[name].const_value.numpy() for name in ("w", "ws"))
    if kind == "Conv":
        sides = attributes.get("pads", [1, 1, 1, 1])  # what SAME_UPPER comes to here
        options = {key: value for key, value in attributes.items() if key in ("strides", "dilations", "group")}
        wanted = convolution(q, b, pads=sides, zero_point=9, **options) * steps.reshape(-1, 1, 1)
    else:
        left, right = (q.T if "transA" in attributes else q.reshape(-1, q.shape[-1])), (b.T if "transB" in attributes else b)
        wanted = (product(left, right) - 9 * right.sum(axis=0, dtype=np.int32)) * steps * attributes.get("alpha", 1.0)
    assert np.allclose(emulated(model, x), wanted.reshape(-1) * 0.02, rtol=1e-4, atol=1e-3)
    found = predict(model, [{"x": x}])
    assert found.layers[0][1] > 0
    assert 0 < found.sqnr_db < 60


def test_what_cannot_saturate_is_left_as_it_is():
    rng = np.random.default_rng(7)
    x = [{"x": np.full((1, 8), 255, np.float32)}]
    assert predict(quantized("MatMul", rng.normal(size=(8, 3)), 63, shape=(1, 8)), x).sqnr_db == math.inf
    image = [{"x": np.full((1, 8, 5, 5), 255, np.float32)}]
    depthwise = predict(quantized("Conv", np.ones((8, 1, 3, 3)), 127, shape=(1, 8, 5, 5), group=8), image)
    assert (depthwise.layers, depthwise.sqnr_db) == ((("layer", 0.0),), math.inf)
    floating = graph([helper.make_node("MatMul", ["x", "w"], ["y"], "layer")], {"w": np.ones((8, 3), np.float32)}, (1, 8))
    assert predict(floating, x).layers == ()
    signed = quantized("MatMul", np.ones((8, 3)), 127, shape=(1, 8))
    signed.graph.initializers["z"].const_value = ir.tensor(np.int8(0))
    assert predict(signed, [{"x": np.full((1, 8), 127, np.float32)}]).layers == ()


def test_an_operator_that_torch_lacks_is_named():
    model = graph([helper.make_node("Det", ["x"], ["y"], "d")], {}, (2, 2))
    with pytest.raises(UnsupportedError, match="Det"):
        predict(model, [{"x": np.eye(2, dtype=np.float32)}])


def both(w, x):
    """Eight bits and seven of the same weights, with the float outputs."""
    full, reduced = (quantized("MatMul", w, most, shape=x.shape, scale=1.0) for most in (127, 63))
    return full, reduced, [{"y": (x @ w).astype(np.float32)}], [{"x": x}]


def test_full_range_wins_where_little_saturates():
    rng = np.random.default_rng(8)
    choice, facts, note = worth_it(*both(rng.normal(size=(64, 32)), rng.integers(0, 60, (16, 64)).astype(np.float32)))
    assert choice == "full"
    assert facts["full_db"] == facts["full_unsaturated_db"] > facts["reduced_db"] + 3  # one bit: 6 dB
    assert facts["saturated"] == {"layer": 0.0}
    assert f"{facts['full_db']:.1f} dB" in note
    assert f"{facts['reduced_db']:.1f} dB" in note
    assert "no pair" in note
    assert note.endswith("full range is taken")


def test_seven_bits_win_where_much_saturates():
    rng = np.random.default_rng(9)
    choice, facts, note = worth_it(*both(rng.uniform(0.5, 1.0, (64, 32)), rng.integers(200, 256, (16, 64)).astype(np.float32)))
    assert choice == "reduced"
    assert facts["full_db"] < 15 < facts["reduced_db"] < facts["full_unsaturated_db"]
    assert facts["saturated"]["layer"] > 0.5
    assert "'layer'" in note
    assert note.endswith("held ones are taken")


def test_equal_losses_take_seven_bits():
    """A power of two is exact in both."""
    full, reduced = (quantized("MatMul", np.full((8, 2), 32.0), 63, shape=(1, 8), steps=[1.0, 1.0]) for _ in range(2))
    x = np.ones((1, 8), np.float32)
    choice, facts, _ = worth_it(full, reduced, [{"y": np.full((1, 2), 256, np.float32)}], [{"x": x}])
    assert facts["full_db"] == facts["reduced_db"] == math.inf
    assert choice == "reduced"


def test_the_models_are_not_changed():
    model = quantized("MatMul", np.ones((8, 3)), 127, shape=(1, 8))
    before = form.OnnxForm().digest(model)
    predict(model, [{"x": np.full((1, 8), 255, np.float32)}])
    assert form.OnnxForm().digest(model) == before


# --- pairs held


@pytest.mark.parametrize(
    ("pair", "held"),
    [
        ([100.2, 20.4], [100, 20]),
        ([100.0, 28.4], [100, 28]),  # 128 just fits
        ([100.0, 40.0], [94, 34]),  # 12 over: half from each
        ([-127.0, -127.0], [-64, -64]),
        ([126.0, 4.0], [125, 3]),
        ([140.0, -140.0], [127, -127]),  # opposite signs may be large
    ],
)
def test_a_pair_is_held_to_128(pair, held):
    codes = held_codes(np.array([*pair, 127.0])[:, None])
    assert codes[:, 0].tolist() == [*held, 127]  # a last tap alone is free


@pytest.mark.parametrize(
    ("shape", "axis", "group"), [((6, 3, 3, 3), 0, 1), ((8, 4, 1, 1), 0, 2), ((5, 7, 3), 0, 1), ((9, 6), 1, 1), ((6, 9), 0, 1)]
)
def test_held_weights_cannot_saturate_and_are_nearer_than_seven_bits(shape, axis, group):
    w = np.random.default_rng(10).normal(size=shape)
    others = tuple(index for index in range(w.ndim) if index != axis)
    peak = np.abs(w).max(axis=others)
    scales, codes = hold_pairs(w, peak / 127, axis=axis, group=group)
    spread = [-1 if index == axis else 1 for index in range(w.ndim)]
    kernels = kernel_matrix(codes, group) if w.ndim > 2 else [codes if axis == 1 else codes.T]
    assert not any(may_saturate(kernel.astype(np.int8)).any() for kernel in kernels)
    assert np.abs(codes).max() > 63
    assert (scales >= np.float32(peak / 127)).all()
    seven = (peak / 63).reshape(spread)
    error = np.square(np.rint(w / seven) * seven - w).sum(axis=others)
    mine = np.square(codes * scales.reshape(spread) - w).sum(axis=others)
    assert (mine <= error + 1e-9).all()
    assert mine.sum() < 0.7 * error.sum()


def test_depthwise_weights_keep_all_their_bits():
    w = np.random.default_rng(11).normal(size=(6, 1, 3, 3))
    scales = np.abs(w).max(axis=(1, 2, 3)) / 127
    found, codes = hold_pairs(w, scales, axis=0, group=6)
    assert np.array_equal(found, scales.astype(np.float32))
    assert np.array_equal(codes, np.rint(w / found.reshape(-1, 1, 1, 1)))
