"""What sources.py, data.py and augment.py promise: `python -m pytest test_data.py`, on a CPU.

A test's name is the claim, its docstring the specification, and each tolerance says why it is what
it is.
"""

import bz2
import contextlib
import functools
import gzip
import hashlib
import io
import itertools
import lzma
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.transforms import v2

import archives
import data
import evaluate
import resume
import samples
import sources
import splits
import tars
import train
import weights
from augment import (
    JITTER,
    centre_view,
    color_jitter,
    draw_jitter,
    draw_mix,
    draws,
    mix_pairs,
    normalize,
    pair_rows,
    soft_targets,
    train_transform,
)
from configs import CROPPED, EvalConfig, TrainConfig, stable_seed
from data import IGNORE, PADDING
from parallel import Grid
from recipes import SMALL_FOLDER, parse_run
from sources import decode
from testing import TINY, TRAIN_FLAGS, Few, generator, make_folder, paint, run_command

torch.set_num_threads(1)
HW = (32, 32)
CONFIG = TrainConfig(global_batch_size=12, num_workers=0, seed=5)


def few_shapes(n=25, split="train", image_hw=HW):
    """The first shapes, so that an epoch is short."""
    return Few(samples.Shapes(image_hw, split), n)


def train_batches(source, world=1, rank=0, local=12, start_image=0, steps=5, **changes):
    """(images, labels, indices, rows of each of the draws) of each micro-batch."""
    config = replace(CONFIG, **changes)
    loader = data.train_loader(source, config, HW, local, rank, world, start_image, steps, "cpu")
    return [(*batch, *draws.values()) for *batch, draws in loader]


def steps_of(batches_of_ranks, steps):
    """Images [steps, 12, ...] and indices in stream order from the micro-batches of all ranks."""
    micros = [batch for same_time in zip(*batches_of_ranks) for batch in same_time]
    return [torch.cat(parts).unflatten(0, (steps, 12)) for parts in zip(*micros)]


# ----------------------------------------------------------------------------- one image file
def test_formats_load(tmp_path):
    """Every usual format becomes upright 8-bit RGB with the right brightness, silently."""
    save, red = (lambda name, *a, **k: paint(tmp_path / name, (40, 30), *a, **k)), (200, 30, 30)
    for name in ("a.jpg", "b.png", "c.webp", "d.bmp", "e.gif", "f.tiff", "рисунок é.png"):
        image = decode(save(name, "RGB", red))
        assert image.mode == "RGB" and image.size == (40, 30)
        assert np.abs(np.asarray(image).mean((0, 1)) - red).max() < 6, name
    for name, mode, colour in (("g.png", "L", 128), ("h.png", "LA", (128, 9)), ("i.png", "1", 1),
                               ("j.png", "RGBA", (128, 128, 128, 0)), ("k.jpg", "L", 128),
                               ("l.jpg", "CMYK", (0, 0, 0, 127)), ("m.png", "I;16", 32896),
                               ("n.tiff", "I;16", 32896), ("o.tiff", "I", 32896),
                               ("p.tiff", "F", 0.5), ("q.tiff", "F", 128.0),
                               ("r.tiff", "I", 2**30)):
        value = np.asarray(decode(save(name, mode, colour))).mean()
        assert abs(value - (255 if mode == "1" else 128)) < 3, (name, mode, value)
    palette = Image.new("P", (40, 30))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.save(tmp_path / "s.png", transparency=b"\x00\xff")
    assert np.asarray(decode(tmp_path / "s.png"))[0, 0].tolist() == [10, 20, 30]
    frames = [Image.new("RGB", (40, 30), c) for c in ((200, 30, 30), (0, 0, 255))]
    frames[0].save(tmp_path / "t.gif", save_all=True, append_images=frames[1:])
    assert np.abs(np.asarray(decode(tmp_path / "t.gif")).mean((0, 1)) - red).max() < 6


@pytest.mark.parametrize("augmentation", ["nemo", "none"])
def test_images_of_any_size_become_views(tmp_path, augmentation):
    """One pixel, lines, and panoramas, also above the number of pixels that Pillow allows by itself
    (200 million of a file without its pixels: it is opened, then it is cut short)."""
    view = train_transform(replace(CONFIG, augmentation=augmentation), HW)
    pixel = decode(paint(tmp_path / "a.png", (1, 1)))
    for size in ((1, 1), (1, 3000), (3000, 1)):
        assert view(pixel.resize(size)).shape == (3, *HW)
    assert view(decode(paint(tmp_path / "b.jpg", (20_000, 500)))).shape == (3, *HW)
    with pytest.raises(OSError, match="truncated"):
        decode(io.BytesIO(b"P5 20000 10000 255\n"))
    with pytest.raises(Image.DecompressionBombError):
        decode(io.BytesIO(b"P5 20000 20000 255\n"))


@pytest.mark.filterwarnings("error")
def test_exif_turns_images_upright(tmp_path):
    """All eight orientations give the image that was turned; damaged EXIF is no obstacle, whether
    it cannot be read at all or holds nonsense beside the orientation."""
    upright = Image.new("RGB", (48, 32))
    ImageDraw.Draw(upright).rectangle((0, 0, 15, 15), fill=(255, 0, 0))
    # how a file was turned that says 2, 3, ... 8; 6, for one, means "turn me right"
    turn = dict(zip(range(2, 9), (
        Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180,
        Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90,
        Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_270)))

    def assert_upright(path):
        difference = np.asarray(decode(path), int) - np.asarray(upright)
        assert np.abs(difference).mean() < 3, path

    for orientation, extension in itertools.product(range(1, 9), ("jpg", "png", "tiff")):
        turned, exif, path = upright, Image.Exif(), tmp_path / f"{orientation}.{extension}"
        if orientation > 1:
            turned = upright.transpose(turn[orientation])
        exif[0x0112] = orientation
        tags = {"tiffinfo": {0x0112: orientation}} if extension == "tiff" else {"exif": exif}
        turned.save(path, quality=95, **tags)
        assert_upright(path)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "the maker"
    head, tag, tail = exif.tobytes().partition(b"\x01\x0f\x00\x02")  # 0x010F, a string, its length
    block = head + tag + b"\xff\xff\xff\xff" + tail[4:]
    for extension in ("jpg", "png"):
        upright.transpose(turn[6]).save(tmp_path / f"half.{extension}", quality=95, exif=block)
        assert_upright(tmp_path / f"half.{extension}")
        for garbage in (b"no TIFF", b"II*\0\xff\xff\xff\xff garbage", b"MM\0*\0\0\0"):
            path = tmp_path / f"bad.{extension}"
            upright.save(path, quality=95, exif=b"Exif\0\0" + garbage)
            assert_upright(path)


# ----------------------------------------------------------------------------- sources of images
def test_folder_errors_say_what_is_expected(tmp_path):
    """Each wrong layout fails with its own message, which shows the right one."""
    def fails(match, root=tmp_path):
        with pytest.raises(ValueError, match=match) as error:
            splits.open_data(str(root), HW)
        assert "CLASS" in str(error.value) or "same classes" in str(error.value)
    fails("no folder .*nowhere", tmp_path / "nowhere")
    fails(r"has no class folders; expected .*/CLASS/image.jpg, or train/CLASS/.*\*train\*.tar")
    (tmp_path / "val").mkdir()
    fails("no class folders")
    paint(tmp_path / "val/flat.JPG")
    fails(r"such as flat.JPG \(1 in all\) lie flat")
    (tmp_path / "val/flat.JPG").unlink()
    (tmp_path / "val/c").mkdir()
    fails("not a single image in .*: c;")
    paint(tmp_path / "val/c/1.png")
    fails("no folder .*train")
    make_folder(tmp_path, val=("b", "c"))
    (tmp_path / "train/empty").mkdir()
    fails("without an image in .*: empty")
    (tmp_path / "train/empty").rmdir()
    fails("1 only in .*/train: a; 1 only in .*/val: c")


def test_folder_index_is_complete_sorted_and_compact(tmp_path):
    """Sub-folders, links and any case count, hidden and other files do not; classes are in order,
    and paths inside each; the index is three arrays."""
    make_folder(tmp_path / "elsewhere")
    make_folder(tmp_path)
    for name in ("b/z.JPEG", "a/sub/deep/x.WebP", "b/2/x.png", "a-b/1.png", ".hidden/x.png",
                 "a/.x.png", "a/sub/.h/x.png"):
        paint(tmp_path / "train" / name)
    (tmp_path / "train/a/notes.txt").write_text("no image")
    (tmp_path / "train/c").symlink_to(tmp_path / "elsewhere/val")
    (tmp_path / "train/a/linked").symlink_to(tmp_path / "elsewhere/train/a")
    source = pickle.loads(pickle.dumps(sources.scan_folder(tmp_path, "train")))
    assert [source.name(i) for i in range(len(source))] == [
        "train/a/1.png", "train/a/linked/1.png", "train/a/sub/deep/x.WebP", "train/a-b/1.png",
        "train/b/1.png", "train/b/2/x.png", "train/b/z.JPEG", "train/c/a/1.png", "train/c/b/1.png"]
    assert [source.load(i)[1] for i in range(9)] == [0, 0, 0, 1, 2, 2, 2, 3, 3]
    assert source.classes == ["a", "a-b", "b", "c"]
    assert source.read(8) == (tmp_path / "elsewhere/val/b/1.png").read_bytes()
    assert all(isinstance(x, np.ndarray) for x in (source.names, source.offsets, source.labels))
    n = 100_000
    big = sources.ImageFolder("/data", "train", ["a"], bytes(n * 20), [20] * n, [0] * n)
    assert len(pickle.dumps(big)) < 4 * 2**20 and big.offsets[-1] == n * 20


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    """Its images are not left out silently. Here its path is too long for the system."""
    make_folder(tmp_path)
    monkeypatch.chdir(tmp_path / "train" / "a")
    for _ in range(20):
        os.mkdir("x" * 250)
        os.chdir("x" * 250)
    with pytest.raises(OSError, match="too long"):
        splits.open_data(str(tmp_path), HW)


def test_validation_labels_are_numbered_as_in_the_models_classes(tmp_path):
    """A model may have the folder's classes in another order; other classes leave it as it is."""
    make_folder(tmp_path, val=("a", "b", "c"))
    paint(tmp_path / "val/b/2.png")
    for classes, labels in ((None, [0, 1, 1, 2]), (["a", "b", "c"], [0, 1, 1, 2]),
                            (["b", "c", "a"], [2, 0, 0, 1]), (["a", "b"], [0, 1, 1, 2])):
        source = splits.open_val(str(tmp_path), HW, classes=classes)
        assert [source.load(i)[1] for i in range(4)] == labels
        assert [source.classes[label] for label in labels] == ["a", "b", "b", "c"]
        assert source.name(3) == "val/c/1.png"
    with pytest.raises(ValueError, match="1 only in model: z; 1 only in val: a"):
        splits.check_same_classes("model", ["b", "z"], "val", ["a", "b"])
    with pytest.raises(ValueError, match="order differs"):
        splits.check_same_classes("model", ["b", "a"], "val", ["a", "b"])


def test_folders_named_by_numbers_are_the_models_classes(tmp_path):
    """ImageNet-V2's: TEST/0 to TEST/11 without a folder val, 10 after 9 and not after 1; unless the
    model's own classes have these names, in another order; one missing number is no such set."""
    names = [str(i) for i in range(12)]
    for name in names:
        paint(tmp_path / name / "1.jpeg")
    for classes in ([f"n{i:08d}" for i in range(12)], names, names[::-1], sorted(names)):
        source = splits.open_val(str(tmp_path), HW, classes=classes)
        number = {source.name(i).split("/")[0]: source.load(i)[1] for i in range(12)}
        expected = classes if set(classes) == set(names) else names
        assert number == {name: i for i, name in enumerate(expected)} and source.classes == classes
    (tmp_path / "10/1.jpeg").unlink()
    (tmp_path / "10").rmdir()
    assert splits.open_val(str(tmp_path), HW, classes=["a"] * 11).classes == sorted(
        set(names) - {"10"})


def test_reals_labels_go_by_the_number_in_an_images_name(tmp_path):
    """Image n has list n - 1, wherever it lies; another name, number or file is an error."""
    for name in ("ILSVRC2012_val_00000003.JPEG", "b/ILSVRC2012_val_00000001.JPEG"):
        paint(tmp_path / "val" / name)
    source, file = sources.scan_flat(tmp_path, "val"), tmp_path / "real.json"
    file.write_text("[[5], [], [1, 2]]")
    assert sources.read_real_labels(file, source) == [[1, 2], [5]]
    for text, message in [("[[5], []]", "val_00000003.JPEG is none .* to 00000002"),
                          ("{}", "is not a list of lists"), ("[3]", "is not a list of lists"),
                          ("[", "cannot be read")]:
        file.write_text(text)
        with pytest.raises(ValueError, match=f"--real-labels.*{message}"):
            sources.read_real_labels(file, source)
    paint(tmp_path / "val/other.JPEG")
    file.write_text("[[5], [], [1, 2]]")
    with pytest.raises(ValueError, match="other.JPEG is none of the images"):
        sources.read_real_labels(file, sources.scan_flat(tmp_path, "val"))


def test_flat_validation_images_take_their_classes_from_a_file(tmp_path):
    """Either form gives the folders' labels; what does not agree is named."""
    for i in range(3):
        paint(tmp_path / "val" / f"v_{i}.JPEG")
    lines = tmp_path / "lines.txt"
    for text in ("v_0.JPEG n01\nv_1.JPEG n02\n\nv_2.JPEG n01\n",
                 "ImageId,PredictionString\nv_1,n02 1 2 3 4 n01 5 6 7 8 \nv_0,n01 1\nv_2,n01"):
        lines.write_text(text)
        source = splits.open_val(tmp_path, HW, lines)
        assert source.classes == ["n01", "n02"] and source.labels.tolist() == [0, 1, 0]
        assert source.name(1) == "val/v_1.JPEG" and source.load(1)[1] == 1
        assert splits.open_val(tmp_path, HW, lines, ["n00", "n01", "n02"]).labels.tolist() == [
            1, 2, 1]
    make_folder(tmp_path, train=("n00", "n01", "n02"), val=())
    train, val = splits.open_data(tmp_path, HW, lines)
    assert len(train) == 3 and val.classes == train.classes and val.labels.tolist() == [1, 2, 1]
    lines.write_text("v_0 10\nv_1 9\nv_2 10\n")
    assert splits.open_val(tmp_path, HW, lines).classes == ["9", "10"]
    for text, message in [("v_0 a\nv_1 b", "1 images of .* without a label: v_2"),
                          ("v_0 a\nv_1 b\nv_2 a\nv_3 a", "1 images of .* missing: v_3"),
                          ("v_0", "'v_0' is not of the form"), ("", "3 images .* without a label")]:
        lines.write_text(text)
        with pytest.raises(ValueError, match=message):
            splits.open_val(tmp_path, HW, lines)
    lines.write_text("v_0 a\nv_1 b\nv_2 a")
    with pytest.raises(ValueError, match="1 images .* of a class unknown to the model: v_1"):
        splits.open_val(tmp_path, HW, lines, ["a"])
    with pytest.raises(ValueError, match="--val-labels .* cannot be read"):
        splits.open_val(tmp_path, HW, tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="name their classes with --val-labels"):
        splits.open_val(tmp_path, HW)


def test_shapes_are_deterministic_balanced_and_differ_by_split():
    """Image i is the same whenever it is drawn; the splits share no image."""
    train, val = splits.open_data("shapes", (32, 48))
    assert (len(train), len(val), len(train.classes)) == (8000, samples.SHAPES_VAL, 16)
    for i in (0, 17, 999):
        (image, label), (again, _) = train.load(i), samples.Shapes((32, 48), "train").load(i)
        assert image.tobytes() == again.tobytes() and label == i % 16 and image.size == (48, 32)
        assert image.tobytes() != val.load(i)[0].tobytes()


def test_unreadable_images_are_ignored_named_and_limited(tmp_path):
    """Bad files get label -100 and black pixels, never another image; too many end the run."""
    make_folder(tmp_path)
    good = (paint(tmp_path / "train/a/good.jpg", colour=(255, 255, 255))).read_bytes()
    files = {"cut.jpg": good[:200], "empty.png": b"", "text.jpg": b"not an image",
             "huge.pgm": b"P5 20000 20000 255\n"}  # a decompression bomb
    for name, content in files.items():
        (tmp_path / "train/a" / name).write_bytes(content)
    source = sources.scan_folder(tmp_path, "train")
    (tmp_path / "train/b/1.png").unlink()  # and one that vanishes after the scan
    batch = next(iter(data.eval_loader(source, CONFIG, HW, 8, 0, 1, "cpu")))
    images, labels, indices, nothing = batch
    assert nothing == {}
    bad = (labels == IGNORE) & (indices >= 0)
    names = {source.name(i) for i in indices[bad].tolist()}
    assert names == {"train/b/1.png", *(f"train/a/{n}" for n in files)}
    assert not images[bad].any() and labels.tolist().count(0) == 2 and (indices == -1).sum() == 1
    assert data.unreadable_in(labels, indices) == set(indices[bad].tolist())
    in_training = train_batches(source, local=6, steps=1)
    assert set().union(*(data.unreadable_in(b[1], b[2]) for b in in_training)) == set(
        indices[bad].tolist())
    assert all(not images[labels < 0].any() for images, labels, *_ in in_training)
    log = data.Unreadable(source, 5 / 7)
    assert set(log.add(set(indices[bad].tolist()))) == names and log.error() is None
    assert log.add(set(indices[bad].tolist())) == []
    log.max_share = 0.5
    assert re.search("5 of 7, more than the 3 that --max-unreadable 0.5 allows; .*cut.jpg",
                     log.error())
    for share, allowed in ((0, 0), (0.001, 1)):  # one bad file of a small folder ends no run
        log = data.Unreadable(source, share)
        assert [bool(log.add({i}) and log.error()) for i in (0, 1)] == [not allowed, True]
    with pytest.raises(ZeroDivisionError):  # a bug in a transform is no unreadable image
        data.Views(source, lambda image: 1 / 0, HW, 0)[0, 0]


# ----------------------------------------------------------------------------- tars
def photos(root, train=13, val=5):
    """A folder of two classes of small images of noise, some nested, one name above 100 bytes."""
    rng = np.random.default_rng(0)
    for split, n in (("train", train), ("val", val)):
        for i in range(n):
            name = f"{'sub/' * (i % 3 == 0)}{'x' * 150 * (i == 4)}{i:02d}.{('png', 'jpg')[i % 2]}"
            path = root / split / ("a-b", "a")[i % 2] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
    return root


def pack(path, members, format=tarfile.GNU_FORMAT):
    """A tar of (name, content: bytes or a path, which may be a folder), in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            if isinstance(content, bytes):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                tar.add(content, name)
    return path


def classes_as_tars(folder, out, format=tarfile.GNU_FORMAT):
    """A tar for each class folder, whose images lie flat in it, some in a folder."""
    return [pack(out / f"{c.name}.tar", [(str(p.relative_to(c)), p)
                                         for p in sorted(c.rglob("*.*"))], format)
            for c in sorted(folder.iterdir(), reverse=True)]


@pytest.mark.parametrize("packing", ["train.tar, GNU", "in a folder, pax", "tar of tars",
                                     "tars of classes"])
def test_tars_are_their_folder(tmp_path, packing):
    """However the images are packed, tars give the folder's classes, labels, paths and bytes under
    the same index numbers, and so its batches to the bit, also from two workers."""
    folder, tars = photos(tmp_path / "folder"), tmp_path / "tars"
    for split in ("train", "val"):
        if packing == "train.tar, GNU":
            pack(tars / f"{split}.tar", [("./", folder / split)])
        elif packing == "in a folder, pax":
            pack(tars / split / "one.tar", [(split, folder / split)], tarfile.PAX_FORMAT)
        else:
            inner = tars / split if packing == "tars of classes" else tmp_path / split
            paths = classes_as_tars(folder / split, inner)
            if packing == "tar of tars":
                pack(tars / f"ILSVRC2012_img_{split}.tar", [(p.name, p) for p in paths])
    for theirs, ours in zip(splits.open_data(folder, HW), splits.open_data(tars, HW)):
        assert isinstance(ours, sources.TarImages)
        assert ours.classes == theirs.classes == ["a", "a-b"]
        assert torch.equal(*(torch.tensor(source.labels) for source in (ours, theirs)))
        assert len(ours) == len(theirs)
        for i in range(len(ours)):
            assert (ours.path(i), ours.read(i)) == (theirs.path(i), theirs.read(i))
        assert all(isinstance(getattr(ours, name), np.ndarray) for name in archives.ARRAYS[:6])
        for workers in (0, 2) if len(ours) > 12 else ():
            batches = [train_batches(source, local=6, steps=2, num_workers=workers)
                       for source in (ours, theirs)]
            assert all(map(torch.equal, *map(itertools.chain.from_iterable, batches)))
        assert pickle.loads(pickle.dumps(ours)).read(3) == theirs.read(3)  # as another rank gets it


def test_webdataset_shards_have_their_classes_beside_the_images(tmp_path):
    """In .cls, or as label or cls in .json, .cls first; in order of shard, then of key. A missing,
    wrong or too large class is an error that names the sample; val has the classes of train."""
    image = paint(tmp_path / "i.png").read_bytes()

    def shard(name, *samples):
        members = [(f"{key}{ending}", content) for key, *files in samples
                   for ending, content in ((".webp", image), *files)]
        return pack(tmp_path / name, members[::-1])
    shard("in1k-train-0001.tar", ("k0", (".cls", b"0")), ("k1", (".json", b'{"label": 3}')))
    shard("in1k-train-0000.tar", ("k9", (".json", b'{"cls": 1}'), (".cls", b" 2\n")),
          ("k.10", (".JSON", b'{"a": "text", "label": 1}')), ("k8", (".txt", b"?"), (".cls", b"2")))
    shard("in1k-validation-00.tar", ("k0", (".cls", b"1")))
    shard("in1k-test-00.tar", ("k0", (".cls", b"7")))
    train, val = splits.open_data(tmp_path, HW)
    assert [train.name(i) for i in range(5)] == [
        f"in1k-train-{name}.webp" for name in ("0000.tar/k.10", "0000.tar/k8", "0000.tar/k9",
                                               "0001.tar/k0", "0001.tar/k1")]
    assert train.labels.tolist() == [1, 2, 2, 0, 3] and train.classes == val.classes == list("0123")
    assert val.load(0)[1] == 1 and train.load(4)[0].size == (40, 30)
    names = ["n3", "n2", "n1", "n0"]  # a model's, whose order the numbers mean
    scored = splits.open_val(tmp_path, HW, classes=names)
    assert scored.classes == names and scored.labels.tolist() == [1]
    with pytest.raises(ValueError, match="k0.webp is of class 1, and there are 1 classes"):
        splits.open_val(tmp_path, HW, classes=["n0"])
    for files in ((), ((".cls", b"-1"),), ((".cls", b"cat"),), ((".json", b'{"label": "4"}'),),
                  ((".json", b'{"label"'),), ((".json", b"[]"),)):
        shard("in1k-train-0002.tar", ("k5", *files))
        with pytest.raises(ValueError, match='1 of 6 images have no class, .*"label" or "cls" in a '
                           ".json: in1k-train-0002.tar/k5.webp"):
            splits.open_data(tmp_path, HW)
    for path in (tmp_path / "i.png", *tmp_path.glob("*.tar")):
        path.unlink()
    for i in range(2):  # the names of shards are no classes
        shard(f"{i}.tar", (f"k{i}", (".json", b'{"text": "a cat"}')))
    with pytest.raises(ValueError, match='2 of 2 images have no class.*"label".*: 0.tar/k0.webp'):
        splits.open_data(str(tmp_path), HW)
    for i in range(2):
        (tmp_path / f"{i}.tar").rename(tmp_path / f"{'train' if i else 'val'}.tar")
    assert len(sources.scan_flat(str(tmp_path), "val")) == 1  # to predict or with --val-labels
    with pytest.raises(ValueError, match="val.tar/k0.webp; or name the classes with --val-labels"):
        splits.open_val(str(tmp_path), HW)


def test_numbers_are_the_classes_of_a_training_folder(tmp_path):
    """WebDataset's val beside class folders in train: their order is the numbers'."""
    make_folder(tmp_path, ("a", "b", "c"), ())
    image = (tmp_path / "train/a/1.png").read_bytes()
    pack(tmp_path / "val-0.tar", [("0.png", image), ("0.cls", b"1")])
    train, val = splits.open_data(str(tmp_path), HW)
    assert train.classes == val.classes == ["a", "b", "c"] and val.labels.tolist() == [1]
    pack(tmp_path / "val-0.tar", [("0.png", image), ("0.cls", b"3")])
    with pytest.raises(ValueError, match="is of class 3, and there are 3 classes"):
        splits.open_data(str(tmp_path), HW)


def test_the_folders_of_a_tar_are_those_of_the_tars_inside(tmp_path):
    """A class may have several tars; a .json in its folder need not tell it; an empty folder train
    does not hide train.tar; a compressed tar inside is named."""
    image, parts = paint(tmp_path / "i.png").read_bytes(), []
    for name in ("dogs/part1", "dogs/part2", "cats/part1"):
        parts.append((f"all/{name}.tar", pack(tmp_path / "part.tar", [
            ("1.png", image)]).read_bytes()))
    parts += [("all/cats/2.png", image), ("all/cats/2.json", b'{"label": "cat"}')]
    pack(tmp_path / "d/train.tar", parts)
    (tmp_path / "d/train").mkdir()
    source = sources.scan(str(tmp_path / "d"), "train", None)
    assert source.classes == ["cats", "dogs"] and source.labels.tolist() == [0, 0, 1, 1]
    assert [source.path(i) for i in (1, 3)] == [b"cats/part1/1.png", b"dogs/part2/1.png"]
    pack(tmp_path / "d/train.tar", [*parts, ("mice/1.tar.gz", gzip.compress(parts[0][1]))])
    with pytest.raises(ValueError, match="train.tar/mice/1.tar.gz is compressed"):
        sources.scan(str(tmp_path / "d"), "train", None)


def test_a_flat_validation_tar_takes_its_classes_from_a_file(tmp_path):
    """ILSVRC2012_img_val.tar with --val-labels is the flat folder, ReaL's labels too; without the
    flag the error names it. One tar of images of any kind is something to predict."""
    for i in (3, 1, 2):
        paint(tmp_path / "folder/val" / f"ILSVRC2012_val_0000000{i}.JPEG")
    make_folder(tmp_path / "folder", train=("n01", "n02"), val=())
    flat, tars = sorted((tmp_path / "folder/val").iterdir(), reverse=True), tmp_path / "tars"
    val = pack(tars / "ILSVRC2012_img_val.tar", [(path.name, path) for path in flat])
    pack(tars / "ILSVRC2012_img_train.tar", [("n01.tar", pack(
        tmp_path / "n01.tar", [("1.png", tmp_path / "folder/train/n01/1.png")])), ("n02.tar", pack(
            tmp_path / "n02.tar", [("1.png", tmp_path / "folder/train/n02/1.png")]))])
    labels, real = tmp_path / "labels.txt", tmp_path / "real.json"
    labels.write_text("".join(f"{path.name} n0{1 + (path is flat[0])}\n" for path in flat))
    real.write_text("[[5], [], [1, 2]]")
    for place in (tmp_path / "folder", tars):
        source = splits.open_data(place, HW, labels)[1]
        assert source.classes == ["n01", "n02"] and source.labels.tolist() == [0, 0, 1]
        assert sources.read_real_labels(real, source) == [[5], [], [1, 2]]
    assert source.name(0) == "ILSVRC2012_img_val.tar/ILSVRC2012_val_00000001.JPEG"
    assert source.load(2)[1] == 1
    with pytest.raises(ValueError, match="ILSVRC2012_img_val.tar have no class.*--val-labels"):
        splits.open_data(tars, HW)
    labels.write_text("ILSVRC2012_val_00000001 n01")
    with pytest.raises(ValueError, match="2 images of ILSVRC2012_img_val.tar are without a label"):
        splits.open_data(tars, HW, labels)
    source = sources.scan_flat(val, "")
    assert len(source) == 3 and source.labels.tolist() == [0, 0, 0] and source.load(0)[0]
    paint(tars / "1.png")  # what is unpacked comes first
    assert [sources.scan_flat(tars, "").name(0)] == ["1.png"]


def test_a_tar_that_cannot_be_used_is_an_error_that_names_it(tmp_path):
    """Cut short, damaged, compressed, without an image, with two of one path, with links; what is
    wrong with one image is that image's, as in a folder."""
    image, train = paint(tmp_path / "i.png", (300, 300)).read_bytes(), tmp_path / "d/train.tar"
    members = [("a/1.png", image), ("b/2.png", b""), ("b/._3.png", b"hidden"), ("b/4.png", b"no")]
    pack(tmp_path / "d/val.tar", [("a/1.png", image), ("b/1.png", image)])
    whole = pack(train, members).read_bytes()
    source = splits.open_data(tmp_path / "d", HW)[0]
    batch = next(iter(data.eval_loader(source, CONFIG, HW, 3, 0, 1, "cpu")))
    assert source.name(1) == "train.tar/b/2.png" and batch[1].tolist() == [0, IGNORE, IGNORE]

    def fails(message, content):
        train.write_bytes(content)
        with pytest.raises(ValueError, match=f"train.tar.*{message}"):
            splits.open_data(tmp_path / "d", HW)
    fails("is cut short: it ends inside the member 'a/1.png'", whole[:600])
    fails("is cut short: it has no end mark", whole[:512 + 512 * -(-len(image) // 512)])
    fails("is cut short: it has no end mark", b"")
    fails("is no tar", b"text" * 400)
    fails("is damaged: no header at byte 1536", whole[:1540] + b"X" + whole[1541:])
    fails("is damaged: no header at byte 1536", whole[:1600])
    long = pack(train, [("a/" + "n" * 200, image)], tarfile.PAX_FORMAT).read_bytes()
    fails("is damaged: no pax records at byte 512", long[:512] + b"0 " + long[514:])
    for compressed in (gzip.compress(whole), lzma.compress(whole), bz2.compress(whole)):
        fails("is compressed, and so cannot be read in place", compressed)
    fails("not a single image", pack(train, [("a/1.txt", b"text")]).read_bytes())
    fails("have no class: they are neither in CLASS/", pack(train, [
        ("1.png", image)]).read_bytes())
    (tmp_path / "link.png").symlink_to(tmp_path / "i.png")
    fails("a/3.png is a link or sparse: make the tar with --dereference", pack(train, [
        ("a/1.png", image), ("a/3.png", tmp_path / "link.png")]).read_bytes())
    pack(train, [*members, ("a/1.png", b"")])
    with pytest.raises(ValueError, match="a/1.png is twice in train.tar"):
        splits.open_data(tmp_path / "d", HW)


def test_a_tar_is_walked_as_tarfile_does(tmp_path):
    """GNU's, pax's and ustar's names of any length and bytes, and sizes above the 8 GiB that octal
    digits tell, sparse here: every file has tarfile's name, place and size."""
    huge = 9 * 2**30
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        path = tmp_path / "t.tar"
        names = ["a/1", "./b/" + "p" * 90 + "/" + "n" * 95, "c/\u00e9.jpg"]
        names += ["c/" + "l" * 300 + ".jpg", "c/\udcff"] if form != tarfile.USTAR_FORMAT else []
        members = [("d/", tmp_path / "empty"), *((name, name.encode(errors="ignore") * 40)
                                                 for name in names)]
        (tmp_path / "empty").mkdir(exist_ok=True)
        end = pack(path, members, form).stat().st_size
        if form != tarfile.USTAR_FORMAT:  # in the place of the zero blocks at the end
            with tarfile.open(path) as tar:
                end = max(m.offset_data + -(-m.size // 512) * 512 for m in tar)
            info = tarfile.TarInfo("e/huge.jpg")
            info.size = huge
            with open(path, "r+b") as file:
                file.seek(end)
                file.write(info.tobuf(form))
                file.truncate(file.tell() + huge + 1024)
        with tarfile.open(path) as tar:
            theirs = [(os.fsencode(m.name).removeprefix(b"./"), m.offset_data, m.size) for m in tar
                      if m.isfile()]
        with open(path, "rb") as file:
            ours = list(tars.walk(file.fileno(), "t", 0, path.stat().st_size))
        assert ours == theirs and len(ours) >= 3
        path.unlink()


def test_an_index_is_kept_and_fits_its_tars(tmp_path, capsys):
    """The second start reads it and no header; a changed tar makes a run's own anew and an --index
    an error, a missing one is an error, a new one is read, each by name; a damaged file is made
    anew; the other split's part stays, and --index is made where there is none."""
    folder, tars = photos(tmp_path / "folder"), tmp_path / "tars"
    for split in ("train", "val"):
        classes_as_tars(folder / split, tars / split)
    path = tmp_path / "run/index.npz"

    def opened(index=None):
        source = splits.open_data(tars, HW, index=index or archives.Index(path))[0]
        return source, capsys.readouterr().out
    first, said = opened()
    assert said.count("reading the headers of 2 tars") == 2 and f"kept in {path}" in said
    again, said = opened()
    assert said == "" and all(np.array_equal(getattr(first, name), getattr(again, name))
                              for name in archives.ARRAYS)
    assert not list(path.parent.glob("*.npz.*"))
    stamp = (tars / "train/a.tar").stat()
    os.utime(tars / "train/a.tar", ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    with pytest.raises(ValueError, match=f"--index {path} is not of .*: train/a.tar has changed"):
        opened(archives.Index(path, given=True))
    _, said = opened()
    assert f"index {path}: train/a.tar has changed; reading" in said and said.count("reading") == 1
    (tars / "train/a.tar").write_bytes((tars / "train/a.tar").read_bytes()[:2000])
    with pytest.raises(ValueError, match="a.tar is cut short"):
        opened()
    (tars / "train/a.tar").rename(tmp_path / "a.tar")
    with pytest.raises(ValueError, match=f"train/a.tar is missing, which {path} lists"):
        opened()
    classes_as_tars(folder / "train", tars / "train")
    shutil.copy(tars / "train/a.tar", tars / "train/c.tar")
    shutil.copy(tars / "val/a.tar", tars / "val/c.tar")
    source, said = opened()
    assert "it does not have train/c.tar" in said and source.classes == ["a", "a-b", "c"]
    for split in ("train", "val"):  # other data for the same output directory
        os.rename(tars / split, tmp_path / f"{split}.old")
        pack(tars / f"{split}.tar", [(split, folder / split)])
    assert "it does not have train.tar" in opened()[1]
    path.write_bytes(path.read_bytes()[:100])
    assert "cannot be read" in opened()[1] and opened()[1] == ""
    with np.load(path) as file:
        np.savez(path, **{**file, "version": np.array(1)})
    assert "it is of version 1, not 2" in opened()[1] and opened()[1] == ""
    for given in (tmp_path / "new/i.npz", tmp_path / "new/i.npz"):
        said = opened(archives.Index(given, given=True))[1]
    assert said == "" and opened(archives.Index(tmp_path / "x", keep=False))[1]
    assert not (tmp_path / "x").exists()
    with pytest.raises(OSError):  # before any header is read
        opened(archives.Index(path / "x.npz"))
    assert "images in" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="--index .* has no effect: --data .* holds no tars"):
        splits.open_data(folder, HW, index=archives.Index(given, given=True))
    shutil.copytree(folder / "val", tmp_path / "one/val")  # one of the two in tars is enough
    classes_as_tars(folder / "train", tmp_path / "one/train")
    index = archives.Index(tmp_path / "one/i.npz", given=True)
    assert list(map(len, splits.open_data(tmp_path / "one", HW, index=index))) == [13, 5]


def test_an_index_knows_the_folder_it_is_of(tmp_path, capsys):
    """Other data that shares names of tars makes a run's own anew, and nothing is called missing;
    an --index goes with a folder that has moved."""
    photos(tmp_path / "folder")
    for name in "abc":
        pack(tmp_path / f"one/train/{name}.tar", [("1.png", tmp_path / "folder/val/a/01.jpg")])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two/train/b.tar").unlink()

    def said(folder, given=False):
        path = tmp_path / ("given.npz" if given else "index.npz")
        sources.scan(str(tmp_path / folder), "train", archives.Index(path, given))
        return capsys.readouterr().out
    assert "headers of 3 tars" in said("one") and "headers of 3 tars" in said("one", True)
    assert f"it is of {tmp_path / 'one'}; reading the headers of 2 tars" in said("two")
    (tmp_path / "one").rename(tmp_path / "three")
    assert said("three", True) == "" and "it is of" in said("three")


def test_what_is_wrong_with_the_output_is_told_before_tars_are_read(tmp_path):
    """A second job in a directory that is being written to leaves the first one's index alone;
    evaluate.py's that cannot be written is told first, and an index's place likewise."""
    photos(tmp_path / "folder")
    pack(tmp_path / "data/train.tar", [("", tmp_path / "folder/train")])
    lock, _ = resume.claim_output(tmp_path / "out")
    argv = [*TRAIN_FLAGS, "--data", tmp_path / "data", "--output-dir", tmp_path / "out"]
    output = run_command(train.main, *argv, "--global-batch-size", 4, code=2)
    assert f"is being written by process {os.getpid()} " in output and "headers" not in output
    assert not (tmp_path / "out/index.npz").exists()
    lock.close()
    with pytest.raises(ValueError, match="out/.lock/x cannot be written"):
        evaluate.open_images(EvalConfig(
            checkpoint="w", data=str(tmp_path / "no"), output_dir=str(tmp_path / "out/.lock/x")),
            None, dict(classes=()))


# ----------------------------------------------------------------------------- without val
def test_a_folder_without_val_is_split_by_the_hashes_of_its_paths(tmp_path):
    """BLAKE2b of CLASS/... decides, below DIR, DIR/train, in a tar and in another place alike; an
    image that comes later moves no other, and a larger share holds out those of a smaller one."""
    names = [f"{c}/{i}.png" for c in "ab" for i in range(40)]
    for name in names:
        (tmp_path / "bare" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bare" / name).write_bytes(name.encode())
    digest = {name: hashlib.blake2b(name.encode(), digest_size=8).hexdigest() for name in names}
    shutil.copytree(tmp_path / "bare", tmp_path / "in/train")
    pack(tmp_path / "packed/train.tar", [("train", tmp_path / "bare")])
    (tmp_path / "more/c").mkdir(parents=True)
    shutil.copytree(tmp_path / "bare", tmp_path / "more", dirs_exist_ok=True)
    for i in range(20):
        (tmp_path / f"more/c/{i}.png").write_bytes(f"c/{i}.png".encode())
    for share in (0.1, 0.5):
        expected = {name for name in names if int(digest[name], 16) < share * 2**64}
        for place in ("bare", "in", "packed", "packed/train.tar", "more"):
            train, val = splits.open_data(str(tmp_path / place), HW, val_share=share)
            parts = [{os.fsdecode(part.path(i)) for i in range(len(part))} for part in (train, val)]
            assert parts[1] - {f"c/{i}.png" for i in range(20)} == expected
            assert parts[0].isdisjoint(parts[1]) and len(train) + len(val) == 80 + 20 * (
                place == "more")
            assert train.classes == val.classes and train.share == val.share == share
            for part in (train, val):
                assert all(os.fsdecode(part.path(i))[0] == part.classes[part.labels[i]]
                           and os.fsdecode(part.path(i))[1:] in part.name(i)
                           and part.read(i) == part.path(i) for i in range(len(part)))
    assert len(splits.open_data(str(tmp_path / "bare"), HW)[1]) == sum(
        digest[name] < "1999999999999999" for name in names)  # a tenth of 2^64: the default


def test_what_cannot_be_split_is_named(tmp_path):
    """A class that would have no image to train on, an empty val, folders that seem to be splits,
    and a share where there is a val."""
    def fails(message, *paths, share=None):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        for path in paths:
            paint(tmp_path / "d" / path, (1, 1))
        with pytest.raises(ValueError, match=message):
            splits.open_data(str(tmp_path / "d"), HW, val_share=share)
    some = [f"a/{i}.png" for i in range(20)]
    fails("--val-share 0.999.* holds out all images of a, b, where each", *some, "b/1.png",
          share=0.999)
    fails("--val-share 1e-06 .* holds out none of the 20 images: raise it", *some, share=1e-6)
    fails("training, validation in .* name them train and val", "training/a/1.png",
          "validation/a/1.png")
    fails("Validation in .* name them train and val", "train/a/1.png", "Validation/a/1.png")
    fails("--val-share 0.1 has no effect: .* has a val of its own", "train/a/1.png", "val/a/1.png",
          share=0.1)
    for name, message in (("valid.tar", "valid.tar in .* would not be used as a split"),
                          ("train_val.tar", "train_val.tar has train and val in its name")):
        (paint(tmp_path / name / "train/a/1.png").parents[2] / name).write_bytes(b"")
        with pytest.raises(ValueError, match=message):
            splits.open_data(str(tmp_path / name), HW)
    pack(tmp_path / "both.tar", [("train", tmp_path / "d/train"), ("val", tmp_path / "d/val")])
    with pytest.raises(ValueError, match="train, val in .*both.tar .*train.tar, val.tar"):
        splits.open_data(str(tmp_path / "both.tar"), HW)


def test_a_model_is_scored_on_what_its_training_held_out(tmp_path):
    """From the command line: the log tells the split of a tar; evaluate.py's images are those of
    its validation, here unpacked elsewhere, and all of them with --val-share 1; the index lies in
    the output directory, and not after a dry run; a resume with another share is refused."""
    rng, place, out = np.random.default_rng(0), tmp_path / "photos", tmp_path / "out"
    for i in range(100):
        (place / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
            place / str(i % 2) / f"{i}.png")
    tar = pack(tmp_path / "photos.tar", [("photos", place)])
    seen, held = splits.open_data(str(place), HW, val_share=0.3)
    held = len(held)
    argv = [*TRAIN_FLAGS, "--data", tar, "--output-dir", out, "--max-steps", 1, "--num-workers", 0]
    run_command(train.main, *argv, "--dry-run")
    assert not out.exists()
    output = run_command(train.main, *argv, "--val-share", 0.3)
    assert (f"{100 - held} training and {held} validation images (there is no val: --val-share 0.3"
            in output and (out / "index.npz").exists())
    told = re.search("validation (top-1 .* images)", output)[1]
    assert "val_share 0.3 (this run: 0.1)" in run_command(train.main, *argv, code=2)

    def scored(*flags):
        return run_command(evaluate.main, "--checkpoint", out, "--data", place, "--num-workers", 0,
                           "--output-dir", tmp_path / "scores", *flags)
    output = scored()
    assert f"validation {told}" in output and (
        f"{held} of its images, --val-share 0.3 (training held out 0.3 of its own)" in output)
    assert "on 100 images" in scored("--val-share", 1)
    (place / seen.name(0)).unlink()  # not training's images: it is taken to have seen none
    output = scored()
    assert "it is other data, and all 99 images are scored" in output and "on 99 images" in output
    assert f"on {held} images" in scored("--val-share", 0.3)
    pack(tar, [("photos", place)])  # training's own, which has changed since
    assert f"on {held} images" in scored("--data", tar)


# ----------------------------------------------------------------------------- a part of the data
def test_a_fraction_is_the_same_part_everywhere_and_never_held_out(tmp_path):
    """The first classes; of each class's training images those of the greatest hashes, rounded but
    one at least, and all that validate: of a folder and a tar; less is within more; what is held
    out is what would be held out without."""
    sizes = dict(a=40, b=13, c=2, d=30)
    for name, n in sizes.items():
        (tmp_path / "bare" / name).mkdir(parents=True)
        for i in range(n):
            (tmp_path / "bare" / name / f"{i}.png").write_bytes(b"")
    pack(tmp_path / "packed.tar", [("bare", tmp_path / "bare")])

    def paths(source):
        return [os.fsdecode(source.path(i)) for i in range(len(source))]

    def number(path):
        return hashlib.blake2b(path.encode(), digest_size=8).digest()
    whole = {}
    for place in ("bare", "packed.tar"):
        both = splits.open_data(str(tmp_path / place), HW, val_share=0.25)
        assert splits.take_fractions(*both, 1, 1) == both
        train, val = map(paths, both)
        for classes, share in itertools.product((0.1, 0.7, 1), (0.01, 0.1, 0.52, 1)):
            few, few_val = splits.take_fractions(*both, classes, share)
            names = "abcd"[:max(round(4 * classes), 1)]
            assert few.classes == few_val.classes == list(names)
            assert paths(few_val) == [path for path in val if path[0] in names]
            expected = []
            for name in names:
                own = sorted((path for path in train if path[0] == name), key=number)
                expected += own[len(own) - max(round(share * len(own)), 1):]
            assert paths(few) == [path for path in train if path in expected]
            assert [few.classes[label] for label in few.labels] == [p[0] for p in paths(few)]
            assert whole.setdefault((classes, share), paths(few)) == paths(few)  # in a tar too
            assert share == 0.01 or set(whole[classes, 0.01]) <= set(paths(few))
    with pytest.raises(ValueError, match="--classes-fraction 0.1 leaves a, of which no image val"):
        splits.take_fractions(both[0], both[1].subset(both[1].labels > 0), 0.1, 1)


def test_a_model_of_a_fraction_is_scored_on_its_classes_wherever_they_lie(tmp_path):
    """The images of other classes are left out: of class folders, of numbers, of flat images with
    labels, of WebDataset's numbers, and of a part that is held out, which a moved folder keeps;
    without a fraction such a val is another model's."""
    flat, labels = tmp_path / "flat/val", "ImageId,PredictionString\n"
    for i, (name, k) in enumerate(itertools.product("abcd", range(6))):
        image = paint(tmp_path / "folders/val" / name / f"{name}{k}.png")
        for path in (flat, tmp_path / "numbers/val" / str(i // 6), tmp_path / "bare" / name,
                     *[tmp_path / "alone/val" / name] * (i < 12)):
            path.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, path)
        labels += f"{image.stem},{name} 1 2 3 4\n"
    (tmp_path / "solution.csv").write_text(labels)
    pack(tmp_path / "shards/val-0.tar", [(path.stem + ending, content) for path in flat.iterdir()
         for ending, content in ((".png", path.read_bytes()),
                                 (".cls", str("abcd".index(path.name[0])).encode()))])
    facts = dict(classes=("a", "b"), classes_fraction=0.5, val_share=None, images=3)

    def scored(place, **changes):
        config = EvalConfig(checkpoint="c", data=str(tmp_path / place), output_dir=str(tmp_path),
                            val_labels=str(tmp_path / "solution.csv") if place == "flat" else None)
        images = evaluate.open_images(config, SimpleNamespace(image_hw=HW), facts | changes)
        names = [os.path.basename(images.name(i)) for i in range(len(images))]
        assert images.classes == ["a", "b"] and [images.load(i)[1] for i in range(len(images))] == [
            "ab".index(name[0]) for name in names]
        return images.told, sorted(names)
    both = sorted(f"{name}{k}.png" for name, k in itertools.product("ab", range(6)))
    for place in ("folders", "flat", "numbers", "shards"):
        assert scored(place) == ("12 images of classes that the model does not know are left out",
                                 both), place
    assert scored("alone") == (None, both)
    held = splits.open_data(str(tmp_path / "bare"), HW, val_share=0.3)[1]
    assert scored("bare", val_share=0.3)[1] == [
        name[2:] for name in map(held.name, range(len(held))) if name[0] in "ab"] != both
    with pytest.raises(ValueError, match="2 only in .*folders: c, d"):
        scored("folders", classes_fraction=1)


def test_a_run_on_a_fraction_is_that_of_the_flags(tmp_path):
    """The log tells the part, and a resume with another that it is another; evaluate.py knows it,
    of a checkpoint and of a file. The shapes have none, and a small part of a large folder is a
    small folder."""
    root, out = tmp_path / "photos", tmp_path / "out"
    for split, n in (("train", 8), ("val", 3)):
        for name, i in itertools.product("abcd", range(n)):
            paint(root / split / name / f"{i}.png", (16, 16), "RGB", (30 * i, 9, 7))
    argv = [*TRAIN_FLAGS, "--data", root, "--output-dir", out, "--num-workers", 0,
            "--head", "linear", "--global-batch-size", 8, "--classes-fraction", 0.5, "--max-steps"]
    output = run_command(train.main, *argv, 1, "--data-per-class-fraction", 0.5)
    assert ("--classes-fraction 0.5 and --data-per-class-fraction 0.5 take 2 of 4 classes, 8 of 32 "
            "training and 6 of 12 validation images" in output)
    assert " on 6 images" in output and "has 16 training images" in run_command(
        train.main, *argv, 2)
    weights.main([str(out), str(tmp_path / "vit.pt")])
    for source in (str(out), str(tmp_path / "vit.pt")):
        config = EvalConfig(checkpoint=source, data=str(root), output_dir=str(out))
        images = evaluate.open_images(config, TINY, weights.read_weights(source).facts)
        assert len(images) == 6 and images.classes == ["a", "b"]
    flags = ["--classes-fraction", "0.5", "--data-per-class-fraction", "0.5"]
    with pytest.raises(ValueError, match="--classes-fraction has no effect with --data shapes"):
        parse_run(TrainConfig, flags)
    config, vit, given = parse_run(TrainConfig, [*map(str, argv), "3", "--classes-fraction", "0.1"])
    with pytest.raises(ValueError, match="one class alone, a: .* take 1 of 4 classes, 8 of 32 "):
        train.open_images(config, vit, given, Grid())
    for n, recipe in ((63, "small"), (64, "pretrain")):
        with open(root / "train/a/one.tar", "wb") as file:  # as many images as 40 kB, less 1
            file.truncate(40_000 * (n * SMALL_FOLDER // 16 - 1))
        assert parse_run(TrainConfig, ["--data", str(root), *flags])[0].recipe == recipe


# ----------------------------------------------------------------------------- order
def test_order_is_a_permutation_of_seed_and_epoch():
    """Each epoch shows every image once, in an order that seed and epoch change."""
    orders = [data.order(100, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(o) == list(range(100)) for o in orders)
    assert len({tuple(o) for o in orders}) == 4


@pytest.mark.parametrize("world, local", [(1, 6), (2, 3), (3, 1)])
def test_the_stream_is_the_order_of_its_epochs_end_to_end(world, local):
    """Image i of the stream is order(n, seed, i // n)[i % n], from any start, where epochs of 7 end
    inside batches of 6 and a batch of 6 holds parts of several micro-batches of several ranks."""
    for start in (0, 6, 5, 6 * 10**8):
        ranks = [data.StreamSampler(7, 3, 6, local, rank, world, start, 4) for rank in range(world)]
        micros = zip(*ranks, strict=True)
        got = [key for same_time in micros for batch in same_time for key in batch]
        assert got == [(i // 7, data.order(7, 3, i // 7)[i % 7]) for i in range(start, start + 24)]
        assert {len(sampler) for sampler in ranks} == {24 // (world * local)}
    with pytest.raises(ValueError, match="6 must be a multiple of 4 images x 1 ranks"):
        data.StreamSampler(7, 3, 6, 4, 0, 1, 0, 1)
    with pytest.raises(ValueError, match=r"must be images \(0\)"):
        data.StreamSampler(0, 3, 6, 6, 0, 1, 0, 1)


@pytest.mark.parametrize("repeats, batch", [(3, 12), (3, 16), (2, 10), (4, 8)])
def test_repeated_augmentation_shows_views_of_fewer_images(repeats, batch):
    """Of n = 25 images, whatever the layout, a batch has U = ceil(G / R) different ones, each R
    times but for what is cut off, neighbours differ; each sweep over the images is the order of an
    epoch, and an image's views have numbers that never return. In sweep e, these are e * R + r."""
    n, steps, different = 25, 20, -(-batch // repeats)
    whole = [key for micro in data.StreamSampler(n, 3, batch, batch, 0, 1, 0, steps, repeats)
             for key in micro]
    assert len(set(whole)) == len(whole) == steps * batch
    first_views = []
    for k in range(steps):
        keys = whole[k * batch:][:batch]
        first_views += keys[:different]
        for j, (view, index) in enumerate(keys):
            first, same = keys[j % different]
            assert (view, index) == (first + j // different, same)
        assert all(a[1] != b[1] for a, b in zip(keys[::2], keys[1::2])
                   if a[0] // repeats == b[0] // repeats)
    assert [index for _, index in first_views] == [
        data.order(n, 3, i // n)[i % n] for i in range(steps * different)]
    assert [view for view, _ in first_views] == [
        i // n * repeats for i in range(steps * different)]
    for world, local in ((2, batch // 4), (1, batch // 2)) if batch % 4 == 0 else ((5, 1),):
        ranks = [data.StreamSampler(n, 3, batch, local, rank, world, 7 * batch, 13, repeats)
                 for rank in range(world)]
        assert [key for micros in zip(*ranks) for m in micros for key in m] == whole[7 * batch:]


def test_start_step_far_in_the_run_starts_at_once():
    """A resume does not replay the stream: that would take minutes."""
    begin = time.perf_counter()
    first = next(iter(data.StreamSampler(1000, 0, 8, 4, 1, 2, 10**9, 1)))
    assert time.perf_counter() - begin < 1 and first[0][0] == 10**9 // 1000


def test_layout_and_resume_do_not_change_batches_or_pixels():
    """World, micro-batch, workers and start step leave the stream and its pixels as they are."""
    source = few_shapes()  # 60 of 25 images: epochs end inside batches
    whole = steps_of([train_batches(source)], 5)
    assert len(whole) == 4 and len(whole[3].flatten(0, 1).unique(dim=0)) == 60  # jitter: own rows
    for world, local in ((1, 4), (2, 3), (3, 4), (4, 1)):
        ranks = [train_batches(source, world, rank, local) for rank in range(world)]
        assert all(map(torch.equal, steps_of(ranks, 5), whole)), (world, local)
    resumed = steps_of([train_batches(source, local=6, start_image=36, steps=2, num_workers=2)], 2)
    assert all(torch.equal(a, b[3:]) for a, b in zip(resumed, whole))
    epochs = whole[2].flatten()[:50].view(2, 25)
    assert all(sorted(epoch.tolist()) == list(range(25)) for epoch in epochs)
    assert torch.equal(whole[1], whole[2] % 16)  # each image comes with its own label
    with pytest.raises(ValueError, match="multiple of 5 images x 2 ranks"):
        train_batches(source, 2, 0, 5)


@pytest.mark.parametrize("world, batch", list(itertools.product((1, 2, 3, 4), (7, 64))))
def test_evaluation_counts_each_image_once(world, batch):
    """All ranks have as many equal batches; every image is in one; the rest is padding. What
    training alone needs, seed, augmentation and global batch, the config need not have."""
    config = SimpleNamespace(crop_ratio=0.875, num_workers=0, prefetch_factor=4, pin_memory=True,
                             decode="auto")
    source = few_shapes(45, "val")
    ranks = [list(data.eval_loader(source, config, HW, batch, r, world, "cpu"))
             for r in range(world)]
    assert {len(batches) for batches in ranks} == {-(-45 // (batch * world))}
    images, labels, indices = map(torch.cat, zip(*(b[:3] for batches in ranks for b in batches)))
    assert images.shape[1:] == (3, *HW) and len(images) % (world * batch) == 0
    assert sorted(indices[indices >= 0].tolist()) == list(range(45))
    assert torch.equal(labels == IGNORE, indices == PADDING)
    assert torch.equal(labels[indices >= 0], indices[indices >= 0] % 16)
    assert not images[indices == PADDING].any() and images[indices >= 0].flatten(1).any(1).all()


# ----------------------------------------------------------------------------- views
def test_a_view_is_a_function_of_seed_epoch_and_index():
    """One image under all numbers: the same (seed, epoch, index) gives the same pixels, jitter and
    mixing, those that the generator of these three draws; any other gives others."""
    config = replace(CONFIG, mixup=0.8)
    picture = samples.Shapes((64, 64), "train").load(3)[0]
    same = SimpleNamespace(load=lambda index: (picture, 0))
    transform = train_transform(CONFIG, HW)
    views = {}
    for seed, epoch, index in itertools.product((0, 1), (0, 1, 2), (0, 1, 2)):
        dataset = data.Views(same, transform, HW, seed, functools.partial(draws, config, HW))
        view, label, number, rows = dataset[epoch, index]
        again = dataset[epoch, index]
        assert torch.equal(view, again[0]) and (label, number) == (0, index)
        assert rows.keys() == {"jitter", "mix"}
        torch.manual_seed(stable_seed("view", seed, epoch, index))
        assert torch.equal(view, transform(picture))
        assert torch.equal(rows["jitter"], draw_jitter(JITTER["nemo"]))
        assert torch.equal(rows["mix"], draw_mix(0.8, 0, HW))
        assert all(torch.equal(rows[name], again[3][name]) for name in rows)
        views[seed, epoch, index] = [x.numpy().tobytes() for x in (view, *rows.values())]
    for a, b in itertools.combinations(views, 2):
        assert all(x != y for x, y in zip(views[a], views[b])), (a, b)


def test_an_image_looks_different_in_every_epoch():
    """In the batches themselves: no view of an image returns, and the same epoch shows the same."""
    images, _, indices, rows = (part.flatten(0, 1) for part in steps_of(
        [train_batches(few_shapes(4), steps=3)], 3))  # nine epochs of four images
    for index in range(4):
        own = (indices == index).nonzero().flatten()
        assert len(own) == 9 == len(images[own].flatten(1).unique(dim=0))
        assert len(rows[own].unique(dim=0)) == 9
    again = steps_of([train_batches(few_shapes(4), steps=3)], 3)
    assert torch.equal(again[0].flatten(0, 1), images)
    other = steps_of([train_batches(few_shapes(4), steps=3, seed=6)], 3)
    assert not torch.equal(other[0].flatten(0, 1), images)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_trainers_random_state_is_untouched(workers):
    """Neither making views, in the process or in workers, nor starting a loader draws from it."""
    source = few_shapes()
    config = replace(CONFIG, num_workers=workers)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    train_batches(source, num_workers=workers)
    list(data.eval_loader(source, config, HW, 7, 0, 1, "cpu"))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


def test_views_draw_from_torch_alone():
    """NeMo's transforms give the same view whatever python's and numpy's generators hold."""
    image = samples.Shapes((64, 48), "train").load(3)[0]
    transform = train_transform(CONFIG, HW)
    views = []
    for seed in range(8):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(0)
        views.append(np.asarray(transform(image)).tobytes())
    assert len(set(views)) == 1


def test_evaluation_view_is_resize_and_centre_crop():
    """As torchvision's Resize + CenterCrop for a square; other shapes keep the aspect ratio. It is
    the view of every evaluation batch, at --crop-ratio, and of training without augmentation."""
    rng = np.random.default_rng(0)
    for size in ((500, 375), (375, 500), (300, 300), (257, 901)):
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        theirs = v2.CenterCrop(64)(v2.Resize(73, interpolation=v2.InterpolationMode.BICUBIC)(image))
        ours = centre_view(image, (64, 64), 0.875)
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs)).max() <= 1
    disc = Image.new("RGB", (400, 300))
    ImageDraw.Draw(disc).ellipse((150, 100, 250, 200), fill=(255, 255, 255))
    view = np.asarray(centre_view(disc, (96, 160), 1.0))[..., 0] > 127
    assert view.shape == (96, 160) and abs(np.ptp(np.nonzero(view)[0])
                                           - np.ptp(np.nonzero(view)[1])) <= 1
    source, hw = few_shapes(6, "val", (60, 80)), (32, 40)
    for ratio in (0.5, 0.875):
        config = replace(CONFIG, crop_ratio=ratio, augmentation="none")
        views = [np.asarray(centre_view(source.load(i)[0], hw, ratio)) for i in range(6)]
        views = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
        assert torch.equal(next(iter(data.eval_loader(source, config, hw, 6, 0, 1, "cpu")))[0],
                           views)
        trained = data.train_loader(source, config, hw, 12, 0, 1, 0, 1, "cpu")
        images, _, indices, _ = next(iter(trained))
        assert torch.equal(images, views[indices])


def in_pillow(transform):
    return [v2.RandomHorizontalFlip(), v2.ToPILImage(), transform, v2.PILToTensor()]


BILINEAR = v2.InterpolationMode.BILINEAR
AUGMENTATIONS = {
    "crop": [], "crop-flip": [v2.RandomHorizontalFlip()],
    "nemo": in_pillow(v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, v2.InterpolationMode.BICUBIC,
                                     fill=128)),
    "randaugment": in_pillow(v2.RandAugment(3, 20, interpolation=BILINEAR)),
    "trivialaugment": in_pillow(v2.TrivialAugmentWide(interpolation=BILINEAR)),
    "3-augment": [v2.RandomHorizontalFlip(), v2.RandomChoice([
        v2.Grayscale(3), v2.RandomSolarize(128, 1.0), v2.GaussianBlur(13, (0.1, 2.0))])]}


@pytest.mark.parametrize("augmentation", CROPPED)
def test_augmentations_are_torchvisions(augmentation):
    """From the same generator state each list of transforms gives the bytes of torchvision's own,
    for 40 draws: at scale 0.3, bicubic, NeMo's grey of 128 where AutoAugment turns an image; and
    erased boxes, half of the time, hold the mean to a byte. A name without a view is refused."""
    image = samples.Shapes((100, 120), "train").load(3)[0]
    config = replace(CONFIG, augmentation=augmentation, crop_scale=0.3, random_erasing=0.5,
                     rand_augment=(3, 20), mean=(0.1, 0.5, 0.9))
    ours = train_transform(config, (64, 96))
    theirs = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(
        (64, 96), (0.3, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
        *AUGMENTATIONS[augmentation], v2.RandomErasing(0.5, value=[26, 128, 230])])
    views = []
    for seed in range(40):
        views += [torch.manual_seed(seed) and view(image) for view in (ours, theirs)]
        assert torch.equal(*views[-2:])
    assert len(torch.stack(views).unique(dim=0)) == 40
    pickle.loads(pickle.dumps(ours))  # as workers need it that are not forked
    with pytest.raises(AssertionError, match="--augmentation new has no view"):
        train_transform(SimpleNamespace(**vars(config) | {"augmentation": "new"}), HW)


def test_training_view_is_torchvisions_on_pillow():
    """Resizing bytes in torch is Pillow's resize: at most 1 of 255 apart in 99 % of the values (two
    roundings; more only at sharp edges, where the bytes between the two passes saturate)."""
    image = samples.Shapes((300, 400), "train").load(3)[0]
    ours = train_transform(replace(CONFIG, augmentation="crop-flip"), (64, 96))
    theirs = v2.Compose([
        v2.RandomResizedCrop((64, 96), interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(), v2.PILToTensor()])
    for seed in range(8):
        views = [torch.manual_seed(seed) and view(image).int() for view in (ours, theirs)]
        assert ((views[0] - views[1]).abs() <= 1).float().mean() > 0.99


# ----------------------------------------------------------------------------- on the device
def test_normalize_is_exact():
    """(x / 255 - mean) / std in fp32, then cast."""
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=generator("images"))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    want = torch.stack([(images[:, c] / 255 - mean[c]) / std[c] for c in range(3)], 1)
    torch.testing.assert_close(normalize(images, mean, std, torch.float32), want)
    assert normalize(images, mean, std, torch.bfloat16).dtype == torch.bfloat16


def test_colour_jitter_on_the_device_is_torchvisions():
    """From the same generator state a row draws, and color_jitter does, what NeMo's ColorJitter
    does to each float image, in all 24 orders, on black, white and grey pixels too (1e-5: rounding
    in fp32, 2e-6 seen), and nothing else is drawn; and DeiT-III's, but for a hue of 0. It compiles
    to one graph, with mixing, and reads nothing back: it runs on the meta device."""
    images = torch.randint(0, 256, (200, 3, 16, 12), generator=generator(0), dtype=torch.uint8)
    images[:, :, :4] = images[:, :1, :4]
    images[:, :, 4], images[:, :, 5] = 0, 255
    theirs, rows, want = v2.ColorJitter(0.4, 0.4, 0.4, 0.1), [], []
    for seed, image in enumerate(images):
        torch.manual_seed(seed)
        rows.append(draw_jitter(JITTER["nemo"]))
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        want.append(theirs(image / 255))
        assert torch.equal(after, torch.get_rng_state())
    rows, want = torch.stack(rows), torch.stack(want)
    assert len(rows[:, :4].unique(dim=0)) == 24
    for seed, image in enumerate(images[:24]):
        torch.manual_seed(seed)
        ours = color_jitter(image[None] / 255, draw_jitter(JITTER["3-augment"])[None])[0]
        torch.manual_seed(seed)
        torch.testing.assert_close(ours, v2.ColorJitter(0.3, 0.3, 0.3)(image / 255), atol=1e-5,
                                   rtol=0)
    got = color_jitter(images / 255, rows)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    compiled = torch.compile(normalize, fullgraph=True, backend="eager")
    got = normalize(images, mean, std, torch.float32, rows)
    want = (want - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    mix = torch.stack([draw_mix(0.8, 1.0, (16, 12)) for _ in images])
    torch.testing.assert_close(compiled(images, mean, std, torch.float32, rows, mix),
                               mix_pairs(got, mix))
    normalize(images.to("meta"), mean, std, torch.float32, rows.to("meta"), mix.to("meta"))


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.2, 0.7)])
def test_mixing_is_torchvisions_on_pairs(mixup, cutmix):
    """From the same generator state images 2k and 2k + 1, of any shape, and their targets mix as
    v2.MixUp and v2.CutMix mix a batch of the two, by the first one's draw; with both by even odds.
    1e-6: rounding in fp32. The least alpha draws no nan."""
    hw, seen = (24, 40), set()
    images = torch.rand(120, 3, *hw, generator=generator("mix"))
    labels = torch.arange(120) % 7
    rows, want, targets = [], [], []
    for k in range(60):
        torch.manual_seed(k)
        rows += [draw_mix(mixup, cutmix, hw), torch.full((5,), torch.nan)]
        after = torch.get_rng_state()
        torch.manual_seed(k)
        cut = not mixup or bool(cutmix) and bool(torch.rand(()) < 0.5)
        mix = (v2.CutMix if cut else v2.MixUp)(alpha=cutmix if cut else mixup, num_classes=7)
        pair = slice(2 * k, 2 * k + 2)
        for part, whole in zip(mix(images[pair], labels[pair]), (want, targets)):
            whole.append(part)
        assert torch.equal(after, torch.get_rng_state())
        seen.add(cut)
    assert seen == {name for name, on in ((False, mixup), (True, cutmix)) if on}
    rows = pair_rows(torch.stack(rows), labels)
    mixed = mix_pairs(images, rows)
    torch.testing.assert_close(mixed, torch.cat(want), atol=1e-6, rtol=0)
    assert (mixed - images).abs().amax((1, 2, 3)).gt(0.01).float().mean() > 0.4
    torch.testing.assert_close(soft_targets(labels, rows, 7, 0.0), torch.cat(targets), atol=1e-6,
                               rtol=0)
    assert all(draw_mix(1e-6, 0, hw).isfinite().all() for _ in range(20))


def test_an_unreadable_image_is_never_mixed():
    """Nor is its partner: pixels stay as they are, and the targets are its own class and nothing.
    Smoothing gives (1 - s) t + s / K to a readable image and nothing to the other."""
    images = torch.rand(6, 3, 4, 4, generator=generator("pair"))
    labels = torch.tensor([1, IGNORE, IGNORE, 2, 0, 3])
    rows = pair_rows(torch.tensor([[0.4, 0, 0, 0, 0], [0.1, 1, 1, 3, 3]]).repeat(3, 1), labels)
    mixed = mix_pairs(images, rows)
    assert torch.equal(mixed[:4], images[:4]) and not torch.equal(mixed[4:], images[4:])
    want = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0.4, 0, 0, 0.6],
                         [0.6, 0, 0, 0.4]])
    assert torch.equal(soft_targets(labels, rows, 4, 0.0), want)
    smooth = (0.8 * want + 0.05) * (labels >= 0)[:, None]
    torch.testing.assert_close(soft_targets(labels, rows, 4, 0.2), smooth)


# ----------------------------------------------------------------------------- loaders
@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="workers share memory elsewhere")
def test_too_little_shared_memory_fails_at_the_start():
    """With the flags that help, instead of a bus error hours later; loading without workers needs
    none. Room for twice the batches held ready is asked for: an evaluation comes on top."""
    config = replace(CONFIG, num_workers=2, prefetch_factor=10**9)
    for make in (lambda c: data.train_loader(few_shapes(), c, HW, 12, 0, 1, 0, 1, "cpu"),
                 lambda c: data.eval_loader(few_shapes(), c, HW, 12, 0, 1, "cpu")):
        with pytest.raises(ValueError, match="--num-workers or --prefetch-factor"):
            make(config)
        assert len(make(replace(config, num_workers=0)))
    free = shutil.disk_usage("/dev/shm").free
    data._check_shared_memory(1, free // 10)
    with pytest.raises(ValueError, match="MiB free"):
        data._check_shared_memory(9, free // 10)


@pytest.mark.skipif(sys.platform != "linux", reason="signals of Linux")
def test_workers_outlive_the_jobs_sigterm_but_not_their_trainer():
    """After SIGTERM and SIGINT to the whole process group the batches go on; a trainer that then
    fails, its loader still referenced, exits at once and leaves no worker."""
    program = textwrap.dedent("""
        import os, signal, sys, time
        sys.path.insert(0, %r)
        import data, samples
        from configs import TrainConfig
        config = TrainConfig(global_batch_size=4, num_workers=2, seed=0, augmentation="none")
        source = samples.Shapes((32, 32), "train")
        batches = iter(data.train_loader(source, config, (32, 32), 4, 0, 1, 0, 100, "cpu"))
        next(batches), next(batches)  # one of each worker: both have begun
        for number in (signal.SIGTERM, signal.SIGINT):  # only now: workers inherit none of it
            signal.signal(number, lambda *_: None)
        print(*[w.pid for w in batches._workers], flush=True)
        input()
        assert len(list(batches)) == 98
        batches = iter(data.train_loader(source, config, (32, 32), 4, 0, 1, 0, 10**6, "cpu"))
        next(batches)
        raise SystemError("the trainer fails")
    """) % str(Path(__file__).parent)
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0)
    try:
        workers = [int(pid) for pid in child.stdout.readline().split()]
        for number in (signal.SIGINT, signal.SIGTERM):
            os.killpg(child.pid, number)  # as torchrun's agent does: not from the workers' parent
        time.sleep(0.3)
        _, errors = child.communicate("\n", timeout=120)
        assert "the trainer fails" in errors and child.returncode == 1, errors
        assert len(workers) == 2 and not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


# ----------------------------------------------------------------------------- the digits
def test_digits_are_written_as_a_folder_to_train_on(tmp_path, capsys):
    """1,438 PNGs and 359 JPEGs of ten classes, every fifth digit for validation, grey, each pixel
    Pillow's bicubic resize of 8 x 8 values of 0 to 16; a folder in use is left alone."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    folder = tmp_path / "new" / "digits"
    samples.main(["digits", str(folder), "--size", "24"])
    assert re.search("train: 1,438 images.*val: 359 images", capsys.readouterr().out)
    train, val = splits.open_data(str(folder), HW)
    assert (len(train), len(val)) == (1438, 359) and train.classes == list("0123456789")
    for i, source in ((3, train), (1796, train), (4, val), (1794, val)):
        ending = "jpg" if source is val else "png"
        name = f"{source.split}/{digits.target[i]}/{i:05d}.{ending}"
        index = [source.name(k) for k in range(len(source))].index(name)
        image, label = source.load(index)
        want = Image.fromarray((digits.images[i] * 255 / 16).astype("uint8"))
        want = np.asarray(want.resize((24, 24), Image.Resampling.BICUBIC), int)[..., None]
        assert label == digits.target[i] and image.size == (24, 24)
        assert np.abs(np.asarray(image, int) - want).max() <= (4 if source is val else 0)  # JPEG
    before = sorted(folder.rglob("*"))
    for argv, message in ((["digits", str(folder)], "is not empty"),
                          (["digits", str(folder / "train/0/00000.png")], "cannot be written"),
                          (["digits", str(tmp_path / "x"), "--size", "0"], "--size 0")):
        with pytest.raises(SystemExit):
            samples.main(argv)
        errors = capsys.readouterr().err
        assert errors.count("samples.py: error:") == 1 and message in errors
    assert sorted(folder.rglob("*")) == before and not (tmp_path / "x").exists()


def test_digits_say_which_library_they_need(tmp_path, monkeypatch, capsys):
    """scikit-learn is no requirement: without it there is one clear error and no folder."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit):
        samples.main(["digits", str(tmp_path / "x")])
    assert "pip install scikit-learn" in capsys.readouterr().err and not (tmp_path / "x").exists()
