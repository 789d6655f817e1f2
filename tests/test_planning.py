from pathlib import Path

import pytest

from deploycc.core.artifact import Form
from deploycc.errors import UsageError
from deploycc.planning import Options, command_line, parse_command_line, parse_quantity, parse_shapes, plan, resolve_target


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("5ms", "ms", 5.0),
        ("0.5 s", "ms", 500.0),
        ("250us", "ms", 0.25),
        ("4MB", "MB", 4.0),
        ("500kB", "MB", 0.5),
        ("1MiB", "MB", 1.048576),
        ("10m", "s", 600.0),
        ("1.5h", "s", 5400.0),
        (None, "s", None),
    ],
)
def test_quantities_carry_their_unit(text, unit, value):
    assert parse_quantity("--x", text, unit) == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize("text", ["5", "ms", "-5ms", "0ms", "5 parsecs", "5MB", "", "1e400ms0", "..ms"])
def test_quantities_without_a_meaning_are_refused(text):
    with pytest.raises(UsageError, match="--max-latency is") as caught:
        parse_quantity("--max-latency", text, "ms")
    assert "such as 5ms" in caught.value.fix


def test_shapes():
    assert parse_shapes(["x:1x3x224x224", "ids:Nx16"]) == {"x": (1, 3, 224, 224), "ids": ("N", 16)}
    assert parse_shapes(["a:b:2x2"]) == {"a:b": (2, 2)}


@pytest.mark.parametrize("texts", [["x"], ["x:"], [":1x3"], ["x:1x0"], ["x:1xx3"], ["x:1x-3"], ["x:1", "x:2"]])
def test_shapes_that_cannot_be_are_refused(texts):
    with pytest.raises(UsageError, match="--input"):
        parse_shapes(texts)


def test_the_users_limits_go_into_the_target():
    target = resolve_target(Options(target="arm64-onnxruntime", max_drop=0.05, max_latency_ms=7.0, max_size_mb=3.0, threads=2))
    assert (target.limits.accuracy_drop, target.limits.latency_p95_ms, target.limits.model_mb) == (0.05, 7.0, 3.0)
    assert target.bench.threads == 2
    assert target.limits.agreement == 0.95


def test_the_command_line_of_a_compile_can_be_typed_again():
    options = Options(
        target="arm64-onnxruntime",
        data="my photos",
        passes="+fold-normalize",
        max_latency_ms=5.0,
        budget_s=90.0,
        inputs={"x": ("N", 3)},
        seed=3,
        output=Path("out"),
    )
    text = command_line(plan("net.onnx", Options(target="arm64-onnxruntime")), "net.onnx", options)
    assert text == (
        "deploycc compile net.onnx --target arm64-onnxruntime --data 'my photos' --passes +fold-normalize "
        "--max-latency 5ms --budget 90s --input x:Nx3 --seed 3 -o out"
    )


def test_a_plan_runs_nothing_and_needs_no_file():
    planned = plan("gone.onnx", Options(target="arm64-onnxruntime"))
    assert planned.form is Form.ONNX
    assert planned.dropped == ("export-onnx",)
    assert not planned.native or planned.misfit is None


def test_a_recorded_command_line_is_read_back():
    given = Options(
        target="arm64-onnxruntime", data="my photos/", passes="-fold-batchnorm", weights=Path("w.safetensors"), seed=3, threads=2,
        inputs={"x": ("N", 3, 8, 8), "y": (1,)}, random_weights=True, resume=False, max_drop=0.02,
    )  # fmt: skip
    model, found = parse_command_line(command_line(plan("net.onnx", Options(target="arm64-onnxruntime")), "net.onnx", given))
    assert model == "net.onnx"
    kept = ("data", "calibration", "passes", "weights", "seed", "inputs", "random_weights", "resume", "metric")
    assert [getattr(found, name) for name in kept] == [getattr(given, name) for name in kept]
    assert found.max_drop is None  # a limit decides neither the model nor the samples


@pytest.mark.parametrize("text", ["", "deploycc plan net.onnx", "deploycc compile"])
def test_what_is_no_command_line_is_refused(text):
    with pytest.raises(UsageError, match="is not how a bundle is compiled"):
        parse_command_line(text)


def test_an_onnx_file_reaches_executorch_through_its_torch_form():
    planned = plan("x.onnx", Options(target="rpi4"))
    assert [step.body.name for step in planned.pipeline.steps] == ["fold-batchnorm", "export-program", "quantize-pt2e"]
    assert planned.dropped == ("fold-padding",)
    module = plan("torchvision:resnet18", Options(target="rpi4"))
    assert [step.body.name for step in module.pipeline.steps] == ["fold-batchnorm", "fold-padding", "export-program", "quantize-pt2e"]
