"""Our samplers beside diffusers' schedulers: one network, one x_T, one noise, hence one x_0."""

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
STEPS = 28  # of 1000 levels every 37th, both ends included, in our uniform grid and their linspace
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
# Their names of our settings.
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}


def _network(xp, x, time, variance=False):
    """A smooth output for x [B, h, w, C] at time [B], with as many channels more for a variance."""
    time = xp.arcsinh(time)[:, None, None, None]
    output = 0.8 * x + 0.3 * xp.tanh(x + 0.5 * xp.roll(x, 1, axis=-1)) * xp.cos(time)
    output = output + 0.2 * xp.sin(2 * time)
    if variance:
        output = xp.concatenate([output, xp.sin(x + time)], axis=-1)
    return output


class Ours:
    """A sampler of ours, built and called as `generate` does."""

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

    def theirs(self, scheduler, **options):
        """A scheduler of theirs on the levels of process ddpm."""
        config = self.config.diffusion
        theirs = scheduler(
            num_train_timesteps=config.num_steps,
            beta_schedule=SCHEDULES[config.schedule],
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            prediction_type=PREDICTIONS[self.config.objective.prediction],
            **options,
        )
        # 1 - alpha_bar loses 3e-4 of itself in the first levels if, as theirs, alpha_bar is f32.
        theirs.alphas_cumprod = torch.cumprod(1 - theirs.betas.double(), dim=0)
        return theirs


def _to_torch(array):
    return torch.from_numpy(np.moveaxis(np.asarray(array, np.float64), -1, 1).copy())


def _to_numpy(tensor):
    return np.moveaxis(tensor.double().numpy(), 1, -1)


def _predict(x, time, variance=False):
    """The network between torch's NCHW, in f64."""
    return _to_torch(_network(np, _to_numpy(x), np.full(len(x), float(time)), variance))


def _run(theirs, own, x_T=None, **options):
    x = _to_torch(own.x_T if x_T is None else x_T)
    for time in theirs.timesteps:
        scaled = theirs.scale_model_input(x, time) if hasattr(theirs, "scale_model_input") else x
        x = theirs.step(_predict(scaled, time, own.variance), time, x, **options).prev_sample
    return _to_numpy(x)


def _use_noise(monkeypatch, theirs, noise):
    """Lets a scheduler draw these arrays in turn."""
    arrays = iter(noise)
    module = sys.modules[type(theirs).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: _to_torch(next(arrays)))


def _compare(x_0, expected):
    """Most differ by less than 1e-6, by 7e-6 where their beta of 0.999 is f32."""
    error = np.abs(x_0 - expected).max() / np.abs(expected).max()
    print(f"{error:.1e} of the largest value")
    assert error < 2e-5


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize(
    ("variance", "variance_type"),
    [("small", "fixed_small"), ("large", "fixed_large"), (None, "learned_range")],
)
def test_ddpm(schedule, prediction, variance, variance_type, monkeypatch):
    changes = {"objective.prediction": prediction, "sample.variance": variance or "large"}
    changes |= SCALED_LINEAR if schedule == "scaled_linear" else {"diffusion.schedule": schedule}
    own = Ours(changes, variance=not variance)
    theirs = own.theirs(diffusers.DDPMScheduler, variance_type=variance_type, clip_sample=False)
    theirs.set_timesteps(timesteps=own.index.tolist())
    _use_noise(monkeypatch, theirs, own.noise)
    _compare(own.run(), _run(theirs, own))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_ddim(prediction, eta, monkeypatch):
    changes = {"sample.sampler": "ddim", "sample.grid": "ddim", "sample.steps": 20}
    own = Ours(changes | {"objective.prediction": prediction, "sample.eta": eta})
    theirs = own.theirs(diffusers.DDIMScheduler, clip_sample=False)
    theirs.set_timesteps(20)
    np.testing.assert_array_equal(theirs.timesteps, own.index)
    _use_noise(monkeypatch, theirs, own.noise)
    _compare(own.run(), _run(theirs, own, eta=eta))


def test_ddim_from_no_signal():
    changes = {
        "sample.sampler": "ddim",
        "sample.steps": 50,
        "objective.prediction": "v",
        "diffusion.num_steps": 50,
        "diffusion.beta_start": 0.002,
        "diffusion.beta_end": 0.3,
        "diffusion.zero_terminal_snr": True,
    }
    own = Ours(changes)
    theirs = own.theirs(diffusers.DDIMScheduler, clip_sample=False, rescale_betas_zero_snr=True)
    assert theirs.alphas_cumprod[-1] == 0
    theirs.set_timesteps(50)
    _compare(own.run(), _run(theirs, own))


def test_ddim_inversion():
    own = Ours({"sample.sampler": "ddim", "sample.grid": "ddim", "sample.steps": 20})
    theirs = own.theirs(diffusers.DDIMInverseScheduler, clip_sample=False)
    theirs.set_timesteps(20)
    _compare(own.run(solvers.invert_ddim), _run(theirs, own))


DPMPP = [
    ("dpmpp1", dict(solver_order=1)),
    ("dpmpp2m", dict(solver_order=2)),
    ("dpmpp2m_sde", dict(solver_order=2, algorithm_type="sde-dpmsolver++")),
]


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize(("sampler", "solver"), DPMPP)
def test_dpmpp(sampler, solver, prediction, monkeypatch):
    own = Ours({"sample.sampler": sampler, "objective.prediction": prediction})
    theirs = own.theirs(diffusers.DPMSolverMultistepScheduler, **solver)
    theirs.set_timesteps(timesteps=own.index.tolist())
    _use_noise(monkeypatch, theirs, own.noise)
    _compare(own.run(), _run(theirs, own))


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
def test_dpmpp_in_continuous_time(sampler, solver, changes, monkeypatch):
    """Their formulas at our times: their own grids are of indices."""
    own = Ours(changes | {"sample.sampler": sampler})
    process, grid = own.process, own.sampler.grid
    sigma = process.sigma(grid)
    if changes["diffusion.process"] == "flow":
        solver = solver | dict(use_flow_sigmas=True, prediction_type="flow_prediction")
    else:
        solver = solver | dict(prediction_type=PREDICTIONS[own.config.objective.prediction])
        sigma = sigma / process.alpha(grid)
    theirs = diffusers.DPMSolverMultistepScheduler(**solver)
    theirs.set_timesteps(STEPS)
    theirs.set_begin_index(0)
    theirs.sigmas = torch.from_numpy(sigma)
    theirs.timesteps = torch.from_numpy(process.network_time(grid[:-1]))
    _use_noise(monkeypatch, theirs, own.noise)
    _compare(own.run(), _run(theirs, own))


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_heun(prediction):
    """Theirs runs on x_t / alpha."""
    own = Ours({"sample.sampler": "heun", "objective.prediction": prediction})
    theirs = own.theirs(diffusers.HeunDiscreteScheduler)
    theirs.set_timesteps(timesteps=own.index)
    x_T = own.x_T / own.process.alpha(np.ones(()))
    _compare(own.run(), _run(theirs, own, x_T))


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("ab2", 2), ("ab4", 4)])
def test_adams_bashforth(sampler, order):
    """Theirs on x_t / alpha, but for our correction of the first step in the second of order 4."""
    own = Ours({"sample.sampler": sampler})
    theirs = own.theirs(diffusers.LMSDiscreteScheduler)
    theirs.set_timesteps(STEPS)
    np.testing.assert_array_equal(theirs.timesteps, own.index)
    x = _to_torch(own.x_T / own.process.alpha(np.ones(())))
    for i, time in enumerate(theirs.timesteps):
        output = _predict(theirs.scale_model_input(x, time), time)
        x = theirs.step(output, time, x, order=order).prev_sample
        if order == 4 and i == 1:
            first, second = theirs.derivatives
            x = x + (theirs.sigmas[1] - theirs.sigmas[0]) * (second - first) / 2
    _compare(own.run(), _to_numpy(x))


@pytest.mark.parametrize(
    ("sampler", "scheduler", "options"),
    [
        ("euler", diffusers.EDMEulerScheduler, {}),
        *[(name, diffusers.EDMDPMSolverMultistepScheduler, options) for name, options in DPMPP],
    ],
)
def test_edm(sampler, scheduler, options, monkeypatch):
    own = Ours(EDM | {"sample.sampler": sampler})
    theirs = scheduler(**options)
    theirs.set_timesteps(STEPS)
    sigma = own.process.sigma(own.sampler.grid)
    assert_trees_close(theirs.sigmas.tolist(), sigma.tolist(), 1e-5)  # each by itself
    _use_noise(monkeypatch, theirs, own.noise)
    _compare(own.run(), _run(theirs, own))


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
def test_edm_heun(churn, monkeypatch):
    """Their steps of Karras et al. 2022, algorithm 2, at our sigmas; their network says -eps."""
    churn = {f"sample.{key}": value for key, value in churn.items()}
    own = Ours(EDM | {"sample.sampler": "heun"} | churn)
    settings = own.config.sample
    low, high = settings.churn_range
    theirs = diffusers.KarrasVeScheduler(
        s_noise=settings.churn_noise, s_churn=settings.churn, s_min=low, s_max=high
    )
    theirs.set_timesteps(STEPS)
    _use_noise(monkeypatch, theirs, own.noise)
    preconditioning = diffusers.EDMEulerScheduler()

    def predict(x, sigma):
        sigma = torch.tensor(sigma)
        time = preconditioning.precondition_noise(sigma)
        output = _predict(preconditioning.precondition_inputs(x, sigma), time)
        return (preconditioning.precondition_outputs(x, output, sigma) - x) / sigma

    x = _to_torch(own.x_T)
    sigmas = own.process.sigma(own.sampler.grid)
    for sigma, next_sigma in itertools.pairwise(sigmas):
        x_hat, sigma_hat = theirs.add_noise_to_input(x, sigma)
        output = predict(x_hat, sigma_hat)
        step = theirs.step(output, sigma_hat, next_sigma, x_hat)
        x = step.prev_sample
        if next_sigma:
            output = predict(x, next_sigma)
            step = theirs.step_correct(output, sigma_hat, next_sigma, x_hat, x, step.derivative)
            x = step.prev_sample
    _compare(own.run(), _to_numpy(x))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_flow(sampler, shift):
    grid = {"sample.grid": "uniform" if shift == 1 else "shifted", "sample.shift": shift}
    own = Ours(FLOW | grid | {"sample.sampler": sampler})
    name = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}
    theirs = getattr(diffusers, name[sampler])(shift=shift)
    theirs.sigma_max, theirs.sigma_min = 1.0, 1 / STEPS  # theirs are of the levels, shifted once
    theirs.set_timesteps(STEPS)
    _compare(own.run(), _run(theirs, own))
