"""The example's water balance: real arithmetic on real files."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from example_app import model

DAYS = model.read_climate(model.DATA / "climate.csv")
SOILS = model.read_soils(model.DATA / "soils.csv")
LANDUSE = model.read_landuse(model.DATA / "landuse.csv")


@pytest.mark.parametrize(
    ("soil", "landuse"), list(zip(SOILS, LANDUSE, strict=True)), ids=lambda row: str(row.hillslope)
)
def test_no_water_is_made_or_lost(soil: model.Soil, landuse: model.Landuse) -> None:
    balance = model.water_balance(soil, landuse, DAYS)
    assert balance.precipitation_mm == pytest.approx(
        balance.runoff_mm + balance.evapotranspiration_mm + balance.percolation_mm + balance.storage_change_mm
    )
    assert min(balance.runoff_mm, balance.evapotranspiration_mm, balance.percolation_mm) > 0
    assert abs(balance.storage_change_mm) <= soil.capacity_mm / 2


def test_extraterrestrial_radiation_against_the_published_example() -> None:
    # FAO-56, example 8: 3 September at 20 degrees south is 32.2 MJ m-2 d-1, or 13.1 mm a day.
    assert model.extraterrestrial_radiation(date(2023, 9, 3), -20) == pytest.approx(13.1, abs=0.05)


@pytest.mark.parametrize(
    ("rain_mm", "curve_number", "runoff_mm"),
    [
        (5, 60, 0),
        (100, 100, 100),
        (101.6, 80, 51.8),
    ],  # 4 inches on curve number 80 give 2.04 inches (NEH-630)
)
def test_runoff(rain_mm: float, curve_number: float, runoff_mm: float) -> None:
    assert model.runoff(rain_mm, curve_number) == pytest.approx(runoff_mm, abs=0.1)


def test_given_evaporation_is_used(tmp_path: Path) -> None:
    table = tmp_path / "climate.csv"
    table.write_text(
        "date,precipitation_mm,tmin_c,tmax_c,pet_mm\n2023-07-01,0,10,24,4.2\n2023-07-02,0,10,24,\n"
    )
    given, computed = model.read_climate(table)
    assert given.pet_mm == 4.2
    assert computed.pet_mm == model.hargreaves(date(2023, 7, 2), 10, 24)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("date,precipitation_mm,tmin_c\n", "climate.csv: column 'tmax_c' is missing"),
        ("2023-01-01,x,1,2", "climate.csv, line 2: precipitation_mm 'x' is not a number"),
        ("2023-01-01,nan,1,2", "climate.csv, line 2: precipitation_mm 'nan' is not a number"),
        ("2023-01-01,-1,1,2", "climate.csv, line 2: precipitation_mm -1 is negative"),
        ("2023-01-01,0,3,2", "climate.csv, line 2: tmin_c 3 is above tmax_c 2"),
        ("1 May,0,1,2", "climate.csv, line 2: date '1 May' is not YYYY-MM-DD"),
        ("2023-01-01,0", "climate.csv, line 2: too few values"),
    ],
)
def test_errors_name_file_line_and_value(content: str, message: str, tmp_path: Path) -> None:
    table = tmp_path / "climate.csv"
    header = "" if content.startswith("date") else "date,precipitation_mm,tmin_c,tmax_c\n"
    table.write_text(header + content + "\n")
    with pytest.raises(model.InputError) as caught:
        model.read_climate(table)
    assert str(caught.value) == message


def test_flow_statistics() -> None:
    assert model.flow_statistics([float(flow) for flow in range(1, 11)]) == {
        "count": 10, "mean": 5.5, "maximum": 10, "minimum": 1, "q10": 9, "q50": 5, "q90": 1,
    }  # fmt: skip
    with pytest.raises(model.InputError):
        model.flow_statistics([])
