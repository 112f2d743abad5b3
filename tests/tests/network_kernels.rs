//! The network drivers of all kernels that a guest may have agree with our card.
//!
//! `SMSVMM_CAMPAIGN=N` makes it a campaign: N transfers each way with each kernel.

use std::time::Duration;

use stories::transfer::{download, make_data, upload};
use stories::{Kernel, Story};

#[test]
fn each_kernels_driver_sends_and_receives_over_a_tap_with_two_queues() {
    let rounds = stories::campaign().unwrap_or(1);
    let story = Story::default()
        .changes_the_host()
        .limit(Duration::from_secs(360 + 60 * u64::from(rounds)));
    story.tell(|host| {
        // The real one: BusyBox, which is `sh` in the lab, prefers its own, which knows no tap interfaces.
        host.sh(
            "/bin/ip tuntap add dev tap0 mode tap multi_queue; \
             /bin/ip address add 10.7.0.1/24 dev tap0; /bin/ip link set tap0 up",
        )?;
        for kernel in Kernel::ALL.into_iter().filter(|kernel| host.has(*kernel)) {
            let mut vm = host
                .vm(kernel.name())
                .kernel(kernel)
                .cpus(2)
                .limit(Duration::from_secs(120 + 20 * u64::from(rounds)))
                .toml("[[net]]\nbackend = \"tap\"\ntap = \"tap0\"\nqueues = 2")
                .interactive()?;
            vm.guest("dmesg -c > /dev/null; ip address add 10.7.0.2/24 dev eth0 && ip link set eth0 up && ping -c 1 -w 10 10.7.0.1")?;
            make_data(host, &mut vm)?;
            for _ in 0..rounds {
                upload(host, &mut vm, "10.7.0.1")?;
                download(host, &mut vm, "10.7.0.1")?;
            }
            let features = vm.guest("cat /sys/class/net/eth0/device/features")?;
            println!("{}: {}", kernel.name(), features.trim());
            assert_eq!(vm.kernel_warnings()?, "", "{}", kernel.name());
            vm.finish()?;
        }
        Ok(())
    });
}
