//! A host with a manager: machines on its pools, reconfigured from elsewhere while they write; the manager killed and started again under
//! them; a machine killed, and started again by the manager.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use stories::{Disk, Host, Pool, Server, Story, Vm};

const DEVICES: [&str; 4] = ["d0.img", "d1.img", "d2.img", "d3.img"];
/// Writes, and reads what was written; counts, or says that it went wrong.
const LOAD: &str = "n=0\n\
    while dd if=/dev/urandom of=/vda/new bs=256k count=4 && sync && sha256sum /vda/new > /vda/sum && echo 3 > /proc/sys/vm/drop_caches && sha256sum -c /vda/sum\n\
    do n=$((n + 1)); echo $n > /rounds\n\
    done\n\
    echo failed > /rounds\n";
const ADDRESS: &str = "127.0.0.1:7443";
const HOST: &str = "name = \"host1\"\nstate = \"state\"\nruntime = \"run\"\n[management]\nsocket = \"run/manager.sock\"\n\
    [[pool]]\ndevices = [\"d0.img\", \"d1.img\", \"d2.img\", \"d3.img\"]\n";
/// How long the whole may take.
const PATIENCE: Duration = Duration::from_secs(400);

/// Makes somebody known; the file by which it comes.
fn principal(host: &Host, name: &str, role: &str) -> Result<String> {
    let said = host.administer(&format!("principal add {name} --role {role}"))?;
    let token = said.lines().next().unwrap_or_default();
    ensure!(token.starts_with("smsvmm_"), "{said}");
    fs::write(host.folder().join(format!("{name}.token")), token)?;
    let file = format!("{name}.toml");
    let text = format!(
        "[remote]\naddress = \"localhost:7443\"\nca = \"tls/ca.pem\"\ntoken-file = \"{name}.token\"\n"
    );
    fs::write(host.folder().join(&file), text)?;
    Ok(file)
}

fn serve(host: &Host) -> Result<Server> {
    Server::speaking(
        host.smsvmm(),
        host.folder(),
        &["serve", "host.toml"],
        "is managed at",
    )
}

fn gateway(host: &Host) -> Result<Server> {
    Server::speaking(
        host.smsvmm(),
        host.folder(),
        &["gateway", "gateway.toml"],
        "can be managed at",
    )
}

/// What must not work; what it says.
fn refused(host: &Host, command: &str) -> Result<String> {
    let words: Vec<&str> = command.split(' ').collect();
    let output = host.run_smsvmm(&words)?;
    ensure!(!output.success(), "{command}: {}", output.text());
    Ok(output.text())
}

/// This program as the machine's console.
fn console(host: &Host, name: &str) -> Result<Vm> {
    let mut command = Command::new(host.smsvmm());
    command.args(["vm", "console", "--config", "../host.toml", "--vm", name]);
    Vm::launch(command, &host.folder().join(name), PATIENCE)
}

/// The machine's process, if it runs.
fn running(host: &Host) -> Result<Option<i32>> {
    let list = host.administer("vm list --config host.toml")?;
    let words: Vec<&str> = list
        .lines()
        .last()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    Ok(match words.as_slice() {
        [_, "running", pid, ..] => pid.parse().ok(),
        _ => None,
    })
}

/// The machine's process is of a user of its own, without any capability, and in a control group of its own.
fn is_apart(host: &Host) -> Result<()> {
    let pid = running(host)?.context("a process")?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    for expected in ["Uid:\t19000", "Gid:\t19000", "CapEff:\t0000000000000000\n"] {
        ensure!(status.contains(expected), "{expected}: {status}");
    }
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    ensure!(groups.contains("/vm-web1\n"), "{groups}");
    let shown = host.administer("vm status web1 --config host.toml")?;
    ensure!(shown.contains("process of user 19000"), "{shown}");
    Ok(())
}

/// Waits until the guest's load has gone on.
fn goes_on(vm: &mut Vm) -> Result<()> {
    let rounds = vm.guest("cat /rounds")?;
    let rounds = rounds.trim();
    ensure!(rounds.parse::<u32>().is_ok(), "{rounds}");
    vm.guest_until(&format!("[ $(cat /rounds) != {rounds} ]"))
}

#[test]
fn a_host_is_managed_from_elsewhere_while_its_machines_write() {
    Story::default().agent().limit(PATIENCE).tell(|host| {
        for device in DEVICES {
            host.image(device, 1024)?;
        }
        let pool = Pool::create(host, &DEVICES)?;
        fs::write(host.folder().join("host.toml"), HOST)?;
        let manager = serve(host)?;
        let local = |command: &str| host.administer(&format!("{command} --config host.toml"));
        local("disk create /vm/web1.dsk --size 96M --volume safe")?;
        local("disk create /vm/data.dsk --size 16M --volume safe")?;
        host.vm("web1")
            .cpus(2)
            .disk(Disk::in_pool("/vm/web1.dsk"))
            .disk(Disk::in_pool("/vm/data.dsk").set("bus", "\"virtio-scsi\"").serial("data"))
            .file("/load", 0o644, LOAD)
            .with_agent()?
            .toml("[power]\nshutdown-timeout = \"3s\"\n[expanded-api]\nallow = [\"create\"]\nobjects = [\"/vm/own/*\"]\nvolumes = [\"safe\"]\n")
            .answering()
            .written()?;
        local("vm define web1/vm.toml --autostart")?;
        let started = local("vm start web1")?;
        assert!(started.contains("web1: running"), "{started}");
        let mut vm = console(host, "web1")?;
        vm.wait_until_ready()?;
        is_apart(host)?;
        vm.guest("mke2fs -q /dev/vda > /dev/null; mkdir /vda; mount -t ext4 /dev/vda /vda; echo 0 > /rounds")?;
        vm.guest("sh /load > /dev/null 2>&1 & echo")?;
        // A SCSI disk; the guest makes one more by it.
        vm.guest_until("[ -b /dev/sda ]")?;
        vm.guest("dd if=/load of=/dev/sda bs=4k conv=sync,fsync 2> /dev/null")?;
        let made = vm.guest("sms-agent disk create /vm/own/more.dsk --size 16M --volume safe")?;
        assert_eq!(made.trim_end(), "/vm/own/more.dsk: /dev/sdb");
        vm.guest("dd if=/load of=/dev/sdb bs=4k conv=sync,fsync 2> /dev/null")?;
        let stranger = vm.guest("sms-agent disk status /vm/none.dsk 2>&1; echo")?;
        assert!(stranger.contains("no disk of this guest"), "{stranger}");
        let used = refused(host, "disk delete /vm/web1.dsk --config host.toml")?;
        assert!(used.contains("/vm/web1.dsk"), "{used}");

        host.administer("certificate init tls --host localhost --host 127.0.0.1")?;
        let root = principal(host, "root", "administrator")?;
        let looker = principal(host, "looker", "viewer")?;
        let text = format!(
            "listen = \"{ADDRESS}\"\ncertificate = \"tls/server.pem\"\nkey = \"tls/server.key\"\nclient-ca = \"tls/ca.pem\"\n\
             access = \"access.toml\"\naudit = \"audit.log\"\nmanager = \"host.toml\"\n"
        );
        fs::write(host.folder().join("gateway.toml"), text)?;
        let gate = gateway(host)?;
        let far = |command: &str| host.administer(&format!("{command} --config {root}"));
        let list = host.administer(&format!("vm list --config {looker}"))?;
        assert!(list.contains("web1") && list.contains("running"), "{list}");
        let may_not = refused(host, &format!("vm stop web1 --config {looker}"))?;
        assert!(may_not.contains("operator"), "{may_not}");

        // Storage changes under the guest, from elsewhere.
        far("volume resize safe --size 640M")?;
        far("disk snapshot --name noon /vm/web1.dsk")?;
        host.image("d4.img", 1024)?;
        let new = host.folder().join("d4.img");
        far(&format!("device replace d0 {} --force", new.display()))?;
        goes_on(&mut vm)?;

        // The manager is killed in the middle of a job, which goes on in the next one.
        fs::write(host.folder().join("host.toml"), HOST.replace("d0.img", "d4.img"))?;
        let mut job = Command::new(host.smsvmm());
        let layout = format!("volume set-layout safe --layout raid5 --columns 3 --throttle 256K --config {root}");
        job.args(layout.split(' ')).current_dir(host.folder());
        let mut job = job.spawn()?;
        let begun = Instant::now();
        while !far("job list")?.contains("set-layout") {
            ensure!(job.try_wait()?.is_none(), "the job has ended already");
            ensure!(begun.elapsed() < Duration::from_secs(60), "{}", far("job list --all")?);
        }
        drop(manager);
        let down = refused(host, &format!("pool status --config {root}"))?;
        assert!(down.contains("does not answer"), "{down}");
        // Who waited for the job does not any more.
        job.wait()?;
        let manager = serve(host)?;
        let found = local("events")?;
        assert!(found.contains("web1 runs already"), "{found}");
        let list = far("job list")?;
        let job = list.lines().nth(1).and_then(|line| line.split_whitespace().next());
        far(&format!("job throttle {} 0", job.context("no job")?))?;
        far("job wait")?;
        let layout = far("volume list")?;
        assert!(layout.contains("raid5"), "{layout}");
        goes_on(&mut vm)?;
        // As after an upgrade.
        let begun = Instant::now();
        manager.signal(Signal::HUP)?;
        loop {
            // It does not answer for a moment.
            let said = host.run_smsvmm(&["events", "--config", "host.toml"])?;
            let found = said.text().matches("web1 runs already").count();
            if said.success() && found == 2 && said.text().contains("the manager ends: SIGHUP") {
                break;
            }
            ensure!(begun.elapsed() < Duration::from_secs(60), "{}", said.text());
        }
        goes_on(&mut vm)?;
        vm.guest("echo 3 > /proc/sys/vm/drop_caches; for disk in sda sdb; do head -c $(wc -c < /load) /dev/$disk | cmp - /load || exit 1; done")?;
        vm.guest("sms-agent disk detach /dev/sdb")?;
        vm.guest_until("[ ! -e /dev/sdb ]")?;
        let status = local("vm status web1")?;
        assert!(status.contains("/vm/data.dsk") && !status.contains("more.dsk"), "{status}");
        local("debug trace --vm web1 disk1 --once")?;
        assert_eq!(vm.guest("dmesg | grep -ci 'i/o error' || true")?, "0\n");
        far("disk export /vm/web1.dsk@noon noon.raw")?;

        // The machine is killed; the manager starts it again, and its disk is well.
        let killed = running(host)?.context("a process")?;
        kill_process(Pid::from_raw(killed).context("a process")?, Signal::KILL)?;
        drop(vm);
        while running(host)?.is_none_or(|pid| pid == killed) {
            ensure!(begun.elapsed() < PATIENCE, "{}", local("vm list")?);
        }
        is_apart(host)?;
        let mut vm = console(host, "web1")?;
        vm.wait_until_ready()?;
        vm.guest("mkdir /vda; mount -t ext4 /dev/vda /vda; sha256sum -c /vda/sum || sync")?;
        let restarted = local("vm list --json")?.replace(' ', "");
        assert!(restarted.contains("\"restarts\":1"), "{restarted}");
        vm.guest("umount /vda")?;

        host.administer("principal revoke root")?;
        let stranger = refused(host, &format!("pool status --config {root}"))?;
        assert!(stranger.contains("not known"), "{stranger}");
        gate.end()?;
        let audit = fs::read_to_string(host.folder().join("audit.log"))?;
        for expected in ["resize-volume", "replace-device", "raid5", "\"status\":403", "\"looker\""] {
            assert!(audit.contains(expected), "{expected}: {audit}");
        }
        // It ends in order: machines, disks, pool.
        manager.end()?;
        let list = refused(host, "vm list --config host.toml")?;
        assert!(list.contains("nobody answers"), "{list}");
        host.administer("file check --config host.toml")?;
        drop(pool);
        Ok(())
    });
}
