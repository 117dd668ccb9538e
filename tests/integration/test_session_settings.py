"""Conversations on servers set up otherwise: without a cache, refusing, without a chat template; and what can fail."""

import json
import queue
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc

from scripts.serving.server import MODEL_REPOSITORY, TritonServer
from tests.integration.test_generate import TIMEOUT_S, Parameter, ask, eventually, metric, post, tensor
from tests.integration.test_sessions import QUESTIONS
from tests.reply import Reply

MODEL = "language_model"
ENDLESS: dict[str, Parameter] = {"ignore_eos": True, "max_tokens": 400, "speculation_length": 0}


def repository(folder: Path, **parameters: str) -> Path:
    """Copy the language model alone, with other parameters in its config.pbtxt, and return the repository."""
    shutil.copytree(MODEL_REPOSITORY / MODEL, folder / MODEL)
    config = folder / MODEL / "config.pbtxt"
    text = config.read_text()
    for name, value in parameters.items():
        text = re.sub(rf'parameters {{ key: "{name}" .*\n', "", text)
        text += f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}\n'
    config.write_text(text)
    return folder


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server that has no cache and lets nobody wait for a session."""
    folder = repository(tmp_path_factory.mktemp("refusing"), session_conflict="refuse", kv_cache_bytes="0")
    with TritonServer(folder, state_dir=tmp_path_factory.mktemp("state")) as server:
        yield server


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server that takes text as it is, and checks its cache all the time."""
    folder = repository(tmp_path_factory.mktemp("raw"), prompt_format="raw", kv_integrity_check_s="1")
    with TritonServer(folder, state_dir=tmp_path_factory.mktemp("state")) as server:
        yield server


def ask_alone(server: TritonServer, text: str, **parameters: Parameter) -> Reply:
    return ask(server, text, MODEL, **parameters)


def start_holding(server: TritonServer, tenant: str, client: tritonclient.grpc.InferenceServerClient) -> Any:
    """Have a long answer hold the session "chat", and return where its responses go once there is one."""
    results: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: results.put(error or result))
    sampling = {**ENDLESS, "tenant": tenant, "session_id": "chat", "stream": True}
    inputs = [tensor("text_input", QUESTIONS[0].encode()), tensor("sampling_parameters", json.dumps(sampling).encode())]
    client.async_stream_infer(MODEL, inputs)
    results.get(timeout=TIMEOUT_S)
    return results


def last_of(results: Any) -> Any:
    """Return a stream's error, or the info of its last response."""
    while True:
        result = results.get(timeout=TIMEOUT_S)
        if isinstance(result, Exception):
            return result
        if info := result.as_numpy("info").item():
            return json.loads(info)


def test_a_request_for_a_session_in_use_is_refused_where_the_settings_say_so(refusing: TritonServer) -> None:
    with tritonclient.grpc.InferenceServerClient(refusing.grpc_url) as client:
        results = start_holding(refusing, "ada", client)
        fields = {"text_input": QUESTIONS[1], "tenant": "ada", "session_id": "chat"}
        status, _, answer = post(refusing, f"{MODEL}/generate", json.dumps(fields).encode())
        assert (status, "'chat' is in use by another request" in json.loads(answer)["error"]) == (400, True), answer
        elsewhere = ask_alone(refusing, QUESTIONS[1], tenant="ada", session_id="other", max_tokens=4)
        assert elsewhere.info["session"]["turns"] == 1
        assert last_of(results)["session"]["turns"] == 1
    change = ask_alone(refusing, "", tenant="ada", session_id="chat", session_operation="close")
    assert change.info["session"]["closed"]


def test_conversations_need_no_cache(refusing: TritonServer, server: TritonServer) -> None:
    def chat(asked: TritonServer) -> list[Reply]:
        one: dict[str, Parameter] = {"tenant": "no cache", "session_id": "one", "max_tokens": 24}
        replies = [ask_alone(asked, question, **one) for question in QUESTIONS]
        ask_alone(asked, "", tenant="no cache", session_id="one", session_operation="rewind", session_turn=1)
        return [*replies, ask_alone(asked, QUESTIONS[2], **one)]

    without, cached = chat(refusing), chat(server)
    assert [reply.text for reply in without] == [reply.text for reply in cached]
    assert [reply.info["session"] for reply in without] == [reply.info["session"] for reply in cached]
    assert {reply.info["reused_tokens"] for reply in without} == {0}
    assert metric(refusing, "speculative_decoding_kv_cache_") == 0
    eventually(lambda: metric(server, "speculative_decoding_kv_cache_bytes_used") > 0)


def test_a_session_without_a_chat_template_continues_its_text(raw: TritonServer) -> None:
    texts = ["The function itertools.chain returns", "\nThe function json.dumps returns", "\nThe end of it all is"]
    parameters: dict[str, Parameter] = {"max_tokens": 24, "ignore_eos": True}
    alone = [ask_alone(raw, text, tenant="alone", **parameters) for text in texts]
    replies = [ask_alone(raw, text, session_id="raw", **parameters) for text in texts]
    others = [ask_alone(raw, text, tenant="other", session_id="raw", **parameters) for text in texts]
    own = [reply.info["prompt_tokens"] for reply in alone]
    assert [reply.info["prompt_tokens"] for reply in replies] == [own[0], sum(own[:2]) + 24, sum(own) + 48]
    assert [reply.info["session"]["turns"] for reply in replies] == [1, 2, 3]
    assert replies[0].text == alone[0].text and replies[1].text != alone[1].text
    assert [reply.text for reply in replies] == [reply.text for reply in others]
    assert replies[2].info["reused_tokens"] >= 32
    fields = {"text_input": "", "session_id": "raw", "messages": '[{"role": "user", "content": "x"}]'}
    status, _, answer = post(raw, f"{MODEL}/generate", json.dumps(fields).encode())
    assert (status, "messages cannot be taken" in json.loads(answer)["error"]) == (400, True), answer


def test_the_cache_of_a_served_model_is_checked_where_the_settings_say_so(raw: TritonServer) -> None:
    ask_alone(raw, "The function zip returns", session_id="checked", max_tokens=40, ignore_eos=True)
    name = "speculative_decoding_kv_cache_integrity_{}_total{{".format
    checks = metric(raw, name("checks"))
    eventually(lambda: metric(raw, name("checks")) > checks + 1)
    assert metric(raw, name("errors")) == 0


def test_a_request_in_line_is_told_when_sessions_cannot_be_read_and_later_ones_are_answered(
    raw: TritonServer,
) -> None:
    ask_alone(raw, "The function zip", tenant="ada", session_id="chat", max_tokens=4, ignore_eos=True)
    fields = {"text_input": "returns", "tenant": "ada", "session_id": "chat", "max_tokens": 4}
    with (
        tritonclient.grpc.InferenceServerClient(raw.grpc_url) as client,
        sqlite3.connect(raw.state_dir / f"{MODEL}.sessions.sqlite") as connection,
    ):
        results = start_holding(raw, "ada", client)
        connection.execute("ALTER TABLE turns RENAME TO hidden")
        connection.commit()
        status, _, answer = post(raw, f"{MODEL}/generate", json.dumps(fields).encode())
        assert "sessions cannot be read or kept now" in str(last_of(results))
        connection.execute("ALTER TABLE hidden RENAME TO turns")
        connection.commit()
    assert (status, "sessions cannot be read or kept now" in json.loads(answer)["error"]) == (400, True), answer
    later = ask_alone(raw, "returns", tenant="ada", session_id="chat", max_tokens=4, ignore_eos=True)
    assert later.info["session"]["turns"] == 2


def test_a_client_that_goes_gives_up_its_place_in_line_while_the_session_is_in_use(raw: TritonServer) -> None:
    ended = 'speculative_decoding_requests_total{{model="language_model",reason="{}"}}'.format
    before = {reason: metric(raw, ended(reason)) for reason in ("cancelled", "timeout", "length")}
    inputs = [tensor("text_input", b"returns")]
    hers: dict[str, Parameter] = {"tenant": "eve", "session_id": "chat", "max_tokens": 4, "ignore_eos": True}
    with (
        tritonclient.grpc.InferenceServerClient(raw.grpc_url) as holding,
        tritonclient.grpc.InferenceServerClient(raw.grpc_url) as leaving,
    ):
        results = start_holding(raw, "eve", holding)
        leaving.start_stream(lambda result, error: None)
        leaving.async_stream_infer(MODEL, inputs, parameters=hers)
        time.sleep(0.05)
        leaving.stop_stream(cancel_requests=True)
        eventually(lambda: metric(raw, ended("cancelled")) == before["cancelled"] + 1)
        status, _, answer = post(
            raw, f"{MODEL}/generate", json.dumps({"text_input": "x", **hers, "timeout": 30_000}).encode()
        )
        assert (status, "timeout of 30000 microseconds is over" in json.loads(answer)["error"]) == (400, True), answer
        assert metric(raw, ended("length")) == before["length"], "the session is still in use"
        assert last_of(results)["session"]["turns"] == 1
    assert ask_alone(raw, "and", **hers).info["session"]["turns"] == 2
