//! Memory for bits: asked for with a way to be told no.

/// What the allocator is asked for without asking first. It is refused to nobody, and asking would cost
/// more than it is worth: memory that was just given back is no longer known to be zero.
const SURE: usize = 64 << 20;

/// Whether there is memory for so many words.
///
/// `vec![0; n]` gets zeroed pages without writing them, but it ends the process when they are refused. So
/// for a large one a reservation of the same size asks before.
pub(crate) fn has_room_for(words: usize) -> bool {
    if words <= SURE / size_of::<u64>() {
        return true;
    }
    let mut probe = Vec::<u64>::new();
    let answer = probe.try_reserve_exact(words);
    // Without this the compiler may drop the probe, and assume that it worked.
    drop(std::hint::black_box(probe));
    answer.is_ok()
}

/// So many zero words, in memory that nobody has touched yet; `None` if there is none.
pub(crate) fn zeroed_words(words: usize) -> Option<Vec<u64>> {
    has_room_for(words).then(|| vec![0; words])
}
