"""The process in which TensorRT-RTX builds: a crash of its builder ends this one and not the compiler.

    python -m deploycc.backends._tensorrt_child REQUEST.json

The request names the module, the model, the recipe and the file for the answer.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from deploycc.errors import DeployError
from deploycc.runtime.tensorrt_engine import Recipe, build

LAYERS = "Layers:"


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What became of it: {"version", "bytes", "seconds", "layers", "error"}; the error is "" when an engine was built."""
    trt = importlib.import_module(request["module"])
    begin = time.perf_counter()
    found: dict[str, Any] = {"version": str(trt.__version__), "bytes": 0, "layers": "", "error": ""}
    try:
        plan = build(trt, Path(request["model"]), Recipe.parse(request["recipe"]), verbose=True)
        layers = next((text for text in plan.messages if text.startswith(LAYERS)), "")
        found |= {"bytes": len(plan.engine), "layers": layers}
    except DeployError as error:
        found["error"] = error.what
    return {**found, "seconds": time.perf_counter() - begin}


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(asked["answer"]).write_text(json.dumps(answer(asked)), encoding="utf-8")
