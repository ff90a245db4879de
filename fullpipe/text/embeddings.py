"""Textual inversions: learned vectors that a prompt names with `embedding:name`."""

from __future__ import annotations

import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from fullpipe.errors import InvalidRequest, SetupError

logger = logging.getLogger(__name__)

# In the order in which ComfyUI tries them after a bare name.
SUFFIXES = (".safetensors", ".pt", ".bin")


class EmbeddingsFolder:
    """The textual inversions of one server folder and the folders in it.

    The folder is listed once, here; afterwards a name from a prompt is only looked up in that list,
    so no request can reach any other file. Names carry no folders.

    Args:
        folder: None for a server that has none.
    Raises:
        SetupError: the folder does not exist.
    """

    def __init__(self, folder: Path | None) -> None:
        self._paths: dict[str, Path] = {}
        self._loaded: dict[Path, Any] = {}
        self._vectors: dict[tuple[Path, str], list[torch.Tensor]] = {}
        if folder is None:
            return
        if not folder.is_dir():
            raise SetupError(f"embeddings folder {folder} is missing: create it or unset it")
        files = [
            Path(root) / name
            for root, folders, names in os.walk(folder)
            for name in sorted(names)
            if not folders.sort() and Path(name).suffix in SUFFIXES
        ]
        for path in files:
            self._paths.setdefault(path.name, path)
        for suffix in SUFFIXES:
            for path in files:
                if path.suffix == suffix:
                    self._paths.setdefault(path.stem, path)

    def find(self, reference: str) -> tuple[str | None, str, str]:
        """Take the name off what follows `embedding:` in a prompt.

        A name ends at white space; a comma after it is not part of it unless a file's name ends so.

        Returns:
            the name under which `vectors` knows it, or None if this folder has no such file or it
            cannot be read; the name as written; and the text that remains to be tokenised.
        Raises:
            InvalidRequest: no name follows.
        """
        words = reference.strip("\n").split()
        if not words:
            raise InvalidRequest("a prompt has 'embedding:' without a name after it")
        written, rest = words[0], " ".join(words[1:])
        if self._is_usable(written):
            return written, written, rest
        name = written.strip(",")
        if len(name) < len(written):
            rest = f"{written[len(name) :]} {rest}"
            if self._is_usable(name):
                return name, written, rest
        return None, written, rest

    def vectors(self, name: str, key: str, width: int) -> list[torch.Tensor]:
        """Vectors of a name that `find` returned.

        Args:
            name: of the textual inversion.
            key: `clip_l` or `clip_g`: which of the two in a file for SDXL.
            width: of the encoder; only files that are lists of dicts are searched for it.
        Returns:
            fp32 [C'] each, in order; C' is the file's own and may not be the encoder's.
        """
        path = self._paths[name]
        if (path, key) not in self._vectors:
            tensor = _select(self._loaded[path], key, width)
            self._vectors[path, key] = (
                []
                if tensor is None
                else list(tensor.detach().float().reshape(-1, tensor.shape[-1]))
            )
        return self._vectors[path, key]

    def _is_usable(self, name: str) -> bool:
        path = self._paths.get(name)
        if path is None:
            return False
        if path not in self._loaded:
            try:
                self._loaded[path] = _load(path)
            except Exception:  # a damaged file raises a different type at every layer
                logger.warning("embedding file %s cannot be read, ignoring it", path, exc_info=True)
                self._loaded[path] = None
        return self._loaded[path] is not None


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        content: Any = safetensors.torch.load_file(path)
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # files of early trainers pickle classes, which are never run
            content = {"raw": _raw_vectors(path)}
    if _select(content, None, None) is None:
        raise ValueError("no tensor of one or two dimensions in it")
    return content


def _select(content: Any, key: str | None, width: int | None) -> torch.Tensor | None:
    """Pick the tensor of one encoder out of the file layouts that trainers write (ComfyUI 0.3.75).

    In this order: A1111's `string_to_param`; a list of dicts, whose tensors of the encoder's width
    are joined; SDXL's tensor named after the encoder; one bundled in a LoRA; else the first tensor.
    """
    if isinstance(content, list):
        tensors = [tensor for entry in content for tensor in entry.values()]
        fitting = [t.reshape(-1, t.shape[-1]) for t in tensors if width in (None, t.shape[-1])]
        return torch.cat(fitting[:1] if width is None else fitting) if fitting else None
    if "string_to_param" in content:
        return _first(content["string_to_param"])
    if key in content:
        return content[key]
    for suffix in (".string_to_param.*", f".{key}"):
        bundled = [
            tensor
            for name, tensor in content.items()
            if name.startswith("bundle_emb.") and name.endswith(suffix)
        ]
        if bundled:
            return torch.cat(bundled)
    return _first(content)


def _first(tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
    tensor = next(iter(tensors.values()), None)
    return tensor if isinstance(tensor, torch.Tensor) and tensor.ndim in (1, 2) else None


def _raw_vectors(path: Path) -> torch.Tensor:
    """Read the last stored tensor of a PyTorch zip archive without its pickle.

    Its bytes are taken as fp32 vectors of CLIP-L's width if they divide by it, else of SD2's.
    """
    with zipfile.ZipFile(path) as archive:
        for name in reversed([name for name in archive.namelist() if "data/" in name]):
            count = archive.getinfo(name).file_size // 4
            if count >= 768:
                width = 768 if count % 768 == 0 else 1024
                numbers = np.frombuffer(archive.read(name), dtype=np.float32, count=count)
                rows = count // width
                return torch.from_numpy(numbers[: rows * width].reshape(rows, width).copy())
    raise ValueError("no tensor data in it")
