"""Repository checks: code size, docstrings, commands in documents, job and cluster files, pinned packages."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from raydetect.audit.measures import MEASURES
from raydetect.audit.rules import parse_rules
from raydetect.config import AuditSpec, FitSpec, parse_job
from raydetect.config.validation import parse_yaml
from raydetect.detectors._registry import build_from
from raydetect.distributed.serving.proxy import BOUNDED, CALLBACK
from tests.builders.documents import blocks

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "raydetect").rglob("*.py"))
PINNED_RAY = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_files_and_functions_are_small() -> None:
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= 400, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


def test_a_folder_fits_on_a_screen_and_few_modules_stand_outside() -> None:
    folders = {path.parent for path in SOURCES}
    many = {folder.name: len(list(folder.glob("*.py"))) for folder in folders if len(list(folder.glob("*.py"))) > 14}
    assert set(many) <= {"detectors"}, many  # one file for each algorithm
    assert len([path for path in (ROOT / "raydetect").glob("*.py")]) <= 8


def test_everything_public_has_a_doc_line() -> None:
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"


def test_no_catch_all_modules_and_no_pickle() -> None:
    for path in SOURCES:
        assert path.stem not in ("utils", "helpers", "common", "manager", "misc"), path
        names = {a.name.partition(".")[0] for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import)
                 for a in n.names}  # fmt: skip
        assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}, path
        for line in path.read_text().splitlines():
            if "torch.load(" in line:
                assert "weights_only=True" in line, path


@pytest.mark.parametrize("module", ["raydetect", "raydetect.detectors.patchcore", "raydetect.scoring.scorer"])
def test_the_core_runs_without_ray(module: str) -> None:
    code = f"import sys; sys.modules['ray'] = None; import {module}; assert 'ray.data' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dependencies_are_pinned() -> None:
    pinned = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    names = {name.lower().replace("_", "-") for name in pinned}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [
        *project["dependencies"],
        *project["optional-dependencies"]["cpu"],
        *project["optional-dependencies"]["rasters"],
        *project["optional-dependencies"]["plot"],
        *project["optional-dependencies"]["kubernetes"],
        *project["optional-dependencies"]["dev"],
        *project["optional-dependencies"]["docs"],
        *project["optional-dependencies"]["bench"],
    ]
    for requirement in requirements:
        name = re.match(r"[A-Za-z0-9_.-]+", requirement)
        assert name is not None and name.group().lower().replace("_", "-") in names, requirement
    assert pinned["torch"] == "2.14.1" and pinned["torchvision"] == "0.29.1"
    assert importlib.metadata.version("ray") == pinned["ray"]


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_job_file_parses(path: Path) -> None:
    spec = parse_job(parse_yaml(path.read_text(), path.name), path.name)
    if isinstance(spec, FitSpec):
        build_from(spec.detector, spec.seed)


def documents(path: Path) -> list[dict[str, object]]:
    return [found for found in yaml.safe_load_all(path.read_text()) if found]


def images_in(value: object) -> list[str]:
    if isinstance(value, dict):
        own = [value["image"]] if isinstance(value.get("image"), str) else []
        return own + [image for item in value.values() for image in images_in(item)]
    return [image for item in value for image in images_in(item)] if isinstance(value, list) else []


@pytest.mark.parametrize("path", sorted((ROOT / "cluster").glob("*.yaml")), ids=lambda path: path.name)
def test_cluster_files_load_and_use_the_pinned_ray(path: Path) -> None:
    assert PINNED_RAY is not None
    found = documents(path)
    assert found
    images = images_in(found) or re.findall(r"image: (\S+)", path.read_text())
    assert images and all(image.endswith(f"ray{PINNED_RAY.group(1)}") for image in images), images
    text = path.read_text()
    assert re.search(r"RAY_AUTH_MODE\W+(value:\s*)?token|authOptions: {mode: token, ", text)
    for version in re.findall(r"rayVersion: (.+)", text):
        assert version == f'"{PINNED_RAY.group(1)}"'


def test_ray_up_accepts_its_config() -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = fillout_defaults(documents(ROOT / "cluster" / "ray-up.yaml")[0])
    validate_config(config)
    with pytest.raises(Exception, match="max_wokers"):
        validate_config({**config, "max_wokers": 3})


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gpu"])
def test_dockerfile_uses_the_pinned_ray_and_installs_this_project(name: str) -> None:
    assert PINNED_RAY is not None
    text = (ROOT / "cluster" / name).read_text()
    assert f"FROM rayproject/ray:{PINNED_RAY.group(1)}-py311" in text
    assert "constraints.txt" in text and "RAY_AUTH_MODE=token" in text
    assert f"ENV {CALLBACK}={BOUNDED}" in text
    assert f"docker build -f cluster/{name} -t " in text


def test_the_image_without_gpus_takes_torch_without_cuda_and_the_other_with_it() -> None:
    plain, gpu = ((ROOT / "cluster" / name).read_text() for name in ("Dockerfile", "Dockerfile.gpu"))
    index = "https://download.pytorch.org/whl/cpu"
    assert f"ARG TORCH_INDEX={index}\n" in plain
    assert f"--index-url {index}" in (ROOT / "docs" / "install.md").read_text()
    first, second = re.findall(r"^RUN (.+?[^\\])$", plain, re.MULTILINE | re.DOTALL)
    assert '--index-url "$TORCH_INDEX"' in first and "constraints.txt" in first
    assert "torch.version.cuda is None" in second
    (pattern,) = re.findall(r"grep -E '(.+?)'", first)
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if re.search(pattern, line)]
    assert [line.partition("==")[0] for line in pinned] == ["torch", "torchvision"]
    assert "INDEX" not in gpu and "torch.version.cuda is not None" in gpu and "[gpu,rasters]" in gpu


@pytest.mark.parametrize("name", ["rayjob-score.yaml", "rayjob-gpu.yaml", "cronjob-audit.yaml"])
def test_jobs_in_kubernetes_files_are_valid(name: str) -> None:
    bodies = documents(ROOT / "cluster" / name)
    config = next(body for body in bodies if body["kind"] == "ConfigMap")
    data = config["data"]
    assert isinstance(data, dict) and data
    for file, text in data.items():
        spec = parse_job(parse_yaml(text, file), file)
        if isinstance(spec, AuditSpec):
            assert parse_rules(spec.alarm_when, MEASURES)


def test_audits_do_not_overlap_and_alarms_are_not_retried() -> None:
    from click.testing import CliRunner

    from raydetect.cli.main import main

    job = next(body for body in documents(ROOT / "cluster" / "cronjob-audit.yaml") if body["kind"] == "CronJob")
    spec: Any = job["spec"]
    assert spec["concurrencyPolicy"] == "Forbid" and len(spec["schedule"].split()) == 5
    work = spec["jobTemplate"]["spec"]
    codes = [rule["onExitCodes"] for rule in work["podFailurePolicy"]["rules"]]
    (container,) = work["template"]["spec"]["containers"]
    assert codes == [{"containerName": container["name"], "operator": "In", "values": [2, 4]}]
    assert work["template"]["spec"]["restartPolicy"] == "Never"  # required by podFailurePolicy
    (line,) = container["args"]
    arguments = line.split()
    assert arguments[0] == "raydetect" and arguments[2] == f"{container['volumeMounts'][0]['mountPath']}/audit.yaml"
    help_text = CliRunner().invoke(main, [arguments[1], "--help"]).output
    assert {word for word in arguments if word.startswith("--")} <= set(help_text.replace(",", " ").split())


def test_endpoints_in_cluster_files_are_valid_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDETECT_TOKENS", "[{name: line4, token: a-token-of-more-than-20, scopes: [score]}]")
    from raydetect.distributed.serving.app import application

    plain = documents(ROOT / "cluster" / "serve.yaml")[0]
    spec = documents(ROOT / "cluster" / "rayservice.yaml")[0]["spec"]
    assert isinstance(spec, dict)
    for config in (plain, yaml.safe_load(spec["serveConfigV2"])):
        checked = ServeDeploySchema.model_validate(config)
        assert checked.applications[0].import_path == "raydetect.distributed.serving:application"
        application(checked.applications[0].args)


DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/**/README.md")})
GENERATED = (".venv", "build", ".demo")
PAGES = [path for path in DOCUMENTS if path.relative_to(ROOT).parts[0] not in GENERATED]


def without_variables(line: str) -> list[str]:
    """The words of a command, without its comment and the variables before it."""
    words = line.partition("#")[0].split()
    while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
        words = words[1:]
    return words


@pytest.mark.parametrize(
    "path",
    [p for p in DOCUMENTS if p.relative_to(ROOT).parts[0] not in GENERATED],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_commands_and_paths_in_documents_exist(path: Path) -> None:
    from click import Group

    from raydetect.cli.main import main

    assert isinstance(main, Group)
    makefile = (ROOT / "Makefile").read_text()
    for block in blocks(path.read_text()):
        for line in block.splitlines():
            arguments = without_variables(line)
            if arguments[:1] == ["raydetect"] and len(arguments) > 1 and not arguments[1].startswith("-"):
                command = main.commands[arguments[1]]
                options = {name for parameter in command.params for name in parameter.opts}
                assert {w.partition("=")[0] for w in arguments if w.startswith("--")} <= options, line
            if arguments[:1] == ["make"]:
                assert re.search(rf"^{arguments[1]}:", makefile, re.MULTILINE), line
            for word in arguments:
                assert not word.startswith("tests/") or (ROOT / word).exists(), line
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_yaml_in_documents_is_a_valid_job() -> None:
    count = 0
    for path in PAGES:
        for block in blocks(path.read_text(), "yaml"):
            spec = parse_job(parse_yaml(block, path.name), path.name)
            if isinstance(spec, FitSpec):
                build_from(spec.detector, spec.seed)
            if isinstance(spec, AuditSpec):
                assert parse_rules(spec.alarm_when, MEASURES)
            count += 1
    assert count >= 20


def test_python_in_documents_compiles() -> None:
    for path in PAGES:
        for block in blocks(path.read_text(), "python"):
            if not block.startswith(">>>"):  # examples of docstrings, which doctest runs
                compile(block, str(path), "exec")


def test_modules_that_have_moved_are_found_by_their_old_names_with_a_warning() -> None:
    from raydetect.moved_modules import MOVED, PACKAGE

    code = f"""
import importlib, warnings
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    from raydetect import local
    from raydetect.config import to_plain
    from raydetect.spec import parse_job
    from raydetect.worker.score import Scorer
    assert callable(local.fit) and callable(to_plain)
    for old in {sorted(MOVED)!r}:
        importlib.import_module("{PACKAGE}." + old)
from raydetect import config, scoring
from raydetect.scoring import scorer
assert parse_job is config.parse_job and Scorer is scorer.Scorer
assert sum("now. Import" in str(one.message) for one in told) >= {len(MOVED)}
"""
    subprocess.run([sys.executable, "-c", code], check=True)
