//! `smsvmm`: the command line.
//!
//! Each command lies in a module of its own and returns an [`Exit`] or an error; only this file turns them into an exit
//! status and prints errors: one line, the chain of causes separated by colons, the remedy in the text.

// The way of a request from a virtqueue to a device is one future, of all layers: nothing on it is allocated.
#![recursion_limit = "256"]

mod certificates;
mod cli;
mod debug;
mod exit;
mod gateway;
mod guest;
mod host;
mod logs;
mod machines;
mod manager_disks;
mod mover;
mod output;
mod pool;
mod preflight;
mod principals;
mod remote;
mod run;
mod serve;
mod share;
mod share_api;
mod share_blk_manage;
mod share_control;
mod share_iscsi;
mod share_iscsi_access;
mod share_iscsi_manage;
mod share_manage;
mod share_nbd;
mod share_sandbox;
mod share_scsi;
mod share_scsi_manage;
mod signals;
mod storage;
mod terminal;
mod toml_file;
mod top;
mod vm;

use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Parser};
use vmm::sandbox::close_on_exec;

use crate::cli::{Cli, Command, HostCommand};
use crate::exit::{Exit, UsageError};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version too come this way; clap knows where to print and which status to give.
        Err(error) => error.exit(),
    };
    let result = logs::start(cli.verbose).and_then(|()| {
        // Programs that are started from here inherit nothing by accident.
        close_on_exec(&[]).context("cannot mark inherited descriptors")?;
        execute(cli.command)
    });
    match result {
        Ok(exit) => exit.into(),
        Err(error) => {
            logs::complain(&error);
            if error.is::<UsageError>() {
                Exit::Usage.into()
            } else {
                Exit::Failed.into()
            }
        }
    }
}

fn execute(command: Command) -> anyhow::Result<Exit> {
    match command {
        Command::Run(arguments) => run::run(&arguments),
        Command::Serve(arguments) => serve::serve(&arguments),
        Command::Host(HostCommand::Check { json }) => host::check(json),
        Command::Vm(arguments) => vm::execute(arguments),
        Command::Pool(arguments) => storage::pool(arguments),
        Command::Device(arguments) => storage::device(arguments),
        Command::Volume(arguments) => storage::volume(arguments),
        Command::File(arguments) => storage::file(arguments),
        Command::Disk(arguments) => storage::disk(arguments),
        Command::Job(arguments) => storage::job(arguments),
        Command::Events(arguments) => vm::pool_events(arguments),
        Command::Debug(arguments) => debug::execute(arguments),
        Command::Top(arguments) => top::execute(arguments),
        Command::Share(command) => share::execute(&command),
        Command::Gateway(arguments) => gateway::execute(&arguments),
        Command::Principal(arguments) => principals::execute(arguments),
        Command::Certificate(command) => certificates::execute(command),
        Command::Mover(arguments) => mover::execute(&arguments),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "smsvmm", &mut script);
            output::print(&String::from_utf8_lossy(&script))?;
            Ok(Exit::Success)
        }
        Command::Manual { folder } => {
            let written = std::fs::create_dir_all(&folder)
                .and_then(|()| clap_mangen::generate_to(Cli::command(), &folder));
            written.with_context(|| format!("cannot write manual pages to {}", folder.display()))?;
            Ok(Exit::Success)
        }
    }
}
