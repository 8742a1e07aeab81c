"""Prune a trained model's backbone in rounds and finetune (section 5.4, Tables 3, 4, Fig. 1).

python prune.py runs/synthetic --keep 0.69 0.62 0.5 0.34       Table 3's fractions
python prune.py runs/rgbnt100 --params 76M 70M 60M 46M --half  its parameters
python prune.py runs/synthetic --keep 0.5 --structured         whole heads and MLP channels
python prune.py runs/synthetic --resume                        continues runs/synthetic/pruned

Each target starts from the one before. OUT/TARGET.pt, e.g. OUT/46M.pt, are checkpoints like any
other: evaluate.py reads them, prune.py prunes them further. OUT/results.json holds the table,
OUT/last.pt what --resume needs. Masks make files small, but a model no faster.
"""

import re
from argparse import Namespace
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from torch import nn
from torch.nn.utils import prune

import data
import evaluate
import options
import runtime
import train
from model import MultiModalModel
from runtime import UserError, real, whole

# --- masks over what can be pruned: weights of the backbone's attention and MLPs (section 5.4)


def layers(model: MultiModalModel) -> dict[str, nn.Module]:
    """The layers whose weights are pruned, by name."""
    found = {layer for backbone in model.backbones for layer in backbone.prunable()}
    return {name: layer for name, layer in model.named_modules() if layer in found}


def prunable(model: MultiModalModel) -> int:
    """How many weights could be pruned before any was."""
    config = model.config
    if config.blocks:  # a ViT that has lost heads and channels counts what it once had
        return 12 * config.dim**2 * config.depth
    return sum(layer.weight.numel() for layer in layers(model).values())


def kept(model: MultiModalModel) -> int:
    """How many of them are left."""
    return sum(int(layer.weight.count_nonzero()) for layer in layers(model).values())


def mask(model: MultiModalModel, keep: int) -> None:
    """Mask the smallest weights of all layers together, so that `keep` are left.

    Zeros are smallest, so what is pruned already goes first. A masked weight is the product of a
    parameter and a mask, made anew before each forward pass: neither gradient, momentum nor weight
    decay can bring it back.
    """
    weights = [(layer, "weight") for layer in layers(model).values()]
    amount = sum(layer.weight.numel() for layer, _ in weights) - keep
    prune.global_unstructured(weights, prune.L1Unstructured, amount=amount)


def make_permanent(model: MultiModalModel) -> None:
    """Turn masked weights into plain ones, with zeros."""
    for layer in layers(model).values():
        prune.remove(layer, "weight")


# --- rounds


@dataclass
class Pruning:
    """What was asked for, and how far it has come: OUT/results.json, and part of OUT/last.pt."""

    plan: dict  # see PLAN
    targets: dict[str, float]  # as typed -> fraction of the prunable weights, largest first
    start: float  # fraction that the given checkpoint had
    rounds: int = 0  # that are done
    rows: list[dict] = field(default_factory=list)
    log_size: int = 0

    def fractions(self) -> list[float]:
        """What is left after each round: equal factors from each target to the next."""
        number, fractions = self.plan["rounds"], []
        for before, target in pairwise([self.start, *self.targets.values()]):
            factors = [(target / before) ** (i / number) for i in range(1, number + 1)]
            fractions += [before * factor for factor in factors]
        return fractions


def prune_model(args: Namespace) -> list[dict]:
    """All rounds, or those that OUT still lacks; returns the rows of OUT/results.json."""
    run, pruning = open_run(args)
    plan, labels, fractions = pruning.plan, list(pruning.targets), pruning.fractions()
    runtime.print0(f"options: {evaluate.as_typed(Namespace(**{**vars(args), **plan}))}")
    if not pruning.rows:
        add_row(run, "start", pruning)
    stage = finetuning(run, plan)
    for fraction in fractions[pruning.rounds :]:
        # Numbered behind the two stages of training, so that each round draws its own triplets
        number, name = pruning.rounds + 3, f"round {pruning.rounds + 1} of {len(fractions)}"
        keep = round(fraction * prunable(run.model))
        prune_once(run, replace(stage, number=number, name=name), keep, plan["structured"])
        pruning.rounds += 1
        if pruning.rounds % plan["rounds"] == 0:
            add_row(run, labels[pruning.rounds // plan["rounds"] - 1], pruning)
        pruning.log_size = run.log.size
        with runtime.rank0_first():
            write(args.out / "last.pt", run.model, {**run.describe(), "pruning": vars(pruning)})
    return pruning.rows


def prune_once(run: train.Run, stage: train.Stage, keep: int, structured: bool) -> None:
    """One round: leave `keep` weights, and finetune. The centroids continue from where they are."""
    if structured:
        shrink = runtime.imported("extras.structured.shrink")
        run.embedder = replace(run.embedder, model=shrink(run.model, keep))
    else:
        mask(run.model, keep)
    run.progress = train.Progress(stage.number)
    if stage.epochs:
        train.train_stage(run, stage)
    if not structured:
        make_permanent(run.model)


def finetuning(run: train.Run, plan: dict) -> train.Stage:
    """The settings of the epochs after a round: stage 2's, but for what the plan says."""
    changes = {"epochs": plan["finetune_epochs"], "epoch_steps": plan["epoch_steps"]}
    changes |= {name: plan[name] for name in ("lr", "schedule") if plan[name] is not None}
    if plan["lr"] is not None:
        changes["backbone_lr"] = None
    stage = replace(run.args.stages[1], frozen=False, **changes)
    # A whole stage's warm-up could be longer than a round
    steps = stage.epochs * run.batches.num_steps(stage)
    return replace(stage, warmup_steps=min(stage.warmup_steps, steps // 10))


def write(path: Path, model: MultiModalModel, description: dict, half: bool = False) -> None:
    """Write a checkpoint of packed weights: 4 bytes (`half`: 2) each, and a bit a prunable one."""
    state = {name: weight.cpu() for name, weight in model.state_dict().items()}
    if half:
        state = {name: w.half() if w.is_floating_point() else w for name, w in state.items()}
    for name in layers(model):
        state[f"{name}.weight"] = runtime.pack(state[f"{name}.weight"])
    if runtime.rank() == 0:
        runtime.save_checkpoint(path, {**description, "model": state})


def add_row(run: train.Run, label: str, pruning: Pruning) -> None:
    """Write OUT/LABEL.pt, and what the model in that file is worth to OUT/results.json."""
    file = run.args.out / f"{label}.pt"
    with runtime.rank0_first():
        write(file, run.model, run.describe(), pruning.plan["half"])
    model, _ = evaluate.load_model(file)
    embedder = replace(run.embedder, model=model)
    ranking = evaluate.rank_splits(embedder, run.dataset.query, run.dataset.gallery)
    metrics = evaluate.metrics_dict(model, ranking)
    row = {
        "label": label,
        "params": model.num_parameters(nonzero=True),
        "kept": kept(model) / prunable(model),
        "bytes": file.stat().st_size,
        **{name: metrics[name] for name in ("mAP", "R1", "R5", "R10", "machine")},
    }
    pruning.rows.append(row)
    if runtime.rank() == 0:
        runtime.write_json(run.args.out / "results.json", vars(pruning))
    size = f"{row['params'] / 1e6:.2f} M non-zero parameters in {row['bytes'] / 1e6:.2f} MB"
    runtime.print0(f"{file}: {size}, {evaluate.summary(metrics)}")


# --- starting and resuming

PLAN = {  # what a resumed pruning keeps, and the defaults
    "params": None, "keep": None, "structured": False, "half": False, "rounds": 3,
    "finetune_epochs": 1, "epoch_steps": 0, "lr": None, "schedule": None, "precision": None,
    "seed": 0,
}  # fmt: skip


def open_run(args: Namespace) -> tuple[train.Run, Pruning]:
    """The run to finetune in, and what is to be done; all is checked before OUT is touched."""
    device, last = runtime.start(args.device), args.out / "last.pt"
    resumed = last.exists()
    if resumed and not args.resume:
        raise UserError(
            f"{args.out}: holds a run already; choose another --out, or continue it with --resume"
        )
    path = last if resumed else args.checkpoint
    embedder, checkpoint = evaluate.load_embedder(path, device), runtime.load_checkpoint(path)
    if "pids" not in checkpoint or "criterion" not in checkpoint:
        raise UserError(
            f"{args.checkpoint}: lacks what training needs; expected a checkpoint of train.py or"
            " prune.py"
        )
    pruning = stored_pruning(args, checkpoint) if resumed else new_pruning(args, embedder.model)
    settings = training_settings(args, pruning.plan, embedder.settings)
    dataset, _ = train.load_splits(settings, data.SPLITS, render=False)
    if dataset.train.pids.unique().tolist() != checkpoint["pids"]:
        raise UserError(
            f"{settings.data_root}: its training identities are not those that {args.checkpoint}"
            " was trained on"
        )
    if resumed:
        train.check_same_samples(settings, checkpoint, dataset)
    run = train.Run(settings, device, dataset, embedder.model)
    for split in (dataset.train, dataset.query, dataset.gallery):
        split.open()
    run.checkpoint_path = None  # a round is saved when it is over
    run.own_out(pruning.log_size)
    run.criterion.load_state_dict(checkpoint["criterion"])
    return run, pruning


def stored_pruning(args: Namespace, checkpoint: dict) -> Pruning:
    """What OUT holds. Raises UserError where the command line asks for something else."""
    if "pruning" not in checkpoint or "samples" not in checkpoint:
        raise UserError(
            f"{args.out}/last.pt: was not written by this version's prune.py; choose another --out"
        )
    pruning = Pruning(**checkpoint["pruning"])
    for name, value in given(args).items():
        if pruning.plan[name] != value:
            raise UserError(
                f"--{name.replace('_', '-')} {value}: the pruning in {args.out} has"
                f" {pruning.plan[name]}; leave the option out to continue it, or choose another"
                " --out"
            )
    return pruning


def new_pruning(args: Namespace, model: MultiModalModel) -> Pruning:
    plan = {**PLAN, **given(args)}
    if not (plan["params"] or plan["keep"]):
        raise UserError("expected targets, e.g. --params 76M 60M or --keep 0.69 0.5")
    return Pruning(plan, read_targets(plan, model), kept(model) / prunable(model))


def given(args: Namespace) -> dict:
    """The options of PLAN that the command line gives."""
    values = {name: getattr(args, name) for name in PLAN}
    return {name: value for name, value in values.items() if value is not None}


def read_targets(plan: dict, model: MultiModalModel) -> dict[str, float]:
    """The targets as typed -> fractions of the prunable weights, largest first.

    Raises UserError for what cannot be.
    """
    total, left, least = prunable(model), kept(model), 0
    if plan["structured"]:
        structured = runtime.imported("extras.structured")
        structured.check(model)
        least = structured.smallest(model.config)
    # What a target counts besides the weights that are left, and the unit of an answer
    option, others, unit = "--keep", 0, total
    if plan["params"]:
        option, others, unit = "--params", model.num_parameters(nonzero=True) - left, 1e6
    targets, suffix = {}, "M" if plan["params"] else ""
    for text in plan["params"] or plan["keep"]:
        match = re.fullmatch(r"(\d*\.?\d+)([kM]?)", text)
        if not match:
            raise UserError(f"{option} {text}: expected a number, e.g. 76M, or 0.5 with --keep")
        number = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6}[match[2]]
        fraction = (number - others) / total if plan["params"] else number
        if not least / total < fraction < left / total:
            low, high = (f"{(n + others) / unit:.3g}{suffix}" for n in (least, left))
            raise UserError(
                f"{option} {text}: expected more than {low}, which stays in any case, and less than"
                f" the model's {high}"
            )
        targets[text] = fraction
    return dict(sorted(targets.items(), key=lambda item: -item[1]))


def training_settings(args: Namespace, plan: dict, stored: dict) -> Namespace:
    """train.py's settings as in training, where plan or command line say nothing else."""
    settings = options.from_checkpoint(stored)
    changes = {name: getattr(args, name) for name in ("out", "device", "data_root", "workers")}
    changes |= {name: plan[name] for name in ("seed", "precision")}
    vars(settings).update({name: value for name, value in changes.items() if value is not None})
    return settings


# --- command line


def parse(argv: list[str] | None = None) -> Namespace:
    parser = runtime.Parser(__doc__)
    add = parser.add_argument
    text = "written by train.py or prune.py: a file, or a run's folder for its last.pt"
    add("checkpoint", metavar="CKPT", help=text)
    target = parser.add_mutually_exclusive_group()
    text = "non-zero parameters of the whole model, e.g. 76M 60M"
    target.add_argument("--params", nargs="+", metavar="N", help=text)
    text = "fractions of the backbone's weights to keep: attention and MLPs, or convolutions"
    target.add_argument("--keep", nargs="+", metavar="F", help=text)
    text = "remove whole heads and MLP channels: a smaller dense model"
    add("--structured", action="store_true", default=None, help=text)
    text = "store the targets' weights in 2 bytes each"
    add("--half", action="store_true", default=None, help=text)
    text = "prunings and finetunings to each target; published code: up to 30 (default: 3)"
    add("--rounds", metavar="N", type=whole(1), help=text)
    text = "after each round; published code: 9 (default: 1)"
    add("--finetune-epochs", metavar="N", type=whole(0), help=text)
    add("--epoch-steps", metavar="N", type=whole(0), help="end an epoch after so many steps")
    text = "of finetuning; published code: 2e-6 (default: stage 2's, like all its settings)"
    add("--lr", metavar="LR", type=real(0), help=text)
    text = "of finetuning; published code: cosine (default: stage 2's)"
    add("--schedule", choices=options.SCHEDULES, help=text)
    add("--seed", metavar="N", type=whole(0), help="random seed (default: 0)")
    text = "the data set's folder or its parent (default: as in training)"
    add("--data-root", metavar="DIR", help=text)
    text = "folder to write (default: pruned, or structured, beside CKPT)"
    add("--out", type=Path, metavar="DIR", help=text)
    add("--resume", action="store_true", help="continue what OUT holds; start it if OUT is empty")
    text = "draw mAP over parameters, as Fig. 1 does (needs matplotlib)"
    add("--chart", type=Path, metavar="FILE", help=text)
    runtime.add_device_options(parser, precision=None)
    text = "reading processes of a rank (default: as in training)"
    add("--workers", metavar="N", type=whole(0), help=text)
    args = parser.parse_args(argv)
    beside = "structured" if args.structured else "pruned"
    args.out = args.out or runtime.checkpoint_file(args.checkpoint).parent / beside
    return args


@runtime.program
def main() -> None:
    args = parse()
    if args.chart:
        pictures = runtime.imported("extras.pictures")
        pictures.need_matplotlib()
        runtime.check_output(args.chart, "--chart", (".png", ".pdf", ".svg"))
    rows = prune_model(args)
    if args.chart and runtime.rank() == 0:
        pictures.size_chart({str(args.out): rows}, args.chart)
        print(f"{args.chart}: mAP over parameters")


if __name__ == "__main__":
    main()
