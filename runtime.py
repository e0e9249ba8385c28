"""What every command stands on: processes, signals, errors, the run, and build_model.

Precision (--precision)   weights   activations   gradients sum, moments, masters   why
    fp32                  fp32      fp32          fp32                              reference
    bf16                  fp32      bf16 matmuls  fp32                              autocast
    bf16-O2               bf16      bf16          fp32                              half the memory
                                                                                    traffic
    bf16-O2-fp8           bf16      fp8 matmuls   fp32                              speed of g, G
Softmax and norm statistics are fp32 always. Logits leave the model as it computes, bf16 in O2, and
the loss is computed in fp32. bf16-O2 is NeMo's megatron_amp_O2.
"""

import contextlib
import faulthandler
import importlib
import itertools
import os
import re
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.elastic.multiprocessing.errors import record

from augment import normalize, pair_rows
from configs import Compute, Step, ViTConfig, divisors
from meter import Log, mark
from model import ViT, recompute
from parallel import Grid, ShardedOptimizer, make_grid
from watch import Watch

# torch 2.14 has a public name for it
_set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
CALLS = itertools.count()  # of on_rank_0, the same on all ranks
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, NVIDIA's datasheets


# ----------------------------------------------------------------------------- processes
def start_processes(config: Compute) -> tuple[Grid, torch.device]:
    """Joins the process group that torchrun announces; without torchrun, a single process."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    local_world, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if gpus and local_world > gpus:
        raise ValueError(f"{local_world} processes were started on a machine with {gpus} GPUs; "
                         f"use torchrun --nproc_per_node {gpus} (or CUDA_VISIBLE_DEVICES= for CPU)")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    if world % config.tensor_parallel_size:
        raise ValueError(f"--tensor-parallel-size {config.tensor_parallel_size} must divide the "
                         f"number of processes {world}; legal here: {divisors(world)}")
    if world == 1:
        if config.collective_timeout:
            raise ValueError(f"--collective-timeout {config.collective_timeout} has no effect with "
                             "one process; leave it out, or start several with torchrun")
        return Grid(), device
    # Both backends: NCCL for the work, gloo for the host's own messages (stop flag, checks).
    backend, device_id = ("cpu:gloo,cuda:nccl", device) if gpus else ("gloo", None)
    seconds = config.collective_timeout
    timeout = timedelta(seconds=seconds) if seconds else None  # None: torch's default
    dist.init_process_group(backend, device_id=device_id, timeout=timeout)
    grid = make_grid(config.tensor_parallel_size, device.type)
    for axis in (grid.tp, grid.dp) if timeout else ():  # made with torch's default
        _set_timeout(timeout, axis.group)
    return grid, device


def on_rank_0(grid: Grid, function: Callable):
    """function() on rank 0, its result on all; a ValueError or OSError is raised on all.

    The others ask the job's store until it is done, however long it takes: a collective would end
    them after its timeout. The store lives as long as torchrun or rank 0, and ends them with it.
    """
    result, error = None, None
    if grid.world.rank == 0:
        try:
            result = function()
        except (ValueError, OSError) as e:
            error = str(e)
    if grid.world.size > 1:
        store, done = _get_default_store(), f"on_rank_0/{next(CALLS)}"
        if grid.world.rank == 0:
            store.set(done, "")
        pause = 0.01
        while not store.check([done]):
            time.sleep(pause)
            pause = min(2 * pause, 1)
        box = [(result, error)]
        dist.broadcast_object_list(box, src=0)
        result, error = box[0]
    if error is not None:
        raise ValueError(error)
    return result


def end_processes() -> None:
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def user_errors(program: str, undo: Callable = lambda: None):
    """One line instead of a traceback for what a user can get wrong, after undo()."""
    try:
        yield
    except (ValueError, OSError) as error:
        undo()
        if int(os.environ.get("RANK", 0)):
            # torchrun ends all ranks with the first: speak only if rank 0 did not
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)  # not sys.exit: it would wait for the process group


def run_program(main) -> None:
    """main() as a program: a failing rank prints its own traceback and leaves at once, where a
    normal exit would wait for the other ranks; torchrun then ends those and repeats the traceback.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no UTF-8
    faulthandler.enable()  # the stacks where NCCL's watchdog aborts, or a mapped file is cut short
    try:
        record(main)()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


class StopSignal:
    """SIGTERM or SIGINT to any rank stops all of them at the same point; and at which step's
    checkpoint all ranks have arrived.

    poll() is called once a step or batch. It starts an all-reduce of a small host tensor and
    returns the result of the one that the previous call started, so nothing waits for it.
    """

    def __init__(self, grid: Grid):
        self.grid, self.name, self.work, self.agreed = grid, None, None, False
        self.written = self.polls = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.name = signal.Signals(number).name

    def poll(self, written: int = 0) -> bool:
        """Whether to stop, the same on all ranks; once it is so it stays so (`agreed`).

        written: the step of the latest checkpoint that this rank has written its part of; the least
        of all ranks is then `self.written`.
        """
        self.polls += 1
        if self.grid.world.size == 1:
            self.agreed, self.written = self.name is not None, written
            return self.agreed
        if self.work is not None:
            self.work.wait()
            self.agreed, self.written = self.agreed or bool(self.flags[0]), -int(self.flags[1])
        self.flags = torch.tensor([int(self.name is not None), -written])
        self.work = dist.all_reduce(self.flags, dist.ReduceOp.MAX, async_op=True)
        return self.agreed


# ----------------------------------------------------------------------------- one run
class Run:
    """What the parts of a command share: its settings, where this process stands, what it prints.

    accumulation: micro-batches of a step; total_steps, start_step and start_image: of the schedule,
    known once the data and the checkpoint are; shift: what to add to a step for its learning rate.
    """

    def __init__(self, config: Compute, vit: ViTConfig, grid: Grid, device: torch.device, *,
                 micro_batch: int, accumulation: int = 1):
        self.config, self.vit, self.grid, self.device = config, vit, grid, device
        self.local_batch, self.accumulation = micro_batch // grid.tp.size, accumulation
        self.peak, self.total_steps = peak_flops(device), 0
        self.start_step, self.start_image, self.shift = 0, 0, 0.0
        self.log, self.stop, self.upload = Log(grid), StopSignal(grid), Upload(device)
        self.backward_end = None  # a mark: from there on a step waits for other ranks
        if grid.world.size > 1:
            Watch(self.stop, config.collective_timeout,
                  torch.cuda.current_stream(device) if device.type == "cuda" else None)
        self.normalize = normalize
        if uses_compile(config, device):
            self.normalize = torch.compile(normalize, fullgraph=True, dynamic=False)

    def prepare(self, images, labels, draws):
        """What the loader gives, uint8 [b, 3, H, W], labels [b] and draws -> on the device the
        normalised and mixed images, the labels, and the rows [b, 5] of how they mix, or None."""
        images, labels, *rows = self.upload(images, labels, *draws.values())
        draws = dict(zip(draws, rows, strict=True))
        if "mix" in draws:
            draws["mix"] = pair_rows(draws["mix"], labels)
        dtype = torch.bfloat16 if self.config.o2 else torch.float32
        images = self.normalize(images, self.config.mean, self.config.std, dtype, **draws)
        return images, labels, draws.get("mix")

    def mark_backward(self) -> None:
        self.backward_end = mark(self.device)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16,
                              enabled=self.config.precision == "bf16")

    def images_seen(self, step: int) -> int:
        """Training images up to the end of `step`."""
        return self.start_image + (step - self.start_step) * self.config.global_batch_size


class Upload:
    """Host tensors to the device on a stream of their own, beside the computation that is running.
    (496 images of 224 px are 75 MB, which B/16 uses up in 131 ms.) Keeps the host at most two
    micro-batches ahead of the device, so that a stop signal is obeyed in time."""

    def __init__(self, device: torch.device):
        self.device, self.used = device, deque()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        if self.stream is None:
            return [x.to(self.device) for x in tensors]
        current = torch.cuda.current_stream()
        self.used.append(current.record_event())
        if len(self.used) > 2:
            self.used.popleft().synchronize()
        with torch.cuda.stream(self.stream):
            copies = [x.to(self.device, non_blocking=True) for x in tensors]
        current.wait_stream(self.stream)
        for x in copies:
            x.record_stream(current)  # else its memory could be given away before it was read
        return copies


# ----------------------------------------------------------------------------- model and optimizer
def uses_compile(config: Compute, device: torch.device) -> bool:
    """--compile, by default on CUDA, where kernels.py is there."""
    if config.compile is None:
        return device.type == "cuda" and optional("kernels") is not None
    return config.compile


def optional(name: str):
    """The module `kernels` or `peer`, or None where the file is not there: a run without it is as
    correct, and slower."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name != name:
            raise
        return None


def build_model(run: Run, seed: int | None = None, loaded=()) -> tuple[ViT, str]:
    """(the model at this rank's place of the grid, what the log says of it).

    seed: of the initial weights; those that are to be `loaded` are not drawn, with None none is.
    Then the passes over the finished model, one line each: kernels and peers where they pay, what
    backward recomputes, the compiler. Raises ValueError for flags that cannot be obeyed here.
    """
    config, grid, device = run.config, run.grid, run.device
    training, fused, text = isinstance(config, Step), uses_compile(config, device), []
    with device:
        model = ViT(run.vit, grid, seed=None)
    if seed is not None:
        with ThreadPoolExecutor() as pool:  # g/14 on 16 cores: 0.7 s, not 7
            model.init_weights(seed, loaded, each=pool.map)
    if training and config.freeze == "backbone":
        model.freeze()
    kernels = optional("kernels")
    if kernels is None and (fused or config.fp8 or config.attention != "auto"):
        raise ValueError("--compile, --attention and fp8 need kernels.py, which is not here")
    if config.fp8 and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise ValueError(f"--precision {config.precision} needs a GPU with fp8 products (compute "
                         f"capability 8.9 or higher), not {device_name(device)}; legal here: "
                         "fp32, bf16, bf16-O2")
    if kernels is None:
        text.append("attention of torch's choice (kernels.py is not here)")
    else:
        dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
        kernel, why = kernels.choose_attention(config.attention, run.vit, grid.tp.size, device,
                                               dtype)
        text.append(f"attention {kernel} ({why})")
        kernels.apply(model, attention=kernel, fp8=config.fp8, fused=fused)
    peer = optional("peer") if grid.tp.size > 1 and not config.fp8 else None
    if config.tp_comm_overlap and peer is None:
        raise ValueError("--tp-comm-overlap needs peer.py, which is not here")
    visiting = peer is not None and peer.apply(model, device, config.tp_comm_overlap)
    if training:
        recompute(model, config.activation_checkpointing, config.checkpoint_method,
                  config.checkpoint_num_layers, early_stop=not visiting)
    if fused:
        kernels.compile(model, **peer.COMPILE_OPTIONS if visiting else {})
    text += ["compiled" if fused else "not compiled"]
    text += ["tp collectives under the products"] if visiting else []
    return model, ", ".join(text)


def build_optimizer(run: Run, model: ViT) -> tuple[ShardedOptimizer, str]:
    """(the optimizer, what the log says of its exchange)."""
    config, peer = run.config, optional("peer") if run.grid.world.size > 1 else None
    if config.peer_copies and peer is None:
        raise ValueError("--peer-copies needs peer.py, which is not here")
    exchange = peer and peer.gradient_exchange(model, run.grid, run.device, config.peer_copies)
    optimizer = ShardedOptimizer(
        model, run.grid, optimizer=config.optimizer, weight_decay=config.weight_decay,
        weight_dtype=torch.bfloat16 if config.o2 else torch.float32,
        betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps,
        momentum=config.momentum, clip_grad=config.clip_grad, layer_decay=config.layer_decay,
        ema_decay=config.ema_decay, exchange=exchange)
    if run.grid.world.size > 1:
        optimizer.after_backward = run.mark_backward
    copies = peer is not None and isinstance(exchange, peer.PeerCopies)
    return optimizer, ", gradients summed by peer copies" if copies else ""


# ----------------------------------------------------------------------------- the machine
def memory_gib(optimizer: ShardedOptimizer) -> float:
    """Peak memory of this process: the CUDA allocator's and what peers read, which is not in it; or
    resident memory on the CPU."""
    if optimizer.device.type == "cuda":
        peer = optional("peer")
        shared = peer.shared_bytes(optimizer.exchange) if peer else 0
        return (torch.cuda.max_memory_allocated() + shared) / 2**30
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def host_memory_room() -> float:
    """Bytes of host memory that each process of this machine may take: 90 % of what the machine, or
    the control group of the job, can still give; 0 where it does not tell."""
    free, group = 0.0, Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, IndexError, TypeError):
        meminfo = Path("/proc/meminfo").read_text()
        free = int(re.search(r"MemAvailable: *(\d+) kB", meminfo)[1]) * 1024
        group /= Path("/proc/self/cgroup").read_text().split("::")[1].strip().lstrip("/")
        most = int((group / "memory.max").read_text())  # ValueError if it is the word max
        cached = re.search(r"^file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
        free = min(free, most - int((group / "memory.current").read_text()) + int(cached[1]))
    return 0.9 * free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def peak_flops(device: torch.device) -> float | None:
    name = device_name(device)
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
