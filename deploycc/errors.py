"""Every error deploycc raises on purpose: what went wrong and where, and how to fix it.

`DeployError` is the one root. This module imports nothing, so that the device's runner can carry it.
"""


class DeployError(Exception):
    """Something the user can act on.

    Attributes:
        what: what happened and where, naming both values when two disagree.
        fix: what to do about it.
        exit_status: what the command line returns (1 = the run failed, 2 = wrong usage).
    """

    exit_status = 1

    def __init__(self, what: str, *, fix: str) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def __reduce__(self) -> tuple[object, ...]:
        """Errors go from process to process, as from a pool that compiles several models."""
        return _again, (type(self), self.args, vars(self))

    def __str__(self) -> str:
        return f"{self.what}\n  fix: {self.fix}"


def _again(kind: type[DeployError], args: tuple[object, ...], state: dict[str, object]) -> DeployError:
    error = kind.__new__(kind, *args)
    vars(error).update(state)
    return error


class UsageError(DeployError):
    """An option or a name that cannot be honoured."""

    exit_status = 2


class SpecError(UsageError):
    """A pipeline text that does not parse; shows the text with a caret under the position."""

    def __init__(self, what: str, *, fix: str, text: str, position: int) -> None:
        super().__init__(f"{what}\n    {text}\n    {' ' * position}^", fix=fix)
        self.text = text
        self.position = position


class UnknownName(UsageError):
    """A target, pass, backend, source or option that does not exist; suggests the nearest one."""


class TargetError(UsageError):
    """A target file that is malformed, incomplete or describes impossible hardware."""


class SourceError(DeployError):
    """A model that cannot be read or captured."""


class SignatureError(DeployError):
    """Feeds that do not fit the model's inputs."""


class DataError(DeployError):
    """Data that cannot be read or does not fit the model."""


class DataNeeded(DataError):
    """A step needs data that was not given."""


class PassError(DeployError):
    """A pass failed."""


class NothingToDo(PassError):
    """A pass found nothing it could change: an error when it was asked for, a note when the target brought it."""


class PreconditionError(PassError):
    """An artifact that the pass cannot take."""


class PostconditionError(PassError):
    """A pass broke its own promise: a fault in the pass, not in the input."""


class DriftError(PassError):
    """A pass changed the numbers more than it declares."""


class TrainingError(PassError):
    """A training that cannot go on: a loss that is not a number, memory that does not hold a batch."""


class UnsupportedError(DeployError):
    """A model holds something that the runtime cannot run."""


class MissingDependency(DeployError):
    """An optional package that is not installed."""


class BuildError(DeployError):
    """A program that a compiler refuses to build."""


class StoreError(DeployError):
    """A folder that cannot be written, or a full disk."""


class BundleError(DeployError):
    """A bundle that is damaged, unsafe or unknown."""


class MismatchError(BundleError):
    """A bundle that was built for other hardware or another runtime than this one."""


class BenchError(DeployError):
    """A measurement that cannot be taken, or results that cannot be compared."""


class DeviceError(DeployError):
    """A device that cannot be reached, or on which a bundle cannot be run."""


class ConnectionLost(DeviceError):
    """The connection to a device ended while something ran there."""


class DeviceTimeout(DeviceError):
    """A device that did not answer in time."""


class EmulationError(DeployError):
    """An emulated device that does not start, or on which a program ends by a signal or in the wrong way."""


class Interrupted(DeployError):
    """The user stopped the run; says what was kept."""

    exit_status = 130
