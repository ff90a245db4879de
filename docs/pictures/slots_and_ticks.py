"""Draws slots_and_ticks.png: five requests on their way through the loop's slots.

python docs/pictures/slots_and_ticks.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

INK = "#333333"
# Request: words, colour, slot, UNet rows of a step, first tick, steps, what happens after the last.
REQUESTS = (
    ("A", "euler, 6 steps", "#2f7d32", 0, 2, 1, 6, "done: to the VAE"),
    ("B", "dpmpp_2m, 7 steps", "#5b6b8c", 1, 2, 3, 7, "done"),
    ("C", "cfg 1, 20 steps", "#e0a030", 2, 1, 1, 3, ""),
    ("D", "lcm, cfg 1, 4 steps", "#c8553d", 2, 1, 5, 4, "done"),
)
TICKS = 10
SLOTS = 3


def main() -> None:
    plt.rcParams.update({"font.size": 12, "font.family": "DejaVu Sans"})
    figure, axis = plt.subplots(figsize=(9.2, 4.0), layout="constrained")
    for slot in range(SLOTS):
        for tick in range(1, TICKS + 1):
            _box(axis, tick, slot, "#f1f1f1", 0.86)
        axis.text(0.35, slot, f"slot {slot}", ha="right", va="center", color=INK)
    rows = [0] * (TICKS + 1)
    for name, words, colour, slot, per_step, first, steps, end in REQUESTS:
        for step in range(steps):
            _box(axis, first + step, slot, colour, 0.86)
            label = f"{name}{step + 1}"
            axis.text(
                first + step, slot, label, ha="center", va="center", color="white", weight="bold"
            )
            rows[first + step] += per_step
        axis.text(first - 0.42, slot - 0.56, f"{name}: {words}", color=colour, fontsize=10.5)
        if end and first + steps <= TICKS:
            axis.text(first + steps - 0.38, slot, end, va="center", color=INK, fontsize=10.5)
    axis.text(4, 2, "cancelled", ha="center", va="center", color=INK, fontsize=9.5)
    axis.annotate(
        "B arrives and joins at once",
        (2.56, 0.9),
        (2.45, 0.55),
        ha="right",
        color=INK,
        fontsize=10.5,
        arrowprops={"arrowstyle": "->", "color": INK},
    )
    for tick in range(1, TICKS + 1):
        axis.text(tick, -0.95, str(tick), ha="center", color=INK)
        axis.text(tick, 2.85, str(rows[tick]), ha="center", color=INK, weight="bold")
    axis.text(0.35, -0.95, "tick", ha="right", color=INK)
    axis.text(0.35, 2.85, "UNet rows", ha="right", color=INK, weight="bold")
    axis.set(xlim=(-0.75, TICKS + 0.6), ylim=(3.05, -1.2))
    axis.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


def _box(axis, tick: float, slot: float, colour: str, width: float) -> None:
    axis.add_patch(
        FancyBboxPatch(
            (tick - width / 2, slot - 0.3),
            width,
            0.6,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=colour,
            edgecolor="none",
        )
    )


if __name__ == "__main__":
    main()
