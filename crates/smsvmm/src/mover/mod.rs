//! `smsvmm mover`: backups of guests, made for agents; and what can be done with them without any agent.

mod archives;
mod serve;

use std::path::PathBuf;

use access::Token;
use anyhow::anyhow;
use backup::RawText;
use clap::{Args, Subcommand};
use serde_json::json;

use crate::exit::Exit;
use crate::output::{print, print_json};

#[derive(Debug, Args)]
pub(crate) struct MoverArguments {
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    command: MoverCommand,
}

#[derive(Debug, Subcommand)]
enum MoverCommand {
    /// Make backups for agents in guests (`sms-agent backup`), until SIGTERM, SIGINT or SIGHUP.
    ///
    /// Prints where it listens. A backup that is being made when it ends can be gone on with.
    Serve {
        /// Where to listen, where to keep backups, and who may back up what.
        #[arg(value_name = "mover.toml")]
        config: PathBuf,
    },
    /// Make a token for an agent. Its SHA-256 goes into mover.toml, the token itself into the guest.
    Token,
    /// List the backups in a folder.
    List {
        /// The store of mover.toml, or the folder of one principal in it.
        #[arg(required = true)]
        stores: Vec<PathBuf>,
    },
    /// Show what is in a backup.
    Show {
        /// STORE/VM/NAME.smsbackup
        archive: PathBuf,
        /// Leave out the entries.
        #[arg(long)]
        summary: bool,
    },
    /// Read backups, and those that they are built on, and check all checksums.
    Verify {
        /// STORE/VM/NAME.smsbackup
        #[arg(required = true)]
        archives: Vec<PathBuf>,
    },
    /// Restore a backup: files to a folder, or a whole disk to a raw file. What is there already is not replaced.
    ///
    /// Exit status: 0 all is as it was, 1 something could not be restored, which is told.
    Restore {
        /// STORE/VM/NAME.smsbackup
        archive: PathBuf,
        /// The folder; it is made if it is not there.
        #[arg(
            long,
            value_name = "FOLDER",
            required_unless_present = "disk",
            conflicts_with = "disk"
        )]
        to: Option<PathBuf>,
        /// A raw file instead, for a whole disk that is in the backup.
        #[arg(long, value_name = "FILE")]
        disk: Option<PathBuf>,
        /// Only this path of the backup, and what is below it. May be given several times; of --disk, which disk.
        #[arg(long = "file", value_name = "PATH", value_parser = raw_text)]
        files: Vec<RawText>,
    },
}

/// A path in a backup as `show` prints it; a first / does not matter.
fn raw_text(text: &str) -> Result<RawText, String> {
    RawText::parse(text.trim_start_matches('/').trim_end_matches('/')).map_err(str::to_owned)
}

pub(crate) fn execute(arguments: &MoverArguments) -> anyhow::Result<Exit> {
    let json = arguments.json;
    match &arguments.command {
        MoverCommand::Serve { config } => serve::serve(config, json),
        MoverCommand::Token => token(json),
        MoverCommand::List { stores } => archives::list(stores, json),
        MoverCommand::Show { archive, summary } => archives::show(archive, *summary, json),
        MoverCommand::Verify { archives } => archives::verify(archives, json),
        MoverCommand::Restore {
            archive,
            to,
            disk,
            files,
        } => archives::restore(archive, to.as_deref(), disk.as_deref(), files, json),
    }
}

fn token(json: bool) -> anyhow::Result<Exit> {
    let token = Token::generate().ok_or_else(|| anyhow!("the system has no random numbers"))?;
    let (hash, token) = (token.hash(), token.reveal());
    match json {
        true => print_json(&json!({ "token": token, "token-sha256": hash }))?,
        false => print(&format!(
            "{token}\n\nin the guest: the line above, in a file that only root can read\nin mover.toml: token-sha256 = \"{hash}\"\n"
        ))?,
    }
    Ok(Exit::Success)
}
