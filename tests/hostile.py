"""Malformed and hostile requests without end: what attackers, bugs and typing errors send.

    python -m tests.hostile --url http://127.0.0.1:8000 --count 10000

Every request must get an error of the contract, quickly, and hurt nobody.
"""

from __future__ import annotations

import argparse
import base64
import collections
import http.client
import io
import json
import random
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

GENERATE = "/v2/models/full_pipeline/generate"
INFER = "/v2/models/full_pipeline/infer"
LOOP = "/v2/models/scheduler_model/infer"
STREAM = "/v2/models/full_pipeline_stream/generate_stream"
PROMPT = {"prompt": "a red circle"}
NASTY_TEXT = (
    "",
    "\x00",
    "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    "💥" * 500,
    "(" * 5000,
    "%s%n%x",
    "../../etc/passwd",
    "'; DROP TABLE images; --",
    "\u202e\u0000\uffff",
    "{{7*7}}${jndi:ldap://x}",
)
NASTY_NUMBERS = (-(2**31), -1, 0, 7, 9, 63, 65, 1001, 10**6, 2**31 - 1)


def bomb(width: int, height: int) -> str:
    """Base64 of a small PNG whose header promises a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 100_000)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return base64.b64encode(png).decode()


def truncated(kind: str) -> str:
    """Base64 of the first half of a good picture file."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, kind)
    return base64.b64encode(file.getvalue()[: len(file.getvalue()) // 2]).decode()


def pictures(rng: random.Random) -> str:
    """Text that is no good picture."""
    return rng.choice(
        [
            "",
            "!!!",
            "A" * 50_000,
            "data:image/png;base64,",
            bomb(60_000, 60_000),
            bomb(2**31 - 1, 1),
            bomb(512, 512),
            truncated("PNG"),
            truncated("JPEG"),
            truncated("WEBP"),
            base64.b64encode(b"GIF89a" + bytes(200)).decode(),
            base64.b64encode(b"<svg onload=alert(1)>").decode(),
            base64.b64encode(rng.randbytes(3000)).decode(),
        ]
    )


def scalar(name: str, dtype: str, value: object, shape: list[int] | None = None) -> dict:
    """One JSON tensor of /infer."""
    return {"name": name, "datatype": dtype, "shape": shape or [1], "data": [value]}


def hostile_requests(seed: int) -> Iterator[tuple[str, bytes, str]]:
    """Endless (path, body, what is wrong); none of them may ever make a picture."""
    rng = random.Random(seed)
    numbers = ["width", "height", "steps", "batch_size", "clip_skip", "step_cache"]

    def bad_number() -> dict:
        name = rng.choice(numbers)
        allowed = {
            "width": range(64, 513, 8),
            "height": range(64, 513, 8),
            "steps": range(1, 151),
            "batch_size": range(1, 9),
            "clip_skip": range(-24, 0),
            "step_cache": range(1, 2),
        }[name]
        value = rng.choice([n for n in NASTY_NUMBERS if n not in allowed])
        return {**PROMPT, name: value}

    def bad_name() -> dict:
        name = rng.choice(["sampler_name", "scheduler", "output_format"])
        return {**PROMPT, name: rng.choice(NASTY_TEXT) + rng.choice(["x", "Euler", "normal2"])}

    def wrong_json_type() -> dict:
        name = rng.choice(["width", "seed", "cfg", "steps", "denoise", "prompt"])
        values = [[], {}, {"a": 1}, ["a", "b"]]
        return {**PROMPT, name: rng.choice([*values, 5 if name == "prompt" else "five"])}

    def bad_picture() -> dict:
        extra = {"mask_b64": pictures(rng)} if rng.random() < 0.3 else {}
        return {**PROMPT, "denoise": 0.5, "init_image_b64": pictures(rng), **extra}

    def bad_binary() -> dict:
        return {
            "inputs": [
                scalar("prompt", "BYTES", "a red circle"),
                rng.choice(
                    [
                        scalar("cfg", "FP32", rng.choice([-1.0, 101.0, 3.4e38])),
                        scalar("cfg", "FP32", "NaN"),
                        scalar("steps", "FP32", 3.5),
                        scalar("steps", "INT64", 5),
                        scalar("seed", "INT32", 5),
                        scalar("width", "INT32", 256, [1, 1]),
                        scalar("width", "INT32", 256, [-1]),
                        scalar("prompt", "BYTES", "twice"),
                        scalar("no_such_input", "BYTES", "x"),
                        scalar("init_image", "UINT8", 3, [1, 0, 0, 3]),
                        scalar("init_image", "UINT8", 3, [1, 1, 1, 3]),
                        scalar("mask", "UINT8", 3, [1, 1, 1]),
                    ]
                ),
            ]
        }

    def bad_loop_call() -> dict:
        given = rng.choice(
            [
                [scalar("op", "BYTES", "explode")],
                [scalar("op", "BYTES", "cancel")],
                [scalar("op", "BYTES", "progress"), scalar("job_id", "BYTES", "\x07")],
                [scalar("op", "BYTES", "progress"), scalar("job_id", "BYTES", "x" * 500)],
                [scalar("prompt", "BYTES", "x"), scalar("output", "BYTES", "weights")],
                [scalar("prompt", "BYTES", "x"), scalar("latents", "FP32", 1.0, [1, 1, 1, 1])],
                [scalar("prompt_embeds", "FP32", 1.0, [1, 1, 1])],
                [
                    scalar("prompt", "BYTES", "x"),
                    scalar("noise_mask", "FP32", 5.0, [1, 1, 1]),
                ],
            ]
        )
        return {"inputs": given}

    def garbage() -> bytes:
        return rng.choice(
            [
                b"",
                b"{",
                b"null",
                b"[]",
                b'"x"',
                b"\xff\xfe\x00",
                b'{"prompt": "\xff"}',
                rng.randbytes(200),
                b"[" * 5000,
                b'{"prompt":"x"' + b" " * 10_000,
            ]
        )

    def huge_prompt() -> dict:
        name = rng.choice(["prompt", "negative_prompt", "job_id"])
        return {**PROMPT, name: rng.choice("ax(é💥") * rng.choice([20_000, 1_000_000])}

    kinds = [
        (30, "number", lambda: (GENERATE, bad_number())),
        (15, "name", lambda: (GENERATE, bad_name())),
        (12, "JSON type", lambda: (GENERATE, wrong_json_type())),
        (10, "picture", lambda: (GENERATE, bad_picture())),
        (12, "binary tensor", lambda: (INFER, bad_binary())),
        (8, "loop call", lambda: (LOOP, bad_loop_call())),
        (6, "garbage", lambda: (rng.choice([GENERATE, INFER, STREAM, LOOP]), garbage())),
        (3, "no prompt", lambda: (GENERATE, {"seed": rng.randrange(9)})),
        (1, "huge prompt", lambda: (GENERATE, huge_prompt())),
        (4, "stream", lambda: (STREAM, rng.choice([bad_number, bad_name, bad_picture])())),
        (2, "start image", lambda: (GENERATE, {**PROMPT, "denoise": rng.random()})),
    ]
    while True:
        _, what, make = rng.choices(kinds, [weight for weight, *_ in kinds])[0]
        path, body = make()
        yield path, body if isinstance(body, bytes) else json.dumps(body).encode(), what


def send(address: str, path: str, body: bytes) -> tuple[int, bytes]:
    """POST once; returns status and answer."""
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def attack(url: str, count: int, seed: int = 0, concurrency: int = 8) -> dict:
    """Send `count` hostile requests.

    Returns:
        {"answers": {"what: status": count}, "accepted": [...], "unclear": [...], "slowest_s": s}:
        `accepted` lists requests that made a picture, `unclear` those whose answer is no
        error of one line.
    """
    address = urlsplit(url).netloc
    requests = hostile_requests(seed)
    answers: collections.Counter = collections.Counter()
    accepted, unclear, slowest = [], [], 0.0

    def one(request: tuple[str, bytes, str]) -> tuple[str, int, str, float]:
        path, body, what = request
        started = time.perf_counter()
        status, answer = send(address, path, body)
        return what, status, answer.decode("utf-8", "replace"), time.perf_counter() - started

    with ThreadPoolExecutor(concurrency) as pool:
        batch = 500
        for start in range(0, count, batch):
            todo = [next(requests) for _ in range(min(batch, count - start))]
            for request, (what, status, answer, seconds) in zip(
                todo, pool.map(one, todo), strict=True
            ):
                answers[f"{what}: {status}"] += 1
                slowest = max(slowest, seconds)
                shown = f"{what}: {request[0]} {request[1][:120]!r} -> {status} {answer[:200]!r}"
                if status == 200 and '"error"' not in answer and "unknown" not in answer:
                    accepted.append(shown)
                elif not is_clear(answer):
                    unclear.append(shown)
    return {
        "answers": dict(sorted(answers.items())),
        "accepted": accepted,
        "unclear": unclear,
        "slowest_s": round(slowest, 3),
    }


def is_clear(answer: str) -> bool:
    """Whether the answer is one line, without a traceback or a generic failure."""
    message = answer.removeprefix("data:").strip()
    try:
        message = str(json.loads(message)["error"])
    except (ValueError, KeyError, TypeError):
        return False
    bad = ("Traceback", "the server failed on this request", "the denoising step failed")
    return bool(message.strip()) and "\n" not in message and not any(b in message for b in bad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(attack(arguments.url, arguments.count, arguments.seed), indent=2))


if __name__ == "__main__":
    main()
