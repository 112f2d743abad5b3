//! How a machine ends, and how it goes on: power-off, the power button, reboots, crashes; and what the exit status tells.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use stories::{Disk, Host, Vm, story};

/// Longest time for a machine to go once it was told to.
const END: Duration = Duration::from_secs(30);

/// A guest that shuts down when its power button is pressed, as BusyBox's acpid does it.
fn with_acpid(host: &Host) -> anyhow::Result<Vm> {
    let mut vm = host
        .vm("acpid")
        .file(
            "etc/acpi/PWRF/00000080",
            0o755,
            "#!/bin/sh\necho guest: bye > /dev/console\npoweroff -f\n",
        )
        .interactive()?;
    vm.guest("modprobe evdev; acpid -f -l /tmp/log & until ls -l /proc/$!/fd | grep -q event0; do usleep 20000; done")?;
    Ok(vm)
}

/// A guest that does not care for its power button.
fn deaf(host: &Host, power: &str) -> anyhow::Result<Vm> {
    let vm = host
        .vm("deaf")
        .script("sleep 1000")
        .toml(&format!("[power]\n{power}\n"))
        .start()?;
    vm.wait_for("guest: story")?;
    Ok(vm)
}

#[test]
fn sigterm_and_the_management_socket_press_the_power_button() {
    story(|host| {
        let vm = with_acpid(host)?;
        vm.signal(Signal::TERM)?;
        vm.wait_for("guest: bye")?;
        let guest = vm.wait(END)?;
        assert_eq!(guest.exit_code(), Some(0), "{}", guest.log);
        assert!(
            guest.log.contains("SIGTERM: the guest was asked to shut down"),
            "{}",
            guest.log
        );

        let vm = with_acpid(host)?;
        let events = vm.events()?;
        vm.manage(&["power-button"])?;
        events.wait_for("power button pressed")?;
        let guest = vm.wait(END)?;
        assert_eq!(guest.exit_code(), Some(0), "{}", guest.log);
        events.wait_for("the guest powered off")?;
        Ok(())
    });
}

#[test]
fn a_guest_that_ignores_the_power_button_is_stopped_hard_by_a_second_signal_or_in_time() {
    story(|host| {
        let mut vm = deaf(host, "")?;
        vm.signal(Signal::TERM)?;
        std::thread::sleep(Duration::from_millis(500));
        assert!(!vm.has_ended()?, "one signal only asks");
        vm.signal(Signal::INT)?;
        let guest = vm.wait(END)?;
        assert_eq!(guest.exit_code(), Some(4), "{}", guest.log);
        assert!(guest.log.contains("second signal"), "{}", guest.log);

        let vm = deaf(host, "shutdown-timeout = \"2s\"")?;
        let begin = Instant::now();
        vm.signal(Signal::TERM)?;
        let guest = vm.wait(END)?;
        assert_eq!(guest.exit_code(), Some(4), "{}", guest.log);
        assert!(
            guest.log.contains("did not shut down within 2 seconds"),
            "{}",
            guest.log
        );
        assert!(begin.elapsed() >= Duration::from_secs(2), "{:?}", begin.elapsed());
        Ok(())
    });
}

#[test]
fn a_guest_reboots_in_the_same_process_and_finds_its_disks_also_one_attached_meanwhile() {
    story(|host| {
        let root = host.image("root", 1)?;
        host.image("late", 8)?;
        let mut vm = host.vm("again").disk(Disk::new(&root)).interactive()?;
        let events = vm.events()?;
        vm.manage(&["attach-disk", "../late", "--id", "late"])?;
        events.wait_for("late in use by the guest")?;
        vm.guest("echo first > /dev/vda && echo second > /dev/vdb && sync")?;

        // By ACPI's reset register, as it is the default.
        vm.type_text("reboot -f\n")?;
        vm.wait_until_ready()?;
        events.wait_for("reset (guest")?;
        let found = vm.guest("head -n1 /dev/vda; head -n1 /dev/vdb; cat /sys/block/vdb/serial")?;
        assert_eq!(found, "first\nsecond\nlate");
        vm.manage(&["detach", "late"])?;
        events.wait_for("late removed")?;

        // By the keyboard controller.
        vm.guest("echo kbd > /sys/kernel/reboot/type")?;
        vm.type_text("reboot -f\n")?;
        vm.wait_until_ready()?;
        assert_eq!(
            vm.guest("head -n1 /dev/vda; ls /sys/block | grep -c vd")?,
            "first\n1\n"
        );

        // By the administrator.
        vm.manage(&["reset"])?;
        vm.wait_until_ready()?;
        let status = vm.manage(&["status"])?;
        assert!(status.contains("3 resets"), "{status}");
        let guest = vm.finish()?;
        assert_eq!(guest.console.matches("guest: init at").count(), 4);
        Ok(())
    });
}

#[test]
fn on_reboot_stop_ends_the_process_with_success() {
    story(|host| {
        let guest = host
            .vm("once")
            .script("reboot -f")
            .toml("[power]\non-reboot = \"stop\"")
            .run()?;
        assert_eq!(guest.exit_code(), Some(0), "{}", guest.log);
        assert_eq!(guest.console.matches("guest: init at").count(), 1);
        assert!(
            guest.log.contains("the guest asked for a reboot"),
            "{}",
            guest.log
        );
        Ok(())
    });
}

#[test]
fn a_triple_fault_is_a_crash_and_may_mean_a_reboot() {
    story(|host| {
        let triple_fault = "echo triple > /sys/kernel/reboot/type; reboot -f";
        let guest = host.vm("triple").script(triple_fault).run()?;
        assert_eq!(guest.exit_code(), Some(3), "{}", guest.log);
        assert!(guest.log.contains("triple fault"), "{}", guest.log);

        let counter = host.image("counter", 1)?;
        let guest = host
            .vm("revived")
            .disk(Disk::new(counter))
            .script(&format!(
                "grep -q crashed /dev/vda && exit 0; echo crashed > /dev/vda; sync; {triple_fault}"
            ))
            .toml("[power]\non-crash = \"reboot\"")
            .run()?
            .success()?;
        assert_eq!(guest.console.matches("guest: init at").count(), 2);
        Ok(())
    });
}

#[test]
fn a_kernel_panic_is_a_crash() {
    story(|host| {
        // Whatever the kernel would do after a panic: its driver, which udev loads in a full system, tells the VMM first.
        for panic in ["panic=-1", "panic=0"] {
            let guest = host
                .vm("panic")
                .also_on_command_line(panic)
                .script("modprobe pvpanic-mmio; echo c > /proc/sysrq-trigger")
                .run()?;
            assert_eq!(guest.exit_code(), Some(3), "{panic}: {}", guest.log);
            assert!(guest.log.contains("kernel panic"), "{}", guest.log);
        }
        Ok(())
    });
}
