"""Whole pictures: a running ComfyUI against one request to a running Triton Inference Server.

Both have the same random-weight checkpoint; checkpoints.py says how true it is.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from images import (
    CASES,
    SPOILED,
    Case,
    Distance,
    comfyui_pictures,
    spoiled,
    triton_pictures,
)

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
    """Triton's pictures of every case and every spoiled one."""
    return triton_pictures(folder, [*CASES, *map(spoiled, SPOILED)])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}: {case.name}")
def test_saved_pictures_are_equal(theirs, ours, case):
    distance = Distance.between(ours[case], theirs[case])
    assert ours[case].shape == (case.batch_size, case.height, case.width, 3)
    assert distance.is_equal, distance


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_request_gives_another_picture(theirs, ours, name):
    distance = Distance.between(ours[spoiled(name)], theirs[SPOILED[name][0]])
    assert not distance.is_equal, distance


def test_pictures_have_contrast_and_differ(ours):
    pictures = [picture for case in CASES for picture in ours[case]]
    for index, picture in enumerate(pictures):
        assert 20 < picture.std() < 90
        assert np.isin(picture, (0, 255)).mean() < 0.15
        for other in pictures[:index]:
            if other.shape == picture.shape:
                assert not Distance.between(picture, other).is_equal
