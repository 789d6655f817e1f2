"""A pipeline: passes in order, type-checked by form before anything slow, run with observers and a store.

`Pipeline.parse(text)` and `str(pipeline)` are inverses.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from deploycc.core.artifact import Artifact, Form, QuantInfo, Receipt, Signature
from deploycc.core.contract import Context, FormOps, Observer, Pass
from deploycc.core.registry import FORMS, PASSES, suggest
from deploycc.core.spec import Spec, format_spec, instantiate, parse_specs
from deploycc.core.store import Store
from deploycc.errors import DeployError, NothingToDo, PassError, UnknownName, UsageError
from deploycc.runtime.audio import declared


@dataclass(frozen=True, slots=True)
class Step:
    """A pass in a pipeline.

    Attributes:
        asked: the user named it: it is never left out, and finding nothing to do is an error.
        own: the target's pipeline has it as well, so that finding nothing to do is a note all the same.
    """

    body: Pass
    asked: bool = False
    own: bool = False


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Passes in order."""

    steps: tuple[Step, ...]

    @classmethod
    def parse(cls, text: str, *, asked: bool = False) -> Pipeline:
        """Read `name{option=value}, …`. Raises SpecError and UnknownName."""
        return cls(tuple(Step(_make(spec), asked) for spec in parse_specs(text)))

    def __str__(self) -> str:
        return ", ".join(format_spec(step.body) for step in self.steps)

    def full(self) -> str:
        """The text with every default written out."""
        return ", ".join(format_spec(step.body, full=True) for step in self.steps)

    def edit(self, text: str, form: Form) -> Pipeline:
        """Replace by, or apply edits: `+pass{…}` inserts, `-pass` removes; anything else is a whole new pipeline.

        An inserted pass goes as late as the forms allow; a pass that is not lossy goes before the first lossy one. In a whole pipeline,
        passes that this one has, option for option, may find nothing to do, as they may here.
        """
        items = [(sign, spec) for sign, spec in _edits(text)]
        if not items:
            own = [step.body for step in self.steps]
            return Pipeline(tuple(Step(body, asked=True, own=body in own) for body in map(_make, parse_specs(text))))
        result = self
        for sign, spec in items:
            result = result._remove(spec) if sign == "-" else result._insert(Step(_make(spec), asked=True), form)
        return result

    def _remove(self, spec: Spec) -> Pipeline:
        steps = tuple(step for step in self.steps if step.body.name != spec.name)
        if len(steps) == len(self.steps):
            known = [step.body.name for step in self.steps]
            raise UsageError(f"-{spec.name}: the pipeline has no pass '{spec.name}'", fix=suggest(spec.name, known, listing="the pipeline"))
        return Pipeline(steps)

    def _insert(self, step: Step, form: Form) -> Pipeline:
        bodies = [other.body for other in self.steps]
        lossy = [index for index, body in enumerate(bodies) if body.effect.tolerance is None or body.eases_rounding]
        latest = lossy[0] if lossy and step.body.effect.tolerance is not None else len(self.steps)
        for place in [*range(latest, -1, -1), *range(latest + 1, len(self.steps) + 1)]:
            candidate = Pipeline((*self.steps[:place], step, *self.steps[place:]))
            try:
                candidate.check(form)
            except PassError:
                continue
            return candidate
        forms = " or ".join(sorted(item.name for item in step.body.consumes))
        raise UsageError(
            f"+{step.body.name}: it takes {forms}, which this pipeline never has", fix=f"write the whole pipeline; this one is: {self}"
        )

    def check(self, form: Form) -> Form:
        """The form that comes out for `form` going in. Raises PassError naming both forms."""
        for index, step in enumerate(self.steps, 1):
            if form not in step.body.consumes:
                wanted = " or ".join(sorted(item.name for item in step.body.consumes))
                raise PassError(f"pass {index} '{step.body.name}' takes {wanted}, but gets {form.name}", fix=_bridge(step.body, form))
            form = step.body.produces or form
        return form

    def trimmed(self, form: Form) -> Pipeline:
        """Without the passes of the target's own that are of no use to a model arriving as `form`.

        An ONNX file skips fold and export of modules; what eases rounding goes where nothing rounds. A pass the user asked for is never
        dropped.
        """
        steps = [step for index, step in enumerate(self.steps) if step.asked or self._of_use(index)]
        while True:
            try:
                Pipeline(tuple(steps)).check(form)
            except PassError:
                index = next(
                    (i for i, step in enumerate(steps) if form not in step.body.consumes and not step.asked),
                    None,
                )
                if index is None:
                    return Pipeline(tuple(steps))
                del steps[index]
                continue
            return Pipeline(tuple(steps))

    def _of_use(self, index: int) -> bool:
        """Whether a step that eases rounding has, after it, one that rounds to ranges seen in data."""
        later = (step.body for step in self.steps[index + 1 :])
        return not self.steps[index].body.eases_rounding or any(body.effect.tolerance is None and body.reads for body in later)

    def replaced(self, name: str, other: Callable[[Pass], Pass | Sequence[Pass]]) -> Pipeline | None:
        """With `other` (one pass or several) in place of the last pass called `name`; None where there is none."""
        index = next((index for index, step in reversed(list(enumerate(self.steps))) if step.body.name == name), None)
        if index is None:
            return None
        made = other(self.steps[index].body)
        steps = [Step(body, self.steps[index].asked) for body in ([made] if isinstance(made, Pass) else made)]
        return Pipeline((*self.steps[:index], *steps, *self.steps[index + 1 :]))

    def preparation(self) -> tuple[Pipeline, Pipeline]:
        """(the leading passes that make the float model which everything after is compared with, the rest)."""
        count = next((index for index, step in enumerate(self.steps) if not step.body.prepares), len(self.steps))
        return Pipeline(self.steps[:count]), Pipeline(self.steps[count:])

    def untrained(self) -> Pipeline:
        """Without the passes that train: what decides an artifact's latency, and takes seconds."""
        return Pipeline(tuple(step for step in self.steps if "training" not in step.body.reads))

    def lossless(self) -> Pipeline:
        """Without the lossy passes and what eases them: what makes the float artifact that int8 has to beat."""
        exact = (step for step in self.steps if step.body.effect.tolerance is not None)
        return Pipeline(tuple(step for step in exact if not step.body.eases_rounding))

    def run(
        self,
        artifact: Artifact,
        context: Context,
        observers: Sequence[Observer] = (),
        store: Store | None = None,
        stop_after: str | None = None,
    ) -> Artifact:
        """Send `artifact` through. An error of a pass gets the passes before it as a note."""
        self.check(artifact.form)
        done: list[str] = []
        for index, step in enumerate(self.steps, 1):
            try:
                ahead = replace(context, following=Pipeline(self.steps[index:]))
                artifact = _run_step(step, artifact, ahead, observers, store)
            except DeployError as error:
                error.add_note(f"in pass '{format_spec(step.body)}'" + (f", after {', '.join(done)}" if done else ""))
                raise
            done.append(step.body.name)
            if step.body.name == stop_after:
                break
        return artifact


def _make(spec: Spec) -> Pass:
    if spec.name not in PASSES.names():
        raise UnknownName(f"there is no pass '{spec.name}'", fix=suggest(spec.name, PASSES.names(), listing="`deploycc passes`"))
    return instantiate(PASSES.get_class(spec.name), spec)


def _edits(text: str) -> list[tuple[str, Spec]]:
    """(`+` or `-`, spec) for each item when every item has a sign; empty when none has."""
    parts: list[tuple[str, str]] = []
    depth = start = 0
    for index, char in enumerate(text + ","):
        depth += (char == "{") - (char == "}")
        if char == "," and depth <= 0:
            item = text[start:index].strip()
            start = index + 1
            if item:
                parts.append((item[0], item))
    signed = [item for sign, item in parts if sign in "+-"]
    if not signed:
        return []
    if len(signed) != len(parts):
        raise UsageError(f"--passes '{text}' mixes +pass or -pass with plain passes", fix="write edits only, or the whole pipeline only")
    return [(item[0], parse_specs(item[1:])[0]) for item in signed]


def _bridge(step: Pass, form: Form) -> str:
    """Which pass would turn `form` into what `step` takes; none where the model is already what `step` gives."""
    for name in PASSES.names() if step.produces is not form else ():
        other = PASSES.get_class(name)
        if form in other.consumes and other.produces in step.consumes:
            return f"put '{name}' before it"
    return f"leave '{step.name}' out, or start from a model that is {' or '.join(sorted(item.name for item in step.consumes))}"


def _run_step(step: Step, artifact: Artifact, context: Context, observers: Sequence[Observer], store: Store | None) -> Artifact:
    body = step.body
    for observer in observers:
        observer.before(body, artifact, context)
    key = _key(body, artifact, context) if store else ""
    context = replace(context, resume=store.progress(key) if store else None)
    started = time.perf_counter()
    stored = _from_store(store, key, artifact, context) if store else None
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = {}
    changed = True
    if stored is not None:
        after, cached = stored, True
    else:
        cached = False
        try:
            after = body(artifact, context)
        except NothingToDo as nothing:
            if step.asked and not step.own:
                raise
            after, changed, notes = artifact, False, (nothing.what,)
    if changed:
        notes, details, after = after.notes, after.details, replace(after, notes=(), details={})
    form: FormOps = FORMS.get(after.form.value)
    if store and changed and not cached and form.storable(after):
        store.put(key, _facts(artifact, after, notes, details), lambda folder: form.save(after, folder))
    if changed and after.form is Form.MODULE and after.edits is not None:
        after = replace(after, checkpoint=_checkpoint(after, context))
    receipt = Receipt(
        spec=format_spec(body, full=True),
        changed=changed,
        form=after.form.value,
        digest=after.digest(),
        stats=form.stats(after),
        notes=notes,
        details=details,
        seconds=time.perf_counter() - started,
        cached=cached,
    )
    for observer in observers:
        receipt = observer.after(body, artifact, after, receipt, context)
    return replace(after, history=(*artifact.history, receipt), notes=())


def _key(body: Pass, artifact: Artifact, context: Context) -> str:
    return Store.key(
        {
            "deploycc": _code_digest(),
            "input": artifact.digest(),
            "pass": format_spec(body, full=True),
            "target": context.target.digest_facts(body.decided_by),
            "data": {role: context.data.digest(role) for role in sorted(body.reads)},
            "reference": context.reference.digest() if body.reads & {"training"} else "",
            "sparse": list(artifact.sparse),
            "besides": body.depends_on(context),
            "following": str(context.following) if body.looks_ahead else "",
            "seed": context.seed,
            "versions": _versions(),
        }
    )


@cache
def _code_digest() -> str:
    """SHA-256 of the code that makes a pass's result: a changed pass never finds its old results."""
    package = Path(__file__).parent.parent
    files = sorted(file for folder in ("core", "forms", "passes") for file in (package / folder).glob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")}


def _checkpoint(after: Artifact, context: Context) -> Path:
    """The module in a folder of this run, for the bundle: it can be rebuilt and trained on."""
    folder = context.workdir / "checkpoints" / after.digest()
    if not folder.is_dir():
        folder.mkdir(parents=True)
        FORMS.get(after.form.value).save(after, folder)
    return folder


def _facts(before: Artifact, after: Artifact, notes: tuple[str, ...], details: Mapping[str, Any]) -> dict[str, Any]:
    """What the store keeps beside the model. A source that the pass left alone is not kept: the same model may lie elsewhere next time."""
    return {
        "source": after.source if after.source != before.source else None,
        "edits": list(after.edits) if after.edits is not None else None,
        "sparse": list(after.sparse),
        "details": dict(details),
        "form": after.form.value,
        "signature": after.signature.to_json(),
        "transform": after.transform.to_json() if after.transform else None,
        "quant": asdict(after.quant) if after.quant else None,
        "notices": list(after.notices),
        "notes": list(notes),
    }


def _from_store(store: Store, key: str, before: Artifact, context: Context) -> Artifact | None:
    found = store.get(key)
    if found is None:
        return None
    facts, folder = found
    source = facts["source"] or before.source
    base = before if source == before.source else context.model(source)
    quant: dict[str, Any] | None = facts["quant"]
    if quant:
        quant = {**quant, "left_float": tuple((str(a), str(b)) for a, b in quant["left_float"])}
    return before.evolve(
        FORMS.get(facts["form"]).load(Path(folder), base),
        source=source,
        edits=tuple(facts["edits"]) if facts["edits"] is not None else None,
        sparse=tuple(facts["sparse"]),
        details=facts["details"],
        form=Form(facts["form"]),
        signature=Signature.from_json(facts["signature"]),
        transform=declared(facts["transform"]) if facts["transform"] else None,
        quant=QuantInfo(**quant) if quant else None,
        notices=tuple(facts["notices"]),
        notes=tuple(facts["notes"]),
    )
