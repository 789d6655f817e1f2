"""OpenVINO the way a device runs a bundle."""

from pathlib import Path

import numpy as np
import pytest

from deploycc.errors import BundleError, MismatchError, SignatureError
from deploycc.runtime import sessions
from deploycc.runtime.machine import available_cores
from deploycc.runtime.sessions import openvino as session_module
from deploycc.runtime.signature import Signature, TensorSpec

ov = pytest.importorskip("openvino", reason="openvino is not installed")

RUNTIME = {"session": "openvino", "package": "openvino", "minimum": "2025.0", "version": "2026.4.1", "precision": "f32"}


def small(path: Path) -> tuple[Path, Signature]:
    x = ov.opset13.parameter([-1, 4], np.float32, name="x")
    y = ov.opset13.relu(x)
    x.output(0).set_names({"x"})
    y.output(0).set_names({"y"})
    ov.save_model(ov.Model([ov.opset13.result(y)], [x], "m"), str(path))
    return path, Signature((TensorSpec("x", "float32", ("n", 4)),), (TensorSpec("y", "float32", ("n", 4)),))


def test_version_is_the_installed_one(monkeypatch):
    assert sessions.find("openvino").version() in ov.__version__
    monkeypatch.setattr(session_module.importlib.metadata, "version", missing)
    assert session_module.version() is None


def missing(name):
    raise session_module.importlib.metadata.PackageNotFoundError(name)


def test_it_runs_and_takes_a_named_axis_of_any_size(tmp_path):
    path, signature = small(tmp_path / "m.xml")
    with session_module.open(path, signature, RUNTIME, 1) as session:
        answers = []
        for rows in (1, 3):
            x = np.linspace(-1, 1, rows * 4, dtype=np.float32).reshape(rows, 4)
            answers.append((x, session.run({"x": x})["y"]))
        session.synchronize()
    for x, y in answers:  # the first answer is no window on memory that the second call wrote to
        np.testing.assert_array_equal(y, np.maximum(x, 0))


def test_the_throughput_hint_divides_the_samples_of_a_call_among_streams(tmp_path):
    path, signature = small(tmp_path / "m.xml")
    with session_module.open(path, signature, RUNTIME | {"hint": "throughput"}, 3) as session:
        assert len(session._requests) == min(3, available_cores())
        seen = []
        for rows in (1, 2, 3, 8):
            x = np.linspace(-1, 1, rows * 4, dtype=np.float32).reshape(rows, 4)
            seen.append((x, session.run({"x": x})["y"]))
    for x, y in seen:
        np.testing.assert_array_equal(y, np.maximum(x, 0))


def test_one_thread_is_one_stream_whatever_the_hint(tmp_path):
    path, signature = small(tmp_path / "m.xml")
    with session_module.open(path, signature, RUNTIME | {"hint": "throughput"}, 1) as session:
        assert len(session._requests) == 1
        np.testing.assert_array_equal(session.run({"x": np.ones((2, 4), np.float32)})["y"], np.ones((2, 4)))


def test_an_input_that_does_not_lie_in_a_row_is_read_right(tmp_path):
    path, signature = small(tmp_path / "m.xml")
    x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(4, 2).T
    with session_module.open(path, signature, RUNTIME, 1) as session:
        np.testing.assert_array_equal(session.run({"x": x})["y"], np.maximum(x, 0))


def test_threads_and_precision_are_set(tmp_path):
    path, signature = small(tmp_path / "m.xml")
    loaded = session_module.open(path, signature, RUNTIME, 2)._requests[0].get_compiled_model()
    assert loaded.get_property("INFERENCE_NUM_THREADS") == 2
    assert loaded.get_property("NUM_STREAMS") == 1
    assert str(loaded.get_property("INFERENCE_PRECISION_HINT")) == "<Type: 'float32'>"


def test_feeds_that_do_not_fit_are_refused_also_after_good_ones(tmp_path):
    path, signature = small(tmp_path / "m.xml")
    with session_module.open(path, signature, RUNTIME, 1) as session:
        session.run({"x": np.zeros((1, 4), np.float32)})
        with pytest.raises(SignatureError):
            session.run({"x": np.zeros((1, 5), np.float32)})


def test_a_closed_session_does_not_run(tmp_path):
    path, signature = small(tmp_path / "m.xml")
    with session_module.open(path, signature, RUNTIME, 1) as session:
        pass
    with pytest.raises(BundleError, match="closed"):
        session.run({"x": np.zeros((1, 4), np.float32)})


def test_a_precision_that_the_cpu_lacks_is_refused(tmp_path, monkeypatch):
    path, signature = small(tmp_path / "m.xml")

    class Older:
        def get_property(self, device, name):
            return ["FP32", "INT8"]

    monkeypatch.setattr(ov, "Core", Older)
    with pytest.raises(MismatchError, match="in bf16, which OpenVINO does not do on this CPU"):
        session_module.open(path, signature, {**RUNTIME, "precision": "bf16"}, 1)


def test_a_damaged_file_is_refused(tmp_path):
    path, signature = small(tmp_path / "m.xml")
    path.write_text(path.read_text()[:200])
    with pytest.raises(BundleError, match=r"cannot load m\.xml"):
        session_module.open(path, signature, RUNTIME, 1)


def test_a_model_of_another_signature_is_refused(tmp_path):
    path, signature = small(tmp_path / "m.xml")
    other = Signature((TensorSpec("z", "float32", ("n", 4)),), signature.outputs)
    with pytest.raises(BundleError, match="has the inputs x, but its signature says z"):
        session_module.open(path, other, RUNTIME, 1)


def test_a_tensor_may_have_several_names(tmp_path):
    path, signature = small(tmp_path / "m.xml")
    text = path.read_text()
    assert 'names="y"' in text
    path.write_text(text.replace('names="y"', 'names="a,y,the_answer"'))
    with session_module.open(path, signature, RUNTIME, 1) as session:
        np.testing.assert_array_equal(session.run({"x": np.full((1, 4), 2, np.float32)})["y"], np.full((1, 4), 2, np.float32))


def test_a_missing_openvino_says_what_to_install(tmp_path, monkeypatch):
    path, signature = small(tmp_path / "m.xml")
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(MismatchError, match=r"needs openvino") as caught:
        session_module.open(path, signature, RUNTIME, 1)
    assert "openvino>=2025.0" in caught.value.fix


def test_what_is_compiled_is_kept_where_it_is_asked_for(tmp_path, monkeypatch):
    """The second time it comes out of the folder, with the same answers; without the variable nothing is written."""
    path, signature = small(tmp_path / "m.xml")
    x, before = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4), sorted(tmp_path.rglob("*"))
    for root in ("", tmp_path / "kept", tmp_path / "kept"):
        monkeypatch.setenv(session_module.CACHE, str(root))
        with session_module.open(path, signature, RUNTIME, 1) as session:
            np.testing.assert_array_equal(session.run({"x": x})["y"], np.maximum(x, 0))
            hit = session._requests[0].get_compiled_model().get_property("LOADED_FROM_CACHE")
        if not root:
            assert sorted(tmp_path.rglob("*")) == before
    assert hit
    assert len(list((tmp_path / "kept" / "openvino").glob("*.blob"))) == 1
    monkeypatch.setenv(session_module.CACHE, str(path))
    with pytest.raises(BundleError, match=r"DEPLOYCC_CACHE is .*m\.xml, where no folder can be made"):
        session_module.open(path, signature, RUNTIME, 1)
