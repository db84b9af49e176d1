"""Write an SBOM (CycloneDX) of this environment, and look up known vulnerabilities (pip-audit).

If no index answers, the report says that no package was checked.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.errors import MtaError
from bench import script
from bench.page.report import report

ROOT = Path(__file__).parents[1]
AUDIT_S = 900


def main(
    out: Annotated[
        Path | None,
        typer.Option(help="Write the figures as JSON, and the SBOM beside it.", show_default="the SBOM alone, in out"),
    ] = None,
) -> None:
    """List every package of this environment, and look each up among known vulnerabilities."""
    sbom = (out or Path("out/audit.json")).with_name("sbom.cdx.json")
    sbom.parent.mkdir(parents=True, exist_ok=True)
    project = ("--pyproject", str(ROOT / "pyproject.toml"), "--output-reproducible", "--no-validate")
    _run("cyclonedx_py", "environment", *project, "--of", "JSON", "-o", str(sbom), sys.executable)
    components = json.loads(sbom.read_text("utf-8"))["components"]
    found = json.loads(_run("pip_audit", "--local", "--progress-spinner", "off", "-f", "json", allowed=(0, 1)) or "{}")
    report("the packages of this environment", [("components in the SBOM", len(components)), *judged(found)], out)


def judged(found: dict[str, Any]) -> list[tuple[str, object]]:
    """Return pip-audit's findings as rows; pip-audit itself calls an environment clean if it could look up nothing."""
    packages = found.get("dependencies", [])
    audited = [package for package in packages if "skip_reason" not in package]
    vulnerable = [
        f"{package['name']} {package['version']} ({', '.join(one['id'] for one in package['vulns'])})"
        for package in audited
        if package["vulns"]
    ]
    clean = "none" if audited and len(audited) == len(packages) else "none in those" if audited else "not checked"
    return [
        ("packages looked up", f"{len(audited)} of {len(packages)}" if audited else "none: no index answers"),
        ("known vulnerabilities", "; ".join(vulnerable) or clean),
    ]


def _run(module: str, *arguments: str, allowed: tuple[int, ...] = (0,)) -> str:
    """Run a tool and return its output; MtaError unless its status is in `allowed`."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=AUDIT_S, check=False)
    if done.returncode in allowed:
        return done.stdout
    raise MtaError(f"{module} ended with status {done.returncode}: {done.stderr.strip()[-500:]}")


if __name__ == "__main__":
    script(main)
