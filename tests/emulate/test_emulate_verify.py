"""`deploycc verify --emulate` from end to end, on a pretended qemu."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import typer

from deploycc import render_emulation
from deploycc.emulate import counts, guest
from deploycc.emulate.session import SESSIONS, GuestSession
from deploycc.emulate.verify import emulate
from deploycc.errors import BundleError, DataError, EmulationError, MissingDependency, UnknownName, UnsupportedError
from deploycc.package.bundle import write
from deploycc.package.pack import pack


def test_a_good_bundle_on_two_cores(qemu, bundle):
    seen = []
    found = emulate(bundle, "cortex-a53,cortex-a76", progress=lambda what, done, total, note="": seen.append((done, note)))
    assert found.ok
    assert [item.core.name for item in found.cores] == ["cortex-a53", "cortex-a76"]
    assert seen == [(0, "cortex-a53"), (1, "cortex-a76"), (2, "")]
    item = found.cores[1]
    assert item.selftest["ok"]
    assert item.distances[0].max_abs == 0
    assert item.agreement == 1.0
    assert item.multiplies == ("dot product (sdot, udot)",)
    assert (item.cost.instructions, item.cost.spread) == (1000, 0.0)
    assert found.emulator == "qemu 7.2.22"
    assert found.runtime.startswith("onnxruntime ")
    assert "onnxruntime on this machine's CPU" in found.host
    runs = [row for row in qemu.asked() if "selftest" in row["command"]]
    assert [row["options"]["-cpu"] for row in runs] == ["cortex-a53", "cortex-a76"]
    assert all("LD_LIBRARY_PATH" not in row["environment"] for row in runs)


def test_no_line_of_it_is_a_time(qemu, bundle):
    found = emulate(bundle, "cortex-a53")
    document = render_emulation.emulated_json(found)
    cost = document["cores"][0]["cost"]
    assert (cost["measured"], cost["unit"], cost["minsn"]) == (False, "Minsn", 0.001)
    assert not any(key.endswith(("ms", "seconds")) for key in cost)
    json.dumps(document)
    text = "\n".join(part for part in render_emulation.emulated(found) if isinstance(part, str))
    assert "estimated relative cost" in text
    assert "not measured" in text


def test_a_package_is_verified_too(qemu, bundle, tmp_path):
    package = pack(bundle, tmp_path / "b.zip").path
    assert emulate(package, "cortex-a53").ok


def test_a_bundle_without_its_runner_gets_one(qemu, bundle, tmp_path):
    document = json.loads((bundle / "manifest.json").read_text())
    document["files"] = [entry for entry in document["files"] if entry["role"] != "runner"]
    from deploycc.runtime.bundle import document_digest

    document["measured"]["digest"] = document_digest(document)
    (bundle / "manifest.json").write_text(json.dumps(document))
    (bundle / "runner.pyz").unlink()
    assert emulate(bundle, "cortex-a53").ok


def test_a_runner_of_someone_else_is_not_run_without_a_signature(qemu, bundle, tmp_path):
    from deploycc.package import signing
    from deploycc.runtime.bundle import document_digest

    sha256 = __import__("hashlib").sha256
    (bundle / "runner.pyz").write_bytes(b"print('mine')")
    document = json.loads((bundle / "manifest.json").read_text())
    for entry in document["files"]:
        if entry["role"] == "runner":
            entry |= {"sha256": sha256(b"print('mine')").hexdigest()}
    document["measured"]["digest"] = document_digest(document)
    (bundle / "manifest.json").write_text(json.dumps(document))
    found = emulate(bundle, "cortex-a53")
    assert found.ok
    assert "the bundle's runner.pyz is not what this version writes" in found.notes[0]
    assert all(str(bundle) not in row["command"][2] for row in qemu.asked() if "selftest" in row["command"])
    private, public, _ = signing.make_keys(tmp_path / "maker")
    signing.sign(bundle, private)
    found = emulate(bundle, "cortex-a53", key=public)  # it was run, and says what no selftest says
    assert found.cores[0].refused == "the runner's answer is no JSON: 'mine\\n'"


def test_data_are_answered_here_and_there(qemu, bundle, tmp_path):
    path = tmp_path / "more.npz"
    np.savez(path, image=np.random.default_rng(0).standard_normal((30, 3, 8, 8)).astype(np.float32))
    assert emulate(bundle, "cortex-a53", data=str(path), samples=7).samples == 7


def test_data_without_samples(qemu, bundle, tmp_path, monkeypatch):
    from deploycc.core.contract import Dataset
    from deploycc.emulate import verify

    monkeypatch.setattr(verify, "open_dataset", lambda text: Dataset("none", {}))
    with pytest.raises(DataError, match="holds no samples"):
        emulate(bundle, "cortex-a53", data="none")


def test_without_a_plug_in_kernels_are_read_from_translated_code(qemu, bundle, monkeypatch):
    monkeypatch.setattr(counts, "COMPILERS", ())
    (item,) = emulate(bundle, "cortex-a53").cores
    assert item.cost is None
    assert "C compiler" in item.not_counted
    assert item.multiplies == ("dot product (sdot, udot)",)
    text = "\n".join(part for part in render_emulation.emulated(emulate(bundle, "cortex-a53")) if isinstance(part, str))
    assert "instructions are not measured: counting needs a C compiler" in text


def test_a_core_that_lacks_what_the_bundle_requires_is_refused_by_the_runner(qemu, tmp_path, make_contents):
    contents = make_contents()
    hardware = contents.target.hardware.model_copy(update={"requires": ("asimddp-of-nobody",)})
    bundle = write(tmp_path / "needy", make_contents(target=contents.target.model_copy(update={"hardware": hardware}))).folder
    found = emulate(bundle, "cortex-a53")
    assert not found.ok
    assert "the bundle needs a CPU with asimddp-of-nobody" in found.cores[0].refused
    assert "fix:" in found.cores[0].refused
    text = "\n".join(part for part in render_emulation.emulated(found) if isinstance(part, str))
    assert "cortex-a53: the bundle needs a CPU with asimddp-of-nobody" in text
    assert render_emulation.emulated_json(found)["cores"][0]["cost"]["not_measured"] == "the selftest failed"


def test_a_runtime_that_dies_is_told_by_its_signal(qemu, bundle):
    qemu.plan(dies={"selftest": int(signal.SIGILL)})
    found = emulate(bundle, "cortex-a53,cortex-a76")
    assert "ended by SIGILL (an instruction that the core does not have) on cortex-a53" in found.cores[0].refused
    assert not found.ok


def test_a_probe_that_fails_after_a_good_selftest(qemu, bundle):
    qemu.plan(fails={"probe.py": "Traceback\nValueError: bad"})
    with pytest.raises(EmulationError, match="the selftest passes, but the probe fails: ValueError: bad"):
        emulate(bundle, "cortex-a53")


def test_a_program_that_takes_too_long(qemu, bundle):
    qemu.plan(sleeps={"selftest": 30})
    with pytest.raises(EmulationError, match=r"on cortex-a53 took more than 0\.5 s"):
        emulate(bundle, "cortex-a53", seconds=0.5)


def test_a_changed_byte_is_found_before_anything_runs(qemu, bundle):
    with (bundle / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match="was changed"):
        emulate(bundle, "cortex-a53")
    assert qemu.asked() == []


def test_a_bundle_for_x86_is_refused(qemu, tmp_path, make_contents):
    target = make_contents().target.model_copy(update={"arch": "x86_64"})
    bundle = write(tmp_path / "x86", make_contents(target=target)).folder
    with pytest.raises(UnsupportedError, match="the bundle is for x86_64"):
        emulate(bundle, "cortex-a53")


@pytest.mark.parametrize("runtime", [{"session": "openvino", "package": "openvino"}, {"provider": "cuda"}])
def test_a_runtime_that_cannot_be_emulated_is_refused(qemu, tmp_path, make_contents, runtime):
    contents = make_contents()
    from dataclasses import replace

    built = replace(contents.built, runtime={**contents.built.runtime, **runtime})
    bundle = write(tmp_path / "other", make_contents(built=built)).folder
    with pytest.raises(UnsupportedError, match=r"cannot be emulated") as caught:
        emulate(bundle, "cortex-a53")
    assert "onnxruntime" in caught.value.fix


def test_an_unknown_core_and_a_missing_qemu_are_refused_before_anything_slow(bundle, cache, only):
    only()
    with pytest.raises(UnknownName):
        emulate(bundle, "cortex-x")
    with pytest.raises(MissingDependency, match="qemu"):
        emulate(bundle, "cortex-a53")


def test_a_host_that_cannot_answer_leaves_the_golden_outputs(qemu, bundle, tmp_path, monkeypatch):
    from deploycc.backends import onnxruntime
    from deploycc.errors import MismatchError

    def absent(*_args, **_kwargs):
        raise MismatchError("onnxruntime is not here", fix="")

    monkeypatch.setattr(onnxruntime.OnnxRuntime, "open", absent)
    path = tmp_path / "more.npz"
    np.savez(path, image=np.zeros((2, 3, 8, 8), np.float32))
    found = emulate(bundle, "cortex-a53", data=str(path))
    assert found.host == "the golden outputs alone, as the compiler saw them (onnxruntime is not here)"
    assert found.cores[0].distances[0].max_abs == 0


def test_a_bundle_of_another_version_s_target_leaves_the_golden_outputs(qemu, bundle):
    from deploycc.runtime.bundle import document_digest

    document = json.loads((bundle / "manifest.json").read_text())
    document["target"]["colour"] = "blue"
    document["measured"]["digest"] = document_digest(document)
    (bundle / "manifest.json").write_text(json.dumps(document))
    assert "wrote the bundle" in emulate(bundle, "cortex-a53").host


@pytest.mark.parametrize("name", SESSIONS.names())
def test_every_emulated_runtime_fits_its_protocol(name):
    assert isinstance(SESSIONS.get(name), GuestSession)
    from deploycc.runtime import sessions

    assert name in (*sessions.names(), "executorch")


def test_what_a_program_said(tmp_path):
    assert guest.Ran(1, "", "warning\nerror: it is bad\n  fix: mend it\n").said == "it is bad\n  fix: mend it"
    assert guest.Ran(1, "", "Traceback\nKeyError: 'a'\n").said == "KeyError: 'a'"
    assert guest.Ran(3, "", "").said == "nothing; exit status 3"
    assert guest.Ran(-11, "", "").signal == "SIGSEGV"
    assert guest.Ran(0, "", "").signal is None


# --- the command line


def command(*arguments, environment=None):
    return subprocess.run(
        [sys.executable, "-m", "deploycc.cli", "verify", *map(str, arguments)], capture_output=True, text=True, env=environment, check=False
    )


def test_the_command_refuses_an_unknown_core(bundle):
    done = command(bundle, "--emulate", "cortex-a5x")
    assert done.returncode == 2
    assert "known are cortex-a35, cortex-a53" in done.stderr


@pytest.mark.parametrize("option", ["--data", "--samples", "--calls"])
def test_what_is_for_emulation_is_refused_without_it(bundle, option):
    done = command(bundle, option, "3")
    assert done.returncode == 2
    assert f"{option} is for --emulate" in done.stderr


def test_samples_without_data_are_refused(bundle):
    done = command(bundle, "--emulate", "cortex-a53", "--samples", "3")
    assert done.returncode == 2
    assert "--samples is for --data" in done.stderr


def test_the_command_shows_a_table_and_exits_by_the_selftest(qemu, bundle, capsys):
    from deploycc.commands.verify import verify

    with pytest.raises(typer.Exit) as caught:
        verify(bundle, emulate="cortex-a53")
    assert caught.value.exit_code == 0
    assert "cortex-a53  Raspberry Pi 3  ok" in capsys.readouterr().out
    qemu.plan(fails={"selftest": "error: no\n  fix: yes"})
    with pytest.raises(typer.Exit) as caught:
        verify(bundle, emulate="cortex-a53", json=True)
    assert caught.value.exit_code == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["ok"], document["cores"][0]["refused"]) == (False, "no\n  fix: yes")
