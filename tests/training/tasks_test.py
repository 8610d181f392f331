"""A VAE trains in the same loop: its loss, its picture, its devices, and its use for latents."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.close import assert_trees_close
from PIL import Image

from configs import vae_digits
from dit_jax import conditions, latents, sharding, train, workdirs
from dit_jax.data import loader
from dit_jax.latents import store
from dit_jax.training import initial_state, programs, tasks
from dit_jax.workdirs import checkpoint


@pytest.fixture
def vae_config(digits_dir):
    """configs/vae_digits.py with a tiny model, free to change."""
    config = vae_digits.get_config()
    config.data.update(data_dir=str(digits_dir), train_split="train[:160]", eval_split="test[:20]")
    config.update(total_steps=30, batch_size=16, log_every_steps=10, sample_every_steps=30)
    config.update(sample_num_images=4, eval_every_steps=15, checkpoint_every_steps=30)
    config.optim.update(warmup_steps=0, ema_decay=0.9, learning_rate=5e-3)
    config.model.update(block_channels=(8, 16), latent_channels=2, norm_groups=4)
    return config


@pytest.fixture(scope="module")
def vae_workdir(digits_dir, tmp_path_factory):
    config = vae_config.__wrapped__(digits_dir)
    workdir = tmp_path_factory.mktemp("runs") / "vae"
    train.train_and_evaluate(config, workdir)
    return workdir


def test_summaries_say_what_a_model_is_told(smoke_config, captioned_config):
    def summary(config):
        return programs.make_program(config, jax.devices()[:1]).task.describe_model()

    assert ", dit of labels, 16 tokens, adaLN-Zero blocks" in summary(smoke_config)
    description = "captions, by an encoder that is trained along"
    assert f", dit of {description}, 16 tokens, adaLN-Zero" in summary(captioned_config)
    captioned_config.model.condition = "context"
    assert ", dit of captions, by a frozen encoder, 16 tokens" in summary(captioned_config)


@pytest.mark.slow
def test_vae_learns_and_reports_psnr_and_kl(vae_workdir):
    lines = [json.loads(line) for line in (vae_workdir / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = (line for line in lines if "loss" in line)
    assert {"loss", "reconstruction", "kl", "psnr"} < first.keys()
    assert last["loss"] < 0.5 * first["loss"]
    assert last["psnr"] > first["psnr"] + 2
    evaluated = [line for line in lines if "eval_psnr" in line]
    assert [line["step"] for line in evaluated] == [15, 30]
    picture = np.asarray(Image.open(vae_workdir / "samples" / "30.png"))
    assert picture.shape == (2 * 50 - 2, 2 * 98 - 2, 3)  # four pairs of 8 px, enlarged to 48


@pytest.mark.slow
def test_vae_begins_with_the_weights_of_another(vae_workdir, vae_config):
    vae_config.init_from = str(vae_workdir)
    program = programs.make_program(vae_config, jax.devices()[:1])
    state = initial_state.new_state(program, jax.random.key(0))
    _, params = checkpoint.load_model(vae_workdir, program.mesh, "float32", "vae")
    jax.tree.map(np.testing.assert_array_equal, state.params, params)


@pytest.mark.slow
def test_picture_shows_images_beside_their_reconstructions(vae_workdir, vae_config):
    program = programs.make_program(vae_config, jax.devices()[:1])
    source = conditions.open_images(vae_config, "test[:20]")
    params, _ = checkpoint.restore_params(vae_workdir, program.state.params)
    picture = program.task.compile_picture({}, source)(params)
    vae = latents.Vae(params, program.model, digest="")
    images = loader.gather(source, range(4))["image"]
    z = latents.posterior(jax.jit(latents.encode)(vae, images))[0]
    decode = functools.partial(program.model.apply, method="decode")
    pixels = jax.jit(decode)({"params": params}, z)
    expected = np.clip(127.5 * pixels + 128, 0, 255).astype(np.uint8)
    for i, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        cell = picture[row * 50 : row * 50 + 48 : 6, column * 98 : column * 98 + 96 : 6, 0]
        np.testing.assert_array_equal(cell[:, :8], images[i, ..., 0])
        assert np.abs(cell[:, 8:].astype(int) - expected[i, ..., 0]).max() <= 1


@pytest.mark.slow
def test_trained_vae_serves_latents(vae_workdir, smoke_config, tmp_path):
    config = smoke_config
    config.data.update(train_split="train[:160]", eval_split="")
    store.encode(config, vae_workdir, tmp_path / "moments", shard_images=80)
    config.update(total_steps=2, sample_every_steps=2, eval_every_steps=0)
    config.optim.warmup_steps = 0
    config.model.update(input_size=4, in_channels=2)
    config.latents.update(source="moments", moments=str(tmp_path / "moments"))
    config.latents.update(vae=str(vae_workdir), scale=(), shift=())
    train.train_and_evaluate(config, tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "2.png").is_file()
    saved = workdirs.load_config(tmp_path / "run").latents
    assert len(saved.scale) == len(saved.shift) == 2
    assert saved.vae_digest


def _two_steps(config, devices=None):
    program = programs.make_program(config, devices)
    state = initial_state.new_state(program, jax.random.key(0))
    step = programs.compile_train_step(program)
    rng = np.random.default_rng(0)
    for _ in range(2):
        image = rng.integers(0, 256, (config.batch_size, 8, 8, 1), np.uint8)
        batch = {"image": image, "label": np.zeros(config.batch_size, np.int32)}
        state, scalars = step(
            state,
            sharding.put_batch(program.mesh, batch),
            jax.random.key(0),
            tasks.Frozen(),
        )
    return jax.device_get((scalars, state.params))


@pytest.mark.slow
def test_vae_on_eight_devices_and_in_micro_batches_is_the_same(vae_config):
    vae_config.optim.update(eps=1.0, learning_rate=0.05)  # smooth in the gradients
    expected = _two_steps(vae_config, jax.devices()[:1])
    vae_config.mesh.update(data=2, fsdp=4)
    vae_config.grad_accumulation_steps = 2
    actual = _two_steps(vae_config)
    assert_trees_close(actual, expected, 1e-5)


@pytest.mark.slow
def test_posterior_is_sampled_while_training(vae_config):
    """With other noise the reconstruction is another, the KL is not."""
    program = programs.make_program(vae_config, jax.devices()[:1])
    params = initial_state.new_state(program, jax.random.key(0)).params
    batch = {"image": jnp.zeros((2, 8, 8, 1), jnp.uint8), "label": jnp.zeros(2, jnp.int32)}
    task, frozen = program.task, tasks.Frozen()
    one, other = (
        task.compute_losses(
            params, frozen, task.draw_examples(batch, jax.random.key(i), frozen, dropout=True)
        )
        for i in range(2)
    )
    assert np.all(one["reconstruction"] != other["reconstruction"])
    np.testing.assert_array_equal(one["kl"], other["kl"])


@pytest.mark.slow
def test_noise_predictor_is_no_vae_and_a_vae_no_noise_predictor(vae_workdir, run_command, tmp_path):
    error = run_command("sample", "--workdir", vae_workdir, "--out", tmp_path / "x.png", fails=True)
    assert f"error: {vae_workdir} holds a 'vae'" in error


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.image_size", 9, "sides that are multiples of 2, not 9 x 9 x 1"),
        ("data.image_channels", 3, "takes images of 1 channels and .*, not 8 x 8 x 3"),
        ("latents.source", "moments", "a VAE is trained on 'pixels'"),
        ("autoencoder.distance", "l3", "'l3'; choose one of l1, l2"),
        (
            "autoencoder.kl_weight",
            -1.0,
            "autoencoder.kl_weight=-1.0 must be a number in",
        ),
        ("autoencoder.lpips_weight", 1.0, "lpips_weight=1.0 needs autoencoder.lpips, the workdir"),
    ],
)
def test_vae_settings_that_do_not_fit_are_refused(vae_config, key, value, message):
    vae_config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        programs.make_program(vae_config)
