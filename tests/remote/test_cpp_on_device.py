"""The C++ runner on a device: no Python there."""

from __future__ import annotations

import shutil

import pytest

from deploycc.package.pack import pack
from deploycc.runtime.machine import cpu_arch
from deploycc.runtime.unpack import opened

pytestmark = pytest.mark.slow


@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("c++") is None, reason="there is no cmake and C++ compiler")
def test_a_bundle_with_a_program_of_its_own_needs_no_python(make_work, local, device, run, bundle_folder, tmp_path):
    packed = pack(bundle_folder, tmp_path / "tiny.zip", runners=["cpp"], arch=cpu_arch())
    local.prefix = "PATH=/usr/bin:/bin\npython3() { exit 99; }"
    with opened(packed.path) as folder:
        found = run(make_work(folder), device)
    assert found.exit_status == 0, found.failures[0].what
    (item,) = found.finished
    assert item.selftest["ok"] is True
    assert item.bench is not None
    assert item.bench.measurements[0].inputs == {"image": ("float32", (1, 3, 8, 8))}
    assert item.bench.settings.min_runs == 10
    assert item.bench.measurements[0].summary.runs >= 10
