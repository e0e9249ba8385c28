"""What can be set: the model table, the recipes, and every flag of the command line.

Four layers decide a value, the later one wins:
    1. the defaults of `ViTConfig` and `TrainConfig` below (they are the `pretrain` recipe)
    2. `RECIPES[recipe]` and, for the model's shape, `MODELS[model]`
    3. what comes with the weights of --init-from or --checkpoint (train.adopt)
    4. the flags of the command line, generated from the fields: `hidden_size` is `--hidden-size`

Sizes, names and the recipe follow NVIDIA NeMo 1.23 (docs/source/vision/vit.rst and the launcher's
conf/training/vit/*.yaml); B, L, H are of the ViT paper (arXiv:2010.11929), g and G of "Scaling
Vision Transformers" (arXiv:2106.04560), Ti and S of DeiT (arXiv:2012.12877).
"""

import argparse
import dataclasses
import difflib
import hashlib
import math
import types
import typing
from dataclasses import dataclass, field, fields, replace
from typing import Literal


def flag(default, help: str):
    """A dataclass field that is also a command-line flag: `help` is its line in --help."""
    return field(default=default, metadata={"help": help})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _unknown(what: str, value: str, known) -> str:
    near = difflib.get_close_matches(value, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{what} {value!r} is unknown; known: {', '.join(known)}.{hint}"


def _check_positive(config, name: str) -> None:
    value = getattr(config, name)
    if value is not None and not value > 0:
        raise ValueError(f"{_flag(name)} {value} must be positive")


def _check_choices(config) -> None:
    for name, hint in typing.get_type_hints(type(config)).items():
        legal, value = typing.get_args(hint), getattr(config, name)
        if typing.get_origin(hint) is Literal and value not in legal:
            raise ValueError(_unknown(_flag(name), str(value), legal))


# ----------------------------------------------------------------------------- the model's shape
@dataclass(frozen=True)
class ViTConfig:
    """The shape of one Vision Transformer. Everything that follows from it is a property."""

    hidden_size: int = flag(768, "width D of the residual stream")
    ffn_hidden_size: int = flag(3072, "width of the MLP's hidden layer")
    num_layers: int = flag(12, "number of transformer blocks")
    num_attention_heads: int = flag(12, "attention heads; each is hidden_size / heads wide")
    patch_size: int = flag(16, "side of a square patch in pixels")
    image_size: int | tuple[int, int] = flag(224, "image side in pixels, or HEIGHT,WIDTH")
    num_channels: int = flag(3, "channels of an image")
    num_classes: int = flag(1000, "classes of the head (default: those of the data)")
    num_class_tokens: int = flag(8, "learned tokens before the patches; token 0 is the output")
    hidden_dropout: float = flag(0.1, "dropout after the embedding and before each residual add")
    attention_dropout: float = flag(0.0, "dropout of the attention probabilities")
    drop_path_rate: float = flag(0.0, "stochastic depth of the last block (linear from 0)")
    gelu_approximate: Literal["none", "tanh"] = flag("none", "none: exact GELU; tanh: faster")
    layernorm_eps: float = flag(1e-6, "epsilon of every LayerNorm (NeMo 1e-5, timm 1e-6)")
    head: Literal["mlp", "linear"] = flag("mlp", "mlp: linear, tanh, linear (pretraining); linear")

    def __post_init__(self):
        for name in ("hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads",
                     "patch_size", "num_channels", "num_classes", "num_class_tokens"):
            _check_positive(self, name)
        for name in ("hidden_dropout", "attention_dropout", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{_flag(name)} {getattr(self, name)} must be in [0, 1)")
        _check_choices(self)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"--hidden-size {self.hidden_size} must be divisible by --num-attention-heads "
                f"{self.num_attention_heads}; legal heads: {divisors(self.hidden_size)}")
        p = self.patch_size
        for side in self.image_hw:
            if side <= 0 or side % p:
                near = sorted({max(side // p, 1) * p, (max(side, 0) // p + 1) * p})
                raise ValueError(f"--image-size {side} must be a positive multiple of the patch "
                                 f"size {p}; nearest: {', '.join(map(str, near))}")

    @property
    def image_hw(self) -> tuple[int, int]:
        """Image (height, width) in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Patches along (height, width)."""
        return self.image_hw[0] // self.patch_size, self.image_hw[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid_hw[0] * self.grid_hw[1]

    @property
    def seq_length(self) -> int:
        """Tokens S: class tokens and patches. NeMo's tables say 204 and 264 (196 + 8, 256 + 8)."""
        return self.num_class_tokens + self.num_patches

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def patch_dim(self) -> int:
        """Values of one unfolded patch."""
        return self.num_channels * self.patch_size ** 2

    @property
    def params_per_block(self) -> int:
        d, f = self.hidden_size, self.ffn_hidden_size
        return (4 * d * d + 4 * d) + (2 * d * f + f + d) + 4 * d  # attention, MLP, two LayerNorms

    @property
    def num_params(self) -> int:
        """All parameters of the model, head included."""
        d, c = self.hidden_size, self.num_classes
        embedding = (self.patch_dim + 1) * d + (self.num_class_tokens + self.seq_length) * d
        head = (d * d + d if self.head == "mlp" else 0) + d * c + c
        return embedding + self.num_layers * self.params_per_block + 2 * d + head

    @property
    def flops_per_image(self) -> int:
        """Floating-point operations of one image's forward pass: the matrix products and attention
        (a multiply-add is 2). A training step costs three times this, without recomputation."""
        s, d, f = self.seq_length, self.hidden_size, self.ffn_hidden_size
        block = 2 * s * (4 * d * d + 2 * d * f) + 4 * s * s * d
        head = 2 * d * self.num_classes + (2 * d * d if self.head == "mlp" else 0)
        return self.num_layers * block + 2 * self.num_patches * d * self.patch_dim + head


def _shape(hidden, ffn, layers, heads, patch, **more):
    return ViTConfig(hidden_size=hidden, ffn_hidden_size=ffn, num_layers=layers,
                     num_attention_heads=heads, patch_size=patch, **more)


MODELS = {
    #              hidden   ffn  layers heads patch          params with a 1000-way linear head
    "Ti16": _shape(   192,  768,     12,    3,   16),
    "S16":  _shape(   384, 1536,     12,    6,   16),
    "B16":  _shape(   768, 3072,     12,   12,   16),      # 86.58 M
    "L16":  _shape(  1024, 4096,     24,   16,   16),      # 304.34 M
    "H16":  _shape(  1280, 5120,     32,   16,   16),      # 632.22 M
    "H14":  _shape(  1280, 5120,     32,   16,   14),      # 632.06 M
    "g14":  _shape(  1408, 6144,     40,   16,   14),      # 1,012.63 M
    "G14":  _shape(  1664, 8192,     48,   16,   14),      # 1,844.46 M
    "demo": _shape(    96,  384,      4,    4,    8, image_size=32, num_class_tokens=1),
}
# Largest micro-batch chosen when --micro-batch-size is not given: the launcher's (g and G: 64).
MICRO_BATCH = {"B16": 256, "L16": 256, "H16": 128, "H14": 128, "g14": 64, "G14": 64}


# ----------------------------------------------------------------------------- the run
@dataclass(frozen=True)
class TrainConfig:
    """One run. The defaults are the `pretrain` recipe: 300 epochs of ImageNet at batch 4096."""

    # what to train
    model: str = flag("B16", "Ti16 S16 B16 L16 H16 H14 g14 G14 or demo; L/16 is L16")
    recipe: str = flag("pretrain", "demo, pretrain, finetune (default: demo with --data shapes, "
                       "pretrain with a folder)")
    data: str = flag("shapes", "folder with train/CLASS/* and val/CLASS/*, or 'shapes' (drawn)")
    output_dir: str = flag("output", "checkpoints, metrics.jsonl, TensorBoard")
    seed: int = flag(0, "of weights, data order, augmentation and dropout")
    deterministic: bool = flag(False, "bit-reproducible kernels, slower")
    # length and batch
    epochs: float = flag(300.0, "length of the run, if --max-steps is not given")
    max_steps: int | None = flag(None, "length of the run in optimizer steps")
    global_batch_size: int = flag(4096, "images of one optimizer step, over all ranks")
    micro_batch_size: int | None = flag(None, "images of one forward pass per model replica "
                                        "(default: the largest legal up to the model's own)")
    # layout, precision, speed
    tensor_parallel_size: int = flag(1, "ranks that share one model replica")
    precision: Literal["fp32", "bf16", "bf16-O2", "bf16-O2-fp8"] = flag(
        "bf16-O2", "bf16: autocast over fp32 weights; bf16-O2: bf16 weights, fp32 masters; "
        "-fp8: and the blocks' matrix products in fp8, in training")
    attention: Literal["auto", "triton", "cudnn", "flash", "efficient", "math",
                       "flash-attn"] = flag(
        "auto", "attention kernel; auto: the first that runs of this list, flash-attn left out")
    compile: bool | None = flag(None, "torch.compile the blocks (default: on CUDA)")
    tp_comm_overlap: bool | None = flag(None, "tensor parallelism: collectives under the products "
                                        "(default: where a host has all GPUs of a tp group; not "
                                        "with fp8)")
    peer_copies: bool | None = flag(None, "sum gradients by copies between the GPUs instead of "
                                    "NCCL (default: where one host has all of them)")
    activation_checkpointing: Literal["none", "selective", "full"] = flag(
        "none", "selective: keep matrix products and attention; full: keep block inputs only")
    checkpoint_method: Literal["uniform", "block"] = flag(
        "uniform", "full: uniform: every run of N layers as one; block: only the first N layers")
    checkpoint_num_layers: int = flag(1, "full: N of --checkpoint-method")
    # optimizer
    optimizer: Literal["adamw", "sgd"] = flag("adamw", "torch.optim's, fused, sharded (ZeRO-1)")
    lr: float = flag(3e-3, "peak learning rate; never rescaled silently")
    min_lr: float = flag(1e-5, "learning rate at the end of the cosine")
    warmup_steps: int = flag(10_000, "steps of linear warm-up")
    weight_decay: float = flag(0.3, "on matrices only; adamw: decoupled, w -= lr * decay * w; "
                               "sgd: added to the gradient")
    adam_beta1: float = flag(0.9, "AdamW beta 1")
    adam_beta2: float = flag(0.999, "AdamW beta 2")
    adam_eps: float = flag(1e-8, "AdamW epsilon")
    momentum: float = flag(0.9, "SGD momentum")
    clip_grad: float = flag(1.0, "largest global gradient norm; 0: no clipping")
    # images
    augmentation: Literal["nemo", "crop-flip", "crop", "none"] = flag(
        "nemo", "nemo: random crop, flip, AutoAugment, colour jitter 0.4/0.4/0.4/0.1")
    crop_scale: float = flag(0.08, "least area of the random crop")
    crop_ratio: float = flag(0.875, "evaluation: image side / resized shorter side")
    mean: tuple[float, float, float] = flag((0.485, 0.456, 0.406), "pixel mean, R,G,B")
    std: tuple[float, float, float] = flag((0.229, 0.224, 0.225), "pixel deviation, R,G,B")
    max_unreadable: float = flag(0.001, "share of unreadable training images that ends the run")
    num_workers: int = flag(8, "processes per rank that load images")
    prefetch_factor: int = flag(4, "micro-batches that each worker holds ready")
    pin_memory: bool = flag(True, "page-locked host batches (on CUDA)")
    # log, evaluate, save
    log_interval: int = flag(10, "steps between log lines")
    eval_interval: int = flag(1000, "steps between evaluations; 0: only at the end")
    save_interval: int = flag(1000, "steps between checkpoints; 0: only at the end")
    keep_last: int = flag(3, "newest checkpoints kept; 0: all")
    tensorboard: bool = flag(False, "also write TensorBoard scalars (needs tensorboard)")
    resume: str = flag("auto", "auto: newest complete checkpoint of --output-dir; none; or a path")
    # weights in
    init_from: str | None = flag(
        None, "start from these weights: a checkpoint or output directory of this program, or a "
        "file of timm, Hugging Face or torchvision, or Google's .npz")
    init_image_size: int | tuple[int, int] | None = flag(
        None, "image size of those weights, where they do not tell and are not square")
    # modes
    dry_run: bool = flag(False, "print sizes, memory, schedule and legal layouts, then exit")
    benchmark: int | None = flag(None, "time this many steps on random images, print a row, exit")
    benchmark_data: str | None = flag(
        None, "--benchmark: also the loader on this folder (or 'shapes'), alone and with the steps")
    profile: bool = flag(False, "--benchmark: a trace in --output-dir, and where the time goes")
    checkpoint: str | None = flag(None, "weights of --eval, --predict, --export; as --init-from")
    eval: bool = flag(False, "score --checkpoint on DATA/val, then exit")
    val_labels: str | None = flag(
        None, "file with the classes of images that lie flat in DATA/val: lines of 'NAME CLASS', "
        "or ImageNet's LOC_val_solution.csv")
    predict: str | None = flag(None, "classify every image below this folder with --checkpoint: "
                               "predictions.csv and .png in --output-dir")
    export: str | None = flag(None, "write --checkpoint as this .pt or .safetensors file")
    format: Literal["timm", "hf", "torchvision"] = flag(
        "timm", "library of --export; hf: FILE is FOLDER/model.safetensors, for from_pretrained")

    @property
    def o2(self) -> bool:
        """bf16 weights, fp32 masters."""
        return self.precision.startswith("bf16-O2")

    @property
    def fp8(self) -> bool:
        """The blocks' products in fp8, in training."""
        return self.precision.endswith("-fp8")

    def __post_init__(self):
        _check_choices(self)
        for name in ("epochs", "max_steps", "global_batch_size", "micro_batch_size", "adam_eps",
                     "tensor_parallel_size", "checkpoint_num_layers", "prefetch_factor",
                     "crop_scale", "crop_ratio", "log_interval", "benchmark"):
            _check_positive(self, name)
        for name in ("seed", "lr", "min_lr", "warmup_steps", "weight_decay", "clip_grad",
                     "momentum", "max_unreadable", "num_workers", "eval_interval",
                     "save_interval", "keep_last"):
            if not getattr(self, name) >= 0:  # written so that nan fails too
                raise ValueError(f"{_flag(name)} {getattr(self, name)} must not be negative")
        for name in ("adam_beta1", "adam_beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{_flag(name)} {getattr(self, name)} must be in [0, 1)")
        for name in ("crop_scale", "crop_ratio"):
            if getattr(self, name) > 1:
                raise ValueError(f"{_flag(name)} {getattr(self, name)} must be in (0, 1]")
        if min(self.std) <= 0:
            raise ValueError(f"--std {self.std} must be positive")
        if self.min_lr > self.lr:
            raise ValueError(f"--min-lr {self.min_lr} must not exceed --lr {self.lr}")
        if self.data == "":
            raise ValueError("--data is empty; give a folder or 'shapes'")


# What a recipe changes of the defaults above; a key may be a field of either dataclass.
RECIPES = {
    # Built-in images, a model of 0.5 M parameters, minutes on two CPU cores.
    "demo": dict(
        model="demo", precision="fp32", epochs=5.0, global_batch_size=64, lr=2e-3, warmup_steps=100,
        adam_beta2=0.95, weight_decay=0.05, hidden_dropout=0.0, augmentation="none",
        crop_ratio=1.0, num_workers=0, log_interval=25, eval_interval=125, save_interval=125),
    # NeMo's from-scratch recipe for B/16. Not run at this scale here.
    "pretrain": dict(),
    # The ViT paper's fine-tuning, as NeMo's page has it: 20,000 steps at 512 or 518 px.
    "finetune": dict(
        head="linear", max_steps=20_000, global_batch_size=512, optimizer="sgd", lr=0.03,
        min_lr=0.0, warmup_steps=0, weight_decay=0.0, augmentation="crop-flip"),
}
FINETUNE_IMAGE_SIZE = {16: 512, 14: 518}  # by patch size; 512 is no multiple of 14
# Flags that act only beside certain values of another: given otherwise, they are an error.
NEEDS = {
    "checkpoint_method": ("activation_checkpointing", ["full"]),
    "checkpoint_num_layers": ("activation_checkpointing", ["full"]),
    "adam_beta1": ("optimizer", ["adamw"]),
    "adam_beta2": ("optimizer", ["adamw"]),
    "adam_eps": ("optimizer", ["adamw"]),
    "momentum": ("optimizer", ["sgd"]),
    "crop_scale": ("augmentation", ["nemo", "crop-flip", "crop"]),
}
# What each mode but training obeys, beside --checkpoint; any other flag given is an error.
_MODEL = {"checkpoint", "init_image_size", "model", "image_size", "num_attention_heads",
          "layernorm_eps", "gelu_approximate", "mean", "std"}
_FORWARD = _MODEL | {"crop_ratio", "micro_batch_size", "tensor_parallel_size", "precision",
                     "attention", "compile", "tp_comm_overlap", "deterministic", "num_workers",
                     "prefetch_factor", "pin_memory"}
MODES = {"eval": _FORWARD | {"data", "val_labels"}, "predict": _FORWARD | {"output_dir"},
         "export": _MODEL | {"format", "crop_ratio"}}
# What --benchmark does not obey, or only beside another flag.
BESIDE_BENCHMARK = {"data", "epochs", "max_steps", "max_unreadable", "crop_ratio", "log_interval",
                    "eval_interval", "save_interval", "keep_last", "tensorboard", "resume",
                    "init_from", "num_classes"}
BENCHMARK_NEEDS = {"num_workers": "benchmark_data", "prefetch_factor": "benchmark_data",
                   "pin_memory": "benchmark_data", "crop_scale": "benchmark_data",
                   "output_dir": "profile"}


# ----------------------------------------------------------------------------- the command line
def parse_args(argv: list[str] | None = None) -> tuple[TrainConfig, ViTConfig, dict]:
    """Reads a command line (default: sys.argv) into the run's two configurations.

    Returns them with the fields that were given as flags. Raises ValueError for values that
    contradict each other; argparse exits with code 2 for unknown flags and types. With --checkpoint
    and no --model the shape is the checkpoint's, which only its reader knows: here the default.
    """
    parser = argparse.ArgumentParser(
        prog="train.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Train a Vision Transformer: python train.py, or torchrun train.py --model L16")
    for cls in (TrainConfig, ViTConfig):
        group = parser.add_argument_group(cls.__name__)
        hints = typing.get_type_hints(cls)
        for f in fields(cls):
            text = f.metadata["help"]
            shown = {None: ""}.get(f.default, f" [{_show(f.default)}]")
            group.add_argument(_flag(f.name), help=text + ("" if "default:" in text else shown),
                               **_argparse_type(hints[f.name]))
    given = vars(parser.parse_args(argv))

    data = given.get("data", TrainConfig.data)
    recipe = given.get("recipe", "demo" if data == "shapes" and "model" not in given
                       and "checkpoint" not in given else "pretrain")
    if recipe not in RECIPES:
        raise ValueError(_unknown("--recipe", recipe, RECIPES))
    values = {**RECIPES[recipe], **given, "recipe": recipe}
    values["model"] = values.get("model", TrainConfig.model).replace("/", "")
    if values["model"] not in MODELS:
        raise ValueError(_unknown("--model", values["model"], MODELS))
    shape = MODELS[values["model"]]
    if recipe == "finetune" and shape.patch_size in FINETUNE_IMAGE_SIZE:
        values.setdefault("image_size", FINETUNE_IMAGE_SIZE[shape.patch_size])

    _check_modes(given)
    for name, (other, legal) in NEEDS.items():
        value = values.get(other, getattr(TrainConfig, other))
        if name in given and value not in legal:
            raise ValueError(f"{_flag(name)} has no effect with {_flag(other)} {value}; it needs "
                             f"{_flag(other)} {' or '.join(map(str, legal))}")
    if {"epochs", "max_steps"} <= set(given):
        raise ValueError("--epochs and --max-steps contradict each other; give one of them")

    def pick(cls):
        return {k: v for k, v in values.items() if k in {f.name for f in fields(cls)}}
    known = "checkpoint" not in given or "model" in given
    vit = replace(shape, **pick(ViTConfig)) if known else ViTConfig()
    return TrainConfig(**pick(TrainConfig)), vit, given


def _check_modes(given: dict) -> None:
    if "val_labels" in given and given.get("data", "shapes") == "shapes":
        raise ValueError("--val-labels has no effect with --data shapes; give a folder")
    modes = [mode for mode in (*MODES, "dry_run", "benchmark") if given.get(mode)]
    if len(modes) > 1:
        raise ValueError(f"{' and '.join(map(_flag, modes))} contradict each other; give one")
    if modes == ["benchmark"] and (odd := sorted(set(given) & BESIDE_BENCHMARK)):
        raise ValueError(f"{_flag(odd[0])} has no effect with --benchmark; neither have "
                         f"{', '.join(map(_flag, sorted(BESIDE_BENCHMARK - {odd[0]})))}")
    for name, needed in BENCHMARK_NEEDS.items() if modes == ["benchmark"] else ():
        if name in given and not given.get(needed):
            raise ValueError(f"{_flag(name)} has no effect with --benchmark without "
                             f"{_flag(needed)}")
    for name in ("benchmark_data", "profile"):
        if given.get(name) and modes != ["benchmark"]:
            raise ValueError(f"{_flag(name)} needs --benchmark N")
    mode = modes[0] if modes and modes[0] in MODES else None
    if mode is None:
        alone = [name for name in ("checkpoint", "format") if name in given]
        if alone:
            raise ValueError(f"{_flag(alone[0])} needs --eval, --predict DIR or --export FILE; "
                             f"training takes --init-from")
        if "init_image_size" in given and "init_from" not in given:
            raise ValueError("--init-image-size needs --init-from or --checkpoint")
    elif "checkpoint" not in given:
        raise ValueError(f"{_flag(mode)} needs --checkpoint PATH: an output directory, a "
                         f"checkpoint, or a file of weights")
    elif odd := sorted(set(given) - MODES[mode] - {mode}):
        raise ValueError(f"{_flag(odd[0])} has no effect with {_flag(mode)}; that obeys "
                         f"{', '.join(map(_flag, sorted(MODES[mode])))}")


def _argparse_type(hint) -> dict:
    """add_argument's keywords for a field's type hint."""
    options = [t for t in typing.get_args(hint) if t is not types.NoneType]
    if typing.get_origin(hint) is Literal:
        return dict(choices=typing.get_args(hint))
    if typing.get_origin(hint) is types.UnionType and len(options) == 1:
        hint = options[0]
    if hint is bool:
        return dict(action=argparse.BooleanOptionalAction)
    if hint in (int, float, str):
        return dict(type=hint, metavar=hint.__name__.upper())
    if typing.get_origin(hint) is tuple:
        return dict(type=_numbers(len(typing.get_args(hint))), metavar="R,G,B")
    return dict(type=_image_size, metavar="SIZE")


def _image_size(text: str) -> int | tuple[int, int]:
    """'224' is 224; '224,448' and '224x448' are (224, 448)."""
    sides = [int(side) for side in text.replace("x", ",").split(",")]
    if len(sides) > 2:
        raise ValueError
    return sides[0] if len(sides) == 1 else tuple(sides)


def _numbers(count: int):
    def numbers(text: str) -> tuple[float, ...]:
        values = tuple(float(value) for value in text.split(","))
        if len(values) != count:
            raise ValueError
        return values
    return numbers


def _show(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


# ----------------------------------------------------------------------------- arithmetic
def divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def legal_tensor_parallel_sizes(vit: ViTConfig) -> list[int]:
    """Sizes that divide the heads and the MLP's hidden layer: B/16 has 12 heads, so not 8."""
    return [t for t in divisors(vit.num_attention_heads) if vit.ffn_hidden_size % t == 0]


def largest_micro_batch(config: TrainConfig, on_gpu: bool) -> int:
    """The micro-batch that is not exceeded unless --micro-batch-size asks for it."""
    return (MICRO_BATCH.get(config.model, 256) if on_gpu else 64) * config.tensor_parallel_size


def micro_batch_step(config: TrainConfig, vit: ViTConfig) -> int:
    """What divides every legal micro-batch: tp, since each rank owns micro / tp images, and with
    fp8 products what makes the tokens a multiple of 16."""
    fp8 = 16 // math.gcd(vit.seq_length, 16) if config.fp8 else 1
    return math.lcm(config.tensor_parallel_size, fp8)


def plan_batch(config: TrainConfig, world: int, on_gpu: bool,
               step: int = 1) -> tuple[int, int, int]:
    """Splits the global batch: global = micro x dp x accumulation, with dp = world / tp.

    step: of micro_batch_step, for a micro-batch that is not given.
    Returns (micro_batch_size, dp, accumulation). Each rank holds micro_batch_size / tp images.
    Raises ValueError naming the nearest legal values.
    """
    tp, total = config.tensor_parallel_size, config.global_batch_size
    if world % tp:
        raise ValueError(f"--tensor-parallel-size {tp} must divide the number of processes {world}"
                         f"; legal here: {divisors(world)}")
    dp = world // tp
    if total % (dp * tp):
        low = total // (dp * tp) * dp * tp
        raise ValueError(
            f"--global-batch-size {total} must be a multiple of the {world} processes, each of "
            f"which owns its own images; nearest: "
            f"{', '.join(str(n) for n in (low, low + dp * tp) if n)}")
    legal = [m for m in divisors(total // dp) if m % tp == 0]
    micro = config.micro_batch_size
    if micro is None:
        most, fit = largest_micro_batch(config, on_gpu), [m for m in legal if m % step == 0]
        if not fit:
            unit = step * dp
            raise ValueError(f"--global-batch-size {total} must be a multiple of {unit}, dp {dp} x "
                             f"the {step} images that fp8 products need (a multiple of 16 tokens); "
                             f"nearest: {total // unit * unit or unit}, "
                             f"{total // unit * unit + unit}")
        micro = max([m for m in fit if m <= most], default=fit[0])
    if micro % tp:
        near = sorted({m for m in (micro // tp * tp, micro // tp * tp + tp) if m})
        raise ValueError(f"--micro-batch-size {micro} must be divisible by --tensor-parallel-size "
                         f"{tp} (each rank owns micro / tp images); nearest: "
                         f"{', '.join(map(str, near))}")
    if total % (micro * dp):
        low = total // (micro * dp) * micro * dp
        raise ValueError(
            f"--global-batch-size {total} must be a multiple of micro-batch {micro} x dp {dp} = "
            f"{micro * dp}; nearest: {', '.join(str(n) for n in (low, low + micro * dp) if n)}; "
            f"legal --micro-batch-size for {total}: {', '.join(map(str, legal))}")
    return micro, dp, total // (micro * dp)


def stable_seed(*parts) -> int:
    """A 63-bit seed from any ints and strings, the same on every machine and Python."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def to_plain(*configs) -> dict:
    """The dataclasses as one dict of plain types, for checkpoints and logs."""
    return {k: list(v) if isinstance(v, tuple) else v
            for config in configs for k, v in dataclasses.asdict(config).items()}
