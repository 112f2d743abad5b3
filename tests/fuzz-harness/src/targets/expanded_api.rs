//! The expanded API: decent requests and hostile ones, in fragments and under tags of all kinds, from a guest that may do everything with what is
//! its own.
//!
//! Whatever it sends, storage management is asked to touch nothing but that; a command ends, and writes no byte more than it says.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

use api::file::{FileAnswer, FileEntry, FileKind, FileOperation, FileOutcome};
use api::storage::JobStatus;
use api::virtual_disk::{DiskAnswer, DiskOperation, DiskOutcome, VirtualDisk};
use api::{
    ByteSize, DeviceId, DeviceState, DiskConfig, DiskStatus, EventLog, ExpandedPolicy, Problem, ProblemKind,
    Right, StorageAnswer, StorageRequest, VmName,
};
use arbitrary::Unstructured;
use block_io::AlignedBuffer;
use expanded_api::{Action, Cdb, Header};
use expanded_target::{ExpandedTarget, JobListener, Owner};
use storage_virtualizer::scsi::{
    Command, Identity, Nexus, Status, TransportId, Unit, UnitOptions, VendorCommands,
};

/// What has not been written in a buffer.
const UNTOUCHED: u8 = 0xa7;
/// Paths that a guest may use, and others that look like them.
const PATHS: [&str; 12] = [
    "/own/a.dsk",
    "/own/a.dsk@s",
    "/root.dsk",
    "/root.dsk@s",
    "/own/../b.dsk",
    "/own//a.dsk",
    "/ownb.dsk",
    "/b.dsk",
    "/b.dsk@s",
    "/own/a.dsk@x/y.dsk",
    "/own/a-1.redo",
    "/",
];
/// Requests, with places for a path and for anything.
const REQUESTS: [&str; 16] = [
    r#"{"command":"describe"}"#,
    r#"{"command":"list-disks"}"#,
    r#"{"command":"list-volumes"}"#,
    r#"{"command":"disk-status","disk":"PATH"}"#,
    r#"{"command":"create-disk","disk":"PATH","size":NUMBER,"attach":true}"#,
    r#"{"command":"clone-disk","source":"PATH","disk":"PATH"}"#,
    r#"{"command":"attach-disk","disk":"PATH"}"#,
    r#"{"command":"detach-disk","disk":"PATH"}"#,
    r#"{"command":"delete-disk","disk":"PATH"}"#,
    r#"{"command":"snapshot","disks":["PATH","PATH"],"name":"s"}"#,
    r#"{"command":"revert","snapshot":"PATH"}"#,
    r#"{"command":"move-disk","disk":"PATH","to":{"volume":"v"},"background":true}"#,
    r#"{"command":"set-attributes","disk":"PATH","attributes":{"checksums":true}}"#,
    r#"{"command":"release-image","disks":["PATH"],"name":"x/../y"}"#,
    r#"{"command":"extents","disk":"PATH"}"#,
    r#"{"command":"cancel-job","job":NUMBER}"#,
];

/// Whether storage management may be asked for this path.
fn is_allowed(path: &str) -> bool {
    let parts = path.split('/').skip(1);
    let is_plain = parts.clone().all(|part| !matches!(part, "" | "." | ".."));
    let disk = path.split_once(".dsk").map_or(path, |(stem, _)| stem);
    // Folders are looked into and made.
    path == "/" || path == "/own" || (is_plain && (path.starts_with("/own/") || disk == "/root"))
}

struct FakeVm {
    disks: Mutex<Vec<DiskStatus>>,
    events: EventLog,
    strayed: AtomicBool,
}

fn vm_name() -> VmName {
    // The name is one.
    "fuzzed".parse().unwrap_or_else(|_| unreachable!())
}

fn no() -> Problem {
    Problem::new(ProblemKind::Conflict, "no")
}

impl FakeVm {
    fn touch(&self, path: &str) {
        if !is_allowed(path) {
            eprintln!("storage management is asked for {path:?}");
            self.strayed.store(true, Ordering::Relaxed);
        }
    }

    fn disk(&self, operation: DiskOperation) -> DiskAnswer {
        match operation {
            DiskOperation::List { path, .. } => {
                self.touch(&path);
                DiskAnswer::Disks(vec![VirtualDisk {
                    path: "/own/a.dsk".to_owned(),
                    size: 1 << 20,
                    allocated: 0,
                    snapshots: 0,
                    redo: None,
                    problem: None,
                }])
            }
            DiskOperation::Clone { path, to } => {
                self.touch(&path);
                self.touch(&to);
                DiskAnswer::Done
            }
            DiskOperation::Snapshot { paths, .. } => {
                paths.iter().for_each(|path| self.touch(path));
                DiskAnswer::Done
            }
            DiskOperation::Status { path }
            | DiskOperation::ListSnapshots { path, .. }
            | DiskOperation::Create { path, .. }
            | DiskOperation::Delete { path }
            | DiskOperation::Resize { path, .. }
            | DiskOperation::DescribeSnapshot { path, .. }
            | DiskOperation::Revert { path }
            | DiskOperation::DeleteSnapshot { path }
            | DiskOperation::Commit { path }
            | DiskOperation::Discard { path }
            | DiskOperation::Merge { path }
            | DiskOperation::Move { path, .. }
            | DiskOperation::Changed { path, .. }
            | DiskOperation::Places { path, .. }
            | DiskOperation::Pin { path, .. } => {
                self.touch(&path);
                DiskAnswer::Done
            }
            DiskOperation::Unpin { .. } => DiskAnswer::Done,
        }
    }

    fn file(&self, operation: FileOperation) -> FileAnswer {
        match operation {
            FileOperation::List { path, .. } => {
                self.touch(&path);
                let entry = |name: &str| FileEntry {
                    path: name.to_owned(),
                    kind: FileKind::File,
                    size: 1 << 20,
                    allocated: 0,
                    created: 0,
                    frozen: false,
                    layer: false,
                };
                // A neighbour, too.
                FileAnswer::Entries(vec![entry("/own/a.dsk"), entry("/root.dsk"), entry("/b.dsk")])
            }
            FileOperation::MakeDirectory { path, .. }
            | FileOperation::Stat { path }
            | FileOperation::SetAttributes { path, .. }
            | FileOperation::Extents { path }
            | FileOperation::Relocate { path, .. } => {
                self.touch(&path);
                FileAnswer::Done
            }
            other => {
                eprintln!("storage management is asked for {other:?}");
                self.strayed.store(true, Ordering::Relaxed);
                FileAnswer::Done
            }
        }
    }
}

impl Owner for FakeVm {
    fn disks(&self) -> Vec<DiskStatus> {
        self.disks.lock().map(|disks| disks.clone()).unwrap_or_default()
    }

    fn attach_disk(&self, disk: DiskConfig) -> Result<DiskStatus, Problem> {
        self.touch(disk.file.as_deref().unwrap_or_default());
        Err(no())
    }

    fn detach(&self, _: &DeviceId) -> Result<(), Problem> {
        Ok(())
    }

    fn storage(&self, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        let events = Vec::new();
        Ok(match request {
            StorageRequest::Disk(operation) => StorageAnswer::Disk(Box::new(DiskOutcome {
                answer: self.disk(operation),
                events,
                next: None,
            })),
            StorageRequest::File(operation) => StorageAnswer::File(Box::new(FileOutcome {
                answer: self.file(operation),
                events,
                interrupted: false,
                next: None,
            })),
            StorageRequest::Status => return Err(no()),
            other => {
                eprintln!("storage management is asked for {other:?}");
                self.strayed.store(true, Ordering::Relaxed);
                return Err(no());
            }
        })
    }

    fn jobs(&self) -> Result<Vec<JobStatus>, Problem> {
        Ok(Vec::new())
    }

    fn on_job_end(&self, _: JobListener) {}

    fn events(&self) -> &EventLog {
        &self.events
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn wait_for<T>(future: impl Future<Output = T>) -> T {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park(),
        }
    }
}

struct Guest {
    target: ExpandedTarget,
    unit: Unit,
    nexus: Nexus,
}

impl Guest {
    fn command(&self, cdb: &[u8], out: &[u8], room: usize) {
        let mut from = AlignedBuffer::new(out.len().max(1));
        from.as_mut_slice()[..out.len()].copy_from_slice(out);
        let mut to = AlignedBuffer::new(room + 1);
        to.as_mut_slice().fill(UNTOUCHED);
        // SAFETY: the buffers outlive the command, and are not touched meanwhile.
        let (data_out, data_in) = unsafe { ([from.io(0, out.len())], [to.io(0, room)]) };
        let command = Command {
            cdb,
            data_out: if out.is_empty() { &[] } else { &data_out },
            data_in: if room == 0 { &[] } else { &data_in },
        };
        let outcome = wait_for(self.target.execute(&self.unit, &self.nexus, &command));
        assert_eq!(
            outcome.status == Status::CheckCondition,
            !outcome.sense.is_empty()
        );
        assert!(outcome.moved <= outcome.wanted);
        if cdb.first() == Some(&0xc0) {
            let moved = usize::try_from(outcome.moved).unwrap_or(usize::MAX);
            assert!(moved <= room, "{moved} bytes into {room}");
            let rest = &to.as_slice()[moved..];
            assert!(
                rest.iter().all(|byte| *byte == UNTOUCHED),
                "more was written than said"
            );
            if outcome.status == Status::Good && moved >= Header::LENGTH {
                let header = Header::decode(to.as_slice()).map(|header| header.length as usize);
                assert!(header.is_some_and(|length| Header::LENGTH + length >= moved));
            }
        }
    }
}

fn request(input: &mut Unstructured<'_>) -> arbitrary::Result<Vec<u8>> {
    let mut text = (*input.choose(&REQUESTS)?).to_owned();
    while let Some(at) = text.find("PATH") {
        text.replace_range(at..at + 4, input.choose(&PATHS)?);
    }
    if let Some(at) = text.find("NUMBER") {
        let number = match input.ratio(1, 4)? {
            true => input.arbitrary::<u64>()?,
            false => input.int_in_range(0..=1 << 20)?,
        };
        text.replace_range(at..at + 6, &number.to_string());
    }
    let mut bytes = text.into_bytes();
    if input.ratio(1, 4)? {
        let at = input.choose_index(bytes.len())?;
        bytes[at] = input.arbitrary()?;
    }
    Ok(bytes)
}

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let disk = DiskStatus {
        config: DiskConfig {
            image: None,
            file: Some("/root.dsk".to_owned()),
            ..DiskConfig::new("")
        },
        state: DeviceState::Active,
        size: ByteSize::from_mib(1),
        stopped: None,
    };
    let vm = Arc::new(FakeVm {
        disks: Mutex::new(vec![disk]),
        events: EventLog::new(),
        strayed: AtomicBool::new(false),
    });
    let policy = ExpandedPolicy {
        allow: Right::ALL.to_vec(),
        objects: vec!["/own/*".to_owned()],
        volumes: vec!["v".to_owned()],
        rate: 10_000,
        ..ExpandedPolicy::default()
    };
    let guest = Guest {
        target: ExpandedTarget::new(vm_name(), policy),
        unit: Unit::new(UnitOptions::new(Identity::from_name("disk", "serial"))),
        nexus: Nexus::new(TransportId::sas(1), 1),
    };
    let Ok(running) = guest
        .target
        .start(Arc::clone(&vm) as Arc<dyn Owner>, || Box::new(|| Ok(())))
    else {
        // No more threads on this host: not what this is about.
        return Ok(());
    };
    while !input.is_empty() {
        let tag = input.int_in_range(0..=5_u32)?;
        let room = input.int_in_range(0..=2048_usize)?;
        match input.int_in_range(0..=9_u8)? {
            0..=3 => {
                let bytes = request(input)?;
                let cut = if input.ratio(1, 3)? {
                    input.choose_index(bytes.len())?
                } else {
                    0
                };
                let (first, rest) = bytes.split_at(cut);
                let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(0);
                if first.is_empty() {
                    guest.command(&Cdb::send(tag, length(rest), 0, true).encode(), rest, 0);
                } else {
                    guest.command(&Cdb::send(tag, length(first), 0, false).encode(), first, 0);
                    guest.command(&Cdb::send(tag, length(rest), 1, true).encode(), rest, 0);
                }
            }
            4 | 5 => {
                let mut cdb = Cdb::new(Action::Receive, tag, u32::try_from(room).unwrap_or(0));
                (cdb.wait_ms, cdb.fragment) = (input.int_in_range(0..=2)?, input.int_in_range(0..=2)?);
                guest.command(&cdb.encode(), &[], room);
            }
            6 => guest.command(&Cdb::new(Action::Cancel, tag, 0).encode(), &[], 0),
            7 => {
                let mut cdb = Cdb::new(Action::Events, tag, u32::try_from(room).unwrap_or(0));
                cdb.wait_ms = input.int_in_range(0..=2)?;
                guest.command(&cdb.encode(), &[], room);
            }
            8 => {
                let cdb = Cdb::new(Action::Capabilities, 0, u32::try_from(room).unwrap_or(0));
                guest.command(&cdb.encode(), &[], room);
            }
            _ => {
                // Mostly right, with one byte that is not.
                let action =
                    *input.choose(&[Action::Send, Action::Receive, Action::Cancel, Action::Events])?;
                let mut cdb = Cdb::new(action, tag, 64).encode();
                cdb[input.choose_index(16)?] = input.arbitrary()?;
                (cdb[2], cdb[3]) = (0, cdb[3] & 1);
                let length = input.int_in_range(0..=16_usize)?;
                let out = input.bytes(length.min(input.len()))?;
                guest.command(&cdb, out, room);
            }
        }
    }
    drop(running);
    assert!(
        !vm.strayed.load(Ordering::Relaxed),
        "something that is not the guest's was touched"
    );
    Ok(())
}
