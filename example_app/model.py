"""A daily water balance for the hillslopes of one small watershed.

Each day, rain runs off by the curve-number method (USDA NEH-630, chapter 10), the rest enters the soil,
the crop takes water at the Hargreaves rate of evapotranspiration (Hargreaves & Samani 1985; FAO-56,
equations 21, 23–25 and 52) as far as the soil still holds some, and what the soil cannot hold percolates.

Owns the arithmetic and the reading of the three input tables. Knows nothing of jobs, Flask or Redis.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

#: The tables shipped with the example.
DATA = Path(__file__).parent / "data"

#: Latitude of the example watershed, degrees north.
LATITUDE = 46.7

Number = int | float


class InputError(ValueError):
    """An input table cannot be used; the message names file, line and value."""


@dataclass(frozen=True, slots=True)
class Day:
    """Weather of one day: millimetres of rain, degrees Celsius, millimetres of potential evaporation."""

    day: date
    precipitation_mm: float
    tmin_c: float
    tmax_c: float
    pet_mm: float


@dataclass(frozen=True, slots=True)
class Soil:
    """Soil of one hillslope; the two water contents are volume fractions."""

    hillslope: int
    area_ha: float
    texture: str
    depth_mm: float
    field_capacity: float
    wilting_point: float

    @property
    def capacity_mm(self) -> float:
        """Return the water that plants can take from a full profile, millimetres."""
        return self.depth_mm * (self.field_capacity - self.wilting_point)


@dataclass(frozen=True, slots=True)
class Landuse:
    """Cover of one hillslope: its curve number, and its evaporation relative to reference grass."""

    hillslope: int
    cover: str
    curve_number: float
    crop_coefficient: float


@dataclass(frozen=True, slots=True)
class Balance:
    """Sums over the days, millimetres: rain = runoff + evaporation + percolation + change of storage."""

    hillslope: int
    days: int
    precipitation_mm: float
    runoff_mm: float
    evapotranspiration_mm: float
    percolation_mm: float
    storage_change_mm: float

    def as_dict(self) -> dict[str, Number]:
        """Return the sums, rounded to a tenth of a micrometre, for JSON."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def extraterrestrial_radiation(day: date, latitude: float = LATITUDE) -> float:
    """Return the radiation at the top of the atmosphere, as millimetres of evaporated water a day.

    :param latitude: degrees, north positive; beyond the polar circles the sun is kept at its bounds.
    """
    angle = 2 * math.pi * day.timetuple().tm_yday / 365
    phi = math.radians(latitude)
    distance = 1 + 0.033 * math.cos(angle)
    declination = 0.409 * math.sin(angle - 1.39)
    sunset = math.acos(max(-1.0, min(1.0, -math.tan(phi) * math.tan(declination))))
    height = math.sin(phi) * math.sin(declination)
    swing = math.cos(phi) * math.cos(declination)
    megajoules = (24 * 60 / math.pi) * 0.0820 * distance * (sunset * height + swing * math.sin(sunset))
    return 0.408 * megajoules


def hargreaves(day: date, tmin_c: float, tmax_c: float, latitude: float = LATITUDE) -> float:
    """Return the reference evapotranspiration of one day, millimetres."""
    warmth = max(0.0, (tmin_c + tmax_c) / 2 + 17.8)
    return 0.0023 * warmth * math.sqrt(tmax_c - tmin_c) * extraterrestrial_radiation(day, latitude)


def runoff(precipitation_mm: float, curve_number: float) -> float:
    """Return the part of one day's rain that runs off, millimetres."""
    retention = 254 * (100 / curve_number - 1)
    excess = precipitation_mm - 0.2 * retention
    return 0.0 if excess <= 0 else excess**2 / (excess + retention)


def water_balance(soil: Soil, landuse: Landuse, days: Iterable[Day]) -> Balance:
    """Carry the soil's water through *days*, beginning half full, and return the sums."""
    storage = initial = soil.capacity_mm / 2
    rain = ran_off = evaporated = percolated = 0.0
    count = 0
    for day in days:
        count += 1
        lost = runoff(day.precipitation_mm, landuse.curve_number)
        storage += day.precipitation_mm - lost
        # A drying soil gives its water up in proportion to what it still holds.
        demand = landuse.crop_coefficient * day.pet_mm * min(1.0, storage / soil.capacity_mm)
        taken = min(storage, demand)
        storage -= taken
        excess = max(0.0, storage - soil.capacity_mm)
        storage -= excess
        rain += day.precipitation_mm
        ran_off += lost
        evaporated += taken
        percolated += excess
    return Balance(soil.hillslope, count, rain, ran_off, evaporated, percolated, storage - initial)


def read_climate(path: Path, latitude: float = LATITUDE) -> list[Day]:
    """Read daily weather; a ``pet_mm`` column is used where there is one, else Hargreaves.

    :raises InputError: for a missing column, a value that is no number, or an impossible one.
    """
    days: list[Day] = []
    for line, row in _rows(path, "date", "precipitation_mm", "tmin_c", "tmax_c"):
        rain, tmin, tmax = (
            _number(path, line, row, name) for name in ("precipitation_mm", "tmin_c", "tmax_c")
        )
        try:
            day = date.fromisoformat(row["date"])
        except ValueError:
            raise InputError(f"{path.name}, line {line}: date {row['date']!r} is not YYYY-MM-DD") from None
        if rain < 0:
            raise InputError(f"{path.name}, line {line}: precipitation_mm {rain:g} is negative")
        if tmin > tmax:
            raise InputError(f"{path.name}, line {line}: tmin_c {tmin:g} is above tmax_c {tmax:g}")
        pet = (
            _number(path, line, row, "pet_mm") if row.get("pet_mm") else hargreaves(day, tmin, tmax, latitude)
        )
        days.append(Day(day, rain, tmin, tmax, pet))
    return days


def read_soils(path: Path) -> list[Soil]:
    """Read one soil per hillslope.

    :raises InputError: as :func:`read_climate`, and for a soil that can hold no water.
    """
    soils: list[Soil] = []
    for line, row in _rows(
        path, "hillslope", "area_ha", "texture", "depth_mm", "field_capacity", "wilting_point"
    ):
        soil = Soil(
            int(_number(path, line, row, "hillslope")),
            _number(path, line, row, "area_ha"),
            row["texture"],
            _number(path, line, row, "depth_mm"),
            _number(path, line, row, "field_capacity"),
            _number(path, line, row, "wilting_point"),
        )
        if soil.capacity_mm <= 0:
            raise InputError(f"{path.name}, line {line}: field_capacity is not above wilting_point")
        soils.append(soil)
    return soils


def read_landuse(path: Path) -> list[Landuse]:
    """Read one cover per hillslope.

    :raises InputError: as :func:`read_climate`, and for a curve number outside 1–100.
    """
    covers: list[Landuse] = []
    for line, row in _rows(path, "hillslope", "cover", "curve_number", "crop_coefficient"):
        number = _number(path, line, row, "curve_number")
        if not 1 <= number <= 100:
            raise InputError(f"{path.name}, line {line}: curve_number {number:g} is not from 1 to 100")
        hillslope = int(_number(path, line, row, "hillslope"))
        covers.append(Landuse(hillslope, row["cover"], number, _number(path, line, row, "crop_coefficient")))
    return covers


def flow_statistics(flows: Sequence[float]) -> dict[str, Number]:
    """Return mean, extremes and the flows exceeded 10, 50 and 90 percent of the time.

    :raises InputError: when *flows* is empty.
    """
    if not flows:
        raise InputError("no flows given")
    ordered = sorted(flows, reverse=True)

    def exceeded(percent: int) -> float:
        return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]

    return {
        "count": len(ordered),
        "mean": round(math.fsum(ordered) / len(ordered), 6),
        "maximum": ordered[0],
        "minimum": ordered[-1],
        "q10": exceeded(10),
        "q50": exceeded(50),
        "q90": exceeded(90),
    }


def _rows(path: Path, *columns: str) -> Iterable[tuple[int, dict[str, str]]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise InputError(f"{path.name}: column {missing[0]!r} is missing")
        for row in reader:
            if None in row.values():
                raise InputError(f"{path.name}, line {reader.line_num}: too few values")
            yield reader.line_num, row


def _number(path: Path, line: int, row: dict[str, str], name: str) -> float:
    try:
        value = float(row[name])
    except ValueError:
        raise InputError(f"{path.name}, line {line}: {name} {row[name]!r} is not a number") from None
    if not math.isfinite(value):
        raise InputError(f"{path.name}, line {line}: {name} {row[name]!r} is not a number")
    return value
