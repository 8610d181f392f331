"""The process against recorded values and against the probability calculus."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dit_jax import diffusion


def test_q_sample_equals_the_published_process(golden, process):
    t = process.time_of_index(jnp.asarray(golden["t"]))
    x_t = diffusion.q_sample(process, golden["x_0"], t, golden["eps"])
    np.testing.assert_allclose(x_t, golden["x_t"], rtol=1e-6, atol=1e-6)


def test_every_index_survives_the_way_through_t(process):
    index = jnp.arange(process.num_steps)
    t = process.time_of_index(index)
    np.testing.assert_array_equal(process.network_time(t), index)
    assert process.level(np.zeros(1))[0] == 0


def test_variance_is_preserved_and_t_0_is_data(process):
    t = jnp.linspace(0, 1, 1001)
    np.testing.assert_allclose(process.alpha(t) ** 2 + process.sigma(t) ** 2, 1, atol=1e-6)
    assert process.alpha(t)[0] == 1
    assert process.sigma(t)[0] == 0
    assert process.alpha(t)[-1] < 0.01


def test_x_0_from_eps_inverts_q_sample(golden, process):
    t = jnp.array([0.001, 0.4, 0.8])
    x_t = diffusion.q_sample(process, golden["x_0"], t, golden["eps"])
    x_0 = diffusion.x_0_from_eps(process, x_t, t, golden["eps"])
    np.testing.assert_allclose(x_0, golden["x_0"], atol=1e-5)


def test_grid_retains_the_published_indices(golden, process):
    for steps, name in ((250, "timesteps_250"), (10, "ddpm_timesteps")):
        grid = process.grid(steps)
        assert grid[-1] == 0  # ends on data
        visited = process.network_time(grid[:-1])
        np.testing.assert_array_equal(visited, golden[name][::-1])  # T-1 .. 0, never T or -1


def test_draw_t_covers_every_level_but_data(process):
    level = process.level(process.draw_t(jax.random.key(0), 20_000))
    assert (level.min(), level.max()) == (1, process.num_steps)
    assert abs(float(level.mean()) - 500.5) < 10


def test_posterior_composes_to_the_marginal(process):
    """Integrating q(x_s | x_t, x_0) over q(x_t | x_0) must give q(x_s | x_0)."""
    t, s = np.array([0.9, 0.5, 0.1]), np.array([0.7, 0.2, 0.05])
    p = process.posterior(t, s)
    ab_t, ab_s = process.alpha_bar[process.level(t)], process.alpha_bar[process.level(s)]
    np.testing.assert_allclose(p.x_0_coef + p.x_t_coef * np.sqrt(ab_t), np.sqrt(ab_s))
    np.testing.assert_allclose(p.x_t_coef**2 * (1 - ab_t) + np.exp(p.log_variance), 1 - ab_s)


def test_posterior_clips_the_last_variance_to_its_neighbour(process):
    levels = np.arange(1000, -1, -1) / 1000
    p = process.posterior(levels[:-1], levels[1:])
    assert np.isfinite(p.log_variance).all()
    assert p.log_variance[-1] == p.log_variance[-2] != p.log_variance[-3]


@pytest.mark.parametrize("steps", [1, 1001])
def test_grid_refuses_steps_beyond_the_process(process, steps):
    with pytest.raises(ValueError, match=f"{steps} sampling steps.*2 to 1000"):
        process.grid(steps)


def test_q_sample_refuses_one_time_for_all(golden, process):
    with pytest.raises(ValueError, match="one time per example"):
        diffusion.q_sample(process, golden["x_0"], jnp.float32(0.5), golden["eps"])


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.02), (0.02, 1e-4), (1e-4, 1.0)])
def test_betas_out_of_order_are_refused(start, end):
    with pytest.raises(ValueError, match=f"beta_start={start}, beta_end={end}"):
        diffusion.build(ConfigDict(dict(num_steps=10, beta_start=start, beta_end=end)))
