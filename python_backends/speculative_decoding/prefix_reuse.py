"""Between the engine's slots and the key/value cache: what admission finds there, and what is left for others."""

from speculative_decoding.decoder import Decoder
from speculative_decoding.drafter import Drafter, ModelDrafter
from speculative_decoding.kv_cache import KVCache
from speculative_decoding.kv_layout import BlockLayout
from speculative_decoding.kv_memory import KVCacheSettings
from speculative_decoding.language_model import LanguageModel
from speculative_decoding.paged_model import PagedModel
from speculative_decoding.sequence import Sequence


class PrefixReuse:
    """Fills slots from a cache and the cache from slots; without a cache every prompt is computed."""

    def __init__(self, cache: KVCache | None, target: LanguageModel, drafter: Drafter | None) -> None:
        self._cache = cache
        self._target = target
        self._drafter = drafter

    def admit(self, slot: int, sequence: Sequence) -> None:
        """Give a slot to a sequence, with as much of its prompt's keys and values as the cache has."""
        self._target.truncate(slot, 0)
        if self._drafter:
            self._drafter.commit(slot, 0)
        if self._cache is None:
            return
        prefix = self._cache.match(sequence.options.tenant, sequence.prompt)
        try:
            draft = self._drafter.slot(slot) if self._drafter else None
            self._cache.copy_into(prefix, self._target.slot(slot), draft)
        finally:
            self._cache.release(prefix)
        self._target.resume(slot, prefix.tokens)
        if self._drafter:
            self._drafter.resume(slot, prefix.draft_tokens)
        sequence.reused = prefix.tokens

    def keep(self, slot: int, sequence: Sequence) -> None:
        """Have the cache store what a slot has of a sequence's committed tokens.

        Never of the last token: where it was not fed yet, the slot may have a rejected draft's keys and values there.
        """
        if self._cache is None:
            return
        certain = len(sequence.tokens) - 1
        seen = min(int(self._target.lengths[slot]), certain)
        drafted = min(self._drafter.seen(slot), seen) if self._drafter else 0
        draft = self._drafter.slot(slot) if self._drafter else None
        self._cache.insert(sequence.options.tenant, sequence.tokens[:seen], self._target.slot(slot), draft, drafted)


class PagedReuse:
    """The same for paged models, which share blocks: target and draft each by itself."""

    def __init__(self, target: PagedModel, draft: PagedModel | None) -> None:
        self._target = target
        self._draft = draft

    def admit(self, slot: int, sequence: Sequence) -> None:
        """Give a slot to a sequence, with the blocks that begin as its prompt does."""
        for model in self._models():
            model.reuse(slot, sequence.options.tenant, sequence.prompt)
        sequence.reused = int(self._target.lengths[slot])

    def keep(self, slot: int, sequence: Sequence) -> None:
        """Keep what a slot has of a sequence's committed tokens, but the last: it may not have been fed yet."""
        for model in self._models():
            seen = min(int(model.lengths[slot]), len(sequence.tokens) - 1)
            model.keep(slot, sequence.options.tenant, sequence.tokens[:seen])

    def _models(self) -> list[PagedModel]:
        return [self._target, self._draft] if self._draft else [self._target]


def prefix_reuse(cache: KVCache | None, target: Decoder, drafter: Drafter | None) -> PrefixReuse | PagedReuse:
    """Return what fills slots from a cache, or from the models themselves where they are paged."""
    if isinstance(target, LanguageModel):
        return PrefixReuse(cache, target, drafter)
    assert isinstance(target, PagedModel)
    draft = drafter.model if isinstance(drafter, ModelDrafter) else None
    return PagedReuse(target, draft if isinstance(draft, PagedModel) else None)


def open_kv_cache(target: Decoder, draft: Decoder | None, settings: KVCacheSettings | None) -> KVCache | None:
    """Return a cache for these models, None without settings. Raises ValueError when no block fits, or OSError."""
    if settings is None:
        return None
    return KVCache(BlockLayout(target.shape.key_values, draft.shape.key_values if draft else None), settings)
