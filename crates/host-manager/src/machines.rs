//! Machines: their definitions, and their processes from start to end.
//!
//! ```text
//!                 start                    answers at its socket
//!   Stopped ───────────────► Starting ─────────────────────────► Running
//!      ▲                        │                                   │ shut down, stop
//!      │ delete: gone           ▼ ends                              ▼
//!      ├──────────────── wanted? policy? ◄────────────────────── Stopping
//!      │ no                     │ yes
//!   (Failed)                 Waiting ── so long, then a new process ─► Starting
//! ```
//!
//! Each machine that is not at rest has a thread, which starts its process, waits for the end of it, and decides what follows. What a person wants
//! is noted in the table; the thread looks there when it has to decide.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use api::{
    ByteSize, Condition, DiskConfig, EventKind, EventLog, ExpandedPolicy, MachineDefinition, MachineState,
    MachineStatus, NetBackend, Problem, ProblemKind, RestartPolicy, VmName,
};
use management::{Server, ServerHandle};
use rustix::process::Signal;
use vmm::config::{ConsoleSpec, ManagementConfig, VmConfig};

use crate::config::MachinesConfig;
use crate::door::{Door, Rights, Storage};
use crate::group::{Group, Groups, Limits};
use crate::process::{End, EndKind, Process, Start, answers, signal};
use crate::store::{self, Files, StartRules, Store};
use crate::users::{User, UserPlan};

/// The wait before a machine is started again for the first time; each time more doubles it.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// Between two looks whether a machine that was started answers.
const LOOK: Duration = Duration::from_millis(50);
/// The longest such wait.
const LONGEST_WAIT: Duration = Duration::from_secs(64);
/// A machine that ran for so long begins with the first wait again.
const STEADY: Duration = Duration::from_secs(60);

/// What machines are started with.
#[derive(Debug, Clone)]
pub struct MachineOptions {
    /// Where definitions are kept.
    pub state: PathBuf,
    /// Where sockets are.
    pub runtime: PathBuf,
    /// `smsvmm`.
    pub program: PathBuf,
    /// The manager's socket, for machines that have no pool of their own.
    pub manager: PathBuf,
    /// What machines say goes to systemd's journal, too.
    pub journal: bool,
    /// What host.toml says of machines.
    pub machines: MachinesConfig,
}

/// Where a machine is.
#[derive(Debug)]
enum Life {
    Rest { failed: bool },
    Alive(Alive),
    Waiting,
}

#[derive(Debug)]
struct Alive {
    pid: u32,
    handle: OwnedFd,
    /// It has answered.
    answers: bool,
    asked: Asked,
    group: Option<Group>,
}

/// What its process was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Asked {
    Nothing,
    /// To press the power button.
    ShutDown,
    /// To end at once, and to close well what it has open.
    Stop,
}

#[derive(Debug)]
struct Machine {
    plan: Plan,
    rules: StartRules,
    /// Names its definition.
    revision: String,
    files: Files,
    /// Those of the manager's disks that it may use.
    rights: Arc<Rights>,
    /// Where it asks for them.
    door: Option<ServerHandle>,
    /// The number of the user as whom it was started last, if not the manager's.
    user: Option<u32>,
    life: Life,
    /// Somebody wants it to run.
    wanted: bool,
    restarts: u32,
    last_end: Option<String>,
}

/// What matters here of a machine's definition.
#[derive(Debug, Default)]
struct Plan {
    cpus: u8,
    memory: ByteSize,
    console: Option<PathBuf>,
    limits: Limits,
    /// It asks the manager for its disks.
    managed: bool,
    /// It has interfaces of the host as network cards.
    network: bool,
    disks: Vec<DiskConfig>,
    /// What its guest may ask of storage management.
    expanded_api: ExpandedPolicy,
}

impl Plan {
    fn new(config: &VmConfig, options: &MachineOptions) -> Self {
        let (own, usual) = (&config.resources, &options.machines);
        let memory = config.memory.size;
        let with = |overhead: ByteSize| memory.bytes().saturating_add(overhead.bytes());
        Self {
            cpus: config.cpus.count,
            memory,
            console: console(config),
            limits: Limits {
                cpu_weight: own.cpu_weight.or(usual.cpu_weight),
                cpu_max: own.cpu_max.or(usual.cpu_max),
                memory_max: own
                    .memory_max
                    .map(ByteSize::bytes)
                    .or(usual.memory_overhead.map(with)),
                pids_max: own.pids_max.or(usual.pids_max),
            },
            managed: config.manager.as_ref() == Some(&options.manager),
            network: config.nets.iter().any(|net| net.backend == NetBackend::Tap),
            disks: config.disks.clone(),
            expanded_api: config.expanded_api.clone(),
        }
    }
}

#[derive(Debug, Default)]
struct Table {
    machines: BTreeMap<VmName, Machine>,
    /// Nothing is started any more.
    closed: bool,
}

struct Shared {
    options: MachineOptions,
    store: Store,
    events: Arc<EventLog>,
    storage: Arc<dyn Storage>,
    users: UserPlan,
    groups: Option<Groups>,
    /// What cannot be done here.
    notes: Vec<String>,
    table: Mutex<Table>,
    /// A machine has come to rest, or a wait is over before its time.
    changed: Condvar,
}

/// The machines of a manager.
pub struct Machines(Arc<Shared>);

fn none(name: &VmName) -> Problem {
    Problem::new(ProblemKind::NotFound, "there is no such machine")
        .about(name)
        .remedy("`smsvmm vm list` lists them, `smsvmm vm define` makes one")
}

fn cannot_note(name: &VmName, error: &std::io::Error) -> Problem {
    let text = format!("which disks it may use cannot be noted: {error}");
    Problem::new(ProblemKind::Host, text).about(name)
}

/// Whether its console leads to a socket, and to which.
fn console(config: &VmConfig) -> Option<PathBuf> {
    match &config.console.serial {
        ConsoleSpec::Socket(path) => Some(path.clone()),
        _ => None,
    }
}

impl Machines {
    /// Reads the definitions, and finds the processes of machines that run, which get their disks from `storage`. A definition that cannot be
    /// read is told, and left alone. That machines cannot be kept apart on this host is told, too.
    ///
    /// # Errors
    /// The folders cannot be made or read, or there is no such user.
    pub fn open(
        options: MachineOptions,
        storage: Arc<dyn Storage>,
        events: Arc<EventLog>,
    ) -> Result<Self, Problem> {
        let store = Store::open(&options.state, &options.runtime)?;
        let names = store.names()?;
        let invalid = |text| Problem::new(ProblemKind::Invalid, text);
        let (users, note) = UserPlan::new(&options.machines.users).map_err(invalid)?;
        let mut notes: Vec<String> = note.into_iter().collect();
        let groups = Groups::open(options.machines.control_group.as_deref(), &options.state);
        let groups = groups
            .map_err(|why| notes.push(format!("machines have no control groups of their own: {why}")))
            .ok();
        for note in &notes {
            tracing::warn!("{note}");
        }
        let this = Self(Arc::new(Shared {
            options,
            store,
            events,
            storage,
            users,
            groups,
            notes,
            table: Mutex::default(),
            changed: Condvar::new(),
        }));
        for name in names {
            if let Err(problem) = this.0.load(&name) {
                tracing::error!(machine = %name, %problem, "a definition cannot be used");
            }
        }
        this.0.adopt();
        Ok(this)
    }

    /// What the manager cannot do for machines on this host, for people.
    pub fn notes(&self) -> &[String] {
        &self.0.notes
    }

    /// See [`api::Host::allow_disk`].
    ///
    /// # Errors
    /// As there.
    pub fn allow_disk(&self, name: &VmName, disk: &DiskConfig) -> Result<(), Problem> {
        let table = self.0.lock();
        let machine = table.machines.get(name).ok_or_else(|| none(name))?;
        machine.is_alive(name)?;
        machine
            .rights
            .allow(disk)
            .map_err(|error| cannot_note(name, &error))
    }

    /// Starts the machines that are to be started with the manager, and those that have ended while there was none.
    pub fn autostart(&self) {
        let names: Vec<VmName> = {
            let table = self.0.lock();
            let rest = |machine: &&Machine| {
                let lost = machine.rules.restart != RestartPolicy::Never && machine.files.wanted.exists();
                (machine.rules.autostart || lost) && matches!(machine.life, Life::Rest { .. })
            };
            let machines = table.machines.iter();
            machines
                .filter(|(_, machine)| rest(machine))
                .map(|(name, _)| name.clone())
                .collect()
        };
        for name in names {
            if let Err(problem) = self.start(&name) {
                tracing::error!(machine = %name, %problem, "a machine cannot be started");
            }
        }
    }

    /// See [`api::Host::define`].
    ///
    /// # Errors
    /// As there.
    pub fn define(
        &self,
        name: &VmName,
        definition: MachineDefinition,
        condition: &Condition,
    ) -> Result<MachineStatus, Problem> {
        let config = self.0.complete(name, &definition)?;
        let rules = StartRules {
            autostart: definition.autostart,
            restart: definition.restart,
        };
        let text = toml::to_string(&config).map_err(|error| {
            Problem::new(
                ProblemKind::Host,
                format!("the definition cannot be stored: {error}"),
            )
        })?;
        // The lock is held, so that nobody starts what is half there.
        let mut table = self.0.lock();
        let current = table.machines.get(name);
        let revision = current.map(|machine| machine.revision.as_str());
        condition.check(revision).map_err(|problem| problem.about(name))?;
        self.0.store.write(name, &text, rules)?;
        self.0
            .enter(&mut table, name, &config, rules, store::revision(&text, rules))?;
        drop(table);
        self.0
            .events
            .record(EventKind::MachineDefined { vm: name.clone() });
        self.status(name)
    }

    /// See [`api::Host::start`].
    ///
    /// # Errors
    /// As there.
    pub fn start(&self, name: &VmName) -> Result<MachineStatus, Problem> {
        let mut table = self.0.lock();
        if table.closed {
            return Err(Problem::new(
                ProblemKind::Stopping,
                "the manager ends, and starts nothing any more",
            ));
        }
        let machine = table.machines.get_mut(name).ok_or_else(|| none(name))?;
        match &machine.life {
            Life::Alive(alive) if alive.asked > Asked::Nothing => {
                let problem = Problem::new(ProblemKind::Conflict, "it is being stopped").about(name);
                return Err(problem.remedy("start it when `smsvmm vm list` shows it as stopped"));
            }
            Life::Alive(_) => machine.want(true),
            Life::Waiting => {
                machine.want(true);
                machine.restarts = 0;
                machine.life = Life::Rest { failed: false };
                // Its thread starts it now.
                self.0.changed.notify_all();
            }
            Life::Rest { .. } => {
                let process = self.0.begin(&mut table, name)?;
                if let Some(machine) = table.machines.get_mut(name) {
                    machine.want(true);
                    machine.restarts = 0;
                }
                self.0.watch(name, process);
            }
        }
        drop(table);
        self.status(name)
    }

    /// See [`api::Host::shut_down`].
    ///
    /// # Errors
    /// As there.
    pub fn shut_down(&self, name: &VmName) -> Result<MachineStatus, Problem> {
        self.end(name, Asked::ShutDown)
    }

    /// See [`api::Host::stop`].
    ///
    /// # Errors
    /// As there.
    pub fn stop(&self, name: &VmName) -> Result<MachineStatus, Problem> {
        self.end(name, Asked::Stop)
    }

    fn end(&self, name: &VmName, how: Asked) -> Result<MachineStatus, Problem> {
        let mut table = self.0.lock();
        let machine = table.machines.get_mut(name).ok_or_else(|| none(name))?;
        machine.end(how);
        self.0.changed.notify_all();
        drop(table);
        self.status(name)
    }

    /// See [`api::Host::delete`].
    ///
    /// # Errors
    /// As there.
    pub fn delete(&self, name: &VmName, condition: &Condition) -> Result<(), Problem> {
        let mut table = self.0.lock();
        let machine = table.machines.get(name).ok_or_else(|| none(name))?;
        let revision = Some(machine.revision.as_str());
        condition.check(revision).map_err(|problem| problem.about(name))?;
        let runs = match machine.life {
            Life::Rest { .. } => None,
            Life::Alive(_) => Some("it runs"),
            Life::Waiting => Some("it is about to be started again"),
        };
        if let Some(runs) = runs {
            let problem = Problem::new(ProblemKind::Conflict, runs).about(name);
            return Err(problem.remedy("`smsvmm vm shutdown` or `smsvmm vm stop` ends it"));
        }
        self.0.store.remove(name)?;
        let gone = table.machines.remove(name);
        drop(table);
        // Its server may take a moment.
        drop(gone);
        self.0
            .events
            .record(EventKind::MachineDeleted { vm: name.clone() });
        Ok(())
    }

    /// How a machine is.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn status(&self, name: &VmName) -> Result<MachineStatus, Problem> {
        let table = self.0.lock();
        let machine = table.machines.get(name).ok_or_else(|| none(name))?;
        Ok(machine.status(name))
    }

    /// How all are, in the order of their names.
    pub fn list(&self) -> Vec<MachineStatus> {
        let table = self.0.lock();
        let machines = table.machines.iter();
        machines.map(|(name, machine)| machine.status(name)).collect()
    }

    /// What a machine's guest may ask of storage management by its disks; none if there is no machine of this name.
    pub fn policy(&self, name: &VmName) -> Option<ExpandedPolicy> {
        let table = self.0.lock();
        table
            .machines
            .get(name)
            .map(|machine| machine.plan.expanded_api.clone())
    }

    /// See [`api::Host::machine_socket`].
    ///
    /// # Errors
    /// As there.
    pub fn socket(&self, name: &VmName) -> Result<PathBuf, Problem> {
        let table = self.0.lock();
        let machine = table.machines.get(name).ok_or_else(|| none(name))?;
        machine.is_alive(name)?;
        Ok(machine.files.management.clone())
    }

    /// Starts nothing any more, asks all guests to shut down, and waits until all processes have ended; when `hurry` says so, they are
    /// stopped hard.
    pub fn close(&self, mut hurry: impl FnMut() -> bool) {
        let mut table = self.0.lock();
        table.closed = true;
        table
            .machines
            .values_mut()
            .for_each(|machine| machine.end(Asked::ShutDown));
        self.0.changed.notify_all();
        while table
            .machines
            .values()
            .any(|machine| !matches!(machine.life, Life::Rest { .. }))
        {
            let waited = self.0.changed.wait_timeout(table, Duration::from_millis(200));
            table = waited.unwrap_or_else(PoisonError::into_inner).0;
            if hurry() {
                table
                    .machines
                    .values_mut()
                    .for_each(|machine| machine.end(Asked::Stop));
            }
        }
        drop(table);
        self.close_doors();
    }

    /// Starts nothing any more; processes go on without this manager.
    pub fn leave(&self) {
        self.0.lock().closed = true;
        self.0.changed.notify_all();
        self.close_doors();
    }

    /// Nobody is served here any more.
    fn close_doors(&self) {
        let doors = |table: &mut Table| -> Vec<ServerHandle> {
            let machines = table.machines.values_mut();
            machines.filter_map(|machine| machine.door.take()).collect()
        };
        let closing = doors(&mut self.0.lock());
        // Each may take a moment.
        drop(closing);
    }
}

impl Machine {
    fn want(&mut self, wanted: bool) {
        self.wanted = wanted;
        self.files.want(wanted);
    }

    fn is_alive(&self, name: &VmName) -> Result<(), Problem> {
        match self.life {
            Life::Alive(_) => Ok(()),
            _ => {
                let problem = Problem::new(ProblemKind::Conflict, "it does not run").about(name);
                Err(problem.remedy(format!("`smsvmm vm start {name}` starts it")))
            }
        }
    }

    /// Whether it has this process, which has not answered yet.
    fn is_starting(&self, pid: u32) -> bool {
        matches!(&self.life, Life::Alive(alive) if alive.pid == pid && !alive.answers)
    }

    /// Asks its process to end. `smsvmm run` takes the first signal as the power button, and the second as the plug.
    fn end(&mut self, how: Asked) {
        self.want(false);
        // Of one that waits, its thread sees that it is not wanted.
        let Life::Alive(alive) = &mut self.life else {
            return;
        };
        let signals: &[Signal] = match (alive.asked, how) {
            (Asked::Nothing, Asked::ShutDown) => &[Signal::TERM],
            // Two of one kind might be one.
            (Asked::Nothing, Asked::Stop) => &[Signal::TERM, Signal::INT],
            (Asked::ShutDown, Asked::Stop) => &[Signal::INT],
            // It does not hear.
            (Asked::Stop, Asked::Stop) => &[Signal::KILL],
            _ => &[],
        };
        let kill = (alive.asked, how) == (Asked::Stop, Asked::Stop);
        // With its helpers; a kernel before 5.14 cannot do that.
        if !(kill && alive.group.as_ref().is_some_and(|group| group.kill().is_ok())) {
            signals.iter().for_each(|one| signal(&alive.handle, *one));
        }
        alive.asked = alive.asked.max(how);
    }

    fn status(&self, name: &VmName) -> MachineStatus {
        let (state, pid) = match &self.life {
            Life::Rest { failed: true } => (MachineState::Failed, None),
            Life::Rest { failed: false } => (MachineState::Stopped, None),
            Life::Waiting => (MachineState::Waiting, None),
            Life::Alive(alive) => {
                let state = match (alive.asked > Asked::Nothing, alive.answers) {
                    (true, _) => MachineState::Stopping,
                    (false, true) => MachineState::Running,
                    (false, false) => MachineState::Starting,
                };
                (state, Some(alive.pid))
            }
        };
        MachineStatus {
            name: name.clone(),
            state,
            pid,
            user: self.user,
            control_group: match &self.life {
                Life::Alive(alive) => alive.group.as_ref().map(|group| group.path().to_owned()),
                _ => None,
            },
            cpus: self.plan.cpus,
            memory: self.plan.memory,
            autostart: self.rules.autostart,
            restart: self.rules.restart,
            revision: self.revision.clone(),
            restarts: self.restarts,
            last_end: self.last_end.clone(),
            config: self.files.config.clone(),
            log: self.files.log.clone(),
            console: self.plan.console.clone(),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A definition as it is kept: complete, and with the manager's sockets.
    fn complete(&self, name: &VmName, definition: &MachineDefinition) -> Result<VmConfig, Problem> {
        let files = self.store.files(name)?;
        let invalid = |text: String| Problem::new(ProblemKind::Invalid, text).about(name);
        let shown = PathBuf::from(format!("{name}.toml"));
        let folder = definition.folder.clone().unwrap_or_else(|| "/".into());
        if !folder.is_absolute() {
            return Err(invalid(format!(
                "the folder {} is not absolute",
                folder.display()
            )));
        }
        let own: toml::Table = toml::from_str(&definition.config).unwrap_or_default();
        let mut overrides = Vec::new();
        if !own.contains_key("pool") && !own.contains_key("manager") {
            overrides.push(format!("manager={}", self.options.manager.display()));
        }
        let config = VmConfig::from_text(&definition.config, &shown, &folder, &overrides);
        let mut config = config.map_err(|error| invalid(block_io::error_chain(&error)))?;
        if config.name != *name {
            return Err(invalid(format!("its vm.toml has the name {}", config.name)));
        }
        config.management = Some(ManagementConfig {
            socket: files.management,
        });
        if config.console.serial == ConsoleSpec::Stdio {
            config.console.serial = ConsoleSpec::Socket(files.serial);
        }
        if config.console.virtio == Some(ConsoleSpec::Stdio) {
            return Err(invalid(
                "console.virtio cannot be \"stdio\": a machine of a manager has no terminal; use \"socket:PATH\"".to_owned(),
            ));
        }
        Ok(config)
    }

    /// Takes a definition from the store into the table.
    fn load(&self, name: &VmName) -> Result<(), Problem> {
        let (text, rules) = self.store.read(name)?;
        let files = self.store.files(name)?;
        let folder = files.config.parent().map(PathBuf::from).unwrap_or_default();
        let config = VmConfig::from_text(&text, &files.config, &folder, &[]);
        let config =
            config.map_err(|error| Problem::new(ProblemKind::Host, block_io::error_chain(&error)))?;
        let revision = store::revision(&text, rules);
        self.enter(&mut self.lock(), name, &config, rules, revision)
    }

    fn enter(
        &self,
        table: &mut Table,
        name: &VmName,
        config: &VmConfig,
        rules: StartRules,
        revision: String,
    ) -> Result<(), Problem> {
        let files = self.store.files(name)?;
        let machine = table.machines.entry(name.clone()).or_insert_with(|| Machine {
            plan: Plan::default(),
            rules,
            revision: String::new(),
            rights: Arc::new(Rights::noted(&files.disks)),
            door: None,
            user: files.user(),
            files,
            life: Life::Rest { failed: false },
            wanted: false,
            restarts: 0,
            last_end: None,
        });
        (machine.rules, machine.revision) = (rules, revision);
        machine.plan = Plan::new(config, &self.options);
        Ok(())
    }

    /// Finds the processes of machines that run already.
    fn adopt(self: &Arc<Self>) {
        let mut table = self.lock();
        for (name, machine) in &mut table.machines {
            if let Some(process) = self.find(name, machine) {
                self.watch(name, process);
            }
        }
    }

    /// A process that runs this machine already. From then on it counts as alive.
    fn find(&self, name: &VmName, machine: &mut Machine) -> Option<Process> {
        let process = Process::find(&machine.files.management, machine.user)?;
        let pid = process.pid();
        machine.life = Life::Alive(Alive {
            pid,
            handle: process.handle().ok()?,
            answers: true,
            asked: Asked::Nothing,
            group: self.group(name, machine, Some(pid)),
        });
        machine.want(true);
        if let Err(problem) = self.open_door(name, machine) {
            tracing::error!(machine = %name, %problem, "a machine that runs cannot ask for its disks");
        }
        self.events.record(EventKind::MachineFound {
            vm: name.clone(),
            pid,
        });
        Some(process)
    }

    /// The control group of a machine that is to be started, or whose process was found. Nothing else depends on it.
    fn group(&self, name: &VmName, machine: &Machine, runs: Option<u32>) -> Option<Group> {
        let groups = self.groups.as_ref()?;
        let group = groups.group(name, &machine.plan.limits, runs);
        group
            .map_err(|error| tracing::warn!(machine = %name, %error, "a machine has no control group"))
            .ok()
    }

    /// Listens where a machine asks for its disks, unless that is done.
    fn open_door(&self, name: &VmName, machine: &mut Machine) -> Result<(), Problem> {
        if !machine.plan.managed || machine.door.is_some() {
            return Ok(());
        }
        let cannot = |error: &dyn std::error::Error| {
            let text = format!(
                "its way to the manager cannot be opened: {}",
                block_io::error_chain(error)
            );
            Problem::new(ProblemKind::Host, text).about(name)
        };
        machine.files.folders()?;
        let mut server = Server::bind(&machine.files.manager).map_err(|error| cannot(&error))?;
        if let Some(user) = machine.user {
            server = server.for_user(user).map_err(|error| cannot(&error))?;
        }
        let door = Door::new(name, Arc::clone(&machine.rights), Arc::clone(&self.storage));
        let serving = server.start_host(Arc::new(door));
        machine.door = Some(serving.map_err(|error| cannot(&error))?);
        Ok(())
    }

    /// The user of a machine that is to be started: the same as before, if that can be.
    fn choose_user(&self, table: &mut Table, name: &VmName) -> Result<Option<User>, Problem> {
        let others = table.machines.iter().filter(|(other, _)| *other != name);
        let taken: BTreeSet<u32> = others.filter_map(|(_, machine)| machine.user).collect();
        let machine = table.machines.get_mut(name).ok_or_else(|| none(name))?;
        let user = self.users.user(name, machine.user, &taken);
        let user = user.map_err(|text| Problem::new(ProblemKind::Exhausted, text).about(name))?;
        let number = user.map(|user| user.uid);
        if number != machine.user {
            machine.files.set_user(number)?;
            machine.user = number;
            // It is another one's.
            drop(machine.door.take());
        }
        Ok(user)
    }

    /// Starts a machine's process, unless there is one.
    fn begin(self: &Arc<Self>, table: &mut Table, name: &VmName) -> Result<Process, Problem> {
        let machine = table.machines.get_mut(name).ok_or_else(|| none(name))?;
        if let Some(process) = self.find(name, machine) {
            return Ok(process);
        }
        let user = self.choose_user(table, name)?;
        let machine = table.machines.get_mut(name).ok_or_else(|| none(name))?;
        let log = machine.files.prepare()?;
        let noted = machine.rights.begin(&machine.plan.disks);
        noted.map_err(|error| cannot_note(name, &error))?;
        self.open_door(name, machine)?;
        let cannot = |error: std::io::Error| {
            let text = format!("its process cannot be started: {error}");
            Problem::new(ProblemKind::Host, text).about(name)
        };
        let group = self.group(name, machine, None);
        let process = Process::start(Start {
            program: &self.options.program,
            files: &machine.files,
            log,
            manager: machine.plan.managed.then_some(&machine.files.manager),
            user,
            network: machine.plan.network,
            group: group.as_ref(),
            journal: self.options.journal.then_some(name.as_str()),
        });
        let process = process.map_err(cannot)?;
        let pid = process.pid();
        machine.life = Life::Alive(Alive {
            pid,
            handle: process.handle().map_err(cannot)?,
            answers: false,
            asked: Asked::Nothing,
            group,
        });
        self.events.record(EventKind::MachineStarted {
            vm: name.clone(),
            pid,
        });
        self.look_for_an_answer(name, pid);
        Ok(process)
    }

    /// Starts the thread of a machine that has a process.
    fn watch(self: &Arc<Self>, name: &VmName, process: Process) {
        let (shared, of) = (Arc::clone(self), name.clone());
        let thread = std::thread::Builder::new()
            .name(format!("vm-{name}"))
            .stack_size(256 << 10)
            .spawn(move || shared.attend(&of, process));
        if let Err(error) = thread {
            tracing::error!(machine = %name, %error, "nobody waits for the end of a machine");
        }
    }

    /// Notes when a machine's process answers for the first time.
    fn look_for_an_answer(self: &Arc<Self>, name: &VmName, pid: u32) {
        let (shared, of) = (Arc::clone(self), name.clone());
        let look = move || {
            loop {
                std::thread::sleep(LOOK);
                let socket = match shared.lock().machines.get(&of) {
                    Some(machine) if machine.is_starting(pid) => machine.files.management.clone(),
                    _ => return,
                };
                if answers(&socket)
                    && let Some(machine) = shared.lock().machines.get_mut(&of)
                    && let Life::Alive(alive) = &mut machine.life
                {
                    alive.answers |= alive.pid == pid;
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name(format!("start-{name}"))
            .stack_size(256 << 10)
            .spawn(look);
        if let Err(error) = thread {
            tracing::error!(machine = %name, %error, "nobody sees when a machine answers");
        }
    }

    /// Sees to a machine until it is at rest.
    fn attend(self: Arc<Self>, name: &VmName, mut process: Process) {
        loop {
            let (begun, report) = (Instant::now(), self.report(name));
            let mut end = process.wait(&report);
            self.clean_up(name, &mut end);
            let mut table = self.lock();
            // It cannot be deleted as long as it is not at rest.
            let closed = table.closed;
            let Some(machine) = table.machines.get_mut(name) else {
                return;
            };
            if begun.elapsed() >= STEADY {
                machine.restarts = 0;
            }
            let wait = (!closed).then(|| machine.next_start(&end)).flatten();
            machine.last_end = Some(end.text.clone());
            self.events.record(EventKind::MachineEnded {
                vm: name.clone(),
                reason: end.text.clone(),
                restart_seconds: wait.map(|wait| wait.as_secs()),
            });
            let Some(wait) = wait else {
                machine.rest(&end, closed);
                self.changed.notify_all();
                return;
            };
            machine.life = Life::Waiting;
            match self.start_again(table, name, wait) {
                Some(next) => process = next,
                None => return,
            }
        }
    }

    /// Ends what the end of a machine's process has left; if memory was short, that is why it ended.
    fn clean_up(&self, name: &VmName, end: &mut End) {
        let (files, group) = match self.lock().machines.get_mut(name) {
            Some(Machine {
                files,
                life: Life::Alive(alive),
                ..
            }) => (files.clone(), alive.group.take()),
            _ => return,
        };
        if let Some(shortage) = group.and_then(Group::end)
            && end.kind == EndKind::Failed
        {
            end.text = format!("{shortage}; {}", end.text);
        }
        files.tidy();
    }

    fn report(&self, name: &VmName) -> PathBuf {
        let table = self.lock();
        let machine = table.machines.get(name);
        machine
            .map(|machine| machine.files.report.clone())
            .unwrap_or_default()
    }

    /// Waits, and starts the machine again, as long as it is wanted.
    fn start_again(
        self: &Arc<Self>,
        mut table: MutexGuard<'_, Table>,
        name: &VmName,
        wait: Duration,
    ) -> Option<Process> {
        let end = Instant::now() + wait;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let closed = table.closed;
            let machine = table.machines.get_mut(name)?;
            // Somebody who starts it by hand does not want to wait.
            let at_once = matches!(machine.life, Life::Rest { .. });
            if closed || !machine.wanted {
                machine.life = Life::Rest { failed: false };
                self.changed.notify_all();
                return None;
            }
            if at_once || left.is_zero() {
                let begun = self.begin(&mut table, name);
                let machine = table.machines.get_mut(name)?;
                if let Err(problem) = &begun {
                    machine.last_end = Some(problem.to_string());
                    machine.life = Life::Rest { failed: true };
                    machine.want(false);
                    tracing::error!(machine = %name, %problem, "a machine cannot be started again");
                    self.changed.notify_all();
                } else {
                    machine.restarts = machine.restarts.saturating_add(1);
                }
                return begun.ok();
            }
            let waited = self.changed.wait_timeout(table, left);
            table = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Machine {
    /// After how long it is started again, if at all.
    fn next_start(&self, end: &End) -> Option<Duration> {
        let again = match (self.rules.restart, end.kind) {
            _ if !self.wanted => false,
            (_, EndKind::Usage | EndKind::Stopped) | (RestartPolicy::Never, _) => false,
            (RestartPolicy::OnFailure, kind) => kind == EndKind::Failed,
            (RestartPolicy::Always, _) => true,
        };
        let doubled = FIRST_WAIT.saturating_mul(1 << self.restarts.min(16));
        again.then(|| doubled.min(LONGEST_WAIT))
    }

    /// Comes to rest; if the manager has `closed`, the next one decides what becomes of it.
    fn rest(&mut self, end: &End, closed: bool) {
        let failed = self.wanted && matches!(end.kind, EndKind::Usage | EndKind::Failed);
        self.life = Life::Rest { failed };
        if !closed {
            self.want(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(restart: RestartPolicy, restarts: u32) -> Machine {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), folder.path()).unwrap();
        let files = store.files(&"web1".parse().unwrap()).unwrap();
        Machine {
            plan: Plan::default(),
            rights: Arc::new(Rights::noted(&files.disks)),
            door: None,
            user: None,
            revision: String::new(),
            rules: StartRules {
                autostart: false,
                restart,
            },
            files,
            life: Life::Rest { failed: false },
            wanted: true,
            restarts,
            last_end: None,
        }
    }

    fn end(kind: EndKind) -> End {
        End {
            kind,
            text: String::new(),
        }
    }

    #[test]
    fn what_is_started_again_and_when() {
        use EndKind::{Failed, PoweredOff, Stopped, Usage};
        use RestartPolicy::{Always, Never, OnFailure};
        let cases = [
            (Never, Failed, false),
            (OnFailure, Failed, true),
            (OnFailure, PoweredOff, false),
            (Always, PoweredOff, true),
            (Always, Failed, true),
            (Always, Usage, false),
            (Always, Stopped, false),
        ];
        for (policy, kind, again) in cases {
            let next = machine(policy, 0).next_start(&end(kind));
            assert_eq!(next.is_some(), again, "{policy} {kind:?}");
        }
        let waits: Vec<u64> = [0, 1, 2, 5, 6, 7, 40]
            .map(|restarts| {
                machine(Always, restarts)
                    .next_start(&end(Failed))
                    .unwrap()
                    .as_secs()
            })
            .into();
        assert_eq!(waits, [1, 2, 4, 32, 64, 64, 64]);
        let mut unwanted = machine(Always, 0);
        unwanted.wanted = false;
        assert_eq!(unwanted.next_start(&end(Failed)), None);
    }
}
