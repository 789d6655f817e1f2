from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import CLOSE, EXACT, LOSSY, Context, Dataset, Pass, Sample, Violation, enforce
from deploycc.core.data import Data
from deploycc.core.observers import Announce, Dump, Verify
from deploycc.core.pipeline import Pipeline, Step
from deploycc.core.store import Store
from deploycc.core.target import Target
from deploycc.errors import (
    DriftError,
    NothingToDo,
    PassError,
    PostconditionError,
    PreconditionError,
    SpecError,
    UnknownName,
    UnsupportedError,
    UsageError,
)
from deploycc.forms import onnx as form

TEXT = "fold-batchnorm, export-onnx, fold-constants, quantize-static{calibration=mse}"


def artifact(scale=2.0, last="Identity"):
    """y = last(scale · x)"""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "s"], ["product"], "mul"), helper.make_node(last, ["product"], ["y"], "last")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 4))],
        [numpy_helper.from_array(np.array(scale, np.float32), "s")],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    return Artifact(Form.ONNX, model, form.signature(model), "toy")


class Rows:
    def __init__(self, count=4):
        self.rows = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return Sample({"x": self.rows[index]}, None, f"row {index}")

    def label(self, index):
        return None

    def digest(self, index):
        return self.rows[index].tobytes().hex()


@pytest.fixture
def context(tmp_path):
    target = Target(name="t", title="t", backend="onnxruntime", arch="aarch64", pipeline="fold-constants")
    return Context(target, artifact(), Data(Dataset("d", {"val": Rows(), "calibration": Rows()})), 0, tmp_path)


def scaled(before, factor):
    """The artifact with its constant multiplied."""
    model = form.clone(before.model)
    value = model.graph.initializers["s"]
    value.const_value = ir.tensor((value.const_value.numpy() * factor).astype(np.float32), name="s")
    return before.evolve(model)


@dataclass(frozen=True)
class Toy(Pass):
    name: ClassVar[str] = "toy"
    consumes: ClassVar = frozenset({Form.ONNX})
    effect: ClassVar = LOSSY
    factor: float = 1.5
    calls: ClassVar[list] = []

    def apply(self, artifact, context):
        self.calls.append(self.factor)
        return replace(scaled(artifact, self.factor), notes=("multiplied",))


@dataclass(frozen=True)
class Close(Toy):
    effect: ClassVar = CLOSE(1e-3)


@dataclass(frozen=True)
class Exact(Toy):
    effect: ClassVar = EXACT


@dataclass(frozen=True)
class Idle(Toy):
    def apply(self, artifact, context):
        raise NothingToDo("there is nothing here", fix="leave it out")


# --- text


def test_text_round_trips():
    pipeline = Pipeline.parse(TEXT)
    assert str(pipeline) == TEXT
    assert Pipeline.parse(pipeline.full()) == pipeline


@pytest.mark.parametrize(
    ("text", "error", "fix"),
    [
        ("fold-batchnom", UnknownName, "did you mean 'fold-batchnorm'"),
        ("quantize-static{calibraton=mse}", SpecError, "did you mean 'calibration'"),
        ("quantize-static{calibration=best}", SpecError, "value of that kind"),
        ("quantize-static{percentile=20}", SpecError, "deploycc passes quantize-static"),
    ],
)
def test_unknown_passes_and_options_are_refused(text, error, fix):
    with pytest.raises(error) as caught:
        Pipeline.parse(text)
    assert fix in caught.value.fix


# --- types


def test_forms_are_checked_before_anything_runs():
    assert Pipeline.parse(TEXT).check(Form.MODULE) is Form.ONNX
    with pytest.raises(PassError, match="pass 1 'quantize-static' takes ONNX, but gets MODULE") as caught:
        Pipeline.parse("quantize-static").check(Form.MODULE)
    assert caught.value.fix == "put 'export-onnx' before it"
    with pytest.raises(PassError) as caught:
        Pipeline.parse("export-onnx").check(Form.ONNX)
    assert "leave 'export-onnx' out" in caught.value.fix


def test_an_onnx_model_skips_the_targets_passes_that_it_is_past():
    trimmed = Pipeline.parse(TEXT).trimmed(Form.ONNX)
    assert "export-onnx" not in str(trimmed)
    assert trimmed.check(Form.ONNX) is Form.ONNX


def test_a_pass_the_user_asked_for_is_never_dropped():
    asked = Pipeline.parse("export-onnx, fold-constants", asked=True)
    with pytest.raises(PassError, match="'export-onnx' takes"):
        asked.trimmed(Form.ONNX).check(Form.ONNX)


EASED = "fold-constants, equalize-layers, quantize-static"


def test_what_eases_rounding_goes_with_the_pass_that_rounds():
    def left(edit: str) -> str:
        return str(Pipeline.parse(EASED).edit(edit, Form.ONNX).trimmed(Form.ONNX))

    assert left("+update-opset").endswith("equalize-layers, quantize-static")
    assert left("-quantize-static") == "fold-constants"
    assert left("-quantize-static, +quantize-weights") == "fold-constants, quantize-weights"
    assert left("-quantize-static, +learn-rounding") == "fold-constants, equalize-layers, learn-rounding"
    assert left("fold-constants, equalize-layers") == "fold-constants, equalize-layers"  # asked for


def test_the_float_artifact_goes_without_what_eases_rounding():
    assert str(Pipeline.parse(EASED).lossless()) == "fold-constants"


# --- edits


def test_a_lossless_pass_is_inserted_before_the_first_lossy_one():
    edited = Pipeline.parse(TEXT).edit("+fold-normalize", Form.MODULE)
    assert [step.body.name for step in edited.steps] == [
        "fold-batchnorm",
        "export-onnx",
        "fold-constants",
        "fold-normalize",
        "quantize-static",
    ]
    assert [step.asked for step in edited.steps] == [False, False, False, True, False]


def test_edits_remove_and_replace():
    edited = Pipeline.parse(TEXT).edit("-quantize-static, +quantize-static{calibration=entropy percentile=99.9}", Form.MODULE)
    assert str(edited).endswith("quantize-static{calibration=entropy percentile=99.9}")
    assert str(Pipeline.parse(TEXT).edit("export-onnx", Form.MODULE)) == "export-onnx"


def test_in_a_whole_pipeline_the_targets_own_passes_are_told_from_others():
    whole = "fold-constants, equalize-layers, quantize-static{calibration=mse}"
    written = Pipeline.parse(EASED).edit(whole, Form.ONNX)
    assert str(written) == whole
    assert [(step.asked, step.own) for step in written.steps] == [(True, True), (True, True), (True, False)]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("-quantize-dynamic", "the pipeline has no pass 'quantize-dynamic'"),
        ("+fold-constants, export-onnx", "mixes"),
        ("+quantize-torch", "which this pipeline never has"),
    ],
)
def test_edits_that_cannot_be_made_are_refused(edit, message):
    pipeline = Pipeline.parse("fold-constants, quantize-static")
    with pytest.raises(UsageError, match=message):
        pipeline.edit(edit, Form.ONNX)


def test_lossless_leaves_the_lossy_out():
    assert str(Pipeline.parse(TEXT).lossless()) == "fold-batchnorm, export-onnx, fold-constants"


# --- running


def run(*passes, context, observers=(), store=None, asked=False, own=False, stop_after=None):
    pipeline = Pipeline(tuple(Step(body, asked, own) for body in passes))
    return pipeline.run(context.reference, context, observers, store, stop_after)


def test_every_pass_leaves_a_receipt_with_its_defaults_written_out(context):
    after = run(Toy(), Toy(factor=0.5), context=context)
    assert [receipt.spec for receipt in after.history] == ["toy{factor=1.5}", "toy{factor=0.5}"]
    assert [receipt.notes for receipt in after.history] == [("multiplied",), ("multiplied",)]
    assert after.history[-1].digest == after.digest()
    assert after.history[0].stats.parameters == 1
    assert after.notes == ()


def test_a_pass_with_nothing_to_do_is_a_note_unless_the_user_asked_for_it(context):
    after = run(Idle(), context=context)
    assert (after.history[0].changed, after.history[0].notes) == (False, ("there is nothing here",))
    with pytest.raises(NothingToDo, match="there is nothing here"):
        run(Idle(), context=context, asked=True)
    assert run(Idle(), context=context, asked=True, own=True).history[0].notes == ("there is nothing here",)


def test_an_error_names_its_pass_and_the_ones_before(context):
    @dataclass(frozen=True)
    class Broken(Toy):
        def apply(self, artifact, context):
            raise KeyError("lost")

    with pytest.raises(PassError, match="KeyError: 'lost'") as caught:
        run(Toy(), Broken(), context=context)
    assert caught.value.__notes__ == ["in pass 'toy', after toy"]
    assert isinstance(caught.value.__cause__, KeyError)


def test_stop_after_stops(context):
    assert len(run(Toy(), Toy(), context=context, stop_after="toy").history) == 1


def test_a_finished_pass_comes_from_the_store(context, tmp_path):
    store = Store(tmp_path / "cache")
    Toy.calls.clear()
    first = run(Toy(), context=context, store=store)
    again = run(Toy(), Toy(factor=3.0), context=context, store=store)
    assert Toy.calls == [1.5, 3.0]
    assert [receipt.cached for receipt in again.history] == [True, False]
    assert again.history[0].digest == first.digest()
    assert again.history[0].notes == ("multiplied",)


@pytest.mark.parametrize("change", ["seed", "target", "input", "data"])
def test_whatever_decides_the_result_is_in_its_key(context, tmp_path, change):
    @dataclass(frozen=True)
    class Reading(Toy):
        reads: ClassVar = frozenset({"calibration"})

    store = Store(tmp_path / "cache")
    Toy.calls.clear()
    run(Reading(), context=context, store=store)
    if change == "seed":
        context = replace(context, seed=1)
    elif change == "target":
        context = replace(
            context, target=context.target.model_copy(update={"quant": context.target.quant.model_copy(update={"per_channel": False})})
        )
    elif change == "input":
        context = replace(context, reference=artifact(3.0))
    else:
        context = replace(context, data=Data(Dataset("d", {"val": Rows(), "calibration": Rows(3)})))
    run(Reading(), context=context, store=store)
    assert len(Toy.calls) == 2


# --- the contract of a pass


def contract(body, context):
    return body(context.reference, context)


def variant(**members):
    return dataclass(frozen=True)(type("Variant", (Toy,), {"__annotations__": {}, **members}))()


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (variant(consumes=frozenset({Form.MODULE})), PreconditionError, "takes MODULE, but gets ONNX"),
        (variant(apply=lambda self, a, c: a.model), PostconditionError, "returned Model"),
        (variant(apply=lambda self, a, c: a), PostconditionError, "the artifact it was given"),
        (variant(produces=Form.PROGRAM), PostconditionError, "declares it produces PROGRAM, but made ONNX"),
        (variant(requires=lambda self, a, c: 1 / 0), PreconditionError, "ZeroDivisionError"),
        (variant(ensures=lambda self, b, a, c: 1 / 0), PostconditionError, "ZeroDivisionError"),
        (variant(apply=lambda self, a, c: bytearray(1 << 62)), PassError, "out of memory"),
    ],
)
def test_the_base_class_holds_a_pass_to_its_contract(body, error, message, context):
    with pytest.raises(error, match=message) as caught:
        contract(body, context)
    assert caught.value.fix


# --- observers


def test_verify_measures_drift_to_the_input_and_to_the_reference(context):
    after = run(Toy(factor=2.0), Toy(factor=0.5), context=context, observers=[Verify()])
    first, second = after.history
    assert first.to_input.relative == pytest.approx(1.0)
    assert first.to_input.sqnr_db == pytest.approx(0.0)
    assert second.to_reference.relative == pytest.approx(0.0, abs=1e-6)
    assert second.to_input.relative == pytest.approx(0.5)


def test_verify_fails_a_pass_that_moves_the_numbers_more_than_it_declares(context):
    run(Close(factor=1.0005), context=context, observers=[Verify()])
    with pytest.raises(DriftError, match=r"declares it is close \(0.001\), but on 4 real samples") as caught:
        run(Close(factor=1.01), context=context, observers=[Verify()])
    assert '--passes="-toy"' in caught.value.fix
    with pytest.raises(DriftError, match="declares it is exact"):
        run(Exact(factor=1.0000002), context=context, observers=[Verify()])


def test_verify_lets_a_pass_round_as_far_as_the_model_amplifies_it(context):
    steep = replace(context, reference=artifact(1e4, "Sin"))
    after = run(Close(factor=1 + 2**-23), context=steep, observers=[Verify()])
    assert after.history[0].to_input.relative > 1e-3
    with pytest.raises(DriftError, match=r"allowed 0\.0[01]"):
        run(Close(factor=1 + 2**-15), context=steep, observers=[Verify()])
    with pytest.raises(DriftError, match=r"allowed 0;"):
        run(Exact(factor=1 + 2**-23), context=steep, observers=[Verify()])


def test_verify_without_data_measures_nothing(context):
    after = run(Close(factor=5.0), context=replace(context, data=Data(None)), observers=[Verify()])
    assert after.history[0].to_input is None


def test_dumps_are_numbered(context, tmp_path):
    run(Toy(), Toy(), context=context, observers=[Dump(tmp_path / "dump")])
    assert sorted(path.name for path in Path(tmp_path / "dump").iterdir()) == ["000_source.txt", "001_toy.txt", "002_toy.txt"]
    assert "Mul" in (tmp_path / "dump" / "001_toy.txt").read_text()


def test_progress_hears_of_every_pass(context):
    heard = []
    run(Toy(), context=replace(context, progress=lambda *event: heard.append(event)), observers=[Announce()])
    assert heard == [("toy", 0, None), ("toy", 1, 1)]


# --- constraints


def test_a_broken_constraint_shows_its_rule_its_places_and_its_fix(context):
    def even(artifact, target):
        """Channels must be even.

        Prune to an even number.
        """
        return [Violation(f"conv{index}", "3 channels") for index in range(9)]

    with pytest.raises(UnsupportedError, match="target 't': Channels must be even") as caught:
        enforce([lambda artifact, target: [], even], context.reference, context.target)
    assert "conv0: 3 channels" in caught.value.what
    assert "and 1 more" in caught.value.what
    assert caught.value.fix == "Prune to an even number."


@dataclass(frozen=True)
class Named(Toy):
    """Its result depends on something that an option only names."""

    content: ClassVar[str] = "one"

    def depends_on(self, context):
        return self.content


@dataclass(frozen=True)
class Ahead(Toy):
    looks_ahead: ClassVar[bool] = True
    seen: ClassVar[list] = []

    def apply(self, artifact, context):
        self.seen.append((str(context.following), context.resume))
        return Toy.apply(self, artifact, context)


def test_what_an_option_names_is_in_the_key_by_content(context, tmp_path):
    store = Store(tmp_path / "store")
    assert [run(Named(), context=context, store=store).history[0].cached for _ in range(2)] == [False, True]
    Named.content = "another"
    try:
        assert not run(Named(), context=context, store=store).history[0].cached
    finally:
        Named.content = "one"


def test_a_pass_that_looks_ahead_is_stored_by_what_follows(context, tmp_path):
    store = Store(tmp_path / "store")
    first = run(Ahead(), Toy(factor=2.0), context=context, store=store)
    assert run(Ahead(), Toy(factor=2.0), context=context, store=store).history[0].cached
    assert not run(Ahead(), Toy(factor=3.0), context=context, store=store).history[0].cached
    assert [text for text, _ in Ahead.seen] == ["toy{factor=2.0}", "toy{factor=3.0}"]
    assert Ahead.seen[0][1].parent == tmp_path / "store" / "progress"
    assert first.history[0].details == {}


def test_what_cannot_be_had_outside_a_compile_says_so(context):
    with pytest.raises(PreconditionError, match=r"'net\.py:make' cannot be captured here"):
        context.model("net.py:make")
    with pytest.raises(PreconditionError, match=r"'net\.py:loss' cannot be imported here"):
        context.function("net.py:loss")
    with pytest.raises(PreconditionError, match="latency cannot be measured"):
        context.latency({})


def test_one_of_several_processes_is_the_main_one(monkeypatch):
    from deploycc.core import distributed

    assert (distributed.rank(), distributed.processes(), distributed.is_main()) == (0, 1, True)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (distributed.rank(), distributed.processes(), distributed.is_main()) == (1, 2, False)
