"""Pictures of results: parts of a page (figures with captions, charts as SVG) and a contact sheet.

Nothing here knows of runs or models. report.css is the look of a page; a colour is a name of it.
"""

import base64
import io
import math
import unicodedata
from html import escape as esc

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps


def figure(title: str, text: str = "", *, above: str = "", below: str = "", kind: str = "") -> str:
    """A figure with what is above and below its caption, a title and words (HTML); kind: a class
    of report.css."""
    kind = f' class="{kind}"' if kind else ""
    return (f"<figure{kind}>{above}<figcaption><b>{title}</b> {text}</figcaption>{below}"
            "</figure>")


# ----------------------------------------------------------------------------- charts
def ticks(low: float, high: float, scale=float) -> list[tuple[float, str]]:
    """(place, label) of round numbers x in low <= scale(x) <= high: about five; on a log scale
    powers of ten, and their double and half where these are few, or even steps."""
    numbers = [m * 10.0 ** power for power in range(-12, 13) for m in (1, 2, 5)]
    first, last = (low, high) if scale is float else (math.exp(low), math.exp(high))
    if scale is float or high - low < 2:
        step = next(number for number in numbers if number >= (last - first) / 5)
        numbers = [i * step for i in range(math.ceil(first / step - 1e-9),
                                           math.ceil(last / step) + 1)]
    elif high - low > 5:
        numbers = numbers[::3]
    slack = 1e-9 * (high - low)
    return [(scale(x), f"{x:,.6g}") for x in numbers if low - slack <= scale(x) <= high + slack]


def chart(title: str, unit: str, series: list[tuple], x_label: str, scale=float, marks=()) -> str:
    """A figure of lines with axes, or nothing without a point.

    series: (name, a colour of report.css, whether points are marked, [(x, y), ...]); of more than
    240 points, means of neighbours. scale: of y, float or math.log; marks: dashed at these x.
    """
    lines = []
    for *style, points in series:
        points = [(x, scale(y)) for x, y in points if y > 0 or scale is float]
        size = max(math.ceil(len(points) / 240), 1)
        means = [np.mean(points[i:i + size], 0) for i in range(0, len(points), size)]
        lines += [(*style, means)] if points else []
    if not lines:
        return ""
    points = np.concatenate([means for *_, means in lines])
    width, height, left, right, top, bottom = 380, 230, 50, 370, 10, 192
    (x0, y0), (x1, y1) = np.min(points, 0), np.max(points, 0)
    x1, y0 = max(x1, x0 + 1), min(y0, 0) if scale is float else y0 - 0.1
    y1 = max(y1, y0 + 1e-6)

    def at(x, y):
        return (f"{left + (x - x0) / (x1 - x0) * (right - left):.1f} "
                f"{bottom - (y - y0) / (y1 - y0) * (bottom - top):.1f}")
    svg, keys = f'<text class="end" x="{right}" y="{height - 6}">{x_label}</text>', ""
    for y, label in ticks(y0, y1, scale):
        svg += (f'<path class="grid" d="M{at(x0, y)}L{at(x1, y)}"/><text class="end" dy="4" '
                f'x="{left - 6}" y="{at(x0, y).split()[1]}">{label}</text>')
    for x, label in ticks(x0, x1):
        svg += f'<text class="middle" x="{at(x, y0).split()[0]}" y="{bottom + 16}">{label}</text>'
    for x in marks:
        svg += f'<path class="mark" d="M{at(x, y0)}L{at(x, y1)}"/>'
    for name, colour, dots, means in lines:
        places = [at(*point) for point in means]
        svg += f'<path class="line" style="stroke:var({colour})" d="M{"L".join(places)}"/>'
        for x, y in map(str.split, places if dots else ()):
            svg += f'<circle cx="{x}" cy="{y}" r="2.5" style="fill:var({colour})"/>'
        keys += (f'<span class="key{" dots" if dots else ""}" style="--c:var({colour})">'
                 f"{esc(name)}</span>" if name else "")
    return figure(title, f"{unit} {keys}", below=f'<svg role=img viewBox="0 0 {width} {height}" '
                                                 f'aria-label="{title}">{svg}</svg>')


# ----------------------------------------------------------------------------- pictures
def img(image: Image.Image, title: str = "", kind: str = "JPEG") -> str:
    """An element that holds its picture; a JPEG at most 160 pixels wide and high."""
    file = io.BytesIO()
    if kind == "JPEG":
        image.thumbnail((160, 160))
    image.save(file, kind, quality=85)
    text = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="" title="{esc(title)}" src="data:image/{kind.lower()};base64,{text}">'


# Of matplotlib's viridis (CC0): even steps of lightness, the same to colour-blind eyes.
VIRIDIS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])


def viridis(values: np.ndarray) -> np.ndarray:
    """Values in 0..1 [...] -> colours uint8 [..., 3]."""
    at = np.linspace(0, 1, len(VIRIDIS))
    return np.stack([np.interp(values, at, channel) for channel in VIRIDIS.T], -1).astype(np.uint8)


def mosaic(cells: np.ndarray) -> Image.Image:
    """Pictures uint8 [rows, columns, h, w, 3] side by side, one clear pixel between them."""
    cells = np.pad(cells, [(0, 0)] * 4 + [(0, 1)], constant_values=255)        # opaque
    cells = np.pad(cells, [(0, 0)] * 2 + [(0, 1)] * 2 + [(0, 0)])              # clear
    rows, columns, h, w, _ = cells.shape
    return Image.fromarray(cells.transpose(0, 2, 1, 3, 4).reshape(rows * h, columns * w, 4))


SHEET, COLUMNS, TILE, CAPTION = 30, 6, 176, 44  # images, images in a row, pixels


def contact_sheet(images: list[tuple[Image.Image, str, str]]) -> Image.Image:
    """(image, title, note) of at most SHEET images, each on a tile with its caption below."""
    fonts = [ImageFont.load_default(size) for size in (15, 13)]
    columns, pad = min(COLUMNS, len(images)), 12
    width, height, rows = TILE + pad, TILE + CAPTION + pad, math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * width + pad, rows * height + pad), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, *caption) in enumerate(images):
        x, y = pad + i % columns * width, pad + i // columns * height
        draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), fill=(238, 238, 238))
        tile = ImageOps.contain(image, (TILE, TILE), Image.Resampling.BICUBIC)
        sheet.paste(tile, (x + (TILE - tile.width) // 2, y + (TILE - tile.height) // 2))
        for text, font, top, grey in zip(caption, fonts, (4, 23), (20, 110)):
            text = unicodedata.normalize("NFKD", text)  # Pillow's own font is ASCII: u for u-umlaut
            text = "".join(c for c in text if not unicodedata.combining(c))
            text = text.encode("ascii", "replace").decode()
            while draw.textlength(text, font) > TILE:
                text = text[:-4] + "..."
            draw.text((x, y + TILE + top), text, fill=(grey,) * 3, font=font)
    return sheet
