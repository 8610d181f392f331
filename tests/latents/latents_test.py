"""Pixels and moments to x_0 and back: scaled once, truncated as published; the same three ways."""

import dataclasses
import functools
import json
import shutil
import tracemalloc

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.close import assert_close
from ml_collections import ConfigDict

from dit_jax import latents, sharding, train, workdirs
from dit_jax.data import loader
from dit_jax.data.annotations import Annotations
from dit_jax.latents import codec, device, loading
from dit_jax.sampling import runs
from dit_jax.training import programs

KEY = jax.random.key(0)
MESH = sharding.make_mesh(ConfigDict(dict(data=1, fsdp=1, tensor=1)), jax.devices()[:1])


def _x_0(batch, key, config, mesh=MESH, vae=None):
    """Of a batch, by config.latents."""
    x_0 = latents.build(ConfigDict(dict(latents=config)))
    return x_0.x_0(batch, key, mesh, vae)


def test_every_pixel_value_survives_the_round_trip():
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    config = ConfigDict(dict(source="pixels", scale=(7.0,), shift=(3.0,)))
    x_0 = _x_0({"image": jnp.asarray(image)}, KEY, config)
    assert (float(x_0.min()), float(x_0.max())) == (-1.0, 1.0)
    np.testing.assert_array_equal(latents.image_from_x_0(x_0), image)


def test_image_is_clipped_and_truncated():
    x_0 = jnp.array([-2.0, -1.0, 0.0, 0.0078, 0.9999, 2.0]).reshape(1, 1, 6, 1)
    # 127.5 x + 128 truncated: 0.9999 gives 255.49 -> 255, 0.0078 gives 128.99 -> 128
    np.testing.assert_array_equal(latents.image_from_x_0(x_0).ravel(), [0, 0, 128, 128, 255, 255])


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("size", [(64, 64), (4, 32, 32)])  # also of more axes than images have
def test_posterior_sample_is_scaled_once(channels, size):
    """Moments with mean 5 and std 2, shift 1, scale 0.5: x_0 has mean 2 and std 1."""
    mean = np.full((4, *size, 4), 5.0)
    moments = np.concatenate([mean, np.full_like(mean, np.log(4.0))], axis=-1).astype(np.float16)
    config = ConfigDict(dict(source="moments", scale=channels * (0.5,), shift=channels * (1.0,)))
    batch = {"moments": jnp.asarray(moments)}
    x_0 = _x_0(batch, KEY, config)
    assert (x_0.shape, x_0.dtype) == ((4, *size, 4), jnp.float32)
    assert float(x_0.mean()) == pytest.approx(2.0, abs=0.02)
    assert float(x_0.std()) == pytest.approx(1.0, rel=0.02)
    other = _x_0(batch, jax.random.key(1), config)
    assert not np.array_equal(x_0, other)  # drawn afresh for every key
    assert_close(latents.unscale(config, x_0), 2 * x_0 + 1, 1e-6)


@pytest.fixture
def latent_config(smoke_config, moments_dir, vae_dir):
    """The smoke run on latents of 160 digits, three steps."""
    config = smoke_config
    config.update(total_steps=3, log_every_steps=1, eval_every_steps=3, sample_every_steps=0)
    config.optim.warmup_steps = 0
    config.data.update(train_split="train[:160]", eval_split="test[:20]", flip=True)
    config.model.update(input_size=4, in_channels=2)
    config.latents.update(source="moments", moments=str(moments_dir), vae=str(vae_dir))
    return config


def _losses(config, workdir):
    train.train_and_evaluate(config, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("eval_loss")) for line in lines]


@pytest.mark.slow
def test_encoded_stored_and_resident_moments_train_the_same(latent_config, tmp_path):
    """Ten steps at a rate that makes the losses depend on x_0, as at first they do not."""
    latent_config.update(total_steps=10, eval_every_steps=10)
    latent_config.optim.learning_rate = 0.01
    losses = {}
    for source in ("images", "moments", "device"):
        latent_config.latents.source = source
        losses[source] = _losses(latent_config, tmp_path / source)
    assert len(losses["images"]) == 11  # ten steps and the held-out loss
    assert_close(losses["device"], losses["moments"], 1e-6)
    # A moment may round to the next f16 where the batch is another: one part in 2000 of it.
    assert_close(losses["images"], losses["moments"], 1e-5)


def test_log_variances_are_clamped_as_published():
    moments = jnp.array([0.5, -1e4, 0.5, 1e4, 0.5, 3.0], jnp.float16).reshape(3, 1, 1, 2)
    mean, log_variance = latents.posterior(moments)
    assert mean.ravel().tolist() == [0.5] * 3
    assert log_variance.ravel().tolist() == [-30, 20, 3]


def test_a_key_for_each_image_makes_its_sample_its_own():
    config = ConfigDict(dict(source="moments", scale=(1.0,), shift=(0.0,)))
    keys, moments = jax.random.split(KEY, 3), jnp.zeros((3, 4, 4, 8), jnp.float16)

    def x_0(rows):
        batch = {"moments": moments[rows]}
        return np.asarray(_x_0(batch, keys[rows], config))

    together, alone = x_0(slice(None)), x_0(slice(1, 2))
    np.testing.assert_array_equal(together[1], alone[0])
    assert not np.array_equal(together[1], together[0])


def test_encoded_images_are_rounded_as_stored_moments_are(latent_config, vae_dir):
    vae = latents.load_vae(vae_dir, MESH, "float32")
    image = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    stored = jax.jit(latents.encode)(vae, image).astype(np.float16)
    x_0 = {}
    for source, batch in (("images", {"image": image}), ("moments", {"moments": stored})):
        latent_config.latents.source = source
        of = functools.partial(_x_0, config=latent_config.latents)
        x_0[source] = jax.jit(of)(batch, KEY, vae=vae)
    np.testing.assert_array_equal(x_0["images"], x_0["moments"])


def test_images_are_encoded_a_group_after_another(latent_config, vae_dir, monkeypatch):
    """With memory for a group, to the moments of all at once."""
    mesh = sharding.make_mesh(latent_config.mesh)
    vae = latents.load_vae(vae_dir, mesh, "float32")
    image = np.random.default_rng(0).integers(0, 256, (192, 8, 8, 1), np.uint8)
    batch = sharding.put_batch(mesh, {"image": image})
    latent_config.latents.source = "images"

    def compile_x_0(images_at_once):
        monkeypatch.setattr(codec, "PIXELS_PER_DEVICE", images_at_once * 64)
        return (
            jax.jit(lambda batch, vae: _x_0(batch, KEY, latent_config.latents, mesh, vae))
            .lower(batch, vae)
            .compile()
        )

    whole, grouped = compile_x_0(24), compile_x_0(5)  # of 24 on each device; 4 divide them
    x_0, expected = grouped(batch, vae), whole(batch, vae)
    # A moment may round to the next f16.
    assert_close(x_0, expected, 5e-4)
    assert x_0.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 4)
    bytes_of = [c.memory_analysis().temp_size_in_bytes for c in (grouped, whole)]
    assert bytes_of[0] < bytes_of[1] / 3


def test_empty_scale_is_what_the_moments_record(latent_config, moments_dir):
    latent_config.latents.update(scale=(), shift=())
    source = latents.open_split(latent_config, "train")
    config = latents.build(latent_config).resolve(source.metadata)
    batch = loader.gather(source, range(len(source)))
    batch = {"moments": jnp.asarray(batch["moments"])}
    x_0 = _x_0(batch, KEY, config.latents)
    assert np.abs(x_0.mean((0, 1, 2))).max() < 0.05
    assert np.abs(x_0.std((0, 1, 2)) - 1).max() < 0.05
    metadata = json.loads((moments_dir / "metadata.json").read_text())
    assert config.latents.vae_digest == metadata["vae_digest"]
    assert latent_config.latents.scale == ()  # the caller's is left alone


def test_scale_that_is_not_the_publisher_s_is_told(latent_config, caplog):
    source = latents.open_split(latent_config, "train")
    source = dataclasses.replace(source, metadata=source.metadata | {"published": [0.25, 0.5]})
    with caplog.at_level("WARNING", "dit_jax"):
        latent_config.latents.update(scale=(0.25,), shift=(0.5,))
        latents.build(latent_config).resolve(source.metadata)
        latent_config.latents.update(scale=(), shift=())  # each channel's own: a choice
        latents.build(latent_config).resolve(source.metadata)
        assert not caplog.text
        latent_config.latents.update(scale=(0.18215,), shift=(0.5,))
        latents.build(latent_config).resolve(source.metadata)
    assert (
        "latents.scale=(0.18215,), latents.shift=(0.5,), but this VAE's publisher uses (0.25,)"
        in (caplog.text)
    )


@pytest.mark.slow
def test_samples_of_latents_are_decoded(latent_config, tmp_path, vae_dir, run_command, monkeypatch):
    latent_config.update(sample_every_steps=3)
    train.train_and_evaluate(latent_config, tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "3.png").is_file()
    monkeypatch.setattr(codec, "PIXELS_PER_DEVICE", 4 * 64)  # of 12 on each device
    trained = runs.load(tmp_path / "run", vae_workdir=vae_dir)
    x_0 = jax.random.normal(KEY, (96, 4, 4, 2))
    decoded = trained.to_image(x_0)
    vae = latents.load_vae(vae_dir, trained.mesh, "float32")
    z = latents.unscale(trained.config.latents, x_0)
    decode = functools.partial(vae.model.apply, method="decode")
    pixels = jax.jit(decode)({"params": vae.params}, z)
    assert decoded.shape == (96, 8, 8, 1)
    assert np.abs(decoded.astype(int) - np.clip(127.5 * pixels + 128, 0, 255)).max() < 1.01
    flags = ["--workdir", tmp_path / "run", "--num", 4, "--steps", 2]
    run_command("sample", *flags, "--out", tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as file:
        assert file["arr_0"].shape == (4, 8, 8, 1)


@pytest.fixture
def other_vae_dir(tmp_path):
    return conftest.save_random(tmp_path / "other", ConfigDict({"model": conftest.VAE}), seed=1)


def test_another_vae_than_the_moments_are_of_is_refused(latent_config, other_vae_dir, tmp_path):
    latent_config.update(sample_every_steps=3)
    latent_config.latents.vae = str(other_vae_dir)
    with pytest.raises(ValueError, match=r"other has digest \w+, but latents.vae_digest=\w+ is of"):
        train.train_and_evaluate(latent_config, tmp_path / "run")


def test_moments_of_another_vae_than_asked_for_are_refused(latent_config, tmp_path):
    latent_config.latents.update(vae="", vae_digest="0123456789abcdef")
    message = (
        r"the VAE of latents.moments=.* has digest \w+, but latents.vae_digest=0123456789abcdef"
    )
    with pytest.raises(ValueError, match=message):
        train.train_and_evaluate(latent_config, tmp_path / "run")


def test_what_is_no_vae_is_refused(latent_config, trained_workdir):
    mesh = sharding.make_mesh(latent_config.mesh)
    latent_config.latents.update(source="images", vae=str(trained_workdir))
    with pytest.raises(ValueError, match=r"smoke holds a 'dit', not a 'vae'"):
        latents.build(latent_config).load_vae(mesh)


@pytest.mark.parametrize(
    ("key", "value", "shape"),
    [("image_size", 9, "9 x 9 x 1"), ("image_channels", 3, "8 x 8 x 3")],
)
def test_images_that_the_vae_does_not_take_are_refused(latent_config, key, value, shape):
    latent_config.latents.source = "images"
    latent_config.data[key] = value
    message = rf"takes images of 1 channels and sides that are multiples of 2, not {shape}\."
    with pytest.raises(ValueError, match=message):
        latents.build(latent_config).load_vae(sharding.make_mesh(latent_config.mesh))


@pytest.mark.parametrize(("key", "value"), [("input_size", 8), ("in_channels", 4)])
def test_vae_of_another_size_is_refused(latent_config, key, value):
    latent_config.latents.source = "images"
    latent_config.model[key] = value
    with pytest.raises(ValueError, match="makes latents 4 x 4 x 2 of images 8 x 8, but"):
        latents.build(latent_config).load_vae(sharding.make_mesh(latent_config.mesh))


@pytest.mark.slow
def test_run_that_encodes_stays_with_its_vae(latent_config, other_vae_dir, tmp_path, monkeypatch):
    latent_config.latents.source = "images"
    latent_config.sample_every_steps = 3
    loads, load = [], latents.load_vae
    monkeypatch.setattr(loading, "load_vae", lambda *args: loads.append(args) or load(*args))
    train.train_and_evaluate(latent_config, tmp_path / "run")
    assert len(loads) == 1  # to check it, to encode and to decode
    assert workdirs.load_config(tmp_path / "run").latents.vae_digest
    latent_config.total_steps = 4
    latent_config.latents.vae = str(other_vae_dir)
    with pytest.raises(ValueError, match=r"another config:\n  latents.vae_digest: workdir"):
        train.train_and_evaluate(latent_config, tmp_path / "run")
    with pytest.raises(ValueError, match=r"but latents.vae_digest=\w+ is of another VAE"):
        runs.load(tmp_path / "run", vae_workdir=other_vae_dir)


def test_scaled_moments_and_cut_shards_are_refused(latent_config, moments_dir, tmp_path):
    copy = shutil.copytree(moments_dir, tmp_path / "copy")
    latent_config.latents.moments = str(copy)
    metadata = json.loads((copy / "metadata.json").read_text())
    metadata["mean_absolute"] *= 1.5  # as by the scale of Stable Diffusion 3
    (copy / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="they may have been scaled already"):
        latents.open_split(latent_config, "train")
    shutil.copy(moments_dir / "metadata.json", copy)
    shard = copy / "moments-train.array_record-00001-of-00003"
    shard.write_bytes(shard.read_bytes()[:70_000])
    with pytest.raises(ValueError, match=r"cannot read .*If .* was cut, remove it"):
        latents.open_split(latent_config, "train")


class _Counted:
    """Records of random moments that count their readings."""

    origin, captions_per_image = "counted", 1

    annotations = Annotations()

    def __init__(self, size):
        rng = np.random.default_rng(0)
        self.moments = rng.standard_normal((size, 16, 16, 8)).astype(np.float16)
        self.reads = np.zeros(size, int)

    def __len__(self):
        return len(self.reads)

    def __getitem__(self, i):
        self.reads[i] += 1
        return {"moments": self.moments[i], "label": np.int32(i)}


def test_resident_moments_are_read_once_into_memory_for_one_copy(monkeypatch):
    monkeypatch.setattr(device, "RECORDS_AT_ONCE", 7)
    mesh, source = sharding.make_mesh(ConfigDict(dict(data=2, fsdp=2, tensor=2))), _Counted(301)
    tracemalloc.start()
    records = device.load_moments(mesh, source)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert records["moments"].sharding.spec == records["label"].sharding.spec == sharding.BATCH
    np.testing.assert_array_equal(records["moments"][:301], source.moments)
    np.testing.assert_array_equal(records["label"][:301], range(301))
    assert (source.reads[1:-1] == 1).all()
    assert (source.reads[0], source.reads[-1]) == (2, 4)  # for the shape, and to fill the shards
    assert peak < 1.2 * source.moments.nbytes


def test_moments_that_do_not_fit_the_devices_are_refused(latent_config, monkeypatch, tmp_path):
    latent_config.latents.source = "device"
    monkeypatch.setattr(device, "_read_free_bytes", lambda device: 1000)
    # 320 records of 4 x 4 x 4 f16 and a label over two devices
    with pytest.raises(
        ValueError, match="needs 21,120 bytes on each device, but only 1,000 are free"
    ):
        train.train_and_evaluate(latent_config, tmp_path)


def test_unknown_source_is_named_before_anything_is_read(latent_config, tmp_path):
    latent_config.latents.update(source="latents", moments="nowhere")
    with pytest.raises(ValueError, match=r"unknown latents.source='latents'; choose one of pix"):
        train.train_and_evaluate(latent_config, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(source="pixel"), "unknown latents.source='pixel'; choose one of pixels, images"),
        (dict(source="images", vae=""), "needs latents.vae, the workdir of a VAE"),
        (dict(scale=(1.0, 2.0, 3.0)), "one number, or one for each of model.in_channels=2"),
        (dict(scale=(0.0,)), "must be a number above 0"),
    ],
    ids=str,
)
def test_latent_settings_that_do_not_fit_are_refused(latent_config, change, message):
    latent_config.latents.update(change)
    with pytest.raises(ValueError, match=message):
        programs.make_program(latent_config)
