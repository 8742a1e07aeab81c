"""GraFT, the Gradual Fusion Transformer (section 3 of the paper): ViT, modality encoders, fusion.

Read it from `GraFT.forward`, which is Fig. 3. Shapes: B samples, M modalities, N tokens of a
modality, D width, L fusion tokens, C identities, H heads, P patch size.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import runtime
from runtime import UserError

# --- backbone (section 3.2)


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each to the model's width: Eq. (1).

    (B, 3, H, W) -> (B, patches, D), row by row. Patches that are fewer than their size apart
    overlap, as in TransReID (He et al. 2021).
    """

    def __init__(self, patch_size: int, dim: int, channels: int = 3, stride: int = 0):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, stride or patch_size)

    def forward(self, images: Tensor) -> Tensor:
        (P, _), (S, _) = self.proj.kernel_size, self.proj.stride
        # The convolution as the matrix product that it is: on CPUs several times as fast
        patches = images.unfold(2, P, S).unfold(3, P, S)  # (B, C, rows, columns, P, P)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)  # (B, rows, columns, C * P * P)
        patches = patches.flatten(1, 2)  # (B, patches, C * P * P)
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
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, heads: int, hidden: int, head_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, 1e-6)  # DeiT's epsilon, not torch's 1e-5
        self.attn = Attention(dim, heads, head_dim)
        self.norm2 = nn.LayerNorm(dim, 1e-6)
        self.mlp = MLP(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Backbone(nn.Module):
    """What is pretrained, and frozen or trained as a whole.

    A subclass has `load(path)`, which reads pretrained weights strictly and returns the names of
    those left out (classifiers), and `prunable()`, the layers that section 5.4 prunes.
    """

    frozen = False
    mean_std: tuple | None = None  # three floats each, where the weights demand a normalisation

    def freeze(self, frozen: bool) -> None:
        """Train it, or not: then in eval mode, without gradients, and no graph of it is kept."""
        self.frozen = frozen
        self.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "Backbone":
        return super().train(mode and not self.frozen)


class ViT(Backbone):
    """Vision Transformer (Dosovitskiy et al. 2021), with DeiT's distillation token if `distilled`.

    (B, 3, H, W) -> all tokens after the final norm, (B, N, D): CLS, distillation, then the patches
    row by row. Parameters are named as in timm and in the released DeiT checkpoints. `blocks` gives
    (heads, MLP channels) of each block of a pruned ViT, whose heads keep their width D / `heads`.
    Raises UserError for sizes that do not divide.
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
        stride=0,
    ):
        super().__init__()
        if dim % heads:
            raise UserError(f"width {dim}: {heads} heads do not divide it")
        self.image_size = tuple(image_size)
        self.grid = patch_grid(image_size, patch_size, stride)
        self.patch_embed = PatchEmbed(patch_size, dim, channels, stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)) if distilled else None
        self.prefix_tokens = 1 + bool(distilled)  # those before the patches
        self.num_tokens = self.prefix_tokens + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_tokens, dim))
        sizes = blocks or [(heads, 4 * dim)] * depth
        self.blocks = nn.ModuleList(Block(dim, *size, dim // heads) for size in sizes)
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.init_weights()

    def init_weights(self) -> None:
        for parameter in (self.cls_token, self.dist_token, self.pos_embed):
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
        tokens = (self.cls_token, self.dist_token)
        prefix = [token.expand(len(images), -1, -1) for token in tokens if token is not None]
        x = torch.cat([*prefix, self.patch_embed(images)], 1) + self.pos_embed  # (B, N, D)
        # After the positions are added, so that a patch that stays knows where it was
        if patch_dropout:
            prefix, patches = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
            x = torch.cat([prefix, random_patches(patches, 1 - patch_dropout)], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # Eq. (2)

    def prunable(self) -> list[nn.Module]:
        names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        return [block.get_submodule(name) for block in self.blocks for name in names]

    def load(self, path: str | Path) -> list[str]:
        """Read DeiT's release ("pretrained" fetches DeiT-B's), timm's names, or a run of ours."""
        if str(path) == "pretrained":
            path = fetch_deit(self)
        state, grid = read_state(path)
        if "pos_embed" in state:
            positions, prefix = state["pos_embed"], self.prefix_tokens
            side = math.isqrt(max(0, positions.shape[1] - prefix))
            grid = grid or (side, side)  # released files are of square images
            state["pos_embed"] = resize_pos_embed(positions, prefix, grid, self.grid)
        M = self.patch_embed.proj.in_channels // 3
        weight = state.get("patch_embed.proj.weight")  # (D, 3, P, P)
        if M > 1 and weight is not None and weight.shape[1] == 3:
            # Early fusion stacks M modalities as channels: each starts with its share of the weight
            state["patch_embed.proj.weight"] = weight.repeat(1, M, 1, 1) / M
        return load_strictly(self, state, path, heads=("head.", "head_dist."))


def patch_grid(image_size: tuple[int, int], patch_size: int, stride: int = 0) -> tuple[int, int]:
    """Rows and columns of the patches of an image (height, width); stride 0: the patch size.

    Raises UserError for an image that they do not cover exactly.
    """
    P, S = patch_size, stride or patch_size
    if S > P:
        raise UserError(f"--stride {S}: expected at most the patch size, {P}")
    if any(side < P or (side - P) % S for side in image_size):
        size = "x".join(map(str, image_size))
        nearest = " ".join(str(P + max(0, round((side - P) / S)) * S) for side in image_size)
        fitting = f"multiples of the patch size, {P}"
        if S != P:
            fitting = f"{P} + a multiple of {S} (patch size and --stride; 0: no overlap)"
        raise UserError(
            f"image size {size}: expected {fitting}; the nearest are --image-size {nearest}"
        )
    return tuple((side - P) // S + 1 for side in image_size)


def random_patches(patches: Tensor, share: float) -> Tensor:
    """A random share of each image's patches, at least one: (B, patches, D) -> (B, fewer, D)."""
    B, num_patches, D = patches.shape
    count = max(1, round(share * num_patches))
    chosen = torch.rand(B, num_patches, device=patches.device).topk(count, 1).indices
    return patches.gather(1, chosen[..., None].expand(-1, -1, D))


# --- modality encoder (sections 3.1, 5.2)


class ModalityEncoder(nn.TransformerEncoderLayer):
    """torch's transformer encoder layer (post-norm, ReLU), (B, N, D) -> (B, N, D).

    With `keep`, slices of the tokens, only those tokens' outputs are computed, one slice after the
    other. They still attend to all tokens, so they are what the whole layer would give. The losses
    see two of some 200 tokens: leaving the others out saves most of the layer's work.
    """

    def __init__(self, dim: int = 768, heads: int = 8, hidden: int = 2048, dropout: float = 0.1):
        if dim % heads:
            raise UserError(f"width {dim}: {heads} encoder heads do not divide it")
        super().__init__(dim, heads, hidden, dropout, batch_first=True)

    def forward(self, tokens: Tensor, keep: tuple[slice, ...] = (slice(None),)) -> Tensor:
        x = torch.cat([tokens[:, part] for part in keep], 1)  # (B, Q, D), Q of the N tokens
        x = self.norm1(x + self.dropout1(self.attention(x, tokens)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm2(x + self.dropout2(self.linear2(hidden)))

    def attention(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """self_attn(queries, tokens, tokens) by `attend`: (B, Q, D), (B, N, D) -> (B, Q, D)."""
        layer, D = self.self_attn, tokens.shape[-1]
        weight, bias, heads = layer.in_proj_weight, layer.in_proj_bias, (layer.num_heads, -1)
        q = F.linear(queries, weight[:D], bias[:D])
        k, v = F.linear(tokens, weight[D:], bias[D:]).chunk(2, -1)
        q, k, v = (x.unflatten(-1, heads).transpose(1, 2) for x in (q, k, v))  # (B, H, N, D/H)
        x = attend(q, k, v, layer.dropout if self.training else 0.0)
        return layer.out_proj(x.transpose(1, 2).flatten(2))


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
    fusion: str = "graft"  # or a baseline, see FUSIONS
    blocks: tuple[tuple[int, int], ...] = ()  # of a pruned ViT: heads, MLP channels of each block
    backbone: str = "vit"  # DeiT's; or timm:NAME, or HAMNet's resnet18 and resnet50
    stride: int = 0  # pixels from patch to patch; 0: the patch size


class Embeddings(NamedTuple):
    """`fusion` is the embedding, Eq. (7); `data` the sampled data token, Eq. (12); float32.

    `fusion_of` and `data_of` hold the tokens of each modality, of which these are the means; empty
    for fusions that have none.
    """

    fusion: Tensor  # (B, L * D)
    data: Tensor  # (B, L * D)
    fusion_of: dict[str, Tensor] = {}  # noqa: RUF012
    data_of: dict[str, Tensor] = {}  # noqa: RUF012


class MultiModalModel(nn.Module):
    """What GraFT and its baselines share: backbone, BNNeck, classifier.

    A subclass has `forward`: {modality: (B, 3, H, W)} -> Embeddings, from any of the model's
    modalities, whatever their order.
    """

    def __init__(self, config: GraFTConfig, width: int):
        super().__init__()
        self.config, self.width = config, width
        self.patch_dropout = 0.0  # share of the patches that a training step leaves out, see ViT
        self.bottleneck, self.classifier = new_head(width, config.num_ids)

    def ordered(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """The images in the model's order. Raises UserError for none, or an unknown modality."""
        known = self.config.modalities
        return {name: images[name] for name in runtime.in_order(images, known, "the model")}

    def new_backbone(self, channels: int = 3) -> Backbone:
        c = self.config
        if not c.backbone.startswith("timm:"):
            sizes = (c.image_size, c.patch_size, c.dim, c.depth, c.heads, c.distilled)
            return ViT(*sizes, channels=channels, blocks=c.blocks, stride=c.stride)
        if channels != 3:
            raise UserError("--fusion early: stacks modalities as channels; use DeiT's ViT")
        return runtime.imported("extras.timm_backbone.TimmViT")(
            c.backbone.removeprefix("timm:"), c.image_size, c.stride
        )

    def new_encoder(self) -> ModalityEncoder:
        c = self.config
        return ModalityEncoder(c.dim, c.encoder_heads, c.encoder_hidden, c.dropout)

    def tokens(self, backbone: Backbone, images: Tensor) -> Tensor:
        """A backbone's tokens of (B, 3, H, W), without the patches that a training step drops."""
        return backbone(images, self.patch_dropout if self.training else 0.0)

    def extract(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """The shared backbone's tokens of each modality, (B, N, D), in the model's order."""
        images = self.ordered(images)
        # All modalities, of anchors, positives and negatives alike, in one batch
        tokens = self.tokens(self.backbone, torch.cat(list(images.values())))  # (M * B, N, D)
        # Not chunk, whose sizes torch.export would fix
        tokens = tokens.unflatten(0, (len(images), -1))  # (M, B, N, D)
        return dict(zip(images, tokens.unbind(), strict=True))

    def classify(self, fusion: Tensor) -> Tensor:
        """Logits (B, C) of fusion embeddings (B, L * D), behind the BNNeck; in float32."""
        # Not in bf16, which would round the batch's mean and variance: after LayerNorm the tokens
        # of all identities lie close together, far from 0
        with torch.autocast(fusion.device.type, enabled=False):
            return self.classifier(self.bottleneck(fusion.float()))

    @property
    def embedding_width(self) -> int:
        """Of what `embedding` returns."""
        return self.width

    def embedding(self, embeddings: Embeddings, features: str) -> Tensor:
        """What a gallery keeps of each sample, (B, L * D), of norm 1.

        `features`: the fusion tokens (paper), what leaves the BNNeck, or the data tokens (see D23).
        """
        tokens = embeddings.data if features == "data" else embeddings.fusion
        return F.normalize(self.bottleneck(tokens) if features == "bnneck" else tokens)

    def similarity(self, query: Tensor, gallery: Tensor) -> Tensor:
        """The cosine of each query's and each gallery sample's embedding: (Q, G)."""
        return query @ gallery.T

    def losses(
        self, embeddings: Embeddings, labels: Tensor, criterion: nn.Module, rank_sizes=()
    ) -> dict[str, Tensor]:
        """The losses of a batch, as `criterion` names them; losses.py says what a batch holds.

        Only samples with labels are classified, so the BNNeck's statistics are theirs alone.
        """
        logits = self.classify(embeddings.fusion[: len(labels)])
        return criterion(embeddings, logits, labels, rank_sizes)

    @property
    def backbones(self) -> list[Backbone]:
        return [module for module in self.modules() if isinstance(module, Backbone)]

    def freeze_backbone(self, frozen: bool) -> None:
        """Stage 1 trains on a frozen backbone (section 4.1)."""
        for backbone in self.backbones:
            backbone.freeze(frozen)
        self.train(self.training)  # a frozen backbone goes to eval mode

    def num_parameters(self, nonzero: bool = False) -> int:
        """Parameters of what makes the embedding: without BNNeck and classifier."""
        head = {*self.bottleneck.parameters(), *self.classifier.parameters()}
        parameters = [parameter for parameter in self.parameters() if parameter not in head]
        return sum(int(p.count_nonzero()) if nonzero else p.numel() for p in parameters)


class GraFT(MultiModalModel):
    """L fusion tokens pass each modality's own encoder beside its data tokens (Fig. 3)."""

    def __init__(self, config: GraFTConfig):
        L, D, index = config.fusion_tokens, config.dim, config.data_token
        super().__init__(config, L * D)
        self.backbone = self.new_backbone()
        self.encoders = nn.ModuleDict({name: self.new_encoder() for name in config.modalities})
        # One for all modalities: it learns what to ask, each encoder what its sensor answers
        self.fusion_token = nn.Parameter(torch.empty(1, L, D))
        nn.init.xavier_uniform_(self.fusion_token[0])
        largest = self.backbone.num_tokens - L
        if index > largest:
            raise UserError(f"data token {index}: expected 0 to {largest}")
        # What the losses see of an encoder's output: the fusion tokens and L data tokens
        self.keep = (slice(0, L), slice(L + index, L + index + L))

    def forward(self, images: dict[str, Tensor]) -> Embeddings:
        L = self.config.fusion_tokens
        fusion, data = {}, {}
        for modality, data_tokens in self.extract(images).items():  # Eq. (1), (2): (B, N, D)
            fusion_tokens = self.fusion_token.expand(len(data_tokens), -1, -1)  # (B, L, D)
            tokens = torch.cat([fusion_tokens, data_tokens], 1)  # Eq. (3): (B, L + N, D)
            z = self.encoders[modality](tokens, self.keep).float()  # Eq. (4): (B, 2 * L, D)
            fusion[modality] = z[:, :L].flatten(1)  # Eq. (5): (B, L * D)
            data[modality] = z[:, L:].flatten(1)  # Eq. (11)
        return Embeddings(average(fusion), average(data), fusion, data)  # Eq. (6), (7); (12)


def average(tokens: dict[str, Tensor]) -> Tensor:
    """Mean over the modalities at hand, (B, D) each."""
    return torch.stack(list(tokens.values())).mean(0)


def new_head(width: int, num_ids: int) -> tuple["SyncBatchNorm1d", nn.Linear]:
    """BNNeck (Luo et al. 2019) and classifier, neither with a bias (paper, 3.4)."""
    bottleneck, classifier = SyncBatchNorm1d(width), nn.Linear(width, num_ids, bias=False)
    bottleneck.bias.requires_grad_(False)
    nn.init.normal_(classifier.weight, std=0.001)
    return bottleneck, classifier


FUSIONS = {
    "graft": "model.GraFT",
    "cls": "baselines.NewCLS",
    "first-cls": "baselines.FirstCLS",
    "average": "baselines.AveragedTokens",
    "multistream": "baselines.MultiStream",
    "early": "baselines.EarlyFusion",
    "late": "baselines.LateFusion",
    "weighted": "extras.weighted.WeightedGraFT",
    "weighted-late": "extras.weighted.WeightedLate",
    "hamnet": "experiments.hamnet.HAMNet",
}


def build_model(config: GraFTConfig) -> MultiModalModel:
    """GraFT, or the baseline that `config.fusion` names. Raises UserError for any other name."""
    if config.fusion not in FUSIONS:
        expected = ", ".join(FUSIONS)
        raise UserError(f"fusion {config.fusion!r}: expected one of {expected}")
    # By name, since baselines and HAMNet import this file
    return runtime.imported(FUSIONS[config.fusion])(config)


# --- pretrained weights


def load_backbone(model: nn.Module, path: str | Path) -> list[str]:
    """Load pretrained weights into a model's backbones, strictly.

    `path` is a file, or "pretrained" for the weights that the backbone's authors released. Position
    embeddings are resized where the image size differs. Returns the names of the weights left out:
    classifiers. Raises UserError for a file that cannot be read or is not this backbone's.
    """
    for backbone in [module for module in model.modules() if isinstance(module, Backbone)]:
        left_out = backbone.load(path)
    return left_out


def read_state(path: str | Path) -> tuple[dict[str, Tensor], tuple[int, int] | None]:
    """A backbone's weights in float32; of a run of ours also rows and columns of its patches."""
    checkpoint = runtime.load_checkpoint(path)
    state = checkpoint.get("model", checkpoint.get("state_dict", checkpoint))
    weights = state.values() if isinstance(state, dict) else [None]
    if not all(isinstance(w, Tensor) and w.layout is torch.strided for w in weights):
        raise UserError(f"{path}: holds no state dict")
    state = {name: weight.float() for name, weight in state.items()}
    ours = [name for name in state if name.startswith("backbone.")]  # a run holds the whole model
    state = {name.removeprefix("backbone."): state[name] for name in ours or state}
    return state, stored_grid(checkpoint.get("config"), state)


def stored_grid(config: object, state: dict[str, Tensor]) -> tuple[int, int] | None:
    """Rows and columns of the patches of a run of ours, by its config; None for other files."""
    patch = next((w for n, w in state.items() if n.endswith("patch_embed.proj.weight")), None)
    if patch is None or not isinstance(config, dict):
        return None
    P, size = patch.shape[-1], config.get("image_size")
    S = config.get("stride", 0) or P
    if not isinstance(size, tuple) or len(size) != 2 or {type(n) for n in (S, *size)} != {int}:
        return None
    return tuple((side - P) // S + 1 for side in size)


def load_strictly(
    module: nn.Module, state: dict[str, Tensor], path: str | Path, heads: tuple[str, ...]
) -> list[str]:
    """load_state_dict without the weights whose names start with `heads`; returns their names.

    Raises UserError that says which weights are missing, unknown or of another shape.
    """
    left_out = [name for name in state if name.startswith(heads)]
    try:
        module.load_state_dict({n: weight for n, weight in state.items() if n not in left_out})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path}: not the weights of this backbone ({reason}); choose the --backbone that"
            " they were made for; any ViT of timm is timm:NAME"
        ) from None
    return left_out


def resize_pos_embed(
    pos_embed: Tensor, prefix: int, old: tuple[int, int], new: tuple[int, int]
) -> Tensor:
    """Resize the patches' positions (1, prefix + old, D) from one grid (rows, columns) to another.

    Positions that do not fill the old grid stay as they are: load_strictly refuses their shape.
    """
    num_patches = pos_embed.shape[1] - prefix
    fills = num_patches > 0 and num_patches == old[0] * old[1]
    if old == new or not fills:
        return pos_embed
    grid = pos_embed[:, prefix:].unflatten(1, old).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    grid = F.interpolate(grid, new, mode="bicubic", antialias=True)
    return torch.cat([pos_embed[:, :prefix], grid.flatten(2).transpose(1, 2)], 1)


def fetch_deit(vit: ViT) -> Path:
    """DeiT-B's released file. Raises UserError for another ViT."""
    if vit.cls_token.shape[-1] != 768 or len(vit.blocks) != 12 or vit.dist_token is None:
        raise UserError(
            "--backbone-weights pretrained: only DeiT-B's weights are released for this ViT;"
            " expected a FILE, or none"
        )
    return fetch("https://dl.fbaipublicfiles.com/deit/deit_base_distilled_patch16_224-df68dfff.pth")


def fetch(url: str) -> Path:
    """Where torch.hub keeps a released file, which is downloaded once."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    try:
        with runtime.rank0_first():
            torch.hub.load_state_dict_from_url(url, weights_only=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: its hash is not that in its name
        raise UserError(
            f"{url}: cannot be downloaded ({error}); download it elsewhere and put it at {path}, or"
            " choose another file by --backbone-weights FILE (none: random weights)"
        ) from None
    return path


# --- what replaces a layer of torch's, and why


class SyncBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d over the samples of all ranks; torch.nn.SyncBatchNorm needs CUDA for that."""

    def forward(self, x: Tensor) -> Tensor:  # (B, D)
        if not self.training:
            return super().forward(x)
        if len(x) < 2 and runtime.world_size() == 1:
            raise UserError("batch of 1: BatchNorm cannot train on it; raise --batch-size")
        return normalise_over_ranks(self, x)


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

    On CPUs the plain formula takes its place where it is faster: in bf16 (2 times forward, 9 times
    with the backward pass, at 34 tokens), and in training on short sequences.
    """
    short = q.requires_grad and k.shape[-2] < 64
    if q.device.type == "cpu" and (q.dtype == torch.bfloat16 or short):
        with torch.autocast("cpu", enabled=False):
            weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)  # (B, H, N, N)
            return F.dropout(weights, dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


# --- checkpoints of older versions, and of strangers

# Switches of an older ViT, with DeiT's values, the only ones that are still built
DEIT = {
    "pre_norm": False, "activation": "gelu", "norm_eps": 1e-6, "layer_scale": False,
    "registers": 0, "embed_class": True,
}  # fmt: skip
TEST_TIME = {"test_token", "bnneck_features"}  # evaluate.py reads these: they make no weights


def stored_config(stored: dict) -> GraFTConfig:
    """The config in a checkpoint file.

    Raises UserError for what this version cannot build, and for a model so large that building it
    would take long before anyone sees that the file does not hold its weights.
    """
    stored = {name: value for name, value in stored.items() if name not in TEST_TIME}
    for name, value in DEIT.items():
        if stored.pop(name, value) != value:
            raise UserError(
                f"{name}: a backbone of an older version; train it again as --backbone timm:NAME"
            )
    if layers := stored.pop("resnet", 0):  # HAMNet's
        stored["backbone"] = f"resnet{layers}"
    config = GraFTConfig(**stored)
    for field in fields(config):
        value, kind = getattr(config, field.name), type(field.default)
        if type(value) is not kind:
            raise UserError(f"{field.name} {value!r}: expected a {kind.__name__}")
    counts = (config.depth, config.fusion_tokens, len(config.modalities), len(config.blocks))
    if max(counts) > 1000:
        raise UserError(f"{max(counts)} blocks, fusion tokens or modalities: at most 1000")
    return config
