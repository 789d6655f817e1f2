"""What the commands besides `compile` and `plan` do, as functions that return plain values and never print."""

from __future__ import annotations

import importlib.util
import platform
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploycc import __version__
from deploycc.core import target as targets
from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import ModelRequest
from deploycc.core.kernels import Maps
from deploycc.core.registry import BACKENDS, FORMS
from deploycc.emulate import root as emulator
from deploycc.errors import DeployError
from deploycc.package import cpp_build
from deploycc.planning import find_source
from deploycc.runtime import bundle as bundles
from deploycc.runtime import cuda, host
from deploycc.runtime.inputs import interpret, read_input
from deploycc.runtime.machine import available_cores, cpu_arch, cpu_flags, cpu_model
from deploycc.runtime.seal import SIGNATURE, check_signature
from deploycc.runtime.unpack import opened

Shapes = Mapping[str, tuple[int | str, ...]]
OPTIONAL = {
    "cryptography": ("cryptography (signs packages)", "pip install 'deploycc[sign]'"),
    "mlperf_loadgen": ("MLPerf LoadGen (bench --loadgen)", "pip install 'deploycc[loadgen]'"),
    "accelerate": ("accelerate (passes that train)", "pip install 'deploycc[train]'"),
    "tensorrt_rtx": ("TensorRT-RTX (checks bundles for TensorRT without a GPU)", "pip install 'deploycc[tensorrt-rtx]'"),
    "sklearn": ("scikit-learn (data source sklearn:digits)", "pip install 'deploycc[sklearn]'"),
}
INTERESTING_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve")


def is_bundle(text: str) -> bool:
    """Whether `text` names a folder with a manifest."""
    return (Path(text) / bundles.MANIFEST).is_file()


def load_model(text: str, inputs: Shapes, weights: Path | None, random_weights: bool, seed: int = 0) -> Artifact:
    """Capture a model. Raises SourceError and UsageError."""
    request = ModelRequest(text=text, weights=weights, random_weights=random_weights, inputs=inputs, seed=seed)
    return find_source(text).load(request)


def predict(bundle: Path, file: Path, *, top: int, threads: int) -> dict[str, Any]:
    """One answer of a bundle: {"predictions": […]} for class scores, else {"outputs": {name: values}}."""
    with opened(bundle) as folder:
        loaded = bundles.load(folder)
        host.check_host(loaded.manifest)
        feeds = read_input(loaded, file)
        with bundles.open_session(loaded, threads) as session:
            outputs = session.run(feeds)
    found = interpret(loaded, outputs, top)
    answer = {"predictions": found} if found is not None else {"outputs": {name: array.tolist() for name, array in outputs.items()}}
    return {"file": str(file), **answer, "notices": list(loaded.manifest.get("notices", []))}


def verify(bundle: Path, key: Path | None = None) -> dict[str, Any]:
    """Signature (with its maker's public key), hashes, machine, golden outputs. Raises BundleError or MismatchError."""
    with opened(bundle) as folder:
        return _verified(folder, key) | {"bundle": str(bundle)}


def sealed(folder: Path, key: Path | None) -> tuple[list[str], bundles.LoadedBundle]:
    """What holds of a bundle wherever it lies: its signature, if `key` is given, and its hashes. Raises BundleError."""
    checks: list[str] = []
    if key is not None:  # before anything else is read
        checks.append(f"signed by the owner of {key} ({check_signature(folder, key)})")
    elif (folder / SIGNATURE).is_file():
        checks.append("signed, but by whom was not checked: give --key PUB.pem")
    loaded = bundles.load(folder)
    checks.append(f"{len(bundles.listed(loaded.manifest))} files have the hashes of the manifest")
    return checks, loaded


def _verified(folder: Path, key: Path | None) -> dict[str, Any]:
    checks, loaded = sealed(folder, key)
    host.check_host(loaded.manifest)
    checks.append(f"this machine fits target '{loaded.manifest['target']['name']}'")
    if loaded.file("golden") is None:
        checks.append("no golden outputs to compare (compiled without data)")
    else:
        golden, wanted = bundles.read_golden(loaded), loaded.manifest["target"].get("bench", {}).get("threads", 1)
        with bundles.open_session(loaded, min(wanted, available_cores())) as session:
            worst = bundles.check_golden(golden, session)
        distances = ", ".join(f"{name}: {value:.3g} of {golden.atol.get(name, 0.0):.3g} allowed" for name, value in worst.items())
        checks.append(f"{len(golden.feeds)} golden outputs ({distances})")
    return {"checks": checks, "unlisted": list(loaded.unlisted)}


def inspect(thing: str, *, inputs: Shapes, weights: Path | None, random_weights: bool) -> dict[str, Any]:
    """Signature, operators, precision, MACs and bytes of a bundle or model."""
    if is_bundle(thing):
        loaded = bundles.load(Path(thing))
        manifest = loaded.manifest
        return {
            "kind": "bundle",
            "name": thing,
            "target": manifest["target"]["name"],
            "runtime": dict(manifest["runtime"]),
            "signature": loaded.signature.to_json(),
            "coverage": manifest["shipped"]["coverage"],
            "kernels": _kernels(manifest["target"]["backend"], loaded.model, manifest["runtime"]),
            "graph_of": _graph_of(manifest["target"]["backend"]),
            "decision": manifest.get("decision"),
            "notices": manifest.get("notices", []),
            "files": [{"path": item["path"], "bytes": (loaded.folder / item["path"]).stat().st_size} for item in bundles.listed(manifest)],
        }
    artifact = load_model(thing, inputs, weights, random_weights)
    form = FORMS.get(artifact.form.value)
    stats = form.stats(artifact)
    coverage, kernels = _precision(artifact)
    return {
        "kind": artifact.form.value,
        "name": thing,
        "signature": artifact.signature.to_json(),
        "bytes": stats.bytes,
        "parameters": stats.parameters,
        "macs": stats.macs,
        "operators": dict(Counter(form.operators(artifact.model)).most_common()),
        "coverage": coverage,
        "kernels": kernels,
        "graph_of": _graph_of("onnxruntime"),
        "notices": list(artifact.notices),
    }


def _precision(artifact: Artifact) -> tuple[dict[str, Any] | None, list[dict[str, Any]] | None]:
    """Coverage and kernels in ONNX Runtime for an ONNX model; None for a torch model, whose runtime is not decided yet."""
    if artifact.form is not Form.ONNX:
        return None, None
    backend = BACKENDS.get("onnxruntime")
    any_cpu = targets.Target(name="inspect", title="", backend=backend.name, arch="aarch64", pipeline="")
    with tempfile.TemporaryDirectory() as folder:
        built = backend.build(artifact, any_cpu, Path(folder))
        return asdict(built.coverage), _kernels(backend.name, Path(folder) / built.files[0], built.runtime)


def _kernels(name: str, model: Path, runtime: Mapping[str, str]) -> list[dict[str, Any]] | None:
    """The graph that the runtime computes; None where it does not show it, or is not here."""
    backend = BACKENDS.get(name) if name in BACKENDS.names() else None
    if not isinstance(backend, Maps) or not backend.available():
        return None
    return [asdict(kernel) for kernel in backend.kernels(model, runtime)] or None


def _graph_of(name: str) -> str:
    """Whose graph the kernels are of."""
    backend = BACKENDS.get(name) if name in BACKENDS.names() else None
    return backend.shows if isinstance(backend, Maps) else ""


def doctor() -> dict[str, Any]:
    """This machine, its runtimes, the targets that fit it, and what is missing."""
    flags = cpu_flags()
    backends = {name: BACKENDS.get(name).available() for name in BACKENDS.names()}
    return {
        "deploycc": __version__,
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "arch": cpu_arch(),
        "flags": [flag for flag in INTERESTING_FLAGS if flag in flags],
        "cores": available_cores(),
        "gpu": None if (gpu := cuda.gpu()) is None else asdict(gpu),
        "backends": [
            {"name": name, "version": item.version, "missing": item.missing, "install": item.install} for name, item in backends.items()
        ],
        "targets": [_target_state(name, {key: bool(item) for key, item in backends.items()}) for name in targets.names()],
        "optional": [
            *(
                {"what": what, "here": importlib.util.find_spec(module) is not None, "install": install}
                for module, (what, install) in OPTIONAL.items()
            ),
            {
                "what": "qemu (verify --emulate: bundles for ARM, on its cores)",
                "here": emulator.missing() is None,
                "install": emulator.INSTALL,
            },
            *(
                {"what": f"a compiler for {arch} (package --runner cpp)", "here": install is None, "install": install or ""}
                for arch, install in cpp_build.recipes().items()
            ),
        ],
    }


def _target_state(name: str, backends: Mapping[str, bool]) -> dict[str, Any]:
    try:
        target = targets.load(name)
    except DeployError as error:
        return {"name": name, "builds": False, "runs": False, "why": error.what}
    misfit = targets.misfit(target)
    builds = backends[target.backend]
    why = misfit or ("" if builds else f"backend {target.backend} is missing")
    return {"name": name, "builds": builds, "runs": builds and misfit is None, "why": why}
