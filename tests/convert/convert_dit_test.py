"""Exact coverage both ways, every layout, and DiTs from and to the files of others."""

import errno
import json
import math
import re
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers import published_configs, torch_format
from ml_collections import ConfigDict

from configs import dit_xl_2_256_published, smoke
from dit_jax import conditions, convert, sharding, workdirs
from dit_jax.convert import diffusers_dit, exported, parameters
from dit_jax.models import dit
from dit_jax.sampling import generate, runs
from dit_jax.system import files
from dit_jax.workdirs import checkpoint


def test_layouts(golden_params, published):
    """Spot checks, entry by entry; that the whole is right the golden output shows."""
    blocks = golden_params["blocks"]
    qkv = published["blocks.2.attn.qkv.weight"]  # [3D, D], rows ordered (3, heads, head size)
    assert blocks["attn"]["qkv"]["kernel"].shape == (3, 48, 3, 4, 12)
    assert blocks["attn"]["qkv"]["kernel"][2, 5, 2, 3, 7] == qkv[2 * 48 + 3 * 12 + 7, 5]
    patch = published["x_embedder.proj.weight"]  # [D, C, p, p]
    kernel = golden_params["x_embedder"]["kernel"]  # [p*p*C, D]
    assert kernel[(1 * 2 + 0) * 4 + 3, 9] == patch[9, 3, 1, 0]


def test_differences_are_listed_both_ways(golden_model_config, published):
    published["blocks.3.attn.proj.bias"] = published.pop("blocks.2.attn.proj.bias")
    published["final_layer.linear.bias"] = np.zeros(16, np.float32)
    with pytest.raises(ValueError, match="does not fit the model") as error:
        convert.load("dit", published, golden_model_config)
    message = str(error.value)
    assert "missing (1): blocks.2.attn.proj.bias (48,)" in message
    assert "unexpected (1): blocks.3.attn.proj.bias (48,)" in message
    assert "wrong shape (1): final_layer.linear.bias (16,) instead of (32,)" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(golden_model_config, published, value):
    broken = list(published)[2:6]
    for name in broken:
        published[name] = published[name].copy()
        published[name].flat[-1] = value
    with pytest.raises(ValueError, match="tensors hold NaN or infinity") as error:
        convert.load("dit", published, golden_model_config)
    assert str(error.value).startswith(f"4 of the checkpoint's {len(published)} tensors")
    assert f"such as {', '.join(broken[:3])}.\n" in str(error.value)


def test_another_position_table_is_refused(golden_model_config, published):
    published["pos_embed"] = published["pos_embed"][:, ::-1]
    with pytest.raises(ValueError, match="pos_embed differs from the sin-cos table by"):
        convert.load("dit", published, golden_model_config)


def test_unknown_format_lists_the_known(golden_model_config):
    with pytest.raises(ValueError, match="unknown format='sit'; choose one of dit"):
        convert.load("sit", {}, golden_model_config)


def test_another_model_s_config_is_refused(golden_model_config):
    with pytest.raises(ValueError, match="'dit', but 'vae' is asked for"):
        convert.load("vae", {}, golden_model_config)


@pytest.fixture
def diffusers_dir(published, tmp_path):
    """The golden DiT as diffusers writes one."""
    actual = {}
    for name, array in published.items():
        leaf = name.rpartition(".")[2]
        block = f"transformer_blocks.{name.split('.')[1]}" if name.startswith("blocks.") else ""
        if "attn.qkv" in name:
            for part, rows in zip("qkv", np.split(array, 3), strict=True):
                actual[f"{block}.attn1.to_{part}.{leaf}"] = rows
        elif "embedder.mlp" in name or "embedding_table" in name:
            module = {
                "t_embedder.mlp.0": "timestep_embedder.linear_1",
                "t_embedder.mlp.2": "timestep_embedder.linear_2",
                "y_embedder.embedding_table": "class_embedder.embedding_table",
            }[name.rpartition(".")[0]]
            for i in range(3):
                actual[f"transformer_blocks.{i}.norm1.emb.{module}.{leaf}"] = array
        elif name != "pos_embed":
            module = {
                "x_embedder.proj": "pos_embed.proj",
                "adaLN_modulation.1": f"{block}.norm1.linear",
                "attn.proj": f"{block}.attn1.to_out.0",
                "mlp.fc1": f"{block}.ff.net.0.proj",
                "mlp.fc2": f"{block}.ff.net.2",
                "final_layer.adaLN_modulation.1": "proj_out_1",
                "final_layer.linear": "proj_out_2",
            }[re.sub(r"^blocks\.\d+\.", "", name.rpartition(".")[0])]
            actual[f"{module}.{leaf}"] = array
    directory = tmp_path / "transformer"
    directory.mkdir()
    _write(directory, actual, published_configs.DIT)
    return directory


WEIGHTS = "diffusion_pytorch_model.safetensors"


def _write(directory, actual, config):
    actual = {name: np.ascontiguousarray(a) for name, a in actual.items()}
    safetensors.numpy.save_file(actual, directory / WEIGHTS)
    (directory / "config.json").write_text(json.dumps(config))


def _restore(workdir):
    mesh = sharding.make_mesh(ConfigDict(dict(data=-1, fsdp=1, tensor=1)), jax.devices()[:1])
    return checkpoint.load_model(workdir, mesh, "float32", "dit")[1]


def test_published_names_and_back_are_the_same_bits(golden_model_config, golden_params, published):
    back = convert.dit.to_published(golden_params, golden_model_config)
    assert back.keys() == published.keys()
    for name, array in published.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].dtype == np.float32
        assert back[name].flags.c_contiguous  # or safetensors writes other numbers
    again = convert.load("dit", back, golden_model_config)
    jax.tree.map(np.testing.assert_array_equal, again, golden_params)


def test_sizes_are_read_from_the_published_arrays(monkeypatch, golden_model_config, published):
    monkeypatch.setitem(dit.SIZES, "tiny", (48, 3, 4))
    sizes = convert.dit.read_sizes(published)
    assert sizes == {name: golden_model_config[name] for name in sizes}
    others = {"name", "null_condition", "block", "dtype", "attention", "remat"}
    others |= {"scan_unroll", "condition", "context_size"}
    others |= {"text_vocab_size", "text_length", "text_depth", "text_num_heads"}
    assert golden_model_config.keys() - sizes.keys() == others
    published["final_layer.linear.weight"] = published["final_layer.linear.weight"][:16]
    published["y_embedder.embedding_table.weight"] = np.zeros((1000, 48), np.float32)
    published["pos_embed"] = np.zeros((1, 64, 48), np.float32)
    published["blocks.0.mlp.fc1.weight"] = np.zeros((96, 48), np.float32)
    changed = dict(learn_sigma=False, num_classes=1000, null_condition=False)
    changed |= dict(input_size=16, mlp_ratio=2.0)
    assert convert.dit.read_sizes(published) == sizes | changed


def test_published_xl_2_is_its_config():
    """Names and shapes have the published count, and tell the config's sizes."""
    config = dit_xl_2_256_published.get_config()
    shapes = parameters.list_published(convert.dit.make_table(config.model))
    sample = config.sample
    recipe = sample.sampler, sample.steps, sample.cfg_scale, sample.cfg_channels
    assert recipe == ("ddpm", 250, 1.5, 3)
    assert sum(math.prod(shape) for shape in shapes.values()) == 675_129_632  # with pos_embed
    actual = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    assert {**config.model, **convert.dit.read_sizes(actual)} == dict(config.model)


@pytest.mark.parametrize("block", ["in-context", "cross-attention", "adaLN"])
def test_other_blocks_have_no_published_names(
    golden_model_config, golden_params, diffusers_dir, published, tmp_path, block
):
    config = dit_xl_2_256_published.get_config()
    config.model.update(golden_model_config, block=block)
    message = f"model.block='{block}' has no published names .* only 'adaLN-Zero' can be converted"
    np.savez(tmp_path / "dit.npz", **published)
    for source in (diffusers_dir, tmp_path / "dit.npz"):
        with pytest.raises(ValueError, match=message):
            convert.to_workdir("dit", source, tmp_path / "ours", config=config)
    checkpoint.save_params(tmp_path / "run", config, golden_params)
    with pytest.raises(ValueError, match=message):
        exported.write(tmp_path / "run", tmp_path / "dit.safetensors")
    with pytest.raises(ValueError, match=message):
        convert.dit.to_published(golden_params, config.model)
    assert not list(tmp_path.glob("*.safetensors"))


def test_models_of_captions_have_no_published_names(workdir, tmp_path):
    config = workdirs.load_config(workdir)
    config.model.condition = "tokens"
    with pytest.raises(ValueError, match=r"model\.condition='tokens' has no published names"):
        convert.dit.make_table(config.model)
    workdirs.write_config(workdir, config)
    with pytest.raises(ValueError, match="only 'label' can be converted"):
        exported.write(workdir, tmp_path / "dit.safetensors")


def test_file_of_the_published_names_needs_no_config(
    monkeypatch, golden_model_config, golden_params, published, tmp_path
):
    monkeypatch.setitem(dit.SIZES, "tiny", (48, 3, 4))
    np.savez(tmp_path / "dit.npz", **published)
    config = convert.to_workdir("dit", tmp_path / "dit.npz", tmp_path / "ours")
    assert config.model.to_dict() == golden_model_config.to_dict()
    assert workdirs.load_config(tmp_path / "ours").data.image_size == 64
    jax.tree.map(np.testing.assert_array_equal, _restore(tmp_path / "ours"), golden_params)


def test_diffusers_directory_gives_the_published_parameters(
    golden_model_config, golden_params, diffusers_dir, tmp_path
):
    config = convert.to_workdir("dit", diffusers_dir, tmp_path / "ours")
    assert config.model.to_dict() == golden_model_config.to_dict()
    assert config.data.image_size == 64
    jax.tree.map(np.testing.assert_array_equal, _restore(tmp_path / "ours"), golden_params)


def test_weights_that_torch_wrote_are_read(golden_params, diffusers_dir, tmp_path):
    actual = safetensors.numpy.load_file(diffusers_dir / WEIGHTS)
    (diffusers_dir / WEIGHTS).unlink()
    torch_format.save(diffusers_dir / "diffusion_pytorch_model.bin", *torch_format.tensors(actual))
    convert.to_workdir("dit", diffusers_dir, tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, _restore(tmp_path / "ours"), golden_params)


def test_files_in_several_parts_are_one(golden_params, diffusers_dir, tmp_path):
    actual = safetensors.numpy.load_file(diffusers_dir / WEIGHTS)
    (diffusers_dir / WEIGHTS).unlink()
    files = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(actual)}
    for file in set(files.values()):
        part = {name: array for name, array in actual.items() if files[name] == file}
        safetensors.numpy.save_file(part, diffusers_dir / file)
    (diffusers_dir / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": files}))
    convert.to_workdir("dit", diffusers_dir, tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, _restore(tmp_path / "ours"), golden_params)
    (diffusers_dir / "part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file at .*part-1\.safetensors"):
        convert.to_workdir("dit", diffusers_dir, tmp_path / "again")


def test_embedders_that_differ_are_named(diffusers_dir, tmp_path):
    actual = safetensors.numpy.load_file(diffusers_dir / WEIGHTS)
    time = "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_2.bias"
    label = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"
    actual[time.format(1)][3] += 1e-6
    actual[label.format(2)][7, 0] = 0
    _write(diffusers_dir, actual, published_configs.DIT)
    message = f"2 of the blocks' embedders .* such as {time.format(1)}, {label.format(2)}: "
    with pytest.raises(ValueError, match=message):
        convert.to_workdir("dit", diffusers_dir, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_missing_tensors_of_diffusers_are_listed_under_its_names(diffusers_dir, tmp_path):
    actual = safetensors.numpy.load_file(diffusers_dir / WEIGHTS)
    actual["transformer_blocks.3.attn1.to_k.bias"] = actual.pop(
        "transformer_blocks.2.attn1.to_k.bias"
    )
    actual["proj_out_2.bias"] = actual["proj_out_2.bias"][:16]
    _write(diffusers_dir, actual, published_configs.DIT)
    with pytest.raises(ValueError, match="does not fit the model") as error:
        convert.to_workdir("dit", diffusers_dir, tmp_path / "ours")
    assert "missing (1): transformer_blocks.2.attn1.to_k.bias (48,)" in str(error.value)
    assert "unexpected (1): transformer_blocks.3.attn1.to_k.bias (48,)" in str(error.value)
    assert "wrong shape (1): proj_out_2.bias (16,) instead of (32,)" in str(error.value)


def test_sizes_of_a_config_hold(golden_model_config, diffusers_dir, published, tmp_path):
    config = dit_xl_2_256_published.get_config()
    config.model.update(golden_model_config)
    config.model.depth = 2
    np.savez(tmp_path / "dit.npz", **published)
    for source in (diffusers_dir, tmp_path / "dit.npz"):
        with pytest.raises(ValueError, match="does not fit the model") as error:
            convert.to_workdir("dit", source, tmp_path / "ours", config=config)
        assert "wrong shape (0)" in str(error.value)
        assert "blocks.2." in str(error.value)
    config.model.update(depth=3, num_heads=3)  # of the same shapes
    with pytest.raises(ValueError, match=r"has 4 heads, but the config's model\.num_heads is 3"):
        convert.to_workdir("dit", diffusers_dir, tmp_path / "ours", config=config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(_class_name="UNet2DModel"), "describes the class UNet2DModel, but only DiTTrans"),
        (dict(_class_name=None), "describes the class None, but"),
        (dict(norm_type="layer_norm"), "norm_type='layer_norm'; supported: ada_norm_zero"),
        (dict(activation_fn="geglu"), "activation_fn='geglu'; supported: gelu-approximate"),
        (dict(attention_bias=False), "attention_bias=False; supported: True"),
        (dict(upcast_attention=True), "upcast_attention=True; supported: False"),
        (dict(norm_elementwise_affine=True), "norm_elementwise_affine=True; supported: False"),
        (dict(norm_eps=1e-3), "norm_eps=0.001; supported: 1e-05, 1e-06"),
        (dict(out_channels=5), "out_channels=5; supported: None, in_channels, or twice"),
        (
            dict(num_layers=0, sample_size=[8, 8], patch_size=True),
            r"(?s)num_layers=0; supp.*sample_size=\[8, 8\]; supp.*patch_size=True; supported: a",
        ),
    ],
)
def test_diffusers_model_of_another_kind_is_refused(diffusers_dir, change, message):
    (diffusers_dir / "config.json").write_text(json.dumps(published_configs.DIT | change))
    with pytest.raises(ValueError, match=message):
        diffusers_dit.read_sizes(diffusers_dir)


def test_configs_of_diffusers_may_leave_out_what_is_the_default(diffusers_dir):
    old = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}
    (diffusers_dir / "config.json").write_text(json.dumps(old | {"out_channels": 8}))
    published = dit_xl_2_256_published.get_config().model
    sizes = diffusers_dit.read_sizes(diffusers_dir)
    assert sizes == {name: published[name] for name in sizes}
    (diffusers_dir / "config.json").write_text(json.dumps(old | {"out_channels": None}))
    assert not diffusers_dit.read_sizes(diffusers_dir)["learn_sigma"]


def test_whole_pipeline_and_missing_files_are_refused_with_the_way_out(diffusers_dir, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"a complete pipeline\. .* run `convert dit .*/transformer DST`"
    ):
        convert.to_workdir("dit", tmp_path, tmp_path / "ours")
    (diffusers_dir / WEIGHTS).unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"no {WEIGHTS} or .* in .*, where diffusers writes"
    ):
        convert.to_workdir("dit", diffusers_dir, tmp_path / "ours")
    (diffusers_dir / "config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"config\.json: it must be .* that diffusers writes"
    ):
        convert.to_workdir("dit", diffusers_dir, tmp_path / "ours")


def test_file_of_other_names_or_sizes_without_a_name_is_refused(published, diffusers_dir, tmp_path):
    np.savez(tmp_path / "dit.npz", **published)
    with pytest.raises(ValueError, match=r"hidden_size=48 and depth=3, .* give --config"):
        convert.to_workdir("dit", tmp_path / "dit.npz", tmp_path / "ours")
    with pytest.raises(ValueError, match=r"'x_embedder.proj.weight': 'missing'.* as the directory"):
        convert.to_workdir("dit", diffusers_dir / WEIGHTS, tmp_path / "ours")


@pytest.fixture(scope="module")
def two_checkpoints(golden_model_config, golden_params, tmp_path_factory):
    """A workdir of two checkpoints, as training writes them. Do not change."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    config = dit_xl_2_256_published.get_config()
    config.model.update(golden_model_config)
    config.model.attention = "cudnn"  # not here
    (workdir / "checkpoints").mkdir(parents=True)
    workdirs.write_config(workdir, config)
    with checkpoint.open_manager(workdir, config) as manager:
        for step in (1, 2):
            scaled = [jax.tree.map(lambda a, k=k: k * a, golden_params) for k in (-step, step, 0)]
            trees = dict(zip(checkpoint.STATE_ITEMS, scaled, strict=True))
            state = types.SimpleNamespace(**trees)
            checkpoint.save(manager, step, state, {}, config)
    return workdir


@pytest.mark.parametrize(
    ("step", "raw", "factor"), [(None, False, 2), (1, False, 1), (2, True, -2), (1, True, -1)]
)
def test_export_takes_step_and_raw(two_checkpoints, published, tmp_path, step, raw, factor):
    out = tmp_path / "new" / "dit.safetensors"
    assert exported.write(two_checkpoints, out, step, raw) == abs(factor)
    arrays = safetensors.numpy.load_file(out)
    name = "blocks.2.attn.qkv.weight"
    np.testing.assert_array_equal(arrays[name], factor * published[name])
    np.testing.assert_array_equal(arrays["pos_embed"], published["pos_embed"])
    assert list(out.parent.iterdir()) == [out]
    assert out.stat().st_mode == (two_checkpoints / "config.json").stat().st_mode


def test_export_says_what_it_cannot_do(diffusers_dir, monkeypatch, tmp_path):
    convert.to_workdir("dit", diffusers_dir, tmp_path / "ours")
    with pytest.raises(ValueError, match=r"DST=.*dit\.npz must end in \.safetensors"):
        exported.write(tmp_path / "ours", tmp_path / "dit.npz")
    with pytest.raises(OSError, match=r"cannot write DST=.*config\.json/dit\.safetensors"):
        exported.write(tmp_path / "ours", tmp_path / "ours" / "config.json" / "dit.safetensors")
    out = tmp_path / "dit.safetensors"
    (tmp_path / "lpips").mkdir()
    other = ConfigDict({"model": {"name": "lpips", "dtype": "float32"}})
    workdirs.write_config(tmp_path / "lpips", other)
    with pytest.raises(ValueError, match="holds a 'lpips', not a 'dit'"):
        exported.write(tmp_path / "lpips", out)
    with pytest.raises(FileNotFoundError, match="must be a directory that"):
        exported.write(tmp_path, out)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3 in"):
        exported.write(tmp_path / "ours", out, step=3)
    with pytest.raises(ValueError, match="holds only EMA parameters: leave out --raw"):
        exported.write(tmp_path / "ours", out, raw=True)

    out.write_bytes(b"what was there")

    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match=rf"cannot write {out}: .*No space left"):
        exported.write(tmp_path / "ours", out)
    assert out.read_bytes() == b"what was there"
    assert not list(tmp_path.glob("*.tmp*"))


def test_commands(diffusers_dir, published, tmp_path, run_command):
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
    jax.tree.map(np.testing.assert_array_equal, _restore(tmp_path / "again"), _restore(output))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["sit", "SRC", "DST"],
            "say which of sd, dit, vae, unet, adm, lpips, inception, dinov2, clip, dit-export, "
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


def test_export_takes_the_config_along(workdir, tmp_path):
    """What comes back draws the same samples: a flow of pixels, whose sizes bear no name."""
    config = json.loads((workdir / "config.json").read_text())
    config["diffusion"]["process"] = "flow"
    config["objective"]["prediction"] = "u"
    config["sample"] |= dict(sampler="ab2", steps=3)
    config["data"] |= dict(source="folder", name="somewhere")
    for path in (workdir / "config.json", *workdir.glob("checkpoints/*/config/metadata")):
        path.write_text(json.dumps(config))
    exported.write(workdir, tmp_path / "flow.safetensors")
    back = convert.to_workdir("dit", tmp_path / "flow.safetensors", tmp_path / "back")
    config["data"] |= dict(data_dir="", name="")
    config["latents"]["moments"] = ""
    assert back.to_dict() == config
    output, reference = (_draw(directory) for directory in (workdir, tmp_path / "back"))
    np.testing.assert_array_equal(output, reference)
    del config["sample"]["last_step_t"]  # an older version's file
    config["sample"]["last_step_size"] = 0.0
    arrays = safetensors.numpy.load_file(tmp_path / "flow.safetensors")
    metadata = {exported.KEY: json.dumps(config)}
    safetensors.numpy.save_file(arrays, tmp_path / "older.safetensors", metadata)
    older = convert.to_workdir("dit", tmp_path / "older.safetensors", tmp_path / "older")
    assert older.to_dict() == back.to_dict()
    other = smoke.get_config()
    with pytest.raises(ValueError, match=r"was exported with diffusion=.* leave it out"):
        convert.to_workdir("dit", tmp_path / "flow.safetensors", tmp_path / "other", config=other)


def test_position_table_of_any_size_is_not_computed(golden_model_config):
    config = golden_model_config.copy_and_resolve_references()
    config.input_size = 2**20
    message = "are 274,877,906,944 tokens, of more than 67,108,864 numbers: no DiT has as many"
    with pytest.raises(ValueError, match=message):
        convert.dit.make_table(config)


def _draw(workdir):
    trained = runs.load(workdir)
    request = conditions.from_labels([0, 1], trained.config.model.num_classes)
    mesh, to_image = trained.mesh, trained.to_image
    return generate.generate(trained.make_sample_fn(), trained.params, request, 0, mesh, to_image)
