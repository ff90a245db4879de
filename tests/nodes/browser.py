"""ComfyUI's own web page in a real Chromium."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

WHEEL = "comfyui-frontend-package==1.32.9"
INSIDE = "comfyui_frontend_package/static/"
CHROMIUM = "/usr/bin/chromium"
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)
SLOW_MS = 120_000


def install_front_end(cache: Path | None = None) -> Path:
    """ComfyUI's web page from PyPI, in the user's cache; returns its folder.

    Raises:
        subprocess.CalledProcessError: pip could not download; its output is in the error.
    """
    cache = cache or Path.home() / ".cache" / "fullpipe" / "comfyui" / "front_end"
    folder = cache / INSIDE
    if not (folder / "complete").exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        command += ["--dest", str(cache), WHEEL]
        subprocess.run(command, check=True, capture_output=True, text=True)
        (wheel,) = cache.glob("comfyui_frontend_package-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(cache, [n for n in archive.namelist() if n.startswith(INSIDE)])
        (folder / "complete").touch()
    return folder


# Nothing that covers the graph; the greetings of a first visit are no part of these tests.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Workflow.Persist": False,
    "Comfy.Graph.CanvasInfo": False,
}


CLOSE_BANNER = """() => {
  for (const leaf of document.querySelectorAll("span, p, div"))
    if (!leaf.children.length && leaf.textContent.includes("Introducing Nodes 2.0")) {
      let banner = leaf;
      while (banner.querySelectorAll("button").length < 2) banner = banner.parentElement;
      [...banner.querySelectorAll("button")].at(-1).click();
    }
}"""


def settle_in(base: Path) -> None:
    """Write the user's settings into a ComfyUI's folder, before it starts."""
    folder = base / "user" / "default"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comfy.settings.json").write_text(json.dumps(SETTINGS))


@contextmanager
def opened(url: str, width: int = 1600, height: int = 900) -> Iterator[Page]:
    """ComfyUI's page, ready for work, with an empty graph."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        page = chromium.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(SLOW_MS)
        page.goto(url, wait_until="domcontentloaded")
        page.wait_for_function("() => window.app?.graph && window.app?.extensionManager")
        page.wait_for_function("() => Object.keys(LiteGraph.registered_node_types).length > 100")
        page.evaluate(CLOSE_BANNER)
        yield page
        chromium.close()


def load(page: Page, workflow: dict[str, Any]) -> None:
    """Show a workflow, fitted into the window."""
    page.evaluate("async (workflow) => { await app.loadGraphData(workflow) }", workflow)
    fit(page)


def fit(page: Page) -> None:
    """Show the whole graph."""
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(600)  # the view glides


def widgets(page: Page, node_type: str) -> dict[str, Any]:
    """Values of the first node of a type, by widget."""
    return page.evaluate(
        "(type) => Object.fromEntries(app.graph.nodes.find(n => n.type === type).widgets"
        ".map(w => [w.name, w.value]))",
        node_type,
    )


def options(page: Page, node_type: str, widget: str) -> list[str]:
    """What a combo offers."""
    return page.evaluate(
        "([type, name]) => app.graph.nodes.find(n => n.type === type).widgets"
        ".find(w => w.name === name).options.values",
        [node_type, widget],
    )


def set_widget(page: Page, node_type: str, widget: str, value: Any) -> None:
    """Change a value as a user would."""
    page.evaluate(
        "([type, name, value]) => { const w = app.graph.nodes.find(n => n.type === type).widgets"
        ".find(w => w.name === name); w.value = value; w.callback?.(value) }",
        [node_type, widget, value],
    )


def follow_events(page: Page) -> None:
    """Keep what ComfyUI tells its page from now on, for `events`."""
    page.evaluate(
        """() => {
          window.told = [];
          for (const kind of ["progress", "b_preview_with_metadata", "executed",
              "execution_success", "execution_error", "execution_interrupted"])
            app.api.addEventListener(kind, (e) => window.told.push([kind, e.detail]));
        }"""
    )


def wait_for_event(page: Page, kind: str, count: int = 1) -> None:
    """Until ComfyUI told so many of a kind."""
    page.wait_for_function(
        "([kind, count]) => window.told.filter(([k]) => k === kind).length >= count",
        arg=[kind, count],
    )
