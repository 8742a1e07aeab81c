"""Why FFD's triplet term is next to nothing: as derived in RESULTS.md, and as measured."""

import math

import pytest
import torch
from conftest import ROOT, fails, read_json, succeeds

from experiments import ffd
from losses import triplet_soft_margin
from model import GraFTConfig, build_model

NAMES = ("rgb", "nir", "tir")


def test_at_width_768_the_term_underflows_by_squared_distances_and_leaves_a_trace_by_plain_ones():
    torch.manual_seed(0)
    config = GraFTConfig(NAMES, 4, (32, 64), dim=768, depth=1, heads=12)
    images = {name: torch.randn(24, 3, 32, 64) for name in NAMES}
    found = ffd.measure(build_model(config), images, torch.arange(8) % 4)
    assert found["squared"] == found["squared_gradient"] == 0.0
    assert 0 < found["plain"] < 1e-3
    # A post-norm encoder's tokens have squared norm D; means over three encoders have less
    assert 768 / 3 <= found["fusion_norm"] < 768


@pytest.mark.parametrize("squared", [True, False])
def test_the_cosine_below_which_the_term_acts(squared):
    """Tokens built to these norms and cosines: the term is 1e-3 just there."""
    f, g, c, D = 70.0, 110.0, 0.4, 8
    cosine = ffd.acts_below(f, g, c, squared=squared)
    e = torch.eye(D, dtype=torch.float64)
    anchor = math.sqrt(f) * e[0]
    positive = math.sqrt(f) * (cosine * e[0] + math.sqrt(1 - cosine**2) * e[1])
    negative = math.sqrt(g) * (c * e[0] + math.sqrt(1 - c**2) * e[2])
    tokens = (anchor[None], positive[None], negative[None])
    assert triplet_soft_margin(*tokens, squared=squared).item() == pytest.approx(1e-3, rel=1e-3)


def test_figures_that_are_kept_show_nothing_by_squared_distances():
    kept = read_json(ROOT / "results" / "ffd.json")
    assert {found["width"] for found in kept.values()} == {192, 768}
    for label, found in kept.items():
        assert found["squared"] < 1e-6, label
        assert found["squared_gradient"] < 1e-5, label
    trained_by_it = [found["plain"] for label, found in kept.items() if ", plain, " in label]
    assert len(trained_by_it) == 4
    assert max(trained_by_it) < 1e-3


def test_measuring_and_printing_again(trained, tmp_path):
    file = tmp_path / "ffd.json"
    stdout = succeeds(ffd, f"end={trained}", "--json", file)
    assert "| end |" in stdout
    assert succeeds(ffd, "--json", file) == stdout
    assert "no checkpoint: expected LABEL=CKPT" in fails(ffd)
