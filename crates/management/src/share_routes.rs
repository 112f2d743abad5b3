//! Requests to `smsvmm share`: what is served, who is connected, what comes and goes.
//!
//! Names of disks have slashes. In a path they are encoded (`/v1/share/disks/%2Fvm%2Froot.dsk`); those that are not encoded do as well.

use std::sync::Arc;
use std::time::Duration;

use api::{Problem, ProblemKind, Share, ShareDisk, StorageRequest};
use hyper::header::{HeaderValue, LOCATION};
use hyper::{Method, Request, StatusCode};

use crate::events::Events;
use crate::lasting::{self, Lasting};
use crate::routes::{
    self, Answer, Content, MACHINE_TIMEOUT, STORAGE_TIMEOUT, body, json, no_content, not_allowed,
};
use crate::{metrics, openapi, page};

/// Longest time that clients and a disk may take until the disk is free.
pub(crate) const REMOVAL_TIMEOUT: Duration = Duration::from_secs(600);

/// What requests work on.
pub(crate) struct ShareContext {
    share: Arc<dyn Share>,
    pub(crate) events: Events<dyn Share>,
    /// Those that may last.
    pub(crate) lasting: Lasting,
}

impl ShareContext {
    pub(crate) fn new(share: Arc<dyn Share>, lasting: Lasting) -> Self {
        Self {
            events: Events::new(&share, |share| share.events()),
            share,
            lasting,
        }
    }

    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&dyn Share) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let share = Arc::clone(&self.share);
        routes::help(MACHINE_TIMEOUT, move || question(&*share)).await
    }

    /// The same for what may take longer.
    async fn wait<T: Send + 'static>(
        &self,
        limit: Duration,
        question: impl FnOnce(&dyn Share) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let share = Arc::clone(&self.share);
        self.lasting.help(limit, move || question(&*share)).await
    }
}

/// Answers any request.
pub(crate) async fn answer(context: &ShareContext, mut request: Request<Content>) -> Answer {
    if request.method() == Method::HEAD {
        // The same answer, of which hyper sends the head only.
        *request.method_mut() = Method::GET;
    }
    match route(context, request).await {
        Ok(answer) => answer,
        Err(found) => routes::problem(&found),
    }
}

async fn route(context: &ShareContext, request: Request<Content>) -> Result<Answer, Problem> {
    let path = request.uri().path().to_owned();
    let parts: Vec<&str> = path.strip_prefix('/').unwrap_or(&path).split('/').collect();
    let method = request.method().clone();
    match (parts.as_slice(), &method) {
        (["v1", "share"], &Method::GET) => {
            Ok(json(StatusCode::OK, &context.ask(|share| share.status()).await?))
        }
        (["v1", "share"], _) => Ok(not_allowed(&method, "GET")),
        (["v1", "share", "stop"], &Method::PUT) => {
            context.ask(|share| share.stop()).await?;
            Ok(routes::empty(StatusCode::ACCEPTED))
        }
        (["v1", "share", "stop"], _) => Ok(not_allowed(&method, "PUT")),
        (["v1", "share", "disks", rest @ ..], _) => disks(context, rest, request).await,
        (["v1", "share", "clients", rest @ ..], _) => clients(context, rest, request).await,
        (["v1", "storage"], &Method::POST) => {
            let asked: StorageRequest = body(request.into_body()).await?;
            let answer = match lasting::is_quick(&asked) {
                true => context.ask(move |share| share.storage(asked)).await?,
                false => {
                    context
                        .wait(STORAGE_TIMEOUT, move |share| share.storage(asked))
                        .await?
                }
            };
            Ok(json(StatusCode::OK, &answer))
        }
        (["v1", "storage"], _) => Ok(not_allowed(&method, "POST")),
        (["v1", "events"], &Method::GET) => {
            let (events, lasting) = (&context.events, &context.lasting);
            events.answer(request.uri(), request.headers(), lasting).await
        }
        (["v1", "events"], _) => Ok(not_allowed(&method, "GET")),
        (["metrics"] | ["v1", "metrics"], &Method::GET) => {
            Ok(metrics::share(&context.ask(|share| share.status()).await?))
        }
        (["metrics"] | ["v1", "metrics"], _) => Ok(not_allowed(&method, "GET")),
        (rest, _) => routes::common(rest, &method, openapi::SHARE).ok_or_else(|| routes::no_such_path(&path)),
    }
}

/// The name that the rest of a path is.
fn name_of(rest: &[&str]) -> Result<String, Problem> {
    let text = rest.join("/");
    page::plain(&text).ok_or_else(|| {
        Problem::new(ProblemKind::Invalid, "the path is not encoded as paths are")
            .about(text)
            .remedy("write % as %25")
    })
}

/// Everything below /v1/share/disks.
async fn disks(context: &ShareContext, rest: &[&str], request: Request<Content>) -> Result<Answer, Problem> {
    match (rest, request.method()) {
        ([], &Method::GET) => {
            let status = context.ask(|share| share.status()).await?;
            page::answer(request.uri(), status.disks, |disk| disk.name.clone())
        }
        ([], &Method::POST) => {
            let disk: ShareDisk = body(request.into_body()).await?;
            let added = context
                .wait(REMOVAL_TIMEOUT, move |share| share.add(disk))
                .await?;
            let mut answer = json(StatusCode::CREATED, &added);
            let place = format!("/v1/share/disks/{}", page::encode_whole(&added.name));
            if let Ok(location) = HeaderValue::try_from(place) {
                answer.headers_mut().insert(LOCATION, location);
            }
            Ok(answer)
        }
        ([], method) => Ok(not_allowed(method, "GET, POST")),
        (_, &Method::GET) => {
            let name = name_of(rest)?;
            let status = context.ask(|share| share.status()).await?;
            let found = status.disks.into_iter().find(|disk| disk.name == name);
            let found = found.map(|disk| json(StatusCode::OK, &disk));
            found.ok_or_else(|| not_served(&name))
        }
        (_, &Method::DELETE) => {
            let name = name_of(rest)?;
            context
                .wait(REMOVAL_TIMEOUT, move |share| share.remove(&name))
                .await?;
            Ok(no_content())
        }
        (_, method) => Ok(not_allowed(method, "GET, DELETE")),
    }
}

fn not_served(name: &str) -> Problem {
    Problem::new(ProblemKind::NotFound, "no such disk is served")
        .about(name)
        .remedy("`smsvmm share status` lists the disks")
}

/// Everything below /v1/share/clients.
async fn clients(
    context: &ShareContext,
    rest: &[&str],
    request: Request<Content>,
) -> Result<Answer, Problem> {
    match (rest, request.method()) {
        ([], &Method::GET) => {
            let status = context.ask(|share| share.status()).await?;
            page::answer(request.uri(), status.clients, |client| client.id.clone())
        }
        ([], method) => Ok(not_allowed(method, "GET")),
        ([_], &Method::DELETE) => {
            let id = name_of(rest)?;
            context
                .wait(REMOVAL_TIMEOUT, move |share| share.disconnect(&id))
                .await?;
            Ok(no_content())
        }
        ([_], method) => Ok(not_allowed(method, "DELETE")),
        _ => Err(routes::no_such_path(request.uri().path())),
    }
}
