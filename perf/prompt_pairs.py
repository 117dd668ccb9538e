"""The labelled prompt pairs in perf/data, and the cosines that the embedder gives them."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported

import onnxruntime

from scripts.serving.installation import MODEL_REPOSITORY, PYTHON_BACKENDS

sys.path.append(str(PYTHON_BACKENDS))

from semantic_cache.embedder import Embedder, Tokens, Vector
from semantic_cache.pair_model import PairModel
from semantic_cache.policy import Policy
from semantic_cache.verifier.pair_verifier import PairVerifier
from semantic_cache.verifier.slips import Slips
from semantic_cache.verifier.verifier import Verifier

PAIRS = Path(__file__).parent / "data" / "prompt_pairs.jsonl"
TOKENIZER = MODEL_REPOSITORY / "semantic_cache" / "1" / "tokenizer.json"


@dataclass(frozen=True)
class Pair:
    """Two prompts. `label`: paraphrase, near_miss or unrelated; `kind`: how they differ.

    `split`: tune, test, or blind: a test of other topics by authors who did not know the verifier, asked for
    paraphrases that share few words with the prompt (`apart`), or are put as people put things (`everyday`).
    """

    first: str
    second: str
    label: str
    kind: str
    topic: str
    split: str


def load_pairs(split: str) -> list[Pair]:
    """Return the pairs of one split; no topic is in both."""
    pairs = [Pair(**json.loads(line)) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    return [pair for pair in pairs if pair.split == split]


def make_embedder() -> Embedder:
    """Return the embedder of the built model repository, without a server."""
    infer = _open("embedder")
    return Embedder(TOKENIZER, lambda ids, mask: infer(input_ids=ids, attention_mask=mask))


def make_verifier() -> PairVerifier:
    """Return the verifier as it is served, with the pair model of the built model repository, without a server."""
    model = make_pair_model()
    return PairVerifier(Verifier.load(), model, Policy().pair_model, Slips(model.words()))


def make_pair_model() -> PairModel:
    """Return the pair model of the built model repository, without a server."""
    return PairModel(TOKENIZER, _open("pair_model"))


def _open(model: str) -> Callable[..., Vector]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(str(MODEL_REPOSITORY / model / "1" / "model.onnx"), options)

    def infer(**inputs: Tokens) -> Vector:
        found: Vector = session.run(None, inputs)[0]
        return found

    return infer


def embed_all(prompts: Sequence[str]) -> dict[str, Vector]:
    """Return the unit vector of every prompt, as the served embedder gives it alone or in any batch."""
    embed = make_embedder()
    vectors = {}
    for at in range(0, len(prompts), 32):
        chunk = prompts[at : at + 32]
        for prompt, vector in zip(chunk, embed(chunk), strict=True):
            assert vector is not None, f"longer than the embedder reads: {prompt[:60]!r}"
            vectors[prompt] = vector
    return vectors


def embed_pairs(pairs: Sequence[Pair]) -> dict[str, Vector]:
    """Return the unit vector of every prompt in `pairs`."""
    return embed_all(sorted({prompt for pair in pairs for prompt in (pair.first, pair.second)}))


def cosines(pairs: Sequence[Pair], vectors: Mapping[str, Vector]) -> list[float]:
    """Return the cosine of each pair."""
    return [float(vectors[pair.first] @ vectors[pair.second]) for pair in pairs]


def similarities(pairs: Sequence[Pair]) -> list[float]:
    """Embed `pairs`, and return the cosine of each."""
    return cosines(pairs, embed_pairs(pairs))
