"""Command that fills a study's page template with its tables, fits, figures and cost.

  python -m experiments.scaling.report --table experiments/depth_width_tokens/results/digits.csv \
      --page experiments/depth_width_tokens/page.md --out experiments/depth_width_tokens/README.md

A template names fields of `fits.report.make_fields` in braces, so that no number is typed by hand.
For example, {eval_mse[largest][relative_error]:+.1%} is a value of the fits to eval_mse.
"""

from absl import flags

from dit_jax import cli
from dit_jax.errors import UserError
from dit_jax.system import files
from experiments.scaling.fits import report

FLAGS = flags.FLAGS


def main(_):
    page, out = FLAGS.page, FLAGS.out
    cli.check_out(out, (".md",))
    template, used_names = report.read_page(page)
    values = report.make_fields(FLAGS.table, FLAGS.qualities, out, used_names)
    try:
        text = report.fill_template(template, values)
    except (KeyError, IndexError) as error:
        raise UserError(
            f"{page} uses the field {error}, which {FLAGS.table} does not give. The fields are "
            f"{', '.join(values)}."
        ) from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{page} cannot be filled: {error}.") from error
    files.replace_text(out, text)
    print(out)


if __name__ == "__main__":
    cli.define_path("table", None, "CSV file of the study.", required=True)
    cli.define_path("page", None, "Template of the page.", required=True)
    cli.define_path("out", None, "The .md to write.", required=True)
    flags.DEFINE_list("qualities", "eval_mse,fd_pixels,label_accuracy", "Columns of the table.")
    cli.run(main)
