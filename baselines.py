"""The fusions that the paper compares GraFT with (Tables 1, 2, 5; section 1).

Their embedding is fusion and data token in one, so they train with FFF; HAMNet has losses of its
own. Shapes as in model.py.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet

from model import (
    Backbone,
    Embeddings,
    GraFTConfig,
    MultiModalModel,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
)


class VanillaFusion(MultiModalModel):
    """The tokens of all modalities, concatenated, through one encoder layer.

    `take` says what becomes the embedding: "cls" a new learnable token, "first-cls" the first
    modality's own CLS token (what the published code takes), "average" the mean of all tokens.
    """

    def __init__(self, config: GraFTConfig, take: str):
        super().__init__(config, config.dim)
        self.backbone = self.new_backbone()
        self.encoder, self.take = self.new_encoder(), take
        if take == "cls":
            self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
            nn.init.xavier_uniform_(self.cls_token[0])

    def encode(self, images: dict[str, Tensor]) -> list[Embeddings]:
        tokens = self.extract(images).flatten(1, 2)  # (B, M * N, D)
        if self.take == "cls":
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        queries = None if self.take == "average" else tokens[:, :1]
        embedding = self.encoder(tokens, queries).float().mean(1)
        return [Embeddings(embedding, embedding)]


class MultiStream(MultiModalModel):
    """A backbone and an encoder for each modality; the mean of their CLS tokens."""

    def __init__(self, config: GraFTConfig):
        super().__init__(config, config.dim)
        self.backbone = nn.ModuleDict({name: self.new_backbone() for name in config.modalities})
        self.encoders = nn.ModuleDict({name: self.new_encoder() for name in config.modalities})

    def encode(self, images: dict[str, Tensor]) -> list[Embeddings]:
        streams = []
        for modality, image in images.items():
            tokens = self.tokens(self.backbone[modality], image)  # (B, N, D)
            embedding = self.encoders[modality](tokens, tokens[:, :1])[:, 0].float()
            streams.append(Embeddings(embedding, embedding))
        return streams


class EarlyFusion(MultiModalModel):
    """Modalities stacked as channels of one image; its CLS token. An absent one is all zeros."""

    def __init__(self, config: GraFTConfig):
        super().__init__(config, config.dim)
        self.backbone = self.new_backbone(channels=3 * len(config.modalities))
        self.encoder = self.new_encoder()

    def encode(self, images: dict[str, Tensor]) -> list[Embeddings]:
        absent = torch.zeros_like(next(iter(images.values())))
        channels = [images.get(modality, absent) for modality in self.config.modalities]
        tokens = self.tokens(self.backbone, torch.cat(channels, 1))  # (B, N, D)
        embedding = self.encoder(tokens, tokens[:, :1])[:, 0].float()
        return [Embeddings(embedding, embedding)]


# --- HAMNet (Li et al. 2020), the CNN of Tables 1, 2 and Fig. 1

LAYOUTS = {18: (resnet.BasicBlock, [2, 2, 2, 2]), 50: (resnet.Bottleneck, [3, 4, 6, 3])}


class ResNet(Backbone, resnet.ResNet):
    """torchvision's ResNet without classifier, the last stride 1: (B, 3, H, W) -> (B, D, h, w).

    h = H / 16, w = W / 16, rounded up; D is 512 (18 layers) or 2048 (50).
    """

    def __init__(self, layers: int):
        block, depths = LAYOUTS[layers]
        super().__init__(block, depths, norm_layer=SyncBatchNorm2d)
        self.layers = layers
        self.fc = nn.Identity()  # not called, either
        for module in self.layer4.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)

    def forward(self, images: Tensor) -> Tensor:
        with self.graph():
            x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
            return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class Stream(NamedTuple):
    """What HAMNet has of one modality, float32: features f_m (B, D), activation map A_m
    (B, C, h, w), from 0 to 1."""

    features: Tensor
    activation: Tensor


class HAMNet(MultiModalModel):
    """A ResNet for each modality; where and how strongly its class-activation maps answer says how
    much its features count.

    Missing modalities are left out of all sums and maxima. Of the two public versions, which
    classify the fused features or the fused scores, this is the one of the scores: so the maps
    learn to be what they are called, not just weights of the features. See D27.
    """

    def __init__(self, config: GraFTConfig):
        D = 512 * LAYOUTS[config.resnet][0].expansion
        super().__init__(config, D)
        names, C = config.modalities, config.num_ids
        self.backbone = nn.ModuleDict({name: ResNet(config.resnet) for name in names})
        self.norms = nn.ModuleDict({name: SyncBatchNorm1d(D) for name in names})
        self.maps = nn.ModuleDict({name: nn.Conv2d(D, C, 1, bias=False) for name in names})
        # Each modality has its BatchNorm before the fusion; the classifier is shared
        self.bottleneck, self.classifier = nn.Identity(), nn.Linear(D, C)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)
        for norm in self.norms.values():
            norm.bias.requires_grad_(False)

    def streams(self, images: dict[str, Tensor]) -> list[Stream]:
        streams = []
        for modality, image in images.items():
            x, to_map = self.backbone[modality](image), self.maps[modality]
            # Not in bf16: sums over places follow. An exported model may be fp16 as a whole
            with torch.autocast(x.device.type, enabled=False):
                x = x.to(to_map.weight.dtype)  # (B, D, h, w)
                features = self.norms[modality](x.mean((2, 3)))
                streams.append(Stream(features.float(), to_map(x).sigmoid().float()))
        return streams

    def encode(self, images: dict[str, Tensor]) -> list[Embeddings]:
        streams = self.streams(images)
        shares, _ = class_shares(streams)  # (B, M, C)
        features = torch.stack([stream.features for stream in streams], 1)  # (B, M, D)
        fused = (shares.sum(-1, keepdim=True) * features).sum(1)
        return [Embeddings(fused, fused)]

    def losses(
        self, streams: list[Stream], criterion: nn.Module, labels: Tensor, rows: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """Cross-entropy and triplets of each modality and of the fused scores; their coherence.

        `criterion`: losses.GraFTLoss, without center loss. Labels (N,) of the first N samples.
        """
        shares, scores = class_shares(streams)
        fused = (shares * scores).sum(1)  # (B, C): features and logits at once
        logits = [self.classifier(stream.features) for stream in streams]
        pairs = [*zip([stream.features for stream in streams], logits, strict=True), (fused, fused)]
        parts = [
            criterion(Embeddings(features, features), classes[: len(labels)], labels, rows)
            for features, classes in pairs
        ]
        losses = {name: sum(part[name] for part in parts) for name in parts[0]}
        losses["coherence"] = incoherence(logits) * (sum(rows) or len(fused))
        losses["loss"] = losses["loss"] + COHERENCE * losses["coherence"]
        return losses


COHERENCE = 0.001  # weight of that loss; published code


def class_shares(streams: list[Stream]) -> tuple[Tensor, Tensor]:
    """r w_m, which add up to 1 over modalities and classes, and the scores S_m: both (B, M, C)."""
    activations = torch.stack([stream.activation for stream in streams], 1)  # (B, M, C, h, w)
    scores = activations.sum((3, 4))
    strongest = activations.amax(1).sum((2, 3))  # (B, C)
    r = strongest / strongest.sum(1, keepdim=True)
    w = scores / scores.sum(1, keepdim=True)
    return r[:, None] * w, scores


def incoherence(logits: list[Tensor]) -> Tensor:
    """How far the modalities' logits, (B, C) each, disagree: the mean over the batch.

    Published code: the sum over the batch. As a mean, times the samples of all ranks, it is the
    same on any number of ranks. One modality agrees with itself.
    """
    if len(logits) == 1:
        return logits[0].new_zeros(())
    directions = torch.stack([F.normalize(classes) for classes in logits])  # (M, B, C)
    return 1 - directions.prod(0).sum(1).mean()


BASELINES = {
    "cls": partial(VanillaFusion, take="cls"),
    "first-cls": partial(VanillaFusion, take="first-cls"),
    "average": partial(VanillaFusion, take="average"),
    "multistream": MultiStream,
    "early": EarlyFusion,
    "hamnet": HAMNet,
}
FUSIONS = ("graft", *BASELINES)
