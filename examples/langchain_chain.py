"""A LangChain chain whose model answers each user in their own manner.

pip install langchain-openai
MTA_URL=http://localhost:8000 python langchain_chain.py rosa "a picnic by the river"
"""

from __future__ import annotations

import os
import sys

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable
from langchain_openai import ChatOpenAI

PROMPT = ChatPromptTemplate.from_messages(
    [("system", "You write short invitations."), ("user", "Invite a friend to {what}.")]
)


def chain_for(user_id: str, url: str, key: str = "unused") -> Runnable[dict[str, str], str]:
    """Return the chain of one user: all that is personal is the field `user`."""
    model = ChatOpenAI(
        model="mta", base_url=f"{url}/v1", api_key=key, temperature=0, max_tokens=60, model_kwargs={"user": user_id}
    )
    return PROMPT | model | StrOutputParser()


def main() -> None:
    user_id, what = sys.argv[1:]
    url, key = os.environ.get("MTA_URL", "http://localhost:8000"), os.environ.get("MTA_KEY", "unused")
    for piece in chain_for(user_id, url, key).stream({"what": what}):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
