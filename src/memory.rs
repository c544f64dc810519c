//! Memory for bits: asked for with a way to be told no.

/// So many zero words, in memory that nobody has touched yet (rule 10); `None` if there is none.
///
/// `vec![0; n]` alone gets zeroed pages without writing them, but it ends the process when they are
/// refused. So a reservation of the same size asks first.
pub(crate) fn zeroed_words(words: usize) -> Option<Vec<u64>> {
    let mut probe = Vec::<u64>::new();
    probe.try_reserve_exact(words).ok()?;
    // Without this the compiler may drop the probe, and assume that it worked.
    drop(std::hint::black_box(probe));
    Some(vec![0; words])
}
