"""Tapes against diffusers' own loops, for every sampler and schedule, with a formula for a network."""

import diffusers
import pytest
import torch

from models.errors import InvalidRequest
from models.samplers import SAMPLERS, SCHEDULES
from models.tapes import HISTORY, M, Tapes, X, Z, compile_tape

CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
PAIRS = [(sampler, schedule) for sampler, named in SAMPLERS.items() for schedule in named.schedules]


def network(x: torch.Tensor, t: float) -> torch.Tensor:
    """Anything smooth and not linear."""
    return torch.tanh(x * 0.8 + t / 1000) + 0.1 * torch.roll(x, 1, -1)


def by_diffusers(scheduler, steps: int, strength: float | None, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    if strength is None:
        x = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    else:
        skipped = (steps - min(int(steps * strength), steps)) * scheduler.order
        timesteps = timesteps[skipped:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped)
        x = torch.randn(1, 4, 8, 8, generator=generator)
        x = scheduler.add_noise(clean(), x, timesteps[:1])
    accepted = scheduler.step.__code__.co_varnames
    options = ({"generator": generator} if "generator" in accepted else {}) | (
        {"eta": 0.0} if "eta" in accepted else {}
    )
    for t in timesteps:
        m = network(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(m, t, x, **options, return_dict=False)[0]
    return x


def by_tape(tape, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = tape.signal * clean() + tape.noise * torch.randn(1, 4, 8, 8, generator=generator)
    xs, ms = [x] * (HISTORY + 1), [torch.zeros_like(x)] * (HISTORY + 1)
    for i, row in enumerate(tape.coefficients):
        m = network(xs[0] * tape.input_scales[i], float(tape.timesteps[i]))
        ms = [m, *ms[:HISTORY]]
        x = sum(a * v for a, v in zip(row[X], xs, strict=True)) + sum(b * v for b, v in zip(row[M], ms, strict=True))
        if tape.draws[i]:
            x = x + row[Z] * torch.randn(1, 4, 8, 8, generator=generator)
        xs = [x, *xs[:HISTORY]]
    return xs[0]


def clean() -> torch.Tensor:
    return torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8)


@pytest.mark.parametrize("strength", [None, 0.6, 1.0])
@pytest.mark.parametrize(("sampler", "schedule"), PAIRS)
def test_a_tape_walks_where_diffusers_walks(sampler, schedule, strength):
    tapes = Tapes(CONFIG)
    for steps in (4, 13):
        expected = by_diffusers(tapes.scheduler(sampler, schedule), steps, strength, seed=steps)
        actual = by_tape(tapes.get(sampler, schedule, steps, strength), seed=steps)
        assert (actual - expected).abs().max() / expected.abs().max() < 1e-4


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_other_predictions_walk_alike(prediction):
    tapes = Tapes(CONFIG | {"prediction_type": prediction})
    for sampler in ("euler", "ddim", "dpmpp_2m", "unipc"):
        expected = by_diffusers(tapes.scheduler(sampler, "default"), 9, None, seed=2)
        assert (by_tape(tapes.get(sampler, "default", 9), seed=2) - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_estimates_undo_the_noise(prediction):
    """With the very prediction that belongs to clean latents and noise, the estimate is the clean latents."""
    tape = Tapes(CONFIG | {"prediction_type": prediction}).get("euler", "default", 10)
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2, 0)
    noise = torch.randn(256, generator=torch.Generator().manual_seed(0))
    x0 = clean().flatten()
    for i, t in enumerate(tape.timesteps.long()):
        a, s = abar[t].sqrt().float(), (1 - abar[t]).sqrt().float()
        x = (a * x0 + s * noise) / tape.input_scales[i]
        m = {"epsilon": noise, "v_prediction": a * noise - s * x0, "sample": x0}[prediction]
        p, q = tape.estimates[i]
        assert torch.allclose(p * x + q * m, x0, atol=2e-2)


def test_a_scheduler_that_is_not_linear_is_refused():
    with pytest.raises(InvalidRequest, match="not linear"):
        compile_tape(diffusers.DDIMScheduler.from_config(CONFIG | {"clip_sample": True}), 10, None)


def test_steps_that_diffusers_refuses_are_the_callers_mistake():
    with pytest.raises(InvalidRequest, match="steps"):
        Tapes(CONFIG).get("lcm", "default", 80)


def test_a_strength_too_small_for_a_step_gives_an_empty_tape():
    tape = Tapes(CONFIG).get("euler", "default", 10, 0.05)
    assert (len(tape), tape.signal, tape.noise) == (0, 1.0, 0.0)


def test_tapes_are_kept_and_never_mixed_up():
    tapes = Tapes(CONFIG)
    assert tapes.get("heun", "karras", 7) is tapes.get("heun", "karras", 7)
    assert len(tapes.get("heun", "karras", 7)) == 13
    assert len(tapes.get("heun", "karras", 8)) == 15
    assert set(SCHEDULES) == {"default", "karras", "exponential", "beta", "sgm_uniform"}


CONTINUOUS = CONFIG | {
    "_class_name": "EulerDiscreteScheduler",
    "prediction_type": "v_prediction",
    "timestep_type": "continuous",
}


@pytest.mark.parametrize("interpolation", ["linear", "log_linear"])
@pytest.mark.parametrize("schedule", SAMPLERS["euler"].schedules)
def test_a_network_of_continuous_time_is_told_the_logarithm_of_the_noise(schedule: str, interpolation: str):
    tapes = Tapes(CONTINUOUS | {"interpolation_type": interpolation})
    tape, scheduler = tapes.get("euler", schedule, 8), tapes.scheduler("euler", schedule)
    scheduler.set_timesteps(8)
    sigmas = scheduler.sigmas[: len(tape)]
    assert torch.allclose(tape.timesteps, sigmas.log() / 4, atol=2e-5)
    last = tape.coefficients[-1]  # without noise that is left, the next latents are the clean ones that are expected
    if sigmas[-1] > 0 and scheduler.sigmas[len(tape)] == 0:
        assert torch.allclose(tape.estimates[-1], torch.stack([last[X.start], last[M.start]]), atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_continuous_time_is_the_same_noise_as_the_timestep(sampler: str):
    discrete = Tapes(CONTINUOUS | {"timestep_type": "discrete"}).get(sampler, "default", 8)
    told = Tapes(CONTINUOUS).get(sampler, "default", 8).timesteps
    abar = diffusers.DDIMScheduler(**{k: CONFIG[k] for k in ("beta_start", "beta_end", "beta_schedule")}).alphas_cumprod
    near = abar[discrete.timesteps.round().long()]
    assert torch.allclose(told, (1 / near - 1).log() / 8, atol=0.05)
    assert torch.equal(told, told.sort(descending=True).values) or sampler in ("heun", "dpm2", "dpm2_a", "pndm")
