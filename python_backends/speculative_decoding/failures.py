"""Exceptions as Triton's errors."""

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton_python_backend_utils as pb_utils

from speculative_decoding.options import GenerationOptions
from speculative_decoding.scheduler import QueueFullError
from speculative_decoding.sequence import FinishReason
from speculative_decoding.session_locks import SessionBusyError
from speculative_decoding.session_store import SessionConflictError, TooManySessionsError
from speculative_decoding.sessions import InvalidSessionError
from speculative_decoding.triton_tensors import send_error
from speculative_decoding.validation import InvalidOptionError

FAILURES = {  # messages, and Triton's names of errors, which it defines after this is imported
    "cancelled": ("the request was cancelled", "CANCELLED"),
    "timeout": ("the request's timeout of {timeout} microseconds is over", "UNAVAILABLE"),
    "error": ("decoding failed; the server's log says why", "INTERNAL"),
}
logger = logging.getLogger(__name__)
INVALID = (InvalidOptionError, InvalidSessionError)
UNAVAILABLE = (QueueFullError, SessionBusyError, SessionConflictError, TooManySessionsError)


@contextmanager
def errors_to(sender: Any) -> Iterator[None]:
    """Send what is raised within as the last response, with the status that fits; log what nobody expected."""
    try:
        yield
    except INVALID as error:
        send_error(sender, str(error), pb_utils.TritonError.INVALID_ARG)
    except UNAVAILABLE as error:
        send_error(sender, str(error), pb_utils.TritonError.UNAVAILABLE)
    except sqlite3.Error as error:
        logger.exception("a session could not be read or kept")
        send_error(sender, f"sessions cannot be read or kept now: {error}", pb_utils.TritonError.UNAVAILABLE)
    except Exception as error:
        logger.exception("a request failed")
        send_error(sender, f"the request failed: {type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)


def send_failure(sender: Any, reason: FinishReason, options: GenerationOptions) -> None:
    """Send that a request with these options ended without an answer."""
    message, code = FAILURES[reason]
    send_error(sender, message.format(timeout=options.timeout), getattr(pb_utils.TritonError, code))
