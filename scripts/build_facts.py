"""Makes the facts that ship as package data in grun/data/facts, from three packages of the Python index.

Run by who keeps this repository, when a table below or a package changes; the files are in git. Needs the wheels:

    pip download --no-deps -d wheels countryinfo==1.0.1 mendeleev==1.3.0 randfacts==0.24.4
    python scripts/build_facts.py --wheels wheels

The same wheels and tables give the same bytes. elements.json is mendeleev's names, symbols, numbers and families of the
elements that people have heard of. countries.json is countryinfo's capitals, regions, languages,
currencies, demonyms and land borders, of the countries in COUNTRIES, with what countryinfo has wrong or stale put right
by the tables. sentences.txt is of randfacts. general.json is of general_questions.txt and mendeleev's elements: with
--model, a folder of a chat model, those of them are chosen that it answers rightly; else the file stays as it is.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import re
import sqlite3
import tempfile
import zipfile
from pathlib import Path
from random import Random
from typing import Any

FACTS = Path(__file__).resolve().parents[1] / "grun" / "data" / "facts"
QUESTIONS = Path(__file__).with_name("general_questions.txt")
COUNTRYINFO = "countryinfo-1.0.1-py3-none-any.whl"
MENDELEEV = "mendeleev-1.3.0-py3-none-any.whl"
RANDFACTS = "randfacts-0.24.4-py3-none-any.whl"

KINDS = ("capital", "continent", "language", "currency", "demonym")


def table(text: str) -> dict[str, list[str]]:
    """Values by key, of `key: value, value; key: value`."""
    entries = (entry.split(": ") for entry in " ".join(text.split()).split("; "))
    return {key: values.split(", ") for key, values in entries}


COUNTRIES = """
DZA AGO EGY ETH GHA KEN LBY MAR MOZ NGA RWA SEN SOM TUN UGA ZMB ZWE LBR TZA
AFG ARM AZE BGD KHM CHN IND IDN IRN IRQ JPN JOR LAO LBN MYS NPL PRK PAK PHL QAT SAU KOR SYR THA TUR VNM
ALB AUT BLR BEL BGR HRV CZE DNK FIN FRA DEU GRC HUN ISL IRL ITA LVA LTU NLD NOR POL PRT ROU RUS SRB SVN ESP SWE
CHE UKR GBR
CAN CRI CUB HTI JAM MEX USA
ARG BRA CHL COL ECU PER URY VEN
AUS NZL
""".split()
"""Sovereign, widely known, by code. Left out: two or disputed capitals (BOL, ZAF, BEN, CIV, LKA, ISR, PSE, YEM, BDI,
TWN), names that stand in the name of another (OMN in Romania, MLI in Somalia, NER in Nigeria, GIN, SDN, COD, COG,
DOM), names of other well-known places (GEO), facts as the name (LUX, SGP, DJI, PAN, GTM, KWT, SLV),
and countries of whose capital a small model knows nothing (asked of SmolLM2-135M-Instruct in five wordings)."""

NAMED_IN = ("de", "es", "fr")
SPELLED = {("HUN", "es"): "Hungría"}
"""Names that countryinfo misspells, by code and language."""

WITH_ARTICLE = {"NLD", "PHL", "USA", "GBR", "CZE"}
"""Countries that have "the" before them in running text."""

ALIASES = table("""
CZE: Czechia; GBR: Great Britain, Britain; NLD: Holland; PRK: DPRK; TUR: Türkiye, Turkiye; USA: USA, U.S.;
VNM: Viet Nam
""")
"""Other names in use. Not taken from countryinfo, whose spellings hold native and wrong ones (Island, Thai, Mexicanos).
None stands in a common word or in another name, as "US" does in Russia and "UK" in Ukraine."""

SPELLINGS = table("""
Beijing: Peking; Bern: Berne; Bogota: Bogotá; Brasilia: Brasília; San Jose: San José; Hanoi: Ha Noi;
Kathmandu: Katmandu; Kyiv: Kiev; New Delhi: Delhi; Phnom Penh: Phnom-Penh; Reykjavik: Reykjavík; Tehran: Teheran
""")
"""Further spellings of a capital that are right."""

CAPITALS = {
    "BRA": ("Brasilia", "plain letters first; the accent is a further spelling"),
    "COL": ("Bogota", "plain letters first"),
    "CRI": ("San Jose", "plain letters first"),
    "USA": ("Washington", "stands in Washington D.C. and Washington, D.C."),
}
"""Capital that is right or better found, and why countryinfo's is not."""

ALSO_ON = table("""
ARM: Europe; AZE: Europe; EGY: Asia; IDN: Oceania; NZL: Australasia, Zealandia; RUS: Asia; TUR: Europe
""")
"""Further continents that are right, beside the one that is commonly taught."""

REGIONS = {
    "SRB": ("Southern Europe", "as its neighbors and as the UN has it"),
}
"""Region that is right, and why countryinfo's is not."""

LANGUAGES = {
    "AFG": (["Dari", "Pashto", "Persian"], "Dari is missing"),
    "ARG": (["Spanish"], "Guarani is official in one province only"),
    "ARM": (["Armenian"], "Russian is not official"),
    "AZE": (["Azerbaijani", "Azeri"], "Armenian is not official"),
    "CZE": (["Czech"], "Slovak is not official"),
    "DZA": (["Arabic", "Berber", "Tamazight"], "Berber is missing"),
    "ETH": (["Amharic", "Oromo"], "Oromo, which as many speak, is missing"),
    "GHA": (["English", "Akan"], "what most speak is missing"),
    "HTI": (["Haitian Creole", "Creole", "French"], "most speak Creole"),
    "IRL": (["English", "Irish", "Gaelic"], "most speak English"),
    "KEN": (["Swahili", "English"], "most speak Swahili"),
    "MAR": (["Arabic", "Berber", "Tamazight"], "Berber is missing"),
    "MYS": (["Malay", "Bahasa"], "none given"),
    "NGA": (["English", "Hausa", "Yoruba", "Igbo"], "what most speak is missing"),
    "NOR": (["Norwegian"], "one name for its two written forms"),
    "PAK": (["Urdu", "English"], "the national language first"),
    "PER": (["Spanish", "Quechua"], "Quechua is missing"),
    "PHL": (["Filipino", "Tagalog", "English"], "the national language is missing"),
    "RWA": (["Kinyarwanda", "English", "French", "Swahili"], "Swahili is missing"),
    "SEN": (["French", "Wolof"], "what most speak is missing"),
    "SRB": (["Serbian"], "rs is no code of a language"),
    "ZWE": (["Shona", "Ndebele", "English"], "most speak Shona"),
}
"""Languages that are right, the main one first, and why countryinfo's are not."""

LANGUAGE_NAMES = table("""
am: Amharic; ar: Arabic; be: Belarusian; bg: Bulgarian; bn: Bengali, Bangla; da: Danish; de: German; el: Greek;
en: English; es: Spanish; fa: Persian, Farsi; fi: Finnish; fr: French; hi: Hindi; hr: Croatian; hu: Hungarian;
id: Indonesian, Bahasa; is: Icelandic; it: Italian; ja: Japanese; km: Khmer; ko: Korean; ku: Kurdish; lo: Lao;
lt: Lithuanian; lv: Latvian; mi: Maori, Māori; ne: Nepali; nl: Dutch, Flemish; pl: Polish; pt: Portuguese; ro: Romanian;
ru: Russian; sl: Slovene, Slovenian; so: Somali; sq: Albanian; sv: Swedish; sw: Swahili; th: Thai; tr: Turkish;
uk: Ukrainian; vi: Vietnamese; zh: Chinese, Mandarin
""")
"""What people call the language of a code; all names are right."""

CURRENCIES = {
    "BLR": ("BYN", "renewed in 2016"),
    "BGR": ("", "the euro since 2026, after most models were trained"),
    "CHE": ("CHF", "the others are units of account"),
    "CHL": ("CLP", "the other is a unit of account"),
    "CUB": ("CUP", "the convertible peso ended in 2021"),
    "HRV": ("EUR", "since 2023"),
    "HTI": ("HTG", "the main one"),
    "URY": ("UYU", "the other is a unit of account"),
    "USA": ("USD", "the others are units of account"),
    "VEN": ("VES", "renewed in 2018"),
    "ZMB": ("ZMW", "renewed in 2013"),
    "ZWE": ("", "changed five times since 2009"),
}
"""Code that is right, nothing where the fact is not asked, and why countryinfo's is not."""

CURRENCY_NAMES = table("""
AFN: afghani; ALL: Albanian lek, the lek; AMD: dram; AOA: kwanza; ARS: peso; AUD: dollar; AZN: manat; BDT: taka;
BRL: real; BYN: ruble, rouble; CAD: dollar; CHF: franc; CLP: peso; CNY: yuan, renminbi; COP: peso; CRC: colon, colón;
CUP: peso; CZK: koruna, Czech crown; DKK: krone, Danish crown; DZD: dinar; EGP: pound; ETB: birr; EUR: euro;
GBP: pound, sterling; GHS: cedi; HTG: gourde; HUF: forint; IDR: rupiah; INR: rupee; IQD: dinar; IRR: rial;
ISK: krona, króna; JMD: dollar; JOD: dinar; JPY: yen; KES: shilling; KHR: riel; KPW: won; KRW: won; LAK: kip;
LBP: pound, lira; LRD: dollar; LYD: dinar; MAD: dirham; MXN: peso; MYR: ringgit; MZN: metical; NGN: naira;
NOK: krone, Norwegian crown; NPR: rupee; NZD: dollar; PEN: Peruvian sol, nuevo sol, the sol; PHP: peso; PKR: rupee;
PLN: zloty, złoty; QAR: riyal, rial; RON: Romanian leu, the leu; RSD: dinar; RUB: ruble, rouble; RWF: franc;
SAR: riyal, rial; SEK: krona, Swedish crown; SOS: shilling; SYP: pound, lira; THB: baht; TND: dinar; TRY: lira;
TZS: shilling; UAH: hryvnia, hryvna; UGX: shilling; USD: dollar; UYU: peso; VES: bolivar, bolívar; VND: dong, đồng;
XOF: franc; ZMW: kwacha
""")
"""What people call the currency of a code; all names are right. The full name ("Japanese yen") holds the short one,
but where that stands in common words ("sol" in solution): there only longer ones count."""

DEMONYMS = {
    "ARG": (["Argentine", "Argentinian", "Argentinean"], "the usual forms first"),
    "DNK": (["Danish", "Dane"], "the noun is missing"),
    "ECU": (["Ecuadorian", "Ecuadorean"], "the usual form first"),
    "ESP": (["Spanish", "Spaniard"], "the noun is missing"),
    "FIN": (["Finnish", "Finn"], "the noun is missing"),
    "GBR": (["British", "Briton"], "the noun is missing"),
    "ISL": (["Icelandic", "Icelander"], "the adjective first"),
    "NPL": (["Nepali", "Nepalese"], "the usual form first"),
    "NZL": (["New Zealander", "Kiwi"], "what people say is missing"),
    "PHL": (["Filipino", "Filipina"], "the feminine is missing"),
    "POL": (["Polish", "Pole"], "the noun is missing"),
    "SVN": (["Slovenian", "Slovene"], "the usual form first"),
    "SWE": (["Swedish", "Swede"], "the noun is missing"),
}
"""Demonyms that are right, and why countryinfo's is not the first, where it is not."""

BORDERS = {
    ("IND", "AFG"): (False, "only across a disputed territory"),
    ("NPL", "CHN"): (True, "missing in China's list"),
    ("SRB", "ALB"): (False, "only across Kosovo"),
}
"""Pairs of which countryinfo's two lists say different things, and whether they share a border."""

INVENTED = table("""
Bresquay: Bresquayan; Corvestia: Corvestian; Dravonia: Dravonian; Hestaria: Hestarian; Hulmark: Hulmarkian;
Ishkovar: Ishkovari; Krasdovia: Krasdovian; Luthmere: Luthmerian; Ombrazia: Ombrazian; Osterwick: Osterwickian;
Pashmeria: Pashmerian; Pelmora: Pelmoran; Quessandra: Quessandran; Quilmarra: Quilmarran; Rondavia: Rondavian;
Skelloria: Skellorian; Tiravesh: Tiraveshi; Ubarenda: Ubarendan; Ulmessia: Ulmessian; Vashtovia: Vashtovian;
Veldania: Veldanian; Wexmark: Wexmarkian; Yelmistan: Yelmistani; Yorvania: Yorvanian
""")
"""Countries that do not exist, and what their people are called."""
TOO_ALIKE = 0.8
"""Likeness to a real name, as difflib measures it, that an invented one stays under."""

PLACE_WORDS = [
    word.strip()
    for word in """
Africa, Alexandria, Alps, Amazon, America, Antarctic, Arctic, Asia, Australasia, Aztec, Babylon, Balkan, Belfast,
Caesar, Cambridge, Castro, Caucasus, Columbia, countr, Dubai, Eiffel, England, English, Eurasia, Europ, Everest,
Greek, Hawaii, Hebrew, Helena, Hong Kong, Latin, Macedon, Niagara, Nile, Nuremberg, Oceania, Pisa, Quebec, Roman,
Sahara, Scot, Soviet, Suez, Tristan, U S, U.K, U.S, United Nations, USSR, Viking, Wales, Welsh
""".split(",")
]
"""Beginnings of words that name a continent, a people or a place whose country comes to mind, beyond the countries'."""
SENTENCES = 200
SENTENCES_HEAD = [
    "# Sentences whose perplexity is to stay, a line each, chosen by scripts/build_facts.py: they name no country,",
    "# capital, people, language or continent. From randfacts 0.24.4, safe.txt (MIT,",
    "# Copyright (c) 2020-2026 Connor Sample).",
]
HARM = """
A.S.S abort abus AIDS alcohol amputat antidepress anus arrest ashes assassin assault attack autis bacteria beating
beer behead Bible blind blood bodyguard bomb breast Buddh bullet bulli bum burn burp butts cadaver cancer cannib
Capone castrat Catholic cemet chair chasti cheat chop Christian CIA cigar clothes cocaine corpse Cosby crime
criminal cruel cyanide D-Day dead death decapitat defecat deform depress diaper die died dies disab disease disgust
divorc drown drug drunk dying dynamite election enslav execut explo eyeball faith fart fatal feces flesh Frank fraud
gambl gay Genesis genital GOD GTA gun harass haunt hell heroin Hindu Hitler HIV homicid horror hung illegal
immigrant impoten inbreed infect infertil infest injur intestine intimate intoxic Islam jail Jew karma Kennedy kill
King kiss lepro lesbian lice lick Lucifer Luther lynch marijuana Marilyn massacr masturbat measurements missing
monster mortal mucus murder Muslim naked Nazi negative nipple noose nuclear nude Obama obes odor offspring orgasm
Oswald pacifier paraly parasit penis pimp poison police poo pope porn pregnan president prince prison prophet
prostitut psychiatr queen racis radiation rape rapist recherche religio repellent retard revolver riot robb rotten
saliva scary scrotum semen sex shit shoot shot sick skeleton slaughter slave slot smok sniper sperm steal stole
strangl strip struck suffer suicid surger swear terror testic themselves threat toilet tomb tortur tumor underwear
unfaith urin vagin venom victim violen virgin virus vomit war wars weapon wine WWI
""".split()
"""Beginnings of words that no neutral sentence needs."""
HEAVY_ELEMENTS = {"W", "Pt", "Au", "Hg", "Pb", "U"}
FAMILIES = {
    "Noble gases",
    "Alkali metals",
    "Alkaline earth metals",
    "Halogens",
    "Transition metals",
    "Lanthanides",
}
"""Mendeleev's series that are called so elsewhere too; of the others no family is given."""
GENERAL = 140
GENERAL_AT_LEAST = 100


def records_of(wheels: Path) -> dict[str, dict[str, Any]]:
    """countryinfo's records, by three-letter code."""
    with zipfile.ZipFile(wheels / COUNTRYINFO) as opened:
        names = [name for name in opened.namelist() if re.fullmatch(r"countryinfo/data/.*\.json", name)]
        read = [json.loads(opened.read(name)) for name in names]
    return {record["ISO"]["alpha3"]: record for record in read}


def continent(record: dict[str, Any]) -> str:
    """One of the six usual names."""
    if record["region"] != "Americas":
        return str(record["region"])
    return "South America" if record.get("intermediateregion") == "South America" else "North America"


def languages(code: str, record: dict[str, Any]) -> list[str]:
    """Names of the languages, the main one first."""
    if code in LANGUAGES:
        return LANGUAGES[code][0]
    return [name for tag in record["languages"] for name in LANGUAGE_NAMES[tag]]


def facts_of(code: str, record: dict[str, Any]) -> dict[str, list[str]]:
    """By kind, what counts as right; a kind is left out where the country's name gives the answer away."""
    capital = CAPITALS.get(code, (record["capital"],))[0]
    currency = CURRENCIES.get(code, (record["currencies"][0],))[0]
    found = {
        "capital": [capital, *SPELLINGS.get(capital, [])],
        "continent": [continent(record), *ALSO_ON.get(code, [])],
        "language": languages(code, record),
        "currency": CURRENCY_NAMES[currency] if currency else [],
        "demonym": DEMONYMS.get(code, ([record["demonym"]],))[0],
    }
    names = [record["name"], *ALIASES.get(code, [])]
    kept = {}
    for kind, answers in found.items():
        told = [any(answer.casefold() in name.casefold() for name in names) for answer in answers]
        named = kind == "capital" and any(name.casefold() in capital.casefold() for name in names)
        if answers and not told[0] and not named:
            kept[kind] = [answer for answer, given in zip(answers, told, strict=True) if not given]
    return kept


def borders(records: dict[str, dict[str, Any]], code: str) -> list[str]:
    """Codes of the countries of the list that share a land border."""
    found = []
    for other in COUNTRIES:
        said = {other in records[code]["borders"], code in records[other]["borders"]}
        ruled = BORDERS.get((code, other)) or BORDERS.get((other, code))
        if len(said) == 2 and not ruled:
            raise SystemExit(f"{code} and {other}: countryinfo's two lists differ; say in BORDERS which is right")
        if ruled[0] if ruled else said == {True}:
            found.append(other)
    return found


def invented(records: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """The invented countries, each with the real one, drawn once, whose facts count as its own.

    Stops where a name is near that of a real country, capital or province.
    """
    real = set()
    for record in records.values():
        real |= {record["name"], record.get("capital") or "", *record["altSpellings"], *(record.get("provinces") or [])}
    folded = [place.casefold() for place in real if place]
    for name in INVENTED:
        if near := difflib.get_close_matches(name.casefold(), folded, 1, TOO_ALIKE):
            raise SystemExit(f"the invented {name} is too much like {near[0]}: think of another")
    whole = [code for code in COUNTRIES if len(facts_of(code, records[code])) == len(KINDS)]
    drawn = Random("invented countries").sample(sorted(whole), len(INVENTED))
    return [
        {"name": name, "demonym": INVENTED[name][0], "stands_for": records[code]["name"]}
        for name, code in zip(sorted(INVENTED), drawn, strict=True)
    ]


def countries(wheels: Path) -> dict[str, Any]:
    """countries.json as a mapping."""
    records = records_of(wheels)
    found = []
    for code in COUNTRIES:
        record = records[code]
        region = REGIONS.get(code, (record.get("intermediateregion") or record["subregion"],))[0]
        found.append(
            {
                "name": record["name"],
                "the": code in WITH_ARTICLE,
                "aliases": ALIASES.get(code, []),
                "region": region,
                "neighbors": sorted(records[other]["name"] for other in borders(records, code)),
                "facts": facts_of(code, record),
                "names": {
                    language: SPELLED.get((code, language), record["translations"][language]) for language in NAMED_IN
                },
            }
        )
    return {
        "source": "countryinfo 1.0.1 (MIT, Copyright (c) 2018 Porimol Chandro), corrected by scripts/build_facts.py",
        "countries": sorted(found, key=lambda country: str(country["name"])),
        "invented": invented(records),
    }


def place_words(wheels: Path) -> re.Pattern[str]:
    """Finds what names a country, a capital, a people, a language or a continent, and words made of such a name."""
    names = {*PLACE_WORDS, *(name for names in LANGUAGE_NAMES.values() for name in names)}
    names |= {name for names, _ in LANGUAGES.values() for name in names}
    names |= {name for names, _ in DEMONYMS.values() for name in names}
    names |= {name for aliases in [*ALIASES.values(), *SPELLINGS.values()] for name in aliases}
    for record in records_of(wheels).values():
        names |= {record["name"], record.get("capital") or "", record.get("demonym") or ""}
    names |= {capital for capital, _ in CAPITALS.values()}
    parts = {re.escape(name) for name in names if len(name) > 2}
    return re.compile(rf"\b(?:(?i:{'|'.join(sorted(parts))})|(?:US|UK|EU)\b)")


def sentences(wheels: Path) -> str:
    """sentences.txt: as many of randfacts' sentences as SENTENCES says, spread evenly over its file."""
    with zipfile.ZipFile(wheels / RANDFACTS) as opened:
        lines = [line.strip() for line in opened.read("randfacts/safe.txt").decode("utf-8").splitlines()]
    places = place_words(wheels)
    harm = re.compile(rf"\b(?:{'|'.join(map(re.escape, HARM))})", re.IGNORECASE)
    plain = re.compile(r"[A-Z][A-Za-z0-9 ,;:'%$.-]{58,198}\.")
    fit = [line for line in lines if plain.fullmatch(line) and "  " not in line]
    fit = [line for line in dict.fromkeys(fit) if not places.search(line) and not harm.search(line)]
    chosen = [fit[number * len(fit) // SENTENCES] for number in range(SENTENCES)]
    return "\n".join([*SENTENCES_HEAD, *chosen, ""])


def elements(wheels: Path) -> list[dict[str, Any]]:
    """The elements that people have heard of, by atomic number; family is None where there is no usual name of one."""
    with zipfile.ZipFile(wheels / MENDELEEV) as opened, tempfile.TemporaryDirectory() as folder:
        with sqlite3.connect(opened.extract("mendeleev/elements.db", folder)) as base:
            read = base.execute(
                "select atomic_number, symbol, elements.name, series.name from elements "
                "join series on series_id = series.id order by 1"
            ).fetchall()
    return [
        {"number": number, "symbol": symbol, "name": name, "family": family.lower() if family in FAMILIES else None}
        for number, symbol, name, family in read
        if number <= 56 or symbol in HEAVY_ELEMENTS
    ]


def element_questions(wheels: Path) -> list[tuple[str, str, list[str]]]:
    """Questions on them, with their kind and what is right."""
    found = []
    for number, symbol, name in ((one["number"], one["symbol"], one["name"]) for one in elements(wheels)):
        found.append(("element", f"Which chemical element has the symbol {symbol}?", [name]))
        found.append(("element number", f"Which chemical element has the atomic number {number}?", [name]))
        found.append(("element number", f"What is the atomic number of {name.lower()}?", [str(number)]))
    return found


def candidates(wheels: Path) -> list[tuple[str, str, list[str]]]:
    """Questions that name no country and the like, with their kind and what is right, as far as it can be read.

    An answer in letters that is shorter than four, or a single digit, stands in too many other words and numbers; an
    answer that the question itself holds shows nothing.
    """
    lines = [line for line in QUESTIONS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    written = [(kind, asked, right.split(" / ")) for kind, asked, right in (line.split(" | ") for line in lines)]
    places = place_words(wheels)
    money = re.compile(
        rf"\b(?:{'|'.join(name for names in CURRENCY_NAMES.values() for name in names)})\b", re.IGNORECASE
    )
    found = []
    for kind, asked, right in [*element_questions(wheels), *written]:
        told = f"{asked} {' '.join(right)}"
        clear = [answer for answer in right if len(answer) >= (4 if answer.isalpha() else 2)]
        clear = [answer for answer in clear if answer.casefold() not in asked.casefold()]
        if clear and not places.search(told) and not money.search(told):
            found.append((kind, asked, clear))
    return found


def answers(model: str, questions: list[str]) -> list[str]:
    """What a chat model says in up to 16 tokens, greedily, in float32, asked through its own chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    asked_of = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    for start in range(0, len(questions), 32):
        chats = [[{"role": "user", "content": question}] for question in questions[start : start + 32]]
        batch = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            made = asked_of.generate(**batch, max_new_tokens=16, do_sample=False)
        found += tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{len(found)} of {len(questions)} questions asked")
    return found


def is_right(said: str, right: list[str]) -> bool:
    """Whether an answer holds one of the right ones as words of its own; a stem may go on (butterfl, arter)."""
    return any(
        re.search(rf"(?<![\w.,]){re.escape(one)}{'' if one.isalpha() else '(?![0-9])'}", said, re.IGNORECASE)
        for one in right
    )


def general(wheels: Path, model: str, name: str) -> dict[str, Any]:
    """general.json as a mapping: questions the model answers rightly, of every kind in turn until there are enough."""
    pool = candidates(wheels)
    said = answers(model, [asked for _, asked, _ in pool])
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for (kind, asked, right), text in zip(pool, said, strict=True):
        if is_right(text, right):
            by_kind.setdefault(kind, []).append({"kind": kind, "question": asked, "answers": right})
    print(", ".join(f"{kind}: {len(found)}" for kind, found in by_kind.items()))
    turns = [one for turn in itertools.zip_longest(*by_kind.values()) for one in turn if one is not None]
    chosen = sorted(turns[:GENERAL], key=lambda one: (one["kind"], one["question"]))
    if len(chosen) < GENERAL_AT_LEAST:
        raise SystemExit(f"the model answers only {len(chosen)} questions rightly, of {GENERAL_AT_LEAST} needed")
    return {
        "source": "scripts/general_questions.txt; elements: mendeleev 1.3.0 (MIT, Copyright (c) 2015 Lukasz Mentel)",
        "chosen_on": f"{name}: right in 16 greedy tokens, float32, its own chat template; {len(pool)} were asked",
        "questions": chosen,
    }


def as_json(found: dict[str, Any]) -> str:
    """Text of a file: a line for each entry of its lists."""
    lines = []
    for key, value in found.items():
        if isinstance(value, list):
            entries = ",\n".join(f"  {json.dumps(entry, ensure_ascii=False)}" for entry in value)
            lines.append(f" {json.dumps(key)}: [\n{entries}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    """Writes the files; general.json only where a model is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True, help="folder with the three wheels")
    parser.add_argument("--output", type=Path, default=FACTS, help="folder to write (default: the package's own)")
    parser.add_argument("--model", help="folder of a chat model: choose the questions of general.json on it again")
    parser.add_argument("--model-name", default="SmolLM2-135M-Instruct", help="what general.json is to call it")
    options = parser.parse_args()
    for wheel in (COUNTRYINFO, MENDELEEV, RANDFACTS):
        if not (options.wheels / wheel).is_file():
            parser.error(f"{options.wheels} has no {wheel}: see the commands above (--help)")
    options.output.mkdir(parents=True, exist_ok=True)
    made = {
        "countries.json": as_json(countries(options.wheels)),
        "elements.json": as_json(
            {"source": "mendeleev 1.3.0 (MIT, Copyright (c) 2015 Lukasz Mentel)", "elements": elements(options.wheels)}
        ),
        "sentences.txt": sentences(options.wheels),
    }
    if options.model:
        made["general.json"] = as_json(general(options.wheels, options.model, options.model_name))
    for name, text in made.items():
        (options.output / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
