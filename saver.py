"""Saving beside the training: to host memory at once, to the disk by a thread, then published.

    OUTPUT/checkpoints/.step_00001000.tmp    a save under way
                       .step_00001000.old    what a save of the same step replaces, until it is done
                       .step_00000500.gone   what is being removed
    OUTPUT/best -> checkpoints/step_00001000    with --keep-best

Each rank gathers one bucket at a time, and keeps and writes only its share of the names. Everything
is written to a temporary directory, synced, then renamed: a checkpoint is complete, or it is not
there. `checkpoint` has what is in one, and reads it.
"""

import contextlib
import math
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from checkpoint import (
    READERS,
    complete_checkpoints,
    crc,
    fsync_directory,
    read_meta,
    write_meta,
    write_synced,
)
from parallel import ShardedOptimizer, all_gather_object, full_shape

FAILED = -1  # in place of the step that a rank has written


def _share_out(sizes: dict[str, int], world: int) -> dict[str, int]:
    """Which rank writes which weight: the largest first, always to the least loaded rank."""
    load, owner = [0] * world, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = load.index(min(load))
        load[owner[name]] += sizes[name]
    return owner


def _save_tensors(tensors: dict, f) -> None:
    """torch.save without the checksums of its zip file, which take longer than a disk: meta.json
    has those of the tensors."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, f)
    finally:
        torch.serialization.set_crc32_options(before)


def host_tensors(shapes: dict, pin: bool) -> dict:
    """Uninitialised fp32 host tensors of these shapes, {key: tensor}, page-locked if `pin`.

    Cut from pieces of a GiB, as the allocator of page-locked memory rounds up to powers of two; by
    numpy, so that each has a storage of its own, which is what torch.save writes.
    """
    left, piece, tensors = sum(map(math.prod, shapes.values())), torch.empty(0), {}
    for key, shape in shapes.items():
        count = math.prod(shape)
        if piece.numel() < count:
            piece = torch.empty(max(count, min(left, 2**28)), pin_memory=pin)
        tensors[key] = torch.from_numpy(piece.numpy()[:count]).view(shape)
        piece, left = piece[count:], left - count
    return tensors


class Saver:
    """Saves beside the training; at most one save is under way.

        begin     masters and moments to host memory, in the order of the device's work
        (thread)  writes and syncs this rank's file; `written` is then the step, or FAILED
        publish   when all ranks have written, at the same step of each: rename, best, prune

    The host memory is allocated once, page-locked on CUDA, beside what else a start does. Where a
    rank has not got the room, begin does all of it before it returns; `note` says which. Every
    method is collective and raises OSError on all ranks, whatever failed on one; a save that failed
    leaves the earlier ones.

    room: bytes of host memory that this rank may take; say: prints a line.
    keep_last: newest checkpoints kept, 0: all; keep_best: and those of the best validation top-1.
    """

    def __init__(self, root: Path, optimizer: ShardedOptimizer, *, room: float = 0.0,
                 keep_last: int = 0, keep_best: int = 0, say: Callable = print):
        self.root, self.optimizer, self.grid, self.say = root, optimizer, optimizer.grid, say
        self.keep_last, self.keep_best = keep_last, keep_best
        self.step = self.newest = self.thread = self.remover = None  # step: of the latest begin
        self.written, self.host, grid = 0, None, self.grid  # host: a future
        shapes = {n: full_shape(p, grid.tp) for b in optimizer.buckets for n, p in b.params.items()}
        self.owner = _share_out({n: math.prod(s) for n, s in shapes.items()}, grid.world.size)
        mine = {(n, kind): shapes[n] for b in optimizer.buckets for n in b.params
                if self.owner[n] == grid.world.rank for kind in ("weight", *b.state)}
        need = 4 * sum(map(math.prod, mine.values()))
        self._allocate = partial(host_tensors, mine, pin=optimizer.device.type == "cuda")
        short = all_gather_object(max(need - room, 0), grid.world)
        if not any(short):
            self.host = ThreadPoolExecutor(1).submit(self._allocate)
        self.note = (f"saving beside the training: {need / 2**30:.2f} GiB of host memory per rank"
                     if self.host else f"saving stops the training: beside it, it would take "
                     f"{need / 2**30:.2f} GiB of host memory per rank, {max(short) / 2**30:.2f} "
                     f"more than there is")

    def _agree(self, error: str | None) -> None:
        errors = [e for e in all_gather_object(error, self.grid.world) if e]
        if errors:
            raise OSError(f"checkpoint of step {self.step} failed, earlier ones are untouched: "
                          f"{errors[0]}")

    def begin(self, step: int, meta: dict) -> None:
        """Takes the state after `step`, with what meta.json shall say beside it."""
        if self.thread is not None and self.thread.is_alive():
            self.say(f"step {step}: waiting until the checkpoint of step {self.step} is written")
        self._finish()
        self.step, self.meta, error, self.report = step, meta, None, (None, 0, {})
        self.temporary = self.root / f".step_{step:08d}.tmp"
        try:
            if self.host is not None and self.host.exception() is None:
                host = self.host.result()
            else:  # for this save alone: page-locked memory would not be given back
                host = self._allocate(pin=False)
            if self.grid.world.rank == 0:
                shutil.rmtree(self.temporary, ignore_errors=True)
                self.temporary.mkdir(parents=True)
        except (OSError, RuntimeError, MemoryError) as e:
            error = f"rank {self.grid.world.rank} could not begin {self.temporary}: {e}"
        self._agree(error)
        self.updates, copied = int(self.optimizer.step_count), None
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for name, kind, full in self.optimizer.full_tensors(
                lambda name: self.owner[name] == self.grid.world.rank,
                lambda name, kind, full: host[name, kind].copy_(full, non_blocking=True)):
            tensors.setdefault(name, {})[kind] = full
        if self.optimizer.device.type == "cuda":
            copied = torch.cuda.current_stream().record_event()
        self.thread = threading.Thread(target=self._write, args=(tensors, copied), daemon=True)
        self.thread.start()
        if self.host is None:
            self._finish()

    def _write(self, tensors: dict, copied) -> None:
        """This rank's file, and the checksum of each of its tensors as it is in memory."""
        file = self.temporary / f"rank_{self.grid.world.rank:05d}.pt"
        try:
            if copied is not None:
                copied.synchronize()
            with ThreadPoolExecutor(READERS) as pool:
                crcs = pool.map(crc, (x for kinds in tensors.values() for x in kinds.values()))
                write_synced(file, lambda f: _save_tensors(tensors, f))
                crcs = {n: {kind: next(crcs) for kind in kinds} for n, kinds in tensors.items()}
            self.report = None, file.stat().st_size, crcs
        except Exception as e:  # whatever it is, all ranks are to hear of it
            self.report = f"rank {self.grid.world.rank} could not write {file}: {e}", 0, {}
        self.written = FAILED if self.report[0] else self.step

    def publish(self, written: int) -> None:
        """Completes the save under way if all ranks have written the step `written`, or a later;
        one that has FAILED on a rank is an error at once, whatever others are still writing."""
        if self.thread is not None and (written >= self.step or written == FAILED):
            self._finish(wait=written != FAILED)

    def wait(self) -> None:
        """Until no save and no removal is under way."""
        self._finish()
        if self.remover is not None:
            self.remover.join()

    def _finish(self, wait: bool = True) -> None:
        if self.thread is None:
            return
        if wait:
            self.thread.join()
        self.thread, error, reports = None, None, all_gather_object(self.report, self.grid.world)
        if self.grid.world.rank == 0:
            errors = [error for error, _, _ in reports if error]
            error = errors[0] if errors else self._complete(reports)
            shutil.rmtree(self.temporary, ignore_errors=True)
        self._agree(error)
        self.newest = self.root / f"step_{self.step:08d}"

    def _complete(self, reports: list) -> str | None:
        """On rank 0: the rename that makes a checkpoint; returns what went wrong."""
        final = self.root / f"step_{self.step:08d}"
        files = [f"rank_{rank:05d}.pt" for rank in range(len(reports))]
        meta = {**self.meta, "step": self.step, "updates": self.updates,
                "state": list(self.optimizer.state_names),
                "files": {file: size for file, (_, size, _) in zip(files, reports)},
                "where": {name: files[rank] for name, rank in self.owner.items()},
                "crc32": {n: crcs for _, _, part in reports for n, crcs in part.items()}}
        replaced = self.root / f".{final.name}.old"
        try:
            write_meta(self.temporary, meta)
            shutil.rmtree(replaced, ignore_errors=True)
            if final.exists():  # moved aside, not deleted: a crash here must not lose it
                os.rename(final, replaced)
            os.rename(self.temporary, final)
            fsync_directory(self.root)
        except OSError as e:
            with contextlib.suppress(OSError):
                if replaced.exists() and not final.exists():
                    os.rename(replaced, final)
            return f"could not publish {final}: {e}"
        try:
            self._prune(final, replaced)
        except OSError as e:
            self.say(f"note: {final} is complete, but old checkpoints could not be removed: {e}")
        return None

    def _prune(self, final: Path, *doomed: Path) -> None:
        """Removes all but the newest, the best and the one just made: first the name, at once, then
        the bytes, beside the training. What a crash leaves of them goes at the next start."""
        line, doomed = complete_checkpoints(self.root), list(doomed)
        spared = {final, *(line[-self.keep_last:] if self.keep_last else line)}
        if self.keep_best:
            scores = {path: (read_meta(path).get("result") or {}).get("val_top1") for path in line}
            best = sorted((p for p in line if scores[p] is not None), key=scores.get)
            spared.update(best[-self.keep_best:])
            if best:
                link, new = self.root.parent / "best", self.root.parent / ".best.tmp"
                new.unlink(missing_ok=True)
                new.symlink_to(best[-1].relative_to(self.root.parent))
                os.replace(new, link)
        for old in line:
            if old not in spared:
                doomed.append(self.root / f".{old.name}.gone")
                with contextlib.suppress(OSError):
                    os.rename(old, doomed[-1])
        if self.remover is not None:
            self.remover.join()
        self.remover = threading.Thread(daemon=True, target=lambda: [
            shutil.rmtree(path, ignore_errors=True) for path in doomed])
        self.remover.start()

    def scored(self, result: dict | None) -> dict | None:
        """Adds an evaluation that a signal had cut off to its checkpoint; returns it."""
        error, path = None, self.newest
        if result and path and path.parent == self.root and self.grid.world.rank == 0:
            try:
                meta = {**read_meta(path), "result": result}
                write_meta(path, meta)
                self._prune(path)
            except (OSError, ValueError) as e:
                error = f"its evaluation could not be noted: {e}"
        self._agree(error)
        return result
