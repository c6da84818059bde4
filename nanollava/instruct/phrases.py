"""The noun phrases of captions, by which the paper's pre-training set was chosen (LLaVA section 4.2 and appendix).

Two finders:

    simple  rules and word lists of our own, below: no grammar, made for captions in English, needs nothing
    spacy   spaCy's noun chunks, as in the paper, where spaCy and a model of it are installed

Both give phrases in lower case and without the word that points in front: "The red bus" and "a red bus" are one phrase.
"""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib import import_module

from nanollava.error import Error, first_line

SPACY_MODEL = "en_core_web_sm"
TOKEN = re.compile(r"[^\W_]+(?:['’-][^\W_]+|(?<=\d)[.,:]\d+)*|[^\w\s]")


def words_of(text: str) -> frozenset[str]:
    return frozenset(text.split())


POINTING = words_of("a an the this these those another his her its their my our your some any each every no")

# What stands between phrases: prepositions, conjunctions, pronouns, auxiliary verbs, adverbs of place and time.
BETWEEN = words_of("""
    of in on at by for with without from to into onto over under above below behind beside besides near next around
    between among amid amidst against along alongside across through throughout towards toward up down off out outside
    inside before after about as like than during while per via upon within beneath underneath beyond past until since
    close and or but nor so because if when where which who whom whose what how why then though although plus
    that i me you he him she it we us they them mine yours hers ours theirs myself yourself himself herself itself
    themselves something someone everyone everything anything anyone nothing others there here
    is are was were be been being am has have had having do does did can could will would may might must shall should
    isn't aren't it's there's he's she's not very too also just only together apart ahead away again almost already
    still even ever never now soon today upside sideways outdoors indoors overhead nearby upright downhill midair
    alone well used s t
""")

# Words that describe: a phrase may begin with them, and needs a noun behind them.
DESCRIBING = words_of("""
    one two three four five six seven eight nine ten eleven twelve dozen hundred several many few various different
    numerous multiple other both all more most half single double own same first second third last
    red blue green yellow orange black white brown grey gray pink purple golden silver tan beige turquoise blonde blond
    colorful colourful bright dark pale plain striped plaid multicolored colored coloured
    big large huge giant massive enormous small little tiny tall short long wide narrow high low deep thick thin fat
    old young new elderly ancient antique vintage modern middle-aged mature retro
    good nice beautiful wonderful pretty lovely cute happy sad angry funny silly ugly curly hairy furry fluffy friendly
    ready shiny outdoor indoor
    clean dirty messy neat empty full open wet dry hot cold warm cool frozen fresh raw ripe tasty delicious
    wooden metallic grassy sandy snowy rocky cloudy sunny rainy muddy leafy dusty foggy stormy lush busy crowded quiet
    calm rough smooth soft hard sharp heavy round flat wild domestic famous local public private urban rural stainless
    left right front rear main upper lower early late daily such certain great typical whole real fake
""")

# Nouns that look like participles or adverbs.
NOUNS = words_of("""
    building ceiling painting wedding morning evening king ring string spring wing thing swing clothing railing awning
    parking crossing earring pudding frosting icing topping dressing lighting siding bedding drawing stocking viking
    duckling sibling meeting flooring plumbing seating sling sting shed sled weed seed reed breed moped feed speed
    family butterfly jelly belly lily bully ally assembly monopoly reply supply dolly trolley holly italy july
""")

# Verbs that captions are fond of, as they stand behind a noun: present tense, and the past where it is irregular.
# The forms in -ing and -ed are known by their endings.
PRESENT = words_of("""
    sit stand walk ride hold look wear play lay lie eat drive fly jump run swim take make get give put go come use try
    talk cut hang lean cross pull push carry throw catch hit kick reach pose prepare cook serve fill cover surround
    display decorate sleep rest travel move pass wait turn graze drink read write smile fall rise enjoy appear seem
    contain include feature perform kneel bend stare enter leave see say tell think want need help show watch keep let
    bring grow begin stop follow stay speak attend arrive celebrate win sing touch pick sell buy share set overlook
    chase float sail raise nap gather
""")
PAST = words_of("""
    sat stood held wore took went got gave made saw ran ate drove flew rode swam lain hung fell rose won sold spoke
    wrote came kept found seen taken shown drawn worn done gone carries tries flies
""")
VERBS = PAST | PRESENT | {verb + ("es" if verb[-2:] in ("sh", "ch", "ss", "go") else "s") for verb in PRESENT}

NOTHING, BEGUN, NAMED = range(3)  # of a phrase: no word yet, describing words alone, a noun
Role = str  # "between", "pointing", "describing" or "noun"


def simple_phrases(text: str) -> set[str]:
    """The noun phrases of a caption by rules of our own: runs of words that are neither verbs nor on the list of what
    stands between, with a noun at the end."""
    found: set[str] = set()
    words: list[str] = []
    state = NOTHING
    tokens = TOKEN.findall(text.lower())
    for i, word in enumerate(tokens):
        role = role_of(word, state)
        if role == "between" and state == BEGUN and joins(tokens, i):
            words += ["and"] if word == "and" else []  # "black and white photo", "a large, brown dog"
            continue
        if state == NAMED and role != "noun":
            found.add(phrase(words))
        if role in ("between", "pointing") or (state == NAMED and role != "noun"):
            words = []
        state = {"between": NOTHING, "pointing": BEGUN, "describing": BEGUN, "noun": NAMED}[role]
        if role != "between":
            words.append(word)
    return found | {phrase(words)} if state == NAMED else found


def joins(tokens: list[str], i: int) -> bool:
    """Whether "and" or a comma stands between two describing words."""
    around = tokens[i - 1], tokens[i + 1] if i + 1 < len(tokens) else ""
    return tokens[i] in ("and", ",") and all(word in DESCRIBING for word in around)


@lru_cache(1 << 16)
def role_of(word: str, state: int) -> Role:
    """What a word is behind a phrase in that state."""
    if word in POINTING:
        return "pointing"
    if word in BETWEEN or not word[0].isalnum():
        return "between"
    if word in DESCRIBING or word[0].isdigit():
        return "describing"
    if word in NOUNS:
        return "noun"
    if len(word) > 4 and word.endswith(("ing", "ed")):  # "a parked car", but "a car parked", "parked behind"
        return "describing" if state == BEGUN else "between"
    if len(word) > 4 and word.endswith("ly"):
        return "between"
    if word in VERBS:  # "a walk", but "a man walks"
        return "noun" if state == BEGUN else "between"
    return "noun"


def phrase(words: list[str]) -> str:
    """The words as one phrase, without what points; "" where that is all."""
    start = next((i for i, word in enumerate(words) if word not in POINTING), len(words))
    return " ".join(words[start:])


def spacy_phrases(texts: Iterable[str], model: str = SPACY_MODEL, processes: int = 1) -> Iterator[set[str]]:
    """spaCy's noun chunks of each caption (Doc.noun_chunks; pronouns are none of ours). Raises Error where spaCy or its
    model is missing."""
    try:
        spacy = import_module("spacy")
    except ImportError as error:
        remedy = 'pip install -e ".[spacy]", or take --finder simple'
        raise Error(f"--finder spacy: spaCy is not installed; {remedy}") from error
    try:
        nlp = spacy.load(model, disable=["ner", "lemmatizer"])
    except OSError as error:
        remedy = f"python -m spacy download {model}, or take --finder simple"
        raise Error(f"--spacy-model {model}: cannot be loaded ({first_line(error)}); {remedy}") from error
    if not nlp.has_pipe("parser"):
        raise Error(f"--spacy-model {model}: has no parser, which noun phrases need; take {SPACY_MODEL}")
    for doc in nlp.pipe(texts, n_process=processes):
        chunks = (chunk for chunk in doc.noun_chunks if chunk.root.pos_ != "PRON")
        yield {phrase(chunk.text.lower().split()) for chunk in chunks} - {""}
