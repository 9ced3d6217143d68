"""A function that is sent again and again is pickled once, but never one that may do something else by then."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest

from mphub import PayloadError
from mphub.wire import codec
from mphub.wire.functions import MOST, ByValue, Functions, load


def make(source: str, **values: Any) -> Any:
    """Return the function ``f`` of a script."""
    namespace: dict[str, Any] = {"__name__": "__main__", **values}
    exec(source, namespace)  # as a script's
    return namespace["f"]


def sent(function: Callable[..., Any], functions: Functions) -> Any:
    """Return it as it arrives."""
    return codec.loads(codec.encode((functions.pack(function),)))[0]


def test_one_that_has_a_name_travels_by_that() -> None:
    functions = Functions()
    assert [functions.pack(one) for one in (math.sqrt, json.dumps, pow, print)] == [math.sqrt, json.dumps, pow, print]
    assert sent(json.dumps, functions) is json.dumps


@pytest.mark.parametrize(
    ("source", "values"),
    [
        ("def f(x): return x + 1", {}),
        ("def f(x): return math.floor(x) + 1", {"math": math}),
        ("def g(x): return x + ONE\ndef f(x): return g(x) if x else f(1)", {"ONE": 1}),
        ("def f(x, by=1): return sum([y + by for y in [x]])", {}),
        ("def f(x): return loads(dumps(x)) + 1", {"loads": json.loads, "dumps": json.dumps}),
    ],
)
def test_one_of_a_script_is_pickled_and_loaded_once(source: str, values: dict[str, Any]) -> None:
    function, functions = make(source, **values), Functions()
    packed = functions.pack(function)
    assert isinstance(packed, ByValue)
    assert functions.pack(function) is packed
    assert sent(function, functions)(1) == 2
    assert sent(function, functions) is sent(function, functions)
    assert not codec.names_main(codec.encode((packed,)))


@pytest.mark.parametrize(
    ("source", "values"),
    [
        ("def f(x): return LIST[x]", {"LIST": [1]}),
        ("def f(x):\n    global N\n    N = x", {"N": 1}),
        ("def make(k):\n    return lambda x: x + k\nf = make(1)", {}),
        ("def f(x, to=[]): to.append(x)", {}),
        ("def f(x, *, k=1): return k", {}),
        ("def f(x): return 1\nf.k = 2", {}),
        ("class C: n = 1\ndef f(x): return C.n", {}),
        ("def g(x): return LIST\ndef f(x): return g(x)", {"LIST": [1]}),
        ("def f(x): return module.n", {"module": type(math)("made here")}),
    ],
)
def test_one_that_may_change_unseen_is_sent_as_it_is(source: str, values: dict[str, Any]) -> None:
    function = make(source, **values)
    assert Functions().pack(function) is function


def test_what_it_reads_may_change() -> None:
    function, functions = make("def f(x): return len(x) + N + g()\ndef g(): return M", N=1, M=10), Functions()
    assert sent(function, functions)("") == 11
    function.__globals__["N"] = 2
    assert sent(function, functions)("") == 12
    function.__globals__["M"] = 20
    assert sent(function, functions)("") == 22
    function.__globals__["g"] = make("def f(): return 3")
    assert sent(function, functions)("") == 5
    function.__globals__["len"] = make("def f(x): return 100")
    assert sent(function, functions)("") == 105
    function.__globals__["len"] = None
    with pytest.raises(TypeError):
        sent(function, functions)("")
    function.__globals__["N"] = [1]
    assert functions.pack(function) is function


def test_it_may_change_itself() -> None:
    function, functions = make("def f(x, by=1): return x + by"), Functions()
    assert sent(function, functions)(1) == 2
    function.__defaults__ = (2,)
    assert sent(function, functions)(1) == 3
    function.__code__ = make("def f(x, by): return x * 10").__code__
    assert sent(function, functions)(1) == 10
    function.by = 3
    assert functions.pack(function) is function


def test_what_it_calls_may_change_itself() -> None:
    function, functions = make("def g(): return 1\ndef f(): return g()"), Functions()
    assert sent(function, functions)() == 1
    function.__globals__["g"].__code__ = make("def f(): return 2").__code__
    assert sent(function, functions)() == 2


def test_one_that_cannot_be_pickled_is_refused() -> None:
    function = make("def f(x): return 1")
    function.__annotations__["x"] = threading.Lock()
    with pytest.raises(PayloadError, match="function cannot be pickled"):
        Functions().pack(function)


def test_hardly_any_are_kept() -> None:
    functions = Functions()
    for n in range(3 * MOST):
        assert sent(make(f"def f(x): return x + {n}"), functions)(1) == n + 1
    assert len(functions._known) <= MOST
    assert load.cache_info().currsize <= MOST
