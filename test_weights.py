"""What is promised of other libraries' weights, and of what is done with a model (evaluate.py):
`python -m pytest test_weights.py`, CPU only.

Files are written by the library itself (Google's by a writer of its own) from random weights, and
compared by the logits that both models make of the same images.
"""

import csv
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import weights
from checkpoint import save_checkpoint
from configs import MODELS, ConvertConfig, EvalConfig, TrainConfig, ViTConfig, parse
from model import ViT
from parallel import Axis, Grid, ShardedOptimizer, shard
from testing import generator, make_folder, paint, run_command, run_training

HERE = Path(__file__).parent
SMALL = ViTConfig(hidden_size=32, ffn_hidden_size=80, num_layers=2, num_attention_heads=4,
                  patch_size=8, image_size=32, num_classes=5, num_class_tokens=1, head="linear",
                  hidden_dropout=0.0)
OUR_FACTS = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


# ----------------------------------------------------------------------------- the table's models
def logits_difference(name, reference, rename=dict):
    """Largest difference of our logits and a library's for the same random weights, fp32.

    reference: the library's model on the meta device; rename: its state dict's names -> ours.
    """
    state = {k: 0.03 * torch.randn(v.shape, generator=generator(k))
             + (v.ndim == 1 and k.endswith("weight"))  # norms around 1
             for k, v in reference.state_dict().items()}
    reference.load_state_dict(state, assign=True)
    with torch.device("meta"):
        ours = ViT(replace(MODELS[name], num_class_tokens=1, head="linear"))
    ours.load_state_dict(rename(state), strict=True, assign=True)
    images = torch.randn(2, 3, 224, 224, generator=generator(0))
    with torch.no_grad():
        expected = reference.eval()(images)
        assert expected.std() > 0.1, "the comparison would be of zeros"
        return (ours.eval()(images) - expected).abs().max()


@pytest.mark.parametrize("name, theirs", [("B16", "vit_base_patch16_224"),
                                          ("L16", "vit_large_patch16_224")])
def test_logits_equal_timms(name, theirs):
    """Same weights, loaded strictly with no mapping, same logits as timm to 1e-4 in fp32 (12 or 24
    blocks of rounding; a wrong epsilon or GELU shows at 1e-3)."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        reference = timm.create_model(theirs)
    assert logits_difference(name, reference) < 1e-4


def test_logits_equal_torchvisions():
    """Same weights, same logits as torchvision's vit_b_16, to 1e-4 for the same reason."""
    import torchvision
    with torch.device("meta"):
        reference = torchvision.models.vit_b_16()
    names = weights.NAMES["torchvision"]
    assert logits_difference("B16", reference, lambda state: {
        weights.rename(k, names): v for k, v in state.items()}) < 1e-4


# ----------------------------------------------------------------------------- in
def their_model(fmt, config=SMALL, **more):
    """The library's model of our shape with random weights."""
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
            p.copy_(0.3 * torch.randn(p.shape, generator=generator(name)) + 0.1 * (p.ndim == 1))
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
    found = weights.read_weights(path, image_size)
    assert found.format == fmt
    config = replace(config, layernorm_eps=found.facts["layernorm_eps"], **changes)
    fitted, report = weights.fit_weights(found, config)
    model = ViT(config, seed=3).eval()
    weights.load_weights(model, fitted)
    return model, found.facts, report


def assert_same_logits(ours, theirs, size=(32, 32)):
    """To 1e-4 in fp32: two blocks' rounding is 1e-6, a wrong epsilon, GELU or axis 1e-3 and up."""
    images = torch.randn(3, 3, *size, generator=generator("images"))
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
            from safetensors.torch import save_file
            save_file(theirs.state_dict(), path)
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
                weights.read_weights(tmp_path / "w.pth")
        config = replace(SMALL, image_size=size or 32, num_class_tokens=count)
        ours, _, _ = ours_from(tmp_path / "w.pth", "timm", config, size)
        assert_same_logits(ours, theirs, config.image_hw)
    theirs = their_model("timm", img_size=(16, 24))
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="7 positions.*2x2 grid.*--init-image-size"):
        weights.read_weights(tmp_path / "w.pth")


def test_positions_are_bit_equal_at_the_same_size_and_equal_timms_at_others():
    """Class positions stay, any grid (61 and 39 are what a scale factor rounds wrong), and bf16 is
    resized in fp32 and rounded once. 1e-6: fp32 rounding of a sum of a few products."""
    pos, resize = torch.randn(1, 8 + 14 * 14, 6), weights.resize_pos_embed
    assert resize(pos, 8, (14, 14), (14, 14)) is pos
    layers = pytest.importorskip("timm.layers")
    for new in [(32, 32), (61, 39), (7, 7), (196, 1)]:
        ours = resize(pos, 8, (14, 14), new)
        theirs = layers.resample_abs_pos_embed(pos, list(new), [14, 14], num_prefix_tokens=8)
        assert torch.equal(ours[:, :8], pos[:, :8]) and (ours - theirs).abs().max() < 1e-6
        assert torch.equal(resize(pos.bfloat16(), 8, (14, 14), new),
                           resize(pos.bfloat16().float(), 8, (14, 14), new).bfloat16())


def test_weights_load_by_layout_and_only_a_head_of_another_size_is_new(tmp_path):
    """Each tensor-parallel rank gets its own part; nine classes leave the head at its own
    initialisation and say so; another model is refused with the name of the one that fits."""
    source, _ = export(tmp_path / "w.pt", SMALL, "timm")
    found = weights.read_weights(tmp_path / "w.pt")
    full = dict(source.named_parameters())
    for rank in range(2):
        model = ViT(SMALL, Grid(tp=Axis(rank, 2)))
        weights.load_weights(model, weights.fit_weights(found, SMALL)[0])
        for name, param in model.named_parameters():
            assert torch.equal(param, shard(full[name], param, model.grid.tp)), name
    ours, _, report = ours_from(tmp_path / "w.pt", "timm", num_classes=9)
    assert report == ["30 weights loaded", "head newly initialised for 9 classes: the file's is "
                      "linear, 5 classes"]
    assert not ours.head.weight.any() and torch.equal(ours.norm.weight, source.norm.weight)
    demo = replace(MODELS["demo"], head="linear", num_classes=3)
    export(tmp_path / "demo.pt", demo, "timm")
    with pytest.raises(ValueError, match=r"hidden_size 96 \(this run: 32\).*of --model demo$"):
        weights.fit_weights(weights.read_weights(tmp_path / "demo.pt"), SMALL)


def test_a_head_of_another_kind_is_new(tmp_path):
    """mlp to linear drops pre_logits.fc, linear to mlp starts it anew; both say what the file's is,
    and all other weights are the file's."""
    for kind, new in [("mlp", "head"), ("linear", "pre_logits.fc and head")]:
        other = "linear" if kind == "mlp" else "mlp"
        source, _ = export(tmp_path / "w.pt", replace(SMALL, head=kind), "torchvision")
        ours, _, report = ours_from(tmp_path / "w.pt", "torchvision", head=other)
        assert report == ["30 weights loaded", f"{new} newly initialised for 5 classes: the "
                          f"file's is {kind}, 5 classes"]
        full = dict(source.named_parameters())
        assert all(torch.equal(x, full[name]) for name, x in ours.named_parameters()
                   if not name.startswith(("head.", "pre_logits.")))


# ----------------------------------------------------------------------------- what comes with them
def test_what_comes_with_weights_yields_to_flags(tmp_path):
    """Training takes class tokens, epsilon, GELU, head and pixels, and no more; a flag wins;
    fine-tuning has its own head."""
    config = replace(SMALL, head="mlp", layernorm_eps=1e-5, gelu_approximate="tanh", num_classes=7)
    found = weights.Weights("torchvision", {}, {**asdict(config), **OUR_FACTS, "crop_ratio": 1.0})
    for recipe, head in (("pretrain", "mlp"), ("finetune", "linear")):
        given = dict(std=(1.0, 1.0, 1.0), image_size=32, recipe=recipe)
        run = TrainConfig(recipe=recipe, std=given["std"])
        vit = replace(MODELS["B16"], image_size=32, head="linear")
        run2, vit2, taken = weights.adopt(found, run, vit, given)
        assert vit2 == replace(vit, num_class_tokens=1, layernorm_eps=1e-5, head=head,
                               gelu_approximate="tanh"), "--model decides the shape"
        assert run2 == replace(run, mean=OUR_FACTS["mean"]) and run2.std == (1, 1, 1)
        assert taken.keys() == {"num_class_tokens", "layernorm_eps", "gelu_approximate", "mean",
                                *(["head"] if head == "mlp" else [])}


def test_the_whole_model_comes_with_weights_and_what_is_told_wins(tmp_path):
    """Shape, classes, image size and pixels are the file's; crop ratio and precision too, where it
    tells (fp8 is for training); no dropout; None tells nothing."""
    config = replace(SMALL, head="mlp", layernorm_eps=1e-5)
    export(tmp_path / "w.pt", config, "torchvision")
    found = weights.read_weights(tmp_path / "w.pt")
    usual = OUR_FACTS | dict(crop_ratio=0.875, precision="fp32", classes=())

    def whole(**told):
        vit, facts = weights.whole_model(found, "w.pt", **told)
        assert facts | asdict(vit) == facts, "one thing is told twice, differently"
        return vit, {name: facts[name] for name in usual}
    assert whole() == (config, usual)
    assert whole(image_size=40, std=(1, 1, 1), mean=None, layernorm_eps=1e-3, precision="bf16") == (
        replace(config, image_size=40, layernorm_eps=1e-3),
        usual | dict(std=(1, 1, 1), precision="bf16"))
    assert weights.model_name(weights.whole_model(found, "w.pt")[1]) is None
    export(tmp_path / "w.pt", config, "torchvision", OUR_FACTS | dict(
        precision="bf16-O2-fp8", crop_ratio=0.9, classes=list("abcde")))
    found = weights.read_weights(tmp_path / "w.pt")
    assert whole()[1] == OUR_FACTS | dict(precision="bf16-O2", crop_ratio=0.9,
                                          classes=tuple("abcde"))


def test_heads_are_told_or_the_tables_and_never_guessed():
    """A file of timm's does not tell them: 192 wide is Ti16's three, another width needs the flag;
    a flag that the width does not allow is refused, and so are weights without a head."""
    facts = {**weights.SILENT["timm"], **asdict(MODELS["Ti16"]), "num_classes": 7}
    facts.pop("num_attention_heads")
    vit, _ = weights.whole_model(weights.Weights("timm", {}, facts), "w.pth")
    assert vit == replace(MODELS["Ti16"], num_classes=7, hidden_dropout=0.0)
    odd = weights.Weights("timm", {}, facts | {"num_layers": 11})
    with pytest.raises(ValueError, match="^w.pth is none of Ti16, .*give --num-attention-heads$"):
        weights.whole_model(odd, "w.pth", num_attention_heads=None)
    assert weights.whole_model(odd, "w.pth", num_attention_heads=6)[0].num_attention_heads == 6
    with pytest.raises(ValueError, match="--num-attention-heads 5"):
        weights.whole_model(odd, "w.pth", num_attention_heads=5)
    facts.pop("num_classes")
    with pytest.raises(ValueError, match=r"^a/b has no head: fine-tune it first \(train.py "
                                         r"--recipe finetune --init-from a/b\)$"):
        weights.whole_model(weights.Weights("timm", {}, facts), "a/b")


# ----------------------------------------------------------------------------- out
def export(path, config, fmt, facts=OUR_FACTS):
    """(our model of random weights, the code that opens its export)"""
    model = randomised(ViT(config))
    tensors = weights.to_format(model.state_dict(), config, fmt)
    return model, weights.write_weights(path, tensors, config, fmt, facts)


@pytest.mark.parametrize("fmt, name, change", [
    ("timm", "w.pt", {}), ("timm", "w.safetensors", {}), ("hf", "model.safetensors", {}),
    ("torchvision", "w.pt", {}), ("torchvision", "w.safetensors", dict(head="mlp")),
    ("timm", "w.pt", dict(num_class_tokens=8, image_size=(16, 40), gelu_approximate="tanh")),
    ("timm", "w.safetensors", dict(hidden_size=224, ffn_hidden_size=976))])
def test_an_export_opens_strictly_in_its_library_and_returns_bit_equal(tmp_path, fmt, name, change):
    """The printed code, run as it is, gives a model with our logits; our reader gets the same bits
    back, with the run's own epsilon and pixels. Eight class tokens are timm's token and seven
    registers; the pretraining head is torchvision's representation layer; 976 / 224 is a ratio that
    timm would round to 975."""
    for library in {"hf": ["transformers"], "timm": ["timm"]}.get(fmt, []):
        pytest.importorskip(library)
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
        weights.to_format(ViT(config).state_dict(), config, fmt)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_failed_export_leaves_the_old_file_and_no_other(tmp_path, name):
    """A file that may not grow past 20,000 bytes, as on a full disk: the one that was there stays,
    nothing else does. (The weights have 100,000 bytes.)"""
    export(tmp_path / name, SMALL, "timm")
    before, limits = (tmp_path / name).read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    model = ViT(SMALL).state_dict()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError):
            weights.write_weights(tmp_path / name, model, SMALL, "timm", OUR_FACTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / name).read_bytes() == before
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_an_export_is_on_the_disk_and_others_may_read_it(tmp_path, monkeypatch, name):
    """What gets the name was synced before, and has the permissions of any new file, although
    safetensors writes a file of its own for the owner alone."""
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.fstat(fd).st_ino), fsync(fd)))
    export(tmp_path / name, SMALL, "timm")
    (tmp_path / "any").touch()
    assert os.stat(tmp_path / name).st_ino in synced
    assert os.stat(tmp_path / name).st_mode == os.stat(tmp_path / "any").st_mode


# ----------------------------------------------------------------------------- bad files
class Code:
    """Unpickled carelessly, it makes a folder."""

    def __init__(self, path):
        self.trace = str(path.with_name("code-was-run"))

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def write_broken(path, kind):
    """A broken file: a kind below, or a state dict with one thing wrong."""
    good = ViT(SMALL).state_dict()

    def without(*names):
        return {name: x for name, x in good.items() if name not in names}
    changed = {
        "code": {"patch_embed.proj.weight": Code(path)}, "list": [torch.ones(2)],
        "numbers": {0: torch.ones(2)},
        "resnet": {"conv1.weight": torch.ones(2), "bn1.weight": torch.ones(2)},
        "unknown": good | {"blocks.0.ls1.gamma": torch.ones(32)},
        "missing": without("blocks.1.mlp.fc2.bias"), "half a head": without("head.bias"),
        "misshapen": good | {"norm.weight": torch.ones(31)},
        "no class token": without("cls_token"), "no positions": without("pos_embed"),
        "no blocks": {name: x for name, x in good.items() if "blocks" not in name},
        "twice": {weights.rename(name, [(b, a) for a, b in weights.NAMES["torchvision"]]): x
                  for name, x in good.items()} | {"cls_token": good["cls_token"]}}
    if kind in changed:
        torch.save(changed[kind], path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Code(path)))
    elif kind == "text":
        path.write_text("404: Not Found\n" * 10)
    elif kind == "folder":
        path.mkdir()
    elif kind == "objects":
        np.savez(path, cls=np.array([Code(path)], dtype=object))
    elif kind != "nothing":  # a size: the good file, cut
        export(whole := path.with_stem("whole").with_suffix(
            ".safetensors" if path.suffix == ".safetensors" else ".pt"), SMALL, "timm")
        path.write_bytes(whole.read_bytes()[:kind])


@pytest.mark.parametrize("name, kind, words", [
    ("w.safetensors", -100, "truncated or damaged.*file not fully covered"),
    ("w.safetensors", 300, "truncated or damaged, or not a .safetensors"),
    ("w.safetensors", 0, "truncated or damaged, or not a .safetensors"),
    ("w.safetensors", "text", "truncated or damaged, or not a .safetensors"),
    ("w.pth", -100, "truncated or damaged, or not a .pth file of plain tensors"),
    ("w.pth", 0, "truncated or damaged, or not a .pth file of plain tensors"),
    ("w.pth", "text", "truncated or damaged, or not a .pth file of plain tensors"),
    ("w.npz", "text", "truncated or damaged, or not a .npz"),
    ("w.npz", -100, "truncated or damaged, or not a .npz"),
    ("w.npz", "objects", "truncated or damaged, or not a .npz file of plain tensors"),
    ("w.bin", "code", r"pickled objects other than tensors \(posix.mkdir\)"),
    ("w.pth", "pickle", "truncated or damaged, or not a .pth file of plain tensors"),
    ("w.pth", "list", "not a dictionary of named tensors"),
    ("w.pth", "numbers", "not a dictionary of named tensors"),
    ("w.pth", "resnet", "not a ViT of timm, .*conv1.weight, bn1.weight"),
    ("w.pth", "unknown", r"1 unknown \(blocks.0.ls1.gamma\)"),
    ("w.pth", "missing", r"1 missing \(blocks.1.mlp.fc2.bias\)"),
    ("w.pth", "half a head", r"1 missing \(head.bias\)"),
    ("w.pth", "misshapen", r"1 misshapen \(norm.weight\)"),
    ("w.pth", "no class token", "no ViT with a class token"),
    ("w.pth", "no positions", "no ViT with a class token and positions"),
    ("w.pth", "no blocks", "or is incomplete"),
    ("w.pth", "twice", "of torchvision's form.*under two names"),
    ("w.onnx", "text", "must end in .pt, .pth, .bin, .safetensors or .npz"),
    ("w.pth", "nothing", "there is no such file"),
    ("w.pth", "folder", "holds no complete checkpoint"),
    ("step_00000001", "folder", "not a complete checkpoint: meta.json cannot be read: No such"),
])
def test_a_bad_file_is_one_clear_error_with_its_path(tmp_path, name, kind, words):
    """One line that names the file once; no code in it runs, and safety is not advised away."""
    write_broken(tmp_path / name, kind)
    with pytest.raises(ValueError, match=words) as error:
        weights.read_weights(tmp_path / name)
    assert str(error.value).count(str(tmp_path)) == 1 and "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path / name))
    assert "weights_only" not in str(error.value) and "allow_pickle" not in str(error.value)
    assert not (tmp_path / "code-was-run").exists()


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    """And is not called damaged, or missing. Root may read everything: it is another user here."""
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    user, names = os.geteuid(), ("w.pt", "w.safetensors", "w.npz")
    for name in names:
        Path(name).touch(mode=0)
    try:
        os.seteuid(user or 65534)
        for name in names:
            with pytest.raises(ValueError, match=f"^{name}: it cannot be read: Permission denied$"):
                weights.read_weights(name)
    finally:
        os.seteuid(user)


# ----------------------------------------------------------------------------- the command
def test_the_command_converts_an_output_directory_and_prints_the_code(tmp_path, capsys):
    """A checkpoint of training for timm, that file for Hugging Face at another size: both print
    code that opens a model with our logits. As a program the command exits 0, and imports none of
    the libraries, which would take seconds."""
    for library in ("timm", "transformers"):
        pytest.importorskip(library)
    config = replace(SMALL, layernorm_eps=1e-5)
    model = randomised(ViT(config))
    names = ["ant", "bee", "cat", "dog", "elk"]
    save_checkpoint(tmp_path / "run/checkpoints", 3, ShardedOptimizer(model, Grid()), dict(
        vit=asdict(config), config=dict(OUR_FACTS, crop_ratio=0.9, precision="fp32"),
        classes=names))

    def opened(text):
        scope = {}
        exec(text.split("Opens with\n\n")[1], scope)
        return scope["model"].eval()
    file, folder = str(tmp_path / "w.safetensors"), str(tmp_path / "hf/model.safetensors")
    weights.main([str(tmp_path / "run"), file])
    text = capsys.readouterr().out
    assert text.startswith(
        f"{file}: {tmp_path}/run (a checkpoint) for timm, 32 weights loaded; images 32 x 32 px, "
        f"mean {OUR_FACTS['mean']}, std {OUR_FACTS['std']}. Opens with\n\nimport")
    assert_same_logits(model, opened(text))
    program = ("import runpy, sys; runpy.run_path('weights.py', run_name='__main__'); "
               "sys.exit(bool({'timm', 'transformers', 'torchvision'} & sys.modules.keys()))")
    text = subprocess.run(
        [sys.executable, "-c", program, file, folder, "--format", "hf", "--image-size", "48",
         "--std", "1,1,1"], cwd=HERE, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert text.startswith(
        f"{folder}: {file} (timm) for hf, 32 weights loaded; pos_embed resized from 4x4 to 6x6; "
        f"images 48 x 48 px, mean {OUR_FACTS['mean']}, std (1.0, 1.0, 1.0). Opens with")
    theirs = opened(text)
    assert theirs.config.id2label[4] == "elk"
    ours, facts, _ = ours_from(tmp_path / "hf", "hf", replace(config, image_size=48))
    assert_same_logits(ours, theirs, (48, 48))
    assert (facts["classes"], facts["crop_ratio"]) == (tuple(names), 0.9)


@pytest.mark.parametrize("source, output, flags, words", [
    ("timm.pth", "out/w.pt", [], "timm.pth is none of Ti16, .*give --num-attention-heads"),
    ("bare.pth", "out/w.pt", [], r"bare.pth has no head: fine-tune it first \(train.py --recipe "
                                 "finetune --init-from"),
    ("nowhere.pt", "out/w.pt", [], "nowhere.pt: there is no such file"),
    ("w.pt", "out/w.onnx", [], "out/w.onnx must end in .pt or .safetensors"),
    ("w.pt", "out/w.pt", ["--format", "hf"], "out/w.pt: --format hf .*FOLDER/model.safetensors"),
    ("w.pt", "out/w.pt", ["--image-size", "33"], "--image-size 33 must be a positive multiple"),
    ("w.pt", "out/w.pt", ["--num-attention-heads", "8"], "num_attention_heads 4 .this run: 8"),
    ("w.pt", "file/w.pt", [], "file/w.pt cannot be written"),
    ("w.pt", "out/w.pt", ["--foo", "1"], "unknown flag --foo"),
])
def test_what_the_command_cannot_do_is_one_line_and_exit_code_2(tmp_path, capsys, source, output,
                                                                flags, words):
    """Of stderr, with the path or flag to change; nothing is written."""
    export(tmp_path / "w.pt", SMALL, "timm")
    state = ViT(SMALL).state_dict()
    torch.save(state, tmp_path / "timm.pth")
    torch.save({name: x for name, x in state.items() if "head" not in name}, tmp_path / "bare.pth")
    (tmp_path / "file").write_text("")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(SystemExit) as exit:
        weights.main([str(tmp_path / source), str(tmp_path / output), *flags])
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and sorted(os.listdir(tmp_path)) == before
    errors = [line for line in err.splitlines() if not line.startswith(("usage:", "  "))]
    assert len(errors) == 1 and re.match(f"weights.py: error: .*{words}", errors[0])


def test_the_commands_usage_names_what_it_needs(capsys):
    for argv, code, words in [(["-h"], 0, "usage: weights.py SOURCE OUTPUT [flags]\n"),
                              (["w.pt"], 2, "arguments are required: OUTPUT\n"),
                              ([], 2, "arguments are required: SOURCE, OUTPUT\n")]:
        with pytest.raises(SystemExit) as exit:
            weights.main(argv)
        assert exit.value.code == code and words in "".join(capsys.readouterr())


# ----------------------------------------------------------------------------- use it: evaluate.py
def draw_folder(folder, count, names=None, size=16):
    """Shapes as files: folder/CLASS/NUMBER.png, or with `names` of fewer classes."""
    shapes = data.Shapes((size, size), "val")
    for i in range(count):
        image, label = shapes.load(i)
        path = Path(folder) / (names[label % len(names)] if names else shapes.classes[label])
        path.mkdir(parents=True, exist_ok=True)
        image.save(path / f"{i:03d}.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An output directory: 20 steps on the shapes."""
    output = tmp_path_factory.mktemp("trained")
    run_training(output, "--max-steps", 20, "--head", "linear")
    return output


def test_evaluation_of_a_checkpoint_is_exact_for_any_split(tmp_path, trained):
    """103 images, no train folder: the same line and classes.csv from 1 process and 3, batches of 7
    and 64, with workers and without, with tp 2, and from the export; ReaL's share is of the images
    that have labels. A missing class is named."""
    draw_folder(tmp_path / "data/val", 103)
    for path in (tmp_path / "data/val").rglob("*.png"):
        path.rename(path.with_name(f"ILSVRC2012_val_{int(path.stem) + 1:08d}.png"))
    (tmp_path / "real.json").write_text(json.dumps(3 * [[*range(16)]] + [[99]] + 99 * [[]]))
    flags = ["--data", tmp_path / "data", "--output-dir", tmp_path, "--checkpoint", trained]

    def score(*more, world=1):
        text = run_command(evaluate.main, *flags, *more, world=world)
        assert ("ReaL top-1 75.00 % on 4 images\n" in text) == ("--real-labels" in more)
        return re.search("validation.*", text)[0], (tmp_path / "classes.csv").read_text()
    line = score("--micro-batch-size", 7, "--num-workers", 0)
    assert "on 103 images" in line[0] and not line[0].startswith("validation top-1 0.00 %")
    assert score("--micro-batch-size", 64, "--num-workers", 2, world=3) == line
    assert score("--tensor-parallel-size", 2, "--real-labels", tmp_path / "real.json",
                 world=2) == line
    run_command(weights.main, trained, tmp_path / "w.safetensors")
    flags[-1] = tmp_path / "w.safetensors"
    assert score() == line
    shutil.rmtree(tmp_path / "data/val/red star")
    assert "w.safetensors: red star" in run_command(evaluate.main, *flags, code=2)


def test_the_shapes_are_scored_in_the_precision_of_training_unless_told(tmp_path):
    run_training(tmp_path / "a", "--max-steps", 2, "--precision", "bf16-O2")
    for more, precision in [([], "bf16-O2"), (["--precision", "fp32"], "fp32")]:
        text = run_command(evaluate.main, "--data", "shapes", "--checkpoint", tmp_path / "a",
                           "--output-dir", tmp_path, *more)
        assert f" precision {precision}, " in text and " on 1,000 images\n" in text


def test_predictions_are_the_same_table_for_any_split(tmp_path, trained):
    """Whatever decodes is classified: 1 x 1 pixel, a 20,000 px panorama, an animation, a name that
    is no ASCII; what does not is named, counted, and a row without predictions. One and three
    processes write the same bytes, and a contact sheet."""
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
        text = run_command(
            evaluate.main, "--predict", images, "--checkpoint", trained, "--output-dir",
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
    one = run_command(evaluate.main, "--predict", images / "red star/003.png", "--checkpoint",
                      trained, "--output-dir", tmp_path / "one")
    assert "1 images, 0 unreadable" in one
    assert (tmp_path / "one/predictions.csv").read_text().splitlines()[1].split(",")[1:] == [
        *rows["red star/003.png"]]


def test_the_contact_sheet_shows_each_predicted_class():
    """30 of 90 images, ten of each class whether it has 11 or 49, not the first ones, in the order
    of the classes, and never what cannot be read; of fewer, all; of 40 classes, 30 of them."""
    def table(labels, unreadable=0):
        best = torch.ones(len(labels), 1, dtype=torch.float64)
        best[:unreadable] = 0
        return evaluate.Predictions(None, None, best, torch.tensor(labels)[:, None])
    labels = [0] * 11 + [1] * 49 + [2] * 30
    found = evaluate.sample(table(labels, unreadable=1), 30)
    assert [labels[i] for i in found] == [0] * 10 + [1] * 10 + [2] * 10
    assert 0 not in found and len(set(found)) == 30 and found[10:20] != list(range(11, 21))
    assert found == evaluate.sample(table(labels, unreadable=1), 30)
    assert evaluate.sample(table([1, 0, 1]), 30) == [1, 0, 2]
    many = evaluate.sample(table([i % 40 for i in range(80)]), 30)
    assert len({i % 40 for i in many}) == 30 and {i % 40 for i in many} != set(range(30))


def test_imagenets_folder_names_become_words():
    """The thousand names n + 8 digits, and a thousand classes without names; any other stays."""
    words = evaluate.class_names
    assert words(tuple(f"n{i:08d}" for i in range(1000)), 1000)[0] == "tench"
    assert words(None, 1000)[999] == words((), 1000)[999] == "toilet tissue"
    assert words(("n01440764", "b"), 2) == ["n01440764", "b"]
    assert words(None, 2) == ["class 0", "class 1"]


@pytest.mark.parametrize("flags, message", [
    ("", "--checkpoint PATH is needed"),
    ("--checkpoint x", "give --data DIR .* or --predict FOLDER; one of them"),
    ("--checkpoint x --data d --predict d", "give --data DIR .* or --predict FOLDER; one of them"),
    ("--checkpoint x --predict d --val-labels f", "--val-labels .*it needs --data DIR$"),
    ("--checkpoint x --data shapes --val-labels f", "--val-labels has no effect .*--data shapes"),
    ("--checkpoint x --predict p --real-labels r",
     "--real-labels has no effect without --data; it needs --data DIR$"),
])
def test_flags_that_contradict_or_have_no_effect_are_errors(flags, message):
    with pytest.raises(ValueError, match=message):
        parse(EvalConfig, flags.split())


@pytest.mark.parametrize("command, flags, words", [
    (EvalConfig, "--lr 1", "unknown flag --lr"),
    (EvalConfig, "--dry-run", "unknown flag --dry-run"),
    (EvalConfig, "--format hf", "unknown flag --format"),
    (EvalConfig, "--precision bf16-O2-fp8", "--precision: invalid choice: 'bf16-O2-fp8'"),
    (ConvertConfig, "in out --data d", "unknown flag --data"),
    (TrainConfig, "--checkpoint x", "unknown flag --checkpoint"),
])
def test_flags_of_another_command_are_unknown(capsys, command, flags, words):
    """fp8 is for training: a --precision of training alone."""
    with pytest.raises(SystemExit) as exit:
        parse(command, flags.split())
    assert exit.value.code == 2 and words in capsys.readouterr().err


def test_bad_input_is_one_clear_error(tmp_path):
    """Exit code 2 and one line, nothing written: no folder, no image, no weights, weights without
    a head, a file where the output should go, images with other classes."""
    out, images = tmp_path / "out", tmp_path / "images"
    export(tmp_path / "w.pt", SMALL, "timm")
    state = ViT(SMALL).state_dict()
    torch.save({name: x for name, x in state.items() if "head" not in name}, tmp_path / "bare.pth")
    torch.save(state, tmp_path / "timm.pth")
    images.mkdir()
    (tmp_path / "file").write_text("")

    def use(*flags, checkpoint="w.pt"):
        return run_command(evaluate.main, *flags, "--checkpoint", tmp_path / checkpoint, code=2)
    assert "nowhere.pt: there is no such file" in use(
        "--predict", images, "--output-dir", out, checkpoint="nowhere.pt")
    assert "does not tell its number of heads: give --num-att" in use(
        "--predict", images, "--output-dir", out, checkpoint="timm.pth")
    assert "has no head: fine-tune it" in use(
        "--predict", images, "--output-dir", out, checkpoint="bare.pth")
    assert "no folder /nowhere" in use("--predict", "/nowhere", "--output-dir", out)
    assert "not a single image" in use("--predict", images, "--output-dir", out)
    paint(images / "1.png")
    assert "/x cannot be written" in use("--predict", images, "--output-dir", tmp_path / "file/x")
    make_folder(tmp_path / "data")
    assert "has 2 classes, --checkpoint" in use("--data", tmp_path / "data")
    assert not out.exists()
