"""NNCF and OpenVINO, run by the Python of their own virtual environment: `python _quantizers_nncf.py job.json`.

Jobs (see `_quantizers_peers.py`): "nncf-onnx" and "nncf-openvino" quantize a float ONNX file on the given calls and write the result;
"openvino-run" answers on the given calls, and times the model in turns with an ONNX file in this Python's ONNX Runtime.
Needs nncf, openvino, onnx, onnxruntime and numpy; nothing of deploycc but its clock, which needs numpy alone.
"""

import json
import logging
import sys
import time
from pathlib import Path

import numpy as np

MIN_SECONDS, MIN_RUNS = 2.0, 40
OPSET = 13  # per-channel Q/DQ


def read_calls(path):
    """Feeds by index and name."""
    calls = {}
    with np.load(path) as file:
        for key in file.files:
            index, _, name = key.partition("/")
            calls.setdefault(int(index), {})[name] = file[key]
    return [calls[index] for index in sorted(calls)]


def parameters(settings, samples):
    """Keyword arguments of nncf.quantize from plain settings."""
    import nncf

    made = {"subset_size": samples}
    if "preset" in settings:
        made["preset"] = nncf.QuantizationPreset(settings["preset"])
    if "model_type" in settings:
        made["model_type"] = nncf.ModelType(settings["model_type"])
    if "target_device" in settings:
        made["target_device"] = nncf.TargetDevice(settings["target_device"])
    if "fast_bias_correction" in settings:
        made["fast_bias_correction"] = settings["fast_bias_correction"]
    advanced = {}
    if "smooth_quant" in settings:
        advanced["smooth_quant_alphas"] = nncf.AdvancedSmoothQuantParameters(**settings["smooth_quant"])
    if "per_channel_activations" in settings:
        from nncf.quantization.advanced_parameters import QuantizationParameters

        advanced["activations_quantization_params"] = QuantizationParameters(per_channel=settings["per_channel_activations"])
    if advanced:
        made["advanced_parameters"] = nncf.AdvancedQuantizationParameters(**advanced)
    return made


def quantize(job):
    """Write the quantized model, and the seconds that quantizing took."""
    import nncf

    nncf.set_log_level(logging.ERROR)
    calls = read_calls(job["calls"])
    data = nncf.Dataset(calls)
    wanted = parameters(job["settings"], len(calls))
    if job["do"] == "nncf-onnx":
        import onnx

        model = onnx.load(job["model"])
        if model.opset_import[0].version < OPSET:
            model = onnx.version_converter.convert_version(model, OPSET)
        begin = time.perf_counter()
        made = nncf.quantize(model, data, **wanted)
        seconds = time.perf_counter() - begin
        onnx.save(made, job["out"])
    else:
        import openvino

        begin = time.perf_counter()
        # Core.read_model leaves biases in shapes that NNCF does not find: it would correct none of them, silently.
        made = nncf.quantize(openvino.convert_model(job["model"]), data, **wanted)
        seconds = time.perf_counter() - begin
        openvino.save_model(made, job["out"], compress_to_fp16=False)
    Path(job["seconds"]).write_text(json.dumps(seconds), encoding="utf-8")


def run(job):
    """Answers, and times against the baseline."""
    import onnxruntime
    import openvino

    sys.path.insert(0, str(Path(__file__).parent.parent))
    from deploycc.runtime.measure import Stop, time_interleaved
    from deploycc.runtime.statistics import ratio_of_medians, summarize

    calls = read_calls(job["calls"])
    hints = {"INFERENCE_NUM_THREADS": job["threads"], "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(job["model"], "CPU", hints)
    request = compiled.create_infer_request()

    def answer(feeds):
        found = request.infer(feeds, share_inputs=True, share_outputs=True)
        return {name: found[place] for place, name in enumerate(job["outputs"])}

    np.savez(job["answers"], **{f"{i}/{name}": np.array(a) for i, feeds in enumerate(calls) for name, a in answer(feeds).items()})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = job["threads"], 1
    baseline = onnxruntime.InferenceSession(job["baseline"], options, providers=["CPUExecutionProvider"])
    probes = [calls[index] for index in job["probes"]]
    samples = time_interleaved(
        {
            "openvino": lambda index: answer(probes[index % len(probes)]),
            "baseline": lambda index: baseline.run(None, probes[index % len(probes)]),
        },
        Stop(MIN_SECONDS, MIN_RUNS),
    )
    ratio = ratio_of_medians(samples["openvino"], samples["baseline"])
    found = {"p50_ms": summarize(samples["openvino"]).p50, "ratio": (ratio.value, ratio.low, ratio.high)}
    Path(job["times"]).write_text(json.dumps(found), encoding="utf-8")


def main():
    """Do the job."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    (run if job["do"] == "openvino-run" else quantize)(job)


if __name__ == "__main__":
    main()
