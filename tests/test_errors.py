"""Errors: the tree, the words, and that each travels between processes."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from mphub import errors
from mphub.errors import (
    AmbiguousKey,
    ArchiveError,
    BatchFailed,
    DeadLettersLeft,
    DrainTimeout,
    Dropped,
    EventExpired,
    HandlerCrashed,
    HandlerTimeout,
    HubClosed,
    HubError,
    HubExists,
    HubFailed,
    InvalidKey,
    InvalidOption,
    JournalError,
    MphubError,
    NameTaken,
    NoSubscriber,
    PayloadError,
    Reject,
    RemoteError,
    RemoteTraceback,
    RetryLater,
    StartFailed,
    SubscriberFatal,
    SubscriberPaused,
    UsageError,
    WorkError,
    load_error,
)

EXAMPLES: list[Exception] = [
    MphubError("base"),
    UsageError("usage"),
    InvalidKey("bad key"),
    InvalidOption("bad option"),
    PayloadError("bad payload"),
    NameTaken("taken"),
    NoSubscriber("nobody"),
    AmbiguousKey("two"),
    HubError("hub"),
    HubClosed("closed"),
    HubExists("exists"),
    HubFailed("failed"),
    StartFailed("start"),
    JournalError("journal"),
    ArchiveError("archive"),
    WorkError("work"),
    HandlerCrashed(exit="SIGSEGV", pid=12),
    HandlerCrashed(3, 12),
    HandlerTimeout(seconds=1.5),
    EventExpired("late"),
    Dropped(reason="purge"),
    SubscriberFatal(name="resize"),
    SubscriberPaused(name="resize"),
    DeadLettersLeft(counts={"resize": {"crash": 1, "exception": 2}}, unmatched={"oders.new": 4}),
    DrainTimeout("7 events are left", pending={"resize": 7}),
    RemoteError("lost"),
    RemoteTraceback(text="Traceback ..."),
    Reject(reason="no such order"),
    RetryLater(seconds=0.5),
    BatchFailed({}, results=[1]),  # exceptions are equal to nothing but themselves
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("protocol", [2, 5])
def test_every_error_pickles_with_its_attributes(error: Exception, protocol: int) -> None:
    error.__notes__ = ["seen in replica 2"]
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is type(error)
    assert vars(copy) == vars(error)
    assert copy.args == error.args
    assert str(copy) == str(error) != ""


def test_every_error_has_an_example() -> None:
    public = (each for name, each in vars(errors).items() if not name.startswith("_"))
    defined = {each for each in public if isinstance(each, type) and issubclass(each, Exception)}
    assert defined == {type(error) for error in EXAMPLES}


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (InvalidKey, (UsageError, ValueError)),
        (InvalidOption, (UsageError, ValueError)),
        (PayloadError, (UsageError, TypeError)),
        (NameTaken, (UsageError, ValueError)),
        (NoSubscriber, (UsageError, LookupError)),
        (AmbiguousKey, (UsageError,)),
        (HubClosed, (HubError,)),
        (HubExists, (HubError,)),
        (HubFailed, (HubError,)),
        (StartFailed, (HubError,)),
        (JournalError, (HubError,)),
        (ArchiveError, (HubError,)),
        (HandlerCrashed, (WorkError,)),
        (HandlerTimeout, (WorkError, TimeoutError)),
        (EventExpired, (WorkError, TimeoutError)),
        (Dropped, (WorkError,)),
        (SubscriberFatal, (WorkError,)),
        (SubscriberPaused, (WorkError,)),
        (DeadLettersLeft, (WorkError,)),
        (DrainTimeout, (MphubError, TimeoutError)),
        (RemoteError, (MphubError,)),
    ],
)
def test_errors_are_caught_by_their_bases(error: type[Exception], bases: tuple[type[Exception], ...]) -> None:
    assert all(issubclass(error, base) for base in (*bases, MphubError))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (HandlerCrashed("SIGKILL", 7), ["7", "SIGKILL"]),
        (HandlerTimeout(1.5), ["1.5 s"]),
        (Dropped("purge"), ["purge"]),
        (SubscriberFatal("resize"), ["'resize'", "FATAL"]),
        (SubscriberPaused("resize"), ["'resize'", "PAUSED"]),
        (DeadLettersLeft({"a": {"crash": 1, "exception": 2}}, {"b": 4}), ["a: 1 crash, 2 exception", "'b'", "redrive", "check=False"]),
        (DrainTimeout("7 events are left", {"a": 7}), ["7 events are left"]),
    ],
)
def test_messages_say_what_happened_and_what_to_do(error: Exception, words: list[str]) -> None:
    assert [word for word in words if word not in str(error)] == []


def test_a_remote_traceback_is_shown_whole_below_its_name() -> None:
    assert str(RemoteTraceback("Traceback of the child")) == "\nTraceback of the child"


def test_what_handlers_raise_is_no_error_of_the_hub() -> None:
    assert not issubclass(Reject, MphubError)
    assert not issubclass(RetryLater, MphubError)


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), "1", True])
def test_retry_later_takes_seconds(seconds: Any) -> None:
    with pytest.raises(InvalidOption, match="seconds"):
        RetryLater(seconds)


def test_what_is_no_exception_is_told_as_one() -> None:
    assert isinstance(load_error(pickle.dumps(3)), RemoteError)
    assert "ValueError: no" in str(load_error(b"garbage", "Traceback\nValueError: no"))
