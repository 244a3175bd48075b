"""The five small tasks: items in the column format of the real datasets, made only of held-out facts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from experiments.microworld import world
from experiments.microworld.documents import BINDINGS, draw_bindings, draw_script, statements

Item = dict[str, object]
PEOPLE = 5  # in a test passage


def piqa(rng: random.Random) -> Item:
    """Ask for the tool that reaches a goal; the wrong one is often right for the same verb on another material."""
    while True:
        verb, thing = rng.choice(list(world.TOOLS)), rng.choice(world.SOFT + world.HARD)
        if world.held_out("goal", verb, thing):
            break
    right = world.tool_for(verb, thing)
    near = [tool for tool in world.TOOLS[verb] if tool != right]
    wrong = rng.choice(near if rng.random() < 0.5 else [tool for tool in world.ALL_TOOLS if tool != right])
    label = rng.randrange(2)
    solutions = [f"use the {tool}" for tool in ((right, wrong) if label == 0 else (wrong, right))]
    return {"goal": f"how do you {verb} the {thing}?", "sol1": solutions[0], "sol2": solutions[1], "label": label}


def hellaswag(rng: random.Random) -> Item:
    """Ask how the second person's day continues; wrong endings use events of the same passage in another order."""
    events = draw_script(rng, 7, unseen=True)
    first, second = rng.sample(world.WALKERS, 2)
    cut = rng.randint(2, 5)
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
    bindings = draw_bindings(rng, "pleases", PEOPLE, unseen=True)
    who = rng.choice(list(bindings))
    question = f"{statements('pleases', bindings)} {BINDINGS['pleases'][1].format(who=who)}"
    others = [what for other, what in bindings.items() if other != who]
    return _multiple_choice(rng, "pleases", question, [bindings[who], *rng.sample(others, 3)])


def arc_challenge(rng: random.Random) -> Item:
    """Ask what somebody's animals eat (two hops): the passage says which obey, knowledge says what they eat."""
    bindings = draw_bindings(rng, "obey", PEOPLE, unseen=True)
    who = rng.choice(list(bindings))
    question = f"{statements('obey', bindings)} {BINDINGS['obey'][1].format(who=who)}"
    right = world.FOOD_OF[bindings[who]]
    return _multiple_choice(rng, "obey", question, [right, *(food for food in world.DIET if food != right)])


def boolq(rng: random.Random) -> Item:
    """Ask whether a city hosts somebody; a false question names that of somebody else in the passage."""
    bindings = draw_bindings(rng, "hosts", PEOPLE, unseen=True)
    who = rng.choice(list(bindings))
    label = rng.randrange(2)
    place = bindings[who] if label else rng.choice([place for place in bindings.values() if place != bindings[who]])
    return {
        "passage": f"question: {statements('hosts', bindings)}",
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
