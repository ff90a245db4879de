"""`engine.json`: what a built engine was built for, and whether that is what is here.

An engine that was compiled for other weights, sizes, hardware or libraries would at best refuse
to load and at worst give wrong pictures. So every build leaves this record beside its files, and
a load compares it first.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fullpipe.config import load_dataclass
from fullpipe.errors import SetupError

FILE = "engine.json"


@dataclasses.dataclass(frozen=True)
class Key:
    """What must be equal for a built engine to be the right one.

    Attributes:
        engine: compiled, tensorrt or onnx.
        checkpoint: digest of the weights, `Checkpoint.digest`.
        precision: fp32, fp16 or bf16.
        sizes: [width, height] pairs in pixels; empty where the engine takes any size.
        buckets: UNet batch rows; empty where the engine takes any number.
        gpu: compute capability such as sm_90; of a CPU "cpu AVX512"; "any" for a portable engine.
        libraries: name to version of what the engine's format or speed depends on.
        shallow_layers: layers of the last up block in a shallow pass; 0 without step caching.
    """

    engine: str
    checkpoint: str
    precision: str
    sizes: list[list[int]]
    buckets: list[int]
    gpu: str
    libraries: dict[str, str]
    shallow_layers: int = 0


@dataclasses.dataclass(frozen=True)
class Artifact:
    """The content of `engine.json`.

    Attributes:
        key: what the engine was built for.
        files: path below the folder to size in bytes, of every file that the build wrote.
        rebuild: the command that builds it again.
    """

    key: Key
    files: dict[str, int]
    rebuild: str

    @classmethod
    def of(cls, key: Key, folder: Path, files: Sequence[Path], rebuild: str) -> Artifact:
        """Describe files that a build left in `folder`."""
        sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
        return cls(key, dict(sorted(sizes.items())), rebuild)

    @classmethod
    def load(cls, folder: Path) -> Artifact:
        """Read `engine.json`; raises SetupError when it is missing or not what `save` writes."""
        return load_dataclass(cls, folder / FILE)

    def save(self, folder: Path) -> None:
        """Write `engine.json` into `folder`."""
        document = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        (folder / FILE).write_text(document, encoding="utf-8")

    def check(self, folder: Path, wanted: Key) -> None:
        """Compare with what is wanted here, and the files with what the build had written.

        Raises:
            SetupError: one line that names everything that differs and the command that rebuilds.
        """
        fields = [field.name for field in dataclasses.fields(Key)]
        pairs = {name: (getattr(self.key, name), getattr(wanted, name)) for name in fields}
        differences = [
            f"{name} {_text(built)}, needed {_text(needed)}"
            for name, (built, needed) in pairs.items()
            if built != needed
        ]
        for name, size in self.files.items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                has = "is missing" if found is None else f"has {found} bytes"
                differences.append(f"{name} {has}, needed {size} bytes")
        if differences:
            raise SetupError(
                f"{folder} holds an engine of {'; '.join(differences)};"
                f" rebuild it with: {self.rebuild}"
            )


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={version}" for name, version in value.items()) or "none"
    if isinstance(value, list):
        return (
            ",".join("x".join(map(str, v)) if isinstance(v, list) else str(v) for v in value)
            or "any"
        )
    return str(value)
