"""Every benchmark by name, with how much it does: enough for figures, or for a quick look."""

from __future__ import annotations

from typing import Final

from . import callback, deliveries, designs, hanging, latency, route, scale, stages, tenants
from .harness import Benchmark

BENCHMARKS: Final[dict[str, Benchmark]] = {
    "deliveries": Benchmark(
        deliveries.instant,
        full={"rounds": 5, "count": 8000, "limit": 8000},
        quick={"rounds": 1, "count": 800, "limit": 2000},
        promises=("limit",),
    ),
    "designs": Benchmark(
        designs.instant,
        full={"rounds": 3, "count": 6000, "others": 400, "forking": 60},
        quick={"rounds": 1, "count": 800, "others": 120, "forking": 16},
        promises=("job-per-attempt", "django-webhook"),
    ),
    "slow": Benchmark(
        designs.slow,
        full={"rounds": 3, "count": 12_000, "others": 40},
        quick={"rounds": 1, "count": 800, "others": 16},
        promises=("naive",),
    ),
    "one-host": Benchmark(
        deliveries.one_host, full={"rounds": 1, "count": 800}, quick={"rounds": 1, "count": 200}
    ),
    "two-dispatchers": Benchmark(
        deliveries.two_dispatchers,
        full={"rounds": 2, "count": 1200},
        quick={"rounds": 1, "count": 600},
        promises=("two-dispatchers",),
    ),
    "processes": Benchmark(
        deliveries.processes,
        full={"rounds": 3, "count": 4000},
        quick={"rounds": 1, "count": 500},
        promises=("processes",),
    ),
    "jobs": Benchmark(deliveries.jobs, full={"rounds": 2, "count": 300}, quick={"rounds": 1, "count": 60}),
    "stages": Benchmark(stages.stages, full={"rounds": 3, "count": 2048}, quick={"rounds": 1, "count": 256}),
    "callback": Benchmark(
        callback.callback,
        full={"rounds": 5, "simple": 1000, "forking": 300, "beside": 3},
        quick={"rounds": 1, "simple": 300, "forking": 60, "beside": 1},
        promises=("callback", "callback-independent"),
    ),
    "route": Benchmark(
        route.routes,
        full={"rounds": 5, "count": 1500, "unused": 4000},
        quick={"rounds": 2, "count": 200, "unused": 600},
        promises=("route", "route-unused"),
    ),
    "latency": Benchmark(
        latency.end_to_end,
        full={"rounds": 3, "count": 160},
        quick={"rounds": 1, "count": 60},
        promises=("latency",),
    ),
    "hanging": Benchmark(
        hanging.hanging,
        full={"rounds": 3, "each": 700},
        quick={"rounds": 1, "each": 100},
        promises=("hanging",),
    ),
    "strangers": Benchmark(
        hanging.strangers,
        full={"hosts": 4000, "count": 500},
        quick={"hosts": 1000, "count": 200},
        promises=("strangers",),
    ),
    "growth": Benchmark(
        scale.growth,
        full={"rounds": 5, "claims": 100, "rows": 1_000_000, "history_due": 200_000, "parts": 3},
        quick={"rounds": 2, "claims": 10, "rows": 30_000, "history_due": 100_000, "parts": 2},
        promises=("growth", "pruning"),
    ),
    "memory": Benchmark(
        scale.memory,
        full={"due": 1_000_000, "sent": 100_000},
        quick={"due": 20_000, "sent": 2_000},
        promises=("memory",),
    ),
    "look": Benchmark(
        tenants.look,
        full={"rate": 50, "seconds": 12, "others": 20_000, "rounds": 5, "count": 200},
        quick={"rate": 50, "seconds": 3, "others": 2_000, "rounds": 2, "count": 30},
        promises=("look",),
    ),
    "fan-out": Benchmark(
        tenants.fan_out,
        full={"others": 20_000, "count": 200, "rounds": 5},
        quick={"others": 2_000, "count": 30, "rounds": 2},
        promises=("fan-out",),
    ),
    "lists": Benchmark(
        tenants.lists,
        full={"tenants": 1000, "each": 1000, "repeat": 40},
        quick={"tenants": 100, "each": 200, "repeat": 10},
        promises=("lists", "upgrade"),
    ),
    "upgrade": Benchmark(
        tenants.upgrade, full={"rows": 1_000_000}, quick={"rows": 10_000}, promises=("upgrade",)
    ),
}
