from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploycc.runtime import kernel
from deploycc.runtime.kernel import Observed, Watch

QUIET = Observed(2.0, 0.01, 0.0, 0.0, 0.1, 0.0, 0, 2990.0, 3000.0)


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def stat(busy: int, steal: int) -> str:
    cpus = sorted(os.sched_getaffinity(0))
    return "cpu 0\n" + "".join(f"cpu{cpu} {busy} 0 0 50 0 0 0 {steal} 0 0\n" for cpu in cpus)


def test_what_the_kernel_counts_is_read(tmp_path: Path):
    cpus, tick = sorted(os.sched_getaffinity(0)), os.sysconf("SC_CLK_TCK")
    files = {
        "proc/stat": stat(0, 0),
        "proc/self/task/7/schedstat": "5 1000000000 3\n",
        "proc/pressure/cpu": "some avg10=0.00 avg60=0.00 avg300=0.00 total=1000000\n",
        "proc/self/cgroup": "0::/job\n",
        "sys/fs/cgroup/job/cpu.stat": "usage_usec 5\nthrottled_usec 2000000\n",
        f"sys/devices/system/cpu/cpu{cpus[0]}/thermal_throttle/core_throttle_count": "4\n",
        f"sys/devices/system/cpu/cpu{cpus[0]}/cpufreq/scaling_cur_freq": "3000000\n",
    }
    watch = Watch(tree(tmp_path, files))
    watch.look()
    later = {
        "proc/stat": stat(1000 * tick, 100 * tick),
        "proc/self/task/7/schedstat": "5 1500000000 3\n",
        "proc/pressure/cpu": "some avg10=0.00 avg60=0.00 avg300=0.00 total=1000001\n",
        "sys/fs/cgroup/job/cpu.stat": "usage_usec 5\nthrottled_usec 5000000\n",
        f"sys/devices/system/cpu/cpu{cpus[0]}/thermal_throttle/core_throttle_count": "6\n",
        f"sys/devices/system/cpu/cpu{cpus[0]}/cpufreq/scaling_cur_freq": "2000000\n",
    }
    tree(tmp_path, later)
    time.sleep(kernel.SAMPLED_EACH)
    watch.look()
    found = watch.seen()
    assert found.others is not None
    assert found.others * found.seconds == pytest.approx(1000 * len(cpus), abs=2)
    assert found.steal is not None
    assert found.steal * found.seconds == pytest.approx(100 * len(cpus))
    assert (found.waited, found.throttled, found.heat) == (0.5, 3.0, 2)
    assert (found.clock_low, found.clock_high) == (2000.0, 3000.0)
    assert found.pressure == pytest.approx(1e-6 / found.seconds, rel=1e-3)
    assert len(found.warnings()) == 6


def test_a_control_group_of_version_1_is_read(tmp_path: Path):
    files = {
        "proc/self/cgroup": "4:memory:/\n2:cpu,cpuacct:/job\n",
        "sys/fs/cgroup/cpu,cpuacct/job/cpu.stat": "throttled_time 3000000000\n",
    }
    assert kernel._throttled(tree(tmp_path, files)) == 3.0


def test_what_a_kernel_does_not_offer_is_unknown_and_never_zero(tmp_path: Path):
    watch = Watch(tmp_path)
    watch.look()
    found = watch.seen()
    for name in ("others", "steal", "waited", "pressure", "throttled", "heat", "clock_low", "clock_high"):
        assert getattr(found, name) is None, name
    assert found.warnings() == ()
    files = {"proc/stat": "cpu0 1 2\n", "proc/pressure/cpu": "nothing", "proc/self/task/1/schedstat": ""}
    assert Watch(tree(tmp_path, files)).seen().others is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"others": 0.9}, "other processes used 0.90 CPUs"),
        ({"steal": 0.05}, "the hypervisor gave 0.05 CPUs' time to other guests"),
        ({"waited": 0.3}, "threads that were measured waited 0.30 s for a CPU"),
        ({"throttled": 0.2}, "quota stopped the process for 0.20 s"),
        ({"heat": 3}, "slowed 3 times for its temperature"),
        ({"clock_low": 1200.0}, "the clock went between 1200 and 3000 MHz"),
    ],
)
def test_what_disturbs_is_told(change: dict[str, float], message: str):
    from dataclasses import replace

    assert QUIET.warnings() == ()
    (found,) = replace(QUIET, **change).warnings()
    assert message in found


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="this kernel has no /proc/stat")
def test_another_process_that_burns_a_core_is_seen_here():
    code = "import time\nend = time.time() + 0.8\nwhile time.time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as other:
        time.sleep(0.1)
        watch = Watch()
        time.sleep(0.5)
        found = watch.seen()
        other.wait()
    assert found.others is not None
    assert found.others > 0.3
    assert any("other processes used" in text for text in found.warnings())
