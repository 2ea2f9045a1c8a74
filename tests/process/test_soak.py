"""The soak command: it runs, it draws, and it knows growth when it sees it."""

import msgspec
import pytest

from understudy.gateway.chaos.soak import SLACK, Sample, growth, plot
from understudy.gateway.cli import main


def samples(**growing):
    """The samples of a run in which nothing grows but what is named, by so much each."""
    steady = dict.fromkeys(SLACK, 1_000_000)
    for each in range(240):
        measured = {name: steady[name] + each * growing.get(name, 0) for name in steady}
        yield Sample(time_s=each, turns=each, crashes=0, **measured)


def test_a_short_soak_measures_crashes_and_draws_them(tmp_path, capsys):
    picture = tmp_path / "soak.svg"
    main(["chaos", "soak", "--minutes", "0.04", "--json", "--plot", str(picture)])
    report = msgspec.json.decode(capsys.readouterr().out)
    assert set(report["growth"]) == set(SLACK)
    last = report["samples"][-1]
    assert last["turns"] > 0
    assert last["live"] > 0
    assert picture.read_text().count("<polyline") == len(SLACK)


def test_what_stays_as_it_is_is_flat():
    assert all(flat for _, _, flat in growth(list(samples())).values())


@pytest.mark.parametrize("name", SLACK)
def test_what_goes_on_growing_is_found(name):
    verdict = growth(list(samples(**{name: 2_000_000})))
    assert [each for each, (_, _, flat) in verdict.items() if not flat] == [name]


def test_one_peak_is_not_growth():
    every = list(samples())
    every[-2] = msgspec.structs.replace(every[-2], rss=10**9)
    assert growth(every)["rss"][2]
    assert plot(every).endswith("</svg>\n")
