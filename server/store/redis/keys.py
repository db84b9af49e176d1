"""The names of all keys. The part in braces decides the cluster slot, and a script can only change keys of one slot:
so all keys of a user share a slot, and so do all keys of a queue.

Of one user (`server/store/tenants/user_key.py`)::

    key                       type    what                                                expiry
    mta:{<user key>}:profile  string  the record (`server/store/profile_record.py`)       -
    mta:{<user key>}:items    hash    item id → JSON                                      -
    mta:{<user key>}:vectors  hash    item id → embedder id and fp16 embedding            -
    mta:{<user key>}:samples  list    encoded samples, the oldest first                   -
    mta:{<user key>}:adapter  hash    id, recipe, sha256, raw                             - (if lent: as asked)
    mta:{<user key>}:jobs     hash    `last` → number of the newest job                   -
    mta:{<user key>}:job:<n>  hash    a job's record (`server/store/redis/jobs.py`)       7 days after it ended, or 20
                                                                                          jobs later
    mta:{<user key>}:epoch    hash    tombstone: the `epoch` it began, and what the       7 days after the user
                                      erasure removed                                     was erased; 10 minutes
                                                                                          if there was none

Of one queue, `jobs:<bank>` or `sign:<bank>`; neither these nor those below expire::

    mta:{<queue>}:calls       stream  user keys; read by a consumer group, entries go when acknowledged
    mta:{<queue>}:called      hash    user key → its entry in the stream: one call per user at a time
    mta:{<queue>}:open        zset    user key → when to check whether it is still going on, ms
    mta:{<queue>}:listed      zset    user key → when a request last announced work for them, ms
    mta:{<queue>}:begun       hash    user key → how often a worker has begun, and not ended

Of all users::

    mta:adapted               set     banks that users were queued for, or user adapters trained on
    mta:adapted:<bank>        set     keys of the users whose adapter was
    mta:{rewrite}             hash    when the file is rewritten (`servers/append_only_file.py`)
    mta:{rewrite}:<server>    hash    the same, of each server of several
    mta:{access}:keys         hash    API keys: SHA-256 → JSON, `revoked:<SHA-256>` → ms, `revision`; `bank:<tenant>`
    mta:{access}:ring         string  the random id of that hash, apart from it since earlier versions read all of it

Of limits (`server/store/redis/access/rates.py`); an owner is `key-`, `user-` or `tenant-` and its name::

    mta:rates:{<owner>}:<what>  string  how much is used, and when that was so, µs         after a window at most
    mta:held:running/<owner>  zset    requests in progress → until when, ms               after the last lease
    mta:held:gateways/<engines>  zset  gateways before the same engines → the same        after the last lease

From version 0.1, until a worker or a gateway takes them over::

    mta:jobs, mta:sign        stream  a queue for all banks
    mta:jobs:open             zset    job id → when to check, ms
    mta:sign:open             zset    user key → the same
    mta:{rewrite}:due         string  when the append-only file is rewritten

Scripts are passed these names. Only a job record's is built in Lua, from `job_prefix` and a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from server.store.jobs import JobId

Work = Literal["jobs", "sign"]

BANKS = "mta:adapted"
REWRITE = "mta:{rewrite}"
OLD_REWRITE = f"{REWRITE}:due"
ACCESS_KEYS = "mta:{access}:keys"
ACCESS_RING = "mta:{access}:ring"


def profile(user_key: str) -> str:
    return _of_user(user_key, "profile")


def items(user_key: str) -> str:
    return _of_user(user_key, "items")


def vectors(user_key: str) -> str:
    return _of_user(user_key, "vectors")


def samples(user_key: str) -> str:
    return _of_user(user_key, "samples")


def adapter(user_key: str) -> str:
    return _of_user(user_key, "adapter")


def jobs(user_key: str) -> str:
    return _of_user(user_key, "jobs")


def job_prefix(user_key: str) -> str:
    return _of_user(user_key, "job:")


def job(job_id: JobId) -> str:
    return f"{job_prefix(job_id.user_key)}{job_id.number}"


def epoch(user_key: str) -> str:
    return _of_user(user_key, "epoch")


def rewrite(server: str) -> str:
    """Of a server's file, by the server's id; empty if it is the only one."""
    return f"{REWRITE}:{server}" if server else REWRITE


def adapted(bank: str) -> str:
    return f"{BANKS}:{bank}"


def rate(owner: str, what: str) -> str:
    """All of an owner's are in one slot."""
    return f"mta:rates:{{{owner}}}:{what}"


def held(name: str) -> str:
    return f"mta:held:{name}"


@dataclass(frozen=True, slots=True)
class QueueKeys:
    """The keys of one queue; `old` and `old_open` are version 0.1's for the same work."""

    calls: str
    called: str
    open: str
    listed: str
    begun: str
    old: str
    old_open: str


def queue(work: Work, bank: str) -> QueueKeys:
    prefix = f"mta:{{{work}:{bank}}}:"
    return QueueKeys(
        calls=f"{prefix}calls",
        called=f"{prefix}called",
        open=f"{prefix}open",
        listed=f"{prefix}listed",
        begun=f"{prefix}begun",
        old=f"mta:{work}",
        old_open=f"mta:{work}:open",
    )


def _of_user(user_key: str, what: str) -> str:
    return f"mta:{{{user_key}}}:{what}"
