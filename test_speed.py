"""What is faster computes the same: `python -m pytest test_speed.py`, CPU only, gloo ranks.

kernels.py with its parts, peer.py, recomputation and benchmark.py are compared with the plain
model, in parts and together. What needs several GPUs runs on ranks whose memory is files
(FileGpus); Triton's kernels run in its interpreter.
"""

import collections
import contextlib
import itertools
import math
import os
import re
import subprocess
import sys
import time
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import attention as attention_file
import benchmark
import kernels
import memory
import model as model_file
import parallel
import peer
import products
import runtime
import train
from configs import MODELS, BenchmarkConfig, TrainConfig
from model import ViT
from parallel import Axis, Grid
from recipes import parse_run
from testing import (
    HERE,
    OTHER,
    TINY,
    batch_of,
    build,
    full_weights,
    generator,
    gradients,
    grid_of,
    max_difference,
    optimizer_of,
    random_weights,
    run_command,
    run_ranks,
)

CPU = torch.device("cpu")
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
DROPS = dict(hidden_dropout=0.2, drop_path_rate=0.3)


# ----------------------------------------------------------------------------- stand-ins, helpers
class Handle(types.SimpleNamespace):
    """Symmetric memory's: with it the memory goes, and who still uses that crashes."""


class FileGpus(peer.Gpus):
    """peer.Gpus for ranks on a CPU: memory is files that all of them map, NaN at first; it is its
    own stream and event, and `log` tells what happens on these and in memory, one after the other.
    After each meeting one rank is late: what another then writes too early, it reads."""

    def __init__(self, folder=None, reach=True):
        self.folder, self.reach, self.log, self.works, self.shared = folder, reach, [], [], 0

    def in_reach(self, axis, device):
        return self.reach and axis.size > 1

    def stream(self):
        return self
    event = current = stream

    def on(self, stream):
        return contextlib.nullcontext()

    def synchronize(self):
        pass

    def share(self, numel, dtype, axis, device, instead):
        self.shared += 1
        paths = [f"{self.folder}/{axis.group.group_name}_{self.shared}_{rank}"
                 for rank in range(axis.size)]

        def map_file(path):
            return torch.from_file(path, True, numel, dtype=dtype)
        map_file(paths[axis.rank]).view(torch.uint8).fill_(255)  # NaN, in every type
        dist.barrier(axis.group)
        memories = [map_file(path) for path in paths]

        def get_buffer(rank, shape, dtype, offset):
            return memories[rank].view(dtype)[offset:offset + math.prod(shape)].view(shape)

        def barrier():
            self.log.append("barrier")
            dist.barrier(axis.group)
            if axis.rank == 0:
                time.sleep(0.005)
        handle = Handle(get_buffer=get_buffer, barrier=barrier)
        weakref.finalize(handle, os.truncate, paths[axis.rank], 0).atexit = False
        return memories[axis.rank], handle

    def begun(self, sent, result):
        self.log.append("begun")
        self.works.append(Late(self.log, sent, result))
        torch._C._distributed_c10d._register_work(result, self.works[-1])
        return self.works[-1]

    # a stream's
    def wait_stream(self, other):
        self.log.append("gradients")

    def wait_event(self, event):
        self.log.append("after")

    def record_event(self):
        self.log.append("end")
        return self

    # an event's
    def record(self):
        self.log.append("ready")

    def wait(self):
        self.log.append("wait")


class Late(torch._C._distributed_c10d.Work):
    """A shift's end: its result is NaN before, as on a GPU what it sends is still to be copied and
    its result to be written: neither may have been freed, nor the first changed."""

    def __init__(self, log, *tensors):
        super().__init__()
        self.log, self.pending = log, True
        self.places = [(StorageWeakRef(x.untyped_storage()), x.dtype, x.storage_offset(), x.shape)
                       for x in tensors]
        self.sent, self.value = (x.clone() for x in tensors)
        tensors[1].fill_(float("nan"))

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


class Operators(TorchDispatchMode):
    """Counts the operators that run inside, by name."""

    def __enter__(self):
        self.count = collections.Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.name().split("::")[1].removesuffix(".default")] += 1
        return func(*args, **kwargs or {})


def of_flags(config, grid, weights, gpus=None, **flags):
    """The model of `weights` that runtime.build_model makes of these flags of train.py, with `gpus`
    for CUDA's."""
    flags = TrainConfig(precision="fp32", tensor_parallel_size=grid.tp.size, **flags)
    run = runtime.Run(flags, config, grid, CPU, micro_batch=8)
    with mock.patch.object(peer, "Gpus", lambda: gpus) if gpus else contextlib.nullcontext():
        model, _ = runtime.build_model(run)
    shards = {n: parallel.shard(weights[n], p, grid.tp) for n, p in model.named_parameters()}
    model.load_state_dict(shards, strict=True)
    return model


def loss_gradients(model, images, labels, seed=3):
    torch.manual_seed(seed)
    F.cross_entropy(model(images).float(), labels, reduction="sum").backward()
    return gradients(model)


# ----------------------------------------------------------------------------- dropout
def test_dropout_is_a_hash_of_seed_and_element():
    """Zeros at the rate, in every row and column, the rest scaled by 1 / (1 - rate); neighbours in
    any direction and masks of other seeds, also of close ones, are uncorrelated. Bounds are 5
    standard deviations of independent draws; rate 0.1 of 600 x 500 elements."""
    n, m, rate = 600, 500, 0.1

    def kept(seed):
        y = kernels.dropout(torch.ones(n, m), rate, torch.tensor(seed, dtype=torch.int32))
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


# 4,096 images of 3 tokens of 8 features; what each part of a block adds is one number, so that what
# was dropped shows.
KNOWN = replace(TINY, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, num_layers=3,
                image_size=(4, 4))
EMBEDDING, ATTENTION, MLP = 200.0, 10.0, 100.0


def known_model(**rates):
    """A fused model whose embedding, attentions and MLPs give the numbers above, everywhere."""
    model = ViT(replace(KNOWN, **rates)).requires_grad_(False)
    for name, param in model.named_parameters():
        value = (EMBEDDING if name in ("cls_token", "patch_embed.proj.bias") else
                 ATTENTION if name.endswith("attn.proj.bias") else
                 MLP if name.endswith("fc2.bias") else 0)
        param.fill_(value)
    kernels.apply(model, fused=True)
    return model


def known_stream(model):
    """One forward: what each block takes and gives, (x, y, x_out, y_out), and what the last norm
    takes."""
    blocks, last = [], []
    hooks = [block.register_forward_hook(lambda _, args, out: blocks.append((*args[0][:2],
                                                                             *out[:2])))
             for block in model.blocks]
    hooks.append(model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0])))
    model(torch.zeros(4096, 3, 4, 4))
    for hook in hooks:
        hook.remove()
    return blocks, last[0]


def known_masks(model):
    """The masks of one forward with all rates 1/2, by name, the first 4,096 elements of each: 1
    kept, -1 dropped, 0 where that does not show because drop path has taken the whole image."""
    blocks, last = known_stream(model)
    masks = {}
    for i, (x, y, x_out, y_out) in enumerate(blocks):
        read = x_out.shape[1]          # tokens that go on: of the last block one
        added = x_out - x[:, :read]    # 2 * 200 or 0 of before, 4 * 10 or 0 of attention
        assert set(added.unique().tolist()) == {0.0, 40.0, 400.0, 440.0}
        attention = added % 400 > 0                                            # [b, S, D]
        path = attention.flatten(1).any(1)                                     # [b]
        masks[f"before block {i}"] = torch.where(y[:, :read] > 0, 2.0 * (added >= 400) - 1, 0)
        masks[f"attention {i}, images"] = 2.0 * path - 1
        masks[f"attention {i}"] = torch.where(path[:, None, None], 2.0 * attention - 1, 0)
        masks[f"mlp {i}, images"] = 2.0 * (y_out > 0).flatten(1).any(1) - 1
    masks["last"] = torch.where(y_out[:, 0] > 0, 2.0 * (last > x_out[:, 0]) - 1, 0)
    return {name: mask.flatten()[:4096] for name, mask in masks.items()}


def test_every_draw_of_a_fused_model_has_a_seed_of_its_own():
    """All 13 draws of three blocks (two dropouts and two of drop path each, and the last dropout),
    in two forwards: any two masks a, b of 4,096 are uncorrelated, within 7 standard deviations of
    independent draws, 64 each; nor is one the other with its elements permuted by an XOR of the
    index, as it would be if their seeds differed in low bits only: the sums of a[i] b[i ^ k], for
    all k by Walsh transforms, stay below 0.6 of the elements that show in both."""
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    hadamard = step
    for _ in range(5):
        hadamard = torch.kron(hadamard, step)                                  # [64, 64]

    def walsh(mask):
        return hadamard @ mask.view(64, 64) @ hadamard
    torch.manual_seed(0)
    model, masks = known_model(hidden_dropout=0.5, drop_path_rate=0.5), {}
    for block in model.blocks:
        block.keep.fill_(0.5)
    for forward in "first", "second":
        for name, mask in known_masks(model).items():
            assert mask.abs().sum() > 1000, name
            masks[f"{name}, {forward} forward"] = walsh(mask), mask.abs().sum()
    assert len(masks) == 26
    for (one, (a, shown)), (other, (b, shown_too)) in itertools.combinations(masks.items(), 2):
        sums = walsh(a * b).abs() / 4096
        assert sums[0, 0] < 7 * 64 and sums.max() < 0.6 * shown * shown_too / 4096, (one, other)


@pytest.mark.parametrize("uniform", [False, True])
def test_drop_path_of_fused_blocks_takes_whole_images_at_each_blocks_rate(uniform):
    """Rates 0, 1/4, 1/2 of three blocks, or 1/2 of all: each half block is there or not for a whole
    image, scaled by 1 / (1 - rate); the share that is there within 5 standard deviations, of 4,096
    images. In eval mode all is there and unscaled, also what dropout takes."""
    model = known_model(drop_path_rate=0.5, drop_path_uniform=uniform)
    rates = (0.5, 0.5, 0.5) if uniform else (0.0, 0.25, 0.5)
    for (x, y, x_out, y_out), rate in zip(known_stream(model)[0], rates, strict=True):
        for half, value in [(x_out - x - y, ATTENTION), (y_out, MLP)]:
            image = half[:, 0, 0]
            assert torch.equal(half, image[:, None, None].expand_as(half))
            kept = image > value / 2
            scaled = torch.where(kept, value / (1 - rate), 0)
            assert (image - scaled).abs().max() < 1e-3  # the rounding of sums near 1,000
            assert abs(kept.float().mean() - (1 - rate)) <= 5 * (rate * (1 - rate) / 4096) ** 0.5
    blocks, last = known_stream(known_model(hidden_dropout=0.5, drop_path_rate=0.5).eval())
    for i, (x, y, x_out, y_out) in enumerate(blocks):
        assert (x_out == x + y + ATTENTION).all() and (y_out == MLP).all()
        assert (y == (MLP if i else EMBEDDING)).all()
    assert (last == EMBEDDING + 3 * (ATTENTION + MLP)).all()


def test_drop_path_by_batch_of_fused_blocks_computes_only_what_it_keeps():
    """At 1/2 the branch sees 4 of 8 images; result, and gradients of x and of the branch's weight,
    are those of all images under a mask of 0 and 8 / 4. Over 1,000 seeds each image is
    kept at its share within 5 standard deviations, and all 70 choices of 4 occur."""
    block = known_model(drop_path_rate=0.5, drop_path_mode="batch").blocks[2]
    x, dy = torch.randn(2, 8, 3, 8, generator=generator("x"))
    x, weight = x.requires_grad_(), torch.ones(8, requires_grad=True)
    seen, masks = [], []

    def branch(x):
        seen.append(len(x))
        return x.square() * weight
    for seed in torch.randint(-2**31, 2**31, (1000,), dtype=torch.int32, generator=generator("s")):
        y = block.path(branch, x, seed)
        masks.append((y != 0).flatten(1).any(1))
    expected = x.square() * weight * masks[-1].view(-1, 1, 1) * 2
    assert set(seen) == {4} and torch.equal(y, expected)
    found, right = (torch.autograd.grad(z, (x, weight), dy) for z in (y, expected))
    assert torch.equal(found[0], right[0]) and (found[1] - right[1]).abs().max() < 1e-5
    masks = torch.stack(masks)
    assert (masks.sum(1) == 4).all() and len(masks.unique(dim=0)) == 70
    assert (masks.float().mean(0) - 0.5).abs().max() < 5 * 0.5 / 1000 ** 0.5


@torch._dynamo.config.patch(recompile_limit=2)  # monkeypatch would leave it without one
def test_blocks_of_many_shapes_compile(monkeypatch):
    """4 blocks that compute different numbers of images, each a graph, where torch would allow 2
    (of itself 8, fewer than 24 blocks may have): the gradients are those of the eager model."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, options=None, **flags: compiler(
        function, backend="eager", **flags))
    config = replace(KNOWN, num_layers=4, drop_path_rate=0.6, drop_path_mode="batch")
    assert len(set(config.computed_shares)) == 4
    weights, (images, labels), found = random_weights(config), batch_of(config, 16), []
    torch._dynamo.reset()
    for compiled in False, True:
        model = build(config, Grid(), weights)
        kernels.apply(model, fused=True)
        if compiled:
            kernels.compile(model)
        found.append(loss_gradients(model, images, labels))
    assert max_difference(*found) < 1e-5


# ----------------------------------------------------------------------------- fused blocks
PLAIN = replace(TINY, head="mlp")


def _split_run(tp, swaps, training=True, folder=None, flags=(), config=PLAIN):
    """Logits, input gradients and full weight gradients of 8 images over tp ranks, the operators
    that ran, and shifts that no one waited for. The model is that of these flags, with the classes
    of `swaps`; with a folder, images visit."""
    grid, gpus = grid_of(tp), FileGpus(folder) if folder else None
    dtype = torch.bfloat16 if swaps.get("fp8") else torch.float32
    images, count = batch_of(config, 8)[0], 8 // tp
    model = of_flags(config, grid, random_weights(config), gpus, **dict(flags)).to(dtype)
    kernels.apply(model.train(training), **swaps)
    x = images[grid.tp.rank * count:][:count].to(dtype, copy=True).requires_grad_()
    with Operators() as operators:
        logits = model(x)
        weight = torch.randn(logits.shape, generator=generator("w", grid.tp.rank))
        (logits * weight).sum().backward()
    full = {}
    for name, param in model.named_parameters():
        split = getattr(param, "tp_split", None)
        parts = parallel.all_gather(param.grad[None], grid.tp)
        full[name] = sum(parts) if split is None else split.unshard(parts)
    late = sum(work.pending for work in gpus.works) if gpus else 0
    return logits.detach(), x.grad, full, operators.count, late


def unsplit_run(world, config=PLAIN):
    """What the results of _split_run add up to, by the plain model."""
    model = build(config, Grid(), random_weights(config))
    images = batch_of(config, 8)[0].requires_grad_()
    logits = model(images)
    weight = torch.cat([torch.randn(8 // world, config.num_classes, generator=generator("w", r))
                        for r in range(world)])
    (logits * weight).sum().backward()
    return logits.detach(), images.grad, gradients(model)


def largest_difference(results, config=PLAIN):
    logits, images, weights = unsplit_run(len(results), config)
    return max((torch.cat([r[0] for r in results]) - logits).abs().max(),
               (torch.cat([r[1] for r in results]) - images).abs().max(),
               *(max_difference(result[2], weights) for result in results))


@pytest.mark.parametrize("tp, training, config", [
    (1, True, PLAIN), (1, False, PLAIN), (2, True, PLAIN), (2, False, PLAIN), (2, True, OTHER)])
def test_a_fused_model_without_dropout_is_the_plain_one(tp, training, config):
    """Logits, input gradients and every weight's gradient, in training and eval mode, on one rank
    and split over two, and with LayerScale and the mean of all patches: within 2e-6, of numbers up
    to 10 (fp32 sums in another order)."""
    results = run_ranks(tp, _split_run, tp, dict(fused=True), training, None, (), config)[0]
    assert largest_difference(results, config) < 2e-6


@pytest.mark.parametrize("config, adding", [  # tokens read: the first, all
    (replace(PLAIN, num_layers=4), 3), (replace(OTHER, layerscale=0.0, num_class_tokens=0), 2)])
def test_in_evaluation_products_add_to_the_stream(config, adding):
    """Two in each block but that of token 0; no bias is zero, and all wait for the last block. The
    logits, up to 1, are the plain model's within 2e-6 (fp32 sums in another order), eager and
    compiled, though the compiler sees functions without a change in place."""
    weights, images = random_weights(config), batch_of(config, 4)[0]
    plain, model = (build(config, Grid(), weights).eval() for _ in range(2))
    kernels.apply(model, fused=True)
    with torch.no_grad():
        expected = plain(images)
        with Operators() as operators:
            assert (model(images) - expected).abs().max() < 2e-6
        assert operators.count["add_product"] == 2 * adding
        torch._dynamo.reset()
        for block in model.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, backend=EAGER)
        assert (model(images) - expected).abs().max() < 2e-6


def test_products_add_to_the_stream_in_evaluation_only():
    """Not in training, for gradients, in autocast, with LayerScale or with tensor parallelism."""
    def adds(training=False, gradients=False, autocast=False, grid=Grid(), **options):
        model = ViT(replace(PLAIN, **options), grid).train(training)
        kernels.apply(model, fused=True)
        with (torch.set_grad_enabled(gradients), Operators() as operators,
              torch.autocast("cpu", torch.bfloat16, enabled=autocast)):
            if grid.tp.size > 1:  # its ranks are not there
                return model.adds()
            model(batch_of(PLAIN, 2)[0])
        return operators.count["add_product"] > 0
    assert adds()
    assert not (adds(training=True) or adds(gradients=True) or adds(autocast=True)
                or adds(layerscale=0.5) or adds(grid=Grid(tp=Axis(size=2))))


def test_swapped_classes_keep_the_parameters_names_and_shapes():
    """For all of apply's choices: what is saved is the plain model's, with nothing more."""
    plain = {name: x.shape for name, x in ViT(TINY).state_dict().items()}
    for attention, fp8, fused in itertools.product(
            (None, "flash", "math", "triton", "flash-attn"), (False, True), (False, True)):
        model = ViT(replace(TINY, drop_path_rate=0.1))
        kernels.apply(model, attention=attention, fp8=fp8, fused=fused)
        assert {name: x.shape for name, x in model.state_dict().items()} == plain
        assert [name for name, _ in model.named_parameters()] == list(plain)


@pytest.mark.parametrize("attention, products, kernels_run", [("flash", 0, 1), ("math", 2, 0)])
def test_attention_is_the_kernel_that_was_asked_for(attention, products, kernels_run):
    """--attention flash and math, in plain and fused blocks, eager: in each block but the last one
    operator does it, or two batched products; for the last one's single query torch chooses flash.
    Gradients are the plain model's (1e-5: another order of sums)."""
    weights, batch = random_weights(TINY), batch_of(TINY, 4)
    plain = loss_gradients(build(TINY, Grid(), weights), *batch)
    for fused in False, True:
        model = build(TINY, Grid(), weights)
        kernels.apply(model, attention=attention, fused=fused)
        with Operators() as forward:
            model(batch[0])
        assert forward.count[FLASH] == kernels_run * (TINY.num_layers - 1) + 1
        assert forward.count["bmm"] == products * (TINY.num_layers - 1)
        assert max_difference(loss_gradients(model, *batch), plain) < 1e-5


# ----------------------------------------------------------------------------- Triton
def test_triton_kernels_equal_the_plain_computation():
    """Triton's interpreter runs them on the CPU; each check says what it compares. That of Triton
    3.6 (torch 2.11) cannot count to a tensor with NumPy 2.4 (triton#9171), as _resample does."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    release = {p: tuple(map(int, version(p).split(".")[:2])) for p in ("triton", "numpy")}
    counts = release["triton"] >= (3, 7) or release["numpy"] < (2, 4)
    script = "; ".join(["import test_speed", *(f"test_speed.{check.__name__}()" for check in (
        _check_short_attention, _check_gelu_backward, _check_cast_both, _check_move,
        _check_triton_model,
        *[_check_resample] * counts))])
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True,
                          text=True, timeout=300, cwd=HERE)
    assert done.returncode == 0, done.stderr


def _check_resample():
    """resample.resize is pixels.resize: of pictures of any strides, flipped, cut, a pixel wide, of
    views from inside and beyond the crop; each value within 1, 999 of 1,000 equal (fp32 sums in
    another order, and halves rounded up instead of to even)."""
    import pixels
    import resample
    from augment import View
    shapes = (30, 41), (1, 9), (9, 7)
    pictures = [torch.randint(0, 256, (*hw, 3), generator=generator("p"), dtype=torch.uint8)
                .permute(2, 0, 1) for hw in shapes]
    pictures[0] = pictures[0].contiguous()
    views = [View((3, 5, 29, 41), flip=True), View((0, 0, 1, 9)),
             View((1.3, 0.2, 7.1, 6.4), alone=False)]
    windows = [pixels.window(view, hw, (11, 13)) for view, hw in zip(views, shapes)]
    ours, plain = (module.resize(pictures, views, windows, (11, 13)).int()
                   for module in (resample, pixels))
    assert (ours - plain).abs().max() <= 1 and (ours != plain).float().mean() < 1e-3


def _check_move():
    """resample.move is pixels.move, byte for byte: turned, sheared and shifted beyond the edges, in
    two programs an image; a single line too; cubic and linear."""
    import pixels
    import resample
    for hw, cubic, fill in (((23, 17), True, 128), ((1, 5), True, 0), ((5, 2), False, 0)):
        matrices = torch.tensor([pixels._matrix(name, magnitude, hw) for name, magnitude in (
            ("Rotate", 17.0), ("ShearX", 0.3), ("TranslateY", -3.0))], dtype=torch.double)
        x = torch.randint(0, 256, (3, 3, *hw), generator=generator("m"), dtype=torch.uint8)
        ours, plain = (module.move(x, matrices, cubic, fill) for module in (resample, pixels))
        assert torch.equal(ours, plain), (hw, cubic, (ours.int() - plain.int()).abs().max())


def _check_cast_both():
    """Numbers that the format holds, 2 x 70 x 150 of them in tiles that are not full, times 4: the
    plain computation's exactly (the interpreter's own rounding is wrong); the transpose holds the
    same, the factor back is 1/4, and what is too large becomes the largest."""
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        largest = torch.finfo(dtype).max
        x = torch.randn(2, 70, 150, generator=generator("x")).to(dtype).to(torch.bfloat16)
        x[1, 60, 140] = -largest
        y, y_t, unscale = products.cast_both(x, torch.tensor(largest / 4), dtype)
        assert torch.equal(y.float(), (4 * x.float()).clamp(-largest, largest).view(140, 150))
        assert torch.equal(y_t.float(), y.float().t()) and unscale == 1 / 4
        for top, factor in [(0.0, 1e-12 / largest), (float("inf"), float("inf"))]:
            assert products.cast_both(x, torch.tensor(top), dtype)[2] == pytest.approx(factor)
        assert products.cast_both(x, torch.tensor(float("nan")), dtype)[2].isnan()


def _check_short_attention():
    """dqkv and the bias gradient of 100 tokens (two tiles of keys, the second not full), 2 images,
    2 heads, against autograd in fp32. 1e-6 of the norm: sums in another order, exp2 for exp. Then
    with a part that all keys share, which makes every score about -800 and changes no gradient but
    dq's rounding (1e-3): the keys beyond the 100th, at 0, must not win."""
    B, S, heads, hd = 2, 100, 2, 64
    for shift, tolerance in [(0.0, 1e-6), (10.0, 1e-3)]:
        qkv = torch.randn(B, S, 3, heads, hd, generator=generator("qkv"))
        qkv[:, :, 0] += shift
        qkv[:, :, 1] -= shift
        qkv = qkv.flatten(2).requires_grad_()
        dy = torch.randn(B, S, heads * hd, generator=generator("dy"))
        q, k, v = (z.transpose(1, 2) for z in qkv.unflatten(-1, (3, heads, hd)).unbind(2))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y.backward(dy)
        lse = (q @ k.transpose(-1, -2) / hd ** 0.5).logsumexp(-1)
        dqkv, sums = attention_file.short_attention_backward(
            qkv.detach(), y.detach(), dy, lse.detach(), hd)
        for ours, theirs in [(dqkv, qkv.grad), (sums.sum(0), qkv.grad.sum((0, 1)))]:
            assert (ours - theirs).norm() < tolerance * theirs.norm()


def _check_gelu_backward():
    """dh and its sums of 67 x 3 rows and 136 features (two tiles each way, the last not full), a
    product of depth 72 (two steps), dy in any order of memory, against autograd in fp64, h up to 8:
    within 1e-6 of the largest (fp32 sums, a derivative within 7.5e-8)."""
    shapes = {"dy": (72, 3, 67), "h": (3, 67, 136), "weight": (72, 136)}
    dy, h, weight = (torch.randn(*shape, generator=generator(name)).double()
                     for name, shape in shapes.items())
    dy, h = dy.permute(1, 2, 0), (2 * h).requires_grad_()
    (F.gelu(h) @ weight.t()).backward(dy)
    dh, sums = products.gelu_backward(dy.float(), weight.float(), h.detach().float())
    assert sums.shape == (2, 136)
    for ours, exact in [(dh, h.grad), (sums.sum(0), h.grad.sum((0, 1)))]:
        assert (ours - exact).abs().max() < 1e-6 * exact.abs().max()


def _check_triton_model():
    """--attention triton in a model, with cuDNN's forward computed plainly: every gradient is the
    plain model's (1e-5, sums in another order), in plain and fused blocks; qkv's bias gradient,
    which attention's backward gives, is not lost and not there twice."""
    def forward(q, k, v, *args, **options):
        scores, none = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, torch.empty(0)
        return scores.softmax(-1) @ v, scores.logsumexp(-1), none, none, 0, 0, none, none, none
    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_cudnn_attention", forward, "CPU")
    config = replace(TINY, hidden_size=128, num_attention_heads=2)
    weights, (images, labels) = random_weights(config, scale=0.02), batch_of(config, 4)
    plain = loss_gradients(build(config, Grid(), weights), images, labels)
    for fused in False, True:
        model = build(config, Grid(), weights)
        kernels.apply(model, attention="triton", fused=fused)
        assert max_difference(loss_gradients(model, images, labels), plain) < 1e-5


@pytest.mark.parametrize("fp8", [False, True])
def test_a_bias_gets_its_gradient_from_one_operation(fp8):
    """From the product; but qkv's from attention, and only from it, if that is Triton's."""
    for attention in None, "flash", "triton":
        model = ViT(TINY).bfloat16()
        kernels.apply(model, attention=attention, fp8=fp8, fused=True)
        x = torch.randn(2, 8, TINY.hidden_size, dtype=torch.bfloat16)
        for layer in model.blocks[0].attn.qkv, model.blocks[0].mlp.fc1:
            found, = torch.autograd.grad(layer(x).sum(), layer.bias, allow_unused=True)
            if attention == "triton" and layer is model.blocks[0].attn.qkv:
                assert found is None
            else:
                assert torch.equal(found, torch.full_like(found, 16))


# ----------------------------------------------------------------------------- GELU's derivative
@pytest.fixture
def gelu_in_product(monkeypatch):
    """As on a GPU that has the kernel, in fp32; on a CPU it is the plain computation."""
    monkeypatch.setattr(kernels, "gelu_in_product", lambda mlp: True)
    monkeypatch.setattr(products, "IN_ONE", (torch.float32,))


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_gelus_derivative_in_the_product_changes_no_gradient(mode, gelu_in_product, monkeypatch):
    """Logits to the bit, every weight's gradient within 1e-6 (the biases' sums in another order),
    dropout on; one kernel for each block but the last, in backward only, none for another type of
    weights (autocast) and in fp8; the compiler is told the shapes. Selective recomputation repeats
    GELU and no product."""
    config = replace(TINY, num_layers=3, hidden_dropout=0.2)
    weights, (images, labels) = random_weights(config), batch_of(config, 4)
    plain, ours = (build(config, Grid(), weights) for _ in range(2))
    with mock.patch.object(kernels, "gelu_in_product", lambda mlp: False):
        kernels.apply(plain, fused=True)
    kernels.apply(ours, fused=True)
    found, operator = [], products.gelu_backward
    monkeypatch.setattr(products, "gelu_backward", kernel := mock.Mock(wraps=operator))
    for model in plain, ours:
        model_file.recompute(model, mode)
        torch.manual_seed(3)
        with Operators() as forward:
            logits = model(images)
        with Operators() as backward:
            F.cross_entropy(logits, labels).backward()
        found.append((logits, gradients(model), forward.count, backward.count))
    (logits, expected, *_), (same, grads, forward, backward) = found
    assert torch.equal(logits, same) and max_difference(grads, expected) < 1e-6
    assert kernel.call_count == 2
    assert (forward["gelu_backward"], backward["gelu_backward"]) == (0, 3)  # the last: torch's own
    if mode == "selective":
        assert backward["gelu"] == 3 and backward["addmm"] == 0
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), ours.eval()(images))
    monkeypatch.setattr(products, "IN_ONE", (torch.bfloat16,))
    ours.train()(images).sum().backward()
    assert kernel.call_count == 2
    inputs = [torch.randn(shape).bfloat16() for shape in ((2, 70, 8), (8, 16), (2, 70, 16))]
    torch.library.opcheck(operator, inputs, test_utils="test_faketensor")
    kernels.apply(fp8 := build(config, Grid(), weights), fp8=True, fused=True)
    assert not any(isinstance(block.mlp, products.GeluMlp) for block in fp8.blocks)


@pytest.mark.parametrize("change, fits", [
    ({}, True), (dict(capability=(8, 0)), False), (dict(capability=(10, 0)), False),
    (dict(tp=2), False), (dict(approximate="tanh"), False), (dict(shape=(36, 64)), False),
    (dict(is_cuda=False), False), (dict(hip="6.4"), False)])
def test_gelus_derivative_is_in_the_product_where_it_was_measured(change, fits, monkeypatch):
    """One rank of NVIDIA's Hopper, an exact GELU, rows of whole 16 bytes."""
    values = dict(capability=(9, 0), tp=1, approximate="none", shape=(32, 64), is_cuda=True,
                  hip=None)
    values |= change
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: values["capability"])
    monkeypatch.setattr(torch.version, "hip", values["hip"])
    monkeypatch.setattr(products, "triton", object())
    weight = types.SimpleNamespace(is_cuda=values["is_cuda"], device=None, shape=values["shape"])
    fc2 = types.SimpleNamespace(weight=weight, tp=Axis(0, values["tp"]))
    mlp = types.SimpleNamespace(fc2=fc2, approximate=values["approximate"])
    assert products.gelu_in_product(mlp) == fits


# ----------------------------------------------------------------------------- fp8
def test_fp8_linear_multiplies_the_rounded_tensors():
    """y, dx and dW are products of x and W rounded to e4m3 and dy rounded to e5m2, each scaled so
    that its largest element is the format's: within 2^-8 of the norm, the rounding of a bf16
    result. The bias gradient takes dy as it is. A missing factor or transpose would be 100 %."""
    x, dy, weight, bias = (torch.randn(shape, generator=generator(shape)).bfloat16()
                           for shape in [(2, 24, 32), (2, 24, 48), (48, 32), (48,)])
    inputs = [z.requires_grad_() for z in (3 * x, 0.1 * weight, bias)]
    y = products.Fp8Linear.apply(*inputs)
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
    x, weight, dy = (torch.randn(shape, generator=generator(shape)).bfloat16()
                     for shape in [(2, 24, 32), (48, 32), (2, 24, 48)])
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    y = products.Fp8Linear.apply(*inputs, None)
    dy[1, 2, 3] = value
    found = torch.autograd.grad(y, inputs, dy)
    with torch.no_grad():
        x[1, 2, 3] = value
    for z in (products.Fp8Linear.apply(*inputs, None), *found):
        assert not z.isfinite().any()


@pytest.mark.parametrize("fused", [False, True])
def test_fp8_products_are_for_training_only(fused):
    """In eval mode a model with fp8 products runs none of them and gives the bf16 model's logits,
    bit for bit; in training other ones, within 10 % (four products of 3 mantissa bits, 2 to 3 %
    each)."""
    config = replace(TINY, num_layers=2)  # the last block's products are never in fp8
    weights, images = random_weights(config), batch_of(config, 8)[0].bfloat16()
    plain, fp8 = (build(config, Grid(), weights).bfloat16() for _ in range(2))
    kernels.apply(plain, fused=fused)
    kernels.apply(fp8, fused=fused, fp8=True)
    with torch.no_grad(), Operators() as operators:
        assert torch.equal(plain.eval()(images), fp8.eval()(images))
        assert not operators.count["_scaled_mm"]
        exact, rounded = plain.train()(images).float(), fp8.train()(images).float()
    assert 0 < (exact - rounded).norm() < 0.1 * exact.norm()


def test_every_product_of_the_blocks_is_in_fp8():
    """In training, forward and backward: 3 fp8 products for each of a block's 4 layers, and no
    other product in a block; --attention does not change that."""
    for attention, fused in itertools.product((None, "flash"), (False, True)):
        model = build(TINY, Grid(), random_weights(TINY)).bfloat16()
        kernels.apply(model, attention=attention, fp8=True, fused=fused)
        x = torch.randn(8, TINY.seq_length, TINY.hidden_size).bfloat16().requires_grad_()
        block = model.blocks[0]
        with Operators() as operators:
            y = block((x, x, torch.tensor(0, dtype=torch.int32)))[1] if fused else block(x)
            y.sum().backward()
        products = operators.count["addmm"], operators.count["mm"], operators.count["_scaled_mm"]
        assert products == (0, 0, 12)


def test_tensor_parallel_fp8_is_the_unsplit_model_within_fp8():
    """tp 2, every gathered gradient against the plain fp32 model: within 25 % of its norm, and the
    blocks' at least 2 % away. Each rank rounds its own shards; e5m2 rounds by some 5 %, and the
    first block's gradients pass it eight times. A lost share would be 50 % or more."""
    exact = unsplit_run(2)[2]
    for result in run_ranks(2, _split_run, 2, dict(fp8=True))[0]:
        for name, full in result[2].items():
            error = (full.float() - exact[name]).norm() / exact[name].norm()
            low = 0.02 if name.startswith("blocks.0.") and name.endswith("weight") else 0
            assert low <= error < 0.25, name


# ----------------------------------------------------------------------------- recomputation
MODES = [("selective", "uniform", 1), ("full", "uniform", 1), ("full", "uniform", 2),
         ("full", "block", 1)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention, fused, fp8",
                         list(itertools.product(("flash", "math"), (False, True), (False, True))))
def test_recomputation_after_the_other_passes_leaves_gradients_bit_equal(attention, fused, fp8,
                                                                         mode):
    """It replays dropout, drop path and, where the kernel has it, attention dropout exactly, in
    plain and fused blocks: no tolerance. Also with products in fp8, whose scales are found again.
    Another seed gives other gradients. (Compiled: test_compiled_gradients_equal_eager_ones.)"""
    base = OTHER if mode[0] == "selective" else TINY
    config = replace(base, num_layers=3, **DROPS, attention_dropout=0.1 * (attention != "flash"))
    weights, (images, labels) = random_weights(config), batch_of(config, 8)
    dtype = torch.bfloat16 if fp8 else torch.float32

    def run(*mode, seed=3):
        model = build(config, Grid(), weights).to(dtype)
        kernels.apply(model, attention=attention, fused=fused, fp8=fp8)
        model_file.recompute(model, *mode)
        return loss_gradients(model, images.to(dtype), labels, seed)
    plain, recomputed, other = run("none"), run(*mode), run(*mode, seed=4)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert not any(torch.equal(plain[name], other[name]) for name in plain)


def kept_bytes(model, forward):
    """Bytes that forward() keeps for backward, apart from the model's weights."""
    own, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = forward()
    return sum(seen.values()), result


def test_recomputation_of_fused_blocks_keeps_fewer_activations():
    """Bytes kept for backward: none > full; block of 1 layer lies between. (What selective keeps is
    held by the policy, out of sight of these hooks.)"""
    config = replace(TINY, num_layers=4, hidden_dropout=0.1)

    def kept(*mode):
        model = ViT(config)
        kernels.apply(model, fused=True)
        model_file.recompute(model, *mode)
        return kept_bytes(model, lambda: model(batch_of(config, 4)[0]))[0]
    assert kept("none") > kept("full", "block") > kept("full", "uniform")


@pytest.mark.parametrize("fused, fp8", [(True, False), (False, True), (True, True)])
def test_selective_recomputation_repeats_no_product_in_fp8_or_fused_blocks(fused, fp8):
    """In backward the norms and GELU run again, for each block; no product and no attention does.
    """
    counts = []
    for mode in "none", "selective":
        model = build(TINY, Grid(), random_weights(TINY)).to(torch.bfloat16 if fp8 else None)
        kernels.apply(model, attention="flash", fused=fused, fp8=fp8)
        model_file.recompute(model, mode)
        loss = model(batch_of(TINY, 8)[0].to(model.head.weight.dtype)).float().sum()
        with Operators() as backward:
            loss.backward()
        counts.append(backward.count)
    again = counts[1] - counts[0]
    assert again["native_layer_norm"] == 2 * TINY.num_layers and again["gelu"] == TINY.num_layers
    for name in ("mm", "addmm", "_scaled_mm", FLASH):
        assert counts[0][name] == counts[1][name], name


# ----------------------------------------------------------------------------- torch.compile
EAGER = "aot_eager_decomp_partition"  # the compiler without its last half, which writes kernels


def _compiled_beside_eager(grid, folder=None):
    """For compiled models (at tp 2 without folder one that has LayerScale and reads the patches'
    mean), one for each kind of recomputation (at tp 2 fewer): the largest difference of gradients
    from those of the fused model that runs eagerly with collectives, the graphs, bytes that blocks
    keep for backward, apart from weights, and the plan's. Where images visit and nothing is
    recomputed it is as the flags say; else the compiler cuts it into forward and backward, but it
    runs eagerly, which saves minutes."""
    tp, results = grid.tp.size, {}
    config = replace(OTHER if tp > 1 and not folder else TINY, num_layers=3, hidden_dropout=0.1,
                     drop_path_rate=0.2)
    weights, batch = random_weights(config), batch_of(config, 2 * tp)
    images, labels = (x[grid.tp.rank * 2:][:2] for x in batch)  # 2: layouts have kernels in common
    reference = build(config, grid, weights)
    kernels.apply(reference, fused=True)
    expected = loss_gradients(reference, images, labels)
    modes = ("selective",) if tp > 1 and not folder else ("none", "full", "selective")
    for mode in modes if tp == 1 else modes[::2]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        gpus = FileGpus(folder) if folder else None
        eager = mode != "none" or not gpus
        model = of_flags(config, grid, weights, gpus, compile=not eager,
                         activation_checkpointing="none" if eager else mode)
        if eager:
            kernels.apply(model, fused=True)
            model_file.recompute(model, mode, early_stop=not gpus)
            for part, name in [(model, "embed"), *((block, "forward") for block in model.blocks)]:
                setattr(part, name, torch.compile(getattr(part, name), fullgraph=True,
                                                  dynamic=False, backend=EAGER))
        blocks, kept = model.blocks.forward, []

        def counted(stream, model=model, blocks=blocks, kept=kept):
            count, result = kept_bytes(model, lambda: blocks(stream))
            kept.append(count)
            return result
        model.blocks.forward = counted
        difference = max_difference(loss_gradients(model, images, labels), expected)
        assert not gpus or gpus.works and not any(work.pending for work in gpus.works)
        flags = TrainConfig(activation_checkpointing=mode, tensor_parallel_size=tp,
                            precision="fp32", tp_comm_overlap=bool(folder))
        blocks_alone = replace(config, pre_norm=False, fc_norm=True)  # none of all tokens outside
        planned, one, two = (memory.activation_bytes(replace(blocks_alone, num_layers=n), flags, 2)
                             for n in (3, 1, 2))
        if mode == "selective":  # without what a block keeps while backward is in it
            planned -= one
            tokens, d, f = config.seq_length, config.hidden_size, config.ffn_hidden_size
            planned += (two - one if config.pool == "mean" else
                        4 * 2 * (4 * tokens * d + 7 * d + f))  # of the last; one token's rest
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        results[mode] = difference, graphs, kept[0], planned, config.pool
    return results


def _compiled_without_and_with_overlap(tp, folder):
    from torch._inductor import config
    grid, config.cpp.simdlen = grid_of(tp), 1  # without vector registers: it compiles faster
    if tp == 1:  # as `gelu_in_product`
        kernels.gelu_in_product, products.IN_ONE = lambda mlp: True, (torch.float32,)
    return [_compiled_beside_eager(grid, f) for f in ([None, folder] if tp > 1 else [None])]


@pytest.fixture(scope="module")
def compiled_models(tmp_path_factory):
    """All three layouts, [rank] each; at the same time, since a compiler does not fill two cores.
    """
    folder = tmp_path_factory.mktemp("shared")  # here: it is not for threads

    def run(tp):
        return run_ranks(tp, _compiled_without_and_with_overlap, tp, folder, timeout=400)[0]
    with ThreadPoolExecutor() as pool:
        one, two = pool.map(run, (1, 2))
    return {"tp1": [one[0][0]], "tp2": [rank[0] for rank in two],
            "tp2-overlap": [rank[1] for rank in two]}


@pytest.fixture(params=["tp1", "tp2", "tp2-overlap"])
def compiled(request, compiled_models):
    return compiled_models[request.param]


def test_compiled_gradients_equal_eager_ones(compiled):
    """torch.compile of embedding and blocks, collectives or shifts inside, dropout and drop path
    on, without recomputation and with: each weight's gradient within 1e-5 (sums of a few hundred
    terms in another order), since a draw is the same hash, compiled or not."""
    for modes in compiled:
        for mode, (difference, *_) in modes.items():
            assert difference < 1e-5, mode


def test_one_graph_serves_all_compiled_blocks(compiled):
    """One for the embedding, one for the blocks, which differ in their rate of drop path, and one
    for the last block, if of that only token 0 is read."""
    for modes in compiled:
        for mode, (_, graphs, _, _, pool) in modes.items():
            assert graphs == (3 if pool == "token" else 2), mode


def test_compiled_blocks_keep_what_the_plan_says(compiled):
    """Within 3 %: the plan leaves out the statistics of norms and attention, a number a token or
    head. (If selective repeated a reduce-scatter, it would keep the product before it.)"""
    for modes in compiled:
        for mode in modes.keys() - {"full"}:
            _, _, kept, planned, _ = modes[mode]
            assert kept == pytest.approx(planned, rel=0.03), mode


# ----------------------------------------------------------------------------- visiting images
@pytest.mark.parametrize("tp, recompute, fused, config", [
    (2, "full", False, PLAIN), (4, "none", False, PLAIN), (4, "selective", False, PLAIN),
    (2, "none", True, OTHER)])
def test_a_model_whose_images_visit_is_the_unsplit_one(tp, recompute, fused, config, tmp_path):
    """--tp-comm-overlap: logits, input gradients and every gathered weight and bias gradient, batch
    8 / tp >= 2 on a rank, all biases non-zero: within 1e-5 of the plain model (fp32 sums in another
    order). In the blocks there is no other collective; each shift is waited for, and what it reads
    and writes stays in place until then (Late). Where the head reads the mean, the last block is as
    any."""
    flags = dict(activation_checkpointing=recompute)
    results = run_ranks(tp, _split_run, tp, dict(fused=fused), True, tmp_path, flags, config)[0]
    assert largest_difference(results, config) < 1e-5
    last = config.pool == "token"                # it has no shifts
    shifts = 2 * (TINY.num_layers - last) * (tp - 1)  # one way, in a forward
    # What backward repeats: nothing, all, or all but the way home, whose end comes again.
    visits, returns, ends = dict(none=(0, 0, 0), full=(1, 1, 2), selective=(1, 0, 2))[recompute]
    for *_, operators, late in results:
        assert late == 0
        # The last block's two halves: once each way, and what backward repeats.
        assert operators["all_gather_into_tensor"] == (4 + 2 * visits) * last
        assert operators["reduce_scatter_tensor"] == (4 + 2 * returns) * last
        assert operators["visit"] == (3 + visits) * shifts  # gradients of both ways are visits too
        assert operators["return_home"] == (1 + returns) * shifts
        assert operators["wait_tensor"] == (4 + ends) * shifts + (8 + 4 * visits) * last


def four_steps(model, grid, **options):
    """4 clipped SGD steps of 2 micro-batches of 4 images a rank: (gradient norms, full weights)."""
    optimizer, norms, world = optimizer_of(model, grid, optimizer="sgd", **options), [], grid.world
    for step in range(4):
        for micro in range(2):
            images, labels = batch_of(TINY, 4, seed=f"{step} {micro} {world.rank}")
            loss = F.cross_entropy(model(images), labels, reduction="sum") / (8 * world.size)
            optimizer.backward(loss, last=micro == 1)
        norms.append(optimizer.step(1e-2).item())
    return norms, full_weights(optimizer)


def _products_and_shifts(folder):
    """The difference of weights after four steps with collectives and with visiting images; then
    what happens in a forward and backward of these."""
    grid, gpus, weights, results = grid_of(2), FileGpus(folder), random_weights(TINY), []
    for stand_in in None, gpus:
        model = of_flags(TINY, grid, weights, stand_in)
        results.append(four_steps(model, grid)[1])

    def logged(name, product):
        def wrapped(x, *bias):
            gpus.log.append(name)
            y = product(x, *bias)
            y.register_hook(lambda dy: gpus.log.append(name))
            return y
        return wrapped
    model = of_flags(TINY, grid, weights, gpus)
    for block in model.blocks:
        for name, layers in [("columns", (block.attn.qkv, block.mlp.fc1)),
                             ("rows", (block.attn.proj, block.mlp.fc2))]:
            for layer in layers:
                layer.product = logged(name, layer.product)
    gpus.log.clear()
    loss = model(batch_of(TINY, 2)[0]).sum()
    forward = gpus.log[:]
    gpus.log.clear()
    loss.backward()
    return max_difference(*results), forward, gpus.log


def test_products_run_while_images_travel(tmp_path):
    """--tp-comm-overlap, tp 2. In each half block a rank's own images are multiplied by its columns
    between the beginning and the end of a shift, and by its rows likewise; backward mirrors it. A
    shift begins after what it sends, and the ranks meet within it. 4 clipped SGD steps of 2
    micro-batches: weights within 1e-6 of those with all-gather and reduce-scatter (fp32 sums in
    another order)."""
    begin = ["ready", "after", "barrier", "begun"]
    forward = [*begin, "columns", "wait", "columns", "rows", *begin, "rows", "wait"]
    backward = [*begin, "rows", "wait", "rows", "columns", *begin, "columns", "wait"]
    for difference, *logs in run_ranks(2, _products_and_shifts, tmp_path)[0]:
        assert difference < 1e-6
        halves, last = 2 * (TINY.num_layers - 1), ["rows", "columns", "rows"]  # without a shift
        assert logs == [halves * forward + last, last + halves * backward]


SIZES = (4, 5, 300, 5, 4, 300, 5)


def _shifts(folder):
    """Seven shifts one after the other, to the next rank, that no one waits for; whether each has
    ended, how often memory was shared, and then what came."""
    grid, gpus = grid_of(3), FileGpus(folder)
    exchange, results = peer.Exchange(grid.tp, CPU, gpus), []
    for i, size in enumerate(SIZES):
        x = torch.full((size,), 10.0 * i + grid.tp.rank)
        results.append(exchange.shift(x.bfloat16() if i % 2 else x, 1))
        del x
    pending = [work.pending for work in gpus.works]
    results.append(exchange.shift(torch.arange(6.0).view(2, 3).t(), 1))
    for result in results:
        torch.ops._c10d_functional.wait_tensor(result)
    return pending, gpus.shared, [result.tolist() for result in results], results[-1].stride()


def test_a_shift_that_no_one_waits_for_ends_all_the_same(tmp_path):
    """tp 3: when as many have begun after it; until then what it reads and writes is kept. Each
    result is what the rank before sent, in two types. Memory is shared at the start and again for
    the first tensor of more than 512 bytes; from then on smaller ones use the new one. A view comes
    as a tensor of its own, as the compiler is told."""
    for rank, (pending, shared, results, stride) in enumerate(run_ranks(3, _shifts, tmp_path)[0]):
        assert results.pop() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]] and stride == (2, 1)
        assert pending == [False] * 4 + [True] * 3
        assert results == [[10.0 * i + (rank - 1) % 3] * size for i, size in enumerate(SIZES)]
        assert shared == 2


def test_tp_overlap_is_for_gpus_that_reach_each_other():
    """The default overlaps where they do, --tp-comm-overlap is an error where they do not. Blocks
    keep the attention kernel that they have."""
    tp = Axis(1, 2, types.SimpleNamespace(group_name="tp"))
    gpus = FileGpus()
    gpus.in_reach, gpus.share = lambda axis, device: device == "near", lambda *args: (None, None)
    for wanted, device, overlap in [(None, "near", True), (True, "near", True),
                                    (False, "near", False), (None, "far", False)]:
        model = ViT(TINY, Grid(tp=tp), seed=None)
        kernels.apply(model, attention="math")
        assert peer.apply(model, device, wanted, gpus) == overlap
        assert (peer.Exchange.of.pop("tp", None) is not None) == overlap
        for block in model.blocks[:-1]:
            assert isinstance(block.attn, peer.AttentionVisits) == overlap
            assert isinstance(block.mlp, peer.MlpVisits) == overlap
            assert isinstance(block.attn, attention_file.SdpaAttention)
            assert block.attn.kernel == "math"
    with pytest.raises(ValueError, match="--tp-comm-overlap needs"):
        peer.apply(model, "far", True, gpus)
    assert not peer.apply(ViT(TINY, seed=None), CPU, None)


# ----------------------------------------------------------------------------- gradients by copies
def _peer_copies(tp, folder):
    """Four steps with gloo's reduce-scatter, with peer copies, and with these refused: results, the
    memories and what happened on streams, one after the other; then the number of buckets and the
    bytes of all gradients and of shared memory."""
    grid, weights, results = grid_of(tp), random_weights(TINY), []
    for reach, wanted in [(False, None), (True, None), (True, True), (True, False)]:
        gpus = FileGpus(folder / f"{reach} {wanted}", reach)
        gpus.folder.mkdir(exist_ok=True)
        model = build(TINY, grid, weights)
        exchange = peer.gradient_exchange(model, grid, CPU, wanted, gpus)
        results.append((*four_steps(model, grid, exchange=exchange), gpus.shared, gpus.log,
                        peer.shared_bytes(exchange)))
    with pytest.raises(ValueError, match="--peer-copies needs several GPUs"):
        peer.gradient_exchange(model, grid, CPU, True, FileGpus(reach=False))
    buckets = [bucket for unit in parallel.plan_buckets(model, grid) for bucket in unit]
    return results, len(buckets), sum(4 * bucket.numel for bucket in buckets)


@pytest.mark.parametrize("world, tp", [(3, 1), (4, 2)])
def test_gradients_summed_by_peer_copies_are_the_reduce_scattered_ones(world, tp, tmp_path):
    """4 clipped SGD steps of 2 micro-batches, as between the GPUs of a host but through files:
    weights within 1e-6 of gloo's (sums of 3 or 4 in another order), with tp 2 for the buckets that
    are summed over dp and those over the world. Each bucket once a step: after its gradients, all
    ranks meet, then copies; and the step waits for the end of all. Shared memory is the gradients,
    and counted. --no-peer-copies does none of it; --peer-copies is an error where GPUs are far."""
    for results, buckets, nbytes in run_ranks(world, _peer_copies, tp, tmp_path)[0]:
        (norms, weights, *reference), *copied, refused = results
        step = ["gradients", "barrier", "end"] * buckets + ["wait"] * buckets
        assert reference == list(refused[2:]) == [0, [], 0]
        for found_norms, found, *happened in copied:
            assert happened == [tp, 4 * step, nbytes]
            assert found_norms == pytest.approx(norms, rel=1e-5)
            assert max_difference(found, weights) < 1e-6


def _reach(reach, hosts):
    rank = int(os.environ["RANK"])
    os.environ["GROUP_RANK"] = hosts[rank]
    gpus, world = peer.Gpus(), grid_of(1).world
    gpus.count, gpus.reaches = lambda: 2, lambda device, peer: (device.index, peer) in reach
    return [gpus.in_reach(world, torch.device(*place)) for place in [("cpu",), ("cuda", rank)]]


@pytest.mark.parametrize("hosts, reach, expected", [
    ("00", {(0, 1), (1, 0)}, True), ("00", {(0, 1)}, False), ("01", {(0, 1), (1, 0)}, False)])
def test_gpus_in_reach_are_of_one_host_and_read_each_other(hosts, reach, expected):
    """All ranks agree, also where only one of them is told that it cannot reach the other."""
    assert run_ranks(2, _reach, reach, hosts)[0] == [[False, expected]] * 2


def test_gpus_are_cudas():
    """The functions of torch.cuda themselves, which take no object before their arguments."""
    gpus = peer.Gpus()
    assert (gpus.stream, gpus.event) == (torch.cuda.Stream, torch.cuda.Event)
    assert (gpus.current, gpus.on) == (torch.cuda.current_stream, torch.cuda.stream)
    assert gpus.synchronize is torch.cuda.synchronize and gpus.count is torch.cuda.device_count
    assert gpus.reaches is torch.cuda.can_device_access_peer


@pytest.mark.parametrize("make, flag", [
    (lambda axis, gpus: peer.PeerMemory(8, 4, axis, CPU, gpus), "--no-peer-copies"),
    (lambda axis, gpus: peer.Exchange(axis, CPU, gpus), "--no-tp-comm-overlap")])
def test_gpus_that_do_not_share_memory_are_told_what_to_give(monkeypatch, make, flag):
    """An error of the rendezvous names the flag; memory that runs out is no such error."""
    import torch.distributed._symmetric_memory as symm_mem

    def fail(*args, message="no handle\nmore", **options):
        raise RuntimeError(*[message] * bool(message))
    gpus, axis = peer.Gpus(), Axis(0, 2, types.SimpleNamespace(group_name="world"))
    gpus.stream = gpus.event = gpus.synchronize = lambda: None
    monkeypatch.setattr(symm_mem, "enable_symm_mem_for_group", lambda name: None)
    monkeypatch.setattr(symm_mem, "empty", lambda n, dtype, device: torch.empty(n, dtype=dtype))
    for message, words in [("no handle\nmore", "no handle"), ("", r"RuntimeError\(\)")]:
        monkeypatch.setattr(symm_mem, "rendezvous", partial(fail, message=message))
        with pytest.raises(ValueError, match=rf"\({words}\); give {flag}"):
            make(axis, gpus)
    monkeypatch.setattr(symm_mem, "empty", fail)
    with pytest.raises(RuntimeError, match="no handle"):
        make(axis, gpus)


# ----------------------------------------------------------------------------- benchmark.py
@pytest.mark.parametrize("tp", [1, 2])
def test_benchmark_prints_a_row_the_loaders_rate_and_a_profile(tp, tmp_path):
    """Two real steps with no data and no checkpoint, of one micro-batch whatever the recipe: the
    row, the loader beside it, the shares of a step, which cover it (overlapping threads may add to
    more), and a trace; with tp 2 communication is in the shares."""
    output = run_command(
        benchmark.main, "--model", "demo", "--recipe", "demo", "--steps", 2, "--micro-batch-size",
        8, "--augmentation", ["none", "nemo"][tp - 1], "--profile", tmp_path, "--data", "shapes",
        "--num-workers", 0, "--tensor-parallel-size", tp, world=tp)
    names, row = (line.split("  ") for line in output.splitlines() if "x 1  " in line
                  or "tp x dp" in line)
    cells = dict(zip([x.strip() for x in names if x], [x.strip() for x in row if x], strict=True))
    layout = [cells[name] for name in ("model", "tp x dp", "micro-batch", "accumulation")]
    assert layout == ["demo", f"{tp} x 1", "8", "1"]
    each, total = (float(cells[name].replace(",", "")) for name in ("images/s per GPU", "in all"))
    assert total == pytest.approx(each * tp, abs=0.1 * tp) and total > 0
    median, low, high = map(float, re.fullmatch(r"([\d.]+) \(([\d.]+)-([\d.]+)\)",
                                                cells["ms (min-max)"]).groups())
    assert low <= median <= high and total == pytest.approx(8e3 / median, rel=0.05)  # rounded
    flops = 3 * replace(MODELS["demo"], num_classes=16).flops_per_image() * each
    assert float(cells["TFLOP/s"]) == pytest.approx(flops / 1e12, rel=0.01)  # three digits
    step = float(re.search(r"^of ([\d.]+) ms a step, profiled", output, re.M)[1])
    shares = {name: (float(ms), float(share)) for name, ms, share in re.findall(
        r"^  (\w[\w, ]+?) +([\d.]+) ms +([\d.]+) %", output, re.M)}
    assert len(shares) == 7 and (shares["communication"][1] > 0) == (tp > 1)
    for part, (ms, share) in shares.items():
        assert share == pytest.approx(100 * ms / step, abs=1), part
    whole = sum(share for _, share in shares.values())
    assert whole > 99 and (tp > 1 or whole < 101)
    assert re.search(r"shapes with 0 workers .* loader alone [\d,.]+ images/s", output)
    assert len(list(tmp_path.glob("rank_*.json.gz"))) == tp


def test_a_profile_that_cannot_be_written_is_an_error_before_the_first_step():
    """One line with the directory, exit code 2: not a traceback after the measurement."""
    output = run_command(benchmark.main, "--model", "demo", "--recipe", "demo", "--steps", 1,
                         "--profile", "/proc/x", code=2)
    assert "/proc/x cannot be written" in output and "images/s" not in output


def _benchmark_beside_training():
    """The weights after three steps of two micro-batches, by the benchmark's timer and by
    train_step."""
    argv = ["--model", "demo", "--recipe", "demo", "--augmentation", "nemo", "--mixup", "0.8",
            "--num-layers", "1", "--num-classes", "5", "--warmup-steps", "2", "--head", "linear"]
    config, vit, _ = parse_run(BenchmarkConfig, argv)
    config = replace(config, global_batch_size=8)
    run = runtime.Run(config, vit, Grid(), CPU, micro_batch=4, accumulation=2)
    torch.manual_seed(0)
    host, results = list(itertools.islice(benchmark.random_batches(run), 6)), []
    images, labels, draws = host[0]
    assert images.shape == (4, 3, 32, 32) and labels.shape == (4,)
    assert {name: row.shape for name, row in draws.items()} == {"jitter": (4, 8), "mix": (4, 5)}
    assert not torch.equal(host[0][0], host[1][0])
    for timed in True, False:
        model, _ = runtime.build_model(run, seed=0)
        optimizer, _ = runtime.build_optimizer(run, model)
        timer, batches = benchmark.Timer(run, model, optimizer), iter(host)
        if timed:
            assert len(timer.seconds(batches, 3)) == 3
        for step in range(0 if timed else 3):
            lr = train.learning_rate(step, config, config.warmup_steps + 3)
            train.train_step(run, model, optimizer, batches, lr)
        assert next(batches, None) is None
        results.append(full_weights(optimizer))
    return results


def test_the_benchmarks_steps_are_the_trainers():
    """The function itself; three steps leave bit-equal weights and take the images of three."""
    assert benchmark.train_step is train.train_step
    timed, trained = run_ranks(1, _benchmark_beside_training)[0][0]
    assert all(torch.equal(timed[name], trained[name]) for name in trained)
    start = ViT(replace(MODELS["demo"], num_layers=1, num_classes=5, head="linear"))
    assert not torch.equal(trained["head.weight"], start.head.weight)


@pytest.mark.parametrize("flags, message", [
    (["--num-workers", 2], "--num-workers has no effect without --data; it needs --data"),
    (["--prefetch-factor", 2], "--prefetch-factor has no effect without --data"),
    (["--no-pin-memory"], "--pin-memory has no effect without --data"),
    (["--crop-scale", 0.5], "--crop-scale has no effect without --data"),
    (["--repeated-augmentation", 2], "--repeated-augmentation has no effect without --data"),
    (["--checkpoint-num-layers", 2], "it needs --activation-checkpointing full"),
    (["--momentum", 0.5], "it needs --optimizer sgd"),
    (["--steps", 0], "--steps 0 must be positive"),
    (["--micro-batch-size", 3, "--global-batch-size", 8], "nearest: 6, 9")])
def test_flags_of_the_benchmark_without_effect_are_errors(flags, message):
    """One line that says what they need, exit code 2, before anything is measured."""
    argv = ["--model", "demo", "--recipe", "demo", *flags]
    assert message in run_command(benchmark.main, *argv, code=2)


def test_time_that_kernels_share_counts_once():
    """Of (begin, end) in any order: overlapping, nested, touching and apart."""
    assert benchmark.covered([(20, 30), (0, 10), (5, 12), (6, 7), (12, 15)]) == 25
    assert benchmark.covered([]) == 0


# ----------------------------------------------------------------------------- rooms
def test_a_file_that_is_missing_is_none_and_one_that_is_broken_an_error(tmp_path, monkeypatch):
    """runtime.optional: an import that fails inside the file is not taken for its absence."""
    monkeypatch.syspath_prepend(tmp_path)
    assert runtime.optional("room_that_is_not_there") is None
    assert runtime.optional("kernels") is kernels
    for name, text in [("room_without_package", "import package_that_is_not_there"),
                       ("room_without_name", "from os import name_that_is_not_there")]:
        (tmp_path / f"{name}.py").write_text(text)
        with pytest.raises(ImportError, match="_that_is_not_there"):
            runtime.optional(name)
