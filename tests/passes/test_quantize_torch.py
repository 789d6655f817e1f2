import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graphs import ANY, SATURATES, Arrays
from torch import nn

from deploycc.core.artifact import Artifact, Form
from deploycc.core.compare import sqnr_db
from deploycc.core.contract import Context, Dataset
from deploycc.core.data import Data
from deploycc.core.target import Hardware, Quant, Target
from deploycc.errors import DataError, DataNeeded, NothingToDo, PreconditionError
from deploycc.forms.module import ModuleForm, capture_signature
from deploycc.passes import _engines
from deploycc.passes.quantize_torch import QuantizeTorch
from deploycc.runtime.sessions.torchscript import using_engine
from deploycc.runtime.signature import TensorSpec

SUPPORTED = torch.backends.quantized.supported_engines
ENGINES = [pytest.param(name, marks=pytest.mark.skipif(name not in SUPPORTED, reason=f"no {name} here")) for name in _engines.ENGINES]
needs_fbgemm = pytest.mark.skipif("fbgemm" not in SUPPORTED, reason="no fbgemm here")
HERE = "fbgemm" if "fbgemm" in SUPPORTED else "qnnpack"


class Net(nn.Module):
    """Stem, two inverted residuals, classifier: what MobileNets are made of."""

    def __init__(self, classes=10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU6())
        self.expand = nn.Conv2d(16, 32, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, 1, 1, groups=32)
        self.project = nn.Conv2d(32, 16, 1)
        self.act = nn.ReLU6()
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(16, classes)

    def forward(self, x, scale=None):
        x = self.stem(x)
        if scale is not None:
            x = x * scale
        x = x + self.project(self.act(self.depthwise(self.act(self.expand(x)))))
        return self.fc(self.drop(x.mean((2, 3))))


def net(**options):
    torch.manual_seed(0)
    model = Net(**options).eval()
    with torch.no_grad():  # activations that reach 6 and weights of unlike channels, as in a trained net
        model.stem[0].weight *= 8
        model.depthwise.weight *= torch.logspace(-1, 1, 32)[:, None, None, None]
    return model


def artifact(module, shape=(1, 3, 32, 32)):
    return Artifact(Form.MODULE, module, capture_signature(module.eval(), (TensorSpec("x", "float32", shape),)), "test")


def context(before, *, engine=HERE, arrays=None, progress=None, samples=16, **quant):
    rng = np.random.default_rng(1)
    shape = before.signature.inputs[0].shape[1:]
    arrays = [rng.normal(size=shape).astype(np.float32) for _ in range(samples)] if arrays is None else arrays
    target = Target(
        name="t",
        title="t",
        backend=engine,
        arch="x86_64",
        pipeline="quantize-torch",
        hardware=Hardware(requires=("avx512_vnni",)),
        quant=Quant(**{"reduce_range": SATURATES, **quant}),
    )
    data = Data(None, Dataset("d", {"all": Arrays(arrays)}) if arrays else None)
    return Context(target, before, data, 0, Path(), *([progress] if progress else []))


def outputs(item, ctx):
    with ModuleForm().open(item, threads=1) as session:
        return np.concatenate([session.run(feeds)["output"] for feeds in ctx.data.calibration(item)])


def quality(before, after, ctx):
    return sqnr_db(outputs(before, ctx), outputs(after, ctx))


def quantized(model, name):
    """(codes, scales) of a quantized module's weight."""
    weight = model.get_submodule(name).weight()
    per_channel = weight.qscheme() == torch.per_channel_affine
    return weight.int_repr().numpy(), weight.q_per_channel_scales().numpy() if per_channel else np.array([weight.q_scale()])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("calibration", [None, "mse", "percentile"])
def test_it_computes_what_the_float_model_computes(engine, calibration):
    before = artifact(net())
    ctx = context(before, engine=engine)
    after = QuantizeTorch(calibration=calibration)(before, ctx)
    assert quality(before, after, ctx) > 30
    assert after.quant is not None
    assert (after.quant.method, after.quant.weights, after.quant.activations) == ("fx", "int8", "uint8")
    assert after.quant.calibration == (calibration or "minmax")
    assert after.quant.left_float == ()
    assert ModuleForm().stats(after).bytes < 0.45 * ModuleForm().stats(before).bytes
    assert ModuleForm().stats(after).macs == ModuleForm().stats(before).macs


def test_the_same_input_gives_the_same_model_and_leaves_the_float_one_as_it_was():
    before = artifact(net())
    digest = before.digest()
    ctx = context(before)
    first, second = (QuantizeTorch()(before, ctx) for _ in range(2))
    assert first.digest() == second.digest()
    assert before.digest() == digest
    assert QuantizeTorch(keep_sums=False)(before, ctx).digest() != first.digest()


def test_the_number_of_threads_changes_nothing():
    before, seen = artifact(net()), []
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        QuantizeTorch()(before, context(before, progress=lambda *_: seen.append(torch.get_num_threads())))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert set(seen) == {1}  # sums of several threads differ in their last bits: the same input must give the same bytes


def test_relu6_is_the_end_of_a_range():
    before = artifact(net())
    ctx = context(before)
    after = QuantizeTorch()(before, ctx)
    kinds = {type(module).__name__ for module in after.model.modules()}
    assert "ConvReLU2d" in kinds
    assert not kinds & {"ReLU6", "Hardtanh", "ReLU"}
    stem = after.model.get_submodule("stem.0")
    assert stem.zero_point == 0
    assert stem.scale * 255 == pytest.approx(6.0, rel=1e-5)


@pytest.mark.parametrize(
    "clip",
    [
        F.relu6,
        lambda x: F.hardtanh(x, 0.0, 6.0),
        lambda x: torch.clamp(x, 0, 6),
        lambda x: x.clamp(min=0, max=6),
        nn.Hardtanh(0.0, 6.0),
    ],
)
def test_every_way_to_clip_is_understood(clip):
    class Clipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.clip = nn.Conv2d(3, 8, 3), clip if isinstance(clip, nn.Module) else None

        def forward(self, x):
            return (self.clip or clip)(self.conv(x * 8))

    torch.manual_seed(0)
    before = artifact(Clipped())
    ctx = context(before)
    after = QuantizeTorch()(before, ctx)
    assert after.model.conv.scale * 255 == pytest.approx(6.0, rel=1e-5)
    assert quality(before, after, ctx) > 30


@pytest.mark.parametrize("clip", [lambda x: x.clamp(-1, 6), lambda x: x.clamp(max=6.0), lambda x: F.hardtanh(x)])
def test_other_clips_stay_what_they_are(clip):
    class Clipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return clip(self.conv(x * 8))

    torch.manual_seed(0)
    before = artifact(Clipped())
    ctx = context(before)
    assert quality(before, QuantizeTorch()(before, ctx), ctx) > 25


@needs_fbgemm
def test_fbgemm_depthwise_saturates_with_full_weights_and_not_with_ours():
    before = artifact(nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False)), (1, 8, 12, 12))
    with torch.no_grad():
        before.model[1].weight.copy_(torch.full((8, 1, 3, 3), 0.5))  # every pair has the same sign: the worst
    ctx = context(before, arrays=[np.full((8, 12, 12), 1.0, np.float32)], reduce_range=False)
    after = QuantizeTorch()(before, ctx)
    codes, _ = quantized(after.model, "1")
    assert np.abs(codes).max() == 64  # 127 / 2, rounded
    assert quality(before, after, ctx) > 40
    # What the engine does with weights that use all eight bits: a fact about FBGEMM that the rule above rests on.
    with using_engine("fbgemm"):
        full = torch._make_per_tensor_quantized_tensor(torch.full((8, 1, 3, 3), 127, dtype=torch.int8), 0.5 / 127, 0)
        packed = torch.ops.quantized.conv2d_prepack(full, None, [1, 1], [1, 1], [1, 1], 8)
        ones = torch.quantize_per_tensor(torch.ones(1, 8, 12, 12), 1 / 255, 0, torch.quint8)
        middle = torch.ops.quantized.conv2d(ones, packed, 0.05, 0).dequantize()[0, 0, 6, 6]
    assert float(middle) < 0.7 * 4.5


@needs_fbgemm
def test_only_fbgemm_narrows_depthwise_weights():
    before = artifact(net())
    for engine, narrow in (("fbgemm", True), ("qnnpack", False)):
        if engine not in SUPPORTED:
            continue
        after = QuantizeTorch(keep_sums=False)(before, context(before, engine=engine, reduce_range=False))
        codes, _ = quantized(after.model, "depthwise")
        assert (np.abs(codes).reshape(32, -1).max(axis=1) == 127).all() == (not narrow)
        assert any("int16 pair sums" in note for note in after.notes) == narrow
        codes, _ = quantized(after.model, "expand")
        assert (np.abs(codes).reshape(32, -1).max(axis=1) == 127).all()


def test_reduce_range_takes_a_bit_from_every_weight():
    before = artifact(net())
    ctx = context(before, reduce_range=True)
    after = QuantizeTorch()(before, ctx)
    for name in ("stem.0", "expand", "depthwise", "project", "fc"):
        assert np.abs(quantized(after.model, name)[0]).max() == 63, name
    assert after.quant.reduce_range
    assert quality(before, after, ctx) > 25


def test_per_tensor_weights_and_a_symmetric_zero_point():
    before = artifact(net())
    ctx = context(before, per_channel=False, activation_symmetric=True)
    after = QuantizeTorch()(before, ctx)
    assert len(quantized(after.model, "expand")[1]) == 1
    assert after.model.get_submodule("expand").zero_point == 128
    assert not after.quant.per_channel
    assert quality(before, after, ctx) > 10


def test_an_output_layer_keeps_its_output_in_float():
    before = artifact(net())
    ctx = context(before)
    after = QuantizeTorch()(before, ctx)
    assert "fc keeps its output in float" in after.notes
    assert len(np.unique(outputs(after, ctx))) > 120  # of 160: an 8-bit output would repeat itself
    with torch.no_grad():
        before.model.fc.weight *= 1e4
        before.model.project.weight *= 1e-6  # too small an input for PyTorch's dynamic scales
        before.model.stem[0].weight *= 1e-6
        before.model.stem[0].bias *= 1e-6
        before.model.project.bias *= 1e-6
    small = QuantizeTorch()(before, ctx)
    assert not any("in float" in note for note in small.notes)
    assert quality(before, small, ctx) > 20


def test_biases_take_the_mean_error_back():
    before = artifact(net())
    ctx = context(before)
    errors = []
    for correct in (False, True):
        after = QuantizeTorch(correct_bias=correct, keep_sums=False)(before, ctx)
        errors.append(np.abs((outputs(after, ctx) - outputs(before, ctx)).mean(axis=0)).mean())
    assert errors[1] < 0.6 * errors[0]


@needs_fbgemm
def test_a_depthwise_convolution_without_a_fast_kernel_stays_in_float():
    before = artifact(nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 8, 1)))
    ctx = context(before, engine="fbgemm")
    after = QuantizeTorch()(before, ctx)
    assert after.quant.left_float == (("1", "FBGEMM's depthwise kernel wants channels in multiples of 8"),)
    assert "left in float: 1: FBGEMM's depthwise kernel wants channels in multiples of 8" in after.notes
    assert type(after.model.get_submodule("1")) is nn.Conv2d
    assert quality(before, after, ctx) > 30


@needs_fbgemm
@pytest.mark.parametrize("act", [nn.ReLU6(), nn.ReLU()])
def test_what_stays_in_float_keeps_its_clip_and_its_name(act):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12), act, nn.Conv2d(12, 8, 1))
    with torch.no_grad():
        net[1].weight *= 50
    before = artifact(net)
    ctx = context(before, engine="fbgemm")
    after = QuantizeTorch()(before, ctx)
    assert [name for name, _ in after.quant.left_float] == ["1"]
    assert quality(before, after, ctx) > 30


def test_a_layer_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(F.relu6(self.conv(x) * 20))

    torch.manual_seed(0)
    before = artifact(Twice())
    ctx = context(before)
    assert quality(before, QuantizeTorch()(before, ctx), ctx) > 25


def test_what_pytorch_cannot_quantize_is_named():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(16, 16)

        def forward(self, x):
            y = self.proj(x)
            return torch.matmul(y, y.transpose(1, 2))

    before = artifact(Attention(), (1, 8, 16))
    after = QuantizeTorch()(before, context(before))
    assert after.quant.left_float == (("aten.bmm", "PyTorch's FX quantization has no integer kernel for it"),)


def test_convolutions_of_one_and_three_axes_and_transposed_ones():
    for module, shape in (
        (nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 4, 1)), (1, 3, 32)),
        (nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.ReLU()), (1, 3, 8, 8, 8)),
        (nn.Sequential(nn.ConvTranspose2d(3, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 4, 3)), (1, 3, 16, 16)),
    ):
        torch.manual_seed(0)
        before = artifact(module, shape)
        ctx = context(before)
        after = QuantizeTorch()(before, ctx)
        assert after.quant.left_float == ()
        assert quality(before, after, ctx) > 30


def test_calibration_reports_its_progress_and_streams():
    before = artifact(net())
    seen = []
    QuantizeTorch()(before, context(before, samples=20, progress=lambda *step: seen.append(step)))
    assert seen[0] == ("calibration", 1, 20)
    assert seen[-1] == ("calibration", 20, 20)


def test_alternatives_are_other_calibrations():
    assert [item.calibration for item in QuantizeTorch().alternatives(ANY)] == ["mse", "percentile", "entropy"]
    assert [item.calibration for item in QuantizeTorch(calibration="mse").alternatives(ANY)] == ["percentile", "entropy"]


# --- refusals


def test_a_target_of_another_runtime_is_refused():
    before = artifact(net())
    with pytest.raises(PreconditionError, match="target 't' runs on onnxruntime"):
        QuantizeTorch()(before, context(before, engine="onnxruntime"))


def test_an_engine_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr(_engines, "ENGINES", ("fbgemm", "qnnpack", "onnxruntime"))  # stands for an engine of another machine
    before = artifact(net())
    with pytest.raises(PreconditionError, match=r"this PyTorch has the engines .*, not onnxruntime"):
        QuantizeTorch()(before, context(before, engine="onnxruntime"))


@pytest.mark.parametrize("quant", [{"activations": "int8", "activation_symmetric": True}, {"weights": "uint8"}, {"activations": "none"}])
def test_types_that_the_engines_do_not_have_are_refused(quant):
    before = artifact(net())
    with pytest.raises(PreconditionError, match="multiply uint8 activations by int8 weights"):
        QuantizeTorch()(before, context(before, **quant))


def test_a_quantized_model_is_refused():
    before = artifact(net())
    ctx = context(before)
    with pytest.raises(PreconditionError, match="quantized already"):
        QuantizeTorch()(QuantizeTorch()(before, ctx), ctx)


def test_no_data():
    before = artifact(net())
    with pytest.raises(DataNeeded):
        QuantizeTorch()(before, context(before, arrays=()))


def test_nan_in_a_sample_names_the_sample_and_the_tensor():
    before = artifact(net())
    arrays = [np.zeros((3, 32, 32), np.float32) for _ in range(3)]
    arrays[2][0, 0, 0] = np.nan
    with pytest.raises(DataError, match="calibration sample 3 of 3 makes tensor 'x' NaN or Inf"):
        QuantizeTorch()(before, context(before, arrays=arrays))


def test_control_flow_names_the_users_line():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else x

    before = artifact(Branch(), (1, 8))
    with pytest.raises(PreconditionError, match=r"test_quantize_torch.py:\d+ `return self.fc\(x\) if x.sum\(\) > 0 else x`") as caught:
        QuantizeTorch()(before, context(before))
    assert "x86-onnxruntime" in caught.value.fix


def test_batch_normalization_must_be_folded():
    before = artifact(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    with pytest.raises(PreconditionError, match="batch normalization '1' after '0' is not folded"):
        QuantizeTorch()(before, context(before))


@needs_fbgemm
@pytest.mark.parametrize(
    ("module", "reason"),
    [(nn.ReLU(), "no convolution or linear layer"), (nn.Conv2d(3, 3, 3, groups=3), "FBGEMM's depthwise kernel wants padding")],
)
def test_nothing_to_quantize(module, reason):
    before = artifact(nn.Sequential(module))
    with pytest.raises(NothingToDo, match=reason):
        QuantizeTorch()(before, context(before, engine="fbgemm"))


def test_a_percentile_out_of_range():
    with pytest.raises(ValueError, match="percentile is 40"):
        QuantizeTorch(percentile=40)


# --- what the engines do


BASE = _engines.Convolution(64, 64, 64, (3, 3), (1, 1), (1, 1), (1, 1))


@pytest.mark.parametrize(
    ("changes", "fbgemm", "qnnpack"),
    [
        ({}, None, None),
        ({"kernel": (5, 5), "padding": (2, 2), "stride": (2, 2)}, None, None),
        ({"kernel": (7, 7), "padding": (3, 3)}, None, "9 or 25 taps"),
        ({"padding": (0, 0)}, "padding (k-1)/2", None),
        ({"stride": (3, 3)}, "stride 1 or 2", None),
        ({"dilation": (2, 2), "padding": (1, 1)}, "no dilation", None),
        ({"kernel": (3, 5), "padding": (1, 2)}, "a 3×3, 5×5 or 7×7 kernel", "9 or 25 taps"),
        ({"in_channels": 60, "out_channels": 60, "groups": 60}, "multiples of 8", None),
        ({"out_channels": 128}, None, "as many outputs as inputs"),
        ({"out_channels": 256}, "twice as many", "as many outputs as inputs"),
        ({"kernel": (3,), "stride": (1,), "padding": (1,), "dilation": (1,)}, "two spatial axes", "9 or 25 taps"),
        ({"transposed": True}, "no transposed", "9 or 25 taps"),
        ({"groups": 1}, None, None),
        ({"groups": 16, "kernel": (4, 4)}, None, None),
    ],
)
def test_fast_depthwise_kernels(changes, fbgemm, qnnpack):
    conv = replace(BASE, **changes)
    for engine, wanted in (("fbgemm", fbgemm), ("qnnpack", qnnpack)):
        reason = _engines.float_reason(engine, conv)
        assert (reason is None) == (wanted is None), reason
        assert wanted is None or wanted in reason


@needs_fbgemm
def test_the_fast_path_is_a_fact_about_fbgemm():
    """The rules of `_engines` describe PyTorch's binaries: fails when a release changes them."""

    def milliseconds(size, padding):
        x = torch.quantize_per_tensor(torch.zeros(1, 64, size, size).contiguous(memory_format=torch.channels_last), 0.1, 0, torch.quint8)
        weight = torch.quantize_per_tensor(torch.zeros(64, 1, 3, 3), 0.1, 0, torch.qint8)
        packed = torch.ops.quantized.conv2d_prepack(weight, None, [1, 1], [padding] * 2, [1, 1], 64)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.ops.quantized.conv2d(x, packed, 0.1, 0)
            times.append(time.perf_counter() - start)
        return min(times) * 1e3

    with using_engine("fbgemm"):
        assert milliseconds(30, 0) > 10 * milliseconds(28, 1)  # the same output of 28 × 28


UP = _engines.Convolution(16, 8, 1, (2, 2), (2, 2), (0, 0), (1, 1), transposed=True)


@needs_fbgemm
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, True), ({"kernel": (2, 3)}, True), ({"stride": (2, 1)}, True), ({"in_channels": 24, "out_channels": 32}, True),
        ({"kernel": (3, 3)}, False), ({"kernel": (1, 2), "stride": (1, 2)}, False), ({"stride": (3, 3)}, False),
        ({"in_channels": 12}, False), ({"out_channels": 12}, False), ({"groups": 2}, False), ({"padding": (1, 1)}, False),
    ],
)  # fmt: skip
def test_wrong_transposed_convolutions_are_a_fact_about_fbgemm(changes, wrong):
    """Fails when a release of PyTorch mends them, or breaks others."""
    conv = replace(UP, **changes)
    layer = torch.ao.nn.quantized.ConvTranspose2d(
        conv.in_channels, conv.out_channels, conv.kernel, conv.stride, conv.padding, groups=conv.groups, bias=False
    )
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-60, 61, (conv.in_channels, conv.out_channels // conv.groups, *conv.kernel), generator=generator)
    weight = torch.quantize_per_tensor(codes * 0.01, 0.01, 0, torch.qint8)
    x = torch.quantize_per_tensor(torch.randint(0, 256, (1, conv.in_channels, 6, 6), generator=generator) * 0.02, 0.02, 0, torch.quint8)
    layer.scale, layer.zero_point = 0.05, 128
    with using_engine("fbgemm"):
        layer.set_weight_bias(weight, None)
        got = layer(x).dequantize()
    wanted = F.conv_transpose2d(x.dequantize(), weight.dequantize(), None, conv.stride, conv.padding, groups=conv.groups)
    steps = float((got - wanted.clamp(-128 * 0.05, 127 * 0.05)).abs().max()) / 0.05
    assert (steps > 20) == wrong
    assert wrong or steps < 1
    assert (_engines.float_reason("fbgemm", conv) is not None) == wrong


@needs_fbgemm
def test_an_upsampling_layer_that_fbgemm_computes_wrongly_stays_in_float_and_right():
    torch.manual_seed(0)
    before = artifact(
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 4, 1))
    )
    after = QuantizeTorch().apply(before, context(before, engine="fbgemm"))
    assert [(name, "wrong results" in reason) for name, reason in after.quant.left_float] == [("2", True)]
    x = {"x": np.random.default_rng(1).standard_normal((1, 3, 32, 32)).astype(np.float32)}
    wanted, got = (ModuleForm().open(item, threads=1).run(x)["output"] for item in (before, after))
    assert sqnr_db(wanted, got) > 25
