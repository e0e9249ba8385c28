"""What is kept: checkpoints that know neither tp nor dp, files of whole tensors under timm's names.

    OUTPUT/checkpoints/step_00001000/meta.json       step, images seen, configs, files, checksums
                                     rank_00000.pt   {name: {weight, exp_avg, exp_avg_sq}}, fp32
    OUTPUT/best -> checkpoints/step_00001000         with --keep-best

Each rank gathers one bucket at a time, and keeps and writes only its share of the names. `weight`
is the fp32 master: bf16 weights are its rounding, so they need not be stored. Everything is written
to a temporary directory, synced, then renamed: a checkpoint is complete, or it is not there.
"""

import contextlib
import json
import math
import os
import re
import shutil
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from parallel import ShardedOptimizer, all_gather_object, full_shape, shard

FAILED = -1  # in place of the step that a rank has written
READERS = 8  # threads that compute checksums; zlib lets go of the interpreter meanwhile


class Damaged(ValueError):
    """A checkpoint whose sizes are right and whose contents are not."""


def _share_out(sizes: dict[str, int], world: int) -> dict[str, int]:
    """Which rank writes which weight: the largest first, always to the least loaded rank."""
    load, owner = [0] * world, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = load.index(min(load))
        load[owner[name]] += sizes[name]
    return owner


def _fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def write_synced(path: Path, write: Callable) -> None:
    with open(path, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())


def check_writable(folder: Path) -> None:
    """Raises ValueError if nothing can be written in a folder, which is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.write_bytes(b"0" * 4096)
        probe.unlink()
    except OSError as e:
        raise ValueError(f"{folder} cannot be written: {e.strerror or e}") from e


def write_atomically(path: Path, write: Callable) -> None:
    """write(file) to a temporary file that becomes `path`: whole, or not at all (OSError)."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write_synced(temporary, write)
        os.replace(temporary, path)
        _fsync_directory(path.parent)
    except RuntimeError as e:  # torch.save reports a full disk as RuntimeError
        raise OSError(f"could not write {path}: {e}") from e
    finally:
        temporary.unlink(missing_ok=True)


def _replace_text(path: Path, text: str) -> None:
    write_atomically(path, lambda f: f.write(text.encode()))


def _crc(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().numpy())


def _save_tensors(tensors: dict, f) -> None:
    """torch.save without the checksums of its zip file, which take longer than a disk: meta.json
    has those of the tensors."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, f)
    finally:
        torch.serialization.set_crc32_options(before)


# ----------------------------------------------------------------------------- saving
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
                crcs = pool.map(_crc, (x for kinds in tensors.values() for x in kinds.values()))
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
            _replace_text(self.temporary / "meta.json", json.dumps(meta, indent=1))
            shutil.rmtree(replaced, ignore_errors=True)
            if final.exists():  # moved aside, not deleted: a crash here must not lose it
                os.rename(final, replaced)
            os.rename(self.temporary, final)
            _fsync_directory(self.root)
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
                _replace_text(path / "meta.json", json.dumps(meta, indent=1))
                self._prune(path)
            except (OSError, ValueError) as e:
                error = f"its evaluation could not be noted: {e}"
        self._agree(error)
        return result


def save_checkpoint(root: Path, step: int, optimizer: ShardedOptimizer, meta: dict,
                    keep_last: int = 0) -> Path:
    """Writes root/step_NNNNNNNN as a Saver does, and waits for it."""
    saver = Saver(root, optimizer, keep_last=keep_last)
    saver.begin(step, meta)
    saver.wait()
    return saver.newest


# ----------------------------------------------------------------------------- reading
def complete_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints below root, oldest first: every file there, with its size."""
    return [d for d in sorted(root.glob("step_*")) if incomplete_reason(d) is None]


def incomplete_reason(directory: Path) -> str | None:
    """None for a complete checkpoint, else what is wrong with it."""
    try:
        meta = json.loads((directory / "meta.json").read_text())
        files, used = meta["files"], set(map(str, meta["where"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"meta.json cannot be read: {getattr(e, 'strerror', None) or repr(e)}"
    for name in sorted({*files, *used}):
        if not re.fullmatch(r"rank_\d+\.pt", name) or name not in files:
            return f"meta.json names {name}, which is no file of a checkpoint"
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != files[name]:
            return f"{name} has {path.stat().st_size} bytes, should have {files[name]}"
    return None


def newest_checkpoint(path: Path) -> Path:
    """path itself if it is a checkpoint, else the newest complete one of this output directory.
    Raises ValueError if there is none."""
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    if path.name.startswith("step_") or (path / "meta.json").exists():
        read_meta(path)  # raises if it is incomplete
        return path
    found = complete_checkpoints(path)
    if not found:
        raise ValueError(f"{path} holds no complete checkpoint (step_*/meta.json)")
    return found[-1]


def read_meta(directory: Path) -> dict:
    """A checkpoint's meta.json. Raises ValueError if the checkpoint is missing or incomplete."""
    reason = incomplete_reason(directory)
    if reason:
        raise ValueError(f"{directory} is not a complete checkpoint: {reason}")
    return json.loads((directory / "meta.json").read_text())


class CheckpointTensors:
    """Reads single tensors of a checkpoint; files are mapped into memory, not read whole. Raises
    Damaged for a file that cannot be read and for a tensor that is not what was saved."""

    def __init__(self, directory: Path):
        meta = read_meta(directory)
        self.directory, self.where, self.crc32 = directory, meta["where"], meta.get("crc32", {})
        try:
            self.files = {file: torch.load(directory / file, map_location="cpu", mmap=True,
                                           weights_only=True) for file in meta["files"]}
        except Exception as e:  # torch fails in many ways
            raise Damaged(f"{directory} is damaged: a file cannot be read: {e}") from e

    def kinds(self, name: str) -> list[str]:
        return list(self.files[self.where[name]].get(name, ()))

    def __call__(self, name: str, kind: str) -> torch.Tensor:
        file = self.where[name]
        try:
            tensor, expected = self.files[file][name][kind], self.crc32.get(name, {}).get(kind)
        except (KeyError, TypeError) as e:
            raise Damaged(f"{self.directory} is damaged: {file} has no {kind} of {name}") from e
        if expected is not None and _crc(tensor) != expected:
            raise Damaged(f"{self.directory} is damaged: {file}, {kind} of {name}: its checksum is "
                          f"not the one that was saved")
        return tensor


@torch.no_grad()
def load_checkpoint(directory: Path, optimizer: ShardedOptimizer) -> dict:
    """Loads masters, moments and weights at this run's layout, whatever the saved one was.

    Collective. Each rank reads only the tensors that its slices touch. Returns meta.json. Raises
    ValueError on all ranks if the checkpoint is of another model or optimizer, or is Damaged.
    """
    meta, tp, error = read_meta(directory), optimizer.grid.tp, None
    named = {n: p for b in optimizer.buckets for n, p in b.params.items()}
    if set(meta["where"]) != set(named):
        odd = sorted(set(meta["where"]) ^ set(named))
        raise ValueError(f"{directory} is a checkpoint of another model: {len(odd)} weights do not "
                         f"match, for example {odd[0]}; give its --model, or --resume none")
    if tuple(meta["state"]) != optimizer.state_names:
        raise ValueError(f"{directory} holds {meta['state']}, this --optimizer needs "
                         f"{list(optimizer.state_names)}; give the same --optimizer and "
                         f"--ema-decay (0: no ema)")
    mine = [(bucket, name, kind, slice_) for bucket in optimizer.buckets for name in bucket.params
            for kind, slice_ in {"weight": bucket.master, **bucket.state}.items()
            if bucket.offsets[name] < bucket.end
            and bucket.offsets[name] + named[name].numel() > bucket.begin]
    try:
        read = CheckpointTensors(directory)
        with ThreadPoolExecutor(READERS) as pool:  # ahead: reading and checksums take the time
            tensors = pool.map(lambda one: read(one[1], one[2]), mine)
            for (bucket, name, _, slice_), full in zip(mine, tensors, strict=True):
                if list(full.shape) != full_shape(named[name], tp):
                    raise ValueError(f"{directory} has {name} of shape {list(full.shape)}, this "
                                     f"model needs {full_shape(named[name], tp)}")
                offset = bucket.offsets[name]
                begin = max(offset, bucket.begin)
                end = min(offset + named[name].numel(), bucket.end)
                local = shard(full, named[name], tp).flatten()
                slice_[begin - bucket.begin:end - bucket.begin] = local[begin - offset:end - offset]
    except ValueError as e:
        error = e
    for e in filter(None, all_gather_object(error, optimizer.grid.world)):
        raise e
    for bucket in optimizer.buckets:
        bucket.all_gather_weight()
    optimizer.wait()
    optimizer.step_count.fill_(meta["updates"])
    for state in optimizer.optimizer.state.values():
        if "step" in state:
            state["step"].fill_(meta["updates"])
    return meta


def load_newest(candidates: list[Path], optimizer: ShardedOptimizer) -> tuple[Path, dict, list]:
    """load_checkpoint of the first that is not damaged: (path, meta.json, lines for the log)."""
    lines = []
    for path in candidates:
        try:
            return path, load_checkpoint(path, optimizer), lines
        except Damaged as e:
            lines.append(f"skipping a damaged checkpoint: {e}")
    raise ValueError("; ".join(lines))
