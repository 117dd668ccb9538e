"""A database's errors as the contract's."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from semantic_cache.store import StoreError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Function = Callable[Arguments, Result]


def translating(errors: type[Exception]) -> Callable[[Function[Arguments, Result]], Function[Arguments, Result]]:
    """Return a decorator that raises StoreError for `errors`."""

    def decorate(function: Function[Arguments, Result]) -> Function[Arguments, Result]:
        @wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            try:
                return function(*args, **kwargs)
            except errors as error:
                raise StoreError(str(error).strip()) from error

        return call

    return decorate
