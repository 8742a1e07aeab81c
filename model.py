"""GraFT, the Gradual Fusion Transformer (section 3 of the paper): ViT, modality encoders, fusion.

Shapes: B samples, M modalities, N tokens of a modality, D width, L fusion tokens, C identities,
H heads, P patch size.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import runtime
from runtime import UserError

# --- backbone (section 3.2)


@dataclass(kw_only=True)
class Traits:
    """How the ViTs of CLIP, DINOv2 and DeiT III differ from DeiT, whose traits are the defaults."""

    pre_norm: bool = False  # CLIP: normalise the blocks' input; the patch embedding has no bias
    activation: str = "gelu"
    norm_eps: float = 1e-6
    layer_scale: bool = False  # multiply each block's updates by a learned vector
    registers: int = 0  # learned tokens between CLS and patches (Darcet et al. 2024)
    embed_class: bool = True  # the tokens before the patches have position embeddings, too


DEIT = Traits()


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


# OpenAI trained CLIP with the approximation, so its weights need it; no file says which one it is
ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class PatchEmbed(nn.Module):
    """Cut an image into patches, project each to the model's width: Eq. (1).

    (B, 3, H, W) -> (B, patches, D), row by row.
    """

    def __init__(self, patch_size: int, dim: int, channels: int = 3, bias: bool = True):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_size, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        B, C, H, W = images.shape
        P = self.proj.kernel_size[0]
        # The convolution as the matrix product it is: on CPUs several times as fast
        patches = images.view(B, C, H // P, P, W // P, P)  # rows and columns of patches
        patches = patches.permute(0, 2, 4, 1, 3, 5)  # (B, H/P, W/P, C, P, P)
        patches = patches.reshape(B, -1, C * P * P)  # (B, patches, C * P * P)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, H, N, D/H)
        x = attend(q, k, v).transpose(1, 2).flatten(2)  # (B, N, D)
        return self.proj(x)


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, activation: str = "gelu"):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.activation = ACTIVATIONS[activation]
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class LayerScale(nn.Module):
    """(B, N, D) times a learned vector: small at first, so that deep ViTs train stably."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))  # DINOv2's start

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, heads: int, hidden: int, head_dim: int, traits: Traits = DEIT):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, traits.norm_eps)
        self.attn = Attention(dim, heads, head_dim)
        self.ls1 = LayerScale(dim) if traits.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, traits.norm_eps)
        self.mlp = MLP(dim, hidden, traits.activation)
        self.ls2 = LayerScale(dim) if traits.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Backbone(nn.Module):
    """What is pretrained, and is frozen or trained as a whole."""

    frozen = False
    checkpointing = False  # recompute blocks in the backward pass: less memory, more time

    def freeze(self, frozen: bool) -> None:
        """A frozen one has neither gradients nor a graph, and `train` leaves it in eval mode."""
        self.frozen = frozen
        self.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "Backbone":
        return super().train(mode and not self.frozen)

    def graph(self):
        """Context of a forward pass: frozen, no graph is built at all."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen)


class ViT(Backbone):
    """Vision Transformer (Dosovitskiy et al. 2021), with DeiT's distillation token if `distilled`.

    (B, 3, H, W) -> all tokens after the final norm, (B, N, D): CLS, distillation, registers, then
    the patches row by row. Parameters are named as in timm and in the released DeiT checkpoints.
    `traits` are those of another ViT than DeiT. `blocks` gives (heads, MLP channels) of each block
    of a pruned one, whose heads keep their width D / `heads`. Raises UserError for sizes that do
    not divide.
    """

    def __init__(
        self,
        image_size=(224, 224),
        patch_size=16,
        dim=768,
        depth=12,
        heads=12,
        distilled=True,
        *,
        channels=3,
        blocks=(),
        traits=DEIT,
    ):
        super().__init__()
        if any(side % patch_size for side in image_size):
            size = "x".join(map(str, image_size))
            nearest = "x".join(str(max(1, round(n / patch_size)) * patch_size) for n in image_size)
            raise UserError(
                f"image size {size}: patch {patch_size} does not divide both sides;"
                f" nearest is {nearest}"
            )
        if dim % heads:
            raise UserError(f"width {dim}: {heads} heads do not divide it")
        self.image_size = tuple(image_size)
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.patch_embed = PatchEmbed(patch_size, dim, channels, bias=not traits.pre_norm)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)) if distilled else None
        registers = traits.registers
        self.reg_token = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.prefix_tokens = 1 + bool(distilled) + registers  # those before the patches
        num_patches = self.grid[0] * self.grid[1]
        self.num_tokens = self.prefix_tokens + num_patches
        self.embed_class = traits.embed_class
        positions = self.num_tokens if self.embed_class else num_patches
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, dim))
        self.norm_pre = nn.LayerNorm(dim, traits.norm_eps) if traits.pre_norm else nn.Identity()
        sizes = blocks or [(heads, 4 * dim)] * depth
        self.blocks = nn.ModuleList(Block(dim, *size, dim // heads, traits) for size in sizes)
        self.norm = nn.LayerNorm(dim, traits.norm_eps)
        self.init_weights()

    def init_weights(self) -> None:
        for parameter in (self.cls_token, self.dist_token, self.pos_embed, self.reg_token):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor, patch_dropout: float = 0.0) -> Tensor:
        """`patch_dropout` leaves out that share of each image's patches (Liu et al. 2023)."""
        if images.shape[-2:] != self.image_size:
            found = tuple(images.shape[-2:])
            raise ValueError(f"images of {found}: the model takes {self.image_size}")
        with self.graph():  # frozen, stage 1's memory and time are the encoders' alone
            x = self.embed(images)  # (B, N, D)
            # After the positions are added, so that a patch that stays knows where it was
            if patch_dropout:
                prefix, patches = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
                x = torch.cat([prefix, random_patches(patches, 1 - patch_dropout)], 1)
            for block in self.blocks:
                if self.checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            return self.norm(x)  # Eq. (2)

    def embed(self, images: Tensor) -> Tensor:
        """The blocks' input: the tokens before the patches, patches, positions, (B, N, D)."""
        tokens = (self.cls_token, self.dist_token, self.reg_token)
        prefix = [token.expand(len(images), -1, -1) for token in tokens if token is not None]
        patches = self.patch_embed(images)
        if self.embed_class:
            x = torch.cat([*prefix, patches], 1) + self.pos_embed
        else:
            x = torch.cat([*prefix, patches + self.pos_embed], 1)
        return self.norm_pre(x)


def random_patches(patches: Tensor, share: float) -> Tensor:
    """A random share of each image's patches, (B, patches, D) -> (B, some, D), at least one."""
    B, num_patches, D = patches.shape
    count = max(1, round(share * num_patches))
    kept = torch.rand(B, num_patches, device=patches.device).topk(count, 1).indices
    return patches.gather(1, kept[..., None].expand(-1, -1, D))


# --- modality encoder (sections 3.1, 5.2)


class CrossAttention(nn.Module):
    """torch.nn.MultiheadAttention's parameters; queries (B, Q, D) attend to tokens (B, N, D)."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    # The fusion token's output is all that the loss sees, so queries are projected apart: one
    # token's instead of all N, which is most of what an encoder layer costs

    def project(self, queries: Tensor, tokens: Tensor) -> list[Tensor]:
        """Queries, keys and values of each head, (B, H, Q or N, D/H)."""
        D = tokens.shape[-1]
        q = F.linear(queries, self.in_proj_weight[:D], self.in_proj_bias[:D])
        k, v = F.linear(tokens, self.in_proj_weight[D:], self.in_proj_bias[D:]).chunk(2, -1)
        return [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v)]

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        q, k, v = self.project(queries, tokens)
        x = attend(q, k, v, self.dropout if self.training else 0.0)
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def attention(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """How much each query attends to each token: (B, H, Q, N), rows add up to 1."""
        q, k, _ = self.project(queries, tokens)
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)


class ModalityEncoder(nn.Module):
    """One torch.nn.TransformerEncoderLayer (post-norm, ReLU): its parameter names and maths.

    (B, N, D) -> (B, N, D). Given `queries` (B, Q, D), some of the tokens, only their outputs are
    computed, (B, Q, D): each attends to all tokens, so they are the same for a fraction of the
    work.
    """

    def __init__(self, dim: int = 768, heads: int = 8, hidden: int = 2048, dropout: float = 0.1):
        super().__init__()
        if dim % heads:
            raise UserError(f"width {dim}: {heads} encoder heads do not divide it")
        self.self_attn = CrossAttention(dim, heads, dropout)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, queries: Tensor | None = None) -> Tensor:
        x = tokens if queries is None else queries
        x = self.norm1(x + self.dropout(self.self_attn(x, tokens)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(hidden)))


# --- GraFT (sections 3.3, 3.4; Fig. 3)


@dataclass
class GraFTConfig(Traits):
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
    test_token: str = "fusion"  # paper, Eq. (7); or "data", see D23
    bnneck_features: bool = False  # test what leaves the BNNeck; the paper: what enters it
    fusion: str = "graft"  # or a baseline
    blocks: tuple[tuple[int, int], ...] = ()  # of a pruned backbone: heads, MLP channels of each
    resnet: int = 0  # layers of HAMNet's ResNets, 18 or 50; 0: a ViT

    def __post_init__(self):
        """Raises UserError for what no model has: a config may come from a stranger's file."""
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not type(field.default):
                expected = type(field.default).__name__
                raise UserError(f"{field.name} {value!r}: expected a {expected}")
            if type(value) is int and not 0 <= value < 2**20:
                raise UserError(f"{field.name} {value}: expected a number from 0 to a million")
        tokens = max(self.fusion_tokens, self.registers)
        largest = max(self.depth, tokens, len(self.modalities), len(self.blocks))
        if largest > 1000:
            raise UserError(
                f"{largest} blocks, fusion tokens, registers or modalities: expected at most 1000"
            )
        resnets = " or ".join(RESNETS)
        if self.resnet and {"resnet": self.resnet} not in RESNETS.values():
            raise UserError(f"resnet {self.resnet}: expected {resnets}")
        if self.resnet and self.fusion != "hamnet":
            raise UserError(
                f"--backbone resnet{self.resnet}: for --fusion hamnet; --fusion {self.fusion} takes"
                " a ViT, e.g. --backbone deit-b"
            )
        if self.fusion == "hamnet" and not self.resnet:
            raise UserError(f"--fusion hamnet: takes no ViT; expected --backbone {resnets}")
        if self.activation not in ACTIVATIONS:
            expected = " or ".join(ACTIVATIONS)
            raise UserError(f"activation {self.activation!r}: expected {expected}")
        if not 0 < self.norm_eps < 1:
            raise UserError(f"norm_eps {self.norm_eps}: expected a number between 0 and 1")
        if self.test_token not in ("fusion", "data"):
            raise UserError(f"test token {self.test_token!r}: expected fusion or data")
        if self.test_token == "data" and self.bnneck_features:
            raise UserError("the data token has no BNNeck: --test-token data, or BNNeck features")
        if self.test_token == "data" and self.fusion != "graft":
            raise UserError(f"--test-token data: --fusion {self.fusion} has no data token")
        if self.bnneck_features and self.fusion == "hamnet":
            raise UserError("--bnneck-features: --fusion hamnet has no BNNeck")


# encoder_hidden: as wide to ViT-S as the paper's is to ViT-B
VIT_B = {"distilled": False}
VIT_S = {"distilled": False, "dim": 384, "heads": 6, "encoder_hidden": 1024}
CLIP = {"pre_norm": True, "norm_eps": 1e-5}
DINOV2 = {"patch_size": 14, "layer_scale": True}
DINOV2_REG4 = {**DINOV2, "registers": 4, "embed_class": False}
DEIT3 = {"layer_scale": True, "embed_class": False}
BACKBONES = {
    "deit-b": {},  # DeiT-B, the defaults above
    "small": {"dim": 192, "depth": 6, "heads": 3, "encoder_hidden": 512},  # of the synthetic set
    "clip-b16": {**VIT_B, **CLIP, "activation": "quick_gelu"},  # OpenAI's
    "openclip-b16": {**VIT_B, **CLIP},  # LAION's and DataComp's: the same names, another activation
    "dinov2-s14": {**VIT_S, **DINOV2},
    "dinov2-b14": {**VIT_B, **DINOV2},
    "dinov2-s14-reg4": {**VIT_S, **DINOV2_REG4},
    "dinov2-b14-reg4": {**VIT_B, **DINOV2_REG4},
    "deit3-s16": {**VIT_S, **DEIT3},
    "deit3-b16": {**VIT_B, **DEIT3},
    "augreg-s16": VIT_S,
    "augreg-b16": VIT_B,
}
RESNETS = {"resnet50": {"resnet": 50}, "resnet18": {"resnet": 18}}  # HAMNet's backbones


class Embeddings(NamedTuple):
    """Both (B, L * D), float32. `fusion` is the embedding, Eq. (7); `data` the sampled data token,
    Eq. (12)."""

    fusion: Tensor
    data: Tensor


def mean_over_modalities(own: list[Embeddings]) -> Embeddings:
    fusion, data = zip(*own, strict=True)
    return Embeddings(torch.stack(fusion).mean(0), torch.stack(data).mean(0))  # Eq. (6), (12)


def new_head(width: int, num_ids: int) -> tuple["SyncBatchNorm1d", nn.Linear]:
    """BNNeck (Luo et al. 2019) and classifier, neither with a bias (paper, 3.4)."""
    bottleneck, classifier = SyncBatchNorm1d(width), nn.Linear(width, num_ids, bias=False)
    bottleneck.bias.requires_grad_(False)
    nn.init.normal_(classifier.weight, std=0.001)
    return bottleneck, classifier


class MultiModalModel(nn.Module):
    """What GraFT and its baselines share: backbone, BNNeck, classifier.

    model({modality: (B, 3, H, W)}) -> Embeddings, from any of its modalities. Raises ValueError for
    none, or for an unknown one.
    """

    def __init__(self, config: GraFTConfig, width: int):
        super().__init__()
        self.config, self.width = config, width
        self.patch_dropout = 0.0  # share of the patches that a training step leaves out, see ViT
        self.bottleneck, self.classifier = new_head(width, config.num_ids)

    def forward(self, images: dict[str, Tensor]) -> Embeddings:
        if not images or images.keys() - set(self.config.modalities):
            given, expected = ", ".join(images) or "none", ", ".join(self.config.modalities)
            raise ValueError(f"modalities {given}: the model has {expected}")
        return mean_over_modalities(self.encode(images))

    def encode(self, images: dict[str, Tensor]) -> list[Embeddings]:
        """Each modality's own tokens, in the order of `images`; of a baseline without, one item."""
        raise NotImplementedError

    def new_backbone(self, channels: int = 3) -> ViT:
        c = self.config
        sizes = (c.image_size, c.patch_size, c.dim, c.depth, c.heads, c.distilled)
        return ViT(*sizes, channels=channels, blocks=c.blocks, traits=c)

    def new_encoder(self) -> ModalityEncoder:
        c = self.config
        return ModalityEncoder(c.dim, c.encoder_heads, c.encoder_hidden, c.dropout)

    def tokens(self, backbone: ViT, images: Tensor) -> Tensor:
        """A backbone's tokens of (B, 3, H, W), without the patches that a training step drops."""
        return backbone(images, self.patch_dropout if self.training else 0.0)

    def extract(self, images: dict[str, Tensor]) -> Tensor:
        """The shared backbone on the images of all modalities in one batch: (B, M, N, D)."""
        B, M = len(next(iter(images.values()))), len(images)
        tokens = self.tokens(self.backbone, torch.cat(list(images.values())))  # (M * B, N, D)
        return tokens.unflatten(0, (M, B)).transpose(0, 1)

    def classify(self, fusion: Tensor) -> Tensor:
        """Logits (B, C) of fusion embeddings (B, L * D), behind the BNNeck; in float32."""
        # Not in bf16, which would round the batch's mean and variance: after LayerNorm the tokens
        # of all identities lie close together, far from 0
        with torch.autocast(fusion.device.type, enabled=False):
            return self.classifier(self.bottleneck(fusion.float()))

    @property
    def backbones(self) -> list[Backbone]:
        return [module for module in self.modules() if isinstance(module, Backbone)]

    def freeze_backbone(self, frozen: bool) -> None:
        """Stage 1 trains on a frozen backbone (section 4.1)."""
        for backbone in self.backbones:
            backbone.freeze(frozen)
        self.train(self.training)

    def num_parameters(self, nonzero: bool = False) -> int:
        """Parameters of what makes the embedding: without BNNeck and classifier."""
        head = {*self.bottleneck.parameters(), *self.classifier.parameters()}
        parameters = [parameter for parameter in self.parameters() if parameter not in head]
        return sum(int(p.count_nonzero()) if nonzero else p.numel() for p in parameters)


class GraFT(MultiModalModel):
    """L fusion tokens pass each modality's own encoder beside its data tokens (Fig. 3)."""

    def __init__(self, config: GraFTConfig):
        L = config.fusion_tokens
        super().__init__(config, L * config.dim)
        self.backbone = self.new_backbone()
        self.encoders = nn.ModuleDict({name: self.new_encoder() for name in config.modalities})
        # One for all modalities: it learns what to ask, each encoder what its sensor answers
        self.fusion_token = nn.Parameter(torch.empty(1, L, config.dim))
        nn.init.xavier_uniform_(self.fusion_token[0])
        num_tokens = self.backbone.num_tokens
        if config.data_token > num_tokens - L:
            raise UserError(
                f"data token {config.data_token}: expected 0 to {num_tokens - L}"
                f" ({num_tokens} data tokens, {L} of them taken)"
            )

    def encode(self, images: dict[str, Tensor]) -> list[Embeddings]:
        L, first = self.config.fusion_tokens, self.config.data_token
        data_tokens = self.extract(images)  # Eq. (1), (2): (B, M, N, D)
        own = []
        for i, modality in enumerate(images):
            fusion_token = self.fusion_token.expand(len(data_tokens), -1, -1)  # (B, L, D)
            tokens = torch.cat([fusion_token, data_tokens[:, i]], 1)  # Eq. (3): (B, L + N, D)
            # Only the fusion tokens and L data tokens go on, so the encoder computes no others
            sampled = data_tokens[:, i, first : first + L]
            queries = torch.cat([fusion_token, sampled], 1)
            z = self.encoders[modality](tokens, queries).float()  # Eq. (4): (B, 2 * L, D)
            z_f, z_d = z[:, :L], z[:, L:]  # Eq. (5), (11)
            own.append(Embeddings(z_f.flatten(1), z_d.flatten(1)))
        return own  # whose mean is the embedding, Eq. (6), (7)

    @torch.no_grad()
    def attention(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """The fusion tokens' attention in each modality's encoder (Fig. 4): (B, rows, columns).

        Means over heads and fusion tokens; together with what goes to the fusion tokens and to
        those before the patches they add up to 1.
        """
        data_tokens, maps = self.extract(images), {}
        first_patch = self.config.fusion_tokens + self.backbone.prefix_tokens
        for i, modality in enumerate(images):
            fusion = self.fusion_token.expand(len(data_tokens), -1, -1)
            tokens = torch.cat([fusion, data_tokens[:, i]], 1)
            weights = self.encoders[modality].self_attn.attention(fusion, tokens).mean((1, 2))
            maps[modality] = weights[:, first_patch:].unflatten(1, self.backbone.grid)
        return maps


def build_model(config: GraFTConfig) -> MultiModalModel:
    """GraFT, or the baseline that `config.fusion` names. Raises UserError for any other name."""
    if config.fusion == "graft":
        return GraFT(config)
    from baselines import BASELINES

    if config.fusion not in BASELINES:
        expected = ", ".join(("graft", *BASELINES))
        raise UserError(f"fusion {config.fusion!r}: expected one of {expected}")
    return BASELINES[config.fusion](config)


def load_backbone(model: nn.Module, path) -> list[str]:
    """Load pretrained weights; see pretrained.load_backbone."""
    import pretrained

    return pretrained.load_backbone(model, path)


# --- what stands for a layer of torch's, and why


class SyncBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d over the samples of all ranks. torch.nn.SyncBatchNorm does so on CUDA only."""

    def forward(self, x: Tensor) -> Tensor:  # (B, D)
        if not self.training:
            return super().forward(x)
        if len(x) < 2 and runtime.world_size() == 1:
            raise UserError("batch of 1: BatchNorm cannot train on it; raise --batch-size")
        return normalise_over_ranks(self, x)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d over the samples and places of all ranks, so that all hold the same statistics.

    On one rank torch's own kernel: a ResNet spends much of its time here.
    """

    def forward(self, x: Tensor) -> Tensor:  # (B, D, rows, columns)
        if not self.training or runtime.world_size() == 1:
            return super().forward(x)
        places = x.float().movedim(1, -1)  # (B, rows, columns, D); float: bf16 would round the mean
        normalised = normalise_over_ranks(self, places.flatten(0, 2)).view(places.shape)
        return normalised.movedim(-1, 1).to(x.dtype)


def normalise_over_ranks(norm: nn.Module, x: Tensor) -> Tensor:
    """What a BatchNorm makes of (B, D) in training, B over all ranks; updates its statistics."""
    B, D = x.shape
    total = runtime.all_sum(torch.cat([x.sum(0), x.new_full((1,), B)]))
    count = total[D].detach()
    mean = total[:D] / count
    variance = runtime.all_sum((x - mean).square().sum(0)) / count
    with torch.no_grad():
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
    return (x - mean) * torch.rsqrt(variance + norm.eps) * norm.weight + norm.bias


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D/H)) v, all (B, H, N, D/H), by torch's fused kernel.

    On CPUs that kernel is slow in bf16 (the plain formula is 2 times as fast forward and 9 times
    with the backward pass, at 34 tokens), and slower than it in training on short sequences.
    """
    short = q.requires_grad and k.shape[-2] < 64
    if q.device.type == "cpu" and (q.dtype == torch.bfloat16 or short):
        with torch.autocast("cpu", enabled=False):
            weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)  # (B, H, N, N)
            return F.dropout(weights, dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
