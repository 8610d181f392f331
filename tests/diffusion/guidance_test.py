"""Guidance against recorded outputs, and which channels it may change."""

import jax.numpy as jnp
import numpy as np
from helpers.close import assert_close

from dit_jax.diffusion import guidance


def test_guidance_equals_the_published_code(golden, golden_predict):
    y = jnp.asarray(golden["y"])
    guided = guidance.classifier_free_guidance(golden_predict, y, jnp.full_like(y, 7), 4.0, 3)
    out = guided(jnp.asarray(golden["x_0"]), jnp.asarray(golden["t"], jnp.float32))
    assert_close(out, golden["cfg_out_scale4"], 2e-5)


def _predict_label(x_t, t, y):
    """Predicts the label in every pixel and channel."""
    return jnp.broadcast_to(y[:, None, None, None].astype(jnp.float32), (*x_t.shape[:-1], 8))


def test_guidance_changes_only_the_requested_channels():
    x_t, t, y, null = jnp.zeros((2, 1, 1, 4)), jnp.zeros(2), jnp.array([1, 2]), jnp.full(2, 7)
    guided = guidance.classifier_free_guidance(_predict_label, y, null, 3.0)(x_t, t)
    np.testing.assert_array_equal(guided[:, 0, 0, :4], [4 * [-11.0], 4 * [-8.0]])
    np.testing.assert_array_equal(guided[:, 0, 0, 4:], [4 * [1.0], 4 * [2.0]])
    guided = guidance.classifier_free_guidance(_predict_label, y, null, 3.0, 3)(x_t, t)
    np.testing.assert_array_equal(guided[0, 0, 0], 3 * [-11.0] + 5 * [1.0])


def test_rescale_interpolates_to_the_deviation_of_the_conditional_output():
    rng = np.random.default_rng(0)
    outputs = jnp.asarray(rng.normal(0, [[[[1.0]]], [[[2.0]]]], (2, 4, 4, 3)), jnp.float32)

    def predict(x_t, t, y):
        """Returns `outputs` for labels 0 and 1; half the other image's output for the null, 2."""
        conditional = outputs[jnp.arange(len(y)) // 2]
        return jnp.where((y == 2)[:, None, None, None], 0.5 * conditional[::-1], conditional)

    def std(rescale):
        guided = guidance.classifier_free_guidance(
            predict, jnp.array([0, 1]), jnp.array([2, 2]), 3.0, rescale=rescale
        )
        return np.std(guided(jnp.zeros((2, 4, 4, 3)), jnp.zeros(2)), axis=(1, 2, 3))

    assert_close(std(1.0), np.std(outputs, axis=(1, 2, 3)), 1e-5)
    assert_close(std(0.3), 0.7 * std(0.0) + 0.3 * std(1.0), 1e-5)
    assert np.all(std(0.0) > 1.2 * std(1.0))


def test_rescale_uses_and_changes_the_guided_channels_alone():
    """The third channel and the predicted variance neither change nor enter the deviation."""
    rng = np.random.default_rng(0)
    scales = np.array([1.0, 2.0, 50.0, 100.0, 100.0, 100.0])
    outputs = jnp.asarray(rng.normal(0, scales, (1, 4, 4, 6)), jnp.float32)

    def predict(x_t, t, y):
        return jnp.where((y == 2)[:, None, None, None], 0.5 * outputs[:, ::-1], outputs)

    guided = guidance.classifier_free_guidance(
        predict, jnp.array([0]), jnp.array([2]), 3.0, channels=2, rescale=1.0
    )(jnp.zeros((1, 4, 4, 3)), jnp.zeros(1))
    assert_close(guided[..., :2].std(), outputs[..., :2].std(), 1e-5)
    np.testing.assert_array_equal(guided[..., 2:], outputs[..., 2:])


def test_rescale_of_a_zero_output_is_zero():
    """The deviation of a zero output, which a new DiT has, must not divide by zero."""
    guided = guidance.classifier_free_guidance(
        lambda x, t, y: jnp.zeros_like(x), jnp.array([0]), jnp.array([2]), 3.0, rescale=0.7
    )
    assert not np.any(guided(jnp.ones((1, 2, 2, 3)), jnp.zeros(1)))


def test_autoguidance_extrapolates_away_from_the_worse_model():
    x_t = jnp.ones((2, 1, 1, 4))
    better = lambda x, t: jnp.concatenate([3 * x, 5 * x], axis=-1)  # noqa: E731
    worse = lambda x, t: jnp.concatenate([2 * x, 7 * x], axis=-1)  # noqa: E731
    out = guidance.autoguidance(better, worse, 2.0)(x_t, jnp.zeros(2))
    np.testing.assert_array_equal(out[0, 0, 0], 4 * [4.0] + 4 * [5.0])
    out = guidance.autoguidance(better, worse, 2.0, channels=1)(x_t, jnp.zeros(2))
    np.testing.assert_array_equal(out[0, 0, 0], [4.0] + 3 * [3.0] + 4 * [5.0])


def test_interval_splits_the_steps_into_guided_and_unguided_parts():
    t = np.linspace(1, 0.1, 10)
    assert guidance.split_steps(t, 1.5, (0.0, 1.0)) == [(True, 10)]
    assert guidance.split_steps(t, 1.5, (0.25, 0.75)) == [(False, 3), (True, 5), (False, 2)]
    assert guidance.split_steps(t, 1.5, (0.5, 1.0)) == [(True, 6), (False, 4)]
    assert guidance.split_steps(t, 1.0, (0.25, 0.75)) == [(False, 10)]
