"""Schema of a row of evaluations.jsonl."""

from collections.abc import Mapping

from dit_jax.system import schemas

# Settings of how images were sampled, or how bits per dimension were measured.
SAMPLE: schemas.Schema = {
    "sampler": schemas.is_string,
    "steps": schemas.is_count,
    "grid": schemas.is_string,
    "cfg_scale": schemas.is_number,
    "num": schemas.is_count,
    "seed": schemas.is_count,
    "labels": schemas.is_string,
    "raw": schemas.is_bool,
    "vae_digest": schemas.is_string,
    "guide": schemas.optional(schemas.is_string),
    "guide_step": schemas.optional(schemas.is_count),
}
# All keys of a row except its measures.
ROW: schemas.Schema = {
    "step": schemas.is_count,
    "sample": schemas.object_of(SAMPLE, SAMPLE, check_unknown=schemas.is_setting),
    "samples": schemas.object_of({"num": schemas.is_count}),
    "likelihood": schemas.object_of(SAMPLE, SAMPLE, check_unknown=schemas.is_setting),
    "extractor": schemas.optional(schemas.object_of({})),
    "reference": schemas.optional(schemas.object_of({})),
    "picture": schemas.is_string,
    "params": schemas.is_number,
    "gmacs": schemas.is_number,
    "images_seen": schemas.is_number,
    "train_gflops": schemas.is_number,
    "img_per_s": schemas.optional(schemas.is_number),
    "seconds": schemas.optional(schemas.is_number),
    "device": schemas.is_string,
    "jax": schemas.is_string,
    "git_revision": schemas.is_string,
}


def list_invalid_keys(row: Mapping) -> list[str]:
    """Returns the keys of a row that have wrong values.

    Measures are the keys after 'picture', and 'bits_per_...'; they are numbers or None. A row may
    lack any key, except that a row with 'likelihood' needs a 'bits_per_...'.
    """
    # Rows of other versions may have measures of other names, so their position decides.
    names = list(row)
    after_picture = names[names.index("picture") + 1 :] if "picture" in row else []
    bits = [name for name in names if name.startswith("bits_per_")]
    measures = dict.fromkeys([*after_picture, *bits], schemas.optional(schemas.is_number))
    if "likelihood" in row and not bits:
        measures["bits_per_dim"] = schemas.is_number
    other_keys = dict.fromkeys(names, schemas.is_value)
    return schemas.list_invalid_keys(row, other_keys | measures | dict(ROW), ROW)
