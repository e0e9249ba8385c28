"""What the GPUs of one host do faster: copies from memory to memory, which take no processors.

    apply(model, ...)           images of a tensor-parallel group visit each other's weights while
                                the rest is multiplied (--tp-comm-overlap)
    gradient_exchange(...)      gradients are summed from copies (--peer-copies); handed to
                                parallel.ShardedOptimizer as its exchange

Both need GPUs that read each other's memory; nothing in model.py or parallel.py knows of this file,
and without it NCCL does the same. test_speed.py runs both on CPU ranks, with memory shared through
files, and compares them with the collectives. Letters as in parallel.py.
"""

import os
import socket
import warnings
from collections import deque

import torch

from model import KEPT, LastBlock, ViT
from parallel import FUNCTIONAL, Axis, Collectives, Grid, all_gather_object, plan_buckets


class Gpus:
    """What is needed of CUDA, as one object, for which tests have a stand-in: streams, events, and
    symmetric memory, which every rank of a group can read and write."""
    multicast_off = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}  # not used here
    stream, event = torch.cuda.Stream, torch.cuda.Event
    current, on, synchronize, count, reaches = map(staticmethod, (
        torch.cuda.current_stream, torch.cuda.stream, torch.cuda.synchronize,
        torch.cuda.device_count, torch.cuda.can_device_access_peer))

    def in_reach(self, axis: Axis, device: torch.device) -> bool:
        """Whether the axis's ranks are GPUs of one host that can read each other's memory.
        Collective."""
        if axis.size == 1 or device.type != "cuda":
            return False
        host = (socket.gethostname(), os.environ.get("GROUP_RANK"))  # torchrun's number of the host
        places = all_gather_object((host, device.index), axis)
        del places[axis.rank]
        return all(all_gather_object(all(
            other == host and index < self.count() and self.reaches(device, index)
            for other, index in places), axis))

    def share(self, numel: int, dtype: torch.dtype, axis: Axis, device: torch.device, instead: str):
        """(memory, its handle). Raises ValueError, which says what to give `instead`, where the
        GPUs do not share memory. Collective."""
        import torch.distributed._symmetric_memory as symm_mem
        os.environ.update(self.multicast_off)
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

    def begun(self, sent: torch.Tensor, result: torch.Tensor):
        """The work whose end is when this stream has come so far; wait_tensor(result) waits."""
        import torch.distributed._symmetric_memory as symm_mem
        work = symm_mem.Work()
        torch._C._distributed_c10d._register_work(result, work)
        return work


# ----------------------------------------------------------------------------- visiting images
def apply(model: ViT, device: torch.device, wanted: bool | None, gpus=None) -> bool:
    """--tp-comm-overlap (NeMo's tp_comm_overlap): f and g beside the products, if that is wanted,
    or, with None, where the tp ranks are GPUs that reach each other; after kernels.apply. Returns
    whether it is so.

    Raises ValueError if it is wanted and they do not reach each other, or where they do and cannot
    share memory. Collective.
    """
    tp, gpus = model.grid.tp, gpus or Gpus()
    if wanted is False or not gpus.in_reach(tp, device):
        if wanted:
            raise ValueError("--tp-comm-overlap needs tensor-parallel groups of GPUs of one host "
                             "that read each other's memory (NVLink); leave it out here")
        return False
    Exchange.of[tp.group.group_name] = Exchange(tp, device, gpus)
    KEPT.add(torch.ops.vit.return_home.default)  # what g returns is kept in selective recomputation
    first, *_ = model.blocks
    attention = type("VisitingAttention", (AttentionVisits, type(first.attn)), {})
    mlp = type("VisitingMlp", (MlpVisits, type(first.mlp)), {})
    for block in model.blocks:
        if isinstance(block, LastBlock):  # it sends one token an image back: too little
            continue
        block.attn.__class__, block.mlp.__class__ = attention, mlp
    return True


# For kernels.compile where images visit: copy engines read what they send after the compiler's last
# use of it, and what runs beside them stays there.
COMPILE_OPTIONS = {"allow_buffer_reuse": False, "inplace_buffers": False,
                   "reorder_for_peak_memory": False}


class AttentionVisits:
    """Before Attention, or a kernel's class of it, in a class's bases: its images visit."""

    def forward(self, x):                                                      # [b, S, D]
        return visit(x, self.qkv, self.attend, self.proj)


class MlpVisits:
    def forward(self, x):                                                      # [b, S, D]
        return visit(x, self.fc1, self.act, self.fc2)


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
        send = torch.ops.vit.visit if i > 0 else torch.ops.vit.return_home
        return send(x, i, tp.group.group_name)

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
        return torch.ops.vit.visit(dx, -ctx.i, ctx.tp.group.group_name), None, None


class Exchange:
    """Shifts between the GPUs of a tp group by copy engines: as with PeerMemory, the processors are
    left to the matrix products that run beside.

    What is sent is pushed into one of two slots of the receiver's symmetric memory, and copied from
    there to the result once all ranks have met. A slot is written again two shifts later: the
    meeting before that comes after the receiver's copy. What is sent and the result are kept until
    tp.size shifts later, when this stream waits for their copies in case that no one has.
    """
    of = {}  # by the name of the group, for the operators below

    def __init__(self, tp: Axis, device: torch.device, gpus):
        self.tp, self.device, self.gpus, self.count = tp, device, gpus, 0
        self.stream, self.ready = gpus.stream(), gpus.event()
        self.kept = deque()
        self.reserve(1)

    def reserve(self, nbytes: int) -> None:
        """Two slots of at least nbytes on each rank."""
        self.gpus.synchronize()
        self.nbytes, self.slots = -(-nbytes // 512) * 512, {}
        self.memory, self.handle = self.gpus.share(
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
            self.kept[0][-1].wait()
            self.kept.popleft()
        self.ready.record()
        with self.gpus.on(self.stream):
            self.stream.wait_event(self.ready)
            slots[(self.tp.rank + i) % self.tp.size].copy_(x)
            self.handle.barrier()
            result.copy_(slots[self.tp.rank])
            work = self.gpus.begun(x, result)
        self.kept.append((x, result, work))
        return result


def _shift(x, i: int, group: str):
    return Exchange.of[group].shift(x, i)


def _like(x, i: int, group: str):
    return x.new_empty(x.shape)


# Operators, for the compiler; torch.library.custom_op's take 15 us more a call.
LIBRARY = torch.library.Library("vit", "FRAGMENT")
for _name in ("visit", "return_home"):
    LIBRARY.define(f"{_name}(Tensor x, int i, str group) -> Tensor")
    LIBRARY.impl(_name, _shift, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vit::{_name}", _like, lib=LIBRARY)


# ----------------------------------------------------------------------------- gradients
def gradient_exchange(model: ViT, grid: Grid, device: torch.device, wanted: bool | None,
                      gpus=None) -> Collectives:
    """--peer-copies: how the optimizer sums gradients: by copies where all ranks of an axis are
    GPUs that reach each other, else by collectives. Collective. Raises ValueError if copies are
    wanted and no axis has them."""
    gpus = gpus or Gpus()
    axes = [] if wanted is False else [grid.world] if grid.tp.size == 1 else [grid.dp, grid.world]
    near = [axis for axis in axes if gpus.in_reach(axis, device)]
    if wanted and not near:
        raise ValueError("--peer-copies needs several GPUs of one host that read each other's "
                         "memory; leave it out here")
    return PeerCopies(model, grid, near, device, gpus) if near else Collectives()


class PeerCopies(Collectives):
    """The exchange of buckets over several axes: a PeerMemory for each axis whose GPUs are near."""

    def __init__(self, model: ViT, grid: Grid, near: list[Axis], device: torch.device, gpus):
        buckets = [bucket for unit in plan_buckets(model, grid) for bucket in unit]
        self.memories = {}
        for axis in near:
            mine = [bucket for bucket in buckets if bucket.axis is axis and not bucket.frozen]
            if not mine:
                continue
            self.memories[axis] = PeerMemory(sum(b.numel for b in mine), max(
                b.end - b.begin for b in mine), axis, device, gpus)

    def buffer(self, bucket, device):
        memory = self.memories.get(bucket.axis)
        return memory.take(bucket.numel) if memory else super().buffer(bucket, device)

    def reduce_scatter(self, bucket):
        memory = self.memories.get(bucket.axis)
        return (memory.reduce_scatter(bucket.grad_mine) if memory
                else super().reduce_scatter(bucket))


class PeerMemory:
    """One fp32 buffer on each GPU of a host, which the others read: gradients are exchanged by copy
    engines, and added by a small kernel, instead of NCCL.

    NCCL's reduce-scatter occupies some SMs, and cuBLAS's matrix products want all of them at once:
    the product beside it needs a second round. For g/14 at 64 on 2 H200 (torch 2.11) that is a
    weight gradient in every block, 677 us instead of 374; with copies 395. Images/s of the two, one
    micro-batch a step: g/14 527 (another run) and 543, L/16 at 256 2,471 and 2,496.
    """

    def __init__(self, numel: int, largest: int, axis: Axis, device: torch.device, gpus):
        """numel: of all buckets that reduce over `axis`; largest: of one rank's slice of one."""
        self.axis, self.gpus, self.taken, self.stream = axis, gpus, 0, gpus.stream()
        self.memory, self.handle = gpus.share(numel, torch.float32, axis, device,
                                              "--no-peer-copies, and NCCL sums the gradients")
        self.memory.zero_()
        self.received = torch.empty(largest, device=device)

    def take(self, numel: int) -> torch.Tensor:
        """The next numel elements: the same place on every rank."""
        self.taken += numel
        return self.memory[self.taken - numel:self.taken]

    def reduce_scatter(self, mine: torch.Tensor):
        """Adds the peers' elements at this place to `mine`, this rank's slice of a bucket, of which
        peers read the other slices only. Asynchronous: returns the event of its end.

        The ranks wait for each other at its beginning, not at its end: ShardedOptimizer.step's sum
        of the norm over all ranks comes before anyone's next gradients.
        """
        self.stream.wait_stream(self.gpus.current())
        with self.gpus.on(self.stream):
            self.handle.barrier()
            received = self.received[:mine.numel()]
            for i in range(1, self.axis.size):
                peer = (self.axis.rank + i) % self.axis.size  # not all from the same one at once
                received.copy_(self.handle.get_buffer(peer, mine.shape, mine.dtype,
                                                      mine.storage_offset()))
                mine.add_(received)
            return self.stream.record_event()


def shared_bytes(exchange: Collectives) -> int:
    """Bytes of symmetric memory on this rank, which torch's allocator does not count."""
    memories = [*getattr(exchange, "memories", {}).values(), *Exchange.of.values()]
    return sum(memory.memory.nbytes for memory in memories)
