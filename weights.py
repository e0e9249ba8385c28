"""Weights of other libraries: those of timm, Hugging Face and torchvision in and out, Google's and
NeMo's in.

    python weights.py SOURCE OUTPUT --format timm           # or torchvision: .pt or .safetensors
    python weights.py SOURCE FOLDER/model.safetensors --format hf   # a folder for from_pretrained
    python weights.py SOURCE OUTPUT --format onnx           # or torch-export: export.py

SOURCE is an output directory or checkpoint of this program, a file of one of these libraries, a
folder of the Hugging Face hub, or a name: torchvision:vit_b_16 (hub.py); train.py --init-from and
evaluate.py read the same. Besides the paper's ViT these may be DeiT, DeiT-III, MAE, DINOv2 with and
without registers, and the image towers of CLIP and SigLIP.

    in    the file's tensors -> our names and shapes (formats.py) -> checked against a ViT of these
          sizes: Weights -> fitted to a model's image size and classes -> into the model
    out   our tensors -> the library's names -> a file, and the code that opens it

Shapes tell the sizes; heads, epsilon, GELU and pixels are facts that a file tells, or its format
assumes. No code in a file is run. Checked against these libraries: same weights, same logits
(test_weights.py). D is the hidden size; P class tokens, (h, w) the grid of patches.
"""

import json
import math
import os
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import hub
import nemo_file
from checkpoint import CheckpointTensors, newest_checkpoint, read_meta, write_atomically
from configs import MODELS, ConvertConfig, TrainConfig, ViTConfig
from flags import parse
from formats import to_format, to_ours
from model import ViT
from parallel import shard
from recipes import FINE_TUNING, RECIPES

TOLD = ("image_size", "num_attention_heads", "layernorm_eps", "gelu_approximate", "mean", "std",
        "crop_ratio", "precision", "classes", "pool", "layerscale", "val_share", "images",
        "classes_fraction", "data_per_class_fraction")  # not by shapes
SHAPE = ("hidden_size", "ffn_hidden_size", "num_layers", "patch_size", "num_attention_heads",
         "num_channels", "num_class_tokens", "pre_norm")  # what makes another model; four name it


class Weights(NamedTuple):
    """A ViT's full weights under our names, and what goes with them."""
    format: str                         # a key of formats.NAMES, or "a checkpoint"
    tensors: dict[str, torch.Tensor]
    facts: dict                         # the sizes that shapes tell, and of TOLD what is known


# ----------------------------------------------------------------------------- in
def read_weights(path: str | Path, image_size: int | tuple[int, int] | None = None,
                 which: str | None = None) -> Weights:
    """Reads our checkpoint (or the newest of an output directory), a file of timm, Hugging Face
    (or a hub's folder), torchvision or Google (.npz), which its names tell, or LIBRARY:NAME.

    Sizes come from the tensors' shapes, the rest from our files' facts or a hub's config.json, else
    from formats.SILENT. image_size (pixels; the file's own) is needed where its patches are no
    square and it does not tell. which: of a checkpoint, its average ("ema") or the "model"; None:
    the average, if it has one. Raises ValueError for a file that cannot be read, is no ViT, or is
    not complete.
    """
    library, colon, name = str(path).partition(":")
    library = library if colon else None  # a folder may be called hf
    file = None if library in hub.LIBRARIES else find_file(Path(path))
    try:
        if library == "hf":
            file = find_file(hub.folder_of(name))
        raw, told = open_file(file, which) if file else hub.load(library, name)
        fmt, tensors, facts = _interpret(raw, told, image_size)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    return Weights("a checkpoint" if file and file.is_dir() else fmt, tensors, facts)


def find_file(path: Path) -> Path:
    """The file of a hub's folder, the index of a file in parts, the newest checkpoint of an output
    directory; else the path itself."""
    index = Path(re.sub(r"-\d+-of-\d+(\.\w+)$", r"\1.index.json", str(path)))
    file = next((file for file in (*(path / name for name in hub.FILES), index) if file.exists()),
                path)
    return newest_checkpoint(file) if file.is_dir() else file


def open_file(path: Path, which: str | None = None) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of a file or checkpoint under their own names, and what it tells of TOLD."""
    if not path.exists():
        raise ValueError("there is no such file; by name: timm:NAME, torchvision:NAME, "
                         "hf:ORG/NAME")
    if not (path.is_dir() or path.name in hub.FILES
            or path.suffix in (".pt", ".pth", ".bin", ".safetensors", ".npz", ".nemo")):
        raise ValueError("its name must end in .pt, .pth, .bin, .safetensors, .npz or .nemo, or it "
                         "must be a checkpoint directory")
    averaged = path.is_dir() and "ema" in read_meta(path)["state"]
    if which == "ema" and not averaged or which and not path.is_dir():
        raise ValueError(f"--weights {which} is for a checkpoint of this program"
                         + (", with --ema-decay" if which == "ema" else "") + "; leave it out")
    try:
        raw, told = (nemo_file.read(path) if path.suffix == ".nemo" else
                     _load(path, averaged and which != "model"))
    except nemo_file.Refused:
        raise
    except OSError as e:
        raise ValueError(f"it cannot be read: {e.strerror or e}") from e
    except Exception as e:  # torch, numpy and safetensors each fail in their own ways
        code = re.search(r"GLOBAL (\S+)", str(e))
        if isinstance(e, pickle.UnpicklingError) and code:
            raise ValueError(f"it holds pickled objects other than tensors ({code[1]}); loading "
                             f"them could run code. Save its state dict alone") from e
        why = e if isinstance(e, SafetensorError) else type(e).__name__
        raise ValueError(f"it is truncated or damaged, or not a {path.suffix} file of plain "
                         f"tensors ({why})") from e
    if not isinstance(raw, dict) or not all(
            isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in raw.items()):
        raise ValueError("it is not a dictionary of named tensors")
    told = told or hub.facts_beside(path)
    return raw, {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()
                 if k in (*TOLD, "data")}  # a path of this machine, which no file takes along


def _load(path: Path, average: bool = False) -> tuple[dict[str, torch.Tensor], dict]:
    """open_file unchecked; fails as the libraries do. Tensors are mapped where possible."""
    if path.is_dir():
        meta, read = read_meta(path), CheckpointTensors(path)
        return ({name: read(name, "ema" if average and "ema" in read.kinds(name) else "weight")
                 for name in meta["where"]},  # what was frozen has no average
                {**meta["config"], **meta["vit"], "classes": meta["classes"],
                 "images": meta.get("images")})
    open(path, "rb").close()  # of a file that may not be read safetensors says that there is none
    if path.suffix == ".json":  # the index of a file in parts
        parts = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        return {name: x for part in parts for name, x in _load(path.with_name(part))[0].items()}, {}
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            facts = (file.metadata() or {}).get("facts", "{}")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(facts)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}, {}
    raw = torch.load(path, map_location="cpu", weights_only=True,
                     mmap=zipfile.is_zipfile(path))  # files of torch < 1.6 cannot be mapped
    told = getattr(raw, "facts", {})
    for key in ("model", "state_dict"):  # as MAE, DeiT and timm's training script wrap them
        raw = raw[key] if isinstance(raw, dict) and key in raw else raw
    return raw, told


def _interpret(raw: dict[str, torch.Tensor], told: dict,
               image_size) -> tuple[str, dict[str, torch.Tensor], dict]:
    """(format, tensors under our names and in our shapes, facts) of a file's own tensors.
    Raises ValueError if they are not exactly those of a ViT, a head excepted."""
    fmt, tensors, theirs, twice, sizes, assumed, left_out = to_ours(raw)
    facts = {**assumed, **told, **sizes, "left_out": left_out}
    facts["image_size"] = image_size or told.get("image_size")
    if sizes["layerscale"]:
        facts["layerscale"] = told.get("layerscale", sizes["layerscale"])
    if not sizes["num_class_tokens"]:
        facts["pool"] = "mean"
    tensors["pos_embed"], facts["image_size"] = _positions(tensors["pos_embed"], facts)
    config = ViTConfig(**{"num_attention_heads": 1, **sizes, "image_size": facts["image_size"],
                          "pool": facts["pool"]})
    with torch.device("meta"):
        expected = {name: x.shape for name, x in ViT(config).named_parameters()}
    missing, head = expected.keys() - tensors.keys(), {"head.weight", "head.bias"}
    odd = {"unknown": tensors.keys() - expected.keys(),
           "missing": missing - head if head <= missing else missing,
           "misshapen": {name for name in tensors.keys() & expected.keys()
                         if tensors[name].shape != expected[name]}}
    odd = [f"{len(found)} {kind} ({', '.join(sorted(theirs.get(n, n) for n in found)[:3])})"
           for kind, found in odd.items() if found]
    if odd or twice:
        raise ValueError(f"it is of {fmt}'s form, but not this model: "
                         f"{'; '.join(odd) or 'some weights are there under two names'}")
    return fmt, tensors, facts


def _positions(pos: torch.Tensor, facts: dict) -> tuple[torch.Tensor, int | tuple[int, int]]:
    """The positions [1, P + h*w, D] of P class tokens and h*w patches, and their image size."""
    prefix, p, size = facts["num_class_tokens"], facts["patch_size"], facts["image_size"]
    found = []
    for count in {prefix, min(prefix, 1), 0}:  # class tokens with a position: all, the first, none
        n = pos.shape[1] - count
        hw = size or p * math.isqrt(max(n, 0))
        h, w = (side // p for side in ((hw, hw) if isinstance(hw, int) else hw))
        found += [(count, hw)] if n == h * w else []
    if len(found) != 1:
        raise ValueError(f"it has {pos.shape[1]} positions, which are not {prefix} class tokens "
                         f"and a {h}x{w} grid of patches: give the image size that it was trained "
                         f"at as --init-image-size HEIGHT,WIDTH")
    count, size = found[0]
    pos = torch.cat([pos[:, :count], pos.new_zeros(1, prefix - count, pos.shape[2]),
                     pos[:, count:]], dim=1)
    return pos, size


# ----------------------------------------------------------------------------- what comes with them
def adopt(weights: Weights, config: TrainConfig, vit: ViTConfig,
          given: dict) -> tuple[TrainConfig, ViTConfig, dict]:
    """For training: both configurations with what these weights were trained to where no flag
    (`given`, by field) says otherwise, and that part. Fine-tuning recipes keep their own head."""
    names = {"num_class_tokens", "head", "layernorm_eps", "gelu_approximate", "mean", "std", "pool",
             "fc_norm", "layerscale", "pre_norm"}
    if given.get("pool") not in (None, weights.facts["pool"]):
        names.remove("fc_norm")
    if config.recipe in FINE_TUNING:
        names -= {"head", "pool", "fc_norm"} & RECIPES[config.recipe].keys()
    taken = {name: weights.facts[name] for name in sorted(names - given.keys())}
    config, vit = (replace(old, **{f.name: taken[f.name] for f in fields(old) if f.name in taken})
                   for old in (config, vit))
    return config, vit, taken


def whole_model(weights: Weights, source: str, **told) -> tuple[ViTConfig, dict]:
    """For use: the configuration of these weights, without dropout, and all facts, always with
    mean, std, crop_ratio, precision and classes (names; empty if unknown). What is `told` and not
    None wins. Raises ValueError for weights (of `source`) without a head, or if nothing tells their
    number of heads."""
    facts = {"crop_ratio": 0.875, "precision": "fp32", "classes": (), **weights.facts,
             **{name: value for name, value in told.items() if value is not None}}
    facts["precision"] = facts["precision"].removesuffix("-fp8")  # that is for training
    if "num_classes" not in facts:
        raise ValueError(f"{source} has no head: fine-tune it first (train.py --recipe finetune "
                         f"--init-from {source})")
    if "num_attention_heads" not in facts:
        name = model_name(facts, SHAPE[:3])  # of any patch size
        if name is None:
            raise ValueError(f"{source} is none of {', '.join(MODELS)} and does not tell its "
                             f"number of heads: give --num-attention-heads")
        facts["num_attention_heads"] = MODELS[name].num_attention_heads
    facts |= dict(hidden_dropout=0.0, attention_dropout=0.0, drop_path_rate=0.0,
                  drop_path_uniform=False, drop_path_mode="image", drop_patch_rate=0.0)
    return ViTConfig(**{f.name: facts[f.name] for f in fields(ViTConfig) if f.name in facts}), facts


def model_name(facts: dict, keys: tuple[str, ...] = SHAPE[:4]) -> str | None:
    """The entry of MODELS with the widths, depth and patch of these facts."""
    return next((name for name, shape in MODELS.items()
                 if all(facts[k] == getattr(shape, k) for k in keys)), None)


def resize_pos_embed(pos: torch.Tensor, num_class_tokens: int, old: tuple[int, int],
                     new: tuple[int, int]) -> torch.Tensor:
    """Positions of an old (h, w) grid of patches, [1, P + h*w, D], for a new grid.

    The P class positions stay; the grid is resized in fp32, bicubic with antialiasing, to an exact
    size (a scale factor rounds wrong: dinov2#378). Unchanged at the same size.
    """
    if old == new:
        return pos
    classes, grid = pos[:, :num_class_tokens], pos[:, num_class_tokens:]
    grid = grid.float().unflatten(1, old).permute(0, 3, 1, 2)                  # [1, D, h, w]
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([classes, grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos.dtype)], dim=1)


def fit_weights(weights: Weights, vit: ViTConfig) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(the full fp32 weights for ViT(vit), what was done to them).

    Only the position embedding is resized, and only the head and the norm before it may be left out
    of the result, to be initialised: where the file has none, or one of another kind, place or
    number of classes.
    Raises ValueError for the weights of another model.
    """
    facts, tensors = weights.facts, {name: x.float() for name, x in weights.tensors.items()}
    odd = [f"{k} {facts[k]} (this run: {getattr(vit, k)})" for k in SHAPE
           if facts.get(k, getattr(vit, k)) != getattr(vit, k)]
    if bool(facts["layerscale"]) != bool(vit.layerscale):
        odd.append(f"layerscale {facts['layerscale']} (this run: {vit.layerscale})")
    if odd:
        name, alike = model_name(facts), model_name(facts, SHAPE[:3])
        flags = alike if name else f"{alike} --patch-size {facts['patch_size']}"
        raise ValueError(f"the weights are of another model: {', '.join(odd)}"
                         + (f"; it has the shape of --model {flags}" if alike else ""))
    old = ViTConfig(patch_size=vit.patch_size, image_size=facts["image_size"]).grid_hw
    tensors["pos_embed"] = resize_pos_embed(tensors["pos_embed"], vit.num_class_tokens, old,
                                            vit.grid_hw)
    report = []
    if old != vit.grid_hw:
        report.append("pos_embed resized from {}x{} to {}x{}".format(*old, *vit.grid_hw))
    new = []
    if facts["fc_norm"] != vit.fc_norm:
        new, where = ["norm.", "fc_norm."], "fc_norm" if vit.fc_norm else "norm"
        report.append(f"{where} newly initialised: the file's norm is elsewhere")
    other_kind = facts["head"] != vit.head
    if other_kind or (facts.get("num_classes"), facts["pool"]) != (vit.num_classes, vit.pool):
        new += ["head.", "pre_logits."] if other_kind else ["head."]
        names = "pre_logits.fc and head" if other_kind and vit.head == "mlp" else "head"
        found = (f"'s is {facts['head']}, {facts['num_classes']} classes"
                 if "num_classes" in facts else " has none")
        found += f", pool {facts['pool']}" if facts["pool"] != vit.pool else ""
        report.append(f"{names} newly initialised for {vit.num_classes} classes: the file{found}")
    tensors = {name: x for name, x in tensors.items() if not name.startswith(tuple(new))}
    if facts.get("left_out"):
        report.append(f"left out: {', '.join(facts['left_out'])}")
    return tensors, [f"{len(tensors)} weights loaded", *report]


@torch.no_grad()
def load_weights(model: ViT, fitted: dict[str, torch.Tensor]) -> None:
    """fit_weights' result into a model of any layout; a new head keeps its initialisation. Before
    the optimizer is built, or call its refresh_masters."""
    for name, param in model.named_parameters():
        if name in fitted:
            param.copy_(shard(fitted[name], param, model.grid.tp))


# ----------------------------------------------------------------------------- out
def write_weights(path: str | Path, tensors: dict[str, torch.Tensor], vit: ViTConfig, fmt: str,
                  facts: dict, dtype: torch.dtype = torch.float32) -> str:
    """Writes to_format's weights to a .pt or .safetensors file, whole or not at all, and returns
    the Python code that opens it.

    The facts of whole_model and the configuration travel along, unseen by other libraries, so that
    read_weights need not guess them. For Hugging Face the file must be FOLDER/model.safetensors,
    and its two configs are written beside it: then from_pretrained(FOLDER) is all that it takes.
    Raises ValueError for another ending, OSError if it cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"{path} must end in .pt or .safetensors")
    if fmt == "hf" and path.name != "model.safetensors":
        raise ValueError(f"{path}: --format hf writes a folder for from_pretrained; give "
                         f"FOLDER/model.safetensors")
    facts = {k: v for k, v in {**facts, **asdict(vit)}.items() if k in TOLD}
    tensors = OrderedDict((name, x.to(dtype).contiguous()) for name, x in tensors.items())
    tensors.facts = facts  # an attribute, as torch's own _metadata: the keys stay the model's
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, values in hf_configs(vit, facts).items() if fmt == "hf" else ():
        text = json.dumps(values, indent=1).encode()
        write_atomically(path.with_name(name), lambda file, text=text: file.write(text))
    write_atomically(path, lambda file: (torch.save(tensors, file) if path.suffix == ".pt" else
                                         _save_safetensors(tensors, file)))
    return how_to_open(path, vit, fmt)


def _save_safetensors(tensors: OrderedDict, file) -> None:
    """Writes to the path of `file`, on which the library renames a file of its own that only its
    owner may read: that one needs the mode of `file`, and its own way to the disk."""
    try:
        save_file(tensors, file.name, {"format": "pt", "facts": json.dumps(tensors.facts)})
    except SafetensorError as e:  # a full disk
        raise OSError(str(e)) from e
    os.chmod(file.name, os.fstat(file.fileno()).st_mode & 0o777)
    with open(file.name, "rb") as written:
        os.fsync(written.fileno())


def hf_configs(vit: ViTConfig, facts: dict) -> dict[str, dict]:
    """Hugging Face's config.json and preprocessor_config.json."""
    labels = facts.get("classes") or [f"LABEL_{i}" for i in range(vit.num_classes)]
    height, width = vit.image_hw
    return {"config.json": dict(
        architectures=["ViTForImageClassification"], model_type="vit",
        hidden_size=vit.hidden_size, intermediate_size=vit.ffn_hidden_size,
        num_hidden_layers=vit.num_layers, num_attention_heads=vit.num_attention_heads,
        patch_size=vit.patch_size, num_channels=vit.num_channels, qkv_bias=True,
        image_size=height if height == width else [height, width], layer_norm_eps=vit.layernorm_eps,
        hidden_act="gelu" if vit.gelu_approximate == "none" else "gelu_pytorch_tanh",
        id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)},
    ), "preprocessor_config.json": dict(
        image_processor_type="ViTImageProcessor", size=dict(height=height, width=width), resample=3,
        image_mean=facts["mean"], image_std=facts["std"])}


def how_to_open(path: Path, vit: ViTConfig, fmt: str) -> str:
    """Python code that opens a file of write_weights in its library, strictly."""
    if fmt == "hf":
        return ("import transformers\nmodel = transformers.ViTForImageClassification."
                f"from_pretrained({str(path.parent)!r})")
    d, f, (height, width) = vit.hidden_size, vit.ffn_hidden_size, vit.image_hw
    size = height if height == width else (height, width)
    theirs = dict(
        img_size=size, in_chans=vit.num_channels, embed_dim=d, depth=vit.num_layers,
        mlp_ratio=f / d if int(d * (f / d)) == f else (f + 0.5) / d,  # timm cuts d * ratio off
        class_token=vit.num_class_tokens > 0, reg_tokens=max(vit.num_class_tokens - 1, 0),
        global_pool="token" if vit.pool == "token" else "avg", fc_norm=vit.fc_norm,
        init_values=vit.layerscale or None, pre_norm=vit.pre_norm,
        act_layer=dict(none="gelu", tanh="gelu_tanh", quick="quick_gelu")[vit.gelu_approximate],
    ) if fmt == "timm" else dict(
        image_size=size, hidden_dim=d, num_layers=vit.num_layers, mlp_dim=f,
        representation_size=d if vit.head == "mlp" else None)
    theirs |= dict(patch_size=vit.patch_size, num_heads=vit.num_attention_heads,
                   num_classes=vit.num_classes)
    module, load = (("torch", "torch.load") if path.suffix == ".pt" else
                    ("torch, safetensors.torch", "safetensors.torch.load_file"))
    return (f"import functools, {fmt}, {module}\nmodel = {fmt}.models.VisionTransformer("
            + ", ".join(f"{k}={v!r}" for k, v in theirs.items())
            + f", norm_layer=functools.partial(torch.nn.LayerNorm, eps={vit.layernorm_eps}))\n"
            + f"model.load_state_dict({load}({str(path)!r}))")


# ----------------------------------------------------------------------------- the command
def convert(config: ConvertConfig) -> None:
    """Reads SOURCE, writes OUTPUT, says what was done. Raises ValueError for what cannot be."""
    told = asdict(config)
    source, output, fmt, dtype = (told.pop(k) for k in ("source", "output", "format", "dtype"))
    weights = read_weights(source, told.pop("init_image_size"), told.pop("weights"))
    vit, facts = whole_model(weights, source, **told)
    fitted, report = fit_weights(weights, vit)
    try:
        if fmt in ("onnx", "torch-export"):
            from export import write_program
            code = write_program(output, fitted, vit, fmt)
        else:
            code = write_weights(output, to_format(fitted, vit, fmt), vit, fmt, facts,
                                 getattr(torch, dtype))
    except OSError as e:
        raise ValueError(f"{output} cannot be written: {e.strerror or e}") from e
    print(f"{output}: {source} ({weights.format}) for {fmt}, {'; '.join(report)}; images "
          f"{' x '.join(map(str, vit.image_hw))} px, mean {facts['mean']}, std {facts['std']}. "
          f"Opens with\n\n{code}\n")


def main(argv: list[str] | None = None) -> None:
    try:
        convert(parse(ConvertConfig, argv)[0])
    except (ValueError, OSError) as e:
        print(f"weights.py: error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no UTF-8
    main()
