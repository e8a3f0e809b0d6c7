"""The budget of a guest's memory, and the accounts of its channels."""

from __future__ import annotations

from vmbus.bus.budget import BudgetAccount, MemoryBudget


def account(budget: MemoryBudget) -> BudgetAccount:
    found = BudgetAccount()
    found.move(budget)
    return found


def test_accounts_of_one_guest_share_its_budget() -> None:
    budget = MemoryBudget(100)
    one, other = account(budget), account(budget)
    one.charge(60)
    other.charge(50)
    assert (one.held, other.held, budget.held, budget.full) == (60, 50, 110, True)
    one.refund(60)
    assert (one.held, budget.held, budget.full, budget.most) == (0, 50, False, 110)


def test_the_queue_is_counted_once_however_it_changes() -> None:
    budget = MemoryBudget()
    one = account(budget)
    one.charge(5)
    for size in (10, 30, 30, 7, 0, 20):
        one.set_queued(size)
        assert one.held == budget.held == 5 + size
    one.clear()
    assert one.held == budget.held == 0
    one.set_queued(3)
    assert budget.held == 3


def test_what_is_held_moves_to_another_budget() -> None:
    before, after = MemoryBudget(), MemoryBudget()
    one = account(before)
    one.charge(10)
    one.set_queued(4)
    one.move(after)
    assert (before.held, after.held) == (0, 14)
    one.clear()
    assert (before.held, after.held) == (0, 0)


def test_who_waits_is_called_once_when_there_is_room_and_not_after_it_has_gone() -> None:
    budget = MemoryBudget(10)
    one, calls = account(budget), list[str]()

    def stays() -> None:
        calls.append("stays")

    def goes() -> None:
        calls.append("goes")

    one.charge(20)
    for each in (stays, goes, stays):
        budget.when_free(each)
    budget.forget(goes)
    budget.forget(goes)
    one.refund(10)
    assert calls == []  # the limit is still reached
    one.refund(1)
    one.refund(1)
    assert calls == ["stays"]
