"""The text half of CLIP, as Stable Diffusion uses it.

A plain torch module of its own, for two reasons: it gives every layer's output and takes vectors in
place of tokens, whatever version of transformers is installed; and it loads in the time that its
weights take, where importing transformers alone takes seconds and hundreds of megabytes.
Parameter names are those of transformers' `CLIPTextModel`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
import torch.nn.functional as F
from torch import nn

from fullpipe.errors import SetupError

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
}


@dataclass(frozen=True)
class ClipConfig:
    """The facts of a `text_encoder/config.json` that shape the network."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    hidden_act: str
    layer_norm_eps: float
    projection_dim: int | None

    @classmethod
    def from_file(cls, path: Path, *, has_projection: bool) -> ClipConfig:
        """Read a config.

        Raises:
            SetupError: the file is missing, incomplete, or of another kind of network.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            config = cls(
                hidden_size=int(values["hidden_size"]),
                intermediate_size=int(values["intermediate_size"]),
                num_hidden_layers=int(values["num_hidden_layers"]),
                num_attention_heads=int(values["num_attention_heads"]),
                vocab_size=int(values.get("vocab_size", 49408)),
                max_position_embeddings=int(values.get("max_position_embeddings", 77)),
                hidden_act=str(values.get("hidden_act", "quick_gelu")),
                layer_norm_eps=float(values.get("layer_norm_eps", 1e-5)),
                projection_dim=int(values["projection_dim"]) if has_projection else None,
            )
        except FileNotFoundError:
            raise SetupError(
                f"{path} is missing: copy the checkpoint's {path.parent.name} folder there"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SetupError(
                f"{path} is not the config of a CLIP text model ({error!r}): "
                f"copy the checkpoint's {path.parent.name} folder again"
            ) from error
        if config.hidden_act not in ACTIVATIONS:
            raise SetupError(
                f"{path}: hidden_act={config.hidden_act!r}, allowed {sorted(ACTIVATIONS)}: "
                "use a checkpoint with CLIP text encoders"
            )
        return config


# Weights always come from a file, and drawing random ones first costs a second even for tensors
# without storage (torch then imports what it needs to trace programs).
class _Linear(nn.Linear):
    def reset_parameters(self) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype == torch.float16 and x.dtype == torch.float32:
            return split_linear(x, self.weight, self.bias)
        return super().forward(x)


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        pass


# Keeps the lower halves of small inputs out of fp16's subnormals; inputs may reach 4094.
_SPLIT_SCALE = 16.0


def split_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A linear layer as exact as in fp32, for weights that fp16 holds exactly.

    The input is the sum of two fp16 numbers, 22 bits together, so that the layer is two products
    in fp16, accumulated in fp32, which tensor cores run many times faster than one in fp32.

    Args:
        x: [..., C] fp32, of absolute value below 4094.
        weight: [D, C] fp16.
        bias: [D] fp32 or None.
    Returns:
        [..., D] fp32.
    """
    flat = x.reshape(-1, x.shape[-1])
    count = len(flat)
    halves = torch.empty(2 * count, flat.shape[1], dtype=torch.float16, device=x.device)
    high, negative_low = halves[:count], halves[count:]
    torch.mul(flat, _SPLIT_SCALE, out=high)
    torch.sub(high, flat, alpha=_SPLIT_SCALE, out=negative_low)
    if x.device.type == "cuda":
        products = torch.mm(halves, weight.T, out_dtype=torch.float32)
    else:
        products = halves.float() @ weight.T.float()
    out = torch.sub(products[:count], products[count:])
    if bias is None:
        out = out.mul_(1 / _SPLIT_SCALE)
    else:
        out = torch.add(bias, out, alpha=1 / _SPLIT_SCALE)
    return out.unflatten(0, x.shape[:-1])


class _Attention(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = _Linear(width, width)
        self.k_proj = _Linear(width, width)
        self.v_proj = _Linear(width, width)
        self.out_proj = _Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.fc1 = _Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = _Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class _Layer(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = _Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _Mlp(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Embeddings(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.token_embedding = _Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = _Embedding(config.max_position_embeddings, config.hidden_size)


class _Encoder(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Layer(config) for _ in range(config.num_hidden_layers)])


class ClipTextModel(nn.Module):
    """CLIP's text transformer, with its projection where the config names one."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.final_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        if config.projection_dim is not None:
            self.text_projection = _Linear(width, config.projection_dim, bias=False)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up token vectors: ids [...] int64 -> [..., C], without positions."""
        return self.embeddings.token_embedding(ids)

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        """Apply the text projection, if the model has one: [B, C] -> [B, P]."""
        return pooled if self.config.projection_dim is None else self.text_projection(pooled)

    def forward(
        self, inputs_embeds: torch.Tensor, hidden_layer: int | None, *, needs_last: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Run the transformer.

        Args:
            inputs_embeds: [B, n, C], token vectors without positions, n up to 77.
            hidden_layer: index of the layer whose output is wanted as it is, or None.
            needs_last: whether the last layer's output is wanted; without it the layers after
                `hidden_layer` are not run.
        Returns:
            the last layer's output after the final norm [B, n, C] or None, and the output of
            `hidden_layer` without norm [B, n, C] or None.
        """
        positions = self.embeddings.position_embedding.weight[: inputs_embeds.shape[1]]
        x = inputs_embeds + positions
        hidden = None
        for index, layer in enumerate(self.encoder.layers):
            x = layer(x)
            if index == hidden_layer:
                hidden = x
                if not needs_last:
                    return None, hidden
        return self.final_layer_norm(x), hidden


def load_clip(
    folder: Path,
    *,
    has_projection: bool,
    device: torch.device | str,
    dtype: torch.dtype,
    weights_dtype: torch.dtype | None,
) -> ClipTextModel:
    """Load a `text_encoder` folder of a diffusers checkpoint.

    Args:
        folder: with config.json and model.safetensors (or its fp16 variant, or shards, or
            pytorch_model.bin, which is read without running what is pickled in it).
        has_projection: whether the network ends in a text projection.
        device: where the weights go.
        dtype: the type to compute in.
        weights_dtype: the type whose precision the weights are cut to first; None keeps the file's.
    Raises:
        SetupError: a file is missing or broken; the message names it and the remedy.
    """
    path = folder / "config.json"
    config = ClipConfig.from_file(path, has_projection=has_projection)
    with torch.device("meta"):
        model = ClipTextModel(config)
    wanted = model.state_dict()
    is_split = (
        torch.device(device).type == "cuda"
        and dtype == torch.float32
        and weights_dtype == torch.float16
        and "dtype" in torch.ops.aten.mm.overloads()  # fp16 products in fp32, from torch 2.8 on
    )
    linear = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, _Linear)}
    found: dict[str, torch.Tensor] = {}
    for path in _weight_files(folder):
        for key, tensor in _read_weights(path).items():
            name = key.removeprefix("text_model.")
            if name in wanted:
                if tensor.shape != wanted[name].shape:
                    raise SetupError(
                        f"{path}: {key} has shape {list(tensor.shape)}, config.json beside it "
                        f"says {list(wanted[name].shape)}: copy both from one checkpoint"
                    )
                kept = torch.float16 if is_split and name in linear else dtype
                found[name] = tensor.to(weights_dtype or tensor.dtype).to(device, kept)
            elif name.startswith("encoder.layers."):
                raise SetupError(
                    f"{path} has {key}, beyond num_hidden_layers={config.num_hidden_layers} of "
                    "config.json beside it: copy both from one checkpoint"
                )
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise SetupError(
            f"{path} lacks {len(missing)} weights, first {missing[0]}: "
            f"copy the checkpoint's {folder.name} folder again"
        )
    model.load_state_dict(found, assign=True)
    return model.eval().requires_grad_(False)


def _weight_files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "model.fp16.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if shards:
        return shards
    if (folder / "pytorch_model.bin").is_file():
        return [folder / "pytorch_model.bin"]
    raise SetupError(
        f"{folder / 'model.safetensors'} is missing: copy the checkpoint's {folder.name} folder"
    )


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".bin":
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # damaged files raise a different type at every layer
        raise SetupError(
            f"{path} cannot be read ({error!r}): copy the checkpoint's {path.parent.name} again"
        ) from error
