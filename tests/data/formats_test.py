"""Formats of image datasets: a row of the table is all that the other modules need."""

import io
import types

import numpy as np
import pytest
from PIL import Image

from configs import default
from dit_jax import conditions
from dit_jax.data import formats, sources
from dit_jax.workdirs import identity


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Of a format with two images in one file."""
    png = io.BytesIO()
    Image.new("L", (8, 8), 7).save(png, "PNG")
    (tmp_path / "a.bin").write_bytes(png.getvalue())
    records = [{"image": png.getvalue(), "label": i} for i in range(2)]

    def open_split(data_config, split, annotations):
        files = sources.Files(
            tmp_path, ["a.bin"], np.array([len(png.getvalue())]), np.array([5]), ranges=[(0, 2)]
        )
        return sources.Source(
            records, "image", (8, 8, 1), annotations, f"{split} of {data_config.name}", files=files
        )

    monkeypatch.setitem(formats.FORMATS, "bin", types.SimpleNamespace(open_split=open_split))
    config = default.get_config()
    config.data.update(source="bin", name="a", image_size=8, image_channels=1)
    config.model.num_classes = 2
    return config


def test_a_new_format_is_read_named_and_identified(config, tmp_path):
    source = conditions.open_images(config, "train")
    assert [int(source[i]["label"]) for i in range(2)] == [0, 1]
    assert (source[1]["image"] == 7).all()
    assert source.describe(1) == "record 1 of train of a"
    recorded = identity.identify(source)
    assert identity.check(source, recorded, "the run") == recorded
    (tmp_path / "a.bin").write_bytes(b"another content")
    changes = identity.describe_changes(recorded, identity.identify(source))
    assert changes == ["contents of files differ, of the same names and sizes"]


def test_an_unknown_format_lists_the_known_ones(config):
    config.data.source = "web"
    with pytest.raises(ValueError, match=r"unknown data\.source='web'; choose one of tfds, folder"):
        conditions.open_images(config, "train")


def test_a_config_without_images_says_so(config):
    config.data.name = ""
    with pytest.raises(ValueError, match=r"data\.name is empty: this config names no images"):
        conditions.open_images(config, "train")
