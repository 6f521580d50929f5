"""The other end of `benchmarks.weight_push`'s bare broadcast: `push_peer PORT BYTES BUCKET_BYTES`."""

import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore  # torch.distributed hides that it has them

TIMEOUT = timedelta(seconds=60)


def main() -> None:
    port, num_bytes, bucket_bytes = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    store = PrefixStore("cpu/", PrefixStore("raw/", PrefixStore("raw", TCPStore("127.0.0.1", port, timeout=TIMEOUT))))
    group: Any = dist.ProcessGroupGloo(store, 1, 2, TIMEOUT)
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    data = torch.zeros(bucket_bytes, dtype=torch.uint8)
    for left in range(num_bytes, 0, -bucket_bytes):
        group.broadcast([data[: min(left, bucket_bytes)]], options).wait()
    print("received", flush=True)


if __name__ == "__main__":
    main()
