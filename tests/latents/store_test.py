"""A dataset of moments: what is in it, and that it is the same however it was written."""

import functools
import json
import re
import resource

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers.close import assert_close
from ml_collections import ConfigDict
from PIL import Image

from configs import vae_digits
from dit_jax import conditions, latents
from dit_jax.data import loader
from dit_jax.data.annotations import Annotations
from dit_jax.latents import codec, store
from dit_jax.system import locks
from dit_jax.workdirs import checkpoint


@pytest.fixture
def config(smoke_config):
    """The first 70 digits and a few of the held-out ones."""
    smoke_config.data.update(train_split="train[:70]", eval_split="test[:5]", flip=True)
    return smoke_config


@pytest.fixture
def image_folder(tmp_path):
    """Eight images of noise, of one class."""
    images = tmp_path / "images"
    (images / "train" / "0").mkdir(parents=True)
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(images / "train" / "0" / f"{i}.png")
    return images


def _read(directory, split="train"):
    records = tfds.builder_from_directory(directory).as_data_source(split)
    records = [records[i] for i in range(len(records))]
    return np.stack([r["moments"] for r in records]), np.array([r["label"] for r in records])


def test_records_are_the_moments_of_the_images_and_of_their_mirrors(config, vae_dir, tmp_path):
    metadata = store.encode(config, vae_dir, tmp_path, shard_images=32, batch_size=3)
    assert len(list(tmp_path.glob("moments-train.array_record-*-of-00003"))) == 3
    moments, labels = _read(tmp_path)
    assert (moments.shape, moments.dtype) == ((140, 4, 4, 4), np.float16)
    source = conditions.open_images(config, "train[:70]")
    batch = loader.gather(source, range(70))
    np.testing.assert_array_equal(labels, batch["label"].repeat(2))
    vae = latents.load_vae(vae_dir, jax.make_mesh((1,), ("data",)), "float32")
    pixels = batch["image"].astype(np.float32) / 127.5 - 1
    apply = jax.jit(functools.partial(vae.model.apply, method="encode"))
    for view, images in ((0, pixels), (1, pixels[:, :, ::-1])):
        expected = apply({"params": vae.params}, images)
        assert_close(moments[view::2], expected, 5e-4)  # half of f16's step is 2^-11
    eval_moments, _ = _read(tmp_path, "eval")
    assert len(eval_moments) == 10

    mean, log_variance = np.split(moments.astype(np.float64), 2, axis=-1)
    noise = np.random.default_rng(0).standard_normal((400, *mean.shape))
    samples = mean + np.exp(log_variance / 2) * noise
    assert_close(metadata["mean"], mean.mean((0, 1, 2)), 1e-6)
    assert_close(metadata["std"], samples.std((0, 1, 2, 3)), 2e-3)
    recorded = tfds.builder_from_directory(tmp_path).info.metadata
    assert recorded["vae_digest"] == vae.digest
    assert recorded["mirrored"] is True
    assert recorded["record_format"] == store.RECORD_FORMAT
    assert recorded["mean"] == metadata["mean"]


@pytest.mark.parametrize("flip", [False, True])
def test_batch_size_changes_neither_the_bytes_nor_what_is_encoded_at_once(
    config, vae_dir, tmp_path, monkeypatch, flip
):
    config.data.flip = flip
    monkeypatch.setattr(codec, "PIXELS_PER_DEVICE", 4 * 64)  # 4 images on each of 2 devices
    plain, shapes = latents.encode, []

    def recorded(vae, image):
        shapes.append(image.shape)
        return plain(vae, image)

    monkeypatch.setattr(codec, "encode", recorded)
    for batch_size in (1, 6, 32):
        out = tmp_path / str(batch_size)
        store.encode(config, vae_dir, out, shard_images=64, batch_size=batch_size)
        assert _files(out) == _files(tmp_path / "1")
    assert set(shapes) == {(8, 8, 8, 1)}


def test_other_vae_images_or_settings_do_not_mix(config, vae_dir, tmp_path, monkeypatch):
    store.encode(config, vae_dir, tmp_path, shard_images=64)
    with pytest.raises(ValueError, match=r"begun in another way:\n  shard_images: then 64, now 32"):
        store.encode(config, vae_dir, tmp_path, shard_images=32)
    with monkeypatch.context() as patched:
        patched.setattr(store, "RECORD_FORMAT", 2)
        with pytest.raises(ValueError, match="record_format: then 1, now 2"):
            store.encode(config, vae_dir, tmp_path, shard_images=64)
    config.data.flip = False
    with pytest.raises(ValueError, match="mirrored: then True, now False"):
        store.encode(config, vae_dir, tmp_path, shard_images=64)


def test_one_command_at_a_time_writes_a_dataset(config, vae_dir, tmp_path):
    with (
        locks.hold(tmp_path / store.LOCK),
        pytest.raises(OSError, match=r"process \d+ on .* since .* writes into it"),
    ):
        store.encode(config, vae_dir, tmp_path)
    assert not list(tmp_path.iterdir())


def test_size_that_the_factor_does_not_divide_is_refused(config, vae_dir, tmp_path):
    config.data.image_size = 7
    with pytest.raises(ValueError, match=r"sides that are multiples of 2, not 7 x 7 x 1"):
        store.encode(config, vae_dir, tmp_path)
    assert not list(tmp_path.iterdir())  # the right size may follow


def test_nothing_to_encode_is_refused(config, vae_dir, tmp_path):
    config.data.train_split = ""
    with pytest.raises(ValueError, match="train_split is empty"):
        store.encode(config, vae_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_config_of_a_vae_and_a_missing_vae_are_refused(config, vae_dir, tmp_path):
    with pytest.raises(ValueError, match=r"a 'vae', has no num_classes .*digits_latents\.py"):
        store.encode(vae_digits.get_config(), vae_dir, tmp_path / "out")
    missing = tmp_path / "nope"
    with pytest.raises(FileNotFoundError, match=f"{missing} must be a directory") as error:
        store.encode(config, missing, tmp_path / "out")
    assert "--workdir" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_moments_beyond_float16_are_refused(config, vae_dir, tmp_path):
    vae = latents.load_vae(vae_dir, jax.make_mesh((1,), ("data",)), "float32")
    params = jax.tree.map(jnp.asarray, vae.params)
    params["quant_conv"]["bias"] += 1e6
    checkpoint.save_params(tmp_path / "vae", ConfigDict({"model": conftest.VAE}), params)
    with pytest.raises(ValueError, match=r"moments-train.* are not finite in float16"):
        store.encode(config, tmp_path / "vae", tmp_path / "out")
    assert not list((tmp_path / "out").glob("moments-*"))


def _flags(vae_dir, digits_dir, out, shard_images=64):
    flags = ["--config", "configs/smoke.py", "--config.data.flip=True", "--vae", vae_dir]
    flags += [f"--config.data.data_dir={digits_dir}", "--batch_size", 8]
    return [*flags, "--shard_images", shard_images, "--out", out]


def _files(directory):
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_two_processes_write_the_same_records(run_command, run_pair, vae_dir, digits_dir, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run_command("encode", *_flags(vae_dir, digits_dir, one), as_users=True)
    run_pair("encode", *_flags(vae_dir, digits_dir, two))
    assert _files(two) == _files(one)
    assert json.loads((two / "metadata.json").read_text())["num_images"]["train"] == 1617


def test_models_without_classes_are_told_no_labels(config, image_folder, vae_dir, tmp_path):
    """As Stable Diffusion, told captions alone; or nothing."""
    lines = [json.dumps({"file_name": f"0/{i}.png", "text": f"image {i}"}) for i in range(8)]
    (image_folder / "train" / "metadata.jsonl").write_text("\n".join(lines))
    config.data.update(source="folder", name=str(image_folder), train_split="train", eval_split="")
    config.data.update(caption_feature="text", flip=False)
    config.model.update(num_classes=0, input_size=4, in_channels=2, null_condition=False)
    config.latents.update(source="moments", moments=str(tmp_path / "out"), scale=(), shift=())
    store.encode(config, vae_dir, tmp_path / "out", shard_images=8)
    source = latents.open_split(config, "train")
    assert [int(source[i]["label"]) for i in range(8)] == [0] * 8
    config.model.update(condition="tokens", context_size=8)
    assert [latents.open_split(config, "train").captions(i) for i in (0, 7)] == [
        ["image 0"],
        ["image 7"],
    ]
    config.data.caption_feature = ""
    config.model.condition = "label"
    with pytest.raises(ValueError, match=r"another way:[^$]*  captions: then 'text: 1', now None"):
        store.encode(config, vae_dir, tmp_path / "out", shard_images=8)
    config.model.num_classes = 10
    with pytest.raises(ValueError, match=r"holds no labels, which model.num_classes=10 needs"):
        latents.open_split(config, "train")


def test_further_images_are_not_stored_with_moments(config, vae_dir, tmp_path, monkeypatch):
    class Depth(conditions.Labels):
        def annotations(self):
            return Annotations(images={"depth": 1})

    monkeypatch.setitem(conditions.KINDS, "label", Depth)
    with pytest.raises(ValueError, match=r"condition='label' reads depth beside each image, but"):
        store.encode(config, vae_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_unreadable_image_ends_both_processes(image_folder, vae_dir, tmp_path):
    """In the third shard of four, the first process's; the other one's shards are complete."""
    flags = ["--config", "configs/smoke.py", "--vae", vae_dir]
    flags += ["--config.data.source=folder", f"--config.data.name={image_folder}"]
    flags += ["--config.data.eval_split=", "--config.model.num_classes=1", "--shard_images", 2]
    damaged = image_folder / "train" / "0" / "4.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:40])
    pair = conftest.start_pair("encode", *flags, "--out", tmp_path / "out")
    errors = [process.communicate(timeout=120)[1] for process in pair]
    assert [process.returncode for process in pair] == [1, 1]
    assert f"error: cannot read the image of {damaged}" in errors[0]
    assert f"\nThe shards that are complete are kept in {tmp_path / 'out'}; they go" in errors[0]
    assert "error: another process failed: see its output; run the same command" in errors[1]
    assert "Traceback" not in "".join(errors)
    for shard in (1, 3):
        assert (tmp_path / "out" / f"moments-train.array_record-{shard:05d}-of-00004").is_file()
    damaged.write_bytes(whole)  # other images than it was begun with, as far as can be known
    for process in conftest.start_pair("encode", *flags, "--out", tmp_path / "out"):
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "dataset.train.contents: then" in stderr
    for process in conftest.start_pair("encode", *flags, "--out", tmp_path / "new"):
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
    moments, _ = _read(tmp_path / "new")
    assert len(moments) == 8


@pytest.mark.slow
def test_full_disk_ends_with_an_error_and_complete_shards(
    run_command, vae_dir, digits_dir, tmp_path
):
    """Files may grow to 100 kB; a shard of 512 images and their mirrors needs more."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = _flags(vae_dir, digits_dir, broken, shard_images=512)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the command inherits it
    try:
        error = run_command("encode", *flags, fails=True, as_users=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "error: cannot write" in error
    assert "then run the same command" in error
    assert not list(broken.glob("moments-*"))
    run_command("encode", *flags)
    run_command("encode", *_flags(vae_dir, digits_dir, whole, shard_images=512))
    assert _files(broken) == _files(whole)


@pytest.mark.parametrize("change", ["data.image_size=-4", "data.num_threads=-3", "seed=-1"])
def test_numbers_out_of_range_are_refused_before_anything_is_read(run_command, tmp_path, change):
    flags = ["--config", "configs/smoke.py", f"--config.{change}", "--vae", tmp_path]
    error = run_command("encode", *flags, "--out", tmp_path / "x.png", fails=True)
    assert re.match(rf"error: (--config\.)?{change} must be a whole number in ", error)
    assert not list(tmp_path.iterdir())
