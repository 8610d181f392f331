"""scikit-learn's 1,797 handwritten digits (8x8 grey, 10 classes) as a TFDS dataset.

python -m dit_jax.datasets.digits [--data_dir DIR]
"""

import os

import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from PIL import Image

from dit_jax import cli
from dit_jax.datasets import writing

FLAGS = flags.FLAGS


class Digits(tfds.core.GeneratorBasedBuilder):
    """TFDS builder for the digits in a fixed permutation; the first 180 are the test split."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="The 8x8 handwritten digits that scikit-learn ships.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, download_manager):
        del download_manager  # scikit-learn ships the digits
        # Imported here, because reading the dataset does not need scikit-learn.
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        # scikit-learn's pixels are floats in 0..16.
        images = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        return {
            name: self._generate_examples(images[indices], labels[indices])
            for name, indices in writing.split(len(labels)).items()
        }

    def _generate_examples(self, images, labels):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": writing.to_png(Image.fromarray(image)), "label": int(label)}


def prepare(data_dir: str | os.PathLike | None = None) -> str:
    """Writes the dataset unless it already exists; returns its directory, as `writing.write`."""
    return writing.write(Digits, data_dir)


def main(_):
    """Prepares the dataset and prints its directory."""
    tfds.disable_progress_bar()
    print(f"digits: {prepare(FLAGS.data_dir)}")


if __name__ == "__main__":
    cli.define_path("data_dir", None, "TFDS data directory; TFDS's own by default.")
    cli.run(main, on_cpu=True)
