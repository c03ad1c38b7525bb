"""Every setting, once.

They come from the environment, or from `.env` in the working directory; the environment wins.

A secret may also be given as a file: `ADMIN_PASSWORD_FILE=/run/secrets/admin` is read at start.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from dotenv import dotenv_values
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from expediter.errors import ConfigurationError
from expediter.orders.money import CURRENCY_DIGITS
from expediter.orders.order import Stages

#: Where settings may stand besides the environment.
_ENV_FILE = ".env"
#: The common log format with the milliseconds that the answer took: %(h)s address, %(t)s time, %(r)s request line,
#: %(s)s status, %(B)s bytes, %(M)s milliseconds.
ACCESS_LOG_FORMAT = '%(h)s - - %(t)s "%(r)s" %(s)s %(B)s %(M)s'

#: The length of REDIS_PREFIX: it is in the name of every key.
REDIS_PREFIX_CHARACTERS_MAX = 64
#: What the names of keys begin with that end in an id, a key or a page. With one of these in its prefix, what one
#: installation keeps could have the name of what another one removes.
_OPEN_KEYS = ("orders:detail:", "orders:list:", "temp_order:", "temp_changes:", "idempotency:")


class Intake(StrEnum):
    """Where an order is safe when its client is answered: in the database, or first in the broker."""

    DIRECT = "direct"
    QUEUED = "queued"


def _currency(code: str) -> str:
    if code not in CURRENCY_DIGITS:
        raise ValueError("must be an ISO 4217 code such as USD")
    return code


def _linked_port(value: object) -> object:
    """Return the port of a service link, as in tcp://10.0.0.1:5672, and anything else as it is.

    Kubernetes sets RABBITMQ_PORT to one in every container beside a service of the name `rabbitmq`. It sets no
    other setting: PORT would need a service without a name.
    """
    link = re.fullmatch(r"tcp://[^/]+:(\d{1,5})", value) if isinstance(value, str) else None
    return link[1] if link else value


def _key_prefix(prefix: str) -> str:
    # Nothing that a pattern of SCAN, a script or a cluster reads something into.
    if len(prefix) > REDIS_PREFIX_CHARACTERS_MAX or not re.fullmatch("[A-Za-z0-9._:/-]*", prefix):
        raise ValueError(
            f"write up to {REDIS_PREFIX_CHARACTERS_MAX} letters, digits and . _ - / : such as shop: (it is put "
            "before the names of keys as it is)"
        )
    if found := [name for name in _OPEN_KEYS if name in prefix]:
        raise ValueError(f"write one without {found[0]} in it, such as shop: (names of keys begin with that)")
    return prefix


class Settings(BaseSettings):
    """The settings of one process."""

    model_config = SettingsConfigDict(env_file=_ENV_FILE, extra="ignore", frozen=True, env_ignore_empty=True)

    database_url: str = Field(
        "", repr=False, description="where orders are stored; default sqlite:///expediter.db"
    )
    db_host: str = Field("", description="the host of a MariaDB or MySQL database, instead of DATABASE_URL")
    db_user: str = Field("", description="its user")
    db_pass: SecretStr | None = Field(None, description="its password")
    db_name: str = Field("", description="its name")
    db_path: str = Field("", description="the same as a plain path to a SQLite file")
    redis_url: str = Field(
        "", repr=False, description="cache shared by all processes: redis:// or rediss://; default: in memory"
    )
    redis_prefix: Annotated[str, AfterValidator(_key_prefix)] = Field(
        "", description="put before the name of every key in Redis, such as shop:"
    )
    broker_url: str = Field(
        "", repr=False, description="redis://, rediss://, amqp:// or amqps://; default: the database is the queue"
    )
    rabbitmq_host: str = Field("", description="the host of a RabbitMQ broker, instead of BROKER_URL")
    rabbitmq_port: Annotated[int | None, BeforeValidator(_linked_port)] = Field(
        None, ge=1, le=65535, description="its port, also as tcp://10.0.0.1:5672; default 5672, with TLS 5671"
    )
    rabbitmq_user: str = Field("guest", description="its user")
    rabbitmq_password: SecretStr | None = Field(None, description="its password; default guest")
    rabbitmq_queue_name: str = Field(
        "orders", pattern="^[A-Za-z0-9._-]{1,100}$", description="the RabbitMQ queue of commands"
    )
    mq_use_ssl: bool = Field(False, description="true: talk to RABBITMQ_HOST by TLS")
    intake: Intake = Field(Intake.DIRECT, description="direct, or queued: answer 202 from the broker")
    temp_order_cache_ttl: float = Field(
        60, ge=1, le=86_400, description="seconds that a queued order stays at temp_order:{id} once it is stored"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    stages: Stages = Field(Stages.PAYMENT_FULFILMENT, description="the road of new orders")
    default_currency: Annotated[str, AfterValidator(_currency)] = Field(
        "USD", description="ISO 4217 code of orders that name none"
    )
    api_workers: int = Field(1, ge=1, le=64, description="serving processes")
    worker_count: int = Field(4, ge=1, le=256, description="workers in a process; with up: working processes")
    worker_concurrency: int = Field(25, ge=1, le=1000, description="jobs that one worker runs at once")
    lease_seconds: float = Field(30, ge=1, le=3600, description="seconds a worker may keep a job without a word")
    orders_cache_ttl: float = Field(30, gt=0, description="seconds that a cached read is kept")
    cache_disabled: bool = Field(False, description="true: every read goes to the database")
    admin_password: SecretStr | None = Field(None, description="opens the admin calls; without it they are off")
    payment_gateway: str = Field("simulated", description="simulated, or simulated:///ledger/file?seed=7")
    gateway_key_prefix: str = Field(
        "",
        pattern="^[A-Za-z0-9._-]{0,64}$",
        description="tells apart installations that share an account at the gateway; fixed by the first start",
    )
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
    run_dir: str = Field("run", description="folder for the pid and log files of up")
    access_log_file: str = Field("", description="file for one line per request; - is stderr")
    access_log_format: str = Field(ACCESS_LOG_FORMAT, description="the line's form, as in gunicorn")

    @model_validator(mode="after")
    def _check_ranges(self) -> Settings:
        for name in ("payment_mock_latency", "fulfilment_mock_latency"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if low > high:
                raise ValueError(f"{name.upper()}_MIN is above {name.upper()}_MAX")
        if self.intake is Intake.QUEUED:
            if not self.broker:
                raise ValueError("INTAKE=queued needs a broker: set BROKER_URL or RABBITMQ_HOST")
            if not self.temporary_orders:
                raise ValueError("INTAKE=queued keeps orders at temp_order:{id} in Redis: set REDIS_URL")
        return self

    @property
    def broker(self) -> str:
        """The broker's address: BROKER_URL, or the parts in RABBITMQ_HOST and its like; empty: the database."""
        if self.broker_url or not self.rabbitmq_host:
            return self.broker_url
        password = self.rabbitmq_password.get_secret_value() if self.rabbitmq_password else "guest"
        port = self.rabbitmq_port or (5671 if self.mq_use_ssl else 5672)
        scheme = "amqps" if self.mq_use_ssl else "amqp"
        who = f"{quote(self.rabbitmq_user, safe='')}:{quote(password, safe='')}"
        return f"{scheme}://{who}@{self.rabbitmq_host}:{port}/"

    @property
    def temporary_orders(self) -> str:
        """The address of the Redis that keeps queued orders: REDIS_URL, or a broker that is a Redis."""
        return self.redis_url or (self.broker if self.broker.startswith(("redis:", "rediss:", "unix:")) else "")

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


def load_settings(**overrides: Any) -> Settings:
    """Read the settings; `overrides` win over the environment. Raises ConfigurationError with the name."""
    try:
        given = {**dotenv_values(_ENV_FILE), **os.environ}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{_ENV_FILE} cannot be read: {error}") from error
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
