"""Continuing conversations: the committed tokens stay, whatever the model answered, or it is said why they cannot."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speculative_decoding.conversation import Message, common_prefix, continue_chat, continue_text
from transformers import AutoTokenizer

from scripts.serving.server import MODEL_REPOSITORY

REFERENCE = AutoTokenizer.from_pretrained(MODEL_REPOSITORY / "language_model" / "1" / "target")
QUESTION: Message = {"role": "user", "content": "What does itertools.chain do?"}
FOLLOW_UP: Message = {"role": "user", "content": "And zip?"}
PLAIN = REFERENCE.chat_template
TRIMMING = PLAIN.replace("message['content']", "(message['content'] | trim)")
FORGETFUL = PLAIN.replace(
    "message['content']", "(message['content'] if loop.last else message['content'].split('</think>')[-1])"
)
COUNTING = "{{ '<|system|>' + (messages | length | string) + '<|end|>' }}" + PLAIN
LINES = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Format:
    """The demo model's tokenizer with some chat template."""

    def __init__(self, template: str) -> None:
        self._template = template

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return REFERENCE.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=self._template,
        )

    def encode(self, text: str) -> list[int]:
        return REFERENCE(text, add_special_tokens=False)["input_ids"]

    def decode_all(self, tokens: Sequence[int]) -> str:
        return REFERENCE.decode(tokens, clean_up_tokenization_spaces=False)

    def first(self, question: Message) -> list[int]:
        return list(continue_chat(self, [], [], [question]).tokens)


def answered(content: str) -> list[Message]:
    return [QUESTION, {"role": "assistant", "content": content}]


@pytest.mark.parametrize("template", [PLAIN, TRIMMING, FORGETFUL, LINES])
def test_a_follow_up_appends_to_the_committed_tokens(template: str) -> None:
    chat = Format(template)
    answer = "Returns a chain object."
    committed = chat.first(QUESTION) + chat.encode(answer)
    continuation = continue_chat(chat, answered(answer), committed, [FOLLOW_UP])
    assert (continuation.kept, continuation.reason) == (len(committed), "")
    whole = chat.render([*answered(answer), FOLLOW_UP], True)
    assert chat.decode_all([*committed, *continuation.tokens]) == chat.decode_all(chat.encode(whole))
    assert len(continuation.tokens) < len(chat.encode(whole)) / 2


@given(st.text(max_size=40), st.lists(st.integers(5, 4095), max_size=20))
@settings(max_examples=60, deadline=None)
def test_whatever_tokens_an_answer_has_they_are_kept_or_the_conversation_is_rendered_anew(
    text: str, odd: list[int]
) -> None:
    """An answer's tokens need not be those its text would be given: a model may spell a word in another way."""
    chat = Format(PLAIN)
    committed = [*chat.first(QUESTION), *chat.encode(text), *odd]
    answer = chat.decode_all(committed[len(chat.first(QUESTION)) :])
    continuation = continue_chat(chat, answered(answer), committed, [FOLLOW_UP])
    fed = [*committed[: continuation.kept], *continuation.tokens]
    whole = chat.encode(chat.render([*answered(answer), FOLLOW_UP], True))
    if continuation.reason:
        assert fed == whole
    else:
        assert continuation.kept == len(committed)
        assert chat.decode_all(fed) == chat.decode_all(whole)


def test_unusual_spellings_of_an_answer_are_kept() -> None:
    chat = Format(PLAIN)
    spelled = [token for letter in "chain" for token in chat.encode(letter)]
    assert spelled != chat.encode("chain")
    committed = chat.first(QUESTION) + spelled
    continuation = continue_chat(chat, answered("chain"), committed, [FOLLOW_UP])
    assert (continuation.kept, continuation.reason) == (len(committed), "")


@pytest.mark.parametrize(
    ("template", "answer"), [(TRIMMING, " spaces "), (FORGETFUL, "why</think>because"), (COUNTING, "counted")]
)
def test_a_template_that_rewrites_what_was_said_is_noticed_and_rendered_anew(template: str, answer: str) -> None:
    chat = Format(template)
    committed = chat.first(QUESTION) + chat.encode(answer)
    continuation = continue_chat(chat, answered(answer), committed, [FOLLOW_UP])
    assert "renders earlier messages differently" in continuation.reason
    whole = chat.encode(chat.render([*answered(answer), FOLLOW_UP], True))
    assert [*committed[: continuation.kept], *continuation.tokens] == whole
    assert continuation.kept == common_prefix(committed, whole) < len(committed)


def test_tokens_that_do_not_say_what_the_history_says_are_not_kept() -> None:
    chat = Format(PLAIN)
    committed = chat.first(QUESTION) + chat.encode("Something that a stop sequence cut off")
    continuation = continue_chat(chat, answered("Something"), committed, [FOLLOW_UP])
    assert continuation.reason == "the committed tokens are not those of the conversation's text"
    fed = [*committed[: continuation.kept], *continuation.tokens]
    assert fed == chat.encode(chat.render([*answered("Something"), FOLLOW_UP], True))


def test_ten_turns_render_as_one_conversation_does() -> None:
    chat = Format(PLAIN)
    history: list[Message] = []
    committed: list[int] = []
    for number in range(10):
        question: Message = {"role": "user", "content": f"Question {number}?"}
        continuation = continue_chat(chat, history, committed, [question])
        assert continuation.kept == len(committed)
        answer = f"Answer {number}, naïve 漢字."
        committed = [*committed, *continuation.tokens, *chat.encode(answer)]
        history += [question, {"role": "assistant", "content": answer}]
    assert chat.decode_all(committed) == chat.render(history, False).removesuffix("<|end|>")


def test_a_system_message_comes_before_the_first_question_only() -> None:
    chat = Format(PLAIN)
    system: Message = {"role": "system", "content": "Be brief."}
    first = continue_chat(chat, [], [], [system, QUESTION])
    committed = [*first.tokens, *chat.encode("Yes.")]
    history = [system, *answered("Yes.")]
    continuation = continue_chat(chat, history, committed, [FOLLOW_UP])
    assert continuation.kept == len(committed)
    assert "Be brief." not in chat.decode_all(continuation.tokens)


def test_plain_text_follows_without_a_template() -> None:
    chat = Format(PLAIN)
    committed = chat.encode("import ")
    assert continue_text(chat, committed, "os").tokens == tuple(chat.encode("os"))
