"""The files that start runs on several nodes: each parses, says what the program takes, and agrees with itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_oft.cli import main

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "recipes" / "distributed-fsdp2.yaml"
SBATCH = ROOT / "examples" / "slurm" / "fit.sbatch"
KUBERNETES = ROOT / "examples" / "kubernetes" / "fit.yaml"
bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


@pytest.fixture(scope="module")
def kinds() -> dict[str, dict[str, Any]]:
    documents = list(yaml.safe_load_all(KUBERNETES.read_text(encoding="utf-8")))
    return {document["kind"]: document for document in documents}


@pytest.fixture(scope="module")
def container(kinds: dict[str, Any]) -> dict[str, Any]:
    (only,) = kinds["Job"]["spec"]["template"]["spec"]["containers"]
    result: dict[str, Any] = only
    return result


def run_with_stubs(script: str, directory: Path, names: list[str], **environment: str) -> list[list[str]]:
    """Run a script in which these commands only write down what they are called with; returns that, a list a call."""
    for name in names:
        stub = directory / name
        stub.write_text('#!/bin/bash\nprintf "%s\\n" "${0##*/}" "$@" "--end" >> "$CALLS"\n')
        stub.chmod(0o755)
    calls = directory / "calls"
    path = f"{directory}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-c", script], env={"PATH": path, "CALLS": str(calls), **environment}, check=True)
    return [call.strip("\n").split("\n") for call in calls.read_text().split("--end\n")[:-1]]


def parse(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The configuration that a command line comes to, read by the program's own parser."""
    code = main([*arguments, "--print_config"])
    said = capsys.readouterr()
    assert code == 0, said.err
    config: dict[str, Any] = yaml.safe_load(said.out)
    return config


def test_recipe_parses_and_asks_for_all_of_its_processes(capsys: pytest.CaptureFixture[str]) -> None:
    run = parse(["fit", "--config", str(RECIPE)], capsys)["trainer"]
    sharding = run["strategy"]["init_args"]
    assert run["strategy"]["class_path"].endswith("ModelParallelStrategy")
    assert sharding["data_parallel_size"] * sharding["tensor_parallel_size"] == run["devices"] * run["num_nodes"]


@bash
def test_sbatch_starts_a_process_per_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert subprocess.run(["bash", "-n", str(SBATCH)], check=False).returncode == 0
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in SBATCH.read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    example = SBATCH.read_text().splitlines()[1].split()
    assert example[1:3] == ["sbatch", "examples/slurm/fit.sbatch"]
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NUM_NODES": options["nodes"],
        "SLURM_NTASKS_PER_NODE": options["ntasks-per-node"],
    }
    (call,) = run_with_stubs(
        f"cd {ROOT} && bash {SBATCH} {' '.join(example[3:])}", tmp_path, ["srun", "scontrol"], **slurm
    )
    command = call[call.index("lightning-oft") + 1 :]
    at = command.index("--config") + 1
    run = parse([*command[:at], str(ROOT / command[at]), *command[at + 1 :]], capsys)["trainer"]
    assert run["strategy"]["init_args"]["data_parallel_size"] == int(run["devices"]) * run["num_nodes"] == 16


@bash
def test_sbatch_without_a_configuration_says_how_to_call_it() -> None:
    done = subprocess.run(["bash", str(SBATCH)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "usage: sbatch fit.sbatch CONFIG" in done.stderr


def test_kubernetes_pods_have_the_names_that_the_rendezvous_uses(
    kinds: dict[str, Any], container: dict[str, Any]
) -> None:
    service, job = kinds["Service"], kinds["Job"]
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    assert job["apiVersion"] == "batch/v1"
    assert job["spec"]["completionMode"] == "Indexed"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    port = service["spec"]["ports"][0]["port"]
    assert f"--rdzv_endpoint={name}-0.{pod['subdomain']}:{port} " in container["args"][0]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@bash
@pytest.mark.parametrize("index", [0, 1])
def test_kubernetes_command_is_one_that_runs(
    kinds: dict[str, Any], container: dict[str, Any], index: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert container["command"] == ["bash", "-c"]
    (script,) = container["args"]
    (call,) = run_with_stubs(script, tmp_path, ["torchrun"], JOB_COMPLETION_INDEX=str(index))
    options = dict(argument.removeprefix("--").split("=", 1) for argument in call[1 : call.index("-m")])
    assert f"is_host={int(index == 0)}" in options["rdzv_conf"].split(",")
    assert int(options["nnodes"]) == kinds["Job"]["spec"]["completions"] == kinds["Job"]["spec"]["parallelism"]
    assert int(options["nproc_per_node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    command = call[call.index("lightning_oft.cli") + 1 :]
    at = command.index("--config") + 1
    run = parse([*command[:at], str(ROOT / command[at]), *command[at + 1 :]], capsys)["trainer"]
    assert run["strategy"]["init_args"]["data_parallel_size"] == int(run["devices"]) * run["num_nodes"] == 16
    shared = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert f"{container['workingDir']}/{Path(run['default_root_dir']).parent}" in shared


@pytest.mark.nightly
@pytest.mark.distributed
@pytest.mark.subprocess
@pytest.mark.slow
def test_two_nodes_survive_a_kill_to_the_bit() -> None:
    command = [sys.executable, str(ROOT / "tools" / "two_nodes.py"), "--rounds", "1", "--seed", "19"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout[-4000:]
    assert "1 of 1 rounds identical" in done.stdout
