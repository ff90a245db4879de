"""Our tables against the real ComfyUI: its sampler functions in float64, its KSampler in fp32."""

import pytest

from fullpipe.samplers import SAMPLERS, UNSUPPORTED
from fullpipe.schedulers import SCHEDULERS

from comparison import Case, catalogue, compare  # isort: skip

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.filterwarnings("ignore:Should have t:UserWarning"),  # torchsde's own rounding
]

# A few-step schedule, an image to start from, both predictions, and infinite starting noise.
KSAMPLER_VARIANTS = [
    {"steps": 4, "denoise": 0.6, "batch": 2},
    {"prediction_type": "v_prediction", "batch": 2},
    {"prediction_type": "v_prediction", "zero_snr": True},
]


def test_every_name_of_comfyui_is_known(comfyui):
    sampler_names, scheduler_names = catalogue(comfyui)
    assert [name for name in sampler_names if name not in UNSUPPORTED] == list(SAMPLERS)
    assert scheduler_names == list(SCHEDULERS)


def test_float64_tables_equal_the_sampler_functions(comfyui):
    cases = [Case(name, scheduler, "float64") for name in SAMPLERS for scheduler in SCHEDULERS]
    differences = compare(comfyui, cases)
    assert [d.case for d in differences if not d.sigmas_equal] == []
    assert [d for d in differences if not d.relative < 1e-8] == []


def test_fp32_pictures_equal_the_ksampler(comfyui):
    cases = [Case(name, scheduler, "float32") for name in SAMPLERS for scheduler in SCHEDULERS]
    _assert_nearly_all_equal(compare(comfyui, cases))


def test_fp32_pictures_equal_the_ksampler_in_every_variant(comfyui):
    cases = [
        Case(name, SCHEDULERS[(i + j) % len(SCHEDULERS)], "float32", **variant)
        for i, name in enumerate(SAMPLERS)
        for variant in KSAMPLER_VARIANTS
        for j in (0, 4)
    ]
    _assert_nearly_all_equal(compare(comfyui, cases))


def _assert_nearly_all_equal(differences):
    """bench/parity.md says why the others differ."""
    assert [d.case for d in differences if not d.sigmas_equal] == []
    assert [d for d in differences if not d.relative < 0.1] == []
    others = [d for d in differences if not d.relative < 1e-4]
    assert len(others) <= len(differences) / 10, others
