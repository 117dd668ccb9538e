"""Between the engine's slots and the key/value cache: what admission finds there, and what is left for others."""

from collections.abc import Hashable
from collections.abc import Sequence as Tokens
from dataclasses import asdict

from speculative_decoding.decoder import Decoder
from speculative_decoding.drafter import Drafter, ModelDrafter
from speculative_decoding.kv_cache import KVCache
from speculative_decoding.kv_layout import BlockLayout
from speculative_decoding.kv_metrics import KVCacheCounters, KVCacheMetrics
from speculative_decoding.language_model import LanguageModel
from speculative_decoding.paged_model import PagedModel
from speculative_decoding.prefix_cache import PrefixCache
from speculative_decoding.reuse_settings import ReuseSettings
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
    """The same for paged models, which share blocks: target and draft each by itself. A PrefixCache of both."""

    def __init__(self, target: PagedModel, draft: PagedModel | None) -> None:
        self._models = [target, draft] if draft else [target]

    def admit(self, slot: int, sequence: Sequence) -> None:
        """Give a slot to a sequence, with the blocks that begin as its prompt does."""
        for model in self._models:
            model.reuse(slot, sequence.options.tenant, sequence.prompt)
        sequence.reused = int(self._models[0].lengths[slot])

    def keep(self, slot: int, sequence: Sequence) -> None:
        """Keep what a slot has of a sequence's committed tokens, but the last: it may not have been fed yet."""
        for model in self._models:
            seen = min(int(model.lengths[slot]), len(sequence.tokens) - 1)
            model.keep(slot, sequence.options.tenant, sequence.tokens[:seen])

    def pin(self, owner: Hashable, tenant: str, tokens: Tokens[int], ttl_s: float) -> int:
        """See PrefixCache: the target's tokens count."""
        pinned, *_ = [model.prefixes.pin(owner, tenant, tokens, ttl_s) for model in self._models]
        return pinned

    def unpin(self, owner: Hashable) -> None:
        """Let go what `owner` pinned, if anything."""
        for model in self._models:
            model.prefixes.unpin(owner)

    def snapshot(self) -> KVCacheMetrics:
        """Return what the models hold and have done together; tokens are the target's."""
        each = [asdict(model.prefixes.snapshot()) for model in self._models]
        counters = [one.pop("counters") for one in each]
        total = {name: sum(one[name] for one in counters) for name in counters[0]}
        total |= {name: counters[0][name] for name in ("tokens_reused", "tokens_computed")}
        return KVCacheMetrics(KVCacheCounters(**total), **{name: sum(one[name] for one in each) for name in each[0]})

    def check_integrity(self) -> None:
        """Raise IntegrityError when blocks, places or pins do not add up."""
        for model in self._models:
            model.prefixes.check_integrity()


def prefix_reuse(cache: PrefixCache | None, target: Decoder, drafter: Drafter | None) -> PrefixReuse | PagedReuse:
    """Return what fills slots from a cache, which for paged models is in the models themselves."""
    if isinstance(target, PagedModel):
        return _paged_reuse(target, drafter.model if isinstance(drafter, ModelDrafter) else None)
    assert isinstance(target, LanguageModel)
    assert cache is None or isinstance(cache, KVCache)
    return PrefixReuse(cache, target, drafter)


def open_prefix_cache(target: Decoder, draft: Decoder | None, settings: ReuseSettings, name: str) -> PrefixCache | None:
    """Return the cache of the model `name`, of these two, None where settings ask for none.

    Raises ValueError when no block fits, or OSError.
    """
    if isinstance(target, PagedModel):
        return _paged_reuse(target, draft)
    chosen = settings.kv_cache(name)
    if chosen is None:
        return None
    return KVCache(BlockLayout(target.shape.key_values, draft.shape.key_values if draft else None), chosen)


def _paged_reuse(target: PagedModel, draft: Decoder | None) -> PagedReuse:
    return PagedReuse(target, draft if isinstance(draft, PagedModel) else None)
