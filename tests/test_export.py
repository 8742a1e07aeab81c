"""An exported model gives PyTorch's embeddings, and the README's snippet evaluate.py's ranking."""

import re
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_search import call

import data
import evaluate
import runtime
from extras import export, search
from model import GraFTConfig, build_model

MODALITIES = ("rgb", "nir", "tir")


@pytest.fixture
def packages():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)


def save_model(path, **config):
    """A checkpoint of an untrained model, small, with a mean and a std of its own."""
    torch.manual_seed(0)
    sizes = {"image_size": (32, 64), "dim": 24, "depth": 1, "heads": 3, "encoder_hidden": 32}
    config = GraFTConfig(**{**sizes, "num_ids": 4, **config})
    model = build_model(config)
    for name, parameter in model.named_parameters():  # far from where all images look the same
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.01 if name == "fusion_token" else 0.6)
    torch.nn.init.normal_(model.bottleneck.running_mean)
    names = config.modalities
    checkpoint = {
        "config": asdict(config),
        "model": model.state_dict(),
        "settings": {},
        "mean": {name: (0.4, 0.5, 0.3 + 0.1 * i) for i, name in enumerate(names)},
        "std": {name: (0.2, 0.3, 0.2 + 0.1 * i) for i, name in enumerate(names)},
    }
    runtime.save_checkpoint(path, checkpoint)
    return path


def load(path) -> evaluate.Embedder:
    return evaluate.load_embedder(path, torch.device("cpu"), precision="fp32", workers=0)[0]


def test_the_snippet_in_the_readme_ranks_as_evaluate(
    packages, tiny_data, tmp_path, monkeypatch, capsys
):
    pair = ("rgb", "tir")
    sizes = {"fusion_tokens": 2, "bnneck_features": True, "modalities": pair}
    checkpoint = save_model(tmp_path / "last.pt", **sizes)
    argv = (checkpoint, "--out", tmp_path / "model.onnx")
    assert call(export, monkeypatch, *argv) == 0, capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "model.onnx"}  # one file
    dataset = data.load_dataset("synthetic", tiny_data, pair, (32, 64))
    for split in ("query", "gallery"):
        for i, (images, _, _) in enumerate(getattr(dataset, split)):
            for modality, image in images.items():
                path = tmp_path / split / modality / f"{i:03}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    text = (ROOT / "extras" / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (snippet,) = [code for code in snippets if "InferenceSession" in code]
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(snippet, found)
    ranking = evaluate.rank_splits(load(checkpoint), dataset.query, dataset.gallery)
    similarity = ranking.similarities(0, len(dataset.query)).numpy()
    np.testing.assert_allclose(found["similarity"], similarity, atol=1e-5)
    assert similarity.std() > 0.01  # the images do not all look the same
    ranked = np.take_along_axis(similarity, found["ranking"], 1)
    assert (np.diff(ranked) < 1e-5).all()
    assert found["facts"]["modalities"] == "rgb,tir"
    assert found["facts"]["input"] == "uint8, 0 to 255"
    assert found["facts"]["model"] == search.fingerprint(checkpoint)


@pytest.mark.parametrize(
    "config, options",
    [
        ({"fusion": "early"}, ["--modalities", "tir,rgb", "--float"]),
        ({"blocks": ((2, 48),), "test_token": "data"}, ["--modalities", "rgb", "--fp16"]),
    ],
)
def test_other_models_and_options(config, options, packages, tmp_path, monkeypatch, capsys):
    import onnxruntime

    checkpoint = save_model(tmp_path / "last.pt", **config)
    out = tmp_path / "model.onnx"
    assert call(export, monkeypatch, checkpoint, "--out", out, *options) == 0
    assert capsys.readouterr().out.count("largest ") == 2
    session = onnxruntime.InferenceSession(out)
    names = [name for name in MODALITIES if "--modalities" not in options or name in options[1]]
    assert [given.name for given in session.get_inputs()] == names
    generator = torch.Generator().manual_seed(1)
    images = {
        name: torch.randint(256, (7, 3, 32, 64), dtype=torch.uint8, generator=generator)
        for name in names
    }
    given = {name: x / 255 if "--float" in options else x for name, x in images.items()}
    (found,) = session.run(["embedding"], {name: x.numpy() for name, x in given.items()})
    embedder = load(checkpoint)
    with torch.no_grad():
        expected = embedder.features(embedder.normalise(images))
    assert found.dtype == np.float32
    tolerance = 2e-2 if "--fp16" in options else 1e-5
    np.testing.assert_allclose(found, expected, atol=tolerance)


def test_what_differs_or_cannot_be_exported_is_not_kept(packages, tmp_path, monkeypatch, capsys):
    checkpoint = save_model(tmp_path / "last.pt", modalities=("rgb",))
    argv = (checkpoint, "--out", tmp_path / "model.onnx")
    monkeypatch.setattr(export, "to_onnx", lambda *args: b"no graph")
    assert call(export, monkeypatch, *argv) == 2
    assert "cannot run what torch exported" in capsys.readouterr().err
    embedder = load(checkpoint)

    def run_onnx(content, images):
        images = {name: torch.from_numpy(image) for name, image in images.items()}
        with torch.no_grad():
            return embedder.features(embedder.normalise(images)) + 2e-3

    monkeypatch.setattr(export, "run_onnx", run_onnx)
    assert call(export, monkeypatch, *argv) == 2
    assert "embeddings differ from PyTorch's: difference 2.0e-03" in capsys.readouterr().err
    monkeypatch.undo()

    def fail(*args, **options):
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr(torch.export, "export", fail)
    assert call(export, monkeypatch, *argv) == 2
    error = capsys.readouterr().err
    assert "--fusion graft cannot be exported" in error and "no such operator" in error
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_mistakes_give_one_line(tmp_path, monkeypatch, capsys):
    checkpoint = save_model(tmp_path / "last.pt")
    out = tmp_path / "model.onnx"
    for words, message in [
        (["--out", tmp_path / "model.pt"], "expected a name as model.onnx"),
        (["--out", tmp_path / "none" / "model.onnx"], "its folder does not exist"),
        (["--out", out, "--modalities", "rgb,uv"], "--modalities uv: the model was trained on"),
        (["--out", out, "--modalities", "rgb,rgb"], "expected different names"),
    ]:
        if "uv" in str(words):
            monkeypatch.setattr(export, "need_packages", lambda: None)
        assert call(export, monkeypatch, checkpoint, *words) == 2
        assert message in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert call(export, monkeypatch, checkpoint, "--out", out) == 2
    assert "export needs onnx" in capsys.readouterr().err
    assert not out.exists()
