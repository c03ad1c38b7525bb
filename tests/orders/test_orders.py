"""Ids, gateway keys and the lifecycle table."""

import string
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expediter.orders.order import NEVER, RESERVED_IDS, TRANSITIONS, Stages, gateway_key, is_order_id

ALPHABET = string.ascii_letters + string.digits + "._-"

#: The lifecycle as the product promises it.
LIFECYCLE = {
    "pending": {"payment_processing", "processing", "cancelled"},
    "payment_processing": {"confirmed", "payment_failed", "cancelled"},
    "payment_failed": {"payment_processing", "cancelled"},
    "confirmed": {"processing", "cancelled"},
    "processing": {"completed", "failed", "cancelled"},
    "failed": {"processing", "cancelled"},
    "completed": set(),
    "cancelled": set(),
}

order_ids = st.text(ALPHABET, min_size=1, max_size=64).filter(lambda text: text not in RESERVED_IDS)


def test_the_lifecycle_is_the_promised_table() -> None:
    """The legal moves are exactly those of the product's lifecycle table."""
    assert {str(status): {str(move) for move in moves} for status, moves in TRANSITIONS.items()} == LIFECYCLE


@given(text=order_ids)
def test_every_id_of_the_alphabet_is_taken(text: str) -> None:
    """Any 1 to 64 letters, digits, dots, underscores and hyphens are an order id."""
    assert is_order_id(text)


@pytest.mark.parametrize("text", ["ORD003", "a", "0", "-", "_", "...", ".hidden", "Metrics", "status1", "x" * 64])
def test_ids_that_look_odd_are_taken(text: str) -> None:
    """Reserved words are reserved as they are written, not as parts of longer ids."""
    assert is_order_id(text)


@given(text=order_ids, stranger=st.characters(exclude_characters=ALPHABET), data=st.data())
def test_a_single_foreign_character_is_refused(text: str, stranger: str, data: st.DataObject) -> None:
    """One character outside the alphabet, wherever it stands, makes an id invalid."""
    place = data.draw(st.integers(min_value=0, max_value=len(text)))

    assert not is_order_id(text[:place] + stranger + text[place:])


@pytest.mark.parametrize(
    "text", ["", "x" * 65, "a b", "a/b", "ORD-1\n", "\nORD-1", "ORD\r", "é", "\u0663", "\u212a", "a\x00", "a%2Fb"]
)
def test_what_no_path_can_carry_safely_is_refused(text: str) -> None:
    """Empty and overlong ids, slashes, line ends, NUL and letters or digits beyond ASCII are refused."""
    assert not is_order_id(text)


@pytest.mark.parametrize("word", ["metrics", "status", "populate", "batch", ".", ".."])
def test_reserved_path_words_are_refused(word: str) -> None:
    """A word that stands where an id stands in a path is no id."""
    assert not is_order_id(word)


@given(order_id=order_ids, generation=st.integers(min_value=1, max_value=1000))
def test_a_gateway_key_is_always_the_same(order_id: str, generation: int) -> None:
    """The same order and generation have the same key, a UUID of version 5."""
    key = gateway_key(order_id, generation)

    assert key == gateway_key(order_id, generation)
    assert uuid.UUID(key).version == 5


@given(pairs=st.lists(st.tuples(order_ids, st.integers(1, 999)), min_size=2, max_size=20, unique=True))
def test_no_two_charges_share_a_gateway_key(pairs: list[tuple[str, int]]) -> None:
    """Another order or another generation has another key."""
    assert len({gateway_key(*pair) for pair in pairs}) == len(pairs)


def test_gateway_keys_outlive_releases() -> None:
    """Keys are the same in every release, so that a charge begun before an upgrade is found after it."""
    assert gateway_key("ORD-1", 1) == "14e160eb-d7d9-50b3-b032-a1c29207c178"
    assert gateway_key("ORD-1", 2) == "39de6f79-526f-576c-890e-d82d36a8e984"


def test_each_road_has_its_end() -> None:
    """The payment road ends when the order is confirmed, the other two when it is completed."""
    assert {str(stages): str(stages.end) for stages in Stages} == {
        "payment,fulfilment": "completed",
        "payment": "confirmed",
        "fulfilment": "completed",
    }


def test_never_is_past_every_clock_and_fits_every_database() -> None:
    """A parked job's time lies beyond the year 9999 and fits a signed 64-bit column."""
    year_10000 = 253_402_300_800 * 1_000_000

    assert year_10000 < NEVER < 2**63
