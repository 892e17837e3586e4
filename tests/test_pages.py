"""Laws of the page pool and the page tables: who holds what, after success and after failure."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from kvdsl.errors import CacheError
from kvdsl.members import Member, Policy
from kvdsl.pages import ZERO, PagePool, PageTable
from kvdsl.reserve import Reservation
from kvdsl.window import Window

CPU = torch.device("cpu")


class Holder:
    """An owner of a table."""

    def __init__(self, table: PageTable) -> None:
        self.table = table

    def held(self) -> list[int]:
        return [page for ids in self.table.ids for page in ids]


def test_taken_pages_are_zero_and_distinct() -> None:
    """A page that is taken again has lost what it held; no page is given twice, and never the zero page."""
    pool = PagePool(6, 32, CPU)
    first = pool.take(4)
    pool.bytes[first] = 7
    pool.release(first[1:3])
    second = pool.take(4)
    assert ZERO not in first + second
    assert len({first[0], first[3], *second}) == 6 and pool.in_use == 6
    assert not pool.bytes[second].any() and not pool.bytes[ZERO].any() and (pool.bytes[first[0]] == 7).all()


def test_a_full_pool_keeps_its_pages() -> None:
    """Asking for too much changes nothing and names the bytes."""
    pool = PagePool(3, 64, CPU)
    holder = Holder(PageTable.of([pool.take(2)], CPU))
    pool.owners.add(holder)
    with pytest.raises(CacheError, match=r"2 pages \(128 bytes\) are needed, 1 of 3 are free"):
        pool.take(2)
    assert pool.in_use == 2 and pool.take(1) == [3]


def test_pages_of_a_dropped_owner_are_found_again() -> None:
    """A pool that runs out takes back what owners that are gone have held."""
    pool = PagePool(3, 16, CPU)
    holder = Holder(PageTable.of([pool.take(3)], CPU))
    pool.owners.add(holder)
    del holder
    assert sorted(pool.take(3)) == [1, 2, 3]


def test_random_claims_never_share_a_written_page() -> None:
    """After any claims, selections and truncations: touched places are held once and keep the bytes they had, counts
    are those of the tables, old tables are unchanged, the device table is the host's, and at least one entry of padding
    follows."""
    for seed in range(20):
        rng = random.Random(seed)
        pool = PagePool(200, 16, CPU)
        holder = Holder(PageTable.of([()] * 3, CPU))
        pool.owners.add(holder)
        for _ in range(25):
            old = holder.table
            was = old.tensor.clone()
            if rng.random() < 0.3:
                index = [rng.randrange(len(old.ids)) for _ in range(3)]
                holder.table = old.select(index)
                pool.recount()
            elif rng.random() < 0.2:
                holder.table, dropped = old.truncate([rng.randrange(5) for _ in old.ids])
                pool.release(dropped)
            else:
                touched = [sorted(rng.sample(range(6), rng.randrange(3))) for _ in old.ids]
                gone = [rng.choice([0, 0, 0, 1]) for _ in old.ids]
                touched = [[j for j in places if j >= g] for places, g in zip(touched, gone, strict=True)]
                holder.table, dropped = old.claim(pool, touched, gone)
                pool.release(dropped)
                for b, places in enumerate(touched):
                    for j in places:
                        page = holder.table.ids[b][j]
                        before = old.ids[b][j] if j < len(old.ids[b]) else ZERO
                        assert pool.holders(page) == 1
                        assert torch.equal(pool.bytes[page], pool.bytes[before]) or before not in (page, ZERO)
                        pool.bytes[page] = rng.randrange(256)
            assert torch.equal(old.tensor, was)
            held = Counter(page for page in holder.held() if page != ZERO)
            assert {page: pool.holders(page) for page in held} == held and pool.in_use == len(held)
            for ids, row in zip(holder.table.ids, holder.table.tensor.tolist(), strict=True):
                assert row[: len(ids)] == list(ids) and not any(row[len(ids) :]) and len(row) > len(ids)
            assert not pool.bytes[ZERO].any()


def test_copy_on_write_keeps_the_other() -> None:
    """Of two holders of a page the first that writes gets a copy, the last keeps the page."""
    pool = PagePool(8, 16, CPU)
    table = PageTable.of([pool.take(1)], CPU).select([0, 0])
    pool.share(table.ids[1])
    pool.bytes[table.ids[0][0]] = 9
    after, dropped = table.claim(pool, [[0], [0]], [0, 0])
    pool.release(dropped)
    assert pool.copies == 1 and after.ids[1] == table.ids[1] and after.ids[0] != after.ids[1]
    assert (pool.bytes[after.ids[0][0]] == 9).all() and pool.in_use == 2


def test_reserving_is_not_taking() -> None:
    """A terabyte can be reserved; what is written can be read, the rest is zero."""
    space = Reservation(1 << 40, CPU)
    space.commit(1 << 20)
    space.tensor[12345] = 3
    assert space.tensor[12345] == 3 and space.tensor[12344] == 0 and space.committed == 1 << 20
    with pytest.raises(CacheError, match="bytes of address space"):
        Reservation(1 << 62, CPU)


def test_policy_never_loses_a_row_it_needs() -> None:
    """For every window, chunk and draft: unpacked tokens stand in the ring, writing a chunk spares them and the draft,
    and a crop within the draft finds what a fresh sequence would hold exactly."""
    windows = [
        Window(s, r, w, b) for s in (0, 2) for r, w, b in ((0, False, 1), (3, False, 1), (4, True, 1), (4, True, 2))
    ]
    for keys in windows:
        for values in (v for v in windows if v.sinks == keys.sinks and v.recent == keys.recent):
            for draft in (0, 3):
                policy = Policy(keys, values, 8, True, None, chunk=2, draft=draft)
                for counts in ([1] * 40, [2, 1] * 13, [9, 1, 1, 17, 2, 2, 6], [40]):
                    member = Member()
                    for count in counts:
                        large = policy.is_large(member, count)
                        after = policy.advance(member, count, large=large)
                        end = policy.after_sinks(after.length)
                        assert after.keys == keys.packed(after.length) and after.values == values.packed(after.length)
                        for floor, packed in ((after.key_floor, after.keys), (after.value_floor, after.values)):
                            assert floor <= packed and end - floor + policy.chunk <= policy.ring
                        if large:
                            assert policy.tail(member, count) <= member.first
                        for back in range(min(draft, after.length) + 1):
                            cropped, *cuts = policy.crop(after, after.length - back)
                            assert (cropped.keys, cropped.values) == (
                                keys.packed(cropped.length),
                                values.packed(cropped.length),
                            )
                            assert all(cut.decode == (0, 0) for cut in cuts)
                        member = after
