"""Views made on the device, beside the training: JPEG files decoded and resized, all augmented.

A worker reads a file and draws the view's numbers (`augment.View`); threads of the trainer, on
streams of their own, make the pixels of whole batches, or do what is left to do:

    in a worker     bytes of plain JPEGs; others (PNG, CMYK, progressive, turned by EXIF, cut short,
                    huge), or all, cropped, resized and flipped; in one buffer, with the numbers
    in the threads  decode            on the JPEG engines, by torchvision's nvJPEG
                    crop and resize   y = Wv (x Wh), as two kernels or two products of matrices
                    operations        of each kind together: AutoAugment's, ...; then erasing
    in the trainer  uint8 [b, 3, H, W] on the device, as if a worker had made them

The same numbers give the same view as `RandomView.apply` and `CentreView.apply`, but for rounding.

Shapes: b images of a batch, n of a group that is made together, H x W pixels of a view, h x w of
the largest window in a group: the source pixels that an image's view needs. What is refused here
goes through Pillow, and what that cannot read gets label -100 and stays black, as in `data`.
"""

import contextlib
import ctypes
import faulthandler
import functools
import io
import itertools
import math
import os
import queue
import re
import sys
import threading
import time
import warnings
import weakref
from concurrent.futures import Future, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate

import pixels
from augment import View
from configs import CORES
from pixels import window
from sources import decode

CPU = torch.device("cpu")
IGNORE = -100         # data.IGNORE
GROUP = 64            # images decoded and resized together at most, so that memory stays bounded,
MOST_PIXELS = 1 << 26  # and pixels: of the decoded images, and of their windows as they are padded
THREADS = 2           # that make batches, on a GPU
SMALL, MANY_CORES = 128, 12  # of a batch; of a GPU
PATIENCE = 120        # seconds
ORIENTATION = 0x0112  # EXIF's tag


# ----------------------------------------------------------------------------- may it be used?
def choose(config, source, device, batch: int, augmentation="none") -> tuple[str | None, str]:
    """(what the device makes: "views", "operations" on them or None; the choice and why, for the
    log). Raises ValueError where --decode gpu cannot be. batch: images of a micro-batch.

    Unless told, nothing of small batches where cores are many. The trainer's Python launches a
    batch's operations in 20 ms, whatever its size. On 16 cores of an H100's machine Ti/16 at 64
    keeps 72 % of its rate with views, 76 with operations by the GPU, 97 without; B/16 at 512 95, 96
    and 87, on 4 cores 84 to 96, 19 and 18.
    """
    cores = CORES // max(torch.cuda.device_count(), 1)
    small, told = batch < SMALL and cores >= MANY_CORES, f"decode {config.decode}"
    if config.decode != "cpu":
        why_not = engine(device) if hasattr(source, "read") else "these images have no files"
        if config.decode == "gpu" and why_not:
            raise ValueError(f"--decode gpu is impossible: {why_not}; legal here: auto, cpu")
        if config.decode == "auto" and not why_not and small:
            why_not = f"quicker by {cores} cores for each GPU in batches of {batch}"
        if not why_not:
            return "views", f"{told}: gpu, views are made there"
        told += f": cpu ({why_not})"
    if small or augmentation in ("none", "crop", "crop-flip"):
        return None, told
    why_not = not_beside(device)
    if why_not and device.type == "cuda" and why_not not in told:
        told += f", operations too ({why_not})"
    return (None, told) if why_not else ("operations", f"{told}, operations on the GPU")


def not_beside(device: torch.device) -> str | None:
    """Why the device makes nothing beside the training, or None. Raises ValueError for CUDA's
    variable that is no number."""
    if device.type != "cuda":
        return "no CUDA device"
    queues = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") or "8"  # configs.py sets it
    if not queues.strip().isdecimal():
        raise ValueError(f"CUDA_DEVICE_MAX_CONNECTIONS={queues} must be a number of the GPU's "
                         f"queues, 1 to 32: unset it, and it is 32")
    if int(queues) < 32:
        return "CUDA_DEVICE_MAX_CONNECTIONS is below 32, so that views would wait for training"


@functools.cache
def engine(device: torch.device) -> str | None:
    """Why the device decodes no JPEG, or None."""
    if why_not := not_beside(device):
        return why_not
    import torchvision.io  # noqa: F401  brings nvJPEG along
    maps = Path("/proc/self/maps")
    library = re.search(r"/\S*libnvjpeg\S*", maps.read_text() if maps.exists() else "")
    if not library:
        return "torchvision has no nvJPEG"
    nvjpeg, handle = ctypes.CDLL(library[0]), ctypes.c_void_p()
    with torch.cuda.device(device):  # NVJPEG_BACKEND_HARDWARE
        status = nvjpeg.nvjpegCreateEx(3, None, None, 0, ctypes.byref(handle))
        if not status:
            nvjpeg.nvjpegDestroy(handle)
    return f"no JPEG engine (nvJPEG's status {status})" if status else None


def batch_bytes(source, batch: int, image_hw: tuple[int, int]) -> int:
    """About what a batch of files takes in shared memory: by 64 of them, a quarter more, or by
    finished views if those are larger."""
    count = min(len(source), 64)
    sizes = [0]
    for i in range(count):
        with contextlib.suppress(Exception):  # unreadable ones are told later
            sizes.append(len(source.read(i * len(source) // count)))
    return batch * max(3 * math.prod(image_hw), int(1.25 * sum(sizes) / max(count, 1)))


# ----------------------------------------------------------------------------- in the workers
class Part(NamedTuple):
    """Of a view what a worker made: a plain JPEG, undecoded, of (height, width) source_hw; or the
    bytes [3, H, W] of its crop, resized and flipped, with None. No view: an unreadable image."""
    data: bytes | torch.Tensor
    source_hw: tuple[int, int] | None
    view: View | None = None


class Files:
    """A source whose `load` gives plain(file, source_hw) of a plain JPEG, Part or decode_here."""

    def __init__(self, source, plain=Part):
        self.source, self.plain = source, plain

    def __len__(self):
        return len(self.source)

    def load(self, index: int) -> tuple:
        file = self.source.read(index)
        source_hw = plain_jpeg(file)
        image = self.plain(file, source_hw) if source_hw else decode(io.BytesIO(file))
        return image, int(self.source.labels[index])


def decode_here(file: bytes, source_hw) -> torch.Tensor | Image.Image:
    """In 6 tenths of Pillow's time, where `same_pixels`."""
    try:
        return _decode_jpegs([torch.frombuffer(bytearray(file), dtype=torch.uint8)], CPU)[0]
    except RuntimeError:  # Pillow may be more patient
        return decode(io.BytesIO(file))


@functools.cache
def same_pixels() -> bool:
    """Whether torchvision's decoder, on the CPU, gives the bytes of Pillow's: both have libjpeg."""
    noise = np.random.default_rng(0).integers(0, 256, (61, 43, 3), dtype=np.uint8)
    for mode, subsampling in (("RGB", 0), ("RGB", 1), ("RGB", 2), ("L", 0)):
        file = io.BytesIO()
        Image.fromarray(noise).convert(mode).save(file, "JPEG", subsampling=subsampling)
        try:
            ours = decode_here(file.getvalue(), None)
        except Exception:  # torchvision has no decoder
            return False
        if not np.array_equal(ours.permute(1, 2, 0), decode(file)):
            return False
    return True


class Numbers:
    """A transform that draws views and leaves their pixels to the device: of a JPEG's Part all, of
    an image the operations and erasing."""

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, image: Part | Image.Image | torch.Tensor) -> Part:
        if isinstance(image, Part):
            return image._replace(view=self.transform.draw(image.source_hw))
        source_hw = image.shape[1:] if isinstance(image, torch.Tensor) else image.size[::-1]
        view = self.transform.draw(tuple(source_hw))
        return Part(self.transform.apply(image, View(view.crop, view.alone, view.flip)), None, view)


def plain_jpeg(file: bytes) -> tuple[int, int] | None:
    """(height, width) of a whole, upright, sequential JPEG in grey or YCbCr; else None."""
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        if b"\xff\xd9" not in file[-64:]:  # the end of the image: it is cut short
            return None
        image = Image.open(io.BytesIO(file), formats=["JPEG"])  # reads the header alone
        info, colours = image.info, [layer[0] for layer in image.layer]
        turned = ("exif" in info or "xmp" in info) and image.getexif().get(ORIENTATION, 1) != 1
        odd = ("progressive" in info or info.get("adobe_transform") == 0 or image.format != "JPEG"
               or colours == list(b"RGB") or image.mode not in ("RGB", "L"))
        if not turned and not odd and image.width * image.height <= MOST_PIXELS:
            return image.height, image.width
    return None


class Packed(NamedTuple):
    """A batch as it travels: the Parts, their data as uint8 [all bytes] and how many of each."""
    data: torch.Tensor
    lengths: list[int]
    source_hw: tuple[tuple[int, int] | None, ...]
    views: tuple[View | None, ...]


def pack(items: list[tuple]) -> tuple:
    """What `data.Views` gives for each image, a Part of it -> (Packed, labels, indices, draws)."""
    images, labels, indices, draws = zip(*items)
    made, source_hw, views = zip(*images)
    parts = [np.frombuffer(x, np.uint8) if isinstance(x, bytes) else x.reshape(-1).numpy()
             for x in made]
    lengths = [len(part) for part in parts]
    data = torch.empty(sum(lengths), dtype=torch.uint8)
    np.concatenate(parts, out=data.numpy())
    return (Packed(data, lengths, source_hw, views), torch.tensor(labels), torch.tensor(indices),
            default_collate(list(draws)))


# ----------------------------------------------------------------------------- decoding
def decode_all(files: list[torch.Tensor], source_hw, device) -> list[torch.Tensor | None]:
    """Files uint8 [bytes] on the host -> RGB uint8 [3, height, width] on the device, or None for an
    unreadable one. What the device refuses, alone or with others, is tried alone, then by Pillow.
    """
    with contextlib.suppress(RuntimeError):
        pictures = _decode_jpegs(files, device)
        if [tuple(picture.shape[1:]) for picture in pictures] == source_hw:
            return pictures
    if len(files) > 1:
        return [decode_all([file], [hw], device)[0] for file, hw in zip(files, source_hw)]
    try:
        picture = np.array(decode(io.BytesIO(files[0].numpy().tobytes())))
    except Exception:
        return [None]
    return [torch.from_numpy(picture).permute(2, 0, 1).to(device)]


def _decode_jpegs(files: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    if device.type == "cuda":
        # memory that this stream gave back it may still be reading, and torchvision's own writes
        torch.cuda.current_stream().synchronize()
    from torchvision.io import ImageReadMode, decode_jpeg
    warnings.filterwarnings("ignore", ".*TorchCodec", DeprecationWarning)
    return decode_jpeg(files, ImageReadMode.RGB, device)


# ----------------------------------------------------------------------------- whole batches
class DeviceViews:
    """A loader of `pack`ed batches as one of finished ones: (images uint8 [b, 3, H, W] on the
    device, labels, indices and draws on the host). transform: the RandomView or CentreView."""

    def __init__(self, loader, transform, device: torch.device):
        self.loader, self.transform, self.device = loader, transform, device
        self.resize, self.move = pixels.resize, pixels.move
        if device.type == "cuda":
            with contextlib.suppress(ImportError):  # of Triton
                import resample
                self.resize, self.move = resample.resize, resample.move

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        if not self.loader.num_workers:  # what draws must not be beside the trainer, which seeds
            return itertools.starmap(self.make, self.loader)
        return Ahead(iter(self.loader), self.make, self.device)

    def make(self, packed: Packed, labels, indices, draws) -> tuple:
        """One batch, on the current stream."""
        (height, width), views = self.transform.image_hw, packed.views
        files, labels = packed.data.split(packed.lengths), labels.clone()
        images = torch.zeros(len(views), 3, height, width, dtype=torch.uint8, device=self.device)
        windows = {i: window(views[i], source_hw, (height, width))
                   for i, source_hw in enumerate(packed.source_hw) if source_hw}
        resized = [i for i in range(len(views)) if i not in windows]
        if resized:
            made = torch.cat([files[i] for i in resized]) if windows else packed.data
            images[resized] = made.view(-1, 3, height, width).to(self.device)
        for group in groups(windows, packed.source_hw):
            pictures = decode_all([files[i] for i in group], [packed.source_hw[i] for i in group],
                                  self.device)
            labels[[i for i, picture in zip(group, pictures) if picture is None]] = IGNORE
            group = [i for i, picture in zip(group, pictures) if picture is not None]
            pictures = [picture for picture in pictures if picture is not None]
            if group:
                images[group] = self.resize(pictures, [views[i] for i in group],
                                            [windows[i] for i in group], (height, width))
        readable = {i: view for i, view in enumerate(views) if labels[i] != IGNORE}
        pixels.augment(images, readable, self.transform, self.move)
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # before the files' memory goes
        return images, labels, indices, draws


def groups(windows: dict[int, tuple], source_hw) -> list[list[int]]:
    """Images of similar windows together, as many as GROUP and MOST_PIXELS allow."""
    found, pixels, wide = [], 0, 0
    for i in sorted(windows, key=lambda i: (windows[i][2] - windows[i][0], i)):  # height grows
        top, left, bottom, right = windows[i]
        pixels, wide = pixels + math.prod(source_hw[i]), max(wide, right - left)
        full = not found or len(found[-1]) == GROUP or MOST_PIXELS < max(
            pixels, (bottom - top) * wide * (len(found[-1]) + 1))
        if full:
            found.append([])
            pixels, wide = math.prod(source_hw[i]), right - left
        found[-1].append(i)
    return found


class Ahead:
    """An iterator that is up to three batches ahead: THREADS threads call make(*batch), for a batch
    each, on streams of their own; batches stay in order. What fails there is raised here.

    Two, so that one decodes while the other launches the operations."""

    def __init__(self, batches, make, device: torch.device):
        self.batches = batches  # workers end with it, in the thread that started them
        self.results, stop, turn = queue.Queue(THREADS), threading.Event(), threading.Lock()
        streams = [take_stream(device) for _ in range(THREADS)] if device.type == "cuda" else [None]
        threads = [threading.Thread(target=_work, name="device views", daemon=True,
                                    args=(batches, make, device, self.results, stop, turn, stream))
                   for stream in streams]
        for thread in threads:
            thread.start()
        self.close = weakref.finalize(self, _end, threads, self.results, stop)  # also at exit

    def __iter__(self):
        return self

    def __next__(self):
        if not self.close.alive:
            raise StopIteration
        try:
            made = self.results.get()
            if not wait([made], PATIENCE).done:  # a decoder that hangs would else say nothing
                print(f"no batch of views for {PATIENCE} s; where all threads are:",
                      file=sys.stderr, flush=True)
                faulthandler.dump_traceback()
            batch = made.result()
        except BaseException:
            self.close()
            self.batches = None  # if `make` failed, workers end now, not with the error's traceback
            raise
        if batch[0].is_cuda:  # else its memory could be given away before it was read
            batch[0].record_stream(torch.cuda.current_stream())
        return batch


STREAMS: list[tuple] = []  # (device, stream) that no thread has now


def take_stream(device: torch.device):
    """One that no other thread has, as decoding waits for the kernels of its own stream alone
    before it takes memory of that stream; used again, since memory stays with it. Its small kernels
    would else each wait for large ones of the training."""
    free = next((one for one in STREAMS if one[0] == device), None)
    if free is None:
        return torch.cuda.Stream(device, priority=-1)
    STREAMS.remove(free)
    return free[1]


def _work(batches, make, device: torch.device, results: queue.Queue, stop, turn, stream) -> None:
    begun = device.type != "cuda"
    while not stop.is_set():
        result = Future()
        try:
            with turn:  # the order of results is that of the batches
                results.put(result)
                batch = next(batches)
            if not begun:
                torch.cuda.set_device(device)
                torch.cuda.set_stream(stream)
                begun = True
            made = make(*batch)
            result.set_result(made)
            del batch, made
        except BaseException as e:  # StopIteration too
            result.set_exception(e)
            break
    if stream is not None:
        STREAMS.append((device, stream))
    batches = result = None  # which an error's traceback would keep


def _end(threads: list[threading.Thread], results: queue.Queue, stop: threading.Event) -> None:
    stop.set()
    deadline = time.monotonic() + 10
    while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
        with contextlib.suppress(queue.Empty):
            results.get(timeout=0.01)  # a thread may be waiting for room
