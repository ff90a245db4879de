"""Draw a sheet of sampled pictures with their captions below.

python -m demo.contact_sheet --out docs/pictures/contact_sheet.png
"""

import argparse
import random
import textwrap

from PIL import Image, ImageDraw, ImageFont

from demo.captions import held_out_example
from demo.sample import load, sample


def sheet(images, captions, columns, thumb=168):
    """Lay out equally large pictures in rows, each over its caption; returns a palette image."""
    font = ImageFont.load_default(size=11)
    cell = (thumb + 10, thumb + 58)
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * cell[0] + 10, rows * cell[1] + 10), "white")
    pen = ImageDraw.Draw(canvas)
    for index, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = 10 + index % columns * cell[0], 10 + index // columns * cell[1]
        picture = Image.fromarray(pixels)
        picture.thumbnail((thumb, thumb), Image.Resampling.LANCZOS)
        canvas.paste(picture, (x, y))
        pen.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline="#bbbbbb")
        text = "\n".join(textwrap.wrap(caption, 27)[:4])
        pen.multiline_text((x, y + picture.height + 3), text, fill="#222222", font=font, spacing=1)
    return canvas.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default="demo/checkpoint")
    parser.add_argument("--out", default="docs/pictures/contact_sheet.png")
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--count", type=int, default=36)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=8.0)
    parser.add_argument("--sampler", choices=("euler", "dpmpp_2m"), default="euler")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    captions = [held_out_example(rng)[1] for _ in range(args.count)]
    seeds = [args.seed * 1000 + index for index in range(args.count)]
    parts, images = load(args.checkpoint, args.device), []
    for start in range(0, args.count, 12):
        part = slice(start, start + 12)
        size = (args.height, args.width)
        images += list(
            sample(parts, captions[part], seeds[part], size, args.steps, args.cfg, args.sampler)
        )
    sheet(images, captions, args.columns).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
