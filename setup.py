"""Maps the top-level folders into the package; all metadata stands in pyproject.toml."""

from setuptools import find_packages, setup

ROOMS = ["store", "precompute", "train", "tools"]

packages = ["compodistill"]
package_dir = {"compodistill": "core"}
for room in ROOMS:
    packages.append(f"compodistill.{room}")
    package_dir[f"compodistill.{room}"] = room
    packages += [f"compodistill.{room}.{sub}" for sub in find_packages(room)]

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={
        "compodistill": ["py.typed"],
        "compodistill.train": ["recipes/*.yaml"],
        "compodistill.tools": ["report/templates/*", "demo/teacher/*", "demo/student/*", "export/*.template"],
    },
)
