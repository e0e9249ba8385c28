"""Tensors of other libraries: their names and shapes, ours, and back.

A format is a list of renames (NAMES), read in both directions, and what is not a matter of names:
Flax's kernels, q, k and v apart, registers, CLIP's missing bias. Ours are timm's (model.py), whose
letters stand here too: D, C, nh, hd, p; P class tokens. What a file of a format does not say is in
SILENT; what of it is no part of a plain ViT is left out and named (WITHOUT, OTHER_HEADS), or the
file is refused (UNLIKE).
"""

import re
from collections import ChainMap
from typing import NamedTuple

import torch

import nemo_file
from configs import ViTConfig
from flags import flag_name

# (their name, ours), replaced as text; timm's names are ours. The last group of a format is what
# other versions of the library write. `.attn.q. .attn.k. .attn.v.` are then fused to `.attn.qkv.`.
NAMES = {
    "timm": [("reg_token", "reg_token"), ("register_tokens", "reg_token")],  # DINOv2's own files
    "torchvision": [
        ("class_token", "cls_token"), ("encoder.pos_embedding", "pos_embed"),
        ("conv_proj.", "patch_embed.proj."), ("encoder.layers.encoder_layer_", "blocks."),
        (".ln_1.", ".norm1."), (".ln_2.", ".norm2."),
        (".self_attention.in_proj_", ".attn.qkv."), (".self_attention.out_proj.", ".attn.proj."),
        (".mlp.0.", ".mlp.fc1."), (".mlp.3.", ".mlp.fc2."), ("encoder.ln.", "norm."),
        ("heads.pre_logits.", "pre_logits.fc."), ("heads.head.", "head."),
        (".mlp.linear_1.", ".mlp.fc1."), (".mlp.linear_2.", ".mlp.fc2."),  # the released files
    ],
    "hf": [
        ("vit.embeddings.cls_token", "cls_token"),
        ("vit.embeddings.position_embeddings", "pos_embed"),
        ("vit.embeddings.patch_embeddings.projection.", "patch_embed.proj."),
        ("vit.encoder.layer.", "blocks."),
        (".layernorm_before.", ".norm1."), (".layernorm_after.", ".norm2."),
        (".attention.attention.query.", ".attn.q."), (".attention.attention.key.", ".attn.k."),
        (".attention.attention.value.", ".attn.v."), (".attention.output.dense.", ".attn.proj."),
        (".intermediate.dense.", ".mlp.fc1."), (".output.dense.", ".mlp.fc2."),
        ("vit.layernorm.", "norm."), ("vit.pooler.dense.", "pre_logits.fc."),
        ("classifier.", "head."),
        ("vit.layers.", "blocks."), (".attention.q_proj.", ".attn.q."),  # transformers 5, in memory
        (".attention.k_proj.", ".attn.k."), (".attention.v_proj.", ".attn.v."),
        (".attention.o_proj.", ".attn.proj."),
        ("vit.embeddings.register_tokens", "reg_token"),                          # DINOv2, DeiT
        ("vit.embeddings.distillation_token", "dist_token"),
        (".layer_scale1.lambda1", ".ls1.gamma"), (".layer_scale2.lambda1", ".ls2.gamma"),
        ("vit.embeddings.class_embedding", "cls_token"),                          # CLIP, SigLIP
        ("vit.embeddings.position_embedding.weight", "pos_embed"),
        ("vit.embeddings.patch_embedding.", "patch_embed.proj."),
        ("vit.pre_layrnorm.", "norm_pre."), ("vit.post_layernorm.", "norm."),
        ("vit.encoder.layers.", "blocks."), (".layer_norm1.", ".norm1."),
        (".layer_norm2.", ".norm2."), (".self_attn.q_proj.", ".attn.q."),
        (".self_attn.k_proj.", ".attn.k."), (".self_attn.v_proj.", ".attn.v."),
        (".self_attn.out_proj.", ".attn.proj."),
    ],
    "google": [
        ("cls", "cls_token"), ("Transformer/posembed_input/pos_embedding", "pos_embed"),
        ("embedding/", "patch_embed.proj."), ("Transformer/encoderblock_", "blocks."),
        ("/LayerNorm_0/", ".norm1."), ("/LayerNorm_2/", ".norm2."),
        ("/MultiHeadDotProductAttention_1/", ".attn."), ("query/", "q."), ("key/", "k."),
        ("value/", "v."), ("out/", "proj."), ("/MlpBlock_3/Dense_0/", ".mlp.fc1."),
        ("/MlpBlock_3/Dense_1/", ".mlp.fc2."),
        ("Transformer/encoder_norm/", "norm."), ("pre_logits/", "pre_logits.fc."),
        ("head/", "head."), ("kernel", "weight"), ("scale", "weight"),
    ],
    "nemo": nemo_file.NAMES,
}
HF_PREFIX = r"^(deit|dinov2|dinov2_with_registers|vision_model)\."  # read as `vit.`
# Where a file is silent: of a format, or of all its files that have a weight whose name is like it.
_TIMM = dict(layernorm_eps=1e-6, gelu_approximate="none", mean=(0.5,) * 3, std=(0.5,) * 3,
             pool="token")
_IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_CLIP = dict(layernorm_eps=1e-5, mean=(0.48145466, 0.4578275, 0.40821073),
             std=(0.26862954, 0.26130258, 0.27577711))
SILENT = {"timm": _TIMM, "google": _TIMM, "hf": _TIMM | dict(layernorm_eps=1e-12),
          "torchvision": _TIMM | _IMAGENET, "nemo": _TIMM | _IMAGENET}
SILENT_WITH = [
    (r"decoder|mask_token|fc_norm|dist_token|.*(gamma|lambda1)$", _IMAGENET),  # MAE, DINOv2, DeiT
    (r"vit.*lambda1$", dict(layernorm_eps=1e-6)),
    (r"vit.*layer_norm1", dict(layernorm_eps=1e-6, gelu_approximate="tanh")),  # SigLIP
    (r"norm_pre", _CLIP), (r"vit.pre_layrnorm", _CLIP | dict(gelu_approximate="quick")),
    (r"fc_norm", dict(pool="mean")),
]
# (like a file's names, what that is). What is left out; its heads too, where they read something
# else than ours; and what makes it another model.
WITHOUT = [(r"(vit\.embeddings\.)?mask_token|decoder[._]", "what masked images are completed with"),
           (r"text_|logit_|visual_projection", "the text tower and projections"),
           (r"vit\.head\.|attn_pool\.", "attention pooling"),
           (r".*position_ids$", "numbers of positions")]
HEADS = r"(head|head_dist|classifier|cls_classifier|distillation_classifier)\."
OTHER_HEADS = [(r"head_dist|distillation_classifier", "two tokens"),
               (r"attn_pool", "attention pooling"), (r"vit.pre_layrnorm", "tokens without norm"),
               (r"vit.*lambda1$", "token 0 and the mean")]
UNLIKE = [(r".*\b(w12|weights_in|gate_proj|fc1_g)\.", "SwiGLU"), (r".*(rope|rotary)", "rotary "
          "positions"), (r".*(relative_position|rel_pos)", "relative positions"),
          (r".*\b[qk]_norm\.", "norms of q and k")]


class Found(NamedTuple):
    """What a file's tensors are."""
    format: str                         # a key of NAMES
    tensors: dict[str, torch.Tensor]    # under our names, in our shapes
    theirs: dict[str, str]              # our names before q, k, v were fused: the file's
    twice: bool                         # whether two of the file's are one of ours
    sizes: dict                         # what shapes tell
    assumed: dict                       # what the file does not, if nothing else does
    left_out: list[str]


def rename(name: str, pairs) -> str:
    """Replaces each first text of a pair by its second, in one pass; the earlier pair wins."""
    table = dict(reversed(pairs))
    return re.sub("|".join(map(re.escape, table)), lambda m: table[m[0]], name) if table else name


# ----------------------------------------------------------------------------- in
def to_ours(raw: dict[str, torch.Tensor]) -> Found:
    """A file's own tensors as ours. Raises ValueError for those of no format, of a model that this
    program does not have, and for some that are incomplete."""
    raw = {re.sub(HF_PREFIX, "vit.", name): x for name, x in raw.items()}
    if any(name.startswith("embeddings.") for name in raw):  # a backbone of Hugging Face
        raw = {"vit." + name: x for name, x in raw.items()}

    def those(table):
        return [what for like, what in table if any(re.match(like, name) for name in raw)]
    assumed, left_out, unlike = those(SILENT_WITH), those(WITHOUT), those(UNLIKE)
    if unlike:
        raise ValueError(f"it has {', '.join(unlike)}, which this program does not")
    drop = [like for like, _ in WITHOUT]
    if heads := [name for name in raw if re.match(HEADS, name)] and those(OTHER_HEADS):
        drop, left_out = [*drop, HEADS], [*left_out, f"the head, which reads {heads[0]}"]
    raw = {name: x for name, x in raw.items() if not any(re.match(like, name) for like in drop)}
    named = {fmt: {rename(name, pairs): name for name in raw} for fmt, pairs in NAMES.items()}
    fmt = next((fmt for fmt in NAMES if "patch_embed.proj.weight" in named[fmt]), None)
    if fmt is None:
        raise ValueError(f"it is not a ViT of {', '.join(NAMES)}; its names begin with "
                         f"{', '.join(list(raw)[:4])}")
    theirs = named[fmt]
    tensors = {ours: raw[name] for ours, name in theirs.items()}
    try:
        sizes = _shapes_to_ours(fmt, tensors, theirs)
    except (KeyError, IndexError, RuntimeError, ValueError) as e:
        raise ValueError(f"it looks like {fmt}'s, but is no ViT with positions, or is incomplete: "
                         f"{e!r}") from e
    return Found(fmt, tensors, theirs, len(theirs) != len(raw), sizes,
                 dict(ChainMap(*reversed(assumed), SILENT[fmt])), left_out)


def _shapes_to_ours(fmt: str, tensors: dict[str, torch.Tensor], theirs: dict[str, str]) -> dict:
    """Brings renamed tensors into our shapes, in place; returns the sizes that the shapes tell."""
    sizes = {}
    if fmt == "google":  # Flax: kernels [in, out], convolutions [p, p, C, D], heads apart
        sizes["num_attention_heads"] = tensors["blocks.0.attn.q.weight"].shape[1]  # [D, nh, hd]
        for name, x in tensors.items():
            if x.ndim == 4:
                tensors[name] = x.permute(3, 2, 0, 1)                          # [D, C, p, p]
            elif theirs[name].endswith("kernel"):                # out is [nh, hd, D], q, k, v above
                tensors[name] = (x.flatten(0, -2) if ".attn.proj." in name else x.flatten(1)).T
            elif ".attn." in name:
                tensors[name] = x.flatten()                                    # bias [nh, hd]
    for name in [name for name in tensors if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in tensors for part in parts):
            fused = name.replace(".attn.q.", ".attn.qkv.")
            tensors[fused] = torch.cat([tensors.pop(part) for part in parts])
    weight = tensors["patch_embed.proj.weight"]                                # [D, C, p, p]
    D = weight.shape[0]
    tensors["pos_embed"] = tensors["pos_embed"].reshape(1, -1, D)              # CLIP's is [S, D]
    tokens = [tensors.pop(name).reshape(1, -1, D)  # registers are further class tokens
              for name in ("cls_token", "dist_token", "reg_token") if name in tensors]
    if tokens:
        tensors["cls_token"] = torch.cat(tokens, dim=1)
    pre_norm = "norm_pre.weight" in tensors
    if pre_norm:  # CLIP has no bias before it
        tensors.setdefault("patch_embed.proj.bias", torch.zeros(D))
    fc1, fc2 = (tensors[f"blocks.0.mlp.fc{i}.weight"] for i in (1, 2))         # [F, D], [D, F]
    if len(fc1) == 2 * fc2.shape[1]:
        raise ValueError("it has SwiGLU, which this program does not")
    if "head.weight" in tensors:
        sizes["num_classes"] = tensors["head.weight"].shape[0]
    return sizes | dict(
        hidden_size=D, num_channels=weight.shape[1], pre_norm=pre_norm,
        layerscale=1e-5 if "blocks.0.ls1.gamma" in tensors else 0.0,
        fc_norm="fc_norm.weight" in tensors, num_class_tokens=sum(x.shape[1] for x in tokens),
        patch_size=weight.shape[3], ffn_hidden_size=len(fc1),
        num_layers=1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("blocks.")),
        head="mlp" if "pre_logits.fc.weight" in tensors else "linear")


# ----------------------------------------------------------------------------- out
def to_format(tensors: dict[str, torch.Tensor], vit: ViTConfig,
              fmt: str) -> dict[str, torch.Tensor]:
    """Our full weights under the names of timm, hf or torchvision, complete for strict loading.

    More than one class token is a class token and registers (reg_tokens=P-1) in timm, where patches
    have no bias before norm_pre: here it is added to their positions.
    Raises ValueError for a model that the library does not have, saying what to change.
    """
    count, (height, width), tensors = vit.num_class_tokens, vit.image_hw, dict(tensors)
    plain = dict(pool="token", fc_norm=False, layerscale=0.0, pre_norm=False)
    other = [f"{flag_name(name)} {getattr(vit, name)}" for name, value in plain.items()
             if getattr(vit, name) != value]
    other += ["--gelu-approximate quick"] if vit.gelu_approximate == "quick" else []
    if other and fmt != "timm":
        raise ValueError(f"--format {fmt} has no {', '.join(other)}, which this model has: use "
                         f"--format timm")
    if vit.head == "mlp" and fmt != "torchvision":
        raise ValueError(f"--format {fmt} has no place for the pretraining head (--head mlp): "
                         f"fine-tune with --head linear first, or use --format torchvision")
    if count > 1 and fmt != "timm":
        raise ValueError(f"--format {fmt} has one class token, this model has {count}: use "
                         f"--format timm (reg_tokens={count - 1})")
    if fmt == "torchvision" and (height != width or vit.num_channels != 3
                                 or vit.gelu_approximate != "none"):
        raise ValueError("--format torchvision has square images, 3 channels and exact GELU only: "
                         "use --format timm")
    if count > 1:
        cls_token, registers = tensors["cls_token"].split([1, count - 1], dim=1)
        tensors |= {"cls_token": cls_token, "reg_token": registers}
    if vit.pre_norm:
        bias = tensors.pop("patch_embed.proj.bias")
        tensors["pos_embed"] = torch.cat([tensors["pos_embed"][:, :count],
                                          tensors["pos_embed"][:, count:] + bias], dim=1)
    for name in [name for name in tensors if fmt == "hf" and ".attn.qkv." in name]:
        for part, x in zip("qkv", tensors.pop(name).chunk(3), strict=True):
            tensors[name.replace("qkv", part)] = x
    back = [(ours, theirs) for theirs, ours in NAMES[fmt]]
    return {rename(name, back): x for name, x in tensors.items()}
