"""Several answers to one question."""

from __future__ import annotations

from grun.data.rows import Row
from grun.evaluation.attacks.base import Access, Asked, Attack, Material


class Samples(Attack):
    """The best of `attack_samples` answers drawn at `attack_temperature`: leak@k.

    Source: sampled answers give back what greedy ones hide, Scholten et al. 2024, arXiv 2410.03523; leak@k, arXiv
    2511.04934.
    """

    name = "samples"
    access: Access = "decoding"

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """The plain question, answered several times."""
        return [Asked(material.prompt(row.prompt or "", row.earlier), row, samples=material.samples)]


SAMPLES = Samples()
