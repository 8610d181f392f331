"""The page docs/samplers.md, with the results of `compare` and `compare_published`.

python -m experiments.samplers.page [--results FILE] [--originals FILE] [--out docs/samplers.md]
"""

import json
import pathlib
import string

from absl import flags

from dit_jax import cli
from dit_jax.system import files
from experiments.samplers import compare

HERE = pathlib.Path(__file__).parent
FLAGS = flags.FLAGS


def make_results_table(lines: list[dict]) -> str:
    """Returns a Markdown table with a row per sampler.

    Each row has `fd_pixels` at every guidance scale, and its change relative to the first row.
    """
    guided = " | ".join(f"guidance {scale:g} | to the first" for scale in compare.GUIDANCE)
    text = [f"| process | sampler | grid | steps | passes | {guided} | images/s |"]
    text.append("|---" * (6 + 2 * len(compare.GUIDANCE)) + "|")
    # A sampler has consecutive lines, one for each guidance scale.
    size = len(compare.GUIDANCE)
    for start in range(0, len(lines), size):
        # `zip` pairs each line with the first sampler's line at the same guidance.
        row, cells = lines[start], []
        for line, first in zip(lines[start : start + size], lines, strict=False):
            ratio = line["fd_pixels"] / first["fd_pixels"]
            cells.append(f"{line['fd_pixels']:.3f} | {ratio - 1:+.0%}")
        grid = row["grid"] + (f", churn {row['churn']:g}" if "churn" in row else "")
        text.append(
            f"| {row['process']} | {row['sampler']} | {grid} | {row['steps']} | {row['passes']} | "
            f"{' | '.join(cells)} | {row['img_per_s']:.0f} |"
        )
    return "\n".join(text)


def make_originals_table(lines: list[dict]) -> str:
    """Returns a Markdown table with a row per line of experiments.samplers.compare_published."""
    text = ["| process | sampler | program | grid | steps | apart | error here | its error |"]
    text.append("|---" * 8 + "|")
    for line in lines:
        # Less than 1e-12 is rounding in f64.
        apart = f"{line['difference']:.2g}" if line["difference"] > 1e-12 else "0"
        text.append(
            f"| {line['process']} | {line['sampler']} | {line['original']} | {line['grid']} | "
            f"{line['steps']} | {apart} | {line['error']:.2g} | {line['original_error']:.2g} |"
        )
    return "\n".join(text)


def _read(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def main(_):
    lines = _read(FLAGS.results)
    first = lines[0]
    text = string.Template((HERE / "page.md").read_text()).substitute(
        table=make_results_table(lines),
        originals=make_originals_table(_read(FLAGS.originals)),
        num=f"{first['num']:,}",
        halves=f"{first['fd_pixels_real_halves']:.3f}",
        device=first["device"],
        speed_device=first["speed_device"],
    )
    files.replace_text(FLAGS.out, text)
    print(FLAGS.out)


if __name__ == "__main__":
    cli.define_path("results", str(HERE / "results.jsonl"), "Of compare.")
    cli.define_path("originals", str(HERE / "originals.jsonl"), "Of compare_published.")
    cli.define_path("out", "docs/samplers.md", "The page to write.")
    cli.run(main)
