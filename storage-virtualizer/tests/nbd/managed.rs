//! Exports that come and go, and clients that must, while the server runs.

use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use block_io::nbd::protocol::{command, error};
use block_io::{ListenAddress, Worker, WorkerOptions};
use storage_virtualizer::nbd::{Export, NbdControl, NbdManageError, NbdOptions, NbdServer, NbdServerError};

use crate::disk::{Disk, Shared, release};
use crate::raw::Client;

/// A disk that counts as used as long as somebody has it.
struct Named {
    name: String,
    disk: Disk,
    _alive: Arc<()>,
}

impl Export for Named {
    type Disk = Disk;

    fn name(&self) -> &str {
        &self.name
    }

    fn disk(&self) -> &Disk {
        &self.disk
    }
}

struct Served {
    control: NbdControl<Named>,
    script: Shared,
    server: Option<NbdServer>,
    _worker: Worker,
    folder: tempfile::TempDir,
}

impl Served {
    fn start(change: impl FnOnce(&mut NbdOptions)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let worker = Worker::start("managed", WorkerOptions::default()).unwrap();
        let mut options = NbdOptions {
            listen: vec![ListenAddress::Unix(folder.path().join("socket"))],
            ..NbdOptions::default()
        };
        change(&mut options);
        let (server, control) = NbdServer::start_managed(worker.handle(), options, Vec::new).unwrap();
        Self {
            control,
            script: Shared::default(),
            server: Some(server),
            _worker: worker,
            folder,
        }
    }

    /// Adds an export; what is returned is alive as long as somebody has its disk.
    fn add(&self, name: &str) -> Result<Weak<()>, NbdServerError> {
        let (script, name, alive) = (Shared::clone(&self.script), name.to_owned(), Arc::new(()));
        let used = Arc::downgrade(&alive);
        self.control.add(move || async move {
            Ok(Named {
                name,
                disk: Disk::new(&script),
                _alive: alive,
            })
        })?;
        Ok(used)
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }
}

/// Begins a read that the disk holds.
fn held_read(served: &Served, client: &mut Client) {
    served.script.lock().unwrap().held = Some(4096);
    client.send(command::READ, 0, 1, 4096, 512, &[]);
    while served.script.lock().unwrap().reads == 0 {
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_removal_waits_for_what_the_disk_has_and_refuses_what_comes_later() {
    let served = Served::start(|_| {});
    let used = served.add("disk").unwrap();
    served.add("other").unwrap();
    let mut client = Client::ready(&served.socket(), false, &[]);
    held_read(&served, &mut client);
    let control = served.control.clone();
    let removal = thread::spawn(move || control.remove("disk"));
    thread::sleep(Duration::from_millis(100));
    assert!(!removal.is_finished());
    // Nobody finds it any more.
    let (exports, clients) = served.control.state().unwrap();
    assert_eq!(exports.len(), 1);
    assert_eq!((clients.len(), &clients[0].export), (1, &None));
    assert_eq!(client.ask(command::READ, 0, 0, 512, &[]), error::SHUTDOWN);
    assert!(used.strong_count() > 0);
    release(&served.script);
    let answer = client.answer().unwrap();
    assert_eq!((answer.cookie, answer.error), (1, 0));
    assert!(client.is_closed());
    removal.join().unwrap().unwrap();
    assert_eq!(used.strong_count(), 0, "nobody has the disk");
}

#[test]
fn a_client_that_takes_no_answers_is_cut_when_its_time_is_up() {
    let served = Served::start(|options| options.patience = Duration::from_millis(100));
    let used = served.add("disk").unwrap();
    let mut client = Client::ready(&served.socket(), false, &[]);
    // More than the socket takes.
    for cookie in 0..64 {
        client.send(command::READ, 0, cookie, 0, 1 << 20, &[]);
    }
    served.control.remove("disk").unwrap();
    assert_eq!(used.strong_count(), 0);
    assert!(served.control.state().unwrap().1.is_empty());
}

#[test]
fn a_client_is_sent_away_after_what_it_has_in_flight() {
    let served = Served::start(|_| {});
    served.add("disk").unwrap();
    let mut client = Client::ready(&served.socket(), false, &[]);
    let mut shaking = Client::silent(&served.socket());
    held_read(&served, &mut client);
    let numbers: Vec<u64> = {
        let (_, clients) = served.control.state().unwrap();
        assert_eq!((clients[0].counters.counts.reads, &clients[1].export), (1, &None));
        clients.iter().map(|client| client.number).collect()
    };
    let (control, first) = (served.control.clone(), numbers[0]);
    let leaving = thread::spawn(move || control.disconnect(first));
    thread::sleep(Duration::from_millis(50));
    release(&served.script);
    assert_eq!(client.answer().unwrap().error, 0);
    assert!(client.is_closed());
    leaving.join().unwrap().unwrap();
    served.control.disconnect(numbers[1]).unwrap();
    assert!(shaking.is_closed());
    let gone = served.control.disconnect(first);
    assert!(matches!(gone, Err(NbdManageError::NoClient(number)) if number == first));
    // The export is there for the next one.
    let mut next = Client::ready(&served.socket(), false, &[]);
    assert_eq!(next.ask(command::READ, 0, 0, 512, &[]), 0);
}

#[test]
fn names_are_unique_and_nothing_is_added_to_a_server_that_has_ended() {
    let mut served = Served::start(|_| {});
    served.add("disk").unwrap();
    let same = served.add("disk");
    assert!(matches!(&same, Err(NbdServerError::SameName(name)) if name == "disk"));
    let long = served.add(&"x".repeat(5000));
    assert!(matches!(long, Err(NbdServerError::LongName(5000))));
    served.control.remove("disk").unwrap();
    let gone = served.control.remove("disk");
    assert!(matches!(gone, Err(NbdManageError::NoExport(_))));
    served.add("disk").unwrap();
    served.server.take().unwrap().stop();
    assert!(matches!(served.add("more"), Err(NbdServerError::Stopping)));
    assert!(matches!(served.control.state(), Err(NbdManageError::Ended)));
}
