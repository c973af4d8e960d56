"""The parts of Airflow that jobs/airflow_dag.py imports: Airflow itself is too large to install for a test."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DAG_FILE = Path(__file__).parents[2] / "jobs/airflow_dag.py"


class AirflowFailException(Exception):
    """A failure that Airflow does not retry."""


class Airflow:
    """Records the dags and tasks of a DAG file with their settings; runs no task."""

    def __init__(self) -> None:
        self.dags: dict[str, dict[str, Any]] = {}
        self.tasks: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {}

    def dag(self, **settings: Any) -> Callable[[Callable[[], None]], Callable[[], None]]:
        def decorate(function: Callable[[], None]) -> Callable[[], None]:
            self.dags[settings["dag_id"]] = settings
            return function

        return decorate

    def task(self, **settings: Any) -> Callable[[Callable[..., Any]], Callable[[], None]]:
        def decorate(function: Callable[..., Any]) -> Callable[[], None]:
            # Airflow refuses a file in which an argument that it fills in has any other default.
            assert function.__defaults__ == (None,)
            self.tasks[function.__name__] = (function, settings)
            return lambda: None

        return decorate


def load_dag(monkeypatch: pytest.MonkeyPatch, version: int = 3) -> tuple[Any, Airflow]:
    """Import the DAG file as Airflow 2 or 3 does."""
    airflow = Airflow()
    decorators = {"dag": airflow.dag, "task": airflow.task}
    failures = {"AirflowFailException": AirflowFailException}
    modules: dict[str, dict[str, Any]] = {
        "airflow": {},
        "airflow.sdk" if version == 3 else "airflow.decorators": decorators,
        "airflow.sdk.exceptions" if version == 3 else "airflow.exceptions": failures,
    }
    for name, values in modules.items():
        module = ModuleType(name)
        vars(module).update(values, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("airflow_dag", DAG_FILE)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded, airflow
