"""The compiled engine, really compiled: for this machine's CPU, at a reduced SDXL architecture."""

from __future__ import annotations

import dataclasses
import os
import shutil

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from bench.fidelity import relative_errors
from fullpipe.assemble import Choices, assemble
from fullpipe.config import LoopSettings
from fullpipe.engines.ahead_of_time import check_package, compile_package
from fullpipe.engines.compiled_engine import CompiledUNet, Signature, unet_packages
from fullpipe.engines.compiled_vae import CompiledVaeDecoder, decoder_packages
from fullpipe.engines.loading import load_unet, load_vae_decoder, torch_dtype
from fullpipe.engines.package_cache import PackageCache
from fullpipe.engines.packages import Wanted, make_packages
from fullpipe.engines.torch_engine import TorchUNet
from fullpipe.errors import SetupError
from fullpipe.stages import VaeDecoder
from tests.engines import reduced

SETTINGS = LoopSettings(engine="compiled", sizes=[[64, 64]], buckets=[2])
NAME = "8x8-77-2.pt2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A UNet with every kind of part that SDXL's has, and its one package."""
    if shutil.which("g++") is None:
        pytest.fail("the compiled engine needs g++ to build")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
        norm_num_groups=8,
    )
    out = tmp_path_factory.mktemp("compiled") / "unet"
    unet.save_pretrained(out)
    lines: list[str] = []
    make_packages(unet_packages(out, SETTINGS), lines.append)
    assert lines[0] == "compiling 1 packages, 1 at a time"
    assert lines[1].startswith(f"1 of 1: {NAME}, ")
    return out


def inputs(rows: int, side: int = 8, tokens: int = 77) -> dict[str, torch.Tensor]:
    """Random ones, each time others."""
    return {
        "sample": torch.randn(rows, 4, side, side),
        "timestep": torch.randint(0, 1000, (rows,)),
        "encoder_hidden_states": torch.randn(rows, tokens, 32),
        "text_embeds": torch.randn(rows, 24),
        "time_ids": torch.rand(rows, 6) * 1024,
    }


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def test_it_computes_what_torch_does(folder):
    torch.manual_seed(1)
    compiled, eager = CompiledUNet.load(folder, SETTINGS), TorchUNet(folder)
    for _ in range(3):
        tensors = inputs(2)
        wanted = eager.run(tensors)["noise_pred"]
        assert relative_error(compiled.run(tensors)["noise_pred"], wanted) < 1e-5


def test_opening_packages_asks_for_no_compiler(folder, monkeypatch):
    def ask():
        raise AssertionError("a load tries out what this processor can, with a compiler")

    monkeypatch.setattr("torch._inductor.cpu_vec_isa.pick_vec_isa", ask)
    assert CompiledUNet.load(folder, SETTINGS).run(inputs(2))["noise_pred"].isfinite().all()


def test_what_was_not_built_is_computed_all_the_same(folder):
    torch.manual_seed(2)
    compiled, eager = CompiledUNet.load(folder, SETTINGS), TorchUNet(folder)
    assert compiled.row_counts(8, 8, 77) == (2,)
    for tensors in (inputs(3), inputs(2, side=16), inputs(2, tokens=154)):
        height, tokens = tensors["sample"].shape[2], tensors["encoder_hidden_states"].shape[1]
        if len(tensors["sample"]) == 2:
            assert compiled.row_counts(height, height, tokens) == ()
        wanted = eager.run(tensors)["noise_pred"]
        assert relative_error(compiled.run(tensors)["noise_pred"], wanted) < 1e-5


def test_changing_weights_in_place_changes_every_package(folder):
    """What an adapter needs: also the fused projections follow their parts."""
    torch.manual_seed(3)
    compiled = CompiledUNet.load(folder, SETTINGS)
    tensors = inputs(2)
    before = compiled.run(tensors)["noise_pred"].clone()
    names = dict(compiled.network.named_parameters())
    name = next(name for name in names if name.endswith("attn1.to_k.weight"))
    with torch.no_grad():
        names[name].add_(torch.randn_like(names[name]))
    after = compiled.run(tensors)["noise_pred"]
    assert relative_error(after, before) > 1e-3
    eager = compiled.network(*tensors.values())
    assert relative_error(after, eager) < 1e-5


def test_another_checkpoint_of_the_architecture_takes_the_same_package(folder, tmp_path):
    """Fresh weights are uniform in places (norms of ones, biases of zeros), which are no facts."""
    torch.manual_seed(4)
    unet = UNet2DConditionModel.from_pretrained(folder)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    other = tmp_path / "unet"
    unet.save_pretrained(other)
    lines: list[str] = []
    make_packages(unet_packages(other, SETTINGS), lines.append)
    assert lines == ["1 packages were compiled before"]
    compiled, eager = CompiledUNet.load(other, SETTINGS), TorchUNet(other)
    tensors = inputs(2)
    wanted = eager.run(tensors)["noise_pred"]
    assert relative_error(compiled.run(tensors)["noise_pred"], wanted) < 1e-5


def test_every_weight_stays_outside_of_the_package(folder):
    compiled = CompiledUNet.load(folder, SETTINGS)
    tensors = inputs(2)
    wanted = compiled.network(*tensors.values())
    with torch.no_grad():
        for parameter in compiled.network.parameters():
            parameter.fill_(torch.nan)
    assert compiled.run(tensors)["noise_pred"].isnan().all(), "computed with what it has inside"
    assert not wanted.isnan().any()


def test_broken_packages_are_refused_in_one_line(folder, tmp_path):
    broken = tmp_path / "unet"
    shutil.copytree(folder, broken)
    (broken / NAME).write_bytes((folder / NAME).read_bytes()[:5000])
    with pytest.raises(SetupError, match=r"8x8-77-2\.pt2 is no compiled package") as caught:
        CompiledUNet.load(broken, SETTINGS)
    assert "\n" not in str(caught.value)
    (broken / NAME).unlink()
    with pytest.raises(SetupError, match=r"lacks 8x8-77-2\.pt2; assemble it again"):
        CompiledUNet.load(broken, SETTINGS)
    more = dataclasses.replace(SETTINGS, buckets=[2, 4])
    with pytest.raises(SetupError, match=r"lacks 8x8-77-4\.pt2"):
        CompiledUNet.load(folder, more)


@pytest.fixture(scope="module", params=[("sd1", "fp16"), ("sdxl", "bf16")], ids=" ".join)
def assembled(request, tmp_path_factory):
    """The repository of a checkpoint with few layers, for two devices, and its configuration."""
    family, precision = request.param
    folder = tmp_path_factory.mktemp("assembled")
    dtype = torch_dtype(precision)
    checkpoint = reduced.build(family, folder / "checkpoint", dtype, sizes=reduced.LEAN)
    loop = LoopSettings(engine="compiled", device="cpu,cpu", precision=precision, buckets=[2])
    lines: list[str] = []
    config = assemble(checkpoint, folder / "repository", Choices(loop=loop), lines.append)
    assert lines[0] == "compiling 2 packages, 1 at a time", "not those of all networks at once"
    return folder / "repository", config


def test_an_assembled_pipeline_is_close_to_fp32(assembled):
    """Of the same weights: UNet, decoder and text encoders."""
    repository, config = assembled
    folder = repository / "scheduler_model" / "1" / "unet"
    errors = relative_errors(repository, load_unet(folder, config, "cpu"), config)
    assert len(errors) >= 5
    for name, error in errors.items():
        assert error < 1e-2, f"{name}: {error}"


def test_a_compiled_decoder_gives_the_same_pixels(checkpoint, config, tmp_path):
    """The demo's VAE at one size; another size is decoded all the same."""
    folder = tmp_path / "vae"
    shutil.copytree(checkpoint / "vae", folder)
    settings = dataclasses.replace(config.loop, engine="compiled", sizes=[[64, 64]], buckets=[2])
    chosen = dataclasses.replace(config, loop=settings)
    with pytest.raises(SetupError, match=r"lacks decoder-8x8\.pt2; assemble it again"):
        CompiledVaeDecoder(folder, chosen, "cpu", torch.float32)
    make_packages(decoder_packages(folder, chosen, torch.float32), lambda line: None)
    compiled = CompiledVaeDecoder(folder, chosen, "cpu", torch.float32)
    eager = VaeDecoder(folder)
    for side in (8, 12):
        latents = torch.randn(2, 4, side, side)
        levels = compiled.decode(latents).int() - eager.decode(latents).int()
        assert levels.abs().max() <= 1
        assert (levels == 0).float().mean() > 0.999


def test_an_assembled_decoder_takes_its_package(assembled):
    """At the size that it was compiled for, and not at another one."""
    repository, config = assembled
    folder, dtype = repository / "vae_decoder" / "1" / "vae", torch_dtype(config.loop.precision)
    compiled = load_vae_decoder(folder, config, "cpu")
    assert isinstance(compiled, CompiledVaeDecoder)
    eager = VaeDecoder(folder, dtype=dtype, is_packed=False)
    latents = torch.randn(2, 4, 8, 8)
    got, wanted = (decoder.decode(latents).float() for decoder in (compiled, eager))
    assert 0 < relative_error(got, wanted) < 1e-2, "more than another order of rounding"
    latents = torch.randn(2, 4, 12, 12)
    assert torch.equal(compiled.decode(latents), eager.decode(latents))


def run_out_of_memory():
    raise MemoryError


def end_the_process():
    os._exit(3)


def be_no_network():
    raise ValueError("first line\nsecond line")


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (run_out_of_memory, r"unet does not fit into the memory of cpu: its weights alone are "),
        (be_no_network, r"^new\.pt2 could not be compiled: first line$"),
        (end_the_process, r"^new\.pt2: the process that compiled and tried it with \S+g\+\+ ended"),
    ],
)
def test_a_build_that_fails_gets_one_line(folder, build, said):
    cache = PackageCache(folder / "config.json", "cpu", "fp32")
    wanted = Wanted(folder / "new.pt2", "cpu", cache, {"part": build.__name__}, build, ())
    with pytest.raises(SetupError, match=said) as caught:
        make_packages([wanted], lambda line: None)
    assert "\n" not in str(caught.value)


CACHED = dataclasses.replace(SETTINGS, step_cache=True)


def test_step_caching_has_packages_of_its_own(folder, tmp_path):
    """A whole and a shallow one; the plain one is neither taken for them nor forgotten."""
    split = tmp_path / "unet"
    shutil.copytree(folder, split, ignore=shutil.ignore_patterns("*.pt2"))
    lines: list[str] = []
    make_packages(unet_packages(split, CACHED), lines.append)
    assert lines[0] == "compiling 2 packages, 1 at a time"
    names = {"8x8-77-2-whole.pt2", "8x8-77-2-shallow.pt2"}
    assert {path.name for path in split.glob("*.pt2")} == names
    torch.manual_seed(5)
    compiled, eager = CompiledUNet.load(split, CACHED), TorchUNet(split)
    assert compiled.has_shallow_pass and compiled.row_counts(8, 8, 77) == (2,)
    for tensors in (inputs(2), inputs(3), inputs(2, side=12)):  # one with packages, two without
        wanted = eager.run(tensors)["noise_pred"]
        answer = compiled.run(tensors)
        assert relative_error(answer["noise_pred"], wanted) < 1e-5
        again = compiled.run({**tensors, "deep": answer["deep"]})
        assert set(again) == {"noise_pred"}
        assert relative_error(again["noise_pred"], wanted) < 1e-5
        stale = compiled.run({**tensors, "deep": torch.zeros_like(answer["deep"])})["noise_pred"]
        assert relative_error(stale, wanted) > 1e-2
    lines.clear()
    make_packages(unet_packages(split, CACHED), lines.append)
    make_packages(unet_packages(split, SETTINGS), lines.append)
    assert lines == ["2 packages were compiled before", "1 packages were compiled before"]
    with pytest.raises(SetupError, match=r"lacks 8x8-77-2-whole\.pt2, 8x8-77-2-shallow\.pt2"):
        CompiledUNet.load(folder, CACHED)


def test_what_plain_packages_are_known_by_has_not_changed():
    """Those that are kept on a machine are found by it."""
    signature = Signature(8, 8, 77, 2)
    assert signature.facts == {"height": 8, "width": 8, "tokens": 77, "rows": 2}
    assert signature.file == NAME


def test_every_output_of_a_package_is_compared(tmp_path):
    class Two(torch.nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return x + 1, x * self.factor

    path = tmp_path / "two.pt2"
    example = [torch.randn(3, 4)]
    compile_package(Two(2.0), example, path)
    check_package(path, Two(2.0), example)
    with pytest.raises(SetupError, match=r"two\.pt2 differs from eager torch by 0\.33"):
        check_package(path, Two(3.0), example)
