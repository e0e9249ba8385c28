"""How it is split: the process grid, column/row-parallel layers, ZeRO-1.

One idea carries it: every rank owns its own images. The residual stream of a rank holds that rank's
images only, inside a tensor-parallel group too, so norms, dropout, residuals, patch embedding, head
and loss are never computed twice and need no shared random stream. Half a transformer block is

    x[b,S,D] -> norm -> f -> [t*b,S,D] -> column-parallel -> [t*b,S,F/t]
             -> row-parallel partial sums -> g -> [b,S,D] + bias -> dropout -> + x

    f  all-gather of the images over tp       (backward: reduce-scatter)
    g  reduce-scatter of the images over tp   (backward: all-gather)

which moves the same bytes as Megatron's two all-reduces per half (arXiv:1909.08053), as its
sequence parallelism does (arXiv:2205.05198), with the images as the dimension that is split.

Because every rank sees different images, the gradient of a replicated weight is a sum over all
ranks, and that of a tensor-parallel shard, which has seen the images of its whole tp group, is a
sum over the dp ranks only. The loss is a sum over images divided by the global batch, so every
reduction here is a plain sum.

Letters: b images of this rank (a replica's micro-batch is t*b), S tokens, D hidden size, F the wide
dimension, t = tp size, N = size of the group that shares a bucket; `_local` and `/t` mark shards.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # noqa: F401 registers the operators below
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh


# ----------------------------------------------------------------------------- the process grid
@dataclass(frozen=True)
class Axis:
    """One direction of the process grid, seen from this rank. group is None for a single rank."""
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


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


def barrier(grid: Grid) -> None:
    if grid.world.size > 1:
        dist.barrier()


def all_gather_object(value, axis: Axis) -> list:
    """`value` of each rank of the axis, in their order."""
    if axis.size == 1:
        return [value]
    values = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values


# ----------------------------------------------------------------------------- the operators f, g
# Functional collectives, which torch.compile has in its graph as they are. With the in-place ones
# (dist.all_gather_into_tensor) the compiler of torch 2.11 loses the gradient of f and g silently;
# test_compiled_gradients_equal_eager_ones finds that.
FUNCTIONAL = torch.ops._c10d_functional


# On a CPU by another operator: the two threads of a gloo group write the name of what each has done
# into one std::string without a lock (ProcessGroupGloo::runLoop). A name of 16 letters or more, as
# ALLGATHER_COALESCED, lies on the heap and was freed twice: a rank aborted in malloc, or spun for
# ever in the destructor of a buffer. ALLGATHER lies in the string itself.
@torch.library.impl("_c10d_functional::all_gather_into_tensor", "cpu")
def _all_gather_of_gloo(x, size, group_name):
    y = x.new_empty(size * x.shape[0], *x.shape[1:])
    return FUNCTIONAL.all_gather_into_tensor_out(x, size, group_name, out=y)


def all_gather(x_local: torch.Tensor, axis: Axis) -> torch.Tensor:
    """[n, ...] of each rank -> [size*n, ...], in the order of the ranks."""
    if axis.size == 1:
        return x_local
    y = FUNCTIONAL.all_gather_into_tensor(x_local.contiguous(), axis.size, axis.group.group_name)
    return FUNCTIONAL.wait_tensor(y)


def reduce_scatter(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """[size*n, ...] of each rank -> [n, ...], this rank's part of the sum over ranks."""
    y = FUNCTIONAL.reduce_scatter_tensor(x.contiguous(), "sum", axis.size, axis.group.group_name)
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
    def forward(ctx, x_local, tp):
        ctx.tp = tp
        return all_gather(x_local, tp)

    @staticmethod
    def backward(ctx, dy):
        return reduce_scatter(dy, ctx.tp), None


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
    def forward(ctx, x, tp):
        ctx.tp = tp
        return reduce_scatter(x, tp)

    @staticmethod
    def backward(ctx, dy_local):
        return all_gather(dy_local, ctx.tp), None


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


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the output features split over tp; F.linear when tp is 1.

        x_local [b, S, D], W_local [F/t, D], b_local [F/t]  ->  y [t*b, S, F/t]

        forward    y  = f(x_local) W_local^T + b_local      f gathers the group's images
        dgrad      dx = f'(dy W_local)                      f' sums over tp, keeps my images
        wgrad      dW_local = dy^T f(x_local)               complete for my columns
        dbias      db_local = sum of dy over images, tokens

    parts: 3 for a fused qkv, so that each of q, k, v is split by heads.
    """

    def __init__(self, in_features: int, out_features: int, tp: Axis, parts: int = 1):
        super().__init__()
        self.tp, self.parts = tp, parts
        self.weight = nn.Parameter(torch.empty(out_features // tp.size, in_features))
        self.bias = nn.Parameter(torch.empty(out_features // tp.size))
        self.weight.tp_split = self.bias.tp_split = Split(0, parts)

    def forward(self, x):
        return self.product(self.gather(x))

    def gather(self, x):
        return GatherImages.apply(x, self.tp) if self.tp.size > 1 else x  # f

    def product(self, x):
        return F.linear(x, self.weight, self.bias)

    def product_of(self, parts: slice, x):
        """The product with only these of the weight's parts."""
        weight, bias = (w.unflatten(0, (self.parts, -1))[parts].flatten(0, 1)
                        for w in (self.weight, self.bias))
        return F.linear(x, weight, bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the input features split over tp; F.linear when tp is 1.

        x [t*b, S, F/t], W_local [D, F/t], b [D]  ->  y_local [b, S, D]

        forward    y_local = g(x W_local^T) + b      g sums over tp, keeps my images
        dgrad      dx = g'(dy_local) W_local         g' gathers the group's images
        wgrad      dW_local = g'(dy_local)^T x       complete for my rows
        dbias      db = sum of dy_local over images, tokens
    """

    def __init__(self, in_features: int, out_features: int, tp: Axis):
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(out_features, in_features // tp.size))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.weight.tp_split = Split(1)

    def forward(self, x):
        if self.tp.size == 1:
            return self.product(x, self.bias)
        y = ScatterSum.apply(self.product(x), self.tp)  # g
        return y + self.bias  # after the sum: before it, the bias would be added t times

    def product(self, x, bias=None):
        return F.linear(x, self.weight, bias)


# ----------------------------------------------------------------------------- ZeRO-1
ALIGN = 64  # elements; each weight starts on a 128-byte (bf16) boundary, as matrix kernels want
# torch 2.14 has new names for these two, and warns at the old ones.
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def uses_weight_decay(name: str, param: nn.Parameter) -> bool:
    """Weight matrices only: no bias, norm, class token or position embedding."""
    return param.ndim >= 2 and name not in ("cls_token", "pos_embed")


class Collectives:
    """How gradients are summed over ranks: by torch.distributed (NCCL, gloo). Another exchange
    with these methods can be handed to the optimizer."""

    def buffer(self, bucket: "Bucket", device: torch.device) -> torch.Tensor:
        """Zeros for a bucket's fp32 gradients, [n]."""
        return torch.zeros(bucket.numel, device=device)

    def reduce_scatter(self, bucket: "Bucket"):
        """Begins to sum bucket.grad over its axis into grad_mine; returns what to wait for."""
        if bucket.axis.size == 1:
            return None
        return _reduce_scatter_into(bucket.grad_mine, bucket.grad, group=bucket.axis.group,
                                    async_op=True)


class Bucket:
    """The weights of one unit (a block) that reduce over the same ranks, laid end to end.

        weight  [n]    flat weights, in the model's dtype; every Parameter is a view of it
        grad    [n]    fp32 gradients, summed over micro-batches (Megatron's main_grad)
        master  [n/N]  fp32 weights of this rank's slice; in fp32 a view of `weight` itself
        state   [n/N]  each: the optimizer's moments of this rank's slice, and the weights' average

    Weights with decay come first, so this rank's slice is at most two runs of one kind each. A
    frozen bucket, of weights without requires_grad, has neither grad nor state.
    """

    def __init__(self, params: dict[str, nn.Parameter], axis: Axis):
        order = sorted(params, key=lambda name: not uses_weight_decay(name, params[name]))
        self.params, self.axis, self.offsets, end = {n: params[n] for n in order}, axis, {}, 0
        self.frozen = not params[order[0]].requires_grad
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
        self.first = self.last = True   # whether this micro-batch is its step's first, or last

    def materialize(self, weight_dtype: torch.dtype, state_names: tuple[str, ...],
                    exchange) -> None:
        """Allocates the buffers, moves the weights into them and makes them views."""
        device = next(iter(self.params.values())).device
        full = torch.zeros(self.numel, device=device)
        for name, param in self.params.items():
            self.view(full, name).copy_(param.data)
        self.exchange = exchange
        self.weight = full.to(weight_dtype)  # where that is fp32, `full` itself
        mine = slice(self.begin, self.end)
        self.master = full[mine] if weight_dtype == torch.float32 else full[mine].clone()
        self.state = {}
        for name, param in self.params.items():
            param.data = self.view(self.weight, name)
            param.bucket = self
        if self.frozen:
            return
        self.grad = exchange.buffer(self, device)
        self.grad_mine = self.grad[mine]
        self.grad_views = [self.view(self.grad, name) for name in self.params]
        self.state = {name: torch.zeros_like(self.master) for name in state_names}
        if "ema" in self.state:
            self.state["ema"].copy_(self.master)
        for param in self.params.values():
            param.register_post_accumulate_grad_hook(_gradient_is_there)

    def view(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        """The part of a flat [n] buffer that belongs to one weight, in its (local) shape."""
        param, begin = self.params[name], self.offsets[name]
        return flat[begin:begin + param.numel()].view(param.shape)

    def runs(self) -> list[tuple[slice, bool]]:
        """This rank's slice as (range within the slice, has weight decay)."""
        cut = min(max(self.decay_end - self.begin, 0), self.end - self.begin)
        runs = [(slice(0, cut), True), (slice(cut, self.end - self.begin), False)]
        return [run for run in runs if run[0].stop > run[0].start]

    def decayed_parts(self) -> list[torch.Tensor]:
        """Of each weight with decay what this rank's slice of the masters holds, maybe nothing."""
        begins = {name: self.offsets[name] - self.begin for name in self.params}
        return [self.master[max(begins[name], 0):max(begins[name] + param.numel(), 0)]
                for name, param in self.params.items() if uses_weight_decay(name, param)]

    def wait(self, *_) -> None:
        """Until the collective under way is done; also a forward pre-hook of the unit's module."""
        if self.work is not None:
            self.work.wait()  # on CUDA the stream waits, not the host
            self.work = None

    def gradient_is_there(self) -> None:
        """Counts the bucket's gradients; with the last one, adds them all to `grad` in one kernel,
        and in the last micro-batch of a step begins to sum them over the ranks."""
        self.missing -= 1
        if self.missing:
            return
        self.missing = len(self.params)
        grads = [param.grad for param in self.params.values()]
        if self.first:
            torch._foreach_copy_(self.grad_views, grads)  # saves zeroing them
        else:
            torch._foreach_add_(self.grad_views, grads)
        for param in self.params.values():
            param.grad = None
        if self.last:
            self.work = self.exchange.reduce_scatter(self)

    def all_gather_weight(self) -> None:
        """Sends this rank's updated slice of the weights to the group. Asynchronous."""
        mine = self.weight[self.begin:self.end]
        if self.master.data_ptr() != mine.data_ptr():
            mine.copy_(self.master)
        if self.axis.size > 1:
            self.work = _all_gather_into(self.weight, mine, group=self.axis.group, async_op=True)


def _gradient_is_there(param: nn.Parameter) -> None:
    # Reached through the parameter: a hook that held the bucket would keep it alive for ever, as
    # the garbage collector does not see autograd's reference to a hook.
    param.bucket.gradient_is_there()


def plan_buckets(model: nn.Module, grid: Grid) -> list[list[Bucket]]:
    """The model's weights as buckets, one list per unit in the order of the forward pass.

    Replicated weights reduce over the whole world, tensor-parallel shards over dp; frozen ones have
    buckets of their own. Nothing is allocated, so a model on the meta device gives the memory plan
    of --dry-run.
    """
    units = []
    for _, named in model.units():
        kinds = {}
        for name, param in named.items():
            whole = grid.tp.size == 1 or not hasattr(param, "tp_split")
            kinds.setdefault((whole, param.requires_grad), {})[name] = param
        units.append([Bucket(kinds[whole, trained], grid.world if whole else grid.dp)
                      for whole, trained in sorted(kinds)])
    return units


class ShardedOptimizer:
    """ZeRO-1 (arXiv:1910.02054) around torch.optim's fused AdamW or SGD; LAMB scales AdamW's step.

    The protocol of one step, on every rank:
      1. backward, each micro-batch: as soon as autograd has all gradients of a bucket they are
         added to its fp32 `grad`. In the last micro-batch the bucket is then reduce-scattered while
         backward goes on with the block before it.
      2. after the reduce-scatter each gradient element lives complete on exactly one rank, so the
         global norm is one sum over the world and cannot count a weight twice.
      3. the fused kernel clips (`grad_scale`), updates this rank's slice of the fp32 masters and
         moments, or changes nothing at all if the norm is not finite (`found_inf`).
      4. updated weights are all-gathered bucket by bucket; the next forward waits for a block's
         weights only when it reaches the block.
    Nothing here makes the host wait for the device.

    exchange: how gradients are summed over ranks, with the methods of Collectives.
    layer_decay: unit i of 0 (embedding), blocks, N (norm and head) has lr * layer_decay^(N - i), as
        MAE's fine-tuning (lr_decay.py) and BEiT's; not with LAMB.
    ema_decay: d of an average of the masters (Polyak), state "ema": after update t,
        e = d_t e + (1 - d_t) w,  d_t = min(d, (1 + t) / (10 + t)),
        which is torch.optim.swa_utils' formula with TensorFlow's start (ExponentialMovingAverage),
        so that a short run does not average its initial weights. averaged() puts it in the model.
    Bytes per parameter, N ranks: bf16-O2 2 (weight) + 4 (grad) + 12/N; fp32 and bf16 8 + 8/N; the
    average 4/N more, LAMB 4/N more during its step. Frozen: bf16-O2 2 + 4/N; fp32 and bf16 4.
    """

    def __init__(self, model: nn.Module, grid: Grid, *, optimizer: str = "adamw",
                 weight_dtype: torch.dtype = torch.float32, weight_decay: float = 0.0,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 momentum: float = 0.9, clip_grad: float = 0.0, layer_decay: float = 1.0,
                 ema_decay: float = 0.0, exchange=None):
        self.model, self.grid, self.clip_grad, self.ema_decay = model, grid, clip_grad, ema_decay
        self.weight_decay = weight_decay
        self.after_backward = lambda: None  # called when this rank has computed a step's gradients
        self.exchange = exchange or Collectives()
        self.lamb, adam = optimizer == "lamb", optimizer in ("adamw", "lamb")
        assert not self.lamb or layer_decay == 1
        moments = ("exp_avg", "exp_avg_sq") if adam else (
            ("momentum_buffer",) if momentum else ())
        self.state_names = (*moments, "ema") if ema_decay else moments
        units = plan_buckets(model, grid)
        self.buckets = [bucket for unit in units for bucket in unit]
        self.trained = [bucket for bucket in self.buckets if not bucket.frozen]
        named = sum(len(bucket.params) for bucket in self.buckets)
        assert named == len(list(model.parameters())), "a weight has no unit, or two"
        for (module, _), unit in zip(model.units(), units, strict=True):
            for bucket in unit:
                bucket.materialize(weight_dtype, self.state_names, self.exchange)
                module.register_forward_pre_hook(bucket.wait)
        model.register_load_state_dict_post_hook(self._weights_were_loaded)

        self.device = next(model.parameters()).device
        self.step_count = torch.zeros((), device=self.device)  # updates that were applied
        groups, states = {}, {}  # groups by (share of the lr, has weight decay)
        for i, unit in enumerate(reversed(units)):
            scale = layer_decay ** i
            for bucket in (bucket for bucket in unit if not bucket.frozen):
                for run, decay in bucket.runs():
                    part = bucket.master[run]
                    part.grad = bucket.grad_mine[run]
                    states[part] = {name: bucket.state[name][run] for name in moments}
                    group = dict(params=[], weight_decay=weight_decay * decay, lr_scale=scale)
                    groups.setdefault((scale, decay), group)["params"].append(part)
        if adam:
            self.optimizer = torch.optim.AdamW(groups.values(), betas=betas, eps=eps, fused=True)
            for state in states.values():
                state["step"] = torch.zeros((), device=self.device)
        else:
            self.optimizer = torch.optim.SGD(groups.values(), momentum=momentum, fused=True)
        # Filled here, not by the first step: torch's SGD would leave a first step that is skipped
        # for found_inf with uninitialised momentum.
        self.optimizer.state.update(states)

    def backward(self, loss: torch.Tensor, last: bool = True) -> None:
        """Backward of one micro-batch; `last` starts the reduction of the summed gradients, and
        step() must come before the next backward."""
        for bucket in self.trained:
            bucket.first, bucket.last = bucket.last, last  # after a step's last one comes a first
        loss.backward()
        if last:
            self.after_backward()

    @torch.no_grad()
    def step(self, lr: float) -> torch.Tensor:
        """One update of every weight. Returns the global gradient norm before clipping, a device
        scalar; if it is not finite, nothing has changed."""
        self.wait()
        norm = self._global_norm()
        self._update(lr, norm)
        for bucket in self.trained:
            bucket.all_gather_weight()
        return norm

    def _global_norm(self) -> torch.Tensor:
        norms = torch._foreach_norm([bucket.grad_mine for bucket in self.trained])
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
            group["lr"] = lr * group["lr_scale"]
        if self.lamb:
            self._lamb_step(lr)
        else:
            self.optimizer.step()
        applied = 1 - self.optimizer.found_inf
        self.step_count += applied
        if self.ema_decay:
            share = (9 / (10 + self.step_count)).clamp(min=1 - self.ema_decay) * applied  # 1 - d_t
            for bucket in self.trained:
                bucket.state["ema"].lerp_(bucket.master, share)

    @contextlib.contextmanager
    def averaged(self):
        """With the average of the weights in the model, if there is one: masters and average change
        places, and at the end again. No step inside. Collective."""
        self._swap_average()
        yield
        self._swap_average()

    @torch.no_grad()
    def _swap_average(self) -> None:
        self.wait()
        for bucket in self.trained if self.ema_decay else ():
            master = bucket.master.clone()
            bucket.master.copy_(bucket.state["ema"])
            bucket.state["ema"].copy_(master)
            bucket.all_gather_weight()

    def _lamb_step(self, lr: float) -> None:
        """LAMB (arXiv:1904.00962), as in apex and timm: for a weight w with decay

            d = lr * (m / (sqrt(v) + eps) + decay * w)     AdamW's m and v, bias-corrected
            w <- w - lr * |w| / |d| * d                    |.| of whole weights; w - d if one is 0

        and AdamW's step for the others. AdamW gives d: from w = 0 it steps to -lr * m / (...).
        """
        d = [part for bucket in self.trained for part in bucket.decayed_parts()]  # views
        w = [part.clone() for part in d]
        torch._foreach_zero_(d)
        self.optimizer.step()
        torch._foreach_add_(d, w, alpha=-lr * self.weight_decay)                         # -d
        squares = torch.stack([torch.stack(torch._foreach_norm(x)).square() for x in (w, d)])
        if self.grid.world.size > 1:  # each element of a weight is on one rank
            dist.all_reduce(squares)
        w_norm, d_norm = squares.sqrt()
        scale = torch.where((w_norm > 0) & (d_norm > 0), lr * w_norm / d_norm, 1.0)
        torch._foreach_mul_(d, list((scale * (1 - self.optimizer.found_inf)).unbind()))
        torch._foreach_add_(d, w)

    def wait(self) -> None:
        """Until every bucket's collective is done; forward passes do this block by block."""
        for bucket in self.buckets:
            bucket.wait()

    @torch.no_grad()
    def refresh_masters(self) -> None:
        """Masters, and where their average begins, from the model's weights. Runs by itself after
        model.load_state_dict: otherwise the next step would write the old masters back over them
        (Megatron-LM#174)."""
        for bucket in self.buckets:
            bucket.wait()
            bucket.master.copy_(bucket.weight[bucket.begin:bucket.end])
            if "ema" in bucket.state:
                bucket.state["ema"].copy_(bucket.master)

    def _weights_were_loaded(self, module: nn.Module, incompatible_keys) -> None:
        self.refresh_masters()

    def full_tensors(self, keep: Callable[[str], bool] = lambda name: True,
                     to_host: Callable = lambda name, kind, full: full.cpu().clone()):
        """Yields (name, kind, full fp32 CPU tensor), kind in weight (the master) and the moments,
        one bucket at a time and only for names that this rank keeps. Collective: all ranks call.
        to_host(name, kind, tensor on the device, which lives no longer): the CPU tensor."""
        self.wait()
        for bucket in self.buckets:
            for kind, mine in {"weight": bucket.master, **bucket.state}.items():
                flat = all_gather(mine, bucket.axis)                            # [n]
                split = bucket.axis is self.grid.dp
                flats = all_gather(flat[None], self.grid.tp) if split else flat[None]  # [t, n]
                for name in filter(keep, bucket.params):
                    parts = [bucket.view(flat, name) for flat in flats]
                    full = bucket.params[name].tp_split.unshard(parts) if split else parts[0]
                    yield name, kind, to_host(name, kind, full)

    def decay_names(self) -> tuple[list[str], list[str]]:
        """The trained weights (with, without) weight decay."""
        decays = {n: uses_weight_decay(n, p) for b in self.trained for n, p in b.params.items()}
        return ([n for n, decay in decays.items() if decay],
                [n for n, decay in decays.items() if not decay])
