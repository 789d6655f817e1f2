from __future__ import annotations

from typing import Any

import pytest

from deploycc.bench.scenario import Scenario, parse_batches, parse_share, scenario_of
from deploycc.errors import UsageError


def test_every_scenario_has_its_defaults():
    assert scenario_of("single-stream") == Scenario()
    assert scenario_of("multi-stream").streams == 4
    assert scenario_of("offline").batches == (1, 2, 4, 8)
    server = scenario_of("server", qps=50.0, latency_bound_ms=20.0, streams=2)
    assert (server.qps, server.latency_bound_ms, server.streams, server.percentile) == (50.0, 20.0, 2, 0.99)
    assert scenario_of("offline", streams=2, batches=(4,)).streams == 2


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("batch", {}, "there is no scenario 'batch'"),
        ("single-stream", {"streams": 2}, "single-stream is one stream, not 2"),
        ("single-stream", {"batches": (1, 2)}, "single-stream takes one batch size, not 2"),
        ("server", {}, "needs the rate at which queries come"),
        ("offline", {"qps": 5.0}, "offline has no arrivals and no latency bound"),
        ("multi-stream", {"latency_bound_ms": 5.0}, "has no arrivals and no latency bound"),
        ("offline", {"percentile": 0.9}, "holds no percentile against a bound"),
        ("offline", {"batches": (4, 4)}, "batch sizes are \\(4, 4\\)"),
    ],
)
def test_what_does_not_go_together_is_refused(kind: str, options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        scenario_of(kind, **options)


def test_batches_and_shares_are_parsed_or_refused():
    assert parse_batches("1, 4,16") == (1, 4, 16)
    assert (parse_share("--x", "5%"), parse_share("--x", "0.05")) == (0.05, 0.05)
    for text in ("", "a", "0", "1,,2", "-1"):
        with pytest.raises(UsageError, match="--batch is"):
            parse_batches(text)
    for text in ("", "5", "0%", "100%", "x%"):
        with pytest.raises(UsageError, match="--max-slowdown is"):
            parse_share("--max-slowdown", text)
