"""The channel's codec: what the host decodes comes from a hostile guest."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limpet_agent import frames

_quietly = settings(database=None, deadline=None)
_KINDS = (frames.OPEN, frames.DATA, frames.DATA_ERR, frames.RESET, frames.MSG)
_frame = st.one_of(
    st.tuples(st.integers(0, 2**32 - 1), st.sampled_from(_KINDS), st.binary(max_size=400)),
    st.tuples(st.integers(0, 2**32 - 1), st.just(frames.END), st.just(b"")),
    st.tuples(st.integers(0, 2**32 - 1), st.just(frames.CREDIT), st.binary(min_size=4, max_size=4)),
    st.tuples(st.integers(0, 2**32 - 1), st.just(frames.REF), st.binary(min_size=16, max_size=16)),
)


def _decode(decoder: frames.Decoder, data: bytes) -> list[tuple[int, int, bytes]]:
    decoder.feed(data)
    found = []
    while (frame := decoder.next()) is not None:
        found.append(frame)
    return found


@_quietly
@given(st.lists(_frame, max_size=12), st.data())
def test_any_split_of_the_bytes_gives_the_same_frames(sent: list[tuple[int, int, bytes]], data: st.DataObject) -> None:
    """GST-1"""
    wire = b"".join(frames.encode(*frame) for frame in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=20)))
    decoder = frames.Decoder()
    got = []
    for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        got += _decode(decoder, wire[start:end])
    assert got == sent


@_quietly
@given(st.lists(st.binary(max_size=300), max_size=10))
def test_garbage_gives_frames_or_a_typed_error_and_nothing_else(pieces: list[bytes]) -> None:
    """GST-2"""
    decoder = frames.Decoder()
    try:
        for piece in pieces:
            for _stream, kind, payload in _decode(decoder, piece):
                frames.encode(0, kind, payload)
                frames.charge(kind, payload)
    except frames.FrameError:
        with pytest.raises(frames.FrameError):
            decoder.next()


@_quietly
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 255))
def test_an_excessive_length_is_refused_before_any_payload_came(length: int, stream: int, kind: int) -> None:
    """GST-2"""
    decoder = frames.Decoder()
    decoder.feed(frames.HEADER.pack(length, stream, kind))
    limits = {frames.OPEN: 1 << 20, frames.DATA: 1 << 20, frames.DATA_ERR: 1 << 20, frames.RESET: 1 << 16,
              frames.MSG: 1 << 16}  # fmt: skip
    exact = {frames.HELLO: 24, frames.CREDIT: 4, frames.END: 0, frames.REF: 16}
    allowed = length <= limits[kind] if kind in limits else exact.get(kind) == length
    if allowed:
        assert decoder.next() is None or length == 0
    else:
        with pytest.raises(frames.FrameError):
            decoder.next()


@_quietly
@given(st.binary(max_size=200), st.binary(min_size=16, max_size=16), st.binary(max_size=50), st.integers(1, 50))
def test_what_an_earlier_session_left_is_thrown_away(before: bytes, nonce: bytes, after: bytes, step: int) -> None:
    """GST-1"""
    wire = before + frames.hello(nonce) + after
    finder = frames.HelloFinder(nonce)
    for start in range(0, len(wire), step):
        rest = finder.feed(wire[start : start + step])
        if rest is not None:
            assert rest + wire[start + step :] == after
            return
    raise AssertionError("the HELLO was not found")


def test_a_small_frame_costs_enough_to_bound_their_number() -> None:
    """GST-2"""
    assert frames.charge(frames.DATA, b"") == frames.charge(frames.MSG, b"{}") == frames.LEAST_CHARGE
    assert frames.charge(frames.CREDIT, bytes(4)) == 0


def test_a_reference_beyond_the_cap_is_refused() -> None:
    """GST-2"""
    with pytest.raises(frames.FrameError):
        frames.reference(frames.REFERENCE.pack(0, frames.MAX_PAYLOAD + 1, 0))


def test_a_hello_of_another_protocol_is_refused() -> None:
    """GST-2"""
    with pytest.raises(frames.FrameError):
        frames.hello_nonce(b"LIMPET\x00\x02" + bytes(16))
