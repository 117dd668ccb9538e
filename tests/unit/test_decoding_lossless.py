"""The promise: with the demo pair, what is decoded is plain decoding's, token for token.

In any batch, with any drafter and speculation length, greedily or with a seed, whoever arrives or leaves meanwhile.
The full form of it is `make test-full`.
"""

import itertools
import random
import threading
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
from speculative_decoding.drafter import ModelDrafter
from speculative_decoding.engine import Engine
from speculative_decoding.language_model import LanguageModel
from speculative_decoding.options import DRAFTERS, DrafterName, GenerationOptions
from speculative_decoding.responder import Piece, Responder
from speculative_decoding.sequence import FinishReason, Sequence
from speculative_decoding.step_costs import StepCosts
from speculative_decoding.tokenizer import Tokenizer
from speculative_decoding.warm_up import measure_costs

from scripts.demo_models.phrasings import UNSEEN
from scripts.serving.server import MODEL_REPOSITORY
from tests.decoding import TIMEOUT_S, Answer, decode_plainly

FOLDER = MODEL_REPOSITORY / "language_model" / "1"
TOKENIZER = Tokenizer(FOLDER / "target", "chat")
NAMES = ["itertools.chain", "os.path.join", "json.dumps", "heapq.merge", "re.sub", "zlib.crc32", "bisect.insort"]
MOST_SLOTS = 16
SAMPLING = {"greedy": {}, "seeded": {"temperature": 0.8, "top_p": 0.95}}
PENALIZED = {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "min_tokens": 20, "top_k": 40}


class Scale(NamedTuple):
    """How much is compared: prompts, and tokens of each answer."""

    prompts: int
    tokens: int


SCALES = [
    pytest.param(Scale(8, 48), id="reduced"),
    pytest.param(Scale(104, 256), id="full", marks=pytest.mark.full),
]


class Models(NamedTuple):
    """The demo pair, with the engine's own measurements."""

    target: LanguageModel
    drafter: ModelDrafter
    costs: StepCosts


@cache
def alone() -> LanguageModel:
    """The target in a session of its own, for the expected answers."""
    return LanguageModel(FOLDER / "target", 1, threads=2, spinning=False)


@pytest.fixture(scope="module")
def models() -> dict[int, Models]:
    """The demo pair with room for so many sequences."""
    made = {}
    for slots in (1, 4, MOST_SLOTS):
        target = LanguageModel(FOLDER / "target", slots, threads=2, spinning=False)
        draft = LanguageModel(FOLDER / "draft", slots, threads=1, spinning=False)
        drafter = ModelDrafter(draft, loops=[4, 8])
        made[slots] = Models(target, drafter, measure_costs(target, drafter, 8))
    return made


@cache
def prompt(number: int) -> list[int]:
    name = NAMES[number % len(NAMES)]
    return TOKENIZER.encode_prompt(f"{UNSEEN[number % len(UNSEEN)].format(n=name)} {number // len(UNSEEN) or ''}")


@cache
def expected(number: int, options: GenerationOptions) -> tuple[list[int], FinishReason]:
    return decode_plainly(alone(), prompt(number), options)


def options_of(sampling: str, number: int, tokens: int) -> GenerationOptions:
    return GenerationOptions(max_tokens=tokens, ignore_eos=True, seed=number, **SAMPLING[sampling])


class Driver:
    """Keeps an engine full: the next sequence arrives when one ends, some are cancelled on their way."""

    def __init__(self, engine: Engine, batch: int) -> None:
        self._engine = engine
        self._batch = batch
        self._random = random.Random(batch)

    def run(self, asked: list[tuple[list[int], GenerationOptions]]) -> list[tuple[Sequence, Answer]]:
        started: list[tuple[Sequence, Answer]] = []
        for number, (tokens, options) in enumerate(asked):
            if number >= self._batch:
                started[number - self._batch][1].wait()
            if self._batch > 1 and number % 3 == 1:
                bystander, _ = self._start(tokens[::-1], options)
                if self._random.random() < 0.7:
                    self._engine.cancel(bystander)
            started.append(self._start(tokens, options))
        return started

    def _start(self, tokens: list[int], options: GenerationOptions) -> tuple[Sequence, Answer]:
        answer = Answer()
        sequence = Sequence(tokens, options, answer.listen, self._engine.end_tokens)
        self._engine.submit(sequence)
        return sequence, answer


def check(
    models: Models, batch: int, options: list[GenerationOptions], adaptive: bool = False
) -> dict[DrafterName, list[Sequence]]:
    """Decode answers to as many prompts, compare each with plain decoding, and return the sequences by drafter."""
    engine = Engine(models.target, models.drafter, 8, 1000, models.costs if adaptive else None)
    by_drafter: dict[DrafterName, list[Sequence]] = {}
    try:
        asked = [(prompt(number), one) for number, one in enumerate(options)]
        for number, (sequence, answer) in enumerate(Driver(engine, batch).run(asked)):
            plain = replace(options[number], drafter="auto", speculation_length=None)
            reason = answer.wait()
            assert (answer.tokens, reason) == expected(number, plain), (number, options[number])
            assert sequence.tokens == [*sequence.prompt, *answer.tokens]
            by_drafter.setdefault(options[number].drafter, []).append(sequence)
    finally:
        engine.stop()
    return by_drafter


def assert_speculated(sequences: list[Sequence]) -> None:
    assert sum(sequence.drafted for sequence in sequences) > sum(sequence.accepted for sequence in sequences) > 0


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("batch", [1, 4, MOST_SLOTS])
@pytest.mark.parametrize("drafter", ["model", "prompt_lookup", "auto", "none"])
def test_every_drafter_gives_the_plain_answer_in_every_batch(
    models: dict[int, Models], drafter: DrafterName, batch: int, sampling: str, scale: Scale
) -> None:
    options = [replace(options_of(sampling, number, scale.tokens), drafter=drafter) for number in range(scale.prompts)]
    sequences = check(models[batch], batch, options)[drafter]
    if drafter == "none":
        assert not any(sequence.drafted for sequence in sequences)
    else:
        assert_speculated(sequences)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("adaptive", [False, True], ids=["as long as may be", "as measured"])
def test_requests_of_every_kind_in_one_batch_get_their_plain_answers(
    models: dict[int, Models], adaptive: bool, scale: Scale
) -> None:
    kinds = itertools.cycle(itertools.product(DRAFTERS, SAMPLING, (8, 1, 3, 0, 16, 5)))
    options = [
        replace(options_of(sampling, number, scale.tokens), drafter=drafter, speculation_length=length)
        for number, (drafter, sampling, length) in zip(range(3 * scale.prompts), kinds, strict=False)
    ]
    random.Random(0).shuffle(options)
    by_drafter = check(models[4], 4, options, adaptive)
    assert_speculated([sequence for sequences in by_drafter.values() for sequence in sequences])
    assert not any(sequence.drafted for sequence in by_drafter.get("none", []))


@pytest.mark.parametrize("scale", SCALES)
def test_penalties_and_the_least_length_see_what_plain_decoding_sees(models: dict[int, Models], scale: Scale) -> None:
    options = [
        GenerationOptions(max_tokens=scale.tokens, seed=number, drafter=drafter, **PENALIZED)
        for number, drafter in zip(range(scale.prompts), itertools.cycle(DRAFTERS), strict=False)
    ]
    by_drafter = check(models[4], 4, options)
    assert_speculated(by_drafter["model"])
    assert all(sequence.answered >= 20 for sequences in by_drafter.values() for sequence in sequences)


class Client:
    """Hears what the responder sends."""

    def __init__(self) -> None:
        self.text = ""
        self.ended = threading.Event()
        self.result: tuple[str, int, FinishReason] | None = None

    def partial(self, sequence: Sequence, piece: Piece) -> None:
        self.text += piece.text

    def complete(self, sequence: Sequence, last: Piece, whole: Piece, reason: FinishReason) -> None:
        assert self.text + last.text == whole.text
        self.result = (whole.text, whole.tokens, reason)
        self.ended.set()

    def fail(self, sequence: Sequence, reason: FinishReason) -> None:
        self.ended.set()

    def is_cancelled(self) -> bool:
        return False


def test_a_stop_string_that_crosses_a_draft_ends_the_answer_where_plain_decoding_would(
    models: dict[int, Models],
) -> None:
    engine = Engine(models[4].target, models[4].drafter, 8, 1000)
    responder = Responder(TOKENIZER, engine.cancel)

    def ask(number: int, stop: str, length: int, stream: bool) -> tuple[str, int, FinishReason] | None:
        options = GenerationOptions(
            max_tokens=60, stop=(stop,), speculation_length=length, drafter="model", stream=stream
        )
        sequence, client = Sequence(prompt(number), options, responder.emit, engine.end_tokens), Client()
        responder.open(sequence, client)
        engine.submit(sequence)
        assert client.ended.wait(TIMEOUT_S)
        return client.result

    try:
        for number in range(5):
            text = TOKENIZER.decode(expected(number, GenerationOptions(max_tokens=60))[0])
            for begin in (9, 17, 25):
                stop = text[begin : begin + 11]  # of several tokens
                plain = ask(number, stop, 0, stream=False)
                assert plain is not None and plain[0] == text[: text.index(stop)] and plain[2] == "stop"
                for length, stream in ((1, True), (4, False), (8, True)):
                    assert ask(number, stop, length, stream) == plain
    finally:
        engine.stop()
        responder.close()
