"""HAMNet (Li et al. 2020), the CNN of Tables 1, 2 and Fig. 1: its model, its losses, its recipe.

`train.py --fusion hamnet` reaches it. Shapes as in model.py: B samples, M modalities, C identities,
D width of a ResNet's output, h x w its places.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import resnet

import runtime
from model import (
    Backbone,
    Embeddings,
    GraFTConfig,
    MultiModalModel,
    SyncBatchNorm1d,
    fetch,
    load_strictly,
    normalise_over_ranks,
    read_state,
)
from options import WEIGHTS

# --- recipe: what it changes of train.py's defaults

HAMNET = {  # its published code's settings, but for what is marked as ours
    "backbone": "resnet50",
    "backbone_weights": "pretrained",
    "image_size": (128, 256),
    "flips": (0.5, 0.0),
    # Theirs pads by 10 and crops, too. It erases 2 to 40% of an image and fills in the mean; ours
    # erases 2 to 33%, in black, at the same place in all sensors, as GraFT's code does
    "pad": 10,
    "samples": 4,
    "batch_size": 12,  # ours: 36 images, 9 identities x 4; theirs 8 x 4, which no three roles share
    "positives": 1,
    "triplet": "hardest",
    "margin": 0.3,
    "plain_distance": True,
    "cross_entropy": "all",
    "alpha": 1.0,
    "beta": (0.0, 0.0),
    "gamma": 1.0,
    "label_smoothing": (0.0, 0.0),  # theirs has no effect
    # One stage. An epoch here shows each sample 3 times, so 40 are their 120
    "epochs": (0, 40),
    "lr": (3.5e-4, 3.5e-4),
    "weight_decay": (5e-4, 5e-4),  # AdamW's, next to none at such a rate; theirs is Adam's
    "adam_betas": (0.9, 0.999, 0.9, 0.999),
    "schedule": ("steps", "steps"),
    "warmup_steps": 2400,  # a twelfth of RGBNT100's steps, as theirs
}
SYNTHETIC = {  # ours: on as many samples as GraFT's run sees, with its augmentation
    "backbone": "resnet18",
    "backbone_weights": str(WEIGHTS / "resnet18-rgb.pth"),
    "image_size": (64, 128),
    "pad": 0,
    "epochs": (0, 4),
    "schedule": ("cosine", "cosine"),  # as for GraFT, the rate must come down in so few steps
    "warmup_steps": 100,
}
UPRIGHT = {"image_size": (256, 128)}  # persons
HAMNET_OF = {"synthetic": SYNTHETIC, "rgbnt201": UPRIGHT, "market1501": UPRIGHT}


def recipe(dataset: str) -> dict:
    return {**HAMNET, **HAMNET_OF.get(dataset, {})}


def step_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """As train.lr_factor: linear warm-up, then a tenth from 40/120 of all steps on, and a hundredth
    from 70/120 on; its published code."""
    drops = sum(120 * step >= epoch * total_steps for epoch in (40, 70))
    warmup = max(1, min(warmup_steps, total_steps // 12))  # short runs, too, warm up before a drop
    return min(1.0, (step + 1) / warmup) * 0.1**drops


# --- model

LAYOUTS = {
    "resnet18": (resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet50": (resnet.Bottleneck, [3, 4, 6, 3]),
}


class ResNet(Backbone, resnet.ResNet):
    """torchvision's ResNet without classifier, the last stride 1: (B, 3, H, W) -> (B, D, h, w).

    h = H / 16, w = W / 16, rounded up; D is 512 for resnet18, 2048 for resnet50.
    """

    def __init__(self, name: str):
        super().__init__(*LAYOUTS[name], norm_layer=SyncBatchNorm2d)
        self.name = name
        self.fc = nn.Identity()  # forward ends before it
        for layer in self.layer4.modules():
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def load(self, path: str | Path) -> list[str]:
        """torchvision's state dict of a whole ResNet; "pretrained" fetches ImageNet's."""
        if str(path) == "pretrained":  # the version that there was in HAMNet's days
            path = fetch(torchvision.models.get_model_weights(self.name).IMAGENET1K_V1.url)
        state, _ = read_state(path)
        # Nothing reads BatchNorm's counters, and old files lack them
        counters = {n: w for n, w in self.state_dict().items() if n.endswith("num_batches_tracked")}
        return load_strictly(self, {**state, **counters}, path, heads=("fc.",))

    def prunable(self) -> list[nn.Module]:
        return [layer for layer in self.modules() if isinstance(layer, nn.Conv2d)]


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d over the samples and places of all ranks, so that all hold the same statistics.

    On one rank torch's own kernel: a ResNet spends much of its time here.
    """

    def forward(self, x: Tensor) -> Tensor:  # (B, D, h, w)
        if not self.training or runtime.world_size() == 1:
            return super().forward(x)
        places = x.float().movedim(1, -1)  # (B, h, w, D); float: bf16 would round the mean
        normalised = normalise_over_ranks(self, places.flatten(0, 2)).view(places.shape)
        return normalised.movedim(-1, 1).to(x.dtype)


class ScoredEmbeddings(NamedTuple):
    """As model.Embeddings, and the fused scores of the identities, which only the losses see."""

    fusion: Tensor  # (B, D)
    data: Tensor
    fusion_of: dict[str, Tensor]  # f_m (B, D) each
    scores: Tensor  # (B, C)


class HAMNet(MultiModalModel):
    """A ResNet for each modality; where and how strongly its class-activation maps answer decides
    how much its features count.

    Missing modalities are left out of all sums and maxima. One public version classifies the fused
    features, the other the fused scores, as here: so the maps learn to be what they are called. See
    D27.
    """

    def __init__(self, config: GraFTConfig):
        D, C, names = 512 * LAYOUTS[config.backbone][0].expansion, config.num_ids, config.modalities
        super().__init__(config, D)
        self.backbone = nn.ModuleDict({name: ResNet(config.backbone) for name in names})
        self.norms = nn.ModuleDict({name: SyncBatchNorm1d(D) for name in names})
        self.maps = nn.ModuleDict({name: nn.Conv2d(D, C, 1, bias=False) for name in names})
        # Each modality has its BatchNorm before the fusion; the classifier is shared
        self.bottleneck, self.classifier = nn.Identity(), nn.Linear(D, C)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)
        for norm in self.norms.values():
            norm.bias.requires_grad_(False)

    def forward(self, images: dict[str, Tensor]) -> ScoredEmbeddings:
        features, activations = {}, {}
        for modality, image in self.ordered(images).items():
            x, to_map = self.backbone[modality](image), self.maps[modality]
            # Not in bf16: sums over places follow
            with torch.autocast(x.device.type, enabled=False):
                x = x.to(to_map.weight.dtype)  # (B, D, h, w)
                features[modality] = self.norms[modality](x.mean((2, 3))).float()
                activations[modality] = to_map(x).sigmoid().float()
        return fuse(features, activations)

    def losses(self, embeddings: ScoredEmbeddings, labels, criterion, rank_sizes=()) -> dict:
        """Cross-entropy and triplets of each modality and of the fused scores; their coherence."""
        logits = [self.classifier(features) for features in embeddings.fusion_of.values()]
        # The fused scores are features and logits at once
        features = [*embeddings.fusion_of.values(), embeddings.scores]
        parts = [
            criterion(Embeddings(x, x), classes[: len(labels)], labels, rank_sizes)
            for x, classes in zip(features, [*logits, embeddings.scores], strict=True)
        ]
        losses = {name: sum(part[name] for part in parts) for name in parts[0]}
        # The published code adds this one up over the batch. The mean times the number of samples
        # of all ranks is the same on any number of ranks
        losses["coherence"] = incoherence(logits) * (sum(rank_sizes) or len(embeddings.fusion))
        losses["loss"] = losses["loss"] + 0.001 * losses["coherence"]  # published code
        return losses


def fuse(features: dict[str, Tensor], activations: dict[str, Tensor]) -> ScoredEmbeddings:
    """Weigh the features f_m (B, D) by the activation maps A_m (B, C, h, w), values 0 to 1."""
    A = torch.stack(list(activations.values()), 1)  # (B, M, C, h, w)
    scores = A.sum((3, 4))  # S_m (B, M, C)
    strongest = A.amax(1).sum((2, 3))  # (B, C)
    r = strongest / strongest.sum(1, keepdim=True)
    w = scores / scores.sum(1, keepdim=True)
    shares = r[:, None] * w  # (B, M, C), add up to 1 over modalities and classes
    f = torch.stack(list(features.values()), 1)  # (B, M, D)
    fused = (shares.sum(-1, keepdim=True) * f).sum(1)
    return ScoredEmbeddings(fused, fused, features, (shares * scores).sum(1))


def incoherence(logits: list[Tensor]) -> Tensor:
    """How far the modalities' logits, (B, C) each, disagree: mean over the batch."""
    if len(logits) == 1:
        return logits[0].new_zeros(())
    directions = torch.stack([F.normalize(classes) for classes in logits])  # (M, B, C)
    return 1 - directions.prod(0).sum(1).mean()
