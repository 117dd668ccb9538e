"""What tests of decoding share: a listener, and decoding token by token, which every answer must equal."""

import threading

import numpy as np
from speculative_decoding.language_model import LanguageModel
from speculative_decoding.options import GenerationOptions
from speculative_decoding.sampling import Sampler
from speculative_decoding.sequence import FinishReason, Sequence

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
