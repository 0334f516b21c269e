"""CRIU's page-server protocol as bytes: messages in both layouts, told apart by the first of them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from incdump.errors import ProtocolError
from incdump.xfer.wire import (
    MOST_PAGES,
    Command,
    Headers,
    Image,
    Layout,
    Message,
    decode,
    encode,
    encode_answer,
    encode_has_parent,
    encode_runs,
    late_end,
)

if TYPE_CHECKING:
    from incdump.images.images_dir import Kind

# A pre-dump of pid 42 by CRIU 4.2 to CRIU's page server, as it was on the wire; and the same from CRIU 4.1.1.
GOLDEN = (
    (
        Message(Command.PARENT, 0, 0, 0, 0x2A01),
        "05000000 00000000 0000000000000000 0000000000000000 012a000000000000",
        "05000000 00000000 0000000000000000 012a000000000000",
    ),
    (
        Message(Command.OPEN2, 0, 0, 0, 0x2A01),
        "04000000 00000000 0000000000000000 0000000000000000 012a000000000000",
        "04000000 00000000 0000000000000000 012a000000000000",
    ),
    (
        Message(Command.ADD_F, 6, 3, 0x10000000, 0x2A01),
        "06000600 00000000 0300000000000000 0000001000000000 012a000000000000",
        "06000600 03000000 0000001000000000 012a000000000000",
    ),
    (
        Message(Command.ADD_F, 1, 2, 0x10001000, 0x2A01),
        "06000100 00000000 0200000000000000 0010001000000000 012a000000000000",
        "06000100 02000000 0010001000000000 012a000000000000",
    ),
    (
        Message(Command.CLOSE, 0, 0, 0, 0),
        "23100000 00000000 0000000000000000 0000000000000000 0000000000000000",
        "23100000 00000000 0000000000000000 0000000000000000",
    ),
)


messages = st.builds(
    Message,
    st.just(Command.ADD_F),
    st.sampled_from([1, 2, 4, 6]),
    st.integers(0, 2**30),
    st.integers(0, 2**52 - 1).map(lambda page: page << 12),
    st.integers(0, 2**64 - 1),
)


@pytest.mark.parametrize(("message", "long", "short"), GOLDEN)
def test_messages_are_what_criu_sends(message: Message, long: str, short: str) -> None:
    for layout, text in ((Layout.LONG, long), (Layout.SHORT, short)):
        data = bytes.fromhex(text)
        assert len(data) == layout.value
        assert encode(message, layout) == data
        assert decode(data, layout) == message


def test_what_stands_in_the_padding_means_nothing() -> None:
    data = bytes.fromhex("06000100 fc7f0000 0200000000000000 0010001000000000 012a000000000000")
    assert decode(data, Layout.LONG) == Message(Command.ADD_F, 1, 2, 0x10001000, 0x2A01)


def test_answers_are_what_criu_sends() -> None:
    assert encode_answer(0).hex() == "00000000"
    assert encode_answer(1).hex() == "01000000"
    assert encode_has_parent(True).hex() == "01"
    assert encode_has_parent(False).hex() == "00"


def test_the_commands_of_old_clients_have_the_flags_of_what_they_mean() -> None:
    for command, flags in ((Command.ADD, 4), (Command.HOLE, 1)):
        data = encode(Message(command, 0, 5, 0x1000, 0x2A01), Layout.SHORT)
        assert decode(data, Layout.SHORT).flags == flags


def test_only_pages_have_bytes_behind_them() -> None:
    def behind(command: Command, flags: int) -> int:
        return Message(command, flags, 3, 0x1000, 0x2A01).bytes_behind

    assert behind(Command.ADD_F, 4) == behind(Command.ADD_F, 6) == behind(Command.ADD, 4) == 3 * 4096
    assert behind(Command.ADD_F, 1) == behind(Command.ADD_F, 2) == behind(Command.HOLE, 1) == 0
    assert behind(Command.OPEN2, 4) == behind(Command.CLOSE, 4) == 0


# CRIU's numbers for what was once many kinds of image.
@pytest.mark.parametrize("number", [1, 10, 11, 16, 17])
def test_images_of_processes(number: int) -> None:
    assert Image.of(42 << 8 | number) == ("pagemap", 42)


@pytest.mark.parametrize("number", [2, 27, 28, 29, 32, 33, 34])
def test_images_of_segments(number: int) -> None:
    assert Image.of(42 << 8 | number) == ("pagemap-shmem", 42)


@pytest.mark.parametrize("number", [0, 3, 9, 12, 18, 26, 35, 255])
def test_there_are_no_other_images(number: int) -> None:
    with pytest.raises(ProtocolError, match="unknown kind"):
        Image.of(42 << 8 | number)


@given(kind=st.sampled_from(["pagemap", "pagemap-shmem"]), number=st.integers(1, 2**56 - 1))
def test_an_image_comes_back_from_its_dst_id(kind: Kind, number: int) -> None:
    image = Image(kind, number)
    assert Image.of(image.dst_id) == image


@pytest.mark.parametrize("command", [0, 8, 0x1022, 0x1025, 0xFFFF])
def test_an_unknown_command_is_refused(command: int) -> None:
    with pytest.raises(ProtocolError, match=f"unknown command \\({command:#x}\\)"):
        decode(struct.pack("=IIQQ", command, 0, 0, 0x2A01), Layout.SHORT)


def test_more_pages_than_there_can_be_are_refused() -> None:
    for pages, is_refused in ((MOST_PAGES, False), (MOST_PAGES + 1, True), (2**64 - 1, True)):
        data = struct.pack("=IIQQQ", 0x60006, 0, pages, 0x1000, 0x2A01)
        if is_refused:
            with pytest.raises(ProtocolError, match="more than there can be"):
                decode(data, Layout.LONG)
        else:
            assert decode(data, Layout.LONG).nr_pages == pages


@pytest.mark.parametrize("layout", Layout)
@given(runs=st.lists(messages, min_size=1, max_size=20), dst_id=st.integers(0, 2**64 - 1))
def test_the_headers_of_runs_are_those_of_each(layout: Layout, runs: list[Message], dst_id: int) -> None:
    entries = np.array([(run.vaddr, run.nr_pages, run.flags) for run in runs], np.uint64)
    expected = [encode(run._replace(dst_id=dst_id), layout) for run in runs]
    assert [row.tobytes() for row in encode_runs(entries, dst_id, layout)] == expected


def test_a_short_header_says_no_more_than_32_bits_of_pages() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        encode(Message(Command.ADD_F, 6, 1 << 32, 0, 0x2A01), Layout.SHORT)


# -- which layout -------------------------------------------------------------------------------------------------

firsts = st.one_of(
    st.builds(
        lambda command, number, low: Message(command, 0, 0, 0, number << 8 | low),
        st.sampled_from([Command.PARENT, Command.OPEN, Command.OPEN2]),
        st.integers(1, 2**40),
        st.sampled_from([1, 2, 11, 33]),
    ),
    st.builds(  # of an old client, which opens without a word
        lambda pages, vaddr, number: Message(Command.ADD_F, 6, pages, vaddr << 12, number << 8 | 1),
        st.integers(1, 2**20),
        st.integers(0, 2**35),
        st.integers(1, 2**22),
    ),
)


@given(first=firsts, rest=st.lists(messages, max_size=4), layout=st.sampled_from(Layout), surplus=st.integers(0, 40))
def test_the_first_message_tells_the_layout(first: Message, rest: list[Message], layout: Layout, surplus: int) -> None:
    data = b"".join(encode(message, layout) for message in (first, *rest))
    headers, at = Headers(), 0
    found: list[Message] = []
    while len(found) < 1 + len(rest):
        # As many bytes as are asked for, or more.
        there = data[: at + headers.needed + surplus]
        assert len(there) - at >= headers.needed
        message, size = headers.decode(there, at)
        at += size
        if message is not None:
            found.append(message)
    assert headers.layout is layout
    assert found == [first, *rest]
    assert at == len(data)


def test_nonsense_is_known_for_it_by_its_first_24_bytes() -> None:
    with pytest.raises(ProtocolError, match="unknown command"):
        Headers().decode(struct.pack("=IIQQ", 99, 0, 0, 0x2A01))
    for command, dst_id in ((Command.GET, 42), (Command.OPEN2, 0x2A03)):
        message, _ = Headers().decode(struct.pack("=IIQQ", command, 0, 0, dst_id))
        assert message == Message(command, 0, 0, 0, dst_id)


@given(
    first=firsts.filter(lambda message: message.command is not Command.ADD_F),
    rest=st.lists(messages, max_size=4),
    surplus=st.integers(0, 40),
)
def test_a_client_may_change_to_the_long_layout_when_it_has_lost_patience(
    first: Message, rest: list[Message], surplus: int
) -> None:
    data = encode(first, Layout.SHORT) + late_end(first) + b"".join(encode(message, Layout.LONG) for message in rest)
    headers, at = Headers(), 0
    found: list[Message] = []
    while len(found) < 1 + len(rest):
        message, size = headers.decode(data[: at + headers.needed + surplus], at)
        at += size
        if message is not None:
            found.append(message)
    assert found == [first, *rest]
    assert decode(data, Layout.LONG)._replace(vaddr=0) == first  # what a server of the long layout makes of it


def test_an_end_without_a_beginning_is_understood_in_either_layout() -> None:
    for layout in Layout:
        headers = Headers()
        message, _ = headers.decode(encode(Message(Command.CLOSE, 0, 0, 0, 0), layout))
        assert message is not None
        assert message.command is Command.CLOSE
