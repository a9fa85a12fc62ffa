"""The memory figures of README's table of recipes are those that the planner computes."""

from __future__ import annotations

import json
import re

from tests.scripts import ROOT, run_main


def test_memory_of_the_recipes_is_what_the_planner_says() -> None:
    done = run_main("launch/recipes.py", "ls", "--memory", "--json")
    assert done.returncode == 0, done.stderr
    last = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    recipes = {row["name"]: row for row in json.loads(last)["recipes"]}
    rows = [line.split("|") for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    table = [row for row in rows if len(row) == 5 and set(re.findall(r"`(\w+)`", row[1])) & recipes.keys()]
    assert {name for row in table for name in re.findall(r"`(\w+)`", row[1])} == recipes.keys()
    for row in table:
        named = [recipes[name] for name in re.findall(r"`(\w+)`", row[1])]
        computed = {f"{recipe[key]:.1f}" for recipe in named for key in ("states_gib", "host_gib") if recipe[key]}
        assert set(re.findall(r"\d+\.\d+", row[3])) <= computed, row
