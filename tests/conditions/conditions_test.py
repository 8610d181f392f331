"""Captions from the data to the network: which one, dropped, encoded once, guided away from."""

import functools
import io
import logging

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import CAPTIONED, captions_of, random_params
from helpers.close import assert_close
from PIL import Image

from dit_jax import conditions, latents, models, sharding, train, workdirs
from dit_jax.data import loader, sources, text
from dit_jax.data.annotations import Annotations
from dit_jax.latents import store
from dit_jax.models import blocks, text_encoder
from dit_jax.sampling import generate, requests
from dit_jax.system import json_files
from dit_jax.training import initial_state, programs


@pytest.fixture
def config(captioned_config):
    return captioned_config


def _read(tokens):
    """The words of a caption, of those that these tests use."""
    words = [*["a", "the", "digit", "caption", "of", "0", "1", "2", "3", "4"], *conftest.WORDS]
    (ids,) = text.WordTokenizer(len(words), 4096)([" ".join(words)])
    known = dict(zip(ids.tolist(), words, strict=True))
    assert len(known) == len(words)
    return " ".join(known[t] for t in tokens.tolist() if t != text.PAD)


@pytest.mark.parametrize("cache", [False, True])
def test_every_image_has_its_captions(config, cache):
    """And over the epochs each of them."""
    config.data.cache = cache
    source = latents.open_split(config, "train")
    assert source.captions(3) == ["a three", "the digit three"]
    assert source.captions(4) == ["a four", "a four"]
    batches = loader.TrainIterator(source, config, np.arange(16))
    captions_seen = set()
    for _ in range(10):
        batch = next(batches)
        assert batch["tokens"].shape == (16, 20)
        for image, tokens in zip(batch["image"], batch["tokens"], strict=True):
            captions_seen.add((int(image[0, 0, 0]) // 10, _read(tokens)))
    assert captions_seen == {(i, caption) for i in range(CAPTIONED) for caption in captions_of(i)}


def test_the_caption_drawn_is_a_function_of_the_batch_s_number(config):
    source = latents.open_split(config, "train")
    one, many = (loader.TrainIterator(source, config, np.arange(16)) for _ in range(2))
    for _ in range(4):
        state = many.state()
        batch = next(many)
        np.testing.assert_array_equal(next(one)["tokens"], batch["tokens"])
    resumed = loader.TrainIterator(source, config, np.arange(4, 8), state)
    np.testing.assert_array_equal(next(resumed)["tokens"], batch["tokens"][4:8])


def test_held_out_loss_is_of_the_first_caption(config):
    (batch, *_) = loader.eval_batches(latents.open_split(config, "eval"), 16, np.arange(16))
    assert [_read(tokens) for tokens in batch["tokens"][:4]] == [
        captions_of(i)[0] for i in range(4)
    ]


class Captioned(tfds.core.GeneratorBasedBuilder):
    """Captions in a sequence, and no labels, as coco_captions."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        captions = tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})
        image = tfds.features.Image(shape=(None, None, 3))
        features = tfds.features.FeaturesDict({"image": image, "captions": captions})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(3):
            captions = [{"id": j, "text": f"caption {j} of {i}"} for j in range(5)]
            image = io.BytesIO()  # arrays would need TensorFlow
            Image.new("RGB", (8, 8), (i, i, i)).save(image, "PNG")
            yield i, {"image": io.BytesIO(image.getvalue()), "captions": captions}


def test_captions_of_a_tfds_dataset(config, tmp_path):
    builder = Captioned(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    config.data.update(source="tfds", name=str(builder.data_dir), caption_feature="captions/text")
    source = latents.open_split(config, "train")
    number = int(source[1]["image"][0, 0, 0])
    assert source.captions(1) == [f"caption {j} of {number}" for j in range(2)]
    assert _read(source[1]["tokens"][1]) == f"caption 1 of {number}"
    config.data.caption_feature = "captions/words"
    with pytest.raises(ValueError, match=r"no feature data.caption_feature='captions/words'; it"):
        latents.open_split(config, "train")
    config.data.caption_feature = ""
    config.model.condition = "label"
    with pytest.raises(ValueError, match=r"has no labels, only captions, image: set model.cond"):
        latents.open_split(config, "train")


def test_an_image_without_captions_is_named():
    records = [{"image": b"", "text": []}]
    annotations = Annotations(caption_feature="text")
    source = sources.Source(records, "image", (8, 8, 1), annotations, origin="a test")
    with pytest.raises(ValueError, match=r"record 0 of a test has no caption; leave it out"):
        source.captions(0)


def test_captions_without_their_name_are_refused(config):
    config.data.caption_feature = ""
    with pytest.raises(ValueError, match=r"model.condition='tokens' needs data.caption_feature"):
        latents.open_split(config, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(condition="words"), "unknown condition='words'; choose one of label, tokens, con"),
        (dict(context_size=0), "condition='tokens' needs context_size=0 above 0"),
        (dict(context_size=17), "^text_num_heads=2 must divide context_size=17, the width of the"),
        (dict(text_depth=0), "text_depth=0 must be a whole number in 1"),
    ],
    ids=str,
)
def test_impossible_models_are_refused(config, change, message):
    config.model.update(change)
    with pytest.raises(ValueError, match=message):
        models.build(config.model)


def test_an_initial_encoder_tells_words_apart():
    """Else captions are heeded thousands of steps late: what blocks add is alike in all of them."""
    encoder = text_encoder.TextEncoder(4096, 12, 96, 2, 3, "float32")
    tokens = np.random.default_rng(0).integers(1, 4096, (16, 12), np.int32)
    tokens[:, 3:] = text.PAD
    params = jax.jit(encoder.init)(jax.random.key(0), tokens)
    words = np.asarray(jax.jit(encoder.apply)(params, tokens))[:, :3]
    assert words.var(axis=0).mean() > 0.5 * np.square(words).mean()


@pytest.mark.parametrize("shape", [(2, 3, 8), (2,), (2, 19)], ids=str)
def test_conditions_of_another_shape_are_refused(config, shape):
    model = models.build(config.model)
    params = models.param_shapes(model)
    cond = jnp.zeros(shape, jnp.float32 if len(shape) == 3 else jnp.int32)
    arguments = {"params": params}, jnp.zeros((2, 8, 8, 1)), jnp.zeros(2), cond
    with pytest.raises(ValueError, match=r"the condition has shape|tokens have shape \(2, 19\)"):
        jax.eval_shape(model.apply, *arguments)


@pytest.mark.parametrize(
    "block",
    [pytest.param(b, marks=() if b == "adaLN-Zero" else pytest.mark.slow) for b in blocks.BLOCKS],
)
def test_every_block_reads_every_word(config, block):
    """The output depends on each token, through parameters that all matter; counted by formula."""
    config.model.update(block=block, depth=1)
    model = models.build(config.model)
    params = random_params(model)
    assert models.count(config)["params"] == sum(a.size for a in jax.tree.leaves(params))
    x_t, t = jax.random.normal(jax.random.key(1), (1, 8, 8, 1)), jnp.array([500.0])

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(params, context):
        out = model.apply({"params": params}, x_t, t, context)
        return jnp.sum(out**2)

    context = jax.random.normal(jax.random.key(2), (1, 20, 16))
    of_params, of_context = gradient(params, context)
    assert np.all(np.abs(of_context).max(axis=-1) > 1e-6)
    own = {name: g for name, g in of_params.items() if name != "text_encoder"}
    assert all(np.any(g) for g in jax.tree.leaves(own))


def test_what_modulates_is_the_mean_of_all_words(config):
    """Where nothing else tells of the caption, each word has the same share in the output."""
    config.model.depth = 1
    model = models.build(config.model)
    params = random_params(model)
    params["context_embedder"] = jax.tree.map(jnp.zeros_like, params["context_embedder"])
    x_t, t = jax.random.normal(jax.random.key(1), (1, 8, 8, 1)), jnp.array([500.0])

    @jax.jit
    @jax.grad
    def gradient(context):
        return jnp.sum(model.apply({"params": params}, x_t, t, context) ** 2)

    actual = gradient(jax.random.normal(jax.random.key(2), (1, 20, 16)))  # [1, M, D]
    assert np.abs(actual[0, 0]).max() > 1e-3
    assert_close(actual, np.broadcast_to(actual[:, :1], actual.shape), 1e-6)


def test_a_caption_encoded_before_is_the_same(config):
    """What samplers do once is what the model does in every call."""
    model = models.build(config.model)
    params = random_params(model)
    request = conditions.build(config).request(["a two", "a three"])
    x_t, t = jax.random.normal(jax.random.key(1), (2, 8, 8, 1)), jnp.array([500.0, 3.0])
    apply = jax.jit(lambda cond: model.apply({"params": params}, x_t, t, cond))
    whole = apply(jnp.asarray(request.cond))
    encoded = conditions.encode(
        model, params, None, jnp.asarray(request.cond), sharding.make_mesh(config.mesh)
    )
    assert encoded.shape == (2, 20, 16)
    assert_close(apply(encoded), whole, 1e-5)
    assert np.abs(whole - apply(encoded[::-1])).max() > 1e-3


def test_dropped_captions_are_empty():
    tokens = jnp.asarray(np.arange(60_000).reshape(-1, 3) % 256)
    null = np.full(3, text.PAD, np.int32)
    dropped = np.asarray(conditions.drop(jax.random.key(0), tokens, 0.1, null))
    empty = np.all(dropped == text.PAD, axis=1)
    assert empty.mean() == pytest.approx(0.1, abs=0.01)
    np.testing.assert_array_equal(dropped[~empty], np.asarray(tokens)[~empty])


def _program(config):
    program = programs.make_program(config, jax.devices()[:1])
    return program, program.task.load_frozen(config, program.mesh, {})[1]


@pytest.mark.slow
def test_training_learns_from_captions(config):
    """The text encoder's parameters move too; all dropped, every caption gives the same loss."""
    config.objective.condition_dropout = 0.5
    program, frozen = _program(config)
    np.testing.assert_array_equal(frozen.null, np.full(20, text.PAD))
    source = latents.open_split(config, "train")
    batch = next(loader.TrainIterator(source, config, np.arange(16)))
    examples = program.task.draw_examples(batch, jax.random.key(0), frozen, dropout=True)
    empty = np.all(np.asarray(examples.cond) == text.PAD, axis=1)
    assert 2 <= empty.sum() <= 14
    state = initial_state.new_state(program, jax.random.key(0))
    initial = jax.device_get(state.params)
    step = programs.compile_train_step(program)
    for _ in range(3):  # adaLN's zeros open on the way
        state, scalars = step(state, batch, jax.random.key(0), frozen)
    assert np.isfinite(scalars["loss"])
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), initial, jax.device_get(state.params))
    assert all(jax.tree.leaves(moved["text_encoder"]))


def _sample(config, expected_message, params, **settings):
    config.sample.update(steps=3, sampler="ddim", **settings)
    program, _ = _program(config)
    arguments = config.sample, program.task.process, "eps", program.mesh
    sample = generate.make_sample_fn(program.model, *arguments)
    return generate.generate(sample, params, expected_message, 0, program.mesh, lambda x_0: x_0)


def test_prompts_and_negative_prompts(config):
    """Away from the prompt itself is no guidance; away from another one is another image."""
    params = random_params(models.build(config.model))
    prompts = ["a two", "a three"]
    plain = _sample(config, conditions.build(config).request(prompts), params, cfg_scale=1.0)

    def guided(prompts, negative=""):
        requested = conditions.build(config).request(prompts, negative)
        return _sample(config, requested, params, cfg_scale=4.0)

    same = guided(["a two", "a two"], "a two")
    assert_close(same[0], plain[0], 1e-4)
    away = guided(prompts)
    assert np.abs(away - plain).max() > 1e-3
    assert np.abs(away - guided(prompts, "a red cat")).max() > 1e-3


def test_prompts_are_asked_for_in_blocks(config):
    requested = conditions.build(config).from_flags(
        5, prompt=["a two", "a three"], negative_prompt="the digit"
    )
    assert [_read(tokens) for tokens in requested.cond] == ["a two"] * 3 + ["a three"] * 2
    assert [_read(tokens) for tokens in requested.null] == ["the digit"] * 5


def test_an_image_of_each_prompt_is_requested():
    flags = {"labels": "1,2,3", "prompt": ["a", "b"], "negative_prompt": "c"}
    assert conditions.count_requested(flags) == 2
    assert conditions.count_requested(flags | {"prompt": []}) == 0


def test_labels_and_captions_are_not_mixed_up(smoke_config):
    with pytest.raises(ValueError, match=r"model.condition='label': this model takes labels"):
        conditions.build(smoke_config).request(["a two"])


def test_captioned_folders_have_no_classes(config):
    """Else all of its images would be of the class 0."""
    config.model.update(condition="label", num_classes=10)
    with pytest.raises(
        ValueError, match=r"='text' reads captions, but model.num_classes=10 needs "
    ):
        latents.open_split(config, "train")
    config.model.update(num_classes=0, null_condition=False)
    assert latents.open_split(config, "train")[3]["label"] == 0


def test_conditions_are_drawn_from_the_data(config):
    """Each once before any twice; in order for pictures."""
    drawn = requests.draw(config, "random", 2 * CAPTIONED, seed=1)
    captions = [_read(tokens) for tokens in drawn.cond]
    firsts = sorted(captions_of(i)[0] for i in range(CAPTIONED))
    assert sorted(captions[:CAPTIONED]) == sorted(captions[CAPTIONED:]) == firsts
    assert captions[:CAPTIONED] != captions[CAPTIONED:]
    assert np.all(drawn.null == text.PAD)
    with pytest.raises(ValueError, match="unknown labels='even'; choose one of random"):
        requests.draw(config, "even", 2)
    assert [_read(t) for t in requests.draw_for_picture(config, 3).cond] == [
        "a zero",
        "a one",
        "a two",
    ]


@pytest.fixture(scope="module")
def stored_dir(captioned_dir, clip_dir, vae_dir, tmp_path_factory):
    """Moments of the images and their mirrors, with captions and contexts; no labels."""
    config = conftest.captioned(captioned_dir)
    config.model.update(condition="context", num_classes=0)
    config.text.update(encoder=str(clip_dir), stored=True)
    config.data.update(flip=True, eval_split="")
    out = tmp_path_factory.mktemp("moments") / "captioned"
    store.encode(config, vae_dir, out, shard_images=16, batch_size=4)
    return out


@pytest.fixture
def stored_config(config, stored_dir, clip_dir, vae_dir):
    """Of a model that is trained on them, free to change."""
    config.model.update(condition="context", num_classes=0, input_size=4, in_channels=2)
    config.text.update(encoder=str(clip_dir), stored=True)
    config.data.update(flip=True, eval_split="")
    config.latents.update(source="moments", vae=str(vae_dir), moments=str(stored_dir))
    return config


def test_stored_contexts_are_those_of_the_encoder(stored_config):
    """Rounded to f16; dropped, the empty caption's. Captions alone are stored too."""
    stored_config.objective.condition_dropout = 0.5

    def examples(stored):
        stored_config.text.stored = stored
        program, frozen = _program(stored_config)
        source = latents.open_split(stored_config, "train")
        assert source.captions(2 * 3 + 1) == ["a three", "the digit three"]
        batch = next(loader.TrainIterator(source, stored_config, np.arange(16)))
        key = jax.random.key(0)
        return batch, program.task.draw_examples(batch, key, frozen, dropout=True)

    stored, computed = examples(True), examples(False)
    assert stored[0]["context"].shape == (16, 12, 16)
    for name in ("x_0", "cond", "t", "eps"):
        assert_close(getattr(stored[1], name), getattr(computed[1], name), 2e-3)
    dropped = {bytes(np.asarray(row)) for row in computed[1].cond}
    assert 5 < len(dropped) < 16  # the empty ones are one


def test_captions_are_drawn_from_stored_ones(stored_config):
    """Whose records are the images and their mirrors, two of each caption."""
    drawn = requests.draw(stored_config, "balanced", 5)
    request = conditions.build(stored_config).request([captions_of(i)[0] for i in range(5)])
    np.testing.assert_array_equal(drawn.cond, request.cond)


def test_stored_contexts_of_another_encoder_are_refused(stored_config, tmp_path):
    """By its parameters, whatever their place and shape."""
    mesh = sharding.make_mesh(stored_config.mesh)
    recorded = latents.open_split(stored_config, "train").metadata
    resolved, encoder = conditions.build(stored_config).resolve(recorded, mesh)
    digest = resolved.text.encoder_digest
    assert digest == encoder.digest == recorded["text_encoder_digest"]
    stored_config.text.encoder = str(conftest.save_clip(tmp_path / "other", seed=1))
    other = conditions.build(stored_config).load_encoder(mesh).digest
    with pytest.raises(ValueError, match=rf"digest {other}, but text.encoder_digest={digest} is"):
        conditions.build(stored_config).resolve(recorded, mesh)
    stored_config.text.encoder_digest = other
    with pytest.raises(ValueError, match=rf"encoder with digest {digest}, but .*digest={other} is"):
        latents.open_split(stored_config, "train")
    stored_config.text.stored = False  # the captions alone
    assert conditions.build(stored_config).resolve(recorded, mesh)[0].text.encoder_digest == other


@pytest.mark.parametrize("changes", [dict(condition="tokens"), dict(source="images")])
def test_stored_contexts_are_of_moments_and_a_frozen_encoder(stored_config, changes):
    """Else they would be looked for in vain."""
    stored_config.text.stored = True
    stored_config.latents.update(vae="vae", source=changes.pop("source", "moments"))
    stored_config.model.update(text_num_heads=2, **changes)
    with pytest.raises(ValueError, match=r"text.stored=True reads the outputs of a text encoder"):
        programs.make_program(stored_config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.context_size": 24},
            "is 16 wide, but the model was built for model.context",
        ),
        ({"text.encoder": "nowhere"}, "no nowhere/config.json"),
        ({"text.encoder": ""}, "text.encoder is empty: model.condition='context' needs the workd"),
        ({"text.encoder_digest": "0123"}, r"has digest \w+, but text.encoder_digest=0123 is of an"),
    ],
    ids=["width", "missing", "empty", "another"],
)
def test_encoders_that_do_not_fit_are_refused(config, clip_dir, change, message):
    config.model.update(condition="context", context_size=16)
    config.text.encoder = str(clip_dir)
    config.update_from_flattened_dict(change)
    with pytest.raises((ValueError, OSError), match=message):
        _program(config)


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["tokens", "context"])
def test_a_stopped_run_ends_as_the_uninterrupted_one(stored_config, tmp_path, condition):
    """To the bit: the captions drawn, those left out, and the encoder that is trained along."""
    config = stored_config
    config.model.condition = condition
    config.text.stored = condition == "context"
    config.update(total_steps=4, eval_every_steps=0, sample_every_steps=0, log_every_steps=1)
    config.update(checkpoint_every_steps=2)
    config.optim.update(warmup_steps=0, schedule="constant")
    runs = "whole", "broken"
    whole = train.train_and_evaluate(config, tmp_path / "whole")
    config.total_steps = 2
    train.train_and_evaluate(config, tmp_path / "broken")
    config.total_steps = 4
    resumed = train.train_and_evaluate(config, tmp_path / "broken")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    lines = (json_files.read_json_lines(tmp_path / run / "metrics.jsonl") for run in runs)
    losses = [[line["loss"] for line in of_run if line["step"] > 2] for of_run in lines]
    assert losses[0] == losses[1]
    digest = workdirs.load_config(tmp_path / "broken").text.encoder_digest
    recorded = latents.open_split(config, "train").metadata["text_encoder_digest"]
    assert digest == {"tokens": "", "context": recorded}[condition]


@pytest.mark.slow
def test_a_run_on_captions(config, run_command, tmp_path, caplog):
    """Trained, drawn from by prompt, measured: the whole line."""
    config.update(total_steps=4, eval_every_steps=4, sample_every_steps=4, checkpoint_every_steps=2)
    config.optim.warmup_steps = 0
    with caplog.at_level(logging.INFO, "dit_jax"):
        train.train_and_evaluate(config, tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "4.png").is_file() or list(
        (tmp_path / "run" / "samples").glob("*.png")
    )
    flags = ["--workdir", tmp_path / "run", "--steps", 2, "--cfg_scale", 3, "--num", 4]
    prompts = ["--prompt", "a two", "--prompt", "a three", "--negative_prompt", "a red cat"]
    out = run_command("sample", *flags, *prompts, "--out", tmp_path / "x.npz")
    assert "4 samples of step 4" in out
    with np.load(tmp_path / "x.npz") as file:
        assert list(file) == ["arr_0"]
        assert file["arr_0"].shape == (4, 8, 8, 1)
    error = run_command("sample", *flags, "--labels", "3", "--out", tmp_path / "x.npz", fails=True)
    assert "--labels=3: this model takes --prompt" in error
    flags = ["--workdir", tmp_path / "run", "--steps", 2, "--num", 30]
    assert "fd_pixels" in run_command("evaluate", *flags)
