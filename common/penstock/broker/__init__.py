"""Everything that Penstock says to Redis, and nothing else does."""

from penstock.broker.keys import Keys, Stage
from penstock.broker.queue import Announcement, Queue, ServiceRecord, connect
from penstock.broker.worker import Delivery, Worker

__all__ = ["Announcement", "Delivery", "Keys", "Queue", "ServiceRecord", "Stage", "Worker", "connect"]
