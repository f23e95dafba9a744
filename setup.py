"""Beside pyproject.toml: the stored settings below configs/ go into the wheel, as gfml/configs."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Modules and package data as always, then the settings; an editable install reads those of the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib, "gfml", "configs")
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree("configs", folder)


setup(cmdclass={"build_py": BuildWithConfigs})
