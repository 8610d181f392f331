"""What a checkpoint restores, what it refuses, and what it does about damage."""

import errno
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dit_jax import train, workdirs
from dit_jax.system import files, stopping
from dit_jax.training import programs
from dit_jax.workdirs import checkpoint, digests


def _latest(workdir, config):
    program = programs.make_program(config)
    with checkpoint.open_manager(workdir, config) as manager:
        return checkpoint.restore_latest(manager, program.state)


def _restored(workdir, config, step):
    """The state of an older step."""
    state = programs.make_program(config).state
    items = {
        name: checkpoint.ocp.args.StandardRestore(getattr(state, name))
        for name in checkpoint.STATE_ITEMS
    }
    loaded, _ = checkpoint._restore(workdir / "checkpoints", step, items)
    return state.replace(step=step, **loaded)


def _assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_checkpoint_holds_state_data_and_config(workdir, smoke_config):
    state, data_state = _latest(workdir, smoke_config)
    assert int(state.step) == 40
    window = {"steps": 0, "sums": {}}  # step 40 was reported
    assert data_state.pop("data") == workdirs.load_data(workdir)
    assert data_state.pop("measured_by") == {}  # no distance
    assert data_state == {"next_batch": 40, "num_records": 1617, "window": window}
    items = {path.name for path in (workdir / "checkpoints" / "40").iterdir() if path.is_dir()}
    assert {"params", "ema_params", "opt_state", "data", "config"} <= items
    config = json.loads((workdir / "checkpoints" / "40" / "config" / "metadata").read_text())
    assert config == json.loads((workdir / "config.json").read_text())


def test_restores_on_another_mesh(workdir, smoke_config):
    state, _ = _latest(workdir, smoke_config)
    smoke_config.mesh.update(data=1, fsdp=4, tensor=2)
    other, _ = _latest(workdir, smoke_config)
    kernel = other.params["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.spec == jax.P(None, "fsdp", "tensor")
    _assert_equal(state, other)


@pytest.mark.slow
def test_goes_on_on_another_number_of_devices(workdir, smoke_config):
    smoke_config.mesh.update(data=2, fsdp=2, tensor=2)
    smoke_config.update(total_steps=42, sample_every_steps=0)
    assert int(train.train_and_evaluate(smoke_config, workdir).step) == 42


def _damage(step_directory):
    """Cuts the largest file of the checkpoint in half."""
    files = [path for path in step_directory.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[: len(content) // 2])


def _lose_a_file(step_directory):
    shutil.rmtree(step_directory / "opt_state")


def _garble(step_directory):
    (step_directory / "data" / "metadata").write_text('{"next_ba')


def _flip_a_bit(item):
    """Damage that changes one bit in the middle of an item's largest file."""

    def damage(step_directory):
        files = [path for path in (step_directory / item).rglob("*") if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)

    damage.__name__ = f"flip_a_bit_of_{item}"
    return damage


def _other_data_state(step_directory):
    (step_directory / "data" / "metadata").write_text('{"next_batch": 41, "num_records": 1617}')


def _lose_the_digest(step_directory):
    (step_directory / "digest" / "metadata").write_text("[]")


def _replace_by_the_one_before(step_directory):
    shutil.rmtree(step_directory)
    shutil.copytree(step_directory.with_name("30"), step_directory)


FLIPS = [_flip_a_bit(item) for item in checkpoint.STATE_ITEMS]


DAMAGES = [_damage, _lose_a_file, _garble, _other_data_state, _lose_the_digest]


def _fail_to_read(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "restore", fail)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, os.strerror(errno.EMFILE), "_METADATA"),
        ValueError('RESOURCE_EXHAUSTED: Error opening "zarr" driver: Too many open files'),
    ],
    ids=["Python's", "tensorstore's"],
)
def test_checkpoint_that_cannot_be_read_for_now_is_not_set_aside(
    workdir, smoke_config, monkeypatch, error
):
    _fail_to_read(monkeypatch, error)
    with pytest.raises(OSError, match=r"Too many open files: .*/checkpoints/40'") as caught:
        _latest(workdir, smoke_config)
    assert caught.value.errno == errno.EMFILE
    assert workdirs.saved_steps(workdir) == [20, 30, 40]


@pytest.mark.parametrize(
    "error",
    [MemoryError("Python's"), ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")],
    ids=["host", "device"],
)
def test_checkpoint_for_which_memory_is_short_is_not_set_aside(
    workdir, smoke_config, monkeypatch, error
):
    _fail_to_read(monkeypatch, error)
    with pytest.raises(type(error), match=r"Python's|Out of memory"):
        _latest(workdir, smoke_config)
    assert workdirs.saved_steps(workdir) == [20, 30, 40]


def test_signal_that_a_library_makes_an_error_of_is_no_damage(workdir, smoke_config, monkeypatch):
    """As Orbax does where the signal comes while it reads an array."""

    def fail(*_, **__):
        try:
            raise stopping.Stopped(signal.SIGTERM)
        except BaseException as error:
            raise Exception("Encountered error while reading array index") from error

    shapes = programs.make_program(smoke_config).state.params
    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "restore", fail)
    with pytest.raises(stopping.Stopped):
        checkpoint.restore_params(workdir, shapes)


def test_error_of_a_library_that_says_nothing_is_damage(workdir, smoke_config, monkeypatch):
    plain = checkpoint.ocp.Checkpointer.restore

    def fail_once(*arguments, **options):
        monkeypatch.setattr(checkpoint.ocp.Checkpointer, "restore", plain)
        raise AssertionError

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "restore", fail_once)
    state, _ = _latest(workdir, smoke_config)
    assert int(state.step) == 30


@pytest.mark.parametrize("damage", [*DAMAGES, _replace_by_the_one_before, *FLIPS])
def test_damaged_checkpoint_is_set_aside_for_the_one_before(workdir, smoke_config, damage, caplog):
    expected = _restored(workdir, smoke_config, 30)
    damage(workdir / "checkpoints" / "40")
    state, data_state = _latest(workdir, smoke_config)
    assert "checkpoint 40 cannot be read" in caplog.text
    assert (workdir / "corrupt_checkpoints" / "40").is_dir()
    assert not (workdir / "checkpoints" / "40").exists()
    assert int(state.step) == data_state["next_batch"] == 30
    _assert_equal(state, expected)


def test_run_whose_newest_checkpoint_is_damaged_ends_the_same(workdir, smoke_config):
    expected, _ = _latest(workdir, smoke_config)
    _flip_a_bit("opt_state")(workdir / "checkpoints" / "40")
    state = train.train_and_evaluate(smoke_config, workdir)
    assert (workdir / "checkpoints" / "40").is_dir()  # written again, from 30
    _assert_equal(state, expected)


def test_half_written_checkpoint_is_ignored(workdir, smoke_config):
    shutil.move(
        workdir / "checkpoints" / "40", workdir / "checkpoints" / "40.orbax-checkpoint-tmp-7"
    )
    state, _ = _latest(workdir, smoke_config)
    assert int(state.step) == 30


def test_all_damaged_is_an_error_and_not_a_new_beginning(workdir, smoke_config):
    for path in (workdir / "checkpoints").iterdir():
        _damage(path)
    with pytest.raises(OSError, match=r"can be read:\n  step 40.*\n  step 30.*\n  step 20"):
        train.train_and_evaluate(smoke_config, workdir)
    assert len(list((workdir / "checkpoints").iterdir())) == 3


def test_ema_and_raw_parameters_and_an_older_step(workdir, smoke_config):
    shapes = programs.make_program(smoke_config).state.params
    state, _ = _latest(workdir, smoke_config)
    ema, step = checkpoint.restore_params(workdir, shapes)
    raw, _ = checkpoint.restore_params(workdir, shapes, raw=True)
    assert step == 40
    _assert_equal(ema, state.ema_params)
    _assert_equal(raw, state.params)
    older, step = checkpoint.restore_params(workdir, shapes, step=20)
    assert step == 20
    different = jax.tree.map(lambda a, b: bool(np.any(a != b)), older, ema)
    assert any(jax.tree.leaves(different))


def test_only_the_requested_groups_of_parameters_are_read(workdir, smoke_config):
    shapes = programs.make_program(smoke_config).state.params
    whole, _ = checkpoint.restore_params(workdir, shapes)
    blocks, step = checkpoint.restore_params(workdir, {"blocks": shapes["blocks"]})
    assert step == 40
    _assert_equal(blocks, {"blocks": whole["blocks"]})


@pytest.mark.parametrize(("group", "step"), [("blocks", 30), ("x_embedder", 40)])
def test_requested_groups_alone_are_verified(workdir, smoke_config, group, step):
    """With another digest of one group, checkpoint 40 is damaged for those who ask for it."""
    shapes = programs.make_program(smoke_config).state.params
    path = workdir / "checkpoints" / "40" / "digest" / "metadata"
    saved = json.loads(path.read_text())
    (name,) = [name for name in saved if name.startswith(f"ema_params/{group}/")][:1]
    path.write_text(json.dumps(saved | {name: saved[name] ^ 1}))
    assert checkpoint.restore_params(workdir, {"blocks": shapes["blocks"]})[1] == step


def test_parameters_that_a_checkpoint_lacks_are_named(workdir, smoke_config):
    shapes = programs.make_program(smoke_config).state.params
    kernel = shapes["x_embedder"]["kernel"]
    for params in (shapes | {"new": {"kernel": kernel}}, {"new": {"kernel": kernel}}):
        with pytest.raises(OSError, match="step 40: it lacks ema_params/new/kernel"):
            checkpoint.restore_params(workdir, params)


def test_part_of_a_group_of_parameters_is_refused(workdir, smoke_config):
    """It would be a model without its bias, which none has been trained as."""
    shapes = programs.make_program(smoke_config).state.params
    part = shapes | {"x_embedder": {"kernel": shapes["x_embedder"]["kernel"]}}
    with pytest.raises(OSError, match="it holds ema_params/x_embedder/bias, which is not in the"):
        checkpoint.restore_params(workdir, part)


def test_missing_step_lists_those_there_are(workdir, smoke_config):
    shapes = programs.make_program(smoke_config).state.params
    with pytest.raises(FileNotFoundError, match=r"of step 25 .* there are: 20, 30, 40"):
        checkpoint.restore_params(workdir, shapes, step=25)
    with pytest.raises(FileNotFoundError, match=r"directory that dit_jax\.train has written"):
        workdirs.load_config(workdir / "samples")


@pytest.mark.slow
def test_retention_keeps_multiples_for_good(smoke_config, tmp_path):
    smoke_config.update(checkpoint_every_steps=5, checkpoint_keep=2, checkpoint_keep_every_steps=20)
    smoke_config.update(sample_every_steps=0, eval_every_steps=0)
    train.train_and_evaluate(smoke_config, tmp_path)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [20, 35, 40]


def test_parameters_come_from_the_newest_checkpoint_that_can_be_read(workdir, smoke_config):
    shapes = programs.make_program(smoke_config).state.params
    _flip_a_bit("ema_params")(workdir / "checkpoints" / "40")
    _, step = checkpoint.restore_params(workdir, shapes)
    assert step == 30
    _, step = checkpoint.restore_params(workdir, shapes, raw=True)  # these are whole
    assert step == 40
    with pytest.raises(OSError, match=r"(?s)step 40: .* choose another step: \[20, 30\]"):
        checkpoint.restore_params(workdir, shapes, step=40)
    assert (workdir / "checkpoints" / "40").is_dir()  # only training moves anything


def test_save_into_a_run_that_went_on_is_refused(workdir, smoke_config):
    program = programs.make_program(smoke_config)
    with checkpoint.open_manager(workdir, smoke_config) as manager:
        state, data_state = checkpoint.restore_latest(manager, program.state)
        with pytest.raises(OSError, match=r"checkpoint 35 was not written: .*\[20, 30, 40\]"):
            checkpoint.save(manager, 35, state, data_state, smoke_config)


@pytest.mark.parametrize("anew", [False, True])
def test_checkpoints_that_were_moved_away_are_missed(workdir, smoke_config, anew):
    """To say that none is saved, or to write the next ones elsewhere, is a new beginning."""
    directory = workdir / "checkpoints"
    with workdirs.claim(workdir, smoke_config) as lock:
        lock.check_together()
        directory.rename(workdir / "moved")
        if anew:
            directory.mkdir()
        with pytest.raises(files.LostError, match=r"(?s)checkpoints is gone: .* move it back"):
            lock.check_together()

    def write():
        with workdirs.claim(workdir, smoke_config):
            shutil.rmtree(directory)
            raise OSError("what could not be written there")

    with pytest.raises(files.LostError, match=r"(?s)checkpoints is gone: .* move it back"):
        write()


@pytest.mark.parametrize("when", ["before", "while"])
def test_workdir_that_was_moved_is_not_one_without_checkpoints(workdir, monkeypatch, when):
    """Its config has been read by then, and an empty answer would be taken for the truth."""
    away = workdir.with_name("away")
    if when == "before":
        workdir.rename(away)
    else:
        monkeypatch.setattr(checkpoint, "_restore", lambda *_: _move_and_fail(workdir, away))
    for read in (
        lambda: checkpoint.restore_params(workdir, {}),
        lambda: workdirs.load_data(workdir),
    ):
        with pytest.raises(files.LostError, match=r"run is gone: .* while this command ran"):
            read()


def _move_and_fail(workdir, away):
    workdir.rename(away)
    raise OSError("an array cannot be read")


def test_error_that_ended_the_run_is_not_hidden_by_one_of_writing(
    workdir, smoke_config, monkeypatch, caplog
):
    def fail():
        raise OSError("the disk is gone")

    def run():
        with checkpoint.open_manager(workdir, smoke_config) as manager:
            monkeypatch.setattr(manager, "close", fail)
            raise FloatingPointError("step 7")

    with pytest.raises(FloatingPointError, match="step 7"):
        run()
    assert "the disk is gone" in caplog.text


def test_digest_tells_bits_and_places_apart():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    others = [array.copy() for _ in range(4)]
    others[0][1, 2, 3] = np.nextafter(np.float32(23), np.float32(24))  # the last bit
    others[1][0, 0, 0] = -0.0
    others[2][:, [0, 1]] = others[2][:, [1, 0]]  # two rows changed places
    others[3].view(np.uint32)[0, 0, :2] ^= np.uint32(2**31)  # two signs
    actual = [int(digests.digest_arrays({"a": a})["a"]) for a in (array, *others)]
    assert len(set(actual)) == 5


def test_converted_models_have_no_raw_parameters(vae_dir):
    with pytest.raises(ValueError, match="holds only EMA parameters: leave out --raw"):
        checkpoint.restore_params(vae_dir, {}, raw=True)


def test_parameters_stay_until_those_that_replace_them_are_written(smoke_config, tmp_path):
    params = {"a": jax.numpy.zeros(2)}
    checkpoint.replace_params(tmp_path, smoke_config, params, 1, {"value": 0.5})

    def fail(*_, **__):
        raise OSError("the disk is full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.ocp.Checkpointer, "save", fail)
        with pytest.raises(OSError, match=r"cannot write .*the disk is full"):
            checkpoint.replace_params(tmp_path, smoke_config, params, 2, {"value": 0.25})
    assert workdirs.saved_steps(tmp_path) == [1]
    assert checkpoint.saved_values(tmp_path) == {"value": 0.5}
    checkpoint.replace_params(tmp_path, smoke_config, params, 2, {"value": 0.25})
    assert workdirs.saved_steps(tmp_path) == [2]


def test_conversion_that_a_signal_ends_leaves_no_temporary(tmp_path, monkeypatch):
    def stop(self, directory, **_):
        directory.with_name("0.orbax-checkpoint-tmp").mkdir()
        raise stopping.Stopped(signal.SIGINT)

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "save", stop)
    config = ConfigDict({"model": {"name": "vae"}})
    with pytest.raises(stopping.Stopped):
        checkpoint.save_params(tmp_path / "run", config, {"a": jax.numpy.zeros(2)})
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_process_that_could_not_write_does_not_wait_for_the_others(monkeypatch):
    """Orbax would have it wait where they do not come, in the `finally` of what failed."""
    keys = []

    def wait(key, timeout_ms):
        keys.append(key)

    monkeypatch.setattr(checkpoint.ocp.multihost, "get_barrier_sync_fn", lambda: wait)
    checkpoint._wait_at_barrier(key="written", timeout_ms=1)

    def write():
        try:
            raise OSError("the disk is full")
        finally:
            checkpoint._wait_at_barrier(key="finalized", timeout_ms=1)

    with pytest.raises(OSError, match="the disk is full"):
        write()
    assert keys == ["written"]
