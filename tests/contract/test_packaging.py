"""The wheel carries what the package reads at run time: targets, the report's template, the demo's labels."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if shutil.which("uv") is None:
        pytest.skip("uv is not on PATH")
    out = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        ["uv", "build", "--wheel", "--offline", "--out-dir", str(out), str(ROOT)], capture_output=True, text=True, check=False
    )
    if done.returncode and "hatchling" in done.stderr:
        pytest.skip("the build backend hatchling is not in uv's cache")
    assert done.returncode == 0, done.stderr
    return set(zipfile.ZipFile(next(out.glob("*.whl"))).namelist())


def test_every_target_is_in_the_wheel(wheel):
    assert {f"deploycc/_targets/{path.name}" for path in (ROOT / "targets").glob("*.toml")} <= wheel


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    files = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "deploycc").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert files <= wheel
    assert any(name.endswith("report.html.j2") for name in files)
    assert "deploycc/_demo/tuxpaint_imagenet_labels.txt" in files


def test_the_top_level_is_the_agreed_one():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\n")
    if tracked == [""]:
        pytest.skip("this is no git checkout")
    names = {name.partition("/")[0] for name in tracked if name and not name.startswith(".")}
    assert names <= {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "deploycc", "targets", "benchmarks", "tests"}
