//! Prints what criterion measured as the Markdown that stands in the README.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// Whether the table is asked for, and not that something is measured.
pub(crate) fn is_wanted() -> bool {
    std::env::args().skip(1).any(|arg| arg == "table")
}

/// Whether everything is to be run once, to see that it does. What is measured then counts for nothing, so it
/// may be small.
pub(crate) fn is_test() -> bool {
    std::env::args().skip(1).any(|arg| arg == "--test")
}

/// Prints a table with a row for each of `groups` that was measured: the time that the first of
/// `functions` takes for one element, and of the others how many times as long they take.
pub(crate) fn print(title: &str, functions: &[&str], groups: &[String]) -> io::Result<()> {
    let medians = medians(&folder())?;
    println!("| {title} | {} |", functions.join(" | "));
    println!("|---|{}", "---:|".repeat(functions.len()));
    for group in groups {
        let median = |function: &str| medians.get(&(group.clone(), function.to_owned())).copied();
        let first = median(functions[0]);
        let mut cells = vec![first.map_or_else(String::new, time)];
        cells.extend(
            functions[1..]
                .iter()
                .map(|function| match (median(function), first) {
                    (Some(other), Some(first)) => digits(other / first),
                    (Some(other), None) => time(other),
                    (None, _) => String::new(),
                }),
        );
        if cells.iter().any(|cell| !cell.is_empty()) {
            let name = group.rsplit('/').next().unwrap_or(group);
            println!("| {name} | {} |", cells.join(" | "));
        }
    }
    println!();
    Ok(())
}

/// Where criterion puts its results: beside the folder that the bench was built in.
fn folder() -> PathBuf {
    if let Some(home) = std::env::var_os("CRITERION_HOME") {
        return home.into();
    }
    let exe = std::env::current_exe().unwrap_or_default();
    let target = exe.ancestors().nth(3).unwrap_or(Path::new("target"));
    target.join("criterion")
}

/// Median nanoseconds for an element, by group and function.
fn medians(folder: &Path) -> io::Result<BTreeMap<(String, String), f64>> {
    let mut medians = BTreeMap::new();
    for group in fs::read_dir(folder)? {
        let group = group?.path();
        if !group.is_dir() {
            continue;
        }
        for function in fs::read_dir(group)? {
            let new = function?.path().join("new");
            if !new.join("benchmark.json").exists() {
                continue;
            }
            let id = json(&new.join("benchmark.json"))?;
            let estimates = json(&new.join("estimates.json"))?;
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let median = estimates["median"]["point_estimate"].as_f64();
            let elements = id["throughput"]["Elements"].as_f64().unwrap_or(1.0);
            medians.insert(
                (text(&id["group_id"]), text(&id["function_id"])),
                median.unwrap_or(f64::NAN) / elements,
            );
        }
    }
    Ok(medians)
}

fn json(path: &Path) -> io::Result<Value> {
    Ok(serde_json::from_str(&fs::read_to_string(path)?)?)
}

fn time(nanos: f64) -> String {
    let (value, unit) = match nanos {
        ..1e3 => (nanos, "ns"),
        ..1e6 => (nanos / 1e3, "µs"),
        ..1e9 => (nanos / 1e6, "ms"),
        _ => (nanos / 1e9, "s"),
    };
    format!("{} {unit}", digits(value))
}

/// Two digits that count; more where there are more before the point.
fn digits(value: f64) -> String {
    let decimals = (1.0 - value.log10().floor()).clamp(0.0, 9.0) as usize;
    format!("{value:.decimals$}")
}
