"""Results as Markdown tables."""

from __future__ import annotations

from typing import Any

RIVAL_WORDS = {
    "diffusers": "diffusers' pipeline",
    "diffusers_compiled": "diffusers' pipeline, compiled",
    "comfyui": "ComfyUI's KSampler and VAEDecode",
}
POLICY_WORDS = {
    "continuous": "continuous",
    "static": "static batches",
    "early_exit": "static, early exit",
    "one_at_a_time": "one at a time",
}
WAY_WORDS = {
    "generate_json_png": "`/generate`, JSON, png",
    "http_png": "`/infer`, HTTP, png",
    "http_raw": "`/infer`, HTTP, raw",
    "grpc_raw": "gRPC, raw",
    "grpc_shared_memory_raw": "gRPC, raw in shared memory",
    "in_loop": "in the loop",
    "over_bls": "over BLS",
}


def table(columns: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; numbers are shortened, `None` is a dash."""
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plain(result: dict, level: int = 0) -> str:
    """Tables of any result: groups of equal records become one table, the rest is listed."""
    single = {key: value for key, value in result.items() if not isinstance(value, dict | list)}
    parts = []
    if single:
        parts.append(table(["", ""], [[_words(key), value] for key, value in single.items()]))
    records = {
        key: value
        for key, value in result.items()
        if isinstance(value, dict) and value and not _is_nested(value)
    }
    if records:
        columns = list(dict.fromkeys(name for record in records.values() for name in record))
        rows = [[_words(key), *(r.get(c) for c in columns)] for key, r in records.items()]
        parts.append(table(["", *map(_words, columns)], rows))
    for key, value in result.items():
        if key in single or key in records:
            continue
        if isinstance(value, dict) and value:
            parts.append(f"{_words(key)}:\n\n{plain(value, level + 1)}")
        elif value and all(isinstance(entry, dict) for entry in value):
            parts.append(f"{_words(key)}:\n\n{_records(value)}")
        elif value:
            parts.append(f"{_words(key)}: {', '.join(map(_cell, value))}")
    return "\n\n".join(parts)


def remote_unet(result: dict) -> str:
    """One request against one per step, by steps and delay."""
    columns = ["steps", "delay each way", "way", "seconds", "against one request", "round trips"]
    rows = [
        [
            row["steps"],
            f"{row['delay_ms']} ms",
            row["way"],
            f"{row['seconds']:.2f}",
            f"{row['times_one_request']:.2f} ×",
            row["round_trips"],
            f"{row['sent_bytes'] / 1e3:.0f} kB",
            f"{row['received_bytes'] / 1e3:.0f} kB",
        ]
        for row in result["table"]
    ]
    return table([*columns, "sent", "received"], rows)


def continuous(result: dict) -> str:
    """Throughput and waits of each policy at each load."""
    rows = [
        [
            f"{load['offered_per_second']:.1f}",
            POLICY_WORDS[policy],
            load[policy]["images_per_second"],
            load[policy]["p50_ms"] / 1e3,
            load[policy]["p99_ms"] / 1e3,
            load[policy]["first_step"]["p50_ms"] / 1e3,
            load[policy]["first_step"]["p99_ms"] / 1e3,
        ]
        for load in result["loads"]
        for policy in POLICY_WORDS
    ]
    columns = ["requests/s", "way", "images/s", "p50 s", "p99 s"]
    columns += ["first step p50 s", "first step p99 s"]
    at_once = result["images_per_second_all_at_once"]
    rest = [[POLICY_WORDS[policy], rate] for policy, rate in at_once.items()]
    return "\n\n".join(
        [
            f"{result['trace']}; at most {result['largest_batch']} pictures of the largest size in"
            " a batch.",
            table(columns, rows),
            "All requests at once:",
            table(["way", "images/s"], rest),
        ]
    )


def perf_analyzer(result: dict) -> str:
    """The sweep, one request repeated, and the agreement with the own load generator."""
    columns = ["protocol", "load", "images/s", "p50 ms", "p90 ms", "p95 ms", "p99 ms"]
    columns += ["rows per tick", "text cache hits", "requests"]
    rows = [_point(point) for point in result["points"]]
    repeated = _point(result["one_request_repeated"])
    repeated[1] += ", one request repeated"
    agreement = result["agreement"]
    return "\n\n".join(
        [
            f"{result['request']}.",
            table(columns, [*rows, repeated]),
            "A Poisson rate is what was asked of perf_analyzer; it always draws the same gaps, and"
            " the first of them are longer than average. Dashed in the plot: gRPC.",
            f"At concurrency {agreement['concurrency']} perf_analyzer measured"
            f" {agreement['perf_analyzer_images_per_second']:.2f} images/s and this project's own"
            f" load generator {agreement['own_images_per_second']:.2f}, in turns: a ratio of"
            f" {agreement['perf_analyzer_over_own']:.2f}. (perf_analyzer's report, which counts"
            f" whole seconds: {agreement['reported_over_own']:.2f}.)",
        ]
    )


def concurrency(result: dict) -> str:
    """Throughput and waits by size and concurrency."""
    rows = [
        [
            size,
            number,
            point["images_per_second"],
            f"{point['times_one_at_a_time']:.2f} ×",
            point["p50_ms"] / 1e3,
            point["p99_ms"] / 1e3,
        ]
        for size, points in result["by_size"].items()
        for number, point in points.items()
    ]
    columns = ["size", "at a time", "images/s", "over one at a time", "p50 s", "p99 s"]
    return f"{result['request']}.\n\n{table(columns, rows)}"


def unet_apart(result: dict) -> str:
    """Both ways at each concurrency."""
    rows = [
        [number, WAY_WORDS[way], p["images_per_second"], p["tick_ms"], p["p50_ms"], p["p99_ms"]]
        for number, ways in result["by_concurrency"].items()
        for way, p in ways.items()
    ]
    columns = ["at a time", "UNet", "images/s", "ms per tick", "p50 ms", "p99 ms"]
    return f"{result['request']}.\n\n{table(columns, rows)}"


def transports(result: dict) -> str:
    """Milliseconds by way and size."""
    rows = [
        [size, WAY_WORDS[way], p["p50_ms"], p["p99_ms"], f"{p['over_http_raw']:.2f} ×"]
        for size, ways in result["by_size"].items()
        for way, p in ways.items()
    ]
    columns = ["size", "way", "p50 ms", "p99 ms", "over HTTP, raw"]
    return f"{result['request']}.\n\n{table(columns, rows)}"


GPU_RATIOS = {"together_over_one", "loop_over_bare_unet"}  # a run of some phases lacks them


def gpu(result: dict) -> str:
    """One checkpoint on a GPU: served in both ways, the bare UNet, and the rivals that were run."""
    if not set(result) >= GPU_RATIOS:
        return plain(result)
    networks, cached = result["networks"], result.get("cached", {})
    ways = {
        "one at a time": result["loop"].get("one_at_a_time"),
        "together": result["loop"].get("together"),
        f"one at a time, step_cache {cached.get('step_cache')}": cached.get("one_at_a_time"),
        f"together, step_cache {cached.get('step_cache')}": cached.get("together"),
        "one at a time, UNet over BLS": result.get("bls", {}).get("one_at_a_time"),
    }
    rows = [
        [
            f"{words}, {way['concurrency']} at a time" if "concurrency" in way else words,
            way.get("images_per_second", 1e3 / way["p50_ms"]),
            way["p50_ms"],
            way["p99_ms"],
            way.get("stages_ms", {}).get("loop"),
            way.get("stages_ms", {}).get("vae_decode"),
            way.get("mean_batch_rows"),
        ]
        for words, way in ways.items()
        if way
    ]
    columns = ["", "images/s", "p50 ms", "p99 ms", "loop ms", "VAE ms", "UNet rows"]
    bare = [[rows_, point["ms"]] for rows_, point in networks["bare_unet"].items()]
    bare += [
        [f"{rows_}, shallow", point["ms"]]
        for rows_, point in networks.get("bare_shallow_unet", {}).items()
    ]
    starts = [
        [_words(where), result[where]["assemble_s"], result[where]["ready_s"]]
        for where in ("loop", "bls")
        if "ready_s" in result.get(where, {})
    ]
    parts = [
        f"{result['request']}. The loop takes {result['loop_over_bare_unet']:.2f} × the time of"
        f" its UNet calls alone; together {result['together_over_one']:.2f} × the pictures a"
        " second.",
        table(columns, rows),
        table(["UNet rows", "bare UNet ms"], bare),
        table(["UNet", "assembling s", "ready after s"], starts),
        table(["relative error against fp32", ""], list(networks["relative_error"].items())),
    ]
    if "left_out" in result:
        parts.append(f"Left out: {result['left_out']}.")
    if result.get("rivals"):
        parts.append(_rivals(result["loop"]["one_at_a_time"], result["rivals"]))
    return "\n\n".join(parts)


def _rivals(one: dict, rivals: dict[str, dict]) -> str:
    """Rivals' times of one picture, and the time of one over HTTP in terms of each."""
    rows = [["one over HTTP, one at a time", one["p50_ms"], one["p99_ms"], None]]
    failed = []
    for name, rival in rivals.items():
        words = RIVAL_WORDS.get(name, _words(name))
        if "error" in rival:
            failed.append(f"{words}: not measured ({' '.join(rival['error'].split())}).")
            continue
        over = f"{one['p50_ms'] / rival['p50_ms']:.2f} ×"
        rows.append([words, rival["p50_ms"], rival["p99_ms"], over])
        for part in ("ksampler", "vae_decode"):
            if part in rival:
                times = [rival[part][f"p{n}_ms"] for n in (50, 99)]
                rows.append([f"… of that, {_words(part)}", *times, None])
    columns = ["one picture", "p50 ms", "p99 ms", "ours over it"]
    return "\n\n".join([table(columns, rows), *failed])


def unet_profile(result: dict) -> str:
    """Milliseconds of each call by kind of kernel, and the longest kernels of the largest."""
    calls = profiled_calls(result)
    kinds = dict.fromkeys(kind for measured in calls.values() for kind in measured["kinds"])
    rows = [
        [kind]
        + [
            f"{found['ms']:.2f} ({found['percent']:.0f} %)" if found else None
            for found in (measured["kinds"].get(kind) for measured in calls.values())
        ]
        for kind in kinds
    ]
    rows.append(["all kernels", *(f"{measured['kernels_ms']:.2f}" for measured in calls.values())])
    most = list(result["by_rows"])[-1]
    longest = [
        [k["ms"], k["calls"], f"`{k['kernel']}`"] for k in result["by_rows"][most]["longest"][:10]
    ]
    parts = [
        f"{result['network']}, on {result['device']}.",
        table(["kind of kernel", *(f"{call}, ms" for call in calls)], rows),
        f"The longest of {most} rows:",
        table(["ms", "calls", "kernel"], longest),
    ]
    if "note" in result:
        parts.insert(1, f"{result['note']}.")
    return "\n\n".join(parts)


def profiled_calls(result: dict) -> dict[str, dict]:
    """What `unet_profile` took apart, by what to call it: UNet calls, and the decoder's."""
    calls = {f"{count} rows": measured for count, measured in result["by_rows"].items()}
    if "decoder" in result:
        calls["decoder"] = result["decoder"]
    return calls


def advance(result: dict) -> str:
    """Milliseconds by latent size and slots."""
    measured = {(r["latent"], r["slots"]): r for r in result["advance"]}
    slots = sorted({number for _, number in measured})
    rows = [
        [f"{size}x{size}", measured[size, 1]["operations"]]
        + [measured[size, number]["ms"] for number in slots]
        for size in sorted({size for size, _ in measured})
    ]
    tables_ms = result["table_of_20_steps_ms"]
    slowest = max(tables_ms, key=tables_ms.__getitem__)
    columns = ["latent", "operations", *(f"{number} slots, ms" for number in slots)]
    return (
        f"{table(columns, rows)}\n\nA table of 20 steps takes {min(tables_ms.values()):.1f} ms to"
        f" make, the slowest ({slowest}) {tables_ms[slowest]:.1f} ms; it is made once."
    )


def step_cache(result: dict) -> str:
    """Distance and time by steps and value, and the sheet of pictures."""
    fewer = ("steps", "mean_abs_difference", "psnr_db_median", "percent_right")
    rows = [
        [
            steps,
            value,
            point["unet_time_ratio"],
            point["mean_abs_difference"],
            point["psnr_db_median"],
            point["psnr_db_worst"],
            point["percent_right"],
            *(point.get("fewer_steps", {}).get(name) for name in fewer),
        ]
        for steps, values in result["by_steps"].items()
        for value, point in values.items()
    ]
    columns = ["steps", "step_cache", "UNet time", "mean abs difference (levels)"]
    columns += ["PSNR dB, median", "worst", "drawn rightly, %"]
    columns += ["instead: exact steps", "difference", "PSNR dB", "rightly, %"]
    return "\n\n".join(
        [
            f"{result['request']}, {result['captions']} captions. UNet time is that of step_cache"
            " 1 in the same run.",
            table(columns, rows),
            f"At {result['sheet_steps']} steps, the value of `step_cache` before each caption:",
            "![Pictures by step_cache](plots/step_cache.png)",
        ]
    )


def demo_quality(result: dict) -> str:
    """Per cent of captions that are drawn rightly."""
    shares = result["percent_right"]
    columns = list(next(iter(shares.values())))
    return table(
        ["% right", *columns],
        [[_words(group), *(share[c] for c in columns)] for group, share in shares.items()],
    )


def _point(point: dict) -> list:
    load = (
        f"concurrency {point['concurrency']}"
        if "concurrency" in point
        else f"Poisson {point['requests_per_second']:.2f}/s"
    )
    times = [point[f"p{n}_ms"] for n in (50, 90, 95, 99)]
    names = ("rows_per_tick", "cache_hits", "count")
    return [
        point["protocol"],
        load,
        point["images_per_second"],
        *times,
        *(point.get(n) for n in names),
    ]


def _records(entries: list[dict]) -> str:
    columns = list(dict.fromkeys(name for entry in entries for name in entry))
    shown = [[_inline(entry.get(column)) for column in columns] for entry in entries]
    return table([_words(column) for column in columns], shown)


def _inline(value: Any) -> Any:
    if isinstance(value, dict):
        return ", ".join(f"{_words(key)} {_cell(_inline(part))}" for key, part in value.items())
    return value


def _is_nested(value: dict) -> bool:
    return any(isinstance(part, dict | list) for part in value.values())


def _words(name: Any) -> str:
    return str(name).replace("_", " ")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return str(value)
