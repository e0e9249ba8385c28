"""Score a model on images whose classes are known, or predict those of any images.

    python evaluate.py --checkpoint output --data DIR               # top-1, top-5, loss of DIR/val
    python evaluate.py --checkpoint output --predict FOLDER         # predictions.csv and .png
    torchrun --standalone --nproc_per_node 8 evaluate.py --checkpoint output --data DIR

The checkpoint may be an output directory or checkpoint of train.py, or a file of weights of another
library (weights.py). Any number of processes counts each image exactly once.
"""

import csv
import dataclasses
import io
import math
import os
import re
import sys
import unicodedata
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

import data
from checkpoint import check_writable, write_atomically
from configs import EvalConfig, parse
from parallel import all_gather_object, on_rank_0
from plan import check_layout, largest_micro_batch
from runtime import (
    Run,
    build_model,
    device_name,
    end_processes,
    run_program,
    start_processes,
    user_errors,
)


# ----------------------------------------------------------------------------- scores
@torch.no_grad()
def evaluate(run: Run, model, loader) -> dict | None:
    """Scores every image of `loader` exactly once, for any number of ranks, batch or workers; the
    model is left in the mode it was in.

    Padding and unreadable images carry label -100; sums, not means, are reduced. Returns val_loss,
    val_top1, val_top5 (shares), val_count (images scored) and val_unreadable (the indices of the
    others); None if stopped.
    """
    training, bad = model.training, set()
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=run.device)  # loss, top-1, top-5, count
    for images, labels, indices in loader:
        if run.stop.poll():
            break
        bad |= data.unreadable_in(labels, indices)
        images, labels = run.prepare(images, labels)
        with run.autocast():
            logits = model(images).float()
        top5 = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=data.IGNORE)
        sums += torch.stack([loss, top5[:, 0].sum(), top5.any(1).sum(), (labels >= 0).sum()])
    model.train(training)
    if run.stop.agreed:
        return None
    if run.grid.world.size > 1:
        dist.all_reduce(sums)
    loss, top1, top5, count = sums.tolist()
    share = 1 / max(count, 1)
    bad = set().union(*all_gather_object(bad, run.grid.world))
    return dict(val_loss=loss * share, val_top1=top1 * share, val_top5=top5 * share,
                val_count=int(count), val_unreadable=sorted(bad))


def score(run: Run, model, loader, source, step: int | None = None) -> dict | None:
    """evaluate's result, printed, with unreadable images by name and their number alone; also in
    metrics.jsonl if it is of a training step. None if stopped."""
    result = evaluate(run, model, loader)
    if result is None:
        return None
    bad, count = result["val_unreadable"], result["val_count"]
    for index in bad:
        run.log.print(f"unreadable image, skipped: {source.name(index)}")
    run.log.print((f"step {step}: " if step is not None else "")
                  + f"validation top-1 {100 * result['val_top1']:.2f} %, top-5 "
                  f"{100 * result['val_top5']:.2f} %, loss {result['val_loss']:.4f} on {count:,} "
                  f"images" + (f" ({len(bad)} unreadable)" if bad else ""))
    result = {**result, "val_unreadable": len(bad)}
    if step is not None:
        run.log.metrics({"step": step, **result})
    return result


# ----------------------------------------------------------------------------- predictions
@torch.no_grad()
def predict(run: Run, model, loader, count: int, k: int) -> tuple[list, list] | None:
    """The k best of each of `count` images: probabilities [count, k], classes [count, k].

    Each rank fills the rows of its images, and the sum over ranks is the table; the row of an
    unreadable image stays zero. None if stopped.
    """
    model.eval()
    probabilities, classes = torch.zeros(count, k), torch.zeros(count, k, dtype=torch.long)
    for images, labels, indices in loader:
        if run.stop.poll():
            return None
        seen = labels >= 0
        with run.autocast():
            best = model(run.prepare(images, labels)[0]).float().softmax(1).topk(k)
        probabilities[indices[seen]] = best.values.cpu()[seen]
        classes[indices[seen]] = best.indices.cpu()[seen]
    if run.grid.world.size > 1:
        dist.all_reduce(probabilities)  # on the CPU: through gloo
        dist.all_reduce(classes)
    return probabilities.tolist(), classes.tolist()


def write_predictions(run: Run, best: tuple[list, list], source, names: list[str],
                      out: Path) -> None:
    """predictions.csv, a row for each image, and predictions.png, a contact sheet of SHEET of them,
    evenly spaced: files are sorted, and the first ones would be of one folder."""
    k, text, shown = len(best[0][0]), io.StringIO(), []
    readable = [index for index, p in enumerate(best[0]) if p[0]]
    step = max(len(readable) / SHEET, 1)
    on_sheet = {readable[int(i * step)] for i in range(min(len(readable), SHEET))}
    table = csv.writer(text)
    table.writerow(["path"] + [f"{column}_{i + 1}" for i in range(k)
                               for column in ("class", "probability")])
    for index, (probabilities, labels) in enumerate(zip(*best, strict=True)):
        cells = [(names[label], f"{p:.4f}") for p, label in zip(probabilities, labels, strict=True)]
        if not probabilities[0]:  # unreadable: a row without predictions
            run.log.print(f"unreadable image: {source.name(index)}")
            cells = []
        elif index in on_sheet:
            note = f"{100 * probabilities[0]:.1f} %  {Path(source.name(index)).name}"
            shown.append((source.load(index)[0], names[labels[0]], note))
        table.writerow([source.name(index), *(cell for pair in cells for cell in pair)])
    # names that are no UTF-8 keep their bytes
    csv_bytes = text.getvalue().encode("utf-8", "surrogateescape")
    write_atomically(out / "predictions.csv", lambda file: file.write(csv_bytes))
    if shown:
        sheet = contact_sheet(shown)
        write_atomically(out / "predictions.png", lambda file: sheet.save(file, "PNG"))
    run.log.print(f"{len(source):,} images, {sum(not p[0] for p in best[0]):,} unreadable: "
                  f"{out / 'predictions.csv'}" + (f", {out / 'predictions.png'}" if shown else ""))


def class_names(classes: tuple[str, ...] | None, count: int) -> list[str]:
    """What to call the classes. ImageNet's, named n + 8 digits, are in the order of torchvision's
    words; 1,000 classes without a name are taken to be ImageNet's."""
    if count == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in classes or ()):
        from torchvision.models import ViT_B_16_Weights
        return ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
    return list(classes or (f"class {i}" for i in range(count)))


SHEET, COLUMNS, TILE, CAPTION = 30, 6, 176, 44  # images, images in a row, pixels


def contact_sheet(images: list[tuple[Image.Image, str, str]]) -> Image.Image:
    """(image, title, note) of at most SHEET images, each on a tile with its caption below."""
    fonts = [ImageFont.load_default(size) for size in (15, 13)]
    columns, pad = min(COLUMNS, len(images)), 12
    width, height, rows = TILE + pad, TILE + CAPTION + pad, math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * width + pad, rows * height + pad), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, *caption) in enumerate(images):
        x, y = pad + i % columns * width, pad + i // columns * height
        draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), fill=(238, 238, 238))
        tile = ImageOps.contain(image, (TILE, TILE), Image.Resampling.BICUBIC)
        sheet.paste(tile, (x + (TILE - tile.width) // 2, y + (TILE - tile.height) // 2))
        for text, font, top, grey in zip(caption, fonts, (4, 23), (20, 110)):
            text = unicodedata.normalize("NFKD", text)  # Pillow's own font is ASCII: u for u-umlaut
            text = "".join(c for c in text if not unicodedata.combining(c))
            text = text.encode("ascii", "replace").decode()
            while draw.textlength(text, font) > TILE:
                text = text[:-4] + "..."
            draw.text((x, y + TILE + top), text, fill=(grey,) * 3, font=font)
    return sheet


# ----------------------------------------------------------------------------- the command
def main(argv: list[str] | None = None) -> None:
    with user_errors("evaluate.py"):
        import weights
        config, given = parse(EvalConfig, argv)
        source = weights.read_weights(config.checkpoint, config.init_image_size)
        told = ("num_attention_heads", "layernorm_eps", "gelu_approximate", "image_size", "mean",
                "std", "crop_ratio", "precision")
        vit, facts = weights.whole_model(source, config.checkpoint,
                                         **{name: getattr(config, name) for name in told})
        if "num_workers" not in given:  # one to a core, else torch warns
            cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            config = dataclasses.replace(config, num_workers=min(config.num_workers, max(cores, 1)))
        config = dataclasses.replace(config, **{name: facts[name] for name in (
            "mean", "std", "crop_ratio", "precision")})
        check_layout(config, vit, int(os.environ.get("WORLD_SIZE", 1)),
                     "cuda" if torch.cuda.is_available() else "cpu")
        grid, device = start_processes(config)
        name, tp = weights.model_name(facts), config.tensor_parallel_size
        micro = config.micro_batch_size or largest_micro_batch(name, tp, device.type == "cuda")
        run = Run(config, vit, grid, device, micro_batch=micro)
        images = on_rank_0(grid, lambda: open_images(config, vit, facts.get("classes")))
        fitted, report = weights.fit_weights(source, vit)
        model, kernels = build_model(run)
        weights.load_weights(model, fitted)
        model.to(torch.bfloat16 if config.o2 else torch.float32)
        loader = data.eval_loader(images, config, vit.image_hw, run.local_batch, grid.world.rank,
                                  grid.world.size, device)
    run.log.print(f"model {name or 'of its own shape'} of {config.checkpoint} ({source.format}): "
                  f"{vit.num_params / 1e6:,.2f} M parameters, {vit.num_classes} classes; "
                  f"{'; '.join(report)}")
    run.log.print(f"images {' x '.join(map(str, vit.image_hw))} px, crop ratio {config.crop_ratio},"
                  f" mean {config.mean}, std {config.std}")
    run.log.print(f"batch {micro} x dp {grid.dp.size}; tp {tp}, {grid.world.size} x "
                  f"{device_name(device)}, precision {config.precision}, {kernels}")
    if config.predict:
        best = predict(run, model, run.log.progress(loader), len(images), min(5, vit.num_classes))
        if best is None:
            sys.exit(f"stopped by {run.stop.name or 'a signal'}: nothing was written")
        if grid.world.rank == 0:
            names = class_names(facts.get("classes"), vit.num_classes)
            write_predictions(run, best, images, names, Path(config.output_dir))
    elif score(run, model, run.log.progress(loader), images) is None:
        sys.exit(f"stopped by {run.stop.name or 'a signal'}: not every image was scored")
    end_processes()


def open_images(config: EvalConfig, vit, classes: tuple[str, ...] | None):
    """The images to score or to predict; raises ValueError if they are not of the model's classes,
    or where the predictions cannot be written."""
    if config.predict:
        images = data.scan_flat(config.predict, "")
        check_writable(Path(config.output_dir))
        return images
    images = data.open_val(config.data, vit.image_hw, config.val_labels, list(classes or ()))
    if classes:
        data.check_same_classes(f"the model of {config.checkpoint}", list(classes),
                                f"{config.data}/val", images.classes)
    elif len(images.classes) != vit.num_classes:
        raise ValueError(f"--data: {config.data}/val has {len(images.classes)} classes, "
                         f"--checkpoint {config.checkpoint} has {vit.num_classes}")
    return images


if __name__ == "__main__":
    run_program(main)
