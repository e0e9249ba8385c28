"""A worker's view on a whole batch: crop and resize, the operations, erasing, from drawn numbers.

On any device, in a number of kernels that does not depend on the number of images. What Pillow and
torch do to one image of bytes is done here to many, their rounding included, so that the pixels are
those of `RandomView.apply` and `CentreView.apply`, but for

    resizing    weights in fp16 on a GPU, else fp32, where torch has 16-bit integers
    turning     fp32 instead of fp64 before a value is cut off to a byte

Shapes: n images, H x W pixels of a view, h x w of the largest window: the source pixels that an
image's view needs. Bytes are uint8.
"""

import math

import torch
import torch.nn.functional as F

from augment import BICUBIC, BLUR, View


# ----------------------------------------------------------------------------- crop and resize
def window(view: View, source_hw: tuple[int, int], image_hw: tuple[int, int]):
    """(top, left, bottom, right) of the pixels that the resizing filter sees."""
    if view.alone:
        return view.crop
    sides = []
    for axis in (0, 1):
        first, last = view.crop[axis], view.crop[axis + 2]
        reach = 2 * max((last - first) / image_hw[axis], 1)
        sides.append((max(math.floor(first - reach), 0),
                      min(math.ceil(last + reach), source_hw[axis])))
    return sides[0][0], sides[1][0], sides[0][1], sides[1][1]


def resize(pictures: list[torch.Tensor], views: list[View], windows, image_hw: tuple[int, int]):
    """Pictures uint8 [3, height, width] on the device -> their crops, flipped where the view says
    so, uint8 [n, 3, H, W].

    Antialiased bicubic, columns first, and bytes between the two passes, as Pillow and torch do it.
    In fp16 on a GPU: bytes less 128 are exact there, and sums have an error below 0.1 of a step.
    """
    device, (height, width) = pictures[0].device, image_hw
    dtype = torch.half if device.type == "cuda" else torch.float
    h, w = (max(box[axis + 2] - box[axis] for box in windows) for axis in (0, 1))
    x = torch.zeros(len(pictures), 3, h, w, dtype=torch.uint8, device=device)
    for padded, picture, (top, left, bottom, right) in zip(x, pictures, windows):
        padded[:, :bottom - top, :right - left] = picture[:, top:bottom, left:right]
    numbers = torch.tensor([[*view.crop, *box, view.flip] for view, box in zip(views, windows)],
                           dtype=torch.double).to(device)
    crop, box, flip = numbers[:, :4], numbers[:, 4:8], numbers[:, 8]
    down, across = (_weights(crop[:, axis] - box[:, axis], crop[:, axis + 2] - crop[:, axis],
                             box[:, axis + 2] - box[:, axis], flip * axis, size, padded).to(dtype)
                    for axis, size, padded in ((0, height, h), (1, width, w)))
    x = _bytes((x.to(dtype) - 128).flatten(1, 2) @ across.mT)                    # [n, 3 h, W]
    x = (x.to(dtype) - 128).unflatten(1, (3, h)).transpose(1, 2).flatten(2)      # [n, h, 3 W]
    return _bytes(down @ x).unflatten(2, (3, width)).transpose(1, 2).contiguous()


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return (x.float() + 128).round().clamp(0, 255).byte()


def _weights(first, length, inside, flip, size: int, padded: int) -> torch.Tensor:
    """Of each image the matrix fp32 [n, size, padded] of an antialiased bicubic resize, a = -0.5,
    of the pixels first to first + length (not whole) of `inside` ones; all float64 [n]."""
    out = torch.arange(size, dtype=torch.double, device=first.device)
    out = out + flip[:, None] * (size - 1 - 2 * out)                             # [n, size]
    scale = length / size
    centre = first[:, None] + (out + 0.5) * scale[:, None]
    pixel = torch.arange(padded, dtype=torch.double, device=first.device)
    t = ((pixel + 0.5 - centre[:, :, None]) / scale.clamp(min=1)[:, None, None]).abs().float()
    weights = torch.where(t < 1, (1.5 * t - 2.5) * t * t + 1,
                          (((2.5 - 0.5 * t) * t - 4) * t + 2).where(t < 2, 0))
    weights = weights * (pixel < inside[:, None])[:, None]
    return weights / weights.sum(2, keepdim=True)


# ----------------------------------------------------------------------------- operations
# Each: bytes x [n, 3, H, W], magnitudes float64 [n] -> bytes, as Pillow computes them.
def _by_table(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """table [n, 1 or 3, 256]: what each byte becomes."""
    table = table.clamp(0, 255).byte().expand(-1, 3, -1)
    return table.gather(2, x.flatten(2).long()).view_as(x)


def _levels(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(256, device=x.device).view(1, 1, 256)


def _factor(m: torch.Tensor, dims: int) -> torch.Tensor:
    return (1 + m).float().view(-1, *[1] * dims)


def _mix(other, x, factor):
    """Image.blend, before it is cut off to bytes."""
    return other + factor * (x - other)


def _grey(x: torch.Tensor) -> torch.Tensor:
    """Image.convert("L"), int32 [n, 1, H, W]."""
    r, g, b = x.int().unbind(1)
    return ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16)[:, None]


def contrast(x, m):
    mean = (_grey(x).double().mean((2, 3)) + 0.5).floor()[..., None]
    return _by_table(x, _mix(mean.float(), _levels(x).float(), _factor(m, 2)))


def color(x, m):
    return _mix(_grey(x).float(), x.float(), _factor(m, 3)).clamp(0, 255).byte()


def sharpness(x, m):
    """Blends with ImageFilter.SMOOTH: 13ths of the pixel, 5, and its neighbours, 1 each, but for
    the outermost pixels."""
    smooth = x.float()
    kernel = torch.ones(3, 1, 3, 3, device=x.device)
    kernel[:, :, 1, 1] = 5
    if min(x.shape[2:]) > 2:
        total = F.conv2d(smooth, kernel, groups=3)  # whole numbers below 2^12: exact, also in tf32
        smooth[:, :, 1:-1, 1:-1] = (total / 13 + 0.5).floor()
    return _mix(smooth, x.float(), _factor(m, 3)).clamp(0, 255).byte()


def posterize(x, m):
    return _by_table(x, _levels(x) & (256 - 2 ** (8 - m.long().view(-1, 1, 1))))


def solarize(x, m):
    levels = _levels(x)
    return _by_table(x, torch.where(levels < 255 * m.view(-1, 1, 1), levels, 255 - levels))


def autocontrast(x, m):
    low, high = x.flatten(2).amin(2, True).double(), x.flatten(2).amax(2, True).double()
    scale = torch.full_like(low, 255) / (high - low)  # 255 / x would be 255 times 1 / x
    table = (_levels(x) * scale + -low * scale).trunc()
    return _by_table(x, table.where(high > low, _levels(x)))


def equalize(x, m):
    n = 3 * len(x)
    bins = x.flatten(2).long() + 256 * torch.arange(n, device=x.device).view(-1, 3, 1)
    counts = torch.zeros(n * 256, dtype=torch.int, device=x.device)
    counts.scatter_add_(0, bins.flatten(), counts.new_ones(1).expand(bins.numel()))
    counts = counts.view(-1, 3, 256).long()
    last = counts.gather(2, (_levels(x) * (counts > 0)).amax(2, True))
    step = (counts.sum(2, True) - last) // 255
    table = (step // 2 + counts.cumsum(2) - counts) // step.clamp(min=1)
    return _by_table(x, table.where(step > 0, _levels(x)))


def grey(x, m):
    from torchvision.transforms.v2 import functional as v2
    return v2.rgb_to_grayscale(x, 3)


def blur(x, m):
    """v2.gaussian_blur, each image with its own sigma m."""
    side = torch.linspace(-1, 1, BLUR, device=x.device) * (BLUR - 1) / (2 * math.sqrt(2))
    kernel = torch.softmax(-(side / m.float()[:, None]) ** 2, 1).repeat_interleave(3, 0)[:, None]
    padded = F.pad(x.float(), [BLUR // 2] * 4, "reflect").flatten(0, 1)[None]

    def along(x, kernel):  # F.conv2d, without cuDNN's tf32: to set its flags is not for threads
        return torch._convolution(x, kernel, None, (1, 1), (0, 0), (1, 1), False, (0, 0),
                                  len(kernel), False, False, False, False)
    return along(along(padded, kernel[..., None]), kernel[:, :, None]).round().byte().view_as(x)


OPERATIONS = {
    "Brightness": lambda x, m: _by_table(x, _levels(x).float() * _factor(m, 2)),
    "Contrast": contrast, "Color": color, "Sharpness": sharpness, "Posterize": posterize,
    "Solarize": solarize, "AutoContrast": autocontrast, "Equalize": equalize,
    "Invert": lambda x, m: 255 - x, "Identity": lambda x, m: x, "Grey": grey, "Blur": blur}


def _matrix(name: str, magnitude: float, image_hw: tuple[int, int]) -> list[float] | None:
    """[a, b, c, d, e, f] of an operation that moves pixels: what is at (x, y) comes from
    (a x + b y + c, d x + e y + f); None for another operation."""
    height, width = image_hw
    if name == "Rotate":
        angle = -math.radians(magnitude % 360)
        cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
        x, y = width / 2, height / 2
        return [cos, sin, -cos * x - sin * y + x, -sin, cos, sin * x - cos * y + y]
    shift = float(int(magnitude))
    return {"ShearX": [1, magnitude, 0, 0, 1, 0], "ShearY": [1, 0, 0, magnitude, 1, 0],
            "TranslateX": [1, 0, -shift, 0, 1, 0],
            "TranslateY": [1, 0, 0, 0, 1, -shift]}.get(name)


def move(x: torch.Tensor, matrices: torch.Tensor, cubic: bool, fill: int) -> torch.Tensor:
    """Image.transform(AFFINE) of bytes x [n, 3, H, W] by float64 matrices [n, 6]: bicubic, a = -1,
    or bilinear, cut off to bytes; `fill` where nothing was."""
    n, _, height, width = x.shape
    a, b, c, d, e, f = matrices.view(n, 6, 1, 1).unbind(1)
    row, column = (torch.arange(size, device=x.device) + 0.5 for size in (height, width))
    u = a * column + b * row[:, None] + c                                        # [n, H, W]
    v = d * column + e * row[:, None] + f
    there = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    left, top = (u - 0.5).floor(), (v - 0.5).floor()
    du, dv = (u - 0.5 - left).float()[:, None], (v - 0.5 - top).float()[:, None]
    taps, between = ((-1, 0, 1, 2), _cubic) if cubic else ((0, 1), _mix)
    columns = [(left + tap).clamp(0, width - 1).long() for tap in taps]
    lines, flat = [], x.float().flatten(2)
    for tap in taps:
        start = (top + tap).clamp(0, height - 1).long() * width
        values = [flat.gather(2, (start + at).view(n, 1, -1).expand(-1, 3, -1)).view(x.shape)
                  for at in columns]
        lines.append(between(*values, du))
    return between(*lines, dv).clamp(0, 255).where(there[:, None], fill).byte()


def _cubic(v1, v2, v3, v4, d):
    return v2 + d * (v3 - v1 + d * (2 * (v1 - v2) + v3 - v4 + d * (v2 - v1 + v4 - v3)))


# ----------------------------------------------------------------------------- whole batches
def augment(images: torch.Tensor, views: dict[int, View], transform, move=move) -> None:
    """The operations and the erasing of these rows, in place: slot by slot, of each kind together.
    transform: the RandomView that drew them."""
    image_hw, device, steps = tuple(images.shape[2:]), images.device, []
    for slot in range(max((len(view.operations) for view in views.values()), default=0)):
        kinds = {}
        for i, view in views.items():
            for name, magnitude in view.operations[slot:slot + 1]:
                matrix = _matrix(name, magnitude, image_hw)
                numbers = kinds.setdefault("move" if matrix else name, [])
                numbers.append([i, *(matrix or [magnitude])])
        steps += [(name, torch.tensor(numbers, dtype=torch.double))
                  for name, numbers in kinds.items()]
    # one copy: each would wait for what runs on this stream
    flat = torch.cat([numbers.flatten() for _, numbers in steps] or [torch.empty(0)]).to(device)
    for (name, host), numbers in zip(steps, flat.split([x.numel() for _, x in steps])):
        rows, numbers = numbers.view_as(host).split([1, host.shape[1] - 1], 1)
        rows = rows[:, 0].long()
        if name == "move":
            resample, fill = transform.turned
            images[rows] = move(images[rows], numbers.contiguous(), resample == BICUBIC, fill)
        else:
            images[rows] = OPERATIONS[name](images[rows], numbers[:, 0])
    erased = {i: view.erased for i, view in views.items() if math.prod(view.erased[2:])}
    if erased:
        rows = torch.tensor(list(erased)).to(device)
        boxes = torch.tensor(list(erased.values())).to(device)
        colour = torch.tensor(transform.grey, dtype=torch.uint8).to(device)
        top, left, height, width = boxes.view(-1, 4, 1, 1).unbind(1)
        y, x = (torch.arange(size, device=device) for size in image_hw)
        y = y[:, None]
        inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
        images[rows] = colour.view(3, 1, 1).where(inside[:, None], images[rows])
