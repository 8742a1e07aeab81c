"""The fusions that the paper compares GraFT with (Tables 1, 2, 5; section 1), but for HAMNet.

Their embedding serves as fusion and data token alike, so they train with FFF triplets. Shapes as in
model.py.
"""

import torch
from torch import Tensor, nn

from model import Embeddings, GraFTConfig, MultiModalModel, average

FIRST = (slice(1),)  # of an encoder's outputs: that of the CLS token alone


class VanillaFusion(MultiModalModel):
    """The tokens of all modalities, concatenated, pass one encoder; a subclass has `encode`."""

    def __init__(self, config: GraFTConfig):
        super().__init__(config, config.dim)
        self.backbone = self.new_backbone()
        self.encoder = self.new_encoder()

    def forward(self, images: dict[str, Tensor]) -> Embeddings:
        tokens = torch.cat(list(self.extract(images).values()), 1)  # (B, M * N, D)
        embedding = self.encode(tokens)  # (B, D)
        return Embeddings(embedding, embedding)


class FirstCLS(VanillaFusion):
    """The embedding is the first modality's CLS token, as in the published code."""

    def encode(self, tokens: Tensor) -> Tensor:
        return self.encoder(tokens, FIRST)[:, 0].float()


class NewCLS(FirstCLS):
    """The embedding is a learnable token before all others, as the paper's text says."""

    def __init__(self, config: GraFTConfig):
        super().__init__(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
        nn.init.xavier_uniform_(self.cls_token[0])

    def encode(self, tokens: Tensor) -> Tensor:
        return super().encode(torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1))


class AveragedTokens(VanillaFusion):
    """The embedding is the mean of all tokens."""

    def encode(self, tokens: Tensor) -> Tensor:
        return self.encoder(tokens).float().mean(1)


class MultiStream(MultiModalModel):
    """A backbone and an encoder for each modality; the mean of their CLS tokens."""

    def __init__(self, config: GraFTConfig):
        super().__init__(config, config.dim)
        self.backbone = nn.ModuleDict({name: self.new_backbone() for name in config.modalities})
        self.encoders = nn.ModuleDict({name: self.new_encoder() for name in config.modalities})

    def forward(self, images: dict[str, Tensor]) -> Embeddings:
        streams = {}
        for modality, image in self.ordered(images).items():
            tokens = self.tokens(self.backbone[modality], image)  # (B, N, D)
            streams[modality] = self.encoders[modality](tokens, FIRST)[:, 0].float()
        embedding = average(streams)
        return Embeddings(embedding, embedding, streams, streams)


class EarlyFusion(MultiModalModel):
    """Modalities stacked as channels of one image; its CLS token. An absent one is all zeros."""

    def __init__(self, config: GraFTConfig):
        super().__init__(config, config.dim)
        self.backbone = self.new_backbone(channels=3 * len(config.modalities))
        self.encoder = self.new_encoder()

    def forward(self, images: dict[str, Tensor]) -> Embeddings:
        images = self.ordered(images)
        absent = torch.zeros_like(next(iter(images.values())))
        channels = [images.get(modality, absent) for modality in self.config.modalities]
        tokens = self.tokens(self.backbone, torch.cat(channels, 1))  # (B, N, D)
        embedding = self.encoder(tokens, FIRST)[:, 0].float()
        return Embeddings(embedding, embedding)


class LateFusion(MultiModalModel):
    """The null model: the mean of the shared backbone's CLS tokens, no encoder, no fusion token."""

    def __init__(self, config: GraFTConfig):
        super().__init__(config, config.dim)
        self.backbone = self.new_backbone()

    def forward(self, images: dict[str, Tensor]) -> Embeddings:
        streams = {name: tokens[:, 0].float() for name, tokens in self.extract(images).items()}
        embedding = average(streams)
        return Embeddings(embedding, embedding, streams, streams)
