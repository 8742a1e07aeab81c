"""GraFT's losses (section 4): soft-margin triplets over fusion and data tokens, center loss, and their weighted sum.

B triplets, D width of an embedding, C identities. All of it is computed in float32, whatever comes in.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCHEMES = ("FFD", "FFF", "DDD", "FDD", "DFF", "DFD", "DDF", "FDF")  # Table 8


def _distance(a: Tensor, b: Tensor, squared: bool) -> Tensor:  # (B, D), (B, D) -> (B,)
    if squared:
        return (a.float() - b.float()).square().sum(-1)
    return torch.linalg.vector_norm(a.float() - b.float(), dim=-1)  # its gradient at 0 is 0, not NaN


def triplet_soft_margin(anchor: Tensor, positive: Tensor, negative: Tensor, squared: bool = True) -> Tensor:
    """Soft-margin triplet loss, Eq. (8): mean over the batch of log(1 + exp(d(a, p) - d(a, n))).

    All (B, D). d is the squared Euclidean distance as printed, or the plain one (`squared=False`, published code); see D3.
    softplus passes large arguments through, so distances of 1e4 and more neither overflow nor lose their gradient.
    """
    return F.softplus(_distance(anchor, positive, squared) - _distance(anchor, negative, squared)).mean()


def triplet_hardest(features: Tensor, labels: Tensor, squared: bool = True) -> Tensor:
    """The same loss over each sample of a batch (N, D) with its farthest positive and nearest negative in it (Hermans et
    al. 2017). Ours, for `--recipe plus`. labels (N,); a sample without a positive or a negative in the batch is left out.
    """
    distance = torch.cdist(features.float(), features.float(), compute_mode="donot_use_mm_for_euclid_dist")  # (N, N)
    distance = distance.square() if squared else distance
    same = labels[:, None] == labels
    other = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    counted = other.any(1) & ~same.all(1)
    positive = distance.masked_fill(~other, -torch.inf).amax(1)[counted]
    negative = distance.masked_fill(same, torch.inf).amin(1)[counted]
    return F.softplus(positive - negative).sum() / counted.sum().clamp(min=1)


class CenterLoss(nn.Module):
    """Center loss, Eq. (9): distance of each embedding (B, D) from the learned centroid of its identity (B,).

    Mean over the batch of the squared distance (Wen et al. 2016; published code), or of the norm that Eq. (9) prints
    (`squared=False`); see D4. `centers` (C, D) starts at zero: `start_at_means` puts it where the identities are.
    """

    def __init__(self, num_ids: int, dim: int, squared: bool = True):
        super().__init__()
        self.squared = squared
        self.centers = nn.Parameter(torch.zeros(num_ids, dim))

    @torch.no_grad()
    def start_at_means(self, features: Tensor, labels: Tensor) -> None:
        """Put each centroid at the mean of its identity's features (N, D); labels (N,) from 0 to C - 1."""
        labels = labels.to(self.centers.device)
        total = torch.zeros_like(self.centers).index_add_(0, labels, features.to(self.centers))
        self.centers.copy_(total / labels.bincount(minlength=len(total)).clamp(min=1)[:, None])

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return _distance(features, self.centers[labels], self.squared).mean()


class GraFTLoss(nn.Module):
    """The total loss, Eq. (10): alpha * triplet + beta * center + gamma * cross-entropy.

    `scheme` names the token that stands for anchor, positive and negative: F fusion, D data (section 4.3); "hardest" is
    ours. Cross-entropy and center loss see the fusion token, which is the embedding that is tested (section 3.4), whatever
    the scheme: the anchors', or those of all samples that have a label.
    """

    def __init__(self, num_ids: int, dim: int, scheme: str = "FFD", squared: bool = True, center_squared: bool = True):
        super().__init__()
        if scheme not in (*SCHEMES, "hardest"):
            raise ValueError(f"triplet scheme {scheme!r}: expected one of {', '.join(SCHEMES)}, hardest")
        self.scheme, self.squared = scheme, squared
        self.center = CenterLoss(num_ids, dim, center_squared)
        self.weights(alpha=0.5, beta=0.0, gamma=0.5, label_smoothing=0.0)

    def weights(self, alpha: float, beta: float, gamma: float, label_smoothing: float) -> None:
        """Set a stage's weights; without beta the centroids are frozen."""
        self.alpha, self.beta, self.gamma, self.label_smoothing = alpha, beta, gamma, label_smoothing
        self.center.requires_grad_(beta > 0)

    def forward(self, embeddings, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Losses of B triplets: `loss`, `triplet`, `center` and `cross_entropy`, scalars.

        embeddings (model.Embeddings) of 3B samples: anchors, positives, negatives; logits (n, C) and labels (n,) of the
        first n: the anchors, or all.
        """
        if self.scheme == "hardest":
            triplet = triplet_hardest(embeddings.fusion, labels, self.squared)
        else:
            fusion, data = embeddings.fusion.chunk(3), embeddings.data.chunk(3)
            roles = [{"F": fusion, "D": data}[token][role] for role, token in enumerate(self.scheme)]
            triplet = triplet_soft_margin(*roles, squared=self.squared)
        terms = {
            "triplet": triplet,
            "cross_entropy": F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing),
            "center": self.center(embeddings.fusion[: len(labels)], labels) if self.beta else logits.new_zeros(()),
        }
        loss = self.alpha * terms["triplet"] + self.beta * terms["center"] + self.gamma * terms["cross_entropy"]
        return {"loss": loss, **terms}
