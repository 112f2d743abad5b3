//! Stock kernels boot, see the machine that was described, and end as they should.

use stories::{Kernel, story};

#[test]
fn a_stock_kernel_runs_a_script_and_powers_off() {
    story(|host| {
        let guest = host.vm("hello").script("uname -r; exit 7").run()?;
        assert!(guest.script_output().contains("cloud-amd64"), "{}", guest.console);
        assert_eq!(guest.script_status(), Some(7));
        assert_eq!(guest.exit_code(), Some(0), "{}", guest.log);
        Ok(())
    });
}

#[test]
fn a_guest_sees_its_processors_and_memory() {
    story(|host| {
        let guest = host
            .vm("two")
            .cpus(2)
            .memory("512M")
            .script("nproc; grep MemTotal /proc/meminfo")
            .run()?
            .success()?;
        let words: Vec<&str> = guest.script_output().split_whitespace().collect();
        assert_eq!(words.first(), Some(&"2"));
        let kib: u64 = words.get(2).and_then(|word| word.parse().ok()).unwrap_or(0);
        assert!((440_000..524_288).contains(&kib), "{kib} KiB of 512 MiB");
        Ok(())
    });
}

/// Boots one kernel with several processors; a kernel that could not be had is left out.
fn boots(kernel: Kernel) {
    story(|host| {
        if !host.has(kernel) {
            println!("there is no {}", kernel.name());
            return Ok(());
        }
        for cpus in [1, 2, 4] {
            let guest = host
                .vm(&format!("cpus{cpus}"))
                .kernel(kernel)
                .cpus(cpus)
                .script("nproc")
                .run()?
                .success()?;
            assert_eq!(guest.script_output().trim(), cpus.to_string());
        }
        Ok(())
    });
}

#[test]
fn debian_12_boots() {
    boots(Kernel::Debian12);
}

#[test]
fn debian_12_with_the_backported_kernel_boots() {
    boots(Kernel::Debian12Backports);
}

#[test]
fn debian_11_boots() {
    boots(Kernel::Debian11Cloud);
}

#[test]
fn debian_13_boots() {
    boots(Kernel::Debian13Cloud);
}
