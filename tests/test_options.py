"""Options, recipes and what --resume takes from a stored run."""

import pytest
from conftest import call, fails

import options
import train
from runtime import UserError


def parse(text: str = ""):
    return options.parse(text.split())


def test_papers_recipe_is_the_default_of_the_benchmarks():
    args = parse("--dataset rgbnt100")
    first, second = args.stages
    assert (args.backbone, args.image_size) == ("deit-b", (224, 224))
    assert (args.positives, args.batch_size) == (8, 208)
    assert (args.triplet, args.alpha, args.gamma) == ("FFD", 0.5, 0.5)
    assert (args.flips, args.erase, args.pad) == ((0.5, 0.5), 0.5, 0)
    assert (first.frozen, first.beta, first.label_smoothing) == (True, 0, 0)
    assert (second.frozen, second.beta, second.label_smoothing) == (False, 0.0005, 0.1)
    assert (first.schedule, second.schedule) == ("sqrt", "constant")
    assert (first.lr, second.lr) == (2.54e-5, 5e-6)


def test_rgbn300_has_its_own_recipe():
    first, second = parse("--dataset rgbn300").stages
    assert (first.lr, first.weight_decay) == (2e-5, 0.001)
    assert (second.weight_decay, second.betas) == (1.58e-4, (0.759, 0.986))


def test_a_recipe_is_what_runs():
    """Plus's numbers are those written in options.py, and an option replaces just its own."""
    first, second = parse("--recipe plus").stages
    recipe = options.recipe("plus", "synthetic", "graft")
    assert (first.epochs, second.epochs) == recipe["epochs"]
    assert (first.epoch_steps, second.epoch_steps) == recipe["epoch_steps"]
    assert parse("--recipe plus --patch-dropout 0").stages[1].epochs == second.epochs
    other = parse("--recipe plus --schedule sqrt --features fusion")
    assert [stage.schedule for stage in other.stages] == ["sqrt", "sqrt"]
    assert (other.triplet, other.features) == ("hardest", "fusion")
    assert parse("--recipe plus --fusion cls").modality_losses == 0


def test_one_value_is_for_both_stages():
    assert [stage.lr for stage in parse("--lr 1e-3").stages] == [1e-3, 1e-3]
    assert [stage.lr for stage in parse("--lr 1e-3 1e-4").stages] == [1e-3, 1e-4]
    with pytest.raises(UserError, match="--lr: expected two values, for stage 1 and stage 2"):
        parse("--lr 1 2 3")


def test_names_may_be_separated_by_commas_or_spaces():
    for text in ("rgb,tir", "rgb tir", "rgb, tir"):
        assert parse(f"--modalities {text}").modalities == ("rgb", "tir")


def test_the_data_root_is_stored_as_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("--data-root here").data_root == str(tmp_path / "here")


def test_the_help_shows_the_recipes_defaults():
    for dataset, defaults in (
        ("synthetic", ["(default: 0.0025 0.0012)", "(default: 26)", "(default: 2 2)"]),
        ("rgbnt100", ["(default: 2.54e-05 5e-06)", "(default: 208)", "(default: 40 60)"]),
    ):
        done = call(train, "--dataset", dataset, "--help")
        text = " ".join(done.stdout.split())
        assert done.returncode == 0, done.stderr
        assert [default for default in defaults if default not in text] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--seed -1", "--seed: expected a whole number of at least 0, not -1"),
        ("--label-smoothing 2", "--label-smoothing: expected a number from 0 to 1, not 2"),
        ("--lr nan 1", "--lr: expected a number of at least 0, not nan"),
        ("--lr 1 inf", "--lr: expected a number of at least 0, not inf"),
        ("--weight-decay -1 0", "--weight-decay: expected a number of at least 0, not -1"),
        ("--epochs 1.5 1", "--epochs: expected a whole number of at least 0, not 1.5"),
        ("--image-size 0 64", "--image-size: expected a whole number from 1 to 4096, not 0"),
        ("--patch-dropout 0 1", "--patch-dropout: expected a number from 0 to 0.95, not 1"),
        (f"--seed {10**30}", "--seed: expected a whole number of at least 0, not 1000"),
        ("--modalities rgb,rgb", "--modalities: expected different names"),
        ("--backbone resnet99", "expected deit-b, small, resnet18, resnet50 or timm:NAME"),
        ("--epoch 1", "unrecognized arguments: --epoch 1"),
        ("--triplet hardest", "needs the labels of all samples; add --cross-entropy all"),
        ("--fusion cls --fusion-tokens 2", "--fusion-tokens: --fusion cls has none"),
        ("--fusion cls --data-token 2", "--data-token: --fusion cls has none"),
        ("--fusion cls --modality-losses 1", "--fusion cls has no tokens of each modality"),
        ("--patch-dropout 0 0.5 --data-token 2", "--data-token 2: --patch-dropout may leave"),
        ("--backbone resnet18", "--backbone resnet18: is for --fusion hamnet alone"),
        ("--fusion hamnet --backbone small", "HAMNet takes resnet18 or resnet50"),
        ("--fusion hamnet --beta 0.1", "HAMNet has no center loss"),
    ],
)
def test_mistakes_are_one_line(text, expected):
    with pytest.raises(UserError, match="^[^\n]*$") as refused:
        parse(text)
    assert expected in str(refused.value)


def test_all_ranks_say_a_mistake_once():
    assert "--batch-sizee" in fails(train, "--batch-sizee", 3, ranks=2)


def stored(text: str) -> dict:
    return options.settings(parse(text))


def test_resuming_takes_the_stored_settings():
    run = stored("--lr 1e-3 --triplet FFF --seed 3 --workers 1")
    args = options.resumed(parse("--resume --out here"), run)
    assert (args.triplet, args.seed, args.workers) == ("FFF", 3, 1)
    assert args.stages == parse("--lr 1e-3").stages
    assert str(args.out) == "here"


def test_resuming_with_the_same_options_and_what_changes_no_result():
    run = stored("--lr 1e-3 --seed 3 --workers 1")
    args = options.resumed(parse("--resume --lr 1e-3 --workers 4 --device cpu --store 0"), run)
    assert (args.workers, args.device, args.store) == (4, "cpu", 0)
    assert args.seed == 3


@pytest.mark.parametrize("option", ["--lr 1e-4", "--seed 1", "--batch-size 8", "--precision fp32"])
def test_resuming_with_another_value_is_refused(option):
    with pytest.raises(UserError, match=f"{option.split()[0]} .*: the run in here has"):
        options.resumed(parse(f"--resume --out here {option}"), stored("--lr 1e-3"))
