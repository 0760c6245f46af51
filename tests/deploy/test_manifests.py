"""Compose, Kubernetes and systemd files, by their published schemas and a policy."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any, Final

import jsonschema
import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose

from moe_serve.rollout.policy import load_policy
from moe_serve.serving.config import load_stack_config
from moe_serve.serving.routes import PATHS
from tests.support.cluster import SPEC

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
OVERLAYS: Final = ("base", "overlays/cpu", "overlays/prometheus-operator", "overlays/gateway-api")
KUBERNETES: Final = "1.33"
"""A version of some age: what is valid in it still is in later ones."""
SETTINGS: Final = {"MODELS": "/models", "ORIGINAL": "a", "PRUNED": "b"}


def built(overlay: str) -> list[dict[str, Any]]:
    """What kustomize makes of it."""
    ran = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY / "kubernetes" / overlay)],
        capture_output=True,
        text=True,
        check=True,
    )
    return list(yaml.safe_load_all(ran.stdout))


def compose() -> dict[str, Any]:
    """The file with its variables put in, defaults included."""

    def value(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        return SETTINGS.get(name, default or "")

    text = (DEPLOY / "compose" / "compose.yaml").read_text(encoding="utf-8")
    found = re.sub(r"\$\{(?P<name>\w+)(?::(?:-(?P<default>[^}]*)|\?[^}]*))?\}", value, text)
    return dict(yaml.safe_load(found))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_takes_it(overlay: str) -> None:
    """Kustomize builds it; each object passes its schema, with no field that there is not."""
    for item in built(overlay):
        if item["kind"] == "HTTPRoute":
            jsonschema.validate(item["spec"], SPEC)
        if item["apiVersion"].startswith(("monitoring.coreos.com/", "gateway.networking.k8s.io/")):
            continue
        kubernetes_validate.validate(item, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_have_no_rights_and_limits(overlay: str) -> None:
    """No root, nothing writable but volumes, no capability, a limit; a token only with a role."""
    pods = [i for i in built(overlay) if i["kind"] in ("Deployment", "StatefulSet")]
    assert len(pods) == 3
    for item in pods:
        spec = item["spec"]["template"]["spec"]
        assert spec["automountServiceAccountToken"] is ("serviceAccountName" in spec)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            rights = container["securityContext"]
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["readOnlyRootFilesystem"] is True
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
            tag = container["image"].rpartition(":")[2]
            assert tag not in ("", "latest")


def test_no_secret_is_in_plain_text() -> None:
    """No object of that kind, and no variable that sounds like one has its value written out."""
    containers: list[tuple[str, dict[str, Any]]] = [*compose()["services"].items()]
    for overlay in OVERLAYS:
        items = built(overlay)
        assert [i for i in items if i["kind"] == "Secret"] == []
        for item in items:
            pod = item.get("spec", {}).get("template", {}).get("spec", {})
            containers += [(item["metadata"]["name"], c) for c in pod.get("containers", ())]
    for name, container in containers:
        found = container.get("env", container.get("environment", {}))
        variables = found if isinstance(found, dict) else {e["name"]: e.get("value") for e in found}
        for variable, value in variables.items():
            sounds = re.search(r"token|secret|password|api_?key", variable, re.IGNORECASE)
            # A file's place is no secret.
            assert not sounds or value is None or variable.endswith(("_FILE", "__FILE")), name
    text = "".join(p.read_text() for p in DEPLOY.rglob("*") if p.suffix in (".yaml", ".toml"))
    assert "PRIVATE KEY" not in text


def test_every_selector_finds_its_pods() -> None:
    """Services, budgets and network policies name labels that pods carry."""
    items = built("base")
    pods = [
        i["spec"]["template"]["metadata"]["labels"]
        for i in items
        if i["kind"] in ("Deployment", "StatefulSet")
    ]
    for item in items:
        if item["kind"] == "Service":
            wanted = item["spec"]["selector"]
        elif item["kind"] == "PodDisruptionBudget":
            wanted = item["spec"]["selector"]["matchLabels"]
        elif item["kind"] == "NetworkPolicy":
            wanted = item["spec"]["podSelector"]["matchLabels"]
        else:
            continue
        assert any(wanted.items() <= labels.items() for labels in pods), item["metadata"]["name"]


def test_the_controller_may_change_one_route() -> None:
    """The one that its settings name, and read or change it: nothing else in the cluster."""
    items = {(i["kind"], i["metadata"]["name"]): i for i in built("overlays/gateway-api")}
    route = tomllib.loads((DEPLOY / "kubernetes/overlays/gateway-api/stack.toml").read_text())[
        "http_route"
    ]
    namespace, name = route.split("/")
    assert items["HTTPRoute", name]["metadata"]["namespace"] == namespace
    (rule,) = items["Role", "controller"]["rules"]
    assert rule == {
        "apiGroups": ["gateway.networking.k8s.io"],
        "resources": ["httproutes"],
        "resourceNames": [name],
        "verbs": ["get", "patch"],
    }
    assert items["Role", "controller"]["metadata"]["namespace"] == namespace
    bound = items["RoleBinding", "controller"]
    assert (bound["roleRef"]["kind"], bound["roleRef"]["name"]) == ("Role", "controller")
    pod = items["StatefulSet", "gateway"]["spec"]["template"]["spec"]
    assert [s["name"] for s in bound["subjects"]] == [pod["serviceAccountName"]]
    assert not [kind for kind, _ in items if kind.startswith("Cluster")]
    # Its record is on a volume that outlives the pod.
    (claim,) = items["StatefulSet", "gateway"]["spec"]["volumeClaimTemplates"]
    assert {"name": claim["metadata"]["name"], "mountPath": "/state"} in pod["containers"][0][
        "volumeMounts"
    ]


def test_a_route_lets_the_same_paths_through_as_our_proxy() -> None:
    """Exact paths alone; the engines' control paths stay closed."""
    (route,) = (i for i in built("overlays/gateway-api") if i["kind"] == "HTTPRoute")
    paths = [m["path"] for rule in route["spec"]["rules"] for m in rule["matches"]]
    assert {path["type"] for path in paths} == {"Exact"}
    assert {path["value"] for path in paths} == set(PATHS)


def test_the_cpu_overlay_asks_for_no_gpu() -> None:
    """And the base does."""
    assert "nvidia.com/gpu" in json.dumps(built("base"))
    assert "nvidia.com/gpu" not in json.dumps(built("overlays/cpu"))


def test_compose_takes_it() -> None:
    """The specification's own parser; networks, volumes and configs that are named exist."""
    PyCompose.from_json(json.dumps(compose())).validate()


def test_services_have_no_rights_and_limits() -> None:
    """As the pods; and only the OpenAI endpoint is open beyond the machine."""
    for name, service in compose()["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"]
        assert not service["user"].startswith(("0", "root"))
        assert "no-new-privileges:true" in service["security_opt"]
        assert "mem_limit" in service
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:") or (name, port) == ("gateway", "8000:8000")


def test_the_settings_inside_are_ours(tmp_path: Path) -> None:
    """stack.toml and policy.toml of both are read by what reads them there."""
    configs = compose()["configs"]
    for text in {
        "compose": (configs["stack"]["content"], configs["policy"]["content"]),
        **{
            folder: tuple(
                (DEPLOY / "kubernetes" / folder / f).read_text()
                for f in ("stack.toml", "policy.toml")
            )
            for folder in ("base", "overlays/gateway-api")
        },
    }.values():
        stack, policy = tmp_path / "stack.toml", tmp_path / "policy.toml"
        stack.write_text(text[0])
        policy.write_text(text[1])
        assert load_stack_config(stack, {}).urls() == {
            "original": "http://original:8000",
            "pruned": "http://pruned:8000",
        }
        load_policy(policy)


def test_compose_scrapes_what_the_rules_read(tmp_path: Path) -> None:
    """Promtool takes it; the jobs are those of the configuration beside it."""
    text = compose()["configs"]["scrape"]["content"]
    (tmp_path / "prometheus.yml").write_text(
        text.replace("/etc/prometheus/rules/*.yml", "none.yml")
    )
    command = ["promtool", "check", "config", "--syntax-only", str(tmp_path / "prometheus.yml")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    other = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    jobs = {job["job_name"] for job in other["scrape_configs"]}
    assert {job["job_name"] for job in yaml.safe_load(text)["scrape_configs"]} == jobs


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """No unknown setting; the program's place is made for the check."""
    text = (DEPLOY / "systemd" / "moe-serve.service").read_text()
    program = tmp_path / "moe-serve"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "moe-serve.service"
    unit.write_text(text.replace("/opt/moe-serve/bin/moe-serve", str(program)))
    ran = subprocess.run(
        ["systemd-analyze", "verify", str(unit)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
    )
    said = [line for line in ran.stderr.splitlines() if "moe-serve.service" in line]
    assert said == []
