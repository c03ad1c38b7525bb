"""Every setting, once: what it may be, what it is by default, and how it is written."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal
from urllib.parse import quote

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from expediter.orders.order import Stages
from expediter.settings import written
from expediter.settings.choices import Compat, Intake, PaymentCapture
from expediter.settings.written import REDIS_PREFIX_CHARACTERS_MAX, Rate

#: The common log format with the milliseconds that the answer took: %(h)s address, %(t)s time, %(r)s request line,
#: %(s)s status, %(B)s bytes, %(M)s milliseconds.
ACCESS_LOG_FORMAT = '%(h)s - - %(t)s "%(r)s" %(s)s %(B)s %(M)s'

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
LogFormat = Literal["auto", "text", "json"]

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

    database_url: Annotated[str, AfterValidator(written.database_address)] = Field(
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

    redis_url: Annotated[str, AfterValidator(written.redis_address)] = Field(
        "",
        repr=False,
        description="a cache shared by all processes: `redis://` or `rediss://`; without it, SQLite is cached in "
        "memory and other databases are not cached",
    )
    redis_host: str = Field("", description="the host of that Redis, instead of `REDIS_URL`")
    redis_port: Annotated[int | None, BeforeValidator(written.linked_port)] = Field(
        None,
        ge=1,
        le=65535,
        description="its port; also `tcp://10.0.0.1:6379`, as Kubernetes sets it beside a service named `redis`",
    )
    redis_prefix: Annotated[str, AfterValidator(written.key_prefix)] = Field(
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
    rabbitmq_port: Annotated[int | None, BeforeValidator(written.linked_port)] = Field(
        None,
        ge=1,
        le=65535,
        description=f"its port, with `MQ_USE_SSL` by default {RABBITMQ_PORT_TLS}; also `tcp://10.0.0.1:5672`, as "
        "Kubernetes sets it beside a service named `rabbitmq` (only the port counts)",
    )
    rabbitmq_user: str = Field("guest", description="its user")
    rabbitmq_password: SecretStr | None = Field(None, description="its password")
    rabbitmq_queue_name: Annotated[str, AfterValidator(written.queue_name)] = Field(
        "orders",
        description="the RabbitMQ queue for commands; the queues for hints and dead letters are named after it",
    )
    mq_use_ssl: bool = Field(False, description="`true`: connect to `RABBITMQ_HOST` over TLS")
    intake: Annotated[Intake, BeforeValidator(written.small)] = Field(
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
    cors_origins: Annotated[str, AfterValidator(written.origins)] = Field(
        "",
        description="pages on other origins that may call from a browser: "
        "`https://shop.example,https://admin.example`, or `*` for all",
    )
    trusted_proxies: Annotated[str, AfterValidator(written.networks)] = Field(
        "",
        description="proxies whose `X-Forwarded-For` and `X-Forwarded-Proto` are believed: addresses and "
        "networks, such as `127.0.0.1,10.0.0.0/24`",
    )
    connections_per_address: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="connections that one address may have to a process, unless it is a trusted proxy; without "
        "it, three quarters of all that the process serves",
    )
    rate_limit: Annotated[str, AfterValidator(written.rate)] = Field(
        "",
        description="requests that each API key, or else each address, may send, such as `600/minute`; across "
        "processes they are counted in `REDIS_URL`; without it, there is no limit",
    )
    admin_password: SecretStr | None = Field(
        None, description="opens the calls below `/admin`; without it, only an API key with the scope `admin` does"
    )
    expediter_api_key: SecretStr | None = Field(
        None,
        description="the API key with which `expediter orders`, `events` and `status` ask a service at an address "
        "(docs/security.md); a service itself has no use for it",
    )
    default_currency: Annotated[str, AfterValidator(written.currency)] = Field(
        "USD", description="ISO 4217 code for orders that name no currency"
    )
    idempotency_keep_days: float = Field(7, gt=0, le=365, description="days an `Idempotency-Key` is remembered")
    compat: Annotated[Compat, BeforeValidator(written.small)] = Field(
        Compat.NONE,
        description="whose clients are understood besides Expediter's own (docs/coming-from.md); it changes "
        "defaults, too",
    )

    stages: Annotated[Stages, BeforeValidator(written.stages)] = Field(
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
    payment_capture: Annotated[PaymentCapture, BeforeValidator(written.small)] = Field(
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
    gateway_key_prefix: Annotated[str, AfterValidator(written.key_part)] = Field(
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

    log_level: Annotated[LogLevel, BeforeValidator(written.capital)] = Field(
        "INFO", description="the least important lines that are logged"
    )
    log_format: Annotated[LogFormat, BeforeValidator(written.small)] = Field(
        "auto", description="how they are written; `auto`: a service writes text on a terminal, JSON elsewhere"
    )
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="port at which `expediter work` tells its metrics; without it, none"
    )
    metrics_host: str = Field("127.0.0.1", description="address of that port; nobody is asked for a key there")
    run_dir: str = Field("run", description="folder for the pid and log files of `up`")
    access_log_file: str = Field("", description="file for one line per request; `-` is stderr")
    access_log_format: str = Field(
        ACCESS_LOG_FORMAT, description="the format of a line, as in gunicorn; or `json`"
    )

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
    def proxies(self) -> list[str]:
        """The addresses and networks in TRUSTED_PROXIES."""
        return self.trusted_proxies.split(",") if self.trusted_proxies else []

    @property
    def rate(self) -> Rate | None:
        """What RATE_LIMIT says; None: there is no limit."""
        return written.read_rate(self.rate_limit) if self.rate_limit else None

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
