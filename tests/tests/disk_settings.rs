//! What vm.toml and an administrator set for disks, as a guest meets it: limits of the rate, disks that stop instead of failing, what
//! becomes of an undoable disk at power-off.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use stories::{Disk, Host, VmBuilder, story};

const DEVICES: &str = "d0.img,d1.img";

/// A pool with one volume, and a disk on it.
fn pool(host: &Host, volume: &str, disk: &str) -> Result<()> {
    for device in DEVICES.split(',') {
        host.image(device, 512)?;
    }
    host.administer(&format!("pool create tank {}", DEVICES.replace(',', " ")))?;
    host.administer(&format!("file --devices {DEVICES} format"))?;
    host.administer(&format!(
        "volume --devices {DEVICES} create data --layout concat --size {volume}"
    ))?;
    host.administer(&format!("file --devices {DEVICES} mkdir /vm"))?;
    host.administer(&format!(
        "disk --devices {DEVICES} create /vm/a.dsk --size {disk}"
    ))?;
    Ok(())
}

fn machine<'a>(host: &'a Host, name: &str, disk: Disk, more: &str) -> VmBuilder<'a> {
    let paths: Vec<String> = DEVICES
        .split(',')
        .map(|device| format!("{:?}", host.folder().join(device)))
        .collect();
    host.vm(name)
        .disk(disk)
        .toml(&format!("{more}\n[pool]\ndevices = [{}]\n", paths.join(", ")))
}

/// Asks a machine's socket as any program may.
fn ask(socket: &Path, path: &str, headers: &str) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n{headers}\r\n").as_bytes())?;
    Ok(stream)
}

/// What the disks, limited as they are, have done is in the metrics.
fn numbers_tell_of_it(socket: &Path) -> Result<()> {
    let mut text = String::new();
    ask(socket, "/metrics", "")?.read_to_string(&mut text)?;
    let number = |sample: &str| -> Result<f64> {
        let line = text.lines().find_map(|line| line.strip_prefix(sample));
        Ok(line
            .with_context(|| format!("no {sample} in {text}"))?
            .trim()
            .parse()?)
    };
    for device in ["disk0", "disk1", "late"] {
        let of = format!("vm=\"slow\",device=\"{device}\",queue=\"0\"");
        let reads = number(&format!("smsvmm_disk_requests_total{{{of},operation=\"read\"}}"))?;
        let bytes = number(&format!("smsvmm_disk_bytes_total{{{of},operation=\"read\"}}"))?;
        let waited = number(&format!("smsvmm_disk_request_seconds_sum{{{of}}}"))?;
        ensure!(
            reads >= 40.0 && bytes >= 163_840.0 && waited > 1.0,
            "{device}: {reads} reads, {bytes} bytes, {waited} s"
        );
        ensure!(
            number(&format!("smsvmm_disk_interrupts_total{{{of}}}"))? > 0.0,
            "{text}"
        );
    }
    ensure!(
        number("smsvmm_vm_state{vm=\"slow\",state=\"running\"}")? == 1.0,
        "{text}"
    );
    let volume = "smsvmm_volume_size_bytes{vm=\"slow\",pool=\"tank\",volume=\"data\"}";
    ensure!(number(volume)? == f64::from(256 << 20), "{text}");
    let mut ready = String::new();
    ask(socket, "/readyz", "")?.read_to_string(&mut ready)?;
    ensure!(ready.starts_with("HTTP/1.1 200"), "{ready}");
    Ok(())
}

#[test]
fn limits_hold_a_guest_back_and_are_changed_while_it_waits() {
    story(|host| {
        pool(host, "256M", "64M")?;
        let image = host.image("image", 64)?;
        let mut vm = machine(
            host,
            "slow",
            Disk::in_pool("/vm/a.dsk").set("limit-group", "\"bulk\""),
            "[limit-groups.bulk]\niops = 20\niops-burst = 1\n",
        )
        .disk(Disk::new(&image).set("limits", "{ bytes = \"64K\", bytes-burst = \"4K\" }"))
        .interactive()?;
        let status = vm.administer("vm status")?;
        assert!(
            status.contains("limits of bulk") && status.contains("64K/s (burst 4K)"),
            "{status}"
        );
        // 40 requests at 20 per second; 128 KiB at 64 KiB per second: two seconds each.
        for (disk, free) in [
            ("vda", "set-limits bulk --limit-iops 0"),
            ("vdb", "set-disk disk1 --limit-bytes 0"),
        ] {
            let read =
                format!("dd if=/dev/{disk} of=/dev/null bs=4k count=40 skip=100 iflag=direct 2> /dev/null");
            let begin = Instant::now();
            vm.guest(&read)?;
            let limited = begin.elapsed();
            assert!(limited > Duration::from_secs(1), "{disk}: {limited:?}");
            // A limit that is taken away counts for those that wait already: a minute's requests do not take one.
            vm.guest(&format!("dd if=/dev/{disk} of=/dev/null bs=4k count=2000 skip=200 iflag=direct 2> /dev/null & echo $! > /pid"))?;
            let begin = Instant::now();
            let told = vm.administer(&format!("vm {free}"))?;
            assert!(told.contains("no limit"), "{told}");
            vm.guest("while kill -0 $(cat /pid) 2> /dev/null; do usleep 50000; done")?;
            assert!(
                begin.elapsed() < Duration::from_secs(60),
                "{disk}: {:?}",
                begin.elapsed()
            );
        }
        let refused = vm
            .administer("vm set-limits other --limit-iops 5")
            .unwrap_err()
            .to_string();
        assert!(refused.contains("no limit group `other`"), "{refused}");
        // The pool has one worker; its disks poll each for themselves.
        let told = vm.administer("vm set-disk disk0 --poll-us 50")?;
        assert!(told.contains("polls for 50 us"), "{told}");
        vm.guest("dd if=/dev/vda of=/dev/null bs=4k count=40 iflag=direct 2> /dev/null")?;
        // So does one that comes later, with limits of its own.
        vm.administer("disk create /vm/late.dsk --size 16M")?;
        vm.administer(
            "vm attach-disk --file /vm/late.dsk --id late --limit-iops 20 --limit-iops-burst 1 --poll-us 30",
        )?;
        vm.guest_until("[ -b /dev/vdc ]")?;
        let status = vm.administer("vm status")?;
        assert!(
            status.contains("/vm/late.dsk, 20 requests/s (burst 1), polls for 30 us"),
            "{status}"
        );
        let begin = Instant::now();
        vm.guest("dd if=/dev/vdc of=/dev/null bs=4k count=40 skip=100 iflag=direct 2> /dev/null")?;
        assert!(begin.elapsed() > Duration::from_secs(1), "{:?}", begin.elapsed());
        let refused = vm
            .administer("vm attach-disk --file /vm/none.dsk")
            .unwrap_err()
            .to_string();
        assert!(refused.contains("there is no disk /vm/none.dsk"), "{refused}");
        let socket = host.folder().join("slow/vm.sock");
        numbers_tell_of_it(&socket)?;
        let mut events = ask(&socket, "/v1/events", "accept: text/event-stream\r\n")?;
        assert_eq!(vm.finish()?.exit_code(), Some(0));
        let mut told = String::new();
        events.read_to_string(&mut told)?;
        for event in [
            "\"started\"",
            "\"device-attached\",\"id\":\"late\"",
            "\"stopped\"",
        ] {
            assert!(told.contains(event), "{event}: {told}");
        }
        assert!(
            told.ends_with("0\r\n\r\n"),
            "the stream ends with the machine: {told}"
        );
        Ok(())
    });
}

#[test]
fn a_disk_that_finds_no_space_stops_the_machine_until_there_is_some() {
    story(|host| {
        pool(host, "64M", "128M")?;
        let disk = Disk::in_pool("/vm/a.dsk").set("on-error", "\"stop\"");
        let mut vm = machine(host, "patient", disk, "").interactive()?;
        vm.guest("dd if=/dev/urandom of=/noise bs=1M count=16 2> /dev/null")?;
        // More than there is space for. It does not end before the machine is resumed.
        vm.guest(
            "(for n in 0 1 2 3 4 5; do dd if=/noise of=/dev/vda bs=1M seek=$((n * 16)) oflag=direct 2> /dev/null || echo failed > /failed; done; \
             echo done > /done) & ",
        )?;
        let begin = Instant::now();
        let stopped = loop {
            let events = vm.administer("vm events")?;
            if events.contains("stopped") && events.contains("paused") {
                break events;
            }
            ensure!(
                begin.elapsed() < Duration::from_secs(100),
                "nothing stops: {events}"
            );
            std::thread::sleep(Duration::from_millis(200));
        };
        assert!(stopped.contains("disk0 stopped: "), "{stopped}");
        let status = vm.administer("vm status")?;
        assert!(
            status.contains("paused") && status.contains("`smsvmm vm resume`"),
            "{status}"
        );

        vm.administer("volume create more --layout concat --size 128M")?;
        vm.administer("vm resume")?;
        vm.guest_until("[ -e /done ]")?;
        assert_ne!(vm.try_guest("ls /failed")?.0, 0, "the guest was told of an error");
        let wanted = vm.guest("cat /noise /noise /noise /noise /noise /noise | sha256sum")?;
        assert_eq!(
            vm.guest("dd if=/dev/vda bs=1M count=96 iflag=direct 2> /dev/null | sha256sum")?,
            wanted
        );
        assert_eq!(vm.guest("dmesg | grep -ci 'i/o error' || true")?, "0\n");
        let status = vm.administer("vm status")?;
        assert!(
            status.contains("running") && !status.contains("stopped"),
            "{status}"
        );
        assert_eq!(vm.finish()?.exit_code(), Some(0));
        Ok(())
    });
}

#[test]
fn what_an_undoable_disk_has_at_power_off_is_kept_committed_or_discarded_as_vm_toml_says() {
    story(|host| {
        pool(host, "256M", "8M")?;
        let content = |host: &Host| -> Result<String> {
            host.administer(&format!(
                "disk --devices {DEVICES} export /vm/a.dsk a.raw --force"
            ))?;
            Ok(host.run("head -c 16 a.raw")?.text())
        };
        let undecided = |host: &Host| -> Result<bool> {
            Ok(host
                .administer(&format!("disk --devices {DEVICES} list"))?
                .contains("undoable"))
        };
        for (decision, word, kept) in [("commit", "first", "first"), ("discard", "second", "first")] {
            let disk = Disk::in_pool("/vm/a.dsk")
                .set("mode", "\"undoable\"")
                .set("at-power-off", &format!("{decision:?}"));
            machine(host, decision, disk, "")
                .script(&format!(
                    "echo {word} | dd of=/dev/vda conv=notrunc,fsync 2> /dev/null"
                ))
                .run()?
                .success()?;
            let content = content(host)?;
            assert!(content.starts_with(kept), "{decision}: {content:?}");
            assert!(!undecided(host)?, "{decision}");
        }
        let disk = Disk::in_pool("/vm/a.dsk").set("mode", "\"undoable\"");
        machine(host, "keep", disk, "")
            .script("echo third | dd of=/dev/vda conv=notrunc,fsync 2> /dev/null")
            .run()?
            .success()?;
        assert!(undecided(host)?, "somebody has decided");
        host.administer(&format!("disk --devices {DEVICES} commit /vm/a.dsk"))?;
        let content = content(host)?;
        assert!(content.starts_with("third"), "{content:?}");
        Ok(())
    });
}
