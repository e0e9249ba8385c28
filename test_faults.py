"""Ways of dying, counted, and what a hang tells.

    python test_faults.py --trials 25                               # the table of RESULTS.md

A trial starts train.py, lets something happen to it, starts the same command again, and asks that
the metrics of both are those of a run to which nothing happened: every step once, with the same
loss to the bit. Each row of the table is a way of dying, at another moment in each trial.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from checkpoint import complete_checkpoints
from configs import TrainConfig
from parallel import ShardedOptimizer
from runtime import on_rank_0, run_program, start_processes
from testing import TRAIN_FLAGS, Drawn, grid_of, run_ranks, start_ranks, train_main
from watch import Watch

STEPS, LIMIT = 8, 60  # steps of a run; seconds after which a process is said to hang
FLAGS = [*TRAIN_FLAGS, "--max-steps", str(STEPS), "--save-interval", "1", "--keep-last", "2"]
# Events of Python's audit hooks that change a directory, in whichever thread.
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link"}


# ----------------------------------------------------------------------------- inside a rank
def _rank(output, fault, rank, value):
    """train.main with a fault that works from inside, on all ranks or on one. Returns how often it
    changed its files."""
    count, mine = itertools.count(), rank in (None, int(os.environ["RANK"]))

    def hook(event, args):
        created = event == "open" and str(args[0]).startswith(output) and args[1] != "r"
        if (created or event in CHANGES) and next(count) == value and mine and fault == "change":
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    if mine and fault == "file size":  # every write beyond it fails, as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (value, value))
    elif fault == "read-only":  # root obeys the mode of a directory too, without CAP_DAC_OVERRIDE
        header, sets = (ctypes.c_uint * 2)(0x20080522, 0), (ctypes.c_uint * 6)()
        ctypes.CDLL(None).capget(header, sets)
        sets[0] &= ~2
        ctypes.CDLL(None).capset(header, sets)
    elif fault == "clock":  # the wall clock jumps by up to an hour whenever it is looked at
        clock, jump = time.time, random.Random(value)
        time.time = lambda: clock() + jump.uniform(-3600, 3600)
    train_main([*FLAGS, "--output-dir", output])
    return next(count)


def _late_rank(argv):
    """train.py in which rank 1 needs 40 ms more for each image and stops for ever in step 5."""
    if os.environ["RANK"] == "1":
        def load(self, index, original=Drawn.load):
            time.sleep(0.04)
            return original(self, index)

        def step(self, lr, original=ShardedOptimizer.step, count=itertools.count(1)):
            if next(count) == 5:
                os.kill(os.getpid(), signal.SIGSTOP)
            return original(self, lr)
        Drawn.load, ShardedOptimizer.step = load, step
    run_program(lambda: train_main(argv))


class Job:
    """One run of train.py on `world` ranks."""

    def __init__(self, world, output, *fault, function=None):
        """fault: of _rank, (name, rank, value)."""
        self.folder = tempfile.TemporaryDirectory()
        call = function or (_rank, str(output), *(fault or (None,) * 3))
        self.ranks, self.store = start_ranks(world, self.folder.name, *call)

    def signal(self, number, rank=None):
        for r, process in enumerate(self.ranks):
            if rank in (None, r) and process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(process.pid, number)

    def wait(self, seconds=LIMIT):
        """Until all ranks have ended, or for some seconds; a rank that a signal ended takes the
        others along, as torchrun does. Whether they have ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(process.is_alive() for process in self.ranks):
            if any((process.exitcode or 0) < 0 for process in self.ranks):
                self.signal(signal.SIGKILL)
            time.sleep(0.002)
        return not any(process.is_alive() for process in self.ranks)

    def finish(self):
        """(exit codes, rank 0's output); None among the codes: it hung, and was killed."""
        self.wait()
        codes = [process.exitcode for process in self.ranks]
        self.signal(signal.SIGKILL)
        for process in self.ranks:
            process.join()
        path = Path(self.folder.name, "output_0")
        return codes, path.read_text(errors="replace") if path.exists() else ""


# ----------------------------------------------------------------------------- ways of dying
# Each is a function (job's arguments, draw, undisturbed run) that ends when the job is dead: what
# it says of the trial, or None. Reference: seconds, changes of files by rank, losses.
def kill_at_any_time(world, output, draw, whole):
    job = Job(world, output)
    job.wait(draw.uniform(0, whole.seconds))
    job.signal(signal.SIGKILL)
    job.finish()


def kill_before_a_change_of_files(world, output, draw, whole):
    rank = draw.randrange(world)
    Job(world, output, "change", rank, draw.randrange(whole.changes[rank])).finish()


def sigterm(world, output, draw, whole):
    job = Job(world, output)
    job.wait(draw.uniform(0, whole.seconds))
    job.signal(signal.SIGTERM, draw.choice([None, draw.randrange(world)]))
    codes, text = job.finish()
    if "step " in text.split("starting fresh")[-1] and (set(codes) != {0} or not re.search(
            "stopped by|done: ", text)):
        return f"after SIGTERM: codes {codes}, {text[-300:]!r}"


def file_size_limit(world, output, draw, whole):
    limit = int(whole.largest * draw.choice([draw.random() ** 3, draw.random()]))
    codes, text = Job(world, output, "file size", draw.randrange(world), limit).finish()
    if 0 in codes:
        return f"nothing failed: codes {codes}"


def full_disk(world, output, draw, whole):
    """A file system of 0.2 to 3.5 checkpoints; then it grows."""
    size = int(whole.total * draw.uniform(0.2, 3.5)) // 4096 * 4096
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", output.parent],
                   check=True)
    codes, text = Job(world, output).finish()
    subprocess.run(["mount", "-o", "remount,size=1g", output.parent], check=True)
    if None in codes:
        return f"hung: codes {codes}"


def read_only(world, output, draw, whole):
    job, root = Job(world, output, "read-only", None, None), output / "checkpoints"
    job.wait(draw.uniform(0, whole.seconds))
    if root.is_dir():
        root.chmod(0o555)
    codes, text = job.finish()
    if root.is_dir():
        root.chmod(0o755)
    if None in codes:
        return f"hung: codes {codes}"


def _damage(world, output, draw, whole, harm):
    """Killed with two checkpoints or more, and then a file of the newest is harmed."""
    root, job = output / "checkpoints", Job(world, output)
    while not job.wait(0.002) and len(list(root.glob("step_*"))) < 3:
        pass
    job.wait(draw.uniform(0, whole.seconds / 4))
    job.signal(signal.SIGKILL)
    job.finish()
    path = draw.choice([p for p in complete_checkpoints(root)[-1].iterdir() if p.stat().st_size])
    harm(path, draw.randrange(path.stat().st_size))


def truncated_file(world, output, draw, whole):
    _damage(world, output, draw, whole, os.truncate)


def flipped_bit(world, output, draw, whole):
    def flip(path, place):
        content = bytearray(path.read_bytes())
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    _damage(world, output, draw, whole, flip)


def two_jobs(world, output, draw, whole):
    """A second job begins at any time in the same directory; then the first is killed."""
    first = Job(world, output)
    first.wait(draw.uniform(0, whole.seconds))
    second = Job(world, output)
    first.wait(draw.uniform(0, whole.seconds))
    first.signal(signal.SIGKILL)
    for job in (first, second):
        codes, text = job.finish()
    if None in codes:
        return f"hung: codes {codes}"


def clocks_jump(world, output, draw, whole):
    """Wall clocks jump while it runs, it is killed, and its files are of any date."""
    job = Job(world, output, "clock", None, draw.random())
    job.wait(draw.uniform(0, whole.seconds))
    job.signal(signal.SIGKILL)
    job.finish()
    for path in output.rglob("*"):
        os.utime(path, (draw.uniform(0, 2e9),) * 2)


WAYS = [kill_at_any_time, kill_before_a_change_of_files, sigterm, file_size_limit, full_disk,
        read_only, truncated_file, flipped_bit, two_jobs, clocks_jump]


# ----------------------------------------------------------------------------- a trial
class Undisturbed:
    """What a run on `world` ranks makes when nothing happens, and how long it takes."""

    def __init__(self, world):
        with tempfile.TemporaryDirectory() as folder:
            output, begin = Path(folder) / "run", time.monotonic()
            job = Job(world, output)
            codes, text = job.finish()
            assert codes == [0] * world, text
            self.seconds = time.monotonic() - begin
            self.changes = [torch.load(f"{job.folder.name}/result_{r}") for r in range(world)]
            self.losses, self.evaluations = read_metrics(output)
            newest = complete_checkpoints(output / "checkpoints")[-1]
            sizes = [path.stat().st_size for path in newest.iterdir()]
            self.largest, self.total = max(sizes), sum(sizes)


def read_metrics(output):
    """([(step, loss)], [(step, top-1)]) of a run."""
    lines = []
    if (output / "metrics.jsonl").exists():
        for line in (output / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):  # cut off by a death
                lines.append(json.loads(line))
    return ([(x["step"], x["loss"]) for x in lines if "loss" in x],
            [(x["step"], x["val_top1"]) for x in lines if "val_top1" in x])


def trial(way, world, whole, seed):
    """(steps made anew, None or what is wrong)."""
    draw = random.Random(f"{way.__name__} {world} {seed}")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "disk" / "run"
        output.parent.mkdir()
        try:
            wrong = way(world, output, draw, whole)
            before, _ = read_metrics(output)
            kept = [int(p.name[5:]) for p in complete_checkpoints(output / "checkpoints")]
            codes, text = Job(world, output).finish()
            after, evaluations = read_metrics(output)
        finally:
            if os.path.ismount(output.parent):
                subprocess.run(["umount", output.parent], check=True)
    resumed = re.search(r"resuming from .*: step (\d+)", text)
    resumed = int(resumed[1]) if resumed else 0
    anew = max((step for step, _ in before), default=0) - resumed
    if wrong is None and codes != [0] * world:
        wrong = f"the second run: codes {codes}, {text[-600:]!r}"
    elif wrong is None and (after, evaluations) != (whole.losses, whole.evaluations):
        wrong = f"other metrics: {after}, {evaluations}"
    elif wrong is None and resumed not in (kept[-2:] if way is flipped_bit else kept[-1:] or [0]):
        wrong = f"resumed at {resumed}, complete are {kept}"
    return anew, wrong


def test_a_run_recovers_from_a_death_at_any_moment():
    """Killed just before some change of its files, and ended by SIGTERM at some time: see above.
    `python test_faults.py` makes hundreds of such trials."""
    whole = Undisturbed(2)
    for way in (kill_before_a_change_of_files, sigterm):
        _, wrong = trial(way, 2, whole, "suite")
        assert wrong is None, wrong


def test_a_late_rank_is_named_and_a_stopped_one_ends_the_job(tmp_path):
    """Rank 1 loads its images slowly: the log names it (in one line of two: machines halt), and
    metrics.jsonl has the ratio. Then it stops: rank 0 says so after a tenth of
    --collective-timeout, with the process and the line, and at the timeout ends with its stack."""
    argv = [*TRAIN_FLAGS, "--collective-timeout", "4", "--output-dir", str(tmp_path / "run")]
    job = Job(2, None, function=(_late_rank, argv))
    job.ranks[0].join(LIMIT)
    process = f"process {job.ranks[1].pid} of "
    job.signal(signal.SIGKILL)
    codes, text = job.finish()
    assert codes == [1, -signal.SIGKILL], text
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "slowest_rank" not in lines[0] and len(lines) == 3
    assert any(line["slowest_rank"] == 1 and line["slowest_ratio"] > 1.5 for line in lines[1:])
    assert re.search(r"step .* \| rank 1 takes [\d.]+ x the others' time", text)
    report, stack = text[text.index("no progress for 0."):].split("Traceback", 1)
    assert "rank 0: in step or batch 5 at parallel.py:" in report
    assert re.search(f"rank 1: NO ANSWER from {process}.*, which was in step or batch 5", report)
    assert "in train_step\n" in stack and "RuntimeError" in stack


def _waits_for_its_device(busy):
    """A rank whose main thread waits for a device that is `busy` for ever, or only computes."""
    grid = grid_of(1)
    Watch(SimpleNamespace(polls=7, grid=grid), 1.2, SimpleNamespace(query=lambda: not busy))
    dist.barrier()
    time.sleep(2.5)
    dist.barrier()


@pytest.mark.parametrize("busy", [True, False])
def test_a_step_that_the_device_does_not_finish_ends_the_job(busy):
    """A copy between GPUs knows no timeout: where the main thread stands at one line for the whole
    of it and the device has work, the rank prints its stack and ends; a long compilation does not.
    """
    _, codes, outputs = run_ranks(2, _waits_for_its_device, busy, check=False)
    assert (codes != [0, 0]) == busy
    ended = [text for text in outputs if "its GPU has not finished a step within" in text]
    assert bool(ended) == busy and all("in _waits_for_its_device" in text for text in ended)


def _waits_in_its_group():
    """Of 2 x 2 ranks rank 1 does not come: to rank 0 in its tp group, to rank 3 in its dp group."""
    grid, _ = start_processes(TrainConfig(tensor_parallel_size=2, collective_timeout=0.5))
    rank, begin = grid.world.rank, time.monotonic()
    if rank in (0, 3):
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.zeros(1), group=(grid.dp if rank else grid.tp).group)
        return time.monotonic() - begin
    time.sleep(2.5)
    return 0.5


def test_the_timeout_is_that_of_every_group():
    """--collective-timeout 0.5 ends what waits in a tp or dp group, well before the peer leaves."""
    waited = run_ranks(4, _waits_in_its_group)[0]
    assert all(0.4 < seconds < 2 for seconds in waited)


def _waits_for_rank_0():
    grid, _ = start_processes(TrainConfig(collective_timeout=0.5))
    return on_rank_0(grid, lambda: time.sleep(2) or os.environ["RANK"])


def test_what_rank_0_does_alone_may_take_longer_than_the_timeout():
    """Reading the headers of tars for minutes is no collective: the others get its result."""
    assert run_ranks(2, _waits_for_rank_0)[0] == ["0", "0"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=25, help="of each way and number of ranks")
    parser.add_argument("--worlds", default="1,2,4", help="numbers of ranks")
    parser.add_argument("--ways", default=",".join(way.__name__ for way in WAYS))
    parser.add_argument("--seed", default="0")
    args = parser.parse_args()
    print("| way | processes | trials | recovered | steps made anew, mean and most |\n"
          "|---|---|---|---|---|", flush=True)
    Undisturbed(1)  # starts the server that ranks are forked from
    for world in map(int, args.worlds.split(",")):
        whole = Undisturbed(world)
        for way in (way for way in WAYS if way.__name__ in args.ways.split(",")):
            results = [trial(way, world, whole, f"{args.seed} {i}") for i in range(args.trials)]
            anew = [steps for steps, _ in results]
            wrong = [text for _, text in results if text]
            print(f"| {way.__name__} | {world} | {len(results)} | {len(results) - len(wrong)} | "
                  f"{sum(anew) / len(anew):.1f}, {max(anew)} |", flush=True)
            for text in wrong:
                print("   ", text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
