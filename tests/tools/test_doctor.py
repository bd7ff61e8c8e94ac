from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from compodistill.tools.cli import cli
from compodistill.tools.doctor import folder, kernels


def test_doctor_reports_what_is_here_and_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["doctor", "--store", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {"python", "packages", "devices", "attention_kernels", "folder", "problems"} <= set(report)
    assert report["attention_kernels"]["cpu-flash"] == "ok"
    assert report["folder"]["create-if-absent"] == report["folder"]["rename"] == "ok"
    assert list(tmp_path.iterdir()) == []


def test_tables_show_the_same(tmp_path: Path) -> None:
    output = CliRunner().invoke(cli, ["doctor", "--store", str(tmp_path)]).output
    assert "cpu-flash" in output
    assert "nothing is missing" in output


def test_a_folder_that_is_not_there_is_the_users_mistake(tmp_path: Path) -> None:
    assert CliRunner().invoke(cli, ["doctor", "--store", str(tmp_path / "no")]).exit_code == 2
    assert CliRunner().invoke(cli, ["doctor", "--store", "s3://bucket/x"]).exit_code == 2


def test_a_folder_whose_create_if_absent_lies_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open
    monkeypatch.setattr(folder.os, "open", lambda path, flags, *a, **k: real(path, flags & ~os.O_EXCL, *a, **k))
    assert folder.folder_checks(tmp_path)["create-if-absent"].startswith("no: ")


def test_a_kernel_with_a_wrong_log_sum_exp_is_not_called_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def off(q, k, v, *rest):  # type: ignore[no-untyped-def]
        return q, torch.zeros(q.shape[:3])

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", off)
    assert kernels.attention_kernels()["cpu-flash"].startswith("no: its log-sum-exp")
