"""Train the pair model on groups of prompts: `python -m scripts.train_pair_model`, minutes on a GPU, hours on a CPU.

It writes model_repository/pair_model/adapters.safetensors, of which scripts.build_repository makes the served model,
and prints how much it would find of what is held out.
"""

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from scripts.build_repository import ENCODER
from scripts.distillation import precision
from scripts.pair_model.graph import ADAPTERS
from scripts.pair_model.groups import Group, Pair, epoch, load_groups, split
from scripts.pair_model.network import PairNetwork

ROWS = 256
SHUFFLED = 16  # batches' worth of pairs, sorted by length
WARMUP = 0.06
CLIP = 1.0
WRONG = 0.01  # of pairs that are apart, served: recall is printed at it


def train(network: PairNetwork, groups: Sequence[Group], held: Sequence[Pair], epochs: int, rate: float) -> None:
    """Learn all groups `epochs` times, with AdamW and a rate that falls to nothing."""
    rng = random.Random(0)
    device = next(network.parameters()).device
    dtype = precision.resolve("auto", device)
    optimizer = torch.optim.AdamW(network.trained(), lr=rate, weight_decay=0.01)
    steps = epochs * (len(epoch(groups, rng)) // ROWS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARMUP * steps), max(0.0, 1 - step / steps))
    )
    began = time.monotonic()
    for number in range(epochs):
        network.train()
        total = []
        for batch in batches(epoch(groups, rng), rng):
            with precision.autocast(device, dtype):
                logits = network([(pair.first, pair.second) for pair in batch])
            wanted = torch.tensor([float(pair.same) for pair in batch], device=device)
            loss = functional.binary_cross_entropy_with_logits(logits.float(), wanted)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.trained(), CLIP)
            optimizer.step()
            schedule.step()
            total.append(loss.item())
        print(f"epoch {number + 1} of {epochs}: loss {np.mean(total):.4f}, {_found(network, held):.3f} of paraphrases "
              f"held out found, {time.monotonic() - began:.0f} s", flush=True)  # fmt: skip


def batches(pairs: Sequence[Pair], rng: random.Random) -> list[Sequence[Pair]]:
    """Return batches of pairs of like length."""
    found = []
    for begin in range(0, len(pairs), SHUFFLED * ROWS):
        some = sorted(pairs[begin : begin + SHUFFLED * ROWS], key=lambda pair: len(pair.first) + len(pair.second))
        found += [some[at : at + ROWS] for at in range(0, len(some), ROWS)]
    rng.shuffle(found)
    return found


@torch.no_grad()
def _found(network: PairNetwork, pairs: Sequence[Pair]) -> float:
    """Return the share of the same requests that score above all but WRONG of the others."""
    network.eval()
    texts = [(pair.first, pair.second) for pair in pairs]
    scores = torch.cat([network(texts[at : at + ROWS]) for at in range(0, len(texts), ROWS)]).cpu().numpy()
    same = np.array([pair.same for pair in pairs])
    least = np.quantile(scores[~same], 1 - WRONG)
    return float((scores[same] > least).mean())


def main() -> None:
    """Train and write the adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ADAPTERS)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--rank", type=int, default=32, help="of what is added to each matrix")
    parser.add_argument("--rate", type=float, default=1e-3, help="of learning, at its highest")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    groups, held = split(load_groups())
    pairs = [pair for group in held for pair in (*group.alike(), *group.apart())]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = PairNetwork(ENCODER, arguments.rank).to(device)
    print(f"{len(groups)} groups to learn from, {len(held)} held out, on {device}", flush=True)
    train(network, groups, pairs, arguments.epochs, arguments.rate)
    network.save(arguments.out)


if __name__ == "__main__":
    main()
