//! Where a story is told: here, or in the lab by the same test program.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::host::Place;
use crate::watchdog::{self, Watchdog};
use crate::{Host, Story};

/// Set for the test program in the lab.
const INSIDE: &str = "SMSVMM_STORY_INSIDE";

/// The static build, beside the test program in the lab.
const STATIC_PROGRAM: &str = "smsvmm-static";

/// A program for guests, beside the test program in the lab.
pub(crate) const GUEST_PROGRAM: &str = "fs-load";

/// The agent for guests, beside the test program in the lab.
pub(crate) const AGENT: &str = "sms-agent";

/// The disk with tools for guests as the lab host sees it: its first extra one.
const TOOLS_IN_LAB: &str = "/dev/vdd";

/// What the environment asks for, before looking at KVM.
const PLACE: &str = "SMSVMM_STORIES";

/// How much longer than its story a lab may take: the [`Watchdog`] in it speaks first.
const PATIENCE_WITH_WATCHDOG: Duration = Duration::from_secs(40);

/// Variables that reach the test program in the lab.
const PASSED_ON: [&str; 3] = ["SMSVMM_VMM", "SMSVMM_CAMPAIGN", "RUST_LOG"];

/// The name that the test runner knows a test by: that of its thread. When tests run on the main thread (one at a time), the
/// type of a closure in the test tells: `crate::module::test::{{closure}}`.
pub(crate) fn test_name<F>() -> String {
    if let Some(name) = std::thread::current().name().filter(|name| *name != "main") {
        return name.to_owned();
    }
    name_by_type::<F>()
}

fn name_by_type<F>() -> String {
    let path = std::any::type_name::<F>();
    let path = path.split("::{{closure}}").next().unwrap_or(path);
    path.split_once("::").map_or(path, |(_, rest)| rest).to_owned()
}

/// Tells a story in the right place.
pub(crate) fn tell(needs: &Story, name: &str, story: impl FnOnce(&Host) -> Result<()>) -> Result<()> {
    if std::env::var_os(INSIDE).is_some() {
        let test = std::env::current_exe()?;
        let host = Host::new(Place {
            images: PathBuf::from("/images"),
            program: program()?,
            static_program: test.with_file_name(STATIC_PROGRAM),
            guest_program: test.with_file_name(GUEST_PROGRAM),
            agent: test.with_file_name(AGENT),
            guest_tools: PathBuf::from(TOOLS_IN_LAB),
        })?;
        let _watchdog = Watchdog::start(needs.limit, host.folder());
        return story(&host);
    }
    if !needs.changes_the_host && kvm_is_good() {
        let cache = lab::Cache::locate();
        let host = Host::new(Place {
            images: cache.image("lab-images")?.join("links"),
            program: program()?,
            static_program: static_file("smsvmm", needs.static_program)?,
            guest_program: static_file(GUEST_PROGRAM, needs.guest_tools)?,
            agent: static_file(AGENT, needs.agent)?,
            guest_tools: cache.path("current/guest-tools/tools.ext4"),
        })?;
        let _watchdog = Watchdog::start(needs.limit, host.folder());
        return story(&host);
    }
    match in_lab(needs, name) {
        Err(error) if error.is::<LabStoodStill>() => {
            println!("{name}: {error:?}\n{name}: told once more, in another lab");
            in_lab(needs, name)
        }
        result => result,
    }
}

/// The emulated host did nothing any more: not even the story's watchdog spoke. That is not the story's fault.
#[derive(Debug, thiserror::Error)]
#[error("the lab stood still")]
struct LabStoodStill;

/// Runs this test program for one test in a lab host.
///
/// # Errors
/// The story failed; [`LabStoodStill`] if the lab did.
fn in_lab(needs: &Story, name: &str) -> Result<()> {
    let begin = Instant::now();
    let temporary = lab::Cache::locate().path("tmp");
    fs::create_dir_all(&temporary)?;
    let folder = tempfile::Builder::new().prefix("story.").tempdir_in(&temporary)?;
    place(&std::env::current_exe()?, &folder.path().join("test"))?;
    let program = program()?;
    if program.exists() {
        place(&program, &folder.path().join("smsvmm"))?;
    }
    if needs.static_program {
        let program = static_file("smsvmm", true)?;
        place(&program, &folder.path().join(STATIC_PROGRAM))?;
    }
    if needs.agent {
        place(&static_file(AGENT, true)?, &folder.path().join(AGENT))?;
    }
    let mut lab = needs.lab.clone().share(folder.path());
    if needs.guest_tools {
        let program = static_file(GUEST_PROGRAM, true)?;
        place(&program, &folder.path().join(GUEST_PROGRAM))?;
        lab = lab.disk(lab::Cache::locate().image("guest-tools")?.join("tools.ext4"));
    }
    let mut lab = lab.start().map_err(|error| match error.is::<lab::Overdue>() {
        true => error.context(LabStoodStill),
        false => error,
    })?;
    let mut variables = format!("{INSIDE}=1 SMSVMM_BIN=$PWD/smsvmm RUST_BACKTRACE=0");
    for variable in PASSED_ON {
        if let Ok(value) = std::env::var(variable) {
            variables.push_str(&format!(" {variable}={}", lab::quote(Path::new(&value))));
        }
    }
    let command = format!("{variables} ./test --exact {name} --nocapture --include-ignored --test-threads=1");
    let mut said = Vec::new();
    let limit = needs.limit + PATIENCE_WITH_WATCHDOG;
    let result = lab.run_streaming(&command, limit, |bytes| said.extend_from_slice(bytes));
    let said = String::from_utf8_lossy(&said).into_owned();
    keep_log(name, &said);
    println!(
        "{}\n({name}: {:.1} s with the lab)",
        indented(&said),
        begin.elapsed().as_secs_f64()
    );
    match result {
        Ok(0) if said.contains("1 passed") => Ok(()),
        Ok(0) => bail!("the test program in the lab ran no test of this name"),
        Ok(status) => bail!("it failed in the lab (exit status {status}); its output is above"),
        Err(error) if !said.contains(watchdog::COMPLAINT) && error.is::<lab::Overdue>() => {
            Err(error.context(LabStoodStill))
        }
        Err(error) => Err(error.context("its output until then is above")),
    }
}

/// A test program's output so that nobody who reads this one's takes it for its own: both say "test result".
fn indented(said: &str) -> String {
    said.lines().map(|line| format!("    {line}\n")).collect()
}

/// The program under test.
///
/// # Errors
/// This test program is in no target folder.
pub fn program() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("SMSVMM_BIN") {
        return Ok(PathBuf::from(path));
    }
    // target/debug/deps/story-0123 -> target/debug/smsvmm
    let test = std::env::current_exe()?;
    let folder = test
        .ancestors()
        .nth(2)
        .context("the test program is in no target folder")?;
    Ok(folder.join("smsvmm"))
}

/// Has smsvmm do something in `folder`; the arguments have no spaces within.
///
/// # Errors
/// It fails.
pub fn run_program(folder: &Path, arguments: &str) -> Result<()> {
    let mut command = Command::new(program()?);
    let output = command.args(arguments.split(' ')).current_dir(folder).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "smsvmm {arguments}: {said}");
    Ok(())
}

/// A program in `target/static`, which must be there if the story needs it.
pub(crate) fn static_file(name: &str, needed: bool) -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    // target/debug/deps/story-0123 -> target/static/smsvmm
    let target = test
        .ancestors()
        .nth(3)
        .context("the test program is in no target folder")?;
    let program = target.join("static").join(name);
    if needed && !program.exists() {
        bail!("there is no {}; `cargo xtask static` makes it", program.display());
    }
    Ok(program)
}

/// Whether virtual machines with stock kernels can run on this machine; asked once.
fn kvm_is_good() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| match std::env::var(PLACE).as_deref() {
        Ok("here") => true,
        Ok("lab") => false,
        _ => program().is_ok_and(|program| {
            Command::new(program)
                .args(["host", "check", "--json"])
                .output()
                .is_ok_and(|output| output.status.success())
        }),
    })
}

/// A file under another name: linked where possible, else copied.
fn place(from: &Path, to: &Path) -> Result<()> {
    if fs::hard_link(from, to).is_err() {
        fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    Ok(())
}

/// Keeps what a story said, for whoever looks into a failure: `target/.../stories/NAME.log`.
fn keep_log(name: &str, said: &str) {
    let Ok(test) = std::env::current_exe() else { return };
    let Some(target) = test.ancestors().nth(3) else {
        return;
    };
    let folder = target.join("stories");
    // Only a help for people; without it the test runner's output has the same.
    drop(fs::create_dir_all(&folder).and_then(|()| fs::write(folder.join(format!("{name}.log")), said)));
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_test_runners_name_of_a_test_is_found() {
        fn names_of<F: FnOnce()>(_: F) -> [String; 2] {
            [super::test_name::<F>(), super::name_by_type::<F>()]
        }
        let name = "place::tests::the_test_runners_name_of_a_test_is_found";
        assert_eq!(names_of(|| ()), [name, name]);
    }

    #[test]
    fn results_of_the_test_program_in_the_lab_are_not_taken_for_results_of_this_one() {
        let said = "running 1 test\r\ntest result: FAILED. 0 passed; 1 failed\r\n\ntest result: ok";
        let echoed = super::indented(said);
        assert_eq!(echoed.lines().count(), said.lines().count());
        assert!(!echoed.lines().any(|line| line.starts_with("test result")));
    }
}
