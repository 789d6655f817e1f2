from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deploycc.errors import UsageError
from deploycc.package.bundle import write
from deploycc.package.manifest import Contents
from deploycc.runtime import fresh
from deploycc.runtime.signature import Signature


def feeds(tmp_path: Path) -> Path:
    np.savez(tmp_path / "feeds.npz", image=np.ones((1, 3, 8, 8), np.float32))
    return tmp_path / "feeds.npz"


def test_a_file_and_a_bundle_are_opened_and_answer(
    tmp_path: Path,
    tiny_onnx: Path,
    tiny_signature: Signature,
    make_contents: Callable[..., Contents],
    capsys: pytest.CaptureFixture[str],
):
    bundle = write(tmp_path / "out", make_contents()).folder
    for opening in (["file", "onnxruntime", str(tiny_onnx), json.dumps(tiny_signature.to_json()), "1"], ["bundle", str(bundle), "1"]):
        assert fresh.main([*opening, str(feeds(tmp_path)), "2"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["imported"] < found["opened"] < found["answered"]
        assert found["peak"] is None or found["peak"] >= found["steady"] > 1_000_000


def test_what_is_no_way_to_open_a_model_is_refused():
    with pytest.raises(UsageError, match="'url' is no way to open a model"):
        fresh.opener(["url", "x"])
