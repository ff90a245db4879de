"""Results as plots, all of one look, legible at the width of a page on GitHub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.tables import POLICY_WORDS, WAY_WORDS, profiled_calls

COLOURS = ("#2f7d32", "#c8553d", "#e0a030", "#5b6b8c", "#8b5fbf")
POLICY_COLOURS = dict(zip(POLICY_WORDS, COLOURS, strict=False))
LOOK = {
    "figure.facecolor": "white",
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "axes.edgecolor": "#888888",
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "lines.linewidth": 2.4,
    "lines.markersize": 7,
    "lines.marker": "o",
}
DPI = 130
WIDTH_INCHES = 9.2


def continuous(result: dict, path: Path) -> None:
    """Throughput, p50, p99 and time to the first step against the offered load."""
    figure, axes = _figure(2, 2, height=6.6)
    offered = [load["offered_per_second"] for load in result["loads"]]
    panels = (
        ("Images per second", lambda way: way["images_per_second"]),
        ("Half are done within (s)", lambda way: way["p50_ms"] / 1e3),
        ("99 % are done within (s)", lambda way: way["p99_ms"] / 1e3),
        ("First step after (s), median", lambda way: way["first_step"]["p50_ms"] / 1e3),
    )
    for axis, (title, value) in zip(axes.flat, panels, strict=True):
        for policy, words in POLICY_WORDS.items():
            values = [value(load[policy]) for load in result["loads"]]
            axis.plot(offered, values, color=POLICY_COLOURS[policy], label=words)
        axis.set(title=title, xlabel="requests per second", ylim=(0, None))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    _save(figure, path)


def perf_analyzer(result: dict, path: Path) -> None:
    """Latency against throughput, waits at Poisson rates, and rows per tick."""
    figure, axes = _figure(2, 2, height=6.6)
    styles = {"http": "-", "grpc": "--"}
    lines = dict(zip((50, 95, 99), COLOURS, strict=False))
    sweeps = [_of(result, protocol, "concurrency") for protocol in styles]
    poisson = [_of(result, protocol, "requests_per_second") for protocol in styles]
    for (protocol, style), sweep in zip(styles.items(), sweeps, strict=True):
        rates = [point["images_per_second"] for point in sweep]
        for percent, colour in lines.items():
            times = [point[f"p{percent}_ms"] / 1e3 for point in sweep]
            name = f"p{percent}" if protocol == "http" else None
            axes[0, 0].plot(rates, times, linestyle=style, color=colour, label=name)
        for point, rate in zip(sweep if protocol == "http" else [], rates, strict=False):
            axes[0, 0].annotate(
                point["concurrency"],
                (rate, point["p50_ms"] / 1e3),
                xytext=(4, -19),
                textcoords="offset points",
            )
        numbers = [str(point["concurrency"]) for point in sweep]
        axes[0, 1].plot(
            numbers, rates, linestyle=style, color=COLOURS[3], label=_protocol(protocol)
        )
        axes[1, 1].plot(
            numbers,
            [point.get("rows_per_tick") or 0 for point in sweep],
            linestyle=style,
            color=COLOURS[3],
        )
    for (_, style), points in zip(styles.items(), poisson, strict=True):
        for percent, colour in lines.items():
            axes[1, 0].plot(
                [point["images_per_second"] for point in points],
                [point[f"p{percent}_ms"] / 1e3 for point in points],
                linestyle=style,
                color=colour,
            )
    axes[0, 0].set(title="Latency (s), 1 to 16 at a time", xlabel="images per second")
    axes[0, 1].set(title="Images per second", xlabel="requests at a time")
    axes[1, 0].set(title="Latency (s), Poisson arrivals", xlabel="images per second")
    axes[1, 1].set(title="UNet rows per tick", xlabel="requests at a time")
    for axis in axes.flat:
        axis.set_ylim(0, None)
    axes[0, 0].margins(x=0.1)
    axes[0, 0].legend()
    axes[0, 1].legend()
    _save(figure, path)


def concurrency(result: dict, path: Path) -> None:
    """Throughput over that of one at a time."""
    figure, axes = _figure(1, 2, height=3.7)
    for (size, points), colour in zip(result["by_size"].items(), COLOURS, strict=False):
        numbers = list(points)
        over = [points[n]["times_one_at_a_time"] for n in numbers]
        slow = [points[n]["p99_ms"] / 1e3 for n in numbers]
        axes[0].plot(numbers, over, color=colour, label=size)
        axes[1].plot(numbers, slow, color=colour, label=size)
    axes[0].set(title="Throughput over one at a time", xlabel="requests at a time", ylim=(0, None))
    axes[1].set(title="99 % are done within (s)", xlabel="requests at a time", ylim=(0, None))
    axes[0].legend()
    _save(figure, path)


def remote_unet(result: dict, path: Path) -> None:
    """Seconds a picture over the delay, a panel for each number of steps."""
    numbers = sorted({row["steps"] for row in result["table"]})
    figure, axes = _figure(1, len(numbers), height=3.9, sharey=True)
    for axis, steps in zip(axes if len(numbers) > 1 else [axes], numbers, strict=True):
        for way, colour in zip(result["ways"], COLOURS, strict=False):
            rows = [r for r in result["table"] if r["way"] == way and r["steps"] == steps]
            delays = [row["delay_ms"] for row in rows]
            axis.plot(delays, [row["seconds"] for row in rows], color=colour, label=way)
        axis.set(title=f"{steps} steps: seconds a picture", xlabel="delay each way (ms)")
    axis.set_ylim(0, 1.05 * max(row["seconds"] for row in result["table"]))  # one scale for all
    axis.figure.axes[0].legend()
    _save(figure, path)


def transports(result: dict, path: Path) -> None:
    """Median milliseconds by way, one panel a size."""
    figure, axes = _figure(1, len(result["by_size"]), height=3.2, sharey=True)
    panels = axes if len(result["by_size"]) > 1 else [axes]
    for axis, (size, ways) in zip(panels, result["by_size"].items(), strict=True):
        names = [WAY_WORDS[way].replace("`", "") for way in ways]
        values = [ways[way]["p50_ms"] for way in ways]
        bars = axis.barh(names, values, color=COLOURS[3])
        axis.bar_label(bars, fmt="%.0f", padding=4)
        axis.set(title=f"{size}, median (ms)")
        axis.margins(x=0.15)
        axis.grid(axis="y", visible=False)
    panels[0].invert_yaxis()
    _save(figure, path)


def unet_profile(result: dict, path: Path) -> None:
    """Shares of a call by kind of kernel, a bar for each number of rows and for the decoder."""
    calls = profiled_calls(result)
    figure, axis = _figure(1, 1, height=1.4 + 0.6 * len(calls))
    kinds = list(dict.fromkeys(kind for m in calls.values() for kind in m["kinds"]))
    names = [f"{call}, {m['kernels_ms']:.1f} ms" for call, m in calls.items()]
    start = [0.0] * len(names)
    colours = [*COLOURS, "#9aa5b1", "#c9b38c", "#7aa6a1", "#444444"]
    for kind, colour in zip(kinds, colours, strict=False):
        shares = [m["kinds"].get(kind, {"percent": 0.0})["percent"] for m in calls.values()]
        bars = axis.barh(names, shares, left=start, color=colour, label=kind)
        labels = [f"{share:.0f}" if share >= 4 else "" for share in shares]
        axis.bar_label(bars, labels, label_type="center", color="white")
        start = [left + share for left, share in zip(start, shares, strict=True)]
    axis.set(title="Share of the GPU's time in a call (%)", xlim=(0, 100))
    axis.grid(axis="y", visible=False)
    axis.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3)
    _save(figure, path)


def _of(result: dict, protocol: str, kind: str) -> list[dict]:
    return [p for p in result["points"] if p["protocol"] == protocol and kind in p]


def _protocol(name: str) -> str:
    return {"http": "HTTP", "grpc": "gRPC"}[name]


def _figure(rows: int, columns: int, height: float, **options: Any) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(LOOK)
    return plt.subplots(
        rows, columns, figsize=(WIDTH_INCHES, height), layout="constrained", **options
    )


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=DPI)
    plt.close(figure)
