"""Who becomes an anchor (of each k-means cluster of embeddings the longest history), and who is left out of a bank."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np

from bank.items.histories import History
from bank.items.profile import Item, Vectors, item_text, profile_embedding
from bank.items.tasks import Task
from bank.lookup.embedder import Embedder
from bank.lookup.prior import answers_of

MIN_ITEMS = 11  # fewest trainable items of a candidate: the paper's have more than ten
QUERIES, KNOWN = 3, 6  # of a person left out: the last items are asked for, at least so many before them are known
FEWEST_ASIDE, MOST_ASIDE, ASIDE_OF = 6, 16, 4  # one person of 4 is left out; fewer show nothing, more would be missed
SAMPLED_ITEMS = 64  # of one candidate, to tell candidates apart; there may be thousands, with hundreds each
SERVED_ITEMS = 512  # the newest count in a profile, as many as a gateway keeps by default (`MTA_PROFILE_ITEMS`)


def spread(items: Sequence[Item], limit: int = SAMPLED_ITEMS) -> list[Item]:
    """At most `limit` items, evenly over the history, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def sampled_embedding(history: History, task: Task, embedder: Embedder) -> Vectors:
    """Roughly the embedding [E] of one person, from a sample of a long history: good enough to cluster people by."""
    return _mean(spread(history.items), task, embedder)


def person_embedding(history: History, task: Task, embedder: Embedder) -> Vectors:
    """The embedding [E] of one person, the mean that a gateway makes of a profile of the same items.

    An anchor needs all of them: on headlines a sample of 64 has a cosine of 0.96 to 0.98 with the mean of 400, and two
    people have 0.88 to 0.96 with each other.
    """
    return _mean(history.items[-SERVED_ITEMS:], task, embedder)


def _mean(items: Sequence[Item], task: Task, embedder: Embedder) -> Vectors:
    return profile_embedding(embedder.embed([item_text(item, task) for item in items]))


def left_out(people: Sequence[History], task: Task, needed: int) -> list[History]:
    """The people to measure a bank on: those with the shortest histories that suffice, whom it misses least.

    So many candidates as are `needed` stay; where there are too few people, nobody is left out.
    """
    lengths = {person.user_id: len(person.pairs(task)) for person in people}
    enough = [p for p in people if len(p.items) == lengths[p.user_id] >= QUERIES + KNOWN and _can_be_asked(p, task)]
    spare = sum(length >= MIN_ITEMS for length in lengths.values()) - needed
    wanted, chosen = min(MOST_ASIDE, len(people) // ASIDE_OF), list[History]()
    for person in sorted(enough, key=lambda person: lengths[person.user_id])[:wanted]:
        if lengths[person.user_id] >= MIN_ITEMS:
            spare -= 1
        if spare >= 0:
            chosen.append(person)
    return chosen if len(chosen) >= FEWEST_ASIDE else []


def _can_be_asked(person: History, task: Task) -> bool:
    """Whether the task has the person's last answers: what it lacks has no share in anybody's histogram."""
    allowed = answers_of(task)
    return not allowed or all(answer in allowed for _, answer in person.pairs(task)[-QUERIES:])


def select_anchors(embeddings: Vectors | None, lengths: Sequence[int], count: int, seed: int) -> list[int]:
    """Choose exactly `count` people who are unlike each other and have long histories; ascending positions.

    `embeddings` [P, E] have a row for each candidate, at unit length; None goes by the histories' lengths alone. A
    cluster that stays empty (people with equal embeddings) gives its place to the longest history not yet chosen; among
    equal lengths the earlier candidate is taken.
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

    # One thread: several add up in any order, and the same seed must give the same clusters.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct people than clusters: handled above
        labels = KMeans(count, n_init=10, random_state=seed).fit(np.asarray(embeddings, np.float64)).labels_
    return np.asarray(labels, dtype=np.int32)


def typical_words(anchors: Sequence[History], task: Task, count: int = 6) -> list[tuple[str, ...]]:
    """The words that tell an anchor from the others (tf-idf, English stop words left out), the most typical first.

    They are an anchor's own words, for people who look at a bank. A word that they used in one item alone, which may be
    a name or a number of somebody's, is never taken.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(token_pattern=r"(?u)\b[^\W\d_]{3,}\b", stop_words="english", sublinear_tf=True)
    words_of = vectorizer.build_analyzer()
    seen = [[words_of(item_text(item, task)) for item in anchor.items] for anchor in anchors]
    try:
        scores = vectorizer.fit_transform(" ".join(word for item in items for word in item) for items in seen)
    except ValueError:  # there are only stop words
        return [()] * len(anchors)
    names = vectorizer.get_feature_names_out()
    found = []
    for items, row in zip(seen, scores, strict=True):
        used_in = Counter(word for item in items for word in set(item))
        ranked = sorted(zip(-row.data, names[row.indices], strict=True))
        found.append(tuple(str(word) for _, word in ranked if used_in[word] > 1)[:count])
    return found
