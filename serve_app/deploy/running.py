"""What Serve runs now, and what to go back to from a change of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from serve_app.deploy.config import ServeConfig, fingerprint
from serve_app.deploy.history import FOUND, History, Outcome, served_last
from serve_app.stack.serve_api import listening

_LOCAL = "127.0.0.1"


@dataclass(frozen=True)
class Running:
    """One reading of Serve.

    Args:
        status: what `ServeApi.status` returns.
        port: of the proxies, where Serve has none yet.
    """

    status: Mapping[str, Any]
    port: int

    @cached_property
    def config(self) -> ServeConfig | None:
        """The config that Serve says it was given last; None where it has none."""
        found = [app.get("deployed_app_config") for app in self.status["applications"].values()]
        applications = [config for config in found if config is not None]
        if not applications:
            return None
        names = ("proxy_location", "http_options")
        kept = {name: self.status[name] for name in names if self.status.get(name)}
        return {**kept, "applications": applications}

    @property
    def sha256(self) -> str | None:
        """By what the config is known again."""
        return None if self.config is None else fingerprint(self.config["applications"])

    @property
    def well(self) -> bool:
        """Whether all of it runs."""
        return all(app["status"] == "RUNNING" for app in self.status["applications"].values())

    @property
    def address(self) -> dict[str, Any]:
        """Where the proxies listen, which stays as it is: the arguments of `listening`."""
        options = self.status.get("http_options") or {}
        return {"host": options.get("host", _LOCAL), "port": options.get("port", self.port)}

    def to_go_back_to(self, history: History) -> ServeConfig | None:
        """Return what runs or, where that is not well, what served last; None for nothing."""
        if self.config is None:
            return None
        entries = history.entries()
        if self.well:
            known = served_last(entries, self.sha256)
        else:
            known = next((e for e in reversed(entries) if e.outcome is Outcome.SERVED), None)
        if known is None:
            return self.config
        return listening(history.config(known.number), **self.address)

    def keep(self, history: History, by: str) -> None:
        """Put into the history what runs, where it was not deployed by us."""
        if self.config is None or self.sha256 is None or not self.well:
            return
        if served_last(history.entries(), self.sha256) is None:
            found = history.begin(self.config, by=by, source=FOUND, sha256=self.sha256)
            history.end(found, Outcome.SERVED)
