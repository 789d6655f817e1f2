from __future__ import annotations

from pathlib import Path

import pytest

from deploycc.bench import energy


def package(root: Path, name: str, label: str, microjoules: int, wrap: int = 1_000_000) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in (("name", label), ("energy_uj", microjoules), ("max_energy_range_uj", wrap)):
        (folder / file).write_text(f"{text}\n")
    return folder


def test_packages_are_summed_and_a_counter_that_wraps_goes_on(tmp_path: Path):
    first, second = package(tmp_path, "intel-rapl:0", "package-0", 900_000), package(tmp_path, "intel-rapl:1", "package-1", 0)
    package(tmp_path, "intel-rapl:0:0", "core", 5)  # part of the package: not counted twice
    meter = energy.find(powercap=tmp_path)
    assert meter is not None
    assert meter.source == "RAPL package-0, package-1"
    assert meter() == 0.0
    (first / "energy_uj").write_text("100000\n")
    (second / "energy_uj").write_text("50000\n")
    assert meter() == pytest.approx(0.25)


def test_without_a_meter_there_is_none(tmp_path: Path):
    assert energy.find(powercap=tmp_path) is None
    folder = package(tmp_path, "intel-rapl:0", "package-0", 1)
    (folder / "energy_uj").unlink()
    assert energy.find(powercap=tmp_path) is None
    assert energy.find(gpu=True, library="libthere-is-none.so.1") is None
