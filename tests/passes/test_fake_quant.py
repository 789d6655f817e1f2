"""Fake quantization: forward against numpy, gradients by hand, and what is written back."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import helper
from test_quantize_static import context, make, outputs, tensor

from deploycc.passes._fake_quant import Activation, Bias, Weights, array, fake_quantize, sites, write_back
from deploycc.passes._onnx_torch import OnnxModule
from deploycc.passes.quantize_static import QuantizeStatic


def test_the_forward_is_numpys_rounding_half_to_even():
    x = np.concatenate([np.linspace(-3, 9, 501), [0.125, 0.375, -0.125]]).astype(np.float32)
    got = Activation(np.float32(0.25), 4, (0, 31))(torch.from_numpy(x)).numpy()
    codes = np.clip(np.rint(x / np.float32(0.25)) + 4, 0, 31)
    np.testing.assert_array_equal(got, ((codes - 4) * np.float32(0.25)).astype(np.float32))


def test_gradients_go_straight_through_inside_the_range_only():
    x = torch.tensor([-9.0, -1.0, 0.3, 1.2, 9.0], requires_grad=True)
    fake_quantize(x, torch.tensor(0.5), -4, 4).mul(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2, 3, 4, 0]


def test_gradients_of_a_learned_step_are_those_of_lsq():
    x = torch.tensor([[-9.0, -1.1, 0.3, 1.2, 9.0]])
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    made = Activation(np.float32(0.5), 4, (0, 8), "learned")  # n = -4, p = 4
    made(x).mul(weights).sum().backward()
    v = x / 0.5
    slope = torch.where(x.abs() <= 2, v.round() - v, torch.sign(x) * 4)
    assert made.scale.grad is not None
    assert made.scale.grad.item() == pytest.approx((weights * slope).sum().item() / np.sqrt(5 * 4), rel=1e-6)


def test_learned_steps_of_weights_are_one_for_each_channel_and_never_negative():
    made = Weights(torch.tensor([[0.5, -1.0], [0.2, 0.1]]), np.array([0.01, 0.02], np.float32), 0, 127, "learned")
    made().sum().backward()
    assert made.scale.grad is not None
    assert made.scale.grad.shape == (2,)
    with torch.no_grad():
        made.scale[0] = -1.0
    assert made.step().tolist() == pytest.approx([1e-5, 0.02])
    assert set(dict(made.named_parameters())) == {"weight", "scale"}


def test_an_observed_step_moves_to_hold_the_batch_until_it_is_frozen():
    made = Activation(np.float32(0.5), 4, (0, 8), "observed").train()
    x = torch.tensor([-1.0, 6.0])  # 6 / 4 = 1.5 would hold it
    made(x)
    assert made.scale.item() == pytest.approx(0.5 + 0.01 * (1.5 - 0.5))
    made.observing = False
    made(x)
    made.eval().observing = True
    made(x)
    assert made.scale.item() == pytest.approx(0.51)
    for _ in range(2000):
        made.train()(x)
    assert made.scale.item() == pytest.approx(1.5, rel=1e-3)


def test_rows_under_vmap_are_rounded_and_differentiated_alike():
    made = Activation(np.float32(0.25), 4, (0, 31))
    x = torch.linspace(-3, 9, 40).reshape(5, 8).requires_grad_()
    whole = made(x)
    mapped = torch.func.vmap(made)(x)
    assert torch.equal(whole, mapped)
    (gradient,) = torch.autograd.grad(mapped.sum(), x)
    assert torch.equal(gradient, torch.autograd.grad(whole.sum(), x)[0])


def test_weight_scales_grow_with_the_largest_weight_and_hold_it():
    made = Weights(torch.tensor([[0.5, -1.0], [0.2, 0.1]]), np.array([1 / 63, 1.0], np.float32), 0, 63)
    with torch.no_grad():
        made.weight[0, 1] = -2.0
    assert made.step().tolist() == pytest.approx([2 / 63, 1.0])
    assert made.codes().tolist() == [[16, -63], [0, 0]]
    np.testing.assert_allclose(made().detach().numpy(), made.codes() * made.step().numpy()[:, None], rtol=1e-6)


def test_biases_are_rounded_to_the_products_of_both_scales():
    weights = Weights(torch.ones(2, 3), np.array(1 / 127, np.float32), 0, 127)
    made = Bias(torch.tensor([0.1, -0.3]), Activation(np.float32(0.5), 0, (0, 255)), weights)
    assert made.codes().tolist() == np.rint(np.array([0.1, -0.3]) / (0.5 / 127)).tolist()
    np.testing.assert_allclose(made().detach().numpy(), made.codes() * (0.5 / 127), rtol=1e-6)
    assert set(dict(made.named_parameters())) == {"bias"}


def test_a_scale_that_is_computed_is_refused():
    with pytest.raises(ValueError, match="s is not constant"):
        array(ir.Value(name="s"))


def test_readers_with_a_scale_of_their_own_keep_their_factor():
    """A gate's codes are read with another scale, and a float operator's with the same one for every channel."""
    artifact = make(
        [
            helper.make_node("Conv", ["x", "w1"], ["c"], "conv1"),
            helper.make_node("HardSwish", ["c"], ["h"], "gate"),
            helper.make_node("Conv", ["h", "w2"], ["d"], "conv2"),
            helper.make_node("Conv", ["d", "w3"], ["e"], "middle"),
            helper.make_node("Conv", ["e", "w4"], ["y"], "conv4"),
        ],
        [tensor("w1", 8, 3, 1, 1, scale=3), tensor("w2", 8, 8, 1, 1), tensor("w3", 8, 8, 1, 1), tensor("w4", 4, 8, 1, 1)],
    )
    ctx = context(artifact)
    quantized = QuantizeStatic(skip=("middle",))(artifact, ctx)
    found = sites(quantized.model.graph, reduce_range=False, steps="learned")
    assert not found.activations["gate_gate_scale_before"].learned  # its codes end where the clip does
    net = OnnxModule(quantized.model, found.modules)
    feeds = list(ctx.data.calibration(artifact))
    with torch.no_grad():
        got = np.concatenate([net(torch.from_numpy(item["x"]))[0].numpy() for item in feeds])
    np.testing.assert_allclose(got, outputs(quantized, feeds), atol=1e-4 * np.abs(got).max())
    with torch.no_grad():
        found.activations["d_scale"].scale.mul_(2)
    write_back(quantized.model.graph, found)
    values = {name: value.const_value.numpy() for name, value in quantized.model.graph.initializers.items()}
    np.testing.assert_allclose(values["middle_scale"], np.full(8, values["d_scale"]))
    assert values["gate_gate_scale"] == pytest.approx(1 / 255)
    assert values["gate_gate_scale_before"] == pytest.approx(6 / 255)
