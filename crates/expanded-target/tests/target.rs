//! The commands of the expanded API against a pool that does what a test says.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::mpsc::{channel, sync_channel};
use std::sync::{Arc, Mutex};

use api::file::{FileAnswer, FileOutcome};
use api::virtual_disk::{DiskAnswer, DiskOperation, DiskOutcome, VirtualDisk};
use api::{EventKind, ExpandedPolicy, Problem, ProblemKind, Right, StorageAnswer, StorageRequest};
use common::{FakeVm, Guest};
use expanded_api::{Action, Answer, Cdb, GuestEvents, Header, MAX_PAYLOAD, Outcome, Page, Request, State};
use expanded_target::Owner;

fn policy(allow: &[Right]) -> ExpandedPolicy {
    ExpandedPolicy {
        allow: allow.to_vec(),
        objects: vec!["/vm1/*".into()],
        rate: 10_000,
        ..ExpandedPolicy::default()
    }
}

fn disk_answer(answer: DiskAnswer) -> Result<StorageAnswer, Problem> {
    let events = Vec::new();
    Ok(StorageAnswer::Disk(Box::new(DiskOutcome {
        answer,
        events,
        next: None,
    })))
}

/// A pool that does everything at once.
fn obliging(request: StorageRequest) -> Result<StorageAnswer, Problem> {
    match request {
        StorageRequest::Disk(DiskOperation::List { .. }) => {
            disk_answer(DiskAnswer::Disks(vec![VirtualDisk {
                path: "/vm1/old.dsk".into(),
                size: 1 << 20,
                allocated: 0,
                snapshots: 0,
                redo: None,
                problem: None,
            }]))
        }
        StorageRequest::Disk(_) => disk_answer(DiskAnswer::Done),
        StorageRequest::File(_) => Ok(StorageAnswer::File(Box::new(FileOutcome {
            answer: FileAnswer::Done,
            events: Vec::new(),
            interrupted: false,
            next: None,
        }))),
        _ => Err(Problem::new(ProblemKind::Conflict, "not in this test")),
    }
}

const CREATE: &str = r#"{"command": "create-disk", "disk": "/vm1/new.dsk", "size": 4096, "attach": true}"#;

#[test]
fn a_guest_learns_who_it_is_and_what_it_may_without_a_request() {
    let guest = Guest::new(FakeVm::new(obliging), policy(&[Right::Snapshot]));
    let page = Page::decode(&guest.page()).unwrap();
    assert_eq!(page.rights, [Right::Observe, Right::Snapshot]);
    let answered = guest.input(Cdb::new(Action::Capabilities, 0, 4096)).good();
    let outcome: Outcome = serde_json::from_slice(&answered.data[Header::LENGTH..]).unwrap();
    let Outcome::Answer(answer) = outcome else {
        panic!("{outcome:?}")
    };
    let Answer::Description(description) = *answer else {
        panic!("{answer:?}")
    };
    assert_eq!(
        (description.vm.as_str(), description.objects[0].as_str()),
        ("fake", "/vm1/*")
    );
    // In pieces as small as they can be, with something in them.
    let mut text: Vec<u8> = Vec::new();
    for fragment in 0..=255 {
        let cdb = Cdb {
            fragment,
            ..Cdb::new(Action::Capabilities, 0, 32)
        };
        text.extend(&guest.input(cdb).good().data[Header::LENGTH..]);
    }
    assert_eq!(text, answered.data[Header::LENGTH..]);
}

#[test]
fn a_request_is_done_once_however_often_it_is_sent() {
    let vm = FakeVm::new(obliging);
    let guest = Guest::new(vm.clone(), policy(&[Right::Create]));
    guest.send(7, CREATE).good();
    let outcome = guest.outcome(7);
    assert!(
        matches!(&outcome, Outcome::Answer(answer) if matches!(**answer, Answer::Attached(_))),
        "{outcome:?}"
    );
    guest.send(7, CREATE).good();
    assert_eq!(guest.outcome(7), outcome);
    let made = vm
        .asked
        .lock()
        .unwrap()
        .iter()
        .filter(|asked| matches!(asked, StorageRequest::Disk(DiskOperation::Create { .. })))
        .count();
    assert_eq!((made, vm.disks.lock().unwrap().len()), (1, 1));
    assert_eq!(
        guest.send(7, r#"{"command": "list-jobs"}"#).sense(),
        Some((0x26, 0))
    );
    assert_eq!(
        guest.outcome(7),
        outcome,
        "and the first one's outcome is still there"
    );
    // Forgotten, the tag is free.
    guest.cancel(7).good();
    assert_eq!(guest.receive(7, 0).sense(), Some((0x24, 0)));
    assert_eq!(guest.cancel(7).sense(), Some((0x24, 0)));
}

#[test]
fn what_is_refused_has_sense_data_a_reason_and_an_event_and_does_nothing() {
    let vm = FakeVm::new(obliging);
    vm.has("/root.dsk", false);
    vm.has("/tools.dsk", true);
    let guest = Guest::new(vm.clone(), policy(&[Right::Create, Right::Resize]));
    let no_rights = Some((0x20, 2));
    let wrong = Some((0x26, 0));
    for (tag, (text, sense, reason)) in [
        (
            r#"{"command": "delete-disk", "disk": "/vm1/a.dsk"}"#,
            no_rights,
            "lacks the right `delete`",
        ),
        (
            r#"{"command": "create-disk", "disk": "/vm2/a.dsk", "size": 1}"#,
            no_rights,
            "may not make /vm2/a.dsk",
        ),
        (
            r#"{"command": "resize-disk", "disk": "/tools.dsk", "size": 1}"#,
            no_rights,
            "only to read",
        ),
        (
            r#"{"command": "disk-status", "disk": "/vm2/a.dsk"}"#,
            no_rights,
            "no disk of this guest",
        ),
        (
            r#"{"command": "disk-status", "disk": "/vm1/../vm2/a.dsk"}"#,
            wrong,
            "`..`",
        ),
        (r#"{"command": "format"}"#, wrong, "this is no request"),
        (r#"{"command": "describe""#, wrong, "this is no request"),
        ("\0\u{1}\u{2}", wrong, "this is no request"),
    ]
    .into_iter()
    .enumerate()
    {
        // Not more at once than get events.
        std::thread::sleep(std::time::Duration::from_millis(if tag < 4 { 0 } else { 600 }));
        let tag = u32::try_from(tag).unwrap();
        assert_eq!(guest.send(tag, text).sense(), sense, "{text}");
        assert_eq!(guest.send(tag, text).sense(), sense, "{text}, again");
        let Outcome::Problem(problem) = guest.outcome(tag) else {
            panic!("{text}")
        };
        assert!(problem.to_string().contains(reason), "{text}: {problem}");
        let last = vm.events().page(0, 100).events.pop().unwrap().kind;
        let EventKind::GuestCommandRefused { reason: noted, .. } = &last else {
            panic!("{last:?}")
        };
        assert!(problem.detail.contains(noted), "{noted}");
    }
    assert_eq!(
        *vm.asked.lock().unwrap(),
        [],
        "storage management was never asked"
    );
}

#[test]
fn a_request_comes_in_fragments_and_not_otherwise() {
    let guest = Guest::new(FakeVm::new(obliging), policy(&[]));
    let text = format!("{{\"command\": \"describe\"{}}}", " ".repeat(200_000));
    let pieces: Vec<&[u8]> = text.as_bytes().chunks(1 << 16).collect();
    for (number, piece) in pieces.iter().enumerate() {
        let length = u32::try_from(piece.len()).unwrap();
        let number = u8::try_from(number).unwrap();
        let cdb = Cdb::send(1, length, number, usize::from(number) + 1 == pieces.len());
        guest.raw(&cdb.encode(), piece, 0).good();
    }
    assert!(matches!(guest.outcome(1), Outcome::Answer(_)));
    let sense = |cdb: Cdb, bytes: &[u8]| guest.raw(&cdb.encode(), bytes, 0).sense();
    assert_eq!(
        sense(Cdb::send(2, 1, 1, true), b"x"),
        Some((0x24, 0)),
        "there is no first one"
    );
    assert_eq!(
        sense(Cdb::send(2, 9, 0, true), b"x"),
        Some((0x1a, 0)),
        "less came than was said"
    );
    let much = vec![b' '; MAX_PAYLOAD];
    let length = u32::try_from(MAX_PAYLOAD).unwrap();
    assert_eq!(sense(Cdb::send(3, length, 0, false), &much), None);
    assert_eq!(
        sense(Cdb::send(3, 1, 1, true), b"x"),
        Some((0x26, 0)),
        "too much together"
    );
    let mut cdb = Cdb::send(4, 1, 0, true);
    cdb.length = length + 1;
    assert_eq!(sense(cdb, &much), Some((0x24, 0)), "too much at once");
}

#[test]
fn changes_are_made_one_after_the_other_while_others_look_and_wait() {
    let (go, gone) = sync_channel::<()>(0);
    let (begun, has_begun) = channel();
    let (gone, begun) = (Mutex::new(gone), Mutex::new(begun));
    let vm = FakeVm::new(move |request| match request {
        StorageRequest::Disk(DiskOperation::Delete { .. }) => {
            begun.lock().unwrap().send(()).unwrap();
            gone.lock().unwrap().recv().unwrap();
            disk_answer(DiskAnswer::Done)
        }
        other => obliging(other),
    });
    let guest = Guest::new(vm, policy(&[Right::Delete]));
    let delete = |name: &str| format!(r#"{{"command": "delete-disk", "disk": "/vm1/{name}.dsk"}}"#);
    guest.send(1, &delete("a")).good();
    has_begun.recv().unwrap();
    guest.send(2, &delete("b")).good();
    guest.send(3, &delete("c")).good();
    assert_eq!(guest.receive(1, 0).good().header().state, State::Running);
    // Longer than nothing, and not for ever.
    assert_eq!(guest.receive(1, 30).good().header().state, State::Running);
    assert_eq!(guest.receive(2, 30).good().header().state, State::Queued);
    assert_eq!(guest.cancel(1).sense(), Some((0x2c, 0)));
    guest.cancel(2).good();
    assert!(matches!(guest.outcome(2), Outcome::Problem(_)));
    // Who only looks is not held up.
    assert!(matches!(
        guest.ask(&Request::ReplicationStatus {}),
        Ok(Answer::NotConfigured(_))
    ));
    go.send(()).unwrap();
    assert!(matches!(guest.outcome(1), Outcome::Answer(_)));
    has_begun.recv().unwrap();
    go.send(()).unwrap();
    assert!(matches!(guest.outcome(3), Outcome::Answer(_)));
    assert!(has_begun.try_recv().is_err(), "what was taken back was not done");
}

#[test]
fn who_sends_too_much_is_told_so_and_fills_no_log() {
    let vm = FakeVm::new(obliging);
    let slow = ExpandedPolicy {
        rate: 1,
        ..policy(&[])
    };
    let guest = Guest::new(vm.clone(), slow);
    for tag in 0..2 {
        guest.send(tag, r#"{"command": "list-jobs"}"#);
    }
    let refused = (2..200).filter(|tag| guest.send(*tag, "{}").sense() == Some((0x55, 3)));
    assert!(refused.count() > 100);
    assert!(vm.events().last() < 50, "{}", vm.events().last());
}

#[test]
fn requests_that_have_not_ended_are_counted() {
    let (go, gone) = sync_channel::<()>(0);
    let gone = Mutex::new(gone);
    let vm = FakeVm::new(move |_| {
        let _ = gone.lock().unwrap().recv();
        disk_answer(DiskAnswer::Done)
    });
    let guest = Guest::new(vm, policy(&[Right::Delete]));
    let delete = |tag| {
        guest
            .send(tag, r#"{"command": "delete-disk", "disk": "/vm1/a.dsk"}"#)
            .sense()
    };
    let refused: Vec<_> = (0..20).map(delete).collect();
    assert_eq!(refused[..16], [None; 16]);
    assert_eq!(refused[16..], [Some((0x55, 3)); 4]);
    drop(go);
}

#[test]
fn quotas_hold() {
    let vm = FakeVm::new(obliging);
    let create = |guest: &Guest, size| {
        guest.ask(&Request::CreateDisk {
            disk: "/vm1/new.dsk".into(),
            size,
            thick: false,
            target: None,
            checksums: None,
            attach: false,
        })
    };
    let guest = |max_disks, max_bytes| {
        let policy = ExpandedPolicy {
            max_disks,
            max_bytes: Some(api::ByteSize::from_bytes(max_bytes)),
            ..policy(&[Right::Create])
        };
        Guest::new(vm.clone(), policy)
    };
    // There is one of 1 MiB.
    assert_eq!(
        create(&guest(1, u64::MAX), 1).unwrap_err().kind,
        ProblemKind::Exhausted
    );
    assert_eq!(
        create(&guest(2, 2 << 20), (1 << 20) + 1).unwrap_err().kind,
        ProblemKind::Exhausted
    );
    assert_eq!(create(&guest(2, u64::MAX), u64::MAX), Ok(Answer::Done));
    assert_eq!(
        create(&guest(2, u64::MAX - 1), u64::MAX).unwrap_err().kind,
        ProblemKind::Exhausted
    );
    assert_eq!(create(&guest(2, 2 << 20), 1 << 20), Ok(Answer::Done));
}

#[test]
fn events_are_waited_for_and_say_nothing_of_the_host() {
    let vm = FakeVm::new(obliging);
    let guest = Arc::new(Guest::new(vm.clone(), policy(&[])));
    let events = |after, wait_ms| {
        let cdb = Cdb {
            wait_ms,
            ..Cdb::new(Action::Events, after, 1 << 16)
        };
        let answered = guest.input(cdb).good();
        serde_json::from_slice::<GuestEvents>(&answered.data[Header::LENGTH..]).unwrap()
    };
    assert_eq!(events(0, 0).events, []);
    assert_eq!(events(0, 20).last, 0);
    let id: api::DeviceId = "disk7".parse().unwrap();
    let later = std::thread::spawn({
        let (vm, id) = (vm.clone(), id.clone());
        move || {
            vm.events().record(EventKind::DeviceFailed {
                id: id.clone(),
                reason: "/secret/path".into(),
            });
            vm.events().record(EventKind::DiskStopped {
                id,
                reason: "/secret/path".into(),
            });
        }
    });
    let page = events(0, 4000);
    later.join().unwrap();
    assert_eq!(page.events[0].event, "disk-stopped");
    assert!(!format!("{page:?}").contains("secret"));
    assert_eq!(events(2, 0).events, []);
}

#[test]
fn when_the_machine_ends_nobody_waits_any_more() {
    let mut guest = Guest::new(FakeVm::new(obliging), policy(&[]));
    drop(guest.running.take());
    assert_eq!(
        guest.send(1, r#"{"command": "describe"}"#).sense(),
        Some((0x04, 1))
    );
}
