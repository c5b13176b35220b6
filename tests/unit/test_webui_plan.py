"""Whose rows a UNet call of the web UIs holds, without a web UI."""

from __future__ import annotations

import pytest
import torch

from concept_steer.errors import ConceptSteerError
from concept_steer.hosts.webui_plan import Count, Row, rows_in_order, rows_of_chunks


def kinds(rows):
    return [row.cond for row in rows]


def pictures(rows):
    return [row.picture for row in rows]


def test_prompts_come_first_and_negative_prompts_last():
    rows = rows_in_order([1, 1, 1], 6)
    assert kinds(rows) == [True] * 3 + [False] * 3
    assert pictures(rows) == [0, 1, 2, 0, 1, 2]


def test_all_prompts_joined_by_and_of_a_picture_stand_together():
    rows = rows_in_order([2, 1, 3], 9)
    assert pictures(rows) == [0, 0, 1, 2, 2, 2, 0, 1, 2]
    assert kinds(rows) == [True] * 6 + [False] * 3


def test_the_third_kind_of_row_of_editing_models_is_not_the_prompts():
    assert rows_in_order([1, 1], 6)[2:] == [Row(False, 0), Row(False, 1)] * 2


@pytest.mark.parametrize(("parts", "total"), [([1, 1], 5), ([2, 2], 3), ([], 2)])
def test_a_batch_of_another_size_is_an_error_that_says_what_to_do(parts, total):
    with pytest.raises(ConceptSteerError, match="switch it off"):
        rows_in_order(parts, total)


@pytest.mark.parametrize("calls", [[4], [2, 2], [1, 1, 1, 1], [3, 1], [1, 3]])
def test_rows_keep_their_meaning_however_the_batch_is_cut(calls):
    count = Count([1, 1], 4)
    assert [row for size in calls for row in count.take(size)] == rows_in_order([1, 1], 4)


def test_with_and_and_prompts_longer_than_the_negative_one_the_chunks_are_in_order():
    # two pictures, "a AND b": chunks of 2 * batch prompts, then the negative prompts by themselves
    count = Count([2, 2], 6, torch.zeros(2, 77, 4))
    assert kinds(count.take(4, torch.ones(4, 154, 4))) == [True] * 4
    assert kinds(count.take(2, torch.zeros(2, 77, 4))) == [False] * 2


def test_a_step_without_negative_prompts_leaves_nothing_behind():
    negative = torch.zeros(2, 77, 4)
    count = Count([1, 1], 4, negative)
    assert kinds(count.take(2, torch.ones(2, 77, 4))) == [True, True]
    # a further pass of another extension, with the prompts' embeddings: not the negative prompts that were skipped
    assert kinds(count.take(2, torch.ones(2, 77, 4))) == [True, True]


def test_further_passes_are_told_apart_by_their_embeddings():
    prompt, negative = torch.ones(2, 77, 4), torch.zeros(2, 77, 4)
    count = Count([1, 1], 4, negative)
    count.take(4, torch.cat([prompt, negative]))
    assert kinds(count.take(2, prompt)) == [True, True]
    assert kinds(count.take(2, negative)) == [False, False]
    assert count.take(4, torch.cat([prompt, negative])) == rows_in_order([1, 1], 4)


def test_a_prompt_that_equals_the_negative_prompt_is_still_the_prompt():
    same = torch.zeros(1, 77, 4)
    assert kinds(Count([1], 2, same).take(2, torch.cat([same, same]))) == [True, False]


def test_padded_embeddings_do_not_disturb_the_count():
    count = Count([1], 2, torch.zeros(1, 77, 4))
    assert kinds(count.take(2, torch.zeros(2, 154, 4))) == [True, False]


def test_a_further_pass_that_fits_no_picture_is_an_error():
    count = Count([1, 1], 4)
    count.take(4)
    with pytest.raises(ConceptSteerError, match="3 more rows"):
        count.take(3)


def test_forge_names_its_chunks_and_runs_the_negative_prompt_first():
    assert rows_of_chunks([1, 0], 4) == [Row(False, 0), Row(False, 1), Row(True, 0), Row(True, 1)]
    assert kinds(rows_of_chunks([1, 0, 0], 3)) == [False, True, True]
    assert kinds(rows_of_chunks([0], 2)) == [True, True]


def test_forge_rows_that_cannot_be_shared_out_are_an_error():
    with pytest.raises(ConceptSteerError, match="5 rows for 2 prompts"):
        rows_of_chunks([1, 0], 5)
