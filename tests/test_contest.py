"""Several targets: who takes part, what is kept, and what is told of the others."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from deploycc import contest, driver, render_contest
from deploycc.bench.result import load
from deploycc.cli import app
from deploycc.core import target as targets
from deploycc.errors import Interrupted, StoreError, TargetError, UnknownName, UsageError
from deploycc.planning import Options
from deploycc.runtime import bundle as bundles

NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    model.example_input = torch.zeros(1, 3, 12, 12)
    return model
"""


@pytest.fixture
def net(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(24, 3, 12, 12)).astype(np.float32))
    return f"{tmp_path / 'net.py'}:make"


def quick(name, **facts):
    """A portable target that ships float, timed for a moment."""
    made = targets.load("onnxruntime-portable")
    bench = made.bench.model_copy(update={"min_seconds": 0.05, "min_runs": 5})
    return made.model_copy(update={"name": name, "bench": bench, "pipeline": "fold-batchnorm, export-onnx", **facts})


def options(tmp_path, **fields):
    return Options(output=tmp_path / "best", cache=tmp_path / "cache", **fields)


def test_a_family_is_every_target_of_that_name():
    assert targets.several("x86") == tuple(name for name in targets.names() if name.startswith("x86-"))
    assert targets.several("x86-onnxruntime") is None  # a target, though x86-onnxruntime-avx2 begins so
    assert targets.several("nowhere") is None
    assert targets.several("x86-fbgemm, x86-onnxruntime") == ("x86-fbgemm", "x86-onnxruntime")
    for wrong in ("x86-fbgemm,nowhere", "x86-fbgemm,x86-fbgemm"):
        with pytest.raises(UnknownName, match=r"nowhere|twice"):
            targets.several(wrong)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"arch": "aarch64"}, "this machine is"),
        ({"hardware": targets.Hardware(requires=("no_such_flag",))}, "lacks no_such_flag"),
        ({"hardware": targets.Hardware(lacks=("my_flag",))}, "for CPUs without my_flag"),
        ({}, None),
    ],
)
def test_who_takes_part(monkeypatch, facts, reason):
    monkeypatch.setattr(contest, "cpu_flags", lambda: frozenset({"my_flag"}))
    monkeypatch.setattr(targets, "machine", lambda: ("x86_64", frozenset({"my_flag"})))
    found = contest.obstacle(quick("a", **facts))
    assert found is None if reason is None else reason in found


def test_a_list_must_run_here_and_a_family_says_who_is_left_out(monkeypatch):
    monkeypatch.setattr(contest, "obstacle", lambda target: None if target.name == "x86-onnxruntime" else "it is too old")
    assert contest.field("x86-onnxruntime") is None
    chosen, out = contest.field("x86")
    assert chosen == ("x86-onnxruntime",)
    assert ("x86-fbgemm", "it is too old") in out
    with pytest.raises(UsageError, match="x86-fbgemm' cannot be timed on this machine: it is too old"):
        contest.field("x86-onnxruntime,x86-fbgemm")
    monkeypatch.setattr(contest, "obstacle", lambda target: "it is too old")
    with pytest.raises(TargetError, match="no target of 'x86' runs"):
        contest.field("x86")


def test_the_best_is_kept_and_the_others_are_told(net, tmp_path):
    data = str(tmp_path / "data.npz")
    bad = quick("bad", pipeline="fold-batchnorm, export-onnx, quantize-dynamic")  # on which nothing is to be had without data
    found = contest.run(
        net, options(tmp_path, data=data, zip=True, seed=3), [quick("a"), quick("b"), replace_backend(bad)], [("c", "not here")]
    )
    assert [result.plan.target.name for result in found.compiled] == ["a", "b"]
    assert found.refused[0] == ("c", "not here")
    assert found.refused[1][0] == "bad"
    assert found.best in found.compiled
    assert found.bench.seed == 3
    assert bundles.load(tmp_path / "best").manifest["target"]["name"] == found.best.plan.target.name
    assert (tmp_path / "best.zip").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "best.zip", "cache", "data.npz", "net.py"]
    text = "\n".join(part for part in (*render_contest.contest(found), *render_contest.contest_end(found)) if isinstance(part, str))
    assert "c takes no part: not here" in text
    assert "bad takes no part" in text
    page = (tmp_path / "best" / "report.html").read_text()
    assert "the race" in page
    assert "bad: " in page
    kept = bundles.load(tmp_path / "best").manifest["measured"]
    assert kept["race"]["entries"] == json.loads(found.race.model_dump_json())["entries"]
    assert "--target a,b,bad " in kept["race"]["command"]
    assert kept["command"].endswith(f"-o {tmp_path / 'best'}")  # not where it was compiled first
    assert "PyTorch eager" in found._repr_html_()
    document = render_contest.contest_json(found)
    assert [row["name"] for row in document["rows"]] == ["PyTorch eager", "a", "b"]
    assert [row["name"] for row in document["rows"] if row["best"]] == [document["best"]]


def replace_backend(target):
    return target.model_copy(update={"pipeline": "export-onnx, quantize-static"}).model_copy(update={"backend": "fbgemm"})


def test_what_is_no_bundle_is_not_overwritten_and_nothing_is_compiled(net, tmp_path):
    (tmp_path / "best").write_text("mine")
    with pytest.raises(StoreError):
        contest.run(net, options(tmp_path), [quick("a")])
    assert not (tmp_path / "cache").exists()


def test_none_could_be_compiled(net, tmp_path):
    with pytest.raises(TargetError, match="no target could be compiled: c: not here; a: "):
        contest.run(net, options(tmp_path), [replace_backend(quick("a"))], [("c", "not here")])


def test_torchrun_is_refused(net, tmp_path, monkeypatch):
    monkeypatch.setattr(contest.distributed, "processes", lambda: 2)
    with pytest.raises(UsageError, match="by one process"):
        contest.run(net, options(tmp_path), [quick("a")])


@pytest.mark.parametrize("finished", [0, 1])
def test_stopped_by_the_user_it_keeps_what_there_is(net, tmp_path, monkeypatch, finished):
    compile_one, done = driver.compile, []

    def compiling(model, given, progress):
        compiled = compile_one(model, given, progress)
        done.append(given.output.name)
        if len(done) > finished:
            raise Interrupted("stopped", fix="again")
        return compiled

    monkeypatch.setattr(driver, "compile", compiling)
    with pytest.raises(Interrupted, match=r"for a is in|of 1 targets \(a\)"):
        contest.run(net, options(tmp_path), [quick("a"), quick("b"), quick("c")])
    assert len(done) == finished + 1
    assert bundles.load(tmp_path / "best").manifest["target"]["name"] == "a"


@pytest.mark.parametrize("finished", [0, 1])
def test_stopped_before_the_next_one_has_anything_it_keeps_what_is_finished(net, tmp_path, monkeypatch, finished):
    compile_one, done = driver.compile, []

    def compiling(model, given, progress):
        if len(done) == finished:
            raise KeyboardInterrupt
        done.append(given.output.name)
        return compile_one(model, given, progress)

    monkeypatch.setattr(driver, "compile", compiling)
    expected = (Interrupted, r"the best of 1 targets \(a\)") if finished else (KeyboardInterrupt, "^$")
    with pytest.raises(expected[0], match=expected[1]):
        contest.run(net, options(tmp_path), [quick("a"), quick("b"), quick("c")])
    assert (tmp_path / "best").is_dir() == bool(finished)


def test_every_compile_has_its_own_folders_and_what_is_left_of_the_budget():
    given = Options(output=Path("out"), dump=Path("dump"), budget_s=60, zip=True)
    own = contest._own(given, "a", Path("work/a"), 45)
    assert (own.output, own.dump, own.budget_s, own.zip) == (Path("work/a"), Path("dump/a"), 15, False)
    assert contest._own(given, "a", Path("work/a"), 99).budget_s == 0
    assert contest._own(replace(given, budget_s=None, dump=None), "a", Path("a"), 9).budget_s is None


def result(name, sqnr_db, status=0):
    accuracy = SimpleNamespace(sqnr_db=sqnr_db) if sqnr_db is not None else None
    return SimpleNamespace(
        plan=SimpleNamespace(target=SimpleNamespace(name=name)), shipped=SimpleNamespace(accuracy=accuracy), exit_status=status
    )


@pytest.mark.parametrize(
    ("field", "best"),
    [
        ([("a", 1.0, 20.0, 0), ("b", 2.0, 30.0, 0)], "a"),  # the fastest
        ([("a", 1.0, 20.0, 0), ("b", 1.02, 30.0, 0)], "b"),  # no one notices 2 %, and its answers are nearer
        ([("a", 1.0, 20.0, 3), ("b", 2.0, 30.0, 0)], "b"),  # a limit that is not met weighs more
        ([("a", 2.0, 20.0, 3), ("b", 1.0, 30.0, 3)], "b"),  # nobody meets it
        ([("a", 1.0, None, 0), ("b", 2.0, None, 0)], "a"),
    ],
)
def test_which_is_best(field, best):
    times = {name: milliseconds for name, milliseconds, _, _ in field}
    bench = SimpleNamespace(
        get=lambda name: SimpleNamespace(p50_ms=times[name]),
        ratio=lambda name, base: SimpleNamespace(value=times[base] / times[name]),
    )
    assert contest.choose([result(name, db, status) for name, _, db, status in field], bench).plan.target.name == best


def test_the_command_line_and_python_name_several(net, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    import deploycc

    monkeypatch.setenv("DEPLOYCC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(contest, "obstacle", lambda target: None)
    known = {"a": quick("a"), "b": quick("b")}
    monkeypatch.setattr(targets, "names", lambda: tuple(known))
    monkeypatch.setattr(targets, "load", lambda name: known[name])
    words = ["compile", net, "-t", "a,b", "-o", str(tmp_path / "best")]
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 0, ran.output
    assert "best bundle:" in ran.output
    planned = CliRunner().invoke(app, ["plan", net, "-t", "a,b"])
    assert planned.exit_code == 0, planned.output
    assert planned.output.count("export-onnx") >= 2
    compiled = deploycc.compile(net, target="a,b", output=tmp_path / "other", cache=tmp_path / "cache")
    assert compiled.plan.target.name in known


def test_a_shoot_out_shows_the_race_and_keeps_no_bundle(net, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contest, "field", lambda text: ((quick("a"), quick("b", pipeline="export-onnx")), ()))
    words = ["bench", net, "--data", str(tmp_path / "data.npz"), "--min-seconds", "0.1", "--min-runs", "5"]
    assert not app([*words, "--targets", "a,b", "--save", str(tmp_path / "race.json")], standalone_mode=False)
    out = capsys.readouterr().out
    assert "← best" in out
    assert "best bundle" not in out
    assert {item.name for item in load(tmp_path / "race.json").measurements} == {"PyTorch eager", "a", "b"}
    assert not app([*words, "--targets", "a,b", "--json"], standalone_mode=False)
    printed = capsys.readouterr().out
    document = json.loads(printed)
    (tmp_path / "printed.json").write_text(printed)
    assert not app(["report", str(tmp_path / "printed.json"), "-o", str(tmp_path / "page.html")], standalone_mode=False)
    assert "printed.json" in capsys.readouterr().out
    assert "Latency, every sample" in (tmp_path / "page.html").read_text()
    assert document["bundle"] is None
    assert document["bench"]["settings"]["min_runs"] == 5
    with pytest.raises(UsageError, match="--targets takes one model, not 2"):
        app([*words, net, "--targets", "a,b"], standalone_mode=False)


def test_a_shoot_out_of_one_target_is_a_table_too(net, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(contest, "run", lambda model, given, names, *rest: seen.update(names=names, output=given.output) or "found")
    race = targets.Bench(min_seconds=0.1, min_runs=5)
    assert contest.shoot_out(net, options(tmp_path), "x86-fbgemm", race) == "found"
    assert seen["names"] == ("x86-fbgemm",)
    assert not seen["output"].parent.exists()
    monkeypatch.setattr(contest, "obstacle", lambda target: "it is for another CPU")
    with pytest.raises(UsageError, match="'x86-fbgemm' cannot be timed on this machine: it is for another CPU"):
        contest.shoot_out(net, options(tmp_path), "x86-fbgemm", race)
    with pytest.raises(UnknownName, match="nowhere"):
        contest.shoot_out(net, options(tmp_path), "nowhere", race)


def test_a_target_that_loses_to_eager_is_told(net, tmp_path):
    found = contest.run(net, options(tmp_path, data=str(tmp_path / "data.npz")), [quick("a"), quick("b")])
    times = {"PyTorch eager": 2_000_000, "a": 1_000_000, "b": 9_000_000}
    document = found.bench.model_dump(mode="json")
    for item in document["measurements"]:
        item["samples_ns"] = [times[item["name"]] + number % 7 for number in range(len(item["samples_ns"]))]
    found = replace(found, bench=type(found.bench).model_validate_json(json.dumps(document)))
    lines = [part for part in render_contest.contest(found) if isinstance(part, str) and "slower than PyTorch eager" in part]
    (line,) = lines
    assert line.startswith("! b is slower than PyTorch eager here (0.22×")
