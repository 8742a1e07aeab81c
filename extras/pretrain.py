"""Pretrain the small backbone on RGB images of other vehicles than the embedded data set's: plain classification.

    python -m extras.synthetic --out data/pretrain --first-id 1001 --train-ids 1200 --test-ids 1 --captures 4 --studio
    python -m extras.pretrain --data-root data/pretrain --out weights/vit-small-rgb.pth

What DeiT's ImageNet weights are to the paper, these are to the embedded data set: a backbone that knows colour images.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
import runtime
from model import BACKBONES, ViT


def recolour(images: Tensor, draws: Tensor, share: float) -> Tensor:
    """Map the colours of a share of the images (B, 3, H, W), values 0 to 1, affinely at random; half of those to grey.

    The mapped images still show the same vehicle, so colour alone does not tell who it is: shape and pattern must help,
    and they are what other sensors show, too. draws (B, 14), uniform in [0, 1).
    """
    matrix = (4 * draws[:, 2:11] - 2).unflatten(1, (3, 3))
    offset = 0.2 + 0.6 * draws[:, 11:14, None]
    grey = (draws[:, 1] < 0.5)[:, None, None]
    matrix = torch.where(grey, matrix[:, :1].expand_as(matrix), matrix)
    offset = torch.where(grey, offset[:, :1].expand_as(offset), offset)
    mapped = (matrix @ (images.flatten(2) - 0.5) + offset).clamp(0, 1).view_as(images)
    return torch.where((draws[:, 0] < share)[:, None, None, None], mapped, images)


@runtime.program
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True, help="folder written by synthetic.py")
    parser.add_argument("--out", type=Path, required=True, help="file of fp16 weights to write")
    parser.add_argument("--epochs", type=int, default=25, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=128, help="images (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="default: %(default)s")
    parser.add_argument(
        "--recolour",
        type=float,
        default=0.5,
        help="share of images whose colours are mapped at random, reached half-way (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    args = parser.parse_args()
    device = runtime.start(args.device)
    print("settings:", vars(args))
    torch.manual_seed(args.seed)
    size = (64, 128)
    dataset = data.load_dataset("synthetic", args.data_root, ("rgb",), size)
    dataset.train.keep_in_memory()
    images = torch.stack([sample["rgb"] for sample, _, _ in dataset.train])  # (N, 3, H, W)
    pids, labels = dataset.train.pids.unique(return_inverse=True)
    config = {name: value for name, value in BACKBONES["small"].items() if name != "encoder_hidden"}
    vit = ViT(size, **config).to(device)
    # A head on the CLS and one on the distillation token. Without BatchNorm they stand still at first: a fresh ViT's tokens
    # hardly depend on the image.
    head = (nn.BatchNorm1d(config["dim"], affine=False), nn.Linear(config["dim"], len(pids)))
    heads = nn.ModuleList(nn.Sequential(*copy.deepcopy(head)) for _ in range(2)).to(device)
    parameters = [*vit.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.05)
    steps = len(images) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * steps, pct_start=0.1)
    for epoch in range(args.epochs):
        total, right, start = 0.0, 0.0, time.perf_counter()
        order = torch.randperm(len(images))
        share = args.recolour * min(1.0, max(0.0, 4 * epoch / args.epochs - 1))  # from the start, it stops all learning
        for step in tqdm(range(steps), f"epoch {epoch + 1}", disable=None, leave=False):
            chosen = order[step * args.batch_size : (step + 1) * args.batch_size]
            batch = data.augment({"rgb": images[chosen].to(device)}, torch.rand(len(chosen), 7), 0.5, 0.0, 0.25)["rgb"]
            batch = recolour(batch / 255, torch.rand(len(chosen), 14).to(device), share)
            batch = data.normalise({"rgb": batch * 255}, dataset.mean, dataset.std)["rgb"]
            with runtime.autocast(device, "auto"):
                tokens = vit(batch).float()
            logits = [head(tokens[:, i]) for i, head in enumerate(heads)]
            target = labels[chosen].to(device)
            loss = sum(F.cross_entropy(x, target, label_smoothing=0.1) for x in logits) / 2
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.item()
            right += (sum(logits).argmax(1) == target).float().mean().item()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}/{args.epochs}  loss {total / steps:.3f}  accuracy {right / steps:.3f}  {seconds:.1f} s")
    weights = {name: weight.half().cpu() for name, weight in vit.state_dict().items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    runtime.save_checkpoint(args.out, {"model": weights, "config": {"image_size": size, **config}})


if __name__ == "__main__":
    main()
