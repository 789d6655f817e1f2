"""Layer by layer: how far from float, how much of the noise comes in there, and what the layer costs.

The strip shows all layers from input to output, as wide as they are dear and as strong as they are far from float. Below it, those that
matter most: by the noise that comes in there, or by their cost.
"""

from __future__ import annotations

from typing import NamedTuple

from deploycc.package.report.drawing import HEAT, ON_HEAT, SMALL, WIDTH, Canvas, Plot, Table
from deploycc.package.report.subject import Subject
from deploycc.package.report.units import decibels, human_count, percent, shortened

SECTION, ORDER = "precision", 0
ROWS, ROW, EDGE, TOP = 24, 18, 4, 64
STRIP = 26
NAME, NAME_WIDTH = 27, 170
STEPS_DB = (45.0, 35.0, 30.0, 25.0, 20.0)  # below each the colour is one step stronger
SHARES = (0.02, 0.1, 0.25, 0.5, 0.75)  # of the largest: from each on it is one step stronger
HEAD = ("SQNR", "noise in", "cost")


class Layer(NamedTuple):
    """One layer; `cost` is its share."""

    name: str
    operator: str
    sqnr_db: float
    added: float
    cost: float
    macs: int | None
    ms: float | None
    integer: bool


def draw(subject: Subject) -> list[Plot]:
    """One figure, where the bundle has layers."""
    if subject.manifest is None or subject.manifest.shipped.layers is None:
        return []
    record, times = subject.manifest.shipped.layers, subject.manifest.measured.layer_ms
    costs = [times.get(item.tensor, 0.0) if times else float(item.macs or 0) for item in record.layers]
    total = sum(costs) or 1.0
    layers = [
        Layer(item.tensor, item.operator, item.sqnr_db, item.added, cost / total, item.macs, times.get(item.tensor), item.integer)
        for item, cost in zip(record.layers, costs, strict=True)
        if cost or item.added
    ]
    if not layers:
        return []
    shown = chosen(layers)
    canvas = Canvas(TOP + ROW * len(shown) + 4)
    _strip(canvas, layers)
    _heat(canvas, shown, layers)
    name, title = f"{subject.key}layers", "Layers: distance from float and cost"
    worst = max(layers, key=lambda layer: layer.added)
    unit = "of the measured time" if times else "of the multiply-accumulates"
    told = (
        f"{len(layers)} layers; most noise comes in at {worst.operator} ({percent(worst.added)}), which costs {percent(worst.cost)} {unit}."
    )
    caption = (
        f"Strip: every layer from input to output, its width the share {unit}, the stronger the further from float. "
        f"Below: the {len(shown)} that matter most. SQNR on {record.samples} samples in {record.kernels}'s kernels; "
        f"noise in: what comes in there, over the tensor's energy."
    )
    return [Plot(name, title, told, canvas.svg(name, title, told), _table(layers), caption)]


def chosen(layers: list[Layer]) -> list[Layer]:
    """At most `ROWS`, in the graph's order: those with most noise or most cost, relative to the largest."""
    noise, cost = (max(values) or 1.0 for values in ([layer.added for layer in layers], [layer.cost for layer in layers]))
    ranked = sorted(range(len(layers)), key=lambda index: -max(layers[index].added / noise, layers[index].cost / cost))
    return [layers[index] for index in sorted(ranked[:ROWS])]


def _strip(canvas: Canvas, layers: list[Layer]) -> None:
    width = WIDTH - 2 * EDGE
    floor = 0.2 / len(layers)  # that a layer without cost can be seen
    total = sum(max(layer.cost, floor) for layer in layers)
    left = float(EDGE)
    boxes: list[list[tuple[float, float, float, float]]] = [[] for _ in HEAT]
    for layer in layers:
        wide = width * max(layer.cost, floor) / total
        boxes[_decibel_level(layer.sqnr_db)].append((left, 4, max(wide - 0.6, 0.4), STRIP))
        left += wide
    for level, same in enumerate(boxes):
        canvas.boxes(same, f"heat{level}")
    canvas.text(EDGE, STRIP + 16, "input", role="soft", fontsize=SMALL)
    canvas.text(WIDTH - EDGE, STRIP + 16, "output", role="soft", fontsize=SMALL, ha="right")
    swatch = WIDTH / 2 - 3 * 16 + 8
    canvas.text(swatch - 6, STRIP + 16, f"≥ {STEPS_DB[0]:.0f} dB", role="soft", fontsize=SMALL, ha="right")
    for level in range(len(HEAT)):
        canvas.box(swatch + level * 16, STRIP + 8, 15, 9, f"heat{level}")
    canvas.text(swatch + 6 * 16 + 5, STRIP + 16, f"< {STEPS_DB[-1]:.0f} dB", role="soft", fontsize=SMALL)


def _heat(canvas: Canvas, shown: list[Layer], layers: list[Layer]) -> None:
    noise, cost = max(layer.added for layer in layers), max(layer.cost for layer in layers)
    wide = (WIDTH - EDGE - NAME_WIDTH) / len(HEAD)
    for column, head in enumerate(HEAD):
        canvas.text(NAME_WIDTH + (column + 0.5) * wide, TOP - 6, head, role="soft", ha="center", fontsize=SMALL)
    boxes: list[list[tuple[float, float, float, float]]] = [[] for _ in HEAT]
    for index, layer in enumerate(shown):
        top = TOP + index * ROW
        canvas.text(EDGE, top + 12.5, shortened(layer.operator.partition(" (")[0], NAME), fontsize=SMALL)
        cells = (
            (_decibel_level(layer.sqnr_db), decibels(layer.sqnr_db)),
            (_share_level(layer.added, noise), f"{100 * layer.added:.2f} %"),
            (_share_level(layer.cost, cost), percent(layer.cost)),
        )
        for column, (level, text) in enumerate(cells):
            left = NAME_WIDTH + column * wide
            boxes[level].append((left, top, wide - 1, ROW - 1))
            canvas.text(left + wide / 2, top + 12.5, text, role=ON_HEAT[level], ha="center", fontsize=SMALL)
    for level, same in enumerate(boxes):
        canvas.boxes(same, f"heat{level}")


def _decibel_level(value: float) -> int:
    return sum(value < step for step in STEPS_DB)


def _share_level(value: float, largest: float) -> int:
    return sum(value >= share * largest for share in SHARES) if largest else 0


def _table(layers: list[Layer]) -> Table:
    head = ("Layer", "Made by", "In", "SQNR", "Noise in", "Cost", "MACs", "ms")
    rows = tuple(
        (
            layer.name,
            layer.operator,
            "int8" if layer.integer else "float",
            decibels(layer.sqnr_db),
            f"{100 * layer.added:.3f} %",
            percent(layer.cost),
            "–" if layer.macs is None else human_count(layer.macs),
            "–" if layer.ms is None else f"{layer.ms:.3f}",
        )
        for layer in layers
    )
    return Table(head, rows)
