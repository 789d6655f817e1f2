import json

import pytest

from deploycc.core import target as targets
from deploycc.core.artifact import Form
from deploycc.core.contract import TARGET_PARTS
from deploycc.core.target import Target, load
from deploycc.errors import TargetError, UnknownName
from deploycc.runtime import cuda

BASE = """
title = "a board"
backend = "onnxruntime"
arch = "aarch64"
pipeline = "export-onnx, quantize-static"
"""


@pytest.fixture
def board(tmp_path):
    def write(text, name="board.toml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_a_file_of_the_users_own_loads(board):
    target = load(board(BASE + "[hardware]\ncores = 4\n[bench]\nthreads = 3\n"))
    assert (target.name, target.hardware.cores, target.bench.threads) == ("board", 4, 3)


def test_inherit_merges_tables_key_by_key(board):
    board(BASE + 'auto = 9\n[quant]\nper_channel = false\nactivations = "int8"\n', "parent.toml")
    child = load(board('inherit = "parent"\ntitle = "child"\n[quant]\nactivations = "uint8"\n'))
    assert (child.title, child.quant.activations, child.quant.per_channel) == ("child", "uint8", False)
    assert child.auto == 0  # being chosen automatically is not inherited


def test_inherit_reaches_the_targets_that_come_with_deploycc(board):
    assert load(board('inherit = "arm64-onnxruntime"\ntitle = "mine"\n')).arch == "aarch64"


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        ("title = ", "not valid TOML", "correct the line"),
        (BASE + "[quant]\nper_chanel = true\n", r"unknown key 'quant.per_chanel' \(did you mean 'per_channel'", "edit board.toml"),
        (BASE + "colour = 1\n", "unknown key 'colour'", "edit board.toml"),
        (BASE + '[limits]\nlatency_p95_ms = "40"\n', "limits.latency_p95_ms.*got '40'", "edit board.toml"),
        (BASE + "[limits]\naccuracy_drop = 2.0\n", "limits.accuracy_drop.*less than or equal to 1", "edit board.toml"),
        (BASE.replace("onnxruntime", "onxruntime"), r"no backend 'onxruntime' \(did you mean 'onnxruntime'", "edit board.toml"),
        (
            BASE.replace("quantize-static", "quantise-static"),
            r"no pass 'quantise-static' \(did you mean 'quantize-static'",
            "edit board.toml",
        ),
        (BASE.replace("quantize-static", "quantize-static{"), "never closed", "add }"),
        (BASE.replace("aarch64", "riscv"), "arch", "edit board.toml"),
        (BASE + '[hardware]\nrequires = ["asimddp"]\nlacks = ["asimddp"]\n', "asimddp is both required and lacking", "edit"),
        (BASE.replace("aarch64", "x86_64"), "saturate on x86 CPUs without VNNI", "edit"),
        (BASE.replace("aarch64", "any"), "saturate on x86 CPUs without VNNI", "edit"),
        (BASE + '[quant]\nactivations = "int16"\n', "int16 activations must be symmetric", "edit"),
        (BASE + "[hardware]\ncores = 2\n[bench]\nthreads = 4\n", "4 threads on a device with 2 cores", "edit"),
        (BASE + '[runtime]\nbelow = "2.0"\n', "below = 2.0 says nothing without its reason", "edit"),
        (BASE + '[runtime]\nminimum = "2.9"\nbelow = "2.9"\nreason = "x"\n', "no version is at least 2.9 and below 2.9", "edit"),
        ('title = "no backend"\n', "backend: Field required", "edit"),
        ("inherit = 3\n", "inherit is 3", 'write inherit = "NAME"'),
        ('inherit = "x86-onnxruntme"\n', "no target 'x86-onnxruntme'", "did you mean 'x86-onnxruntime'"),
    ],
)
def test_what_cannot_be_right_is_refused_with_the_fix(board, text, message, fix):
    with pytest.raises(TargetError, match=message) as caught:
        load(board(text))
    assert fix in caught.value.fix
    assert "board.toml" in caught.value.what


def test_a_circle_of_inherit_names_its_members(board):
    board('inherit = "b"\n', "a.toml")
    board('inherit = "c"\n', "b.toml")
    with pytest.raises(TargetError, match="circle: a → b → c → a"):
        load(board('inherit = "a"\n', "c.toml").replace("c.toml", "a.toml"))


def test_an_unreadable_file_is_an_error_with_a_fix(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b'title = "\xff"')
    with pytest.raises(TargetError, match=r"cannot read latin\.toml"):
        load(str(tmp_path / "latin.toml"))


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UnknownName) as caught:
        load("x86-onnxruntim")
    assert "did you mean 'x86-onnxruntime'" in caught.value.fix
    with pytest.raises(TargetError, match="no target file"):
        load("nowhere.toml")


def make(**changes):
    facts = {"name": "t", "title": "t", "backend": "onnxruntime", "arch": "x86_64", "pipeline": "export-onnx", "auto": 1}
    facts |= {"hardware": {"requires": ("avx512_vnni",)}}
    return Target.model_validate({**facts, **changes})


def test_misfit_names_the_architecture_or_the_missing_flags(monkeypatch):
    monkeypatch.setattr(targets, "machine", lambda: ("x86_64", frozenset({"avx2"})))
    assert targets.misfit(make()) == "this CPU lacks avx512_vnni"
    assert targets.misfit(make(arch="aarch64")) == "it is for aarch64, this machine is x86_64"
    monkeypatch.setattr(targets, "machine", lambda: ("x86_64", frozenset({"avx2", "avx512_vnni"})))
    assert targets.misfit(make()) is None


def test_misfit_names_the_gpu_or_the_runtime_that_is_not_here(monkeypatch):
    target = targets.load("cuda-tensorrt")
    monkeypatch.setattr(cuda, "gpu", lambda: None)
    assert "this machine has none" in (targets.misfit(target) or "")
    monkeypatch.setattr(cuda, "gpu", lambda: cuda.Gpu("A GPU", "7.5", "580"))
    assert targets.misfit(target) == "it is for compute capability 8.0 or higher, this GPU (A GPU) has 7.5"
    monkeypatch.setattr(cuda, "gpu", lambda: cuda.Gpu("A GPU", "9.0", "580"))
    from deploycc.runtime.sessions import tensorrt

    monkeypatch.setattr(tensorrt, "version", lambda: None)
    assert "TensorRT is not installed" in (targets.misfit(target) or "")
    monkeypatch.setattr(tensorrt, "version", lambda: "11.4")
    assert targets.misfit(target) is None


@pytest.mark.parametrize("sizes", [[0, 1, 2], [2, 1, 3], [1, 3, 2], [1, 2], ["1", "2", "3"], [1, 2, 3.5]])
def test_sizes_of_an_axis_are_three_in_order(tmp_path, sizes):
    text = f'inherit = "cuda-tensorrt"\n[engine.axes]\nN = {json.dumps(sizes)}\n'
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(TargetError, match=r"engine"):
        load(str(tmp_path / "mine.toml"))


def test_the_sizes_of_an_axis_are_inherited_axis_by_axis(tmp_path):
    (tmp_path / "mine.toml").write_text(
        'inherit = "cuda-tensorrt"\n[engine]\naxes = {rows = [1, 2, 3]}\n[hardware]\ncompute_capability = "8.6"\n'
    )
    target = load(str(tmp_path / "mine.toml"))
    assert target.engine.axes == {"rows": (1, 2, 3)}
    (tmp_path / "mine.toml").write_text('inherit = "cuda-tensorrt"\n[hardware]\ncompute_capability = "86"\n')
    with pytest.raises(TargetError, match=r"hardware\.compute_capability"):
        load(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (("x86_64", frozenset({"avx2", "avx512_vnni"})), "x86-onnxruntime"),
        (("x86_64", frozenset({"avx2"})), "x86-onnxruntime-avx2"),
        (("aarch64", frozenset({"asimd"})), "arm64-onnxruntime"),
        (("riscv64", frozenset()), "onnxruntime-portable"),
    ],
)
def test_auto_picks_what_fits_the_machine(monkeypatch, machine, expected):
    monkeypatch.setattr(targets, "machine", lambda: machine)
    assert targets.automatic().name == expected


def test_auto_says_so_when_nothing_fits(monkeypatch):
    monkeypatch.setattr(targets, "machine", lambda: ("z80", frozenset()))
    monkeypatch.setattr(targets, "names", lambda: ("x86-onnxruntime",))
    with pytest.raises(TargetError, match="no target fits this machine"):
        targets.automatic()


def test_limits_and_titles_do_not_decide_the_result_of_a_pass():
    facts = make().digest_facts(TARGET_PARTS)
    assert facts == make(title="other", limits={"accuracy_drop": 0.5}).digest_facts(TARGET_PARTS)
    assert facts != make(quant={"per_channel": False}).digest_facts(TARGET_PARTS)
    assert make().digest_facts({"runtime"}) == make(quant={"per_channel": False}).digest_facts({"runtime"})


def test_the_targets_for_the_same_architecture_that_take_a_form_are_found_in_their_files():
    neighbours = targets.neighbours(load("rpi4"), Form.ONNX)
    assert "arm64-onnxruntime" in neighbours
    assert {load(name).arch for name in neighbours} == {"aarch64"}
    assert not {"rpi4", "arm64-qnnpack", "x86-onnxruntime"} & set(neighbours)


@pytest.mark.parametrize("name", ["rpi3", "rpi4", "rpi5", "graviton", "android-arm64"])
def test_an_arm_board_says_what_it_is(name):
    board = load(name)
    assert (board.backend, board.arch) == ("executorch", "aarch64")
    assert board.pipeline == load("arm64-xnnpack").pipeline
    hardware = board.hardware
    assert hardware.cpu
    assert hardware.isa
    assert hardware.l1d_kb
    assert hardware.l2_kb
    assert "cache" in board.docs
    dot_product = hardware.isa != "armv8-a"  # optional in 8.2, and all of these have it
    assert ("asimddp" in hardware.requires) == dot_product
    assert ("asimddp" in hardware.lacks) == (not dot_product)


def test_pytorch_on_arm_is_held_to_the_versions_that_run_there():
    runtime = load("arm64-qnnpack").runtime
    assert (runtime.minimum, runtime.below) == ("2.9", "2.10")
    assert "Cortex-A53" in runtime.reason
    assert any("dot-product" in notice for notice in load("arm64-qnnpack").notices)
