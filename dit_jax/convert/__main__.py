"""Command that converts a published checkpoint to a workdir, or exports a workdir's DiT.

  python -m dit_jax.convert sd SRC DST
  python -m dit_jax.convert dit SRC DST [--config FILE]
  python -m dit_jax.convert vae SRC DST
  python -m dit_jax.convert unet SRC DST
  python -m dit_jax.convert adm SRC DST [--config FILE [--new_attention_order]]
  python -m dit_jax.convert lpips SRC DST
  python -m dit_jax.convert inception SRC DST
  python -m dit_jax.convert dinov2 SRC DST
  python -m dit_jax.convert clip SRC DST [--skip_layers N]
  python -m dit_jax.convert dit-export WORKDIR DST.safetensors [--step N] [--raw]

SRC depends on the command:
  sd          the directory of a whole Stable Diffusion that diffusers wrote; it becomes one workdir
  dit         a .npz, .safetensors or .pt file with the published names, or diffusers' directory
  vae, unet   the directory that diffusers wrote
  adm         guided-diffusion's .pt file
  lpips       a directory with vgg16-397923af.pth and vgg.pth
  inception   a .npz, .safetensors or .pt file with the names of torch-fidelity and pytorch-fid
  dinov2      the official file, or the directory that transformers wrote
  clip        the directory that transformers wrote, such as a Stable Diffusion's text_encoder/; the
              tokenizer's files are in it or in ../tokenizer/

Without --config, a DiT gets the published model's config with the checkpoint's sizes. DST must be
empty or not exist yet. A conversion that fails or is killed does not create it: run it again.
"""

import json

from absl import flags

from dit_jax import cli
from dit_jax.convert import conversions, exported
from dit_jax.errors import UserError
from dit_jax.system import files

FLAGS = flags.FLAGS
# Command -> the flags that it takes.
COMMANDS = {
    **dict.fromkeys(conversions.READERS, ()),
    "dit": ("config",),
    "adm": ("config", "new_attention_order"),
    "clip": ("skip_layers",),
    "dit-export": ("step", "raw"),
}


def main(words):
    if len(words) != 3 or words[0] not in COMMANDS:
        raise UserError(f"give one of {', '.join(COMMANDS)}, then SRC and DST, not {words}.")
    command = words[0]
    source, target = files.to_path(words[1], "SRC"), files.to_path(words[2], "DST")
    # absl defines all flags for all commands, so another command's flag would be ignored silently.
    for name in {name for names in COMMANDS.values() for name in names}:
        if name not in COMMANDS[command] and FLAGS[name].present:
            raise UserError(f"`convert {command}` takes no --{name}.")
    options = {name: FLAGS[name].value for name in COMMANDS[command]}
    if command == "dit-export":
        print(f"{target}: step {exported.write(source, target, **options)}")
    else:
        config = conversions.to_workdir(command, source, target, **options)
        print(f"{target}: {json.dumps(config.model.to_dict())}")


if __name__ == "__main__":
    cli.define_config(required=False)
    flags.DEFINE_integer("step", None, "dit-export: the checkpoint; the newest by default.", 0)
    flags.DEFINE_integer("skip_layers", 0, "clip: how many of the last layers to leave out.", 0)
    flags.DEFINE_bool(
        "new_attention_order", False, "adm: q, k, v are [3, H, D/H], not [H, 3, D/H]."
    )
    flags.DEFINE_bool("raw", False, "dit-export: the trained parameters instead of their EMA.")
    cli.run(main, "KIND SRC DST")
