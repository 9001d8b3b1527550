"""What handlers written for QJazz make their settings of.

With pydantic they are its models, as in QJazz; without it, classes with the same
attributes, of the types that their annotations name.
"""

import pathlib
import types
import typing


class Mistake(ValueError):
    """A setting that is missing, unknown or none of its type."""


class Model:
    """Attributes by annotation. Settings that nobody declared are refused."""

    _unknown = "forbid"

    def __init_subclass__(cls, extra=None, frozen=True, **_):
        if extra:
            cls._unknown = extra

    def __init__(self, **values):
        declared = {name: kind for name, kind in _hints(type(self)).items() if not name.startswith("_")}
        unknown = set(values) - set(declared)
        if unknown and self._unknown == "forbid":
            raise Mistake(f"nobody asks for {', '.join(sorted(unknown))}")
        for name, kind in declared.items():
            if name in values:
                vars(self)[name] = _understood(name, kind, values[name])
            elif not hasattr(type(self), name):
                raise Mistake(f"{name} is missing")

    def __setattr__(self, name, value):
        raise AttributeError(f"{name} is as it was configured")

    @classmethod
    def model_validate(cls, values):
        return cls(**values)

    def model_dump(self):
        return {name: getattr(self, name) for name in _hints(type(self)) if not name.startswith("_")}


def _hints(cls):
    hints = typing.get_type_hints(cls)
    return {name: kind for name, kind in hints.items() if typing.get_origin(kind) is not typing.ClassVar}


def _understood(name, kind, value):
    """Settings are text, and a handler asks for numbers, switches and paths, too."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next((it for it in typing.get_args(kind) if it is not type(None)), str)
    if not isinstance(value, str) or kind not in (bool, int, float, pathlib.Path):
        return value
    try:
        return _switch(value) if kind is bool else kind(value)
    except ValueError:
        # A value may be a password.
        raise Mistake(f"{name} is no {kind.__name__}") from None


def _switch(value):
    words = {"1": True, "yes": True, "true": True, "on": True, "0": False, "no": False, "false": False, "off": False}
    try:
        return words[value.lower()]
    except KeyError:
        raise ValueError(value) from None


def offered():
    """What handlers find as ``qjazz_contrib.core.config``."""
    # Few have such a handler, so nobody else waits for pydantic.
    try:
        from pydantic import BaseModel, ValidationError
    except ImportError:
        BaseModel, ValidationError = Model, Mistake

    # What is refused may be a password.
    class ConfigBase(BaseModel, frozen=True, extra="forbid", hide_input_in_errors=True):
        pass

    class ConfigSettings(BaseModel, frozen=True, extra="ignore", hide_input_in_errors=True):
        pass

    return {
        "ConfigBase": ConfigBase,
        "ConfigSettings": ConfigSettings,
        "ConfigError": ValidationError,
        "section": section,
    }


def section(name, **_):
    """Sections of QJazz's own file, which nobody reads here."""
    return lambda model: model


def made(handler, config):
    """A handler with its settings, as QJazz makes it."""
    model = getattr(handler, "Config", None)
    if model is None:
        return handler(**config)
    return handler(model.model_validate(config) if hasattr(model, "model_validate") else model(**config))
