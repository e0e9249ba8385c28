"""What makes a recipe strong: the random views of training; and the exact view of evaluation.

A view is uint8 [3, H, W], of image_hw = (H, W) pixels. Workers make it on the CPU, all but NeMo's
colour jitter: a worker only draws that, and `normalize` applies it to whole batches on the device.
Every draw is from torch's default generator, which `data.Views` seeds for each view, and restores.
"""

import functools

import numpy as np
import torch
from PIL import Image

# One resampling filter everywhere, so that training and evaluation see the same sharpness.
# Bicubic, because Google's and timm's ViT weights were trained and are evaluated with it.
BICUBIC = Image.Resampling.BICUBIC


# ----------------------------------------------------------------------------- in the workers
def train_transform(config, image_hw: tuple[int, int]):
    """The random view of config.augmentation, a function of a PIL image, picklable.

    Resizing is torch's, on bytes: a third of the time of Pillow's. The colour jitter of NeMo's list
    costs more than all the rest here and is left to the device, after the others: `color_jitter`.
    """
    if config.augmentation == "none":
        return eval_transform(config, image_hw)
    from torchvision.transforms import v2  # seconds, which whoever only evaluates need not wait
    steps = [_to_tensor, v2.RandomResizedCrop(image_hw, scale=(config.crop_scale, 1.0),
                                              interpolation=BICUBIC)]
    if config.augmentation in ("crop-flip", "nemo"):
        steps += [v2.RandomHorizontalFlip()]
    if config.augmentation == "nemo":  # in Pillow, as only that turns bicubically; NeMo's grey 128
        steps += [_to_pil, v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, interpolation=BICUBIC,
                                          fill=128), _to_tensor]
    return functools.partial(_in_turn, steps)


def eval_transform(config, image_hw: tuple[int, int]):
    """The view of evaluation, `centre_view` at config.crop_ratio, as `train_transform` gives it."""
    view = functools.partial(centre_view, image_hw=image_hw, crop_ratio=config.crop_ratio)
    return functools.partial(_in_turn, [view, _to_tensor])


def centre_view(image: Image.Image, image_hw: tuple[int, int], crop_ratio: float) -> Image.Image:
    """Resizes to cover image_hw / crop_ratio, aspect kept, then cuts the centre image_hw.

    For a square, torchvision's Resize(round(side / crop_ratio)) and CenterCrop(side). Done as one
    resize of the part that is kept, so a 1 x 20,000 image costs no more than any other.
    """
    h, w = image_hw
    cover_h, cover_w = round(h / crop_ratio), round(w / crop_ratio)
    if cover_w * image.height >= cover_h * image.width:  # the width decides the scale
        resized_h, resized_w = int(cover_w * image.height / image.width), cover_w
    else:
        resized_h, resized_w = cover_h, int(cover_h * image.width / image.height)
    top, left = round((resized_h - h) / 2), round((resized_w - w) / 2)
    y, x = image.height / resized_h, image.width / resized_w  # source pixels per resized pixel
    return image.resize((w, h), BICUBIC, box=(left * x, top * y, (left + w) * x, (top + h) * y))


def _in_turn(steps, image):
    for step in steps:
        image = step(image)
    return image


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _to_pil(view: torch.Tensor) -> Image.Image:
    """v2.ToPILImage of uint8 [3, H, W], in a sixth of its time: planes need no transposition."""
    return Image.merge("RGB", [Image.fromarray(plane) for plane in view.numpy()])


# ----------------------------------------------------------------------------- on the device
def normalize(images: torch.Tensor, mean, std, dtype: torch.dtype,
              jitter: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [b, 3, H, W], jittered if rows [b, 8] are given, to (x / 255 - mean) / std of dtype.

    Computed in fp32. Compiles to one graph, and never makes the host wait.
    """
    x = images.float() / 255
    if jitter is not None:
        x = color_jitter(x, jitter)
    return torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1).to(dtype)


# torchvision's ColorJitter(0.4, 0.4, 0.4, 0.1), which is NeMo's: its operations, in its order, with
# the least and the greatest factor; the hue's are shares of a turn.
JITTER = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.6, 1.4),
          "hue": (-0.1, 0.1)}
CONTRAST, SATURATION, HUE = 1, 2, 3  # their numbers in that order


def draw_jitter() -> torch.Tensor:
    """One draw of that ColorJitter, float32 [8]: the order of the four operations, as their
    numbers, then their factors. Draws exactly what torchvision does."""
    order = torch.randperm(4)
    return torch.cat([order, *(torch.empty(1).uniform_(*limits) for limits in JITTER.values())])


def color_jitter(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """torchvision's ColorJitter on float x [b, 3, H, W] in 0..1, image i as rows[i] of [b, 8] says.

    NeMo jitters before AutoAugment; here it comes after, as in timm: both draw independently of
    the image, so each keeps its distribution, but AutoAugment's grey fill is jittered too.
    Each image has its own order, and a batch has one program: blends, hue, blends, where a blend
    that is not this image's turn has factor 1.
    """
    order, factors = rows[:, :4], rows[:, 4:]
    factor = factors.gather(1, order.long())  # [b, 4]: of the first operation, the second, ...
    hue_slot = (order == HUE).int().argmax(1, keepdim=True)
    slot = torch.arange(4, device=x.device)
    before, after = factor.where(slot < hue_slot, 1), factor.where(slot > hue_slot, 1)
    for i in range(3):
        x = _blend(x, order[:, i], before[:, i])
    x = _shift_hue(x, factors[:, HUE])
    for i in range(1, 4):
        x = _blend(x, order[:, i], after[:, i])
    return x


def _blend(x: torch.Tensor, operation: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Moves x [b, 3, H, W] by factor [b] away from what operation [b] blends with: black for
    brightness, the mean grey for contrast, each pixel's grey for saturation."""
    operation, factor = operation.view(-1, 1, 1, 1), factor.view(-1, 1, 1, 1)
    grey = (0.2989 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None]
    mean = grey.mean((2, 3), keepdim=True)
    other = grey.where(operation == SATURATION, mean * (operation == CONTRAST))
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def _shift_hue(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Turns the hue of RGB x [b, 3, H, W] by shift [b] turns; value and chroma stay."""
    r, g, b = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    scale = 1 / chroma.where(chroma > 0, 1)  # grey has no hue, and chroma 0 below
    sixths = torch.where((r >= g) & (r >= b), (g - b) * scale,
                         torch.where(g >= b, 2 + (b - r) * scale, 4 + (r - g) * scale))
    sixths = sixths + 6 * shift.view(-1, 1, 1)
    # a channel falls below value by chroma, on a trapezoid over the circle of hues
    k = torch.stack([(sixths + n) % 6 for n in (5, 3, 1)], 1)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)
