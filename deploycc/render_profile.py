"""What a user sees of `inspect --profile`: peaks, the whole model, and its operators. Pure text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deploycc import manual
from deploycc.render import DASH, count, milliseconds, percent, size

if TYPE_CHECKING:
    from deploycc.bench.roofline import Peaks, Roof
    from deploycc.core.timing import OperatorTime
    from deploycc.profiling import Profile

SHOWN = 15
HEAD = ("MS", "OF TIME", "CALLS", "PRECISION", "MACS", "BYTES", "GMAC/S", "OF PEAK", "BOUND BY", "KERNEL", "NAME")


def profile(found: Profile, *, every: bool) -> str:
    """All of it; with `every`, each operator in the order in which they run, else those that take most of the time."""
    lines = ["", *_peaks(found.peaks), _whole(found)]
    if not found.operators:
        return "\n".join([*lines, found.measured_by])
    shown = list(found.operators) if every else sorted(found.operators, key=lambda pair: -pair[0].milliseconds)[:SHOWN]
    told = sum(item.milliseconds for item, _ in found.operators)
    lines += ["", f"{len(found.operators)} operators, {milliseconds(told)} ms by {found.measured_by}:"]
    lines.append(manual.table([HEAD, *(_row(item, reached, told) for item, reached in shown)], indent="  "))
    lines.append(f"outside of operators: {milliseconds(found.outside_ms)} ms of a call without a profiler")
    left = len(found.operators) - len(shown)
    return "\n".join([*lines, *([f"next: --kernels lists the other {left} too, in their order"] if left else [])])


def _peaks(peaks: Peaks) -> Sequence[str]:
    rates = ", ".join(f"{name} {found.macs / 1e9:.0f}" for name, found in peaks.peaks.items() if found.macs)
    sets = ", ".join(f"{rate / 1e9:.0f} GB/s over {size(extent)}" for extent, rate in peaks.bandwidth)
    threads = f"{peaks.threads} thread{'s' if peaks.threads > 1 else ''}"
    busy = ["  measured while other processes ran: the peaks may be higher, and the shares lower"] if peaks.busy else []
    return [f"peaks of this machine, {threads}: {rates} GMAC/s; {sets}", *busy]


def _whole(found: Profile) -> str:
    if found.whole is None:
        return f"a call takes {milliseconds(found.call_ms)} ms; its MACs are not known"
    whole = found.whole
    rate = DASH if whole.gmacs_per_second is None else f"{whole.gmacs_per_second:.0f}"
    kinds = ", ".join(f"{count(number)} in {name}" for name, number in whole.macs.items())
    return f"a call takes {milliseconds(found.call_ms)} ms: {kinds} MACs, {rate} GMAC/s, {percent(whole.compute_share)} of the peak"


def _row(item: OperatorTime, reached: Roof, all_ms: float) -> tuple[str, ...]:
    rate = reached.gmacs_per_second
    return (
        f"{item.milliseconds:.4f}",
        percent(item.milliseconds / all_ms) if all_ms else DASH,
        f"{item.calls:g}",
        item.precision,
        count(item.macs),
        DASH if item.bytes is None else size(item.bytes),
        DASH if rate is None else f"{rate:.1f}",
        percent(reached.share, 0),
        reached.bound or DASH,
        item.operator,
        item.name,
    )
