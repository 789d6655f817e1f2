"""Training for PyTorch's engines: what is gained in the real engine, that it computes what was trained, what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graphs import needs_wide_products
from torch import nn

from deploycc import driver
from deploycc.core.contract import Context, Dataset
from deploycc.core.data import Data
from deploycc.core.pipeline import Pipeline
from deploycc.core.target import Target
from deploycc.errors import DataNeeded, NothingToDo, PostconditionError, PreconditionError
from deploycc.forms.module import ModuleForm
from deploycc.passes import _engines, _fake_quant_fx, _qat, _qat_torch, _torch_prepared
from deploycc.passes.quantize_qat import QuantizeQat
from deploycc.passes.quantize_torch import QuantizeTorch
from deploycc.planning import Options
from deploycc.runtime.sessions.torchscript import using_engine
from tests.digits import TRAINED, Digits, artifact, harsh

SUPPORTED = torch.backends.quantized.supported_engines
ENGINES = [pytest.param(name, marks=pytest.mark.skipif(name not in SUPPORTED, reason=f"no {name} here")) for name in _engines.ENGINES]
needs_fbgemm = pytest.mark.skipif("fbgemm" not in SUPPORTED, reason="no fbgemm here")
HERE = "fbgemm" if "fbgemm" in SUPPORTED else "qnnpack"
HARD = {"per_channel": False, "reduce_range": True}


class Depthwise(nn.Module):
    """What MobileNets are made of, with taps that are alike: their pair sums are large."""

    def __init__(self, width=16):
        super().__init__()
        self.stem, self.act = nn.Conv2d(1, width, 3, padding=1), nn.ReLU6()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.project = nn.Conv2d(width, 32, 1)
        self.fc = nn.Linear(32, 10)
        with torch.no_grad():
            self.stem.weight.mul_(8)
            self.depthwise.weight.abs_()

    def forward(self, x):
        x = self.act(self.depthwise(self.act(self.stem(x))))
        return self.fc(F.relu(self.project(x)).mean((2, 3)))


class Mixed(nn.Module):
    """Operators that share scales, choose them themselves, or have one of their own."""

    def __init__(self):
        super().__init__()
        self.conv, self.twice = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.up, self.fc = nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 2, 2), nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.conv(x))
        x = self.twice(self.twice(x) * 3.0)
        x = self.norm(F.max_pool2d(x, 2) + 0.25)
        x = torch.cat([self.up(x) * torch.sigmoid(self.up(x)), self.up(x)], 1)
        return self.fc(x.mean((2, 3)))


class View(nn.Module):
    """Only for the batch that it was written for."""

    def __init__(self, shape):
        super().__init__()
        self.fc, self.shape = nn.Linear(64, 10), shape

    def forward(self, x):
        return self.fc(x.reshape(*self.shape))


def context(reference, engine=HERE, *, labelled=True, **quant):
    made = {"name": "t", "title": "t", "backend": engine, "arch": "any", "pipeline": "", "quant": {**HARD, **quant}}
    made["hardware"] = {"requires": ["avx512_vnni"]}
    data = {"train": Digits(slice(0, TRAINED), labelled=labelled), "val": Digits(slice(TRAINED, None))}
    return Context(Target.model_validate(made), reference, Data(Dataset("digits", data)), 0, Path())


def run(options, before, where):
    return Pipeline.parse(f"quantize-qat{{{options}}}").run(before, where)


def receipt(made):
    return made.history[-1]


def right(made):
    """Top-1 in the engine on the digits that nothing was trained on."""
    rows = Digits(slice(TRAINED, None))
    with ModuleForm().open(made, threads=1) as session:
        return np.mean([int(np.argmax(session.run({"x": x[None]})["output"])) == y for x, y in zip(rows.x, rows.y, strict=True)])


def codes(made, name):
    """(codes, scales) of a quantized module's weight."""
    weight = made.model.get_submodule(name).weight()
    per_channel = weight.qscheme() == torch.per_channel_affine
    scales = weight.q_per_channel_scales().numpy() if per_channel else np.array([weight.q_scale()])
    return weight.int_repr().numpy().astype(int), scales


def pair_sums(weight):
    rows = weight.reshape(len(weight), -1)
    even = rows.shape[1] // 2 * 2
    return np.abs(rows[:, 0:even:2] + rows[:, 1:even:2])


@pytest.fixture(scope="module")
def trained():
    return Pipeline.parse("fold-batchnorm").run(harsh(), context(None))


@pytest.fixture(scope="module", params=ENGINES)
def both(request, trained):
    """The float net after quantize-torch, and after quantize-qat, for one engine."""
    where = context(trained, request.param)
    return QuantizeTorch()(trained, where), run("epochs=6 lr=0.002 optimizer=adam", trained, where)


@pytest.fixture(scope="module")
def depthwise():
    torch.manual_seed(0)
    return artifact(Depthwise())


# --- what it gives


def test_what_quantization_lost_is_won_back_in_the_engine(both):
    before, now = (right(made) for made in both)
    assert before < 0.6
    assert now > before + 0.2


def test_it_is_what_the_target_asks_for(both):
    before, after = both
    assert after.quant == replace(before.quant, method="qat")
    assert after.model.quantized_engine == before.model.quantized_engine
    assert ModuleForm().operators(after.model) == ModuleForm().operators(before.model)
    for name in ("0", "3", "7", "11"):
        whole, scales = codes(after, name)
        assert np.abs(whole).max() <= 63
        assert len(scales) == 1
        assert not np.array_equal(whole, codes(before, name)[0])


def test_the_engine_computes_what_was_trained(both):
    told = receipt(both[1])
    compared = told.details["engine"]
    assert compared["samples"] == 64
    assert compared["agreement"] >= 0.98
    assert compared["sqnr_db"] > 35
    assert told.details["teacher"] == "digits"
    assert [row["epoch"] for row in told.details["curves"]] == [1, 2, 3, 4, 5, 6]
    assert told.details["curves"][-1]["loss"] < 0.5 * told.details["curves"][0]["loss"]
    assert any("against the graph as trained" in note for note in told.notes)
    assert "11 keeps its output in float" in told.notes


def test_the_float_model_stays_as_it_was_and_the_same_seed_gives_the_same_bytes(trained):
    where, digest = context(trained), trained.digest()
    first, second = (run("epochs=1 samples=128", trained, where) for _ in range(2))
    assert first.digest() == second.digest()
    assert trained.digest() == digest


def test_unlabelled_data_and_the_teacher_are_enough(trained):
    where = context(trained, labelled=False)
    made = run("epochs=4 lr=0.002 optimizer=adam", trained, where)
    assert right(made) > right(QuantizeTorch()(trained, where)) + 0.1


def test_labels_are_enough(trained):
    where = context(trained)
    made = run("epochs=4 lr=0.002 optimizer=adam teacher=none", trained, where)
    assert right(made) > right(QuantizeTorch()(trained, where)) + 0.1
    assert receipt(made).details["teacher"] is None


@pytest.mark.parametrize("steps", ["observed", "learned"])
def test_steps_are_observed_or_learned_and_shipped(trained, steps):
    where = context(trained)
    kept = run("epochs=2 lr=0.002", trained, where)
    made = run(f"epochs=2 lr=0.002 step-sizes={steps}", trained, where)
    scales = [[float(item.model.get_submodule(name).scale) for name in ("0", "3", "7")] for item in (kept, made)]
    assert all(old != new for old, new in zip(*scales, strict=True))
    calibrated = QuantizeTorch(keep_sums=False)(trained, where)
    assert scales[0] == [float(calibrated.model.get_submodule(name).scale) for name in ("0", "3", "7")]
    compared = receipt(made).details["engine"]
    assert compared["agreement"] >= 0.95
    assert compared["sqnr_db"] > 35


@needs_wide_products
@needs_fbgemm
@pytest.mark.parametrize("steps", ["calibrated", "observed", "learned"])
def test_pair_sums_stay_within_int16_and_clips_at_their_ends(depthwise, steps):
    where = context(depthwise, "fbgemm", per_channel=True, reduce_range=False)
    made = run(f"epochs=3 lr=0.005 optimizer=adam teacher=none step-sizes={steps}", depthwise, where)
    whole, _ = codes(made, "depthwise")
    old, _ = codes(QuantizeTorch(keep_sums=False)(depthwise, where), "depthwise")
    assert not np.array_equal(whole, old)
    sums = pair_sums(whole).max(axis=1)
    assert sums.max() <= _engines.FBGEMM_PAIR_LIMIT
    assert (sums >= 126).sum() >= 8  # the limit is what holds them
    assert np.abs(codes(made, "stem")[0]).max() == 127
    for name in ("stem", "depthwise"):
        assert float(made.model.get_submodule(name).scale) * 255 <= 6.0 * (1 + 1e-6)
    assert any("int16 pair sums" in note for note in made.history[-1].notes)
    compared = receipt(made).details["engine"]
    assert compared["agreement"] >= 0.95
    assert compared["sqnr_db"] > 30


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("quant", [{}, {"activation_symmetric": True}, {"per_channel": True, "reduce_range": False}])
def test_every_operator_rounds_as_in_the_engine(engine, quant):
    torch.manual_seed(0)
    before = artifact(Mixed())
    where = context(before, engine, **quant)
    prepared = _torch_prepared.prepare("t", before, where, calibration=None, percentile=99.99, keep_sums=False, watch=False)
    placed = _fake_quant_fx.place(prepared, engine, "calibrated")
    feeds = _qat.calls(before, where)
    wanted = _qat.run_trained(placed.net.eval(), before, feeds)
    _fake_quant_fx.write_back(prepared, placed)
    with ModuleForm().open(_torch_prepared.finish(prepared, before, where, method="qat"), threads=1) as session:
        compared = _qat.facts(wanted, [dict(session.run(item)) for item in feeds])
    assert compared["sqnr_db"] > 42
    assert compared["agreement"] >= 0.98


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("constant", [0.25, 3.0, 40.0, -0.3, -3.0, -40.0])
def test_constants_are_added_and_multiplied_as_in_the_engine(engine, constant):
    x = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    source = _fake_quant_fx.Quint8(0.025, 100, "calibrated")
    integers = torch.quantize_per_tensor(x, 0.025, 100, torch.quint8)
    shifted, scaled = _fake_quant_fx.Shifted(source, constant), _fake_quant_fx.Scaled(source, constant)
    with using_engine(engine):
        sums, products = torch.ops.quantized.add(integers, constant), torch.ops.quantized.mul(integers, constant)
        pooled = F.adaptive_avg_pool2d(sums, 1)
    added = shifted(source(x) + constant)
    for made, wanted, got in ((shifted, sums, added), (scaled, products, scaled(source(x) * constant))):
        assert float(made.grid()[0]) == pytest.approx(wanted.q_scale(), rel=1e-6)
        assert made.grid()[1] == -wanted.q_zero_point()
        distance = (got - wanted.dequantize()).abs()
        assert distance.max() < 1.01 * wanted.q_scale()
        assert (distance > 1e-4).float().mean() < 0.03  # between two steps the last bit decides
    torch.testing.assert_close(
        _fake_quant_fx.PassedOn(shifted)(added.mean((2, 3), keepdim=True)), pooled.dequantize(), rtol=0, atol=1.01 * pooled.q_scale()
    )


@needs_fbgemm
def test_what_stays_in_float_is_trained_and_norms_keep_their_statistics():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU(), nn.BatchNorm2d(12),
        nn.Conv2d(12, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    before = artifact(net)
    where = context(before, "fbgemm")
    after = run("epochs=1 lr=0.05 teacher=none", before, where)
    assert [name for name, _ in after.quant.left_float] == ["1"]
    layer = after.model.get_submodule("1")[0]  # fused with its ReLU
    assert type(layer) is nn.Conv2d
    assert float((layer.weight - net[1].weight).detach().abs().max()) > 1e-3
    norm = after.model.get_submodule("3")
    torch.testing.assert_close(norm.running_mean, net[3].running_mean)
    assert receipt(after).details["engine"]["sqnr_db"] > 30


def test_zeros_of_sparse_weights_stay():
    torch.manual_seed(0)
    before = artifact(Depthwise())
    with torch.no_grad():
        before.model.project.weight[:, ::2] = 0
        before.model.fc.weight[::2] = 0
    before = replace(before, sparse=("project.weight", "fc.weight"))
    made = run("epochs=1 lr=0.05 teacher=none", before, context(before))
    whole, _ = codes(made, "project")
    assert not whole[:, ::2].any()
    assert whole[:, 1::2].any()
    assert not codes(made, "fc")[0][::2].any()


def test_a_training_that_was_cut_short_ends_with_the_same_numbers(trained, tmp_path):
    def killed(what, done, total, note=""):
        if what == "quantize-qat" and done > total * 0.7:
            raise KeyboardInterrupt

    options = QuantizeQat(epochs=2, samples=256, step_sizes="learned")
    where = context(trained)
    whole = options(trained, where)
    with pytest.raises(KeyboardInterrupt):
        options(trained, replace(where, resume=tmp_path, progress=killed))
    assert list(tmp_path.iterdir())
    assert options(trained, replace(where, resume=tmp_path)).digest() == whole.digest()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_compile_from_end_to_end(engine, tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef make():\n    torch.manual_seed(0)\n    return nn.Sequential(\n"
        "        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6(),\n"
        "        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10),\n    ), torch.zeros(1, 1, 8, 8)\n"
    )
    target = Target.model_validate(
        {
            "name": "t", "title": "t", "backend": engine, "arch": "any", "pipeline": "", "quant": HARD,
            "bench": {"min_seconds": 0.05, "min_runs": 10},
        }
    )  # fmt: skip
    passes = "finetune{epochs=4 lr=0.05}, fold-batchnorm, fold-padding, quantize-qat{epochs=2}"
    found = driver.compile(
        f"{tmp_path}/net.py:make",
        Options(target=target, data="sklearn:digits", passes=passes, output=tmp_path / "out", cache=tmp_path / "cache"),
    )
    attempt = next(item for item in found.outcome.attempts if item.artifact.quant is not None)
    assert attempt.artifact.quant.method == "qat"
    assert attempt.accuracy.reference > 0.85
    assert attempt.accuracy.candidate > attempt.accuracy.reference - 0.02
    assert attempt.artifact.history[-1].details["engine"]["agreement"] >= 0.98


# --- refusals


def test_a_float_module_for_an_onnx_target_is_refused(trained):
    with pytest.raises(PreconditionError, match="float module, and target 't' runs on onnxruntime") as caught:
        QuantizeQat()(trained, context(trained, "onnxruntime"))
    assert "quantize-static" in (caught.value.fix or "")


def test_a_quantized_module_is_refused(trained, both):
    with pytest.raises(PreconditionError, match="quantized already"):
        QuantizeQat()(both[0], context(trained))


def test_types_that_the_engines_do_not_have_are_refused(trained):
    with pytest.raises(PreconditionError, match="multiply uint8 activations by int8 weights"):
        QuantizeQat()(trained, context(trained, activations="int8", activation_symmetric=True))


def test_data_that_are_missing_are_refused(trained):
    with pytest.raises(DataNeeded):
        QuantizeQat()(trained, replace(context(trained), data=Data(None)))
    with pytest.raises(DataNeeded, match="asks for labels"):
        QuantizeQat(teacher="none")(trained, context(trained, labelled=False))


def test_batch_normalization_must_be_folded():
    before = artifact(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 10)))
    with pytest.raises(PreconditionError, match="batch normalization '1' after '0' is not folded") as caught:
        QuantizeQat()(before, context(before))
    assert "fold-batchnorm" in (caught.value.fix or "")


def test_nothing_to_quantize():
    before = artifact(nn.Sequential(nn.Flatten(), nn.ReLU()))
    with pytest.raises(NothingToDo, match="quantize-qat finds nothing to quantize"):
        QuantizeQat()(before, context(before, labelled=False))


@pytest.mark.parametrize(("shape", "seen"), [((1, 64), "cannot be trained on batches: shape"), ((64,), "2 samples give")])
def test_a_model_for_one_sample_is_refused(shape, seen):
    class Whole(View):
        def forward(self, x):
            return super().forward(x[:1])[None] if self.shape == (64,) else super().forward(x)

    before = artifact(Whole(shape))
    with pytest.raises(PreconditionError, match=seen):
        QuantizeQat()(before, context(before, labelled=False))


def test_a_model_without_gradients_is_refused():
    class Picked(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

        def forward(self, x):
            return self.body(x).argmax(1)

    before = artifact(Picked())
    with pytest.raises(PreconditionError, match="no gradient reaches the weights"):
        QuantizeQat()(before, context(before, labelled=False))


def test_an_engine_that_computes_something_else_is_found(both):
    with pytest.raises(PostconditionError, match=r"the converted module is 3\.0 dB"):
        _qat_torch.check(both[0], replace(both[1], details={"engine": {"sqnr_db": 3.0}}))
