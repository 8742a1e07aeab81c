"""How much FFD's triplet loss does (section 4.3): its value, and its gradient.

python -m experiments.ffd "stage 1"=runs/stage1 "stage 2"=runs/synthetic

It is measured on triplets of the training split, in training mode, in float32. `acts_below` derives
when the loss can act. `train.py --epochs 0` makes the checkpoint of an untrained model.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import evaluate
import options
import runtime
import train
from losses import triplet_soft_margin
from model import MultiModalModel
from runtime import UserError

TRIPLETS = 104  # to measure on

COLUMNS = {  # of the table: name in the file -> heading, format
    "width": ("width", "d"),
    "fusion_norm": ("&#124;F&#124;²", ".1f"),
    "data_norm": ("&#124;D&#124;²", ".1f"),
    "cosine": ("cos(F, D)", ".2f"),
    "same": ("cos(F, F')", ".2f"),
    "least_same": ("smallest cos(F, F')", ".2f"),
    "squared_acts": ("acts below, squared", ".2f"),
    "plain_acts": ("acts below, plain", ".2f"),
    "squared": ("loss, squared", ".1e"),
    "plain": ("loss, plain", ".1e"),
    "squared_gradient": ("gradient, squared", ".1e"),
    "plain_gradient": ("gradient, plain", ".1e"),
}
CAPTION = """\
F and F' are the fusion tokens of an anchor and its positive, D is the data token of its negative;
norms and cosines are means over the triplets. The loss exceeds 0.001 only where cos(F, F') is below
"acts below" (below -1: never). "gradient" is the norm of the triplet loss's gradient on fusion
token and encoders, divided by that of the cross-entropy's. "squared" and "plain" are the distances
in Eq. (8); a model whose name has "plain" was trained with plain ones."""


def acts_below(f: float, g: float, c: float, least: float = 1e-3, *, squared: bool) -> float:
    """The cosine of two fusion tokens of one identity below which the loss exceeds `least`.

    f and g are the squared norms of fusion and data tokens, c is their cosine, whatever the
    identities. Then d(F, D)^2 = f + g - 2 c sqrt(f g) and d(F, F')^2 = 2 f (1 - cos), and
    log(1 + exp(x)) exceeds `least` where x > log(exp(least) - 1). A result below -1 means never.
    """
    margin = math.log(math.expm1(least))
    other = f + g - 2 * c * (f * g) ** 0.5
    same = other + margin if squared else max(0.0, other**0.5 + margin) ** 2
    return 1 - same / (2 * f)


def measure(model: MultiModalModel, images: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
    """A row of the table, of a batch of triplets; labels (B,) of the anchors.

    Eq. (10) weighs triplet loss and cross-entropy by 0.5 each, so their gradients compare as here.
    """
    model.train()
    model.freeze_backbone(True)  # its gradient would take most of the time
    torch.manual_seed(0)
    embeddings = model(images)
    anchor, positive, _ = embeddings.fusion.chunk(3)
    negative = embeddings.data.chunk(3)[2]
    same = F.cosine_similarity(anchor, positive)
    row = {
        "width": model.width,
        "fusion_norm": anchor.square().sum(-1).mean().item(),
        "data_norm": negative.square().sum(-1).mean().item(),
        "cosine": F.cosine_similarity(anchor, negative).mean().item(),
        "same": same.mean().item(),
        "least_same": same.min().item(),
    }
    geometry = (row["fusion_norm"], row["data_norm"], row["cosine"])
    cross_entropy = F.cross_entropy(model.classify(anchor), labels)
    parts = [model.fusion_token, *model.encoders.parameters()]
    whole_norm = gradient_norm(cross_entropy, parts)
    for name in ("squared", "plain"):
        loss = triplet_soft_margin(anchor, positive, negative, squared=name == "squared")
        row[f"{name}_acts"] = acts_below(*geometry, squared=name == "squared")
        row[name] = loss.item()
        row[f"{name}_gradient"] = gradient_norm(loss, parts) / whole_norm
    return row


def gradient_norm(loss: Tensor, parameters: list[Tensor]) -> float:
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.nn.utils.get_total_norm([g for g in gradients if g is not None]).item()


def of_checkpoint(path: str, args: argparse.Namespace) -> dict[str, float]:
    """`measure` on triplets of a run's training split."""
    device = runtime.start(args.device)
    model, checkpoint = evaluate.load_model(path)
    if model.config.fusion != "graft":
        fusion = model.config.fusion
        raise UserError(f"{path}: trained with --fusion {fusion}; expected --fusion graft")
    settings = options.from_checkpoint(checkpoint["settings"])
    settings.data_root = args.data_root or settings.data_root
    split = train.load_splits(settings)[0].train  # without what --val-ids held out
    pids = split.pids.unique()
    if pids.tolist() != checkpoint.get("pids"):
        raise UserError(f"{settings.data_root}: not the identities that {path} was trained on")
    triplets = data.make_triplets(split.pids.numpy(), 1, runtime.numpy_rng(0))[:TRIPLETS]
    indices = triplets.T.ravel().tolist()  # anchors, then positives, then negatives
    (images,) = data.read_batches(split, [indices], 0, device)
    images = data.Normalise(checkpoint["mean"], checkpoint["std"], device)(images)
    labels = torch.searchsorted(pids, split.pids[indices[: len(triplets)]])
    return measure(model.to(device), images, labels.to(device))


def table(results: dict[str, dict]) -> str:
    lines = [["", *(heading for heading, _ in COLUMNS.values())]]
    for label, row in results.items():
        lines.append([label, *(format(row[name], spec) for name, (_, spec) in COLUMNS.items())])
    return f"{CAPTION}\n\n{runtime.markdown(lines)}"


@runtime.program
def main() -> None:
    parser = runtime.Parser(__doc__, prog="python -m experiments.ffd")
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="LABEL=CKPT", help="runs of --fusion graft")
    add("--data-root", metavar="DIR", help="folder of the data set (default: as in training)")
    add("--json", type=Path, metavar="FILE", help="add the rows to those in FILE, and print all")
    runtime.add_device_options(parser, precision=None)
    args = parser.parse_args()
    runtime.check_output(args.json, "--json")
    results = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for text in args.checkpoints:
        label, _, path = text.rpartition("=")
        results[label or path] = of_checkpoint(path, args)
    if not results:
        raise UserError("no checkpoint: expected LABEL=CKPT, or --json FILE of an earlier call")
    print(table(results))
    if args.json:
        runtime.write_json(args.json, results)


if __name__ == "__main__":
    main()
