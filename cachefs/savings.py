"""The time that programs did not wait because the cache had what they read."""


class Savings:
    """Hits times the backing's latency, as it was measured when they happened: tell it of both every second or so."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._hits = 0

    def account(self, hits: int, latency_seconds: float) -> None:
        """`hits` read requests have been answered from memory so far; each has saved a call to the backing."""
        self.seconds += (hits - self._hits) * latency_seconds
        self._hits = hits
