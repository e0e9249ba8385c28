"""Train a Vision Transformer. The loop is in main(), visible from top to bottom.

    python train.py                                                 # built-in images, CPU, minutes
    python train.py --data DIR --model S16                          # a folder: train/CLASS/*, val/*
    torchrun --standalone --nproc_per_node 8 train.py --data DIR --model L16
    torchrun --standalone --nproc_per_node 8 train.py --data DIR --model G14 \\
        --tensor-parallel-size 2 --activation-checkpointing full --checkpoint-method block
    WORLD_SIZE=8 python train.py --data DIR --model g14 --dry-run   # sizes, memory, schedule
    python train.py --model L16 --benchmark 50                      # the time of a step
    torchrun --standalone --nproc_per_node 8 train.py --data DIR --model B16 --recipe finetune \\
        --init-from WEIGHTS                                         # fine-tune
    python train.py --eval --checkpoint output --data DIR           # score DIR/val
    python train.py --predict FOLDER --checkpoint output            # classify images
    python train.py --export FILE --checkpoint output --format timm

One step: global batch = micro-batch x dp x accumulation. Every rank runs forward and backward on
its own images, gradients add up in fp32, parallel.ShardedOptimizer reduces them, clips, updates.

Precision (--precision)   weights   activations   gradients sum, moments, masters   why
    fp32                  fp32      fp32          fp32                              reference
    bf16                  fp32      bf16 matmuls  fp32                              autocast
    bf16-O2               bf16      bf16          fp32                              half the memory
                                                                                    traffic
    bf16-O2-fp8           bf16      fp8 matmuls   fp32                              speed of g, G
Softmax, norm statistics, loss and logits are always fp32. bf16-O2 is NeMo's megatron_amp_O2.
"""

import collections
import contextlib
import csv
import dataclasses
import importlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.attention import sdpa_kernel
from tqdm import tqdm

import data
from configs import (
    MODELS,
    TrainConfig,
    ViTConfig,
    divisors,
    largest_micro_batch,
    legal_tensor_parallel_sizes,
    micro_batch_step,
    parse_args,
    plan_batch,
    stable_seed,
    to_plain,
)
from model import (
    BACKENDS,
    SHAPE,
    ViT,
    Weights,
    choose_attention,
    compile_blocks,
    fit_weights,
    load_weights,
    model_name,
    read_weights,
    to_format,
    write_weights,
)
from parallel import (
    Axis,
    Grid,
    PeerExchange,
    ShardedOptimizer,
    all_gather_object,
    complete_checkpoints,
    incomplete_reason,
    load_checkpoint,
    make_grid,
    newest_checkpoint,
    on_rank_0,
    overlapped,
    plan_buckets,
    read_meta,
    save_checkpoint,
    write_atomically,
)

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, NVIDIA's datasheets
MAX_BAD_STEPS = 3  # steps in a row with a non-finite gradient before the run stops


# ----------------------------------------------------------------------------- schedule
def learning_rate(step: int, config: TrainConfig, total_steps: int) -> float:
    """The rate of step `step` (from 0): a pure function, so a resumed run cannot drift."""
    # 1) linear warm-up from lr / warmup to lr
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    # 2) cosine from lr down to min_lr, which the last step reaches
    span = max(total_steps - 1 - config.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min((step - config.warmup_steps) / span, 1)))
    return config.min_lr + (config.lr - config.min_lr) * cosine


# ----------------------------------------------------------------------------- processes
def start_processes(config: TrainConfig) -> tuple[Grid, torch.device]:
    """Joins the process group that torchrun announces; without torchrun, a single process."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    local_world, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if gpus and local_world > gpus:
        raise ValueError(f"{local_world} processes were started on a machine with {gpus} GPUs; "
                         f"use torchrun --nproc_per_node {gpus} (or CUDA_VISIBLE_DEVICES= for CPU)")
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    if world == 1:
        return Grid(), device
    if world % config.tensor_parallel_size:
        raise ValueError(f"--tensor-parallel-size {config.tensor_parallel_size} must divide the "
                         f"number of processes {world}; legal here: {divisors(world)}")
    # Both backends: NCCL for the work, gloo for the host's own messages (stop flag, checks).
    backend, device_id = ("cpu:gloo,cuda:nccl", device) if gpus else ("gloo", None)
    dist.init_process_group(backend, device_id=device_id)
    return make_grid(config.tensor_parallel_size, device.type), device


class StopSignal:
    """SIGTERM or SIGINT to any rank stops all of them at the same point.

    poll() is called between micro-batches. It starts an all-reduce of a small host tensor and
    returns the result of the one that the previous call started, so nothing waits for it. News of
    unreadable images travel with it.
    """

    def __init__(self, grid: Grid):
        self.grid, self.name, self.work = grid, None, None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.name = signal.Signals(number).name

    def poll(self, news: int = 0) -> tuple[bool, int]:
        """(stop?, sum of news), the same on all ranks."""
        if self.grid.world.size == 1:
            return self.name is not None, news
        result = (False, 0)
        if self.work is not None:
            self.work.wait()
            result = (bool(self.flags[0]), int(self.flags[1]))
        self.flags = torch.tensor([int(self.name is not None), news])
        self.work = dist.all_reduce(self.flags, async_op=True)
        return result


class Readback:
    """Small device results for the host, one step late, so that the host never stops the device.

    put(step, tensor) starts a copy to pinned memory; ready(lag) yields (step, values, time when the
    device had them) of the copies that are at least `lag` puts old. On the CPU that is at once.
    """

    def __init__(self):
        self.pending = collections.deque()

    def put(self, step: int, values: torch.Tensor) -> None:
        event = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            values = host
        self.pending.append((step, values, event, time.perf_counter()))

    def ready(self, lag: int):
        while len(self.pending) > lag:
            step, values, event, when = self.pending.popleft()
            if event is not None:
                event.synchronize()
                when = time.perf_counter()
            yield step, values.tolist(), when


class Upload:
    """Host tensors to the device on a stream of their own, beside the computation that is running.
    (496 images of 224 px are 75 MB, which B/16 uses up in 131 ms.)"""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        if self.stream is None:
            return [x.to(self.device) for x in tensors]
        with torch.cuda.stream(self.stream):
            copies = [x.to(self.device, non_blocking=True) for x in tensors]
        current = torch.cuda.current_stream()
        current.wait_stream(self.stream)
        for x in copies:
            x.record_stream(current)  # else its memory could be given away before it was read
        return copies


# ----------------------------------------------------------------------------- logs
class Log:
    """Rank 0's output: tqdm, printed lines, metrics.jsonl and, if asked for, TensorBoard."""

    def __init__(self, grid: Grid):
        self.main, self.bar, self.file, self.board = grid.world.rank == 0, None, None, None

    def open(self, config: TrainConfig, start_step: int, total_steps: int) -> None:
        """Continues metrics.jsonl after start_step: later lines, of steps not saved, go."""
        if not self.main:
            return
        path = Path(config.output_dir) / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError):  # a line cut by a crash
                    if json.loads(line)["step"] <= start_step:
                        kept.append(line + "\n")
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
        self.file = open(path, "a", buffering=1)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(Path(config.output_dir) / "tensorboard",
                                       purge_step=start_step + 1)
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

    def progress(self, loader):
        """The loader, with a bar that leaves no trace."""
        return tqdm(loader, unit="batch", leave=False, dynamic_ncols=True, disable=not self.main)

    def close(self) -> None:
        for output in (self.bar, self.file, self.board):
            if output is not None:
                output.close()
        self.bar = None


def memory_gib(optimizer: ShardedOptimizer) -> float:
    """Peak memory of this process: the CUDA allocator's and what peers read, which is not in it; or
    resident memory on the CPU."""
    if optimizer.device.type == "cuda":
        peers = *optimizer.peers.values(), *PeerExchange.of.values()
        return (torch.cuda.max_memory_allocated() + sum(p.memory.nbytes for p in peers)) / 2**30
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_flops(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


# ----------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(model, loader, prepare, stop: StopSignal, grid: Grid, device) -> dict | None:
    """Scores every image of `loader` exactly once, for any number of ranks, batch or workers.

    Padding and unreadable images carry label -100; sums, not means, are reduced. Returns val_loss,
    val_top1, val_top5 (shares), val_count (images scored) and val_unreadable (the indices of the
    others); None if stopped.
    """
    model.eval()
    bad = set()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, count
    for images, labels, indices in loader:
        if stop.poll()[0]:
            model.train()
            return None
        valid = (labels >= 0).to(device, non_blocking=True)
        bad |= data.unreadable_in(labels, indices)
        labels = labels.to(device, non_blocking=True)
        logits = model(prepare(images)).float()
        top5 = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        sums += torch.stack([loss, top5[:, 0].sum(), top5.any(1).sum(), valid.sum()])
    if grid.world.size > 1:
        dist.all_reduce(sums)
    model.train()
    loss, top1, top5, count = sums.tolist()
    share = 1 / max(count, 1)
    return dict(val_loss=loss * share, val_top1=top1 * share, val_top5=top5 * share,
                val_count=int(count),
                val_unreadable=sorted(set().union(*all_gather_object(bad, grid))))


def report_scores(log: Log, result: dict, source, prefix: str = "") -> dict:
    """Prints evaluate's result, unreadable images by name; returns it with their number alone."""
    bad, count = result["val_unreadable"], result["val_count"]
    for index in bad:
        log.print(f"unreadable image, skipped: {source.name(index)}")
    log.print(f"{prefix}validation top-1 {100 * result['val_top1']:.2f} %, top-5 "
              f"{100 * result['val_top5']:.2f} %, loss {result['val_loss']:.4f} on {count:,} images"
              + (f" ({len(bad)} unreadable)" if bad else ""))
    return {**result, "val_unreadable": len(bad)}


# ----------------------------------------------------------------------------- --eval, --predict
def adopt(weights: Weights, config: TrainConfig, vit: ViTConfig,
          given: dict) -> tuple[TrainConfig, ViTConfig, dict]:
    """The configurations with what weights bring along where no flag says otherwise, and that part.

    Training takes what the weights were trained to (the fine-tuning recipe keeps its own head); the
    other modes take the whole model. Raises ValueError if the weights do not make a whole one.
    """
    facts = {"precision": "fp32", **weights.facts}
    facts["precision"] = facts["precision"].removesuffix("-fp8")  # that is for training
    names = {"num_class_tokens", "head", "layernorm_eps", "gelu_approximate", "mean", "std"}
    if config.recipe == "finetune":
        names.remove("head")
    if config.checkpoint:
        names |= {"num_classes", "image_size", "precision", "crop_ratio"}
        if "num_classes" not in facts:
            raise ValueError(f"--checkpoint {config.checkpoint} has no head: fine-tune it first "
                             f"(--recipe finetune --init-from {config.checkpoint})")
    if config.checkpoint and "model" not in given:
        names |= set(SHAPE)
        name = model_name(facts)
        if name is not None:
            facts.setdefault("num_attention_heads", MODELS[name].num_attention_heads)
        elif "num_attention_heads" not in facts and "num_attention_heads" not in given:
            raise ValueError(f"--checkpoint {config.checkpoint} is none of {', '.join(MODELS)} and "
                             f"does not tell its number of heads: give --num-attention-heads")
        config = dataclasses.replace(config, model=name or "of its own shape")
    if config.checkpoint and "num_workers" not in given:  # one to a core, else torch warns
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        config = dataclasses.replace(config, num_workers=min(config.num_workers, max(cores, 1)))
    taken = {name: facts[name] for name in sorted(names - set(given)) if name in facts}

    def replace(old):
        known = {f.name for f in dataclasses.fields(old)}
        return dataclasses.replace(old, **{k: v for k, v in (taken | given).items() if k in known})
    return replace(config), replace(vit), taken


def open_model(config: TrainConfig, vit: ViTConfig, weights: Weights, grid: Grid, device, log: Log):
    """A model ready for --eval and --predict, its images per rank and batch, and its contexts."""
    tp = config.tensor_parallel_size
    micro = config.micro_batch_size or largest_micro_batch(config, device.type == "cuda")
    if micro % tp:
        raise ValueError(f"--micro-batch-size {micro} must be divisible by --tensor-parallel-size "
                         f"{tp}; nearest: {micro // tp * tp or tp}, {micro // tp * tp + tp}")
    fitted, report = fit_weights(weights, vit)
    model, kernel, why = build_model(config, vit, grid, device)
    load_weights(model, fitted)
    if config.o2:
        model.to(torch.bfloat16)
    compile_if_asked(model, config, device)
    log.print(f"model {config.model} of {config.checkpoint} ({weights.format}): "
              f"{vit.num_params / 1e6:,.2f} M parameters, {vit.num_classes} classes; "
              f"{'; '.join(report)}")
    log.print(f"images {' x '.join(map(str, vit.image_hw))} px, crop ratio {config.crop_ratio}, "
              f"mean {config.mean}, std {config.std}")
    log.print(f"batch {micro} x dp {grid.world.size // tp}; tp {tp}, {grid.world.size} x "
              f"{_device_name(device)}, precision {config.precision}, attention {kernel} ({why})")
    return model, micro // tp, kernel


def eval_mode(config: TrainConfig, vit: ViTConfig, weights: Weights, grid: Grid, device) -> None:
    """--eval: scores the checkpoint on DATA/val; needs no DATA/train."""
    log, stop = Log(grid), StopSignal(grid)
    with user_errors(grid.world.rank):
        classes = list(weights.facts.get("classes", ()))
        source = on_rank_0(grid, lambda: data.open_val(config.data, vit.image_hw,
                                                       config.val_labels, classes))
        if classes:
            data.check_same_classes(config.checkpoint, classes, f"{config.data}/val",
                                    source.classes)
        elif len(source.classes) != vit.num_classes:
            raise ValueError(f"--data: {config.data}/val has {len(source.classes)} classes, "
                             f"--checkpoint {config.checkpoint} has {vit.num_classes}")
        model, batch, kernel = open_model(config, vit, weights, grid, device, log)
        loader = data.eval_loader(source, config, vit.image_hw, batch, grid.world.rank,
                                  grid.world.size, device)
    with kernel_context(kernel), autocast(config, device):
        result = evaluate(model, log.progress(loader), preparer(config, device), stop, grid, device)
    if result is None:
        sys.exit(f"stopped by {stop.name or 'a signal'}: not every image was scored")
    report_scores(log, result, source)


def predict_mode(config: TrainConfig, vit: ViTConfig, weights: Weights, grid: Grid, device) -> None:
    """--predict: every image below a folder to predictions.csv and a contact sheet .png."""
    log, stop, out = Log(grid), StopSignal(grid), Path(config.output_dir)
    with user_errors(grid.world.rank):
        source = on_rank_0(grid, lambda: data.scan_flat(config.predict, ""))
        on_rank_0(grid, lambda: check_writable(config.output_dir, out))
        model, batch, kernel = open_model(config, vit, weights, grid, device, log)
        loader = data.eval_loader(source, config, vit.image_hw, batch, grid.world.rank,
                                  grid.world.size, device)
    with kernel_context(kernel), autocast(config, device):
        best = predict(model, log.progress(loader), preparer(config, device), stop, grid, device,
                       len(source), min(5, vit.num_classes))
    if best is None:
        sys.exit(f"stopped by {stop.name or 'a signal'}: nothing was written")
    if grid.world.rank:
        return
    names = class_names(weights.facts.get("classes"), vit.num_classes)
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["path"] + [f"{column}_{i + 1}" for i in range(min(5, vit.num_classes))
                               for column in ("class", "probability")])
    shown = []
    for index, (probabilities, labels) in enumerate(zip(*best, strict=True)):
        cells = [(names[label], f"{p:.4f}") for p, label in zip(probabilities, labels, strict=True)]
        if not probabilities[0]:  # unreadable: a row without predictions
            log.print(f"unreadable image: {source.name(index)}")
            cells = []
        elif len(shown) < data.SHEET:
            note = f"{100 * probabilities[0]:.1f} %  {Path(source.name(index)).name}"
            shown.append((source.load(index)[0], names[labels[0]], note))
        table.writerow([source.name(index), *(cell for pair in cells for cell in pair)])
    # names that are no UTF-8 keep their bytes
    csv_bytes = text.getvalue().encode("utf-8", "surrogateescape")
    write_atomically(out / "predictions.csv", lambda file: file.write(csv_bytes))
    if shown:
        sheet = data.contact_sheet(shown)
        write_atomically(out / "predictions.png", lambda file: sheet.save(file, "PNG"))
    log.print(f"{len(source):,} images, {sum(not p[0] for p in best[0]):,} unreadable: "
              f"{out / 'predictions.csv'}" + (f", {out / 'predictions.png'}" if shown else ""))


@torch.no_grad()
def predict(model, loader, prepare, stop: StopSignal, grid: Grid, device, count: int,
            k: int) -> tuple[list, list] | None:
    """The k best of each of `count` images: probabilities [count, k], classes [count, k].

    Each rank fills the rows of its images, and the sum over ranks is the table; the row of an
    unreadable image stays zero. None if stopped.
    """
    model.eval()
    probabilities, classes = torch.zeros(count, k), torch.zeros(count, k, dtype=torch.long)
    for images, labels, indices in loader:
        if stop.poll()[0]:
            return None
        best = model(prepare(images)).float().softmax(1).topk(k)
        seen = labels >= 0
        probabilities[indices[seen]] = best.values.cpu()[seen]
        classes[indices[seen]] = best.indices.cpu()[seen]
    if grid.world.size > 1:
        dist.all_reduce(probabilities)  # on the CPU: through gloo
        dist.all_reduce(classes)
    return probabilities.tolist(), classes.tolist()


def class_names(classes: tuple[str, ...] | None, count: int) -> list[str]:
    """What to call the classes. ImageNet's, named n + 8 digits, are in the order of torchvision's
    words; 1,000 classes without a name are taken to be ImageNet's."""
    if count == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in classes or ()):
        from torchvision.models import ViT_B_16_Weights
        return ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
    return list(classes or (f"class {i}" for i in range(count)))


def export_mode(config: TrainConfig, vit: ViTConfig, weights: Weights) -> None:
    """--export: the checkpoint as a file of another library."""
    fitted, report = fit_weights(weights, vit)
    tensors = to_format(fitted, vit, config.format)
    facts = {**weights.facts, **dataclasses.asdict(config), **dataclasses.asdict(vit)}
    try:
        code = write_weights(config.export, tensors, vit, config.format, facts)
    except OSError as e:
        raise ValueError(f"--export {config.export} cannot be written: {e}") from e
    print(f"{config.export}: {config.checkpoint} ({weights.format}) for {config.format}, "
          f"{'; '.join(report)}; images {' x '.join(map(str, vit.image_hw))} px, mean {config.mean}"
          f", std {config.std}. Opens with\n\n{code}\n")


# ----------------------------------------------------------------------------- --dry-run
def activation_bytes(vit: ViTConfig, config: TrainConfig, images: int) -> int:
    """Bytes that one rank keeps for backward with `images` images of its own, in this layout.

    Per token of a block, in elements of the activations' dtype: the two norms' inputs 2D and
    outputs, gathered over tp, 2tD; q, k, v and attention's output 4D; the MLP's hidden layer before
    and after GELU 2F; a byte for each of two dropout masks. With fp8 products, the products'
    inputs, (2t + 1)D + F, are kept in a byte an element, and the weights' transposed.

    Selective keeps the block's inputs x and y, qkv, attention's output, proj's and fc1's, 7D + F;
    where images visit, which is assumed if --tp-comm-overlap allows it, proj's in t parts,
    (6 + t)D + F. Full keeps x and y. Both keep what a block or run of blocks keeps by itself while
    backward is in it. (Compiled; eager selective keeps partial sums of row products as well.)
    """
    d, f, t = vit.hidden_size, vit.ffn_hidden_size, config.tensor_parallel_size
    element = 4 if config.precision == "fp32" else 2
    masks = 2 * d if vit.hidden_dropout else 0
    tokens = images * vit.seq_length
    block = tokens * (element * (6 * d + 2 * t * d + 2 * f) + masks)
    if config.fp8:
        block = tokens * (2 * (6 * d + f) + (2 * t + 1) * d + f + masks) + 2 * d * (2 * d + f) // t
    parts = 1 if config.fp8 or config.tp_comm_overlap is False else t
    selective = tokens * element * ((6 + parts) * d + f)
    entry = tokens * 2 * element * d
    layers, n = vit.num_layers, config.checkpoint_num_layers
    if config.activation_checkpointing == "none":
        return layers * block
    if config.activation_checkpointing == "selective":
        return layers * selective + block - selective
    if config.checkpoint_method == "uniform":
        return math.ceil(layers / n) * entry + min(n, layers) * block
    return min(n, layers) * entry + max(layers - n, 0) * block + (block if n else 0)


def memory_plan(vit: ViTConfig, config: TrainConfig, tp: int, dp: int, micro: int) -> dict:
    """Bytes per rank by part, for rank 0 of a tp x dp layout; nothing is allocated."""
    grid = Grid(Axis(0, tp), Axis(0, dp), Axis(0, tp * dp))
    with torch.device("meta"):
        model = ViT(vit, grid)
    buckets = [bucket for unit in plan_buckets(model, grid) for bucket in unit]
    moments = 2 if config.optimizer == "adamw" else (1 if config.momentum else 0)
    return {"weights": sum(_block(b.numel * (2 if config.o2 else 4)) for b in buckets),
            "gradients": sum(_block(b.numel * 4) for b in buckets),
            "masters and moments": (moments + config.o2) * sum(
                _block((b.end - b.begin) * 4) for b in buckets),
            "activations": activation_bytes(vit, config, micro // tp)}


def _block(size: int) -> int:
    """Bytes that torch's CUDA allocator takes for a buffer: from 10 MiB on it reserves steps of
    2 MiB, and leaves a rest of less than 1 MiB in the block (3 % of B/16's state)."""
    rest = -size % 2**21
    return size + (rest if size >= 10 * 2**20 and rest < 2**20 else 0)


def dry_run(config: TrainConfig, vit: ViTConfig, train_set, val_set, total_steps: int, batch: tuple,
            device: torch.device) -> None:
    """Prints what a run would be: sizes, memory, schedule and the legal layouts."""
    micro, dp, accumulation = batch
    tp, total = config.tensor_parallel_size, config.global_batch_size
    gib = 2**30
    h, w = vit.grid_hw
    print(f"model        {config.model}: {vit.num_params / 1e6:,.2f} M parameters, "
          f"{vit.num_layers} blocks of width {vit.hidden_size}, "
          f"{vit.num_attention_heads} heads of {vit.head_dim}")
    print(f"tokens       {vit.seq_length} = {vit.num_class_tokens} class + {h} x {w} patches "
          f"of {vit.patch_size} px")
    print(f"FLOPs        {vit.flops_per_image / 1e9:,.2f} G per image forward, "
          f"{3 * vit.flops_per_image / 1e9:,.2f} G in a training step")
    print(f"data         {len(train_set):,} training and {len(val_set):,} validation images, "
          f"{len(train_set.classes)} classes")
    print(f"batch        {total} = micro-batch {micro} x dp {dp} x accumulation {accumulation}")
    print(f"steps        {total_steps:,} = {total_steps * total / len(train_set):,.1f} epochs")
    marks = sorted({0, config.warmup_steps // 2, min(config.warmup_steps, total_steps - 1),
                    total_steps // 2, total_steps - 1} & set(range(total_steps)))
    rates = ", ".join(f"{s:,}: {learning_rate(s, config, total_steps):.3g}" for s in marks)
    print(f"lr at step   {rates}")
    plan = memory_plan(vit, config, tp, dp, micro)
    parts = " + ".join(f"{name} {size / gib:.2f}" for name, size in plan.items())
    print(f"memory       {sum(plan.values()) / gib:.2f} GiB per rank on {device.type} = {parts}")
    print(f"checkpoint   {vit.num_params * 4 * 3 / gib:.2f} GiB at most")
    legal_tp, step = legal_tensor_parallel_sizes(vit), micro_batch_step(config, vit)
    print(f"legal --tensor-parallel-size  {', '.join(map(str, legal_tp))}")
    print(f"legal --micro-batch-size      "
          f"{', '.join(str(m) for m in divisors(total // dp) if m % step == 0)}")
    print("weights + gradients + optimizer, GiB per rank:")
    worlds = [1, 2, 4, 8, 16, 32, 64]
    print("  processes " + "".join(f"{n:>8}" for n in worlds))
    for t in [t for t in legal_tp if t <= 8]:
        cells = []
        for n in worlds:
            state = memory_plan(vit, config, t, n // t, t) if n % t == 0 else None
            cells.append(f"{'-' if state is None else _gib(state):>8}")
        print(f"  tp {t:<7} " + "".join(cells))


def _gib(plan: dict) -> str:
    return f"{sum(size for part, size in plan.items() if part != 'activations') / 2**30:.2f}"


# ----------------------------------------------------------------------------- checks at the start
def check_writable(flag: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.write_bytes(b"0" * 4096)
        probe.unlink()
    except OSError as e:
        raise ValueError(f"--output-dir {flag} cannot be written: {e}") from e


def check_output_dir(config: TrainConfig, vit: ViTConfig) -> None:
    """Finds an output directory that cannot be written, or a disk too full, before step 0."""
    root = Path(config.output_dir) / "checkpoints"
    check_writable(config.output_dir, root)
    need, free = vit.num_params * 4 * 3, shutil.disk_usage(root).free
    if free < need:
        raise ValueError(f"--output-dir {config.output_dir} has {free / 2**30:.1f} GiB free; one "
                         f"checkpoint of this model takes {need / 2**30:.1f} GiB")


def find_resume(config: TrainConfig, log: Log) -> Path | None:
    """The checkpoint to continue from. The order is important:
    1. --resume none: start fresh; refuse to mix with checkpoints that are there
    2. --resume PATH: that one, or the newest complete one below it
    3. --resume auto: the newest complete one of --output-dir, or start fresh
    """
    own = Path(config.output_dir) / "checkpoints"
    if config.resume == "none":
        if complete_checkpoints(own):
            raise ValueError(f"--resume none would mix a new run with the checkpoints in {own}; "
                             f"remove them or give another --output-dir")
        return None
    if config.resume != "auto":
        root = Path(config.resume)
        if not root.is_dir():
            raise ValueError(f"--resume {config.resume} is no directory; give a checkpoint, an "
                             f"output directory, auto or none")
        return newest_checkpoint(root)
    for directory in sorted(own.glob("step_*")):
        reason = incomplete_reason(directory)
        if reason:
            log.print(f"skipping an incomplete checkpoint: {reason}")
    found = complete_checkpoints(own)
    return found[-1] if found else None


def check_same_model(directory: Path, meta: dict, config: TrainConfig, vit: ViTConfig,
                     classes: list[str]) -> None:
    """A checkpoint continues only its own model, on its own classes."""
    ours, theirs = to_plain(vit), meta["vit"]
    free = ("hidden_dropout", "attention_dropout", "drop_path_rate", "gelu_approximate",
            "layernorm_eps")
    differ = [f"{key} {theirs.get(key)} (this run: {ours[key]})" for key in ours
              if key not in free and theirs.get(key) != ours[key]]
    if differ:
        raise ValueError(f"{directory} is a checkpoint of another model: {', '.join(differ)}; give "
                         f"its flags, another --output-dir, or --resume none")
    if meta["classes"] != classes:
        raise ValueError(f"{directory} was trained on other classes ({len(meta['classes'])}: "
                         f"{', '.join(meta['classes'][:3])} ...) than --data {config.data}")


@contextlib.contextmanager
def user_errors(rank: int):
    """One line instead of a traceback for what a user can get wrong before the first step."""
    try:
        yield
    except (ValueError, OSError) as error:
        if rank:  # torchrun ends all ranks with the first: speak only if rank 0 did not
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        print(f"train.py: error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)  # not sys.exit: it would wait for the process group


# ----------------------------------------------------------------------------- shared by the modes
def build_model(config: TrainConfig, vit: ViTConfig, grid: Grid, device):
    """(the model, its attention kernel, why that one)."""
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    kernel, why = choose_attention(config.attention, vit, grid.tp.size, device, dtype)
    if not config.fp8:
        grid = dataclasses.replace(grid, tp=overlapped(grid.tp, device, config.tp_comm_overlap))
    with device:
        model = ViT(vit, grid, kernel="sdpa" if kernel in BACKENDS else kernel,
                    activation_checkpointing=config.activation_checkpointing,
                    checkpoint_method=config.checkpoint_method,
                    checkpoint_num_layers=config.checkpoint_num_layers,
                    fp8=config.fp8, seed=config.seed)
    return model, kernel, why


def check_fp8(config: TrainConfig, vit: ViTConfig, micro: int, world: int,
              device: torch.device) -> None:
    """Raises ValueError if --precision bf16-O2-fp8 cannot run: the sizes, and (except in a dry run)
    the device."""
    if not config.fp8:
        return
    tp = config.tensor_parallel_size
    for name in ("hidden_size", "ffn_hidden_size"):
        if getattr(vit, name) % (16 * tp):
            raise ValueError(f"--precision {config.precision} needs {name} {getattr(vit, name)} to "
                             f"be a multiple of 16 x --tensor-parallel-size {tp} = {16 * tp}")
    step = micro_batch_step(config, vit)
    if micro % step:
        share = config.global_batch_size * tp // world  # images of a replica in a step
        legal = [m for m in divisors(share) if m % step == 0]
        raise ValueError(
            f"--precision {config.precision} needs a multiple of 16 tokens, and --micro-batch-size "
            f"{micro} x {vit.seq_length} tokens is {micro * vit.seq_length}; legal with "
            f"--global-batch-size {config.global_batch_size}: "
            f"{', '.join(map(str, legal)) or f'none, as {share} is no multiple of {step}'}")
    if not config.dry_run and (device.type != "cuda" or
                               torch.cuda.get_device_capability(device) < (8, 9)):
        raise ValueError(f"--precision {config.precision} needs a GPU with fp8 products (compute "
                         f"capability 8.9 or higher), not {_device_name(device)}; legal here: "
                         "fp32, bf16, bf16-O2")


def build_optimizer(config: TrainConfig, model: ViT, grid: Grid) -> ShardedOptimizer:
    return ShardedOptimizer(
        model, grid, optimizer=config.optimizer, weight_decay=config.weight_decay,
        weight_dtype=torch.bfloat16 if config.o2 else torch.float32,
        betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps,
        momentum=config.momentum, clip_grad=config.clip_grad, peer_copies=config.peer_copies)


def kernel_context(kernel: str):
    return sdpa_kernel(BACKENDS[kernel]) if kernel in BACKENDS else contextlib.nullcontext()


def autocast(config: TrainConfig, device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def preparer(config: TrainConfig, device: torch.device):
    """A function: what the loader gives, uint8 [b,3,H,W] and jitter [b,8] if any -> normalised
    images on the device."""
    upload, normalize = Upload(device), data.normalize
    if _use_compile(config, device):
        normalize = torch.compile(normalize, fullgraph=True, dynamic=False)
    dtype = torch.bfloat16 if config.o2 else torch.float32

    def prepare(images, *jitter):
        images, *jitter = upload(images, *jitter)
        return normalize(images, config.mean, config.std, dtype, *jitter)
    return prepare


def forward_backward(model, optimizer, prepare, config: TrainConfig, batch, last: bool):
    """One micro-batch of (images, labels, jitter). Returns [loss sum, correct, images] on the
    device; the last one of a step starts the reduction of the gradients."""
    images, labels, *jitter = batch
    images = prepare(images, *jitter)
    labels = labels.to(images.device, non_blocking=True)
    with autocast(config, images.device):
        logits = model(images).float()
    loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    # A sum over the images of all ranks and micro-batches / the global batch.
    optimizer.backward(loss / config.global_batch_size, last)
    with torch.no_grad():
        correct = (logits.argmax(1) == labels).sum()
        return torch.stack([loss.detach(), correct, (labels >= 0).sum()])


def _use_compile(config: TrainConfig, device: torch.device) -> bool:
    return device.type == "cuda" if config.compile is None else config.compile


def compile_if_asked(model: ViT, config: TrainConfig, device: torch.device) -> str:
    """Compiles the blocks where --compile or the device asks for it; returns what the log says."""
    if not _use_compile(config, device):
        return "not compiled"
    compile_blocks(model)
    return "compiled"


def peers_text(model: ViT, optimizer: ShardedOptimizer) -> str:
    """What the log says of copies between the GPUs of a host."""
    return (", tp collectives under the products" * model.grid.tp.overlap
            + ", gradients summed by peer copies" * bool(optimizer.peers))


def end_processes() -> None:
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# ----------------------------------------------------------------------------- --benchmark
WARM_UP = 5  # steps before any is timed: they compile, and fill caches and the allocator


def benchmark(config: TrainConfig, vit: ViTConfig, batch: tuple, grid: Grid, device) -> None:
    """--benchmark N: the time of N training steps, as training makes them, on random images.

    Images are uint8 in pinned host memory and go through the jitter of --augmentation; every step
    ends with the optimizer and its communication. Prints one row; --benchmark-data adds the rate of
    the loader alone and of the steps that it feeds, --profile where the time of a step goes.
    """
    micro, dp, accumulation = batch
    log, local_batch = Log(grid), micro // grid.tp.size
    with user_errors(grid.world.rank):
        if config.profile:
            folder = Path(config.output_dir) / "profile"
            on_rank_0(grid, lambda: check_writable(config.output_dir, folder))
        source = config.benchmark_data and on_rank_0(
            grid, lambda: data.open_data(config.benchmark_data, vit.image_hw))[0]
        vit = dataclasses.replace(vit, num_classes=len(source.classes)) if source else vit
        check_fp8(config, vit, micro, grid.world.size, device)
        model, kernel, _ = build_model(config, vit, grid, device)
        optimizer = build_optimizer(config, model, grid)
        compiled = compile_if_asked(model, config, device)
    prepare, model = preparer(config, device), model.train()

    def random_batches():
        shape = (2, local_batch)  # two batches, in turn
        host = [torch.randint(0, 256, (*shape, 3, *vit.image_hw), dtype=torch.uint8),
                torch.randint(0, vit.num_classes, shape)]
        if config.augmentation == "nemo":
            host.append(torch.stack([data.draw_jitter() for _ in range(2 * local_batch)])
                        .view(*shape, -1))
        pinned = [x.pin_memory() if device.type == "cuda" else x for x in host]
        return itertools.cycle(zip(*pinned))

    def train_steps(batches, count: int) -> list[float]:
        """Seconds of each of `count` steps."""
        inflight, marks = collections.deque(), []
        for step in range(count + 1):
            marks.append(torch.cuda.Event(enable_timing=True) if device.type == "cuda"
                         else time.perf_counter())
            if device.type == "cuda":
                marks[-1].record()
            if step == count:
                break
            for i in range(accumulation):
                forward_backward(model, optimizer, prepare, config, next(batches),
                                 last=i == accumulation - 1)
                _limit_inflight(inflight, device)
            optimizer.step(learning_rate(step, config, config.warmup_steps + count))
        if device.type == "cuda":
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)]
        return [b - a for a, b in itertools.pairwise(marks)]

    with kernel_context(kernel):
        batches = random_batches()
        train_steps(batches, WARM_UP)
        times = sorted(train_steps(batches, config.benchmark))
        median, total = times[len(times) // 2], config.global_batch_size
        rate = total / median
        flops = rate * 3 * vit.flops_per_image / grid.world.size
        peak = peak_flops(device)
        planned = sum(memory_plan(vit, config, grid.tp.size, dp, micro).values()) / 2**30
        log.print(f"torch {torch.__version__}, {grid.world.size} x {_device_name(device)}, "
                  f"dropout {vit.hidden_dropout}, {compiled}, checkpointing "
                  f"{config.activation_checkpointing}"
                  + peers_text(model, optimizer))
        row = {"model": config.model, "tp x dp": f"{grid.tp.size} x {dp}", "micro-batch": micro,
               "accumulation": accumulation, "precision": config.precision, "attention": kernel,
               "ms (min-max)": f"{1e3 * median:.1f} ({1e3 * times[0]:.1f}-{1e3 * times[-1]:.1f})",
               "images/s per GPU": f"{rate / grid.world.size:,.1f}", "in all": f"{rate:,.1f}",
               "TFLOP/s": f"{flops / 1e12:.3g}",
               "MFU": f"{100 * flops / peak:.1f} %" if peak else "-",
               "GiB (planned)": f"{memory_gib(optimizer):.3g} ({planned:.3g})"}
        width = [max(len(name), len(str(value))) for name, value in row.items()]
        for cells in (row, row.values()):
            log.print("  ".join(f"{cell:>{w}}" for cell, w in zip(cells, width, strict=True)))
        if config.profile:
            profile(lambda: train_steps(batches, 3), 3, config, log, grid, device)
        if source:
            loader_rate(source, config, vit, local_batch, grid, device, log, train_steps, rate)


def loader_rate(source, config: TrainConfig, vit: ViTConfig, local_batch: int, grid: Grid, device,
                log: Log, train_steps, rate: float) -> None:
    """--benchmark-data: the loader's own rate, and that of N steps with it beside `rate`."""
    rounds = max(config.num_workers, 1)  # batches come in bursts, one from each worker
    alone = math.ceil(10 / rounds) * rounds
    steps = math.ceil((2 * rounds + alone) * local_batch * grid.world.size
                      / config.global_batch_size) + WARM_UP + config.benchmark

    def batches():
        loader = data.train_loader(source, config, vit.image_hw, local_batch, grid.world.rank,
                                   grid.world.size, 0, steps, device)
        return ((images, labels, *jitter) for images, labels, _, *jitter in loader)

    stream = batches()
    for _ in range(2 * rounds):
        next(stream)
    start = time.perf_counter()
    for _ in range(alone):
        next(stream)
    loader = alone * local_batch * grid.world.size / (time.perf_counter() - start)
    stream = batches()
    train_steps(stream, WARM_UP)
    together = config.benchmark * config.global_batch_size / sum(
        train_steps(stream, config.benchmark))
    log.print(f"{config.benchmark_data} with {config.num_workers} workers a process, augmentation "
              f"{config.augmentation}: loader alone {loader:,.1f} images/s, steps with it "
              f"{together:,.1f} ({100 * together / rate:.1f} % of those without)")


CATEGORIES = {  # by the names of kernels, first match; the rest is elementwise
    "communication": ("nccl", "c10d", "gloo", "barrier_kernel", "signal_kernel", "memcpy ptop"),
    "attention": ("fmha", "flash", "attention", "_short_backward", "dot_do_o", "convert_dq"),
    "matrix products": ("gemm", "nvjet", "cutlass", "splitk", "aten::mm", "aten::addmm"),
    "optimizer": ("multi_tensor_apply", "fused_adam", "fused_sgd", "_foreach"),
    "copies": ("memcpy", "memset", "copy_"),
}


def profile(run, steps: int, config: TrainConfig, log: Log, grid: Grid, device) -> None:
    """--profile: a trace for chrome://tracing or Perfetto, and where the time of a step goes."""
    cuda = device.type == "cuda"
    with torch.profiler.profile() as profiler:
        seconds = sum(run())
    folder = Path(config.output_dir) / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"rank_{grid.world.rank:05d}.json.gz"))
    spans, at = [], 0.0  # (begin, end, category) in microseconds
    for event in profiler.events():
        name = event.name.lower()
        kind = next((kind for kind, keys in CATEGORIES.items() if any(key in name for key in keys)
                     and not name.startswith("triton_")), "elementwise, norms")
        if not cuda:  # operators nest: their own times, end to end
            spans.append((at, at := at + event.self_cpu_time_total, kind))
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end, kind))
    busy = _covered(spans)
    exposed = busy - _covered([span for span in spans if span[2] != "communication"])
    log.print(f"of {1e3 * seconds / steps:.1f} ms a step, profiled (traces in {folder}):")
    times = {kind: sum(end - begin for begin, end, k in spans if k == kind)
             for kind in (*CATEGORIES, "elementwise, norms")}
    # Times of several threads (CPU) or streams can add up to more than the step.
    for kind, time_us in {**times, "idle": max(1e6 * seconds - busy, 0)}.items():
        note = (f"  ({exposed / steps / 1e3:.1f} not hidden)"
                if kind == "communication" and time_us else "")
        log.print(f"  {kind:20s} {time_us / steps / 1e3:8.1f} ms "
                  f"{time_us / seconds / 1e4:5.1f} %{note}")


def _covered(spans) -> float:
    """The length of the union of spans (begin, end, ...)."""
    total, last = 0.0, -math.inf
    for begin, end, *_ in sorted(spans):
        total += max(0.0, end - max(begin, last))
        last = max(last, end)
    return total


# ----------------------------------------------------------------------------- main
def main(argv: list[str] | None = None) -> None:
    rank = int(os.environ.get("RANK", 0))

    # ---- configuration, processes, data: every check that can fail, fails here
    with user_errors(rank):
        config, vit, given = parse_args(argv)
        if config.checkpoint:
            weights = read_weights(config.checkpoint, config.init_image_size)
            config, vit, _ = adopt(weights, config, vit, given)
            if config.fp8:
                raise ValueError(f"--precision {config.precision} is for training; legal here: "
                                 "fp32, bf16, bf16-O2")
        if config.export:
            return export_mode(config, vit, weights) if rank == 0 else None
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        world = int(os.environ.get("WORLD_SIZE", 1))
        legal_tp = legal_tensor_parallel_sizes(vit)
        if config.tensor_parallel_size not in legal_tp:
            raise ValueError(
                f"--tensor-parallel-size {config.tensor_parallel_size} must divide the "
                f"{vit.num_attention_heads} heads and the MLP width {vit.ffn_hidden_size}; "
                f"legal for {config.model}: {', '.join(map(str, legal_tp))}")
        if config.peer_copies and not config.dry_run and (world == 1 or device_type == "cpu"):
            raise ValueError("--peer-copies needs several GPUs of one host; leave it out here")
        if config.tp_comm_overlap and (config.tensor_parallel_size == 1 or config.fp8
                                       or device_type == "cpu" and not config.dry_run):
            raise ValueError("--tp-comm-overlap needs --tensor-parallel-size above 1, GPUs and a "
                             "--precision without fp8")
        if config.benchmark and "global_batch_size" not in given:  # one micro-batch a step
            micro = config.micro_batch_size or largest_micro_batch(config, device_type == "cuda")
            config = dataclasses.replace(config, global_batch_size=micro * max(
                world // config.tensor_parallel_size, 1))
        if not config.checkpoint:
            micro, dp, accumulation = batch = plan_batch(
                config, world, device_type == "cuda", micro_batch_step(config, vit))
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
            torch.use_deterministic_algorithms(True)
        # A dry run describes WORLD_SIZE processes but needs only this one.
        grid, device = ((Grid(), torch.device(device_type)) if config.dry_run
                        else start_processes(config))
    if config.checkpoint:
        mode = eval_mode if config.eval else predict_mode
        mode(config, vit, weights, grid, device)
        return end_processes()
    if config.benchmark:
        benchmark(config, vit, batch, grid, device)
        return end_processes()
    with user_errors(rank):
        stop, log = StopSignal(grid), Log(grid)
        train_set, val_set = on_rank_0(
            grid, lambda: data.open_data(config.data, vit.image_hw, config.val_labels))
        classes = train_set.classes
        if "num_classes" in given and vit.num_classes != len(classes):
            raise ValueError(f"--num-classes {vit.num_classes}, but --data {config.data} has "
                             f"{len(classes)} classes; leave the flag out")
        vit = dataclasses.replace(vit, num_classes=len(classes))
        if len(train_set) < config.global_batch_size:
            raise ValueError(f"--data {config.data} has {len(train_set)} training images, fewer "
                             f"than one --global-batch-size {config.global_batch_size}")
        total_steps = config.max_steps or max(
            int(config.epochs * len(train_set)) // config.global_batch_size, 1)
        resume = None if config.dry_run else on_rank_0(grid, lambda: find_resume(config, log))
        fitted, news = {}, []
        if config.init_from and resume:  # its facts are the checkpoint's: the file may be gone
            config, vit, _ = adopt(read_weights(resume), config, vit, given)
            news = [f"--init-from {config.init_from} is not read again: the checkpoint goes on"]
        elif config.init_from:
            weights = read_weights(config.init_from, config.init_image_size)
            config, vit, taken = adopt(weights, config, vit, given)
            fitted, report = fit_weights(weights, vit)
            news = [f"weights of {config.init_from} ({weights.format}): {'; '.join(report)}",
                    "with them: " + ", ".join(f"{k} {v}" for k, v in taken.items())]
        elif config.recipe == "finetune" and resume is None and not config.dry_run:
            raise ValueError("--recipe finetune needs --init-from WEIGHTS: a checkpoint or output "
                             "directory of this program, or a file of another library")
        check_fp8(config, vit, micro, world, device)
        if config.dry_run:
            if rank == 0:
                dry_run(config, vit, train_set, val_set, total_steps, batch, device)
            return
        on_rank_0(grid, lambda: check_output_dir(config, vit))
        if not (Path(config.output_dir) / "checkpoints").is_dir():
            raise ValueError(f"--output-dir {config.output_dir} is not shared by all nodes: rank "
                             f"{rank} does not see what rank 0 created")
        if config.tensorboard:
            try:
                importlib.import_module("torch.utils.tensorboard")
            except Exception as e:
                raise ValueError(f"--tensorboard needs `pip install tensorboard`: {e}") from e
        if resume is not None:
            check_same_model(resume, read_meta(resume), config, vit, classes)

        # ---- model and optimizer
        model, kernel, why = build_model(config, vit, grid, device)
        load_weights(model, fitted)
        fitted = weights = None  # gives the memory back
        optimizer = build_optimizer(config, model, grid)
        start_step, images_seen = 0, 0
        if resume is not None:
            meta = load_checkpoint(resume, optimizer)
            start_step, images_seen = meta["step"], meta["images_seen"]
        compiled = compile_if_asked(model, config, device)

    # ---- what will run
    decay, no_decay = optimizer.decay_names()
    log.print(f"model {config.model}: {vit.num_params / 1e6:,.2f} M parameters, {vit.seq_length} "
              f"tokens, {len(classes)} classes")
    log.print(f"batch {config.global_batch_size} = micro-batch {micro} x dp {dp} x accumulation "
              f"{accumulation}; tp {grid.tp.size}, {grid.world.size} x {_device_name(device)}")
    log.print(f"data {config.data}: {len(train_set):,} training and {len(val_set):,} validation "
              f"images; {total_steps:,} steps = "
              f"{total_steps * config.global_batch_size / len(train_set):,.1f} epochs")
    log.print(f"precision {config.precision}, attention {kernel} ({why}), {compiled}"
              + peers_text(model, optimizer))
    log.print(f"weight decay {config.weight_decay} on {len(decay)} matrices, none on "
              f"{len(no_decay)} biases, norms, tokens and positions")
    if config.warmup_steps >= total_steps:
        log.print(f"note: --warmup-steps {config.warmup_steps:,} is no shorter than the run; the "
                  f"peak --lr {config.lr} is not reached")
    log.print(f"resuming from {resume}: step {start_step:,}, image {images_seen:,}"
              if resume else "starting fresh: no checkpoint to resume from")
    for line in news:
        log.print(line)

    # ---- the loop's parts
    local_batch = micro // grid.tp.size
    train_loader = data.train_loader(
        train_set, config, vit.image_hw, local_batch, grid.world.rank, grid.world.size,
        images_seen, total_steps - start_step, device)
    val_loader = data.eval_loader(val_set, config, vit.image_hw, local_batch,
                                         grid.world.rank, grid.world.size, device)
    unreadable = data.Unreadable(train_set, config.max_unreadable)
    prepare = preparer(config, device)

    def save(step: int) -> Path:
        meta = dict(images_seen=images_seen + (step - start_step) * config.global_batch_size,
                    total_steps=total_steps, classes=classes, vit=to_plain(vit),
                    config=to_plain(config), torch=torch.__version__)
        return save_checkpoint(Path(config.output_dir) / "checkpoints", step, optimizer, meta,
                               config.keep_last)

    def score(step: int) -> dict | None:
        with autocast(config, device):
            result = evaluate(model, val_loader, prepare, stop, grid, device)
        if result is not None:
            result = report_scores(log, result, val_set, f"step {step}: ")
            log.metrics({"step": step, **result})
        return result

    readback, bad_steps, peak = Readback(), 0, peak_flops(device)
    clock = dict(start=time.perf_counter(), step=start_step, wait=0.0, warm=False)
    trained = dict(images=0, seconds=0.0)

    def report(step: int, values: list[float], now: float) -> None:
        """Logs one finished step. values: loss sum, correct, images, gradient norm."""
        nonlocal bad_steps
        loss_sum, correct, count, norm = values
        bad_steps = 0 if math.isfinite(norm) else bad_steps + 1
        if bad_steps:
            log.print(f"step {step}: gradient norm {norm}, loss {loss_sum / max(count, 1):.4f}; "
                      f"step skipped, no weight changed ({bad_steps} in a row)")
        if bad_steps == MAX_BAD_STEPS:
            raise RuntimeError(f"non-finite gradients in {bad_steps} steps in a row, the last one "
                               f"{step}; lower --lr or use --precision fp32. The checkpoints in "
                               f"{config.output_dir} are from before")
        if log.bar is not None:
            log.bar.update(1)
        if step % config.log_interval and step != total_steps:
            return
        seconds, steps = now - clock["start"], step - clock["step"]
        images = steps * config.global_batch_size
        rate = images / seconds
        if clock["warm"]:  # the first interval compiles and fills caches
            trained["images"] += images
            trained["seconds"] += seconds
        mfu = rate * 3 * vit.flops_per_image / (peak * grid.world.size) if peak else None
        epoch = (images_seen + (step - start_step) * config.global_batch_size) / len(train_set)
        values = dict(
            step=step, epoch=round(epoch, 4), loss=loss_sum / max(count, 1),
            accuracy=correct / max(count, 1), lr=learning_rate(step - 1, config, total_steps),
            grad_norm=norm, images_per_second=rate, mfu=mfu, memory_gib=memory_gib(optimizer),
            data_wait=clock["wait"] / seconds)
        log.metrics(values)
        line = (f"step {step:>6} | loss {values['loss']:.4f} | acc {values['accuracy']:.3f} | lr "
                f"{values['lr']:.2e} | norm {norm:.3f} | {rate:,.0f} img/s"
                + (f" | mfu {100 * mfu:.1f} %" if mfu else "")
                + f" | {values['memory_gib']:.1f} GiB"
                + f" | data wait {100 * values['data_wait']:.0f} %")
        log.print(line)
        clock.update(start=now, step=step, wait=0.0, warm=True)

    # ---- train
    log.open(config, start_step, total_steps)
    model.train()
    batches, inflight = iter(train_loader), collections.deque()
    step, result, saved, stopped, bad = start_step, None, None, False, set()
    with kernel_context(kernel):
        while step < total_steps and not stopped:
            # Dropout of a step depends on (seed, step, rank) only: nothing to save for a resume.
            torch.manual_seed(stable_seed(config.seed, "dropout", step, grid.world.rank))
            sums = torch.zeros(3, device=device)  # loss, correct, images
            for i in range(accumulation):
                stopped, news = stop.poll(len(bad))
                if news:
                    all_bad = set().union(*all_gather_object(bad, grid))
                    for name in unreadable.add(all_bad):
                        log.print(f"unreadable image, skipped: {name}")
                    bad = set()
                if stopped or unreadable.error():
                    break
                waited = time.perf_counter()
                images, labels, indices, *jitter = next(batches)
                clock["wait"] += time.perf_counter() - waited
                bad |= data.unreadable_in(labels, indices) - unreadable.indices
                sums += forward_backward(model, optimizer, prepare, config,
                                         (images, labels, *jitter), last=i == accumulation - 1)
                _limit_inflight(inflight, device)
            else:
                norm = optimizer.step(learning_rate(step, config, total_steps))
                if grid.world.size > 1:
                    dist.all_reduce(sums)
                step += 1
                readback.put(step, torch.cat([sums, norm[None]]))
                last = step == total_steps
                evaluating = last or (config.eval_interval and step % config.eval_interval == 0)
                saving = last or (config.save_interval and step % config.save_interval == 0)
                for finished in readback.ready(lag=0 if evaluating or saving else 1):
                    report(*finished)
                if evaluating:
                    result = score(step)
                if saving:
                    saved = save(step)
                if evaluating or saving:
                    clock.update(start=time.perf_counter(), step=step, wait=0.0)
                continue
            # Stopped, or too many unreadable images: the half-summed step is dropped.
            for finished in readback.ready(lag=0):
                report(*finished)
            saved = save(step)
            if not stopped:
                raise RuntimeError(f"{unreadable.error()}. Saved {saved}")
        if not stopped and result is None:
            result = score(step)  # resumed after the last step
    log.close()
    if stopped:
        log.print(f"stopped by {stop.name or 'a signal'} at step {step:,}; saved {saved}; "
                  f"the same command continues")
    elif result is not None:
        rate = trained["images"] / trained["seconds"] if trained["seconds"] else 0
        log.print(f"done: top-1 {100 * result['val_top1']:.2f} % on {result['val_count']:,} images"
                  + (f", {rate:,.0f} images/s" if rate else "")
                  + f", checkpoint {saved or resume}")
    end_processes()


def _limit_inflight(inflight, device: torch.device) -> None:
    """Keeps the host at most two micro-batches ahead, so that a stop signal is obeyed in time."""
    if device.type == "cuda":
        inflight.append(torch.cuda.Event())
        inflight[-1].record()
        if len(inflight) > 2:
            inflight.popleft().synchronize()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def run() -> None:
    """main() as a program: a failing rank prints its own traceback and leaves at once, where a
    normal exit would wait for the other ranks; torchrun then ends those and repeats the traceback.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no UTF-8
    try:
        record(main)()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    run()
