"""The page docs/samplers.md, with the results of `compare` and `compare_published`.

python -m experiments.samplers.page [--results FILE] [--originals FILE] [--out docs/samplers.md]
"""

import pathlib
import string

from absl import flags

from dit_jax import cli
from dit_jax.system import files
from experiments.samplers import compare

HERE = pathlib.Path(__file__).parent
FLAGS = flags.FLAGS


def make_results_table(results: list[dict]) -> str:
    """Returns a Markdown table with a row per sampler, from the results of compare.py.

    Each row has `fd_pixels` at every guidance scale, and its change relative to the first row.
    """
    guided_columns = " | ".join(f"guidance {scale:g} | to the first" for scale in compare.GUIDANCE)
    lines = [f"| process | sampler | grid | steps | passes | {guided_columns} | images/s |"]
    lines.append("|---" * (6 + 2 * len(compare.GUIDANCE)) + "|")
    # A sampler has consecutive results, one for each guidance scale.
    scales = len(compare.GUIDANCE)
    first_sampler = results[:scales]
    for start in range(0, len(results), scales):
        of_sampler = results[start : start + scales]
        cells = []
        for result, first in zip(of_sampler, first_sampler, strict=True):
            ratio = result["fd_pixels"] / first["fd_pixels"]
            cells.append(f"{result['fd_pixels']:.3f} | {ratio - 1:+.0%}")
        row = of_sampler[0]
        grid = row["grid"] + (f", churn {row['churn']:g}" if "churn" in row else "")
        lines.append(
            f"| {row['process']} | {row['sampler']} | {grid} | {row['steps']} | {row['passes']} | "
            f"{' | '.join(cells)} | {row['img_per_s']:.0f} |"
        )
    return "\n".join(lines)


def make_originals_table(results: list[dict]) -> str:
    """Returns a Markdown table with a row per result of compare_published.py."""
    lines = ["| process | sampler | program | grid | steps | apart | error here | its error |"]
    lines.append("|---" * 8 + "|")
    for row in results:
        # Differences below 1e-12 are rounding in f64.
        apart = f"{row['difference']:.2g}" if row["difference"] > 1e-12 else "0"
        lines.append(
            f"| {row['process']} | {row['sampler']} | {row['original']} | {row['grid']} | "
            f"{row['steps']} | {apart} | {row['error']:.2g} | {row['original_error']:.2g} |"
        )
    return "\n".join(lines)


def main(_):
    results = compare.read_results(FLAGS.results)
    first = results[0]
    text = string.Template((HERE / "page.md").read_text()).substitute(
        table=make_results_table(results),
        originals=make_originals_table(compare.read_results(FLAGS.originals)),
        num=f"{first['num']:,}",
        halves=f"{first['fd_pixels_real_halves']:.3f}",
        device=first["device"],
        speed_device=first["speed_device"],
    )
    files.replace_text(FLAGS.out, text)
    print(FLAGS.out)


if __name__ == "__main__":
    cli.define_path("results", str(HERE / "results.jsonl"), "Results of compare.")
    cli.define_path("originals", str(HERE / "originals.jsonl"), "Results of compare_published.")
    cli.define_path("out", "docs/samplers.md", "The page to write.")
    cli.run(main)
