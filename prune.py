"""Prune a trained model's backbone in rounds and finetune (section 5.4, Tables 3, 4, Fig. 1).

python prune.py runs/synthetic/last.pt --keep 0.69 0.62 0.5 0.34       Table 3's fractions
python prune.py runs/rgbnt100/last.pt --params 76M 70M 60M 46M --half  its parameters
python prune.py runs/synthetic/last.pt --keep 0.5 --structured         whole heads and MLP channels

Each target goes on from the one before. OUT/TARGET.pt, e.g. OUT/46M.pt, are checkpoints like any
other: evaluate.py reads them, prune.py goes on from them. OUT/results.json holds the table,
OUT/last.pt what --resume needs.
"""

import re
import time
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import evaluate
import runtime
import train
from model import MultiModalModel, build_model
from runtime import UserError, real, whole

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")  # of each block
CHANNELS = 16  # MLP channels go by so many: what matrix products like
# What --resume must not change
PLAN = (
    "params", "keep", "structured", "rounds", "finetune_epochs", "epoch_steps", "lr", "schedule",
    "seed",
)  # fmt: skip


# --- what can be pruned: the weights of the backbone's attention and MLPs (section 5.4)
#     Of a ResNet all convolutions, which are all its weights; ours


def layers(model: MultiModalModel) -> dict[str, nn.Module]:
    """The layers to prune, by name."""
    endings, is_resnet = tuple(f".{layer}" for layer in LAYERS), model.config.resnet > 0
    return {
        name: layer
        for name, layer in model.named_modules()
        if name.startswith("backbone.")
        and (isinstance(layer, nn.Conv2d) if is_resnet else name.endswith(endings))
    }


def prunable(model: MultiModalModel) -> int:
    """How many weights could be pruned before any was."""
    if model.config.resnet:
        return sum(layer.weight.numel() for layer in layers(model).values())
    return 12 * model.config.dim**2 * model.config.depth * len(model.backbones)


def kept(model: MultiModalModel) -> int:
    """How many of them are left."""
    return sum(int(layer.weight.count_nonzero()) for layer in layers(model).values())


def sparsity(model: MultiModalModel) -> dict[str, float]:
    """The share of each prunable weight that is zero or gone; qkv as its three row blocks."""
    shares = {}
    for name, layer in layers(model).items():
        size = model.config.dim**2 * (4 if "mlp" in name else 1)
        if model.config.resnet:
            size = layer.weight.numel()
        parts = {name: layer.weight}
        if name.endswith("qkv"):
            stem = name.removesuffix("qkv")
            q, k, v = layer.weight.chunk(3)
            parts = {f"{stem}q": q, f"{stem}k": k, f"{stem}v": v}
        for part, weight in parts.items():
            shares[part] = 1 - int(weight.count_nonzero()) / size
    return shares


# --- masks


def mask(model: MultiModalModel, keep: int) -> None:
    """Mask the smallest weights of all layers together, so that `keep` are left.

    What is zero already goes first. A masked weight is the product of a parameter and a mask, made
    anew before each forward pass: neither gradient, momentum nor weight decay can bring it back.
    """
    weights = [(layer, "weight") for layer in layers(model).values()]
    amount = sum(layer.weight.numel() for layer, _ in weights) - keep
    prune.global_unstructured(weights, prune.L1Unstructured, amount=amount)


def make_permanent(model: MultiModalModel) -> None:
    """Turn masked weights into plain ones, with zeros."""
    for layer in layers(model).values():
        prune.remove(layer, "weight")


# --- smaller dense models


@torch.no_grad()
def shrink(model: MultiModalModel, keep: int) -> MultiModalModel:
    """A dense model with some `keep` of the prunable weights: its strongest heads and MLP channels.

    Strength is the L2 norm of a group's weights; heads and channels shrink alike, and each block
    keeps one head and CHANNELS channels at least. Raises UserError for a model of several
    backbones, or of ResNets.
    """
    check_structured(model)
    config, state = model.config, model.state_dict()
    D, d = config.dim, config.dim // config.heads  # width of the model, of a head
    head_norms, channel_norms = [], []
    for block in model.backbone.blocks:
        qkv, proj, fc1, fc2 = (block.get_submodule(layer).weight.square() for layer in LAYERS)
        head_norms.append(qkv.view(3, -1, d * D).sum((0, 2)) + proj.view(D, -1, d).sum((0, 2)))
        channel_norms.append(fc1.sum(1) + fc2.sum(0))
    num_heads = round(keep / prunable(model) * config.heads * config.depth)
    heads = strongest(head_norms, num_heads)
    num_channels = (keep - 4 * d * D * sum(map(len, heads))) // (2 * D)
    channels = strongest(channel_norms, num_channels, CHANNELS)
    blocks = tuple((len(h), len(c)) for h, c in zip(heads, channels, strict=True))
    smaller = build_model(replace(config, blocks=blocks))
    for i, (head, channel) in enumerate(zip(heads, channels, strict=True)):
        attn, mlp = f"backbone.blocks.{i}.attn.", f"backbone.blocks.{i}.mlp."
        weight = state[attn + "qkv.weight"].view(3, -1, d, D)
        state[attn + "qkv.weight"] = weight[:, head].reshape(-1, D)
        state[attn + "qkv.bias"] = state[attn + "qkv.bias"].view(3, -1, d)[:, head].flatten()
        weight = state[attn + "proj.weight"].view(D, -1, d)
        state[attn + "proj.weight"] = weight[:, head].flatten(1)
        state[mlp + "fc1.weight"] = state[mlp + "fc1.weight"][channel]
        state[mlp + "fc1.bias"] = state[mlp + "fc1.bias"][channel]
        state[mlp + "fc2.weight"] = state[mlp + "fc2.weight"][:, channel]
    smaller.load_state_dict(state)
    return smaller.to(model.classifier.weight.device)


def check_structured(model: MultiModalModel) -> None:
    fusion, number = model.config.fusion, len(model.backbones)
    if model.config.resnet:
        raise UserError(
            f"--structured: removes heads and MLP channels of a ViT; --fusion {fusion} has ResNets:"
            " leave it out, for masks"
        )
    if number != 1:
        raise UserError(
            f"--structured: --fusion {fusion} has {number} backbones; expected one, shared"
        )


def strongest(norms: list[Tensor], count: int, multiple: int = 1) -> list[Tensor]:
    """Of all blocks' groups with these norms, the indices of the `count` largest in each block.

    Each block keeps a multiple of `multiple`, the nearest, and at least that.
    """
    ordered = torch.cat(norms).sort(descending=True).values
    threshold = ordered[max(0, min(count, len(ordered)) - 1)]
    indices = []
    for norm in norms:
        n = max(1, round(int((norm >= threshold).sum()) / multiple)) * multiple
        indices.append(norm.topk(min(n, len(norm))).indices.sort().values)
    return indices


# --- rounds


@dataclass
class Pruning:
    """What is to be done and what is done: `targets` are labels and fractions, largest first."""

    plan: dict
    targets: dict[str, float]
    start: float  # fraction that was left at first
    rounds: int = 0
    rows: list | None = None
    log_size: int = 0

    def fractions(self, number: int) -> list[float]:
        """What is left after each round: `number` equal factors to each of the targets."""
        steps = []
        for before, target in pairwise([self.start, *self.targets.values()]):
            steps += [before * (target / before) ** (i / number) for i in range(1, number + 1)]
        return steps


def finetune(run: train.Run, stage: train.Stage, keep: int, structured: bool) -> None:
    """One round: prune so that `keep` weights are left, train on. Centroids stay as they are."""
    if structured:
        run.embedder = replace(run.embedder, model=shrink(run.model, keep))
    else:
        mask(run.model, keep)
    run.progress = train.Progress(stage.number)
    if stage.epochs:
        train.train_stage(run, stage)
    if not structured:
        make_permanent(run.model)


def write(path: Path, model: MultiModalModel, description: dict, half: bool = False) -> None:
    """Write a checkpoint of packed weights: 4 bytes (`half`: 2) each, and a bit a prunable one."""
    state = {name: weight.cpu() for name, weight in model.state_dict().items()}
    if half:
        state = {name: w.half() if w.is_floating_point() else w for name, w in state.items()}
    for name in layers(model):
        state[f"{name}.weight"] = runtime.pack(state[f"{name}.weight"])
    if runtime.rank() == 0:
        runtime.save_checkpoint(path, {**description, "model": state})


def add_row(run: train.Run, label: str, half: bool, pruning: Pruning) -> None:
    """Write OUT/LABEL.pt, and what the model in it is worth to the table."""
    file = run.args.out / f"{label}.pt"
    with runtime.rank0_first():
        write(file, run.model, run.describe(), half)
    model, _ = evaluate.load_model(file)
    embedder = replace(run.embedder, model=model)
    ranking = evaluate.rank_splits(embedder, run.dataset.query, run.dataset.gallery)
    metrics = evaluate.figures(model, ranking)
    row = {
        "label": label,
        "params": model.num_parameters(nonzero=True),
        "kept": kept(model) / prunable(model),
        "bytes": file.stat().st_size,
        **{name: metrics[name] for name in ("mAP", "R1", "R5", "R10", "machine")},
        "samples_per_second": round(speed(embedder), 1),
        "sparsity": sparsity(model),
    }
    shown = evaluate.summary(metrics)
    runtime.print0(f"{label}: {row['params'] / 1e6:.2f} M parameters, {shown}")
    pruning.rows.append(row)
    if runtime.rank() == 0:
        runtime.write_json(run.args.out / "results.json", vars(pruning))


def speed(embedder: evaluate.Embedder, repeats: int = 3) -> float:
    """Samples a second that are embedded, all modalities, images at hand: median of `repeats`."""
    config, seconds = embedder.model.config, []
    images = torch.rand(evaluate.BATCH_SIZE, 3, *config.image_size, device=embedder.device)
    embedder.model.eval()
    for _ in range(repeats + 1):
        began = time.perf_counter()
        with torch.no_grad(), embedder.autocast():
            fusion = embedder.model(dict.fromkeys(config.modalities, images)).fusion
            float(fusion.sum())  # waits for the device
        seconds.append(time.perf_counter() - began)
    return len(images) / median(seconds[1:])


def tables(rows: list[dict]) -> str:
    """In Markdown: what each target is worth, and how much of each layer's weights is gone."""
    head = [
        "",
        "non-zero parameters",
        "kept",
        "file",
        "mAP %",
        "R1 %",
        "R5 %",
        "R10 %",
        "samples/s",
    ]
    lines = [head]
    for row in rows:
        sizes = [f"{row['params'] / 1e6:.2f} M", f"{row['kept']:.3f}"]
        sizes.append(f"{row['bytes'] / 1e6:.2f} MB")
        figures = [f"{100 * row[name]:.1f}" for name in ("mAP", "R1", "R5", "R10")]
        lines.append([row["label"], *sizes, *figures, f"{row['samples_per_second']:.0f}"])
    gone = [["gone in %", *(row["label"] for row in rows)]]
    for name in rows[0]["sparsity"]:
        gone.append([name, *(f"{100 * row['sparsity'][name]:.1f}" for row in rows)])
    return f"{runtime.markdown(lines)}\n\n{runtime.markdown(gone)}"


# --- command line


def read_targets(args: Namespace, model: MultiModalModel) -> dict[str, float]:
    """The targets as typed -> fractions of the prunable weights, largest first.

    Raises UserError for what cannot be.
    """
    config, total, left = model.config, prunable(model), kept(model)
    unprunable = model.num_parameters(nonzero=True) - left
    least = 0
    if args.structured:
        smallest_block = config.dim * (4 * config.dim // config.heads + 2 * CHANNELS)
        least = config.depth * smallest_block
    option, texts = ("--params", args.params) if args.params else ("--keep", args.keep)
    fractions = {}
    for text in texts:
        number = read_number(text, option)
        fraction = (number - unprunable) / total if args.params else number
        if not least / total < fraction < left / total:
            low, high = (
                f"{(n + unprunable) / 1e6:.2f}M" if args.params else f"{n / total:.3g}"
                for n in (least, left)
            )
            raise UserError(
                f"{option} {text}: expected more than {low}, which stays in any case, and less than"
                f" the model's {high}"
            )
        fractions[text] = fraction
    return dict(sorted(fractions.items(), key=lambda item: -item[1]))


def read_number(text: str, option: str) -> float:
    """0.5, 76M, 700k, ..."""
    match = re.fullmatch(r"(\d*\.?\d+)([kM]?)", text)
    if not match:
        example = "76M" if option == "--params" else "0.5"
        raise UserError(f"{option} {text}: expected a number, e.g. {example}")
    return float(match[1]) * {"": 1, "k": 1e3, "M": 1e6}[match[2]]


def parse(argv: list[str] | None = None) -> Namespace:
    parser = runtime.Parser(__doc__)
    text = "written by train.py or prune.py, e.g. runs/synthetic/last.pt"
    parser.add_argument("checkpoint", metavar="CKPT", help=text)
    target = parser.add_mutually_exclusive_group(required=True)
    text = "non-zero parameters of the whole model, e.g. 76M 60M"
    target.add_argument("--params", nargs="+", metavar="N", help=text)
    text = "fractions of the backbone's attention and MLP weights, or convolutions, to keep"
    target.add_argument("--keep", nargs="+", metavar="F", help=text)
    add = parser.add_argument
    text = "remove whole heads and MLP channels: a smaller dense model"
    add("--structured", action="store_true", help=text)
    add("--half", action="store_true", help="store the targets' weights in 2 bytes each")
    text = "prunings and finetunings to each target; the published code: up to 30 of 20%% each"
    add("--rounds", metavar="N", type=whole(1), default=3, help=text)
    text = "after each round; published code: 9"
    add("--finetune-epochs", metavar="N", type=whole(0), default=1, help=text)
    text = "end an epoch early; 0: after all triplets"
    add("--epoch-steps", metavar="N", type=whole(0), default=0, help=text)
    text = "of finetuning; published code: 2e-6 (default: that of stage 2, like all its settings)"
    add("--lr", metavar="LR", type=real(0), help=text)
    text = "of finetuning; published code: cosine (default: that of stage 2)"
    add("--schedule", choices=train.SCHEDULES, help=text)
    text = "the data set's folder or its parent (default: as in training)"
    add("--data-root", metavar="DIR", help=text)
    text = "(default: pruned, or structured, beside CKPT)"
    add("--out", type=Path, metavar="DIR", help=text)
    add("--resume", action="store_true", help="go on after the last round that OUT holds")
    text = "draw mAP over parameters, as Fig. 1 does (matplotlib)"
    add("--chart", type=Path, metavar="FILE", help=text)
    add("--seed", type=whole(0), default=0)
    runtime.add_device_options(parser, precision=None)
    text = "triplets of a step, over all ranks (default: as in training)"
    add("--batch-size", metavar="T", type=whole(1), help=text)
    text = "reading processes of a rank (default: as in training)"
    add("--workers", metavar="N", type=whole(0), help=text)
    args = parser.parse_args(argv)
    beside = "structured" if args.structured else "pruned"
    args.out = args.out or Path(args.checkpoint).parent / beside
    return args


def training_settings(args: Namespace, checkpoint: dict) -> Namespace:
    """train.py's settings as in training, where this command line says nothing else."""
    stored = checkpoint["settings"]
    # A checkpoint of an older version may lack some
    newest = train.parse(["--dataset", stored.get("dataset", "synthetic")])
    own = {name: getattr(args, name) for name in ("seed", "out", "device", "resume")}
    for name in ("data_root", "precision", "workers", "batch_size"):
        if getattr(args, name) is not None:
            own[name] = getattr(args, name)
    settings = Namespace(**{**vars(newest), **stored, **own, "checkpoint_every": 0})
    settings.stages = tuple(
        train.Stage(**{**asdict(default), **stage})
        for default, stage in zip(newest.stages, stored["stages"], strict=True)
    )
    return settings


def finetuning(stage: train.Stage, args: Namespace) -> train.Stage:
    """Stage 2's settings, for the epochs after a round."""
    changes = {"epochs": args.finetune_epochs, "epoch_steps": args.epoch_steps, "frozen": False}
    for name in ("lr", "schedule"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    if args.lr is not None:
        changes["backbone_lr"] = None
    return replace(stage, **changes)


def open_run(args: Namespace) -> tuple[train.Run, Pruning]:
    """The run to finetune in, and what is to be done of the plan."""
    device = runtime.start(args.device)
    last = train.refuse_occupied(args)
    resumed = last.exists()
    model, checkpoint = evaluate.load_model(last if resumed else args.checkpoint)
    if resumed and "pruning" not in checkpoint:
        raise UserError(f"{last}: was not written by prune.py; choose another --out")
    if "pids" not in checkpoint or "stages" not in checkpoint["settings"]:
        raise UserError(
            f"{args.checkpoint}: lacks what training needs; expected a checkpoint of train.py or"
            " prune.py"
        )
    if args.structured:
        check_structured(model)
    plan = {name: getattr(args, name) for name in PLAN}
    if resumed:
        pruning = Pruning(**checkpoint["pruning"])
        for name, value in plan.items():
            if pruning.plan.get(name) != value:
                raise UserError(
                    f"{args.out}: was begun with {name} {pruning.plan.get(name)}, not {value}"
                )
    else:
        start = kept(model) / prunable(model)
        pruning = Pruning(plan, read_targets(args, model), start, rows=[])
    settings = training_settings(args, checkpoint)
    splits = train.load_splits(settings)
    if splits[0].train.pids.unique().tolist() != checkpoint["pids"]:
        raise UserError(
            f"{settings.data_root}: its training identities are not those that {args.checkpoint}"
            " was trained on"
        )
    train.check_batches(settings, splits[0])
    run = train.Run(settings, device, splits, model, pruning.log_size)
    run.checkpoint_path = None  # a round is saved when it is over
    if "criterion" in checkpoint:
        run.criterion.load_state_dict(checkpoint["criterion"])
    return run, pruning


def prune_model(args: Namespace) -> list[dict]:
    """All rounds of a plan, or what is left of them; returns the rows of OUT/results.json."""
    run, pruning = open_run(args)
    runtime.print0("settings:", vars(args))
    if not pruning.rows:
        add_row(run, "start", args.half, pruning)
    stage, labels = finetuning(run.args.stages[1], args), list(pruning.targets)
    # A whole stage's warm-up could be longer than a round
    warmup = min(stage.warmup_steps, run.stage_steps(stage) // 10)
    stage = replace(stage, warmup_steps=warmup)
    for fraction in pruning.fractions(args.rounds)[pruning.rounds :]:
        # Rounds are numbered after the two stages, so that each draws its own triplets
        numbered = replace(stage, number=pruning.rounds + 3)
        finetune(run, numbered, round(fraction * prunable(run.model)), args.structured)
        pruning.rounds += 1
        if pruning.rounds % args.rounds == 0:
            add_row(run, labels[pruning.rounds // args.rounds - 1], args.half, pruning)
        pruning.log_size = run.log.size
        with runtime.rank0_first():
            description = {**run.describe(), "pruning": vars(pruning)}
            write(args.out / "last.pt", run.model, description)
    return pruning.rows


@runtime.program
def main() -> None:
    args = parse()
    if args.chart:
        from extras.pictures import need_matplotlib

        need_matplotlib()
    rows = prune_model(args)
    runtime.print0(tables(rows))
    if args.chart and runtime.rank() == 0:
        from extras.pictures import size_chart

        size_chart({str(args.out): rows}, args.chart)


if __name__ == "__main__":
    main()
