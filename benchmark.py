"""The time of training steps, the rate of the loader, and where a step's time goes.

    python benchmark.py --model L16 --steps 50
    python benchmark.py --model B16 --micro-batch-size 744 --augmentation crop-flip --data DIR
    torchrun --standalone --nproc_per_node 8 benchmark.py --model g14 --profile FOLDER

Steps are train.train_step's, on random images: uint8 in pinned host memory, which go through the
jitter of --augmentation and are mixed; every step ends with the optimizer and its communication.
Prints one row; --data adds the rate of the loader alone and of the steps that it feeds, --profile a
trace for chrome://tracing or Perfetto and where the time of a step goes.
"""

import dataclasses
import itertools
import math
import os
import time
from pathlib import Path

import torch
from torch.utils.data import default_collate

import data
import device_views
from augment import draws
from checkpoint import check_writable
from configs import BenchmarkConfig
from memory import memory_plan
from meter import mark, seconds_between
from plan import check_layout, largest_micro_batch, plan_batch
from recipes import parse_run
from runtime import (
    Run,
    build_model,
    build_optimizer,
    device_name,
    end_processes,
    memory_gib,
    on_rank_0,
    run_program,
    start_processes,
    user_errors,
)
from splits import open_data
from train import learning_rate, train_step

WARM_UP = 5  # steps before any is timed: they compile, and fill caches and the allocator


class Timer:
    """Times steps of a model: seconds(batches, n) -> the seconds of each of n steps."""

    def __init__(self, run: Run, model, optimizer):
        self.run, self.model, self.optimizer = run, model.train(), optimizer

    def seconds(self, batches, steps: int) -> list[float]:
        config, marks = self.run.config, [mark(self.run.device)]
        for step in range(steps):
            lr = learning_rate(step, config, config.warmup_steps + steps)
            train_step(self.run, self.model, self.optimizer, batches, lr)
            marks.append(mark(self.run.device))
        return [seconds_between(a, b) for a, b in itertools.pairwise(marks)]


def random_batches(run: Run):
    """Two random micro-batches in turn, as the loader would give them."""
    shape, pin = (2, run.local_batch), run.device.type == "cuda"
    host = {"images": torch.randint(0, 256, (*shape, 3, *run.vit.image_hw), dtype=torch.uint8),
            "labels": torch.randint(0, run.vit.num_classes, shape)}
    rows = default_collate([draws(run.config, run.vit.image_hw) for _ in range(math.prod(shape))])
    host |= {name: row.view(*shape, -1) for name, row in rows.items()}
    host = {name: x.pin_memory() if pin else x for name, x in host.items()}
    batches = [{name: x[i] for name, x in host.items()} for i in range(2)]
    return itertools.cycle((batch.pop("images"), batch.pop("labels"), batch) for batch in batches)


def print_row(run: Run, times: list[float], micro: int, kernels: str, optimizer) -> float:
    """Prints what was measured; returns images per second, of the median step."""
    config, vit, grid = run.config, run.vit, run.grid
    times = sorted(times)
    median = times[len(times) // 2]
    rate, dp = config.global_batch_size / median, grid.world.size // grid.tp.size
    flops = rate * config.passes * vit.flops_per_image(training=True) / grid.world.size
    peak = run.peak
    planned = sum(memory_plan(vit, config, grid.tp.size, dp, micro).values()) / 2**30
    run.log.print(f"torch {torch.__version__}, {grid.world.size} x {device_name(run.device)}, "
                  f"dropout {vit.hidden_dropout}, checkpointing "
                  f"{config.activation_checkpointing}, {kernels}")
    row = {"model": config.model, "tp x dp": f"{grid.tp.size} x {dp}", "micro-batch": micro,
           "accumulation": run.accumulation, "precision": config.precision,
           "ms (min-max)": f"{1e3 * median:.1f} ({1e3 * times[0]:.1f}-{1e3 * times[-1]:.1f})",
           "images/s per GPU": f"{rate / grid.world.size:,.1f}", "in all": f"{rate:,.1f}",
           "TFLOP/s": f"{flops / 1e12:.3g}",
           "MFU": f"{100 * flops / peak:.1f} %" if peak else "-",
           "GiB (planned)": f"{memory_gib(optimizer):.3g} ({planned:.3g})"}
    width = [max(len(name), len(str(value))) for name, value in row.items()]
    for cells in (row, row.values()):
        run.log.print("  ".join(f"{cell:>{w}}" for cell, w in zip(cells, width, strict=True)))
    return rate


def loader_rate(run: Run, timer: Timer, source, rate: float) -> None:
    """--data: the loader's own rate, and that of the steps with it beside `rate`."""
    config, grid = run.config, run.grid
    rounds = max(config.num_workers, 1)  # batches come in bursts, one from each worker
    alone = math.ceil(10 / rounds) * rounds
    micro_batches = 2 * rounds + alone + (WARM_UP + config.steps) * run.accumulation
    steps = math.ceil(micro_batches / run.accumulation)

    def batches():
        loader = data.train_loader(source, config, run.vit.image_hw, run.local_batch,
                                   grid.world.rank, grid.world.size, 0, steps, run.device)
        return ((images, labels, draws) for images, labels, _, draws in loader)

    stream = batches()
    for _ in range(2 * rounds):
        next(stream)
    start = time.perf_counter()
    for _ in range(alone):
        next(stream)
    loader = alone * run.local_batch * grid.world.size / (time.perf_counter() - start)
    stream = batches()
    timer.seconds(stream, WARM_UP)
    together = config.steps * config.global_batch_size / sum(timer.seconds(stream, config.steps))
    _, decode = device_views.choose(config, source, run.device, run.local_batch,
                                    config.augmentation)
    run.log.print(f"{config.data} with {config.num_workers} workers a process, augmentation "
                  f"{config.augmentation}, {decode}: loader alone {loader:,.1f} images/s, steps "
                  f"with it {together:,.1f} ({100 * together / rate:.1f} % of those without)")


CATEGORIES = {  # by the names of kernels, first match; the rest is elementwise
    "communication": ("nccl", "c10d", "gloo", "barrier_kernel", "signal_kernel", "memcpy ptop"),
    "attention": ("fmha", "flash", "attention", "_short_backward", "dot_do_o", "convert_dq"),
    "matrix products": ("gemm", "nvjet", "cutlass", "splitk", "aten::mm", "aten::addmm",
                        "_gelu_backward"),
    "optimizer": ("multi_tensor_apply", "fused_adam", "fused_sgd", "_foreach"),
    "copies": ("memcpy", "memset", "copy_"),
}


def profile(run: Run, timer: Timer, batches, steps: int = 3) -> None:
    """--profile: a trace of each rank, and where the time of a step goes."""
    cuda, folder = run.device.type == "cuda", Path(run.config.profile)
    with torch.profiler.profile() as profiler:
        seconds = sum(timer.seconds(batches, steps))
    profiler.export_chrome_trace(str(folder / f"rank_{run.grid.world.rank:05d}.json.gz"))
    spans, at = [], 0.0  # (begin, end, category) in microseconds
    for event in profiler.events():
        name = event.name.lower()
        kind = next((kind for kind, keys in CATEGORIES.items() if any(key in name for key in keys)
                     and not name.startswith("triton_")), "elementwise, norms")
        if not cuda:  # operators nest: their own times, end to end
            spans.append((at, at := at + event.self_cpu_time_total, kind))
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end, kind))
    busy = covered(spans)
    exposed = busy - covered([span for span in spans if span[2] != "communication"])
    run.log.print(f"of {1e3 * seconds / steps:.1f} ms a step, profiled (traces in {folder}):")
    times = {kind: sum(end - begin for begin, end, k in spans if k == kind)
             for kind in (*CATEGORIES, "elementwise, norms")}
    # Times of several threads (CPU) or streams can add up to more than the step.
    for kind, time_us in {**times, "idle": max(1e6 * seconds - busy, 0)}.items():
        note = (f"  ({exposed / steps / 1e3:.1f} not hidden)"
                if kind == "communication" and time_us else "")
        run.log.print(f"  {kind:20s} {time_us / steps / 1e3:8.1f} ms "
                      f"{time_us / seconds / 1e4:5.1f} %{note}")


def covered(spans) -> float:
    """The length of the union of spans (begin, end, ...)."""
    total, last = 0.0, -math.inf
    for begin, end, *_ in sorted(spans):
        total += max(0.0, end - max(begin, last))
        last = max(last, end)
    return total


def main(argv: list[str] | None = None) -> None:
    with user_errors("benchmark.py"):
        config, vit, given = parse_run(BenchmarkConfig, argv)
        world, tp = int(os.environ.get("WORLD_SIZE", 1)), config.tensor_parallel_size
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        if "global_batch_size" not in given:  # one micro-batch on every replica
            check_layout(config, vit, world, device_type)
            micro = config.micro_batch_size or largest_micro_batch(config.model, tp,
                                                                   device_type == "cuda")
            config = dataclasses.replace(config, global_batch_size=micro * (world // tp))
        micro, _, accumulation = plan_batch(config, vit, world, device_type)
        grid, device = start_processes(config)
        if config.profile:
            on_rank_0(grid, lambda: check_writable(Path(config.profile)))
        if config.data:
            source, _ = on_rank_0(grid, lambda: open_data(config.data, vit.image_hw))
            vit = dataclasses.replace(vit, num_classes=len(source.classes))
            device_views.choose(config, source, device, micro // tp)
        run = Run(config, vit, grid, device, micro_batch=micro, accumulation=accumulation)
        model, kernels = build_model(run, config.seed)
        optimizer, exchange = build_optimizer(run, model)
    timer, batches = Timer(run, model, optimizer), random_batches(run)
    timer.seconds(batches, WARM_UP)
    rate = print_row(run, timer.seconds(batches, config.steps), micro, kernels + exchange,
                     optimizer)
    if config.profile:
        profile(run, timer, batches)
    if config.data:
        loader_rate(run, timer, source, rate)
    end_processes()


if __name__ == "__main__":
    run_program(main)
