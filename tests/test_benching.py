from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploycc import fresh_model
from deploycc.benching import Request, bench_all
from deploycc.core.target import Bench
from deploycc.errors import UsageError
from deploycc.package.bundle import write
from deploycc.package.manifest import Contents

QUICK = Bench(min_seconds=0.05, min_runs=10)
NET = """
import torch


def make():
    net = torch.nn.Linear(4, 2).eval()
    net.example_input = torch.zeros(1, 4)
    return net
"""


@pytest.fixture
def bundle(tmp_path: Path, make_contents: Callable[..., Contents]) -> str:
    return str(write(tmp_path / "bundle", make_contents()).folder)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "pictures" / "ants").mkdir(parents=True)
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / "ants" / f"{index}.png")
    return tmp_path / "pictures"


def test_stages_of_a_bundle_on_real_pictures(bundle: str, pictures: Path):
    for path in (pictures, pictures / "ants" / "0.png"):
        (found,) = bench_all(Request([bundle], settings=QUICK, pictures=path)).measurements
        medians = found.stage_ms()
        assert all(value > 0 for value in medians.values())
        assert medians["pre-processing"] > medians["post-processing"]
        assert found.end_to_end_ms == pytest.approx(sum(medians.values()), rel=0.5)


def test_pictures_are_refused_where_there_is_nothing_to_do_with_them(bundle: str, tmp_path: Path, tiny_onnx: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="there are no pictures in"):
        bench_all(Request([bundle], settings=QUICK, pictures=tmp_path / "empty"))
    with pytest.raises(UsageError, match="has no transform, so there are no stages to time"):
        bench_all(Request([str(tiny_onnx)], settings=QUICK, pictures=tmp_path))


def test_a_model_named_twice_is_refused(bundle: str):
    with pytest.raises(UsageError, match="named twice"):
        bench_all(Request([bundle, bundle], settings=QUICK))


def test_a_torch_model_opens_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "tiny_net.py").write_text(NET)
    np.savez(tmp_path / "feeds.npz", x=np.zeros((1, 4), np.float32))
    asked = {
        "model": f"{tmp_path / 'tiny_net.py'}:make",
        "inputs": {"x": [1, 4]},
        "weights": None,
        "random_weights": False,
        "seed": 0,
        "threads": 1,
    }
    assert fresh_model.main([json.dumps(asked), str(tmp_path / "feeds.npz"), "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["imported"] < found["opened"] < found["answered"]
