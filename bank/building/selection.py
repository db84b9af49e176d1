"""Choose the anchors (the longest history in each k-means cluster of embeddings) and the people held out of a bank."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from bank.items.histories import History
from bank.items.profile import Item, Vectors, item_text, profile_embedding
from bank.items.tasks import Task
from bank.lookup.embedder import Embedder
from bank.lookup.prior import allowed_answers

MIN_ITEMS = 11  # minimum trainable items of an anchor candidate; the paper requires more than ten
QUERIES, KNOWN = 3, 6  # per held-out person: number of last items used as queries; minimum items before them
MIN_HELD_OUT, MAX_HELD_OUT = 6, 16  # fewer people give no significant result; a bank needs the others for training
PEOPLE_PER_HELD_OUT = 4  # one person of this many is held out
SAMPLED_ITEMS = 64  # items embedded per candidate, precise enough for clustering; thousands may have hundreds each
SERVED_ITEMS = 512  # newest items that count in a profile: the default of `MTA_PROFILE_ITEMS`


def spread(items: Sequence[Item], limit: int = SAMPLED_ITEMS) -> list[Item]:
    """Return at most `limit` items, evenly spaced over the history, including the first and the last."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def mean_embedding(items: Sequence[Item], task: Task, embedder: Embedder) -> Vectors:
    """Return the profile embedding [E] of a person with these items."""
    return profile_embedding(embedder.embed([item_text(item, task) for item in items]))


def person_embedding(history: History, task: Task, embedder: Embedder) -> Vectors:
    """Return the embedding [E] of one person, equal to the gateway's mean over a profile of the same items.

    Anchors need all items: on headlines the mean of 64 sampled items has a cosine of 0.96 to 0.98 with the mean of all
    400, and two different people have 0.88 to 0.96.
    """
    return mean_embedding(history.items[-SERVED_ITEMS:], task, embedder)


def held_out_people(people: Sequence[History], task: Task, needed: int) -> list[History]:
    """Choose the people with the shortest sufficient histories, while `needed` candidates remain; nobody if too few."""
    lengths = {person.user_id: len(person.pairs(task)) for person in people}
    enough = [p for p in people if len(p.items) == lengths[p.user_id] >= QUERIES + KNOWN and _can_query(p, task)]
    spare = sum(length >= MIN_ITEMS for length in lengths.values()) - needed
    wanted, chosen = min(MAX_HELD_OUT, len(people) // PEOPLE_PER_HELD_OUT), list[History]()
    for person in sorted(enough, key=lambda person: lengths[person.user_id])[:wanted]:
        if lengths[person.user_id] >= MIN_ITEMS:
            spare -= 1
        if spare >= 0:
            chosen.append(person)
    return chosen if len(chosen) >= MIN_HELD_OUT else []


def _can_query(person: History, task: Task) -> bool:
    """Whether the task allows the person's last answers; the histogram of answers has no share for others."""
    allowed = allowed_answers(task)
    return not allowed or all(answer in allowed for _, answer in person.pairs(task)[-QUERIES:])


def select_anchors(embeddings: Vectors | None, lengths: Sequence[int], count: int, seed: int) -> list[int]:
    """Choose exactly `count` people who differ and have long histories; return their positions in ascending order.

    `embeddings` is [P, E]; None selects by length alone. An empty cluster takes the longest history not yet chosen.
    """
    clusters = [0] * len(lengths) if embeddings is None else _cluster(embeddings, count, seed)
    by_length = sorted(range(len(lengths)), key=lambda person: (-lengths[person], person))
    chosen: dict[int, int] = {}
    for person in by_length:
        chosen.setdefault(int(clusters[person]), person)
    rest = [person for person in by_length if person not in chosen.values()]
    return sorted([*chosen.values(), *rest[: count - len(chosen)]])


def _cluster(embeddings: Vectors, count: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # One thread: several threads sum in varying order, and the same seed must give the same clusters.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the caller handles fewer distinct people than clusters
        labels = KMeans(count, n_init=10, random_state=seed).fit(np.asarray(embeddings, np.float64)).labels_
    return np.asarray(labels, dtype=np.int32)
