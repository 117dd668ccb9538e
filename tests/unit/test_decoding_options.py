"""GenerationOptions and Settings: what is accepted, and that a refusal names its field."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from speculative_decoding.kv_memory import default_kv_cache_bytes
from speculative_decoding.messages import Message
from speculative_decoding.options import GenerationOptions
from speculative_decoding.reuse_settings import ReuseSettings
from speculative_decoding.settings import Settings
from speculative_decoding.validation import InvalidOptionError

VOCABULARY = 512


def config(**parameters: str) -> dict[str, Any]:
    """Triton's JSON form of a config.pbtxt with these parameters."""
    return {"parameters": {name: {"string_value": value} for name, value in parameters.items()}}


def parse(parameters: dict[str, Any]) -> GenerationOptions:
    return GenerationOptions.parse(parameters, VOCABULARY)


def test_without_parameters_the_defaults_hold() -> None:
    assert parse({}) == GenerationOptions()
    assert GenerationOptions().is_bare


def test_parameters_are_taken_as_given_and_null_means_default() -> None:
    given = {"max_tokens": 1, "stream": True, "speculation_length": 0}
    assert parse(given) == GenerationOptions(max_tokens=1, stream=True, speculation_length=0)
    assert parse(dict.fromkeys(given)) == GenerationOptions()
    assert parse({"speculation_length": 16}).speculation_length == 16


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"temperature": 1, "top_p": 0.9, "top_k": -1, "seed": 7}, {"temperature": 1.0, "top_p": 0.9, "seed": 7}),
        ({"stop": "END"}, {"stop": ("END",)}),
        ({"stop": '["a", "\\n\\n"]'}, {"stop": ("a", "\n\n")}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"stop": "[x"}, {"stop": ("[x",)}),
        ({"stop": "[]"}, {"stop": ()}),
        ({"stop_token_ids": "[3, 5]"}, {"stop_token_ids": (3, 5)}),
        ({"logit_bias": '{"5": -100, "3": 1.5}'}, {"logit_bias": ((3, 1.5), (5, -100.0))}),
        ({"logit_bias": {"5": 2}}, {"logit_bias": ((5, 2.0),)}),
        ({"messages": '[{"role": "user", "content": "hi"}]'}, {"messages": (Message("user", "hi"),)}),
        *((taken, taken) for taken in [{"n": 3, "logprobs": 5}, {"min_tokens": 2, "ignore_eos": True}]),
        *((taken, taken) for taken in [{"acceptance": "rejection"}, {"drafter": "none"}, {"timeout": 5}]),
    ],
)
def test_every_option_is_read_in_its_own_type(parameters: dict[str, Any], expected: dict[str, Any]) -> None:
    assert parse(parameters) == GenerationOptions(**expected)


@pytest.mark.parametrize(
    "name", ["temperature", "logit_bias", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens"]
)
def test_whatever_changes_a_choice_ends_the_bare_argmax(name: str) -> None:
    assert not parse({name: {"logit_bias": {"1": 1}, "min_tokens": 1}.get(name, 0.5)}).is_bare


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        *(("max_tokens", value, "an integer of at least 1") for value in [0, -1, "10", 10.0, True, [10]]),
        *(("speculation_length", value, "an integer from 0 to 16") for value in [-1, 17, False, 4.0]),
        *(("stream", value, "true or false") for value in [1, "true"]),
        ("ignore_eos", 0, "true or false"),
        ("min_tokens", -1, "an integer of at least 0"),
        *(("temperature", value, "a number from 0 to 100") for value in [-0.1, "hot", True, math.inf, math.nan, 101]),
        ("top_p", 0, "a number above 0 and at most 1"),
        ("top_p", 1.1, "a number above 0 and at most 1"),
        ("top_k", -2, "an integer of at least -1"),
        ("min_p", 1.5, "a number from 0 to 1"),
        ("repetition_penalty", 0, "a number above 0 and at most 100"),
        ("presence_penalty", 3, "a number from -2 to 2"),
        ("frequency_penalty", -2.5, "a number from -2 to 2"),
        ("seed", -1, "an integer from 0 to 9223372036854775807"),
        ("seed", 1.0, "an integer from 0 to 9223372036854775807"),
        ("logprobs", 6, "an integer from 0 to 5"),
        ("n", 0, "an integer from 1 to 16"),
        ("n", 17, "an integer from 1 to 16"),
        ("acceptance", "typical", "one of exact, rejection"),
        ("drafter", "medusa", "one of auto, model, prompt_lookup, none"),
        ("priority", -1, "an integer of at least 0"),
        ("timeout", "soon", "an integer of at least 0"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_with_its_field_value_and_remedy(name: str, value: object, right: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        parse({name: value})
    assert str(caught.value) == f"{name} is {value!r}; it must be {right}"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("stop", ["", '[""]', "[1]", [["a"]], "x" * 257, ["a"] * 17, 5]),
        ("stop_token_ids", ["[512]", "[-1]", "[true]", "5", 5, "[1.0]", "{}"]),
        ("logit_bias", ["[]", '{"512": 1}', '{"-1": 1}', '{"x": 1}', '{"1": 101}', '{"1": null}', '{"1": true}', "x"]),
        ("messages", ["hi", "[]", "[1]", '[{"role": "user"}]', '[{"role": "boss", "content": ""}]',
                      '[{"role": "user", "content": 5}]', '[{"role": "user", "content": "", "x": 1}]', "[" * 10_000]),
    ],
)  # fmt: skip
def test_bad_lists_and_objects_are_refused_by_name(name: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(InvalidOptionError, match=f"^{name} is .*; it must be a"):
            parse({name: value})


def test_fields_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(InvalidOptionError, match="n is 2; it must be 1 with stream"):
        parse({"n": 2, "stream": True})
    with pytest.raises(InvalidOptionError, match="min_tokens is 9; it must be at most max_tokens, 8"):
        parse({"min_tokens": 9, "max_tokens": 8})


def test_each_of_several_answers_has_a_seed_of_its_own_and_the_first_the_requests() -> None:
    options = parse({"n": 3, "seed": 2**63 - 2})
    assert [options.for_answer(index).seed for index in range(3)] == [2**63 - 2, 2**63 - 1, 0]
    assert parse({"n": 3}).for_answer(1).seed is None


@pytest.mark.parametrize("name", ["max_token", "Max_Tokens", "parse", "", "__class__", "vocabulary"])
def test_an_unknown_parameter_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        parse({name: 5})
    assert str(caught.value).startswith(f"unknown parameter {name!r}; known are ")
    known = [field.name for field in fields(GenerationOptions)]
    assert all(name in str(caught.value) for name in [*known, "cache"])


def test_a_long_value_is_not_repeated_in_full() -> None:
    with pytest.raises(InvalidOptionError) as caught:
        parse({"stop": "x" * 10_000})
    assert len(str(caught.value)) < 300


def test_parameters_of_the_cache_and_of_triton_are_none_of_its_business() -> None:
    others = {"cache": "off", "cache_ttl_s": 5, "triton_enable_empty": True}
    assert parse({**others, "max_tokens": 3}) == GenerationOptions(max_tokens=3)


def test_config_without_parameters_gives_the_defaults_and_each_parameter_is_read() -> None:
    assert Settings.from_config({}) == Settings()
    given = config(
        max_sequences="2",
        max_waiting="0",
        kv_bytes="1000000",
        priority_levels="5",
        default_priority_level="4",
        speculation_length="0",
        intra_op_thread_count="3",
        prompt_format="chat",
        cache_model="other",
        kv_cache_bytes="2000000",
        kv_cache_int8="true",
        kv_tier_bytes="3000000",
        kv_tier_folder="/tier",
        kv_integrity_check_s="9",
        session_ttl_s="60",
        session_conflict="refuse",
        session_store_path="/sessions.sqlite",
    )
    reuse = ReuseSettings(2_000_000, True, 3_000_000, "/tier", 9, 60, "refuse", "/sessions.sqlite")
    assert Settings.from_config(given) == Settings(2, 0, 1_000_000, 5, 4, 0, 3, "chat", "other", reuse)


def test_no_bytes_is_no_cache_and_auto_a_quarter_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INFERENCE_STATE_DIR", raising=False)
    assert ReuseSettings(kv_cache_bytes=0).kv_cache("model") is None
    automatic = ReuseSettings.take({"kv_cache_bytes": "auto"})
    assert automatic == ReuseSettings()
    made = automatic.kv_cache("model")
    assert made and made.kv_cache_bytes == pytest.approx(default_kv_cache_bytes(), rel=0.2)


def test_sessions_and_tier_are_in_the_state_folder_each_model_s_by_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("INFERENCE_STATE_DIR", str(tmp_path))
    settings = ReuseSettings(kv_cache_bytes=10_000_000, kv_tier_bytes=1_000_000)
    made = settings.kv_cache("one")
    assert made and made.tier_folder == tmp_path / "one.kv_tier"
    assert settings.session_store("one") != settings.session_store("other")
    monkeypatch.delenv("INFERENCE_STATE_DIR")
    with pytest.raises(ValueError, match="parameter session_store_path is empty: set it to a path"):
        settings.session_store("one")
    with pytest.raises(ValueError, match="parameter kv_tier_folder is empty"):
        settings.kv_cache("one")


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("max_sequences", "0", "an integer from 1 to 1024"),
        ("max_sequences", "1025", "an integer from 1 to 1024"),
        ("max_waiting", "-1", "an integer from 0 to 1000000"),
        ("kv_bytes", "-1", f"an integer from 0 to {1 << 60}"),
        ("priority_levels", "0", "an integer from 1 to 1000"),
        ("default_priority_level", "4", "at most priority_levels, 3"),
        ("speculation_length", "17", "an integer from 0 to 16"),
        ("speculation_length", "four", "an integer from 0 to 16"),
        ("intra_op_thread_count", "1.5", "an integer from 0 to 1024"),
        ("intra_op_thread_count", "", "an integer from 0 to 1024"),
        ("prompt_format", "Chat", '"chat" or "raw"'),
        ("kv_cache_bytes", "-5", '"auto" or a number of bytes, 0 for none'),
        ("kv_cache_int8", "yes", '"true" or "false"'),
        ("kv_tier_bytes", "1G", f"an integer from 0 to {1 << 60}"),
        ("session_ttl_s", "0", "an integer from 1 to 2592000"),
        ("session_conflict", "queue", '"wait" or "refuse"'),
    ],
)
def test_a_bad_setting_is_refused_with_its_parameter_value_and_remedy(name: str, value: str, right: str) -> None:
    with pytest.raises(ValueError) as caught:
        Settings.from_config(config(**{name: value}))
    assert str(caught.value).replace("'", "") == f"parameter {name} is {value}; it must be {right}"


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown parameter 'max_sequence' in config\.pbtxt"):
        Settings.from_config(config(max_sequence="8"))
