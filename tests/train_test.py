"""The loop end to end: it learns, writes what it says, and stops well when something is wrong."""

import importlib
import itertools
import json
import re
import resource
import shutil

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.close import assert_trees_close
from PIL import Image

from configs import default, imagenet256, smoke
from dit_jax import conditions, models, sharding, train
from dit_jax.models import dit
from dit_jax.system import files
from dit_jax.training import initial_state, optimizer, programs, tasks
from dit_jax.workdirs import checkpoint


def _metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_run_writes_metrics_samples_and_checkpoints(trained_workdir):
    lines = _metrics(trained_workdir)
    reports = [line for line in lines if "loss" in line]
    assert [line["step"] for line in reports] == [10, 20, 30, 40]
    names = {"step", "loss", "mse", "vb", "grad_norm", "param_norm", "learning_rate", "img_per_s"}
    assert reports[0].keys() == names
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [20, 40]
    assert reports[-1]["loss"] < 0.8 * reports[0]["loss"]
    steps = sorted(int(path.name) for path in (trained_workdir / "checkpoints").iterdir())
    assert steps == [20, 30, 40]
    image = Image.open(trained_workdir / "samples" / "40.png")
    assert image.size == (4 * 50 - 2, 3 * 50 - 2)  # 10 images, 8 px enlarged to 48, 2 px apart
    assert list((trained_workdir / "tensorboard").glob("events*"))


def test_model_that_memory_does_not_hold_is_an_error(smoke_config):
    """Of terabytes; the value of its step would never come."""
    smoke_config.model.update(hidden_size=2**20, mlp_ratio=100.0)
    program = programs.make_program(smoke_config, jax.devices()[:1])
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED: Out of memory"):
        initial_state.new_state(program, jax.random.key(0))


def test_evaluation_repeats_itself(trained_workdir, smoke_config):
    """The same weights on one device more or less give the same held-out loss."""
    program = programs.make_program(smoke_config, jax.devices()[:4])
    source = conditions.open_images(smoke_config, "test")
    params, _ = checkpoint.restore_params(trained_workdir, program.state.params)
    first = programs.compile_evaluate(program, source, tasks.Frozen())(params)
    recorded = [line for line in _metrics(trained_workdir) if "eval_loss" in line][-1]
    assert_trees_close(first, {name: recorded[name] for name in first}, 1e-5)


class _Repeated:
    """A source of examples, over and over."""

    views = 1

    def __init__(self, examples, times):
        self.examples, self.times = examples, times

    def __len__(self):
        return len(self.examples) * self.times

    def __getitem__(self, i):
        return self.examples[i % len(self.examples)]


def test_every_batch_and_draw_of_an_evaluation_has_noise_of_its_own(smoke_config):
    """One batch drawn twice counts as two batches of the same images, and not as one."""

    def evaluate(times, draws):
        smoke_config.eval_draws = draws
        program = programs.make_program(smoke_config, jax.devices()[:1])
        return programs.compile_evaluate(program, _Repeated(examples, times), tasks.Frozen())(
            params
        )

    source = conditions.open_images(smoke_config, "test")
    examples = [source[i] for i in range(16)]
    params = conftest.random_params(models.build(smoke_config.model))
    once, twice, repeated = evaluate(1, 1), evaluate(1, 2), evaluate(2, 1)
    assert twice == repeated
    assert twice["eval_mse"] != once["eval_mse"]


def test_finished_run_says_so_and_changes_nothing(trained_workdir, caplog, smoke_config):
    before = _metrics(trained_workdir)
    with caplog.at_level("INFO", "dit_jax"):
        state = train.train_and_evaluate(smoke_config, trained_workdir)
    assert int(state.step) == 40
    assert "is done: step 40 of 40" in caplog.text
    assert _metrics(trained_workdir) == before


@pytest.fixture(scope="module")
def stepper(digits_dir):
    """(new state, step(state) on one batch of 16 digits of classes 0 to 4) on one device."""
    config = smoke.get_config()
    config.data.data_dir = str(digits_dir)
    config.optim.ema_decay = 0.75
    program = programs.make_program(config, jax.devices()[:1])
    source = conditions.open_images(config, "train")
    records = [i for i in range(100) if source[i]["label"] < 5][:16]
    batch = {name: np.stack([source[i][name] for i in records]) for name in ("image", "label")}
    batch = sharding.put_batch(program.mesh, batch)
    key = jax.random.key(0)
    step_fn = programs.compile_train_step(program)
    return lambda: initial_state.new_state(program, key), lambda state: step_fn(
        state, batch, key, tasks.Frozen()
    )


def test_one_batch_is_overfitted(stepper):
    new_state, step = stepper
    state, losses = new_state(), []
    table = np.asarray(state.params["y_embedder"]["embedding"])
    for _ in range(60):
        state, scalars = step(state)
        losses.append(float(scalars["mse"]))
    assert np.mean(losses[:5]) > 0.9
    assert np.mean(losses[-10:]) < 0.4
    moved = np.abs(np.asarray(state.params["y_embedder"]["embedding"]) - table).max(axis=1) > 0
    assert moved.tolist() == 5 * [True] + 5 * [False] + [True]  # the classes seen, and null


def test_every_step_draws_other_noise(stepper):
    new_state, step = stepper
    states = [new_state() for _ in range(4)]
    states = [s.replace(step=s.step + i) for s, i in zip(states, (0, 1, 2, 1), strict=True)]
    losses = [float(step(state)[1]["mse"]) for state in states]
    assert len(set(losses)) == 3
    assert losses[1] == losses[3]


def test_ema_is_of_the_step_s_own_result(stepper):
    new_state, step = stepper
    initial = jax.device_get(new_state().params)
    state, _ = step(new_state())
    expected = jax.tree.map(lambda new, old: 0.75 * old + 0.25 * new, state.params, initial)
    assert_trees_close(state.ema_params, expected, 3e-7)


def test_labels_are_dropped_with_the_configured_probability():
    label = jnp.arange(20_000) % 10
    dropped = conditions.drop(jax.random.key(0), label, 0.1, 10)
    assert float(jnp.mean(dropped == 10)) == pytest.approx(0.1, abs=0.01)
    assert bool(jnp.all((dropped == label) | (dropped == 10)))
    np.testing.assert_array_equal(conditions.drop(jax.random.key(0), label, 0.0, 10), label)


@pytest.mark.parametrize(
    ("size", "patch"), zip(dit.SIZES, itertools.cycle((2, 4, 8)), strict=False)
)
def test_imagenet_configs_build_without_allocating(size, patch):
    config = imagenet256.get_config(f"DiT-{size}/{patch}")
    config.mesh.update(data=2, fsdp=4)
    config.model.scan_unroll = False
    program = programs.make_program(config)
    batch = {
        "moments": jax.ShapeDtypeStruct((256, 32, 32, 8), np.float16),
        "label": jax.ShapeDtypeStruct((256,), np.int32),
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    _, scalars = jax.eval_shape(
        lambda *a: programs.train_step(*a, program=program),
        program.state,
        batch,
        key,
        tasks.Frozen(),
    )
    assert scalars["loss"].shape == ()


CONFIGS = sorted(path.stem for path in (conftest.ROOT / "configs").glob("*.py"))
CONFIGS += [f"digits:{process}" for process in default.PROCESSES if process != "ddpm"]
CONFIGS += ["digits_latents:edm", "imagenet256:DiT-S/8,edm", "imagenet512:DiT-S/4"]
CONFIGS += ["openmoji64:DiT-B/4,flow", "openmoji64_text:DiT-B/4"]
CONFIGS += ["openmoji32_text:unet", "openmoji64_text:unet", "sd_finetune:sd2", "adm:imagenet256"]


# Seconds to trace.
LARGE = ("sd_finetune", "sd_finetune:sd2", "unet_cifar10", "unet_imagenet256")
LARGE += ("adm", "adm:imagenet256", "openmoji32_text:unet", "openmoji64_text:unet")
LARGE += ("vae_imagenet256", "vae_openmoji64")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in CONFIGS]
)
def test_every_config_builds_without_allocating(name):
    module, *argument = name.split(":")
    config = importlib.import_module(f"configs.{module}").get_config(*argument)
    if "scan_unroll" in config.model:
        config.model.scan_unroll = False  # fast to trace
    if not config.latents.get("scale", True):  # as the moments will record
        config.latents.update(scale=(1.0,), shift=(0.0,))
    program = programs.make_program(config, jax.devices()[:1])
    image, size = config.data.image_size, config.model.get("input_size")
    shapes = {"label": ((), np.int32)}
    if config.latents.source == "pixels":
        shapes["image"] = ((image, image, config.data.image_channels), np.uint8)
    else:
        factors = {"openmoji64": 4, "openmoji64_text": 4, "digits_latents": 2}
        assert size == image // factors.get(module, 8)
        shapes["moments"] = ((size, size, 2 * config.model.in_channels), np.float16)
    make_shape = {
        "tokens": lambda model: ((model.text_length,), np.int32),
        "context": lambda model: ((77, model.context_size), np.float16),
    }.get(config.model.get("condition"))
    null = None
    if make_shape:
        shapes[config.model.condition] = make_shape(config.model)
        null = jax.ShapeDtypeStruct(*make_shape(config.model))
    batch = {
        name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype)
        for name, (shape, dtype) in shapes.items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    _, scalars = jax.eval_shape(
        lambda *a: programs.train_step(*a, program=program),
        program.state,
        batch,
        key,
        tasks.Frozen(null=null),
    )
    assert scalars["loss"].shape == ()


def test_step_that_is_not_finite_stops_the_run(smoke_config, tmp_path, monkeypatch):
    """Step 7 makes the weights infinite, between the checkpoints of steps 6 and 8."""
    monkeypatch.setattr(
        optimizer, "schedule", lambda *_: lambda step: jnp.where(step == 6, jnp.inf, 1e-3)
    )
    smoke_config.update(checkpoint_every_steps=2, log_every_steps=5, sample_every_steps=0)
    with pytest.raises(FloatingPointError, match="step 7 is not finite") as error:
        train.train_and_evaluate(smoke_config, tmp_path)
    message = str(error.value)
    assert re.search(r"Last finite step: .* loss 0\.\d+", message)
    assert "lower optim.learning_rate" in message
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [2, 4, 6]
    params = programs.make_program(smoke_config).state.params
    for leaf in jax.tree.leaves(checkpoint.restore_params(tmp_path, params)):
        assert np.isfinite(leaf).all()


def test_workdir_that_is_moved_while_the_data_are_opened_is_not_begun_anew(
    workdir, smoke_config, monkeypatch
):
    open_split = train.latents.open_split

    def move(config, split):
        if workdir.is_dir():
            workdir.rename(workdir.with_name("moved"))
        return open_split(config, split)

    smoke_config.total_steps = 50
    monkeypatch.setattr(train.latents, "open_split", move)
    with pytest.raises(files.LostError, match=r"run is gone: it was removed or moved"):
        train.train_and_evaluate(smoke_config, workdir)
    assert not workdir.exists()


def test_unreadable_data_tell_what_is_kept(workdir, smoke_config, monkeypatch):
    def fail(_):
        raise OSError("cannot read a.png")

    smoke_config.total_steps = 50
    monkeypatch.setattr(train.loader.TrainIterator, "__next__", fail)
    with pytest.raises(OSError, match=r"a\.png") as error:
        train.train_and_evaluate(smoke_config, workdir)
    expected_message = (
        f"step 40 is kept in {workdir}; a run goes on with the data that it began with"
    )
    assert error.value.kept() == expected_message


@pytest.mark.slow
def test_full_disk_stops_the_run_and_keeps_the_last_checkpoint(workdir, smoke_config):
    smoke_config.total_steps = 50
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # no file may be larger
    try:
        with pytest.raises(OSError, match="last complete one is step 40") as error:
            train.train_and_evaluate(smoke_config, workdir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "Free space or give permission" in str(error.value)
    smoke_config.total_steps = 41
    assert int(train.train_and_evaluate(smoke_config, workdir).step) == 41


@pytest.mark.slow
def test_profile_of_chosen_steps_is_written(smoke_config, tmp_path):
    smoke_config.update(total_steps=6, profile_start_step=3, profile_num_steps=2)
    smoke_config.update(sample_every_steps=0)
    smoke_config.optim.warmup_steps = 5
    train.train_and_evaluate(smoke_config, tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_pixels_of_another_size_than_the_model_s_are_refused(smoke_config):
    smoke_config.data.image_size = 16
    with pytest.raises(ValueError, match="images are 16 x 16 x 1, but the model takes 8 x 8 x 1"):
        programs.make_program(smoke_config)


@pytest.mark.slow
def test_full_disk_is_told_without_the_libraries_tracebacks(digits_dir, tmp_path):
    flags = ["--config", "configs/smoke.py", "--workdir", tmp_path, "--config.total_steps=20"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the command inherits it
    try:
        process = conftest.start("train", *flags, f"--config.data.data_dir={digits_dir}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "error: cannot write a checkpoint" in stderr
    assert "Traceback" not in stderr


def test_grids_of_latents_without_a_vae_are_refused_before_the_first_step():
    config = imagenet256.get_config("DiT-S/8")
    config.sample_every_steps = 100
    with pytest.raises(ValueError, match=r"sample_every_steps=100 .* needs latents\.vae"):
        programs.make_program(config)


def test_accumulation_that_does_not_divide_is_refused(smoke_config):
    smoke_config.grad_accumulation_steps = 3
    with pytest.raises(ValueError, match=r"batch_size=16 must be a multiple of 6"):
        programs.make_program(smoke_config)


def test_null_condition_that_nothing_trains_is_refused(smoke_config):
    smoke_config.objective.condition_dropout = 0.0
    with pytest.raises(ValueError, match=r"condition_dropout=0 with model.null_condition=True"):
        programs.make_program(smoke_config, jax.devices()[:1])
    smoke_config.init_from = "runs/that_trained_it"
    programs.make_program(smoke_config, jax.devices()[:1])


def test_null_class_follows_the_number_of_classes(smoke_config):
    params = programs.make_program(smoke_config).state.params
    assert params["y_embedder"]["embedding"].shape == (11, 32)
    smoke_config.model.null_condition = False
    model = models.build(smoke_config.model)
    shapes = models.param_shapes(model)
    assert shapes["y_embedder"]["embedding"].shape == (10, 32)


def test_a_run_begins_with_the_weights_of_another(smoke_config, trained_workdir):
    """The newest EMA weights, in both places; the step and the optimizer begin anew."""
    smoke_config.init_from = str(trained_workdir)
    program = programs.make_program(smoke_config, jax.devices()[:1])
    state = initial_state.new_state(program, jax.random.key(0))
    expected, step = checkpoint.restore_params(trained_workdir, program.state.params)
    assert step == 40
    for params in (state.params, state.ema_params):
        jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert int(state.step) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    smoke_config.init_from = "nowhere"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        initial_state.new_state(
            programs.make_program(smoke_config, jax.devices()[:1]), jax.random.key(0)
        )


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"model.depth": 3}, ["model.depth: there 2, here 3"]),
        ({"model.num_heads": 4}, ["model.num_heads: there 2, here 4"]),  # the arrays are the same
        (
            {"objective.prediction": "v", "diffusion.schedule": "cosine"},
            [
                "diffusion.schedule: there 'linear', here 'cosine'",
                "objective.prediction: there 'eps'",
            ],
        ),
        (
            {
                "model.null_condition": False,
                "model.num_classes": 9,
                "sample.cfg_scale": 1.0,
            },
            ["model.num_classes: there 10, here 9", "model.null_condition: there True, here Fals"],
        ),
    ],
    ids=str,
)
def test_weights_of_another_model_are_no_beginning(smoke_config, trained_workdir, changes, lines):
    smoke_config.init_from = str(trained_workdir)
    smoke_config.update_from_flattened_dict(changes)
    program = programs.make_program(smoke_config, jax.devices()[:1])
    with pytest.raises(ValueError, match="holds weights of another model, process or") as error:
        initial_state.new_state(program, jax.random.key(0))
    actual = [line for line in str(error.value).splitlines() if line.startswith("  ")]
    assert len(actual) == len(lines)
    assert all(line in str(error.value) for line in lines)


def test_a_beginning_told_otherwise_is_warned_of(smoke_config, trained_workdir, tmp_path, caplog):
    workdir = tmp_path / "told"
    shutil.copytree(trained_workdir, workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["text"]["encoder_digest"] = "0123"
    (workdir / "config.json").write_text(json.dumps(config))
    smoke_config.init_from = str(workdir)
    smoke_config.text.encoder_digest = "4567"
    initial_state.new_state(
        programs.make_program(smoke_config, jax.devices()[:1]), jax.random.key(0)
    )
    assert "was trained on text.encoder_digest=0123, not 4567" in caplog.text


def test_a_beginning_may_differ_in_what_the_weights_do_not_mean(smoke_config, trained_workdir):
    smoke_config.init_from = str(trained_workdir)
    smoke_config.model.update(dtype="bfloat16", remat="full", scan_unroll=False, input_size=12)
    smoke_config.objective.condition_dropout = 0.3
    smoke_config.data.image_size = 12
    smoke_config.sample.cfg_scale = 2.0
    initial_state.new_state(
        programs.make_program(smoke_config, jax.devices()[:1]), jax.random.key(0)
    )


def test_profile_beyond_the_last_step_is_refused(smoke_config):
    smoke_config.update(total_steps=6, profile_start_step=6)
    with pytest.raises(ValueError, match="profile_start_step=6 must be below total_steps=6"):
        programs.make_program(smoke_config)
