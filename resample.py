"""pixels.resize as two Triton kernels, which read the pictures where they lie; pixels.move as one.

A view needs few pixels of each picture, in windows of any size. Two products with whole matrices of
weights (`pixels.resize`, which is this file's test) pad them all to the largest; here a program
computes the weights of its own outputs, and sums as many source pixels as the filter is wide:

    y[a, o] = sum over t of w(|s + t + 1/2 - centre(o)| / reach) x[a, s + t]  /  sum of the same w

    columns    x a picture's window [3, h, w]  ->  bytes [3, h, W]
    rows       x those bytes                   ->  bytes [3, H, W]

Moving pixels (rotation, shear) reads 16 neighbours of each: as whole tensors it took 6 of the 9 ms
of a batch's operations.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _resample(ints, floats, out, out_image, out_plane, out_a, out_o, size, LINES: tl.constexpr,
              OUTPUTS: tl.constexpr):
    """One channel of one image, LINES x OUTPUTS values.

    ints int64 [n, 8]: address, strides of a channel, a line and a pixel, lines, first pixel that
    may be seen and the one behind the last, flip; floats fp32 [n, 2]: where the crop begins and its
    length, in pixels."""
    image, channel = tl.program_id(0) // 3, tl.program_id(0) % 3
    ints += image * 8
    lines = tl.load(ints + 4).to(tl.int32)
    if tl.program_id(1) * LINES >= lines:
        return
    low, high = tl.load(ints + 5).to(tl.int32), tl.load(ints + 6).to(tl.int32)
    line_stride, pixel_stride = tl.load(ints + 2), tl.load(ints + 3)
    source = tl.load(ints).to(tl.pointer_type(tl.uint8)) + channel * tl.load(ints + 1)
    begin, length = tl.load(floats + image * 2), tl.load(floats + image * 2 + 1)
    a = tl.program_id(1) * LINES + tl.arange(0, LINES)
    o = tl.program_id(2) * OUTPUTS + tl.arange(0, OUTPUTS)
    scale = length / size
    reach = tl.maximum(scale, 1.0)
    seen = tl.where(tl.load(ints + 7) != 0, size - 1 - o, o)
    centre = begin + (seen + 0.5) * scale
    first = tl.floor(centre - 2 * reach + 0.5).to(tl.int32)
    line = source + a[:, None].to(tl.int64) * line_stride
    total, norm = tl.zeros([LINES, OUTPUTS], tl.float32), tl.zeros([OUTPUTS], tl.float32)
    for tap in range(0, tl.ceil(4 * reach).to(tl.int32) + 1):
        at = first + tap
        t = tl.abs(at + 0.5 - centre) / reach
        w = tl.where(t < 1, (1.5 * t - 2.5) * t * t + 1, ((2.5 - 0.5 * t) * t - 4) * t + 2)
        w = tl.where((t < 2) & (at >= low) & (at < high), w, 0.0)
        x = tl.load(line + at[None, :].to(tl.int64) * pixel_stride,
                    mask=(a[:, None] < lines) & (w[None, :] != 0), other=0)
        total += w[None, :] * x.to(tl.float32)
        norm += w
    y = tl.floor(total / tl.where(o < size, norm, 1.0)[None, :] + 0.5)
    y = tl.minimum(tl.maximum(y, 0.0), 255.0).to(tl.uint8)
    to = out + image.to(tl.int64) * out_image + channel * out_plane
    tl.store(to + a[:, None] * out_a + o[None, :] * out_o, y,
             mask=(a[:, None] < lines) & (o[None, :] < size))


def resize(pictures: list[torch.Tensor], views, windows, image_hw: tuple[int, int]) -> torch.Tensor:
    """As pixels.resize, on a GPU."""
    n, (height, width), device = len(pictures), image_hw, pictures[0].device
    most = max(bottom - top for top, _, bottom, _ in windows)
    middle = torch.empty(n, 3, most, width, dtype=torch.uint8, device=device)
    out = torch.empty(n, 3, height, width, dtype=torch.uint8, device=device)
    ints, floats = [], []
    for picture, view, (top, left, bottom, right) in zip(pictures, views, windows):
        plane, line, pixel = picture.stride()
        ints.append((picture.data_ptr() + top * line, plane, line, pixel, bottom - top, left, right,
                     view.flip))
        floats.append((view.crop[1], view.crop[3] - view.crop[1]))
    start, step = middle.data_ptr(), middle.stride(0)
    for i, (view, (top, _, bottom, _)) in enumerate(zip(views, windows)):
        ints.append((start + i * step, most * width, 1, width, width, 0, bottom - top, 0))
        floats.append((view.crop[0] - top, view.crop[2] - view.crop[0]))
    ints = torch.tensor(ints, dtype=torch.int64).to(device)
    floats = torch.tensor(floats, dtype=torch.float32).to(device)
    _resample[3 * n, triton.cdiv(most, 16), triton.cdiv(width, 64)](
        ints, floats, middle, *middle.stride()[:3], 1, width, LINES=16, OUTPUTS=64)
    _resample[3 * n, triton.cdiv(width, 64), triton.cdiv(height, 16)](
        ints[n:], floats[n:], out, *out.stride()[:2], 1, width, height, LINES=64, OUTPUTS=16)
    return out


@triton.jit
def _between(v1, v2, v3, v4, d, CUBIC: tl.constexpr):
    """Of four values in a row the one at v2 + d: cubic, a = -1, or linear."""
    if CUBIC:
        return v2 + d * (v3 - v1 + d * (2 * (v1 - v2) + v3 - v4 + d * (v2 - v1 + v4 - v3)))
    return v2 + d * (v3 - v2)


@triton.jit
def _line(plane, y, left, d, height, width, mask, CUBIC: tl.constexpr):
    """Of line y the value between the pixels left and left + 1; outside the edges go on."""
    line = plane + tl.minimum(tl.maximum(y, 0), height - 1) * width
    last = width - 1
    v2 = tl.load(line + tl.minimum(tl.maximum(left, 0), last), mask=mask, other=0).to(tl.float32)
    v3 = tl.load(line + tl.minimum(left + 1, last), mask=mask, other=0).to(tl.float32)
    v1, v4 = v2, v3
    if CUBIC:
        v1 = tl.load(line + tl.maximum(left - 1, 0), mask=mask, other=0).to(tl.float32)
        v4 = tl.load(line + tl.minimum(left + 2, last), mask=mask, other=0).to(tl.float32)
    return _between(v1, v2, v3, v4, d, CUBIC)


@triton.jit
def _move(x, matrices, out, height, width, fill, CUBIC: tl.constexpr, PIXELS: tl.constexpr):
    """PIXELS of one image, all channels: x, out uint8 [n, 3, H, W], matrices float64 [n, 6]."""
    image, at = tl.program_id(0), tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    row, column = (at // width).to(tl.float64) + 0.5, (at % width).to(tl.float64) + 0.5
    m = matrices + image * 6
    u = tl.load(m) * column + tl.load(m + 1) * row + tl.load(m + 2)
    v = tl.load(m + 3) * column + tl.load(m + 4) * row + tl.load(m + 5)
    there = (u >= 0) & (u < width) & (v >= 0) & (v < height) & (at < height * width)
    left, top = tl.floor(u - 0.5), tl.floor(v - 0.5)
    du, dv = (u - 0.5 - left).to(tl.float32), (v - 0.5 - top).to(tl.float32)
    left, top = left.to(tl.int32), top.to(tl.int32)
    for channel in range(3):
        plane = (image * 3 + channel).to(tl.int64) * height * width
        v2 = _line(x + plane, top, left, du, height, width, there, CUBIC)
        v3 = _line(x + plane, top + 1, left, du, height, width, there, CUBIC)
        v1, v4 = v2, v3
        if CUBIC:
            v1 = _line(x + plane, top - 1, left, du, height, width, there, CUBIC)
            v4 = _line(x + plane, top + 2, left, du, height, width, there, CUBIC)
        y = tl.minimum(tl.maximum(_between(v1, v2, v3, v4, dv, CUBIC), 0.0), 255.0)
        tl.store(out + plane + at, tl.where(there, y, fill).to(tl.uint8), mask=at < height * width)


def move(x: torch.Tensor, matrices: torch.Tensor, cubic: bool, fill: int) -> torch.Tensor:
    """As pixels.move, on a GPU: no fused multiply-adds, so that bytes are cut off where its are."""
    out, (n, _, height, width) = torch.empty_like(x), x.shape
    _move[n, triton.cdiv(height * width, 256)](
        x, matrices, out, height, width, float(fill), cubic, 256, enable_fp_fusion=False)
    return out
