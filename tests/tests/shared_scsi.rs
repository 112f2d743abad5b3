//! Two guests of QEMU with the same SCSI disks of a pool, which one process of `smsvmm share vhost-user-scsi` serves to both: what one
//! reserves, the other respects; and the server is killed under them.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use stories::{Server, Vm, emulated_with_tools, program, run_program};

const PATIENCE: Duration = Duration::from_secs(240);
const DEVICES: &str = "d0.img,d1.img";
const KILLS: u32 = 2;
/// Exit status of sg3-utils (sg3_utils(8)).
const UNIT_ATTENTION: i32 = 6;

fn serve(folder: &Path) -> Result<Server> {
    let arguments = format!(
        "vhost-user-scsi --devices {DEVICES} --queues 2 --socket a.sock --socket b.sock /vm/shared.dsk /vm/data.dsk"
    );
    let arguments: Vec<&str> = arguments.split(' ').collect();
    Server::share(&program()?, folder, &arguments)
}

fn boot(folder: &Path, name: &str) -> Result<Vm> {
    let socket = folder.join(format!("{name}.sock"));
    let socket = format!("socket,id=scsi,path={},reconnect=1", socket.display());
    let adapter = "vhost-user-scsi-pci,chardev=scsi,num_queues=2";
    let arguments = ["-chardev", &socket, "-device", adapter];
    emulated_with_tools(&folder.join(name), &arguments, PATIENCE)
}

/// A guest, and the names that it has for the two disks.
struct Machine {
    vm: Vm,
    shared: String,
    data: String,
}

impl Machine {
    fn is_up(mut vm: Vm) -> Result<Self> {
        vm.wait_until_ready()?;
        vm.guest("sh /tools-on")?;
        let mut disk = |lun: u16| {
            let place = format!("/sys/bus/scsi/devices/*:0:0:{lun}/block");
            vm.guest_until(&format!("[ -d {place} ]"))?;
            Ok::<_, anyhow::Error>(format!("/dev/{}", vm.guest(&format!("ls {place}"))?.trim()))
        };
        let (shared, data) = (disk(0)?, disk(1)?);
        vm.guest("head -c 1048576 /dev/urandom > /tmp/data")?;
        Ok(Self { vm, shared, data })
    }

    /// What a tool says of the shared disk; it must end with this status.
    fn tool(&mut self, line: &str, status: i32) -> Result<String> {
        let line = format!("/tools/usr/bin/{line} {} 2>&1", self.shared);
        let (found, said) = self.vm.try_guest(&line)?;
        ensure!(found == status, "{line}: {found} instead of {status}: {said}");
        Ok(said.replace('\r', ""))
    }

    fn persist(&mut self, arguments: &str) -> Result<String> {
        self.tool(&format!("sg_persist -n {arguments}"), 0)
    }

    /// Whether the kernel's access is let through; else it must be a reservation that is in the way.
    fn may(&mut self, write: bool) -> Result<bool> {
        let shared = &self.shared;
        let way = match write {
            true => format!("if=/tmp/data of={shared} oflag=direct"),
            false => format!("if={shared} of=/tmp/read iflag=direct"),
        };
        let line = format!("dd {way} bs=64k count=16 2>&1");
        let (status, said) = self.vm.try_guest(&line)?;
        // EBADE: RESERVATION CONFLICT.
        ensure!(
            status == 0 || said.contains("Invalid exchange"),
            "{line}: {status}: {said}"
        );
        Ok(status == 0)
    }

    /// Takes all unit attentions away; at least one of them must be this.
    fn is_told(&mut self, what: &str) -> Result<()> {
        let line = format!("/tools/usr/bin/sg_turs -v {} 2>&1", self.shared);
        let mut all = String::new();
        for _ in 0..8 {
            let (status, said) = self.vm.try_guest(&line)?;
            if status == 0 {
                ensure!(all.contains(what), "the guest was not told of {what}: {all}");
                return Ok(());
            }
            ensure!(status == UNIT_ATTENTION, "{line}: {status}: {said}");
            all.push_str(&said);
        }
        anyhow::bail!("unit attentions without end: {all}")
    }
}

fn tell() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    for device in DEVICES.split(',') {
        std::fs::File::create(folder.join(device))?.set_len(512 << 20)?;
    }
    run_program(folder, "pool create tank d0.img d1.img")?;
    run_program(
        folder,
        &format!("file --devices {DEVICES} format --meta-size 64M"),
    )?;
    run_program(
        folder,
        &format!("volume --devices {DEVICES} create safe --size 256M --layout mirror"),
    )?;
    run_program(folder, &format!("file --devices {DEVICES} mkdir /vm"))?;
    for disk in ["shared", "data"] {
        let create = format!("disk --devices {DEVICES} create /vm/{disk}.dsk --size 64M --volume safe");
        run_program(folder, &create)?;
    }
    let server = serve(folder)?;
    let booted = [boot(folder, "a")?, boot(folder, "b")?];
    let [a, b] = booted.map(Machine::is_up);
    let (mut a, mut b) = (a?, b?);
    let name = a.tool("sg_vpd -q -p di_lu", 0)?;
    ensure!(
        b.tool("sg_vpd -q -p di_lu", 0)? == name,
        "two disks instead of one"
    );
    reservations(&mut a, &mut b)?;
    let mut server = server;
    for kill in 0..KILLS {
        server = killed(server, folder, &mut a, &mut b, kill)?;
    }
    // One machine goes, and nobody else notices.
    drop(a);
    ensure!(b.may(true)? && b.may(false)?);
    // The successor at the same socket is the same initiator.
    let mut a = Machine::is_up(boot(folder, "a")?)?;
    ensure!(!a.may(true)?);
    a.persist("--out --register --param-sark=a2")?;
    a.persist("--out --preempt --param-rk=a2 --param-sark=b1 --prout-type=1")?;
    b.is_told("egistrations preempted")?;
    ensure!(!b.may(true)? && a.may(true)?);
    a.persist("--out --clear --param-rk=a2")?;
    ensure!(b.may(true)?);
    server.end()
}

/// Both register, one reserves, the other one takes it away; each sees what the other has done.
fn reservations(a: &mut Machine, b: &mut Machine) -> Result<()> {
    a.persist("--out --register --param-sark=a1")?;
    b.persist("--out --register --param-sark=b1 --param-aptpl")?;
    let status = a.persist("--read-full-status")?;
    ensure!(
        status.contains("Key=0xa1")
            && status.contains("Key=0xb1")
            && status.matches("SAS address").count() == 2,
        "{status}"
    );
    ensure!(b.persist("--read-full-status")? == status);
    a.persist("--out --reserve --param-rk=a1 --prout-type=1")?;
    ensure!(b.persist("--read-reservation")?.contains("Write Exclusive"));
    ensure!(a.may(true)?);
    ensure!(!b.may(true)? && b.may(false)?);
    let (sum, other) = ("sha256sum < /tmp/data", "sha256sum < /tmp/read");
    ensure!(
        a.vm.guest(sum)? == b.vm.guest(other)?,
        "what one writes is not what the other reads"
    );
    b.persist("--out --preempt --param-rk=b1 --param-sark=a1 --prout-type=3")?;
    a.is_told("egistrations preempted")?;
    ensure!(!a.may(true)? && !a.may(false)?);
    ensure!(b.may(true)? && b.may(false)?);
    // A reset of the unit is told to both, and leaves the reservation.
    a.tool("sg_reset --device", 0)?;
    b.is_told("reset function occurred")?;
    ensure!(!a.may(false)?);
    Ok(())
}

/// The server is killed while both use the other disk, each a half of it; what was reserved has outlived it.
fn killed(server: Server, folder: &Path, a: &mut Machine, b: &mut Machine, kill: u32) -> Result<Server> {
    let load = |machine: &Machine, at: u32| {
        let disk = &machine.data;
        format!(
            "n=0; while [ $n -lt 24 ]; do dd if=/tmp/data of={disk} bs=64k seek=$(({at} + n * 16)) oflag=direct conv=fsync 2>&1 || break; \
             n=$((n + 1)); done; n=0; while [ $n -lt 24 ]; do \
             dd if={disk} bs=1M skip=$(({at} / 16 + n)) count=1 iflag=direct 2> /dev/null | cmp - /tmp/data || break; n=$((n + 1)); done; [ $n = 24 ]"
        )
    };
    let loads = [load(a, 0), load(b, 512)];
    a.vm.begin(&loads[0])?;
    b.vm.begin(&loads[1])?;
    std::thread::sleep(Duration::from_millis(1500 + 700 * u64::from(kill)));
    drop(server);
    let server = serve(folder)?;
    for (machine, load) in [(&mut *a, &loads[0]), (&mut *b, &loads[1])] {
        let (status, said) = machine.vm.end_of(load)?;
        ensure!(status == 0, "kill {kill}: {status}: {said}");
    }
    a.is_told("Power on")?;
    b.is_told("Power on")?;
    let reservation = a.persist("--read-reservation")?;
    ensure!(
        reservation.contains("0xb1") && reservation.contains("Exclusive Access"),
        "{reservation}"
    );
    ensure!(!a.may(true)? && b.may(true)?);
    Ok(server)
}

#[test]
fn two_guests_of_qemu_share_a_disk_by_reservations_and_a_server_that_is_killed() -> Result<()> {
    tell()
}
