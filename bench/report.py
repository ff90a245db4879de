"""bench/README.md with its tables and plots, and the README's figures, from stored results alone.

    python -m bench.report

Shows every result in bench/results/: those of `SECTIONS` in this order, with tables and plots of
their own where they have some; any other result follows with plain tables. What has not been run
is left out.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from bench import headlines, plots, tables
from bench.record import RESULTS

BENCH = Path(__file__).parent
README = BENCH.parent / "README.md"
INTRODUCTION = """# Benchmarks

Made by `python -m bench.report` from the results in [results/](results), each of which has the
machine, the versions and the command that made it. Every benchmark is one file that begins with
why its number matters, runs alone, and prints its result as JSON. Compare figures of one run with
each other; machines differ.

`make bench` runs perf_analyzer's sweep and makes this page anew. `python -m bench.NAME` runs any
other; give it the machine to itself.
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """How one result is shown.

    Attributes:
        name: of the result, `bench/results/NAME.json`.
        title: its heading.
        tables: Markdown of a result; plain tables of whatever it holds unless given.
        plot: draws a result into a file.
    """

    name: str
    title: str
    tables: Callable[[dict], str] = tables.plain
    plot: Callable[[dict, Path], None] | None = None


SECTIONS = (
    Section("continuous", "Continuous batching", tables.continuous, plots.continuous),
    Section("perf_analyzer", "NVIDIA's perf_analyzer", tables.perf_analyzer, plots.perf_analyzer),
    Section("concurrency", "Requests at a time", tables.concurrency, plots.concurrency),
    Section(
        "remote_unet", "One request an image, or one a step", tables.remote_unet, plots.remote_unet
    ),
    Section("node_overhead", "What the ComfyUI node adds"),
    Section("overhead", "What serving costs"),
    Section("diffusers_pipeline", "Against diffusers' own pipeline"),
    Section("unet_apart", "The UNet in the loop or over BLS", tables.unet_apart),
    Section("transports", "HTTP, gRPC, shared memory", tables.transports, plots.transports),
    Section("caches", "Caches"),
    Section("gateway", "The gateway"),
    Section("startup", "Start-up and memory"),
    Section("soak", "Thousands of requests"),
    Section("advance", "A sampler step", tables.advance),
    Section("step_cache", "Step caching", tables.step_cache),
    Section("demo_quality", "The demo's pictures", tables.demo_quality),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    documents = read(RESULTS)
    page = build(documents, BENCH / "plots")
    (BENCH / "README.md").write_text(page, encoding="utf-8")
    readme = headlines.page(documents, README.read_text(encoding="utf-8"))
    README.write_text(readme, encoding="utf-8")
    print(f"{BENCH / 'README.md'} and {README}: {len(documents)} results")


def read(folder: Path) -> dict[str, dict]:
    """All stored results by name."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    }


def build(documents: dict[str, dict], plot_folder: Path | None) -> str:
    """The page of these results; writes plots unless there is no folder for them."""
    parts = [
        _section(section, documents[section.name], plot_folder) for section in sections(documents)
    ]
    return "\n".join([INTRODUCTION, *parts])


def sections(documents: dict[str, dict]) -> list[Section]:
    """How each of these results is shown, in the order of the page."""
    known = {section.name for section in SECTIONS}
    others = [_section_of(name) for name in documents if name not in known]
    return [section for section in (*SECTIONS, *others) if section.name in documents]


def _section_of(name: str) -> Section:
    """How a result is shown that is not in `SECTIONS`: by the name of its benchmark, or plainly."""
    benchmark, _, what = name.partition("_")
    if benchmark == "gpu":
        return Section(name, f"On a GPU: {_words(what) or 'a checkpoint'}", tables.gpu)
    if name.startswith("unet_profile_"):
        title = f"Where a UNet call's time goes: {_words(name.removeprefix('unet_profile_'))}"
        return Section(name, title, tables.unet_profile, plots.unet_profile)
    if name.startswith("perf_analyzer_"):
        title = f"perf_analyzer: {name.removeprefix('perf_analyzer_')}"
        return Section(name, title, tables.perf_analyzer, plots.perf_analyzer)
    return Section(name, _words(name).capitalize())


def _section(section: Section, document: dict, plot_folder: Path | None) -> str:
    result = document["result"]
    lines = [f"## {section.title}", ""]
    why = purpose(section.name)
    if why:
        lines += [why, ""]
    lines += [
        f"`{document['command']}`, {_where(document)}",
        "",
        section.tables(result).strip(),
        "",
    ]
    if section.plot is not None:
        if plot_folder is not None:
            plot_folder.mkdir(exist_ok=True)
            section.plot(result, plot_folder / f"{section.name}.png")
        lines += [f"![{section.title}](plots/{section.name}.png)", ""]
    return "\n".join(lines)


def purpose(name: str) -> str:
    """Why a benchmark's number matters, in the words of its file; empty where there is none.

    A result may be called after its benchmark and what it measured: `gpu_sdxl` is from `gpu.py`.
    """
    for path in (BENCH / f"{name}.py", BENCH / name / "__main__.py"):
        if path.is_file():
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            told = [part for part in text.split("\n\n")[1:] if "python -m" not in part]
            return "\n\n".join(told)
    shorter = name.rpartition("_")[0]
    return purpose(shorter) if shorter else ""


def _where(document: dict) -> str:
    machine, versions = document.get("machine", {}), document.get("versions", {})
    gpu = machine.get("gpu") or document["result"].get("gpu") or document["result"].get("device")
    processor = f"{machine.get('cores')} cores of {machine.get('processor')}"
    where = gpu if isinstance(gpu, str) and gpu not in ("cpu", "cuda") else processor
    return f"on {where}, torch {versions.get('torch')}, {document.get('date')}"


def _words(name: str) -> str:
    return name.replace("_", " ")


if __name__ == "__main__":
    main()
