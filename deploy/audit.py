"""Write an SBOM (CycloneDX) of each image and look up known vulnerabilities (pip-audit), both from `deploy/locks`.

If no index of vulnerabilities answers, the report says that no package was checked.
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
LOCKS = ROOT / "deploy/locks"
IMAGES = ("gateway", "engine-cpu", "engine-gpu")
AUDIT_S = 900


def main(
    out: Annotated[
        Path | None,
        typer.Option(help="Write the figures as JSON, and the SBOMs beside it.", show_default="SBOMs in out/sbom"),
    ] = None,
) -> None:
    """List every package of the images, and look each up among known vulnerabilities."""
    folder = out.parent if out else Path("out/sbom")
    folder.mkdir(parents=True, exist_ok=True)
    packages, rows = [], []
    for image in IMAGES:
        sbom, lock = folder / f"{image}.cdx.json", str(LOCKS / f"{image}.txt")
        project = ("--pyproject", str(ROOT / "pyproject.toml"), "--output-reproducible", "--no-validate")
        _run("cyclonedx_py", "requirements", *project, "--of", "JSON", "-o", str(sbom), lock)
        rows.append((f"components in the SBOM of {image}", len(json.loads(sbom.read_text("utf-8"))["components"])))
        how = ("--disable-pip", "--no-deps", "--progress-spinner", "off", "-f", "json")
        packages += json.loads(_run("pip_audit", *how, "-r", lock, allowed=(0, 1)) or "{}").get("dependencies", [])
    report("the packages of the images", [*rows, *judged(packages)], out)


def judged(packages: list[dict[str, Any]]) -> list[tuple[str, object]]:
    """Return pip-audit's findings as rows; pip-audit itself calls packages clean if it could look up nothing."""
    unique = {(package["name"], package.get("version")): package for package in packages}
    audited = [package for package in unique.values() if "skip_reason" not in package]
    vulnerable = [
        f"{package['name']} {package['version']} ({', '.join(one['id'] for one in package['vulns'])})"
        for package in audited
        if package["vulns"]
    ]
    clean = "none" if audited and len(audited) == len(unique) else "none in those" if audited else "not checked"
    return [
        ("packages looked up", f"{len(audited)} of {len(unique)}" if audited else "none: no index answers"),
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
