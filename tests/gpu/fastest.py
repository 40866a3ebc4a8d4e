"""Print the fastest algorithm at every size of a table of `nvcoll bench --json`, beside the peers.

python3 -m tests.gpu.fastest FILE
"""

import json
import sys
from pathlib import Path


def microseconds(row):
    return "-" if row["time_us"] is None else f"{row['time_us']:.2f}"


def bandwidth(row):
    # The host's time of an eager call moves no bytes, so such rows have no bandwidth.
    return "-" if row["busbw_gbs"] is None else f"{row['busbw_gbs']:.1f}"


def lines(document):
    """Yield a line for each size: microseconds a call, bus bandwidth in GB/s, and the peers' microseconds."""
    sizes = {}
    for row in document["rows"]:
        sizes.setdefault(row["bytes"], []).append(row)
    for nbytes, rows in sizes.items():
        timed = [row for row in rows if row["time_us"] is not None]
        if not timed:
            yield f"{nbytes:>10}  none was timed"
            continue
        row = min(timed, key=lambda one: one["time_us"])
        peers = "  ".join(f"{name} {microseconds(peer)}" for name, peer in row["peers"].items())
        yield f"{nbytes:>10}  {row['algorithm']:<30} {microseconds(row):>9} {bandwidth(row):>7} GB/s  {peers}"


if __name__ == "__main__":
    print("\n".join(lines(json.loads(Path(sys.argv[1]).read_text()))))
