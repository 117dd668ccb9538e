"""What a request asks of a session."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from speculative_decoding import validation
from speculative_decoding.sessions import MAX_ID_BYTES, MAX_TTL_S
from speculative_decoding.validation import InvalidOptionError

Operation = Literal["continue", "rewind", "fork", "close", "list"]
OPERATIONS = ("continue", "rewind", "fork", "close", "list")
NAMES = frozenset({"session_id", "session_ttl_s", "session_operation", "session_turn", "session_fork_id"})
OPERANDS = {"session_turn": "rewind", "session_fork_id": "fork"}  # and the operation that takes it


@dataclass(frozen=True)
class SessionRequest:
    """operation: continue the session `id`, rewind it to where it had `turn` turns, fork it to `fork_id`, close it, or
    list the tenant's. ttl_s: seconds that the session lives after this request.
    """

    operation: Operation
    id: str
    ttl_s: float
    turn: int = 0
    fork_id: str = ""

    @classmethod
    def parse(cls, parameters: Mapping[str, Any], ttl_s: float) -> "SessionRequest | None":
        """Read the parameters in NAMES, None when there are none of them. Raises InvalidOptionError.

        ttl_s: where the request does not say.
        """
        given = {name: parameters[name] for name in NAMES if parameters.get(name) is not None}
        if not given:
            return None
        operation = validation.choice("session_operation", given.get("session_operation", "continue"), OPERATIONS)
        _check_together(given, operation)
        identifier = validation.name("session_id", given.get("session_id", "none"), MAX_ID_BYTES)
        ttl_s = validation.number("session_ttl_s", given.get("session_ttl_s", ttl_s), 0, MAX_TTL_S, above=True)
        turn = validation.integer("session_turn", given.get("session_turn", 0), 0)
        fork_id = validation.name("session_fork_id", given.get("session_fork_id", "none"), MAX_ID_BYTES)
        return cls(cast(Operation, operation), identifier, ttl_s, turn, fork_id)


def _check_together(given: Mapping[str, Any], operation: str) -> None:
    if operation == "list" and given.keys() != {"session_operation"}:
        raise InvalidOptionError(
            f"session_operation is 'list', which takes no {min(given.keys() - {'session_operation'})}"
        )
    if operation != "list" and "session_id" not in given:
        raise InvalidOptionError(f"{min(given)} is given without session_id, which says whose it is")
    for name, taker in OPERANDS.items():
        if (name in given) != (operation == taker):
            verb = "needs" if operation == taker else "does not take"
            raise InvalidOptionError(f"session_operation is {operation!r}, which {verb} {name}")
