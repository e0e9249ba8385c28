"""Which images a step sees, and how they look: one order, a random view each, exact evaluation.

Which images form a batch, and how each looks, are functions of the seed and the step alone:

    image number   i = k * G + j                  the j-th image of global batch k, of G images
    epoch, index   e, order(n, seed, e)[i % n]    with e = i // n: the stream has no end, a batch
                                                  may hold the end of an epoch and the next start
    pixels         view(load(index), RNG seeded with (seed, e, index))

No rank, world size, micro-batch, worker or resume point is in these lines, so none changes what
the model sees. Nothing here draws from the global random generators. `stream_image` has the general
form, with R views of G / R images in each batch (--repeated-augmentation R); `augment.pair_rows`
mixes images 2k and 2k + 1 of the stream, which every layout has on one rank.

Shapes: b images of a micro-batch on one rank, n images of a split, H x W pixels (image_hw).
A batch is images uint8 [b, 3, H, W], labels int64 [b], indices int64 [b] and draws, with

    label >= 0, index >= 0    an image
    label -100, index >= 0    an unreadable image, drawn black: the loss ignores label -100
    label -100, index -1      padding of an evaluation batch, drawn black

draws is a dict of rows float32 [b, ...], empty but in training: what the worker draws with the
view's generator and leaves to the device, colour jitter and mixing (`augment.draws`). A GPU may
do the operations as well, or make whole views of JPEGs (`device_views`): then images are there.
"""

import contextlib
import functools
import gc
import math
import os
import shutil
import signal
import sys
import threading

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import device_views
from augment import draws, eval_transform, train_transform
from configs import stable_seed

IGNORE = -100  # the default ignore_index of F.cross_entropy
PADDING = -1   # index of an image that only fills a batch


# ----------------------------------------------------------------------------- order
def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation int64 [n] in which an epoch shows its images."""
    generator = torch.Generator().manual_seed(stable_seed("order", seed, epoch))
    return torch.randperm(n, generator=generator).numpy()


def stream_image(i: int, n: int, global_batch: int, repeats: int = 1) -> tuple[int, int, int]:
    """Image i of the stream as (epoch, place, view): order(n, seed, epoch)[place] for the view-th
    time. For R = 1 that is i // n, i % n and the epoch again.

    Repeated augmentation (arXiv:1901.09335): a batch of G holds R views of each of U = G / R images
    (rounded up: the last views of the last images are then left out), all first views, then all
    second ones. So neighbours, which may be mixed, are different images. An epoch of the run stays
    n views, as in DeiT, of n / R images; R of them show every image R times, by R other views. The
    stream then depends on G: a resume with another batch joins that one's.
    """
    different = -(-global_batch // repeats)
    batch, j = divmod(i, global_batch)
    repeat, place = divmod(j, different)
    epoch, place = divmod(batch * different + place, n)
    return epoch, place, epoch * repeats + repeat


class StreamSampler:
    """One rank's micro-batches of the training stream, each a list of local_batch (view, index).

    Global batch k, images k*G to (k+1)*G of the stream, is cut into G / (local_batch * world)
    micro-batches of local_batch * world images, in order; rank r takes the r-th local_batch of
    each. Starts at any image at once. Raises ValueError if G does not divide so.
    """

    def __init__(self, n: int, seed: int, global_batch: int, local_batch: int, rank: int,
                 world: int, start_image: int, num_steps: int, repeats: int = 1):
        if n < 1 or global_batch % (local_batch * world):
            raise ValueError(f"global batch {global_batch} must be a multiple of {local_batch} "
                             f"images x {world} ranks, and there must be images ({n})")
        self.n, self.seed, self.local_batch = n, seed, local_batch
        self.stream_image = functools.partial(stream_image, n=n, global_batch=global_batch,
                                              repeats=repeats)
        self.first_image = start_image + rank * local_batch
        self.micro_batch = local_batch * world  # images of all ranks
        self.length = num_steps * global_batch // self.micro_batch

    def __len__(self):
        return self.length

    def __iter__(self):
        images = functools.lru_cache(2)(functools.partial(order, self.n, self.seed))  # two epochs
        for k in range(self.length):
            start = self.first_image + k * self.micro_batch
            keys = map(self.stream_image, range(start, start + self.local_batch))
            yield [(view, int(images(epoch)[place])) for epoch, place, view in keys]


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
class Views(Dataset):
    """(epoch, index) -> view uint8 [3, H, W], label, index and draws, as the module's table says;
    `draw` makes the draws of one view, whether or not it can be read."""

    def __init__(self, source, transform, image_hw: tuple[int, int], seed: int, draw=dict):
        self.source, self.transform, self.image_hw, self.seed = source, transform, image_hw, seed
        self.draw, self.black = draw, torch.zeros(3, *image_hw, dtype=torch.uint8)

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        (epoch, index), image, label = key, None, IGNORE
        if index != PADDING:
            with contextlib.suppress(Exception):  # of reading; below it would be a bug
                image, label = self.source.load(index)
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed: with no workers that reseeds the trainer's GPU generator
            torch.default_generator.manual_seed(stable_seed("view", self.seed, epoch, index))
            view = self.black if image is None else self.transform(image)
            return view, label, index, self.draw()


# ----------------------------------------------------------------------------- loaders
def train_loader(source, config, image_hw: tuple[int, int], local_batch: int, rank: int, world: int,
                 start_image: int, num_steps: int, device) -> DataLoader:
    """One rank's micro-batches of num_steps global batches, from image start_image of the stream.

    rank and world count the processes that own images: all of them, tensor-parallel ones too.
    Raises ValueError for a batch that does not divide, and as `_loader` does.
    """
    views = Views(source, train_transform(config, image_hw), image_hw, config.seed,
                  functools.partial(draws, config, image_hw))
    sampler = StreamSampler(len(source), config.seed, config.global_batch_size, local_batch,
                            rank, world, start_image, num_steps, config.repeated_augmentation)
    return _loader(views, sampler, config, local_batch, world, device, config.augmentation)


def eval_loader(source, config, image_hw: tuple[int, int], batch: int, rank: int, world: int,
                device) -> DataLoader:
    """One rank's evaluation batches; can be iterated again. Raises as `_loader` does."""
    views = Views(source, eval_transform(config, image_hw), image_hw, seed=0)  # it draws nothing
    sampler = EvalSampler(len(source), batch, rank, world)
    return _loader(views, sampler, config, batch, world, device)


def _loader(views: Views, sampler, config, batch: int, world: int, device, augmentation="none"):
    """A DataLoader that leaves the global generators alone and outlives a SIGTERM; where the device
    makes the views or does their operations, DeviceViews of its batches.

    Workers start with each iteration and end with it: training iterates once, and between
    evaluations idle workers would only hold memory. They are forked where Python can do so
    safely, on Linux (3.14 would choose forkserver): a fork starts at once and shares the index,
    and is safe after CUDA and NCCL have started because a worker touches neither.
    Raises ValueError if the batches held ready do not fit in shared memory, or --decode gpu cannot
    be.
    """
    device, source, workers = torch.device(device), views.source, config.num_workers
    on_device, _ = device_views.choose(config, source, device, batch, augmentation)
    transform, batch_bytes = views.transform, 3 * batch * math.prod(views.image_hw)
    if on_device == "views":
        views.source = device_views.Files(source)
        batch_bytes = device_views.batch_bytes(source, batch, views.image_hw)
    elif augmentation != "none" and hasattr(source, "read") and device_views.same_pixels():
        views.source = device_views.Files(source, device_views.decode_here)
    if on_device:
        views.transform = device_views.Numbers(transform)
        views.black = device_views.Part(views.black, None)
    if workers:
        ranks_here = min(world, torch.cuda.device_count()) if device.type == "cuda" else world
        _check_shared_memory(ranks_here * workers * config.prefetch_factor, batch_bytes)
    loader = DataLoader(
        views, batch_sampler=sampler, num_workers=workers,
        prefetch_factor=config.prefetch_factor if workers else None,
        pin_memory=config.pin_memory and device.type == "cuda" and not on_device,
        collate_fn=device_views.pack if on_device else None,
        generator=torch.Generator(),  # without it each iteration draws from the global one
        worker_init_fn=_start_worker,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None)
    return device_views.DeviceViews(loader, transform, device) if on_device else loader


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
    gc.freeze()  # collections leave the trainer's objects alone, and so copy none of their pages
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


# ----------------------------------------------------------------------------- unreadable images
class Unreadable:
    """The distinct images of a source that could not be read, and the limit on their number.

    More than max(1, max_share x len(source)) end the run; at 0 the first one does. Counting
    distinct images, not readings, makes the rule independent of batch size, epochs and luck. Each
    rank sees its own images: the trainer unites the ranks' sets, since a later epoch shows a bad
    image to another rank and a sum of counts would count it again.
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
        total, count, share = len(self.source), len(self.indices), self.max_share
        allowed = max(1, int(share * total)) if share else 0
        if count <= allowed:
            return None
        names = [self.source.name(index) for index in sorted(self.indices)[:5]]
        return (f"unreadable training images: {count} of {total}, more than the {allowed} that "
                f"--max-unreadable {share:g} allows; repair or remove them, or give a larger "
                f"share; first: {', '.join(names)}")


def unreadable_in(labels: torch.Tensor, indices: torch.Tensor) -> set[int]:
    """The unreadable images of a batch: label -100, but not padding. Both int64 [b] on the CPU."""
    return set(indices[(labels == IGNORE) & (indices != PADDING)].tolist())
