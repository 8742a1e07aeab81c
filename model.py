"""GraFT, the Gradual Fusion Transformer (section 3 of the paper), by hand: ViT backbone, modality encoders, fusion.

Shapes: B samples, M modalities, N tokens a modality, D width, L fusion tokens, C identities, H heads.
"""

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import runtime
from runtime import UserError

# --- backbone (section 3.2)


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each to the model's width: Eq. (1). (B, 3, H, W) -> (B, patches, D)."""

    def __init__(self, patch_size: int, dim: int, channels: int = 3):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        P = self.proj.kernel_size[0]
        patches = x.view(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5)  # (B, H/P, W/P, C, P, P)
        return F.linear(patches.reshape(B, -1, C * P * P), self.proj.weight.flatten(1), self.proj.bias)


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D/H)) v, all (B, H, N, D/H): torch's fused kernel, except where the plain formula is faster.

    On CPUs that is in bf16 (2 times forward, 9 times with the backward pass at 34 tokens) and to train on short sequences.
    """
    if q.device.type == "cpu" and (q.dtype == torch.bfloat16 or (q.requires_grad and k.shape[-2] < 64)):
        with torch.autocast("cpu", enabled=False):
            weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)  # (B, H, N, N)
            return F.dropout(weights, dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # 3 x (B, H, N, D/H)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, hidden: int, head_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, head_dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al. 2021), with DeiT's distillation token (Touvron et al. 2021) if `distilled`.

    (B, 3, H, W) -> all tokens after the final norm, (B, N, D): CLS, then distillation, then patches row by row.
    Parameters are named as in timm and in the released DeiT checkpoints. `blocks` gives (heads, MLP channels) of each block
    of a pruned one; the width of a head stays D / `heads`. Raises UserError for sizes that do not divide.
    """

    def __init__(
        self, image_size=(224, 224), patch_size=16, dim=768, depth=12, heads=12, distilled=True, channels=3, blocks=()
    ):
        super().__init__()
        if any(side % patch_size for side in image_size):
            raise UserError(f"image size {image_size[0]}x{image_size[1]}: patch {patch_size} does not divide both sides")
        if dim % heads:
            raise UserError(f"width {dim}: {heads} heads do not divide it")
        self.image_size = tuple(image_size)
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.frozen = False
        self.checkpointing = False  # recompute blocks in the backward pass: less memory, a third more time
        self.patch_embed = PatchEmbed(patch_size, dim, channels)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)) if distilled else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.prefix_tokens + self.grid[0] * self.grid[1], dim))
        self.blocks = nn.ModuleList(Block(dim, *sizes, dim // heads) for sizes in blocks or [(heads, 4 * dim)] * depth)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for parameter in (self.cls_token, self.dist_token, self.pos_embed):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    @property
    def prefix_tokens(self) -> int:
        return 1 if self.dist_token is None else 2

    def freeze(self, frozen: bool) -> None:
        """A frozen one has neither gradients nor a graph, and `train` leaves it in eval mode."""
        self.frozen = frozen
        self.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "ViT":
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor, patch_dropout: float = 0.0) -> Tensor:
        """`patch_dropout` leaves that share of each image's patches out, by chance (PatchDropout, Liu et al. 2023)."""
        if images.shape[-2:] != self.image_size:
            raise ValueError(f"images of {tuple(images.shape[-2:])}: the model takes {self.image_size}")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            prefix = [token.expand(len(images), -1, -1) for token in (self.cls_token, self.dist_token) if token is not None]
            x = torch.cat([*prefix, self.patch_embed(images)], 1) + self.pos_embed  # (B, N, D)
            if patch_dropout:
                x = torch.cat([x[:, : len(prefix)], random_patches(x[:, len(prefix) :], 1 - patch_dropout)], 1)
            for block in self.blocks:
                if self.checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            return self.norm(x)  # Eq. (2)


def random_patches(patches: Tensor, share: float) -> Tensor:
    """A random share of each image's patches (B, P, D), at least one."""
    B, P, D = patches.shape
    chosen = torch.rand(B, P, device=patches.device).topk(max(1, round(share * P)), 1).indices
    return patches.gather(1, chosen[..., None].expand(-1, -1, D))


# --- modality encoder (sections 3.1, 5.2)


class SelfAttention(nn.Module):
    """torch.nn.MultiheadAttention's parameters; queries may be fewer than the tokens they look at."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        D = tokens.shape[-1]
        q = F.linear(queries, self.in_proj_weight[:D], self.in_proj_bias[:D])
        k, v = F.linear(tokens, self.in_proj_weight[D:], self.in_proj_bias[D:]).chunk(2, -1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, N, D/H)
        x = attend(q, k, v, self.dropout if self.training else 0.0)
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def weights(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """How much each query looks at each token: (B, H, queries, N), rows add up to 1."""
        D = tokens.shape[-1]
        q = F.linear(queries, self.in_proj_weight[:D], self.in_proj_bias[:D])
        k = F.linear(tokens, self.in_proj_weight[D : 2 * D], self.in_proj_bias[D : 2 * D])
        q, k = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k))  # (B, H, N, D/H)
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)


class ModalityEncoder(nn.Module):
    """One torch.nn.TransformerEncoderLayer (post-norm, ReLU), its parameter names and maths. (B, N, D) -> (B, N, D).

    `outputs`, a list of token positions, computes those alone, (B, len(outputs), D): each looks at all tokens, so the
    result is the same for a fraction of the work.
    """

    def __init__(self, dim: int = 768, heads: int = 8, hidden: int = 2048, dropout: float = 0.1):
        super().__init__()
        if dim % heads:
            raise UserError(f"width {dim}: {heads} encoder heads do not divide it")
        self.self_attn = SelfAttention(dim, heads, dropout)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, outputs: list[int] | None = None) -> Tensor:
        x = tokens if outputs is None else tokens[:, outputs]
        x = self.norm1(x + self.dropout(self.self_attn(x, tokens)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(hidden)))


# --- GraFT (sections 3.3, 3.4; Fig. 3)


@dataclass
class GraFTConfig:
    """What a model is made of; the defaults are the paper's model for RGBNT100."""

    modalities: tuple[str, ...] = ("rgb", "nir", "tir")
    num_ids: int = 50
    image_size: tuple[int, int] = (224, 224)  # height, width; paper, 5.2
    patch_size: int = 16  # paper, 3.4
    dim: int = 768  # DeiT-B; paper, 3.2
    depth: int = 12
    heads: int = 12
    distilled: bool = True  # published code
    encoder_heads: int = 8  # published code
    encoder_hidden: int = 2048  # torch's default; paper, 5.2
    dropout: float = 0.1  # torch's default; paper, 5.2
    fusion_tokens: int = 1  # paper, 5.2
    data_token: int = 0  # paper, Eq. (11)
    bnneck_features: bool = False  # tested is what leaves the BNNeck; the paper: what enters it
    fusion: str = "graft"  # or a baseline, see FUSIONS
    blocks: tuple[tuple[int, int], ...] = ()  # of a pruned backbone: heads and MLP channels of each block

    def __post_init__(self):
        """Raises UserError for what no model has, since a configuration may come from a stranger's file."""
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not type(field.default):
                raise UserError(f"{field.name} {value!r}: expected a {type(field.default).__name__}")
            if type(value) is int and not 0 <= value < 2**20:
                raise UserError(f"{field.name} {value}: expected a number from 0 to a million")
        many = max(self.depth, self.fusion_tokens, len(self.modalities), len(self.blocks))
        if many > 1000:
            raise UserError(f"{many} blocks, fusion tokens or modalities: expected at most 1000")


BACKBONES = {
    "deit-b": {},  # DeiT-B, the defaults above
    "small": {"dim": 192, "depth": 6, "heads": 3, "encoder_hidden": 512},  # ours, for the embedded data set
}


class Embeddings(NamedTuple):
    """Both (B, L * D), float32. `fusion` is the embedding, Eq. (7); `data` the sampled data token, Eq. (12)."""

    fusion: Tensor
    data: Tensor


class SyncBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d over the batches of all ranks. torch.nn.SyncBatchNorm does the same, on CUDA only."""

    def forward(self, x: Tensor) -> Tensor:  # (B, D)
        if not self.training:
            return super().forward(x)
        B, D = x.shape
        total = runtime.all_sum(torch.cat([x.sum(0), x.new_tensor([B])]))
        count = total[D].detach()
        if count < 2:
            raise UserError("batch of 1: BatchNorm cannot train on it; raise --batch-size")
        mean = total[:D] / count
        variance = runtime.all_sum((x - mean).square().sum(0)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias


class MultiModalModel(nn.Module):
    """What GraFT and its baselines share. model({modality: (B, 3, H, W)}) -> Embeddings; `classify` -> (B, C).

    Any of the modalities may be given. Raises ValueError for none, or for an unknown one.
    """

    def __init__(self, config: GraFTConfig, width: int):
        super().__init__()
        self.config, self.width = config, width
        self.patch_dropout = 0.0  # of a training step, see ViT
        self.bottleneck = SyncBatchNorm1d(width)  # BNNeck (Luo et al. 2019)
        self.bottleneck.bias.requires_grad_(False)
        self.classifier = nn.Linear(width, config.num_ids, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def look(self, backbone: ViT, images: Tensor) -> Tensor:
        """A backbone's tokens of images (B, 3, H, W): all, but for the patches that a training step leaves out."""
        return backbone(images, self.patch_dropout if self.training else 0.0)

    def new_backbone(self, channels: int = 3) -> ViT:
        config = self.config
        sizes = (config.image_size, config.patch_size, config.dim, config.depth, config.heads, config.distilled)
        return ViT(*sizes, channels, config.blocks)

    def new_encoder(self) -> ModalityEncoder:
        config = self.config
        return ModalityEncoder(config.dim, config.encoder_heads, config.encoder_hidden, config.dropout)

    def forward(self, images: dict[str, Tensor]) -> Embeddings:
        if not images or images.keys() - set(self.config.modalities):
            raise ValueError(f"modalities {', '.join(images) or 'none'}: the model has {', '.join(self.config.modalities)}")
        return self.fuse(images)

    def classify(self, fusion: Tensor) -> Tensor:
        """Logits (B, C) of fusion embeddings (B, width), behind the BNNeck; both in float32."""
        with torch.autocast(fusion.device.type, enabled=False):
            return self.classifier(self.bottleneck(fusion.float()))

    @property
    def backbones(self) -> list[ViT]:
        return [module for module in self.modules() if isinstance(module, ViT)]

    def freeze_backbone(self, frozen: bool) -> None:
        """Stage 1 trains on a frozen backbone (section 4.1)."""
        for backbone in self.backbones:
            backbone.freeze(frozen)
        self.train(self.training)

    def num_parameters(self, nonzero: bool = False) -> int:
        """Parameters of what makes the embedding: all but the BNNeck and the classifier, which only training needs."""
        head = {*self.bottleneck.parameters(), *self.classifier.parameters()}
        parameters = [parameter for parameter in self.parameters() if parameter not in head]
        return sum(int(parameter.count_nonzero()) if nonzero else parameter.numel() for parameter in parameters)


class SharedBackboneModel(MultiModalModel):
    """One backbone sees the images of all modalities, in one batch."""

    def __init__(self, config: GraFTConfig, width: int):
        super().__init__(config, width)
        self.backbone = self.new_backbone()

    def extract(self, images: dict[str, Tensor]) -> Tensor:
        """Data tokens of all modalities, (B, M, N, D)."""
        B, M = len(next(iter(images.values()))), len(images)
        tokens = self.look(self.backbone, torch.cat(list(images.values())))  # (M * B, N, D)
        return tokens.unflatten(0, (M, B)).transpose(0, 1)


class GraFT(SharedBackboneModel):
    """The Gradual Fusion Transformer: L fusion tokens pass each modality's own encoder beside its data tokens."""

    def __init__(self, config: GraFTConfig):
        L = config.fusion_tokens
        super().__init__(config, L * config.dim)
        self.encoders = nn.ModuleDict({modality: self.new_encoder() for modality in config.modalities})
        self.fusion_token = nn.Parameter(torch.empty(1, L, config.dim))
        nn.init.xavier_uniform_(self.fusion_token[0])
        tokens = self.backbone.pos_embed.shape[1]
        if not 0 <= config.data_token <= tokens - L:
            raise UserError(f"data token {config.data_token}: expected 0 to {tokens - L} ({tokens} data tokens, {L} taken)")
        # Of each encoder's output only the fusion tokens, and as many data tokens, go on
        self.outputs = [*range(L), *range(L + config.data_token, 2 * L + config.data_token)]

    def fuse(self, images: dict[str, Tensor]) -> Embeddings:
        tokens = self.extract(images)  # (B, M, N, D)
        fusion, data = [], []
        for i, modality in enumerate(images):
            joined = torch.cat([self.fusion_token.expand(len(tokens), -1, -1), tokens[:, i]], 1)  # Eq. (3)
            encoded = self.encoders[modality](joined, self.outputs)  # Eq. (4)
            z_f, z_d = encoded.flatten(1).float().chunk(2, 1)  # Eq. (5), (11): 2 x (B, L * D)
            fusion.append(z_f)
            data.append(z_d)
        return Embeddings(torch.stack(fusion).mean(0), torch.stack(data).mean(0))  # Eq. (6), (12)

    @torch.no_grad()
    def attention(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """Where the fusion tokens look in each modality's encoder (Fig. 4): weights of the patches, (B, rows, columns).

        Means over heads and fusion tokens; with what goes to the fusion, CLS and distillation tokens they add up to 1.
        """
        tokens, L = self.extract(images), self.config.fusion_tokens
        result = {}
        for i, modality in enumerate(images):
            fusion = self.fusion_token.expand(len(tokens), -1, -1)
            weights = self.encoders[modality].self_attn.weights(fusion, torch.cat([fusion, tokens[:, i]], 1)).mean((1, 2))
            result[modality] = weights[:, L + self.backbone.prefix_tokens :].unflatten(1, self.backbone.grid)
        return result


# --- baselines (Tables 1, 2, 5; section 1). Their embedding is data and fusion token in one, so they are trained with FFF.


class VanillaFusion(SharedBackboneModel):
    """Tokens of all modalities, concatenated, through one encoder layer; `take` says what is the embedding: "cls" a new
    learnable token, "first-cls" the first modality's own CLS token (what the published code takes), "average" the mean.
    """

    def __init__(self, config: GraFTConfig, take: str):
        super().__init__(config, config.dim)
        self.encoder, self.outputs = self.new_encoder(), None if take == "average" else [0]
        if take == "cls":
            self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
            nn.init.xavier_uniform_(self.cls_token[0])

    def fuse(self, images: dict[str, Tensor]) -> Embeddings:
        tokens = self.extract(images).flatten(1, 2)  # (B, M * N, D)
        if hasattr(self, "cls_token"):
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        embedding = self.encoder(tokens, self.outputs).float().mean(1)
        return Embeddings(embedding, embedding)


class MultiStream(MultiModalModel):
    """A backbone and an encoder of its own for each modality; their CLS tokens' mean is the embedding."""

    def __init__(self, config: GraFTConfig):
        super().__init__(config, config.dim)
        self.backbone = nn.ModuleDict({modality: self.new_backbone() for modality in config.modalities})
        self.encoders = nn.ModuleDict({modality: self.new_encoder() for modality in config.modalities})

    def fuse(self, images: dict[str, Tensor]) -> Embeddings:
        streams = []
        for modality, image in images.items():
            streams.append(self.encoders[modality](self.look(self.backbone[modality], image), [0])[:, 0].float())
        embedding = torch.stack(streams).mean(0)
        return Embeddings(embedding, embedding)


class EarlyFusion(MultiModalModel):
    """Modalities stacked as channels of one image; the CLS token is the embedding. One that is absent is all zeros."""

    def __init__(self, config: GraFTConfig):
        super().__init__(config, config.dim)
        self.backbone, self.encoder = self.new_backbone(3 * len(config.modalities)), self.new_encoder()

    def fuse(self, images: dict[str, Tensor]) -> Embeddings:
        absent = torch.zeros_like(next(iter(images.values())))
        stacked = torch.cat([images.get(modality, absent) for modality in self.config.modalities], 1)  # (B, 3 * M, H, W)
        embedding = self.encoder(self.look(self.backbone, stacked), [0])[:, 0].float()
        return Embeddings(embedding, embedding)


FUSIONS = {
    "graft": GraFT,
    "cls": partial(VanillaFusion, take="cls"),
    "first-cls": partial(VanillaFusion, take="first-cls"),
    "average": partial(VanillaFusion, take="average"),
    "multistream": MultiStream,
    "early": EarlyFusion,
}


def build_model(config: GraFTConfig) -> MultiModalModel:
    """The model that `config` describes. Raises UserError for one that does not exist."""
    if config.fusion not in FUSIONS:
        raise UserError(f"fusion {config.fusion!r}: expected one of {', '.join(FUSIONS)}")
    return FUSIONS[config.fusion](config)


# --- pretrained backbones

DEIT_URL = "https://dl.fbaipublicfiles.com/deit/"
DEIT_FILES = {True: "deit_base_distilled_patch16_224-df68dfff.pth", False: "deit_base_patch16_224-b5f2ef4d.pth"}
HEADS = ("head.", "head_dist.", "heads.")  # classifiers of other data sets: the only weights left out
TORCHVISION_NAMES = {
    "class_token": "cls_token", "conv_proj": "patch_embed.proj", "encoder.pos_embedding": "pos_embed",
    "encoder.layers.encoder_layer_": "blocks.", "encoder.ln": "norm", "ln_1": "norm1", "ln_2": "norm2",
    "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj": "attn.proj",
    "mlp.linear_1": "mlp.fc1", "mlp.linear_2": "mlp.fc2", "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2",
}  # fmt: skip


def resize_pos_embed(pos_embed: Tensor, prefix: int, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Bicubic resizing of the patches' position embeddings (1, prefix + old patches, D) to another grid (rows, columns)."""
    grid = pos_embed[:, prefix:].unflatten(1, old).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    grid = F.interpolate(grid, new, mode="bicubic", antialias=True)
    return torch.cat([pos_embed[:, :prefix], grid.flatten(2).transpose(1, 2)], 1)


def load_backbone(model: nn.Module, path: str | Path) -> list[str]:
    """Load pretrained weights into a ViT, or into every ViT of a model; returns the names left out (classifiers only).

    Reads a released DeiT file ({"model": ...}), a timm or torchvision ViT state dict, and a checkpoint of this project.
    Position embeddings are resized when the image size differs. `path` may be "deit": the released file of DeiT-B, by
    torch.hub. Raises UserError where the file cannot be read, or a weight is missing, superfluous or of another shape.
    """
    vits = [module for module in model.modules() if isinstance(module, ViT)]  # of the same shape
    vit = vits[0]
    if str(path) == "deit":
        path = _fetch_deit(vit)
    checkpoint = runtime.load_checkpoint(path)
    state = checkpoint.get("model", checkpoint)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no state dict of a ViT")
    if any(name.startswith("backbone.") for name in state):
        state = {name.removeprefix("backbone."): w for name, w in state.items() if name.startswith("backbone.")}
    if "class_token" in state:
        for theirs, ours in TORCHVISION_NAMES.items():
            state = {name.replace(theirs, ours): weight for name, weight in state.items()}
    dropped = [name for name in state if name.startswith(HEADS)]
    state = {name: weight.float() for name, weight in state.items() if name not in dropped}
    expected = vit.state_dict()
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        hint = "; a model without the distillation token takes --no-distilled" if missing == ["dist_token"] else ""
        hint = "; it has a distillation token: leave out --no-distilled" if unknown == ["dist_token"] else hint
        raise UserError(f"{path}: not the weights of this backbone: lacks {_some(missing)}, has also {_some(unknown)}{hint}")
    rows = checkpoint.get("config", {}).get("image_size")
    patches = state["pos_embed"].shape[1] - vit.prefix_tokens
    patch = state["patch_embed.proj.weight"].shape[-1]
    old = tuple(side // patch for side in rows) if rows else (int(patches**0.5),) * 2  # other code bases: square images
    if old != vit.grid and old[0] * old[1] == patches:
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], vit.prefix_tokens, old, vit.grid)
    if (stacked := vit.patch_embed.proj.in_channels // 3) > 1:  # early fusion: each modality starts with its share
        state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].repeat(1, stacked, 1, 1) / stacked
    for name, weight in expected.items():
        if state[name].shape != weight.shape:
            raise UserError(
                f"{path}: {name} has the shape {tuple(state[name].shape)}, this backbone's has {tuple(weight.shape)};"
                " choose the --backbone that the file was made for"
            )
    for vit in vits:
        vit.load_state_dict(state)
    return dropped


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "nothing"


def _fetch_deit(vit: ViT) -> Path:
    name = DEIT_FILES[vit.dist_token is not None]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    try:
        with runtime.rank0_first():
            torch.hub.load_state_dict_from_url(DEIT_URL + name, weights_only=True)
    except OSError as error:
        raise UserError(
            f"{DEIT_URL}{name}: cannot be fetched ({error}); fetch it elsewhere and put it at {path},"
            " or name a file by --backbone-weights FILE (none: train from random weights)"
        ) from None
    return path
