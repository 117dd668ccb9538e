"""From a setting to a store."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from semantic_cache.partition_index import GraphIndex, MakeIndex
from semantic_cache.store import Store, StoreError
from semantic_cache.stores.sqlite import SqliteStore

STORE_NAME = "semantic_cache.sqlite"
INDEXES_NAME = "semantic_cache.indexes"
STATE_VARIABLE = "INFERENCE_STATE_DIR"
STORE_VARIABLE = "SEMANTIC_CACHE_STORE"
SECRET_VARIABLE = "SEMANTIC_CACHE_SECRET"


class Opened(NamedTuple):
    """A store, the secret that ids in it are derived with, and whether it is beyond a network."""

    store: Store
    secret: bytes
    is_remote: bool


def open_store(setting: str, environment: Mapping[str, str] = os.environ, make_index: MakeIndex = GraphIndex) -> Opened:
    """Open what SEMANTIC_CACHE_STORE names, else the parameter `store`, else a file in INFERENCE_STATE_DIR.

    The secret is the store's own, or SEMANTIC_CACHE_SECRET (64 hexadecimal digits), with which an export can be taken
    to another store. Raises RuntimeError and ValueError saying what is wrong.
    """
    place = environment.get(STORE_VARIABLE) or setting
    if not place:
        if STATE_VARIABLE not in environment:
            raise ValueError(
                "the semantic cache has nowhere to store answers: set its parameter store to a file or to a "
                f"postgresql:// URL, or the environment variable {STATE_VARIABLE} to a folder"
            )
        place = str(Path(environment[STATE_VARIABLE], STORE_NAME))
    is_remote = "://" in place
    try:
        store = _open(place, environment.get(STATE_VARIABLE), make_index)
        secret = _secret(environment) or store.secret()
    except (OSError, StoreError) as error:
        raise RuntimeError(f"the semantic cache cannot open its store {_without_password(place)}: {error}") from error
    return Opened(store, secret, is_remote)


def _open(place: str, state_dir: str | None, make_index: MakeIndex) -> Store:
    if place.startswith(("postgresql://", "postgres://")):
        from semantic_cache.stores.postgres import PostgresStore  # its driver is installed where it is used

        return PostgresStore(place, Path(state_dir, INDEXES_NAME) if state_dir else None, make_index)
    if place.startswith(("https://", "http://")):
        from semantic_cache.stores.cosmos import CosmosStore

        return CosmosStore(place)
    if "://" in place:
        scheme = place.partition("://")[0]
        raise ValueError(f"parameter store begins with {scheme}://; it must be a file, postgresql:// or https://")
    return SqliteStore(Path(place), make_index)


def _secret(environment: Mapping[str, str]) -> bytes | None:
    text = environment.get(SECRET_VARIABLE)
    if not text:
        return None
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) != 32:
        raise ValueError(f"the environment variable {SECRET_VARIABLE} is no secret; it must be 64 hexadecimal digits")
    return secret


def _without_password(place: str) -> str:
    scheme, separator, rest = place.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
