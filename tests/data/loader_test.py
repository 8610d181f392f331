"""Records of a source, and an order of them that nothing but the seed decides."""

import io
import shutil

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from configs import default
from dit_jax import conditions, latents
from dit_jax.data import loader, sources
from dit_jax.data.annotations import Annotations


def _noise_image(width, height):
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train/ with classes 'ant' (3 images) and 'bee' (2, one nested)."""
    root = tmp_path_factory.mktemp("folder")
    for i, name in enumerate(
        ["ant/1.png", "ant/2.PNG", "ant/3.png", "bee/1.png", "bee/deep/2.png"]
    ):
        path = root / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _noise_image(8 + i, 8).save(path)
    (root / "train" / "ant" / "notes.txt").write_text("not an image")
    return root


@pytest.fixture
def folder_config(folder):
    config = default.get_config()
    config.data.update(source="folder", name=str(folder), image_size=8)
    config.model.update(num_classes=2)
    config.batch_size = 4
    return config


@pytest.fixture
def digits_source(smoke_config):
    return conditions.open_images(smoke_config, "train")


def test_folder_gives_a_class_per_sub_folder(folder_config):
    source = conditions.open_images(folder_config, "train")
    assert [int(source[i]["label"]) for i in range(len(source))] == [0, 0, 0, 1, 1]
    assert source[4]["image"].shape == (8, 8, 3)
    assert source[0]["image"].dtype == np.uint8
    assert source[0]["label"].dtype == np.int32


@pytest.mark.parametrize("channels", [1, 3])
def test_images_become_the_channels_asked_for(channels):
    image = _noise_image(8, 8)
    file = io.BytesIO()
    image.save(file, "PNG")
    records = [{"image": file.getvalue(), "label": 1}]
    source = sources.Source(records, "image", (8, 8, channels), origin="a test")
    expected = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    np.testing.assert_array_equal(source[0]["image"], expected.reshape(8, 8, channels))


@pytest.mark.parametrize("kind", ["TIFF", "GIF"])
def test_records_of_other_formats_are_refused_by_their_number(kind):
    file = io.BytesIO()
    _noise_image(8, 8).save(file, kind)
    source = sources.Source([{"image": file.getvalue()}], "image", (8, 8, 3), origin="a test")
    with pytest.raises(ValueError, match=f"image of record 0 of a test: it is a {kind} image; PNG"):
        source[0]


def test_images_smaller_than_the_crop_are_enlarged_and_that_is_told_once(caplog):
    file = io.BytesIO()
    _noise_image(12, 5).save(file, "PNG")
    records = 3 * [{"image": file.getvalue(), "label": 1}]
    source = sources.Source(records, "image", (8, 8, 3), origin="small images")
    with caplog.at_level("WARNING", "dit_jax"):
        images = [source[i]["image"] for i in range(3)]
    expected = _noise_image(12, 5).resize((19, 8), Image.Resampling.BICUBIC).crop((5, 0, 13, 8))
    np.testing.assert_array_equal(images[0], np.asarray(expected))
    assert (
        caplog.text.count("small images: some images are smaller than data.image_size, 8 x 8") == 1
    )


def test_memory_that_is_short_is_no_damage_to_an_image(digits_source, monkeypatch):
    def crop(image, size):
        raise MemoryError

    monkeypatch.setattr(sources.pixels, "adm_crop", crop)
    with pytest.raises(MemoryError, match=r"^for record 3 of .+, cropped to 8 x 8 pixels$"):
        digits_source[3]


def test_digits_have_the_test_split_taken_out(smoke_config, digits_source):
    test = conditions.open_images(smoke_config, "test")
    assert (len(digits_source), len(test)) == (1617, 180)
    everything = np.concatenate(
        [np.stack([s[i]["image"] for i in range(len(s))]) for s in (digits_source, test)]
    )
    from sklearn.datasets import load_digits

    pixels = np.rint(load_digits().data * 255 / 16).astype(np.uint8)
    original = sorted(map(bytes, pixels.reshape(-1, 64)))
    assert sorted(bytes(image) for image in everything.reshape(-1, 64)) == original


class _Numbered:
    """A source whose image is its own index, to see what was read."""

    origin, kind, views, on_device = "numbers", "image", 1, False
    annotations = Annotations()

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        pixels = np.zeros((2, 2, 1), np.uint8)
        pixels[:, 0] = i
        return {"image": pixels, "label": np.int32(i)}


def _labels(config, rows, count, size=10, state=None):
    iterator = loader.TrainIterator(_Numbered(size), config, np.array(rows), state)
    return np.stack([next(iterator)["label"] for _ in range(count)]), iterator.state()


@pytest.fixture
def config():
    config = default.get_config()
    config.data.flip = False
    config.latents.source = "pixels"
    config.batch_size = 4
    return config


def test_every_epoch_has_every_record_once_in_another_order(config):
    labels, _ = _labels(config, range(4), 10)
    epochs = labels.reshape(4, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_is_the_seed_s(config):
    same, _ = _labels(config, range(4), 3)
    np.testing.assert_array_equal(_labels(config, range(4), 3)[0], same)
    config.seed = 1
    assert not np.array_equal(_labels(config, range(4), 3)[0], same)


def test_iterator_continues_from_its_state(config):
    whole, _ = _labels(config, range(4), 9)
    first, state = _labels(config, range(4), 4)
    assert state == {"next_batch": 4, "num_records": 10}
    rest, _ = _labels(config, range(4), 5, state=state)
    np.testing.assert_array_equal(np.concatenate([first, rest]), whole)


@pytest.mark.parametrize("rows", [[0, 1], [2, 3], [1, 3]])
def test_each_process_reads_its_rows_of_the_global_batch(config, rows):
    whole, _ = _labels(config, range(4), 6)
    part, _ = _labels(config, rows, 6)
    np.testing.assert_array_equal(part, whole[:, rows])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_cached_examples_are_decoded_once_and_the_same(smoke_config, digits_source, num_workers):
    def batches(cache, source):
        smoke_config.data.update(cache=cache, flip=True, num_threads=4, num_workers=num_workers)
        iterator = loader.TrainIterator(source, smoke_config, np.arange(16))
        return [next(iterator) for _ in range(120)]  # beyond one epoch of 1617

    for cached, plain in zip(
        batches(True, digits_source), batches(False, digits_source), strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, cached, plain)


def test_cache_reads_every_record_once():
    reads = []

    class Counting(_Numbered):
        def __getitem__(self, i):
            reads.append(int(i))
            return super().__getitem__(i)

    cache = loader._Cache(Counting(10))
    for indices in ([1, 5], [5, 1, 7], [7, 0]):
        batch = cache.gather(np.array(indices))
        assert batch["label"].tolist() == indices
        assert batch["image"][:, 0, 0, 0].tolist() == indices
        batch["image"][:] = 0  # a copy: mirroring one must not change the next
    assert sorted(reads) == [0, 1, 5, 7]


@pytest.mark.slow
def test_worker_processes_do_not_change_the_batches(smoke_config, digits_source):
    def images(num_workers, state=None):
        smoke_config.data.update(num_workers=num_workers, flip=True)
        iterator = loader.TrainIterator(digits_source, smoke_config, np.arange(16), state)
        return [next(iterator)["image"] for _ in range(5)]

    np.testing.assert_array_equal(images(2), images(0))
    state = {"next_batch": 3, "num_records": 1617}
    np.testing.assert_array_equal(images(2, state)[:2], images(0)[3:])


def test_order_flips_and_captions_are_those_of_every_version():
    """Streams of their own, recorded: a run that another version began goes on with them."""
    assert loader._draw_order(3, 5, 8).tolist() == [3, 4, 7, 2, 1, 0, 6, 5]
    assert loader._draw_flips(3, 5, 8).tolist() == [False] * 4 + [True] + [False] * 3
    assert loader._draw_captions(3, 5, 8, 3).tolist() == [1, 2, 1, 0, 0, 0, 1, 0]


def test_flip_mirrors_half_of_the_images(config):
    config.data.flip = True
    config.batch_size = 100
    iterator = loader.TrainIterator(_Numbered(200), config, np.arange(100))
    left = right = 0
    for _ in range(10):
        batch = next(iterator)
        sides = batch["image"][:, 0, :, 0] == batch["label"][:, None]
        left, right = left + sides[:, 0].sum(), right + sides[:, 1].sum()
    assert 400 < right < 600  # 1000 records, the mark moved from left to right
    assert left + right >= 1000


def test_flips_are_those_of_the_places_in_the_order(config):
    """In any batch size, rows or restart, across epochs; every epoch flips others."""

    def records(batch_size, rows, count, state=None):
        config.batch_size = batch_size
        iterator = loader.TrainIterator(Mirrored(40), config, np.array(rows), state)
        return np.concatenate([next(iterator)["label"] for _ in range(count)])

    class Mirrored(_Numbered):
        kind, views = "moments", 2

    config.data.flip = True
    whole = records(4, range(4), 15)  # three epochs of 20 images
    np.testing.assert_array_equal(records(12, range(12), 5), whole)
    np.testing.assert_array_equal(records(4, [1, 3], 15), whole.reshape(15, 4)[:, [1, 3]].ravel())
    state = {"next_batch": 3, "num_records": 40}
    np.testing.assert_array_equal(records(12, range(12), 2, state), whole[36:])
    assert len({tuple(epoch % 2) for epoch in whole.reshape(3, 20)}) == 3
    config.seed = 1
    assert not np.array_equal(records(4, range(4), 15) % 2, whole % 2)


@pytest.mark.parametrize("views", [1, 2])  # 2: without the mirrors
def test_eval_batches_cover_the_split_once(views):
    source = _Numbered(10 * views)
    source.views = views
    batches = list(loader.eval_batches(source, 4, np.arange(4)))
    labels = np.concatenate([batch["label"][batch["weight"] == 1] for batch in batches])
    np.testing.assert_array_equal(labels, range(0, 10 * views, views))
    np.testing.assert_array_equal(batches[-1]["weight"], [1, 1, 0, 0])


@pytest.fixture(scope="module")
def moments_dir(tmp_path_factory):
    """A TFDS dataset of 6 moments [4, 4, 8] f16."""

    class Moments(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "moments": tfds.features.Tensor(shape=(4, 4, 8), dtype=np.float16),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, download_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(6):
                yield i, {"moments": np.full((4, 4, 8), i + 0.5, np.float16), "label": i % 3}

    builder = Moments(data_dir=tmp_path_factory.mktemp("moments"), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


@pytest.fixture
def moments_config(config, moments_dir):
    config.latents.update(source="moments", moments=str(moments_dir))
    config.model.update(input_size=4, num_classes=3)
    return config


def test_moments_are_read_from_the_directory_of_a_dataset(moments_config):
    source = latents.open_split(moments_config, "train")
    iterator = loader.TrainIterator(source, moments_config, np.arange(4))
    batch = next(iterator)
    assert batch["moments"].shape == (4, 4, 4, 8)
    assert batch["moments"].dtype == np.float16
    values = np.concatenate([batch["moments"], next(iterator)["moments"]])[:6, 0, 0, 0]
    np.testing.assert_array_equal(sorted(values), np.arange(6) + 0.5)


def test_mirroring_moments_without_mirrors_is_refused(moments_config):
    moments_config.data.flip = True
    source = latents.open_split(moments_config, "train")
    with pytest.raises(
        ValueError, match=r"data\.flip mirrors images before the VAE, but .* no mirr"
    ):
        loader.TrainIterator(source, moments_config, np.arange(4))


def test_mirror_of_moments_is_the_next_record(config):
    """Records 2i and 2i + 1 are image i and its mirror: flips pick the latter half of the time."""

    class Mirrored(_Numbered):
        kind, views = "moments", 2

    config.data.flip = True
    config.batch_size = 10
    iterator = loader.TrainIterator(Mirrored(20), config, np.arange(10))
    records = np.stack([next(iterator)["label"] for _ in range(50)])
    for epoch in records:
        assert sorted(epoch // 2) == list(range(10))
    assert 180 < (records % 2).sum() < 320
    plain = loader.TrainIterator(_Numbered(10), config, np.arange(10))
    sides = [b["image"][:, 0, 0, 0] == b["label"] for b in (next(plain) for _ in range(50))]
    # Record 0 looks the same from both sides; the others are mirrored in the same places.
    assert (np.stack(sides) == (records % 2 == 0))[records // 2 > 0].all()
    config.data.flip = False
    unflipped = loader.TrainIterator(Mirrored(20), config, np.arange(10))
    assert not (next(unflipped)["label"] % 2).any()


def test_moments_of_another_shape_than_the_model_takes_are_refused(moments_config):
    moments_config.model.input_size = 8
    with pytest.raises(ValueError, match=r"moments 4 x 4 x 8, but .* takes 8 x 8 x 8"):
        latents.open_split(moments_config, "train")


def test_missing_dataset_says_how_to_build_it(smoke_config, tmp_path):
    smoke_config.data.data_dir = str(tmp_path)
    command = rf"python -m dit_jax\.datasets\.digits --data_dir {tmp_path}"
    with pytest.raises(FileNotFoundError, match=command):
        conditions.open_images(smoke_config, "train")
    smoke_config.data.name = "no_such_dataset"
    smoke_config.data.name = "mnist"
    build = rf"tfds build mnist --file_format=array_record --data_dir={tmp_path}"
    with pytest.raises(FileNotFoundError, match=build):
        conditions.open_images(smoke_config, "train")
    smoke_config.data.name = "no_such_dataset"
    with pytest.raises(FileNotFoundError, match=r"no_such_dataset.*elsewhere, set data\.data_dir"):
        conditions.open_images(smoke_config, "train")


def test_dataset_in_another_file_format_says_how_to_build_it_again(
    smoke_config, digits_dir, tmp_path
):
    directory = shutil.copytree(digits_dir / "digits" / "1.0.0", tmp_path / "digits")
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    smoke_config.data.name = str(directory)
    with pytest.raises(ValueError, match=r"the format tfrecord.*--file_format=array_record"):
        conditions.open_images(smoke_config, "train")


def test_unknown_split_and_feature_list_the_known_ones(smoke_config):
    with pytest.raises(ValueError, match=r"no split 'validation'\. Choose from train, test"):
        conditions.open_images(smoke_config, "validation")
    with pytest.raises(ValueError, match=r"no split 'train\[:x\]'\. Choose from .*a slice"):
        conditions.open_images(smoke_config, "train[:x]")
    smoke_config.latents.update(source="moments", moments=smoke_config.data.name)
    with pytest.raises(ValueError, match="no feature 'moments', only image, label"):
        latents.open_split(smoke_config, "train")


def test_empty_split_is_refused(smoke_config, folder_config, folder):
    with pytest.raises(ValueError, match=r"'train\[:0\]'.* is empty"):
        conditions.open_images(smoke_config, "train[:0]")
    (folder / "val").mkdir()
    with pytest.raises(ValueError, match="val is empty"):
        conditions.open_images(folder_config, "val")
    with pytest.raises(FileNotFoundError, match="one folder per split"):
        conditions.open_images(folder_config, "test")


def test_label_beyond_the_classes_names_the_record(smoke_config):
    smoke_config.model.num_classes = 5
    source = conditions.open_images(smoke_config, "train")
    with pytest.raises(ValueError, match=r"label \d of record \d+ of split 'train'.*0\.\.4"):
        next(loader.TrainIterator(source, smoke_config, np.arange(16)))


@pytest.mark.parametrize(("damage", "num_workers"), [("cut", 0), ("cut", 1), ("text", 0)])
def test_unreadable_image_names_the_file(folder_config, tmp_path, damage, num_workers):
    whole = io.BytesIO()
    _noise_image(64, 64).save(whole, "PNG")
    damaged = {"cut": whole.getvalue()[:500], "text": b"not an image"}[damage]
    for name, content in (("good", whole.getvalue()), ("cut", damaged)):
        path = tmp_path / "train" / "a" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    folder_config.data.update(name=str(tmp_path), num_workers=num_workers)
    folder_config.model.num_classes = 1
    iterator = loader.TrainIterator(
        conditions.open_images(folder_config, "train"), folder_config, np.arange(2)
    )
    with pytest.raises(Exception, match=r"cannot read the image of .*train/a/cut\.png") as error:
        next(iterator)  # a batch of both
    assert "BytesIO" not in str(error.value)


def test_dataset_that_changed_under_a_run_is_refused(config):
    with pytest.raises(ValueError, match="has 10 records, but the run began with 9"):
        _labels(config, range(4), 1, state={"next_batch": 1, "num_records": 9})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image_channels=2), r"image_channels=2.*1 \(grey\) or 3"),
        (dict(source="web"), "data.source='web'"),
    ],
    ids=str,
)
def test_unknown_data_settings_list_the_known_ones(config, change, message):
    config.data.update(change)
    with pytest.raises(ValueError, match=message):
        conditions.open_images(config, "train")
