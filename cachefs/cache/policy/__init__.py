"""Eviction policies: which resident page should go next. They know keys and masks only, never files or memory."""

from cachefs.cache.policy.base import PAGES_PER_GROUP, Evictable, Policy, Runs
from cachefs.cache.policy.lru import LRU
from cachefs.cache.policy.s3fifo import S3FIFO
from cachefs.cache.policy.sieve import Sieve

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (LRU, S3FIFO, Sieve)}


def make(name: str, capacity_pages: int) -> Policy:
    """A new policy object; raises ValueError for a name that is not in POLICIES."""
    if name not in POLICIES:
        raise ValueError(f"unknown cache policy {name!r}: choose from {', '.join(POLICIES)}")
    return POLICIES[name](capacity_pages)


__all__ = ["PAGES_PER_GROUP", "POLICIES", "Evictable", "Policy", "Runs", "make"]
