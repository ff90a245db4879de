"""Draw scenes as anti-aliased pictures with signed distance functions, in torch on any device."""

import math

import torch

from demo.captions import COLOURS, SHAPES

PALETTE = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 127.5 - 1
COLOUR_INDEX = {name: index for index, name in enumerate(COLOURS)}
SHAPE_INDEX = {name: index for index, name in enumerate(SHAPES)}


def pack(scenes):
    """Turn scenes into one tensor that travels between processes.

    Returns:
        [N, 11] fp32: background, then colour, shape, x, y, extent of two things; shape -1 is none.
    """
    rows = []
    for scene in scenes:
        row = [COLOUR_INDEX[scene.background]]
        for thing in scene.things:
            row += [COLOUR_INDEX[thing.colour], SHAPE_INDEX[thing.shape]]
            row += [thing.x, thing.y, thing.extent]
        rows.append(row + [0, -1, 0, 0, 1] * (2 - len(scene.things)))
    return torch.tensor(rows, dtype=torch.float32)


def draw(packed, height, width, device):
    """Paint packed scenes.

    Args:
        packed: [N, 11] fp32 on the CPU, from `pack`.
        height, width: size in pixels.
        device: where to draw.
    Returns:
        [N, 3, height, width] fp32 in [-1, 1].
    """
    # Every copy to a GPU waits for it, so all that is needed travels at once, sorted by shape.
    order = packed[:, [2, 7]].argsort(0)
    counts = [packed[:, slot].long().add(1).bincount(minlength=len(SHAPES) + 1) for slot in (2, 7)]
    packed, order = packed.to(device), order.to(device)
    palette = PALETTE.to(device)
    picture = palette[packed[:, 0].long()][:, :, None, None]
    picture = picture.expand(-1, -1, height, width).contiguous()
    side = min(height, width)
    rows = torch.arange(height, device=device, dtype=torch.float32)[None, :, None] + 0.5
    columns = torch.arange(width, device=device, dtype=torch.float32)[None, None, :] + 0.5
    for slot, start in enumerate((1, 6)):
        groups = order[:, slot].split(counts[slot].tolist())
        for distance, chosen in zip(DISTANCES, groups[1:], strict=True):
            if len(chosen) == 0:
                continue
            colour, _, x, y, extent = packed[chosen, start : start + 5].unbind(1)
            scale = (extent * side)[:, None, None]
            u = (columns - (x * width)[:, None, None]) / scale
            v = ((y * height)[:, None, None] - rows) / scale
            coverage = (0.5 - distance(u, v) * scale).clamp(0, 1)[:, None]
            paint = palette[colour.long()][:, :, None, None]
            picture[chosen] = torch.lerp(picture[chosen], paint, coverage)
    return picture


def _circle(u, v):
    return torch.hypot(u, v) - 1


def _square(u, v):
    return torch.maximum(u.abs(), v.abs()) - 1


def _sector(u, v, count):
    """Polar coordinates folded into one of `count` equal sectors, the first of them upright."""
    angle = torch.atan2(u, v)
    turn = 2 * math.pi / count
    angle = (torch.remainder(angle + turn / 2, turn) - turn / 2).abs()
    radius = torch.hypot(u, v)
    return radius * angle.sin(), radius * angle.cos()


def _triangle(u, v):
    radius = 2 / math.sqrt(3)
    side, out = _sector(u, v - (math.sqrt(3) / 2 - radius), 3)
    return (out - radius) * math.sin(math.pi / 6) + side * math.cos(math.pi / 6)


def _hexagon(u, v):
    # Corners to the left and right, flat above.
    side, out = _sector(v, u, 6)
    return (out - 1) * math.cos(math.pi / 6) + side * math.sin(math.pi / 6)


def _star(u, v):
    radius = 1 / math.cos(math.pi / 10)
    inner = 0.42 * radius
    lift = radius * (1 - math.cos(math.pi / 5)) / 2
    side, out = _sector(u, v + lift, 5)
    # The edge from the tip (0, radius) to the notch at 36 degrees.
    edge_side, edge_out = inner * math.sin(math.pi / 5), inner * math.cos(math.pi / 5) - radius
    length = math.hypot(edge_side, edge_out)
    return (edge_side * (out - radius) - edge_out * side) / length


def _heart(u, v):
    # Inigo Quilez, "2D distance functions": a heart 1.2071 wide and 1.1036 high, tip at the origin.
    scale = 0.60355
    x, y = u.abs() * scale, v * scale + 0.5518
    lobe = torch.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    low = 0.5 * (x + y).clamp(min=0)
    flank = torch.minimum(torch.hypot(x, y - 1), torch.hypot(x - low, y - low))
    flank = flank * torch.sign(x - y)
    return torch.where(x + y > 1, lobe, flank) / scale


def _diamond(u, v):
    width = 0.72
    return (u.abs() + (v.abs() - 1) * width) / math.hypot(1, width)


def _cross(u, v):
    arm = 0.32
    u, v = u.abs(), v.abs()
    upright = torch.maximum(u - arm, v - 1)
    return torch.minimum(upright, torch.maximum(u - 1, v - arm))


def _ring(u, v):
    return (torch.hypot(u, v) - 0.79).abs() - 0.21


DISTANCES = (_circle, _square, _triangle, _star, _heart, _diamond, _hexagon, _cross, _ring)
