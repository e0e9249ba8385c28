"""What a run begins from. An output directory has one writer and one line of training.

    OUTPUT/.lock                      held by the process that writes here, as long as it lives
    OUTPUT/abandoned/step_00002000    a checkpoint later than the one that a run was resumed from

A checkpoint knows the --resume PATH that its line of training began with (`begun_from`), so the
same command goes on from its newest descendant. What a run does not descend from is moved away
before its first step, so that the newest checkpoint is always the one to go on from.
"""

import contextlib
import math
import os
import re
import shutil
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from checkpoint import (
    check_writable,
    complete_checkpoints,
    incomplete_reason,
    newest_checkpoint,
    read_meta,
    write_synced,
)
from configs import ViTConfig
from flags import flag_name, to_plain

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@dataclass
class Start:
    """What a run begins from: checkpoints to resume, or full weights by name, or neither."""
    candidates: list[Path] = field(default_factory=list)  # the first that is not damaged
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    news: list[str] = field(default_factory=list)  # lines for the log
    begun_from: str | None = None  # the --resume PATH that this line of training began with
    resume: Path | None = None     # of the candidates the one that was loaded
    meta: dict = field(default_factory=dict)  # its meta.json
    locks: list = field(default_factory=list)  # on rank 0, held to the end, and what came with it

    def give_up(self) -> None:
        """A run that is refused leaves --output-dir as it was, but for an index of tars."""
        for _, made in self.locks:
            leave_output(made)


def check_room(output: Path, need: int, limit: float = math.inf) -> list[str]:
    """Finds a disk too full for a checkpoint of `need` bytes before step 0: ValueError. Returns a
    line for the log if one takes longer than `limit`, seconds that a job has after SIGTERM, less 5.

    Below 2 GB it is taken to be in time; else the rate of a file of 1 GiB, synced, tells.
    """
    check_writable(output / "checkpoints")
    free = shutil.disk_usage(output).free
    if free < need:
        raise ValueError(f"--output-dir {output} has {free / 2**30:.1f} GiB free; one checkpoint "
                         f"of this model takes {need / 2**30:.1f} GiB")
    if need < 2e9:
        return []
    probe, begin = output / "checkpoints" / ".write-test.tmp", time.perf_counter()
    write_synced(probe, lambda f: [f.write(bytes(2**24)) for _ in range(64)])
    rate = 2**30 / (time.perf_counter() - begin)
    probe.unlink()
    return [] if need / rate < limit - 5 else [
        f"note: a checkpoint of {need / 2**30:.1f} GiB takes about {need / rate:.0f} s at the "
        f"{rate / 1e9:.2f} GB/s of {output}, and torchrun kills a job {limit:.0f} s after SIGTERM: "
        f"set TORCH_ELASTIC_SHUTDOWN_TIMEOUT or its --shutdown-timeout (not in torch 2.11)"]


def claim_output(output: Path) -> tuple:
    """Makes this process the one writer of an output directory, as long as the lock that it returns
    is open, and clears away what dead ones left. Returns (lock, lines for the log).

    A POSIX record lock: the kernel lets go of it with the process, on NFS too, and forked workers
    do not hold it. A file system without locks is noted, and then nothing guards it. Raises
    ValueError with the process and host of another writer.
    """
    check_writable(output / "checkpoints")
    lock, lines = open(output / ".lock", "a+"), []  # noqa: SIM115 it stays open
    try:
        if fcntl is not None:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(lock.fileno()).st_nlink:  # a refused run has removed it meanwhile
                return claim_output(output)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        raise ValueError(f"--output-dir {output} is being written by {lock.read().strip()}; give "
                         f"another --output-dir, or end that job first") from None
    except OSError as e:
        lines.append(f"note: no lock on {output} ({e.strerror}): let no other job write in it")
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    for path in sorted((output / "checkpoints").glob(".step_*")):
        final = path.with_name(path.stem[1:])
        if path.suffix == ".old" and incomplete_reason(final) and not incomplete_reason(path):
            shutil.rmtree(final, ignore_errors=True)
            os.rename(path, final)
            lines.append(f"putting back {final}, which a save that died had moved aside")
        else:
            shutil.rmtree(path, ignore_errors=True)
    return lock, lines


def leave_output(made: list[Path]) -> None:
    """Undoes claim_output for a run that is refused: removes what it `made`, but for a folder with
    other files."""
    with contextlib.suppress(OSError):  # what is not empty ends it
        for path in made:
            path.unlink() if path.name == ".lock" else path.rmdir()


def open_output(output_dir: str, resume: str, locks: list) -> tuple[list[Path], list[str]]:
    """claim_output, whose lock goes to `locks` with what leave_output is to remove, then
    find_resume, with the lines of both."""
    output = Path(output_dir)
    made = [path for path in (output / "checkpoints", output / ".lock", output)
            if not path.exists()]
    lock, lines = claim_output(output)
    locks.append((lock, made))
    found, more = find_resume(output_dir, resume)
    return found, lines + more


def find_resume(output_dir: str, resume: str) -> tuple[list[Path], list[str]]:
    """(checkpoints to continue from, the best choice first, lines for the log). In this order:
    1. --resume none: start fresh; refuse to mix with checkpoints that are there
    2. --resume auto, or --output-dir itself: its complete ones, newest first, or start fresh
    3. --resume PATH: of those the ones that came of PATH, newest first: the same command goes on
    4. --resume PATH for the first time: that one, or the newest complete one below it; refuse to
       mix with a line of training that it is no part of
    Raises ValueError where that cannot be.
    """
    own = Path(output_dir) / "checkpoints"
    reasons = {path: incomplete_reason(path) for path in sorted(own.glob("step_*"), reverse=True)}
    found = [path for path, reason in reasons.items() if reason is None]
    if resume == "none":
        if found:
            raise ValueError(f"--resume none would mix a new run with the checkpoints in {own}; "
                             f"remove them or give another --output-dir")
        return [], []
    lines = [f"skipping an incomplete checkpoint: {path}: {reason}"
             for path, reason in reasons.items() if reason]
    path = Path(resume)
    if resume == "auto" or found and path.resolve() in (own.resolve(), own.parent.resolve()):
        return found, lines
    line = [c for c in found if read_meta(c).get("begun_from") == os.path.realpath(resume)]
    if line:
        return line, [*lines, f"--resume {resume} is where the checkpoints in {own} came from, and "
                      f"they go on; to begin there again, give another --output-dir"]
    if not path.is_dir():
        there = ", ".join(c.name for c in complete_checkpoints(path.parent)[-5:])
        raise ValueError(f"--resume {resume} is no directory; give a checkpoint, an output "
                         f"directory, auto or none" + (f"; newest: {there}" if there else ""))
    path = newest_checkpoint(path)
    if found and path.resolve().parent != own.resolve():
        raise ValueError(f"--resume {resume} would mix its line with the other checkpoints in {own}"
                         f"; give another --output-dir, or --resume auto to continue those")
    return [path], lines


def facts_of(directory: Path) -> dict:
    """The settings that a checkpoint was trained with, by field: what a run that resumes it takes
    where no flag says otherwise; fields that came later have their defaults."""
    meta = read_meta(directory)
    return {key: tuple(value) if isinstance(value, list) else value
            for key, value in {**to_plain(ViTConfig()), **meta["config"], **meta["vit"]}.items()}


def set_aside(output: Path, step: int) -> list[str]:
    """Moves checkpoints later than `step`, where a run begins, to output/abandoned: it shall never
    go on from one that it does not descend from. Returns lines for the log."""
    lines = []
    for path in sorted((output / "checkpoints").glob("step_*")):
        if re.fullmatch(r"step_\d+", path.name) and int(path.name[5:]) > step:
            number, target = 0, output / "abandoned" / path.name
            while target.exists():
                number += 1
                target = target.with_name(f"{path.name}.{number}")
            target.parent.mkdir(exist_ok=True)
            os.rename(path, target)
            lines.append(f"{path} is later than step {step}, where this run begins: moved to "
                         f"{target}")
    return lines


def begun_from(output_dir: str, resume: str, meta: dict) -> str | None:
    """The --resume PATH that a line of training began with, for its checkpoints to tell; meta: of
    the one that is resumed."""
    own = Path(output_dir).resolve()
    if resume in ("auto", "none") or Path(resume).resolve() in (own, own / "checkpoints"):
        return meta.get("begun_from")
    return os.path.realpath(resume)


def check_same_model(directory: Path, vit: dict, config: dict, classes: list[str],
                     images: int) -> list[str]:
    """A checkpoint continues only its own model (fields of ViTConfig), on its own classes and
    pixels: ValueError. Returns notes on what may differ."""
    meta = read_meta(directory)
    free = ("hidden_dropout", "attention_dropout", "drop_path_rate", "drop_path_uniform",
            "drop_path_mode", "drop_patch_rate")
    saved = to_plain(ViTConfig()) | meta["vit"]  # a field that came later: its default
    pairs = [(key, saved[key], value) for key, value in vit.items() if key not in free]
    pairs += [(key, meta["config"].get(key), config.get(key)) for key in ("mean", "std")]
    differ = [f"{key} {old} (this run: {new})" for key, old, new in pairs if old != new]
    if differ:
        raise ValueError(f"{directory} is a checkpoint of another model: {', '.join(differ)}; give "
                         f"its flags, another --output-dir, or --resume none")
    frozen, data = meta["config"].get("freeze", "none"), config["data"]
    held, holds = meta["config"].get("val_share"), config.get("val_share")
    if held != holds:  # None: there is a val
        raise ValueError(f"{directory} held out val_share {held} (this run: {holds}) of its "
                         f"images: give the same --data and --val-share, another --output-dir, or "
                         f"--resume none")
    if frozen != config["freeze"]:
        raise ValueError(f"{directory} is of a run with --freeze {frozen} (this run: "
                         f"{config['freeze']}); start from it with --init-from in another "
                         f"--output-dir")
    if meta["classes"] != classes:
        raise ValueError(f"{directory} was trained on other classes ({len(meta['classes'])}: "
                         f"{', '.join(meta['classes'][:3])} ...) than --data {data}")
    return [] if meta.get("images", images) == images else [
        f"note: --data {data} has {images:,} training images, {directory} had {meta['images']:,}: "
        f"their order is another, and so is the length of an epoch"]


def notes(meta: dict, total_steps: int, flags: dict) -> list[str]:
    """What the log tells of the run until this checkpoint, of its length if that is another, and of
    `flags`, the fields of both configurations, that are others."""
    lines, skipped = [], meta["step"] - meta["updates"]
    old, new = ({key: "not given" if value is None else value for key, value in values.items()}
                for values in ({**meta["vit"], **meta["config"]}, flags))
    changed = [f"{flag_name(key)} {value} (was {old[key]})" for key, value in new.items()
               if key not in ("resume", "output_dir") and old.get(key, value) != value]
    if changed:
        lines.append(f"note: other than in the checkpoint: {', '.join(changed)}")
    unreadable = len(meta.get("counts", {}).get("unreadable", ()))
    if meta.get("total_steps", total_steps) != total_steps:
        lines.append(f"note: the run was to take {meta['total_steps']:,} steps, and takes "
                     f"{total_steps:,} now; the learning rate follows")
    if skipped or unreadable:
        lines.append(f"until then steps skipped for their gradients: {skipped:,}; unreadable "
                     f"images: {unreadable:,}")
    return lines
