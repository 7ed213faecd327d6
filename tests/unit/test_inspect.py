"""`larder inspect` and what a user may say of files, without credentials and without a database."""

import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from larder.bars import Options, settings
from larder.cli import main
from larder.errors import ConfigError

HEADER = "Date,Open,High,Low,Close,Volume\n"
ROWS = [f"2024-01-{day:02},10.5,12,9,11,{day}00" for day in range(1, 32)]


def larder(*arguments, **env):
    return CliRunner().invoke(main, list(map(str, arguments)), env={"CREDENTIALS_DIRECTORY": "", **env})


def write(path, rows=ROWS, header=HEADER):
    path.write_text(header + "\n".join(rows) + "\n")
    return path


def test_a_good_file_is_shown_as_it_would_be_stored(tmp_path):
    result = larder("inspect", write(tmp_path / "GOOG.US.csv", [*ROWS[:-1], "2024-01-31,1,1,2,1,5"]))
    assert result.exit_code == 0
    told = result.output.splitlines()
    assert ["symbols", "GOOG.US"] in [line.split() for line in told]
    assert ["days", "2024-01-01", "to", "2024-01-30"] in [line.split() for line in told]
    assert ["bars", "30", "good,", "1", "rejected"] in [line.split() for line in told]
    assert any("high is below low" in line for line in told)
    assert ["GOOG.US", "2024-01-01", "10.5", "12.0", "9.0", "11.0", "11.0", "100.0"] in [line.split() for line in told]
    assert told[-2] == "It would be loaded."


def test_a_refused_file_ends_with_3_and_the_refusal(tmp_path):
    file = write(tmp_path / "A.csv", ["x"], "what,is,this\n")
    result = larder("inspect", file, write(tmp_path / "B.csv"))
    assert result.exit_code == 3
    assert f"\n{file}: " in result.output
    assert "It would be loaded." in result.output
    assert "Error: 1 of the files would be refused" in result.output


def test_json_is_for_programs(tmp_path):
    write(tmp_path / "A.csv")
    write(tmp_path / "B.csv", ["x"], "what,is,this\n")
    (tmp_path / "pipe").symlink_to("nowhere")
    # stderr apart: the list is alone on standard output.
    result = subprocess.run(
        [sys.executable, "-c", "from larder.cli import main; main()", "inspect", "--json", str(tmp_path)],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(settings.__file__).parents[2])},
    )
    assert result.returncode == 3
    told = {Path(one["file"]).name: one for one in json.loads(result.stdout)}
    assert (told["A.csv"]["refusal"], told["A.csv"]["bars"], told["A.csv"]["symbols"]) == (None, 31, ["A"])
    assert told["A.csv"]["first_day"] == "2024-01-01"
    assert told["B.csv"]["refusal"].startswith(f"{tmp_path}/B.csv: ")
    assert "leads nowhere" in told["pipe"]["refusal"]


def test_options_say_what_the_file_does_not(tmp_path):
    file = write(tmp_path / "x.csv", ["3/4/2024;1,5;3;1;2"], "when;o;h;l;Price, last\n")
    assert larder("inspect", file).exit_code == 3
    result = larder(
        *("inspect", "--json", file, "--columns", "date=when,close=Price, last", "--dates", "D/M/Y"),
        *("--decimal", ",", "--symbol", "GOOG"),
    )
    told = json.loads(result.output)[0]
    assert (told["refusal"], told["symbols"], told["first_day"]) == (None, ["GOOG"], "2024-04-03")
    assert (told["head"][0]["open"], told["head"][0]["close"], told["head"][0]["volume"]) == (1.5, 2.0, None)


def test_intraday_bars_become_daily_ones_on_request(tmp_path):
    rows = [f"2024-01-02 {hour}:00,{hour},{hour + 1},{hour - 1},{hour},10" for hour in range(10, 16)]
    file = write(tmp_path / "A.csv", rows)
    assert "--resample 1d" in larder("inspect", file).output
    told = json.loads(larder("inspect", "--json", "--resample", "1d", file).output)[0]
    assert [told["head"][0][name] for name in ("open", "high", "low", "close", "volume")] == [10, 16, 9, 15, 60]


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--zone", "Europe/Pariss", "an IANA zone such as America/New_York (did you mean Europe/Paris?)"),
        ("--zone", "../../etc/passwd", "an IANA zone"),
        ("--columns", "close", "must be field=column,…; fields are date, time, open"),
        ("--columns", "clse=Price", "must be field=column,…; fields are date, time, open"),
        ("--day-starts", "25:00", "a time such as 17:00"),
        ("--decimal", ";", "must be . or ,"),
        ("--dates", "D.M.Y", "must be D/M/Y or M/D/Y"),
        ("--encoding", "base64", "an encoding that Python knows"),
        ("--symbol", "A B", "1 to 64 characters without blanks"),
        ("--resample", "1h", "must be 1d"),
        ("--format", "metatrader", "metatrader5"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "load"])
def test_a_wrong_option_is_one_sentence(tmp_path, command, option, value, says):
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "load_url").write_text("postgresql:///")
    result = larder(command, write(tmp_path / "A.csv"), option, value, CREDENTIALS_DIRECTORY=str(credentials))
    assert result.exit_code == 2
    assert says in result.output
    assert option.strip("-").replace("-", "_") in result.output
    assert len(result.output.splitlines()) == 1


def test_a_file_that_is_not_there_is_told_from_one_in_a_folder_that_may_not_be_entered(tmp_path, monkeypatch):
    assert "/nowhere/x.csv does not exist" in larder("inspect", "/nowhere/x.csv").output
    monkeypatch.chdir(tmp_path)
    closed = tmp_path / "closed"
    assert "x.csv does not exist" in larder("inspect", "x.csv", LARDER_TYPED_IN=str(tmp_path)).output
    # The command runs where its user can be, which is not where it was typed.
    result = larder("inspect", "x.csv", LARDER_TYPED_IN=str(closed))
    assert result.exit_code == 2
    assert f"may not look into {closed}, so {closed}/x.csv cannot be read: copy it" in result.output


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look everywhere")
def test_a_missing_permission_is_reported(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(0o000)
    result = larder("inspect", closed / "x.csv")
    closed.chmod(0o700)
    assert result.exit_code == 2
    assert f"may not look into {closed}, so {closed}/x.csv cannot be read" in result.output


def test_what_the_inventory_says_of_files_holds_for_commands(tmp_path):
    settings = tmp_path / "files.yml"
    entry = {
        "name": "ours",
        "header": ["day", "last"],
        "columns": {"date": "day", "close": "last"},
    }
    settings.write_text(yaml.safe_dump({"formats": [entry], "max_rejected": 0.5, "first_bar_date": "2024-01-11"}))
    write(tmp_path / "A.csv", ROWS, "day,Open,High,Low,last,Volume\n")
    told = json.loads(larder("inspect", "--json", "--config", settings, tmp_path / "A.csv").output)[0]
    assert (told["format"], told["bars"], told["rejected"]) == ("ours", 21, 10)
    assert larder("formats", "--config", settings).output.startswith("ours\n")
    assert larder("formats", "--check", settings).output == ""


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([], "is not what larder reads: formats, max_rejected, first_bar_date"),
        ({"format": []}, "'format' is none of formats, max_rejected, first_bar_date"),
        ({"max_rejected": "many"}, "pipeline_max_rejected is 'many' and must be a share from 0 to 1"),
        ({"max_rejected": True}, "pipeline_max_rejected is True"),
        ({"first_bar_date": "soon"}, "pipeline_first_bar_date is 'soon' and must be a day of the past"),
        ({"formats": {"name": "x"}}, "must be a list of formats"),
        ({"formats": [{"name": "x", "zone": "Mars"}]}, "zone is 'Mars'"),
    ],
)
def test_wrong_settings_are_one_sentence(tmp_path, values, says):
    settings = tmp_path / "files.yml"
    settings.write_text(yaml.safe_dump(values))
    for command in (["formats", "--check"], ["inspect", write(tmp_path / "A.csv"), "--config"]):
        result = larder(*command, settings)
        assert result.exit_code == 2
        assert result.output.startswith(f"Error: {settings}")
        assert says in result.output
        assert len(result.output.splitlines()) == 1


def test_settings_that_are_given_must_be_there_and_those_of_the_host_need_not(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "PATH", tmp_path / "files.yml")
    assert settings.read() == settings.Files()
    with pytest.raises(ConfigError, match="does not exist"):
        settings.read(tmp_path / "other.yml")


def test_a_comma_belongs_to_a_columns_name_unless_a_field_follows():
    assert settings.columns("close=Price, USD,date=Day") == {"close": "Price, USD", "date": "Day"}


def test_options_hold_what_was_given_and_what_the_inventory_says():
    held = settings.Files(max_rejected=0.1, first_bar_date=date(2000, 1, 1))
    assert held.options({"zone": "Asia/Tokyo", "resample": "1d"}) == Options(
        zone="Asia/Tokyo", resample=True, max_rejected=0.1, first_day=date(2000, 1, 1)
    )


def test_formats_lists_the_catalogue():
    told = larder("formats").output.splitlines()
    assert any(line.startswith("metatrader5 ") and "MetaTrader 5" in line for line in told)
    assert len(told) > 20
