//! `HBitmap`: against a naive twin, case by case, and as bytes of all kinds.
//!
//! | file | what |
//! |---|---|
//! | `model` | random operations of all kinds, and the twin does the same |
//! | `cases`, `search`, `walk`, `resize`, `combine` | case by case, at the boundaries of words and levels |

#![expect(clippy::single_range_in_vec_init, reason = "lists of ranges are meant")]

mod bytes;
mod cases;
mod combine;
mod fixtures;
mod model;
mod resize;
mod search;
mod stored;
mod tracked;
mod twin;
mod walk;
