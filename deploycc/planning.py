"""What a compile would do: target, backend, source, typed pipeline, data; everything that can be refused before slow work is."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from deploycc.core import target as targets
from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import Backend, Dataset, ModelRequest, ModelSource
from deploycc.core.data import Data
from deploycc.core.pipeline import Pipeline
from deploycc.core.registry import BACKENDS, DATASETS, MODELS, suggest
from deploycc.core.target import Target
from deploycc.core.timing import Profiles
from deploycc.errors import UsageError
from deploycc.runtime.audio import AnyTransform


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Everything a user may say besides the model; the command line and `deploycc.compile` share it.

    Attributes:
        target: a target's name, "auto", a path of a .toml file, or a Target.
        data: data set that judges the model (and calibrates it, if `calibration` is not given).
        calibration: data set for calibration only.
        passes: a pipeline that replaces the target's, or edits of it (`+pass`, `-pass`).
        metric: "auto", "top1", "top5", "f1", "mse", "agreement", "cosine" or "sqnr".
        max_drop: largest drop of the metric against the float reference, 0 to 1; None = the target's.
        max_latency_ms: limit on the 95th percentile; None = the target's.
        max_size_mb: limit on the model's files; None = the target's.
        budget_s: no new attempt starts after this many seconds; None = no bound.
        threads: of the bench and the session; None = the target's.
        inputs: input name → shape, where the model does not say.
        weights: a file of weights for the model.
        random_weights: accept random weights where no others can be had.
        seed: of every random choice.
        output: folder of the bundle.
        zip: write `output`.zip too.
        dump: folder for the model as text after every pass.
        cache: root of the store of finished passes; None = the user's cache folder.
        resume: go on from what an earlier run of the same compile finished, down to the epoch; False = do everything afresh.
    """

    target: str | Target = "auto"
    data: str | None = None
    calibration: str | None = None
    passes: str | None = None
    metric: str = "auto"
    max_drop: float | None = None
    max_latency_ms: float | None = None
    max_size_mb: float | None = None
    budget_s: float | None = None
    threads: int | None = None
    inputs: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict[str, "tuple[int | str, ...]"])
    weights: Path | None = None
    random_weights: bool = False
    seed: int = 0
    output: Path = Path("bundle")
    zip: bool = False
    dump: Path | None = None
    cache: Path | None = None
    resume: bool = True


def options(**given: Any) -> Options:
    """`Options` from keyword arguments; paths may be text. Raises UsageError for an option that does not exist."""
    known = [item.name for item in fields(Options)]
    for name in given:
        if name not in known:
            raise UsageError(f"there is no option '{name}'", fix=suggest(name, known, listing="`help(deploycc.planning.Options)`"))
    paths = {name: Path(given[name]) for name in ("weights", "output", "dump", "cache") if given.get(name) is not None}
    return Options(**{**given, **paths})


@dataclass(frozen=True, slots=True)
class Plan:
    """What a compile would do, with nothing run yet.

    Attributes:
        target: with the user's limits and threads in it.
        backend: of that target.
        source: what will capture the model.
        form: the form it comes in.
        pipeline: the passes that will run.
        dropped: passes of the target's own that do not apply to a model of that form.
        data: what is known of the data.
        misfit: why the artifact cannot run on this machine, or None.
        native: whether latency measured here is the target's own.
        tells_times: whether this machine tells what each operator takes on the target.
    """

    target: Target
    backend: Backend
    source: ModelSource
    form: Form
    pipeline: Pipeline
    dropped: tuple[str, ...]
    data: Data
    misfit: str | None

    @property
    def native(self) -> bool:
        """Whether a latency measured on this machine is the target's own."""
        return self.misfit is None

    @property
    def tells_times(self) -> bool:
        """Whether this machine tells what each operator takes on the target."""
        return self.native and isinstance(self.backend, Profiles)


def plan(model: Any, options: Options = Options()) -> Plan:
    """Resolve and type-check everything; runs nothing and loads no weights. Raises UsageError and its children."""
    target = resolve_target(options)
    backend = BACKENDS.get(target.backend)
    source = find_source(model)
    pipeline = Pipeline.parse(target.pipeline)
    whole = pipeline.edit(options.passes, source.gives) if options.passes else pipeline
    trimmed = whole.trimmed(source.gives)
    final = trimmed.check(source.gives)
    if final not in backend.accepts:
        wanted = " or ".join(sorted(form.name for form in backend.accepts))
        raise UsageError(
            f"the pipeline ends in {final.name}, but backend '{backend.name}' takes {wanted}: {trimmed or '(no passes)'}",
            fix=f"end it with a pass that produces {wanted}; `deploycc passes` lists what each takes and gives",
        )
    kept = [step.body for step in trimmed.steps]
    return Plan(
        target=target,
        backend=backend,
        source=source,
        form=source.gives,
        pipeline=trimmed,
        dropped=tuple(step.body.name for step in whole.steps if step.body not in kept),
        data=open_data(options),
        misfit=targets.misfit(target),
    )


def resolve_target(options: Options) -> Target:
    """The target with the user's own limits and threads in it."""
    if isinstance(options.target, Target):
        target = options.target
    else:
        target = targets.automatic() if options.target == "auto" else targets.load(options.target)
    asked = {"accuracy_drop": options.max_drop, "latency_p95_ms": options.max_latency_ms, "model_mb": options.max_size_mb}
    if options.max_drop is not None and not 0 <= options.max_drop <= 1:
        raise UsageError(f"--max-drop is {options.max_drop:g}", fix="give a share from 0 to 1: 0.01 is one point")
    limits = target.limits.model_copy(update={key: value for key, value in asked.items() if value is not None})
    bench = target.bench.model_copy(update={"threads": options.threads} if options.threads else {})
    return target.model_copy(update={"limits": limits, "bench": bench})


@dataclass(frozen=True, slots=True)
class GivenModule:
    """A module, or a (module, example input) pair, handed over in Python. It is copied: the caller's stays as it is."""

    value: Any
    name: ClassVar[str] = "python"
    syntax: ClassVar[str] = "a torch.nn.Module"
    gives: ClassVar[Form] = Form.MODULE

    def matches(self, text: str) -> bool:
        """It is not named by text."""
        return False

    def load(self, request: ModelRequest) -> Artifact:
        """Capture it as a factory's result would be. Raises SourceError."""
        from deploycc.sources.models.python import PythonModel

        return PythonModel().capture(copy.deepcopy(self.value), None, request)


def text_of(model: Any) -> str:
    """How a model is called in reports: the user's text, or the class of a module."""
    if isinstance(model, str):
        return model
    return type(model[0] if isinstance(model, tuple) and model else model).__name__


def find_source(text: Any) -> ModelSource:
    """The source that takes `text` (or the module itself). Raises UsageError with every syntax."""
    if not isinstance(text, str):
        return GivenModule(text)
    known = [MODELS.get(name) for name in MODELS.names()]
    for source in known:
        if source.matches(text):
            return source
    syntaxes = ", ".join(source.syntax for source in known)
    raise UsageError(f"'{text}' is not a model deploycc can read", fix=f"write one of {syntaxes}")


def open_dataset(text: str) -> Dataset:
    """The data set that `text` names. Raises UsageError with every syntax."""
    known = [DATASETS.get(name) for name in DATASETS.names()]
    for source in known:
        if source.matches(text):
            return source.open(text)
    syntaxes = ", ".join(source.syntax for source in known)
    raise UsageError(f"'{text}' is not data deploycc can read", fix=f"write one of {syntaxes}; a folder or file must exist")


def open_data(options: Options) -> Data:
    """Both data sets of a compile."""
    return Data(
        open_dataset(options.data) if options.data else None,
        open_dataset(options.calibration) if options.calibration else None,
        seed=options.seed,
    )


def capture(model: Any, source: ModelSource, options: Options, data: Data, *, rename: bool = False) -> tuple[Artifact, Data]:
    """Load the model, and number the labels like its classes; a transform that the data set declares wins over the model's own.

    With `rename` the model will get another head: its classes become the data's.
    """
    request = ModelRequest(
        text=text_of(model), weights=options.weights, random_weights=options.random_weights, inputs=options.inputs, seed=options.seed
    )
    artifact = source.load(request)
    return with_transform(artifact, data, rename=rename)


def declared_transform(artifact: Artifact, data: Data) -> AnyTransform | None:
    """The data set's own, else the model's, else the data set's fallback."""
    dataset = data.dataset
    return (dataset.transform or artifact.transform or dataset.fallback) if dataset else artifact.transform


def with_transform(artifact: Artifact, data: Data, *, rename: bool = False) -> tuple[Artifact, Data]:
    """What the data set declares wins over the model's own transform, which wins over the data set's fallback."""
    transform = declared_transform(artifact, data)
    if rename and transform is not None:
        transform = replace(transform, classes=data.classes)
    return replace(artifact, transform=transform), data.matched(transform.classes if transform else None)


UNITS = {
    "ms": {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3},
    "MB": {"B": 1e-6, "kB": 1e-3, "KB": 1e-3, "MB": 1.0, "GB": 1e3, "KiB": 1024 / 1e6, "MiB": 2**20 / 1e6, "GiB": 2**30 / 1e6},
    "s": {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0},
}


def parse_quantity(option: str, text: str | None, unit: str) -> float | None:
    """The text "5ms" in `unit` ("ms", "MB" or "s"); None for None. Raises UsageError for a missing or unknown unit and values ≤ 0."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*([A-Za-zµ]+)\s*", text)
    units = UNITS[unit]
    try:
        value = float(match.group(1)) * units[match.group(2)] if match else 0.0
    except (ValueError, KeyError):
        value = 0.0
    if not value > 0:
        raise UsageError(f"{option} is '{text}'", fix=f"write a number over 0 with one of the units {', '.join(units)}, such as 5{unit}")
    return value


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int | str, ...]]:
    """NAME:SHAPE pairs; a shape is sizes or axis names joined by x. Raises UsageError."""
    shapes: dict[str, tuple[int | str, ...]] = {}
    for text in texts:
        name, _, shape = text.rpartition(":")
        dims = [int(part) if part.isdigit() else part for part in shape.split("x")] if shape else []
        wrong = [dim for dim in dims if dim == 0 or (isinstance(dim, str) and not dim.isidentifier())]
        if not name or not dims or wrong:
            raise UsageError(f"--input is '{text}'", fix="write NAME:SHAPE such as x:1x3x224x224, or x:Nx3x224x224 for a dynamic axis N")
        if name in shapes:
            raise UsageError(f"--input gives '{name}' twice", fix="leave one of them out")
        shapes[name] = tuple(dims)
    return shapes


FLAGS = {"--random-weights": ("random_weights", True), "--no-resume": ("resume", False)}
KEPT = ("data", "calibration", "passes", "weights", "metric", "seed")


def parse_command_line(text: str) -> tuple[str, Options]:
    """MODEL, and of the options those that decide which model and which samples are meant: the inverse of `command_line`.

    Raises:
        UsageError: it is no command line of `deploycc compile`.
    """
    words = shlex.split(text)
    if words[:2] != ["deploycc", "compile"] or len(words) < 3:
        raise UsageError(f"'{text}' is not how a bundle is compiled", fix="give --model and --data")
    given: dict[str, Any] = {}
    shapes: list[str] = []
    rest = iter(words[3:])
    for word in rest:
        if word in FLAGS:
            name, value = FLAGS[word]
            given[name] = value
        elif word == "--input":
            shapes.append(next(rest, ""))
        else:
            name, value = word.removeprefix("--"), next(rest, "")
            if name in KEPT:
                given[name] = int(value) if name == "seed" else value
    return words[2], options(**given, inputs=parse_shapes(shapes))


def command_line(planned: Plan, model: str, options: Options) -> str:
    """What to type to do the same again."""
    words = ["deploycc", "compile", model, "--target", planned.target.name]
    texts = {"data": options.data, "calibration": options.calibration, "passes": options.passes, "weights": options.weights}
    words += [word for key, value in texts.items() if value is not None for word in (f"--{key}", str(value))]
    words += ["--metric", options.metric] if options.metric != "auto" else []
    words += ["--random-weights"] if options.random_weights else []
    numbers = {"max-drop": (options.max_drop, ""), "max-latency": (options.max_latency_ms, "ms"), "max-size": (options.max_size_mb, "MB")}
    numbers |= {"budget": (options.budget_s, "s"), "threads": (options.threads, "")}
    words += [word for key, (value, unit) in numbers.items() if value is not None for word in (f"--{key}", f"{value:g}{unit}")]
    words += [word for name, shape in options.inputs.items() for word in ("--input", f"{name}:{'x'.join(map(str, shape))}")]
    words += ["--seed", str(options.seed)] if options.seed else []
    words += [] if options.resume else ["--no-resume"]
    return shlex.join([*words, "-o", str(options.output)])
