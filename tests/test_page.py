"""A run's page says what was measured and needs nothing beside it; a map shows what is alike."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import conftest
import numpy as np
import pytest
import torch
from PIL import Image
from test_search import call, load

import data
import evaluate
from extras import page, pictures, tsne
from runtime import UserError


def test_subsets_of_means_are_what_evaluating_them_gives(trained, tiny_data):
    """The page embeds once; evaluate.py reads each subset of the sensors anew."""
    embedder = load(trained)
    dataset = data.load_dataset("synthetic", tiny_data, image_size=(32, 64))
    rankings = page.rank_subsets(embedder, dataset.query, dataset.gallery)
    names = ["rgb,nir,tir", "nir,tir", "rgb,tir", "rgb,nir", "rgb", "nir", "tir"]
    assert [",".join(subset) for subset in rankings] == names
    for subset in (("rgb", "nir", "tir"), ("rgb", "tir"), ("nir",)):
        alone = data.load_dataset("synthetic", tiny_data, subset, (32, 64))
        expected = evaluate.rank_splits(embedder, alone.query, alone.gallery)
        similarity = rankings[subset].similarities(0, 5)
        torch.testing.assert_close(similarity, expected.similarities(0, 5), atol=1e-5, rtol=0)
        assert rankings[subset].metrics.mAP == pytest.approx(expected.metrics.mAP, abs=2e-3)


def test_means_leave_out_what_a_sample_lacks(trained, tiny_data):
    embedder = load(trained)
    query = data.load_dataset("synthetic", tiny_data, image_size=(32, 64)).query
    some = []
    for i, sample in enumerate(query.samples[:4]):
        kept = dict(list(sample.images.items())[: 1 + i % 2])
        some.append(replace(sample, images=kept))
    split = query.subset(some)
    own, present = pictures.own_tokens(embedder, split)
    assert present.tolist() == [[True, False, False], [True, True, False]] * 2
    found = pictures.mean_features(embedder, own, present)
    torch.testing.assert_close(found, embedder.embed(split), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def html(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "a <run>"
    folder.mkdir()
    for name in ("last.pt", "log.jsonl"):
        shutil.copy(trained / name, folder)
    done = conftest.call(pictures, folder, "--html", "--workers", 0)
    assert done.returncode == 0 and done.stdout.strip() == str(folder / "report.html"), done.stderr
    assert sorted(path.name for path in folder.iterdir()) == [
        "last.pt", "log.jsonl", "report.html"
    ]  # fmt: skip
    return (folder / "report.html").read_text()


def test_the_page_says_what_was_measured(html, trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    for name in ("mAP", "R1", "R5", "R10", "mINP"):
        assert f"<span>{name}<b>{100 * metrics[name]:.1f}</b></span>" in html
    assert "<td>nir + tir</td>" in html and "<td>batch_size</td><td>8</td>" in html
    assert html.count("<svg") == 4 and html.count('aria-label="mean loss by step"') == 1
    # 6 queries with 10 answers; 6 with 6 wrong and the first right one; 6 twice
    figures = 6 * 11 + 6 * 8 + 6 * 2
    assert html.count("<figure") == figures and html.count("<img") == 3 * figures
    assert html.count('class="wrong"') >= 36 and "✗ " in html and "✓ " in html


def test_the_page_is_whole_and_needs_no_network(html):
    class Reader(HTMLParser):
        """Notes what a page refers to, and which elements are open."""

        def __init__(self):
            super().__init__()
            self.open, self.links = [], []

        def handle_starttag(self, tag, attributes):
            self.links += [v for k, v in attributes if k in ("src", "href", "srcset", "data")]
            if tag not in ("meta", "img", "br", "path", "polyline"):
                self.open.append(tag)

        def handle_startendtag(self, tag, attributes):
            assert tag in ("path", "polyline")

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    reader = Reader()
    reader.feed(html)
    assert not reader.open and reader.links
    assert all(link.startswith("data:image/jpeg;base64,") for link in reader.links)
    assert not re.search(r"https?:|url\(|@import|<script|<link", html)
    assert "prefers-color-scheme: dark" in html and "width=device-width" in html
    assert "<title>a &lt;run&gt;</title>" in html  # names are text, not markup
    first = base64.b64decode(reader.links[0].partition(",")[2])
    assert Image.open(io.BytesIO(first)).height == pictures.HEIGHT


def test_a_chart_by_hand():
    svg = page.line_chart("a & b", {"up": ([0, 10], [0, 5]), "gap": ([0, 5, 10], [5, np.nan, 0])})
    assert 'points="48.0,208.0 452.0,10.0"' in svg and 'points="48.0,10.0 452.0,208.0"' in svg
    assert "a &amp; b" in svg and "nan" not in svg
    assert page.ticks(0, 5, False) == [0, 1, 2, 3, 4, 5]
    assert page.ticks(0, 88, False) == [0, 20, 40, 60, 80]
    assert page.ticks(0.02, 3, True) == pytest.approx([0.1, 1])
    flat = page.line_chart("none", {"x": ([3], [0.0])}, log=True)  # no range at all
    assert "48.0," in flat and "nan" not in flat


def test_mistakes_in_a_page_give_one_line(trained, tmp_path, monkeypatch, capsys):
    assert call(pictures, monkeypatch, tmp_path, "--html") == 2
    assert "log.jsonl: no such file; expected the folder of a run" in capsys.readouterr().err
    shutil.copy(trained / "log.jsonl", tmp_path)
    assert call(pictures, monkeypatch, tmp_path, "--html") == 2
    assert "last.pt: no such file; expected a checkpoint" in capsys.readouterr().err
    shutil.copy(trained / "last.pt", tmp_path)
    for words, message in [
        (["--modalities", "xray"], "--modalities xray: the model was trained on rgb,nir,tir"),
        (["--dataset", "folder", "--data-root", tmp_path], "no layout of folder"),
    ]:
        assert call(pictures, monkeypatch, tmp_path, "--html", *words) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


# --- map


def test_a_map_shows_identities_and_sensors(trained, tiny_data, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    embedder, shown = load(trained), []
    gallery = data.load_dataset("synthetic", tiny_data, image_size=(32, 64)).gallery
    monkeypatch.setattr(tsne, "embed_2d", lambda x, seed: shown.append(x) or x[:, :2].numpy())
    tsne.draw(embedder, gallery, tmp_path / "map.png")
    features, own = shown
    torch.testing.assert_close(features, embedder.embed(gallery), atol=1e-5, rtol=0)
    assert own.shape == (3 * len(gallery), 192) and own.norm(dim=1).allclose(torch.ones(len(own)))
    assert Image.open(tmp_path / "map.png").width > 1000
    with pytest.raises(UserError, match="2 gallery samples, expected at least 5"):
        tsne.draw(embedder, gallery.subset(gallery.samples[:2]), tmp_path / "map.png")


def test_groups_far_apart_stay_apart_on_the_map():
    pytest.importorskip("sklearn")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 60, generator=generator)
    x[20:, 0] += 100
    points = tsne.embed_2d(x, 0)
    one, two = points[:20], points[20:]
    gap = np.linalg.norm(one[:, None] - two[None], axis=-1).min()
    nearest = np.sort(np.linalg.norm(points[:, None] - points[None], axis=-1), 1)[:, 1]
    assert points.shape == (40, 2) and gap > nearest.max()
    assert np.array_equal(points, tsne.embed_2d(x, 0))


def test_a_map_without_its_package_gives_one_line(trained, monkeypatch, capsys):
    find = pictures.importlib.util.find_spec
    lacking = lambda name: None if name == "sklearn" else find(name)  # noqa: E731
    monkeypatch.setattr(tsne.importlib.util, "find_spec", lacking)
    assert call(evaluate, monkeypatch, trained / "last.pt", "--map", "map.png") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --map needs scikit-learn, which is not installed: pip install")
