"""Times: one convention for a whole column, said in a note, and refused where it could be two."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gfml.base.errors import UserError
from gfml.data.readers import Columns, read_table
from gfml.data.times import moment


def table(tmp_path, times, name="when", more=None):
    path = tmp_path / "own.csv"
    frame = pd.DataFrame({"user": range(len(times)), "item": 1, name: times} | (more or {}))
    frame.to_csv(path, index=False)
    return path


def seconds(tmp_path, times, form=None, name="when", more=None, column="when"):
    records = read_table(table(tmp_path, times, name, more), Columns(time=column, time_format=form))
    return (records.times / records.per_second).tolist(), records.notes[f"time {name}"]


FORMS = ["%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S+00:00", "%Y/%m/%d %H:%M:%S",
         "%d.%m.%Y %H:%M:%S", "%d/%m/%Y %H:%M:%S", "%m/%d/%Y %H:%M:%S", "%m/%d/%Y %I:%M:%S %p", "%d-%m-%y %H:%M:%S",
         "%d %b %Y %H:%M:%S", "%B %d, %Y %H:%M:%S", "%a %b %d %H:%M:%S +0000 %Y", "%a, %d %b %Y %H:%M:%S GMT",
         "%d/%b/%Y:%H:%M:%S +0000"]  # fmt: skip
MOMENTS = st.datetimes(datetime(1980, 1, 1), datetime(2037, 1, 1)).map(lambda found: found.replace(microsecond=0))


@settings(max_examples=80, deadline=None)
@given(moments=st.lists(MOMENTS, min_size=1, max_size=6), form=st.sampled_from(FORMS))
def test_dates_of_every_form_are_read(tmp_path_factory, moments, form):
    # A day above 12 decides between day and month; the year 1999 between a two-digit year and a day.
    moments = [*moments, datetime(1999, 5, 31, 13, 1, 2)]
    found, _ = seconds(tmp_path_factory.mktemp("dates"), [f"{moment:{form}}" for moment in moments])
    assert found == [moment.replace(tzinfo=UTC).timestamp() for moment in moments]


@pytest.mark.parametrize(
    ("unit", "name"), [(1, "seconds"), (10**3, "milliseconds"), (10**6, "microseconds"), (10**9, "nanoseconds")]
)
def test_epochs_by_their_range(tmp_path, unit, name):
    whole = [1_500_000_000, 1_600_000_000]
    found, note = seconds(tmp_path, [value * unit for value in whole])
    assert found == whole and note == f"{name} since 1970, from 2017-07-14 to 2020-09-13"
    odd = 1_500_000_000 * unit + 1
    assert read_table(table(tmp_path, [odd, whole[1] * unit]), Columns(time="when")).times.tolist()[0] == odd


def test_small_numbers_are_an_order_and_days_are_days(tmp_path):
    records = read_table(table(tmp_path, [3, 1, 2]), Columns(time="when"))
    assert records.times.tolist() == [3, 1, 2] and records.per_second is None
    assert records.notes["time when"] == "plain numbers from 1 to 3, the smaller the earlier"
    assert seconds(tmp_path, [20170714, 19991231])[0] == [1499990400.0, 946598400.0]
    assert seconds(tmp_path, [20170714024000, 19991231235959])[0] == [1500000000.0, 946684799.0]
    assert seconds(tmp_path, ["2017-07-14T02:40:00z", "2017-07-14t02:40:01z"][:1])[0] == [1500000000.0]
    far, note = seconds(tmp_path, [33_000_000_000_000, 33_000_000_001_000])
    assert far == [33e9, 33e9 + 1] and note == "milliseconds since 1970, from 3015-09-24 to 3015-09-24"
    assert seconds(tmp_path, ["1.5e9", "1500000001.5"])[0] == [1.5e9, 1500000001.5]
    early, note = seconds(tmp_path, [0, 1_500_000_000])
    assert early == [0, 1_500_000_000] and "1 of them before 1973" in note


def test_a_column_decides_day_or_month_as_a_whole(tmp_path):
    assert seconds(tmp_path, ["05/04/2017", "14/07/2017"])[0] == seconds(tmp_path, ["04/05/2017", "07/14/2017"])[0]
    with pytest.raises(UserError) as caught:
        seconds(tmp_path, ["05/04/2017", "06/04/2017"])
    said = str(caught.value)
    assert (
        "05 April 2017 (%d/%m/%Y)" in said
        and "04 May 2017 (%m/%d/%Y)" in said
        and "`time_format %d/%m/%Y` or %m/%d/%Y" in said
    )
    assert (
        seconds(tmp_path, ["05/04/2017", "06/04/2017"], "%d/%m/%Y")[0][0]
        == datetime(2017, 4, 5, tzinfo=UTC).timestamp()
    )
    assert seconds(tmp_path, ["05/04/2017 10:00"], "%m/%d/%Y")[0] == [datetime(2017, 5, 4, 10, tzinfo=UTC).timestamp()]
    with pytest.raises(UserError, match="line 4: found '07/14/2017', wanted a date of the form %d/%m/%Y"):
        seconds(tmp_path, ["05/04/2017", "14/07/2017", "07/14/2017", "15/07/2017"])


def test_zones_and_clocks(tmp_path):
    found, _ = seconds(tmp_path, ["2017-07-14 02:40:00+0200", "2017-07-14 02:40:00-05:00"])
    assert found == [datetime(2017, 7, 14, 2, 40, tzinfo=timezone(timedelta(hours=h))).timestamp() for h in (2, -5)]
    assert seconds(tmp_path, ["14/07/2017", "14/07/2017 02:40", "14/07/2017 02:40:01.5"])[0] == [
        1499990400,
        1500000000,
        1500000001.5,
    ]


def test_date_and_clock_in_two_columns(tmp_path):
    path = table(tmp_path, ["14/07/2017", "31/12/1999"], "date", {"time": ["02:40:00", "11:59 PM"]})
    for columns in (Columns(), Columns(time="date,time")):
        records = read_table(path, columns)
        assert (records.times / records.per_second).tolist() == [
            1500000000,
            datetime(1999, 12, 31, 23, 59, tzinfo=UTC).timestamp(),
        ]
    assert read_table(path, Columns(time="date")).times.tolist() == [1499990400, 946598400]
    with pytest.raises(UserError, match="a clock alone orders nothing"):
        read_table(path, Columns(time="time"))
    bad = table(tmp_path, ["14/07/2017", "31/12/1999"], "date", {"time": ["02:40:00", "late"]})
    with pytest.raises(UserError, match="line 3: found 'late', wanted a clock"):
        read_table(bad)


@pytest.mark.parametrize(
    ("times", "form", "said"),
    [
        (["2017-07-14", "now"], None, "line 3: found 'now', wanted a date in column when"),
        (["today"], "%Y-%m-%d", "line 2: found 'today', wanted a date"),
        (["2017-07-14", "soon"], None, "line 3: found 'soon', wanted a date in column when"),
        (["2017-07-14", ""], None, "line 3: found '', wanted a date"),
        (
            [1_500_000_000, 1_500_000_000_000],
            None,
            "mixes seconds (line 2: 1500000000) and milliseconds (line 3: 1500000000000)",
        ),
        (["1500000000", "nan"], None, "line 3: found"),
        (["1500000000", ""], None, "line 3: found '', wanted a number as in the rows before (`time_col none` declines"),
        (["1500000000", "NaT"], None, "line 3: found 'NaT', wanted a number as in the rows before"),
        (["2017-07-14"], "ms", "line 2: found '2017-07-14', wanted a number, as `time_format ms` says"),
        (["2017-07-14", "14.7.2017"], "%Y-%m-%d", "line 3: found '14.7.2017'"),
    ],
)
def test_what_is_no_time_is_named(tmp_path, times, form, said):
    with pytest.raises(UserError) as caught:
        seconds(tmp_path, times, form)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_typed_times_of_parquet(tmp_path):
    for kind, factor in (("datetime64[ns]", 1), ("datetime64[ms, UTC]", 1), ("datetime64[s]", 1)):
        frame = pd.DataFrame(
            {"user": [1], "item": [2], "date": pd.to_datetime(["2017-07-14 02:40:00"]).astype("datetime64[ns]")}
        )
        frame["date"] = frame["date"].dt.tz_localize("UTC") if "UTC" in kind else frame["date"].astype(kind)
        frame.to_parquet(tmp_path / "own.parquet")
        records = read_table(tmp_path / "own.parquet")
        assert records.times / records.per_second == np.array([1_500_000_000]) * factor


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (pa.array([{"at": 5}]), "row 1: found 'struct<at: int64>', wanted a time in column time"),
        (pa.array([5]).cast(pa.time64("us")), "a clock alone orders nothing"),
    ],
)
def test_types_of_parquet_that_are_no_time(tmp_path, cells, said):
    path = tmp_path / "own.parquet"
    pq.write_table(pa.table({"user": [1], "item": [2], "time": cells}), path)
    with pytest.raises(UserError) as caught:
        read_table(path)
    assert said in str(caught.value)
    pq.write_table(pa.table({"user": [1], "item": [2], "time": pa.array([5]).cast(pa.duration("s"))}), path)
    records = read_table(path)
    assert records.times.tolist() == [5] and records.per_second is None


def test_moments_of_flags():
    assert moment("2017-07-14 02:40:00", "`split_date`") == moment("1500000000", "`split_date`") == 1_500_000_000
    with pytest.raises(UserError, match="found `split_date` 'soon', wanted a date"):
        moment("soon", "`split_date`")
