"""AOTInductor: what is compiled, for which CPU, that it is the same every time, and what is refused."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deploycc.backends import _inductor_package as pt2
from deploycc.backends import _inductor_worker as worker
from deploycc.backends import inductor as backend
from deploycc.core import target as targets
from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.contract import Context, enforce
from deploycc.core.data import Data
from deploycc.core.pipeline import Pipeline
from deploycc.core.target import Hardware, Runtime, Target, load
from deploycc.errors import BundleError, MismatchError, SignatureError, UnsupportedError
from deploycc.forms.module import capture_signature, example_feeds
from deploycc.runtime.machine import cpu_flags
from deploycc.runtime.sessions import inductor as session_module
from deploycc.runtime.signature import Signature, TensorSpec

F32, BF16 = load("x86-inductor"), load("x86-inductor-bf16")
needs_avx512 = pytest.mark.skipif(backend.compiler() is None or not cpu_flags() >= backend.V4, reason="no g++, or this CPU has no AVX-512")
needs_amx = pytest.mark.skipif(backend.compiler() is None or not cpu_flags() >= backend.AMX, reason="no g++, or this CPU has no AMX")


class Net(nn.Module):
    """Works in place on its input; a residual, two outputs, a batch of any size."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.point = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x.mul_(2)))
        x = x + nn.functional.silu(self.point(x))
        return {"logits": self.fc(x.mean((2, 3))), "features": x}


def program(module=None, shape=("n", 3, 16, 16), target=F32):
    torch.manual_seed(0)
    module = (module or Net()).eval()
    made = Artifact(Form.MODULE, module, capture_signature(module, (TensorSpec("x", "float32", shape),)), "test")
    return Pipeline.parse("export-program").run(made, Context(target, made, Data(None), 0, Path())), module


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A float32 package, with the module it was made of."""
    folder = tmp_path_factory.mktemp("f32")
    artifact, module = program()
    return backend.Inductor().build(artifact, F32, folder), module


def opened(built, threads=1, **runtime):
    return session_module.open(built.folder / built.files[0], built.signature, {**built.runtime, **runtime}, threads)


def changed(target=F32, *, requires=None, **tables):
    facts = target.model_dump()
    hardware = {"hardware": {**facts["hardware"], "requires": requires}} if requires is not None else {}
    return Target.model_validate({**facts, **hardware, **tables})


@needs_avx512
def test_it_answers_like_the_module_for_any_batch_and_leaves_its_input_alone(compiled):
    built, module = compiled
    assert built.files == ("model.pt2",)
    assert [path.name for path in built.folder.iterdir()] == ["model.pt2"]
    with opened(built) as session:
        for batch in (1, 2, 5):
            feeds = example_feeds(built.signature, {"n": batch}, seed=batch)
            kept = feeds["x"].copy()
            found = session.run(feeds)
            session.synchronize()
            np.testing.assert_array_equal(feeds["x"], kept)
            with torch.inference_mode():
                wanted = module(torch.from_numpy(kept.copy()))
            assert list(found) == ["logits", "features"]
            for name, value in wanted.items():
                np.testing.assert_allclose(found[name], value.numpy(), atol=1e-5)


@needs_avx512
def test_the_manifest_says_what_the_code_needs(compiled):
    runtime = compiled[0].runtime
    assert set(runtime["flags"].split()) == backend.V4  # this CPU may have more
    assert runtime["packed_for"] == "AVX512_CORE"
    assert runtime["threads"] == "1"
    assert runtime["precision"] == "f32"
    assert runtime["version"] == torch.__version__.partition("+")[0]
    assert runtime["minimum"] == ".".join(runtime["version"].split(".")[:2])
    assert re.fullmatch(r"g\+\+ \d+\.\d+\.\d+", runtime["compiler"])
    assert compiled[0].coverage.int8_macs == 0.0
    assert compiled[0].notes == ()


@needs_avx512
def test_the_same_bytes_every_time_and_nothing_of_this_machine(compiled, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(pt2.tempfile, "tempdir", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")  # what this process is told is not what the package is for
    (tmp_path / "out").mkdir()
    backend.Inductor().build(program()[0], F32, tmp_path / "out")
    first, again = ((folder / "model.pt2").read_bytes() for folder in (compiled[0].folder, tmp_path / "out"))
    assert first == again
    for secret in (str(tmp_path), tmp_path.name, str(Path(torch.__file__).parent), sys.prefix, "deploycc-inductor"):
        assert secret.encode() not in first
    with zipfile.ZipFile(compiled[0].folder / "model.pt2") as archive:
        assert {item.date_time for item in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert [name for name in archive.namelist() if "aotinductor" in name] == [
            f"{pt2.PLACE}/model_metadata.json",
            f"{pt2.PLACE}/model.so",
        ]


@needs_avx512
def test_pytorch_itself_reads_the_package_from_any_folder(compiled, tmp_path):
    shutil.copy(compiled[0].folder / "model.pt2", tmp_path / "other.pt2")
    loaded = torch._C._aoti.AOTIModelPackageLoader(str(tmp_path / "other.pt2"), "model", True, 1, -1)
    assert len(loaded.run([torch.zeros(2, 3, 16, 16)])) == 2


@needs_avx512
def test_a_model_is_compiled_once_for_its_receipt_and_to_ship(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(pt2, "compile_program", lambda *given: calls.append(given) or b"library")
    made, (artifact, _) = backend.Inductor(), program()
    monkeypatch.setattr(made, "_verify", lambda *given: None)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        made.build(artifact, F32, tmp_path / name)
    assert len(calls) == 1
    assert (tmp_path / "a" / "model.pt2").read_bytes() == (tmp_path / "b" / "model.pt2").read_bytes()
    (tmp_path / "c").mkdir()
    made.build(artifact, changed(requires=[*F32.hardware.requires, "avx512_vnni"]), tmp_path / "c")
    assert [environment["ONEDNN_MAX_CPU_ISA"] for _, _, environment in calls] == ["AVX512_CORE", "AVX512_CORE_VNNI"]


@needs_amx
def test_bf16_computes_every_product_in_bf16_between_float32(tmp_path):
    artifact, module = program(target=BF16)
    built = backend.Inductor().build(artifact, BF16, tmp_path)
    assert built.notes == ("3 of 3 convolutions and matrix products are computed in bfloat16",)
    assert built.runtime["packed_for"] == "AVX512_CORE_AMX"
    assert set(built.runtime["flags"].split()) >= backend.AMX
    feeds = example_feeds(built.signature, {"n": 3})
    with opened(built) as session, torch.inference_mode():
        found = session.run(feeds)["features"]
        wanted = module(torch.from_numpy(feeds["x"].copy()))["features"].numpy()
    assert found.dtype == np.float32
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert 1e-4 < error < 2e-2  # bfloat16's eight bits, no more and no less


def test_a_product_left_in_float32_is_told():
    class Mixed(nn.Module):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                y = x @ x
            return x @ y

    artifact, _ = program(Mixed(), (4, 4))
    inside = pt2.at_boundary(artifact.model, artifact.signature, "bf16")
    assert [kind for _, kind in pt2.heavy_types(inside)] == ["float32", "bfloat16"]
    assert backend._notes(inside, "bf16") == ("1 of 2 convolutions and matrix products are computed in bfloat16",)


def test_avx2_alone_is_packed_and_compiled_for_avx2():
    assert backend.platforms(changed(requires=["avx2"]))[0][:2] == ("AVX2", "x86-64-v3")
    assert backend.platforms(changed(requires=["avx512_vnni"]))[0][:2] == ("AVX512_CORE_VNNI", "x86-64-v4")
    assert backend.platforms(changed(requires=["avx512_vnni", "avx512_bf16"]))[0][0] == "AVX512_CORE_BF16"
    assert backend.platforms(BF16)[0][0] == "AVX512_CORE_AMX"
    assert backend.platforms(changed(requires=[])) == []


def test_the_compiler_does_not_see_what_the_target_does_not_require(monkeypatch):
    for question in worker.ASKED:
        monkeypatch.setattr(torch.cpu, question, lambda: True)
    worker.hide(["avx512f", "avx512_vnni"])
    assert {name for name in worker.ASKED if getattr(torch.cpu, name)()} == {"_is_avx512_supported", "_is_vnni_supported"}


def test_what_the_compiler_complains_of_is_told():
    artifact, _ = program(nn.Linear(4, 4), (1, 4))
    inside = pt2.at_boundary(artifact.model, artifact.signature, "f32")
    with pytest.raises(UnsupportedError, match=r"cannot compile the model: .*No working C\+\+ compiler"):
        pt2.compile_program(inside, {"flags": [], "level": "x86-64-v3", "compiler": "/nowhere/g++"}, {})
    assert pt2._last_words("x\nm.cpp:1:2: error: no such thing\nRuntimeError: compile\n") == "m.cpp:1:2: error: no such thing"
    assert pt2._last_words("x\nRuntimeError: one\nthe end\n") == "RuntimeError: one"


def test_a_scratch_folder_that_inductor_cannot_work_in_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a place").mkdir()
    monkeypatch.setattr(pt2.tempfile, "tempdir", str(tmp_path / "a place"))
    with pytest.raises(UnsupportedError, match="splits the commands") as caught:
        pt2.compile_program(None, {}, {})
    assert "TMPDIR" in caught.value.fix


@needs_avx512
def test_a_package_that_answers_something_else_is_refused(tmp_path, monkeypatch):
    artifact, _ = program(nn.Linear(4, 4), (1, 4))
    monkeypatch.setattr(backend.Inductor, "open", lambda self, built, target, threads: Wrong(artifact.signature))
    monkeypatch.setattr(pt2, "compile_program", lambda *given: b"library")
    with pytest.raises(UnsupportedError, match="output 'output' of the compiled model differs"):
        backend.Inductor().build(artifact, F32, tmp_path)


class Wrong:
    def __init__(self, signature):
        self.signature = signature

    def run(self, feeds):
        return {spec.name: np.full(spec.shape, 9, np.float32) for spec in self.signature.outputs}

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None


def test_every_refusal_names_the_rule(monkeypatch):
    artifact, _ = program(nn.Linear(4, 4), (1, 4))
    rules = backend.Inductor().constraints()
    monkeypatch.setattr(backend, "machine", lambda: ("x86_64", backend.AMX))
    enforce(rules, artifact, F32)
    enforce(rules, artifact, BF16)
    for target, rule in (
        (changed(arch="aarch64"), "must say which"),
        (changed(requires=[]), "must say which"),
        (changed(requires=["avx512_4fmaps"]), "built on a CPU that has"),
        (changed(BF16, runtime=Runtime(precision="f16").model_dump()), "in bfloat16"),
        (changed(runtime=Runtime(precision="bf16").model_dump()), "16-bit precision"),
    ):
        with pytest.raises(UnsupportedError, match=rule):
            enforce(rules, artifact, target)
    monkeypatch.setattr(backend, "machine", lambda: ("x86_64", backend.V3))
    with pytest.raises(UnsupportedError, match="built on a CPU that has what the target requires") as caught:
        enforce(rules, artifact, F32)
    assert "lacks avx512bw" in caught.value.what


def test_an_integer_model_is_refused_with_the_way_out(monkeypatch):
    from dataclasses import replace

    monkeypatch.setattr(backend, "machine", lambda: ("x86_64", backend.AMX))
    artifact, _ = program(nn.Linear(4, 4), (1, 4))
    quant = QuantInfo("torch", "uint8", "int8", True, False, "mse")
    with pytest.raises(UnsupportedError, match="compiles float models") as caught:
        enforce(backend.Inductor().constraints(), replace(artifact, quant=quant), F32)
    assert "for int8" in caught.value.fix

    class Rounded(nn.Module):
        def forward(self, x):
            return torch.ops.quantized_decomposed.quantize_per_tensor(x, 0.1, 0, -128, 127, torch.int8).float()

    import torch.ao.quantization.fx._decomposed  # noqa: TID251

    program_of_integers = torch.export.export(Rounded(), (torch.ones(2, 2),))
    with pytest.raises(UnsupportedError, match="PyTorch's own, and none on quantized") as caught:
        enforce(backend.Inductor().constraints(), replace(artifact, model=program_of_integers), F32)
    assert "quantized_decomposed.quantize_per_tensor" in caught.value.what


def test_it_says_what_is_missing_to_build(monkeypatch):
    assert backend.Inductor().available().version == torch.__version__.partition("+")[0] or backend.compiler() is None
    monkeypatch.setattr(backend.shutil, "which", lambda name: None)
    available = backend.Inductor().available()
    assert not available
    assert "g++ is not installed (needed to build, not to run)" in available.missing
    assert available.install == "apt-get install g++"

    def missing(name):
        raise backend.PackageNotFoundError(name)

    monkeypatch.setattr(backend, "version", missing)
    assert backend.Inductor().available().install == "pip install torch"


# --- the session, the way a device runs a bundle


@needs_avx512
def test_a_fresh_process_needs_neither_the_compiler_nor_inductor(compiled, tmp_path):
    built, module = compiled
    feeds = example_feeds(built.signature, {"n": 2}, seed=3)
    with torch.inference_mode():
        wanted = module(torch.from_numpy(feeds["x"].copy()))["logits"].numpy()
    np.savez(tmp_path / "io.npz", x=feeds["x"], wanted=wanted)
    code = f"""
import json, sys
import numpy as np
from pathlib import Path
from deploycc.runtime.sessions import inductor
from deploycc.runtime.signature import Signature
signature = Signature.from_json(json.loads({json.dumps(built.signature.to_json())!r}))
io = np.load({str(tmp_path / "io.npz")!r})
with inductor.open(Path({str(built.folder / "model.pt2")!r}), signature, {dict(built.runtime)!r}, 1) as session:
    np.testing.assert_allclose(session.run({{"x": io["x"]}})["logits"], io["wanted"], atol=1e-5)
assert "torch._inductor.compile_fx" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    )
    assert done.returncode == 0, done.stderr


@needs_avx512
def test_threads_are_set_for_every_call(compiled):
    before = torch.get_num_threads()
    try:
        with pytest.warns(UserWarning, match=r"packed for 1 thread\(s\) and runs with 2.*--threads 2"):
            session = opened(compiled[0], threads=2)
        with session:
            torch.set_num_threads(1)
            session.run(example_feeds(compiled[0].signature))
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@needs_avx512
def test_weights_are_packed_for_the_threads_of_the_target(tmp_path, monkeypatch):
    two = changed(bench={**F32.bench.model_dump(), "threads": 2})
    given: list[str] = []

    def compile_program(program, request, environment):
        given.append(environment["OMP_NUM_THREADS"])
        return pt2_compile(program, request, environment)

    pt2_compile = pt2.compile_program
    monkeypatch.setattr(pt2, "compile_program", compile_program)
    made = backend.Inductor()
    artifact, _ = program()
    for target in (F32, two):
        assert made.build(artifact, target, tmp_path).runtime["threads"] == str(target.bench.threads)
    assert given == ["1", "2"]


@needs_avx512
def test_any_lay_of_an_input_is_read_right_and_bad_feeds_are_refused(compiled):
    plain = example_feeds(compiled[0].signature, {"n": 2}, seed=2)["x"]
    turned = np.ascontiguousarray(plain.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    frozen = plain.copy()
    frozen.setflags(write=False)
    with opened(compiled[0]) as session:
        wanted = session.run({"x": plain})["logits"]
        np.testing.assert_array_equal(session.run({"x": turned})["logits"], wanted)
        np.testing.assert_array_equal(session.run({"x": frozen})["logits"], wanted)
        with pytest.raises(SignatureError):
            session.run({"x": plain[:, :, 1:]})
    with pytest.raises(BundleError, match="closed"):
        session.run({"x": plain})


def test_an_answer_never_lies_in_the_memory_of_an_input():
    x = np.ones((2, 3), np.float32)
    assert not np.may_share_memory(session_module._apart(x[:1], [x]), x)
    other = np.zeros(3)
    assert session_module._apart(other, [x]) is other


@needs_avx512
def test_a_cpu_that_lacks_a_flag_is_refused_before_its_code_runs(compiled, monkeypatch):
    monkeypatch.setattr(session_module, "cpu_flags", lambda: backend.V3)
    with pytest.raises(MismatchError, match="lacks avx512bw, avx512cd, avx512dq, avx512f, avx512vl"):
        opened(compiled[0])


@needs_avx512
def test_another_release_of_pytorch_is_refused_and_a_missing_one(compiled, monkeypatch):
    with pytest.raises(MismatchError, match=r"compiled with PyTorch 2\.5\.1, and this is") as caught:
        opened(compiled[0], version="2.5.1")
    assert "torch==2.5.*" in caught.value.fix
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MismatchError, match="needs PyTorch, which does not import"):
        opened(compiled[0])


def test_version_is_the_installed_one(monkeypatch):
    assert session_module.version() == torch.__version__.partition("+")[0] or session_module.version() == torch.__version__

    def missing(name):
        raise session_module.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(session_module.importlib.metadata, "version", missing)
    assert session_module.version() is None


@needs_avx512
@pytest.mark.parametrize("keep", [100, -1000])
def test_a_damaged_package_is_refused(compiled, tmp_path, keep):
    whole = (compiled[0].folder / "model.pt2").read_bytes()
    (tmp_path / "model.pt2").write_bytes(whole[:keep])
    with pytest.raises(BundleError, match=r"cannot load model\.pt2"):
        session_module.open(tmp_path / "model.pt2", compiled[0].signature, compiled[0].runtime, 1)


@needs_avx512
def test_a_package_of_another_signature_is_refused(compiled):
    built = compiled[0]
    other = Signature((TensorSpec("z", "float32", (1, 3, 16, 16)),), built.signature.outputs)
    with pytest.raises(BundleError, match="has the inputs x, but its signature says z"):
        session_module.open(built.folder / "model.pt2", other, built.runtime, 1)


def test_a_family_takes_it_in():
    assert {"x86-inductor", "x86-inductor-bf16"} <= set(targets.several("x86") or ())
    assert isinstance(F32.hardware, Hardware)
