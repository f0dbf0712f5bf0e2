"""Training text of the demo model: very short stories, small sums and simple facts, made from a seed."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from functools import cache

from tpllm.demo import Prompt

MAX_NUMBER = 50
# Shares of documents, not of tokens: a story is about five times as long as a line with a sum.
STORY_SHARE, SUM_SHARE = 0.35, 0.50


def _rows(table: str) -> list[list[str]]:
    """Read "a/b, c/d" as rows of cells; the tables below would be long as nested tuples."""
    return [row.split("/") for row in re.split(r",\s*", table.strip())]


GIRLS = "Anna Clara Ella Emma Ida Jane Kate Lily Lucy Mia Nora Rosa Ruth Sara".split()
BOYS = "Ben Daniel Finn Hugo Jack Leo Max Noah Oscar Otto Paul Peter Sam Tom".split()
PRONOUNS = {
    "girl": {"he": "she", "He": "She", "him": "her", "his": "her", "His": "Her"},
    "boy": {"he": "he", "He": "He", "him": "him", "his": "his", "His": "His"},
}
COLORS = "red blue green yellow white brown purple golden".split()
BEASTS = "bear badger crow deer fox goat hare mouse owl squirrel turtle wolf".split()
PICKS = {slot: [words[0] for words in _rows(table)] for slot, table in {
    "toy": "ball, teddy bear, toy car, wooden train, doll, drum, toy boat, puppet",
    "dog": "Bello, Rex, Spot, Rusty, Biscuit, Pepper, Coco, Lucky",
    "a_fruit": "an apple, a pear, a plum, an orange, a peach",
    "a_dish": "an apple pie, a cherry pie, a carrot cake, a plum cake, a chocolate cake, a honey cake",
    "parent": "mother, father", "fur": "gray, black, brown, white", "pet": "cat, dog, kitten",
    "flower": "sunflower, poppy, daisy, marigold", "block": "fallen tree, heavy stone, big log",
    "place": "pond, bakery, bridge, old mill, market", "pot": "vase, cup, bowl, teapot",
    "elder": "Mrs. Green, Mr. Brown, Mrs. Hill, Mr. King, old Mr. Wood",
}.items()}
# Where the children search, and where the lost thing then turns up.
AREAS = _rows("""the garden/under the apple tree, the garden/behind the rose bush, the barn/in the hay,
    the whole house/behind the curtain, the kitchen/under the table, the yard/beside the fence""")
# A wild animal, what it eats, and how it goes home.
WILD = _rows("""rabbit/a fresh carrot/hopped back to its burrow, mouse/a piece of cheese/ran back to its hole,
    hedgehog/a slice of apple/crept back under a pile of leaves, robin/a few crumbs/flew back to the hedge,
    squirrel/a handful of nuts/climbed back up the old oak tree, sparrow/some seeds/flew back to its nest,
    duckling/a handful of grain/swam back across the pond""")
# A skill, how it goes wrong at first, a piece of advice, and the success.
SKILLS = _rows("""swim/{he} swallowed a lot of water/Kick your legs and stay calm/swim across the whole pool,
    ride a bicycle/{he} fell into the grass/Look ahead and keep going/ride all the way to school,
    skate/{he} fell on the ice again and again/Bend your knees/skate around the whole lake,
    whistle/only air came out/Make your lips round/whistle a whole song,
    play the flute/it sounded terrible/Blow softly/play a whole song,
    juggle/{he} dropped everything/Start with only two balls/juggle three balls,
    cook/the soup tasted of nothing but salt/Taste it as you go/cook dinner for six people""")
GIFTS = _rows("""paper boat/an old newspaper, wooden horse/a piece of wood, necklace/small shells,
    puppet/an old sock, kite/paper and string, birdhouse/a few boards""")

# [a|b] is a free choice, {name} is filled from the cast of the story; "he" stands for the hero's pronoun
# and "fhe" for the friend's, whoever they are.
MOOD = "[kind|brave|clever|cheerful|quiet|curious]"
INTROS = (
    f"[Once upon a time, there was|There once was] a {MOOD} {{kid}} named {{hero}}.",
    f"{{hero}} was a {MOOD} {{kid}} who lived [near the sea|in a small village|in a big city].",
)
PLOTS = """\
{hero} had a {color} {toy} and [took it everywhere|played with it every day|loved it very much]. [One day|One
morning|After lunch], {he} [could not find it anywhere|looked for it, but it was gone]. {He} looked [under the
bed|behind the sofa|in every drawer], but the {toy} was not there. Then {friend} came to help, and they
searched {area} together. [At last|Finally|Soon], {friend} [saw|spotted|found] the {color} {toy} {spot}.
{hero} [hugged|thanked] {friend}, and they played with the {toy} until [evening|dinner|it was dark].

It was a windy day, and {hero} [took|carried] {his} {color} kite to the [hill|beach|meadow]. The wind [lifted
the kite high into the sky|carried the kite above the trees]. Suddenly the string broke, and the kite
[landed|got stuck] in a tall tree. {hero} was [sad|upset|close to tears], because {he} could not reach it.
[Luckily|Then], {friend} [fetched a long ladder|climbed up carefully] and brought the kite down. [Soon|With a
new string], the {color} kite was flying again, and {hero} [laughed|was happy].

It was raining [hard|after school|in the afternoon], and {hero} had [no umbrella|left {his} umbrella at home].
{He} stood [by the door|under a roof] and waited, because {he} did not want to get wet. Then {friend} came
along with a big {color} umbrella. "[Come with me|We can share it|There is room for two]," said {friend}. They
walked [home|to the station|through the rain] together under the {color} umbrella. [Only their shoes got
wet|They stayed dry], and {hero} thanked {friend} with a [smile|hug].

[One day|On a cold morning|On the way home], {hero} found a [little|small|tiny] {wild} [near the path|in the
grass]. The {wild} was [hungry|weak and hungry|cold and hungry], and it [looked up at {him}|did not run away].
{hero} [ran home and came back with|hurried home and brought it] {feed}. The {wild} [ate every bit|ate it all]
and [soon felt better|grew strong again]. Then it {goes_home}. From then on, it came to see {hero} every
[day|week|spring], and {he} always had {feed} for the {wild}.

{hero} baked {a_dish} [with {his} {parent}|for {his} family|all by {self}]. The whole [house|kitchen|street]
smelled [sweet|wonderful]. {friend} [was walking by|was on the way home] and [knocked on the door|looked in at
the window]. "[Are you hungry|Would you like a piece]?" asked {hero}. {friend} nodded, so {hero} cut a big
piece of the {dish} for {fhim}. They sat [in the garden|at the table|by the window] and talked until the
{dish} was [gone|all eaten up].

In [spring|April|May], {hero} planted a {flower} seed in [a pot|the garden|a sunny corner]. {He} watered it
every [day|morning|evening], but for [a long time|two weeks] nothing happened. "[Be patient|Just wait]," said
{his} {parent}. "[Good things take time|A seed needs time to wake up]." Then, [after a warm rain|one sunny
morning], a tiny green leaf came out of the earth. By summer, the {flower} was [tall and strong|in full
bloom], and {hero} [was very proud of it|showed it to {friend}].

[Once|Long ago], {a_beast} and {a_other} lived in the same [forest|valley|wood]. [After a storm|One morning],
a {block} [lay on|blocked] the path to the [river|lake|meadow]. "This {block} is too heavy for me," said the
{beast}. "[It is too heavy for me too, but we can try together|Then let us push it together]," said the
{other}. They pushed with all their strength, and [slowly|at last] the {block} moved out of the way. [After
that|From that day on], the {beast} and the {other} [were the best of friends|always helped each other].

[Late one night|In the middle of the night], {hero} heard a strange noise [in the kitchen|behind the door].
{He} was [afraid|a little afraid], but {he} [took a lamp|switched on the light] and went to look. [Something
moved in the corner|The noise came again], and {hero} held {his} breath. It was only a [small|hungry|lonely]
{fur} {pet}! {hero} laughed and gave the {pet} [some milk|a little food|something to eat]. Then {he} went back
to bed, and the {fur} {pet} slept [beside {him}|at {his} feet] all night.

{hero} wanted to learn how to {skill}. At first, {fail}, and {he} [felt like giving up|was ready to give up].
"{advice}," said {friend}, who could {skill} very well. So {hero} practiced every [day|afternoon|weekend] [for
a month|for six weeks|all summer]. In the end, {he} could {success}, and {friend} [clapped loudly|was proud of
{him}].

It was {friend}'s birthday, but {hero} had no money for a gift. So {he} [sat down|went to {his} room] and made
a {gift} out of {material}. It took {him} the whole [morning|afternoon]. {friend} opened the box
[slowly|carefully] and [smiled|cheered]. "This {gift} is the best gift of all," {fhe} said. {friend} [kept the
{gift} for many years|put the {gift} next to {fhis} bed], and {hero} [was glad|felt happy].

{hero} and {friend} both wanted to play with the {color} {toy}. {hero} pulled on one side, and {friend} pulled
on the other. [Suddenly|Then] the {toy} fell into [a puddle|the mud], and nobody could play with it. "I am
sorry," said {hero}. "[We should take turns|You can have it first]." They [washed|cleaned] the {color} {toy}
and shared it [for the rest of the day|until it was time to go home].

[During the night|While everyone was asleep], a lot of snow fell. In the morning, {hero} put on {his} {color}
scarf and ran outside. {He} built a [big|tall|round] snowman with a carrot for a nose, and {friend} gave it an
old hat. For [a week|three days|many days], the snowman [stood in the yard|smiled at everyone who passed by].
Then the sun came out, and the snowman [melted|slowly melted away]. {hero} was sad, but {he} kept the old hat
for the next [snowman|winter].

{hero} had a [friendly|playful|lively] little dog named {dog}. One [day|morning|evening], someone left the
gate open, and {dog} ran away. {hero} called and called, but {dog} did not come back. {He} asked {friend}, who
had seen a little dog near the {place}. They hurried to the {place}, and there was {dog}, [asleep in the
sun|playing with a stick]. {hero} took {dog} home and [closed the gate carefully|never left the gate open
again].

{hero} saw {elder} coming [up the hill|home from the market] with a heavy basket. "[May I help you|Can I carry
that for you]?" asked {hero}. {elder} [smiled|was glad] and gave {him} the basket. They talked [and
laughed|about the weather] all the way to the house. At the door, {elder} took {a_fruit} out of the basket and
gave it to {hero}. {He} ate it on the way home and thought it was the [best|sweetest] {fruit} in the world.

{hero} was playing in the [kitchen|living room] when {he} knocked over {his} {parent}'s {color} {pot}. The
{pot} fell on the floor and broke. {hero} wanted to hide the pieces, but {he} knew that [was wrong|it would be
wrong]. {He} went to {his} {parent} and told the truth. "[Thank you for being honest|I am glad you told me],"
said {his} {parent}. Together they glued the {color} {pot}, and [soon it looked almost like new|it looked
beautiful again].

{hero} took the train to visit {his} grandmother [by the sea|in the mountains|in the city]. {He} had {a_dish}
for her in {his} bag. The trip was long, and {hero} fell asleep [by the window|in {his} seat]. A kind
[man|woman] woke {him} up just [in time|before the station]. {His} grandmother was waiting [on the platform|at
the gate] and [hugged {him}|waved]. [At home|Soon], they [ate|shared] the {dish} and told each other [funny
stories|everything].

All summer, {a_beast} [slept in the sun|played games] while {a_other} gathered food. "Winter is coming," said
the {other}, but the {beast} only laughed. When the snow fell, the {beast} had nothing to eat and [was
cold|was very hungry]. It knocked on the {other}'s door and [asked for help|said it was sorry]. "Come in,"
said the {other}. "There is enough for both of us." The next summer, the {beast} and the {other} gathered food
together.
""".strip().replace("\n\n", "\0").replace("\n", " ").split("\0")  # fmt: skip
CHOICE = re.compile(r"\[([^\]]*)\]")


def _people(rng: random.Random) -> dict[str, str]:
    """Two different names and the pronouns that go with them."""
    kid, friend_kid = rng.choice(("girl", "boy")), rng.choice(("girl", "boy"))
    hero = rng.choice(GIRLS if kid == "girl" else BOYS)
    friend = rng.choice([name for name in (GIRLS if friend_kid == "girl" else BOYS) if name != hero])
    friend_pronouns = {f"f{key}": word for key, word in PRONOUNS[friend_kid].items()}
    return {"kid": kid, "hero": hero, "friend": friend, **PRONOUNS[kid], **friend_pronouns}


def _cast(rng: random.Random) -> dict[str, str]:
    """Everybody and everything that a plot may name, drawn once so that a story keeps to it."""
    slots = _people(rng) | {slot: rng.choice(words) for slot, words in PICKS.items()}
    slots["self"] = "herself" if slots["kid"] == "girl" else "himself"
    slots["color"] = rng.choice(COLORS)
    slots["area"], slots["spot"] = rng.choice(AREAS)
    slots["wild"], slots["feed"], slots["goes_home"] = rng.choice(WILD)
    slots["skill"], fail, slots["advice"], slots["success"] = rng.choice(SKILLS)
    slots["fail"] = fail.format_map(slots)
    slots["gift"], slots["material"] = rng.choice(GIFTS)
    slots["fruit"], slots["dish"] = slots["a_fruit"].split()[-1], slots["a_dish"].split()[-1]
    slots["beast"], slots["other"] = rng.sample(BEASTS, 2)
    for slot in ("beast", "other"):
        slots[f"a_{slot}"] = f"{'an' if slots[slot][0] in 'aeiou' else 'a'} {slots[slot]}"
    return slots


def _story(rng: random.Random) -> str:
    plot, slots = rng.choice(PLOTS), _cast(rng)
    if "{hero}" in plot and rng.random() < 0.4:
        plot = f"{rng.choice(INTROS)} {plot}"
    return CHOICE.sub(lambda match: rng.choice(match[1].split("|")), plot).format_map(slots)


THINGS = "apple book coin egg flower nut pear pencil shell stamp".split()
PLUS_FORMS = (
    ("Question: What is {a} plus {b}? Answer:", "{c}."),
    ("{a} + {b} =", "{c}"),
    ("If you add {a} and {b}, you get", "{c}."),
    ("{hero} has {a} {a_noun}. {friend} gives {him} {b} more {b_noun}. Now {hero} has", "{c} {c_noun}."),
)
MINUS_FORMS = (
    ("Question: What is {a} minus {b}? Answer:", "{c}."),
    ("{a} - {b} =", "{c}"),
    ("If you take {b} away from {a}, you get", "{c}."),
    ("{hero} has {a} {a_noun}. {He} gives {b} {b_noun} to {friend}. Now {hero} has", "{c} {c_noun}."),
)


@cache
def held_out(a: int, b: int) -> bool:
    """True for about a tenth of the pairs, which no training text adds or subtracts in either order."""
    pair = f"{min(a, b)},{max(a, b)}".encode()
    return int.from_bytes(hashlib.sha256(pair).digest()[:4], "big") % 10 == 0


def _sum_prompt(form: tuple[str, str], a: int, b: int, result: int, rng: random.Random) -> Prompt:
    noun = rng.choice(THINGS)
    slots = _people(rng) | {"a": str(a), "b": str(b), "c": str(result)}
    slots |= {f"{key}_noun": noun if slots[key] == "1" else f"{noun}s" for key in "abc"}
    return Prompt(form[0].format_map(slots), form[1].format_map(slots), held_out(a, b))


def sum_prompts(held: bool, seed: int) -> Iterator[Prompt]:
    """Every sum of the wanted kind (held out or trained) in every phrasing."""
    rng = random.Random(seed)
    for a in range(MAX_NUMBER + 1):
        for b in range(MAX_NUMBER + 1):
            if held_out(a, b) == held:
                yield from (_sum_prompt(form, a, b, a + b, rng) for form in PLUS_FORMS)
                if b <= a:
                    yield from (_sum_prompt(form, a, b, a - b, rng) for form in MINUS_FORMS)


def _trained_sum(rng: random.Random) -> Prompt:
    while True:
        a, b = rng.randint(0, MAX_NUMBER), rng.randint(0, MAX_NUMBER)
        if held_out(a, b):
            continue
        if rng.random() < 0.5:
            return _sum_prompt(rng.choice(PLUS_FORMS), a, b, a + b, rng)
        a, b = max(a, b), min(a, b)
        return _sum_prompt(rng.choice(MINUS_FORMS), a, b, a - b, rng)


DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = """one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty""".split()
OPPOSITES = _rows("""hot/cold, big/small, up/down, fast/slow, happy/sad, wet/dry, old/young, hard/soft,
    full/empty, high/low, left/right, long/short, early/late, loud/quiet, rich/poor, strong/weak, black/white,
    inside/outside, first/last, good/bad, clean/dirty, near/far""")
PLURALS = _rows("""cat/cats, dog/dogs, house/houses, box/boxes, baby/babies, leaf/leaves, wolf/wolves,
    knife/knives, child/children, man/men, woman/women, foot/feet, tooth/teeth, mouse/mice, goose/geese""")
YOUNG = _rows("dog/puppy, cat/kitten, cow/calf, sheep/lamb, horse/foal, duck/duckling, bear/cub, hen/chick")
CAPITALS = _rows("""France/Paris, Germany/Berlin, Italy/Rome, Spain/Madrid, Portugal/Lisbon, Greece/Athens,
    Austria/Vienna, Poland/Warsaw, Norway/Oslo, Sweden/Stockholm, Denmark/Copenhagen, Finland/Helsinki,
    Ireland/Dublin, Japan/Tokyo, Egypt/Cairo, Canada/Ottawa, Russia/Moscow, Belgium/Brussels""")


def _cycle_facts(kind: str, names: list[str]) -> Iterator[Prompt]:
    for before, after in zip(names, names[1:] + names[:1], strict=True):
        yield Prompt(f"The {kind} after {before} is", f"{after}.")
        yield Prompt(f"The {kind} before {after} is", f"{before}.")
        yield Prompt(f"Question: What {kind} comes after {before}? Answer:", f"{after}.")
        yield Prompt(f"Question: What {kind} comes before {after}? Answer:", f"{before}.")


def _opposite_facts() -> Iterator[Prompt]:
    for left, right in OPPOSITES:
        for word, other in ((left, right), (right, left)):
            yield Prompt(f"The opposite of {word} is", f"{other}.")
            yield Prompt(f"Question: What is the opposite of {word}? Answer:", f"{other}.")


def _word_facts() -> Iterator[Prompt]:
    yield from (Prompt(f"One {one}, two", f"{two}.") for one, two in PLURALS)
    yield from (Prompt(f"A young {old} is called a", f"{young}.") for old, young in YOUNG)
    for country, capital in CAPITALS:
        yield Prompt(f"The capital of {country} is", f"{capital}.")
        yield Prompt(f"Question: What is the capital of {country}? Answer:", f"{capital}.")


def _counting_facts() -> Iterator[Prompt]:
    for first in range(len(NUMBERS)):
        for last in range(first + 2, min(first + 8, len(NUMBERS))):
            words = NUMBERS[first : last + 1]
            yield Prompt(f"Count from {words[0]} to {words[-1]}:", f"{', '.join(words)}.")
            yield Prompt(f"Count down from {words[-1]} to {words[0]}:", f"{', '.join(reversed(words))}.")


FACT_FAMILIES = tuple(
    tuple(family)
    for family in (_cycle_facts("day", DAYS), _cycle_facts("month", MONTHS), _opposite_facts(), _word_facts(),
                   _counting_facts())
)  # fmt: skip


def _lines(rng: random.Random, share_of_sums: float) -> str:
    """One line most of the time, so that the model learns to stop after an answer; sometimes a few lines."""
    lines: list[str] = []
    while not lines or (len(lines) < 6 and rng.random() < 0.35):
        is_sum = rng.random() < share_of_sums
        lines.append((_trained_sum(rng) if is_sum else rng.choice(rng.choice(FACT_FAMILIES))).line)
    return "\n".join(lines)


def documents(seed: int) -> Iterator[str]:
    """Endless training documents; the same seed always gives the same ones."""
    rng = random.Random(seed)
    while True:
        yield _story(rng) if rng.random() < STORY_SHARE else _lines(rng, SUM_SHARE / (1 - STORY_SHARE))
