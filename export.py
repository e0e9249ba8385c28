"""The model as a program for other runtimes: ONNX, or a file of torch.export.

    python weights.py SOURCE model.onnx --format onnx         # needs onnx, onnxscript, onnxruntime
    python weights.py SOURCE model.pt2 --format torch-export

images [B, C, H, W], normalised, fp32 -> logits [B, num_classes], any B. What was written is run
once in its own runtime and compared with the model.
"""

import logging
import warnings
from pathlib import Path

import torch

from checkpoint import write_atomically
from configs import ViTConfig
from model import ViT

ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2"}
ONNX_LIMIT = 2_000_000_000  # bytes of a protobuf; of what is larger the weights are a file beside


def write_program(path: str | Path, tensors: dict[str, torch.Tensor], vit: ViTConfig,
                  fmt: str) -> str:
    """Writes ViT(vit) with these full weights as a program, and returns the Python code that runs
    it on `images`. Raises ValueError for another ending, for packages that are missing, and for a
    result more than 1e-4 from the model's; OSError if it cannot be written."""
    path = Path(path)
    if path.suffix != ENDINGS[fmt]:
        raise ValueError(f"{path} must end in {ENDINGS[fmt]} for --format {fmt}")
    if fmt == "onnx":
        try:
            import onnxruntime
            import onnxscript  # noqa: F401 (the exporter's)
        except ImportError as e:
            raise ValueError("--format onnx needs `pip install onnx onnxscript onnxruntime` "
                             f"({e})") from e
    model = ViT(vit, seed=None).eval()
    model.load_state_dict(tensors, strict=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    batch = {"images": {0: torch.export.Dim("batch")}}
    images = torch.randn(3, vit.num_channels, *vit.image_hw)  # 3: no size is taken for a constant
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about their own insides
        program = torch.export.export(model, (images[:2],), dynamic_shapes=batch)
        if fmt == "onnx":
            _write_onnx(program, path)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            logits = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        else:
            write_atomically(path, lambda file: torch.export.save(program, file))
            logits = torch.export.load(path).module()(images)
        difference = (logits - model(images)).abs().max().item()
    if not difference <= 1e-4:
        raise ValueError(f"{path} computes other logits than the model, by {difference:.1e}")
    if fmt == "onnx":
        return (f"import onnxruntime\nsession = onnxruntime.InferenceSession({str(path)!r})\n"
                "logits = session.run(None, {'images': images})[0]")
    return f"import torch\nlogits = torch.export.load({str(path)!r}).module()(images)"


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    result = torch.onnx.export(program, dynamo=True, input_names=["images"],
                               output_names=["logits"], verbose=False)
    if sum(x.nbytes for x in program.state_dict.values()) > ONNX_LIMIT:
        result.save(path, external_data=True)  # two files, whose names belong together
    else:
        write_atomically(path, lambda file: result.save(file.name, external_data=False))
