"""Run Lightning's own tests with OFTFinetuning in every Trainer, and say why those fail that fail only with it.

    python tools/lightning_tests.py path/to/pytorch-lightning
    python tools/lightning_tests.py path/to/pytorch-lightning callbacks/test_timer.py --set max_angle=20

The path is a checkout of https://github.com/Lightning-AI/pytorch-lightning at the tag of the installed version. Its
tests run twice: as they stand, and with rotations in every model that has something to rotate. Those that fail as they
stand say nothing. What else fails is counted by reason, and a reason that lies in a setting is tried: its tests run once
more with the other setting, and pass. A test that fails without a reason makes the exit code 1.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

import lightning_oft
from lightning_oft.model.plan import plan_injection
from lightning_oft.model.traversal import walk

FOLDERS = (
    *("callbacks", "checkpointing", "loops", "tuner", "models/test_hooks.py", "models/test_restore.py"),
    *("trainer/connectors/test_checkpoint_connector.py", "trainer/test_trainer.py"),
)
LEGACY = "checkpointing/test_legacy_checkpoints.py"  # downloads checkpoints of every Lightning there ever was
OPTIONS = {"oft_block_size": 4}
_VARIABLE = "LIGHTNING_TESTS_OFT"
_adapted = False  # whether the running test has put rotations into a model


class Reason(NamedTuple):
    """Why tests cannot pass: in words, as beginnings of their names, and the options that they pass with, if any."""

    why: str
    tests: tuple[str, ...]
    setting: str = ""


REASONS = (
    Reason(
        "goes on, from an adapter's checkpoint, with a module initialised anew at random: an adapter is of one base",
        (
            *("test_fit_ckpt_path_epoch_restored", "test_checkpoint_find_last", "test_fit_test_synchronization"),
            *("test_checkpoint_repeated_strategy_extended", "test_fit_can_fail_during_validation"),
            *("test_ema_weight_averaging_checkpoint_save_load", "test_trainer_properties_restore_ckpt_path"),
            *("test_resume_mid_epoch_warning", "test_callbacks_restore_backbone"),
        ),
        '{"save_adapter_only": false}',
    ),
    Reason(
        "goes on from a checkpoint written after the fit, of the merged model, which starts a new adapter and a new count "
        "of epochs",
        (
            *("test_fit_loop_save_and_restore_dataloaders", "test_correct_step_and_epoch", "test_hpc_restore_attempt"),
            *("test_no_val_on_train_epoch_loop_restart", "test_resume_training_with"),
        ),
        '{"merge_on_fit_end": false, "save_adapter_only": false}',
    ),
    Reason(
        "StochasticWeightAveraging resets the statistics of a batch norm, which is frozen with the base",
        (
            *("test_swa_callback", "test_swa_warns", "test_swa_resume_training_from_checkpoint"),
            *("test_swa_with_infinite_epochs_and_batchnorm",),
        ),
        '{"modules_to_save": ["layer.1"], "save_adapter_only": false}',
    ),
    Reason(
        "has a linear layer that its model never calls or its optimizer leaves out",
        (
            *("test_strict_model_load", "test_eval_mode_warning", "test_swa_multiple_lrs"),
            *("test_lr_finder_callback_applies_lr_after_restore", "test_lr_finder_with_backbone_finetuning_callback"),
            *("test_lr_monitor_duplicate_custom_pg_names", "test_lr_monitor_multiple_param_groups_no_lr_scheduler"),
        ),
        '{"exclude_modules": ["layer", "c_d3", "some_eval_module"]}',
    ),
    Reason(
        "has no optimizer, or gives it parameters of the adapted layers epochs later",
        (
            *("test_trainer_access_in_configure_optimizers", "test_finetuning_callback"),
            *("test_base_finetuning_internal_optimizer_metadata",),
        ),
    ),
    Reason(
        "asserts that the base's weights train or have gradients",
        (
            *(
                "test_gradient_accumulation_scheduling_last_batch",
                "test_disabled_training",
                "test_gradient_clipping_by",
            ),
            *("test_validation_during_gradient_accumulation_window", "test_train_eval_mode_restored"),
        ),
    ),
    Reason(
        "asserts the exact keys of a checkpoint, names of what trains or number of parameters",
        (
            *("test_trainer_model_hook_system_fit", "test_custom_model_summary_callback_summarize"),
            *("test_callbacks_restore", "test_model_checkpoint_manual_opt"),
        ),
    ),
    Reason(
        "loads an adapter's checkpoint with `load_from_checkpoint` or `load_state_dict` of a module without one",
        (
            *("test_model_checkpoint_only_weights", "test_model_checkpoint_save_last_checkpoint_contents"),
            *("test_ema_resume", "test_running_test_pretrained_model_cpu", "test_load_model_from_checkpoint"),
        ),
    ),
    Reason("prunes weights that rotations turn, whose zeros a merge fills", ("callbacks/test_pruning.py",)),
    Reason(
        "gives a linear layer a weight of another shape than its `in_features` says",
        ("test__training_step__", "test__eval_step__"),
    ),
)


class OFTFinetuning(lightning_oft.OFTFinetuning):
    """Disabled for a model with nothing to rotate."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        global _adapted
        self.enabled = self._can_adapt(pl_module)
        _adapted = _adapted or self.enabled
        super().setup(trainer, pl_module, stage)

    def _can_adapt(self, pl_module: Any) -> bool:
        if lightning_oft.oft_layers(pl_module) or is_overridden("configure_model", pl_module):
            return True
        try:
            return bool(plan_injection(walk(pl_module), self.config, "default", strict=False).layers)
        except ValueError:  # a fan-in of one
            return False


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin: put the callback first into every Trainer that is made."""
    if _VARIABLE not in os.environ:
        return
    options, init = json.loads(os.environ[_VARIABLE]), Trainer.__init__

    @functools.wraps(init)
    def with_oft(self: Trainer, *args: Any, callbacks: Any = None, **kwargs: Any) -> None:
        others = callbacks if isinstance(callbacks, list) else [] if callbacks is None else [callbacks]
        init(self, *args, callbacks=[OFTFinetuning(**options), *others], **kwargs)

    Trainer.__init__ = with_oft  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def _note_adapted(record_property: Any) -> Iterator[None]:
    global _adapted
    _adapted = False
    yield
    record_property("adapted", _adapted)


class Outcome(NamedTuple):
    outcome: str  # passed, failed or skipped
    adapted: bool
    said: str


def run(tests: Path, paths: list[str], options: dict[str, Any] | None, processes: str) -> dict[str, Outcome]:
    """Run tests, with the callback where there are options; how each ended, by its name."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    if options is not None:
        environment[_VARIABLE] = json.dumps(options)
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder, "report.xml"), Path(folder, "log.txt")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "lightning_tests", "-p", "no:cacheprovider"]
        command += ["-n", processes, "--dist", "loadfile", "-o", "junit_family=xunit1", f"--junit-xml={report}"]
        command += [f"--basetemp={folder}/tmp", f"--ignore={LEGACY}", *paths]
        with log.open("w") as stream:
            subprocess.run(command, cwd=tests, env=environment, stdout=stream, stderr=stream, check=False)
        if not report.is_file():
            raise SystemExit(f"pytest wrote no report; it said: {log.read_text()[-2000:]}")
        return dict(outcomes(report))


def outcomes(report: Path) -> Iterator[tuple[str, Outcome]]:
    """How each test of a report ended."""
    for case in ElementTree.parse(report).iter("testcase"):
        file, name = case.get("file", "").removeprefix("tests/tests_pytorch/"), case.get("name", "")
        problem = next((part for part in case if part.tag in ("failure", "error")), None)
        said = problem.get("message", "").split("\n")[0] if problem is not None else ""
        skipped = any(part.tag == "skipped" for part in case)
        adapted = any(one.get("name") == "adapted" and one.get("value") == "True" for one in case.iter("property"))
        outcome = "failed" if problem is not None else "skipped" if skipped else "passed"
        yield f"{file}::{name}", Outcome(outcome, adapted, said)


def reason_of(name: str) -> Reason | None:
    """The first reason that names a test, by the beginning of its function's name or of its path."""
    starts = (name, name.partition("::")[2])
    return next((one for one in REASONS if any(start.startswith(one.tests) for start in starts)), None)


RunWith = Callable[[list[str], dict[str, Any]], dict[str, Outcome]]


def report(run_with: RunWith, broken: dict[str, Outcome]) -> list[str]:
    """Print the tests that fail only with the callback by reason. Returns those without one."""
    groups: dict[Reason | None, list[str]] = defaultdict(list)
    for name in broken:
        groups[reason_of(name)].append(name)
    bad = [f"{name}: {broken[name].said}" for name in groups.pop(None, [])]
    known = [(reason, groups[reason]) for reason in REASONS if reason in groups]
    print("| tests | why they cannot pass | pass with | of these |\n| --- | --- | --- | --- |")
    for reason, names in known:
        setting, cured = "", ""
        if reason.setting:
            again = run_with(names, json.loads(reason.setting))
            failed = [name for name in names if again[name].outcome != "passed"]
            bad += [f"{name}: fails with {reason.setting} too: {again[name].said}" for name in failed]
            setting, cured = f"`{reason.setting}`", str(len(names) - len(failed))
        print(f"| {len(names)} | {reason.why} | {setting} | {cured} |")
    for reason, names in known:
        functions = dict.fromkeys(name.partition("::")[2].partition("[")[0] for name in names)
        print(f"\n{reason.why}:\n    {', '.join(functions)}")
    return bad


def main() -> None:
    """Run Lightning's tests without and with the callback, and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("tree", type=Path, help="a checkout of Lightning's repository")
    parser.add_argument("paths", nargs="*", default=list(FOLDERS), help="below tests/tests_pytorch")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=JSON", help="options of OFTFinetuning")
    parser.add_argument("-n", "--processes", default="2")
    arguments = parser.parse_args()
    tests = arguments.tree / "tests" / "tests_pytorch"
    if not tests.is_dir():
        raise SystemExit(f"{tests}: no such directory: give a checkout of github.com/Lightning-AI/pytorch-lightning")
    options = {**OPTIONS, **{key: json.loads(value) for key, _, value in (one.partition("=") for one in arguments.set)}}

    def run_with(paths: list[str], more: dict[str, Any]) -> dict[str, Outcome]:
        return run(tests, paths, {**options, **more}, arguments.processes)

    without, found = run(tests, arguments.paths, None, arguments.processes), run_with(arguments.paths, {})
    passed = [name for name, one in without.items() if one.outcome == "passed" and name in found]
    broken = {name: found[name] for name in passed if found[name].outcome != "passed"}
    print(f"options of OFTFinetuning: {json.dumps(options)}")
    print(f"{len(passed)} of Lightning's tests pass without the callback; it adapts a model in", end=" ")
    print(f"{sum(found[name].adapted for name in passed)} of them")
    print(f"{len(passed) - len(broken)} of them pass with it, {len(broken)} do not\n")
    if bad := report(run_with, broken):
        print("\nwithout a reason:", *bad, sep="\n")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
