"""Lists the packages: `hata` and `tune` as they lie, and the folder `backends/` as `hata.backends`.

Everything else about the distribution is in pyproject.toml.
"""

from setuptools import find_packages, setup

named = find_packages(include=["hata", "hata.*", "tune", "tune.*"])
mapped = ["hata." + name for name in find_packages(include=["backends", "backends.*"])]

setup(
    packages=named + mapped,
    package_dir={"hata.backends": "backends"},
    package_data={"": ["*.cu", "*.cuh", "py.typed"], "hata": ["profiles/*.yaml"]},
    # Only what is listed above: without this, everything git or MANIFEST.in knows would be added.
    include_package_data=False,
    zip_safe=False,
)
