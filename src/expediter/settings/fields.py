"""Every setting, once: what it may be, what it is by default, and how it is written."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal
from urllib.parse import quote

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from expediter.orders.money import CURRENCY_DIGITS
from expediter.orders.order import Stages
from expediter.settings.choices import Compat, Intake, PaymentCapture

#: The common log format with the milliseconds that the answer took: %(h)s address, %(t)s time, %(r)s request line,
#: %(s)s status, %(B)s bytes, %(M)s milliseconds.
ACCESS_LOG_FORMAT = '%(h)s - - %(t)s "%(r)s" %(s)s %(B)s %(M)s'

#: The length of REDIS_PREFIX: it is in the name of every key.
REDIS_PREFIX_CHARACTERS_MAX = 64
#: What the names of keys begin with that end in an id, a key or a page. With one of these in its prefix, what one
#: installation keeps could have the name of what another one removes.
_OPEN_KEYS = ("orders:detail:", "orders:list:", "temp_order:", "temp_changes:", "idempotency:")


def _currency(code: str) -> str:
    if code.upper() not in CURRENCY_DIGITS:
        raise ValueError("write an ISO 4217 code such as USD")
    return code.upper()


def _small(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _capital(value: object) -> object:
    return value.strip().upper() if isinstance(value, str) else value


def _stages(value: object) -> object:
    """Take them with blanks between, in any case, and as Americans write them."""
    return (
        re.sub(r"\s", "", value).lower().replace("fulfillment", "fulfilment") if isinstance(value, str) else value
    )


def _key_part(text: str) -> str:
    if not re.fullmatch("[A-Za-z0-9._-]{0,64}", text):
        raise ValueError("write up to 64 letters, digits and . _ - such as shop-1")
    return text


def _queue_name(text: str) -> str:
    if not re.fullmatch("[A-Za-z0-9._-]{1,100}", text):
        raise ValueError("write up to 100 letters, digits and . _ - such as orders")
    return text


def _database_address(address: str) -> str:
    if address and "://" not in address:
        raise ValueError(f"write sqlite:///{address} for the SQLite file of that name")
    return address


def _redis_address(address: str) -> str:
    if address and "://" not in address:
        raise ValueError("write redis://host:6379, or rediss://host:6379 with TLS")
    return address


LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
LogFormat = Literal["text", "json"]


def _origins(text: str) -> str:
    found = [origin.strip() for origin in text.split(",") if origin.strip()]
    for origin in found:
        if origin != "*" and not re.fullmatch(
            r"https?://[A-Za-z0-9.-]+(?::\d{1,5})?|https?://\[[0-9a-f:]+\](?::\d{1,5})?", origin
        ):
            raise ValueError(f"{origin!r} is no origin: write scheme and host, such as https://shop.example, or *")
    return ",".join(found)


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


#: The parts in which the settings are described: a heading, and the first setting of it.
SECTIONS = {
    "Where orders are kept": "database_url",
    "Cache": "redis_url",
    "Broker and intake": "broker_url",
    "The door": "host",
    "Work": "stages",
    "Payment": "payment_gateway",
    "Fulfilment": "fulfilment",
    "Webhooks": "webhook_allow_http",
    "Logs and files": "log_level",
}

SQLITE_FILE = "expediter.db"
REDIS_PORT = 6379
RABBITMQ_PORT, RABBITMQ_PORT_TLS = 5672, 5671
RABBITMQ_PASSWORD = "guest"
#: What counts where a setting is not given, and its field only says that it is not.
OTHERWISE = {
    "database_url": f"sqlite:///{SQLITE_FILE}",
    "redis_port": str(REDIS_PORT),
    "rabbitmq_port": str(RABBITMQ_PORT),
    "rabbitmq_password": RABBITMQ_PASSWORD,
}


def is_loopback(host: str) -> bool:
    """Return whether a name or address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Settings(BaseSettings):
    """The settings of one process, in the order and in the words of docs/settings.md."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True, env_ignore_empty=True)

    database_url: Annotated[str, AfterValidator(_database_address)] = Field(
        "",
        repr=False,
        description="where orders are stored: SQLite, `postgresql://user:password@host/name`, or `mysql://...` "
        "for MariaDB and MySQL",
    )
    db_host: str = Field(
        "",
        description="the host (or host:port) of a MariaDB or MySQL database, instead of `DATABASE_URL` (both "
        "together are refused); with `DB_USER` alone `localhost`",
    )
    db_user: str = Field("", description="its user")
    db_pass: SecretStr | None = Field(None, description="its password")
    db_name: str = Field("", description="its name")
    db_path: str = Field("", description="a plain path to a SQLite file, instead of `DATABASE_URL`")

    redis_url: Annotated[str, AfterValidator(_redis_address)] = Field(
        "",
        repr=False,
        description="a cache shared by all processes: `redis://` or `rediss://`; without it, SQLite is cached in "
        "memory and other databases are not cached",
    )
    redis_host: str = Field("", description="the host of that Redis, instead of `REDIS_URL`")
    redis_port: Annotated[int | None, BeforeValidator(_linked_port)] = Field(
        None,
        ge=1,
        le=65535,
        description="its port; also `tcp://10.0.0.1:6379`, as Kubernetes sets it beside a service named `redis`",
    )
    redis_prefix: Annotated[str, AfterValidator(_key_prefix)] = Field(
        "",
        description="put before the name of every key in Redis, such as `shop:`, so that installations can share "
        f"a database; up to {REDIS_PREFIX_CHARACTERS_MAX} letters, digits and `. _ - / :`",
    )
    orders_cache_ttl: float = Field(30, gt=0, description="seconds a cached read is kept")
    cache_disabled: bool = Field(False, description="`true`: every read goes to the database")

    broker_url: str = Field(
        "",
        repr=False,
        description="the broker for hints and queued commands: `redis://`, `rediss://`, `amqp://` or `amqps://`; "
        "without it, the database is the queue",
    )
    rabbitmq_host: str = Field("", description="the host of a RabbitMQ broker, instead of `BROKER_URL`")
    rabbitmq_port: Annotated[int | None, BeforeValidator(_linked_port)] = Field(
        None,
        ge=1,
        le=65535,
        description=f"its port, with `MQ_USE_SSL` by default {RABBITMQ_PORT_TLS}; also `tcp://10.0.0.1:5672`, as "
        "Kubernetes sets it beside a service named `rabbitmq` (only the port counts)",
    )
    rabbitmq_user: str = Field("guest", description="its user")
    rabbitmq_password: SecretStr | None = Field(None, description="its password")
    rabbitmq_queue_name: Annotated[str, AfterValidator(_queue_name)] = Field(
        "orders",
        description="the RabbitMQ queue for commands; the queues for hints and dead letters are named after it",
    )
    mq_use_ssl: bool = Field(False, description="`true`: connect to `RABBITMQ_HOST` over TLS")
    intake: Annotated[Intake, BeforeValidator(_small)] = Field(
        Intake.DIRECT,
        description="`queued`: orders and changes are answered with 202 once the broker has them, and the workers "
        "store them",
    )
    temp_order_cache_ttl: float = Field(
        60, ge=1, le=86_400, description="seconds a queued order stays at `temp_order:{id}` once it is stored"
    )

    host: str = Field(
        "127.0.0.1",
        description="address to listen on; one that other machines can reach needs an API key, or `--insecure`",
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    api_workers: int = Field(1, ge=1, le=64, description="serving processes, all on one port")
    cors_origins: Annotated[str, AfterValidator(_origins)] = Field(
        "",
        description="pages on other origins that may call from a browser: "
        "`https://shop.example,https://admin.example`, or `*` for all",
    )
    admin_password: SecretStr | None = Field(
        None, description="opens the calls below `/admin`; without it, only an API key with the scope `admin` does"
    )
    expediter_api_key: SecretStr | None = Field(
        None,
        description="the API key with which `expediter orders`, `events` and `status` ask a service at an address "
        "(docs/security.md); a service itself has no use for it",
    )
    default_currency: Annotated[str, AfterValidator(_currency)] = Field(
        "USD", description="ISO 4217 code for orders that name no currency"
    )
    idempotency_keep_days: float = Field(7, gt=0, le=365, description="days an `Idempotency-Key` is remembered")
    compat: Annotated[Compat, BeforeValidator(_small)] = Field(
        Compat.NONE,
        description="whose clients are understood besides Expediter's own (docs/coming-from.md); it changes "
        "defaults, too",
    )

    stages: Annotated[Stages, BeforeValidator(_stages)] = Field(
        Stages.PAYMENT_FULFILMENT,
        description="the stages that new orders go through: both, `payment` (they end at `confirmed`) or "
        "`fulfilment` (nothing is charged)",
    )
    worker_count: int = Field(
        4, ge=1, le=256, description="workers per process; with `up`, the number of worker processes"
    )
    worker_concurrency: int = Field(25, ge=1, le=1000, description="jobs that one worker runs at once")
    lease_seconds: float = Field(
        30,
        ge=1,
        le=3600,
        description="seconds a worker may hold a job without reporting back; a crashed worker's orders wait this "
        "long",
    )
    drain_seconds: float = Field(10, ge=0, le=600, description="seconds that shutdown waits for work in progress")

    payment_gateway: str = Field(
        "simulated",
        description="where money moves: `simulated`; `simulated:///ledger/file?seed=7`, with a durable ledger and "
        "a repeatable run; `https://host/base`, a gateway behind the HTTP payment protocol; `stripe:`; or "
        "`python:package.module:Name`, a class of your own (docs/payments.md)",
    )
    payment_gateway_token: SecretStr | None = Field(
        None, description="the bearer token that a gateway at an address is asked with"
    )
    payment_gateway_secret: SecretStr | None = Field(
        None,
        description="`whsec_...`: what the gateway signs its callbacks with (Standard Webhooks); without it they "
        "are refused",
    )
    payment_capture: Annotated[PaymentCapture, BeforeValidator(_small)] = Field(
        PaymentCapture.AT_ONCE,
        description="`at_once`: the money is taken before the order is carried out; `on_completion`: it is "
        "reserved, and taken when the order is completed",
    )
    payment_action_seconds: float = Field(
        900,
        ge=1,
        le=7 * 86_400,
        description="seconds that a customer has to confirm a payment (3-D Secure); then it is voided and the "
        "order is cancelled",
    )
    stripe_api_key: SecretStr | None = Field(
        None, description="the secret or restricted key of the account at Stripe (`sk_...`, `rk_...`)"
    )
    stripe_api_base: str | None = Field(
        None, description="another server than Stripe's, for tests: it is sent the key"
    )
    stripe_webhook_secret: SecretStr | None = Field(
        None, description="the signing secret of Stripe's callbacks (`whsec_...`)"
    )
    gateway_key_prefix: Annotated[str, AfterValidator(_key_part)] = Field(
        "",
        description="a name of this installation's own, where several share an account at the gateway; fixed by a "
        "database's first start",
    )
    payment_mock_success_rate: float = Field(
        0.95,
        ge=0,
        le=1,
        description="share of simulated calls that succeed; the rest find the gateway unavailable",
    )
    payment_mock_latency_min: int = Field(
        50, ge=0, le=10_000, description="milliseconds that a simulated call takes, at least"
    )
    payment_mock_latency_max: int = Field(
        200, ge=0, le=10_000, description="milliseconds that a simulated call takes, at most"
    )
    payment_retry_delay: float = Field(
        1,
        gt=0,
        le=3600,
        description="seconds of the longest pause after a first failed attempt; after each more it may be twice "
        "as long, up to 30",
    )
    payment_retry_attempts: int = Field(3, ge=1, le=100, description="attempts before `payment_failed`")
    circuit_breaker_failure_threshold: int = Field(
        5, ge=1, description="consecutive failures that open the breaker"
    )
    circuit_breaker_recovery_seconds: float = Field(
        60, gt=0, le=86_400, description="seconds before the open breaker lets one call through"
    )

    fulfilment: str = Field(
        "simulated",
        description="who fulfils orders: `simulated`; `simulated://?success_rate=0.9&seed=7`; "
        "`https://host/path`, which is given each order; `python:package.module:function`, a function of your own "
        "(docs/fulfilment.md); or `manual`: callers move orders to `processing`, `completed` and `failed`, and no "
        "worker does",
    )
    fulfilment_token: SecretStr | None = Field(
        None, description="the bearer token that a fulfiller at an address is asked with"
    )
    fulfilment_retry_attempts: int = Field(
        5, ge=1, le=100, description="times that a fulfiller is asked before the order is `failed`"
    )
    fulfilment_seconds_max: float | None = Field(
        None,
        gt=0,
        le=365 * 86_400,
        description="seconds after which an order is overdue that was taken and not reported; without it, never",
    )
    fulfilment_mock_latency_min: int = Field(
        50, ge=0, le=10_000, description="milliseconds that a simulated order takes, at least"
    )
    fulfilment_mock_latency_max: int = Field(
        200, ge=0, le=10_000, description="milliseconds that a simulated order takes, at most"
    )

    webhook_allow_http: bool = Field(
        False,
        description="`true`: webhooks may go to addresses that begin with `http://`, too; without it these go to "
        "this machine only (docs/webhooks.md)",
    )

    log_level: Annotated[LogLevel, BeforeValidator(_capital)] = Field(
        "INFO", description="the least important lines that are logged"
    )
    log_format: Annotated[LogFormat, BeforeValidator(_small)] = Field("text", description="how they are written")
    run_dir: str = Field("run", description="folder for the pid and log files of `up`")
    access_log_file: str = Field("", description="file for one line per request; `-` is stderr")
    access_log_format: str = Field(ACCESS_LOG_FORMAT, description="the format of a line, as in gunicorn")

    @model_validator(mode="after")
    def _check_ranges(self) -> Settings:
        for name in ("payment_mock_latency", "fulfilment_mock_latency"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if low > high:
                raise ValueError(f"{name.upper()}_MIN is above {name.upper()}_MAX")
        if self.database_url and (
            parts := [n for n in ("db_host", "db_user", "db_name", "db_path") if getattr(self, n)]
        ):
            raise ValueError(
                f"DATABASE_URL and {parts[0].upper()} both say where the database is: remove DATABASE_URL to use "
                f"what {parts[0].upper()} names, or the lines that begin with DB_"
            )
        if self.fulfilment_seconds_max is not None and self.fulfilment.startswith(("simulated", "manual")):
            raise ValueError(
                "FULFILMENT_SECONDS_MAX counts from when an order was handed over, and "
                f"FULFILMENT={self.fulfilment} hands none over: remove it"
            )
        if self.redis_url and self.redis_host:
            raise ValueError("REDIS_URL and REDIS_HOST both say where Redis is: remove one of them")
        if self.intake is Intake.QUEUED:
            if not self.broker:
                raise ValueError("INTAKE=queued needs a broker: set BROKER_URL or RABBITMQ_HOST")
            if not self.temporary_orders:
                raise ValueError(
                    "INTAKE=queued keeps orders at temp_order:{id} in Redis: set REDIS_URL or REDIS_HOST"
                )
        return self

    @property
    def origins(self) -> list[str]:
        """The origins of web pages that may call: those in CORS_ORIGINS."""
        return self.cors_origins.split(",") if self.cors_origins else []

    @property
    def broker(self) -> str:
        """The broker's address: BROKER_URL, or the parts in RABBITMQ_HOST and its like; empty: the database."""
        if self.broker_url or not self.rabbitmq_host:
            return self.broker_url
        password = self.rabbitmq_password.get_secret_value() if self.rabbitmq_password else RABBITMQ_PASSWORD
        port = self.rabbitmq_port or (RABBITMQ_PORT_TLS if self.mq_use_ssl else RABBITMQ_PORT)
        scheme = "amqps" if self.mq_use_ssl else "amqp"
        who = f"{quote(self.rabbitmq_user, safe='')}:{quote(password, safe='')}"
        return f"{scheme}://{who}@{self.rabbitmq_host}:{port}/"

    @property
    def redis(self) -> str:
        """The address of the Redis for all processes: REDIS_URL, or REDIS_HOST and its like; empty: none."""
        if self.redis_url or not self.redis_host:
            return self.redis_url
        host = f"[{self.redis_host}]" if ":" in self.redis_host else self.redis_host
        return f"redis://{host}:{self.redis_port or REDIS_PORT}"

    @property
    def temporary_orders(self) -> str:
        """The address of the Redis that keeps queued orders: the shared one, or a broker that is a Redis."""
        return self.redis or (self.broker if self.broker.startswith(("redis:", "rediss:", "unix:")) else "")

    @property
    def database(self) -> str:
        """The database's address: DATABASE_URL, or the parts in DB_HOST and its like, or the file of DB_PATH."""
        if self.database_url:
            return self.database_url
        if self.db_host or self.db_user:
            password = quote(self.db_pass.get_secret_value(), safe="") if self.db_pass else ""
            return (
                f"mysql://{quote(self.db_user, safe='')}:{password}@{self.db_host or 'localhost'}/{self.db_name}"
            )
        return f"sqlite:///{self.db_path or SQLITE_FILE}"

    @property
    def loopback(self) -> bool:
        """Whether the address to listen on can be reached from this machine only."""
        return is_loopback(self.host)
