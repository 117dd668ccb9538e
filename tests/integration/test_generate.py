"""The project's own models on a real Triton: cached, decoded speculatively and streamed, for every kind of client."""

import http.client
import json
import queue
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from scripts.demo_models.phrasings import UNSEEN
from scripts.serving.errors import ServeError
from scripts.serving.server import MODEL_REPOSITORY, TritonServer
from tests import language_models
from tests.reply import Reply

PROMPT = "What does itertools.chain do?"
PARAPHRASE = "what does itertools.chain do"
NEAR_MISS = "What does itertools.count do?"
NAMES = [
    "itertools.chain",
    "os.path.join",
    "json.dumps",
    "heapq.merge",
    "re.sub",
    "zlib.crc32",
    "bisect.insort",
    "shutil.rmtree",
    "math.gcd",
    "statistics.median",
    "textwrap.dedent",
    "random.choice",
    "fractions.Fraction",
    "base64.b64encode",
    "calendar.isleap",
    "collections.Counter",
    "threading.Lock",
    "socket.gethostbyname",
    "hashlib.new",
    "operator.itemgetter",
    "struct.pack",
    "subprocess.run",
    "tempfile.mkdtemp",
    "urllib.parse.quote",
    "functools.partial",
]
QUESTIONS = [UNSEEN[number % len(UNSEEN)].format(n=NAMES[number % len(NAMES)]) for number in range(50)]
TIMEOUT_S = 30.0

Parameter = str | int | float | bool


@pytest.fixture
def tenant(request: pytest.FixtureRequest) -> str:
    """A tenant that no other test uses."""
    return str(request.node.name)


def post(server: TritonServer, path: str, body: bytes) -> tuple[int, str, str]:
    """Do what curl does; return status, content type and body."""
    connection = http.client.HTTPConnection(server.http_url, timeout=TIMEOUT_S)
    try:
        connection.request("POST", f"/v2/models/{path}", body)
        response = connection.getresponse()
        return response.status, response.headers["Content-Type"], response.read().decode()
    finally:
        connection.close()


def ask(server: TritonServer, prompt: str, model: str = "generate", **parameters: Parameter) -> Reply:
    status, _, body = post(server, f"{model}/generate", json.dumps({"text_input": prompt, **parameters}).encode())
    answer = json.loads(body)
    assert status == 200, answer
    return Reply(answer["text_output"], json.loads(answer["info"]))


def decode(server: TritonServer, prompt: str, **parameters: Parameter) -> Reply:
    return ask(server, prompt, cache="off", **parameters)


def stream_http(server: TritonServer, prompt: str, **parameters: Parameter) -> list[tuple[str, str]]:
    """Return text and info of every server-sent event."""
    body = json.dumps({"text_input": prompt, "stream": True, **parameters}).encode()
    status, content_type, events = post(server, "generate/generate_stream", body)
    assert (status, content_type.split(";")[0]) == (200, "text/event-stream")
    answers = [json.loads(event.removeprefix("data: ")) for event in events.split("\n\n") if event]
    return [(answer["text_output"], answer["info"]) for answer in answers]


def tensor(name: str, value: bytes | bool) -> tritonclient.grpc.InferInput:
    kind = "BOOL" if isinstance(value, bool) else "BYTES"
    described = tritonclient.grpc.InferInput(name, [1, 1], kind)
    described.set_data_from_numpy(np.array([[value]], bool if isinstance(value, bool) else np.object_))
    return described


def stream_grpc(
    server: TritonServer, inputs: list[tritonclient.grpc.InferInput], model: str, **parameters: Parameter
) -> list[tuple[str, str]]:
    """Return text and info of every response. Raises InferenceServerException when the server sends an error."""
    results: queue.Queue[Any] = queue.Queue()
    answers: list[tuple[str, str]] = []
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: results.put(error or result))
        client.async_stream_infer(model, inputs, parameters=parameters)
        while not (answers and answers[-1][1]):
            result = results.get(timeout=TIMEOUT_S)
            if isinstance(result, Exception):
                raise result
            text, info = (result.as_numpy(name).item().decode() for name in ("text_output", "info"))
            answers.append((text, info))
    return answers


def cached_answer(server: TritonServer, prompt: str, tenant: str) -> str:
    """Ask the cache alone."""
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        inputs = [tensor("text_input", prompt.encode())]
        result = client.infer("semantic_cache", inputs, parameters={"tenant": tenant})
        answer: bytes = result.as_numpy("cached_output").item()
        return answer.decode()


def metric(server: TritonServer, name: str) -> float:
    host, _, port = server.metrics_url.removeprefix("http://").rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=TIMEOUT_S)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def eventually(condition: Callable[[], bool], seconds: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def ask_until_cached(server: TritonServer, prompt: str, **parameters: Parameter) -> Reply:
    """Ask until the answer, which is stored after it is sent, comes from the cache."""
    replies = [ask(server, prompt, **parameters)]

    def cached() -> bool:
        replies.append(ask(server, prompt, **parameters))
        return replies[-1].source != "decoded"

    eventually(cached)
    return replies[-1]


def test_a_miss_is_decoded_speculatively_and_then_hit_exactly(server: TritonServer, tenant: str) -> None:
    miss = ask(server, PROMPT, tenant=tenant, max_tokens=48)
    assert miss.source == "decoded"
    assert 0 < miss.info["acceptance_rate"] <= 1
    assert 0 < miss.info["tokens"] <= 48 and miss.info["finish_reason"] in ("stop", "length")
    assert {"queue", "prefill", "decode"} <= miss.info["milliseconds"].keys()
    hit = ask_until_cached(server, PROMPT, tenant=tenant, max_tokens=48)
    assert (hit.source, hit.text) == ("exact", miss.text)
    assert (hit.info["acceptance_rate"], hit.info["tokens"]) == (None, miss.info["tokens"])


def test_the_answer_is_the_documented_one(server: TritonServer) -> None:
    text = decode(server, PROMPT).text
    assert text.startswith("Return a chain object whose .__next__() method returns elements from the first iterable")


def test_a_paraphrase_is_a_hit_and_a_near_miss_is_not(server: TritonServer, tenant: str) -> None:
    first = ask_until_cached(server, PROMPT, tenant=tenant)
    paraphrase = ask(server, PARAPHRASE, tenant=tenant)
    assert (paraphrase.source, paraphrase.text) == ("semantic", first.text)
    assert 0.95 <= paraphrase.info["similarity"] < 1
    other = ask(server, NEAR_MISS, tenant=tenant)
    assert other.source == "decoded" and other.text != first.text
    assert 0.5 < other.info["similarity"] < 0.95


def test_off_neither_writes_nor_reads_and_refresh_writes_without_reading(server: TritonServer, tenant: str) -> None:
    assert ask(server, PROMPT, tenant=tenant, cache="off").source == "decoded"
    ask_until_cached(server, NEAR_MISS, tenant=tenant)  # answers are stored in order: PROMPT's would be there now
    assert cached_answer(server, PROMPT, tenant) == "" != cached_answer(server, NEAR_MISS, tenant)
    assert ask(server, PROMPT, tenant=tenant, cache="refresh").source == "decoded"
    ask_until_cached(server, QUESTIONS[3], tenant=tenant)
    assert ask(server, PROMPT, tenant=tenant).source == "exact"
    assert ask(server, PROMPT, tenant=tenant, cache="off").source == "decoded"
    assert ask(server, PROMPT, tenant=tenant, cache="refresh").source == "decoded"


def test_tenants_do_not_see_each_others_answers(server: TritonServer, tenant: str) -> None:
    ask_until_cached(server, PROMPT, tenant=f"{tenant} a")
    assert ask(server, PROMPT, tenant=f"{tenant} b").source == "decoded"
    assert ask(server, PARAPHRASE, tenant=f"{tenant} c").source == "decoded"


def test_32_clients_at_once_get_the_answers_of_one_at_a_time(server: TritonServer) -> None:
    asked = [(question, 1 + 13 * number % 60) for number, question in enumerate(QUESTIONS[:32])]

    def one(request: tuple[str, int]) -> Reply:
        return decode(server, request[0], max_tokens=request[1])

    alone = [one(request) for request in asked]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(one, asked))
    assert [reply.text for reply in together] == [reply.text for reply in alone]
    assert [reply.info["tokens"] for reply in together] == [reply.info["tokens"] for reply in alone]
    assert len({reply.text for reply in alone}) > 16


def test_speculative_output_equals_plain_output_for_50_prompts(server: TritonServer) -> None:
    assert len(set(QUESTIONS)) == 50
    with ThreadPoolExecutor(4) as pool:
        plain = list(pool.map(lambda question: decode(server, question, speculation_length=0), QUESTIONS))
        speculative = list(pool.map(lambda question: decode(server, question), QUESTIONS))
    assert [reply.text for reply in speculative] == [reply.text for reply in plain]
    assert {reply.info["acceptance_rate"] for reply in plain} == {None}
    rates = [reply.info["acceptance_rate"] for reply in speculative]
    assert all(isinstance(rate, float) for rate in rates) and sum(rates) > 0


def test_a_stream_over_http_joins_to_the_whole_answer(server: TritonServer) -> None:
    whole = decode(server, QUESTIONS[0])
    events = stream_http(server, QUESTIONS[0], cache="off")
    assert "".join(text for text, _ in events) == whole.text
    assert len(events) > 3
    assert [bool(info) for _, info in events] == [False] * (len(events) - 1) + [True]
    assert json.loads(events[-1][1])["tokens"] == whole.info["tokens"]


def test_a_stream_over_grpc_joins_to_the_whole_answer(server: TritonServer) -> None:
    whole = decode(server, QUESTIONS[1])
    prompt = [tensor("text_input", QUESTIONS[1].encode())]
    pieces = stream_grpc(server, prompt, "generate", cache="off", stream=True)
    assert "".join(text for text, _ in pieces) == whole.text and len(pieces) > 3
    [unary] = stream_grpc(server, prompt, "generate", cache="off", stream=False)
    assert unary[0] == whole.text


def test_without_stream_there_is_exactly_one_response(server: TritonServer) -> None:
    for stream in (False, None):
        body: dict[str, Any] = {"text_input": QUESTIONS[2], "cache": "off"} | (
            {} if stream is None else {"stream": stream}
        )
        status, content_type, answer = post(server, "generate/generate", json.dumps(body).encode())
        assert (status, content_type.split(";")[0]) == (200, "application/json")
        assert json.loads(answer)["text_output"]
        assert len(stream_http(server, QUESTIONS[2], **{"cache": "off", "stream": False})) == 1


def test_a_hit_replays_as_a_stream(server: TritonServer, tenant: str) -> None:
    hit = ask_until_cached(server, PROMPT, tenant=tenant)
    replayed = stream_http(server, PROMPT, tenant=tenant)
    assert len(replayed) > 1
    assert "".join(text for text, _ in replayed) == hit.text
    assert json.loads(replayed[-1][1])["source"] == "exact" and not any(info for _, info in replayed[:-1])


def test_identical_questions_in_flight_are_decoded_once(server: TritonServer, tenant: str) -> None:
    question = "Explain to me what asyncio.Queue.join does, please."
    long: dict[str, Parameter] = {"max_tokens": 400, "ignore_eos": True, "speculation_length": 0}  # all come meanwhile
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: ask(server, question, tenant=tenant, **long), range(8)))
    assert len({reply.text for reply in replies}) == 1
    sources = [reply.source for reply in replies]
    assert sources.count("decoded") == 1 and sources.count("coalesced") > 0
    assert set(sources) <= {"decoded", "coalesced", "exact", "semantic"}


def requests_cancelled(server: TritonServer) -> float:
    return metric(server, 'speculative_decoding_requests_total{model="language_model",reason="cancelled"}')


def start_and_cancel(server: TritonServer, model: str, **parameters: Parameter) -> None:
    """Start more requests than there are slots on one gRPC stream, and cancel it once a few have begun to answer."""
    results: queue.Queue[Any] = queue.Queue()
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: results.put(error or result))
        for number, question in enumerate(QUESTIONS[:32]):
            prompt = [tensor("text_input", question.encode())]
            client.async_stream_infer(model, prompt, request_id=str(number), parameters=parameters)
        answering: set[str] = set()
        while len(answering) < 4:
            result = results.get(timeout=TIMEOUT_S)
            assert not isinstance(result, Exception), result
            answering.add(result.get_response().id)
        client.stop_stream(cancel_requests=True)


def check_slots(server: TritonServer, question: str, expected: str) -> None:
    """Fill all slots and the queue with requests that are answered, and see them empty."""
    with ThreadPoolExecutor(16) as pool:
        assert {reply.text for reply in pool.map(decode, [server] * 16, [question] * 16)} == {expected}
    eventually(lambda: metric(server, "speculative_decoding_running_sequences") == 0)
    eventually(lambda: metric(server, "speculative_decoding_waiting_sequences") == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_cancelled_stream_frees_its_slots_before_the_answers_are_done(server: TritonServer, stream: bool) -> None:
    expected = decode(server, PROMPT).text
    cancelled = requests_cancelled(server)
    start_and_cancel(server, "language_model", stream=stream)
    eventually(lambda: requests_cancelled(server) - cancelled >= 4)
    check_slots(server, PROMPT, expected)


def test_after_a_cancelled_stream_of_the_ensemble_its_slots_come_free(server: TritonServer) -> None:
    """Triton looks for a cancellation between steps only (core #263), so that the answers are decoded to their end."""
    expected = decode(server, PROMPT).text
    start_and_cancel(server, "generate", cache="off", stream=True)
    check_slots(server, PROMPT, expected)


def is_alive(server: TritonServer) -> bool:
    return decode(server, PROMPT, max_tokens=4).info["tokens"] == 4


def takes_requests(server: TritonServer) -> bool:
    """Whether a request is answered now: it is not while the queue is full."""
    body = json.dumps({"text_input": PROMPT, "max_tokens": 4, "cache": "off"}).encode()
    return post(server, "generate/generate", body)[0] == 200


@pytest.mark.parametrize(
    ("prompt", "parameters", "message"),
    [
        ("", {}, "text_input is ''"),
        ("x" * 1_000_000, {}, "text_input is 1000000 bytes long; it must be at most 65536"),
        ("word " * 600, {}, "tokens; it may have at most"),
        (PROMPT, {"max_tokens": -1}, "max_tokens is -1; it must be an integer of at least 1"),
        (PROMPT, {"max_tokens": "ten"}, "max_tokens is 'ten'; it must be an integer of at least 1"),
        (PROMPT, {"max_tokens": 0}, "max_tokens is 0; it must be an integer of at least 1"),
        (PROMPT, {"max_tokens": True}, "max_tokens is True; it must be an integer of at least 1"),
        (PROMPT, {"speculation_length": 17}, "speculation_length is 17; it must be an integer from 0 to 16"),
        (PROMPT, {"stream": "yes"}, "stream is 'yes'; it must be true or false"),
        (PROMPT, {"max_token": 5}, "unknown parameter 'max_token'; known are"),
        (PROMPT, {"cache": "maybe"}, "cache is 'maybe'; it must be one of on, off, refresh"),
        (PROMPT, {"tenant": 7}, "tenant is 7; it must be a string"),
    ],
)
@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
def test_a_bad_request_is_refused_with_its_field_and_the_server_goes_on(
    server: TritonServer, endpoint: str, prompt: str, parameters: dict[str, Parameter], message: str
) -> None:
    body = json.dumps({"text_input": prompt, **parameters}).encode()
    status, _, answer = post(server, f"generate/{endpoint}", body)
    assert status == 400
    assert message in json.loads(answer.removeprefix("data: "))["error"]
    assert is_alive(server)


def wrong_type() -> tritonclient.grpc.InferInput:
    described = tritonclient.grpc.InferInput("text_input", [1, 1], "INT64")
    described.set_data_from_numpy(np.array([[5]], np.int64))
    return described


def wrong_shape() -> tritonclient.grpc.InferInput:
    described = tritonclient.grpc.InferInput("text_input", [1, 2], "BYTES")
    described.set_data_from_numpy(np.array([[b"a", b"b"]], np.object_))
    return described


@pytest.mark.parametrize("model", ["generate", "language_model"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tensor("text_input", b"abc\xff"), "text_input .*valid UTF-8"),
        (lambda: tensor("text_input", b""), "text_input is"),
        (wrong_type, "text_input"),
        (wrong_shape, "text_input"),
        (lambda: tensor("prompt", b"x"), "prompt|text_input"),
    ],
    ids=["invalid UTF-8", "empty", "INT64", "two elements", "unknown input"],
)
def test_a_bad_tensor_is_refused_with_its_name_and_the_server_goes_on(
    server: TritonServer, model: str, make: Callable[[], tritonclient.grpc.InferInput], message: str
) -> None:
    with pytest.raises(InferenceServerException, match=message):
        stream_grpc(server, [make()], model)
    assert is_alive(server)


def test_the_language_model_alone_takes_the_inputs_of_vllms_backend(server: TritonServer) -> None:
    expected = decode(server, PROMPT, max_tokens=12)
    sampling = tensor("sampling_parameters", b'{"max_tokens": 12}')
    inputs = [tensor("text_input", PROMPT.encode()), tensor("stream", True), sampling]
    pieces = stream_grpc(server, inputs, "language_model")
    assert "".join(text for text, _ in pieces) == expected.text and len(pieces) > 1
    inputs[1] = tensor("stream", False)
    [(text, info)] = stream_grpc(server, inputs, "language_model")
    assert (text, json.loads(info)["tokens"]) == (expected.text, 12)
    direct = ask(server, PROMPT, "language_model", stream=False, sampling_parameters='{"max_tokens": 12}')
    assert (direct.text, direct.source) == (expected.text, "decoded")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "sampling_parameters",
            b"{max_tokens: 5}",
            "sampling_parameters is '{max_tokens: 5}'; it must be a JSON object",
        ),
        ("sampling_parameters", b"[1]", "sampling_parameters is .*; it must be a JSON object"),
        ("sampling_parameters", b'[["max_tokens", 5]]', "sampling_parameters is .*; it must be a JSON object"),
        ("sampling_parameters", b"null", "sampling_parameters is .*; it must be a JSON object"),
        ("sampling_parameters", b"\xff", "sampling_parameters is not valid UTF-8"),
        ("sampling_parameters", b'{"max_tokens": "ten"}', "max_tokens is 'ten'; it must be an integer of at least 1"),
        ("sampling_parameters", b'{"max_token": 5}', "unknown parameter 'max_token'"),
        ("cache_info", b"no JSON", "cache_info is 'no JSON'; it must be a JSON object"),
        ("cache_info", b'{"milliseconds": 5}', "cache_info"),
        ("cache_info", b"[]", r"cache_info is '\[\]'; it must be a JSON object"),
        ("cached_output", b"\xff", "cached_output is not valid UTF-8"),
    ],
)
def test_the_language_model_alone_refuses_bad_inputs_by_name_and_goes_on(
    server: TritonServer, name: str, value: bytes, message: str
) -> None:
    with pytest.raises(InferenceServerException, match=message):
        stream_grpc(server, [tensor("text_input", PROMPT.encode()), tensor(name, value)], "language_model")
    assert is_alive(server)


def test_the_language_model_alone_refuses_a_prompt_longer_than_its_context(server: TritonServer) -> None:
    for prompt in (b"x" * 1_000_000, b"word " * 600):
        with pytest.raises(InferenceServerException, match=r"text_input has .*(the context holds|it may have at most)"):
            stream_grpc(server, [tensor("text_input", prompt)], "language_model")
    assert is_alive(server)


def test_a_prompt_that_fills_the_context_is_answered_to_its_end(server: TritonServer) -> None:
    one, two = (decode(server, "+" * 100 * count, max_tokens=1).info["prompt_tokens"] for count in (1, 2))
    assert two > one
    context = 511  # the model's 512 but for the place that attention's padding needs
    longest = max(count for count in range(100, 3000) if one + (two - one) * (count - 100) / 100 <= context - 20)
    reply = decode(server, "+" * longest, max_tokens=128)
    assert reply.info["finish_reason"] == "stop" or reply.info["prompt_tokens"] + reply.info["tokens"] == context


def test_answers_survive_a_restart_of_the_server(tmp_path: Path) -> None:
    with TritonServer(state_dir=tmp_path) as server:
        first = ask_until_cached(server, PROMPT)
    with TritonServer(state_dir=tmp_path) as server:
        exact, paraphrase = ask(server, PROMPT), ask(server, PARAPHRASE)
    assert [exact.source, paraphrase.source] == ["exact", "semantic"]
    assert exact.text == paraphrase.text == first.text


@pytest.fixture
def mismatched(tmp_path: Path) -> Iterator[Path]:
    """A repository whose draft has another vocabulary than its target."""
    source, model = MODEL_REPOSITORY / "language_model", tmp_path / "repository" / "language_model"
    for role in ("target", "draft"):
        shutil.copytree(source / "1" / "target", model / "1" / role)
    shutil.copy2(source / "config.pbtxt", model)
    language_models.tokenizer().save_pretrained(model / "1" / "draft")
    yield model.parent


def test_a_draft_of_another_vocabulary_is_a_load_error_that_says_so(mismatched: Path, tmp_path: Path) -> None:
    with pytest.raises(ServeError, match=r"the draft's vocabulary differs from the target's in .*target's tokenizer"):
        TritonServer(mismatched, state_dir=tmp_path / "state").start()


def test_a_seed_gives_the_same_sample_with_any_drafter_and_without_one_another(server: TritonServer) -> None:
    sampled = {"temperature": 0.9, "top_p": 0.95}
    plain = [decode(server, question, speculation_length=0, seed=3, **sampled) for question in QUESTIONS[:6]]
    for drafter in ("auto", "model", "prompt_lookup", "none"):
        replies = [decode(server, question, drafter=drafter, seed=3, **sampled) for question in QUESTIONS[:6]]
        assert [reply.text for reply in replies] == [reply.text for reply in plain]
    assert {reply.info["seed"] for reply in plain} == {3}
    creative = {"temperature": 5.0, "max_tokens": 8}
    drawn = {decode(server, PROMPT, **creative).info["seed"] for _ in range(3)}
    assert len(drawn) == 3
    by_rejection = decode(server, PROMPT, acceptance="rejection", seed=3, **sampled)
    assert by_rejection.text == decode(server, PROMPT, acceptance="rejection", seed=3, **sampled).text


@pytest.mark.parametrize("endpoint", ["generate", "language_model"])
def test_a_stop_string_ends_the_answer_before_it_in_a_stream_too(server: TritonServer, endpoint: str) -> None:
    whole = decode(server, PROMPT)
    cut = whole.text.index("elements") + 3
    stop = whole.text[cut - 2 : cut + 9]
    expected = whole.text[: whole.text.index(stop)]
    parameters: dict[str, Parameter] = {"stop": json.dumps(["nowhere", stop]), "cache": "off"}
    for stream in (False, True):
        pieces = stream_grpc(server, [tensor("text_input", PROMPT.encode())], endpoint, stream=stream, **parameters)
        assert "".join(text for text, _ in pieces) == expected
        info = json.loads(pieces[-1][1])
        assert info["finish_reason"] == "stop" and info["tokens"] < whole.info["tokens"]


def test_lengths_penalties_and_biases_do_what_they_say(server: TritonServer) -> None:
    plain = decode(server, PROMPT)
    assert plain.info["finish_reason"] == "stop"
    longer = decode(server, PROMPT, min_tokens=plain.info["tokens"] + 5)
    assert longer.text.startswith(plain.text) and longer.info["tokens"] >= plain.info["tokens"] + 5
    endless = decode(server, PROMPT, ignore_eos=True, max_tokens=100)
    assert (endless.info["finish_reason"], endless.info["tokens"]) == ("length", 100)
    first = json.loads(post_infer(server, PROMPT, return_logprobs=True)["logprobs"])[0]
    [token] = first
    banned = decode(server, PROMPT, logit_bias=json.dumps({token: -100}))
    assert banned.text[:3] != plain.text[:3]
    stopped = decode(server, PROMPT, stop_token_ids=f"[{token}]")
    assert (stopped.text, stopped.info["finish_reason"], stopped.info["tokens"]) == ("", "stop", 0)
    penalized = decode(server, PROMPT, repetition_penalty=1.8, max_tokens=60)
    assert penalized.text != plain.text


def post_infer(server: TritonServer, prompt: str, model: str = "language_model", **fields: Any) -> dict[str, Any]:
    status, _, body = post(server, f"{model}/generate", json.dumps({"text_input": prompt, **fields}).encode())
    answer: dict[str, Any] = json.loads(body)
    assert status == 200, answer
    return answer


def test_what_vllms_backend_can_return_is_returned_when_asked_for(server: TritonServer) -> None:
    plain = post_infer(server, PROMPT)
    assert plain.keys() == {"model_name", "model_version", "text_output", "info"}
    wanted = ("finish_reason", "num_input_tokens", "num_output_tokens", "logprobs", "cumulative_logprob")
    full = post_infer(
        server,
        PROMPT,
        sampling_parameters='{"logprobs": 5}',
        exclude_input_in_output=False,
        **{f"return_{name}": True for name in wanted},
    )
    info = json.loads(full["info"])
    assert full["text_output"] == PROMPT + plain["text_output"]
    assert (full["finish_reason"], full["num_input_tokens"], full["num_output_tokens"]) == (
        info["finish_reason"],
        info["prompt_tokens"],
        info["tokens"],
    )
    logprobs = json.loads(full["logprobs"])
    assert logprobs == info["logprobs"] and len(logprobs) == info["tokens"]
    assert all(len(position) == 5 for position in logprobs), "greedily chosen tokens are among the five likeliest"
    assert "".join(next(iter(position.values()))["decoded_token"] for position in logprobs) == plain["text_output"]
    total = sum(next(iter(position.values()))["logprob"] for position in logprobs)
    assert full["cumulative_logprob"] == pytest.approx(total, abs=1e-3)


def test_several_answers_are_those_of_seeds_one_after_another_and_come_back_from_the_cache(
    server: TritonServer, tenant: str
) -> None:
    sampled: dict[str, Parameter] = {"temperature": 2.0, "max_tokens": 12}
    alone = [decode(server, PROMPT, seed=seed, **sampled).text for seed in (5, 6, 7)]
    assert len(set(alone)) == 3
    together = ask(server, PROMPT, tenant=tenant, n=3, seed=5, **sampled)
    assert together.text == alone
    assert together.info["finish_reason"] == ["length"] * 3 and together.info["tokens"] == 36
    assert ask_until_cached(server, PROMPT, tenant=tenant, n=3, seed=5, **sampled).text == alone
    assert ask(server, PROMPT, tenant=tenant, n=2, seed=5, **sampled).source == "decoded"
    direct = post_infer(
        server, PROMPT, sampling_parameters=json.dumps({**sampled, "n": 2, "seed": 6}), return_num_output_tokens=True
    )
    assert (direct["text_output"], direct["num_output_tokens"]) == (alone[1:], [12, 12])


def test_a_chat_is_rendered_by_the_models_template_and_cached_by_all_of_it(server: TritonServer, tenant: str) -> None:
    chat = [{"role": "user", "content": PROMPT}]
    expected = decode(server, PROMPT)
    answered = ask(server, "", tenant=tenant, messages=json.dumps(chat))
    assert (answered.text, answered.info["prompt_tokens"]) == (expected.text, expected.info["prompt_tokens"])
    assert ask_until_cached(server, "", tenant=tenant, messages=json.dumps(chat)).text == expected.text
    longer = [{"role": "user", "content": NEAR_MISS}, {"role": "assistant", "content": "No."}, *chat]
    other = ask(server, "", tenant=tenant, messages=json.dumps(longer))
    assert other.source == "decoded" and other.info["prompt_tokens"] > expected.info["prompt_tokens"]
    direct = ask(server, "", "language_model", sampling_parameters=json.dumps({"messages": chat}))
    assert direct.text == expected.text


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"temperature": -1}, "temperature is -1; it must be a number from 0 to 100"),
        ({"top_p": 0}, "top_p is 0; it must be a number above 0 and at most 1"),
        ({"logit_bias": '{"4096": 1}'}, "logit_bias is .* token ids from 0 to 4095"),
        ({"stop": '[""]'}, "stop is .*; it must be a string, or a JSON list"),
        ({"n": 2, "stream": True}, "n is 2; it must be 1 with stream"),
        ({"drafter": "best"}, "drafter is 'best'; it must be one of auto, model, prompt_lookup, none"),
        ({"acceptance": "loose"}, "acceptance is 'loose'; it must be one of exact, rejection"),
        ({"priority": 4}, "priority is 4; it must be an integer from 0 to 3"),
        ({"messages": "hi", "text_input": ""}, "messages is 'hi'; it must be a JSON list"),
        ({"messages": '[{"role": "user", "content": "x"}]'}, "text_input and messages are both given"),
        ({"messages": '[{"role": "king", "content": "x"}]', "text_input": ""}, "messages is .* role .one of system"),
    ],
)
def test_a_bad_option_is_refused_with_its_field(
    server: TritonServer, parameters: dict[str, Parameter], message: str
) -> None:
    body = json.dumps({"text_input": PROMPT, "cache": "off", **parameters}).encode()
    status, _, answer = post(server, "generate/generate_stream", body)
    assert status == 400 and re.search(message, json.loads(answer.removeprefix("data: "))["error"])


@pytest.mark.parametrize("model", ["generate", "language_model"])
def test_a_timeout_ends_decoding_with_an_error_that_names_it(server: TritonServer, model: str) -> None:
    before = metric(server, 'speculative_decoding_requests_total{model="language_model",reason="timeout"}')
    fields = {"text_input": PROMPT, "cache": "off", "ignore_eos": True, "max_tokens": 400, "timeout": 20_000}
    status, _, body = post(server, f"{model}/generate", json.dumps(fields).encode())
    assert (status, "timeout of 20000 microseconds" in json.loads(body)["error"]) == (400, True), body
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        errors: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: errors.put(error))
        inputs = [tensor("text_input", PROMPT.encode())]
        parameters = {"cache": "off", "ignore_eos": True, "max_tokens": 400}
        client.async_stream_infer("language_model", inputs, parameters=parameters, timeout=20_000)
        assert "timeout of 20000 microseconds" in str(errors.get(timeout=TIMEOUT_S))
    after = 'speculative_decoding_requests_total{model="language_model",reason="timeout"}'
    eventually(lambda: metric(server, after) == before + 2)


def test_what_the_engine_did_is_on_the_metrics_port(server: TritonServer) -> None:
    name = "speculative_decoding_{}{{".format
    counters = ["drafts_total", "draft_tokens_total", "accepted_tokens_total", "rounds_total", "output_tokens_total"]
    before = {counter: metric(server, name(counter)) for counter in counters}
    tokens = sum(decode(server, question, drafter="model").info["tokens"] for question in QUESTIONS[:8])
    eventually(lambda: metric(server, name("output_tokens_total")) >= before["output_tokens_total"] + tokens)
    after = {counter: metric(server, name(counter)) for counter in counters}
    assert all(after[counter] > before[counter] for counter in counters)
    assert metric(server, name("drafts_by_length_total")) == after["drafts_total"]
    assert metric(server, name("accepted_tokens_by_position_total")) == after["accepted_tokens_total"]
    gaps = metric(server, name("inter_token_latency_seconds_count"))
    assert gaps > 0
    assert metric(server, name("inter_token_latency_seconds_bucket") + 'le="+Inf"') == gaps
    assert metric(server, name("rows_independent")) == 1
    eventually(lambda: metric(server, name("kv_bytes_used")) == 0)


def start_endless(client: tritonclient.grpc.InferenceServerClient, count: int, tokens: int, priority: int) -> None:
    """Ask for so many answers of so many tokens on a stream that has been started."""
    sampling = {"ignore_eos": True, "max_tokens": tokens, "priority": priority, "speculation_length": 0}
    inputs = [tensor("text_input", PROMPT.encode()), tensor("sampling_parameters", json.dumps(sampling).encode())]
    for _ in range(count):
        client.async_stream_infer("language_model", inputs)


def test_a_full_queue_refuses_at_once_and_its_slots_come_free(server: TritonServer) -> None:
    results: queue.Queue[Any] = queue.Queue()
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: results.put(error or result))
        start_endless(client, 8 + 256 + 10, 400, priority=2)
        refusal = results.get(timeout=TIMEOUT_S)
        assert "256 requests are waiting already; try again later" in str(refusal)
        client.stop_stream(cancel_requests=True)
    eventually(lambda: takes_requests(server))
    eventually(lambda: metric(server, "speculative_decoding_running_sequences") == 0)


def test_a_request_of_a_lower_level_overtakes_those_that_wait(server: TritonServer) -> None:
    results: queue.Queue[Any] = queue.Queue()
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: results.put(error or result))
        start_endless(client, 64, 60, priority=3)  # eight times as many as there are slots: some still wait by then
        eventually(lambda: metric(server, "speculative_decoding_waiting_sequences") > 0 or not results.empty())
        urgent = decode(server, PROMPT, priority=1, max_tokens=2).info["milliseconds"]["queue"]
        others = [results.get(timeout=TIMEOUT_S) for _ in range(64)]
        client.stop_stream()
    waits = [json.loads(one.as_numpy("info").item())["milliseconds"]["queue"] for one in others]
    assert urgent < max(waits)
