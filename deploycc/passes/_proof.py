"""Running two artifacts side by side on made-up input: what a pass can check by itself, before real data do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.artifact import Artifact, Drift, Feeds, Outputs
from deploycc.core.compare import drift
from deploycc.core.registry import FORMS
from deploycc.core.rounding import allowance
from deploycc.errors import DeployError, PostconditionError
from deploycc.forms.module import example_feeds

if TYPE_CHECKING:
    from deploycc.core.contract import Session

THREADS = 1


def prove_close(name: str, before: Artifact, after: Artifact, tolerance: float, feeds: tuple[Feeds, Feeds] | None = None) -> None:
    """Raise PostconditionError when the pass `name` moved the outputs by more than `tolerance` of the largest one (`core.rounding`).

    `feeds` are those of `before` and of `after` where the pass changed the input; random ones for both otherwise. Where `before`
    itself does not run on the made-up input (a named axis may not take the size 2) there is nothing to compare with.
    """
    given, same = feeds or (example_feeds(before.signature),) * 2
    with open_session(before) as session:
        try:
            want = session.run(given)
        except Exception:  # noqa: BLE001  the input is made up: that a model refuses it says nothing about the pass
            return
        with open_session(after) as other:
            found = compare(want, other.run(same))
        if found.relative <= tolerance or found.relative <= (allowed := allowance(tolerance, session.run, [given], [want])):
            return
        raise PostconditionError(
            f"{name} moved the outputs by {found.relative:.3g} of the largest one (allowed {allowed:g}) on random input",
            fix=f'leave it out with --passes="-{name}", and report the model: this is a fault in the pass',
        )


def open_session(artifact: Artifact) -> Session:
    """Run an artifact in its own framework."""
    return FORMS.get(artifact.form.value).open(artifact, threads=THREADS)


def compare(want: Outputs, got: Outputs) -> Drift:
    """Drift of the finite part; values that are NaN or infinite must be the same on both sides, else the drift is infinite."""
    same = {name: np.isfinite(value) if value.dtype.kind == "f" else np.ones(value.shape, bool) for name, value in want.items()}
    for name, finite in same.items():
        if got[name].shape != finite.shape:
            return Drift(-np.inf, np.inf, np.inf, None, 1)
        if not np.array_equal(want[name][~finite], got[name][~finite], equal_nan=want[name].dtype.kind == "f"):
            return Drift(-np.inf, np.inf, np.inf, None, 1)
    return drift([{name: value[same[name]] for name, value in want.items()}], [{name: value[same[name]] for name, value in got.items()}])


def try_run(session: Session, feeds: Feeds) -> Outputs | str:
    """The outputs, or the first line of why it does not run."""
    try:
        return session.run(feeds)
    except DeployError as error:
        return error.what
    except Exception as error:  # noqa: BLE001  runtimes raise unrelated classes; the message is what is wanted
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
