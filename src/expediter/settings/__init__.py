"""What is this process told? Every setting, where each one comes from, and what to say when one cannot be used."""

from expediter.settings.choices import Compat, Intake, PaymentCapture
from expediter.settings.fields import Settings
from expediter.settings.reading import effective, in_users_words, load_settings, unknown_names
from expediter.settings.written import Rate

__all__ = [
    "Compat",
    "Intake",
    "PaymentCapture",
    "Rate",
    "Settings",
    "effective",
    "in_users_words",
    "load_settings",
    "unknown_names",
]
