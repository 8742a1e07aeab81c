"""Weights from outside: released DeiT files, timm's and torchvision's ViTs, checkpoints of ours.

Read strictly: a weight that is missing, left over or of another shape is named and refused.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import runtime
from model import ViT
from runtime import UserError

DEIT_URL = "https://dl.fbaipublicfiles.com/deit/"
DEIT_FILES = {  # by `distilled`
    True: "deit_base_distilled_patch16_224-df68dfff.pth",
    False: "deit_base_patch16_224-b5f2ef4d.pth",
}
# Classifiers of other data sets: the only weights that are left out
HEADS = ("head.", "head_dist.", "heads.")
TORCHVISION_NAMES = {
    "class_token": "cls_token",
    "conv_proj": "patch_embed.proj",
    "encoder.pos_embedding": "pos_embed",
    "encoder.layers.encoder_layer_": "blocks.",
    "encoder.ln": "norm",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj": "attn.proj",
    "mlp.linear_1": "mlp.fc1",
    "mlp.linear_2": "mlp.fc2",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
}


def load_backbone(model: nn.Module, path: str | Path) -> list[str]:
    """Load pretrained weights into a ViT, or into every ViT of a model.

    Returns the names of the weights left out (classifiers only). Position embeddings are resized
    when the image size differs. `path` may be "deit": DeiT-B's released file, by torch.hub. Raises
    UserError for a file that cannot be read or is not this backbone's.
    """
    vits = [module for module in model.modules() if isinstance(module, ViT)]  # of one shape
    vit = vits[0]
    if str(path) == "deit":
        path = fetch_deit(distilled=vit.dist_token is not None)
    checkpoint = runtime.load_checkpoint(path)
    state, dropped = read_state(checkpoint, path)
    check_names(state, vit, path)
    config = checkpoint.get("config")
    image_size = config.get("image_size") if isinstance(config, dict) else None
    state["pos_embed"] = fit_pos_embed(state, vit, image_size)
    stacked = vit.patch_embed.proj.in_channels // 3
    if stacked > 1:  # early fusion: each modality starts with its share
        weight = state["patch_embed.proj.weight"]
        state["patch_embed.proj.weight"] = weight.repeat(1, stacked, 1, 1) / stacked
    for name, weight in vit.state_dict().items():
        if state[name].shape != weight.shape:
            raise UserError(
                f"{path}: {name} has the shape {tuple(state[name].shape)}, this backbone's has"
                f" {tuple(weight.shape)}; choose the --backbone that the file was made for"
            )
    for vit in vits:
        vit.load_state_dict(state)
    return dropped


def read_state(checkpoint: dict, path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a ViT by timm's names, in float32, and the names of those left out."""
    state = checkpoint.get("model", checkpoint)
    if not isinstance(state, dict) or not all(isinstance(w, Tensor) for w in state.values()):
        raise UserError(f"{path}: holds no state dict of a ViT")
    if any(name.startswith("backbone.") for name in state):  # a checkpoint of ours
        own = {name: w for name, w in state.items() if name.startswith("backbone.")}
        state = {name.removeprefix("backbone."): weight for name, weight in own.items()}
    if "class_token" in state:
        for theirs, ours in TORCHVISION_NAMES.items():
            state = {name.replace(theirs, ours): weight for name, weight in state.items()}
    dropped = [name for name in state if name.startswith(HEADS)]
    return {name: w.float() for name, w in state.items() if name not in dropped}, dropped


def check_names(state: dict[str, Tensor], vit: ViT, path: str | Path) -> None:
    expected = vit.state_dict().keys()
    missing, unknown = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if not missing and not unknown:
        return
    hint = ""
    if missing == ["dist_token"]:
        hint = "; a model without the distillation token takes --no-distilled"
    if unknown == ["dist_token"]:
        hint = "; it has a distillation token: leave out --no-distilled"
    raise UserError(
        f"{path}: not the weights of this backbone:"
        f" lacks {_some(missing)}, has also {_some(unknown)}{hint}"
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more or "nothing"


def fit_pos_embed(state: dict[str, Tensor], vit: ViT, image_size: tuple | None) -> Tensor:
    """The position embeddings for this ViT's grid; files of others are of square images."""
    pos_embed = state["pos_embed"]
    num_patches = pos_embed.shape[1] - vit.prefix_tokens
    patch_size = state["patch_embed.proj.weight"].shape[-1]
    if image_size:
        rows, columns = (side // patch_size for side in image_size)
    else:
        rows = columns = int(num_patches**0.5)
    if (rows, columns) == vit.grid or rows * columns != num_patches:
        return pos_embed  # where the numbers do not match, the shapes are refused later
    return resize_pos_embed(pos_embed, vit.prefix_tokens, (rows, columns), vit.grid)


def resize_pos_embed(
    pos_embed: Tensor, prefix: int, old: tuple[int, int], new: tuple[int, int]
) -> Tensor:
    """Resize the patches' positions (1, prefix + old, D) to another grid (rows, columns)."""
    grid = pos_embed[:, prefix:].unflatten(1, old).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    grid = F.interpolate(grid, new, mode="bicubic", antialias=True)
    return torch.cat([pos_embed[:, :prefix], grid.flatten(2).transpose(1, 2)], 1)


def fetch_deit(distilled: bool) -> Path:
    """DeiT-B's released file, fetched once into torch.hub's folder."""
    name = DEIT_FILES[distilled]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    try:
        with runtime.rank0_first():
            torch.hub.load_state_dict_from_url(DEIT_URL + name, weights_only=True)
    except OSError as error:
        raise UserError(
            f"{DEIT_URL}{name}: cannot be fetched ({error}); fetch it elsewhere and put it at"
            f" {path}, or name a file by --backbone-weights FILE (none: train from random weights)"
        ) from None
    return path
