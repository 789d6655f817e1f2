"""Averages of several models in one graph: the numbers, the kernels, and what may not be averaged."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.contract import Dataset, Sample
from deploycc.core.data import Data
from deploycc.core.pipeline import Pipeline
from deploycc.errors import BundleError, PreconditionError, SourceError, SpecError
from deploycc.forms import onnx as form
from deploycc.package.bundle import write
from deploycc.passes._opset import convert, opset_of
from deploycc.passes.ensemble import Ensemble
from deploycc.passes.quantize_static import QuantizeStatic
from tests import graphs

CLASSES = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture
def tiny(tiny_onnx, make_contents):
    """Makes the tiny model with other weights."""

    def make(seed, **fields):
        model = form.clone(form.read(tiny_onnx))
        rng = np.random.default_rng(seed)
        for name, value in model.graph.initializers.items():
            assert value.const_value is not None
            shape = value.const_value.numpy().shape
            value.const_value = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name)
        fields = {"transform": make_contents().artifact.transform, **fields}
        return Artifact(Form.ONNX, model, form.signature(model), f"tiny{seed}.onnx", **fields)

    return make


@pytest.fixture
def bundle(tmp_path, make_contents):
    """Writes an artifact as the bundle `name`."""

    def make(artifact, name, file="model.onnx", content=None):
        contents = make_contents()
        folder = tmp_path / f"{name}-built"
        folder.mkdir()
        if content is None:
            form.write(artifact.model, folder)
            (folder / "model.onnx").rename(folder / file)
        else:
            (folder / file).write_bytes(content)
        built = replace(contents.built, folder=folder, files=(file,), signature=artifact.signature)
        shipped = contents.shipped.model_copy(update={"quant": artifact.quant})
        return str(write(tmp_path / name, make_contents(artifact=artifact, built=built, shipped=shipped, feeds=(), outputs=())).folder)

    return make


def feeds(seed=9):
    return {"image": np.random.default_rng(seed).standard_normal((1, 3, 8, 8)).astype(np.float32)}


def scores(artifact):
    return graphs.outputs(artifact, feeds())["logits"].astype(np.float64)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Noise:
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return Sample({"image": feeds(index)["image"][0]}, None, str(index))

    def label(self, index):
        return None

    def digest(self, index):
        return str(index)


def quantized(artifact):
    ready = replace(graphs.context(artifact), data=Data(Dataset("noise", {"calibration": Noise(), "val": Noise()})))
    return QuantizeStatic()(artifact, ready)


def optimized(artifact, folder):
    """Operators of the runtime's own graph."""
    path = form.write(artifact.model, folder)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in ir.load(folder / "optimized.onnx").graph)


# --- the average


@pytest.mark.parametrize(("weights", "shares"), [((), (1 / 3, 1 / 3, 1 / 3)), ((1.0, 1.0, 2.0), (0.25, 0.25, 0.5))])
def test_the_mean_is_that_of_the_members_outputs(tiny, bundle, weights, shares):
    own, a, b = tiny(1), tiny(2), tiny(3)
    before = form.OnnxForm().digest(own.model)
    members = (bundle(a, "a"), bundle(b, "b"))
    after = Ensemble(members=members, weights=weights)(own, graphs.context(own))
    wanted = sum(share * scores(item) for share, item in zip(shares, (own, a, b), strict=True))
    np.testing.assert_allclose(scores(after), wanted, rtol=1e-5, atol=1e-6)
    assert form.signature(after.model) == own.signature == after.signature
    assert form.OnnxForm().digest(own.model) == before
    assert after.quant is None
    assert [row["weight"] for row in after.details["members"]] == pytest.approx(shares)
    assert [row["name"] for row in after.details["members"]] == ["the model", *members]
    names = [node.name for node in after.model.graph]
    assert len(set(names)) == len(names)


def test_softmax_averages_probabilities_and_gives_their_logits(tiny, bundle):
    own, other = tiny(1), tiny(2)
    after = Ensemble(members=(bundle(other, "a"),), mode="softmax", weights=(1.0, 3.0))(own, graphs.context(own))
    wanted = 0.25 * softmax(scores(own)) + 0.75 * softmax(scores(other))
    np.testing.assert_allclose(softmax(scores(after)), wanted, rtol=1e-5, atol=1e-7)


def test_a_probability_of_nothing_stays_a_number():
    body = "(float[1,2] x) => (float[1,2] y) { y = Add (x, w) }"
    own, other = (graphs.onnx_artifact(graphs.graph(body, w=np.array([[0, far]], np.float32))) for far in (-400, -500))
    after = Ensemble(members=("other.onnx",), mode="softmax")(own, capturing(own, other))
    found = graphs.outputs(after, {"x": np.zeros((1, 2), np.float32)})["y"]
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0, 1], np.log(np.finfo(np.float32).tiny), rtol=1e-4)


def capturing(artifact, *others, **tables):
    """A context whose models are `others`, in order of their names."""
    left = iter(others)
    known = {}
    return replace(graphs.context(artifact, **tables), capture=lambda text: known.setdefault(text, known.get(text) or next(left)))


def test_every_output_is_averaged():
    body = "(float[1,3] x) => (float[1,3] y, float[1,2] z) { y = Add (x, v) z = MatMul (x, w) }"
    rng = np.random.default_rng(0)

    def make():
        return graphs.onnx_artifact(graphs.graph(body, v=rng.normal(size=3).astype(np.float32), w=rng.normal(size=(3, 2)).astype("f")))

    own, other = make(), make()
    after = Ensemble(members=("other.onnx",))(own, capturing(own, other))
    x = {"x": rng.normal(size=(1, 3)).astype(np.float32)}
    first, second, found = (graphs.outputs(item, x) for item in (own, other, after))
    for name in ("y", "z"):
        np.testing.assert_allclose(found[name], (first[name] + second[name]) / 2, rtol=1e-5, atol=1e-6)
    with pytest.raises(PreconditionError, match="mode=softmax averages one output, but the model has 2"):
        Ensemble(members=("other.onnx",), mode="softmax")(own, capturing(own, other))


def test_a_member_may_be_an_ensemble_and_the_model_too(tiny, bundle):
    own, a, b, c = (tiny(seed) for seed in (1, 2, 3, 4))
    pair = Ensemble(members=(bundle(a, "a"),))(own, graphs.context(own))
    other = Ensemble(members=(bundle(c, "c"),))(b, graphs.context(b))
    after = Ensemble(members=(bundle(other, "pair"),))(pair, graphs.context(own))
    np.testing.assert_allclose(scores(after), sum(scores(item) for item in (own, a, b, c)) / 4, rtol=1e-5, atol=1e-6)
    names = [node.name for node in after.model.graph]
    assert len(set(names)) == len(names)


def test_sub_graphs_keep_reading_what_they_read():
    body = """(float[1,2] x) => (float[1,2] y) {
        s = ReduceSum <keepdims = 0> (x)
        c = Greater (s, zero)
        y = If (c) <then_branch = t () => (float[1,2] a) { a = Mul (x, w) }, else_branch = e () => (float[1,2] b) { b = Neg (x) }>
    }"""
    zero = np.array(0, np.float32)
    own, other = (graphs.onnx_artifact(graphs.graph(body, w=np.array(w, np.float32), zero=zero)) for w in (2, 4))
    after = Ensemble(members=("other.onnx",))(own, capturing(own, other))
    np.testing.assert_allclose(graphs.outputs(after, {"x": np.ones((1, 2), np.float32)})["y"], [[3, 3]])
    np.testing.assert_allclose(graphs.outputs(after, {"x": -np.ones((1, 2), np.float32)})["y"], [[1, 1]])


def test_an_onnx_file_is_captured_like_any_model(tiny, tmp_path):
    from deploycc.core.contract import ModelRequest
    from deploycc.sources.models.onnx import OnnxModel

    own, other = tiny(1), tiny(2)
    path = form.write(other.model, tmp_path)
    ready = replace(graphs.context(own), capture=lambda text: OnnxModel().load(ModelRequest(text)))
    after = Ensemble(members=(str(path),))(own, ready)
    np.testing.assert_allclose(scores(after), (scores(own) + scores(other)) / 2, rtol=1e-5, atol=1e-6)
    with pytest.raises(SourceError, match="there is no file"):
        Ensemble(members=("nothing.onnx",))(own, ready)


# --- integers, opsets


def test_int8_members_stay_int8(tiny, bundle, tmp_path):
    own, other = quantized(tiny(1)), quantized(tiny(2))
    alone = tmp_path / "alone"
    alone.mkdir()
    after = Ensemble(members=(bundle(other, "a"),))(own, graphs.context(own))
    np.testing.assert_allclose(scores(after), (scores(own) + scores(other)) / 2, rtol=1e-5, atol=1e-6)
    one, two = optimized(own, alone), optimized(after, tmp_path)
    assert one["QLinearConv"] == one["QGemm"] == 1
    assert two["QLinearConv"] == two["QGemm"] == 2
    assert two["Conv"] == two["Gemm"] == 0
    assert after.quant == own.quant


def test_what_stayed_float_is_told_of_every_member(tiny, bundle):
    info = QuantInfo("static", "int8", "uint8", True, True, "minmax", (("Gemm fc", "asked to"),))
    own, member = tiny(1, quant=info), bundle(tiny(2, quant=replace(info, left_float=(("Conv c", "too small"),))), "a")
    after = Ensemble(members=(member,))(own, graphs.context(own))
    assert after.quant == replace(info, left_float=(("Gemm fc", "asked to"), (f"{member}: Conv c", "too small")))


def test_a_mix_of_float_and_int8_is_noted(tiny, bundle):
    own = quantized(tiny(1))
    after = Ensemble(members=(bundle(tiny(2), "a"),))(own, graphs.context(own))
    assert after.quant is None
    assert any("quantized differently: the model: method=static" in note and "float" in note for note in after.notes)


def test_opsets_are_made_equal(tiny):
    own, other = tiny(1), tiny(2)
    old = replace(other, model=convert(other.model, 17))
    after = Ensemble(members=("old.onnx",))(own, capturing(own, old))
    assert opset_of(after.model) == 20
    np.testing.assert_allclose(scores(after), (scores(own) + scores(other)) / 2, rtol=1e-5, atol=1e-6)
    assert any("opsets 17, 20 brought to 20" in note for note in after.notes)
    low = Ensemble(members=("old.onnx",))(own, capturing(own, old, runtime={"opset": 18}))
    assert opset_of(low.model) == 18


def test_notices_of_members_are_kept(tiny, bundle):
    own, member = tiny(1, notices=("mine",)), bundle(tiny(2, notices=("mine", "random weights")), "a")
    assert Ensemble(members=(member,))(own, graphs.context(own)).notices == ("mine", "random weights")


# --- what may not be averaged


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("members=a,a", "members names a twice"),
        ("members=a,b weights=1,1", "2 weights for the model and 2 members: give 3"),
        ("members=a weights=1,0", "weights are 1, 0: each must be over 0"),
    ],
)
def test_options_that_cannot_be_are_refused(text, said):
    with pytest.raises(SpecError, match=said):
        Pipeline.parse(f"ensemble{{{text}}}")


def test_without_members_it_asks_for_them(tiny):
    with pytest.raises(PreconditionError, match="no members"):
        Ensemble()(tiny(1), graphs.context(tiny(1)))


def test_a_missing_or_changed_bundle_is_refused(tiny, bundle, tmp_path):
    own = tiny(1)
    with pytest.raises(BundleError, match="is not a bundle"):
        Ensemble(members=(str(tmp_path / "nothing"),))(own, graphs.context(own))
    folder = bundle(tiny(2), "a")
    path = next(Path(folder).rglob("model.onnx"))
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(BundleError, match="was changed"):
        Ensemble(members=(folder,))(own, graphs.context(own))


def test_a_bundle_without_an_onnx_graph_is_refused(tiny, bundle):
    own = tiny(1)
    with pytest.raises(PreconditionError, match=r"holds model\.pt, not an ONNX graph"):
        Ensemble(members=(bundle(tiny(2), "a", "model.pt"),))(own, graphs.context(own))
    with pytest.raises(SourceError, match=r"model\.onnx cannot be read"):
        Ensemble(members=(bundle(tiny(2), "b", content=b"no model"),))(own, graphs.context(own))


def test_other_classes_are_refused_with_both_signatures(tiny):
    own = tiny(1)
    other = replace(own, signature=replace(own.signature, outputs=(replace(own.signature.outputs[0], shape=(1, 7)),)))
    with pytest.raises(PreconditionError, match=r"the model \(tiny1.onnx\) gives .*5.*, but member other.onnx .*7"):
        Ensemble(members=("other.onnx",))(own, capturing(own, other))
    other = replace(own, signature=replace(own.signature, inputs=(replace(own.signature.inputs[0], shape=(1, 3, 9, 9)),)))
    with pytest.raises(PreconditionError, match=r"takes .*8.*, but member other.onnx .*9"):
        Ensemble(members=("other.onnx",))(own, capturing(own, other))


def test_another_transform_is_refused_with_both_values(tiny):
    own = tiny(1)
    assert own.transform is not None
    other = replace(own, transform=replace(own.transform, color="BGR"))
    with pytest.raises(PreconditionError, match=r"has color = RGB, that of member other.onnx BGR"):
        Ensemble(members=("other.onnx",))(own, capturing(own, other))
    named = replace(own, transform=replace(own.transform, classes=("eel", *CLASSES[:-1])))
    with pytest.raises(PreconditionError, match="has classes = "):
        Ensemble(members=("other.onnx",))(own, capturing(own, named))
    for fits in (None, replace(own.transform, classes=None)):
        Ensemble(members=("other.onnx",))(own, capturing(own, replace(own, transform=fits)))


def test_probabilities_are_no_logits(tiny):
    own = tiny(1)
    assert own.transform is not None
    with pytest.raises(PreconditionError, match="needs no softmax"):
        Ensemble(members=("a.onnx",), mode="softmax")(replace(own, transform=replace(own.transform, softmax=False)), graphs.context(own))


def test_whole_numbers_are_not_averaged():
    own = graphs.onnx_artifact(graphs.graph("(float[1,3] x) => (int64[1] y) { y = ArgMax <axis = 1, keepdims = 0> (x) }"))
    with pytest.raises(PreconditionError, match="not float: it cannot be averaged"):
        Ensemble(members=("a.onnx",))(own, graphs.context(own))


def test_a_module_is_no_member(tiny):
    own = tiny(1)
    with pytest.raises(PreconditionError, match=r"member other\.onnx is a MODULE"):
        Ensemble(members=("other.onnx",))(own, capturing(own, replace(own, form=Form.MODULE)))


def test_two_versions_of_other_operators_are_refused(tiny):
    own, other = tiny(1), tiny(2)
    own.model.opset_imports["com.microsoft"] = 1
    other.model.opset_imports["com.microsoft"] = 2
    with pytest.raises(PreconditionError, match=r"the model uses version 1 of the operators com\.microsoft, other.onnx version 2"):
        Ensemble(members=("other.onnx",))(own, capturing(own, other))


def test_the_sum_over_the_limit_is_refused_with_every_size(tiny, bundle):
    own, member = tiny(1), bundle(tiny(2), "a")
    with pytest.raises(PreconditionError, match=r"the model 0\.001 MB, .* 0\.001 MB\), over the limit model_mb = 0\.0008"):
        Ensemble(members=(member,))(own, graphs.context(own, limits={"model_mb": 0.0008}))
    Ensemble(members=(member,))(own, graphs.context(own, limits={"model_mb": 0.0012}))
