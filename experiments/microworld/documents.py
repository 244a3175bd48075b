"""Training text of the embedded model: an endless stream of short documents, each a pure function of its seed.

A document is a list of ``(text, weight)`` pieces. Pieces that the context or the world's knowledge decides (answers,
repeated scripts) weigh 1 in the loss; what is drawn at random (who went where) weighs little, for nothing can be
learned from it. No held-out fact (:func:`experiments.microworld.world.held_out`) is ever written.
"""

from __future__ import annotations

import random

from experiments.microworld import world

Piece = tuple[str, float]

GIVEN = 0.03  # weight of text that the model can't or needn't predict
ASKED = 1.0  # weight of text that follows from what stands before it

#: relation -> its values, and the question that asks for one (after ``keeps``, for what the animal eats)
BINDINGS = {
    "likes": (world.DISHES, "what does {who} like ?"),
    "keeps": (world.ANIMALS, "what do the pets of {who} eat ?"),
    "visited": (world.PLACES, "where did {who} go ?"),
}


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
            if relation == "keeps" and unseen:  # a test passage has one keeper of each food
                eaten = {world.FOOD_OF[animal] for animal in bindings.values()}
                free = [animal for animal in free if world.FOOD_OF[animal] not in eaten]
            if not free:
                break
            bindings[who] = rng.choice(free)
        else:
            return bindings


def draw_script(rng: random.Random, length: int, *, unseen: bool = False) -> list[str]:
    """``length`` distinct events in order; every step from one to the next is held out if ``unseen``, else none is."""
    while True:
        script = [rng.choice(world.EVENTS)]
        while len(script) < length:
            steps = [
                event
                for event in world.EVENTS
                if event not in script and world.held_out("next", script[-1], event) == unseen
            ]
            if not steps:
                break
            script.append(rng.choice(steps))
        else:
            return script


def statements(relation: str, bindings: dict[str, str]) -> str:
    """The passage that states the bindings."""
    return " ".join(f"{who} {relation} {what} ." for who, what in bindings.items())


def lookup(rng: random.Random) -> list[Piece]:
    """Who likes, keeps or visited what; then questions about it (the formats of ARC and BoolQ)."""
    relation = rng.choice(("likes", "keeps", "visited", "visited"))
    bindings = draw_bindings(rng, relation, rng.randint(2, 5))
    passage = statements(relation, bindings)
    pieces = [(f"question : {passage}", GIVEN)] if relation != "visited" else [(passage, GIVEN)]
    first = True
    for _ in range(rng.randint(3, 5)):
        who = rng.choice(list(bindings))
        if relation == "visited":
            if rng.random() < 0.75:
                place, answer = yes_or_no(rng, who, bindings)
                # True half of the time, so the place is worth predicting: that is the first half of the comparison.
                pieces += [(f"\n question : did {who} visit", GIVEN), (place, ASKED / 2), ("? \n answer :", GIVEN)]
                pieces.append((answer, ASKED))
                continue
            question, answer = BINDINGS["visited"][1].format(who=who), bindings[who]
        else:
            question = BINDINGS[relation][1].format(who=who)
            answer = world.FOOD_OF[bindings[who]] if relation == "keeps" else bindings[who]
        opening = "" if first and relation != "visited" else "\n question : "
        pieces += [(f"{opening}{question} \n answer :", GIVEN), (answer, ASKED)]
        first = False
    return pieces


def recall(rng: random.Random) -> list[Piece]:
    """Statements, then some of them again in any order: what somebody did follows from the first time."""
    relation = rng.choice(list(BINDINGS))
    bindings = draw_bindings(rng, relation, rng.randint(2, 5))
    pieces = [(statements(relation, bindings), GIVEN)]
    for _ in range(rng.randint(4, 8)):
        who = rng.choice(list(bindings))
        pieces += [(f"{who} {relation}", GIVEN), (bindings[who], ASKED), (".", GIVEN)]
    return pieces


def yes_or_no(rng: random.Random, who: str, bindings: dict[str, str]) -> tuple[str, str]:
    """A place to ask about for ``who``, and the answer; a false one is where somebody else went, or (rarely) no one."""
    if rng.random() < 0.5:
        return bindings[who], "yes"
    others = [place for place in bindings.values() if place != bindings[who]]
    if rng.random() < 0.2:
        others = [place for place in world.PLACES if place not in bindings.values()]
    others = [place for place in others if not world.held_out("visited", who, place)]
    if not others:
        return bindings[who], "yes"
    return rng.choice(others), "no"


def script(rng: random.Random) -> list[Piece]:
    """Two people go through the same events in the same order (the format of HellaSwag)."""
    events = draw_script(rng, rng.randint(4, 9))
    first, second = rng.sample(world.NAMES, 2)
    listed = " , ".join(events)
    return [
        (f"{rng.choice(world.ACTIVITIES)} : {first} will {listed} . {second} will {events[0]}", GIVEN),
        (", " + " , ".join(events[1:]) + " .", ASKED),
    ]


def goal(rng: random.Random) -> list[Piece]:
    """Which tool reaches a goal (the format of PIQA), or the same fact as a statement."""
    while True:
        verb, thing = rng.choice(list(world.TOOLS)), rng.choice(world.SOFT + world.HARD)
        if not world.held_out("goal", verb, thing):
            break
    tool = world.tool_for(verb, thing)
    if rng.random() < 0.3:
        return [(f"to {verb} the {thing} , use the", GIVEN), (f"{tool} .", ASKED)]
    return [(f"question : how do you {verb} the {thing} ? \n answer : use the", GIVEN), (tool, ASKED)]


def diet(rng: random.Random) -> list[Piece]:
    """What an animal eats, as a statement."""
    animal = rng.choice(world.ANIMALS)
    return [(f"{animal} eat", GIVEN), (f"{world.FOOD_OF[animal]} .", ASKED)]


#: Shares of the kinds of document. The first phase has only dense repetition, from which the heads that look words
#: up in the context form within a few hundred steps; questions, which build on those heads, come afterwards.
PHASES = (
    {recall: 0.5, script: 0.4, goal: 0.1},
    {lookup: 0.55, recall: 0.12, script: 0.15, goal: 0.13, diet: 0.05},
)


def document(rng: random.Random, phase: int) -> list[Piece]:
    """One document of the training text; ``phase`` is an index into :data:`PHASES`."""
    shares = PHASES[phase]
    kind = rng.choices(list(shares), weights=list(shares.values()))[0]
    return kind(rng)
