"""The functions that RQ workers run.

A worker needs this module, its input files and Redis; neither Flask nor SQL. Nothing here knows of webhooks.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any, TypeVar

from redis import Redis
from rq import Queue, get_current_job
from rq.job import Dependency, Job

from . import model

#: Seconds a job may take. Real model runs take hours; RQ's own default of three minutes would end them.
TIMEOUT = 216_000

#: Redis list in which the callbacks of :func:`hello_world_rq` record that they ran.
GREETINGS_KEY = "example_app:greetings"


Row = TypeVar("Row", model.Soil, model.Landuse)


def runs_dir() -> Path:
    """Return the directory that holds one directory per run."""
    return Path(os.environ.get("EXAMPLE_RUNS_DIR", "instance/runs"))


def run_dir(runid: str) -> Path:
    """Return the directory of one run, made if need be.

    :raises InputError: when *runid* is not one plain name.
    """
    if len(runid) > 64 or not runid.replace("-", "").replace("_", "").isalnum():
        raise model.InputError(
            f"run id {runid[:70]!r} may hold letters, digits, hyphens and underscores only, 64 at most"
        )
    directory = runs_dir() / runid
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def input_file(runid: str, name: str) -> Path:
    """Return the run's own input file where the client has sent one, else the one shipped with us."""
    own = run_dir(runid) / name
    return own if own.exists() else model.DATA / name


def build_landuse_rq(runid: str) -> dict[str, Any]:
    """Read the cover of every hillslope and return how much of the watershed each covers."""
    areas = {soil.hillslope: soil.area_ha for soil in model.read_soils(input_file(runid, "soils.csv"))}
    cover_ha: dict[str, float] = {}
    for landuse in model.read_landuse(input_file(runid, "landuse.csv")):
        cover_ha[landuse.cover] = round(cover_ha.get(landuse.cover, 0.0) + areas[landuse.hillslope], 2)
    return _keep(runid, "landuse.json", {"hillslopes": len(areas), "cover_ha": cover_ha})


def build_soils_rq(runid: str, depth_factor: float = 1.0) -> dict[str, Any]:
    """Read the soil of every hillslope and return the water each can hold for plants.

    :param depth_factor: scales the depth of every profile.
    """
    if depth_factor <= 0:
        raise model.InputError(f"depth_factor {depth_factor:g} is not above 0")
    soils = model.read_soils(input_file(runid, "soils.csv"))
    capacity_mm = {str(soil.hillslope): round(depth_factor * soil.capacity_mm, 2) for soil in soils}
    return _keep(runid, "soils.json", {"depth_factor": depth_factor, "capacity_mm": capacity_mm})


def build_climate_rq(runid: str) -> dict[str, Any]:
    """Read the weather and return its yearly sums; impossible weather is an error."""
    days = model.read_climate(input_file(runid, "climate.csv"))
    summary = {
        "days": len(days),
        "first_day": days[0].day.isoformat() if days else None,
        "precipitation_mm": round(sum(day.precipitation_mm for day in days), 2),
        "pet_mm": round(sum(day.pet_mm for day in days), 2),
    }
    return _keep(runid, "climate.json", summary)


def run_wepp_rq(runid: str) -> tuple[str, str]:
    """Enqueue one job per hillslope and one that sums them up; return the run id and the last job's id.

    This root job is over long before the run is. The ids of its children are in its ``meta``, under
    ``jobs:<order>,func:<name>``.
    """
    root = get_current_job()
    if root is None:
        raise RuntimeError("run_wepp_rq runs as an RQ job only: it writes its children into the job's meta")
    with connect() as connection:
        queue = Queue("default", connection=connection)
        hillslopes: list[Dependency | Job | str] = []
        for soil in model.read_soils(input_file(runid, "soils.csv")):
            child = queue.enqueue_call(run_hillslope_rq, (runid, soil.hillslope), timeout=TIMEOUT)
            root.meta[f"jobs:{soil.hillslope},func:run_hillslope_rq"] = child.id
            hillslopes.append(child)
        last = queue.enqueue_call(summarize_run_rq, (runid,), timeout=TIMEOUT, depends_on=hillslopes)
        root.meta["jobs:last,func:summarize_run_rq"] = last.id
        root.save_meta()  # type: ignore[no-untyped-call]
    return runid, last.id


def run_hillslope_rq(runid: str, hillslope: int) -> dict[str, Any]:
    """Run the water balance of one hillslope."""
    days = model.read_climate(input_file(runid, "climate.csv"))
    soil = _of(hillslope, model.read_soils(input_file(runid, "soils.csv")))
    landuse = _of(hillslope, model.read_landuse(input_file(runid, "landuse.csv")))
    return _keep(runid, f"hillslope-{hillslope}.json", model.water_balance(soil, landuse, days).as_dict())


def summarize_run_rq(runid: str) -> dict[str, Any]:
    """Sum the hillslopes up, weighted by area: millimetres over the watershed, and cubic metres of runoff."""
    soils = model.read_soils(input_file(runid, "soils.csv"))
    area_ha = sum(soil.area_ha for soil in soils)
    sums = {"precipitation_mm": 0.0, "runoff_mm": 0.0, "evapotranspiration_mm": 0.0, "percolation_mm": 0.0}
    for soil in soils:
        balance = json.loads((run_dir(runid) / f"hillslope-{soil.hillslope}.json").read_text())
        for name in sums:
            sums[name] += balance[name] * soil.area_ha / area_ha
    summary: dict[str, Any] = {name: round(value, 3) for name, value in sums.items()}
    # A millimetre on a hectare is ten cubic metres.
    summary |= {"area_ha": round(area_ha, 2), "runoff_m3": round(sums["runoff_mm"] * area_ha * 10, 1)}
    return _keep(runid, "summary.json", summary)


def hello_world_rq(runid: str, *, fail: bool = False) -> str:
    """Say hello, or fail when asked to."""
    if fail:
        raise RuntimeError(f"no greeting for {runid}")
    return f"hello {runid}"


def be_killed_rq(runid: str) -> None:
    """Kill this process, as the kernel does when memory runs out: no exception, no RQ callback."""
    os.kill(os.getpid(), signal.SIGKILL)


def analyze_rq(flows: list[float]) -> dict[str, model.Number]:
    """Return the statistics of a series of flows."""
    return model.flow_statistics(flows)


# -- the app's own RQ callbacks ---------------------------------------------------------------------------


def note_success(job: Job, connection: Redis, result: Any, *_args: Any, **_kwargs: Any) -> None:
    """Record that the job succeeded. This is the app's own RQ callback; webhooks do not touch it."""
    connection.rpush(GREETINGS_KEY, f"success {job.id} {result}")


def note_failure(
    job: Job, connection: Redis, error: type[BaseException], *_args: Any, **_kwargs: Any
) -> None:
    """Record that the job failed."""
    connection.rpush(GREETINGS_KEY, f"failure {job.id} {error.__name__}")


def connect() -> Redis:
    """Open a connection to Redis; the caller closes it."""
    return Redis.from_url(os.environ.get("REDIS_URL", "redis://localhost:6379/0"))


def _of(hillslope: int, rows: list[Row]) -> Row:
    for row in rows:
        if row.hillslope == hillslope:
            return row
    raise model.InputError(f"hillslope {hillslope} is not in the table")


def _keep(runid: str, name: str, value: dict[str, Any]) -> dict[str, Any]:
    (run_dir(runid) / name).write_text(json.dumps(value, indent=2) + "\n")
    return value
