"""A multiprocessing hub for GIL-free workers: publish under a key; every subscriber is a supervised process of its own."""

from mphub.errors import (
    AmbiguousKey,
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
)
from mphub.events import DeadLetter, Event, EventId, Notice, Progress, Topic
from mphub.executor import HubExecutor
from mphub.hub import EventHub
from mphub.observe.statistics import HubStatistics, SubscriberStatistics
from mphub.options import Inbox, Limits, Rate, Recycle, Restart, Retry, Snapshot, Stop
from mphub.publisher import HubQueue, Publisher, Transaction
from mphub.reply import Reply
from mphub.results import Results
from mphub.subscriber import Subscriber, current_event, publish
from mphub.subscription import Subscription
from mphub.tap import Tap

__version__ = "0.1.0"

__all__ = [
    "AmbiguousKey",
    "DeadLetter",
    "DeadLettersLeft",
    "DrainTimeout",
    "Dropped",
    "Event",
    "EventExpired",
    "EventHub",
    "EventId",
    "HandlerCrashed",
    "HandlerTimeout",
    "HubClosed",
    "HubError",
    "HubExecutor",
    "HubExists",
    "HubFailed",
    "HubQueue",
    "HubStatistics",
    "Inbox",
    "InvalidKey",
    "InvalidOption",
    "JournalError",
    "Limits",
    "MphubError",
    "NameTaken",
    "NoSubscriber",
    "Notice",
    "PayloadError",
    "Progress",
    "Publisher",
    "Rate",
    "Recycle",
    "Reject",
    "RemoteError",
    "RemoteTraceback",
    "Reply",
    "Restart",
    "Results",
    "Retry",
    "RetryLater",
    "Snapshot",
    "StartFailed",
    "Stop",
    "Subscriber",
    "SubscriberFatal",
    "SubscriberPaused",
    "SubscriberStatistics",
    "Subscription",
    "Tap",
    "Topic",
    "Transaction",
    "UsageError",
    "WorkError",
    "current_event",
    "publish",
]
