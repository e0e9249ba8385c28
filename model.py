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

The last section reads weights of timm, Hugging Face, torchvision and Google, and writes the first
three. Checked against these libraries: same weights, same logits (test_vit.py).
"""

import json
import math
import mmap
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch._inductor.config
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from configs import MODELS, ViTConfig, stable_seed
from parallel import (
    CheckpointTensors,
    ColumnParallelLinear,
    Grid,
    RowParallelLinear,
    full_shape,
    newest_checkpoint,
    read_meta,
    shard,
    visit,
    write_atomically,
)

try:
    from flash_attn import flash_attn_func
except Exception:  # not only ImportError: a wheel for another torch fails with its own errors
    flash_attn_func = None
try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU builds of torch come without it
    triton = None


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
    """Multi-head self-attention with one fused qkv product; each tp rank computes nh/t heads, of
    n = t*b images, or of b at a time in `visit`."""

    def __init__(self, config: ViTConfig, grid: Grid, kernel: str, fp8: bool):
        super().__init__()
        d = config.hidden_size
        self.head_dim, self.dropout, self.kernel = config.head_dim, config.attention_dropout, kernel
        self.qkv = ColumnParallelLinear(d, 3 * d, grid.tp, parts=3, fp8=fp8,
                                        bias_gradient=kernel != "triton")
        self.proj = RowParallelLinear(d, d, grid.tp, fp8)

    def forward(self, x):                                                      # [b, S, D]
        if self.qkv.tp.overlap:
            return visit(x, self.qkv, self.attend, self.proj)
        return self.proj(self.attend(self.qkv(x)))                             # [b, S, D]

    def attend(self, qkv):                                                     # [n, S, 3D/t]
        if self.kernel == "triton":
            return ShortAttention.apply(qkv, self.qkv.bias, self.head_dim)     # [n, S, D/t]
        qkv = qkv.unflatten(-1, (3, -1, self.head_dim))                        # [n, S,3,nh/t,hd]
        q, k, v = qkv.unbind(2)                                                # [n, S, nh/t, hd]
        rate = self.dropout if self.training else 0.0
        if self.kernel == "flash-attn":
            y = flash_attn_func(q, k, v, dropout_p=rate)
        else:
            q, k, v = (z.transpose(1, 2) for z in (q, k, v))                   # [n, nh/t, S, hd]
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate).transpose(1, 2)
        return y.flatten(2)                                                    # [n, S, D/t]


class Mlp(nn.Module):
    """linear, GELU, linear; each tp rank computes ffn/t of the hidden features, of n images."""

    def __init__(self, config: ViTConfig, grid: Grid, fp8: bool):
        super().__init__()
        d, f = config.hidden_size, config.ffn_hidden_size
        self.gelu = config.gelu_approximate
        self.fc1 = ColumnParallelLinear(d, f, grid.tp, fp8=fp8)
        self.fc2 = RowParallelLinear(f, d, grid.tp, fp8)

    def forward(self, x):                                                      # [b, S, D]
        if self.fc1.tp.overlap:
            return visit(x, self.fc1, self.act, self.fc2)
        return self.fc2(self.act(self.fc1(x)))                                 # [b, S, D]

    def act(self, x):                                                          # [n, S, ffn/t]
        return F.gelu(x, approximate=self.gelu)


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


# Selective recomputation keeps these results, those of g too, and recomputes the rest (norms, GELU,
# dropout, f).
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
}


def _selective_policy(context, op, *args, **kwargs):
    returns = op == torch.ops.vit.shift.default and args[1] < 0  # g, where images visit
    kept = op in KEPT or returns
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def dropout(x, rate: float, seed):
    """x with elements zeroed at `rate` and the others scaled by 1 / (1 - rate); seed: int32 [].

    Element i goes if a hash of (seed, i) is below the rate: two multiply-xorshift rounds, where the
    generator behind F.dropout takes ten. The same on every device, compiled or not. With it and the
    compiled embedding L/16 went from 1,099 to 1,125 images/s (H100, torch 2.11, micro-batch 248).
    """
    h = torch.arange(x.numel(), device=x.device, dtype=torch.int32).view(x.shape) ^ seed
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D
    h = (h ^ ((h >> 15) & 0x1FFFF)) * -0x7B935975  # products wrap around at 32 bits
    return torch.where(h >= int(rate * 2**32) - 2**31, x * (1 / (1 - rate)), 0.0)


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)), both on this rank's images [b, S, D].

    The last sum is left to the next block: it takes and returns (x, y), x the residual stream and y
    what is still to be dropped out and added, so that every sum is fused with the norm behind it:
    L/16 1,125 to 1,149 images/s (as in `dropout`).
    """

    def __init__(self, config: ViTConfig, grid: Grid, kernel: str, drop_path: float,
                 selective: bool, fp8: bool):
        super().__init__()
        self.rate, self.selective = config.hidden_dropout, selective
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layernorm_eps)
        self.attn = Attention(config, grid, kernel, fp8)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layernorm_eps)
        self.mlp = Mlp(config, grid, fp8)
        self.drop_path = DropPath(drop_path) if config.drop_path_rate else nn.Identity()

    def forward(self, x, y, seeds):
        if self.selective and torch.is_grad_enabled():
            contexts = partial(create_selective_checkpoint_contexts, _selective_policy)
            # Stopping early would leave a shift that has begun without its end.
            return checkpoint(self._forward, x, y, seeds, use_reentrant=False, context_fn=contexts,
                              early_stop=not self.attn.qkv.tp.overlap)
        return self._forward(x, y, seeds)

    def _forward(self, x, y, seeds):
        x = x + self.drop(y, seeds[0])
        x = x + self.drop(self.drop_path(self.attn(self.norm1(x))), seeds[1])
        return x, self.drop_path(self.mlp(self.norm2(x)))

    def drop(self, y, seed):
        return dropout(y, self.rate, seed) if self.training and self.rate else y


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
    kernel: sdpa, or triton (ShortAttention) or flash-attn, the package (both bf16 on CUDA).
    activation_checkpointing: what backward recomputes instead of keeping.
        none       nothing
        selective  everything but matrix products, attention and what g returns (KEPT)
        full       whole blocks; NeMo's activations_checkpoint_granularity=full:
                   uniform: every run of checkpoint_num_layers blocks keeps only its input
                   block:   the first checkpoint_num_layers blocks keep only their inputs, each
    Dropout is replayed exactly: its seeds are arguments, and the random state, which drop path and
    attention's dropout use, is restored for the recomputation.
    fp8: the blocks' matrix products in training are parallel.Fp8Linear's; weights in bf16.
    seed: each full parameter is drawn from (seed, its name), then cut for tp: same model always.
    """

    def __init__(self, config: ViTConfig, grid: Grid = Grid(), *, kernel: str = "sdpa",
                 activation_checkpointing: str = "none", checkpoint_method: str = "uniform",
                 checkpoint_num_layers: int = 1, fp8: bool = False, seed: int = 0):
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
            Block(config, grid, kernel, rate, selective, fp8) for rate in drop_path)
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
        y = self.embed(images)                                                 # [B, S, D]
        # The stream begins at zero and the first block adds the embedding to it; it asks for a
        # gradient only so that this block's graph is the one of all others.
        x = torch.zeros_like(y).requires_grad_(y.requires_grad)
        seeds = torch.randint(-2**31, 2**31, (len(self.blocks) + 1, 2), dtype=torch.int32,
                              device=y.device)                                 # of dropout
        for first, end, recompute in self.plan:
            if recompute and torch.is_grad_enabled():
                x, y = checkpoint(self.run_blocks, x, y, seeds, first, end, use_reentrant=False,
                                  early_stop=not self.grid.tp.overlap)
            else:
                x, y = self.run_blocks(x, y, seeds, first, end)
        x, y = x[:, 0], y[:, 0]                                                # [B, D] token 0
        if self.training and self.config.hidden_dropout:
            y = dropout(y, self.config.hidden_dropout, seeds[-1, 0])
        x = self.norm(x + y)
        return self.head(self.pre_logits(x))                                   # [B, num_classes]

    def embed(self, images):
        patches = self.patch_embed(images)                                     # [B, N, D]
        tokens = self.cls_token.expand(len(patches), -1, -1).to(patches.dtype)
        return torch.cat([tokens, patches], dim=1) + self.pos_embed            # [B, S, D]

    def run_blocks(self, x, y, seeds, first: int, end: int):
        for i in range(first, end):
            x, y = self.blocks[i](x, y, seeds[i])
        return x, y

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
    """torch.compile for the embedding and every block: blocks are alike, so one graph serves all.

    forward is compiled, not the module, so that ZeRO's wait for weights stays outside the graph.
    Inductor's mix_order_reduction fuses a norm's backward with its weight gradient, over runs of
    rows; runs of 64, its own choice for large batches, are slow: on an H100 (torch 2.11) L/16 at
    372 spent 94 ms a step in elementwise kernels with 64, 65 with 32; B/16 at 744 made 3,863
    images/s without the fusion and 3,955 with 32.
    """
    options = {}
    if model.grid.tp.overlap:
        # Copy engines read what they send after the compiler's last use of it; and what runs beside
        # them stays there.
        options |= {"allow_buffer_reuse": False, "inplace_buffers": False,
                    "reorder_for_peak_memory": False}
    if hasattr(torch._inductor.config.triton, "mix_order_reduction_split_size"):
        options |= {"triton.mix_order_reduction": True,
                    "triton.mix_order_reduction_split_size": 32}
    model.embed = torch.compile(model.embed, fullgraph=True, dynamic=False)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, options=options)


# ----------------------------------------------------------------------------- attention kernels
# cuDNN's backward takes four passes at these sizes: delta = rowsum(dy * y), the kernel itself, dq
# from fp32 to bf16, and PyTorch's own that joins dq, dk, dv to dqkv; then the bias gradient is one
# more. The queries of up to 256 tokens fit one tile, so the kernel below does it in one: it walks
# along the keys, finishes dk and dv of each tile of them, and adds up dq.
SHORT = 256  # tokens

if triton is not None:
    @triton.jit
    def _short_backward(qkv, y, dy, lse, dqkv, dbias, scale, S: tl.constexpr, H: tl.constexpr,
                        D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
        """One image's head: dqkv of [S, 3, H, D] and its sum over tokens, from y, dy [S, H, D].

            p = exp(q k^T scale - lse)          dv = p^T dy
            ds = p (dy v^T - rowsum(dy y))      dk = ds^T q scale      dq = ds k scale

        Rows of p sum to 1 and rows of ds to 0, so over all tokens dv sums to dy's sum and dk to 0:
        no output depends on k's bias.
        """
        LOG2E: tl.constexpr = 1.4426950408889634  # exp2 is the hardware's own
        image, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
        d, m = tl.arange(0, D), tl.arange(0, QUERIES)
        here = image * S * 3 * H * D + head * D
        queries = here + m[:, None] * (3 * H * D) + d[None, :]
        rows = image * S * H * D + head * D + m[:, None] * (H * D) + d[None, :]
        q = tl.load(qkv + queries, mask=m[:, None] < S, other=0.0)              # [QUERIES, D]
        dy_m = tl.load(dy + rows, mask=m[:, None] < S, other=0.0)
        y_m = tl.load(y + rows, mask=m[:, None] < S, other=0.0)
        delta = tl.sum(y_m.to(tl.float32) * dy_m.to(tl.float32), 1)             # [QUERIES]
        lse_m = LOG2E * tl.load(lse + (image * H + head) * S + m, mask=m < S, other=float("inf"))
        dq = tl.zeros([QUERIES, D], tl.float32)
        for first in range(0, S, KEYS):
            n = first + tl.arange(0, KEYS)
            keys = here + n[:, None] * (3 * H * D) + d[None, :]
            k = tl.load(qkv + keys + H * D, mask=n[:, None] < S, other=0.0)     # [KEYS, D]
            v = tl.load(qkv + keys + 2 * H * D, mask=n[:, None] < S, other=0.0)
            p = tl.exp2(tl.dot(q, tl.trans(k)) * (scale * LOG2E) - lse_m[:, None])
            p = tl.where(n[None, :] < S, p, 0.0)  # at the keys that are not there it may be inf
            ds = (p * (tl.dot(dy_m, tl.trans(v)) - delta[:, None])).to(q.dtype)  # [QUERIES, KEYS]
            dv = tl.trans(tl.dot(tl.trans(dy_m), p.to(q.dtype)))                # [KEYS, D]
            dk = tl.trans(tl.dot(tl.trans(q), ds)) * scale
            dq += tl.dot(ds, k)
            tl.store(dqkv + keys + H * D, dk.to(q.dtype), mask=n[:, None] < S)
            tl.store(dqkv + keys + 2 * H * D, dv.to(q.dtype), mask=n[:, None] < S)
        dq *= scale
        tl.store(dqkv + queries, dq.to(q.dtype), mask=m[:, None] < S)
        sums = dbias + image * 3 * H * D + head * D + d
        tl.store(sums, tl.sum(dq, 0))
        tl.store(sums + H * D, tl.zeros([D], tl.float32))
        tl.store(sums + 2 * H * D, tl.sum(dy_m.to(tl.float32), 0))


@torch.library.custom_op("vit::short_attention_backward", mutates_args=())
def short_attention_backward(qkv: torch.Tensor, y: torch.Tensor, dy: torch.Tensor,
                             lse: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(dqkv [B, S, 3D], its exact sums over tokens [B, 3D] in fp32, 0 for k) from y, dy [B, S, D]
    and the log-sum-exp of each query's scores [B, nh, S]. B and nh may be a rank's share."""
    B, S, width = qkv.shape
    heads = width // 3 // head_dim
    dqkv, sums = torch.empty_like(qkv), qkv.new_empty(B, width, dtype=torch.float32)
    _short_backward[(B * heads,)](qkv, y, dy.contiguous(), lse, dqkv, sums, head_dim ** -0.5, S=S,
                                  H=heads, D=head_dim, QUERIES=SHORT, KEYS=64, num_warps=8,
                                  num_stages=2)
    return dqkv, sums


@short_attention_backward.register_fake
def _(qkv, y, dy, lse, head_dim):
    return torch.empty_like(qkv), qkv.new_empty(qkv.shape[0], qkv.shape[2], dtype=torch.float32)


class ShortAttention(torch.autograd.Function):
    """Attention of up to 256 tokens: cuDNN's forward, the backward above in one pass.

        qkv [B, S, 3D], bias [3D] (which qkv already contains)  ->  y [B, S, D]

    The bias is an argument for its gradient's sake, as in parallel.BiasGradient. L/16 at 248 images
    on an H100 (torch 2.11): 0.68 ms a block, cuDNN's passes and the joining 1.09. A first version
    of 0.83 ms took the step from 1,156 to 1,207 images/s.
    """

    @staticmethod
    def forward(ctx, qkv, bias, head_dim):
        q, k, v = (z.transpose(1, 2) for z in qkv.unflatten(-1, (3, -1, head_dim)).unbind(2))
        y, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        y = y.transpose(1, 2).flatten(2)
        ctx.save_for_backward(qkv, y, lse)
        ctx.head_dim, ctx.dtype = head_dim, bias.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        dqkv, sums = short_attention_backward(ctx.saved_tensors[0], ctx.saved_tensors[1], dy,
                                              ctx.saved_tensors[2], ctx.head_dim)
        return dqkv, sums.sum(0).to(ctx.dtype), None


BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def choose_attention(choice: str, config: ViTConfig, tp: int, device: torch.device,
                     dtype: torch.dtype) -> tuple[str, str]:
    """The attention kernel to use and why: (a key of BACKENDS, triton or flash-attn, reason).

    Each candidate is tried on this shape, forward and backward; `auto` takes the first that runs,
    in the order in which they were fastest at the models' shapes on an H100. Raises ValueError if
    the kernel that was asked for does not run, naming those that do.
    """
    def error_of(name: str) -> str | None:
        shape = (1, config.num_attention_heads // tp, config.seq_length, config.head_dim)
        q = torch.zeros(shape, device=device, dtype=dtype, requires_grad=True)
        try:
            if name == "flash-attn":
                if flash_attn_func is None:
                    return "the package flash-attn is not installed or does not import"
                flash_attn_func(*[q.transpose(1, 2)] * 3).sum().backward()
            elif name == "triton":
                if triton is None or (device.type, dtype) != ("cuda", torch.bfloat16):
                    return "it needs Triton, CUDA and bf16"
                if shape[2] > SHORT or shape[3] != 64 or config.attention_dropout:
                    return f"it takes up to {SHORT} tokens, head size 64 and no attention dropout"
                qkv = q.detach().repeat(1, 3, 1, 1).transpose(1, 2).flatten(2).requires_grad_()
                ShortAttention.apply(qkv, qkv[0, 0], shape[3]).sum().backward()
            else:
                with sdpa_kernel(BACKENDS[name]):
                    F.scaled_dot_product_attention(
                        q, q, q, dropout_p=config.attention_dropout).sum().backward()
        except Exception as e:
            return str(e).strip().splitlines()[-1]
        return None

    shape = f"{config.seq_length} tokens, head size {config.head_dim}, {str(dtype)[6:]}"
    order = ["triton", *BACKENDS] if device.type == "cuda" else ["flash", "math"]
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


# ----------------------------------------------------------------------------- weights of others
# (their name, ours), replaced as text; timm's names are ours. The last group of a format is what
# other versions of the library write. `.attn.q. .attn.k. .attn.v.` are then fused to `.attn.qkv.`.
NAMES = {
    "timm": [],
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
    ],
    "google": [
        ("cls", "cls_token"), ("Transformer/posembed_input/pos_embedding", "pos_embed"),
        ("embedding/", "patch_embed.proj."), ("Transformer/encoderblock_", "blocks."),
        ("/LayerNorm_0/", ".norm1."), ("/LayerNorm_2/", ".norm2."),
        ("/MultiHeadDotProductAttention_1/query/", ".attn.q."),
        ("/MultiHeadDotProductAttention_1/key/", ".attn.k."),
        ("/MultiHeadDotProductAttention_1/value/", ".attn.v."),
        ("/MultiHeadDotProductAttention_1/out/", ".attn.proj."),
        ("/MlpBlock_3/Dense_0/", ".mlp.fc1."), ("/MlpBlock_3/Dense_1/", ".mlp.fc2."),
        ("Transformer/encoder_norm/", "norm."), ("pre_logits/", "pre_logits.fc."),
        ("head/", "head."), ("kernel", "weight"), ("scale", "weight"),
    ],
}
# Where a file is silent: epsilon of LayerNorm, pixel mean, pixel deviation.
SILENT = {"timm": (1e-6, (0.5,) * 3, (0.5,) * 3), "hf": (1e-12, (0.5,) * 3, (0.5,) * 3),
          "google": (1e-6, (0.5,) * 3, (0.5,) * 3),
          "torchvision": (1e-6, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
TOLD = ("image_size", "num_attention_heads", "layernorm_eps", "gelu_approximate", "mean", "std",
        "crop_ratio", "precision", "classes")  # what shapes do not tell
SHAPE = ("hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads", "patch_size",
         "num_channels", "num_class_tokens")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # config.json beside them describes them


class Weights(NamedTuple):
    """A ViT's full weights under our names, and what goes with them."""
    format: str                         # a key of NAMES, or a checkpoint
    tensors: dict[str, torch.Tensor]
    facts: dict                         # fields of ViTConfig and TrainConfig; classes, if told


def rename(name: str, pairs) -> str:
    """Replaces each first text of a pair by its second, in one pass; the earlier pair wins."""
    table = dict(reversed(pairs))
    return re.sub("|".join(map(re.escape, table)), lambda m: table[m[0]], name) if table else name


def read_weights(path: str | Path, image_size=None) -> Weights:
    """Reads our checkpoint (or the newest of an output directory), or a file of timm, Hugging Face
    (or a hub's folder), torchvision or Google (.npz), which its names tell. No code in it is run.

    Sizes come from the tensors' shapes, the rest from our files' facts or a hub's config.json, else
    SILENT. image_size (the file's own) is needed where its patches are no square and it does not
    tell. Raises ValueError for a file that cannot be read, is no ViT, or is not complete.
    """
    path = Path(path)
    try:
        raw, told = _open(path)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    except Exception as e:  # torch, zip and the file system each fail in their own ways
        code = re.search(r"GLOBAL (\S+)", str(e))
        if isinstance(e, pickle.UnpicklingError) and code:
            raise ValueError(f"{path} holds pickled objects other than tensors ({code[1]}); loading"
                             f" them could run code. Save its state dict alone") from e
        raise ValueError(f"{path} is truncated, or not a {path.suffix} file of plain tensors "
                         f"({type(e).__name__})") from e
    if "embeddings.cls_token" in raw:  # Hugging Face's ViTModel: no head, no prefix
        raw = {"vit." + name: x for name, x in raw.items()}
    names = {fmt: {rename(name, pairs): name for name in raw} for fmt, pairs in NAMES.items()}
    fmt = next((fmt for fmt in NAMES if "patch_embed.proj.weight" in names[fmt]), None)
    if fmt is None:
        raise ValueError(f"{path} is not a ViT of {', '.join(NAMES)}; its names begin with "
                         f"{', '.join(list(raw)[:4])}")
    tensors = {ours: raw[name] for ours, name in names[fmt].items()}
    try:
        sizes = _to_ours(fmt, tensors, names[fmt])
        with torch.device("meta"):
            model = ViT(ViTConfig(**{"num_attention_heads": 1, "image_size": sizes["patch_size"],
                                     **sizes}))
    except (KeyError, IndexError, RuntimeError, ValueError) as e:
        raise ValueError(f"{path} looks like {fmt}'s, but is no ViT with a class token or is "
                         f"incomplete: {e!r}") from e
    expected = {name: x.shape for name, x in model.named_parameters()} | {
        "pos_embed": (1, tensors["pos_embed"].shape[1], sizes["hidden_size"])}
    head = {"head.weight", "head.bias"}
    odd = {"unknown": tensors.keys() - expected.keys(),
           "missing": expected.keys() - tensors.keys() - (set() if head & tensors.keys() else head),
           "misshapen": {n for n in tensors.keys() & expected.keys()
                         if tensors[n].shape != expected[n]}}
    odd = [f"{len(found)} {kind} ({', '.join(sorted(names[fmt].get(n, n) for n in found)[:3])})"
           for kind, found in odd.items() if found]
    if odd or len(names[fmt]) != len(raw):
        raise ValueError(f"{path} is of {fmt}'s form, but not this model: "
                         f"{'; '.join(odd) or 'some weights are there under two names'}")
    eps, mean, std = SILENT[fmt]
    facts = {"layernorm_eps": eps, "gelu_approximate": "none", "mean": mean, "std": std, **told,
             **sizes}
    facts["image_size"] = image_size or told.get("image_size")
    try:
        tensors["pos_embed"], facts["image_size"] = _positions(tensors["pos_embed"], facts)
    except ValueError as e:
        raise ValueError(f"{path} {e}") from e
    ours = fmt == "timm" and path.is_dir() and "classes" in told
    return Weights("a checkpoint" if ours else fmt, tensors, facts)


def _open(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of a file or checkpoint under their own names, and the facts it tells."""
    told = {}
    if path.is_dir():
        hub = [path / name for name in HUB_FILES if (path / name).exists()]
        if hub:
            return _open(hub[0])
        path = newest_checkpoint(path)
        meta, read = read_meta(path), CheckpointTensors(path)
        raw = {name: read(name, "weight") for name in meta["where"]}
        told = {**meta["config"], **meta["vit"], "classes": meta["classes"]}
    elif not path.exists():
        raise ValueError("there is no such file")
    elif path.suffix == ".safetensors":
        raw, metadata = read_safetensors(path)
        told = json.loads(metadata.get("facts", "{}"))
    elif path.suffix == ".npz":
        if not zipfile.is_zipfile(path):
            raise ValueError("it is truncated, or not an .npz file")
        with np.load(path, allow_pickle=False) as file:
            raw = {name: torch.from_numpy(file[name]) for name in file.files}
    elif path.suffix in (".pt", ".pth", ".bin"):
        raw = torch.load(path, map_location="cpu", weights_only=True,
                         mmap=zipfile.is_zipfile(path))  # files of torch < 1.6 cannot be mapped
        told = getattr(raw, "facts", {})
        for key in ("model", "state_dict"):  # as MAE, DeiT and timm's training script wrap them
            raw = raw[key] if isinstance(raw, dict) and key in raw else raw
    else:
        raise ValueError("its name must end in .pt, .pth, .bin, .safetensors or .npz, or it must "
                         "be a checkpoint directory")
    if not isinstance(raw, dict) or not all(isinstance(x, torch.Tensor) for x in raw.values()):
        raise ValueError("it is not a dictionary of named tensors")
    told = told or _hub_facts(path)
    return raw, {k: tuple(v) if isinstance(v, list) else v for k, v in told.items() if k in TOLD}


def _hub_facts(path: Path) -> dict:
    """What config.json (Hugging Face's or timm's) and preprocessor_config.json beside a hub's file
    tell. Raises ValueError for an activation that is not GELU."""
    beside = [path.with_name(name) for name in ("config.json", "preprocessor_config.json")]
    config, pixels = (json.loads(file.read_text()) if path.name in HUB_FILES and file.exists()
                      else {} for file in beside)
    timm, gelu = config.get("pretrained_cfg", {}), config.get("hidden_act", "gelu")
    if gelu not in ("gelu", "gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(f"config.json says hidden_act {gelu}; legal: gelu, gelu_pytorch_tanh")
    told = dict(
        num_attention_heads=config.get("num_attention_heads"),
        layernorm_eps=config.get("layer_norm_eps"),
        gelu_approximate="none" if gelu == "gelu" else "tanh",
        image_size=config.get("image_size", timm.get("input_size", [None])[1:]) or None,
        mean=timm.get("mean", pixels.get("image_mean")),
        std=timm.get("std", pixels.get("image_std")), crop_ratio=timm.get("crop_pct"))
    return {name: value for name, value in told.items() if value is not None}


def _to_ours(fmt: str, tensors: dict[str, torch.Tensor], theirs: dict[str, str]) -> dict:
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
    if "reg_token" in tensors:  # timm's registers are our further class tokens, in the same place
        tensors["cls_token"] = torch.cat([tensors["cls_token"], tensors.pop("reg_token")], dim=1)
    weight = tensors["patch_embed.proj.weight"]
    if "head.weight" in tensors:
        sizes["num_classes"] = tensors["head.weight"].shape[0]
    return sizes | dict(
        hidden_size=weight.shape[0], num_channels=weight.shape[1], patch_size=weight.shape[3],
        ffn_hidden_size=tensors["blocks.0.mlp.fc1.weight"].shape[0],
        num_layers=1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("blocks.")),
        num_class_tokens=tensors["cls_token"].shape[1],
        head="mlp" if "pre_logits.fc.weight" in tensors else "linear")


def _positions(pos: torch.Tensor, facts: dict) -> tuple[torch.Tensor, int | tuple[int, int]]:
    """The positions [1, P + h*w, D] of P class tokens and h*w patches, and their image size."""
    prefix, p, size = facts["num_class_tokens"], facts["patch_size"], facts["image_size"]
    size = size or p * math.isqrt(max(pos.shape[1] - prefix, 0))
    h, w = (side // p for side in ((size, size) if isinstance(size, int) else size))
    if pos.shape[1] == h * w:  # timm's no_embed_class: class tokens have no position
        pos = torch.cat([pos.new_zeros(1, prefix, pos.shape[2]), pos], dim=1)
    if pos.shape[1] != prefix + h * w:
        raise ValueError(f"has {pos.shape[1]} positions, which are not {prefix} class tokens and a "
                         f"{h}x{w} grid of patches: give the image size that it was trained at as "
                         f"--init-image-size HEIGHT,WIDTH")
    return pos, size


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


def model_name(facts: dict) -> str | None:
    """The entry of MODELS with the widths, depth and patch of these facts."""
    fields = ("hidden_size", "ffn_hidden_size", "num_layers", "patch_size")
    return next((name for name, shape in MODELS.items()
                 if all(facts[k] == getattr(shape, k) for k in fields)), None)


def fit_weights(weights: Weights, config: ViTConfig) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(the full fp32 weights for ViT(config), what was done to them).

    Only the position embedding is resized, and only the head may be left out of the result, to be
    initialised: where the file has none, or one of another kind or number of classes.
    Raises ValueError for the weights of another model.
    """
    facts, tensors = weights.facts, {name: x.float() for name, x in weights.tensors.items()}
    odd = [f"{k} {facts[k]} (this run: {getattr(config, k)})" for k in SHAPE
           if facts.get(k, getattr(config, k)) != getattr(config, k)]
    if odd:
        name = model_name(facts)
        raise ValueError(f"the weights are of another model: {', '.join(odd)}"
                         + (f"; it has the shape of --model {name}" if name else ""))
    old = ViTConfig(patch_size=config.patch_size, image_size=facts["image_size"]).grid_hw
    tensors["pos_embed"] = resize_pos_embed(tensors["pos_embed"], config.num_class_tokens, old,
                                            config.grid_hw)
    dropped, new, report = (), "head", []
    if old != config.grid_hw:
        report.append("pos_embed resized from {}x{} to {}x{}".format(*old, *config.grid_hw))
    if facts["head"] != config.head:
        dropped = ("pre_logits.", "head.")
        new = "head (no pre_logits.fc)" if config.head == "linear" else "pre_logits.fc and head"
    elif facts.get("num_classes") != config.num_classes:
        dropped = ("head.",)
    if dropped:
        tensors = {name: x for name, x in tensors.items() if not name.startswith(dropped)}
        found = (f"'s is {facts['head']}, {facts['num_classes']} classes"
                 if "num_classes" in facts else " has none")
        report.append(f"{new} newly initialised for {config.num_classes} classes: the file{found}")
    return tensors, [f"{len(tensors)} weights loaded", *report]


@torch.no_grad()
def load_weights(model: ViT, fitted: dict[str, torch.Tensor]) -> None:
    """fit_weights' result into a model of any layout; a new head keeps its initialisation. Before
    the optimizer is built, or call its refresh_masters."""
    for name, param in model.named_parameters():
        if name in fitted:
            param.copy_(shard(fitted[name], param, model.grid.tp))


def to_format(state: dict[str, torch.Tensor], config: ViTConfig,
              fmt: str) -> dict[str, torch.Tensor]:
    """Our full weights under the names of timm, hf or torchvision, complete for strict loading.

    More than one class token is a class token and registers (reg_tokens=N-1) in timm.
    Raises ValueError for a model that the library does not have, saying what to change.
    """
    count, (h, w) = config.num_class_tokens, config.image_hw
    if config.head == "mlp" and fmt != "torchvision":
        raise ValueError(f"--format {fmt} has no place for the pretraining head (--head mlp): "
                         f"fine-tune with --head linear first, or use --format torchvision")
    if count > 1 and fmt != "timm":
        raise ValueError(f"--format {fmt} has one class token, this model has {count}: use "
                         f"--format timm (reg_tokens={count - 1})")
    if fmt == "torchvision" and (h != w or config.num_channels != 3
                                 or config.gelu_approximate != "none"):
        raise ValueError("--format torchvision has square images, 3 channels and exact GELU only: "
                         "use --format timm")
    state = dict(state)
    if count > 1:
        state["cls_token"], state["reg_token"] = state["cls_token"].split([1, count - 1], dim=1)
    for name in [name for name in state if fmt == "hf" and ".attn.qkv." in name]:
        for part, x in zip("qkv", state.pop(name).chunk(3), strict=True):
            state[name.replace("qkv", part)] = x
    back = [(ours, theirs) for theirs, ours in NAMES[fmt]]
    return {rename(name, back): x for name, x in state.items()}


def write_weights(path: str | Path, tensors: dict[str, torch.Tensor], config: ViTConfig, fmt: str,
                  facts: dict) -> str:
    """Writes to_format's weights as fp32 to a .pt or .safetensors file, whole or not at all, and
    returns the Python code that opens it. Facts travel along, unseen by other libraries, so that
    read_weights need not guess them. For Hugging Face the file must be FOLDER/model.safetensors,
    and its two configs are written beside it: then from_pretrained(FOLDER) is all that it takes.
    Raises ValueError for another ending, OSError if it cannot be written."""
    path, facts = Path(path), {k: facts[k] for k in TOLD if k in facts}
    if path.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"--export {path} must end in .pt or .safetensors")
    if fmt == "hf" and path.name != "model.safetensors":
        raise ValueError(f"--export {path}: --format hf writes a folder for from_pretrained; give "
                         f"FOLDER/model.safetensors")
    tensors = OrderedDict((name, x.float().contiguous()) for name, x in tensors.items())
    tensors.facts = facts  # an attribute, as torch's own _metadata: the keys stay the model's
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, values in hf_configs(config, facts).items() if fmt == "hf" else ():
        text = json.dumps(values, indent=1)
        write_atomically(path.with_name(name), lambda file, text=text: file.write(text.encode()))
    write_atomically(path, lambda file: (torch.save(tensors, file) if path.suffix == ".pt" else
                                         write_safetensors(file, tensors, facts)))
    return how_to_open(path, config, fmt)


def hf_configs(config: ViTConfig, facts: dict) -> dict[str, dict]:
    """Hugging Face's config.json and preprocessor_config.json."""
    labels = facts.get("classes") or [f"LABEL_{i}" for i in range(config.num_classes)]
    h, w = config.image_hw
    return {"config.json": dict(
        architectures=["ViTForImageClassification"], model_type="vit",
        hidden_size=config.hidden_size, intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_attention_heads,
        patch_size=config.patch_size, num_channels=config.num_channels,
        image_size=h if h == w else [h, w], layer_norm_eps=config.layernorm_eps, qkv_bias=True,
        hidden_act="gelu" if config.gelu_approximate == "none" else "gelu_pytorch_tanh",
        id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)},
    ), "preprocessor_config.json": dict(
        image_processor_type="ViTImageProcessor", size=dict(height=h, width=w), resample=3,
        image_mean=facts["mean"], image_std=facts["std"])}


def how_to_open(path: Path, config: ViTConfig, fmt: str) -> str:
    """Python code that opens an exported file in its library, strictly."""
    if fmt == "hf":
        return ("import transformers\nmodel = transformers.ViTForImageClassification."
                f"from_pretrained({str(path.parent)!r})")
    c, d, f, (h, w) = config, config.hidden_size, config.ffn_hidden_size, config.image_hw
    size = h if h == w else (h, w)
    theirs = dict(
        img_size=size, in_chans=c.num_channels, embed_dim=d, depth=c.num_layers, mlp_ratio=f / d,
        reg_tokens=c.num_class_tokens - 1,
        act_layer="gelu" if c.gelu_approximate == "none" else "gelu_tanh",
    ) if fmt == "timm" else dict(
        image_size=size, hidden_dim=d, num_layers=c.num_layers, mlp_dim=f,
        representation_size=d if c.head == "mlp" else None)
    theirs |= dict(patch_size=c.patch_size, num_heads=c.num_attention_heads,
                   num_classes=c.num_classes)
    load = "torch.load" if path.suffix == ".pt" else "safetensors.torch.load_file"
    return (f"import functools, {fmt}, torch" + ", safetensors.torch" * (path.suffix != ".pt")
            + f"\nmodel = {fmt}.models.VisionTransformer("
            + ", ".join(f"{k}={v!r}" for k, v in theirs.items())
            + f", norm_layer=functools.partial(torch.nn.LayerNorm, eps={config.layernorm_eps}))\n"
            + f"model.load_state_dict({load}({str(path)!r}))")


# safetensors: 8 bytes header length, JSON {name: dtype, shape, data_offsets}, then raw bytes.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata); the file is mapped, not read. Raises ValueError if it is damaged."""
    with open(path, "rb") as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError("it is truncated, or not a safetensors file")
        header = json.loads(file.read(length))
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    metadata, tensors, start = header.pop("__metadata__", {}), {}, 8 + length
    for name, entry in header.items():
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        count = math.prod(shape)
        if begin < 0 or end - begin != count * dtype.itemsize or start + end > size:
            raise ValueError(f"it is truncated or damaged: {name} needs bytes {begin} to {end}, "
                             f"the file holds {size - start}")
        tensors[name] = torch.frombuffer(data, dtype=dtype, count=count,
                                         offset=start + begin).view(shape)
    return tensors, metadata


def write_safetensors(file, tensors: dict[str, torch.Tensor], facts: dict) -> None:
    """fp32 tensors to an open binary file."""
    header, offset = {"__metadata__": {"format": "pt", "facts": json.dumps(facts)}}, 0
    for name, x in tensors.items():
        header[name] = dict(dtype="F32", shape=list(x.shape),
                            data_offsets=[offset, offset + x.nbytes])
        offset += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for x in tensors.values():
        file.write(x.detach().cpu().numpy())
