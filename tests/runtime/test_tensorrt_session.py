"""The device's session on stand-ins for TensorRT and its driver that have the recorded names of 8.5, 10.16 and 11.4, and no others."""

import json
import sys

import numpy as np
import pytest
from fake_tensorrt import VERSIONS, Driver, Fake

from deploycc.errors import BundleError, MismatchError, SignatureError
from deploycc.runtime import cuda, sessions
from deploycc.runtime import tensorrt_engine as engine
from deploycc.runtime.sessions import tensorrt as session_module
from deploycc.runtime.signature import Signature, TensorSpec
from deploycc.runtime.tensorrt_engine import Recipe

TYPED = [version for version in VERSIONS if not version.startswith("8.")]
SIGNATURE = Signature((TensorSpec("x", "float32", ("n", 3)),), (TensorSpec("y", "float32", ("n", 3)),))
GPU = cuda.Gpu("A GPU", "8.9", "580.1")
RECIPE = Recipe("f16", profiles={"x": ((1, 3), (2, 3), (4, 3))}, workspace_mb=64)


class Machine:
    """What a session finds: TensorRT of one version, a GPU, a cache, a file."""

    def __init__(self, version, folder, monkeypatch):
        self.trt = Fake(version, inputs={"x": ("float32", (4, 3))}, outputs={"y": ("float32", ())})
        self.driver = Driver()
        self.model = folder / "model.onnx"
        self.model.write_bytes(b"a model")
        self.engines = folder / "cache" / "engines"
        monkeypatch.setitem(sys.modules, "tensorrt", self.trt.module)
        monkeypatch.setenv("DEPLOYCC_CACHE", str(folder / "cache"))
        monkeypatch.setattr(cuda, "gpu", lambda: GPU)
        monkeypatch.setattr(cuda, "library", lambda: self.driver)

    def open(self, recipe=RECIPE, signature=SIGNATURE):
        return session_module.open(self.model, signature, {"minimum": "10.12", "recipe": recipe.text()}, 1)

    @property
    def built(self):
        return self.trt.asked.count("build")


@pytest.fixture(params=TYPED)
def machine(request, tmp_path, monkeypatch):
    return Machine(request.param, tmp_path, monkeypatch)


def test_it_builds_once_runs_and_gives_everything_back(machine):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for _ in range(2):
        with machine.open() as session:
            for rows in (x, x[:1], x):
                np.testing.assert_array_equal(session.run({"x": rows})["y"], -rows)
            session.synchronize()
        assert machine.driver.held == {}
    assert machine.built == 1
    assert machine.driver.calls.count("cuMemAlloc_v2") == 4  # a buffer that is large enough is kept
    assert machine.driver.calls.count("cuDevicePrimaryCtxRelease_v2") == 2
    with pytest.raises(BundleError, match="this session is closed"):
        session.run({"x": x})
    session.__exit__(None)
    assert machine.driver.calls.count("cuDevicePrimaryCtxRelease_v2") == 2


def test_it_is_queued_again_on_another_stream_without_copies(machine):
    x = np.ones((2, 3), np.float32)
    with machine.open() as session:
        with pytest.raises(BundleError, match="no inputs on the GPU"):
            session.enqueue(11)
        session.run({"x": x})
        copies = [name for name in machine.driver.calls if "Memcpy" in name]
        session.enqueue(11)
        assert [name for name in machine.driver.calls if "Memcpy" in name] == copies
        assert machine.trt.streams == [9, 11]
        machine.trt.fails = True
        with pytest.raises(BundleError, match="TensorRT did not run the engine"):
            session.enqueue(11)
    with pytest.raises(BundleError, match="no inputs on the GPU"):
        session.enqueue(11)


def test_what_the_builder_is_asked_for(machine):
    machine.open(
        Recipe(
            "f32",
            profiles=RECIPE.profiles,
            workspace_mb=64,
            optimization_level=5,
            version_compatible=True,
            hardware_compatibility="ampere-plus",
        )
    )
    asked, trt = machine.trt.asked, machine.trt.module
    assert asked[0] == ("create_network", 1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert ("set_memory_pool_limit", trt.MemoryPoolType.WORKSPACE, 64 << 20) in asked
    assert ("clear_flag", machine.trt.flag("TF32")) in asked
    assert ("set_flag", machine.trt.flag("VERSION_COMPATIBLE")) in asked
    assert ("set_shape", "x", (1, 3), (2, 3), (4, 3)) in asked
    assert ("create_timing_cache", b"") in asked
    assert machine.trt.config.builder_optimization_level == 5
    assert machine.trt.config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS


def test_timings_are_kept_for_the_next_model_on_this_gpu(machine):
    machine.open()
    machine.model.write_bytes(b"another model")
    machine.open()
    assert machine.built == 2
    assert [item for item in machine.trt.asked if item[0] == "create_timing_cache"][-1] == ("create_timing_cache", b"timings")


@pytest.mark.parametrize(
    "change", [{"name": "Another"}, {"capability": "9.0"}, {"driver": "600.1"}], ids=["name", "capability", "driver"]
)  # fmt: skip
def test_another_gpu_or_driver_builds_its_own(machine, monkeypatch, change):
    machine.open()
    other = cuda.Gpu(**{"name": GPU.name, "capability": GPU.capability, "driver": GPU.driver, **change})
    monkeypatch.setattr(cuda, "gpu", lambda: other)
    machine.open()
    assert machine.built == 2


def test_another_recipe_or_tensorrt_builds_its_own(machine):
    machine.open()
    machine.open(Recipe("f16", profiles=RECIPE.profiles, workspace_mb=32))
    machine.trt.module.__version__ = "99.0"
    machine.open()
    assert machine.built == 3


def stored(machine):
    (plan,) = machine.engines.glob("*.plan")
    return plan, plan.with_suffix(".json")


def test_an_engine_under_a_wrong_key_is_not_loaded(machine):
    machine.open()
    _, page = stored(machine)
    told = json.loads(page.read_text())
    page.write_text(json.dumps({**told, "facts": {**told["facts"], "capability": "8.6"}}))
    with pytest.raises(MismatchError, match=r"is for capability 8\.6, here it is 8\.9") as caught:
        machine.open()
    assert "delete" in caught.value.fix
    assert [item for item in machine.trt.asked if item[0] == "load"] == [("load", b"an engine")]


def test_a_changed_engine_is_not_loaded(machine):
    machine.open()
    plan, _ = stored(machine)
    plan.write_bytes(b"another engine")
    with pytest.raises(MismatchError, match="was changed: its SHA-256 should be"):
        machine.open()


@pytest.mark.parametrize("text", [None, "{}", "no JSON", '{"facts": {}}'])
def test_an_engine_without_its_page_is_not_loaded(machine, text):
    machine.open()
    _, page = stored(machine)
    if text is None:
        page.unlink()
    else:
        page.write_text(text)
    with pytest.raises(MismatchError, match="has no page that says what it is for"):
        machine.open()


def test_an_engine_that_tensorrt_does_not_load_is_told_with_its_words(machine):
    machine.trt.loads = False
    with pytest.raises(BundleError, match=r"does not load the engine of model\.onnx: wrong version"):
        machine.open()


def test_a_file_that_the_parser_refuses_is_told_with_its_words(machine):
    machine.trt.refuses = True
    with pytest.raises(engine.BuildError, match=r"does not read model\.onnx: n7 \(Det\): no importer"):
        machine.open()
    assert not list(machine.engines.glob("*.plan"))


def test_a_builder_that_fails_is_told_with_its_words(machine):
    machine.trt.fails = True
    with pytest.raises(engine.BuildError, match=r"builds no engine of model\.onnx: out of memory\n"):
        machine.open()


def test_feeds_that_do_not_fit_are_refused(machine):
    with machine.open() as session:
        session.run({"x": np.zeros((1, 3), np.float32)})
        with pytest.raises(SignatureError):
            session.run({"x": np.zeros((1, 4), np.float32)})
        with pytest.raises(SignatureError, match="which the engine was not built for"):
            session.run({"x": np.zeros((5, 3), np.float32)})


def test_an_output_whose_size_depends_on_the_data_is_refused(machine):
    machine.trt.outputs["y"] = ("float32", (-1, 3))
    with machine.open() as session, pytest.raises(BundleError, match="depends on the data"):
        session.run({"x": np.zeros((1, 3), np.float32)})


def test_a_run_that_fails_is_told(machine):
    with machine.open() as session:
        machine.trt.fails = True
        with pytest.raises(BundleError, match="did not run the engine"):
            session.run({"x": np.zeros((1, 3), np.float32)})


def test_an_engine_of_another_signature_is_refused(machine):
    other = Signature((TensorSpec("z", "float32", ("n", 3)),), SIGNATURE.outputs)
    with pytest.raises(BundleError, match="has the inputs x, but its signature says z"):
        machine.open(signature=other)


def test_a_type_that_numpy_lacks_is_refused(machine):
    machine.trt.inputs = {"x": ("float8", (4, 3))}
    with pytest.raises(BundleError, match=r"'x' is DataType\.FP8, which numpy has no type for"):
        machine.open()


def test_another_thread_may_run_it(machine):
    with machine.open() as session:
        before = machine.driver.calls.count("cuCtxSetCurrent")
        session.run({"x": np.ones((1, 3), np.float32)})
        assert machine.driver.calls.count("cuCtxSetCurrent") == before + 1


def test_int64_is_fed_as_the_engine_takes_it(machine):
    machine.trt.inputs, machine.trt.outputs = {"x": ("int32", (4,))}, {"y": ("int32", ())}
    signature = Signature((TensorSpec("x", "int64", ("n",)),), (TensorSpec("y", "int64", ("n",)),))
    with machine.open(signature=signature) as session:
        found = session.run({"x": np.array([3, -4])})["y"]
        assert found.dtype == np.int64
        assert found.tolist() == [-3, 4]
        with pytest.raises(SignatureError, match="which int32 does not"):
            session.run({"x": np.array([2**40])})


def test_version_8_takes_flags_and_no_types(tmp_path, monkeypatch):
    machine = Machine("8.5.3.1", tmp_path, monkeypatch)
    with machine.open(Recipe("f16", typed=False)) as session:
        assert session.run({"x": np.ones((1, 3), np.float32)})["y"].tolist() == [[-1, -1, -1]]
    assert machine.trt.asked[0] == ("create_network", 1 << machine.trt.module.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    assert [item[1] for item in machine.trt.asked if item[0] == "set_flag"] == [machine.trt.flag("INT8"), machine.trt.flag("FP16")]


def test_version_8_does_not_say_which_operator_it_refuses(tmp_path, monkeypatch):
    machine = Machine("8.5.3.1", tmp_path, monkeypatch)
    machine.trt.refuses = True
    with pytest.raises(engine.BuildError, match=r"does not read model\.onnx: no importer"):
        machine.open(Recipe(typed=False))


def test_a_typed_bundle_is_not_for_version_8(tmp_path, monkeypatch):
    with pytest.raises(MismatchError, match="knows no strongly typed networks"):
        Machine("8.5.3.1", tmp_path, monkeypatch).open()


def test_a_bundle_for_version_8_is_not_for_version_11(tmp_path, monkeypatch):
    with pytest.raises(MismatchError, match="whose builder chooses types"):
        Machine("11.4.0.106", tmp_path, monkeypatch).open(Recipe(typed=False))


@pytest.mark.parametrize(("setting", "value"), [("hardware_compatibility", "ampere-plus"), ("version_compatible", True)])
def test_a_compatibility_that_a_version_lacks_is_refused(tmp_path, monkeypatch, setting, value):
    machine = Machine("8.5.3.1", tmp_path, monkeypatch)
    with pytest.raises(MismatchError, match=f"which {setting} asks for"):
        machine.open(Recipe(typed=False, **{setting: value}))


def test_names_that_moved_are_not_used():
    """The stand-ins hold what was recorded: these are gone in 11, or another number."""
    from fake_tensorrt import NAMES

    old, new = NAMES["10.16.1.11"], NAMES["11.4.0.106"]
    for name in ("FP16", "INT8", "BF16", "FP8"):
        assert name in old["BuilderFlag"].split()
        assert name not in new["BuilderFlag"].split()
    index = {version: NAMES[version]["NetworkDefinitionCreationFlag"].split().index("STRONGLY_TYPED") for version in TYPED}
    assert len(set(index.values())) == 2


def test_what_is_missing_is_told(tmp_path, monkeypatch):
    machine = Machine("11.4.0.106", tmp_path, monkeypatch)
    monkeypatch.setattr(cuda, "gpu", lambda: None)
    with pytest.raises(MismatchError, match="no NVIDIA GPU"):
        machine.open()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MismatchError, match="needs TensorRT") as caught:
        machine.open()
    assert "tensorrt>=10.12" in caught.value.fix


def test_its_version_is_found_without_metadata_too(monkeypatch):
    def missing(name):
        raise session_module.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(session_module.importlib.metadata, "version", lambda name: "10.3.0" if name == "tensorrt" else missing(name))
    assert sessions.find("tensorrt").version() == "10.3.0"
    monkeypatch.setattr(session_module.importlib.metadata, "version", missing)
    monkeypatch.setitem(sys.modules, "tensorrt", Fake("8.5.3.1", inputs={}, outputs={}).module)
    assert session_module.version() == "8.5.3.1"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert session_module.version() is None
