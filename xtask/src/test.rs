//! `cargo xtask test`: everything that must hold before a change lands, in the order in which it fails fastest.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use lab::{Cache, Toolbox};

use crate::{build, demo, host, licences, setup};

/// What came of all steps.
#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
    failures: Vec<String>,
    times: Vec<(String, f64)>,
}

/// Runs all; `quick` leaves out what needs the lab.
pub(crate) fn run(quick: bool) -> Result<ExitCode> {
    let mut tally = Tally::default();
    tally.step("formatting", || {
        visible(build::cargo().args(["fmt", "--all", "--check"])).map(|()| Counts::one())
    });
    tally.step("licences", licences_of_all);
    tally.step("clippy", || {
        let arguments = [
            "clippy",
            "--locked",
            "--workspace",
            "--all-targets",
            "--",
            "--deny=warnings",
        ];
        visible(build::cargo().args(arguments))?;
        let arguments = [
            "clippy",
            "--locked",
            "--package=block-io",
            "--features=sim",
            "--all-targets",
            "--",
            "--deny=warnings",
        ];
        visible(build::cargo().args(arguments)).map(|()| Counts::one())
    });
    tally.step("documentation", || {
        let mut command = build::cargo();
        command
            .args(["doc", "--locked", "--workspace", "--no-deps"])
            .env("RUSTDOCFLAGS", "--deny=warnings");
        visible(&mut command).map(|()| Counts::one())
    });
    if !quick {
        tally.step("set-up", || {
            setup::peer_programs();
            setup::run(&setup::Options {
                refresh: false,
                debian: true,
            })
            .map(|()| Counts::one())
        });
    }
    // With the simulator, which is a feature of its own: nothing that is shipped contains it.
    tally.step("block I/O and simulator tests", || {
        tests(build::cargo().args(["test", "--package=block-io", "--features=sim"]))
    });
    tally.step("unit and micro-guest tests", || {
        let mut command = build::cargo();
        command.args([
            "test",
            "--workspace",
            "--exclude=block-io",
            "--exclude=lab",
            "--exclude=stories",
        ]);
        // Some tests use iasl, passt and the like where they find them.
        if let Ok(toolbox) = Toolbox::open(&Cache::locate()) {
            command.env("PATH", toolbox.search_path());
        }
        tests(&mut command)
    });
    if !quick {
        let mut program = None;
        tally.step("static build", || {
            build::guest_programs()?;
            program = Some(build::static_smsvmm()?);
            Ok(Counts::one())
        });
        if let Some(program) = program {
            // Not the release build, which would take a tenth of the time of all tests; this one checks more, too: overflows, assertions.
            tally.step("lab and stories", || {
                tests(
                    build::cargo()
                        .args(["test", "--package=lab", "--package=stories"])
                        .env("SMSVMM_BIN", &program),
                )
            });
            tally.step("demo", || match demo::run(true, Some(&program))? {
                ExitCode::SUCCESS => Ok(Counts::one()),
                _ => bail!("the tour failed"),
            });
        }
    }
    Ok(tally.summary())
}

/// Passed, failed and ignored tests of a step.
#[derive(Clone, Copy, Default)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Counts {
    /// What a step counts that is one test as a whole.
    fn one() -> Self {
        Self {
            passed: 1,
            ..Self::default()
        }
    }
}

impl Tally {
    fn step(&mut self, name: &str, step: impl FnOnce() -> Result<Counts>) {
        host::step(&format!("{name} ..."));
        let begin = Instant::now();
        match step() {
            Ok(counts) => {
                self.passed += counts.passed;
                self.failed += counts.failed;
                self.ignored += counts.ignored;
                if counts.failed > 0 {
                    self.failures.push(format!("{name}: {} tests", counts.failed));
                }
            }
            Err(error) => {
                self.failed += 1;
                self.failures.push(format!("{name}: {error:#}"));
            }
        }
        self.times.push((name.to_owned(), begin.elapsed().as_secs_f64()));
    }

    /// Prints what came of it. The last line has the form that test runners' readers expect.
    fn summary(&self) -> ExitCode {
        let mut text = String::from("\n");
        for (name, seconds) in &self.times {
            // Writing to a string cannot fail.
            let _ok = writeln!(text, "  {seconds:7.1} s  {name}");
        }
        for failure in &self.failures {
            let _ok = writeln!(text, "FAILED: {failure}");
        }
        println!(
            "{text}{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.ignored
        );
        if self.failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

fn licences_of_all() -> Result<Counts> {
    if host::has("cargo-deny") {
        visible(build::cargo().args(["deny", "check", "licenses", "bans", "sources"]))?;
    }
    let count = licences::check()?;
    host::step(&format!("the licences of {count} packages are allowed"));
    Ok(Counts::one())
}

fn visible(command: &mut Command) -> Result<()> {
    let status = command.status().context("cannot start cargo")?;
    if !status.success() {
        bail!(
            "{} failed",
            command
                .get_args()
                .map(|word| word.to_string_lossy())
                .collect::<Vec<_>>()
                .join(" ")
        );
    }
    Ok(())
}

/// Runs `cargo test`, shows what it says, and adds up its results. What a test echoes of other test programs has to be
/// indented, as stories do, or it would count as well.
fn tests(command: &mut Command) -> Result<Counts> {
    command.args(["--locked", "--no-fail-fast"]);
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let mut counts = Counts::default();
    let stdout = child.stdout.take().context("cargo has no output")?;
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        if let Some(results) = line.strip_prefix("test result: ") {
            add(&mut counts, results);
        }
    }
    let status = child.wait()?;
    if !status.success() && counts.failed == 0 {
        bail!("the tests do not build, or a test program crashed ({status})");
    }
    Ok(counts)
}

/// `ok. 3 passed; 0 failed; 1 ignored; ...`
fn add(counts: &mut Counts, results: &str) {
    for part in results.split(['.', ';']) {
        let Some((number, word)) = part.trim().split_once(' ') else {
            continue;
        };
        let Ok(number) = number.parse::<u64>() else {
            continue;
        };
        match word {
            "passed" => counts.passed += number,
            "failed" => counts.failed += number,
            "ignored" => counts.ignored += number,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_add_up() {
        let mut counts = Counts::default();
        add(
            &mut counts,
            "ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.50s",
        );
        add(
            &mut counts,
            "FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.50s",
        );
        assert_eq!((counts.passed, counts.failed, counts.ignored), (4, 2, 1));
    }
}
