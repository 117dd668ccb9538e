"""The embedder's model file: as good as fp32, blind to its neighbours, built once."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoModel

from scripts import build_repository
from scripts.quantization import model_file
from scripts.quantization.graph import observed
from scripts.sentence_encoder import sentence_encoder

Float = NDArray[np.float32]
Ids = list[list[int]]

SUBJECTS = [
    "a Python list", "the kitchen sink", "my grandmother's bicycle", "a PostgreSQL index", "the European Central Bank",
    "a neural network", "an old oak tree", "the speed of light", "the 1969 Moon landing", "a sourdough starter",
]  # fmt: skip
TEMPLATES = [
    "How do I repair {}?",
    "Explain {} to a child of 7.",
    "{} is not what it seems; it never was.",
    "Write three sentences about {}, and then translate the second of them into German.",
    "why {}",
    "We compared {} with {} and found that, on 42 of 50 measures, there was no difference at all between the two.",
    "Delete everything that mentions {} from /var/log/app-2024.log",
    "SELECT name FROM items WHERE title = '{}' ORDER BY price DESC LIMIT 10;",
    "Naïve café owners in Zürich say: „{}“ — 日本語も少し.",
    "{}!!!",
]
SINGLES = [
    "yes", "No.", "42", "?", "hello", "Thank you very much", "asdf qwer zxcv", "🎉", "np.argsort(-x)[:k]",
    "To be, or not to be",
]  # fmt: skip


def sentences() -> list[str]:
    """200 varied sentences, from one word to a hundred."""
    filled = [template.format(subject, SUBJECTS[-1]) for template, subject in itertools.product(TEMPLATES, SUBJECTS)]
    joined = [" ".join(filled[start : start + 2 + start % 4]) for start in range(90)]
    return [*filled, *SINGLES, *joined]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("repository")
    build_repository.build(repository)
    return repository


@pytest.fixture(scope="module")
def session(repository: Path) -> onnxruntime.InferenceSession:
    return load(repository / "embedder" / "1" / "model.onnx")


@pytest.fixture(scope="module")
def ids(repository: Path) -> Ids:
    tokenizer = Tokenizer.from_file(str(repository / "semantic_cache" / "1" / "tokenizer.json"))
    tokenizer.no_padding()
    return [encoding.ids for encoding in tokenizer.encode_batch(sentences())]


@pytest.fixture(scope="module")
def reference(ids: Ids) -> Float:
    """The fp32 model of transformers, with pooling and normalisation spelled out."""
    encoder = AutoModel.from_pretrained(build_repository.ENCODER).eval()
    rows, mask = (torch.from_numpy(tensor) for tensor in batch(ids))
    with torch.no_grad():
        states = encoder(input_ids=rows, attention_mask=mask).last_hidden_state
    means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(means).numpy()


def load(model: bytes | Path) -> onnxruntime.InferenceSession:
    """Load `model` with the threads that the config gives it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options)


def batch(rows: Ids, length: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return ids and mask of `rows`, padded to `length` or to the longest."""
    length = length or max(map(len, rows))
    ids = [row + [0] * (length - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    return np.array(ids), np.array(mask)


def embed(session: onnxruntime.InferenceSession, rows: Ids, length: int | None = None) -> Float:
    """Embed `rows` as one batch, padded to `length` or to the longest."""
    ids, mask = batch(rows, length)
    return session.run(["embedding"], {"input_ids": ids, "attention_mask": mask})[0]


def cosines(left: Float, right: Float) -> Float:
    return (left * right).sum(1)


def test_the_vectors_are_those_of_the_fp32_model(
    session: onnxruntime.InferenceSession, ids: Ids, reference: Float
) -> None:
    similarity = cosines(np.concatenate([embed(session, [row]) for row in ids]), reference)
    assert len(similarity) == 200
    assert similarity.min() >= 0.98
    assert similarity.mean() >= 0.997


def test_the_nearest_sentence_is_that_of_the_fp32_model(
    session: onnxruntime.InferenceSession, ids: Ids, reference: Float
) -> None:
    vectors = embed(session, ids)
    nearest = [np.argmax(each @ each.T - 2 * np.eye(len(each)), axis=1) for each in (vectors, reference)]
    assert np.mean(nearest[0] == nearest[1]) >= 0.9


def test_the_fp32_graph_equals_transformers(ids: Ids, reference: Float) -> None:
    fp32 = load(sentence_encoder(build_repository.ENCODER).SerializeToString())
    np.testing.assert_allclose(np.concatenate([embed(fp32, [row]) for row in ids]), reference, atol=2e-6)


def test_a_sentence_has_the_same_bits_alone_and_in_any_batch(session: onnxruntime.InferenceSession, ids: Ids) -> None:
    length = max(map(len, ids))
    alone = np.concatenate([embed(session, [row], length) for row in ids])
    generator = np.random.default_rng(0)
    for count in (1, 2, 3, 5, 8, 13, 64):
        order = generator.permutation(len(ids))[:count]
        np.testing.assert_array_equal(embed(session, [ids[place] for place in order], length), alone[order])


def test_padding_changes_nothing_that_matters(session: onnxruntime.InferenceSession, ids: Ids) -> None:
    unpadded = np.concatenate([embed(session, [row]) for row in ids])
    padded = embed(session, ids, 128)
    assert cosines(unpadded, padded).min() >= 0.9999


def test_padding_is_left_out_of_everything_but_attention(ids: Ids) -> None:
    fp32 = sentence_encoder(build_repository.ENCODER)
    products = [node.output[0] for node in fp32.graph.node if node.op_type == "MatMul" and node.input[0] != "row"]
    inputs, mask = batch(ids[:5], 128)
    feeds = {"input_ids": inputs, "attention_mask": mask}
    results = load(observed(fp32, products).SerializeToString()).run(products, feeds)
    assert len(products) == 24
    assert {result.shape[:-1] for result in results} == {(mask.sum(),)}


def test_an_empty_row_disturbs_no_other(session: onnxruntime.InferenceSession, ids: Ids) -> None:
    vectors = embed(session, [ids[0], [], ids[1]], 64)
    assert not vectors[1].any()
    np.testing.assert_array_equal(vectors[[0, 2]], embed(session, ids[:2], 64))


def test_vectors_have_length_1_and_padding_alone_gives_zeros(session: onnxruntime.InferenceSession, ids: Ids) -> None:
    np.testing.assert_allclose(np.linalg.norm(embed(session, ids[:20]), axis=1), 1, atol=1e-5)
    assert not embed(session, [[]], 8).any()


def test_the_interface_is_the_one_of_the_config(session: onnxruntime.InferenceSession) -> None:
    tensors = [*session.get_inputs(), *session.get_outputs()]
    assert [(tensor.name, tensor.type, tensor.shape) for tensor in tensors] == [
        ("input_ids", "tensor(int64)", ["batch", "sequence"]),
        ("attention_mask", "tensor(int64)", ["batch", "sequence"]),
        ("embedding", "tensor(float)", ["batch", 384]),
    ]


@pytest.fixture
def embedder_file(repository: Path) -> Path:
    return repository / "embedder" / "1" / "model.onnx"


def test_what_is_up_to_date_is_left_alone(
    repository: Path, embedder_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = embedder_file.stat().st_mtime_ns
    build_repository.build(repository)
    assert embedder_file.stat().st_mtime_ns == before
    assert capsys.readouterr().out.count("is up to date") == 3


@pytest.mark.parametrize("damage", [b"", b"not a model", None])
def test_a_damaged_or_missing_file_is_built_again(repository: Path, embedder_file: Path, damage: bytes | None) -> None:
    original = embedder_file.read_bytes()
    embedder_file.unlink()
    if damage is not None:
        embedder_file.write_bytes(damage)
    build_repository.build(repository)
    assert embedder_file.read_bytes() == original


def test_a_file_of_another_recipe_is_built_again(repository: Path, embedder_file: Path) -> None:
    original = embedder_file.read_bytes()
    older = onnx.load(embedder_file)
    model_file.record(older, {"recipe": "older"})
    onnx.save(older, embedder_file)
    build_repository.build(repository)
    assert embedder_file.read_bytes() == original
    assert [path.name for path in embedder_file.parent.iterdir()] == ["model.onnx"]
