//! Frozen-image backup: `sms-agent backup` in a guest whose file systems are being written, and a mover on its host.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use stories::{Disk, Host, Pool, Server, Story, Vm};

use crate::network::{LEASE, free_port, lease};

const DEVICES: [&str; 4] = ["d0.img", "d1.img", "d2.img", "d3.img"];

/// Disks: their names, sizes and volumes. XFS is not made smaller than 300 MiB, btrfs than 109.
const DISKS: [(&str, &str, &str); 6] = [
    ("ext4", "128M", "safe"),
    ("xfs", "320M", "fast"),
    ("btrfs", "112M", "safe"),
    ("back", "256M", "fast"),
    ("one", "32M", "safe"),
    ("two", "32M", "fast"),
];

/// ext4 on a partition, XFS on all of a disk; both have a tree with one of everything, and a load. One disk is for what is restored.
const PREPARE: [&str; 10] = [
    "sh /tools-on",
    "for f in ext4 xfs btrfs back one two; do ln -s $(sms-agent disk list | awk \"/$f.dsk/ {print \\$1}\") /dev/$f || exit; done",
    "printf 'n\\np\\n1\\n2048\\n\\nw\\n' | fdisk -u /dev/ext4 > /dev/null 2>&1; ln -s $(readlink /dev/ext4)1 /dev/ext4p1; \
     n=0; until [ -b /dev/ext4p1 ]; do usleep 20000; done",
    "/tools/usr/bin/mke2fs -q -t ext4 /dev/ext4p1 && /tools/usr/bin/mke2fs -q -t ext4 /dev/back && \
     /tools/usr/bin/mkfs.xfs -q /dev/xfs 2> /dev/null && /tools/usr/bin/mkfs.btrfs -q /dev/btrfs",
    "mkdir /ext4 /xfs /btrfs /back /image && mount -t ext4 /dev/ext4p1 /ext4 && mount -t xfs /dev/xfs /xfs && mount -t ext4 /dev/back /back && \
     mount -t btrfs /dev/btrfs /btrfs",
    "for f in ext4 xfs; do mkdir /$f/tree /$f/load && fs-load odd /$f/tree || exit; done",
    VOLUME,
    "/tools/usr/bin/mke2fs -q -t ext4 /dev/mapper/lv && mkdir /lv && mount -t ext4 /dev/mapper/lv /lv && fs-load odd /lv && \
     head -c 3000000 /dev/urandom > /lv/large && fs-load list /lv > /tmp/lv.live",
    "head -c 300000 /dev/urandom > /btrfs/large; echo little > /btrfs/little",
    LOAD,
];

/// A logical volume as LVM makes them: a piece of each disk one behind the other, then one in stripes.
const VOLUME: &str = "d() { f=$(readlink /dev/$1); cat /sys/class/block/${f##*/}/dev; }; \
    printf '0 16384 linear %s 2048\\n16384 8192 linear %s 4096\\n24576 32768 striped 2 128 %s 20480 %s 20480\\n' \
    $(d one) $(d two) $(d two) $(d one) | /tools/usr/bin/dmsetup create --noudevsync lv && [ -b /dev/mapper/lv ] || \
    /tools/usr/bin/dmsetup mknodes lv; [ -b /dev/mapper/lv ]";

/// Files are written, appended to, replaced and deleted, until there is /tmp/stop.
const LOAD: &str = "(n=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); for f in ext4 xfs; do cd /$f/load; echo $n >> log; \
    dd if=/dev/urandom of=new bs=64k count=2 2> /dev/null && mv new $((n % 20)); rm -f $((n * 7 % 20)); [ $((n % 10)) != 0 ] || sync -f log; done; \
    usleep 20000; done; echo $n > /tmp/rounds) &";

/// A mover on the host.
struct Mover<'a> {
    host: &'a Host,
    port: u16,
    token: String,
}

impl<'a> Mover<'a> {
    /// Prepares it for the machine of that name.
    fn new(host: &'a Host, machine: &str) -> Result<Self> {
        let said = host.administer("mover token")?;
        let mut words = said.split_whitespace();
        let token = words
            .clone()
            .find(|word| word.starts_with("smsvmm_"))
            .context("no token")?
            .to_owned();
        let hash = words
            .find(|word| word.trim_matches('"').len() == 64)
            .context("no hash")?
            .trim_matches('"')
            .to_owned();
        let port = free_port()?;
        let folder = host.folder().display();
        let devices: Vec<String> = DEVICES
            .iter()
            .map(|device| format!("\"{folder}/{device}\""))
            .collect();
        let devices = devices.join(", ");
        std::fs::create_dir_all(host.folder().join("store"))?;
        host.administer("certificate init tls --host mover")?;
        host.administer("certificate init stranger --host mover")?;
        let config = format!(
            "listen = \"127.0.0.1:{port}\"\nstore = \"{folder}/store\"\n\
             [tls]\ncertificate = \"{folder}/tls/server.pem\"\nkey = \"{folder}/tls/server.key\"\n\
             [[principal]]\nname = \"{machine}\"\ntoken-sha256 = \"{hash}\"\nsocket = \"{folder}/{machine}/vm.sock\"\ndevices = [{devices}]\n"
        );
        std::fs::write(host.folder().join("mover.toml"), &config)?;
        // So slow that one can do something meanwhile.
        std::fs::write(
            host.folder().join("slow.toml"),
            config.replace("[[principal]]", "[limits]\nrate = \"200K\"\n[[principal]]"),
        )?;
        Ok(Self { host, port, token })
    }

    /// The certificate of an authority that was made by the tool.
    fn authority(&self, folder: &str) -> Result<String> {
        Ok(std::fs::read_to_string(
            self.host.folder().join(folder).join("ca.pem"),
        )?)
    }

    fn start(&self, config: &str) -> Result<Server> {
        let line = format!("exec {} mover serve {config} >&2", self.host.smsvmm().display());
        Server::speaking(
            Path::new("sh"),
            self.host.folder(),
            &["-c", &line],
            "mover: 127.0.0.1:",
        )
    }
}

/// The guest with its agent.
struct Guest {
    begin: Instant,
    vm: Vm,
    mover: String,
}

impl Guest {
    /// `sms-agent backup ...`, which must end with this status; what it says.
    fn agent(&mut self, command: &str, arguments: &str, expected: i32) -> Result<String> {
        let to = if command == "create" { "to" } else { "from" };
        let line = format!(
            "sms-agent backup {command} --{to} {} --tls-name mover {arguments} 2>&1",
            self.mover
        );
        let begin = Instant::now();
        let (status, said) = self.vm.try_guest(&line)?;
        println!(
            "[at {:.0} s, {:.1} s] backup {command} {arguments}\n{said}",
            self.begin.elapsed().as_secs_f64(),
            begin.elapsed().as_secs_f64()
        );
        ensure!(status == expected, "{line} ended with {status}: {said}");
        Ok(said)
    }

    fn create(&mut self, arguments: &str, expected: i32) -> Result<String> {
        self.agent(
            "create",
            &format!("--token-file /token --ca /mover.pem {arguments}"),
            expected,
        )
    }

    fn restore(&mut self, arguments: &str, expected: i32) -> Result<String> {
        self.agent(
            "restore",
            &format!("--token-file /token --ca /mover.pem {arguments}"),
            expected,
        )
    }

    /// What is in a file system of a kept image: listed into /tmp/NAME.IMAGE.
    fn look_into(&mut self, name: &str, image: &str) -> Result<()> {
        let (options, part) = match name {
            "ext4" => ("noload", "1"),
            _ => ("norecovery,nouuid", ""),
        };
        self.vm.guest(&format!(
            "sms-agent disk attach /vm/{name}.dsk@{image} --read-only | tee /tmp/attached"
        ))?;
        self.vm.guest(&format!(
            "d=$(awk '{{print $2}}' /tmp/attached){part}; n=0; until [ -b $d ]; do usleep 20000; done; \
             mount -t {name} -o ro,{options} $d /image && fs-load list /image > /tmp/{name}.{image}; r=$?; umount /image; [ $r = 0 ]"
        ))?;
        self.vm
            .guest(&format!("sms-agent disk detach /vm/{name}.dsk@{image}"))
            .map(drop)
    }

    /// Nothing is attached, frozen or kept but this image.
    fn is_clean(&mut self, image: &str) -> Result<()> {
        let list = self.vm.guest("sms-agent disk list --json")?;
        ensure!(!list.contains(".dsk@"), "an image is attached: {list}");
        let mut kept = list.split('"').filter(|word| word.starts_with("backup-"));
        ensure!(
            kept.all(|name| name == image),
            "not only {image} is there: {list}"
        );
        // Of logical volumes only that of the guest.
        self.vm.guest("[ $(ls -d /sys/block/dm-* | wc -l) = 1 ]")?;
        self.vm
            .guest("for f in ext4 xfs; do echo x > /$f/alive && sync -f /$f/alive || exit; done")
            .map(drop)
    }

    /// What was restored is what was in the image.
    fn is_the_same(&mut self, name: &str, image: &str) -> Result<()> {
        let line =
            format!("fs-load list /back/{name} > /tmp/restored && cmp /tmp/restored /tmp/{name}.{image}");
        let (status, said) = self.vm.try_guest(&line)?;
        if status != 0 {
            let both = self.vm.guest(&format!(
                "diff /tmp/restored /tmp/{name}.{image} | head -c 3000; true"
            ))?;
            anyhow::bail!("{name} of {image} is not what was restored: {said}{both}");
        }
        Ok(())
    }
}

#[test]
fn files_of_a_live_guest_are_backed_up_from_a_frozen_image_and_restored() {
    Story::default()
        .agent()
        .guest_tools()
        .limit(Duration::from_secs(500))
        .tell(|host| {
            for device in DEVICES {
                host.image(device, 1536)?;
            }
            let pool = Pool::create(host, &DEVICES)?;
            let mover = Mover::new(host, "live")?;
            let mut builder = pool
                .vm("live")
                .cpus(2)
                .memory("512M")
                .limit(Duration::from_secs(480))
                .toml("[expanded-api]\nallow = [\"image\"]\n[[net]]\nbackend = \"user\"\n")
                .file("lease", 0o755, LEASE)
                .file("token", 0o600, mover.token.clone())
                .file("other-token", 0o600, "smsvmm_another")
                .file("mover.pem", 0o644, mover.authority("tls")?)
                .file("stranger.pem", 0o644, mover.authority("stranger")?);
            for (name, size, volume) in DISKS {
                pool.run(&format!(
                    "disk create /vm/{name}.dsk --size {size} --volume {volume}"
                ))?;
                let disk = Disk::in_pool(&format!("/vm/{name}.dsk"));
                builder = builder.disk(disk.set("bus", "\"virtio-scsi\"").serial(name));
            }
            let mut vm = builder.with_agent()?.with_guest_tools()?.interactive()?;
            vm.guest_until("[ $(ls -d /sys/block/sd* | wc -l) = 6 ]")?;
            for line in PREPARE {
                vm.guest(line)?;
            }
            let gateway = lease(&mut vm)?;
            let mut guest = Guest {
                begin: Instant::now(),
                vm,
                mover: format!("{gateway}:{}", mover.port),
            };
            let server = mover.start("mover.toml")?;
            full_and_incremental(&mut guest)?;
            refusals(&mut guest)?;
            drop(server);
            broken_off(&mover, &mut guest)?;

            guest
                .vm
                .guest("! dmesg | grep -iE 'i/o error|ext4-fs error|corruption|call trace'")?;
            guest.vm.finish()?;
            pool.check()
        });
}

fn full_and_incremental(guest: &mut Guest) -> Result<()> {
    // btrfs cannot be taken file by file; a logical volume can.
    let said = guest.create("--source /ext4 /xfs /lv /dev/btrfs --name full --keep-image", 0)?;
    ensure!(
        said.contains("stood still for") && said.contains("read from devices"),
        "{said}"
    );
    for name in ["ext4", "xfs"] {
        guest.look_into(name, "backup-full")?;
    }
    // The guest has gone on.
    guest.vm.guest(
        "cd /ext4/tree && rm one && cp program new && echo more >> plain && echo x | dd of=pieces bs=1 seek=9000 conv=notrunc 2> /dev/null; sync; cd /",
    )?;
    let said = guest.create("--source /ext4 --incremental --name second --keep-image", 0)?;
    ensure!(
        said.contains("in the parent") && said.contains("read from devices"),
        "{said}"
    );
    guest
        .vm
        .guest("touch /tmp/stop; wait; [ $(cat /tmp/rounds) -gt 10 ]")?;

    guest.restore("--name full --to /back", 0)?;
    for name in ["ext4", "xfs"] {
        guest.is_the_same(name, "backup-full")?;
    }
    guest.is_the_same("lv", "live")?;
    // Holes are holes.
    guest
        .vm
        .guest("[ $(du -k /back/ext4/tree/sparse | cut -f 1) -lt 1000 ]")?;
    guest
        .vm
        .guest("sms-agent disk attach /vm/btrfs.dsk@backup-full --read-only > /tmp/attached")?;
    guest
        .vm
        .guest("cmp $(awk '{print $2}' /tmp/attached) /back/disks/vm/btrfs.dsk")?;
    guest
        .vm
        .guest("sms-agent disk detach /vm/btrfs.dsk@backup-full")?;
    guest.vm.guest(
        "sms-agent release-image --name backup-full /vm/xfs.dsk /vm/btrfs.dsk /vm/one.dsk /vm/two.dsk",
    )?;

    guest.is_clean("backup-second")?;
    guest.look_into("ext4", "backup-second")?;
    guest
        .vm
        .guest("rm -rf /back/xfs /back/ext4/load /back/ext4/tree/one")?;
    guest.restore("--name second --to /back --overwrite", 0)?;
    guest.is_the_same("ext4", "backup-second")?;
    guest
        .vm
        .guest("sms-agent release-image --name backup-second /vm/ext4.dsk")
        .map(drop)
}

fn refusals(guest: &mut Guest) -> Result<()> {
    for (arguments, reason) in [
        (
            "--token-file /other-token --ca /mover.pem --source /ext4",
            "token",
        ),
        (
            "--token-file /token --ca /stranger.pem --source /ext4",
            "certificate",
        ),
        (
            "--token-file /token --ca /mover.pem --source /btrfs",
            "btrfs cannot be mounted beside",
        ),
        (
            "--token-file /token --ca /mover.pem --source /ext4 --parent full",
            "was made without --keep-image",
        ),
    ] {
        let said = guest.agent("create", arguments, 1)?;
        ensure!(said.contains(reason), "{arguments}: {said}");
    }
    guest.is_clean("none")
}

/// The mover goes, or the agent is told to: no backup, and nothing is left in the guest; or it is gone on with.
fn broken_off(mover: &Mover<'_>, guest: &mut Guest) -> Result<()> {
    let begin = |guest: &mut Guest, arguments: &str| {
        let line = format!(
            "(sms-agent backup create --to {} --tls-name mover --token-file /token --ca /mover.pem --source /ext4 {arguments} \
             > /tmp/said 2>&1; echo $? > /tmp/ended) &",
            guest.mover
        );
        guest
            .vm
            .guest(&format!("rm -f /tmp/ended; [ ! -e /dev/sdg ] && {line}"))?;
        // The image is here: what is in it is sent, slowly.
        guest.vm.guest_until("[ -b /dev/sdg1 ]")
    };
    let ended = |guest: &mut Guest| -> Result<String> {
        guest.vm.guest_until("[ -e /tmp/ended ]")?;
        guest.vm.guest("cat /tmp/said; [ $(cat /tmp/ended) = 1 ]")
    };
    let server = mover.start("slow.toml")?;
    begin(guest, "--name killed")?;
    drop(server);
    let said = ended(guest)?;
    ensure!(said.contains("the mover"), "{said}");
    guest.is_clean("none")?;

    let server = mover.start("slow.toml")?;
    begin(guest, "--name again --resumable")?;
    guest.vm.guest("killall -TERM sms-agent")?;
    let said = ended(guest)?;
    ensure!(
        said.contains("ended by signal 15") && said.contains("--resume"),
        "{said}"
    );
    guest.is_clean("backup-again")?;
    let list = guest.agent("list", "--token-file /token --ca /mover.pem", 0)?;
    for name in ["killed", "again"] {
        let line = list.lines().find(|line| line.starts_with(name));
        ensure!(line.is_none_or(|line| line.contains("incomplete")), "{list}");
    }
    let said = guest.restore("--name killed --to /back", 1)?;
    ensure!(said.contains("there is no backup killed"), "{said}");
    drop(server);

    let _server = mover.start("mover.toml")?;
    guest.look_into("ext4", "backup-again")?;
    guest.create("--source /ext4 --name again --resume", 0)?;
    guest.is_clean("none")?;
    let said = guest.agent("verify", "--token-file /token --ca /mover.pem --name again", 0)?;
    ensure!(said.contains("all checksums are right"), "{said}");
    guest.vm.guest("rm -rf /back/ext4")?;
    guest.restore("--name again --to /back", 0)?;
    guest.is_the_same("ext4", "backup-again")
}
