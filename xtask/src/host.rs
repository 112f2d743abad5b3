//! This machine: progress lines and running its programs.

use std::io::Write as _;
use std::sync::OnceLock;
use std::time::Instant;

/// Says what happens now, with the time since the start.
pub(crate) fn step(what: &str) {
    static BEGIN: OnceLock<Instant> = OnceLock::new();
    let elapsed = BEGIN.get_or_init(Instant::now).elapsed().as_secs_f64();
    eprintln!("[{elapsed:7.1} s] {what}");
}

/// Passes output on as it comes.
pub(crate) fn show(bytes: &[u8]) {
    let mut out = std::io::stdout();
    // Nobody reads: nothing to do about it.
    drop(out.write_all(bytes).and_then(|()| out.flush()));
}

/// Whether a program is on the search path.
pub(crate) fn has(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(program).exists()))
}
