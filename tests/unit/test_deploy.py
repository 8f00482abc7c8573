"""What is in deploy/: dashboards, alerts, configuration, unit and container file, held against the code and each other."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, ProcessCollector

from cachefs.metrics import DEFINITIONS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
RULES = DEPLOY / "prometheus" / "cachefs-rules.yml"
CONTAINERFILE = (DEPLOY / "Containerfile").read_text()
WIDTH = 24  # columns that Grafana has
UNITS = {  # names that Grafana knows
    "bytes", "Bps", "cps", "dateTimeAsIso", "none", "ops", "percentunit", "pps", "reqps", "s", "short",
}  # fmt: skip
METRIC = re.compile(r"\b(?:cachefs|process)_\w+")
each_dashboard = pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def run(*command: object, **options: Any) -> None:
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def dashboard(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def panels(path: Path) -> list[dict[str, Any]]:
    return [panel for panel in dashboard(path)["panels"] if panel["type"] != "row"]


def queries(path: Path) -> list[str]:
    return [target["expr"] for panel in panels(path) for target in panel["targets"]]


def metrics_in(text: str) -> set[str]:
    """Names of metrics as they are defined: those of the parts of a histogram without what is added to them."""
    return {re.sub(r"_(bucket|count|sum)$", "", name) for name in METRIC.findall(text)}


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"] if "alert" in rule]


# --- dashboards


@each_dashboard
def test_every_panel_is_described_and_has_a_unit_that_grafana_knows(path: Path) -> None:
    for panel in panels(path):
        assert panel["title"] and panel["targets"], panel
        assert panel["description"].endswith("."), panel["title"]
        unit = panel["fieldConfig"]["defaults"].get("unit") or panel["options"]["yAxis"]["unit"]
        assert unit in UNITS, panel["title"]


@each_dashboard
def test_panels_lie_in_rows_side_by_side_and_not_above_each_other(path: Path) -> None:
    taken: Counter[tuple[int, int]] = Counter()
    everything = dashboard(path)["panels"]
    assert everything[0]["type"] == "row"
    for panel in everything:
        at = panel["gridPos"]
        assert at["x"] >= 0 and at["x"] + at["w"] <= WIDTH, panel["title"]
        taken.update((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"]))
    assert max(taken.values()) == 1
    assert [panel["gridPos"]["y"] for panel in everything] == sorted(panel["gridPos"]["y"] for panel in everything)
    assert len({panel["id"] for panel in everything}) == len(everything)
    rows = [panel["title"] for panel in everything if panel["type"] == "row"]
    assert len(set(rows)) == len(rows) >= 5


@each_dashboard
def test_every_target_asks_the_data_source_that_was_chosen(path: Path) -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels(path):
        assert panel["datasource"] == chosen, panel["title"]
        assert all(target["datasource"] == chosen for target in panel["targets"]), panel["title"]
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters), panel["title"]


@each_dashboard
def test_instance_and_mountpoint_can_be_chosen_several_at_once(path: Path) -> None:
    variables = {variable["name"]: variable for variable in dashboard(path)["templating"]["list"]}
    assert list(variables) == ["datasource", "instance", "mountpoint"]
    for name in ("instance", "mountpoint"):
        assert variables[name]["multi"] and variables[name]["includeAll"] and variables[name]["allValue"] == ".+"
    assert 'instance=~"$instance"' in variables["mountpoint"]["query"]["query"]


@each_dashboard
def test_every_query_respects_the_variables_and_parses(path: Path, tmp_path: Path) -> None:
    rules = []
    for number, query in enumerate(queries(path)):
        selectors = re.findall(r"\{([^}]*)\}", query)
        assert selectors and all('instance=~"$instance"' in selector for selector in selectors), query
        assert 'mountpoint=~"$mountpoint"' in query, query
        expression = re.sub(r"\$__(rate_interval|range)", "1m", query)
        rules.append({"record": f"panel:{number}", "expr": expression})
    rules_file = tmp_path / "rules.json"  # JSON is YAML too
    rules_file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    run(tool("promtool"), "check", "rules", rules_file)


def test_dashboards_are_two_that_lead_to_each_other() -> None:
    found = [dashboard(path) for path in DASHBOARDS]
    assert {one["uid"] for one in found} == {"cachefs", "cachefs-durability"} == {path.stem for path in DASHBOARDS}
    assert len({one["title"] for one in found}) == 2
    for one in found:
        (link,) = one["links"]
        assert link["type"] == "dashboards" and set(link["tags"]) <= set(one["tags"]) and link["includeVars"] and link["keepTime"]


def test_files_are_as_a_program_writes_them_so_that_changes_are_small() -> None:
    for path in DASHBOARDS:
        assert path.read_text() == json.dumps(dashboard(path), indent=2, ensure_ascii=False) + "\n"


def test_every_metric_is_on_a_dashboard_or_listed_as_not_shown() -> None:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    suffix = {"counter": "_total"}
    exported = {definition.name for definition in DEFINITIONS}
    exported |= {metric.name + suffix.get(metric.type, "") for metric in registry.collect()}
    shown = {name for path in DASHBOARDS for query in queries(path) for name in metrics_in(query)}
    text = (ROOT / "METRICS.md").read_text()
    not_shown = metrics_in(re.search(r"^Not on a dashboard: .*?\n\n", text, re.MULTILINE | re.DOTALL)[0]) - shown  # type: ignore[index]
    assert shown | not_shown == exported
    assert exported <= metrics_in(text)


# --- Prometheus


def test_promtool_finds_no_fault_with_configuration_and_rules() -> None:
    run(tool("promtool"), "check", "config", DEPLOY / "prometheus" / "prometheus.yml")
    run(tool("promtool"), "check", "rules", "--lint=all", "--lint-fatal", RULES)


def test_rules_fire_when_they_should_and_not_before() -> None:
    test = DEPLOY / "prometheus" / "cachefs-rules-test.yml"
    run(tool("promtool"), "test", "rules", test)
    tested = {case["alertname"] for one in yaml.safe_load(test.read_text())["tests"] for case in one.get("alert_rule_test", ())
              if case.get("exp_alerts")}  # fmt: skip
    assert tested == {alert["alert"] for alert in alerts()}


def test_alerts_are_about_what_is_exported_and_say_what_to_do() -> None:
    runbook = (DEPLOY / "RUNBOOK.md").read_text()
    known = {definition.name for definition in DEFINITIONS} | metrics_in((ROOT / "METRICS.md").read_text())
    sections = re.findall(r"^## (\w+)$", runbook, re.MULTILINE)
    assert sections and sorted(sections) == sorted(alert["alert"] for alert in alerts())
    for alert in alerts():
        assert alert["annotations"]["runbook"] == f"deploy/RUNBOOK.md#{alert['alert'].lower()}"
        assert alert["annotations"]["summary"] and alert["annotations"]["description"].endswith(".")
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        used = metrics_in(alert["expr"].replace("mountpoint:cachefs_page_hits:ratio_rate15m", ""))
        assert used <= known, alert["alert"]


def test_prometheus_and_grafana_get_what_is_here() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yml").read_text())["services"]
    mounted: dict[str, str] = {}
    for service in services.values():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]), "a tag that stays what it is"
        for volume in service["volumes"]:
            source, target = volume.split(":")[:2]
            if source.startswith("."):
                assert (DEPLOY / source).exists() and volume.endswith(":ro"), volume
                mounted[target] = source
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert all(f"/etc/prometheus/{name}" in mounted for name in config["rule_files"])
    provisioning = DEPLOY / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "cachefs.yml").read_text())["providers"]
    assert DEPLOY / mounted[provider["options"]["path"]] == DASHBOARDS[0].parent
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["type"] == "prometheus" and source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    listens = next(word for word in services["prometheus"]["command"] if word.startswith("--web.listen-address="))
    assert source["url"] == f"http://{listens.partition('=')[2]}"
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DASHBOARDS[0].parent / Path(home).name).exists() and str(Path(home).parent) == provider["options"]["path"]


# --- systemd and containers


def test_systemd_finds_no_fault_with_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "systemd" / "cachefs@.service").read_text()
    stop = "ExecStop=-/usr/local/bin/cachefs umount ${MOUNTPOINT}"
    for line in ("Type=notify", "TimeoutStopSec=infinity", "SendSIGKILL=no", stop):
        assert re.search(rf"^{re.escape(line)}$", text, re.MULTILINE)
    unit = tmp_path / "cachefs@.service"
    unit.write_text(text.replace("/usr/local/bin/cachefs", "/bin/true"))
    run(tool("systemd-analyze"), "verify", "--man=no", unit)


def test_the_image_is_built_from_the_locks_with_what_the_set_up_installs() -> None:
    joined = CONTAINERFILE.replace("\\\n", " ")
    steps = [line.split(" ", 1) for line in joined.splitlines() if line and not line.startswith("#")]
    assert {word for word, _ in steps} <= {
        "FROM", "RUN", "WORKDIR", "COPY", "ENV", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD",
    }  # fmt: skip
    images = [rest.split()[0] for word, rest in steps if word == "FROM"]
    assert len(set(images)) == 1 and re.fullmatch(r"debian:\d+\.\d+-slim", images[0])
    installs = [set(re.split(r"\s+", rest.partition("--no-install-recommends")[2].partition("&&")[0].strip()))
                for word, rest in steps if "apt-get install" in rest]  # fmt: skip
    setup = (ROOT / "scripts" / "setup.sh").read_text()
    wanted = set(re.search(r"^run_packages=\((.*)\)$", setup, re.MULTILINE)[1].split())  # type: ignore[index]
    assert wanted - installs[0] == {"fuse3"} and "fuse3" in installs[1] and "libfuse3-3" in installs[1]
    assert "-r requirements.lock" in joined and "PIP_CONSTRAINT=requirements-build.lock" in joined
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for _, rest in (step for step in steps if step[0] == "COPY" and "--from" not in step[1]):
        for name in rest.split()[:-1]:
            assert (ROOT / name).exists() and f"!{name}" in ignored, name
    for word in ("ENTRYPOINT", "CMD"):
        (value,) = (rest for name, rest in steps if name == word)
        assert isinstance(json.loads(value), list)
