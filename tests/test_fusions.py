"""Every fusion through training and evaluation; those that can break it, through the rest."""

import pytest
from conftest import fails, read_json, succeeds, tiny_arguments

import evaluate
import prune
import train
from experiments import hamnet
from extras import pictures, search
from model import FUSIONS

MODELS = {fusion: f"--fusion {fusion}" for fusion in FUSIONS}
MODELS["plus"] = "--recipe plus --schedule cosine --patch-dropout 0 0.5"
MODELS["hamnet"] += " --backbone-weights none --batch-size 4"
BEYOND = ("graft", "multistream", "plus")


@pytest.fixture(scope="module", autouse=True)
def thin_resnets():
    """ResNets of one block a stage, for speed; forked programs have them, too."""
    with pytest.MonkeyPatch.context() as patch:
        thin = {"resnet18": (hamnet.resnet.BasicBlock, [1, 1, 1, 1])}
        patch.setattr(hamnet, "LAYOUTS", thin)
        yield


@pytest.fixture(scope="module", params=MODELS)
def model(request, tiny_data, tmp_path_factory):
    """A model's name, the options that train it, and the folder of its run."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    words = [*tiny_arguments(tiny_data, out), *MODELS[request.param].split()]
    words += ["--epochs", "1", "--epoch-steps", "2"]
    succeeds(train, *words)
    return request.param, words, out


def test_evaluated_on_every_subset_mirrored_and_reranked(model, tmp_path):
    _, _, out = model
    more = ["--all-subsets", "--flip", "--rerank", "--json", tmp_path / "subsets.json"]
    succeeds(evaluate, out, *more)
    results = read_json(tmp_path / "subsets.json")
    assert len(results) == 7
    assert all(0 < row["mAP"] <= 1 for row in results.values())
    succeeds(evaluate, out, "--json", tmp_path / "plain.json")
    assert read_json(tmp_path / "plain.json") == read_json(out / "metrics.json")


def test_drawn(model, tmp_path):
    name, _, out = model
    if name not in BEYOND:
        line = fails(evaluate, out, "--attention", tmp_path / "attention.png")
        assert name in line
        return
    files = ["--ranked-list", tmp_path / "list.png", "--failures", tmp_path / "failures.png"]
    if name != "multistream":
        files += ["--attention", tmp_path / "attention.png"]
    succeeds(evaluate, out, *files, "--cmc", tmp_path / "cmc.png")
    assert len(list(tmp_path.glob("*.png"))) == len(files) // 2 + 1
    assert "curves.png" in succeeds(pictures, out)


@pytest.mark.parametrize("structured", [False, True])
def test_pruned(model, tmp_path, structured):
    name, _, out = model
    if name not in ("graft", "multistream", "hamnet"):
        return
    words = ["--keep", 0.5, "--rounds", 1, "--epoch-steps", 2, "--device", "cpu"]
    words += ["--out", tmp_path / "pruned", *(["--structured"] if structured else [])]
    if structured and name in ("multistream", "hamnet"):
        assert "--structured" in fails(prune, out, *words)
        assert not (tmp_path / "pruned").exists()
        return
    succeeds(prune, out, *words)
    succeeds(evaluate, tmp_path / "pruned/0.5.pt", "--flip")


def test_searched_with(model, tiny_data, tmp_path):
    name, _, out = model
    if name not in BEYOND:
        return
    gallery = train.data.load_dataset("synthetic", tiny_data, image_size=(32, 64)).gallery
    for i in range(3):
        for modality, image in gallery[i][0].items():
            path = tmp_path / "photos" / modality / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            train.data.Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    npz, photo = tmp_path / "gallery.npz", tmp_path / "photos/nir/1.png"
    succeeds(search, out, "index", tmp_path / "photos", "--out", npz)
    assert "   1" in succeeds(search, out, "query", npz, f"nir={photo}")


def test_on_two_ranks(model, tmp_path):
    name, words, _ = model
    if name not in ("multistream", "plus"):  # GraFT's are in test_distributed.py
        return
    words = [tmp_path / "run" if words[i - 1] == "--out" else w for i, w in enumerate(words)]
    succeeds(train, *words, ranks=2)
    succeeds(evaluate, tmp_path / "run", ranks=2)
    quick = ["--keep", "0.5", "--rounds", "1", "--epoch-steps", "1", "--device", "cpu"]
    succeeds(prune, tmp_path / "run", *quick, "--out", tmp_path / "pruned", ranks=2)
