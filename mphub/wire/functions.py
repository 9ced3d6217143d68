"""Functions that are sent again and again: one that no other process can import is pickled and loaded once, not for each call."""

from __future__ import annotations

import contextlib
import dis
import pickle
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, Final

from mphub.wire import codec
from mphub.wire.codec import SCALARS

MOST: Final = 64
"""Functions that are known at a time, of who sends and of who loads."""
SETS_GLOBALS: Final = frozenset({"STORE_GLOBAL", "DELETE_GLOBAL"})
NOTHING: Final = object()


class ByValue:
    """The pickle of a function, for as long as all that went into it is what it was; loaded, it is the function.

    Raises LookupError: it reads what may change unseen; PayloadError: it cannot be pickled.
    """

    __slots__ = ("data", "functions", "reads")

    def __init__(self, function: FunctionType) -> None:
        self.functions: dict[FunctionType, tuple[CodeType, object]] = {}
        """It, and those that it calls that go by value too."""
        self.reads: list[tuple[dict[str, Any], str, object]] = []
        """A namespace, a name, and what was found there."""
        self._look_into(function)
        self.data = zlib.compress(codec.encode(function, "function"))  # short, and what it names is not searched for in each payload

    def _look_into(self, function: FunctionType) -> None:
        self.functions[function] = function.__code__, function.__defaults__
        values = function.__defaults__ or ()
        if function.__closure__ or function.__kwdefaults__ or function.__dict__ or not all(type(value) in SCALARS for value in values):
            raise LookupError
        for name in names_in(function.__code__):
            value = function.__globals__.get(name, NOTHING)
            self.reads.append((function.__globals__, name, value))
            if value is NOTHING or type(value) in SCALARS or is_found_by_name(value):
                continue
            if type(value) is not FunctionType:
                raise LookupError
            if value not in self.functions:
                self._look_into(value)

    def is_true(self) -> bool:
        """Say whether it is still the pickle of that function."""
        for function, (code, defaults) in self.functions.items():
            if function.__code__ is not code or function.__defaults__ is not defaults or function.__kwdefaults__ or function.__dict__:
                return False
        return all(namespace.get(name, NOTHING) is value for namespace, name, value in self.reads)

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return load, (self.data,)


class Functions:
    """Those that this process has sent."""

    def __init__(self) -> None:
        self._known: dict[FunctionType, ByValue | None] = {}

    def pack(self, function: Callable[..., Any]) -> object:
        """Return what to send for a function, which is itself if it is found by its name, or may change unseen.

        Raises PayloadError: it cannot be pickled.
        """
        if type(function) is not FunctionType:
            return function
        try:
            packed = self._known[function]
        except KeyError:
            packed = self._learn(function)
        if packed is not None and not packed.is_true():
            packed = self._learn(function)
        return function if packed is None else packed

    def _learn(self, function: FunctionType) -> ByValue | None:
        packed = None
        if not is_found_by_name(function):
            with contextlib.suppress(LookupError):
                packed = ByValue(function)
        if len(self._known) >= MOST:
            self._known.clear()
        self._known[function] = packed
        return packed


@lru_cache(MOST)
def load(data: bytes) -> Any:
    """Load a function; the next call with it gets the same one."""
    return codec.loads(zlib.decompress(data))


def names_in(code: CodeType) -> Iterator[str]:
    """Yield the names of globals, and of attributes, in a function and those that it makes.

    Raises LookupError: it sets some.
    """
    if any(step.opname in SETS_GLOBALS for step in dis.get_instructions(code)):
        raise LookupError
    yield from code.co_names
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from names_in(each)


def is_found_by_name(value: object) -> bool:
    """Say whether what travels is a name, whatever becomes of the thing."""
    if isinstance(value, ModuleType):
        return sys.modules.get(value.__name__) is value and not codec.names_main(value.__name__.encode())
    if not isinstance(value, type | FunctionType | BuiltinFunctionType):
        return False
    try:
        return not codec.names_main(pickle.dumps(value, 5))
    except Exception:  # pickling says in many ways that there is no such name
        return False
