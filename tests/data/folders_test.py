"""Folders of images as users have them: what is read, what is left out, what is refused.

Each folder has two classes of three images, and one trouble.
"""

import json
import os
import pickle
import unicodedata

import numpy as np
import pytest
from PIL import Image

from configs import default
from dit_jax import conditions
from dit_jax.data import folders
from dit_jax.evaluation import image_sets


@pytest.fixture
def root(tmp_path):
    """train/ant and train/bee, of three images each."""
    _classes(tmp_path / "train", ("ant", "bee"))
    return tmp_path


def _classes(split, classes):
    for i, name in enumerate(classes):
        for j in range(3):
            _save(split / name / f"{j}.png", (60 * i + 10, 0, 0))


def _save(path, color=(9, 9, 9), size=(16, 16), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)


@pytest.fixture
def config(root):
    """Of the folder, for a model of two classes."""
    config = default.get_config()
    config.data.update(source="folder", name=str(root), image_size=8, eval_split="val")
    config.model.num_classes = 2
    return config


def _unlabelled(config):
    config.model.update(num_classes=0, null_condition=False)
    return config


def _labels(config, split="train"):
    source = conditions.open_images(config, split)
    return [int(source[i]["label"]) for i in range(len(source))]


def test_a_class_per_folder_in_sorted_order(config, root):
    source = conditions.open_images(config, "train")
    assert source.class_names == source.records.class_names == ("ant", "bee")
    assert source.records.names[3] == "bee/0.png"
    assert source.records.sizes[3] == (root / "train" / "bee" / "0.png").stat().st_size
    assert _labels(config) == [0, 0, 0, 1, 1, 1]
    assert source[3]["image"].shape == (8, 8, 3)
    assert source[3]["image"][..., 0].tolist() == 8 * [8 * [70]]
    assert source.describe(3) == str(root / "train" / "bee" / "0.png")


def test_a_folder_goes_to_worker_processes(config):
    source = pickle.loads(pickle.dumps(conditions.open_images(config, "train")))
    np.testing.assert_array_equal(source[5]["label"], 1)


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "__MACOSX", "@eaDir", ".hidden"])
@pytest.mark.parametrize("empty", [True, False])
def test_hidden_and_system_folders_are_no_classes(config, root, name, empty, caplog):
    (root / "train" / name).mkdir()
    if not empty:
        _save(root / "train" / name / "0-checkpoint.png")
    with caplog.at_level("INFO", "dit_jax"):
        assert _labels(config) == [0, 0, 0, 1, 1, 1]
    assert f"1 hidden or system name left out, such as {name}" in caplog.text


def test_apple_double_files_are_no_images(config, root):
    (root / "train" / "ant" / "._0.png").write_bytes(b"\0\5\x16\7" + b"\0" * 78)
    assert _labels(config) == [0, 0, 0, 1, 1, 1]


def test_a_folder_named_like_an_image_is_none(config, root):
    (root / "train" / "ant" / "old.png").mkdir()
    assert _labels(config) == [0, 0, 0, 1, 1, 1]


def test_suffixes_in_any_case(config, root):
    for name in ("X.JPG", "Y.JPEG", "Z.Png"):
        _save(root / "train" / "ant" / name, format="PNG" if "Png" in name else "JPEG")
    assert _labels(config) == 6 * [0] + 3 * [1]


def test_other_splits_have_the_classes_of_the_training_split(config, root, caplog):
    """By name: the validation split lacks the first class, and has another order on the disk."""
    _classes(root / "train", ("cat",))
    _classes(root / "val", ("cat", "bee"))
    config.model.num_classes = 3
    with caplog.at_level("WARNING", "dit_jax"):
        assert _labels(config, "val") == [1, 1, 1, 2, 2, 2]
    assert conditions.open_images(config, "val").class_names == ("ant", "bee", "cat")
    assert f"{root / 'val'} has no images of 1 of the 3 classes: ant" in caplog.text
    _classes(root / "val", ("dog",))
    message = r"val has folders that are no classes of .*train: dog\. data\.train_split='train' def"
    with pytest.raises(ValueError, match=message):
        conditions.open_images(config, "val")
    (root / "train").rename(root / "learn")
    with pytest.raises(FileNotFoundError, match=r"no image folder .*/train: data.name is the root"):
        conditions.open_images(config, "val")


def test_names_of_classes_are_compared_in_one_spelling(config, root):
    """macOS stores é as two characters, others as one."""
    composed = unicodedata.normalize("NFC", "\u00e9t\u00e9")
    decomposed = unicodedata.normalize("NFD", composed)
    _classes(root / "train", (composed,))
    _classes(root / "val", (decomposed,))
    config.model.num_classes = 3
    assert _labels(config, "val") == [2, 2, 2]
    _classes(root / "train", (decomposed,))
    with pytest.raises(
        ValueError, match=r"two folders with the same name in two Unicode spellings, 'e"
    ):
        conditions.open_images(config, "train")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_without_images_is_refused(config, root, split):
    _classes(root / "val", ("ant",))
    (root / split / "bee").mkdir(exist_ok=True)
    for path in (root / split / "bee").iterdir():
        path.unlink()
    with pytest.raises(
        ValueError, match=rf"{split} has folders without images: bee\. Every folder"
    ):
        conditions.open_images(config, split)


def test_a_class_of_gifs_is_refused_and_they_are_counted(config, root, caplog):
    _save(root / "train" / "cow" / "0.gif")
    with pytest.raises(ValueError, match=r"has folders without images: cow \(but 1 \.gif\)"):
        conditions.open_images(config, "train")
    assert "1 image of other kinds left out: 1 .gif. Convert them; PNG, JPEG, WEBP" in caplog.text


def test_images_of_other_kinds_are_counted_once(config, root, caplog):
    for suffix, kind in (("gif", None), ("tiff", None), ("avif", "PNG"), ("jfif", "JPEG")):
        _save(root / "train" / "ant" / f"x.{suffix}", format=kind)
    for _ in range(2):
        assert _labels(config) == [0, 0, 0, 1, 1, 1]
    assert caplog.text.count("4 images of other kinds left out") == 1


@pytest.mark.parametrize("num_classes", [1, 3, 1000])
def test_a_model_of_another_number_of_classes_is_refused(config, num_classes):
    config.model.num_classes = num_classes
    message = rf"num_classes={num_classes}, but .*train has 2 classes: ant, bee\. Set model\.num_"
    with pytest.raises(ValueError, match=message):
        conditions.open_images(config, "train")


def test_images_beside_class_folders_are_refused(config, root):
    _save(root / "train" / "stray.png")
    message = r"has 1 image outside its class folders: stray\.png\. Move or"
    with pytest.raises(ValueError, match=message):
        conditions.open_images(config, "train")


def test_images_without_class_folders_are_trained_on_without_labels(config, root):
    for j in range(3):
        _save(root / "flat" / f"{j}.png")
    message = (
        r"flat has 3 images and no class folders, which model\.num_classes=2 needs\. Move .* "
        r"To train without labels, set model\.num_classes=0, model\.null_condition=False and sa"
    )
    with pytest.raises(ValueError, match=message):
        conditions.open_images(config, "flat")
    _unlabelled(config)
    assert _labels(config, "flat") == [0, 0, 0]
    assert conditions.open_images(config, "flat").class_names is None
    _save(root / "train" / "stray.png")
    (root / "train" / "empty").mkdir()
    files = conditions.open_images(config, "train").records.names
    assert [*files] == [*(f"{c}/{j}.png" for c in ("ant", "bee") for j in range(3)), "stray.png"]


def test_images_alone_need_no_classes(config, root):
    """As for a VAE: --config configs/imagenet256.py, and a folder of any images."""
    _save(root / "val" / "all" / "0.png")
    config.model.num_classes = 1000
    assert len(conditions.open_images(config, "val", labels=False)) == 1
    with pytest.raises(ValueError, match=r"val has folders that are no classes of .*: all"):
        conditions.open_images(config, "val")


def test_links_are_refused_together_with_what_to_do(config, root, tmp_path_factory):
    """Of a class, of a folder in one, and of a file that is gone."""
    other = tmp_path_factory.mktemp("other")
    _save(other / "0.png")
    (root / "train" / "fly").symlink_to(other, target_is_directory=True)
    (root / "train" / "ant" / "more").symlink_to(other, target_is_directory=True)
    (root / "train" / "ant" / "broken.png").symlink_to("/nowhere.png")
    with pytest.raises(ValueError, match="has 3 faults:") as error:
        conditions.open_images(config, "train")
    assert str(error.value).splitlines()[1:4] == [
        "  ant/broken.png: a link that leads nowhere, to /nowhere.png",
        f"  ant/more: a link that leads outside, to {other}",
        f"  fly: a link that leads outside, to {other}",
    ]
    _classes(root / "val", ("ant", "bee"))
    with pytest.raises(ValueError, match="fly: a link that leads outside"):  # it would be a class
        conditions.open_images(config, "val")


def test_links_inside_the_root_are_images_of_their_class(config, root):
    _save(root / "pool" / "0.png")
    (root / "train" / "ant" / "more").symlink_to("../../pool", target_is_directory=True)
    (root / "train" / "bee" / "9.png").symlink_to("../ant/0.png")
    source = conditions.open_images(config, "train")
    assert [*source.records.names] == [
        *("ant/0.png", "ant/1.png", "ant/2.png", "ant/more/0.png"),
        *("bee/0.png", "bee/1.png", "bee/2.png", "bee/9.png"),
    ]
    assert source[3]["image"].max() == 9
    assert _labels(config) == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("name", ["train", "train/ant", "train/new/run", "val"])
def test_directories_within_a_split_are_not_written_to(config, root, name):
    config.data.eval_split = "val"
    with pytest.raises(ValueError, match=f"{name} lies in the image folder .*/{name[:3]}"):
        folders.check_output_outside_data(config, root / name)
    folders.check_output_outside_data(config, root / "runs")
    folders.check_output_outside_data(config, root / "training")


@pytest.mark.parametrize("split", ["../other", "/tmp", "train/../../other"])
def test_a_split_is_a_folder_of_the_root(config, split):
    with pytest.raises(
        ValueError, match=r"leads out of data\.name=.*: it must be the name of a fo"
    ):
        conditions.open_images(config, split)


@pytest.mark.parametrize("damage", ["empty", "cut", "renamed"])
def test_damaged_images_are_named_when_they_are_read(config, root, damage):
    path = root / "train" / "ant" / "1.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    if damage == "renamed":
        Image.new("RGB", (8, 8)).save(path, "TIFF")
    else:
        path.write_bytes(path.read_bytes()[: {"empty": 0, "cut": 5000}[damage]])
    source = conditions.open_images(config, "train")
    assert source[0]["image"].shape == (8, 8, 3)
    reason = {"empty": "it is empty", "cut": "truncated", "renamed": "it is a TIFF image"}[damage]
    with pytest.raises(ValueError, match=rf"cannot read the image of {path}: .*{reason}"):
        source[1]
    path.unlink()
    with pytest.raises(ValueError, match=rf"cannot read {path}: .*Put the file back as it was"):
        source[1]


@pytest.mark.parametrize("size", [(1, 5000), (30_000, 2), (1, 20_000)])
def test_long_images_are_cropped_too(config, root, size):
    _save(root / "train" / "ant" / "0.png", (5, 6, 7), size)
    assert (conditions.open_images(config, "train")[0]["image"] == (5, 6, 7)).all()


def test_orientation_is_not_applied_and_said_once(config, root, caplog):
    """Stored turned by 90 degrees: the left half is red, as the file has it."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8], pixels[:, 8:] = (250, 0, 0), (0, 0, 250)
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(2):
        Image.fromarray(pixels).save(root / "train" / "ant" / f"{i}.jpg", quality=95, exif=exif)
    source = conditions.open_images(config, "train")
    files = [*source.records.names]
    for i in range(2):
        image = source[files.index(f"ant/{i}.jpg")]["image"]
        assert image[:, :3, 0].min() > 200
        assert image[:, 5:, 2].min() > 200
    path = root / "train" / "ant" / "0.jpg"
    (message,) = [m for m in caplog.messages if "EXIF" in m]
    assert f"some images have an EXIF orientation, such as {path}. It is not applied" in message
    assert "mogrify -auto-orient" in message


def test_strange_names_are_read_and_escaped(tmp_path, config, root):
    """Of other alphabets, of bytes that are no UTF-8, and of what acts on a terminal."""
    root = tmp_path / "näme mit raum"
    names = ["ämeise", "蜂 bee", "x\x1b[31m\n", os.fsdecode(b"\xe9t\xe9")]
    _classes(root / "train", names)
    config.data.name = str(root)
    config.model.num_classes = 4
    assert _labels(config) == 3 * [0] + 3 * [1] + 3 * [2] + 3 * [3]
    source = conditions.open_images(config, "train")
    assert source.class_names == tuple(sorted(names))
    shown = [source.describe(i) for i in range(len(source))]
    assert sum("x\\x1b[31m\\n" in text for text in shown) == 3
    assert sum("\\udce9t\\udce9" in text for text in shown) == 3
    config.model.num_classes = 3
    with pytest.raises(ValueError, match="has 4 classes: ") as error:
        conditions.open_images(config, "train")
    assert "\x1b" not in str(error.value)


def _captioned(config, root, lines):
    config.data.update(caption_feature="text")
    _unlabelled(config)
    (root / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return conditions.open_images(config, "train")


def test_captions_are_of_the_listed_images_and_the_others_are_counted(config, root, caplog):
    lines = [{"file_name": f"{c}/1.png", "text": c} for c in ("bee", "ant")]
    with caplog.at_level("INFO", "dit_jax"):
        source = _captioned(config, root, lines)
    assert [*source.records.names] == ["bee/1.png", "ant/1.png"]
    assert [source.captions(i) for i in range(2)] == [["bee"], ["ant"]]
    assert [source[i]["image"].max() for i in range(2)] == [70, 10]
    paths = [root / "train" / c / "1.png" for c in ("bee", "ant")]
    assert source.records.sizes.tolist() == [path.stat().st_size for path in paths]
    assert caplog.messages == [
        f"image folder {root}/train: 4 images left out, not in metadata.jsonl."
    ]


def test_missing_captioned_images_are_all_named_at_the_start(config, root):
    lines = [{"file_name": f"ant/{i}.png", "text": "a"} for i in range(5)]
    with pytest.raises(ValueError, match=r"2 of 5 lines are wrong in") as error:
        _captioned(config, root, lines)
    assert str(error.value).splitlines()[1:] == [
        f"""  line {i + 1} names "ant/{i}.png", which is not there: '{json.dumps(lines[i])}'"""
        for i in (3, 4)
    ]


def test_links_are_refused_with_captions_too(config, root, tmp_path_factory):
    """Of an image, of a folder in its path, and of metadata.jsonl itself."""
    other = tmp_path_factory.mktemp("other")
    _save(other / "0.png")
    (root / "train" / "sub").symlink_to(other)
    lines = [{"file_name": "sub/0.png", "text": "a"}]
    with pytest.raises(ValueError, match="sub: a link that leads outside"):
        _captioned(config, root, lines)
    (root / "train" / "sub").unlink()
    (root / "train" / "metadata.jsonl").rename(other / "metadata.jsonl")
    (root / "train" / "metadata.jsonl").symlink_to(other / "metadata.jsonl")
    with pytest.raises(ValueError, match=r"metadata\.jsonl: a link that leads outside"):
        conditions.open_images(config, "train")


def test_samples_in_folders_have_their_classes(root, caplog):
    """As `evaluate --samples` and `--reference` read them."""
    actual = image_sets.open_images(str(root / "train"))
    assert actual.class_names == ("ant", "bee")
    labels = np.concatenate([block["label"] for block in actual.blocks(4)])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    (root / "train" / ".cache").mkdir()
    (root / "train" / "ant" / "._0.png").write_bytes(b"\0\5\x16\7")
    assert image_sets.open_images(str(root / "train")).num == 6
    _save(root / "train" / "stray.png")
    actual = image_sets.open_images(str(root / "train"))
    assert (actual.num, actual.class_names) == (7, None)
    assert next(actual.blocks(7)).keys() == {"image"}
    assert (
        "1 image outside the subfolders, 6 in them: all are taken, without classes" in caplog.text
    )
    (root / "train" / "stray.png").unlink()
    (root / "train" / "cow").mkdir()
    with pytest.raises(ValueError, match="has folders without images: cow"):
        image_sets.open_images(str(root / "train"))


def test_a_set_needs_images(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"no images in .*: names of images end in \.bmp, \.jpeg"
    ):
        folders.open_single_folder(tmp_path)


def test_links_of_samples_stay_in_their_folder(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    _save(other / "0.png")
    (root / "train" / "ant" / "x.png").symlink_to(other / "0.png")
    with pytest.raises(ValueError, match=r"ant/x\.png: a link that leads outside"):
        image_sets.open_images(str(root / "train"))
