//! Set-up, test, demo and bench commands of the project: `cargo xtask help`.

mod apt;
mod bench;
mod build;
mod deb;
mod debian;
mod demo;
mod fuzz;
mod host;
mod images;
mod kernels;
mod licences;
mod recipe;
mod setup;
mod test;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use lab::{Lab, Network};

/// The project's own commands.
#[derive(Parser)]
#[command(name = "cargo xtask", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Make the images from Debian packages: guest kernels, test initrd, lab host, full Debian guest
    Setup {
        /// Ask Debian's servers for newer packages first
        #[arg(long)]
        refresh: bool,
        /// Leave out the full Debian guest, which only the demo needs
        #[arg(long)]
        without_debian: bool,
    },
    /// Check and test everything; what CI runs
    Test {
        /// Leave out what runs in the lab
        #[arg(long)]
        quick: bool,
    },
    /// Boot a complete Debian guest with disks and network: for you at a terminal, else as a scripted tour
    Demo {
        /// The tour, also at a terminal
        #[arg(long)]
        tour: bool,
        /// With this smsvmm instead of building one
        #[arg(long, value_name = "FILE")]
        program: Option<std::path::PathBuf>,
    },
    /// The part of `demo` that runs beside the guest
    #[command(hide = true)]
    DemoInside {
        #[arg(long)]
        tour: bool,
    },
    /// Measure beside QEMU
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
    /// The part of `bench` that runs in the lab
    #[command(hide = true)]
    BenchInside {
        part: String,
        #[arg(long, default_value_t = 1)]
        rounds: u32,
    },
    /// Fuzz what hostile guests, peers and files can reach
    Fuzz(fuzz::Arguments),
    /// Build smsvmm as one file that needs no libraries, and what stories run inside guests: target/static
    Static,
    /// Packages for Debian and Ubuntu: target/debian
    Deb {
        /// Install them on a clean Debian, emulated, and boot a guest by the packaged service
        #[arg(long = "try")]
        try_them: bool,
        /// Try the packages in this folder, which were made before
        #[arg(long, requires = "try_them", value_name = "FOLDER")]
        packages: Option<PathBuf>,
    },
    /// Run a command in a lab host that sees a folder at the same path
    Lab(LabArguments),
}

#[derive(Subcommand)]
enum Bench {
    /// VM exits, memory, threads and time until the guest's init; exits and system calls per disk request
    Boot {
        /// Leave out the disk requests
        #[arg(long)]
        without_disk: bool,
        /// Another smsvmm than the one of this work tree
        #[arg(long)]
        program: Option<PathBuf>,
    },
    /// The file system beside its bare volume and qcow2, on memory and on this disk (about 10 GiB each)
    Filesys {
        /// For the bench, as `-- --only throughput`
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Disks as a guest has them, of a pool and of an image, beside a guest of QEMU in the same lab
    Guest(bench::guest::Options),
    /// Disks over vhost-user-blk: IOPS, CPU time and latency, beside qemu-storage-daemon and fio
    Disks(bench::disks::Options),
    /// The mover of backups beside qemu-img, dd, cp and borg: full, incremental, verify, restore
    Mover {
        /// For the bench, as `-- --rounds 3`
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// How long the management interface takes while the disks of its pool are busy
    Api(bench::api::Options),
}

#[derive(Args)]
struct LabArguments {
    /// Processors of the host
    #[arg(long, default_value_t = 1)]
    smp: u8,
    /// Memory of the host in MiB
    #[arg(long, default_value_t = 3072)]
    memory: u32,
    /// Time passes with the instructions executed, so that figures repeat
    #[arg(long)]
    icount: bool,
    /// Join the network of all labs that name it; needs --host-id
    #[arg(long)]
    net: Option<String>,
    /// Number on the network: the host has the address 10.9.0.N
    #[arg(long, default_value_t = 0)]
    host_id: u8,
    /// Seconds until the lab is ended
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// Copy this file or folder of DIR back after the run
    #[arg(long)]
    out: Option<PathBuf>,
    /// A raw image as one more disk: /dev/vdd
    #[arg(long)]
    disk: Vec<PathBuf>,
    /// Boot the host instead of using its saved state
    #[arg(long)]
    boot: bool,
    /// The folder that the host sees
    dir: PathBuf,
    /// A bash script; a shell on this terminal when left out
    command: Option<String>,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Task::Setup {
            refresh,
            without_debian,
        } => {
            setup::peer_programs();
            setup::run(&setup::Options {
                refresh,
                debian: !without_debian,
            })
            .map(|()| ExitCode::SUCCESS)
        }
        Task::Test { quick } => test::run(quick),
        Task::Bench {
            what: Bench::Boot {
                without_disk,
                program,
            },
        } => bench::run(program, !without_disk),
        Task::Bench {
            what: Bench::Filesys { arguments },
        } => bench::filesys::run(&arguments),
        Task::Bench {
            what: Bench::Mover { arguments },
        } => bench::mover::run(&arguments),
        Task::Bench {
            what: Bench::Disks(options),
        } => bench::disks::run(&options),
        Task::Bench {
            what: Bench::Guest(options),
        } => bench::guest::run(&options),
        Task::Bench {
            what: Bench::Api(options),
        } => bench::api::run(&options),
        Task::BenchInside { part, rounds } => bench::inside(&part, rounds),
        Task::Demo { tour, program } => demo::run(tour, program.as_deref()),
        Task::DemoInside { tour } => demo::inside(tour),
        Task::Static => build::guest_programs()
            .and_then(|()| build::static_smsvmm())
            .map(|_| ExitCode::SUCCESS),
        Task::Deb { try_them, packages } => deb::run(try_them, packages).map(|()| ExitCode::SUCCESS),
        Task::Fuzz(arguments) => fuzz::run(&arguments),
        Task::Lab(arguments) => in_lab(arguments),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn in_lab(arguments: LabArguments) -> Result<ExitCode> {
    let network = arguments.net.map_or(Network::Isolated, Network::Segment);
    let mut builder = Lab::builder()
        .cpus(arguments.smp)
        .memory_mib(arguments.memory)
        .deterministic(arguments.icount)
        .network(network)
        .host_id(arguments.host_id)
        .share(&arguments.dir)
        .fresh(arguments.boot);
    for disk in arguments.disk {
        builder = builder.disk(disk);
    }
    let mut lab = builder.start()?;
    let status = match arguments.command {
        Some(command) => lab.run_streaming(&command, Duration::from_secs(arguments.timeout), host::show)?,
        None => lab.run_on_terminal("exec bash -i")?,
    };
    if let Some(path) = arguments.out {
        let to = arguments.dir.join(&path);
        lab.fetch(&path, to.parent().unwrap_or(&arguments.dir))?;
    }
    Ok(u8::try_from(status).map_or(ExitCode::FAILURE, ExitCode::from))
}
