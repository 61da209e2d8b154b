"""`python -m grun serve`."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import socket
from typing import TYPE_CHECKING, Any

from grun.config.checks import bytes_of
from grun.config.options import ServeConfig
from grun.errors import ConfigError, RunError

if TYPE_CHECKING:
    from grun.serving.guard import Keys

log = logging.getLogger(__name__)

CLIENT, OWNER = "GRUN_API_KEY", "GRUN_OWNER_KEY"
"""Variables of the environment that hold the keys."""
HERE = ("127.0.0.1", "localhost", "::1")


def serve(config: ServeConfig) -> None:
    """Serve an adapter or a store until SIGTERM or SIGINT; what is being answered then is finished first.

    Raises:
        ConfigError: a package is missing, or an option is wrong.
        ModelError, AdapterError: what is to be served cannot be.
        RunError: the port is taken.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"serve needs {package}, which is not installed: pip install 'grun-unlearning[serve]'")
    largest = bytes_of("max_body", config.max_body)
    listening = listen(config.host, config.port)
    with listening:
        keys = _keys(config.host)
        server = make_server(config, keys, largest)
        host, port = listening.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        if OWNER in os.environ:
            print(f"page: {address} (the owner's key is that of {OWNER})", flush=True)
        else:
            print(f"page: {address}#owner={keys.owner}", flush=True)
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:  # raised once more by uvicorn, when all is finished
            log.info("stopped; every answer was finished")


def _keys(host: str) -> Keys:
    from grun.serving.guard import Keys

    client, owner = os.environ.get(CLIENT), os.environ.get(OWNER)
    for name, key in ((CLIENT, client), (OWNER, owner)):
        if key is not None and (not key.strip() or not key.isascii() or key != key.strip()):
            raise ConfigError(f"{name} is empty, or has blanks at an end or letters beyond ASCII; set another key")
    if client is None and host not in HERE:
        log.warning("host=%s: whoever reaches this machine may ask; %s=KEY asks for a key", host, CLIENT)
    return Keys(client, owner or secrets.token_urlsafe(24))


def make_server(config: ServeConfig, keys: Keys, largest: int) -> Any:
    """Everything but the socket."""
    import uvicorn

    from grun.serving.app import make_app
    from grun.serving.edition import Served
    from grun.serving.engine import Engine
    from grun.serving.guard import Guard
    from grun.serving.metrics import Metrics

    metrics = Metrics()
    served = Served(config)
    engine = Engine(served, metrics, batch_size=config.batch_size, waiting=config.waiting)
    app = Guard(make_app(served, engine, metrics, config), keys=keys, largest=largest, metrics=metrics)
    log.info("%s with %s: %d requests in force", served.model_name, served.folder, len(served.edition.configs))
    # Its own log names paths as clients write them; Guard's names routes.
    logging.getLogger("uvicorn.access").disabled = True
    return uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, server_header=False, lifespan="on"))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; the server answers on it once the model is there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"cannot listen on host={host} port={port}: {reason}; set another host or port") from error
