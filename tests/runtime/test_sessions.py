from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from deploycc.errors import BundleError, MismatchError, SignatureError
from deploycc.runtime import sessions
from deploycc.runtime.sessions import onnxruntime as ort_session
from deploycc.runtime.signature import Signature, TensorSpec

RUNTIME = {"session": "onnxruntime", "package": "onnxruntime", "minimum": "1.30", "version": "1.32.0"}


def small(path: Path, *, ir: int = 10, opset: int = 20, op: str = "Relu") -> tuple[Path, Signature]:
    import onnx
    from onnx import TensorProto, helper

    def info(name: str):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4])

    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], "g", [info("x")], [info("y")])
    model = helper.make_model(graph, ir_version=ir, opset_imports=[helper.make_opsetid("", opset)])
    path.write_bytes(model.SerializeToString())
    assert onnx.load(path).ir_version == ir
    return path, Signature((TensorSpec("x", "float32", ("n", 4)),), (TensorSpec("y", "float32", ("n", 4)),))


def test_names_are_found_without_importing_them():
    assert "onnxruntime" in sessions.names()
    assert sessions.find("onnxruntime") is ort_session


def test_an_unknown_runtime_is_refused_and_not_imported():
    with pytest.raises(BundleError, match=r"runtime 'os', which .* does not know\n.*it knows .*onnxruntime"):
        sessions.find("os")


def test_version_is_the_installed_one():
    import onnxruntime

    assert ort_session.version() == onnxruntime.__version__


def test_it_runs_and_takes_a_named_axis_of_any_size(tmp_path: Path):
    path, signature = small(tmp_path / "m.onnx")
    with ort_session.open(path, signature, RUNTIME, 1) as session:
        for rows in (1, 3):
            x = np.linspace(-1, 1, rows * 4, dtype=np.float32).reshape(rows, 4)
            np.testing.assert_array_equal(session.run({"x": x})["y"], np.maximum(x, 0))
        session.synchronize()


def test_threads_and_options_are_set(tmp_path: Path):
    path, signature = small(tmp_path / "m.onnx")
    session = ort_session.open(path, signature, RUNTIME, 2)
    options = session._run.__self__.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert "SEQUENTIAL" in str(options.execution_mode)
    assert "ALL" in str(options.graph_optimization_level)
    assert session._run.__self__.get_providers() == ["CPUExecutionProvider"]


def test_feeds_that_do_not_fit_are_refused_also_after_good_ones(tmp_path: Path):
    path, signature = small(tmp_path / "m.onnx")
    session = ort_session.open(path, signature, RUNTIME, 1)
    good = {"x": np.zeros((1, 4), np.float32)}
    session.run(good)
    for bad in ({"x": np.zeros((1, 5), np.float32)}, {"x": np.zeros((1, 4))}, {"z": good["x"]}, {}):
        with pytest.raises(SignatureError):
            session.run(bad)
    session.run(good)


def test_a_closed_session_does_not_run(tmp_path: Path):
    path, signature = small(tmp_path / "m.onnx")
    with ort_session.open(path, signature, RUNTIME, 1) as session:
        pass
    with pytest.raises(BundleError, match="session is closed"):
        session.run({"x": np.zeros((1, 4), np.float32)})


def test_external_data_beside_the_file_is_found(tmp_path: Path, tiny_onnx: Path, tiny_signature: Signature):
    import onnx

    onnx.save(onnx.load(tiny_onnx), tmp_path / "m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    assert (tmp_path / "m.onnx.data").stat().st_size > 100
    feeds = {"image": np.ones((1, 3, 8, 8), np.float32)}
    outside = ort_session.open(tmp_path / "m.onnx", tiny_signature, RUNTIME, 1).run(feeds)
    inside = ort_session.open(tiny_onnx, tiny_signature, RUNTIME, 1).run(feeds)
    np.testing.assert_array_equal(outside["logits"], inside["logits"])


def test_a_newer_ir_names_the_version_and_both_values(tmp_path: Path):
    path, signature = small(tmp_path / "m.onnx", ir=99)
    with pytest.raises(MismatchError, match=r"ONNX IR version 99, but ONNX Runtime \d+\.\d+\S* reads at most \d+\n.*onnxruntime>=1.30"):
        ort_session.open(path, signature, RUNTIME, 1)


def test_a_newer_opset_names_the_version_and_both_values(tmp_path: Path):
    path, signature = small(tmp_path / "m.onnx", opset=99)
    with pytest.raises(MismatchError, match=r"ONNX opset 99, but ONNX Runtime \S+ reads at most \d+\n.*install a newer onnxruntime"):
        ort_session.open(path, signature, {}, 1)


@pytest.mark.parametrize("content", [b"", b"not a model" * 20])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes):
    _, signature = small(tmp_path / "good.onnx")
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"ONNX Runtime \S+ cannot load m.onnx: "):
        ort_session.open(tmp_path / "m.onnx", signature, RUNTIME, 1)


def test_an_unknown_operator_is_named(tmp_path: Path):
    path, signature = small(tmp_path / "m.onnx", op="Nope")
    with pytest.raises(BundleError, match="Nope"):
        ort_session.open(path, signature, RUNTIME, 1)


def test_a_model_of_another_signature_is_refused(tmp_path: Path, tiny_signature: Signature):
    path, _ = small(tmp_path / "m.onnx")
    with pytest.raises(BundleError, match="has the inputs x, but its signature says image"):
        ort_session.open(path, tiny_signature, RUNTIME, 1)


def test_a_missing_onnxruntime_says_what_to_install(tmp_path: Path):
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from pathlib import Path\n"
        "from deploycc.errors import MismatchError\n"
        "from deploycc.runtime.sessions import onnxruntime as session\n"
        "try: session.open(Path('m.onnx'), None, {'minimum': '1.30'}, 1)\n"
        "except MismatchError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "does not import here" in done.stdout
    assert "pip install 'onnxruntime>=1.30'" in done.stdout


def test_a_call_costs_little_more_than_onnxruntimes_own(tmp_path: Path):
    path, signature = small(tmp_path / "m.onnx")
    session = ort_session.open(path, signature, RUNTIME, 1)
    feeds = {"x": np.zeros((1, 4), np.float32)}
    bare = session._run

    def seconds(call) -> float:
        begin = time.perf_counter_ns()
        for _ in range(200):
            call()
        return time.perf_counter_ns() - begin

    ours, theirs = zip(*((seconds(lambda: session.run(feeds)), seconds(lambda: bare(["y"], feeds))) for _ in range(25)), strict=True)
    assert min(ours) < 2.5 * min(theirs)  # of the least call there is: a Relu of four numbers
