"""Further images of a record, such as a depth map: read, cropped and mirrored with the image."""

import io
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from configs import default
from dit_jax.data import formats, loader
from dit_jax.data.annotations import Annotations
from dit_jax.workdirs import identity

NUM = 6
ANNOTATIONS = Annotations(images={"depth": 1})


def _draw(i):
    """The image of record i, [8, 12, 3], and its depth map, which is its negative."""
    grey = np.random.default_rng(i).integers(0, 256, (8, 12), np.uint8)
    return Image.fromarray(grey).convert("RGB"), Image.fromarray(255 - grey)


def _to_png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return io.BytesIO(file.getvalue())


class WithDepth(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Image(shape=(None, None, 3))
        depth = tfds.features.Image(shape=(None, None, 1))
        features = tfds.features.FeaturesDict({"image": image, "depth": depth})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(NUM):
            image, depth = map(_to_png, _draw(i))
            yield i, {"image": image, "depth": depth}


def _write_folder(root):
    lines = []
    for i in range(NUM):
        for kind, image in zip(("image", "depth"), _draw(i), strict=True):
            path = root / "train" / kind / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        lines.append({"file_name": f"image/{i}.png", "depth": f"./depth/{i}.png"})
    _write_lines(root, lines)
    return root


def _write_lines(root, lines):
    (root / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture(params=["folder", "tfds"])
def config(request, tmp_path):
    config = default.get_config()
    name = _write_folder(tmp_path)
    if request.param == "tfds":
        builder = WithDepth(data_dir=tmp_path, file_format="array_record")
        builder.download_and_prepare()
        name = builder.data_dir
    config.data.update(source=request.param, name=str(name), image_size=8, flip=True)
    config.batch_size = NUM
    return config


@pytest.mark.parametrize("cache", [False, True])
def test_further_images_are_cropped_and_mirrored_with_the_image(config, cache):
    config.data.cache = cache
    source = formats.open_images(config, "train", ANNOTATIONS)
    assert len(source) == NUM
    expected = np.stack([255 - np.asarray(_draw(i)[1])[:, 2:10, None] for i in range(NUM)])
    for i in range(NUM):
        assert source[i]["depth"].shape == (8, 8, 1)
        np.testing.assert_array_equal(source[i]["image"], expected[i].repeat(3, axis=-1))
        np.testing.assert_array_equal(source[i]["depth"], 255 - expected[i])
    batches = loader.TrainIterator(source, config, np.arange(NUM))
    num_mirrored = 0
    for _ in range(3):
        batch = next(batches)
        np.testing.assert_array_equal(batch["depth"], 255 - batch["image"][..., :1])
        for image in batch["image"][..., :1]:
            mirrored = (expected == image[:, ::-1]).all(axis=(1, 2, 3)).any()
            assert mirrored or (expected == image).all(axis=(1, 2, 3)).any()
            num_mirrored += mirrored
    assert 0 < num_mirrored < 3 * NUM


def test_datasets_without_them_are_refused(config):
    with pytest.raises(
        ValueError, match=r"has no mask, only depth, image|must be JSON with mask, a text"
    ):
        formats.open_images(config, "train", Annotations(images={"mask": 1}))


def test_files_of_further_images_belong_to_the_identity(tmp_path):
    config = default.get_config()
    config.data.update(source="folder", name=str(_write_folder(tmp_path)), image_size=8)
    source = formats.open_images(config, "train", ANNOTATIONS)
    recorded = identity.identify(source)
    assert identity.check(source, recorded, "the run") == recorded
    _draw(7)[1].save(tmp_path / "train" / "depth" / "2.png")
    now = identity.identify(formats.open_images(config, "train", ANNOTATIONS))
    assert identity.describe_changes(recorded, now)


def test_a_further_image_of_another_size_is_refused(tmp_path):
    config = default.get_config()
    config.data.update(source="folder", name=str(_write_folder(tmp_path)), image_size=8)
    Image.new("L", (8, 12)).save(tmp_path / "train" / "depth" / "2.png")
    source = formats.open_images(config, "train", ANNOTATIONS)
    with pytest.raises(ValueError, match=r"the depth of .*/2\.png: its width and height \(8, 12\)"):
        source[2]


def test_folders_with_further_images_have_no_classes(tmp_path):
    """Else all images would be of the class 0."""
    config = default.get_config()
    config.data.update(source="folder", name=str(_write_folder(tmp_path)), image_size=8)
    with pytest.raises(ValueError, match=r"further images, depth, has no classes for .*=2"):
        formats.open_images(config, "train", Annotations(2, images={"depth": 1}))


def test_captions_and_further_images_are_read_from_one_line(tmp_path):
    config = default.get_config()
    config.data.update(source="folder", name=str(_write_folder(tmp_path)), image_size=8)
    line = {"file_name": "image/1.png", "depth": "depth/3.png", "text": "a cat"}
    _write_lines(tmp_path, [line])
    annotations = Annotations(caption_feature="text", images={"depth": 1})
    source = formats.open_images(config, "train", annotations)
    assert source.captions(0) == ["a cat"]
    assert source.records.captions == [{"text": "a cat"}]
    np.testing.assert_array_equal(source[0]["depth"][..., 0], np.asarray(_draw(3)[1])[:, 2:10])
