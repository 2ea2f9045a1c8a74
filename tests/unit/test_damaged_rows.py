"""Rows are decoded together; a damaged one is left out, reported, and hides no other."""

import logging

import msgspec
import pytest

from understudy.store.records import TextPart
from understudy.store.rows import parts as part_rows


def part(number):
    return TextPart(id=f"prt_{number}", session_id="ses_1", message_id="msg_1", text="x")


GOOD = [(msgspec.json.encode(part(number)),) for number in range(3)]


def decoded(rows):
    return [each.id for each in part_rows.decoded(rows)]


def test_sound_rows_are_decoded_in_order():
    assert decoded(GOOD) == ["prt_0", "prt_1", "prt_2"]
    assert decoded([]) == []


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"null", b'{"type":"text"}', b'{"type":"\xff"}', b"\xff", None, 7],
)
def test_a_damaged_row_hides_no_other(damage, caplog):
    with caplog.at_level(logging.ERROR):
        assert decoded([GOOD[0], (damage,), GOOD[2]]) == ["prt_0", "prt_2"]
    assert "damaged part row" in caplog.text


def test_two_halves_of_a_record_are_two_damaged_rows(caplog):
    whole = GOOD[1][0]
    cut = whole.index(b",")
    assert decoded([GOOD[0], (whole[:cut],), (whole[cut + 1 :],)]) == ["prt_0"]


def test_a_row_of_two_records_is_damaged(caplog):
    assert decoded([(GOOD[0][0] + b"," + GOOD[1][0],), GOOD[2]]) == ["prt_2"]
