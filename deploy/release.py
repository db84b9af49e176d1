"""Make everything that a release consists of in `out/release/VERSION`, and publish nothing: a dry run.

sdist and wheel, an SBOM of each image with what is known to be vulnerable, the images for CPUs where Docker or Podman
is installed, the site, and the notes: the version's lines of the changelog. Before that it checks that every file which
names the version agrees, that the changelog has it, and that the checkout has no other changes.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from adapters.errors import MtaError
from bench import script
from bench.page.report import report
from deploy import wheel

ROOT = Path(__file__).parents[1]
NAMES = {  # how the files beside pyproject.toml name the version
    "docs/openapi.json": r'"version": "([^"]+)"',
    "mta_client/typescript/package.json": r'"version": "([^"]+)"',
    "deploy/k8s/base/kustomization.yaml": r'newTag: "([^"]+)"',
    "deploy/k8s/overlays/cpu/kustomization.yaml": r'newTag: "([^"]+)"',
}


def main() -> None:
    """Make a release without publishing it."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    check_names(ROOT, version)
    notes = notes_of((ROOT / "CHANGELOG.md").read_text("utf-8"), version)
    if changes := _run("git", "status", "--porcelain"):
        raise MtaError(f"the checkout has changes that are not committed, so nobody could make this again:\n{changes}")
    out = ROOT / "out/release" / version
    shutil.rmtree(out, ignore_errors=True)
    built = wheel.build(out)
    _run(sys.executable, "-m", "deploy.audit", "--out", str(out / "packages.json"))
    _run(sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-f", "deploy/site/mkdocs.yml")
    shutil.make_archive(str(out / "site"), "gztar", ROOT / "out/site")
    images = "not built: neither Docker nor Podman is installed"
    if any(map(shutil.which, ("docker", "podman"))):
        _run("make", "images")
        images = "mta-gateway, mta-engine-cpu"
    (out / "NOTES.md").write_text(notes, "utf-8")
    rows = [
        ("version", version),
        ("wheel", built.name),
        ("sdist", next(out.glob("*.tar.gz")).name),
        ("SBOMs", len(list(out.glob("*.cdx.json")))),
        ("images", images),
        ("lines of notes", len(notes.splitlines())),
        ("to publish", f"git tag v{version}, push the tag and the images, upload {out.relative_to(ROOT)}"),
    ]
    report("a release, nothing of it published", rows, None)


def check_names(root: Path, version: str) -> None:
    """Raise MtaError if a file names another version."""
    for file, pattern in NAMES.items():
        for named in re.findall(pattern, (root / file).read_text("utf-8")):
            if named != version:
                raise MtaError(f"{file} names version {named}, pyproject.toml {version}: make them equal")


def notes_of(changelog: str, version: str) -> str:
    """Return a version's lines of the changelog; MtaError if it has none, or lines that no version has yet."""
    sections: dict[str, str] = dict(
        re.findall(r"^## \[([^\]]+)\][^\n]*\n(.*?)(?=^## \[|\Z)", changelog, re.DOTALL | re.MULTILINE)
    )
    if sections.get("Unreleased", "").strip():
        raise MtaError(f"CHANGELOG.md has unreleased changes: move them under [{version}]")
    if not (notes := sections.get(version, "").strip()):
        raise MtaError(f"CHANGELOG.md says nothing of {version}: add `## [{version}] - DATE`")
    return notes + "\n"


def _run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MtaError(f"`{' '.join(command)}` ended with status {done.returncode}:\n{done.stderr.strip()[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    script(main)
