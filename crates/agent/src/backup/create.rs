//! Makes a backup.
//!
//! # Hazards
//! - *Something fails in the middle.* [`Taken`] gives everything back on each way out; the mover has no backup before it says that it
//!   is finished.
//! - *The image of somebody else.* Only an image that was made here is released here, and the parent's when the new one takes its
//!   place.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use api::Utc;
use api::virtual_disk::VirtualDiskStatus;
use backup::RawText;
use backup::message::BackupInfo;
use backup::plan::{Entry, ImageDisk, Kind, Plan, Source, Time};
use expanded_api::{Answer, Request};
use serde::Serialize;

use super::arguments::CreateArguments;
use super::dm::Volume;
use super::glob::Glob;
use super::locate::{self, Sources, System};
use super::meta::read_at;
use super::snapshot::{Taken, device_of, mount};
use super::walk::{Sink, Walk};
use super::{Mover, NOT_ALL, connect, said, show, signals};
use crate::freeze::{self, Parts, Still};
use crate::host::{AgentError, Host, random};

/// Bytes of a file that are read and sent at once.
const PIECE: usize = 1 << 20;
/// Problems that are listed one by one.
const MAX_LISTED: usize = 1000;

/// What was done.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Created {
    /// What the mover has.
    pub(crate) backup: BackupInfo,
    /// For how long the file systems stood still; none if that was done before.
    #[serde(flatten)]
    pub(crate) still: Option<Parts>,
    /// What took how long.
    pub(crate) took_ms: Vec<(&'static str, u64)>,
    /// The image, if it was kept.
    pub(crate) image: Option<String>,
    /// What is not in the backup, and why.
    pub(crate) problems: Vec<String>,
    /// Problems that are not listed.
    pub(crate) more_problems: u64,
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// What takes how long.
struct Clock {
    begin: Instant,
    took: Vec<(&'static str, u64)>,
}

impl Clock {
    fn start() -> Self {
        Self {
            begin: Instant::now(),
            took: Vec::new(),
        }
    }

    /// That was it.
    fn did(&mut self, what: &'static str) {
        let took = std::mem::replace(&mut self.begin, Instant::now()).elapsed();
        let took = milliseconds(took);
        match self.took.iter_mut().find(|(known, _)| *known == what) {
            Some((_, sum)) => *sum += took,
            None => self.took.push((what, took)),
        }
    }
}

/// A disk of which something is backed up.
#[derive(Debug)]
struct Disk {
    /// `sdb`.
    name: String,
    /// `/web1/data.dsk`.
    path: String,
}

/// The name of the image of a backup.
fn image_of(backup: &str) -> String {
    format!("backup-{backup}")
}

/// Makes a backup.
pub(crate) fn create(host: &Host, arguments: CreateArguments, json: bool) -> Result<ExitCode, AgentError> {
    let mut clock = Clock::start();
    let sources = locate::sources(&arguments.sources)?;
    for note in &sources.notes {
        eprintln!("sms-agent: {note}");
    }
    if arguments.resume && sources.systems.iter().any(|system| system.table.is_some()) {
        return Err(AgentError::Text(
            "a backup of files on logical volumes is not resumed, as these may have moved since: make a new one".to_owned(),
        ));
    }
    let disks = disks_of(host, &sources)?;
    let name = arguments.name.clone().unwrap_or_else(now);
    let image = image_of(&name);
    expanded_api::check_snapshot_name(&image).map_err(|reason| {
        AgentError::Text(format!(
            "a backup cannot be called {name}: its image is {image}, and {reason}"
        ))
    })?;
    let paths: Vec<String> = disks.iter().map(|disk| disk.path.clone()).collect();
    let mut taken = Taken::new(host);
    let Some(to) = &arguments.to else {
        freeze_image(host, &sources, &arguments, &paths, &image, &mut taken)?;
        let mut shown = Shown {
            json,
            problems: false,
        };
        walk_all(
            &sources,
            &arguments,
            &disks,
            &image,
            (&mut taken, &mut clock),
            &mut shown,
        )?;
        let left = taken.give_back();
        return Ok(end(shown.problems, &left));
    };
    // Whatever is wrong with mover and parent: nothing was frozen yet.
    let mut mover = connect(to, &arguments.access)?;
    let parent = parent(host, &mut mover, &arguments, &disks)?;
    clock.did("preparing");
    let still = match arguments.resume {
        true => None,
        false => Some(freeze_image(
            host, &sources, &arguments, &paths, &image, &mut taken,
        )?),
    };
    clock.did("image");
    let made = send(
        host,
        &mut mover,
        &sources,
        &arguments,
        &disks,
        (&name, parent.clone()),
        (&mut taken, &mut clock),
    );
    if made.is_err() && (arguments.resumable || arguments.resume) {
        eprintln!("sms-agent: the image {image} stays, so that --resume --name {name} can go on with it");
        taken.keep_image();
    } else if made.is_ok() && arguments.resume {
        taken.image(&image, &paths);
    }
    let (backup, problems) = made?;
    if arguments.keep_image {
        taken.keep_image();
    }
    let mut left = taken.give_back();
    if let Some(parent) = parent.filter(|_| arguments.keep_image) {
        let mut old = Taken::new(host);
        old.image(&image_of(&parent), &paths);
        left.extend(old.give_back());
    }
    clock.did("giving back");
    let created = Created {
        took_ms: clock.took,
        backup,
        still: still.map(|still| still.parts()),
        image: arguments.keep_image.then_some(image),
        problems: problems.listed,
        more_problems: problems.more,
    };
    show::created(&created, json);
    Ok(end(!created.problems.is_empty(), &left))
}

/// Says what could not be given back.
fn end(problems: bool, left: &[String]) -> ExitCode {
    for left in left {
        eprintln!("sms-agent: {left}");
    }
    match problems || !left.is_empty() {
        true => ExitCode::from(NOT_ALL),
        false => ExitCode::SUCCESS,
    }
}

/// Shows entries instead of sending them.
struct Shown {
    json: bool,
    problems: bool,
}

impl Sink for Shown {
    fn entry(&mut self, entry: Entry, _: Option<File>) -> Result<(), AgentError> {
        show::entry(&entry, self.json);
        Ok(())
    }

    fn problem(&mut self, path: &[u8], reason: &str) {
        self.problems = true;
        eprintln!("sms-agent: /{}: {reason}", show::shown(&RawText(path.to_vec())));
    }
}

/// A name by the time.
fn now() -> String {
    let text = Utc::now().to_string();
    text.chars().filter(char::is_ascii_alphanumeric).collect()
}

/// The host's disks of all that is to be backed up, each once.
fn disks_of(host: &Host, sources: &Sources) -> Result<Vec<Disk>, AgentError> {
    let names = sources
        .systems
        .iter()
        .flat_map(|system| &system.disks)
        .chain(&sources.disks);
    let mut disks: Vec<Disk> = Vec::new();
    for name in names {
        if disks.iter().any(|disk| disk.name == *name) {
            continue;
        }
        let path = host.path_of_device(&Path::new("/dev").join(name))?;
        if expanded_api::split_snapshot(&path).1.is_some() {
            return Err(AgentError::Text(format!(
                "/dev/{name} is itself a frozen image ({path})"
            )));
        }
        disks.push(Disk {
            name: name.clone(),
            path,
        });
    }
    Ok(disks)
}

fn status(host: &Host, disk: &str) -> Result<VirtualDiskStatus, AgentError> {
    let disk = disk.to_owned();
    match host.ask(&Request::DiskStatus { disk })? {
        Answer::Disk(status) => Ok(*status),
        other => Err(AgentError::Answer(format!("{other:?}"))),
    }
}

/// The backup on which the new one is built: its image must be there, on all disks.
fn parent(
    host: &Host,
    mover: &mut Mover,
    arguments: &CreateArguments,
    disks: &[Disk],
) -> Result<Option<String>, AgentError> {
    if arguments.parent.is_none() && !arguments.incremental {
        return Ok(None);
    }
    let mut images: Vec<Vec<String>> = Vec::new();
    for disk in disks {
        let list = status(host, &disk.path)?.snapshot_list;
        images.push(list.into_iter().map(|snapshot| snapshot.name).collect());
    }
    let has_image = |name: &str| images.iter().all(|known| known.contains(&image_of(name)));
    if let Some(parent) = &arguments.parent {
        return match has_image(parent) {
            true => Ok(Some(parent.clone())),
            false => Err(AgentError::Text(format!(
                "the image {} is not there on all disks of the sources: {parent} was made without --keep-image, of other disks, or \
                 another backup took its place; make a full backup",
                image_of(parent)
            ))),
        };
    }
    let complete = mover
        .list()
        .map_err(said)?
        .into_iter()
        .filter(|known| known.complete);
    let latest = complete
        .filter(|known| has_image(&known.name))
        .max_by_key(|known| known.frozen);
    latest.map(|known| Some(known.name)).ok_or_else(|| {
        AgentError::Text(
            "there is no backup whose image was kept on all these disks: make a full one with --keep-image"
                .to_owned(),
        )
    })
}

/// Freezes; how long that was.
fn freeze_image(
    host: &Host,
    sources: &Sources,
    arguments: &CreateArguments,
    disks: &[String],
    image: &str,
    taken: &mut Taken<'_>,
) -> Result<Still, AgentError> {
    let systems = freeze::file_systems(&sources.frozen)?;
    let request = Request::FreezeImage {
        disks: disks.to_vec(),
        name: image.to_owned(),
    };
    let made = Cell::new(false);
    let tag = random();
    let frozen = freeze::while_frozen(&systems, Duration::from_secs(arguments.limit), || {
        let answer = host.ask_and_keep(tag, &request);
        // What was refused was not made: an image of this name may be another's.
        made.set(!matches!(&answer, Err(AgentError::Problem(_))));
        answer
    });
    host.forget(tag);
    if made.get() {
        taken.image(image, disks);
    }
    Ok(frozen?.1)
}

/// What cannot be backed up.
#[derive(Debug, Default)]
struct Problems {
    listed: Vec<String>,
    more: u64,
}

impl Problems {
    fn add(&mut self, path: &[u8], reason: &str) {
        let path = RawText(path.to_vec());
        match self.listed.len() < MAX_LISTED {
            true => self.listed.push(format!("/{}: {reason}", show::shown(&path))),
            false => self.more += 1,
        }
    }
}

fn send(
    host: &Host,
    mover: &mut Mover,
    sources: &Sources,
    arguments: &CreateArguments,
    disks: &[Disk],
    (name, parent): (&str, Option<String>),
    (taken, clock): (&mut Taken<'_>, &mut Clock),
) -> Result<(BackupInfo, Problems), AgentError> {
    let image = image_of(name);
    let mut frozen = 0;
    let mut sizes = Vec::new();
    for disk in disks {
        let list = status(host, &disk.path)?.snapshot_list;
        let found = list.into_iter().find(|snapshot| snapshot.name == image);
        let found = found.ok_or_else(|| AgentError::Text(format!("{} has no image {image}", disk.path)))?;
        frozen = frozen.max(found.created);
        sizes.push(found.size);
    }
    let plan = Plan {
        name: name.to_owned(),
        parent,
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        description: arguments.description.clone(),
        frozen: Time {
            seconds: i64::try_from(frozen).unwrap_or(i64::MAX),
            nanoseconds: 0,
        },
        disks: disks.iter().map(|disk| image_disk(&disk.path, &image)).collect(),
        sources: named(sources),
        resume: arguments.resume,
    };
    let begun = mover.begin(&plan).map_err(said)?;
    for note in &begun.notes {
        eprintln!("sms-agent: the mover: {note}");
    }
    if arguments.resume {
        // The mover lets only one at a time go on with a backup: whoever was at it is gone.
        taken.take_over();
    }
    let mut sender = Sender {
        mover,
        done: begun.entries,
        last: begun.last,
        problems: Problems::default(),
    };
    clock.did("beginning");
    walk_all(sources, arguments, disks, &image, (taken, clock), &mut sender)?;
    for name in &sources.disks {
        let at = index(disks, name)?;
        sender.entry(whole_disk(at, &disks[at].path, sizes[at]), None)?;
    }
    signals::check()?;
    let info = sender.mover.finish().map_err(said)?;
    clock.did("files");
    Ok((info, sender.problems))
}

fn index(disks: &[Disk], name: &str) -> Result<usize, AgentError> {
    let found = disks.iter().position(|disk| disk.name == name);
    found.ok_or_else(|| AgentError::Text(format!("{name} went away")))
}

fn image_disk(path: &str, image: &str) -> ImageDisk {
    ImageDisk {
        disk: path.to_owned(),
        snapshot: image.to_owned(),
        configuration: String::new(),
    }
}

fn named(sources: &Sources) -> Vec<Source> {
    let trees = sources.trees.iter().map(|tree| Source {
        path: RawText::from(Path::new("/").join(&tree.name).as_os_str()),
        file_system: Some(sources.systems[tree.system].mount.kind.clone()),
        uuid: None,
    });
    let disks = sources.disks.iter().map(|disk| Source {
        path: RawText::from(format!("/dev/{disk}").as_str()),
        file_system: None,
        uuid: None,
    });
    trees.chain(disks).collect()
}

fn whole_disk(number: usize, path: &str, size: u64) -> Entry {
    Entry {
        // Where it was in the pool, so that two of the same name are two.
        path: RawText::from(format!("disks{path}").as_str()),
        mode: 0o600,
        uid: 0,
        gid: 0,
        modified: Time::default(),
        accessed: None,
        xattrs: Vec::new(),
        kind: Kind::Disk {
            disk: u32::try_from(number).unwrap_or(u32::MAX),
            size,
        },
    }
}

/// Walks through all trees, in the image.
fn walk_all(
    sources: &Sources,
    arguments: &CreateArguments,
    disks: &[Disk],
    image: &str,
    (taken, clock): (&mut Taken<'_>, &mut Clock),
    sink: &mut impl Sink,
) -> Result<(), AgentError> {
    let exclude: Vec<Glob> = arguments.exclude.iter().map(|text| Glob::new(text)).collect();
    let mut attached = BTreeMap::new();
    for (number, system) in sources.systems.iter().enumerate() {
        system.has_not_moved()?;
        let (mut numbers, mut devices) = (Vec::new(), Vec::new());
        for disk in &system.disks {
            let at = index(disks, disk)?;
            let device = match attached.get(&at) {
                Some(device) => device,
                None => attached
                    .entry(at)
                    .or_insert(taken.attach(&format!("{}@{image}", disks[at].path))?),
            };
            numbers.push(u32::try_from(at).unwrap_or(u32::MAX));
            devices.push(PathBuf::clone(device));
        }
        let root = mounted(system, &devices)?;
        clock.did("attaching");
        let mut walk = Walk::new(system, &numbers, &exclude);
        for tree in sources.trees.iter().filter(|tree| tree.system == number) {
            walk.tree(&root, tree, sink)?;
        }
        drop(root);
        clock.did("files");
    }
    Ok(())
}

/// The root of a file system in the image, whose disks have come as `devices`.
fn mounted(system: &System, devices: &[PathBuf]) -> Result<OwnedFd, AgentError> {
    let kind = &system.mount.kind;
    if let Some(table) = &system.table {
        // It goes with the mount, whatever ends this program.
        let volume = Volume::new(table, devices)?;
        return mount(kind, &volume.path);
    }
    let disk = devices.first().map_or(Path::new(""), PathBuf::as_path);
    mount(kind, &device_of(system, disk)?)
}

/// Sends entries to the mover.
struct Sender<'a> {
    mover: &'a mut Mover,
    /// So many entries are there already.
    done: u64,
    /// The last of these.
    last: Option<RawText>,
    problems: Problems,
}

impl Sink for Sender<'_> {
    fn entry(&mut self, entry: Entry, content: Option<File>) -> Result<(), AgentError> {
        signals::check()?;
        if self.done > 0 {
            self.done -= 1;
            return match self.done == 0 && self.last.as_ref().is_some_and(|last| *last != entry.path) {
                true => Err(AgentError::Text(
                    "what the mover has of this backup is of other sources: make a new one".to_owned(),
                )),
                false => Ok(()),
            };
        }
        self.mover.entry(&entry).map_err(said)?;
        let Some(file) = content else { return Ok(()) };
        let problem = self.content(&file, entry.size())?;
        if let Some(reason) = &problem {
            self.problem(entry.path.bytes(), reason);
        }
        self.mover.end_content(problem).map_err(said)
    }

    fn problem(&mut self, path: &[u8], reason: &str) {
        self.problems.add(path, reason);
    }
}

impl Sender<'_> {
    /// Sends the bytes of a file; why not all of them, if so.
    fn content(&mut self, file: &File, size: u64) -> Result<Option<String>, AgentError> {
        let mut buffer = vec![0; PIECE];
        let mut at = 0;
        while at < size {
            signals::check()?;
            let wanted = usize::try_from(size - at).unwrap_or(PIECE).min(PIECE);
            let count = match read_at(file, &mut buffer[..wanted], at) {
                Ok(0) => return Ok(Some(format!("it ends at byte {at} of {size}"))),
                Ok(count) => count,
                Err(error) => return Ok(Some(error.to_string())),
            };
            // What is left out is a hole.
            if buffer[..count].iter().any(|byte| *byte != 0) {
                self.mover.content(at, &buffer[..count]).map_err(said)?;
            }
            at += count as u64;
        }
        Ok(None)
    }
}
