"""Distil the repository's sentence encoder, all-MiniLM-L6-v2, to three layers.

    python -m scripts.distill_embedder [--output DIR] [--steps N] [--feed-forward N] [--texts N]

What is learned from is the documentation of the running Python and of its packages: nothing is downloaded. The graded
sentence pairs that perf.distillation measures with are kept out of it.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from scripts import distill
from scripts.build_repository import ENCODER
from scripts.distillation.documentation import sentences
from scripts.distillation.errors import DistillationError
from scripts.quantization import tasks

OUTPUT = distill.WORK / "embedder-3-layers" / "student"
LAYERS = 3


def write_texts(path: Path, count: int) -> None:
    """Write `count` sentences, drawn with a fixed seed, none of which is among the graded pairs."""
    kept_out = {sentence.lower() for sentence in tasks.sentences(tasks.read_pairs())}
    found = [sentence for sentence in sentences() if sentence.lower() not in kept_out]
    chosen = random.Random(0).sample(found, min(count, len(found)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in chosen), encoding="utf-8")


def main() -> None:
    """Write the texts and distil."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--feed-forward", type=int, default=768)
    parser.add_argument("--texts", type=int, default=40_000)
    arguments = parser.parse_args()
    texts = arguments.output.parent / "texts.jsonl"
    if not texts.exists():
        write_texts(texts, arguments.texts)
    line = [str(ENCODER), "--data", str(texts), "--output", str(arguments.output), "--layers", str(LAYERS)]
    line += ["--feed-forward", str(arguments.feed_forward), "--steps", str(arguments.steps), "--rows", "64"]
    line += ["--length", "64", "--rate", "4e-4", "--patience", "20", "--work", str(arguments.output.parent)]
    try:
        distill.distill(distill.parse(line))
    except DistillationError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
