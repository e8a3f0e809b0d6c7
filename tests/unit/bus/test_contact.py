"""Contact, versions, features, UNLOAD.

Source: docs/protocol/messages.md#initiate-contact, docs/protocol/messages.md#unload.
"""

from __future__ import annotations

import uuid

import pytest
from vmbus.bus.contact import DEFAULT_FEATURES, MESSAGE_SINT, MonitorPages, Phase
from vmbus.bus.messages import MAX_UNDELIVERED, PostResult
from vmbus.errors import MalformedError
from vmbus.testing.scripted import RecordingEndpoint, ScriptedGuest, an_offer
from vmbus.wire.header import MessageType
from vmbus.wire.messages import (
    ALLOFFERS_DELIVERED,
    INITIATE_CONTACT,
    MODIFY_CONNECTION,
    RELID_RELEASED,
    REQUESTOFFERS,
    UNLOAD,
    VERSION_RESPONSE,
    VERSION_RESPONSE_FEATURES,
    ChannelOnly,
    ContactState,
    HeaderOnly,
    InitiateContact,
    ModifyConnection,
    ModifyConnectionResponse,
    VersionResponse,
    VersionResponseFeatures,
    VersionResponseMonitor,
)
from vmbus.wire.version import ALL_FEATURES, NO_FEATURES, Feature, Version

REFUSED = VersionResponse(0, 0, 0)


@pytest.mark.conformance(1)
def test_unknown_version_is_refused_and_a_later_contact_works(guest: ScriptedGuest) -> None:
    assert guest.contact(0xFFFF_FFFF, connection_id=1) == [REFUSED]
    assert guest.bus.connection.phase is Phase.DISCONNECTED
    assert guest.bus.version is None
    assert guest.contact(Version.WIN10) == [VersionResponse(1, 0, Version.WIN10)]
    assert guest.bus.version is Version.WIN10


@pytest.mark.conformance(2)
@pytest.mark.parametrize("version", list(Version))
@pytest.mark.parametrize("connection_id", [1, 4])
def test_selected_field_is_the_version_before_5_0_and_the_connection_id_after(
    guest: ScriptedGuest, version: Version, connection_id: int
) -> None:
    (answer,) = guest.contact(version, connection_id=connection_id)
    assert (answer.supported, answer.state) == (1, ContactState.SUCCESSFUL)
    assert answer.selected == (1 if version >= Version.WIN10_RS3_1 else int(version))
    assert isinstance(answer, VersionResponseFeatures if version >= Version.COPPER else VersionResponse)


@pytest.mark.conformance(3)
@pytest.mark.parametrize(("version", "vp"), [(Version.WIN8, 0), (Version.WIN8_1, 2), (Version.IRON, 2)])
def test_target_vp_is_honoured_from_3_0(guest: ScriptedGuest, version: Version, vp: int) -> None:
    guest.contact(version, vp=2)
    guest.request_offers()
    assert {(answer.vp, answer.sint) for answer in guest.answers} == {(vp, 2)}


def test_target_vp_that_does_not_exist_is_refused_on_vp_0(guest: ScriptedGuest) -> None:
    assert guest.contact(Version.IRON, vp=4) == [REFUSED]
    assert guest.answers[-1].vp == 0
    assert guest.bus.refusals.counts == {"contact-target-vp": 1}


@pytest.mark.conformance(4)
@pytest.mark.parametrize(
    ("version", "used"),
    [(Version.V1, True), (Version.WIN7, True), (Version.WIN8, False), (Version.WIN10, False)],
)
def test_interrupt_page_is_used_only_below_2_4(guest: ScriptedGuest, version: Version, used: bool) -> None:
    channel = guest.bus.offer(an_offer(), RecordingEndpoint())
    page = guest.pages(1)[0] * 4096
    guest.connect(version, interrupt_page=page)
    guest.open_channel(1, vp=1)
    channel.signal_guest()
    assert guest.memory.read(page, 2) == (b"\x02\0" if used else b"\0\0")
    assert guest.synic.events == [(0, 2, 0) if used else (1, 2, 1)]


@pytest.mark.parametrize("version", [Version.V1, Version.WIN7])
def test_shared_doorbell_takes_bits_of_the_interrupt_page(guest: ScriptedGuest, version: Version) -> None:
    first, second = RecordingEndpoint(), RecordingEndpoint()
    guest.bus.offer(an_offer("a"), first)
    for number in range(8):
        guest.bus.offer(an_offer(f"b{number}", interface=2), second)
    page = guest.pages(1)[0] * 4096
    guest.connect(version, interrupt_page=page)
    guest.open_channel(1)
    guest.open_channel(9)
    guest.memory.write(page + 2048 + 1, b"\x02")
    guest.synic.ports[2]()
    assert second.calls[-1] == "signalled"
    assert "signalled" not in first.calls
    assert not any(guest.memory.read(page + 2048, 2048))


def test_shared_doorbell_without_a_page_signals_every_open_channel(guest: ScriptedGuest) -> None:
    endpoint = RecordingEndpoint()
    guest.bus.offer(an_offer(), endpoint)
    guest.connect(Version.V1)
    guest.open_channel(1)
    guest.synic.ports[2]()
    assert endpoint.calls[-1] == "signalled"


def test_shared_and_monitor_doorbells_are_no_ops_on_a_modern_connection(guest: ScriptedGuest) -> None:
    endpoint = RecordingEndpoint()
    guest.bus.offer(an_offer(), endpoint)
    guest.connect()
    guest.open_channel(1)
    guest.synic.ports[2]()
    guest.synic.ports[3]()
    assert "signalled" not in endpoint.calls


@pytest.mark.conformance(5)
def test_contact_for_another_sint_is_refused_there_and_changes_nothing(guest: ScriptedGuest) -> None:
    endpoint = RecordingEndpoint()
    guest.bus.offer(an_offer(), endpoint)
    guest.connect()
    guest.open_channel(1)
    before = guest.bus.connection.version
    assert guest.contact(Version.COPPER, sint=7, vp=1, connection_id=4) == [REFUSED]
    assert (guest.answers[-1].vp, guest.answers[-1].sint) == (1, 7)
    assert guest.bus.connection.version is before
    assert endpoint.is_open


@pytest.mark.parametrize(("sint", "vp"), [(16, 0), (255, 0), (7, 9)])
def test_contact_for_a_sint_that_does_not_exist_is_not_answered(
    guest: ScriptedGuest, sint: int, vp: int
) -> None:
    assert guest.contact(sint=sint, vp=vp, connection_id=4) == []


def test_contacts_for_another_sint_cannot_flood_it(guest: ScriptedGuest) -> None:
    payload = INITIATE_CONTACT.build(InitiateContact(Version.IRON, 0, b"\x07" + bytes(7), 0, 0))
    results = [guest.post(payload, connection_id=4) for _ in range(MAX_UNDELIVERED + 10)]
    assert results[MAX_UNDELIVERED - 1 : MAX_UNDELIVERED + 1] == [PostResult.OK, PostResult.RETRY]
    assert len(guest.synic.messages) == MAX_UNDELIVERED


def test_contacts_for_other_sints_cannot_flood_all_of_them(guest: ScriptedGuest) -> None:
    payloads = [
        INITIATE_CONTACT.build(InitiateContact(Version.IRON, vp, bytes((sint,)) + bytes(7), 0, 0))
        for vp in range(guest.synic.vp_count)
        for sint in range(16)
        if sint != MESSAGE_SINT
    ]
    results = [guest.post(payload, connection_id=4) for _ in range(10) for payload in payloads]
    assert results[MAX_UNDELIVERED - 1 : MAX_UNDELIVERED + 1] == [PostResult.OK, PostResult.RETRY]
    assert len(guest.synic.messages) == MAX_UNDELIVERED
    guest.connect()
    assert guest.bus.version is Version.IRON, "contact for the host's own SINT is never put off"
    guest.take()
    assert guest.post(payloads[0], connection_id=4) is PostResult.OK


def test_sint_and_vtl_count_only_on_the_multiclient_port(guest: ScriptedGuest) -> None:
    (answer,) = guest.contact(Version.IRON, sint=7, vtl=2, connection_id=1)
    assert answer.supported == 1
    assert guest.answers[-1].sint == 2


@pytest.mark.conformance(6)
def test_contact_for_another_vtl_is_not_answered_and_changes_nothing(guest: ScriptedGuest) -> None:
    guest.connect()
    assert guest.contact(Version.COPPER, vtl=2, connection_id=4) == []
    assert guest.bus.version is Version.IRON
    (answer,) = guest.contact(Version.WIN10_RS3_1, vtl=2, connection_id=4)
    assert answer.supported == 1, "5.0 knows no VTL"


@pytest.mark.conformance(7)
def test_response_lists_only_supported_flags_in_the_long_form_of_6_0(guest: ScriptedGuest) -> None:
    every = Feature(0xFFFF_FFFF)
    assert guest.contact(Version.COPPER, features=every, client_id=uuid.uuid4()) == [
        VersionResponseFeatures(1, 0, 1, int(DEFAULT_FEATURES))
    ]
    assert len(guest.answers[-1].payload) == VERSION_RESPONSE_FEATURES.size
    assert guest.contact(Version.IRON, features=every) == [VersionResponse(1, 0, 1)]
    assert len(guest.answers[-1].payload) == VERSION_RESPONSE.size
    assert guest.bus.connection.features == NO_FEATURES


def test_feature_flags_count_on_either_port(guest: ScriptedGuest) -> None:
    (answer,) = guest.contact(Version.COPPER, features=Feature.PAUSE_RESUME, connection_id=1)
    assert answer.features == Feature.PAUSE_RESUME


def test_client_id_is_kept_and_a_contact_too_short_for_it_is_ignored(guest: ScriptedGuest) -> None:
    client = uuid.uuid4()
    assert guest.contact(Version.COPPER, features=Feature.CLIENT_ID) == []
    guest.contact(Version.COPPER, features=Feature.CLIENT_ID, client_id=client)
    assert guest.bus.connection.client_id == client


@pytest.mark.conformance(8)
def test_pinning_is_agreed_only_when_the_server_supports_it() -> None:
    plain = ScriptedGuest.on_fakes()
    (answer,) = plain.contact(Version.COPPER, features=Feature.GPA_PINNING)
    assert answer.features == 0
    pinning = ScriptedGuest.on_fakes(supported_flags=DEFAULT_FEATURES | Feature.GPA_PINNING)
    (answer,) = pinning.contact(Version.COPPER, features=Feature.GPA_PINNING)
    assert answer.features == Feature.GPA_PINNING


@pytest.mark.conformance(9)
def test_second_contact_disconnects_first_without_unload_response(guest: ScriptedGuest) -> None:
    endpoint = RecordingEndpoint()
    channel = guest.bus.offer(an_offer(), endpoint)
    guest.connect(Version.IRON)
    guest.open_channel(1)
    guest.post(REQUESTOFFERS.build(HeaderOnly()))
    assert guest.contact(Version.WIN8) == [VersionResponse(1, 0, Version.WIN8)]
    assert not endpoint.is_open
    assert endpoint.gpadls == []
    assert guest.bus.version is Version.WIN8
    assert [offer.relid for offer in guest.request_offers()] == [1]
    guest.open_channel(1)
    assert channel.is_open


def test_second_contact_waits_for_a_slow_close(guest: ScriptedGuest) -> None:
    endpoint = RecordingEndpoint()
    endpoint.defer_close = True
    channel = guest.bus.offer(an_offer(), endpoint)
    guest.connect()
    guest.open_channel(1)
    assert guest.contact(Version.WIN10) == []
    assert guest.contact(Version.WIN8) == [], "the latest contact is the one that is answered"
    channel.finish_close()
    assert [answer.message for answer in guest.take()] == [VersionResponse(1, 0, Version.WIN8)]


@pytest.mark.conformance(10)
def test_unload_waits_for_all_closes(guest: ScriptedGuest) -> None:
    endpoints = [RecordingEndpoint(), RecordingEndpoint(), RecordingEndpoint()]
    channels = [guest.bus.offer(an_offer(f"d{n}"), each) for n, each in enumerate(endpoints)]
    for endpoint in endpoints[:2]:
        endpoint.defer_close = True
    guest.connect()
    for relid in (1, 2, 3):
        guest.open_channel(relid)
    assert guest.unload() == []
    assert not any(endpoint.is_open for endpoint in endpoints)
    channels[0].finish_close()
    assert guest.take() == []
    channels[1].finish_close()
    assert [answer.number for answer in guest.take()] == [MessageType.UNLOAD_RESPONSE]
    assert guest.bus.gpadl_assembler.quota.pages == guest.bus.gpadl_assembler.quota.gpadls == 0
    assert [offer.relid for offer in guest.connect()] == [1, 2, 3]


def test_channels_that_are_released_after_unload_are_gone_already(guest: ScriptedGuest) -> None:
    guest.bus.offer(an_offer(), RecordingEndpoint())
    guest.connect()
    guest.unload()
    for relid in (1, 99):  # whatever it names
        assert guest.ask(RELID_RELEASED.build(ChannelOnly(relid))) == []
    assert guest.bus.status()["refusals"] == {}
    assert [offer.relid for offer in guest.connect()] == [1]


def test_unload_waits_for_a_device_that_still_uses_a_gpadl(guest: ScriptedGuest) -> None:
    endpoint = RecordingEndpoint()
    endpoint.defer_teardown = True
    channel = guest.bus.offer(an_offer(), endpoint)
    guest.connect()
    gpadl_id = guest.share(1)
    assert guest.unload() == []
    channel.finish_teardown(channel.gpadls[gpadl_id])
    assert [answer.number for answer in guest.take()] == [MessageType.UNLOAD_RESPONSE]


def test_contact_after_unload_that_still_waits_replaces_its_answer(guest: ScriptedGuest) -> None:
    endpoint = RecordingEndpoint()
    endpoint.defer_close = True
    channel = guest.bus.offer(an_offer(), endpoint)
    guest.connect()
    guest.open_channel(1)
    guest.unload()
    guest.contact()
    channel.finish_close()
    assert [answer.number for answer in guest.take()] == [MessageType.VERSION_RESPONSE]


def test_unload_drops_what_is_queued(guest: ScriptedGuest) -> None:
    for number in range(20):
        guest.bus.offer(an_offer(f"d{number}"), RecordingEndpoint())
    guest.contact()
    guest.post(REQUESTOFFERS.build(HeaderOnly()))
    assert guest.unload() == [HeaderOnly()]
    assert guest.answers[-1].number is MessageType.UNLOAD_RESPONSE


def test_unload_is_answered_in_any_state_at_the_last_contacts_vp(guest: ScriptedGuest) -> None:
    assert guest.unload() == [HeaderOnly()]
    guest.contact(vp=3)
    guest.unload()
    assert guest.unload() == [HeaderOnly()]
    assert guest.answers[-1].vp == 3


@pytest.mark.parametrize("version", Version)
def test_unload_is_answered_in_every_version(guest: ScriptedGuest, version: Version) -> None:
    guest.contact(version)
    assert guest.unload() == [HeaderOnly()]
    assert guest.answers[-1].number is MessageType.UNLOAD_RESPONSE
    assert guest.bus.connection.phase is Phase.DISCONNECTED


@pytest.mark.conformance(11)
def test_contact_3_0_unload_contact_0_13_offers_the_channels_again(guest: ScriptedGuest) -> None:
    guest.bus.offer(an_offer(), RecordingEndpoint())
    assert [offer.relid for offer in guest.connect(Version.WIN8_1)] == [1]
    assert guest.unload() == [HeaderOnly()]
    assert [offer.relid for offer in guest.connect(Version.V1)] == [1]
    guest.open_channel(1)


@pytest.mark.conformance(12)
def test_server_monitor_pages_are_sent_when_negotiated() -> None:
    pages = MonitorPages(0x5000, 0x6000)
    guest = ScriptedGuest.on_fakes(supported_flags=ALL_FEATURES, server_monitor_pages=pages)
    own = (guest.pages(1)[0] * 4096, guest.pages(1)[0] * 4096)
    wanted = Feature.SERVER_SPECIFIED_MONITOR_PAGES
    assert guest.contact(Version.COPPER, features=wanted, monitor_pages=own) == [
        VersionResponseMonitor(1, 0, 1, int(wanted), 0x5000, 0x6000)
    ]
    assert guest.bus.connection.monitor_pages == pages
    assert guest.contact(Version.COPPER, monitor_pages=own) == [VersionResponseFeatures(1, 0, 1, 0)]
    assert guest.bus.connection.monitor_pages == MonitorPages(*own)


def test_server_monitor_pages_are_not_offered_without_any() -> None:
    guest = ScriptedGuest.on_fakes(supported_flags=ALL_FEATURES)
    wanted = Feature.SERVER_SPECIFIED_MONITOR_PAGES
    assert guest.contact(Version.COPPER, features=wanted) == [VersionResponseFeatures(1, 0, 1, 0)]


@pytest.mark.parametrize("pages", [(0x5000, 0), (0, 0x5000), (0x5000, 1 << 40), (0x5000, 0x6010)])
def test_monitor_pages_are_both_ram_or_none(guest: ScriptedGuest, pages: tuple[int, int]) -> None:
    answers = guest.contact(Version.WIN10, monitor_pages=pages)
    assert answers == [VersionResponse(1, ContactState.FAILED_UNKNOWN, 0)]
    assert guest.bus.version is None


@pytest.mark.conformance(13)
@pytest.mark.parametrize("limit", [Version.WIN8, Version.WIN10, Version.IRON])
def test_versions_above_the_servers_limit_are_refused(limit: Version) -> None:
    guest = ScriptedGuest.on_fakes(max_version=limit)
    for version in reversed(Version):
        (answer,) = guest.contact(version)
        assert answer.supported == (version <= limit), version


@pytest.mark.conformance(22)
def test_untrusted_message_on_a_confidential_connection_is_rejected() -> None:
    guest = ScriptedGuest.on_fakes(supported_flags=ALL_FEATURES)
    confidential = Feature.CONFIDENTIAL_CHANNELS
    assert guest.contact(Version.COPPER, features=confidential) == [VersionResponseFeatures(1, 0, 1, 0)]
    (answer,) = guest.contact(Version.COPPER, features=confidential, trusted=True)
    assert answer.features == confidential
    for payload in (REQUESTOFFERS.build(HeaderOnly()), UNLOAD.build(HeaderOnly())):
        assert guest.ask(payload) == []
    assert guest.contact(Version.IRON) == []
    assert guest.bus.version is Version.COPPER
    assert guest.ask(REQUESTOFFERS.build(HeaderOnly()), trusted=True) == [HeaderOnly()]


@pytest.mark.conformance(36)
def test_modify_connection_needs_its_feature(guest: ScriptedGuest) -> None:
    pages = [pfn * 4096 for pfn in guest.pages(2)]
    message = MODIFY_CONNECTION.build(ModifyConnection(*pages))
    guest.contact(Version.COPPER)
    assert guest.ask(message) == []
    assert guest.bus.refusals.counts == {"message-version": 1}
    guest.contact(Version.COPPER, features=Feature.MODIFY_CONNECTION)
    assert guest.ask(message) == [ModifyConnectionResponse(0)]
    assert guest.bus.connection.monitor_pages == MonitorPages(*pages)
    one_only = MODIFY_CONNECTION.build(ModifyConnection(pages[0], 0))
    assert guest.ask(one_only) == [ModifyConnectionResponse(2)]
    assert guest.bus.connection.monitor_pages == MonitorPages(*pages)
    assert guest.ask(MODIFY_CONNECTION.build(ModifyConnection(0, 0))) == [ModifyConnectionResponse(0)]
    assert guest.bus.connection.monitor_pages is None


def test_contact_too_short_is_ignored(guest: ScriptedGuest) -> None:
    assert guest.ask(INITIATE_CONTACT.build(InitiateContact(Version.IRON, 0, bytes(8), 0, 0))[:39]) == []
    assert guest.bus.refusals.counts == {"message-short": 1}
    with pytest.raises(MalformedError):
        INITIATE_CONTACT.parse(bytes(39))


def test_machine_reset_leaves_nothing_but_the_offers(guest: ScriptedGuest) -> None:
    endpoint = RecordingEndpoint()
    guest.bus.offer(an_offer(), endpoint)
    guest.connect(vp=2)
    guest.open_channel(1)
    guest.post(REQUESTOFFERS.build(HeaderOnly()))
    guest.bus.reset()
    assert guest.take() == []
    assert not endpoint.is_open
    assert guest.bus.gpadl_assembler.quota.pages == 0
    assert guest.unload() == [HeaderOnly()]
    assert guest.answers[-1].vp == 0
    guest.connect()
    guest.open_channel(1)
    assert endpoint.is_open


def test_machine_reset_with_a_slow_close_makes_the_next_contact_wait(guest: ScriptedGuest) -> None:
    endpoint = RecordingEndpoint()
    endpoint.defer_close = True
    channel = guest.bus.offer(an_offer(), endpoint)
    guest.connect()
    guest.open_channel(1)
    guest.bus.reset()
    assert guest.contact() == []
    channel.finish_close()
    assert [answer.number for answer in guest.take()] == [MessageType.VERSION_RESPONSE]


def test_trace_of_a_linux_guest_is_byte_for_byte_as_specified() -> None:
    """The first steps of docs/protocol/messages.md#example-trace."""
    guest = ScriptedGuest.on_fakes(memory_size=20 << 20)
    contact = bytes.fromhex(
        "0e000000000000000300050000000000020000000000000000402301000000000050230100000000"
    )
    guest.ask(contact, connection_id=4)
    assert guest.answers[-1].payload == bytes.fromhex("0f000000000000000100000001000000")
    guest.ask(bytes.fromhex("0300000000000000"), connection_id=1)
    assert guest.answers[-1].payload == ALLOFFERS_DELIVERED.build(HeaderOnly())
    guest.ask(bytes.fromhex("1000000000000000"), connection_id=1)
    assert guest.answers[-1].payload == bytes.fromhex("1100000000000000")
