"""`NKIObject`: the base of configuration classes in kernels."""

from __future__ import annotations

import dataclasses
import inspect

from .errors import LanguageError


def _is_field_value(value) -> bool:
    """A class attribute that holds data, not code."""
    return not (
        inspect.isroutine(value)
        or inspect.isclass(value)
        or isinstance(value, (property, staticmethod, classmethod))
        or (hasattr(value, "__get__") and not isinstance(value, dataclasses.Field))
    )


class NKIObject:
    """Subclasses behave like dataclasses; un-annotated class attributes are fields too.

    A class that defines `__init__` keeps it. Otherwise one is generated that takes every field by position or name
    (bases first, annotated fields before plain ones) and calls `__post_init__` if there is one.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        own: dict[str, object] = {}
        for name in inspect.get_annotations(cls):
            own[name] = cls.__dict__.get(name, dataclasses.MISSING)
        for name, value in cls.__dict__.items():
            if not name.startswith("__") and name not in own and _is_field_value(value):
                own[name] = value
        inherited = {}
        for base in reversed(cls.__mro__[1:]):
            inherited |= base.__dict__.get("_nki_fields", {})
        cls._nki_fields = inherited | own
        if "__init__" not in cls.__dict__ and not _has_custom_init(cls):
            cls.__init__ = _generated_init


def _has_custom_init(cls) -> bool:
    """A base between the class and NKIObject wrote its own `__init__`."""
    for base in cls.__mro__[1:]:
        if base is NKIObject or base is object:
            return False
        if "__init__" in base.__dict__:
            return base.__dict__["__init__"] is not _generated_init
    return False


def _default(name: str, value):
    if isinstance(value, dataclasses.Field):
        if value.default is not dataclasses.MISSING:
            return value.default
        if value.default_factory is not dataclasses.MISSING:
            return value.default_factory()
        value = dataclasses.MISSING
    if value is dataclasses.MISSING:
        raise LanguageError(f"missing argument {name!r}")
    return value


def _generated_init(self, *args, **kwargs):
    fields = {k: v for k, v in type(self)._nki_fields.items() if k != "_nki_fields"}
    if len(args) > len(fields):
        raise LanguageError(f"{type(self).__name__} has {len(fields)} fields, got {len(args)} arguments")
    given = dict(zip(fields, args, strict=False))
    for name, value in kwargs.items():
        if name not in fields or name in given:
            raise LanguageError(f"{type(self).__name__} has no field {name!r}, or it was given twice")
        given[name] = value
    for name, default in fields.items():
        object.__setattr__(self, name, given[name] if name in given else _default(name, default))
    post = getattr(self, "__post_init__", None)
    if post is not None:
        post()
