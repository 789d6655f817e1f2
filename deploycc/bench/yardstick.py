"""The float reference's answers, computed once and replayed for every attempt that is judged on the same samples."""

from __future__ import annotations

from deploycc.core.artifact import Artifact, Feeds, Outputs
from deploycc.core.contract import Session
from deploycc.core.registry import FORMS

KEPT_BYTES = 512 << 20  # answers beyond this are computed again each time


class Yardstick:
    """A session over the reference that remembers its answers by the order of the calls."""

    def __init__(self, reference: Artifact, threads: int) -> None:
        self.signature = reference.signature
        self._reference = reference
        self._threads = threads
        self._session: Session | None = None
        self._answers: list[Outputs] = []
        self._bytes = 0
        self._next = 0

    def rewound(self) -> Yardstick:
        """Itself, before its first call: the caller makes the same calls in the same order."""
        self._next = 0
        return self

    def run(self, feeds: Feeds) -> Outputs:
        """The answer to this call."""
        self._next += 1
        if self._next <= len(self._answers):
            return self._answers[self._next - 1]
        if self._session is None:
            self._session = FORMS.get(self._reference.form.value).open(self._reference, threads=self._threads)
        answer = self._session.run(feeds)
        if self._next == len(self._answers) + 1 and self._bytes < KEPT_BYTES:
            self._answers.append({name: array.copy() for name, array in answer.items()})
            self._bytes += sum(array.nbytes for array in answer.values())
        return answer

    def synchronize(self) -> None:
        """Nothing is pending."""

    def __enter__(self) -> Yardstick:
        return self

    def __exit__(self, *exc: object) -> None:
        return None
