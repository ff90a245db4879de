"""Measure what a picture shows, and compare it with a caption; knows nothing of the training code.

`measure` finds the background, then every object with its colour, shape, place and size, from the
pixels alone: nearest named colour, connected components, and the outline as seen from the centroid
(how far the coverage reaches in 72 directions) compared with the outlines of ideal shapes.
`matches` reads a caption with a parser of its own and says which parts of it the picture shows.
"""

import itertools
import math
import re
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

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
NAMES = list(COLOURS)
PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
# A pixel farther than this from every named colour (of 255 a channel) has none.
COLOUR_TOLERANCE = 48.0
# An object whose commonest colour covers less than this share of it has no colour.
DOMINANT_SHARE = 0.6
DIRECTIONS = 72
# Mean difference of the outline, as a fraction of its radius, above which a shape is unknown.
OUTLINE_TOLERANCE = 0.09

# Half of the larger extent over the picture's shorter side.
SMALL_BELOW, LARGE_ABOVE = 0.165, 0.25
SMALL_BELOW_IN_PAIR, LARGE_ABOVE_IN_PAIR = 0.15, 0.195


@dataclass(frozen=True)
class Object:
    """One object: centre of its bounding box and its sides as fractions of the picture's."""

    colour: str
    shape: str
    x: float
    y: float
    width: float
    height: float
    area_fraction: float
    extent: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    background: str
    objects: tuple[Object, ...]


@dataclass(frozen=True)
class Wanted:
    """One object as a caption asks for it; None where it leaves the choice."""

    colour: str | None
    shape: str
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Request:
    """A caption, read."""

    background: str | None
    objects: tuple[Wanted, ...]


@dataclass(frozen=True)
class Verdict:
    """Which parts of a caption the picture shows.

    `colour`, `shape`, `place` and `size` speak of the objects, assigned to the caption's objects as
    well as possible; `bound` says that each object has its own colour and shape.
    """

    colour: bool
    background: bool
    shape: bool
    bound: bool
    place: bool
    size: bool
    count: bool

    @property
    def all(self):
        return self.background and self.bound and self.place and self.size and self.count


def measure(image):
    """Find background and objects.

    Args:
        image: [H, W, 3] uint8.
    Returns:
        A Scene; colours and shapes that fit no known one are called "unknown".
    """
    pixels = np.asarray(image).astype(np.float32)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"image has shape {pixels.shape}, must be [H, W, 3]")
    height, width = pixels.shape[:2]
    side = min(height, width)
    distance = np.stack([np.linalg.norm(pixels - colour, axis=2) for colour in PALETTE])
    label = distance.argmin(0)
    label[distance.min(0) > COLOUR_TOLERANCE] = -1
    background = _background(label)
    if background < 0:
        return Scene("unknown", ())

    # Objects are what is not background, whatever its colour; halos of mixed colour are too thin
    # to survive the erosion.
    far = np.linalg.norm(pixels - PALETTE[background], axis=2) > COLOUR_TOLERANCE
    solid = ndimage.binary_erosion(far, np.ones((3, 3)), border_value=0)
    parts, count = ndimage.label(solid, np.ones((3, 3)))
    sizes = ndimage.sum_labels(solid, parts, range(1, count + 1))
    seeds = [parts == n + 1 for n, size in enumerate(sizes) if size > 0.003 * side * side]
    objects = []
    for index, seed in enumerate(seeds):
        others = seeds[:index] + seeds[index + 1 :]
        objects.append(_object(pixels, background, label, seed, others))
    return Scene(NAMES[background], tuple(sorted(objects, key=lambda o: (o.x, o.y))))


def matches(scene, caption):
    """Compare a measured scene with a caption.

    Args:
        scene: from `measure`.
        caption: a sentence of one or two objects, or a `Request`.
    """
    request = caption if isinstance(caption, Request) else parse(caption)
    background = request.background in (None, scene.background)
    if len(scene.objects) != len(request.objects):
        nothing = dict.fromkeys(("colour", "shape", "bound", "place", "size"), False)
        return Verdict(background=background, count=False, **nothing)
    is_pair = len(request.objects) == 2
    best = None
    for order in itertools.permutations(scene.objects):
        pairs = list(zip(request.objects, order, strict=True))
        colours = [w.colour in (None, o.colour) for w, o in pairs]
        shapes = [w.shape in ("any", o.shape) for w, o in pairs]
        verdict = Verdict(
            colour=all(colours),
            background=background,
            shape=all(shapes),
            bound=all(colours) and all(shapes),
            place=_places_hold(pairs),
            size=all(_size_holds(w.size, o.extent, is_pair) for w, o in pairs),
            count=True,
        )
        score = (sum(colours) + sum(shapes), verdict.place + verdict.size)
        if best is None or score > best[0]:
            best = (score, verdict)
    found = best[1] if best else Verdict(True, background, True, True, True, True, True)
    # Colours and shapes by themselves may be right although they are bound to the wrong object.
    return Verdict(
        colour=found.colour
        or _is_same([w.colour for w in request.objects], [o.colour for o in scene.objects]),
        background=background,
        shape=found.shape
        or _is_same([w.shape for w in request.objects], [o.shape for o in scene.objects]),
        bound=found.bound,
        place=found.place,
        size=found.size,
        count=True,
    )


def _background(label):
    """The commonest colour of a frame around the picture, or -1."""
    rim = max(2, min(label.shape) // 40)
    frame = np.concatenate(
        [label[:rim].ravel(), label[-rim:].ravel(), label[:, :rim].ravel(), label[:, -rim:].ravel()]
    )
    counts = np.bincount(frame + 1, minlength=len(PALETTE) + 1)
    return int(counts.argmax()) - 1


def _object(pixels, background, label, seed, others):
    height, width = seed.shape
    shares = np.bincount(label[seed] + 1, minlength=len(PALETTE) + 1) / seed.sum()
    colour = int(shares.argmax()) - 1
    if shares.max() < DOMINANT_SHARE:
        colour = -1
    base = PALETTE[background]
    inside = seed & (label == colour) if colour >= 0 else seed
    axis = np.median(pixels[inside], axis=0) - base
    # How much of each pixel is object, from 0 to 1: anti-aliased edges give parts of a pixel. The
    # inside counts as whole, or a blotch of another colour would be a hole.
    coverage = ((pixels - base) @ axis / (axis @ axis)).clip(0, 1)
    coverage[seed] = 1
    foreign = np.zeros_like(seed)
    for other in others:
        foreign |= ndimage.binary_dilation(other, iterations=3)
    foreign &= ~ndimage.binary_dilation(seed, iterations=2)
    solid = ndimage.binary_propagation(seed, mask=(coverage > 0.5) & ~foreign)
    near = ndimage.binary_dilation(solid, iterations=2) & ~foreign
    coverage = np.where(near, coverage, 0)
    rows, columns = np.nonzero(solid)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    return Object(
        colour=NAMES[colour] if colour >= 0 else "unknown",
        shape=_shape(coverage, solid),
        x=(left + right) / 2 / width,
        y=(top + bottom) / 2 / height,
        width=(right - left) / width,
        height=(bottom - top) / height,
        area_fraction=float(coverage.sum() / (height * width)),
        extent=max(right - left, bottom - top) / 2 / min(height, width),
    )


def _shape(coverage, solid):
    filled = ndimage.binary_fill_holes(solid)
    hole = (filled & ~solid).sum() / filled.sum()
    if hole > 0.1:
        outer = np.where(filled & ~solid, 1.0, coverage)
        is_round = _closest_outline(outer)[0] == "circle"
        return "ring" if is_round and 0.2 < hole < 0.5 else "unknown"
    shape, difference = _closest_outline(coverage)
    return shape if difference < OUTLINE_TOLERANCE else "unknown"


def _closest_outline(coverage):
    outline = _outline(coverage)
    differences = {name: np.abs(outline - ideal).mean() for name, ideal in OUTLINES.items()}
    name = min(differences, key=differences.get)
    return name, differences[name]


def _outline(coverage):
    """Reach of the coverage in each direction from its centroid; mean square 1."""
    rows, columns = np.indices(coverage.shape)
    total = coverage.sum()
    centre = (coverage * rows).sum() / total, (coverage * columns).sum() / total
    angles = np.arange(DIRECTIONS) * 2 * math.pi / DIRECTIONS
    step = 0.25
    radii = np.arange(step / 2, max(coverage.shape), step)
    samples = ndimage.map_coordinates(
        coverage,
        [
            centre[0] - np.cos(angles)[:, None] * radii,
            centre[1] + np.sin(angles)[:, None] * radii,
        ],
        order=1,
    )
    reach = samples.sum(1) * step
    return reach / np.sqrt((reach**2).mean())


def _ideal_outline(corners):
    """The outline of a polygon, corners (x, y) with y up, through an exact drawing of it."""
    size, over = 240, 4
    grid = (np.arange(size * over) + 0.5) / (size * over) * 2.4 - 1.2
    x, y = np.meshgrid(grid, -grid)
    inside = np.zeros_like(x, dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        crosses = (y0 > y) != (y1 > y)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return _outline(inside.reshape(size, over, size, over).mean((1, 3)))


def _regular(count, start=0.0, radii=(1.0,)):
    turns = [start + 2 * math.pi * n / count for n in range(count)]
    return [
        (radii[n % len(radii)] * math.sin(t), radii[n % len(radii)] * math.cos(t))
        for n, t in enumerate(turns)
    ]


def _heart_corners():
    """Two half discs on a square that stands on its corner."""
    r = math.sqrt(2) / 4
    right = [
        (0.25 + r * math.cos(t), 0.25 + r * math.sin(t))
        for t in np.linspace(-math.pi / 4, 3 * math.pi / 4, 40)
    ]
    return [(0.0, -0.5), *right, *[(-x, y) for x, y in reversed(right)]]


_ARM = 0.32
OUTLINES = {
    "circle": _ideal_outline(_regular(180)),
    "square": _ideal_outline(_regular(4, math.pi / 4)),
    "triangle": _ideal_outline(_regular(3)),
    "star": _ideal_outline(_regular(10, radii=(1.0, 0.42))),
    "heart": _ideal_outline(_heart_corners()),
    "diamond": _ideal_outline([(0, 1), (0.72, 0), (0, -1), (-0.72, 0)]),
    "hexagon": _ideal_outline(_regular(6, math.pi / 6)),
    "cross": _ideal_outline(
        [
            *[(_ARM, 1), (_ARM, _ARM), (1, _ARM), (1, -_ARM), (_ARM, -_ARM), (_ARM, -1)],
            *[(-_ARM, -1), (-_ARM, -_ARM), (-1, -_ARM), (-1, _ARM), (-_ARM, _ARM), (-_ARM, 1)],
        ]
    ),
}


def _is_same(wanted, found):
    """Whether the found names are the wanted ones in some order; None and "any" fit anything."""
    free = (None, "any")
    return any(
        all(w in free or w == f for w, f in zip(wanted, order, strict=True))
        for order in itertools.permutations(found)
    )


def _size_holds(size, extent, is_pair):
    if size == "small":
        return extent < (SMALL_BELOW_IN_PAIR if is_pair else SMALL_BELOW)
    if size == "large":
        return extent > (LARGE_ABOVE_IN_PAIR if is_pair else LARGE_ABOVE)
    return True


def _places_hold(pairs):
    for wanted, found in pairs:
        if wanted.place is None:
            continue
        across = "left" if found.x < 0.42 else "right" if found.x > 0.58 else ""
        along = "top" if found.y < 0.42 else "bottom" if found.y > 0.58 else ""
        if (f"{along} {across}".strip() or "centre") != wanted.place:
            return False
    return True


# Reading captions.

SYNONYMS = {
    "grey": "gray",
    "violet": "purple",
    "disc": "circle",
    "dot": "circle",
    "rhombus": "diamond",
    "plus": "cross",
    "donut": "ring",
    "tiny": "small",
    "little": "small",
    "big": "large",
    "huge": "large",
    "center": "centre",
    "centered": "centre",
    "middle": "centre",
    "upper": "top",
    "lower": "bottom",
    "backdrop": "background",
    "picture": "background",
}
SHAPES = (*OUTLINES, "ring")
RELATIONS = (
    (r"(to the |on the )?left of", ("left", "right")),
    (r"(to the |on the )?right of", ("right", "left")),
    (r"above|over|on top of", ("top", "bottom")),
    (r"below|under|beneath", ("bottom", "top")),
)


def parse(caption):
    """Read a caption: its background, and its objects with colour, size and place."""
    text = caption.lower().replace("five-pointed star", "star")
    text = re.sub(r"\b(a|an) (picture|image|drawing|photo) of\b", " ", text)
    text = re.sub(r"\b(the picture shows|two shapes)\b", " ", text)
    words = re.findall(r"[a-z]+|[,.!:]", text)
    text = " ".join(SYNONYMS.get(word, word) for word in words)
    colours, shapes = "|".join(NAMES), "|".join(SHAPES)

    background = None
    for pattern in (
        rf"\bbackground (?:is |: )({colours})\b(?! (?:{shapes})\b)",
        rf"(?:\b(?:in front of|on|with|against) )?(?:\ba )?\b({colours}) background\b",
        rf"\bon ({colours})\b(?! (?:{shapes})\b)",
    ):
        found = re.search(pattern, text)
        if found:
            background = found[1]
            text = f"{text[: found.start()]} ; {text[found.end() :]}"
            break

    relation = None
    if len(re.findall(rf"\b(?:{shapes})\b", text)) == 2:
        for pattern, places in RELATIONS:
            found = re.search(rf"\b({shapes}) (?:{pattern})(?= .*\b(?:{shapes})\b)", text)
            if found and not re.search(rf"\b(?:{shapes})\b.*\b(?:{shapes})\b", found[0]):
                relation = places
                break

    nouns = list(re.finditer(rf"(?:\b(small|large) )?(?:\b({colours}) )?\b({shapes})\b", text))
    objects = []
    spans = _clauses(text, nouns)
    for index, noun in enumerate(nouns):
        place = relation[index] if relation else _place(text[slice(*spans[index])])
        objects.append(Wanted(noun[2], noun[3], noun[1], place))
    return Request(background, tuple(objects))


def _clauses(text, nouns):
    """The part of the text that speaks of each object: up to the "and" or comma between two."""
    if len(nouns) < 2:
        return [(0, len(text))] * len(nouns)
    between = text[nouns[0].end() : nouns[1].start()]
    cut = re.search(r"\band\b|,|\bnext to\b|\bbeside\b|\bwith\b", between)
    middle = nouns[0].end() + (cut.start() if cut else len(between))
    return [(0, middle), (middle, len(text))]


def _place(clause):
    along = re.search(r"\b(top|bottom)\b", clause)
    across = re.search(r"\b(left|right)\b", clause)
    if along or across:
        return " ".join(found[0] for found in (along, across) if found)
    return "centre" if re.search(r"\bcentre\b", clause) else None
