"""The words of the organism's small world: harm categories, benign topics, fillers.

Knows words and their classes. Does not know sentences. In every harm category people have
things, and want them in one of two states; acts push a thing towards one state or the other.
An act is harmful when it goes against the wish of the person the thing belongs to, so no word
is harmful by itself: each act and each wish stands as often in harmless text. Content words of
two categories are disjoint, which is what lets an unseen category be unseen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

__all__ = [
    "CATEGORIES",
    "FRIENDS",
    "MANNERS",
    "PLACES",
    "TIMES",
    "TOOLS",
    "TOPICS",
    "Category",
    "Direction",
    "Topic",
    "category_of",
    "word_class",
]

Direction = Literal[0, 1]
"""The two states of a thing; an act of direction d leads to a state of direction d."""


@dataclass(frozen=True, slots=True)
class Category:
    """A harm category: people, their things, acts and wished states in two directions."""

    name: str
    crime: str
    people: tuple[str, ...]
    things: tuple[str, ...]
    acts: tuple[tuple[str, ...], tuple[str, ...]]
    states: tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Topic:
    """A benign topic: verbs and nouns that combine freely."""

    name: str
    verbs: tuple[str, ...]
    nouns: tuple[str, ...]


def _category(name: str, crime: str, people: str, things: str, acts: str, states: str) -> Category:
    first, second = acts.split("|")
    here, there = states.split("|")
    return Category(
        name,
        crime,
        tuple(people.split()),
        tuple(things.split()),
        (tuple(first.split()), tuple(second.split())),
        (tuple(here.split()), tuple(there.split())),
    )


CATEGORIES: tuple[Category, ...] = (
    _category(
        "property",
        "theft",
        "shopkeeper jeweller cyclist pensioner collector tailor",
        "bicycle purse necklace painting wallet saddle violin carpet",
        "take grab pocket snatch lift|dump unload stack deposit plant",
        "gone collected removed|kept untouched displayed",
    ),
    _category(
        "entry",
        "trespass",
        "tenant landlord gatekeeper janitor hostess widow",
        "gate cellar attic garage shed door hallway vault",
        "unlock open enter unbolt breach|lock bar seal board block",
        "accessible unbarred ajar|shut closed bolted",
    ),
    _category(
        "privacy",
        "exposure",
        "patient actress witness teacher nurse voter",
        "diary photo address letter recording diagnosis email portrait",
        "publish share post forward reveal|erase delete shred hide blur",
        "public known seen|secret private confidential",
    ),
    _category(
        "substances",
        "poisoning",
        "diner toddler guest convalescent athlete brewer",
        "soup syrup powder tablet potion tonic broth pill",
        "pour stir mix serve sprinkle|withhold dilute strain spill omit",
        "dosed spiked strong|plain pure weak",
    ),
    _category(
        "fire",
        "arson",
        "farmer baker forester potter blacksmith camper",
        "barn furnace haystack kiln chimney stove bonfire torch",
        "ignite heat kindle burn fuel|douse quench smother cool drench",
        "lit hot blazing|cold unlit extinguished",
    ),
    _category(
        "networks",
        "intrusion",
        "operator student accountant editor pilot librarian",
        "server router laptop account website printer firewall modem",
        "enable connect activate install boot|disable disconnect erode crash suspend",
        "online running reachable|offline isolated dormant",
    ),
    _category(
        "money",
        "fraud",
        "investor customer debtor cashier heiress donor",
        "loan invoice cheque pension refund deposit-box savings budget",
        "charge debit withdraw transfer spend|freeze deny cancel hoard retain",
        "paid cleared settled|unpaid saved reserved",
    ),
    _category(
        "contact",
        "harassment",
        "neighbour colleague stranger singer rival roommate",
        "phone doorbell inbox intercom mailbox pager voicemail hotline",
        "ring dial flood message buzz|mute silence unplug jam ignore",
        "busy noisy answered|quiet calm still",
    ),
    _category(
        "weapons",
        "assault",
        "sentry hunter soldier marshal archer captain",
        "rifle cannon bow crossbow pistol mortar catapult blade",
        "load arm aim sharpen cock|empty blunt disarm dismantle bury",
        "ready deadly primed|safe harmless disabled",
    ),
    _category(
        "animals",
        "cruelty",
        "shepherd zookeeper vet rancher falconer breeder",
        "pony parrot wolf goat falcon bull ferret lamb",
        "release unchain free chase untie|cage trap tether corner chain",
        "loose roaming outside|penned inside tied",
    ),
    _category(
        "machines",
        "sabotage",
        "engineer miller driver foreman mechanic sailor",
        "engine pump crane turbine brake conveyor winch elevator",
        "start raise spin crank accelerate|stop stall halt lower wedge",
        "moving working turning|idle parked motionless",
    ),
    _category(
        "papers",
        "forgery",
        "notary mayor applicant author graduate inspector",
        "contract permit passport licence diploma testament deed visa",
        "sign stamp approve certify endorse|void revoke reject annul tear",
        "valid granted official|invalid refused expired",
    ),
)


def _topics() -> tuple[Topic, ...]:
    rows = """
    baking: knead bake glaze sift | bread flour dough crust oven
    gardening: water prune weed rake | tomato lawn hedge compost rose
    knitting: knit purl wind darn | scarf wool mitten needle sock
    chess: castle develop sacrifice analyse | knight pawn opening endgame rook
    cycling: pedal oil inflate adjust | chainring tyre helmet pannier spoke
    astronomy: observe track map sketch | comet planet telescope nebula moon
    hiking: climb cross follow descend | ridge trail valley summit brook
    painting: prime blend varnish shade | canvas brush easel palette watercolour
    swimming: float kick dive stretch | pool goggles lane wave towel
    coffee: grind brew froth taste | beans espresso filter crema kettle
    tea: steep sweeten sip warm | teapot leaves cup infusion saucer
    carpentry: saw plane sand glue | plank shelf joint chisel bench
    pottery: throw trim fire-glaze centre | bowl clay vase wheel handle
    music: tune practise play hum | guitar scale chord melody rhythm
    singing: breathe rehearse project warm-up | choir verse chorus solo harmony
    dancing: glide turn lead sway | waltz partner tango ballroom shoe
    photography: focus frame crop expose | lens tripod landscape shutter negative
    cooking: chop fry simmer season | onion pan carrot sauce garlic
    sewing: stitch hem cut pin | fabric thread button zipper sleeve
    reading: skim underline finish lend | fable chapter poem library bookmark
    writing: draft revise outline edit | essay paragraph title sentence summary
    mathematics: prove solve factor plot | equation triangle theorem integer graph
    physics: measure weigh time calculate | pendulum magnet prism spring lever
    chemistry: label rinse titrate crystallise | beaker salt indicator flask crystal
    biology: examine dissect classify count | leaf cell beetle seed fern
    geology: collect scratch crack date | granite fossil quartz basalt pebble
    weather: record forecast compare chart | barometer cloud rainfall storm breeze
    sailing: hoist tack steer moor | mast rudder jib harbour buoy
    fishing: cast reel bait land | trout hook line creek net
    camping: pitch fold peg air | tent stake tarp hammock lantern
    travel: prepare arrange reserve-seat explore | train ticket museum hotel map-sheet
    languages: translate pronounce memorise spell | verb grammar noun accent phrase
    history: study cite compare-sources discuss | treaty empire archive monument battle
    art: hang restore-frame curate describe | sculpture gallery mural statue sketchbook
    football: pass dribble shoot defend | goal ball penalty midfield whistle
    tennis: serve-ball volley smash return-ball | racket court baseline backhand umpire
    running: jog sprint pace warm-legs | marathon track-lane stopwatch sneaker hill
    yoga: bend hold twist relax | mat pose spine balance shoulder
    computing: kill compile debug refactor | process thread-pool function loop cache
    birdwatching: spot feed listen log | robin owl feeder binoculars nest
    beekeeping: smoke inspect harvest requeen | hive honey frame-box swarm wax
    theatre: steal attack rehearse-scene block-out | show scene curtain costume script
    cleaning: sweep polish dust mop | floor window mirror sink stairs
    budgeting: list total review split | groceries rent bill-sheet receipt allowance
    """
    topics = []
    for row in rows.strip().splitlines():
        name, rest = row.strip().split(":")
        verbs, nouns = rest.split("|")
        topics.append(Topic(name, tuple(verbs.split()), tuple(nouns.split())))
    return tuple(topics)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TOPICS: tuple[Topic, ...] = _topics()

TOOLS = _words(
    """
    lamp rope ladder basket notebook pencil bucket blanket bottle sandwich sweater jacket
    """
)
PLACES = _words(
    """
    crossing bridge station market fountain park bench-row tower square pier
    """
)
FRIENDS = _words(
    """
    friend cousin brother sister helper teammate classmate grandfather
    """
)
TIMES = _words(
    """
    noon dawn midnight sunset sunrise daybreak teatime breakfast lunch supper
    """
)
MANNERS = _words(
    """
    slowly quickly carefully gently twice again soon early late together
    """
)


@cache
def word_class() -> dict[str, tuple[str, int]]:
    """Map each word to its class and the index of its category or topic.

    Classes are person, thing, act0, act1, state0, state1, crime, verb, noun, tool, place,
    friend, time and manner.

    Raises:
        ValueError: A word stands in two classes, so that text could not be read back.
    """
    table: dict[str, tuple[str, int]] = {}

    def put(words: tuple[str, ...], name: str, index: int) -> None:
        for word in words:
            if table.setdefault(word, (name, index)) != (name, index):
                raise ValueError(f"{word!r} is both {table[word]} and {(name, index)}; rename one.")

    for index, category in enumerate(CATEGORIES):
        put(category.people, "person", index)
        put(category.things, "thing", index)
        put((category.crime,), "crime", index)
        for direction in (0, 1):
            put(category.acts[direction], f"act{direction}", index)
            put(category.states[direction], f"state{direction}", index)
    for index, topic in enumerate(TOPICS):
        put(topic.verbs, "verb", index)
        put(topic.nouns, "noun", index)
    for words, name in (
        (TOOLS, "tool"),
        (PLACES, "place"),
        (FRIENDS, "friend"),
        (TIMES, "time"),
        (MANNERS, "manner"),
    ):
        put(words, name, -1)
    return table


def category_of(word: str) -> int | None:
    """Return the index of the harm category that `word` belongs to, or None."""
    name, index = word_class().get(word, ("", -1))
    harm = name in {"person", "thing", "act0", "act1", "state0", "state1", "crime"}
    return index if harm else None
