"""Where images are: in class folders, or flat with their labels in a file; in tars, too.

A source is what `data` reads; `classes` are its classes' names, and a label is a position there:

    len(source)           images n
    source.name(i)        what the log calls image i: its path
    source.load(i)        (upright 8-bit RGB image, label); raises what Pillow does
    source.read(i)        the bytes of its file, undecoded; labels[i] is its label (not of shapes)

`samples.Shapes` is one that draws its images; which train and which validate is in splits.py.
"""

import contextlib
import copy
import io
import json
import os
import re
import warnings

import numpy as np
from PIL import Image, ImageOps

import archives
from tars import EXTENSIONS, stem

# Pillow refuses images above twice this many pixels (a "decompression bomb"): here above 2^28,
# so that a 20,000 x 10,000 panorama loads (its own limit refuses that) and 1 GiB is the most.
Image.MAX_IMAGE_PIXELS = 1 << 27


# ----------------------------------------------------------------------------- one image file
def decode(file) -> Image.Image:
    """Reads a path or an open file as an upright 8-bit RGB image: first frame, alpha dropped.

    Alpha is dropped, not composited, as in torchvision and timm. Raises whatever Pillow raises
    on a file that is no image, is cut short or is too large.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's on damaged EXIF and palette transparency
        with Image.open(file) as image:
            image.load()
            with contextlib.suppress(Exception):  # damaged EXIF makes no image unreadable
                image.getexif()     # only now, as a TIFF turns itself while it loads
                image.info.clear()  # or the rest of the EXIF would be encoded anew, which is slow
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode[0] in "IF":  # Pillow's own conversion would clip these to white
                image = Image.fromarray(_to_8_bits(np.asarray(image), image.mode))
            return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(grey: np.ndarray, mode: str) -> np.ndarray:
    """Scales grey [H, W] of 16 or 32 bits, or real, to 0..255 by the white its values fit under."""
    grey = np.nan_to_num(grey.astype(np.float64), posinf=0, neginf=0)
    whites = {"I": (2**16 - 1, 2**31 - 1), "F": (1, 255, grey.max())}.get(mode, (2**16 - 1,))
    white = next(white for white in whites if grey.max() <= white)
    return (grey * (255 / white)).round().clip(0, 255).astype(np.uint8)


# ----------------------------------------------------------------------------- sources of images
class ImageFolder:
    """The images of ROOT/SPLIT, made by `scan_folder` or `scan_flat`: a compact index of n paths.

    names    uint8 [total bytes]   every path below ROOT/SPLIT, end to end
    offsets  int64 [n + 1]         path i is names[offsets[i]:offsets[i + 1]]
    labels   int32 [n]             the class of image i, a position in `classes`

    Three arrays, because reading a Python list of paths in forked workers touches the reference
    count of each string and so copies the whole list, page by page, into every worker.
    `share`, where `splits.hold_out` made it: what part is held out; `told`, of a part: what the log
    says of it.
    """
    share = told = None

    def __init__(self, root, split: str, classes: list[str], names: bytes, lengths, labels):
        """names: the paths end to end; lengths: of each, in bytes."""
        self.root, self.split, self.classes = os.fspath(root), split, classes
        self.names = np.frombuffer(names, np.uint8)
        self.offsets = np.cumsum([0, *lengths], dtype=np.int64)
        self.labels = np.asarray(labels, np.int32)

    def __len__(self):
        return len(self.labels)

    def path(self, index: int) -> bytes:
        """The path below ROOT/SPLIT."""
        return self.names[self.offsets[index]:self.offsets[index + 1]].tobytes()

    def name(self, index: int) -> str:
        """The path below ROOT: SPLIT/.../FILE."""
        return os.path.join(self.split, os.fsdecode(self.path(index)))

    def read(self, index: int) -> bytes:
        """The bytes of the file, as another decoder than Pillow wants them; raises OSError."""
        with open(os.path.join(self.root, self.name(index)), "rb") as file:
            return file.read()

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The decoded image and its label; raises what `decode` raises."""
        return decode(os.path.join(self.root, self.name(index))), int(self.labels[index])

    def subset(self, chosen: np.ndarray):
        """The images where chosen, bool [n], is true."""
        part, lengths = copy.copy(self), np.diff(self.offsets)
        part.names = self.names[np.repeat(chosen, lengths)]
        part.offsets = np.concatenate([[0], np.cumsum(lengths[chosen])])
        for name in {"labels", "tars", "starts", "sizes"} & set(vars(self)):
            setattr(part, name, getattr(self, name)[chosen])
        return part


class TarImages(ImageFolder):
    """The images of a split inside tars below ROOT, by an index of `archives`. `numbered`: their
    classes are WebDataset's numbers. An image is read by its own open and pread, so that any number
    of tars, threads and forks is safe."""

    def __init__(self, root, split: str, index: dict[str, np.ndarray]):
        vars(self).update(index, root=os.fspath(root), split=split)
        self.classes = self.classes.tolist()
        self.numbered = not self.classes
        if self.numbered:
            self.classes = list(map(str, range(self.labels.max() + 1)))

    def name(self, index: int) -> str:
        """TAR/PATH."""
        file, path = str(self.files[self.tars[index]]), os.fsdecode(self.path(index))
        return f"{file}/{path.removeprefix(stem(file) + '/')}"

    def read(self, index: int) -> bytes:
        with open(os.path.join(self.root, self.files[self.tars[index]]), "rb", 0) as file:
            return os.pread(file.fileno(), int(self.sizes[index]), int(self.starts[index]))

    def load(self, index: int) -> tuple[Image.Image, int]:
        return decode(io.BytesIO(self.read(index))), int(self.labels[index])


# ----------------------------------------------------------------------------- finding them
def scan_tars(data, split: str, index: archives.Index | None = None) -> TarImages | None:
    """The images of a split in tars, None where there are none. Raises ValueError where `Index.of`
    does, and for an --index without tars."""
    folder, files = archives.find(data, split)
    index = index or archives.Index()
    if files:
        return TarImages(folder, split, index.of(folder, split, files))
    if index.given and not any(archives.find(data, one)[1] for one in ("train", "val", "")):
        raise ValueError(f"--index {index.path} has no effect: --data {data} holds no tars")
    return None


def scan(data, split: str, index: archives.Index | None) -> ImageFolder:
    """The images of a split in tars, else in class folders. Raises ValueError for those in a tar
    that have no class, and where `scan_tars` or `scan_folder` does."""
    source = scan_tars(data, split, index)
    if source is None:
        return scan_folder(data, split)
    hint = "; or name the classes with --val-labels" if split == "val" else ""
    if source.classes == [stem(source.files[0])]:
        raise ValueError(f"--data: the images in {source.files[0]} have no class: they are neither "
                         f"in CLASS/ nor beside a .cls or .json{hint}")
    untold = np.flatnonzero(source.labels < 0)
    if len(untold):
        raise ValueError(f"--data: {len(untold):,} of {len(source):,} images have no class, a "
                         f"number from 0 on that is all of a .cls beside them, or \"label\" or "
                         f"\"cls\" in a .json: {source.name(untold[0])}{hint}")
    return source


def scan_folder(root, split: str) -> ImageFolder:
    """Lists the images of ROOT/SPLIT/CLASS/**, classes and paths sorted, hidden names left out.

    Raises ValueError, with the layout that is expected, for a missing folder, images outside the
    class folders, no class folder, and class folders without an image.
    """
    folder = os.path.normpath(os.path.join(root, split))
    expected = f"expected {os.path.join(folder, 'CLASS', 'image.jpg')}" + (
        f", or *{split}*.tar in {root}" if split else
        ", or train/CLASS/image.jpg, or *train*.tar, and val likewise")
    for path in (root, folder):
        if not os.path.isdir(path):
            raise ValueError(f"--data: no folder {path}; {expected}, or --data shapes")
    entries = sorted(entry for entry in os.listdir(folder) if not entry.startswith("."))
    classes = [entry for entry in entries if os.path.isdir(os.path.join(folder, entry))]
    flat = [entry for entry in entries if _is_image(entry) and entry not in classes]
    if flat:
        raise ValueError(f"--data: images such as {flat[0]} ({len(flat)} in all) lie flat in "
                         f"{folder}, outside any class folder; {expected}"
                         + (", or name their classes with --val-labels" if split == "val" else ""))
    if not classes:
        raise ValueError(f"--data: {folder} has no class folders; {expected}")

    names, lengths, counts = bytearray(), [], []
    for label in classes:  # class by class, so that no list of all paths is ever held
        paths = sorted(_image_paths(folder, label))
        names += b"".join(paths)
        lengths += map(len, paths)
        counts.append(len(paths))
    empty = [label for label, count in zip(classes, counts) if not count]
    if empty:
        which = "class folders without an" if len(empty) < len(classes) else "not a single"
        raise ValueError(f"--data: {which} image in {folder}: {first(empty)}; {expected} "
                         f"({' '.join(EXTENSIONS)})")
    return ImageFolder(root, split, classes, names, lengths, np.repeat(range(len(classes)), counts))


def scan_flat(root, split: str, label_of: dict[str, str] | None = None,
              classes: list[str] | None = None, index: archives.Index | None = None) -> ImageFolder:
    """Lists the images of ROOT/SPLIT/**, or of its tars, paths sorted, as `read_labels` classes
    them. ROOT/SPLIT may also be one image.

    Without label_of every label is 0. Without classes they are those of label_of, numbers in the
    order of their values. Raises ValueError for a missing or empty folder, and where images, labels
    and classes do not agree.
    """
    folder = os.path.normpath(os.path.join(root, split))
    source = scan_tars(root, split, index)
    if source:
        folder = source.files[0]
    elif os.path.isfile(folder):
        root, name = os.path.split(folder)
        source = ImageFolder(root, "", [], os.fsencode(name), [len(os.fsencode(name))], [0])
    elif not os.path.isdir(folder):
        raise ValueError(f"no folder {folder}, nor an image or a tar of that name")
    else:
        paths = sorted(_image_paths(folder))
        if not paths:
            raise ValueError(f"not a single image below {folder} ({' '.join(EXTENSIONS)})")
        source = ImageFolder(root, split, [], b"".join(paths), map(len, paths), [0] * len(paths))
    source.classes, source.labels = classes or [""], np.zeros(len(source), np.int32)
    if label_of is not None:
        _take_labels(source, folder, label_of, classes)
    return source


# ----------------------------------------------------------------------------- labels in a file
def _take_labels(source: ImageFolder, where: str, label_of: dict[str, str],
                 classes: list[str] | None) -> None:
    """Classes the images of a flat source by their names; raises ValueError as `scan_flat` says."""
    numeric = all(label.isdigit() for label in label_of.values())
    classes = classes or sorted(set(label_of.values()), key=int if numeric else None)
    number = {label: i for i, label in enumerate(classes)}
    stems = [_stem(os.path.basename(source.name(i))) for i in range(len(source))]
    unknown = [stem for stem, label in label_of.items() if label not in number]
    for what, odd in (("without a label", set(stems) - set(label_of)),
                      ("missing", set(label_of) - set(stems)),
                      ("of a class unknown to the model", unknown)):
        if odd:
            raise ValueError(f"--val-labels: {len(odd)} images of {where} are {what}: "
                             f"{first(sorted(odd))}")
    source.classes = classes
    source.labels = np.array([number[label_of[stem]] for stem in stems], np.int32)


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


def read_real_labels(path, source) -> list[list[int]]:
    """For each image of `source` the classes, in ImageNet's order, that ReaL's annotators see in
    it, or none (arXiv:2006.07159). path: real.json, a list of such lists; ILSVRC2012_val_* of
    number n has the list n - 1. Raises ValueError for another file, and images of other names."""
    try:
        with open(path) as file:
            lists = json.load(file)
    except (OSError, ValueError) as e:
        raise ValueError(f"--real-labels {path} cannot be read: {e}") from e
    if not isinstance(lists, list) or not all(isinstance(labels, list) for labels in lists):
        raise ValueError(f"--real-labels {path} is not a list of lists of classes")
    found = []
    for name in map(source.name, range(len(source))):
        number = re.search(r"ILSVRC2012_val_(\d{8})\.", name)
        if not number or not 1 <= int(number[1]) <= len(lists):
            raise ValueError(f"--real-labels: {name} is none of the images ILSVRC2012_val_00000001 "
                             f"to {len(lists):08d} that {path} labels")
        found.append(lists[int(number[1]) - 1])
    return found


# ----------------------------------------------------------------------------- names
def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _stem(name: str) -> str:
    return os.path.splitext(name)[0] if name.lower().endswith(EXTENSIONS) else name


def _image_paths(folder: str, below: str = ""):
    """Yields the images in and under folder/below, as bytes relative to folder, in any order.
    Raises OSError for what it cannot list: skips nothing but hidden names."""
    def fail(error):
        raise error
    for parent, folders, files in os.walk(os.path.join(folder, below), onerror=fail,
                                          followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in filter(_is_image, files):
            yield os.fsencode(os.path.join(parent[len(folder) + 1:], name))


def first(names, most: int = 5) -> str:
    """Some of many names, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
