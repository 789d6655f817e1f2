from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_tools import rewrite
from PIL import Image

from deploycc.errors import BundleError, DataError, MismatchError
from deploycc.package.bundle import write
from deploycc.package.manifest import Contents
from deploycc.runtime import cuda, host
from deploycc.runtime.bundle import (
    MANIFEST,
    Golden,
    check_golden,
    load,
    open_session,
    read_arrays,
    read_golden,
    write_golden,
)
from deploycc.runtime.inputs import interpret, read_input
from deploycc.runtime.machine import cpu_flags
from deploycc.runtime.transform import Transform

VNNI = "processor: 0\nflags\t\t: sse4_2 avx2 avx512f avx512_vnni\n"
NO_VNNI = "processor: 0\nflags\t\t: sse4_2 avx2\n"


@pytest.fixture
def folder(tmp_path: Path, make_contents: Callable[..., Contents]) -> Path:
    return write(tmp_path / "out", make_contents()).folder


def set_path(index: int, path: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["files"][index]["path"] = path

    return change


def test_a_whole_bundle_loads_and_runs(folder: Path):
    bundle = load(folder)
    assert bundle.signature.inputs[0].name == "image"
    assert bundle.transform is not None
    assert bundle.model == folder / "model.onnx"
    assert bundle.unlisted == ()
    host.check_host(bundle.manifest)
    golden = read_golden(bundle)
    assert len(golden.feeds) == 3
    with open_session(bundle, 1) as session:
        assert check_golden(golden, session) == {"logits": 0.0}


def test_every_single_changed_byte_is_found(folder: Path):
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for position in (0, len(whole) // 2, len(whole) - 2):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
            with pytest.raises(BundleError):
                load(folder)
        path.write_bytes(whole)
    load(folder)


def test_a_changed_byte_names_the_file_and_both_hashes(folder: Path):
    model = folder / "model.onnx"
    wanted = hashlib.sha256(model.read_bytes()).hexdigest()
    model.write_bytes(model.read_bytes() + b"\0")
    found = hashlib.sha256(model.read_bytes()).hexdigest()
    with pytest.raises(BundleError, match=f"model.onnx was changed: its SHA-256 should be {wanted}, it is {found}"):
        load(folder)


def test_a_missing_file_is_named(folder: Path):
    (folder / "golden.npz").unlink()
    with pytest.raises(BundleError, match=r"lacks its file golden.npz"):
        load(folder)


def test_a_file_that_cannot_be_read_is_named(folder: Path):
    (folder / "golden.npz").unlink()
    (folder / "golden.npz").mkdir()
    with pytest.raises(BundleError, match=r"cannot read .*golden.npz: Is a directory"):
        load(folder)


def test_files_beside_the_bundles_own_are_named_and_not_used(folder: Path):
    (folder / "photo.png").write_bytes(b"")
    (folder / "sub").mkdir()
    (folder / "sub" / "x").write_bytes(b"")
    assert load(folder).unlisted == ("photo.png", "sub/x")


@pytest.mark.parametrize("path", ["/etc/hostname", "../outside", "a/../../outside", "..", "C:\\x", "a\\..\\b", ""])
def test_a_path_that_leaves_the_folder_is_refused(folder: Path, path: str):
    (folder.parent / "outside").write_text("x")
    rewrite(folder, set_path(1, path))
    with pytest.raises(BundleError, match="which is outside the bundle"):
        load(folder)


def test_a_link_that_leaves_the_folder_is_refused(folder: Path):
    moved = folder.parent / "elsewhere.npz"
    (folder / "golden.npz").rename(moved)
    (folder / "golden.npz").symlink_to(moved)
    with pytest.raises(BundleError, match=r"golden.npz', which is outside the bundle"):
        load(folder)


def test_a_link_to_the_bundle_itself_works(folder: Path):
    link = folder.parent / "link"
    link.symlink_to(folder, target_is_directory=True)
    assert load(link).model.is_file()


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_schema_is_refused_by_name(folder: Path, version: object):
    rewrite(folder, lambda document: document.update(schema_version=version))
    with pytest.raises(BundleError, match=rf"schema version {version!r}; this version of deploycc reads 1"):
        load(folder)


def test_what_is_no_bundle_is_refused(tmp_path: Path):
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest.json"):
        load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="is not a bundle"):
        load(tmp_path / "file")
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(BundleError, match="cannot read"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("", "not valid JSON"), ("[]", "it holds list"), ("3", "it holds int"), ("\udcff", "not valid JSON")],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.pop("files"), "'files' is missing or no list"),
        (lambda document: document.update(target=[]), "'target' is missing or no dict"),
        (lambda document: document["target"].pop("requires"), r"target.requires is missing"),
        (lambda document: document["runtime"].pop("session"), r"runtime.session is missing"),
        (lambda document: document["files"].insert(0, {"path": "x"}), "a file entry without path, role or sha256"),
        (lambda document: document["files"].insert(0, 3), "a file entry without path, role or sha256"),
        (lambda document: document.update(files=[]), "lists no file with the role 'model'"),
        (lambda document: document["signature"].pop("inputs"), "the signature or transform cannot be read"),
    ],
)
def test_a_manifest_that_lacks_something_says_what(folder: Path, change: Callable[[dict[str, Any]], Any], message: str):
    rewrite(folder, change)
    with pytest.raises(BundleError, match=message):
        load(folder)


def test_a_changed_manifest_names_both_hashes(folder: Path):
    rewrite(folder, lambda document: document.update(seed=1), sealed=False)
    with pytest.raises(BundleError, match=r"manifest.json was changed: its SHA-256 should be [0-9a-f]{64}, it is [0-9a-f]{64}"):
        load(folder)


def test_a_runtime_that_is_no_session_module_is_not_imported(folder: Path):
    rewrite(folder, lambda document: document["runtime"].update(session="os"))
    with pytest.raises(BundleError, match="asks for the runtime 'os'"):
        open_session(load(folder), 1)


def manifest(arch: str = "any", requires: tuple[str, ...] = (), minimum: str = "1.30") -> dict[str, Any]:
    return {
        "target": {"name": "t", "arch": arch, "requires": list(requires)},
        "runtime": {"session": "onnxruntime", "package": "onnxruntime", "minimum": minimum},
    }


def test_another_architecture_is_refused():
    with pytest.raises(MismatchError, match=r"for aarch64 \(target 't'\), this machine is x86_64"):
        host.check_host(manifest("aarch64"), arch="x86_64")
    host.check_host(manifest("aarch64"), arch="aarch64")


def test_a_lacking_cpu_extension_is_refused_and_named():
    with pytest.raises(MismatchError, match=r"needs a CPU with avx512f, avx512_vnni; .* lacks avx512f, avx512_vnni"):
        host.check_host(manifest(requires=("avx512f", "avx512_vnni")), flags=cpu_flags(NO_VNNI))
    host.check_host(manifest(requires=("avx512_vnni",)), flags=cpu_flags(VNNI))


@pytest.mark.parametrize("installed", ["1.29.9", "1.9", "0.30"])
def test_a_runtime_that_is_too_old_is_refused(installed: str):
    with pytest.raises(MismatchError, match=rf"needs onnxruntime>=1.30, this machine has onnxruntime {installed}\n.*pip install"):
        host.check_host(manifest(), version=lambda session: installed)


@pytest.mark.parametrize("installed", ["1.30", "1.30.0", "1.100", "2.0", "1.30.1+cpu"])
def test_a_runtime_that_is_new_enough_is_taken(installed: str):
    host.check_host(manifest(), version=lambda session: installed)


@pytest.mark.parametrize("installed", ["2.10.0", "2.13.0+cpu", "3.0"])
def test_a_runtime_that_is_too_new_is_refused_with_the_reason(installed: str):
    document = manifest(minimum="2.9")
    document["runtime"] |= {"below": "2.10", "reason": "illegal instruction"}
    with pytest.raises(
        MismatchError, match=rf"needs onnxruntime>=2.9,<2.10 \(illegal instruction\); this machine has .* {re.escape(installed)}"
    ) as caught:
        host.check_host(document, version=lambda session: installed)
    assert caught.value.fix == "pip install 'onnxruntime>=2.9,<2.10'"
    host.check_host(document, version=lambda session: "2.9.1")
    del document["runtime"]["reason"]
    with pytest.raises(MismatchError, match="newer versions were not checked"):
        host.check_host(document, version=lambda session: installed)


def test_a_missing_runtime_is_named():
    with pytest.raises(MismatchError, match=r"onnxruntime is not installed\n.*pip install 'onnxruntime>=1.30'"):
        host.check_host(manifest(), version=lambda session: None)
    host.check_host(manifest(minimum=""))  # no least version, and the real one is installed


def test_how_to_install_a_runtime_is_the_bundles_own_word():
    document = manifest()
    document["runtime"]["install"] = "ask the vendor"
    for installed in (None, "0.1"):
        with pytest.raises(MismatchError) as caught:
            host.check_host(document, version=lambda session, installed=installed: installed)
        assert caught.value.fix == "ask the vendor"


def test_a_gpu_that_is_not_here_or_too_old_is_named(monkeypatch: pytest.MonkeyPatch):
    document = manifest()
    document["target"]["hardware"] = {"compute_capability": "8.0"}
    monkeypatch.setattr(cuda, "gpu", lambda: None)
    with pytest.raises(MismatchError, match="this machine has none"):
        host.check_host(document)
    monkeypatch.setattr(cuda, "gpu", lambda: cuda.Gpu("A GPU", "7.5", "580"))
    with pytest.raises(MismatchError, match=r"this GPU \(A GPU\) has 7\.5"):
        host.check_host(document)
    monkeypatch.setattr(cuda, "gpu", lambda: cuda.Gpu("A GPU", "8.6", "580"))
    host.check_host(document)


def test_memory_is_read_and_unknown_stays_unknown(tmp_path: Path):
    now, peak = host.rss_bytes(), host.peak_rss_bytes()
    assert now is not None
    assert peak is not None
    assert 10e6 < now <= peak
    assert host.rss_bytes(tmp_path / "none") is None
    (tmp_path / "status").write_text("Name: x\n")
    assert host.peak_rss_bytes(tmp_path / "status") is None
    assert not host.reset_peak(tmp_path / "no" / "file")


class Answers:
    """A session that gives what it is told to; the golden check must judge any output."""

    def __init__(self, output: np.ndarray) -> None:
        self.output = output

    def run(self, feeds: Any) -> dict[str, np.ndarray]:
        return {"y": self.output}


@pytest.mark.parametrize(
    ("output", "passes"),
    [
        ([1.0, 2.0], True),
        ([1.05, 2.0], True),
        ([1.2, 2.0], False),
        ([np.nan, 2.0], False),
        ([np.inf, 2.0], False),
        ([1.0], False),
    ],
)
def test_golden_outputs_judge_differences_and_broken_numbers(output: list[float], passes: bool):
    golden = Golden(({"x": np.zeros(1)},), ({"y": np.array([1.0, 2.0])},), {"y": 0.1})
    session: Any = Answers(np.array(output))
    if passes:
        assert check_golden(golden, session)["y"] <= 0.1
        return
    with pytest.raises(MismatchError, match=r"golden sample 0: output 'y' is .* away .*\(allowed 0.1\)"):
        check_golden(golden, session)


def test_golden_outputs_that_hold_infinity_are_matched():
    golden = Golden(({"x": np.zeros(1)},), ({"y": np.array([-np.inf, 2.0])},), {"y": 0.1})
    session: Any = Answers(np.array([-np.inf, 2.0]))
    assert check_golden(golden, session) == {"y": 0.0}


def test_golden_files_have_the_same_bytes_and_round_trip(folder: Path, tmp_path: Path):
    golden = read_golden(load(folder))
    write_golden(tmp_path / "again.npz", golden)
    assert (tmp_path / "again.npz").read_bytes() == (folder / "golden.npz").read_bytes()
    assert golden.atol["logits"] > 0
    assert golden.feeds[0]["image"].dtype == np.float32


def test_a_bundle_without_golden_outputs_says_so(tmp_path: Path, make_contents: Callable[..., Contents]):
    bundle = load(write(tmp_path / "out", make_contents(feeds=(), outputs=())).folder)
    with pytest.raises(BundleError, match="no golden outputs: it was compiled without data"):
        read_golden(bundle)


def test_a_golden_file_of_another_model_is_refused(folder: Path):
    other = Golden(({"image": np.zeros(1)},), ({"boxes": np.zeros(1)},), {"boxes": 0.0})
    write_golden(folder / "golden.npz", other)

    def fit(document: dict[str, Any]) -> None:
        entry = next(item for item in document["files"] if item["role"] == "golden")
        entry["sha256"] = hashlib.sha256((folder / "golden.npz").read_bytes()).hexdigest()

    rewrite(folder, fit)
    with pytest.raises(BundleError, match="does not hold inputs with outputs of this model"):
        read_golden(load(folder))


def test_pickled_arrays_are_never_loaded(tmp_path: Path):
    class Trap:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'sprung'}",)

    np.savez(tmp_path / "trap.npz", x=np.array([Trap()], dtype=object))
    with pytest.raises(DataError, match=r"not an .npz file of plain arrays"):
        read_arrays(tmp_path / "trap.npz")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no zip"])
def test_what_is_no_npz_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"not an .npz file"):
        read_arrays(tmp_path / "x.npz")
    with pytest.raises(DataError, match="there is no file"):
        read_arrays(tmp_path / "none.npz")


def test_a_bare_npy_is_refused(tmp_path: Path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    with pytest.raises(DataError, match=r"not an .npz file"):
        read_arrays(tmp_path / "x.npz")


def test_a_picture_goes_through_the_transform(folder: Path, tmp_path: Path):
    bundle = load(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    feeds = read_input(bundle, tmp_path / "p.png")
    assert bundle.transform is not None
    np.testing.assert_array_equal(feeds["image"], bundle.transform.apply(pixels)[None])
    with open_session(bundle, 1) as session:
        top = interpret(bundle, session.run(feeds), 2)
    assert top is not None
    assert [item["name"] in ("ant", "bee", "cat", "dog", "eel") for item in top] == [True, True]
    assert top[0]["score"] >= top[1]["score"]


def test_arrays_are_taken_by_name_with_or_without_batch_axis(folder: Path, tmp_path: Path):
    bundle = load(folder)
    array = np.ones((1, 3, 8, 8), np.float32)
    for saved in ({"image": array}, {"image": array[0]}, {"anything": array}):
        np.savez(tmp_path / "x.npz", **saved)
        np.testing.assert_array_equal(read_input(bundle, tmp_path / "x.npz")["image"], array)


def test_input_that_cannot_be_used_is_named(folder: Path, tmp_path: Path, make_contents: Callable[..., Contents]):
    from dataclasses import replace

    contents = make_contents()
    plain = write(tmp_path / "plain", make_contents(artifact=replace(contents.artifact, transform=None)))
    with pytest.raises(DataError, match=r"does not take pictures: its inputs are image: float32\[1, 3, 8, 8\]"):
        read_input(load(plain.folder), tmp_path / "p.png")
    with pytest.raises(DataError, match="there is no file"):
        read_input(load(folder), tmp_path / "none.png")


def test_outputs_that_are_no_scores_are_not_read_as_classes(folder: Path):
    bundle = load(folder)
    for output in (np.zeros((1, 1), np.float32), np.zeros((1, 2, 3), np.float32), np.zeros((1, 4), np.int64)):
        assert interpret(bundle, {"y": output}, 5) is None
    assert Transform().softmax
