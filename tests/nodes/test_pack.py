"""The pack itself: what it may import, how it is described, how long it takes to load."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from conftest import NODES

STANDARD = set(sys.stdlib_module_names)
# ComfyUI's own modules, and the packages that ComfyUI needs itself.
OF_COMFYUI = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "nodes", "server"}
WITH_COMFYUI = {"aiohttp", "numpy", "PIL", "torch"}


@pytest.mark.parametrize("path", sorted(NODES.glob("*.py")), ids=lambda path: path.name)
def test_it_needs_numpy_tritonclient_and_comfyui_only(path: Path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(node.module.split(".")[0])
    assert imported <= STANDARD | OF_COMFYUI | WITH_COMFYUI | {"tritonclient"}
