"""The responder: what the engine emits becomes text for clients, and clients that have gone are noticed."""

import threading
from collections.abc import Callable, Iterator

import pytest
from speculative_decoding.options import GenerationOptions
from speculative_decoding.responder import Responder
from speculative_decoding.sequence import FinishReason, Sequence
from speculative_decoding.tokenizer import Tokenizer

from scripts.serving.server import MODEL_REPOSITORY

TOKENIZER = Tokenizer(MODEL_REPOSITORY / "language_model" / "1" / "target", "raw")
TEXT = "Return 漢字 👩\u200d👧 at once."
DEADLINE_S = 5.0


class Recorder:
    """A client: what it was sent, and whether it is still there."""

    def __init__(self) -> None:
        self.partials: list[str] = []
        self.last: tuple[str, str, FinishReason] | None = None
        self.failure: FinishReason | None = None
        self.gone = False

    def partial(self, text: str) -> None:
        self.partials.append(text)

    def complete(self, sequence: Sequence, text: str, answer: str, reason: FinishReason) -> None:
        self.last = (text, answer, reason)

    def fail(self, reason: FinishReason) -> None:
        self.failure = reason

    def is_cancelled(self) -> bool:
        return self.gone


class Bench:
    def __init__(self) -> None:
        self.cancelled: list[Sequence] = []
        self.responder = Responder(TOKENIZER, self.cancel)

    def cancel(self, sequence: Sequence) -> None:
        sequence.cancelled = True
        self.cancelled.append(sequence)

    def open(self, stream: bool) -> tuple[Sequence, Recorder]:
        sequence, recorder = Sequence([1], GenerationOptions(stream=stream), self.responder.emit), Recorder()
        self.responder.open(sequence, recorder)
        return sequence, recorder


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.responder.close()


@pytest.mark.parametrize("stream", [True, False])
def test_the_answer_is_whole_in_pieces_or_at_once(stream: bool) -> None:
    bench = Bench()
    sequence, client = bench.open(stream)
    for token in TOKENIZER.encode_prompt(TEXT):
        sequence.listener(sequence, [token], None)
    sequence.listener(sequence, [], "stop")
    bench.responder.close()
    assert client.last
    text, answer, reason = client.last
    assert "".join([*client.partials, text]) == answer == TEXT
    assert (reason, client.failure) == ("stop", None)
    assert len(client.partials) > 3 if stream else client.partials == []
    assert "" not in client.partials


@pytest.mark.parametrize("reason", ["cancelled", "error"])
def test_without_an_answer_the_client_hears_why(reason: FinishReason) -> None:
    bench = Bench()
    sequence, client = bench.open(stream=True)
    sequence.listener(sequence, [], reason)
    bench.responder.close()
    assert client.failure == reason and client.last is None


def test_a_client_that_fails_does_not_disturb_the_others() -> None:
    bench = Bench()
    broken, broken_client = bench.open(stream=True)
    other, client = bench.open(stream=True)

    def refuse(text: str) -> None:
        raise OSError("gone")

    broken_client.partial = refuse  # type: ignore[method-assign]
    tokens = TOKENIZER.encode_prompt(TEXT)
    for sequence in (broken, other):
        sequence.listener(sequence, tokens, None)
        sequence.listener(sequence, [], "stop")
    bench.responder.close()
    assert client.last and client.last[1] == TEXT


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_has_gone_is_noticed_without_a_token_of_its_own(bench: Bench, stream: bool) -> None:
    waiting, client = bench.open(stream)
    client.gone = True
    wait_for(lambda: bench.cancelled == [waiting])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_has_gone_is_noticed_while_others_are_busy(bench: Bench, stream: bool) -> None:
    waiting, client = bench.open(stream)
    busy, _ = bench.open(stream=True)
    tokens = TOKENIZER.encode_prompt("Return")

    def emit_and_look() -> bool:
        busy.listener(busy, tokens, None)
        return bench.cancelled == [waiting]

    client.gone = True
    wait_for(emit_and_look)


def wait_for(condition: Callable[[], bool], pause: float = 0.002) -> None:
    """Ask, with a pause of a decoding step, until it holds; fail after DEADLINE_S."""
    asked = threading.Event()
    for _ in range(int(DEADLINE_S / pause)):
        if condition():
            return
        asked.wait(pause)
    pytest.fail(f"not within {DEADLINE_S} s")
