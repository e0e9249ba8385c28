"""What is kept: checkpoints that know neither tp nor dp, files of whole tensors under timm's names.

    OUTPUT/checkpoints/step_00001000/meta.json       step, images seen, configs, files and sizes
                                     rank_00000.pt   {name: {weight, exp_avg, exp_avg_sq}}, fp32

Each rank gathers one bucket at a time, and keeps and writes only its share of the names. `weight`
is the fp32 master: bf16 weights are its rounding, so they need not be stored. Everything is written
to a temporary directory, synced, then renamed: a checkpoint is complete, or it is not there.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from parallel import ShardedOptimizer, all_gather_object, barrier, full_shape, shard


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


def _write_synced(path: Path, write: Callable) -> None:
    with open(path, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())


def write_atomically(path: Path, write: Callable) -> None:
    """write(file) to a temporary file that becomes `path`: whole, or not at all (OSError)."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        _write_synced(temporary, write)
        os.replace(temporary, path)
        _fsync_directory(path.parent)
    except RuntimeError as e:  # torch.save reports a full disk as RuntimeError
        raise OSError(f"could not write {path}: {e}") from e
    finally:
        temporary.unlink(missing_ok=True)


def _replace_text(path: Path, text: str) -> None:
    write_atomically(path, lambda f: f.write(text.encode()))


def save_checkpoint(root: Path, step: int, optimizer: ShardedOptimizer, meta: dict,
                    keep_last: int = 0) -> Path:
    """Writes root/step_NNNNNNNN, then removes all complete ones but the keep_last newest (0: none).

    Collective. A failure on any rank (a full disk) raises OSError on all of them; it leaves the
    checkpoints that were there as they were.
    """
    grid, final = optimizer.grid, root / f"step_{step:08d}"
    temporary = root / f".{final.name}.tmp"
    if grid.world.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier(grid)
    sizes = {n: math.prod(full_shape(p, grid.tp)) for b in optimizer.buckets
             for n, p in b.params.items()}
    owner = _share_out(sizes, grid.world.size)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name, kind, full in optimizer.full_tensors(lambda n: owner[n] == grid.world.rank):
        tensors.setdefault(name, {})[kind] = full
    file = temporary / f"rank_{grid.world.rank:05d}.pt"
    error = None
    try:
        _write_synced(file, lambda f: torch.save(tensors, f))
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as RuntimeError
        error = f"rank {grid.world.rank} could not write {file}: {e}"
    reports = all_gather_object((error, file.stat().st_size if error is None else 0), grid.world)
    errors = [e for e, _ in reports if e]
    if not errors and grid.world.rank == 0:
        try:
            meta = {**meta, "step": step, "updates": int(optimizer.step_count),
                    "state": list(optimizer.state_names),
                    "files": {f"rank_{r:05d}.pt": size for r, (_, size) in enumerate(reports)},
                    "where": {name: f"rank_{r:05d}.pt" for name, r in owner.items()}}
            _replace_text(temporary / "meta.json", json.dumps(meta, indent=1))
            replaced = root / f".{final.name}.old"
            shutil.rmtree(replaced, ignore_errors=True)
            if final.exists():  # moved aside, not deleted: a crash here must not lose it
                os.rename(final, replaced)
            os.rename(temporary, final)
            _fsync_directory(root)
            shutil.rmtree(replaced, ignore_errors=True)
        except OSError as e:
            errors = [f"could not publish {final}: {e}"]
    errors = all_gather_object(errors, grid.world)[0]
    if errors:
        if grid.world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"checkpoint of step {step} failed, earlier ones are untouched: {errors[0]}")
    if grid.world.rank == 0 and keep_last:
        for old in complete_checkpoints(root)[:-keep_last]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def complete_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints below root, oldest first: every file there, with its size."""
    return [d for d in sorted(root.glob("step_*")) if incomplete_reason(d) is None]


def incomplete_reason(directory: Path) -> str | None:
    """None for a complete checkpoint, else what is wrong with it."""
    try:
        files = json.loads((directory / "meta.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as e:
        return f"meta.json cannot be read: {getattr(e, 'strerror', None) or e}"
    for name, size in files.items():
        path = directory / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            return f"{name} has {found} bytes, should have {size}"
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
    """Reads single tensors of a checkpoint; files are mapped into memory, not read whole."""

    def __init__(self, directory: Path):
        self.directory, self.where, self.files = directory, read_meta(directory)["where"], {}

    def __call__(self, name: str, kind: str) -> torch.Tensor:
        return self.kinds(name)[kind]

    def kinds(self, name: str) -> dict[str, torch.Tensor]:
        file = self.where[name]
        if file not in self.files:
            self.files[file] = torch.load(self.directory / file, map_location="cpu", mmap=True,
                                          weights_only=True)
        return self.files[file][name]


@torch.no_grad()
def load_checkpoint(directory: Path, optimizer: ShardedOptimizer) -> dict:
    """Loads masters, moments and weights at this run's layout, whatever the saved one was.

    Each rank reads only the tensors that its slices touch. Returns meta.json. Raises ValueError if
    the checkpoint is of another model or optimizer.
    """
    meta, read = read_meta(directory), CheckpointTensors(directory)
    named = {n: p for b in optimizer.buckets for n, p in b.params.items()}
    if set(meta["where"]) != set(named):
        odd = sorted(set(meta["where"]) ^ set(named))
        raise ValueError(f"{directory} is a checkpoint of another model: {len(odd)} weights do not "
                         f"match, for example {odd[0]}; give its --model, or --resume none")
    if tuple(meta["state"]) != optimizer.state_names:
        raise ValueError(f"{directory} holds {meta['state']}, this --optimizer needs "
                         f"{list(optimizer.state_names)}; give the same --optimizer and "
                         f"--ema-decay (0: no ema)")
    for bucket in optimizer.buckets:
        for name, param in bucket.params.items():
            begin = max(bucket.offsets[name], bucket.begin)
            end = min(bucket.offsets[name] + param.numel(), bucket.end)
            for kind, mine in {"weight": bucket.master, **bucket.state}.items():
                if begin >= end:
                    continue
                full = read(name, kind)
                if list(full.shape) != full_shape(param, optimizer.grid.tp):
                    raise ValueError(
                        f"{directory} has {name} of shape {list(full.shape)}, this model needs "
                        f"{full_shape(param, optimizer.grid.tp)}")
                local = shard(full, param, optimizer.grid.tp).flatten()
                offset = bucket.offsets[name]
                mine[begin - bucket.begin:end - bucket.begin] = local[begin - offset:end - offset]
        bucket.all_gather_weight()
    optimizer.wait()
    optimizer.step_count.fill_(meta["updates"])
    for state in optimizer.optimizer.state.values():
        if "step" in state:
            state["step"].fill_(meta["updates"])
    return meta


# ----------------------------------------------------------------------------- at the start
def check_writable(folder: Path) -> None:
    """Raises ValueError if nothing can be written in a folder, which is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.write_bytes(b"0" * 4096)
        probe.unlink()
    except OSError as e:
        raise ValueError(f"{folder} cannot be written: {e.strerror or e}") from e


def check_room(output: Path, need: int) -> None:
    """Finds an output directory that cannot be written, or a disk too full for a checkpoint of
    `need` bytes, before step 0: ValueError."""
    check_writable(output / "checkpoints")
    free = shutil.disk_usage(output).free
    if free < need:
        raise ValueError(f"--output-dir {output} has {free / 2**30:.1f} GiB free; one checkpoint "
                         f"of this model takes {need / 2**30:.1f} GiB")


def find_resume(output_dir: str, resume: str) -> tuple[Path | None, list[str]]:
    """(the checkpoint to continue from, lines for the log). The order is important:
    1. --resume none: start fresh; refuse to mix with checkpoints that are there
    2. --resume PATH: that one, or the newest complete one below it
    3. --resume auto: the newest complete one of --output-dir, or start fresh
    Raises ValueError where that cannot be.
    """
    own = Path(output_dir) / "checkpoints"
    if resume == "none":
        if complete_checkpoints(own):
            raise ValueError(f"--resume none would mix a new run with the checkpoints in {own}; "
                             f"remove them or give another --output-dir")
        return None, []
    if resume != "auto":
        if not Path(resume).is_dir():
            raise ValueError(f"--resume {resume} is no directory; give a checkpoint, an output "
                             f"directory, auto or none")
        return newest_checkpoint(Path(resume)), []
    reasons = {path: incomplete_reason(path) for path in sorted(own.glob("step_*"))}
    found = [path for path, reason in reasons.items() if reason is None]
    return found[-1] if found else None, [f"skipping an incomplete checkpoint: {path}: {reason}"
                                          for path, reason in reasons.items() if reason]


def check_same_model(directory: Path, vit: dict, classes: list[str], data: str) -> None:
    """A checkpoint continues only its own model (fields of ViTConfig), on its own classes."""
    meta = read_meta(directory)
    free = ("hidden_dropout", "attention_dropout", "drop_path_rate", "drop_path_mode",
            "drop_patch_rate", "gelu_approximate", "layernorm_eps")
    differ = [f"{key} {meta['vit'].get(key)} (this run: {value})" for key, value in vit.items()
              if key not in free and meta["vit"].get(key) != value]
    if differ:
        raise ValueError(f"{directory} is a checkpoint of another model: {', '.join(differ)}; give "
                         f"its flags, another --output-dir, or --resume none")
    if meta["classes"] != classes:
        raise ValueError(f"{directory} was trained on other classes ({len(meta['classes'])}: "
                         f"{', '.join(meta['classes'][:3])} ...) than --data {data}")
