"""Helpers of all packages, and lazy exports."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

LazyExports = tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]


def lazy_exports(package: str, modules: Mapping[str, str]) -> LazyExports:
    """Return `__getattr__`, `__dir__` and `__all__` of a package that imports names on first use.

    Args:
        package: Name of the package.
        modules: Exported names, and the modules of the package that define them. A module that
            is exported itself is its own value.

    Example:
        >>> load, _, names = lazy_exports("os", {"join": "path"})
        >>> load("join")("a", "b"), names
        ('a/b', ['join'])
    """

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(f"{package}.{modules[name]}")
        return module if name == modules[name] else getattr(module, name)

    return load, lambda: sorted(modules), sorted(modules)


def as_list(value: Any) -> list[Any]:
    """Return a list or a tuple as a list, and any other value as a list of one."""
    return list(value) if isinstance(value, list | tuple) else [value]
