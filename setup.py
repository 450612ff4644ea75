"""Makes an editable installation of a checkout find `baselines` and `eval` too. What is built to be published has
`trl_proxy` alone, as pyproject.toml says."""

from setuptools import find_namespace_packages, setup
from setuptools.command.editable_wheel import editable_wheel


class EditableCheckout(editable_wheel):
    def run(self):
        self.distribution.packages += find_namespace_packages(include=["baselines*", "eval*"])
        super().run()


setup(cmdclass={"editable_wheel": EditableCheckout})
