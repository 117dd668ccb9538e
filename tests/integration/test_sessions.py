"""Conversations through the real Triton: continued, rewound, forked, closed, kept over a restart, one at a time."""

import http.client
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from scripts.serving.installation import PROJECT
from scripts.serving.server import TritonServer
from tests.integration.test_generate import TIMEOUT_S, Parameter, ask, eventually, metric, post, stream_http
from tests.reply import Reply

QUESTIONS = ["What does itertools.chain do?", "What does zip do?", "And what is json.dumps for?"]


@pytest.fixture
def tenant(request: pytest.FixtureRequest) -> Iterator[str]:
    """A tenant that no other test uses."""
    yield f"sessions {request.node.name[:60]}"


def say(server: TritonServer, tenant: str, session_id: str, text: str, **parameters: Parameter) -> Reply:
    return ask(server, text, tenant=tenant, session_id=session_id, max_tokens=24, **parameters)


def change(server: TritonServer, tenant: str, session_id: str, operation: str, **parameters: Parameter) -> Any:
    """Do an operation that decodes nothing, and return what the server tells of the session."""
    reply = ask(server, "", tenant=tenant, session_id=session_id, session_operation=operation, **parameters)
    assert reply.text == ""
    return reply.info["session"]


def sessions(server: TritonServer, tenant: str) -> dict[str, int]:
    listed = ask(server, "", tenant=tenant, session_operation="list").info["sessions"]
    return {session["id"]: session["turns"] for session in listed}


def whole_chat(server: TritonServer, questions: list[str]) -> list[Reply]:
    """Ask the same with the whole conversation sent each time, and nothing remembered."""
    replies: list[Reply] = []
    for number, question in enumerate(questions):
        chat = [{"role": "user", "content": question}]
        for before in reversed(range(number)):
            said = [{"role": "user", "content": questions[before]}]
            chat = [*said, {"role": "assistant", "content": replies[before].text}, *chat]
        fields = {"text_input": "", "messages": json.dumps(chat), "cache": "off", "max_tokens": 24}
        status, _, body = post(server, "generate/generate", json.dumps(fields).encode())
        assert status == 200, body
        replies.append(Reply(json.loads(body)["text_output"], json.loads(json.loads(body)["info"])))
    return replies


def test_a_turn_sends_only_what_is_new_and_is_answered_as_the_whole_chat_would_be(
    server: TritonServer, tenant: str
) -> None:
    expected = whole_chat(server, QUESTIONS)
    replies = [say(server, tenant, "chat", question) for question in QUESTIONS]
    assert [reply.text for reply in replies] == [reply.text for reply in expected]
    assert [reply.info["prompt_tokens"] for reply in replies] == [one.info["prompt_tokens"] for one in expected]
    assert [reply.info["session"]["turns"] for reply in replies] == [1, 2, 3]
    assert replies[0].info["reused_tokens"] == 0
    assert replies[2].info["reused_tokens"] > replies[1].info["reused_tokens"] > 0
    assert all(reply.info["source"] == "decoded" for reply in replies)


def test_the_semantic_cache_answers_no_question_that_has_a_history(server: TritonServer, tenant: str) -> None:
    say(server, tenant, "one", QUESTIONS[0])
    first = ask(server, QUESTIONS[1], tenant=tenant)
    assert first.info["source"] == "decoded"
    eventually(lambda: ask(server, QUESTIONS[1], tenant=tenant).info["source"] == "exact")
    assert say(server, tenant, "one", QUESTIONS[1]).info["source"] == "decoded"


def test_a_session_goes_back_branches_off_and_ends(server: TritonServer, tenant: str) -> None:
    first, second, third = (say(server, tenant, "chat", question) for question in QUESTIONS)
    assert change(server, tenant, "chat", "fork", session_fork_id="branch")["id"] == "branch"
    assert change(server, tenant, "chat", "rewind", session_turn=1)["turns"] == 1
    assert sessions(server, tenant) == {"chat": 1, "branch": 3}
    assert say(server, tenant, "chat", QUESTIONS[1]).text == second.text
    change(server, tenant, "branch", "rewind", session_turn=2)
    assert say(server, tenant, "branch", QUESTIONS[2]).text == third.text
    change(server, tenant, "branch", "rewind", session_turn=0)
    assert say(server, tenant, "branch", QUESTIONS[0]).text == first.text
    assert change(server, tenant, "chat", "close") == {"id": "chat", "closed": True}
    assert sessions(server, tenant) == {"branch": 1}


def test_a_tenant_neither_sees_nor_continues_another_s_session(server: TritonServer, tenant: str) -> None:
    say(server, tenant, "chat", QUESTIONS[0])
    other = f"not {tenant}"
    assert sessions(server, other) == {}
    reply = say(server, other, "chat", QUESTIONS[0])
    assert (reply.info["session"]["turns"], reply.info["reused_tokens"]) == (1, 0)


def test_requests_at_once_on_one_session_take_turns(server: TritonServer, tenant: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        turns = list(pool.map(lambda _: say(server, tenant, "chat", QUESTIONS[0]).info["session"]["turns"], range(6)))
    assert sorted(turns) == [1, 2, 3, 4, 5, 6]


def test_a_streamed_turn_is_kept_too(server: TritonServer, tenant: str) -> None:
    parameters: dict[str, Parameter] = {"tenant": tenant, "session_id": "chat", "max_tokens": 24}
    events = stream_http(server, QUESTIONS[0], **parameters)
    assert json.loads(events[-1][1])["session"]["turns"] == 1
    second = say(server, tenant, "chat", QUESTIONS[1])
    assert second.text == whole_chat(server, QUESTIONS)[1].text


def test_an_answer_cut_off_by_a_stop_string_is_continued_from_what_was_said(server: TritonServer, tenant: str) -> None:
    [uncut, *_] = whole_chat(server, QUESTIONS[:1])
    stop = uncut.text.split()[3]
    cut = say(server, tenant, "chat", QUESTIONS[0], stop=stop)
    assert cut.text == uncut.text[: uncut.text.index(stop)]
    reply = say(server, tenant, "chat", QUESTIONS[1])
    assert reply.info["session"]["turns"] == 2


def test_what_was_not_computed_again_is_on_the_metrics_port(server: TritonServer, tenant: str) -> None:
    name = "speculative_decoding_{}{{".format
    names = [name(f"kv_cache_{kind}_tokens_total") for kind in ("reused", "computed")]
    before = [metric(server, name) for name in names]
    infos = [say(server, tenant, "chat", question).info for question in QUESTIONS]
    reused = sum(info["reused_tokens"] for info in infos)
    computed = sum(info["prompt_tokens"] for info in infos) - reused
    eventually(lambda: metric(server, names[0]) >= before[0] + reused)
    eventually(lambda: metric(server, names[1]) >= before[1] + computed)
    eventually(lambda: metric(server, name("kv_cache_blocks_pinned")) > 0)
    eventually(lambda: metric(server, name("sessions_open")) >= 1)
    eventually(lambda: metric(server, name("sessions_busy")) == 0)
    used, budget = (metric(server, name(f"kv_cache_bytes_{kind}")) for kind in ("used", "budget"))
    assert 0 < used <= budget


def test_the_conversation_in_the_readme_goes_as_it_says(server: TritonServer, tenant: str) -> None:
    lines = re.findall(r"^    ask '(.*session.*)'$", (PROJECT / "README.md").read_text(), re.MULTILINE)
    bodies = [json.dumps(json.loads(line) | {"tenant": tenant}).encode() for line in lines]
    answers = [post(server, "generate/generate", body) for body in bodies]
    assert [status for status, _, _ in answers] == [200] * 7, answers
    infos = [json.loads(json.loads(answer)["info"]) for _, _, answer in answers]
    assert [info["session"]["turns"] for info in infos[:5]] == [1, 2, 2, 1, 2]
    assert {session["id"]: session["turns"] for session in infos[5]["sessions"]} == {"my chat": 2, "other": 2}
    assert infos[6]["session"]["closed"]
    assert change(server, tenant, "other", "close")["closed"]


def test_every_figure_of_cache_and_sessions_is_on_the_metrics_port(server: TritonServer) -> None:
    host, _, port = server.metrics_url.removeprefix("http://").rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=TIMEOUT_S)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    for name in (
        *("reused_tokens_total", "computed_tokens_total", "blocks", "bytes_used", "bytes_budget", "blocks_pinned"),
        *("evicted_blocks_total", "tier_hits_total", "tier_blocks", "integrity_errors_total"),
    ):
        assert f'speculative_decoding_kv_cache_{name}{{model="language_model"}}' in text
    for name in ("open", "busy", "waiting"):
        assert f'speculative_decoding_sessions_{name}{{model="language_model"}}' in text


def test_a_failed_turn_leaves_the_session_as_it_was(server: TritonServer, tenant: str) -> None:
    first = say(server, tenant, "chat", QUESTIONS[0])
    fields = {"text_input": QUESTIONS[1], "tenant": tenant, "session_id": "chat", "ignore_eos": True}
    body = json.dumps({**fields, "max_tokens": 300, "timeout": 10_000}).encode()
    assert post(server, "generate/generate", body)[0] == 400
    eventually(lambda: sessions(server, tenant) == {"chat": 1})
    assert say(server, tenant, "chat", QUESTIONS[1]).info["session"]["turns"] == 2
    assert first.info["session"]["turns"] == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"session_turn": 1}, "session_turn is given without session_id"),
        ({"session_id": ""}, "session_id is ''; it must be a string of 1 to 256 characters"),
        ({"session_id": "a\nb"}, "session_id is 'a\\nb'; it must be 1 to 256 bytes, all printable"),
        ({"session_id": "a", "session_ttl_s": 0}, "session_ttl_s is 0; it must be a number above 0"),
        ({"session_id": "a", "session_operation": "delete"}, "it must be one of continue, rewind, fork, close, list"),
        ({"session_id": "a", "session_operation": "rewind"}, "'rewind', which needs session_turn"),
        ({"session_id": "a", "session_fork_id": "b"}, "'continue', which does not take session_fork_id"),
        ({"session_id": "a", "session_operation": "close"}, "'close': text_input must be empty"),
        ({"session_id": "a", "session_operation": "close", "text_input": ""}, "must be one of yours that is open"),
        ({"session_id": "a", "text_input": ""}, "text_input is empty; it must be a prompt"),
        ({"session_id": "a", "n": 2}, "n is 2; it must be 1 with session_id"),
    ],
)
def test_a_wrong_session_request_is_refused_by_name(
    server: TritonServer, tenant: str, fields: dict[str, Any], message: str
) -> None:
    body = {"text_input": "Hello", "tenant": tenant, **fields}
    status, _, answer = post(server, "generate/generate", json.dumps(body).encode())
    assert status == 400 and message in json.loads(answer)["error"], answer


def test_a_conversation_outlives_the_server_and_goes_on_as_it_would_have(
    tmp_path_factory: pytest.TempPathFactory, server: TritonServer, tenant: str
) -> None:
    expected = [say(server, tenant, "chat", question, temperature=0.8, seed=5) for question in QUESTIONS]
    state = tmp_path_factory.mktemp("restarted")
    with TritonServer(state_dir=state) as first:
        replies = [say(first, tenant, "chat", question, temperature=0.8, seed=5) for question in QUESTIONS[:2]]
    with TritonServer(state_dir=state) as second:
        assert sessions(second, tenant) == {"chat": 2}
        replies.append(say(second, tenant, "chat", QUESTIONS[2], temperature=0.8, seed=5))
    assert [reply.text for reply in replies] == [reply.text for reply in expected]
    assert replies[2].info["reused_tokens"] == 0
