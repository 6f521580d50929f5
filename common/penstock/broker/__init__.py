"""All of Penstock's calls to Redis; no other package calls it."""

from penstock.broker.connect import connect, examine_server
from penstock.broker.keys import Keys, Stage
from penstock.broker.memory import MemoryUse, check_memory, memory_use, needed_bytes
from penstock.broker.queue import Queue
from penstock.broker.worker import Delivery, Served, Worker

__all__ = [
    "Delivery",
    "Keys",
    "MemoryUse",
    "Queue",
    "Served",
    "Stage",
    "Worker",
    "check_memory",
    "connect",
    "examine_server",
    "memory_use",
    "needed_bytes",
]
