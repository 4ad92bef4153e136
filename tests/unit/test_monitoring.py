"""Rules, dashboards and compose file name only what there is; promtool, where there is one, accepts them."""

import json
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric

from isthmus.cloud_service.config import CloudConfig
from isthmus.cloud_service.language.engines.metrics import RequestMetrics
from isthmus.cloud_service.language.metrics import EngineMetricFamilies, EngineMetrics
from isthmus.cloud_service.metrics import CloudMetrics
from isthmus.edge_agent.config import EdgeConfig, HttpConfig
from isthmus.edge_agent.http.metrics import HttpMetrics
from isthmus.edge_agent.language.metrics import LanguageMetrics
from isthmus.edge_agent.streams.metrics import StreamMetrics
from isthmus.edge_agent.vision.metrics import EdgeMetrics
from isthmus.models.messages import BundleInfo, TapInfo, TaskInfo
from isthmus.models.settings import settings_of
from isthmus.models.vision.bundle import Bundle

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "cloud_service" / "monitoring"
GRAFANA = MONITORING / "grafana"
NAME = re.compile(r"(?<![\w:])isthmus_[a-z0-9_]+")
SELECTOR = re.compile(r'(?<![\w:])(isthmus_[a-z0-9_]+)\{(\w+)="([^"]*)"')

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def promtool(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *arguments], cwd=MONITORING, input=text, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def registries(tiny_bundle: Bundle) -> tuple[CollectorRegistry, CollectorRegistry]:
    """What an agent and a service export before their first photo."""
    manifest = tiny_bundle.manifest
    edge, cloud = CollectorRegistry(), CollectorRegistry()
    EdgeMetrics(edge, manifest)
    LanguageMetrics(edge)
    HttpMetrics(edge, ["/v1/infer"])
    StreamMetrics(edge, ["front"], ["webhook"])
    tasks, taps = (TaskInfo("defect", 2), TaskInfo("colour", 3)), (TapInfo("light", 3), TapInfo("deep", 2))
    info = BundleInfo(bytes.fromhex(manifest.fingerprint), manifest.name, tasks, taps)
    CloudMetrics(cloud, (info,))
    EngineMetrics(EngineMetricFamilies(cloud), "tiny")
    RequestMetrics(cloud)
    return edge, cloud


@pytest.fixture
def families(registries: tuple[CollectorRegistry, CollectorRegistry]) -> list[Metric]:
    return [family for registry in registries for family in registry.collect()]


def exported(families: list[Metric]) -> set[str]:
    """Every series name that Prometheus would store."""
    suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    return {family.name + suffix for family in families for suffix in suffixes[family.type]}


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GRAFANA / "dashboard.json").read_text())
    return content


def queries() -> list[str]:
    """Every expression that an operator sees the result of."""
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    return [rule["expr"] for rule in rules()] + panels


@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "prometheus.yml"), ("check", "rules", "rules.yml"), ("test", "rules", "rules_test.yml")],
    ids=" ".join,
)
def test_promtool_accepts(arguments: tuple[str, ...]) -> None:
    done = promtool(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("side", [0, 1], ids=["edge", "cloud"])
def test_promtool_finds_no_fault_with_names(registries: tuple[CollectorRegistry, CollectorRegistry], side: int) -> None:
    done = promtool("check", "metrics", text=generate_latest(registries[side]).decode())
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_queries_name_only_metrics_that_exist(families: list[Metric]) -> None:
    named = {name for query in queries() for name in NAME.findall(query)}
    assert named
    assert named - exported(families) == set()


def test_queries_ask_only_for_labels_that_exist(families: list[Metric]) -> None:
    """A misspelt label value never matches, so an alert on it would never fire."""
    known = {(sample.name, *pair) for family in families for sample in family.samples for pair in sample.labels.items()}
    late = {("isthmus_edge_circuit_breaker_state", "state", "open")}  # exported from the first look at the link on
    asked = {selector for rule in rules() for selector in SELECTOR.findall(rule["expr"])}
    assert asked
    assert asked - known - late == set()


def test_every_metric_is_on_the_dashboard(families: list[Metric]) -> None:
    named = {name for query in queries() for name in NAME.findall(query)}
    unseen = [family.name for family in families if not any(name.startswith(family.name) for name in named)]
    assert unseen == []


def test_every_alert_is_tested_firing_and_silent() -> None:
    tests = yaml.safe_load((MONITORING / "rules_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == alerts
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == alerts


def test_dashboard_panels_do_not_overlap() -> None:
    boxes = [panel["gridPos"] for panel in dashboard()["panels"]]
    cells = [(x, y) for b in boxes for x in range(b["x"], b["x"] + b["w"]) for y in range(b["y"], b["y"] + b["h"])]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_dashboard_is_where_its_provisioning_looks() -> None:
    provider = yaml.safe_load((GRAFANA / "dashboards.yml").read_text())["providers"][0]
    source = yaml.safe_load((GRAFANA / "datasource.yml").read_text())["datasources"][0]
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    inside = [volume.split(":")[1] for volume in compose["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/isthmus.json" in inside
    assert source["url"] == "http://prometheus:9090"


def test_compose_mentions_only_files_that_exist() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    builds = [ROOT / service["build"]["dockerfile"] for service in services.values() if "build" in service]
    mounts = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    files = builds + [ROOT / mount for mount in mounts if mount.startswith(".")]
    assert files
    assert [str(file) for file in files if not file.exists()] == []


def test_images_copy_only_what_exists_and_is_not_ignored() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for dockerfile in (
        ROOT / folder / "Dockerfile" for folder in ("cloud_service", "cloud_service/balancer", "edge_agent")
    ):
        copies = [line.split()[1:-1] for line in dockerfile.read_text().splitlines() if line.startswith("COPY ")]
        for source in (word for words in copies for word in words if not words[0].startswith("--from")):
            assert (ROOT / source).exists(), f"{dockerfile}: {source}"
            assert source.split("/")[0] in allowed, f"{dockerfile}: {source}"


@pytest.mark.parametrize("service", ["cloud", "edge"])
def test_images_end_without_root_and_build_tools(service: str) -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    stages = (ROOT / compose[service]["build"]["dockerfile"]).read_text().split("\nFROM ")
    assert "USER 10001" in stages[-1]
    assert "pip install" not in stages[-1]
    assert compose[service]["read_only"] is True


def test_the_service_on_a_card_takes_the_place_of_the_one_on_the_cpu() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    cpu, card = services["cloud"], services["cloud-gpu"]
    assert card["profiles"] == ["gpu"] and card["networks"]["default"]["aliases"] == ["cloud"]
    (device,) = card["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    different = {"profiles", "image", "build", "environment", "networks", "deploy"}
    assert {key for key in card.keys() | cpu.keys() if card.get(key) != cpu.get(key)} == different
    assert cpu["environment"].items() <= card["environment"].items()
    arguments = re.findall(r"^ARG (\w+)", (ROOT / card["build"]["dockerfile"]).read_text(), re.MULTILINE)
    assert card["build"]["args"].keys() <= set(arguments) and card["build"]["args"]["ONNXRUNTIME"] == "onnxruntime-gpu"
    names = {f"ISTHMUS_CLOUD_{setting.key.upper()}" for setting in settings_of(CloudConfig)}
    assert card["environment"].keys() <= names


def test_compose_with_tls_gives_each_side_its_own_keys_and_names_settings_that_exist() -> None:
    services = yaml.safe_load((ROOT / "compose.tls.yaml").read_text())["services"]
    volumes = {name: [volume.split(":")[0] for volume in service["volumes"]] for name, service in services.items()}
    assert volumes["cloud"] == ["cloud-keys"] and volumes["edge"] == ["edge-keys"]  # the authority's key is in neither
    cloud, edge = ({setting.key.upper() for setting in settings_of(model)} for model in (CloudConfig, EdgeConfig))
    check = {"CHECK_CA", "CHECK_CERTIFICATE", "CHECK_KEY"}
    assert {name.removeprefix("ISTHMUS_CLOUD_") for name in services["cloud"]["environment"]} <= cloud | check
    assert {name.removeprefix("ISTHMUS_EDGE_") for name in services["edge"]["environment"]} <= edge
    owned = (ROOT / "cloud_service/Dockerfile").read_text()
    assert all(volume.split(":")[1] in owned for volume in services["keys"]["volumes"])


def test_prometheus_scrapes_the_ports_that_compose_opens() -> None:
    jobs = {
        job["job_name"]: job for job in yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    }
    cloud = (ROOT / "cloud_service/Dockerfile").read_text()
    edge = (ROOT / "edge_agent/Dockerfile").read_text()
    assert jobs["isthmus-cloud"]["static_configs"][0]["targets"] == ["cloud:9101"]
    assert "ISTHMUS_CLOUD_METRICS=0.0.0.0:9101" in cloud
    cloud2, balancer = (jobs[name]["dns_sd_configs"][0] for name in ("isthmus-cloud", "haproxy"))
    assert (cloud2["names"], cloud2["port"]) == (["cloud2"], 9101)
    assert (balancer["names"], balancer["port"]) == (["balancer"], 8405)
    assert ":8405" in (ROOT / "cloud_service/balancer/haproxy.cfg").read_text()
    assert jobs["isthmus-edge"]["dns_sd_configs"][0]["port"] == 8080
    assert "ISTHMUS_EDGE_LISTEN=0.0.0.0:8080" in edge


@pytest.mark.parametrize(("service", "config"), [("cloud", CloudConfig), ("edge", HttpConfig)])
def test_a_container_has_longer_to_stop_than_its_drain_takes(service: str, config: type) -> None:
    """The rest is for a batch that is being computed, and for the interpreter's end."""
    grace = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"][service]["stop_grace_period"]
    drain_s = next(field.default for field in fields(config) if field.name == "drain_s")
    assert float(grace.removesuffix("s")) >= drain_s + 5
