"""TensorRT on a machine without a GPU: parsing, profiles and building with TensorRT for RTX.

Running a plan needs a GPU and is not tested here. Tests that put something in the place of a GPU or
of the full TensorRT say so in their names.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from fullpipe import assemble as assembling
from fullpipe.assemble import Choices, assemble
from fullpipe.config import Limits, LoopSettings, PipelineConfig
from fullpipe.engines import building, onnx_export, tensorrt_build, tensorrt_library
from fullpipe.engines.artifact import Artifact
from fullpipe.engines.loading import load_unet
from fullpipe.engines.tensorrt_engine import choose_profile
from fullpipe.engines.tensorrt_library import Library, library
from fullpipe.errors import InvalidRequest, SetupError

from .reduced import build

TENSORRT = LoopSettings(
    device="cuda",
    engine="tensorrt",
    precision="fp16",
    sizes=[[512, 512], [768, 512]],
    buckets=[1, 2, 4],
)
OPEN = -1


@pytest.fixture(scope="module")
def parsed(tmp_path_factory):
    """{(family, network): (config, TensorRT's builder, network, parser)} of small fp16 exports."""
    root = tmp_path_factory.mktemp("tensorrt")
    found = {}
    for family in ("sd1", "sdxl"):
        folder = build(family, root / family)
        config = assemble(folder, root / f"{family}-repository")
        config = dataclasses.replace(config, loop=TENSORRT)
        vae_dtype = torch.bfloat16 if family == "sdxl" else torch.float16
        paths = {name: root / f"{family}-{name}.onnx" for name in NETWORKS}
        onnx_export.export_unet(folder / "unet", paths["unet"], torch.float16)
        onnx_export.export_vae_decoder(folder / "vae", paths["vae_decoder"], vae_dtype)
        onnx_export.export_vae_encoder(folder / "vae", paths["vae_encoder"], vae_dtype)
        onnx_export.export_clip(folder / "text_encoder", paths["clip"])
        for name, path in paths.items():
            found[family, name] = (config, path, *tensorrt_build.parse(library(), path, []))
    return found


NETWORKS = ("unet", "vae_decoder", "vae_encoder", "clip")
WANTED = {
    ("sd1", "unet"): (
        {
            "sample": ("TYPE_FP32", [OPEN, 4, OPEN, OPEN]),
            "timestep": ("TYPE_INT64", [OPEN]),
            "encoder_hidden_states": ("TYPE_FP32", [OPEN, OPEN, 64]),
        },
        {"noise_pred": ("TYPE_FP32", [OPEN, 4, OPEN, OPEN])},
    ),
    ("sdxl", "unet"): (
        {
            "sample": ("TYPE_FP32", [OPEN, 4, OPEN, OPEN]),
            "timestep": ("TYPE_INT64", [OPEN]),
            "encoder_hidden_states": ("TYPE_FP32", [OPEN, OPEN, 192]),
            "text_embeds": ("TYPE_FP32", [OPEN, 128]),
            "time_ids": ("TYPE_FP32", [OPEN, 6]),
        },
        {"noise_pred": ("TYPE_FP32", [OPEN, 4, OPEN, OPEN])},
    ),
    **{
        (family, "vae_decoder"): (
            {"latents": ("TYPE_FP32", [OPEN, 4, OPEN, OPEN])},
            {"images": ("TYPE_UINT8", [OPEN, OPEN, OPEN, 3])},
        )
        for family in ("sd1", "sdxl")
    },
    **{
        (family, "vae_encoder"): (
            {"images": ("TYPE_UINT8", [OPEN, OPEN, OPEN, 3])},
            {"latents": ("TYPE_FP32", [OPEN, 4, OPEN, OPEN])},
        )
        for family in ("sd1", "sdxl")
    },
    **{
        (family, "clip"): (
            {"inputs_embeds": ("TYPE_FP32", [OPEN, 77, 64])},
            {
                "last_hidden_state": ("TYPE_FP32", [OPEN, 77, 64]),
                "hidden_states": ("TYPE_FP32", [3, OPEN, 77, 64]),
            },
        )
        for family in ("sd1", "sdxl")
    },
}


@pytest.mark.parametrize(("family", "name"), WANTED, ids=lambda part: part)
def test_parsed_network_has_the_tensors_of_the_stage(parsed, family, name):
    _, _, _, network, _ = parsed[family, name]
    described = tensorrt_build.describe(library(), network)
    for kind, wanted in zip(("inputs", "outputs"), WANTED[family, name], strict=True):
        got = {t["name"]: (t["data_type"], t["dims"]) for t in described[kind]}
        assert got == wanted


@pytest.mark.parametrize(
    ("family", "name", "wanted"),
    [("sd1", "unet", "HALF"), ("sdxl", "vae_decoder", "BF16"), ("sd1", "clip", "FLOAT")],
)
def test_types_inside_are_those_of_the_export(parsed, family, name, wanted):
    trt = library().module
    _, _, _, network, _ = parsed[family, name]
    assert network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    heavy = (trt.LayerType.CONVOLUTION, trt.LayerType.MATRIX_MULTIPLY)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    types = {layer.get_output(0).dtype for layer in layers if layer.type in heavy}
    assert types == {getattr(trt.DataType, wanted)}


def test_profiles_cover_every_row_count_size_and_prompt(parsed):
    config = parsed["sdxl", "unet"][0]
    found = tensorrt_build.profiles("unet", config)
    rows = [profile["sample"][0] for profile in found]
    assert [(r.low, r.best, r.high) for r in rows] == [(1, 1, 1), (2, 2, 2), (3, 4, 4)]
    for profile, r in zip(found, rows, strict=True):
        assert {dims[0] for dims in profile.values()} == {r}
        _, channels, height, width = profile["sample"]
        assert channels is None
        assert (height.low, height.best, height.high) == (64, 64, 64)
        assert (width.low, width.best, width.high) == (64, 64, 96)
        assert profile["encoder_hidden_states"][1].high == 308
    (encoder,) = tensorrt_build.profiles("vae_encoder", config)
    assert (encoder["images"][2].low, encoder["images"][2].high) == (512, 768)


@pytest.mark.parametrize(("family", "name"), WANTED, ids=lambda part: part)
def test_plan_is_built_without_a_gpu(parsed, tmp_path, family, name):
    config, path, *_ = parsed[family, name]
    # A profile multiplies the time of a build; the repository below has two.
    config = dataclasses.replace(config, loop=dataclasses.replace(TENSORRT, buckets=[2]))
    tensorrt_build.build_plan(path, tmp_path / f"{name}.plan", name, config)
    weights = path.with_name(f"{path.name}.data").stat().st_size
    assert (tmp_path / f"{name}.plan").stat().st_size > 0.9 * weights
    described = json.loads((tmp_path / f"{name}.json").read_text())
    assert {t["name"] for t in described["inputs"]} == WANTED[family, name][0].keys()


def test_profile_that_does_not_fit_is_refused(parsed):
    config, _, builder, network, _ = parsed["sdxl", "unet"]
    configuration = builder.create_builder_config()
    wrong = dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, is_sdxl=False)
    )
    (profile, *_) = tensorrt_build.profiles("unet", wrong)
    with pytest.raises(SetupError, match=r"the network takes \['encoder.*its profile has"):
        tensorrt_build.add_profile(builder, network, configuration, profile, [])
    # Smallest above largest: the builder's own check.
    (profile, *_) = tensorrt_build.profiles("unet", config)
    profile["timestep"] = [tensorrt_build.Range(4, 4, 1)]
    errors: list[str] = []
    with pytest.raises(SetupError, match="TensorRT refused"):
        tensorrt_build.add_profile(builder, network, configuration, profile, errors)


def test_file_that_is_no_onnx_is_refused(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x07nonsense")
    with pytest.raises(SetupError, match=r"TensorRT cannot read broken\.onnx: ") as caught:
        tensorrt_build.parse(library(), tmp_path / "broken.onnx", [])
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def repository(checkpoint, tmp_path_factory):
    """The demo checkpoint with plans for 128 and 256 pixels."""
    out = tmp_path_factory.mktemp("plans") / "repository"
    loop = dataclasses.replace(TENSORRT, sizes=[[256, 256], [128, 128]], buckets=[2, 4])
    assemble(checkpoint, out, Choices(loop=loop))
    return out


def test_repository_has_a_plan_and_a_record_for_every_network(repository):
    for folder, plan in (
        ("scheduler_model/1/unet", "unet.plan"),
        ("vae_decoder/1/vae", "vae_decoder.plan"),
        ("vae_encoder/1/vae", "vae_encoder.plan"),
        ("text_encoder/1/text_encoder", "clip.plan"),
    ):
        record = Artifact.load(repository / folder)
        assert record.files[plan] == (repository / folder / plan).stat().st_size
        assert record.key.libraries == {"tensorrt_rtx": library().module.__version__}
        assert record.key.gpu == "any", "plans of TensorRT for RTX are not made for one GPU"
        assert record.key.sizes == [[256, 256], [128, 128]]
        assert not list((repository / folder).glob("*.onnx*"))
    config = PipelineConfig.load(repository / "scheduler_model" / "1" / "pipeline.json")
    assert (config.limits.min_size_px, config.limits.max_size_px) == (128, 256)
    assert config.limits.max_prompt_tokens == tensorrt_build.MAX_TOKENS
    assert (config.defaults.width, config.defaults.height) == (256, 256)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what a machine without a GPU says")
def test_loading_without_a_gpu_is_refused_in_one_line(repository):
    folder = repository / "scheduler_model" / "1"
    config = PipelineConfig.load(folder / "pipeline.json")
    with pytest.raises(SetupError, match=r"engine=tensorrt needs an NVIDIA GPU, device=cuda"):
        load_unet(folder / "unet", config, "cuda")


def test_plans_of_another_version_are_refused(repository, monkeypatch):
    folder = repository / "scheduler_model" / "1"
    config = PipelineConfig.load(folder / "pipeline.json")
    monkeypatch.setattr(Library, "versions", {"tensorrt_rtx": "9.9"})
    message = r"libraries tensorrt_rtx=[\d.]+, needed tensorrt_rtx=9.9; rebuild it with: fullpipe"
    with pytest.raises(SetupError, match=message):
        load_unet(folder / "unet", config, "cuda")


@pytest.mark.parametrize(("capability", "is_refused"), [((9, 0), True), ((8, 9), False)])
def test_rtx_refuses_other_gpus_with_a_fake_gpu(monkeypatch, capability, is_refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if not is_refused:
        library().require_gpu("cuda")
        return
    message = r"does not run on compute capability 9\.0, allowed 8\.0.*; use --engine compiled"
    with pytest.raises(SetupError, match=message):
        library().require_gpu("cuda")


class TestNativePlans:
    """The variant for the TensorRT backend of NVIDIA's container."""

    def test_rtx_cannot_make_it(self, checkpoint, tmp_path):
        loop = dataclasses.replace(TENSORRT, unet="plan")
        with pytest.raises(SetupError, match=r"unet=plan needs the full TensorRT of NVIDIA's"):
            assemble(checkpoint, tmp_path / "repository", Choices(loop=loop))
        with pytest.raises(SetupError, match=r"unet=plan needs engine=tensorrt, got engine=torch"):
            assemble(checkpoint, tmp_path / "repository", Choices(loop=LoopSettings(unet="plan")))

    def test_repository_with_rtx_taken_for_the_full_library(
        self, checkpoint, tmp_path, monkeypatch
    ):
        pretended = Library(library().module, "tensorrt")
        for module in (assembling, tensorrt_build, tensorrt_library):
            monkeypatch.setattr(module, "library", lambda: pretended)
        monkeypatch.setattr(tensorrt_build, "_timing_cache", lambda *_: None)
        monkeypatch.setattr(building, "engine_key", building_key)
        loop = dataclasses.replace(
            TENSORRT, unet="plan", sizes=[[128, 128]], buckets=[1, 2], precision="fp32"
        )
        out = tmp_path / "repository"
        assemble(checkpoint, out, Choices(loop=loop, limits=Limits(max_batch_size=3)))
        wanted = {
            "unet": ({"sample", "timestep", "encoder_hidden_states"}, {"noise_pred"}, ["0", "1"]),
            "vae_decoder": ({"latents"}, {"images"}, ["0"]),
            "vae_encoder": ({"images"}, {"latents"}, ["0"]),
        }
        for model, (inputs, outputs, profiles) in wanted.items():
            assert {p.name for p in (out / model / "1").iterdir()} == {"model.plan"}
            text = (out / model / "config.pbtxt").read_text()
            config = text_format.Parse(text, model_config_pb2.ModelConfig())
            assert (config.name, config.platform) == (model, "tensorrt_plan")
            assert config.max_batch_size == 0
            assert {tensor.name for tensor in config.input} == inputs
            assert {tensor.name for tensor in config.output} == outputs
            assert list(config.instance_group[0].profile) == profiles
        pipeline = PipelineConfig.load(out / "scheduler_model" / "1" / "pipeline.json")
        # 256, the native size, is not built.
        assert (pipeline.defaults.width, pipeline.defaults.height) == (128, 128)
        decoder = text_format.Parse(
            (out / "vae_decoder" / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()
        )
        assert decoder.output[0].data_type == model_config_pb2.TYPE_UINT8
        assert list(decoder.output[0].dims) == [-1, -1, -1, 3]
        assert not (out / "scheduler_model" / "1" / "unet").exists()
        assert (out / "text_encoder" / "1" / "text_encoder" / "clip.plan").is_file()


def building_key(config):
    """A key of a GPU that is not here."""
    from fullpipe.engines.artifact import Key

    loop = config.loop
    return Key("tensorrt", "digest", loop.precision, loop.sizes, loop.buckets, "sm_90", {})


RANGES = [
    {"sample": ((1, 4, 32, 32), (1, 4, 64, 64)), "timestep": ((1,), (1,))},
    {"sample": ((2, 4, 32, 32), (4, 4, 64, 64)), "timestep": ((2,), (4,))},
]


@pytest.mark.parametrize(("rows", "side", "profile"), [(1, 64, 0), (2, 32, 1), (4, 48, 1)])
def test_profile_of_a_call(rows, side, profile):
    shapes = {"sample": (rows, 4, side, side), "timestep": (rows,)}
    assert choose_profile(RANGES, shapes) == profile


@pytest.mark.parametrize(
    ("sample", "timestep", "message"),
    [
        (
            (1, 4, 128, 64),
            (1,),
            r"sample has shape \[1, 4, 128, 64\], the engine was built for"
            r" \[1, 4, 32, 32\] … \[4, 4, 64, 64\]",
        ),
        ((5, 4, 64, 64), (5,), r"sample has shape \[5, 4, 64, 64\]"),
        ((1, 4, 64, 64), (2,), "no profile of the engine holds"),
    ],
)
def test_call_outside_of_every_profile_gets_one_line(sample, timestep, message):
    with pytest.raises(InvalidRequest, match=message):
        choose_profile(RANGES, {"sample": sample, "timestep": timestep})
