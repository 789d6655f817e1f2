import numpy as np
import pytest
import torch
from graphs import context, digest, graph, kinds, module_artifact, onnx_artifact, outputs
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from deploycc.core.artifact import Artifact
from deploycc.core.compare import drift
from deploycc.errors import NothingToDo, PostconditionError
from deploycc.passes._affine import Affine, batch_norm, fold, per_channel, step
from deploycc.passes.fold_batchnorm import FoldBatchnorm
from deploycc.runtime.signature import TensorSpec

FOLD = FoldBatchnorm()
RNG = np.random.default_rng(0)


def stir(module: nn.Module) -> nn.Module:
    """Statistics and scales that a mistake would show in."""
    torch.manual_seed(1)
    for item in module.modules():
        for name in ("running_mean", "weight", "bias"):
            if isinstance(getattr(item, name, None), torch.Tensor):
                nn.init.uniform_(getattr(item, name), 0.2, 1.5)
        if isinstance(getattr(item, "running_var", None), torch.Tensor):
            nn.init.uniform_(item.running_var, 0.3, 2.0)
    return module.eval()


def folded(artifact: Artifact) -> Artifact:
    """The pass's result, checked: the input is untouched and the numbers are the same."""
    before, reference = digest(artifact), outputs(artifact)
    result = FOLD(artifact, context(artifact))
    assert digest(artifact) == before
    assert drift([reference], [outputs(result)]).relative < 1e-5
    return result


# The arithmetic


def test_the_formula_by_hand():
    # one channel: γ = 2, β = 1, μ = 3, σ² = 3, ε = 1: s = 2/√4 = 1, t = 1 − 3·1 = −2; w = 5, b = 7
    affine = batch_norm(np.array([2.0]), np.array([1.0]), np.array([3.0]), np.array([3.0]), eps=1.0)
    weight, bias = fold(np.array([[5.0]]), np.array([7.0]), affine, axis=0)
    assert (affine.scale[0], affine.shift[0]) == (1.0, -2.0)
    assert (weight[0, 0], bias[0]) == (5.0, 5.0)


def test_two_maps_in_a_row():
    both = Affine(np.array([2.0]), np.array([3.0])).then(Affine(np.array([5.0]), np.array([7.0])))
    assert (both.scale[0], both.shift[0]) == (10.0, 22.0)  # 5·(2x + 3) + 7


def test_a_variance_below_minus_epsilon_is_not_finite():
    assert not batch_norm(None, None, np.zeros(1), np.array([-1.0]), 1e-5).is_finite


@pytest.mark.parametrize(
    ("operator", "swapped", "expected"),
    [("add", False, 7.0), ("sub", False, 3.0), ("sub", True, -3.0), ("mul", False, 10.0), ("div", False, 2.5), ("div", True, None)],
)
def test_steps_on_five_and_two(operator: str, swapped: bool, expected: float | None):
    found = step(operator, np.array([2.0]), swapped=swapped)
    assert (None if found is None else float(found.scale[0] * 5 + found.shift[0])) == expected


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ((), True),
        ((4, 1, 1), True),
        ((1, 4, 1, 1), True),
        ((1, 1, 1, 1), True),
        ((4,), False),
        ((2, 4, 1, 1), False),
        ((1, 1, 4, 1, 1), False),
    ],
)
def test_what_varies_along_the_channels_only(shape: tuple[int, ...], fits: bool):
    assert (per_channel(np.ones(shape), 4, 1, 4) is not None) is fits


# nn.Module


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (2, 3, 9)),
        (nn.Conv2d(4, 6, 3, groups=2, bias=False, padding="same"), nn.BatchNorm2d(6, eps=0.1), (2, 4, 8, 8)),
        (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3, affine=False), (1, 2, 4, 4, 4)),
        (nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4), (3, 5)),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 5)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), (1, 4, 5, 5)),
        (nn.ConvTranspose3d(4, 4, 2, groups=4), nn.BatchNorm3d(4), (1, 4, 3, 3, 3)),
    ],
)
def test_every_kind_of_layer(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]):
    artifact = module_artifact(stir(nn.Sequential(layer, norm, nn.ReLU())), TensorSpec("x", "float32", shape))
    result = folded(artifact)
    assert isinstance(result.model[1], nn.Identity)
    assert result.model[0].weight.dtype is torch.float32
    assert result.notes == ("1 layers took in the affine maps after them",)
    assert result.signature == artifact.signature


class Scale(nn.Module):
    """A learned scale and shift per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(1, channels, 1, 1)), nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 - (x * self.weight - self.bias) / 4.0


def test_frozen_affine_and_several_in_a_row():
    net = stir(nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4), Scale(4), nn.BatchNorm2d(4), nn.ReLU()))
    result = folded(module_artifact(net, TensorSpec("x", "float32", (1, 3, 8, 8))))
    assert [type(item).__name__ for item in result.model] == ["Conv2d", "Identity", "Identity", "Identity", "ReLU"]


class Untraceable(nn.Module):
    """Python control flow on shapes, blocks in a list, a skip connection: no torch.fx symbolic trace."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            if x.shape[2] > 4:
                x = x + norm(conv(x))
        return x


def test_python_control_flow():
    result = folded(module_artifact(stir(Untraceable()), TensorSpec("x", "float32", (1, 4, 8, 8))))
    assert all(isinstance(norm, nn.Identity) for norm in result.model.norms)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x)))


def test_a_weight_that_two_layers_share_is_copied():
    artifact = module_artifact(stir(Tied()), TensorSpec("x", "float32", (1, 3, 8, 8)))
    result = folded(artifact)
    assert not torch.equal(result.model.a.weight, result.model.b.weight)
    assert torch.equal(result.model.b.weight, artifact.model.b.weight)


class Branch(nn.Module):
    """One way or another, no batch normalization here can be folded."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.norm, self.line = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(8, 3)
        self.length_norm = nn.BatchNorm1d(3)
        self.batch_statistics = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        if self.how == "read twice":
            return self.norm(y) + y
        if self.how == "called twice":
            return self.norm(self.conv(y))
        if self.how == "norm first":
            return self.norm(x) + y
        if self.how == "functional":
            norm = self.norm
            return nn.functional.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        if self.how == "other axis":
            return self.length_norm(self.line(x[:, :, 0]))
        return self.batch_statistics(y)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("read twice", "'norm' stays: something else reads its input too"),
        ("called twice", "'norm' stays: the layer before it is called more than once"),
        ("norm first", "'norm' stays: it does not follow a convolution or linear layer"),
        ("functional", "'Branch' stays: it is not a module's whole computation"),
        ("other axis", "'length_norm' stays: it is not a module's whole computation"),
        ("batch statistics", "'batch_statistics' stays: it is not a module's whole computation"),
    ],
)
def test_what_cannot_be_folded_is_said(how: str, why: str):
    artifact = module_artifact(stir(Branch(how)), TensorSpec("x", "float32", (1, 3, 8, 8)))
    with pytest.raises(NothingToDo, match=why):
        FOLD(artifact, context(artifact))


def test_a_computed_weight_is_left_alone():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    artifact = module_artifact(stir(net), TensorSpec("x", "float32", (1, 3, 8, 8)))
    with pytest.raises(NothingToDo, match="does not follow a convolution"):
        FOLD(artifact, context(artifact))


def test_a_batch_axis_with_a_name():
    net = stir(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert isinstance(folded(module_artifact(net, TensorSpec("x", "float32", ("N", 3, 8, 8)))).model[1], nn.Identity)


class DataDependent(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_a_model_that_torch_export_cannot_take_names_the_line():
    artifact = module_artifact(DataDependent(), TensorSpec("x", "float32", (1, 3)))
    with pytest.raises(NothingToDo, match=r"torch.export fails: .*\(at test_fold_batchnorm\.py:\d+\)"):
        FOLD(artifact, context(artifact))


class Spy(nn.Module):
    """Behaves otherwise once its batch normalization is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        return y if isinstance(self.norm, nn.BatchNorm2d) else y * 2


def test_a_result_that_computes_something_else_is_refused():
    artifact = module_artifact(stir(Spy()), TensorSpec("x", "float32", (1, 3, 8, 8)))
    with pytest.raises(PostconditionError, match="fold-batchnorm moved the outputs by 1 of the largest one"):
        FOLD(artifact, context(artifact))


# ONNX


def arrays(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: RNG.uniform(0.2, 1.5, shape).astype(np.float32) for name, shape in shapes.items()}


NORM = {"g": (6,), "h": (6,), "m": (6,), "v": (6,)}


@pytest.mark.parametrize(
    ("body", "shapes", "left"),
    [
        (
            "(float[1,4,8,8] x) => (float[1,6,6,6] y) { c = Conv(x, w) y = BatchNormalization(c, g, h, m, v) }",
            {"w": (6, 4, 3, 3)},
            ["Conv"],
        ),
        (
            "(float[1,4,8,8] x) => (float[1,6,6,6] y) { c = Conv<group=2>(x, w, b) y = BatchNormalization<epsilon=0.1>(c, g, h, m, v) }",
            {"w": (6, 2, 3, 3), "b": (6,)},
            ["Conv"],
        ),
        (
            "(float[1,4,8,8] x) => (float[1,6,10,10] y) { c = ConvTranspose<group=2>(x, w, b) y = BatchNormalization(c, g, h, m, v) }",
            {"w": (4, 3, 3, 3), "b": (6,)},
            ["ConvTranspose"],
        ),
        (
            "(float[2,4] x) => (float[2,6] y) { c = Gemm<transB=1>(x, w, b) y = BatchNormalization(c, g, h, m, v) }",
            {"w": (6, 4), "b": (1, 6)},
            ["Gemm"],
        ),
        ("(float[2,4] x) => (float[2,6] y) { c = Gemm(x, w) d = Mul(c, a) y = Sub(a, d) }", {"w": (4, 6), "a": (6,)}, ["Gemm"]),
        ("(float[2,4] x) => (float[2,6] y) { c = MatMul(x, w) y = BatchNormalization(c, g, h, m, v) }", {"w": (4, 6)}, ["MatMul", "Add"]),
        ("(float[2,3,4] x) => (float[2,3,6] y) { c = MatMul(x, w) y = Div(c, a) }", {"w": (4, 6), "a": (1, 1, 6)}, ["MatMul"]),
        (
            "(float[2,3,4] x) => (float[2,3,6] y) { c = MatMul(x, w) d = Add(c, a) e = Mul(a, d) y = Relu(e) }",
            {"w": (4, 6), "a": (6,)},
            ["MatMul", "Add", "Relu"],
        ),
        (
            "(float[1,4,8,8] x) => (float[1,6,6,6] y) { c = Conv(x, w) d = Mul(c, a) e = Add(k, d) y = BatchNormalization(e, g, h, m, v) }",
            {"w": (6, 4, 3, 3), "a": (6, 1, 1), "k": (1, 6, 1, 1)},
            ["Conv"],
        ),
    ],
)  # fmt: skip
def test_every_kind_of_onnx_layer(body: str, shapes: dict[str, tuple[int, ...]], left: list[str]):
    artifact = onnx_artifact(graph(body, **arrays(**shapes, **NORM)))
    result = folded(artifact)
    assert kinds(result) == left
    assert result.signature == artifact.signature


def test_the_onnx_result_by_hand():
    body = "(float[1,1] x) => (float[1,1] y) { c = Gemm(x, w, b) y = BatchNormalization<epsilon=1.0>(c, g, h, m, v) }"
    values = {"w": [[5.0]], "b": [7.0], "g": [2.0], "h": [1.0], "m": [3.0], "v": [3.0]}
    result = folded(onnx_artifact(graph(body, **{name: np.array(value, np.float32) for name, value in values.items()})))
    assert outputs(result, {"x": np.array([[10.0]], np.float32)})["y"][0, 0] == 55.0


def test_statistics_that_are_computed_from_constants():
    body = """(float[1,4,8,8] x) => (float[1,6,6,6] y) {
        w = ConstantOfShape<value = float[1] {0.5}>(shape) v2 = Add(v, m) one = Unsqueeze(g, axes)
        c = Conv(x, w) d = Mul(c, one) y = BatchNormalization(d, g, h, m, v2) }"""
    weights = {**arrays(**NORM), "shape": np.array([6, 4, 3, 3]), "axes": np.array([1, 2])}
    assert kinds(folded(onnx_artifact(graph(body, **weights)))) == ["Conv"]


def test_a_constant_weight_with_two_readers_keeps_its_value():
    body = "(float[1,4,8,8] x) => (float[1,4,4,4] y) { c = Conv(x, w) d = Mul(c, a) y = Conv(d, w) }"
    assert kinds(folded(onnx_artifact(graph(body, **arrays(w=(4, 4, 3, 3), a=(4, 1, 1)))))) == ["Conv", "Conv"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("(float[1,6,8,8] x) => (float[1,6,8,8] y) { y = BatchNormalization(x, g, h, m, v) }", "does not follow a convolution"),
        ("(float[1,4,8,8] x, float[6,4,3,3] w2) => (float[1,6,6,6] y) { c = Conv(x, w2) y = BatchNormalization(c, g, h, m, v) }",
         "weights of the Conv before it are not constant"),
        ("(float[1,4,8,8] x) => (float[1,6,6,6] y, float[1,6,6,6] c) { c = Conv(x, w) y = BatchNormalization(c, g, h, m, v) }",
         "something else reads its input too"),
        ("(float[1,4,8,8] x, float[6] v2) => (float[1,6,6,6] y) { c = Conv(x, w) y = BatchNormalization(c, g, h, m, v2) }",
         "its parameters are not constant"),
        ("(float[1,4,8,8] x) => (float[1,6,6,6] y) { c = Conv(x, w) y = Mul(c, rows) }", "no BatchNorm or per-channel scale"),
        ("(float[2,4] x) => (float[2,6] y) { c = MatMul(x, line) y = Add(c, g) }", "no BatchNorm or per-channel scale"),
        ("(float[2,4] x) => (float[2,6] y) { c = Gemm<alpha=0.5>(x, line) y = Mul(c, g) }", "no BatchNorm or per-channel scale"),
    ],
)  # fmt: skip
def test_what_stays_in_an_onnx_graph(body: str, why: str):
    artifact = onnx_artifact(graph(body, **arrays(w=(6, 4, 3, 3), rows=(6, 1), line=(4, 6), **NORM)))
    with pytest.raises(NothingToDo, match=why):
        FOLD(artifact, context(artifact))


def test_negative_variance_is_left_alone():
    weights = {**arrays(w=(6, 4, 3, 3), **NORM), "v": np.full(6, -1.0, np.float32)}
    artifact = onnx_artifact(
        graph("(float[1,4,8,8] x) => (float[1,6,6,6] y) { c = Conv(x, w) y = BatchNormalization(c, g, h, m, v) }", **weights)
    )
    with pytest.raises(NothingToDo, match="its statistics are not finite"):
        FOLD(artifact, context(artifact))
