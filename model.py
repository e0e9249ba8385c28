"""What is computed: the Vision Transformer (arXiv:2010.11929), pre-norm, learned positions.

    tokens  x = dropout([class tokens; patches W_p + b_p] + positions)
    block   x = x + attention(norm1(x));  x = x + mlp(norm2(x))      each half: drop path, dropout
    output  logits = head(norm(x[token 0])); so the last block computes token 0 only
    others  where the config says so: LayerScale of both halves, a norm before the blocks, and the
            mean of the patches instead of token 0

Parameter names and shapes are timm's, so that a public checkpoint loads with no mapping and ours
opens there: cls_token, pos_embed, patch_embed.proj, blocks.N.{norm1, attn.qkv, attn.proj, norm2,
mlp.fc1, mlp.fc2}, norm, head, and where there are any ls1, ls2, norm_pre, fc_norm; the pretraining
head of NeMo and the paper (linear, tanh, linear) has its hidden layer in pre_logits.fc. With 8
class tokens, as in NeMo, cls_token is [1, 8, D].

Letters: B images, S tokens = class tokens + N patches of side p, C channels, D hidden size, F width
of the MLP, nh heads of hd = D / nh, t tensor-parallel size. With t > 1 a rank holds b images in the
residual stream, and between the two layers of a block half t*b images and 1/t of the features
(parallel.py says why). With t = 1 this is a plain ViT, which builds with no process group.

Checked against timm, torchvision and transformers: same weights, same logits (test_weights.py).
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from configs import ViTConfig, kept_images, stable_seed
from parallel import Axis, ColumnParallelLinear, Grid, RowParallelLinear, full_shape, shard


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

    def __init__(self, config: ViTConfig, tp: Axis):
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.attention_dropout
        self.qkv = ColumnParallelLinear(config.hidden_size, 3 * config.hidden_size, tp, parts=3)
        self.proj = RowParallelLinear(config.hidden_size, config.hidden_size, tp)

    def forward(self, x):                                                      # [b, S, D]
        return self.proj(self.attend(self.qkv(x)))                             # [b, S, D]

    def attend(self, qkv):                                                     # [t*b, S, 3D/t]
        return self.answer(*qkv.chunk(3, -1))                                  # [t*b, S, D/t]

    def answer(self, q, k, v):                                                 # [t*b, S, D/t] each
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)            # [t*b,nh/t,S,hd]
        return y.transpose(1, 2).flatten(2)                                    # [t*b, S, D/t]


class LastAttention(Attention):
    """What token 0 asks all tokens for: one query, S keys and values."""

    def forward(self, x):                                                      # [b, S, D]
        x = self.qkv.gather(x)                                                 # [t*b, S, D]
        q = self.qkv.product_of(slice(0, 1), x[:, :1])                         # [t*b, 1, D/t]
        k, v = self.qkv.product_of(slice(1, 3), x).chunk(2, -1)                # [t*b, S, D/t] each
        return self.proj(self.answer(q, k, v))                                 # [b, 1, D]


class Mlp(nn.Module):
    """linear, GELU, linear; each tp rank computes F/t of the hidden features."""

    def __init__(self, config: ViTConfig, tp: Axis):
        super().__init__()
        self.approximate = config.gelu_approximate
        self.fc1 = ColumnParallelLinear(config.hidden_size, config.ffn_hidden_size, tp)
        self.fc2 = RowParallelLinear(config.ffn_hidden_size, config.hidden_size, tp)

    def forward(self, x):                                                      # [b, S, D]
        return self.fc2(self.act(self.fc1(x)))                                 # [b, S, D]

    def act(self, x):                                                          # [t*b, S, F/t]
        if self.approximate == "quick":
            return x * torch.sigmoid(1.702 * x)
        return F.gelu(x, approximate=self.approximate)


class Dropout(nn.Module):
    """nn.Dropout as one operator on every device, so that recomputation can keep its draw."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or not self.rate:
            return x
        return torch.native_dropout(x, self.rate, True)[0]


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): a block half, branch(x), dropped for whole images and
    scaled for the others, so that its mean stays. By mode `image` each is dropped at the rate; by
    `batch` a fixed number of random ones is, and those are not computed (arXiv:2304.07193)."""

    def __init__(self, rate: float, mode: str = "image"):
        super().__init__()
        self.rate, self.mode = rate, mode

    def forward(self, branch, x):                                              # x [b, S, D]
        if not self.training or not self.rate:
            return branch(x)
        if self.mode == "image":
            y = branch(x)
            kept = torch.rand(y.shape[0], 1, 1, device=y.device) >= self.rate
            return y * kept / (1 - self.rate)
        b, count = x.shape[0], kept_images(x.shape[0], self.rate)
        kept = torch.rand(b, device=x.device).argsort()[:count]
        y = branch(x[kept]) * (b / count)                                      # [count, ., D]
        return y.new_zeros(b, *y.shape[1:]).index_copy(0, kept, y)


class LayerScale(nn.Module):
    """A factor for each feature, which begins small (arXiv:2103.17239)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(hidden_size))

    def forward(self, x):                                                      # [b, S, D]
        return x * self.gamma.to(x.dtype)


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)), both on this rank's images [b, S, D]."""

    attention = Attention

    def __init__(self, config: ViTConfig, tp: Axis, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layernorm_eps)
        self.attn = self.attention(config, tp)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layernorm_eps)
        self.mlp = Mlp(config, tp)
        self.ls1, self.ls2 = (LayerScale(config.hidden_size) if config.layerscale else
                              nn.Identity() for _ in range(2))
        self.drop = Dropout(config.hidden_dropout)
        self.drop_path = DropPath(drop_path, config.drop_path_mode)

    def forward(self, x):
        x = x + self.drop(self.drop_path(lambda x: self.ls1(self.attn(self.norm1(x))), x))
        x = x + self.drop(self.drop_path(lambda x: self.ls2(self.mlp(self.norm2(x))), x))
        return x


class LastBlock(Block):
    """The block of whose result only token 0 is read: [b, S, D] -> [b, 1, D]. Its keys and values
    need all tokens; query, projection and MLP need one, which spares five sixths of a block."""
    attention = LastAttention

    def forward(self, x):
        y = self.drop_path(lambda x: self.ls1(self.attn(self.norm1(x))), x)    # of all tokens
        x = x[:, :1] + self.drop(y)                                            # token 0
        x = x + self.drop(self.drop_path(lambda x: self.ls2(self.mlp(self.norm2(x))), x))
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
    seed: of the initial weights; None leaves them empty, for weights that are to be loaded.
    """

    def __init__(self, config: ViTConfig, grid: Grid = Grid(), seed: int | None = 0):
        super().__init__()
        self.config, self.grid = config, grid
        d = config.hidden_size
        norm = partial(nn.LayerNorm, d, eps=config.layernorm_eps)
        self.cls_token = (nn.Parameter(torch.empty(1, config.num_class_tokens, d))
                          if config.num_class_tokens else None)
        self.pos_embed = nn.Parameter(torch.empty(1, config.seq_length, d))
        self.patch_embed = PatchEmbed(config)
        self.norm_pre = norm() if config.pre_norm else nn.Identity()
        self.drop = Dropout(config.hidden_dropout)
        rates = config.drop_path_rates
        last = LastBlock if config.pool == "token" else Block
        self.blocks = nn.Sequential(*(Block(config, grid.tp, rate) for rate in rates[:-1]),
                                    last(config, grid.tp, rates[-1]))
        self.norm = nn.Identity() if config.fc_norm else norm()                # of the tokens
        self.fc_norm = norm() if config.fc_norm else nn.Identity()             # of their mean
        self.pre_logits = PreLogits(d) if config.head == "mlp" else nn.Identity()
        self.head = nn.Linear(d, config.num_classes)
        if seed is not None and not self.pos_embed.is_meta:
            self.init_weights(seed)

    def forward(self, images):
        x = self.drop(self.embed(images))                                      # [B, S, D]
        return self.output(self.blocks(x))                                     # [B, num_classes]

    def embed(self, images):
        patches = self.patch_embed(images)                                     # [B, N, D]
        if self.cls_token is not None:
            tokens = self.cls_token.expand(patches.shape[0], -1, -1).to(patches.dtype)
            patches = torch.cat([tokens, patches], dim=1)
        x = self.norm_pre(patches + self.pos_embed)                            # [B, S, D]
        return self.drop_patches(x) if self.training and self.config.drop_patch_rate else x

    def drop_patches(self, x):
        """The class tokens and, drawn for each image, some of its patches (arXiv:2208.07220)."""
        first, drawn = self.config.num_class_tokens, torch.rand(x.shape[:2], device=x.device)
        drawn[:, :first] = torch.arange(-first, 0, device=x.device)            # stay, in order
        kept = drawn.argsort(1)[:, :self.config.train_seq_length]
        return x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))        # [B, fewer, D]

    def output(self, x):                                    # [B, 1, D] token 0, or all, [B, S, D]
        first = self.config.num_class_tokens
        x = self.norm(x[:, 0]) if self.config.pool == "token" else self.norm(x[:, first:]).mean(1)
        return self.head(self.pre_logits(self.fc_norm(x)))                     # [B, num_classes]

    def init_weights(self, seed: int, loaded=(), each=map) -> None:
        """Every full parameter is drawn from (seed, its name), then cut for tp: the same model for
        every layout. Those that are to be `loaded` are left empty. each: map, or a pool's.

        Weights normal, std 0.02, as in timm; what reads pixels or feeds a tanh keeps its input's
        size, std 1 / sqrt(fan in) (patch embedding, pre_logits); biases and class tokens zero, and
        the head beside loaded weights (ViT paper). NeMo scales what writes into the residual stream
        by 1 / sqrt(2 layers), and starts the logits at -10, which softmax does not see but bf16
        does. Compared on digits and photographs: RESULTS.md, "Initial weights".
        """
        def draw(name, param):
            generator = torch.Generator().manual_seed(stable_seed(seed, name))
            full = torch.empty(full_shape(param, self.grid.tp), device="cpu")
            if "norm" in name and name.endswith("weight"):
                full.fill_(1.0)
            elif name.endswith("gamma"):
                full.fill_(self.config.layerscale)
            elif name.endswith("bias") or name == "cls_token" or loaded and name == "head.weight":
                full.zero_()
            elif name in ("patch_embed.proj.weight", "pre_logits.fc.weight"):
                full.normal_(0.0, full[0].numel() ** -0.5, generator=generator)
            else:
                full.normal_(0.0, 0.02, generator=generator)
            param.data.copy_(shard(full, param, self.grid.tp))

        named = {n: p for n, p in self.named_parameters() if n not in loaded}
        list(each(draw, named.keys(), named.values()))

    def freeze(self) -> None:
        """--freeze backbone, a linear probe: only the head gets gradients, so that autograd keeps
        nothing of the rest (which is to have no dropout)."""
        for name, param in self.named_parameters():
            param.requires_grad_(name.startswith(("pre_logits.", "head.")))

    def units(self) -> list[tuple[nn.Module, dict[str, nn.Parameter]]]:
        """What the weights are gathered and reduced by, in the order of the forward pass: a module
        whose forward is the first to use them, and they by name: embedding, blocks, head."""
        named = dict(self.named_parameters())
        last = {n: p for n, p in named.items() if n.startswith(("norm.", "fc_norm", "pre_logits",
                                                                "head"))}
        blocks = [(block, {f"blocks.{i}.{n}": p for n, p in block.named_parameters()})
                  for i, block in enumerate(self.blocks)]
        first = {n: p for n, p in named.items() if n not in last and not n.startswith("blocks.")}
        return [(self, first), *blocks, (self.norm, last)]


# ----------------------------------------------------------------------------- recomputation
# Selective recomputation keeps the results of these and recomputes the rest (norms, GELU, f). Kept
# too is whatever draws random numbers: a kept operation does not run again, so it does not advance
# the generator, and a draw recomputed after it would get other numbers.
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
}


def _selective_policy(context, op, *args, **kwargs):
    # A draw in place (attention's dropout on a CPU) cannot be kept; it is a block's first, and
    # repeats.
    draws = torch.Tag.nondeterministic_seeded in op.tags and not op._schema.is_mutable
    kept = op in KEPT or draws
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def recompute(model: ViT, what: str, method: str = "uniform", num_layers: int = 1,
              early_stop: bool = True) -> None:
    """Makes backward recompute part of the blocks (--activation-checkpointing): changes the
    finished model in place, after other classes are put in and before it is compiled.

        none       nothing
        selective  everything in a block but matrix products, attention and what g returns (KEPT)
        full       whole blocks; NeMo's activations_checkpoint_granularity=full:
                   uniform: every run of num_layers blocks keeps only its input
                   block:   the first num_layers blocks keep only their inputs, each

    Dropout is replayed exactly. early_stop: recompute only up to the last result that is needed;
    False recomputes a block to its end, so that what it has begun to send also arrives.
    """
    if what == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _selective_policy)
        for block in model.blocks:
            block.forward = _recomputed(block.forward, early_stop=early_stop, context_fn=contexts)
    elif what == "full":
        n, layers = num_layers, len(model.blocks)
        runs = ([model.blocks[i:i + n] for i in range(0, layers, n)] if method == "uniform" else
                [model.blocks[i:i + 1] for i in range(min(n, layers))])
        for run in runs:
            run.forward = _recomputed(run.forward, early_stop=early_stop)
        rest = model.blocks[n:] if method == "block" else []
        model.blocks.forward = nn.Sequential(*runs, *rest).forward


def _recomputed(function, **options):
    def forward(*args):
        if not torch.is_grad_enabled():
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False, **options)
    return forward
