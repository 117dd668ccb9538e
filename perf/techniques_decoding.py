"""What quantization, batching, distillation, speculation and the key/value cache change, in-process."""

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from perf.expansion import expanded
from perf.kv_cache import Plan, Prompts, chat, running
from perf.kv_models import export_random_llama, load
from perf.promise import Measured, compared
from perf.speculative import PAIR, Decoder, Tally, Work
from perf.spending import Spent, take_turns
from scripts.demo_models import shipped
from scripts.demo_models.questions import Question
from scripts.export_model import export_model

from speculative_decoding.engine import Engine  # isort: skip
from speculative_decoding.kv_cache import KVCache  # isort: skip
from speculative_decoding.kv_layout import BlockLayout  # isort: skip
from speculative_decoding.kv_memory import KVCacheSettings  # isort: skip
from speculative_decoding.options import GenerationOptions  # isort: skip
from speculative_decoding.sequence import Sequence as Answer  # isort: skip
from speculative_decoding.tokenizer import Tokenizer  # isort: skip
from speculative_decoding.warm_up import measure_costs  # isort: skip

MOST_TOKENS = 96
AT_ONCE = 8
PASSES = 2
KV_PLAN = Plan()
cpu_s = time.process_time


def decoding_rows(questions: Sequence[Question], work: Path, timed: int, few: int) -> dict[str, list[Measured]]:
    """Return what each technique changes, first what is held against its promise.

    The first `timed` questions are answered one at a time; all of them tell how many answers are right. The large
    target answers `few`.
    """
    tokenizer = Tokenizer(PAIR / "target", "chat")
    works = [
        Work(tokenizer.encode_prompt(question.prompt), GenerationOptions(max_tokens=MOST_TOKENS))
        for question in questions
    ]
    spent, right = _demo_target(_Contest(tokenizer, questions, works, timed), work / "fp32")
    large = _large_target(_Contest(tokenizer, questions, works, few), work / "large")
    one, eight = "one sequence at a time", f"{AT_ONCE} clients"
    return {
        "quantization": [
            compared(
                f"demo target in row-int8 against fp32, {one}", "perf.quantization",
                spent["row-int8"], spent["fp32"], right["row-int8"] / right["fp32"] - 1,
            )
        ],
        "batching": [
            compared(
                f"0.4B target decoding {AT_ONCE} at once against {one}, {eight}", "perf.techniques",
                large["batch"], large["plain"], tells_throughput=True,
            ),
            compared(
                f"demo target (27M) decoding {AT_ONCE} at once against {one}, {eight}", "perf.techniques",
                spent["batch"], spent["row-int8"], tells_throughput=True,
            ),
        ],
        "distillation": [
            compared(
                f"student of 1.2M parameters, the demo draft, against its teacher of 27M, {one}", "perf.techniques",
                spent["student"], spent["row-int8"], right["draft"] / right["row-int8"] - 1,
            )
        ],
        "speculative_decoding": [
            compared(
                f"0.4B target, `auto` against plain, same tokens, {one}", "perf.speculative",
                large["speculative"], large["plain"],
            ),
            compared(
                f"demo target (27M), `auto` against plain, same tokens, {one}", "perf.speculative",
                spent["speculative"], spent["row-int8"],
            ),
        ],
        "kv_cache": [_kv_cache(work / "kv")],
    }  # fmt: skip


def _demo_target(contest: "_Contest", folder: Path) -> tuple[dict[str, Spent], dict[str, float]]:
    """Return what ways to decode with the demo target spend, and the share of right answers of each model."""
    _export(folder, "fp32", larger=False)
    cores = os.cpu_count() or 1
    fp32 = Decoder(folder, cores, AT_ONCE)
    target = Decoder(PAIR / "target", cores, AT_ONCE, PAIR / "draft")
    student = Decoder(PAIR / "draft", 1, AT_ONCE)
    spent = contest.compare(
        {
            "fp32": partial(fp32.decode, at_once=1, drafter="none"),
            "row-int8": partial(target.decode, at_once=1, drafter="none"),
            "speculative": partial(target.decode, at_once=1, drafter="auto"),
            "batch": partial(target.decode, at_once=AT_ONCE, drafter="none"),
            "student": partial(student.decode, at_once=1, drafter="none"),
        }
    )
    decoders = {"fp32": fp32, "row-int8": target, "draft": student}
    right = {name: contest.right(decoder) for name, decoder in decoders.items()}
    for decoder in decoders.values():
        decoder.engine.stop()
    return spent, right


def _large_target(contest: "_Contest", folder: Path) -> dict[str, Spent]:
    """Return what ways to decode with the expanded target spend."""
    _export(folder, "row-int8", larger=True)
    decoder = Decoder(folder, os.cpu_count() or 1, AT_ONCE, PAIR / "draft")
    spent = contest.compare(
        {
            "plain": partial(decoder.decode, at_once=1, drafter="none"),
            "speculative": partial(decoder.decode, at_once=1, drafter="auto"),
            "batch": partial(decoder.decode, at_once=AT_ONCE, drafter="none"),
        }
    )
    decoder.engine.stop()
    return spent


class _Contest:
    """Decoders that answer the same questions; those of one file must say the same."""

    def __init__(self, tokenizer: Tokenizer, questions: Sequence[Question], works: Sequence[Work], timed: int) -> None:
        self._tokenizer = tokenizer
        self._questions = questions
        self._works = works
        self._timed = works[:timed]

    def compare(self, contenders: Mapping[str, partial[None]]) -> dict[str, Spent]:
        """Let contenders take turns. Raises AssertionError when two that run the same engine answer differently."""
        answers: dict[int, dict[int, list[int]]] = {}

        def act(decode: partial[None]) -> int:
            tally = Tally()
            decode(self._timed, tally=tally)
            said = answers.setdefault(id(decode.func.__self__), tally.answers)  # type: ignore[attr-defined]
            assert tally.answers == said, "speculation or batching changed an answer"
            return len(tally.answers)

        return take_turns({name: partial(act, decode) for name, decode in contenders.items()}, PASSES, cpu_s)

    def right(self, decoder: Decoder) -> float:
        """Return the share of all questions that are answered with the documented summary."""
        tally = Tally()
        decoder.decode(self._works, AT_ONCE, tally, "none")
        texts = [self._tokenizer.decode(tally.answers[number]) for number in range(len(self._works))]
        matches = [text.startswith(question.answer) for text, question in zip(texts, self._questions, strict=True)]
        return sum(matches) / len(matches)


def _export(folder: Path, precision: str, larger: bool) -> None:
    """Write the demo target to `folder`, in fp32 as it was before it was quantized, or larger and quantized again."""
    model = shipped.load(PAIR / "target")
    source = folder.with_name(f"{folder.name} source")
    shipped.save(expanded(model) if larger else model, source)
    export_model(source, folder, precision)


def _kv_cache(folder: Path) -> Measured:
    """Compare chats of ten turns with a cache and without: same tokens, whole answers, not only their first tokens."""
    export_random_llama(KV_PLAN.size, folder)
    model = load(folder, 1)
    costs = measure_costs(model, None, 0)
    cache = KVCache(BlockLayout(model.shape.key_values), KVCacheSettings(KV_PLAN.budget))
    said: dict[int, list[list[int]]] = {}
    with running(model, costs, cache) as engine, running(model, costs, None) as without:
        prompts = {engine: Prompts(KV_PLAN.size.vocabulary), without: Prompts(KV_PLAN.size.vocabulary)}

        def act(engine: Engine) -> int:
            turns: list[Answer] = chat(engine, prompts[engine], KV_PLAN)
            said.setdefault(id(engine), []).extend(turn.tokens for turn in turns)
            return len(turns)

        spent = take_turns({"with": partial(act, engine), "without": partial(act, without)}, PASSES, cpu_s)
        assert said[id(engine)] == said[id(without)], "the key/value cache changed an answer"
    what = f"chats of {KV_PLAN.turns} turns with a 0.1B model, whole answers, with prefixes kept against computed anew"
    return compared(what, "perf.kv_cache", spent["with"], spent["without"])
