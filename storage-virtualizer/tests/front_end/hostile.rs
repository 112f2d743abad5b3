//! Servers that are broken, or mean harm: what they do is said, and nobody hangs.

use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use block_io::error_chain;
use storage_virtualizer::vhost_user::front_end::VhostUserDevice;
use storage_virtualizer::vhost_user::message::{
    F_PROTOCOL_FEATURES, backend_request, protocol_feature, request,
};
use storage_virtualizer::vhost_user::socket::receive;
use storage_virtualizer::virtio_blk::blk_feature;
use virtio_core::{VirtioDevice, feature};
use vmm_sys_util::eventfd::EventFd;

use crate::driver::{Driver, Events, activate, memory, reset_and_wait};
use crate::fake::{Act, Character, Fake, say};
use crate::place::{Observer, Requests, open, shared_memory, wait_until};

const FEATURES: u64 = feature::VERSION_1 | feature::RING_EVENT_IDX | blk_feature::FLUSH;

/// Opening a disk there fails; the whole error in one line.
fn refused(character: Character) -> String {
    let fake = Fake::start(character);
    let start = Instant::now();
    let error = open(fake.path(), 2, 64).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(5), "{error}");
    error_chain(&error)
}

/// A device with one queue in use.
struct Machine {
    fake: Fake,
    device: VhostUserDevice,
    observer: Arc<Observer>,
    driver: Driver,
    events: Arc<Events>,
}

fn start(character: Character) -> Machine {
    let fake = Fake::start(character);
    let (mut device, observer) = open(fake.path(), 1, 64).unwrap();
    let memory = shared_memory();
    let driver = Driver::new(&memory, 0, 64, true);
    let events = activate(&mut device, &memory, FEATURES, vec![driver.active(0)]);
    wait_until("the queue is enabled", || {
        fake.count(request::SET_VRING_ENABLE) > 0
    });
    Machine {
        fake,
        device,
        observer,
        driver,
        events,
    }
}

#[test]
fn who_is_no_server_of_a_disk_is_named_at_once() {
    let missing = tempfile::tempdir().unwrap().path().join("a.sock");
    let error = open(&missing, 1, 64).unwrap_err();
    assert_eq!(error.to_string(), "nobody serves there");

    let without = |feature: u64| Character {
        features: Character::default().features & !feature,
        ..Character::default()
    };
    assert!(refused(without(feature::VERSION_1)).contains("VIRTIO_F_VERSION_1"));
    assert!(refused(without(F_PROTOCOL_FEATURES)).contains("VHOST_USER_F_PROTOCOL_FEATURES"));
    let protocol = |protocol| Character {
        protocol,
        ..Character::default()
    };
    assert!(refused(protocol(protocol_feature::MQ)).contains("VHOST_USER_PROTOCOL_F_CONFIG"));
    assert!(
        refused(protocol(protocol_feature::CONFIG)).contains("it has 1 queues, and the disk is to have 2")
    );
    let empty = Character {
        sectors: 0,
        ..Character::default()
    };
    assert!(refused(empty).contains("its disk is empty"));
}

#[test]
fn a_server_that_misbehaves_at_any_message_is_refused_with_the_message_named() {
    let questions = [
        (request::GET_FEATURES, "GET_FEATURES"),
        (request::GET_PROTOCOL_FEATURES, "GET_PROTOCOL_FEATURES"),
        (request::GET_QUEUE_NUM, "GET_QUEUE_NUM"),
        (request::SET_OWNER, "SET_OWNER"),
        (request::SET_BACKEND_REQ_FD, "SET_BACKEND_REQ_FD"),
        (request::GET_CONFIG, "GET_CONFIG"),
    ];
    for (question, name) in questions {
        for act in [Act::Close, Act::Silence, Act::Mistake, Act::Rubbish, Act::Half] {
            let said = refused(Character::that(
                move |request| {
                    if request == question { act } else { Act::Obey }
                },
            ));
            assert!(said.contains(name), "{name} {act:?}: {said}");
        }
    }
    for question in [
        request::GET_FEATURES,
        request::GET_QUEUE_NUM,
        request::GET_CONFIG,
        request::SET_OWNER,
    ] {
        refused(Character::that(move |request| {
            if request == question {
                Act::Empty
            } else {
                Act::Obey
            }
        }));
    }
    assert!(
        refused(Character::that(|request| match request {
            request::SET_OWNER => Act::Refuse,
            _ => Act::Obey,
        }))
        .contains("it refused SET_OWNER")
    );
}

/// Refuses each step of a start once, in one way, so that in the end there is a start.
fn starts_in_spite_of(act: Act) {
    const STEPS: [u32; 7] = [
        request::SET_FEATURES,
        request::GET_INFLIGHT_FD,
        request::SET_INFLIGHT_FD,
        request::SET_MEM_TABLE,
        request::SET_VRING_NUM,
        request::SET_VRING_KICK,
        request::SET_VRING_ENABLE,
    ];
    let met = Arc::new(AtomicU32::new(0));
    let count = met.clone();
    let mut machine = start(Character::that(move |request| {
        let next = count.load(Ordering::SeqCst) as usize;
        if STEPS.get(next) == Some(&request) {
            count.fetch_add(1, Ordering::SeqCst);
            return act;
        }
        Act::Obey
    }));
    machine.observer.wait_for("back");
    wait_until("all were met", || met.load(Ordering::SeqCst) == 7);
    wait_until("it runs", || machine.fake.count(request::SET_VRING_ENABLE) == 2);
    reset_and_wait(&mut machine.device);
    assert!(machine.events.reset_reasons.lock().unwrap().is_empty());
}

#[test]
fn a_server_that_refuses_to_start_is_tried_again_until_it_does() {
    std::thread::scope(|scope| {
        for act in [
            Act::Refuse,
            Act::Close,
            Act::Silence,
            Act::Mistake,
            Act::Rubbish,
            Act::Half,
        ] {
            scope.spawn(move || starts_in_spite_of(act));
        }
    });
}

#[test]
fn what_is_said_without_a_question_ends_the_connection_and_another_follows() {
    let machine = start(Character::default());
    let connection = machine.fake.connection.lock().unwrap().take().unwrap();
    say(&connection, 7, false);
    machine.observer.wait_for("without being asked");
    machine.observer.wait_for("back");
    wait_until("it runs again", || {
        machine.fake.count(request::SET_VRING_ENABLE) == 2
    });
    // Both sides are woken: requests and answers may have been announced to nobody.
    assert!(machine.driver.wait_for_interrupt(Duration::from_secs(5)));
    assert_eq!(machine.driver.kick.read().unwrap(), 1);
}

#[test]
fn the_record_goes_to_the_successor_and_not_into_the_next_life() {
    let mut machine = start(Character::default());
    machine.fake.hang_up();
    wait_until("it runs again", || {
        machine.fake.count(request::SET_VRING_ENABLE) == 2
    });
    assert_eq!(machine.fake.count(request::GET_INFLIGHT_FD), 1);
    assert_eq!(machine.fake.count(request::SET_INFLIGHT_FD), 2);
    reset_and_wait(&mut machine.device);
    assert_eq!(machine.fake.count(request::GET_VRING_BASE), 1);
    assert_eq!(machine.fake.count(request::RESET_DEVICE), 1);
    let memory = shared_memory();
    let driver = Driver::new(&memory, 0, 64, true);
    activate(&mut machine.device, &memory, FEATURES, vec![driver.active(0)]);
    wait_until("it runs", || machine.fake.count(request::SET_VRING_ENABLE) == 3);
    assert_eq!(machine.fake.count(request::GET_INFLIGHT_FD), 2);
}

#[test]
fn requests_lost_by_a_server_without_a_record_are_the_guests_affair() {
    let mut character = Character::default();
    character.protocol &= !protocol_feature::INFLIGHT_SHMFD;
    let mut machine = start(character);
    // Nothing in flight: nothing is lost.
    machine.fake.hang_up();
    wait_until("it runs again", || {
        machine.fake.count(request::SET_VRING_ENABLE) == 2
    });
    Requests(&mut machine.driver).write(0, 0, 1);
    Requests(&mut machine.driver).write(1, 0, 1);
    machine.fake.hang_up();
    let reason = machine.events.wait_for_reset_reason();
    assert!(reason.contains("went away with 2 requests"), "{reason}");
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(machine.fake.count(request::SET_VRING_ENABLE), 2);
    // The guest resets the device, and it is as new.
    reset_and_wait(&mut machine.device);
    let memory = shared_memory();
    let driver = Driver::new(&memory, 0, 64, true);
    activate(&mut machine.device, &memory, FEATURES, vec![driver.active(0)]);
    wait_until("it runs", || machine.fake.count(request::SET_VRING_ENABLE) == 3);
}

#[test]
fn a_successor_that_offers_less_is_not_taken() {
    let machine = start(Character::default());
    let (features, protocol) = {
        let character = machine.fake.character.lock().unwrap();
        (character.features, character.protocol)
    };
    let change = |features, protocol| {
        let mut character = machine.fake.character.lock().unwrap();
        (character.features, character.protocol) = (features, protocol);
    };
    change(features & !blk_feature::FLUSH, protocol);
    machine.fake.hang_up();
    wait_until("it was looked at", || {
        machine.fake.count(request::GET_CONFIG) >= 3
    });
    assert!(!machine.device.handle().is_connected());
    change(features, protocol & !protocol_feature::INFLIGHT_SHMFD);
    let looked = machine.fake.count(request::GET_CONFIG);
    wait_until("it was looked at", || {
        machine.fake.count(request::GET_CONFIG) >= looked + 2
    });
    assert_eq!(machine.fake.count(request::SET_VRING_ENABLE), 1);
    change(features, protocol);
    machine.observer.wait_for("back");
    wait_until("it runs", || machine.fake.count(request::SET_VRING_ENABLE) == 2);
}

#[test]
fn a_ring_that_the_server_calls_broken_is_for_the_guest_to_reset() {
    let mut machine = start(Character::default());
    let errors = machine.fake.descriptor(request::SET_VRING_ERR);
    // SAFETY: an eventfd that is ours.
    let errors = unsafe { EventFd::from_raw_fd(errors.into_raw_fd()) };
    errors.write(1).unwrap();
    assert!(machine.events.wait_for_reset_reason().contains("broken"));
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(machine.events.reset_reasons.lock().unwrap().len(), 1);
    reset_and_wait(&mut machine.device);
}

#[test]
fn a_reset_waits_for_a_server_that_hangs_and_ends_when_it_goes() {
    let silent = |request| match request {
        request::GET_VRING_BASE => Act::Silence,
        _ => Act::Obey,
    };
    let mut machine = start(Character::that(silent));
    machine.device.reset();
    // Longer than an answer to anything else may take.
    std::thread::sleep(Duration::from_millis(600));
    assert!(
        !machine.device.is_idle(),
        "it may still write to the guest's memory"
    );
    machine.fake.hang_up();
    wait_until("it is idle", || machine.device.is_idle());
    // And the end of the disk waits for nobody.
    let mut machine = start(Character::that(silent));
    machine.device.reset();
    wait_until("it was asked", || {
        machine.fake.count(request::GET_VRING_BASE) == 1
    });
    let start = Instant::now();
    drop(machine.device);
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[test]
fn a_server_that_talks_rubbish_on_its_way_back_is_not_listened_to() {
    let machine = start(Character::default());
    let back = machine.fake.descriptor(request::SET_BACKEND_REQ_FD);
    let back = std::os::unix::net::UnixStream::from(back);
    back.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    // A change that is none, confirmed; then something that is not known.
    say(&back, backend_request::CONFIG_CHANGE_MSG, true);
    let answer = receive(&back).unwrap();
    assert!(answer.header.is_reply);
    assert_eq!(answer.body, 0_u64.to_le_bytes());
    assert_eq!(machine.events.config_changes.load(Ordering::Relaxed), 0);
    say(&back, 99, true);
    assert_eq!(receive(&back).unwrap().body, 1_u64.to_le_bytes());
    machine.fake.character.lock().unwrap().sectors = 4096;
    rustix::net::send(&back, &[0xaa; 40], rustix::net::SendFlags::NOSIGNAL).unwrap();
    wait_until("it is closed", || crate::place::is_closed(&back));
    assert!(machine.device.handle().is_connected());
}

#[test]
fn memory_that_is_not_shared_is_not_given_away() {
    let fake = Fake::start(Character::default());
    let (mut device, observer) = open(fake.path(), 1, 64).unwrap();
    let memory = memory(4 << 20);
    let driver = Driver::new(&memory, 0, 64, true);
    activate(&mut device, &memory, FEATURES, vec![driver.active(0)]);
    observer.wait_for("guest memory is not shared");
    assert_eq!(fake.count(request::SET_MEM_TABLE), 0);
    reset_and_wait(&mut device);
}

#[test]
fn our_own_addresses_are_nobodys_business() {
    let machine = start(Character::default());
    let heard = machine.fake.heard.lock().unwrap();
    let table = heard
        .iter()
        .find(|heard| heard.request == request::SET_MEM_TABLE)
        .unwrap();
    let number = |at: usize| u64::from_le_bytes(table.body[at..at + 8].try_into().unwrap());
    assert_eq!(table.body[0], 2);
    assert_eq!((number(8), number(24)), (0, 1 << 46));
    assert_eq!((number(40), number(56)), (4 << 30, (1 << 46) + (4 << 30)));
}
