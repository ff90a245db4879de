"""The tables: exact on problems with a known answer, finite everywhere, alike in any company."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fullpipe.errors import InvalidRequest
from fullpipe.samplers import REGISTERS, SAMPLERS, UNSUPPORTED, advance, build_table, get_sampler
from fullpipe.schedulers import SCHEDULERS, ModelSampling, calculate_sigmas

ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
NOISY = [name for name, sampler in SAMPLERS.items() if sampler.noise_kind != "none"]
# Ends at the last sigma above zero, without the step to the image.
STOPS_EARLY = {"dpm_fast"}
# One forgets the sample at each step; the other mixes predictions of two sigmas, as in ComfyUI.
LOSES_VARIANCE = {"lcm", "dpmpp_2s_ancestral_cfg_pp"}


@pytest.fixture(scope="module")
def sampling():
    return ModelSampling.from_scheduler_config({})


def run(table, x, predict, draw=torch.zeros_like, tally=None):
    """Walk a table as the loop does; predict(x, sigma) -> (denoised, uncond_denoised)."""
    registers = torch.zeros(len(x), REGISTERS, *x.shape[1:], dtype=x.dtype)
    registers[:, 0] = x
    for sigma, matrix, interval in zip(table.sigmas, table.matrices, table.noise, strict=True):
        denoised, uncond_denoised = predict(registers[:, 0], sigma)
        noise = draw(x) if interval else torch.zeros_like(x)
        rows = torch.from_numpy(matrix).to(x.dtype).expand(len(x), -1, -1)
        registers = advance(registers, denoised, uncond_denoised, noise, rows)
    return registers[:, 0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_network_that_knows_the_image_leads_to_it(sampling, name):
    image, noise = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64, generator=torch.manual_seed(0))
    sigmas = calculate_sigmas(sampling, "karras", 12, 1.0, name)
    table = build_table(name, sigmas, sampling)
    x = image + noise * float(sigmas[0])
    result = run(table, x, lambda x, sigma: (image, image), torch.randn_like)
    tolerance = 0.2 if name in STOPS_EARLY else 1e-2 if name.startswith("uni_pc") else 1e-9
    assert float((result - image).abs().max()) < tolerance


# Data of variance 1 have the exact denoiser x/(σ² + 1) and the ODE's solution x ∝ √(σ² + 1).
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in NOISY])
def test_deterministic_samplers_converge_to_the_solution_of_the_ode(sampling, name):
    def error(steps):
        sigmas = calculate_sigmas(sampling, "karras", steps, 1.0, name).double()
        x = torch.ones(1, 4, 1, 1, dtype=torch.float64) * torch.sqrt(sigmas[0] ** 2 + 1)
        table = build_table(name, sigmas, sampling)
        result = run(table, x, lambda x, sigma: (x / (sigma**2 + 1),) * 2)
        return float((result - 1).abs().max())

    assert error(160) < 0.03
    assert error(160) < 0.6 * error(40) or error(160) < 2e-3


@pytest.mark.parametrize("name", [name for name in NOISY if name not in LOSES_VARIANCE])
def test_stochastic_samplers_end_with_the_variance_of_the_data(sampling, name):
    generator = torch.manual_seed(0)
    sigmas = calculate_sigmas(sampling, "karras", 100, 1.0, name).double()
    noise = torch.randn(1, 4, 64, 64, dtype=torch.float64, generator=generator)
    x = noise * torch.sqrt(sigmas[0] ** 2 + 1)
    table = build_table(name, sigmas, sampling)
    result = run(
        table,
        x,
        lambda x, sigma: (x / (sigma**2 + 1),) * 2,
        lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator),
    )
    assert float(result.var()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_tables_are_finite_whatever_the_steps(sampling, name, scheduler):
    for steps in (1, 2, 3, 4, 5, 20):
        for denoise in (1.0, 0.6, 0.1):
            if scheduler == "kl_optimal" and int(steps / denoise) == 1:
                continue
            sigmas = calculate_sigmas(sampling, scheduler, steps, denoise, name)
            table = build_table(name, sigmas, sampling)
            assert np.isfinite(table.matrices).all()
            assert table.steps == len(sigmas) - 1
            assert table.step_of_row[-1] == table.steps
            assert (np.diff(table.step_of_row, prepend=0) <= 1).all()
            assert (table.sigmas > 0).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_tables_are_finite_from_infinite_noise(name):
    sampling = ModelSampling.from_scheduler_config(ZERO_SNR)
    table = build_table(name, calculate_sigmas(sampling, "simple", 20, 1.0, name), sampling)
    assert np.isfinite(table.matrices.astype(np.float32)).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_tables_start_from_register_0_alone(sampling, name):
    table = build_table(name, calculate_sigmas(sampling, "normal", 8, 1.0, name), sampling)
    assert not table.matrices[0][:, 1:REGISTERS].any()


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_say_what_they_use(sampling, name):
    sampler = get_sampler(name)
    table = build_table(name, calculate_sigmas(sampling, "karras", 20, 1.0, name), sampling)
    assert bool(table.matrices[:, :, REGISTERS + 1].any()) == sampler.needs_uncond
    draws = [interval is not None for interval in table.noise]
    uses = table.matrices[:, :, REGISTERS + 2].any(axis=1)
    assert not (uses & ~np.array(draws)).any()
    assert any(draws) == (sampler.noise_kind != "none")


def test_repeated_sigmas_are_refused_where_a_sampler_cannot_use_them(sampling):
    sigmas = calculate_sigmas(sampling, "simple", 1500)
    assert build_table("euler", sigmas, sampling).steps == 1500
    for name in ("dpmpp_2m", "dpmpp_sde", "uni_pc", "sa_solver", "res_multistep"):
        with pytest.raises(InvalidRequest, match=rf"{name}.*repeated"):
            build_table(name, sigmas, sampling)


@pytest.mark.parametrize("name", ["nonsense", "", "EULER", *UNSUPPORTED])
def test_unknown_samplers_are_refused_with_a_reason(name):
    with pytest.raises(InvalidRequest, match="sampler_name="):
        get_sampler(name)


def mixed_batch(sampling, dtype, slots):
    """Slots in the middle of different samplers, with everything that a tick needs."""
    generator = torch.manual_seed(1)
    names = [list(SAMPLERS)[i % len(SAMPLERS)] for i in range(slots)]
    tables = [
        build_table(name, calculate_sigmas(sampling, "karras", 10, 1.0, name), sampling)
        for name in names
    ]
    rows = torch.from_numpy(np.stack([t.matrices[i % 9] for i, t in enumerate(tables)]))

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    registers = random(slots, REGISTERS, 4, 9, 7)
    denoised, uncond_denoised, noise = random(3, slots, 4, 9, 7)
    return registers, denoised, uncond_denoised, noise, rows.to(dtype)


def test_advance_is_the_matrix_product(sampling):
    registers, denoised, uncond_denoised, noise, rows = mixed_batch(sampling, torch.float64, 8)
    columns = torch.cat([registers, torch.stack([denoised, uncond_denoised, noise], 1)], 1)
    expected = torch.einsum("bij,bjchw->bichw", rows, columns)
    moved = advance(registers, denoised, uncond_denoised, noise, rows)
    assert torch.allclose(moved, expected, atol=1e-12)


@pytest.mark.parametrize("slots", [2, 8, 32])
def test_a_slot_moves_alike_alone_and_in_company(sampling, slots):
    batch = mixed_batch(sampling, torch.float32, slots)
    together = advance(*batch)
    for i in range(slots):
        alone = advance(*(tensor[i : i + 1] for tensor in batch))
        assert torch.allclose(together[i], alone[0], rtol=0, atol=1e-5)


def test_a_broken_neighbour_stays_alone(sampling):
    batch = mixed_batch(sampling, torch.float32, 4)
    healthy = advance(*batch)
    batch[0][2] = torch.nan
    batch[1][2] = torch.inf
    assert torch.equal(advance(*batch)[[0, 1, 3]], healthy[[0, 1, 3]])


def test_advance_without_uncond_is_advance_with_zeros(sampling):
    registers, denoised, _, noise, rows = mixed_batch(sampling, torch.float32, 3)
    zeros = torch.zeros_like(denoised)
    assert torch.equal(
        advance(registers, denoised, None, noise, rows),
        advance(registers, denoised, zeros, noise, rows),
    )


def test_the_host_launches_as_much_for_one_slot_as_for_many(sampling):
    class Counter(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.operations += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for slots in (1, 8, 32):
        batch = mixed_batch(sampling, torch.float32, slots)
        with Counter() as counter:
            advance(*batch)
        counts.append(counter.operations)
    assert counts[0] == counts[1] == counts[2]
