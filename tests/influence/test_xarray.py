"""The folder of an influence can be read by xarray and zarr alone."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from backtrail import errors, extras
from backtrail.influence.influence import open_influence
from tests.influence.made import OBSERVED, QUERIES, STEPS, losses, made, numbers, slots


def check(dataset: xr.Dataset) -> None:
    """Assert that all variables, coordinates and attributes are those written."""
    assert dataset["influence"].dims == ("query", "observed_at", "step", "slot")
    assert dataset["sample"].dims == dataset["loss"].dims == ("step", "slot")
    np.testing.assert_array_equal(dataset["influence"], numbers())
    np.testing.assert_array_equal(dataset["sample"], slots())
    np.testing.assert_array_equal(dataset["loss"], losses())
    assert tuple(dataset["query"].values) == QUERIES
    assert tuple(dataset["observed_at"].values) == OBSERVED
    np.testing.assert_array_equal(dataset["step"], np.arange(STEPS))
    told = {name: dataset.attrs[name] for name in ("unit", "method", "denominator", "run")}
    assert told == {"unit": "nats", "method": "made", "denominator": "keep", "run": "run-1"}
    assert dataset.attrs["sign"].startswith("what the query gains")
    assert dataset.attrs["settings"] == {"seed": 3, "curvature": "Hessian"}


def test_xarray_opens_the_folder_alone(tmp_path: Path) -> None:
    """`xarray.open_zarr` needs no option and gives no warning."""
    made(tmp_path / "influence")
    check(xr.open_zarr(tmp_path / "influence"))


def test_to_xarray_gives_the_same(tmp_path: Path) -> None:
    """The data set is the same from memory and from a folder."""
    check(made().to_xarray())
    made(tmp_path / "influence")
    check(open_influence(tmp_path / "influence").to_xarray())


def test_names_select(tmp_path: Path) -> None:
    """Queries are selected by name and states by number."""
    made(tmp_path / "influence")
    part = open_influence(tmp_path / "influence").to_xarray()["influence"]
    found = part.sel(query="größe", observed_at=7)
    np.testing.assert_array_equal(found, numbers()[2, 2])


def test_one_shard_file_per_stretch_of_steps(tmp_path: Path) -> None:
    """The array is sharded along the steps alone."""
    made(tmp_path / "influence", dtype="float32")
    array = zarr.open_array(tmp_path / "influence" / "influence", mode="r")
    assert array.dtype == np.float32
    assert array.shards == (3, 4, 4, 4)
    files = (tmp_path / "influence" / "influence").rglob("c/**/0/0/*/0")
    assert len([file for file in files if file.is_file()]) == 3


def test_missing_xarray_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without xarray the error names the extra to install."""

    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(extras, "import_module", absent)
    with pytest.raises(errors.MissingExtra, match=r"pip install 'backtrail\[xarray\]'"):
        made().to_xarray()
