"""What a plug-in must be: pass, backend, session, form, model source, data source, observer.

The base class of a pass runs the contract (`requires → apply → ensures`); an author writes one method.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from deploycc.core.artifact import Artifact, Form, ModelStats, Receipt, Signature
from deploycc.core.timing import NodeTime
from deploycc.errors import DeployError, PassError, PostconditionError, PreconditionError
from deploycc.runtime.audio import AnyTransform
from deploycc.runtime.sessions import Session

if TYPE_CHECKING:
    from deploycc.core.data import Data
    from deploycc.core.pipeline import Pipeline
    from deploycc.core.target import Target


@dataclass(frozen=True, slots=True)
class Effect:
    """What a pass may do to the numbers: at most `tolerance` of max |difference| / max |output|; None = lossy, the gate decides."""

    tolerance: float | None

    def __str__(self) -> str:
        if self.tolerance is None:
            return "lossy"
        return f"close ({self.tolerance:g})" if self.tolerance else "exact"


EXACT = Effect(0.0)
LOSSY = Effect(None)


def CLOSE(tolerance: float) -> Effect:  # noqa: N802  (reads as the third of EXACT, CLOSE, LOSSY)
    """Equal up to rounding: max |difference| / max |output| ≤ `tolerance`, or what `rounding` allows a model that amplifies it."""
    return Effect(tolerance)


class Progress(Protocol):
    """Told how far a long step is; the command line draws it, a test ignores it."""

    def __call__(self, what: str, done: int, total: int | None, note: str = "") -> None:
        """`done` of `total` (None: unknown) steps of `what` are finished; `note` is shown beside it (the loss of a training)."""
        ...


def silent(what: str, done: int, total: int | None, note: str = "") -> None:
    """A Progress that shows nothing."""


@dataclass(frozen=True, slots=True)
class Context:
    """Everything a pass may look at besides the artifact.

    Attributes:
        target: what is built for.
        reference: the float model as captured: teacher and yardstick.
        data: calibration, training and validation samples.
        seed: of every random choice.
        workdir: scratch folder, gone after the run.
        progress: call it in loops that may take over two seconds.
        capture: another model by the text that a user names it by (a teacher, a student). Raises SourceError and UsageError.
        timer: p50 latencies in ms of modules, by name, built for the target after the passes that follow; None where this machine
            is not the target's.
        profiler: times operator by operator of artifacts built for the target as they are; None where this machine is not the target's,
            or its runtime does not tell.
        code: a function of the user's by `file.py:name`.
        following: the passes after this one, as text and for `timer`.
        resume: a folder that outlives a killed run, of this pass on this input; None without a store.
    """

    target: Target
    reference: Artifact
    data: Data
    seed: int
    workdir: Path
    progress: Progress = silent
    capture: Callable[[str], Artifact] | None = None
    timer: Callable[[Mapping[str, Artifact], Pipeline], dict[str, float]] | None = None
    profiler: Callable[[Mapping[str, Artifact]], dict[str, list[NodeTime]]] | None = None
    code: Callable[[str], Any] | None = None
    following: Pipeline | None = None
    resume: Path | None = None

    def model(self, text: str) -> Artifact:
        """The model that `text` names. Raises PreconditionError where this run cannot capture one, else what the source raises."""
        if self.capture is None:
            raise PreconditionError(f"'{text}' cannot be captured here", fix="run the pipeline through deploycc.compile")
        return self.capture(text)

    def function(self, text: str) -> Any:
        """The user's function that `text` (file.py:name) names. Raises PreconditionError where this run cannot import one."""
        if self.code is None:
            raise PreconditionError(f"'{text}' cannot be imported here", fix="run the pipeline through deploycc.compile")
        return self.code(text)

    def latency(self, artifacts: Mapping[str, Artifact]) -> dict[str, float]:
        """p50 in ms of each artifact, in one interleaved run on the target's runtime. Raises PreconditionError where it cannot be had."""
        if self.timer is None or self.following is None:
            raise PreconditionError(
                f"latency cannot be measured: this machine is not what target '{self.target.name}' is for, or several processes train",
                fix="give another goal (macs=0.5), or compile on the target's own machine, in one process",
            )
        return self.timer(artifacts, self.following)


TARGET_PARTS = frozenset({"backend", "arch", "hardware", "runtime", "quant"})


@dataclass(frozen=True)
class Pass(ABC):
    """One step of a pipeline. The fields of a subclass are its options; text form, help and errors derive from them.

    A subclass is a frozen dataclass in `passes/`, named like its file, and writes `apply`. Options are kebab-case in
    text (`reduce-range=true`). Raise ValueError in `__post_init__` for a value out of range.
    """

    name: ClassVar[str]
    consumes: ClassVar[frozenset[Form]]
    produces: ClassVar[Form | None] = None  # None: the form stays
    effect: ClassVar[Effect]
    reads: ClassVar[frozenset[str]] = frozenset()  # the roles of data it reads ("calibration"): part of the cache key

    prepares: ClassVar[bool] = False  # before anything else it makes the float model that all that follows is compared with
    looks_ahead: ClassVar[bool] = False  # its result depends on the passes that follow (it measures what they will make)
    buys_accuracy: ClassVar[bool] = False  # asked for to be more accurate, and may cost time: the rule of shipping looks at both
    eases_rounding: ClassVar[bool] = False  # exact, and of use only to a later pass that rounds: the float artifact goes without
    decided_by: ClassVar[frozenset[str]] = TARGET_PARTS  # the parts of the target that its result depends on: in the cache key too

    @property
    def trains(self) -> bool:
        """Whether it cannot do without training data, so that a run without them is refused before anything slow."""
        return False

    @property
    def new_classes(self) -> int | None:
        """How many classes the model has after the pass, where it gets another head."""
        return None

    def requires(self, artifact: Artifact, context: Context) -> None:
        """Raise PreconditionError unless the pass can take `artifact`; runs before anything slow."""

    @abstractmethod
    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Return the new artifact; never mutate `artifact.model`. Raise NothingToDo(reason) when there is nothing to change."""

    def ensures(self, before: Artifact, after: Artifact, context: Context) -> None:
        """Raise PostconditionError when the result is not what the pass promises."""

    def depends_on(self, context: Context) -> str:
        """What else decides the result, as text for the cache key: digests of models and files that an option names."""
        return ""

    def alternatives(self, target: Target) -> tuple[Pass, ...]:
        """Stronger settings of this pass to try when the accuracy gate refuses its result, cheap to dear."""
        return ()

    @classmethod
    def rules(cls) -> str:
        """What its manual says beside the module's docstring: rules that other docstrings hold."""
        return ""

    @classmethod
    def rescue(cls, pipeline: Pipeline, target: Target) -> Pipeline | None:
        """`pipeline` with this pass in it, where that may win back accuracy that the gate misses; None where it cannot."""
        return None

    def retreats(self) -> tuple[Pass, ...]:
        """Settings that leave more and more of the model in float, to try when stronger ones do not pass the gate."""
        return ()

    def faster(self) -> tuple[Pass, ...]:
        """Settings that are no less accurate, to try when what ships is hardly faster than float, or is refused; cheap to dear."""
        return ()

    def __call__(self, artifact: Artifact, context: Context) -> Artifact:
        """Run the contract: form, `requires`, `apply`, result, `ensures`."""
        if artifact.form not in self.consumes:
            raise PreconditionError(
                f"pass '{self.name}' takes {' or '.join(sorted(form.name for form in self.consumes))}, but gets {artifact.form.name}",
                fix="put the pass that produces that form before it",
            )
        self._guarded("precondition", PreconditionError, lambda: self.requires(artifact, context))
        after = self._guarded("pass", PassError, lambda: self.apply(artifact, context))
        if not isinstance(after, Artifact):  # pyright: ignore[reportUnnecessaryIsInstance]  (a plug-in may return anything)
            raise PostconditionError(
                f"pass '{self.name}' returned {type(after).__name__}", fix="pass developer: return artifact.evolve(model, …)"
            )
        if after is artifact:
            raise PostconditionError(
                f"pass '{self.name}' returned the artifact it was given",
                fix="pass developer: return artifact.evolve(model, …), or raise NothingToDo with the reason",
            )
        if after.form is not (self.produces or artifact.form):
            raise PostconditionError(
                f"pass '{self.name}' declares it produces {(self.produces or artifact.form).name}, but made {after.form.name}",
                fix="pass developer: set `produces`, or pass form=… to artifact.evolve",
            )
        self._guarded("postcondition", PostconditionError, lambda: self.ensures(artifact, after, context))
        return after

    def _guarded(self, step: str, error: type[PassError], call: Callable[[], Any]) -> Any:
        """`call()`; an error that is not ours becomes `error`, with its cause kept."""
        try:
            return call()
        except DeployError:
            raise
        except MemoryError as cause:
            raise error(f"pass '{self.name}' ran out of memory", fix="free memory, or give fewer or smaller calibration samples") from cause
        except Exception as cause:
            message = f"{type(cause).__name__}: {cause}".rstrip()
            raise error(
                f"the {step} of '{self.name}' failed: {message}",
                fix='see the cause above; leave the pass out with --passes="-' + self.name + '"',
            ) from cause


@runtime_checkable
class FormOps(Protocol):
    """What can be done to any model of one form (`forms/`)."""

    name: ClassVar[str]

    def digest(self, model: Any) -> str:
        """SHA-256 of structure and weights; the same for the same model in another process."""
        ...

    def stats(self, artifact: Artifact) -> ModelStats:
        """Bytes, parameters, MACs."""
        ...

    def storable(self, artifact: Artifact) -> bool:
        """Whether `save` can write its model without pickle."""
        ...

    def save(self, artifact: Artifact, folder: Path) -> None:
        """Write its model into an existing, empty folder; the same bytes for the same model."""
        ...

    def load(self, folder: Path, base: Artifact) -> Any:
        """Read what `save` wrote; `base` is an artifact of the same source, of which a module's architecture is made anew."""
        ...

    def open(self, artifact: Artifact, *, threads: int) -> Session:
        """Run it in this process with as little rewriting as the framework allows: the yardstick, not the shipped artifact."""
        ...

    def operators(self, model: Any) -> Sequence[str]:
        """The kind of every operator (of every leaf, for a module), with repeats."""
        ...

    def describe(self, model: Any) -> str:
        """The whole structure as text, for dumps."""
        ...


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a runtime is here: `version` when it is, else `missing` and the command that installs it."""

    version: str | None
    missing: str = ""
    install: str = ""

    def __bool__(self) -> bool:
        return self.version is not None


@dataclass(frozen=True, slots=True)
class Violation:
    """One place where a model breaks a constraint: which operator, and what was seen there."""

    where: str
    seen: str


# A constraint looks at an artifact that is about to be built for a target. Its docstring is the rule, the error and the manual.
Constraint = Callable[[Artifact, "Target"], Sequence[Violation]]


@dataclass(frozen=True, slots=True)
class Coverage:
    """What precision the runtime really computes in, read from the runtime's own graph where it shows it.

    Attributes:
        int8_macs: share of the MACs in integer kernels, 0 to 1; None when MACs cannot be counted.
        int8_operators: heavy operators (convolution, matrix product) in integer kernels.
        float_operators: (operator, reason) for each heavy operator left in float.
        conversions: QuantizeLinear and DequantizeLinear that no kernel took in.
        outside: kinds of the operators that the delegate did not take and the runtime's own slow kernels compute, one by one; None where
            the runtime has no delegate.
    """

    int8_macs: float | None
    int8_operators: int
    float_operators: tuple[tuple[str, str], ...]
    conversions: int = 0
    outside: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Built:
    """What a backend made: files on disk, and what a loader must know and check.

    Attributes:
        folder: where the files are.
        files: names below `folder`; the first is the one the runtime opens.
        runtime: {"session": module in deploycc.runtime.sessions, "package": what must be installed, "version": built and tested
            with, "minimum": oldest that loads it, "engine": …}.
        signature: what the artifact takes and gives.
        coverage: precision that the runtime computes in.
        notes: fall-backs and facts for the report.
    """

    folder: Path
    files: tuple[str, ...]
    runtime: Mapping[str, str]
    signature: Signature
    coverage: Coverage
    notes: tuple[str, ...] = ()


@runtime_checkable
class Backend(Protocol):
    """One runtime (`backends/`)."""

    name: ClassVar[str]
    accepts: ClassVar[frozenset[Form]]

    def available(self) -> Availability:
        """Whether it runs here; never raises."""
        ...

    def constraints(self) -> Sequence[Constraint]:
        """What a model must satisfy; functions whose docstring is the rule."""
        ...

    def build(self, artifact: Artifact, target: Target, folder: Path) -> Built:
        """Write the files the runtime loads into `folder` (existing, empty)."""
        ...

    def open(self, built: Built, target: Target, *, threads: int) -> Session:
        """Load them the way the device will."""
        ...


def enforce(constraints: Sequence[Constraint], artifact: Artifact, target: Target) -> None:
    """Raise UnsupportedError with the rule and every place that breaks it, for the first broken constraint."""
    from deploycc.errors import UnsupportedError

    for constraint in constraints:
        violations = list(constraint(artifact, target))
        if not violations:
            continue
        rule, _, fix = (constraint.__doc__ or constraint.__name__).strip().partition("\n")
        places = "\n".join(f"    {item.where}: {item.seen}" for item in violations[:8])
        more = f"\n    … and {len(violations) - 8} more" if len(violations) > 8 else ""
        raise UnsupportedError(
            f"target '{target.name}': {rule}\n{places}{more}", fix=" ".join(fix.split()) or "change the model or the target"
        )


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """How the user named a model.

    Attributes:
        text: "torchvision:resnet18", "net.onnx", "net.py:make", …
        weights: file of weights to load, or None.
        random_weights: the user accepts random weights.
        inputs: input name → shape given with --input (ints, or names for dynamic axes); empty: the source decides.
        seed: for random weights.
    """

    text: str
    weights: Path | None = None
    random_weights: bool = False
    inputs: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict[str, tuple[int | str, ...]])
    seed: int = 0


@runtime_checkable
class ModelSource(Protocol):
    """One kind of place that models come from (`sources/models/`)."""

    name: ClassVar[str]
    syntax: ClassVar[str]  # how the user writes it, for help and errors
    gives: ClassVar[Form]  # the form of what it captures, so that a plan needs no capture

    def matches(self, text: str) -> bool:
        """Whether `text` is of this kind; looks at the text only."""
        ...

    def load(self, request: ModelRequest) -> Artifact:
        """Capture the model. Raises SourceError."""
        ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One item of a data set.

    Attributes:
        value: an image (uint8 array H×W×3, RGB, or H×W×4 with alpha) or a recording (float or int16, samples or samples×channels) for the
            transform, or arrays by input name without batch axis.
        label: accepted class indices (a prediction is right when it is one of them), or an array for regression, or None.
        id: what to call it in a message (a file's path, an index).
        rate: samples a second of a recording; None: what the transform declares.
    """

    value: np.ndarray | Mapping[str, np.ndarray]
    label: tuple[int, ...] | np.ndarray | None
    id: str
    rate: int | None = None


class Split(Protocol):
    """A sequence of samples that is read as it is walked over; each walk gives the same samples in the same order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def label(self, index: int) -> tuple[int, ...] | np.ndarray | None:
        """The label alone, without reading the item."""
        ...

    def digest(self, index: int) -> str:
        """SHA-256 of an item's bytes and label."""
        ...


@dataclass(frozen=True, slots=True)
class Dataset:
    """What a data source opened.

    Attributes:
        name: the text the user named it by.
        splits: "all", or any of "train", "val", "calibration".
        classes: class names in index order, where known.
        transform: how samples become feeds, where the data set declares it; overrides the model's own.
        fallback: how pictures become feeds when neither the data set nor the model declares it.
    """

    name: str
    splits: Mapping[str, Split]
    classes: tuple[str, ...] | None = None
    transform: AnyTransform | None = None
    fallback: AnyTransform | None = None


@runtime_checkable
class DataSource(Protocol):
    """One kind of place that data come from (`sources/datasets/`)."""

    name: ClassVar[str]
    syntax: ClassVar[str]

    def matches(self, text: str) -> bool:
        """Whether `text` is of this kind; may look at the file's type."""
        ...

    def open(self, text: str) -> Dataset:
        """Open it without reading all of it. Raises DataError."""
        ...


class Observer(Protocol):
    """Watches a pipeline: verification, dumps, timing, progress. No flags inside passes."""

    def before(self, step: Pass, artifact: Artifact, context: Context) -> None:
        """`step` is about to run."""
        ...

    def after(self, step: Pass, before: Artifact, after: Artifact, receipt: Receipt, context: Context) -> Receipt:
        """`step` ran (or came from the store); return the receipt, completed with what was measured."""
        ...


def options_of(plugin: type[Pass]) -> tuple[dataclasses.Field[Any], ...]:
    """The options of a pass class, in order."""
    return dataclasses.fields(plugin)
