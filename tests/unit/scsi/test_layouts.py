"""Storage on the wire: the fast forms agree with their declarations; faults as they are written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vmbus.errors import UsageError
from vmbus.wire import scsi, storvsp
from vmbus_devices.scsi.faults import LAST, Fault, FaultKind, parse_faults


@given(st.binary(min_size=48, max_size=48))
def test_a_request_is_what_its_declaration_says(packet: bytes) -> None:
    declared = storvsp.REQUEST.parse(packet)
    found = storvsp.parse_request(packet)
    assert {name: declared[name] for name in found._fields} == found._asdict()
    assert storvsp.parse_operation(packet) == declared.operation


@given(st.binary(min_size=48, max_size=48), st.binary(max_size=20), st.sampled_from([48, 56, 64]))
def test_an_answer_is_what_its_declaration_says(packet: bytes, sense: bytes, size: int) -> None:
    request = storvsp.parse_request(packet)
    answer = storvsp.build_answer(request, 0xC0000185, 0x84, 2, 512, sense, size)
    assert len(answer) == size
    found = storvsp.ANSWER.parse(answer.ljust(64, b"\0"))
    assert (found.operation, found.status, found.srb_status, found.scsi_status) == (1, 0xC0000185, 0x84, 2)
    assert (found.path, found.target, found.lun) == (request.path, request.target, request.lun)
    assert (found.transfer_length, found.sense_length, found.cdb[: len(sense)]) == (512, len(sense), sense)


@given(
    st.binary(min_size=16, max_size=16),
    st.sampled_from([(0x08, scsi.CDB_6), (0x28, scsi.CDB_10), (0xA8, scsi.CDB_12), (0x88, scsi.CDB_16)]),
)
def test_a_range_of_blocks_is_what_its_declaration_says(data: bytes, form: tuple[int, object]) -> None:
    opcode, declaration = form
    cdb = bytes((opcode,)) + data[1:]
    declared = declaration.parse(cdb)  # type: ignore[attr-defined]
    flags, lba, blocks = scsi.parse_range(cdb)
    if opcode == 0x08:
        assert (flags, lba) == (0, (declared.lba_high & 0x1F) << 16 | declared.lba)
        assert blocks == (declared.length or 256)
    else:
        assert (flags, lba, blocks) == (declared.flags, declared.lba, declared.length)


def test_sizes() -> None:
    assert (storvsp.SHORT_SRB_SIZE, storvsp.SRB_SIZE, storvsp.CHANNEL_PROPERTIES.size) == (0x24, 0x34, 24)
    assert (scsi.INQUIRY.size, scsi.BLOCK_LIMITS.size, scsi.CAPACITY_16.size) == (36, 60, 32)
    assert all(len(scsi.sense_data(sense)) == 18 for sense in scsi.Sense)


def test_faults_as_they_are_written() -> None:
    assert parse_faults("read-error@7;error@0-3;delay:0.5/write@100-;short:0.25@*") == (
        Fault(FaultKind.ERROR, 7, 7, writes=False),
        Fault(FaultKind.ERROR, 0, 3),
        Fault(FaultKind.DELAY, 100, LAST, reads=False, number=0.5),
        Fault(FaultKind.SHORT, 0, LAST, number=0.25),
    )
    assert parse_faults("") == ()


@pytest.mark.parametrize(
    "text", ["delay@1", "error:3@1", "short:1.5@1", "error@9-3", "error", "delay:x@1", "delay:1.2.3@*"]
)
def test_faults_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="fault"):
        parse_faults(text)
