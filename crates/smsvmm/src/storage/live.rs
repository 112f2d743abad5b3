//! A pool that another process has open: a machine, or a manager. It is asked through its management socket.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use api::storage::{JobState, JobStatus, Operation, Outcome};
use api::{Problem, ProblemKind, StorageAnswer, StorageRequest};
use management::{Client, ClientError, Target};
use storage_manager::{Flow, Line, Notice, PoolAt};

use super::arguments::Which;
use super::select;
use super::watch::Watch;
use crate::exit::UsageError;

/// Asks the machine that has the pool open. None if there is none: then the pool may be opened here.
///
/// # Errors
/// The configuration cannot be read; the machine refuses, or fails.
pub(crate) fn ask(
    which: &Which,
    request: impl FnOnce() -> StorageRequest,
) -> anyhow::Result<Option<StorageAnswer>> {
    let Some(target) = select::target(which)? else {
        return Ok(None);
    };
    match Client::new(target)?.storage_whole(&request()) {
        Ok(answer) => Ok(Some(answer)),
        Err(ClientError::Connect { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Between two looks at jobs that are waited for.
const LOOK: Duration = Duration::from_millis(250);

/// Whether another process has the pool open, here or on another host.
///
/// # Errors
/// The configuration cannot be read.
pub(crate) fn is_elsewhere(which: &Which) -> anyhow::Result<bool> {
    Ok(select::target(which)?.is_some_and(|target| answers(&target)))
}

/// A device as the process that has the pool open can find it: it has a folder of its own.
///
/// # Errors
/// The configuration cannot be read; the process is on another host, and the path says not where.
pub(crate) fn path(which: &Which, path: &str) -> anyhow::Result<String> {
    if let Some(Target::Remote(_)) = select::target(which)? {
        return match block_io::relative_to(path, Path::new("/")) == path {
            true => Ok(path.to_owned()),
            false => Err(UsageError::new(format!(
                "{path} is a relative path; give the absolute one that the device has on the pool's host"
            ))
            .into()),
        };
    }
    Ok(block_io::relative_to(path, &std::env::current_dir()?))
}

/// Has the process that has the pool open do something, and watches the jobs that it begins. None if there is none.
///
/// # Errors
/// The configuration cannot be read; the process refuses, or fails.
pub(crate) fn perform(which: &Which, operation: &Operation) -> anyhow::Result<Option<Outcome>> {
    let Some(target) = select::target(which)? else {
        return Ok(None);
    };
    let client = Client::new(target)?;
    let begun = match client.storage(&StorageRequest::Begin(operation.clone())) {
        Ok(StorageAnswer::Pool(outcome)) => *outcome,
        Ok(_) => return Err(unexpected()),
        Err(ClientError::Connect { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let wanted: Vec<u32> = begun.jobs.iter().map(|job| job.id).collect();
    if wanted.is_empty() {
        return Ok(Some(Outcome {
            interrupted: false,
            ..begun
        }));
    }
    let mut watch = Watch::new(which.json)?;
    watch.leaves_it();
    let watched = wait(&client, &wanted, begun, &mut watch);
    watch.clear();
    watched.map(Some)
}

/// Watches a job that the process that has the pool open has begun, until it has ended or the person does not want to wait; how it is then.
///
/// # Errors
/// The configuration cannot be read; the process fails.
pub(crate) fn wait_for(which: &Which, job: &JobStatus) -> anyhow::Result<JobStatus> {
    let Some(target) = select::target(which)? else {
        return Ok(job.clone());
    };
    let client = Client::new(target)?;
    let mut watch = Watch::new(which.json)?;
    watch.leaves_it();
    let mut job = job.clone();
    while job.state == JobState::Running
        && watch.notice(&Notice::Progress(std::slice::from_ref(&job))) == Flow::GoOn
    {
        std::thread::sleep(LOOK);
        let StorageAnswer::Status(status) = client.storage(&StorageRequest::Status)? else {
            return Err(unexpected());
        };
        let found = status.jobs.into_iter().find(|other| other.id == job.id);
        job = found.ok_or_else(|| anyhow::anyhow!("the pool does not know job {} any more", job.id))?;
    }
    watch.clear();
    Ok(job)
}

/// Waits until jobs have ended, or rest; `outcome` is what is known so far.
fn wait(client: &Client, wanted: &[u32], outcome: Outcome, watch: &mut Watch) -> anyhow::Result<Outcome> {
    let mut outcome = outcome;
    loop {
        let jobs: Vec<JobStatus> = outcome
            .pool
            .jobs
            .iter()
            .filter(|job| wanted.contains(&job.id))
            .cloned()
            .collect();
        let runs = jobs.iter().any(|job| job.state == JobState::Running);
        outcome.jobs = jobs;
        outcome.interrupted = runs && watch.notice(&Notice::Progress(&outcome.jobs)) == Flow::Stop;
        if !runs || outcome.interrupted {
            break;
        }
        std::thread::sleep(LOOK);
        outcome.pool = match client.storage(&StorageRequest::Status)? {
            StorageAnswer::Status(status) => *status,
            _ => return Err(unexpected()),
        };
    }
    if outcome.interrupted {
        return Ok(outcome);
    }
    // What happened meanwhile comes with an answer to what is waited for.
    let done = outcome.jobs.iter().find(|job| !job.is_live()).map(|job| job.id);
    if let Some(job) = done {
        let last = StorageRequest::Pool(Operation::WaitJob { job: Some(job) });
        let StorageAnswer::Pool(last) = client.storage(&last)? else {
            return Err(unexpected());
        };
        outcome.events.extend(last.events);
        outcome.pool = last.pool;
    }
    Ok(outcome)
}

fn answers(target: &Target) -> bool {
    match target {
        Target::Socket(socket) | Target::Manager(socket, _) => UnixStream::connect(socket).is_ok(),
        // Its devices are not here.
        Target::Remote(_) => true,
    }
}

/// Where the pool is: a machine that has it open is asked to move data.
///
/// # Errors
/// The configuration cannot be read.
pub(crate) fn pool(which: &Which) -> anyhow::Result<PoolAt> {
    let Some(target) = select::target(which)?.filter(answers) else {
        return Ok(PoolAt::Devices(select::devices(which)?));
    };
    let client = Client::new(target)?;
    Ok(PoolAt::Machine(Box::new(move |request| {
        match client.transfer(request) {
            Ok((early, stream)) => Ok(Line { early, stream }),
            Err(ClientError::Problem(problem)) => Err(*problem),
            Err(error) => Err(Problem::new(
                ProblemKind::Host,
                format!("{:#}", anyhow::Error::new(error)),
            )),
        }
    })))
}

/// The answer is not one to what was asked.
pub(crate) fn unexpected() -> anyhow::Error {
    anyhow::anyhow!("the machine answered something else than it was asked; is it of this version?")
}
