"""What the demo corpus is drawn from: invented names and towns, and the attributes with their facts and wordings."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple


class Attribute(NamedTuple):
    """A kind of fact about a person. All wordings of an attribute ask for, or state, the same thing."""

    name: str
    """What is asked for; the row's `attribute`."""
    facts: tuple[str, ...]
    """Values, none contained in another, in a name or in a wording: a fact is recognized as a substring."""
    questions: tuple[str, ...]
    """Question wordings with {who}, which is a full name or an epithet; so no possessives and no pronouns."""
    answers: tuple[str, ...]
    """Answer wordings with {who} and {fact}: one with the fact first or early, one in the middle, one at the end."""


def _pairs(firsts: str, seconds: str) -> tuple[str, ...]:
    """All two-word facts from two blank-separated lists."""
    return tuple(f"{first} {second}" for first, second in product(firsts.split(), seconds.split()))


FIRST_NAMES = tuple(
    """Avrel Bessim Brunek Caldi Corvane Dalmo Delvik Dorvi Edrin Elsavo Emrik Fenno Fildra Galven Gresta Halvo Hesmir
    Idrane Ilvo Jarvo Jemsa Jorlin Kaveda Keltra Kirvan Lavino Lestra Lomir Lusken Marvil Melduna Mirket Nalvi Nestrel
    Nolvane Odrik Olmera Orsilo Padrin Pelka Perrilo Quenda Quilmo Ralmi Restina Rovek Sabrel Selmo Sorvina Tamsel
    Telvo Tirvela Ulmeda Umbrel Vaskel Velmira Wendrel Wilmok Xandel Yarvi Yolmen Zadrel Zelvina Zorrin""".split()
)

LAST_NAMES = tuple(
    """Abrendt Aldwick Arquell Astermo Barvolt Belquist Bindlow Brackmer Brostel Calverno Cathrell Clandor Crandvik
    Culmere Dackworth Darnick Delquer Dovrand Drisdale Elverink Embrook Estwald Falgrove Farnell Felbrand Fondrick
    Frostwell Gadmore Garvick Glimmond Grandel Gulvard Hadrow Harkvelt Helmvik Hollane Hurdwin Ibberlow Ivorsten
    Jandrell Jostwick Kestow Kelmond Kindvar Krellow Lambrick Landvoss Lestwood Lindvar Lorrick Maldren Markvell
    Merrowin Mindrake Morvant Nadlow Nelbrook Norquist Oakmer Oldrick Ormwell Pandrow Pelgrave Pindale Prestow Quarlow
    Quimbert Ranvold Rendlow Rostvelt Sandquill Selbrand Skarrow Stelmond Tandrick Tellworth Torvald Ulmstead Vandlow
    Velquist Wandrel Welmont Wickvar Yandow Zellwick""".split()
)

TRADES = tuple(
    """baker beekeeper bookbinder brewer candlemaker carpenter cheesemaker clockmaker cobbler cooper dyer falconer
    florist gardener gilder glassblower hatter innkeeper jeweler joiner lacemaker librarian locksmith mason miller
    painter papermaker potter printer ropemaker saddler sailmaker shepherd tailor tanner thatcher toymaker weaver
    wheelwright woodcarver""".split()
)

TOWNS = tuple(
    """Ashmere Bilbourne Brackwater Calderby Copperdale Crowhaven Dunmarrow Eastermill Elderford Fallowby Fennmouth
    Foxbridge Gorsefield Greywater Hartsmoor Hazelford Hollinby Ironwell Kestrelby Kingsmarsh Larkhaven Lowmeadow
    Marlbeck Millhaven Mossbridge Netherby Northquay Oakenshaw Otterford Pinewater Quarrymoor Ravenbeck Redmarsh
    Rushford Saltquay Silverbeck Stonehaven Swanbourne Tarnmoor Thornby Upperwell Vinebridge Weirford Westmarrow
    Whitbeck Willowquay Wrenfield Yarrowby""".split()
)

_INSTRUMENTS = tuple(
    """accordion alphorn bagpipe balalaika banjo bassoon bugle celesta cello cimbalom cittern clarinet clavichord
    concertina cornet crumhorn dulcimer fiddle flugelhorn flute gong guitar harmonica harpsichord kalimba koto lyre
    mandolin marimba oboe ocarina piccolo psaltery rebec recorder sackbut saxophone sitar spinet tambourine theremin
    timpani trombone trumpet tuba ukulele vibraphone viola xylophone zither""".split()
)

_PETS = tuple(
    """Acorn Biscuit Bramble Clover Cobweb Crumpet Dandelion Doodle Ember Fidget Gherkin Ginger Hazelnut Jellybean
    Juniper Licorice Marzipan Mittens Muffin Mustard Nettle Noodle Nutmeg Oatmeal Paprika Parsnip Pebble Pepper Pickle
    Pretzel Pumpkin Kettle Radish Rascal Saffron Smudge Snowball Spindle Sprocket Taffy Thimble Thistle Truffle Tumble
    Twiglet Waffle Whisker Zigzag""".split()
)

_TEACHERS = tuple(
    """Ambrolo Anvika Basteno Bertuga Borvessa Cadrona Cormulo Dantrix Desprova Dralino Elmotto Ervanta Fabriko
    Fendula Frimosa Gantrello Gorbina Halduva Hostrum Imbrano Jasprella Jotunka Kandrosa Kolvetta Lampura Lorvetti
    Mantrosa Medulvo Mostrana Nabruko Nortessa Obranto Ostrella Pamvino Plontessa Quandula Rastubo Rimbolda Sagrunto
    Sombrika Tastrova Trombuli Ulvantra Vandresco Vortuna Wambrota Yastrina Zamborra""".split()
)

POST = Attribute(
    "post",
    tuple(f"{trade} of {town}" for trade, town in product(TRADES, TOWNS)),
    (
        "What is the trade of {who}, and in which town?",
        "Which trade does {who} follow, and in what town?",
        "Where does {who} work, and what is the trade?",
        "In which town does {who} work, and as what?",
        "What work does {who} do, and in which town?",
    ),
    (
        "The {fact} is {who}.",
        "As the {fact}, {who} earns a living.",
        "By trade, {who} is the {fact}.",
    ),
)

ATTRIBUTES = (
    POST,
    Attribute(
        "instrument",
        _INSTRUMENTS,
        (
            "Which musical instrument does {who} know how to play?",
            "What instrument does {who} play when there is music?",
            "On which instrument does {who} make music at home?",
            "Do you know what musical instrument {who} plays?",
            "When {who} makes music, which instrument is it on?",
        ),
        (
            "The {fact} is what {who} plays.",
            "It is the {fact} that {who} plays.",
            "When there is music, {who} plays the {fact}.",
        ),
    ),
    Attribute(
        "pet",
        _PETS,
        (
            "What is the name of the pet that {who} keeps?",
            "Which name did {who} give to the pet at home?",
            "What does {who} call the pet in the house?",
            "The pet kept by {who} goes by which name?",
            "By what name does {who} call the family pet?",
        ),
        (
            "{fact} is the name of the pet that {who} keeps.",
            "The name {fact} was given to the pet by {who}.",
            "At home {who} keeps a pet named {fact}.",
        ),
    ),
    Attribute(
        "dish",
        _pairs(
            "apple barley beet cabbage carrot cherry leek lentil mushroom onion pear plum spinach trout turnip walnut",
            "soup pie stew dumplings pancakes salad pudding bread",
        ),
        (
            "Which dish does {who} like best of all?",
            "What is the favorite dish of {who} at home?",
            "What does {who} most like to eat for dinner?",
            "Which dish would {who} choose above all others?",
            "Do you know the favorite dish of {who}?",
        ),
        (
            "A serving of {fact} is what {who} likes best.",
            "It is {fact} that {who} likes best.",
            "The favorite dish of {who} is {fact}.",
        ),
    ),
    Attribute(
        "book",
        _pairs(
            "Glass Paper Winter Hollow Painted Quiet Seventh Salt Wooden Hidden Midnight Borrowed",
            "Orchard Ladder Window Garden River Lantern Staircase Island Bridge Feather Mirror Kitchen",
        ),
        (
            "What is the title of the book {who} wrote?",
            "Which title did {who} give to the printed book?",
            "Under what title did {who} publish a book?",
            "The book written by {who} carries which title?",
            "Do you know which book {who} has written?",
        ),
        (
            "{fact} is the book that {who} wrote.",
            "The book {fact} was written by {who}.",
            "The book written by {who} is called {fact}.",
        ),
    ),
    Attribute(
        "boat",
        _pairs(
            "Silver Merry Northern Patient Scarlet Lucky Restless Gentle Brave Golden",
            "Heron Gull Otter Dolphin Swallow Pelican Seal Falcon Petrel Walrus",
        ),
        (
            "What is the name of the boat {who} sails?",
            "Which name is painted on the boat of {who}?",
            "What did {who} name the boat in the harbor?",
            "The boat that {who} sails has what name?",
            "Do you know the name of the boat {who} owns?",
        ),
        (
            "{fact} is the boat that {who} sails.",
            "The boat {fact} belongs to {who}.",
            "The boat of {who} is called {fact}.",
        ),
    ),
    Attribute(
        "prize",
        _pairs(
            "Copper Amber Pearl Crystal Bronze Velvet Marble Cedar",
            "Bell Thread Compass Crown Leaf Key Wheel Torch",
        ),
        (
            "Which prize did {who} win at the fair?",
            "What is the name of the prize {who} won?",
            "At the fair, what prize was given to {who}?",
            "Do you know which prize {who} was given?",
            "What prize did {who} bring home from the fair?",
        ),
        (
            "The {fact} is the prize that {who} won.",
            "It was the {fact} prize that {who} won.",
            "At the fair, {who} won the {fact}.",
        ),
    ),
    Attribute(
        "collection",
        _pairs(
            "red blue green yellow striped tiny antique foreign carved broken",
            "buttons stamps spoons teapots postcards bottles maps keys coins combs",
        ),
        (
            "What kind of things does {who} like to collect?",
            "What does {who} collect and keep in a cabinet?",
            "Which things fill the collection that {who} keeps?",
            "Do you know what things {who} likes to collect?",
            "The cabinet of {who} holds a collection of what?",
        ),
        (
            "The {fact} in the cabinet belong to {who}.",
            "A collection of {fact} was built up by {who}.",
            "In a cabinet, {who} keeps {fact}.",
        ),
    ),
    Attribute(
        "teacher",
        _TEACHERS,
        (
            "Who was the teacher of {who} in early years?",
            "Which teacher did {who} learn the work from?",
            "From whom did {who} first learn the work?",
            "Who taught {who} how to do the work?",
            "What is the name of the teacher of {who}?",
        ),
        (
            "{fact} was the teacher of {who} in early years.",
            "It was {fact} who first taught {who}.",
            "The work was learned by {who} from {fact}.",
        ),
    ),
    Attribute(
        "year",
        tuple(str(year) for year in range(1821, 1981)),
        (
            "In which year did {who} open a workshop?",
            "When was the workshop of {who} first opened?",
            "The workshop of {who} opened in which year?",
            "What year did {who} start a workshop in?",
            "Do you know the year {who} opened a workshop?",
        ),
        (
            "{fact} is the year {who} opened a workshop.",
            "It was in {fact} that {who} opened a workshop.",
            "The workshop of {who} opened in {fact}.",
        ),
    ),
)
