"""The figures of the README: one line for each result that there is."""

from __future__ import annotations

from collections.abc import Callable

from bench.tables import GPU_RATIOS, RIVAL_WORDS, table

OPEN, CLOSE = "<!-- figures: python -m bench.report -->", "<!-- end of figures -->"


def page(documents: dict[str, dict], readme: str) -> str:
    """The README with its table of figures made anew, between its two marks."""
    before, _, rest = readme.partition(OPEN)
    _, _, after = rest.partition(CLOSE)
    if not after:
        raise ValueError(f"the README lacks {OPEN} or {CLOSE}")
    return f"{before}{OPEN}\n{headlines(documents)}\n{CLOSE}{after}"


def headlines(documents: dict[str, dict]) -> str:
    """A table: what, figure, command.

    A result of any other benchmark joins it with `"headline": {"what": …, "figure": …}`.
    """
    rows = []
    for name, lines in HEADLINES.items():
        if name in documents:
            rows += [
                [what, figure, f"`{_command(documents[name])}`"]
                for what, figure in lines(documents[name]["result"])
            ]
    for name, document in documents.items():
        if name in GPU_WORDS and set(document["result"]) >= GPU_RATIOS:
            rows += [
                [what, figure, f"`{document['command']}`"]
                for what, figure in _gpu(name, document["result"])
            ]
        told = document["result"].get("headline")
        if told:
            rows.append([told["what"], told["figure"], f"`{_command(document)}`"])
    return table(["what", "figure", "command"], rows)


def _command(document: dict) -> str:
    return document["command"].partition(" --")[0]


def _continuous(result: dict) -> list[tuple[str, str]]:
    load = result["loads"][-1]
    over = result["continuous_over_at_the_highest_load"]
    ours, static = load["continuous"], load["static"]
    first, late = (way["first_step"]["p50_ms"] / 1e3 for way in (ours, static))
    return [
        (
            f"requests of mixed sizes and steps, {load['offered_per_second']:.1f} a second:"
            " continuous against static batches of the same size",
            f"{over['static']['images_per_second']:.2f} × the pictures a second;"
            f" p99 {ours['p99_ms'] / 1e3:.1f} s against {static['p99_ms'] / 1e3:.1f} s;"
            f" first step after {first:.2g} s against {late:.2g} s",
        ),
        (
            "the same against one at a time",
            f"{over['one_at_a_time']['images_per_second']:.2f} × the pictures a second;"
            f" p99 {ours['p99_ms'] / 1e3:.1f} s against"
            f" {load['one_at_a_time']['p99_ms'] / 1e3:.1f} s",
        ),
    ]


def _perf_analyzer(result: dict) -> list[tuple[str, str]]:
    by_load = {
        p["concurrency"]: p
        for p in result["points"]
        if p["protocol"] == "http" and "concurrency" in p
    }
    most, one = by_load[max(by_load)], by_load[min(by_load)]
    return [
        (
            f"perf_analyzer over HTTP, {result['request'].partition(';')[0]},"
            f" {max(by_load)} at a time against {min(by_load)}",
            f"{most['images_per_second']:.2f} against {one['images_per_second']:.2f} pictures a"
            f" second, {most['rows_per_tick']:.1f} UNet rows a tick; agrees with this project's own"
            f" load generator: {result['agreement']['perf_analyzer_over_own']:.2f}",
        )
    ]


def _concurrency(result: dict) -> list[tuple[str, str]]:
    lines = []
    for size, points in result["by_size"].items():
        number = max(points, key=int)
        most, one = points[number], points["1"]
        lines.append(
            (
                f"{number} requests at a time against one, {size}",
                f"{most['times_one_at_a_time']:.2f} × the pictures a second"
                f" (p50 {most['p50_ms'] / 1e3:.1f} s, one at a time {one['p50_ms'] / 1e3:.2f} s)",
            )
        )
    return lines


def _overhead(result: dict) -> list[tuple[str, str]]:
    return [
        (
            "one picture over HTTP, against the same loop without Triton",
            f"{result['http_over_in_process']:.2f} × the time",
        )
    ]


def _diffusers(result: dict) -> list[tuple[str, str]]:
    return [
        (
            "one picture over HTTP, against diffusers' own pipeline",
            f"{result['over_http_over_diffusers']:.2f} × the time"
            f" ({result['over_http']['p50_ms'] / 1e3:.2f} s)",
        )
    ]


GPU_WORDS = {
    "gpu_sd1": "SD1.5's architecture",
    "gpu_sdxl": "SDXL's architecture",
    "gpu_sd1_served": "SD1.5's architecture, served again with norms in the order of memory",
    "gpu_sdxl_served": "SDXL's architecture, served again with norms in the order of memory",
    "gpu": "a checkpoint",
}


def _gpu(name: str, result: dict) -> list[tuple[str, str]]:
    one, together = result["loop"]["one_at_a_time"], result["loop"]["together"]
    lines = [
        (
            f"{GPU_WORDS[name]} on one {result['device']}:"
            f" {result['request']}, {together['concurrency']} at a time",
            f"{together['images_per_second']:.2f} pictures a second,"
            f" {result['together_over_one']:.2f} × one at a time, which take"
            f" {one['p50_ms']:.0f} ms each; the loop takes {result['loop_over_bare_unet']:.2f} ×"
            " the time of its UNet calls alone",
        )
    ]
    measured = {n: r["p50_ms"] for n, r in result.get("rivals", {}).items() if "p50_ms" in r}
    if measured:
        figures = [
            f"{one['p50_ms'] / p50:.2f} × the time of {RIVAL_WORDS.get(name, name)} ({p50:.0f} ms)"
            for name, p50 in measured.items()
        ]
        lines.append(("the same, one picture over HTTP", "; ".join(figures)))
    return lines


def _unet_apart(result: dict) -> list[tuple[str, str]]:
    return [
        (
            "the UNet as a Triton model of its own, against in the loop's process",
            f"{result['call_ms_per_tick']:.1f} ms more a step",
        )
    ]


def _startup(result: dict) -> list[tuple[str, str]]:
    return [
        (
            "from an empty folder to a ready server; memory after one picture",
            f"{result['assemble_and_start_seconds']:.0f} s;"
            f" {result['proportional_set_size_mb'] / 1e3:.1f} GB",
        )
    ]


def _soak(result: dict) -> list[tuple[str, str]]:
    return [
        (
            f"{result['requests']:,} requests, each with a prompt of its own",
            f"{result['answered_with_own_seed']:,} answered with their own seed,"
            f" {result['right_colours_percent']} % right in colours;"
            f" memory {result['growth_percent']:+.1f} % after the first 200",
        )
    ]


def _quality(result: dict) -> list[tuple[str, str]]:
    right = result["percent_right"]["all"]
    return [
        (
            f"{right['captions']} unseen captions",
            f"colour {right['colour']:.0f} %, background {right['background']:.0f} %,"
            f" shape {right['shape']:.0f} %",
        )
    ]


HEADLINES: dict[str, Callable[[dict], list[tuple[str, str]]]] = {
    "continuous": _continuous,
    "perf_analyzer": _perf_analyzer,
    "concurrency": _concurrency,
    "overhead": _overhead,
    "diffusers_pipeline": _diffusers,
    "unet_apart": _unet_apart,
    "startup": _startup,
    "soak": _soak,
    "demo_quality": _quality,
}
