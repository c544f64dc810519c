//! Runs a simulation seed after seed, and says of one that fails how to run it again.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// The number that a variable of the environment has, if it is there.
pub(crate) fn env(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// What came of each seed of that test. Their number is `usual`, or `BLOCKJOB_SEEDS` in `shares`, and the first is
/// `BLOCKJOB_SEED`, or 0.
pub(crate) fn run_seeds<T>(test: &str, usual: u64, shares: u64, run: impl Fn(u64) -> T) -> Vec<T> {
    let first = env("BLOCKJOB_SEED").unwrap_or(0);
    let count = env("BLOCKJOB_SEEDS").map_or(usual, |seeds| seeds.div_ceil(shares));
    println!("seeds {first}..{}", first + count);
    let is_verbose = std::env::var_os("BLOCKJOB_VERBOSE").is_some();
    let run_or_explain = |seed| {
        if is_verbose {
            eprintln!("seed {seed}");
        }
        catch_unwind(AssertUnwindSafe(|| run(seed))).unwrap_or_else(|panic| {
            eprintln!(
                "seed {seed} failed; again with:\n  BLOCKJOB_SEED={seed} BLOCKJOB_SEEDS=1 cargo test --test {} {test}",
                env!("CARGO_CRATE_NAME")
            );
            resume_unwind(panic)
        })
    };
    (first..first + count).map(run_or_explain).collect()
}
