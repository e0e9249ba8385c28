"""Matrix products that do more than multiply: GELU's derivative, a bias gradient, fp8.

    GeluLinear         gelu(h) W^T + b; in backward one kernel multiplies and takes the derivative
    FusedColumnLinear  a bias gradient that fuses with the pass before it, or a product in fp8
    Fp8RowLinear       a product in fp8

`kernels.apply` puts them in. Shapes: B images, S tokens, M = B S rows, D features, F of the MLP.
"""

import os

import torch
import torch.nn.functional as F

from model import KEPT, Mlp
from parallel import ColumnParallelLinear, RowParallelLinear

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # the CPU builds of torch come without it
    triton = None
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # runs the kernels on the CPU, for tests

# ----------------------------------------------------------------------------- GELU's derivative
IN_ONE = (torch.bfloat16,)  # types whose product and derivative one kernel makes


class GeluMlp(Mlp):
    """An Mlp whose backward multiplies GELU's gradient by the derivative where fc2's product makes
    it, so that these [B, S, F] are neither written nor read again: on an H100 (torch 2.11) B/16 at
    768 went from 4,304 to 4,430 images/s, L/16 at 384 from 1,333 to 1,344, g/14 from 283 to 286."""

    def forward(self, x):                                                      # [B, S, D]
        fc1, fc2 = self.fc1, self.fc2
        if fc2.weight.dtype not in IN_ONE:
            return super().forward(x)
        h = F.linear(x, fc1.weight, fc1.bias.detach())
        return GeluLinear.apply(h, fc1.bias, fc2.weight, fc2.bias)


def gelu_in_product(mlp: Mlp) -> bool:
    """Whether GeluMlp is for it: an exact GELU, one rank, and a GPU that it was measured on."""
    weight = mlp.fc2.weight
    return (triton is not None and weight.is_cuda and mlp.fc2.tp.size == 1
            and torch.cuda.get_device_capability(weight.device) == (9, 0)
            and not torch.version.hip  # AMD's MI250 is a (9, 0) too
            and mlp.approximate == "none" and not any(size % 8 for size in weight.shape))


class GeluLinear(torch.autograd.Function):
    """gelu(h) W^T + b, and the gradient of a bias that h already contains (as in BiasGradient).

        h [B, S, F], bias [F], W [D, F], b [D]  ->  y [B, S, D]

        backward   dh = (dy W) gelu'(h)      dbias = sum of dh over images, tokens, in fp32
                   dW = dy^T gelu(h)         db = sum of dy
    """

    @staticmethod
    def forward(ctx, h, bias, weight, b):
        a = F.gelu(h)
        ctx.save_for_backward(h, a, weight)
        return F.linear(a, weight, b)

    @staticmethod
    def backward(ctx, dy):
        h, a, weight = ctx.saved_tensors
        dh, dbias = gelu_backward(dy, weight, h)
        dw = dy.flatten(0, 1).t() @ a.flatten(0, 1)
        return dh, dbias.sum(0).to(dy.dtype), dw, dy.sum((0, 1))


if triton is not None:
    @triton.jit
    def _gelu_backward(dy, w, h, dh, dbias, D: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr,
                       COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
        """One tile of dh = (dy w) gelu'(h), dy [M, D], w [D, F], h [M, F], and its sums over rows.

            gelu'(h) = P + h p      p = exp(-h^2 / 2) / sqrt(2 pi)      P(-h) = 1 - P(h)
            P = 1 - p (b1 t + b2 t^2 + b3 t^3 + b4 t^4 + b5 t^5)        t = 1 / (1 + 0.2316419 h)

        for h >= 0, within 7.5e-8 (Abramowitz and Stegun, 26.2.17): one exponential serves both.
        """
        across = tl.cdiv(F, COLUMNS)
        run = tl.program_id(0) // across
        m, f = run * ROWS, tl.program_id(0) % across * COLUMNS
        product = tl.zeros([ROWS, COLUMNS], tl.float32)
        for d in range(0, D, DEPTH):
            product = tl.dot(dy.load([m, d]), w.load([d, f]), product)
        h_ = h.load([m, f]).to(tl.float32)
        p = 0.3989422804 * tl.exp2(h_ * h_ * -0.7213475204)
        t = _reciprocal(1 + 0.2316419 * tl.abs(h_))
        tail = p * t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (
            -1.821255978 + t * 1.330274429))))
        product *= tl.where(h_ < 0, tail, 1 - tail) + h_ * p
        dh.store([m, f], product.to(dh.dtype))
        f += tl.arange(0, COLUMNS)
        tl.store(dbias + run * F + f, tl.sum(product, 0), mask=f < F)

    @triton.jit
    def _reciprocal(x):
        if INTERPRETED:
            return 1 / x
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x],
                                         dtype=tl.float32, is_pure=True, pack=1)

    INTERPRETED = tl.constexpr(INTERPRET)


@torch.library.custom_op("vit::gelu_backward", mutates_args=())
def gelu_backward(dy: torch.Tensor, weight: torch.Tensor, h: torch.Tensor
                  ) -> tuple[torch.Tensor, torch.Tensor]:
    """dy [B, S, D], weight [D, F], h [B, S, F] -> dh [B, S, F] and its sums over runs of rows,
    fp32 [runs, F]."""
    if not (h.is_cuda or INTERPRET):
        dh = torch.ops.aten.gelu_backward(dy @ weight, h)
        return dh, dh.sum((0, 1), dtype=torch.float32)[None]
    depth, width = weight.shape
    runs = triton.cdiv(h.numel() // width, ROWS)
    dh, dbias = h.new_empty(h.shape), h.new_empty(runs, width, dtype=torch.float32)
    tile = [ROWS, COLUMNS]
    tiles = [TensorDescriptor.from_tensor(x.contiguous().flatten(0, -2), size) for x, size in (
        (dy, [ROWS, DEPTH]), (weight, [DEPTH, COLUMNS]), (h, tile), (dh, tile))]
    # 128 registers: two programs a multiprocessor, one multiplies while the other ends
    _gelu_backward[(runs * triton.cdiv(width, COLUMNS),)](
        *tiles, dbias, D=depth, F=width, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH,
        num_warps=8, num_stages=3, maxnreg=128)
    return dh, dbias


ROWS, COLUMNS, DEPTH = 128, 128, 64  # of a program's tile, and of a step of its product


@gelu_backward.register_fake
def _(dy, weight, h):
    runs = -(-h.shape[0] * h.shape[1] // ROWS) if h.is_cuda or INTERPRET else 1
    return h.new_empty(h.shape), h.new_empty(runs, h.shape[2], dtype=torch.float32)


# ----------------------------------------------------------------------------- bias gradients
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


# ----------------------------------------------------------------------------- products in fp8
KEPT.add(torch.ops.aten._scaled_mm.default)  # selective recomputation keeps fp8's products too
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
