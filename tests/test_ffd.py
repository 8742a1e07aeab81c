"""Why FFD's triplet term is next to nothing: as derived in RESULTS.md, and as measured."""

import math

import pytest
import torch
from conftest import ROOT, call

from extras import ffd
from losses import triplet_soft_margin
from model import GraFTConfig, build_model

NAMES = ("rgb", "nir", "tir")
KEPT = ROOT / "results" / "ffd.json"


def untrained(dim: int) -> dict[str, float]:
    torch.manual_seed(0)
    config = GraFTConfig(NAMES, 4, (32, 64), dim=dim, depth=1, heads=dim // 64)
    images = {name: torch.randn(24, 3, 32, 64) for name in NAMES}
    return ffd.measure(build_model(config), images, torch.arange(8) % 4)


def test_ffds_term_underflows_at_width_768():
    found = untrained(768)
    assert found["squared"] == 0.0 and found["squared_gradient"] == 0.0
    # A post-norm encoder's tokens have squared norm D; means over three encoders have less
    assert 768 / 3 <= found["fusion_norm"] < 768


def test_plain_distance_leaves_a_trace_at_width_768():
    assert 0 < untrained(768)["plain"] < 1e-3


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


def test_figures_that_are_kept_say_what_the_page_says():
    """By squared distances nothing, at both widths, untrained and after both stages."""
    kept = ffd.read(KEPT)
    widths = {found["width"] for label, found in kept.items() if "plain" not in label}
    assert widths == {192, 768}
    for label, found in kept.items():
        assert found["squared"] < 1e-6 and found["squared_gradient"] < 1e-5, label
    trained_by_it = [found["plain"] for label, found in kept.items() if ", plain, " in label]
    assert len(trained_by_it) == 4 and max(trained_by_it) < 1e-3


def test_measuring_and_bad_input(trained, tmp_path):
    file = tmp_path / "ffd.json"
    done = call(ffd, f"end={trained}/last.pt", "--triplets", 8, "--json", file)
    assert done.returncode == 0, done.stderr
    again = call(ffd, "--from", file)
    assert again.stdout == done.stdout and "| end |" in done.stdout
    file.write_text("[]")
    done = call(ffd, "--from", file)
    assert done.returncode == 2 and f"{file}: not what --json of extras.ffd keeps" in done.stderr
    done = call(ffd)
    assert done.returncode == 2 and "no checkpoint: expected LABEL=CKPT" in done.stderr
