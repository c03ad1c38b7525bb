"""Money as whole minor units (cents, pence, yen, fils): exact reading and printing.

Digits per currency follow ISO 4217 (list one, 2024). No float is involved anywhere: amounts arrive as
`Decimal` made from the text of the JSON number, and leave as text.
"""

from decimal import Context, Decimal, Inexact

#: The largest amount of one order or price, in minor units: below 2**53, so that JSON readers keep it exact.
AMOUNT_MINOR_MAX = 999_999_999_999_999

_TWO_DIGITS = """
AED AFN ALL AMD ANG AOA ARS AUD AWG AZN BAM BBD BDT BGN BMD BND BOB BOV BRL BSD BTN BWP BYN BZD CAD CDF CHE
CHF CHW CNY COP COU CRC CUP CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD HKD HNL
HTG HUF IDR ILS INR IRR JMD KES KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP MRU MUR
MVR MWK MXN MXV MYR MZN NAD NGN NIO NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR SDG SEK
SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TOP TRY TTD TWD TZS UAH USD USN UYU UZS VED VES WST XCD
XCG YER ZAR ZMW ZWG
"""
_NO_DIGITS = "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF"
_THREE_DIGITS = "BHD IQD JOD KWD LYD OMR TND"
_FOUR_DIGITS = "CLF UYW"

#: ISO 4217 code -> number of digits after the point.
CURRENCY_DIGITS: dict[str, int] = {
    code: digits
    for digits, codes in enumerate((_NO_DIGITS, "", _TWO_DIGITS, _THREE_DIGITS, _FOUR_DIGITS))
    for code in codes.split()
}

#: One minor unit, by the digits after the point.
_SMALLEST = tuple(Decimal((0, (1,), -digits)) for digits in range(5))

#: Raises instead of rounding; wide enough for any amount that passes the size check.
_EXACT = Context(prec=40, traps=[Inexact])
#: The same for what is not exact; and how far from whole minor units a sum of binary floats may be, in such units.
_ROUNDING = Context(prec=40)
_NOISE = Decimal("1e-6")
#: What a binary float can be written as: 17 digits, the last no further behind the point than this.
_FLOAT = Context(prec=17, traps=[Inexact])
_FLOAT_EXPONENT_MIN = -324


class MoneyError(ValueError):
    """The text is not an amount of this currency; the message says why."""


class TooFine(MoneyError):
    """It has a part that is smaller than the currency's minor unit."""

    def __init__(self, currency: str) -> None:
        """Say how many digits the currency has."""
        super().__init__(f"has more digits after the point than {currency} has ({CURRENCY_DIGITS[currency]})")


def parse_minor(amount: Decimal, currency: str) -> int:
    """Return `amount` in whole minor units of `currency` (a key of `CURRENCY_DIGITS`).

    Raises MoneyError for what is not finite, is negative, is above AMOUNT_MINOR_MAX, and TooFine for more digits
    after the point than the currency has: they are refused, never rounded, unless they are zeros.
    """
    digits = CURRENCY_DIGITS[currency]
    # Most amounts have just the digits of their currency, which is seen in a fifth of the time.
    usual = amount.same_quantum(_SMALLEST[digits])
    if not usual and not amount.is_finite():
        raise MoneyError("must be a finite number")
    # The magnitude comes first: 1e999999 must not be written out in full to learn that it is too large.
    if amount.adjusted() > 15:
        raise MoneyError(f"must be at most {format_minor(AMOUNT_MINOR_MAX, currency)}")
    try:
        scaled = amount.scaleb(digits, _EXACT)
    except Inexact:
        raise TooFine(currency) from None
    minor = int(scaled)
    if not usual and minor != scaled:
        raise TooFine(currency)
    if minor < 0:
        raise MoneyError("must not be negative")
    if minor > AMOUNT_MINOR_MAX:
        raise MoneyError(f"must be at most {format_minor(AMOUNT_MINOR_MAX, currency)}")
    return minor


def nearest_minor(amount: Decimal, currency: str) -> int:
    """Return an amount that is whole minor units but for the noise of binary floats (199.99 + 49.99).

    That is within a millionth of a minor unit. Raises TooFine for any other digits, and what `parse_minor` raises.
    """
    try:
        _FLOAT.plus(amount)
    except Inexact:
        raise TooFine(currency) from None
    if amount.adjusted() < _FLOAT_EXPONENT_MIN:
        raise TooFine(currency)
    scaled = amount.scaleb(CURRENCY_DIGITS[currency], _ROUNDING)
    whole = scaled.to_integral_value()
    if abs(scaled - whole) > _NOISE:
        raise TooFine(currency)
    return parse_minor(whole.scaleb(-CURRENCY_DIGITS[currency], _EXACT), currency)


def format_minor(minor: int, currency: str) -> str:
    """Return `minor` (>= 0) as decimal text with exactly the currency's digits: 5999, "EUR" -> "59.99"."""
    digits = CURRENCY_DIGITS[currency]
    if not digits:
        return str(minor)
    text = str(minor).zfill(digits + 1)
    return f"{text[:-digits]}.{text[-digits:]}"
