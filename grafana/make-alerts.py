#!/usr/bin/env python3
"""Makes grafana/alerts/homeport.json, for Grafana to evaluate, out of Prometheus's deploy/prometheus/alerts.yml.

With --check, only says whether the file is up to date. Needs PyYAML (e2e/requirements.txt).
"""
import json
import pathlib
import sys

import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = ROOT / "grafana" / "alerts" / "homeport.json"


def query(name, expression):
    model = {"refId": name, "expr": expression, "instant": True}
    return {
        "refId": name,
        "relativeTimeRange": {"from": 600, "to": 0},
        "datasourceUid": "homeport-prometheus",
        "model": model,
    }


def rule(alert):
    # What an expression of Prometheus returns at all is an alert, whatever its value; Grafana compares values.
    found = {
        "type": "threshold",
        "refId": "C",
        "expression": "B",
        "conditions": [{"evaluator": {"type": "gt", "params": [0]}}],
    }
    annotations = {
        name: text.replace("$value", "$values.A.Value") for name, text in alert["annotations"].items()
    }
    return {
        "uid": alert["alert"].lower(),
        "title": alert["alert"],
        "condition": "C",
        "for": alert.get("for", "0s"),
        "data": [
            query("A", alert["expr"]),
            query("B", f"({alert['expr']}) * 0 + 1"),
            {"refId": "C", "datasourceUid": "__expr__", "model": found},
        ],
        "labels": alert["labels"],
        "annotations": annotations,
        # Nothing returned is nothing to say.
        "noDataState": "OK",
        "execErrState": "Error",
    }


def main():
    groups = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())["groups"]
    made = {
        "apiVersion": 1,
        "groups": [
            {
                "orgId": 1,
                "name": group["name"],
                "folder": "Homeport",
                "interval": "1m",
                "rules": [rule(alert) for alert in group["rules"]],
            }
            for group in groups
        ],
    }
    text = json.dumps(made, indent=1, ensure_ascii=False) + "\n"
    if "--check" in sys.argv[1:]:
        if not TARGET.exists() or TARGET.read_text() != text:
            sys.exit("grafana/alerts/homeport.json is stale: run grafana/make-alerts.py")
        return
    TARGET.write_text(text)


main()
