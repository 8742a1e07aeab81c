"""How much FFD's triplet term does (section 4.3): its value and gradient beside cross-entropy's.

python -m extras.ffd "stage 1"=runs/stage1/last.pt "stage 2"=runs/synthetic/last.pt
python -m extras.ffd --from results/ffd.json

Measured on triplets of the training split, in training mode, in float32. RESULTS.md derives when
the term can act. `--epochs 0 0` of train.py makes the checkpoint of an untrained model.
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
import runtime
import train
from losses import triplet_soft_margin
from model import Embeddings, MultiModalModel
from runtime import UserError, whole

COLUMNS = {  # of the table: name in the file -> heading, format
    "width": ("width", "d"),
    "fusion_norm": ("&#124;F&#124;²", ".1f"),
    "data_norm": ("&#124;D&#124;²", ".1f"),
    "cosine": ("cos(F, D)", ".2f"),
    "same": ("cos(F, F')", ".2f"),
    "least_same": ("least", ".2f"),
    "squared_acts": ("acts below, squared", ".2f"),
    "plain_acts": ("plain", ".2f"),
    "squared": ("term, squared", ".1e"),
    "plain": ("plain", ".1e"),
    "squared_gradient": ("its gradient, squared", ".1e"),
    "plain_gradient": ("plain", ".1e"),
}


def terms(embeddings: Embeddings) -> dict[str, Tensor]:
    """FFD's term, Eq. (8), by squared and by plain distances; of anchors, positives, negatives."""
    anchor, positive, _ = embeddings.fusion.chunk(3)
    negative = embeddings.data.chunk(3)[2]
    return {
        name: triplet_soft_margin(anchor, positive, negative, squared=name == "squared")
        for name in ("squared", "plain")
    }


def geometry(embeddings: Embeddings) -> dict[str, float]:
    """Means over triplets of what decides whether the term can act; see `acts_below`."""
    anchor, positive, _ = embeddings.fusion.chunk(3)
    negative = embeddings.data.chunk(3)[2]
    same = F.cosine_similarity(anchor, positive)
    means = {
        "fusion_norm": anchor.square().sum(-1),
        "data_norm": negative.square().sum(-1),
        "cosine": F.cosine_similarity(anchor, negative),
        "same": same,
    }
    found = {name: value.mean().item() for name, value in means.items()}
    norms = (found["fusion_norm"], found["data_norm"], found["cosine"])
    acts = {f"{n}_acts": acts_below(*norms, squared=n == "squared") for n in ("squared", "plain")}
    return {**found, "least_same": same.min().item(), **acts}


def acts_below(f: float, g: float, c: float, least: float = 1e-3, *, squared: bool) -> float:
    """The cosine of two fusion tokens of one identity below which the term exceeds `least`.

    Given squared norms f of fusion and g of data tokens, and c, their cosine. From d(F, D)^2 =
    f + g - 2 c sqrt(f g), whatever the identities, d(F, F')^2 = 2 f (1 - cos), and log(1 + exp(x))
    > least where x > log(exp(least) - 1). Below -1: never.
    """
    margin = math.log(math.expm1(least))
    other = f + g - 2 * c * (f * g) ** 0.5
    same = other + margin if squared else max(0.0, other**0.5 + margin) ** 2
    return 1 - same / (2 * f)


def measure(model: MultiModalModel, images: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
    """Geometry, term and gradients of a batch of triplets; labels (B,) of the anchors.

    Gradients are norms over fusion token and encoders, as shares of cross-entropy's norm there;
    Eq. (10) weights both by 0.5.
    """
    model.train()
    model.freeze_backbone(True)  # it has no part in the question, and would take most of the time
    torch.manual_seed(0)
    embeddings = model(images)
    logits = model.classify(embeddings.fusion[: len(labels)])
    losses = {**terms(embeddings), "cross_entropy": F.cross_entropy(logits, labels)}
    parts = [model.fusion_token, *model.encoders.parameters()]
    norms = {}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, parts, retain_graph=True, allow_unused=True)
        norms[name] = torch.nn.utils.get_total_norm([g for g in gradients if g is not None]).item()
    shares = {f"{n}_gradient": norms[n] / norms["cross_entropy"] for n in ("squared", "plain")}
    values = {name: loss.item() for name, loss in losses.items()}
    return {"width": model.width, **geometry(embeddings), **values, **shares}


def of_checkpoint(path: str, args: argparse.Namespace) -> dict[str, float]:
    """What a run's triplet term is worth on `--triplets` triplets of its training split."""
    device = runtime.start(args.device)
    embedder, checkpoint = evaluate.load_embedder(path, device)
    config = embedder.model.config
    if config.fusion != "graft":
        raise UserError(f"{path}: a model of --fusion {config.fusion}; expected one of graft")
    if "pids" not in checkpoint:
        raise UserError(f"{path}: does not say on what it was trained; expected one of train.py")
    # A checkpoint of an older version may lack some settings
    stored = {"dataset": "synthetic", **checkpoint["settings"]}
    settings = argparse.Namespace(
        **{**vars(train.parse(["--dataset", stored["dataset"]])), **stored}
    )
    if args.data_root:
        settings.data_root = args.data_root
    split = train.load_splits(settings)[0].train  # without what --val-ids held out
    if split.pids.unique().tolist() != checkpoint["pids"]:
        raise UserError(f"{settings.data_root}: not the identities that {path} was trained on")
    rows = data.make_triplets(split.pids.numpy(), 1, runtime.numpy_rng(0))[: args.triplets]
    indices = rows.T.ravel().tolist()  # anchors, then positives, then negatives
    (images,) = data.read_batches(split, [indices], 0, device)
    labels = torch.searchsorted(split.pids.unique(), split.pids[indices[: len(rows)]])
    return measure(embedder.model, embedder.normalise(images), labels.to(device))


def read(path: Path) -> dict[str, dict]:
    """What --json kept. Raises UserError for anything else."""
    try:
        results = json.loads(path.read_text())
        assert results and all(found.keys() >= COLUMNS.keys() for found in results.values())
    except (OSError, ValueError, AttributeError, AssertionError) as error:
        raise UserError(f"{path}: not what --json of extras.ffd keeps ({error!r})") from None
    return results


def table(results: dict[str, dict]) -> str:
    lines = [["", *(heading for heading, _ in COLUMNS.values())]]
    for label, values in results.items():
        cells = [format(values[name], spec) for name, (_, spec) in COLUMNS.items()]
        lines.append([label, *cells])
    return runtime.markdown(lines)


@runtime.program
def main() -> None:
    parser = runtime.Parser(__doc__, prog="python -m extras.ffd")
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="LABEL=CKPT", help="of train.py, --fusion graft")
    add("--triplets", type=whole(1), default=104, metavar="N")
    add("--data-root", metavar="DIR", help="(default: as in training)")
    add("--json", type=Path, metavar="FILE", help="keep the figures, beside what is there")
    add("--from", type=Path, metavar="FILE", dest="from_", help="print what --json kept")
    runtime.add_device_options(parser, precision=None)
    args = parser.parse_args()
    results = {}
    if args.from_:
        results |= read(args.from_)
    if args.json and args.json.exists():
        results |= read(args.json)
    for text in args.checkpoints:
        label, _, path = text.rpartition("=")
        results[label or path] = of_checkpoint(path, args)
    if not results:
        raise UserError("no checkpoint: expected LABEL=CKPT, or --from FILE of an earlier call")
    if args.json:
        runtime.write_json(args.json, results)
    print(table(results))


if __name__ == "__main__":
    main()
