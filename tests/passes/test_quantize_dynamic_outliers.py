"""Outlier channels in float: quantize-dynamic{outliers=…}."""

from dataclasses import replace

import numpy as np
import pytest
from graphs import ANY, context, graph, kinds, needs_wide_products, onnx_artifact, outputs

from deploycc.core.artifact import Artifact
from deploycc.core.compare import drift
from deploycc.core.contract import Context, Dataset, Sample
from deploycc.core.data import Data
from deploycc.core.pipeline import Pipeline
from deploycc.errors import DataError, DataNeeded, SpecError
from deploycc.passes.quantize_dynamic import QuantizeDynamic

CHANNELS = 64
WEIGHT = np.random.default_rng(0).standard_normal((CHANNELS, 16)).astype(np.float32)
QUANT = {"arch": "aarch64", "quant": {"reduce_range": False}}


class Rows:
    """Calibration samples."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return Sample({"x": self.rows[index]}, None, f"sample {index}")

    def label(self, index: int) -> None:
        return None

    def digest(self, index: int) -> str:
        return str(index)


def rows(seed: int, *outliers: int) -> np.ndarray:
    """32 rows whose channels `outliers` are 40 times as large as the others."""
    found = np.random.default_rng(seed).standard_normal((32, CHANNELS)).astype(np.float32)
    found[:, list(outliers)] *= 40
    return found


def watched(artifact: Artifact, samples: np.ndarray) -> Context:
    return replace(context(artifact, **QUANT), data=Data(None, Dataset("d", {"all": Rows(samples)})))


def product() -> Artifact:
    artifact = onnx_artifact(graph(f"(float[N,{CHANNELS}] x) => (float[N,16] y) {{ y = MatMul(x, w) }}", w=WEIGHT))
    artifact.model.graph[0].name = "n0"
    return artifact


@needs_wide_products
def test_outliers_in_float_save_the_others():
    artifact, feeds = product(), {"x": rows(1, 5, 40)}
    ctx = watched(artifact, rows(0, 5, 40))
    plain, split = (QuantizeDynamic(outliers=count)(artifact, ctx) for count in (0, 4))
    reference = [outputs(artifact, feeds)]
    gained = drift(reference, [outputs(split, feeds)]).sqnr_db - drift(reference, [outputs(plain, feeds)]).sqnr_db
    assert gained > 20
    assert split.details == {"outliers": {"x": [5, 40]}}
    assert "2 outlier channels of 1 tensors are multiplied in float" in split.notes
    assert split.quant is not None
    assert split.quant.left_float == (("n0/outlier_MatMul (MatMul)", "outliers= keeps these channels in float"),)
    assert "inliers" not in " ".join(node.name or "" for node in plain.model.graph)


def test_the_parts_by_hand():
    artifact = product()
    result = QuantizeDynamic(outliers=4)(artifact, watched(artifact, rows(0, 5, 40)))
    stored = {name: value.const_value.numpy() for name, value in result.model.graph.initializers.items()}
    assert stored["x_outliers"].tolist() == [5, 40]
    assert np.flatnonzero(stored["x_inliers"] == 0).tolist() == [5, 40]
    np.testing.assert_array_equal(stored["n0_outlier_weight"], WEIGHT[[5, 40]])
    assert not stored["w_quantized"][[5, 40]].any()
    kept = np.delete(WEIGHT, [5, 40], axis=0)
    np.testing.assert_allclose(stored["w_scale"], np.abs(kept).max(axis=0) / 127, rtol=1e-6)
    only = np.zeros((1, CHANNELS), np.float32)
    only[0, 40] = 123.0  # an outlier alone is exact
    np.testing.assert_allclose(outputs(result, {"x": only})["y"], 123 * WEIGHT[40:41], rtol=1e-6)


def test_a_tensor_is_parted_once_for_all_its_readers():
    body = f"(float[N,{CHANNELS}] x) => (float[N,16] y) {{ a = MatMul(x, w) b = Gemm<transB=1>(x, v, t) y = Sub(a, b) }}"
    artifact = onnx_artifact(graph(body, w=WEIGHT, v=WEIGHT.T[:, ::-1].copy(), t=np.ones(16, np.float32)))
    result = QuantizeDynamic(outliers=4)(artifact, watched(artifact, rows(0, 5)))
    found = kinds(result)
    assert (found.count("Gather"), found.count("DynamicQuantizeLinear"), found.count("MatMulInteger")) == (1, 1, 2)
    feeds = {"x": rows(1, 5)}
    assert drift([outputs(artifact, feeds)], [outputs(result, feeds)]).sqnr_db > 35


def test_without_outliers_nothing_is_parted():
    artifact = product()
    result = QuantizeDynamic(outliers=4)(artifact, watched(artifact, rows(0)))
    assert "Gather" not in kinds(result)
    assert "no tensor has outlier channels" in result.notes


def test_a_product_inside_an_if_is_not_watched():
    body = f"""(float[2,{CHANNELS}] x, bool f) => (float[2,16] y, float[2,{CHANNELS}] z) {{ z = Neg(x) y = If(f)
        <then_branch = t() => (float[2,16] a) {{ a = MatMul(x, w) }}, else_branch = e() => (float[2,16] b) {{ b = MatMul(z, w) }}> }}"""
    artifact = onnx_artifact(graph(body, w=WEIGHT))
    result = QuantizeDynamic(outliers=4)(artifact, watched(artifact, rows(0, 5)))
    assert "no tensor has outlier channels" in result.notes


def test_it_needs_data():
    artifact = product()
    with pytest.raises(DataNeeded, match="needs calibration data"):
        QuantizeDynamic(outliers=4)(artifact, context(artifact, **QUANT))


def test_a_sample_with_nan_is_named():
    artifact, samples = product(), rows(0, 5)
    samples[3, 7] = np.nan
    with pytest.raises(DataError, match="calibration sample 4 of 32 makes tensor 'x' NaN or Inf"):
        QuantizeDynamic(outliers=4)(artifact, watched(artifact, samples))


def test_a_negative_number_is_refused():
    with pytest.raises(SpecError, match="outliers is -1: it must be 0 or more"):
        Pipeline.parse("quantize-dynamic{outliers=-1}")


def test_the_next_rung_has_outliers_in_float():
    assert QuantizeDynamic(embeddings=True).alternatives(ANY) == (QuantizeDynamic(embeddings=True, outliers=8),)
    assert QuantizeDynamic(outliers=2).alternatives(ANY) == ()
