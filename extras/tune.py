"""Search train.py's options with optuna, as section 5.2 did, on identities held out of training.

python -m extras.tune --trials 30                                          on the synthetic set
python -m extras.tune --dataset rgbnt100 --data-root DIR --out runs/tune   once for each GPU

train.py's options may follow, for all trials. What is searched begins at their values; a rate or
weight of 0 stays so. No trial looks at the test split: only the command printed last does. Started
again, or several times at once with the same OUT, it goes on, --trials in all.
"""

import argparse
import fcntl
import importlib.util
import json
import math
import os
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import IO

import runtime
import train
from extras import pictures
from runtime import UserError, real, whole

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
        option, _, stage = name.partition(" ")
        value, stages = getattr(base, option), base.stages
        if stage:
            value, stages = value[int(stage) - 1], [stages[int(stage) - 1]]
        matters = any(each.epochs for each in stages)
        if option == "warmup_steps":
            matters = any(each.epochs and each.schedule != "constant" for each in stages)
        is_off = value is None or (scale == "log" and value == 0)
        if matters and not is_off:
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


def options(base: argparse.Namespace, values: dict[str, float]) -> list[str]:
    """train.py's, for these values."""
    words = []
    for option in dict.fromkeys(name.partition(" ")[0] for name in values):
        given = getattr(base, option)
        named = {option: given}
        if isinstance(given, tuple):
            named = {f"{option} {stage}": value for stage, value in enumerate(given, 1)}
        words.append(f"--{option.replace('_', '-')}")
        words += [str(values.get(name, value)) for name, value in named.items()]
    return words


# --- the study: one journal, which all processes append to


def lock(path: Path, wait: bool = True) -> IO | None:
    """The open file, locked until it is closed or this process ends; None: another holds it.

    By lockf, not flock: reading processes, which may outlive a killed parent, do not inherit it.
    """
    file = open(path, "a")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of them is the system's choice
        file.close()
        return None
    return file


def folder(args: argparse.Namespace, number: int, suffix: str = "") -> Path:
    return args.out / f"trial-{number:03d}{suffix}"


def open_study(args: argparse.Namespace, common: list[str], epochs: int, space: dict[str, float]):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    runtime.make_folder(args.out, "--out")
    path = args.out / "journal.log"
    with lock(args.out / "lock"):
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
                f"{args.out}: its trials were begun with {before}, not {shlex.join(common)};"
                " give the same options, or choose another --out"
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
        trial.set_user_attr("options", options(base, values))
    return trial, held


def finish(study, args: argparse.Namespace, trial, value: float | None) -> None:
    """Note a trial's end, without a value a poor one; only the best one's checkpoint is kept."""
    import optuna

    state = optuna.trial.TrialState.PRUNED if value is None else None
    with lock(args.out / "lock"):
        study.tell(trial, value, state)
        rows = records(study)
        for row in rows:
            if row["state"] in ("complete", "pruned", "diverged") and row is not rows[0]:
                (folder(args, row["trial"]) / "last.pt").unlink(missing_ok=True)
        folder(args, trial.number, ".lock").unlink()
        runtime.write_json(args.out / "trials.json", rows)


# --- a trial


def validation(out: Path) -> list[float]:
    """mAP of the held-out identities after each epoch."""
    log = out / "log.jsonl"
    records = map(json.loads, log.read_text().splitlines() if log.exists() else ())
    return [record["validation"]["mAP"] for record in records if record["event"] == "epoch"]


def train_trial(study, args: argparse.Namespace, trial, words: list[str]) -> None:
    """Both stages, as train.py trains them; a poor validation curve ends them early."""
    import optuna

    began, own = time.perf_counter(), train.parse(words)
    epochs = sum(stage.epochs for stage in own.stages)

    def watch() -> None:
        # From the log: a process may have been killed between an epoch and its report
        values = validation(own.out)
        for epoch in range(len(study.trials[trial.number].intermediate_values), len(values)):
            trial.report(values[epoch], epoch + 1)
        # Not what was given, which all are compared with, nor what is complete
        if trial.number and len(values) < epochs and trial.should_prune():
            raise optuna.TrialPruned

    value = None
    try:
        run = train.start_run(own)
        run.after_epoch = watch
        train.announce(run)
        watch()
        for stage in own.stages:
            train.train_stage(run, stage)
        value = validation(own.out)[-1]
        print(f"trial {trial.number}: validation mAP {100 * value:.1f}")
    except optuna.TrialPruned:
        print(f"trial {trial.number}: stopped, its validation is below the median")
    except train.Diverged as error:
        trial.set_user_attr("diverged", str(error))
        print(f"trial {trial.number}: {error}")
    except runtime.Stopped as stopped:
        text = f"{args.out}: stopped in trial {trial.number}; the same command goes on"
        raise runtime.Stopped(stopped.code - 128, text) from None
    finally:
        seconds = trial.user_attrs.get("seconds", 0) + time.perf_counter() - began
        trial.set_user_attr("seconds", seconds)
    finish(study, args, trial, value)


# --- results


def records(study) -> list[dict]:
    """The trials as trials.json holds them, the best first."""
    rows = []
    for trial in study.trials:
        own, state = trial.user_attrs, trial.state.name.lower()
        rows.append(
            {
                "trial": trial.number,
                "validation_mAP": trial.value,
                "state": "diverged" if "diverged" in own else state,
                "seconds": round(own.get("seconds", 0), 1),
                "values": own.get("values", {}),
                "curve": list(trial.intermediate_values.values()),
                "options": own.get("options", []),
            }
        )
    return sorted(rows, key=lambda row: (row["state"] != "complete", -(row["validation_mAP"] or 0)))


def report(study, args: argparse.Namespace, common: list[str], space: dict[str, float]) -> None:
    """Print the table of the trials and the best one's command."""
    rows = records(study)
    lines = [["trial", "validation mAP %", "epochs", "state", "seconds", *space]]
    for row in rows:
        value = "-" if row["validation_mAP"] is None else f"{100 * row['validation_mAP']:.1f}"
        cells = row["trial"], value, len(row["curve"]), row["state"], round(row["seconds"])
        lines.append([*map(str, cells), *(str(row["values"].get(name, "-")) for name in space)])
    print(f"\n{runtime.markdown(lines)}\n")
    best = rows[0]
    if best["state"] != "complete":
        print(f"{args.out}: no trial is complete yet")
        return
    importances(study, args.out / "importances.png")
    checkpoint = folder(args, best["trial"]) / "last.pt"
    print(f"best: trial {best['trial']}, validation mAP {100 * best['validation_mAP']:.1f}")
    print(f"its model on the test split: python evaluate.py {shlex.quote(str(checkpoint))}")
    print("the same from the start (without --val-ids on all identities), then the test:")
    words = [*common, *best["options"], "--out", str(args.out / "best")]
    print(f"python train.py {shlex.join(words)}")


def importances(study, path: Path) -> None:
    """Draw how much each option decides whether a trial is among the best."""
    from optuna import importance

    complete = sum(trial.state.name == "COMPLETE" for trial in study.trials)
    if complete < 4:
        print(f"no {path.name} of {complete} complete trials; it takes 4", file=sys.stderr)
        return
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no {path.name} without matplotlib", file=sys.stderr)
        return
    from matplotlib.figure import Figure

    # The evaluator that needs no scikit-learn
    evaluator = importance.PedAnovaImportanceEvaluator()
    shares = importance.get_param_importances(study, evaluator=evaluator)
    figure = Figure(figsize=(6, 0.8 + 0.3 * len(shares)), layout="constrained")
    axes = figure.subplots()
    axes.barh([*shares][::-1], [*shares.values()][::-1])
    axes.set(xlabel=f"importance (PED-ANOVA, {complete} complete trials)")
    pictures.save(lambda path: figure.savefig(path, dpi=120), path)


# --- command line


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The search's own options, and train.py's for all trials."""
    parser = runtime.Parser(__doc__, prog="python -m extras.tune")
    add = runtime.adder(parser)
    add("--trials", 30, whole(1), "in all, over all processes and calls")
    add("--val-ids", 20, whole(2), "training identities to hold out, which trials are compared on")
    add("--out", Path("runs/tune"), Path, "folder to write", "DIR")
    add("--timeout", math.inf, real(0), "begin no trial after so many minutes", "MINUTES")
    args, common = parser.parse_known_args()
    if "RANK" in os.environ:
        raise UserError(
            "a trial is trained by one process: leave torchrun out, and start the command as often"
            " as trials shall run at once"
        )
    if importlib.util.find_spec("optuna") is None:
        raise UserError("the search needs optuna, which is not installed: pip install optuna")
    return args, [*common, "--val-ids", str(args.val_ids)]


@runtime.program
def main() -> None:
    began = time.monotonic()
    args, common = parse()
    base = train.parse([*common, "--out", str(args.out)])
    epochs, space = sum(stage.epochs for stage in base.stages), searched(base)
    if not epochs:
        raise UserError("--epochs 0 0: no epoch to validate after; expected at least one")
    train.prepare(base)  # refuses mistakes in what all trials share, before anything is written
    study = open_study(args, common, epochs, space)
    while time.monotonic() - began <= 60 * args.timeout:
        claimed = claim(study, args, base, space)
        if claimed is None:
            break
        trial, held = claimed
        out = ["--out", str(folder(args, trial.number)), "--resume"]
        words = [*common, *trial.user_attrs["options"], *out]
        print(f"\ntrial {trial.number}: python train.py {shlex.join(words)}", flush=True)
        with held:
            train_trial(study, args, trial, words)
    report(study, args, common, space)


if __name__ == "__main__":
    main()
