"""The state of a training: which weights are the best so far."""

import math

import torch
from torch import nn

from deploycc.passes._training_run import Run
from deploycc.passes.finetune import Finetune


def run():
    net = nn.Linear(1, 1, bias=False)
    return net, Run(None, net, None, Finetune(), 1, {})


def weight(net, value):
    with torch.no_grad():
        net.weight.fill_(value)


def test_the_best_weights_are_kept():
    net, state = run()
    for epoch, (value, merit) in enumerate([(1.0, 0.5), (2.0, 0.9), (3.0, 0.7)]):
        weight(net, value)
        state.finish(epoch, merit, "top1", merit)
    assert state.best["weight"].item() == 2.0
    assert (state.best_epoch, state.best_score) == (1, 0.9)
    assert [row["metric"] for row in state.curves] == [0.5, 0.9, 0.7]


def test_an_epoch_whose_held_out_loss_is_nan_replaces_nothing_and_is_replaced():
    net, state = run()
    weight(net, 1.0)
    state.finish(0, math.nan, "loss", math.nan)
    assert state.best["weight"].item() == 1.0  # the only weights there are
    weight(net, 2.0)
    state.finish(1, 0.3, "loss", -0.3)
    weight(net, 3.0)
    state.finish(2, math.nan, "loss", math.nan)
    assert state.best["weight"].item() == 2.0


def test_without_a_metric_the_last_epoch_is_kept():
    net, state = run()
    for epoch in range(3):
        weight(net, float(epoch))
        state.finish(epoch, None, "top1", None)
    assert state.best["weight"].item() == 2.0
