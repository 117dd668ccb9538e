"""Operators: what they may see and do, and that nobody else may."""

import json
from pathlib import Path

import pytest
from semantic_cache.admin import Admin
from semantic_cache.key import Parameter
from semantic_cache.request import InvalidRequest

from tests.unit.test_semantic_cache_flow import KEYS, POLICY, Bench

TOKEN = "a secret token"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "store.sqlite")


def admin(bench: Bench, token: str = TOKEN) -> Admin:
    return Admin(POLICY, KEYS, bench.store, bench.cache, bench.clock, token)


def run(bench: Bench, command: str, text: str = "", **parameters: Parameter) -> str:
    return admin(bench).run(command, text.encode(), {"admin_token": TOKEN, **parameters})


@pytest.mark.parametrize(
    ("token", "given", "message"),
    [
        ("", {"admin_token": ""}, "set the environment variable SEMANTIC_CACHE_ADMIN_TOKEN"),
        (TOKEN, {}, "admin_token is not the token"),
        (TOKEN, {"admin_token": "a secret toke"}, "admin_token is not the token"),
        (TOKEN, {"admin_token": True}, "admin_token is not the token"),
    ],
)
def test_without_the_token_nothing_is_done(bench: Bench, token: str, given: dict[str, Parameter], message: str) -> None:
    bench.fill("a b", "x")
    for command in ("stats", "get", "invalidate", "export", "import"):
        with pytest.raises(InvalidRequest, match=message):
            admin(bench, token).run(command, b"a b", {"tenant": "default", **given})
    assert bench.look_up("a b").source == "exact"


def test_an_unknown_command_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidRequest, match="admin is 'key'; it must be one of stats, get"):
        run(bench, "key")


def test_stats_and_get(bench: Bench) -> None:
    bench.fill("a b", "x", tenant="t", max_tokens=5)
    stats = json.loads(run(bench, "stats"))
    assert stats["entries"] == 1 and stats["bytes"] > 0
    got = json.loads(run(bench, "get", "a b", tenant="t", max_tokens=5))
    assert got["found"]["answer"] == "x"
    assert json.loads(run(bench, "get", "a b", tenant="u", max_tokens=5))["found"] is None


def test_invalidation_by_prompt_key_tag_tenant_and_model(bench: Bench) -> None:
    def fill() -> None:
        for tenant in ("t", "u"):
            bench.fill("a b", "x", tenant=tenant, cache_tags="docs")
            bench.fill("c d", "y", tenant=tenant)

    fill()
    key = json.loads(run(bench, "get", "a b", tenant="t"))["key"]
    asked: list[tuple[str, dict[str, Parameter], int]] = [
        ("a b", {"tenant": "t"}, 1),
        ("", {"key": key}, 1),
        ("", {"tag": "docs"}, 2),
        ("", {"tag": "docs", "tenant": "u"}, 1),
        ("", {"tenant": "t"}, 2),
        ("", {"model": "language_model:1"}, 4),
        ("", {"model": "language_model:2"}, 0),
    ]
    for text, parameters, count in asked:
        fill()
        assert json.loads(run(bench, "invalidate", text, **parameters)) == {"invalidated": count}
    with pytest.raises(InvalidRequest, match="give a key, a tag, a tenant or a model"):
        run(bench, "invalidate")
    with pytest.raises(InvalidRequest, match="key is 'xyz'; it must be hexadecimal digits"):
        run(bench, "invalidate", key="xyz")


def test_what_is_exported_can_be_imported_elsewhere(bench: Bench, tmp_path: Path) -> None:
    for number in range(5):
        bench.fill(f"a {number}", f"answer {number}", cache_tags="docs")
    lines = run(bench, "export", limit=3).splitlines()
    last = json.loads(lines[-1])["key"]["exact"]
    lines += run(bench, "export", after=last, limit=3).splitlines()
    assert len(lines) == 5
    other = Bench(tmp_path / "other.sqlite")
    assert json.loads(run(other, "import", "\n".join(lines))) == {"imported": 5}
    assert other.look_up("a 3").answer == "answer 3"
    assert other.look_up("3 a").source == "semantic"
    assert json.loads(run(other, "invalidate", tag="docs")) == {"invalidated": 5}


@pytest.mark.parametrize("line", ["{}", "[1]", "null", "x", '{"key": {"partition": "00", "exact": "00"}}'])
def test_a_line_that_is_no_entry_is_refused_by_its_number(bench: Bench, line: str) -> None:
    bench.fill("a b", "x")
    good = run(bench, "export")
    with pytest.raises(InvalidRequest, match="line 2 of text_input"):
        run(bench, "import", f"{good}\n{line}")
