"""What is promised, as claims that run: `python -m pytest test_vit.py`, CPU only, gloo ranks.

A test's name is the claim, its docstring the specification, and each tolerance says why it is what
it is. Every split of the computation is compared with the unsplit one: batch >= 2 on every rank,
non-zero biases, dropout where it matters.
"""

import contextlib
import csv
import faulthandler
import gc
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import types
import weakref
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.multiprocessing.reductions import StorageWeakRef

import data as data_module
import model as model_module
import parallel
import train
from configs import (
    MODELS,
    RECIPES,
    TrainConfig,
    ViTConfig,
    legal_tensor_parallel_sizes,
    parse_args,
    plan_batch,
    stable_seed,
)
from model import ViT, compile_blocks
from parallel import Grid, ShardedOptimizer, Split, make_grid

HERE = Path(__file__).parent
torch.set_num_threads(1)

# Eight images, two blocks, every kind of parameter; drop rates are set by the tests.
TINY = ViTConfig(hidden_size=32, ffn_hidden_size=64, num_layers=2, num_attention_heads=4,
                 patch_size=4, image_size=(8, 16), num_classes=5, num_class_tokens=2,
                 hidden_dropout=0.0)


# ----------------------------------------------------------------------------- harness
# Ranks are forked from a server that has imported everything once, so a test with four ranks costs
# tenths of a second, and no rank inherits autograd or OpenMP threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["test_vit"])


def _rank_main(rank, world, folder, port, function, args):
    log = open(f"{folder}/output_{rank}", "wb", buffering=0)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                      LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        torch.save(function(*args), f"{folder}/result_{rank}")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def run_ranks(world, function, *args, check=True, timeout=120):
    """function(*args) on `world` processes with torchrun's environment.

    Returns (results, exit codes, outputs) by rank; with check, fails the test if a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        ranks = [CONTEXT.Process(target=_rank_main, args=(r, world, folder, port, function, args))
                 for r in range(world)]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout
        for process in ranks:
            process.join(max(deadline - time.monotonic(), 0.1))
        late = [r for r, process in enumerate(ranks) if process.is_alive()]
        for r in late:  # says where it stands
            os.kill(ranks[r].pid, signal.SIGUSR1)
        time.sleep(bool(late))
        for process in ranks:
            process.kill()
            process.join()
        outputs = [Path(f"{folder}/output_{r}").read_text(errors="replace") for r in range(world)]
        codes = [process.exitcode for process in ranks]
        assert not late, f"ranks {late} were still running after {timeout} s:\n{outputs}"
        if check:
            assert codes == [0] * world, "\n".join(outputs)
        results = [torch.load(f"{folder}/result_{r}") if codes[r] == 0 else None
                   for r in range(world)]
        return results, codes, outputs


def grid_of(tp):
    """The grid of a test's rank; joins the gloo group that run_ranks announces."""
    if int(os.environ["WORLD_SIZE"]) == 1:
        return Grid()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return make_grid(tp, "cpu")


class FileMemory:
    """torch's symmetric memory for processes on a CPU: files that all of them map."""

    def __init__(self, folder, log):
        self.folder, self.log, self.count = folder, log, 0
        self.enable_symm_mem_for_group = lambda name: None

    def empty(self, numel, dtype, device):
        self.numel, self.dtype, self.count = numel, dtype, self.count + 1
        self.map(dist.get_rank()).view(torch.uint8).fill_(255)  # NaN, in every type
        return self.map(dist.get_rank())

    def map(self, rank):
        return torch.from_file(f"{self.folder}/{self.count}_{rank}", True, self.numel,
                               dtype=self.dtype)

    def rendezvous(self, memory, group_name):
        group = dist.distributed_c10d._resolve_process_group(group_name)
        dist.barrier(group)
        memories = [self.map(rank) for rank in dist.get_process_group_ranks(group)]

        def get_buffer(rank, shape, dtype, offset):
            return memories[rank].view(dtype)[offset:offset + math.prod(shape)].view(shape)

        def barrier():
            self.log.append("barrier")
            dist.barrier(group)
        return types.SimpleNamespace(get_buffer=get_buffer, barrier=barrier)


def share_files(folder, log):
    """Gives this process and its peers memory through FileMemory, and stand-ins for streams; log:
    what happens on these and in memory, one after the other."""
    event = types.SimpleNamespace(wait=lambda: log.append("wait"),
                                  record=lambda: log.append("ready"))
    stream = types.SimpleNamespace(wait_stream=lambda other: log.append("gradients"),
                                   wait_event=lambda event: log.append("after"),
                                   record_event=lambda: log.append("end") or event)
    torch.cuda.Stream = torch.cuda.current_stream = lambda: stream
    torch.cuda.Event = lambda: event
    torch.cuda.stream, torch.cuda.synchronize = contextlib.nullcontext, lambda: None
    parallel.symm_mem = FileMemory(folder, log)
    parallel.peers_in_reach = lambda axis, device: axis.size > 1
    parallel.symm_mem.Work, works = partial(Late, log), []
    shift, register = parallel.PeerExchange.shift, torch._C._distributed_c10d._register_work

    def begin(self, x, i):
        result = shift(self, x, i)
        works[-1].delay(x, result)
        return result

    def begun(result, work):
        log.append("begun")
        works.append(work)
        register(result, work)
    parallel.PeerExchange.shift, torch._C._distributed_c10d._register_work = begin, begun
    return works


class Late(torch._C._distributed_c10d.Work):
    """A shift's end: its result is NaN before, as on a GPU what it sends is still to be copied and
    its result to be written: neither may have been freed, nor the first changed."""

    def __init__(self, log):
        super().__init__()
        self.log, self.pending = log, False

    def delay(self, *tensors):
        self.places = [(StorageWeakRef(x.untyped_storage()), x.dtype, x.storage_offset(), x.shape)
                       for x in tensors]
        self.sent, self.value = (x.clone() for x in tensors)
        tensors[1].fill_(float("nan"))
        self.pending = True

    def wait(self, timeout=None):
        if self.pending:
            self.log.append("wait")
            assert not any(place[0].expired() for place in self.places), "freed"
            sent, result = (
                torch.empty(0, dtype=dtype).set_(
                    torch.UntypedStorage._new_with_weak_ptr(ref.cdata), offset, shape)
                for ref, dtype, offset, shape in self.places)
            assert torch.equal(sent, self.sent), "changed"
            result.copy_(self.value)
            self.pending = False
        return True


def overlapped_grid(grid, folder, log=None):
    """(the grid, with tensor-parallel shifts through files; these, as they begin)."""
    works = share_files(folder, [] if log is None else log)
    return replace(grid, tp=parallel.overlapped(grid.tp, torch.device("cpu"), None)), works


def random_weights(config, seed=1, scale=0.1):
    """A full state dict with no zeros: biases, norms and tokens take part in every comparison."""
    model = ViT(config)
    return {name: tensor + scale * torch.randn(tensor.shape, generator=_generator(seed, name))
            for name, tensor in model.state_dict().items()}


def _generator(*parts):
    return torch.Generator().manual_seed(stable_seed(*parts))


def batch_of(config, count, seed=2):
    g = _generator(seed)
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


TRAIN_FLAGS = [
    "--data", "shapes", "--recipe", "demo", "--image-size", "16", "--hidden-size", "32",
    "--ffn-hidden-size", "64", "--num-layers", "2", "--num-attention-heads", "4",
    "--num-class-tokens", "3", "--global-batch-size", "32", "--max-steps", "20", "--log-interval",
    "1", "--eval-interval", "0", "--save-interval", "0", "--warmup-steps", "5"]


def run_training(output, *flags, world=1, check=True):
    """train.py's main() with TRAIN_FLAGS and `flags`; returns (metrics lines, codes, outputs)."""
    argv = [*TRAIN_FLAGS, "--output-dir", str(output), *map(str, flags)]
    _, codes, outputs = run_ranks(world, _train_main, argv, check=check)
    path = Path(output) / "metrics.jsonl"
    lines = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    return lines, codes, outputs


def _train_main(argv):
    data_module.SHAPES_VAL = 80  # evaluation has its own test
    train.main(argv)


def losses(lines):
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


# ----------------------------------------------------------------------------- configs.py
def test_sizes_are_those_of_nemos_table():
    """Sequence lengths 204 / 264, head sizes, and parameters in millions to the digit, without
    head and with a 1000-way linear head."""
    table = {"B16": (204, 64, 85.81, 86.58), "L16": (204, 64, 303.32, 304.34),
             "H16": (204, 80, 630.94, 632.22), "H14": (264, 80, 630.78, 632.06),
             "g14": (264, 88, 1011.22, 1012.63), "G14": (264, 104, 1842.80, 1844.46)}
    for name, (seq, head_dim, bare, with_head) in table.items():
        vit = replace(MODELS[name], head="linear")
        head = vit.hidden_size * 1000 + 1000
        assert (vit.seq_length, vit.head_dim) == (seq, head_dim)
        assert round(vit.num_params / 1e6, 2) == with_head, name
        assert abs((vit.num_params - head) / 1e6 - bare) < 0.011, name
    # multiply-adds of timm's B/16 at 197 tokens: 17.58 G, as its model card says
    assert abs(replace(MODELS["B16"], head="linear", num_class_tokens=1).flops_per_image
               / 2e9 - 17.58) < 0.03


@pytest.mark.parametrize("head", ["mlp", "linear"])
@pytest.mark.parametrize("name", MODELS)
def test_num_params_counts_the_models_parameters(name, head):
    """The property equals the sum over the built model (on the meta device), for each model."""
    config = replace(MODELS[name], head=head, num_classes=7)
    with torch.device("meta"):
        assert sum(p.numel() for p in ViT(config).parameters()) == config.num_params


def test_every_field_is_a_flag_and_unknown_flags_fail(capsys):
    """--help lists each field of both dataclasses; a misspelt flag exits with code 2."""
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for cls in (TrainConfig, ViTConfig):
        for field in fields(cls):
            assert "--" + field.name.replace("_", "-") in text
    with pytest.raises(SystemExit) as stop:
        parse_args(["--hidden-dropuot", "0.1"])
    assert stop.value.code == 2


def test_recipes_and_flags_override_in_order():
    """Defaults, then the recipe, then flags; L/16 is L16; fine-tuning's size follows the patch."""
    config, vit, given = parse_args(["--model", "L/16", "--data", "d", "--lr", "0.1"])
    assert (config.recipe, config.model, config.lr, config.weight_decay) == (
        "pretrain", "L16", 0.1, 0.3)
    assert set(given) == {"model", "data", "lr"} and vit.hidden_dropout == 0.1
    config, vit, _ = parse_args([])
    assert (config.recipe, config.model) == ("demo", "demo")
    for model, size in (("H14", 518), ("B16", 512)):
        flags = ["--recipe", "finetune", "--model", model, "--data", "d"]
        assert parse_args(flags)[1].image_size == size
    assert parse_args(["--image-size", "64,32"])[1].image_hw == (64, 32)


def test_learning_rate_is_a_pure_function_of_the_step():
    """Linear warm-up that reaches lr, cosine that ends exactly at min_lr, no jump between them."""
    config = TrainConfig(lr=1.0, min_lr=0.1, warmup_steps=10)
    rates = [train.learning_rate(step, config, 100) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[10] == 1.0
    assert abs(rates[-1] - 0.1) < 1e-12
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_global_batch_is_micro_times_dp_times_accumulation():
    """The plan satisfies the equation for every legal layout; illegal ones name legal values."""
    for world, tp in [(1, 1), (2, 1), (4, 2), (8, 4)]:
        config = TrainConfig(global_batch_size=64, tensor_parallel_size=tp)
        micro, dp, accumulation = plan_batch(config, world, False)
        assert micro * dp * accumulation == 64 and dp == world // tp and micro % tp == 0
    with pytest.raises(ValueError, match="nearest: 60, 66"):
        plan_batch(TrainConfig(global_batch_size=64), 6, False)
    with pytest.raises(ValueError, match="nearest: 48, 72"):
        plan_batch(TrainConfig(global_batch_size=64, micro_batch_size=12), 2, False)
    assert legal_tensor_parallel_sizes(MODELS["B16"]) == [1, 2, 3, 4, 6, 12]
    assert legal_tensor_parallel_sizes(MODELS["G14"]) == [1, 2, 4, 8, 16]
    assert all(key in {f.name for c in (TrainConfig, ViTConfig) for f in fields(c)}
               for recipe in RECIPES.values() for key in recipe)


# ----------------------------------------------------------------------------- model.py
def logits_difference(name, reference, rename=dict):
    """Largest difference of our logits and a library's for the same random weights, fp32.

    reference: the library's model on the meta device; rename: its state dict's names -> ours.
    """
    weights = {k: 0.03 * torch.randn(v.shape, generator=_generator(k))
               + (v.ndim == 1 and k.endswith("weight"))  # norms around 1
               for k, v in reference.state_dict().items()}
    reference.load_state_dict(weights, assign=True)
    with torch.device("meta"):
        ours = ViT(replace(MODELS[name], num_class_tokens=1, head="linear"))
    ours.load_state_dict(rename(weights), strict=True, assign=True)
    images = torch.randn(2, 3, 224, 224, generator=_generator(0))
    with torch.no_grad():
        expected = reference.eval()(images)
        assert expected.std() > 0.1, "the comparison would be of zeros"
        return (ours.eval()(images) - expected).abs().max()


@pytest.mark.parametrize("name, theirs", [("B16", "vit_base_patch16_224"),
                                          ("L16", "vit_large_patch16_224")])
def test_logits_equal_timms(name, theirs):
    """Same weights, loaded strictly with no mapping, same logits as timm to 1e-4 in fp32."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        reference = timm.create_model(theirs)
    assert logits_difference(name, reference) < 1e-4


@pytest.mark.parametrize("name, theirs", [("B16", "vit_b_16"), ("L16", "vit_l_16")])
def test_logits_equal_torchvisions(name, theirs):
    """Same weights, same logits as torchvision's ViT to 1e-4 in fp32 (12 or 24 blocks of rounding;
    a wrong epsilon or GELU shows at 1e-3)."""
    import torchvision
    with torch.device("meta"):
        reference = getattr(torchvision.models, theirs)()
    names = model_module.NAMES["torchvision"]
    assert logits_difference(name, reference, lambda weights: {
        model_module.rename(k, names): v for k, v in weights.items()}) < 1e-4


def test_initialisation_is_nemos():
    """Std 0.02, residual outputs 0.02 / sqrt(2L), tokens zero, head bias -10 or a zero head."""
    model = ViT(replace(MODELS["S16"], num_layers=8))
    for name, std in [("blocks.3.attn.qkv.weight", 0.02), ("blocks.3.mlp.fc2.weight", 0.005),
                      ("patch_embed.proj.weight", 0.02), ("pos_embed", 0.02)]:
        assert abs(model.get_parameter(name).std().item() / std - 1) < 0.02, name
    assert not model.cls_token.any() and (model.head.bias == -10).all()
    assert not model.blocks[0].mlp.fc1.bias.any() and (model.norm.weight == 1).all()
    linear = ViT(replace(TINY, head="linear"))
    assert not linear.head.weight.any() and not linear.head.bias.any()


def test_dropout_and_drop_path_act_in_training_only():
    """In eval two passes are equal; in training each of the three rates alone makes them differ,
    and drop path removes a block half for whole images."""
    images, _ = batch_of(TINY, 4)
    weights = random_weights(TINY)
    for rate in ("hidden_dropout", "attention_dropout", "drop_path_rate"):
        model = build(replace(TINY, **{rate: 0.5}), Grid(), weights)
        assert not torch.equal(model(images), model(images)), rate
        model.eval()
        assert torch.equal(model(images), model(images)), rate
    torch.manual_seed(0)
    path = model_module.DropPath(0.25)
    kept = path(torch.ones(4000, 2, 3)).mean((1, 2))
    assert set(kept.mul(0.75).tolist()) == {0.0, 1.0}
    assert abs((kept > 0).float().mean() - 0.75) < 0.02


def test_dropout_is_a_hash_of_seed_and_element():
    """Zeros at the rate, in every row and column, the rest scaled by 1 / (1 - rate); neighbours in
    any direction and masks of other seeds, also of close ones, are uncorrelated. Bounds are 5
    standard deviations of independent draws; rate 0.1 of 600 x 500 elements."""
    n, m, rate = 600, 500, 0.1

    def kept(seed):
        y = model_module.dropout(torch.ones(n, m), rate, torch.tensor(seed, dtype=torch.int32))
        assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - rate)).item()}
        return (y > 0).double()

    def correlation(a, b):
        return abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item())
    first, spread = kept(7), 5 * (rate * (1 - rate)) ** 0.5
    assert torch.equal(first, kept(7))
    assert abs(1 - rate - first.mean()) < spread / (n * m) ** 0.5
    assert (1 - rate - first.mean(0)).abs().max() < spread / n ** 0.5
    assert (1 - rate - first.mean(1)).abs().max() < spread / m ** 0.5
    bound = 5 / (n * m) ** 0.5
    for other in (first.roll(1, 0), first.roll(1, 1), first.roll(4, 1), kept(6), kept(8),
                  kept(7 + 2**16), kept(-2**31)):
        assert correlation(first, other) < bound


@pytest.mark.parametrize("check", ["_check_short_attention", "_check_cast_both"])
def test_triton_kernels_equal_the_plain_computation(check):
    """Triton's interpreter runs them on the CPU; each check says what it compares."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = f"import test_vit; test_vit.{check}()"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True,
                          text=True, timeout=120, cwd=HERE)
    assert done.returncode == 0, done.stderr


def _check_cast_both():
    """Numbers that the format holds, 2 x 70 x 150 of them in tiles that are not full, times 4: the
    plain computation's exactly (the interpreter's own rounding is wrong); the transpose holds the
    same, the factor back is 1/4, and what is too large becomes the largest."""
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        largest = torch.finfo(dtype).max
        x = torch.randn(2, 70, 150, generator=_generator("x")).to(dtype).to(torch.bfloat16)
        x[1, 60, 140] = -largest
        y, y_t, unscale = parallel.cast_both(x, torch.tensor(largest / 4), dtype)
        assert torch.equal(y.float(), (4 * x.float()).clamp(-largest, largest).view(140, 150))
        assert torch.equal(y_t.float(), y.float().t()) and unscale == 1 / 4
        for top, factor in [(0.0, 1e-12 / largest), (float("inf"), float("inf"))]:
            assert parallel.cast_both(x, torch.tensor(top), dtype)[2] == pytest.approx(factor)
        assert parallel.cast_both(x, torch.tensor(float("nan")), dtype)[2].isnan()


def _check_short_attention():
    """dqkv and the bias gradient of 100 tokens (two tiles of keys, the second not full), 2 images,
    2 heads, against autograd in fp32. 1e-6 of the norm: sums in another order, exp2 for exp. Then
    with a part that all keys share, which makes every score about -800 and changes no gradient but
    dq's rounding (1e-3): the keys beyond the 100th, at 0, must not win."""
    B, S, heads, hd = 2, 100, 2, 64
    for shift, tolerance in [(0.0, 1e-6), (10.0, 1e-3)]:
        qkv = torch.randn(B, S, 3, heads, hd, generator=_generator("qkv"))
        qkv[:, :, 0] += shift
        qkv[:, :, 1] -= shift
        qkv = qkv.flatten(2).requires_grad_()
        dy = torch.randn(B, S, heads * hd, generator=_generator("dy"))
        q, k, v = (z.transpose(1, 2) for z in qkv.unflatten(-1, (3, heads, hd)).unbind(2))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y.backward(dy)
        lse = (q @ k.transpose(-1, -2) / hd ** 0.5).logsumexp(-1)
        dqkv, sums = model_module.short_attention_backward(qkv.detach(), y.detach(), dy,
                                                           lse.detach(), hd)
        for ours, theirs in [(dqkv, qkv.grad), (sums.sum(0), qkv.grad.sum((0, 1)))]:
            assert (ours - theirs).norm() < tolerance * theirs.norm()


def test_fp8_linear_multiplies_the_rounded_tensors():
    """y, dx and dW are products of x and W rounded to e4m3 and dy rounded to e5m2, each scaled so
    that its largest element is the format's: within 2^-8 of the norm, the rounding of a bf16
    result. The bias gradient takes dy as it is. A missing factor or transpose would be 100 %."""
    x, dy, weight, bias = (torch.randn(shape, generator=_generator(shape)).bfloat16()
                           for shape in [(2, 24, 32), (2, 24, 48), (48, 32), (48,)])
    inputs = [z.requires_grad_() for z in (3 * x, 0.1 * weight, bias)]
    y = parallel.Fp8Linear.apply(*inputs)
    dx, dweight, dbias = torch.autograd.grad(y, inputs, dy)

    def rounded(z, dtype):
        scale = torch.finfo(dtype).max / z.abs().max().float()
        return (z.detach().float() * scale).to(dtype).float() / scale
    x8, w8 = (rounded(z, torch.float8_e4m3fn) for z in inputs[:2])
    dy8 = rounded(dy, torch.float8_e5m2)
    for ours, exact in [(y, x8 @ w8.t() + bias.float()), (dx, dy8 @ w8),
                        (dweight, torch.einsum("bsf,bsk->fk", dy8, x8)),
                        (dbias, dy.float().sum((0, 1)))]:
        assert (ours.float() - exact).norm() < 2**-8 * exact.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fp8_does_not_hide_what_is_not_finite(value):
    """One such element of x or dy, and no element of y or of dx, dW is finite: the step is skipped
    as it would be in bf16 (clamped to the format's range, it would look like a good one)."""
    x, weight, dy = (torch.randn(shape, generator=_generator(shape)).bfloat16()
                     for shape in [(2, 24, 32), (48, 32), (2, 24, 48)])
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    y = parallel.Fp8Linear.apply(*inputs, None)
    dy[1, 2, 3] = value
    gradients = torch.autograd.grad(y, inputs, dy)
    with torch.no_grad():
        x[1, 2, 3] = value
    for z in (parallel.Fp8Linear.apply(*inputs, None), *gradients):
        assert not z.isfinite().any()


def test_fp8_products_are_for_training_only():
    """In eval mode a model with fp8 products gives the bf16 model's logits, bit for bit; in
    training other ones, within 10 % (four products of 3 mantissa bits, 2 to 3 % each)."""
    config = replace(TINY, num_layers=1)
    weights, (images, _) = random_weights(config), batch_of(config, 8)
    plain, fp8 = (build(config, Grid(), weights, fp8=on).bfloat16() for on in (False, True))
    images = images.bfloat16()
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), fp8.eval()(images))
        exact, rounded = plain.train()(images).float(), fp8.train()(images).float()
    assert 0 < (exact - rounded).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("mode", [("selective", "uniform", 1), ("full", "uniform", 1),
                                  ("full", "uniform", 2), ("full", "block", 1)])
@pytest.mark.parametrize("fp8", [False, True])
def test_activation_checkpointing_leaves_gradients_bit_equal(mode, fp8):
    """Recomputation replays dropout, attention dropout and drop path exactly: no tolerance. Also
    with products in fp8, whose scales are found again."""
    config = replace(TINY, num_layers=3, hidden_dropout=0.2, attention_dropout=0.1,
                     drop_path_rate=0.3)
    weights, (images, labels) = random_weights(config), batch_of(config, 8)
    dtype = torch.bfloat16 if fp8 else torch.float32

    def run(granularity, method, layers):
        model = build(config, Grid(), weights, activation_checkpointing=granularity,
                      checkpoint_method=method, checkpoint_num_layers=layers, fp8=fp8).to(dtype)
        torch.manual_seed(3)
        F.cross_entropy(model(images.to(dtype)).float(), labels).backward()
        return gradients(model)
    plain, recomputed = run("none", "uniform", 1), run(*mode)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_activation_checkpointing_keeps_fewer_activations():
    """Bytes kept for backward: none > full; block of 1 layer lies between. (What selective keeps is
    held by the policy, out of sight of these hooks.)"""
    config = replace(TINY, num_layers=4, hidden_dropout=0.1)
    images, _ = batch_of(config, 4)

    def kept(*mode):
        model, seen = ViT(config, activation_checkpointing=mode[0], checkpoint_method=mode[1],
                          checkpoint_num_layers=1), {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(t):
            if t.untyped_storage().data_ptr() not in own:
                seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model(images)
        del out
        return sum(seen.values())
    assert kept("none", "uniform") > kept("full", "block") > kept("full", "uniform")


def _compiled_beside_eager(tp, folder):
    """For a compiled model, and one with selective recomputation, cut into forward and backward
    like it but run eagerly, to save time: the largest difference of gradients from the eager
    model's, graphs, bytes that a block keeps for backward, apart from weights, and the plan's."""
    grid = overlapped_grid(grid_of(tp), folder)[0] if folder else grid_of(tp)
    config = replace(TINY, hidden_dropout=0.1)
    weights, (images, labels) = random_weights(config), batch_of(config, 4)
    mine = slice(grid.tp.rank * 4 // tp, (grid.tp.rank + 1) * 4 // tp)

    def run(model):
        torch.manual_seed(3)
        F.cross_entropy(model(images[mine]), labels[mine], reduction="sum").backward()
        return gradients(model)

    eager, results = run(build(config, grid, weights)), []
    for mode in ("none", "selective"):
        model, kept = build(config, grid, weights, activation_checkpointing=mode), {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(t, kept=kept, own=own):
            if t.untyped_storage().data_ptr() not in own:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        def run_blocks(*args, run_blocks=model.run_blocks, pack=pack):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                return run_blocks(*args)

        model.run_blocks = run_blocks
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        if mode == "none":
            compile_blocks(model)
        else:
            for block in model.blocks:
                block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False,
                                              backend="aot_eager_decomp_partition")
        difference = max_difference(run(model), eager)
        flags = TrainConfig(activation_checkpointing=mode, tensor_parallel_size=tp,
                            precision="fp32", tp_comm_overlap=bool(folder))
        one, two = (train.activation_bytes(replace(config, num_layers=n), flags, 4 // tp)
                    for n in (1, 2))
        results.append((difference, torch._dynamo.utils.counters["stats"]["unique_graphs"],
                        sum(kept.values()) / config.num_layers, two - one))
    return results


@pytest.fixture(scope="module", params=[(1, False), (2, False), (2, True)],
                ids=["tp1", "tp2", "tp2-overlap"])
def compiled(request, tmp_path_factory):
    tp, overlap = request.param
    ranks = run_ranks(tp, _compiled_beside_eager, tp, overlap and tmp_path_factory.mktemp("shared"),
                      timeout=200)[0]
    return [mode for modes in ranks for mode in modes]


def test_compiled_gradients_equal_eager_ones(compiled):
    """torch.compile of embedding and blocks, collectives inside, dropout on, without and with
    selective recomputation (blocks only): each weight's gradient within 1e-5 (sums of a few hundred
    terms in another order), and one graph serves all blocks."""
    for difference, _, _, _ in compiled:
        assert difference < 1e-5
    assert [graphs for _, graphs, _, _ in compiled] == [2, 1] * (len(compiled) // 2)


def test_compiled_blocks_keep_what_the_plan_says(compiled):
    """Within 3 %: the plan leaves out the statistics of norms and attention, a number a token or
    head. (If selective repeated a reduce-scatter, it would keep the product before it.)"""
    for _, _, kept, planned in compiled:
        assert kept == pytest.approx(planned, rel=0.03)


# ----------------------------------------------------------------------------- data.py
HW = (32, 32)
DATA_CONFIG = TrainConfig(global_batch_size=12, num_workers=0, seed=5)


class Few:
    """The first images of a source, so that an epoch is short."""

    def __init__(self, source, n):
        self.source, self.n, self.classes, self.name = source, n, source.classes, source.name

    def __len__(self):
        return self.n

    def load(self, index):
        return self.source.load(index)


def paint(path, size=(40, 30), mode="RGB", colour=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour or 0).save(path, **options)
    return path


def make_folder(root, train=("a", "b"), val=("a", "b")):
    for split, names in (("train", train), ("val", val)):
        for name in names:
            paint(root / split / name / "1.png")
    return root


def train_batches(source, world=1, rank=0, local=12, start_image=0, steps=5, **changes):
    config = replace(DATA_CONFIG, **changes)
    return list(data_module.train_loader(source, config, HW, local, rank, world,
                                         start_image, steps, "cpu"))


def steps_of(batches_of_ranks, steps):
    """Images [steps, 12, ...] and indices in stream order from the micro-batches of all ranks."""
    micros = [batch for same_time in zip(*batches_of_ranks) for batch in same_time]
    return [torch.cat(parts).unflatten(0, (steps, 12)) for parts in zip(*micros)]


def test_order_is_a_permutation_of_seed_and_epoch():
    """Each epoch shows every image once, in an order that seed and epoch change."""
    orders = [data_module.order(100, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(o) == list(range(100)) for o in orders)
    assert len({tuple(o) for o in orders}) == 4


def test_layout_and_resume_do_not_change_batches_or_pixels():
    """World, micro-batch, workers and start step leave the stream and its pixels as they are."""
    source = Few(data_module.Shapes(HW, "train"), 25)  # 60 images: epochs end inside batches
    whole = steps_of([train_batches(source)], 5)
    assert len(whole) == 4 and len(whole[3].flatten(0, 1).unique(dim=0)) == 60  # jitter: own rows
    for world, local in ((1, 4), (2, 3), (3, 4), (4, 1)):
        ranks = [train_batches(source, world, rank, local) for rank in range(world)]
        assert all(map(torch.equal, steps_of(ranks, 5), whole)), (world, local)
    resumed = steps_of([train_batches(source, local=6, start_image=36, steps=2, num_workers=2)], 2)
    assert all(torch.equal(a, b[3:]) for a, b in zip(resumed, whole))
    epochs = whole[2].flatten()[:50].view(2, 25)
    assert all(sorted(epoch.tolist()) == list(range(25)) for epoch in epochs)
    again = [whole[0].flatten(0, 1)[i] for i in (whole[2].flatten() == 7).nonzero().flatten()]
    assert len(again) >= 2 and not torch.equal(again[0], again[1])  # a new view each epoch
    with pytest.raises(ValueError, match="multiple of 5 images x 2 ranks"):
        train_batches(source, 2, 0, 5)


def test_start_step_far_in_the_run_starts_at_once():
    """A resume does not replay the stream."""
    begin = time.perf_counter()
    first = next(iter(data_module.StreamSampler(1000, 0, 8, 4, 1, 2, 10**9, 1)))
    assert time.perf_counter() - begin < 0.1 and first[0][0] == 10**9 // 1000


@pytest.mark.parametrize("workers", [0, 2])
def test_the_trainers_random_state_is_untouched(workers):
    """Neither making views, in the process or in workers, nor starting a loader draws from it."""
    import random
    source = Few(data_module.Shapes(HW, "train"), 25)
    config = replace(DATA_CONFIG, num_workers=workers)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    train_batches(source, num_workers=workers)
    list(data_module.eval_loader(source, config, HW, 7, 0, 1, "cpu"))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


def test_views_draw_from_torch_alone():
    """NeMo's transforms give the same view whatever python's and numpy's generators hold."""
    import random
    image = data_module.Shapes((64, 48), "train").load(3)[0]
    transform = data_module.train_transform(DATA_CONFIG, HW)
    views = []
    for seed in range(8):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(0)
        views.append(np.asarray(transform(image)).tobytes())
    assert len(set(views)) == 1


@pytest.mark.parametrize("world, batch", list(itertools.product((1, 2, 3, 4), (7, 64))))
def test_evaluation_counts_each_image_once(world, batch):
    """All ranks have as many equal batches; every image is in one; the rest is padding."""
    source = Few(data_module.Shapes(HW, "val"), 45)
    ranks = [list(data_module.eval_loader(source, DATA_CONFIG, HW, batch, r, world, "cpu"))
             for r in range(world)]
    assert {len(batches) for batches in ranks} == {-(-45 // (batch * world))}
    images, labels, indices = map(torch.cat, zip(*(b for batches in ranks for b in batches)))
    assert images.shape[1:] == (3, *HW) and len(images) % (world * batch) == 0
    assert sorted(indices[indices >= 0].tolist()) == list(range(45))
    assert torch.equal(labels == data_module.IGNORE, indices == data_module.PADDING)
    assert torch.equal(labels[indices >= 0], indices[indices >= 0] % 16)


def test_formats_load(tmp_path):
    """Every usual format becomes upright 8-bit RGB with the right brightness, silently."""
    save, red = (lambda name, *a, **k: paint(tmp_path / name, (40, 30), *a, **k)), (200, 30, 30)
    for name in ("a.jpg", "b.png", "c.webp", "d.bmp", "e.gif", "f.tiff", "рисунок é.png"):
        image = data_module.decode(save(name, "RGB", red))
        assert image.mode == "RGB" and image.size == (40, 30)
        assert np.abs(np.asarray(image).mean((0, 1)) - red).max() < 6, name
    for name, mode, colour in (("g.png", "L", 128), ("h.png", "LA", (128, 9)), ("i.png", "1", 1),
                               ("j.png", "RGBA", (128, 128, 128, 0)), ("k.jpg", "L", 128),
                               ("l.jpg", "CMYK", (0, 0, 0, 127)), ("m.png", "I;16", 32896),
                               ("n.tiff", "I;16", 32896), ("o.tiff", "I", 32896),
                               ("p.tiff", "F", 0.5), ("q.tiff", "F", 128.0),
                               ("r.tiff", "I", 2**30)):
        value = np.asarray(data_module.decode(save(name, mode, colour))).mean()
        assert abs(value - (255 if mode == "1" else 128)) < 3, (name, mode, value)
    palette = Image.new("P", (40, 30))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.save(tmp_path / "s.png", transparency=b"\x00\xff")
    assert np.asarray(data_module.decode(tmp_path / "s.png"))[0, 0].tolist() == [10, 20, 30]
    frames = [Image.new("RGB", (40, 30), c) for c in ((200, 30, 30), (0, 0, 255))]
    frames[0].save(tmp_path / "t.gif", save_all=True, append_images=frames[1:])
    assert np.abs(np.asarray(data_module.decode(tmp_path / "t.gif")).mean((0, 1)) - red).max() < 6
    assert data_module.decode(paint(tmp_path / "u.jpg", (20_000, 500))).size == (20_000, 500)
    pixel = data_module.decode(paint(tmp_path / "v.png", (1, 1)))
    for size in ((1, 1), (1, 3000), (3000, 1)):
        assert data_module.train_transform(DATA_CONFIG, HW)(pixel.resize(size)).shape == (3, *HW)
        assert data_module.centre_view(pixel.resize(size), HW, 0.875).size == HW


@pytest.mark.filterwarnings("error")
def test_exif_turns_images_upright(tmp_path):
    """All eight orientations give the image that was turned; damaged EXIF is no obstacle."""
    upright = Image.new("RGB", (48, 32))
    ImageDraw.Draw(upright).rectangle((0, 0, 15, 15), fill=(255, 0, 0))
    undo = {6: 8, 8: 6}  # a file that says "turn me right" was turned left
    for orientation, extension in itertools.product(range(1, 9), ("jpg", "png", "tiff")):
        turned, exif, path = upright, Image.Exif(), tmp_path / f"{orientation}.{extension}"
        if orientation > 1:
            turned = upright.transpose(data_module.UPRIGHT[undo.get(orientation, orientation)])
        exif[0x0112] = orientation
        tags = {"tiffinfo": {0x0112: orientation}} if extension == "tiff" else {"exif": exif}
        turned.save(path, quality=95, **tags)
        difference = np.asarray(data_module.decode(path), int) - np.asarray(upright)
        assert np.abs(difference).mean() < 3, path
    upright.save(tmp_path / "bad.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert data_module.decode(tmp_path / "bad.jpg").size == (48, 32)


def test_evaluation_view_is_resize_and_centre_crop():
    """As torchvision's Resize + CenterCrop for a square; other shapes keep the aspect ratio."""
    from torchvision.transforms import v2
    rng = np.random.default_rng(0)
    for size in ((500, 375), (375, 500), (300, 300), (257, 901)):
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        theirs = v2.CenterCrop(64)(v2.Resize(73, interpolation=v2.InterpolationMode.BICUBIC)(image))
        ours = data_module.centre_view(image, (64, 64), 0.875)
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs)).max() <= 1
    disc = Image.new("RGB", (400, 300))
    ImageDraw.Draw(disc).ellipse((150, 100, 250, 200), fill=(255, 255, 255))
    view = np.asarray(data_module.centre_view(disc, (96, 160), 1.0))[..., 0] > 127
    assert view.shape == (96, 160) and abs(np.ptp(np.nonzero(view)[0])
                                           - np.ptp(np.nonzero(view)[1])) <= 1


def test_unreadable_images_are_ignored_named_and_limited(tmp_path):
    """Bad files get label -100 and black pixels, never another image; too many end the run."""
    make_folder(tmp_path)
    good = (paint(tmp_path / "train/a/good.jpg", colour=(255, 255, 255))).read_bytes()
    files = {"cut.jpg": good[:200], "empty.png": b"", "text.jpg": b"not an image"}
    for name, content in files.items():
        (tmp_path / "train/a" / name).write_bytes(content)
    Image.new("1", (17_000, 17_000)).save(tmp_path / "train/a/huge.png")  # a decompression bomb
    source = data_module.scan_folder(tmp_path, "train")
    (tmp_path / "train/b/1.png").unlink()  # and one that vanishes after the scan
    batch = next(iter(data_module.eval_loader(source, DATA_CONFIG, HW, 8, 0, 1, "cpu")))
    images, labels, indices = batch
    bad = (labels == data_module.IGNORE) & (indices >= 0)
    names = {source.name(i) for i in indices[bad].tolist()}
    assert names == {"train/b/1.png", "train/a/huge.png", *(f"train/a/{n}" for n in files)}
    assert not images[bad].any() and labels.tolist().count(0) == 2 and (indices == -1).sum() == 1
    assert data_module.unreadable_in(labels, indices) == set(indices[bad].tolist())
    log = data_module.Unreadable(source, 5 / 7)
    assert set(log.add(set(indices[bad].tolist()))) == names and log.error() is None
    assert log.add(set(indices[bad].tolist())) == []
    log.max_share = 0.5
    assert re.search(r"5 of 7 .*--max-unreadable 0.5 allows \(3\); .*cut.jpg", log.error())
    log = data_module.Unreadable(source, 0)
    assert log.error() is None and log.add({3}) and "1 of 7" in log.error()
    with pytest.raises(ZeroDivisionError):  # a bug in a transform is no unreadable image
        data_module.Views(source, lambda image: 1 / 0, HW, 0)[0, 0]


def test_folder_errors_say_what_is_expected(tmp_path):
    """Each wrong layout fails with its own message, which shows the right one."""
    def fails(match, root=tmp_path):
        with pytest.raises(ValueError, match=match) as error:
            data_module.open_data(str(root), HW)
        assert "CLASS" in str(error.value) or "same classes" in str(error.value)
    fails("no folder .*nowhere", tmp_path / "nowhere")
    fails("no folder .*val")
    (tmp_path / "val").mkdir()
    fails("no class folders")
    paint(tmp_path / "val/flat.JPG")
    fails("1 images such as flat.JPG lie flat")
    (tmp_path / "val/flat.JPG").unlink()
    (tmp_path / "val/c").mkdir()
    fails("not a single image in .*: c;")
    paint(tmp_path / "val/c/1.png")
    fails("no folder .*train")
    make_folder(tmp_path, val=("b", "c"))
    (tmp_path / "train/empty").mkdir()
    fails("without an image in .*: empty")
    (tmp_path / "train/empty").rmdir()
    fails("1 only in .*/train: a; 1 only in .*/val: c")


def test_folder_index_is_complete_sorted_and_compact(tmp_path):
    """Sub-folders and any case count, hidden and other files do not; the index is three arrays."""
    make_folder(tmp_path)
    for name in ("b/z.JPEG", "a/sub/deep/x.WebP", ".hidden/x.png", "a/.x.png", "a/sub/.h/x.png"):
        paint(tmp_path / "train" / name)
    (tmp_path / "train/a/notes.txt").write_text("no image")
    source = pickle.loads(pickle.dumps(data_module.scan_folder(tmp_path, "train")))
    assert [source.name(i) for i in range(len(source))] == [
        "train/a/1.png", "train/a/sub/deep/x.WebP", "train/b/1.png", "train/b/z.JPEG"]
    assert [source.load(i)[1] for i in range(4)] == [0, 0, 1, 1] and source.classes == ["a", "b"]
    assert isinstance(source.names, np.ndarray) and isinstance(source.offsets, np.ndarray)
    n = 100_000
    big = data_module.ImageFolder("/data", "train", ["a"], np.zeros(n * 20, np.uint8),
                           np.arange(n + 1) * 20, np.zeros(n, np.int32))
    assert len(pickle.dumps(big)) < 4 * 2**20


def test_shapes_are_deterministic_balanced_and_differ_by_split():
    """Image i is the same whenever it is drawn; the splits share no image."""
    train, val = data_module.open_data("shapes", (32, 48))
    assert (len(train), len(val), len(train.classes)) == (8000, 1000, 16)
    for i in (0, 17, 999):
        (image, label), (again, _) = train.load(i), data_module.Shapes((32, 48), "train").load(i)
        assert image.tobytes() == again.tobytes() and label == i % 16 and image.size == (48, 32)
        assert image.tobytes() != val.load(i)[0].tobytes()


def test_normalize_is_exact():
    """(x / 255 - mean) / std in fp32, then cast."""
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    want = torch.stack([(images[:, c] / 255 - mean[c]) / std[c] for c in range(3)], 1)
    torch.testing.assert_close(data_module.normalize(images, mean, std, torch.float32), want)
    assert data_module.normalize(images, mean, std, torch.bfloat16).dtype == torch.bfloat16


def test_training_view_is_torchvisions_on_pillow():
    """Resizing bytes in torch is Pillow's resize: at most 1 of 255 apart in 99 % of the values (two
    roundings; more only at sharp edges, where the bytes between the two passes saturate)."""
    from torchvision.transforms import v2
    image = data_module.Shapes((300, 400), "train").load(3)[0]
    ours = data_module.train_transform(replace(DATA_CONFIG, augmentation="crop-flip"), (64, 96))
    theirs = v2.Compose([v2.RandomResizedCrop((64, 96), interpolation=data_module.BICUBIC),
                         v2.RandomHorizontalFlip(), v2.PILToTensor()])
    for seed in range(8):
        views = [torch.manual_seed(seed) and view(image).int() for view in (ours, theirs)]
        assert ((views[0] - views[1]).abs() <= 1).float().mean() > 0.99


def test_colour_jitter_on_the_device_is_torchvisions():
    """From the same generator state a row draws, and color_jitter does, what v2.ColorJitter does to
    each float image, in all 24 orders, on black, white and grey pixels too (1e-5: rounding in fp32,
    2e-6 seen). It compiles to one graph and reads nothing back: it runs on the meta device."""
    images = torch.randint(0, 256, (200, 3, 16, 12), generator=_generator(0), dtype=torch.uint8)
    images[:, :, :4] = images[:, :1, :4]
    images[:, :, 4], images[:, :, 5] = 0, 255
    rows, want = [], []
    for seed, image in enumerate(images):
        torch.manual_seed(seed)
        rows.append(data_module.draw_jitter())
        torch.manual_seed(seed)
        want.append(data_module.JITTER(image / 255))
    rows, want = torch.stack(rows), torch.stack(want)
    assert len(rows[:, :4].unique(dim=0)) == 24
    got = data_module.color_jitter(images / 255, rows)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    compiled = torch.compile(data_module.normalize, fullgraph=True, backend="eager")
    got = compiled(images, mean, std, torch.float32, rows)
    want = (want - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    data_module.normalize(images.to("meta"), mean, std, torch.float32, rows.to("meta"))


def test_too_little_shared_memory_fails_at_the_start(tmp_path):
    """With the flags that help, instead of a bus error hours later."""
    with pytest.raises(ValueError, match="--num-workers or --prefetch-factor"):
        data_module._check_shared_memory(10**6, 2**40, str(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="signals of Linux")
def test_workers_outlive_the_jobs_sigterm_but_not_their_trainer():
    """After SIGTERM and SIGINT to the whole process group the batches go on; a trainer that then
    fails, its loader still referenced, exits at once and leaves no worker."""
    program = textwrap.dedent("""
        import os, signal, sys, time
        sys.path.insert(0, %r)
        import data
        from configs import TrainConfig
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        config = TrainConfig(global_batch_size=4, num_workers=2, seed=0)
        source = data.Shapes((32, 32), "train")
        batches = iter(data.train_loader(source, config, (32, 32), 4, 0, 1, 0, 100, "cpu"))
        next(batches)
        print(*[w.pid for w in batches._workers], flush=True)
        input()
        assert len(list(batches)) == 99
        batches = iter(data.train_loader(source, config, (32, 32), 4, 0, 1, 0, 10**6, "cpu"))
        next(batches)
        raise SystemError("the trainer fails")
    """) % str(HERE)
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0)
    try:
        workers = [int(pid) for pid in child.stdout.readline().split()]
        for number in (signal.SIGINT, signal.SIGTERM):
            os.killpg(child.pid, number)  # as torchrun's agent does: not from the workers' parent
        time.sleep(0.3)
        _, errors = child.communicate("\n", timeout=30)
        assert "the trainer fails" in errors and child.returncode == 1, errors
        assert len(workers) == 2 and not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


# ----------------------------------------------------------------------------- tensor parallelism
def test_split_cuts_heads_inside_q_k_and_v():
    """Rank r of a fused qkv gets its heads of q, of k and of v; unshard is the inverse."""
    full = torch.arange(12.0)[:, None].expand(12, 2)  # q 0-3, k 4-7, v 8-11
    split = Split(0, parts=3)
    assert split.shard(full, 1, 2)[:, 0].tolist() == [2, 3, 6, 7, 10, 11]
    assert torch.equal(split.unshard([split.shard(full, r, 4) for r in range(4)]), full)
    rows = torch.randn(3, 8)
    assert torch.equal(Split(1).unshard([Split(1).shard(rows, r, 4) for r in range(4)]), rows)


def _tensor_parallel_run(tp, options, folder=None):
    """Logits, input gradients and full weight gradients of 8 images over tp ranks; with a folder,
    f and g beside the products."""
    grid, works = overlapped_grid(grid_of(tp), folder) if folder else (grid_of(tp), [])
    dtype = torch.bfloat16 if options.get("fp8") else torch.float32
    config = replace(TINY, head="mlp")
    weights, (images, _) = random_weights(config), batch_of(config, 8)
    count = 8 // tp
    mine = slice(grid.tp.rank * count, (grid.tp.rank + 1) * count)
    model = build(config, grid, weights, **options).to(dtype)
    x = images[mine].to(dtype, copy=True).requires_grad_()
    calls = {"all_gather": 0, "reduce_scatter": 0}
    for name in calls:
        def counted(*args, name=name, original=getattr(parallel, name)):
            calls[name] += 1
            return original(*args)
        setattr(parallel, name, counted)
    logits = model(x)
    forward_calls = dict(calls)
    (logits * torch.randn(logits.shape, generator=_generator("w", grid.tp.rank))).sum().backward()
    assert not any(work.pending for work in works)
    full = {}
    for name, param in model.named_parameters():
        split = getattr(param, "tp_split", None)
        parts = [torch.empty_like(param.grad) for _ in range(tp)]
        if tp > 1:
            dist.all_gather(parts, param.grad)
        else:
            parts = [param.grad]
        full[name] = sum(parts) if split is None else split.unshard(parts)
    return logits.detach(), x.grad, full, forward_calls, calls


@pytest.mark.parametrize("tp, recompute, overlap", [
    (2, "none", False), (2, "full", False), (4, "none", False), (4, "full", False),
    (2, "full", True), (4, "none", True), (4, "selective", True)])
def test_tensor_parallel_equals_the_unsplit_model(tp, recompute, overlap, tmp_path):
    """Logits, input gradients and every gathered weight and bias gradient, batch 8 / tp >= 2 on a
    rank, all biases non-zero: within 1e-5 of the plain model (fp32 sums in another order). With
    overlap the collectives are --tp-comm-overlap's shifts, and no other; each is waited for, and
    what it reads and writes stays in place until then (see Late)."""
    options = dict(activation_checkpointing=recompute)
    results, _, _ = run_ranks(tp, _tensor_parallel_run, tp, options, overlap and tmp_path)
    assert all(any(r[4].values()) != overlap for r in results)
    config = replace(TINY, head="mlp")
    model = build(config, Grid(), random_weights(config))
    images = batch_of(config, 8)[0].requires_grad_()
    logits = model(images)
    weight = torch.cat([torch.randn(8 // tp, config.num_classes, generator=_generator("w", r))
                        for r in range(tp)])
    (logits * weight).sum().backward()
    assert (torch.cat([r[0] for r in results]) - logits).abs().max() < 1e-5
    assert (torch.cat([r[1] for r in results]) - images.grad).abs().max() < 1e-5
    for result in results:
        assert max_difference(result[2], gradients(model)) < 1e-5


def test_tensor_parallel_fp8_is_the_unsplit_model_within_fp8():
    """tp 2, every gathered gradient against the plain fp32 model: within 25 % of its norm, and the
    blocks' at least 2 % away. Each rank rounds its own shards; e5m2 rounds by some 5 %, and the
    first block's gradients pass it eight times. A lost share would be 50 % or more."""
    config = replace(TINY, head="mlp")
    model = build(config, Grid(), random_weights(config))
    weight = torch.cat([torch.randn(4, config.num_classes, generator=_generator("w", r))
                        for r in range(2)])
    (model(batch_of(config, 8)[0]) * weight).sum().backward()
    for result in run_ranks(2, _tensor_parallel_run, 2, dict(fp8=True))[0]:
        for name, exact in gradients(model).items():
            error = (result[2][name].float() - exact).norm() / exact.norm()
            low = 0.02 if name.startswith("blocks.0.") and name.endswith("weight") else 0
            assert low <= error < 0.25, name


def _products_and_shifts(folder):
    """Weights after 4 steps over tp 2 with gathered and with visiting images; then, for visiting
    ones, what happens in a forward and backward."""
    log, grid, results = [], grid_of(2), []
    for visiting in False, True:
        if visiting:
            grid, _ = overlapped_grid(grid, folder, log)
            globals()["grid_of"] = lambda tp, grid=grid: grid
        results.append(_train_steps(2, 1, 4, dict(optimizer="sgd", clip_grad=0.1), 2)[2])

    def logged(name, product):
        def wrapped(self, x, *bias):
            log.append(name)
            y = product(self, x, *bias)
            y.register_hook(lambda dy: log.append(name))
            return y
        return wrapped
    for name, layer in [("columns", parallel.ColumnParallelLinear),
                        ("rows", parallel.RowParallelLinear)]:
        layer.product = logged(name, layer.product)
    model = ViT(TINY, grid)
    log.clear()
    loss = model(batch_of(TINY, 2)[0]).sum()
    forward = log[:]
    log.clear()
    loss.backward()
    return max_difference(*results), forward, log


def test_products_run_while_images_travel(tmp_path):
    """--tp-comm-overlap, tp 2. In each half block a rank's own images are multiplied by its columns
    between the beginning and the end of a shift, and by its rows likewise; backward mirrors it. A
    shift begins after what it sends, and the ranks meet within it. 4 clipped SGD steps of 2
    micro-batches: weights within 1e-6 of those with all-gather and reduce-scatter (fp32 sums in
    another order)."""
    begin = ["ready", "after", "barrier", "begun"]
    forward = [begin, "columns", "wait", "columns", "rows", begin, "rows", "wait"]
    backward = [begin, "rows", "wait", "rows", "columns", begin, "columns", "wait"]
    for difference, *logs in run_ranks(2, _products_and_shifts, tmp_path)[0]:
        assert difference < 1e-6
        for log, order in zip(logs, [forward, backward]):
            expected = [event for step in order
                        for event in (begin if step is begin else [step])] * 2 * TINY.num_layers
            assert log == expected


def test_tp_overlap_is_for_gpus_that_reach_each_other(monkeypatch):
    """The default overlaps where they do, --tp-comm-overlap is an error where they do not."""
    tp = parallel.Axis(1, 2, types.SimpleNamespace(group_name="tp"))
    monkeypatch.setattr(parallel.PeerExchange, "of", {})
    monkeypatch.setattr(parallel.PeerExchange, "__init__", lambda *args: None)
    monkeypatch.setattr(parallel, "peers_in_reach", lambda axis, device: device == "near")
    for wanted, device, overlap in [(None, "near", True), (True, "near", True),
                                    (False, "near", False), (None, "far", False)]:
        assert parallel.overlapped(tp, device, wanted) == replace(tp, overlap=overlap)
    assert list(parallel.PeerExchange.of) == ["tp"]
    with pytest.raises(ValueError, match="--tp-comm-overlap needs"):
        parallel.overlapped(tp, "far", True)
    assert parallel.overlapped(parallel.Axis(), "near", None) == parallel.Axis()


def test_a_block_makes_two_plus_two_collectives_each_way():
    """Two blocks: forward 4 all-gathers and 4 reduce-scatters, backward the same again."""
    for result in run_ranks(2, _tensor_parallel_run, 2, {})[0]:
        assert result[3] == {"all_gather": 4, "reduce_scatter": 4}
        assert result[4] == {"all_gather": 8, "reduce_scatter": 8}


def _initial_weights(tp):
    return list(_full_weights(_optimizer(ViT(TINY, grid_of(tp), seed=5), grid_of(tp))).items())


def test_initial_weights_do_not_depend_on_the_layout():
    """Each full tensor is drawn from its own generator, then cut: bit-equal at tp 1, 2, 4."""
    plain = ViT(TINY, seed=5).state_dict()
    for tp in (2, 4):
        for name, tensor in run_ranks(tp, _initial_weights, tp)[0][0]:
            assert torch.equal(tensor, plain[name]), name


# ----------------------------------------------------------------------------- ZeRO-1
def _optimizer(model, grid, **options):
    return ShardedOptimizer(model, grid, **{"weight_decay": 0.1, "clip_grad": 0.1, **options})


def _full_weights(optimizer):
    return {name: t for name, kind, t in optimizer.full_tensors() if kind == "weight"}


def _train_steps(tp, dp, steps, options, accumulation=1, config=TINY, images_per_step=16):
    """`steps` optimizer steps on fixed random batches; (losses, norms, full weights, local)."""
    grid = grid_of(tp)
    model = build(config, grid, random_weights(config))
    optimizer = _optimizer(model, grid, **options)
    history, norms = [], []
    for step in range(steps):
        images, labels = batch_of(config, images_per_step, seed=step)
        total = torch.zeros(())
        per_rank = images_per_step // (tp * dp * accumulation)
        for micro in range(accumulation):
            first = (micro * tp * dp + grid.world.rank) * per_rank
            mine = slice(first, first + per_rank)
            loss = F.cross_entropy(model(images[mine].to(model.head.weight.dtype)).float(),
                                   labels[mine], reduction="sum") / images_per_step
            optimizer.backward(loss, last=micro == accumulation - 1)
            total += loss.detach()
        norms.append(optimizer.step(1e-2).item())
        if grid.world.size > 1:
            dist.all_reduce(total)
        history.append(total.item())
    optimizer.wait()
    replicated = {n: p.detach().clone() for n, p in model.named_parameters()
                  if getattr(p, "tp_split", None) is None or tp == 1}
    return history, norms, _full_weights(optimizer), replicated


def _random_gradients(tp, steps, options):
    """ZeRO-1 steps whose gradients are random numbers: each rank adds its own share of them."""
    grid = grid_of(tp)
    model = build(TINY, grid, random_weights(TINY))
    optimizer = _optimizer(model, grid, **options)
    for step in range(steps):
        optimizer.wait()
        loss = sum((p * parallel.shard(_random_gradient(TINY_SHAPES[n], n, step, grid.world.rank),
                                       p, grid.tp)).sum() for n, p in model.named_parameters())
        optimizer.backward(loss)
        optimizer.step(1e-3)
    return _full_weights(optimizer)


TINY_SHAPES = {n: p.shape for n, p in ViT(TINY).named_parameters()}


def _random_gradient(shape, name, step, rank):
    return 1e-3 * torch.randn(shape, generator=_generator("gradient", name, step, rank))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_zero1_equals_torch_optim_over_50_steps(kind):
    """50 steps with clipping, decay groups and momentum on 4 ranks, each with its own share of the
    gradient, equal torch.optim and clip_grad_norm_ on the summed gradient within 1e-6. The
    gradients are given, since Adam turns the rounding noise of a gradient near zero into a step of
    full size, and this is a test of the optimizer."""
    world, weights = 4, run_ranks(4, _random_gradients, 1, 50, {"optimizer": kind})[0]
    model = ViT(TINY)
    model.load_state_dict(random_weights(TINY))
    named = list(model.named_parameters())
    groups = [{"params": [p for n, p in named if parallel.uses_weight_decay(n, p) == decay],
               "weight_decay": 0.1 * decay} for decay in (True, False)]
    optimizer = (torch.optim.AdamW(groups, lr=1e-3) if kind == "adamw"
                 else torch.optim.SGD(groups, lr=1e-3, momentum=0.9))
    for step in range(50):
        for name, p in named:
            p.grad = sum(_random_gradient(p.shape, name, step, r) for r in range(world))
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.2, "no clipping"
        optimizer.step()
    for rank in range(world):
        assert max_difference(weights[rank], dict(model.state_dict())) < 1e-6


def _peer_copies(tp, folder):
    """Training with gloo's reduce-scatter, with peer copies, and with these refused: results, the
    memories and what happened on streams, one after the other, with the number of buckets."""
    world, log, grid = int(os.environ["WORLD_SIZE"]), [], grid_of(tp)
    buckets = [b for unit in parallel.plan_buckets(ViT(TINY, grid), grid) for b in unit]
    share_files(folder, log)
    results = []
    for reach, peer_copies in [(False, None), (True, None), (True, False)]:
        parallel.peers_in_reach = lambda axis, device, reach=reach: reach and axis.size > 1
        options = dict(optimizer="sgd", clip_grad=0.1, peer_copies=peer_copies)
        _, norms, weights, _ = _train_steps(tp, world // tp, 4, options, accumulation=2)
        results.append((norms, weights, parallel.symm_mem.count, log[:]))
    return results, sum(bucket.axis.size > 1 for bucket in buckets)


@pytest.mark.parametrize("world, tp", [(3, 1), (4, 2)])
def test_gradients_summed_by_peer_copies_are_the_reduce_scattered_ones(world, tp, tmp_path):
    """4 clipped SGD steps of 2 micro-batches, as between the GPUs of a host but through files:
    weights within 1e-6 of gloo's (sums of 3 or 4 in another order), with tp 2 for the buckets that
    are summed over dp and those over the world. Each bucket once a step: after its gradients, all
    ranks meet, then copies; and the step waits for the end of all. --no-peer-copies does none."""
    for (reference, copied, refused), buckets in run_ranks(world, _peer_copies, tp, tmp_path)[0]:
        step = ["gradients", "barrier", "end"] * buckets + ["wait"] * buckets
        assert reference[2:] == (0, [])
        assert copied[2:] == refused[2:] == (tp, 4 * step)
        for norms, weights, *_ in copied, refused:
            assert norms == pytest.approx(reference[0], rel=1e-5)
            assert max_difference(weights, reference[1]) < 1e-6


def _reach(reach, hosts):
    rank = int(os.environ["RANK"])
    os.environ["GROUP_RANK"] = hosts[rank]
    torch.cuda.device_count = lambda: 2
    torch.cuda.can_device_access_peer = lambda device, peer: (device.index, peer) in reach
    world = grid_of(1).world
    return [parallel.peers_in_reach(world, torch.device(*place))
            for place in [("cpu",), ("cuda", rank)]]


@pytest.mark.parametrize("hosts, reach, expected", [
    ("00", {(0, 1), (1, 0)}, True), ("00", {(0, 1)}, False), ("01", {(0, 1), (1, 0)}, False)])
def test_peer_copies_are_for_gpus_of_one_host_that_reach_each_other(hosts, reach, expected):
    """All ranks agree, also where only one of them is told that it cannot reach the other."""
    assert run_ranks(2, _reach, reach, hosts)[0] == [[False, expected]] * 2


@pytest.mark.parametrize("make, flag", [
    (lambda axis: parallel.PeerMemory(8, 4, axis, "cpu"), "--no-peer-copies"),
    (lambda axis: parallel.PeerExchange(axis, "cpu"), "--no-tp-comm-overlap")])
def test_gpus_that_do_not_share_memory_are_told_what_to_give(monkeypatch, make, flag):
    """An error of the rendezvous names the flag; memory that runs out is no such error."""
    def fail(*args, message="no handle\nmore", **options):
        raise RuntimeError(*[message] * bool(message))
    for name in "Stream", "Event", "synchronize":
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    axis = parallel.Axis(0, 2, types.SimpleNamespace(group_name="world"))
    monkeypatch.setattr(parallel.symm_mem, "enable_symm_mem_for_group", lambda name: None)
    monkeypatch.setattr(parallel.symm_mem, "empty",
                        lambda n, dtype, device: torch.empty(n, dtype=dtype))
    monkeypatch.setattr(parallel.symm_mem, "rendezvous", fail)
    with pytest.raises(ValueError, match=rf"\(no handle\); give {flag}"):
        make(axis)
    monkeypatch.setattr(parallel.symm_mem, "rendezvous", partial(fail, message=""))
    with pytest.raises(ValueError, match=rf"\(RuntimeError\(\)\); give {flag}"):
        make(axis)
    monkeypatch.setattr(parallel.symm_mem, "empty", fail)
    with pytest.raises(RuntimeError, match="no handle"):
        make(axis)


def test_weight_decay_is_on_matrices_only():
    """The printed list: weights of linear layers and the patch projection, nothing else."""
    decay, none = _optimizer(ViT(TINY), Grid()).decay_names()
    assert sorted(decay) == sorted(
        ["patch_embed.proj.weight", "pre_logits.fc.weight", "head.weight"]
        + [f"blocks.{i}.{n}.weight" for i in range(2)
           for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")])
    assert {"cls_token", "pos_embed", "norm.weight", "blocks.0.norm1.weight"} <= set(none)


LAYOUTS = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]


def test_gradient_norm_does_not_depend_on_the_layout():
    """Each element counts once: norms of 5 steps within 1e-6 relative over (tp, dp), for one and
    for several micro-batches (SGD: Adam would turn rounding into different weights)."""
    sgd = {"optimizer": "sgd"}
    reference = run_ranks(1, _train_steps, 1, 1, 5, sgd)[0][0][1]
    for tp, dp in LAYOUTS[1:]:
        result = run_ranks(tp * dp, _train_steps, tp, dp, 5, sgd, 2)[0]
        assert result[0][1] == pytest.approx(reference, rel=1e-6), (tp, dp)
        assert all(r[1] == result[0][1] for r in result), "ranks disagree"


def test_replicated_weights_stay_bit_equal_on_all_ranks():
    """After 50 steps at tp 2 x dp 2 in bf16-O2: no tolerance, they are gathered from one owner."""
    options = dict(weight_dtype=torch.bfloat16)
    results, _, _ = run_ranks(4, _train_steps, 2, 2, 50, options)
    for result in results[1:]:
        assert all(torch.equal(result[3][n], t) for n, t in results[0][3].items())


def _bytes_per_parameter(options):
    grid = grid_of(1)
    config = replace(TINY, hidden_size=128, ffn_hidden_size=512, num_layers=4)
    model = ViT(config, grid)
    optimizer = _optimizer(model, grid, **options)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for b in optimizer.buckets
                for t in (b.weight, b.grad, b.master, *b.state.values(),
                          *b.params.values())}
    return sum(storages.values()) / config.num_params


@pytest.mark.parametrize("world", [1, 2, 4])
def test_memory_is_6_plus_12_over_n_bytes_per_parameter(world):
    """bf16-O2: 2 (weight) + 4 (gradient) + 12/N; fp32: 8 + 8/N; at most 3 % over, for padding."""
    o2 = run_ranks(world, _bytes_per_parameter, dict(weight_dtype=torch.bfloat16))[0]
    fp32 = run_ranks(world, _bytes_per_parameter, {})[0]
    assert all(6 + 12 / world <= b <= 1.03 * (6 + 12 / world) for b in o2)
    assert all(8 + 8 / world <= b <= 1.03 * (8 + 8 / world) for b in fp32)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_changes_nothing(kind, bad):
    """Weights, masters, moments and the update count are bit-equal after the bad step, the very
    first one too, and the next good step is what it would have been."""
    def state(optimizer):
        return [t.clone() for b in optimizer.buckets
                for t in (b.weight, b.master, *b.state.values())] + [optimizer.step_count.clone()]

    def step(model, optimizer, poison):
        images, labels = batch_of(TINY, 4)
        loss = F.cross_entropy(model(images.bfloat16()).float(), labels)
        optimizer.backward(loss * (bad if poison else 1.0))
        return optimizer.step(1e-2)
    runs = []
    for poisoned in (True, False):
        model = ViT(TINY)
        optimizer = _optimizer(model, Grid(), weight_dtype=torch.bfloat16, optimizer=kind)
        for _ in range(2):
            before = state(optimizer)
            if poisoned:
                assert not step(model, optimizer, True).isfinite()
                assert all(torch.equal(a, b) for a, b in zip(before, state(optimizer)))
            step(model, optimizer, False)
            assert not all(torch.equal(a, b) for a, b in zip(before, state(optimizer)))
        runs.append(state(optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_an_optimizer_is_freed_with_its_model():
    """Model and optimizer hold each other through hooks, one of them in autograd; when both are
    dropped after a step, the garbage collector takes them."""
    model = build(TINY, Grid(), random_weights(TINY))
    optimizer = ShardedOptimizer(model, Grid())
    optimizer.backward(model(batch_of(TINY, 2)[0]).sum())
    optimizer.step(1e-3)
    alive = weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert alive() is None


def test_loading_weights_refreshes_the_masters():
    """bf16-O2, load_state_dict alone, then a step with lr 0: the weights are bit-equal to what was
    loaded. Without the refresh the old masters would come back (Megatron-LM#174)."""
    model = ViT(TINY)
    optimizer = _optimizer(model, Grid(), weight_dtype=torch.bfloat16)
    model.load_state_dict(random_weights(TINY))
    loaded = {n: t.clone() for n, t in model.state_dict().items()}
    images, labels = batch_of(TINY, 4)
    optimizer.backward(F.cross_entropy(model(images.bfloat16()).float(), labels))
    optimizer.step(0.0)
    assert all(torch.equal(loaded[n], t) for n, t in model.state_dict().items())


def test_tiny_updates_reach_the_masters_in_bf16_o2():
    """Updates far below bf16's resolution add up: 200 steps of 1e-5 move a weight of 1 by 2e-3."""
    model = ViT(TINY)
    optimizer = _optimizer(model, Grid(), weight_dtype=torch.bfloat16, weight_decay=0.0)
    before = model.norm.weight.detach().float().clone()
    images, labels = batch_of(TINY, 4)
    for _ in range(200):
        optimizer.backward(F.cross_entropy(model(images.bfloat16()).float(), labels))
        optimizer.step(1e-5)
    moved = _full_weights(optimizer)["norm.weight"] - before
    assert moved.abs().max() > 1e-3


# ----------------------------------------------------------------------------- checkpoints
def _save(tp, folder):
    grid = grid_of(tp)
    model = build(TINY, grid, random_weights(TINY))
    optimizer = _optimizer(model, grid, weight_dtype=torch.bfloat16)
    for step in range(3):
        images, labels = batch_of(TINY, 16, seed=step)
        n = 16 // grid.world.size
        mine = slice(grid.world.rank * n, (grid.world.rank + 1) * n)
        optimizer.backward(F.cross_entropy(model(images[mine].bfloat16()).float(), labels[mine],
                                           reduction="sum") / 16)
        optimizer.step(1e-2)
    parallel.save_checkpoint(Path(folder), 3, optimizer, dict(note="x"))
    return list(optimizer.full_tensors())


def _load(tp, folder):
    grid = grid_of(tp)
    optimizer = _optimizer(ViT(TINY, grid, seed=9), grid, weight_dtype=torch.bfloat16)
    meta = parallel.load_checkpoint(Path(folder) / "step_00000003", optimizer)
    assert meta["note"] == "x" and optimizer.step_count.item() == 3
    for bucket in optimizer.buckets:  # bf16 weights are the rounded masters
        assert torch.equal(bucket.weight[bucket.begin:bucket.end], bucket.master.bfloat16())
    return list(optimizer.full_tensors())


def test_any_layout_loads_any_layout(tmp_path):
    """Save at each of (1,1), (2,2), (4,1), load at each of the six: weights, masters and both
    moments bit-equal. The files hold whole tensors of plain types (weights_only)."""
    for tp, dp in [(1, 1), (2, 2), (4, 1)]:
        folder = tmp_path / f"{tp}_{dp}"
        saved = {(n, k): t for n, k, t in run_ranks(tp * dp, _save, tp, str(folder))[0][0]}
        for tp2, dp2 in LAYOUTS:
            loaded = run_ranks(tp2 * dp2, _load, tp2, str(folder))[0][0]
            assert len(loaded) == len(saved)
            assert all(torch.equal(t, saved[n, k]) for n, k, t in loaded), (tp, dp, tp2, dp2)
        files = sorted((folder / "step_00000003").glob("rank_*.pt"))
        assert len(files) == tp * dp
        tensors = {n: t for f in files for n, t in torch.load(f, weights_only=True).items()}
        assert tensors["blocks.1.attn.qkv.weight"]["weight"].shape == (96, 32)
        assert (folder / "latest").read_text() == "step_00000003\n"


def test_a_failed_save_harms_nothing(tmp_path, monkeypatch):
    """A disk that fills while saving: OSError, the earlier checkpoint and `latest` stay, nothing
    half-written is left."""
    optimizer = _optimizer(ViT(TINY), Grid())
    first = parallel.save_checkpoint(tmp_path, 1, optimizer, {})

    def full_disk(tensors, file):
        file.write(b"x" * 100)
        raise OSError(28, "No space left on device")
    assert parallel.save_checkpoint(tmp_path, 1, optimizer, {}) == first, "saved twice"
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="step 2 failed.*No space left"):
        parallel.save_checkpoint(tmp_path, 2, optimizer, {})
    assert parallel.complete_checkpoints(tmp_path) == [first]
    assert (tmp_path / "latest").read_text() == "step_00000001\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_incomplete_checkpoints_are_never_chosen(tmp_path):
    """A truncated file, a missing file or no meta.json: skipped, with the reason; keep_last counts
    complete ones."""
    optimizer = _optimizer(ViT(TINY), Grid())
    for step in (1, 2, 3, 4):
        parallel.save_checkpoint(tmp_path, step, optimizer, {})
    one, two, three, four = sorted(tmp_path.glob("step_*"))
    os.truncate(four / "rank_00000.pt", 100)
    (three / "rank_00000.pt").unlink()
    (two / "meta.json").unlink()
    assert parallel.complete_checkpoints(tmp_path) == [one]
    assert "has 100 bytes" in parallel.incomplete_reason(four)
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        parallel.load_checkpoint(four, optimizer)
    parallel.save_checkpoint(tmp_path, 5, optimizer, {}, keep_last=1)
    assert [p.name for p in parallel.complete_checkpoints(tmp_path)] == ["step_00000005"]


# ----------------------------------------------------------------------------- weights of others
# Files are written by the library itself (Google's by a writer of its own) from random weights.
SMALL = ViTConfig(hidden_size=32, ffn_hidden_size=80, num_layers=2, num_attention_heads=4,
                  patch_size=8, image_size=32, num_classes=5, num_class_tokens=1, head="linear",
                  hidden_dropout=0.0)
OUR_FACTS = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def their_model(fmt, config=SMALL, **more):
    """The library's model of our shape with random weights, and the file that it writes."""
    d, f, heads, size = 32, 80, 4, config.image_size
    if fmt == "timm":
        model = pytest.importorskip("timm").models.VisionTransformer(**dict(
            img_size=size, patch_size=8, num_classes=5, embed_dim=d, depth=2, num_heads=heads,
            mlp_ratio=f / d) | more)
    elif fmt == "torchvision":
        from torchvision.models import VisionTransformer
        model = VisionTransformer(size, 8, 2, heads, d, f, num_classes=5, **more)
    else:
        transformers = pytest.importorskip("transformers")
        model = getattr(transformers, more.pop("cls", "ViTForImageClassification"))(
            transformers.ViTConfig(
                hidden_size=d, intermediate_size=f, num_hidden_layers=2, num_attention_heads=heads,
                image_size=size, patch_size=8, num_labels=5, **more))
    return randomised(model)


def randomised(model):
    """Random values everywhere: nothing that is zero or one by default hides a mistake."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=_generator(name)) + 0.1 * (p.ndim == 1))
    return model.eval()


def google_npz(state, path, heads=4):
    """Flax's layout of our weights, name by name."""
    s = {name: x.numpy() for name, x in state.items()}
    d = s["cls_token"].shape[-1]
    out = {"cls": s["cls_token"], "Transformer/posembed_input/pos_embedding": s["pos_embed"],
           "embedding/kernel": s["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
           "embedding/bias": s["patch_embed.proj.bias"]}
    for theirs, ours in (("head", "head"), ("pre_logits", "pre_logits.fc")):
        if ours + ".weight" in s:
            out |= {theirs + "/kernel": s[ours + ".weight"].T, theirs + "/bias": s[ours + ".bias"]}
    norms = [("Transformer/encoder_norm", "norm")]
    for i in range(2):
        a, b = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        norms += [(a + "LayerNorm_0", b + "norm1"), (a + "LayerNorm_2", b + "norm2")]
        for j, part in enumerate(("query", "key", "value")):
            rows, name = slice(j * d, (j + 1) * d), f"{a}MultiHeadDotProductAttention_1/{part}/"
            out[name + "kernel"] = s[b + "attn.qkv.weight"][rows].T.reshape(d, heads, -1)
            out[name + "bias"] = s[b + "attn.qkv.bias"][rows].reshape(heads, -1)
        name = a + "MultiHeadDotProductAttention_1/out/"
        out[name + "kernel"] = s[b + "attn.proj.weight"].T.reshape(heads, -1, d)
        out[name + "bias"] = s[b + "attn.proj.bias"]
        for theirs, ours in (("MlpBlock_3/Dense_0/", "mlp.fc1."), ("MlpBlock_3/Dense_1/",
                                                                  "mlp.fc2.")):
            out[a + theirs + "kernel"] = s[b + ours + "weight"].T
            out[a + theirs + "bias"] = s[b + ours + "bias"]
    for theirs, ours in norms:
        out |= {theirs + "/scale": s[ours + ".weight"], theirs + "/bias": s[ours + ".bias"]}
    np.savez(path, **out)


def ours_from(path, fmt, config=SMALL, image_size=None, **changes):
    """Our model of a file, as train.py makes it: (model, facts, report)."""
    weights = model_module.read_weights(path, image_size)
    assert weights.format == fmt
    config = replace(config, layernorm_eps=weights.facts["layernorm_eps"], **changes)
    fitted, report = model_module.fit_weights(weights, config)
    model = ViT(config, seed=3).eval()
    model_module.load_weights(model, fitted)
    return model, weights.facts, report


def assert_same_logits(ours, theirs, size=(32, 32)):
    """To 1e-4 in fp32: two blocks' rounding is 1e-6, a wrong epsilon, GELU or axis 1e-3 and up."""
    images = torch.randn(3, 3, *size, generator=_generator("images"))
    with torch.no_grad():
        y, z = ours(images), theirs(images)
        z = getattr(z, "logits", z)
    assert y.std() > 0.1 and (y - z).abs().max() <= 1e-4


@pytest.mark.parametrize("fmt, suffix", [
    ("timm", ".pth"), ("timm", ".safetensors"), ("timm", "2019.pth"), ("hf", ".safetensors"),
    ("hf", ".bin"), ("torchvision", ".pth"), ("torchvision", "released.pth"), ("google", ".npz"),
    ("google", "mlp.npz")])
def test_a_librarys_file_gives_the_librarys_logits(tmp_path, fmt, suffix):
    """Every format, at its own resolution and resized to 48 x 64 (theirs with our positions, since
    libraries resize differently; timm's own resize is compared below)."""
    path, head, eps = tmp_path / f"w{suffix}", "linear", dict(hf=1e-12).get(fmt, 1e-6)
    if fmt == "google":
        head = "mlp" if "mlp" in suffix else "linear"
        theirs = randomised(ViT(replace(SMALL, head=head)))
        google_npz(theirs.state_dict(), path)
    else:
        theirs = their_model(fmt)
        if suffix == ".safetensors":
            pytest.importorskip("safetensors.torch").save_file(theirs.state_dict(), path)
        else:  # before 1.6 torch wrote a format that cannot be mapped; MAE and others wrap theirs
            state = theirs.state_dict()
            if suffix == "released.pth":  # torchvision's released files are of an older version
                state = {name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."):
                         x for name, x in state.items()}
            torch.save({"model": state}, path, _use_new_zipfile_serialization="2019" not in suffix)
    ours, facts, report = ours_from(path, fmt, head=head)
    assert_same_logits(ours, theirs)
    assert len(report) == 1 and facts["layernorm_eps"] == eps and facts["head"] == head
    assert facts["mean"] == ((0.485, 0.456, 0.406) if fmt == "torchvision" else (0.5,) * 3)
    ours, _, report = ours_from(path, fmt, replace(SMALL, image_size=(48, 64)), head=head)
    if fmt == "timm":
        theirs.set_input_size((48, 64))  # timm's own resize
    elif fmt == "hf":
        theirs.vit.embeddings.interpolate_pos_encoding = lambda *args: ours.pos_embed
        theirs = partial(theirs, interpolate_pos_encoding=True)
    elif fmt == "torchvision":
        theirs.encoder.pos_embedding = ours.pos_embed
        theirs._process_input = lambda x: theirs.conv_proj(x).flatten(2).transpose(1, 2)
    else:
        theirs.pos_embed = ours.pos_embed
    assert_same_logits(ours, theirs, (48, 64))
    assert report[1] == "pos_embed resized from 4x4 to 6x8"


def test_what_comes_with_weights_yields_to_flags(tmp_path):
    """Training takes class tokens, epsilon, GELU, head and pixels; a flag wins, fine-tuning has its
    own head; with --checkpoint the whole model comes, and a flag still wins."""
    model, _ = export(tmp_path / "w.pt", replace(SMALL, head="mlp", layernorm_eps=1e-5),
                      "torchvision")
    weights = model_module.read_weights(tmp_path / "w.pt")
    for recipe, head in (("pretrain", "mlp"), ("finetune", "linear")):
        config, vit, given = parse_args(["--recipe", recipe, "--std", "1,1,1", "--data", "d"])
        config, vit, taken = train.adopt(weights, config, vit, given)
        assert (vit.num_class_tokens, vit.layernorm_eps, vit.head) == (1, 1e-5, head)
        assert (config.mean, config.std) == (OUR_FACTS["mean"], (1, 1, 1)) and "std" not in taken
        assert vit.hidden_size == 768, "--model decides the shape"
    config, vit, given = parse_args(["--eval", "--checkpoint", "w.pt", "--image-size", "40"])
    config, vit, _ = train.adopt(weights, config, vit, given)
    assert vit == replace(SMALL, head="mlp", layernorm_eps=1e-5, image_size=40, hidden_dropout=0.1)


def test_a_hub_folder_tells_its_facts_and_a_backbone_has_no_head(tmp_path):
    """save_pretrained's folder: epsilon and heads of config.json; ViTModel's pooler (linear, tanh)
    is the pretraining head's hidden layer, and only the head is newly initialised."""
    their_model("hf", layer_norm_eps=1e-3).save_pretrained(tmp_path / "whole")
    _, facts, report = ours_from(tmp_path / "whole", "hf")
    assert (facts["layernorm_eps"], facts["num_attention_heads"], len(report)) == (1e-3, 4, 1)
    theirs = their_model("hf", cls="ViTModel")
    theirs.save_pretrained(tmp_path / "bare")
    ours, _, report = ours_from(tmp_path / "bare", "hf", head="mlp")
    assert report == ["32 weights loaded",
                      "head newly initialised for 5 classes: the file has none"]
    ours.head = torch.nn.Identity()
    assert_same_logits(ours, lambda x: theirs(x).pooler_output)


def test_timms_registers_are_class_tokens_and_positions_are_never_guessed(tmp_path):
    """reg_tokens=7 is our 8 class tokens; a file whose patches are no square, or whose class tokens
    have no position, is refused without --init-image-size and exact with it."""
    for more, size, count in [(dict(reg_tokens=7), None, 8), (dict(img_size=(16, 64)), (16, 64), 1),
                              (dict(no_embed_class=True), 32, 1)]:
        theirs = their_model("timm", **more)
        torch.save(theirs.state_dict(), tmp_path / "w.pth")
        if more == dict(no_embed_class=True):
            with pytest.raises(ValueError, match="16 positions.*--init-image-size"):
                model_module.read_weights(tmp_path / "w.pth")
        config = replace(SMALL, image_size=size or 32, num_class_tokens=count)
        ours, _, _ = ours_from(tmp_path / "w.pth", "timm", config, size)
        assert_same_logits(ours, theirs, config.image_hw)
    theirs = their_model("timm", img_size=(16, 24))
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="7 positions.*2x2 grid.*--init-image-size"):
        model_module.read_weights(tmp_path / "w.pth")


def test_positions_are_bit_equal_at_the_same_size_and_equal_timms_at_others():
    """Class positions stay, any grid (61 and 39 are what a scale factor rounds wrong), and bf16 is
    resized in fp32 and rounded once."""
    pos, resize = torch.randn(1, 8 + 14 * 14, 6), model_module.resize_pos_embed
    assert resize(pos, 8, (14, 14), (14, 14)) is pos
    layers = pytest.importorskip("timm.layers")
    for new in [(32, 32), (61, 39), (7, 7), (196, 1)]:
        ours = resize(pos, 8, (14, 14), new)
        theirs = layers.resample_abs_pos_embed(pos, list(new), [14, 14], num_prefix_tokens=8)
        assert torch.equal(ours[:, :8], pos[:, :8]) and (ours - theirs).abs().max() < 1e-6
        assert torch.equal(resize(pos.bfloat16(), 8, (14, 14), new),
                           resize(pos.bfloat16().float(), 8, (14, 14), new).bfloat16())


def export(path, config, fmt, facts=OUR_FACTS):
    """(our model of random weights, the code that opens its export)"""
    model = randomised(ViT(config))
    tensors = model_module.to_format(model.state_dict(), config, fmt)
    return model, model_module.write_weights(path, tensors, config, fmt, {
        **facts, **asdict(config)})


@pytest.mark.parametrize("fmt, name, change", [
    ("timm", "w.pt", {}), ("timm", "w.safetensors", {}), ("hf", "model.safetensors", {}),
    ("torchvision", "w.pt", {}), ("torchvision", "w.safetensors", dict(head="mlp")),
    ("timm", "w.pt", dict(num_class_tokens=8, image_size=(16, 40), gelu_approximate="tanh"))])
def test_an_export_opens_strictly_in_its_library_and_returns_bit_equal(tmp_path, fmt, name, change):
    """The printed code, run as it is, gives a model with our logits; our reader gets the same bits
    back, with the run's own epsilon and pixels. Eight class tokens are timm's token and seven
    registers; the pretraining head is torchvision's representation layer."""
    for library in {"hf": ["transformers"], "timm": ["timm"]}.get(fmt, []):
        pytest.importorskip(library)
    if "safetensors" in name:
        pytest.importorskip("safetensors")
    config = replace(SMALL, layernorm_eps=1e-5, **change)
    model, code = export(tmp_path / name, config, fmt)
    scope = {}
    exec(code, scope)
    assert_same_logits(model, scope["model"].eval(), config.image_hw)
    back, facts, report = ours_from(tmp_path / name, fmt, config)
    assert len(report) == 1 and facts["std"] == OUR_FACTS["std"] and facts["layernorm_eps"] == 1e-5
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(),
                                                 strict=True))


def test_a_hugging_face_export_is_a_folder_with_classes_and_pixels(tmp_path):
    """from_pretrained needs no more than the folder, for the model and for the image processor."""
    transformers = pytest.importorskip("transformers")
    export(tmp_path / "model.safetensors", SMALL, "hf",
           OUR_FACTS | {"classes": ["ant", "bee", "cat", "dog", "\u00e9lan"]})
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    assert theirs.config.id2label[4] == "\u00e9lan"
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert tuple(pixels.image_std) == OUR_FACTS["std"]
    with pytest.raises(ValueError, match="give FOLDER/model.safetensors"):
        export(tmp_path / "w.pt", SMALL, "hf")


@pytest.mark.parametrize("change, fmt, words", [
    (dict(num_class_tokens=8), "hf", "one class token, this model has 8.*reg_tokens=7"),
    (dict(head="mlp"), "timm", "no place for the pretraining head.*--format torchvision"),
    (dict(image_size=(16, 32)), "torchvision", "square"),
    (dict(gelu_approximate="tanh"), "torchvision", "exact GELU"),
])
def test_what_a_library_does_not_have_is_refused(change, fmt, words):
    config = replace(SMALL, **change)
    with pytest.raises(ValueError, match=words):
        model_module.to_format(ViT(config).state_dict(), config, fmt)


def test_weights_load_by_layout_and_only_a_head_of_another_size_is_new(tmp_path):
    """Each tensor-parallel rank gets its own part; nine classes leave the head at its own
    initialisation and say so; another model is refused with the name of the one that fits."""
    source, _ = export(tmp_path / "w.pt", SMALL, "timm")
    weights = model_module.read_weights(tmp_path / "w.pt")
    full = dict(source.named_parameters())
    for rank in range(2):
        model = ViT(SMALL, Grid(tp=parallel.Axis(rank, 2)))
        model_module.load_weights(model, model_module.fit_weights(weights, SMALL)[0])
        for name, param in model.named_parameters():
            assert torch.equal(param, parallel.shard(full[name], param, model.grid.tp)), name
    ours, _, report = ours_from(tmp_path / "w.pt", "timm", num_classes=9)
    assert report == ["30 weights loaded", "head newly initialised for 9 classes: the file's is "
                      "linear, 5 classes"]
    assert not ours.head.weight.any() and torch.equal(ours.norm.weight, source.norm.weight)
    demo = replace(MODELS["demo"], head="linear", num_classes=3)
    export(tmp_path / "demo.pt", demo, "timm")
    with pytest.raises(ValueError, match=r"hidden_size 96 \(this run: 32\).*of --model demo$"):
        model_module.fit_weights(model_module.read_weights(tmp_path / "demo.pt"), SMALL)


class Code:
    """Unpickled carelessly, it makes a folder."""

    def __init__(self, path):
        self.trace = str(path.with_name("code-was-run"))

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def write_broken(path, kind):
    """A broken file: a kind below, or a state dict with one thing wrong."""
    good = ViT(SMALL).state_dict()
    changed = {
        "code": {"patch_embed.proj.weight": Code(path)}, "list": [torch.ones(2)],
        "resnet": {"conv1.weight": torch.ones(2), "bn1.weight": torch.ones(2)},
        "unknown": good | {"blocks.0.ls1.gamma": torch.ones(32)},
        "missing": {k: v for k, v in good.items() if k != "blocks.1.mlp.fc2.bias"},
        "half a head": {k: v for k, v in good.items() if k != "head.bias"},
        "misshapen": good | {"norm.weight": torch.ones(31)},
        "no class token": {k: v for k, v in good.items() if k != "cls_token"}}
    if kind in changed:
        torch.save(changed[kind], path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Code(path)))
    elif kind == "text":
        path.write_text("404: Not Found\n" * 10)
    elif kind == "folder":
        path.mkdir()
    elif kind != "nothing":  # a size: the good file, cut
        export(whole := path.with_stem("whole").with_suffix(
            ".safetensors" if path.suffix == ".safetensors" else ".pt"), SMALL, "timm")
        path.write_bytes(whole.read_bytes()[:kind])


@pytest.mark.parametrize("name, kind, words", [
    ("w.safetensors", -100, "truncated or damaged.*the file holds"),
    ("w.safetensors", 300, "truncated, or not a safetensors"),
    ("w.safetensors", 0, "truncated, or not a safetensors"),
    ("w.pth", -100, "truncated, or not a .pth file of plain tensors"),
    ("w.pth", 0, "truncated, or not a .pth file of plain tensors"),
    ("w.pth", "text", "truncated, or not a .pth file of plain tensors"),
    ("w.npz", "text", "truncated, or not an .npz"),
    ("w.npz", -100, "truncated, or not an .npz"),
    ("w.bin", "code", r"pickled objects other than tensors \(posix.mkdir\)"),
    ("w.pth", "pickle", "truncated, or not a .pth file of plain tensors"),
    ("w.pth", "list", "not a dictionary of named tensors"),
    ("w.pth", "resnet", "not a ViT of timm, .*conv1.weight, bn1.weight"),
    ("w.pth", "unknown", r"1 unknown \(blocks.0.ls1.gamma\)"),
    ("w.pth", "missing", r"1 missing \(blocks.1.mlp.fc2.bias\)"),
    ("w.pth", "half a head", r"1 missing \(head.bias\)"),
    ("w.pth", "misshapen", r"1 misshapen \(norm.weight\)"),
    ("w.pth", "no class token", "no ViT with a class token"),
    ("w.onnx", "text", "must end in .pt, .pth, .bin, .safetensors or .npz"),
    ("w.pth", "nothing", "there is no such file"),
    ("w.pth", "folder", "holds no complete checkpoint"),
])
def test_a_bad_file_is_one_clear_error_with_its_path(tmp_path, name, kind, words):
    """One line that names the file; no code in it runs, and safety is not advised away."""
    write_broken(tmp_path / name, kind)
    with pytest.raises(ValueError, match=words) as error:
        model_module.read_weights(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    assert "weights_only" not in str(error.value) and not (tmp_path / "code-was-run").exists()


def test_a_failed_export_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    """A full disk in the middle of the file: the one that was there stays, nothing else does."""
    export(tmp_path / "w.safetensors", SMALL, "timm")
    before = (tmp_path / "w.safetensors").read_bytes()

    def full(file, tensors, facts):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(model_module, "write_safetensors", full)
    with pytest.raises(OSError, match="No space"):
        export(tmp_path / "w.safetensors", SMALL, "timm")
    assert (tmp_path / "w.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["w.safetensors"]


# ----------------------------------------------------------------------------- train.py
# Losses of 20 steps of TRAIN_FLAGS, fp32, dropout 0, from one process (torch 2.15, x86 CPU). On the
# digits: `make_digits.py`'s folder, drawn at 16 px from scikit-learn, which is not a requirement.
GOLDEN = {
    "shapes": [
        2.771491, 2.769255, 2.776458, 2.770068, 2.775746, 2.764609, 2.755161, 2.759913,
        2.738881, 2.728291, 2.726834, 2.712624, 2.703627, 2.694627, 2.695795, 2.680291,
        2.679662, 2.677909, 2.678916, 2.675905],
    "digits": [
        2.30284, 2.29945, 2.297354, 2.301612, 2.301013, 2.28969, 2.311908, 2.306055,
        2.292697, 2.28412, 2.307289, 2.28227, 2.272277, 2.273264, 2.247442, 2.258847,
        2.268735, 2.260976, 2.274985, 2.231526],
}


def write_digits(folder):
    """The 1,797 handwritten digits that scikit-learn ships, as an ImageNet-layout folder."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = Path(folder) / ("val" if i % 5 == 4 else "train") / str(label) / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype("uint8")).resize((16, 16)).save(path)
    return str(folder)


@pytest.mark.parametrize("source", GOLDEN)
def test_losses_of_20_steps_are_the_golden_ones_in_every_layout(source, tmp_path):
    """(tp, dp) in (1,1) (1,2) (1,4) (2,1) (2,2) (4,1), accumulation 1 and 4, through train.py from
    the images on: within 1e-5 relative of one committed list. Sums in another order differ by 1e-7
    a step; 20 Adam steps let that grow by some tens."""
    data = "shapes"
    if source == "digits":
        pytest.importorskip("sklearn")
        data = write_digits(tmp_path / "digits")
    for tp, dp in LAYOUTS:
        for accumulation in (1, 4):
            output = tmp_path / f"{tp}_{dp}_{accumulation}"
            lines, _, _ = run_training(
                output, "--data", data, "--tensor-parallel-size", tp, "--micro-batch-size",
                32 // dp // accumulation, world=tp * dp)
            assert list(losses(lines).values()) == pytest.approx(GOLDEN[source], rel=1e-5), (
                tp, dp, accumulation)


def test_losses_equal_a_plain_pytorch_loop(tmp_path):
    """20 steps of train.py equal a loop that anyone would write (nn.Module, torch.optim.AdamW,
    clip_grad_norm_, LambdaLR's schedule by hand): losses within 1e-5 relative, fp32."""
    lines, _, _ = run_training(tmp_path)
    config, vit, _ = parse_args(TRAIN_FLAGS)
    train_set, _ = data_module.open_data("shapes", vit.image_hw)
    model = ViT(replace(vit, num_classes=16), seed=0)
    decay = [p for n, p in model.named_parameters() if parallel.uses_weight_decay(n, p)]
    ids = {id(p) for p in decay}
    rest = [p for p in model.parameters() if id(p) not in ids]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": config.weight_decay},
         {"params": rest, "weight_decay": 0.0}], betas=(config.adam_beta1, config.adam_beta2))
    order, history = data_module.order(len(train_set), 0, 0), []
    for step in range(20):
        views, labels = zip(*[train_set.load(int(i)) for i in order[32 * step:32 * step + 32]],
                            strict=True)
        images = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 255
        images = (images - torch.tensor(config.mean).view(3, 1, 1)) / torch.tensor(
            config.std).view(3, 1, 1)
        loss = F.cross_entropy(model(images), torch.tensor(labels))
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, config, 20)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        optimizer.step()
        history.append(loss.item())
    assert list(losses(lines).values()) == pytest.approx(history, rel=1e-5)


RESUME = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1", "--drop-path-rate", "0.1",
          "--micro-batch-size", "8", "--num-workers", "2", "--augmentation", "nemo",
          "--global-batch-size", "48"]


def comparable(lines):
    """What must not differ between two runs of the same steps."""
    keys = ("step", "epoch", "loss", "accuracy", "lr", "grad_norm", "val_loss", "val_top1")
    return [{k: line[k] for k in keys if k in line} for line in lines]


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    """Stopped at step 5 in the middle of an epoch, with dropout, accumulation and workers: the
    next 20 steps' loss, accuracy, lr and gradient norm are bit-equal, metrics.jsonl holds each
    step once, and the log says what was resumed."""
    flags = [*RESUME, "--max-steps", "25", "--save-interval", "5", "--keep-last", "0"]
    whole, _, _ = run_training(tmp_path / "whole", *flags)
    checkpoints = tmp_path / "part" / "checkpoints"
    run_training(tmp_path / "part", *flags)
    for later in ("10", "15", "20", "25"):
        shutil.rmtree(checkpoints / f"step_000000{later}")
    resumed, _, outputs = run_training(tmp_path / "part", *flags)
    assert "resuming from" in outputs[0] and "step 5, image 240" in outputs[0]
    assert comparable(resumed) == comparable(whole)
    assert [line["step"] for line in resumed if "loss" in line] == list(range(1, 26))


def test_a_run_resumes_at_any_layout(tmp_path):
    """10 steps at one layout, the next 20 at another: losses within 1e-5 of one process's 30 steps,
    so the same images from the same weights and moments."""
    flags = ["--max-steps", 30, "--save-interval", 10]
    whole = losses(run_training(tmp_path / "whole", *flags)[0])
    for first, second in [((2, 2), (1, 1)), ((1, 1), (4, 1)), ((4, 1), (1, 2))]:
        output = tmp_path / str(first)
        for number, (tp, dp) in enumerate((first, second)):
            lines, _, outputs = run_training(output, "--tensor-parallel-size", tp, *flags,
                                             world=tp * dp)
            if number == 0:
                for later in ("20", "30"):
                    shutil.rmtree(output / "checkpoints" / f"step_000000{later}")
        assert "step 10, image 320" in outputs[0]
        assert losses(lines) == pytest.approx(whole, rel=1e-5)


def _stopped_training(argv, signal_number, at_step):
    """train.main in which this rank, if it is the last, signals itself during a step."""
    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        original, count = ShardedOptimizer.step, [0]

        def step(self, lr):
            count[0] += 1
            if count[0] == at_step:
                os.kill(os.getpid(), signal_number)
            return original(self, lr)
        ShardedOptimizer.step = step
    train.main(argv)


@pytest.mark.parametrize("world, number", [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_signal_to_any_rank_saves_and_exits_0(world, number, tmp_path):
    """The other ranks stop at the same step; the checkpoint is complete; the resumed run's losses
    equal those of a run that was never stopped, bit by bit."""
    whole, _, _ = run_training(tmp_path / "whole", *RESUME, world=world)
    argv = [*TRAIN_FLAGS, *RESUME, "--output-dir", str(tmp_path / "part")]
    _, codes, outputs = run_ranks(world, _stopped_training, argv, number, 7)
    assert codes == [0] * world and "stopped by" in outputs[0]
    saved = parallel.complete_checkpoints(tmp_path / "part" / "checkpoints")
    assert len(saved) == 1 and 7 <= parallel.read_meta(saved[0])["step"] <= 9
    resumed, _, _ = run_training(tmp_path / "part", *RESUME, world=world)
    assert comparable(resumed) == comparable(whole)


def _poisoned_training(argv, steps):
    """train.main in which the loss of the given steps is infinite."""
    original, count = ShardedOptimizer.backward, [0]

    def backward(self, loss, last=True):
        count[0] += 1
        return original(self, loss * float("inf") if count[0] in steps else loss, last)
    ShardedOptimizer.backward = backward
    train.main(argv)


def test_non_finite_gradients_are_skipped_and_three_in_a_row_stop(tmp_path):
    """Two bad steps in a row are logged with their number and skipped, the run goes on, and their
    norm is null in metrics.jsonl (NaN is no JSON); three end it with an error that names the last.
    """
    flags = [*TRAIN_FLAGS, "--output-dir"]
    _, codes, outputs = run_ranks(2, _poisoned_training, [*flags, str(tmp_path / "a")], {5, 6, 9})
    assert codes == [0, 0] and "step 6: gradient norm" in outputs[0]
    assert "no weight changed (2 in a row)" in outputs[0] and "done: top-1" in outputs[0]
    lines = [json.loads(line, parse_constant=pytest.fail)
             for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x.get("grad_norm", 0) is None] == [5, 6, 9]
    _, codes, outputs = run_ranks(2, _poisoned_training, [*flags, str(tmp_path / "b")], {5, 6, 7},
                                  check=False)
    assert 0 not in codes and "3 steps in a row, the last one 7" in outputs[0]


def test_unreadable_images_are_named_counted_and_never_replaced(tmp_path):
    """Three broken files of 60: with the limit at 10 % the run ends well and names each once; at
    the default 0.1 % it stops with the count, the limit and the names, and saves first."""
    for split, count in (("train", 60), ("val", 4)):
        for i in range(count):
            path = tmp_path / "data" / split / str(i % 2) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (4 * i, 200 * (i % 2), 0)).save(path)
    for i in (3, 4, 5):
        (tmp_path / "data" / "train" / str(i % 2) / f"{i}.png").write_bytes(b"not an image")
    flags = ["--data", tmp_path / "data", "--max-steps", 4]
    _, _, outputs = run_training(tmp_path / "a", *flags, "--max-unreadable", 0.1, world=2)
    assert outputs[0].count("unreadable image, skipped") == 3 and "1/3.png" in outputs[0]
    _, codes, outputs = run_training(tmp_path / "b", *flags, world=2, check=False)
    assert 0 not in codes and "3 of 60 training images are unreadable" in outputs[0]
    assert parallel.complete_checkpoints(tmp_path / "b" / "checkpoints")


def _evaluate_only(data, images, world_batch):
    """Counts of evaluate() with this rank's share of the images, and a model of random weights."""
    config = TrainConfig(num_workers=0)
    grid = grid_of(1)
    vit = replace(TINY, image_size=16, num_classes=16)
    torch.manual_seed(0)
    model = build(vit, grid, random_weights(vit, scale=0.5))
    shapes = data_module.Shapes((16, 16), "val")
    loader = data_module.eval_loader(shapes, config, (16, 16), world_batch, grid.world.rank,
                                     grid.world.size, "cpu")
    result = train.evaluate(
        model, loader, lambda x: data_module.normalize(x, config.mean, config.std, torch.float32),
        train.StopSignal(grid), grid, torch.device("cpu"))
    return {**result, "val_unreadable": len(result["val_unreadable"])}


def test_evaluation_counts_each_image_once_for_any_split():
    """1,000 images on 1, 2 and 3 ranks in batches of 7, 64 and 500: the same number of images and
    of top-1 and top-5 hits, the loss within 1e-6."""
    reference = run_ranks(1, _evaluate_only, None, None, 100)[0][0]
    assert reference["val_count"] == 1000 and 0 < reference["val_top1"] < 1
    for world, batch in [(1, 7), (2, 64), (3, 500), (3, 7)]:
        for result in run_ranks(world, _evaluate_only, None, None, batch)[0]:
            assert result == pytest.approx(reference, rel=1e-6)
            assert result["val_top1"] == reference["val_top1"]


def test_a_fresh_run_trains_evaluates_and_reports(tmp_path):
    """metrics.jsonl has the documented fields for each step and evaluation, the output the batch
    equation, the kernel and the final line."""
    lines, _, outputs = run_training(tmp_path, "--eval-interval", 10, "--save-interval", 10,
                                     "--keep-last", 1, world=2)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert set(steps[0]) == {"step", "epoch", "loss", "accuracy", "lr", "grad_norm",
                             "images_per_second", "mfu", "memory_gib", "data_wait"}
    scores = [line for line in lines if "val_top1" in line]
    assert [line["step"] for line in scores] == [10, 20] and scores[0]["val_count"] == 80
    assert "batch 32 = micro-batch 16 x dp 2 x accumulation 1" in outputs[0]
    assert "attention flash" in outputs[0] and "done: top-1" in outputs[0]
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "latest", "step_00000020"]
    assert not outputs[1].strip(), "only rank 0 speaks"


BAD_INPUT = [
    (1, ["--tensor-parallel-size", "3"], "legal for demo: 1, 2, 4"),
    (3, ["--tensor-parallel-size", "2"], "must divide the number of processes 3"),
    (2, ["--tensor-parallel-size", "2", "--micro-batch-size", "3"], "nearest: 2, 4"),
    (1, ["--global-batch-size", "10", "--micro-batch-size", "4"], "nearest: 8, 12"),
    (1, ["--image-size", "20"], "nearest: 16, 24"),
    (1, ["--model", "B15"], "known: Ti16, S16, B16"),
    (1, ["--recipe", "pretrian"], "Did you mean pretrain?"),
    (1, ["--data", "/nowhere"], "no folder /nowhere"),
    (1, ["--global-batch-size", "16384"], "8000 training images, fewer than one"),
    (1, ["--micro-batch-size", "0"], "--micro-batch-size 0 must be positive"),
    (1, ["--lr", "-1"], "--lr -1.0 must not be negative"),
    (1, ["--hidden-size", "30"], "must be divisible by --num-attention-heads"),
    (1, ["--attention", "cudnn"], "--attention cudnn does not run on cpu"),
    (1, ["--attention", "flash-attn"], "Legal here: auto, flash, math"),
    (1, ["--num-classes", "7"], "has 16 classes"),
    (1, ["--resume", "/nowhere"], "--resume /nowhere is no directory"),
    (1, ["--output-dir", "/proc/x"], "--output-dir /proc/x cannot be written"),
    (2, ["--min-lr", "1"], "--min-lr 1.0 must not exceed --lr"),
    (1, ["--checkpoint-num-layers", "2"], "it needs --activation-checkpointing full"),
    (1, ["--momentum", "0.5"], "it needs --optimizer sgd"),
    (1, ["--epochs", "3"], "--epochs and --max-steps contradict each other"),
    (1, ["--attention", "triton"], "it needs Triton, CUDA and bf16. Legal here: auto, flash, math"),
    (1, ["--precision", "bf16-O2-fp8"], "capability 8.9 or higher), not CPU"),
    (1, ["--precision", "bf16-O2-fp8", "--micro-batch-size", "8"], "is 56; legal with"),
    (1, ["--precision", "bf16-O2-fp8", "--hidden-size", "40"], "to be a multiple of 16"),
    (1, ["--precision", "bf16-O2-fp8", "--global-batch-size", "24"], "nearest: 16, 32"),
    (1, ["--peer-copies"], "--peer-copies needs several GPUs of one host"),
    (1, ["--tp-comm-overlap"], "--tp-comm-overlap needs --tensor-parallel-size above 1"),
    (2, ["--tp-comm-overlap", "--tensor-parallel-size", "2"], "above 1, GPUs and a --precision"),
    (2, ["--tp-comm-overlap", "--tensor-parallel-size", "2", "--precision", "bf16-O2-fp8",
         "--dry-run"], "and a --precision without fp8"),
    (1, ["--profile"], "--profile needs --benchmark N"),
    (1, ["--benchmark", "2"], "--data has no effect with --benchmark"),
]


@pytest.mark.parametrize("world, flags, message", BAD_INPUT,
                         ids=["".join(flags) for _, flags, _ in BAD_INPUT])
def test_bad_input_gets_one_clear_error(world, flags, message, tmp_path):
    """One line from rank 0 with the value and what would be legal, exit code 2, no traceback, no
    checkpoint. (The other ranks wait for torchrun to end them; here they are not started.)"""
    os_environ = {"WORLD_SIZE": str(world)}
    _, codes, outputs = run_ranks(1, _main_of_a_world, os_environ,
                                  [*TRAIN_FLAGS, "--output-dir", str(tmp_path / "o"), *flags],
                                  check=False)
    assert codes == [2]
    assert message in outputs[0] and "Traceback" not in outputs[0]
    assert outputs[0].count("train.py: error:") == 1
    assert not list(tmp_path.glob("o/checkpoints/step_*"))


def test_a_profile_that_cannot_be_written_is_an_error_before_the_first_step():
    """One line with the directory, exit code 2: not a traceback after the measurement."""
    argv = ["--benchmark", "1", "--profile", "--output-dir", "/proc/x"]
    _, codes, outputs = run_ranks(1, train.main, argv, check=False)
    assert codes == [2] and "Traceback" not in outputs[0] and "images/s" not in outputs[0]
    assert "--output-dir /proc/x cannot be written" in outputs[0]


def _main_of_a_world(environment, argv):
    os.environ.update(environment)
    train.main(argv)


def test_a_checkpoint_of_another_model_or_data_is_refused(tmp_path):
    """--resume auto never starts over silently: it names what differs; --resume none refuses to
    mix runs."""
    run_training(tmp_path, "--max-steps", 2)
    for flags, message in [(["--hidden-size", 64], "hidden_size 32 (this run: 64)"),
                           (["--optimizer", "sgd"], "give the same --optimizer"),
                           (["--resume", "none"], "would mix a new run")]:
        _, codes, outputs = run_training(tmp_path, "--max-steps", 2, *flags, check=False)
        assert codes == [2] and message in outputs[0], outputs[0]


@pytest.mark.parametrize("tp", [1, 2])
def test_benchmark_prints_a_row_the_loaders_rate_and_a_profile(tp, tmp_path):
    """Two real steps without data or checkpoint: the row, the loader beside it, the shares of a
    step, which cover it (overlapping threads may add to more), and a trace; with tp 2 communication
    is in the shares."""
    argv = ["--benchmark", "2", "--micro-batch-size", "8", "--augmentation", "nemo", "--profile",
            "--benchmark-data", "shapes", "--tensor-parallel-size", str(tp),
            "--output-dir", str(tmp_path)]
    _, _, outputs = run_ranks(tp, train.main, argv)
    names, row = (line.split("  ") for line in outputs[0].splitlines() if "x 1  " in line
                  or line.startswith("model"))
    cells = dict(zip([x.strip() for x in names if x], [x.strip() for x in row if x], strict=True))
    assert (cells["model"], cells["tp x dp"], cells["micro-batch"]) == ("demo", f"{tp} x 1", "8")
    each, total = (float(cells[name].replace(",", "")) for name in ("images/s per GPU", "in all"))
    assert total == pytest.approx(each * tp, abs=0.1 * tp) and total > 0
    shares = dict(re.findall(r"^  (\w[\w, ]+?) +[\d.]+ ms +([\d.]+) %", outputs[0], re.M))
    assert len(shares) == 7 and sum(map(float, shares.values())) > 99  # each is rounded
    assert (float(shares["communication"]) > 0) == (tp > 1)
    assert re.search(r"shapes with 0 workers .* loader alone [\d,.]+ images/s", outputs[0])
    assert len(list(tmp_path.glob("profile/rank_*.json.gz"))) == tp
    assert not (tmp_path / "checkpoints").exists()


def test_dry_run_prints_the_plan_and_trains_nothing(tmp_path):
    """Sizes, tokens, FLOPs, memory by part, steps, rates, legal layouts, for 8 processes in one."""
    argv = ["--model", "g14", "--data", "shapes", "--recipe", "pretrain", "--dry-run",
            "--tensor-parallel-size", "2", "--output-dir", str(tmp_path / "o")]
    _, _, outputs = run_ranks(1, _main_of_a_world, {"WORLD_SIZE": "8"}, argv)
    for text in ("1,013.23 M parameters", "264 = 8 class + 16 x 16 patches of 14 px",
                 "dp 4 x accumulation", "masters and moments", "lr at step", "GiB per rank",
                 "legal --tensor-parallel-size  1, 2, 4, 8, 16"):
        assert text in outputs[0], outputs[0]
    assert not (tmp_path / "o").exists()


def test_memory_plan_equals_what_is_allocated():
    """The dry run's weights, gradients and optimizer state are the buckets' bytes exactly."""
    config = TrainConfig(precision="bf16-O2")
    plan = train.memory_plan(TINY, config, 1, 1, 8)
    optimizer = _optimizer(ViT(TINY), Grid(), weight_dtype=torch.bfloat16)
    assert plan["weights"] == sum(b.weight.nbytes for b in optimizer.buckets)
    assert plan["gradients"] == sum(b.grad.nbytes for b in optimizer.buckets)
    assert plan["masters and moments"] == sum(
        t.nbytes for b in optimizer.buckets for t in (b.master, *b.state.values()))


# ----------------------------------------------------------------------------- fine-tune, use
def draw_folder(folder, count, names=None, size=16):
    """Shapes as files: folder/CLASS/NUMBER.png, or with `names` of fewer classes."""
    shapes = data_module.Shapes((size, size), "val")
    for i in range(count):
        image, label = shapes.load(i)
        path = Path(folder) / (names[label % len(names)] if names else shapes.classes[label])
        path.mkdir(parents=True, exist_ok=True)
        image.save(path / f"{i:03d}.png")


def run_mode(*argv, world=1, code=0):
    """train.py's main() with these flags alone: what rank 0 printed."""
    _, codes, outputs = run_ranks(world, train.main, list(map(str, argv)), check=False)
    assert codes[0] == code, outputs[0]
    assert code == 0 or outputs[0].count("train.py: error:") == 1 and "Traceback" not in outputs[0]
    return outputs[0]


def test_fine_tuning_starts_from_the_weights_and_resumes_without_them(tmp_path):
    """A checkpoint of 16 px fine-tuned at 24 x 32 px on other classes with tp 2, lr 0: every weight
    but the new head, which stays zero, is the source's to the bit, positions resized. Without
    --init-from the recipe is refused; resumed, it goes on from its own checkpoint although the
    source is gone."""
    for split in ("train", "val"):
        draw_folder(tmp_path / "data" / split, 40, ["left", "right"])
    run_training(tmp_path / "a", "--max-steps", 2)
    flags = ["--recipe", "finetune", "--model", "demo", "--data", tmp_path / "data", "--lr", 0,
             "--image-size", "24,32", "--num-workers", 0]
    _, codes, outputs = run_training(tmp_path / "b", *flags, check=False)
    assert codes == [2] and "--recipe finetune needs --init-from" in outputs[0]
    flags += ["--init-from", tmp_path / "a", "--tensor-parallel-size", 2]
    source = model_module.read_weights(tmp_path / "a")
    config = ViTConfig(**{k: source.facts[k] for k in model_module.SHAPE}, image_size=(24, 32),
                       num_classes=2, head="linear")
    expected, report = model_module.fit_weights(source, config)
    _, _, outputs = run_training(tmp_path / "b", *flags, "--max-steps", 2, world=2)
    for line in (*report, "newly initialised for 2 classes", "pos_embed resized from 2x2 to 3x4"):
        assert line in outputs[0]
    found = model_module.read_weights(tmp_path / "b").tensors
    assert found.keys() - expected.keys() == {"head.weight", "head.bias"}
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    assert not found["head.weight"].any()
    shutil.rmtree(tmp_path / "a")
    _, _, outputs = run_training(tmp_path / "b", *flags, "--max-steps", 4, world=2)
    assert "step 2, image 64" in outputs[0] and "is not read again" in outputs[0]


def test_evaluation_of_a_checkpoint_is_exact_for_any_split(tmp_path):
    """103 images, no train folder: the same line from 1 process and 3, batches of 7 and 64, with
    workers and without, with tp 2, and from the export. A missing class is named."""
    run_training(tmp_path / "a", "--max-steps", 20, "--head", "linear")
    draw_folder(tmp_path / "data/val", 103)
    flags = ["--eval", "--data", tmp_path / "data", "--checkpoint", tmp_path / "a"]

    def score(*more, world=1):
        return re.search("validation.*", run_mode(*flags, *more, world=world))[0]
    line = score("--micro-batch-size", 7, "--num-workers", 0)
    assert "on 103 images" in line and not line.startswith("validation top-1 0.00 %")
    assert score("--micro-batch-size", 64, "--num-workers", 2, world=3) == line
    assert score("--tensor-parallel-size", 2, world=2) == line
    run_mode("--export", tmp_path / "a.safetensors", "--checkpoint", tmp_path / "a")
    flags[-1] = tmp_path / "a.safetensors"
    assert score() == line
    shutil.rmtree(tmp_path / "data/val/red star")
    assert "a.safetensors: red star" in run_mode(*flags, code=2)


def test_flat_validation_images_take_their_classes_from_a_file(tmp_path):
    """Either form gives the folders' labels; what does not agree is named."""
    for i in range(3):
        paint(tmp_path / "val" / f"v_{i}.JPEG")
    lines = tmp_path / "lines.txt"
    for text in ("v_0.JPEG n01\nv_1.JPEG n02\n\nv_2.JPEG n01\n",
                 "ImageId,PredictionString\nv_1,n02 1 2 3 4 n01 5 6 7 8 \nv_0,n01 1\nv_2,n01"):
        lines.write_text(text)
        source = data_module.open_val(tmp_path, HW, lines)
        assert source.classes == ["n01", "n02"] and source.labels.tolist() == [0, 1, 0]
        assert source.name(1) == "val/v_1.JPEG" and source.load(1)[1] == 1
        assert data_module.open_val(tmp_path, HW, lines, ["n00", "n01", "n02"]).labels.tolist() == [
            1, 2, 1]
    lines.write_text("v_0 10\nv_1 9\nv_2 10\n")
    assert data_module.open_val(tmp_path, HW, lines).classes == ["9", "10"]
    for text, message in [("v_0 a\nv_1 b", "1 images of .* without a label: v_2"),
                          ("v_0 a\nv_1 b\nv_2 a\nv_3 a", "1 images of .* missing: v_3"),
                          ("v_0", "'v_0' is not of the form"), ("", "3 images .* without a label")]:
        lines.write_text(text)
        with pytest.raises(ValueError, match=message):
            data_module.open_val(tmp_path, HW, lines)
    lines.write_text("v_0 a\nv_1 b\nv_2 a")
    with pytest.raises(ValueError, match="1 images .* of a class unknown to the model: v_1"):
        data_module.open_val(tmp_path, HW, lines, ["a"])
    with pytest.raises(ValueError, match="name their classes with --val-labels"):
        data_module.open_val(tmp_path, HW)


def test_predictions_are_the_same_table_for_any_split(tmp_path):
    """Whatever decodes is classified: 1 x 1 pixel, a 20,000 px panorama, an animation, a name that
    is no ASCII; what does not is named, counted, and a row without predictions. One and three
    processes write the same bytes, and a contact sheet."""
    run_training(tmp_path / "a", "--max-steps", 20)
    images = tmp_path / "images"
    draw_folder(images, 20)
    paint(images / "1x1.png", (1, 1))
    paint(images / "panorama.png", (20_000, 9), colour=(200, 30, 30))
    paint(images / "\u00e9lan \u5c71.jpg")
    frames = [Image.new("P", (9, 9), i) for i in range(3)]
    frames[0].save(images / "moving.gif", save_all=True, append_images=frames[1:])
    (images / "broken.jpg").write_bytes(b"\xff\xd8not an image")
    tables = []
    for world, batch in [(1, 64), (3, 64), (3, 7)]:
        text = run_mode("--predict", images, "--checkpoint", tmp_path / "a", "--output-dir",
                        tmp_path / "out", "--micro-batch-size", batch, world=world)
        assert "25 images, 1 unreadable" in text and "unreadable image: broken.jpg" in text
        tables.append((tmp_path / "out/predictions.csv").read_bytes())
        assert sorted(os.listdir(tmp_path / "out")) == ["predictions.csv", "predictions.png"]
    assert tables[0] == tables[1] == tables[2]
    rows = {row[0]: row[1:] for row in csv.reader(tables[0].decode().splitlines())}
    assert list(rows)[1:] == sorted(list(rows)[1:], key=os.fsencode) and len(rows) == 26
    assert rows["broken.jpg"] == [] and len(rows["\u00e9lan \u5c71.jpg"]) == 10
    best = [float(p) for p in rows["red star/003.png"][1::2]]
    assert best == sorted(best, reverse=True) and 0 < sum(best) <= 1.001
    with Image.open(tmp_path / "out/predictions.png") as sheet:
        assert sheet.size == (6 * 188 + 12, 4 * 232 + 12)


def test_imagenets_folder_names_become_words():
    """The thousand names n + 8 digits, and a thousand classes without names; any other stays."""
    assert train.class_names(tuple(f"n{i:08d}" for i in range(1000)), 1000)[0] == "tench"
    assert train.class_names(None, 1000)[999] == "toilet tissue"
    assert train.class_names(("n01440764", "b"), 2) == ["n01440764", "b"]
    assert train.class_names(None, 2) == ["class 0", "class 1"]


@pytest.mark.parametrize("flags, message", [
    (["--eval"], "--eval needs --checkpoint PATH"),
    (["--checkpoint", "x"], "--checkpoint needs --eval, --predict DIR or --export FILE"),
    (["--format", "hf"], "--format needs --eval, --predict DIR or --export FILE"),
    (["--init-image-size", "8"], "--init-image-size needs --init-from or --checkpoint"),
    (["--eval", "--predict", "d", "--checkpoint", "x"], "--eval and --predict contradict"),
    (["--eval", "--dry-run", "--checkpoint", "x"], "--eval and --dry-run contradict"),
    (["--eval", "--checkpoint", "x", "--lr", "1"], "--lr has no effect with --eval"),
    (["--export", "f", "--checkpoint", "x", "--data", "d"], "--data has no effect with --export"),
    (["--val-labels", "f"], "--val-labels has no effect with --data shapes"),
])
def test_flags_without_effect_on_a_mode_are_errors(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_args(flags)


def test_bad_input_of_a_mode_is_one_clear_error(tmp_path):
    """Exit code 2 and one line, nothing written: no folder, no image, no weights, weights without
    a head, a file where the output should go, images with other classes."""
    out, images = tmp_path / "out", tmp_path / "images"
    export(tmp_path / "w.pt", SMALL, "timm")
    torch.save({k: v for k, v in ViT(SMALL).state_dict().items() if "head" not in k},
               tmp_path / "bare.pth")
    torch.save(ViT(SMALL).state_dict(), tmp_path / "timm.pth")
    images.mkdir()
    (tmp_path / "file").write_text("")

    def predict(*flags, checkpoint="w.pt"):
        return run_mode("--predict", *flags, "--checkpoint", tmp_path / checkpoint, code=2)
    assert "does not tell its number of heads: give --num-att" in predict(
        images, checkpoint="timm.pth")
    assert "no folder /nowhere" in predict("/nowhere", "--output-dir", out)
    assert "not a single image" in predict(images, "--output-dir", out)
    assert "has no head: fine-tune it" in predict(images, checkpoint="bare.pth")
    paint(images / "1.png")
    assert "/x cannot be written" in predict(images, "--output-dir", tmp_path / "file/x")
    assert not out.exists()
    make_folder(tmp_path / "data")
    assert "has 2 classes, --checkpoint" in run_mode(
        "--eval", "--data", tmp_path / "data", "--checkpoint", tmp_path / "w.pt", code=2)
    assert "must end in .pt or .safetensors" in run_mode(
        "--export", out / "w.onnx", "--checkpoint", tmp_path / "w.pt", code=2)
    assert not out.exists()


def test_torchrun_ends_the_job_when_a_rank_fails(tmp_path):
    """`torchrun train.py` with one rank that dies at step 3: non-zero exit well before any
    collective's timeout, and the failing rank's own traceback is in the report."""
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys, os; sys.path.insert(0, {str(HERE)!r})\n"
        "import train\n"
        "from torch.distributed.elastic.multiprocessing.errors import record\n"
        "step, count = train.ShardedOptimizer.step, [0]\n"
        "def failing(self, lr):\n"
        "    count[0] += 1\n"
        "    if os.environ['RANK'] == '1' and count[0] == 3:\n"
        "        raise RuntimeError('rank one is ill')\n"
        "    return step(self, lr)\n"
        "train.ShardedOptimizer.step = failing\n"
        "train.run()\n")
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(script), *TRAIN_FLAGS, "--output-dir", str(tmp_path / "o")],
        capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and time.monotonic() - start < 60
    assert "RuntimeError: rank one is ill" in done.stderr
    assert "in failing" in done.stderr[done.stderr.rindex("Root Cause"):]
