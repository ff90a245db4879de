"""Single files and folders of every served family: recognised, renamed, refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from fullpipe.assemble import Choices, assemble
from fullpipe.checkpoints.architecture import detect
from fullpipe.checkpoints.folder import read_defaults, weight_files
from fullpipe.checkpoints.single_file import convert, convert_single_file
from fullpipe.checkpoints.weights import read_weights, write_weights
from fullpipe.config import Limits
from fullpipe.errors import SetupError
from fullpipe.local import LocalPipeline
from fullpipe.text import PromptEncoder

from .reduced import TEXT_FOLDERS, TRUE, build, networks, single_file_keys, text_weights

FAMILIES = ("sd1", "sd2", "sdxl")
V_BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{family: (diffusers folder, single file)} with equal weights."""
    root = tmp_path_factory.mktemp("checkpoints")
    found = {}
    for family in FAMILIES:
        folder = build(family, root / family)
        keys = keys_of(family, folder)
        save_file({k: v.contiguous() for k, v in keys.items()}, root / f"{family}.safetensors")
        found[family] = (folder, root / f"{family}.safetensors")
    return found


def keys_of(family, folder):
    parts = [
        load_file(folder / part / "diffusion_pytorch_model.safetensors") for part in ("unet", "vae")
    ]
    texts = [folder / part / "model.safetensors" for part in TEXT_FOLDERS]
    return single_file_keys(family, *parts, [load_file(path) for path in texts if path.is_file()])


def nothing(*_):
    pass


@pytest.mark.parametrize("family", FAMILIES)
def test_single_file_becomes_the_folder_that_it_was_made_of(family, checkpoints, tmp_path):
    folder, file = checkpoints[family]
    progress = []
    said = convert_single_file(file, tmp_path / "out", lambda *b: progress.append(b))
    assert said == {"sd1": "SD1.x", "sd2": "SD2.x", "sdxl": "SDXL"}[family] + ", epsilon, float32"
    assert progress[-1][0] == progress[-1][1] > 1e6
    for part in ("unet", "vae", *TEXT_FOLDERS):
        if not (folder / part).is_dir():
            assert not (tmp_path / "out" / part).exists()
            continue
        ((path, name),) = weight_files(folder / part)
        wanted, got = load_file(path), load_file(tmp_path / "out" / part / name)
        if part.startswith("text"):
            got = {k: v for k, v in got.items() if k in wanted}
        assert got.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.equal(got[key], tensor), f"{part}: {key}"


@pytest.mark.parametrize("family", FAMILIES)
def test_single_file_and_folder_make_the_same_picture(family, checkpoints, tmp_path):
    pictures = []
    for index, checkpoint in enumerate(checkpoints[family]):
        # 512 pixels are native to a file; here 64 are enough.
        small = Choices(defaults={"width": "64", "height": "64"})
        config = assemble(checkpoint, tmp_path / f"repository{index}", small)
        served = tmp_path / f"repository{index}"
        folder = tmp_path / f"parts{index}"
        folder.mkdir()
        (folder / "unet").symlink_to(served / "scheduler_model" / "1" / "unet")
        (folder / "vae").symlink_to(served / "vae_decoder" / "1" / "vae")
        for part in (served / "text_encoder" / "1").iterdir():
            (folder / part.name).symlink_to(part)
        with LocalPipeline.open(folder, config) as pipeline:
            asked = {"prompt": "a (red:1.3) circle", "negative_prompt": "blue", "seed": 3}
            pictures.append(pipeline.generate(**asked, steps=2, cfg=3.0).images)
    assert pictures[0].std() > 1
    # Kernels may round differently where weights lie at another alignment in their files.
    difference = np.abs(pictures[0].astype(int) - pictures[1])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.002


@pytest.mark.parametrize("family", FAMILIES)
def test_true_architecture_is_recognised_by_names_and_shapes(family):
    _, _, text = TRUE[family]
    with torch.device("meta"):
        unet, vae = networks(family, TRUE)
        encoders = [text_weights(c, has_projection=c["hidden_act"] == "gelu") for c in text]
    weights = single_file_keys(family, unet.state_dict(), vae.state_dict(), encoders)
    found = detect(weights, {})
    assert found.family == family
    for config, network in ((found.unet, unet), (found.vae, vae)):
        with torch.device("meta"):
            rebuilt = type(network).from_config(config)
        ignored = {"sample_size", "force_upcast", "_use_default_values", "_class_name"}
        wanted = {k: v for k, v in network.config.items() if k not in ignored}
        got = {k: v for k, v in rebuilt.config.items() if k not in ignored}
        assert normal(got) == normal(wanted)
    for config, wanted in zip((found.text_encoder, found.text_encoder_2), text, strict=False):
        assert {key: config[key] for key in wanted} == wanted
    parts = convert(found, weights)
    assert parts["unet"].keys() == unet.state_dict().keys()
    assert parts["vae"].keys() == vae.state_dict().keys()
    for part, encoder in zip(TEXT_FOLDERS, encoders, strict=False):
        shapes = {key: tensor.shape for key, tensor in parts[part].items()}
        assert shapes == {key: tensor.shape for key, tensor in encoder.items()}
    native = {"sd1": 64, "sd2": 64, "sdxl": 128}[family]
    assert (found.unet["sample_size"], found.vae["sample_size"]) == (native, native * 8)


def normal(config):
    """Diffusers' spellings of one thing: tuples or lists; one number or one for every level."""
    levels = len(config["block_out_channels"])

    def plain(key, value):
        if isinstance(value, (list, tuple)):
            return [list(v) if isinstance(v, tuple) else v for v in value]
        return [value] * levels if key == "transformer_layers_per_block" else value

    return {key: plain(key, value) for key, value in config.items()}


@pytest.mark.parametrize(
    ("family", "extra", "metadata", "prediction", "zero_snr", "native"),
    [
        ("sd1", {}, {}, "epsilon", False, 512),
        ("sdxl", {}, {}, "epsilon", False, 1024),
        ("sdxl", {"v_pred": torch.empty(0)}, {}, "v_prediction", False, 1024),
        (
            "sdxl",
            {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)},
            {},
            "v_prediction",
            True,
            1024,
        ),
        ("sdxl", {}, {"modelspec.prediction_type": "v"}, "v_prediction", False, 1024),
        ("sdxl", {}, {"modelspec.predict_key": "epsilon"}, "epsilon", False, 1024),
        ("sdxl", {}, {"modelspec.resolution": "512x512"}, "epsilon", False, 512),
        ("sd1", {}, {"modelspec.prediction_type": "v"}, "v_prediction", False, 512),
        ("sd2", {V_BIAS: torch.zeros(64)}, {}, "epsilon", False, 512),
        ("sd2", {V_BIAS: torch.linspace(-1, 1, 64)}, {}, "v_prediction", False, 768),
    ],
)
def test_prediction_type_and_size(
    checkpoints, family, extra, metadata, prediction, zero_snr, native
):
    weights, _ = read_weights(checkpoints[family][1])
    found = detect(weights | extra, metadata)
    assert found.scheduler["prediction_type"] == prediction
    assert found.scheduler["rescale_betas_zero_snr"] is zero_snr
    assert found.unet["sample_size"] * 8 == native


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_of_the_weights_is_kept(checkpoints, tmp_path, dtype):
    weights, _ = read_weights(checkpoints["sd1"][1])
    half = {key: tensor.to(dtype) for key, tensor in weights.items()}
    save_file(half, tmp_path / "half.safetensors")
    said = convert_single_file(tmp_path / "half.safetensors", tmp_path / "out", nothing)
    assert said.endswith(str(dtype).removeprefix("torch."))
    unet = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in unet.values()} == {dtype}


def without(prefix):
    return lambda weights: {k: v for k, v in weights.items() if not k.startswith(prefix)}


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
REFUSED = [
    ("sd1", without("first_stage_model."), r"it has no VAE \(keys first_stage_model\.\*\)"),
    ("sd1", without("cond_stage_model."), "it has no CLIP-L text encoder"),
    ("sdxl", without("conditioner.embedders.1."), "it has no CLIP-G text encoder"),
    ("sd1", without("model.diffusion_model."), "it holds no Stable Diffusion UNet"),
    (
        "sd1",
        without("model.diffusion_model.out.2.bias"),
        "its UNet lacks 1 weights, first conv_out",
    ),
    (
        "sd1",
        without("model.diffusion_model.middle_block.0.in_layers.0.weight"),
        "lacks 1 weights, first mid_block.resnets.0.norm1.weight",
    ),
    ("sd1", lambda w: w | {FIRST: torch.zeros(32, 9, 3, 3)}, "it is an inpainting checkpoint"),
    ("sdxl", lambda w: w | {"edm_mean": torch.zeros(1)}, "trained with EDM noise levels"),
    (
        "sdxl",
        without("model.diffusion_model.middle_block.1.transformer_blocks.2"),
        "its UNet has uneven blocks",
    ),
    ("sd1", lambda w: {"lora_unet_x.lora_up.weight": torch.zeros(1)}, "it holds a LoRA"),
    (
        "sd1",
        lambda w: w | {"model.diffusion_model.time_embed.0.bias": torch.zeros(7)},
        r"its UNet has time_embedding\.linear_1\.bias of shape \[7\], needed \[128\]",
    ),
    (
        "sd1",
        lambda w: {k: v.to(torch.float8_e4m3fn) for k, v in w.items()},
        "is float8_e4m3fn, allowed are fp32, fp16 and bf16",
    ),
]


@pytest.mark.parametrize(("family", "change", "message"), REFUSED, ids=[r[2][:30] for r in REFUSED])
def test_what_cannot_be_served_gets_one_line(checkpoints, tmp_path, family, change, message):
    weights, _ = read_weights(checkpoints[family][1])
    changed = {key: tensor.contiguous() for key, tensor in change(dict(weights)).items()}
    save_file(changed, tmp_path / "odd.safetensors")
    with pytest.raises(SetupError, match=message) as caught:
        assemble(tmp_path / "odd.safetensors", tmp_path / "repository")
    assert "\n" not in str(caught.value)
    assert "odd.safetensors" in str(caught.value)
    assert not list((tmp_path / "repository").iterdir())
    assert not list(tmp_path.glob(".assemble-*"))


def test_lcms_guidance_embedding_is_left_out_as_in_comfyui(checkpoints):
    weights, _ = read_weights(checkpoints["sd1"][1])
    extra = {"model.diffusion_model.time_embed.cond_proj.weight": torch.zeros(32, 256)}
    found = detect(weights | extra, {})
    assert convert(found, weights | extra)["unet"].keys() == convert(found, weights)["unet"].keys()


def test_sgm_names_of_sd2(checkpoints):
    weights, _ = read_weights(checkpoints["sd2"][1])
    renamed = {
        k.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): v
        for k, v in weights.items()
    }
    assert detect(renamed, {}).family == "sd2"
    assert len(convert(detect(renamed, {}), renamed)["text_encoder"]) == len(
        convert(detect(weights, {}), weights)["text_encoder"]
    )


def test_sd2_folders_without_their_last_layer_encode_the_same(checkpoints, tmp_path):
    """diffusers leaves out the layer that is not used; ComfyUI counts clip skip as if it were."""
    folder = shutil.copytree(checkpoints["sd2"][0], tmp_path / "sd2")
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    assert config["num_hidden_layers"] == 24
    path.write_text(json.dumps(config | {"num_hidden_layers": 23}))
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    kept = {key: tensor for key, tensor in weights.items() if ".layers.23." not in key}
    save_file(kept, folder / "text_encoder" / "model.safetensors")
    whole = PromptEncoder.from_folder(checkpoints["sd2"][0])
    cut = PromptEncoder.from_folder(folder)
    for clip_skip in (None, -2, -5):
        got = cut.encode("a (red:1.2) cat", clip_skip=clip_skip)["prompt_embeds"]
        assert torch.equal(
            got, whole.encode("a (red:1.2) cat", clip_skip=clip_skip)["prompt_embeds"]
        )


class TestFolders:
    """Diffusers folders as they are downloaded: variants, shards, other formats beside them."""

    @pytest.fixture
    def folder(self, checkpoints, tmp_path):
        shutil.copytree(checkpoints["sd1"][0], tmp_path / "sd1")
        return tmp_path / "sd1"

    def digest(self, folder, out):
        return assemble(folder, out / "repository").checkpoint.digest

    def test_a_variant_stands_in_for_the_plain_weights(self, folder, tmp_path):
        plain = folder / "unet" / "diffusion_pytorch_model.safetensors"
        wanted = load_file(plain)
        plain.rename(plain.with_suffix(".fp16.safetensors"))
        (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
        assemble(folder, tmp_path / "repository")
        unet = tmp_path / "repository" / "scheduler_model" / "1" / "unet"
        assert {path.name for path in unet.iterdir()} == {"config.json", plain.name}
        assert load_file(unet / plain.name).keys() == wanted.keys()

    def test_shards_are_served(self, folder, tmp_path):
        unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        unet.save_pretrained(folder / "unet", max_shard_size="2MB")
        assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
        config = assemble(folder, tmp_path / "repository")
        served = tmp_path / "repository" / "scheduler_model" / "1" / "unet"
        again = UNet2DConditionModel.from_pretrained(served)
        for key, tensor in unet.state_dict().items():
            assert torch.equal(again.state_dict()[key], tensor)
        assert config.checkpoint.digest
        next(served.parent.parent.parent.parent.glob("sd1/unet/*-00001-of-*")).unlink()
        with pytest.raises(SetupError, match=r"-00001-of-.* is missing"):
            assemble(folder, tmp_path / "repository")

    def test_only_pickled_weights_are_refused(self, folder, tmp_path):
        plain = folder / "vae" / "diffusion_pytorch_model.safetensors"
        plain.rename(plain.with_suffix(".bin"))
        with pytest.raises(SetupError, match=r"vae holds no diffusion_pytorch_model.safetensors"):
            assemble(folder, tmp_path / "repository")

    @pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
    def test_a_truncated_file_is_named(self, folder, tmp_path, part):
        ((path, _),) = weight_files(folder / part)
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(SetupError, match=rf"{part}/\w+\.safetensors .* truncated or damaged"):
            assemble(folder, tmp_path / "repository")
        assert not list((tmp_path / "repository").iterdir())

    @pytest.mark.parametrize("part", ["text_encoder", "vae", "unet"])
    def test_a_missing_part_is_named(self, folder, tmp_path, part):
        shutil.rmtree(folder / part)
        with pytest.raises(SetupError, match=rf"{part}"):
            assemble(folder, tmp_path / "repository")

    def test_an_inpainting_unet_is_refused(self, folder, tmp_path):
        path = folder / "unet" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": 9}))
        with pytest.raises(SetupError, match=r"in_channels=9, allowed 4"):
            assemble(folder, tmp_path / "repository")

    def test_lcms_scheduler_gives_few_step_defaults(self, folder):
        path = folder / "scheduler" / "scheduler_config.json"
        assert read_defaults(folder).steps == 20
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "LCMScheduler"}))
        defaults = read_defaults(folder)
        assert (defaults.steps, defaults.cfg, defaults.sampler_name) == (4, 1.0, "lcm")


def test_chosen_defaults_and_sizes(checkpoints, tmp_path):
    chosen = {"steps": "4", "cfg": "1", "sampler_name": "lcm", "scheduler": "sgm_uniform"}
    choices = Choices(limits=Limits(max_size_px=0), defaults=chosen)
    config = assemble(checkpoints["sdxl"][1], tmp_path / "repository", choices)
    assert (config.defaults.width, config.defaults.steps, config.defaults.cfg) == (1024, 4, 1.0)
    assert (config.defaults.sampler_name, config.defaults.scheduler) == ("lcm", "sgm_uniform")
    assert config.limits.max_size_px == 1536
    for wrong, message in (
        ({"step": "4"}, "default 'step' is unknown, allowed: width"),
        ({"steps": "four"}, "default steps=four needs int"),
        ({"sampler_name": "eular"}, "default sampler_name=eular is unknown, allowed: euler"),
    ):
        with pytest.raises(SetupError, match=message):
            assemble(checkpoints["sdxl"][1], tmp_path / "other", Choices(defaults=wrong))


def test_written_files_are_read_by_safetensors(tmp_path):
    tensors = {
        "a": torch.randn(3, 5).T,
        "b": torch.randn(2, 2).half(),
        "c": torch.randn(7).bfloat16(),
        "d": torch.zeros(0, 3),
        "e": torch.tensor(5),
    }
    done = []
    write_weights(tmp_path / "x.safetensors", tensors, done.append)
    again = load_file(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype
    assert sum(done) == sum(t.numel() * t.element_size() for t in tensors.values())


def test_other_formats_and_missing_files_are_refused(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    with pytest.raises(SetupError, match=r"model.ckpt is no .safetensors file; other formats can"):
        assemble(tmp_path / "model.ckpt", tmp_path / "repository")
    with pytest.raises(SetupError, match="nowhere is missing"):
        assemble(tmp_path / "nowhere", tmp_path / "repository")
