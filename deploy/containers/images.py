"""The two images of this checkout, and stand-ins for those that others publish.

A stand-in is made of Debian's packages and has the published image's name, so that Dockerfile and compose files need
no change where no registry of images can be reached.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from bench.page.report import Figures
from deploy.containers import stand_in_driver
from deploy.containers.tool import ROOT, ContainerError, Tool

GATEWAY, ENGINE_CPU, ENGINE_GPU = "mta-gateway", "mta-engine-cpu", "mta-engine"
OBSERVERS = ("prometheus", "alertmanager")  # Grafana is in no package of Debian
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
SUITE = "trixie"
PYTHON_NEEDS = (
    *("ca-certificates", "netbase", "tzdata", "libbz2-1.0", "libcrypt1", "libexpat1", "libffi8", "liblzma5", "libnsl2"),
    *("libncursesw6", "libreadline8t64", "libsqlite3-0", "libssl3t64", "libuuid1", "zlib1g"),
)
NO_DOCUMENTS = tuple(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "info", "locale", "man"))


@dataclass(frozen=True, slots=True)
class StandIn:
    """How Debian's packages become an image: `hooks` are run with the root folder as `$1`."""

    image: str
    suite: str
    packages: tuple[str, ...]
    hooks: tuple[str, ...]
    changes: tuple[str, ...] = ()  # its configuration, as in a Dockerfile


def stand_ins() -> list[StandIn]:
    """Return a stand-in for each published image that Dockerfile and docker-compose.yml name, except Grafana's."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]
    base = re.search(r"^ARG PYTHON=(\S+)$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    assert base, "Dockerfile names no base image"
    stand_ins = [StandIn(base[1], SUITE, PYTHON_NEEDS, _this_python(base[1]))]
    store = ("USER valkey", "VOLUME /data", "WORKDIR /data", 'CMD ["valkey-server"]')
    made = 'chroot "$1" install -d -o valkey -g valkey /data'
    stand_ins.append(StandIn(services["redis"]["image"], SUITE, ("valkey-server", "valkey-tools"), (made,), store))
    for name, program in zip(OBSERVERS, ("prometheus", "prometheus-alertmanager"), strict=True):
        changes = ("USER nobody", f"VOLUME /{name}", f'ENTRYPOINT ["/usr/bin/{program}"]')
        made = f'chroot "$1" install -d -o nobody -g nogroup /{name}'
        stand_ins.append(StandIn(services[name]["image"], SUITE, (program,), (made,), changes))
    return stand_ins


def _this_python(image: str) -> tuple[str, ...]:
    """Hooks that put this process's Python where the published image has it: Debian has another version."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not image.partition(":")[2].startswith(f"{version}."):
        raise ContainerError(
            f"the stand-in for {image} is a copy of this Python, which is {version}: run it with that one"
        )
    parts = f"bin/python{version} include/python{version} lib/python{version} lib/libpython{version}.so.1.0"
    left_out = " ".join(f"--exclude={name}" for name in ("site-packages", "__pycache__", "test", "*.a"))
    return (
        f'tar -C {shlex.quote(sys.base_prefix)} {left_out} -cf - {parts} | tar -C "$1"/usr/local -xf -',
        'chroot "$1" ldconfig',
        f'chroot "$1" sh -c "cd /usr/local/bin && ln -s python{version} python3 && ln -s python{version} python"',
        'chroot "$1" python -m ensurepip --default-pip',
    )


def make_stand_ins(tool: Tool) -> Iterator[str]:
    """Make the stand-ins that are missing; yield the name of each before it is made."""
    for one in stand_ins():
        if tool.has_image(one.image):
            continue
        if not shutil.which("mmdebstrap"):
            raise ContainerError("mmdebstrap, which makes the stand-ins, is not installed: apt-get install mmdebstrap")
        yield one.image
        hooks = [f"--customize-hook={hook}" for hook in one.hooks]
        packages = f"--include={','.join(one.packages)}"
        make = ["mmdebstrap", "--quiet", "--variant=minbase", packages, *NO_DOCUMENTS, *hooks, one.suite, "-"]
        changes = [word for change in one.changes for word in ("--change", change)]
        load = [tool.name, "import", *changes, "-", one.image]
        with subprocess.Popen(make, stdout=subprocess.PIPE) as making:
            loaded = subprocess.run(
                load, env=dict(tool.environment), stdin=making.stdout, capture_output=True, check=False
            )
        if making.returncode or loaded.returncode:
            said = loaded.stderr.decode("utf-8", "replace").strip()
            raise ContainerError(f"the stand-in for {one.image} could not be made: {said or 'see above'}")


def build(tool: Tool, folder: Path, *, gpu: bool = False) -> list[str]:
    """Build both images, with what this machine's package installers are told; return their names.

    An image for GPUs is checked: everything in it must import, with a stand-in for NVIDIA's driver.

    Args:
        tool: what builds them.
        folder: folder for files that builds read.
        gpu: whether engines are for NVIDIA GPUs; otherwise for CPUs.
    """
    engine = ENGINE_GPU if gpu else ENGINE_CPU
    arguments = [] if gpu else ["--build-arg", "ENGINE=cpu"]
    wheels = [] if gpu else _wheel_folders()  # a build of torch for CPUs has a newer version than the one for GPUs
    if any(Path(one).glob("torch-*+cpu-*.whl") for one in wheels):
        arguments += ["--build-arg", "TORCH_BACKEND="]
    local = _mounts(folder, wheels) if tool.is_podman else []
    for target, name, own in (("gateway", GATEWAY, []), ("engine", engine, arguments)):
        tool.run("build", "--network=host", *local, "--target", target, "--tag", name, *own, ROOT, shown=True)
    if gpu:
        script = f"--volume={Path(stand_in_driver.__file__)}:/check.py:ro"
        tool.run("run", "--rm", "--network=none", script, ENGINE_GPU, "python", "/check.py", shown=True)
    return [GATEWAY, engine]


def _wheel_folders() -> list[str]:
    return [folder for folder in os.environ.get("PIP_FIND_LINKS", "").split() if Path(folder).is_dir()]


def _mounts(folder: Path, wheels: Sequence[str]) -> list[str]:
    """Options that show builds, and no image, this machine's certificates and folders of wheels."""
    folder.mkdir(parents=True, exist_ok=True)
    uv = folder / "uv.toml"
    uv.write_text(f"system-certs = true\nfind-links = {json.dumps(wheels)}\n", "utf-8")
    seen = {uv: "/etc/uv/uv.toml", Path("/etc/pip.conf"): "/etc/pip.conf", **{Path(one): one for one in wheels}}
    seen[Path(os.environ.get("SSL_CERT_FILE", CERTIFICATES))] = CERTIFICATES
    return [f"--volume={path.resolve()}:{target}:ro" for path, target in seen.items() if path.exists()]


def sizes(tool: Tool, names: Sequence[str]) -> Figures:
    """Return the sizes of images, and of the largest layers that are their own, in MB."""
    lines = []
    for name in names:
        [image] = json.loads(tool.run("image", "inspect", name))
        layers = len(image["RootFS"]["Layers"])
        lines.append((name, round(image["Size"] / 1e6), layers))
    return Figures("images", ("name", "MB", "layers"), lines)
