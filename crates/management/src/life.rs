//! How long a connection may live that carries one request.
//!
//! A request may take long: a merge, a scrub. What must not take long is what the client does: send its head and body, read its answer. So the
//! clock runs only while no request is being done.

use std::convert::Infallible;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::body::{Body, Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, sleep_until};
use tracing::debug;

/// Longest time in which a client must have sent its request's head.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time of a connection without a request that is being done.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest head of a request in bytes.
const MAX_HEAD: usize = 16 << 10;

/// When the connection is over; none while a request is being done.
#[derive(Clone)]
struct Deadline(Arc<Mutex<Option<Instant>>>);

impl Deadline {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Some(Instant::now() + IDLE_TIMEOUT))))
    }

    fn get(&self) -> Option<Instant> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, deadline: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = deadline;
    }

    async fn is_over(&self) {
        loop {
            let now = Instant::now();
            match self.get() {
                Some(deadline) if deadline <= now => return,
                Some(deadline) => sleep_until(deadline).await,
                None => sleep_until(now + IDLE_TIMEOUT / 2).await,
            }
        }
    }
}

/// Serves one request of `stream`, by `answer`.
pub(crate) async fn serve<S, B, F>(stream: S, answer: impl Fn(Request<Incoming>) -> F)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    B: Body<Data = Bytes> + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    F: Future<Output = Response<B>>,
{
    let deadline = Deadline::new();
    let service = service_fn(|request| {
        let (answer, deadline) = (answer(request), deadline.clone());
        async move {
            deadline.set(None);
            let answered = answer.await;
            deadline.set(Some(Instant::now() + IDLE_TIMEOUT));
            Ok::<_, Infallible>(answered)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::select! {
        ended = connection => if let Err(error) = ended {
            debug!(%error, "a management connection broke");
        },
        () = deadline.is_over() => debug!("a management connection took too long"),
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::Full;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_request_may_take_an_hour_and_a_client_may_not() {
        const HOUR: Duration = Duration::from_secs(3600);
        let answer = |_| async {
            tokio::time::sleep(HOUR).await;
            Response::new(Full::new(Bytes::from_static(b"done")))
        };
        let (mut client, server) = duplex(1024);
        tokio::spawn(serve(server, answer));
        client
            .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).await.unwrap();
        assert!(text.ends_with("done"), "{text}");

        // Nothing at all; half a head; a byte of a head every nine seconds.
        for head in ["", "GET / HT"] {
            let (mut client, server) = duplex(1024);
            let begin = Instant::now();
            tokio::spawn(serve(server, answer));
            client.write_all(head.as_bytes()).await.unwrap();
            client.read_to_end(&mut Vec::new()).await.unwrap();
            assert!(begin.elapsed() <= IDLE_TIMEOUT, "{head}");
        }
        // An answer that nobody reads.
        let long = |_| async { Response::new(Full::new(Bytes::from(vec![0; 1 << 20]))) };
        let (mut client, server) = duplex(64);
        let served = tokio::spawn(serve(server, long));
        client
            .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .unwrap();
        let begin = Instant::now();
        served.await.unwrap();
        assert!(begin.elapsed() <= 2 * IDLE_TIMEOUT);
    }
}
