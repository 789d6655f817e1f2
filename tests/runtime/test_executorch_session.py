"""The session of a .pte file: threads, feeds, and what it refuses."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deploycc.errors import BundleError, MismatchError, SignatureError
from deploycc.runtime.sessions import executorch as session_module
from deploycc.runtime.signature import Signature, TensorSpec

pytest.importorskip("executorch", reason="the extra executorch is not installed")
pytest.importorskip("torchao", reason="the extra executorch is not installed")

SIGNATURE = Signature((TensorSpec("x", "float32", (2, 8)),), (TensorSpec("y", "float32", (2, 4)),))


@pytest.fixture(scope="module")
def linear():
    torch.manual_seed(0)
    return nn.Linear(8, 4).eval()


@pytest.fixture(scope="module")
def pte(linear, tmp_path_factory):
    from deploycc.backends._executorch_lower import lower

    path = tmp_path_factory.mktemp("pte") / "model.pte"
    path.write_bytes(lower(torch.export.export(linear, (torch.zeros(2, 8),))))
    return path


def feeds(seed=0):
    return {"x": np.random.default_rng(seed).standard_normal((2, 8)).astype(np.float32)}


def wanted(linear, given):
    with torch.inference_mode():
        return linear(torch.from_numpy(given["x"].copy())).numpy()


def test_it_runs_what_is_fed_and_leaves_it_alone(pte, linear):
    with session_module.open(pte, SIGNATURE, {}, 1) as session:
        first = feeds(1)
        kept = first["x"].copy()
        found = session.run(first)["y"]
        session.synchronize()
        session.run(feeds(2))
        np.testing.assert_allclose(found, wanted(linear, first), atol=1e-6)  # not overwritten by the next call
        np.testing.assert_array_equal(first["x"], kept)


def test_any_memory_layout_may_be_fed(pte, linear):
    turned = np.asfortranarray(feeds(3)["x"])
    turned.flags.writeable = False
    with session_module.open(pte, SIGNATURE, {}, 1) as session:
        np.testing.assert_allclose(session.run({"x": turned})["y"], wanted(linear, {"x": turned}), atol=1e-6)


def test_sessions_of_unlike_threads_share_a_process(pte, linear):
    one, two = (session_module.open(pte, SIGNATURE, {}, threads) for threads in (1, 2))
    for seed in range(20):
        for session, threads in ((one, 1), (two, 2)):
            np.testing.assert_allclose(session.run(feeds(seed))["y"], wanted(linear, feeds(seed)), atol=1e-6)
            assert session._binding._threadpool_get_thread_count() == threads
    with one, two:
        pass


def test_a_closed_session_and_wrong_feeds_are_refused(pte):
    with session_module.open(pte, SIGNATURE, {}, 1) as session, pytest.raises(SignatureError, match="float64"):
        session.run({"x": np.zeros((2, 8))})
    with pytest.raises(BundleError, match="this session is closed"):
        session.run(feeds())


def test_a_damaged_file_is_refused_with_executorchs_reason(pte, tmp_path):
    cut = tmp_path / "model.pte"
    cut.write_bytes(pte.read_bytes()[:-100])
    with pytest.raises(BundleError, match=r"ExecuTorch [\d.]+ cannot load model\.pte: ."):
        session_module.open(cut, SIGNATURE, {}, 1)
    with pytest.raises(BundleError, match=r"cannot load none\.pte"):
        session_module.open(tmp_path / "none.pte", SIGNATURE, {}, 1)


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ((TensorSpec("x", "float32", (1, 8)),), SIGNATURE.outputs, r"inputs of shape \[2, 8\], but its signature says x: float32\[1, 8\]"),
        (SIGNATURE.inputs, (TensorSpec("y", "int64", (2, 4)),), r"outputs of shape \[2, 4\], but its signature says y: int64\[2, 4\]"),
        (SIGNATURE.inputs, (*SIGNATURE.outputs, *SIGNATURE.outputs), "outputs of shape"),
    ],
)
def test_a_file_of_another_signature_is_refused(pte, inputs, outputs, message):
    with pytest.raises(BundleError, match=message):
        session_module.open(pte, Signature(inputs, outputs), {}, 1)


def test_without_executorch_it_says_what_to_install(pte, monkeypatch):
    monkeypatch.setitem(sys.modules, session_module.BINDING, None)
    with pytest.raises(MismatchError, match=r"model\.pte needs ExecuTorch 1\.6 and the PyTorch it was built with") as caught:
        session_module.open(Path("model.pte"), SIGNATURE, {"minimum": "1.6"}, 1)
    assert "C++ runner" in caught.value.fix

    def absent(name):
        raise session_module.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(session_module.importlib.metadata, "version", absent)
    assert session_module.version() is None
