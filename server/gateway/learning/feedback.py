"""Feedback on answers: it is counted, and a text that the person sent instead of an answer teaches."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, replace

from rapidfuzz.distance import Levenshtein

from bank.items.profile import parse_item
from server.errors import InvalidRequest
from server.gateway.access.keys import Caller
from server.gateway.experiments.tallies import Person, Tallies
from server.gateway.generation.answer_ids import AnswerNote
from server.gateway.learning.refreshing import Refreshing
from server.gateway.users.profiles import Profiles, check_size
from server.store.feedback import Feedback, FeedbackStore, Outcome
from server.store.jobs import Job
from server.store.samples import Sample, encode_sample
from server.store.tenants.holdings import Held
from server.store.tenants.user_key import User

_MAX_COMPARED = 1 << 26  # product of two texts' lengths whose distance takes 2 ms, during which no request is served


@dataclass(frozen=True, slots=True)
class Final:
    sample: Sample  # what the person really sent, and to what
    answer: str | None  # the answer's own text, if the client still has it
    answer_sha256: str | None  # else its hash, 64 hex digits


@dataclass
class Feedbacks:
    store: FeedbackStore
    profiles: Profiles
    refreshing: Refreshing
    tallies: Tallies

    async def give(
        self, user: User, note: AnswerNote, said: Feedback, final: Final | None, epoch: str, *, caller: Caller
    ) -> tuple[Feedback, bool, Job | None]:
        """Store what a client says; feedback on the same answer adds to the earlier one and replaces what both say.

        A final text that differs from the answer becomes an item of the user's history and, if texts are kept, a
        sample, each under the answer's id; after some samples the user is adapted again, as a job of `caller`. Returns
        all that is known about the answer by now, whether this call brought a text, and the job that it brought. Raises
        InvalidRequest if the parts contradict each other, and UserErased as `Profiles.learn` does.
        """
        sample = None
        if final:
            changed, sample = await asyncio.to_thread(_difference, final)
            if said.outcome is Outcome.SENT and sample:
                raise InvalidRequest("outcome is sent, but final differs from the answer: send edited", param="outcome")
            said = replace(said, outcome=said.outcome or (Outcome.EDITED if sample else Outcome.SENT), changed=changed)
        wanted = Held(bytes=160 + (len(encode_sample(sample)) if sample else 0))  # about what the store takes

        async def store(user: User) -> tuple[Feedback, bool, Job | None]:
            kept = None
            with self.profiles.quotas.admit(user, lambda: wanted):
                if sample:
                    said_to = {"input": sample.messages[-1]["content"], "output": sample.output}
                    item = parse_item({"id": note.request_id} | said_to, self.profiles.task, 0)
                    update = await self.profiles.learn(user, item, epoch, caller.policy.keep_texts)
                    kept = sample if update.profile.keeps_texts else None
                new, before = await self.store.add(user.key, note.request_id, said, kept, epoch)
            person = Person(user.tenant, user.key, epoch)
            self.tallies.count_feedback(person, note.hour, note.level, note.arm, now=new, before=before)
            job = await self.refreshing.refresh_if_due(user, caller, epoch) if kept else None
            return new, sample is not None, job

        return await self.profiles.rotation.at(user, store)


def _difference(final: Final) -> tuple[float | None, Sample | None]:
    """Return the share of the answer that was changed, and the sample if anything was.

    The share is the edit distance over the longer length, both in characters, of long texts in words; None if only a
    hash is known.
    """
    sample = final.sample
    check_size("final", encode_sample(sample), sample.output, named="final with its input")
    if final.answer is not None:
        before, after = final.answer.strip(), sample.output.strip()
        is_long = len(before) * len(after) > _MAX_COMPARED
        compared = (before.split(), after.split()) if is_long else (before, after)
        fraction = Levenshtein.normalized_distance(*compared)
        return round(fraction, 4), sample if before != after else None
    hashes = {hashlib.sha256(text.encode()).hexdigest() for text in (sample.output, sample.output.strip())}
    return (0.0, None) if final.answer_sha256 in hashes else (None, sample)
