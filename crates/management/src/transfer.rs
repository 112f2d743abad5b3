//! Connections that are taken out of HTTP, for the data of disks.
//!
//! The request is one as any other: who may not manage the machine, or wants something impossible, gets a problem. Otherwise the answer
//! is 101, and a thread of its own has the connection from then on.

use std::sync::Arc;
use std::thread;

use api::virtual_disk::TransferRequest;
use api::{Problem, ProblemKind, Transfer};
use hyper::header::{CONNECTION, HeaderValue, UPGRADE};
use hyper::upgrade::OnUpgrade;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::debug;

use crate::routes::{self, Answer, Content, Context};

/// What the connection is upgraded to.
pub(crate) const PROTOCOL: &str = "smsvmm-transfer";
/// Transfers at a time.
pub(crate) const MAX_TRANSFERS: usize = 4;

/// `POST /v1/storage/transfer`.
pub(crate) async fn answer(context: &Context, request: Request<Content>) -> Result<Answer, Problem> {
    let room = room(&context.transfers)?;
    let make = async |asked: TransferRequest| context.ask(move |vm| vm.transfer(asked)).await;
    take_out(request, PROTOCOL, "use `smsvmm disk`", room, make).await
}

/// Room for one more transfer.
pub(crate) fn room(transfers: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, Problem> {
    Arc::clone(transfers).try_acquire_owned().map_err(|_| {
        let detail = format!("{MAX_TRANSFERS} imports, exports or copies are under way already");
        Problem::new(ProblemKind::Exhausted, detail).remedy("do it again when one has ended")
    })
}

/// Takes the connection of a request out of HTTP, for what `make` returns for its body, which has `room` until it ends.
pub(crate) async fn take_out<T: DeserializeOwned>(
    mut request: Request<Content>,
    protocol: &'static str,
    or_use: &str,
    room: OwnedSemaphorePermit,
    make: impl AsyncFnOnce(T) -> Result<Transfer, Problem>,
) -> Result<Answer, Problem> {
    let wanted = request.headers().get(UPGRADE).map(HeaderValue::as_bytes);
    if !wanted.is_some_and(|wanted| wanted.eq_ignore_ascii_case(protocol.as_bytes())) {
        let problem = Problem::new(
            ProblemKind::Invalid,
            "this is only for connections that are upgraded",
        );
        return Err(problem.remedy(format!("send the header Upgrade: {protocol}, or {or_use}")));
    }
    let upgrade = hyper::upgrade::on(&mut request);
    let transfer = make(routes::body(request.into_body()).await?).await?;
    tokio::spawn(hand_over(upgrade, transfer, room));
    let mut answer = routes::empty(StatusCode::SWITCHING_PROTOCOLS);
    let headers = answer.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(protocol));
    Ok(answer)
}

/// Gives the connection to a thread, when it has come out of HTTP.
async fn hand_over(upgrade: OnUpgrade, transfer: Transfer, room: OwnedSemaphorePermit) {
    let upgraded = match upgrade.await {
        Ok(upgraded) => upgraded,
        Err(error) => return debug!(%error, "a transfer's connection broke"),
    };
    let Ok(parts) = upgraded.downcast::<TokioIo<UnixStream>>() else {
        return debug!("a transfer's connection is not what was accepted");
    };
    if !parts.read_buf.is_empty() {
        // Who sends before it is told that it may does not speak this protocol.
        return debug!("a transfer's client did not wait for the answer");
    }
    let stream = parts.io.into_inner().into_std();
    let stream = stream.and_then(|stream| stream.set_nonblocking(false).map(|()| stream));
    let stream = match stream {
        Ok(stream) => stream,
        Err(error) => return debug!(%error, "a transfer's connection cannot be used"),
    };
    let started = thread::Builder::new().name("transfer".into()).spawn(move || {
        transfer(stream);
        drop(room);
    });
    if let Err(error) = started {
        debug!(%error, "there can be no more threads for a transfer");
    }
}
