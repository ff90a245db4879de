"""What the parser makes of a request's tensors."""

import numpy as np
import pytest

from fullpipe import contract
from fullpipe.config import Defaults, Limits
from fullpipe.samplers import build_table
from fullpipe.schedulers import ModelSampling, calculate_sigmas


def parse(**tensors):
    """A picture request of these tensors and a prompt."""
    arrays = {"prompt": np.array([b"x"], dtype=object), **tensors}
    return contract.parse(
        arrays, Defaults(width=256, height=256), Limits(), ("euler",), ("normal",), {}
    )


@pytest.mark.parametrize("value", [0.1, 0.35, 0.6, 0.7, 0.8, 0.9])
def test_an_fp32_means_the_decimal_that_was_sent(value):
    start = np.zeros((1, 8, 8, 3), np.uint8)
    request = parse(denoise=np.array([value], np.float32), init_image=start)
    assert request.denoise == value
    assert parse(cfg=np.array([value + 7], np.float32)).cfg == value + 7


def test_four_steps_at_denoise_0_8_visit_comfyui_s_sigmas():
    """ComfyUI takes the last 5 sigmas of int(4 / 0.8) = 5 steps; of 0.800000012 they would be 4."""
    start = np.zeros((1, 8, 8, 3), np.uint8)
    request = parse(
        steps=np.array([4], np.int32), denoise=np.array([0.8], np.float32), init_image=start
    )
    sampling = ModelSampling.from_scheduler_config({})
    five = calculate_sigmas(sampling, "normal", 5, 1.0, "euler")
    sigmas = calculate_sigmas(sampling, "normal", request.steps, request.denoise, "euler")
    assert np.array_equal(sigmas, five[-5:])
    assert build_table("euler", sigmas, sampling).steps == 4
