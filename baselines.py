"""The fusions that the paper compares GraFT with (Tables 1, 2, 5; section 1).

Their embedding is fusion and data token in one, so they train with FFF. Shapes as in model.py.
"""

from functools import partial

import torch
from torch import Tensor, nn

from model import Embeddings, GraFTConfig, MultiModalModel


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


BASELINES = {
    "cls": partial(VanillaFusion, take="cls"),
    "first-cls": partial(VanillaFusion, take="first-cls"),
    "average": partial(VanillaFusion, take="average"),
    "multistream": MultiStream,
    "early": EarlyFusion,
}
FUSIONS = ("graft", *BASELINES)
