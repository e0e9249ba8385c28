"""What is kept: checkpoints that know neither tp nor dp, files of whole tensors under timm's names.

    OUTPUT/checkpoints/step_00001000/meta.json       step, images seen, configs, files, checksums
                                     rank_00000.pt   {name: {weight, exp_avg, exp_avg_sq}}, fp32

`weight` is the fp32 master: bf16 weights are its rounding, so they need not be stored. A checkpoint
is complete, with every file of its meta.json at its size, or is none; `saver` writes them.
"""

import json
import os
import re
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from parallel import ShardedOptimizer, all_gather_object, full_shape, shard

READERS = 8  # threads that compute checksums; zlib lets go of the interpreter meanwhile


class Damaged(ValueError):
    """A checkpoint whose sizes are right and whose contents are not."""


def fsync_directory(path: Path) -> None:
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
        fsync_directory(path.parent)
    except RuntimeError as e:  # torch.save reports a full disk as RuntimeError
        raise OSError(f"could not write {path}: {e}") from e
    finally:
        temporary.unlink(missing_ok=True)


def crc(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().numpy())


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
    if meta.get("checksum") not in (None, _checksum(meta)):  # None: of before there was one
        return "meta.json is damaged: its checksum is not the one that was saved"
    return None


def write_meta(directory: Path, meta: dict) -> None:
    """meta.json, whole or not at all, with a checksum of what it says."""
    text = json.dumps({**meta, "checksum": _checksum(meta)}, indent=1)
    write_atomically(directory / "meta.json", lambda f: f.write(text.encode()))


def _checksum(meta: dict) -> int:
    told = json.loads(json.dumps({k: v for k, v in meta.items() if k != "checksum"}))
    return zlib.crc32(json.dumps(told, sort_keys=True).encode())


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
        if expected is not None and crc(tensor) != expected:
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
