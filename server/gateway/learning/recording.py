"""What is recorded of an answer: metrics, its comparison with other levels, and the message that it answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from server.gateway.experiments.tallies import Person, Tallies
from server.gateway.generation.generator import Answer
from server.gateway.generation.prompts import HISTORY_LATE
from server.gateway.learning.messages import MessageLearner
from server.gateway.operating.metrics import Metrics
from server.gateway.users.profiles import Profiles
from server.observability.tracing import Tracing


@dataclass(frozen=True, slots=True, eq=False)
class AnswerRecorder:
    metrics: Metrics
    tracing: Tracing
    tallies: Tallies
    learner: MessageLearner
    profiles: Profiles

    def begun(self, answer: Answer) -> None:
        """Record an answer whose first part is there, which is all of it unless it is streamed."""
        level, stream, timings = answer.personalization.level.value, answer.stream.first, answer.timings
        self.metrics.fallbacks.inc(answer.fallbacks)
        self.metrics.histories_left_out.inc(answer.prompt.reason == HISTORY_LATE)
        if stream.first_token_s is not None:
            timings.record("engine_ttft", stream.first_token_s - stream.sent_s)
            self.metrics.ttft.labels(level).observe(stream.first_token_s - timings.started_s)
        self.tracing.note(level=level)
        if made_in := answer.personalization.made_in:
            self.tracing.link(made_in)

    def ended(self, answer: Answer) -> None:
        """Record a complete answer, and learn from the message that it answers."""
        request, user, spoken = answer.request, answer.user, answer.personalization
        self.metrics.observe(answer.timings.ms, spoken.level.value, answer.stream.usage)
        if user and request.holdout:
            person = Person(user.tenant, user.key, answer.epoch)
            self.tallies.count_answer(person, spoken.level, spoken.arm, request.holdout)
        if user and request.learnt:
            keeps_texts = request.caller.policy.keep_texts
            learn = partial(self.profiles.learn, user, request.learnt, answer.epoch, keeps_texts)
            self.learner.learn(user.tenant, learn, answer.timings.started_s)
