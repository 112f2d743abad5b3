//! How long a connection may live that carries one request.
//!
//! A request may take long: a merge, a scrub. What must not take long is what the client does: send its head and body, read its answer. So the
//! clock runs only while no request is being done. An answer whose length nobody knows, a stream of events, may take for ever: its clock begins
//! anew with each piece that the client had room for.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use crate::room;

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

/// A body, each piece of which gives the client more time if nobody knows how many there will be.
struct Timed<B> {
    body: B,
    deadline: Deadline,
}

impl<B: Body<Data = Bytes> + Unpin> Body for Timed<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let is_stream = self.body.size_hint().exact().is_none();
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if is_stream && matches!(frame, Some(Ok(_))) {
            self.deadline.set(Some(Instant::now() + IDLE_TIMEOUT));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Serves one request of `stream`, by `answer`.
pub(crate) async fn serve<S, B, F>(stream: S, answer: impl Fn(Request<Incoming>) -> F)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    F: Future<Output = Response<B>>,
{
    let deadline = Deadline::new();
    let service = service_fn(|request: Request<Incoming>| {
        // Else it is when its body has been read.
        if request.body().is_end_stream() {
            room::request_is_complete();
        }
        let (answer, deadline) = (answer(request), deadline.clone());
        async move {
            deadline.set(None);
            let answered = answer.await;
            deadline.set(Some(Instant::now() + IDLE_TIMEOUT));
            Ok::<_, Infallible>(answered.map(|body| Timed { body, deadline }))
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

        // Nothing at all; half a head.
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

    #[tokio::test(start_paused = true)]
    async fn a_byte_per_second_is_too_slow() {
        let answer = |request: Request<Incoming>| async move {
            let status = match crate::routes::bytes(request.into_body()).await {
                Ok(_) => 200,
                Err(problem) => problem.status,
            };
            let mut answer = Response::new(Full::new(Bytes::new()));
            *answer.status_mut() = hyper::StatusCode::from_u16(status).unwrap();
            answer
        };
        let head = "POST / HTTP/1.1\r\nhost: a-long-name-of-a-host\r\ncontent-length: 100\r\n\r\n";
        let chunked = "POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n";
        let slow = "1\r\nx\r\n".repeat(100);
        for (at_once, slowly, expected) in [
            ("", head, ""),
            (head, slow.as_str(), "HTTP/1.1 504"),
            (chunked, &slow, "HTTP/1.1 504"),
        ] {
            let (client, server) = duplex(1024);
            let begin = Instant::now();
            tokio::spawn(serve(server, answer));
            let (mut read, mut write) = tokio::io::split(client);
            write.write_all(at_once.as_bytes()).await.unwrap();
            let sent = tokio::spawn({
                let slowly = slowly.to_owned();
                async move {
                    for byte in slowly.as_bytes() {
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        if write.write_all(&[*byte]).await.is_err() {
                            break;
                        }
                    }
                }
            });
            let mut text = Vec::new();
            let _ = read.read_to_end(&mut text).await;
            let text = String::from_utf8_lossy(&text).into_owned();
            assert!(text.starts_with(expected), "{text}");
            assert!(begin.elapsed() <= IDLE_TIMEOUT, "{at_once} {:?}", begin.elapsed());
            sent.abort();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_lasts_as_long_as_somebody_takes_what_comes() {
        /// A piece every ten seconds.
        struct Endless(Pin<Box<tokio::time::Sleep>>);
        impl Body for Endless {
            type Data = Bytes;
            type Error = Infallible;

            fn poll_frame(
                mut self: Pin<&mut Self>,
                context: &mut Context<'_>,
            ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
                ready!(self.0.as_mut().poll(context));
                self.0.as_mut().reset(Instant::now() + Duration::from_secs(10));
                Poll::Ready(Some(Ok(Frame::data(Bytes::from(vec![b'x'; 8192])))))
            }
        }
        let stream = |_| async { Response::new(Endless(Box::pin(tokio::time::sleep(Duration::ZERO)))) };
        let begin = Instant::now();
        let (mut client, server) = duplex(1024);
        let served = tokio::spawn(serve(server, stream));
        client
            .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .unwrap();
        let mut piece = vec![0; 8192];
        for _ in 0..100 {
            client.read_exact(&mut piece).await.unwrap();
        }
        assert!(begin.elapsed() > Duration::from_secs(600));
        // Now it takes nothing any more: hyper keeps 16 KiB, and then no piece is asked for.
        let begin = Instant::now();
        served.await.unwrap();
        assert!(begin.elapsed() < 4 * IDLE_TIMEOUT, "{:?}", begin.elapsed());
    }
}
