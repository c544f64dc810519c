//! Breaks invariants one by one, and looks whether a simulation notices.

use std::panic::catch_unwind;

use blockjob::sabotage::{Sabotage, break_on_this_thread};

/// Keeps quiet about the panics of this thread from now on: here they are what is wanted.
pub(crate) fn expect_panics() {
    let hook = std::panic::take_hook();
    let here = std::thread::current().id();
    std::panic::set_hook(Box::new(move |info| {
        if std::thread::current().id() != here {
            hook(info);
        }
    }));
}

/// Breaks each, and runs seed after seed, as many as it says at most, until `is_it` what was looked for. What is
/// never noticed comes back.
pub(crate) fn unnoticed<T>(
    broken: &[(Sabotage, u64)],
    run: fn(u64) -> T,
    is_it: impl Fn(Sabotage, &str) -> bool,
) -> Vec<Sabotage> {
    let mut missed = Vec::new();
    for &(sabotage, seeds) in broken {
        break_on_this_thread(Some(sabotage));
        let noticed = (0..seeds).find_map(|seed| {
            let how = panic_of(run, seed)?;
            is_it(sabotage, &how).then_some((seed, how))
        });
        break_on_this_thread(None);
        match noticed {
            Some((seed, how)) => {
                let how: String = how.lines().next().unwrap_or("").chars().take(90).collect();
                println!("{sabotage:?}: noticed by seed {seed}: {how}");
            }
            None => {
                println!("{sabotage:?}: not noticed");
                missed.push(sabotage);
            }
        }
    }
    missed
}

/// Whether a run came to no end. What loses data may do that, too, but it is not the point.
#[allow(dead_code, reason = "where nobody waits nothing stalls")]
pub(crate) fn is_stall(how: &str) -> bool {
    how.starts_with("stalled")
}

fn panic_of<T>(run: fn(u64) -> T, seed: u64) -> Option<String> {
    let panic = catch_unwind(|| run(seed)).err()?;
    let text = panic.downcast_ref::<String>().cloned();
    Some(text.unwrap_or_else(|| panic.downcast_ref::<&str>().unwrap_or(&"?").to_string()))
}
