"""Images that need no download: coloured shapes, drawn on the fly, and scikit-learn's digits.

`python samples.py digits DIR` writes the digits, a small folder of real images to train on.
"""

import argparse
import os

import numpy as np
from PIL import Image, ImageDraw

from configs import stable_seed

SHAPES_TRAIN, SHAPES_VAL = 8_000, 1_000
COLOURS = {"red": (205, 50, 50), "green": (50, 170, 65),
           "blue": (55, 85, 205), "yellow": (205, 190, 50)}
CORNERS = {n: 1j * np.exp(2j * np.pi * (np.arange(n) + 0.5) / n) for n in (3, 4, 32)}  # flat below
OUTLINES = {"circle": CORNERS[32], "square": CORNERS[4], "triangle": CORNERS[3],
            "star": np.exp(2j * np.pi * np.arange(10) / 10) * np.tile([-1j, -0.4j], 5)}
OVERSAMPLING = 4  # outlines are drawn this much larger, then averaged: smooth edges


class Shapes:
    """Coloured shapes on dark grey, drawn on the fly: 16 classes, nothing to download.

    Image `index` is a function of (split, index) alone, and its class is index % 16. Shapes are
    large and upright and the ground is dark: a ViT must learn what a shift, a turn or a contrast
    is, and this dataset is to be learnt in minutes.
    """

    def __init__(self, image_hw: tuple[int, int], split: str):
        self.image_hw, self.split = image_hw, split
        self.classes = [f"{colour} {shape}" for colour in COLOURS for shape in OUTLINES]

    def __len__(self):
        return SHAPES_TRAIN if self.split == "train" else SHAPES_VAL

    def name(self, index: int) -> str:
        return f"shapes/{self.split}/{index}"

    def load(self, index: int) -> tuple[Image.Image, int]:
        (h, w), label = self.image_hw, index % len(self.classes)
        colour, shape = self.classes[label].split()
        rng = np.random.default_rng(stable_seed("shapes", self.split, index))
        size, x, y, turn, shade, *tint = rng.random(8).tolist()
        radius = min(h, w) * (0.36 + 0.1 * size)
        centre = complex(w / 2 + (x - 0.5) * (w / 2 - radius), h / 2 + (y - 0.5) * (h / 2 - radius))
        tilt = np.exp(0.35j * (turn - 0.5))  # up to 10 degrees
        outline = OVERSAMPLING * (centre + radius * tilt * OUTLINES[shape])
        mask = Image.new("L", (w * OVERSAMPLING, h * OVERSAMPLING))
        ImageDraw.Draw(mask).polygon(outline.view(np.float64).tolist(), fill=255)
        image = Image.new("RGB", (w, h), (int(20 + 60 * shade),) * 3)
        paint = tuple(int(c + 50 * t - 25) for c, t in zip(COLOURS[colour], tint))
        image.paste(paint, mask=mask.reduce(OVERSAMPLING))
        noise = np.frombuffer(rng.bytes(h * w * 3), np.uint8).reshape(h, w, 3) >> 3  # 0..31
        # every value is in 20..230, so that the noise of -16..15 cannot leave 0..255
        return Image.fromarray(np.asarray(image) + noise - np.uint8(16)), label


# ----------------------------------------------------------------------------- the digits
def write_digits(folder, size: int = 32) -> dict[str, int]:
    """Writes scikit-learn's 1,797 handwritten digits, grey, size x size pixels, for --data folder:
    FOLDER/train/DIGIT/*.png and, every fifth, FOLDER/val/DIGIT/*.jpg. Returns {split: images}.

    Raises ValueError without scikit-learn, and for a folder that is in use or cannot be written.
    """
    if size < 1:
        raise ValueError(f"--size {size} must be positive")
    try:
        from sklearn.datasets import load_digits  # an optional library, for this function alone
    except ImportError as e:
        raise ValueError("the digits come with scikit-learn: pip install scikit-learn") from e
    digits, counts = load_digits(), {"train": 0, "val": 0}
    try:
        os.makedirs(folder, exist_ok=True)
        if os.listdir(folder):
            raise ValueError(f"{folder} is not empty: give a new folder")
        for i, (grey, digit) in enumerate(zip(digits.images, digits.target)):
            split, ending = ("val", "jpg") if i % 5 == 4 else ("train", "png")
            image = Image.fromarray((grey * 255 / 16).astype(np.uint8))  # 8 x 8 values of 0..16
            image = image.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")
            path = os.path.join(folder, split, str(digit), f"{i:05d}.{ending}")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            image.save(path, quality=95)
            counts[split] += 1
    except OSError as e:
        raise ValueError(f"{folder} cannot be written: {e}") from e
    return counts


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="samples.py", description="Writes images to train on.")
    parser.add_argument("command", choices=["digits"], help="scikit-learn's handwritten digits")
    parser.add_argument("folder", metavar="DIR", help="a new folder; then: train.py --data DIR")
    parser.add_argument("--size", type=int, default=32, help="image side in pixels (default: 32)")
    args = parser.parse_args(argv)
    try:
        counts = write_digits(args.folder, args.size)
    except ValueError as e:
        parser.error(str(e))
    print(", ".join(f"{args.folder}/{split}: {n:,} images" for split, n in counts.items()))


if __name__ == "__main__":
    main()
