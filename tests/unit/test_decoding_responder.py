"""The responder: what the engine emits becomes text for clients, and clients that have gone are noticed."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from speculative_decoding.logprobs import TokenLogprob
from speculative_decoding.options import GenerationOptions
from speculative_decoding.responder import Piece, Responder
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
        self.tokens: list[int] = []
        self.logprobs: list[int] = []
        self.failure: FinishReason | None = None
        self.gone = False

    def partial(self, sequence: Sequence, piece: Piece) -> None:
        self.partials.append(piece.text)
        self.tokens.append(piece.tokens)
        self.logprobs += [position[0].token for position in piece.logprobs]

    def complete(self, sequence: Sequence, last: Piece, whole: Piece, reason: FinishReason) -> None:
        self.last = (last.text, whole.text, reason)
        self.tokens.append(last.tokens)
        self.logprobs += [position[0].token for position in last.logprobs]
        assert sum(self.tokens) == whole.tokens

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

    def open(self, stream: bool, **options: Any) -> tuple[Sequence, Recorder]:
        made = GenerationOptions(stream=stream, **options)
        sequence, recorder = Sequence([1], made, self.responder.emit, frozenset()), Recorder()
        self.responder.open(sequence, recorder)
        return sequence, recorder

    def settle(self) -> None:
        """Return when all that was emitted has been handled."""
        marker, recorder = self.open(stream=False)
        handled, recorder.complete = threading.Event(), lambda *_: handled.set()
        marker.listener(marker, [], "length")
        assert handled.wait(DEADLINE_S)


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
        bench.settle()
    sequence.listener(sequence, [], "stop")
    bench.responder.close()
    assert client.last
    text, answer, reason = client.last
    assert "".join([*client.partials, text]) == answer == TEXT
    assert (reason, client.failure) == ("stop", None)
    assert len(client.partials) > 3 if stream else client.partials == []
    assert "" not in client.partials


@given(st.lists(st.integers(1, 6), max_size=12), st.booleans(), st.integers(0, 8))
def test_a_stop_string_ends_the_answer_at_the_same_token_however_many_come_at_once(
    sizes: list[int], stream: bool, min_tokens: int
) -> None:
    tokens = TOKENIZER.encode_prompt(TEXT)
    one_by_one = stopped(tokens, [1] * len(tokens), stream, min_tokens)
    assert stopped(tokens, sizes, stream, min_tokens) == one_by_one
    text, count, reason, cancelled = one_by_one
    before = TEXT.index("字 👩")
    assert (text, reason, cancelled) == (TEXT[:before], "stop", True)
    assert before < len(TOKENIZER.decode(tokens[:count])) and "字 👩" not in TOKENIZER.decode(tokens[: count - 1])


def stopped(tokens: list[int], sizes: list[int], stream: bool, min_tokens: int) -> tuple[str, int, FinishReason, bool]:
    """Emit tokens in groups of these sizes, the rest at once; return text, tokens, reason, and whether it was cut."""
    bench = Bench()
    sequence, client = bench.open(stream, stop=("字 👩", "zzz"), min_tokens=min_tokens)
    rest = tokens
    for size in [*sizes, len(tokens)]:
        if rest:
            sequence.listener(sequence, rest[:size], None)
            bench.settle()
        rest = rest[size:]
    sequence.listener(sequence, [], "cancelled")
    bench.responder.close()
    assert client.last and client.failure is None
    assert "".join([*client.partials, client.last[0]]) == client.last[1]
    return client.last[1], sum(client.tokens), client.last[2], bench.cancelled == [sequence]


def test_what_comes_while_others_are_sent_goes_into_one_response(bench: Bench) -> None:
    (slow, busy), (sequence, client) = bench.open(stream=True), bench.open(stream=True)
    sending, go_on, partial = threading.Event(), threading.Event(), busy.partial

    def wait(*given: Any) -> None:
        sending.set()
        assert go_on.wait(DEADLINE_S)
        partial(*given)

    busy.partial = wait
    tokens = TOKENIZER.encode_prompt(TEXT)
    slow.listener(slow, tokens, None)
    assert sending.wait(DEADLINE_S)
    for token in tokens:
        sequence.listener(sequence, [token], None)
    sequence.listener(sequence, [], "length")
    slow.listener(slow, tokens, "length")
    go_on.set()
    bench.responder.close()
    assert (client.partials, client.last, client.tokens) == ([], (TEXT, TEXT, "length"), [len(tokens)])
    assert busy.partials == [TEXT] and busy.last == (TEXT, TEXT + TEXT, "length")


def test_logprobs_come_with_their_tokens_and_none_after_a_stop() -> None:
    bench = Bench()
    sequence, client = bench.open(stream=True, stop=("at",), logprobs=0)
    tokens = TOKENIZER.encode_prompt(TEXT)
    for begin in range(0, len(tokens), 3):
        new = tokens[begin : begin + 3]
        sequence.logprobs += [(TokenLogprob(token, -1.0, 1),) for token in new]
        sequence.listener(sequence, new, None)
    bench.responder.close()
    assert client.last and client.last[1] == TEXT[: TEXT.index("at")]
    assert client.logprobs == tokens[: sum(client.tokens)] and sum(client.tokens) < len(tokens)


@pytest.mark.parametrize("reason", ["cancelled", "error", "timeout"])
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

    def refuse(sequence: Sequence, piece: Piece) -> None:
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
