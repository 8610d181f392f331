"""The processes against recorded values and identities of their distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.close import assert_close, assert_trees_close

from dit_jax.diffusion import processes

CONTINUOUS = ("vp", "flow", "gvp", "edm")
ALL = ("ddpm", *CONTINUOUS)


def test_q_sample_equals_the_published_process(golden, process):
    t = process.time_of_index(jnp.asarray(golden["t"]))
    x_t = processes.q_sample(process, golden["x_0"], t, golden["eps"])
    assert_close(x_t, golden["x_t"], 1e-6)


def test_time_of_index_inverts_network_time(process):
    index = jnp.arange(process.num_steps)
    t = process.time_of_index(index)
    np.testing.assert_array_equal(process.network_time(t), index)
    assert process.level(np.zeros(1))[0] == 0


@pytest.mark.parametrize("name", ["ddpm", "vp", "gvp"])
def test_variance_is_preserved(build_process, name):
    t = jnp.linspace(0, 1, 1001)
    process = build_process(name)
    assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, np.ones(1001), 1e-6)


@pytest.mark.parametrize("name", ALL)
def test_t_0_is_data_and_t_1_is_noise_with_the_initial_deviation_of_samplers(build_process, name):
    process = build_process(name)
    ends = np.array([0.0, 1.0])
    alpha, sigma = process.alpha(ends), process.sigma(ends)
    assert (alpha[0], sigma[0]) == (1, 0)
    assert sigma[1] == pytest.approx(process.x_T_std, rel=1e-4)
    assert alpha[1] / sigma[1] < 0.02


@pytest.mark.parametrize("name", ALL)
def test_numpy_arguments_give_f64_and_jax_arguments_f32(build_process, name):
    process = build_process(name)
    t = np.array([0.001, 0.25, 0.6, 0.999])
    functions = [process.alpha, process.sigma, process.snr, process.network_time]
    functions += [process.network_scale, process.snr_rate, process.velocity]
    for function in functions:
        in_f64, in_f32 = np.asarray(function(t)), jnp.asarray(function(jnp.asarray(t)))
        assert (in_f64.dtype, in_f32.dtype) == (np.float64, jnp.float32)
        assert_trees_close(in_f32.tolist(), in_f64.tolist(), 2e-4)  # each value alone


@pytest.mark.parametrize("name", CONTINUOUS)
def test_velocity_is_the_derivative_of_alpha_and_sigma(build_process, name):
    process = build_process(name)
    t, h = np.linspace(0.01, 0.98, 50), 1e-6
    for function, velocity in zip((process.alpha, process.sigma), process.velocity(t), strict=True):
        numeric = (function(t + h) - function(t - h)) / (2 * h)
        assert_close(velocity, numeric, 1e-6)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_snr_rate_is_minus_the_derivative_of_snr(build_process, name):
    process = build_process(name)
    t, h = np.linspace(0.01, 0.98, 50), 1e-6
    snr = [process.snr(t + d) for d in (-h, h)]
    numeric = (snr[0] - snr[1]) / (2 * h)
    assert_trees_close(process.snr_rate(t).tolist(), numeric.tolist(), 1e-5)  # each value alone


def test_snr_rates_of_a_chain_sum_to_the_whole_fall_of_snr(process):
    t = process.time_of_index(np.arange(1, 1000))  # levels 2 to 1000
    ends = process.snr(np.array([0.001, 1.0]))
    assert_close(process.snr_rate(t).sum() / 1000, ends[0] - ends[1], 1e-9)


@pytest.mark.parametrize("name", ALL)
def test_snr_decreases_and_time_of_ratio_inverts_it(build_process, name):
    process = build_process(name)
    t = np.linspace(0.001, 0.999, 999) if name != "edm" else np.geomspace(1e-5, 1, 999)
    snr = process.snr(t)
    assert np.all(np.diff(snr) < 0)
    inverse = process.time_of_ratio(snr**-0.5)
    assert_trees_close(inverse.tolist(), t.tolist(), 1e-6)  # each value alone


def test_schedules_equal_their_published_formulas(build_process):

    def alpha_bar(**changes):
        return build_process("ddpm", **changes).alpha_bar

    k = np.array([0, 10, 500, 900])
    f = np.cos((k / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    cosine = alpha_bar(schedule="cosine")
    assert_close(cosine[k], f / f[0], 1e-9)
    assert cosine[-1] / cosine[-2] == pytest.approx(1 - 0.999)  # the formula's last beta is 1
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    scaled = alpha_bar(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert_close(scaled[1:], np.cumprod(1 - betas), 1e-10)
    ends = alpha_bar(zero_terminal_snr=True)[[0, 1, -1]]
    assert_close(ends, [1, 1 - 1e-4, 0], 1e-12)


@pytest.mark.parametrize("name", ALL)
def test_network_scale_gives_unit_variance_at_t_1(build_process, name):
    process = build_process(name)
    t = np.ones(1)
    x_std = np.hypot(process.alpha(t) * process.sigma_data, process.sigma(t))
    assert_close(process.network_scale(t) * x_std, np.ones(1), 1e-6)


@pytest.mark.parametrize("name", ALL)
def test_posterior_composes_to_the_marginal(build_process, name):
    """Integrating q(x_s | x_t, x_0) over q(x_t | x_0) must give q(x_s | x_0)."""
    process = build_process(name)
    t, s = np.array([0.9, 0.5, 0.1]), np.array([0.7, 0.2, 0.05])
    p = process.posterior(t, s)
    assert_close(p.x_0_coef + p.x_t_coef * process.alpha(t), process.alpha(s), 1e-9)
    variance = p.x_t_coef**2 * process.sigma(t) ** 2 + np.exp(p.log_variance)
    assert_close(variance, process.sigma(s) ** 2, 1e-9)


def test_posterior_replaces_the_variance_of_the_step_to_data_by_the_one_before(process):
    levels = np.arange(1000, -1, -1) / 1000
    p = process.posterior(levels[:-1], levels[1:])
    assert np.isfinite(p.log_variance).all()
    assert p.log_variance[-1] == p.log_variance[-2] != p.log_variance[-3]


@pytest.mark.parametrize("name", [*ALL, "ddpm without signal"])
def test_ode_equals_the_numeric_velocity_of_x_t(build_process, name):
    """For any x_0 and eps, d(x_t / scale) / d clock follows from x_t = alpha x_0 + sigma eps."""
    changes = dict(zero_terminal_snr=True) if name == "ddpm without signal" else {}
    name = name.split()[0]
    process = build_process(name, **changes)
    x_0, eps = 0.3, -1.2
    t = np.linspace(0.2, 0.9, 2001) if name != "ddpm" else np.arange(200, 901) / 1000
    ode = process.ode(t)
    x = process.alpha(t) * x_0 + process.sigma(t) * eps
    numeric = np.gradient(x / ode.scale, ode.clock, edge_order=2)
    assert_close(ode.x_0_coef * x_0 + ode.eps_coef * eps, numeric, 1e-4)


def test_training_times_are_levels_of_a_chain_or_clipped_to_the_allowed_range(build_process):
    u = jnp.array([0.0, 1e-9, 0.4321, 1 - 2**-24])
    chain, flow = build_process("ddpm"), build_process("flow")
    assert_close(chain.map_uniform(u, 0.1), [0.001, 0.001, 0.433, 1], 1e-7)
    assert_close(chain.clip_time(u, 0.1), [0.001, 0.001, 0.432, 1], 1e-7)
    assert_close(flow.clip_time(u, 0.1), [0.1, 0.1, 0.4321, 1], 2e-6)
    assert flow.clip_time(u, 0.1)[-1] < 1  # at 1 the weights for eps are infinite
    level = chain.level(chain.map_uniform(jax.random.uniform(jax.random.key(0), (20_000,)), 0.0))
    assert (level.min(), level.max()) == (1, 1000)
    assert abs(float(level.mean()) - 500.5) < 10


def test_q_sample_refuses_a_scalar_time(golden, process):
    with pytest.raises(ValueError, match="one time per example"):
        processes.q_sample(process, golden["x_0"], jnp.float32(0.5), golden["eps"])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ddpm", dict(beta_start=0.03), "beta_start=0.03 must be at most beta_end=0.02"),
        ("vp", dict(beta_start=0.03), "beta_start=0.03 must be at most beta_end=0.02"),
        ("ddpm", dict(schedule="sigmoid"), "unknown diffusion.schedule='sigmoid'; choose one of"),
        ("ot", {}, "unknown diffusion.process='ot'; choose one of ddpm, vp, flow, gvp, edm"),
        ("edm", dict(sigma_min=90.0), "sigma_min=90.0 must be less than sigma_max=80.0"),
        ("edm", dict(sigma_min=80.0), "sigma_min=80.0 must be less than sigma_max=80.0"),
        (
            "vp",
            dict(schedule="cosine"),
            "schedule='cosine' .*are for process=ddpm. Omit them for 'vp'",
        ),
    ],
)
def test_invalid_processes_are_refused(build_process, name, changes, message):
    with pytest.raises(ValueError, match=message):
        build_process(name, **changes)
