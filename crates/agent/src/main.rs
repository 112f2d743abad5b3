//! `sms-agent`: storage management from inside a guest.
//!
//! ```text
//!   arguments ──► Request ──► host: fragments, tags, waiting ──► sg: SG_IO ──► any SMS disk ──► smsvmm
//!                 show    ◄── Answer
//!   freeze: file systems stand still meanwhile
//! ```

mod arguments;
mod backup;
mod freeze;
mod host;
mod mounts;
mod progress;
mod sg;
mod show;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use api::storage::{JobState, JobStatus};
use clap::{CommandFactory, Parser};
use expanded_api::{Answer, DiskAttributes, Image, Request};
use serde::Serialize;

use arguments::{Arguments, Command, DiskCommand, JobCommand, Place, VolumeCommand};
use host::{AgentError, Host, sms_disks};
use progress::Progress;

/// Between two looks at a job.
const LOOK: Duration = Duration::from_millis(500);
/// So often it is asked for a job in vain.
const TRIES: u32 = 20;
/// A disk that was attached should be here after this time.
const HOT_PLUG: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("sms-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Writes to standard output; who does not want to read any more is no error.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

struct Agent {
    host: Host,
    json: bool,
}

/// An image, and what it cost the file systems.
#[derive(Serialize)]
struct FrozenImage<'a> {
    image: &'a Image,
    #[serde(flatten)]
    parts: freeze::Parts,
}

fn run(arguments: Arguments) -> Result<ExitCode, AgentError> {
    // What follows needs no disk of the host.
    if let Command::Manual { folder } = &arguments.command {
        let written = std::fs::create_dir_all(folder)
            .and_then(|()| clap_mangen::generate_to(Arguments::command(), folder));
        let text = |error| format!("cannot write manual pages to {}: {error}", folder.display());
        return written
            .map(|()| ExitCode::SUCCESS)
            .map_err(|error| AgentError::Text(text(error)));
    }
    if let Command::Backup(command) = arguments.command {
        let json = arguments.json;
        return backup::run(command, json, || Host::find(arguments.device.as_deref()));
    }
    let agent = Agent {
        host: Host::find(arguments.device.as_deref())?,
        json: arguments.json,
    };
    match arguments.command {
        Command::Status => agent.show(&agent.host.description()?),
        Command::Disk(command) => agent.disk(command),
        Command::Volume(command) => agent.volume(command),
        Command::Job(command) => agent.job(command),
        Command::Events { after, follow } => agent.events(after, follow),
        Command::FreezeImage { files, name, limit } => {
            agent.freeze_image(&files, name, Duration::from_secs(limit))
        }
        Command::ReleaseImage { name, disks } => {
            let disks = agent.paths(disks)?;
            agent
                .host
                .ask_until_free(&Request::ReleaseImage { disks, name })?;
            agent.show(&Answer::Done)
        }
        Command::Raw { request } => {
            let request = serde_json::from_str(&request)
                .map_err(|error| AgentError::Text(format!("this is no request: {error}")))?;
            agent.simple(&request)
        }
        Command::Forge { cdb, zeroes } => {
            let digits = cdb.as_bytes().chunks(2);
            let bytes = digits.map(|pair| {
                std::str::from_utf8(pair)
                    .ok()
                    .and_then(|pair| u8::from_str_radix(pair, 16).ok())
            });
            let bytes: Option<Vec<u8>> = bytes.collect();
            let bytes =
                bytes.ok_or_else(|| AgentError::Text("these are no hexadecimal digits".to_owned()))?;
            agent.host.forge(&bytes, zeroes).map(|()| ExitCode::SUCCESS)
        }
        // They are done above.
        Command::Backup(_) | Command::Manual { .. } => Ok(ExitCode::FAILURE),
        Command::Replication => agent.simple(&Request::ReplicationStatus {}),
        Command::Hsm => agent.simple(&Request::HsmStatus {}),
    }
}

impl Agent {
    fn write(&self, value: &impl Serialize, text: impl FnOnce() -> String) {
        match self.json {
            true => {
                let json = serde_json::to_string_pretty(value).unwrap_or_default();
                print(&format!("{json}\n"));
            }
            false => print(&text()),
        }
    }

    fn show(&self, answer: &Answer) -> Result<ExitCode, AgentError> {
        self.write(answer, || {
            let here = match answer {
                Answer::Disks(_) | Answer::Attached(_) => sms_disks(),
                _ => Vec::new(),
            };
            show::answer(answer, &here)
        });
        Ok(ExitCode::SUCCESS)
    }

    fn simple(&self, request: &Request) -> Result<ExitCode, AgentError> {
        self.show(&self.host.ask(request)?)
    }

    /// The path of a disk that may be named by its device.
    fn path(&self, name: String) -> Result<String, AgentError> {
        match name.starts_with("/dev/") {
            true => self.host.path_of_device(Path::new(&name)),
            false => Ok(name),
        }
    }

    fn paths(&self, names: Vec<String>) -> Result<Vec<String>, AgentError> {
        names.into_iter().map(|name| self.path(name)).collect()
    }

    fn disk(&self, command: DiskCommand) -> Result<ExitCode, AgentError> {
        let request = match command {
            DiskCommand::List => Request::ListDisks {},
            DiskCommand::Status { disk } => Request::DiskStatus {
                disk: self.path(disk)?,
            },
            DiskCommand::Create {
                disk,
                size,
                thick,
                place,
                checksums,
                no_attach,
            } => Request::CreateDisk {
                disk,
                size: size.bytes(),
                thick,
                target: place.target(),
                checksums: checksums.then_some(true),
                attach: !no_attach,
            },
            DiskCommand::Clone { source, disk, attach } => Request::CloneDisk {
                source: self.path(source)?,
                disk,
                attach,
            },
            DiskCommand::Attach { disk, read_only } => Request::AttachDisk { disk, read_only },
            DiskCommand::Detach { disk } => {
                self.host.detach(&self.path(disk)?)?;
                return self.show(&Answer::Done);
            }
            DiskCommand::Delete { disk } => Request::DeleteDisk {
                disk: self.path(disk)?,
            },
            DiskCommand::Resize { disk, size } => Request::ResizeDisk {
                disk: self.path(disk)?,
                size: size.bytes(),
            },
            DiskCommand::Snapshot {
                disks,
                name,
                description,
            } => Request::Snapshot {
                disks: self.paths(disks)?,
                name,
                description,
            },
            DiskCommand::Snapshots { disk } => return self.snapshots(disk),
            DiskCommand::DeleteSnapshot { snapshot } => Request::DeleteSnapshot { snapshot },
            DiskCommand::Revert { snapshot } => Request::Revert { snapshot },
            DiskCommand::Commit { disk } => Request::Commit {
                disk: self.path(disk)?,
            },
            DiskCommand::Discard { disk } => Request::Discard {
                disk: self.path(disk)?,
            },
            DiskCommand::SetAttributes {
                disk,
                checksums,
                exempt_from_migration,
            } => Request::SetAttributes {
                disk: self.path(disk)?,
                attributes: DiskAttributes {
                    checksums,
                    exempt_from_migration,
                },
            },
            DiskCommand::Move {
                disk,
                place,
                background,
            } => return self.move_disk(disk, place, background),
            DiskCommand::Extents { disk } => Request::Extents {
                disk: self.path(disk)?,
            },
            DiskCommand::ConfigurationId { disk } => Request::ConfigurationId {
                disk: self.path(disk)?,
            },
            DiskCommand::Changed { disk, since, until } => Request::Changed {
                disk: self.path(disk)?,
                since,
                until,
            },
        };
        let answer = self.host.ask(&request)?;
        if let Answer::Attached(attached) = &answer {
            wait_for(&attached.serial);
        }
        self.show(&answer)
    }

    /// Has a disk moved, and shows how far it is unless nobody wants to wait.
    fn move_disk(&self, disk: String, place: Place, background: bool) -> Result<ExitCode, AgentError> {
        let to = place.target();
        let request = Request::MoveDisk {
            disk: self.path(disk)?,
            to: to.ok_or_else(|| AgentError::Text("say where: --volume or --class".to_owned()))?,
            // An older host answers when it is done, whatever is wanted.
            background: self.host.minor >= 1,
        };
        let begun = self.host.ask(&request)?;
        let jobs = match begun {
            Answer::Jobs(jobs) if !background => jobs,
            answer => return self.show(&answer),
        };
        let numbers: Vec<u32> = jobs.iter().map(|job| job.id).collect();
        let jobs = self.watch(jobs, &numbers)?;
        match jobs.as_slice() {
            [job] if job.state == JobState::Done => self.show(&Answer::Moved(job.moved.unwrap_or_default())),
            _ => {
                self.show(&Answer::Jobs(jobs))?;
                Ok(ExitCode::FAILURE)
            }
        }
    }

    fn snapshots(&self, disk: String) -> Result<ExitCode, AgentError> {
        let disk = self.path(disk)?;
        match self.host.ask(&Request::DiskStatus { disk })? {
            Answer::Disk(status) => {
                self.write(&status.snapshot_list, || show::snapshots(&status.snapshot_list));
                Ok(ExitCode::SUCCESS)
            }
            other => Err(AgentError::Answer(format!("{other:?}"))),
        }
    }

    fn volume(&self, command: VolumeCommand) -> Result<ExitCode, AgentError> {
        let (request, job) = match command {
            VolumeCommand::List => return self.simple(&Request::ListVolumes {}),
            VolumeCommand::SetLayout {
                volume,
                layout,
                columns,
                copies,
                devices,
                job,
            } => (
                Request::SetLayout {
                    volume,
                    layout: layout.into(),
                    columns,
                    copies,
                    stripe_unit: 0,
                    devices,
                    throttle: job.bytes(),
                },
                job,
            ),
            VolumeCommand::Move {
                volume,
                from,
                to,
                job,
            } => (
                Request::MoveVolume {
                    volume,
                    from,
                    to,
                    throttle: job.bytes(),
                },
                job,
            ),
        };
        let answer = self.host.ask(&request)?;
        match answer {
            Answer::Jobs(jobs) if job.wait => self.wait(jobs),
            answer => self.show(&answer),
        }
    }

    fn job(&self, command: JobCommand) -> Result<ExitCode, AgentError> {
        match command {
            JobCommand::List => self.simple(&Request::ListJobs {}),
            JobCommand::Status { job } => self.simple(&Request::JobStatus { job }),
            JobCommand::Wait { job } => {
                let jobs = self.jobs(&[job])?;
                self.wait(jobs)
            }
            JobCommand::Cancel { job } => self.simple(&Request::CancelJob { job }),
        }
    }

    fn jobs(&self, numbers: &[u32]) -> Result<Vec<JobStatus>, AgentError> {
        let mut found = Vec::new();
        for job in numbers {
            match self.host.ask(&Request::JobStatus { job: *job })? {
                Answer::Jobs(jobs) => found.extend(jobs),
                other => return Err(AgentError::Answer(format!("{other:?}"))),
            }
        }
        Ok(found)
    }

    /// Waits until jobs have ended, and shows how.
    fn wait(&self, jobs: Vec<JobStatus>) -> Result<ExitCode, AgentError> {
        let numbers: Vec<u32> = jobs.iter().map(|job| job.id).collect();
        let jobs = self.watch(jobs, &numbers)?;
        let all_done = jobs.iter().all(|job| job.state == JobState::Done);
        self.show(&Answer::Jobs(jobs))?;
        Ok(if all_done {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }

    /// Waits until jobs have ended, or rest, and tells how far they are meanwhile.
    fn watch(&self, mut jobs: Vec<JobStatus>, numbers: &[u32]) -> Result<Vec<JobStatus>, AgentError> {
        let mut progress = Progress::new(self.json);
        let mut failed = 0;
        while jobs.iter().any(|job| job.state == JobState::Running) {
            progress.show(&jobs);
            std::thread::sleep(LOOK);
            match self.jobs(numbers) {
                Ok(now) => (jobs, failed) = (now, 0),
                // A manager that is started anew knows the job, and not the question.
                Err(AgentError::Command { .. } | AgentError::Busy) if failed < TRIES => failed += 1,
                Err(error) => return Err(error),
            }
        }
        Ok(jobs)
    }

    fn events(&self, mut after: u32, follow: bool) -> Result<ExitCode, AgentError> {
        loop {
            let page = self.host.events(after, follow)?;
            if page.missed > 0 && !self.json {
                print(&format!("({} earlier events are no longer kept)\n", page.missed));
            }
            for event in &page.events {
                let line = match self.json {
                    true => serde_json::to_string(event).unwrap_or_default(),
                    false => show::event(event),
                };
                print(&format!("{line}\n"));
            }
            let last = u32::try_from(page.last).unwrap_or(u32::MAX);
            if !follow && last == after {
                return Ok(ExitCode::SUCCESS);
            }
            after = last;
        }
    }

    fn freeze_image(
        &self,
        files: &[std::path::PathBuf],
        name: String,
        limit: Duration,
    ) -> Result<ExitCode, AgentError> {
        let systems = freeze::file_systems(files)?;
        let names: BTreeSet<&String> = systems.iter().flat_map(|system| &system.disks).collect();
        let mut disks = Vec::new();
        for name in names {
            disks.push(self.host.path_of_device(&Path::new("/dev").join(name))?);
        }
        let request = Request::FreezeImage { disks, name };
        let tag = host::random();
        let frozen = freeze::while_frozen(&systems, limit, || self.host.ask_and_keep(tag, &request));
        self.host.forget(tag);
        let (answer, still) = frozen?;
        let parts = still.parts();
        match &answer {
            Answer::Image(image) if self.json => {
                let value = FrozenImage { image, parts };
                self.write(&value, String::new);
            }
            answer => {
                let mounts: Vec<String> = systems
                    .iter()
                    .map(|system| system.mount.display().to_string())
                    .collect();
                print(&show::answer(answer, &[]));
                print(&format!("{} frozen for {parts}\n", mounts.join(", ")));
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Waits a little for a disk to be here.
fn wait_for(serial: &str) {
    let begin = Instant::now();
    while begin.elapsed() < HOT_PLUG && !sms_disks().iter().any(|found| found.serial == serial) {
        std::thread::sleep(Duration::from_millis(50));
    }
}
