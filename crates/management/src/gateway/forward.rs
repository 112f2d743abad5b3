//! Requests on their way to a machine's socket, and answers back.

use std::path::Path;
use std::time::Duration;

use api::{Problem, ProblemKind};
use http_body_util::{Either, Full};
use hyper::body::Bytes;
use hyper::header::{
    ACCEPT, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, ETAG, HeaderMap, HeaderName, IF_MATCH, IF_NONE_MATCH,
    UPGRADE,
};
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional;
use tokio::net::UnixStream;
use tokio::time::timeout;
use tracing::debug;

use super::stream::Watched;
use crate::console::{self, Closing, Guard};
use crate::{client, repeated, routes, sse};

/// How long a machine's socket may take to accept.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Headers of an answer that are passed on.
const PASSED_ON: [HeaderName; 9] = [
    CONTENT_TYPE,
    ETAG,
    CACHE_CONTROL,
    CONNECTION,
    UPGRADE,
    hyper::header::LOCATION,
    hyper::header::ALLOW,
    hyper::header::LINK,
    repeated::REPLAYED,
];

/// Headers of a request that are passed on.
const TOLD: [HeaderName; 5] = [ACCEPT, sse::LAST_EVENT_ID, IF_MATCH, IF_NONE_MATCH, repeated::KEY];

/// The body of an answer: made here, or a machine's.
pub(crate) type AnswerBody = Either<routes::Body, Watched>;

fn not_running(name: &str, why: impl std::fmt::Display) -> Problem {
    Problem::new(ProblemKind::NotFound, format!("it does not answer: {why}"))
        .about(name)
        .remedy("see whether its process runs; `smsvmm run` starts it")
}

/// A request for the machine called `name`; `path` is as its socket knows it.
pub(crate) struct Outgoing<'a> {
    pub(crate) name: &'a str,
    pub(crate) socket: &'a Path,
    pub(crate) method: Method,
    pub(crate) path: &'a str,
    /// The client's, of which few are passed on.
    pub(crate) headers: &'a HeaderMap,
    pub(crate) body: Bytes,
    /// The client wants to go on with this, outside of HTTP.
    pub(crate) upgrade: Option<(OnUpgrade, Vec<u8>)>,
    /// What is upgraded is a console, which may be used as long as this permits.
    pub(crate) guard: Option<Guard>,
}

/// Asks the machine. The answer may be long in coming.
pub(crate) async fn forward(outgoing: Outgoing<'_>) -> Result<Response<AnswerBody>, Problem> {
    let Outgoing {
        name,
        socket,
        method,
        path,
        headers,
        body,
        upgrade,
        guard,
    } = outgoing;
    let connected = timeout(CONNECT_TIMEOUT, UnixStream::connect(socket)).await;
    let stream = match connected {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(not_running(name, error)),
        Err(_) => return Err(not_running(name, "its socket takes no connection")),
    };
    let broken = |error: hyper::Error| {
        Problem::new(
            ProblemKind::Host,
            format!("the connection to the machine broke: {error}"),
        )
        .about(name)
    };
    let protocol = upgrade.as_ref().map(|(_, protocol)| protocol.as_slice());
    let mut request = client::request(&method, path, protocol);
    for header in TOLD {
        // All of them: half a condition is another one.
        for value in headers.get_all(&header) {
            request = request.header(&header, value);
        }
    }
    let request = request.body(Full::new(body)).map_err(|error| {
        Problem::new(ProblemKind::Invalid, format!("it cannot be passed on: {error}")).about(path)
    })?;
    let mut answer = client::send(stream, request).await.map_err(broken)?;
    if answer.status() == StatusCode::SWITCHING_PROTOCOLS
        && let Some((client, _)) = upgrade
    {
        let machine = hyper::upgrade::on(&mut answer);
        tokio::spawn(join(client, machine, guard));
    }
    let (parts, body) = answer.into_parts();
    let mut passed_on = Response::new(Either::Right(Watched::new(body)));
    *passed_on.status_mut() = parts.status;
    for header in PASSED_ON {
        if let Some(value) = parts.headers.get(&header) {
            passed_on.headers_mut().insert(header, value.clone());
        }
    }
    Ok(passed_on)
}

/// Bytes in both directions, until both ends have ended.
async fn join(client: OnUpgrade, machine: OnUpgrade, guard: Option<Guard>) {
    let console = guard.map(|guard| (guard.may_go_on, Closing::new(guard.ended)));
    let (client, machine) = match tokio::try_join!(client, machine) {
        Ok(both) => both,
        Err(error) => {
            if let Some((_, closing)) = console {
                closing.tell("the connection broke before it began");
            }
            return debug!(%error, "a transfer broke before it began");
        }
    };
    let (mut client, mut machine) = (TokioIo::new(client), TokioIo::new(machine));
    if let Some((may_go_on, closing)) = console {
        return closing.tell(console::relay(client, machine, false, may_go_on).await);
    }
    if let Err(error) = copy_bidirectional(&mut client, &mut machine).await {
        debug!(%error, "a transfer broke");
    }
}
