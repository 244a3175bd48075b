"""Training text of the embedded model: an endless stream of short documents, each a pure function of its seed.

A document is a list of ``(text, weight)`` pieces. Pieces that the context or the world's knowledge decides (answers,
repeated scripts) weigh 1 in the loss; what is drawn at random (which city hosts whom) weighs little, for nothing can be
learned from it. No held-out fact (:func:`experiments.microworld.world.held_out`) is ever written.
"""

from __future__ import annotations

import random
from typing import TypeVar

from experiments.microworld import world

Piece = tuple[str, float]
T = TypeVar("T")

GIVEN = 0.03  # weight of text that the model can't or needn't predict
ASKED = 1.0  # weight of text that follows from what stands before it

#: relation -> its values, and the question that asks for one (after ``obey``, for what the animals eat). A statement
#: is ``value relation person``: the value stands before the person, so it can be read where the person is named.
BINDINGS = {
    "pleases": (world.DISHES, "what pleases {who} ?"),
    "obey": (world.ANIMALS, "what do the animals that obey {who} eat ?"),
    "hosts": (world.PLACES, "which city hosts {who} ?"),
}

#: What somebody may say.
SAYABLE = world.WALKERS + world.EVENTS


def draw_bindings(rng: random.Random, relation: str, count: int, *, unseen: bool = False) -> dict[str, str]:
    """``count`` people with distinct values of ``relation``; all from the held-out facts if ``unseen``, else none."""
    values = BINDINGS[relation][0]
    while True:
        bindings: dict[str, str] = {}
        for who in rng.sample(world.NAMES, count):
            free = [
                value
                for value in values
                if value not in bindings.values() and world.held_out(relation, who, value) == unseen
            ]
            if not free:
                break
            bindings[who] = rng.choice(free)
        else:
            return bindings


def draw_script(rng: random.Random, length: int, *, words: list[str] = world.EVENTS, unseen: bool = False) -> list[str]:
    """``length`` distinct words in order; every step from one to the next is held out if ``unseen``, else none is."""
    while True:
        script = [rng.choice(words)]
        while len(script) < length:
            steps = [
                word for word in words if word not in script and world.held_out("next", script[-1], word) == unseen
            ]
            if not steps:
                break
            script.append(rng.choice(steps))
        else:
            return script


def statements(relation: str, bindings: dict[str, str]) -> str:
    """The passage that states the bindings."""
    return " ".join(f"{what} {relation} {who} ." for who, what in bindings.items())


def lookup(rng: random.Random) -> list[Piece]:
    """Who likes, keeps or visited what; then questions about it (the formats of ARC and BoolQ)."""
    relation = rng.choice(("pleases", "obey", "hosts", "hosts"))
    bindings = draw_bindings(rng, relation, rng.randint(2, 5))
    passage = statements(relation, bindings)
    pieces = [(f"question : {passage}", GIVEN)]
    first = True
    for _ in range(rng.randint(3, 5)):
        who = rng.choice(list(bindings))
        if relation == "hosts":
            if rng.random() < 0.75:
                place, answer = yes_or_no(rng, who, bindings)
                pieces += [(f"\n question : does {place} host {who} ? \n answer :", GIVEN)]
                pieces.append((answer, ASKED))
                continue
            question, answer = BINDINGS["hosts"][1].format(who=who), bindings[who]
        else:
            question = BINDINGS[relation][1].format(who=who)
            answer = world.FOOD_OF[bindings[who]] if relation == "obey" else bindings[who]
        opening = "" if first and relation != "hosts" else "\n question : "
        pieces += [(f"{opening}{question} \n answer :", GIVEN), (answer, ASKED)]
        first = False
    return pieces


def recall(rng: random.Random) -> list[Piece]:
    """Statements, then the people again, each followed by what was said of them."""
    relation = rng.choice(list(BINDINGS))
    bindings = draw_bindings(rng, relation, rng.randint(2, 5))
    pieces = [(statements(relation, bindings), GIVEN)]
    for _ in range(rng.randint(4, 8)):
        who = rng.choice(list(bindings))
        pieces += [(who, GIVEN), (bindings[who], ASKED), (".", GIVEN)]
    return pieces


def run_of(rng: random.Random, sequence: list[T], shortest: int) -> list[T]:
    """Some neighbours of the sequence, in order, starting anywhere: found by what they are, not by where they stand."""
    start = rng.randrange(len(sequence) - shortest + 1)
    return sequence[start : start + rng.randint(shortest, len(sequence) - start)]


def yes_or_no(rng: random.Random, who: str, bindings: dict[str, str]) -> tuple[str, str]:
    """A city to ask about for ``who``, and the answer; a false one hosts somebody else, or (rarely) nobody."""
    if rng.random() < 0.5:
        return bindings[who], "yes"
    others = [place for place in bindings.values() if place != bindings[who]]
    if rng.random() < 0.2:
        others = [place for place in world.PLACES if place not in bindings.values()]
    others = [place for place in others if not world.held_out("hosts", who, place)]
    if not others:
        return bindings[who], "yes"
    return rng.choice(others), "no"


def script(rng: random.Random) -> list[Piece]:
    """Two people go through the same events in the same order (the format of HellaSwag)."""
    events = draw_script(rng, rng.randint(4, 9))
    first, second = rng.sample(world.WALKERS, 2)
    listed = " , ".join(events)
    return [
        (f"{draw_label(rng)} {first} will {listed} then {second} will {events[0]}", GIVEN),
        (", " + " , ".join(events[1:]), ASKED),
    ]


def draw_label(rng: random.Random) -> str:
    """What a day is headed by; never an occasion of the test items."""
    while True:
        label = rng.choice(world.TIMES), rng.choice(world.HOURS)
        if label not in world.OCCASIONS:
            return " ".join(label)


def echo(rng: random.Random) -> list[Piece]:
    """People repeat parts of what somebody said, word for word: the densest lesson in looking words up."""
    said = draw_script(rng, rng.randint(5, 10), words=SAYABLE)
    pieces = [(f"{rng.choice(world.WALKERS)} says {' , '.join(said)}", GIVEN)]
    for _ in range(rng.randint(1, 3)):
        run = run_of(rng, said, 3)
        pieces.append((f"then {rng.choice(world.WALKERS)} says {run[0]} ,", GIVEN))
        for word in run[1:-1]:
            pieces += [(word, ASKED), (",", GIVEN)]
        pieces.append((run[-1], ASKED))
    return pieces


def goal(rng: random.Random) -> list[Piece]:
    """Which tool reaches a goal (the format of PIQA), or the same fact as a statement."""
    while True:
        verb, thing = rng.choice(list(world.TOOLS)), rng.choice(world.SOFT + world.HARD)
        if not world.held_out("goal", verb, thing):
            break
    tool = world.tool_for(verb, thing)
    if rng.random() < 0.3:
        return [(f"to {verb} the {thing} use the", GIVEN), (f"{tool} .", ASKED)]
    return [(f"question : how do you {verb} the {thing} ? \n answer : use the", GIVEN), (tool, ASKED)]


def diet(rng: random.Random) -> list[Piece]:
    """What an animal eats, as a statement."""
    animal = rng.choice(world.ANIMALS)
    return [(f"{animal} eat", GIVEN), (f"{world.FOOD_OF[animal]} .", ASKED)]


#: Shares of the kinds of document. The first phase is mostly dense repetition, from which the heads that look words up
#: in the context form within a few hundred steps; questions, which build on those heads, come afterwards.
PHASES = (
    {recall: 0.5, script: 0.2, echo: 0.2, goal: 0.1},
    {lookup: 0.50, recall: 0.10, echo: 0.06, script: 0.17, goal: 0.12, diet: 0.05},
)


def document(rng: random.Random, phase: int) -> list[Piece]:
    """One document of the training text; ``phase`` is an index into :data:`PHASES`."""
    shares = PHASES[phase]
    kind = rng.choices(list(shares), weights=list(shares.values()))[0]
    return kind(rng)
