"""What a run learned, as one page: OUTPUT/report.html, which opens anywhere and needs no network.

    python report.py OUTPUT [--data DIR]        # without: the run's own data
    python report.py RUN1 RUN2                  # side by side, in RUN1/report.html
    python train.py ... --report                # at the end of a run

One process makes one pass over the validation images (evaluate.predict): of torchrun's, rank 0, and
the others leave. Beside what evaluate.py scores:

    curves        metrics.jsonl; of long runs means of neighbours (on a log axis of logarithms)
    calibration   ECE = sum_b n_b/n |accuracy_b - confidence_b|, 15 equal bins b (arXiv:1706.04599)
    attention     e A_L, A_l = softmax(q k^T / sqrt(hd)) of block l, mean over heads, [S, S], e the
                  token that is read; rollout e (A_L + I)/2 ... (A_1 + I)/2 (arXiv:2005.00928)
    weights       cosines of the position embeddings, principal components of the patch filters

Charts are SVG, other pictures JPEG and PNG inside the page (figures.py); report.css is its look.
"""

import contextlib
import json
import math
import os
import sys
import time
from html import escape as esc
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from augment import eval_transform
from checkpoint import newest_checkpoint, read_meta, write_atomically
from configs import EvalConfig, ReportConfig, TrainConfig, ViTConfig
from evaluate import Predictions, class_scores, confusions, open_model, predict, sample, tell
from figures import chart, figure, img, mosaic, viridis
from flags import parse, to_plain
from model import LastBlock
from parallel import Grid
from runtime import Run, run_program, user_errors

MATRIX, LIST = 30, 15    # most classes of a confusion matrix, and entries of the lists instead
TILES, EXAMPLES = 18, 6  # images of a kind, images whose attention is drawn
BINS, COLOURS = 15, 6


class Opened(NamedTuple):
    """A run, ready for its pass."""
    name: str          # its output directory
    meta: dict         # of its checkpoint
    lines: list[dict]  # of its metrics.jsonl
    run: Run
    model: Any
    images: Any
    loader: Any
    names: list[str]   # of its classes


def open_run(output: str, config: ReportConfig, given: dict) -> Opened:
    """The newest checkpoint of an output directory, with its data. Raises ValueError without."""
    meta, lines = read_meta(newest_checkpoint(Path(output))), []
    trained, log = meta["config"], Path(output) / "metrics.jsonl"
    for line in log.read_text().splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError):  # a line cut by a crash
            lines.append(json.loads(line))
    own = {} if config.data else {name: trained.get(name)
                                  for name in ("data", "val_labels", "index")}
    place = output if os.access(output, os.W_OK) else config.output[0]  # of the index of its tars
    told = {**given, **own, "checkpoint": output, "output_dir": place}
    del told["output"]
    opened = open_model(EvalConfig(**told, compile=False), Grid(),  # compiled: no hooks
                        torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return Opened(os.path.normpath(output), meta, lines, *opened)


# ----------------------------------------------------------------------------- the page
def page(opened: list[Opened], tables: list[Predictions]) -> str:
    """The whole document; a panel for each run, under its name if there are several."""
    def each(panel):
        panels = [(f"<h3>{esc(one.name)}</h3>" if len(opened) > 1 else "") + panel(one, table)
                  for one, table in zip(opened, tables)]
        return f'<div class="runs"><div>{"</div><div>".join(panels)}</div></div>'
    title = esc(" and ".join(one.name for one in opened))
    style = Path(__file__).with_suffix(".css").read_text()
    parts = [
        ("Curves", "Means of neighbours where more steps were logged than can be drawn. A dashed "
         "line says where a run was taken up again.", curves(opened)),
        ("Classes", "Top-1 accuracy on the validation images of each class, and what its mistakes "
         "were taken for.", each(classes)),
        ("Calibration", "How often the model is right when it is this confident. On the grey line "
         "confidence can be taken at its word; below it the model is too sure.",
         calibration(opened, tables)),
        ("Most confident mistakes", "Wrong, and sure of it: often odd images or odd labels. All "
         "images are cut as the model sees them.", each(mistakes)),
        ("Predictions", "Drawn at random, from each predicted class in turn.",
         each(lambda one, table: tiles(one, table, sample(table, TILES)))),
        ("Attention", "The image; where the last block's output token looks, the mean over heads; "
         "and this followed back through all blocks (rollout). Bright is much.", each(attention)),
        ("Weights", "What depends on no image.", each(lambda one, _: weights(one))),
        ("Settings", "What differs from the defaults.", settings(opened))]
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{style}</style><main><h1>{title}</h1>{each(headline)}" + "".join(
                f"<section><h2>{name}</h2><p>{text}</p>{content}</section>"
                for name, text, content in parts) + "</main></html>\n")


def headline(one: Opened, table: Predictions) -> str:
    """The figures that one asks for first."""
    result, meta = tell(one.run, table, one.images), one.meta
    rates = [line["images_per_second"] for line in one.lines if "images_per_second" in line]
    figures = {
        "top-1": f"{100 * result['val_top1']:.2f} %", "top-5": f"{100 * result['val_top5']:.2f} %",
        "loss": f"{result['val_loss']:.4f}", "calibration error": f"{ece(table):.2f} %",
        "validation images": f"{result['val_count']:,}", "classes": f"{len(one.names):,}",
        "model": f"{meta['config']['model']}, {one.run.vit.num_params / 1e6:,.2f} M",
        "steps": f"{meta['step']:,} of {meta['total_steps']:,}",
        "images/s": f"{np.median(rates):,.0f}" if rates else "not logged",
        "machine": meta.get("machine", "not recorded"), "torch": meta["torch"]}
    return '<dl class="figures">' + "".join(
        f"<div><dt>{k}</dt><dd>{esc(v)}</dd></div>" for k, v in figures.items()) + "</dl>"


def settings(opened: list[Opened]) -> str:
    """A row for each setting that is not the default of every run, a column for each run."""
    usual = to_plain(ViTConfig()) | to_plain(TrainConfig())
    rows = {key: [(one.meta["vit"] | one.meta["config"]).get(key) for one in opened]
            for key in usual}
    return '<div class="wide"><table class="lines">' + "".join(
        f"<tr><th>{key}" + "".join(f"<td>{esc(str(value))}" for value in row)
        for key, row in rows.items() if set(map(str, row)) != {str(usual[key])}) + "</table></div>"


# ----------------------------------------------------------------------------- curves
def curves(opened: list[Opened]) -> str:
    """What metrics.jsonl holds, over steps, all runs in one chart."""
    many = len(opened) > 1
    marks = sorted({line["step"] for one in opened for line in one.lines if "resumed" in line})

    def draw(title, unit, wanted, scale=float, factor=1):
        series = []
        for i, one in enumerate(opened):
            for j, (key, kind) in enumerate(wanted.items()):
                points = [(line["step"], factor * line[key]) for line in one.lines
                          if line.get(key) is not None]
                series.append((f"{one.name} {kind}" if many else kind,
                               f"--c{(i if many else j) % COLOURS}", "val" in key, points))
        return chart(title, unit, series, "step", scale, marks)
    drawn = (
        draw("Loss", "nats", {"loss": "training", "val_loss": "validation"})
        + draw("Top-1", "%", {"accuracy": "training", "val_top1": "validation"}, factor=100)
        + draw("Learning rate", "", {"lr": ""})
        + draw("Gradient norm", "log scale", {"grad_norm": ""}, math.log)
        + draw("Rate", "images/s", {"images_per_second": ""}))
    return f'<div class="charts">{drawn or "The output directory has no metrics.jsonl."}</div>'


# ----------------------------------------------------------------------------- classes
def classes(one: Opened, table: Predictions) -> str:
    """Accuracy by class, and the confusion matrix; of many classes the ends of both lists."""
    rows = [row for row in class_scores(table, one.names) if row[1]]

    def bars(title, rows):
        return figure(title, below="<table class=bars>" + "".join(
            f'<tr><th>{esc(name)}</th><td class="bar" style="--v:{100 * top1:.1f}%"></td>'
            f"<td>{100 * top1:.1f} % of {images:,}</td>" for name, images, top1, *_ in rows
        ) + "</table>")
    if len(one.names) <= MATRIX:
        return f'<div class="runs">{bars("Accuracy", rows)}{matrix(one, table)}</div>'
    rows = sorted(rows, key=lambda row: row[2])
    ranked = [(100 * (i + 0.5) / len(rows), 100 * row[2]) for i, row in enumerate(rows)]
    pairs = "".join([f"<tr><th>{esc(one.names[a])}</th><td>{esc(one.names[b])}</td><td>{n:,}</td>"
                    for (a, b), n in confusions(table).most_common() if a != b][:LIST])
    return ('<div class="charts">' + chart(
        "Accuracy", "%", [("", "--c0", False, ranked)], "% of the classes, lowest first")
        + bars("Lowest", rows[:LIST]) + bars("Highest", rows[:-LIST - 1:-1])
        + figure("Most confused pairs", below='<table class="lines"><tr><th>class</th><td>taken '
                 f"for</td><td>images</td>{pairs}</table>") + "</div>")


def matrix(one: Opened, table: Predictions) -> str:
    """The confusion matrix: rows are classes, columns predictions, shaded by share of the row."""
    names, found, brief = one.names, confusions(table), max(map(len, one.names)) < 3
    rows = "<tr><td>" + "".join(f"<th>{esc(x) if brief else i}" for i, x in enumerate(names, 1))
    for i, name in enumerate(names):
        total = max(sum(found[i, j] for j in range(len(names))), 1)
        rows += f"<tr><th>{esc(name)}{'' if brief else f' <i>{i + 1}</i>'}" + "".join(
            f'<td class="{"hit" if i == j else "miss"}" title="{esc(name)} taken for {esc(other)}" '
            f'style="--v:{100 * (found[i, j] / total) ** 0.5:.0f}%">{found[i, j] or ""}'
            for j, other in enumerate(names))
    return figure("Confusions", "rows are classes, columns predictions", kind="wide",
                  below=f'<table class="matrix">{rows}</table>')


# ----------------------------------------------------------------------------- calibration
def bins(table: Predictions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the BINS equal bins of confidence that have images: these, mean confidence and accuracy,
    all in percent."""
    seen = table.labels >= 0
    confidence, right = table.probabilities[seen, 0].nan_to_num(), table.right[seen, 0].double()
    index = (confidence * BINS).long().clamp(max=BINS - 1)  # the last one holds 1.0 too
    count, *sums = (torch.bincount(index, weights=values, minlength=BINS).numpy() for values in (
        torch.ones_like(right), confidence, right))
    some = count > 0
    return 100 * count[some] / count.sum(), *(100 * x[some] / count[some] for x in sums)


def ece(table: Predictions) -> float:
    """The expected calibration error, in percent."""
    share, confidence, accuracy = bins(table)
    return float((share * np.abs(confidence - accuracy)).sum() / 100)


def calibration(opened: list[Opened], tables: list[Predictions]) -> str:
    """Reliability diagram and the share of the images in each bin, all runs in one chart."""
    reliability, shares = [("", "--muted", False, [(0, 0), (100, 100)])], []
    for i, (one, table) in enumerate(zip(opened, tables)):
        name = (f"{one.name}: " if len(opened) > 1 else "") + f"ECE {ece(table):.2f} %"
        share, confidence, accuracy = bins(table)
        for chart_of, key, y in (reliability, name, accuracy), (shares, "", share):
            chart_of.append((key, f"--c{i % COLOURS}", True, [*zip(confidence, y)]))
    return ('<div class="charts">' + chart("Accuracy", "%", reliability, "confidence, %")
            + chart("Images", "% of all, log scale", shares, "confidence, %", math.log) + "</div>")


# ----------------------------------------------------------------------------- images
def view(one: Opened, index: int) -> tuple[torch.Tensor, Image.Image]:
    """What the model sees of a validation image, uint8 [3, H, W]: both are the same pixels."""
    image, _ = one.images.load(index)  # here: the loader's may come from the device
    pixels = eval_transform(one.run.config, one.run.vit.image_hw)(image)
    return pixels, Image.fromarray(pixels.permute(1, 2, 0).numpy())


def tiles(one: Opened, table: Predictions, indices: list[int]) -> str:
    """Images with what they were taken for, how surely, and what they are."""
    found = ""
    for index in indices:
        label, best = int(table.labels[index]), int(table.classes[index, 0])
        kind, truth = ("right",) * 2 if label == best else ("wrong", f"is {esc(one.names[label])}")
        found += figure(*guess(one, table, index, f"<br>{truth}"), kind=kind,
                        above=img(view(one, index)[1], one.images.name(index)))
    return f'<div class="tiles">{found or "There is none."}</div>'


def guess(one: Opened, table: Predictions, index: int, more: str = "") -> tuple[str, str]:
    """The class that an image was taken for, and how surely."""
    return (esc(one.names[int(table.classes[index, 0])]),
            f"{100 * table.probabilities[index, 0]:.1f}&nbsp;%{more}")


def mistakes(one: Opened, table: Predictions) -> str:
    """The images whose wrong class the model was surest of."""
    wrong = ((table.labels >= 0) & ~table.right[:, 0]).nonzero()[:, 0]
    surest = table.probabilities[wrong, 0].argsort(descending=True, stable=True)
    return tiles(one, table, wrong[surest[:TILES]].tolist())


@torch.no_grad()
def attention_maps(run: Run, model, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one image [1, C, H, W]: how much the last block's output attends to each token, fp32 [S],
    and the rollout over all blocks, [S]. Reads behind norm1, so blocks must not be compiled."""
    inputs, maps = [], []
    hooks = [block.norm1.register_forward_hook(lambda norm, args, x: inputs.append(x[0].float()))
             for block in model.blocks]
    with run.autocast():
        model.eval()(images)
    for hook, block, x in zip(hooks, model.blocks, inputs):                    # x [S, D]
        hook.remove()
        attn = block.attn
        q, k, _ = F.linear(x, attn.qkv.weight.float(), attn.qkv.bias.float()).chunk(3, -1)
        q, k = (part.unflatten(-1, (-1, attn.head_dim)).transpose(0, 1) for part in (q, k))
        maps.append((q @ k.mT / attn.head_dim ** 0.5).softmax(-1).mean(0))     # [S, S]
    rollout = torch.zeros_like(maps[0][0])                                     # [S]
    read = slice(0, 1) if isinstance(model.blocks[-1], LastBlock) else slice(
        model.config.num_class_tokens, None)
    rollout[read] = 1 / len(rollout[read])
    last = rollout @ maps[-1]
    for a in reversed(maps):
        rollout = (rollout @ a + rollout) / 2
    return last.cpu(), rollout.cpu()


def attention(one: Opened, table: Predictions) -> str:
    """Image, attention of the last block and rollout of a few images of different classes."""
    vit, found = one.run.vit, ""
    for index in sample(table, EXAMPLES):
        pixels, image = view(one, index)
        batch, *_ = one.run.prepare(pixels[None], torch.zeros(1), {})
        shown = [image]
        for weights in attention_maps(one.run, one.model, batch):
            grid = weights[vit.num_class_tokens:].reshape(vit.grid_hw).numpy()
            heat = Image.fromarray(viridis(grid / grid.max()))
            heat = heat.resize(image.size, Image.Resampling.BICUBIC)
            shown.append(Image.blend(image.convert("L").convert("RGB"), heat, 0.7))
        found += figure(*guess(one, table, index), above="".join(map(img, shown)), kind="three")
    return f'<div class="tiles">{found}</div>'


# ----------------------------------------------------------------------------- weights
def weights(one: Opened) -> str:
    """The position embeddings' cosines, a small map for each position, and the patch filters."""
    (h, w), filters = one.run.vit.grid_hw, one.model.patch_embed.proj.weight.detach().float().cpu()
    pos = one.model.pos_embed.detach()[0, one.run.vit.num_class_tokens:].float().cpu()  # [h*w, D]
    pos = F.normalize(pos, dim=1)
    rows, columns = (np.linspace(0, n - 1, min(n, 16)).round().astype(int) for n in (h, w))
    cosines = (pos @ pos.T).reshape(h, w, h, w).numpy()[rows][:, columns]
    low, flat = cosines.min(), filters.flatten(1)                              # [D, C*p*p]
    _, strength, parts = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    share, count = strength ** 2 / (strength ** 2).sum(), min(len(parts), 32)
    parts = parts[:count].unflatten(1, filters.shape[1:])                      # [count, C, p, p]
    parts = 127.5 + 127.5 * parts / parts.abs().amax((1, 2, 3), keepdim=True)
    parts = parts.permute(0, 2, 3, 1).unflatten(0, (-1, math.gcd(count, 8))).numpy()
    figures = [(viridis((cosines - low) / max(1 - low, 1e-6)), "Position embeddings",
                f"Of {len(rows)} x {len(columns)} positions the cosines with all others, from "
                f"{low:.2f} (dark) to 1 (bright)."),
               (parts.astype(np.uint8), "Patch embedding",
                f"The first {count} principal components of {len(flat)} filters, "
                f"{100 * share[:count].sum():.0f} % of their variance; grey is zero.")]
    return '<div class="tiles">' + "".join(
        figure(title, text, above=img(mosaic(cells), kind="PNG"), kind="big")
        for cells, title, text in figures) + "</div>"


# ----------------------------------------------------------------------------- the command
def main(argv: list[str] | None = None) -> None:
    """A pass for each run, then the page; says what the page took beside the passes."""
    with user_errors("report.py"):
        config, given = parse(ReportConfig, argv)
        if int(os.environ.get("RANK", 0)):
            return
        opened = [open_run(output, config, given) for output in config.output]
    tables, stop = [], opened[-1].run.stop  # the last one made receives the signals
    for one in opened:
        one.run.stop = stop
        tables.append(predict(one.run, one.model, one.run.log.progress(one.loader),
                              len(one.images)))
    if stop.agreed:
        sys.exit(f"stopped by {stop.name}: no report was written")
    begin, path = time.perf_counter(), Path(config.output[0]) / "report.html"
    text = page(opened, tables).encode("utf-8", "replace")
    write_atomically(path, lambda file: file.write(text))
    one.run.log.print(f"{path}: {len(text) / 1e6:.1f} MB, {time.perf_counter() - begin:.0f} s "
                      f"beside the pass over the images")


if __name__ == "__main__":
    run_program(main)
