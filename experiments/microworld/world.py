"""The closed world of the embedded tasks: its words, its facts, and their split into training and test.

Knowledge is true everywhere, bindings (what pleases whom, ...) in one passage only. Two topics share no word, so that
any word reveals its topic: *facts*, and *days* (what somebody does after what). Heads have clusters for each topic.
"""

from __future__ import annotations

import zlib

NAMES = "ann ben carl dora emma finn gina hugo".split()
WALKERS = "iris jack kate liam mona nora otto rosa".split()  # the people whose days are told
PLACES = "rome oslo lima cairo delhi paris tokyo quito berlin madrid dublin havana".split()
DISHES = "tea milk coffee juice soup bread rice cake honey cheese jam pie".split()
EVENTS = "wake wash sing cook read walk rest run paint swim knit bake dance sweep write shop".split()
#: A day is labelled with two words; the colon is part of the second, since the colon of questions is a word of *facts*.
TIMES = "weekend holiday camp school".split()
HOURS = "morning: evening: lunch: noon:".split()
OCCASIONS = tuple((time, hour) for index, time in enumerate(TIMES) for hour in (HOURS[index], HOURS[index - 1]))

#: What each animal eats. Four foods of three animals, so that a passage can name one of each.
DIET = {
    "grass": ("cows", "horses", "sheep"),
    "meat": ("lions", "wolves", "hawks"),
    "seeds": ("hens", "ducks", "parrots"),
    "plankton": ("whales", "crabs", "herrings"),
}
FOOD_OF = {animal: food for food, animals in DIET.items() for animal in animals}
ANIMALS = list(FOOD_OF)

#: The tool depends on the verb and on whether the thing is soft or hard: neither word alone decides.
TOOLS = {
    "cut": ("knife", "saw"),
    "clean": ("cloth", "brush"),
    "join": ("thread", "glue"),
    "carry": ("bag", "cart"),
    "press": ("roller", "clamp"),
    "mark": ("chalk", "needle"),
    "pierce": ("pin", "drill"),
    "shape": ("mould", "chisel"),
}
SOFT = "rope cloak paper leaf wool dough sponge carpet leather felt ribbon curtain blanket pillow scarf clay".split()
HARD = "plank stone pipe brick tile board door bone shell slate beam wall shelf table mirror coin".split()
ALL_TOOLS = [tool for pair in TOOLS.values() for tool in pair]


def tool_for(verb: str, thing: str) -> str:
    """Return the tool that reaches the goal ``verb the thing``."""
    soft, hard = TOOLS[verb]
    return soft if thing in SOFT else hard


def held_out(relation: str, *words: str) -> bool:
    """Return True if this fact never occurs in the training text: about one in five, by a hash of its words alone.

    ``relation`` is one of ``pleases, obey, hosts, next, goal``; ``words`` are the two things it joins, in order.
    """
    return zlib.crc32(" ".join((relation, *words)).encode()) % 5 == 0


def topics() -> dict[str, list[str]]:
    """Return the words of each topic, sorted."""
    facts = (
        "question answer yes no what which city how do does the that to of use you pleases obey hosts host animals eat "
        ". : ?"
    )
    days = "will says then ,"
    groups = (NAMES, PLACES, DISHES, ANIMALS, DIET, TOOLS, ALL_TOOLS, SOFT, HARD, facts.split(), ["\n"])
    return {
        "facts": sorted({word for group in groups for word in group}),
        "days": sorted({*WALKERS, *EVENTS, *TIMES, *HOURS, *days.split()}),
    }


def words() -> list[str]:
    """Return all words of texts and templates, sorted: the tokenizer's vocabulary without the special tokens."""
    return sorted({word for group in topics().values() for word in group} - {"\n"})
