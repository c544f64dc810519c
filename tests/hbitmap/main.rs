//! `HBitmap`: against a naive twin, case by case, and as bytes of all kinds.
//!
//! | file | what |
//! |---|---|
//! | `model` | random operations of all kinds, and the twin does the same |
//! | `odd` | whole maps and short runs at any length, full and empty blocks in all combinations |
//! | `cases`, `search`, `walk`, `resize`, `combine` | case by case, at the boundaries of words and levels |
//! | `bytes`, `stored`, `fixtures` | parts, files and digests, honest and hostile |
//! | `tracked` | what has changed |
//! | `fuzz` | bytes made into calls, which a fuzzer may have chosen |
//! | `sabotage` | invariants broken on purpose, and which test finds out |
//!
//! The 40 cases that any such map is tried with, and where they are:
//!
//! | case | test |
//! |---|---|
//! | size 0 | `cases::size_0_is_legal_and_always_clean` |
//! | size unaligned | `cases::size_unaligned_has_its_first_and_very_last_granule` |
//! | iter empty, partial | `walk::iter_of_a_clean_map_ends_at_once`, `iter_from_any_start_yields_the_tail` |
//! | iter granularity, and reset | `walk::iter_begins_with_the_start_of_the_granule`, `iter_ends_when_all_is_reset_between_two_steps` |
//! | get all, some | `cases::get_agrees_with_every_byte` |
//! | set all, one, two elements | `cases::set_all_granules`, `set_one_granule`, `set_two_granules_across_a_word` |
//! | set general, twice, overlap | `cases::set_across_words_and_levels`, `set_twice_changes_nothing`, `set_overlapping_counts_each_granule_once` |
//! | reset empty, general, all | `cases::reset_of_what_is_clean_changes_nothing`, `reset_across_words_and_levels_between_sets`, `reset_all_after_many_patterns` |
//! | granularity | `cases::granularity_counts_whole_granules` |
//! | truncate nop | `resize::truncate_nop` |
//! | truncate, grow and shrink by a negligible, tiny, small, medium, large amount | `resize::truncate_grow_and_shrink_…`, ten cases in five tests |
//! | serialize align, basic | `bytes::serialize_align_is_64_granules`, `serialize_basic_has_every_granule_at_its_place` |
//! | serialize part, zeroes | `bytes::serialize_part_puts_each_granule_into_its_part`, `serialize_zeroes_removes_exactly_what_is_loaded_as_zeroes` |
//! | next zero, next dirty, and areas of them, at 0, 1 and 4 | `search::next_x_0`, `next_x_1`, `next_x_4`, `next_dirty_area_is_cut_by_the_range_and_by_its_length`: five cases |
//! | the same two after truncate | each `resize::truncate_…`, which asks about the new and the old end |
//!
//! And what those leave out:
//!
//! | what | test |
//! |---|---|
//! | summaries, padding and count, after each step | `model::random_operations_do_what_the_twin_does` |
//! | padding loaded | `bytes::padding_is_dropped_however_it_comes` |
//! | reset never rounds out; a tail is accepted | `cases::reset_never_rounds_outward` |
//! | edge words of a reset | `cases::reset_keeps_what_is_left_in_the_edge_words` |
//! | all queries agree | `search::queries_agree_for_every_range_of_three_words`, `all_queries_describe_one_set` |
//! | reset and set ahead of a cursor, and behind | `walk::iter_follows_the_map_as_it_changes` |
//! | no dirty byte lost between granularities, three of them | `combine::merge_is_the_union_rounded_outward`, `union_of_two_granularities_in_a_third` |
//! | there is no unfinished map to misuse | `bytes::a_map_is_sound_after_every_part` |
//! | hostile loads | `bytes::hostile_parts_change_nothing`, `stored::any_bytes_do_no_harm`, `honest_liars_do_no_harm`; all of them by `fuzz::no_input_does_harm` |
//! | changes of the map itself | `tracked::every_change_is_marked_and_nothing_else` |
//! | digests | `bytes::digest::…`, `fixtures` |
//! | time | `combine::whole_maps_of_1_tib_take_milliseconds`, `walk::a_huge_sparse_map_is_walked_by_what_is_dirty` |

#![expect(clippy::single_range_in_vec_init, reason = "lists of ranges are meant")]

mod bytes;
mod cases;
mod combine;
mod fixtures;
mod fuzz;
mod model;
mod odd;
mod resize;
#[cfg(debug_assertions)]
mod sabotage;
mod search;
mod stored;
mod tracked;
mod twin;
mod walk;
