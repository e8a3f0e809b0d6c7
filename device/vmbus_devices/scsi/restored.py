"""Commands of a saved controller that are to be executed again.

    add(io, packet) ──open(io)──▶ waiting ──run──▶ executed, or aborted by a reset
    replace(packets) ───────────────▲ │
                                      └─ channel not open, paused, or no room in the guest's budget: run again later

A guest may have up to ``MAX_DEPTH`` commands of each channel in a saved state. Executed all at once they would occupy
more memory than its budget allows, so each batch waits until commands before it have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.state import IoState
from vmbus.ports import Timers
from vmbus.wire.packet import Packet


class RestoredCommands:
    """The restored commands of one controller, oldest first.

    ``open_channels`` returns the channels that take commands, each with its commands under way; ``execute`` and
    ``abort`` end the waiting of one command.
    """

    def __init__(
        self,
        open_channels: Callable[[], Mapping[ChannelIo, Collection[object]]],
        execute: Callable[[ChannelIo, Packet], None],
        abort: Callable[[ChannelIo, Packet], None],
    ) -> None:
        self._open_channels = open_channels
        self._execute = execute
        self._abort = abort
        self._waiting: list[tuple[int, Packet]] = []
        """Each with the index of its channel."""
        self._unopened: dict[ChannelIo, list[Packet]] = {}
        """Those of channels that are not open here yet."""
        self._scheduled = False
        self._until_resumed: set[ChannelIo] = set()
        """Paused channels that have a timer, which is due when they are resumed."""

    @property
    def waiting(self) -> bool:
        """Whether a command waits for others to end."""
        return bool(self._waiting)

    def replace(self, packets: Sequence[tuple[int, Packet]]) -> None:
        """Take the commands that the controller's own state has (of older releases; channel index and packet).

        Those of sub-channels that came before it stay.
        """
        self._waiting = [each for each in self._waiting if each[0]] + list(packets)

    def add(self, io: ChannelIo, packet: Packet) -> None:
        """Take a command that the state of ``io`` has; it waits for :meth:`open`."""
        self._unopened.setdefault(io, []).append(packet)

    def open(self, io: ChannelIo) -> None:
        """Execute the commands of ``io``, which is open here now."""
        self._waiting += [(io.subchannel_index, packet) for packet in self._unopened.pop(io, ())]
        self.run()

    def forget(self, io: ChannelIo, *, opened: bool) -> None:
        """Drop the commands of a channel that is closed; ``opened``: whether it was open here."""
        self._unopened.pop(io, None)
        if opened:
            self._waiting = [each for each in self._waiting if each[0] != io.subchannel_index]
        self._until_resumed.discard(io)  # its timer ended with the channel

    def of(self, io: ChannelIo, *, opened: bool) -> list[Packet]:
        """Return the commands of ``io`` that wait; ``opened``: whether it is open here."""
        found = list(self._unopened.get(io, ()))
        if opened:
            found += [packet for index, packet in self._waiting if index == io.subchannel_index]
        return found

    def of_closed(self, open_here: Collection[int]) -> list[tuple[int, Packet]]:
        """Return those of channels other than ``open_here`` (indexes), each with the index of its channel."""
        return [each for each in self._waiting if each[0] not in open_here]

    def continue_soon(self, timers: Timers) -> None:
        """Call :meth:`run` from the event loop: a command has ended."""
        if self._waiting and not self._scheduled:
            self._scheduled = True
            timers.call_soon(self.run)

    def run(self, *, aborted: bool = False) -> None:
        """Execute commands of the channels that are open, as far as the guest's budget of memory has room.

        The others follow when commands have ended. ``aborted``: end them all in place of that.
        """
        self._scheduled = False
        channels = {io.subchannel_index: (io, commands) for io, commands in self._open_channels().items()}
        end = self._abort if aborted else self._execute
        waiting, self._waiting = self._waiting, []
        for index, packet in waiting:
            if index not in channels:
                self._waiting.append((index, packet))
                continue
            io, commands = channels[index]
            if not io.owes(packet.transaction_id):
                continue
            if not aborted and io.state is IoState.PAUSED:
                self._waiting.append((index, packet))
                self._run_when_resumed(io)
            elif not aborted and io.budget.full and commands:
                self._waiting.append((index, packet))
            else:
                end(io, packet)

    def _run_when_resumed(self, io: ChannelIo) -> None:
        if io in self._until_resumed:
            return
        self._until_resumed.add(io)

        def resumed() -> None:
            self._until_resumed.discard(io)
            self.run()

        io.call_later(0, resumed)
