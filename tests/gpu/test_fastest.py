"""The shortest form of a benchmark's table."""

import json
from dataclasses import replace

from nvcoll.cli.bench import report
from nvcoll.cli.bench.gpu.report import merged
from tests.cli.test_bench import row, timing
from tests.gpu.fastest import lines


def told(*rows):
    return list(lines(json.loads(json.dumps({"rows": [one.fields() for one in rows]}))))


def test_the_fastest_of_each_size_beside_the_peers():
    peer = report.Outcome(None, timing([4e-6] * 3))
    slow = replace(row(1024, 3e-6, peers={"nccl": peer}), algorithm="ring/simple")
    fast = replace(row(1024, 2e-6, peers={"nccl": peer}), algorithm="one_shot/simple")
    refused = report.Outcome(None, None, "no")
    larger = replace(row(4096, 8e-6, ranks=2, peers={"nccl": refused}), algorithm="two_shot/simple")
    small, large = told(slow, fast, larger)
    assert small.split() == ["1024", "one_shot/simple", "2.00", "0.8", "GB/s", "nccl", "4.00"]
    assert large.split() == ["4096", "two_shot/simple", "8.00", "0.5", "GB/s", "nccl", "-"]


def test_what_was_refused_or_wrong_is_not_the_fastest():
    refused = replace(row(8), outcome=report.Outcome(None, None, "no"))
    assert told(refused, row(8, 2e-6))[0].split()[:3] == ["8", "ring/simple", "2.00"]
    assert told(refused) == ["         8  none was timed"]


def test_eager_rows_have_no_bandwidth():
    assert told(merged(row(8, 2e-6), eager=True, link=None))[0].split()[:5] == ["8", "ring/simple", "2.00", "-", "GB/s"]
