"""Blocks survive everything that a kill or a bad disk can do to the file behind them."""

from __future__ import annotations

import numpy as np
import pytest

from crt.tokens.journal import BlockJournal
from tests.tokens.caches import make_header, random_codes


@pytest.fixture
def journal(tmp_path):
    """A journal of the second shard: 700 rows in blocks of 256, two of three written."""
    header = make_header(rows=4096 + 700)
    codes, _ = random_codes(header)
    journal = BlockJournal(tmp_path / "blocks", header, 1)
    for block in journal.blocks[:2]:
        journal.append(codes[block.start : block.stop])
    return journal, codes[4096:]


def reopened(journal):
    return BlockJournal(journal.path, journal.header, 1)


def test_blocks_come_back(journal):
    written, codes = journal
    again = reopened(written)
    assert (again.done, again.complete) == (2, False)
    again.append(codes[512:])
    assert again.complete
    assert reopened(again).complete
    np.testing.assert_array_equal(again.codes(), codes)


def test_every_cut_keeps_the_whole_blocks(journal):
    """Cut at any byte: exactly the blocks that lie before the cut are left."""
    written, codes = journal
    content = written.path.read_bytes()
    size = len(content) // 2
    for length in [0, 1, 31, 32, size - 1, size, size + 1, 2 * size - 1]:
        written.path.write_bytes(content[:length])
        again = reopened(written)
        assert again.done == length // size
        assert written.path.stat().st_size == again.done * size
        for block in again.blocks[again.done :]:
            again.append(codes[block.start - 4096 : block.stop - 4096])
        np.testing.assert_array_equal(reopened(again).codes(), codes)


def test_changed_byte_drops_its_block_and_what_follows(journal):
    written, _ = journal
    content = written.path.read_bytes()
    size = len(content) // 2
    for place, kept in ((0, 0), (40, 0), (size, 1), (2 * size - 1, 1)):
        changed = bytearray(content)
        changed[place] ^= 1
        written.path.write_bytes(changed)
        assert reopened(written).done == kept


def test_block_of_another_size_is_refused(journal):
    written, codes = journal
    with pytest.raises(ValueError, match="block 2 has 188 rows, not 256"):
        written.append(codes[:256])
