"""What is computed: the Vision Transformer (arXiv:2010.11929), pre-norm, learned positions.

    tokens  x = [class tokens; patches W_p + b_p] + positions
    block   x = x + attention(norm1(x));  x = x + mlp(norm2(x))      each half: dropout, drop path
    output  logits = head(norm(x)[token 0])

Parameter names and shapes are timm's, so that a public checkpoint loads with no mapping and ours
opens there: cls_token, pos_embed, patch_embed.proj, blocks.N.{norm1, attn.qkv, attn.proj, norm2,
mlp.fc1, mlp.fc2}, norm, head; the pretraining head of NeMo and the paper (linear, tanh, linear) has
its hidden layer in pre_logits.fc. With 8 class tokens, as in NeMo, cls_token is [1, 8, D].

Letters: B images, S tokens = class tokens + patches, D hidden size, nh heads of hd = D / nh, C
channels, p patch side, t tensor-parallel size. With t > 1 the residual stream holds this rank's b
images, and between the two layers of a block half there are t*b images and 1/t of the features
(parallel.py says why); with t = 1 this is a plain ViT, which builds with no process group.

Checked against timm and torchvision: same weights, same logits (test_vit.py).
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from configs import ViTConfig, stable_seed
from parallel import ColumnParallelLinear, Grid, RowParallelLinear, full_shape, shard

try:
    from flash_attn import flash_attn_func
except Exception:  # not only ImportError: a wheel for another torch fails with its own errors
    flash_attn_func = None


class PatchEmbed(nn.Module):
    """Images [B, C, H, W] -> patch embeddings [B, N, D]: one matrix product over unfolded patches.
    The weight keeps the shape of the convolution that this equals, [D, C, p, p]."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.patch = config.patch_size
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, self.patch, self.patch)

    def forward(self, images):
        B, C, H, W = images.shape
        p = self.patch
        x = images.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(B, (H // p) * (W // p), C * p * p)                       # [B, N, C*p*p]
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)        # [B, N, D]


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv product; each tp rank computes nh/t heads."""

    def __init__(self, config: ViTConfig, grid: Grid, kernel: str):
        super().__init__()
        d = config.hidden_size
        self.head_dim, self.dropout, self.kernel = config.head_dim, config.attention_dropout, kernel
        self.qkv = ColumnParallelLinear(d, 3 * d, grid.tp, parts=3)
        self.proj = RowParallelLinear(d, d, grid.tp)

    def forward(self, x):                                                      # [b, S, D]
        qkv = self.qkv(x).unflatten(-1, (3, -1, self.head_dim))                # [t*b,S,3,nh/t,hd]
        q, k, v = qkv.unbind(2)                                                # [t*b,S,nh/t,hd]
        dropout = self.dropout if self.training else 0.0
        if self.kernel == "flash-attn":
            y = flash_attn_func(q, k, v, dropout_p=dropout)
        else:
            q, k, v = (z.transpose(1, 2) for z in (q, k, v))                   # [t*b,nh/t,S,hd]
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2)
        return self.proj(y.flatten(2))                                         # [b, S, D]


class Mlp(nn.Module):
    """linear, GELU, linear; each tp rank computes ffn/t of the hidden features."""

    def __init__(self, config: ViTConfig, grid: Grid):
        super().__init__()
        self.gelu = config.gelu_approximate
        self.fc1 = ColumnParallelLinear(config.hidden_size, config.ffn_hidden_size, grid.tp)
        self.fc2 = RowParallelLinear(config.ffn_hidden_size, config.hidden_size, grid.tp)

    def forward(self, x):                                                      # [b, S, D]
        x = F.gelu(self.fc1(x), approximate=self.gelu)                         # [t*b, S, ffn/t]
        return self.fc2(x)                                                     # [b, S, D]


class DropPath(nn.Module):
    """Stochastic depth: drops a block half for whole images (arXiv:1603.09382)."""

    def __init__(self, rate: float):
        super().__init__()
        # A buffer, not a float: blocks that differ in it share one compiled graph.
        self.register_buffer("keep", torch.tensor(1 - rate), persistent=False)

    def forward(self, x):                                                      # [b, S, D]
        if not self.training:
            return x
        mask = torch.rand(x.shape[0], 1, 1, device=x.device) < self.keep
        return x * mask / self.keep.to(x.dtype)


# Selective recomputation keeps these results and recomputes the rest (norms, GELU, dropout, f, g).
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
}


def _selective_policy(context, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)), both on this rank's images [b, S, D]."""

    def __init__(self, config: ViTConfig, grid: Grid, kernel: str, drop_path: float,
                 selective: bool):
        super().__init__()
        self.dropout, self.selective = config.hidden_dropout, selective
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layernorm_eps)
        self.attn = Attention(config, grid, kernel)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layernorm_eps)
        self.mlp = Mlp(config, grid)
        self.drop_path = DropPath(drop_path) if config.drop_path_rate else nn.Identity()

    def forward(self, x):
        if self.selective and torch.is_grad_enabled():
            contexts = partial(create_selective_checkpoint_contexts, _selective_policy)
            return checkpoint(self._forward, x, use_reentrant=False, context_fn=contexts)
        return self._forward(x)

    def _forward(self, x):
        x = x + self.drop_path(F.dropout(self.attn(self.norm1(x)), self.dropout, self.training))
        x = x + self.drop_path(F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training))
        return x


class PreLogits(nn.Module):
    """The hidden layer of the pretraining head: tanh(x W^T + b), [B, D] -> [B, D]."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        return torch.tanh(self.fc(x))


class ViT(nn.Module):
    """The Vision Transformer: images [B, C, H, W], normalised -> logits [B, num_classes].

    grid: where this rank stands; the default is a single process.
    kernel: sdpa, or flash-attn for that package's function (bf16 on CUDA).
    activation_checkpointing: what backward recomputes instead of keeping.
        none       nothing
        selective  everything but matrix products and attention (KEPT)
        full       whole blocks; NeMo's activations_checkpoint_granularity=full:
                   uniform: every run of checkpoint_num_layers blocks keeps only its input
                   block:   the first checkpoint_num_layers blocks keep only their inputs, each
    Dropout is replayed exactly (the random state is restored for the recomputation).
    seed: each full parameter is drawn from (seed, its name), then cut for tp: same model always.
    """

    def __init__(self, config: ViTConfig, grid: Grid = Grid(), *, kernel: str = "sdpa",
                 activation_checkpointing: str = "none", checkpoint_method: str = "uniform",
                 checkpoint_num_layers: int = 1, seed: int = 0):
        super().__init__()
        for name in ("num_attention_heads", "ffn_hidden_size"):
            if getattr(config, name) % grid.tp.size:
                raise ValueError(f"--tensor-parallel-size {grid.tp.size} must divide {name} "
                                 f"{getattr(config, name)}")
        self.config, self.grid = config, grid
        layers, d = config.num_layers, config.hidden_size
        self.cls_token = nn.Parameter(torch.empty(1, config.num_class_tokens, d))
        self.pos_embed = nn.Parameter(torch.empty(1, config.seq_length, d))
        self.patch_embed = PatchEmbed(config)
        drop_path = [config.drop_path_rate * i / max(layers - 1, 1) for i in range(layers)]
        selective = activation_checkpointing == "selective"
        self.blocks = nn.ModuleList(
            Block(config, grid, kernel, rate, selective) for rate in drop_path)
        self.norm = nn.LayerNorm(d, eps=config.layernorm_eps)
        self.pre_logits = PreLogits(d) if config.head == "mlp" else nn.Identity()
        self.head = nn.Linear(d, config.num_classes)

        # Runs of blocks: (first, end, recompute?) in order; the forward pass follows this plan.
        n = checkpoint_num_layers
        if activation_checkpointing != "full":
            self.plan = [(0, layers, False)]
        elif checkpoint_method == "uniform":
            self.plan = [(i, min(i + n, layers), True) for i in range(0, layers, n)]
        else:
            self.plan = [(i, i + 1, i < n) for i in range(layers)]
        if not self.cls_token.is_meta:
            self.init_weights(seed)

    def forward(self, images):
        x = self.embed(images)                                                 # [B, S, D]
        for first, end, recompute in self.plan:
            if recompute and torch.is_grad_enabled():
                x = checkpoint(self.run_blocks, x, first, end, use_reentrant=False)
            else:
                x = self.run_blocks(x, first, end)
        x = self.norm(x[:, 0])                                                 # [B, D] token 0
        return self.head(self.pre_logits(x))                                   # [B, num_classes]

    def embed(self, images):
        patches = self.patch_embed(images)                                     # [B, N, D]
        tokens = self.cls_token.expand(len(patches), -1, -1).to(patches.dtype)
        x = torch.cat([tokens, patches], dim=1) + self.pos_embed               # [B, S, D]
        return F.dropout(x, self.config.hidden_dropout, self.training)

    def run_blocks(self, x, first: int, end: int):
        for block in self.blocks[first:end]:
            x = block(x)
        return x

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """NeMo's and big_vision's initialisation, the same for every layout.

        Weights normal, std 0.02; those that write into the residual stream 0.02 / sqrt(2 layers);
        biases and class tokens zero; a linear head zero, the pretraining head's bias -10.
        """
        residual_std = 0.02 / (2 * self.config.num_layers) ** 0.5
        for name, param in self.named_parameters():
            generator = torch.Generator().manual_seed(stable_seed(seed, name))
            full = torch.empty(full_shape(param, self.grid.tp), device="cpu")
            if name.startswith("head.") and self.config.head == "linear":
                full.zero_()
            elif name == "head.bias":
                full.fill_(-10.0)
            elif "norm" in name and name.endswith("weight"):
                full.fill_(1.0)
            elif name.endswith("bias") or name == "cls_token":
                full.zero_()
            elif name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
                full.normal_(0.0, residual_std, generator=generator)
            else:
                full.normal_(0.0, 0.02, generator=generator)
            param.copy_(shard(full, param, self.grid.tp))

    def units(self) -> dict[str, list[str]]:
        """Parameter names by unit, in the order of the forward pass; one unit is one bucket."""
        units = {"embed": [], **{f"blocks.{i}": [] for i in range(len(self.blocks))}, "head": []}
        for name, _ in self.named_parameters():
            if name.startswith("blocks."):
                units[".".join(name.split(".")[:2])].append(name)
            elif name.startswith(("norm", "pre_logits", "head")):
                units["head"].append(name)
            else:
                units["embed"].append(name)
        return units

    def unit_modules(self) -> list[nn.Module]:
        """The modules whose forward is the first to use each unit's weights."""
        return [self, *self.blocks, self.norm]


def compile_blocks(model: ViT) -> None:
    """torch.compile for every block: they are alike, so one graph serves all and is built once.

    forward is compiled, not the module, so that ZeRO's wait for weights stays outside the graph.
    """
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)


# ----------------------------------------------------------------------------- attention kernels
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def choose_attention(choice: str, config: ViTConfig, tp: int, device: torch.device,
                     dtype: torch.dtype) -> tuple[str, str]:
    """The attention kernel to use and why: (a key of BACKENDS or flash-attn, the reason).

    Each candidate is tried on this shape, forward and backward; `auto` takes the first that runs,
    in the order in which they were fastest at the models' shapes on an H100 (design: cuDNN, then
    flash). Raises ValueError if the kernel that was asked for does not run, naming those that do.
    """
    def error_of(name: str) -> str | None:
        shape = (1, config.num_attention_heads // tp, config.seq_length, config.head_dim)
        q = torch.zeros(shape, device=device, dtype=dtype, requires_grad=True)
        try:
            if name == "flash-attn":
                if flash_attn_func is None:
                    return "the package flash-attn is not installed or does not import"
                flash_attn_func(*[q.transpose(1, 2)] * 3).sum().backward()
            else:
                with sdpa_kernel(BACKENDS[name]):
                    F.scaled_dot_product_attention(
                        q, q, q, dropout_p=config.attention_dropout).sum().backward()
        except Exception as e:
            return str(e).strip().splitlines()[-1]
        return None

    shape = f"{config.seq_length} tokens, head size {config.head_dim}, {str(dtype)[6:]}"
    order = list(BACKENDS) if device.type == "cuda" else ["flash", "math"]
    if choice == "auto":
        skipped = []
        for name in order:
            error = error_of(name)
            if error is None:
                why = f"first of {', '.join(order)} that runs on {shape}"
                return name, why + (f"; not {', '.join(skipped)}" if skipped else "")
            skipped.append(name)
        raise ValueError(f"no attention kernel runs on {shape}: {error}")
    error = error_of(choice)
    if error is not None:
        legal = [name for name in (*order, "flash-attn") if error_of(name) is None]
        raise ValueError(f"--attention {choice} does not run on {device.type} with {shape}: "
                         f"{error}. Legal here: auto, {', '.join(legal)}")
    return choice, f"--attention {choice}, {shape}"
