//! What the lab host's kernel tells of a virtual machine's process.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use rustix::time::{ClockId, clock_gettime};

/// VM exits since the machine was made (KVM's files in debugfs, one folder per machine).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) all: u64,
    pub(super) pio: u64,
    pub(super) mmio: u64,
    /// The guest had nothing to do.
    pub(super) halt: u64,
    /// An interrupt of the host.
    pub(super) interrupt: u64,
    /// The guest could take an interrupt now.
    pub(super) window: u64,
}

impl Counts {
    /// Those of the machine of a process.
    pub(super) fn of_process(process: i32) -> Result<Self> {
        let prefix = format!("{process}-");
        let folder = fs::read_dir("/sys/kernel/debug/kvm")?
            .filter_map(Result::ok)
            .find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .with_context(|| format!("KVM has no machine of process {process}"))?
            .path();
        let read = |name: &str| -> Result<u64> { Ok(fs::read_to_string(folder.join(name))?.trim().parse()?) };
        Ok(Self {
            all: read("exits")?,
            pio: read("io_exits")?,
            mmio: read("mmio_exits")?,
            halt: read("halt_exits")?,
            interrupt: read("irq_exits")?,
            window: read("irq_window_exits")?,
        })
    }

    /// Those after `before`.
    pub(super) fn since(self, before: Self) -> Self {
        Self {
            all: self.all.saturating_sub(before.all),
            pio: self.pio.saturating_sub(before.pio),
            mmio: self.mmio.saturating_sub(before.mmio),
            halt: self.halt.saturating_sub(before.halt),
            interrupt: self.interrupt.saturating_sub(before.interrupt),
            window: self.window.saturating_sub(before.window),
        }
    }
}

/// Watches for the moment at which a processor of a guest runs for the first time: until then the time is the VMM's, from then
/// on it is the guest's. Micro-guests that only examine the host run in threads with other names.
pub(super) struct FirstEntry {
    begin: f64,
}

const TRACING: &str = "/sys/kernel/tracing";
const ENTRY: &str = "events/kvm/kvm_entry";

impl FirstEntry {
    /// From now on.
    pub(super) fn watch() -> Result<Self> {
        let set = |file: &str, value: &str| {
            let path = Path::new(TRACING).join(file);
            fs::write(&path, value).with_context(|| format!("cannot write to {}", path.display()))
        };
        set("trace_clock", "mono")?;
        // What came first is kept, and what follows costs nothing.
        set("options/overwrite", "0")?;
        set("buffer_size_kb", "64")?;
        set(
            &format!("{ENTRY}/filter"),
            "common_pid != 0 && (comm ~ \"vcpu*\" || comm ~ \"CPU *\")",
        )?;
        set(&format!("{ENTRY}/enable"), "1")?;
        set("trace", "")?;
        let now = clock_gettime(ClockId::Monotonic);
        #[expect(clippy::cast_precision_loss, reason = "seconds since the host's start")]
        let begin = now.tv_sec as f64 + now.tv_nsec as f64 / 1e9;
        Ok(Self { begin })
    }

    /// Seconds from then to the first entry, which must have been.
    pub(super) fn seconds(self) -> Result<f64> {
        let tracing = Path::new(TRACING);
        let trace = fs::read_to_string(tracing.join("trace"))?;
        fs::write(tracing.join(ENTRY).join("enable"), "0")?;
        //   vcpu0-162     [000] d..1.    63.713535: kvm_entry: vcpu 0, rip 0x100200
        let time = trace
            .lines()
            .find_map(|line| line.split_once(": kvm_entry:")?.0.rsplit_once(' '))
            .context("the trace has no entry into a guest")?;
        Ok(time.1.parse::<f64>()? - self.begin)
    }
}

/// The numbers and names of a process's threads.
pub(super) fn threads(process: i32) -> Result<Vec<(String, String)>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{process}/task"))? {
        let path = entry?.path();
        let number = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        threads.push((number, fs::read_to_string(path.join("comm"))?.trim().to_owned()));
    }
    Ok(threads)
}

/// How often the threads of a process that are no processors have gone to sleep, and so been woken.
pub(super) fn wakes(process: i32) -> Result<u64> {
    let mut sum = 0;
    for (number, name) in threads(process)? {
        if name.contains("vcpu") || name.starts_with("CPU ") {
            continue;
        }
        let status = fs::read_to_string(format!("/proc/{process}/task/{number}/status"))?;
        sum += value(&status, "voluntary_ctxt_switches:");
    }
    Ok(sum)
}

/// Memory that only this process uses, in KiB, without the guest's: that is every mapping of a quarter of its size or more.
pub(super) fn private_kib(process: i32, guest_mib: u64) -> Result<u64> {
    let smaps = fs::read_to_string(format!("/proc/{process}/smaps"))?;
    let (mut sum, mut guest) = (0, false);
    for line in smaps.lines() {
        let word = line.split_whitespace().next().unwrap_or_default();
        if let Some(size) = mapping_size(word) {
            guest = size >= (guest_mib << 20) / 4;
        } else if !guest && matches!(word, "Private_Clean:" | "Private_Dirty:") {
            sum += value(line, word);
        }
    }
    Ok(sum)
}

/// The size of a mapping from the first word of its first line, `BEGIN-END`.
fn mapping_size(word: &str) -> Option<u64> {
    let (begin, end) = word.split_once('-')?;
    Some(
        u64::from_str_radix(end, 16)
            .ok()?
            .saturating_sub(u64::from_str_radix(begin, 16).ok()?),
    )
}

/// The number behind a name in a text of lines `NAME NUMBER ...`.
fn value(text: &str, name: &str) -> u64 {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(name));
    lines
        .next()
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|word| word.parse().ok())
        .unwrap_or(0)
}
