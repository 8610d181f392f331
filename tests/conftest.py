"""Settings of all tests (eight CPU devices, strict ranks, f32 products), and shared fixtures."""

import fcntl
import functools
import gc
import importlib.util
import json
import math
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile

from helpers.xla_flags import FLAGS, ONE_DEVICE, USER_FLAGS

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # more threads of two workers wait for each other
os.environ["XLA_FLAGS"] = (
    f"{FLAGS} {USER_FLAGS}"  # of a flag that is given twice, the last value counts
)
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory()  # tests and commands share compiled programs
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # for configs/ of this checkout

import jax
import numpy as np
import pytest
from helpers import bpe, tiny_sweep
from ml_collections import ConfigDict
from PIL import Image

from configs import default, smoke
from dit_jax import diffusion, models, sharding, train
from dit_jax.data import text
from dit_jax.datasets import digits
from dit_jax.evaluation import extractors
from dit_jax.latents import store
from dit_jax.workdirs import checkpoint
from experiments.scaling.cells import cell_run, grid

# A shell's background jobs ignore Ctrl-C, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tracing makes many objects and little garbage, so frequent garbage collection wastes time.
gc.set_threshold(50_000, 20, 20)
gc.freeze()
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

make_mesh_of_all = sharding.make_mesh


def _make_mesh(config, devices=None):
    """Makes a mesh of two devices if the config takes all devices: eight take twice the time.

    Tests of more devices set the sizes of the mesh.
    """
    sizes = [config[axis] for axis in sharding.AXES]
    if devices is None and -1 in sizes:
        min_devices = math.prod(size for size in sizes if size > 0)
        devices = jax.devices()[: max(2, min_devices)]
    return make_mesh_of_all(config, devices)


sharding.make_mesh = _make_mesh
sharding.local_mesh = lambda: _make_mesh({"data": -1, "fsdp": 1, "tensor": 1})

ROOT = pathlib.Path(__file__).parents[1]
pytest_plugins = ["helpers.published_dit", "helpers.hostile"]
# Only `make test-parity` installs the libraries that these tests need.
collect_ignore = [] if importlib.util.find_spec("diffusers") else ["parity"]
GOLDENS = ROOT / "tests" / "goldens"


@pytest.fixture(scope="session")
def process():
    """Returns the paper's process: DDPM with 1000 linear steps."""
    return diffusion.build(default.get_config().diffusion)


@pytest.fixture(scope="session")
def build_process():
    """build_process("flow", sigma_max=40.0) returns a process with changed keys."""

    def build(process, **changes):
        config = default.get_config().diffusion
        config.update(process=process, **changes)
        return diffusion.build(config)

    return build


@pytest.fixture(scope="session")
def make_once(tmp_path_factory):
    """make_once(name, make) fills a directory by make(directory), once for all workers."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def make_once(name, make):
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (done := root / f"{name}.done").exists():
                shutil.rmtree(root / name, ignore_errors=True)  # of a worker that failed
                make(root / name)
                done.touch()
        return root / name

    return make_once


@pytest.fixture(scope="session")
def digits_dir(make_once):
    """Returns a TFDS data directory that contains the digits."""
    return make_once("tfds", digits.prepare)


VAE = dict(
    name="vae",
    image_channels=1,
    latent_channels=2,
    block_channels=[8, 16],
    layers_per_block=1,
    norm_groups=4,
    use_quant_conv=True,
    mid_attention=True,
    dtype="float32",
    remat=False,
)


@pytest.fixture(scope="session")
def vae_dir(make_once):
    """Returns a workdir of a tiny VAE for the digits with random parameters. Do not change."""
    return make_once("vae", lambda out: save_random(out, ConfigDict({"model": VAE}), spread=0.1))


@pytest.fixture(scope="session")
def moments_dir(digits_dir, vae_dir, make_once):
    """Returns moments of 160 digits, 20 held-out digits, and their mirrors. Do not change."""
    config = smoke.get_config()
    config.data.update(data_dir=str(digits_dir), flip=True)
    config.data.update(train_split="train[:160]", eval_split="test[:20]")
    encode_into = functools.partial(store.encode, config, vae_dir, shard_images=64, batch_size=8)
    return make_once("moments", encode_into)


CAPTIONED = 20
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def captions_of(i):
    """Returns the captions of image i of `captioned_dir`: one if i is even, two if i is odd."""
    return [f"a {WORDS[i % 10]}", f"the digit {WORDS[i % 10]}"][: 1 + i % 2]


@pytest.fixture(scope="session")
def captioned_dir(tmp_path_factory):
    """Returns an image folder: in each split, 20 images of different grey, and metadata.jsonl."""
    root = tmp_path_factory.mktemp("captioned")
    for split in ("train", "test"):
        (root / split).mkdir()
        rows = []
        for i in range(CAPTIONED):
            Image.new("L", (8, 8), 10 * i).save(root / split / f"{i}.png")
            rows.append(json.dumps({"file_name": f"{i}.png", "text": captions_of(i)}))
        (root / split / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return root


def captioned(root):
    """Returns the smoke config, conditioned on the captions of an image folder."""
    config = smoke.get_config()
    config.data.update(source="folder", name=str(root), train_split="train")
    config.data.update(caption_feature="text", captions_per_image=2, cache=True)
    config.model.update(condition="tokens", context_size=16, text_length=20, text_depth=1)
    config.model.update(text_num_heads=2)
    return config


@pytest.fixture
def captioned_config(captioned_dir):
    """Returns a config for `captioned_dir`, free to change."""
    return captioned(captioned_dir)


@pytest.fixture(scope="session")
def captioned_workdir(captioned_dir, tmp_path_factory):
    """Returns a workdir for `captioned_dir` with random parameters. Do not change."""
    return save_random(tmp_path_factory.mktemp("runs") / "captioned", captioned(captioned_dir))


def initial_params(model, seed=0):
    """Returns a model's initial parameters, computed by one compiled program to save time."""
    return jax.jit(functools.partial(models.init_params, model))(jax.random.key(seed))


def random_like(shapes, seed=0, spread=0.2):
    """Returns random parameters: scales around 1, all others around 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        offset = 1.0 if path[-1].key == "scale" else 0.0
        return (offset + spread * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_params(model, seed=0, spread=0.2):
    """Returns `random_like` parameters of a model, without compiling it."""
    shapes = models.param_shapes(model)
    return random_like(shapes, seed, spread)


def save_random(workdir, config, seed=0, spread=0.2):
    """Writes `random_params` of the config's model to a workdir."""
    params = random_params(models.build(config.model), seed, spread)
    checkpoint.save_params(workdir, config, params)
    return workdir


def save_clip(workdir, seed=0):
    """Writes a tiny CLIP with random parameters to a workdir: 12 tokens of width 16."""
    sizes = dict(hidden_size=16, depth=1, num_heads=2, mlp_size=32, activation="gelu")
    model = dict(name="clip", vocab_size=len(bpe.VOCAB), length=12, dtype="float32", **sizes)
    save_random(workdir, ConfigDict({"model": model}), seed)
    text.ClipTokenizer(bpe.VOCAB, bpe.MERGES, 12).save(workdir / text.FILE)
    return workdir


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture
def smoke_config(digits_dir):
    """Returns configs/smoke.py with the data of `digits_dir`, free to change."""
    config = smoke.get_config()
    config.data.data_dir = str(digits_dir)
    return config


@pytest.fixture(scope="session")
def trained_workdir(digits_dir, make_once):
    """Returns a finished run of configs/smoke.py, with checkpoints 20, 30, 40. Do not change."""
    config = smoke.get_config()
    config.data.data_dir = str(digits_dir)
    return make_once("smoke", functools.partial(train.train_and_evaluate, config))


@pytest.fixture(scope="session")
def swept(digits_dir, make_once):
    """A finished sweep of two cells, evaluated at steps 10 and 20. Do not change."""
    config = tiny_sweep.make_sweep(digits_dir)

    def run(workdir):
        for cell in grid.make_cells(config):
            cell_run.run(cell, config.evaluate, workdir / cell.name)

    return make_once("sweep", run)


@pytest.fixture
def workdir(trained_workdir, tmp_path):
    """Returns a copy of the finished run, free to change."""
    return pathlib.Path(shutil.copytree(trained_workdir, tmp_path / "run"))


def _get_module(command):
    return command if command.startswith("experiments.") else f"dit_jax.{command}"


def start_pair(command, *arguments, devices=1):
    """Starts two connected processes of `python -m dit_jax.<command>`, each with `devices`."""
    with socket.socket() as free_port:
        free_port.bind(("localhost", 0))
        address = f"localhost:{free_port.getsockname()[1]}"
    flags = [f"--coordinator_address={address}", "--num_processes=2"]
    return [
        start(command, *arguments, *flags, f"--process_id={i}", devices=devices) for i in range(2)
    ]


def start(command, *arguments, devices=1, **variables):
    """Starts `python -m dit_jax.<command>`, or of experiments.*, with `devices` CPU devices."""
    # Compiled with the flags of users, because these runs are compared bit for bit.
    flags = f"--xla_force_host_platform_device_count={devices} {USER_FLAGS}"
    variables = {"XLA_FLAGS": flags} | variables
    return subprocess.Popen(
        [sys.executable, "-m", _get_module(command), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="session")
def toy_extractor():
    """Returns a fast substitute for Inception: features linear in the pixels of 8x8 images."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = {"features": 5, "spatial": 3, "probabilities": 4}
    params = {
        name: jax.random.normal(key, (64, size))
        for key, (name, size) in zip(keys, sizes.items(), strict=True)
    }

    def apply(params, image):
        x = image[..., :1].reshape(len(image), -1).astype(jax.numpy.float32) / 255
        values = {name: x @ kernel for name, kernel in params.items()}
        return values | {"probabilities": jax.nn.softmax(values["probabilities"])}

    return extractors.Extractor("inception", "float32", "toy", apply, params)


@pytest.fixture
def run_pair():
    """run_pair("sample", *flags) returns the outputs of two connected processes."""

    def run(command, *arguments):
        outputs = [(p, *p.communicate(timeout=300)) for p in start_pair(command, *arguments)]
        for process, _, stderr in outputs:
            assert process.returncode == 0, stderr
        return [stdout for _, stdout, _ in outputs]

    return run


@pytest.fixture(scope="session")
def zygote(tmp_path_factory):
    """zygote("sample", *flags) returns (answer, output, error) of a forked command; see zygote.py.

    The command has one device and the compiler flags of tests. Keywords are environment variables.
    """
    script, out = ROOT / "tests" / "helpers" / "zygote.py", tmp_path_factory.mktemp("streams")
    process = subprocess.Popen(
        [sys.executable, script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert json.loads(process.stdout.readline()) == {"ready": True}

    def run(command, *arguments, **variables):
        argv = [_get_module(command), *map(str, arguments)]
        env = {"XLA_FLAGS": ONE_DEVICE} | variables
        request = {"argv": argv, "env": env, "out": str(out / "command")}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        return answer, *((out / f"command.{kind}").read_text() for kind in ("out", "err"))

    yield run
    process.stdin.close()
    process.wait(timeout=60)


@pytest.fixture
def run_command(zygote):
    """run_command("sample", *flags) returns the output of `python -m dit_jax.sample` on one device.

    With fails=True the command must fail, and its standard error is returned. With as_users=True,
    or with environment variables as keywords, it runs in its own process, compiled as for users.
    """

    def run(command, *arguments, fails=False, as_users=False, **variables):
        if as_users or variables:
            process = start(command, *arguments, **variables)
            stdout, stderr = process.communicate(timeout=300)
            status = process.returncode
        else:
            answer, stdout, stderr = zygote(command, *arguments)
            status = answer["status"]
        assert (status != 0) == fails, (status, stdout, stderr)
        return stderr if fails else stdout

    return run


@pytest.fixture
def train_as_users(run_command, tmp_path_factory):
    """train_as_users(config, workdir) trains with users' compiler flags: faster for many steps."""

    def train_as_users(config, workdir):
        path = tmp_path_factory.mktemp("configs") / "config.py"
        path.write_text(
            "from ml_collections import ConfigDict\n\n"
            f"def get_config():\n    return ConfigDict({config.to_dict()!r})\n"
        )
        run_command("train", "--config", path, "--workdir", workdir, as_users=True)

    return train_as_users
