"""Export a checkpoint to one ONNX file, which needs neither this code nor torch.

python -m extras.export runs/synthetic --out model.onnx

The file has one input per modality, with the modality's name: uint8 RGB images (B, 3, H, W), for
any B. Its output `embedding` (B, D), float32, is what evaluate.py ranks by; the graph normalises
the images itself. The file's metadata are `modalities` (in the model's order), `image_size`,
`views` (with --recipe plus: how many weights of sensors an embedding ends in; else 0) and `model`
(the sha256 of the checkpoint).
"""

import argparse
import importlib.util
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import evaluate
import runtime
from runtime import UserError

TOLERANCE = 1e-3  # between onnxruntime and PyTorch, of the numbers of an embedding
BATCH_SIZES = (1, 5)  # that are compared; the graph is traced with another one


class Exported(nn.Module):
    """An Embedder from uint8 images to embeddings; positional, as ONNX has its inputs."""

    def __init__(self, embedder: evaluate.Embedder, modalities: tuple[str, ...]):
        super().__init__()
        self.model, self.embedder = embedder.model, embedder
        self.modalities = modalities

    def forward(self, *images: Tensor) -> Tensor:
        images = dict(zip(self.modalities, images, strict=True))
        return self.embedder.features_of(self.embedder.normalise(images))


def random_images(exported: Exported, batch_size: int) -> list[Tensor]:
    """uint8 images of each modality.

    Noise of random brightness and tint: plain noise looks so much alike to a model (cosine 0.98)
    that a graph which mixes up samples or modalities could pass the check.
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
    logging.disable(logging.ERROR)  # torch logs at length what is one line below
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            print("1 of 3: tracing the model", flush=True)
            # Strict: without it len(x) makes the batch a constant
            program = torch.export.export(exported, images, dynamic_shapes=sizes, strict=True)
            print("2 of 3: writing the graph, which takes a minute for a ViT-B", flush=True)
            names = {"input_names": exported.modalities, "output_names": ["embedding"]}
            onnx = torch.onnx.export(program, dynamo=True, verbose=False, **names)
        onnx.model.metadata_props.update(metadata)
        return onnx.model_proto.SerializeToString()
    except Exception as error:  # the errors of torch's exporter have no common type
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"torch {torch.__version__} cannot export this model: {reason}") from None


@torch.no_grad()
def check(content: bytes, exported: Exported) -> None:
    """Raise UserError unless onnxruntime, on the CPU, gives PyTorch's embeddings."""
    import onnxruntime

    print("3 of 3: comparing onnxruntime's embeddings of random images with PyTorch's", flush=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    for batch_size in BATCH_SIZES:
        images = random_images(exported, batch_size)
        arrays = dict(zip(exported.modalities, (image.numpy() for image in images), strict=True))
        embedding = torch.from_numpy(session.run(["embedding"], arrays)[0])
        largest = (embedding - exported(*images)).abs().max().item()
        print(f"batch of {batch_size}: largest difference {largest:.1e}")
        if not largest <= TOLERANCE:  # NaN, too
            raise UserError(
                f"onnxruntime's embeddings differ from PyTorch's by up to {largest:.1e}; expected"
                f" at most {TOLERANCE:.0e}; no file is written"
            )


def parse() -> argparse.Namespace:
    parser = runtime.Parser(__doc__, prog="python -m extras.export")
    add = parser.add_argument
    text = "a checkpoint of train.py or prune.py, or a run's folder"
    add("checkpoint", metavar="CKPT", help=text)
    add("--out", type=Path, default=Path("model.onnx"), metavar="FILE", help="file to write")
    text = "inputs of the file, e.g. rgb,tir (default: all that were trained)"
    add("--modalities", action=runtime.Names, help=text)
    text = "fusion tokens (paper), BNNeck's output, or data tokens (default: as in training)"
    add("--features", choices=evaluate.FEATURES, help=text)
    return parser.parse_args()


@runtime.program
def main() -> None:
    args = parse()
    runtime.check_output(args.out, "--out", (".onnx",))
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"export needs {name}: pip install {name}")
    options = {"precision": "fp32", "workers": 0, "features": args.features}
    embedder = evaluate.load_embedder(args.checkpoint, "cpu", **options)
    config = embedder.model.requires_grad_(False).config
    chosen = args.modalities or config.modalities
    exported = Exported(embedder, runtime.in_order(chosen, config.modalities, "the model"))
    metadata = {
        "modalities": ",".join(exported.modalities),
        "image_size": "x".join(map(str, config.image_size)),
        "views": str(len(getattr(embedder.model, "views", ()))),
        "model": runtime.fingerprint(args.checkpoint),
    }
    content = to_onnx(exported, metadata)
    check(content, exported)
    runtime.write_atomically(args.out, lambda temporary: temporary.write_bytes(content))
    print(f"{args.out}: {len(content) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
