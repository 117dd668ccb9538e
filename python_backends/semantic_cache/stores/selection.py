"""Which entries to delete, as SQL: fixed text, values apart."""

from semantic_cache.records import Selector


def conditions(selector: Selector, mark: str, tag_condition: str) -> tuple[str, list[object]]:
    """Return a condition and its values, `mark` standing for a value. Raises ValueError for an empty selector."""
    parts = [
        (condition, value)
        for condition, value in (
            (f"exact = {mark}", selector.exact),
            (tag_condition, selector.tag),
            (f"tenant = {mark}", selector.tenant),
            (f"model = {mark}", selector.model),
        )
        if value is not None
    ]
    if not parts:
        raise ValueError("nothing says which entries to invalidate: give a key, a tag, a tenant or a model")
    return " AND ".join(condition for condition, _ in parts), [value for _, value in parts]
