//! The mover: a pool with the image, who answers for it, and an agent.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::file::FileOperation;
use api::storage::{LayoutKind, NewDevice, Operation, ReadPolicy, Shape};
use api::virtual_disk::{DiskOperation, ImportRequest};
use api::{ByteSize, DeviceState, DiskConfig, DiskStatus, StorageRequest, Vm};
use backup::client::{Client, Tls, connect};
use backup::plan::{Entry, ImageDisk, Kind, Plan, Time};
use block_io::{AlignedBuffer, BlockDevice as _, Durability, WorkerOptions};
use storage_manager::{DiskOptions, Flow, Force, HostedPool, Notice, PoolAt};
use storage_virtualizer::DiskHandle as _;

use super::peers::trim;
use super::pool_machine::Machine;
use super::{Options, Took, run};

/// One block of this size in [`SPACING`] is changed between the full backup and the incremental one.
const CHANGED: usize = 64 << 10;
const SPACING: u64 = 20 * CHANGED as u64;

pub(super) struct Ours {
    folder: PathBuf,
    program: PathBuf,
    size: u64,
    mover: Child,
    address: String,
    token: String,
    _server: Box<dyn std::any::Any>,
}

fn go_on(_: Notice<'_>) -> Flow {
    Flow::GoOn
}

/// What does not compress.
fn noise(seed: u64, bytes: &mut [u8]) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in bytes.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
}

impl Ours {
    pub(super) fn new(options: &Options, folder: &Path) -> Self {
        let raw = folder.join("image.raw");
        let mut file = File::create(&raw).unwrap();
        let mut piece = vec![0; 4 << 20];
        for number in 0..options.size.div_ceil(piece.len() as u64) {
            noise(number + 1, &mut piece);
            file.write_all(&piece).unwrap();
        }
        file.sync_all().unwrap();
        let device = folder.join("d0");
        File::create(&device)
            .unwrap()
            .set_len(options.size * 3 + (1 << 30))
            .unwrap();
        let pool = make_pool(&device, &raw, options.size);
        let mut config = DiskConfig::new("/nowhere");
        config.image = None;
        config.file = Some("/a.dsk".into());
        let disk = DiskStatus {
            config,
            state: DeviceState::Attached,
            size: ByteSize::from_mib((options.size >> 20) as u32),
            stopped: None,
        };
        let machine = Arc::new(Machine {
            pool,
            events: Arc::default(),
            disks: vec![disk],
        });
        let server = management::Server::bind(&folder.join("vm.sock")).unwrap();
        let server = server.start(machine as Arc<dyn Vm>, || Ok(())).unwrap();
        let made = Command::new(&options.program)
            .args(["mover", "token", "--json"])
            .output()
            .unwrap();
        let made: serde_json::Value = serde_json::from_slice(&made.stdout).unwrap();
        let text = |key: &str| made[key].as_str().unwrap().to_owned();
        let (token, hash) = (text("token"), text("token-sha256"));
        let config = folder.join("mover.toml");
        let text = format!(
            "listen = \"127.0.0.1:0\"\nstore = {:?}\n[[principal]]\nname = \"vm\"\ntoken-sha256 = \"{hash}\"\n\
             socket = {:?}\ndevices = [{device:?}]\n",
            folder.join("store"),
            folder.join("vm.sock"),
        );
        fs::write(&config, text).unwrap();
        let (mover, address) = serve(&options.program, &config);
        Self {
            folder: folder.to_owned(),
            program: options.program.clone(),
            size: options.size,
            mover,
            address,
            token,
            _server: Box::new(server),
        }
    }

    fn archive(&self, name: &str) -> PathBuf {
        self.folder.join(format!("store/vm/{name}.smsbackup"))
    }

    pub(super) fn measure(&self, options: &Options, take: &mut impl FnMut(&'static str, Took)) {
        let full = self.back_up("full", "one", None);
        take("mover: full", full);
        if options.wants("mover: incremental") {
            take("mover: incremental", self.back_up("next", "two", Some("full")));
            fs::remove_file(self.archive("next")).unwrap();
        }
        let gib = self.size as f64 / (1 << 30) as f64;
        let archive = self.archive("full");
        let mover = |what: &str| {
            let mut command = Command::new(&self.program);
            command.args(["mover", what]).arg(&archive);
            command
        };
        if options.wants("mover: verify") {
            take("mover: verify", run(&mut mover("verify"), gib));
        }
        if options.wants("sha256sum") {
            take("sha256sum", run(Command::new("sha256sum").arg(&archive), gib));
        }
        if options.wants("mover: restore") {
            let out = self.folder.join("restored.raw");
            take(
                "mover: restore",
                run(mover("restore").arg("--disk").arg(&out), gib),
            );
            let same = Command::new("cmp")
                .arg(&out)
                .arg(self.folder.join("image.raw"))
                .status();
            assert!(
                same.unwrap().success(),
                "what was restored is not what was backed up"
            );
            fs::remove_file(out).unwrap();
        }
        fs::remove_file(archive).unwrap();
        trim(&self.folder);
    }

    /// As an agent has it made: the whole disk.
    fn back_up(&self, name: &str, snapshot: &str, parent: Option<&str>) -> Took {
        let stream = connect(&self.address, &Tls::default(), Duration::from_secs(60)).unwrap();
        let mut client = Client::hello(stream, &self.token, "bench").unwrap();
        let plan = Plan {
            name: name.into(),
            parent: parent.map(str::to_owned),
            host: "bench".into(),
            description: String::new(),
            frozen: Time::default(),
            disks: vec![ImageDisk {
                disk: "/a.dsk".into(),
                snapshot: snapshot.into(),
                configuration: String::new(),
            }],
            sources: Vec::new(),
            resume: false,
        };
        let entry = Entry {
            path: "disks/a.dsk".into(),
            mode: 0o600,
            uid: 0,
            gid: 0,
            modified: Time::default(),
            accessed: None,
            xattrs: Vec::new(),
            kind: Kind::Disk {
                disk: 0,
                size: self.size,
            },
        };
        let (cpu, begin) = (self.cpu(), Instant::now());
        client.begin(&plan).unwrap();
        client.entry(&entry).unwrap();
        let made = client.finish().unwrap();
        let wall = begin.elapsed().as_secs_f64();
        assert_eq!(made.progress.from_export, 0, "{made:?}");
        Took {
            wall,
            cpu: self.cpu() - cpu,
            gib: self.size as f64 / (1 << 30) as f64,
        }
    }

    /// CPU time in seconds of the mover.
    fn cpu(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.mover.id())).unwrap();
        let (_, fields) = stat.rsplit_once(')').unwrap();
        // utime and stime, fields 14 and 15 of proc(5), in hundredths of a second.
        let ticks: u64 = fields
            .split_whitespace()
            .skip(11)
            .take(2)
            .map(|field| field.parse::<u64>().unwrap())
            .sum();
        ticks as f64 / 100.0
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        let _ = self.mover.kill();
        let _ = self.mover.wait();
    }
}

fn serve(program: &Path, config: &Path) -> (Child, String) {
    let mut mover = Command::new(program);
    mover.args(["mover", "serve"]).arg(config).stdout(Stdio::piped());
    let mut mover = mover.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(mover.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let address = line
        .trim()
        .strip_prefix("mover: ")
        .expect("an address")
        .to_owned();
    (mover, address)
}

/// A pool with the image as a disk, of which there are two snapshots.
fn make_pool(device: &Path, raw: &Path, size: u64) -> HostedPool {
    let devices = vec![device.to_str().unwrap().to_owned()];
    let new = NewDevice {
        path: devices[0].clone(),
        spare: false,
        class: String::new(),
        enclosure: String::new(),
        force: false,
    };
    storage_manager::create("bench", vec![new], &mut go_on).unwrap();
    let format = FileOperation::Format {
        meta_size: None,
        meta_copies: None,
        force: false,
    };
    storage_manager::execute_file(devices.clone(), format, &mut go_on).unwrap();
    let volume = Operation::CreateVolume {
        name: "data".into(),
        size: size * 2,
        block: 4096,
        shape: Shape {
            layout: LayoutKind::Concat,
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
    let import = ImportRequest {
        image: raw.to_str().unwrap().into(),
        format: None,
        backing: false,
        path: "/a.dsk".into(),
        size: None,
        thick: false,
        verify: false,
    };
    storage_manager::import_disk(PoolAt::Devices(devices.clone()), import, &mut go_on).unwrap();
    let pool = HostedPool::open("bench", devices, WorkerOptions::default()).unwrap();
    snapshot(&pool, "one");
    change(&pool, size);
    snapshot(&pool, "two");
    pool
}

fn snapshot(pool: &HostedPool, name: &str) {
    let snapshot = DiskOperation::Snapshot {
        paths: vec!["/a.dsk".into()],
        name: name.into(),
        description: String::new(),
    };
    pool.execute(StorageRequest::Disk(snapshot)).unwrap();
}

/// Writes a twentieth of the disk, here and there.
fn change(pool: &HostedPool, size: u64) {
    let disk = pool.disk("/a.dsk", DiskOptions::default()).unwrap();
    let (handle, (answer, result)) = (disk.handle().clone(), std::sync::mpsc::channel());
    pool.worker().spawn(move || async move {
        let disk = handle.local().unwrap();
        let mut buffer = AlignedBuffer::new(CHANGED);
        for place in (0..size / SPACING).map(|number| number * SPACING) {
            noise(place + 77, buffer.as_mut_slice());
            // SAFETY: the buffer outlives the request, which is awaited.
            let memory = [unsafe { buffer.io(0, CHANGED) }];
            disk.write(place, &memory, Durability::Volatile).await.unwrap();
        }
        answer.send(()).unwrap();
    });
    result.recv().unwrap();
}
