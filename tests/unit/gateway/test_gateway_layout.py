"""The C header and the declarations in ``vmbus.wire.gateway`` are the same layout."""

from __future__ import annotations

import subprocess
from pathlib import Path

import construct as c
import pytest
from vmbus.wire import gateway as wire

from tests.unit.gateway.conftest import compile_c

STRUCTS = {
    "gateway_slot": wire.SLOT,
    "gateway_answer": wire.ANSWER,
    "gateway_vcpu": wire.VCPU,
    "gateway_cpuid": wire.CPUID_ENTRY,
    "gateway_rule": wire.DOORBELL_RULE.struct,
    "gateway_gone": wire.GONE_ENTRY,
    "gateway_msr": wire.MSR_ENTRY.struct,
    "gateway_post_rule": wire.POST_RULE.struct,
    "gateway_ram": wire.RAM_RANGE.struct,
    "gateway_post": wire.POST,
    "gateway_posts": wire.POST_RING,
    "gateway_control": wire.CONTROL,
    "gateway_message": wire.MESSAGE.struct,
    "gateway_reply": wire.REPLY.struct,
}
NUMBERS = {
    "GATEWAY_MAGIC": wire.MAGIC,
    "GATEWAY_VERSION": wire.VERSION,
    "GATEWAY_SLOTS": wire.SLOTS,
    "GATEWAY_DOORBELLS": wire.DOORBELLS,
    "GATEWAY_CPUID_LEAVES": wire.CPUID_LEAVES,
    "GATEWAY_RULES": wire.RULES,
    "GATEWAY_GONE": wire.GONE,
    "GATEWAY_MSRS": wire.MSRS,
    "GATEWAY_POSTS": wire.POSTS,
    "GATEWAY_POST_RULES": wire.POST_RULES,
    "GATEWAY_POST_PAYLOAD": wire.POST_PAYLOAD,
    "GATEWAY_RAM": wire.RAM_RANGES,
    "GATEWAY_JOURNAL_SIZE": wire.JOURNAL_SIZE,
    "DOORBELL_RUNG": wire.DOORBELL_RUNG,
    "DOORBELL_ENGINE": wire.DOORBELL_ENGINE,
    "MSR_ADD_VCPU": wire.MSR_ADD_VCPU,
    "GATEWAY_MESSAGE_MAGIC": wire.MESSAGE_MAGIC,
    "SLOT_LONG_MODE": wire.SLOT_LONG_MODE,
    "HELLO_TAKEOVER": wire.HELLO_TAKEOVER,
    **{f"KIND_{kind.name}": kind.value for kind in wire.TrapKind},
    **{f"VERDICT_{verdict.name}": verdict.value for verdict in wire.Verdict},
    **{f"IDLE_{state.name}": state.value for state in wire.IdleState},
    **{f"EMULATOR_{state.name}": state.value for state in wire.EmulatorState},
    **{f"MESSAGE_{kind.name}": kind.value for kind in wire.MessageType},
    **{f"STATUS_{status.name}": status.value for status in wire.Status},
}


def declared() -> dict[str, int]:
    found = dict(NUMBERS)
    for name, declaration in STRUCTS.items():
        found[f"sizeof(struct {name})"] = declaration.sizeof()
        for subcon in declaration.subcons:
            found[f"offsetof(struct {name}, {subcon.name})"] = wire.offset_of(declaration, subcon.name)
    return found


def test_c_header_and_declarations_agree(tmp_path: Path) -> None:
    lines = [f'printf("%s\\t%llu\\n", "{text}", (unsigned long long){text});' for text in declared()]
    source = tmp_path / "layout.c"
    source.write_text(
        '#include "shared.h"\n#include <stddef.h>\n#include <stdio.h>\nint main(void)\n{\n'
        + "\n".join(lines)
        + "\nreturn 0;\n}\n"
    )
    program = compile_c(tmp_path / "layout", source)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    compiled = {text: int(number) for text, number in (line.split("\t") for line in output.splitlines())}
    assert compiled == declared()


@pytest.mark.parametrize("declaration", STRUCTS.values(), ids=STRUCTS)
def test_every_word_is_naturally_aligned(declaration: c.Struct) -> None:
    for subcon in declaration.subcons:
        inner = subcon.subcon if isinstance(subcon, c.Renamed) else subcon
        if isinstance(inner, c.FormatField):
            assert wire.offset_of(declaration, subcon.name) % inner.sizeof() == 0, subcon.name
    assert declaration.sizeof() % 8 == 0


def test_words_of_different_writers_do_not_share_a_cache_line() -> None:
    by_emulator = {
        "waiting",
        "engine_waiting",
        "arm",
        "hold_timeout_ms",
        "spin_ns",
        "poll_ns",
        "table_sequence",
        "cpuid_count",
        "rule_count",
    }
    by_gateway = {
        "vcpus",
        "emulator",
        "owner",
        "was_active",
        "raise_failures",
        "resets",
        "clock_sequence",
        "tsc_offset",
        "pair_tsc",
    }
    lines = [
        {wire.offset_of(wire.CONTROL, name) // 64 for name in names} for names in (by_emulator, by_gateway)
    ]
    assert not lines[0] & lines[1]
    assert wire.offset_of(wire.VCPU, "auto_eoi") % 64 == 0
    assert wire.offset_of(wire.VCPU, "msi_address") % 64 == 0
    assert wire.offset_of(wire.VCPU, "passed") == wire.offset_of(wire.VCPU, "missed") + 8
    assert wire.offset_of(wire.VCPU, "answers") % 64 == 0
    assert wire.offset_of(wire.VCPU, "slots") % 64 == 0
    assert wire.VCPU.sizeof() % 64 == 0
