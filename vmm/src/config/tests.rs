//! Configurations and what becomes of them: each mistake with the message that the user reads.

use std::path::Path;

use super::*;

const MINIMAL: &str = "name = \"a\"\n[boot]\nkernel = \"vmlinuz\"\n";

fn load(text: &str, overrides: &[&str]) -> Result<VmConfig, String> {
    let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
    VmConfig::from_text(text, Path::new("vm.toml"), Path::new("/vms/a"), &overrides)
        .map_err(|error| error.to_string())
}

/// A valid configuration with `line` in it; `line` is line 3 of the file unless it begins a table, then line 5.
fn with(line: &str) -> String {
    if line.starts_with('[') {
        format!("name = \"a\"\nboot.kernel = \"vmlinuz\"\n\n\n{line}\n")
    } else {
        format!("name = \"a\"\nboot.kernel = \"vmlinuz\"\n{line}\n")
    }
}

#[test]
fn the_smallest_configuration_gets_every_default() {
    let config = load(MINIMAL, &[]).unwrap();
    assert_eq!(config.name.as_str(), "a");
    assert_eq!(
        (config.cpus.count, config.memory.size.to_string().as_str()),
        (1, "512M")
    );
    assert_eq!(config.boot.kernel, Path::new("/vms/a/vmlinuz"));
    assert_eq!(config.boot.cmdline, "console=ttyS0");
    assert_eq!(config.console.serial, ConsoleSpec::Stdio);
    assert_eq!(config.memory.huge_pages, HugePages::Transparent);
    assert_eq!(
        (config.sandbox.seccomp, config.sandbox.landlock, config.rng),
        (Seccomp::On, true, true)
    );
    assert_eq!(config.power.shutdown_timeout, Seconds::new(90));
    assert!(config.disks.is_empty() && config.nets.is_empty() && config.management.is_none());
}

const FULL: &str = r#"
name = "web1"
rng = false
memory = { size = "4G", huge-pages = "2M", shared = true, prefault = true }

[cpus]
count = 4
threads = 2
affinity = [["0"], "1-2", ["3", "5"], 7]
features = { remove = ["avx512f"] }
nested = true

[boot]
kernel = "/boot/vmlinuz"
initrd = "../initrd.img"
cmdline = "console=ttyS0 root=/dev/vda1"

[[disk]]
image = "root.raw"
serial = "ROOT-1"
queues = 4
queue-size = 128
poll-us = 50
limits = { iops = 500, iops-burst = 1000, bytes = "50M", bytes-burst = "64M" }
limit-group = "bulk"
on-error = "stop"

[[disk]]
id = "disk0"
image = "/dev/sdb"
read-only = true
direct = false

[[disk]]
file = "/vm/data.dsk"
mode = "undoable"
at-power-off = "commit"

[limit-groups.bulk]
bytes = "100M"

[pool]
devices = ["d0.img"]

[expanded-api]
allow = ["snapshot", "create"]
objects = ["/web1/*"]
max-bytes = "10G"

[[net]]
forward = ["tcp:8022:22", "udp:127.0.0.1:5353:53"]

[[net]]
backend = "tap"
tap = "tap0"
mac = "02:00:00:00:00:01"
mtu = 9000
queues = 2
offload = false

[console]
serial = "socket:serial.sock"
virtio = "stdio"
escape = "ctrl-a"

[management]
socket = "web1.sock"

[sandbox]
seccomp = "log"
landlock = false
paths = ["more"]

[power]
on-reboot = "stop"
on-crash = "reboot"
shutdown-timeout = "2m"
"#;

#[test]
fn everything_that_can_be_written_is_read() {
    let config = load(FULL, &[]).unwrap();
    let cpus = &config.cpus;
    assert_eq!([cpus.count, cpus.sockets, cpus.cores, cpus.threads], [4, 1, 2, 2]);
    let affinity: Vec<String> = cpus.affinity.iter().map(ToString::to_string).collect();
    assert_eq!(affinity, ["0", "1-2", "3,5", "7"]);
    assert_eq!(
        config.boot.initrd.as_deref(),
        Some(Path::new("/vms/a/../initrd.img"))
    );
    assert_eq!(
        config.disks[0].id.as_str(),
        "disk1",
        "disk0 is taken by the second disk"
    );
    assert_eq!(config.disks[0].queue_size.get(), 128);
    assert_eq!(config.disks[1].image.as_deref(), Some(Path::new("/dev/sdb")));
    assert_eq!(config.nets[0].forward[1].to_string(), "udp:127.0.0.1:5353:53");
    assert_eq!(config.nets[0].mac, Some(MacAddress::derived("web1", "net0")));
    assert_eq!(
        config.console.serial,
        ConsoleSpec::Socket("/vms/a/serial.sock".into())
    );
    assert_eq!(
        config.management.as_ref().unwrap().socket,
        Path::new("/vms/a/web1.sock")
    );
    assert_eq!(config.power.on_crash, OnCrash::Reboot);
}

#[test]
fn a_shown_configuration_loads_to_the_same_one() {
    for text in [MINIMAL, FULL] {
        let config = load(text, &[]).unwrap();
        let shown = toml::to_string(&config).unwrap();
        assert_eq!(load(&shown, &[]).unwrap(), config, "{shown}");
    }
}

#[test]
fn overrides_change_create_and_append() {
    let config = load(
        FULL,
        &[
            "cpus=8",
            "memory=2G",
            "name=7",
            "boot.cmdline=console=ttyS0 quiet",
            "disk.1.read-only=false",
            "disk.+.image=third.raw",
            "disk.3.serial=3",
            "disk.+={image='fourth.raw', read-only=true}",
            "net.0.forward.+=tcp:80:80",
            "cpus.affinity=[]",
            "console.escape=\"none\"",
            "rng = true",
        ],
    )
    .unwrap();
    assert_eq!((config.cpus.count, config.cpus.threads), (8, 2));
    assert_eq!(
        (config.memory.size.to_string().as_str(), config.memory.shared),
        ("2G", true)
    );
    assert_eq!(config.name.as_str(), "7");
    assert_eq!(config.boot.cmdline, "console=ttyS0 quiet");
    assert!(!config.disks[1].read_only && config.rng);
    assert_eq!(
        config.disks[3].image.as_deref(),
        Some(Path::new("/vms/a/third.raw"))
    );
    assert_eq!(config.disks[3].serial.as_ref().unwrap().as_str(), "3");
    assert!(config.disks[4].read_only);
    assert_eq!(config.nets[0].forward.len(), 3);
    assert_eq!(config.console.escape.control_character(), None);
}

#[test]
fn scsi_disks_get_their_luns_in_order_beside_those_that_are_given() {
    let text = "[[disk]]\nimage = \"a\"\nbus = \"virtio-scsi\"\nqueues = 3\n\
                [[disk]]\nimage = \"b\"\nbus = \"virtio-scsi\"\nlun = 0\n\
                [[disk]]\nimage = \"c\"\nbus = \"virtio-scsi\"\ntarget = 9\n\
                [[disk.path]]\ntarget = 0\naccess = \"non-optimized\"";
    let config = load(&with(text), &[]).unwrap();
    let places: Vec<_> = config.disks.iter().map(DiskConfig::places).collect();
    assert_eq!(places, [vec![(0, 1)], vec![(0, 0)], vec![(9, 2), (0, 2)]]);
    let (queues, size, targets) = ScsiConfig::default().for_disks(&config.disks);
    assert_eq!((queues, size.get(), targets), (3, 256, 10));
}

#[test]
fn a_managers_disks_may_lie_in_several_pools() {
    let text = "manager = \"run/host.sock\"\n[[disk]]\nfile = \"/a.dsk\"\npool = \"fast\"\nmode = \"undoable\"\n\
                [[disk]]\nfile = \"/a.dsk\"\npool = \"slow\"\nlimits = { iops = 5 }";
    let config = load(&with(text), &[]).unwrap();
    assert_eq!(config.manager.as_deref(), Some(Path::new("/vms/a/run/host.sock")));
    let pools: Vec<_> = config.disks.iter().map(|disk| disk.pool.as_deref()).collect();
    assert_eq!(pools, [Some("fast"), Some("slow")]);
    let written = toml::to_string(&config).unwrap();
    assert_eq!(load(&written, &[]).unwrap(), config);
}

#[test]
fn an_override_extends_the_short_form() {
    let config = load(&with("cpus = 4"), &["cpus.nested=true", "memory.huge-pages=none"]).unwrap();
    assert_eq!((config.cpus.count, config.cpus.nested), (4, true));
    assert_eq!(config.memory.huge_pages, HugePages::None);
}

#[test]
fn each_mistake_in_the_file_has_its_message() {
    let cases: &[(&str, &str)] = &[
        // Unknown keys.
        (
            "cpu = 2",
            "vm.toml:3: cpu: unknown key; did you mean `cpus`? (known here: `name`, `rng`, `manager`, `cpus`, `memory`, `boot`, `pool`, `scsi`, `disk`, `limit-groups`, `net`, `console`, `management`, `expanded-api`, `sandbox`, `power`, `resources`)",
        ),
        (
            "[[disk]]\nimage = \"a\"\nreadonly = true",
            "vm.toml:7: disk.0.readonly: unknown key; did you mean `read-only`? (known here: `id`, `image`, `file`, `pool`, `vhost-user`, `mode`, `at-power-off`, `bus`, `target`, `lun`, `access`, `path`, `read-only`, `serial`, `queues`, `queue-size`, `direct`, `poll-us`, `limits`, `limit-group`, `on-error`)",
        ),
        (
            "[[disk]]\nfile = \"/a.dsk\"",
            "vm.toml:6: disk.0.file: names a disk of a pool, and there is no [pool] with its devices, nor a `manager` that has pools",
        ),
        (
            "manager = \"host.sock\"\n[pool]\ndevices = [\"d0\"]",
            "vm.toml:3: manager: cannot stand beside [pool]: either the manager has the pool open, or this process",
        ),
        (
            "manager = \"\"",
            "vm.toml:3: manager: is empty; name the socket of `smsvmm serve`",
        ),
        (
            "[pool]\ndevices = [\"d0\"]\n[[disk]]\nfile = \"/a.dsk\"\npool = \"tank\"",
            "vm.toml:9: disk.0.pool: names a pool of a manager, and there is no `manager`; the disks of [pool] have no such key",
        ),
        (
            "manager = \"m\"\n[[disk]]\nimage = \"a\"\npool = \"tank\"",
            "vm.toml:6: disk.0.pool: says in which pool `file` is, and there is no `file`",
        ),
        (
            "manager = \"m\"\n[[disk]]\nfile = \"/a.dsk\"\npool = \"a/b\"",
            "vm.toml:6: disk.0.pool: `a/b` cannot be a pool of a manager; such a name has 1 to 64 of A-Z a-z 0-9 . _ -",
        ),
        (
            "manager = \"m\"\n[[disk]]\nfile = \"/a.dsk\"\nbus = \"virtio-scsi\"\n[[disk]]\nfile = \"/b.dsk\"\nbus = \"virtio-scsi\"\npool = \"fast\"",
            "vm.toml:10: disk.1.pool: must be that of the other SCSI disks that the manager serves: they are on one adapter",
        ),
        (
            "manager = \"m\"\n[[disk]]\nfile = \"/a.dsk\"\non-error = \"stop\"",
            "vm.toml:6: disk.0.on-error: cannot be \"stop\" for a disk that the manager serves: it could not stop the machine's processors",
        ),
        (
            "manager = \"m\"\n[[disk]]\nfile = \"/a.dsk\"\n[[disk]]\nfile = \"/a.dsk\"",
            "vm.toml:7: disk.1.file: /a.dsk is already disk.0.file; two disks on one disk of the pool must both be read-only",
        ),
        (
            "[pool]\ndevices = []",
            "vm.toml:6: pool.devices: is empty; a pool has at least one device, as `smsvmm pool create` prints them",
        ),
        (
            "[pool]\ndevices = [\"d0\"]\n[[disk]]\nfile = \"a.dsk\"",
            "vm.toml:8: disk.0.file: `a.dsk` is not a path in the pool; such a path begins with /, as in /vm/root.dsk",
        ),
        (
            "[pool]\ndevices = [\"d0\"]\n[[disk]]\nfile = \"/a.dsk\"\nimage = \"a.raw\"",
            "vm.toml:8: disk.0.file: cannot stand beside `image`; a disk is either an image of the host or a disk of the pool",
        ),
        (
            "[pool]\ndevices = [\"d0\"]\n[[disk]]\nfile = \"/a.dsk\"\ndirect = false",
            "vm.toml:9: disk.0.direct: cannot be false for a disk of the pool, which never goes through the host's page cache",
        ),
        (
            "[pool]\ndevices = [\"d0\"]\n[[disk]]\nfile = \"/a.dsk\"\n[[disk]]\nfile = \"/a.dsk\"",
            "vm.toml:10: disk.1.file: /a.dsk is already disk.0.file; two disks on one disk of the pool must both be read-only",
        ),
        (
            "[[disk]]\nimage = \"a\"\nmode = \"undoable\"",
            "vm.toml:7: disk.0.mode: `undoable` is for disks of a pool, and this is an image",
        ),
        (
            "[console]\nseriel = \"pty\"",
            "vm.toml:6: console.seriel: unknown key; did you mean `serial`? (known here: `serial`, `virtio`, `escape`)",
        ),
        // Wrong types.
        (
            "cpus = \"four\"",
            "vm.toml:3: cpus.count: expected a whole number from 0 to 255, found the text \"four\"",
        ),
        (
            "cpus = 2.5",
            "vm.toml:3: cpus.count: expected a whole number from 0 to 255, found the number 2.5",
        ),
        (
            "cpus = -1",
            "vm.toml:3: cpus.count: expected a whole number from 0 to 255, found the number -1",
        ),
        (
            "memory = 1024",
            "vm.toml:3: memory.size: expected a size such as \"512M\", found the number 1024",
        ),
        (
            "memory = [1]",
            "vm.toml:3: memory.size: expected a size such as \"512M\", found a list",
        ),
        (
            "rng = \"yes\"",
            "vm.toml:3: rng: expected true or false, found the text \"yes\"",
        ),
        (
            "console = \"stdio\"",
            "vm.toml:3: console: expected a table, found the text \"stdio\"",
        ),
        (
            "disk = \"a.raw\"",
            "vm.toml:3: disk: expected a list in [ ], found the text \"a.raw\"",
        ),
        (
            "rng = 2026-01-01",
            "vm.toml:3: rng: 2026-01-01 is a date; put it into quotes if it is a text",
        ),
        (
            "cpus = 99999999999999999999",
            "vm.toml:3: cpus.count: the number 99999999999999999999 is beyond every limit",
        ),
        // Impossible values.
        (
            "cpus = 65",
            "vm.toml:3: cpus: 65 vCPUs are impossible; use 1 to 64",
        ),
        ("cpus = 0", "vm.toml:3: cpus: 0 vCPUs are impossible; use 1 to 64"),
        (
            "cpus = { count = 6, sockets = 4 }",
            "vm.toml:3: cpus: 4 x ? x ? sockets, cores and threads do not make 6 vCPUs; sockets x cores x threads must equal count (or leave some out)",
        ),
        (
            "cpus = { count = 2, affinity = [\"0\"] }",
            "vm.toml:3: cpus: affinity has 1 entries for 2 vCPUs; give one set of host CPUs per vCPU",
        ),
        (
            "cpus = { affinity = [\"x\"] }",
            "vm.toml:3: cpus.affinity.0: `x` is not a list of host CPUs; write for example \"0\", \"1-3\" or \"0,4-7\" (0 to 1023)",
        ),
        (
            "memory = \"16M\"",
            "vm.toml:3: memory: size 16M is impossible; use 32M to 16T",
        ),
        (
            "memory = \"33M\"",
            "vm.toml:3: memory: size 33M is impossible; it must be a multiple of 2M",
        ),
        (
            "memory = { size = \"1536M\", huge-pages = \"1G\" }",
            "vm.toml:3: memory: size 1536M is impossible; it must be a multiple of 1G",
        ),
        (
            "memory = \"1 GB\"",
            "vm.toml:3: memory.size: `1 GB` is not a size; write a whole number with a binary unit, for example \"512M\" or \"4G\" (units: K, M, G, T, P)",
        ),
        (
            "memory.huge-pages = \"4M\"",
            "vm.toml:3: memory.huge-pages: `4M` is not known here; use `none`, `thp`, `2M`, `1G`",
        ),
        (
            "[[disk]]\nimage = \"a\"\nbus = \"ide\"",
            "vm.toml:7: disk.0.bus: `ide` is not known here; use `virtio-blk`, `virtio-scsi`",
        ),
        (
            "[[disk]]\nimage = \"a\"\nlun = 1",
            "vm.toml:7: disk.0.lun: is for disks with bus = \"virtio-scsi\"",
        ),
        (
            "[scsi]\ntargets = 2\n[[disk]]\nimage = \"a\"\nbus = \"virtio-scsi\"\ntarget = 2",
            "vm.toml:10: disk.0.target: the adapter has no target 2; scsi.targets says how many it has",
        ),
        (
            "[scsi]\nqueues = 17",
            "vm.toml:6: scsi.queues: use 1 to 16 queues",
        ),
        (
            "[[disk]]\nimage = \"a\"\nbus = \"virtio-scsi\"\nlun = 1\n[[disk]]\nimage = \"b\"\nbus = \"virtio-scsi\"\nlun = 1",
            "vm.toml:12: disk.1.lun: LUN 1 of target 0 is that of disk.0; choose another one",
        ),
        (
            "[[disk]]\nimage = \"a\"\nbus = 1",
            "vm.toml:7: disk.0.bus: expected a text in quotes, found a whole number; use `virtio-blk`, `virtio-scsi`",
        ),
        (
            "[[disk]]\nserial = \"x\"",
            "vm.toml:5: disk.0.image: is missing; name a raw image or a block device here, a disk of the pool in `file`, or a socket in `vhost-user`",
        ),
        (
            "[[disk]]\nimage = \"\"",
            "vm.toml:6: disk.0.image: is empty; name a raw image or a block device",
        ),
        (
            "[[disk]]\nimage = \"a\"\nserial = \"123456789012345678901\"",
            "vm.toml:7: disk.0.serial: `123456789012345678901` cannot be a serial number; use 1 to 20 printable ASCII characters without spaces",
        ),
        (
            "[[disk]]\nimage = \"a\"\nqueues = 17",
            "vm.toml:7: disk.0.queues: 17 queues are impossible; use 1 to 16",
        ),
        (
            "[[disk]]\nimage = \"a\"\nqueue-size = 100",
            "vm.toml:7: disk.0.queue-size: 100 is not a queue size; use one of 16, 32, 64, 128, 256, 512, 1024",
        ),
        (
            "[[disk]]\nimage = \"a\"\npoll-us = 20000",
            "vm.toml:7: disk.0.poll-us: polling is limited to 10000 microseconds",
        ),
        (
            "[[disk]]\nimage = \"a\"\nlimits = { iops = 0 }",
            "vm.toml:7: disk.0.limits.iops: 0 would let nothing through; leave it out for no limit",
        ),
        (
            "[[disk]]\nimage = \"a\"\n[disk.limits]\nbytes-burst = \"1M\"",
            "vm.toml:8: disk.0.limits.bytes-burst: is the burst of a limit that is not there; give `bytes` as well",
        ),
        (
            "[[disk]]\nimage = \"a\"\nlimits = { iosp = 5 }",
            "vm.toml:7: disk.0.limits.iosp: unknown key; did you mean `iops`? (known here: `iops`, `iops-burst`, `bytes`, `bytes-burst`)",
        ),
        (
            "[[disk]]\nimage = \"a\"\nlimit-group = \"bulk\"",
            "vm.toml:7: disk.0.limit-group: there is no `bulk`; make it by [limit-groups.bulk] with iops or bytes",
        ),
        (
            "[expanded-api]\nobjects = [\"vm1/*\"]",
            "vm.toml:6: expanded-api.objects: `vm1/*` is no path of the pool; give one like /web1/data.dsk, or /web1/* for all below",
        ),
        (
            "[resources]\ncpu-weight = 0",
            "vm.toml:6: resources.cpu-weight: must be from 1 to 10000; 100 is usual",
        ),
        (
            "[resources]\nmemory-max = \"16M\"",
            "vm.toml:6: resources.memory-max: must be more than the guest's memory, 512M: the process needs some of its own",
        ),
        (
            "[expanded-api]\nallow = [\"everything\"]",
            "vm.toml:6: expanded-api.allow.0: `everything` is not known here; use `observe`, `snapshot`, `revert`, `create`, `delete`, `resize`, `attributes`, `move`, `layout`, `image`",
        ),
        (
            "[limit-groups.bulk]\niops-burst = 5",
            "vm.toml:6: limit-groups.bulk.iops-burst: is the burst of a limit that is not there; give `iops` as well",
        ),
        (
            "[[disk]]\nimage = \"a\"\non-error = \"ignore\"",
            "vm.toml:7: disk.0.on-error: `ignore` is not known here; use `report`, `stop`",
        ),
        (
            "[[disk]]\nimage = \"a\"\nat-power-off = \"commit\"",
            "vm.toml:7: disk.0.at-power-off: is for disks with mode = \"undoable\", and this one is persistent",
        ),
        (
            "[pool]\ndevices = [\"d\"]\n[[disk]]\nfile = \"/a.dsk\"\nmode = \"undoable\"\nat-power-off = \"never\"",
            "vm.toml:10: disk.0.at-power-off: `never` is not known here; use `keep`, `commit`, `discard`",
        ),
        (
            "[[disk]]\nvhost-user = \"\"",
            "vm.toml:6: disk.0.vhost-user: is empty; name the socket at which the disk is served, as by `smsvmm share vhost-user`",
        ),
        (
            "[[disk]]\nvhost-user = 7",
            "vm.toml:6: disk.0.vhost-user: expected a text in quotes, found the number 7",
        ),
        (
            "[[disk]]\nvhost_user = \"a.sock\"",
            "vm.toml:6: disk.0.vhost_user: unknown key; did you mean `vhost-user`? (known here: `id`, `image`, `file`, `pool`, `vhost-user`, `mode`, `at-power-off`, `bus`, `target`, `lun`, `access`, `path`, `read-only`, `serial`, `queues`, `queue-size`, `direct`, `poll-us`, `limits`, `limit-group`, `on-error`)",
        ),
        (
            "[[disk]]\nimage = \"a\"\nvhost-user = \"a.sock\"",
            "vm.toml:7: disk.0.vhost-user: cannot stand beside `image` or `file`: what the disk lies on, the process at this socket knows",
        ),
        (
            "[[disk]]\nvhost-user = \"a.sock\"\nbus = \"virtio-scsi\"\nlun = 3",
            "vm.toml:8: disk.0.lun: is for disks of the machine's own adapter, and this is an adapter with all disks of its server",
        ),
        (
            "[[disk]]\nvhost-user = \"a.sock\"\nbus = \"virtio-scsi\"\nread-only = true",
            "vm.toml:8: disk.0.read-only: is for single disks, and this is an adapter with all disks of its server, which says who may write (`--read-only`)",
        ),
        (
            "[[disk]]\nvhost-user = \"a.sock\"\nserial = \"x\"",
            "vm.toml:7: disk.0.serial: is told to the guest by the process that serves the disk, and cannot be set here",
        ),
        (
            "[[disk]]\nvhost-user = \"a.sock\"\nmode = \"undoable\"",
            "vm.toml:7: disk.0.mode: `undoable` is for disks of a pool, and this one is served by another process, which may know of modes",
        ),
        (
            "[[disk]]\nvhost-user = \"a.sock\"\ndirect = false",
            "vm.toml:7: disk.0.direct: is for images; give the process that serves the disk such an option (`--buffered`)",
        ),
        (
            "[[disk]]\nvhost-user = \"a.sock\"\npoll-us = 20",
            "vm.toml:7: disk.0.poll-us: is for disks that this process serves; give the one that serves it such an option (`--poll-us`)",
        ),
        (
            "[[disk]]\nvhost-user = \"a.sock\"\nqueues = 17",
            "vm.toml:7: disk.0.queues: 17 queues are impossible; use 1 to 16",
        ),
        (
            "[[disk]]\nimage = \"a\"\nid = \"a/b\"",
            "vm.toml:7: disk.0.id: `a/b` is not an identifier; use 1 to 36 of the characters A-Z a-z 0-9 . _ -",
        ),
        (
            "[[net]]\nbackend = \"bridge\"",
            "vm.toml:6: net.0.backend: `bridge` is not known here; use `user`, `tap`",
        ),
        (
            "[[net]]\nbackend = \"tap\"",
            "vm.toml:5: net.0.tap: is missing; backend = \"tap\" needs the name of the interface, for example tap = \"tap0\"",
        ),
        (
            "[[net]]\ntap = \"tap0\"",
            "vm.toml:6: net.0.tap: belongs to backend = \"tap\"; this card has backend = \"user\"",
        ),
        (
            "[[net]]\nbackend = \"tap\"\ntap = \"a-very-long-interface\"",
            "vm.toml:7: net.0.tap: `a-very-long-interface` is not the name of an interface; use 1 to 15 characters without spaces, `/`, `:` and `%`",
        ),
        (
            "[[net]]\nbackend = \"tap\"\ntap = \"t\"\nforward = [\"tcp:1:1\"]",
            "vm.toml:8: net.0.forward: belongs to backend = \"user\"; this card has backend = \"tap\"",
        ),
        (
            "[[net]]\nforward = [\"8022:22\"]",
            "vm.toml:6: net.0.forward.0: `8022:22` is not a forwarded port; write \"tcp:8022:22\" (host's port 8022 to guest's port 22) or \"udp:127.0.0.1:5353:53\"",
        ),
        (
            "[[net]]\nmac = \"03:00:00:00:00:00\"",
            "vm.toml:6: net.0.mac: `03:00:00:00:00:00` is not the address of a single station; the first octet must be even, for example \"02:00:00:12:34:56\"",
        ),
        (
            "[[net]]\nqueues = 9",
            "vm.toml:6: net.0.queues: 9 queue pairs are impossible; use 1 to 8",
        ),
        ("[[net]]\nmtu = 100", "vm.toml:6: net.0.mtu: use 576 to 65535"),
        (
            "[[net]]\nmtu = 70000",
            "vm.toml:6: net.0.mtu: expected a whole number from 0 to 65535, found the number 70000",
        ),
        (
            "[console]\nserial = \"tty\"",
            "vm.toml:6: console.serial: `tty` is not a console; use \"stdio\", \"pty\", \"pty:LINK\", \"file:PATH\", \"socket:PATH\" or \"null\"",
        ),
        (
            "[power]\nshutdown-timeout = \"90\"",
            "vm.toml:6: power.shutdown-timeout: `90` is not a time; write a whole number with a unit, for example \"90s\" (units: ms, s, m, h)",
        ),
        (
            "[power]\nshutdown-timeout = \"25h\"",
            "vm.toml:6: power.shutdown-timeout: 90000s is beyond the limit of 24h",
        ),
        ("[management]", "vm.toml:5: management.socket: is missing"),
        (
            "[management]\nsocket = \"\"",
            "vm.toml:6: management.socket: is empty; name a path for the socket",
        ),
        (
            "[sandbox]\nseccomp = true",
            "vm.toml:6: sandbox.seccomp: expected a text in quotes, found a truth value; use `on`, `log`, `off`",
        ),
        // What does not fit together.
        (
            "[[disk]]\nid = \"x\"\nimage = \"a\"\n[[net]]\nid = \"x\"",
            "vm.toml:9: net.0.id: `x` is taken by disk.0.id; identifiers of disks and network cards must differ",
        ),
        (
            "[[disk]]\nimage = \"a\"\n[[disk]]\nimage = \"./b/../a\"\nread-only = true",
            "vm.toml:8: disk.1.image: /vms/a/./b/../a is already disk.0.image; two disks on one image must both be read-only",
        ),
        (
            "[[disk]]\nvhost-user = \"a.sock\"\n[[disk]]\nvhost-user = \"./a.sock\"",
            "vm.toml:8: disk.1.vhost-user: /vms/a/./a.sock is already disk.0.vhost-user; two disks on one socket must both be read-only",
        ),
        (
            "[[net]]\nmac = \"02:00:00:00:00:01\"\n[[net]]\nmac = \"02:00:00:00:00:01\"",
            "vm.toml:8: net.1.mac: `02:00:00:00:00:01` is taken by net.0.mac; each network card needs an address of its own",
        ),
        (
            "[[net]]\nbackend = \"tap\"\ntap = \"t\"\n[[net]]\nbackend = \"tap\"\ntap = \"t\"",
            "vm.toml:10: net.1.tap: `t` is taken by net.0.tap; a tap interface serves one network card (use queues for more speed)",
        ),
        (
            "[[net]]\nforward = [\"tcp:80:80\"]\n[[net]]\nforward = [\"tcp:80:8080\"]",
            "vm.toml:8: net.1.forward: `tcp:80:8080` and `tcp:80:80` of net.0 take the same port of the host",
        ),
        (
            "[console]\nvirtio = \"stdio\"",
            "vm.toml:6: console.virtio: only one console can be \"stdio\"; console.serial has it (its default)",
        ),
        (
            "[console]\nserial = \"socket:s\"\n[management]\nsocket = \"s\"",
            "vm.toml:8: management.socket: `/vms/a/s` is taken by console.serial; each needs a path of its own",
        ),
        // Not TOML.
        (
            "cpus = ",
            "vm.toml:3:8: string values must be quoted, expected literal string",
        ),
        ("cpus = 1\ncpus = 2", "vm.toml:4:1: duplicate key"),
    ];
    for (line, message) in cases {
        assert_eq!(load(&with(line), &[]).unwrap_err(), *message, "for {line:?}");
    }
}

#[test]
fn each_mistake_in_an_override_has_its_message() {
    let cases: &[(&str, &str)] = &[
        (
            "cpus",
            "--set cpus: has no `=`; write key=value, for example cpus=4 or disk.0.read-only=true",
        ),
        (
            "=4",
            "--set =4: `` is not a key; write names with dots, for example disk.0.read-only",
        ),
        (
            "a b=4",
            "--set a b=4: `a b` is not a key; write names with dots, for example disk.0.read-only",
        ),
        (
            "cpus=99",
            "--set cpus=99: cpus: 99 vCPUs are impossible; use 1 to 64",
        ),
        (
            "disk.0.bsu=x",
            "--set disk.0.bsu=x: disk.0.bsu: unknown key; did you mean `bus`? (known here: `id`, `image`, `file`, `pool`, `vhost-user`, `mode`, `at-power-off`, `bus`, `target`, `lun`, `access`, `path`, `read-only`, `serial`, `queues`, `queue-size`, `direct`, `poll-us`, `limits`, `limit-group`, `on-error`)",
        ),
        (
            "disk.3.image=x",
            "--set disk.3.image=x: there is no element 3, the list has 1; use + to append one",
        ),
        (
            "disk.x.image=x",
            "--set disk.x.image=x: `x` does not select an element of a list; use a number from 0 or + to append",
        ),
        ("name.x=1", "--set name.x=1: `x` cannot be set inside of text"),
        (
            "memory=lots",
            "--set memory=lots: memory.size: `lots` is not a size; write a whole number with a binary unit, for example \"512M\" or \"4G\" (units: K, M, G, T, P)",
        ),
        (
            "disk.+.read-only=true",
            "--set disk.+.read-only=true: disk.1.image: is missing; name a raw image or a block device here, a disk of the pool in `file`, or a socket in `vhost-user`",
        ),
        (
            "disk.+.image=root.raw",
            "--set disk.+.image=root.raw: disk.1.image: /vms/a/root.raw is already disk.0.image; two disks on one image must both be read-only",
        ),
        (
            "disk=[]x",
            "--set disk=[]x: disk: expected a list in [ ], found the text \"[]x\"",
        ),
    ];
    let text = with("[[disk]]\nimage = \"root.raw\"");
    for (text_of_override, message) in cases {
        assert_eq!(
            load(&text, &[text_of_override]).unwrap_err(),
            *message,
            "for {text_of_override}"
        );
    }
}

#[test]
fn an_override_is_blamed_also_where_the_file_has_the_key() {
    for (text, message) in [
        (
            "cpus = 1",
            "--set cpus=65: cpus: 65 vCPUs are impossible; use 1 to 64",
        ),
        (
            "cpus = { threads = 2 }",
            "--set cpus=65: cpus: 65 vCPUs are impossible; use 1 to 64",
        ),
    ] {
        assert_eq!(load(&with(text), &["cpus=65"]).unwrap_err(), message);
    }
    let error = load(&with("[[disk]]\nserial = \"x\""), &["disk.0.read-only=true"]).unwrap_err();
    assert_eq!(
        error,
        "vm.toml:5: disk.0.image: is missing; name a raw image or a block device here, a disk of the pool in `file`, or a socket in `vhost-user`"
    );
}

#[test]
fn what_must_be_there_is_asked_for() {
    assert_eq!(load("", &[]).unwrap_err(), "vm.toml:1: name: is missing");
    assert_eq!(
        load("name = \"a\"", &[]).unwrap_err(),
        "vm.toml:1: boot: is missing"
    );
    assert_eq!(
        load("name = \"a\"\n[boot]", &[]).unwrap_err(),
        "vm.toml:2: boot.kernel: is missing"
    );
}

#[test]
fn too_many_devices_are_refused() {
    let disks: String = (0..25)
        .map(|number| format!("[[disk]]\nimage = \"{number}\"\n"))
        .collect();
    assert_eq!(
        load(&with(&disks), &[]).unwrap_err(),
        "vm.toml:5: disk: 25 devices are too many; a machine has slots for 24"
    );
}

#[test]
fn a_long_or_strange_command_line_is_refused() {
    let long = format!(
        "[boot]\nkernel = \"k\"\ncmdline = \"{}\"\nname = \"a\"",
        "x".repeat(2048)
    );
    let long = long.replace("\nname = \"a\"", "");
    let error = load(&format!("name = \"a\"\n{long}"), &[]).unwrap_err();
    assert_eq!(
        error,
        "vm.toml:4: boot.cmdline: has 2048 bytes; Linux takes at most 2047"
    );
    let error = load(MINIMAL, &["boot.cmdline=\"a\\nb\""]).unwrap_err();
    assert!(
        error.ends_with("boot.cmdline: has a line break or a zero byte; Linux takes one line of text"),
        "{error}"
    );
}

#[test]
fn deep_nesting_is_refused_and_does_not_overflow_the_stack() {
    for text in [
        format!("x = {}", "[".repeat(200_000)),
        format!("x{} = 1", ".x".repeat(200_000)),
        format!("[x{}]", ".x".repeat(200_000)),
        format!("x = {}1{}", "[".repeat(60), "]".repeat(60)),
    ] {
        assert!(load(&text, &[]).is_err());
    }
}

#[test]
fn files_are_read_relative_to_their_folder_and_refused_if_they_are_no_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm.toml");
    std::fs::write(&path, MINIMAL).unwrap();
    let config = VmConfig::load(&path, &[]).unwrap();
    assert_eq!(config.boot.kernel, folder.path().join("vmlinuz"));

    std::fs::write(&path, vec![b'#'; (1 << 20) + 1]).unwrap();
    assert!(matches!(
        VmConfig::load(&path, &[]),
        Err(ConfigError::TooLarge { size: 1_048_577, .. })
    ));
    std::fs::write(&path, b"name = \"a\"\n\xff\xfe").unwrap();
    assert!(matches!(
        VmConfig::load(&path, &[]),
        Err(ConfigError::Syntax { line: 2, .. })
    ));
    assert!(matches!(
        VmConfig::load(&folder.path().join("no"), &[]),
        Err(ConfigError::Read { .. })
    ));
    assert!(matches!(
        VmConfig::load(folder.path(), &[]),
        Err(ConfigError::Read { .. })
    ));
}
