import numpy as np
import pytest
from graphs import graph, onnx_artifact

from deploycc.errors import PostconditionError
from deploycc.passes._proof import compare, open_session, prove_close, try_run

RELU = "(float[1,4] x) => (float[1,4] y) { y = Relu(x) }"


def artifact(body: str, **weights: np.ndarray):
    return onnx_artifact(graph(body, **weights))


def test_equal_and_unequal():
    prove_close("some-pass", artifact(RELU), artifact(RELU), 0.0)
    with pytest.raises(PostconditionError, match="some-pass moved the outputs by") as caught:
        prove_close("some-pass", artifact(RELU), artifact(RELU.replace("Relu", "Abs")), 1e-3)
    assert 'passes="-some-pass"' in caught.value.fix


STEEP = "(float[1,4] x) => (float[1,4] y) { a = Mul(x, s) y = Sin(a) }"  # one rounding of x moves y by thousandths


def steep(factor: float):
    return artifact(STEEP, s=np.array(1e4 * factor, np.float32))


def test_a_model_that_amplifies_rounding_may_round_otherwise():
    rounded, wrong = 1 + 2**-23, 1 + 2**-15
    prove_close("some-pass", steep(1), steep(rounded), 1e-4)
    with pytest.raises(PostconditionError, match=r"allowed 0\.00[12]"):
        prove_close("some-pass", steep(1), steep(wrong), 1e-4)
    with pytest.raises(PostconditionError, match=r"allowed 0\)"):
        prove_close("some-pass", steep(1), steep(rounded), 0.0)  # exact is exact


def test_a_model_that_refuses_made_up_input_proves_nothing():
    body = "(float[N,4] x) => (float[M,3] y) { y = Reshape(x, s) }"  # N is 2 on made-up input, and 8 values are no rows of 3
    prove_close("some-pass", artifact(body, s=np.array([-1, 3])), artifact(RELU), 1e-3)


def test_why_a_session_fails():
    with open_session(artifact(RELU)) as session:
        assert "inputs are x" in str(try_run(session, {"y": np.zeros((1, 4), np.float32)}))
        assert isinstance(try_run(session, {"x": np.zeros((1, 4), np.float32)}), dict)


@pytest.mark.parametrize(
    ("want", "got", "relative"),
    [
        ([1.0, np.nan], [1.0, np.nan], 0.0),
        ([1.0, np.inf], [1.0, np.inf], 0.0),
        ([1.0, np.inf], [1.0, -np.inf], np.inf),
        ([1.0, np.nan], [1.0, 2.0], np.inf),
        ([1.0, 2.0], [1.0, np.nan], np.inf),
        ([1.0, 2.0], [1.0, 1.0], 0.5),
        ([1.0, 2.0], [1.0], np.inf),
    ],
)
def test_infinite_values_must_be_the_same(want: list[float], got: list[float], relative: float):
    assert compare({"y": np.array(want, np.float32)}, {"y": np.array(got, np.float32)}).relative == relative
