"""The jobs. In the real service they take hours; what they do does not matter here."""

from pathlib import Path

from connections import TIMEOUT, redis_connection
from rq import Queue, get_current_job


def fetch_dem_rq(runid, extent=None):
    return Path("/wc1/runs") / runid / "dem.tif"


def build_channels_rq(runid, **options):
    return {"runid": runid, "options": options}


def set_outlet_rq(runid, lng, lat):
    return lng, lat


def build_subcatchments_rq(runid, **options):
    return {"runid": runid, "subcatchments": 12}


def build_landuse_rq(runid, **options):
    return {"runid": runid, "options": options}


def build_soils_rq(runid, **options):
    return {"runid": runid, "options": options}


def build_climate_rq(runid, **options):
    return {"runid": runid, "years": options.get("years", 30)}


def run_wepp_rq(runid):
    """Enqueue the whole model run and end: the work is done by the children."""
    job = get_current_job()
    with redis_connection() as connection:
        q = Queue("default", connection=connection)
        prepare = q.enqueue_call(prepare_hillslopes_rq, (runid,), timeout=TIMEOUT)
        job.meta["jobs:0,func:prepare_hillslopes_rq"] = prepare.id
        hillslopes = []
        for number in range(2):
            child = q.enqueue_call(run_hillslope_rq, (runid, number), timeout=TIMEOUT, depends_on=prepare)
            job.meta[f"jobs:1,hillslope:{number}"] = child.id
            hillslopes.append(child)
        final = q.enqueue_call(log_complete_rq, (runid,), timeout=TIMEOUT, depends_on=hillslopes)
        job.meta["jobs:2,func:log_complete_rq"] = final.id
        job.save()
        return final


def prepare_hillslopes_rq(runid):
    return None


def run_hillslope_rq(runid, number):
    return number


def log_complete_rq(runid):
    return runid


def run_ash_rq(runid, fire_date):
    if fire_date is None:
        raise ValueError(f"{runid} has no fire date")
    return fire_date


def run_omni_rq(runid, scenarios):
    return {"scenarios": len(scenarios)}


def archive_rq(runid, comment=None):
    return f"{runid}.zip"


def fork_rq(runid, new_runid):
    return new_runid


def delete_rq(runid):
    return None


def export_dss_rq(runid):
    return Path("/wc1/runs") / runid / "export.dss"


def run_batch_rq(runid):
    return {"runid": runid}
