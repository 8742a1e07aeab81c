"""Structured pruning: removed heads and channels were removed, and nothing else."""

import pytest
import torch

import options
import prune
from extras import structured
from model import GraFTConfig, build_model
from runtime import UserError

SIZES = {"image_size": (32, 64), "num_ids": 7, **options.BACKBONES["small"]}  # 3 heads of 64


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(GraFTConfig(**SIZES)).eval()


def features(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    images = {m: torch.randn(3, 3, 32, 64, generator=generator) for m in model.config.modalities}
    with torch.no_grad():
        return model(images).fusion


@torch.no_grad()
def silence(block, num_heads: int, num_channels: int) -> None:
    """Make all heads and channels of a block say nothing but the strongest."""
    qkv, proj = block.attn.qkv.weight.view(3, 3, 64, 192), block.attn.proj.weight.view(192, 3, 64)
    head_norms = torch.stack([qkv[:, h].norm() ** 2 + proj[:, h].norm() ** 2 for h in range(3)])
    proj[:, head_norms.argsort()[: 3 - num_heads]] = 0
    fc1, fc2 = block.mlp.fc1.weight, block.mlp.fc2.weight
    channel_norms = fc1.norm(dim=1) ** 2 + fc2.norm(dim=0) ** 2
    fc2[:, channel_norms.argsort()[: 768 - num_channels]] = 0


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.13])
def test_a_smaller_model_computes_what_the_large_one_does_without_the_removed_groups(model, keep):
    smaller = structured.shrink(model, round(keep * prune.num_prunable(model))).eval()
    assert prune.num_kept(smaller) == pytest.approx(keep * prune.num_prunable(model), rel=0.1)
    assert prune.num_prunable(smaller) == prune.num_prunable(model)
    for large, small, sizes in zip(
        model.backbone.blocks, smaller.backbone.blocks, smaller.config.blocks, strict=True
    ):
        num_heads, num_channels = sizes
        assert small.attn.heads == num_heads >= 1
        assert num_channels >= structured.CHANNELS
        assert num_channels % structured.CHANNELS == 0
        silence(large, num_heads, num_channels)
    torch.testing.assert_close(features(smaller), features(model), rtol=1e-4, atol=1e-5)


def test_the_smallest_model_keeps_a_head_and_a_few_channels_in_each_block(model):
    smallest = structured.shrink(model, 0)
    assert smallest.config.blocks == ((1, structured.CHANNELS),) * 6
    assert prune.num_kept(smallest) == structured.smallest(model)


def test_channels_compete_over_all_blocks():
    norms = [torch.arange(64.0), torch.arange(64.0) + 32]
    first, second = structured.strongest(norms, 64, 16)
    assert first.tolist() == list(range(48, 64))
    assert second.tolist() == list(range(16, 64))


@pytest.mark.parametrize(("fusion", "message"), [
    ({"fusion": "multistream"}, "not 3 x vit"),
    ({"fusion": "hamnet", "backbone": "resnet18"}, "not 3 x resnet18; leave the option out"),
])  # fmt: skip
def test_a_model_without_one_shared_vit_is_refused(fusion, message):
    with pytest.raises(UserError, match=message):
        structured.smallest(build_model(GraFTConfig(**SIZES, **fusion)))
