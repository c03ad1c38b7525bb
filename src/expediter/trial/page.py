"""The page on which a customer of the trial gateway says yes or no: plain HTML, no script, no other file."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from urllib.parse import urlsplit

from expediter.orders.money import CURRENCY_DIGITS, format_minor
from expediter.trial.books import Terms
from expediter.trial.documents import Payment

#: Characters of an address to go back to.
RETURN_URL_CHARACTERS_MAX = 2048

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --page: #eef1f5; --card: #fff;
  --line: #d9dfe7; --yes: #1f6f4a; --yes-ink: #fff; --no: #a3312a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ecf1; --soft: #9aa6b5; --page: #12161c; --card: #1b2129;
  --line: #323b47; --yes: #4cc38a; --yes-ink: #0c1a13; --no: #f0877f; } }
* { box-sizing: border-box; }
body { margin: 0; min-height: 100vh; display: grid; place-items: center; padding: 1.5rem 1rem;
  background: var(--page); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
main { width: 100%; max-width: 26rem; padding: 2rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 1rem; box-shadow: 0 1rem 2.5rem rgb(0 0 0 / 8%); }
h1 { margin: 0 0 1.25rem; font-size: 1.25rem; }
.amount { margin: 0; font-size: 2.5rem; font-weight: 650; line-height: 1.1; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
dl { margin: 1.25rem 0; display: grid; grid-template-columns: auto 1fr; gap: .3rem 1rem; }
dt { color: var(--soft); } dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
form { display: grid; gap: .75rem; }
button, .back { display: block; width: 100%; padding: .8rem 1rem; border-radius: .6rem; font: inherit;
  font-weight: 600; text-align: center; text-decoration: none; cursor: pointer; }
.yes, .back { background: var(--yes); color: var(--yes-ink); border: 1px solid var(--yes); }
.no { background: transparent; color: var(--no); border: 1px solid var(--line); }
button:hover, .back:hover { filter: brightness(1.08); }
:focus-visible { outline: 3px solid var(--ink); outline-offset: 2px; }
.outcome { margin: 0 0 1.25rem; padding: .75rem 1rem; border-left: .3rem solid var(--soft);
  background: var(--page); border-radius: .3rem; }
.outcome.good { border-color: var(--yes); } .outcome.bad { border-color: var(--no); }
.note { margin: 1.5rem 0 0; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: .85rem; }
"""
_NOTE = "A gateway to try things on. No money moves."

#: What the page says of a payment that waits for nobody here, by its status; and how that is to be seen.
_OUTCOMES = {
    "succeeded": ("Paid", "good", "The payment was made."),
    "authorized": ("Reserved", "good", "The amount is reserved. It is taken later."),
    "processing": ("Under way", "", "The payment is being made. Load this page again to see what became of it."),
    "voided": ("Called off", "", "The payment was called off. Nothing is taken."),
    "expired": ("Too late", "bad", "It is too late: the time to answer is over. Nothing was taken."),
    "authentication_failed": ("Not paid", "bad", "You said no. Nothing was taken."),
    "declined": ("Declined", "bad", "The payment was declined. Nothing was taken."),
}


def headers() -> dict[str, str]:
    """Return the headers of every page: it may load nothing, run nothing, and be shown in no other page."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    return {
        "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def safe_return_url(url: str | None) -> str:
    """Return an address that a link may lead to, empty if it is none: only http and https."""
    try:
        parts = urlsplit(url or "")
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        usable = False
    return url if usable and url is not None and len(url) <= RETURN_URL_CHARACTERS_MAX else ""


def payment_page(payment: Payment, terms: Terms) -> str:
    """Return the page of a payment: the question while it waits for an answer, what became of it afterwards."""
    facts = (
        f'<p class="amount">{escape(amount(payment))}</p>\n<dl><dt>Order</dt><dd>{escape(payment.order_id)}</dd>\n'
    )
    if payment.status == "action_required":
        return _page(
            "Pay this?",
            f"{facts}<dt>Answer by</dt><dd>{escape(_moment(terms.until))}</dd></dl>\n"
            '<form method="post">\n'
            '<button class="yes" name="answer" value="yes">Yes, pay</button>\n'
            '<button class="no" name="answer" value="no">No</button>\n</form>\n',
        )
    code = payment.error.code if payment.status == "declined" and payment.error is not None else payment.status
    title, look, sentence = _OUTCOMES.get(code, _OUTCOMES["declined"])
    if payment.refunded_minor:
        sentence += " Some or all of it was given back."
    back = f'<a class="back" href="{escape(terms.return_url)}">Back to the shop</a>\n' if terms.return_url else ""
    return _page(title, f'<p class="outcome {look}">{sentence}</p>\n{facts}</dl>\n{back}')


def unknown_page() -> str:
    """Return the page for an address that belongs to no payment."""
    return _page("Not found", '<p class="outcome bad">There is no such payment.</p>\n')


def amount(payment: Payment) -> str:
    """Return what is to be paid, as people write it; of a currency that is not known, its smallest units."""
    if payment.currency not in CURRENCY_DIGITS:
        return f"{payment.amount_minor} {payment.currency} (smallest units)"
    return f"{format_minor(payment.amount_minor, payment.currency)} {payment.currency}"


def _moment(text: str) -> str:
    return f"{text[:10]} {text[11:19]} UTC"


def _page(title: str, inside: str) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{title}</title>\n<link rel="icon" href="data:,">\n<style>{_STYLE}</style>\n</head>\n'
        f'<body>\n<main>\n<h1>{title}</h1>\n{inside}<p class="note">{_NOTE}</p>\n</main>\n</body>\n</html>\n'
    )
