"""Prune a trained model's backbone in rounds and finetune (section 5.4, Tables 3, 4, Fig. 1).

python prune.py runs/synthetic --keep 0.69 0.62 0.5 0.34       the fractions of Table 3
python prune.py runs/rgbnt100 --params 76M 70M 60M 46M --half  Table 3's parameters
python prune.py runs/synthetic --keep 0.5 --structured         whole heads and MLP channels
python prune.py runs/synthetic --resume                        continues runs/synthetic/pruned

Each target is reached from the one before in --rounds rounds of pruning and finetuning, and becomes
a checkpoint like any other, e.g. OUT/46M.pt: evaluate.py reads it, prune.py can prune it further.
OUT/results.json holds the table, OUT/last.pt what --resume needs. Masks make files smaller, but
give no speed-up.
"""

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


def num_prunable(model: MultiModalModel) -> int:
    """How many weights could be pruned before any was."""
    config = model.config
    if config.blocks:  # a ViT that has lost heads and channels counts what it once had
        return 12 * config.dim**2 * config.depth
    return sum(layer.weight.numel() for layer in layers(model).values())


def num_kept(model: MultiModalModel) -> int:
    """How many of the prunable weights are left."""
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
    """The plan and how far it has come: what OUT/results.json holds, and a part of OUT/last.pt."""

    plan: dict  # the options of PLAN
    targets: dict[str, float]  # as typed -> fraction of the prunable weights, largest first
    start: float  # the same fraction of the given checkpoint
    origin: str | None = None  # the given checkpoint's fingerprint; older versions have none
    rounds: int = 0  # rounds that are done
    rows: list[dict] = field(default_factory=list)
    log_size: int = 0

    def fractions(self) -> list[float]:
        """What is left after each round: equal factors from each target to the next."""
        number, fractions = self.plan["rounds"], []
        for before, target in pairwise([self.start, *self.targets.values()]):
            factors = [(target / before) ** (i / number) for i in range(1, number + 1)]
            fractions += [before * factor for factor in factors]
        return fractions


def prune_model(args: Namespace) -> None:
    """Prune in all rounds, or in those that OUT still lacks."""
    run, pruning = open_run(args)
    plan, labels, fractions = pruning.plan, list(pruning.targets), pruning.fractions()
    runtime.print0(f"settings: {evaluate.as_typed(Namespace(**{**vars(args), **plan}))}")
    if not pruning.rows:
        add_row(run, "start", pruning)
    stage = finetuning(run, plan)
    for i, fraction in enumerate(fractions[pruning.rounds :], pruning.rounds + 1):
        # Numbered behind the two stages of training, so that each round draws its own triplets
        stage = replace(stage, number=i + 2, name=f"round {i} of {len(fractions)}")
        prune_once(run, stage, round(fraction * num_prunable(run.model)), plan["structured"])
        pruning.rounds = i
        if i % plan["rounds"] == 0:
            add_row(run, labels[i // plan["rounds"] - 1], pruning)
        pruning.log_size = run.log.size
        with runtime.rank0_first():
            write(args.out / "last.pt", run.model, {**run.describe(), "pruning": vars(pruning)})
    runtime.print0(f"{args.out}/results.json: accuracy and size of each model")


def prune_once(run: train.Run, stage: train.Stage, keep: int, structured: bool) -> None:
    """One round: leave `keep` weights, and finetune. The centroids continue from where they are."""
    if structured:
        runtime.imported("extras.structured.shrink_run")(run, keep)
    else:
        mask(run.model, keep)
    run.progress = train.Progress(stage.number)
    if stage.epochs:
        train.train_stage(run, stage)
    if not structured:
        make_permanent(run.model)


def finetuning(run: train.Run, plan: dict) -> train.Stage:
    """Stage 2's settings, but for what the plan says."""
    epochs = {"epochs": plan["finetune_epochs"], "epoch_steps": plan["epoch_steps"]}
    stage = replace(run.args.stages[1], frozen=False, **epochs)
    if plan["lr"] is not None:
        stage = replace(stage, lr=plan["lr"], backbone_lr=None)
    stage = replace(stage, schedule=plan["schedule"] or stage.schedule)
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
    """Write OUT/LABEL.pt, and to OUT/results.json how good and how large that file's model is."""
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
        "kept": num_kept(model) / num_prunable(model),
        "bytes": file.stat().st_size,
        **{name: metrics[name] for name in ("mAP", "R1", "R5", "R10", "machine")},
    }
    pruning.rows.append(row)
    if runtime.rank() == 0:
        runtime.write_json(run.args.out / "results.json", vars(pruning))
    size = f"{row['params'] / 1e6:.2f} M non-zero parameters in {row['bytes'] / 1e6:.2f} MB"
    runtime.print0(f"{file}: {size}, {evaluate.summary(metrics)}")


# --- starting and resuming

PLAN = {  # the options that make the result, with their defaults: a resumed pruning keeps its own
    "params": None, "keep": None, "structured": False, "half": False, "rounds": 3,
    "finetune_epochs": 1, "epoch_steps": 0, "lr": None, "schedule": None, "precision": None,
    "seed": 0,
}  # fmt: skip


def open_run(args: Namespace) -> tuple[train.Run, Pruning]:
    """The run to finetune in, and what is to be done; all is checked before OUT is touched."""
    device, last = runtime.start(args.device), args.out / "last.pt"
    resumed = last.exists()
    if resumed and not args.resume:
        raise UserError(f"{args.out}: holds a run already; choose another --out, or give --resume")
    path = last if resumed else args.checkpoint
    model, checkpoint = evaluate.load_model(path)
    needed = {"pids", "criterion"} | ({"pruning", "samples"} if resumed else set())
    if lacking := needed - checkpoint.keys():
        text = f"lacks {', '.join(sorted(lacking))}, so it can be evaluated but not pruned"
        program = "prune.py" if resumed else "train.py or prune.py"
        raise UserError(f"{path}: {text}; expected a checkpoint as {program} writes it")
    pruning = planned(args, model, checkpoint["pruning"] if resumed else None)
    settings = options.from_checkpoint(checkpoint["settings"])
    chosen = {**vars(args), **pruning.plan}
    for name in ("out", "device", "data_root", "workers", "seed", "precision"):
        if chosen[name] is not None:
            setattr(settings, name, chosen[name])
    dataset, _ = train.load_splits(settings, data.SPLITS, render=False)
    if dataset.train.pids.unique().tolist() != checkpoint["pids"]:
        raise UserError(f"{settings.data_root}: {path} was trained on other identities")
    if resumed:
        train.check_same_samples(settings, checkpoint, dataset)
    run = train.Run(settings, device, dataset, model)
    for split in (dataset.train, dataset.query, dataset.gallery):
        split.open()
    run.checkpoint_path = None  # a round is saved when it is over
    run.criterion.load_state_dict(checkpoint["criterion"])
    run.open_out(pruning.log_size, resumed)
    return run, pruning


def planned(args: Namespace, model: MultiModalModel, stored: dict | None) -> Pruning:
    """The pruning to start, or the stored one, if the command line does not contradict it."""
    given = {name: getattr(args, name) for name in PLAN if getattr(args, name) is not None}
    origin = runtime.fingerprint(args.checkpoint)
    if stored is None:
        plan, fraction = {**PLAN, **given}, num_kept(model) / num_prunable(model)
        return Pruning(plan, read_targets(plan, model), fraction, origin)
    pruning = Pruning(**stored)
    if pruning.origin not in (origin, None):
        raise UserError(f"{args.out}: holds a pruning of another checkpoint; choose another --out")
    for name, value in given.items():
        if pruning.plan[name] != value:
            raise UserError(
                f"--{name.replace('_', '-')} {value}: the pruning in {args.out} has"
                f" {pruning.plan[name]}; leave the option out, or choose another --out"
            )
    return pruning


def read_targets(plan: dict, model: MultiModalModel) -> dict[str, float]:
    """The targets as typed -> fractions of the prunable weights, largest first."""
    if not (plan["params"] or plan["keep"]):
        raise UserError("expected targets, e.g. --params 76M 60M or --keep 0.69 0.5")
    total, left, least, targets = num_prunable(model), num_kept(model), 0, {}
    if plan["structured"]:
        least = runtime.imported("extras.structured.smallest")(model)
    for text in plan["params"] or plan["keep"]:
        try:
            number = 1e6 * float(text[:-1]) if text.endswith("M") else float(text)
        except ValueError:
            raise UserError(f"{text}: expected a target such as 76M or 0.5") from None
        fraction = number
        if plan["params"]:  # these count the weights that are never pruned, too
            fraction = (number - (model.num_parameters(nonzero=True) - left)) / total
        if not least / total < fraction < left / total:
            raise UserError(
                f"{text}: would leave {fraction:.3g} of the prunable weights; expected more than"
                f" {least / total:.3g} and less than {left / total:.3g}"
            )
        targets[text] = fraction
    return dict(sorted(targets.items(), key=lambda item: -item[1]))


# --- command line


def parse(argv: list[str] | None = None) -> Namespace:
    parser = evaluate.make_parser(__doc__, tests=False)
    add = parser.add_argument
    target = parser.add_mutually_exclusive_group()
    text = "targets: non-zero parameters of the whole model, e.g. 76M 60M"
    target.add_argument("--params", nargs="+", metavar="N", help=text)
    text = "targets: shares of the backbone's attention and MLP weights, e.g. 0.69 0.5"
    target.add_argument("--keep", nargs="+", metavar="F", help=text)
    flag = {"action": "store_true", "default": None}  # None: not given, see PLAN
    text = "remove whole heads and MLP channels, which leaves a smaller, faster, dense model"
    add("--structured", **flag, help=text)
    add("--half", **flag, help="store the pruned models in half precision")
    text = "pruning rounds per target; an earlier published version: up to 30 (default: 3)"
    add("--rounds", metavar="N", type=whole(1), help=text)
    text = "epochs of finetuning after each round; an earlier published version: 9 (default: 1)"
    add("--finetune-epochs", metavar="N", type=whole(0), help=text)
    add("--epoch-steps", metavar="N", type=whole(0), help="end each epoch after N steps")
    text = "rate of finetuning; an earlier published version: 2e-6 (default: stage 2's)"
    add("--lr", metavar="LR", type=real(0), help=text)
    text = "schedule of finetuning; an earlier published version: cosine (default: stage 2's)"
    add("--schedule", choices=options.SCHEDULES, help=text)
    add("--seed", metavar="N", type=whole(0), help="random seed (default: 0)")
    add("--data-root", metavar="PATH", help="the data set (default: as in training)")
    text = "folder to write (default: pruned, or structured, beside CKPT)"
    add("--out", type=Path, metavar="DIR", help=text)
    add("--resume", action="store_true", help="continue what OUT holds; start it if OUT is empty")
    args = parser.parse_args(argv)
    beside = "structured" if args.structured else "pruned"
    args.out = args.out or runtime.checkpoint_file(args.checkpoint).parent / beside
    return args


@runtime.program
def main() -> None:
    prune_model(parse())


if __name__ == "__main__":
    main()
