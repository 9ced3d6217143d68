"""Topics, event ids, events, dead letters, notices, and statistics."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mphub.errors import HandlerCrashed, RemoteError
from mphub.events import DeadLetter, Event, EventId, Notice, Progress, Topic
from mphub.observe.statistics import HubStatistics, SubscriberStatistics, percentiles

PUBLISHERS = st.integers(0, 2**64 - 1)
NUMBERS = st.integers(0, 2**40 - 1)
ID = EventId.make(0xABC, 7)
SAMPLES = st.lists(st.floats(0, 1e6), min_size=1, max_size=300)


class Order:
    """A payload."""


def letter(payload: bytes = b"", error: bytes = b"", traceback: str = "") -> DeadLetter:
    return DeadLetter(ID, "orders.new", "resize", "exception", 1, traceback, None, None, 12.5, None, "", False, payload, error)


def test_a_topic_is_its_key_and_type() -> None:
    topic = Topic("orders.created", Order)
    assert (topic.key, topic.payload_type) == ("orders.created", Order)
    assert repr(topic) == "Topic('orders.created', Order)"
    assert repr(Topic[object]("orders.created")) == "Topic('orders.created')"
    assert not isinstance(topic, str)


def test_equal_topics_are_one_key_of_a_dict() -> None:
    topic = Topic("orders.created", Order)
    assert {topic: 1}[pickle.loads(pickle.dumps(topic))] == 1
    assert len({topic, Topic("orders.created", int)}) == 2


@given(PUBLISHERS, NUMBERS)
def test_an_id_holds_publisher_and_number(publisher: int, number: int) -> None:
    made = EventId.make(publisher, number)
    assert (made.publisher, made.number) == (publisher, number)
    assert pickle.loads(pickle.dumps(made)) == made


@given(PUBLISHERS, NUMBERS)
def test_an_id_is_shown_as_26_hex_digits(publisher: int, number: int) -> None:
    made = EventId.make(publisher, number)
    assert str(made) == repr(made) == f"{made}" == f"{publisher:016x}{number:010x}"
    assert EventId(str(made), 16) == made


def test_an_id_stays_an_id_when_pickled() -> None:
    assert type(pickle.loads(pickle.dumps(ID))) is EventId


def test_events_notices_and_progress_pickle_and_are_frozen() -> None:
    event = Event(ID, "orders.new", None, "eu", 0, {"trace": "1"}, 12.5, 1, 0, False)
    notice = Notice("death", "warning", "resize", "died", 12.5, {"pid": 3})
    for value in (event, notice, Progress(1, 2, 0, 5.0), letter(b"x")):
        assert pickle.loads(pickle.dumps(value)) == value
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, dataclasses.fields(value)[0].name, 1)


@pytest.mark.parametrize("payload", [None, 0, "", [], {"a": 1}])
def test_a_dead_letter_gives_its_payload_falsy_ones_too(payload: object) -> None:
    assert letter(pickle.dumps(payload)).payload == payload


def test_a_dead_letter_gives_its_error_with_the_remote_traceback() -> None:
    error = letter(error=pickle.dumps(HandlerCrashed("SIGSEGV", 3)), traceback="stack of the child").error
    assert isinstance(error, HandlerCrashed)
    assert error.exit == "SIGSEGV"
    assert str(error.__cause__) == "\nstack of the child"


def test_a_dead_letter_without_exception_has_no_error() -> None:
    assert letter().error is None


def test_a_dead_letter_whose_error_cannot_be_loaded_says_so() -> None:
    assert isinstance(letter(error=b"\x80\x05cmissing_module\nGone\n.").error, RemoteError)


def test_showing_a_dead_letter_loads_nothing_and_hides_the_bytes() -> None:
    shown = repr(letter(b"rubbish", b"rubbish"))
    assert "orders.new" in shown
    assert "rubbish" not in shown


def test_statistics_have_the_words_of_the_contract() -> None:
    words = "state pids accepted waiting running handled failed retried dead dropped restarts mean p50 p95 p99 cpu rss"
    assert [each.name for each in dataclasses.fields(SubscriberStatistics)] == words.split()
    assert [each.name for each in dataclasses.fields(HubStatistics)] == ["accepted", "unmatched", "pids", "subscribers"]


def test_no_samples_are_zeros() -> None:
    assert percentiles([]) == (0.0, 0.0, 0.0)


def test_percentiles_are_by_rank() -> None:
    assert percentiles([float(each) for each in range(101, 0, -1)]) == (51, 96, 100)
    assert percentiles([3.0]) == (3.0, 3.0, 3.0)


@given(SAMPLES)
def test_percentiles_are_samples_in_rising_order(samples: list[float]) -> None:
    p50, p95, p99 = percentiles(samples)
    assert {p50, p95, p99} <= set(samples)
    assert min(samples) <= p50 <= p95 <= p99 <= max(samples)
