"""The search as a command.

It tests nothing, survives signals and kills, is shared by processes, stops poor trials, and ends in
a command that gives the best trial's figure again.
"""

import importlib.util
import os
import re
import shlex
import signal
import time

import pytest
from conftest import _be, _wait, call, fails, read_json, read_log, succeeds

import options
import train
from extras import tune

optuna = pytest.importorskip("optuna")
TINY = (
    "--epochs 1 --epoch-steps 2 --batch-size 4 --image-size 32 64 --backbone-weights none"
    " --device cpu --workers 0"
)


def common(root) -> list[str]:
    return ["--data-root", str(root), *TINY.split()]


def search(root, out, trials: int) -> list[str]:
    return ["--trials", str(trials), "--val-ids", "2", "--out", str(out), *common(root)]


@pytest.fixture(scope="module")
def found(tiny_data, tmp_path_factory):
    """A search of two trials: OUT, and what it printed."""
    out = tmp_path_factory.mktemp("tune") / "out"
    return out, succeeds(tune, *search(tiny_data, out, 2), timeout=240)


def test_trials_test_nothing_and_start_from_what_was_given(found):
    out, printed = found
    best, other = read_json(out / "trials.json")
    assert {best["trial"], other["trial"]} == {0, 1}
    assert best["validation_mAP"] >= other["validation_mAP"] == other["curve"][-1]
    assert min((best, other), key=lambda row: row["trial"])["values"]["lr 1"] == 2.5e-3
    assert re.findall(r"trial (\d): python train.py", printed) == ["0", "1"]
    # Only the best one's checkpoint stays
    assert [path.parent.name for path in out.glob("*/last.pt")] == [f"trial-00{best['trial']}"]
    for trial in (0, 1):
        assert len(read_log(out / f"trial-00{trial}", "epoch")) == 2
        assert not read_log(out / f"trial-00{trial}", "test")


def test_the_best_command_gives_the_best_figure_again(found, tmp_path):
    out, printed = found
    words = shlex.split(printed.splitlines()[-1])
    assert words[:2] == ["python", "train.py"]
    assert "--resume" not in words
    succeeds(train, *words[2:], "--out", tmp_path)
    assert tune.validation(tmp_path)[-1] == read_json(out / "trials.json")[0]["validation_mAP"]


def test_what_is_done_counts_and_other_options_are_refused(found, tiny_data):
    out, printed = found
    again = succeeds(tune, *search(tiny_data, out, 2))
    assert "settings:" not in again
    assert again.splitlines()[-1] == printed.splitlines()[-1]
    text = fails(tune, *search(tiny_data, out, 2), "--seed", "1")
    assert "give the same options, or choose another --out" in text


def test_killed_then_stopped_then_shared_by_two_processes(found, tiny_data, tmp_path, monkeypatch):
    passes, order = train.Batches.passes, search(tiny_data, tmp_path, 3)

    def fatal(number: int) -> None:
        def ends(batches, source, key):
            if key[1] == 2:  # the stage
                os.kill(os.getpid(), number)
            return passes(batches, source, key)

        monkeypatch.setattr(train.Batches, "passes", ends)

    fatal(signal.SIGKILL)
    assert call(tune, *order).returncode == -signal.SIGKILL
    fatal(signal.SIGTERM)
    stopped = call(tune, *order)
    assert stopped.returncode == 143, stopped
    assert "stage 1, epoch" not in stopped.stdout  # which was done before
    assert stopped.stderr == f"{tmp_path}: stopped in trial 0; the same command continues\n"
    monkeypatch.setattr(train.Batches, "passes", passes)
    if (child := os.fork()) == 0:
        _be(tune, order, tmp_path / "other")
    here = succeeds(tune, *order, timeout=240)
    assert _wait(child, time.monotonic() + 240) == 0
    there = (tmp_path / "other.out").read_text()
    trained = [re.findall(r"trial (\d): python", text) for text in (here, there)]
    assert sorted(trained[0] + trained[1]) == ["0", "1", "2"]
    # As if it had never been stopped
    curves = [
        {row["trial"]: row["curve"] for row in read_json(out / "trials.json")}
        for out in (tmp_path, found[0])
    ]
    assert curves[0][0] == curves[1][0]
    assert curves[0].keys() == {0, 1, 2}
    assert not list(tmp_path.glob("*.lock"))


def test_a_poor_trial_is_stopped_by_its_validation_curve(tiny_data, tmp_path):
    words = [*common(tiny_data), "--val-ids", "2"]
    study = tune.open_study(tmp_path, words, 2, tune.searched(options.parse(words)))
    for _ in range(5):
        curve = {1: 0.99, 2: 0.995}
        study.add_trial(optuna.trial.create_trial(value=0.995, intermediate_values=curve))
    printed = succeeds(tune, *search(tiny_data, tmp_path, 7))
    rows = read_json(tmp_path / "trials.json")
    ends = {row["trial"]: (row["state"], len(row["curve"])) for row in rows}
    assert ends[0] == ("complete", 2)  # what was given is not stopped
    assert ends[6] == ("pruned", 1)
    assert "trial 6: stopped, its validation is below the median" in printed


def test_a_trial_that_diverges_is_a_poor_one(tiny_data, tmp_path):
    printed = succeeds(tune, *search(tiny_data, tmp_path, 2), "--lr", "1e30")
    ends = {row["trial"]: row["state"] for row in read_json(tmp_path / "trials.json")}
    assert ends[0] == "diverged"
    assert len(ends) == 2
    assert "trial 0: stage 1, epoch 1, step 2: loss or gradient is not finite" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning 1", "unrecognized arguments: --learning 1"),
        ("--epochs 0", "--epochs 0 0: no epoch to validate after"),
        ("--val-ids 1", "expected a whole number of at least 2"),
        ("--val-ids 4", "--val-ids 4: leaves too few of the 4 training identities"),
        ("--val-ids 20", "--val-ids 20: leaves too few of the 4 training identities"),
        ("--backbone-weights no.pth", "no.pth: no such file"),
    ],
)
def test_mistakes_give_one_line_and_leave_no_trace(tiny_data, tmp_path, words, message):
    assert message in fails(tune, *search(tiny_data, tmp_path / "out", 1), *words.split())
    assert not (tmp_path / "out").exists()


def test_torchrun_a_missing_optuna_and_a_damaged_journal(tiny_data, tmp_path, monkeypatch):
    words = search(tiny_data, tmp_path, 1)
    assert "leave torchrun out" in fails(tune, *words, ranks=2)
    (tmp_path / "journal.log").write_text("{}\n")
    assert "journal.log: not a journal of optuna's" in fails(tune, *words)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "which is not installed: pip install optuna" in fails(tune, *words)


def test_what_is_searched_depends_on_what_is_in_use():
    def names(words: str) -> set[str]:
        return set(tune.searched(options.parse(words.split())))

    off = {"backbone_lr 1", "backbone_lr 2", "beta 1"}
    assert names("--dataset rgbnt100") == set(tune.SPACE) - off
    assert "backbone_lr 2" in names("--dataset rgbnt100 --recipe plus")
    assert "alpha" not in names("--alpha 0")
    assert not any(name.endswith(" 1") for name in names("--epochs 0 2"))
    assert "warmup_steps" not in names("--schedule constant")
    base = options.parse(["--recipe", "plus"])
    values = {name: 2 * value for name, value in tune.searched(base).items()}
    again = options.parse(["--recipe", "plus", *tune.words_of(base, values)])
    assert tune.searched(again) == values
