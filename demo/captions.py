"""Scenes of one or two flat shapes, and the many ways to say them.

A scene is drawn from a small world: colours, shapes, sizes and places below. `HELD_OUT_ONE` and
`HELD_OUT_TWO` are wordings that training never shows, and one attribute combination in ten is kept
from training by a stable hash (`is_held_out`), so that tests ask for what the networks never saw.
"""

import random
import zlib
from dataclasses import dataclass, field

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (35, 75, 220),
    "yellow": (245, 220, 40),
    "orange": (245, 135, 20),
    "purple": (130, 45, 170),
    "pink": (250, 150, 195),
    "brown": (125, 75, 40),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
    "gray": (128, 128, 128),
    "cyan": (40, 200, 220),
}
# Trained like the others, but often mottled or taken for each other: not promised to anybody.
UNRELIABLE_COLOURS = ("gray", "purple")
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "hexagon", "cross", "ring")
SIZES = ("small", "large")

# Half of the shape's larger extent, as a fraction of the picture's shorter side.
EXTENT = {"small": (0.12, 0.14), None: (0.19, 0.22), "large": (0.29, 0.32)}
EXTENT_OF_TWO = {"small": (0.11, 0.13), None: (0.165, 0.185), "large": (0.215, 0.225)}

# Centre of the shape as fractions of width and height.
PLACES = {
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
    "centre": (0.5, 0.5),
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
}

SYNONYMS = {
    "gray": ("grey",),
    "purple": ("violet",),
    "circle": ("disc", "dot"),
    "diamond": ("rhombus",),
    "cross": ("plus",),
    "ring": ("donut",),
    "star": ("five-pointed star",),
    "small": ("tiny", "little"),
    "large": ("big", "huge"),
}
PLACE_PHRASES = {
    "left": ("on the left", "at the left", "on the left side", "to the left", "left"),
    "right": ("on the right", "at the right", "on the right side", "to the right", "right"),
    "top": ("at the top", "near the top", "on top", "in the upper half", "top"),
    "bottom": ("at the bottom", "near the bottom", "on the bottom", "in the lower half", "bottom"),
    "centre": (
        "in the centre",
        "in the center",
        "in the middle",
        "at the center",
        "at the centre",
        "centered",
        "centre",
    ),
    "top left": ("in the top left corner", "at the top left", "in the upper left corner"),
    "top right": ("in the top right corner", "at the top right", "in the upper right corner"),
    "bottom left": ("in the bottom left corner", "at the bottom left", "in the lower left corner"),
    "bottom right": (
        "in the bottom right corner",
        "at the bottom right",
        "in the lower right corner",
    ),
}
# For two things: the place of the first, of the second, and words that say it as a relation.
ARRANGEMENTS = {
    ("left", "right"): ("left of", "to the left of", "on the left of"),
    ("right", "left"): ("right of", "to the right of", "on the right of"),
    ("top", "bottom"): ("above", "over", "on top of"),
    ("bottom", "top"): ("below", "under", "beneath"),
}
BESIDE = ("next to", "beside", "and", "with")

BACKGROUNDS = (
    "on a {bg} background",
    "on a {bg} background",
    "on a {bg} background",
    "on {bg}",
    "against a {bg} background",
    "on a {bg} backdrop",
    "with a {bg} background",
    "in front of a {bg} background",
)
OPENINGS = ("a picture of", "a drawing of", "an image of", "a photo of", "draw", "there is")
FILLERS = ("beautiful", "simple", "flat", "nice", "clean", "high quality", "minimal", "vector art")

ONE = (
    "{thing} {where} {on}",
    "{thing} {where} {on}",
    "{thing} {on} {where}",
    "{on}, {thing} {where}",
    "{on} {thing} {where}",
    "{where}, {thing} {on}",
    "{where} {thing} {on}",
    "{opening} {thing} {where} {on}",
    "{opening} {thing} {on}, {where}",
    "{thing}, {where}, {bg} background",
    "{thing}, {bg} background, {where}",
    "{bg} background, {thing}, {where}",
    "{bg} background with {thing} {where}",
    "a {bg} background with {thing} {where}",
    "a {bg} picture with {thing} {where}",
    "{thing} {where}. the background is {bg}",
    "the background is {bg}. {thing} {where}",
    "background: {bg}, {thing} {where}",
)
HELD_OUT_ONE = (
    "an illustration showing {thing} {where} {on}",
    "please paint {thing} {where} {on}",
    "{on} we see {thing} {where}",
    "the picture shows {thing} {where}, {bg} background",
    "{thing}! {where}! {bg} background!",
)
TWO = (
    "{first} and {second} {on}",
    "{first} and {second} {on}",
    "{first} and {second} {on}",
    "{on}, {first} and {second}",
    "{on} {first} and {second}",
    "{first}, {second}, {bg} background",
    "{bg} background, {first} and {second}",
    "{opening} {first} and {second} {on}",
    "two shapes {on}: {first} and {second}",
    "{bg} background with {first} and {second}",
    "a {bg} picture with {first} and {second}",
    "{first} and {second}. the background is {bg}",
)
RELATED = (
    "{first} {relation} {second} {on}",
    "{first} {relation} {second} {on}",
    "{on}, {first} {relation} {second}",
    "{on} {first} {relation} {second}",
    "{opening} {first} {relation} {second} {on}",
    "{first} {relation} {second}, {bg} background",
    "{bg} background, {first} {relation} {second}",
)
HELD_OUT_TWO = (
    "an illustration showing {first} and {second} {on}",
    "please paint {first} and {second} {on}",
    "{on} we see {first} and {second}",
    "the picture shows {first} and {second}, {bg} background",
    "both {first} and {second} {on}",
)


@dataclass
class Thing:
    """One shape. `extent` is half its larger side over the picture's shorter side."""

    colour: str
    shape: str
    size: str | None = None
    place: str | None = None
    x: float = 0.5
    y: float = 0.5
    extent: float = 0.2


@dataclass
class Scene:
    """What is drawn, and whether the caption leaves the background to the painter."""

    background: str
    things: list[Thing] = field(default_factory=list)
    is_background_said: bool = True


def is_held_out(scene):
    """Whether training must never see this combination of attributes, whatever its wording."""
    said = [f"{t.size} {t.colour} {t.shape} {t.place}" for t in scene.things]
    return zlib.crc32(" and ".join([*said, scene.background]).encode()) % 10 == 0


def training_example(rng: random.Random):
    """Draw a scene that is not held out, and one of its wordings."""
    scene = _scene(rng)
    while is_held_out(scene):
        scene = _scene(rng)
    return scene, caption(scene, rng)


def held_out_example(rng: random.Random, things=None, is_any_colour=False):
    """Draw a scene that training never saw; half of the wordings are new to it too.

    Args:
        rng: source of randomness.
        things: 1 or 2 shapes; None takes either.
        is_any_colour: take the unreliable colours too.
    """

    def is_fit(scene):
        colours = {scene.background, *(thing.colour for thing in scene.things)}
        return is_held_out(scene) and (is_any_colour or colours.isdisjoint(UNRELIABLE_COLOURS))

    scene = _scene(rng, things, is_background_said=True)
    while not is_fit(scene):
        scene = _scene(rng, things, is_background_said=True)
    return scene, caption(scene, rng, is_wording_held_out=rng.random() < 0.5)


def caption(scene, rng, is_wording_held_out=False):
    """Say a scene in one of its wordings.

    Args:
        scene: one or two things on a background.
        rng: source of randomness.
        is_wording_held_out: take a sentence that training never uses.
    """
    parts = {"bg": _word(scene.background, rng), "opening": rng.choice(OPENINGS)}
    parts["on"] = rng.choice(BACKGROUNDS).format(bg=parts["bg"])
    things = [_noun_phrase(thing, rng) for thing in scene.things]
    if len(things) == 1:
        parts["thing"] = things[0]
        parts["where"] = _where(scene.things[0].place, rng)
        pattern = rng.choice(HELD_OUT_ONE if is_wording_held_out else ONE)
    else:
        arrangement = (scene.things[0].place, scene.things[1].place)
        parts["first"], parts["second"] = things
        is_related = rng.random() < 0.5
        if is_wording_held_out:
            pattern = rng.choice(HELD_OUT_TWO)
        elif arrangement == (None, None):
            parts["relation"] = rng.choice(BESIDE)
            pattern = rng.choice(RELATED if rng.random() < 0.2 else TWO)
        elif is_related:
            parts["relation"] = rng.choice(ARRANGEMENTS[arrangement])
            pattern = rng.choice(RELATED)
        else:
            pattern = rng.choice(TWO)
        if arrangement != (None, None) and "{relation}" not in pattern:
            is_place_first = rng.random() < 0.2
            for name, thing in zip(("first", "second"), scene.things, strict=True):
                words = [parts[name], _where(thing.place, rng)]
                parts[name] = " ".join(reversed(words) if is_place_first else words)
    if not scene.is_background_said:
        pattern = rng.choice(("{thing} {where}", "{opening} {thing} {where}"))
        if len(things) == 2:
            pattern = rng.choice(("{first} and {second}", "{opening} {first} and {second}"))
    return _tidy(pattern.format(**parts))


def training_words(text, rng):
    """Now and then add words without a meaning here, so that strangers' prompts do no harm."""
    if rng.random() < 0.08:
        filler = rng.choice(FILLERS)
        return f"{text}, {filler}" if rng.random() < 0.5 else f"{filler}, {text}"
    return text


def _scene(rng, things=None, is_background_said=None):
    count = things or (2 if rng.random() < 0.55 else 1)
    if is_background_said is None:
        is_background_said = rng.random() < 0.93
    colours = rng.sample(list(COLOURS), 3)
    background = colours.pop()
    if not is_background_said:
        background = "black" if "white" in colours[:count] else "white"
        colours = [c if c != background else "red" for c in colours]
    if count == 1:
        size = rng.choice(SIZES) if rng.random() < 0.5 else None
        place = rng.choice(list(PLACES)) if rng.random() < 0.6 else None
        thing = Thing(
            colours[0], rng.choice(SHAPES), size, place, extent=rng.uniform(*EXTENT[size])
        )
        x, y = PLACES[place or "centre"]
        room, jitter = thing.extent + 0.02, 0.03 if place else 0.09
        thing.x = min(max(x + rng.uniform(-jitter, jitter), room), 1 - room)
        thing.y = min(max(y + rng.uniform(-jitter, jitter), room), 1 - room)
        return Scene(background, [thing], is_background_said)
    pair = [Thing(c, rng.choice(SHAPES)) for c in colours]
    if rng.random() < 0.15 and pair[0].shape != pair[1].shape:
        pair[1].colour = pair[0].colour
    arrangement = rng.choice(list(ARRANGEMENTS)) if rng.random() < 0.4 else (None, None)
    is_sized = rng.random() < 0.3
    for thing, place, side in zip(pair, arrangement, ("left", "right"), strict=True):
        thing.place = place
        thing.size = rng.choice((None, *SIZES)) if is_sized else None
        thing.extent = rng.uniform(*EXTENT_OF_TWO[thing.size])
        x, y = PLACES[place or side]
        across, along = (0.012, 0.05) if y == 0.5 else (0.05, 0.012)
        thing.x = x + rng.uniform(-across, across)
        thing.y = y + rng.uniform(-along, along)
    return Scene(background, pair, is_background_said)


def _noun_phrase(thing, rng):
    words = [_word(thing.size, rng)] if thing.size else []
    words += [_word(thing.colour, rng), _word(thing.shape, rng)]
    article = rng.choices(("a", "", "the", "one"), (85, 10, 3, 2))[0]
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    return " ".join([article, *words])


def _where(place, rng):
    return rng.choice(PLACE_PHRASES[place]) if place else ""


def _word(word, rng):
    if word in SYNONYMS and rng.random() < 0.12:
        return rng.choice(SYNONYMS[word])
    return word


def _tidy(text):
    """One space between words, no space before punctuation, and no punctuation twice."""
    text = " ".join(text.split())
    for mark in ",.!:":
        text = text.replace(f" {mark}", mark)
    for doubled, single in ((",,", ","), (",.", "."), ("!!", "!"), ("a orange", "an orange")):
        text = text.replace(doubled, single)
    return text.strip(" ,")
