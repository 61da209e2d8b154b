"""What `/metrics` tells, in the form of Prometheus: numbers alone, never a text."""

from __future__ import annotations

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
        self.requests = Counter(
            "grun_http_requests", "HTTP requests, by route and status", ["route", "status"], registry=self.registry
        )
        self.running = Gauge("grun_answers_running", "Answers that are computed now", registry=self.registry)
        self.waiting = Gauge("grun_answers_waiting", "Answers that wait for a place", registry=self.registry)
        self.prompt_tokens = Counter("grun_prompt_tokens", "Tokens of prompts that were run", registry=self.registry)
        self.answer_tokens = Counter("grun_answer_tokens", "Tokens of answers", registry=self.registry)
        self.first = Histogram(
            "grun_first_token_seconds", "From a request to its first token", buckets=SECONDS, registry=self.registry
        )
        self.whole = Histogram(
            "grun_answer_seconds", "From a request to the end of its answer", buckets=SECONDS, registry=self.registry
        )
        self.in_force = Gauge("grun_requests_in_force", "Requests to forget whose edits act", registry=self.registry)
        self.reloads = Counter("grun_store_reloads", "Times that the store was read anew", registry=self.registry)
        self.failed = Counter(
            "grun_store_reload_failures", "Times that it could not be, and the former stayed", registry=self.registry
        )

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self.registry)
