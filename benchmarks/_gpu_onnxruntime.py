"""ONNX Runtime's rows: its CUDA and TensorRT execution providers, on the files that deploycc writes for TensorRT.

What a provider lacks ONNX Runtime gives to the CPU without a word, and copies to and fro in every call: here that is an error row, for a
provider that does not start and for single operators alike. Inputs and outputs are bound to PyTorch's memory, so the GPU's clock times it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _gpu_clock import Arrays, Gpu, Tensors, arrays, tensors
from _gpu_rows import Way

from deploycc.runtime.sessions.onnxruntime import GPU_INSTALL
from deploycc.runtime.signature import Signature

BY = "ONNX Runtime"
CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
# (name, provider, the file, its peak, the provider's options)
ROWS: tuple[tuple[str, str, str, str, Mapping[str, str]], ...] = (
    ("ORT CUDA fp32", CUDA, "f32", "fp32", {"use_tf32": "0"}),
    ("ORT CUDA fp16", CUDA, "f16", "fp16", {}),
    ("ORT TensorRT fp16", TENSORRT, "f16", "fp16", {"trt_fp16_enable": "1"}),
    ("ORT TensorRT int8", TENSORRT, "int8", "int8", {"trt_fp16_enable": "1", "trt_int8_enable": "1"}),
)


def runs_here(ort: Any) -> bool:
    """Whether any row can be opened."""
    return bool({CUDA, TENSORRT} & set(ort.get_available_providers()))


class FellBack(RuntimeError):
    """The provider that was asked for does not run the model."""


class OrtGpuSession:
    """One loaded file, inputs and outputs in the GPU's memory."""

    def __init__(self, ort: Any, path: Path | None, signature: Signature, provider: str, options: Mapping[str, str], gpu: Gpu) -> None:
        self._gpu, self._signature = gpu, signature
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        own = {"device_id": "0", "user_compute_stream": str(gpu.stream()), **options}
        self._session: Any = ort.InferenceSession(str(path), settings, providers=[(provider, own)])
        started = self._session.get_providers()
        if provider not in started:  # one that cannot load its libraries is left out, and only logged
            raise FellBack(f"{provider} does not start here, the model would run on {', '.join(started)}: its libraries are missing")
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._bound: dict[int, tuple[Any, dict[str, Any], Tensors]] = {}

    def run(self, feeds: Tensors) -> dict[str, Any]:
        """Queue one call."""
        if id(feeds) not in self._bound:
            self._bound[id(feeds)] = (*self._bind(feeds), feeds)
        binding, outputs, _ = self._bound[id(feeds)]
        self._session.run_with_iobinding(binding, self._options)
        return outputs

    def _bind(self, feeds: Tensors) -> tuple[Any, dict[str, Any]]:
        import torch

        binding = self._session.io_binding()
        batch = len(next(iter(feeds.values())))
        outputs: dict[str, Any] = {}
        for spec in self._signature.outputs:
            shape = [dim if isinstance(dim, int) else batch for dim in spec.shape]
            outputs[spec.name] = torch.empty(shape, dtype=getattr(torch, spec.dtype), device=self._gpu.device)
        for bind, specs, held in (
            (binding.bind_input, self._signature.inputs, feeds),
            (binding.bind_output, self._signature.outputs, outputs),
        ):
            for spec in specs:
                tensor = held[spec.name]
                bind(spec.name, self._gpu.device, 0, np.dtype(spec.dtype), tuple(tensor.shape), tensor.data_ptr())
        return binding, outputs

    def answer(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """One call, from and to the CPU."""
        binding, outputs = self._bind(moved := tensors([feeds], self._gpu.device)[0])
        self._session.run_with_iobinding(binding, self._options)
        self._gpu.synchronize()
        del moved  # the call has read it
        return arrays(outputs)

    def synchronize(self) -> None:
        """Until the GPU is idle."""
        self._gpu.synchronize()

    def __enter__(self) -> OrtGpuSession:
        return self

    def __exit__(self, *exc: object) -> None:
        """Forget the model, so that its memory goes."""
        self._bound.clear()
        self._session = None


def ways(files: Mapping[str, Path], signature: Signature, wanted: Mapping[str, Sequence[Arrays]], gpu: Gpu, ort: Any) -> list[Way]:
    """A row for each provider and precision; where the provider or the file is missing, why."""
    found: list[Way] = []
    for name, provider, precision, kind, options in ROWS:
        problem = (
            "" if provider in ort.get_available_providers() else f"ONNX Runtime {ort.__version__} has no {provider} here: {GPU_INSTALL}"
        )
        if not problem and precision not in files:
            problem = f"there is no {precision} file of this network"
        opened = None if problem else partial(_open, ort, files.get(precision), signature, provider, options, gpu)
        found.append(Way(name, BY, kind, opened, problem, wanted.get(precision)))
    return found


def _open(
    ort: Any, path: Path | None, signature: Signature, provider: str, options: Mapping[str, str], gpu: Gpu, probes: Sequence[Tensors]
) -> OrtGpuSession:
    return OrtGpuSession(ort, path, signature, provider, options, gpu)
