"""What a user sees: ComfyUI's own page in a real Chromium, from an example to the picture."""

from __future__ import annotations

import io
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from browser import (
    CHROMIUM,
    follow_events,
    install_front_end,
    load,
    opened,
    options,
    set_widget,
    settle_in,
    wait_for_event,
)
from comfy_server import ComfyServer
from conftest import IMPATIENT, NODES
from PIL import Image

from tests.picture import measure

pytestmark = [pytest.mark.comfyui, pytest.mark.triton]

EXAMPLES = sorted((NODES / "example_workflows").glob("*.json"))
SMALL = {"width": 128, "height": 128, "steps": 8}


@pytest.fixture(scope="module")
def comfy(network, tmp_path_factory):
    """A ComfyUI with its web page."""
    if not Path(CHROMIUM).exists():
        pytest.skip("Chromium is missing; on Debian: apt-get install chromium")
    base = tmp_path_factory.mktemp("comfy_with_page")
    servers = base / "servers.json"
    servers.write_text(json.dumps({"servers": {"default": {"url": network.url, **IMPATIENT}}}))
    settle_in(base)
    environment = {"FULLPIPE_COMFYUI_CONFIG": str(servers), "OMP_NUM_THREADS": "2"}
    try:
        front_end = install_front_end()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"ComfyUI's page could not be downloaded: {error.stderr}")
    with ComfyServer(base, {"triton-full-pipeline": NODES}, environment, front_end) as started:
        yield started


@pytest.fixture(scope="module")
def page(comfy):
    """The page in a browser."""
    with opened(comfy.url) as one:
        follow_events(one)
        yield one


@pytest.fixture
def txt2img(page):
    """The example for text to image, small."""
    load(page, json.loads((NODES / "example_workflows" / "txt2img.json").read_text()))
    for name, value in SMALL.items():
        set_widget(page, "TritonFullPipeline", name, value)
    page.evaluate("() => { window.told = [] }")


def run(page) -> None:
    page.get_by_role("button", name="Run", exact=True).click()


def keep(page, name: str) -> None:
    """Write a screenshot where the environment asks for it, for the documentation."""
    if folder := os.environ.get("FULLPIPE_SCREENSHOTS"):
        page.wait_for_timeout(700)  # dialogs fade in
        page.screenshot(path=Path(folder) / f"{name}.png")


def told(page, kind: str) -> list:
    return page.evaluate("(kind) => told.filter(([k]) => k === kind).map(([, d]) => d)", kind)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_loads_as_it_is(page, path):
    saved = json.loads(path.read_text())
    load(page, saved)
    shown = page.evaluate("() => app.graph.serialize()")
    assert [n["type"] for n in shown["nodes"]] == [n["type"] for n in saved["nodes"]]
    assert [n.get("widgets_values") or [] for n in shown["nodes"]] == [
        n.get("widgets_values") or [] for n in saved["nodes"]
    ]
    assert len(shown["links"]) == len(saved["links"]) > 0
    assert not page.get_by_text("Invalid workflow").count()
    assert path.with_suffix(".jpg").exists(), "an example needs its picture"


def test_run_shows_progress_and_the_picture(page, txt2img, comfy):
    set_widget(page, "TritonFullPipeline", "width", 256)
    set_widget(page, "TritonFullPipeline", "height", 256)
    run(page)
    wait_for_event(page, "execution_success")
    steps = [step["value"] for step in told(page, "progress")]
    assert steps == list(range(1, 9))
    assert told(page, "b_preview_with_metadata")
    (shown,) = [o["output"]["images"] for o in told(page, "executed") if o["output"]]
    saved = comfy.base / "temp" / shown[0]["filename"]
    scene = measure(np.asarray(Image.open(saved).convert("RGB")))
    assert (scene.background, scene.objects[0].colour) == ("white", "red")
    # The page itself has painted it: there is as much red as in the picture.
    page.wait_for_timeout(1000)
    screen = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(int)
    red = (screen[..., 0] > 180) & (screen[..., 1] < 70) & (screen[..., 2] < 70)
    assert red.sum() > 2000


def test_interrupt(page, txt2img):
    set_widget(page, "TritonFullPipeline", "steps", 150)
    set_widget(page, "TritonFullPipeline", "width", 256)
    set_widget(page, "TritonFullPipeline", "height", 256)
    run(page)
    wait_for_event(page, "progress", 10)
    keep(page, "comfyui_running")
    page.get_by_role("button", name="Cancel current run").click()
    wait_for_event(page, "execution_interrupted")
    assert told(page, "progress")[-1]["value"] < 150


def test_a_dead_server_is_explained_and_r_brings_it_back(page, txt2img, network):
    network.refuse()
    set_widget(page, "TritonFullPipeline", "seed", 4711)
    run(page)
    wait_for_event(page, "execution_error")
    dialog = page.get_by_role("dialog")
    assert "refused the connection; start the server" in dialog.inner_text()
    keep(page, "comfyui_error")
    page.keyboard.press("Escape")
    # While it is away, a refresh keeps what is known and what is chosen.
    page.keyboard.press("r")
    page.wait_for_timeout(1500)
    assert "full_pipeline" in options(page, "TritonFullPipeline", "pipeline")
    network.restore()
    page.evaluate("() => { window.told = [] }")
    page.keyboard.press("r")
    page.wait_for_timeout(1500)
    assert options(page, "TritonFullPipeline", "pipeline") == ["full_pipeline", "apart"]
    run(page)
    wait_for_event(page, "execution_success")
