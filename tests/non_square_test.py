"""Images that are no squares, through every command that reads, draws or shows them."""

import json

import numpy as np
import pytest
from conftest import VAE
from PIL import Image

from configs import default
from dit_jax.sampling import pictures

SIZES = ["--config.data.image_size=8x12", "--config.model.input_size=8x12"]
FEW_STEPS = [
    "--config.total_steps=2",
    "--config.optim.warmup_steps=0",
    "--config.eval_every_steps=2",
    "--config.sample_every_steps=2",
    "--config.checkpoint_every_steps=2",
]


@pytest.fixture
def train(run_command, digits_dir, tmp_path):
    """train(name, *flags): the workdir of two steps of configs/smoke.py."""

    def train(name, *flags, config="configs/smoke.py"):
        workdir = tmp_path / name
        flags = *FEW_STEPS, f"--config.data.data_dir={digits_dir}", *flags
        run_command("train", f"--config={config}", f"--workdir={workdir}", *flags)
        return workdir

    return train


def _sample(run_command, workdir, *flags):
    out = workdir.with_suffix(".npz")
    run_command("sample", f"--workdir={workdir}", "--num=10", f"--out={out}", *flags)
    with np.load(out) as file:
        return file["arr_0"]


def test_pixels_are_trained_on_drawn_edited_and_evaluated(run_command, train, tmp_path):
    workdir = train("pixels", *SIZES)
    assert _sample(run_command, workdir).shape == (10, 8, 12, 1)
    picture = Image.open(workdir / "samples" / "2.png")
    assert picture.size == (4 * (6 * 12 + 2) - 2, 3 * (6 * 8 + 2) - 2)  # 10 images, each x 6

    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    Image.new("L", (30, 20), 90).save(image)
    left = np.zeros((20, 30), np.uint8)
    left[:, :15] = 255
    Image.fromarray(left).save(mask)
    out = tmp_path / "inpainted.png"
    words = [f"--workdir={workdir}", f"--image={image}", f"--mask={mask}", f"--out={out}"]
    run_command("edit", "inpaint", *words, "--labels=3", "--num=2")
    grid = np.asarray(Image.open(out).convert("RGB"))
    shown = pictures.split_grid(grid, (8, 12))[..., 0].astype(int)
    original, edited = shown[0], shown[1:3]
    assert (np.abs(original - 90) <= 1).all()
    assert (np.abs(edited[:, :, 6:] - 90) <= 1).all()  # black stays
    assert np.abs(edited[:, :, :6] - 90).max() > 5

    words = [f"--workdir={workdir}", "--num=16", "--extractor=pixels"]
    run_command("evaluate", *words)
    row = json.loads((workdir / "evaluations.jsonl").read_text())
    assert row["fd_pixels"] > 0
    assert Image.open(workdir / row["picture"]).size == (10 * (6 * 12 + 2) - 2, 2 * (6 * 8 + 2) - 2)
    samples = workdir.with_suffix(".npz")
    reference = tmp_path / "reference.npz"
    made_of = [f"--reference={samples}", "--extractor=pixels"]
    run_command("evaluate", f"--make_reference={reference}", *made_of)
    measured = [f"--samples={samples}", f"--reference={reference}", "--extractor=pixels"]
    run_command("evaluate", *measured)
    row = json.loads((tmp_path / "pixels.evaluations.jsonl").read_text())
    assert row["fd_pixels"] == pytest.approx(0, abs=1e-6)
    assert row["reference"]["image_size"] == [8, 12]
    error = run_command("evaluate", *measured, "--image_size=12x8", fails=True)
    assert "has images of 8 x 12 pixels" in error


@pytest.mark.slow
def test_unet_takes_any_size_that_its_levels_halve(run_command, train, digits_dir, tmp_path):
    model = default.get_config("unet").model.to_dict()
    model |= dict(base_channels=16, channel_mult=(1, 2), blocks_per_level=1, attention_levels=(1,))
    model |= dict(input_size=(8, 12), in_channels=1, num_classes=10, norm_groups=8, head_dim=8)
    config = tmp_path / "config.py"
    config.write_text(
        "from configs import default, smoke\n\n\ndef get_config():\n"
        "    config = smoke.get_config().unlock()\n"
        "    config.model = default.get_config('unet').model\n"
        f"    config.model.update({model!r})\n"
        "    return config\n"
    )
    workdir = train("unet", "--config.data.image_size=8x12", config=config)
    assert _sample(run_command, workdir).shape == (10, 8, 12, 1)
    error = run_command(
        "train", f"--config={config}", f"--workdir={tmp_path / 'no'}",
        f"--config.data.data_dir={digits_dir}", "--config.data.image_size=8x11",
        "--config.model.input_size=8x11", fails=True,
    )  # fmt: skip
    assert "input_size=(8, 11) must be a multiple of 2" in error


@pytest.mark.slow
def test_latents_are_encoded_trained_on_and_decoded(run_command, train, digits_dir, tmp_path):
    vae = [f"--config.model.{key}={value}" for key, value in VAE.items() if key != "name"]
    vae_workdir = train(
        "vae", *vae, "--config.data.image_size=8x12", config="configs/vae_digits.py"
    )
    out = tmp_path / "reconstructed.png"
    data = [f"--config.data.data_dir={digits_dir}", "--config.data.image_size=8x12"]
    words = ["--config=configs/vae_digits.py", *data, f"--vae={vae_workdir}", f"--out={out}"]
    run_command("reconstruct", *words, "--num=4")
    assert Image.open(out).size == (2 * (6 * 24 + 2) - 2, 2 * (6 * 8 + 2) - 2)  # pairs

    moments = tmp_path / "moments"
    shapes = ["--config.data.image_size=8x12", "--config.model.input_size=4x6"]
    data = [f"--config.data.data_dir={digits_dir}", "--config.data.train_split=train[:32]"]
    data += ["--config.data.eval_split=test[:16]"]
    words = ["--config=configs/smoke.py", *shapes, *data]
    run_command("encode", *words, f"--vae={vae_workdir}", f"--out={moments}")
    workdir = train(
        "latents",
        *shapes,
        "--config.model.in_channels=2",
        "--config.latents.source=moments",
        f"--config.latents.moments={moments}",
        f"--config.latents.vae={vae_workdir}",
    )
    assert _sample(run_command, workdir).shape == (10, 8, 12, 1)
