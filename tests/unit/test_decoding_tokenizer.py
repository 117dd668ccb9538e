"""Tokenizer and IncrementalDecoder: prompts rendered as the template says, and text streamed in whole characters."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from speculative_decoding.language_model import DecoderShape
from speculative_decoding.tokenizer import INCOMPLETE, IncrementalDecoder, Tokenizer
from speculative_decoding.vocabulary import require_draft_fits, require_same_vocabulary
from transformers import AutoTokenizer

from scripts.serving.server import MODEL_REPOSITORY
from tests import language_models

TARGET = MODEL_REPOSITORY / "language_model" / "1" / "target"
TOKENIZER = Tokenizer(TARGET, "raw")
VOCABULARY = len(TOKENIZER.vocabulary())
HARD = "naïve e\u0301 ﬁ 漢字 かな 한국어 👩\u200d👩\u200d👧 🇨🇭 👍🏽 ﷽ \u0000 \ufffd a\u0300\u0301"
TEXTS = st.one_of(st.text(), st.text(st.sampled_from(HARD)), st.text(st.characters(min_codepoint=0x2000)))


def pieces(tokens: list[int], sizes: list[int]) -> list[str]:
    """Feed `tokens` in groups of these sizes, the rest one by one, and flush."""
    decoder, given, rest = IncrementalDecoder(TOKENIZER), [], tokens
    for size in [*sizes, *[1] * len(tokens)]:
        given.append(decoder.feed(rest[:size]))
        rest = rest[size:]
    return [*given, decoder.flush()]


@given(TEXTS, st.lists(st.integers(0, 5)))
@example(HARD, [])
def test_the_pieces_of_a_text_join_to_it_and_none_ends_within_a_character(text: str, sizes: list[int]) -> None:
    tokens = TOKENIZER.encode_prompt(text)
    given = pieces(tokens, sizes)
    assert "".join(given) == TOKENIZER.decode(tokens) == text
    # A replacement character that the text does not have is half a character.
    assert sum(piece.count(INCOMPLETE) for piece in given) == text.count(INCOMPLETE)


@given(st.lists(st.integers(0, VOCABULARY - 1)), st.lists(st.integers(0, 5)))
def test_the_pieces_of_any_tokens_join_to_the_decoding_of_all(tokens: list[int], sizes: list[int]) -> None:
    assert "".join(pieces(tokens, sizes)) == TOKENIZER.decode(tokens)


def test_text_comes_as_soon_as_it_is_certain() -> None:
    tokens = TOKENIZER.encode_prompt("Return 漢.")
    decoder = IncrementalDecoder(TOKENIZER)
    given = [decoder.feed([token]) for token in tokens]
    assert given[0] != "" and given[-1] == "." and "漢" in given and "" in given
    assert decoder.flush() == ""


def test_a_character_cut_off_by_the_end_comes_with_the_flush() -> None:
    tokens = TOKENIZER.encode_prompt("a漢")[:-1]
    decoder = IncrementalDecoder(TOKENIZER)
    assert decoder.feed(tokens) + decoder.flush() == TOKENIZER.decode(tokens)
    assert INCOMPLETE in TOKENIZER.decode(tokens)


@pytest.mark.parametrize("prompt", ["What does itertools.chain do?", HARD, " spaces\nand lines ", "{{ 7 * 7 }} {% x"])
def test_chat_prompts_are_rendered_as_transformers_renders_them(prompt: str) -> None:
    reference = AutoTokenizer.from_pretrained(TARGET)
    messages = [{"role": "user", "content": prompt}]
    rendered = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = reference(rendered, add_special_tokens=False)["input_ids"]
    tokens = Tokenizer(TARGET, "chat").encode_prompt(prompt)
    assert tokens == expected
    user, assistant = (TOKENIZER.vocabulary()[token] for token in ("<|user|>", "<|assistant|>"))
    assert (tokens[0], tokens[-1]) == (user, assistant)


def test_raw_prompts_are_taken_as_they_are() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode_prompt("print(1)")) == "print(1)"
    assert len(TOKENIZER.encode_prompt("Return")) < len(Tokenizer(TARGET, "chat").encode_prompt("Return"))


def test_a_template_in_tokenizer_config_serves_too_and_none_is_refused_with_the_remedy(tmp_path: Path) -> None:
    shutil.copy2(TARGET / "tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match='has no chat template: set the parameter prompt_format to "raw"'):
        Tokenizer(tmp_path, "chat")
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{}")
    with pytest.raises(ValueError, match="has no chat template"):
        Tokenizer(tmp_path, "chat")
    config.write_text(json.dumps({"chat_template": (TARGET / "chat_template.jinja").read_text()}))
    assert Tokenizer(tmp_path, "chat").encode_prompt("x") == Tokenizer(TARGET, "chat").encode_prompt("x")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer.json"):
        Tokenizer(tmp_path, "raw")


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    shutil.copy2(TARGET / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(Exception, match="unsafe"):
        Tokenizer(tmp_path, "chat").encode_prompt("x")


def test_no_prompt_of_fewer_tokens_than_the_context_is_longer_than_the_longest_token_allows() -> None:
    for text in (HARD, "    " * 50, "Return the " * 9):
        assert len(text.encode()) <= len(TOKENIZER.encode_prompt(text)) * TOKENIZER.longest_token


def test_a_draft_of_another_vocabulary_is_refused_with_a_token_that_differs(tmp_path: Path) -> None:
    language_models.tokenizer().save_pretrained(tmp_path / "one")
    language_models.tokenizer("<extra>").save_pretrained(tmp_path / "other")
    one, other = Tokenizer(tmp_path / "one", "raw"), Tokenizer(tmp_path / "other", "raw")
    require_same_vocabulary(one, Tokenizer(tmp_path / "one", "raw"))
    with pytest.raises(
        ValueError, match=r"differs from the target's in 257 tokens, the first '.*use a draft made with"
    ):
        require_same_vocabulary(one, other)
    with pytest.raises(ValueError, match=r"target id None, draft id \d+"):
        require_same_vocabulary(Tokenizer(tmp_path / "one", "raw"), TOKENIZER)


def test_a_draft_that_the_target_cannot_follow_is_refused_with_the_reason() -> None:
    shape = DecoderShape.load(TARGET)
    require_draft_fits(shape, shape)
    with pytest.raises(ValueError, match="4097 logits"):
        require_draft_fits(shape, replace(shape, vocabulary=4097))
    with pytest.raises(ValueError, match="511 tokens"):
        require_draft_fits(shape, replace(shape, context_length=511))
