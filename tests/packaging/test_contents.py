"""What is no Python file but must travel with the package does."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def test_types_travel_with_the_package() -> None:
    assert files("compodistill").joinpath("py.typed").is_file()


@pytest.mark.parametrize("name", ["sft", "logit-kd", "compodistill"])
def test_recipes_travel_with_the_package(name: str) -> None:
    assert files("compodistill.train").joinpath("recipes", f"{name}.yaml").is_file()


@pytest.mark.parametrize("file", ["teacher/config.json", "teacher/model.safetensors", "student/config.json"])
def test_the_demo_models_travel_with_the_package(file: str) -> None:
    assert files("compodistill.tools.demo").joinpath(*file.split("/")).is_file()


def test_the_report_template_travels_with_the_package() -> None:
    assert files("compodistill.tools.report").joinpath("templates", "report.html").is_file()


def test_modelling_template_of_exports_travels_with_the_package() -> None:
    assert files("compodistill.tools.export").joinpath("modeling_cdist.template").is_file()
