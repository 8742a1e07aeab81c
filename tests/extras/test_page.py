"""A run's page says what was measured and needs nothing beside it; a map shows what is alike."""

import base64
import io
import re
import shutil

import pytest
import torch
from conftest import fails, read_json, succeeds
from PIL import Image

import data
import evaluate
from extras import page, pictures, tsne
from runtime import UserError


@pytest.fixture(scope="module")
def html(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "a <run>"
    folder.mkdir()
    for name in ("last.pt", "log.jsonl", "config.json"):
        shutil.copy(trained / name, folder)
    stdout = succeeds(pictures, folder, "--html", "--workers", 0)
    assert f"{folder}/report.html: " in stdout
    return (folder / "report.html").read_text()


def test_the_page_says_what_was_measured(html, trained, tmp_path):
    metrics = read_json(trained / "metrics.json")
    for name in ("mAP", "R1", "R5", "R10", "mINP"):
        assert f"<span>{name}<b>{100 * metrics[name]:.1f}</b></span>" in html
    succeeds(evaluate, trained, "--modalities", "nir,tir", "--json", tmp_path / "two.json")
    shown = f"{100 * read_json(tmp_path / 'two.json')['mAP']:.1f}"
    assert f"<td>nir + tir</td><td>{shown}</td>" in html
    assert html.count("<tr><td>") > 7
    assert html.count("data:image/svg+xml") == 4
    assert 'alt="mean loss, weighted, by step"' in html
    # 6 queries with 10 answers; 6 with 6 wrong and the first right one; 6 twice
    figures = 6 * 11 + 6 * 8 + 6 * 2
    assert html.count("<figure") == figures
    assert html.count("data:image/jpeg") == 3 * figures
    assert html.count('class="wrong"') >= 36


def test_the_page_needs_no_network(html):
    links = re.findall(r'(?:src|href|srcset|data)="([^"]*)"', html)
    assert all(link.startswith("data:image/") for link in links)
    assert not re.search(r"https?:|url\(|@import|<script|<link", html)
    assert "<title>a &lt;run&gt;: graft on synthetic" in html  # names are text, not markup
    jpeg = next(link for link in links if link.startswith("data:image/jpeg"))
    picture = Image.open(io.BytesIO(base64.b64decode(jpeg.partition(",")[2])))
    assert picture.height == pictures.HEIGHT


def test_a_missing_sensor_keeps_its_place():
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    shown = page.figure(pictures.Cell({"tir": image}, ("a",)), ("rgb", "tir"))
    absent = shown.index('class="absent" style="width:144px;height:72px">no rgb')
    assert absent < shown.index("<img")


def test_mistakes_in_a_page_give_one_line(trained, tmp_path):
    assert "expected the folder of a run" in fails(pictures, tmp_path, "--html")
    for name in ("log.jsonl", "config.json"):
        shutil.copy(trained / name, tmp_path)
    assert "last.pt: no such file" in fails(pictures, tmp_path, "--html")
    assert "no modality xray" in fails(pictures, trained, "--html", "--modalities", "xray")
    assert not (tmp_path / "report.html").exists()


# --- a map


def test_a_map_shows_identities_and_sensors(trained, tiny_data, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    embedder, shown = evaluate.load_embedder(trained, "cpu", workers=0), []
    gallery = data.load_dataset("synthetic", tiny_data, image_size=(32, 64)).gallery
    monkeypatch.setattr(tsne, "embed_2d", lambda x, seed: shown.append(x) or x[:, :2].numpy())
    tsne.draw(embedder, gallery, tmp_path / "map.png")
    x = embedder.embed(gallery)
    torch.testing.assert_close(shown[0], x @ x.T, atol=1e-5, rtol=0)
    nir, part = embedder.embed(gallery.restricted(("nir",))), slice(len(gallery), 2 * len(gallery))
    torch.testing.assert_close(shown[1][part, part], nir @ nir.T, atol=1e-5, rtol=0)
    assert Image.open(tmp_path / "map.png").width > 1000
    with pytest.raises(UserError, match="2 gallery samples, expected at least 5"):
        tsne.draw(embedder, gallery.subset(gallery.samples[:2]), tmp_path / "map.png")
