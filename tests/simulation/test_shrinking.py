"""What a failing seed becomes: the least script that still fails, and the command's report."""

from planted import PLANTED

from understudy.gateway.cli import main
from understudy.testing import Simulation, shrink

BUGS = {bug.name: bug for bug in PLANTED}


def test_a_failure_shrinks_to_the_acts_it_needs():
    with BUGS["summarise for ever"].plant():
        result = next(r for r in (Simulation(seed).run() for seed in range(40, 60)) if r.findings)
        smallest = shrink(result)
        again = Simulation(result.seed, script=smallest.script).run()
        less = [
            Simulation(result.seed, script=smallest.script[:n] + smallest.script[n + 1 :]).run()
            for n in range(len(smallest.script))
        ]
    rule = result.findings[0][0]
    assert len(smallest.script) * 3 < len(result.script)
    assert smallest.findings[0][0] == rule
    assert all(rule not in [each for each, _ in one.findings] for one in less)
    assert again.digest == smallest.digest


def test_the_command_prints_the_seed_first_and_exits_well(capsys):
    assert main(["chaos", "sim", "--seed", "3", "--seeds", "2", "--processes", "1"]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "seed 3, 2 seeds of about 300 steps"
    assert last.endswith("0 broke a guarantee")


def test_the_command_shrinks_what_it_finds_and_fails(capsys):
    with BUGS["publish before commit"].plant():
        assert main(["chaos", "sim", "--seeds", "1", "--processes", "1"]) == 1
    out = capsys.readouterr().out
    assert "seed 0 broke a guarantee" in out
    assert "published means committed" in out
    assert "1 of" in out
