"""The demo checkpoint's networks, all of them diffusers' and transformers' own classes.

Sizes follow two limits: 36 MB on disk in fp16, and about a second for 20 guided steps at 256x256
on two CPU cores. Hence few but wide layers, and attention only at 1/2 and 1/4 of the latent size.
"""

import copy
import gzip
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

TOKENS = 77
BOS, EOS = 49406, 49407
# At 1/1, 1/2, 1/4 and 1/8 of a picture's size. Full resolution costs a CPU the most, and flat
# shapes ask the least of it; oneDNN's kernels take 16 channels at a time.
VAE_CHANNELS = (16, 16, 48, 96)


def make_text_encoder():
    """A CLIP text encoder of three layers whose word table starts as plus or minus 0.02.

    Training moves only the words that captions use (see `train.py`); the others keep two values, so
    the 12 MB table compresses to about one.
    """
    config = CLIPTextConfig(
        vocab_size=EOS + 1,
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    text_encoder = CLIPTextModel(config)
    table = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table.copy_((torch.rand_like(table) < 0.5).to(table.dtype) * 0.04 - 0.02)
    return text_encoder


def make_unet():
    """SD1's UNet with three resolutions, one layer each, and 6.9 M parameters."""
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        attention_head_dim=4,
        cross_attention_dim=128,
        norm_num_groups=16,
    )


def make_vae():
    """SD1's autoencoder (x8, 4 latent channels) with 16 channels at full resolution."""
    return AutoencoderKL(
        sample_size=256,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=VAE_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
    )


def make_scheduler():
    """SD1's noise schedule; `linspace` visits the timesteps of ComfyUI's `normal`."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="linspace",
        steps_offset=1,
    )


def save_checkpoint(folder, text_encoder=None, unet=None, vae=None):
    """Write a diffusers StableDiffusionPipeline folder; networks left out keep their files.

    Args:
        folder: where `model_index.json` goes; `tokenizer/` must be there already.
        text_encoder, unet, vae: networks on any device; stored as fp16 safetensors.
    """
    folder = Path(folder)
    for name, network in (("text_encoder", text_encoder), ("unet", unet), ("vae", vae)):
        if network is not None:
            half = copy.deepcopy(network).to("cpu", torch.float16)
            half.save_pretrained(folder / name, safe_serialization=True)
    make_scheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.36.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_tokenizer(bpe_path, folder):
    """Write CLIP's tokenizer in transformers' layout from OpenAI's merge list.

    Args:
        bpe_path: `bpe_simple_vocab_16e6.txt.gz` of github.com/openai/CLIP (MIT licence).
        folder: the `tokenizer/` folder to write.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(bpe_path, "rt", encoding="utf-8") as lines:
        merges = lines.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    # Bytes without a printable form are shifted to 256 and up, in order (CLIP's bytes_to_unicode).
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    vocab = letters + [letter + "</w>" for letter in letters]
    vocab += ["".join(merge.split()) for merge in merges]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(vocab)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TOKENS,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
