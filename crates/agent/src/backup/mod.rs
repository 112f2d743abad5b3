//! Frozen-image backup, the guest's part: `sms-agent backup`.
//!
//! ```text
//!   locate    what the sources are: file systems, partitions, disks;  dm  logical volumes
//!   create    freeze ──► one snapshot ──► thaw          as long as it takes to flush and snapshot, however many files there are
//!     snapshot    the image is attached, and its file system mounted to be read
//!     walk        names, metadata;  fiemap  where files are on the disk
//!     ──► the mover, which reads the disks itself
//!   restore   ◄── the mover: files, written below one folder (tree)
//! ```

mod arguments;
mod create;
mod dm;
mod fiemap;
mod glob;
mod locate;
mod meta;
mod restore;
mod show;
mod signals;
mod snapshot;
mod tree;
mod walk;

use std::fs;
use std::net::Shutdown;
use std::process::ExitCode;
use std::time::Duration;

use ::backup::client::{self, Client, ClientError, Stream, Tls};

pub(crate) use arguments::BackupCommand;

use crate::host::{AgentError, Host};
use arguments::AccessArguments;

/// A mover that is silent for so long is gone; it says something every ten seconds.
const PATIENCE: Duration = Duration::from_secs(60);
/// It is done, but not all of it: some files are not in the backup, or were not restored.
const NOT_ALL: u8 = 3;

type Mover = Client<Box<dyn Stream>>;

/// Does it. `host` is only needed to make a backup.
pub(crate) fn run(
    command: BackupCommand,
    json: bool,
    host: impl FnOnce() -> Result<Host, AgentError>,
) -> Result<ExitCode, AgentError> {
    signals::begin()?;
    match command {
        BackupCommand::Create(arguments) => create::create(&host()?, *arguments, json),
        BackupCommand::List { from, name, paths } => {
            let mut mover = connect(&from.address, &from.access)?;
            match name {
                Some(name) => show::content(&mut mover, name, &paths, json),
                None => show::list(&mut mover, json),
            }
        }
        BackupCommand::Verify { from, name } => {
            let mut mover = connect(&from.address, &from.access)?;
            show::verified(&name, &mover.verify(&name).map_err(said)?, json)
        }
        BackupCommand::Restore(arguments) => restore::restore(&arguments, json),
    }
}

/// What a mover has against it, with all reasons below.
fn said(error: ClientError) -> AgentError {
    if signals::check().is_err() {
        return signals::check().err().unwrap_or(AgentError::Busy);
    }
    if let ClientError::Refused(problem) = error {
        return AgentError::Text(format!("the mover: {problem}"));
    }
    let mut text = error.to_string();
    let mut below = std::error::Error::source(&error);
    while let Some(error) = below {
        let reason = error.to_string();
        if !text.ends_with(&reason) {
            text = format!("{text}: {reason}");
        }
        below = error.source();
    }
    AgentError::Text(text)
}

fn connect(address: &str, access: &AccessArguments) -> Result<Mover, AgentError> {
    let missing = |what: &str| {
        AgentError::Text(format!(
            "{what}; `smsvmm mover token` on the mover's machine makes what is needed"
        ))
    };
    if access.ca.is_none() && !access.no_tls {
        return Err(missing("say by which certificate the mover is known: --ca FILE"));
    }
    let Some(file) = &access.token_file else {
        return Err(missing(
            "say where the token of this machine is: --token-file FILE",
        ));
    };
    let unreadable = |source| AgentError::Here {
        what: file.display().to_string(),
        source,
    };
    let token = fs::read_to_string(file).map_err(unreadable)?;
    let tls = Tls {
        authorities: access.ca.as_deref(),
        name: access.tls_name.as_deref(),
    };
    let opened = |socket: &std::net::TcpStream| {
        if let Ok(socket) = socket.try_clone() {
            // Whoever waits for it does not wait any longer.
            signals::on_stop(move || drop(socket.shutdown(Shutdown::Both)));
        }
    };
    let stream = client::connect_with(address, &tls, PATIENCE, opened).map_err(said)?;
    let agent = concat!("sms-agent ", env!("CARGO_PKG_VERSION"));
    Client::hello(stream, token.trim(), agent).map_err(said)
}
