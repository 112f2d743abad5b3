//! KVM: is it there, may we use it, is it complete, does it run a stock kernel's instructions.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::{Cap, Kvm};

use super::HostProblem;
use super::microguest::{self, FailedStep, Remains, Thoroughness};
use super::report::Finding;

const DEVICE: &str = "/dev/kvm";

/// What every machine needs of KVM; all of it is in Linux 4.12 and newer.
const CAPABILITIES: [(Cap, &str); 11] = [
    (Cap::UserMemory, "memory slots (KVM_CAP_USER_MEMORY)"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "CPUID control (KVM_CAP_EXT_CPUID)"),
    (Cap::Irqchip, "in-kernel interrupt controllers (KVM_CAP_IRQCHIP)"),
    (Cap::Pit2, "in-kernel timer (KVM_CAP_PIT2)"),
    (Cap::Irqfd, "interrupts by eventfd (KVM_CAP_IRQFD)"),
    (Cap::Ioeventfd, "doorbells by eventfd (KVM_CAP_IOEVENTFD)"),
    (Cap::IrqRouting, "interrupt routing (KVM_CAP_IRQ_ROUTING)"),
    (
        Cap::SignalMsi,
        "message-signalled interrupts (KVM_CAP_SIGNAL_MSI)",
    ),
    (
        Cap::TscDeadlineTimer,
        "TSC deadline timer (KVM_CAP_TSC_DEADLINE_TIMER)",
    ),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

const GET_HARDWARE: &str = "use a machine with VT-x or AMD-V, enabled in its firmware; in a virtual machine, let its host \
                            enable nested virtualisation; `cargo xtask demo` runs guests in a software-emulated lab meanwhile";

/// Whether a stock kernel can boot here. The micro-guest that proves it is gone when the answer is dropped, which may wait
/// some milliseconds for that.
///
/// # Errors
/// Why not, with the remedy.
pub fn can_boot_stock_kernel() -> Result<Remains, HostProblem> {
    let kvm = open(Path::new(DEVICE))?;
    check_interface(&kvm)?;
    let mut verdict = microguest::check(kvm, Thoroughness::FirstFailure)?;
    match verdict.failed.pop() {
        None => Ok(verdict.remains),
        Some(FailedStep {
            instructions,
            failure,
        }) => Err(HostProblem::Instruction {
            step: instructions,
            failure,
            remedy: GET_HARDWARE,
        }),
    }
}

fn open(path: &Path) -> Result<Kvm, HostProblem> {
    match OpenOptions::new().read(true).write(true).open(path) {
        // SAFETY: the descriptor is open, is that of the KVM device, and is handed over.
        Ok(file) => Ok(unsafe { into_kvm(file.into()) }),
        Err(error) => Err(match error.kind() {
            io::ErrorKind::NotFound => HostProblem::NoKvm {
                path: path.to_owned(),
                remedy: missing_remedy(),
            },
            io::ErrorKind::PermissionDenied => HostProblem::NoPermission {
                path: path.to_owned(),
                remedy: permission_remedy(),
            },
            // ENXIO, ENODEV: the node is there, its driver is not.
            _ if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => HostProblem::NoKvm {
                path: path.to_owned(),
                remedy: missing_remedy(),
            },
            _ => HostProblem::System {
                action: "open /dev/kvm",
                source: error,
            },
        }),
    }
}

/// # Safety
/// `device` is an open descriptor of /dev/kvm.
unsafe fn into_kvm(device: OwnedFd) -> Kvm {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: as the caller promises; the descriptor is owned by nobody else.
    unsafe { Kvm::from_raw_fd(device.into_raw_fd()) }
}

fn missing_remedy() -> &'static str {
    match cpu_flags() {
        Some(flags) if flags.contains(" vmx") => "load its driver: `modprobe kvm_intel` as root",
        Some(flags) if flags.contains(" svm") => "load its driver: `modprobe kvm_amd` as root",
        _ => GET_HARDWARE,
    }
}

fn permission_remedy() -> String {
    let user = std::env::var("USER").unwrap_or_else(|_| "$USER".to_owned());
    format!("join the group that may: `sudo adduser {user} kvm`, then log in again")
}

fn check_interface(kvm: &Kvm) -> Result<(), HostProblem> {
    let expected = i32::try_from(KVM_API_VERSION).unwrap_or(i32::MAX);
    let found = kvm.get_api_version();
    if found != expected {
        return Err(HostProblem::ApiVersion { found, expected });
    }
    let missing: Vec<&str> = CAPABILITIES
        .into_iter()
        .filter(|(cap, _)| !kvm.check_extension(*cap))
        .map(|(_, name)| name)
        .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(HostProblem::MissingCapabilities(missing))
    }
}

/// The flags of the first processor, with a blank before each.
fn cpu_flags() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    info.lines()
        .find(|line| line.starts_with("flags"))
        .map(ToOwned::to_owned)
}

/// All findings on KVM.
pub(super) fn examine() -> Vec<Finding> {
    let mut findings = vec![processor()];
    let kvm = match open(Path::new(DEVICE)) {
        Ok(kvm) => kvm,
        Err(problem) => {
            findings.push(failed("KVM", &problem));
            return findings;
        }
    };
    match check_interface(&kvm) {
        Ok(()) => findings.push(Finding::ok(
            "KVM",
            format!(
                "{DEVICE} usable, API {KVM_API_VERSION}, all {} capabilities, up to {} vCPUs",
                CAPABILITIES.len(),
                kvm.get_max_vcpus()
            ),
        )),
        Err(problem) => findings.push(failed("KVM", &problem)),
    }
    match microguest::check(kvm, Thoroughness::All).map(|verdict| verdict.failed) {
        Ok(steps) if steps.is_empty() => {
            findings.push(Finding::ok(
                "stock kernels",
                "the micro-guest ran every kind of instruction they need",
            ));
        }
        Ok(steps) => {
            let lines = steps
                .iter()
                .map(|step| format!("{}: {}", step.instructions, step.failure));
            findings.extend(lines.map(|line| Finding::fail("stock kernels", line, "")));
            // One remedy for all of them.
            if let Some(last) = findings.last_mut() {
                last.remedy = Some(GET_HARDWARE.to_owned());
            }
        }
        Err(problem) => findings.push(failed("stock kernels", &problem)),
    }
    findings
}

/// A problem whose message already has the remedy after the last semicolon.
fn failed(topic: &'static str, problem: &HostProblem) -> Finding {
    let mut text = problem.to_string();
    if let Some(source) = std::error::Error::source(problem) {
        text = format!("{text}: {source}");
    }
    match text.rsplit_once("; ") {
        Some((detail, remedy)) => Finding::fail(topic, detail, remedy),
        None => Finding::fail(topic, text, "look into the kernel's log (`dmesg`)"),
    }
}

fn processor() -> Finding {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name))?;
        line.split_once(':').map(|(_, value)| value.trim().to_owned())
    };
    let model = field("model name")
        .or_else(|| field("vendor_id"))
        .unwrap_or_else(|| "unknown processor".to_owned());
    let flags = cpu_flags().unwrap_or_default();
    let flags: Vec<&str> = flags.split_whitespace().collect();
    let nested = if flags.contains(&"hypervisor") {
        ", itself in a virtual machine"
    } else {
        ""
    };
    let extension = match (flags.contains(&"vmx"), flags.contains(&"svm")) {
        (true, _) => "VT-x",
        (_, true) => "AMD-V",
        _ => {
            return Finding::warn(
                "processor",
                format!("{model}{nested}: no VT-x and no AMD-V is to be seen"),
                "without them KVM is a software emulation at best; see below what it can do",
            );
        }
    };
    Finding::ok("processor", format!("{model} with {extension}{nested}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_told_with_a_remedy() {
        let problem = open(Path::new("/dev/no-kvm")).unwrap_err();
        let text = problem.to_string();
        assert!(text.starts_with("this host has no /dev/no-kvm; "), "{text}");
    }

    #[test]
    fn a_problem_becomes_detail_and_remedy() {
        let problem = HostProblem::ApiVersion {
            found: 11,
            expected: 12,
        };
        let finding = failed("KVM", &problem);
        assert_eq!(finding.detail, "KVM has API version 11, 12 is needed");
        assert_eq!(
            finding.remedy.as_deref(),
            Some("use a kernel that is not older than Linux 5.10")
        );
    }

    /// Either KVM is complete, or the micro-guest names what it lacks; never a hang, never a crash.
    #[test]
    fn the_micro_guest_gives_a_verdict_on_this_host() {
        if open(Path::new(DEVICE)).is_err() {
            eprintln!("no /dev/kvm here");
            return;
        }
        let check = |thoroughness| {
            let kvm = open(Path::new(DEVICE)).unwrap();
            microguest::check(kvm, thoroughness).unwrap().failed
        };
        let started = std::time::Instant::now();
        let failed = check(Thoroughness::All);
        eprintln!("{:?}: {failed:#?}", started.elapsed());
        let first = check(Thoroughness::FirstFailure);
        assert_eq!(first.first(), failed.first());
        let software = Path::new("/sys/module/kvm_pvm").exists();
        assert_eq!(failed.is_empty(), !software, "only the software KVM fails");
        if software {
            let int3 = failed.iter().find(|step| step.instructions == "int3 and iretq");
            assert!(matches!(
                int3.map(|step| &step.failure),
                Some(microguest::Failure::Emulation { suberror: 1, .. })
            ));
        }
    }
}
