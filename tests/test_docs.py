"""The documentation tells the truth: its examples run, its tables are the contract's."""

from __future__ import annotations

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
from fullpipe.errors import InvalidRequest
from fullpipe.local import as_tensors
from fullpipe.samplers import SAMPLERS, UNSUPPORTED
from fullpipe.schedulers import SCHEDULERS
from fullpipe.serve import curl_line

ROOT = Path(__file__).parents[1]
README, HTTP = ROOT / "README.md", ROOT / "docs" / "http.md"
LOOP, OPERATIONS = ROOT / "docs" / "loop.md", ROOT / "docs" / "operations.md"
LIMIT_S = 120

# Examples that this test does not run, by a line of theirs, and why.
NOT_RUN = {
    "make demo   # sets up": "installs torch; it is what this very environment was made with",
    "fullpipe serve": "serves until somebody stops it; tests/test_server.py does that",
}


def blocks(path: Path) -> list[tuple[str, str, str, str]]:
    """(id, language, code, text that the page says it prints) of each bash or python example."""
    found = re.findall(
        r"^```(bash|python)\n(.*?)^```\n(?:\n^```(json|text)\n(.*?)^```\n)?",
        path.read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    return [
        (f"{path.name}-{number}", language, code, printed.strip())
        for number, (language, code, _, printed) in enumerate(found)
    ]


def is_run(code: str) -> bool:
    return not any(line in code for line in NOT_RUN)


EXAMPLES = [*blocks(README), *blocks(HTTP)]
RUN = [example for example in EXAMPLES if is_run(example[2])]


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
        f'#!/bin/sh\nexec "{sys.executable}" -m fullpipe.cli "$@" --url {triton.url}\n'
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
@pytest.mark.parametrize(
    ("language", "code", "printed"),
    [example[1:] for example in RUN],
    ids=[example[0] for example in RUN],
)
def test_example_does_what_the_page_says(run, folder, language, code, printed):
    given = {path.name for path in folder.iterdir()}
    output = run(language, code)
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
    for _, language, code, printed in RUN:
        if "curl" in code and "generate_stream" in code and not printed:
            events = [
                json.loads(line.removeprefix("data:"))
                for line in run(language, code).splitlines()
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


def test_every_example_that_is_not_run_is_known():
    for line, reason in NOT_RUN.items():
        assert reason
        assert any(line in code for _, _, code, _ in EXAMPLES), f"no example has {line!r} any more"
    assert len(EXAMPLES) - len(RUN) <= len(NOT_RUN)


def test_readme_has_the_line_that_serve_shows():
    shown = curl_line("http://127.0.0.1:8000", "full_pipeline").partition("| ")[2]
    assert shown.partition("i=r.get")[2] in README.read_text(encoding="utf-8")


def table(heading: str, *columns: str) -> dict[str, dict[str, str]]:
    """The table with these columns below a heading of docs/http.md: first column -> the others."""
    section = HTTP.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
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


def test_readme_lists_every_metric():
    # triton_adapter itself can be imported inside Triton only.
    source = (ROOT / "fullpipe" / "triton_adapter.py").read_text(encoding="utf-8")
    metrics = re.findall(r'^ {4}"(fullpipe_\w+)": \("(\w+)"', source, re.MULTILINE)
    readme = README.read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(fullpipe_\w+)` \| (\w+)", readme, re.MULTILINE)
    assert [(name, kind.upper()) for name, kind in listed] == metrics
    assert set(re.findall(r"fullpipe_\w+_total", readme)) <= {name for name, _ in metrics}


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
