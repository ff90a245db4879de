"""The noise schedules: published values, ComfyUI's corner cases, and what is refused."""

import math

import pytest
import torch

from fullpipe.errors import InvalidRequest, SetupError
from fullpipe.schedulers import SCHEDULERS, ModelSampling, calculate_sigmas

SD1 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


@pytest.fixture(scope="module")
def sampling():
    return ModelSampling.from_scheduler_config(SD1)


def test_sd1_sigmas_are_the_known_ones(sampling):
    assert sampling.sigmas.shape == (1000,)
    assert sampling.sigmas.dtype == torch.float32
    assert float(sampling.sigma_min) == pytest.approx(0.0291672, abs=1e-7)
    assert float(sampling.sigma_max) == pytest.approx(14.6146412, abs=1e-6)


def test_zero_terminal_snr_ends_in_a_huge_but_finite_sigma():
    sampling = ModelSampling.from_scheduler_config({**SD1, "rescale_betas_zero_snr": True})
    assert float(sampling.sigma_max) == pytest.approx(4518.7, rel=1e-3)
    assert float(sampling.sigma_min) == pytest.approx(0.0291672, abs=1e-6)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 50])
@pytest.mark.parametrize("denoise", [1.0, 0.6, 0.05])
def test_every_schedule_descends_to_zero(sampling, scheduler, steps, denoise):
    if scheduler == "kl_optimal" and int(steps / denoise) == 1:
        with pytest.raises(InvalidRequest, match="kl_optimal"):
            calculate_sigmas(sampling, scheduler, steps, denoise)
        return
    sigmas = calculate_sigmas(sampling, scheduler, steps, denoise)
    assert sigmas.dtype == torch.float32
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    assert sigmas[0] <= sampling.sigma_max * (1 + 1e-6)
    if scheduler not in ("beta", "ddim_uniform"):
        assert len(sigmas) == steps + 1
    if denoise == 1.0 and scheduler != "ddim_uniform":
        assert sampling.is_max_denoise(sigmas[0])


def test_beta_drops_repeated_timesteps(sampling):
    assert len(calculate_sigmas(sampling, "beta", 500)) < 501


def test_low_denoise_keeps_the_end_of_a_longer_schedule(sampling):
    whole = calculate_sigmas(sampling, "karras", int(20 / 0.6))
    assert torch.equal(calculate_sigmas(sampling, "karras", 20, 0.6), whole[-21:])


def test_penultimate_sigma_is_left_out_for_two_stage_samplers(sampling):
    whole = calculate_sigmas(sampling, "normal", 21)
    sigmas = calculate_sigmas(sampling, "normal", 20, 1.0, "dpm_2")
    assert torch.equal(sigmas, torch.cat([whole[:-2], whole[-1:]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linear", 20), "scheduler='linear' must be one of simple"),
        (("normal", 0), "steps=0"),
        (("normal", 20, 0.0), "denoise=0.0"),
        (("normal", 20, math.nan), "denoise=nan"),
        (("normal", 20, 1.5), "denoise=1.5"),
        (("normal", 100, 1e-6), "steps/denoise"),
    ],
)
def test_what_has_no_schedule_is_refused(sampling, arguments, message):
    with pytest.raises(InvalidRequest, match=message):
        calculate_sigmas(sampling, *arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "sample"},
        {"trained_betas": [0.1, 0.2]},
    ],
)
def test_unknown_checkpoints_are_refused(change):
    with pytest.raises(SetupError, match=next(iter(change))):
        ModelSampling.from_scheduler_config({**SD1, **change})


def test_timestep_is_the_nearest_in_log_sigma(sampling):
    assert torch.equal(sampling.timestep(sampling.sigmas), torch.arange(1000))
    between = torch.sqrt(sampling.sigmas[500] * sampling.sigmas[501])
    assert sampling.timestep(between * 1.0001) == 501
    assert sampling.timestep(between * 0.9999) == 500
    assert sampling.timestep(between).dtype == torch.int64


def test_sigma_inverts_timestep(sampling):
    assert torch.allclose(sampling.sigma(torch.arange(1000)), sampling.sigmas, rtol=1e-6)


def test_percent_to_sigma_at_both_ends(sampling):
    assert sampling.percent_to_sigma(0.0) > 1e8
    assert sampling.percent_to_sigma(1.0) == 0.0
    assert sampling.percent_to_sigma(0.5) == pytest.approx(1.61, abs=0.01)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_denoised_recovers_the_image_from_a_perfect_network(prediction_type):
    sampling = ModelSampling.from_scheduler_config({**SD1, "prediction_type": prediction_type})
    image, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.manual_seed(0))
    sigma = torch.tensor([0.1, 1.0, 10.0])
    wide = sigma[:, None, None, None]
    alpha, deviation = sampling.input_scale(wide), wide * sampling.input_scale(wide)
    velocity = alpha * noise - deviation * image
    output = noise if prediction_type == "epsilon" else velocity
    denoised = sampling.denoised(image + wide * noise, sigma, output)
    assert torch.allclose(denoised, image, atol=1e-5)


def test_start_from_pure_noise_has_unit_variance_before_the_network(sampling):
    noise = torch.randn(1, 4, 64, 64, generator=torch.manual_seed(0))
    x = sampling.start(noise, torch.zeros_like(noise), sampling.sigma_max)
    assert torch.allclose(x * sampling.input_scale(sampling.sigma_max), noise, atol=1e-6)


def test_start_from_an_image_adds_sigma_times_noise(sampling):
    noise, latent = torch.randn(2, 1, 4, 8, 8, generator=torch.manual_seed(0))
    assert torch.equal(sampling.start(noise, latent, 2.0), noise * 2.0 + latent)
