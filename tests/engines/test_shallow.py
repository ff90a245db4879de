"""A UNet in two: whole passes that give deep features, shallow ones that take them."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from fullpipe.engines.shallow import ShallowPass, WholePass
from fullpipe.engines.torch_engine import TorchUNet
from fullpipe.errors import SetupError

from .reduced import SMALL, networks


@pytest.fixture(scope="module", params=SMALL)
def unet(request):
    torch.manual_seed(0)
    return networks(request.param)[0]


def inputs(unet, rows: int, size: tuple[int, int] = (8, 8)) -> dict[str, torch.Tensor]:
    """Random ones, each time others, in the order of the bindings."""
    tensors = {
        "sample": torch.randn(rows, 4, *size),
        "timestep": torch.randint(0, 1000, (rows,)),
        "encoder_hidden_states": torch.randn(rows, 77, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * 256
        tensors |= {"text_embeds": torch.randn(rows, pooled), "time_ids": torch.rand(rows, 6) * 512}
    return tensors


def reference(unet, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """What diffusers' own forward gives."""
    added = {name: tensors[name] for name in ("text_embeds", "time_ids") if name in tensors}
    return unet(
        tensors["sample"],
        tensors["timestep"],
        encoder_hidden_states=tensors["encoder_hidden_states"],
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (16, 12)], ids=str)
@torch.inference_mode()
def test_a_shallow_pass_over_fresh_features_is_the_whole_unet(unet, size):
    whole, shallow = WholePass(unet, torch.float32), ShallowPass(unet, torch.float32)
    tensors = inputs(unet, 2, size)
    wanted = reference(unet, tensors)
    noise_pred, deep = whole(*tensors.values())
    assert deep.shape[:3] == (2, *size) and deep.is_contiguous()
    torch.testing.assert_close(noise_pred, wanted, atol=1e-5, rtol=0)
    again = shallow(deep, *tensors.values())
    torch.testing.assert_close(again, wanted, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_shallow_pass_sees_the_sample_and_its_features_and_little_else(unet):
    whole, shallow = WholePass(unet, torch.float32), ShallowPass(unet, torch.float32)
    tensors, others = inputs(unet, 2), inputs(unet, 2)
    deep, other_deep = (whole(*some.values())[1] for some in (tensors, others))
    wanted = shallow(deep, *tensors.values())
    assert not torch.allclose(shallow(other_deep, *tensors.values()), wanted, atol=1e-3)
    moved = {**tensors, "sample": others["sample"]}
    assert not torch.allclose(shallow(deep, *moved.values()), wanted, atol=1e-3)


@torch.inference_mode()
def test_a_shallow_pass_skips_the_middle(unet):
    called = []
    hooks = [
        part.register_forward_hook(lambda *_: called.append(1))
        for part in (unet.mid_block, *unet.down_blocks[1:], *unet.up_blocks[:-1])
    ]
    tensors = inputs(unet, 1)
    _, deep = WholePass(unet, torch.float32)(*tensors.values())
    assert len(called) == len(hooks)
    called.clear()
    ShallowPass(unet, torch.float32)(deep, *tensors.values())
    assert not called
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("origins", [[0], [0, 1, 2], [0, 1, 2, 0, 2]], ids=str)
def test_the_engine_of_the_demo(checkpoint, threads, origins):
    """Packed layers, shares of rows, and halves that share what comes before the prompt."""
    plain = UNet2DConditionModel.from_pretrained(checkpoint / "unet").eval()
    torch.set_num_threads(threads)
    engine = TorchUNet(checkpoint / "unet", step_cache=True)
    torch.set_num_threads(1)
    assert engine.has_shallow_pass
    tensors = inputs(plain, 3, (16, 16))
    tensors = {name: tensor[origins] for name, tensor in tensors.items()}
    tensors["encoder_hidden_states"] = torch.randn(len(origins), 77, 128)
    with torch.inference_mode():
        wanted = reference(plain, tensors)
    answer = engine.run(tensors)
    assert set(answer) == {"noise_pred", "deep"}
    torch.testing.assert_close(answer["noise_pred"], wanted, atol=1e-5, rtol=0)
    shallow = engine.run({**tensors, "deep": answer["deep"]})
    assert set(shallow) == {"noise_pred"}
    torch.testing.assert_close(shallow["noise_pred"], wanted, atol=1e-5, rtol=0)
    assert set(TorchUNet(checkpoint / "unet").run(tensors)) == {"noise_pred"}


def test_the_engine_of_every_layout_in_half_precision(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    engine = TorchUNet(tmp_path, dtype=torch.bfloat16, step_cache=True)
    tensors = inputs(unet, 2)
    answer = engine.run(tensors)
    assert (answer["noise_pred"].dtype, answer["deep"].dtype) == (torch.float32, torch.bfloat16)
    again = engine.run({**tensors, "deep": answer["deep"]})["noise_pred"]
    error = (again - answer["noise_pred"]).norm() / answer["noise_pred"].norm()
    assert error < 1e-2


def test_a_unet_of_another_kind_is_refused():
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=3,
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    with pytest.raises(SetupError, match="step caching with a UNet of num_class_embeds=3; allowed"):
        WholePass(unet, torch.float32)
