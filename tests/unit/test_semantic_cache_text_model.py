"""Asking a text model over HTTP: an answer is whole, or an error."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from semantic_cache.key import Keys, Parameter
from semantic_cache.policy import Policy
from semantic_cache.request import Lookup, parse_lookup
from semantic_cache.text_model import TextModel

KEYS = Keys(b"s" * 32, "m:1", ())


def lookup(prompt: str, **parameters: Parameter) -> Lookup:
    return parse_lookup(prompt.encode(), parameters, Policy(), KEYS)


def event(**content: Any) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


class Server(ThreadingHTTPServer):
    """Sends the prepared parts as chunks; without an end when it is to break off."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = 200
        self.parts: list[bytes] = []
        self.breaks_off = False
        self.asked: list[tuple[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.append((self.path, json.loads(body)))
        self.send_response(self.server.status)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for part in self.server.parts:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.flush()
        if not self.server.breaks_off:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server: Server, asked: Lookup) -> list[str]:
    return list(TextModel(f"http://127.0.0.1:{server.server_address[1]}", "a model")(asked))


def test_an_answer_comes_in_its_pieces_however_the_network_parts_them(server: Server) -> None:
    whole = event(text_output="one ") + event(text_output="two\n") + event(text_output="drei ü")
    for size in (1, 7, len(whole)):
        server.parts = [whole[at : at + size] for at in range(0, len(whole), size)]
        assert ask(server, lookup("what", max_tokens=7, stream=True)) == ["one ", "two\n", "drei ü"]
    assert server.asked[0] == (
        "/v2/models/a%20model/generate_stream",
        {"text_input": "what", "max_tokens": 7, "stream": True},
    )


def test_of_a_chat_the_messages_are_sent_and_several_answers_are_a_list(server: Server) -> None:
    messages = json.dumps([{"role": "user", "content": "what"}])
    server.parts = [event(text_output=["one", "two"])]
    assert ask(server, lookup("", messages=messages)) == ['["one", "two"]']
    assert server.asked[0][1] == {"text_input": "", "messages": messages}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([event(error="out of memory")], "out of memory"),
        ([b"data: {\n\n"], "no text_output"),
        ([b"data: [1]\n\n"], "no text_output"),
        ([event(text_output="two")[:-9]], "the stream ends within an event"),
    ],
)
def test_a_stream_that_goes_wrong_raises_after_what_came_before(
    server: Server, parts: list[bytes], message: str
) -> None:
    server.parts = [event(text_output="one"), *parts]
    port = server.server_address[1]
    pieces = iter(TextModel(f"http://127.0.0.1:{port}", "m")(lookup("what")))
    assert next(pieces) == "one"
    with pytest.raises(RuntimeError, match=message):
        list(pieces)


def test_a_connection_that_breaks_off_between_events_is_no_end(server: Server) -> None:
    server.parts, server.breaks_off = [event(text_output="one")], True
    with pytest.raises(RuntimeError, match="IncompleteRead"):
        ask(server, lookup("what"))


def test_a_refusal_and_a_server_that_is_not_there_are_errors(server: Server) -> None:
    server.status, server.parts = 400, [b'{"error": "unknown model"}']
    with pytest.raises(RuntimeError, match=r"HTTP 400.*unknown model"):
        ask(server, lookup("what"))
    with pytest.raises(RuntimeError, match="ConnectionRefusedError"):
        list(TextModel("http://127.0.0.1:1", "m")(lookup("what")))


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "https://host", "http://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="parameter upstream_url is"):
        TextModel(url, "m")
