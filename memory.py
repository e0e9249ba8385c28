"""What a run needs: bytes on each rank, by part, and of a checkpoint; nothing is allocated."""

import math
import operator

import torch

from configs import Step, ViTConfig
from model import ViT
from parallel import Axis, Grid, plan_buckets


def activation_bytes(vit: ViTConfig, config: Step, images: int) -> int:
    """Bytes that one rank keeps for backward with `images` images of its own, in this layout.

    The table is of a block without recomputation and of a selective one, and of the last block
    where its token 0 alone is read (never in fp8); else the last is as any. Full keeps x and y of a
    block or run of blocks. Both keep what one of them keeps by itself while backward is in it.
    (Compiled; eager selective keeps partial sums of row products as well.) Of images that drop path
    leaves out nothing is kept but the inputs, and of a frozen backbone only the head's input.
    """
    d, f, t = vit.hidden_size, vit.ffn_hidden_size, config.tensor_parallel_size
    e = 4 if config.precision == "fp32" else 2                  # bytes of an element
    if config.freeze == "backbone":
        return images * d * e
    p = 1 if config.fp8 else e                                  # of an element of a product's input
    m, g = int(vit.hidden_dropout > 0), e if vit.layerscale else 0
    # Where images visit, assumed if --tp-comm-overlap allows it, proj's result is kept in t parts.
    parts = 1 if config.fp8 or config.tp_comm_overlap is False else t
    # width  bytes of a token's feature in a block, selective; in the last one, selective
    table = [
        (d,      2 * e,           2 * e,      e,        2 * e),  # x and y, the norms' inputs
        (t * d,  2 * p,           0,          e,        0),      # their outputs, gathered over tp
        (d,      3 * e,           3 * e,      2 * e,    2 * e),  # q, k, v
        (d,      e + config.fp8,  e,          0,        0),      # attention's output; also in fp8
        (d,      0,               parts * e,  0,        0),      # proj's
        (f,      e,               e,          0,        0),      # fc1's
        (f,      p,               0,          0,        0),      # GELU's
        (d,      2 * m,           0,          m,        0),      # dropout's masks
        (d,      2 * g,           g,          0,        0)]      # what LayerScale multiplies
    tokens, shares = images * vit.train_seq_length, vit.computed_shares
    width, *columns = zip(*table)
    block, selective, *last = (tokens * sum(map(operator.mul, width, x)) for x in columns)
    block += 2 * d * (2 * d + f) // t if config.fp8 else 0      # the weights, transposed
    last, last_selective = last if vit.pool == "token" else (block, selective)
    entry = tokens * 2 * e * d                                  # x and y
    norms = tokens * e * d * (vit.pre_norm + (vit.pool == "mean" and not vit.fc_norm))
    layers, n = vit.num_layers, config.checkpoint_num_layers

    def kept(first: int) -> int:
        """Without recomputation, of the blocks from this one on."""
        return int(sum(shares[first:-1]) * block + shares[-1] * last) if first < layers else 0
    if config.activation_checkpointing == "none":
        return norms + kept(0)
    if config.activation_checkpointing == "selective":
        inner = int(sum(shares[:-1]) * (selective - entry))
        return norms + (layers - 1) * entry + inner + last_selective + block - selective
    if config.checkpoint_method == "uniform":
        return norms + math.ceil(layers / n) * entry + (n * block if n < layers else kept(0))
    return norms + min(n, layers) * entry + kept(n) + block


def moments(config: Step) -> int:
    """The optimizer's tensors beside each weight."""
    return int(config.momentum > 0) if config.optimizer == "sgd" else 2


def memory_plan(vit: ViTConfig, config: Step, tp: int, dp: int, micro: int) -> dict:
    """Bytes per rank by part, for rank 0 of a tp x dp layout; nothing is allocated."""
    grid = Grid(Axis(0, tp), Axis(0, dp), Axis(0, tp * dp))
    with torch.device("meta"):
        model = ViT(vit, grid)
    if config.freeze == "backbone":
        model.freeze()
    buckets = [bucket for unit in plan_buckets(model, grid) for bucket in unit]
    state = moments(config) + (config.ema_decay > 0)
    return {"weights": sum(_block(b.numel * (2 if config.o2 else 4)) for b in buckets),
            "gradients": sum(_block(b.numel * 4) for b in buckets if not b.frozen),
            "masters and moments": sum(_block((b.end - b.begin) * 4) * (
                config.o2 + (0 if b.frozen else state)) for b in buckets),
            "activations": activation_bytes(vit, config, micro // tp)}


def checkpoint_bytes(vit: ViTConfig, config: Step) -> int:
    """At most: fp32 weights, moments and, if there is one, the weights' average."""
    return vit.num_params * 4 * (1 + moments(config) + (config.ema_decay > 0))


def _block(size: int) -> int:
    """Bytes that torch's CUDA allocator takes for a buffer: from 10 MiB on it reserves steps of
    2 MiB, and leaves a rest of less than 1 MiB in the block (3 % of B/16's state)."""
    rest = -size % 2**21
    return size + (rest if size >= 10 * 2**20 and rest < 2**20 else 0)
