"""The random numbers of a request: reproducible, its own, and of the right law."""

import pytest
import torch

from fullpipe.noise import SamplerNoise, start_noise

SHAPE = (2, 4, 16, 16)

pytestmark = pytest.mark.filterwarnings("ignore:Should have t:UserWarning")


def test_start_noise_of_a_batch_begins_with_the_single_image():
    assert torch.equal(start_noise(7, 3, 16, 24)[:1], start_noise(7, 1, 16, 24))


def test_start_noise_is_torchs_own_sequence_and_leaves_the_global_one_alone():
    before = torch.random.get_rng_state()
    noise = start_noise(5, 1, 8, 8)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(noise, torch.randn([1, 4, 8, 8], generator=torch.manual_seed(5)))


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
@pytest.mark.parametrize("kind", ["normal", "brownian", "brownian_gpu"])
def test_every_seed_of_the_contract_draws(kind, seed):
    assert start_noise(seed, 1, 8, 8).isfinite().all()
    noise = SamplerNoise(kind, seed, SHAPE, 0.03, 14.6)
    drawn = noise.draw((14.6, 5.0))
    assert drawn.shape == SHAPE
    assert drawn.dtype == torch.float32
    assert abs(float(drawn.std()) - 1) < 0.1


@pytest.mark.parametrize("kind", ["normal", "brownian"])
def test_draws_depend_on_the_seed_alone(kind):
    def draws(seed):
        noise = SamplerNoise(kind, seed, SHAPE, 0.03, 14.6)
        return torch.stack([noise.draw((14.6, 5.0)), noise.draw((5.0, 1.0))])

    assert torch.equal(draws(1), draws(1))
    assert not torch.equal(draws(1), draws(2))


def test_a_brownian_path_adds_up():
    noise = SamplerNoise("brownian", 3, SHAPE, 0.03, 14.6)
    parts = noise.draw((14.6, 5.0)) * 9.6**0.5 + noise.draw((5.0, 1.0)) * 4.0**0.5
    assert torch.allclose(parts, noise.draw((14.6, 1.0)) * 13.6**0.5, atol=1e-4)


def test_a_sampler_without_noise_has_none_to_draw():
    with pytest.raises(ValueError, match="draws no noise"):
        SamplerNoise("none", 0, SHAPE, 0.03, 14.6).draw((1.0, 0.5))
