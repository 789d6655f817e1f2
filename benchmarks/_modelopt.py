"""NVIDIA ModelOpt on a float ONNX file, run by the Python of its own virtual environment: `python _modelopt.py job.json`.

The job names the model, a .npz of stacked inputs by name, int8 or fp8, the precision of float operators and the file to write. Needs
nvidia-modelopt[onnx] and nothing of deploycc.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np


def main():
    from modelopt.onnx.quantization import quantize

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with np.load(job["calls"]) as file:
        arrays = {name: file[name] for name in file.files}
    begin = time.perf_counter()
    quantize(
        job["model"], quantize_mode=job["codes"], calibration_data=arrays, calibration_method="max", calibration_eps=["cpu"],
        high_precision_dtype=job["precision"], output_path=job["out"], log_level="ERROR",
    )  # fmt: skip
    Path(job["answer"]).write_text(json.dumps({"seconds": time.perf_counter() - begin}), encoding="utf-8")


if __name__ == "__main__":
    main()
