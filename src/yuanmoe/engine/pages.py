"""Who owns which page of the cache, and which finished pages can be continued by others. Numbers only, no tensors.

A full page can be kept under the tokens that it holds and the page before it: its prefix. Keys are the token ids
themselves, compared and not only hashed, so two prefixes never pass for each other. A kept page that nobody uses stays
until its room is needed; the one that was given back first goes first, and since the last pages of a sequence are given
back before the earlier ones, a page never goes before those that continue it.
"""

from collections import OrderedDict

ROOT = 0
"""The prefix of no tokens. Numbers below are other beginnings, for pages that are not to be continued from here."""
PageKey = tuple[int, tuple[int, ...]]
"""The prefix before a page, and the token ids in it."""


class Pages:
    """`num_pages` pages: each free, used by one or several sequences, or unused and kept for its prefix."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._users = [0] * num_pages
        self._unused: OrderedDict[int, None] = OrderedDict()
        self._kept: dict[PageKey, int] = {}
        self._keys: list[PageKey | None] = [None] * num_pages
        # A page's prefix has a number of its own, as another prefix may be in the same page later.
        self._prefixes = [ROOT] * num_pages
        self._last_prefix = ROOT

    @property
    def num_free(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._unused)

    @property
    def num_unused(self) -> int:
        """Of the free ones, those kept for their prefix."""
        return len(self._unused)

    def take(self) -> int:
        """A page of one's own; `num_free` says whether there is one."""
        if not self._free:
            page, _ = self._unused.popitem(last=False)
            self._forget(page)
        page = self._free.pop()
        self._users[page] = 1
        return page

    def find(self, prefix: int, ids: tuple[int, ...]) -> int | None:
        """The page that holds `ids` behind `prefix`."""
        return self._kept.get((prefix, ids))

    def prefix(self, page: int) -> int:
        """What comes behind a kept page comes behind this prefix."""
        return self._prefixes[page]

    def is_unused(self, page: int) -> bool:
        """Whether sharing this page takes a free one."""
        return self._users[page] == 0

    def share(self, page: int) -> int:
        """Use a kept page too; its prefix."""
        self._unused.pop(page, None)
        self._users[page] += 1
        return self._prefixes[page]

    def keep(self, page: int, prefix: int, ids: tuple[int, ...]) -> tuple[int, int]:
        """Keep one's own page, now full of `ids` behind `prefix`; the page to use from now on, and its prefix.

        Where another page holds the same already, that one is shared and the given one free.
        """
        key = prefix, ids
        known = self._kept.get(key)
        if known is not None:
            self.release([page])
            return known, self.share(known)
        self._last_prefix += 1
        self._kept[key], self._keys[page], self._prefixes[page] = page, key, self._last_prefix
        return page, self._last_prefix

    def release(self, pages: list[int]) -> None:
        """Give back the pages of a sequence, in its order."""
        for page in reversed(pages):
            self._users[page] -= 1
            assert self._users[page] >= 0, f"page {page} was given back twice"
            if self._users[page] == 0:
                if self._keys[page] is None:
                    self._free.append(page)
                else:
                    self._unused[page] = None

    def _forget(self, page: int) -> None:
        key = self._keys[page]
        assert key is not None, "an unused page has a prefix"
        del self._kept[key]
        self._keys[page] = None
        self._free.append(page)
