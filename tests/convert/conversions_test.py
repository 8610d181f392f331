"""Conversions to parameters and workdirs: arguments, and the command."""

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from helpers import published_files

from configs import dit_xl_2_256_published
from dit_jax import convert, workdirs


def test_unknown_kind_lists_the_known_ones(golden_model_config):
    with pytest.raises(ValueError, match="unknown kind='sit'; choose one of dit"):
        convert.load("sit", {}, golden_model_config)


def test_another_model_s_config_is_refused(golden_model_config):
    with pytest.raises(ValueError, match="'dit', but kind='vae'"):
        convert.load("vae", {}, golden_model_config)


def test_number_out_of_range_in_a_given_config_is_refused(golden_model_config, published, tmp_path):
    safetensors.numpy.save_file(published, tmp_path / "dit.safetensors")
    config = dit_xl_2_256_published.get_config()
    config.model.update(golden_model_config)
    config.diffusion.beta_end = float("nan")
    with pytest.raises(ValueError, match=r"diffusion\.beta_end=nan must be a number in \(0, 1\)"):
        convert.to_workdir("dit", tmp_path / "dit.safetensors", tmp_path / "ours", config=config)
    assert not (tmp_path / "ours").exists()


def test_export_command_inverts_the_conversion(published, tmp_path, run_command):
    diffusers_dir = published_files.write_dit(tmp_path / "transformer", published)
    output, out = tmp_path / "ours", tmp_path / "dit.safetensors"
    assert f'{output}: {{"attention": ' in run_command("convert", "dit", diffusers_dir, output)
    assert f"{out}: step 0" in run_command("convert", "dit-export", output, out)
    arrays = safetensors.numpy.load_file(out)
    assert arrays.keys() == published.keys()
    for name, array in published.items():
        np.testing.assert_array_equal(arrays[name], array)
    flags = ["--config", "configs/dit_xl_2_256_published.py"]
    for name in ("input_size", "hidden_size", "depth", "num_classes", "num_heads"):
        flags.append(f"--config.model.{name}={workdirs.load_config(output).model[name]}")
    run_command("convert", "dit", out, tmp_path / "again", *flags)
    again = workdirs.load_config(tmp_path / "again")
    assert again.model == workdirs.load_config(output).model
    jax.tree.map(
        np.testing.assert_array_equal,
        *(published_files.restore(workdir, "dit")[1] for workdir in (tmp_path / "again", output)),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["sit", "SRC", "DST"],
            "give one of sd, dit, vae, unet, adm, lpips, inception, dinov2, clip, dit-export, "
            "then SRC and DST",
        ),
        (["vae", "SRC", "DST", "--step=1"], "`convert vae` takes no --step"),
        (["dit", "SRC", "DST", "--raw"], "`convert dit` takes no --raw"),
        (["dit", "SRC.safetensors", "DST"], "no checkpoint file at SRC.safetensors"),
    ],
)
def test_wrong_commands_end_in_a_message(run_command, arguments, message):
    error = run_command("convert", *arguments, fails=True)
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
