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
    mta:{<user key>}:job:<n>  hash    a job's record (`server/store/jobs.py`)             7 days or 20 jobs later
    mta:{<user key>}:epoch    hash    tombstone: `epoch`, and what the erasure removed    7 days (of nobody: 10 minutes)

Of one queue (`server/store/queue.py`), `jobs:<bank>` or `sign:<bank>`; neither these nor those below expire::

    mta:{<queue>}:due         zset    user key → when to look at the user, ms
    mta:{<queue>}:background  zset    the same, of what nobody asked for
    mta:{<queue>}:tries       hash    user key → how often a worker has begun with them, and not ended

Of all users::

    mta:adapted               set     banks that users were queued for, or user adapters trained on
    mta:adapted:<bank>        set     keys of the users whose adapter was
    mta:{rewrite}             hash    when the file is rewritten (`servers/append_only_file.py`)
    mta:{rewrite}:<server>    hash    the same, of each server of several
    mta:{access}:keys         hash    API keys: SHA-256 → JSON, `revoked:<SHA-256>` → ms, `bank:<tenant>`; of all:
                                      `revision`, `ring` (a random id)

Of limits (`server/store/tenants/rates.py`); an owner is `key-`, `user-` or `tenant-` and its name::

    mta:rates:{<owner>}:<what>  string  how much is used, and when that was so, µs         after a window at most
    mta:held:running/<owner>  zset    requests in progress → until when, ms               after the last lease
    mta:held:gateways/<engines>  zset  gateways before the same engines → the same        after the last lease

Scripts are passed these names. Only a job record's is built in Lua, from `job_prefix` and a number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from server.store.jobs import JobId

Work = Literal["jobs", "sign"]

BANKS = "mta:adapted"
REWRITE = "mta:{rewrite}"
ACCESS_KEYS = "mta:{access}:keys"


def _of_user(what: str) -> Callable[[str], str]:
    return lambda user_key: f"mta:{{{user_key}}}:{what}"


profile, items, vectors = _of_user("profile"), _of_user("items"), _of_user("vectors")
samples, adapter, epoch = _of_user("samples"), _of_user("adapter"), _of_user("epoch")
jobs, job_prefix = _of_user("jobs"), _of_user("job:")


def job(job_id: JobId) -> str:
    return f"{job_prefix(job_id.user_key)}{job_id.number}"


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


def queue(work: Work, bank: str) -> tuple[str, str, str]:
    """The names of one queue's keys: due, background, tries."""
    prefix = f"mta:{{{work}:{bank}}}:"
    return f"{prefix}due", f"{prefix}background", f"{prefix}tries"
