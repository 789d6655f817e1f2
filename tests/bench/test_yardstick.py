import numpy as np
import torch

from deploycc.bench import yardstick
from deploycc.bench.yardstick import Yardstick
from deploycc.core.artifact import Artifact, Form, TensorSpec
from deploycc.forms.module import capture_signature


class Counting(torch.nn.Module):
    calls = 0

    def forward(self, x):
        Counting.calls += 1
        return x * 2


def made():
    module = Counting().eval()
    artifact = Artifact(Form.MODULE, module, capture_signature(module, (TensorSpec("x", "float32", (1, 3)),)), "toy")
    Counting.calls = 0
    return Yardstick(artifact, 1)


def answers(stick, count=4):
    return [stick.run({"x": np.full((1, 3), index, np.float32)})["output"][0, 0] for index in range(count)]


def test_answers_are_computed_once_and_replayed_in_order():
    stick = made()
    first = answers(stick.rewound())
    assert first == [0, 2, 4, 6]
    assert answers(stick.rewound()) == first
    assert Counting.calls == 4


def test_a_longer_second_walk_computes_what_is_new():
    stick = made()
    answers(stick.rewound(), 2)
    assert answers(stick.rewound(), 4) == [0, 2, 4, 6]
    assert Counting.calls == 4


def test_answers_beyond_the_memory_are_computed_again(monkeypatch):
    monkeypatch.setattr(yardstick, "KEPT_BYTES", 1)
    stick = made()
    assert answers(stick.rewound()) == answers(stick.rewound()) == [0, 2, 4, 6]
    assert Counting.calls == 7  # the first answer was kept
