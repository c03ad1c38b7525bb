"""Every setting, once.

They come from the environment, or from `.env` in the working directory; the environment wins.

A secret may also be given as a file: `ADMIN_PASSWORD_FILE=/run/secrets/admin` is read at start.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from dotenv import dotenv_values
from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from expediter.errors import ConfigurationError
from expediter.money import CURRENCY_DIGITS
from expediter.orders import Stages

#: Where settings may stand besides the environment.
_ENV_FILE = ".env"


def _currency(code: str) -> str:
    if code not in CURRENCY_DIGITS:
        raise ValueError("must be an ISO 4217 code such as USD")
    return code


class Settings(BaseSettings):
    """The settings of one process."""

    model_config = SettingsConfigDict(env_file=_ENV_FILE, extra="ignore", frozen=True, env_ignore_empty=True)

    database_url: str = Field("", description="where orders are stored; default sqlite:///expediter.db")
    db_host: str = Field("", description="the host of a MariaDB or MySQL database, instead of DATABASE_URL")
    db_user: str = Field("", description="its user")
    db_pass: SecretStr | None = Field(None, description="its password")
    db_name: str = Field("", description="its name")
    db_path: str = Field("", description="the same as a plain path to a SQLite file")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    stages: Stages = Field(Stages.PAYMENT_FULFILMENT, description="the road of new orders")
    default_currency: Annotated[str, AfterValidator(_currency)] = Field(
        "USD", description="ISO 4217 code of orders that name none"
    )
    worker_count: int = Field(4, ge=1, le=256, description="workers in a serving process")
    worker_concurrency: int = Field(25, ge=1, le=1000, description="jobs that one worker runs at once")
    lease_seconds: float = Field(30, ge=1, le=3600, description="seconds a worker may keep a job without a word")
    orders_cache_ttl: float = Field(30, gt=0, description="seconds that a cached read is kept")
    cache_disabled: bool = Field(False, description="true: every read goes to the database")
    admin_password: SecretStr | None = Field(None, description="opens the admin calls; without it they are off")
    payment_gateway: str = Field("simulated", description="simulated, or simulated:///ledger/file?seed=7")
    payment_mock_success_rate: float = Field(0.95, ge=0, le=1, description="share of simulated calls that work")
    payment_mock_latency_min: int = Field(50, ge=0, le=10_000, description="milliseconds, simulated gateway")
    payment_mock_latency_max: int = Field(200, ge=0, le=10_000, description="milliseconds, simulated gateway")
    payment_retry_attempts: int = Field(3, ge=1, le=100, description="tries before payment_failed")
    circuit_breaker_failure_threshold: int = Field(5, ge=1, description="failures in a row that open the breaker")
    circuit_breaker_recovery_seconds: float = Field(
        60, gt=0, le=86_400, description="seconds before the open breaker probes"
    )
    fulfilment: str = Field("simulated", description="who carries orders out")
    fulfilment_mock_latency_min: int = Field(50, ge=0, le=10_000, description="milliseconds, simulated fulfiller")
    fulfilment_mock_latency_max: int = Field(200, ge=0, le=10_000, description="milliseconds, simulated fulfiller")
    idempotency_keep_days: float = Field(7, gt=0, le=365, description="days that an Idempotency-Key is remembered")
    drain_seconds: float = Field(10, ge=0, le=600, description="seconds that a stop waits for work under way")
    log_level: str = Field(
        "INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="DEBUG, INFO, WARNING, ERROR"
    )
    log_format: str = Field("text", pattern="^(text|json)$", description="text or json")

    @model_validator(mode="after")
    def _check_ranges(self) -> Settings:
        for name in ("payment_mock_latency", "fulfilment_mock_latency"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if low > high:
                raise ValueError(f"{name.upper()}_MIN is above {name.upper()}_MAX")
        return self

    @property
    def database(self) -> str:
        """The database's address: DATABASE_URL, or the parts in DB_HOST and its like, or the file of DB_PATH."""
        if self.database_url:
            return self.database_url
        if self.db_host:
            password = quote(self.db_pass.get_secret_value(), safe="") if self.db_pass else ""
            return f"mysql://{quote(self.db_user, safe='')}:{password}@{self.db_host}/{self.db_name}"
        return f"sqlite:///{self.db_path or 'expediter.db'}"

    @property
    def loopback(self) -> bool:
        """Whether the address to listen on can be reached from this machine only."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


#: Settings of parts that this version does not have; to ignore them would be to break a promise.
_ABSENT = ("REDIS_URL", "BROKER_URL", "RABBITMQ_HOST", "API_WORKERS", "ACCESS_LOG_FILE")


def load_settings(**overrides: Any) -> Settings:
    """Read the settings; `overrides` win over the environment. Raises ConfigurationError with the name."""
    try:
        given = {**dotenv_values(_ENV_FILE), **os.environ}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{_ENV_FILE} cannot be read: {error}") from error
    for name in _ABSENT:
        if given.get(name):
            raise ConfigurationError(f"{name} is set, and this version has no such part: unset it")
    if (given.get("INTAKE") or "direct") != "direct":
        raise ConfigurationError("INTAKE must be direct: this version has no broker to queue orders in")
    try:
        return Settings(**(_secrets(given) | overrides))
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(str(part) for part in first["loc"]).upper()
        raise ConfigurationError(f"{name or 'The settings'}: {first['msg']}") from error


def _secrets(given: Mapping[str, str | None]) -> dict[str, str]:
    found = {}
    for name, field in Settings.model_fields.items():
        path = given.get(f"{name.upper()}_FILE")
        if path and field.annotation == SecretStr | None:
            try:
                found[name] = Path(path).read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigurationError(f"{name.upper()}_FILE cannot be read: {error}") from error
    return found
