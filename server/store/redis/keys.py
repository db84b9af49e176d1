"""Names of all Redis keys. All keys of a script must be in one cluster slot, which the part in braces decides.

Per user (`server/store/tenants/user_key.py`)::

    key                         type    what                                                expiry
    mta:{<user key>}:profile    string  the record (`server/store/profile_record.py`)       -
    mta:{<user key>}:items      hash    item id → JSON                                      - (not kept: a day)
    mta:{<user key>}:vectors    hash    item id → embedder id and fp16 embedding            -
    mta:{<user key>}:samples    list    encoded samples, oldest first                       - (not kept: a day)
    mta:{<user key>}:feedback   hash    answer → time and feedback (`store/feedback.py`)    - (no profile: 3 weeks)
    mta:{<user key>}:learned    hash    answer → encoded sample that feedback brought       -
    mta:{<user key>}:tally      hash    week, level, arm → counts (`server/store/tallies.py`)     3 weeks
    mta:{<user key>}:adapter    hash    id, recipe, sha256, raw; of each kept version `facts:<n>`, -
                                        `raw:<n>` unless it serves; `chosen_ms` (`store/adapters.py`)
    mta:{<user key>}:jobs       hash    `last` → number of the newest job                   -
    mta:{<user key>}:job:<n>    hash    a job's record (`server/store/jobs.py`)             20 jobs later
    mta:{<user key>}:epoch      hash    tombstone: `epoch`, and what the erasure removed;   7 days
                                        `mark` of a write to an unknown user;               an hour at least
                                        of a user who has another key now (`rotation.py`)   30 days

Per queue (`server/store/queue.py`), `jobs:<bank>` or `sign:<bank>`; these keys and the shared ones do not expire::

    mta:{<queue>}:due         zset    user key → time when the user is due, ms, or the turn for which they wait
    mta:{<queue>}:background  zset    the same, for work no user requested
    mta:{<queue>}:tries       hash    user key → number of attempts by workers
    mta:{<queue>}:turns       hash    the turn being served, and each tenant's next

Shared by all users::

    mta:adapted               set     banks that had queued users or trained user adapters
    mta:adapted:<bank>        set     keys of the users whose adapter was trained on the bank
    mta:worth                 set     `<week> <tenant>`: weeks with people whose tallies are not folded yet
    mta:worth:<week>:<tenant>  set    keys of these people                                3 weeks
    mta:worth:folded:<tenant>  hash   week, share held out, level, arm → sums; week 0: of all weeks
    mta:{rewrite}             hash    state of file rewrites (`server/store/append_only_file.py`)
    mta:{rewrite}:<server>    hash    the same, per server if there are several
    mta:{access}:keys         hash    API keys: SHA-256 → JSON, `revoked:<SHA-256>` → ms, `bank:<tenant>`,
                                      `quota:<tenant>` → JSON; `revision` and `ring` (a random id) of the whole set
    mta:{access}:changes      list    its newest 100 changes: revision before, revision after, changed field
    mta:{access}:secret       hash    `in`: keyed hash of the MTA_SECRET that keys users, `from`: of the one they leave
    mta:{access}:used         hash    SHA-256 of an API key → hour of its last use, since 1970
    mta:{restore}             string  SHA-256 of the copy whose restore has not ended (`server/store/backup/`)
    mta:copied                string  when the newest copy of the store began, s since 1970

Limits (`server/store/tenants/rates.py`); an owner is `key-`, `user-`, `tenant-` or `quota-` and its name::

    mta:rates:{<owner>}:<what>  string  amount used, time of that value, µs, and limit       ten windows at most
    mta:held:running/<owner>  zset    requests in progress → end of the lease, ms         after the last lease
    mta:held:gateways/<engines>  zset  gateways that share the engines → the same         after the last lease
    mta:held:recounted/<quotas>  zset  recount of what tenants hold → when the next is due  after the last lease
    mta:use:<tenant>          hash    user key → `<bytes> <adapters>`; sums (`holdings.py`)     7 days

Scripts receive these names as arguments. Only names of job records are built in Lua, from `job_prefix` and a number.

A copy of the store leaves out what belongs to running processes and servers (limits, rewrites, `mta:{restore}`,
`mta:copied`), and the sets of adapted users, which may be long and which a restore makes again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

Work = Literal["jobs", "sign"]

BANKS = "mta:adapted"
WORTH = "mta:worth"
REWRITE = "mta:{rewrite}"
ACCESS_KEYS = "mta:{access}:keys"
KEY_CHANGES = "mta:{access}:changes"
USED_KEYS = "mta:{access}:used"
SECRET = "mta:{access}:secret"
RESTORING = "mta:{restore}"
COPIED = "mta:copied"
_LEFT_OUT = re.compile(r"mta:(\{rewrite\}|\{restore\}|copied|rates:|held:|use:|adapted:)")
_OF_USER = re.compile(r"mta:\{([a-z2-7]{26})\}:")


def _under(prefix: str) -> Callable[[str], str]:
    return lambda name: f"{prefix}{name}"


def _of_user(what: str) -> Callable[[str], str]:
    return lambda user_key: f"mta:{{{user_key}}}:{what}"


profile, items, vectors = _of_user("profile"), _of_user("items"), _of_user("vectors")
samples, adapter, epoch = _of_user("samples"), _of_user("adapter"), _of_user("epoch")
jobs, job_prefix = _of_user("jobs"), _of_user("job:")
feedback, learned, tally = _of_user("feedback"), _of_user("learned"), _of_user("tally")
adapted = _under(f"{BANKS}:")  # by bank
folded, count = _under(f"{WORTH}:folded:"), _under("mta:use:")  # by tenant
held = _under("mta:held:")


def of_user(user_key: str) -> list[str]:
    """Return the names of all keys that a user can have, but for job records."""
    # Scripts count on the order of all but `tally`: a new kind goes beside it.
    kinds = (jobs, profile, items, vectors, samples, feedback, learned, tally, adapter, epoch)
    return [name(user_key) for name in kinds]


def user_of(name: str) -> str | None:  # the user key in a name
    match = _OF_USER.match(name)
    return match[1] if match else None


def is_copied(name: str) -> bool:  # whether a copy of the store contains the key
    return not _LEFT_OUT.match(name)


def job(user_key: str, number: int) -> str:
    return f"{job_prefix(user_key)}{number}"


def rewrite(server: str) -> str:  # by the server's id, which is empty if there is only one
    return f"{REWRITE}:{server}" if server else REWRITE


def people(week: int, tenant: str) -> str:
    return f"{WORTH}:{week}:{tenant}"


def rate(owner: str, what: str) -> str:
    return f"mta:rates:{{{owner}}}:{what}"


def queue(work: Work, bank: str) -> tuple[str, str, str, str]:  # due, background, tries, turns
    prefix = f"mta:{{{work}:{bank}}}:"
    return f"{prefix}due", f"{prefix}background", f"{prefix}tries", f"{prefix}turns"
