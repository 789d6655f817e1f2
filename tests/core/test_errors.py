"""What every error of deploycc's can do."""

import pickle

import pytest

from deploycc import errors


def kinds(root=errors.DeployError):
    return [root, *(kind for child in root.__subclasses__() for kind in kinds(child))]


@pytest.mark.parametrize("kind", kinds())
def test_an_error_survives_the_way_to_another_process(kind):
    more = {"text": "a{b", "position": 2} if kind is errors.SpecError else {}
    error = kind("it broke", fix="mend it", **more)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.args, again.fix, again.exit_status) == (str(error), error.args, "mend it", kind.exit_status)
    assert vars(again) == vars(error)
