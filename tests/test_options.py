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
    assert (args.dropout, args.features) == (0.1, "fusion")
    assert (first.frozen, first.beta, first.label_smoothing) == (True, 0, 0)
    assert (second.frozen, second.beta, second.label_smoothing) == (False, 0.0005, 0.1)
    assert (first.schedule, second.schedule) == ("sqrt", "constant")
    assert (first.lr, second.lr) == (2.54e-5, 5e-6)


def test_a_recipe_is_what_runs():
    """Plus's numbers are those written in options.py, and an option replaces just its own."""
    first, second = parse("--recipe plus").stages
    recipe = options.recipe("plus", "synthetic", "graft")
    assert (first.epochs, second.epochs) == recipe["epochs"]
    assert (first.epoch_steps, second.epoch_steps) == recipe["epoch_steps"]
    assert parse("--recipe plus --patch-dropout 0").stages[1].epochs == second.epochs
    assert options.from_checkpoint({"recipe": "plus"}).stride == 0  # of a run before the option
    other = parse("--recipe plus --schedule sqrt")
    assert [stage.schedule for stage in other.stages] == ["sqrt", "sqrt"]
    assert (other.fusion, other.triplet, other.features) == ("weighted", "hardest", "bnneck")
    assert parse("--recipe plus --fusion cls").triplet == "hardest"


@pytest.mark.parametrize(
    ("dataset", "size"), [("rgbn300", (126, 252)), ("folder", (56, 112)), ("rgbnt201", (252, 126))]
)
def test_plus_on_real_data_takes_a_backbone_that_has_seen_real_photos(dataset, size):
    args = parse(f"--recipe plus --dataset {dataset}")
    assert (args.backbone, args.image_size) == ("timm:vit_small_patch14_dinov2.lvd142m", size)
    assert (args.triplet, [stage.lr for stage in args.stages]) == ("contrastive", [1e-3, 5e-5])


@pytest.mark.parametrize("dataset", ["folder", "csv"])
def test_the_recipe_for_a_users_own_photos(dataset):
    args = parse(f"--dataset {dataset} --recipe own")
    backbone = "timm:vit_small_patch14_dinov2.lvd142m"
    assert (args.backbone, args.backbone_weights) == (backbone, "pretrained")
    assert (args.image_size, args.batch_size, args.positives) == ((56, 112), 26, 1)
    assert [stage.epochs for stage in args.stages] == [2, 1]
    assert [stage.lr for stage in args.stages] == [1e-3, 5e-5]
    assert args.stages[1].betas == options.CONSTANTS["adam_betas"][2:]


def test_one_value_is_for_both_stages():
    assert [stage.lr for stage in parse("--lr 1e-3").stages] == [1e-3, 1e-3]
    assert [stage.lr for stage in parse("--lr 1e-3 1e-4").stages] == [1e-3, 1e-4]
    assert parse("--image-size 112").image_size == (112, 112)


@pytest.mark.parametrize("typed", ["rgb,tir", "rgb tir", "rgb, tir"])
def test_names_may_be_separated_by_commas_or_spaces(typed):
    assert parse(f"--modalities {typed}").modalities == ("rgb", "tir")


def test_the_data_root_is_stored_as_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("--data-root here").data_root == str(tmp_path / "here")


@pytest.mark.parametrize(
    ("words", "defaults"),
    [
        ("--dataset synthetic", ["0.0025 0.0012", "26", "2 2", "0"]),
        ("--dataset rgbnt100", ["2.54e-05 5e-06", "208", "40 60"]),
        ("--dataset folder --recipe own", ["56 112", "0.001 5e-05"]),
    ],
)
def test_the_help_shows_the_recipes_defaults(words, defaults):
    done = call(train, *words.split(), "--help")
    text = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stderr
    assert [default for default in defaults if f"(default: {default})" not in text] == []
    assert "(default: None" not in text
    assert "(default: False" not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--seed -1", "--seed: expected a whole number of at least 0, not -1"),
        ("--label-smoothing 2", "--label-smoothing: expected a number from 0 to 1, not 2"),
        ("--lr nan 1", "--lr: expected a number of at least 0, not nan"),
        ("--lr 1 inf", "--lr: expected a number of at least 0, not inf"),
        ("--lr 1 2 3", "--lr: expected one or two values, not 3"),
        ("--epochs 1.5 1", "--epochs: expected a whole number from 0 to 999, not 1.5"),
        ("--image-size 0 64", "--image-size: expected a whole number from 1 to 4096, not 0"),
        (f"--seed {10**30}", "--seed: expected a whole number of at least 0, not 1000"),
        ("--modalities rgb,rgb", "--modalities: expected different names"),
        ("--modalities ,", "--modalities: expected different names, e.g. rgb,tir, not ','"),
        ("--backbone resnet99", "expected deit-b, small, resnet18, resnet50 or timm:NAME"),
        ("--epoch 1", "unrecognized arguments: --epoch 1"),
        ("--triplet hardest", "needs labels of all samples; add --cross-entropy all"),
        ("--fusion cls --fusion-tokens 2", "--fusion cls has none; leave it out"),
        ("--fusion weighted --data-token 2", "--fusion weighted uses none; leave it out"),
        ("--fusion weighted --plain-distance", "--triplet contrastive has no distances"),
        ("--triplet contrastive --cross-entropy all", "is for --fusion weighted and weighted-late"),
        ("--fusion weighted --triplet FFD", "--fusion weighted takes contrastive or hardest"),
        ("--fusion weighted --beta 0 1", "--fusion weighted has no centroids"),
        ("--patch-dropout 0 0.5 --data-token 2", "--data-token 2: --patch-dropout may leave"),
        ("--backbone resnet18", "ResNets are for --fusion hamnet"),
        ("--fusion hamnet --backbone small", "--fusion hamnet takes resnet18 or resnet50"),
        ("--fusion hamnet --beta 0.1", "HAMNet has no centroids"),
        ("--fusion hamnet --stride 8", "HAMNet has no centroids and no patches"),
        ("--fusion hamnet --recipe plus", "--recipe plus: HAMNet has a recipe of its own"),
        ("--recipe own --dataset rgbnt201", "--recipe own: is for --dataset folder, csv and"),
    ],
)
def test_mistakes_are_one_line(text, expected):
    with pytest.raises(UserError, match="^[^\n]*$") as refused:
        parse(text)
    assert expected in str(refused.value)


def test_all_ranks_say_a_mistake_once():
    assert "--batch-sizee" in fails(train, "--batch-sizee", 3, ranks=2)


def resume(typed: str, stored: str):
    return options.resumed(parse(f"--resume --out here {typed}"), options.settings(parse(stored)))


def test_resuming_takes_the_stored_settings_and_what_changes_no_result():
    args = resume("--lr 1e-3 --workers 4 --store 0", "--lr 1e-3 --triplet FFF --seed 3 --workers 1")
    assert (args.triplet, args.seed, str(args.out)) == ("FFF", 3, "here")
    assert args.stages == parse("--lr 1e-3").stages
    assert (args.workers, args.store) == (4, 0)
    assert resume("", "--workers 1").workers == 1
    assert resume("--modalities tir,rgb", "--modalities rgb,tir").modalities == ("rgb", "tir")


@pytest.mark.parametrize("option", ["--lr 1e-4", "--seed 1", "--batch-size 8", "--precision fp32"])
def test_resuming_with_another_value_is_refused(option):
    with pytest.raises(UserError, match=f"{option.split()[0]} .*: the run in here has"):
        resume(option, "--lr 1e-3")


def test_a_run_of_an_older_plus_cannot_go_on():
    assert options.from_checkpoint({"modality_losses": 0.0}).fusion == "graft"
    with pytest.raises(UserError, match="it can be evaluated; to go on, train anew"):
        options.from_checkpoint({"modality_losses": 1.0})
