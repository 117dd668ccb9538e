"""Keys: what must share one, and what must never."""

from hypothesis import given
from hypothesis import strategies as st
from semantic_cache.key import Keys, Parameter
from semantic_cache.records import Key

VALUES = st.text() | st.integers() | st.floats(allow_nan=False) | st.booleans()
KEYS = Keys(b"s" * 32, "language_model:1", ("embedder:1", "verifier"))
PARAMETERS = st.dictionaries(st.text(min_size=1), VALUES, max_size=6)


def key(prompt: str = "p", tenant: str = "t", parameters: dict[str, Parameter] | None = None) -> Key:
    return KEYS.make(prompt, tenant, parameters or {})


@given(PARAMETERS, st.randoms(use_true_random=False))
def test_the_order_of_parameters_does_not_matter(parameters: dict[str, Parameter], random) -> None:  # noqa: ANN001
    shuffled = list(parameters.items())
    random.shuffle(shuffled)
    assert key(parameters=parameters) == key(parameters=dict(shuffled))


@given(st.tuples(st.text(), st.text(), PARAMETERS), st.tuples(st.text(), st.text(), PARAMETERS))
def test_any_difference_in_prompt_tenant_or_parameters_makes_another_key(
    one: tuple[str, str, dict[str, Parameter]], other: tuple[str, str, dict[str, Parameter]]
) -> None:
    irrelevant = {"stream", "speculation_length", "drafter", "session_id", "priority", "timeout"}
    relevant = [
        {name: repr(value) for name, value in item[2].items() if name not in irrelevant} for item in (one, other)
    ]
    walls = (one[1], relevant[0]), (other[1], relevant[1])
    assert (key(*one).partition == key(*other).partition) == (walls[0] == walls[1])
    assert (key(*one).exact == key(*other).exact) == (walls[0] == walls[1] and one[0] == other[0])


@given(st.booleans(), st.integers())
def test_how_an_answer_is_sent_or_decoded_is_no_part_of_the_key(stream: bool, speculation_length: int) -> None:
    assert key(parameters={"stream": stream, "speculation_length": speculation_length, "seed": 1}) == key(
        parameters={"seed": 1}
    )


def test_model_embedder_verifier_and_secret_are_walls() -> None:
    walls = [
        Keys(secret * 32, model, (embedder, verifier))
        for secret in (b"a", b"b")
        for model in ("m:1", "m:2")
        for embedder in ("e:1", "e:2")
        for verifier in ("v", "w")
    ]
    assert len({keys.make("p", "t", {}).partition for keys in walls}) == len(walls)
    assert len({keys.tenant("t") for keys in walls}) == 2


def test_ids_of_one_thing_do_not_give_away_another() -> None:
    """Who knows a key or a tenant's id must not be able to guess a flight, which lets one listen."""
    made = key()
    assert KEYS.flight(made) not in (made.exact.hex(), made.partition.hex())
    assert KEYS.flight(made) == KEYS.flight(key()) != KEYS.flight(key("other"))
    assert KEYS.tenant("t") not in made.partition


def test_keys_do_not_change_between_releases() -> None:
    """A changed derivation would lose every stored answer."""
    found = key("What does itertools.chain do?", "default", {"max_tokens": 48})
    assert found.partition.hex()[:16] == "0bd4c0cf271d2569"
    assert found.exact.hex()[:16] == "6d222622247e67d3"
