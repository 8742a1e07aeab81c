"""Search train.py's options with optuna, as section 5.2 did, on identities held out of training.

python -m extras.tune --trials 30                                          on the synthetic set
python -m extras.tune --dataset rgbnt100 --data-root DIR --out runs/tune   once for each GPU

train.py's options may follow, for all trials. What is searched begins at their values; a rate or
weight of 0 stays so. No trial is tested: only the command printed last does that. Started again, or
several times at once with the same OUT, the search continues, with --trials in all.
"""

import argparse
import fcntl
import importlib.util
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

# Option and, of a pair, stage -> range, widened to hold the given value
SPACE = {
    # From below the published 2.54e-5 and 5e-6, for 33,300 steps, to four times the synthetic
    # set's 2.5e-3 and 1.2e-3, for 492: a shorter schedule takes a higher rate
    "lr 1": (1e-5, 1e-2, "log"),
    "lr 2": (2e-6, 5e-3, "log"),
    "backbone_lr 1": (1e-7, 1e-3, "log"),  # only where one is set: --recipe plus
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
    """The open file, locked until it is closed or this process ends; None: another holds it."""
    file = open(path, "a")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of them is the system's choice
        file.close()
        return None
    return file


def folder(args: argparse.Namespace, number: int, suffix: str = "") -> Path:
    return args.out / f"trial-{number:03d}{suffix}"


def open_study(out: Path, common: list[str], epochs: int, space: dict[str, float]):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    runtime.make_folder(out, "--out")
    path = out / "journal.log"
    with lock(out / "lock"):
        try:
            backend = optuna.storages.journal.JournalFileBackend(str(path))
            study = optuna.create_study(
                storage=optuna.storages.JournalStorage(backend),
                # The first quarter of a curve says little of its end
                pruner=optuna.pruners.MedianPruner(5, n_warmup_steps=epochs // 4 + 1),
                study_name="tune",
                direction="maximize",
                load_if_exists=True,
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            text = f"{path}: not a journal of optuna's ({error}); choose another --out"
            raise UserError(text) from None
        if not study.trials:
            study.set_user_attr("options", common)
            # What is given comes first, so that the result is never worse
            study.enqueue_trial(space)
        elif study.user_attrs.get("options") != common:
            before = shlex.join(study.user_attrs.get("options", ()))
            raise UserError(
                f"{out}: its trials were begun with {before}, not {shlex.join(common)}; give the"
                " same options, or choose another --out"
            )
    return study


def claim(study, args: argparse.Namespace, base: argparse.Namespace, space: dict[str, float]):
    """A trial and its lock: one whose process has ended, else a new one; None: there are enough."""
    import optuna

    with lock(args.out / "lock"):
        trials = study.trials
        # By the number of trials, so that a search in several goes draws what one go would
        seed = runtime.torch_seed(base.seed, len(trials)) % 2**32
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        for old in trials:
            lock_file = folder(args, old.number, ".lock")
            if old.state.name == "RUNNING" and (held := lock(lock_file, wait=False)):
                trial = optuna.trial.Trial(study, old._trial_id)
                break
        else:
            if sum(old.state.name != "WAITING" for old in trials) >= args.trials:
                return None
            trial = study.ask()
            held = lock(folder(args, trial.number, ".lock"))
        values = suggest(trial, space)
        trial.set_user_attr("values", values)
        trial.set_user_attr("options", words_of(base, values))
    return trial, held


def finish(study, args: argparse.Namespace, trial, value: float | None) -> None:
    """Note a trial's end, without a value a poor one; only the best one's checkpoint is kept."""
    import optuna

    state = optuna.trial.TrialState.PRUNED if value is None else None
    with lock(args.out / "lock"):
        study.tell(trial, value, state)
        rows = records(study)
        for row in rows[1:]:
            if row["state"] in ("complete", "pruned", "diverged"):
                (folder(args, row["trial"]) / "last.pt").unlink(missing_ok=True)
        folder(args, trial.number, ".lock").unlink()
        runtime.write_json(args.out / "trials.json", rows)


# --- a trial


def validation(out: Path) -> list[float]:
    """mAP of the held-out identities after each epoch."""
    log = out / "log.jsonl"
    lines = map(json.loads, log.read_text().splitlines() if log.exists() else ())
    return [line["validation"]["mAP"] for line in lines if line["event"] == "epoch"]


def train_trial(study, args: argparse.Namespace, trial, words: list[str]) -> None:
    """Both stages, as train.py trains them; a poor validation curve ends them early."""
    import optuna

    own = options.parse(words)
    epochs = sum(stage.epochs for stage in own.stages)

    def watch() -> None:
        # From the log: a process may have been killed between an epoch and its report
        values = validation(own.out)
        for epoch in range(len(study.trials[trial.number].intermediate_values), len(values)):
            trial.report(values[epoch], epoch + 1)
        # Not what was given, which all are compared with, nor what is complete
        if trial.number and len(values) < epochs and trial.should_prune():
            raise optuna.TrialPruned

    value, outcome = None, ""
    try:
        run = train.start_run(own)
        run.after_epoch = watch
        train.announce(run)
        watch()
        for stage in run.args.stages:
            train.train_stage(run, stage)
        value = validation(own.out)[-1]
        outcome = f"validation mAP {100 * value:.1f}"
    except optuna.TrialPruned:
        outcome = "stopped, its validation is below the median"
    except train.Diverged as error:
        trial.set_user_attr("end", "diverged")
        outcome = str(error)
    except runtime.Stopped as stopped:
        text = f"{args.out}: stopped in trial {trial.number}; the same command continues"
        raise runtime.Stopped(stopped.code - 128, text) from None
    print(f"trial {trial.number}: {outcome}", flush=True)
    finish(study, args, trial, value)


# --- results


def records(study) -> list[dict]:
    """The trials as trials.json holds them, the best first."""
    rows = [
        {
            "trial": trial.number,
            "validation_mAP": trial.value,
            "state": trial.user_attrs.get("end", trial.state.name.lower()),
            "values": trial.user_attrs.get("values", {}),
            "curve": list(trial.intermediate_values.values()),
            "options": trial.user_attrs.get("options", []),
        }
        for trial in study.trials
    ]
    return sorted(rows, key=lambda row: (row["state"] != "complete", -(row["validation_mAP"] or 0)))


def report(study, args: argparse.Namespace, common: list[str], space: dict[str, float]) -> None:
    """Print the table of the trials and the best one's command."""
    rows = records(study)
    lines = [["trial", "validation mAP %", "epochs", "state", *space]]
    for row in rows:
        value = "-" if row["validation_mAP"] is None else f"{100 * row['validation_mAP']:.1f}"
        cells = row["trial"], value, len(row["curve"]), row["state"]
        lines.append([str(cell) for cell in (*cells, *map(row["values"].get, space))])
    print(f"\n{runtime.markdown(lines)}\n")
    best = rows[0]
    if best["state"] != "complete":
        print(f"{args.out}: no trial is complete yet")
        return
    checkpoint = folder(args, best["trial"]) / "last.pt"
    print(f"best: trial {best['trial']}, validation mAP {100 * best['validation_mAP']:.1f}")
    print(f"its model on the test split: python evaluate.py {shlex.quote(str(checkpoint))}")
    print("the same from the start (without --val-ids on all identities), then the test:")
    words = [*common, *best["options"], "--out", str(args.out / "best")]
    print(f"python train.py {shlex.join(words)}")


# --- command line


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The search's own options, and train.py's for all trials."""
    parser = runtime.Parser(__doc__, prog="python -m extras.tune")
    add = parser.add_argument
    text = "in all, over all processes and calls"
    add("--trials", type=whole(1), default=30, metavar="N", help=text)
    text = "training identities to hold out, on which trials are compared"
    add("--val-ids", type=whole(2), default=20, metavar="N", help=text)
    add("--out", type=Path, default=Path("runs/tune"), metavar="DIR", help="folder to write")
    args, common = parser.parse_known_args()
    if "RANK" in os.environ:
        raise UserError(
            "a trial is trained by one process: leave torchrun out, and start the command as often"
            " as trials shall run at once"
        )
    if importlib.util.find_spec("optuna") is None:
        raise UserError("the search needs optuna, which is not installed: pip install optuna")
    return args, [*common, "--val-ids", str(args.val_ids)]


def check(base: argparse.Namespace) -> None:
    """Refuse mistakes in what all trials share, before anything is written."""
    if not any(stage.epochs for stage in base.stages):
        raise UserError("--epochs 0 0: no epoch to validate after; expected at least one")
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
    study = open_study(args.out, common, sum(stage.epochs for stage in base.stages), space)
    while claimed := claim(study, args, base, space):
        trial, held = claimed
        out = ["--out", str(folder(args, trial.number)), "--resume"]
        words = [*common, *trial.user_attrs["options"], *out]
        print(f"\ntrial {trial.number}: python train.py {shlex.join(words)}", flush=True)
        with held:
            train_trial(study, args, trial, words)
    report(study, args, common, space)


if __name__ == "__main__":
    main()
