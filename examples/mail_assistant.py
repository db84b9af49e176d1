"""A mail assistant: a draft from anywhere comes back in the user's own words, with its facts checked.

It needs a server with a bank for drafts (docs/adopting/rewriting.md).

    pip install mta-server
    MTA_URL=http://localhost:8000 python mail_assistant.py rosa < draft.txt
"""

from __future__ import annotations

import os
import sys

from mta_client import Client


def written_by(mta: Client, user_id: str, draft: str) -> str:
    """Return the draft as the user would write it; asked once more if a number, a name or a link was lost."""
    made = mta.rewrite(user_id, draft, on_loss="retry")
    for fact in made.missing:
        print(f"lost, please look: {fact}", file=sys.stderr)
    return made.text


def main() -> None:
    (user_id,) = sys.argv[1:]
    with Client(os.environ.get("MTA_URL", "http://localhost:8000"), key=os.environ.get("MTA_KEY")) as mta:
        print(written_by(mta, user_id, sys.stdin.read()))


if __name__ == "__main__":
    main()
