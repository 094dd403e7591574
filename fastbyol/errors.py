"""The error of every setting that cannot be used."""

from __future__ import annotations


class ConfigError(ValueError):
    """A wrong setting; the message says what came, what was wanted and what to do."""


def require(claim: bool, message: str) -> None:
    """Raise ConfigError(message) unless the claim holds."""
    if not claim:
        raise ConfigError(message)
