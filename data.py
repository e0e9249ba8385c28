"""Where images come from: two sources, one order, one random view per image, exact evaluation.

Which images form a batch, and how each looks, are functions of the seed and the step alone:

    image number   i = k * G + j                  the j-th image of global batch k, of G images
    epoch, index   e, order(n, seed, e)[i % n]    with e = i // n: the stream has no end, a batch
                                                  may hold the end of an epoch and the next start
    pixels         view(load(index), RNG seeded with (seed, e, index))

No rank, world size, micro-batch, worker or resume point is in these lines, so none changes what
the model sees. Nothing here draws from the global random generators.

Shapes: b images of a micro-batch on one rank, n images of a split, H x W pixels (image_hw).
A batch is images uint8 [b, 3, H, W], labels int64 [b], indices int64 [b], with

    label >= 0, index >= 0    an image
    label -100, index >= 0    an unreadable image, drawn black: the loss ignores label -100
    label -100, index -1      padding of an evaluation batch, drawn black

and, when training with --augmentation nemo, the rows float32 [b, 8] of `color_jitter`: workers draw
them with the view's generator, and the device applies them in `normalize`.
"""

import functools
import math
import os
import shutil
import signal
import sys
import threading
import unicodedata
import warnings

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from configs import TrainConfig, stable_seed

IGNORE = -100  # the default ignore_index of F.cross_entropy
PADDING = -1   # index of an image that only fills a batch
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Pillow refuses images above twice this many pixels (a "decompression bomb"): here above 2^28,
# so that a 20,000 x 10,000 panorama loads (its own limit refuses that) and 1 GiB is the most.
Image.MAX_IMAGE_PIXELS = 1 << 27


# ----------------------------------------------------------------------------- one image file
UPRIGHT = dict(zip(range(2, 9), (  # how to turn an image, by its EXIF orientation
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90)))


def decode(file) -> Image.Image:
    """Reads a path or an open file as an upright 8-bit RGB image: first frame, alpha dropped.

    Alpha is dropped, not composited, as in torchvision and timm. Raises whatever Pillow raises
    on a file that is no image, is cut short or is too large.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's on damaged EXIF and palette transparency
        with Image.open(file) as image:
            image.load()
            try:
                orientation = image.getexif().get(0x0112)  # after load: TIFF turns itself there
            except Exception:  # noqa: BLE001 damaged EXIF does not make an image unreadable
                orientation = None
            if image.mode[0] in "IF":  # Pillow's own conversion would clip these to white
                image = Image.fromarray(_to_8_bits(np.asarray(image), image.mode))
            if image.mode != "RGB":  # else convert() would copy it
                image = image.convert("RGB")
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _to_8_bits(grey: np.ndarray, mode: str) -> np.ndarray:
    """Scales grey [H, W] of 16 or 32 bits, or real, to 0..255 by the white its values fit under."""
    grey = np.nan_to_num(grey.astype(np.float64), posinf=0, neginf=0)
    whites = {"I": (2**16 - 1, 2**31 - 1), "F": (1, 255, grey.max())}.get(mode, (2**16 - 1,))
    white = next(white for white in whites if grey.max() <= white)
    return (grey * (255 / white)).round().clip(0, 255).astype(np.uint8)


# ----------------------------------------------------------------------------- sources of images
class ImageFolder:
    """The images of ROOT/SPLIT/CLASS/**: a compact index of n paths, made by `scan_folder`; or,
    flat, those of ROOT/SPLIT/**, made by `scan_flat`.

    names    uint8 [total bytes]   every path below its class folder (or the split), end to end
    offsets  int64 [n + 1]         path i is names[offsets[i]:offsets[i + 1]]
    labels   int32 [n]             the class of image i

    Three arrays, because reading a Python list of paths in forked workers touches the reference
    count of each string and so copies the whole list, page by page, into every worker.
    """

    def __init__(self, root, split, classes: list[str], names, offsets, labels, flat=False):
        self.root, self.split, self.classes, self.flat = os.fspath(root), split, classes, flat
        self.names, self.offsets, self.labels = names, offsets, labels

    def __len__(self):
        return len(self.labels)

    def name(self, index: int) -> str:
        """The path below ROOT: SPLIT/CLASS/.../FILE."""
        path = self.names[self.offsets[index]:self.offsets[index + 1]].tobytes()
        folder = "" if self.flat else self.classes[self.labels[index]]
        return os.path.join(self.split, folder, os.fsdecode(path))

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The decoded image and its label; raises what `decode` raises."""
        return decode(os.path.join(self.root, self.name(index))), int(self.labels[index])


def scan_folder(root, split: str) -> ImageFolder:
    """Lists the images of ROOT/SPLIT/CLASS/**, classes and paths sorted, hidden names left out.

    Raises ValueError, with the layout that is expected, for a missing folder, images outside the
    class folders, no class folder, and class folders without an image.
    """
    folder = os.path.join(root, split)
    expected = f"expected {os.path.join(root, split, 'CLASS', 'image.jpg')}"
    for path in (root, folder):
        if not os.path.isdir(path):
            raise ValueError(f"--data: no folder {path}; {expected}, or --data shapes")
    classes, flat = [], []
    for entry in sorted(os.listdir(folder)):
        if not entry.startswith("."):
            is_class = os.path.isdir(os.path.join(folder, entry))
            (classes if is_class else flat).append(entry)
    flat = [entry for entry in flat if entry.lower().endswith(EXTENSIONS)]
    if flat:
        raise ValueError(f"--data: {len(flat)} images such as {flat[0]} lie flat in {folder}, "
                         f"outside any class folder; {expected}"
                         + (", or name their classes with --val-labels" if split == "val" else ""))
    if not classes:
        raise ValueError(f"--data: {folder} has no class folders; {expected}")

    names, lengths, counts = bytearray(), [], []
    for label in classes:
        paths = sorted(_image_paths(os.path.join(folder, label)))
        names += b"".join(paths)
        lengths.append(np.fromiter(map(len, paths), np.int64, len(paths)))
        counts.append(len(paths))
    empty = [label for label, count in zip(classes, counts) if not count]
    if empty:
        which = "class folders without an" if len(empty) < len(classes) else "not a single"
        raise ValueError(f"--data: {which} image in {folder}: {_first(empty)}; {expected} "
                         f"({' '.join(EXTENSIONS)})")
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return ImageFolder(root, split, classes, np.frombuffer(bytes(names), np.uint8), offsets, labels)


def scan_flat(root, split: str, label_of: dict[str, str] | None = None,
              classes: list[str] | None = None) -> ImageFolder:
    """Lists the images of ROOT/SPLIT/**, paths sorted, as `read_labels` classes them.

    Without label_of every label is 0. Without classes they are those of label_of, numbers in the
    order of their values. Raises ValueError for a missing or empty folder, and where images, labels
    and classes do not agree.
    """
    folder = os.path.normpath(os.path.join(root, split))
    if not os.path.isdir(folder):
        raise ValueError(f"no folder {folder}")
    paths = sorted(_image_paths(folder))
    if not paths:
        raise ValueError(f"not a single image below {folder} ({' '.join(EXTENSIONS)})")
    labels = np.zeros(len(paths), np.int32)
    if label_of is not None:
        numbers = all(label.isdigit() for label in label_of.values())
        classes = classes or sorted(set(label_of.values()), key=int if numbers else None)
        stems = [_stem(os.path.basename(os.fsdecode(path))) for path in paths]
        for what, odd in (("without a label", sorted(set(stems) - set(label_of))),
                          ("missing", sorted(set(label_of) - set(stems))),
                          ("of a class unknown to the model",
                           sorted(n for n in label_of if label_of[n] not in set(classes)))):
            if odd:
                raise ValueError(f"--val-labels: {len(odd)} images of {folder} are {what}: "
                                 f"{_first(odd)}")
        number = {label: i for i, label in enumerate(classes)}
        labels = np.array([number[label_of[stem]] for stem in stems], np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(path) for path in paths])])
    return ImageFolder(root, split, classes or [""], np.frombuffer(b"".join(paths), np.uint8),
                       offsets, labels, flat=True)


def read_labels(path) -> dict[str, str]:
    """{image name without its ending: class} of lines 'NAME CLASS', or of ImageNet's
    LOC_val_solution.csv: a header, then ImageId,PredictionString whose first word is the class.
    Raises ValueError for a file that cannot be read or a line of another form."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip()]
    except (OSError, ValueError) as e:
        raise ValueError(f"--val-labels {path} cannot be read: {e}") from e
    kaggle = bool(lines) and lines[0].startswith("ImageId,")
    labels = {}
    for line in lines[kaggle:]:
        name, *words = line.replace(",", " ", 1).split() if kaggle else line.rsplit(None, 1)
        if not words:
            raise ValueError(f"--val-labels {path}: {line!r} is not of the form 'NAME CLASS'")
        labels[_stem(name)] = words[0]
    return labels


def _stem(name: str) -> str:
    stem, ending = os.path.splitext(name)
    return stem if ending.lower() in EXTENSIONS else name


def _image_paths(folder: str):
    """Yields the images below a folder as bytes relative to it; raises OSError, skips nothing."""
    def fail(error):
        raise error
    for parent, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield os.fsencode(os.path.join(parent[len(folder) + 1:], name))


def _first(names, most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


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


def open_data(data: str, image_hw: tuple[int, int], val_labels: str | None = None):
    """(train, val) sources of --data: 'shapes', or a folder with train/CLASS/* and val/CLASS/*.

    Raises ValueError where `scan_folder` does, and if the two splits differ in their classes.
    """
    if data == "shapes":
        return Shapes(image_hw, "train"), Shapes(image_hw, "val")
    train = None if val_labels is None else scan_folder(data, "train")
    val = open_val(data, image_hw, val_labels, train and train.classes)  # the quick one first
    train = train or scan_folder(data, "train")
    check_same_classes(f"{data}/train", train.classes, f"{data}/val", val.classes)
    return train, val


def open_val(data: str, image_hw: tuple[int, int], val_labels: str | None = None,
             classes: list[str] | None = None):
    """The validation source of --data, numbered as in `classes` (a model's: the shapes' are not
    sorted) if those are its classes; with val_labels its images lie flat, and are of `classes`.
    Raises ValueError where `scan_folder` or `scan_flat` does."""
    if data == "shapes":
        return Shapes(image_hw, "val")
    if val_labels is not None:
        return scan_flat(data, "val", read_labels(val_labels), classes)
    source = scan_folder(data, "val")
    if classes and classes != source.classes and set(classes) == set(source.classes):
        number = {name: i for i, name in enumerate(classes)}
        source.labels = np.array([number[name] for name in source.classes])[source.labels]
        source.classes = classes
    return source


def check_same_classes(one: str, classes: list[str], other: str, others: list[str]) -> None:
    """Labels are positions in these lists: ValueError if the lists differ, naming the classes."""
    if classes != others:
        only = {one: sorted(set(classes) - set(others)), other: sorted(set(others) - set(classes))}
        differ = [f"{len(names)} only in {which}: {_first(names)}"
                  for which, names in only.items() if names]
        raise ValueError(f"--data: {one} and {other} must have the same classes; "
                         f"{'; '.join(differ) or 'their order differs'}")


class Unreadable:
    """The distinct images of a source that could not be read, and the limit on their number.

    More than max_share x len(source) end the run; at 0 the first one does. Counting distinct
    images, not readings, makes the rule independent of batch size, epochs and luck. Each rank sees
    its own images: the trainer unites the ranks' sets, since a later epoch shows a bad image to
    another rank and a sum of counts would count it again.
    """

    def __init__(self, source, max_share: float):
        self.source, self.max_share, self.indices = source, max_share, set()

    def add(self, indices: set[int]) -> list[str]:
        """The names of those of `indices` that are new."""
        new = sorted(indices - self.indices)
        self.indices.update(new)
        return [self.source.name(index) for index in new]

    def error(self) -> str | None:
        """What to say if there are too many, else None."""
        total, count = len(self.source), len(self.indices)
        if count <= self.max_share * total:
            return None
        names = [self.source.name(index) for index in sorted(self.indices)[:5]]
        return (f"{count} of {total} training images are unreadable, more than --max-unreadable "
                f"{self.max_share:g} allows ({int(self.max_share * total)}); first: "
                f"{', '.join(names)}")


def unreadable_in(labels: torch.Tensor, indices: torch.Tensor) -> set[int]:
    """The unreadable images of a batch: label -100, but not padding. Both int64 [b] on the CPU."""
    return set(indices[(labels == IGNORE) & (indices != PADDING)].tolist())


# ----------------------------------------------------------------------------- order
def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation int64 [n] in which an epoch shows its images."""
    generator = torch.Generator().manual_seed(stable_seed("order", seed, epoch))
    return torch.randperm(n, generator=generator).numpy()


class StreamSampler:
    """One rank's micro-batches of the training stream, each a list of local_batch (epoch, index).

    Global batch k, images k*G to (k+1)*G of the stream, is cut into G / (local_batch * world)
    micro-batches of local_batch * world images, in order; rank r takes the r-th local_batch of
    each. Starts at any image at once. Raises ValueError if G does not divide so.
    """

    def __init__(self, n: int, seed: int, global_batch: int, local_batch: int, rank: int,
                 world: int, start_image: int, num_steps: int):
        if n < 1 or global_batch % (local_batch * world):
            raise ValueError(f"global batch {global_batch} must be a multiple of {local_batch} "
                             f"images x {world} ranks, and there must be images ({n})")
        self.n, self.seed, self.global_batch, self.local_batch = n, seed, global_batch, local_batch
        self.rank, self.world = rank, world
        self.start_image, self.num_steps = start_image, num_steps

    def __len__(self):
        return self.num_steps * self.global_batch // (self.local_batch * self.world)

    def __iter__(self):
        epoch, images = None, None
        micro = self.local_batch * self.world
        end = self.start_image + len(self) * micro
        for start in range(self.start_image, end, micro):
            batch = []
            for i in range(start + self.rank * self.local_batch,
                           start + (self.rank + 1) * self.local_batch):
                if i // self.n != epoch:  # i only grows: one permutation is held at a time
                    epoch = i // self.n
                    images = order(self.n, self.seed, epoch)
                batch.append((epoch, int(images[i % self.n])))
            yield batch


class EvalSampler:
    """One rank's evaluation batches: each image once over all ranks, in order, then padding.

    Every rank gets as many batches of the same size as every other, because tensor-parallel
    ranks run their collectives together.
    """

    def __init__(self, n: int, batch: int, rank: int, world: int):
        self.n, self.batch, self.rank, self.world = n, batch, rank, world

    def __len__(self):
        return math.ceil(self.n / (self.batch * self.world))

    def __iter__(self):
        for k in range(len(self)):
            start = (k * self.world + self.rank) * self.batch
            yield [(0, i if i < self.n else PADDING) for i in range(start, start + self.batch)]


# ----------------------------------------------------------------------------- views
# One resampling filter everywhere, so that training and evaluation see the same sharpness.
# Bicubic, because Google's and timm's ViT weights were trained and are evaluated with it.
BICUBIC = v2.InterpolationMode.BICUBIC


JITTER = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)  # NeMo's: brightness, contrast, saturation, hue
HUE = 3  # its number in ColorJitter's order


def train_transform(config: TrainConfig, image_hw: tuple[int, int]):
    """The random view of --augmentation, PIL to uint8 [3, H, W]; draws from torch's generator.

    Resizing is torch's, on bytes: a third of the time of Pillow's. The colour jitter of NeMo's list
    costs more than all the rest here and is left to the device, after the others: `color_jitter`.
    """
    if config.augmentation == "none":
        return eval_transform(config, image_hw)
    steps = [v2.PILToTensor(), v2.RandomResizedCrop(image_hw, scale=(config.crop_scale, 1.0),
                                                    interpolation=BICUBIC)]
    if config.augmentation in ("crop-flip", "nemo"):
        steps += [v2.RandomHorizontalFlip()]
    if config.augmentation == "nemo":  # in Pillow, as only that turns bicubically; NeMo's grey 128
        steps += [_to_pil, v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, interpolation=BICUBIC,
                                          fill=128), v2.PILToTensor()]
    return v2.Compose(steps)


def _to_pil(view: torch.Tensor) -> Image.Image:
    """v2.ToPILImage of uint8 [3, H, W], in a sixth of its time: planes need no transposition."""
    return Image.merge("RGB", [Image.fromarray(plane) for plane in view.numpy()])


def eval_transform(config: TrainConfig, image_hw: tuple[int, int]):
    """The view of evaluation, PIL to uint8 [3, H, W]: `centre_view`."""
    view = functools.partial(centre_view, image_hw=image_hw, crop_ratio=config.crop_ratio)
    return v2.Compose([view, v2.PILToTensor()])


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
    return image.resize((w, h), Image.Resampling.BICUBIC,
                        box=(left * x, top * y, (left + w) * x, (top + h) * y))


class Views(Dataset):
    """(epoch, index) -> view uint8 [3, H, W], label, index (see the module's table of labels) and,
    with jitter, the row float32 [8] that `color_jitter` takes; zeros where there is no image."""

    def __init__(self, source, transform, image_hw: tuple[int, int], seed: int, jitter=False):
        self.source, self.transform, self.image_hw, self.seed = source, transform, image_hw, seed
        self.jitter, self.black = jitter, torch.zeros(3, *image_hw, dtype=torch.uint8)

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        epoch, index = key
        missing = self.black, IGNORE, index, *([torch.zeros(8)] if self.jitter else [])
        if index == PADDING:
            return missing
        try:
            image, label = self.source.load(index)
        except Exception:  # noqa: BLE001 whatever went wrong in reading; below it would be a bug
            return missing
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed: with no workers that reseeds the trainer's GPU generator
            torch.default_generator.manual_seed(stable_seed("view", self.seed, epoch, index))
            view = self.transform(image)
            return view, label, index, *([draw_jitter()] if self.jitter else [])


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


def draw_jitter() -> torch.Tensor:
    """One draw of torchvision's ColorJitter as float32 [8]: the order of its four operations
    (0 brightness, 1 contrast, 2 saturation, 3 hue), then their factors."""
    drawn = JITTER.make_params([])
    names = "brightness", "contrast", "saturation", "hue"
    return torch.tensor([*drawn["fn_idx"].tolist(), *(drawn[f"{name}_factor"] for name in names)])


def color_jitter(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """torchvision's ColorJitter on float x [b, 3, H, W] in 0..1, image i as rows[i] of [b, 8] says.

    NeMo jitters before AutoAugment; here it comes after, as in timm: both draw independently of
    the image, so each keeps its distribution, but AutoAugment's grey fill is jittered too.
    Each image has its own order, and a batch has one program: blends, hue, blends, where a blend
    that is not this image's turn has factor 1.
    """
    order, factors = rows[:, :4], rows[:, 4:]
    factor = factors.gather(1, order.long())
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
    """Brightness, contrast and saturation: away from black, the mean grey, each pixel's grey."""
    operation, factor = operation.view(-1, 1, 1, 1), factor.view(-1, 1, 1, 1)
    grey = (0.2989 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None]
    other = grey.where(operation == 2, grey.mean((2, 3), keepdim=True) * (operation == 1))
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


# ----------------------------------------------------------------------------- contact sheet
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


# ----------------------------------------------------------------------------- loaders
def train_loader(source, config: TrainConfig, image_hw: tuple[int, int], local_batch: int,
                 rank: int, world: int, start_image: int, num_steps: int, device) -> DataLoader:
    """One rank's micro-batches of num_steps global batches, from image start_image of the stream.

    rank and world count the processes that own images: all of them, tensor-parallel ones too.
    Raises ValueError for a batch that does not divide, and as `_loader` does.
    """
    views = Views(source, train_transform(config, image_hw), image_hw, config.seed,
                  jitter=config.augmentation == "nemo")
    sampler = StreamSampler(len(source), config.seed, config.global_batch_size, local_batch,
                            rank, world, start_image, num_steps)
    return _loader(views, sampler, config, local_batch, world, device)


def eval_loader(source, config: TrainConfig, image_hw: tuple[int, int], batch: int, rank: int,
                world: int, device) -> DataLoader:
    """One rank's evaluation batches; can be iterated again. Raises as `_loader` does."""
    views = Views(source, eval_transform(config, image_hw), image_hw, config.seed)
    sampler = EvalSampler(len(source), batch, rank, world)
    return _loader(views, sampler, config, batch, world, device)


def _loader(views: Views, sampler, config: TrainConfig, batch: int, world: int, device):
    """A DataLoader that leaves the global generators alone and outlives a SIGTERM.

    Workers start with each iteration and end with it: training iterates once, and between
    evaluations idle workers would only hold memory. They are forked where Python can do so
    safely, on Linux (3.14 would choose forkserver): a fork starts at once and shares the index,
    and is safe after CUDA and NCCL have started because a worker touches neither.
    Raises ValueError if the batches held ready do not fit in shared memory.
    """
    device = torch.device(device)
    workers = config.num_workers
    if workers:
        ranks_here = min(world, torch.cuda.device_count()) if device.type == "cuda" else world
        _check_shared_memory(ranks_here * workers * config.prefetch_factor,
                             3 * batch * views.image_hw[0] * views.image_hw[1])
    return DataLoader(
        views, batch_sampler=sampler, num_workers=workers,
        prefetch_factor=config.prefetch_factor if workers else None,
        pin_memory=config.pin_memory and device.type == "cuda",
        generator=torch.Generator(),  # without it each iteration draws from the global one
        worker_init_fn=_start_worker,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None)


def _check_shared_memory(batches: int, batch_bytes: int, path: str = "/dev/shm") -> None:
    """Raises ValueError where workers would otherwise die of SIGBUS, hours later."""
    need = 2 * batches * batch_bytes  # training's batches wait while evaluation's are made
    if os.path.isdir(path) and need > (free := shutil.disk_usage(path).free):
        raise ValueError(
            f"{path} has {free / 2**20:,.0f} MiB free, and the batches that workers hold ready "
            f"need {need / 2**20:,.0f}: lower --num-workers or --prefetch-factor, or enlarge it "
            f"(docker run --shm-size or --ipc=host)")


def _start_worker(worker_id: int) -> None:
    """Keeps a worker alive while its trainer saves and exits.

    torchrun, Slurm and Ctrl-C signal every process of the job, so a worker ignores SIGINT, and
    SIGTERM from any sender but its own trainer, which ends workers that way. (Ignoring that one
    too would leave a trainer that failed waiting for its workers for ever.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS, Windows
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def obey_parent():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)
    threading.Thread(target=obey_parent, daemon=True).start()
