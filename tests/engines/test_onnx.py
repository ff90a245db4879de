"""ONNX exports through ONNX Runtime against the same networks in fp32 torch.

Random networks of the SD1 and SDXL layouts, fresh random inputs at sizes that were not traced,
outputs poisoned beforehand. Stated tolerances: 1e-4 in fp32, 1e-2 in fp16; one level of a pixel, in
fp16 on a GPU 1e-2, where ONNX Runtime's CPU computes in fp32 between the layers.
`FULLPIPE_TEST_DEVICE=cuda` runs them on a GPU, with onnxruntime-gpu; references stay on the CPU.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import onnxruntime
import pytest
import torch

from fullpipe.assemble import Choices, assemble
from fullpipe.config import LoopSettings
from fullpipe.engines import onnx_export
from fullpipe.engines.loading import (
    load_clip,
    load_unet,
    load_vae_decoder,
    load_vae_encoder,
    torch_dtype,
)
from fullpipe.engines.network import (
    NetworkClip,
    NetworkUNet,
    NetworkVaeDecoder,
    NetworkVaeEncoder,
)
from fullpipe.engines.onnx_engine import OnnxNetwork
from fullpipe.engines.torch_engine import TorchUNet
from fullpipe.errors import SetupError
from fullpipe.local import LocalPipeline
from fullpipe.stages import VaeDecoder, VaeEncoder
from fullpipe.text import PromptEncoder

from ..conftest import DEVICE
from .reduced import SMALL, build

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="needs onnxruntime-gpu",
)
FAMILIES = ("sd1", "sdxl")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A diffusers folder per family, and room for exports beside the weights."""
    root = tmp_path_factory.mktemp("onnx")
    return {family: build(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def unet_file(folders):
    @functools.cache
    def export(family, dtype):
        path = folders[family] / f"unet-{str(dtype)[6:]}.onnx"
        onnx_export.export_unet(folders[family] / "unet", path, dtype)
        return path

    return export


def unet_inputs(family, rows, height, width, tokens):
    """Fresh random inputs of a family's UNet."""
    width_of_text = SMALL[family][0]["cross_attention_dim"]
    inputs = {
        "sample": torch.randn(rows, 4, height, width),
        "timestep": torch.randint(0, 1000, (rows,)),
        "encoder_hidden_states": torch.randn(rows, tokens, width_of_text),
    }
    if family == "sdxl":
        sizes = [8.0 * height, 8.0 * width, 0.0, 0.0, 8.0 * height, 8.0 * width]
        inputs |= {"text_embeds": torch.randn(rows, 128), "time_ids": torch.tensor([sizes] * rows)}
    return inputs


def on_device(inputs):
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def relative_error(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


class Poisoned:
    """A network whose outputs start as garbage, so that what it leaves out is seen."""

    def __init__(self, network):
        self.network = network

    def run(self, inputs, outputs):
        for tensor in outputs.values():
            tensor.fill_(137 if tensor.dtype == torch.uint8 else float("nan"))
        self.network.run(inputs, outputs)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_unet(folders, unet_file, family, dtype):
    engine = NetworkUNet(Poisoned(OnnxNetwork(unet_file(family, dtype), DEVICE)))
    reference = TorchUNet(folders[family] / "unet")
    # In 8×8 the deepest norms are of two numbers; eager torch in fp16 is 2e-2 off there, too.
    smallest = (1, 16, 8, 77) if dtype == torch.float16 else (1, 8, 8, 77)
    for rows, height, width, tokens in [smallest, (3, 16, 12, 154), (2, 9, 13, 77)]:
        inputs = unet_inputs(family, rows, height, width, tokens)
        wanted = reference.run(inputs)["noise_pred"]
        got = engine.run(on_device(inputs))["noise_pred"].cpu()
        assert got.shape == wanted.shape and got.dtype == torch.float32
        assert relative_error(got, wanted) <= TOLERANCE[dtype]


def test_rows_of_a_call_do_not_touch_each_other(unet_file):
    engine = NetworkUNet(OnnxNetwork(unet_file("sd1", torch.float32), DEVICE))
    inputs = on_device(unet_inputs("sd1", 3, 8, 8, 77))
    alone = [engine.run({k: v[i : i + 1] for k, v in inputs.items()})["noise_pred"] for i in (0, 2)]
    inputs["sample"][1] = float("nan")
    together = engine.run(inputs)["noise_pred"]
    assert together[1].isnan().all()
    for row, single in zip((0, 2), alone, strict=True):
        # A GPU takes other kernels for three rows than for one.
        assert relative_error(together[row], single[0]) < (1e-5 if DEVICE == "cpu" else 1e-4)


def test_bindings_are_the_contract_of_the_unet_stage(unet_file):
    session = onnxruntime.InferenceSession(str(unet_file("sdxl", torch.float16)))
    got = {tensor.name: (tensor.type, tensor.shape) for tensor in session.get_inputs()}
    assert got == {
        "sample": ("tensor(float)", ["rows", 4, "height", "width"]),
        "timestep": ("tensor(int64)", ["rows"]),
        "encoder_hidden_states": ("tensor(float)", ["rows", "tokens", 192]),
        "text_embeds": ("tensor(float)", ["rows", 128]),
        "time_ids": ("tensor(float)", ["rows", 6]),
    }
    (output,) = session.get_outputs()
    assert (output.name, output.type) == ("noise_pred", "tensor(float)")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16"])
def test_vae(folders, tmp_path, dtype):
    vae = folders["sd1"] / "vae"
    onnx_export.export_vae_decoder(vae, tmp_path / "decoder.onnx", dtype)
    onnx_export.export_vae_encoder(vae, tmp_path / "encoder.onnx", dtype)
    decoder, encoder = (
        Poisoned(OnnxNetwork(tmp_path / f"{name}.onnx", DEVICE)) for name in ("decoder", "encoder")
    )
    for shape in [(2, 4, 8, 8), (1, 4, 5, 11)]:
        latents = torch.randn(shape) * 3
        got = NetworkVaeDecoder(decoder, DEVICE, 8).decode(latents)
        wanted = VaeDecoder(vae).decode(latents)
        difference = (got.int() - wanted.int()).abs()
        assert got.dtype == torch.uint8 and wanted.float().std() > 1
        if dtype == torch.float32 or DEVICE == "cpu":
            assert difference.max() <= 1
        assert relative_error(got.float(), wanted.float()) <= TOLERANCE[torch.float16]
        pixels = torch.randint(0, 256, wanted.shape, dtype=torch.uint8)
        coded = NetworkVaeEncoder(encoder, DEVICE, 8, 4).encode(pixels)
        assert relative_error(coded, VaeEncoder(vae).encode(pixels)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("family", FAMILIES)
def test_text_encoders(folders, tmp_path, family):
    def execute(folder, model):
        path = tmp_path / f"{folder.name}.onnx"
        onnx_export.export_clip(folder, path)
        return NetworkClip(model, Poisoned(OnnxNetwork(path, DEVICE)))

    reference = PromptEncoder.from_folder(folders[family])
    encoder = PromptEncoder.from_folder(folders[family], device=DEVICE, execute=execute)
    long = "a (red:1.3) circle on a white background, " * 12
    for prompt, clip_skip in [("a cat", None), (long, None), ("(a:0.5) b", -1), (long, -3)]:
        got = encoder.encode(prompt, "blurry", clip_skip)
        wanted = reference.encode(prompt, "blurry", clip_skip)
        for name, tensor in wanted.items():
            assert got[name].shape == tensor.shape
            assert relative_error(got[name].cpu(), tensor) <= TOLERANCE[torch.float32], name


class OnnxStages:
    """The stages of an assembled repository, as `backends/diffusion` loads them."""

    def __init__(self, repository, config):
        text = repository / "text_encoder" / "1"
        self._text = PromptEncoder.from_folder(
            text,
            device=DEVICE,
            execute=lambda folder, model: load_clip(folder, model, config, DEVICE),
        )
        self._decoder = load_vae_decoder(repository / "vae_decoder" / "1" / "vae", config, DEVICE)
        self._encoder = load_vae_encoder(repository / "vae_encoder" / "1" / "vae", config, DEVICE)

    def encode_text(self, prompt, negative_prompt, clip_skip):
        return self._text.encode(prompt, negative_prompt, clip_skip)

    def encode_images(self, images):
        return self._encoder.encode(torch.from_numpy(images.copy()))

    def decode_latents(self, latents):
        return self._decoder.decode(latents).numpy()


@pytest.mark.parametrize(("precision", "worst"), [("fp32", 1), ("fp16", 8)])
def test_whole_sdxl_pipeline(folders, tmp_path, precision, worst):
    loop = LoopSettings(device=DEVICE, engine="onnx", precision=precision, unet="bls")
    config = assemble(folders["sdxl"], tmp_path / "repository", Choices(loop=loop))
    unet = load_unet(tmp_path / "repository" / "unet" / "1" / "unet", config, DEVICE)
    stages = OnnxStages(tmp_path / "repository", config)
    asked = {"negative_prompt": "blue", "seed": 3, "cfg": 3.0, "steps": 3}
    plain = dataclasses.replace(config, loop=LoopSettings())
    with (
        LocalPipeline(config, [unet], stages) as pipeline,
        LocalPipeline.open(folders["sdxl"], plain) as reference,
    ):
        got = pipeline.generate(prompt="a (red:1.3) circle", **asked)
        wanted = reference.generate(prompt="a (red:1.3) circle", **asked)
        again = {"init_image": wanted.images, "denoise": 0.5}
        got_again = pipeline.generate(prompt="a cat", **asked, **again)
        wanted_again = reference.generate(prompt="a cat", **asked, **again)
    for ours, theirs in ((got, wanted), (got_again, wanted_again)):
        assert theirs.images.std() > 1
        assert np.abs(ours.images.astype(int) - theirs.images).max() <= worst
        assert (
            relative_error(ours.latents.cpu(), theirs.latents)
            <= 2 * TOLERANCE[torch_dtype(precision)]
        )


def test_a_damaged_file_gets_one_line(unet_file, tmp_path):
    (tmp_path / "cut.onnx").write_bytes(unet_file("sd1", torch.float32).read_bytes()[:-100])
    with pytest.raises(SetupError, match=r"cut.onnx cannot be loaded by ONNX Runtime \(") as caught:
        OnnxNetwork(tmp_path / "cut.onnx", DEVICE)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs an onnxruntime without CUDA")
def test_a_missing_device_gets_one_line(unet_file):
    with pytest.raises(SetupError, match=r"device=cuda needs ONNX Runtime's CUDAExecutionProvider"):
        OnnxNetwork(unet_file("sd1", torch.float32), "cuda")
