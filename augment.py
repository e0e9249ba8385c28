"""What makes a recipe strong: random views, mixing, targets; and the exact view of evaluation.

A view is uint8 [3, H, W], of image_hw = (H, W) pixels. Workers draw its numbers and make it on the
CPU, if not device_views does, all but colour jitter and mixing: a worker only draws those, `draws`,
and `normalize` applies them to whole batches on the device. Every draw is from torch's default
generator, which `data.Views` seeds for each view, and restores.

    in a worker     crop, flip, AutoAugment or RandAugment or one of 3-Augment, erasing -> uint8
    on the device   / 255, colour jitter, (x - mean) / std, mixing of images 2k and 2k + 1
    the targets     x = w x_own + (1 - w) x_partner  ->  t = w t_own + (1 - w) t_partner, smoothed
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# One resampling filter everywhere, so that training and evaluation see the same sharpness.
# Bicubic, because Google's and timm's ViT weights were trained and are evaluated with it.
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


# ----------------------------------------------------------------------------- a view as numbers
class View(NamedTuple):
    """What one view shows of an image: all that was drawn for it, in pixels and torchvision's
    magnitudes. Whoever makes the pixels, a worker or the device (`device_views`), reads this."""
    crop: tuple[float, float, float, float]  # top, left, bottom, right of what is resized
    alone: bool = True  # the resizing filter sees nothing beyond the crop
    flip: bool = False
    operations: tuple[tuple[str, float], ...] = ()  # name, magnitude; in turn
    erased: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, height, width in the view


def train_transform(config, image_hw: tuple[int, int]):
    """The random view of config.augmentation, a function of a PIL image, picklable."""
    return (CentreView if config.augmentation == "none" else RandomView)(config, image_hw)


def eval_transform(config, image_hw: tuple[int, int]):
    """The view of evaluation, `centre_view` at config.crop_ratio, as `train_transform` gives it."""
    return CentreView(config, image_hw)


class RandomView:
    """Random crop and flip, then of config.augmentation

    nemo            AutoAugment's ImageNet policy; its colour jitter is left to the device
    randaugment     torchvision's: N of 14 operations at magnitude M of 30 (timm's m9 is 27 of
                    these, with other operations), bilinear, black where an image was turned
    trivialaugment  torchvision's TrivialAugmentWide, likewise
    3-augment       of DeiT-III (arXiv:2204.07118): grey, solarized or blurred; then jitter likewise

    and erasing. `draw` draws what torchvision's transforms draw, in their order, from the sizes
    alone; `apply` makes the pixels. Resizing is torch's, on bytes: a third of the time of Pillow's.
    Pillow turns images faster.
    """

    def __init__(self, config, image_hw: tuple[int, int]):
        from torchvision.transforms import v2  # seconds, which whoever only evaluates need not wait
        policies = {
            "crop": None, "crop-flip": None, "3-augment": None,
            "nemo": v2.AutoAugment(interpolation=BICUBIC, fill=128),
            "randaugment": v2.RandAugment(*config.rand_augment, interpolation=BILINEAR),
            "trivialaugment": v2.TrivialAugmentWide(interpolation=BILINEAR)}
        name = config.augmentation
        assert name in policies, f"--augmentation {name} has no view"
        self.image_hw, self.policy, self.flips = image_hw, policies[name], name != "crop"
        self.three = name == "3-augment"
        self.turned = (BICUBIC, 128) if name == "nemo" else (BILINEAR, 0)  # filter, what is outside
        self.crop = v2.RandomResizedCrop(image_hw, scale=(config.crop_scale, 1.0))
        # with the mean, to a byte: 0 once normalised, torchvision's default
        self.grey = [round(255 * value) for value in config.mean]
        self.erasing = v2.RandomErasing(config.random_erasing, value=self.grey)

    def draw(self, source_hw: tuple[int, int]) -> View:
        """The view of an image of this height and width."""
        crop = self.crop.make_params([_blank(source_hw)])
        flip = self.flips and bool(torch.rand(1) < 0.5)
        operations, erased = (), (0, 0, 0, 0)
        if self.policy:
            operations = _drawn(self.policy, self.image_hw)
        elif self.three:
            operations = (_draw_three(),)
        if self.erasing.p and torch.rand(1) < self.erasing.p:
            box = self.erasing.make_params([_blank(self.image_hw)])
            if box["v"] is not None:
                erased = tuple(box[side] for side in ("i", "j", "h", "w"))
        top, left = crop["top"], crop["left"]
        return View((top, left, top + crop["height"], left + crop["width"]), True, flip, operations,
                    erased)

    def apply(self, image: Image.Image | torch.Tensor, view: View) -> torch.Tensor:
        from torchvision.transforms.v2 import functional as v2
        top, left, bottom, right = view.crop
        pixels = image if isinstance(image, torch.Tensor) else _to_tensor(image)
        pixels = v2.resize(pixels[:, top:bottom, left:right], self.image_hw, BICUBIC)
        if view.flip:
            pixels = pixels.flip(2)
        if self.policy and view.operations:
            image = _to_pil(pixels)
            for name, magnitude in view.operations:
                image = self.policy._apply_image_or_video_transform(
                    image, name, magnitude, self.policy.interpolation, self.policy._fill)
            pixels = _to_tensor(image)
        for name, magnitude in view.operations if self.three else ():
            if name == "Grey":
                pixels = v2.rgb_to_grayscale(pixels, 3)
            elif name == "Solarize":
                pixels = v2.solarize(pixels, 255 * magnitude)
            else:
                pixels = v2.gaussian_blur(pixels, [BLUR, BLUR], [magnitude, magnitude])
        top, left, height, width = view.erased
        if height * width:
            box = torch.tensor(self.grey, dtype=torch.uint8)[:, None, None]
            pixels = pixels.clone()
            pixels[:, top:top + height, left:left + width] = box
        return pixels

    def __call__(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        """Of a PIL image, or of bytes [3, height, width]."""
        source_hw = image.shape[1:] if isinstance(image, torch.Tensor) else image.size[::-1]
        return self.apply(image, self.draw(tuple(source_hw)))


class CentreView:
    """`centre_view` at config.crop_ratio; nothing is drawn."""

    def __init__(self, config, image_hw: tuple[int, int]):
        self.image_hw, self.crop_ratio = image_hw, config.crop_ratio

    def draw(self, source_hw: tuple[int, int]) -> View:
        return View(centre_box(source_hw, self.image_hw, self.crop_ratio), alone=False)

    def apply(self, image: Image.Image, view: View) -> torch.Tensor:
        return _to_tensor(_resize(image, view.crop, self.image_hw))

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return _to_tensor(centre_view(image, self.image_hw, self.crop_ratio))


BLUR = 13  # the side of 3-augment's blur, in pixels


def _draw_three() -> tuple[str, float]:
    """v2.RandomChoice of grey, RandomSolarize(128, p=1) and GaussianBlur(13, (0.1, 2.0))."""
    choice = int(torch.multinomial(torch.full((3,), 1 / 3), 1))
    if choice == 0:
        return "Grey", 0.0
    if choice == 1:
        torch.rand(1)  # whether to solarize: always
        return "Solarize", 128 / 255
    return "Blur", torch.empty(1).uniform_(0.1, 2.0).item()  # of sigma, in pixels


def _drawn(policy, image_hw: tuple[int, int]) -> tuple[tuple[str, float], ...]:
    """What a policy of torchvision would do to an image of this size."""
    drawn = []

    def note(image, name, magnitude, interpolation, fill):
        drawn.append((name, magnitude))
        return image
    policy._apply_image_or_video_transform = note
    policy(_blank(image_hw))
    del policy._apply_image_or_video_transform  # the class's is there again
    return tuple(drawn)


@functools.lru_cache(16)
def _blank(image_hw: tuple[int, int]) -> torch.Tensor:
    """An image of this size in one byte: what is drawn depends on the size alone."""
    return torch.zeros(1, 1, 1, dtype=torch.uint8).expand(3, *image_hw)


def centre_box(source_hw: tuple[int, int], image_hw: tuple[int, int], crop_ratio: float):
    """(top, left, bottom, right) in source pixels of the centre image_hw of an image that was
    resized to cover image_hw / crop_ratio, aspect kept.

    For a square, torchvision's Resize(round(side / crop_ratio)) and CenterCrop(side). Done as one
    resize of the part that is kept, so a 1 x 20,000 image costs no more than any other.
    """
    (height, width), (h, w) = source_hw, image_hw
    cover_h, cover_w = round(h / crop_ratio), round(w / crop_ratio)
    if cover_w * height >= cover_h * width:  # the width decides the scale
        resized_h, resized_w = int(cover_w * height / width), cover_w
    else:
        resized_h, resized_w = cover_h, int(cover_h * width / height)
    top, left = round((resized_h - h) / 2), round((resized_w - w) / 2)
    y, x = height / resized_h, width / resized_w  # source pixels per resized pixel
    return top * y, left * x, (top + h) * y, (left + w) * x


def centre_view(image: Image.Image, image_hw: tuple[int, int], crop_ratio: float) -> Image.Image:
    """The part of `centre_box`, resized to image_hw."""
    return _resize(image, centre_box((image.height, image.width), image_hw, crop_ratio), image_hw)


def _resize(image: Image.Image, box, image_hw: tuple[int, int]) -> Image.Image:
    top, left, bottom, right = box
    return image.resize(image_hw[::-1], BICUBIC, box=(left, top, right, bottom))


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _to_pil(view: torch.Tensor) -> Image.Image:
    """v2.ToPILImage of uint8 [3, H, W], in a sixth of its time: planes need no transposition."""
    return Image.merge("RGB", [Image.fromarray(plane) for plane in view.numpy()])


# ----------------------------------------------------------------------------- drawn there
# torchvision's ColorJitter, its operations in its order, with the least and the greatest factor;
# the hue's are shares of a turn. NeMo's is 0.4, 0.4, 0.4, 0.1, DeiT-III's 0.3, 0.3, 0.3.
JITTER = {
    "nemo": {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.6, 1.4),
             "hue": (-0.1, 0.1)},
    "3-augment": {"brightness": (0.7, 1.3), "contrast": (0.7, 1.3), "saturation": (0.7, 1.3),
                  "hue": (0.0, 0.0)}}
CONTRAST, SATURATION, HUE = 1, 2, 3  # their numbers in that order


def draws(config, image_hw: tuple[int, int]) -> dict[str, torch.Tensor]:
    """What the device does to one view, rows by the name of normalize's argument; none for none."""
    rows = {}
    if config.augmentation in JITTER:
        rows["jitter"] = draw_jitter(JITTER[config.augmentation])
    if config.mixup or config.cutmix:
        rows["mix"] = draw_mix(config.mixup, config.cutmix, image_hw)
    return rows


def draw_jitter(factors: dict[str, tuple[float, float]]) -> torch.Tensor:
    """One draw of that ColorJitter, float32 [8]: the order of the four operations, as their
    numbers, then their factors. Draws exactly what torchvision does (and a hue, where it has none).
    """
    order = torch.randperm(4)
    return torch.cat([order, *(torch.empty(1).uniform_(*limits) for limits in factors.values())])


def draw_mix(mixup: float, cutmix: float, image_hw: tuple[int, int]) -> torch.Tensor:
    """How two images mix, float32 [5]: the share w that each keeps of itself, and CutMix's box
    (top, left, bottom, right) in pixels, which is empty for mixup. With both, either by even odds.

    Mixup (arXiv:1710.09412): w ~ Beta(mixup, mixup). CutMix (arXiv:1905.04899): 1 - Beta(cutmix,
    cutmix) of the area is cut around a uniform centre, and w is what is left after clipping the box
    to the image. Draws exactly what torchvision's MixUp and CutMix do.
    """
    cut = cutmix > 0 and (not mixup or bool(torch.rand(()) < 0.5))
    alpha = torch.tensor([float(cutmix if cut else mixup)])
    share = torch.distributions.Beta(alpha, alpha, validate_args=False).sample()
    if not cut:
        return torch.cat([share, torch.zeros(4)])
    h, w = image_hw
    x, y = int(torch.randint(w, ())), int(torch.randint(h, ()))
    half = 0.5 * math.sqrt(1 - share)
    half_h, half_w = int(half * h), int(half * w)
    top, left, bottom, right = (max(y - half_h, 0), max(x - half_w, 0), min(y + half_h, h),
                                min(x + half_w, w))
    return torch.tensor([1 - (bottom - top) * (right - left) / (h * w), top, left, bottom, right])


# ----------------------------------------------------------------------------- on the device
def normalize(images: torch.Tensor, mean, std, dtype: torch.dtype,
              jitter: torch.Tensor | None = None, mix: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [b, 3, H, W], jittered if rows [b, 8] are given, to (x / 255 - mean) / std of dtype,
    mixed if rows [b, 5] are given.

    Computed in fp32. Compiles to one graph, and never makes the host wait.
    """
    x = images.float() / 255
    if jitter is not None:
        x = color_jitter(x, jitter)
    x = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    if mix is not None:
        x = mix_pairs(x, mix)
    return x.to(dtype)


def partners(x: torch.Tensor) -> torch.Tensor:
    """x [b, ...] with each pair of neighbours, 2k and 2k + 1, exchanged."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def pair_rows(mix: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The rows [b, 5] by which images are mixed: of each pair the first image's, or w = 1 and no
    box where one of the two is unreadable (label -100)."""
    both = (labels >= 0) & (partners(labels) >= 0)
    alone = torch.eye(1, 5, device=mix.device)
    return mix[0::2].repeat_interleave(2, 0).where(both[:, None], alone)


def mix_pairs(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x [b, 3, H, W], each image mixed with its partner as rows [b, 5] of `pair_rows` say."""
    share, top, left, bottom, right = rows[:, :, None, None].unbind(1)               # [b, 1, 1]
    y, z = (torch.arange(n, device=x.device) for n in x.shape[2:])
    inside = ((y[:, None] >= top) & (y[:, None] < bottom)) & ((z >= left) & (z < right))
    weight = torch.where(bottom > top, (~inside).float(), share)[:, None]            # [b, 1, H, W]
    return weight * x + (1 - weight) * partners(x)


def soft_targets(labels: torch.Tensor, mix: torch.Tensor | None, classes: int,
                 smoothing: float) -> torch.Tensor:
    """Labels [b] as fp32 [b, K]: w of an image's class and 1 - w of its partner's (`pair_rows`),
    then (1 - s) t + s / K. An unreadable image, label -100, has a row of zeros: no loss at all."""
    one_hot = (labels[:, None] == torch.arange(classes, device=labels.device)).float()
    targets = one_hot
    if mix is not None:
        targets = mix[:, :1] * one_hot + (1 - mix[:, :1]) * partners(one_hot)
    readable = (labels >= 0)[:, None].float()
    return (1 - smoothing) * targets + smoothing / classes * readable


def loss_sum(logits: torch.Tensor, targets: torch.Tensor, kind: str) -> torch.Tensor:
    """The loss of logits [b, K] and targets [b, K], summed over images; a row of zeros has none.

    ce     cross-entropy, -sum of t log p over the classes
    bce    DeiT-III's: the mean of K binary ones, where each class with a share in t counts as 1
    """
    if kind == "ce":
        return F.cross_entropy(logits, targets, reduction="sum")
    readable = (targets.sum(1, keepdim=True) > 0).float()
    return F.binary_cross_entropy_with_logits(
        logits, (targets > 0).float(), readable, reduction="sum") / targets.shape[1]


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
