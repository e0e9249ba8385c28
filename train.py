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
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import data
import device_views
import resume
from archives import Index
from augment import loss_sum, soft_targets
from checkpoint import load_newest
from configs import TrainConfig, ViTConfig, stable_seed
from evaluate import score
from flags import to_plain
from memory import checkpoint_bytes
from meter import Meter, counted
from parallel import Grid
from plan import dry_run, plan_batch, run_length
from recipes import FINE_TUNING, RECIPES, parse_run
from resume import Start
from runtime import (
    Run,
    build_model,
    build_optimizer,
    device_name,
    end_processes,
    host_memory_room,
    memory_gib,
    on_rank_0,
    run_program,
    start_processes,
    user_errors,
)
from saver import Saver
from splits import open_data, take_fractions


# ----------------------------------------------------------------------------- one step
def learning_rate(step: float, config: TrainConfig, total_steps: float) -> float:
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
    norm] over all ranks, on the device; correct is the class with the larger share of a mix."""
    config, sums = run.config, torch.zeros(3, device=run.device)
    for i in range(run.accumulation):
        images, labels, mix = run.prepare(*next(batches))
        with run.autocast():
            logits = model(images).float()
        targets = soft_targets(labels, mix, logits.shape[1], config.label_smoothing)
        loss = loss_sum(logits, targets, config.loss)
        # Divided here, so that plain sums over micro-batches and ranks give the mean's gradient.
        optimizer.backward(loss / config.global_batch_size, last=i == run.accumulation - 1)
        readable = labels != data.IGNORE
        correct = readable & (logits.detach().argmax(1) == targets.argmax(1))
        sums += torch.stack([loss.detach(), correct.sum(), readable.sum()])
    norm = optimizer.step(lr)
    if run.grid.world.size > 1:
        dist.all_reduce(sums)
    return torch.cat([sums, norm[None]])


# ----------------------------------------------------------------------------- the loop
def train(run: Run, model, optimizer, saver: Saver, start: Start, train_set, val_set) -> None:
    """Trains from run.start_step to run.total_steps, or to a signal; logs, evaluates, saves."""
    config, step, result = run.config, run.start_step, start.meta.get("result")
    run.log.open(Path(config.output_dir), step, run.total_steps, config.tensorboard,
                 scored=result is not None)
    meter = Meter(run, train_set, partial(memory_gib, optimizer), counts=start.meta.get("counts"))
    batches = meter.watch(data.train_loader(
        train_set, config, run.vit.image_hw, run.local_batch, run.grid.world.rank,
        run.grid.world.size, run.start_image, run.total_steps - step, run.device))
    val_loader = data.eval_loader(
        val_set, config, run.vit.image_hw, run.local_batch, run.grid.world.rank,
        run.grid.world.size, run.device)
    model.train()
    if step and result is None and due(config.eval_interval, step, run):  # a signal cut it off
        with meter.paused(), optimizer.averaged():
            result = saver.scored(score(run, model, val_loader, val_set, step))
    while step < run.total_steps and not run.stop.poll(saver.written) and not meter.error:
        saver.publish(run.stop.written)
        # Dropout of a step depends on (seed, step, rank) only: nothing to save for a resume.
        torch.manual_seed(stable_seed(config.seed, "dropout", step, run.grid.world.rank))
        lr = learning_rate(step + run.shift, config, run.total_steps + run.shift)
        values = train_step(run, model, optimizer, batches, lr)
        step, result = step + 1, None
        meter.put(step, values, lr)
        evaluates = due(config.eval_interval, step, run)
        if evaluates:
            with meter.paused(), optimizer.averaged():
                result = score(run, model, val_loader, val_set, step)
        if due(config.save_interval, step, run) or evaluates and config.keep_best:
            with meter.paused():
                saver.begin(step, facts(run, start, meter, train_set, step, result))
    with meter.paused():  # the meter is one step behind: this reads the last one
        stopped = run.stop.agreed or meter.error is not None
        if stopped and saver.step != step and not meter.diverged:
            saver.begin(step, facts(run, start, meter, train_set, step, result))
        saver.wait()
    finish(run, meter, saver, step, result)


def due(interval: int, step: int, run: Run) -> bool:
    """Whether something is to be done after `step`: at each interval, and at the end."""
    return step == run.total_steps or bool(interval) and step % interval == 0


def facts(run: Run, start: Start, meter: Meter, train_set, step: int,
          result: dict | None) -> dict:
    """What a checkpoint's meta.json tells of the run; result: of an evaluation of this step."""
    return dict(images_seen=run.images_seen(step), total_steps=run.total_steps,
                images=len(train_set), counts=meter.counts(), result=result,
                begun_from=start.begun_from, classes=train_set.classes, vit=to_plain(run.vit),
                config=to_plain(run.config), torch=torch.__version__,
                machine=f"{run.grid.world.size} x {device_name(run.device)}")


def finish(run: Run, meter: Meter, saver: Saver, step: int, result: dict | None) -> None:
    """The last line; exits with code 1 if the meter ended the run."""
    run.log.close()
    if meter.error:
        end_processes()
        text = f"train.py: error: {meter.error}. The newest checkpoint: {saver.newest}"
        sys.exit(1 if run.grid.world.rank else text)
    if run.stop.agreed:
        run.log.print(f"stopped by {run.stop.name or 'a signal'} at step {step:,}; saved "
                      f"{saver.newest}; the same command continues")
    else:
        rate = f", {meter.rate():,.0f} images/s" if meter.rate() else ""
        run.log.print(f"done: top-1 {100 * result['val_top1']:.2f} % on "
                      f"{counted(result['val_count'], 'image')}{rate}, checkpoint {saver.newest}")


# ----------------------------------------------------------------------------- set-up
def main(argv: list[str] | None = None, sources: tuple | None = None) -> None:
    """sources: (training, validation) images in place of those of --data."""
    start = Start()
    with user_errors("train.py", start.give_up):  # what a user can get wrong, before any step
        config, vit, given = parse_run(TrainConfig, argv)
        world = int(os.environ.get("WORLD_SIZE", 1))
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        plan_batch(config, vit, world, device_type)
        # A dry run describes WORLD_SIZE processes but needs only this one.
        grid, device = ((Grid(), torch.device(device_type)) if config.dry_run
                        else start_processes(config))
        # One recipe for all: the default looks at the data, which nodes may see differently.
        config, vit, given = on_rank_0(grid, lambda: (config, vit, given))
        open_output(config, grid, start)  # before tars are read, which may take minutes
        train_set, val_set, vit = open_images(config, vit, given, grid, sources)
        config = dataclasses.replace(config, val_share=getattr(val_set, "share", None))
        if config.warmup_epochs is not None:
            config = dataclasses.replace(config, warmup_steps=round(
                config.warmup_epochs * len(train_set) / config.global_batch_size))
        decay, after = config.decay_steps, run_length(config, len(train_set))[0]
        if decay and decay > (after := after - config.warmup_steps):
            raise ValueError(f"--decay-steps {decay} must not exceed the {after} steps after "
                             f"warm-up")
        config, vit = choose_start(config, vit, given, start)
        batch = plan_batch(config, vit, world, device_type)  # weights may bring class tokens along
        if config.dry_run:
            total_steps, _ = run_length(config, len(train_set))
            if int(os.environ.get("RANK", 0)) == 0:
                dry_run(config, vit, train_set, val_set, total_steps, batch, device_type,
                        partial(learning_rate, config=config, total_steps=total_steps))
            return
        check_start(config, vit, grid, start, train_set)
        run = Run(config, vit, grid, device, micro_batch=batch[0], accumulation=batch[2])
        start.news.append(device_views.choose(config, train_set, device, run.local_batch,
                                              config.augmentation)[1])
        if config.wandb:
            run.log.join_wandb(Path(config.output_dir), {**to_plain(vit), **to_plain(config)})
        model, optimizer, kernels = build(run, start, len(train_set))
        saver = Saver(Path(config.output_dir) / "checkpoints", optimizer, say=run.log.print,
                      room=host_memory_room(), keep_last=config.keep_last,
                      keep_best=config.keep_best)
        if start.resume:
            saver.step, saver.newest = run.start_step, start.resume
    describe(run, batch, optimizer, saver, train_set, val_set, kernels, start)
    train(run, model, optimizer, saver, start, train_set, val_set)
    end_processes()
    if config.report and grid.world.rank == 0 and not run.stop.agreed:
        import report
        report.main([config.output_dir])


def open_images(config: TrainConfig, vit: ViTConfig, given: dict, grid: Grid, sources=None):
    """(training images, validation images, the model with their classes)."""
    train_set, val_set = sources or on_rank_0(grid, lambda: take_fractions(
        *open_data(config.data, vit.image_hw, config.val_labels, config.val_share,
                   Index.of_run(config, keep=not config.dry_run)),
        config.classes_fraction, config.data_per_class_fraction))
    count = len(train_set.classes)
    if given.get("num_classes", count) != count:
        raise ValueError(f"--num-classes {vit.num_classes}, but --data {config.data} has {count} "
                         f"classes; leave the flag out")
    part = f" ({train_set.told})" if getattr(train_set, "told", None) else ""
    if count == 1:
        raise ValueError(f"--data {config.data} has one class alone, {train_set.classes[0]}: there "
                         f"is nothing to tell apart; give each class a folder{part}")
    if len(train_set) < config.global_batch_size:
        raise ValueError(f"--data {config.data} has {len(train_set)} training images, fewer "
                         f"than one --global-batch-size {config.global_batch_size}{part}")
    return train_set, val_set, dataclasses.replace(vit, num_classes=count)


def open_output(config: TrainConfig, grid: Grid, start: Start) -> None:
    """Makes this job the one that writes in --output-dir, and finds its checkpoints."""
    if not config.dry_run:
        start.candidates, start.news = on_rank_0(grid, lambda: resume.open_output(
            config.output_dir, config.resume, start.locks))


def choose_start(config: TrainConfig, vit: ViTConfig, given: dict, start: Start):
    """(config, vit) with what weights bring along, which `start` gets."""
    if "recipe" not in given:
        start.news.insert(0, f"recipe {config.recipe}, the default here, of {', '.join(RECIPES)}")
    if config.init_from is None and not start.candidates:
        if config.recipe in FINE_TUNING and not config.dry_run:
            raise ValueError(f"--recipe {config.recipe} needs --init-from WEIGHTS: a checkpoint or "
                             f"output directory of this program, or a file of another library")
        return config, vit
    import weights
    if start.candidates:  # a checkpoint has these facts too, and the file may be gone
        source = weights.Weights("a checkpoint", {}, resume.facts_of(start.candidates[0]))
        config, vit, _ = weights.adopt(source, config, vit, given)
        if config.init_from:
            start.news.append(f"--init-from {config.init_from} is not read again: the checkpoint "
                              f"goes on")
        return config, vit
    source = weights.read_weights(config.init_from, config.init_image_size, config.weights)
    config, vit, taken = weights.adopt(source, config, vit, given)
    start.weights, report = weights.fit_weights(source, vit)
    start.news += [f"weights of {config.init_from} ({source.format}): {'; '.join(report)}",
                   "with them: " + ", ".join(f"{k} {v}" for k, v in taken.items())]
    return config, vit


def check_start(config: TrainConfig, vit: ViTConfig, grid: Grid, start: Start, train_set) -> None:
    """Raises ValueError for an output directory or a checkpoint that this run cannot use."""
    output, limit = Path(config.output_dir), os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
    need = checkpoint_bytes(vit, config)
    start.news += on_rank_0(grid, lambda: resume.check_room(output, need, float(limit)))
    if not (output / "checkpoints").is_dir():
        raise ValueError(f"--output-dir {output} is not shared by all nodes: rank "
                         f"{grid.world.rank} does not see what rank 0 created")
    if config.tensorboard:
        try:
            importlib.import_module("torch.utils.tensorboard")
        except Exception as e:
            raise ValueError(f"--tensorboard needs `pip install tensorboard`: {e}") from e
    if start.candidates:
        start.news += resume.check_same_model(
            start.candidates[0], to_plain(vit), to_plain(config), train_set.classes, len(train_set))


def build(run: Run, start: Start, images: int):
    """(model, optimizer, what the log says of their kernels); sets where the run begins, ends."""
    seed = None if start.candidates else run.config.seed  # None: nothing is drawn
    model, kernels = build_model(run, seed, loaded=start.weights)
    if start.weights:
        import weights
        weights.load_weights(model, start.weights)
        start.weights = {}  # gives the memory back
    optimizer, exchange = build_optimizer(run, model)
    if start.candidates:
        start.resume, start.meta, news = load_newest(start.candidates, optimizer)
        start.news += news
        run.start_step, run.start_image = start.meta["step"], start.meta["images_seen"]
        if start.meta.get("images", images) != images:  # other images have these numbers
            start.meta["counts"] = {**start.meta["counts"], "unreadable": []}
    run.total_steps, run.shift = run_length(run.config, images, run.start_step, run.start_image)
    start.begun_from = resume.begun_from(run.config.output_dir, run.config.resume, start.meta)
    start.news += on_rank_0(run.grid, lambda: resume.set_aside(Path(run.config.output_dir),
                                                               run.start_step))
    return model, optimizer, kernels + exchange


def describe(run: Run, batch: tuple, optimizer, saver: Saver, train_set, val_set, kernels: str,
             start: Start) -> None:
    """What will run, before it does."""
    config, vit, grid, log = run.config, run.vit, run.grid, run.log
    decay, no_decay = optimizer.decay_names()
    micro, dp, accumulation = batch
    log.print(f"model {config.model}: {vit.num_params / 1e6:,.2f} M parameters, {vit.seq_length} "
              f"tokens, {vit.num_classes} classes")
    log.print(f"batch {config.global_batch_size} = micro-batch {micro} x dp {dp} x accumulation "
              f"{accumulation}; tp {grid.tp.size}, {grid.world.size} x {device_name(run.device)}")
    share = config.val_share
    held_out = f" (there is no val: --val-share {share}, by a hash of the paths)" if share else ""
    log.print(f"data {config.data}: {len(train_set):,} training and "
              f"{counted(len(val_set), 'validation image')}{held_out}; "
              f"{counted(run.total_steps, 'step')} = "
              f"{run.images_seen(run.total_steps) / len(train_set):,.1f} epochs")
    if getattr(train_set, "told", None):
        log.print(train_set.told)
    log.print(f"precision {config.precision}, {kernels}")
    log.print(f"weight decay {config.weight_decay} on {len(decay)} matrices, none on "
              f"{len(no_decay)} biases, norms, tokens and positions")
    log.print(saver.note)
    if config.freeze == "backbone":
        log.print(f"frozen: all but {', '.join([*decay, *no_decay])}")
    if config.ema_decay:
        log.print(f"average of the weights with decay {config.ema_decay}: validation scores it, "
                  "not the model's own")
    if config.warmup_steps >= run.total_steps:
        log.print(f"note: --warmup-steps {config.warmup_steps:,} is no shorter than the run; the "
                  f"peak --lr {config.lr} is not reached")
    if start.resume:
        start.news += [f"resuming from {start.resume}: step {run.start_step:,}, image "
                       f"{run.start_image:,}", *resume.notes(
                           start.meta, run.total_steps, {**to_plain(vit), **to_plain(config)})]
    elif not config.init_from:
        start.news.append("starting fresh: no checkpoint to resume from")
    for line in start.news:
        log.print(line)


if __name__ == "__main__":
    run_program(main)
