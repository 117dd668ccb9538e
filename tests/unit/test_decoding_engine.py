"""The engine: greedy output that no drafter, speculation length or neighbour changes, and slots that come free."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Rows
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from speculative_decoding.drafter import Drafter, ModelDrafter, Proposals
from speculative_decoding.engine import Engine
from speculative_decoding.kv_layout import SlotMemory
from speculative_decoding.language_model import LanguageModel
from speculative_decoding.options import DrafterName, GenerationOptions
from speculative_decoding.prefill import PREFILL_CHUNK
from speculative_decoding.scheduler import QueueFullError
from speculative_decoding.sequence import FinishReason, Sequence
from speculative_decoding.tokenizer import Tokenizer

from scripts.demo_models.phrasings import UNSEEN
from scripts.serving.server import MODEL_REPOSITORY
from tests import language_models
from tests.decoding import TIMEOUT_S, Answer, decode_plainly
from tests.language_models import END, VOCABULARY
from tests.unit.conftest import Export

TARGET = MODEL_REPOSITORY / "language_model" / "1" / "target"
TOKENIZER = Tokenizer(TARGET, "chat")
NAMES = ["itertools.chain", "os.path.join", "json.dumps", "heapq.merge", "re.sub", "zlib.crc32", "bisect.insort"]
SLOTS = 4
MANY = 1000


class GatedDrafter(Drafter):
    """Lets a test hold the engine within a step, look around, and let one step pass, or fail."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.entered: queue.SimpleQueue[int] = queue.SimpleQueue()  # rows of the step that waits now
        self._gate: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self.open = threading.Event()

    def wait_for_step(self) -> int:
        """Return how many sequences are in the step that the engine has come to."""
        return self.entered.get(timeout=TIMEOUT_S)

    def let_pass(self, error: Exception | None = None) -> None:
        self._gate.put(error)

    def release(self) -> None:
        """Hold nothing any more."""
        self.open.set()
        self._gate.put(None)

    @property
    def ran_s(self) -> float:
        return self._drafter.ran_s

    def propose(self, sequences: Rows[Sequence], lengths: NDArray[np.int32]) -> Proposals:
        if not self.open.is_set():
            self.entered.put(len(sequences))
            if error := self._gate.get(timeout=TIMEOUT_S):
                raise error
        return self._drafter.propose(sequences, lengths)

    def fill(self, committed: Mapping[int, list[int]]) -> set[int]:
        return self._drafter.fill(committed)

    def slot(self, slot: int) -> SlotMemory:
        return self._drafter.slot(slot)

    def seen(self, slot: int) -> int:
        return self._drafter.seen(slot)

    def resume(self, slot: int, length: int) -> None:
        self._drafter.resume(slot, length)

    def commit(self, slot: int, length: int) -> None:
        self._drafter.commit(slot, length)

    def move(self, source: int, destination: int) -> None:
        self._drafter.move(source, destination)


StartEngine = Callable[..., Engine]


@pytest.fixture
def start() -> Iterator[StartEngine]:
    """Start engines that are stopped after the test."""
    engines: list[Engine] = []

    def start_one(
        target: LanguageModel, drafter: Drafter | None, speculation_length: int = 4, max_waiting: int = MANY
    ) -> Engine:
        engines.append(Engine(target, drafter, speculation_length, max_waiting))
        return engines[-1]

    yield start_one
    for engine in engines:
        engine.stop()


def load(folder: Path) -> LanguageModel:
    return LanguageModel(folder, SLOTS, threads=1, spinning=False)


@pytest.fixture(scope="module")
def tiny(exported: Callable[[str], Export]) -> LanguageModel:
    return load(exported("llama-fp32").folder)


@pytest.fixture(scope="module")
def tiny_drafts(
    exported: Callable[[str], Export], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, LanguageModel]:
    """Drafts of the tiny target: itself, one that is often right, and another model altogether."""
    same = exported("llama-fp32").folder
    noisy = language_models.perturb(same, tmp_path_factory.mktemp("drafts") / "noisy", noise=0.05)
    return {"same": load(same), "noisy": load(noisy), "other": load(exported("qwen3-row-int8").folder)}


@pytest.fixture(scope="module")
def target() -> LanguageModel:
    return load(TARGET)


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LanguageModel]:
    """Drafts of the project's target: itself, and one that is often right."""
    noisy = language_models.perturb(TARGET, tmp_path_factory.mktemp("drafts") / "noisy", noise=0.3)
    return {"same": load(TARGET), "noisy": load(noisy)}


def ask(
    engine: Engine,
    prompt: list[int],
    max_tokens: int = 24,
    speculation_length: int | None = None,
    drafter: DrafterName = "model",
) -> tuple[Sequence, Answer]:
    answer = Answer()
    options = GenerationOptions(max_tokens=max_tokens, speculation_length=speculation_length, drafter=drafter)
    sequence = Sequence(prompt, options, answer.listen, engine.end_tokens)
    engine.submit(sequence)
    return sequence, answer


def greedy(model: LanguageModel, prompt: list[int], max_tokens: int) -> tuple[list[int], FinishReason]:
    return decode_plainly(model, prompt, GenerationOptions(max_tokens=max_tokens))


def random_prompts(count: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, VOCABULARY, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def wait_until_free(engine: Engine) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while engine.load()[:2] != (0, 0):
        assert time.monotonic() < deadline, f"running and waiting: {engine.load()}"
        time.sleep(0.002)


@pytest.mark.parametrize("name", ["same", "noisy"])
def test_the_projects_target_answers_the_same_with_any_draft_and_speculation_length(
    target: LanguageModel, drafts: dict[str, LanguageModel], start: StartEngine, name: str
) -> None:
    lengths = range(9)
    questions = [UNSEEN[number % len(UNSEEN)].format(n=NAMES[number % len(NAMES)]) for number in range(len(lengths))]
    prompts = [TOKENIZER.encode_prompt(question) for question in questions]
    expected = [greedy(target, prompt, 64) for prompt in prompts]
    engine = start(target, ModelDrafter(drafts[name]))
    asked = [ask(engine, prompt, 64, length) for prompt, length in zip(prompts, lengths, strict=True)]
    assert [(answer.wait(), answer.tokens) for _, answer in asked] == [(reason, tokens) for tokens, reason in expected]
    speculated = [sequence for sequence, _ in asked[1:]]
    assert asked[0][0].drafted == 0
    assert all(sequence.drafted and sequence.accepted for sequence in speculated)
    assert "stop" in {reason for _, reason in expected}
    rates = [sequence.acceptance_rate for sequence in speculated]
    assert set(rates) == {1.0} if name == "same" else min(rate or 0.0 for rate in rates) < 1.0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["same", "noisy", "other"]),
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 8), st.integers(1, 40)), min_size=1, max_size=10),
    st.integers(0, 99),
)
def test_any_mix_of_prompts_lengths_and_arrivals_gives_the_plain_answers(
    tiny: LanguageModel,
    tiny_drafts: dict[str, LanguageModel],
    name: str,
    requests: list[tuple[int, int, int]],
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(5, VOCABULARY, length).tolist() for length, _, _ in requests]
    expected = [greedy(tiny, prompt, most) for prompt, (_, _, most) in zip(prompts, requests, strict=True)]
    engine = Engine(tiny, ModelDrafter(tiny_drafts[name]), 4, MANY)
    try:
        asked = []
        for prompt, (_, speculation_length, most) in zip(prompts, requests, strict=True):
            asked.append(ask(engine, prompt, most, speculation_length))
            time.sleep(rng.choice([0, 0.002]))  # some arrive while others decode
        for (sequence, answer), (tokens, reason) in zip(asked, expected, strict=True):
            assert (answer.wait(), answer.tokens) == (reason, tokens)
            assert sequence.tokens == [*sequence.prompt, *tokens]
            assert sequence.accepted <= sequence.drafted
        wait_until_free(engine)
    finally:
        engine.stop()


def test_the_tiny_drafts_are_always_often_and_hardly_ever_right(
    tiny: LanguageModel, tiny_drafts: dict[str, LanguageModel], start: StartEngine
) -> None:
    rates = {}
    for name, draft in tiny_drafts.items():
        engine = start(tiny, ModelDrafter(draft))
        asked = [ask(engine, prompt) for prompt in random_prompts(8)]
        assert all(answer.wait() for _, answer in asked)
        rates[name] = sum(one.accepted for one, _ in asked) / sum(one.drafted for one, _ in asked)
        engine.stop()
    assert rates["same"] == 1.0
    assert 0.2 < rates["noisy"] < 1.0
    assert rates["other"] < 0.2


def test_a_newcomer_joins_while_others_decode(
    tiny: LanguageModel, tiny_drafts: dict[str, LanguageModel], start: StartEngine
) -> None:
    prompts = random_prompts(3)
    expected = [greedy(tiny, prompt, 40) for prompt in prompts]
    gate = GatedDrafter(ModelDrafter(tiny_drafts["noisy"]))
    engine = start(tiny, gate)
    asked = [ask(engine, prompts[0], 40)]
    assert gate.wait_for_step() == 1
    for rows, prompt in enumerate(prompts[1:], 2):
        asked.append(ask(engine, prompt, 40))
        gate.let_pass()
        assert gate.wait_for_step() == rows
    assert engine.load()[:2] == (3, 0)
    gate.release()
    assert [(answer.wait(), answer.tokens) for _, answer in asked] == [(reason, tokens) for tokens, reason in expected]


def test_speculation_takes_fewer_steps_and_streams_several_tokens_at_once(
    tiny: LanguageModel, tiny_drafts: dict[str, LanguageModel], start: StartEngine
) -> None:
    [prompt] = random_prompts(1)
    engine = start(tiny, ModelDrafter(tiny_drafts["same"]), speculation_length=4)
    _, plain = ask(engine, prompt, 31, speculation_length=0)
    assert plain.wait() == "length" and plain.pieces == 31
    _, speculative = ask(engine, prompt, 31)
    assert speculative.wait() == "length" and speculative.pieces == 1 + 30 / 5
    assert speculative.tokens == plain.tokens


@pytest.mark.parametrize("speculation_length", [0, 4])
def test_one_token_is_one_token(
    tiny: LanguageModel, tiny_drafts: dict[str, LanguageModel], start: StartEngine, speculation_length: int
) -> None:
    engine = start(tiny, ModelDrafter(tiny_drafts["same"]), speculation_length)
    for prompt in random_prompts(5):
        sequence, answer = ask(engine, prompt, 1)
        assert (answer.wait(), answer.tokens) == ("length", greedy(tiny, prompt, 1)[0])
        assert sequence.acceptance_rate is None


def test_without_a_draft_a_wish_for_speculation_is_plain_decoding(tiny: LanguageModel, start: StartEngine) -> None:
    engine = start(tiny, None)
    [prompt] = random_prompts(1)
    sequence, answer = ask(engine, prompt, 24, speculation_length=8)
    assert (answer.wait(), sequence.drafted) == ("length", 0)
    assert answer.tokens == greedy(tiny, prompt, 24)[0]


def test_an_end_token_within_an_accepted_draft_ends_the_answer_before_it(
    exported: Callable[[str], Export], tmp_path: Path, start: StartEngine
) -> None:
    [prompt] = random_prompts(1)
    plain, _ = greedy(load(exported("llama-fp32").folder), prompt, 12)
    position = next(index for index in range(3, 12) if plain[index] not in plain[:index])
    folder = language_models.perturb(exported("llama-fp32").folder, tmp_path / "ending", noise=0.0)
    config = (folder / "genai_config.json").read_text()
    changed = config.replace(f'"eos_token_id": {END}', f'"eos_token_id": [{END}, {plain[position]}]')
    assert changed != config
    (folder / "genai_config.json").write_text(changed)
    engine = start(load(folder), ModelDrafter(load(folder)))
    for speculation_length in (0, position - 1, position, position + 1, position + 4):
        sequence, answer = ask(engine, prompt, 30, speculation_length)
        assert (answer.wait(), answer.tokens) == ("stop", plain[:position])
        assert sequence.answered == position
        assert speculation_length == 0 or sequence.accepted


@pytest.mark.parametrize("speculation_length", [0, 1, 4, 8])
def test_an_answer_ends_with_the_context_whatever_is_beside_it(
    tiny: LanguageModel, tiny_drafts: dict[str, LanguageModel], start: StartEngine, speculation_length: int
) -> None:
    engine = start(tiny, ModelDrafter(tiny_drafts["noisy"]), speculation_length)
    most = engine.context_length
    lengths = [*range(most - 12, most), 3, 9]
    rng = np.random.default_rng(1)
    prompts = [rng.integers(5, VOCABULARY, length).tolist() for length in lengths]
    expected = [greedy(tiny, prompt, 60) for prompt in prompts]
    asked = [ask(engine, prompt, 60) for prompt in prompts]
    assert [(answer.wait(), answer.tokens) for _, answer in asked] == [(reason, tokens) for tokens, reason in expected]
    assert [len(answer.tokens) for _, answer in asked[:12]] == list(range(12, 0, -1))
    assert bool(sum(sequence.accepted for sequence, _ in asked)) == bool(speculation_length)


def test_cancelling_while_waiting_prefilling_or_decoding_frees_the_place(
    exported: Callable[[str], Export], tiny_drafts: dict[str, LanguageModel], start: StartEngine
) -> None:
    slots = 2
    target = LanguageModel(exported("llama-fp32").folder, slots, threads=1, spinning=False)
    gate = GatedDrafter(ModelDrafter(tiny_drafts["noisy"]))
    engine = start(target, gate)
    rng = np.random.default_rng(2)
    short, long = random_prompts(1)[0], rng.integers(5, VOCABULARY, PREFILL_CHUNK + 20).tolist()
    stays = ask(engine, short, 60)
    gate.wait_for_step()
    prefilling, waiting = ask(engine, long), ask(engine, short)
    gate.let_pass()
    assert gate.wait_for_step() == 1  # one chunk of the long prompt is in, and it is not decoding yet
    assert engine.load()[:2] == (2, 1)
    engine.cancel(prefilling[0])
    engine.cancel(waiting[0])
    gate.let_pass()
    assert prefilling[1].wait() == waiting[1].wait() == "cancelled"
    assert gate.wait_for_step() == 1
    assert engine.load()[:2] == (1, 0)

    decoding = ask(engine, long, 10)
    for rows in (1, 2):
        gate.let_pass()
        assert gate.wait_for_step() == rows
    later = ask(engine, long, 10)
    engine.cancel(decoding[0])
    gate.release()
    assert decoding[1].wait() == "cancelled"
    assert (later[1].wait(), later[1].tokens) == ("length", greedy_of(exported, long, 10))
    assert (stays[1].wait(), stays[1].tokens) == ("length", greedy_of(exported, short, 60))
    wait_until_free(engine)


def greedy_of(exported: Callable[[str], Export], prompt: list[int], max_tokens: int) -> list[int]:
    return greedy(load(exported("llama-fp32").folder), prompt, max_tokens)[0]


def test_cancelling_the_first_of_several_moves_the_last_into_its_slot_unharmed(
    tiny: LanguageModel, tiny_drafts: dict[str, LanguageModel], start: StartEngine
) -> None:
    prompts = random_prompts(SLOTS, seed=3)
    expected = [greedy(tiny, prompt, 40)[0] for prompt in prompts]
    gate = GatedDrafter(ModelDrafter(tiny_drafts["noisy"]))
    engine = start(tiny, gate)
    asked = [ask(engine, prompt, 40) for prompt in prompts]
    while gate.wait_for_step() < SLOTS:
        gate.let_pass()
    engine.cancel(asked[0][0])
    gate.let_pass()
    gate.wait_for_step()
    gate.release()
    assert asked[0][1].wait() == "cancelled"
    for (_, answer), tokens in zip(asked[1:], expected[1:], strict=True):
        assert (answer.wait(), answer.tokens) == ("length", tokens)


def test_a_full_queue_refuses_and_takes_again_once_there_is_room(
    exported: Callable[[str], Export], tiny_drafts: dict[str, LanguageModel], start: StartEngine
) -> None:
    target = LanguageModel(exported("llama-fp32").folder, 1, threads=1, spinning=False)
    gate = GatedDrafter(ModelDrafter(tiny_drafts["same"]))
    engine = start(target, gate, max_waiting=2)
    [prompt] = random_prompts(1)
    asked = [ask(engine, prompt)]
    gate.wait_for_step()
    asked += [ask(engine, prompt), ask(engine, prompt)]
    with pytest.raises(QueueFullError, match="2 requests are waiting already"):
        ask(engine, prompt)
    assert engine.load()[:2] == (1, 2)
    gate.release()
    assert [answer.wait() for _, answer in asked] == ["length"] * 3
    _, again = ask(engine, prompt)
    assert again.wait() == "length"


def test_a_failing_step_is_answered_with_error_and_the_engine_goes_on(
    tiny: LanguageModel, tiny_drafts: dict[str, LanguageModel], start: StartEngine
) -> None:
    gate = GatedDrafter(ModelDrafter(tiny_drafts["noisy"]))
    engine = start(tiny, gate)
    prompts = random_prompts(2)
    asked = [ask(engine, prompt) for prompt in prompts]
    while gate.wait_for_step() < len(prompts):
        gate.let_pass()
    gate.let_pass(RuntimeError("out of luck"))
    assert [answer.wait() for _, answer in asked] == ["error", "error"]
    assert engine.load()[:2] == (0, 0)
    gate.release()
    for prompt in prompts:
        _, answer = ask(engine, prompt)
        assert (answer.wait(), answer.tokens) == ("length", greedy(tiny, prompt, 24)[0])


def test_stopping_answers_whoever_is_in_the_engine(tiny: LanguageModel, tiny_drafts: dict[str, LanguageModel]) -> None:
    gate = GatedDrafter(ModelDrafter(tiny_drafts["noisy"]))
    engine = Engine(tiny, gate, 4, MANY)
    asked = [ask(engine, prompt, 100) for prompt in random_prompts(SLOTS + 2)]
    gate.wait_for_step()
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    gate.release()
    stopping.join(TIMEOUT_S)
    assert not stopping.is_alive()
    assert {answer.wait() for _, answer in asked} == {"cancelled"}


def test_a_sequence_says_what_it_took(
    tiny: LanguageModel, tiny_drafts: dict[str, LanguageModel], start: StartEngine
) -> None:
    sequence, answer = ask(start(tiny, ModelDrafter(tiny_drafts["same"])), [7, 8, 9])
    assert answer.wait() == "length"
    spent = sequence.milliseconds()
    assert list(spent) == ["queue", "prefill", "decode"] and min(spent.values()) >= 0 and spent["decode"] > 0
    assert (sequence.answered, sequence.acceptance_rate) == (24, 1.0)
