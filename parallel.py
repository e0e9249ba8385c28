"""How it is split: the process grid, column/row-parallel layers (with their products in fp8 too),
ZeRO-1, layout-free checkpoints; between the GPUs of one host by device copies.

One idea carries it: every rank owns its own images. The residual stream of a rank holds that rank's
images only, inside a tensor-parallel group too, so norms, dropout, residuals, patch embedding, head
and loss are never computed twice and need no shared random stream. Half a transformer block is

    x[b,S,D] -> norm -> f -> [t*b,S,D] -> column-parallel -> [t*b,S,F/t]
             -> row-parallel partial sums -> g -> [b,S,D] + bias -> dropout -> + x

    f  all-gather of the images over tp       (backward: reduce-scatter)
    g  reduce-scatter of the images over tp   (backward: all-gather)

(or the same in shifts from rank to rank beside the products, see `visit`)
which moves the same bytes as Megatron's two all-reduces per half (arXiv:1909.08053), as its
sequence parallelism does (arXiv:2205.05198), with the images as the dimension that is split.

Because every rank sees different images, the gradient of a replicated weight is a sum over all
ranks, and that of a tensor-parallel shard, which has seen the images of its whole tp group, is a
sum over the dp ranks only. The loss is a sum over images divided by the global batch, so every
reduction here is a plain sum.

Letters: b images of this rank's micro-batch, S tokens, D hidden size, F the wide dimension,
t = tp size, N = size of the group that shares a bucket; `_local` and `/t` mark shards.
"""

import json
import os
import shutil
import socket
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch._inductor.lowering
import torch.distributed as dist
import torch.distributed._functional_collectives  # noqa: F401 registers the operators below
import torch.distributed._symmetric_memory as symm_mem
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU builds of torch come without it
    triton = None
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # runs the kernels on the CPU, for tests


# ----------------------------------------------------------------------------- the process grid
@dataclass(frozen=True)
class Axis:
    """One direction of the process grid, seen from this rank. group is None for a single rank.
    overlap: of the tp axis, f and g run beside the products (see `visit`)."""
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    overlap: bool = False


@dataclass(frozen=True)
class Grid:
    """Where this rank stands: arange(world).view(dp, tp). The default is a single process."""
    tp: Axis = Axis()
    dp: Axis = Axis()
    world: Axis = Axis()


def make_grid(tp: int, device_type: str) -> Grid:
    """The grid of an initialised process group; ranks of one tp group are neighbours (NVLink)."""
    world = dist.get_world_size()
    mesh = init_device_mesh(device_type, (world // tp, tp), mesh_dim_names=("dp", "tp"))

    def axis(name):
        return Axis(mesh.get_local_rank(name), mesh[name].size(), mesh.get_group(name))
    return Grid(axis("tp"), axis("dp"), Axis(dist.get_rank(), world, dist.group.WORLD))


# ----------------------------------------------------------------------------- the operators f, g
# Functional collectives, which torch.compile has in its graph as they are. With the in-place ones
# (dist.all_gather_into_tensor) the compiler of torch 2.11 loses the gradient of f and g silently;
# test_compiled_gradients_equal_eager_ones finds that.
FUNCTIONAL = torch.ops._c10d_functional


def all_gather(x_local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[n, ...] of each rank -> [size*n, ...], in the order of the ranks."""
    y = FUNCTIONAL.all_gather_into_tensor(x_local.contiguous(), group.size(), group.group_name)
    return FUNCTIONAL.wait_tensor(y)


def reduce_scatter(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[size*n, ...] of each rank -> [n, ...], this rank's part of the sum over ranks."""
    y = FUNCTIONAL.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name)
    return FUNCTIONAL.wait_tensor(y)


class GatherImages(torch.autograd.Function):
    """f: the images of the whole tp group, before a column-parallel product.

        x_local  [b, S, D]     this rank's images
        y        [t*b, S, D]   the group's images, the same on each of its ranks

        forward    y        = concat over ranks of x_local          all-gather
        backward   dx_local = my b rows of (sum over ranks of dy)   reduce-scatter

    Why the sum: each rank multiplies y by its own columns only, so its dy holds only those columns'
    share of the gradient; the gradient of an image is the sum of the shares.
    """

    @staticmethod
    def forward(ctx, x_local, group):
        ctx.group = group
        return all_gather(x_local, group)

    @staticmethod
    def backward(ctx, dy):
        return reduce_scatter(dy, ctx.group), None


class ScatterSum(torch.autograd.Function):
    """g: the sum of a row-parallel product's partial results, each rank keeping its own images.

        x        [t*b, S, D]   this rank's partial sums for the group's images
        y_local  [b, S, D]     the full sums for this rank's images

        forward    y_local = my b rows of (sum over ranks of x)   reduce-scatter
        backward   dx      = concat over ranks of dy_local        all-gather

    Why the concat: x enters each image's sum with weight one, so its gradient is dy of that image,
    wherever the image lives.
    """

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx, dy_local):
        return all_gather(dy_local, ctx.group), None


# ----------------------------------------------------------------------------- GPUs of one host
def peers_in_reach(axis: Axis, device: torch.device) -> bool:
    """Whether the axis's ranks are GPUs of one host that can read each other's memory.
    Collective."""
    if axis.size == 1 or device.type != "cuda":
        return False
    host = (socket.gethostname(), os.environ.get("GROUP_RANK"))  # torchrun's number of the host
    places = [None] * axis.size
    dist.all_gather_object(places, (host, device.index), group=axis.group)
    del places[axis.rank]
    mine = all(other == host and index < torch.cuda.device_count()
               and torch.cuda.can_device_access_peer(device, index) for other, index in places)
    answers = [None] * axis.size
    dist.all_gather_object(answers, mine, group=axis.group)
    return all(answers)


def share_memory(numel: int, dtype: torch.dtype, axis: Axis, device: torch.device, instead: str):
    """(memory, its handle): symmetric memory, which every rank of the axis can read and write.
    Raises ValueError, which says what to give `instead`, where that cannot be. Collective."""
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # not used here
    with warnings.catch_warnings():  # newer versions of torch need no call, and say so
        warnings.simplefilter("ignore", FutureWarning)
        symm_mem.enable_symm_mem_for_group(axis.group.group_name)
    torch.cuda.empty_cache()  # this memory does not come from torch's cache
    memory = symm_mem.empty(numel, dtype=dtype, device=device)
    try:
        return memory, symm_mem.rendezvous(memory, axis.group.group_name)
    except RuntimeError as e:
        reason = (str(e).strip() or repr(e)).splitlines()[0]
        raise ValueError(f"these GPUs do not share memory ({reason}); give {instead}") from e


# ----------------------------------------------------------------------------- f, g beside products
def overlapped(tp: Axis, device: torch.device, wanted: bool | None) -> Axis:
    """--tp-comm-overlap (NeMo's tp_comm_overlap): the tp axis, with f and g beside the products if
    that is wanted, or, with None, where its ranks are GPUs that reach each other.

    Raises ValueError if it is wanted and they do not reach each other, or where they do and cannot
    share memory. Collective.
    """
    if tp.size == 1 or wanted is False:
        return tp
    if peers_in_reach(tp, device):
        PeerExchange.of[tp.group.group_name] = PeerExchange(tp, device)
        return replace(tp, overlap=True)
    if wanted:
        raise ValueError("--tp-comm-overlap needs tensor-parallel groups within a host, of GPUs "
                         "that read each other's memory (NVLink); leave it out here")
    return tp


def visit(x_local, column, between, row):
    """row(between(column(x_local))), half a block, with f and g beside its products.

        x_local [b, S, D]  ->  [b, S, D]

    The images of every rank visit each other rank, go through its columns, `between` and its rows,
    and return as its share of the sum. A rank's own images are multiplied by its columns while the
    first visitors are on their way, and by its rows while the last ones return. Backward is the
    same the other way round, by autograd; selective recomputation lets the visitors come again,
    with little beside them. (Wang et al., ASPLOS 2023, decompose one collective and its product
    like this; here it is a whole half block, so that attention and GELU hide copies too.)

    g/14 on 2 H200, tp 2, micro-batch 128 (torch 2.11): 508 images/s; with the collectives between
    the products 441; two GPUs on their own 550. In fp8 twice as many small kernels kept the host
    busy: 351 instead of 485.
    """
    tp = column.tp
    coming = [BeginShift.apply(x_local, i, tp) for i in range(1, tp.size)]
    mine = column.product(x_local)
    returning = []
    for i, visitor in enumerate(coming, 1):
        share = row.product(between(column.product(EndShift.apply(visitor, i, tp))))
        returning.append(BeginShift.apply(share, -i, tp))
    y_local = row.product(between(mine))
    for i, share in enumerate(returning, 1):
        y_local = y_local + EndShift.apply(share, -i, tp)
    return y_local + row.bias


class BeginShift(torch.autograd.Function):
    """Begins to send x to rank mine + i; returns what comes from rank mine - i, not yet there."""

    @staticmethod
    def forward(ctx, x, i, tp):
        return torch.ops.vit.shift(x, i, tp.group.group_name)

    @staticmethod
    def backward(ctx, dx):
        return FUNCTIONAL.wait_tensor(dx), None, None


class EndShift(torch.autograd.Function):
    """Waits for what BeginShift returned; its gradient begins to go back."""

    @staticmethod
    def forward(ctx, x, i, tp):
        ctx.i, ctx.tp = i, tp
        return FUNCTIONAL.wait_tensor(x)

    @staticmethod
    def backward(ctx, dx):
        return torch.ops.vit.shift(dx, -ctx.i, ctx.tp.group.group_name), None, None


class PeerExchange:
    """Shifts between the GPUs of a tp group by copy engines: as with PeerMemory, the processors are
    left to the matrix products that run beside.

    What is sent is pushed into one of two slots of the receiver's symmetric memory, and copied from
    there to the result once all ranks have met. A slot is written again two shifts later: the
    meeting before that comes after the receiver's copy. What is sent and the result are kept until
    tp.size shifts later, when this stream waits for their copies in case that no one has.
    """
    of = {}  # by the name of the group, for the operator below

    def __init__(self, tp: Axis, device: torch.device):
        self.tp, self.device, self.count = tp, device, 0
        self.stream, self.ready = torch.cuda.Stream(), torch.cuda.Event()
        self.kept = deque()
        self.reserve(1)

    def reserve(self, nbytes: int) -> None:
        """Two slots of at least nbytes on each rank."""
        torch.cuda.synchronize()
        self.nbytes, self.slots = -(-nbytes // 512) * 512, {}
        self.memory, self.handle = share_memory(
            2 * self.nbytes, torch.uint8, self.tp, self.device, "--no-tp-comm-overlap")

    def shift(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """Begins to send x to rank mine + i; the result, like x, is what comes from rank mine - i,
        to be waited for."""
        x, size = x.contiguous(), x.numel() * x.element_size()
        result = torch.empty_like(x)
        if size > self.nbytes:  # on all ranks at once: their calls are alike
            self.reserve(size)
        self.count += 1
        key = self.count % 2, x.shape, x.dtype
        if key not in self.slots:
            begin = self.count % 2 * self.nbytes // x.element_size()
            self.slots[key] = [self.handle.get_buffer(rank, x.shape, x.dtype, begin)
                               for rank in range(self.tp.size)]
        slots = self.slots[key]
        while len(self.kept) >= self.tp.size:
            self.kept.popleft()[-1].wait()
        self.ready.record()
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.ready)
            slots[(self.tp.rank + i) % self.tp.size].copy_(x)
            self.handle.barrier()
            result.copy_(slots[self.tp.rank])
            work = symm_mem.Work()
            torch._C._distributed_c10d._register_work(result, work)
        self.kept.append((x, result, work))
        return result


# An operator, for the compiler; torch.library.custom_op's take 15 us more a call.
LIBRARY = torch.library.Library("vit", "FRAGMENT")
LIBRARY.define("shift(Tensor x, int i, str group) -> Tensor")
LIBRARY.impl("shift", lambda x, i, group: PeerExchange.of[group].shift(x, i),
             "CompositeExplicitAutograd")


@torch.library.register_fake("vit::shift", lib=LIBRARY)
def _(x, i, group):
    return x.new_empty(x.shape)


# ----------------------------------------------------------------------------- parallel layers
@dataclass(frozen=True)
class Split:
    """How a full parameter is cut over tp: along `dim`, inside each of `parts` equal parts.

    A fused qkv weight [3D, D] is Split(0, parts=3): rank r owns its heads of q, of k and of v.
    Initialisation, saving and loading all use this one description.
    """
    dim: int
    parts: int = 1

    def shard(self, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """full [.., parts*n, ..] -> this rank's [.., parts*n/t, ..]"""
        parts = full.unflatten(self.dim, (self.parts, -1))
        return parts.chunk(size, self.dim + 1)[rank].flatten(self.dim, self.dim + 1)

    def unshard(self, locals_: Iterable[torch.Tensor]) -> torch.Tensor:
        """The shards of every tp rank, in order -> the full tensor."""
        parts = [x.unflatten(self.dim, (self.parts, -1)) for x in locals_]
        return torch.cat(parts, self.dim + 1).flatten(self.dim, self.dim + 1)


def shard(full: torch.Tensor, param: nn.Parameter, tp: Axis) -> torch.Tensor:
    """This rank's part of a full tensor that belongs to `param`; all of it if it is replicated."""
    split = getattr(param, "tp_split", None)
    return full if split is None else split.shard(full, tp.rank, tp.size)


def full_shape(param: nn.Parameter, tp: Axis) -> list[int]:
    """The shape that `param` has without tensor parallelism."""
    shape, split = list(param.shape), getattr(param, "tp_split", None)
    if split is not None:
        shape[split.dim] *= tp.size
    return shape


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


# So that the compiler writes x where it makes it, in the pass that also finds its largest element:
# g/14 at 128 from 321 to 346 images/s.
torch._inductor.lowering.add_needs_realized_inputs(torch.ops.vit.cast_both.default)


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


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the output features split over tp; F.linear when tp is 1.

        x_local [b, S, D], W_local [F/t, D], b_local [F/t]  ->  y [t*b, S, F/t]

        forward    y  = f(x_local) W_local^T + b_local      f gathers the group's images
        dgrad      dx = f'(dy W_local)                      f' sums over tp, keeps my images
        wgrad      dW_local = dy^T f(x_local)               complete for my columns
        dbias      db_local = sum of dy over images, tokens

    parts: 3 for a fused qkv, so that each of q, k, v is split by heads. bias_gradient=False leaves
    the bias's gradient to the operation that takes y. fp8: see Fp8Linear; for training only.
    """

    def __init__(self, in_features: int, out_features: int, tp: Axis, parts: int = 1,
                 bias_gradient: bool = True, fp8: bool = False):
        super().__init__()
        self.tp, self.bias_gradient, self.fp8 = tp, bias_gradient, fp8
        self.weight = nn.Parameter(torch.empty(out_features // tp.size, in_features))
        self.bias = nn.Parameter(torch.empty(out_features // tp.size))
        self.weight.tp_split = self.bias.tp_split = Split(0, parts)

    def forward(self, x):
        if self.tp.size > 1:
            x = GatherImages.apply(x, self.tp.group)  # [b,S,D] -> [t*b,S,D]
        return self.product(x)

    def product(self, x):
        bias = self.bias.detach()
        if self.fp8 and self.training:
            return Fp8Linear.apply(x, self.weight, self.bias if self.bias_gradient else bias)
        y = F.linear(x, self.weight, bias)
        return BiasGradient.apply(y, self.bias) if self.bias_gradient else y


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the input features split over tp; F.linear when tp is 1.

        x [t*b, S, F/t], W_local [D, F/t], b [D]  ->  y_local [b, S, D]

        forward    y_local = g(x W_local^T) + b      g sums over tp, keeps my images
        dgrad      dx = g'(dy_local) W_local         g' gathers the group's images
        wgrad      dW_local = g'(dy_local)^T x       complete for my rows
        dbias      db = sum of dy_local over images, tokens
    """

    def __init__(self, in_features: int, out_features: int, tp: Axis, fp8: bool = False):
        super().__init__()
        self.tp, self.fp8 = tp, fp8
        self.weight = nn.Parameter(torch.empty(out_features, in_features // tp.size))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.weight.tp_split = Split(1)

    def forward(self, x):
        if self.tp.size == 1:
            return self.product(x, self.bias)
        y = ScatterSum.apply(self.product(x), self.tp.group)
        return y + self.bias  # after the sum: before it, the bias would be added t times

    def product(self, x, bias=None):
        linear = Fp8Linear.apply if self.fp8 and self.training else F.linear
        return linear(x, self.weight, bias)


# ----------------------------------------------------------------------------- ZeRO-1
ALIGN = 64  # elements; each weight starts on a 128-byte (bf16) boundary, as matrix kernels want


def uses_weight_decay(name: str, param: nn.Parameter) -> bool:
    """Weight matrices only: no bias, norm, class token or position embedding."""
    return param.ndim >= 2 and name not in ("cls_token", "pos_embed")


class PeerMemory:
    """One fp32 buffer on each GPU of a host, which the others read: gradients are exchanged by copy
    engines, and added by a small kernel, instead of NCCL.

    NCCL's reduce-scatter occupies some SMs, and cuBLAS's matrix products want all of them at once:
    the product beside it needs a second round. For g/14 at 64 on 2 H200 (torch 2.11) that is a
    weight gradient in every block, 677 us instead of 374; with copies 395. Images/s of the two, one
    micro-batch a step: g/14 527 (another run) and 543, L/16 at 256 2,471 and 2,496.
    """

    def __init__(self, numel: int, largest: int, axis: Axis, device: torch.device):
        """numel: of all buckets that reduce over `axis`; largest: of one rank's slice of one."""
        self.axis, self.taken, self.stream = axis, 0, torch.cuda.Stream()
        self.memory, self.handle = share_memory(numel, torch.float32, axis, device,
                                                "--no-peer-copies, and NCCL sums the gradients")
        self.memory.zero_()
        self.received = torch.empty(largest, device=device)

    def take(self, numel: int) -> torch.Tensor:
        """The next numel elements: the same place on every rank."""
        self.taken += numel
        return self.memory[self.taken - numel:self.taken]

    def reduce_scatter(self, mine: torch.Tensor) -> torch.cuda.Event:
        """Adds the peers' elements at this place to `mine`, this rank's slice of a bucket, of which
        peers read the other slices only. Asynchronous: returns the event of its end.

        The ranks wait for each other at its beginning, not at its end: ShardedOptimizer.step's sum
        of the norm over all ranks comes before anyone's next gradients.
        """
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.handle.barrier()
            received = self.received[:mine.numel()]
            for i in range(1, self.axis.size):
                peer = (self.axis.rank + i) % self.axis.size  # not all from the same one at once
                received.copy_(self.handle.get_buffer(peer, mine.shape, mine.dtype,
                                                      mine.storage_offset()))
                mine.add_(received)
            return self.stream.record_event()


class Bucket:
    """The weights of one unit (a block) that reduce over the same ranks, laid end to end.

        weight  [n]    flat weights, in the model's dtype; every Parameter is a view of it
        grad    [n]    fp32 gradients, summed over micro-batches (Megatron's main_grad)
        master  [n/N]  fp32 weights of this rank's slice; in fp32 a view of `weight` itself
        state   [n/N]  each: the optimizer's moments of this rank's slice

    Weights with decay come first, so this rank's slice is at most two runs of one kind each.
    """

    def __init__(self, params: dict[str, nn.Parameter], axis: Axis):
        order = sorted(params, key=lambda name: not uses_weight_decay(name, params[name]))
        self.params, self.axis, self.offsets, end = {n: params[n] for n in order}, axis, {}, 0
        self.decay_end = 0
        for name, param in self.params.items():
            self.offsets[name] = end
            end += -(-param.numel() // ALIGN) * ALIGN
            if uses_weight_decay(name, param):
                self.decay_end = end
        chunk = ALIGN * axis.size
        self.numel = -(-end // chunk) * chunk
        self.begin = self.numel // axis.size * axis.rank        # this rank's slice of the bucket
        self.end = self.begin + self.numel // axis.size
        self.work = None                                        # the collective under way
        self.missing = len(self.params)                         # gradients still to come

    def materialize(self, weight_dtype: torch.dtype, state_names: tuple[str, ...],
                    peers: PeerMemory | None = None) -> None:
        """Allocates the buffers, moves the weights into them and makes them views."""
        device = next(iter(self.params.values())).device
        full = torch.zeros(self.numel, device=device)
        for name, param in self.params.items():
            self.view(full, name).copy_(param.data)
        self.weight = full.to(weight_dtype)  # the same tensor in fp32
        self.peers = peers
        self.grad = peers.take(self.numel) if peers else torch.zeros(self.numel, device=device)
        mine = slice(self.begin, self.end)
        self.master = full[mine] if weight_dtype == torch.float32 else full[mine].clone()
        self.grad_mine = self.grad[mine]
        self.grad_views = [self.view(self.grad, name) for name in self.params]
        self.state = {name: torch.zeros_like(self.master) for name in state_names}
        for name, param in self.params.items():
            param.data = self.view(self.weight, name)

    def view(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        """The part of a flat [n] buffer that belongs to one weight, in its (local) shape."""
        param, begin = self.params[name], self.offsets[name]
        return flat[begin:begin + param.numel()].view(param.shape)

    def runs(self) -> list[tuple[slice, bool]]:
        """This rank's slice as (range within the slice, has weight decay)."""
        cut = min(max(self.decay_end - self.begin, 0), self.end - self.begin)
        runs = [(slice(0, cut), True), (slice(cut, self.end - self.begin), False)]
        return [run for run in runs if run[0].stop > run[0].start]

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()  # on CUDA the stream waits, not the host
            self.work = None

    def reduce_scatter_grad(self) -> None:
        """Sums grad over the group; afterwards this rank's slice is complete. Asynchronous."""
        if self.peers:
            self.work = self.peers.reduce_scatter(self.grad_mine)
        elif self.axis.size > 1:
            self.work = dist.reduce_scatter_tensor(self.grad_mine, self.grad,
                                                   group=self.axis.group, async_op=True)

    def all_gather_weight(self) -> None:
        """Sends this rank's updated slice of the weights to the group. Asynchronous."""
        mine = self.weight[self.begin:self.end]
        if self.master.data_ptr() != mine.data_ptr():
            mine.copy_(self.master)
        if self.axis.size > 1:
            self.work = dist.all_gather_into_tensor(self.weight, mine, group=self.axis.group,
                                                    async_op=True)

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        """This rank's slice [n/N] of master or a moment -> the whole [n]."""
        return all_gather(mine, self.axis.group) if self.axis.size > 1 else mine


def plan_buckets(model: nn.Module, grid: Grid) -> list[list[Bucket]]:
    """The model's weights as buckets, one list per unit in the order of the forward pass.

    Replicated weights reduce over the whole world, tensor-parallel shards over dp. Nothing is
    allocated, so a model on the meta device gives the memory plan of --dry-run.
    """
    named = dict(model.named_parameters())
    units = []
    for names in model.units().values():
        split = {n: named[n] for n in names if grid.tp.size > 1 and hasattr(named[n], "tp_split")}
        whole = {n: named[n] for n in names if n not in split}
        units.append([Bucket(params, axis) for params, axis in
                      ((split, grid.dp), (whole, grid.world)) if params])
    assert sum(len(b.params) for unit in units for b in unit) == len(named), "a weight has no unit"
    return units


class ShardedOptimizer:
    """ZeRO-1 (arXiv:1910.02054) around torch.optim's fused AdamW or SGD.

    The protocol of one step, on every rank:
      1. backward, each micro-batch: as soon as autograd has all gradients of a bucket they are
         added to its fp32 `grad`. In the last micro-batch (`sync = True`) the bucket is then
         reduce-scattered while backward goes on with the block before it.
      2. after the reduce-scatter each gradient element lives complete on exactly one rank, so the
         global norm is one sum over the world and cannot count a weight twice.
      3. the fused kernel clips (`grad_scale`), updates this rank's slice of the fp32 masters and
         moments, or changes nothing at all if the norm is not finite (`found_inf`).
      4. updated weights are all-gathered bucket by bucket; the next forward waits for a block's
         weights only when it reaches the block.
    Nothing here makes the host wait for the device.

    Bytes per parameter, N ranks: bf16-O2 2 (weight) + 4 (grad) + 12/N; fp32 and bf16 8 + 8/N.
    """

    def __init__(self, model: nn.Module, grid: Grid, *, optimizer: str = "adamw",
                 weight_dtype: torch.dtype = torch.float32, weight_decay: float = 0.0,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 momentum: float = 0.9, clip_grad: float = 0.0, peer_copies: bool | None = None):
        self.model, self.grid, self.clip_grad = model, grid, clip_grad
        self.units = plan_buckets(model, grid)
        self.buckets = [bucket for unit in self.units for bucket in unit]
        self.sync = True      # set False before the backward of any but the last micro-batch
        self.fresh = True     # the next backward starts a new sum of gradients
        self.state_names = ("exp_avg", "exp_avg_sq") if optimizer == "adamw" else (
            ("momentum_buffer",) if momentum else ())
        self.device = next(model.parameters()).device
        self.peers = {}
        for axis in (grid.dp, grid.world) if grid.tp.size > 1 else (grid.world,):
            if peer_copies is not False and peers_in_reach(axis, self.device):
                buckets = [bucket for bucket in self.buckets if bucket.axis is axis]
                self.peers[axis] = PeerMemory(sum(b.numel for b in buckets), max(
                    b.end - b.begin for b in buckets), axis, self.device)
        if peer_copies and not self.peers:
            raise ValueError("--peer-copies needs several GPUs of one host that read each other's "
                             "memory; leave it out here")
        for bucket in self.buckets:
            bucket.materialize(weight_dtype, self.state_names, self.peers.get(bucket.axis))
            for param in bucket.params.values():
                # Weak: autograd's own reference to the hook is invisible to the garbage collector.
                param.register_post_accumulate_grad_hook(
                    lambda param, optimizer=weakref.ref(self), bucket=weakref.ref(bucket):
                        optimizer()._gradient_is_there(bucket()))
        for module, unit in zip(model.unit_modules(), self.units, strict=True):
            module.register_forward_pre_hook(
                lambda module, args, unit=unit: [bucket.wait() for bucket in unit] and None)
        model.register_load_state_dict_post_hook(lambda module, keys: self.refresh_masters())

        self.step_count = torch.zeros((), device=self.device)  # updates that were applied
        groups = [dict(params=[], weight_decay=weight_decay), dict(params=[], weight_decay=0.0)]
        states = {}
        for bucket in self.buckets:
            for run, decay in bucket.runs():
                part = bucket.master[run]
                part.grad = bucket.grad_mine[run]
                states[part] = {name: state[run] for name, state in bucket.state.items()}
                groups[0 if decay else 1]["params"].append(part)
        if optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
            for state in states.values():
                state["step"] = torch.zeros((), device=self.device)
        else:
            self.optimizer = torch.optim.SGD(groups, momentum=momentum, fused=True)
        # Filled here, not by the first step: torch's SGD would leave a first step that is skipped
        # for found_inf with uninitialised momentum.
        self.optimizer.state.update(states)

    def _gradient_is_there(self, bucket: Bucket) -> None:
        """Counts a bucket's gradients; with the last one, adds them all to `grad` in one kernel."""
        bucket.missing -= 1
        if bucket.missing:
            return
        bucket.missing = len(bucket.params)
        grads = [param.grad for param in bucket.params.values()]
        if self.fresh:
            torch._foreach_copy_(bucket.grad_views, grads)  # saves zeroing them
        else:
            torch._foreach_add_(bucket.grad_views, grads)
        for param in bucket.params.values():
            param.grad = None
        if self.sync:
            bucket.reduce_scatter_grad()

    def backward(self, loss: torch.Tensor, last: bool = True) -> None:
        """Backward of one micro-batch; `last` starts the reduction of the summed gradients, and
        step() must come before the next backward."""
        self.sync = last
        loss.backward()
        self.fresh = last

    @torch.no_grad()
    def step(self, lr: float) -> torch.Tensor:
        """One update of every weight. Returns the global gradient norm before clipping, a device
        scalar; if it is not finite, nothing has changed."""
        for bucket in self.buckets:
            bucket.wait()
        norm = self._global_norm()
        self._update(lr, norm)
        for bucket in self.buckets:
            bucket.all_gather_weight()
        return norm

    def _global_norm(self) -> torch.Tensor:
        norms = torch._foreach_norm([bucket.grad_mine for bucket in self.buckets])
        square = torch.stack(norms).double().square().sum()
        if self.grid.world.size > 1:
            dist.all_reduce(square)
        return square.sqrt().float()

    def _update(self, lr: float, norm: torch.Tensor) -> None:
        self.optimizer.found_inf = (~norm.isfinite()).float()
        # The kernel divides gradients by grad_scale: norm / clip where the norm exceeds clip.
        scale = (norm / self.clip_grad).clamp(min=1.0) if self.clip_grad else torch.ones_like(norm)
        self.optimizer.grad_scale = scale
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.step_count += 1 - self.optimizer.found_inf

    def wait(self) -> None:
        """Until all weights are gathered; forward passes do this block by block on their own."""
        for bucket in self.buckets:
            bucket.wait()

    @torch.no_grad()
    def refresh_masters(self) -> None:
        """Masters from the model's weights. Runs by itself after model.load_state_dict: otherwise
        the next step would write the old masters back over them (Megatron-LM#174)."""
        for bucket in self.buckets:
            bucket.wait()
            bucket.master.copy_(bucket.weight[bucket.begin:bucket.end])

    def full_tensors(self, keep: Callable[[str], bool] = lambda name: True):
        """Yields (name, kind, full fp32 CPU tensor), kind in weight (the master) and the moments,
        one bucket at a time and only for names that this rank keeps. Collective: all ranks call."""
        self.wait()
        for bucket in self.buckets:
            for kind, mine in {"weight": bucket.master, **bucket.state}.items():
                flat = bucket.gather(mine)
                tp_flats = flat[None]
                if self.grid.tp.size > 1 and bucket.axis is self.grid.dp:
                    tp_flats = all_gather(flat[None], self.grid.tp.group)
                for name in filter(keep, bucket.params):
                    parts = [bucket.view(tp_flat, name) for tp_flat in tp_flats]
                    split = getattr(bucket.params[name], "tp_split", None)
                    full = parts[0] if len(parts) == 1 else split.unshard(parts)
                    yield name, kind, full.cpu().clone()

    def decay_names(self) -> tuple[list[str], list[str]]:
        """The weights (with, without) weight decay."""
        names = [n for b in self.buckets for n in b.params]
        split = [uses_weight_decay(n, p) for b in self.buckets for n, p in b.params.items()]
        return ([n for n, d in zip(names, split) if d], [n for n, d in zip(names, split) if not d])


# ----------------------------------------------------------------------------- checkpoints
# A checkpoint knows neither tp nor dp: files of whole tensors, under timm's names.
#
#     OUTPUT/checkpoints/step_00001000/meta.json       step, images seen, configs, files and sizes
#                                      rank_00000.pt   {name: {weight, exp_avg, exp_avg_sq}}, fp32
#     OUTPUT/checkpoints/latest                        the name of the newest one
#
# Each rank gathers one bucket at a time, and keeps and writes only its share of the names. `weight`
# is the fp32 master: bf16 weights are its rounding, so they need not be stored. Everything is
# written to a temporary directory, synced, then renamed; `latest` comes last.


def _share_out(sizes: dict[str, int], world: int) -> dict[str, int]:
    """Which rank writes which weight: the largest first, always to the least loaded rank."""
    load, owner = [0] * world, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = load.index(min(load))
        load[owner[name]] += sizes[name]
    return owner


def _fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def _write_synced(path: Path, write: Callable) -> None:
    with open(path, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())


def write_atomically(path: Path, write: Callable) -> None:
    """write(file) to a temporary file that becomes `path`: whole, or not at all (OSError)."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        _write_synced(temporary, write)
        os.replace(temporary, path)
        _fsync_directory(path.parent)
    except RuntimeError as e:  # torch.save reports a full disk as RuntimeError
        raise OSError(f"could not write {path}: {e}") from e
    finally:
        temporary.unlink(missing_ok=True)


def _replace_text(path: Path, text: str) -> None:
    write_atomically(path, lambda f: f.write(text.encode()))


def save_checkpoint(root: Path, step: int, optimizer: ShardedOptimizer, meta: dict,
                    keep_last: int = 0) -> Path:
    """Writes root/step_NNNNNNNN and points root/latest at it; then removes all but keep_last.

    Collective. A failure on any rank (a full disk) raises OSError on all of them; it leaves the
    checkpoints that were there, and `latest`, as they were.
    """
    grid, final = optimizer.grid, root / f"step_{step:08d}"
    temporary = root / f".{final.name}.tmp"
    if grid.world.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _barrier(grid)
    sizes = {n: p.numel() for b in optimizer.buckets for n, p in b.params.items()}
    owner = _share_out(sizes, grid.world.size)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name, kind, full in optimizer.full_tensors(lambda n: owner[n] == grid.world.rank):
        tensors.setdefault(name, {})[kind] = full
    file = temporary / f"rank_{grid.world.rank:05d}.pt"
    error = None
    try:
        _write_synced(file, lambda f: torch.save(tensors, f))
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as RuntimeError
        error = f"rank {grid.world.rank} could not write {file}: {e}"
    reports = all_gather_object((error, file.stat().st_size if error is None else 0), grid)
    errors = [e for e, _ in reports if e]
    if not errors and grid.world.rank == 0:
        try:
            meta = {**meta, "step": step, "updates": int(optimizer.step_count),
                    "state": list(optimizer.state_names),
                    "files": {f"rank_{r:05d}.pt": size for r, (_, size) in enumerate(reports)},
                    "where": {name: f"rank_{r:05d}.pt" for name, r in owner.items()}}
            _replace_text(temporary / "meta.json", json.dumps(meta, indent=1))
            replaced = root / f".{final.name}.old"
            shutil.rmtree(replaced, ignore_errors=True)
            if final.exists():  # moved aside, not deleted: a crash here must not lose it
                os.rename(final, replaced)
            os.rename(temporary, final)
            _fsync_directory(root)
            shutil.rmtree(replaced, ignore_errors=True)
            _replace_text(root / "latest", final.name + "\n")
        except OSError as e:
            errors = [f"could not publish {final}: {e}"]
    errors = all_gather_object(errors, grid)[0]
    if errors:
        if grid.world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"checkpoint of step {step} failed, earlier ones are untouched: {errors[0]}")
    if grid.world.rank == 0 and keep_last:
        for old in complete_checkpoints(root)[:-keep_last]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def complete_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints below root, oldest first: every file there, with its size."""
    return [d for d in sorted(root.glob("step_*")) if incomplete_reason(d) is None]


def incomplete_reason(directory: Path) -> str | None:
    """None for a complete checkpoint, else what is wrong with it."""
    try:
        files = json.loads((directory / "meta.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as e:
        return f"{directory}/meta.json cannot be read: {e}"
    for name, size in files.items():
        path = directory / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            return f"{path} has {found} bytes, should have {size}"
    return None


def newest_checkpoint(path: Path) -> Path:
    """path itself if it is a checkpoint, else the newest complete one of this output directory.
    Raises ValueError if there is none."""
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    if path.name.startswith("step_") or (path / "meta.json").exists():
        read_meta(path)  # raises if it is incomplete
        return path
    found = complete_checkpoints(path)
    if not found:
        raise ValueError(f"{path} holds no complete checkpoint (step_*/meta.json)")
    return found[-1]


def read_meta(directory: Path) -> dict:
    """A checkpoint's meta.json. Raises ValueError if the checkpoint is missing or incomplete."""
    reason = incomplete_reason(directory)
    if reason:
        raise ValueError(f"{directory} is not a complete checkpoint: {reason}")
    return json.loads((directory / "meta.json").read_text())


class CheckpointTensors:
    """Reads single tensors of a checkpoint; files are mapped into memory, not read whole."""

    def __init__(self, directory: Path):
        self.directory, self.where, self.files = directory, read_meta(directory)["where"], {}

    def __call__(self, name: str, kind: str) -> torch.Tensor:
        file = self.where[name]
        if file not in self.files:
            self.files[file] = torch.load(self.directory / file, map_location="cpu", mmap=True,
                                          weights_only=True)
        return self.files[file][name][kind]


@torch.no_grad()
def load_checkpoint(directory: Path, optimizer: ShardedOptimizer) -> dict:
    """Loads masters, moments and weights at this run's layout, whatever the saved one was.

    Each rank reads only the tensors that its slices touch. Returns meta.json. Raises ValueError if
    the checkpoint is of another model or optimizer.
    """
    meta, read = read_meta(directory), CheckpointTensors(directory)
    named = {n: p for b in optimizer.buckets for n, p in b.params.items()}
    if set(meta["where"]) != set(named):
        odd = sorted(set(meta["where"]) ^ set(named))
        raise ValueError(f"{directory} is a checkpoint of another model: {len(odd)} weights do not "
                         f"match, for example {odd[0]}; give its --model, or --resume none")
    if tuple(meta["state"]) != optimizer.state_names:
        raise ValueError(f"{directory} holds {meta['state']}, this --optimizer needs "
                         f"{list(optimizer.state_names)}; give the same --optimizer")
    for bucket in optimizer.buckets:
        for name, param in bucket.params.items():
            begin = max(bucket.offsets[name], bucket.begin)
            end = min(bucket.offsets[name] + param.numel(), bucket.end)
            for kind, mine in {"weight": bucket.master, **bucket.state}.items():
                if begin >= end:
                    continue
                full = read(name, kind)
                if list(full.shape) != full_shape(param, optimizer.grid.tp):
                    raise ValueError(
                        f"{directory} has {name} of shape {list(full.shape)}, this model needs "
                        f"{full_shape(param, optimizer.grid.tp)}")
                local = shard(full, param, optimizer.grid.tp).flatten()
                offset = bucket.offsets[name]
                mine[begin - bucket.begin:end - bucket.begin] = local[begin - offset:end - offset]
        bucket.all_gather_weight()
    optimizer.wait()
    optimizer.step_count.fill_(meta["updates"])
    for state in optimizer.optimizer.state.values():
        if "step" in state:
            state["step"].fill_(meta["updates"])
    return meta


# ----------------------------------------------------------------------------- small collectives
def _barrier(grid: Grid) -> None:
    if grid.world.size > 1:
        dist.barrier()


def all_gather_object(value, grid: Grid) -> list:
    if grid.world.size == 1:
        return [value]
    values = [None] * grid.world.size
    dist.all_gather_object(values, value)
    return values


def on_rank_0(grid: Grid, function: Callable):
    """function() on rank 0, its result on all; a ValueError or OSError is raised on all."""
    result, error = None, None
    if grid.world.rank == 0:
        try:
            result = function()
        except (ValueError, OSError) as e:
            error = str(e)
    if grid.world.size > 1:
        box = [(result, error)]
        dist.broadcast_object_list(box, src=0)
        result, error = box[0]
    if error is not None:
        raise ValueError(error)
    return result
