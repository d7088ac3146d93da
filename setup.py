"""What pyproject.toml cannot say: the top-level `configs` travel in the wheel as `jaxsearch.configs`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["jaxsearch", "jaxsearch.*"]), "jaxsearch.configs"],
    package_dir={"jaxsearch.configs": "configs"},
)
