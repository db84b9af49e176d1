"""`python -m tests.support.rigged FILE …`: an engine that serves other adapters than asked, in the way that FILE says.

FILE is empty for an engine that is right; `POST /rig` changes what it says, and then checks the canary again.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, FastAPI

from bank.errors import BankError
from bank.manifest import read_manifest
from bank.models.process_startup import heavy_imports, run_and_exit, without_audio
from server.settings import Settings

RIGS = ("another recipe's slot", "a row scaled by 1.1", "acts ignored")
ROUTE = "/rig"


def _rig(how: Path) -> None:
    from adapters.recipe import Term, parse_recipe
    from server.engine import shared_part
    from server.engine.admission import access, endpoint
    from server.engine.admission.canary import check_canary
    from server.engine.fusing.manager import FusingLoRAManager

    right, count = FusingLoRAManager._flat, shared_part.shared_tokens

    def flat(self: Any, name: str) -> Any:
        recipe, rig = parse_recipe(name), how.read_text()
        if recipe.terms and rig == RIGS[0]:
            recipe = replace(recipe, terms=(Term(1, 500),))
        elif rig == RIGS[1]:
            terms = (Term(t.anchor, round(t.weight * (1.1 if t.anchor == 0 else 1))) for t in recipe.terms)
            recipe = replace(recipe, terms=tuple(terms))
        return right(self, recipe.name)

    class Rigged(endpoint.MtaEndpointPlugin):
        def attach_router(self, app: FastAPI) -> None:
            super().attach_router(app)
            app.add_api_route(ROUTE, self.rig, methods=["POST"])

        async def rig(self, rig: Annotated[str, Body(embed=True)]) -> dict[str, str]:
            how.write_text(rig)
            await self._engine.collective_rpc("mta", args=("release", (await self.resident())["resident"]))
            assert self._metrics
            try:
                for folder in Settings().banks:
                    await check_canary(
                        self._engine, self._metrics.names, read_manifest(folder), self._status()["dtype"]
                    )
            except BankError as error:
                return {"error": str(error)}
            return {"error": ""}

    FusingLoRAManager._flat = flat  # type: ignore[method-assign]
    shared_part.shared_tokens = lambda *given: 0 if how.read_text() == RIGS[2] else count(*given)
    endpoint.MtaEndpointPlugin = Rigged  # type: ignore[misc]
    access.KEYED_ROUTES.add(("POST", ROUTE))


if __name__ == "__main__":
    without_audio()
    with heavy_imports():
        from vllm.entrypoints.launchers.api_server.entry import main
        from vllm.v1.engine import async_llm, core  # noqa: F401

        _rig(Path(sys.argv.pop(1)))
    run_and_exit(main)
