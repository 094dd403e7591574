"""Map the top-level folders kernels/ and data_prep/ to fastbyol.kernels and fastbyol.data_prep.

Bare packages of those names must never be installed: PyPI's `kernels` is another project.
"""

from setuptools import find_packages, setup

MAPPED = {"fastbyol.kernels": "kernels", "fastbyol.data_prep": "data_prep"}


def packages() -> list[str]:
    """List fastbyol's own packages, then the mapped folders' with everything below them."""
    found = [
        "fastbyol",
        *(f"fastbyol.{name}" for name in find_packages("fastbyol", exclude=["kernels*", "data_prep*"])),
    ]
    for package, folder in MAPPED.items():
        found += [package, *(f"{package}.{name}" for name in find_packages(folder))]
    return found


setup(packages=packages(), package_dir=MAPPED)
