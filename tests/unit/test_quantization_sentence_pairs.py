"""The graded sentence pairs that embedders are judged by."""

import json
from collections import Counter

from scripts.quantization.tasks import PARAPHRASE, SENTENCE_PAIRS

PAIRS = [json.loads(line) for line in SENTENCE_PAIRS.read_text(encoding="utf-8").splitlines()]


def test_there_are_enough_pairs_with_scores_from_0_to_5() -> None:
    assert len(PAIRS) >= 300
    for pair in PAIRS:
        assert pair.keys() == {"first", "second", "score", "domain"}
        assert 0 <= pair["score"] <= 5
        assert pair["first"].strip() == pair["first"] != ""
        assert pair["second"].strip() == pair["second"] != ""


def test_no_sentence_and_no_pair_is_there_twice() -> None:
    firsts, seconds = ([pair[side].casefold() for pair in PAIRS] for side in ("first", "second"))
    assert all(one != other for one, other in zip(firsts, seconds, strict=True))
    assert len({frozenset(pair) for pair in zip(firsts, seconds, strict=True)}) == len(PAIRS)
    repeated = [sentence for sentence, count in Counter([*firsts, *seconds]).items() if count > 1]
    assert repeated == []  # a search could find the one for the other


def test_scores_cover_the_range_and_domains_vary() -> None:
    grades = Counter(round(pair["score"]) for pair in PAIRS)
    assert all(grades[grade] >= 20 for grade in range(6))
    assert sum(pair["score"] >= PARAPHRASE for pair in PAIRS) >= 60
    domains = Counter(pair["domain"] for pair in PAIRS)
    assert len(domains) >= 8
    assert max(domains.values()) <= len(PAIRS) / 4
