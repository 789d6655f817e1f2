"""Static int8 of a program for XNNPACK: where Q and DQ stand, what the numbers are, every option, every refusal."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graphs import Arrays, digest
from torch import nn

from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.compare import sqnr_db
from deploycc.core.contract import Availability, Context, Dataset
from deploycc.core.data import Data
from deploycc.core.registry import FORMS
from deploycc.core.target import Target, load
from deploycc.errors import DataError, DataNeeded, MissingDependency, NothingToDo, PassError, PreconditionError, SourceError, UnknownName
from deploycc.forms.module import capture_signature
from deploycc.passes.export_program import ExportProgram
from deploycc.passes.quantize_pt2e import QuantizePt2e
from deploycc.runtime.signature import TensorSpec

pytest.importorskip("executorch", reason="the extra executorch is not installed")
pytest.importorskip("torchao", reason="the extra executorch is not installed")

TARGET = load("executorch-portable")
PASS = QuantizePt2e()


class Net(nn.Module):
    """Stem with padding of its own, an inverted residual, a transposed and a grouped convolution, classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, bias=False)
        self.expand = nn.Conv2d(16, 32, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, 1, 1, groups=32)
        self.project = nn.Conv2d(32, 16, 1)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu6(self.stem(F.pad(x, (0, 1, 0, 1))))
        x = x + self.project(F.relu6(self.depthwise(F.relu6(self.expand(x)))))
        x = torch.relu(self.grouped(torch.relu(self.up(x))))
        return self.fc(x.mean((2, 3)))


def net():
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():  # activations that reach 6 and weights of unlike channels, as in a trained net
        model.stem.weight *= 8
        model.depthwise.weight *= torch.logspace(-1, 1, 32)[:, None, None, None]
    return model


class Small(nn.Module):
    """A stem and a depthwise convolution that clip, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(F.relu6(self.depthwise(F.relu6(self.stem(x)))).mean((2, 3)))


def small():
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():
        model.stem.weight *= 8
        model.depthwise.weight *= torch.logspace(-1, 1, 8)[:, None, None, None]
    return program(model, (1, 3, 12, 12))


def inputs(count, seed, shape=(3, 32, 32)):
    return list(np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32))


def program(module=None, shape=(1, 3, 32, 32)):
    module = (module or net()).eval()
    made = Artifact(Form.MODULE, module, capture_signature(module, (TensorSpec("x", "float32", shape),)), "test")
    return ExportProgram()(made, Context(TARGET, made, Data(None), 0, Path()))


def context(artifact, samples=None, *, target=TARGET, **quant):
    facts = target.model_dump()
    target = Target.model_validate({**facts, "quant": {**facts["quant"], **quant}})
    given = inputs(16, 1, tuple(artifact.signature.inputs[0].shape[1:])) if samples is None else samples
    data = Data(None, Dataset("test", {"calibration": Arrays(given)}) if given else None)
    return Context(target, artifact, data, 0, Path())


@pytest.fixture(scope="module")
def float_program():
    return program()


@pytest.fixture(scope="module")
def small_program():
    return small()


@pytest.fixture(scope="module")
def small_quantized(small_program):
    return PASS(small_program, context(small_program))


@pytest.fixture(scope="module")
def quantized(float_program):
    return PASS(float_program, context(float_program))


def answers(artifact):
    rows = inputs(8, 2, tuple(artifact.signature.inputs[0].shape[1:]))
    with FORMS.get("program").open(artifact, threads=1) as session:
        return np.concatenate([session.run({"x": row[None]})["output"] for row in rows])


def nodes(artifact, kind):
    return [node for node in artifact.model.graph.nodes if kind in str(node.target)]


def scales(artifact):
    return [node.args[1] for node in nodes(artifact, "quantized_decomposed.quantize_per_tensor")]


def test_it_is_near_the_float_program_which_it_leaves_alone(float_program, quantized):
    before = digest(float_program)
    again = PASS(float_program, context(float_program))
    assert digest(float_program) == before
    assert again.digest() == quantized.digest()
    assert sqnr_db(answers(float_program), answers(quantized)) > 25
    assert quantized.form is Form.PROGRAM
    assert quantized.signature == float_program.signature
    assert quantized.quant == QuantInfo("pt2e", "int8", "int8", True, False, "mse", ())
    assert quantized.notes == ("7 weighted operators for XNNPACK, ranges from mse calibration",)


def test_the_number_of_threads_changes_nothing(small_program, monkeypatch):
    from deploycc.passes import _pt2e

    seen = []
    run = _pt2e.Watching.run
    monkeypatch.setattr(_pt2e.Watching, "run", lambda self, *inputs: seen.append(torch.get_num_threads()) or run(self, *inputs))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        PASS(small_program, context(small_program))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}  # sums of several threads differ in their last bits: the same input must give the same bytes


def test_weights_are_integers_of_their_scales_and_the_float_ones_are_gone(float_program, quantized):
    weights = [value for value in {**quantized.model.state_dict, **quantized.model.constants}.values() if value.dim() > 1]
    assert {value.dtype for value in weights} == {torch.int8}
    assert len(weights) == 7
    assert all(int(value.abs().max()) <= 127 for value in weights)
    dequantized = nodes(quantized, "dequantize_per_channel")
    axes = {tuple(node.args[0].meta["val"].shape): node.args[3] for node in dequantized}
    assert axes[(16, 8, 2, 2)] == 1  # a transposed convolution has its output channels second
    assert axes[(32, 1, 3, 3)] == 0


def test_one_scale_for_a_whole_weight_where_the_target_says_so(small_program):
    after = PASS(small_program, context(small_program, per_channel=False))
    assert not nodes(after, "dequantize_per_channel")
    assert after.quant.per_channel is False
    assert sqnr_db(answers(small_program), answers(after)) > 5


def test_a_clip_has_its_only_q_behind_it(quantized):
    clips = nodes(quantized, "relu6")
    assert len(clips) == 3
    for clip in clips:
        assert "quantize" not in str(clip.args[0].target)
        (after,) = clip.users
        assert "quantize_per_tensor" in str(after.target)
        assert after.args[1] <= 6 / 255 + 1e-6  # the range is what the clip lets through


def test_padding_is_done_on_integers(quantized):
    (pad,) = nodes(quantized, "aten.pad")
    assert "dequantize_per_tensor" in str(pad.args[0].target)
    (reader,) = pad.users
    assert "conv2d" in str(reader.target)


def test_padding_with_other_numbers_is_quantized_behind():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(F.pad(x, (1, 1, 1, 1), value=0.5))

    before = program(Padded())
    (pad,) = nodes(PASS(before, context(before)), "aten.pad")
    (reader,) = pad.users
    assert "quantize_per_tensor" in str(reader.target)


def test_an_average_has_a_scale_of_its_own(quantized):
    (mean,) = nodes(quantized, "aten.mean")
    (after,) = mean.users
    assert after.args[1] < mean.args[0].args[1]


class Attention(nn.Module):
    """One head over 6 words, some masked, each with the sum of its place and an offset embedded."""

    def __init__(self):
        super().__init__()
        self.places, self.qkv, self.out = nn.Embedding(9, 8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.places((x[..., 0] > 0).long() * 2 + 1)
        query, key, value = self.qkv(x).chunk(3, -1)
        mask = torch.where(x[..., 1] > 1, -1e9, 0.0)[:, None, :]
        scores = query @ key.transpose(-1, -2) * 8**-0.5 + mask
        return self.out(scores.softmax(-1) @ value)


def test_attention_keeps_its_indices_and_its_masked_scores():
    torch.manual_seed(0)
    before = program(Attention(), (1, 6, 8))
    after = PASS(before, context(before))
    assert after.notes[0].startswith("2 weighted operators")
    (softmax,) = nodes(after, "aten.softmax")
    masked = softmax.args[0]
    product = masked.args[0]
    assert "add" in str(masked.target)
    assert "mul" in str(product.target)
    assert "matmul" in str(product.args[0].target)  # no Q between a product of matrices and the softmax
    assert all(scale < 1 for scale in scales(after))
    assert sqnr_db(answers(before), answers(after)) > 25


def test_symmetric_activations_have_zero_point_0(small_program):
    after = PASS(small_program, context(small_program, activation_symmetric=True))
    assert {node.args[2] for node in nodes(after, "quantized_decomposed.quantize_per_tensor")} == {0}
    assert sqnr_db(answers(small_program), answers(after)) > 15


def test_every_way_to_choose_ranges_is_honoured(small_program):
    samples = inputs(8, 1, (3, 12, 12))
    samples[0][0, 0, 0], samples[1][0, 0, 0] = 60.0, -2.0  # one value far from all others
    found = {}
    for method in ("minmax", "moving-average", "percentile", "mse", "entropy", "octav"):
        after = QuantizePt2e(calibration=method)(small_program, context(small_program, samples))
        assert after.quant.calibration == method
        found[method] = scales(after)[0]
    assert found["minmax"] == pytest.approx((60.0 - min(array.min() for array in samples)) / 255)
    assert found["percentile"] == found["minmax"]  # too few values for its default to leave one out
    assert len(set(found.values())) == 5
    assert all(scale < found["minmax"] for method, scale in found.items() if method not in ("minmax", "percentile"))


def test_the_percentile_is_honoured(small_program):
    wide, narrow = (
        replace(PASS, calibration="percentile", percentile=share)(small_program, context(small_program)) for share in (99.99, 95.0)
    )
    assert sum(scales(narrow)) < sum(scales(wide))
    with pytest.raises(ValueError, match="percentile is 50: it must be over 50"):
        QuantizePt2e(percentile=50)


def test_rounding_with_sums_and_correcting_biases_each_win_accuracy(small_program, small_quantized):
    wanted = answers(small_program)
    plain = QuantizePt2e(keep_sums=False, correct_bias=False)(small_program, context(small_program))
    sums = QuantizePt2e(correct_bias=False)(small_program, context(small_program))
    bias = QuantizePt2e(keep_sums=False)(small_program, context(small_program))
    assert len({item.digest() for item in (plain, sums, bias, small_quantized)}) == 4
    found = {name: sqnr_db(wanted, answers(item)) for name, item in (("plain", plain), ("bias", bias), ("both", small_quantized))}
    assert found["plain"] < min(found["bias"], found["both"])


def test_what_is_to_be_left_in_float_is_left_and_said(small_program):
    after = QuantizePt2e(skip=("stem", "fc"))(small_program, context(small_program))
    reason = "it was asked for (skip)"
    assert after.quant.left_float == (("stem", reason), ("fc", reason))
    assert f"left in float: stem: {reason}" in after.notes
    assert after.notes[0].startswith("1 weighted operators")
    with pytest.raises(UnknownName, match="the program has no layer 'head'") as caught:
        QuantizePt2e(skip=("head",))(small_program, context(small_program))
    assert "its layers are stem, depthwise, fc" in caught.value.fix


def test_a_layer_that_xnnpack_has_no_integers_for_is_said_to_be_float():
    class Volume(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.up = nn.Linear(8, 8), nn.ConvTranspose2d(4, 4, 2, 2, groups=2)

        def forward(self, x):
            return self.up(self.fc(x))

    before = program(Volume(), (1, 4, 8, 8))
    after = PASS(before, context(before))
    assert after.quant.left_float == (("up", "XNNPACK's quantizer does not take it"),)


def test_a_model_without_weights_is_nothing_to_do():
    before = program(nn.ReLU())
    with pytest.raises(NothingToDo, match="nothing to quantize"):
        PASS.apply(before, context(before))


def test_a_sample_with_nan_is_named(small_program):
    samples = inputs(3, 1, (3, 12, 12))
    samples[1][0, 0, 0] = np.nan
    with pytest.raises(DataError, match="calibration sample 2 of 3 makes tensor 'x' NaN or Inf"):
        PASS(small_program, context(small_program, samples))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activations": "uint8", "weights": "uint8"}, "uint8 activations and uint8 weights"),
        ({"reduce_range": True}, "reduce_range = true"),
        ({"sparsity": "2:4"}, "sparsity = 2:4"),
        ({"calibration": "output-mse"}, "calibration 'output-mse' looks at the readers"),
    ],
)
def test_what_xnnpack_does_not_compute_is_refused(small_program, changes, message):
    with pytest.raises(PreconditionError, match=message):
        PASS(small_program, context(small_program, **changes))


def test_another_runtime_is_refused(small_program):
    with pytest.raises(PreconditionError, match="places Q and DQ for executorch, but target 'x86-inductor' runs on inductor"):
        PASS(small_program, context(small_program, target=load("x86-inductor")))


def test_a_quantized_model_is_refused_whoever_quantized_it(small_program, small_quantized):
    for artifact in (small_quantized, replace(small_quantized, quant=None)):
        with pytest.raises(PreconditionError, match="quantized already"):
            PASS(artifact, context(small_program))


def test_it_asks_for_data_and_for_executorch(small_program, monkeypatch):
    with pytest.raises(DataNeeded, match="calibration"):
        PASS(small_program, context(small_program, []))
    from deploycc.backends.executorch import ExecuTorch

    monkeypatch.setattr(ExecuTorch, "available", lambda self: Availability(None, "the package executorch is not installed", "pip"))
    with pytest.raises(MissingDependency, match="quantize-pt2e: the package executorch is not installed"):
        PASS(small_program, context(small_program))


def test_a_weight_that_was_given_no_scales_is_an_error(small_program, monkeypatch):
    from deploycc.passes import _pt2e

    monkeypatch.setattr(_pt2e, "layers", lambda prepared, known=_pt2e.layers: known(prepared)[1:])
    with pytest.raises(PassError, match="a weight has no scales"):
        PASS(small_program, context(small_program))


def test_the_ladder_goes_on_with_other_ranges():
    assert [item.calibration for item in PASS.alternatives(TARGET)] == ["percentile", "entropy"]
    assert [item.calibration for item in QuantizePt2e(calibration="minmax").alternatives(TARGET)] == ["mse", "percentile", "entropy"]


def test_it_is_stored_and_read_by_a_process_that_has_not_seen_torchao(small_quantized, tmp_path):
    FORMS.get("program").save(small_quantized, tmp_path)
    code = (
        "import sys\nfrom pathlib import Path\nfrom deploycc.forms.program import read\n"
        f"found = read(Path({str(tmp_path / 'model.pt2')!r}))\nfrom deploycc.forms.program import ProgramForm\nprint(ProgramForm().digest(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1] == digest(small_quantized), done.stderr


def test_reading_it_without_torchao_says_what_to_install(small_quantized, tmp_path, monkeypatch):
    from deploycc.forms.program import read

    FORMS.get("program").save(small_quantized, tmp_path)
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantize_pt2e", None)
    with pytest.raises(SourceError, match="torchao is not installed") as caught:
        read(tmp_path / "model.pt2")
    assert caught.value.fix == "pip install 'torchao>=0.18'"
