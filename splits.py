"""What --data means: which images train, which validate, and what the classes of both are.

    DATA has                      training                       validation
    train and val                 train                          val
    train alone, or CLASS/*       hashes from share * 2^64 on    those below (`hold_out`)
    'shapes'                      drawn                          drawn

train and val are class folders or tars (`sources.scan`); val may lie flat, its classes in a file.
`take_fractions` takes a share of the classes and of their images. A label is a position in the list
of the classes: training's, or in evaluation the model's (`take_classes`).
"""

import hashlib
import os

import numpy as np

import archives
from samples import Shapes
from sources import ImageFolder, first, read_labels, scan, scan_flat
from tars import stem

VAL_SHARE = 0.1  # the default of --val-share


# ----------------------------------------------------------------------------- train and val
def open_data(data: str, image_hw: tuple[int, int], val_labels: str | None = None,
              val_share: float | None = None, index: archives.Index | None = None):
    """(train, val) sources of --data: 'shapes'; a folder with train/CLASS/* and val/CLASS/*, or
    with tars in their place; or without val, which `hold_out` then takes from train/CLASS/*, or
    from CLASS/* in DATA itself.

    Raises ValueError where `open_val` and `hold_out` do, if the two splits differ in their classes,
    and for a --val-share that would do nothing.
    """
    if data == "shapes":
        return Shapes(image_hw, "train"), Shapes(image_hw, "val")
    if not has(data, "val") and val_labels is None:
        return hold_out(_whole(data, index), data, val_share or VAL_SHARE)
    check_share(data, val_share)
    if val_labels is None and not archives.find(data, "train")[1]:
        val = open_val(data, image_hw, index=index)  # first, because it is quick
        train = scan(data, "train", index)
        if getattr(val, "numbered", False):
            val = take_classes(val, train.classes)
    else:
        train = scan(data, "train", index)
        val = open_val(data, image_hw, val_labels, train.classes, index=index)
    check_same_classes(f"{data}/train", train.classes, f"{data}/val", val.classes)
    return train, val


def open_val(data: str, image_hw: tuple[int, int], val_labels: str | None = None,
             classes: list[str] | None = None, val_share: float | None = None,
             index: archives.Index | None = None, images: int | None = None,
             part: bool = False):
    """The validation source of --data: DATA/val/CLASS/*, or tars.

    classes: a model's, in its order (the shapes' are not sorted), which `take_classes` gives.
    With them and without a folder DATA/val the classes may lie in DATA itself, as ImageNet-V2's.
    With val_labels images lie flat in DATA/val, and are of `classes`.
    val_share: without val, of which part training held out; 1 and None: all.
    images: what training had left; where this split leaves another number it saw none of DATA's,
    and all are returned. None: that is not asked.
    part: whether DATA may have more classes than the model, of which no image is then returned.
    Raises ValueError where `scan`, `scan_flat`, `read_labels`, `take_classes` or `hold_out` does.
    """
    if data == "shapes":
        return Shapes(image_hw, "val")
    if val_labels is not None:
        source = scan_flat(data, "val", read_labels(val_labels), None if part else classes, index)
    elif not classes or has(data, "val") or val_share is None and has(data, "train"):
        source = scan(data, "val", index)
    elif val_share is None:
        source = scan(data, "", index)
    elif val_share == 1:
        source = _whole(data, index)
    else:
        source = hold_out(_whole(data, index), data, val_share, images)[1]
    return take_classes(source, classes, part) if classes else source


def has(data, split: str) -> bool:
    """Whether --data has this split, as a folder or as tars."""
    return os.path.isdir(os.path.join(data, split)) or bool(archives.find(data, split)[1])


def check_share(data, val_share: float | None) -> None:
    """Raises ValueError for a --val-share of images that come with their val."""
    if val_share is not None and has(data, "val"):
        raise ValueError(f"--val-share {val_share} has no effect: {data} has a val of its own; "
                         f"leave the flag out")


# ----------------------------------------------------------------------------- without val
def _whole(data, index: archives.Index | None) -> ImageFolder:
    """The images to split: of train, or of DATA itself. Raises ValueError, beside `scan`, for
    folders whose names say that they are another program's train and val."""
    split = "train" if has(data, "train") else ""
    source = scan(data, split, index)
    names = source.classes if not split else os.listdir(data) if os.path.isdir(data) else ()
    like = ("valid", "validation") + (() if split else ("train", "training", "val", "test",
                                                        "testing"))
    odd = [name for name in names if stem(name).lower() in like]
    if odd:
        raise ValueError(f"--data: {', '.join(sorted(odd))} in {data} would not be used as a split:"
                         f" name them train and val (a tar each: train.tar, val.tar)")
    return source


def hashes(source: ImageFolder):
    """Yields for each image the 64 bits of BLAKE2b of its path, from its class's folder on."""
    for path in map(source.path, range(len(source))):
        yield int.from_bytes(hashlib.blake2b(path, digest_size=8).digest(), "big")


def hold_out(source: ImageFolder, data, share: float,
             images: int | None = None) -> tuple[ImageFolder, ImageFolder]:
    """(train, val) of a source without val: an image is in val if its hash is below share * 2^64.

    So another place of the folder changes nothing, nor does a tar in its place, and images that are
    added move no other. images: how many must be in train, else both are the whole.
    Raises ValueError for a class without a training image, and an empty val.
    """
    held = np.fromiter((number < share * 2**64 for number in hashes(source)), bool, len(source))
    if images not in (None, len(held) - held.sum()):
        source.share = 1
        return source, source
    train, val = source.subset(~held), source.subset(held)
    bare = [source.classes[i] for i in np.setdiff1d(source.labels, train.labels)]
    for what, odd in ((f"all images of {first(bare)}, where each class needs one to train on: "
                       f"lower it, or add images", bare),
                      (f"none of the {len(source):,} images: raise it", not len(val))):
        if odd:
            raise ValueError(f"--val-share {share} of {data}, which has no val, holds out {what}")
    train.share = val.share = share
    return train, val


# ----------------------------------------------------------------------------- a part of both
def take_fractions(train: ImageFolder, val: ImageFolder, of_classes: float,
                   of_images: float) -> tuple[ImageFolder, ImageFolder]:
    """Part of both: the first classes, and of each one's training images those of the greatest
    `hashes`, where hold_out takes the least. Counts are rounded, and 1 at least. So less is a part
    of more, the same on every node and in tars; val keeps all images of these classes.

    The flags are NeMo's, whose image_folder.py takes classes as os.scandir lists them, which may
    differ by node, images by name, and for validation all classes, numbered on their own there.
    Raises ValueError if val has none of the classes.
    """
    if of_classes == of_images == 1:
        return train, val
    classes = train.classes[:max(round(of_classes * len(train.classes)), 1)]
    few, few_val = (source.subset(source.labels < len(classes)) for source in (train, val))
    if not len(few_val):
        raise ValueError(f"--classes-fraction {of_classes} leaves {first(classes)}, of which no "
                         f"image validates: raise it")
    numbers = np.fromiter(hashes(few), np.uint64, len(few))
    order, counts = np.lexsort((~numbers, few.labels)), np.bincount(few.labels)
    place = np.arange(len(few)) - np.repeat(counts.cumsum() - counts, counts)  # within its class
    chosen = np.empty(len(few), bool)
    chosen[order] = place < np.repeat(np.maximum(np.round(of_images * counts), 1), counts)
    few = few.subset(chosen)
    few.told = (f"--classes-fraction {of_classes:g} and --data-per-class-fraction {of_images:g} "
                f"take {len(classes):,} of {len(train.classes):,} classes, {len(few):,} of "
                f"{len(train):,} training and {len(few_val):,} of {len(val):,} validation images")
    few.classes = few_val.classes = classes
    return few, few_val


# ----------------------------------------------------------------------------- classes
def take_classes(source: ImageFolder, classes: list[str], part: bool = False) -> ImageFolder:
    """Labels a source as a model does: by its folders' names, or their numbers 0, 1, ..., or the
    numbers of WebDataset. Other folders stay as they are. part: images of further classes are left
    out. Raises ValueError, without it, for too large numbers."""
    numbered, numbers = getattr(source, "numbered", False), list(map(str, range(len(classes))))
    if numbered and not part and len(source.classes) > len(classes):
        raise ValueError(f"--data: {source.name(int(source.labels.argmax()))} is of class "
                         f"{source.labels.max()}, and there are {len(classes)} classes")
    fits = set.issubset if part else set.__eq__
    for names in (numbers,) if numbered else (classes, numbers):
        if numbered or fits(set(names), set(source.classes)):
            number = {name: i for i, name in enumerate(names)}
            new = np.array([number.get(name, -1) for name in source.classes], np.int32)
            labels = new[source.labels]
            source = source.subset(labels >= 0)
            source.classes, source.labels, source.numbered = classes, labels[labels >= 0], False
            if (labels < 0).any():
                source.told = (f"{(labels < 0).sum():,} images of classes that the model does not "
                               f"know are left out")
            break
    return source


def check_same_classes(one: str, classes: list[str], other: str, others: list[str]) -> None:
    """Labels are positions in these lists: ValueError if the lists differ, naming the classes."""
    if classes != others:
        only = {one: sorted(set(classes) - set(others)), other: sorted(set(others) - set(classes))}
        differ = [f"{len(names)} only in {which}: {first(names)}"
                  for which, names in only.items() if names]
        raise ValueError(f"--data: {one} and {other} must have the same classes; "
                         f"{'; '.join(differ) or 'their order differs'}")
