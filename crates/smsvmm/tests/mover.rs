//! `smsvmm mover` from outside: over TLS, against a machine's management socket, with hostile connections; and its archives.
#![allow(clippy::unwrap_used)]

mod pool_machine;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use api::file::FileOperation;
use api::storage::{LayoutKind, NewDevice, Operation, ReadPolicy, Shape};
use api::virtual_disk::{DiskAnswer, DiskOperation, ImportRequest};
use api::{ByteSize, DeviceState, DiskConfig, DiskStatus, ProblemKind, StorageAnswer, StorageRequest, Vm};
use backup::client::{Client, ClientError, Stream, Tls, connect, connect_with};
use backup::message::BackupInfo;
use backup::plan::{Content, Entry, Extent, ImageDisk, Kind, Place, Plan, Time};
use block_io::WorkerOptions;
use pool_machine::Machine;
use storage_manager::{Flow, Force, HostedPool, Notice, PoolAt};

const SIZE: u64 = 4 << 20;

fn smsvmm(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_smsvmm"));
    command
        .arg("mover")
        .args(arguments)
        .env_remove("SMSVMM_LOG")
        .stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    smsvmm(arguments).output().unwrap()
}

fn text(output: &Output) -> String {
    let said = [output.stdout.as_slice(), &output.stderr].concat();
    String::from_utf8(said).unwrap()
}

struct Served {
    child: Child,
    address: String,
}

impl Served {
    fn start(config: &Path) -> Self {
        let mut child = smsvmm(&["serve", config.to_str().unwrap()])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = line.trim().strip_prefix("mover: ").unwrap().to_owned();
        Self { child, address }
    }

    /// Ends it as an administrator does.
    fn end(mut self) -> String {
        let pid = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args(["-TERM", &pid])
                .status()
                .unwrap()
                .success()
        );
        let mut said = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        assert!(self.child.wait().unwrap().success(), "{said}");
        said
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn token() -> (String, String) {
    let json: serde_json::Value = serde_json::from_slice(&run(&["token", "--json"]).stdout).unwrap();
    let text = |key: &str| json[key].as_str().unwrap().to_owned();
    (text("token"), text("token-sha256"))
}

fn plan(name: &str) -> Plan {
    Plan {
        name: name.into(),
        parent: None,
        host: "guest".into(),
        description: String::new(),
        frozen: Time {
            seconds: 1_795_881_900,
            nanoseconds: 0,
        },
        disks: vec![ImageDisk {
            disk: "/a.dsk".into(),
            snapshot: "s".into(),
            configuration: String::new(),
        }],
        sources: Vec::new(),
        resume: false,
    }
}

fn entry(path: &str, kind: Kind) -> Entry {
    Entry {
        path: path.into(),
        mode: 0o644,
        uid: fs::metadata("/proc/self")
            .map(|data| std::os::unix::fs::MetadataExt::uid(&data))
            .unwrap(),
        gid: fs::metadata("/proc/self")
            .map(|data| std::os::unix::fs::MetadataExt::gid(&data))
            .unwrap(),
        modified: Time {
            seconds: 1_700_000_000,
            nanoseconds: 0,
        },
        accessed: None,
        xattrs: Vec::new(),
        kind,
    }
}

/// A file that is bytes 8192 to 18191 of the disk, and the whole disk.
fn back_up(client: &mut Client<Box<dyn Stream>>, name: &str) -> BackupInfo {
    client.begin(&plan(name)).unwrap();
    let extents = vec![Extent {
        offset: 0,
        length: 10_000,
        at: Some(Place { disk: 0, start: 8192 }),
    }];
    let content = Content::Extents { extents, more: false };
    let size = 10_000;
    client.entry(&entry("srv", Kind::Directory {})).unwrap();
    client
        .entry(&entry("srv/f", Kind::File { size, content }))
        .unwrap();
    client
        .entry(&entry("a.img", Kind::Disk { disk: 0, size: SIZE }))
        .unwrap();
    client.finish().unwrap()
}

fn content() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..SIZE / 8)
        .flat_map(|number: u64| (number * 7919).to_le_bytes())
        .collect();
    bytes[1 << 20..3 << 20].fill(0);
    bytes
}

/// What the commands make of the archive.
fn comes_back(store: &Path) {
    let archive = store.join("vm/one.smsbackup");
    let path = archive.to_str().unwrap();
    let listed = text(&run(&["list", store.to_str().unwrap()]));
    assert!(listed.contains("one") && listed.contains("complete"), "{listed}");
    let shown = text(&run(&["show", path]));
    assert!(
        shown.contains("srv/f") && shown.contains("image: /a.dsk@s"),
        "{shown}"
    );
    let verified = run(&["verify", path]);
    assert!(verified.status.success(), "{}", text(&verified));

    // The reader in the description of the format agrees.
    let page = include_str!("../../../docs/src/formats/backup-archive.md");
    let (_, code) = page.split_once("```python\n").unwrap();
    let (code, _) = code.split_once("```").unwrap();
    let read = Command::new("python3").args(["-c", code, path]).output().unwrap();
    assert!(text(&read).ends_with("complete: 3 entries\n"), "{}", text(&read));

    let out = store.join("out");
    let done = run(&["restore", path, "--to", out.to_str().unwrap(), "--file", "/srv"]);
    assert!(done.status.success(), "{}", text(&done));
    assert!(fs::read(out.join("srv/f")).unwrap() == content()[8192..18_192]);
    let raw = store.join("raw");
    let done = run(&["restore", path, "--disk", raw.to_str().unwrap(), "--json"]);
    assert!(done.status.success(), "{}", text(&done));
    assert!(fs::read(&raw).unwrap() == content());

    // A bit that flips is found, and nothing half is left behind.
    let mut bytes = fs::read(&archive).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(&archive, bytes).unwrap();
    let verified = run(&["verify", path]);
    assert_eq!(verified.status.code(), Some(1), "{}", text(&verified));
    let again = store.join("again");
    let failed = run(&["restore", path, "--disk", again.to_str().unwrap()]);
    assert!(!failed.status.success() && !again.exists(), "{}", text(&failed));
}

/// A certificate of its own, which clients take as the authority.
fn certificate(folder: &Path) {
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
        ])
        .args([
            "-days",
            "2",
            "-subj",
            "/CN=mover",
            "-keyout",
            "key.pem",
            "-out",
            "cert.pem",
        ])
        .args(["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", text(&made));
}

#[test]
fn an_image_is_backed_up_over_tls_and_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("image"), content()).unwrap();
    certificate(folder.path());
    let (token, hash) = token();
    let config = format!(
        "listen = \"127.0.0.1:0\"\nstore = {:?}\n[tls]\ncertificate = {:?}\nkey = {:?}\n\
         [[principal]]\nname = \"vm\"\ntoken-sha256 = \"{hash}\"\nimages = {{ \"/a.dsk@s\" = {:?} }}\n",
        path("store"),
        path("cert.pem"),
        path("key.pem"),
        path("image"),
    );
    fs::write(path("mover.toml"), config).unwrap();
    let mover = Served::start(&path("mover.toml"));
    let authorities = path("cert.pem");
    let tls = Tls {
        authorities: Some(&authorities),
        name: None,
    };
    let patience = Duration::from_secs(60);
    let mut client = Client::hello(connect(&mover.address, &tls, patience).unwrap(), &token, "test").unwrap();
    assert!(back_up(&mut client, "one").complete);

    // Who trusts somebody else does not tell its token.
    fs::create_dir(path("other")).unwrap();
    certificate(&path("other"));
    let authorities = path("other/cert.pem");
    let tls = Tls {
        authorities: Some(&authorities),
        name: None,
    };
    let stream = connect(&mover.address, &tls, patience).unwrap();
    assert!(matches!(
        Client::hello(stream, &token, "test"),
        Err(ClientError::Broken(_))
    ));
    let said = mover.end();
    assert!(said.contains("SIGTERM: ending"), "{said}");
    comes_back(&path("store"));
}

#[test]
fn connections_that_make_no_sense_are_ended_and_harm_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("image"), content()).unwrap();
    let (token, hash) = token();
    let config = format!(
        "listen = \"127.0.0.1:0\"\nstore = {:?}\n[limits]\nconnections = 3\npatience = 2\nbytes = \"5M\"\nrate = \"64M\"\n\
         [[principal]]\nname = \"vm\"\ntoken-sha256 = \"{hash}\"\nimages = {{ \"/a.dsk@s\" = {:?} }}\n",
        path("store"),
        path("image"),
    );
    fs::write(path("mover.toml"), config).unwrap();
    let mover = Served::start(&path("mover.toml"));
    let patience = Duration::from_secs(60);
    let ended = |bytes: &[u8]| {
        let mut stream = TcpStream::connect(&mover.address).unwrap();
        stream.set_read_timeout(Some(patience)).unwrap();
        // It may have had enough before the end.
        let _ = stream.write_all(bytes);
        let mut said = Vec::new();
        // Until it closes the connection, in whatever way.
        let _ = stream.read_to_end(&mut said);
        said
    };
    assert!(ended(b"GET / HTTP/1.1\r\n\r\n01234567890123456789").is_empty());
    // A frame that claims to be huge, one that never ends, one that comes too slowly.
    let mut huge = b"SMBF\x01\0\0\0\xff\xff\xff\xff".to_vec();
    huge.resize(64, 0);
    assert!(ended(&huge).is_empty());
    let mut slow = b"SMBF\x01\0\0\0\x00\x10\0\0".to_vec();
    slow.resize(40, 0);
    assert!(ended(&slow).is_empty());
    assert!(ended(b"SMBF").is_empty());

    // As many as there may be, none of which says who it is.
    let silent: Vec<_> = (0..3)
        .map(|_| TcpStream::connect(&mover.address).unwrap())
        .collect();
    std::thread::sleep(Duration::from_millis(300));
    let refused = connect(&mover.address, &Tls::default(), patience).unwrap();
    assert!(Client::hello(refused, &token, "test").is_err());
    drop(silent);
    // It hears soon that they are gone.
    let begin = Instant::now();
    let mut client = loop {
        let stream = connect(&mover.address, &Tls::default(), patience).unwrap();
        match Client::hello(stream, &token, "test") {
            Ok(client) => break client,
            Err(error) => assert!(begin.elapsed() < patience, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(back_up(&mut client, "one").complete);

    // More than a backup may have here: what there is of it is none.
    client.begin(&plan("two")).unwrap();
    for name in ["a", "b"] {
        let whole = Kind::Disk { disk: 0, size: SIZE };
        client.entry(&entry(name, whole)).unwrap();
    }
    match client.flush() {
        Err(ClientError::Refused(problem)) => assert_eq!(problem.kind, ProblemKind::TooLarge),
        other => panic!("{other:?}"),
    }
    mover.end();
    assert!(!path("store/vm/two.smsbackup").exists());
    comes_back(&path("store"));
}

/// The disk of the test below: three batches of the mover.
const LONG: u64 = 48 << 20;

/// An agent that has the whole disk backed up, on a thread of its own. What can cut its line, and what it was told.
type Agent = (
    TcpStream,
    JoinHandle<Result<(Vec<String>, BackupInfo), ClientError>>,
);

fn agent(mover: &Served, token: &str, resume: bool) -> Agent {
    let mut line = None;
    let stream = connect_with(
        &mover.address,
        &Tls::default(),
        Duration::from_secs(60),
        |socket| {
            line = socket.try_clone().ok();
        },
    );
    let (stream, token) = (stream.unwrap(), token.to_owned());
    let work = move || {
        let mut client = Client::hello(stream, &token, "test")?;
        let plan = Plan {
            resume,
            ..plan("long")
        };
        let begun = client.begin(&plan)?;
        let entries = [
            entry("srv", Kind::Directory {}),
            entry("disk", Kind::Disk { disk: 0, size: LONG }),
            entry("end", Kind::Directory {}),
        ];
        for entry in entries.iter().skip(usize::try_from(begun.entries).unwrap()) {
            client.entry(entry)?;
        }
        Ok((begun.notes, client.finish()?))
    };
    (line.unwrap(), std::thread::spawn(work))
}

/// Until there is so much of an archive that is not complete.
fn wait_for(partial: &Path, bytes: u64) {
    let begin = Instant::now();
    while fs::metadata(partial).map_or(0, |data| data.len()) < bytes {
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "there is nothing of it"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The byte at which the mover goes on in the disk.
fn goes_on_at(notes: &[String]) -> u64 {
    let note = notes
        .iter()
        .find_map(|note| note.strip_prefix("disk: gone on with at byte "));
    note.unwrap_or_else(|| panic!("{notes:?}")).parse().unwrap()
}

#[test]
fn where_a_mover_or_an_agent_was_killed_the_next_ones_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let image: Vec<u8> = (0..LONG / 8)
        .flat_map(|number: u64| (number * 7919 + 1).to_le_bytes())
        .collect();
    fs::write(path("image"), &image).unwrap();
    let (token, hash) = token();
    let config = format!(
        "listen = \"127.0.0.1:0\"\nstore = {:?}\n[limits]\nrate = \"16M\"\n\
         [[principal]]\nname = \"vm\"\ntoken-sha256 = \"{hash}\"\nimages = {{ \"/a.dsk@s\" = {:?} }}\n",
        path("store"),
        path("image"),
    );
    fs::write(path("mover.toml"), config).unwrap();
    let partial = path("store/vm/long.smsbackup.partial");
    let complete = path("store/vm/long.smsbackup");
    let is_none = || {
        assert!(partial.exists() && !complete.exists());
        let listed = text(&run(&["list", path("store").to_str().unwrap()]));
        assert!(listed.contains("not complete"), "{listed}");
        for file in [&partial, &complete] {
            let file = file.to_str().unwrap();
            assert_eq!(run(&["verify", file]).status.code(), Some(1));
            assert!(
                !run(&["restore", file, "--disk", path("raw").to_str().unwrap()])
                    .status
                    .success()
            );
        }
        assert!(!path("raw").exists());
    };

    // The mover is killed in the middle of the disk.
    let mover = Served::start(&path("mover.toml"));
    let (_line, work) = agent(&mover, &token, false);
    wait_for(&partial, 8 << 20);
    drop(mover);
    assert!(matches!(work.join().unwrap(), Err(ClientError::Broken(_))));
    is_none();
    // As a crash may leave it: the last frame is there in parts only.
    let left = fs::metadata(&partial).unwrap().len() - 1000;
    File::options()
        .write(true)
        .open(&partial)
        .unwrap()
        .set_len(left)
        .unwrap();

    // It goes on; then it is the agent that is killed, and somebody goes on at once.
    let mover = Served::start(&path("mover.toml"));
    let (line, work) = agent(&mover, &token, true);
    wait_for(&partial, 20 << 20);
    line.shutdown(Shutdown::Both).unwrap();
    assert!(matches!(work.join().unwrap(), Err(ClientError::Broken(_))));
    is_none();
    let (_line, work) = agent(&mover, &token, true);
    let (notes, made) = work.join().unwrap().unwrap();
    let done = goes_on_at(&notes);
    assert!((16 << 20..LONG).contains(&done), "{notes:?}");
    assert!(made.complete && made.progress.bytes == LONG, "{made:?}");
    // Nothing was read that was there.
    assert_eq!(made.progress.from_devices, LONG - done, "{made:?}");
    assert!(!partial.exists());
    let verified = run(&["verify", complete.to_str().unwrap()]);
    assert!(verified.status.success(), "{}", text(&verified));
    let restored = run(&[
        "restore",
        complete.to_str().unwrap(),
        "--disk",
        path("raw").to_str().unwrap(),
    ]);
    assert!(restored.status.success(), "{}", text(&restored));
    assert!(fs::read(path("raw")).unwrap() == image);
}

fn go_on(_: Notice<'_>) -> Flow {
    Flow::GoOn
}

/// A pool with a disk and a snapshot of it.
fn pool(folder: &Path) -> (Vec<String>, HostedPool) {
    let devices: Vec<String> = (0..3)
        .map(|number| {
            let path = folder.join(format!("d{number}"));
            File::create(&path).unwrap().set_len(64 << 20).unwrap();
            path.to_str().unwrap().to_owned()
        })
        .collect();
    let new = devices.iter().map(|path| NewDevice {
        path: path.clone(),
        spare: false,
        class: String::new(),
        enclosure: String::new(),
        force: false,
    });
    storage_manager::create("tank", new.collect(), &mut go_on).unwrap();
    let format = FileOperation::Format {
        meta_size: None,
        meta_copies: None,
        force: false,
    };
    storage_manager::execute_file(devices.clone(), format, &mut go_on).unwrap();
    let volume = Operation::CreateVolume {
        name: "data".into(),
        size: 16 << 20,
        block: 4096,
        shape: Shape {
            layout: LayoutKind::Raid5,
            columns: 0,
            copies: 0,
            stripe_unit: 0,
            class: String::new(),
            devices: Vec::new(),
        },
        read_policy: ReadPolicy::default(),
        raw: false,
    };
    storage_manager::execute(devices.clone(), Force::No, volume, &mut go_on).unwrap();
    let image = folder.join("image");
    fs::write(&image, content()).unwrap();
    let import = ImportRequest {
        image: image.to_str().unwrap().into(),
        format: None,
        backing: false,
        path: "/a.dsk".into(),
        size: None,
        thick: false,
        verify: false,
    };
    storage_manager::import_disk(PoolAt::Devices(devices.clone()), import, &mut go_on).unwrap();
    let pool = HostedPool::open("test", devices.clone(), WorkerOptions::default()).unwrap();
    let snapshot = DiskOperation::Snapshot {
        paths: vec!["/a.dsk".into()],
        name: "s".into(),
        description: String::new(),
    };
    pool.execute(StorageRequest::Disk(snapshot)).unwrap();
    (devices, pool)
}

#[test]
fn a_machines_disk_is_read_from_its_devices_or_through_its_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| -> PathBuf { folder.path().join(name) };
    let (devices, pool) = pool(folder.path());
    let mut config = DiskConfig::new("/nowhere");
    config.image = None;
    config.file = Some("/a.dsk".into());
    let disk = DiskStatus {
        config,
        state: DeviceState::Attached,
        size: ByteSize::from_mib(4),
        stopped: None,
    };
    let machine = Arc::new(Machine {
        pool,
        events: Arc::default(),
        disks: vec![disk],
    });
    let server = management::Server::bind(&path("vm.sock")).unwrap();
    let _server = server
        .start(Arc::clone(&machine) as Arc<dyn Vm>, || Ok(()))
        .unwrap();
    for (name, devices) in [("devices", devices), ("export", Vec::new())] {
        let (token, hash) = token();
        let store = path(name);
        let config = format!(
            "listen = \"127.0.0.1:0\"\nstore = {store:?}\n[[principal]]\nname = \"vm\"\ntoken-sha256 = \"{hash}\"\n\
             socket = {:?}\ndevices = {devices:?}\n",
            path("vm.sock"),
        );
        fs::write(path("mover.toml"), config).unwrap();
        let mover = Served::start(&path("mover.toml"));
        let stream = connect(&mover.address, &Tls::default(), Duration::from_secs(60)).unwrap();
        let mut client = Client::hello(stream, &token, "test").unwrap();
        let made = back_up(&mut client, "one").progress;
        match name {
            "devices" => assert!(made.from_devices > 0 && made.from_export == 0, "{made:?}"),
            _ => assert!(made.from_devices == 0 && made.from_export > 0, "{made:?}"),
        }
        comes_back(&store);
    }
    // Nothing keeps the snapshot.
    let delete = DiskOperation::DeleteSnapshot {
        path: "/a.dsk@s".into(),
    };
    let deleted = machine.pool.execute(StorageRequest::Disk(delete)).unwrap();
    assert!(matches!(deleted, StorageAnswer::Disk(outcome) if outcome.answer == DiskAnswer::Done));
}
