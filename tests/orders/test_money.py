"""Amounts are read and printed exactly, in whole minor units, or refused."""

from decimal import Decimal
from time import thread_time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expediter.orders.money import AMOUNT_MINOR_MAX, CURRENCY_DIGITS, MoneyError, format_minor, parse_minor

#: One currency for each number of digits that ISO 4217 knows.
SAMPLES = {"JPY": 0, "EUR": 2, "BHD": 3, "CLF": 4}

minor_amounts = st.integers(min_value=0, max_value=AMOUNT_MINOR_MAX)
sampled_currencies = st.sampled_from(sorted(SAMPLES))
currencies = st.sampled_from(sorted(CURRENCY_DIGITS))


@st.composite
def amount_texts(draw: st.DrawFn) -> tuple[str, str]:
    """Draw a currency and an amount as a person writes it, with all of the currency's digits."""
    currency = draw(sampled_currencies)
    digits = SAMPLES[currency]
    whole = draw(st.integers(min_value=0, max_value=AMOUNT_MINOR_MAX // 10**digits - 1))
    if not digits:
        return currency, str(whole)
    return currency, f"{whole}.{draw(st.integers(min_value=0, max_value=10**digits - 1)):0{digits}d}"


def test_the_sampled_currencies_have_0_2_3_and_4_digits() -> None:
    """Yen have no digits after the point, euros two, Bahraini dinars three, Chilean unidades de fomento four."""
    assert {currency: CURRENCY_DIGITS[currency] for currency in SAMPLES} == SAMPLES


@pytest.mark.parametrize(
    ("code", "digits"), [("USD", 2), ("GBP", 2), ("KRW", 0), ("KWD", 3), ("UYW", 4), ("ISK", 0)]
)
def test_currencies_have_the_digits_of_the_standard(code: str, digits: int) -> None:
    """Well-known currencies have the digits that ISO 4217 gives them."""
    assert CURRENCY_DIGITS[code] == digits


def test_currency_codes_are_three_capitals() -> None:
    """Every currency code is three capital letters, and no code stands twice."""
    assert all(len(code) == 3 and code.isascii() and code.isalpha() and code.isupper() for code in CURRENCY_DIGITS)
    assert len(CURRENCY_DIGITS) > 150


@given(minor=minor_amounts, currency=currencies)
def test_what_is_printed_reads_back_as_the_same_amount(minor: int, currency: str) -> None:
    """Printing an amount and reading it again gives the same whole number of minor units."""
    read = parse_minor(Decimal(format_minor(minor, currency)), currency)

    assert read == minor
    assert type(read) is int


@given(written=amount_texts())
def test_what_is_read_prints_as_it_was_written(written: tuple[str, str]) -> None:
    """Reading an amount that has all its digits and printing it again gives the same text."""
    currency, text = written

    assert format_minor(parse_minor(Decimal(text), currency), currency) == text


@given(minor=minor_amounts, currency=currencies)
def test_printed_amounts_have_exactly_the_currency_s_digits(minor: int, currency: str) -> None:
    """A printed amount has one digit or more before the point and exactly the currency's digits after it."""
    whole, _, fraction = format_minor(minor, currency).partition(".")

    assert whole.isdigit()
    assert len(fraction) == CURRENCY_DIGITS[currency]


@pytest.mark.parametrize(
    ("text", "currency", "minor"),
    [
        ("59.99", "EUR", 5999),
        ("12.9", "EUR", 1290),
        ("12", "EUR", 1200),
        ("0", "EUR", 0),
        ("0.01", "EUR", 1),
        ("1500", "JPY", 1500),
        ("1.234", "BHD", 1234),
        ("0.0001", "CLF", 1),
        ("1e2", "EUR", 10000),
        ("1E-2", "EUR", 1),
        ("0001.50", "EUR", 150),
        ("9999999999999.99", "EUR", AMOUNT_MINOR_MAX),
        ("999999999999999", "JPY", AMOUNT_MINOR_MAX),
    ],
)
def test_amounts_are_read_as_minor_units(text: str, currency: str, minor: int) -> None:
    """An amount may leave out trailing digits and may be written with an exponent."""
    assert parse_minor(Decimal(text), currency) == minor


@given(currency=sampled_currencies, minor=minor_amounts, zeros=st.integers(min_value=1, max_value=30))
def test_zeros_beyond_a_currencys_digits_are_the_same_amount(currency: str, minor: int, zeros: int) -> None:
    """An amount may have more digits than its currency has where these are zeros; any other is refused."""
    text = format_minor(minor, currency)
    text += ("" if "." in text else ".") + "0" * zeros

    assert parse_minor(Decimal(text), currency) == minor
    with pytest.raises(MoneyError, match="more digits after the point"):
        parse_minor(Decimal(text + "1" * (SAMPLES[currency] + 1)), currency)


@pytest.mark.parametrize("text", ["0.001", "12.999", "1e-3", "1E-999999", "5.001e-1"])
def test_an_amount_is_never_rounded(text: str) -> None:
    """A tenth of a cent is refused, however it is written."""
    with pytest.raises(MoneyError, match=r"EUR has \(2\)"):
        parse_minor(Decimal(text), "EUR")


@given(minor=st.integers(min_value=1, max_value=AMOUNT_MINOR_MAX), currency=currencies)
def test_negative_amounts_are_refused(minor: int, currency: str) -> None:
    """No amount below zero is taken."""
    with pytest.raises(MoneyError, match="must not be negative"):
        parse_minor(Decimal("-" + format_minor(minor, currency)), currency)


@given(above=st.integers(min_value=AMOUNT_MINOR_MAX + 1, max_value=10**40), currency=currencies)
def test_amounts_above_the_largest_are_refused(above: int, currency: str) -> None:
    """One minor unit more than the largest amount is refused, and so is everything beyond."""
    with pytest.raises(MoneyError, match="must be at most"):
        parse_minor(Decimal(format_minor(above, currency)), currency)


def test_the_largest_amount_is_exact_for_every_json_reader() -> None:
    """The largest amount is below 2**53, up to which every JSON reader keeps whole numbers exact."""
    assert AMOUNT_MINOR_MAX < 2**53


@pytest.mark.parametrize("text", ["NaN", "-NaN", "sNaN", "NaN123", "Infinity", "-Infinity"])
def test_what_is_not_finite_is_refused(text: str) -> None:
    """NaN and Infinity are no amounts."""
    with pytest.raises(MoneyError, match="must be a finite number"):
        parse_minor(Decimal(text), "EUR")


@pytest.mark.parametrize("text", ["1e999999", "-1e999999", "9.99e999999", "1e-999999", "1e16", "1" + "0" * 4000])
def test_huge_exponents_are_refused_without_being_written_out(text: str) -> None:
    """A short text that stands for a number of a million digits is refused in no time."""
    amount = Decimal(text)
    started = thread_time()

    with pytest.raises(MoneyError):
        parse_minor(amount, "EUR")

    assert thread_time() - started < 0.05


def test_amounts_add_up_where_floats_do_not() -> None:
    """Ten cents and twenty cents are thirty cents, which floats deny."""
    ten, twenty, thirty = (parse_minor(Decimal(text), "EUR") for text in ("0.1", "0.2", "0.3"))

    assert ten + twenty == thirty
    assert 0.1 + 0.2 != 0.3


@given(cents=st.lists(st.integers(min_value=0, max_value=10**9), max_size=50))
def test_a_sum_of_amounts_is_exact(cents: list[int]) -> None:
    """The sum of the amounts that were read is the amount that the sum of their texts reads as."""
    texts = [Decimal(format_minor(amount, "EUR")) for amount in cents]

    assert sum(parse_minor(text, "EUR") for text in texts) == parse_minor(sum(texts, Decimal("0.00")), "EUR")


@pytest.mark.parametrize(
    ("minor", "currency", "text"),
    [
        (0, "EUR", "0.00"),
        (5, "EUR", "0.05"),
        (5999, "EUR", "59.99"),
        (7, "CLF", "0.0007"),
        (1234, "BHD", "1.234"),
        (1500, "JPY", "1500"),
        (AMOUNT_MINOR_MAX, "EUR", "9999999999999.99"),
    ],
)
def test_amounts_print_with_their_digits(minor: int, currency: str, text: str) -> None:
    """Amounts below one whole unit keep the zero before the point."""
    assert format_minor(minor, currency) == text
