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

import evaluate
import formats
import nemo_file
import samples
import weights
from configs import MODELS, ConvertConfig, EvalConfig, TrainConfig, ViTConfig
from export import write_program
from flags import parse
from model import ViT
from parallel import Axis, Grid, ShardedOptimizer, shard
from testing import generator, make_folder, paint, run_command, run_training, save_checkpoint

HERE = Path(__file__).parent
SMALL = ViTConfig(hidden_size=32, ffn_hidden_size=80, num_layers=2, num_attention_heads=4,
                  patch_size=8, image_size=32, num_classes=5, num_class_tokens=1, head="linear",
                  hidden_dropout=0.0)
OUR_FACTS = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


# ----------------------------------------------------------------------------- the table's models
@pytest.mark.parametrize("name, theirs", [("B16", "vit_base_patch16_224"),
                                          ("L16", "vit_large_patch16_224")])
def test_logits_equal_timms(name, theirs):
    """timm's names and shapes, all of them; for the same random weights of 3 blocks, loaded
    strictly with no mapping, its logits to 1e-4 in fp32 (rounding is 4e-6; another GELU or epsilon
    shows at 1e-3)."""
    timm, config = pytest.importorskip("timm"), replace(MODELS[name], num_class_tokens=1,
                                                        head="linear")
    with torch.device("meta"):
        reference, ours = timm.create_model(theirs, depth=3), ViT(replace(config, num_layers=3))
        whole = timm.create_model(theirs).state_dict(), ViT(config).state_dict()
    shapes, expected = ({k: x.shape for k, x in state.items()} for state in whole)
    assert shapes == expected
    state = {k: 0.03 * torch.randn(v.shape, generator=generator(k))
             + (v.ndim == 1 and k.endswith("weight"))  # norms around 1
             for k, v in reference.state_dict().items()}
    for model in reference, ours:
        model.load_state_dict(state, strict=True, assign=True)
    images = torch.randn(2, 3, 224, 224, generator=generator(0))
    with torch.no_grad():
        expected, found = (model.eval()(images) for model in (reference, ours))
    assert expected.std() > 0.1, "the comparison would be of zeros"
    assert (found - expected).abs().max() < 1e-4


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
    model = ViT(config, seed=None).eval()
    model.init_weights(3, fitted)
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
    """reg_tokens=7 is our 8 class tokens; a file whose patches are no square, or whose positions
    could be of two squares, is refused without --init-image-size and exact with it: 16 + 8 is no
    other square, 9 + 8 positions may be 16 + 1."""
    for more, size, count in [(dict(reg_tokens=7), None, 8), (dict(img_size=(16, 64)), (16, 64), 1),
                              (dict(reg_tokens=7, img_size=24), 24, 8)]:
        theirs = their_model("timm", **more)
        torch.save(theirs.state_dict(), tmp_path / "w.pth")
        if size == 24:
            with pytest.raises(ValueError, match="17 positions.*--init-image-size"):
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


PARTS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32,
             patch_size=8, intermediate_size=80)
TEXT = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            vocab_size=30, bos_token_id=0, eos_token_id=1)
DECODER = dict(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
               decoder_intermediate_size=16, mask_ratio=0.0)


def of_hf(name, config, part=None, result="pooler_output", **more):
    """(a model of transformers, what of it our features or logits are)"""
    import transformers
    if name.startswith(("CLIPModel", "SiglipFor")):
        more = dict(vision_config=PARTS, **more)
    else:
        more = PARTS | more
    model = randomised(getattr(transformers, name)(getattr(transformers, config)(**more)))

    def features(images, **options):
        outputs = (getattr(model, part) if part else model)(images, **options)
        return (outputs.last_hidden_state[:, 0] if result == "token" else
                outputs.last_hidden_state.mean(1) if result == "mean" else outputs[result])
    return model, features


def of_timm(features=lambda model, images: model(images), cls="VisionTransformer", **more):
    import timm
    model = randomised(getattr(timm.models.deit if "Dist" in cls else timm.models, cls)(**dict(
        img_size=32, patch_size=8, num_classes=5, embed_dim=32, depth=2, num_heads=4,
        mlp_ratio=2.5) | more))
    return model, partial(features, model)


EPS = partial(torch.nn.LayerNorm, eps=1e-5)
MASKS, HEAD = "what masked images are completed with", "the head, which reads "
FAMILIES = {  # the library's model, what is compared; facts that shapes do not tell; left out
    "DeiT-III (timm)": (lambda: of_timm(init_values=0.1, no_embed_class=True), {}, ""),
    "DINOv2, registers (timm)": (lambda: of_timm(init_values=0.1, reg_tokens=4,
                                                 no_embed_class=True), {}, ""),
    "MAE, fine-tuned (timm)": (lambda: of_timm(global_pool="avg"), {}, ""),
    "I-JEPA, GAP (timm)": (lambda: of_timm(global_pool="avg", fc_norm=False, class_token=False),
                           dict(mean=(0.5,) * 3), ""),
    "CLIP (timm)": (lambda: of_timm(pre_norm=True, norm_layer=EPS, act_layer="quick_gelu"),
                    dict(layernorm_eps=1e-5), ""),
    "SigLIP (timm)": (lambda: of_timm(
        lambda model, images: model.forward_features(images).mean(1), global_pool="map",
        class_token=False), dict(mean=(0.5,) * 3), f"attention pooling, {HEAD}attention pooling"),
    "DeiT, distilled (timm)": (lambda: of_timm(
        lambda model, images: model.forward_features(images)[:, 0],
        cls="VisionTransformerDistilled"), {}, f"{HEAD}two tokens"),
    "DINOv2": (lambda: of_hf("Dinov2Model", "Dinov2Config"), {}, MASKS),
    "DINOv2, classes": (lambda: of_hf("Dinov2ForImageClassification", "Dinov2Config", "dinov2"),
                        {}, f"{MASKS}, {HEAD}token 0 and the mean"),
    "DINOv2, registers": (lambda: of_hf("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
                          {}, MASKS),
    "MAE": (lambda: of_hf("ViTMAEForPreTraining", "ViTMAEConfig", "vit", "token", **DECODER),
            dict(layernorm_eps=1e-12), MASKS),
    "DeiT, classes": (lambda: of_hf("DeiTForImageClassification", "DeiTConfig", None, "logits",
                                    num_labels=5), dict(layernorm_eps=1e-12, mean=(0.5,) * 3), ""),
    "CLIP": (lambda: of_hf("CLIPVisionModel", "CLIPVisionConfig"),
             dict(layernorm_eps=1e-5, gelu_approximate="quick"), ""),
    "CLIP, both towers": (lambda: of_hf("CLIPModel", "CLIPConfig", "vision_model",
                                        text_config=TEXT, projection_dim=16),
                          dict(layernorm_eps=1e-5, gelu_approximate="quick"),
                          "the text tower and projections"),
    "SigLIP": (lambda: of_hf("SiglipVisionModel", "SiglipVisionConfig", None, "mean"),
               dict(gelu_approximate="tanh", mean=(0.5,) * 3), "attention pooling"),
    "SigLIP, classes": (lambda: of_hf("SiglipForImageClassification", "SiglipConfig", None,
                                      "logits", num_labels=5, text_config=TEXT),
                        dict(gelu_approximate="tanh", mean=(0.5,) * 3), "attention pooling"),
}


def family_difference(name, folder):
    """(largest difference of our logits, or features where the file has no head that is ours, from
    the library's at the file's 32 px, that at 48 x 64, what was left out) for random weights that
    the library wrote. At 48 x 64 theirs have our positions, but timm's, which resizes as we do."""
    make, facts, _ = FAMILIES[name]
    theirs, features = make()
    if hasattr(theirs, "save_pretrained"):
        theirs.save_pretrained(folder)
        from safetensors.torch import load_file, save_file
        save_file(load_file(folder / "model.safetensors"), folder / "alone.safetensors")
        path = folder / "alone.safetensors"      # a file that tells nothing but shapes
    else:
        torch.save(theirs.state_dict(), path := folder / "w.pth")
    found = weights.read_weights(path)
    for key, value in (dict(layernorm_eps=1e-6, gelu_approximate="none") | facts).items():
        assert found.facts[key] == value, key
    if "mean" not in facts:
        assert max(found.facts["mean"]) < 0.49, "ImageNet's or CLIP's"
    quick = dict(gelu_approximate="quick") if name == "CLIP (timm)" else {}
    with_classes = weights.Weights(found.format, found.tensors, dict(num_classes=5) | found.facts)
    result = []
    for size in (32, (48, 64)):
        vit, _ = weights.whole_model(with_classes, "w", image_size=size, num_attention_heads=4,
                                     **quick)
        fitted, report = weights.fit_weights(found, vit)
        ours = ViT(vit, seed=3).eval()
        weights.load_weights(ours, fitted)
        if "num_classes" not in found.facts:
            ours.head = torch.nn.Identity()
        options = {}
        if size != 32 and hasattr(theirs, "set_input_size"):
            theirs.set_input_size(size)
        elif size != 32:
            reg = 4 if "registers" in name else 0
            pos = torch.cat([ours.pos_embed[:, :vit.num_class_tokens - reg],
                             ours.pos_embed[:, vit.num_class_tokens:]], dim=1)
            for module in theirs.modules():
                if hasattr(module, "interpolate_pos_encoding"):
                    module.interpolate_pos_encoding = lambda *args, pos=pos: pos
            options = {} if "DINO" in name else dict(interpolate_pos_encoding=True)
        images = torch.randn(3, 3, *vit.image_hw, generator=generator("images"))
        with torch.no_grad():
            y, z = ours(images), features(images, **options)
        assert y.shape == z.shape and y.std() > 0.1
        result.append((y - z).abs().max().item())
    return *result, report[-1].partition("left out: ")[2]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_of_each_family_gives_its_librarys_features(tmp_path, name):
    """Nothing is told but tensors: epsilon, GELU and pixels are the family's. 1e-4 as above; what
    is left out is named."""
    pytest.importorskip("timm" if "timm" in name else "transformers")
    *differences, left_out = family_difference(name, tmp_path)
    assert max(differences) <= 1e-4
    assert left_out == FAMILIES[name][2]


def test_a_hub_folder_may_be_in_parts_and_tells_of_its_image_tower(tmp_path):
    """Sharded safetensors with their index, as a folder or by one of the parts; epsilon, GELU and
    heads of the vision_config. A missing part is an error that names it."""
    pytest.importorskip("transformers")
    theirs, features = of_hf("CLIPModel", "CLIPConfig", "vision_model", text_config=TEXT)
    theirs.config.vision_config.hidden_act = "gelu"
    theirs.config.vision_config.layer_norm_eps = 1e-3
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 2
    for path in tmp_path, parts[1]:
        facts = weights.read_weights(path).facts
        assert (facts["num_attention_heads"], facts["layernorm_eps"], facts["gelu_approximate"],
                facts["pre_norm"]) == (4, 1e-3, "none", True)
    parts[1].unlink()
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        weights.read_weights(tmp_path)


@pytest.mark.parametrize("change, words", [
    (dict(name="blocks.0.mlp.w12.weight"), "it has SwiGLU, which"),
    (dict(name="blocks.0.attn.q_norm.weight"), "it has norms of q and k, which"),
    (dict(name="blocks.0.attn.relative_position_bias_table"), "it has relative positions, which"),
    (dict(name="rope.freqs"), "it has rotary positions, which"),
    (dict(name="blocks.0.mlp.fc2.weight", shape=(32, 40)), "SwiGLU"),  # timm's packed, by its shape
])
def test_what_this_program_does_not_have_is_refused_by_name(tmp_path, change, words):
    state = ViT(SMALL).state_dict() | {change["name"]: torch.ones(change.get("shape", (32,)))}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=words):
        weights.read_weights(tmp_path / "w.pth")


def test_a_norm_and_head_that_read_something_else_are_new(tmp_path):
    """--pool mean --fc-norm, as MAE fine-tunes: fc_norm and head begin anew, and the report says
    so. LayerScale or a norm before the blocks that the file has not makes another model."""
    export(tmp_path / "w.pt", SMALL, "timm")
    ours, _, report = ours_from(tmp_path / "w.pt", "timm", pool="mean", fc_norm=True)
    assert report == ["28 weights loaded",
                      "fc_norm newly initialised: the file's norm is elsewhere",
                      "head newly initialised for 5 classes: the file's is linear, 5 classes, pool "
                      "token"]
    assert (ours.fc_norm.weight == 1).all() and not ours.head.weight.any()
    found = weights.read_weights(tmp_path / "w.pt")
    for change, words in (dict(layerscale=0.1), "layerscale 0.0 .this run: 0.1"), (
            dict(pre_norm=True), "pre_norm False .this run: True"):
        with pytest.raises(ValueError, match=words):
            weights.fit_weights(found, replace(SMALL, **change))


# ----------------------------------------------------------------------------- NeMo's files
def write_nemo(path, state, config, tp, **changes):
    """NeMo's archive of our weights, written from its layout: names, qkv by head, patches unfolded
    [p, p, C], and each rank's columns and rows."""
    import io
    import tarfile

    import yaml
    p, heads = config.patch_size, config.num_attention_heads
    back = [(ours, theirs) for theirs, ours in nemo_file.NAMES]
    ranks = [{} for _ in range(tp)]
    for name, x in state.items():
        theirs = name if name.startswith("head.") and config.head == "linear" else (
            formats.rename(name, back))
        if ".qkv." in name:
            x = x.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
        if name == "patch_embed.proj.weight":
            x = x.permute(0, 2, 3, 1).flatten(1)
        if name == "pos_embed":
            x = x[0]
        dim = (1 if name.endswith(("attn.proj.weight", "fc2.weight")) else
               0 if ".qkv." in name or ".fc1." in name else None)
        for rank, part in enumerate([x] * tp if dim is None else x.chunk(tp, dim)):
            ranks[rank]["model." + theirs] = part.contiguous()
    told = dict(num_attention_heads=heads, patch_dim=p, img_h=config.image_hw[0],
                img_w=config.image_hw[1], layernorm_epsilon="1e-5", tensor_model_parallel_size=tp,
                normalization="layernorm", megatron_legacy=False, openai_gelu=False) | changes
    with tarfile.open(path, "w:gz") as archive:
        def add(name, data):
            member = tarfile.TarInfo("./" + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        add("model_config.yaml", yaml.safe_dump(told).encode())
        for rank, tensors in enumerate(ranks):
            torch.save(tensors, buffer := io.BytesIO())
            folder = f"mp_rank_{rank:02d}/" if tp > 1 else ""
            add(f"{folder}model_weights.ckpt", buffer.getvalue())


def test_nemos_archives_are_read_at_any_tensor_parallel_size(tmp_path):
    """Bit-equal weights from tp 1, 2 and 4, with the pretraining head and the linear one,
    LayerScale and the norm before the blocks; what model_config.yaml tells comes along; other
    layouts are refused by name. (The layout is from NeMo's source; there is no file of NeMo's.)"""
    pytest.importorskip("yaml")
    path = tmp_path / "vit.nemo"
    for tp, change in [(1, dict(head="mlp")), (2, dict(layerscale=0.5, pre_norm=True)),
                       (4, dict(head="mlp", image_size=(16, 32)))]:
        config = replace(SMALL, num_class_tokens=8, **change)
        model = randomised(ViT(config))
        write_nemo(path, model.state_dict(), config, tp, bias_activation_fusion=tp == 4)
        found = weights.read_weights(path)
        vit, facts = weights.whole_model(found, path)
        gelu = "tanh" if tp == 4 else "none"
        assert vit == replace(config, layernorm_eps=1e-5, gelu_approximate=gelu, layerscale=1e-5
                              if config.layerscale else 0.0, image_size=config.image_hw)
        assert (found.format, facts["mean"][0], facts["crop_ratio"]) == ("nemo", 0.485, 1.0)
        fitted, _ = weights.fit_weights(found, vit)
        assert fitted.keys() == model.state_dict().keys()
        assert all(torch.equal(x, fitted[name]) for name, x in model.state_dict().items())
    for change, words in [(dict(megatron_legacy=True), "megatron_legacy is True, not False"),
                          (dict(normalization="rmsnorm"), "is rmsnorm, not layernorm"),
                          (dict(tensor_model_parallel_size=8), "4 parts of tensor_model_par.*8")]:
        write_nemo(path, model.state_dict(), config, 4, **change)
        with pytest.raises(ValueError, match=words):
            weights.read_weights(path)


# ----------------------------------------------------------------------------- by name
def test_torchvisions_names_come_from_its_cache_with_its_facts(tmp_path, monkeypatch):
    """The file that its enum names, in its folder; pixels, crop and classes of the enum. Without a
    network the error says which file to put where; a mistyped name is answered with the nearest."""
    import torchvision
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    kept = tmp_path / "hub/checkpoints"
    kept.mkdir(parents=True)
    theirs = their_model("torchvision", replace(SMALL, image_size=224))
    torch.save(theirs.state_dict(), kept / "vit_b_16-c867db91.pth")
    for name in "vit_b_16", "vit_b_16.IMAGENET1K_V1":
        found = weights.read_weights(f"torchvision:{name}")
        assert found.format == "torchvision" and found.facts["classes"][0] == "tench"
        assert (found.facts["image_size"], found.facts["crop_ratio"]) == (224, 224 / 256)
        assert torch.equal(found.tensors["norm.weight"], theirs.encoder.ln.weight)
    (kept / "vit_b_16-c867db91.pth").unlink()

    def no_network(*args, check_hash, **options):
        assert check_hash
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", no_network)
    for name, words in [("vit_b_16", "torchvision:vit_b_16: .*Temporary failure.*; put https.*"
                                     f"/vit_b_16-c867db91.pth into {kept}$"),
                        ("vit_b16", "Did you mean vit_b_16"),
                        ("vit_b_16.IMAGENET_V1", "Did you mean IMAGENET1K_V1")]:
        with pytest.raises(ValueError, match=words):
            weights.read_weights(f"torchvision:{name}")


def test_timms_names_bring_what_its_model_knows(tmp_path, monkeypatch):
    """Heads, epsilon, GELU, pooling and pixels of the model that timm builds and loads, here one
    that is registered for the test; a mistyped name, and a model that is no ViT, are named."""
    timm = pytest.importorskip("timm")
    from timm.models import generate_default_cfgs, register_model
    theirs = randomised(timm.models.VisionTransformer(**TIMM_SMALL))
    torch.save(theirs.state_dict(), tmp_path / "w.pth")

    def vit_of_this_test(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None,
                         **more):
        return timm.models.build_model_with_cfg(
            timm.models.VisionTransformer, "vit_of_this_test", pretrained, pretrained_strict=True,
            **TIMM_SMALL | more)
    vit_of_this_test.__module__ = __name__
    globals()["default_cfgs"] = generate_default_cfgs({"vit_of_this_test.a": dict(
        file=str(tmp_path / "w.pth"), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.95,
        num_classes=5, input_size=(3, 32, 32), first_conv="patch_embed.proj", classifier="head")})
    register_model(vit_of_this_test)
    found = weights.read_weights("timm:vit_of_this_test.a")
    vit, facts = weights.whole_model(found, "it")
    assert (vit.num_attention_heads, vit.layernorm_eps, vit.gelu_approximate, vit.pool,
            vit.image_size, facts["crop_ratio"], facts["mean"]) == (
                8, 1e-3, "tanh", "mean", (32, 32), 0.95, (0.1, 0.2, 0.3))
    model = ViT(vit).eval()
    weights.load_weights(model, weights.fit_weights(found, vit)[0])
    assert_same_logits(model, theirs)
    with pytest.raises(ValueError, match="vit_base_patch16_225' is unknown. Did you mean vit_base"):
        weights.read_weights("timm:vit_base_patch16_225")
    with pytest.raises(ValueError, match="it is a ResNet of timm, no VisionTransformer"):
        monkeypatch.setattr(timm, "create_model", lambda *args, **options: timm.models.ResNet(
            timm.models.resnet.BasicBlock, (1, 1, 1, 1)))
        weights.read_weights("timm:resnet18")

    def no_network(*args, **options):
        raise OSError("no network")
    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(ValueError, match=r"downloaded \(no network\); put the weights of https.*"):
        weights.read_weights("timm:vit_base_patch16_224")


TIMM_SMALL = dict(img_size=32, patch_size=8, num_classes=5, embed_dim=32, depth=2, num_heads=8,
                  mlp_ratio=2.5, norm_layer=partial(torch.nn.LayerNorm, eps=1e-3),
                  act_layer="gelu_tanh", global_pool="avg", fc_norm=False)


def test_hugging_faces_names_come_from_its_cache(tmp_path, monkeypatch):
    """A repository in the hub's cache is read as its folder; one that is not, without a network,
    says what to put where."""
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("transformers")
    theirs, features = of_hf("Dinov2Model", "Dinov2Config")
    repository = tmp_path / "models--some--vit"
    theirs.save_pretrained(repository / "snapshots/abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    monkeypatch.setattr(hub, "snapshot_download", partial(
        hub.snapshot_download, cache_dir=tmp_path, local_files_only=True))
    facts = weights.read_weights("hf:some/vit").facts
    assert (facts["num_attention_heads"], facts["layerscale"]) == (4, 1e-5)
    with pytest.raises(ValueError, match="^hf:some/other: it cannot be downloaded .*; put "
                       "config.json, .*model.safetensors of https://huggingface.co/some/o"):
        weights.read_weights("hf:some/other")
    with pytest.raises(ValueError, match="^hf: there is no such file"):  # a folder's name
        weights.read_weights("hf")


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
    facts = formats.SILENT["timm"] | asdict(replace(MODELS["L16"], patch_size=14))
    with pytest.raises(ValueError, match=r"patch_size 14 .*shape of --model L16 --patch-size 14"):
        weights.fit_weights(weights.Weights("timm", {}, facts), MODELS["L16"])


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
    config = replace(config, pool="mean", fc_norm=True, layerscale=0.5, pre_norm=True)
    found = weights.Weights("torchvision", {}, {**asdict(config), **OUR_FACTS, "crop_ratio": 1.0})
    for recipe, head in (("pretrain", "mlp"), ("finetune", "linear")):
        given = dict(std=(1.0, 1.0, 1.0), image_size=32, recipe=recipe)
        run = TrainConfig(recipe=recipe, std=given["std"])
        vit = replace(MODELS["B16"], image_size=32, head="linear")
        run2, vit2, taken = weights.adopt(found, run, vit, given)
        assert vit2 == replace(
            vit, num_class_tokens=1, layernorm_eps=1e-5, head=head, gelu_approximate="tanh",
            pool="mean", fc_norm=True, layerscale=0.5, pre_norm=True), "--model decides the shape"
        # Another pooling than the file's has no norm of the mean.
        assert not weights.adopt(found, run, vit, given | dict(pool="token"))[1].fc_norm
        assert run2 == replace(run, mean=OUR_FACTS["mean"]) and run2.std == (1, 1, 1)
        assert taken.keys() == {"num_class_tokens", "layernorm_eps", "gelu_approximate", "mean",
                                "pool", "fc_norm", "layerscale", "pre_norm",
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
    facts = {**formats.SILENT["timm"], **asdict(MODELS["Ti16"]), "num_classes": 7}
    facts.pop("num_attention_heads")
    vit, _ = weights.whole_model(weights.Weights("timm", {}, facts), "w.pth")
    assert vit == replace(MODELS["Ti16"], num_classes=7, hidden_dropout=0.0)
    big = facts | asdict(replace(MODELS["L16"], patch_size=14)) | dict(num_classes=7)
    big.pop("num_attention_heads")
    assert weights.whole_model(weights.Weights("timm", {}, big), "w")[0].num_attention_heads == 16
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
    ("timm", "w.safetensors", dict(hidden_size=224, ffn_hidden_size=976)),
    ("timm", "w.pt", dict(pool="mean", num_class_tokens=0, gelu_approximate="quick")),
    ("timm", "w.pt", dict(pool="mean", fc_norm=True, layerscale=0.5, pre_norm=True,
                          num_class_tokens=5))])
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
    if config.pre_norm:  # timm's patches have no bias before that norm: it is in the positions
        with torch.no_grad():
            model.pos_embed[:, config.num_class_tokens:] += model.patch_embed.proj.bias
            model.patch_embed.proj.bias.zero_()
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
    (dict(pool="mean", layerscale=0.5), "hf", "no --pool mean, --layerscale 0.5, which .*timm"),
    (dict(pre_norm=True, gelu_approximate="quick"), "torchvision", "no --pre-norm True, --gelu-a"),
])
def test_what_a_library_does_not_have_is_refused(change, fmt, words):
    config = replace(SMALL, **change)
    with pytest.raises(ValueError, match=words):
        weights.to_format(ViT(config).state_dict(), config, fmt)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_file_may_be_of_half_the_bytes(tmp_path, dtype):
    """--dtype: each weight is the fp32 one rounded once, and is read back as fp32."""
    model, _ = export(tmp_path / "w.pt", SMALL, "timm")
    weights.main([str(tmp_path / "w.pt"), str(tmp_path / "half.safetensors"), "--dtype", dtype])
    assert os.path.getsize(tmp_path / "half.safetensors") < 0.6 * os.path.getsize(
        tmp_path / "w.pt")
    found = weights.read_weights(tmp_path / "half.safetensors")
    fitted, _ = weights.fit_weights(found, SMALL)
    for name, x in model.state_dict().items():
        assert torch.equal(fitted[name], x.to(getattr(torch, dtype)).float())


@pytest.mark.parametrize("fmt, name, packages", [
    ("onnx", "m.onnx", ["onnx", "onnxscript", "onnxruntime"]), ("torch-export", "m.pt2", [])])
def test_a_program_gives_our_logits_for_any_number_of_images(tmp_path, fmt, name, packages, capsys):
    """The printed code, run as it is, for 1 and 5 images, of a model with all options: within 1e-4
    (1e-6 was seen). The wrong ending is refused before anything is written."""
    for package in packages:
        pytest.importorskip(package)
    config = replace(SMALL, image_size=(16, 32), pool="mean", fc_norm=True, layerscale=0.5,
                     pre_norm=True, gelu_approximate="quick", num_class_tokens=3)
    model, _ = export(tmp_path / "w.pt", config, "timm")
    capsys.readouterr()
    weights.main([str(tmp_path / "w.pt"), str(tmp_path / name), "--format", fmt])
    code = capsys.readouterr().out.split("Opens with\n\n")[1]
    for count in 1, 5:
        images = torch.randn(count, 3, 16, 32)
        scope = {"images": images.numpy() if fmt == "onnx" else images}
        exec(code, scope)
        with torch.no_grad():
            difference = torch.as_tensor(scope["logits"]) - model.eval()(images)
        assert difference.shape == (count, 5) and difference.abs().max() < 1e-4
    with pytest.raises(SystemExit):
        weights.main([str(tmp_path / "w.pt"), str(tmp_path / "m.pth"), "--format", fmt])
    assert f"must end in {name[1:]}" in capsys.readouterr().err
    assert not (tmp_path / "m.pth").exists()


def test_a_missing_exporter_is_named_with_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="pip install onnx onnxscript onnxruntime"):
        write_program(tmp_path / "m.onnx", ViT(SMALL).state_dict(), SMALL, "onnx")
    assert not os.listdir(tmp_path)


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
        "unknown": good | {f"blocks.{i}.ls{j}.gamma": torch.ones(32)
                           for i, j in ((0, 1), (0, 2), (1, 1))} | {"thing": torch.ones(32)},
        "missing": without("blocks.1.mlp.fc2.bias"), "half a head": without("head.bias"),
        "misshapen": good | {"norm.weight": torch.ones(31)},
        "no class token": without("cls_token"), "no positions": without("pos_embed"),
        "no blocks": {name: x for name, x in good.items() if "blocks" not in name},
        "twice": {formats.rename(name, [(b, a) for a, b in formats.NAMES["torchvision"]]): x
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
    ("w.pth", "unknown", r"1 missing \(blocks.1.ls2.gamma\)"),
    ("w.pth", "missing", r"1 missing \(blocks.1.mlp.fc2.bias\)"),
    ("w.pth", "half a head", r"1 missing \(head.bias\)"),
    ("w.pth", "misshapen", r"1 misshapen \(norm.weight\)"),
    ("w.pth", "no class token", "17 positions, which are not 0 class tokens and a 4x4 grid"),
    ("w.pth", "no positions", "no ViT with positions"),
    ("w.pth", "no blocks", "or is incomplete"),
    ("w.pth", "twice", "of torchvision's form.*under two names"),
    ("w.onnx", "text", "must end in .pt, .pth, .bin, .safetensors, .npz or .nemo"),
    ("w.nemo", "text", "truncated or damaged, or not a .nemo file of plain tensors"),
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
    ("w.pt", "out/m.pt2", ["--format", "torch-export", "--dtype", "float16"],
     "--dtype has no effect with --format torch-export"),
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
    shapes = samples.Shapes((size, size), "val")
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
    and 64, with workers and without, with tp 2, and from the export, of which no file is written
    where none was asked for; ReaL's share is of the images that have labels. A missing class is
    named."""
    draw_folder(tmp_path / "data/val", 103)
    for path in (tmp_path / "data/val").rglob("*.png"):
        path.rename(path.with_name(f"ILSVRC2012_val_{int(path.stem) + 1:08d}.png"))
    (tmp_path / "real.json").write_text(json.dumps(3 * [[*range(16)]] + [[99]] + 99 * [[]]))
    flags = ["--data", tmp_path / "data", "--output-dir", tmp_path, "--checkpoint", trained]

    def score(*more, world=1):
        text = run_command(evaluate.main, *flags, *more, world=world)
        assert ("ReaL top-1 75.00 % on 4 images\n" in text) == ("--real-labels" in more)
        return (re.search("validation.*", text)[0], text.split("; those with")[1].split("ReaL")[0],
                (tmp_path / "classes.csv").read_text())
    line = score("--micro-batch-size", 7, "--num-workers", 0)
    assert "on 103 images" in line[0] and not line[0].startswith("validation top-1 0.00 %")
    assert score("--micro-batch-size", 64, "--num-workers", 2, world=3) == line
    assert score("--tensor-parallel-size", 2, "--real-labels", tmp_path / "real.json",
                 world=2) == line
    run_command(weights.main, trained, tmp_path / "w.safetensors")
    flags = [*flags[:2], "--checkpoint", tmp_path / "w.safetensors"]
    text = run_command(evaluate.main, *flags)
    assert all(part in text for part in line[:2]) and "16 classes: in no file without" in text
    shutil.rmtree(tmp_path / "data/val/red star")
    assert "w.safetensors: red star" in run_command(evaluate.main, *flags, code=2)


def test_the_shapes_are_scored_in_the_precision_of_training_unless_told(tmp_path):
    run_training(tmp_path / "a", "--max-steps", 2, "--precision", "bf16-O2")
    for more, precision in [([], "bf16-O2"), (["--precision", "fp32"], "fp32")]:
        text = run_command(evaluate.main, "--data", "shapes", "--checkpoint", tmp_path / "a",
                           "--output-dir", tmp_path, *more)
        assert f" precision {precision}, " in text and " on 1,000 images\n" in text


def test_predictions_are_the_same_table_for_any_split(tmp_path, trained, monkeypatch):
    """Whatever decodes is classified: 1 x 1 pixel, a 20,000 px panorama, an animation, a name that
    is no ASCII; what does not is named, counted, and a row without predictions, and an error if
    nothing does. One and three processes write the same bytes, and a contact sheet; of weights that
    are no run's to 'output', where none was named."""
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
    monkeypatch.chdir(tmp_path)
    shutil.copytree(*(trained / "checkpoints").glob("step_*"), "bare")
    one = run_command(evaluate.main, "--predict", images / "red star/003.png", "--checkpoint",
                      "bare")
    share = re.search(rf"^{rows['red star/003.png'][0]} ([\d.]+) %, ", one, re.M)[1]
    assert "\n1 image, 0 unreadable" in one and abs(float(share) / 100 - best[0]) < 1e-3
    assert Path("output/predictions.csv").read_text().splitlines()[1].split(",")[1:] == [
        *rows["red star/003.png"]]
    assert "error: of 1 image none can be read" in run_command(
        evaluate.main, "--predict", images / "broken.jpg", "--checkpoint", trained, "--output-dir",
        "output", code=1)
    assert os.listdir("output") == ["predictions.csv"]  # no picture of another image


def test_results_go_to_the_run_that_is_evaluated(tmp_path):
    """Of an output directory, a checkpoint in it, its best one, and a file beside them."""
    (tmp_path / "run/checkpoints/step_00000001").mkdir(parents=True)
    for name in ("", "checkpoints", "checkpoints/step_00000001", "best", "vit.safetensors"):
        assert evaluate.run_of(f"{tmp_path}/run/{name}") == f"{tmp_path}/run"
    for name in (f"{tmp_path}/vit.safetensors", "timm:vit_base_patch16_224"):
        assert evaluate.run_of(name) is None


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
    ("--checkpoint x --predict d --std 1,inf,1", "--std inf must be a finite number"),
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
    (EvalConfig, "--image-size 8x8x8", "'8x8x8' must be a side in pixels, or HEIGHT,WIDTH"),
    (EvalConfig, "--std 1", "'1' must be 3 numbers"),
    (TrainConfig, "--rand-augment 2,9.5", "'2,9.5' must be 2 whole numbers with commas between"),
    (ConvertConfig, "in out --data d", "unknown flag --data"),
    (TrainConfig, "--checkpoint x", "unknown flag --checkpoint"),
    (TrainConfig, "--wandb foo", "'foo' belongs to no flag: none is before it, or one that"),
    (TrainConfig, "foo", "'foo' belongs to no flag: none is before it"),
])
def test_flags_of_another_command_or_form_are_errors(capsys, command, flags, words):
    """Values of another form, too. fp8 is for training: a --precision of training alone."""
    with pytest.raises(SystemExit) as exit:
        parse(command, flags.split())
    assert exit.value.code == 2 and words in capsys.readouterr().err


def test_bad_input_is_one_clear_error(tmp_path):
    """Exit code 2 and one line, no file written: no folder, no image, no weights, weights without
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
    assert "has 2 classes, --checkpoint" in use("--data", tmp_path / "data", "--output-dir", out)
    assert not list(out.iterdir())
