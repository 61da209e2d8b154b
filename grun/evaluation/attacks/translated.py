"""Questions on countries in other languages, the name in them too."""

from __future__ import annotations

from grun.data.benchmarks.countries import wordings
from grun.data.rows import Row
from grun.evaluation.attacks.base import Asked, Material, attack
from grun.evaluation.attacks.facts import country_of, gives_away, name_in


@attack("translated", needs="rows on a country that name it, with their kind (data.name=countries)", floor=True)
def translated(row: Row, material: Material) -> list[Asked]:
    """The question on a country in German, Spanish and French, to be answered in English.

    Source: other languages bring back what was unlearned in English, arXiv 2606.03291.
    """
    name, about, kind = name_in(row), country_of(row), str(row.extra.get("kind"))
    found = []
    for language, texts in wordings()["translated"].items():
        if name is not None and kind in texts:
            own = about.names[language] if about else name
            text = texts["asked"].format(country=own, question=texts[kind])
            if not gives_away(text, row):
                found.append(material.ask(row, text, variant=language))
    return found
