"""What docs/cluster.md quotes of the plan is what the plan prints."""

from __future__ import annotations

import re

import pytest

from crt.__main__ import main
from tests.conftest import ROOT

QUOTES = re.findall(r"```console\n\$ python -m crt (plan .*)\n((?:.*\n)*?)```", (ROOT / "docs/cluster.md").read_text())


@pytest.mark.parametrize("command, quoted", QUOTES, ids=[command for command, _ in QUOTES])
def test_the_plan_prints_every_line_that_the_page_quotes(command, quoted, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(command.split()) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in quoted.splitlines() if line not in printed] == []


def test_the_page_quotes_the_two_runs_that_it_describes():
    assert [command.split("--gpus ")[1] for command, _ in QUOTES] == ["8", "32 --model 3B --batch-size 512"]
