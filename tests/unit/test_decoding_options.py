"""GenerationOptions and Settings: what is accepted, and that a refusal names its field."""

from typing import Any

import pytest
from speculative_decoding.options import GenerationOptions, InvalidOptionError
from speculative_decoding.settings import Settings


def config(**parameters: str) -> dict[str, Any]:
    """Triton's JSON form of a config.pbtxt with these parameters."""
    return {"parameters": {name: {"string_value": value} for name, value in parameters.items()}}


def test_without_parameters_the_defaults_hold() -> None:
    assert GenerationOptions.parse({}) == GenerationOptions(max_tokens=128, stream=False, speculation_length=None)


def test_parameters_are_taken_as_given_and_null_means_default() -> None:
    given = {"max_tokens": 1, "stream": True, "speculation_length": 0}
    assert GenerationOptions.parse(given) == GenerationOptions(1, True, 0)
    assert GenerationOptions.parse(dict.fromkeys(given)) == GenerationOptions()
    assert GenerationOptions.parse({"speculation_length": 16}).speculation_length == 16


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("max_tokens", 0, "an integer of at least 1"),
        ("max_tokens", -1, "an integer of at least 1"),
        ("max_tokens", "ten", "an integer of at least 1"),
        ("max_tokens", "10", "an integer of at least 1"),
        ("max_tokens", 10.0, "an integer of at least 1"),
        ("max_tokens", True, "an integer of at least 1"),
        ("max_tokens", [10], "an integer of at least 1"),
        ("speculation_length", -1, "an integer from 0 to 16"),
        ("speculation_length", 17, "an integer from 0 to 16"),
        ("speculation_length", False, "an integer from 0 to 16"),
        ("speculation_length", 4.0, "an integer from 0 to 16"),
        ("stream", 1, "true or false"),
        ("stream", "true", "true or false"),
    ],
)
def test_a_bad_value_is_refused_with_its_field_value_and_remedy(name: str, value: object, right: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        GenerationOptions.parse({name: value})
    assert str(caught.value) == f"{name} is {value!r}; it must be {right}"


@pytest.mark.parametrize("name", ["max_token", "Max_Tokens", "parse", "", "__class__"])
def test_an_unknown_parameter_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        GenerationOptions.parse({name: 5})
    assert str(caught.value).startswith(f"unknown parameter {name!r}; known are ")
    assert all(
        known in str(caught.value) for known in ("max_tokens", "stream", "speculation_length", "cache", "tenant")
    )


def test_parameters_of_the_cache_and_of_triton_are_none_of_its_business() -> None:
    others = {"cache": "off", "tenant": "a", "cache_ttl_s": 5, "priority": 1, "timeout": 9, "triton_enable_empty": True}
    assert GenerationOptions.parse({**others, "max_tokens": 3}) == GenerationOptions(max_tokens=3)


def test_config_without_parameters_gives_the_defaults_and_each_parameter_is_read() -> None:
    assert Settings.from_config({}) == Settings()
    given = config(
        max_sequences="2",
        max_waiting="0",
        speculation_length="0",
        intra_op_thread_count="3",
        prompt_format="chat",
        cache_model="other",
    )
    assert Settings.from_config(given) == Settings(2, 0, 0, 3, "chat", "other")


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("max_sequences", "0", "an integer from 1 to 1024"),
        ("max_sequences", "1025", "an integer from 1 to 1024"),
        ("max_waiting", "-1", "an integer from 0 to 1000000"),
        ("speculation_length", "17", "an integer from 0 to 16"),
        ("speculation_length", "four", "an integer from 0 to 16"),
        ("intra_op_thread_count", "1.5", "an integer from 0 to 1024"),
        ("intra_op_thread_count", "", "an integer from 0 to 1024"),
        ("prompt_format", "Chat", '"chat" or "raw"'),
    ],
)
def test_a_bad_setting_is_refused_with_its_parameter_value_and_remedy(name: str, value: str, right: str) -> None:
    with pytest.raises(ValueError) as caught:
        Settings.from_config(config(**{name: value}))
    assert str(caught.value) == f"parameter {name} is {value!r}; it must be {right}"


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown parameter 'max_sequence' in config\.pbtxt"):
        Settings.from_config(config(max_sequence="8"))
