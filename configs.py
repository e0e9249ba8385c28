"""What can be set: the model table, and one dataclass of flags for each command.

Four layers decide a value, the later one wins (recipes.parse_run):
    1. the defaults of the dataclasses below (they are the `pretrain` recipe)
    2. `RECIPES[recipe]` of recipes.py and, for the model's shape, `MODELS[model]`
    3. what comes with the weights of --init-from (weights.adopt)
    4. the flags of the command line, generated from the fields: `hidden_size` is `--hidden-size`

Sizes, names and the recipe follow NVIDIA NeMo 1.23 (docs/source/vision/vit.rst and the launcher's
conf/training/vit/*.yaml); B, L, H are of the ViT paper (arXiv:2010.11929), g and G of "Scaling
Vision Transformers" (arXiv:2106.04560), Ti and S of DeiT (arXiv:2012.12877).
"""

import hashlib
import os
from dataclasses import dataclass, field
from typing import Literal

from flags import (
    ABOVE_ZERO,
    BELOW_ONE,
    FOLDER,
    GIVEN,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    SHARE,
    Checked,
    also,
    flag,
)

Size = int | tuple[int, int]  # of a square's side, or (height, width), in pixels
Colour = tuple[float, float, float]
Gelu = Literal["none", "tanh", "quick"]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# A GPU's queues, read when CUDA starts: of 8, the default, views and training would share some.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


# ----------------------------------------------------------------------------- the model's shape
@dataclass(frozen=True)
class ViTConfig(Checked):
    """The shape of one Vision Transformer. Everything that follows from it is a property."""

    hidden_size: int = flag(768, "width D of the residual stream", POSITIVE)
    ffn_hidden_size: int = flag(3072, "width of the MLP's hidden layer", POSITIVE)
    num_layers: int = flag(12, "number of transformer blocks", POSITIVE)
    num_attention_heads: int = flag(12, "attention heads, each hidden_size / heads wide", POSITIVE)
    patch_size: int = flag(16, "side of a square patch in pixels", POSITIVE)
    image_size: Size = flag(224, "image side in pixels, or HEIGHT,WIDTH")
    num_channels: int = flag(3, "channels of an image", POSITIVE)
    num_classes: int = flag(1000, "classes of the head (default: those of the data)", POSITIVE)
    num_class_tokens: int = flag(8, "learned tokens before the patches", NOT_NEGATIVE)
    pool: Literal["token", "mean"] = flag("token", "the output: token 0, or the patches' mean")
    fc_norm: bool = flag(False, "norm of the mean instead of every token (as MAE)", pool="mean")
    layerscale: float = flag(0.0, "LayerScale's first factors, e.g. 1e-5; 0: none", NOT_NEGATIVE)
    pre_norm: bool = flag(False, "a LayerNorm before the blocks (as CLIP)")
    hidden_dropout: float = flag(0.1, "dropout of embedding and residual branches", BELOW_ONE)
    attention_dropout: float = flag(0.0, "dropout of the attention probabilities", BELOW_ONE)
    drop_path_rate: float = flag(0.0, "stochastic depth, linear from 0 over the blocks", BELOW_ONE)
    drop_path_uniform: bool = flag(False, "that rate in every block (as DeiT-III)",
                                   drop_path_rate=ABOVE_ZERO)
    drop_path_mode: Literal["image", "batch"] = flag(
        "image", "image: each is dropped at the rate; batch: a fixed number, at rates in "
        "sixteenths, which are not computed", drop_path_rate=ABOVE_ZERO)
    drop_patch_rate: float = flag(0.0, "share of an image's patches left out in training (timm's "
                                  "patch_drop_rate)", BELOW_ONE)
    gelu_approximate: Gelu = flag(
        "none", "none: exact GELU; tanh: faster; quick: x sigmoid(1.702 x), as CLIP")
    layernorm_eps: float = flag(1e-6, "epsilon of every LayerNorm (NeMo 1e-5, timm 1e-6)")
    head: Literal["mlp", "linear"] = flag("mlp", "mlp: linear, tanh, linear (pretraining); linear")

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"--hidden-size {self.hidden_size} must be divisible by --num-attention-heads "
                f"{self.num_attention_heads}; legal heads: {divisors(self.hidden_size)}")
        if self.pool == "token" and not self.num_class_tokens:
            raise ValueError("--num-class-tokens 0 leaves no token 0 to read: give --pool mean")
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
    def train_seq_length(self) -> int:
        """Tokens of an image in training, at least one of them a patch."""
        return self.num_class_tokens + max(int(self.num_patches * (1 - self.drop_patch_rate)), 1)

    @property
    def drop_path_rates(self) -> list[float]:
        """Of each block, linear from 0, or --drop-path-uniform."""
        n = self.num_layers
        return [self.drop_path_rate * (1 if self.drop_path_uniform else i / max(n - 1, 1))
                for i in range(n)]

    @property
    def computed_shares(self) -> list[float]:
        """The share of the images that each block computes in training."""
        batch = self.drop_path_mode == "batch"
        return [kept_images(16, rate) / 16 if batch else 1.0 for rate in self.drop_path_rates]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def patch_dim(self) -> int:
        """Values of one unfolded patch."""
        return self.num_channels * self.patch_size ** 2

    @property
    def num_params(self) -> int:
        """All parameters of the model, head included."""
        d, f, c = self.hidden_size, self.ffn_hidden_size, self.num_classes
        scale = 2 * d if self.layerscale else 0
        block = (4 * d * d + 4 * d) + (2 * d * f + f + d) + 4 * d + scale  # attention, MLP, 2 norms
        embedding = (self.patch_dim + 1) * d + (self.num_class_tokens + self.seq_length) * d
        head = (d * d + d if self.head == "mlp" else 0) + d * c + c
        return embedding + self.num_layers * block + 2 * d * (1 + self.pre_norm) + head

    def flops_per_image(self, training: bool = False) -> float:
        """Floating-point operations of one image's forward pass: the matrix products and attention
        that are computed (a multiply-add is 2); of the last block keys and values of all tokens,
        the rest of one, unless the head reads their mean. training: without the patches and the
        halves of blocks that are left out; a step costs three times this, without recomputation.
        """
        d, f = self.hidden_size, self.ffn_hidden_size
        s = self.train_seq_length if training else self.seq_length
        shares = self.computed_shares if training else [1.0] * self.num_layers

        def block(n: int) -> int:
            """Keys and values of all s tokens; query, attention, projection and MLP of n."""
            return 2 * s * 2 * d * d + 2 * n * (2 * d * d + 2 * d * f) + 4 * n * s * d
        last = block(1 if self.pool == "token" else s)
        head = 2 * d * self.num_classes + (2 * d * d if self.head == "mlp" else 0)
        embedding = 2 * self.num_patches * d * self.patch_dim
        return embedding + sum(shares[:-1]) * block(s) + shares[-1] * last + head


MODELS = {
    #                hidden   ffn  layers  heads  patch      params with a 1000-way linear head
    "Ti16": ViTConfig(  192,   768,     12,     3,    16),
    "S16":  ViTConfig(  384,  1536,     12,     6,    16),
    "B16":  ViTConfig(  768,  3072,     12,    12,    16),      # 86.58 M
    "L16":  ViTConfig( 1024,  4096,     24,    16,    16),      # 304.34 M
    "H16":  ViTConfig( 1280,  5120,     32,    16,    16),      # 632.22 M
    "H14":  ViTConfig( 1280,  5120,     32,    16,    14),      # 632.06 M
    "g14":  ViTConfig( 1408,  6144,     40,    16,    14),      # 1,012.63 M
    "G14":  ViTConfig( 1664,  8192,     48,    16,    14),      # 1,844.46 M
    "demo": ViTConfig(   96,   384,      4,     4,     8, image_size=32, num_class_tokens=1),
}


# ----------------------------------------------------------------------------- shared flags
@dataclass(frozen=True)
class Compute(Checked):
    """What every command that runs a model takes: its layout, precision and kernels."""

    tensor_parallel_size: int = flag(1, "ranks that share one model replica", POSITIVE)
    micro_batch_size: int | None = flag(
        None, "images of one forward pass per model replica (default: the largest legal up to the "
        "model's own)", POSITIVE)
    attention: Literal["auto", "triton", "cudnn", "flash", "efficient", "math",
                       "flash-attn"] = flag(
        "auto", "attention kernel; auto: the first that runs of this list, flash-attn left out")
    compile: bool | None = flag(None, "fused kernels, torch.compile of blocks (default: on CUDA)")
    tp_comm_overlap: bool | None = flag(
        None, "tensor parallelism: collectives under the products (default: where a host has all "
        "GPUs of a tp group; not with fp8)")
    deterministic: bool = flag(False, "bit-reproducible kernels, slower")
    collective_timeout: float | None = flag(
        None, "seconds, more than a step has, that a rank waits for others until the job ends; "
        "after a tenth the log says where each is (default: torch's, NCCL 600, gloo 1800)",
        POSITIVE)

    @property
    def o2(self) -> bool:
        """bf16 weights, fp32 masters."""
        return self.precision.startswith("bf16-O2")

    @property
    def fp8(self) -> bool:
        """The blocks' products in fp8, in training."""
        return self.precision.endswith("-fp8")


@dataclass(frozen=True)
class Loader(Checked):
    """How images are loaded."""

    num_workers: int = flag(min(8, CORES), "processes per rank that load images", NOT_NEGATIVE)
    prefetch_factor: int = flag(4, "micro-batches that each worker holds ready", POSITIVE)
    pin_memory: bool = flag(True, "page-locked host batches (on CUDA, of views by workers)")
    decode: Literal["auto", "cpu", "gpu"] = flag(
        "auto", "who makes the views of JPEG files; gpu: the GPU; cpu: workers (a GPU the "
        "operations of large batches); auto: gpu with JPEG engines, not for small batches")


@dataclass(frozen=True)
class Untold(Checked):
    """What a file of weights may not tell; by default all of it is as the weights say."""

    weights: Literal["ema", "model"] | None = flag(
        None, "of a checkpoint: its average (--ema-decay) or the model's own weights (default: the "
        "average, where there is one)")
    image_size: Size | None = flag(None, "image side in pixels, or HEIGHT,WIDTH")
    init_image_size: Size | None = flag(
        None, "image size of the weights, where they do not tell and are not square")
    num_attention_heads: int | None = flag(None, "attention heads", POSITIVE)
    layernorm_eps: float | None = flag(None, "epsilon of every LayerNorm")
    gelu_approximate: Gelu | None = flag(None, "none: exact GELU")
    mean: Colour | None = flag(None, "pixel mean, R,G,B")
    std: Colour | None = flag(None, "pixel deviation, R,G,B")
    crop_ratio: float | None = flag(None, "image side / resized shorter side", SHARE)


CROPPED = "nemo", "crop-flip", "crop", "randaugment", "trivialaugment", "3-augment"


@dataclass(frozen=True)
class Step(Compute):
    """What one training step is. The defaults are the `pretrain` recipe."""

    model: str = flag("B16", "Ti16 S16 B16 L16 H16 H14 g14 G14 or demo; L/16 is L16")
    recipe: str = flag("pretrain", "one of recipes.py (default: demo for the demo's data, small or "
                       "small-finetune for a small folder, else pretrain)")
    seed: int = flag(0, "of weights, data order, augmentation and dropout", NOT_NEGATIVE)
    global_batch_size: int = flag(4096, "images of one optimizer step, over all ranks", POSITIVE)
    precision: Literal["fp32", "bf16", "bf16-O2", "bf16-O2-fp8"] = flag(
        "bf16-O2", "bf16: autocast over fp32 weights; bf16-O2: bf16 weights, fp32 masters; "
        "-fp8: and the blocks' matrix products in fp8")
    peer_copies: bool | None = flag(None, "sum gradients by copies between the GPUs instead of "
                                    "NCCL (default: where one host has all of them)")
    activation_checkpointing: Literal["none", "selective", "full"] = flag(
        "none", "selective: keep matrix products and attention; full: keep block inputs only",
        freeze="none")
    checkpoint_method: Literal["uniform", "block"] = flag(
        "uniform", "uniform: every run of N layers as one; block: only the first N layers",
        activation_checkpointing="full")
    checkpoint_num_layers: int = flag(1, "N of --checkpoint-method", POSITIVE,
                                      activation_checkpointing="full")
    # optimizer
    optimizer: Literal["adamw", "sgd", "lamb"] = flag(
        "adamw", "torch.optim's, fused, sharded (ZeRO-1); lamb: AdamW's step scaled to each weight")
    lr: float = flag(3e-3, "peak learning rate; never rescaled silently", NOT_NEGATIVE)
    min_lr: float = flag(1e-5, "learning rate at the end of the cosine", NOT_NEGATIVE)
    warmup_steps: int = flag(10_000, "steps of linear warm-up", NOT_NEGATIVE)
    decay_steps: int | None = flag(None, "length of the cosine, which ends the run; before it the "
                                   "rate is constant (default: all steps after warm-up)", POSITIVE)
    weight_decay: float = flag(0.3, "on matrices only; adamw: decoupled, w -= lr * decay * w; "
                               "sgd: added to the gradient", NOT_NEGATIVE)
    adam_beta1: float = flag(0.9, "AdamW beta 1", BELOW_ONE, optimizer=("adamw", "lamb"))
    adam_beta2: float = flag(0.999, "AdamW beta 2", BELOW_ONE, optimizer=("adamw", "lamb"))
    adam_eps: float = flag(1e-8, "AdamW epsilon", POSITIVE, optimizer=("adamw", "lamb"))
    momentum: float = flag(0.9, "SGD momentum", BELOW_ONE, optimizer="sgd")
    clip_grad: float = flag(1.0, "largest global gradient norm; 0: no clipping", NOT_NEGATIVE)
    layer_decay: float = flag(1.0, "lr of each block as a share of the next one's, for fine-tuning "
                              "(MAE 0.65 to 0.75)", SHARE, freeze="none",
                              optimizer=("adamw", "sgd"))
    freeze: Literal["none", "backbone"] = flag(
        "none", "backbone: train the head alone, without dropout (a linear probe)")
    ema_decay: float = flag(
        0.0, "decay, per step, of an average of the weights, which validation scores; 0: none "
        "(torchvision's d of every 32 steps is d^(1/32))", BELOW_ONE)
    # loss
    loss: Literal["ce", "bce"] = flag("ce", "ce: softmax cross-entropy; bce: one binary loss a "
                                      "class, both classes of a mixed image count as 1 (DeiT-III); "
                                      "validation: ce")
    label_smoothing: float = flag(0.0, "share of the target spread over all classes", BELOW_ONE)
    mixup: float = flag(0.0, "blend pairs of images, share from Beta(A, A); 0: never", NOT_NEGATIVE)
    cutmix: float = flag(0.0, "cut boxes, likewise; beside --mixup by even odds", NOT_NEGATIVE)
    # images; benchmark.py may have none
    augmentation: Literal[(*CROPPED, "none")] = flag(
        "nemo", "random crop; but for crop also a flip; then nemo: AutoAugment, colour jitter "
        "0.4/0.4/0.4/0.1; 3-augment: DeiT-III's three, jitter 0.3/0.3/0.3; none: the centre")
    rand_augment: tuple[int, int] = flag(
        (2, 9), "operations an image, magnitude of torchvision's 0 to 30",
        ("be a number from 1 on and a magnitude in 0..30", lambda x: x[0] > 0 and 0 <= x[1] <= 30),
        data=GIVEN, augmentation="randaugment")
    random_erasing: float = flag(0.0, "probability that a box is filled with the mean pixel",
                                 PROBABILITY, data=GIVEN, augmentation=CROPPED)
    repeated_augmentation: int = flag(1, "views of each image; so many fewer in a batch", POSITIVE,
                                     data=GIVEN)
    crop_scale: float = flag(0.08, "least area of the random crop", SHARE, data=GIVEN,
                             augmentation=CROPPED)
    mean: Colour = flag((0.485, 0.456, 0.406), "pixel mean, R,G,B")
    std: Colour = flag((0.229, 0.224, 0.225), "pixel deviation, R,G,B",
                       ("be positive", lambda std: min(std) > 0))

    def __post_init__(self):
        super().__post_init__()
        if self.min_lr > self.lr:
            raise ValueError(f"--min-lr {self.min_lr} must not exceed --lr {self.lr}")
        if self.loss == "bce" and self.label_smoothing:
            raise ValueError(f"--loss bce makes a target of every class with a share, so with "
                             f"--label-smoothing {self.label_smoothing} of all; it must be 0")

    @property
    def passes(self) -> int:
        """A training step's work in forward passes: backward is two, of what is not frozen."""
        return 1 if self.freeze == "backbone" else 3


# ----------------------------------------------------------------------------- one command each
@dataclass(frozen=True)
class TrainConfig(Step, Loader):
    """train.py: trains a ViT, from nothing, from weights, or on from a checkpoint."""

    data: str = flag("shapes", "folder with train/CLASS/* and val/CLASS/*, or with CLASS/* alone. "
                     "Or with tars of them, *train*.tar and *val*.tar: ILSVRC2012's, WebDataset's "
                     "or your own, read where they lie. Or 'shapes' (drawn)")
    val_labels: str | None = flag(
        None, "file with the classes of images that lie flat in DATA/val or in val's tar: lines of "
        "'NAME CLASS', or ImageNet's LOC_val_solution.csv", data=FOLDER)
    val_share: float | None = flag(
        None, "share of the images that validate where DATA has no val, chosen by a hash of their "
        "paths (default: 0.1)", SHARE, data=FOLDER)
    classes_fraction: float = flag(1.0, "share of the classes, the first ones, in validation too",
                                   SHARE, data=FOLDER)
    data_per_class_fraction: float = flag(
        1.0, "share of each class's training images, chosen by a hash of their paths", SHARE,
        data=FOLDER)
    index: str | None = flag(
        None, "file with the index of DATA's tars, made where there is none (default: "
        "OUTPUT_DIR/index.npz)", data=FOLDER)
    output_dir: str = flag("output", "checkpoints, metrics.jsonl, TensorBoard")
    epochs: float = flag(300.0, "length of the run in images seen, without --max-steps", POSITIVE)
    warmup_epochs: float | None = flag(None, "instead of --warmup-steps", NOT_NEGATIVE)
    max_steps: int | None = flag(None, "length of the run in optimizer steps", POSITIVE)
    crop_ratio: float = flag(0.875, "evaluation: image side / resized shorter side", SHARE)
    max_unreadable: float = flag(0.001, "more unreadable training images than max(1, this share of "
                                 "all) end the run; 0: the first", NOT_NEGATIVE)
    log_interval: int = flag(10, "steps between log lines", POSITIVE)
    eval_interval: int = flag(1000, "steps between evaluations; 0: only at the end", NOT_NEGATIVE)
    save_interval: int = flag(1000, "steps between checkpoints; 0: only at the end", NOT_NEGATIVE)
    keep_last: int = flag(3, "newest checkpoints kept; 0: all", NOT_NEGATIVE)
    keep_best: int = flag(0, "checkpoints of the best validation top-1 kept beside those; each "
                          "evaluation is then saved, and OUTPUT/best is the best", NOT_NEGATIVE)
    tensorboard: bool = flag(False, "also write TensorBoard scalars (needs tensorboard)")
    report: bool = flag(False, "at the end write OUTPUT_DIR/report.html, as report.py does")
    wandb: bool = flag(False, "also log to Weights & Biases (needs wandb)")
    resume: str = flag("auto", "auto: newest complete checkpoint of --output-dir; none; or a path")
    init_from: str | None = flag(
        None, "start from these weights: a checkpoint or output directory of this program, a file "
        "of another library (weights.py says which), timm:NAME, torchvision:NAME or hf:ORG/NAME")
    init_image_size: Size | None = also(Untold, "init_image_size", init_from=GIVEN)
    weights: Literal["ema", "model"] | None = also(Untold, "weights", init_from=GIVEN)
    dry_run: bool = flag(False, "print sizes, memory, schedule and legal layouts, then exit")


@dataclass(frozen=True)
class BenchmarkConfig(Step, Loader):
    """benchmark.py: times training steps."""

    recipe: str = flag("pretrain", "one of recipes.py")
    steps: int = flag(20, "steps to time", POSITIVE)
    global_batch_size: int | None = flag(None, "images of one step (default: one micro-batch on "
                                         "every replica)", POSITIVE)
    data: str | None = flag(None, "a folder, or 'shapes': its loader is timed too, alone and with "
                            "the steps (default: random images only)")
    num_workers: int = also(Loader, "num_workers", data=GIVEN)
    prefetch_factor: int = also(Loader, "prefetch_factor", data=GIVEN)
    pin_memory: bool = also(Loader, "pin_memory", data=GIVEN)
    decode: Literal["auto", "cpu", "gpu"] = also(Loader, "decode", data=GIVEN)
    crop_ratio: float = flag(0.875, "image side / resized shorter side", SHARE, data=GIVEN,
                             augmentation="none")
    profile: str | None = flag(None, "a folder for traces; also prints where a step's time goes")


@dataclass(frozen=True)
class EvalConfig(Untold, Compute, Loader):
    """evaluate.py: scores images whose classes are known, or predicts those of others."""

    checkpoint: str | None = flag(None, "weights: an output directory or checkpoint of this "
                                  "program, or a file that --init-from takes")
    data: str | None = flag(None, "score DATA/val/CLASS/*, or DATA/CLASS/*, or train.py's tars, or "
                            "'shapes'; a CLASS may be a number of the model's, as in ImageNet-V2")
    val_labels: str | None = also(TrainConfig, "val_labels")
    real_labels: str | None = flag(
        None, "ReaL's real.json: also score ImageNet's validation images against its lists of "
        "labels (arXiv:2006.07159)", data=FOLDER)
    val_share: float | None = flag(
        None, "share of the images that validate where DATA has no val, chosen by a hash of their "
        "paths (default: as held out in training; 1: all)", SHARE, data=FOLDER)
    index: str | None = also(TrainConfig, "index")
    predict: str | None = flag(None, "classify this image, or every image below this folder or in "
                               "this tar: predictions.csv and .png in --output-dir")
    output_dir: str | None = flag(None, "of results (default: the run; of --predict else 'output')")
    precision: Literal["fp32", "bf16", "bf16-O2"] | None = flag(
        None, "default: the run's own; fp32 for files of other libraries")

    def __post_init__(self):
        super().__post_init__()
        if not self.checkpoint:
            raise ValueError("--checkpoint PATH is needed: an output directory, a checkpoint, or a "
                             "file of weights")
        if (self.data is None) == (self.predict is None):
            raise ValueError("give --data DIR to score DIR/val, or --predict FOLDER; one of them")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Loader):
    """report.py: what a run learned, as one page: report.html in the first OUTPUT."""

    output: list[str] = field(metadata={"help": "output directories of train.py", "must": None})
    data: str | None = flag(None, "score DATA/val/CLASS/*, or 'shapes' (default: each run's own "
                            "data)")
    val_labels: str | None = flag(None, "as train.py's (default: each run's own)", data=FOLDER)
    micro_batch_size: int | None = also(EvalConfig, "micro_batch_size")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Untold):
    """weights.py: a checkpoint, or a file of one library, as a file of another."""

    source: str = field(metadata={"help": "as evaluate.py's --checkpoint", "must": None})
    output: str = field(metadata={"help": "a .pt or .safetensors file", "must": None})
    format: Literal["timm", "hf", "torchvision", "onnx", "torch-export"] = flag(
        "timm", "library; hf: OUTPUT is FOLDER/model.safetensors; or a program: .onnx, .pt2")
    dtype: Literal["float32", "float16", "bfloat16"] = flag(
        "float32", "of the weights in the file", format=("timm", "hf", "torchvision"))


# ----------------------------------------------------------------------------- small helpers
def divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def kept_images(images: int, rate: float) -> int:
    """How many of a rank's images a block half computes by --drop-path-mode batch. The rate is
    rounded to sixteenths, so that the blocks of a model have few shapes, each a compiled graph."""
    return max(images * (16 - round(16 * rate)) // 16, 1)


def stable_seed(*parts) -> int:
    """A 63-bit seed from any ints and strings, the same on every machine and Python."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
