"""What a run tells: printed lines, the bar, metrics.jsonl, TensorBoard, W&B, and the meter.

The meter reads the result of a step one step late, so that the host never stops the device.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections import deque
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import Unreadable, unreadable_in
from parallel import Grid, all_gather_object

SLOW = 1.5         # a rank is named from this ratio to the others' time on
MAX_BAD_STEPS = 3  # steps in a row with a non-finite gradient before the run stops


def counted(n: int, noun: str) -> str:
    """'1 image', '1,000 images'."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


class Log:
    """Rank 0's output: tqdm, printed lines, metrics.jsonl and, if asked for, TensorBoard, W&B."""

    def __init__(self, grid: Grid):
        self.main, self.bar, self.file, self.board = grid.world.rank == 0, None, None, None
        self.wandb = None

    def join_wandb(self, output: Path, settings: dict) -> None:
        """A run of Weights & Biases, or the one whose id is in OUTPUT/wandb_id, which has the lines
        of steps not saved already and ignores them when they come again. Raises ValueError."""
        if not self.main:
            return
        file = output / "wandb_id"
        try:
            import wandb
            self.wandb = wandb.init(id=file.read_text() if file.exists() else None, resume="allow",
                                    dir=output, config=settings)
        except Exception as e:
            raise ValueError(f"--wandb needs `pip install wandb`, and `wandb login` or "
                             f"WANDB_MODE=offline: {e}") from e
        file.write_text(self.wandb.id)

    def open(self, output: Path, start_step: int, total_steps: int, tensorboard: bool,
             scored: bool = True) -> None:
        """Continues metrics.jsonl after start_step: later lines, of steps not saved, go; unless
        `scored`, its evaluation's too, which will be made again. A line {step, resumed} says where
        a run was taken up again."""
        if not self.main:
            return
        path, kept = output / "metrics.jsonl", []
        if path.exists():
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError):  # a line cut by a crash
                    values = json.loads(line)
                    again = "resumed" in values or "val_loss" in values and not scored
                    if values["step"] <= start_step - again:
                        kept.append(line + "\n")
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
        self.file = open(path, "a", buffering=1)
        if 0 < start_step < total_steps:
            self.file.write(json.dumps({"step": start_step, "resumed": True}) + "\n")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(output / "tensorboard", purge_step=start_step + 1)
        self.bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True,
                        smoothing=0.1)

    def print(self, text: str) -> None:
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def metrics(self, values: dict) -> None:
        if self.main:
            finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                      for key, value in values.items()}  # NaN is no JSON
            self.file.write(json.dumps(finite, allow_nan=False) + "\n")
            for key, value in values.items() if self.board else ():
                if key != "step" and value is not None:
                    self.board.add_scalar(key, value, values["step"])
            if self.wandb:
                self.wandb.log({k: v for k, v in values.items() if v is not None},
                               step=values["step"])

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update(1)

    def progress(self, loader):
        """The loader, with a bar that leaves no trace."""
        return tqdm(loader, unit="batch", leave=False, dynamic_ncols=True, disable=not self.main)

    def close(self) -> None:
        for output in (self.bar, self.file, self.board):
            if output is not None:
                output.close()
        if self.wandb:
            self.wandb.finish()
        self.bar = None


def mark(device: torch.device):
    """A point in time of the device's work, for seconds_between."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin, end) -> float:
    """Between two marks; waits for the second."""
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000


class Meter:
    """Reads the steps of a run: loss and accuracy, rates, waiting, bad steps, unreadable images.

    watch() hands on the loader's batches and sees what they cost; put() takes a step's result.
    A rate is of the steps in it, by the device's clock, from the end of the step before (or of an
    evaluation or save) to their own. `error` says why the run must stop, the same on all ranks;
    `diverged`: for its gradients, so that what it has come to is not worth saving.
    """

    def __init__(self, run, train_set, memory, mark=mark, counts: dict | None = None):
        """memory: a function, the peak in GiB; mark: the device's clock, as above; counts: those of
        the run until a restart."""
        self.mark = partial(mark, run.device)
        self.run, self.memory, self.error, self.diverged = run, memory, None, False
        self.unreadable = Unreadable(train_set, run.config.max_unreadable)
        counts = counts or {}
        self.unreadable.add(set(counts.get("unreadable", ())))
        self.bad_steps = counts.get("bad_steps", 0)
        self.pending, self.bad_images, self.waited = deque(), set(), 0.0
        self.steps, self.seconds, self.wait, self.own = 0, 0.0, 0.0, 0.0  # of the interval
        self.each = self.work = None  # seconds per step of each rank by itself, being summed up
        self.warm, self.all_steps, self.all_seconds = False, 0, 0.0
        self.last = self.mark()

    def counts(self) -> dict:
        """What is counted over restarts: unreadable images, bad steps in a row."""
        return dict(unreadable=sorted(self.unreadable.indices), bad_steps=self.bad_steps)

    def watch(self, loader):
        """Yields (images, labels, draws) of a training loader."""
        batches = iter(loader)
        while True:
            begin = time.perf_counter()
            images, labels, indices, draws = next(batches)
            self.waited += time.perf_counter() - begin
            self.bad_images |= unreadable_in(labels, indices)
            yield images, labels, draws

    def put(self, step: int, values: torch.Tensor, lr: float) -> None:
        """values: [loss sum, correct, images, gradient norm] of a step, summed over all ranks."""
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
        begin, self.last = self.last, self.mark()
        self.pending.append((step, values, lr, begin, self.run.backward_end, self.last,
                             self.waited))
        self.waited = 0.0
        self.read(lag=1)

    @contextlib.contextmanager
    def paused(self):
        """For an evaluation or a save: what came before is read, and the time is not counted."""
        self.read(lag=0)
        yield
        self.last = self.mark()

    def read(self, lag: int) -> None:
        """Reports the steps that are at least `lag` puts old."""
        while len(self.pending) > lag:
            step, values, lr, begin, computed, end, waited = self.pending.popleft()
            seconds = seconds_between(begin, end)
            self.own += seconds_between(begin, computed) if computed else 0.0
            self.steps, self.seconds = self.steps + 1, self.seconds + seconds
            # The host waits for images ahead of the device, which may still be busy meanwhile.
            self.wait += min(waited, seconds)
            self.report(step, lr, *values.tolist())

    def report(self, step, lr, loss_sum, correct, count, norm) -> None:
        run, loss = self.run, loss_sum / max(count, 1)
        if count < run.config.global_batch_size:
            self.name_unreadable()
        self.bad_steps = 0 if math.isfinite(norm) else self.bad_steps + 1
        if self.bad_steps:
            run.log.print(f"step {step}: gradient norm {norm}, loss {loss:.4f}; step skipped, no "
                          f"weight changed ({self.bad_steps} in a row)")
        if self.bad_steps == MAX_BAD_STEPS:
            self.diverged = True
            self.error = (f"non-finite gradients in {self.bad_steps} steps in a row, the last one "
                          f"{step}; lower --lr or use --precision fp32")
        run.log.advance()
        if step % run.config.log_interval == 0 or step == run.total_steps:
            self.write(step, lr, loss, correct / max(count, 1), norm)

    def name_unreadable(self) -> None:
        """Collective: each rank has seen its own images."""
        found = set().union(*all_gather_object(self.bad_images, self.run.grid.world))
        for name in self.unreadable.add(found):
            self.run.log.print(f"unreadable image, skipped: {name}")
        self.bad_images, self.error = set(), self.error or self.unreadable.error()

    def write(self, step: int, lr: float, loss: float, accuracy: float, norm: float) -> None:
        """The log line of the interval that ends with `step`."""
        run, config = self.run, self.run.config
        rate = self.steps * config.global_batch_size / self.seconds
        flops = rate * config.passes * run.vit.flops_per_image(training=True) / run.grid.world.size
        mfu = flops / run.peak if run.peak else None
        values = dict(
            step=step, epoch=round(run.images_seen(step) / len(self.unreadable.source), 4),
            loss=loss, accuracy=accuracy, lr=lr, grad_norm=norm, images_per_second=rate, mfu=mfu,
            memory_gib=self.memory(), data_wait=self.wait / self.seconds, **self.slowest())
        late = values.get("slowest_ratio", 0)
        run.log.metrics(values)
        run.log.print(f"step {step:>6} | loss {loss:.4f} | acc {accuracy:.3f} | lr "
                      f"{lr:.2e} | norm {norm:.3f} | {rate:,.0f} img/s"
                      + (f" | mfu {100 * mfu:.1f} %" if mfu else "")
                      + f" | {values['memory_gib']:.1f} GiB"
                      + f" | data wait {100 * values['data_wait']:.0f} %"
                      + (f" | rank {values['slowest_rank']} takes {late:.1f} x the others' time"
                         if late > SLOW else ""))
        if self.warm:  # the first interval compiles and fills caches
            self.all_steps += self.steps
            self.all_seconds += self.seconds
        self.warm, self.steps, self.seconds, self.wait, self.own = True, 0, 0.0, 0.0, 0.0

    def slowest(self) -> dict:
        """The slowest rank and its time by itself over the others' mean, of the interval before:
        the times are sent with one line of the log and read with the next, so nobody waits."""
        world, found = self.run.grid.world, {}
        if self.work is not None:
            self.work.wait()
            longest, rank = self.each.max(0)
            others = (self.each.sum() - longest) / (world.size - 1)
            found = dict(slowest_rank=int(rank), slowest_ratio=float(longest / others))
        if world.size > 1:
            self.each = torch.zeros(world.size)
            self.each[world.rank] = self.own / self.steps
            self.work = dist.all_reduce(self.each, async_op=True)
        return found

    def rate(self) -> float:
        """Images per second of all intervals but the first; 0 if there is no other."""
        images = self.all_steps * self.run.config.global_batch_size
        return images / self.all_seconds if self.all_steps else 0.0
