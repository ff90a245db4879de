"""ComfyUI's side of the text parity test.

Run as a script, in a process that has ComfyUI's tree on its path, this file encodes prompts with
ComfyUI's own classes:

    python comfy_text.py JOB.json RESULT_FOLDER
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any


def run_comfyui(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Encode a job's prompts in a process of its own.

    Args:
        job: `checkpoints` {kind: diffusers folder}, `embeddings_folder`, `prompts`,
            `encodings` (pairs of a prompt's index and a clip skip or None), and `syntax`, texts
            whose brackets are only parsed.
        folder: for the results.
    Returns:
        `tokens` {kind: [per prompt {encoder: chunks of [token, weight]}]}, `syntax` the parsed
        weights, and `arrays`, an npz with `KIND.INDEX.SKIP` and `KIND.INDEX.SKIP.pooled`.
    """
    import comfyui
    import numpy as np

    (folder / "job.json").write_text(json.dumps(job))
    process = comfyui.install().start(Path(__file__), str(folder / "job.json"), str(folder))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    result = json.loads((folder / "result.json").read_text())
    return {**result, "arrays": np.load(folder / "arrays.npz")}


def token_name(token: Any) -> int | str:
    """A token as JSON can hold it: its id, or a digest of its vector's fp32 bytes."""
    if isinstance(token, int):
        return token
    return hashlib.sha256(token.detach().float().numpy().tobytes()).hexdigest()[:16]


def _main(job_file: str, folder: str) -> None:
    import comfy.cli_args

    comfy.cli_args.args.cpu = True

    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.text_encoders.sd2_clip
    import numpy as np
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    job = json.loads(Path(job_file).read_text())
    classes = {
        "sd1": (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
        "sd2": (
            comfy.text_encoders.sd2_clip.SD2Tokenizer,
            comfy.text_encoders.sd2_clip.SD2ClipModel,
        ),
        "sdxl": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
    }
    tokens: dict[str, list[Any]] = {}
    arrays: dict[str, Any] = {}
    for kind, checkpoint in job["checkpoints"].items():
        tokenizer_class, model_class = classes[kind]
        tokenizer = tokenizer_class(embedding_directory=[job["embeddings_folder"]])
        model = _load(model_class, Path(checkpoint), "clip_h" if kind == "sd2" else "clip_l")
        for name in ("clip_l", "clip_g", "clip_h"):
            if hasattr(model, name):
                width = getattr(model, name).transformer.get_input_embeddings().embedding_dim
                getattr(tokenizer, name).embedding_size = width
        tokenised = [tokenizer.tokenize_with_weights(prompt) for prompt in job["prompts"]]
        tokens[kind] = [
            {
                name: [[(token_name(t), weight) for t, weight in chunk] for chunk in chunks]
                for name, chunks in of_prompt.items()
            }
            for of_prompt in tokenised
        ]
        for index, skip in job["encodings"]:
            # The order of comfy.sd.CLIP.encode_from_tokens.
            model.reset_clip_options()
            if skip is not None:
                model.set_clip_options({"layer": skip})
            embeds, pooled = model.encode_token_weights(tokenised[index])
            arrays[f"{kind}.{index}.{skip}"] = embeds.numpy()
            arrays[f"{kind}.{index}.{skip}.pooled"] = pooled.numpy()
    syntax = []
    for text in job["syntax"]:
        parsed = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
        syntax.append([(comfy.sd1_clip.unescape_important(t), weight) for t, weight in parsed])
    np.savez(Path(folder) / "arrays.npz", **arrays)
    result = {"tokens": tokens, "syntax": syntax}
    (Path(folder) / "result.json").write_text(json.dumps(result))


def _load(model_class: Any, checkpoint: Path, first: str) -> Any:
    """A text model of ComfyUI with a checkpoint's sizes and weights, fp16 as ComfyUI keeps them."""
    import torch
    from safetensors.torch import load_file

    parts = {first: checkpoint / "text_encoder", "clip_g": checkpoint / "text_encoder_2"}
    parts = {name: part for name, part in parts.items() if part.is_dir()}
    options = {
        f"{name}_model_config": json.loads((part / "config.json").read_text())
        for name, part in parts.items()
    }
    model = model_class(dtype=torch.float16, model_options=options)
    for name, part in parts.items():
        weights = load_file(part / "model.safetensors")
        weights = {
            key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": w
            for key, w in weights.items()
        }
        missing, unexpected = getattr(model, name).transformer.load_state_dict(
            weights, strict=False
        )
        # Without a projection in the file ComfyUI has one, and does not use it.
        assert set(missing) <= {"text_projection.weight"}, missing
        assert not unexpected, unexpected
    return model.eval()


if __name__ == "__main__":
    _main(*sys.argv[1:])
