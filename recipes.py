"""Recipes: what each changes of the defaults in configs.py, which are NeMo's.

A key is a field of the model or of the run. Accuracies are top-1 on ImageNet-1k as their authors
publish them; none was trained here. Everywhere the lr is set by step, weight decay is on matrices
alone (torchvision's on all weights), and crops and evaluation are bicubic; what else differs from
a source is said above the recipe. parse_run puts defaults, recipe and flags together.
"""

import os
from dataclasses import fields, replace

import torch

from configs import MODELS, TrainConfig, ViTConfig
from flags import check_only, flag_name, read_flags, unknown

PLAIN = dict(num_class_tokens=1, head="linear", hidden_dropout=0.0)  # the model as timm has it
SMALL = PLAIN | dict(  # a CPU is slower in bf16
    precision="bf16" if torch.cuda.is_available() else "fp32", global_batch_size=64,
    weight_decay=0.05, label_smoothing=0.1, augmentation="randaugment", eval_interval=500)
RECIPES = {
    # Built-in images, a model of 0.5 M parameters, minutes on two CPU cores.
    "demo": dict(
        model="demo", precision="fp32", epochs=5.0, global_batch_size=64, lr=2e-3, warmup_steps=100,
        adam_beta2=0.95, weight_decay=0.05, hidden_dropout=0.0, augmentation="none",
        crop_ratio=1.0, num_workers=0, log_interval=25, eval_interval=125, save_interval=125),

    # NeMo's from-scratch recipe for B/16. It differs in initial weights, in what decays, in the
    # crop's filter, the jitter's place and LayerNorm's epsilon: README, "Beside NeMo".
    "pretrain": dict(),

    # The ViT paper's fine-tuning, as NVIDIA's page has it: 20,000 steps at 512 or 518 px. (The
    # launcher's file says 384 px, lr 3e-3, min lr 1e-5 and the pretraining augmentation.)
    "finetune": dict(
        head="linear", max_steps=20_000, global_batch_size=512, optimizer="sgd", lr=0.03,
        min_lr=0.0, warmup_steps=0, weight_decay=0.0, augmentation="crop-flip"),

    # torchvision's references/classification: B/16 81.072; L/16 79.662, another recipe, below.
    # There: one mix for all images of a batch and rank, an average that begins after the warm-up,
    # fp16. Its decay of 0.99998, in steps of 32 and scaled by batch and epochs, is 0.99973 a step.
    "torchvision": PLAIN | dict(
        epochs=300.0, warmup_epochs=30.0, min_lr=0.0, label_smoothing=0.11, mixup=0.2, cutmix=1.0,
        ema_decay=0.99973,
        augmentation="randaugment", rand_augment=(2, 9), repeated_augmentation=3),

    # DeiT-III's first stage (README_revenge.md, engine.py): S/16 81.4, B/16 82.82 at 192 px, L/16
    # 84.02; with 20 epochs at 224 px that follow (AdamW) B 83.8, L 84.9, H/14 85.2. There: fp16.
    "deit3": PLAIN | dict(
        layerscale=1e-4, drop_path_uniform=True,
        epochs=800.0, warmup_epochs=5.0, global_batch_size=2048, optimizer="lamb",
        weight_decay=0.05, loss="bce", mixup=0.8, cutmix=1.0, augmentation="3-augment",
        repeated_augmentation=3, crop_ratio=1.0),

    # "Better plain ViT baselines" (arXiv:2205.01580, vit_s16_i1k.py): S/16 76.5 after 90 epochs, 80
    # after 300. There: sin-cos positions, 99 % of the images, decay of 1e-4 that joins after the
    # rate (0.1 in AdamW's terms), and TensorFlow's RandAugment(2, 10) at its maximum, 30 of
    # torchvision's 30, where solarizing does nothing.
    "simple": dict(
        model="S16", num_class_tokens=0, pool="mean", hidden_dropout=0.0, epochs=90.0,
        global_batch_size=1024,
        lr=1e-3, min_lr=0.0, warmup_steps=10_000, weight_decay=0.1, mixup=0.2, crop_scale=0.05,
        augmentation="randaugment", rand_augment=(2, 30), mean=(0.5,) * 3, std=(0.5,) * 3),

    # MAE's fine-tuning of its own weights (FINETUNE.md): B/16 83.66, L/16 85.95, H/14 86.93. There:
    # noise in erased boxes, timm's RandAugment (rand-m9 is 27 of torchvision's 30; with probability
    # 0.5 and noise on the magnitude).
    "mae-finetune": PLAIN | dict(
        pool="mean", fc_norm=True, layer_decay=0.75,
        epochs=50.0, warmup_epochs=5.0, global_batch_size=1024, lr=4e-3, min_lr=1e-6,
        weight_decay=0.05, clip_grad=0.0, label_smoothing=0.1, mixup=0.8, cutmix=1.0,
        random_erasing=0.25, augmentation="randaugment", rand_augment=(2, 27)),

    # A folder of some hundred to some thousand images, from nothing and from weights; of no paper.
    # Mixing and erasing slow what has few steps: 58.8 instead of 64.4 after 561 of the digits.
    "small": SMALL | dict(model="Ti16", epochs=300.0, warmup_epochs=10.0, lr=1e-3),
    "small-finetune": SMALL | dict(
        epochs=50.0, warmup_epochs=5.0, lr=1e-4, min_lr=1e-6, drop_path_rate=0.1, layer_decay=0.75),
}
# What a recipe changes, beyond that, for one model.
RECIPES_OF_MODELS = {
    "finetune": {  # 512 is no multiple of 14
        **dict.fromkeys(("Ti16", "S16", "B16", "L16", "H16"), dict(image_size=512)),
        **dict.fromkeys(("H14", "g14", "G14"), dict(image_size=518))},
    "torchvision": {"L16": dict(
        epochs=600.0, warmup_epochs=5.0, global_batch_size=1024, optimizer="sgd", lr=0.5,
        weight_decay=2e-5, label_smoothing=0.1, augmentation="trivialaugment", random_erasing=0.1,
        precision="fp32", crop_ratio=224 / 242, ema_decay=0.999966)},
    "deit3": {
        "S16": dict(lr=4e-3, drop_path_rate=0.05),
        "B16": dict(image_size=192, drop_path_rate=0.2),
        "L16": dict(image_size=192, drop_path_rate=0.45),
        "H14": dict(image_size=154, drop_path_rate=0.6)},  # its patches cover 154 of 160 px
    "mae-finetune": {
        "B16": dict(epochs=100.0, lr=2e-3, drop_path_rate=0.1, layer_decay=0.65),
        "L16": dict(drop_path_rate=0.2),
        "H14": dict(drop_path_rate=0.3)},
}
FINE_TUNING = "finetune", "mae-finetune", "small-finetune"  # these need --init-from
SMALL_FOLDER = 250_000  # training images; with fewer, `pretrain` ends soon after its warm-up


def default_recipe(given: dict) -> str:
    """The recipe of a training run without --recipe.

        demo              the demo's data and model
        small             a folder with fewer than SMALL_FOLDER files in train/, or in itself, after
                          --classes-fraction and --data-per-class-fraction
        small-finetune    the same with --init-from
        pretrain          all else

    A tar is not read: it counts as an image for each 40 kB. Where nodes differ, rank 0's holds.
    """
    data = given.get("data", "shapes")
    if data == "shapes":
        return "pretrain" if "model" in given else "demo"
    folder = os.path.join(data, "train")
    files = [data] if os.path.isfile(data) else (
        os.path.join(parent, name) for parent, _, names in os.walk(
            folder if os.path.isdir(folder) else data, followlinks=True) for name in names)
    images, share = 0, given.get("classes_fraction", 1) * given.get("data_per_class_fraction", 1)
    for file in files:
        images += share * (os.path.getsize(file) // 40_000 + 1 if file.endswith(".tar") else 1)
        if images >= SMALL_FOLDER:
            break
    if not 0 < images < SMALL_FOLDER:
        return "pretrain"
    return "small-finetune" if given.get("init_from") else "small"


def parse_run(cls, argv: list[str] | None = None) -> tuple:
    """flags.parse for a command with a Step: (config, the model's ViTConfig, the fields given). The
    recipe decides what no flag does."""
    given = read_flags([cls, ViTConfig], argv)
    default = default_recipe(given) if issubclass(cls, TrainConfig) else "pretrain"
    recipe = given.get("recipe", default)
    if recipe not in RECIPES:
        raise ValueError(unknown("--recipe", recipe, RECIPES))
    model = {"model": cls.model, **RECIPES[recipe], **given}["model"].replace("/", "")
    if model not in MODELS:
        raise ValueError(unknown("--model", model, MODELS))
    values = RECIPES[recipe] | RECIPES_OF_MODELS.get(recipe, {}).get(model, {})
    for one, other in (("epochs", "max_steps"), ("warmup_steps", "warmup_epochs")):
        if {one, other} <= set(given):
            raise ValueError(f"--{one} and --{other} contradict each other; give one of them"
                             .replace("_", "-"))
        if one in given:  # and the recipe has the other, which would win
            values.pop(other, None)
    values |= {**given, "recipe": recipe, "model": model}
    config, vit = (replace(old, **{f.name: values[f.name] for f in fields(old) if f.name in values})
                   for old in (cls(), MODELS[model]))
    if config.freeze == "backbone":
        off = dict(hidden_dropout=0.0, attention_dropout=0.0, drop_path_rate=0.0,
                   drop_patch_rate=0.0)
        for name in off.keys() & given.keys():
            raise ValueError(f"{flag_name(name)} has no effect with --freeze backbone; leave one "
                             "of them out")
        vit = replace(vit, **off)
    check_only(config, given)
    check_only(vit, given)
    return config, vit, given
