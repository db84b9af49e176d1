"""The manifests for Kubernetes, without a cluster: valid, locked as they say, and the same processes as compose's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.gateway.operating.metrics import Metrics
from tests.support.containers import BASE, CPU, FLEET, ROOT, WORKLOADS, containers, manifests, services, with_hosts

OVERLAYS = ("cpu", "gpu")
VERSIONS = ("1.31", "1.37")
COMPOSED = {"valkey": "redis"}  # the service of compose that a container is, where the names differ
OF_CORES = {"engine": "OMP_NUM_THREADS", "worker": "MTA_WORKER_THREADS"}  # how many threads, where cores are limited
OF_PODS_ALONE = {"HOME", *OF_CORES.values()}
REACHED_BY = {
    "gateway": {"anybody"},
    "router": {"gateway", "observers"},
    "engine": {"gateway", "router", "observers"},
    "worker": {"observers"},
    "valkey": {"gateway", "engine", "worker"},
    "models": set(),
}


def of_kind(overlay: str, *kinds: str) -> list[dict[str, Any]]:
    return [one for one in manifests(overlay) if one["kind"] in kinds]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_manifest_is_valid_and_every_container_without_root_secrets_and_ways_to_change_its_image(
    overlay: str,
) -> None:
    for manifest in manifests(overlay):
        for version in VERSIONS:
            kubernetes_validate.validate(manifest, version, strict=True)
    assert not of_kind(overlay, "Secret")
    for name, container in containers(overlay).items():
        for variable in container.written.get("env", ()):
            if re.search("KEY$|SECRET$|REDIS_URL$", variable["name"]):
                assert variable["valueFrom"]["secretKeyRef"]["name"] == "mta", name
        assert container.written["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        pod = container.pod["securityContext"]
        assert (pod["runAsNonRoot"], pod["runAsUser"]) == (True, 10001)
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container.pod["automountServiceAccountToken"] is container.pod["enableServiceLinks"] is False
        assert container.written["resources"]["requests"].keys() >= {"cpu", "memory"}


@pytest.mark.parametrize(("overlay", "limited"), [("cpu", {"engine", "worker"}), ("gpu", {"worker"})])
def test_whose_cores_are_limited_has_as_many_threads(overlay: str, limited: set[str]) -> None:
    """A quota leaves all the node's cores to be seen, and a thread for each would be started."""
    found = containers(overlay)
    assert {name for name, one in found.items() if "cpu" in one.written["resources"].get("limits", {})} == limited
    for name in limited:
        [variable] = [one for one in found[name].written["env"] if one["name"] == OF_CORES[name]]
        assert variable["valueFrom"] == {"resourceFieldRef": {"resource": "limits.cpu"}}


def test_the_containers_are_the_services_of_compose(tmp_path: Path) -> None:
    """The same commands, and the same variables but for the names of hosts; `test_containers.py` starts both."""
    composed = services((BASE, CPU), tmp_path, "--env-file", FLEET, MTA_SECRET="s" * 32)
    found = containers("cpu")
    assert found.keys() == {"models", "valkey", "engine", "router", "worker", "keys", "gateway"}
    for name, container in found.items():
        service = composed[COMPOSED.get(name, name)]
        assert container.command == service["command"], name
        theirs = {key: value for key, value in service.get("environment", {}).items() if value is not None}
        ours = {key: value for key, value in container.environment.items() if key not in OF_PODS_ALONE}
        lists = (ours.pop("MTA_ENGINE_URLS", ""), theirs.pop("MTA_ENGINE_URLS", ""))
        assert bool(lists[0]) == bool(lists[1])

        def by_port(values: dict[str, str]) -> dict[str, str]:
            return {key: with_hosts(value, lambda host, port: port) for key, value in values.items()}

        assert by_port(ours) == by_port(theirs), name


def test_what_the_pages_apply_are_overlays() -> None:
    pages = {page: page.read_text("utf-8") for page in (ROOT / "docs").glob("*.md")}
    applied = {path for text in pages.values() for path in re.findall(r"kubectl apply (?:-k|--kustomize) (\S+)", text)}
    assert applied
    assert applied <= {f"deploy/k8s/overlays/{overlay}" for overlay in OVERLAYS}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_job_that_goes_first_can_be_applied_with_what_it_needs(overlay: str) -> None:
    page = (ROOT / "docs/deploying.md").read_text("utf-8")
    ((name, value),) = set(re.findall(r"kubectl apply -k \S+ -l (\w+)=(\w+)", page))
    chosen = [one for one in manifests(overlay) if one["metadata"].get("labels", {}).get(name) == value]
    assert {one["kind"] for one in chosen} == {"ConfigMap", "Job", "PersistentVolumeClaim"}
    assert {one["metadata"]["name"].rpartition("-")[0] or one["metadata"]["name"] for one in chosen} == {"models"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_engines_are_named_as_far_as_they_may_grow(overlay: str) -> None:
    found = containers(overlay)
    most = {one["metadata"]["name"]: one["spec"]["maxReplicas"] for one in of_kind(overlay, "HorizontalPodAutoscaler")}
    named = [f"http://engine-{n}.engine:8001" for n in range(most["engine"])]
    for name in ("gateway", "router"):
        assert found[name].environment["MTA_ENGINE_URLS"].split(",") == named


def test_autoscalers_go_by_metrics_that_gateways_have() -> None:
    rules = yaml.safe_load((ROOT / "deploy/k8s/prometheus-adapter.yaml").read_text("utf-8"))["rules"]["external"]
    made = {rule["name"]["as"]: re.match(r"\w+", rule["seriesQuery"]) for rule in rules}
    wanted = {
        metric["external"]["metric"]["name"]
        for one in of_kind("gpu", "HorizontalPodAutoscaler")
        for metric in one["spec"]["metrics"]
    }
    assert wanted == made.keys()
    metrics = Metrics()
    metrics.jobs.labels("queued").set(1)
    lines = metrics.text().decode()
    for series in made.values():
        assert series
        assert re.search(rf"^{series[0]}(?:{{.*}})? ", lines, re.MULTILINE), series[0]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_whatever_selects_pods_finds_them(overlay: str) -> None:
    labels = [one["spec"]["template"]["metadata"]["labels"] for one in of_kind(overlay, *WORKLOADS)]

    def finds(selector: dict[str, str]) -> bool:
        return any(selector.items() <= found.items() for found in labels)

    for one in of_kind(overlay, "Service"):
        assert finds(one["spec"]["selector"]), one
    for one in of_kind(overlay, "PodDisruptionBudget", "Deployment", "StatefulSet"):
        assert finds(one["spec"]["selector"]["matchLabels"]), one
    for one in of_kind(overlay, "NetworkPolicy"):
        assert finds(one["spec"]["podSelector"].get("matchLabels", {})), one
    budgets = {one["metadata"]["name"] for one in of_kind(overlay, "PodDisruptionBudget")}
    assert budgets == {"gateway", "router", "engine", "worker"}
    targets = {(one["kind"], one["metadata"]["name"]) for one in of_kind(overlay, *WORKLOADS)}
    for one in of_kind(overlay, "HorizontalPodAutoscaler"):
        assert (one["spec"]["scaleTargetRef"]["kind"], one["spec"]["scaleTargetRef"]["name"]) in targets


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
                assert [port["port"] for entry in entrances for port in entry["ports"]] == [
                    port["port"] for port in rule["ports"]
                ], (name, peer)


def peers(given: list[dict[str, Any]] | None) -> set[str]:
    """Whom a rule means, in a word each."""
    if not given:
        return {"anybody"}
    return {
        peer["podSelector"]["matchLabels"]["app"]
        if "podSelector" in peer
        else {"mta/observes": "observers"}[next(iter(peer["namespaceSelector"]["matchLabels"]))]
        for peer in given
    }
