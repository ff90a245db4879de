"""`fullpipe generate`: one prompt becomes files, with a progress bar on a terminal."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from fullpipe import contract
from fullpipe.client import Client, Picture

FORMAT_OF_SUFFIX = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg", ".npy": "raw"}
_SUFFIX_OF_FORMAT = {"png": ".png", "webp": ".webp", "jpeg": ".jpg", "raw": ".npy"}
_NUMBERS = {"INT32": int, "UINT64": int, "FP32": float}
_BAR_CHARS = 30


@dataclasses.dataclass(frozen=True)
class Options:
    """What to ask for, where the pictures go, and whether the way there is shown.

    Attributes:
        inputs: by the contract's names; only what was given.
    """

    inputs: dict[str, Any]
    output: Path
    has_progress: bool = True


def add_options(command: argparse.ArgumentParser) -> None:
    """Give a command the prompt, every input of the contract, and the output file."""
    picture = command.add_argument_group("picture")
    for tensor in contract.STREAM_INPUTS:
        name, meaning = tensor.name, tensor.meaning
        flag = "--" + name.removesuffix("_b64").replace("_", "-")
        if name == "prompt":
            command.add_argument(name, metavar="PROMPT", help=meaning)
        elif tensor.dims != (1,):
            continue  # comes as a file, by way of its twin *_b64
        elif name.endswith("_b64"):
            meaning = meaning.replace("as base64", "from a file:")
            picture.add_argument(flag, dest=name, type=_as_base64, metavar="FILE", help=meaning)
        elif name == "output_format":
            meaning = "instead of what the suffix of -o says; raw is written as .npy"
            picture.add_argument(flag, choices=contract.OUTPUT_FORMATS, help=meaning)
        elif name == "preview":
            meaning = "latent: keep a rough preview beside the output while it is being made"
            picture.add_argument(flag, choices=contract.PREVIEWS, help=meaning)
        else:
            kind = _NUMBERS.get(tensor.dtype, str)
            metavar = {int: "N", float: "X"}.get(kind, "TEXT")
            picture.add_argument(flag, type=kind, metavar=metavar, help=meaning)
    output = command.add_argument_group("output")
    output.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help=f"the suffix decides the format: {', '.join(FORMAT_OF_SUFFIX)}; several pictures get"
        " -0, -1, … before it (default: out.png)",
    )
    output.add_argument(
        "--no-progress",
        action="store_true",
        help="one plain request instead of the stream of steps",
    )


def read_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Options:
    """The options of a parsed command line; contradictions end in the parser's usage error."""
    given = {tensor.name: getattr(args, tensor.name, None) for tensor in contract.STREAM_INPUTS}
    try:
        output, given["output_format"] = name_output(args.output, args.output_format)
    except ValueError as error:
        parser.error(str(error))
    inputs = {name: value for name, value in given.items() if value is not None}
    return Options(inputs, output, has_progress=not args.no_progress)


def name_output(output: Path | None, output_format: str | None) -> tuple[Path, str]:
    """The file to write and its format, from what was given of both.

    Raises:
        ValueError: they contradict each other, no format is known, or the folder is missing.
    """
    if output is None:
        output = Path("out").with_suffix(_SUFFIX_OF_FORMAT[output_format or "png"])
    by_suffix = FORMAT_OF_SUFFIX.get(output.suffix.lower())
    chosen = output_format or by_suffix
    if chosen is None:
        raise ValueError(
            f"-o {output} says no format; allowed suffixes: {', '.join(FORMAT_OF_SUFFIX)}"
        )
    if by_suffix not in (None, chosen):
        raise ValueError(f"-o {output} and --output-format {chosen} contradict each other")
    if not output.parent.is_dir():
        raise ValueError(f"-o {output}: there is no folder {output.parent}")
    return output, chosen


def generate(client: Client, options: Options) -> list[Path]:
    """Make the pictures, write them, and print where they are and what they took."""
    inputs = options.inputs
    # In a stream's JSON raw pixels are a list of decimal numbers: a plain answer is far smaller.
    if options.has_progress and inputs["output_format"] != "raw":
        picture = _with_progress(client, inputs, options.output)
    else:
        picture = client.generate(**{k: v for k, v in inputs.items() if k != "preview"})
    paths = write(picture, options.output)
    for path in paths:
        print(path)
    print(describe(picture.info))
    return paths


def write(picture: Picture, output: Path) -> list[Path]:
    """Write every picture of a request; several are numbered from 0 before the suffix."""
    files = picture.encoded if picture.raw is None else list(picture.raw)
    paths = [
        output if len(files) == 1 else output.with_stem(f"{output.stem}-{number}")
        for number in range(len(files))
    ]
    for path, file in zip(paths, files, strict=True):
        if isinstance(file, bytes):
            path.write_bytes(file)
        else:
            with path.open("wb") as stream:
                np.save(stream, file)
    return paths


def describe(info: dict[str, Any]) -> str:
    """One line: what somebody needs to make the picture again, and where the time went."""
    stages = info.get("milliseconds", {})
    parts = [
        f"seed {info.get('seed')}",
        f"{info.get('width')}x{info.get('height')}",
        f"{info.get('steps')} steps of {info.get('sampler_name')}/{info.get('scheduler')}",
        *(f"{stage} {milliseconds:.0f} ms" for stage, milliseconds in stages.items()),
    ]
    return ", ".join(parts)


def _as_base64(path: str) -> str:
    try:
        return base64.b64encode(Path(path).read_bytes()).decode()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {path}: {error.strerror}") from None


def _with_progress(client: Client, inputs: dict[str, Any], output: Path) -> Picture:
    preview_path = output.with_name(f"{output.stem}-preview.jpg")
    has_preview = inputs.get("preview") == "latent"
    bar = _Bar(sys.stderr)
    with client.stream(**inputs) as stream:
        try:
            bar.show(0, None)
            for event in stream:
                if isinstance(event, Picture):
                    return event
                bar.show(event["step"], event["steps"])
                if has_preview and event["preview"]:
                    preview_path.write_bytes(event["preview"])
        finally:
            bar.clear()
            if has_preview:
                preview_path.unlink(missing_ok=True)
    raise AssertionError("a stream ends with a picture or raises")


class _Bar:
    """One line on a terminal that is drawn over; nothing where there is no terminal."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._started = time.monotonic()

    def show(self, step: int, steps: int | None) -> None:
        seconds = time.monotonic() - self._started
        if steps:
            filled = "#" * (_BAR_CHARS * step // steps)
            self._draw(f"[{filled:-<{_BAR_CHARS}}] {step}/{steps}  {seconds:.1f} s")
        else:
            self._draw("waiting for the first step")

    def clear(self) -> None:
        self._draw("")

    def _draw(self, text: str) -> None:
        if self._is_terminal:
            self._stream.write(f"\r\x1b[K{text}")
            self._stream.flush()
