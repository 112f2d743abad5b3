//! Machines whose processes are not smsvmm's, but this test's: they listen where they should, and end as they are told.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::virtual_disk::TransferRequest;
use api::{
    AdapterRequest, AttachRequest, Attachment, Condition, DeviceId, DiskChange, DiskConfig, DiskLimits,
    EventKind, EventLog, MachineDefinition, MachineState, MachineStatus, Problem, ProblemKind, RestartPolicy,
    StorageAnswer, StorageRequest, TracePage, Transfer, VmName,
};
use host_manager::{MachineOptions, Machines, MachinesConfig, Storage, Users};
use management::{ClientError, blocking};

/// In the environment of a process that is to be a machine.
const ARGUMENTS: &str = "SMSVMM_TEST_MACHINE";

/// This is a machine's process if it was started as one; else it is a test of nothing. What it does says a file beside its configuration.
#[test]
fn process() {
    let Ok(arguments) = std::env::var(ARGUMENTS) else {
        return;
    };
    let arguments: Vec<&str> = arguments.split_whitespace().collect();
    let ["run", "--report", report, config, ..] = arguments.as_slice() else {
        panic!("{arguments:?}");
    };
    let table: toml::Table = fs::read_to_string(config).unwrap().parse().unwrap();
    let socket = table["management"]["socket"].as_str().unwrap();
    let wanted = fs::read_to_string(Path::new(config).with_file_name("wanted")).unwrap_or_default();
    match wanted.trim() {
        "" => {
            let _ = fs::remove_file(socket);
            let listener = UnixListener::bind(socket).unwrap();
            // Until a signal ends it.
            for connection in listener.incoming() {
                let answer = "HTTP/1.1 200 OK\r\ncontent-length: 19\r\n\r\n{\"state\":\"running\"}";
                let mut connection = connection.unwrap();
                // Who only looks whether somebody is there asks nothing, and does not read it.
                if connection.read(&mut [0; 256]).is_ok_and(|read| read > 0) {
                    let _ = connection.write_all(answer.as_bytes());
                }
            }
        }
        status => {
            fs::write(report, format!("{{\"status\":{status},\"text\":\"as wanted\"}}")).unwrap();
            std::process::exit(status.parse().unwrap());
        }
    }
}

/// What is served: nothing. Who is refused by it has come through.
struct NoPools;

fn came_through<T>() -> Result<T, Problem> {
    Err(Problem::new(ProblemKind::NotFound, "there is no pool"))
}

impl Storage for NoPools {
    fn pool_name(&self, pool: Option<&str>) -> Option<String> {
        pool.map(str::to_owned)
    }

    fn storage(&self, _: Option<&str>, _: StorageRequest) -> Result<StorageAnswer, Problem> {
        came_through()
    }

    fn transfer(&self, _: Option<&str>, _: TransferRequest) -> Result<Transfer, Problem> {
        came_through()
    }

    fn attach(&self, _: AttachRequest) -> Result<Transfer, Problem> {
        came_through()
    }

    fn change(&self, _: &VmName, _: &DeviceId, _: &DiskChange) -> Result<Attachment, Problem> {
        came_through()
    }

    fn attach_adapter(&self, _: AdapterRequest) -> Result<Transfer, Problem> {
        came_through()
    }

    fn trace(&self, _: &VmName, _: &DeviceId, _: &str) -> Result<TracePage, Problem> {
        came_through()
    }

    fn change_group(&self, _: &VmName, _: &DeviceId, _: &DiskLimits) -> Result<DiskLimits, Problem> {
        came_through()
    }
}

struct Place {
    folder: tempfile::TempDir,
    events: Arc<EventLog>,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("program");
        let test = std::env::current_exe().unwrap();
        let script = format!(
            "#!/bin/sh\n{ARGUMENTS}=\"$*\" exec {} --exact process --nocapture\n",
            test.display()
        );
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Self {
            folder,
            events: Arc::default(),
        }
    }

    fn options(&self) -> MachineOptions {
        let path = |name: &str| self.folder.path().join(name);
        MachineOptions {
            state: path("state"),
            runtime: path("run"),
            program: path("program"),
            manager: path("manager.sock"),
            journal: false,
            machines: MachinesConfig {
                users: Users::Manager,
                ..MachinesConfig::default()
            },
        }
    }

    fn open(&self) -> Machines {
        self.open_with(self.options())
    }

    fn open_with(&self, options: MachineOptions) -> Machines {
        Machines::open(options, Arc::new(NoPools), Arc::clone(&self.events)).unwrap()
    }

    /// What the machine's process does from now on.
    fn want(&self, wanted: &str) {
        fs::write(self.folder.path().join("state/vms/web1/wanted"), wanted).unwrap();
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("run/vms/web1/management.sock")
    }

    fn ends(&self) -> Vec<(String, Option<u64>)> {
        let events = self.events.page(0, 1000).events;
        let ends = events.into_iter().filter_map(|event| match event.kind {
            EventKind::MachineEnded {
                reason,
                restart_seconds,
                ..
            } => Some((reason, restart_seconds)),
            _ => None,
        });
        ends.collect()
    }
}

fn name() -> VmName {
    "web1".parse().unwrap()
}

fn definition(restart: RestartPolicy) -> MachineDefinition {
    MachineDefinition {
        config: "name = \"web1\"\ncpus = 2\nmemory = \"256M\"\n[boot]\nkernel = \"/boot/vmlinuz\"\n[pool]\ndevices = [\"/d0\"]\n"
            .to_owned(),
        folder: None,
        autostart: false,
        restart,
    }
}

fn wait_for(machines: &Machines, state: MachineState) -> MachineStatus {
    let begun = Instant::now();
    loop {
        let status = machines.status(&name()).unwrap();
        if status.state == state {
            return status;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{status:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Ends a process that no manager ends.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_machine_lives_from_its_definition_to_its_deletion() {
    let place = Place::new();
    let machines = place.open();
    assert!(machines.list().is_empty());
    let defined = machines
        .define(
            &name(),
            definition(RestartPolicy::OnFailure),
            &Condition::default(),
        )
        .unwrap();
    assert_eq!((defined.state, defined.cpus), (MachineState::Stopped, 2));
    assert!(defined.console.is_some_and(|path| path.ends_with("serial.sock")));
    assert_eq!(machines.socket(&name()).unwrap_err().kind, ProblemKind::Conflict);
    machines.start(&name()).unwrap();
    let running = wait_for(&machines, MachineState::Running);
    assert_eq!(machines.socket(&name()).unwrap(), place.socket());
    // It is there already.
    assert_eq!(machines.start(&name()).unwrap().pid, running.pid);
    assert_eq!(
        machines.delete(&name(), &Condition::default()).unwrap_err().kind,
        ProblemKind::Conflict
    );
    machines.shut_down(&name()).unwrap();
    let stopped = wait_for(&machines, MachineState::Stopped);
    assert!(stopped.last_end.is_some_and(|end| end.contains("signal")));
    assert_eq!(stopped.restarts, 0);
    machines.start(&name()).unwrap();
    assert_ne!(wait_for(&machines, MachineState::Running).pid, running.pid);
    machines.stop(&name()).unwrap();
    wait_for(&machines, MachineState::Stopped);
    machines.delete(&name(), &Condition::default()).unwrap();
    assert_eq!(machines.status(&name()).unwrap_err().kind, ProblemKind::NotFound);
    assert!(!place.folder.path().join("state/vms/web1").exists());
}

#[test]
fn what_fails_is_started_again_later_and_later_until_nobody_wants_it() {
    let place = Place::new();
    let machines = place.open();
    machines
        .define(
            &name(),
            definition(RestartPolicy::OnFailure),
            &Condition::default(),
        )
        .unwrap();
    place.want("3");
    machines.start(&name()).unwrap();
    wait_for(&machines, MachineState::Waiting);
    assert_eq!(place.ends(), [("as wanted".to_owned(), Some(1))]);
    // It is well again before its next start.
    place.want("");
    let running = wait_for(&machines, MachineState::Running);
    assert_eq!(running.restarts, 1);
    machines.stop(&name()).unwrap();
    wait_for(&machines, MachineState::Stopped);
    // A wrong configuration is not better the next time.
    place.want("2");
    machines.start(&name()).unwrap();
    wait_for(&machines, MachineState::Failed);
    // A guest that has powered off has done what it wanted.
    place.want("0");
    machines.start(&name()).unwrap();
    wait_for(&machines, MachineState::Stopped);
    place.want("1");
    machines.start(&name()).unwrap();
    wait_for(&machines, MachineState::Waiting);
    // Nobody has to wait who does not want to.
    place.want("");
    machines.start(&name()).unwrap();
    wait_for(&machines, MachineState::Running);
    machines.close(|| false);
    assert_eq!(machines.start(&name()).unwrap_err().kind, ProblemKind::Stopping);
}

#[test]
fn a_new_manager_finds_what_runs() {
    let place = Place::new();
    let first = place.open();
    first
        .define(&name(), definition(RestartPolicy::Always), &Condition::default())
        .unwrap();
    first.start(&name()).unwrap();
    let pid = wait_for(&first, MachineState::Running).pid;
    first.leave();
    drop(first);
    let second = place.open();
    let found = second.status(&name()).unwrap();
    assert_eq!((found.state, found.pid), (MachineState::Running, pid));
    second.autostart();
    assert_eq!(second.list().len(), 1);
    // Its end is seen, though it is nobody's child here.
    second.shut_down(&name()).unwrap();
    wait_for(&second, MachineState::Stopped);
    drop(second);
    // One that ended while there was no manager, and should not have, is started by the next.
    let third = place.open();
    third.start(&name()).unwrap();
    let pid = wait_for(&third, MachineState::Running).pid.unwrap();
    third.leave();
    let killed = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(killed, rustix::process::Signal::KILL).unwrap();
    wait_for(&third, MachineState::Failed);
    drop(third);
    let fourth = place.open();
    assert_eq!(fourth.status(&name()).unwrap().state, MachineState::Stopped);
    fourth.autostart();
    assert_ne!(wait_for(&fourth, MachineState::Running).pid, Some(pid));
    fourth.stop(&name()).unwrap();
    wait_for(&fourth, MachineState::Stopped);
    fourth.autostart();
    assert_eq!(fourth.status(&name()).unwrap().state, MachineState::Stopped);
    drop(fourth);
    // What somebody else has started is not started twice.
    let mut outside = Command::new(place.options().program);
    let store = place.folder.path().join("state/vms/web1");
    outside
        .arg("run")
        .arg("--report")
        .arg(store.join("end"))
        .arg(store.join("vm.toml"));
    let outside = Killed(outside.spawn().unwrap());
    let fifth = place.open();
    let begun = Instant::now();
    while UnixStream::connect(place.socket()).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(5));
    }
    let started = fifth.start(&name()).unwrap();
    assert_eq!(started.pid, Some(outside.0.id()));
    fifth.stop(&name()).unwrap();
    wait_for(&fifth, MachineState::Stopped);
}

#[test]
fn machines_start_with_the_manager_and_end_with_it() {
    let place = Place::new();
    let machines = place.open();
    let wanted = MachineDefinition {
        autostart: true,
        ..definition(RestartPolicy::Always)
    };
    machines.define(&name(), wanted, &Condition::default()).unwrap();
    machines.autostart();
    wait_for(&machines, MachineState::Running);
    machines.close(|| false);
    assert_eq!(machines.status(&name()).unwrap().state, MachineState::Stopped);
    assert!(UnixStream::connect(place.socket()).is_err());
    let next = place.open();
    assert_eq!(next.status(&name()).unwrap().state, MachineState::Stopped);
    next.autostart();
    wait_for(&next, MachineState::Running);
    next.close(|| false);
}

#[test]
fn wrong_definitions_are_refused_and_nothing_is_kept_of_them() {
    let place = Place::new();
    let machines = place.open();
    let refused = |config: &str| {
        let wrong = MachineDefinition {
            config: config.to_owned(),
            ..definition(RestartPolicy::Never)
        };
        let problem = machines
            .define(&name(), wrong, &Condition::default())
            .unwrap_err();
        assert_eq!(problem.kind, ProblemKind::Invalid, "{problem}");
        problem.to_string()
    };
    assert!(refused("name = \"web1\"\ncpu = 2\n[pool]\ndevices = [\"/d\"]").contains("web1.toml:2"));
    assert!(refused("this is no TOML").contains("web1.toml:1"));
    let other = "name = \"db1\"\n[boot]\nkernel = \"/k\"\n[pool]\ndevices = [\"/d\"]";
    assert!(refused(other).contains("db1"));
    let dots: VmName = "..".parse().unwrap();
    let problem = machines
        .define(&dots, definition(RestartPolicy::Never), &Condition::default())
        .unwrap_err();
    assert_eq!(problem.kind, ProblemKind::Invalid);
    assert!(machines.list().is_empty());
    // One that cannot be read does not keep the others from running.
    machines
        .define(&name(), definition(RestartPolicy::Never), &Condition::default())
        .unwrap();
    fs::create_dir_all(place.folder.path().join("state/vms/bad")).unwrap();
    fs::write(place.folder.path().join("state/vms/bad/vm.toml"), "x").unwrap();
    let next = place.open();
    assert_eq!(next.list().len(), 1);
}

#[test]
fn a_definition_has_a_revision_which_only_its_changes_change() {
    let place = Place::new();
    let machines = place.open();
    let of = |revision: &str| Condition::parse(Some(&format!("\"{revision}\"")), None).unwrap();
    let define = |policy, condition: &Condition| {
        let defined = machines.define(&name(), definition(policy), condition);
        defined
            .map(|status| status.revision)
            .map_err(|problem| problem.kind)
    };
    assert_eq!(
        define(RestartPolicy::Never, &of("0")),
        Err(ProblemKind::Precondition)
    );
    assert!(machines.list().is_empty());
    let first = define(RestartPolicy::Never, &Condition::is_new()).unwrap();
    let again = define(RestartPolicy::Never, &Condition::is_new());
    assert_eq!(again, Err(ProblemKind::Precondition));
    assert_eq!(define(RestartPolicy::Never, &of(&first)).unwrap(), first);
    // It outlives the manager.
    assert_eq!(place.open().status(&name()).unwrap().revision, first);
    let second = define(RestartPolicy::Always, &of(&first)).unwrap();
    assert_ne!(first, second);
    assert_eq!(
        define(RestartPolicy::Never, &of(&first)),
        Err(ProblemKind::Precondition)
    );
    let deleted = machines.delete(&name(), &of(&first)).unwrap_err();
    assert_eq!(deleted.kind, ProblemKind::Precondition);
    machines.delete(&name(), &of(&second)).unwrap();
}

/// Whether this test may become another user.
fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A machine whose disk is the manager's.
fn managed(name: &str, disk: &str) -> MachineDefinition {
    MachineDefinition {
        config: format!(
            "name = \"{name}\"\nmemory = \"256M\"\n[boot]\nkernel = \"/boot/vmlinuz\"\n[[disk]]\nid = \"root\"\nfile = \"{disk}\"\n"
        ),
        ..definition(RestartPolicy::OnFailure)
    }
}

#[test]
fn a_machine_comes_to_its_disks_by_a_socket_of_its_own_and_to_nothing_else() {
    let place = Place::new();
    let machines = place.open();
    machines
        .define(&name(), managed("web1", "/web1.dsk"), &Condition::default())
        .unwrap();
    machines.start(&name()).unwrap();
    wait_for(&machines, MachineState::Running);
    let kind = |outcome: Result<(), ClientError>| match outcome {
        Err(ClientError::Problem(problem)) => problem.kind,
        other => panic!("{other:?}"),
    };
    let socket = place.folder.path().join("run/vms/web1/manager.sock");
    let connect = || UnixStream::connect(&socket).unwrap();
    let soon = Duration::from_secs(10);
    let attach = |vm: &str, file: &str| {
        let request = AttachRequest {
            vm: vm.parse().unwrap(),
            pool: None,
            disk: DiskConfig {
                image: None,
                file: Some(file.into()),
                ..DiskConfig::new("")
            },
            adapter: None,
            group_limits: None,
            goes_on: false,
            memory_stays: false,
        };
        kind(blocking::attach(&connect(), &request, soon))
    };
    let (through, refused) = (ProblemKind::NotFound, ProblemKind::Forbidden);
    assert_eq!(attach("web1", "/web1.dsk"), through);
    assert_eq!(attach("web1", "/db1.dsk"), refused);
    assert_eq!(attach("db1", "/web1.dsk"), refused);
    // The next manager knows what an administrator has attached.
    let more = DiskConfig {
        image: None,
        file: Some("/more.dsk".into()),
        ..DiskConfig::new("")
    };
    machines.allow_disk(&name(), &more).unwrap();
    assert_eq!(attach("web1", "/more.dsk"), through);
    machines.leave();
    drop(machines);
    let machines = place.open();
    assert_eq!(attach("web1", "/more.dsk"), through);
    let ask = |method: &str, path: &str, body: &serde_json::Value| {
        kind(blocking::ask::<serde_json::Value>(&connect(), method, path, body, soon).map(drop))
    };
    let none = serde_json::Value::Null;
    assert_eq!(ask("PUT", "/v1/vms/web1/start", &none), refused);
    assert_eq!(ask("GET", "/v1/vms/web1/vm", &none), refused);
    assert_eq!(ask("DELETE", "/v1/vms/web1", &none), refused);
    let limits = serde_json::json!({});
    assert_eq!(ask("PATCH", "/v1/attachments/web1/root", &limits), through);
    assert_eq!(ask("PATCH", "/v1/attachments/db1/root", &limits), refused);
    machines.stop(&name()).unwrap();
    wait_for(&machines, MachineState::Stopped);
    assert_eq!(
        machines.allow_disk(&name(), &more).unwrap_err().kind,
        ProblemKind::Conflict
    );
    assert!(!place.socket().exists());
}

#[test]
fn machines_are_kept_apart_by_users_where_the_manager_is_root() {
    let place = Place::new();
    let mut options = place.options();
    options.machines.users = Users::Range(3_000_000_000..=3_000_000_007);
    let machines = place.open_with(options.clone());
    machines
        .define(&name(), managed("web1", "/web1.dsk"), &Condition::default())
        .unwrap();
    machines.start(&name()).unwrap();
    let web = wait_for(&machines, MachineState::Running);
    if !is_root() {
        assert!(
            machines.notes().iter().any(|note| note.contains("not root")),
            "{:?}",
            machines.notes()
        );
        assert_eq!(web.user, None);
        machines.stop(&name()).unwrap();
        wait_for(&machines, MachineState::Stopped);
        return;
    }
    let status = |pid: u32| fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let (user, pid) = (web.user.unwrap(), web.pid.unwrap());
    assert!((3_000_000_000..=3_000_000_007).contains(&user));
    let seen = status(pid);
    assert!(
        seen.contains(&format!("Uid:\t{user}\t{user}\t{user}\t{user}\n")),
        "{seen}"
    );
    assert!(
        seen.contains(&format!("Gid:\t{user}\t{user}\t{user}\t{user}\n")),
        "{seen}"
    );
    // It may open any file until its sandbox takes that as well, and nothing else.
    for set in ["CapEff", "CapPrm", "CapBnd", "CapAmb"] {
        assert!(seen.contains(&format!("{set}:\t0000000000000002\n")), "{seen}");
    }
    let owner = fs::metadata(place.folder.path().join("run/vms/web1/manager.sock"))
        .unwrap()
        .uid();
    assert_eq!(owner, user);
    let db: VmName = "db1".parse().unwrap();
    machines
        .define(&db, managed("db1", "/db1.dsk"), &Condition::default())
        .unwrap();
    machines.start(&db).unwrap();
    let other = machines.status(&db).unwrap().user;
    assert!(other.is_some() && other != Some(user), "{other:?}");
    machines.stop(&db).unwrap();
    machines.leave();
    drop(machines);
    // The next manager finds it, and it has the same user when it is started again.
    let machines = place.open_with(options);
    let found = machines.status(&name()).unwrap();
    assert_eq!((found.pid, found.user), (Some(pid), Some(user)));
    machines.stop(&name()).unwrap();
    wait_for(&machines, MachineState::Stopped);
    machines.start(&name()).unwrap();
    assert_eq!(wait_for(&machines, MachineState::Running).user, Some(user));
    machines.close(|| true);
}

#[test]
fn a_machine_has_a_control_group_where_there_are_any() {
    let place = Place::new();
    let machines = place.open();
    machines
        .define(
            &name(),
            definition(RestartPolicy::OnFailure),
            &Condition::default(),
        )
        .unwrap();
    machines.start(&name()).unwrap();
    let running = wait_for(&machines, MachineState::Running);
    let Some(group) = running.control_group else {
        assert!(
            machines.notes().iter().any(|note| note.contains("control group")),
            "{:?}",
            machines.notes()
        );
        machines.stop(&name()).unwrap();
        wait_for(&machines, MachineState::Stopped);
        return;
    };
    let pid = running.pid.unwrap();
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(groups.contains("/vm-web1\n"), "{groups}");
    // The next manager has it, too.
    machines.leave();
    drop(machines);
    let machines = place.open();
    assert_eq!(
        machines.status(&name()).unwrap().control_group.as_ref(),
        Some(&group)
    );
    // Whatever it does not hear, it is ended.
    let stopped = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(stopped, rustix::process::Signal::STOP).unwrap();
    machines.stop(&name()).unwrap();
    assert_eq!(machines.status(&name()).unwrap().state, MachineState::Stopping);
    machines.stop(&name()).unwrap();
    wait_for(&machines, MachineState::Stopped);
    assert!(!group.exists());
}
