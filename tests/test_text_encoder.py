"""Embeddings of prompts against transformers' CLIP, textual inversion, limits, broken folders."""

from __future__ import annotations

import json
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fullpipe.errors import InvalidRequest, SetupError
from fullpipe.text import PromptEncoder, repeat_to_same_length
from fullpipe.text.clip import split_linear

START, END, CAT, DOG = 49406, 49407, 2368, 1929


def save_clip(folder, width, layers, act, projection=False, seed=0):
    """Write a tiny random CLIP; its weights are exact in fp16."""
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        hidden_act=act,
        eos_token_id=END,
    )
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name and name.endswith("weight")
        parameter.data = (1 + 0.1 * noise if is_norm else 0.2 * noise).half().float()
    model.save_pretrained(folder)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def sd1(checkpoint, tmp_path_factory):
    """Folder, and transformers' model, of an SD1 checkpoint's text part."""
    folder = tmp_path_factory.mktemp("sd1")
    shutil.copytree(checkpoint / "tokenizer", folder / "tokenizer")
    return folder, save_clip(folder / "text_encoder", 32, 3, "quick_gelu")


@pytest.fixture(scope="module")
def sdxl(checkpoint, tmp_path_factory):
    """Encoder, and transformers' models, of an SDXL checkpoint's text part."""
    folder = tmp_path_factory.mktemp("sdxl")
    shutil.copytree(checkpoint / "tokenizer", folder / "tokenizer")
    clip_l = save_clip(folder / "text_encoder", 32, 3, "quick_gelu", seed=1)
    clip_g = save_clip(folder / "text_encoder_2", 48, 4, "gelu", projection=True, seed=2)
    return PromptEncoder.from_folder(folder), clip_l, clip_g


@pytest.fixture(scope="module")
def encoder(sd1):
    return PromptEncoder.from_folder(sd1[0])


def padded(text_ids, pad=END):
    return torch.tensor([[START, *text_ids, END, *[pad] * (75 - len(text_ids))]])


@pytest.mark.parametrize("clip_skip", [None, -1, -2, -3, -4, -24])
def test_sd1_layers_are_those_of_transformers(sd1, encoder, clip_skip):
    model = sd1[1]
    reference = model(padded([CAT]), output_hidden_states=True)
    # hidden_states[0] is the input of the first layer; 3 layers, beyond which the last one counts.
    hidden = reference.hidden_states[clip_skip if clip_skip in (-2, -3) else -1]
    norm = getattr(model, "text_model", model).final_layer_norm
    got = encoder.encode("cat", clip_skip=clip_skip)
    torch.testing.assert_close(got["prompt_embeds"], norm(hidden), atol=1e-5, rtol=0)
    pooled = reference.pooler_output
    torch.testing.assert_close(got["pooled_prompt_embeds"], pooled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("clip_skip", [None, -1, -2, -3, -4, -5])
def test_sdxl_joins_both_encoders_without_norm(sdxl, clip_skip):
    encoder, clip_l, clip_g = sdxl
    parts = []
    for model, pad in ((clip_l, END), (clip_g, 0)):
        out = model(padded([CAT], pad), output_hidden_states=True)
        skip = -2 if clip_skip is None else clip_skip
        layers = model.config.num_hidden_layers
        # One layer beyond the first, ComfyUI falls back to the last layer, with its norm.
        parts.append(out.last_hidden_state if -skip > layers else out.hidden_states[skip])
    got = encoder.encode("cat", clip_skip=clip_skip)
    torch.testing.assert_close(got["prompt_embeds"], torch.cat(parts, -1), atol=1e-5, rtol=0)
    assert got["pooled_prompt_embeds"].shape == (1, 48)
    torch.testing.assert_close(
        got["pooled_prompt_embeds"], clip_g(padded([CAT], 0)).text_embeds, atol=1e-5, rtol=0
    )


def test_weights_scale_the_distance_from_the_empty_prompt(encoder):
    plain = encoder.encode("cat dog")["prompt_embeds"]
    empty = encoder.encode("")["prompt_embeds"]
    got = encoder.encode("cat (dog:1.5)")["prompt_embeds"]
    assert torch.equal(got[:, :2], plain[:, :2])
    assert torch.equal(got[:, 3:], plain[:, 3:])
    expected = (plain[:, 2] - empty[:, 2]) * 1.5 + empty[:, 2]
    torch.testing.assert_close(got[:, 2], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 500.0])
@pytest.mark.parametrize("has_bias", [True, False])
def test_split_linear_layers_are_as_exact_as_fp32(scale, has_bias):
    torch.manual_seed(0)
    x, weight = scale * torch.randn(2, 77, 320), (0.05 * torch.randn(64, 320)).half()
    bias = torch.randn(64) if has_bias else None
    linear = torch.nn.functional.linear
    exact = linear(x.double(), weight.double(), bias if bias is None else bias.double())
    in_fp32 = (linear(x, weight.float(), bias) - exact).norm()
    assert (split_linear(x, weight, bias) - exact).norm() < 2 * in_fp32


def test_pooled_is_the_first_chunks_and_ignores_weights(encoder):
    first = encoder.encode(" ".join(["cat"] * 75))
    both = encoder.encode("(" + " ".join(["cat"] * 75 + ["dog"] * 20) + ":1.4)")
    assert both["prompt_embeds"].shape == (1, 154, 32)
    torch.testing.assert_close(
        both["pooled_prompt_embeds"], first["pooled_prompt_embeds"], atol=1e-5, rtol=0
    )


def test_the_other_prompt_changes_rounding_only(encoder):
    alone = encoder.encode("a (red:1.3) cat")["prompt_embeds"]
    for other in ("dog", " ".join(["(dog:0.7)"] * 700)):
        beside = encoder.encode("a (red:1.3) cat", other)
        assert (beside["prompt_embeds"] - alone).abs().max() < 5e-6
        swapped = encoder.encode(other, "a (red:1.3) cat")
        assert (swapped["negative_prompt_embeds"] - alone).abs().max() < 5e-6
        again = encoder.encode("a (red:1.3) cat", other)
        assert all(torch.equal(again[name], beside[name]) for name in again)


def test_ten_thousand_words_are_encoded_in_full(encoder):
    got = encoder.encode(" ".join(["cat"] * 10_000))
    assert got["prompt_embeds"].shape == (1, 77 * 134, 32)


def test_unequal_lengths_are_repeated_to_their_least_common_multiple():
    a, b = torch.randn(1, 2 * 77, 3), torch.randn(1, 3 * 77, 3)
    long_a, long_b = repeat_to_same_length(a, b)
    assert torch.equal(long_a, torch.cat([a, a, a], dim=1))
    assert torch.equal(long_b, torch.cat([b, b], dim=1))
    assert repeat_to_same_length(a, a) == (a, a)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": "cat " * 21}, "prompt has 21 tokens, allowed 20"),
        ({"prompt": "", "negative_prompt": "dog " * 30}, "negative_prompt has 30 tokens"),
        ({"prompt": "cat", "clip_skip": 0}, r"clip_skip=0, allowed -24\.\.-1"),
        ({"prompt": "cat", "clip_skip": -25}, r"clip_skip=-25, allowed -24\.\.-1"),
        ({"prompt": "a \ud800"}, r"lone surrogate U\+D800 at character 2"),
        ({"prompt": "(cat:nan)"}, "prompt has weights that make its embeddings infinite"),
        ({"prompt": "(cat:1e999)"}, "prompt has weights that make its embeddings infinite"),
        ({"prompt": "a embedding: "}, "'embedding:' without a name"),
    ],
)
def test_bad_requests_are_named(sd1, request_, message):
    encoder = PromptEncoder.from_folder(sd1[0], max_tokens=20)
    with pytest.raises(InvalidRequest, match=message):
        encoder.encode(**request_)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_textual_inversion_comes_from_the_folder_only(sd1, tmp_path, caplog):
    folder = tmp_path / "embeddings"
    (folder / "sub").mkdir(parents=True)
    vectors = torch.randn(2, 32)
    for path in (folder / "style", folder / "sub" / "deep", tmp_path / "outside"):
        save_file({"emb_params": vectors}, path.with_suffix(".safetensors"))
    torch.save({"x": Bomb(tmp_path / "exploded")}, folder / "bomb.pt")
    encoder = PromptEncoder.from_folder(sd1[0], embeddings_folder=folder)

    for name in ("style", "style.safetensors", "style,", "deep"):
        (chunk,) = encoder.chunks(f"cat (embedding:{name}:1.3) dog")[0]
        assert chunk.tokens[1] == CAT
        assert torch.equal(torch.stack(chunk.tokens[2:4]), vectors)
        assert chunk.weights[2:4] == [1.3, 1.3]
        assert DOG in chunk.tokens[4:]

    (tmp_path / "embeddings.safetensors").write_bytes(b"")
    for name in ("missing", "../outside", str(tmp_path / "outside"), "sub/deep", ",", "bomb"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            (chunk,) = encoder.chunks(f"cat embedding:{name} dog")[0]
        assert all(isinstance(token, int) for token in chunk.tokens)
        assert chunk.tokens[1] == CAT
        assert DOG in chunk.tokens
        assert f"unknown embeddings: {name[:64]!r}" in caplog.text
    assert not (tmp_path / "exploded").exists()

    plain = encoder.encode("cat")["prompt_embeds"]
    assert not torch.allclose(encoder.encode("embedding:style")["prompt_embeds"], plain)
    # A server without a folder treats every name as unknown.
    assert PromptEncoder.from_folder(sd1[0]).chunks("embedding:style cat") == encoder.chunks("cat")


def test_fp32_weights_are_cut_to_fp16_as_in_comfyui(sd1, tmp_path):
    folder = tmp_path / "exact"
    shutil.copytree(sd1[0], folder)
    path = folder / "text_encoder" / "model.safetensors"
    weights = {name: tensor + 1e-4 * tensor.abs().max() for name, tensor in load_file(path).items()}
    save_file(weights, path)
    exact = PromptEncoder.from_folder(folder, weights_dtype=None).encode("cat")["prompt_embeds"]
    cut = PromptEncoder.from_folder(folder).encode("cat")["prompt_embeds"]
    assert (exact - cut).abs().max() > 1e-5
    save_file({name: tensor.half() for name, tensor in weights.items()}, path)
    stored = PromptEncoder.from_folder(folder, weights_dtype=None).encode("cat")["prompt_embeds"]
    assert torch.equal(cut, stored)


def break_vocabulary(folder):
    (folder / "tokenizer" / "vocab.json").write_text('{"a": 1}')


def break_config(folder):
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps({"model_type": "t5"}))


def break_shape(folder):
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("layers.1.mlp.fc1.weight"))
    save_file({**weights, name: weights[name][:5].contiguous()}, path)


def drop_weight(folder):
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    save_file({name: w for name, w in weights.items() if "layers.2" not in name}, path)


def truncate_weights(folder):
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "checkpoint folder .* is missing"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer.json is missing: copy"),
        (lambda f: (f / "tokenizer/merges.txt").unlink(), "merges.txt is missing: copy"),
        (break_vocabulary, "is not a CLIP vocabulary .*: copy"),
        (lambda f: (f / "text_encoder/config.json").unlink(), "config.json is missing: copy"),
        (break_config, "config.json is not the config of a CLIP text model"),
        (lambda f: (f / "text_encoder/model.safetensors").unlink(), "model.safetensors is missing"),
        (truncate_weights, "model.safetensors cannot be read"),
        (drop_weight, "model.safetensors lacks 16 weights"),
        (break_shape, r"fc1.weight has shape \[5, 32\], config.json beside it says \[64, 32\]"),
        (lambda f: (f / "text_encoder_2").mkdir(), "text_encoder_2/config.json is missing"),
    ],
)
def test_broken_checkpoints_name_the_file_and_the_remedy(sd1, tmp_path, damage, message):
    folder = tmp_path / "checkpoint"
    shutil.copytree(sd1[0], folder)
    damage(folder)
    with pytest.raises(SetupError, match=message):
        PromptEncoder.from_folder(folder)


def test_a_missing_embeddings_folder_is_a_setup_error(sd1, tmp_path):
    with pytest.raises(SetupError, match=r"embeddings folder .* is missing"):
        PromptEncoder.from_folder(sd1[0], embeddings_folder=tmp_path / "none")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_a_gpu_gives_the_same_embeddings(sd1, encoder):
    on_gpu = PromptEncoder.from_folder(sd1[0], device="cuda").encode("a (red:1.3) cat", "dog " * 90)
    on_cpu = encoder.encode("a (red:1.3) cat", "dog " * 90)
    for name, expected in on_cpu.items():
        assert on_gpu[name].device.type == "cuda"
        torch.testing.assert_close(on_gpu[name].cpu(), expected, atol=1e-4, rtol=0)
