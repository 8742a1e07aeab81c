"""Export a checkpoint to one ONNX file, which needs neither this code nor torch.

python -m extras.export runs/synthetic --out model.onnx

Inputs, one a modality, by its name: uint8 RGB images (B, 3, H, W). Output: `embedding` (B, D),
float32, L2-normalised, what evaluate.py ranks. B is free; the normalisation is in the graph. The
file's metadata say the rest: modalities (in the model's order), image_size, model (sha256 of the
checkpoint).
"""

import argparse
import importlib
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import evaluate
import runtime
from runtime import UserError

TOLERANCE = 1e-3  # between onnxruntime and PyTorch, of a normalised embedding's numbers
HALF_TOLERANCE = 1e-3  # of 1 - cosine: half precision has 3 digits, so single numbers say little
BATCH_SIZES = (1, 5)  # that are compared; the graph is traced with another one


class Exported(nn.Module):
    """Images as they are read -> embeddings, by an Embedder; positional, as ONNX has its inputs."""

    def __init__(self, embedder: evaluate.Embedder, modalities: tuple[str, ...]):
        super().__init__()
        self.model, self.embedder = embedder.model, embedder
        self.modalities, self.dtype = modalities, torch.float32

    def half(self) -> "Exported":
        """Half precision, but for the images' range and for what comes after the encoders."""
        self.dtype = torch.float16
        super().half()
        self.model.bottleneck.float()
        return self

    def forward(self, *images: Tensor) -> Tensor:
        images = self.embedder.normalise(dict(zip(self.modalities, images, strict=True)))
        return self.embedder.features_of({name: x.to(self.dtype) for name, x in images.items()})


def random_images(exported: Exported, batch_size: int) -> list[Tensor]:
    """uint8 images of each modality.

    Noise of any brightness and tint: plain noise looks so much alike to a model (cosine 0.98) that
    a graph which mixes up samples or modalities could pass the check.
    """
    generator = torch.Generator().manual_seed(batch_size)
    shape = (len(exported.modalities), batch_size, 3, *exported.model.config.image_size)
    light = torch.rand(*shape[:3], 1, 1, generator=generator)
    return list((256 * light * torch.rand(shape, generator=generator)).to(torch.uint8))


@torch.no_grad()
def to_onnx(exported: Exported, metadata: dict[str, str]) -> bytes:
    """The ONNX file's content. Raises UserError where torch cannot export the model."""
    images = tuple(random_images(exported, 3))
    batch = torch.export.Dim("batch", min=1)
    sizes = (tuple({0: batch} for _ in images),)
    logging.disable(logging.ERROR)  # torch's own, at length, of what is one line below
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Strict: without it len(x) makes the batch a constant
            program = torch.export.export(exported, images, dynamic_shapes=sizes, strict=True)
            names = {"input_names": exported.modalities, "output_names": ["embedding"]}
            onnx = torch.onnx.export(program, dynamo=True, verbose=False, **names)
        onnx.model.metadata_props.update(metadata)
        return onnx.model_proto.SerializeToString()
    except Exception as error:  # the errors of torch's exporter have no common type
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"torch {torch.__version__} cannot export this model: {reason}") from None


def run_onnx(content: bytes, inputs: dict[str, np.ndarray]) -> Tensor:
    """The embeddings that onnxruntime computes on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["embedding"], inputs)[0])


def check(content: bytes, exported: Exported, expected: list[Tensor]) -> None:
    """Raise UserError where onnxruntime's embeddings of random images are not as `expected`."""
    half = exported.dtype == torch.float16
    name, limit = ("1 - cosine", HALF_TOLERANCE) if half else ("difference", TOLERANCE)
    for batch_size, right in zip(BATCH_SIZES, expected, strict=True):
        images = zip(exported.modalities, random_images(exported, batch_size), strict=True)
        found = run_onnx(content, {modality: image.numpy() for modality, image in images})
        cosine = (found.double() * right.double()).sum(1)
        largest = (1 - cosine if half else (found - right).abs()).max().item()
        print(f"batch of {batch_size}: largest {name} to PyTorch in fp32 {largest:.1e}")
        if not largest <= limit:  # NaN, too
            raise UserError(
                f"onnxruntime's embeddings differ from PyTorch's: {name} {largest:.1e}, at most"
                f" {limit:.0e} is allowed; nothing is written"
            )


def need_packages() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(f"export needs {name}: pip install {name}") from None


def parse() -> argparse.Namespace:
    parser = runtime.Parser(__doc__, prog="python -m extras.export")
    add = parser.add_argument
    text = "written by train.py or prune.py: a file, or a run's folder for its last.pt"
    add("checkpoint", metavar="CKPT", help=text)
    text = "file to write, beside which nothing else is needed"
    add("--out", type=Path, default=Path("model.onnx"), metavar="FILE", help=text)
    text = "e.g. rgb,tir: the inputs of the file (default: all that were trained)"
    add("--modalities", type=runtime.names, metavar="NAMES", help=text)
    text = "fusion tokens (paper), what leaves the BNNeck, or data tokens (default: as in training)"
    add("--features", choices=evaluate.FEATURES, help=text)
    text = "weights and arithmetic in half precision: half the file"
    add("--fp16", action="store_true", help=text)
    return parser.parse_args()


@runtime.program
def main() -> None:
    args = parse()
    runtime.check_output(args.out, "--out", (".onnx",))
    need_packages()
    options = {"precision": "fp32", "workers": 0, "features": args.features}
    embedder = evaluate.load_embedder(args.checkpoint, "cpu", **options)
    config = embedder.model.requires_grad_(False).config
    modalities = runtime.in_order(
        args.modalities or config.modalities, config.modalities, "the model"
    )
    exported = Exported(embedder, modalities)
    with torch.no_grad():
        expected = [exported(*random_images(exported, size)) for size in BATCH_SIZES]
    metadata = {
        "modalities": ",".join(modalities),
        "image_size": "x".join(map(str, config.image_size)),
        "model": runtime.fingerprint(args.checkpoint),
    }
    print("exporting, which takes a minute for a ViT-B")
    content = to_onnx(exported.half() if args.fp16 else exported, metadata)
    check(content, exported, expected)
    runtime.write_atomically(args.out, lambda temporary: temporary.write_bytes(content))
    print(f"{args.out}: {len(content) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
