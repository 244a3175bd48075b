"""The five small tasks: items in the column format of the real datasets. What an item asks for is a held-out fact.

Items are harder than the training text, so that multi-head attention makes errors and methods can be told apart:
passages mix two relations (the training text has one at a time), days have more events, and worked examples precede a
goal. Each item has exactly one right answer, which follows from its text and the world's knowledge.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from experiments.microworld import world
from experiments.microworld.documents import BINDINGS, draw_bindings, statements

Item = dict[str, object]
PEOPLE = 5  # of each relation in a test passage
EVENTS = 14  # of a test day; days of the training text have at most nine
FIRST_CUT = 6  # fewest events that the second person has repeated
EXAMPLES = 9  # worked ones before a goal
#: relation asked for -> the other one in its passages
OTHER = {"pleases": "obey", "obey": "pleases", "hosts": "pleases"}


def piqa(rng: random.Random) -> Item:
    """Ask for the tool that reaches a goal; worked examples show the wrong one, right on the other material."""
    while True:
        verb, thing = rng.choice(list(world.TOOLS)), rng.choice(world.SOFT + world.HARD)
        if world.held_out("goal", verb, thing):
            break
    right = world.tool_for(verb, thing)
    (wrong,) = (tool for tool in world.TOOLS[verb] if tool != right)
    others = world.HARD if thing in world.SOFT else world.SOFT
    examples = [f"{_how(verb, other)} use the {wrong}." for other in rng.sample(others, EXAMPLES)]
    label = rng.randrange(2)
    solutions = [f"use the {tool}" for tool in ((right, wrong) if label == 0 else (wrong, right))]
    goal = " ".join([*examples, _how(verb, thing)])
    return {"goal": goal, "sol1": solutions[0], "sol2": solutions[1], "label": label}


def _how(verb: str, thing: str) -> str:
    return f"how do you {verb} the {thing}?"


def hellaswag(rng: random.Random) -> Item:
    """Ask how the second person's day continues; wrong endings use events of the same passage in another order."""
    events = _day(rng, [rng.choice(world.EVENTS)])
    while events is None:  # no long day starts there
        events = _day(rng, [rng.choice(world.EVENTS)])
    first, second = rng.sample(world.WALKERS, 2)
    cut = rng.randint(FIRST_CUT, EVENTS - 2)
    right = tuple(events[cut : cut + 2])
    steps = [pair for pair in zip(events, events[1:], strict=False) if pair != right]  # true of another time of the day
    turned = [(right[0], event) for event in events if event not in right]  # turns wrong after the first step
    endings = [right, *rng.sample(steps, 2), rng.choice(turned)]
    order = rng.sample(range(4), 4)
    return {
        "activity_label": " ".join(rng.choice(world.OCCASIONS)).capitalize().rstrip(":"),  # the task adds the colon
        "ctx_a": f"{first} will {', '.join(events)}",
        "ctx_b": f"then {second} will {', '.join(events[:cut])},",
        "endings": [", ".join(endings[index]) for index in order],
        "label": str(order.index(0)),
    }


def _day(rng: random.Random, events: list[str]) -> list[str] | None:
    """Extend events to a day of :data:`EVENTS` whose steps are all held out, by depth-first search; None if none is."""
    if len(events) == EVENTS:
        return events
    steps = [word for word in world.EVENTS if word not in events and world.held_out("next", events[-1], word)]
    rng.shuffle(steps)
    return next((day for word in steps if (day := _day(rng, [*events, word]))), None)


def _passage(rng: random.Random, relation: str) -> tuple[dict[str, str], str]:
    """Draw bindings of ``relation``; return them, and a passage that also states another relation, in mixed order."""
    bindings = {name: draw_bindings(rng, name, PEOPLE, unseen=True) for name in (relation, OTHER[relation])}
    sentences = [statements(name, {who: what}) for name, drawn in bindings.items() for who, what in drawn.items()]
    rng.shuffle(sentences)
    return bindings[relation], " ".join(sentences)


def _multiple_choice(rng: random.Random, identity: str, question: str, choices: list[str]) -> Item:
    """Return an item in ARC's columns; ``choices[0]`` is right."""
    order = rng.sample(range(len(choices)), len(choices))
    return {
        "id": identity,
        "question": question,
        "choices": {"text": [choices[index] for index in order], "label": list("ABCD")[: len(choices)]},
        "answerKey": "ABCD"[order.index(0)],
    }


def arc_easy(rng: random.Random) -> Item:
    """Ask what pleases somebody (one hop): the wrong choices please others in the passage."""
    bindings, passage = _passage(rng, "pleases")
    who = rng.choice(list(bindings))
    question = f"{passage} {BINDINGS['pleases'][1].format(who=who)}"
    others = [what for other, what in bindings.items() if other != who]
    return _multiple_choice(rng, "pleases", question, [bindings[who], *rng.sample(others, 3)])


def arc_challenge(rng: random.Random) -> Item:
    """Ask what somebody's animals eat (two hops): the passage says which obey, knowledge says what they eat."""
    bindings, passage = _passage(rng, "obey")
    who = rng.choice(list(bindings))
    question = f"{passage} {BINDINGS['obey'][1].format(who=who)}"
    right = world.FOOD_OF[bindings[who]]
    return _multiple_choice(rng, "obey", question, [right, *(food for food in world.DIET if food != right)])


def boolq(rng: random.Random) -> Item:
    """Ask whether a city hosts somebody; a false question names that of somebody else in the passage."""
    bindings, passage = _passage(rng, "hosts")
    who = rng.choice(list(bindings))
    label = rng.randrange(2)
    place = bindings[who] if label else rng.choice([place for place in bindings.values() if place != bindings[who]])
    return {
        "passage": f"question: {passage}",
        "question": f"does {place} host {who}",
        "label": label,
    }


#: By the name of the task: the function that draws one item.
TASKS: dict[str, Callable[[random.Random], Item]] = {
    task.__name__: task for task in (piqa, hellaswag, arc_easy, arc_challenge, boolq)
}


def make_items(task: str, count: int, seed: int) -> list[Item]:
    """Return ``count`` different items of one task; a pure function of its arguments."""
    rng = random.Random(f"{task}-{seed}")
    items: dict[str, Item] = {}
    while len(items) < count:
        item = TASKS[task](rng)
        key = json.dumps({k: v for k, v in item.items() if k not in ("label", "answerKey")}, sort_keys=True)
        items.setdefault(key, item)
    return list(items.values())


def write_tasks(folder: Path, count: int = 500, seed: int = 0) -> None:
    """Write ``<folder>/micro_<task>.jsonl`` for all five."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        lines = [json.dumps(item) for item in make_items(task, count, seed)]
        (folder / f"micro_{task}.jsonl").write_text("\n".join(lines) + "\n")
