from __future__ import annotations
from deploycc.remote.work import DeviceResult


def test_smoke(make_work, local, device, run):
    import time

    t = time.time()
    found = run(make_work(), device)
    print(time.time() - t)
    for f in found.failures:
        print(f.what, f.error.fix, getattr(f.error, "__notes__", []))
    assert isinstance(found.outcomes[0], DeviceResult)
    print(found.outcomes[0].bench.environment, found.outcomes[0].bench.measurements[0].p50_ms)
    import os

    os.system(f"find '{device[9:].partition('/')[2]}' /{device[9:].partition('/')[2]!r}")
