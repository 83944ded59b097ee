"""Stands in for PyAV on a machine that has none: ComfyUI imports it, and nothing in `bench gpu` decodes with it."""

import importlib.abc
import importlib.machinery
import sys
import types


class Anything(type):
    """A class whose every attribute is such a class."""

    def __getattr__(cls, name):
        return named(name)


def named(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything(name, (), {})


class Module(types.ModuleType):
    def __getattr__(self, name):
        return named(name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Every module below `av`."""

    def find_spec(self, name, path=None, target=None):
        below = name.startswith("av.")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if below else None

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module): ...


sys.meta_path.insert(0, Finder())


def __getattr__(name):
    return named(name)
