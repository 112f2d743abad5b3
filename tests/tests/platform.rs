//! The machine as each stock kernel sees it: PCI devices, ACPI tables, processors, and a kernel log without complaints.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use stories::{Disk, Host, Kernel, story};

/// A lab on a busy machine is slow.
const LIMIT: Duration = Duration::from_secs(220);

/// What a guest tells of its machine, on its second console, which is quicker than the serial one.
const LOOK: &str = "
    exec > /dev/hvc0
    stty raw -echo < /dev/hvc0
    echo '== lspci'; lspci -vv -nn 2> /tmp/errors
    for table in APIC DSDT FACP MCFG; do echo \"== $table\"; xxd -p /sys/firmware/acpi/tables/$table; done
    echo '== tables'; ls -p /sys/firmware/acpi/tables | grep -v /
    echo '== log'; dmesg -r
    echo '== end'
";

/// The tables of this machine: two processors, 256 MiB (vmm/tests/acpi.rs has it too).
const TABLES: [(&str, &[u8]); 4] = [
    ("APIC", include_bytes!("../../vmm/tests/golden/story-apic.aml")),
    ("DSDT", include_bytes!("../../vmm/tests/golden/story-dsdt.aml")),
    ("FACP", include_bytes!("../../vmm/tests/golden/story-facp.aml")),
    ("MCFG", include_bytes!("../../vmm/tests/golden/story-mcfg.aml")),
];

/// Warnings in the kernel's log that are no fault of the machine, and why.
const EXCEPTIONS: [(&str, &str); 4] = [
    (
        "Speculative Return Stack Overflow: IBPB-extending microcode not applied!",
        "the host's processor has no such microcode; the lab's emulated one never has",
    ),
    (
        "admin-guide/hw-vuln/",
        "what Linux thinks of a vulnerability of the host's processor",
    ),
    (
        "hrtimer: interrupt took",
        "the host was busy while the guest handled a timer",
    ),
    (
        "amd_pstate: the _CPC object is not present",
        "a virtual processor's frequency is not the guest's to control",
    ),
];

/// The part of `text` behind the line `== name`.
fn section<'a>(text: &'a str, name: &str) -> Result<&'a str> {
    let head = format!("== {name}\n");
    let (_, rest) = text
        .split_once(&head)
        .with_context(|| format!("no {name} in: {text}"))?;
    Ok(rest.split_once("== ").map_or(rest, |(part, _)| part))
}

fn bytes_of(hexadecimal: &str) -> Result<Vec<u8>> {
    let digits: Vec<u8> = hexadecimal.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| Ok(u8::from_str_radix(std::str::from_utf8(pair)?, 16)?))
        .collect()
}

/// Messages of levels 0 to 4 (emergency to warning) that are not among the exceptions; a trace counts as its lines.
fn complaints(log: &str) -> Vec<&str> {
    let serious = |line: &&str| matches!(line.as_bytes(), [b'<', b'0'..=b'4', b'>', ..]);
    let excused = |line: &str| EXCEPTIONS.iter().any(|(text, _)| line.contains(text));
    log.lines()
        .filter(serious)
        .filter(|line| !excused(line))
        .collect()
}

/// ACPICA takes the tables apart without a complaint, where it is installed: in the lab it is.
fn disassemble(host: &Host) -> Result<()> {
    let said = host.sh("if ! command -v iasl > /dev/null; then echo no iasl; exit; fi; iasl -d *.aml")?;
    for word in ["Warning", "Error", "Invalid", "unresolved", "**"] {
        ensure!(!said.contains(word), "iasl: {said}");
    }
    Ok(())
}

/// Boots one kernel on a machine with a device of each kind; a kernel that could not be had is left out.
fn finds_its_machine(kernel: Kernel) {
    story(|host| {
        if !host.has(kernel) {
            println!("there is no {}", kernel.name());
            return Ok(());
        }
        let guest = host
            .vm("all")
            .kernel(kernel)
            .tools()
            .cpus(2)
            .disk(Disk::new(host.image("disk", 4)?))
            .toml("[console]\nvirtio = \"file:hvc\"\n[[net]]\nbackend = \"user\"")
            .script(LOOK)
            .limit(LIMIT)
            .run()?
            .success()?;
        let told = std::fs::read_to_string(host.folder().join("all/hvc"))?;
        section(&told, "end").with_context(|| guest.console.clone())?;

        let devices = section(&told, "lspci")?;
        ensure!(
            devices == include_str!("golden/lspci.txt"),
            "lspci -vv:\n{devices}"
        );

        assert_eq!(section(&told, "tables")?, "APIC\nDSDT\nFACP\nMCFG\n");
        for (name, golden) in TABLES {
            let table = bytes_of(section(&told, name)?)?;
            std::fs::write(host.folder().join(format!("{name}.aml")), &table)?;
            ensure!(table == golden, "{name} is not as in the golden file");
        }
        disassemble(host)?;

        let log = section(&told, "log")?;
        ensure!(log.contains("Linux version"), "this is no kernel log: {log}");
        let complaints = complaints(log);
        ensure!(
            complaints.is_empty(),
            "the kernel complains:\n{}",
            complaints.join("\n")
        );
        Ok(())
    });
}

#[test]
fn debian_12s_cloud_kernel_finds_its_machine_and_complains_of_nothing() {
    finds_its_machine(Kernel::Debian12Cloud);
}

#[test]
fn debian_12_finds_its_machine_and_complains_of_nothing() {
    finds_its_machine(Kernel::Debian12);
}

#[test]
fn debian_12_with_the_backported_kernel_finds_its_machine_and_complains_of_nothing() {
    finds_its_machine(Kernel::Debian12Backports);
}

#[test]
fn debian_11_finds_its_machine_and_complains_of_nothing() {
    finds_its_machine(Kernel::Debian11Cloud);
}

#[test]
fn debian_13_finds_its_machine_and_complains_of_nothing() {
    finds_its_machine(Kernel::Debian13Cloud);
}

/// An arrangement of processors.
#[derive(Clone, Copy)]
struct Shape {
    sockets: usize,
    cores: usize,
    threads: usize,
}

/// All processors from `first` on, `count` of them, as the kernel lists them.
fn list(first: usize, count: usize) -> String {
    match count {
        1 => first.to_string(),
        _ => format!("{first}-{}", first + count - 1),
    }
}

impl Shape {
    fn count(self) -> usize {
        self.sockets * self.cores * self.threads
    }

    /// What the guest's kernel should say of processor `cpu`, line by line.
    fn expected(self, cpu: usize) -> String {
        let of_package = self.cores * self.threads;
        let (package, core) = (cpu / of_package, cpu % of_package / self.threads);
        let siblings = list(cpu / self.threads * self.threads, self.threads);
        let neighbours = list(package * of_package, of_package);
        format!(
            "{cpu}: package {package} core {core} siblings {siblings} package-cpus {neighbours} L1 {siblings} L3 {neighbours} \
             cpuinfo {package} {of_package} {core} {}",
            self.cores
        )
    }
}

/// Boots with a shape and compares what the kernel makes of it.
fn is_seen_as(host: &Host, shape: Shape) -> Result<()> {
    let script = "
        cd /sys/devices/system/cpu
        for cpu in $(seq 0 $(($(nproc) - 1))); do
            t=cpu$cpu/topology
            # The third-level cache is the last index.
            for last in cpu$cpu/cache/index*; do :; done
            set -- $(awk -F: -v n=$cpu '/^processor/ {on = ($2 + 0 == n)} on && /^(physical id|siblings|core id|cpu cores)/ {print $2 + 0}' /proc/cpuinfo)
            echo \"$cpu: package $(cat $t/physical_package_id) core $(cat $t/core_id) siblings $(cat $t/thread_siblings_list)\" \\
                \"package-cpus $(cat $t/core_siblings_list) L1 $(cat cpu$cpu/cache/index0/shared_cpu_list)\" \\
                \"L3 $(cat $last/shared_cpu_list) cpuinfo $*\"
        done";
    let Shape {
        sockets,
        cores,
        threads,
    } = shape;
    let guest = host
        .vm(&format!("shape-{sockets}-{cores}-{threads}"))
        .cpus(u8::try_from(shape.count())?)
        .argument(&format!("--set=cpus.sockets={sockets}"))
        .argument(&format!("--set=cpus.cores={cores}"))
        .argument(&format!("--set=cpus.threads={threads}"))
        .script(script)
        .limit(LIMIT)
        .run()?
        .success()?;
    let expected: Vec<_> = (0..shape.count()).map(|cpu| shape.expected(cpu)).collect();
    let seen: Vec<_> = guest.script_output().lines().collect();
    if seen != expected {
        bail!("seen:\n{}\nexpected:\n{}", seen.join("\n"), expected.join("\n"));
    }
    Ok(())
}

#[test]
fn two_packages_of_two_cores_of_two_threads_are_seen_as_such() {
    story(|host| {
        is_seen_as(
            host,
            Shape {
                sockets: 2,
                cores: 2,
                threads: 2,
            },
        )
    });
}

#[test]
fn three_cores_of_two_threads_are_seen_as_such() {
    story(|host| {
        is_seen_as(
            host,
            Shape {
                sockets: 1,
                cores: 3,
                threads: 2,
            },
        )
    });
}
