"""Prune a trained model's backbone in rounds, finetuning after each (section 5.4), and say what size and speed cost.

python prune.py runs/synthetic/last.pt --keep 0.69 0.62 0.5 0.34           the fractions of Table 3
python prune.py runs/rgbnt100/last.pt --params 76M 70M 60M 46M --half      non-zero parameters of the whole model
python prune.py runs/synthetic/last.pt --keep 0.5 --structured             whole heads and MLP channels: a smaller dense model

Each target goes on from the one before. OUT/TARGET.pt, e.g. OUT/46M.pt, are checkpoints like any other: evaluate.py reads
them, prune.py goes on from them. OUT/results.json holds the table; OUT/last.pt what --resume needs.
"""

import argparse
import re
import time
from argparse import Namespace
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import evaluate
import runtime
import train
from extras import pictures
from model import MultiModalModel, build_model
from runtime import UserError

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")  # of each block
# What --resume must not change
PLAN = ("params", "keep", "structured", "rounds", "finetune_epochs", "epoch_steps", "lr", "seed")
CHANNELS = 16  # MLP channels go by so many: what matrix products like


# --- what can be pruned: the weights of the backbone's attention and MLPs (section 5.4)


def layers(model: MultiModalModel) -> dict[str, nn.Linear]:
    """The layers to prune, by name."""
    parts = tuple(f".{layer}" for layer in LAYERS)
    return {name: layer for name, layer in model.named_modules() if name.endswith(parts) and "backbone" in name.split(".")[0]}


def prunable(model: MultiModalModel) -> int:
    """How many weights could be pruned before any was."""
    return 12 * model.config.dim**2 * model.config.depth * len(model.backbones)


def kept(model: MultiModalModel) -> int:
    """How many of them are left."""
    return sum(int(layer.weight.count_nonzero()) for layer in layers(model).values())


def sparsity(model: MultiModalModel) -> dict[str, float]:
    """The share of each prunable weight that is zero or gone; query, key and value are row blocks of one matrix."""
    shares = {}
    for name, layer in layers(model).items():
        parts = zip("qkv", layer.weight.chunk(3), strict=True) if name.endswith("qkv") else [("", layer.weight)]
        for part, weight in parts:
            size = model.config.dim**2 * (4 if "mlp" in name else 1)
            shares[name.removesuffix("qkv") + part] = 1 - int(weight.count_nonzero()) / size
    return shares


# --- pruning


def mask(model: MultiModalModel, keep: int) -> None:
    """Mask the smallest weights of all layers together, so that `keep` are left. What is zero already goes first.

    A masked weight is the product of a parameter and a mask of zeros and ones, made anew before each forward pass: neither
    gradient, momentum nor weight decay can bring it back.
    """
    weights = [(layer, "weight") for layer in layers(model).values()]
    amount = sum(layer.weight.numel() for layer, _ in weights) - keep
    prune.global_unstructured(weights, prune.L1Unstructured, amount=amount)


def make_permanent(model: MultiModalModel) -> None:
    """Turn masked weights into plain ones, with zeros."""
    for layer in layers(model).values():
        prune.remove(layer, "weight")


@torch.no_grad()
def shrink(model: MultiModalModel, keep: int) -> MultiModalModel:
    """A dense model with some `keep` of the prunable weights: the strongest heads and MLP channels by their weights' L2 norm.

    Heads and channels shrink alike. Each block keeps one head and CHANNELS channels at least. Raises UserError for a model
    with several backbones.
    """
    if len(model.backbones) != 1:
        raise UserError(f"--structured: the model has {len(model.backbones)} backbones; expected one, shared")
    config, state = model.config, model.state_dict()
    D, d = config.dim, config.dim // config.heads  # width of the model, of a head
    squares = [[block.get_submodule(layer).weight.square() for layer in LAYERS] for block in model.backbone.blocks]
    heads = [qkv.view(3, -1, d * D).sum((0, 2)) + proj.view(D, -1, d).sum((0, 2)) for qkv, proj, _, _ in squares]
    channels = [fc1.sum(1) + fc2.sum(0) for _, _, fc1, fc2 in squares]
    heads = strongest(heads, round(keep / prunable(model) * config.heads * config.depth))
    channels = strongest(channels, (keep - 4 * d * D * sum(map(len, heads))) // (2 * D), CHANNELS)
    smaller = build_model(replace(config, blocks=tuple((len(h), len(c)) for h, c in zip(heads, channels, strict=True))))
    for i, (head, channel) in enumerate(zip(heads, channels, strict=True)):
        attn, mlp = f"backbone.blocks.{i}.attn.", f"backbone.blocks.{i}.mlp."
        state[attn + "qkv.weight"] = state[attn + "qkv.weight"].view(3, -1, d, D)[:, head].reshape(-1, D)
        state[attn + "qkv.bias"] = state[attn + "qkv.bias"].view(3, -1, d)[:, head].flatten()
        state[attn + "proj.weight"] = state[attn + "proj.weight"].view(D, -1, d)[:, head].flatten(1)
        state[mlp + "fc1.weight"] = state[mlp + "fc1.weight"][channel]
        state[mlp + "fc1.bias"] = state[mlp + "fc1.bias"][channel]
        state[mlp + "fc2.weight"] = state[mlp + "fc2.weight"][:, channel]
    smaller.load_state_dict(state)
    return smaller.to(model.fusion_token.device)


def strongest(norms: list[Tensor], count: int, multiple: int = 1) -> list[Tensor]:
    """Of all blocks' groups with these norms, the indices of the `count` largest in each block, in order.

    Each block keeps a multiple of `multiple`, the nearest, and at least that.
    """
    threshold = torch.cat(norms).sort(descending=True).values[max(0, min(count, sum(map(len, norms))) - 1)]
    chosen = []
    for norm in norms:
        n = max(1, round(int((norm >= threshold).sum()) / multiple)) * multiple
        chosen.append(norm.topk(min(n, len(norm))).indices.sort().values)
    return chosen


# --- rounds


def speed(model: MultiModalModel, device: torch.device, precision: str, repeats: int = 3) -> float:
    """Samples a second that the model embeds, all modalities, images at hand: the median of `repeats` batches."""
    config, seconds = model.config, []
    images = torch.rand(evaluate.BATCH_SIZE, 3, *config.image_size, device=device)
    model.eval()
    for _ in range(repeats + 1):
        began = time.perf_counter()
        with torch.no_grad(), runtime.autocast(device, precision):
            float(model(dict.fromkeys(config.modalities, images)).fusion.sum())  # waits for the device
        seconds.append(time.perf_counter() - began)
    return len(images) / median(seconds[1:])


def write(path: Path, model: MultiModalModel, about: dict, half: bool = False) -> None:
    """Write a checkpoint with packed weights: 4 bytes (`half`: 2) a non-zero parameter, and a bit a prunable one."""
    state = {name: weight.cpu() for name, weight in model.state_dict().items()}
    if half:
        state = {name: weight.half() if weight.is_floating_point() else weight for name, weight in state.items()}
    state |= {f"{name}.weight": runtime.pack(state[f"{name}.weight"]) for name in layers(model)}
    if runtime.rank() == 0:
        runtime.save_checkpoint(path, {**about, "model": state})


def rounds(keeps: list[float], start: float, number: int) -> list[float]:
    """The fractions that are left after each round: `number` equal factors to each of the targets."""
    steps = []
    for before, target in pairwise([start, *keeps]):
        steps += [before * (target / before) ** (i / number) for i in range(1, number + 1)]
    return steps


def finetune(run: train.Run, number: int, stage: train.Stage, keep: int, structured: bool) -> None:
    """One round: prune so that `keep` weights are left, and train on."""
    if structured:
        run.model = shrink(run.model, keep)
    else:
        mask(run.model, keep)
    if stage.epochs:
        train.train_stage(run, number, stage, train.Progress())
    if not structured:
        make_permanent(run.model)


def add_row(run: train.Run, label: str, half: bool, progress: dict) -> None:
    """Write OUT/LABEL.pt, and what the model in it is worth to the table."""
    file, args = run.args.out / f"{label}.pt", run.args
    write(file, run.model, run.about(), half)
    with runtime.rank0_first():
        model = evaluate.load_model(file)[0].to(run.device)
    splits = run.dataset.query, run.dataset.gallery, run.dataset.mean, run.dataset.std
    metrics = evaluate.evaluate(model, *splits, run.device, args.precision, args.workers)
    row = {
        "label": label,
        "params": model.num_parameters(nonzero=True),
        "kept": kept(model) / prunable(model),
        "bytes": file.stat().st_size,
        **{name: metrics[name] for name in ("mAP", "R1", "R5", "R10")},
        "samples_per_second": round(speed(model, run.device, args.precision), 1),
    }
    runtime.print0(f"{label}: {row['params'] / 1e6:.2f} M parameters, {evaluate.summary(metrics)}")
    progress["rows"].append({**row, "sparsity": sparsity(model)})
    if runtime.rank() == 0:
        runtime.write_json(args.out / "results.json", progress)


# --- command line


def _fractions(args: Namespace, model: MultiModalModel) -> dict[str, float]:
    """The targets as typed -> fractions of the prunable weights, largest first. Raises UserError for what cannot be."""
    config, total, left, params = model.config, prunable(model), kept(model), model.num_parameters(nonzero=True)
    rest = params - left  # what is never pruned
    least = config.depth * config.dim * (4 * config.dim // config.heads + 2 * CHANNELS) if args.structured else 0
    option, texts = ("--params", args.params) if args.params else ("--keep", args.keep)
    fractions = {}
    for text in texts:
        number = _number(text, option)
        fraction = fractions[text] = (number - rest) / total if args.params else number
        if not least / total < fraction < left / total:
            low, high = (f"{(n + rest) / 1e6:.2f}M" if args.params else f"{n / total:.3g}" for n in (least, left))
            raise UserError(
                f"{option} {text}: expected more than {low}, which stays in any case, and less than the model's {high}"
            )
    return dict(sorted(fractions.items(), key=lambda item: -item[1]))


def _number(text: str, option: str) -> float:
    """0.5, 76M, 700k, ..."""
    match = re.fullmatch(r"(\d*\.?\d+)([kM]?)", text)
    if not match:
        raise UserError(f"{option} {text}: expected a number, e.g. {'76M' if option == '--params' else '0.5'}")
    return float(match[1]) * {"": 1, "k": 1e3, "M": 1e6}[match[2]]


def _parse() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CKPT", help="written by train.py or prune.py, e.g. runs/synthetic/last.pt")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--params", nargs="+", metavar="N", help="non-zero parameters of the whole model, e.g. 76M 60M")
    target.add_argument("--keep", nargs="+", metavar="F", help="fractions of the backbone's attention and MLP weights to keep")
    parser.add_argument("--structured", action="store_true", help="remove whole heads and MLP channels: a smaller dense model")
    parser.add_argument("--half", action="store_true", help="store the targets' weights in 2 bytes each")
    parser.add_argument("--rounds", type=int, default=3, help="prunings and finetunings to each target (default: %(default)s)")
    parser.add_argument("--finetune-epochs", type=int, default=1, help="after each round (default: %(default)s)")
    parser.add_argument("--epoch-steps", type=int, default=0, help="end an epoch early (default: all triplets)")
    parser.add_argument("--lr", type=float, help="default: that of training's stage 2, whose other settings are kept, too")
    parser.add_argument("--data-root", help="the data set's folder or its parent (default: as in training)")
    parser.add_argument("--out", type=Path, help="default: pruned, or structured, beside CKPT")
    parser.add_argument("--resume", action="store_true", help="go on after the last round that OUT holds")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw mAP over parameters, as Fig. 1 does (matplotlib)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), help="default: as in training")
    parser.add_argument("--batch-size", type=int, help="triplets a rank (default: as in training)")
    parser.add_argument("--workers", type=int, help="reading processes a rank (default: as in training)")
    args = parser.parse_args()
    args.out = args.out or Path(args.checkpoint).parent / ("structured" if args.structured else "pruned")
    for name, low in {"rounds": 1, "finetune_epochs": 0, "epoch_steps": 0}.items():
        if getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {low}")
    return args


def tables(rows: list[dict]) -> str:
    """In Markdown: what each target is worth, and how many percent of each layer's weights are zero or gone."""
    lines = [["", "non-zero parameters", "kept", "file", "mAP %", "R1 %", "R5 %", "R10 %", "samples/s"]]
    for row in rows:
        sizes = [f"{row['params'] / 1e6:.2f} M", f"{row['kept']:.3f}", f"{row['bytes'] / 1e6:.2f} MB"]
        figures = [f"{100 * row[name]:.1f}" for name in ("mAP", "R1", "R5", "R10")]
        lines.append([row["label"], *sizes, *figures, f"{row['samples_per_second']:.0f}"])
    layers = [["gone in %", *(row["label"] for row in rows)]]
    for name in rows[0]["sparsity"]:
        layers.append([name, *(f"{100 * row['sparsity'][name]:.1f}" for row in rows)])
    return "\n\n".join(
        "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rest]) for head, *rest in (lines, layers)
    )


@runtime.program
def main() -> None:
    args = _parse()
    if args.chart:
        pictures.need_matplotlib()
    last = train.refuse_occupied(args)
    device = runtime.start(args.device)
    model, checkpoint = evaluate.load_model(last if last.exists() else args.checkpoint)
    if last.exists() and "pruning" not in checkpoint:
        raise UserError(f"{last}: was not written by prune.py; choose another --out")
    if "pids" not in checkpoint or "stages" not in checkpoint["settings"]:
        raise UserError(f"{args.checkpoint}: lacks what training needs; expected a checkpoint written by train.py or prune.py")
    plan = {name: getattr(args, name) for name in PLAN}
    progress = checkpoint["pruning"] if last.exists() else {"plan": plan, "rounds": 0, "rows": []}
    if changed := [name for name in plan if progress["plan"][name] != plan[name]]:
        raise UserError(f"{args.out}: was begun with {changed[0]} {progress['plan'][changed[0]]}, not {plan[changed[0]]}")
    if not last.exists():
        progress |= {"targets": _fractions(args, model), "start": kept(model) / prunable(model)}
    own = {"seed": args.seed, "out": args.out, "device": args.device}
    settings = Namespace(**{**vars(train.parse([])), **checkpoint["settings"], **own})  # an older checkpoint may lack some
    settings.stages = tuple(train.Stage(**stage) for stage in settings.stages)
    for name in ("data_root", "precision", "workers", "batch_size"):
        if getattr(args, name) is not None:
            setattr(settings, name, getattr(args, name))
    runtime.print0("settings:", vars(args))
    dataset, validation = train.load_data(settings)
    if dataset.train.pids.unique().tolist() != checkpoint["pids"]:
        raise UserError(f"{settings.data_root}: its training identities are not those {args.checkpoint} was trained on")
    run = train.open_run(settings, device, dataset, validation, model)
    run.saves = False  # a round is saved when it is over
    stage = settings.stages[1]
    changes = {"epochs": args.finetune_epochs, "epoch_steps": args.epoch_steps, "lr": args.lr or stage.lr}
    stage = replace(stage, frozen=False, **changes)
    if not progress["rows"]:
        add_row(run, "start", args.half, progress)
    targets, number = progress["targets"], progress["rounds"]
    for keep in rounds([*targets.values()], progress["start"], args.rounds)[number:]:
        finetune(run, number + 3, stage, round(keep * prunable(run.model)), args.structured)  # after stages 1 and 2
        number += 1
        if number % args.rounds == 0:
            add_row(run, [*targets][number // args.rounds - 1], args.half, progress)
        write(last, run.model, {**run.about(), "pruning": {**progress, "rounds": number}})
    runtime.print0(tables(progress["rows"]))
    if args.chart and runtime.rank() == 0:
        pictures.size_chart({str(args.out): progress["rows"]}, args.chart)


if __name__ == "__main__":
    main()
