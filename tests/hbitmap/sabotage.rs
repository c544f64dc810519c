//! Invariants broken on purpose, one by one, and the tests that find out.
//!
//! What the summary, the padding and the count must be, and what may be read and written, is broken beside them, in
//! the modules of the crate; when memory is taken, in `tests/hbitmap_allocations.rs`.

use std::panic::catch_unwind;

use blockjob::sabotage::{Sabotage, break_on_this_thread};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::model::scenarios;
use crate::{bytes, cases, combine, fuzz, search, stored, tracked, walk};

/// `test` passes, and fails while that is broken.
fn notices(sabotage: Sabotage, test: fn()) {
    assert!(catch_unwind(test).is_ok(), "fails with nothing broken");
    break_on_this_thread(Some(sabotage));
    let found = catch_unwind(test);
    break_on_this_thread(None);
    assert!(found.is_err(), "{sabotage:?} goes unnoticed");
}

#[test]
fn bitmap_5_a_reset_that_rounds_outward() {
    notices(Sabotage::RoundReset, cases::reset_never_rounds_outward);
}

#[test]
fn bitmap_6_a_range_that_is_refused_and_set() {
    let test = cases::set_may_end_in_the_partial_last_granule_but_not_past_it;
    notices(Sabotage::SetAndRefuse, test);
}

#[test]
fn bitmap_7_queries_that_go_on_past_the_end() {
    let test = search::queries_agree_for_every_range_of_three_words;
    notices(Sabotage::AskPastEnd, test);
}

#[test]
fn bitmap_8_a_cursor_that_does_not_end() {
    let test = walk::iter_sees_what_is_set_ahead_also_in_the_word_it_is_in;
    notices(Sabotage::ForgetEnd, test);
}

#[test]
fn bitmap_9_a_part_that_takes_all_of_a_granule() {
    let test = combine::subtract_keeps_what_the_other_has_a_part_of;
    notices(Sabotage::SubtractParts, test);
}

#[test]
fn bitmap_11_any_number_of_granules() {
    let test = cases::limits_are_checked_before_memory_is_asked_for;
    notices(Sabotage::ForgetMost, test);
}

#[test]
fn words_1_a_full_word_taken_for_0() {
    notices(Sabotage::ForgetFullWords, bytes::full_words_are_written_out);
}

#[test]
fn words_2_padding_kept() {
    let test = bytes::padding_is_dropped_however_it_comes;
    notices(Sabotage::KeepPadding, test);
}

#[test]
fn words_3_nothing_counted() {
    notices(
        Sabotage::ForgetCount,
        bytes::a_map_is_sound_after_every_part,
    );
}

#[test]
fn stored_2_checksums_not_looked_at() {
    notices(Sabotage::IgnoreCrc, stored::check_damage);
}

#[test]
fn stored_2_granules_not_counted() {
    notices(Sabotage::IgnoreCount, stored::records_that_lie_are_refused);
}

#[test]
fn stored_3_memory_as_the_header_says() {
    notices(Sabotage::TrustHeader, stored::check_memory);
}

#[test]
fn stored_4_a_bitmap_in_use() {
    notices(Sabotage::TrustInUse, stored::check_in_use);
}

#[test]
fn tracked_1_a_reset_not_marked() {
    let test = tracked::a_bit_is_enough_in_both_directions;
    notices(Sabotage::ForgetReset, test);
}

/// Random changes, the same in each run.
fn changes_are_marked() {
    let config = Config {
        cases: 100,
        failure_persistence: None,
        max_shrink_iters: 0,
        ..Config::default()
    };
    let random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let checked = TestRunner::new_with_rng(config, random).run(&scenarios(), |scenario| {
        let (len, exponent, ops) = scenario;
        tracked::check_each_change(len, exponent, 64, &ops);
        Ok(())
    });
    checked.expect("all is marked");
}

#[test]
fn tracked_1_a_merge_not_marked() {
    notices(Sabotage::ForgetMerged, changes_are_marked);
}

#[test]
fn tracked_3_a_truncate_not_marked() {
    notices(Sabotage::ForgetTruncated, changes_are_marked);
}

#[test]
fn bytes_that_a_fuzzer_might_choose_find_it_too() {
    notices(Sabotage::SetAndRefuse, fuzz::some_inputs);
    notices(Sabotage::KeepPadding, fuzz::some_inputs);
    notices(Sabotage::ForgetCount, fuzz::some_inputs);
}
