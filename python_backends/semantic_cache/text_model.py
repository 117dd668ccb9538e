"""A text model of a Triton server, asked over HTTP for an answer in pieces.

Not by a BLS call: there Triton 2.51 drops an error that a model sends after it has begun to answer, so that a cut
answer looks whole, or waits for ever. Its HTTP endpoint passes the error on, gives fields to the inputs that a model
declares (`stream`, `max_tokens`), and tells the model when nobody wants the answer any more.
"""

import json
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection, HTTPException, HTTPResponse
from urllib.parse import quote, urlsplit

from semantic_cache.key import Parameter
from semantic_cache.request import Lookup

TIMEOUT_S = 900.0  # between two pieces; as long as an answer may take to be stored
READ_BYTES = 65536
EVENT = b"data:"


class TextModel:
    """Callable: lookup -> pieces of the model's answer. Raises RuntimeError when there is none, or no more of it."""

    def __init__(self, url: str, name: str) -> None:
        """`url`: http://host:port of the server. `name`: the model, or model/versions/number."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"parameter upstream_url is {url!r}; it must be an address such as http://127.0.0.1:8000")
        self._address = (parts.hostname, parts.port or 80)
        self._path = f"/v2/models/{quote(name)}/generate_stream"

    def __call__(self, lookup: Lookup) -> Iterator[str]:
        """Yield the answer's pieces; who stops reading cancels the request."""
        connection = HTTPConnection(*self._address, timeout=TIMEOUT_S)
        try:
            response = self._ask(connection, lookup)
            for event in _events(response):
                yield _text(event)
        except (OSError, HTTPException) as error:
            raise RuntimeError(f"{self._path}: {type(error).__name__}: {error}") from error
        finally:
            connection.close()

    def _ask(self, connection: HTTPConnection, lookup: Lookup) -> HTTPResponse:
        asked = "" if "messages" in lookup.parameters else lookup.prompt
        fields: Mapping[str, Parameter] = {**lookup.parameters, "text_input": asked}
        connection.request("POST", self._path, json.dumps(fields).encode(), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(
                f"{self._path}: HTTP {response.status}: {response.read(READ_BYTES).decode(errors='replace')}"
            )
        return response


def _events(response: HTTPResponse) -> Iterator[bytes]:
    """Yield the server-sent events; a stream that breaks off raises, as reading line by line would not."""
    waiting = b""
    while part := response.read1(READ_BYTES):
        *lines, waiting = (waiting + part).split(b"\n")
        yield from (line.removeprefix(EVENT).strip() for line in lines if line.startswith(EVENT))
    if waiting.strip():
        raise RuntimeError(f"the stream ends within an event: {waiting[:80]!r}")


def _text(event: bytes) -> str:
    """Return an event's text; several answers as a JSON list, which is how they are stored."""
    try:
        content = json.loads(event)
        if "error" not in content:
            text = content["text_output"]
            return text if isinstance(text, str) else json.dumps(text)
        message = str(content["error"])
    except (ValueError, TypeError, KeyError):
        message = f"no text_output in {event[:80]!r}"
    raise RuntimeError(message)
