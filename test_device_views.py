"""What device_views.py promises: `python -m pytest test_device_views.py`, on a CPU.

All of it but the JPEG engines runs on any device; here, on the CPU, torchvision's decode_jpeg
stands in for them, and its pixels are Pillow's.
"""

import faulthandler
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import data
import device_views
import pixels
import samples
import sources
import train
from augment import View, train_transform
from configs import CROPPED, TrainConfig
from data import IGNORE
from device_views import decode_all, groups, plain_jpeg
from pixels import augment, resize, window
from testing import Few, losses, run_command, run_ranks

torch.set_num_threads(1)
CPU, HW = torch.device("cpu"), (48, 64)
CONFIG = TrainConfig(global_batch_size=12, num_workers=0, seed=5)
OPERATED = [name for name in CROPPED if "crop" not in name]


def photo(index, size):
    """An image with edges, smooth ground and noise."""
    rng = np.random.default_rng(index)
    ground = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    image = np.asarray(ground.resize(size, Image.Resampling.BICUBIC), int)
    shape = np.asarray(samples.Shapes((64, 64), "train").load(index)[0].resize(size), int)
    return Image.fromarray((image // 2 + shape // 2 + rng.integers(0, 4, image.shape)).astype("u1"))


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of every kind, each in both splits: (the folder, the kinds in the source's order)."""
    root, files = tmp_path_factory.mktemp("images"), {}
    sizes = (100, 75), (75, 100), (64, 48), (300, 200), (1, 1), (1, 90), (40, 8)
    for i, size in enumerate(sizes):
        files[f"plain {i}.jpg"] = jpeg(photo(i, size), subsampling=i % 3)
    turned, image = Image.Exif(), photo(20, (90, 70))
    turned[0x0112] = 6
    upright = Image.Exif()
    upright[0x0112], upright[0x010F] = 1, "maker"
    files["plain grey.jpg"] = jpeg(image.convert("L"))
    files["plain exif.jpg"] = jpeg(image, exif=upright)
    files["turned.jpg"] = jpeg(image, exif=turned)
    files["progressive.jpg"] = jpeg(image, progressive=True)
    files["cmyk.jpg"] = jpeg(image.convert("CMYK"))
    files["rgb.jpg"] = jpeg(image, keep_rgb=True)
    ids = [(b"R\x11\0G\x11\0B\x11\0", b"1\x11\x002\x11\x003\x11\0"),
           (b"R\0G\0B\0", b"1\x002\x003\0")]
    marked = files["rgb.jpg"]  # by the names of its components and by Adobe's mark: one is enough
    files["rgb named.jpg"] = marked.replace(b"Adobe", b"adobe")
    for old, new in ids:
        marked = marked.replace(old, new)
    files["rgb marked.jpg"] = marked
    files["png.png"] = files["png called.jpg"] = b""
    whole = files["plain 3.jpg"]
    files["cut.jpg"] = whole[:-200]
    files["plain hurt.jpg"] = whole[:2000] + bytes(50) + whole[2050:]
    files["text.jpg"], files["empty.jpg"] = b"not an image", b""
    for split in ("train", "val"):
        for name, content in files.items():
            path = root / split / name[0] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            if name.startswith("png"):
                image.save(path, "PNG")
    return root


@pytest.fixture
def on_device(monkeypatch):
    """The CPU passes for a device that decodes."""
    monkeypatch.setattr(device_views, "engine", lambda device: None)


@pytest.fixture
def beside(monkeypatch):
    """The CPU passes for a GPU that decodes nothing, of few cores: the views that it augments."""
    counts, real = [], pixels.augment
    monkeypatch.setattr(device_views, "not_beside", lambda device: None)
    monkeypatch.setattr(device_views, "CORES", 1)
    monkeypatch.setattr(pixels, "augment", lambda *a: counts.append(len(a[1])) or real(*a))
    return counts


def batches(root, decode, **changes):
    """Two epochs of training batches, then an evaluation's, at --decode cpu or gpu."""
    config, source = replace(CONFIG, decode=decode, **changes), sources.scan_folder(root, "train")
    loader = data.train_loader(source, config, HW, 12, 0, 1, 0, 2 * len(source) // 12, CPU)
    return [*loader, *data.eval_loader(source, config, HW, 7, 0, 1, CPU)]


# ----------------------------------------------------------------------------- the same pixels
def test_plain_files_are_told_by_their_header(folder, monkeypatch):
    """Whole, upright, sequential JPEGs, grey or YCbCr, with their size; of damage a header tells
    nothing. The others, and any that cannot be opened, are left to Pillow."""
    source = sources.scan_folder(folder, "train")
    for i in range(len(source)):
        name, size = os.path.basename(source.name(i)), plain_jpeg(source.read(i))
        assert bool(size) == name.startswith("plain"), name
        assert not size or size == source.load(i)[0].size[::-1], name
    files = [source.read(i) for i in range(len(source))]
    for file in filter(plain_jpeg, files):
        pixels = decode_all([torch.frombuffer(bytearray(file), dtype=torch.uint8)],
                            [plain_jpeg(file)], CPU)[0]
        want = np.array(sources.decode(io.BytesIO(file)))
        assert torch.equal(pixels, torch.from_numpy(want).permute(2, 0, 1))
    monkeypatch.setattr(device_views, "MOST_PIXELS", 300 * 200 - 1)  # of a group
    assert plain_jpeg(jpeg(photo(3, (300, 199)))) and not plain_jpeg(jpeg(photo(3, (300, 200))))


def test_a_worker_that_decodes_quicker_makes_the_same_batches(folder, monkeypatch):
    """Bit for bit: torchvision's decoder, used where its pixels are Pillow's, and Pillow."""
    quick, used = batches(folder, "cpu"), []
    assert device_views.same_pixels()
    real = device_views._decode_jpegs
    monkeypatch.setattr(device_views, "_decode_jpegs", lambda *a: used.append(a) or real(*a))
    batches(folder, "cpu")
    assert len(used) > 15
    device_views.same_pixels.cache_clear()
    monkeypatch.setattr(device_views, "_decode_jpegs", lambda *a: [x ^ 1 for x in real(*a)])
    assert not device_views.same_pixels()
    for one, other in zip(quick, batches(folder, "cpu"), strict=True):
        assert all(map(torch.equal, one[:3], other[:3]))
    device_views.same_pixels.cache_clear()


@pytest.mark.parametrize("augmentation", ["crop-flip", "none"])
def test_resizing_is_the_cpu_paths(augmentation):
    """Of images larger, smaller and thinner than the view, made in one group, each value is as the
    worker's within 1, or 2 where a column's byte and then a row's are rounded the other way (fewer
    than 1 of 10,000), and 99 % are equal: weights are fp32 here, 16 bits there."""
    images = [photo(i, size) for i, size in enumerate((
        (100, 75), (500, 375), (375, 500), (64, 48), (1, 1), (1, 700), (900, 2), (33, 20)) * 2)]
    transform = train_transform(replace(CONFIG, augmentation=augmentation, crop_scale=0.2), HW)
    torch.manual_seed(0)
    views = [transform.draw(image.size[::-1]) for image in images]
    assert augmentation == "none" or {view.flip for view in views} == {True, False}
    pictures = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    windows = [window(view, image.size[::-1], HW) for view, image in zip(views, images)]
    for n in (len(images), 1):
        got = resize(pictures[:n], views[:n], windows[:n], HW).int()
        want = torch.stack([transform.apply(*pair) for pair in zip(images[:n], views[:n])])
        error = (got - want).abs()
        assert error.max() <= 2 and (error > 1).float().mean() < 1e-4
        assert (error == 0).float().mean() > 0.99


OPERATIONS = {  # and magnitudes, of both signs where torchvision's may be negative
    **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), (0.0, 0.31, -0.9, 0.99)),
    **dict.fromkeys(("ShearX", "ShearY"), (0.0, 0.3, -0.17, 0.99)),
    **dict.fromkeys(("TranslateX", "TranslateY"), (0.0, 3.7, -20.2, 32.0)),
    "Rotate": (0.0, 4.5, -30.0, 90.0, 135.0, -180.0), "Posterize": (8, 7, 4, 2),
    "Solarize": (0.0, 1.0, 4 / 9, 128 / 255),
    **dict.fromkeys(("Identity", "AutoContrast", "Equalize", "Invert"), (0.0,))}


@pytest.mark.parametrize("augmentation, names", [
    ("nemo", OPERATIONS), ("trivialaugment", OPERATIONS),
    ("3-augment", {"Grey": (0.0,), "Solarize": (128 / 255,), "Blur": (0.1, 0.5, 2.0)})])
def test_operations_are_the_workers(augmentation, names, monkeypatch):
    """Each on photographs, black, white, one grey, two values, in one batch, by bytes: equal, but
    for turning, shearing and blurring, where fp32 stands for fp64 before bytes are cut off: 1 apart
    in fewer than 1 of 100. No flag of the process changes: of two threads that set one and put it
    back, the last may put back what the first had set. Blurring asks for neither cuDNN nor tf32,
    which keeps 10 bits of a number."""
    monkeypatch.setattr(torch.backends.cudnn, "flags", None)
    monkeypatch.setattr(torch, "_convolution", asked := Mock(wraps=torch._convolution))
    transform = train_transform(replace(CONFIG, augmentation=augmentation), HW)
    two = np.zeros((*HW, 3), np.uint8)
    two[10:30] = 255
    images = [photo(0, HW[::-1]), photo(7, HW[::-1]), Image.fromarray(two),
              *(Image.new("RGB", HW[::-1], (c, c, min(c + 3, 255))) for c in (0, 128, 255)),
              photo(2, HW[::-1]).filter(ImageFilter.GaussianBlur(3)).point(lambda v: 60 + v // 3)]
    views = [View((0, 0, *HW), operations=((name, float(m)),), erased=(1, 2, 30 * (m == 0), 9))
             for name, magnitudes in names.items() for m in magnitudes]
    base = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    for k in range(len(images)):
        want = torch.stack([transform.apply(images[k], view) for view in views])
        got = base[k].repeat(len(views), 1, 1, 1)
        augment(got, dict(enumerate(views)), transform)
        for view, ours, theirs in zip(views, got.int(), want.int()):
            error = (ours - theirs).abs()
            moved = view.operations[0][0] in ("Rotate", "ShearX", "ShearY", "Blur")
            assert error.max() <= moved and (error > 0).float().mean() < 0.01, (k, view)
    assert {call.args[-2:] for call in asked.call_args_list} == {(False, False)} or (
        "Blur" not in names)


@pytest.mark.parametrize("augmentation", [*CROPPED, "none"])
def test_batches_are_the_workers(folder, on_device, augmentation):
    """Of files of every kind, two epochs and an evaluation: labels, indices and rows are equal, bad
    files black; images have at most 1 of 100 values that differ by more than 2 (where a step more
    in a resized image makes one operation of another: what Posterize and Equalize do to it)."""
    changes = dict(augmentation=augmentation, random_erasing=0.5, mixup=0.2)
    one, other = (batches(folder, decode, **changes) for decode in ("cpu", "gpu"))
    assert len(one) == len(other) == 6
    for (x, labels, indices, rows), (y, labels_y, indices_y, rows_y) in zip(one, other):
        assert torch.equal(labels, labels_y) and torch.equal(indices, indices_y)
        assert rows.keys() == rows_y.keys() and y.shape == x.shape and y.dtype == torch.uint8
        seen = labels >= 0
        assert all(torch.equal(rows[name][seen], rows_y[name][seen]) for name in rows)
        error = (x.int() - y.int()).abs()
        assert not y[~seen].any() and (error > 2).float().mean() < 0.01
        assert error[seen].float().mean((1, 2, 3)).max() < (0.2 if "crop" in augmentation else 2)
    assert any((labels < 0).any() for _, labels, *_ in one)


@pytest.mark.parametrize("augmentation", OPERATED)
def test_operations_alone_on_the_device_are_the_workers(folder, beside, monkeypatch, augmentation):
    """Where workers decode beside a GPU, of files of every kind: each readable view of training
    gets its operations there, bad files and evaluation none. All but the operations is equal; they
    change fewer than 1 of 100 values by 1 (`test_operations_are_the_workers`), and where a second
    one follows, 1 of 1,000 by more."""
    changes = dict(augmentation=augmentation, random_erasing=0.5, mixup=0.2)
    got = batches(folder, "cpu", num_workers=int(augmentation == "nemo"), **changes)
    monkeypatch.setattr(device_views, "not_beside", lambda device: "no CUDA device")
    want = batches(folder, "cpu", **changes)
    training = [(labels >= 0).sum() for _, labels, *_ in want[:3]]
    assert len(want) == 6 and beside == training and sum(training) < 3 * 12
    more = 1e-3 if augmentation in ("nemo", "randaugment") else 0
    for k, ((x, *exact, rows), (y, *exact_y, rows_y)) in enumerate(zip(want, got, strict=True)):
        assert all(map(torch.equal, exact, exact_y)) and rows.keys() == rows_y.keys()
        assert all(torch.equal(rows[name], rows_y[name]) for name in rows)
        error = (x.int() - y.int()).abs()
        assert (error > 0).float().mean() <= 0.01 * (k < 3) and (error > 1).float().mean() <= more
        assert not y[exact[0] < 0].any()


def test_workers_and_groups_do_not_change_batches(folder, on_device, monkeypatch):
    """Bit for bit: with two workers, and where every image is a group by itself."""
    want = batches(folder, "gpu")
    for change in (dict(num_workers=2), dict()):
        for a, b in zip(want, batches(folder, "gpu", **change), strict=True):
            assert all(map(torch.equal, a[:3], b[:3]))
        monkeypatch.setattr(device_views, "GROUP", 1)


def test_without_workers_views_are_not_drawn_beside_the_trainer(folder, on_device):
    """Whose generator they are drawn from: it seeds that for each step, and views stay the same."""
    want = batches(folder, "gpu")[:3]
    loader = data.train_loader(sources.scan_folder(folder, "train"), replace(CONFIG, decode="gpu"),
                               HW, 12, 0, 1, 0, 3, CPU)
    for batch, expected in zip(loader, want, strict=True):
        for i in range(1000):
            torch.manual_seed(i)
        assert torch.equal(batch[0], expected[0])


def test_groups_bound_what_is_decoded_at_once():
    """Each image is in one group; GROUP images and MOST_PIXELS, decoded or in padded windows, are
    the most, unless one image has more."""
    draw, windows, sizes = random.Random(0), {}, {}
    for i in range(0, 400, 2):
        h, w = draw.choice(((375, 500), (3000, 4000), (40, 8000), (8000, 40), (9000, 9000)))
        windows[i], sizes[i] = (0, 0, draw.randint(1, h), draw.randint(1, w)), (h, w)
    found = groups(windows, sizes)
    assert sorted(i for group in found for i in group) == sorted(windows)
    for group in found:
        padded = [max(windows[i][side] for i in group) for side in (2, 3)]
        pixels = max(sum(sizes[i][0] * sizes[i][1] for i in group),
                     len(group) * padded[0] * padded[1])
        assert len(group) <= 64 and (pixels <= 2**26 or len(group) == 1)
    assert len(found) < 150


# ----------------------------------------------------------------------------- what goes wrong
def test_what_the_device_refuses_pillow_decodes(monkeypatch):
    """A file that makes the decoder fail, or give another size, fails alone: its neighbours are the
    device's, it is Pillow's, and None if that cannot read it either."""
    plain, real = jpeg(photo(1, (30, 20))), device_views._decode_jpegs
    odd, bad = jpeg(photo(2, (30, 20))), plain[:300] + b"\xff\xd9"
    asked = []

    def refuses(files, device):
        asked.append(len(files))
        names = [file.numpy().tobytes() for file in files]
        if odd in names or bad in names:
            raise RuntimeError("nvJPEG failed")
        return [picture // 2 for picture in real(files, device)]  # to be told from Pillow's
    monkeypatch.setattr(device_views, "_decode_jpegs", refuses)
    files = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in (plain, odd, bad)]
    pictures = decode_all(files, [(20, 30)] * 3, CPU)
    want = [np.asarray(Image.open(io.BytesIO(file))).transpose(2, 0, 1) for file in (plain, odd)]
    assert (pictures[0].numpy() == want[0] // 2).all() and (pictures[1].numpy() == want[1]).all()
    assert pictures[2] is None and asked == [3, 1, 1, 1]
    assert (decode_all(files[:1], [(30, 20)], CPU)[0].numpy() == want[0]).all()


def test_a_damaged_file_is_ignored_amid_a_batch(tmp_path, on_device, beside):
    """A whole header, no image behind it: label -100 and black, as on the CPU; the others stay. In
    training nothing is done to it: solarized it would be white, erased grey."""
    for i in range(6):
        path = tmp_path / "train/a" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = jpeg(photo(i, (60, 40)))
        path.write_bytes(file if i != 3 else file[:file.index(b"\xff\xda")] + b"\xff\xd9")
    source = sources.scan_folder(tmp_path, "train")
    assert plain_jpeg(source.read(3))
    for decode in ("cpu", "gpu"):
        loader = data.eval_loader(source, replace(CONFIG, decode=decode), HW, 6, 0, 1, CPU)
        [(images, labels, indices, _)] = loader
        assert labels.tolist() == [0, 0, 0, IGNORE, 0, 0] and not images[3].any()
        assert images[labels == 0].flatten(1).any(1).all()
        assert data.unreadable_in(labels, indices) == {3}
        config = replace(CONFIG, global_batch_size=6, decode=decode, random_erasing=1.0)
        [(images, labels, indices, _)] = data.train_loader(source, config, HW, 6, 0, 1, 0, 1, CPU)
        assert data.unreadable_in(labels, indices) == {3} and not images[labels < 0].any()
        assert beside[-1] == 5


def _start(folder, steps=100):
    config, source = replace(CONFIG, num_workers=2), sources.scan_folder(folder, "train")
    return iter(data.train_loader(source, config, HW, 12, 0, 1, 0, steps, CPU))


def _lose_a_worker(folder):
    device_views.engine = lambda device: None
    stream = _start(folder)
    next(stream)
    try:  # the error may come in any line from here on: torch raises it in SIGCHLD's handler
        os.kill(stream.batches._workers[0].pid, signal.SIGKILL)
        list(stream)
    except RuntimeError as e:
        print(e, flush=True)
        os._exit(7)


def test_a_worker_that_was_killed_ends_the_run(folder):
    """As without the thread: RuntimeError in the trainer, at once, and the program can end."""
    _, codes, [text] = run_ranks(1, _lose_a_worker, folder, check=False, timeout=30)
    assert codes == [7] and re.search("worker.*(killed|exited)", text), text


def test_what_fails_in_the_thread_is_raised_and_nothing_stays(folder, on_device, monkeypatch):
    """An error while views are made, or as the thread begins, reaches the trainer; a loader that is
    dropped half-way ends its thread and its workers, and so does one at its end."""
    stream = _start(folder)
    next(stream)
    workers = stream.batches._workers
    del stream
    deadline = time.monotonic() + 10
    while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(worker.is_alive() for worker in workers)
    assert len(list(_start(folder, 3))) == 3
    monkeypatch.setattr(device_views.pixels, "augment", lambda *_: 1 / 0)
    stream = _start(folder)
    workers = stream.batches._workers
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert not any(worker.is_alive() for worker in workers)  # at once, whatever keeps the error
    with pytest.raises(StopIteration):
        next(stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: 0)
    stream = device_views.Ahead(iter([(1,)]), None, SimpleNamespace(type="cuda"))
    with pytest.raises(Exception, match="device|CUDA|cuda"):  # no such device
        next(stream)
    del stream
    assert all(thread.name != "device views" for thread in threading.enumerate())


def test_batches_stay_in_order_whichever_thread_is_first(monkeypatch):
    """Two threads, the first batch the slowest, since it waits for the second one to be made at the
    same time: given in turn, the error last."""
    second = threading.Event()

    def make(i):
        if i == 1:
            second.set()
        return torch.tensor(i), i or second.wait(20)
    threads, real = [], threading.Thread
    device = SimpleNamespace(type="cpu")
    monkeypatch.setattr(threading, "Thread", lambda **k: threads.append(k) or real(**k))
    stream = device_views.Ahead(iter([(i,) for i in range(6)]), make, device)
    real(target=threads[0]["target"], args=threads[0]["args"], daemon=True).start()  # a second one
    assert [i for _, i in stream] == [True, 1, 2, 3, 4, 5]


def test_no_two_threads_share_a_stream(monkeypatch):
    """Those of an evaluation while training's are still ahead: memory that one gave back could be
    decoded into while the other's kernels read it. What has ended hands its streams on."""
    made, used, device = [], [], SimpleNamespace(type="cuda")
    monkeypatch.setattr(device_views, "STREAMS", [])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: made.append(0) or len(made))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_stream", used.append)

    def ahead(batches):
        return device_views.Ahead(((torch.tensor(i),) for i in batches), lambda x: (x,), device)
    training = ahead(itertools.count())
    next(training)
    for _ in range(2):
        assert len(list(ahead(range(8)))) == 8
    training.close()
    assert len(made) == 4 and {1, 2} & set(used) and {3, 4} & set(used)
    assert sorted(stream for _, stream in device_views.STREAMS) == [1, 2, 3, 4]


def test_decode_says_who_decodes_or_why_it_cannot(folder, monkeypatch):
    """gpu where there is none, or for drawn images, is an error before the first step; auto then
    means the workers, and says why, as it does for small batches where cores are many; cpu is not
    tried. Of a GPU it is not tried where fewer queues were asked for, in which decoding and
    training would wait for each other; no number of them is an error."""
    def choose(decode, source, batch=127):
        return device_views.choose(replace(CONFIG, decode=decode), source, CPU, batch)
    source, shapes = sources.scan_folder(folder, "train"), samples.Shapes(HW, "train")
    with pytest.raises(ValueError, match="--decode gpu is impossible: no CUDA device; legal here"):
        choose("gpu", source)
    assert choose("auto", source) == (None, "decode auto: cpu (no CUDA device)")
    assert choose("cpu", source) == (None, "decode cpu")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "all")
    with pytest.raises(ValueError, match="CUDA_DEVICE_MAX_CONNECTIONS=all must be a number"):
        device_views.engine(torch.device("cuda"))
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    auto, gpu = replace(CONFIG, decode="auto"), torch.device("cuda")
    why_not = device_views.engine(gpu)
    assert "CUDA_DEVICE_MAX_CONNECTIONS" in why_not
    assert device_views.choose(auto, source, gpu, 999, "nemo")[1] == f"decode auto: cpu ({why_not})"
    monkeypatch.setattr(device_views, "engine", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(device_views, "CORES", 11)
    assert all(choose(decode, source)[0] for decode in ("auto", "gpu"))
    monkeypatch.setattr(device_views, "CORES", 12)
    assert choose("gpu", source)[0] and choose("auto", source, 128)[0]
    assert choose("auto", source) == (
        None, "decode auto: cpu (quicker by 12 cores for each GPU in batches of 127)")
    with pytest.raises(ValueError, match="these images have no files"):
        choose("gpu", shapes)
    assert not choose("auto", Few(shapes, 3))[0]
    output = run_command(train.main, "--decode", "gpu", "--output-dir", folder / "no", code=2)
    assert "--decode gpu is impossible" in output and "step" not in output


@pytest.mark.parametrize("decode, no_engine, augmentation, batch, cores, made, told", [
    *(("cpu", None, name, 128, 12, "operations", "cpu, operations on the GPU")
      for name in OPERATED),
    *(("cpu", None, name, 999, 2, None, "cpu") for name in ("none", "crop", "crop-flip")),
    ("cpu", None, "nemo", 127, 12, None, "cpu"),
    ("cpu", None, "nemo", 127, 11, "operations", "cpu, operations on the GPU"),
    ("auto", "no JPEG engine", "nemo", 128, 12, "operations",
     "auto: cpu (no JPEG engine), operations on the GPU"),
    ("auto", "no JPEG engine", "nemo", 127, 12, None, "auto: cpu (no JPEG engine)"),
    ("auto", "no JPEG engine", "crop", 999, 12, None, "auto: cpu (no JPEG engine)"),
    ("auto", None, "nemo", 127, 12, None,
     "auto: cpu (quicker by 12 cores for each GPU in batches of 127)"),
    ("auto", None, "nemo", 128, 12, "views", "auto: gpu, views are made there"),
    ("gpu", None, "nemo", 1, 12, "views", "gpu: gpu, views are made there")])
def test_what_a_gpu_makes(folder, monkeypatch, decode, no_engine, augmentation, batch, cores, made,
                          told):
    """Of one among two: operations where workers decode and views have any, but for small batches
    where cores are many, where queues are few, and on a CPU. Files are asked for by decoding alone.
    """
    monkeypatch.setattr(device_views, "engine", lambda device: no_engine)
    monkeypatch.setattr(device_views, "CORES", 2 * cores)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    config, source = replace(CONFIG, decode=decode), sources.scan_folder(folder, "train")
    gpu = torch.device("cuda")
    assert device_views.choose(config, source, gpu, batch, augmentation) == (made, f"decode {told}")
    if made == "operations":
        drawn = device_views.choose(config, samples.Shapes(HW, "train"), gpu, batch, augmentation)
        assert drawn[0] == made and drawn[1].endswith(", operations on the GPU")
        cpu = told.removesuffix(", operations on the GPU")
        assert device_views.choose(config, source, CPU, batch, augmentation) == (
            None, f"decode {cpu}")
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "31")
        found = device_views.choose(config, source, gpu, batch, augmentation)
        assert found == (None, f"decode {cpu}, operations too ({device_views.not_beside(gpu)})")


def test_queues_are_asked_for_before_cuda_starts():
    """recipes.py asks for a GPU as it is imported, which starts CUDA: the variable, which is read
    then, is there."""
    script = ("import os, sys; from unittest.mock import Mock; sys.modules['torch'] = Mock(); "
              "sys.modules['torch'].cuda.is_available = lambda: "
              "print(os.environ['CUDA_DEVICE_MAX_CONNECTIONS']); import recipes")
    given = {k: v for k, v in os.environ.items() if k != "CUDA_DEVICE_MAX_CONNECTIONS"}
    seen = subprocess.run([sys.executable, "-c", script], env=given, text=True, timeout=100,
                          cwd=os.path.dirname(__file__), capture_output=True).stdout
    assert set(seen.split()) == {"32"}


def test_a_batch_that_does_not_come_says_where_it_is(monkeypatch, capfd):
    """Of one process no watch says so: the stacks name what the thread is in; then it goes on."""
    begun, told, dump = threading.Event(), threading.Event(), faulthandler.dump_traceback

    def stuck_in_the_decoder():
        begun.set()
        return torch.tensor(7), told.wait(20)
    monkeypatch.setattr(faulthandler, "dump_traceback", lambda: (
        begun.wait(20), dump(), told.set()))
    monkeypatch.setattr(device_views, "PATIENCE", 0.1)
    [batch] = device_views.Ahead(iter([()]), stuck_in_the_decoder, CPU)
    text = capfd.readouterr().err
    assert batch == (7, True) and "no batch of views for 0.1 s" in text
    assert "stuck_in_the_decoder" in text


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="workers share memory elsewhere")
def test_shared_memory_is_checked_for_files(folder, on_device, beside, monkeypatch):
    """What is asked for is the size of the files, as 64 of them tell, and at least of views; of
    views alone where workers decode."""
    monkeypatch.setattr(sources.ImageFolder, "read", lambda self, index: bytes(10**6))
    source, asked = sources.scan_folder(folder, "train"), []
    monkeypatch.setattr(data, "_check_shared_memory", lambda *numbers: asked.append(numbers))
    config = replace(CONFIG, num_workers=2, prefetch_factor=3)
    data.eval_loader(source, config, HW, 8, 0, 1, CPU)
    data.eval_loader(source, config, (2000, 1000), 8, 0, 1, CPU)
    data.train_loader(source, replace(config, decode="cpu"), HW, 12, 0, 1, 0, 1, CPU)
    assert asked == [(6, 8 * 1_250_000), (6, 8 * 6_000_000), (6, 12 * 3 * 48 * 64)]


# ----------------------------------------------------------------------------- training
def _train(argv, outputs):
    for output, engine in zip(outputs, (device_views.engine, lambda device: None)):
        device_views.engine = engine
        train.main([*argv, "--output-dir", output])


def test_training_learns_the_same_from_either(tmp_path):
    """15 steps on JPEGs of the shapes, cropped, flipped and mixed: the loss of each step and the
    evaluation's differ by less than 0.1 % (views differ in a few values, by one or two steps of
    255; 0.002 % seen, while other views, of another seed, change losses by 2 %), but they do."""
    shapes = samples.Shapes((48, 48), "train")
    for i in range(96):
        path = tmp_path / ("val" if i >= 64 else "train") / f"{i % 16:02d}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shapes.load(i)[0].save(path, quality=90)
    argv = ["--data", str(tmp_path), "--recipe", "demo", "--augmentation", "crop-flip", "--mixup",
            "0.2", "--max-steps", "15", "--log-interval", "1", "--num-workers", "1",
            "--global-batch-size", "32", "--warmup-steps", "5"]
    outputs, found = [str(tmp_path / name) for name in ("cpu", "gpu")], []
    _, _, [text] = run_ranks(1, _train, argv, outputs)
    assert text.index("cpu (no CUDA device)") < text.index("gpu, views are made there")
    for output in outputs:
        lines = [json.loads(x) for x in open(f"{output}/metrics.jsonl")]
        found.append([*losses(lines).values(), lines[-1]["val_loss"]])
    assert len(found[0]) == 16 and found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[0] != found[1]
