"""Services of the machine for devices with compiled code, and the engines that these have opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

from vmbus.ports import DataPath, EngineT, NativeEngine, NativeGuestMemory, NativeServices


class MachineDataPath(DataPath, Protocol):
    """A data path, as the machine sees it."""

    def report_ranges(self, on: bool) -> None:
        """Switch reports of every range stored, to :meth:`~vmbus.ports.NativeGuestMemory.filled_by_kernel`.

        A range is reported before the guest gets the completion.
        """

    def use_gateway(self) -> None:
        """Be woken by the gateway, which this process has just taken from another one. No channel is given."""

    def use_mirror(self, memory: memoryview) -> None:
        """Keep in ``memory`` what a successor needs of the requests under way. No channel was given yet."""

    def leave_gateway(self) -> None:
        """Touch nothing of the gateway any more when this returns: another process may take it. No channel is given.

        It cannot fail, nor can :meth:`return_to_gateway`.
        """

    def return_to_gateway(self) -> None:
        """Use the gateway as before: no other process has taken it. No channel is given."""

    def close(self) -> None:
        """End its thread."""


class NativeEngines:
    """:class:`~vmbus.ports.NativeServices` of one machine."""

    def __init__(
        self, memory: NativeGuestMemory, start_data_path: Callable[[], MachineDataPath | None] = lambda: None
    ) -> None:
        """``start_data_path`` is called when a device first wants :attr:`data_path`."""
        self.memory = memory
        self._engines: dict[Callable[[NativeServices], Any], NativeEngine | None] = {}
        self._reports_ranges = False
        self._start_data_path: Callable[[], MachineDataPath | None] | None = start_data_path
        self._data_path: MachineDataPath | None = None
        self._mirror: memoryview | None = None
        self._has_gateway = True
        """Whether the gateway is this process's, and no other one's."""

    @property
    def data_path(self) -> DataPath | None:
        if self._start_data_path is not None and self._has_gateway:
            start, self._start_data_path = self._start_data_path, None
            self._data_path = start()
            if self._data_path is not None:
                self._data_path.report_ranges(self._reports_ranges)
                if self._mirror is not None:
                    self._data_path.use_mirror(self._mirror)
        return self._data_path

    def engine(self, open_engine: Callable[[NativeServices], EngineT | None], /) -> EngineT | None:
        if open_engine not in self._engines:
            self._engines[open_engine] = open_engine(self)
        return cast("EngineT | None", self._engines[open_engine])

    @property
    def in_flight(self) -> int:
        """Transfers of all engines that have not ended."""
        return sum([each.in_flight for each in self._opened()])

    def report_ranges(self, on: bool) -> None:
        """As :meth:`MachineDataPath.report_ranges`, also for a data path that is started later."""
        self._reports_ranges = on
        if self._data_path is not None:
            self._data_path.report_ranges(on)

    def use_mirror(self, memory: memoryview) -> None:
        """As :meth:`MachineDataPath.use_mirror`, also for a data path that is started later."""
        self._mirror = memory
        if self._data_path is not None:
            self._data_path.use_mirror(memory)

    def use_gateway(self) -> None:
        """As :meth:`MachineDataPath.use_gateway`, if there is a data path."""
        if self._data_path is not None:
            self._data_path.use_gateway()

    def leave_gateway(self) -> None:
        """As :meth:`MachineDataPath.leave_gateway`; none is started until :meth:`return_to_gateway`."""
        self._has_gateway = False
        if self._data_path is not None:
            self._data_path.leave_gateway()

    def return_to_gateway(self) -> None:
        """As :meth:`MachineDataPath.return_to_gateway`, after :meth:`leave_gateway` or not."""
        if not self._has_gateway and self._data_path is not None:
            self._data_path.return_to_gateway()
        self._has_gateway = True

    def close(self) -> None:
        """Close all engines; no more can be opened usefully. No channel is given."""
        self._start_data_path = None
        if self._data_path is not None:  # first: it uses what the others have
            data_path, self._data_path = self._data_path, None
            data_path.close()
        for each in self._opened():
            each.close()
        self._engines.clear()

    def _opened(self) -> list[NativeEngine]:
        return [each for each in self._engines.values() if each is not None]
