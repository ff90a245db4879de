"""Whole pictures: a running ComfyUI against one request to a running Triton Inference Server.

Both have the same random-weight checkpoint; checkpoints.py says how true it is.
"""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from images import CASES, SUBJECT, Case, Distance, comfyui_pictures, triton_pictures

pytestmark = [pytest.mark.comfyui, pytest.mark.triton]

BY_NAME = {(case.kind, case.name): case for case in CASES}
# A case, and what must not be done to it: each shows that equality above is no accident.
SPOILED = {
    "weights ignored": (
        BY_NAME["sd15", "plain"],
        {"prompt": SUBJECT.replace(":1.3", ":1").replace(":0.6", ":1")},
    ),
    "negative prompt ignored": (BY_NAME["sd15", "weights and negative"], {"negative_prompt": ""}),
    "prompt cut": (BY_NAME["sd15", "199 tokens"], {"prompt": SUBJECT}),
    "clip skip ignored": (BY_NAME["sd15", "clip skip -2"], {"clip_skip": None}),
    "mask ignored": (BY_NAME["sd15", "inpainting"], {"has_mask": False}),
    "SDXL: clip skip ignored": (BY_NAME["sdxl", "clip skip -1, wide"], {"clip_skip": None}),
    "SDXL: negative prompt ignored": (BY_NAME["sdxl", "long negative"], {"negative_prompt": ""}),
}


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
    """Triton's pictures of every case and every spoiled case."""
    spoiled = [replace(case, **change) for case, change in SPOILED.values()]
    return triton_pictures(folder, [*CASES, *spoiled])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}: {case.name}")
def test_saved_pictures_are_equal(theirs, ours, case):
    distance = Distance.between(ours[case], theirs[case])
    assert ours[case].shape == (case.batch_size, case.height, case.width, 3)
    assert distance.is_equal, distance


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_request_gives_another_picture(theirs, ours, name):
    case, change = SPOILED[name]
    distance = Distance.between(ours[replace(case, **change)], theirs[case])
    assert not distance.is_equal, distance


def test_pictures_have_contrast_and_differ(ours):
    pictures = [picture for case in CASES for picture in ours[case]]
    for index, picture in enumerate(pictures):
        assert 20 < picture.std() < 90
        assert np.isin(picture, (0, 255)).mean() < 0.15
        for other in pictures[:index]:
            if other.shape == picture.shape:
                assert not Distance.between(picture, other).is_equal
