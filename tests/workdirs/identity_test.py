"""A dataset is recognised by what is in it, wherever it is opened again."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from configs import smoke
from dit_jax import latents, train, workdirs
from dit_jax.evaluation import bits_per_dim, references
from dit_jax.latents import shards, store
from dit_jax.sampling import requests, runs
from dit_jax.workdirs import digests, identity

STRANGE = [None, 5, "x", [], {}, [1], True, {"a": 1}, 10**30, float("nan"), ["a", "a"]]
IDENTITY = {
    "num_examples": 4,
    "version": None,
    "classes": ["ant", "bee"],
    "labels": "ab",
    "captions": None,
    "files": "cd",
    "times": "ef",
    "contents": "gh",
    "bytes_read": 100,
}


def _save(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(pixels).save(path.with_suffix(".bmp"))  # all of one size


@pytest.fixture
def folder(tmp_path):
    return _make_folder(tmp_path / "images")


def _make_folder(root):
    """Two classes of eight images, and two to evaluate."""
    for split, count in (("train", 8), ("val", 2)):
        for label, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                _save(root / split / name / str(i), 100 * label + i)
    return root


@pytest.fixture
def config(folder):
    return _configure(folder)


def _configure(folder):
    """A short run on the folder."""
    config = smoke.get_config()
    data = dict(source="folder", name=str(folder), train_split="train", eval_split="val")
    config.data.update(**data)
    config.model.num_classes = 2
    config.update(total_steps=2, checkpoint_every_steps=1, sample_every_steps=0)
    config.update(eval_every_steps=2, batch_size=8)
    config.optim.warmup_steps = 0
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(a folder of images and the finished run on them, a copy of both)."""
    home = tmp_path_factory.mktemp("finished") / "home"
    train.train_and_evaluate(_configure(_make_folder(home / "images")), home / "run")
    return home, shutil.copytree(home, home.with_name("copy"))


@pytest.fixture
def trained(finished):
    """(images, config, workdir) of the finished run at its own path, to change."""
    home, copy = finished
    shutil.rmtree(home)
    shutil.copytree(copy, home)
    return home / "images", _configure(home / "images"), home / "run"


def _identify(config, recorded=None):
    return identity.identify(latents.open_split(config, "train"), recorded)


def _replace(root):
    _save(root / "train" / "ant" / "3", 7_000)


def _rename_class(root):
    (root / "train" / "bee").rename(root / "train" / "cat")


def _swap_classes(root):
    train = root / "train"
    (train / "ant").rename(train / "x")
    (train / "bee").rename(train / "ant")
    (train / "x").rename(train / "bee")


def _rename_file(root):
    (root / "train" / "bee" / "3.bmp").rename(root / "train" / "bee" / "x.bmp")


def _add(root):
    _save(root / "train" / "bee" / "9", 9)


CHANGES = {
    _replace: "contents of files differ, of the same names and sizes",
    _rename_class: "name of class 1: then 'bee', now 'cat'",
    _swap_classes: "contents of files differ",
    _rename_file: "names or sizes of files differ",
    _add: "num examples: then 16, now 17",
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_images_are_not_the_same(folder, config, change):
    before = _identify(config)
    assert json.loads(json.dumps(before)) == before
    change(folder)
    changes = identity.describe_changes(before, _identify(config, before))
    assert CHANGES[change] in "; ".join(changes)


def test_images_of_another_content_with_the_old_times_are_not_the_same(folder, config):
    before = _identify(config)
    path = next((folder / "train").rglob("*.*"))
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)
    os.utime(path, ns=times)
    changes = identity.describe_changes(before, _identify(config, before))
    assert changes == ["contents of files differ, of the same names and sizes"]


def test_moved_and_copied_images_are_the_same(folder, config, tmp_path):
    before = _identify(config)
    config.data.name = str(
        shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    )
    now = _identify(config, before)
    assert now["times"] != before["times"]
    assert not identity.describe_changes(before, now)


def test_contents_are_not_read_again_where_nothing_has_changed(folder, config, monkeypatch):
    before = _identify(config)
    monkeypatch.setattr(identity, "_read_contents", lambda *_: pytest.fail("read"))
    assert _identify(config, before) == before


def test_of_large_datasets_a_sample_is_read(folder, config, monkeypatch):
    whole = _identify(config)
    monkeypatch.setattr(identity, "READ_WHOLE_BYTES", 1000)
    monkeypatch.setattr(identity, "MAX_FILES", 4)
    monkeypatch.setattr(identity, "BLOCK_BYTES", 100)
    sampled = _identify(config)
    assert sampled["bytes_read"] == 4 * 3 * 100 < whole["bytes_read"]
    _replace(folder)
    assert sampled["times"] != _identify(config)["times"]
    _save(folder / "train" / "ant" / "0", 5)  # the first is one of the four
    assert _identify(config)["contents"] != sampled["contents"]


def test_records_of_tfds_are_recognised(digits_dir, smoke_config, tmp_path):
    before = _identify(smoke_config)
    assert before["version"].startswith("digits/1.0.0 ")
    smoke_config.data.data_dir = str(shutil.copytree(digits_dir, tmp_path / "tfds"))
    assert not identity.describe_changes(before, _identify(smoke_config))
    (shard,) = tmp_path.glob("tfds/digits/*/digits-train*")
    contents = bytearray(shard.read_bytes())
    contents[-1] ^= 1
    times = shard.stat().st_atime_ns, shard.stat().st_mtime_ns
    shard.write_bytes(contents)
    changes = identity.describe_changes(before, _identify(smoke_config))
    assert changes == ["contents of files differ, of the same names and sizes"]
    os.utime(shard, ns=times)
    smoke_config.data.train_split = "train[:70]"
    assert len(identity.describe_changes(before, _identify(smoke_config))) == 3


@pytest.mark.parametrize("change", [_replace, _rename_class])
def test_a_run_goes_on_with_its_own_data_alone(trained, change):
    folder, config, run = trained
    data = workdirs.load_data(run)
    assert data["train"]["classes"] == ["ant", "bee"]
    assert data["eval"]["num_examples"] == 4
    assert runs.load(run).make_request(2, labels="bee,ant").cond.tolist() == [1, 0]
    change(folder)
    config.total_steps = 3
    message = rf"image folder .*train is not what the run in {run} was begun with:\n  .*differ"
    if change is _rename_class:
        (folder / "val" / "bee").rename(folder / "val" / "cat")
        message = r"name of class 1: then 'bee', now 'cat'"
    before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
    with pytest.raises(ValueError, match=message):
        train.train_and_evaluate(config, run)
    assert {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")} == before
    extractor = references.Extractor("pixels", "float32", "", None, {})
    with pytest.raises(ValueError, match="is not what the run in"):
        references.load_for_run(config, None, extractor, workdir=run)


def test_bits_are_of_the_run_s_own_held_out_images(trained):
    folder, _, run = trained
    _save(folder / "val" / "ant" / "0", 9_000)
    with pytest.raises(ValueError, match=rf"val is not what the run in {run} was begun with"):
        bits_per_dim.evaluate(runs.load(run), run, num=2, steps=2)
    assert not (run / "evaluations.jsonl").exists()


def test_record_of_a_split_stays_while_the_run_does_not_read_it(trained):
    """As with eval_every_steps=0: the held-out images are compared when they are read again."""
    _, config, run = trained
    recorded = workdirs.load_data(run)
    now = identity.check_splits({"train": latents.open_split(config, "train")}, run)
    assert now["eval"] == recorded["eval"]


def test_a_run_goes_on_with_data_that_were_moved(trained):
    folder, config, run = trained
    config.data.name = str(folder.rename(folder.with_name("elsewhere"))) + "/"
    config.total_steps = 3
    assert int(train.train_and_evaluate(config, run).step) == 3
    assert workdirs.load_config(run).data.name == config.data.name
    config.total_steps = 4  # also where config.json and the newest checkpoint differ in it
    assert int(train.train_and_evaluate(config, run).step) == 4


def test_before_the_first_checkpoint_other_data_are_no_error(folder, config, tmp_path):
    """Such as those from which a damaged image was removed."""
    source = latents.open_split(config, "train")
    workdirs.write_data(tmp_path, identity.check_splits({"train": source}, tmp_path))
    (folder / "train" / "ant" / "3.bmp").unlink()
    source = latents.open_split(config, "train")
    assert identity.check_splits({"train": source}, tmp_path)["train"]["num_examples"] == 15


def test_names_of_classes_that_come_or_go_are_said(config, caplog):
    source = latents.open_split(config, "train")
    recorded = identity.identify(source)
    nameless = dataclasses.replace(source, class_names=None)
    assert identity.check(nameless, recorded, "the run")["classes"] == ["ant", "bee"]
    assert "have no names now; the recorded names are kept: ant, bee" in caplog.text
    recorded["classes"] = None
    assert identity.check(source, recorded, "the run")["classes"] == ["ant", "bee"]
    assert "had no names before; their names now: ant, bee" in caplog.text


def test_labels_of_the_same_files_count_where_names_of_classes_are_not_known(folder, config):
    """Held-out bees were class 1 after ant; they are class 0 before cat."""
    shutil.rmtree(folder / "val" / "ant")
    recorded = identity.identify(latents.open_split(config, "eval")) | {"classes": None}
    (folder / "train" / "ant").rename(folder / "train" / "cat")
    source = latents.open_split(config, "eval")
    changes = identity.describe_changes(recorded, identity.identify(source))
    assert changes == ["labels of images differ"]
    with pytest.raises(ValueError, match="is not what the run was begun with:\n  labels of images"):
        identity.check(source, recorded, "the run")


def test_what_a_sample_of_the_contents_does_not_show_is_said(folder, config, monkeypatch, caplog):
    monkeypatch.setattr(identity, "READ_WHOLE_BYTES", 100)
    monkeypatch.setattr(identity, "MAX_FILES", 2)
    source = latents.open_split(config, "train")
    recorded = identity.identify(source)
    identity.check(source, recorded, "the run")
    assert not caplog.text
    path = folder / "train" / "ant" / "3.bmp"  # not one of the two
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    identity.check(latents.open_split(config, "train"), recorded, "the run")
    assert "were copied or changed since the run was begun" in caplog.text


def test_record_is_kept_with_the_checkpoints_too(trained):
    _, _, run = trained
    data = workdirs.load_data(run)
    for damage in (b"", b"[]", b"{", b'{"train": 3}', None):
        if damage is None:
            (run / "data.json").unlink()
        else:
            (run / "data.json").write_bytes(damage)
        assert workdirs.load_data(run) == data


def test_a_run_of_an_older_version_says_what_is_not_known(trained, caplog):
    _, config, run = trained
    caplog.set_level("INFO")
    (run / "data.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "load_data", lambda _: {})
        config.total_steps = 3
        train.train_and_evaluate(config, run)
    assert "classes: ant, bee" in caplog.text
    assert f"{run} has no identities of its data" in caplog.text
    assert workdirs.load_data(run)["train"]["num_examples"] == 16


def test_moments_are_of_their_images(folder, config, vae_dir, tmp_path):
    config.model.update(input_size=4, in_channels=2)
    config.latents.update(source="moments", moments=str(tmp_path / "out"), scale=(), shift=())
    config.data.flip = False
    (tmp_path / "out").mkdir()
    shards.claim(tmp_path / "out", {"dataset": "another"}, {})  # and stopped before a shard
    store.encode(config, vae_dir, tmp_path / "out", shard_images=8)
    source = latents.open_split(config, "train")
    assert source.class_names == ("ant", "bee")
    config.data.name = str(folder.rename(folder.with_name("moved")))
    folder = folder.with_name("moved")
    store.encode(config, vae_dir, tmp_path / "out", shard_images=8)
    _save(folder / "train" / "ant" / "3", 8_000)
    with pytest.raises(ValueError, match=r"another way:\n  dataset.train.contents: then '"):
        store.encode(config, vae_dir, tmp_path / "out", shard_images=8)
    _rename_class(folder)
    (folder / "val" / "bee").rename(folder / "val" / "cat")
    message = r"dataset.train.classes: then \[ant, bee\], now \[ant, cat\]"
    with pytest.raises(ValueError, match=message):
        store.encode(config, vae_dir, tmp_path / "out", shard_images=8)


def test_captions_are_drawn_of_the_run_s_own_data(captioned_config, captioned_dir, tmp_path):
    root = shutil.copytree(captioned_dir, tmp_path / "images")
    captioned_config.data.update(name=str(root), eval_split="test")
    run = tmp_path / "run"
    splits = {"eval": latents.open_split(captioned_config, "eval")}
    run.mkdir()
    workdirs.write_data(run, identity.check_splits(splits, run))
    (run / "checkpoints" / "1").mkdir(parents=True)  # it is trained
    requests.draw(captioned_config, "random", 4, workdir=run)
    path = root / "test" / "metadata.jsonl"
    path.write_text(path.read_text().replace("a one", "a two"))
    with pytest.raises(ValueError, match="captions of images differ"):
        requests.draw(captioned_config, "random", 4, workdir=run)


def test_identities_are_those_of_splits():
    identity.check_identities({}, "x")
    whole = {"train": IDENTITY, "images": {"train": IDENTITY, "eval": IDENTITY}}
    identity.check_identities(whole, "x")
    without = {key: value for key, value in IDENTITY.items() if key != "times"}
    identity.check_identities({"train": without}, "x")  # of what was encoded
    for value in (None, [], {"train": []}, {"images": {"train": {}}}, {"images": IDENTITY}):
        with pytest.raises(ValueError, match="holds no identit"):
            identity.check_identities(value, "x")


@pytest.mark.parametrize("key", IDENTITY)
def test_strange_identities_are_refused(key):
    def check(value):
        identity.check_identities({"train": value}, "x")

    allowed = {"num_examples": [5], "bytes_read": [5], "classes": [None]}.get(key, [None, "x"])
    for value in STRANGE:
        if value in allowed and not isinstance(value, bool):
            check(IDENTITY | {key: value})
            continue
        with pytest.raises(ValueError, match=f"^x: train holds no identity of a dataset: {key}.$"):
            check(IDENTITY | {key: value})
    if key != "times":
        del (less := dict(IDENTITY))[key]
        with pytest.raises(ValueError, match=f": {key}.$"):
            check(less)


@pytest.mark.parametrize("damage", ["names in another order", "another type", "no contents"])
def test_data_json_that_is_damaged_is_the_checkpoint_s(workdir, damage, caplog):
    path = workdir / "data.json"
    whole = workdirs.load_data(workdir)
    assert "WARNING" not in caplog.text
    data = json.loads(path.read_text())
    if damage == "names in another order":
        data["train"]["classes"] = ["b", "a"]
    else:
        data["train"]["classes"] = [1, 2] if damage == "another type" else None
        data["train"].pop("contents")
        data = digests.with_digest({key: value for key, value in data.items() if key != "digest"})
    path.write_text(json.dumps(data))
    assert workdirs.load_data(workdir) == whole
