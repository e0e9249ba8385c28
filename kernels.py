"""What one GPU does faster: a pass over a finished model, which swaps the classes of its parts.

    apply(model, ...)   attention's kernel (attention.py), products in fp8 or with more than a
                        product (products.py), blocks whose sums and dropout fuse (here)
    compile(model)      torch.compile for the embedding and each block

The model computes the same function with the same parameters; nothing in model.py or parallel.py
knows of this file, and without it a run is as correct and slower. Each part says why it is here and
what it gained; test_speed.py compares each with the plain computation.
"""

import torch

from attention import ATTENTION, SdpaAttention, choose_attention
from configs import kept_images
from model import Block, LastBlock, ViT
from products import Fp8RowLinear, FusedColumnLinear, GeluMlp, gelu_in_product

__all__ = ["apply", "choose_attention", "compile"]


def apply(model: ViT, *, attention: str | None = None, fp8: bool = False,
          fused: bool = False) -> None:
    """Swaps the classes of a model's parts, in place; before recompute and compile.

    attention: a key of BACKENDS, triton or flash-attn (choose_attention), or None: torch's choice.
    fp8: the products in training are Fp8Linear's; weights in bf16. fused: FusedBlock and GeluMlp.
    """
    for block in model.blocks:
        if isinstance(block, LastBlock):  # its products are small, and of any number of rows
            continue
        attn, mlp = block.attn, block.mlp
        if attention is not None:
            attn.__class__, attn.kernel = ATTENTION.get(attention, SdpaAttention), attention
        for layer in (attn.qkv, mlp.fc1) if fused or fp8 or attention == "triton" else ():
            layer.__class__, layer.fp8 = FusedColumnLinear, fp8
            layer.bias_gradient = layer is not attn.qkv or attention != "triton"
        for layer in (attn.proj, mlp.fc2) if fp8 else ():
            layer.__class__ = Fp8RowLinear
        if fused and not fp8 and gelu_in_product(mlp):
            mlp.__class__ = GeluMlp
    for block in model.blocks if fused else ():
        block.__class__ = FusedLastBlock if isinstance(block, LastBlock) else FusedBlock
        # A buffer, not a float: blocks that differ in it share one compiled graph.
        keep = torch.tensor(1 - block.drop_path.rate, device=block.norm1.weight.device)
        by_image = model.config.drop_path_rate and model.config.drop_path_mode == "image"
        block.register_buffer("keep", keep if by_image else None, persistent=False)
    if fused:
        model.__class__ = FusedViT


def compile(model: ViT, **options) -> None:
    """torch.compile for the embedding and every block: blocks are alike, so one graph serves all.

    forward is compiled, not the module, so that ZeRO's wait for weights stays outside the graph.
    Inductor's mix_order_reduction fuses a norm's backward with its weight gradient, over runs of
    rows; runs of 64, its own choice for large batches, are slow: on an H100 (torch 2.11) L/16 at
    372 spent 94 ms a step in elementwise kernels with 64, 65 with 32; B/16 at 744 made 3,863
    images/s without the fusion and 3,955 with 32. options: more of Inductor's (peer.py).
    """
    import torch._inductor.config as inductor
    from torch._inductor.lowering import add_needs_realized_inputs
    # A graph for each number of images that blocks compute (--drop-path-mode batch), and eval's.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # So that the compiler writes x where it makes it, in the pass that also finds its largest
    # element: g/14 at 128 from 321 to 346 images/s.
    add_needs_realized_inputs(torch.ops.vit.cast_both.default)
    if hasattr(inductor.triton, "mix_order_reduction_split_size"):
        options |= {"triton.mix_order_reduction": True,
                    "triton.mix_order_reduction_split_size": 32}
    model.embed = torch.compile(model.embed, fullgraph=True, dynamic=False)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, options=options)


# ----------------------------------------------------------------------------- fused blocks
GOLDEN_RATIO = -0x61C88647  # of 2^32, odd: the seeds of a step differ in their high bits


def hashed(numel: int, seed):
    """int32 [numel], a hash of (seed, i): two multiply-xorshift rounds; seed: int32 []."""
    h = torch.arange(numel, device=seed.device, dtype=torch.int32) ^ seed
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D
    return (h ^ ((h >> 15) & 0x1FFFF)) * -0x7B935975  # products wrap around at 32 bits


def dropout(x, rate: float, seed):
    """x with elements zeroed at `rate` and the others scaled by 1 / (1 - rate); seed: int32 [].

    Element i goes if its hash is below the rate; the generator behind F.dropout takes ten rounds.
    The same on every device, compiled or not. With it and the compiled embedding L/16 went from
    1,099 to 1,125 images/s (H100, torch 2.11, micro-batch 248).
    """
    kept = hashed(x.numel(), seed).view(x.shape) >= int(rate * 2**32) - 2**31
    return torch.where(kept, x * (1 / (1 - rate)), 0.0)


class FusedBlock(Block):
    """The same two sums, the last one left to the next block: it takes and returns (x, y, seed), x
    the residual stream [b, S, D], y [b, S, D] what is still to be dropped out and added, so that
    every sum is fused with the norm behind it: L/16 1,125 to 1,149 images/s (as in `dropout`).
    seed: int32 [], of the four draws of a block; recomputation replays them."""

    tokens = None  # all go on

    def forward(self, stream):
        x, y, seed = stream
        if y.ndim == 1 and not self.tokens:
            return self.added(x, y, seed)
        seeds = [seed := seed + GOLDEN_RATIO for _ in range(4)]
        x = x + self.dropped(y, seeds[0])
        y = self.path(lambda x: self.ls1(self.attn(self.norm1(x))), x, seeds[1])
        x = x[:, :self.tokens] + self.dropped(y, seeds[2])
        y = self.path(lambda x: self.ls2(self.mlp(self.norm2(x))), x, seeds[3])
        return x, y, seed

    def added(self, x, y, seed):
        """In evaluation (FusedViT.adds): each product adds to x itself, y [D] is the biases still
        to be added. A norm then reads x alone and nothing but the products writes it: the forward
        pass of L/16 from 3,998 to 4,161 images/s (H100, torch 2.11, 512 images)."""
        attn, mlp = self.attn, self.mlp
        add_product(x, attn.attend(attn.qkv(self.norm1(x + y))), attn.proj.weight)
        y = y + attn.proj.bias
        add_product(x, mlp.act(mlp.fc1(self.norm2(x + y))), mlp.fc2.weight)
        return x, y + mlp.fc2.bias, seed

    def dropped(self, y, seed):
        return dropout(y, self.drop.rate, seed) if self.training and self.drop.rate else y

    def path(self, branch, x, seed):
        """branch(x) with drop path: whole images by the hash of (seed, image)."""
        b, by_batch = x.shape[0], self.drop_path.mode == "batch"
        count = kept_images(b, self.drop_path.rate) if by_batch else b
        if not self.training or (count == b if by_batch else self.keep is None):
            return branch(x)
        if by_batch:
            order = hashed(b, seed).argsort()
            kept, place = order[:count], order.argsort()
            return Take.apply(branch(Take.apply(x, kept, place)), place, kept) * (b / count)
        y = branch(x)
        kept = hashed(b, seed) * 2**-32 + 0.5 < self.keep
        return y * kept.view(-1, 1, 1) / self.keep.to(y.dtype)


@torch.library.custom_op("vit::add_product", mutates_args=("x",))
def add_product(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
    """x [b, S, D] += y [b, S, F] weight^T, in place."""
    x.view(-1, x.shape[-1]).addmm_(y.flatten(0, 1), weight.t())


add_product.register_fake(lambda x, y, weight: None)


class Take(torch.autograd.Function):
    """x [n, S, D] -> its images `index` [m], zeros where that is n or more: [m, S, D]. back [n]:
    which image of the result each of x is. Gathered both ways, not added by index, so that it fuses
    with what is before and behind it."""

    @staticmethod
    def forward(ctx, x, index, back):
        ctx.save_for_backward(back)
        return take(x, index)

    @staticmethod
    def backward(ctx, dy):
        return take(dy, *ctx.saved_tensors), None, None


def take(x, index):
    there = (index < len(x)).view(-1, 1, 1)
    return torch.where(there, x[index.clamp(max=len(x) - 1)], 0.0)


class FusedLastBlock(FusedBlock, LastBlock):
    """Its result is [b, 1, D], as LastBlock's."""
    tokens = 1


class FusedViT(ViT):
    """A ViT of FusedBlocks. The stream begins at zero, unless it `adds`, and the first block adds
    the embedding; it asks for a gradient only so that all blocks have one graph."""

    def forward(self, images):
        y = self.embed(images)                                                 # [B, S, D]
        x, y = ((y, y.new_zeros(y.shape[-1])) if self.adds() else
                (torch.zeros_like(y).requires_grad_(y.requires_grad), y))
        seed = torch.randint(-2**31, 2**31, (), dtype=torch.int32, device=y.device)
        x, y, seed = self.blocks((x, y, seed))
        if self.training and self.drop.rate:
            y = dropout(y, self.drop.rate, seed + GOLDEN_RATIO)
        return self.output(x + y)                                              # [B, num_classes]

    def adds(self):
        """Whether blocks add to x in place: nothing is kept for a backward pass, products have x's
        type, and what they add is whole and not scaled."""
        autocast = torch.is_autocast_enabled(self.head.weight.device.type)
        return not (self.training or torch.is_grad_enabled() or autocast
                    or self.grid.tp.size > 1 or self.config.layerscale)
