"""Contact between guest and host: versions, features, pages.

Source: docs/protocol/messages.md#initiate-contact, docs/protocol/messages.md#version-response.

    disconnected --INITIATE_CONTACT ok--> connected --UNLOAD--> disconnecting --all released--> disconnected
                                              '--INITIATE_CONTACT--> disconnecting --all released--> contact again

A contact is legal at any time and is always answered. This module only decides; ``server`` acts on the decision.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from vmbus.bus.outbox import Target
from vmbus.errors import MalformedError
from vmbus.ports import PAGE_SIZE, GuestMemory
from vmbus.wire.messages import (
    INITIATE_CONTACT,
    INITIATE_CONTACT_WITH_CLIENT,
    TARGET_INFO,
    VERSION_RESPONSE,
    VERSION_RESPONSE_FEATURES,
    VERSION_RESPONSE_MONITOR,
    ContactState,
    VersionResponse,
    VersionResponseFeatures,
    VersionResponseMonitor,
)
from vmbus.wire.version import NO_FEATURES, Feature, Version

MESSAGE_CONNECTION_ID = 1
SHARED_EVENT_CONNECTION_ID = 2
MONITOR_CONNECTION_ID = 3
MULTICLIENT_CONNECTION_ID = 4
MESSAGE_SINT = 2
SINT_COUNT = 16

HOME = Target(0, MESSAGE_SINT)
"""Where messages go until a contact names another target."""

DEFAULT_FEATURES = (
    Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS
    | Feature.MODIFY_CONNECTION
    | Feature.CLIENT_ID
    | Feature.PAUSE_RESUME
)
"""Features that need no support of the machine. Interrupt redirection and confidential channels need a paravisor;
pinning and server-specified monitor pages need a machine that has them."""


class Phase(enum.Enum):
    """Phases of the connection."""

    DISCONNECTED = "disconnected"
    CONNECTED = "connected"
    DISCONNECTING = "disconnecting"


class NextAction(enum.Enum):
    """What follows a disconnection when all channels are released."""

    NONE = "none"
    UNLOAD_RESPONSE = "unload response"
    CONTACT = "contact"


@dataclass(frozen=True, slots=True)
class MonitorPages:
    """Addresses (GPA) of the two monitor pages."""

    parent_to_child: int
    child_to_parent: int


@dataclass(frozen=True, slots=True)
class ContactRequest:
    """An INITIATE_CONTACT, read as its version and connection id demand. ``version`` may be unknown."""

    version: int
    target: Target
    vtl: int = 0
    features: Feature = NO_FEATURES
    interrupt_page: int = 0
    parent_to_child: int = 0
    child_to_parent: int = 0
    client_id: uuid.UUID | None = None
    trusted: bool = False


@dataclass(slots=True)
class Connection:
    """What is agreed with the guest. ``target`` outlives a disconnection."""

    phase: Phase = Phase.DISCONNECTED
    version: Version | None = None
    features: Feature = NO_FEATURES
    target: Target = HOME
    interrupt_page: int = 0
    monitor_pages: MonitorPages | None = None
    client_id: uuid.UUID | None = None
    trusted: bool = False
    offers_sent: bool = False
    paused: bool = False
    next_action: NextAction = NextAction.NONE
    next_contact: ContactRequest | None = None

    def at_least(self, version: Version) -> bool:
        """Whether the agreed version is ``version`` or later."""
        return self.version is not None and self.version >= version


@dataclass(frozen=True, slots=True)
class Limits:
    """What the host can agree to."""

    max_version: Version = Version.COPPER
    features: Feature = DEFAULT_FEATURES
    monitor_pages: MonitorPages | None = None
    """Server-specified monitor pages; the feature is not offered without them."""

    @property
    def versions(self) -> Sequence[Version]:
        return [version for version in Version if version <= self.max_version]

    def offered_features(self, *, trusted: bool) -> Feature:
        """Return ``features`` without those that this connection cannot have."""
        offered = self.features
        if self.monitor_pages is None:
            offered &= ~Feature.SERVER_SPECIFIED_MONITOR_PAGES
        if not trusted:
            offered &= ~Feature.CONFIDENTIAL_CHANNELS
        return offered


@dataclass(frozen=True, slots=True)
class Agreement:
    """The outcome of a contact that did not fail."""

    version: Version
    features: Feature
    interrupt_page: int
    monitor_pages: MonitorPages | None


@dataclass(frozen=True, slots=True)
class Failure:
    """The outcome of a contact that failed: fields of the answer, and why. ``reason`` is a stable name."""

    reason: str
    detail: str
    supported: int = 0
    state: ContactState = ContactState.SUCCESSFUL


def read_contact(payload: bytes, connection_id: int, *, trusted: bool) -> ContactRequest:
    """Read an INITIATE_CONTACT that arrived on ``connection_id``.

    SINT (from 5.0) and VTL (from 5.1) count only on the multi-client port, the target VP from 3.0 on. Raises
    :class:`MalformedError` for a message that is too short, also for the client id that its flags announce.
    """
    contact = INITIATE_CONTACT.parse(payload)
    info = TARGET_INFO.parse(contact.target_info)
    multiclient = connection_id == MULTICLIENT_CONNECTION_ID
    features = Feature(info.features & 0xFFFF_FFFF) if contact.version >= Version.COPPER else NO_FEATURES
    client_id = None
    if Feature.CLIENT_ID in features:
        if len(payload) < INITIATE_CONTACT_WITH_CLIENT.size:
            raise MalformedError("contact-without-client-id", f"{len(payload)} bytes")
        client_id = INITIATE_CONTACT_WITH_CLIENT.parse(payload).client_id
    return ContactRequest(
        version=contact.version,
        target=Target(
            contact.target_vp if contact.version >= Version.WIN8_1 else 0,
            info.sint if multiclient and contact.version >= Version.WIN10_RS3_1 else MESSAGE_SINT,
        ),
        vtl=info.vtl if multiclient and contact.version >= Version.WIN10_RS4 else 0,
        features=features,
        interrupt_page=int.from_bytes(contact.target_info, "little") if contact.version < Version.WIN8 else 0,
        parent_to_child=contact.parent_to_child,
        child_to_parent=contact.child_to_parent,
        client_id=client_id,
        trusted=trusted,
    )


def decide(
    request: ContactRequest, limits: Limits, memory: GuestMemory, vp_count: int
) -> Agreement | Failure:
    """Return the answer to ``request``."""
    if request.version not in limits.versions:
        return Failure("contact-version", f"{request.version >> 16}.{request.version & 0xFFFF}")
    version = Version(request.version)
    if request.target.vp >= vp_count:
        return Failure("contact-target-vp", f"{request.target.vp} of {vp_count}")
    features = request.features & limits.offered_features(trusted=request.trusted)
    if Feature.SERVER_SPECIFIED_MONITOR_PAGES in features:
        monitor_pages = limits.monitor_pages
    else:
        given = check_monitor_pages(request.parent_to_child, request.child_to_parent, memory)
        if isinstance(given, Failure):
            return given
        monitor_pages = given
    if request.interrupt_page and not _is_page(request.interrupt_page, memory):
        return Failure(
            "contact-interrupt-page", f"{request.interrupt_page:#x}", 1, ContactState.FAILED_UNKNOWN
        )
    return Agreement(version, features, request.interrupt_page, monitor_pages)


def check_monitor_pages(
    parent_to_child: int, child_to_parent: int, memory: GuestMemory
) -> MonitorPages | Failure | None:
    """Return both pages if they are RAM, None if both are 0; one alone is a failure."""
    if not parent_to_child and not child_to_parent:
        return None
    pages = (parent_to_child, child_to_parent)
    if all(_is_page(page, memory) for page in pages):
        return MonitorPages(*pages)
    detail = f"{parent_to_child:#x} and {child_to_parent:#x}"
    return Failure("contact-monitor-pages", detail, 1, ContactState.FAILED_UNKNOWN)


def answer_agreement(agreement: Agreement) -> bytes:
    """Build VERSION_RESPONSE for an agreement, in the form of its version."""
    version, features = agreement.version, agreement.features
    selected = MESSAGE_CONNECTION_ID if version >= Version.WIN10_RS3_1 else int(version)
    state = ContactState.SUCCESSFUL
    if version < Version.COPPER:
        return VERSION_RESPONSE.build(VersionResponse(1, state, selected))
    if Feature.SERVER_SPECIFIED_MONITOR_PAGES in features and agreement.monitor_pages is not None:
        pages = agreement.monitor_pages
        return VERSION_RESPONSE_MONITOR.build(
            VersionResponseMonitor(
                1, state, selected, int(features), pages.parent_to_child, pages.child_to_parent
            )
        )
    return VERSION_RESPONSE_FEATURES.build(VersionResponseFeatures(1, state, selected, int(features)))


def answer_failure(failure: Failure) -> bytes:
    """Build VERSION_RESPONSE for a failure: the short form, all zero but the fields that tell why."""
    return VERSION_RESPONSE.build(VersionResponse(failure.supported, failure.state, 0))


UNSUPPORTED = Failure("contact-unsupported", "")


def _is_page(gpa: int, memory: GuestMemory) -> bool:
    return gpa != 0 and gpa % PAGE_SIZE == 0 and memory.is_ram(gpa, PAGE_SIZE)
