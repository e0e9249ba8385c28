"""What the tests share: ranks on this machine, small models, small folders of images, the commands.

`run_ranks(world, function, *args)` is the one helper for everything that is split: it runs the
function on `world` gloo processes with torchrun's environment.
"""

import faulthandler
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image

import data
import parallel
import samples
import splits
import train
from configs import TrainConfig, ViTConfig, stable_seed
from model import ViT
from parallel import Grid, ShardedOptimizer, make_grid
from recipes import parse_run
from saver import Saver

HERE = Path(__file__).parent
torch.set_num_threads(1)

# Eight images, two blocks, every kind of parameter; drop rates are set by the tests.
TINY = ViTConfig(hidden_size=32, ffn_hidden_size=64, num_layers=2, num_attention_heads=4,
                 patch_size=4, image_size=(8, 16), num_classes=5, num_class_tokens=2,
                 hidden_dropout=0.0)
# The same with all that other libraries' models have.
OTHER = replace(TINY, pool="mean", fc_norm=True, layerscale=0.5, pre_norm=True, head="linear",
                gelu_approximate="quick")


# ----------------------------------------------------------------------------- ranks
# Ranks are forked from a server that has imported everything once, so a test with four ranks costs
# tenths of a second, and no rank inherits autograd or OpenMP threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["testing", "kernels", "peer", "weights", "pytest",
                                "torch._dynamo", "torchvision.transforms.v2"])
if os.environ.setdefault("TESTS_OF", str(os.getpid())) == str(os.getpid()):  # not in the server
    forkserver.ensure_running()  # it imports beside pytest, which collects


def _rank_main(rank, world, folder, port, function, args):
    log = open(f"{folder}/output_{rank}", "wb", buffering=0)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                      LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      TORCHELASTIC_USE_AGENT_STORE="True")
    try:
        torch.save(function(*args), f"{folder}/result_{rank}")
    except SystemExit as stop:  # as a program: a code, or a last line
        print(stop.code if isinstance(stop.code, str) else "", file=sys.stderr, end="", flush=True)
        os._exit(stop.code if isinstance(stop.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def start_ranks(world, folder, function, *args):
    """(`world` started processes, the store they meet in).

    The processes have torchrun's environment, call function(*args) and leave output_RANK and
    result_RANK in the folder. The store is kept here, as torchrun keeps it: a rank 0 that has
    ended would take its own along, while others may still be joining a group.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [CONTEXT.Process(target=_rank_main, args=(r, world, folder, store.port, function, args))
             for r in range(world)]
    for process in ranks:
        process.start()
    return ranks, store


def run_ranks(world, function, *args, check=True, timeout=120):
    """function(*args) on `world` processes with torchrun's environment.

    Returns (results, exit codes, outputs) by rank; with check, fails the test if a rank failed.
    Ranks that are late tell where they stand, in a warning that pytest shows, and try once more:
    what made gloo hang was found so (parallel._all_gather_of_gloo), and may not be all.
    """
    for last in (False, True):
        results, codes, outputs, late = _run_once(world, function, args, timeout)
        text = "\n".join([f"ranks {late} were still running after {timeout} s:", *outputs])
        if not late:
            break
        assert not last, text
        warnings.warn(text, stacklevel=2)
    if check:
        assert codes == [0] * world, "\n".join(outputs)
    return results, codes, outputs


def _run_once(world, function, args, timeout):
    """(results, exit codes, outputs) by rank, and which ranks were still running."""
    with tempfile.TemporaryDirectory() as folder:
        ranks, _store = start_ranks(world, folder, function, *args)
        deadline = time.monotonic() + timeout
        for process in ranks:
            process.join(max(deadline - time.monotonic(), 0.1))
        late = [r for r, process in enumerate(ranks) if process.is_alive()]
        for r in late:  # says where it stands
            os.kill(ranks[r].pid, signal.SIGUSR1)
        time.sleep(bool(late))
        native = {r: _native_state(ranks[r].pid) for r in late}
        for process in ranks:
            process.kill()
            process.join()
        outputs = [Path(f"{folder}/output_{r}").read_text(errors="replace") + native.get(r, "")
                   for r in range(world)]
        codes = [process.exitcode for process in ranks]
        results = [torch.load(f"{folder}/result_{r}") if codes[r] == 0 else None
                   for r in range(world)]
        return results, codes, outputs, late


def _native_state(pid):
    """Each thread's processor time, page faults and stack, and the sockets' queues; what this
    machine has no command for is left out."""
    commands = [f"ps -L -o tid,time,min_flt,stat,wchan:24,comm -p {pid}",
                f"ss -tnp | grep pid={pid},", f"gdb -p {pid} -batch -ex 'thread apply all bt'"]
    return subprocess.run("; ".join(commands), shell=True, capture_output=True, text=True).stdout


def in_turn(*calls):
    """The results of (function, *arguments) each, for run_ranks: one start of ranks for several."""
    return [function(*args) for function, *args in calls]


def grid_of(tp):
    """The grid of a test's rank; joins the gloo group that run_ranks announces."""
    if int(os.environ["WORLD_SIZE"]) == 1:
        return Grid()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return make_grid(tp, "cpu")


# ----------------------------------------------------------------------------- models
def random_weights(config, seed=1, scale=0.1):
    """A full state dict with no zeros: biases, norms and tokens take part in every comparison."""
    model = ViT(config)
    return {name: tensor + scale * torch.randn(tensor.shape, generator=generator(seed, name))
            for name, tensor in model.state_dict().items()}


def generator(*parts):
    return torch.Generator().manual_seed(stable_seed(*parts))


def batch_of(config, count, seed=2):
    g = generator(seed)
    images = torch.randn(count, config.num_channels, *config.image_hw, generator=g)
    return images, torch.randint(0, config.num_classes, (count,), generator=g)


def build(config, grid, weights, **options):
    """The model of `weights` (a full state dict) on this rank of the grid."""
    model = ViT(config, grid, **options)
    shards = {n: parallel.shard(weights[n], p, grid.tp) for n, p in model.named_parameters()}
    model.load_state_dict(shards, strict=True)
    return model


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def max_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def optimizer_of(model, grid, **options):
    return ShardedOptimizer(model, grid, **{"weight_decay": 0.1, "clip_grad": 0.1, **options})


def full_weights(optimizer):
    return {name: t for name, kind, t in optimizer.full_tensors() if kind == "weight"}


def save_checkpoint(root, step, optimizer, meta, keep_last=0):
    """Writes root/step_NNNNNNNN as a run does, and waits for it; returns its path."""
    saver = Saver(root, optimizer, keep_last=keep_last)
    saver.begin(step, meta)
    saver.wait()
    return saver.newest


# ----------------------------------------------------------------------------- commands
TRAIN_FLAGS = [
    "--data", "shapes", "--recipe", "demo", "--image-size", "16", "--hidden-size", "32",
    "--ffn-hidden-size", "64", "--num-layers", "2", "--num-attention-heads", "4",
    "--num-class-tokens", "3", "--global-batch-size", "32", "--max-steps", "20", "--log-interval",
    "1", "--eval-interval", "0", "--save-interval", "0", "--warmup-steps", "5"]


def run_training(output, *flags, world=1, check=True):
    """train.py's main() with TRAIN_FLAGS and `flags`; returns (metrics lines, codes, outputs)."""
    argv = [*TRAIN_FLAGS, "--output-dir", str(output), *map(str, flags)]
    _, codes, outputs = run_ranks(world, train_main, argv, check=check)
    path = Path(output) / "metrics.jsonl"
    lines = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    return lines, codes, outputs


def train_main(argv):
    """train.main; of the drawn validation images only 80, since evaluation has its own tests."""
    config, vit, _ = parse_run(TrainConfig, argv)
    train.main(argv, [Drawn(vit.image_hw, split) for split in ("train", "val")]
               if config.data == "shapes" else
               splits.open_data(config.data, vit.image_hw, config.val_labels))


class Drawn(samples.Shapes):
    """The shapes, those of TRAIN_FLAGS drawn before the ranks are forked: that takes as long as 20
    steps."""

    def __len__(self):
        return super().__len__() if self.split == "train" else 80

    def load(self, index):
        return _drawn(self.image_hw, self.split, index)


@functools.cache
def _drawn(image_hw, split, index):
    return samples.Shapes(image_hw, split).load(index)


for _split, _indices in ("train", data.order(8000, 0, 0)[:20 * 32]), ("val", range(80)):
    for _index in _indices:
        _drawn((16, 16), _split, int(_index))


class Few:
    """The first images of a source."""

    def __init__(self, source, n):
        self.source, self.n, self.classes, self.name = source, n, source.classes, source.name

    def __len__(self):
        return self.n

    def load(self, index):
        return self.source.load(index)


def losses(lines):
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def run_command(main, *argv, world=1, code=0):
    """A command's main() with these flags on `world` ranks: what rank 0 printed. code: rank 0's
    exit code; for an error there must be one line of it, and no traceback."""
    _, codes, outputs = run_ranks(world, main, list(map(str, argv)), check=False)
    assert codes[0] == code, outputs[0]
    assert code == 0 or outputs[0].count(".py: error:") == 1 and "Traceback" not in outputs[0]
    return outputs[0]


# ----------------------------------------------------------------------------- images
def paint(path, size=(40, 30), mode="RGB", colour=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour or 0).save(path, **options)
    return path


def make_folder(root, train=("a", "b"), val=("a", "b")):
    for split, names in (("train", train), ("val", val)):
        for name in names:
            paint(root / split / name / "1.png")
    return root
