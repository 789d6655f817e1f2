"""Finds out what this CPU can do, in a process of its own: `python _peaks_worker.py THREADS`, and the answer as JSON.

    products    (m, k)·(k, n) by every library that is here, for several shapes; the fastest call of the fastest of them counts
    triad       a = b + s·c over arrays of one size (McCalpin's STREAM): 12 bytes for each float32, for several sizes

A process of its own, because libraries fix their number of threads when they are first used, and because torch is no part of what is
measured. Best of many short calls, in turns: a busy machine makes calls slower, never faster. Imports no deploycc.
"""

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

SHAPES = ((256, 256, 256), (512, 512, 512), (1024, 512, 512), (1024, 512, 1024), (1024, 1024, 1024))  # (m, k, n), smallest first
ROUNDS, ROUND_SECONDS = 5, 0.02
STILL_RUNNING = 0.75  # of the best so far: what is slower than this after a round is not called again
SLOW_CALL = 0.25  # seconds: a product that takes longer is emulated, and no larger one is tried
SETS = (768 << 10, 1536 << 10, 3 << 20, 12 << 20, 48 << 20)  # bytes of all three arrays; and one that no cache holds
LEAST_MEMORY_SET, CACHES = 256 << 20, 4  # times the largest cache, as STREAM demands
TRIADS = 12

Call = Callable[[], Any]
Shape = tuple[int, int, int]
Maker = Callable[[Shape], Call]


def torch_product(dtype: str) -> Maker:
    """`torch.mm`: oneDNN or MKL."""
    import torch

    def make(shape: Shape) -> Call:
        m, k, n = shape
        a, b, out = (torch.randn(rows, columns).to(getattr(torch, dtype)) for rows, columns in ((m, k), (k, n), (m, n)))
        return lambda: torch.mm(a, b, out=out)

    return make


def torch_int8() -> Maker:
    """What oneDNN makes of u8·s8 → u8 with packed weights, as inductor calls it."""
    import torch

    operators: Any = torch.ops.onednn

    def make(shape: Shape) -> Call:
        m, k, n = shape
        x = torch.randint(0, 256, (m, k), dtype=torch.uint8)
        packed = operators.qlinear_prepack(torch.randint(-127, 128, (n, k), dtype=torch.int8), [m, k])
        scales, zeros = torch.full((n,), 0.01), torch.zeros(n, dtype=torch.int64)
        return lambda: operators.qlinear_pointwise(x, 0.01, 3, packed, scales, zeros, None, 0.5, 3, torch.uint8, "none", [], "")

    return make


def torch_int_mm() -> Maker:
    """s8·s8 → s32."""
    import torch

    def make(shape: Shape) -> Call:
        m, k, n = shape
        a, b = (torch.randint(-127, 128, sides, dtype=torch.int8) for sides in ((m, k), (k, n)))
        return lambda: torch.ops.aten._int_mm(a, b)

    return make


def graph(shape: Shape, kind: str) -> bytes:
    """x·w as an ONNX model: "float", "integer" (u8·s8 → s32) or "qdq" (u8·s8 → u8)."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    m, k, n = shape
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (k, n)).astype(np.int8)
    constants: dict[str, Any] = {"w": codes if kind != "float" else rng.standard_normal((k, n)).astype(np.float32)}
    if kind != "float":
        constants |= {"z": np.uint8(128)}
    if kind == "qdq":
        constants |= {"s": np.float32(0.01), "t": np.float32(0.5), "o": np.int8(0)}
    nodes = {
        "float": [("MatMul", ["x", "w"], "y")],
        "integer": [("MatMulInteger", ["x", "w", "z"], "y")],
        "qdq": [
            ("DequantizeLinear", ["x", "s", "z"], "a"),
            ("DequantizeLinear", ["w", "s", "o"], "b"),
            ("MatMul", ["a", "b"], "c"),
            ("QuantizeLinear", ["c", "t", "z"], "y"),
        ],
    }[kind]
    taken = TensorProto.FLOAT if kind == "float" else TensorProto.UINT8
    given = {"float": TensorProto.FLOAT, "integer": TensorProto.INT32, "qdq": TensorProto.UINT8}[kind]
    made = helper.make_graph(
        [helper.make_node(operator, inputs, [output]) for operator, inputs, output in nodes],
        "product",
        [helper.make_tensor_value_info("x", taken, [m, k])],
        [helper.make_tensor_value_info("y", given, [m, n])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def operand(shape: Shape, kind: str) -> Any:
    """What it takes."""
    import numpy as np

    rng = np.random.default_rng(1)
    return rng.standard_normal(shape[:2]).astype(np.float32) if kind == "float" else rng.integers(0, 256, shape[:2]).astype(np.uint8)


def onnxruntime_product(kind: str, threads: int) -> Maker:
    """ONNX Runtime's CPU provider."""
    import onnxruntime  # pyright: ignore[reportMissingTypeStubs]

    ort: Any = onnxruntime  # its stubs leave most types out

    def make(shape: Shape) -> Call:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        session = ort.InferenceSession(graph(shape, kind), options, providers=["CPUExecutionProvider"])
        feeds = {"x": operand(shape, kind)}
        return lambda: session.run(None, feeds)

    return make


def openvino_product(kind: str, precision: str, threads: int) -> Maker:
    """OpenVINO's CPU plug-in; LookupError where it would compute in another precision."""
    import openvino

    ov: Any = openvino  # its types are the C++ library's
    core = ov.Core()
    if precision not in ("f32", *core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")):
        raise LookupError(f"OpenVINO has no {precision} on this CPU")
    hint = {"FP16": "f16", "BF16": "bf16"}.get(precision, "f32")
    settings = {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}

    def make(shape: Shape) -> Call:
        request = core.compile_model(core.read_model(graph(shape, kind)), "CPU", settings).create_infer_request()
        request.set_input_tensor(ov.Tensor(operand(shape, kind)))
        return request.infer

    return make


def candidates(threads: int) -> dict[str, dict[str, Callable[[], Maker]]]:
    """By precision and library."""
    return {
        "f32": {
            "torch.mm": lambda: torch_product("float32"),
            "ONNX Runtime": lambda: onnxruntime_product("float", threads),
            "OpenVINO": lambda: openvino_product("float", "f32", threads),
        },
        "bf16": {
            "torch.mm": lambda: torch_product("bfloat16"),
            "OpenVINO": lambda: openvino_product("float", "BF16", threads),
        },
        "f16": {
            "torch.mm": lambda: torch_product("float16"),
            "OpenVINO": lambda: openvino_product("float", "FP16", threads),
        },
        "int8": {
            "torch, oneDNN's qlinear": torch_int8,
            "torch._int_mm": torch_int_mm,
            "ONNX Runtime": lambda: onnxruntime_product("integer", threads),
            "OpenVINO": lambda: openvino_product("qdq", "f32", threads),
        },
    }


def fastest(call: Call, seconds: float, most: int = 1000) -> float:
    """Seconds of the fastest call."""
    best, end = float("inf"), time.perf_counter() + seconds
    for _ in range(most):
        started = time.perf_counter()
        call()
        finished = time.perf_counter()
        best = min(best, finished - started)
        if finished > end:
            break
    return best


def opened(makers: dict[str, Callable[[], Maker]], told: dict[str, str]) -> Iterator[tuple[str, Shape, Call]]:
    """Every product that runs, called once; `told` gets the reason of what does not."""
    for name, find in makers.items():
        try:
            make = find()
            for shape in SHAPES:
                call = make(shape)
                call()
                yield name, shape, call
                if fastest(call, 0.0) > SLOW_CALL:
                    break
        except Exception as error:  # noqa: BLE001  each library has its own; without one of them the others count
            told[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"


def peak(makers: dict[str, Callable[[], Maker]]) -> dict[str, Any]:
    """The best of them in MACs per second, and what each reached."""
    told: dict[str, str] = {}
    running = list(opened(makers, told))
    found: dict[tuple[str, Shape], float] = {}
    for _ in range(ROUNDS):
        for name, shape, call in running:
            found[name, shape] = max(found.get((name, shape), 0.0), math.prod(shape) / fastest(call, ROUND_SECONDS))
        best = max(found.values(), default=0.0)
        running = [item for item in running if found[item[:2]] >= STILL_RUNNING * best]
    if not found:
        return {"macs": None, "library": "", "shape": None, "others": told}
    name, shape = max(found, key=lambda key: found[key])
    each = {name: f"{max(value for (other, _), value in found.items() if other == name) / 1e9:.4g} GMAC/s" for name, _ in found}
    return {"macs": found[name, shape], "library": name, "shape": shape, "others": {**each, **told}}


def bandwidth(total: int) -> float:
    """Bytes per second of the triad over arrays of `total` bytes."""
    import torch

    count = total // 12
    a, b, c = torch.empty(count), torch.full((count,), 1.0), torch.full((count,), 2.0)
    call = lambda: torch.add(b, c, alpha=3.0, out=a)  # noqa: E731
    call()
    return 12 * count / min(fastest(call, ROUND_SECONDS) for _ in range(TRIADS if total < LEAST_MEMORY_SET else 3))


def memory_set() -> int:
    """Bytes that no cache holds, as far as the memory allows."""
    folder, caches = "/sys/devices/system/cpu/cpu0/cache", [0]
    try:
        for index in os.listdir(folder):
            with open(f"{folder}/{index}/size") as file:
                text = file.read().strip()
            caches.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        free = 4 * LEAST_MEMORY_SET
    return min(max(LEAST_MEMORY_SET, CACHES * max(caches)), max(SETS[-1], free // 4))


def main(threads: int) -> None:
    """Measure, print."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    sets = [*(threads * size for size in SETS), memory_set()]
    answer = {
        "peaks": {precision: peak(makers) for precision, makers in candidates(threads).items()},
        "bandwidth": [(size, bandwidth(size)) for size in sorted(set(sets))],
    }
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main(int(sys.argv[1]))
