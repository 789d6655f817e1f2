"""deploycc takes a trained model to the hardware it must run on.

Importing this package imports no framework; `compile`, `plan`, `benchmark` and `load_target` load what they need when called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploycc.bench.result import BenchResult
    from deploycc.core.target import Target
    from deploycc.driver import Compiled
    from deploycc.planning import Plan

__all__ = ["benchmark", "compile", "load_target", "plan", "restore"]
__version__ = "0.1.0"


def compile(model: Any, **options: Any) -> Compiled:
    """Compile a model (text as on the command line, a torch.nn.Module, or a (module, example input) pair) into a checked bundle.

    `options` are the fields of `deploycc.planning.Options`, named like the command line's. Where `target` names several, a family ("x86")
    or a list ("a,b"), the result is that of the best.

    Raises:
        DeployError: what, where and how to fix.
    """
    from deploycc import contest, driver, planning

    given = planning.options(**options)
    field = contest.field(given.target) if isinstance(given.target, str) else None
    return driver.compile(model, given) if field is None else contest.run(model, given, *field).best


def plan(model: Any, **options: Any) -> Plan:
    """What `compile` would do; runs nothing. Raises UsageError."""
    from deploycc import planning

    return planning.plan(model, planning.options(**options))


def benchmark(*models: str, data: str | None = None, threads: int = 1, seed: int = 0, **options: Any) -> BenchResult:
    """Latencies of bundles and models in one interleaved run; the first is the baseline.

    `options` are the other fields of `deploycc.benching.Request`, such as scenario=Scenario(kind="multi-stream", streams=2).

    Raises:
        DeployError: what, where and how to fix.
    """
    from deploycc.benching import Request, bench_all
    from deploycc.core.target import Bench

    options.setdefault("settings", Bench(threads=threads))
    return bench_all(Request(models, data=data, seed=seed, **options))


def restore(path: str, module: Any = None) -> Any:
    """The trained or pruned torch.nn.Module of a bundle's `checkpoint/architecture.json`, in eval mode.

    Args:
        path: of the architecture.json.
        module: the module as it was before deploycc, where it was given in Python and not by a text; it is not changed.

    Raises:
        SourceError: the model's code is missing or changed.
        StoreError: the edits or weights do not fit `module`.
    """
    from pathlib import Path

    from deploycc.core.artifact import Artifact, Form, Signature
    from deploycc.core.contract import ModelRequest
    from deploycc.forms.module import ModuleForm
    from deploycc.sources.models.checkpoint import CheckpointModel

    if module is None:
        return CheckpointModel().load(ModelRequest(str(path))).model
    return ModuleForm().load(Path(path).parent, Artifact(Form.MODULE, module, Signature((), ()), "python", edits=()))


def load_target(name: str) -> Target:
    """A target by name, or a .toml file. Raises TargetError and UnknownName."""
    from deploycc.core import target

    return target.load(name)
