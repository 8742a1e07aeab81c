"""Prune whole heads and MLP channels of a ViT: what is left is a smaller dense model, and faster.

python prune.py runs/synthetic --keep 0.5 --structured

Not the paper's, which masks single weights: a masked model needs as many operations as before.

Shapes: D width of the model, d width of a head.
"""

from dataclasses import replace

import torch
from torch import Tensor

from model import MultiModalModel, build_model
from runtime import UserError
from train import Run

CHANNELS = 16  # MLP channels go by so many: widths that matrix products are fast at


def smallest(model: MultiModalModel) -> int:
    """The prunable weights that stay in any case: a head and CHANNELS channels in each block.

    Raises UserError for a model that cannot be shrunk.
    """
    config, number = model.config, len(model.backbones)
    if config.backbone != "vit" or number != 1:
        raise UserError(
            f"--structured: expected one ViT of DeiT's kind, shared by all sensors, and not"
            f" {number} x {config.backbone}; leave the option out to prune by masks"
        )
    return config.depth * config.dim * (4 * config.dim // config.heads + 2 * CHANNELS)


def shrink_run(run: Run, keep: int) -> None:
    """Put a shrunken model in the place of a run's own, see shrink."""
    run.embedder = replace(run.embedder, model=shrink(run.model, keep))
    run.batches.embedder = run.embedder


@torch.no_grad()
def shrink(model: MultiModalModel, keep: int) -> MultiModalModel:
    """A dense model with about `keep` of the prunable weights: its strongest heads and channels.

    Strength is the L2 norm of a group's weights, compared over all blocks. Heads and channels
    shrink by the same share.
    """
    config, state = model.config, model.state_dict()
    D, d = config.dim, config.dim // config.heads
    head_norms, channel_norms = [], []
    for block in model.backbone.blocks:
        qkv, proj, fc1, fc2 = (
            layer.weight.square()
            for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        )
        head_norms.append(qkv.view(3, -1, d * D).sum((0, 2)) + proj.view(D, -1, d).sum((0, 2)))
        channel_norms.append(fc1.sum(1) + fc2.sum(0))
    share = keep / (12 * D**2 * config.depth)
    heads = strongest(head_norms, round(share * config.heads * config.depth))
    # Heads are large groups: the channels make up for what rounding to whole heads cost
    num_channels = (keep - 4 * d * D * sum(map(len, heads))) // (2 * D)
    channels = strongest(channel_norms, num_channels, CHANNELS)
    blocks = tuple((len(h), len(c)) for h, c in zip(heads, channels, strict=True))
    smaller = build_model(replace(config, blocks=blocks))
    for i, (head, channel) in enumerate(zip(heads, channels, strict=True)):
        attn, mlp = f"backbone.blocks.{i}.attn.", f"backbone.blocks.{i}.mlp."
        qkv = state[attn + "qkv.weight"].view(3, -1, d, D)
        state[attn + "qkv.weight"] = qkv[:, head].reshape(-1, D)
        state[attn + "qkv.bias"] = state[attn + "qkv.bias"].view(3, -1, d)[:, head].flatten()
        proj = state[attn + "proj.weight"].view(D, -1, d)
        state[attn + "proj.weight"] = proj[:, head].flatten(1)
        state[mlp + "fc1.weight"] = state[mlp + "fc1.weight"][channel]
        state[mlp + "fc1.bias"] = state[mlp + "fc1.bias"][channel]
        state[mlp + "fc2.weight"] = state[mlp + "fc2.weight"][:, channel]
    smaller.load_state_dict(state)
    return smaller.to(next(model.parameters()).device)


def strongest(norms: list[Tensor], count: int, multiple: int = 1) -> list[Tensor]:
    """Of all blocks' groups with these norms, the indices of the `count` largest in each block.

    Each block keeps a multiple of `multiple`, the nearest, and at least that.
    """
    ordered = torch.cat(norms).sort(descending=True).values
    threshold = ordered[max(0, min(count, len(ordered)) - 1)]
    indices = []
    for norm in norms:
        n = max(1, round(int((norm >= threshold).sum()) / multiple)) * multiple
        indices.append(norm.topk(min(n, len(norm))).indices.sort().values)
    return indices
