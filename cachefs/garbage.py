"""Python's search for garbage in cycles, which must not look again and again at all that stays.

A full collection looks at every object: some 20 for each known file, a quarter of a second for 100,000 files, in which nobody is
answered; and one comes with each quarter that is added. So what has survived one is set aside for good (gc.freeze), and the next
looks at what came since. The price is that a cycle of long-lived objects is never found. Whoever lets go of those takes them
apart: see `FileSystem.drop`. What dies young is found as ever.
"""

import gc

THRESHOLDS = (700, 10, 4)  # new objects; collections of those; of both: 28,000 objects or 10 ms in a full one


def look_once() -> None:
    """From now on, in this process."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    if _set_aside not in gc.callbacks:
        gc.callbacks.append(_set_aside)


def _set_aside(phase: str, info: dict[str, int]) -> None:
    if phase == "stop" and info["generation"] == 2:
        gc.freeze()
