"""What needs an NVIDIA GPU: kernels, chained drafts and exact search, against the same on the CPU."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from semantic_cache.exact_index import GROUP, ExactIndex
from semantic_cache.records import Vectors
from speculative_decoding.adjustments import Adjustments, adjust
from speculative_decoding.cuda_device import CudaDevice
from speculative_decoding.device import OutOfDeviceMemoryError
from speculative_decoding.drafter import ModelDrafter
from speculative_decoding.engine import Engine
from speculative_decoding.execution_provider import execution_provider
from speculative_decoding.options import GenerationOptions
from speculative_decoding.paged_independence import limit_tokens
from speculative_decoding.paged_model import BLOCK_TOKENS, PagedModel
from speculative_decoding.sampling import WISH, Filters, Sampler, choose, wishes_of

from perf.paged_shapes import Llama, write_llama
from tests.decoding import (
    ADJUSTED,
    PENALTIES,
    check_adjusted_choices,
    check_drafts_on_device,
    check_mixed_calls,
    check_prefixes_come_back_from_the_host,
    decode_all,
)

pytestmark = pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers() or not importlib.util.find_spec("cupy"),
    reason="needs an NVIDIA GPU, onnxruntime-gpu and CuPy",
)

TINY = Llama(256, 2, 4, 2, 64, 512, 1000)
CONTEXT = 1024
FILTERS = (
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 1.5, "min_p": 0.05},
    {"temperature": 1.2, "top_k": 100, "top_p": 0.6, "min_p": 0.01},
)


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return CudaDevice(execution_provider("GPU", 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    write_llama(TINY, path, CONTEXT)
    return path


def load(folder: Path, slots: int = 8, gpu: int = 0) -> PagedModel:
    return PagedModel(folder, slots, 0, False, execution_provider("GPU", gpu))


def gpus() -> int:
    count: int = importlib.import_module("cupy").cuda.runtime.getDeviceCount()
    return count


@pytest.mark.parametrize("vocabulary", [1000, 32000, 151936])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_gpu_chooses_as_the_cpu_does(device: CudaDevice, vocabulary: int, dtype: type) -> None:
    rng = np.random.default_rng(vocabulary)
    rows = 16 * len(FILTERS)
    logits = (3 * rng.standard_normal((rows, vocabulary))).astype(dtype)
    wishes = np.concatenate(
        [wishes_of([Sampler(GenerationOptions(seed=3, **FILTERS[row % len(FILTERS)]), [1] * row, frozenset())], 1)[0]
         for row in range(rows)]
    )  # fmt: skip
    there, chosen = device.zeros(logits.shape, dtype), device.zeros((rows,), np.int32)
    given = device.zeros((wishes.nbytes,), np.uint8)
    device.upload(there, logits)
    device.upload(given, wishes.view(np.uint8))
    device.choose(there, given, chosen)
    got = device.download(chosen)
    expected = [
        choose(logits[row].astype(np.float32), Filters(temperature, top_k, top_p, least), key)
        for row, (key, temperature, top_p, least, top_k) in enumerate(wishes.tolist())
    ]
    assert np.mean(got == expected) >= 0.99  # the last bit of an exponential may tip a filter
    device.argmax(there, chosen)
    assert np.array_equal(device.download(chosen), logits.argmax(-1))


@pytest.mark.parametrize("vocabulary", [1000, 151936])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_gpu_adjusts_logits_as_the_cpu_does_to_the_last_bit(device: CudaDevice, vocabulary: int, dtype: type) -> None:
    rng, width = np.random.default_rng(vocabulary), 17
    rows: list[Adjustments | None] = [None]
    for number in range(3 * len(ADJUSTED)):
        options = GenerationOptions(**ADJUSTED[number % len(ADJUSTED)])
        ends = frozenset(rng.integers(0, vocabulary, 9).tolist())
        made = Sampler(options, rng.integers(0, vocabulary, 600).tolist(), ends)
        made.commit(rng.integers(0, 50, number % 4).tolist())
        rows.append(made.adjustments(rng.integers(0, 50, width - 1).tolist()))
    together = Adjustments.together(rows, width)
    entries, places = together.entries, together.places.reshape(-1)
    logits = (3 * rng.standard_normal((len(places), vocabulary))).astype(dtype)
    there, adjusted = device.zeros(logits.shape, dtype), device.zeros(logits.shape, np.float32)
    device.upload(there, logits)
    given = []
    for values in (entries, places):
        given.append(device.zeros((values.nbytes,), np.uint8))
        device.upload(given[-1], values.view(np.uint8))
    device.adjust(there, *given, adjusted)
    expected = logits.astype(np.float32)
    for row, place in zip(expected, places, strict=True):
        adjust(row, entries, place)
    assert not np.array_equal(expected, logits)
    assert np.array_equal(device.download(adjusted), expected)


def test_biased_penalized_and_too_early_tokens_are_chosen_on_the_gpu(folder: Path) -> None:
    check_adjusted_choices(load(folder))


def test_drafts_are_taken_and_accepted_on_the_gpu(device: CudaDevice) -> None:
    check_drafts_on_device(device)


def test_of_equal_logits_the_lower_token_comes_first(device: CudaDevice) -> None:
    wishes = np.zeros(300, WISH)
    for row in range(300):
        sampler = Sampler(GenerationOptions(temperature=1.0, top_k=7, seed=row), [1], frozenset())
        [[wishes[row]]] = wishes_of([sampler], 1)
    logits, chosen = device.zeros((300, 5000), np.float16), device.zeros((300,), np.int32)
    given = device.zeros((wishes.nbytes,), np.uint8)
    device.upload(given, wishes.view(np.uint8))
    device.choose(logits, given, chosen)
    assert set(device.download(chosen).tolist()) == set(range(7))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.95}], ids=["greedy", "seeded"])
def test_what_a_draft_feeds_itself_is_what_it_would_be_fed_step_by_step(
    folder: Path, sampling: dict[str, float]
) -> None:
    model, steps = load(folder), 6
    prompts = np.random.default_rng(0).integers(0, TINY.vocabulary, (5, 40))
    counts, tokens = np.array([1, 2, 0, 4, 3], np.int32), prompts[:, -4:]
    samplers = [
        Sampler(GenerationOptions(seed=row, **sampling), prompt.tolist(), frozenset())
        for row, prompt in enumerate(prompts)
    ]

    def begin() -> None:
        for slot, prompt in enumerate(prompts):
            model.truncate(slot, 0)
            model.forward(slot, prompt[None, :-4], np.array([36], np.int32))

    begin()
    wishes = wishes_of(samplers, steps).T
    followed = model.follow(tokens, counts, steps, wishes if sampling else None).tokens()
    assert model.lengths[:5].tolist() == [36 + count + steps - 1 if count else 36 for count in counts]
    begin()
    fed, times = tokens, counts
    for step in range(steps):
        logits = model.forward(0, fed, times)
        for row in np.flatnonzero(counts).tolist():
            place = int(times[row]) - 1
            expected = logits.choose(np.broadcast_to(wishes[step][:, None], logits.shape[:2]))
            assert followed[row, step] == expected.tokens[row, place]
        fed, times = followed[:, step : step + 1], np.minimum(counts, 1)
    model.check_integrity()


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    target, draft = load(folder), load(folder)
    assert limit_tokens(target) and target.mixes(4, 5, [[1] * 60])
    running = Engine(target, ModelDrafter(draft), 4, 1000)
    yield running
    running.stop()


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.8, "top_p": 0.95},
        {"temperature": 0.8, "repetition_penalty": 1.1, "logprobs": 2},
        {"temperature": 0.8, "logit_bias": ((3, 1.5),), **PENALTIES},
    ],
    ids=["greedy", "seeded", "penalized", "adjusted"],
)
def test_speculation_changes_no_token(engine: Engine, sampling: dict[str, float]) -> None:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, TINY.vocabulary, length).tolist() for length in rng.integers(1, 300, 24)]
    found = []
    for length in (0, None):
        options = [
            GenerationOptions(
                max_tokens=40, seed=number, ignore_eos=True, speculation_length=length, drafter="model", **sampling
            )
            for number in range(len(prompts))
        ]
        answers, sequences = decode_all(engine, prompts, options)
        found.append(answers)
    assert found[0] == found[1]
    assert sum(sequence.accepted for sequence in sequences) > 0


def test_rows_and_chunks_of_prompts_in_one_call_have_the_bits_that_they_have_alone(folder: Path) -> None:
    check_mixed_calls(load(folder), load(folder))


def test_prefixes_pushed_off_the_gpu_come_back_from_the_host(folder: Path) -> None:
    size = load(folder, 1).block_bytes
    kept = {"cached_bytes": 2 * size, "tier_bytes": 6 * size}
    model = PagedModel(folder, 1, 0, False, execution_provider("GPU", 0), **kept)
    check_prefixes_come_back_from_the_host(model, BLOCK_TOKENS)


def test_a_model_runs_on_the_gpu_that_it_is_given(folder: Path) -> None:
    if gpus() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    prompts = [np.random.default_rng(row).integers(0, TINY.vocabulary, 200 * row + 1).tolist() for row in range(4)]
    wishes = [GenerationOptions(max_tokens=40, ignore_eos=True, seed=row, temperature=0.5 * row) for row in range(4)]
    found = []
    for gpu in (0, 1):
        used = [_used_bytes(number) for number in range(2)]
        target, draft = load(folder, 64, gpu), load(folder, 64, gpu)
        assert limit_tokens(target)
        assert [_used_bytes(number) > before + (50 << 20) for number, before in enumerate(used)] == [gpu == 0, gpu == 1]
        engine = Engine(target, ModelDrafter(draft), 4, 10)
        found.append(decode_all(engine, prompts, wishes)[0])
        engine.stop()
    assert found[0] == found[1]


def _used_bytes(gpu: int) -> int:
    cupy = importlib.import_module("cupy")
    with cupy.cuda.Device(gpu):
        free, total = cupy.cuda.runtime.memGetInfo()
    used: int = total - free
    return used


def test_what_does_not_fit_is_refused_with_the_numbers(folder: Path) -> None:
    with pytest.raises(OutOfDeviceMemoryError, match=r"slots of 1024 tokens .* bytes are needed on GPU 0, which has"):
        load(folder, slots=10_000_000)


def test_exact_search_finds_what_comparing_all_finds() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((3 * GROUP + 7, 64)).astype(np.float32)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    index, ids = ExactIndex(64), np.arange(10, 10 + len(matrix))
    for begin in range(0, len(matrix), 1000):
        part = slice(begin, begin + 1000)
        index.add(Vectors(ids[part].astype(np.uint64), [100.0 + id_ for id_ in ids[part].tolist()], matrix[part]))

    def check(alive: np.ndarray) -> None:
        asked = rng.standard_normal((50, 64)).astype(np.float32)
        asked /= np.linalg.norm(asked, axis=1, keepdims=True)
        for vector in asked:
            similarities = matrix.astype(np.float16).astype(np.float32) @ vector
            order = np.flatnonzero(alive)[np.argsort(-similarities[alive], kind="stable")]
            found = np.array(index.nearest(vector, 10)) - 10
            np.testing.assert_allclose(similarities[found], similarities[order[:10]], atol=1e-5)

    alive = np.ones(len(matrix), bool)
    check(alive)
    gone = rng.choice(len(matrix), 1000, replace=False)
    index.remove([*ids[gone].tolist(), 10**9])
    alive[gone] = False
    assert index.size == alive.sum()
    check(alive)
    index.expire(100.0 + ids[500])
    alive[:501] = False
    check(alive)
