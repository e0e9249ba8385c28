"""NeMo's own files of this model: NAME.nemo, an archive of model_config.yaml and the weights.

    tp 1   model_weights.ckpt
    tp t   mp_rank_00/model_weights.ckpt ... one for each tensor-parallel rank

Its qkv rows go by head, [nh, 3, hd]; its patches are unfolded [p, p, C]. After NVIDIA NeMo up to
its removal in August 2025 (#14095): collections/vision, NLPSaveRestoreConnector.save_to.
"""

import io
import re
import tarfile
from pathlib import Path

import torch

NAMES = [  # (NeMo's, timm's), as those of formats.NAMES
    ("backbone.cls_token", "cls_token"), ("backbone.position_embeddings", "pos_embed"),
    ("backbone.linear_encoder.", "patch_embed.proj."),
    ("backbone.preprocess_layernorm.", "norm_pre."),
    ("backbone.transformer.layers.", "blocks."), (".input_layernorm.", ".norm1."),
    (".self_attention.query_key_value.", ".attn.qkv."), (".self_attention.dense.", ".attn.proj."),
    (".post_attention_layernorm.", ".norm2."), (".mlp.dense_h_to_4h.", ".mlp.fc1."),
    (".mlp.dense_4h_to_h.", ".mlp.fc2."), (".post_attention_layerscale.", ".ls1."),
    (".post_mlp_layerscale.", ".ls2."), ("backbone.transformer.final_layernorm.", "norm."),
    ("head.dense_in.", "pre_logits.fc."), ("head.dense_out.", "head."),
]


class Refused(ValueError):
    """What is in the archive is not a model that this program has, and why."""


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(whole tensors in our shapes under NeMo's names, what model_config.yaml tells of
    weights.TOLD). Raises Refused, or what tarfile, yaml and torch raise for a damaged file."""
    with tarfile.open(path) as archive:
        files = {re.sub(r"^\./", "", member.name): member for member in archive if member.isfile()}
        ranks = sorted(name for name in files
                       if re.fullmatch(r"(mp_rank_\d+/)?model_weights\.ckpt", name))
        if "model_config.yaml" not in files or not ranks:
            raise Refused(f"it holds {', '.join(list(files)[:4])}, not model_config.yaml and "
                          "model_weights.ckpt, one for each tensor-parallel rank; pipeline "
                          "parallelism and Megatron's distributed format are not read")
        try:
            import yaml
        except ImportError as e:
            raise Refused(f"it needs `pip install pyyaml` ({e})") from e
        config = yaml.safe_load(archive.extractfile(files["model_config.yaml"]))
        parts = [torch.load(io.BytesIO(archive.extractfile(files[name]).read()),
                            map_location="cpu", weights_only=True) for name in ranks]
    for key, legal in (("normalization", "layernorm"), ("activation", "gelu"),
                       ("megatron_legacy", False)):
        if config.get(key, legal) != legal:
            raise Refused(f"its {key} is {config[key]}, not {legal}")
    if len(parts) != config.get("tensor_model_parallel_size", 1):
        raise Refused(f"it has {len(parts)} parts of tensor_model_parallel_size "
                      f"{config.get('tensor_model_parallel_size', 1)}")
    heads, p = config["num_attention_heads"], config["patch_dim"]
    tensors = {re.sub(r"^model\.(module\.)?", "", name).replace("ings.weight", "ings"):
               _whole(name, [part[name] for part in parts], heads, p)
               for name in parts[0] if not name.endswith("_extra_state")}
    tanh = config.get("openai_gelu") or config.get("bias_activation_fusion")
    return tensors, dict(
        num_attention_heads=heads, layernorm_eps=float(config.get("layernorm_epsilon", 1e-5)),
        gelu_approximate="tanh" if tanh else "none",
        image_size=(config["img_h"], config["img_w"]), crop_ratio=1.0)


def _whole(name: str, parts: list[torch.Tensor], heads: int, patch: int) -> torch.Tensor:
    """One tensor of all ranks' parts, in our shape."""
    if re.search(r"query_key_value|dense_h_to_4h", name):           # columns: rows of the weight
        x = torch.cat(parts)
    elif re.search(r"self_attention.dense.weight|dense_4h_to_h.weight", name):
        x = torch.cat(parts, dim=1)
    else:
        x = parts[0]
    if "query_key_value" in name:                                   # [nh, 3, hd, ...]
        x = x.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    if name.endswith("linear_encoder.weight"):                      # [D, p*p*C] -> [D, C, p, p]
        x = x.unflatten(1, (patch, patch, -1)).permute(0, 3, 1, 2)
    return x
