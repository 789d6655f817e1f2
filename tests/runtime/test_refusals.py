"""What must not run is refused, by the host's verify and by the device's runner alike, each with its reason and what to do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundle_tools import rewrite

from deploycc import cli
from deploycc.package.archive import write_archive
from deploycc.package.bundle import write
from deploycc.package.manifest import Contents
from deploycc.runtime.__main__ import main
from deploycc.runtime.machine import cpu_arch

OTHER = "aarch64" if cpu_arch() == "x86_64" else "x86_64"


def changed_byte(folder: Path) -> None:
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)


def path_outside(folder: Path) -> None:
    (folder.parent / "outside").write_text("x")
    rewrite(folder, lambda document: document["files"][1].update(path="../outside"))


def runtime_too_old(folder: Path) -> None:
    rewrite(folder, lambda document: document["runtime"].update(minimum="99.1"))


def cpu_without(folder: Path) -> None:
    rewrite(folder, lambda document: document["target"].update(requires=["avx1024_vnni"]))


def other_architecture(folder: Path) -> None:
    rewrite(folder, lambda document: document["target"].update(arch=OTHER))


def other_numbers(folder: Path) -> None:
    """A golden tolerance of nothing, and outputs that were another model's."""
    import hashlib

    import numpy as np

    from deploycc.runtime.bundle import Golden, load, read_golden, write_golden

    golden = read_golden(load(folder))
    write_golden(
        folder / "golden.npz", Golden(golden.feeds, tuple({"logits": row["logits"] + np.float32(9)} for row in golden.outputs), golden.atol)
    )

    def fit(document: dict[str, Any]) -> None:
        entry = next(item for item in document["files"] if item["role"] == "golden")
        entry["sha256"] = hashlib.sha256((folder / "golden.npz").read_bytes()).hexdigest()

    rewrite(folder, fit)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "package"])
@pytest.mark.parametrize(
    ("spoil", "reason", "fix"),
    [
        (changed_byte, "model.onnx was changed: its SHA-256 should be", "copy the bundle again"),
        (path_outside, "lists the file '../outside', which is outside the bundle", "do not use this bundle"),
        (runtime_too_old, "the bundle needs onnxruntime>=99.1, this machine has onnxruntime", "pip install 'onnxruntime>=99.1'"),
        (cpu_without, "the bundle needs a CPU with avx1024_vnni;", "compile for a target without that requirement"),
        (
            other_architecture,
            f"the bundle is for {OTHER} (target 'tiny-target'), this machine is {cpu_arch()}",
            "deploycc compile … --target auto",
        ),
        (other_numbers, "golden sample 0: output 'logits' is 9 away from what the compiler saw", "install the runtime version"),
    ],
)
def test_it_is_refused_on_the_host_and_on_the_device(
    tmp_path: Path,
    make_contents: Callable[..., Contents],
    spoil: Callable[[Path], None],
    reason: str,
    fix: str,
    packed: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    bundle = write(tmp_path / "lite", make_contents()).folder
    spoil(bundle)
    if packed:
        write_archive(bundle, tmp_path / "lite.zip", "zip", "lite")
        bundle = tmp_path / "lite.zip"
    assert main(["selftest", "--bundle", str(bundle)]) == 1
    device = capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["deploycc", "verify", str(bundle)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    host = capsys.readouterr()
    assert stop.value.code == 1
    for shown in (device, host):
        assert shown.out == ""
        assert reason in shown.err
        assert fix in shown.err
