"""What a run would be: how the global batch is split, what is legal, how many steps it has.

Every command checks its layout here before it starts; `train.py --dry-run` prints it all.
"""

import math
from collections.abc import Callable

from configs import Compute, Step, TrainConfig, ViTConfig, divisors
from memory import checkpoint_bytes, memory_plan


# ----------------------------------------------------------------------------- the layout
def nearest(n: int, unit: int) -> str:
    """The multiples of `unit` around n, for a message."""
    low = n // unit * unit
    return ", ".join(str(multiple) for multiple in (low, low + unit) if multiple)


def legal_tensor_parallel_sizes(vit: ViTConfig) -> list[int]:
    """Sizes that divide the heads and the MLP's hidden layer: B/16 has 12 heads, so not 8."""
    return [t for t in divisors(vit.num_attention_heads) if vit.ffn_hidden_size % t == 0]


def largest_micro_batch(model: str, tp: int, on_gpu: bool) -> int:
    """The micro-batch that is not exceeded unless --micro-batch-size asks for it: on GPUs the
    launcher's (conf/training/vit/*.yaml; g and G: 64)."""
    launcher = {"H16": 128, "H14": 128, "g14": 64, "G14": 64}
    return (launcher.get(model, 256) if on_gpu else 64) * tp


def micro_batch_step(config: Compute, vit: ViTConfig) -> int:
    """What divides every legal micro-batch: tp, since each rank owns micro / tp images, in pairs if
    they are mixed, and with fp8 products what makes the tokens a multiple of 16; where images are
    left out, in each sixteenth of a rank's images."""
    tp, fp8 = config.tensor_parallel_size, 16 // math.gcd(vit.train_seq_length, 16)
    own = tp * (2 if mixes(config) else 1)
    if not config.fp8:
        return own
    return math.lcm(own, tp * 16 * fp8 if min(vit.computed_shares) < 1 else fp8)


def mixes(config: Compute) -> bool:
    return isinstance(config, Step) and bool(config.mixup or config.cutmix)


def check_layout(config: Compute, vit: ViTConfig, world: int, device: str) -> None:
    """Raises ValueError, with what is legal, for a tensor-parallel size, a micro-batch, fp8
    products or copies between GPUs that this model on `world` processes of `device` cannot have."""
    tp, legal = config.tensor_parallel_size, legal_tensor_parallel_sizes(vit)
    if tp not in legal:
        raise ValueError(f"--tensor-parallel-size {tp} must divide the {vit.num_attention_heads} "
                         f"heads and the MLP width {vit.ffn_hidden_size}; legal here: "
                         f"{', '.join(map(str, legal))}")
    if world % tp:
        raise ValueError(f"--tensor-parallel-size {tp} must divide the number of processes {world}"
                         f"; legal here: {', '.join(map(str, divisors(world)))}")
    micro, step = config.micro_batch_size, micro_batch_step(config, vit)
    if micro and micro % tp:
        raise ValueError(f"--micro-batch-size {micro} must be divisible by --tensor-parallel-size "
                         f"{tp} (each rank owns micro / tp images); nearest: {nearest(micro, tp)}")
    if micro and mixes(config) and micro % (2 * tp):
        raise ValueError(f"--mixup and --cutmix mix pairs of one rank's images: --micro-batch-size "
                         f"{micro} must be a multiple of 2 x tp {tp}; nearest: "
                         f"{nearest(micro, 2 * tp)}; or leave both out")
    if micro and micro % step:
        each = " in each sixteenth of a rank's images" if min(vit.computed_shares) < 1 else ""
        raise ValueError(f"--precision {config.precision} needs a multiple of 16 tokens{each}, and "
                         f"--micro-batch-size {micro} x {vit.train_seq_length} tokens is "
                         f"{micro * vit.train_seq_length}; nearest: {nearest(micro, step)}")
    for name in ("hidden_size", "ffn_hidden_size") if config.fp8 else ():
        if getattr(vit, name) % (16 * tp):
            raise ValueError(f"--precision {config.precision} needs {name} {getattr(vit, name)} to "
                             f"be a multiple of 16 x --tensor-parallel-size {tp} = {16 * tp}")
    if config.tp_comm_overlap and (tp == 1 or config.fp8 or device == "cpu"):
        raise ValueError("--tp-comm-overlap needs --tensor-parallel-size above 1, GPUs and a "
                         "--precision without fp8")
    if getattr(config, "peer_copies", None) and (world == 1 or device == "cpu"):
        raise ValueError("--peer-copies needs several GPUs of one host; leave it out here")


def plan_batch(config: Step, vit: ViTConfig, world: int, device: str) -> tuple[int, int, int]:
    """Splits the global batch: global = micro x dp x accumulation, with dp = world / tp.

    Returns (micro_batch_size, dp, accumulation). Each rank holds micro_batch_size / tp images.
    Raises ValueError as check_layout does, and naming the nearest legal batches.
    """
    check_layout(config, vit, world, device)
    if config.fp8 and config.freeze == "backbone":
        raise ValueError(f"--precision {config.precision} has no effect with --freeze backbone, as "
                         "the blocks have no backward; legal: fp32, bf16, bf16-O2")
    if (config.activation_checkpointing == "selective" and vit.attention_dropout
            and vit.drop_path_mode == "batch"):  # an attention's draw must be its block's first
        raise ValueError("--activation-checkpointing selective with --drop-path-mode batch: "
                         f"--attention-dropout must be 0, not {vit.attention_dropout}")
    tp, total, step = config.tensor_parallel_size, config.global_batch_size, micro_batch_step(
        config, vit)
    dp, micro = world // tp, config.micro_batch_size
    if total % world:
        raise ValueError(f"--global-batch-size {total} must be a multiple of the {world} processes,"
                         f" each of which owns its own images; nearest: {nearest(total, world)}")
    legal = [m for m in divisors(total // dp) if m % step == 0] if total % dp == 0 else []
    if not legal:
        raise ValueError(f"--global-batch-size {total} must be a multiple of {step * dp}, dp {dp} x"
                         f" the {step} images that fp8 products (a multiple of 16 tokens) or mixing"
                         f" (pairs on each rank) need; nearest: {nearest(total, step * dp)}")
    if config.repeated_augmentation > 1 and total < 2 * config.repeated_augmentation:
        raise ValueError(f"--repeated-augmentation {config.repeated_augmentation} must be at most "
                         f"half of --global-batch-size {total}, so that a batch has two images")
    if micro is None:
        most = largest_micro_batch(config.model, tp, device == "cuda")
        micro = max([m for m in legal if m <= most], default=legal[0])
    if micro not in legal:
        raise ValueError(
            f"--global-batch-size {total} must be a multiple of micro-batch {micro} x dp {dp} = "
            f"{micro * dp}; nearest: {nearest(total, micro * dp)}; legal --micro-batch-size for "
            f"{total}: {', '.join(map(str, legal))}")
    return micro, dp, total // (micro * dp)


def run_length(config: TrainConfig, images: int, step: int = 0,
               image: int = 0) -> tuple[int, float]:
    """(total_steps, shift) of a run that goes on after `step` and `image` images.

    --max-steps counts steps. --epochs counts images seen, so that a run which goes on with another
    batch ends at the same image; step + shift is then its place, in batches of now, on the
    schedule. Raises ValueError if the length is behind it already.
    """
    batch, total = config.global_batch_size, int(config.epochs * images)
    if config.max_steps and step > config.max_steps or not config.max_steps and (
            image >= total + batch):
        raise ValueError(f"the checkpoint of step {step} has seen {image / images:.2f} epochs, more"
                         f" than --max-steps {config.max_steps} or --epochs {config.epochs:g} ask "
                         f"for; give more, or --resume PATH of an earlier checkpoint")
    if config.max_steps:
        return config.max_steps, 0.0
    left = max(total - image, 0) // batch
    return step + max(left, int(step == 0)), image / batch - step


# ----------------------------------------------------------------------------- the dry run
def dry_run(config: TrainConfig, vit: ViTConfig, train_set, val_set, total_steps: int, batch: tuple,
            device: str, learning_rate: Callable[[int], float]) -> None:
    """Prints what a run would be: sizes, memory, schedule and the legal layouts.

    batch: plan_batch's; learning_rate: of a step."""
    micro, dp, accumulation = batch
    tp, total = config.tensor_parallel_size, config.global_batch_size
    gib = 2**30
    h, w = vit.grid_hw
    print(f"recipe       {config.recipe}")
    print(f"model        {config.model}: {vit.num_params / 1e6:,.2f} M parameters, "
          f"{vit.num_layers} blocks of width {vit.hidden_size}, "
          f"{vit.num_attention_heads} heads of {vit.head_dim}")
    print(f"tokens       {vit.seq_length} = {vit.num_class_tokens} class + {h} x {w} patches "
          f"of {vit.patch_size} px")
    print(f"FLOPs        {vit.flops_per_image() / 1e9:,.2f} G per image forward, "
          f"{config.passes * vit.flops_per_image(training=True) / 1e9:,.2f} G in a training step")
    print(f"data         {len(train_set):,} training and {len(val_set):,} validation images, "
          f"{len(train_set.classes)} classes")
    print(f"batch        {total} = micro-batch {micro} x dp {dp} x accumulation {accumulation}")
    print(f"steps        {total_steps:,} = {total_steps * total / len(train_set):,.1f} epochs")
    marks = sorted({0, config.warmup_steps // 2, min(config.warmup_steps, total_steps - 1),
                    total_steps // 2, total_steps - 1} & set(range(total_steps)))
    rates = ", ".join(f"{s:,}: {learning_rate(s):.3g}" for s in marks)
    unreached = f"; the peak --lr {config.lr} is not reached"
    print(f"lr at step   {rates}{unreached if config.warmup_steps >= total_steps else ''}")
    plan = memory_plan(vit, config, tp, dp, micro)
    parts = " + ".join(f"{name} {size / gib:.2f}" for name, size in plan.items())
    print(f"memory       {sum(plan.values()) / gib:.2f} GiB per rank on {device} = {parts}")
    saved = checkpoint_bytes(vit, config) / gib
    print(f"checkpoint   {saved:.2f} GiB; to write it beside the training, {saved / (tp * dp):.2f} "
          f"GiB of host memory per rank")
    legal_tp, step = legal_tensor_parallel_sizes(vit), micro_batch_step(config, vit)
    print(f"legal --tensor-parallel-size  {', '.join(map(str, legal_tp))}")
    print(f"legal --micro-batch-size      "
          f"{', '.join(str(m) for m in divisors(total // dp) if m % step == 0)}")
    print("weights + gradients + optimizer, GiB per rank:")
    worlds = [1, 2, 4, 8, 16, 32, 64]
    print("  processes " + "".join(f"{n:>8}" for n in worlds))
    for t in [t for t in legal_tp if t <= max(8, tp)]:
        cells = ["-" if n % t else _gib(memory_plan(vit, config, t, n // t, t)) for n in worlds]
        print(f"  tp {t:<7} " + "".join(f"{cell:>8}" for cell in cells))


def _gib(plan: dict) -> str:
    return f"{sum(size for part, size in plan.items() if part != 'activations') / 2**30:.2f}"
