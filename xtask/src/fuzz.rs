//! `cargo xtask fuzz`: builds the fuzzer in `fuzz/` with coverage counters and lets it loose on the targets, one after the
//! other.
//!
//! What libFuzzer finds on the way stays in `target/fuzz/corpus`, so the next run goes on there; the small corpus in
//! `fuzz/corpus` is what every run begins with. All this is the stable toolchain; only the address sanitizer needs
//! `RUSTC_BOOTSTRAP`.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;

use crate::{build, host};

/// Coverage counters and comparisons for libFuzzer, as cargo-fuzz has them.
const COVERAGE: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1";
/// Naming the platform keeps these flags from build scripts and procedural macros.
const PLATFORM: &str = "x86_64-unknown-linux-gnu";
/// The fuzzer's exit status where the machine lacks what a target needs.
const IMPOSSIBLE: i32 = 3;
/// An input may take so many seconds before it counts as a hang.
const HANG: u32 = 30;

#[derive(Args)]
pub(crate) struct Arguments {
    /// The targets; all if none is named
    targets: Vec<String>,
    /// How long each target is fuzzed
    #[arg(long, default_value_t = 20)]
    seconds: u32,
    /// With the address sanitizer: finds accesses outside of the program's own memory, at half the speed
    #[arg(long)]
    asan: bool,
    /// Run the one target with this input only, to see why it failed
    #[arg(long)]
    input: Option<PathBuf>,
}

/// What came of a target.
struct Outcome {
    executions: String,
    coverage: String,
    result: &'static str,
}

/// Builds and fuzzes.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let known = known_targets()?;
    if let Some(unknown) = arguments.targets.iter().find(|name| !known.contains(*name)) {
        let names: Vec<&str> = known.iter().map(String::as_str).collect();
        bail!(
            "there is no fuzz target {unknown:?}; there are {}",
            names.join(", ")
        );
    }
    let fuzzer = build_fuzzer(arguments.asan)?;
    if let Some(input) = &arguments.input {
        let [target] = &arguments.targets[..] else {
            bail!("--input needs the name of one target");
        };
        let status = fuzzer_for(&fuzzer, target).arg(input).status()?;
        return Ok(u8::try_from(status.code().unwrap_or(1)).map_or(ExitCode::FAILURE, ExitCode::from));
    }
    let chosen: Vec<&String> = known
        .iter()
        .filter(|name| arguments.targets.is_empty() || arguments.targets.contains(name))
        .collect();
    let mut failed = false;
    println!("{:<14} {:>12} {:>9}  result", "target", "executions", "coverage");
    for target in chosen {
        let outcome = fuzz(&fuzzer, target, arguments.seconds)?;
        let Outcome {
            executions,
            coverage,
            result,
        } = outcome;
        println!("{target:<14} {executions:>12} {coverage:>9}  {result}");
        failed |= result == FAILED;
    }
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

const FAILED: &str = "FAILED";

/// The names of all targets: each has a corpus (the replay test sees to it).
fn known_targets() -> Result<BTreeSet<String>> {
    let folder = corpus();
    let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

fn corpus() -> PathBuf {
    lab::repository().join("fuzz/corpus")
}

/// The folder for what a build with or without the sanitizer makes.
fn work_folder() -> Result<PathBuf> {
    Ok(build::target()?.join("fuzz"))
}

/// Builds the program; its path.
fn build_fuzzer(asan: bool) -> Result<PathBuf> {
    host::step("building the fuzzer");
    let folder = work_folder()?.join(if asan { "asan" } else { "plain" });
    let mut command = build::cargo();
    command
        .args(["build", "--release", "--locked", "--target", PLATFORM])
        .arg("--manifest-path=fuzz/Cargo.toml")
        .arg("--target-dir")
        .arg(&folder);
    if asan {
        command
            .env("RUSTFLAGS", format!("{COVERAGE} -Zsanitizer=address"))
            .env("RUSTC_BOOTSTRAP", "1");
    } else {
        command.env("RUSTFLAGS", COVERAGE);
    }
    let status = command.status().context("cannot start cargo")?;
    ensure!(status.success(), "the fuzzer does not build");
    Ok(folder.join(PLATFORM).join("release/fuzz"))
}

fn fuzzer_for(fuzzer: &Path, target: &str) -> Command {
    let mut command = Command::new(fuzzer);
    command
        .env("SMSVMM_FUZZ_TARGET", target)
        .arg(format!("-timeout={HANG}"))
        .stdin(Stdio::null());
    command
}

/// Fuzzes one target for so many seconds.
fn fuzz(fuzzer: &Path, target: &str, seconds: u32) -> Result<Outcome> {
    let folder = work_folder()?;
    let found = folder.join("corpus").join(target);
    let artifacts = folder.join("artifacts");
    fs::create_dir_all(&found)?;
    fs::create_dir_all(&artifacts)?;
    let log = folder.join(format!("{target}.log"));
    let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let status = fuzzer_for(fuzzer, target)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/{target}-", artifacts.display()))
        .arg("-print_final_stats=1")
        .args([&found, &corpus().join(target)])
        .stdout(Stdio::null())
        .stderr(output)
        .status()
        .context("cannot start the fuzzer")?;
    let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    let result = match status.code() {
        Some(0) => "ok",
        Some(IMPOSSIBLE) => "skipped: it needs /dev/kvm",
        _ => {
            eprintln!("{}", last_lines(&text, 40));
            eprintln!("the whole log is {}; repeat it with", log.display());
            eprintln!("    cargo xtask fuzz {target} --input {}", failing_input(&text));
            FAILED
        }
    };
    let number = |name: &str| word_after(&text, name).unwrap_or("-").to_owned();
    Ok(Outcome {
        executions: number("stat::number_of_executed_units:"),
        coverage: number(" cov:"),
        result,
    })
}

/// The word that follows the last `name`.
fn word_after<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = text.rsplit_once(name)?;
    rest.split_whitespace().next()
}

fn failing_input(log: &str) -> &str {
    word_after(log, "Test unit written to").unwrap_or("FILE")
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "#2\tINITED cov: 10 ft: 11 corp: 1/1b\n\
        #9\tDONE   cov: 579 ft: 3000 corp: 5/90b\n\
        stat::number_of_executed_units: 656159\n\
        artifact_prefix='x'; Test unit written to /work/crash-1\n";

    #[test]
    fn figures_are_taken_from_the_end_of_the_log() {
        assert_eq!(word_after(LOG, " cov:"), Some("579"));
        assert_eq!(word_after(LOG, "stat::number_of_executed_units:"), Some("656159"));
        assert_eq!(failing_input(LOG), "/work/crash-1");
        assert_eq!(word_after(LOG, "no such thing"), None);
        assert_eq!(last_lines("a\nb\nc", 2), "b\nc");
    }
}
