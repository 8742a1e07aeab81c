"""GraFT's losses (section 4): soft-margin triplets over fusion and data tokens, center loss, sum.

A batch holds the anchors of B triplets, then their positives, then their negatives: N = 3B samples.
For the losses BY_IDENTITY it holds several samples of each identity, and roles mean nothing.
Labels are those of the anchors (B,), or with `--cross-entropy all` of all samples (N,).

On several ranks this is one rank's share. A loss is the mean over the share, and train.py weighs
the shares by their triplets. `rank_sizes` holds the number of samples of each rank, for a loss over
all ranks' samples (see `triplet`).

Shapes: B triplets, N samples, D width of an embedding, C identities. All in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import runtime
from model import Embeddings

SCHEMES = ("FFD", "FFF", "DDD", "FDD", "DFF", "DFD", "DDF", "FDF")  # Table 8
BY_IDENTITY = ("hardest", "contrastive")  # take several samples of each of a batch's identities


def distance(a: Tensor, b: Tensor, squared: bool) -> Tensor:
    """Euclidean distances of the rows of (B, D) and (B, D), or their squares: (B,)."""
    difference = a.float() - b.float()
    if squared:
        return difference.square().sum(-1)
    return torch.linalg.vector_norm(difference, dim=-1)  # its gradient at 0 is 0, not NaN


def triplet_soft_margin(
    anchor: Tensor, positive: Tensor, negative: Tensor, squared: bool = True
) -> Tensor:
    """Soft-margin triplet loss, Eq. (8): mean over the batch of log(1 + exp(d(a, p) - d(a, n))).

    All (B, D). d is the squared distance as printed, or the plain one of the published code
    (`squared=False`); see D3.
    """
    to_positive = distance(anchor, positive, squared)
    to_negative = distance(anchor, negative, squared)
    # softplus passes large arguments through, so distances of 1e4 and more do not overflow
    return F.softplus(to_positive - to_negative).mean()


def triplet_hardest(
    features: Tensor, labels: Tensor, squared: bool = True, margin: float | None = None
) -> Tensor:
    """The same loss for each sample of a batch, with its farthest positive and nearest negative.

    features (N, D), labels (N,). Not the paper's: Hermans et al. 2017. HAMNet takes a hard
    `margin`: max(0, d(a, p) - d(a, n) + margin). The mean is over the samples that have a positive
    and a negative in the batch.
    """
    features = features.float()
    # Not by matrix products: they lose the small distances, and their gradient at 0 is NaN
    pairs = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")  # (N, N)
    pairs = pairs.square() if squared else pairs
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    # A sample without one of the two has a gap of -inf: its loss and its gradient are 0
    farthest = pairs.masked_fill(~positive, -torch.inf).amax(1)
    nearest = pairs.masked_fill(same, torch.inf).amin(1)
    gap = farthest - nearest
    losses = F.softplus(gap) if margin is None else F.relu(gap + margin)
    count = (positive.any(1) & ~same.all(1)).sum()
    return losses.sum() / count.clamp(min=1)


class CenterLoss(nn.Module):
    """Center loss, Eq. (9): distance of each embedding (B, D) from its identity's centroid.

    Mean over the batch of the squared distance (Wen et al. 2016; published code), where Eq. (9)
    prints the norm; see D4. The learned `centers` (C, D) are all zero until `start_at_means` puts
    them where the identities are.
    """

    def __init__(self, num_ids: int, dim: int):
        super().__init__()
        self.centers = nn.Parameter(torch.zeros(num_ids, dim))

    @property
    def started(self) -> bool:
        return bool(self.centers.any())

    @torch.no_grad()
    def start_at_means(self, features: Tensor, labels: Tensor) -> None:
        """Put each centroid at the mean of its identity's features (N, D); labels (N,), below C."""
        labels = labels.to(self.centers.device)
        total = torch.zeros_like(self.centers).index_add_(0, labels, features.to(self.centers))
        count = labels.bincount(minlength=len(total)).clamp(min=1)
        self.centers.copy_(total / count[:, None])

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return distance(features, self.centers[labels], squared=True).mean()


class GraFTLoss(nn.Module):
    """The total loss, Eq. (10): alpha * triplet + beta * center + gamma * cross-entropy.

    `scheme` names the tokens that stand for anchor, positive and negative: F fusion, D data
    (section 4.3); "hardest" is ours, and "contrastive" is for extras/weighted.py alone, which has
    losses of its own. Cross-entropy and center loss see the fusion token, which is the
    embedding of section 3.4, whatever the scheme (see D16).
    """

    def __init__(self, num_ids: int, dim: int, scheme: str = "FFD", squared: bool = True):
        super().__init__()
        if scheme not in (*SCHEMES, *BY_IDENTITY):
            expected = ", ".join((*SCHEMES, *BY_IDENTITY))
            raise ValueError(f"triplet scheme {scheme!r}: expected one of {expected}")
        self.scheme, self.squared, self.margin = scheme, squared, None
        self.center = CenterLoss(num_ids, dim)
        self.set_weights(alpha=0.5, beta=0.0, gamma=0.5, label_smoothing=0.0)

    def set_weights(self, alpha: float, beta: float, gamma: float, label_smoothing: float) -> None:
        """Set a stage's weights; without beta the centroids are frozen."""
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.label_smoothing = label_smoothing
        self.center.requires_grad_(beta > 0)

    def forward(
        self, embeddings: Embeddings, logits: Tensor, labels: Tensor, rank_sizes=()
    ) -> dict[str, Tensor]:
        """Scalars: `loss`, the sum that trains, and its terms before they are weighted.

        embeddings of N samples; logits (K, C) and labels (K,) of the anchors, K = B, or of all.
        """
        triplet = self.triplet(embeddings.fusion, embeddings.data, labels, rank_sizes)
        cross_entropy = F.cross_entropy(
            logits.float(), labels, label_smoothing=self.label_smoothing
        )
        center = logits.new_zeros(())
        if self.beta:
            center = self.center(embeddings.fusion[: len(labels)], labels)
        # Eq. (10)
        loss = self.alpha * triplet + self.beta * center + self.gamma * cross_entropy
        terms = {"triplet": triplet, "cross_entropy": cross_entropy, "center": center}
        return {"loss": loss, **terms}

    def triplet(self, fusion: Tensor, data: Tensor, labels: Tensor, rank_sizes) -> Tensor:
        """Eq. (8) on the scheme's tokens, or on the hardest triplets of all ranks' samples."""
        if self.scheme == "hardest":
            features = runtime.all_rows(fusion, rank_sizes)
            labels = runtime.all_rows(labels, rank_sizes)
            return triplet_hardest(features, labels, self.squared, self.margin)
        tokens = {"F": fusion.chunk(3), "D": data.chunk(3)}  # anchors, positives, negatives
        roles = [tokens[token][role] for role, token in enumerate(self.scheme)]
        return triplet_soft_margin(*roles, squared=self.squared)
