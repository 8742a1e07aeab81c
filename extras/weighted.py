"""The model of `--recipe plus`: each sensor counts by how sure it is of what it sees. Ours.

Eq. (6) takes the plain mean over the sensors, so one that sees nothing, as a camera at night, lets
in noise with the weight of a good one. Here the fusion token of each sensor, and their mean, is a
view of the sample. A view has a BNNeck, a classifier, and a confidence: a predicted probability
that its classifier is right about the identity. Confidences are squared, which did better, and a
view's share s is its part of their sum over the sample's views. Two samples are compared in all
views that both have, each weighed by the product of both shares:

    similarity = sum_v s_v(q) s_v(g) cos(f_v(q), f_v(g)) / sum_v s_v(q) s_v(g)

`train.py --fusion weighted` trains it, `--fusion weighted-late` without GraFT's encoders. Shapes: B
samples, V views, D width of a view, C identities, Q queries, G gallery samples.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import runtime
from baselines import LateFusion
from losses import GraFTLoss
from model import Embeddings, GraFT, GraFTConfig, MultiModalModel, new_head

TEMPERATURE = 0.1  # of the contrastive loss
FLOOR = 0.01  # added to a confidence, so that a blind sensor is still heard where no other sees


class Weighted(MultiModalModel):
    """Makes a fusion with tokens of each modality count them by their confidence."""

    def __init__(self, config: GraFTConfig):
        super().__init__(config)
        self.views = (*config.modalities, "mean")
        heads = {view: new_head(self.width, config.num_ids) for view in self.views}
        self.bottleneck = nn.ModuleDict({view: neck for view, (neck, _) in heads.items()})
        self.classifier = nn.ModuleDict({view: layer for view, (_, layer) in heads.items()})
        self.confidence = nn.ModuleDict({view: nn.Linear(self.width, 1) for view in self.views})
        for layer in self.confidence.values():  # at first all are as sure
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def embedding_width(self) -> int:
        return len(self.views) * (self.width + 1)

    def seen(self, embeddings: Embeddings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of each view at hand: what leaves its BNNeck (B, D), and its confidence's logit (B,)."""
        tokens = {**embeddings.fusion_of, "mean": embeddings.fusion}
        with torch.autocast(embeddings.fusion.device.type, enabled=False):
            necks = {view: self.bottleneck[view](token) for view, token in tokens.items()}
            logits = {view: self.confidence[view](token)[:, 0] for view, token in tokens.items()}
        return necks, logits

    def embedding(self, embeddings: Embeddings, features: str) -> Tensor:
        """Each view's unit vector times its share, then all shares: (B, V * D + V).

        `features` can only be "bnneck", as evaluate.Embedder makes sure.
        """
        necks, logits = self.seen(embeddings)
        return self.join(necks, {view: logit.sigmoid() + FLOOR for view, logit in logits.items()})

    def join(self, necks: dict[str, Tensor], confidence: dict[str, Tensor]) -> Tensor:
        total = torch.stack(list(confidence.values())).square().sum(0)  # (B,)
        absent = torch.zeros_like(total)  # of a sensor that is not at hand
        shares = [confidence.get(view, absent).square() / total for view in self.views]
        nothing = torch.zeros_like(necks["mean"])
        units = [F.normalize(necks.get(view, nothing)) for view in self.views]
        parts = [share[:, None] * unit for share, unit in zip(shares, units, strict=True)]
        return torch.cat([*parts, torch.stack(shares, 1)], 1)

    def similarity(self, query: Tensor, gallery: Tensor) -> Tensor:
        V = len(self.views)
        both = query[:, -V:] @ gallery[:, -V:].T  # (Q, G), above 0: the mean is always at hand
        return query[:, :-V] @ gallery[:, :-V].T / both

    def losses(
        self, embeddings: Embeddings, labels: Tensor, criterion: GraFTLoss, rank_sizes=()
    ) -> dict[str, Tensor]:
        """alpha * contrastive loss + gamma * cross-entropy + what the confidences learn from.

        Labels are those of all samples (B,). With `--triplet hardest` batch-hard triplets are added
        to the contrastive loss. On photos of which some show nothing that ruins all, since the
        hardest positive is always such a photo. No gradient flows from a loss into the confidences
        that weigh it.
        """
        necks, logits = self.seen(embeddings)
        confidence, entropy, unsure = {}, {}, []
        for view, neck in necks.items():
            classes = self.classifier[view](neck)  # (B, C)
            right = classes.detach().softmax(1).gather(1, labels[:, None])[:, 0]
            unsure.append(F.binary_cross_entropy_with_logits(logits[view], right))
            confidence[view] = logits[view].detach().sigmoid() + FLOOR
            # Else a sensor that sees nothing learns its noise by heart, and is sure of it
            weight = confidence[view] / runtime.all_rows(confidence[view], rank_sizes).mean()
            each = F.cross_entropy(
                classes, labels, label_smoothing=criterion.label_smoothing, reduction="none"
            )
            entropy[view] = (weight * each).mean()
        vectors = runtime.all_rows(self.join(necks, confidence), rank_sizes)
        contrastive = self.contrastive(vectors, runtime.all_rows(labels, rank_sizes))
        of_mean = entropy.pop("mean")
        of_sensors = torch.stack(list(entropy.values())).mean()
        learned = sum(unsure) / (len(necks) - 1)  # in all, and one for the mean, as many as sensors
        loss = criterion.alpha * contrastive + criterion.gamma * (of_mean + of_sensors) + learned
        terms = {"contrastive": contrastive, "cross_entropy": of_mean, "sensors": of_sensors}
        terms["confidence"] = learned
        if criterion.scheme == "hardest":
            tokens = (embeddings.fusion, *embeddings.fusion_of.values())
            mean, *sensors = (criterion.triplet(x, x, labels, rank_sizes) for x in tokens)
            terms["triplet"] = mean + torch.stack(sensors).mean()
            loss = loss + criterion.alpha * terms["triplet"]
        return {"loss": loss, **terms}

    def contrastive(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """Supervised contrastive loss (Khosla et al. 2020) of this similarity; a scalar.

        Among its anchor's positives, one counts by how far the two are seen in the same views: of
        two that RGB alone saw, one that RGB saw, too, counts much more than one of thermal alone.
        """
        V, itself = len(self.views), torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        both = vectors[:, -V:] @ vectors[:, -V:].T
        weight = both * ((labels[:, None] == labels) & ~itself)
        similarity = self.similarity(vectors, vectors) / TEMPERATURE
        likelihood = similarity.masked_fill(itself, -1e9).log_softmax(1)
        return -((weight * likelihood).sum(1) / weight.sum(1).clamp(min=1e-6)).mean()


class WeightedGraFT(Weighted, GraFT):
    pass


class WeightedLate(Weighted, LateFusion):
    pass
