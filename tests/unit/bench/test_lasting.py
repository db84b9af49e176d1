"""What happens in a run of hours, and when."""

from __future__ import annotations

import random
from pathlib import Path
from unittest.mock import MagicMock

from bench.fleet.lasting import DEATHS, plan
from bench.page.pictures import draw


def test_a_run_of_hours_has_deaths_every_few_minutes_backups_by_the_hour_and_two_changes() -> None:
    lasting = MagicMock()
    events = list(plan(lasting, random.Random(1), 4 * 3600, 180, 3600))
    times = [at_s for at_s, _, _ in events]
    assert times == sorted(times) and times[-1] == 4 * 3600
    names = [what for _, what, _ in events]
    assert (names.count("backup"), names.count("next bank"), names.count("next secret")) == (4, 1, 1)
    assert names.index("next bank") < names.index("next secret")
    deaths = [name.removeprefix("death of ") for name in names if name.startswith("death of ")]
    assert 70 < len(deaths) < 90 and set(deaths) == set(DEATHS)
    for _, _, event in events:
        event()
    assert [call.args[0] for call in lasting.die.call_args_list] == deaths


def test_its_picture_shows_memory_and_keys_over_time(tmp_path: Path) -> None:
    readings = [{"at_s": 30.0 * n, "keys": 7, "gateway-1, MiB": 90.0 + n, "valkey, MiB": 20.0} for n in range(4)]
    content = {"bench": "lasting", "readings": readings, "events": [["backup", 60.0]]}
    drawn = draw({"lasting": content}, tmp_path)
    assert drawn["lasting"].stat().st_size > 1000
