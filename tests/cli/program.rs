//! Where the programs among the examples are: cargo tells tests of binaries, but not of examples.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The example of that name, built as this test was.
pub(crate) fn example(name: &str) -> PathBuf {
    // target/<profile>/deps/<this test>
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let program = profile.join("examples").join(name);
    // `cargo test` builds the examples before it runs any test; `cargo test --test` does not.
    if !program.exists() {
        let target = profile.parent().unwrap();
        let status = Command::new(env!("CARGO"))
            .args(["build", "--example", name, "--target-dir"])
            .arg(target)
            .args((profile.ends_with("release")).then_some("--release"))
            .status();
        assert!(status.unwrap().success());
    }
    program
}
