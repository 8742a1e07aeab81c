"""Every fusion through training and evaluation; those that can break it, through the rest."""

import pytest
from conftest import fails, read_json, succeeds, tiny_arguments

import data
import evaluate
import prune
import train
from experiments import hamnet
from extras import pictures, search
from model import FUSIONS

MODELS = {fusion: f"--fusion {fusion}" for fusion in FUSIONS}
MODELS["plus"] = "--recipe plus --schedule cosine --patch-dropout 0 0.5"
MODELS["hamnet"] += " --backbone-weights none --batch-size 4"


@pytest.fixture(scope="module", autouse=True)
def thin_resnets():
    """ResNets of one block a stage, for speed; forked programs have them, too."""
    with pytest.MonkeyPatch.context() as patch:
        thin = {"resnet18": (hamnet.resnet.BasicBlock, [1, 1, 1, 1])}
        patch.setattr(hamnet, "LAYOUTS", thin)
        yield


def options(name: str, root, out) -> list:
    """Those that train a model of this name in a few steps."""
    steps = ["--epochs", 1, "--epoch-steps", 2]
    return [*tiny_arguments(root, out), *MODELS[name].split(), *steps]


@pytest.fixture(scope="module")
def model(request, tiny_data, tmp_path_factory):
    """The folder of a trained model's run."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    succeeds(train, *options(request.param, tiny_data, out))
    return out


def on(*names: str):
    """A test of the models of these names."""
    return pytest.mark.parametrize("model", names, indirect=True)


@on(*MODELS)
def test_evaluated_on_every_subset_mirrored_and_reranked(model, tmp_path):
    more = ["--all-subsets", "--flip", "--rerank", "--json", tmp_path / "subsets.json"]
    succeeds(evaluate, model, *more)
    results = read_json(tmp_path / "subsets.json")
    assert len(results) == 7
    assert all(0 < row["mAP"] <= 1 for row in results.values())
    succeeds(evaluate, model, "--json", tmp_path / "plain.json")
    assert read_json(tmp_path / "plain.json") == read_json(model / "metrics.json")


@on("graft", "multistream", "plus")
def test_drawn(model, tmp_path):
    names = ["ranked-list", "failures", "cmc"]
    if "multistream" not in str(model):
        names.append("attention")
    files = {f"--{name}": tmp_path / f"{name}.png" for name in names}
    succeeds(evaluate, model, *sum(files.items(), ()))
    assert all(file.exists() for file in files.values())
    assert "curves.png" in succeeds(pictures, model)


@on("multistream", "hamnet")
def test_without_fusion_tokens_there_is_no_attention_to_draw(model, tmp_path):
    assert model.parent.name[:-1] in fails(evaluate, model, "--attention", tmp_path / "file.png")


QUICK = ["--keep", 0.5, "--rounds", 1, "--device", "cpu", "--epoch-steps", 1]


@pytest.mark.parametrize(
    "model, more",
    [
        ("graft", []),
        ("multistream", []),
        ("hamnet", []),
        ("graft", ["--structured"]),
        ("plus", ["--structured"]),
    ],
    indirect=["model"],
)
def test_pruned(model, more, tmp_path):
    succeeds(prune, model, *QUICK, "--out", tmp_path / "pruned", *more)
    succeeds(evaluate, tmp_path / "pruned/0.5.pt", "--flip")


@on("multistream", "hamnet")
def test_not_pruned_by_heads_and_channels(model, tmp_path):
    out = tmp_path / "pruned"
    assert "--structured" in fails(prune, model, *QUICK, "--out", out, "--structured")
    assert not out.exists()


@on("graft", "multistream", "plus")
def test_searched_with(model, tiny_data, tmp_path):
    gallery = data.load_dataset("synthetic", tiny_data, image_size=(32, 64)).gallery
    for i in range(3):
        for modality, image in gallery[i][0].items():
            path = tmp_path / "photos" / modality / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            data.Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    npz, photo = tmp_path / "gallery.npz", tmp_path / "photos/nir/1.png"
    succeeds(search, model, "index", tmp_path / "photos", "--out", npz)
    assert "   1" in succeeds(search, model, "query", npz, f"nir={photo}")


@pytest.mark.parametrize("name", ["multistream", "plus"])  # GraFT's are in test_distributed.py
def test_on_two_ranks(name, tiny_data, tmp_path):
    succeeds(train, *options(name, tiny_data, tmp_path / "run"), ranks=2)
    succeeds(evaluate, tmp_path / "run", ranks=2)
    succeeds(prune, tmp_path / "run", *QUICK, "--out", tmp_path / "pruned", ranks=2)
