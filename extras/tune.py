"""Search train.py's options with optuna, as section 5.2 did, on identities held out of training.

python -m extras.tune --trials 30                                          on the synthetic set
python -m extras.tune --dataset rgbnt100 --data-root DIR --out runs/tune

Options of train.py may follow; they hold for all trials. The first trial takes the values of these
and of the recipe, so that the best one is never worse; a rate or weight of 0 stays 0. The search
never looks at the test split. The same command, run again, continues the search; run several times
at once, for example once for each GPU, the processes share the trials.
"""

import argparse
import fcntl
import json
import os
import shlex
import warnings
from pathlib import Path
from typing import IO

import options
import runtime
import train
from model import build_model, load_backbone
from runtime import UserError, whole

try:
    import optuna
except ImportError:
    optuna = None  # `parse` says what to install

# Option and, of a pair, stage -> range, widened to hold the given value
SPACE = {
    # From below the published 2.54e-5 and 5e-6, for 33,300 steps, to four times the synthetic
    # set's 2.5e-3 and 1.2e-3, for 492: a shorter schedule takes a higher rate
    "lr 1": (1e-5, 1e-2, "log"),
    "lr 2": (2e-6, 5e-3, "log"),
    "backbone_lr 1": (1e-7, 1e-3, "log"),  # only if one is set
    "backbone_lr 2": (1e-7, 1e-3, "log"),
    # The published code's are 1.58e-4 to 0.05
    "weight_decay 1": (1e-4, 0.3, "log"),
    "weight_decay 2": (1e-4, 0.3, "log"),
    # gamma stays: AdamW takes no notice of a factor of all losses, so only ratios to it count
    "alpha": (0.05, 5, "log"),  # paper: 0.5, as gamma
    "beta 1": (5e-5, 0.05, "log"),  # paper: 0, and then left at it
    "beta 2": (5e-5, 0.05, "log"),  # ten times beyond the paper's two values, see D2
    "label_smoothing 1": (0, 0.3, "even"),
    "label_smoothing 2": (0, 0.3, "even"),
    "warmup_steps": (10, 1000, "log"),  # synthetic set: 30; published: 500
}


def searched(base: argparse.Namespace) -> dict[str, float]:
    """The names of SPACE that matter to these options, with the values given."""
    space = {}
    for name, (_, _, scale) in SPACE.items():
        option, _, number = name.partition(" ")
        value, stages = getattr(base, option), base.stages
        if number:
            value, stages = value[int(number) - 1], [stages[int(number) - 1]]
        stages = [stage for stage in stages if stage.epochs]
        if option == "warmup_steps":
            stages = [stage for stage in stages if stage.schedule != "constant"]
        is_off = value is None or (scale == "log" and value == 0)
        if stages and not is_off:
            space[name] = value
    return space


def suggest(trial, space: dict[str, float]) -> dict[str, float]:
    """A trial's values, to three digits; the same again for a trial that is resumed."""
    values = {}
    for name, given in space.items():
        low, high, scale = SPACE[name]
        draw = trial.suggest_int if isinstance(given, int) else trial.suggest_float
        value = draw(name, min(low, given), max(high, given), log=scale == "log")
        exact = isinstance(given, int) or value == given
        values[name] = value if exact else float(f"{value:.3g}")
    return values


def words_of(base: argparse.Namespace, values: dict[str, float]) -> list[str]:
    """train.py's options for these values."""
    words = []
    for option in dict.fromkeys(name.partition(" ")[0] for name in values):
        words.append(f"--{option.replace('_', '-')}")
        given = getattr(base, option)
        if isinstance(given, tuple):
            words += [str(values.get(f"{option} {i}", value)) for i, value in enumerate(given, 1)]
        else:
            words.append(str(values[option]))
    return words


# --- the study: one journal, to which all processes append


def lock(path: Path, wait: bool = True) -> IO | None:
    """The open file, locked until it is closed or this process ends; None if another holds it."""
    file = open(path, "a")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of them is the system's choice
        file.close()
        return None
    return file


def folder(args: argparse.Namespace, number: int) -> Path:
    return args.out / f"trial-{number:03d}"


def open_study(out: Path, common: list[str], space: dict[str, float]):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    runtime.make_folder(out, "--out")
    with lock(out / "lock"):
        backend = optuna.storages.journal.JournalFileBackend(str(out / "journal.log"))
        storage = optuna.storages.JournalStorage(backend)
        how = {"storage": storage, "direction": "maximize", "load_if_exists": True}
        study = optuna.create_study(study_name="tune", **how)
        if not study.trials:
            study.set_user_attr("options", common)
            study.enqueue_trial(space)
        elif study.user_attrs["options"] != common:
            before = shlex.join(study.user_attrs["options"])
            raise UserError(
                f"{out}: holds a search with {before}, not with {shlex.join(common)}; give the same"
                " options, or choose another --out"
            )
    return study


def claim(study, args: argparse.Namespace, base: argparse.Namespace, space: dict[str, float]):
    """A trial and its lock; None if there are enough. One whose process has ended comes first."""
    with lock(args.out / "lock"):
        trials = study.trials
        # Seeded by the number of trials, so an interrupted search draws the same values
        seed = runtime.torch_seed(base.seed, len(trials)) % 2**32
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        for old in trials:
            lock_file = folder(args, old.number).with_suffix(".lock")
            if old.state.name == "RUNNING" and (held := lock(lock_file, wait=False)):
                trial = optuna.trial.Trial(study, old._trial_id)
                break
        else:
            if sum(old.state.name != "WAITING" for old in trials) >= args.trials:
                return None
            trial = study.ask()
            held = lock(folder(args, trial.number).with_suffix(".lock"))
        values = suggest(trial, space)
        trial.set_user_attr("values", values)
        trial.set_user_attr("options", words_of(base, values))
    return trial, held


def train_trial(args: argparse.Namespace, trial, words: list[str]) -> list[float]:
    """Train both stages as train.py does, without its test, or what is left of them.

    Returns the mAP of the held-out identities after each epoch; [] if training diverged.
    """
    try:
        run = train.start_run(options.parse(words))
        train.announce(run)
        for stage in run.args.stages:
            train.train_stage(run, stage)
    except train.Diverged as error:
        print(f"trial {trial.number}: {error}", flush=True)
        return []
    except runtime.Stopped as stopped:
        text = f"{args.out}: stopped in trial {trial.number}; the same command continues the search"
        raise runtime.Stopped(stopped.code - 128, text) from None
    lines = map(json.loads, (run.args.out / "log.jsonl").read_text().splitlines())
    curve = [line["validation"]["mAP"] for line in lines if line["event"] == "epoch"]
    print(f"trial {trial.number}: validation mAP {100 * curve[-1]:.1f}", flush=True)
    return curve


def finish(study, args: argparse.Namespace, trial, curve: list[float]) -> None:
    """Record a trial, and write trials.json, the best first. Only the best keeps its weights."""
    with lock(args.out / "lock"):
        trial.set_user_attr("curve", curve)
        # Failed trials would be none to the sampler; one that is pruned at once is the worst
        if curve:
            study.tell(trial, curve[-1])
        else:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        rows = [
            {"trial": x.number, "validation_mAP": x.value, "state": x.state.name.lower()}
            | {name: x.user_attrs.get(name) for name in ("values", "curve", "options")}
            for x in study.trials
        ]
        rows.sort(key=lambda row: -(row["validation_mAP"] or 0))
        for row in rows[1:]:
            if row["state"] != "running":
                (folder(args, row["trial"]) / "last.pt").unlink(missing_ok=True)
        folder(args, trial.number).with_suffix(".lock").unlink()
        runtime.write_json(args.out / "trials.json", rows)


def report(study, args: argparse.Namespace, common: list[str]) -> None:
    """Print the best trial's commands."""
    print(f"\n{args.out / 'trials.json'}: all trials, the best first")
    if not study.best_trials:
        print("No trial is complete yet.")
        return
    best = study.best_trial
    checkpoint = folder(args, best.number) / "last.pt"
    print(
        f"Trial {best.number} is best, with a validation mAP of {100 * best.value:.1f}. To test it:"
    )
    print(f"python evaluate.py {shlex.quote(str(checkpoint))}")
    print("To train with its settings and test (leave --val-ids out to train on all identities):")
    words = [*common, *best.user_attrs["options"], "--out", str(args.out / "best")]
    print(f"python train.py {shlex.join(words)}")


# --- command line


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The search's own options, and train.py's for all trials."""
    parser = runtime.Parser(__doc__, prog="python -m extras.tune")
    add = parser.add_argument
    text = "number of trials in all, over all processes and calls"
    add("--trials", type=whole(1), default=30, help=text)
    text = "number of training identities to hold out, on which the trials are compared"
    add("--val-ids", type=whole(2), default=20, help=text)
    add("--out", type=Path, default=Path("runs/tune"), metavar="DIR", help="folder to write")
    args, common = parser.parse_known_args()
    if "RANK" in os.environ:
        raise UserError(
            "one process trains a trial: start this program several times, not torchrun"
        )
    if optuna is None:
        raise UserError("the search needs optuna: pip install optuna")
    return args, [*common, "--val-ids", str(args.val_ids)]


def check(base: argparse.Namespace) -> None:
    """Refuse mistakes in what all trials share, before anything is written."""
    if not any(stage.epochs for stage in base.stages):
        raise UserError("--epochs 0 0: expected at least one epoch, after which to validate")
    dataset, _ = train.load_splits(base)
    model = build_model(train.model_config(base, dataset))
    if base.backbone_weights != "none":
        load_backbone(model, base.backbone_weights)


@runtime.program
def main() -> None:
    args, common = parse()
    base = options.parse([*common, "--out", str(args.out)])
    check(base)
    space = searched(base)
    study = open_study(args.out, common, space)
    while claimed := claim(study, args, base, space):
        trial, held = claimed
        out = ["--out", str(folder(args, trial.number)), "--resume"]
        words = [*common, *trial.user_attrs["options"], *out]
        print(f"\ntrial {trial.number}: python train.py {shlex.join(words)}", flush=True)
        with held:
            finish(study, args, trial, train_trial(args, trial, words))
    report(study, args, common)


if __name__ == "__main__":
    main()
