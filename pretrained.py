"""Weights from outside: state dicts as DeiT, timm, torchvision, CLIP and DINOv2 are released.

Read strictly: a weight that is missing, left over or of another shape is named and refused.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import runtime
from baselines import ResNet
from model import BACKBONES, RESNETS, Backbone, GraFTConfig, MultiModalModel, ViT
from runtime import UserError

DEIT_URL = "https://dl.fbaipublicfiles.com/deit/"
DEIT_FILES = {  # by `distilled`
    True: "deit_base_distilled_patch16_224-df68dfff.pth",
    False: "deit_base_patch16_224-b5f2ef4d.pth",
}


class Format(NamedTuple):
    """How others name a ViT's weights, whose CLS token ends in `mark`.

    `names` are parts of theirs and ours, replaced in this order. Weights whose names begin with one
    of `left_out` are no part of the ViT: the only ones that are left out.
    """

    mark: str
    names: dict[str, str]
    left_out: tuple[str, ...]


TORCHVISION = Format(
    "class_token",
    {
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
    },
    ("heads.",),
)
OPEN_CLIP = Format(  # and OpenAI's own, converted
    "visual.class_embedding",
    {
        "visual.": "",
        "class_embedding": "cls_token",
        "positional_embedding": "pos_embed",
        "conv1": "patch_embed.proj",
        "ln_pre": "norm_pre",
        "ln_post": "norm",
        "transformer.resblocks.": "blocks.",
        "ln_1": "norm1",
        "ln_2": "norm2",
        "attn.in_proj_": "attn.qkv.",
        "attn.out_proj": "attn.proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    },
    # The projection to what images and texts share: GraFT takes the tokens before it. The text
    # tower, and the sizes that OpenAI's archive holds as tensors
    (
        "visual.proj", "positional_embedding", "text_projection", "logit_scale", "logit_bias",
        "transformer.", "token_embedding.", "ln_final.", "attn_mask",
        "input_resolution", "context_length", "vocab_size",
    ),
)  # fmt: skip
HF_CLIP = Format(  # with the prefix in a whole CLIP
    "embeddings.class_embedding",
    {
        "vision_model.": "",
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding.weight": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "pre_layrnorm": "norm_pre",
        "post_layernorm": "norm",
        "encoder.layers.": "blocks.",
        "layer_norm": "norm",
        "self_attn.q_proj": "attn.q",
        "self_attn.k_proj": "attn.k",
        "self_attn.v_proj": "attn.v",
        "self_attn.out_proj": "attn.proj",
    },
    (
        "vision_model.embeddings.position_ids", "embeddings.position_ids", "visual_projection.",
        "text_model.", "text_projection.", "logit_scale",
    ),
)  # fmt: skip
HF_DINOV2 = Format(
    "embeddings.cls_token",
    {
        "embeddings.cls_token": "cls_token",
        "embeddings.register_tokens": "register_tokens",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "encoder.layer.": "blocks.",
        "attention.attention.query": "attn.q",
        "attention.attention.key": "attn.k",
        "attention.attention.value": "attn.v",
        "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "layernorm.": "norm.",
    },
    ("embeddings.mask_token",),
)
TIMM = Format(  # and DeiT's, DeiT III's, DINOv2's own, ours
    "cls_token",
    {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"},
    ("head.", "head_dist.", "mask_token"),
)
FORMATS = (TORCHVISION, OPEN_CLIP, HF_CLIP, HF_DINOV2, TIMM)


def load_backbone(model: nn.Module, path: str | Path) -> list[str]:
    """Load pretrained weights into a ViT or ResNet, or into every one of a model.

    Returns the names of the weights left out, see FORMATS. Position embeddings are resized when the
    image size differs. `path` may be "deit": DeiT-B's released file, by torch.hub, or "imagenet":
    torchvision's of this ResNet. Raises UserError for a file that cannot be read or is not this
    backbone's.
    """
    vits = [module for module in model.modules() if isinstance(module, Backbone)]  # of one shape
    vit = vits[0]
    if isinstance(vit, ResNet):
        return load_resnets(vits, path)
    if str(path) == "deit":
        path = fetch_deit(distilled=vit.dist_token is not None)
    checkpoint = read_file(path)
    state, dropped = read_state(checkpoint, path)
    check_names(state, vit.state_dict(), path)
    config = checkpoint.get("config")
    image_size = config.get("image_size") if isinstance(config, dict) else None
    state["pos_embed"] = fit_pos_embed(state, vit, image_size)
    own = dict(state)
    stacked = vit.patch_embed.proj.in_channels // 3
    if stacked > 1:  # early fusion: each modality starts with its share
        weight = state["patch_embed.proj.weight"]
        own["patch_embed.proj.weight"] = weight.repeat(1, stacked, 1, 1) / stacked
    check_shapes(own, vit.state_dict(), path, state)
    for vit in vits:
        vit.load_state_dict(own)
    return dropped


def load_resnets(resnets: list[ResNet], path: str | Path) -> list[str]:
    """As load_backbone, from torchvision's state dict of a whole ResNet, whose `fc` is left out."""
    if str(path) == "imagenet":
        path = fetch_resnet(resnets[0].layers)
    state, _ = read_state(read_file(path), path)
    own, expected = resnet_weights(state), resnet_weights(resnets[0].state_dict())
    check_names(own, expected, path)
    check_shapes(own, expected, path)
    for resnet in resnets:
        resnet.load_state_dict(own)
    return [name for name in state if name.startswith("fc.")]


def resnet_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without classifier, and without BatchNorm's counters, which old files lack."""
    left_out = [n for n in state if n.startswith("fc.") or n.endswith(".num_batches_tracked")]
    return {name: weight for name, weight in state.items() if name not in left_out}


def read_file(path: str | Path) -> dict:
    """A state dict, or a checkpoint that holds one. Raises UserError for anything else."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return runtime.load_checkpoint(path)
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path}: needs the package safetensors: pip install safetensors") from None
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a safetensors file ({error}); use another copy") from None


def read_state(checkpoint: dict, path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a ViT by timm's names, in float32, and the names of those left out."""
    state = checkpoint.get("model", checkpoint.get("state_dict", checkpoint))
    weights = state.values() if isinstance(state, dict) else [None]
    if not all(isinstance(w, Tensor) and w.layout is torch.strided for w in weights):
        raise UserError(f"{path}: holds no state dict of a ViT")
    if any(name.startswith("backbone.") for name in state):  # a checkpoint of ours
        own = {name: w for name, w in state.items() if name.startswith("backbone.")}
        state = {name.removeprefix("backbone."): weight for name, weight in own.items()}
    marked = (known for known in FORMATS if any(name.endswith(known.mark) for name in state))
    known = next(marked, TIMM)
    dropped = [name for name in state if name.startswith(known.left_out)]
    state = {name: w.float() for name, w in state.items() if name not in dropped}
    for theirs, ours in known.names.items():
        state = {name.replace(theirs, ours): weight for name, weight in state.items()}
    try:
        rearrange(state)
    except (RuntimeError, IndexError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: its weights do not fit one another ({reason})") from None
    return state, dropped


def rearrange(state: dict[str, Tensor]) -> None:
    """Give weights that have our names by now our shapes, too, in place."""
    for name in [name for name in state if ".attn.q." in name]:
        parts = [name.replace(".q.", f".{part}.") for part in "qkv"]
        if all(part in state for part in parts):  # or they are named as missing, left over
            weights = [state.pop(part) for part in parts]
            state[name.replace(".q.", ".qkv.")] = torch.cat(weights)
    for name in state.keys() & {"cls_token", "pos_embed"}:  # CLIP's have no batch
        state[name] = state[name].reshape(1, -1, state[name].shape[-1])
    if "register_tokens" in state and {"cls_token", "pos_embed"} <= state.keys():
        # As timm has DINOv2: only CLS and patches have positions, and that of CLS is a part of it
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]


def check_names(state: dict[str, Tensor], backbone: dict[str, Tensor], path: str | Path) -> None:
    expected = backbone.keys()
    missing, unknown = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if not missing and not unknown:
        return
    hint = fitting(state)
    if missing == ["dist_token"] and not unknown:
        hint = "a model without the distillation token takes --no-distilled"
    if unknown == ["dist_token"] and not missing:
        hint = "it has a distillation token: --backbone deit-b, without --no-distilled"
    raise UserError(
        f"{path}: not the weights of this backbone:"
        f" lacks {_some(missing)}, has also {_some(unknown)}; {hint}"
    )


def check_shapes(
    state: dict[str, Tensor],
    backbone: dict[str, Tensor],
    path: str | Path,
    file: dict | None = None,
) -> None:
    """`file`: the weights as they were read, where `state` are repeated ones."""
    for name, weight in backbone.items():
        if state[name].shape != weight.shape:
            raise UserError(
                f"{path}: {name} has the shape {tuple(state[name].shape)}, this backbone's has"
                f" {tuple(weight.shape)}; {fitting(file or state)}"
            )


def fitting(state: dict[str, Tensor]) -> str:
    """Which backbones have weights of these names and shapes, but for the positions."""
    found, given = [], {name: w.shape for name, w in state.items() if name != "pos_embed"}
    for backbone, row in BACKBONES.items():
        with torch.device("meta"):
            vit = MultiModalModel(GraFTConfig(**row), 1).new_backbone()
        if given == {name: w.shape for name, w in vit.state_dict().items() if name != "pos_embed"}:
            found.append(f"--backbone {backbone}")
    given = {name: w.shape for name, w in resnet_weights(state).items()}
    for backbone, row in RESNETS.items():
        with torch.device("meta"):
            own = resnet_weights(ResNet(row["resnet"]).state_dict())
        if given == {name: w.shape for name, w in own.items()}:
            found.append(f"--fusion hamnet --backbone {backbone}")
    return f"it fits {' or '.join(found)}" if found else "no --backbone has these names and shapes"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more or "nothing"


def fit_pos_embed(state: dict[str, Tensor], vit: ViT, image_size: tuple | None) -> Tensor:
    """The position embeddings for this ViT's grid; files of others are of square images."""
    pos_embed = state["pos_embed"]
    prefix = vit.prefix_tokens if vit.embed_class else 0
    num_patches = pos_embed.shape[1] - prefix
    patch_size = vit.patch_embed.proj.kernel_size[0]  # a file of another one is refused later
    if image_size:
        rows, columns = (side // patch_size for side in image_size)
    else:
        rows = columns = int(max(0, num_patches) ** 0.5)
    if (rows, columns) == vit.grid or not rows * columns == num_patches > 0:
        return pos_embed  # where the numbers do not match, the shapes are refused later
    return resize_pos_embed(pos_embed, prefix, (rows, columns), vit.grid)


def resize_pos_embed(
    pos_embed: Tensor, prefix: int, old: tuple[int, int], new: tuple[int, int]
) -> Tensor:
    """Resize the patches' positions (1, prefix + old, D) to another grid (rows, columns)."""
    grid = pos_embed[:, prefix:].unflatten(1, old).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    grid = F.interpolate(grid, new, mode="bicubic", antialias=True)
    return torch.cat([pos_embed[:, :prefix], grid.flatten(2).transpose(1, 2)], 1)


def fetch_deit(distilled: bool) -> Path:
    """DeiT-B's released file."""
    return fetch(DEIT_URL + DEIT_FILES[distilled])


def fetch_resnet(layers: int) -> Path:
    """The file of ImageNet weights that torchvision's ResNets had in HAMNet's days."""
    return fetch(torchvision.models.get_model_weights(f"resnet{layers}").IMAGENET1K_V1.url)


def fetch(url: str) -> Path:
    """A released file, fetched once into torch.hub's folder."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    try:
        with runtime.rank0_first():
            torch.hub.load_state_dict_from_url(url, weights_only=True)
    except OSError as error:
        raise UserError(
            f"{url}: cannot be fetched ({error}); fetch it elsewhere and put it at"
            f" {path}, or name a file by --backbone-weights FILE (none: train from random weights)"
        ) from None
    return path
