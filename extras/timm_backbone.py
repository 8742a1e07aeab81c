"""Any ViT of timm as backbone: DINOv2, DINOv3, CLIP, SigLIP, EVA-02, DeiT III, AugReg, ...

python train.py --backbone timm:vit_small_patch14_dinov2 --image-size 56 112 --backbone-weights FILE

timm builds the model, reads its releases and resizes its positions. Images are normalised by the
mean and std that it was pretrained with. Shapes: B samples, N tokens, D width.
"""

import logging
from contextlib import redirect_stdout
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor, nn

import runtime
from model import Backbone, load_strictly, patch_grid, read_state
from runtime import UserError

try:
    import timm
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from timm.layers import PatchEmbed
    from timm.models import Eva, VisionTransformer, eva, vision_transformer
except ImportError:
    raise UserError("--backbone timm:NAME: needs the package timm: pip install timm") from None

# In released files: classifiers, and what pools the tokens for them
HEADS = ("head.", "head_dist.", "attn_pool.", "fc_norm.")


def config_of(name: str) -> dict:
    """The fields of GraFTConfig that a model of timm decides."""
    vit = outline(name)
    heads = next(module.num_heads for module in vit.modules() if hasattr(module, "num_heads"))
    sizes = {"dim": vit.embed_dim, "depth": len(vit.blocks), "heads": heads}
    sizes["encoder_hidden"] = vit.embed_dim * 8 // 3  # as wide to it as the paper's is to DeiT-B
    return {"patch_size": vit.patch_embed.patch_size[0], "distilled": False, **sizes}


def outline(name: str) -> nn.Module:
    """A model of timm without memory for its weights.

    Raises UserError for an unknown name, and for what is not a plain ViT.
    """
    known = [*timm.list_models(), *timm.list_pretrained()]
    if name not in known:  # a stranger's checkpoint could name a repository, which timm would fetch
        near = ", ".join(get_close_matches(name, known, 3)) or "timm.list_models()"
        raise UserError(f"--backbone timm:{name}: not in timm {timm.__version__}; see {near}")
    with torch.device("meta"):
        vit = timm.create_model(name, num_classes=0)
    plain = isinstance(vit, VisionTransformer | Eva) and isinstance(vit.patch_embed, PatchEmbed)
    if not plain:
        raise UserError(
            f"--backbone timm:{name}: no plain ViT ({type(vit).__name__}); expected a model of"
            " timm's classes VisionTransformer or Eva, e.g. timm:vit_small_patch14_dinov2"
        )
    return vit


class TimmViT(Backbone):
    """(B, 3, H, W) -> all tokens after the final norm, (B, N, D): CLS, registers, patches.

    Fusions expect a first token that stands for the whole image: a ViT without a CLS token (SigLIP)
    gets the mean of its patches there.
    """

    def __init__(self, name: str, image_size: tuple[int, int], stride: int = 0):
        super().__init__()
        plan = outline(name)
        P = plan.patch_embed.patch_size[0]
        rows, columns = patch_grid(image_size, P, stride)
        self.name, self.has_cls = name, plan.cls_token is not None
        self.vit = timm.create_model(
            name,
            img_size=(rows * P, columns * P),  # of as many patches, if they did not overlap
            num_classes=0,
            # Of all poolings, those without weights of their own, which no token would train
            global_pool="token" if self.has_cls else "",
            patch_drop_rate=0.5,  # any but 0, so that timm adds the module that `forward` sets
        )
        self.vit.patch_embed.img_size = tuple(image_size)
        self.vit.patch_embed.strict_img_size = True  # else DINOv3's takes whole patches only
        if stride:
            self.vit.patch_embed.proj.stride = (stride, stride)
        self.dim, self.grid = self.vit.embed_dim, self.vit.patch_embed.grid_size
        self.prefix_tokens = self.vit.num_prefix_tokens + (not self.has_cls)
        self.num_tokens = self.prefix_tokens + self.grid[0] * self.grid[1]
        about = self.vit.pretrained_cfg
        self.mean_std = tuple(about["mean"]), tuple(about["std"])

    def forward(self, images: Tensor, patch_dropout: float = 0.0) -> Tensor:
        """`patch_dropout` leaves out that share of each image's patches (Liu et al. 2023)."""
        dropout = self.vit.patch_drop
        dropout.prob, dropout.training = patch_dropout, patch_dropout > 0  # also when frozen
        tokens = self.vit.forward_features(images)
        if not self.has_cls:
            patches = tokens[:, self.vit.num_prefix_tokens :]
            tokens = torch.cat([patches.mean(1, keepdim=True), tokens], 1)
        return tokens

    def prunable(self) -> list[nn.Module]:
        return [layer for layer in self.vit.blocks.modules() if isinstance(layer, nn.Linear)]

    def load(self, path: str | Path) -> list[str]:
        """Read a file as timm or the model's authors release it, or a run of ours.

        "pretrained" has timm fetch what the model's name stands for.
        """
        if str(path) == "pretrained":
            state, grid = self.fetch(), None
        elif Path(path).suffix == ".safetensors":
            state, grid = read_safetensors(path), None
        else:
            state, grid = read_state(path)
        P = self.vit.patch_embed.patch_size[0]
        if grid:  # of a run of ours, whose positions need not fill a square as a release's do
            self.vit.pretrained_cfg["input_size"] = (3, grid[0] * P, grid[1] * P)
        state = {name.removeprefix("vit."): weight for name, weight in state.items()}
        # timm would resize patches without a word, and a ViT-B/32 would pass for a ViT-B/16
        for other in {weight.shape[-1] for weight in state.values() if weight.ndim == 4} - {P}:
            raise UserError(f"{path}: has patches of {other} pixels, timm:{self.name} of {P}")
        try:
            with redirect_stdout(None):  # timm prints a line for each block of DINOv3
                if isinstance(self.vit, Eva):
                    state = eva.checkpoint_filter_fn(state, self.vit)
                else:  # True: DeiT III's names, too
                    state = vision_transformer.checkpoint_filter_fn(state, self.vit, True)
        except Exception as error:  # a converter fails in as many ways as files differ
            raise UserError(f"{path}: no weights of timm:{self.name} ({short(error)})") from None
        if "norm.weight" not in state:  # models that pool first have their final norm behind it
            state = {name.replace("fc_norm.", "norm."): weight for name, weight in state.items()}
        return load_strictly(self.vit, state, path, HEADS)

    def fetch(self) -> dict[str, Tensor]:
        """The released weights, by timm's names."""
        runtime.print0(f"timm:{self.name}: fetched, unless it is in the hub's cache")
        try:
            with runtime.rank0_first():
                logging.disable(logging.WARNING)  # the hub's client tells each of its tries
                return timm.create_model(self.name, pretrained=True).state_dict()
        except Exception as error:  # the errors of hub clients have no common type
            raise UserError(
                f"--backbone-weights pretrained: timm cannot fetch {self.name} ({short(error)});"
                " fetch its file elsewhere and name that: --backbone-weights FILE"
            ) from None
        finally:
            logging.disable(logging.NOTSET)


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({short(error)})") from None


def short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
