"""Samplers against diffusers' schedulers, with the same network, x_T and noise."""

import itertools
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.close import assert_trees_close

from configs import default
from dit_jax import diffusion
from dit_jax.diffusion import samplers, solvers

SHAPE = (2, 4, 4, 3)  # [B, h, w, C]
STEPS = 28  # every 37th of 1000 levels with both ends: both uniform and diffusers' linspace
SCALED_LINEAR = {
    "diffusion.schedule": "scaled_linear",
    "diffusion.beta_start": 0.00085,
    "diffusion.beta_end": 0.012,
}
EDM = {
    "diffusion.process": "edm",
    "diffusion.sigma_data": 0.5,
    "objective.prediction": "edm",
    "sample.grid": "karras",
}
FLOW = {"diffusion.process": "flow", "objective.prediction": "u"}
# Our settings -> diffusers' names for them.
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}


def _network(xp, x, time, variance=False):
    """Returns a smooth output for x [B, h, w, C] at time [B]; a variance doubles its channels."""
    time = xp.arcsinh(time)[:, None, None, None]
    output = 0.8 * x + 0.3 * xp.tanh(x + 0.5 * xp.roll(x, 1, axis=-1)) * xp.cos(time)
    output = output + 0.2 * xp.sin(2 * time)
    if variance:
        output = xp.concatenate([output, xp.sin(x + time)], axis=-1)
    return output


class Setup:
    """A sampler of dit_jax with its inputs, and the scheduler of diffusers for the same config."""

    def __init__(self, changes, variance=False):
        config = default.get_config()
        config.sample.steps = STEPS
        config.update_from_flattened_dict(changes)
        self.config, self.variance = config, variance
        self.process = diffusion.build(config.diffusion)
        prediction = config.objective.prediction
        self.sampler = samplers.build(config.sample, self.process, prediction)
        grid = self.sampler.grid
        self.index = np.rint(self.process.network_time(grid[:-1])).astype(int)  # of process ddpm
        rng = np.random.default_rng(0)
        self.x_T = self.process.x_T_std * rng.normal(size=SHAPE)
        self.noise = rng.normal(size=(len(grid) - 1, *SHAPE))

        def predict(x_t, time):
            return _network(jnp, x_t, time, variance)

        noise = jnp.asarray(self.noise, jnp.float32)
        denoise = solvers.make_denoise(self.process, prediction, predict, self.sampler.times)
        parts = [(denoise, len(grid) - 1)]
        self.problem = solvers.Problem(self.process, grid, parts, lambda i: noise[i])

    def run(self, solve=None):
        x_0, finite = jax.jit(lambda x: (solve or self.sampler.solve)(self.problem, x))(
            self.x_T.astype(np.float32)
        )
        assert finite.all()
        return np.asarray(x_0)

    def build_scheduler(self, scheduler_class, **options):
        """Builds a scheduler of diffusers on the levels of process ddpm."""
        config = self.config.diffusion
        scheduler = scheduler_class(
            num_train_timesteps=config.num_steps,
            beta_schedule=SCHEDULES[config.schedule],
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            prediction_type=PREDICTIONS[self.config.objective.prediction],
            **options,
        )
        # In diffusers alpha_bar is f32, which costs 1 - alpha_bar 3e-4 of its value at first.
        scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), dim=0)
        return scheduler


def _to_torch(array):
    return torch.from_numpy(np.moveaxis(np.asarray(array, np.float64), -1, 1).copy())


def _to_numpy(tensor):
    return np.moveaxis(tensor.double().numpy(), 1, -1)


def _predict(x, time, variance=False):
    """Applies the network in f64 to a tensor NCHW."""
    return _to_torch(_network(np, _to_numpy(x), np.full(len(x), float(time)), variance))


def _run(scheduler, setup, x_T=None, **options):
    x = _to_torch(setup.x_T if x_T is None else x_T)
    for time in scheduler.timesteps:
        scaled = (
            scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
        )
        x = scheduler.step(_predict(scaled, time, setup.variance), time, x, **options).prev_sample
    return _to_numpy(x)


def _use_noise(monkeypatch, scheduler, noise):
    """Makes the scheduler draw these arrays in turn."""
    arrays = iter(noise)
    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: _to_torch(next(arrays)))


def _compare(x_0, expected):
    """Most results differ by less than 1e-6, but by 7e-6 with diffusers' f32 beta of 0.999."""
    error = np.abs(x_0 - expected).max() / np.abs(expected).max()
    print(f"{error:.1e} of the largest value")
    assert error < 2e-5


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize(
    ("variance", "variance_type"),
    [("small", "fixed_small"), ("large", "fixed_large"), (None, "learned_range")],
)
def test_ddpm_agrees_with_diffusers(schedule, prediction, variance, variance_type, monkeypatch):
    changes = {"objective.prediction": prediction, "sample.variance": variance or "large"}
    changes |= SCALED_LINEAR if schedule == "scaled_linear" else {"diffusion.schedule": schedule}
    setup = Setup(changes, variance=not variance)
    scheduler = setup.build_scheduler(
        diffusers.DDPMScheduler, variance_type=variance_type, clip_sample=False
    )
    scheduler.set_timesteps(timesteps=setup.index.tolist())
    _use_noise(monkeypatch, scheduler, setup.noise)
    _compare(setup.run(), _run(scheduler, setup))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_ddim_agrees_with_diffusers(prediction, eta, monkeypatch):
    changes = {"sample.sampler": "ddim", "sample.grid": "ddim", "sample.steps": 20}
    setup = Setup(changes | {"objective.prediction": prediction, "sample.eta": eta})
    scheduler = setup.build_scheduler(diffusers.DDIMScheduler, clip_sample=False)
    scheduler.set_timesteps(20)
    np.testing.assert_array_equal(scheduler.timesteps, setup.index)
    _use_noise(monkeypatch, scheduler, setup.noise)
    _compare(setup.run(), _run(scheduler, setup, eta=eta))


def test_ddim_with_zero_terminal_snr_agrees_with_diffusers():
    changes = {
        "sample.sampler": "ddim",
        "sample.steps": 50,
        "objective.prediction": "v",
        "diffusion.num_steps": 50,
        "diffusion.beta_start": 0.002,
        "diffusion.beta_end": 0.3,
        "diffusion.zero_terminal_snr": True,
    }
    setup = Setup(changes)
    scheduler = setup.build_scheduler(
        diffusers.DDIMScheduler, clip_sample=False, rescale_betas_zero_snr=True
    )
    assert scheduler.alphas_cumprod[-1] == 0
    scheduler.set_timesteps(50)
    _compare(setup.run(), _run(scheduler, setup))


def test_ddim_inversion_agrees_with_diffusers():
    setup = Setup({"sample.sampler": "ddim", "sample.grid": "ddim", "sample.steps": 20})
    scheduler = setup.build_scheduler(diffusers.DDIMInverseScheduler, clip_sample=False)
    scheduler.set_timesteps(20)
    _compare(setup.run(solvers.invert_ddim), _run(scheduler, setup))


DPMPP = [
    ("dpmpp1", dict(solver_order=1)),
    ("dpmpp2m", dict(solver_order=2)),
    ("dpmpp2m_sde", dict(solver_order=2, algorithm_type="sde-dpmsolver++")),
]


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize(("sampler", "solver"), DPMPP)
def test_dpmpp_agrees_with_diffusers(sampler, solver, prediction, monkeypatch):
    setup = Setup({"sample.sampler": sampler, "objective.prediction": prediction})
    scheduler = setup.build_scheduler(diffusers.DPMSolverMultistepScheduler, **solver)
    scheduler.set_timesteps(timesteps=setup.index.tolist())
    _use_noise(monkeypatch, scheduler, setup.noise)
    _compare(setup.run(), _run(scheduler, setup))


@pytest.mark.parametrize(("sampler", "solver"), DPMPP)
@pytest.mark.parametrize(
    "changes",
    [
        {"diffusion.process": "vp", "sample.grid": "karras"},
        {"diffusion.process": "gvp"},
        FLOW | {"sample.grid": "shifted"},
    ],
    ids=["vp", "gvp", "flow"],
)
def test_dpmpp_in_continuous_time_agrees_with_diffusers(sampler, solver, changes, monkeypatch):
    """The scheduler gets the times of dit_jax, because its own grids hold indices of levels."""
    setup = Setup(changes | {"sample.sampler": sampler})
    process, grid = setup.process, setup.sampler.grid
    sigma = process.sigma(grid)
    if changes["diffusion.process"] == "flow":
        solver = solver | dict(use_flow_sigmas=True, prediction_type="flow_prediction")
    else:
        solver = solver | dict(prediction_type=PREDICTIONS[setup.config.objective.prediction])
        sigma = sigma / process.alpha(grid)
    scheduler = diffusers.DPMSolverMultistepScheduler(**solver)
    scheduler.set_timesteps(STEPS)
    scheduler.set_begin_index(0)
    scheduler.sigmas = torch.from_numpy(sigma)
    scheduler.timesteps = torch.from_numpy(process.network_time(grid[:-1]))
    _use_noise(monkeypatch, scheduler, setup.noise)
    _compare(setup.run(), _run(scheduler, setup))


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_heun_agrees_with_diffusers(prediction):
    """The scheduler works on x_t / alpha."""
    setup = Setup({"sample.sampler": "heun", "objective.prediction": prediction})
    scheduler = setup.build_scheduler(diffusers.HeunDiscreteScheduler)
    scheduler.set_timesteps(timesteps=setup.index)
    x_T = setup.x_T / setup.process.alpha(np.ones(()))
    _compare(setup.run(), _run(scheduler, setup, x_T))


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("ab2", 2), ("ab4", 4)])
def test_adams_bashforth_agrees_with_diffusers(sampler, order):
    """The scheduler works on x_t / alpha, and lacks ab4's correction of the first step."""
    setup = Setup({"sample.sampler": sampler})
    scheduler = setup.build_scheduler(diffusers.LMSDiscreteScheduler)
    scheduler.set_timesteps(STEPS)
    np.testing.assert_array_equal(scheduler.timesteps, setup.index)
    x = _to_torch(setup.x_T / setup.process.alpha(np.ones(())))
    for i, time in enumerate(scheduler.timesteps):
        output = _predict(scheduler.scale_model_input(x, time), time)
        x = scheduler.step(output, time, x, order=order).prev_sample
        if order == 4 and i == 1:
            first, second = scheduler.derivatives
            x = x + (scheduler.sigmas[1] - scheduler.sigmas[0]) * (second - first) / 2
    _compare(setup.run(), _to_numpy(x))


@pytest.mark.parametrize(
    ("sampler", "scheduler_class", "options"),
    [
        ("euler", diffusers.EDMEulerScheduler, {}),
        *[(name, diffusers.EDMDPMSolverMultistepScheduler, options) for name, options in DPMPP],
    ],
)
def test_edm_agrees_with_diffusers(sampler, scheduler_class, options, monkeypatch):
    setup = Setup(EDM | {"sample.sampler": sampler})
    scheduler = scheduler_class(**options)
    scheduler.set_timesteps(STEPS)
    sigma = setup.process.sigma(setup.sampler.grid)
    assert_trees_close(scheduler.sigmas.tolist(), sigma.tolist(), 1e-5)  # each value alone
    _use_noise(monkeypatch, scheduler, setup.noise)
    _compare(setup.run(), _run(scheduler, setup))


@pytest.mark.parametrize(
    "churn",
    [
        dict(churn=0.0),
        dict(churn=40.0),
        dict(churn=4.0, churn_noise=1.007),
        dict(churn=40.0, churn_range=(0.05, 50.0), churn_noise=1.007),
    ],
    ids=["deterministic", "churn", "little churn", "churn in a range"],
)
def test_edm_heun_agrees_with_diffusers(churn, monkeypatch):
    """Karras et al. 2022, algorithm 2; this scheduler expects -eps from its network."""
    churn = {f"sample.{key}": value for key, value in churn.items()}
    setup = Setup(EDM | {"sample.sampler": "heun"} | churn)
    settings = setup.config.sample
    low, high = settings.churn_range
    scheduler = diffusers.KarrasVeScheduler(
        s_noise=settings.churn_noise, s_churn=settings.churn, s_min=low, s_max=high
    )
    scheduler.set_timesteps(STEPS)
    _use_noise(monkeypatch, scheduler, setup.noise)
    preconditioning = diffusers.EDMEulerScheduler()

    def predict(x, sigma):
        sigma = torch.tensor(sigma)
        time = preconditioning.precondition_noise(sigma)
        output = _predict(preconditioning.precondition_inputs(x, sigma), time)
        return (preconditioning.precondition_outputs(x, output, sigma) - x) / sigma

    x = _to_torch(setup.x_T)
    sigmas = setup.process.sigma(setup.sampler.grid)
    for sigma, next_sigma in itertools.pairwise(sigmas):
        x_hat, sigma_hat = scheduler.add_noise_to_input(x, sigma)
        output = predict(x_hat, sigma_hat)
        step = scheduler.step(output, sigma_hat, next_sigma, x_hat)
        x = step.prev_sample
        if next_sigma:
            output = predict(x, next_sigma)
            step = scheduler.step_correct(output, sigma_hat, next_sigma, x_hat, x, step.derivative)
            x = step.prev_sample
    _compare(setup.run(), _to_numpy(x))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_flow_samplers_agree_with_diffusers(sampler, shift):
    grid = {"sample.grid": "uniform" if shift == 1 else "shifted", "sample.shift": shift}
    setup = Setup(FLOW | grid | {"sample.sampler": sampler})
    name = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}
    scheduler = getattr(diffusers, name[sampler])(shift=shift)
    # By default these are the shifted sigmas of the levels, which would be shifted again.
    scheduler.sigma_max, scheduler.sigma_min = 1.0, 1 / STEPS
    scheduler.set_timesteps(STEPS)
    _compare(setup.run(), _run(scheduler, setup))
