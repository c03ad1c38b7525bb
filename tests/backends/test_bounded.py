"""What a process keeps in memory has a limit in bytes."""

from __future__ import annotations

from expediter.backends.bounded import Bounded


def test_the_oldest_goes_when_the_bytes_are_used_up() -> None:
    """What is kept anew counts once and is the newest; what is forgotten makes room."""
    memory: Bounded[str, bytes] = Bounded(10, len)
    for key, value in (("a", b"1234"), ("b", b"123"), ("a", b"12"), ("c", b"12345")):
        memory.keep(key, value)
    assert memory.kept == {"b": b"123", "a": b"12", "c": b"12345"}
    memory.keep("d", b"1")
    assert list(memory.kept) == ["a", "c", "d"]
    memory.forget("c")
    memory.forget("nobody")
    memory.keep("e", b"1234567")
    assert list(memory.kept) == ["a", "d", "e"]
    memory.keep("f", b"12345678901")
    assert memory.kept == {}
