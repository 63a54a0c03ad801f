"""Every example in a docstring runs."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import flowgen
from flowgen import bijections, models
from flowgen.bijections.base import Bijection

OPTIONAL = {"telegram"}  # packages that only one module needs


def modules() -> list[str]:
    walked = pkgutil.walk_packages(flowgen.__path__, "flowgen.")
    return ["flowgen", *(module.name for module in walked if module.name != "flowgen.__main__")]


@pytest.mark.parametrize("name", modules())
def test_examples_run(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"needs {error.name}")
    assert doctest.testmod(module).failed == 0


def test_every_public_bijection_and_model_has_an_example():
    for package, base in ((bijections, Bijection), (models, models.GenerativeModel)):
        for name in package.__all__:
            exported = getattr(package, name)
            if inspect.isclass(exported) and issubclass(exported, base):
                assert inspect.isabstract(exported) or "Example:" in exported.__doc__, name


def test_every_public_function_has_an_example():
    for name in flowgen.__all__:
        exported = getattr(flowgen, name)
        assert not inspect.isfunction(exported) or "Example:" in exported.__doc__, name
