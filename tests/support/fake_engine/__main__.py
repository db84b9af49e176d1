"""The fake engine on its own: `python -m tests.support.fake_engine --port 8001 --bank FOLDER`."""

from __future__ import annotations

import argparse
from pathlib import Path

from aiohttp import web

from bank.manifest import read_manifest
from tests.support.fake_engine.knobs import Knobs
from tests.support.fake_engine.server import FakeEngine


def main() -> None:
    """Serve in the foreground."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--bank", type=Path, required=True, help="folder of the bank that it pretends to serve")
    parser.add_argument("--token-delay-ms", type=float, default=0)
    options = parser.parse_args()
    manifest = read_manifest(options.bank)
    knobs = Knobs((manifest.fingerprint,), len(manifest.anchors), manifest.method)
    knobs.token_delay_s, knobs.context = options.token_delay_ms / 1000, 8192
    engine = FakeEngine(knobs, port=options.port)
    web.run_app(engine.application(), host="127.0.0.1", port=options.port, print=None, handler_cancellation=True)


if __name__ == "__main__":
    main()
