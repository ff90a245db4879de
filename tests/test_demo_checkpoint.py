"""The demo checkpoint draws what its captions say, and the measurement that says so can be trusted.

The exact pictures here are drawn with Pillow, apart from the training code and from `picture.py`.
"""

import math
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw
from safetensors import safe_open

from demo.captions import held_out_example
from demo.sample import load, sample
from tests.picture import COLOURS, Request, Wanted, matches, measure, parse

OVER = 6


def corners(shape, x, y, r):
    """A shape's corners around (x, y), y down, half its larger side being r."""

    def turn(count, start, radii=(1.0,)):
        angles = [start + 2 * math.pi * n / count for n in range(count)]
        lengths = [radii[n % len(radii)] for n in range(count)]
        return [(math.sin(a) * k, -math.cos(a) * k) for a, k in zip(angles, lengths, strict=True)]

    arm = 0.32
    bar = [(arm, 1), (arm, arm), (1, arm), (1, -arm), (arm, -arm), (arm, -1)]
    points = {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(px / 0.866, (py + 0.25) / 0.866) for px, py in turn(3, 0)],
        "star": [(px * 1.05, py * 1.05 + 0.1) for px, py in turn(10, 0, (1.0, 0.42))],
        "diamond": [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)],
        "hexagon": turn(6, math.pi / 6),
        "cross": bar + [(-px, -py) for px, py in bar],
        "heart": [
            (0, 0.9),
            *[
                (0.41 + 0.58 * math.cos(t), -0.33 - 0.58 * math.sin(t))
                for t in np.linspace(-math.pi / 4, 3 * math.pi / 4, 30)
            ],
            *[
                (-0.41 - 0.58 * math.cos(t), -0.33 - 0.58 * math.sin(t))
                for t in np.linspace(3 * math.pi / 4, -math.pi / 4, 30)
            ],
        ],
    }[shape]
    return [(x + r * px, y + r * py) for px, py in points]


def paint(background, things, size=(128, 128)):
    """Draw (colour, shape, x, y, extent) tuples exactly, with anti-aliased edges."""
    height, width = size
    picture = Image.new("RGB", (width * OVER, height * OVER), COLOURS[background])
    pen = ImageDraw.Draw(picture)
    for colour, shape, x, y, extent in things:
        x, y, r = x * width * OVER, y * height * OVER, extent * min(size) * OVER
        if shape in ("circle", "ring"):
            pen.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
            if shape == "ring":
                r *= 0.58
                pen.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[background])
        else:
            pen.polygon(corners(shape, x, y, r), fill=COLOURS[colour])
    return np.asarray(picture.resize((width, height), Image.Resampling.BOX))


SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "hexagon", "cross", "ring")


@pytest.mark.parametrize("size", [(128, 128), (256, 384)])
def test_measurement_is_right_on_exact_pictures(size):
    rng = random.Random(f"{size}")
    trials, right = 100, 0
    for n in range(trials):
        background, *colours = rng.sample(list(COLOURS), 3)
        places = [(0.26, 0.5), (0.74, 0.5)] if n % 2 else [(rng.choice((0.3, 0.5, 0.7)), 0.5)]
        things = [
            (colour, rng.choice(SHAPES), x, y, rng.uniform(0.12, 0.2))
            for colour, (x, y) in zip(colours, places, strict=False)
        ]
        scene = measure(paint(background, things, size))
        found = [(o.colour, o.shape) for o in scene.objects]
        near = len(found) == len(things) and all(
            abs(o.x - t[2]) < 0.02 and abs(o.y - t[3]) < 0.02 and abs(o.extent - t[4]) < 0.02
            for o, t in zip(scene.objects, things, strict=True)
        )
        right += scene.background == background and found == [t[:2] for t in things] and near
    assert right >= 0.99 * trials


def test_every_wrong_word_is_noticed():
    things = [("red", "circle", 0.26, 0.5, 0.17), ("blue", "square", 0.74, 0.5, 0.12)]
    scene = measure(paint("white", things))
    said = "a red circle and a small blue square on a white background"
    assert matches(scene, said).all
    for change, part in {
        ("red", "green"): "colour",
        ("circle", "hexagon"): "shape",
        ("white", "pink"): "background",
        ("small", "large"): "size",
        ("red circle", "red circle on the right"): "place",
        ("red circle and a small blue square", "blue circle and a small red square"): "bound",
    }.items():
        verdict = matches(scene, said.replace(*change))
        assert not getattr(verdict, part), said.replace(*change)
        assert not verdict.all
    assert not matches(scene, "a red circle on a white background").count
    assert not matches(measure(paint("white", [])), said).count


def test_shapes_that_are_none_are_unknown():
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert measure(noise).background == "unknown" or not measure(noise).objects
    bars = [("red", "square", 0.5, y, 0.1) for y in (0.3, 0.4, 0.5, 0.6, 0.7)]
    assert [o.shape for o in measure(paint("white", bars)).objects] == ["unknown"]


def test_captions_are_read():
    assert parse("On a white background, a SMALL red circle at the left") == Request(
        "white", (Wanted("red", "circle", "small", "left"),)
    )
    assert parse("blue star above an orange ring, grey background") == Request(
        "gray",
        (Wanted("blue", "star", None, "top"), Wanted("orange", "ring", None, "bottom")),
    )
    assert parse("a heart") == Request(None, (Wanted(None, "heart"),))


@pytest.fixture(scope="module")
def networks(checkpoint):
    return load(checkpoint)


def verdicts(networks, count, seed, **options):
    rng = random.Random(seed)
    captions = [held_out_example(rng, things=1 + n % 2)[1] for n in range(count)]
    images = []
    for start in range(0, count, 8):
        chosen = captions[start : start + 8]
        seeds = [seed + start + n for n in range(len(chosen))]
        images += list(sample(networks, chosen, seeds, **options))
    return [matches(measure(i), c) for i, c in zip(images, captions, strict=True)]


def share(found, part):
    return sum(getattr(verdict, part) for verdict in found) / len(found)


def test_unseen_captions_are_drawn(networks):
    found = verdicts(networks, 12, seed=100)
    assert share(found, "background") >= 0.9
    assert share(found, "colour") >= 0.85
    assert share(found, "shape") >= 0.75


def test_small_pictures_in_few_steps_have_the_right_colours(networks):
    found = verdicts(networks, 16, seed=200, size=(128, 128), steps=8, cfg=3.0)
    assert share(found, "background") >= 0.9
    assert share(found, "colour") >= 0.8


def test_weights_are_half_precision_and_small(checkpoint):
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 36e6
    for path in checkpoint.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        assert kinds == {"F16"}, path
