"""Placement by the measured time of each part: cuts, the shortest path, and what the pass does with it."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import helper, numpy_helper
from test_quantize_static import context, error, make, residual, tensor

from deploycc.backends.onnxruntime import OnnxRuntime
from deploycc.bench.observer import Timer
from deploycc.core.pipeline import Pipeline
from deploycc.core.target import Quant
from deploycc.core.timing import NodeTime
from deploycc.errors import PreconditionError
from deploycc.passes._islands import Segment, assign, mixes, segment_times, segments
from deploycc.passes.quantize_static import QuantizeStatic


def times(**milliseconds):
    return [NodeTime(name, "Conv", value) for name, value in milliseconds.items()]


def test_cuts_are_where_one_tensor_carries_everything_on():
    found = segments(residual().model.graph)
    # The shortcut keeps relu1's result alive until the Add.
    assert [part.nodes for part in found] == [("conv1",), ("relu1",), ("conv2", "add"), ("relu2",), ("pool",), ("flatten",), ("gemm",)]
    assert [part.elements for part in found][:3] == [512, 512, 512]


def test_the_time_of_what_the_runtime_added_goes_to_the_operator_before_it():
    parts = [Segment(("a.0",), 8), Segment(("a.0/act", "a.1"), 8)]
    nodes = [
        NodeTime("a.0_token_3", "QLinearConv", 1.0),
        NodeTime("Transpose", "Transpose", 0.25),
        NodeTime("a.0/act/Fusion", "QuickGelu", 2.0),
        NodeTime("a.1", "Conv", 4.0),
        NodeTime("ReorderOutput_7", "ReorderOutput", 0.5),
    ]
    assert segment_times(parts, nodes) == [1.25, 6.5]


def test_a_kernel_called_by_its_result_has_its_own_time():
    parts = segments(residual().model.graph)
    nodes = [NodeTime("conv1", "Conv", 1.0), NodeTime("pool", "Pool", 0.5), NodeTime("y", "FullyConnected", 2.0)]
    assert segment_times(parts, nodes) == [1.0, 0.0, 0.0, 0.0, 0.5, 0.0, 2.0]
    assert segment_times(parts, [NodeTime("y_original", "FullyConnected", 2.0)])[-1] == 2.0


def test_the_shortest_path_by_hand():
    parts = [Segment((name,), 1_000_000) for name in "abcd"]
    ints = [NodeTime("x_QuantizeLinear", "QuantizeLinear", 0.2)]  # of the input's 1,000,000 elements: 0.3 ms + 0.005 for a change
    # a and b are 0.5 and 0.1 ms faster in float; alone, b would not be worth two changes. d is not worth one.
    faster = assign(parts, {"float": times(a=1.0, b=1.0, c=2.0, d=1.0), "int8": [*ints, *times(a=1.3, b=1.1, c=1.0, d=1.2)]}, 1_000_000)
    assert faster.float_nodes == ("a", "b")
    assert faster.predicted == pytest.approx((5.0, 4.8, 1.0 + 1.0 + 0.305 + 1.0 + 1.2))
    dear = assign(parts, {"float": times(a=2.0, b=1.0, c=2.0, d=2.0), "int8": [*ints, *times(a=1.0, b=1.5, c=1.0, d=1.0)]}, 1_000_000)
    assert dear.float_nodes == ()


def test_dearer_changes_leave_fewer_of_them():
    parts = [Segment((name,), 0) for name in "abcd"]  # a change costs 0.005 ms
    found = mixes(parts, {"float": times(a=1.0, b=2.0, c=1.0, d=2.0), "int8": times(a=2.0, b=1.98, c=1.02, d=1.0)}, 1)
    assert [each.float_nodes for each in found] == [("a", "c"), ("a", "b", "c")]
    assert [each.predicted[2] for each in found] == pytest.approx([1.0 + 1.98 + 1.0 + 1.0 + 0.015, 1.0 + 2.0 + 1.0 + 1.0 + 0.015])


# --- in the pass


def watched(artifact, profile, latency):
    """A machine whose times are known: `profile` by artifact and node, `latency` of whole and mixed."""
    asked = []

    def profiler(artifacts):
        asked.append(sorted(artifacts))
        return {name: times(**profile[name]) for name in artifacts}

    def timer(artifacts, following):
        asked.append(sorted(artifacts))
        return latency

    return replace(context(artifact), profiler=profiler, timer=timer, following=Pipeline(())), asked


FLOAT = {"conv1": 1.0, "conv2": 1.0, "pool": 1.0, "gemm": 1.0}
INTEGER = {"conv1": 3.0, "conv2": 0.5, "pool": 0.5, "gemm": 0.5}


def test_what_is_faster_in_float_is_put_back():
    artifact = residual()
    ctx, asked = watched(artifact, {"float": FLOAT, "int8": INTEGER}, {"whole": 4.5, "mixed 1": 2.6})
    after = QuantizeStatic(islands="measured")(artifact, ctx)
    assert asked == [["float", "int8"], ["mixed 1", "whole"]]
    assert after.quant.left_float == (("conv1 (Conv)", "measured: faster in float"),)
    assert after.details["islands"]["float_nodes"] == ["conv1", "relu1"]
    assert after.details["islands"]["predicted_ms"]["in integers"] == pytest.approx(4.5)
    assert any("0.58 of the time was measured; kept so" in note for note in after.notes)
    assert error(artifact, after, ctx) < 0.1
    whole = QuantizeStatic()(artifact, context(artifact))
    assert len([node for node in after.model.graph if node.op_type == "QuantizeLinear"]) < len(
        [node for node in whole.model.graph if node.op_type == "QuantizeLinear"]
    )


@pytest.mark.parametrize(("second", "taken"), [(2.5, 2), (2.64, 1), (2.7, 1)])
def test_of_several_mixtures_the_fastest_or_about_as_fast_one_with_more_in_float(second, taken):
    artifact = residual()
    # By itself the change before gemm is worth it, at three times its price only the one behind relu1 is.
    profile = {"float": {**FLOAT, "gemm": 0.495}, "int8": {**INTEGER, "gemm": 0.505}}
    ctx, asked = watched(artifact, profile, {"whole": 4.5, "mixed 1": 2.6, "mixed 2": second})
    after = QuantizeStatic(islands="measured")(artifact, ctx)
    assert asked[1] == ["mixed 1", "mixed 2", "whole"]
    found = after.details["islands"]
    assert ("gemm" in found["float_nodes"]) is (taken == 1)
    assert any("of 2 mixtures" in note for note in after.notes)
    assert found["measured_ms"]["mixed 2"] == second


def test_a_mixture_no_slower_than_integers_is_nearer_to_float():
    artifact = residual()
    ctx, _ = watched(artifact, {"float": FLOAT, "int8": INTEGER}, {"whole": 2.0, "mixed 1": 2.01})
    after = QuantizeStatic(islands="measured")(artifact, ctx)
    assert after.details["islands"]["float_nodes"] == ["conv1", "relu1"]
    assert any(note.endswith("kept so") for note in after.notes)


def test_a_mixture_slower_than_integers_does_not_cost_the_one_that_is_faster():
    artifact = residual()
    profile = {"float": {**FLOAT, "gemm": 0.505}, "int8": {**INTEGER, "gemm": 0.495}}
    ctx, _ = watched(artifact, profile, {"whole": 2.0, "mixed 1": 1.99, "mixed 2": 2.03})  # the second one has gemm in float
    after = QuantizeStatic(islands="measured")(artifact, ctx)
    found = after.details["islands"]
    assert sorted(found["measured_ms"]) == ["mixed 1", "mixed 2", "whole"]
    assert found["float_nodes"] == ["conv1", "relu1"]
    assert any(note.endswith("kept so") for note in after.notes)


def test_with_a_handicap_integers_have_to_win_clearly():
    parts = [Segment((name,), 0) for name in "ab"]
    spent = {"float": times(a=1.0, b=1.0), "int8": times(a=0.95, b=0.5)}
    assert assign(parts, spent, 1).float_nodes == ()
    clear = assign(parts, spent, 1, handicap=1.1)
    assert clear.float_nodes == ("a",)
    assert clear.predicted[:2] == pytest.approx((2.0, 1.45))


@pytest.mark.parametrize(
    ("profile", "latency", "said"),
    [
        ({"float": FLOAT, "int8": INTEGER}, {"whole": 2.0, "mixed 1": 2.03}, "all kept in integers"),
        ({"float": FLOAT, "int8": {**INTEGER, "conv1": 0.5}}, {}, "no part is faster in float"),
        ({"float": {**FLOAT, "gemm": 0.1}, "int8": dict.fromkeys(FLOAT, 2.0)}, {}, "every part is faster in float"),
    ],
)
def test_what_is_not_worth_it_stays(profile, latency, said):
    artifact = residual()
    ctx, _ = watched(artifact, profile, latency)
    after = QuantizeStatic(islands="measured")(artifact, ctx)
    assert any(note.endswith(said) for note in after.notes)
    whole = QuantizeStatic()(artifact, context(artifact))
    assert [node.name for node in after.model.graph] == [node.name for node in whole.model.graph]


def test_without_a_clock_it_is_refused():
    artifact = residual()
    with pytest.raises(PreconditionError, match="islands=measured needs the times of operators on target 't'"):
        QuantizeStatic(islands="measured")(artifact, context(artifact))
    assert QuantizeStatic(islands="measured").looks_ahead
    slow, fast = (
        replace(ctx, target=ctx.target.model_copy(update={"bench": ctx.target.bench.model_copy(update={"threads": threads})}))
        for ctx in [context(artifact)]
        for threads in (1, 2)
    )
    asked = QuantizeStatic(islands="measured")
    assert asked.depends_on(slow) != asked.depends_on(fast)  # another clock decides for itself
    assert QuantizeStatic().depends_on(slow) == QuantizeStatic().depends_on(fast) == ""
    assert QuantizeStatic().faster() == (QuantizeStatic(islands="measured"),)
    assert QuantizeStatic(islands="measured").faster() == ()


def test_the_profiler_tells_every_operator_in_its_order(tmp_path):
    artifact = residual()
    ctx = replace(context(artifact), workdir=tmp_path)
    quantized = QuantizeStatic()(artifact, ctx)
    found = Timer(OnnxRuntime(), ctx).profile({"float": artifact, "int8": quantized})
    assert [node.operator for node in found["int8"]].count("QLinearConv") == 2
    assert found["int8"][0].operator == "QuantizeLinear"
    assert all(node.milliseconds > 0 for nodes in found.values() for node in nodes)
    spent = segment_times(segments(artifact.model.graph), found["int8"])
    assert sum(spent) == pytest.approx(sum(node.milliseconds for node in found["int8"]))
    assert spent[0] > 0


# --- what stays in float between integers


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_weights_left_in_float_are_not_rounded_by_the_runtime(kind, tmp_path):
    """ONNX Runtime quantizes float weights behind a DQ of one scale, with one scale for all channels; ours must come out exact."""
    import onnxruntime as ort

    from deploycc.forms import onnx as form

    weight = np.random.default_rng(0).normal(size=(8, 8, 1, 1)).astype(np.float32)
    weight[0] *= 100.0  # with one scale for all, little is left of the other channels' weights
    artifact = make(
        [
            helper.make_node("Conv", ["x", "w1"], ["c1"], "conv1"),
            helper.make_node(kind, ["c1", "w2", "b2"], ["c2"], "middle"),
            helper.make_node("Conv", ["c2", "w3"], ["y"], "conv3"),
        ],
        [tensor("w1", 8, 3, 1, 1), numpy_helper.from_array(weight, "w2"), tensor("b2", 8), tensor("w3", 4, 8, 1, 1)],
    )
    ctx = context(artifact, quant=Quant(reduce_range=True))  # the fused kernels run: no product may saturate
    after = QuantizeStatic(skip=("middle",) if kind == "Conv" else ())(artifact, ctx)
    feeds = list(ctx.data.calibration(artifact))
    path = str(form.write(after.model, tmp_path))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    sessions = [ort.InferenceSession(path, chosen, providers=["CPUExecutionProvider"]) for chosen in (None, options)]
    fused, plain = (np.concatenate([session.run(None, item)[0] for item in feeds]) for session in sessions)
    assert np.abs(plain - fused).mean() <= 1e-3 * np.abs(plain).max()  # a last bit may round the other way here and there
