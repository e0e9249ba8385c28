"""Train a Vision Transformer. One step is train_step, the loop is train, main sets them up.

    python train.py                                                 # built-in images, CPU, minutes
    python train.py --data DIR --model S16                          # a folder: train/CLASS/*, val/*
    torchrun --standalone --nproc_per_node 8 train.py --data DIR --model L16
    torchrun --standalone --nproc_per_node 8 train.py --data DIR --model G14 \\
        --tensor-parallel-size 2 --activation-checkpointing full --checkpoint-method block
    torchrun --standalone --nproc_per_node 8 train.py --data DIR --model B16 --recipe finetune \\
        --init-from WEIGHTS                                         # fine-tune
    WORLD_SIZE=8 python train.py --data DIR --model g14 --dry-run   # sizes, memory, schedule

One step: global batch = micro-batch x dp x accumulation. Every rank runs forward and backward on
its own images, gradients add up in fp32, parallel.ShardedOptimizer reduces them, clips, updates.
"""

import dataclasses
import importlib
import math
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
from checkpoint import (
    check_room,
    check_same_model,
    find_resume,
    load_checkpoint,
    read_meta,
    save_checkpoint,
)
from configs import TrainConfig, ViTConfig, parse, stable_seed, to_plain
from evaluate import score
from meter import Meter
from parallel import Grid, on_rank_0
from plan import checkpoint_bytes, dry_run, plan_batch
from runtime import (
    Run,
    build_model,
    build_optimizer,
    device_name,
    end_processes,
    memory_gib,
    run_program,
    start_processes,
    user_errors,
)


# ----------------------------------------------------------------------------- one step
def learning_rate(step: int, config: TrainConfig, total_steps: int) -> float:
    """The rate of step `step` (from 0): a pure function, so a resumed run cannot drift."""
    # 1) linear warm-up from lr / warmup to lr
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    # 2) lr, if --decay-steps leaves a time for it
    decay = config.decay_steps or total_steps
    begin = max(total_steps - decay, config.warmup_steps)
    # 3) cosine from lr down to min_lr, which the last step reaches
    share = max(step - begin, 0) / max(total_steps - 1 - begin, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(share, 1)))
    return config.min_lr + (config.lr - config.min_lr) * cosine


def train_step(run: Run, model, optimizer, batches, lr: float) -> torch.Tensor:
    """One optimizer step on the next micro-batches. Returns [loss sum, correct, images, gradient
    norm] over all ranks, on the device."""
    sums = torch.zeros(3, device=run.device)
    for i in range(run.accumulation):
        images, labels = run.prepare(*next(batches))
        with run.autocast():
            logits = model(images).float()
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=data.IGNORE)
        # Divided here, so that plain sums over micro-batches and ranks give the mean's gradient.
        optimizer.backward(loss / run.config.global_batch_size, last=i == run.accumulation - 1)
        correct, count = logits.detach().argmax(1) == labels, labels != data.IGNORE
        sums += torch.stack([loss.detach(), correct.sum(), count.sum()])
    norm = optimizer.step(lr)
    if run.grid.world.size > 1:
        dist.all_reduce(sums)
    return torch.cat([sums, norm[None]])


# ----------------------------------------------------------------------------- the loop
def train(run: Run, model, optimizer, train_set, val_set) -> None:
    """Trains from run.start_step to run.total_steps, or to a signal; logs, evaluates, saves."""
    config, step, saved, result = run.config, run.start_step, None, None
    run.log.open(Path(config.output_dir), step, run.total_steps, config.tensorboard)
    meter = Meter(run, train_set, partial(memory_gib, optimizer))
    batches = meter.watch(data.train_loader(
        train_set, config, run.vit.image_hw, run.local_batch, run.grid.world.rank,
        run.grid.world.size, run.start_image, run.total_steps - step, run.device))
    val_loader = data.eval_loader(
        val_set, config, run.vit.image_hw, run.local_batch, run.grid.world.rank,
        run.grid.world.size, run.device)
    model.train()
    while step < run.total_steps and not run.stop.poll() and not meter.error:
        # Dropout of a step depends on (seed, step, rank) only: nothing to save for a resume.
        torch.manual_seed(stable_seed(config.seed, "dropout", step, run.grid.world.rank))
        lr = learning_rate(step, config, run.total_steps)
        values = train_step(run, model, optimizer, batches, lr)
        step += 1
        meter.put(step, values, lr)
        if due(config.eval_interval, step, run):
            with meter.paused(), optimizer.averaged():
                result = score(run, model, val_loader, val_set, step)
        if due(config.save_interval, step, run):
            with meter.paused():
                saved = save(run, optimizer, train_set, step)
    with meter.paused():  # the meter is one step behind: this reads the last one
        stopped = run.stop.agreed or meter.error is not None
        if stopped and saved != step_directory(run, step):
            saved = save(run, optimizer, train_set, step)
        if not stopped and result is None:  # resumed after the last step
            with optimizer.averaged():
                result = score(run, model, val_loader, val_set, step)
    finish(run, meter, step, saved, result)


def due(interval: int, step: int, run: Run) -> bool:
    """Whether something is to be done after `step`: at each interval, and at the end."""
    return step == run.total_steps or bool(interval) and step % interval == 0


def step_directory(run: Run, step: int) -> Path:
    return Path(run.config.output_dir) / "checkpoints" / f"step_{step:08d}"


def save(run: Run, optimizer, train_set, step: int) -> Path:
    meta = dict(images_seen=run.images_seen(step), total_steps=run.total_steps,
                classes=train_set.classes, vit=to_plain(run.vit), config=to_plain(run.config),
                torch=torch.__version__,
                machine=f"{run.grid.world.size} x {device_name(run.device)}")
    return save_checkpoint(step_directory(run, step).parent, step, optimizer, meta,
                           run.config.keep_last)


def finish(run: Run, meter: Meter, step: int, saved: Path | None, result: dict | None) -> None:
    """The last line. Raises RuntimeError if the meter ended the run."""
    run.log.close()
    if meter.error:
        raise RuntimeError(f"{meter.error}. Saved {saved}")
    if run.stop.agreed:
        run.log.print(f"stopped by {run.stop.name or 'a signal'} at step {step:,}; saved {saved}; "
                      f"the same command continues")
    elif result is not None:
        rate = f", {meter.rate():,.0f} images/s" if meter.rate() else ""
        saved = saved or step_directory(run, step)
        run.log.print(f"done: top-1 {100 * result['val_top1']:.2f} % on {result['val_count']:,} "
                      f"images{rate}, checkpoint {saved}")


# ----------------------------------------------------------------------------- set-up
def main(argv: list[str] | None = None, sources: tuple | None = None) -> None:
    """sources: (training, validation) images in place of those of --data."""
    with user_errors("train.py"):  # what a user can get wrong is found here, before any step
        config, vit, given = parse(TrainConfig, argv)
        world = int(os.environ.get("WORLD_SIZE", 1))
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        plan_batch(config, vit, world, device_type)
        # A dry run describes WORLD_SIZE processes but needs only this one.
        grid, device = ((Grid(), torch.device(device_type)) if config.dry_run
                        else start_processes(config))
        train_set, val_set, vit = open_images(config, vit, given, grid, sources)
        total_steps = config.max_steps or max(
            int(config.epochs * len(train_set)) // config.global_batch_size, 1)
        if config.decay_steps and config.decay_steps > total_steps - config.warmup_steps:
            raise ValueError(f"--decay-steps {config.decay_steps} must not exceed the "
                             f"{total_steps - config.warmup_steps} steps after warm-up")
        config, vit, start = choose_start(config, vit, given, grid)
        batch = plan_batch(config, vit, world, device_type)  # weights may bring class tokens along
        if config.dry_run:
            if int(os.environ.get("RANK", 0)) == 0:
                dry_run(config, vit, train_set, val_set, total_steps, batch, device_type,
                        partial(learning_rate, config=config, total_steps=total_steps))
            return
        check_start(config, vit, grid, start, train_set.classes)
        run = Run(config, vit, grid, device, micro_batch=batch[0], accumulation=batch[2])
        run.total_steps = total_steps
        if config.wandb:
            run.log.join_wandb(Path(config.output_dir), {**to_plain(vit), **to_plain(config)})
        model, optimizer, kernels = build(run, start)
    describe(run, batch, optimizer, train_set, val_set, kernels, start)
    train(run, model, optimizer, train_set, val_set)
    end_processes()
    if config.report and grid.world.rank == 0 and not run.stop.agreed:
        import report
        report.main([config.output_dir])


def open_images(config: TrainConfig, vit: ViTConfig, given: dict, grid: Grid, sources=None):
    """(training images, validation images, the model with their classes)."""
    train_set, val_set = sources or on_rank_0(
        grid, lambda: data.open_data(config.data, vit.image_hw, config.val_labels))
    count = len(train_set.classes)
    if given.get("num_classes", count) != count:
        raise ValueError(f"--num-classes {vit.num_classes}, but --data {config.data} has {count} "
                         f"classes; leave the flag out")
    if len(train_set) < config.global_batch_size:
        raise ValueError(f"--data {config.data} has {len(train_set)} training images, fewer "
                         f"than one --global-batch-size {config.global_batch_size}")
    return train_set, val_set, dataclasses.replace(vit, num_classes=count)


@dataclass
class Start:
    """What a run begins from: a checkpoint to resume, or full weights by name, or neither."""
    resume: Path | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    news: list[str] = field(default_factory=list)  # lines for the log


def choose_start(config: TrainConfig, vit: ViTConfig, given: dict, grid: Grid):
    """(config, vit, Start), the configurations with what weights bring along."""
    resume, news = None, []
    if not config.dry_run:
        resume, news = on_rank_0(grid, lambda: find_resume(config.output_dir, config.resume))
    if config.init_from is None:
        if config.recipe == "finetune" and resume is None and not config.dry_run:
            raise ValueError("--recipe finetune needs --init-from WEIGHTS: a checkpoint or output "
                             "directory of this program, or a file of another library")
        return config, vit, Start(resume, news=news)
    import weights
    if resume:  # the checkpoint has these facts too, and the file may be gone
        config, vit, _ = weights.adopt(weights.read_weights(resume), config, vit, given)
        news += [f"--init-from {config.init_from} is not read again: the checkpoint goes on"]
        return config, vit, Start(resume, news=news)
    source = weights.read_weights(config.init_from, config.init_image_size, config.weights)
    config, vit, taken = weights.adopt(source, config, vit, given)
    fitted, report = weights.fit_weights(source, vit)
    news += [f"weights of {config.init_from} ({source.format}): {'; '.join(report)}",
             "with them: " + ", ".join(f"{k} {v}" for k, v in taken.items())]
    return config, vit, Start(weights=fitted, news=news)


def check_start(config: TrainConfig, vit: ViTConfig, grid: Grid, start: Start,
                classes: list[str]) -> None:
    """Raises ValueError for an output directory or a checkpoint that this run cannot use."""
    output = Path(config.output_dir)
    on_rank_0(grid, lambda: check_room(output, checkpoint_bytes(vit, config)))
    if not (output / "checkpoints").is_dir():
        raise ValueError(f"--output-dir {output} is not shared by all nodes: rank "
                         f"{grid.world.rank} does not see what rank 0 created")
    if config.tensorboard:
        try:
            importlib.import_module("torch.utils.tensorboard")
        except Exception as e:
            raise ValueError(f"--tensorboard needs `pip install tensorboard`: {e}") from e
    if start.resume:
        check_same_model(start.resume, to_plain(vit), classes, config.data)
        frozen = read_meta(start.resume)["config"].get("freeze", "none")
        if frozen != config.freeze:
            raise ValueError(f"{start.resume} is of a run with --freeze {frozen} (this run: "
                             f"{config.freeze}); start from it with --init-from in another "
                             "--output-dir")


def build(run: Run, start: Start):
    """(model, optimizer, what the log says of their kernels); sets where the run begins."""
    seed = run.config.seed if start.resume is None else None  # None: nothing is drawn
    model, kernels = build_model(run, seed, loaded=start.weights)
    if start.weights:
        import weights
        weights.load_weights(model, start.weights)
        start.weights = {}  # gives the memory back
    optimizer, exchange = build_optimizer(run, model)
    if start.resume:
        meta = load_checkpoint(start.resume, optimizer)
        run.start_step, run.start_image = meta["step"], meta["images_seen"]
    return model, optimizer, kernels + exchange


def describe(run: Run, batch: tuple, optimizer, train_set, val_set, kernels: str,
             start: Start) -> None:
    """What will run, before it does."""
    config, vit, grid, log = run.config, run.vit, run.grid, run.log
    decay, no_decay = optimizer.decay_names()
    micro, dp, accumulation = batch
    log.print(f"model {config.model}: {vit.num_params / 1e6:,.2f} M parameters, {vit.seq_length} "
              f"tokens, {vit.num_classes} classes")
    log.print(f"batch {config.global_batch_size} = micro-batch {micro} x dp {dp} x accumulation "
              f"{accumulation}; tp {grid.tp.size}, {grid.world.size} x {device_name(run.device)}")
    log.print(f"data {config.data}: {len(train_set):,} training and {len(val_set):,} validation "
              f"images; {run.total_steps:,} steps = "
              f"{run.total_steps * config.global_batch_size / len(train_set):,.1f} epochs")
    log.print(f"precision {config.precision}, {kernels}")
    log.print(f"weight decay {config.weight_decay} on {len(decay)} matrices, none on "
              f"{len(no_decay)} biases, norms, tokens and positions")
    if config.freeze == "backbone":
        log.print(f"frozen: all but {', '.join([*decay, *no_decay])}")
    if config.ema_decay:
        log.print(f"average of the weights with decay {config.ema_decay}: validation scores it, "
                  "not the model's own")
    if config.warmup_steps >= run.total_steps:
        log.print(f"note: --warmup-steps {config.warmup_steps:,} is no shorter than the run; the "
                  f"peak --lr {config.lr} is not reached")
    log.print(f"resuming from {start.resume}: step {run.start_step:,}, image {run.start_image:,}"
              if start.resume else "starting fresh: no checkpoint to resume from")
    for line in start.news:
        log.print(line)


if __name__ == "__main__":
    run_program(main)
