import numpy as np
import pytest

from deploycc.errors import SignatureError
from deploycc.runtime.signature import FeedsCheck, Signature, TensorSpec

SIGNATURE = Signature((TensorSpec("x", "float32", ("N", 3)), TensorSpec("k", "int64", ())), (TensorSpec("y", "float32", ("N", 2)),))


def feeds(**changes: np.ndarray) -> dict[str, np.ndarray]:
    return {"x": np.zeros((4, 3), np.float32), "k": np.array(1), **changes}


def test_feeds_that_fit_pass():
    SIGNATURE.check(feeds())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"x": np.zeros((4, 3), np.float32)}, "inputs are x, k; got x"),
        (feeds(z=np.zeros(1)), "got x, k, z"),
        ({}, "got none"),
        (feeds(x=np.zeros((4, 3))), "'x' is float32, but got float64"),
        (feeds(x=np.zeros((4, 5), np.float32)), r"shape \['N', 3\], but got \[4, 5\]"),
        (feeds(x=np.zeros(3, np.float32)), r"but got \[3\]"),
    ],
)
def test_feeds_that_do_not_fit_say_why(wrong: dict, said: str):
    with pytest.raises(SignatureError, match=said):
        SIGNATURE.check(wrong)


def test_samples_have_no_batch_axis():
    spec = TensorSpec("x", "float32", (1, 3, "W"))
    assert spec.accepts_sample((3, 7))
    assert not spec.accepts_sample((1, 3, 7))
    assert not TensorSpec("k", "int64", ()).accepts_sample(())


def test_json_round_trip_and_text():
    assert Signature.from_json(SIGNATURE.to_json()) == SIGNATURE
    assert str(SIGNATURE.inputs[0]) == "x: float32[N, 3]"


def test_feeds_are_checked_once_per_kind_and_again_when_they_change(monkeypatch):
    signature = Signature((TensorSpec("x", "float32", ("n", 4)),), ())
    asked = []
    whole = Signature.check
    monkeypatch.setattr(Signature, "check", lambda self, feeds: asked.append(next(iter(feeds.values())).shape) or whole(self, feeds))
    check = FeedsCheck(signature)
    for rows in (1, 1, 2, 2, 1):
        check({"x": np.zeros((rows, 4), np.float32)})
    assert asked == [(1, 4), (2, 4), (1, 4)]
    for wrong in ({"x": np.zeros((1, 4))}, {"x": np.zeros((1, 5), np.float32)}, {"y": np.zeros((1, 4), np.float32)}):
        with pytest.raises(SignatureError):
            check(wrong)
        with pytest.raises(SignatureError):
            check(wrong)  # what was refused is not taken for checked
