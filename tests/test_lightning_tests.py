"""The driver that runs Lightning's own tests; `python tools/lightning_tests.py <checkout of Lightning>` is the long run."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
lightning_tests = importlib.import_module("lightning_tests")


def test_a_missing_tree_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning_tests.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="no such directory: give a checkout of") as error:
        lightning_tests.main()
    assert "\n" not in str(error.value)


def test_a_report_is_read_and_only_failures_without_a_reason_are_left(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(
        """<testsuites><testsuite>
        <testcase file="tests/tests_pytorch/callbacks/test_timer.py" name="test_a[1]">
          <properties><property name="adapted" value="True"/></properties></testcase>
        <testcase file="tests/tests_pytorch/tuner/test_b.py" name="test_b"><skipped message="no GPU"/></testcase>
        <testcase file="tests/tests_pytorch/models/test_c.py" name="test_disabled_training">
          <failure message="assert False&#10;more">trace</failure></testcase>
        </testsuite></testsuites>"""
    )
    found = dict(lightning_tests.outcomes(tmp_path / "report.xml"))
    assert found == {
        "callbacks/test_timer.py::test_a[1]": ("passed", True, ""),
        "tuner/test_b.py::test_b": ("skipped", False, ""),
        "models/test_c.py::test_disabled_training": ("failed", False, "assert False"),
    }
    reasons = [lightning_tests.reason_of(name) for name in found]
    assert [reason and reason.why for reason in reasons] == [
        None,
        None,
        "asserts that the base's weights train or have gradients",
    ]


def test_a_setting_is_tried_and_what_fails_with_it_too_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    cured, stays, unknown = (
        "loops/test_a.py::test_swa_warns",
        "loops/test_a.py::test_swa_callback",
        "loops/test_a.py::test_x",
    )
    failed = lightning_tests.Outcome("failed", True, "assert 1 == 2")
    tried = {cured: failed._replace(outcome="passed"), stays: failed}
    bad = lightning_tests.report(
        lambda names, more: {name: tried[name] for name in names}, dict.fromkeys([*tried, unknown], failed)
    )
    assert [line.partition(": ")[0] for line in bad] == [unknown, stays]
    assert '"save_adapter_only": false}` | 1 |' in capsys.readouterr().out


def test_the_page_has_every_reason() -> None:
    page = (ROOT / "docs" / "lightning.md").read_text(encoding="utf-8")
    assert [reason.why for reason in lightning_tests.REASONS if f"| {reason.why} |" not in page] == []
