"""Training text of the embedded model: an endless stream of short documents, each a pure function of its seed.

A document is a list of ``(text, weight)`` pieces, where the weight is that of the text in the loss. No held-out fact
(:func:`experiments.microworld.world.held_out`) is ever written.
"""

from __future__ import annotations

import random

from experiments.microworld import world

Piece = tuple[str, float]
CONTEXT_WEIGHT = 0.03  # of text that the model cannot or need not predict: which city hosts whom
ANSWER_WEIGHT = 1.0  # of text that follows from the text before it, or from the world's knowledge

#: relation -> its values, and the question that asks for one (after ``obey``, for what the animals eat). A statement
#: is ``value relation person``: the value stands before the person, so that it can be read where the person is named.
BINDINGS = {
    "pleases": (world.DISHES, "what pleases {who} ?"),
    "obey": (world.ANIMALS, "what do the animals that obey {who} eat ?"),
    "hosts": (world.PLACES, "which city hosts {who} ?"),
}


def draw_bindings(rng: random.Random, relation: str, count: int, *, unseen: bool = False) -> dict[str, str]:
    """Draw ``count`` people with distinct values of ``relation``; all held-out facts if ``unseen``, else none."""
    values = BINDINGS[relation][0]
    while True:
        bindings: dict[str, str] = {}
        for who in rng.sample(world.NAMES, count):
            free = [value for value in values if world.held_out(relation, who, value) == unseen]
            free = [value for value in free if value not in bindings.values()]
            if not free:
                break
            bindings[who] = rng.choice(free)
        else:
            return bindings


def draw_script(rng: random.Random, length: int, *, words: list[str] = world.EVENTS) -> list[str]:
    """Draw ``length`` distinct words in order; no step to the next is held out."""
    while True:
        script = [rng.choice(words)]
        while len(script) < length:
            steps = [word for word in words if not world.held_out("next", script[-1], word)]
            steps = [word for word in steps if word not in script]
            if not steps:
                break
            script.append(rng.choice(steps))
        else:
            return script


def statements(relation: str, bindings: dict[str, str]) -> str:
    """Return the passage that states the bindings."""
    return " ".join(f"{what} {relation} {who} ." for who, what in bindings.items())


def lookup(rng: random.Random) -> list[Piece]:
    """Write statements about people, then questions about them (the formats of ARC and BoolQ)."""
    relation = rng.choice(("pleases", "obey", "hosts", "hosts"))
    bindings = draw_bindings(rng, relation, rng.randint(2, 5))
    pieces = [(f"question : {statements(relation, bindings)}", CONTEXT_WEIGHT)]
    for number in range(rng.randint(3, 5)):
        who = rng.choice(list(bindings))
        question, answer = BINDINGS[relation][1].format(who=who), bindings[who]
        if relation == "obey":
            answer = world.FOOD_OF[answer]
        elif relation == "hosts" and rng.random() < 0.75:
            place, answer = yes_or_no(rng, who, bindings)
            question = f"does {place} host {who} ?"
        opening = "" if number == 0 and relation != "hosts" else "\n question : "
        pieces += [(f"{opening}{question} \n answer :", CONTEXT_WEIGHT), (answer, ANSWER_WEIGHT)]
    return pieces


def recall(rng: random.Random) -> list[Piece]:
    """Write statements, then the people again, each followed by the value stated of them."""
    relation = rng.choice(list(BINDINGS))
    bindings = draw_bindings(rng, relation, rng.randint(2, 5))
    pieces = [(statements(relation, bindings), CONTEXT_WEIGHT)]
    for _ in range(rng.randint(4, 8)):
        who = rng.choice(list(bindings))
        pieces += [(who, CONTEXT_WEIGHT), (bindings[who], ANSWER_WEIGHT), (".", CONTEXT_WEIGHT)]
    return pieces


def yes_or_no(rng: random.Random, who: str, bindings: dict[str, str]) -> tuple[str, str]:
    """Draw a city to ask about for ``who``, and the answer; a false one hosts somebody else, or (rarely) nobody."""
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
    """Write how two people go through the same events in the same order (the format of HellaSwag)."""
    events = draw_script(rng, rng.randint(4, 9))
    first, second = rng.sample(world.WALKERS, 2)
    label = world.OCCASIONS[0]
    while label in world.OCCASIONS:  # those are for the test items
        label = rng.choice(world.TIMES), rng.choice(world.HOURS)
    return [
        (f"{' '.join(label)} {first} will {' , '.join(events)} then {second} will {events[0]}", CONTEXT_WEIGHT),
        (", " + " , ".join(events[1:]), ANSWER_WEIGHT),
    ]


def echo(rng: random.Random) -> list[Piece]:
    """Write how people repeat somebody's words: the densest lesson in looking words up."""
    words = draw_script(rng, rng.randint(5, 10), words=world.WALKERS + world.EVENTS)
    pieces = [(f"{rng.choice(world.WALKERS)} says {' , '.join(words)}", CONTEXT_WEIGHT)]
    for _ in range(rng.randint(1, 3)):
        # Start anywhere: words must be found by their content, not by their position.
        start = rng.randrange(len(words) - 2)
        run = words[start : start + rng.randint(3, len(words) - start)]
        pieces.append((f"then {rng.choice(world.WALKERS)} says {run[0]} ,", CONTEXT_WEIGHT))
        for word in run[1:-1]:
            pieces += [(word, ANSWER_WEIGHT), (",", CONTEXT_WEIGHT)]
        pieces.append((run[-1], ANSWER_WEIGHT))
    return pieces


def goal(rng: random.Random) -> list[Piece]:
    """Ask which tool reaches a goal (the format of PIQA), or state it."""
    while True:
        verb, thing = rng.choice(list(world.TOOLS)), rng.choice(world.SOFT + world.HARD)
        if not world.held_out("goal", verb, thing):
            break
    tool = world.tool_for(verb, thing)
    if rng.random() < 0.3:
        return [(f"to {verb} the {thing} use the", CONTEXT_WEIGHT), (f"{tool} .", ANSWER_WEIGHT)]
    return [(f"question : how do you {verb} the {thing} ? \n answer : use the", CONTEXT_WEIGHT), (tool, ANSWER_WEIGHT)]


def diet(rng: random.Random) -> list[Piece]:
    """State the food of an animal."""
    animal = rng.choice(world.ANIMALS)
    return [(f"{animal} eat", CONTEXT_WEIGHT), (f"{world.FOOD_OF[animal]} .", ANSWER_WEIGHT)]


#: Shares of the kinds of document. The first phase is mostly dense repetition, from which the heads that look words up
#: in the context form within a few hundred steps; questions, which build on those heads, come afterwards.
PHASES = (
    {recall: 0.5, script: 0.2, echo: 0.2, goal: 0.1},
    {lookup: 0.50, recall: 0.10, echo: 0.06, script: 0.17, goal: 0.12, diet: 0.05},
)


def document(rng: random.Random, phase: int) -> list[Piece]:
    """Write one document of the training text; ``phase`` is an index into :data:`PHASES`."""
    shares = PHASES[phase]
    kind = rng.choices(list(shares), weights=list(shares.values()))[0]
    return kind(rng)
