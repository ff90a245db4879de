"""The documentation tells the truth: its examples run, its tables are the contract's."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fullpipe import contract
from fullpipe.assemble import PARAMETER
from fullpipe.cli import _parser
from fullpipe.config import Defaults, Limits, LoopSettings
from fullpipe.errors import InvalidRequest, PipelineError
from fullpipe.local import as_tensors
from fullpipe.samplers import SAMPLERS, UNSUPPORTED
from fullpipe.schedulers import SCHEDULERS
from fullpipe.serve import curl_line

ROOT = Path(__file__).parents[1]
README, HTTP = ROOT / "README.md", ROOT / "docs" / "http.md"
LOOP, OPERATIONS = ROOT / "docs" / "loop.md", ROOT / "docs" / "operations.md"
LIMIT_S = 120

# Why an example may stand below `<!-- not run: REASON -->`.
REASONS = {
    "it is what this very environment was made with",
    "it installs packages of the system",
    "it measures for minutes",
    "it needs NVIDIA's container",
    "it needs a ComfyUI",
    "it needs a GPU",
    "it needs a checkpoint",
    "it needs a gateway",
    "it needs another checkpoint",
    "it serves until somebody stops it",
    "tests/test_check.py runs it",
    "tests/test_bench_perf_analyzer.py runs the tool",
}
# Pages whose python quotes the sources, which a test of its own compares.
QUOTING = {LOOP}


@dataclasses.dataclass(frozen=True)
class Example:
    """One bash or python block of a page.

    Attributes:
        printed: what the page says that it prints; may be empty.
        reason: why it is not run; empty if it is.
    """

    name: str
    language: str
    code: str
    printed: str
    reason: str


def examples(page: Path) -> list[Example]:
    found = re.findall(
        r"^(?:<!-- not run: (.*?) -->\n)?```(bash|python)\n(.*?)^```\n"
        r"(?:\n^```(json|text)\n(.*?)^```\n)?",
        page.read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    return [
        Example(f"{page.stem}-{number}", language, code, printed.strip(), reason)
        for number, (reason, language, code, _, printed) in enumerate(found)
        if not (page in QUOTING and language == "python")
    ]


PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench/perf_analyzer/README.md"]
EXAMPLES = [example for page in PAGES for example in examples(page)]
RUN = [example for example in EXAMPLES if not example.reason]


@pytest.fixture
def folder(tmp_path):
    """Where an example runs: the pictures that it may start from are there."""
    Image.new("RGB", (128, 128), "white").save(tmp_path / "start.png")
    Image.new("L", (128, 128), 255).save(tmp_path / "mask.png")
    return tmp_path


@pytest.fixture
def run(folder, triton):
    """Runs an example against the real server; its addresses stand for those in the text."""
    (folder / "bin").mkdir()
    command = folder / "bin" / "fullpipe"
    command.write_text(
        f'#!/bin/sh\ncase $1 in generate|models) set -- "$@" --url {triton.url};; esac\n'
        f'exec "{sys.executable}" -m fullpipe.cli "$@"\n'
    )
    command.chmod(0o755)
    addresses = {
        "http://127.0.0.1:8000": triton.url,
        "127.0.0.1:8000": triton.url.removeprefix("http://"),
        "127.0.0.1:8001": triton.grpc_address,
    }
    env = {
        **os.environ,
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "utf-8",
    }

    def run_one(language: str, code: str) -> str:
        for written, real in addresses.items():
            code = code.replace(written, real)
        interpreter = {"bash": ["bash", "-euo", "pipefail"], "python": [sys.executable]}[language]
        done = subprocess.run(
            [*interpreter, "-c", code],
            cwd=folder,
            env=env,
            capture_output=True,
            encoding="utf-8",
            timeout=LIMIT_S,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run_one


@pytest.mark.triton
@pytest.mark.parametrize("example", RUN, ids=[example.name for example in RUN])
def test_example_does_what_the_page_says(run, folder, example):
    code, printed = example.code, example.printed
    given = {path.name for path in folder.iterdir()}
    output = run(example.language, code)
    if printed.startswith("{"):
        assert json.loads(output) == json.loads(printed)
    elif printed:
        assert output == printed
    elif '"op":"cancel"' in code:
        assert "CANCELLED: job" in output
    else:
        assert '"error"' not in output
    for name in sorted(set(re.findall(r"[\w-]+\.(?:png|npy)", code)) - given):
        show = Image.open if name.endswith(".png") else np.load
        pixels = np.asarray(show(folder / name))
        assert pixels.dtype == np.uint8 and pixels.shape[-1] == 3
        assert min(pixels.shape[-3:-1]) >= 128
        assert pixels.std() > 10, f"{name} is empty"


@pytest.mark.triton
def test_streams_bring_steps_and_a_picture(run):
    for example in RUN:
        if "curl" in example.code and "generate_stream" in example.code and not example.printed:
            events = [
                json.loads(line.removeprefix("data:"))
                for line in run(example.language, example.code).splitlines()
                if line.startswith("data:")
            ]
            told = [json.loads(event["event"]) for event in events]
            assert [event.get("done", False) for event in told] == [False] * (len(told) - 1) + [
                True
            ]
            assert any("preview" in event for event in told)
            assert events[-1]["image"] and events[-1]["info"]
            return
    raise AssertionError("no example of a stream")


def test_every_example_that_is_not_run_says_why():
    reasons = {example.reason for example in EXAMPLES if example.reason}
    assert reasons <= REASONS
    assert {README, HTTP} <= {page for page in PAGES if any(not e.reason for e in examples(page))}


def test_readme_has_the_line_that_serve_shows():
    shown = curl_line("http://127.0.0.1:8000", "full_pipeline").partition("| ")[2]
    assert shown.partition("i=r.get")[2] in README.read_text(encoding="utf-8")


def table(heading: str, *columns: str) -> dict[str, dict[str, str]]:
    """The table with these columns below a heading of docs/http.md: first column -> the others."""
    section = re.split(rf"\n###? {heading}\n", HTTP.read_text(encoding="utf-8"))[1].split("\n## ")[
        0
    ]
    lines = section.split("| " + " | ".join(columns) + " |\n")[1].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines[1:]]
    return {row[0].strip("`"): dict(zip(columns, row, strict=True)) for row in rows}


INPUTS = ("input", "type", "default", "range", "meaning")
OUTPUTS = ("output", "type", "meaning")


@pytest.mark.parametrize(
    ("documented", "tensors"),
    [
        (table("Inputs", *INPUTS), contract.STREAM_INPUTS),
        (table("Outputs", *OUTPUTS), contract.STREAM_OUTPUTS),
        (
            {
                **table("Inputs", *INPUTS),
                **table("Progress and cancel", *INPUTS),
                **table("Latents and embeddings", *INPUTS),
            },
            contract.LOOP_INPUTS,
        ),
        (table("Latents and embeddings", *OUTPUTS), contract.LOOP_OUTPUTS),
    ],
    ids=["inputs", "outputs", "loop-inputs", "loop-outputs"],
)
def test_tables_are_the_contract(documented, tensors):
    assert set(documented) == {tensor.name for tensor in tensors}
    for tensor in tensors:
        dims = ",".join(map(str, tensor.dims))
        assert documented[tensor.name]["type"] == f"{tensor.dtype} `[{dims}]`"


def parse(**values):
    """What the loop makes of a request to the demo pipeline."""
    return contract.parse(
        as_tensors(values),
        Defaults(256, 256),
        Limits(),
        tuple(SAMPLERS),
        SCHEDULERS,
        UNSUPPORTED,
    )


def test_defaults_are_the_servers():
    request = parse(prompt="a")
    query = parse(op="progress", job_id="x")
    documented = {**table("Inputs", *INPUTS), **table("Latents and embeddings", *INPUTS)}
    progress = table("Progress and cancel", *INPUTS)
    for name, row in documented.items():
        shown = re.findall(r"`(.*?)`", row["default"])
        if not shown:
            continue
        if name == "preview":
            assert shown == [{False: "none", True: "latent"}[query.has_preview]]
        else:
            assert shown[0] == (str(getattr(request, name)) or '""'), name
    drawn = {name for name, row in documented.items() if row["default"] == "random"}
    assert drawn == {"seed", "job_id"}
    assert all(getattr(request, name) != getattr(parse(prompt="a"), name) for name in drawn)
    unset = {n for n, row in documented.items() if row["default"] in ("none", "the checkpoint's")}
    for name in unset:
        assert getattr(request, name, None) is None and name not in request.arrays
    assert {name for name, row in documented.items() if row["default"] == "required"} == {"prompt"}
    assert progress["since"]["default"] == f"`{query.since}`"
    assert progress["wait_ms"]["default"] == f"`{query.wait_ms}`"
    assert progress["op"]["default"] == "`generate`"


def refused() -> list[tuple[dict, str]]:
    """Requests of the table in docs/http.md and their answers; words stand for some of them."""
    wide = io.BytesIO()
    Image.new("RGB", (520, 64)).save(wide, "PNG")
    white = np.full((1, 128, 128, 3), 255, np.uint8)
    words = {
        "a prompt of 8001 characters": {"prompt": "a" * 8001},
        "`init_image` and `init_image_b64`": {
            "prompt": "a",
            "init_image": white,
            "init_image_b64": "QQ==",
        },
        "a start picture of 128×128 and `width` 256": {
            "prompt": "a",
            "init_image": white,
            "width": 256,
        },
        "a picture of more than 519 pixels a side": {
            "prompt": "a",
            "init_image_b64": base64.b64encode(wide.getvalue()).decode(),
        },
        "`latents` with 3 channels": {
            "prompt": "a",
            "latents": np.zeros((1, 3, 8, 8), np.float32),
        },
        "`prompt_embeds` of another width": {
            "prompt_embeds": np.zeros((1, 77, 5), np.float32),
            "negative_prompt_embeds": np.zeros((1, 77, 5), np.float32),
        },
    }
    found = []
    for request, row in table("What is refused", "request", "answer").items():
        if row["answer"].startswith("INVALID_ARG") and "in use" not in row["answer"]:
            inputs = words.get(row["request"]) or json.loads(request)
            found.append((inputs, row["answer"]))
    return found


def test_what_is_refused_is_refused_in_these_words(open_pipeline):
    pipeline = open_pipeline()
    assert len(refused()) >= 25
    for inputs, answer in refused():
        with pytest.raises(PipelineError) as caught:
            pipeline.generate(**inputs)
        said = f"{caught.value.code}: {caught.value}"
        if answer.endswith("…"):
            assert said.startswith(answer.removesuffix("…").strip()), said
        else:
            assert said == answer


def test_ranges_are_the_servers():
    progress = table("Progress and cancel", *INPUTS)
    rows = {**table("Inputs", *INPUTS), **table("Latents and embeddings", *INPUTS)}
    wrong = {"INT32": -99, "FP32": -1.0, "STRING": "x" * 8001}
    checked = 0
    for name, row in [*rows.items(), *((n, progress[n]) for n in ("op", "since", "wait_ms"))]:
        dtype, _, dims = row["type"].partition(" ")
        if dims != "`[1]`" or dtype == "UINT64" or name.endswith("_b64"):
            continue
        values = {"prompt": "a", name: wrong[dtype]}
        if name in ("since", "wait_ms", "preview"):
            values |= {"op": "progress", "job_id": "x"}
        if dtype == "STRING" and row["default"] not in ("required", '`""`', "random"):
            values[name] = "no such name"
        with pytest.raises(InvalidRequest) as caught:
            parse(**values)
        allowed = re.search(r"allowed:? (.+)$|must be a (multiple .+)$", str(caught.value))
        if name in ("sampler_name", "scheduler"):
            section = HTTP.read_text(encoding="utf-8").split("## Samplers and schedulers")[1]
            listed = section.split(f"`{name}`: ")[1].split(".\n")[0]
            assert " ".join(listed.split()) == allowed[1]
        else:
            said = (allowed[1] or allowed[2]).removesuffix(" characters")
            assert said in row["range"], name
        checked += 1
    assert checked >= 15


@pytest.mark.triton
def test_info_and_offer_hold_what_the_page_says(triton_url):
    from fullpipe.client import Client

    client = Client(triton_url, timeout_s=LIMIT_S)
    white = np.full((1, 128, 128, 3), 255, np.uint8)
    info = client.generate("a red circle", steps=1, init_image=white).info
    fields = table("Outputs", "field", "meaning")
    assert set(re.findall(r"\w+", " ".join(fields))) == set(info)
    stages = re.findall(r"`(\w+)`", fields["milliseconds"]["meaning"])
    assert set(stages) == set(info["milliseconds"])
    text = HTTP.read_text(encoding="utf-8").split("## What a server offers")[1].split("```")[0]
    facts = next(p.facts for p in client.pipelines() if p.name == "full_pipeline")
    assert set(re.findall(r"`(\w+)`", text)) == {*facts, PARAMETER}


def test_stages_are_the_models():
    for name, row in table("The stages", "model", "inputs", "outputs").items():
        config = ROOT / "model_repository" / name.split("`")[0] / "config.pbtxt"
        text = config.read_text(encoding="utf-8")
        for part in ("input", "output"):
            declared = re.findall(
                r'name: "(\w+)"', text.split(f"\n{part} [")[1].split("\noutput [")[0]
            )
            assert re.findall(r"`(\w+)`", row[f"{part}s"]) == declared


def test_operations_lists_every_metric():
    # triton_adapter itself can be imported inside Triton only.
    source = (ROOT / "fullpipe" / "triton_adapter.py").read_text(encoding="utf-8")
    metrics = re.findall(r'^ {4}"(fullpipe_\w+)": \("(\w+)"', source, re.MULTILINE)
    page = OPERATIONS.read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(fullpipe_\w+)` \| (\w+)", page, re.MULTILINE)
    assert [(name, kind.upper()) for name, kind in listed] == metrics
    stages = (ROOT / "backends" / "diffusion" / "model.py").read_text(encoding="utf-8")
    known = {name for name, _ in metrics} | set(re.findall(r'"(fullpipe_\w+)"', stages))
    assert set(re.findall(r"fullpipe_\w+_total", page)) <= known


@pytest.mark.parametrize(("group", "settings"), [("limits", Limits()), ("loop", LoopSettings())])
def test_operations_lists_every_setting(group, settings):
    lines = OPERATIONS.read_text(encoding="utf-8").split(f"| key of `{group}` | default |")[1]
    listed = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", lines.split("\n\n")[0], re.MULTILINE)
    assert dict(listed) == {key: str(value) for key, value in vars(settings).items()}


def test_operations_lists_the_options_of_assemble():
    page = OPERATIONS.read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(--[\w-]+)` \| `(.*?)` \|", page, re.MULTILINE))
    for option, default in listed.items():
        args = _parser().parse_args(["assemble", "checkpoint"])
        assert str(getattr(args, option[2:].replace("-", "_"))) == default
    shown = subprocess.run(
        [sys.executable, "-m", "fullpipe.cli", "assemble", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert set(listed) == set(re.findall(r"^ +(--[\w-]+) ", shown.stdout, re.MULTILINE))


def test_code_in_the_page_of_the_loop_is_in_the_source():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "fullpipe").rglob("*.py")]
    quoted = re.findall(r"^```python\n(.*?)^```", LOOP.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert quoted
    for code in quoted:
        assert any(code in source for source in sources), f"not in the source:\n{code}"


def pages() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:  # an unpacked archive
        return [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [ROOT / line for line in listed.stdout.splitlines()]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, f"{page.name} links to {target}"
