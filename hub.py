"""Weights by name, from the library that knows them, which downloads and keeps them:

    torchvision:vit_b_16                    or torchvision:vit_b_16.IMAGENET1K_SWAG_E2E_V1
    timm:vit_base_patch16_224.augreg_in21k
    hf:facebook/dinov2-base                 a repository of the Hugging Face hub

What a library tells of its model goes along (weights.TOLD), and what a folder of a hub does. Where
there is no network, the error says which file to put where.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from flags import unknown

LIBRARIES = {"torchvision": "torchvision", "timm": "timm", "hf": "huggingface_hub"}  # and packages
# A folder's weights; config.json beside them describes them.
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
         "pytorch_model.bin.index.json")
POOL = {"token": "token", "avg": "mean"}  # timm's words and ours
GELU = {None: None, "gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh",
        "quick_gelu": "quick"}  # Hugging Face's words


def load(library: str, name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """(its tensors under its own names, what the library tells) of a model of torchvision or timm.
    Raises ValueError if it cannot be had."""
    return {"torchvision": _torchvision, "timm": _timm}[library](name)


def folder_of(name: str) -> Path:
    """The folder of a repository of the Hugging Face hub; raises ValueError if it cannot be had."""
    where = (f"put config.json, preprocessor_config.json and model.safetensors of "
             f"https://huggingface.co/{name} into a folder and give that")

    def download():
        from huggingface_hub import snapshot_download
        for files in ("model*.safetensors*", "pytorch_model*.bin*"):  # the second are the older
            folder = Path(snapshot_download(name, allow_patterns=["*config.json", files]))
            if any(folder.glob(files)):
                return folder
        raise FileNotFoundError("it has neither model.safetensors nor pytorch_model.bin")
    return _try("hf", where, download)


def facts_beside(path: Path) -> dict:
    """What config.json (Hugging Face's or timm's) and preprocessor_config.json beside a hub's file
    tell. Raises ValueError for an activation that is not GELU."""
    beside = [path.with_name(name) for name in ("config.json", "preprocessor_config.json")]
    config, pixels = (json.loads(file.read_text()) if path.name in FILES and file.exists()
                      else {} for file in beside)
    timm, quick = config.get("pretrained_cfg", {}), "quickgelu" in config.get("architecture", "")
    config = config.get("vision_config", config)                               # CLIP's other half
    gelu = config.get("hidden_act", "quick_gelu" if quick else None)
    if gelu not in GELU:
        raise ValueError(f"config.json says hidden_act {gelu}; legal: {', '.join(list(GELU)[1:])}")
    told = dict(
        num_attention_heads=config.get("num_attention_heads"),
        layernorm_eps=config.get("layer_norm_eps"), gelu_approximate=GELU[gelu],
        pool=POOL.get(config.get("global_pool")),
        image_size=config.get("image_size", timm.get("input_size", [None])[1:]) or None,
        mean=timm.get("mean", pixels.get("image_mean")),
        std=timm.get("std", pixels.get("image_std")), crop_ratio=timm.get("crop_pct"))
    return {name: value for name, value in told.items() if value is not None}


def _try(library: str, where: str, download: Callable):
    """download(); its errors, each library's own, are a ValueError that says what else would do."""
    try:
        return download()
    except ImportError as e:
        raise ValueError(f"it needs `pip install {LIBRARIES[library]}` ({e}); or {where}") from e
    except Exception as e:
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ValueError(f"it cannot be downloaded ({why}); {where}") from e


def _torchvision(name: str) -> tuple[dict, dict]:
    import torchvision.models as models
    model, _, version = name.partition(".")
    if model not in models.list_models(include="vit*"):
        raise ValueError(unknown("model", model, models.list_models(include="vit*")))
    versions = models.get_model_weights(model)
    if version and version not in versions.__members__:
        raise ValueError(unknown("weights", version, versions.__members__))
    chosen = versions[version or "DEFAULT"]
    where = f"put {chosen.url} into {torch.hub.get_dir()}/checkpoints"
    tensors = _try("torchvision", where,
                   lambda: chosen.get_state_dict(progress=False, check_hash=True))
    pixels = chosen.transforms()
    return tensors, dict(
        image_size=pixels.crop_size[0], mean=tuple(pixels.mean), std=tuple(pixels.std),
        crop_ratio=pixels.crop_size[0] / pixels.resize_size[0],
        classes=tuple(chosen.meta["categories"]))


def _timm(name: str) -> tuple[dict, dict]:
    where = f"put the weights of https://huggingface.co/timm/{name} into a file and give that"
    timm = _try("timm", where, lambda: __import__("timm"))
    if not timm.is_model(name):
        raise ValueError(unknown("model", name, timm.list_models("*vit*"), listed=False))
    model = _try("timm", where, lambda: timm.create_model(name, pretrained=True))
    if not isinstance(model, timm.models.VisionTransformer):
        raise ValueError(f"it is a {type(model).__name__} of timm, no VisionTransformer")
    block, config = model.blocks[0], model.pretrained_cfg
    gelu = dict(GELU="none", GELUTanh="tanh", QuickGELU="quick")
    if type(block.mlp.act).__name__ not in gelu:
        raise ValueError(f"its activation is {block.mlp.act}, none of {', '.join(gelu)}")
    told = dict(
        num_attention_heads=block.attn.num_heads, layernorm_eps=block.norm1.eps,
        gelu_approximate=gelu[type(block.mlp.act).__name__], pool=POOL.get(model.global_pool),
        image_size=tuple(model.patch_embed.img_size), mean=tuple(config["mean"]),
        std=tuple(config["std"]), crop_ratio=config["crop_pct"])
    return model.state_dict(), {key: value for key, value in told.items() if value is not None}
