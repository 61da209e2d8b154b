"""What `/metrics` tells, in the form of Prometheus: numbers alone, never a text."""

from __future__ import annotations

from functools import partial

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
"""Upper ends of the histograms' classes."""


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        disable_created_metrics()  # a second number beside each, which few read
        self.registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, buckets=SECONDS, registry=self.registry)
        self.requests = counter("grun_http_requests", "HTTP requests, by route and status", ["route", "status"])
        self.running = gauge("grun_answers_running", "Answers that are computed now")
        self.waiting = gauge("grun_answers_waiting", "Answers that wait for a place")
        self.prompt_tokens = counter("grun_prompt_tokens", "Tokens of prompts that were run")
        self.answer_tokens = counter("grun_answer_tokens", "Tokens of answers")
        self.first = histogram("grun_first_token_seconds", "From a request to its first token")
        self.whole = histogram("grun_answer_seconds", "From a request to the end of its answer")
        self.in_force = gauge("grun_requests_in_force", "Requests to forget whose edits act")
        self.reloads = counter("grun_store_reloads", "Times that the store was read anew")
        self.failed = counter("grun_store_reload_failures", "Times that it could not be, and the former stayed")

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self.registry)
