"""Requests and settings: what is taken, and how the rest is refused."""

import json
import re
from contextlib import nullcontext
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from semantic_cache import request
from semantic_cache.key import Keys, Parameter
from semantic_cache.policy import Policy
from semantic_cache.request import InvalidRequest, Lookup, parse_answer

POLICY = Policy(max_prompt_bytes=100)
KEYS = Keys(b"s" * 32, "language_model:1", ("embedder:1", "verifier"))


def parse_lookup(prompt: bytes, parameters: dict[str, Parameter]) -> Lookup:
    return request.parse_lookup(prompt, parameters, POLICY, KEYS)


def test_the_cache_is_on_for_the_default_tenant_unless_told_otherwise() -> None:
    lookup = parse_lookup(b"hello", {})
    assert (lookup.prompt, lookup.mode, lookup.ttl_s) == ("hello", "on", 86400)
    assert lookup.key == parse_lookup(b"hello", {"tenant": "default", "cache": "on"}).key


def test_tags_age_and_mode_are_read() -> None:
    lookup = parse_lookup(b"p", {"cache": "only", "cache_max_age_s": 60, "cache_tags": "docs, v2,,"})
    assert (lookup.mode, lookup.max_age_s, lookup.tags) == ("only", 60, ("docs", "v2"))


@pytest.mark.parametrize(
    ("parameters", "stores"),
    [
        ({}, True),
        ({"temperature": 0}, True),
        ({"temperature": 0.0, "top_p": 0.5}, True),
        ({"temperature": 0.7}, False),
        ({"temperature": "0.7"}, False),
        ({"temperature": 0.7, "seed": 0}, True),
        ({"temperature": 0.7, "cache_sampled": True}, True),
    ],
)
def test_a_sampled_answer_is_kept_only_with_a_seed_or_when_asked(parameters: dict[str, Any], stores: bool) -> None:
    lookup = parse_lookup(b"p", parameters)
    assert lookup.stores is stores
    assert bool(lookup.flight) is (stores and "cache_sampled" not in parameters)  # nor is it shared in flight


def test_without_a_temperature_it_is_the_fronted_models_that_counts() -> None:
    policy = Policy(default_temperature=1.0)
    for parameters, stores in (({}, False), ({"seed": 1}, True), ({"temperature": 0}, True)):
        assert request.parse_lookup(b"p", parameters, policy, KEYS).stores is stores


def test_its_own_parameters_are_no_part_of_the_key_but_the_tenant_is() -> None:
    plain = parse_lookup(b"hello", {}).key
    assert parse_lookup(b"hello", {"cache": "refresh", "cache_ttl_s": 5}).key == plain
    assert parse_lookup(b"hello", {"tenant": "other"}).key.partition != plain.partition


@pytest.mark.parametrize(
    ("prompt", "parameters", "message"),
    [
        (b"", {}, "text_input is ''; it must be a prompt of 1 to 100 bytes"),
        (b" \t", {}, "text_input is ' \\t'"),
        (b"x" * 101, {}, "text_input is 101 bytes long; it must be at most 100"),
        (b"ab\xe9", {}, "text_input has the byte 0xe9 at 2; it must be valid UTF-8"),
        (b"p", {"cache": "maybe"}, "cache is 'maybe'; it must be one of on, off, refresh, only"),
        (b"p", {"cache": 1}, "cache is 1"),
        (b"p", {"tenant": ""}, "tenant is ''; it must be a string of 1 to 128 characters"),
        (b"p", {"tenant": "t" * 129}, "tenant is 'ttt"),
        (b"p", {"tenant": True}, "tenant is True"),
        (b"p", {"cache_ttl_s": 0}, "cache_ttl_s is 0; it must be a whole number of seconds from 1 to"),
        (b"p", {"cache_ttl_s": -1}, "cache_ttl_s is -1"),
        (b"p", {"cache_ttl_s": True}, "cache_ttl_s is True"),
        (b"p", {"cache_ttl_s": "60"}, "cache_ttl_s is '60'"),
        (b"p", {"cache_ttl_s": 60.0}, "cache_ttl_s is 60.0"),
        (b"p", {"cache_max_age_s": -1}, "cache_max_age_s is -1; it must be a whole number of seconds from 0 to"),
        (b"p", {"cache_tags": 5}, "cache_tags is 5; it must be up to 16 tags of up to 64 characters, by commas"),
        (b"p", {"cache_tags": "x" * 65}, "cache_tags is"),
        (b"p", {"cache_tags": ",".join(map(str, range(17)))}, "cache_tags is"),
        (b"p", {"cache_sampled": "yes"}, "cache_sampled is 'yes'; it must be true or false"),
        (b"p", {"cache_tag": "x"}, "unknown parameter 'cache_tag'; the cache has cache, tenant, cache_ttl_s"),
        (b"", {"messages": '[{"role": "user", "content": " "}]'}, "the last content in messages is ' '; it must be a"),
        (b"", {"messages": json.dumps([{"role": "user", "content": "p" * 101}])}, "messages is 101 bytes long"),
    ],
)
def test_a_bad_lookup_names_field_value_and_remedy(prompt: bytes, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message)):
        parse_lookup(prompt, parameters)


def chat(*contents: str) -> str:
    return json.dumps([{"role": "user", "content": content} for content in contents])


def test_of_a_chat_the_last_message_is_looked_up_and_what_was_said_before_is_a_wall() -> None:
    keys = {name: parse_lookup(b"", {"messages": chat(*name)}) for name in ("xz", "yz", "xw", "z")}
    assert [lookup.prompt for lookup in keys.values()] == ["z", "z", "w", "z"]
    assert keys["xz"].key.partition == keys["xw"].key.partition
    assert len({keys[name].key.partition for name in ("xz", "yz", "z")}) == 3
    assert keys["xz"].key.exact != keys["xw"].key.exact
    assert keys["z"].key.partition != parse_lookup(b"z", {}).key.partition


def test_who_says_the_last_message_of_a_chat_is_a_wall() -> None:
    said = [json.dumps([{"role": role, "content": "x"}]) for role in ("user", "tool")]
    user, tool = (parse_lookup(b"", {"messages": messages}).key.partition for messages in said)
    assert user != tool


@pytest.mark.parametrize("messages", ["", "hello", "[]", "{}", "[1]", '[{"role": "user"}]', "[" * 100_000, 7, True])
def test_messages_of_another_form_are_refused_by_name(messages: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"messages is .*; it must be a JSON list of objects with role"):
        parse_lookup(b"", {"messages": messages})


def test_a_prompt_beside_messages_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="text_input and messages are both given"):
        parse_lookup(b"p", {"messages": chat("x")})


@pytest.mark.parametrize(("n", "refused"), [(1, False), (2, True), ("2", True)])
def test_an_upstream_model_is_asked_for_one_answer(n: Parameter, refused: bool) -> None:
    policy = Policy(upstream_model="other")
    with pytest.raises(InvalidRequest, match=r"n is .*; it must be 1") if refused else nullcontext():
        request.parse_lookup(b"p", {"n": n}, policy, KEYS)


def test_a_long_value_is_not_repeated_in_full() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_lookup(b"p", {"tenant": "t" * 10_000})
    assert len(str(caught.value)) < 200


@given(st.binary(max_size=200), st.dictionaries(st.sampled_from(["cache", "tenant", "cache_ttl_s", "seed"]), st.text()))
def test_any_bytes_are_either_taken_whole_or_refused(prompt: bytes, parameters: dict[str, str]) -> None:
    try:
        lookup = parse_lookup(prompt, parameters)
    except InvalidRequest:
        return
    assert lookup.prompt.encode() == prompt and 0 < len(prompt) <= 100


def test_an_answer_comes_with_a_json_object_or_none() -> None:
    assert parse_answer(b"e", b"text", None).info == "{}"
    assert parse_answer(b"e", b"text", b'{"tokens": 3}').info == '{"tokens": 3}'


@pytest.mark.parametrize(
    ("entry", "answer", "info", "message"),
    [
        (b"e", None, None, "answer is missing"),
        (b"e", b"\xff", None, "answer has the byte 0xff at 0"),
        (b"\xff", b"x", None, "cache_entry has the byte 0xff at 0"),
        (b"e", b"x", b"[1]", "answer_info is '[1]'; it must be a JSON object"),
        (b"e", b"x", b"{", "answer_info is '{'"),
    ],
)
def test_a_bad_answer_names_its_field(entry: bytes, answer: bytes | None, info: bytes | None, message: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message)):
        parse_answer(entry, answer, info)


def test_settings_come_from_config_parameters() -> None:
    policy = Policy.from_parameters({"similarity_threshold": "0.8", "cache_ttl_s": "60", "EXECUTION_ENV_PATH": "x"})
    assert policy == Policy(similarity_threshold=0.8, cache_ttl_s=60)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("similarity_threshold", "high"),
        ("similarity_threshold", "-1"),
        ("similarity_threshold", "1.01"),
        ("similarity_threshold", "nan"),
        ("cache_ttl_s", "0"),
        ("cache_ttl_s", "1.5"),
        ("ttl_jitter", "1"),
        ("verify", "yes"),
        ("max_entries", "0"),
        ("eviction", "random"),
        ("shadow_share", "2"),
        ("max_prompt_bytes", "-1"),
        ("embedder", ""),
        ("embedder", "embedder"),
        ("fronted_model", ""),
        ("similarity", "0.9"),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"parameter '?{name}'?"):
        Policy.from_parameters({name: value})


def test_the_threshold_follows_the_mode_unless_it_is_given() -> None:
    assert Policy().similarity_threshold == 0.6
    assert Policy(verify=False).similarity_threshold == 0.95
    assert Policy(verify=False, similarity_threshold=0.9).similarity_threshold == 0.9
