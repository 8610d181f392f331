"""CLIP's text transformer and tokens against transformers', from its files, with random weights."""

import json
import random

import jax
import numpy as np
import pytest
import torch
import transformers
from helpers import bpe
from ml_collections import ConfigDict

from dit_jax import convert, sharding
from dit_jax.data import text
from dit_jax.workdirs import checkpoint

TINY = dict(
    vocab_size=600,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=20,
    hidden_act="gelu",
)
# Stable Diffusion 1's text model, but with 2 layers; below Stable Diffusion 2's with fewer tokens.
VIT_L = dict(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=2,
    num_attention_heads=12,
    hidden_act="quick_gelu",
)
OPENCLIP_H = dict(
    vocab_size=2000,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=2,
    num_attention_heads=16,
    hidden_act="gelu",
)
DIFFICULT_CAPTIONS = [
    "",
    " \t\n ",
    "A photo of the CAT's\n\n  hat — 'tis theirs, they'RE 'Re I'll I'LL I\u2019ll",
    "cafe\u0301 café CAFÉ \uff26\uff55\uff4c\uff4c ﬁ ß ẞ İ \u0131 Σ ς Å ñ ö",
    "🐈 🐈\u200d⬛ 👩\u200d👩\u200d👧 🇩🇪 ☃\ufe0f !? !!! ... «guillemets» “quotes” `x` \"y\" ''s",
    "12 3.14159 ½ ² Ⅷ ٣ 1st cat123cat 1,000",
    "猫 の 写真 고양이 क्षि ไทย עברית العربية кошка",
    "a\u200bb\u3000c\u00a0d\x00e\x85f\u2028g\ufeffh\ufffd",
    "<|endoftext|> a<|startoftext|>b <|ENDOFTEXT|> <|endoftext |> </w> the</w>",
    "https://example.com/?a=b&amp;c#d_e-f user@example.com C++ #1 ~/.x",
    "the cat " * 60,
    "x" * 300,
    "!" * 300,
    "🐈" * 60,
]


def _build_reference(model_class, sizes):
    """Builds a text model with weights that give every part an effect on the hidden states."""
    torch.manual_seed(0)
    end = sizes["vocab_size"] - 1
    config = transformers.CLIPTextConfig(
        **sizes, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end
    )
    if model_class is transformers.CLIPModel:
        vision = dict(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, image_size=32)
        config = transformers.CLIPConfig(text_config=config.to_dict(), vision_config=vision)
    reference = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            noise = torch.randn_like(parameter)
            if "embedding" in name:
                parameter.copy_(0.5 * noise)
            elif parameter.ndim == 2:
                parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)
            else:  # norms, biases
                parameter.add_(0.5 * noise)
    return reference


@pytest.mark.parametrize(
    ("model_class", "sizes", "skip_layers"),
    [
        (transformers.CLIPTextModel, TINY, 0),
        (transformers.CLIPTextModelWithProjection, TINY, 0),
        (transformers.CLIPModel, TINY, 1),
        (transformers.CLIPTextModel, VIT_L, 0),
        (transformers.CLIPTextModel, OPENCLIP_H, 0),
    ],
    ids=["tiny", "tiny-projected", "tiny-whole-but-one", "vit-l", "openclip-h"],
)
def test_hidden_states_agree_with_transformers(model_class, sizes, skip_layers, tmp_path):
    reference = _build_reference(model_class, sizes)
    reference.save_pretrained(tmp_path / "hf")
    transformers.CLIPTokenizer(bpe.VOCAB, bpe.MERGES).save_pretrained(tmp_path / "hf")
    config = convert.to_workdir(
        "clip", tmp_path / "hf", tmp_path / "workdir", skip_layers=skip_layers
    ).model
    assert config.activation == sizes["hidden_act"]
    assert text.load_tokenizer(tmp_path / "workdir").length == config.length
    mesh = sharding.make_mesh(dict(data=-1, fsdp=1, tensor=1), jax.devices()[:1])
    model, params = checkpoint.load_model(tmp_path / "workdir", mesh, "float32", "clip")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (3, config.length), np.int32)
    tokens[1, 5:] = config.vocab_size - 1
    reference = getattr(reference, "text_model", reference)
    with torch.no_grad():
        states = reference(torch.from_numpy(tokens).long(), output_hidden_states=True).hidden_states
        expected = reference.final_layer_norm(states[-1 - skip_layers]).numpy()
    actual = np.asarray(jax.jit(model.apply)({"params": params}, tokens))
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    print(f"{sizes['hidden_size']}: {error:.1e} of the largest value")
    assert error < 1e-4


def test_torch_file_gives_the_same_parameters(tmp_path):
    """Old folders have such a file, with position_ids in it."""
    reference = _build_reference(transformers.CLIPTextModelWithProjection, TINY)
    reference.save_pretrained(tmp_path)
    expected = convert.clip.read(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    ids = {"text_model.embeddings.position_ids": torch.arange(20)[None]}
    torch.save(reference.state_dict() | ids, tmp_path / "pytorch_model.bin")
    config, result = convert.clip.read_model_config(tmp_path), convert.clip.read(tmp_path)
    assert result.keys() == expected.keys() | ids.keys()
    a, b = (convert.load("clip", arrays, config) for arrays in (result, expected))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def _draw_captions():
    """Draws captions with characters of all kinds, so that every rule of the tokenizer applies."""
    rng = random.Random(0)
    letters = (
        "abcthe CATS  's're'll 0123 .,!?'\u2019\"-—_()<|>/&éÉüßİﬁ猫の🐈\u200d\u0301\u00a0\n\t\x00"
    )
    captions = ["".join(rng.choices(letters, k=rng.randint(1, 30))) for _ in range(300)]
    points = [p for p in range(1, 0x30000, 97) if not 0xD800 <= p < 0xE000]
    return captions + [f"cat{chr(p)}s {chr(p)}" for p in points]


def test_padding_by_older_files_agrees_with_transformers(tmp_path):
    """Stable Diffusion 2's two files name different padding tokens."""
    bpe.write(tmp_path)
    config = {"tokenizer_class": "CLIPTokenizer", "pad_token": text.END}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "!"}')
    reference = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    expected = reference(["the cat"], padding="max_length", max_length=20).input_ids
    tokenizer = convert.clip.read_tokenizer(tmp_path, ConfigDict(dict(length=20, vocab_size=600)))
    np.testing.assert_array_equal(tokenizer(["the cat"]), expected)
    assert expected[0][-1] == bpe.VOCAB["!"]


@pytest.mark.parametrize("pad", [text.END, "!"])
def test_tokens_agree_with_transformers(pad, tmp_path):
    reference = transformers.CLIPTokenizer(bpe.VOCAB, bpe.MERGES, pad_token=pad)
    reference.save_pretrained(tmp_path)
    tokenizer = text.ClipTokenizer.load(tmp_path / text.FILE, 77, pad)
    # With padding "!", transformers also treats a "!" in a caption as padding. CLIPTokenizerFast is
    # the same class since transformers 5.
    captions = DIFFICULT_CAPTIONS + _draw_captions()
    if pad == "!":
        captions = [caption.replace("!", "") for caption in captions]
    expected = reference(captions, padding="max_length", truncation=True, max_length=77).input_ids
    np.testing.assert_array_equal(tokenizer(captions), expected)
