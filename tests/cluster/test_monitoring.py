"""Checks the alerts with promtool, which `make tools` fetches."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.tool import tool

MONITORING = Path(__file__).parents[2] / "cluster/monitoring"

ALERTS = [
    rule for group in yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"] for rule in group["rules"]
]


def promtool(*words: str, folder: Path = MONITORING) -> tuple[int, str]:
    done = subprocess.run([tool("promtool"), *words], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_alerts_are_sound() -> None:
    code, said = promtool("check", "rules", "rules.yaml")
    assert (code, f"{len(ALERTS)} rules found" in said) == (0, True), said


def test_alerts_fire_when_they_should() -> None:
    code, said = promtool("test", "rules", "rules_test.yaml")
    assert code == 0, said


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
@pytest.mark.parametrize("expression", ["vector(0) > 1", "vector(1)"], ids=["never fires", "fires always"])
def test_an_alert_that_is_wrong_is_found_out(rule: dict[str, Any], expression: str, tmp_path: Path) -> None:
    shutil.copy(MONITORING / "rules_test.yaml", tmp_path)
    rules = [one | {"expr": expression} if one is rule else one for one in ALERTS]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "flux-batch", "rules": rules}]}))
    code, said = promtool("test", "rules", "rules_test.yaml", folder=tmp_path)
    assert (code, rule["alert"] in said) == (1, True), said


def test_an_expression_that_cannot_be_read_is_found_out(tmp_path: Path) -> None:
    rules = (MONITORING / "rules.yaml").read_text()
    (tmp_path / "rules.yaml").write_text(rules.replace("unless", "unles"))
    assert promtool("check", "rules", "rules.yaml", folder=tmp_path)[0] == 1


def test_the_queries_of_the_dashboard_can_be_read(tmp_path: Path) -> None:
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    plain = [query.replace("$__rate_interval", "5m").replace("$run", ".*") for query in queries]
    assert "$" not in "".join(plain)
    assert query_error(tmp_path, *plain) == ""
    assert "unclosed" in query_error(tmp_path, plain[0][:-1])


def query_error(folder: Path, *queries: str) -> str:
    """Return promtool's errors for queries, which are checked as the expressions of rules."""
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    (folder / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    code, said = promtool("check", "rules", "queries.yaml", folder=folder)
    return said if code else ""


def test_the_panels_of_the_dashboard_fit_beside_each_other() -> None:
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    cells = [
        (column, row)
        for panel in panels
        for column in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for row in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(column for column, _ in cells) == 23
    assert len({panel["id"] for panel in panels}) == len(panels)
