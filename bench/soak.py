"""Thousands of small requests, every one another prompt: none lost, none mixed up, no leak.

The numbers matter because a server runs for weeks: a lost answer, a picture that went to somebody
else, or a megabyte an hour are found by volume alone. Each picture is measured by
`tests/picture.py`, which knows nothing of the model, and compared with the prompt that asked for
it; a mixed-up answer shows the wrong colours and shape.

    python -m bench.soak [--count 2000] [--concurrency 8]
"""

from __future__ import annotations

import argparse
import itertools

import psutil

from bench.record import spread, store
from bench.served import load, served_demo
from fullpipe.client import Client, Picture
from fullpipe.server import TritonServer
from tests.picture import matches, measure

COLOURS = ("red", "green", "blue", "yellow", "orange", "brown", "pink", "black")
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
BACKGROUNDS = ("white", "cyan", "yellow", "pink", "green", "blue", "orange")
PLACES = ("", " on the left", " on the right", " at the top", " at the bottom", " in the centre")


def captions() -> list[str]:
    """Over 2,000 different captions of one object."""
    return [
        f"a {colour} {shape}{place} on a {background} background"
        for place, background, shape, colour in itertools.product(
            PLACES, BACKGROUNDS, SHAPES, COLOURS
        )
        if colour != background
    ]


def resident_mb(server: TritonServer) -> float:
    """Resident memory of all processes of the server."""
    root = psutil.Process(server.pid)
    return sum(p.memory_info().rss for p in [root, *root.children(recursive=True)]) / 1e6


def soak(server: TritonServer, count: int, concurrency: int, warm: int) -> dict:
    """Make `count` pictures and measure each; memory is compared with that after `warm` of them."""
    client = Client(server.url)
    todo = captions()[:count]
    sizes: list[float] = []

    def make(number: int) -> tuple[Picture, bool, bool]:
        picture = client.generate(
            todo[number], seed=number, width=128, height=128, steps=8, cfg=3.0
        )
        if number == warm:
            sizes.append(resident_mb(server))
        verdict = matches(measure(picture.pixels[0]), todo[number])
        return picture, verdict.colour and verdict.background, verdict.all

    seconds, each, results = load(make, len(todo), concurrency)
    own = [picture.info["seed"] == number for number, (picture, *_) in enumerate(results)]
    memory = resident_mb(server)
    return {
        "requests": len(todo),
        "different_prompts": len(set(todo)),
        "answered": len(results),
        "answered_with_own_seed": sum(own),
        "right_colours_percent": round(100 * sum(r[1] for r in results) / len(results), 2),
        "all_right_percent": round(100 * sum(r[2] for r in results) / len(results), 2),
        "images_per_second": round(len(todo) / seconds, 2),
        **spread(each),
        "resident_mb_after_warm_up": round(sizes[0]),
        "resident_mb_at_the_end": round(memory),
        "growth_percent": round(100 * (memory / sizes[0] - 1), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=8)
    arguments = parser.parse_args()
    with served_demo() as (server, _):
        result = soak(server, arguments.count, arguments.concurrency, warm=200)
    store("soak", {"request": "128x128, 8 steps, euler, cfg 3, raw", **result})


if __name__ == "__main__":
    main()
