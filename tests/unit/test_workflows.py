"""The workflows and forms of .github agree with the Makefile, pyproject.toml and the format that GitHub reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".github"
WORKFLOWS = sorted((FOLDER / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (FOLDER / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
# YAML 1.1 reads a bare `on` as true.
_TRIGGERS = True
_WORKFLOW_KEYS = {"name", _TRIGGERS, "permissions", "concurrency", "jobs"}
_JOB_KEYS = {
    "name",
    "needs",
    "strategy",
    "runs-on",
    "timeout-minutes",
    "environment",
    "permissions",
    "env",
    "steps",
}
_STEP_KEYS = {"name", "uses", "with", "run", "working-directory", "env"}

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="a source distribution leaves .github out")


def _read(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _jobs() -> list[Any]:
    return [
        pytest.param(job, id=f"{path.stem}-{name}")
        for path in WORKFLOWS
        for name, job in _read(path)["jobs"].items()
    ]


def _fast() -> dict[str, Any]:
    return _read(FOLDER / "workflows" / "tests.yml")["jobs"]["fast"]


def _pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_has_known_keys_and_reads_only(path: Path) -> None:
    """The token of a workflow may read the repository; a job that needs more says so itself."""
    workflow = _read(path)
    assert set(workflow) <= _WORKFLOW_KEYS
    assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("job", _jobs())
def test_job_has_known_keys_and_a_time_limit(job: dict[str, Any]) -> None:
    """A step either uses an action or runs a command."""
    assert set(job) <= _JOB_KEYS
    assert job["timeout-minutes"] <= 90
    for step in job["steps"]:
        assert set(step) <= _STEP_KEYS
        assert ("uses" in step) != ("run" in step)
        assert re.fullmatch(r"[\w-]+/[\w-]+@[\w./-]+", step.get("uses", "a/b@v1"))


@pytest.mark.parametrize("job", _jobs())
def test_make_is_asked_for_targets_that_exist(job: dict[str, Any]) -> None:
    """A renamed target is renamed here too."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    commands = "\n".join(step.get("run", "") for step in job["steps"])
    assert set(re.findall(r"\bmake ([\w-]+)", commands)) <= set(targets)


def test_fast_suite_is_that_of_make_test() -> None:
    """Runners without make give pytest the same options."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^test:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    variables = dict(re.findall(r"^(\w+) [:?]?= (.*)$", makefile, re.MULTILINE))
    (options,) = re.findall(r"python -m pytest (.*)", recipe)
    options = re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], options)
    (command,) = [step["run"] for step in _fast()["steps"] if step.get("name") == "Test"]
    assert command == f"python -m pytest {options} ${{{{ matrix.tests }}}}"


def test_fast_suite_runs_on_three_systems_and_every_python() -> None:
    """The versions are those that pyproject.toml names."""
    matrix = _fast()["strategy"]["matrix"]
    assert {*matrix["os"], *(row["os"] for row in matrix["include"])} == {
        "ubuntu-latest", "macos-latest", "windows-latest",
    }  # fmt: skip
    assert matrix["python"] == re.findall(r'"Programming Language :: Python :: (3\.\d+)"', _pyproject())
    assert f'requires-python = ">={matrix["python"][0]}"' in _pyproject()


def test_oldest_torch_is_the_one_that_pyproject_admits() -> None:
    """The other is whatever is newest."""
    rows = _read(FOLDER / "workflows" / "tests.yml")["jobs"]["torch"]["strategy"]["matrix"]["include"]
    (oldest,) = re.findall(r'"torch>=([\d.]+)"', _pyproject())
    assert [row["torch"] for row in rows] == [f"torch=={oldest}.*", "torch"]


def test_publishing_is_trusted_and_stores_no_password() -> None:
    """Only the job that publishes may ask for an identity token, after the build, in a protected environment."""
    path = FOLDER / "workflows" / "release.yml"
    jobs = _read(path)["jobs"]
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
    assert jobs["publish"]["needs"] == "build"
    assert jobs["publish"]["environment"] == "pypi"
    assert "secrets." not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_form_has_fields_with_labels(path: Path) -> None:
    """Every field has a name of its own, and one of them must be filled in."""
    form = _read(path)
    assert set(form) == {"name", "description", "labels", "body"}
    names = [field["id"] for field in form["body"]]
    assert len(set(names)) == len(names)
    assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in form["body"])
    assert any(field.get("validations", {}).get("required") for field in form["body"])
