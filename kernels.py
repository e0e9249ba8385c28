"""What one GPU does faster: a pass over a finished model, which swaps the classes of its parts.

    apply(model, ...)   attention's kernel, products in fp8, sums and dropout that fuse
    compile(model)      torch.compile for the embedding and each block

The model computes the same function with the same parameters; nothing in model.py or parallel.py
knows of this file, and without it a run is as correct and slower. Each part says why it is here and
what it gained; test_speed.py compares each with the plain computation.
"""

import os

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from configs import ViTConfig, kept_images
from model import KEPT, Attention, Block, LastBlock, ViT
from parallel import ColumnParallelLinear, RowParallelLinear

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU builds of torch come without it
    triton = None
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # runs the kernels on the CPU, for tests


def apply(model: ViT, *, attention: str | None = None, fp8: bool = False,
          fused: bool = False) -> None:
    """Swaps the classes of a model's parts, in place; before recompute and compile.

    attention: a key of BACKENDS, triton or flash-attn (choose_attention), or None: torch's choice.
    fp8: the blocks' products in training are Fp8Linear's; weights in bf16. fused: FusedBlock.
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


KEPT.add(torch.ops.aten._scaled_mm.default)  # selective recomputation keeps fp8's products too


class FusedColumnLinear(ColumnParallelLinear):
    """Its product in fp8, or with the bias's gradient apart, or (bias_gradient False) left to the
    operation that takes y."""

    def product(self, x):
        bias = self.bias.detach()
        if self.fp8 and self.training:
            return Fp8Linear.apply(x, self.weight, self.bias if self.bias_gradient else bias)
        y = F.linear(x, self.weight, bias)
        return BiasGradient.apply(y, self.bias) if self.bias_gradient else y


class BiasGradient(torch.autograd.Function):
    """The gradient of a bias that y [b, S, F] already contains: y as a function of that bias.

        forward    y     = y
        backward   dbias = sum over images of (sum over tokens of dy), in fp32

    F.linear's own bias gradient reads the finished dy once more. Summed per image first, the
    compiler makes the sum part of the pass that writes dy (GELU's backward): 0.51 ms a block, not
    0.64, for L/16 at 248 images on an H100.
    """

    @staticmethod
    def forward(ctx, y, bias):
        ctx.dtype = bias.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        return dy, dy.sum(1, dtype=torch.float32).sum(0).to(ctx.dtype)


# ----------------------------------------------------------------------------- attention
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

    The bias is an argument for its gradient's sake, as in BiasGradient. L/16 at 248 images on an
    H100 (torch 2.11): 0.68 ms a block, cuDNN's passes and the joining 1.09. A first version of 0.83
    ms took the step from 1,156 to 1,207 images/s.
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


class SdpaAttention(Attention):
    """Attention by one of torch's own kernels, self.kernel of BACKENDS."""

    def attend(self, qkv):
        with sdpa_kernel(BACKENDS[self.kernel]):
            return super().attend(qkv)


class FlashAttention(Attention):
    """The package flash-attn (--attention flash-attn): [n, S, nh, hd] in and out."""

    def attend(self, qkv):
        from flash_attn import flash_attn_func
        q, k, v = qkv.unflatten(-1, (3, -1, self.head_dim)).unbind(2)          # [n, S, nh/t, hd]
        rate = self.dropout if self.training else 0.0
        return flash_attn_func(q, k, v, dropout_p=rate).flatten(2)             # [n, S, D/t]


class TritonAttention(Attention):
    def attend(self, qkv):
        return ShortAttention.apply(qkv, self.qkv.bias, self.head_dim)         # [n, S, D/t]


ATTENTION = {"triton": TritonAttention, "flash-attn": FlashAttention}
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
                from flash_attn import flash_attn_func
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
        except ImportError as e:
            return f"the package is not installed or does not import ({e})"
        except Exception as e:  # each kernel fails in its own way
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


# ----------------------------------------------------------------------------- products in fp8
# Hopper's fp8 products want the summed dimension contiguous in both operands. Forward, dgrad and
# wgrad sum over different dimensions, so every tensor is cast twice, as it is and transposed.
if triton is not None:
    @triton.jit
    def _cast_both(x, top, y, y_t, unscale, M, K, LARGEST: tl.constexpr, TILE: tl.constexpr):
        """One tile of x [M, K], times LARGEST / top, to y [M, K] and to y_t [K, M]."""
        across = tl.cdiv(K, TILE)
        m = (tl.program_id(0) // across * TILE + tl.arange(0, TILE)).to(tl.int64)
        k = (tl.program_id(0) % across * TILE + tl.arange(0, TILE)).to(tl.int64)
        here = (m[:, None] < M) & (k[None, :] < K)
        largest = tl.load(top)
        scale = LARGEST / tl.where(largest < 1e-12, 1e-12, largest)  # NaN stays NaN
        z = tl.load(x + m[:, None] * K + k[None, :], mask=here, other=0.0).to(tl.float32) * scale
        z = tl.clamp(z, -LARGEST, LARGEST).to(y.dtype.element_ty)
        tl.store(y + m[:, None] * K + k[None, :], z, mask=here)
        tl.store(y_t + k[:, None] * M + m[None, :], tl.trans(z), mask=tl.trans(here))
        if tl.program_id(0) == 0:
            tl.store(unscale, 1 / scale)


@torch.library.custom_op("vit::cast_both", mutates_args=())
def cast_both(x: torch.Tensor, top: torch.Tensor, dtype: torch.dtype
              ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [..., K] and its largest magnitude, fp32 [] -> x in fp8 [M, K], its transpose [K, M], and
    the fp32 [] that they must be multiplied by. 0.15 ms for 16,896 x 6,144 on an H100, a copy's
    speed; g/14 at 64 made 283 images/s when the compiler wrote both copies, 301 with this."""
    K, largest = x.shape[-1], torch.finfo(dtype).max
    M = x.numel() // K
    if triton is None or not (x.is_cuda or INTERPRET):
        scale = largest / top.clamp(min=1e-12)
        y = (x.reshape(M, K).float() * scale).clamp(-largest, largest).to(dtype)
        return y, y.t().contiguous(), 1 / scale
    y, y_t = x.new_empty(M, K, dtype=dtype), x.new_empty(K, M, dtype=dtype)
    unscale = torch.empty_like(top)
    _cast_both[(triton.cdiv(M, 128) * triton.cdiv(K, 128),)](
        x.contiguous(), top, y, y_t, unscale, M, K, LARGEST=largest, TILE=128, num_warps=8)
    return y, y_t, unscale


@cast_both.register_fake
def _(x, top, dtype):
    K = x.shape[-1]
    M = x.numel() // K
    return (x.new_empty(M, K, dtype=dtype), x.new_empty(K, M, dtype=dtype), torch.empty_like(top))


class Fp8Linear(torch.autograd.Function):
    """y = x W^T + b in bf16, its three products in fp8, every tensor scaled to the format's range.

        x [B, S, K], W [F, K], b [F] or None  ->  y [B, S, F]

        forward    y  = x8 W8^T + b     x8, W8 in e4m3 (3 bits of mantissa, up to 448)
        dgrad      dx = dy8 W8          dy8 in e5m2 (2 bits, up to 57,344), as arXiv:2209.05433
        wgrad      dW = dy8^T x8        advises for gradients
        dbias      db = sum of dy over images, tokens, in fp32

    x8 = x * 448 / max|x| with the maximum of this very tensor ("dynamic" scaling: nothing to store
    between steps). Between forward and backward x is kept in fp8 only. K, F and B*S must be
    multiples of 16. H100, torch 2.11, images/s: g/14 346 at 128 (bf16 273 at 112), G/14 199 at 64.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        (x8, x8_t, sx), (w8, w8_t, sw) = to_fp8(x, 2), to_fp8(weight, 1)
        ctx.save_for_backward(x8_t, sx, w8_t, sw)
        return fp8_product(x8, w8, sx, sw, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        x8_t, sx, w8_t, sw = ctx.saved_tensors
        dbias = None
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(1, dtype=torch.float32).sum(0).to(dy.dtype)
        dy8, dy8_t, sdy = to_fp8(dy, 1, torch.float8_e5m2)
        dx = fp8_product(dy8, w8_t, sdy, sw).view(*dy.shape[:-1], -1)
        return dx, fp8_product(dy8_t, x8_t, sdy, sx), dbias


def to_fp8(x, dim: int, dtype=torch.float8_e4m3fn):
    """cast_both with the largest magnitude of x; found along `dim` first, so that the compiler can
    make it part of the pass before: a norm's (dim 2), or a bias gradient's (dim 1)."""
    return cast_both(x, x.abs().amax(dim).amax().float(), dtype)


def fp8_product(a, b, scale_a, scale_b, bias=None):
    """a [M, K] b^T [K, N] -> [M, N] in bf16. Hopper's fast sums keep fewer bits than fp32: with
    exact ones in backward g/14 at 64 made 268 images/s instead of 301 (H100)."""
    return torch._scaled_mm(a, b.t(), scale_a, scale_b, bias, out_dtype=torch.bfloat16,
                            use_fast_accum=True)


class Fp8RowLinear(RowParallelLinear):
    """Its product in fp8, in training."""

    def product(self, x, bias=None):
        linear = Fp8Linear.apply if self.training else F.linear
        return linear(x, self.weight, bias)
