"""ONNX Runtime GenAI continuing its own sequence: the bound for one session, for nothing is copied or looked up."""

import time
from pathlib import Path

import onnxruntime_genai


class Peer:
    """A model loaded once."""

    def __init__(self, folder: Path) -> None:
        self._model = onnxruntime_genai.Model(str(folder))

    def first_token_s(self, prefix: list[int], rest: list[int]) -> tuple[float, float]:
        """Return seconds to the first token after prefix and rest: all of it new, and with the prefix already seen."""
        cold = self._generator(len(prefix) + len(rest) + 2)
        began = time.perf_counter()
        _answer(cold, prefix + rest)
        between = time.perf_counter()
        warm = self._generator(len(prefix) + len(rest) + 3)
        _answer(warm, prefix)
        continued = time.perf_counter()
        _answer(warm, rest)
        return between - began, time.perf_counter() - continued

    def _generator(self, longest: int) -> onnxruntime_genai.Generator:
        parameters = onnxruntime_genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=longest, do_sample=False)
        return onnxruntime_genai.Generator(self._model, parameters)


def _answer(generator: onnxruntime_genai.Generator, tokens: list[int]) -> None:
    generator.append_tokens(tokens)
    generator.generate_next_token()
