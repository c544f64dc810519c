//! Memory for bits: zeroed pages that nobody has touched yet, or a no.

use bytemuck::Zeroable;
use bytemuck::allocation::try_zeroed_vec;

/// The allocator has no such memory, or a `usize` does not count so much.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OutOfMemory;

/// So many zeroes.
pub(crate) fn zeroed<T: Zeroable>(count: u64) -> Result<Vec<T>, OutOfMemory> {
    let count = usize::try_from(count).map_err(|_| OutOfMemory)?;
    // A count whose bytes a `usize` does not hold is a no of this, too.
    try_zeroed_vec(count).map_err(|()| OutOfMemory)
}
