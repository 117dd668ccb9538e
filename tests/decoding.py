"""What tests of decoding share: a listener, and decoding token by token, which every answer must equal."""

import threading
from collections.abc import Iterable

import numpy as np
from speculative_decoding.acceptance import accept, choose_on_device
from speculative_decoding.device import Device
from speculative_decoding.engine import Engine
from speculative_decoding.followed import ON_DEVICE
from speculative_decoding.language_model import LanguageModel
from speculative_decoding.options import GenerationOptions
from speculative_decoding.paged_model import PagedModel
from speculative_decoding.sampling import Sampler
from speculative_decoding.sequence import FinishReason, Sequence
from speculative_decoding.speculation import Drafts

TIMEOUT_S = 120.0


class Answer:
    """What a listener hears of one sequence."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.pieces = 0
        self._reasons: list[FinishReason] = []
        self._ended = threading.Event()

    def listen(self, sequence: Sequence, tokens: list[int], reason: FinishReason | None) -> None:
        self.tokens += tokens
        self.pieces += 1
        if reason:
            self._reasons.append(reason)
            self._ended.set()

    def wait(self) -> FinishReason:
        assert self._ended.wait(TIMEOUT_S), "the sequence has not ended"
        [reason] = self._reasons  # a sequence ends once
        return reason


def decode_plainly(
    model: LanguageModel, prompt: list[int], options: GenerationOptions
) -> tuple[list[int], FinishReason]:
    """Decode one token after another with the target alone, in its slot 0."""
    ends = frozenset(options.stop_token_ids) | (frozenset() if options.ignore_eos else model.shape.end_tokens)
    sampler, answer = Sampler(options, prompt, ends), list[int]()
    model.truncate(0, 0)
    logits = model.forward(0, np.array([prompt], np.int64), np.array([len(prompt)], np.int32))[0, -1]
    while True:
        token = sampler.choose(logits)
        if token in ends:
            return answer, "stop"
        answer.append(token)
        sampler.commit([token])
        if len(answer) == options.max_tokens or len(prompt) + len(answer) == model.context_length:
            return answer, "length"
        logits = model.forward(0, np.array([[token]], np.int64), np.array([1], np.int32))[0, 0]


PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}
ADJUSTED = (
    {},
    PENALTIES,
    {"logit_bias": ((3, 2.5), (7, -100.0), (11, 0.3))},
    {"min_tokens": 3},
    {"presence_penalty": -0.7, "min_tokens": 2, "logit_bias": ((5, 4.0),)},
)


def decode_all(
    engine: Engine, prompts: Iterable[list[int]], options: Iterable[GenerationOptions]
) -> tuple[list[list[int]], list[Sequence]]:
    """Have prompts answered at once, each to its last token, and return the answers, and the sequences."""
    answers = [(prompt, wish, Answer()) for prompt, wish in zip(prompts, options, strict=True)]
    sequences = [Sequence(prompt, wish, answer.listen, frozenset()) for prompt, wish, answer in answers]
    engine.submit(*sequences)
    for _, _, answer in answers:
        assert answer.wait() == "length"
    return [answer.tokens for _, _, answer in answers], sequences


def check_adjusted_choices(model: PagedModel, rows: int = 4, width: int = 5) -> None:
    """Have each place's likeliest token chosen where the logits are, and on the host; the tokens must be the same."""
    rng, vocabulary = np.random.default_rng(0), model.shape.vocabulary
    for turn in range(20):
        prompts = rng.integers(0, vocabulary, (rows, 30))
        drafted = rng.integers(0, vocabulary, (rows, width - 1))
        drafted[:, 2] = drafted[:, 0]  # a token drafted twice, and one of the prompt
        drafted[:, 1] = prompts[:, -2]
        counts = rng.integers(1, width + 1, rows).astype(np.int32)
        ends = frozenset(rng.integers(0, vocabulary, vocabulary // 3).tolist())
        sequences = [
            Sequence(
                prompt.tolist(), GenerationOptions(**ADJUSTED[(turn + row) % len(ADJUSTED)]), lambda *_: None, ends
            )
            for row, prompt in enumerate(prompts)
        ]
        for row, sequence in enumerate(sequences):
            model.truncate(row, 0)
            model.forward(row, prompts[row, None, :-1], np.array([29], np.int32))
            sequence.commit(prompts[row, : turn % 3].tolist())
        tokens = np.concatenate([prompts[:, -1:], drafted], axis=1)
        logits = model.forward(0, tokens, counts)
        rows_drafted = [one[: count - 1] for one, count in zip(drafted.tolist(), counts.tolist(), strict=True)]
        choices = choose_on_device(sequences, Drafts(drafted, counts - 1, {}), logits)
        for row, sequence in enumerate(sequences):
            expected = [
                sequence.sampler.choose(logits[row, place], rows_drafted[row][:place]) for place in range(counts[row])
            ]
            assert choices.tokens[row, : counts[row]].tolist() == expected
            assert choices.standing[row] == len(accept(rows_drafted[row], expected.__getitem__)) - 1


def check_drafts_on_device(device: Device) -> None:
    """Have drafts taken from where another model left them, and accepted, without the host; it must be as on the host.

    Tokens are so few that drafts often stand.
    """
    rng, slots = np.random.default_rng(0), 9
    for _ in range(20):
        rows, width, prompts = (int(number) for number in rng.integers((0, 2, 0), (8, 18, 9)))
        steps, counts = width - 1, rng.integers(0, width + 1, rows).astype(np.int32)
        tokens, proposed = rng.integers(0, 2, (rows, width)), rng.integers(0, 2, (steps, slots)).astype(np.int32)
        chosen = rng.integers(0, 2, rows * width + prompts).astype(np.int32)
        is_waited_for = rng.random((rows, width)) < 0.5
        is_waited_for[:, 0] = False
        fed = np.where(is_waited_for, np.pad(proposed.T[:rows], ((0, 0), (1, 0))), tokens)
        there = [device.zeros(array.shape, array.dtype) for array in (tokens.ravel(), proposed, chosen, chosen, counts)]
        given, proposals, choices, standing, lengths = there
        known = np.where(is_waited_for, ON_DEVICE, tokens)
        stale = np.full_like(chosen, 99)
        for array, values in zip(there, (known.ravel(), proposed, chosen, stale, counts), strict=True):
            device.upload(array, values)
        device.complete(given, width, proposals[:, :rows])
        assert device.download(given).tolist() == fed.ravel().tolist()
        device.accept(choices, given, lengths, standing)
        expected = np.zeros_like(chosen)
        for row, count in enumerate(counts.tolist()):
            drafted = fed[row, 1 : max(1, count)].tolist()
            expected[row * width] = len(accept(drafted, chosen[row * width :].__getitem__)) - 1
        assert device.download(standing).tolist() == expected.tolist()


def check_prefixes_come_back_from_the_host(model: PagedModel, block_tokens: int, blocks: int = 2) -> None:
    """Have more prompts seen than fit on the device, and the first ones again: what follows them must be the same.

    The model has room for one prompt's prefix, of so many blocks, and its host for three.
    """
    rng, length = np.random.default_rng(0), blocks * block_tokens + 1
    prompts = rng.integers(0, model.shape.vocabulary, (4, length + 2))
    found: list[list[bytes]] = []
    for turn in range(3):
        found.append([])
        for prompt in prompts:
            known = model.reuse(0, "tenant", prompt.tolist())
            assert known == (length - 1 if turn else 0)
            if not turn:
                model.forward(0, prompt[None, : length - 1], np.array([length - 1], np.int32))
                model.keep(0, "tenant", prompt[: length - 1].tolist())
            logits = model.forward(0, prompt[None, length - 1 :], np.array([3], np.int32))
            found[-1].append(logits.copy().tobytes())
            model.prefixes.check_integrity()
    assert found[0] == found[1] == found[2]
    seen = model.prefixes.snapshot()
    assert (seen.blocks, seen.tier_blocks) == (blocks, 3 * blocks)
    assert seen.counters.tier_hits == 8 * blocks


def check_mixed_calls(alone: PagedModel, mixed: PagedModel) -> None:
    """Feed two rows and chunks of two prompts to one model in one call, to another one by one: all bits must agree."""
    rng = np.random.default_rng(0)
    for turn in range(6):
        tokens = rng.integers(0, mixed.shape.vocabulary, (2, 4))
        counts = np.array([turn % 4 + 1, 1], np.int32)
        chunks = [rng.integers(0, mixed.shape.vocabulary, size).tolist() for size in (1 + 7 * turn, 3)]
        assert mixed.mixes(2, 4, chunks)
        of_rows, of_chunks = mixed.forward_mixed(tokens, counts, chunks)
        found = [of_rows[row, place] for row in range(2) for place in range(counts[row])]
        found += [of_chunks[number, 0] for number in range(2)]
        best = [of_rows.argmax(-1)[row, place] for row in range(2) for place in range(counts[row])]
        best += of_chunks.argmax(-1)[:, 0].tolist()
        expected = []
        for slot, count in enumerate(counts.tolist()):
            logits = alone.forward(slot, tokens[slot, None], counts[slot : slot + 1])
            expected += [logits[0, place] for place in range(count)]
        for number, chunk in enumerate(chunks):
            expected.append(alone.forward_prompts(2 + number, [chunk])[0, 0])
        assert np.array_equal(found, expected)
        assert best == [values.argmax() for values in expected]
        assert mixed.lengths.tolist() == alone.lengths.tolist()
        mixed.check_integrity()
