"""Score a model on images whose classes are known, or predict those of any images.

    python evaluate.py --checkpoint output --data DIR           # top-1, top-5, loss; classes.csv
    python evaluate.py --checkpoint output --predict FOLDER     # predictions.csv and .png
    python evaluate.py --checkpoint output --predict IMAGE
    torchrun --standalone --nproc_per_node 8 evaluate.py --checkpoint output --data DIR

The checkpoint may be an output directory or checkpoint of train.py, or a file of weights of another
library (weights.py). One pass over the images makes one table, of which all else is arithmetic; any
number of processes counts each image exactly once. On ImageNet's validation images --real-labels
scores ReaL's labels too; --data takes ImageNet-V2's folders as they are.
"""

import csv
import dataclasses
import io
import math
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import device_views
import splits
from archives import Index
from checkpoint import check_writable, write_atomically
from configs import EvalConfig
from figures import SHEET, contact_sheet
from flags import parse
from meter import counted
from parallel import Grid
from plan import check_layout, largest_micro_batch
from runtime import (
    Run,
    build_model,
    device_name,
    end_processes,
    on_rank_0,
    run_program,
    start_processes,
    user_errors,
)
from sources import read_real_labels, scan_flat


# ----------------------------------------------------------------------------- one pass
class Predictions(NamedTuple):
    """What a model says of n images, on the CPU. The row of an unreadable one has label -100 and
    is zero elsewhere; without classes, as of --predict, labels and losses mean nothing."""
    labels: torch.Tensor         # int64 [n]
    losses: torch.Tensor         # float64 [n], -log of the label's probability
    probabilities: torch.Tensor  # float64 [n, k] of the k best classes, the best first
    classes: torch.Tensor        # int64 [n, k]

    @property
    def right(self) -> torch.Tensor:
        """bool [n, k]: where the label is; never more than once in a row."""
        return self.classes == self.labels[:, None]


@torch.no_grad()
def predict(run: Run, model, loader, count: int) -> Predictions | None:
    """The table of the `count` images of `loader`, the five best classes each; None if stopped. The
    model is left in the mode it was in.

    Each rank fills the rows of its own images, on the device, and the sum over ranks is the table:
    the same for any number of ranks, batch or workers.
    """
    training, k = model.training, min(5, run.vit.num_classes)
    model.eval()
    table = torch.zeros(count + 1, 2 + 2 * k, dtype=torch.float64, device=run.device)
    for images, labels, indices, draws in loader:
        if run.stop.poll():
            break
        images, labels, _ = run.prepare(images, labels, draws)
        with run.autocast():
            logits = model(images).float()
        best = logits.topk(k).indices
        known = torch.cat([logits.softmax(1).gather(1, best), best], 1).double()
        known = known.where((labels >= 0)[:, None], 0)
        loss = F.cross_entropy(logits, labels, reduction="none", ignore_index=data.IGNORE)
        # padding has index -1: the last row, which is cut off
        table[indices.to(run.device)] = torch.cat([torch.stack([labels, loss], 1), known], 1)
    model.train(training)
    if run.stop.agreed:
        return None
    if run.grid.world.size > 1:
        dist.all_reduce(table)
    table = table[:-1].cpu()
    return Predictions(table[:, 0].long(), table[:, 1], table[:, 2:2 + k], table[:, 2 + k:].long())


# ----------------------------------------------------------------------------- scores
def score(run: Run, model, loader, source, step: int | None = None) -> dict | None:
    """The scores of one pass, told; None if stopped."""
    table = predict(run, model, loader, len(source))
    return None if table is None else tell(run, table, source, step)


def tell(run: Run, table: Predictions, source, step: int | None = None) -> dict:
    """val_loss, val_top1, val_top5 (shares), val_count (images scored) and val_unreadable (images),
    printed, with the unreadable ones by name; also in metrics.jsonl if of a training step."""
    seen = table.labels >= 0
    count, bad = int(seen.sum()), (~seen).nonzero()[:, 0].tolist()
    loss, top1, top5 = (x.sum().item() / max(count, 1) for x in (
        table.losses, table.right[:, 0], table.right))
    for index in bad:
        run.log.print(f"unreadable image, skipped: {source.name(index)}")
    run.log.print((f"step {step}: " if step is not None else "")
                  + f"validation top-1 {100 * top1:.2f} %, top-5 {100 * top5:.2f} %, loss "
                  f"{loss:.4f} on {counted(count, 'image')}"
                  + (f" ({len(bad)} unreadable)" if bad else ""))
    result = dict(val_loss=loss, val_top1=top1, val_top5=top5, val_count=count,
                  val_unreadable=len(bad))
    if step is not None:
        run.log.metrics({"step": step, **result})
    return result


def confusions(table: Predictions) -> Counter:
    """{(class, predicted class): images}."""
    seen = table.labels >= 0
    return Counter(zip(table.labels[seen].tolist(), table.classes[seen, 0].tolist()))


CLASS_SCORES = ("class", "images", "top1", "top5", "taken_for", "times")


def class_scores(table: Predictions, names: list[str]) -> list[tuple]:
    """A row CLASS_SCORES for each class: top-1 and top-5 as shares of its images (nan without any),
    and the class that most of its mistakes were taken for."""
    found, most = confusions(table), {}
    for (label, other), times in found.most_common():
        if label != other:
            most.setdefault(label, (names[other], times))
    images, top5 = (torch.bincount(table.labels[chosen], minlength=len(names)).tolist()
                    for chosen in (table.labels >= 0, table.right.any(1)))
    return [(name, n, found[i, i] / n if n else math.nan, hits / n if n else math.nan,
             *most.get(i, ("", 0))) for i, (name, n, hits) in enumerate(zip(names, images, top5))]


def tell_classes(run: Run, table: Predictions, names: list[str], out: Path | None,
                 most: int = 10) -> None:
    """out/classes.csv, a row for each class; prints the `most` with the lowest top-1."""
    rows, place = class_scores(table, names), "in no file without --output-dir"
    if out:
        write_csv(place := out / "classes.csv", [CLASS_SCORES, *rows])
    worst = sorted((row for row in rows if row[1]), key=lambda row: row[2])[:most]
    run.log.print(f"{len(rows):,} classes: {place}; those with the lowest top-1:")
    for name, images, top1, top5, taken_for, times in worst:
        run.log.print(f"  {name}: top-1 {100 * top1:.2f} %, top-5 {100 * top5:.2f} % of "
                      f"{counted(images, 'image')}"
                      + (f"; {times:,} taken for {taken_for}" if times else ""))


def write_csv(path: Path, rows: list) -> None:
    """Whole or not at all; shares get four digits, and names that are no UTF-8 keep their bytes."""
    text = io.StringIO()
    csv.writer(text).writerows([f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row]
                               for row in rows)
    content = text.getvalue().encode("utf-8", "surrogateescape")
    write_atomically(path, lambda file: file.write(content))


# ----------------------------------------------------------------------------- predictions
def sample(table: Predictions, most: int) -> list[int]:
    """At most `most` readable images: drawn, the same each time, class by predicted class in turn,
    so that each class that is there is shown if `most` allows; in the order of these classes."""
    readable = (table.probabilities[:, 0] > 0).nonzero()[:, 0].tolist()
    turns, found = Counter(), []
    for index in random.Random(0).sample(readable, len(readable)):
        label = int(table.classes[index, 0])
        turns[label] += 1
        found.append((turns[label], label, index))
    found = sorted(found, key=lambda x: x[0])[:most]  # stable: by chance within a turn
    return [index for *_, index in sorted(found, key=lambda x: x[1:])]


def write_predictions(run: Run, table: Predictions, source, names: list[str], out: Path) -> None:
    """predictions.csv, a row for each image, and predictions.png, a contact sheet of a `sample`."""
    rows, shown = [], []
    for index, (best, labels) in enumerate(zip(*map(torch.Tensor.tolist, table[2:]), strict=True)):
        pairs = zip((names[label] for label in labels), best)
        if not best[0]:  # unreadable: a row without predictions
            run.log.print(f"unreadable image: {source.name(index)}")
        rows.append([source.name(index), *(cell for pair in pairs for cell in pair if best[0])])
    head = [f"{column}_{i + 1}" for i in range(table.classes.shape[1])
            for column in ("class", "probability")]
    write_csv(out / "predictions.csv", [["path", *head], *rows])
    for index in sample(table, SHEET):
        note = f"{100 * rows[index][2]:.1f} %  {Path(source.name(index)).name}"
        shown.append((source.load(index)[0], rows[index][1], note))
    if shown:
        sheet = contact_sheet(shown)
        write_atomically(out / "predictions.png", lambda file: sheet.save(file, "PNG"))
    else:  # an older one shows other images
        (out / "predictions.png").unlink(missing_ok=True)
    run.log.print(f"{counted(len(rows), 'image')}, {sum(len(row) == 1 for row in rows):,} "
                  f"unreadable: {out / 'predictions.csv'}"
                  + (f", {out / 'predictions.png'}" if shown else ""))
    if shown and len(rows) == 1:
        run.log.print(", ".join(f"{name} {100 * share:.1f} %" for name, share in zip(
            rows[0][1::2], rows[0][2::2])))


def class_names(classes: tuple[str, ...] | None, count: int) -> list[str]:
    """What to call the classes. ImageNet's, named n + 8 digits, are in the order of torchvision's
    words; 1,000 classes without a name are taken to be ImageNet's."""
    if count == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in classes or ()):
        from torchvision.models import ViT_B_16_Weights
        return ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
    return list(classes or (f"class {i}" for i in range(count)))


# ----------------------------------------------------------------------------- the command
def main(argv: list[str] | None = None) -> None:
    with user_errors("evaluate.py"):
        config, _ = parse(EvalConfig, argv)
        out = config.output_dir or run_of(config.checkpoint) or (config.predict and "output")
        config, out = dataclasses.replace(config, output_dir=out), Path(out) if out else None
        grid, device = start_processes(config)
        run, model, images, loader, names = open_model(config, grid, device)
        real = config.real_labels and read_real_labels(config.real_labels, images)
    table = predict(run, model, run.log.progress(loader), len(images))
    if table is None:
        sys.exit(f"stopped by {run.stop.name or 'a signal'}: nothing was written")
    if config.predict and grid.world.rank == 0:
        write_predictions(run, table, images, names, out)
    elif grid.world.rank == 0:
        tell(run, table, images)
        tell_classes(run, table, names, out)
        if real:
            hits = [best in labels for (best, *_), labels, label in zip(
                table.classes.tolist(), real, table.labels) if labels and label >= 0]
            run.log.print(f"ReaL top-1 {100 * sum(hits) / max(len(hits), 1):.2f} % on "
                          f"{counted(len(hits), 'image')}")
    end_processes()
    if not table.probabilities.any():
        text = f"evaluate.py: error: of {counted(len(images), 'image')} none can be read"
        sys.exit(1 if grid.world.rank else text)


def run_of(checkpoint: str) -> str | None:
    """The output directory of train.py that a checkpoint is or lies in, if it can be written."""
    path = Path(checkpoint)
    return next((str(folder) for folder in (path, *path.parents)[:3] if os.access(folder, os.W_OK)
                 and any(folder.glob("checkpoints/step_*"))), None)


def open_model(config: EvalConfig, grid: Grid, device: torch.device) -> tuple:
    """(run, model, images, their loader, the names of its classes) of --checkpoint and --data or
    --predict. Raises ValueError for what cannot be used."""
    import weights
    source = weights.read_weights(config.checkpoint, config.init_image_size, config.weights)
    told = ("num_attention_heads", "layernorm_eps", "gelu_approximate", "image_size", "mean",
            "std", "crop_ratio", "precision", "val_share")
    vit, facts = weights.whole_model(source, config.checkpoint,
                                     **{name: getattr(config, name) for name in told})
    config = dataclasses.replace(config, **{name: facts[name] for name in (
        "mean", "std", "crop_ratio", "precision")})
    check_layout(config, vit, grid.world.size, device.type)
    name, tp = weights.model_name(facts), config.tensor_parallel_size
    micro = config.micro_batch_size or largest_micro_batch(name, tp, device.type == "cuda")
    images = on_rank_0(grid, lambda: open_images(config, vit, facts))
    run = Run(config, vit, grid, device, micro_batch=micro)
    fitted, report = weights.fit_weights(source, vit)
    model, kernels = build_model(run)
    weights.load_weights(model, fitted)
    model.to(torch.bfloat16 if config.o2 else torch.float32)
    loader = data.eval_loader(images, config, vit.image_hw, run.local_batch, grid.world.rank,
                              grid.world.size, device)
    run.log.print(f"model {name or 'of its own shape'} of {config.checkpoint} ({source.format}): "
                  f"{vit.num_params / 1e6:,.2f} M parameters, {vit.num_classes} classes; "
                  f"{'; '.join(report)}")
    share, trained = getattr(images, "share", None), source.facts.get("val_share") or "none"
    if share == 1:
        run.log.print(f"{config.data} has no val, and --val-share {trained} of it does not leave "
                      f"the {facts['images']:,} images of training: it is other data, and all "
                      f"{len(images):,} images are scored")
    elif share:
        run.log.print(f"{config.data} has no val: {len(images):,} of its images, --val-share "
                      f"{share} (training held out {trained} of its own); all: --val-share 1")
    if getattr(images, "told", None):
        run.log.print(images.told)
    run.log.print(f"images {' x '.join(map(str, vit.image_hw))} px, crop ratio {config.crop_ratio},"
                  f" mean {config.mean}, std {config.std}")
    run.log.print(f"batch {micro} x dp {grid.dp.size}; tp {tp}, {grid.world.size} x "
                  f"{device_name(device)}, precision {config.precision}, {kernels}; "
                  f"{device_views.choose(config, images, device, run.local_batch)[1]}")
    return run, model, images, loader, class_names(facts["classes"], vit.num_classes)


def open_images(config: EvalConfig, vit, facts: dict):
    """The images to score or to predict; raises ValueError if they are not of the model's classes,
    or where the results cannot be written."""
    classes = facts["classes"]
    if config.output_dir:
        check_writable(Path(config.output_dir))
    if config.predict:
        return scan_flat(config.predict, "")
    of_classes, of_images = (facts.get(name, 1) for name in (
        "classes_fraction", "data_per_class_fraction"))
    # Of training's own folder, which may have grown, or of as many images elsewhere, a part is new.
    own = config.val_share or min(of_classes, of_images) < 1 or os.path.realpath(
        config.data) == os.path.realpath(facts.get("data") or "")
    if config.data != "shapes":
        splits.check_share(config.data, config.val_share)
    images = splits.open_val(config.data, vit.image_hw, config.val_labels,
                             list(classes) or list(map(str, range(vit.num_classes))),
                             facts.get("val_share"), Index.of_run(config),
                             None if own else facts.get("images"), part=of_classes < 1)
    if classes:
        splits.check_same_classes(f"the model of {config.checkpoint}", list(classes),
                                  config.data, images.classes)
    elif len(images.classes) != vit.num_classes:
        raise ValueError(f"--data: {config.data} has {len(images.classes)} classes, "
                         f"--checkpoint {config.checkpoint} has {vit.num_classes}")
    return images


if __name__ == "__main__":
    run_program(main)
