"""An exported model gives PyTorch's embeddings, and the README's snippet evaluate.py's ranking."""

import re
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
import evaluate
import runtime
from extras import export
from model import GraFTConfig, build_model


def save_model(path, settings=(), **config):
    """A checkpoint of an untrained model, small, with a mean and a std of its own."""
    torch.manual_seed(0)
    sizes = {"image_size": (32, 64), "dim": 24, "depth": 1, "heads": 3, "encoder_hidden": 32}
    config = GraFTConfig(**{**sizes, "num_ids": 4, **config})
    model = build_model(config)
    for name, parameter in model.named_parameters():  # far from where all images look the same
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.01 if name == "fusion_token" else 0.6)
    for neck in model.bottleneck.values() if config.fusion == "weighted" else [model.bottleneck]:
        torch.nn.init.normal_(neck.running_mean)
    names = config.modalities
    checkpoint = {
        "config": asdict(config),
        "model": model.state_dict(),
        "settings": dict(settings),
        "mean": {name: (0.4, 0.5, 0.3 + 0.1 * i) for i, name in enumerate(names)},
        "std": {name: (0.2, 0.3, 0.2 + 0.1 * i) for i, name in enumerate(names)},
    }
    runtime.save_checkpoint(path, checkpoint)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs export here: onnxruntime's threads do not survive the fork of conftest.call."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)

    def run(*argv) -> str:
        monkeypatch.setattr(sys, "argv", ["export", *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            export.main()
        printed = capsys.readouterr()
        assert end.value.code == (2 if printed.err else 0), printed.err
        return printed.err or printed.out

    return run


def load(path, **options) -> evaluate.Embedder:
    return evaluate.load_embedder(path, "cpu", precision="fp32", workers=0, **options)


@pytest.mark.parametrize("fusion", ["graft", "weighted"])
def test_the_readme_s_snippet_ranks_as_evaluate(fusion, run, tiny_data, tmp_path, monkeypatch):
    pair = ("rgb", "tir")
    sizes = {"fusion_tokens": 2, "modalities": pair, "fusion": fusion}
    checkpoint = save_model(tmp_path / "last.pt", {"features": "bnneck"}, **sizes)
    run(tmp_path, "--out", tmp_path / "model.onnx")
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
    variables = {}
    exec(snippet, variables)
    ranking = evaluate.rank_splits(load(checkpoint), dataset.query, dataset.gallery)
    similarity = ranking.similarities(0, len(dataset.query)).numpy()
    np.testing.assert_allclose(variables["similarity"], similarity, atol=1e-5)
    assert similarity.std() > 0.01  # the images do not all look the same
    assert variables["facts"]["model"] == runtime.fingerprint(checkpoint)


@pytest.mark.parametrize(
    "config, options, inputs",
    [
        ({"fusion": "early"}, "--modalities tir,rgb", ["rgb", "tir"]),  # in the model's order
        ({"blocks": ((2, 48),)}, "--modalities rgb --features data", ["rgb"]),
    ],
)
def test_models_and_options(config, options, inputs, run, tmp_path):
    import onnxruntime

    checkpoint, out = save_model(tmp_path / "last.pt", **config), tmp_path / "model.onnx"
    assert run(checkpoint, "--out", out, *options.split()).count("largest ") == 2
    session = onnxruntime.InferenceSession(out)
    assert [node.name for node in session.get_inputs()] == inputs
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (len(inputs), 7, 3, 32, 64), generator=generator).to(torch.uint8)
    images = dict(zip(inputs, images, strict=True))
    (embedding,) = session.run(["embedding"], {name: x.numpy() for name, x in images.items()})
    embedder = load(checkpoint, features="data" if "data" in options else "fusion")
    with torch.no_grad():
        expected = embedder.features_of(embedder.normalise(images))
    assert embedding.dtype == np.float32
    np.testing.assert_allclose(embedding, expected, atol=1e-5)


def test_what_differs_or_cannot_be_exported_is_not_kept(run, tmp_path, monkeypatch):
    argv = save_model(tmp_path / "last.pt", modalities=("rgb",)), "--out", tmp_path / "model.onnx"

    def fail(*args, **options):
        raise RuntimeError("no such\noperator")

    with monkeypatch.context() as patched:
        patched.setattr(export, "TOLERANCE", 1e-9)
        assert "onnxruntime's embeddings differ from PyTorch's by up to" in run(*argv)
        patched.setattr(torch.export, "export", fail)
        assert "cannot export this model: no such operator" in run(*argv)
        patched.setitem(sys.modules, "onnxscript", None)
        assert "export needs onnxscript" in run(*argv)
    for words, message in (
        (["--out", tmp_path / "model.pt"], "expected a file name that ends in .onnx"),
        (["--modalities", "rgb,uv"], "the model has no modality uv"),
    ):
        assert message in run(*argv, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
