"""Whole pictures: a running ComfyUI against one request to a running Triton Inference Server.

Both have the same random-weight checkpoint; checkpoints.py says how true it is.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from images import CASES, Case, Distance, comfyui_pictures, triton_pictures

pytestmark = [pytest.mark.comfyui, pytest.mark.triton]


@pytest.fixture(scope="module")
def folder():
    """Room for gigabytes of weights, which pytest's own folders would keep for three runs."""
    with tempfile.TemporaryDirectory(prefix="image-parity-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def theirs(folder) -> dict[Case, np.ndarray]:
    """ComfyUI's pictures of every case."""
    try:
        return comfyui_pictures(folder, CASES)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"ComfyUI could not be downloaded: {error.stderr}")


@pytest.fixture(scope="module")
def ours(folder, theirs) -> dict[Case, np.ndarray]:
    """Triton's pictures of every case."""
    return triton_pictures(folder, CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}: {case.name}")
def test_saved_pictures_are_equal(theirs, ours, case):
    distance = Distance.between(ours[case], theirs[case])
    assert ours[case].shape == (case.batch_size, case.height, case.width, 3)
    assert distance.is_equal, distance
